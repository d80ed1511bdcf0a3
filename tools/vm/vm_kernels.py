"""Kernels for the guest: found in the user's cache, or fetched into it from Debian's archive.

In: a series ("6.12", "7.3") or the path of a kernel image.  Out: a Kernel, which is an image, its
version and its module tree.  Runs in the caller's thread and holds the cache's lock file while it
writes.  It never touches the system's own apt lists, and knows no mirror by name: it uses those
that this machine's apt is configured with.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# The suite of each series; every series not named here is looked for in the default one.
SUITES = {"6.12": "bookworm-security"}
DEFAULT_SUITE = "trixie-backports"
KEYRINGS = (
    "/usr/share/keyrings/debian-archive-keyring.gpg",
    "/usr/share/keyrings/debian-archive-keyring.pgp",
)
CODENAMES = "bullseye|bookworm|trixie|forky|duke|sid|(old){0,2}stable|testing|unstable"
DEBIAN_SUITE = re.compile(
    rf"({CODENAMES})(-updates|-security|/updates|-(proposed-updates|backports(-sloppy)?))?"
)
# These make up more than half of the bytes and drive hardware that no guest of ours has.
USELESS_MODULES = re.compile(
    r"kernel/(sound|drivers/(accel|comedi|gpu|iio|infiniband|media|staging|net/(ethernet|wireless)))/"
)
TOOLS = {"apt-get": "apt", "dpkg-deb": "dpkg", "xz": "xz-utils", "depmod": "kmod"}
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
SIGNATURE_MAGIC = b"~Module signature appended~\n"
APT_HELPER = "/usr/lib/apt/apt-helper"


class VmError(Exception):
    """Something outside the guest prevents the run; the text is the whole message for the user."""


@dataclass(frozen=True)
class Kernel:
    """A bootable kernel; `modules` is its lib/modules/VERSION, None if there is none."""

    version: str
    image: Path
    modules: Path | None


@dataclass(frozen=True)
class Mirror:
    """One suite of an archive, and where it is."""

    uri: str
    suite: str


def note(text: str) -> None:
    """Print one line to stderr."""
    print(f"vm: {text}", file=sys.stderr, flush=True)


def find_tool(name: str) -> str | None:
    """Return the path of a program; a plain user's PATH often lacks the sbin directories."""
    return shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")


def require_tools(packages: dict[str, str]) -> None:
    """Raise VmError, naming the Debian packages to install, unless all tools (the keys) exist."""
    missing = [tool for tool in packages if find_tool(tool) is None]
    if missing:
        names = " ".join(sorted({packages[tool] for tool in missing}))
        raise VmError(f"{', '.join(missing)} not found: apt-get install {names}")


def cache_dir(*below: str) -> Path:
    """Return this project's directory in the user's cache, or one below it; created if absent."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = Path(base).absolute().joinpath("ublk-loop", *below)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VmError(f"cannot create {path}: {error.strerror}; set XDG_CACHE_HOME") from error
    return path


@contextmanager
def locked(path: Path, why: str) -> Iterator[None]:
    """Hold the lock file `path`; say `why` if someone else has it and we have to wait."""
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            note(why)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# -- which kernel ----------------------------------------------------------------------------------


def find_kernel(name: str, refresh: bool = False) -> Kernel:
    """Return the kernel the user named: a series, from the cache or else fetched, or an image.

    :param refresh: ask the archive even if the cache holds a kernel of that series.
    :raises VmError: if there is no such kernel, or it cannot be fetched.
    """
    if not re.fullmatch(r"\d+\.\d+", name):
        return file_kernel(Path(name))
    found = None if refresh else cached_kernel(cache_dir("kernels"), name)
    if found is None:
        with locked(cache_dir() / "lock", "waiting for another fetch to finish"):
            found = None if refresh else cached_kernel(cache_dir("kernels"), name)
            found = found or fetch(cache_dir("kernels"), name)
    return found


def cached_kernel(root: Path, series: str) -> Kernel | None:
    """Return the newest kernel of `series` in the cache, or its stand-in, or None."""
    trees = [tree for tree in root.iterdir() if in_series(tree.name, series) and tree.exists()]
    if not trees:
        return None
    tree = max(trees, key=lambda tree: version_key(tree.name))
    if tree.is_symlink():
        tree = tree.resolve()
        note(f"no {series} kernel to be had when it was fetched: {tree.name} stands in")
    return tree_kernel(tree)


def tree_kernel(tree: Path) -> Kernel:
    """Return the kernel in one directory of the cache."""
    images = [tree / name for name in ("vmlinux", "vmlinuz") if (tree / name).exists()]
    return Kernel(tree.name, images[0], tree / "lib/modules" / tree.name)


def file_kernel(image: Path) -> Kernel:
    """Return the kernel of an image file; modules are looked for round it, then in the cache."""
    image = image.absolute()
    version = image_version(image)
    roots = [*image.parents, cache_dir("kernels") / version]
    for tree in (
        root / lib / version for root in roots for lib in ("lib/modules", "usr/lib/modules")
    ):
        if (tree / "modules.dep").exists():
            return Kernel(version, image, tree)
    note(f"no modules of {version} near {image}: all that the guest needs must be built in")
    return Kernel(version, image, None)


def image_version(image: Path) -> str:
    """Return the release that a bzImage says it is.

    Source: Documentation/arch/x86/boot.rst, fields `header` (0x202) and `kernel_version` (0x20e).
    """
    try:
        with open(image, "rb") as file:
            head = file.read(0x8000)
    except OSError as error:
        raise VmError(f"{image}: {error.strerror} (nor is it a series like 7.3)") from error
    offset = int.from_bytes(head[0x20E:0x210], "little") + 0x200
    if head[0x202:0x206] != b"HdrS" or offset == 0x200:
        raise VmError(f"{image} is not a bzImage")
    return head[offset:].split(b"\0")[0].split()[0].decode("ascii", "replace")


def version_key(version: str) -> list[tuple[int, str]]:
    """Return a sort key under which 6.12.9 comes before 6.12.10."""
    return [
        (int(part), "") if part.isdigit() else (-1, part)
        for part in re.findall(r"\d+|\D+", version)
    ]


def in_series(version: str, series: str) -> bool:
    """Return whether `version` belongs to `series`: 7.3 holds 7.3.4 but not 7.30."""
    return re.match(re.escape(series) + r"(?!\d)", version) is not None


def parse_available(output: str) -> set[str]:
    """Parse the output of `apt-cache dumpavail`: the names of the packages that hold something.

    Beside split kernels, and for removed ones, there are packages without files.
    """
    found = re.findall(r"^Package: (\S+)\n(?:.+\n)*?Size: (\d+)$", output, re.MULTILINE)
    return {name for name, nr_bytes in found if int(nr_bytes) > 100_000}


def choose_packages(available: Iterable[str], series: str) -> tuple[str, list[str]] | None:
    """Return the newest generic kernel of `series` as (version, packages).

    If the archive has moved on, it is the oldest of the series after it; None if there is neither.
    :param available: the names of all packages to choose from.
    """
    names = set(available)
    pattern = re.compile(r"linux-(?:image|binary)-(\d+\.\d+\.\d+[^-]*(?:-\d+)?-amd64)")
    versions = {match[1] for match in map(pattern.match, names) if match}
    usable = {version: layout for version in versions if (layout := find_layout(version, names))}
    wanted = [version for version in usable if in_series(version, series)]
    later = [version for version in usable if version_key(version) > version_key(series)]
    if not wanted and later:
        first = min(later, key=version_key)
        following = ".".join(first.split(".")[:2])
        wanted = [version for version in usable if in_series(version, following)]
    if not wanted:
        return None
    newest = max(wanted, key=version_key)
    return newest, usable[newest]


def find_layout(version: str, names: set[str]) -> list[str]:
    """Return the packages that together hold kernel `version`; none if they are incomplete."""
    return next((list_ for list_ in package_layouts(version) if names.issuperset(list_)), [])


def package_layouts(version: str) -> list[list[str]]:
    """Return the sets of packages that may hold kernel `version`, best first.

    Newer kernels are split, beside an empty linux-image; older ones are all in linux-image.
    """
    split = [f"linux-modules-{version}", f"linux-base-{version}"]
    return [
        [f"linux-binary-{version}", *split],
        [f"linux-image-{version}"],
        [f"linux-image-{version}-unsigned"],
    ]


# -- where from ------------------------------------------------------------------------------------


def configured_mirrors() -> list[Mirror]:
    """Return Debian's archives as this machine's apt is configured with them."""
    mirrors = parse_targets(apt_get("indextargets", "--format", TARGET_FORMAT))
    # Before the first `apt-get update`, as in a fresh container, apt has no targets to tell.
    return mirrors or parse_uris(apt_get("--print-uris", "update"))


TARGET_FORMAT = "$(REPO_URI) $(RELEASE) $(COMPONENT) $(CREATED_BY)"


def apt_get(*arguments: str) -> str:
    """Return what apt-get prints about this machine's configuration."""
    return subprocess.run(["apt-get", *arguments], capture_output=True, text=True).stdout


def parse_targets(output: str) -> list[Mirror]:
    """Parse the output of `apt-get indextargets --format TARGET_FORMAT`."""
    lines = (line.split() for line in output.splitlines())
    found = (Mirror(line[0], line[1]) for line in lines if line[2:] == ["main", "Packages"])
    return debian_only(found)


def parse_uris(output: str) -> list[Mirror]:
    """Parse the output of `apt-get --print-uris update`."""
    found = re.findall(r"^'(\S+?/)dists/(\S+?)/main/binary-\w+/Packages", output, re.MULTILINE)
    return debian_only(Mirror(uri, suite) for uri, suite in found)


def debian_only(mirrors: Iterable[Mirror]) -> list[Mirror]:
    """Return the mirrors of Debian's own archives: others may borrow its codenames, not both."""
    return [
        mirror
        for mirror in dict.fromkeys(mirrors)
        if DEBIAN_SUITE.fullmatch(mirror.suite) and not mirror.uri.startswith("cdrom:")
    ]


def derive_mirror(configured: list[Mirror], suite: str) -> Mirror | None:
    """Return where `suite` is to be had, judging by the configured mirrors, or None.

    All suites of the main archive are on one mirror, and so are all those of the security archive;
    a machine without the latter gets it from beside the former.
    """
    for mirror in configured:
        if mirror.suite == suite:
            return mirror
    security = [mirror.uri for mirror in configured if is_security(mirror.suite)]
    main = [mirror.uri for mirror in configured if not is_security(mirror.suite)]
    if is_security(suite):
        beside = [uri.rstrip("/") + "-security/" for uri in main if uri.endswith("/debian/")]
        uris = security + beside
    else:
        uris = main
    return Mirror(uris[0], suite) if uris else None


def is_security(suite: str) -> bool:
    """Return whether a suite is one of the security archive."""
    return suite.endswith(("-security", "/updates"))


class AptRoot:
    """An apt of our own in one directory: the machine's proxies and keys, nothing else of it."""

    # apt's own index targets are replaced by the one that is wanted: others may be large.
    CONF = """\
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear Acquire::IndexTargets;
Acquire::IndexTargets::deb::Packages {{
  MetaKey "$(COMPONENT)/binary-$(ARCHITECTURE)/Packages";
  ShortDescription "Packages";
  Description "$(RELEASE)/$(COMPONENT) $(ARCHITECTURE) Packages";
  Optional "false";
}};
Dir::Etc::SourceList "{root}/sources.list";
Dir::Etc::SourceParts "{root}/empty";
Dir::Etc::Preferences "{root}/none";
Dir::Etc::PreferencesParts "{root}/empty";
Dir::State "{root}/state";
Dir::State::Status "{root}/status";
Dir::Cache "{root}/cache";
Dir::Log "{root}/log";
APT::Architecture "amd64";
APT::Architectures {{ "amd64"; }};
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::Retries "3";
"""

    def __init__(self, root: Path, mirror: Mirror) -> None:
        self.root = root
        for name in ("empty", "state/lists/partial", "cache/archives/partial", "log"):
            (root / name).mkdir(parents=True)
        (root / "status").touch()
        (root / "apt.conf").write_text(self.CONF.format(root=root))
        # Without the keyring apt falls back on the keys it trusts for everything.
        keyring = next((path for path in KEYRINGS if os.path.exists(path)), None)
        options = "arch=amd64" + (f" signed-by={keyring}" if keyring else "")
        source = f"deb [{options}] {mirror.uri} {mirror.suite} main\n"
        (root / "sources.list").write_text(source)

    def run(self, *command: str, cwd: Path | None = None, capture: bool = False) -> str:
        """Run an apt command; its output comes back if `capture`, else goes to stderr."""
        done = subprocess.run(
            command,
            cwd=cwd,
            env={**os.environ, "APT_CONFIG": str(self.root / "apt.conf"), "LC_ALL": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if capture else sys.stderr,
            text=True,
        )
        if done.returncode:
            raise VmError(f"`{' '.join(command[:2])}` failed; what it said is above")
        return done.stdout or ""


# -- fetch and unpack ------------------------------------------------------------------------------


def fetch(root: Path, series: str) -> Kernel:
    """Fetch the newest kernel of `series` into the cache `root`.  The caller holds the lock."""
    suite = SUITES.get(series, DEFAULT_SUITE)
    mirror = derive_mirror(configured_mirrors(), suite)
    if mirror is None:
        raise VmError(f"this machine's apt knows no mirror of Debian: cannot fetch from {suite}")
    for stale in root.glob(".fetch-*"):  # left by a fetch that was killed
        shutil.rmtree(stale, ignore_errors=True)
    note(f"fetching a {series} kernel from {suite}: once, about 120 MB")
    with tempfile.TemporaryDirectory(
        prefix=".fetch-", dir=root, ignore_cleanup_errors=True
    ) as name:
        work = Path(name)
        apt = AptRoot(work / "apt", mirror)
        apt.run("apt-get", "update")
        names = parse_available(apt.run("apt-cache", "dumpavail", capture=True))
        newest = choose_packages(names, series)
        if newest is None:
            raise VmError(f"{suite} holds no {series} kernel; try another series or an image")
        version, packages = newest
        if not (root / version).exists():
            download(apt, packages, version, work)
            (work / "tree").rename(root / version)
        if not in_series(version, series):
            note(f"{suite} holds no {series} kernel any more: {version} stands in for it")
            (work / "link").symlink_to(version)
            (work / "link").rename(root / series)
    note(f"kernel {version} is in {root / version}")
    return tree_kernel(root / version)


def download(apt: AptRoot, packages: list[str], version: str, work: Path) -> None:
    """Download and unpack a kernel's packages, giving work/tree."""
    debs = work / "debs"
    debs.mkdir()
    apt.run("apt-get", "download", *packages, cwd=debs)
    note(f"unpacking {version}")
    unpack(sorted(debs.iterdir()), version, work / "tree")


def unpack(debs: list[Path], version: str, tree: Path) -> None:
    """Unpack packages into `tree`: vmlinuz, vmlinux, config and usable modules with an index."""
    modules = tree / "lib/modules" / version
    modules.mkdir(parents=True)
    for deb in debs:
        with (
            subprocess.Popen(
                ["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE
            ) as dpkg,
            tarfile.open(fileobj=dpkg.stdout, mode="r|") as archive,
        ):
            for member in archive:
                extract(archive, member, version, tree)
        if dpkg.returncode:
            raise VmError(f"{deb.name}: dpkg-deb failed")
    if not (tree / "vmlinuz").exists():
        raise VmError(f"no kernel image in {', '.join(deb.name for deb in debs)}")
    make_vmlinux(tree)
    decompress_modules(modules)
    depmod = find_tool("depmod")
    assert depmod is not None
    subprocess.run([depmod, "-b", str(tree), version], check=True)


def extract(archive: tarfile.TarFile, member: tarfile.TarInfo, version: str, tree: Path) -> None:
    """Write one file of a kernel's package to its place in `tree`, if it has one there."""
    name = member.name.removeprefix("./").removeprefix("usr/")
    inside = name.removeprefix(f"lib/modules/{version}/")
    if not member.isfile() or USELESS_MODULES.search(name) or ".." in name:
        return
    if inside in ("vmlinuz", "config"):
        target = tree / inside
    elif name in (f"boot/vmlinuz-{version}", f"boot/config-{version}"):
        target = tree / name.removeprefix("boot/").removesuffix(f"-{version}")
    elif inside != name:
        target = tree / name
    else:
        return
    source = archive.extractfile(member)
    assert source is not None
    target.parent.mkdir(parents=True, exist_ok=True)
    with source, open(target, "wb") as file:
        shutil.copyfileobj(source, file)


def make_vmlinux(tree: Path) -> None:
    """Decompress the kernel's image: an emulated processor takes more than a second for it.

    Left out if the image is not compressed with zstd, as Debian's are: the bzImage boots as well.
    Source: Documentation/arch/x86/boot.rst, `payload_offset` (0x248), `payload_length` (0x24c).
    """
    image = (tree / "vmlinuz").read_bytes()
    start = (image[0x1F1] + 1) * 512 + int.from_bytes(image[0x248:0x24C], "little")
    # The last four bytes are the decompressed length.
    payload = image[start : start + int.from_bytes(image[0x24C:0x250], "little") - 4]
    if not payload.startswith(ZSTD_MAGIC) or not os.path.exists(APT_HELPER):
        return
    compressed, vmlinux = tree / "vmlinux.zst", tree / "vmlinux"
    compressed.write_bytes(payload)
    # apt can always decompress zstd; the zstd program may be absent.
    with open(vmlinux, "wb") as file:
        done = subprocess.run([APT_HELPER, "cat-file", str(compressed)], stdout=file)
    compressed.unlink()
    with open(vmlinux, "rb") as file:
        good = file.read(4) == b"\x7fELF"
    if done.returncode or not good:
        vmlinux.unlink()


def decompress_modules(modules: Path) -> None:
    """Decompress all modules and cut off their signatures: both are slow work when emulated."""
    names = "\0".join(str(path) for path in modules.rglob("*.ko.xz"))
    command = ["xargs", "-0", "-r", "-P", "2", "-n", "200", "xz", "-d", "--"]
    if subprocess.run(command, input=names, text=True).returncode:
        raise VmError("xz could not decompress the kernel's modules")
    for path in modules.rglob("*.ko"):
        strip_signature(path)


def strip_signature(module: Path) -> None:
    """Cut the signature off a module.

    Source: struct module_signature in include/linux/module_signature.h, whose last field is the
    signature's length, big-endian; the magic string follows it.
    """
    with open(module, "r+b") as file:
        end = file.seek(0, os.SEEK_END) - len(SIGNATURE_MAGIC)
        if end > 12:
            file.seek(end - 4)
            length, magic = int.from_bytes(file.read(4), "big"), file.read()
            if magic == SIGNATURE_MAGIC:
                file.truncate(end - 12 - length)
