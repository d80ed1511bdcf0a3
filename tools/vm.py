#!/usr/bin/env python3
"""Run a command as root on a kernel that has the ublk driver, on a machine that has none.

The command runs in a guest whose root file system is a copy-on-write view of this machine's own:
the same files at the same paths, and what the guest changes is gone with it.  Its output comes as
it is written, and its exit code is this program's.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import platform
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parent / "vm"))

import vm_guest
import vm_kernels
from vm_guest import MAX_DISKS, TIMED_OUT, Guest, Job, Machine, Outcome
from vm_kernels import Kernel, VmError, cache_dir, find_kernel, note, require_tools

EXIT_TIMEOUT = 124
EXIT_GUEST = 125
CHECKOUT = Path(__file__).resolve().parent.parent
# The guest has file systems of its own in these directories; the pattern finds entries of ours.
OWN_PATH = re.compile(r"(?<![\w.~-])/(?:tmp|run|dev/shm)/[^/\s'\"`;:,|&<>()$]+")
# Everything else of the environment belongs to this machine: sessions, sockets, agents.
PASSED_ENV = [
    "PATH",
    "HOME",
    "LANG",
    "LANGUAGE",
    "LC_*",
    "TZ",
    "TERM",
    "COLUMNS",
    "LINES",
    "NO_COLOR",
    "FORCE_COLOR",
    "PY_COLORS",
    "CI",
    "GITHUB_*",
    "VIRTUAL_ENV",
    "PYENV_*",
    "PYTHON*",
    "PYTEST_*",
    "HYPOTHESIS_*",
    "COVERAGE_*",
    "UBLK_LOOP_*",
    "XDG_CACHE_HOME",
    "?SAN_OPTIONS",
    "??SAN_OPTIONS",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
]
EPILOG = """\
exit code: that of COMMAND; 124 if the time was over, 125 if the guest or its set-up failed, 2 for
wrong usage. A panic, a hang and a time-out print the end of the guest's console on stderr.

The guest has no network. It has its own /tmp, /run and /dev/shm: from this machine's it sees there
what COMMAND, the current directory, the checkout and the virtual environment name. As a plain user,
it sees the files that you may read.

Where this machine's own kernel has ublk_drv, root gets COMMAND run right here, unless an option
asks for a guest: --vm, --kernel, --icount or --disk.

examples:
  tools/vm.py -- uname -r
  tools/vm.py --kernel 6.12 --cpus 1 --timeout 600 -- .venv/bin/pytest tests/kernel
  tools/vm.py --icount --shared results -- sh -c 'dmesg >results/dmesg'
  truncate -s 1G disk.img; tools/vm.py --disk disk.img -- mkfs.ext4 /dev/vda
  tools/vm.py --kernel 7.3 --fetch        (the newest of its series, without running anything)
"""


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Return the parsed options; everything behind the first `--` is the command."""
    end = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        usage="%(prog)s [OPTION]... -- COMMAND...",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--vm", action="store_true", help="a guest even if this machine has ublk_drv")
    add("--kernel", metavar="K", help="7.3 (the default), 6.12, or a bzImage")
    add("--cpus", type=positive, metavar="N", help="processors (default: 2)")
    add("--memory", type=memory_mib, default=2048, metavar="M", help="as 512M or 4G (default: 2G)")
    add("--timeout", type=seconds, default=3600.0, metavar="S", help="0: none (default: 3600)")
    add("--icount", action="store_true", help="one processor, 1 instruction = 1 ns: repeatable")
    add("--one-thread", action="store_true",
        help="emulate all processors in turn, on one of ours: for guests side by side")  # fmt: skip
    add("--disk", type=disk, action="append", default=[], metavar="FILE", help="as /dev/vda, ...")
    add("--shared", type=directory, action="append", default=[], metavar="DIR",
        help="what the guest writes there is written here")  # fmt: skip
    add("--fetch", action="store_true", help="fetch the newest such kernel into the cache")
    arguments = parser.parse_args(argv[:end])
    arguments.command = argv[end + 1 :]
    check_arguments(parser, arguments)
    return arguments


def check_arguments(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """End with a usage error if the options do not fit together."""
    if not arguments.command and not arguments.fetch:
        parser.error("no COMMAND; it goes behind `--`")
    if arguments.icount and arguments.cpus not in (None, 1):
        parser.error("--icount is for one processor")
    if len(arguments.disk) > MAX_DISKS:
        parser.error(f"more than {MAX_DISKS} disks")


def positive(text: str) -> int:
    """Parse a number of at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def memory_mib(text: str) -> int:
    """Parse an amount of memory, in MiB unless it says otherwise."""
    match = re.fullmatch(r"(\d+)([MG]?)(i?B)?", text, re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text} is not an amount like 512M or 4G")
    value = int(match[1]) * (1024 if match[2] in ("G", "g") else 1)
    if value < 256:
        raise argparse.ArgumentTypeError(f"{text} is less than 256M, too little to boot")
    return value


def seconds(text: str) -> float:
    """Parse a time of at least 0."""
    value = float(text)
    if not 0 <= value < 1e8:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds")
    return value


def disk(text: str) -> Path:
    """Parse the name of a readable file."""
    path = Path(text).absolute()
    if path.is_dir() or not os.access(path, os.R_OK):
        raise argparse.ArgumentTypeError(f"{text} is no readable file")
    return path


def directory(text: str) -> Path:
    """Parse the name of an existing directory."""
    path = Path(text).absolute()
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is no directory")
    return path


# -- this machine's own kernel ---------------------------------------------------------------------


def host_has_ublk() -> bool:
    """Return whether we can use the driver of this machine's own kernel."""
    if os.geteuid() != 0:
        return False
    if not os.path.exists("/dev/ublk-control"):
        try:
            subprocess.run(["modprobe", "-q", "ublk_drv"], stderr=subprocess.DEVNULL)
        except FileNotFoundError:
            return False
    return os.path.exists("/dev/ublk-control")


def run_here(command: list[str], timeout_s: float | None) -> int:
    """Run the command on this machine, and return its exit code as a shell would."""
    note("this kernel has ublk_drv: running here, without a guest (--vm asks for one)")
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    except OSError as error:
        note(f"{command[0]}: {error.strerror}")
        return 127 if isinstance(error, FileNotFoundError) else 126
    try:
        status = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        note(f"{TIMED_OUT} ({timeout_s:g} s)")
        return EXIT_TIMEOUT
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return status if status >= 0 else 128 - status


# -- a guest ---------------------------------------------------------------------------------------


def guest_env() -> dict[str, str]:
    """Return the command's environment in the guest."""
    env = {
        name: value
        for name, value in os.environ.items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in PASSED_ENV)
    }
    path = env.get("PATH", "/usr/local/bin:/usr/bin:/bin").split(":")
    sbin = [name for name in ("/usr/local/sbin", "/usr/sbin", "/sbin") if name not in path]
    env["PATH"] = ":".join(path + sbin)
    return {"HOME": "/root", **env, "USER": "root", "LOGNAME": "root"}


def kept_paths(texts: list[str]) -> tuple[str, ...]:
    """Return the entries of our /tmp, /run and /dev/shm that `texts` mention: they stay visible."""
    found = OWN_PATH.findall("\n".join(texts))
    return tuple(sorted({path for path in found if os.path.lexists(path)}))


def make_job(arguments: argparse.Namespace) -> Job:
    """Return the guest's job."""
    cwd, env = os.getcwd(), guest_env()
    relative = [os.path.abspath(word) for word in arguments.command if not word.startswith("-")]
    places = [cwd, str(CHECKOUT), sys.prefix, env["HOME"], env.get("VIRTUAL_ENV", "")]
    kept = kept_paths([*places, *arguments.command, *relative])
    return Job(arguments.command, cwd, env, kept, arguments.timeout or None)


def kvm_works(kernel: Kernel) -> bool:
    """Return whether KVM can boot this kernel.

    Only a boot can tell: there are machines whose KVM creates a virtual processor and then fails.
    The verdict is remembered until this machine reboots.
    """
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    memory = cache_dir() / f"kvm-{kernel.version}"
    verdict = memory.read_text().split() if memory.exists() else []
    if verdict[:1] != [boot_id]:
        works = try_kvm(kernel)
        if not works:
            note("KVM does not work on this machine: guests are emulated, and slow")
        verdict = [boot_id, "works" if works else "fails"]
        fresh = memory.with_name(f".{memory.name}.{os.getpid()}")
        fresh.write_text(" ".join(verdict))
        fresh.replace(memory)
    return verdict[1:] == ["works"]


def try_kvm(kernel: Kernel) -> bool:
    """Return whether a guest boots under KVM, in a time that rules out a crippled one."""
    console = new_console()
    machine = Machine(memory_mib=512, kvm=True)
    job = Job(["/bin/true"], timeout_s=20, boot_timeout_s=20)
    try:
        with Guest(kernel, machine, job, console) as guest:
            return guest.watch(silent=True).exit_code == 0
    except VmError:
        return False
    finally:
        console.unlink(missing_ok=True)


def new_console() -> Path:
    """Return the path of a new console log; logs of failures are kept, the newest twenty."""
    folder = cache_dir("console")
    for old in sorted(folder.glob("*.log"), key=lambda path: path.name)[:-20]:
        old.unlink(missing_ok=True)
    return folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{time.monotonic_ns()}.log"


def run_guest(kernel: Kernel, machine: Machine, job: Job) -> int:
    """Run the job in a guest, in a second one if the first does not boot; return an exit code."""
    for last_try in (False, True):
        console = new_console()
        keep = False
        try:
            with Guest(kernel, machine, job, console) as guest:
                outcome = guest.watch()
            keep = outcome.exit_code is None
        finally:
            if not keep:
                console.unlink(missing_ok=True)
        if outcome.exit_code is not None:
            return outcome.exit_code
        if outcome.started or last_try:
            break
        note(f"the guest did not boot: {outcome.problem} (console: {console}); trying once more")
    return report(outcome, console, job)


def report(outcome: Outcome, console: Path, job: Job) -> int:
    """Print the end of the console and what went wrong; return the exit code for it."""
    lines = console.read_text(errors="replace").splitlines()
    tail = [re.sub(r"[^\t -~]", "", line) for line in lines[-120:]]
    print("\n".join([f"--- the guest's console ({console}):", *tail, "---"]), file=sys.stderr)
    if outcome.problem == TIMED_OUT:
        note(f"{TIMED_OUT} ({job.timeout_s:g} s)")
        return EXIT_TIMEOUT
    note(f"the guest failed {'during' if outcome.started else 'before'} the job: {outcome.problem}")
    if any("Oops: int3" in line for line in lines):
        note("an int3 is a known fault of QEMU's emulation, not of the job: try again")
    return EXIT_GUEST


def run(arguments: argparse.Namespace) -> int:
    """Do what the arguments say, and return the exit code."""
    wants_guest = arguments.vm or arguments.kernel or arguments.icount or arguments.disk
    if not arguments.fetch and not wants_guest and host_has_ublk():
        return run_here(arguments.command, arguments.timeout or None)
    if platform.machine() != "x86_64":
        raise VmError(f"guests are x86-64 machines, this one is {platform.machine()}")
    require_tools(vm_guest.TOOLS | vm_kernels.TOOLS)
    kernel = find_kernel(arguments.kernel or "7.3", refresh=arguments.fetch)
    if not arguments.command:
        return 0
    machine = Machine(
        cpus=1 if arguments.icount else arguments.cpus or 2,
        memory_mib=arguments.memory,
        kvm=not arguments.icount and kvm_works(kernel),
        icount=arguments.icount,
        one_thread=arguments.one_thread,
        disks=tuple(arguments.disk),
        shared=tuple(arguments.shared),
    )
    return run_guest(kernel, machine, make_job(arguments))


def end_on_signal(number: int, _frame: FrameType | None) -> None:
    """Leave by way of every `finally`, and with the exit code a shell would report."""
    sys.exit(128 + number)


def main() -> int:
    """Run the program; errors become one line on stderr."""
    arguments = parse_arguments(sys.argv[1:])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end_on_signal)
    try:
        return run(arguments)
    except VmError as error:
        note(str(error))
        return EXIT_GUEST
    except BrokenPipeError:  # whoever read our output has gone
        return 128 + signal.SIGPIPE
    except (OSError, subprocess.CalledProcessError) as error:  # a full disk, say
        note(str(error))
        return EXIT_GUEST


if __name__ == "__main__":
    sys.exit(main())
