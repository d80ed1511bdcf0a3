"""One guest: its initramfs, its QEMU, and the watch over both until the job has ended.

In: a Kernel, a Machine and a Job.  Out: the job's output on our stdout and stderr as it comes, and
an Outcome.  Runs in the caller's thread, in one poll loop.  It leaves no process behind, and no
file but the console's log, which is the caller's to keep or to remove.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import selectors
import shlex
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from vm_kernels import Kernel, VmError, find_tool

HERE = Path(__file__).resolve().parent
TOOLS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "busybox": "busybox-static",
    "setpriv": "util-linux",
}
APPLETS = [
    "chmod",
    "cp",
    "hostname",
    "insmod",
    "ip",
    "ln",
    "mkdir",
    "mount",
    "reboot",
    "sh",
    "switch_root",
    "umount",
    "uname",
]
# What the root file system and the job's output need, and the driver itself; in this order.
BOOT_MODULES = [
    "virtio_pci",
    "virtio_console",
    "virtio_rng",
    "virtio_blk",
    "9pnet_virtio",
    "9p",
    "overlay",
    "configfs",
    "ublk_drv",
]
# loglevel=5: warnings and worse, since each character on a serial port is dear.  panic=-1 and
# -no-reboot: a panic ends QEMU.  oops=panic: after an oops nothing in a guest can be believed.  The
# rest saves emulated work: the last two skip the crypto self-tests and the parsing of keys for
# modules, which have no signatures here.
KERNEL_ARGS = (
    "console=ttyS0 loglevel=5 panic=-1 oops=panic mitigations=off nokaslr tsc=reliable"
    " no_timer_check damon_stat.enabled=0 cryptomgr.notests"
    " initcall_blacklist=load_system_certificate_list"
)
# Under emulation the other processors come up when the kernel has booted, see init.sh.
TCG_KERNEL_ARGS = " maxcpus=1 noreplace-smp lpj=10000000"
# la57 costs one more level of page tables; erms and fsrm invite string instructions, which are slow
# to emulate.
TCG_CPU = "max,la57=off,erms=off,fsrm=off"
BOOT_TIMEOUT_S = 180.0
LAST_WORDS_S = 5.0
TIMED_OUT = "the time is over"
MAX_DISKS = 16


@dataclass(frozen=True)
class Machine:
    """The guest's hardware; `disks` become /dev/vda and on, `shared` are writable directories.

    `one_thread`: where they are emulated, one thread of ours runs all processors in turn.
    """

    cpus: int = 2
    memory_mib: int = 2048
    kvm: bool = False
    icount: bool = False
    one_thread: bool = False
    disks: tuple[Path, ...] = ()
    shared: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Job:
    """The command to run; `keep` are paths below /tmp and its like that it is to see.

    `timeout_s` counts from the command's start, `boot_timeout_s` to it; None is for ever.
    """

    command: list[str]
    cwd: str = "/"
    env: dict[str, str] | None = None
    keep: tuple[str, ...] = ()
    timeout_s: float | None = None
    boot_timeout_s: float = BOOT_TIMEOUT_S


@dataclass(frozen=True)
class Outcome:
    """How a guest ended: the job's exit code, or None and the problem; `started`: the job had."""

    started: bool
    exit_code: int | None
    problem: str = ""


# -- initramfs -------------------------------------------------------------------------------------


def initramfs(kernel: Kernel, machine: Machine, job: Job, mark: str) -> bytes:
    """Return the guest's initramfs: busybox, the modules the root file system needs, the job."""
    modules = boot_modules(kernel.modules, BOOT_MODULES) if kernel.modules else {}
    config = {
        "MODULES": " ".join(modules),
        "KEEP": shlex.join(job.keep),
        "SHARED": shlex.join(str(path) for path in machine.shared),
        "DISKS": " ".join(f"vd{chr(ord('a') + index)}" for index in range(len(machine.disks))),
        "MARK": mark,
    }
    settings = "".join(f"{name}={shlex.quote(value)}\n" for name, value in config.items())
    files = {
        "init": (HERE / "init.sh").read_bytes(),
        "run.sh": (HERE / "run.sh").read_bytes(),
        "config": os.fsencode(settings),
        "job": os.fsencode(job_script(job)),
        "bin/busybox": static_busybox(),
        **{f"modules/{name}": module_bytes(path) for name, path in modules.items()},
    }
    links = {f"bin/{applet}": "busybox" for applet in APPLETS}
    return cpio_archive(["bin", "dev", "modules", "proc", "sys"], files, links)


def static_busybox() -> bytes:
    """Return the busybox program, which must need no libraries."""
    path = find_tool("busybox")
    assert path is not None
    program = Path(path).read_bytes()
    if b"/ld-linux" in program[:4096]:
        raise VmError(f"{path} is not static: apt-get install busybox-static")
    return program


def job_script(job: Job) -> str:
    """Return the shell script that becomes the command."""
    env = [f"{name}={value}" for name, value in (job.env or {}).items()]
    words = ["/usr/bin/setsid", "/usr/bin/env", "-i", *env, *job.command]
    return f"cd {shlex.quote(job.cwd)} || exit 125\nexec {shlex.join(words)}\n"


def boot_modules(tree: Path, names: list[str]) -> dict[str, Path]:
    """Return the modules to insert, in order, for `names` and all that they depend on.

    A built-in module is in no file and thus not in the result.
    Source: modules.dep(5); its dependencies are listed last-to-load first.
    """
    depends: dict[str, list[str]] = {}
    files: dict[str, str] = {}
    for line in (tree / "modules.dep").read_text().splitlines():
        file, _, needed = line.partition(":")
        depends[file] = needed.split()
        files[module_name(file)] = file
    wanted = [files[name] for name in names if name in files]
    order = [needed for file in wanted for needed in (*reversed(depends[file]), file)]
    return {f"{module_name(file)}.ko": tree / file for file in order}


def module_name(file: str) -> str:
    """Return the name of the module in a file."""
    return re.sub(r"\.ko(\.\w+)?$", "", os.path.basename(file)).replace("-", "_")


def module_bytes(path: Path) -> bytes:
    """Return a module's contents, decompressed."""
    if path.suffix == ".ko":
        return path.read_bytes()
    tool = {".xz": "xz", ".zst": "zstd"}.get(path.suffix, "gzip")
    return subprocess.run([tool, "-dc", str(path)], check=True, stdout=subprocess.PIPE).stdout


def cpio_archive(dirs: list[str], files: dict[str, bytes], links: dict[str, str]) -> bytes:
    """Return a cpio archive: all files are executable, all links symbolic."""
    members = [(name, 0o040755, b"") for name in dirs]
    members += [(name, 0o100755, data) for name, data in files.items()]
    members += [(name, 0o120777, target.encode()) for name, target in links.items()]
    parts = [cpio_member(*member, inode) for inode, member in enumerate(members, 1)]
    return b"".join([*parts, cpio_member("TRAILER!!!", 0, b"", 0)])


def cpio_member(name: str, mode: int, data: bytes, inode: int) -> bytes:
    """Return one member of a cpio archive in the "newc" format.

    Source: Documentation/driver-api/early-userspace/buffer-format.rst.
    """
    path = name.encode() + b"\0"
    fields = [inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path), 0]
    head = b"070701" + b"".join(b"%08X" % value for value in fields) + path
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


# -- QEMU ------------------------------------------------------------------------------------------


def qemu_command(kernel: Kernel, machine: Machine, initrd: str, console: Path) -> list[str]:
    """Return QEMU's command line, but for the two output ports."""
    command = ["qemu-system-x86_64", "-M", "q35", "-nodefaults", "-no-user-config"]
    command += ["-display", "none", "-no-reboot", *processor(machine)]
    command += ["-m", f"{machine.memory_mib}M"]
    arguments = KERNEL_ARGS + ("" if machine.kvm else TCG_KERNEL_ARGS)
    command += ["-kernel", str(kernel.image), "-initrd", initrd, "-append", arguments]
    command += ["-chardev", f"file,id=console,append=on,path={comma(str(console))}"]
    command += ["-serial", "chardev:console", "-device", "virtio-rng-pci"]
    command += export("host", Path("/"), writable=False)
    if kernel.modules:
        command += export("modules", kernel.modules, writable=False)
    for index, path in enumerate(machine.shared):
        command += export(f"shared{index}", path, writable=True)
    for index, path in enumerate(machine.disks):
        drive = {
            "driver": "raw",
            "node-name": f"disk{index}",
            "read-only": not os.access(path, os.W_OK),
            "discard": "unmap",
            "file": {"driver": "file", "filename": str(path)},
        }
        command += ["-blockdev", json.dumps(drive)]
        command += ["-device", f"virtio-blk-pci,drive=disk{index}"]
    return command


def processor(machine: Machine) -> list[str]:
    """Return QEMU's options for the processors and what runs them."""
    smp = ["-smp", str(machine.cpus)]
    if machine.icount:
        # An instruction takes one nanosecond. sleep=on: while the guest waits for its host, its
        # clock runs with ours, and does not jump to the next timer: the deadline of the wait, say.
        accel = ["-accel", "tcg,thread=single,tb-size=1024", "-icount", "shift=0,sleep=on"]
        return [*smp, *accel, "-cpu", TCG_CPU]
    if machine.kvm:
        return [*smp, "-accel", "kvm", "-cpu", "host"]
    thread = "single" if machine.one_thread else "multi"
    return [*smp, "-accel", f"tcg,thread={thread},tb-size=1024", "-cpu", TCG_CPU]


def comma(value: str) -> str:
    """Quote a value for QEMU's option syntax."""
    return value.replace(",", ",,")


def export(tag: str, path: Path, writable: bool) -> list[str]:
    """Return the options that export a directory of the host over 9p."""
    readonly = "off" if writable else "on"
    # multidevs=remap: the tree spans file systems, whose inode numbers may collide.
    fsdev = f"local,id={tag},path={comma(str(path))},security_model=none,multidevs=remap"
    device = f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"
    return ["-fsdev", f"{fsdev},readonly={readonly}", "-device", device]


def ports(fds: dict[str, int]) -> list[str]:
    """Return the options for serial ports that end in sockets of ours.

    Not `-chardev stdio` or a file: with its stdin closed the one hangs the guest, and the other
    cannot wait for a slow reader.
    """
    options = ["-device", "virtio-serial-pci"]
    for name, fd in fds.items():
        options += ["-chardev", f"socket,id={name},fd={fd}"]
        options += ["-device", f"virtserialport,chardev={name},name=vm.{name}"]
    return options


class Stream:
    """One of the job's output streams on its way to ours, with the guest's marks taken out."""

    def __init__(self, mark: str, fd: int | None) -> None:
        self.mark = mark.encode()
        self.fd = fd
        self.pending = b""

    def feed(self, data: bytes) -> list[str]:
        """Pass on what is output, and return the messages that came behind marks."""
        self.pending += data
        messages: list[str] = []
        while (start := self.pending.find(self.mark)) >= 0:
            self.pass_on(start)
            message, newline, rest = self.pending.partition(b"\n")
            if not newline:
                return messages
            messages.append(message[len(self.mark) :].decode().strip())
            self.pending = rest
        self.pass_on(len(self.pending) - self.held_back())
        return messages

    def held_back(self) -> int:
        """Return how many of the last bytes may be the beginning of a mark."""
        longest = min(len(self.mark) - 1, len(self.pending))
        lengths = (n for n in range(longest, 0, -1) if self.pending.endswith(self.mark[:n]))
        return next(lengths, 0)

    def pass_on(self, nr_bytes: int) -> None:
        """Write the first bytes to our side."""
        data, self.pending = self.pending[:nr_bytes], self.pending[nr_bytes:]
        while data and self.fd is not None:
            data = data[os.write(self.fd, data) :]


class Guest:
    """A running QEMU.  Leaving the `with` block ends it, whatever happened."""

    def __init__(self, kernel: Kernel, machine: Machine, job: Job, console: Path) -> None:
        self.job = job
        self.console = console
        self.mark = f"vm-{secrets.token_hex(16)}"
        self.started = self.overdue = False
        self.exit_code: int | None = None
        self.out, out = socket.socketpair()
        self.err, err = socket.socketpair()
        # In memory, not in a file: nothing is left behind even if we are killed.
        with (
            out,
            err,
            open(os.memfd_create("initramfs"), "wb") as initrd,
            open(console, "ab") as log,
        ):
            initrd.write(initramfs(kernel, machine, job, self.mark))
            initrd.flush()
            command = qemu_command(kernel, machine, f"/proc/self/fd/{initrd.fileno()}", console)
            command += ports({"stdout": out.fileno(), "stderr": err.fileno()})
            self.process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(initrd.fileno(), out.fileno(), err.fileno()),
                start_new_session=True,  # the terminal's signals are for us
            )

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.out.close()
        self.err.close()

    def watch(self, silent: bool = False) -> Outcome:
        """Pass the job's output on until it has ended, the guest has died, or the time is over.

        :raises VmError: if QEMU refuses to run the guest.
        """
        streams = {
            self.out: Stream(self.mark, None if silent else 1),
            self.err: Stream(self.mark, None if silent else 2),
        }
        self.set_deadline(self.job.boot_timeout_s)
        with selectors.DefaultSelector() as selector:
            for sock, stream in streams.items():
                selector.register(sock, selectors.EVENT_READ, stream)
            while selector.get_map():
                if self.late():
                    break
                for key, _ in selector.select(self.seconds_left()):
                    assert isinstance(key.fileobj, socket.socket)
                    if self.read(key.fileobj, key.data):
                        selector.unregister(key.fileobj)
        return self.outcome()

    def set_deadline(self, timeout_s: float | None) -> None:
        """Set when the guest's present phase has to be over."""
        self.deadline = None if timeout_s is None else time.monotonic() + timeout_s

    def seconds_left(self) -> float | None:
        """Return the time to the deadline."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def late(self) -> bool:
        """Return whether to give the guest up; a started one first gets a while for last words."""
        if self.seconds_left() != 0:
            return False
        if not self.started or self.overdue:
            return True
        self.overdue = True
        self.set_deadline(LAST_WORDS_S)
        try:
            self.out.send(b"\n", socket.MSG_DONTWAIT)
        except OSError:
            return True
        return False

    def read(self, sock: socket.socket, stream: Stream) -> bool:
        """Take in what has arrived; return whether it was the end of the stream."""
        try:
            data = sock.recv(1 << 16)
        except ConnectionResetError:
            data = b""
        over = not data
        for message in stream.feed(data):
            over = over or message != "start"
            if message == "start":
                self.started = True
                self.set_deadline(self.job.timeout_s)
            elif message == "said":
                self.deadline = time.monotonic()
            elif message.startswith("exit ") and not self.overdue:
                self.exit_code = int(message[5:])
        return over

    def outcome(self) -> Outcome:
        """Return the outcome of a guest that is over, or given up."""
        if self.exit_code is not None:
            return Outcome(True, self.exit_code)
        if self.overdue:
            return Outcome(True, None, TIMED_OUT)
        if self.seconds_left() == 0:
            return Outcome(False, None, f"no sign of life in {self.job.boot_timeout_s:.0f} s")
        status = self.process.wait()
        log = self.console.read_bytes()
        if status > 0:
            raise VmError(f"QEMU failed: {log.decode(errors='replace').strip()}")
        if status < 0:
            return Outcome(self.started, None, f"QEMU died of {signal.Signals(-status).name}")
        panicked = b"Kernel panic" in log
        return Outcome(self.started, None, "its kernel panicked" if panicked else "it went down")
