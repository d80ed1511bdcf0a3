"""tools/vm.py without a guest: its arguments, its choice of packages and mirrors, its streams."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path[:0] = [str(TOOLS), str(TOOLS / "vm")]

import vm  # noqa: E402
import vm_guest  # noqa: E402
import vm_kernels  # noqa: E402
from vm_kernels import Mirror  # noqa: E402

MAIN = "http://mirror.example/debian/"
SECURITY = "http://mirror.example/debian-security/"
SECURITY_12 = Mirror(SECURITY, "bookworm-security")
SECURITY_13 = Mirror(SECURITY, "trixie-security")


def test_arguments_leave_the_command_alone_when_it_has_options() -> None:
    arguments = vm.parse_arguments(["--cpus", "4", "--memory", "1G", "--", "ls", "--cpus", "--"])
    assert arguments.command == ["ls", "--cpus", "--"]
    assert (arguments.cpus, arguments.memory) == (4, 1024)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["ls", "-l"],
        ["--"],
        ["--cpus", "0", "--", "true"],
        ["--icount", "--cpus", "2", "--", "true"],
        ["--memory", "12X", "--", "true"],
        ["--memory", "1M", "--", "true"],
        ["--timeout", "-1", "--", "true"],
        ["--timeout", "nan", "--", "true"],
        ["--disk", "/nonexistent", "--", "true"],
        ["--disk", "/", "--", "true"],
        ["--shared", "/nonexistent", "--", "true"],
    ],
)
def test_arguments_are_a_usage_error_when_wrong(words: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        vm.parse_arguments(words)
    assert error.value.code == 2


def test_available_packages_are_those_with_files_in_them() -> None:
    output = """\
Package: linux-image-7.1.13+deb13-amd64
Installed-Size: 9
Filename: pool/shell.deb
Size: 1896

Package: linux-image-6.12.1+deb12-amd64
Installed-Size: 500000
Depends: kmod
Size: 107177456
Description: Linux
"""
    assert vm_kernels.parse_available(output) == {"linux-image-6.12.1+deb12-amd64"}


def test_newest_package_is_by_number_when_the_text_order_differs() -> None:
    names = [f"linux-image-6.12.{n}+deb12-amd64" for n in (9, 100, 38)]
    assert vm_kernels.choose_packages(names, "6.12") == ("6.12.100+deb12-amd64", [names[1]])


def test_newest_package_is_the_generic_flavour_when_there_are_others() -> None:
    names = [
        "linux-image-6.12-amd64",
        "linux-image-6.12.38+deb12-amd64-unsigned",
        "linux-image-6.12.48+deb12-amd64-dbg",
        "linux-image-6.12.48+deb12-cloud-amd64",
        "linux-image-6.12.48+deb12-rt-amd64",
        "linux-image-6.120.1+deb12-amd64",
    ]
    assert vm_kernels.choose_packages(names, "6.12") == ("6.12.38+deb12-amd64", [names[1]])


def test_newest_package_is_the_split_one_when_the_image_is_an_empty_shell() -> None:
    version = "7.3.4+deb13-amd64"
    split = [f"linux-{part}-{version}" for part in ("binary", "modules", "base")]
    assert vm_kernels.choose_packages([f"linux-image-{version}", *split], "7.3") == (version, split)


def test_newest_package_is_of_the_next_series_when_the_archive_has_moved_on() -> None:
    names = [f"linux-image-7.{n}+deb13-amd64" for n in ("4.1", "4.2", "30.1", "2.9")]
    assert vm_kernels.choose_packages(names, "7.3") == ("7.4.2+deb13-amd64", [names[1]])


def test_newest_package_is_none_when_there_are_older_ones_only() -> None:
    assert vm_kernels.choose_packages(["linux-image-7.3.1+deb13-amd64"], "7.30") is None


def test_cached_kernel_is_the_stand_in_until_there_is_a_real_one(tmp_path: Path) -> None:
    for version in ("7.3.9+deb13-amd64", "7.4.2+deb13-amd64"):
        assert vm_kernels.cached_kernel(tmp_path, "7.2") is None
        (tmp_path / version).mkdir()
        (tmp_path / version / "vmlinuz").touch()
    (tmp_path / "7.2").symlink_to("7.3.9+deb13-amd64")
    for series, version in (("7.2", "7.3.9"), ("7.4", "7.4.2")):
        kernel = vm_kernels.cached_kernel(tmp_path, series)
        assert kernel is not None
        assert kernel.modules is not None
        assert kernel.version == f"{version}+deb13-amd64" == kernel.modules.name


def test_mirrors_come_from_apts_targets() -> None:
    output = f"""\
{MAIN} bookworm main Packages
{MAIN} bookworm main Translations
{MAIN} bookworm contrib Packages
{SECURITY} bookworm-security main Packages
http://other.example/linux/debian/ bookworm stable Packages
http://pg.example/repos/apt/ bookworm-pgdg main Packages
cdrom:[Debian 12]/ bookworm main Packages
"""
    expected = [Mirror(MAIN, "bookworm"), Mirror(SECURITY, "bookworm-security")]
    assert vm_kernels.parse_targets(output) == expected


def test_mirrors_come_from_apts_uris_when_it_was_never_updated() -> None:
    output = f"""\
'{MAIN}dists/trixie/InRelease' mirror_dists_trixie_InRelease 0 
'{MAIN}dists/trixie/main/binary-amd64/Packages.xz' mirror_dists_trixie_main 0 
'{MAIN}dists/trixie/main/binary-all/Packages.xz' mirror_dists_trixie_main 0 
"""
    assert vm_kernels.parse_uris(output) == [Mirror(MAIN, "trixie")]


@pytest.mark.parametrize(
    ("configured", "suite", "uri"),
    [
        # Debian 12 and 13 as they are installed.
        ([Mirror(MAIN, "bookworm"), SECURITY_12], "trixie-backports", MAIN),
        ([SECURITY_13, Mirror(MAIN, "trixie")], "trixie-backports", MAIN),
        ([Mirror(MAIN, "trixie"), SECURITY_13], "bookworm-security", SECURITY),
        # A mirror of the very suite goes before any derived one.
        ([Mirror(MAIN, "trixie"), Mirror("b:/", "trixie-backports")], "trixie-backports", "b:/"),
        # No security archive configured: it is beside the main one.
        ([Mirror(MAIN, "bookworm-updates")], "bookworm-security", SECURITY),
    ],
)
def test_mirror_is_derived_from_the_configured_ones(
    configured: list[Mirror], suite: str, uri: str
) -> None:
    assert vm_kernels.derive_mirror(configured, suite) == Mirror(uri, suite)


def test_mirror_is_none_when_nothing_of_debian_is_configured() -> None:
    assert vm_kernels.derive_mirror([], "trixie-backports") is None
    assert vm_kernels.derive_mirror([SECURITY_12], "trixie-backports") is None


def test_signature_is_cut_off_when_the_module_has_one(tmp_path: Path) -> None:
    module = tmp_path / "x.ko"
    signature = bytes(8) + (100).to_bytes(4, "big") + vm_kernels.SIGNATURE_MAGIC
    for contents in (b"ELF" * 100, b"", vm_kernels.SIGNATURE_MAGIC[1:] * 2):
        module.write_bytes(contents + bytes(100) + signature if contents[:1] == b"E" else contents)
        vm_kernels.strip_signature(module)
        assert module.read_bytes() == contents


def test_boot_modules_come_after_what_they_depend_on(tmp_path: Path) -> None:
    (tmp_path / "modules.dep").write_text(
        "fs/top.ko: fs/mid-dle.ko.xz fs/low.ko\nfs/mid-dle.ko.xz: fs/low.ko\nfs/low.ko:\n"
    )
    modules = vm_guest.boot_modules(tmp_path, ["mid_dle", "built_in", "top"])
    assert list(modules) == ["low.ko", "mid_dle.ko", "top.ko"]


@pytest.mark.parametrize("nr_bytes", [1, 2, 7, 1000])
def test_stream_is_unmangled_when_marks_arrive_in_pieces(nr_bytes: int) -> None:
    reader, writer = os.pipe()
    stream = vm_guest.Stream("vm-MARK", writer)
    data = b"vm-MARK start\nvm-MAR\0 vm-vm-\nno newlinevm-MARK exit 3\n"
    pieces = [data[start : start + nr_bytes] for start in range(0, len(data), nr_bytes)]
    messages = [message for piece in pieces for message in stream.feed(piece)]
    os.close(writer)
    with open(reader, "rb") as file:
        assert file.read() == b"vm-MAR\0 vm-vm-\nno newline"
    assert messages == ["start", "exit 3"]


def test_stream_holds_nothing_back_when_it_cannot_be_a_mark() -> None:
    reader, writer = os.pipe()
    vm_guest.Stream("vm-MARK", writer).feed(b"prompt> v")
    assert os.read(reader, 100) == b"prompt> "
    os.close(reader)
    os.close(writer)


def test_kept_paths_are_the_entries_of_tmp_that_are_named(tmp_path: Path) -> None:
    below = tmp_path / "a b"  # the entry itself is found even if what follows has odd characters
    found = vm.kept_paths([f"cd {below}; ls", "/var/tmp/x", "/tmp", "/tmp/no-such-entry/x"])
    expected = ("/".join(tmp_path.parts[:3])[1:],) if tmp_path.parts[1] == "tmp" else ()
    assert found == expected
