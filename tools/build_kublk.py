#!/usr/bin/env python3
"""Build kublk, the kernel's own ublk test server, as a peer to compare with; print where it is.

It comes from Debian's linux-source package (tools/testing/selftests/ublk, GPL-2.0), is built in the
user's cache and stays there: nothing of it is part of this project. Debian 12's liburing is too old
for it (io_uring_setup_buf_ring, in 2.4), so a newer one is linked statically. The download is about
170 MB, once.

  tools/build_kublk.py               build it unless it is there, and print its path
  tools/build_kublk.py --fresh       fetch and build again
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "vm"))

from vm_kernels import (
    DEFAULT_SUITE,
    AptRoot,
    Mirror,
    VmError,
    cache_dir,
    configured_mirrors,
    derive_mirror,
    locked,
    note,
    require_tools,
)

SERIES = "7.3"
SELFTEST = "tools/testing/selftests/ublk"
TOOLS = {"apt-get": "apt", "dpkg-deb": "dpkg", "gcc": "gcc", "xz": "xz-utils"}
NOT_KUBLK = "metadata_size.c"  # a program of its own


def kublk_path() -> Path:
    """Return where kublk is, or will be."""
    return cache_dir("kublk") / SERIES / "kublk"


def build() -> Path:
    """Fetch what kublk is made of, build it, and return its path.

    :raises VmError: if the archive does not have it, or the compiler refuses.
    """
    require_tools(TOOLS)
    mirrors = configured_mirrors()
    source, library = (
        _mirror(mirrors, suite) for suite in (DEFAULT_SUITE, DEFAULT_SUITE.partition("-")[0])
    )
    target = kublk_path()
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=cache_dir("kublk")) as name:
        work = Path(name)
        packages = _download(work / "source", source, f"linux-source-{SERIES}", "linux-libc-dev")
        packages |= _download(work / "library", library, "liburing-dev")
        for name in ("linux-libc-dev", "liburing-dev"):
            subprocess.run(["dpkg-deb", "-x", str(packages[name]), str(work)], check=True)
        _unpack_source(packages[f"linux-source-{SERIES}"], work / "kublk.src")
        _compile(work / "kublk.src", work / "usr", work / "kublk")
        (work / "kublk").rename(target)
    return target


def _mirror(mirrors: list[Mirror], suite: str) -> Mirror:
    mirror = derive_mirror(mirrors, suite)
    if mirror is None:
        raise VmError(f"this machine's apt knows no mirror of Debian: cannot fetch from {suite}")
    return mirror


def _download(root: Path, mirror: Mirror, *names: str) -> dict[str, Path]:
    note(f"fetching {', '.join(names)} from {mirror.suite}")
    root.mkdir()
    apt = AptRoot(root / "apt", mirror)
    apt.run("apt-get", "update")
    apt.run("apt-get", "download", *names, cwd=root)
    return {name: next(root.glob(f"{name}_*.deb")) for name in names}


def _unpack_source(deb: Path, directory: Path) -> None:
    # One directory of it: all would be 1.6 GB.
    directory.mkdir()
    with (
        subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE) as dpkg,
        tarfile.open(fileobj=dpkg.stdout, mode="r|") as package,
    ):
        inner = next(member for member in package if member.name.endswith(".tar.xz"))
        with tarfile.open(fileobj=package.extractfile(inner), mode="r|xz") as archive:
            for member in archive:
                path = Path(member.name)
                if member.isfile() and str(path.parent).endswith(SELFTEST):
                    _write(archive, member, directory / path.name)
        dpkg.kill()  # what follows in the package is not wanted


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    source = archive.extractfile(member)
    assert source is not None
    with source, path.open("wb") as file:
        shutil.copyfileobj(source, file)


def _compile(directory: Path, usr: Path, target: Path) -> None:
    # As its Makefile does, but without the kernel's own make.
    sources = [path for path in sorted(directory.glob("*.c")) if path.name != NOT_KUBLK]
    library = next(usr.glob("lib/**/liburing.a"))
    include = usr / "include"
    # linux-libc-dev is one package for all architectures, or has the one's own in the usual place.
    asm = [usr / "lib/linux/uapi/x86", include / "x86_64-linux-gnu"]
    command = ["gcc", "-O3", "-D_GNU_SOURCE", f"-I{include}", *(f"-I{path}" for path in asm)]
    command += [*map(str, sources), str(library), "-lpthread", "-lm", "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise VmError(f"kublk does not compile: {done.stderr.strip()}")


def main() -> int:
    """Run the program; errors become one line on stderr."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fresh", action="store_true", help="build it again")
    arguments = parser.parse_args()
    try:
        with locked(cache_dir("kublk") / "lock", "waiting for another build to finish"):
            if arguments.fresh or not kublk_path().exists():
                build()
    except (VmError, OSError, subprocess.CalledProcessError) as error:
        note(str(error))
        return 1
    print(kublk_path())
    return 0


if __name__ == "__main__":
    sys.exit(main())
