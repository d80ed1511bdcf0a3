"""What a server gives up once it needs it no more: capabilities, files, system calls.

    run_apart()      start the device from a thread that ends: the workers that io_uring makes for a
                     thread keep its rights, and end with it
    run_confined()   start I/O threads from a thread that has given up its capabilities and the file
                     system: they are born without
    leave_fetching() what an hctx gives up later: who fetches without CAP_SYS_ADMIN makes the driver
                     look for no partitions
    confine_main()   the same for the main thread; then a seccomp filter for all threads. The driver
                     wants CAP_SYS_ADMIN for STOP_DEV and DEL_DEV: Control.keep_rights() is called
                     between, so that one ring has it, which can do nothing but send commands

Capabilities and Landlock are a thread's own and inherited by those that it starts; the filter is
set for all at once. Landlock (asked of the kernel directly; it has three system calls) leaves the
state folder, and Python's own files for reading: the backing file and the driver's devices are
reached by descriptors that are open already. The filter is libseccomp's, found at run time.

Each part that the kernel or the machine lacks is logged and left out: a server then runs with less
protection, not worse. Used by server.py only: a program that serves a device by itself decides for
itself. An io_uring operation is not a system call, so the filter does not see it; Landlock does.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import logging
import os
import resource
import struct
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TypeVar

from . import state

CAP_FOWNER = 3
CAP_SYS_ADMIN = 21

_PR_SET_NO_NEW_PRIVS = 38
_CAPABILITY_VERSION_3 = 0x20080522
_RLIMIT_NICE = 13
_NICE_MINUS_20 = 40

_SYS_LANDLOCK_CREATE_RULESET = 444
_SYS_LANDLOCK_ADD_RULE = 445
_SYS_LANDLOCK_RESTRICT_SELF = 446
_LANDLOCK_CREATE_RULESET_VERSION = 1
_LANDLOCK_RULE_PATH_BENEATH = 1
# Access rights to files by the ABI that brought them: 13, then REFER, TRUNCATE, IOCTL_DEV.
_FS_RIGHTS = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
_READ = 1 << 2 | 1 << 3  # READ_FILE, READ_DIR
_KEEP_STATE = _READ | 1 << 1 | 1 << 5 | 1 << 8 | 1 << 14  # WRITE, REMOVE, MAKE_REG, TRUNCATE
_NET_RIGHTS = 3  # TCP bind and connect, since ABI 4
_SCOPES = 1  # abstract unix sockets, since ABI 6

_SECCOMP_SET_MODE_FILTER = 1
_SECCOMP_TSYNC = 1
_BPF_INSTRUCTION_BYTES = 8
_SCMP_ACT_ALLOW = 0x7FFF0000
_SCMP_ACT_ERRNO = 0x00050000
_SCMP_CMP_MASKED_EQ = 7
_CLONE_THREAD = 0x00010000
# What I/O, threads, memory, time, signals and open sockets need. Not among them: what makes a
# process, a socket or a namespace, what reaches another process, what changes rights. A
# worker needs a ring for the reads of a batch (csrc/reads.c); it can do no more than the others.
ALLOWED = """
    read write pread64 pwrite64 readv writev preadv pwritev preadv2 pwritev2 lseek splice tee
    copy_file_range fsync fdatasync sync_file_range syncfs fallocate ftruncate fadvise64 readahead
    io_uring_setup io_uring_enter io_uring_register ioctl fcntl flock dup dup2 dup3 pipe2 eventfd2
    close close_range
    open openat unlink unlinkat rename renameat renameat2 access faccessat faccessat2 readlink
    readlinkat getcwd getdents64 stat lstat fstat newfstatat statx statfs fstatfs umask
    utimensat
    poll ppoll select pselect6 epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2
    sendto sendmsg recvfrom recvmsg shutdown getsockopt setsockopt
    mmap munmap mprotect mremap madvise msync mincore cachestat brk membarrier
    mlock mlock2 munlock mlockall munlockall mbind set_mempolicy get_mempolicy
    futex futex_wait futex_wake futex_waitv set_robust_list get_robust_list rseq sched_yield getcpu
    sched_getaffinity sched_setaffinity sched_getparam sched_setparam sched_getscheduler
    sched_setscheduler sched_getattr sched_setattr getpriority setpriority prctl
    clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time times
    rt_sigaction rt_sigprocmask rt_sigreturn rt_sigtimedwait rt_sigpending sigaltstack tgkill
    restart_syscall getpid gettid getppid getuid geteuid getgid getegid uname sysinfo getrandom
    getrlimit prlimit64 getrusage capget exit exit_group
""".split()  # noqa: SIM905

_Result = TypeVar("_Result")

_log = logging.getLogger(__name__)
_libc = ctypes.CDLL(None, use_errno=True)


class Sandbox:
    """What the threads of one server may still do; it makes the state folder, if need be.

    :param keep: capabilities of the I/O threads.
    """

    def __init__(self, keep: Collection[int] = ()) -> None:
        self._keep = frozenset(keep)
        self._ruleset_fd = -1
        self._filter: Filter | None = None
        # Later threads raise their priority and lock their memory without a capability.
        with _tolerated("RLIMIT_NICE"):
            resource.setrlimit(_RLIMIT_NICE, (_NICE_MINUS_20, _NICE_MINUS_20))
        with _tolerated("RLIMIT_MEMLOCK"):
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY,) * 2)
        with _tolerated("no_new_privs"):
            _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        # The library is found before Landlock hides it.
        with _tolerated("seccomp"):
            self._filter = make_filter()

    def run_apart(self, function: Callable[[], _Result]) -> _Result:
        """Run ``function`` on a thread of its own and return what it returned.

        :raises: what it raised.
        """
        return _run_on_thread(function, "ublk-start")

    def run_confined(self, function: Callable[[], _Result], *, fetching: bool = False) -> _Result:
        """Run ``function`` on a thread of its own, confined as the threads that it starts will be.

        :param fetching: they keep CAP_SYS_ADMIN until :meth:`leave_fetching`.
        :raises: what it raised.
        """

        def confined() -> _Result:
            self._confine(self._keep | {CAP_SYS_ADMIN} if fetching else self._keep)
            return function()

        return _run_on_thread(confined, "ublk-confined")

    def leave_fetching(self) -> None:
        """Give up what an hctx had for fetching; on its thread."""
        with _tolerated("capset"):
            drop_capabilities(self._keep)

    def confine_main(self, keep_rights: Callable[[], None] = lambda: None) -> None:
        """Confine the calling thread, and set the filter for all.

        :param keep_rights: called while CAP_SYS_ADMIN is the only capability left; if it fails, the
            thread keeps that.
        """
        self._confine((CAP_SYS_ADMIN,))
        with _tolerated("control ring"):
            keep_rights()
            drop_capabilities(())
        if self._filter is not None:
            with _tolerated("seccomp"):
                self._filter.load()
        self.close()

    def close(self) -> None:
        """Let go of the rules; idempotent."""
        if self._ruleset_fd >= 0:
            os.close(self._ruleset_fd)
            self._ruleset_fd = -1

    def _confine(self, keep: Collection[int]) -> None:
        if self._ruleset_fd < 0:
            state.make_state_dir()
            with _tolerated("landlock"):
                self._ruleset_fd = _make_ruleset(state.state_dir())
        if self._ruleset_fd >= 0:
            with _tolerated("landlock"):
                _syscall(_SYS_LANDLOCK_RESTRICT_SELF, self._ruleset_fd, 0)
        with _tolerated("capset"):
            drop_capabilities(keep)


def drop_capabilities(keep: Collection[int]) -> None:
    """Give up every capability of the calling thread but those of ``keep`` that it has."""
    header = ctypes.create_string_buffer(struct.pack("=II", _CAPABILITY_VERSION_3, 0), 8)
    data = ctypes.create_string_buffer(24)
    _check(_libc.capget(header, data))
    words = struct.unpack("=6I", data.raw)  # effective, permitted, inheritable; twice
    wanted = sum(1 << bit for bit in keep)
    left = [words[1] & wanted, words[4] & wanted >> 32]
    packed = struct.pack("=6I", left[0], left[0], 0, left[1], left[1], 0)
    _check(_libc.capset(header, packed))


def has_landlock() -> bool:
    """Whether this kernel has Landlock, and uses it."""
    try:
        return _landlock_abi() > 0
    except OSError:
        return False


def _landlock_abi() -> int:
    return _syscall(_SYS_LANDLOCK_CREATE_RULESET, None, 0, _LANDLOCK_CREATE_RULESET_VERSION)


def _make_ruleset(state_dir: str) -> int:
    abi = _landlock_abi()
    handled = 0
    for since, rights in _FS_RIGHTS.items():
        handled |= rights if abi >= since else 0
    attributes = struct.pack(
        "=QQQ", handled, _NET_RIGHTS if abi >= 4 else 0, _SCOPES if abi >= 6 else 0
    )
    attributes = attributes[: 24 if abi >= 6 else 16 if abi >= 4 else 8]
    ruleset_fd = _syscall(_SYS_LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0)
    try:
        _allow_beneath(ruleset_fd, state_dir, _KEEP_STATE & handled)
        for program in (os.path.dirname(os.__file__), os.path.dirname(__file__)):
            _allow_beneath(ruleset_fd, program, _READ)
    except OSError:
        os.close(ruleset_fd)
        raise
    return ruleset_fd


def _allow_beneath(ruleset_fd: int, path: str, rights: int) -> None:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = struct.pack("=Qi", rights, fd)
        _syscall(_SYS_LANDLOCK_ADD_RULE, ruleset_fd, _LANDLOCK_RULE_PATH_BENEATH, rule, 0)
    finally:
        os.close(fd)


class _Comparison(ctypes.Structure):
    """struct scmp_arg_cmp."""

    _fields_ = [
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("datum_a", ctypes.c_uint64),
        ("datum_b", ctypes.c_uint64),
    ]


@dataclass(frozen=True)
class Filter:
    """A seccomp filter: ``program``, BPF for the kernel, and the number of the call to set it."""

    program: bytes
    seccomp_number: int

    def load(self) -> None:
        """Put it in force in every thread. :raises OSError: what the kernel said."""
        program = ctypes.create_string_buffer(self.program, len(self.program))
        nr_instructions = len(self.program) // _BPF_INSTRUCTION_BYTES
        fprog = struct.pack("@HP", nr_instructions, ctypes.addressof(program))
        # With TSYNC it may also return the id of a thread that stands in the way.
        if _syscall(self.seccomp_number, _SECCOMP_SET_MODE_FILTER, _SECCOMP_TSYNC, fprog):
            raise OSError(errno.ESRCH, "a thread has another filter")


@functools.cache
def make_filter() -> Filter:
    """Return the filter that refuses what is not ALLOWED: it gives EPERM.

    An allowed call costs a look at a bitmap, whatever the filter's length: since v5.11 the kernel
    finds out beforehand for which numbers it always says yes. Made once in a process, and so in the
    daemon for all its servers: the library takes some hundred KiB for it.

    :raises OSError: ENOENT without libseccomp, else what the library said.
    """
    library = load_libseccomp()
    context = library.seccomp_init(_SCMP_ACT_ERRNO | errno.EPERM)
    if not context:
        raise OSError(errno.ENOMEM, "seccomp_init")
    try:
        _add_rules(library, context)
        with open(os.memfd_create("ublk-filter", os.MFD_CLOEXEC), "w+b") as file:
            _check_seccomp(library.seccomp_export_bpf(context, file.fileno()))
            file.seek(0)
            return Filter(file.read(), library.seccomp_syscall_resolve_name(b"seccomp"))
    finally:
        library.seccomp_release(context)


def _add_rules(library: ctypes.CDLL, context: int) -> None:
    def add(action: int, number: int, *comparisons: _Comparison) -> None:
        array = (_Comparison * len(comparisons))(*comparisons)
        _check_seccomp(
            library.seccomp_rule_add_array(
                context, action, number, len(comparisons), ctypes.byref(array)
            )
        )

    resolve = library.seccomp_syscall_resolve_name
    for name in ALLOWED:
        number = resolve(name.encode())
        if number >= 0:  # else this machine, or this libseccomp, has no such call
            add(_SCMP_ACT_ALLOW, number)
    # Threads, but no processes. clone3 keeps its flags where a filter cannot see them: it "does not
    # exist", and the C library uses clone.
    only_threads = _Comparison(0, _SCMP_CMP_MASKED_EQ, _CLONE_THREAD, _CLONE_THREAD)
    add(_SCMP_ACT_ALLOW, resolve(b"clone"), only_threads)
    add(_SCMP_ACT_ERRNO | errno.ENOSYS, resolve(b"clone3"))


def load_libseccomp() -> ctypes.CDLL:
    """Return the library. :raises OSError: ENOENT without it."""
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        raise OSError(errno.ENOENT, "no libseccomp.so.2 (package libseccomp2)") from None
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_init.argtypes = [ctypes.c_uint32]
    library.seccomp_release.argtypes = [ctypes.c_void_p]
    library.seccomp_export_bpf.argtypes = [ctypes.c_void_p, ctypes.c_int]
    library.seccomp_syscall_resolve_name.argtypes = [ctypes.c_char_p]
    library.seccomp_rule_add_array.argtypes = [
        *(ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p)
    ]
    return library


def _run_on_thread(function: Callable[[], _Result], name: str) -> _Result:
    results: list[_Result] = []
    raised: list[BaseException] = []

    def body() -> None:
        try:
            results.append(function())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=body, name=name)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]
    return results[0]


def _check_seccomp(result: int) -> None:
    if result < 0:
        raise OSError(-result, os.strerror(-result))


def _check(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _syscall(number: int, *arguments: int | bytes | None) -> int:
    words = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    _libc.syscall.restype = ctypes.c_long
    return _check(_libc.syscall(ctypes.c_long(number), *words))


@contextlib.contextmanager
def _tolerated(what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        _log.warning("%s: %s: goes without", what, error)


__all__ = [
    "ALLOWED",
    "CAP_FOWNER",
    "CAP_SYS_ADMIN",
    "Filter",
    "Sandbox",
    "drop_capabilities",
    "has_landlock",
    "load_libseccomp",
    "make_filter",
]
