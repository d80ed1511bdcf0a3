"""What is known of each served device: one JSON file a device, which list and recover read.

In: a DeviceState from the server, before its device goes live. Out: the same, for the CLI; all that
is read is checked first, and a bad file is one DaemonError. Runs on a server's main thread and in
the CLI. It never talks to the driver, and never trusts a file that another user could have written.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TypeAlias

from . import uapi
from .errors import DaemonError
from .paths import state_dir as state_dir

VERSION = 1
MAX_NR_BYTES = 1 << 20
MAX_DEV_ID = (1 << 20) - 1
MAX_NR_HW_QUEUES = 4096
MAX_QUEUE_DEPTH = 4096
MAX_NR_CPUS = 1 << 16
MAX_NR_THREADS = 1 << 16
POLICIES = ("auto", "2014", "base")
# How the data goes between driver and server, and the UBLK_F_* of each: the driver copies it from
# and to a buffer of ours; we copy it by pread and pwrite on ublkcN; or the ring reads and writes
# the client's own pages, and what it cannot do is done as usercopy has it. Each has the flags of
# those before it.
DATA_FLAGS = {
    "copy": 0,
    "usercopy": uapi.UBLK_F_USER_COPY,
    "zerocopy": uapi.UBLK_F_AUTO_BUF_REG | uapi.UBLK_F_USER_COPY,
}
DATA_MODES = ("auto", *DATA_FLAGS)
MAX_SHARED_FILES = 16
MAX_POLL_US = 1_000_000
MAX_DEADLINE_S = 86_400
TARGET_TYPES = ("loop", "null", "ram", "stripe")
MAX_STRIPE_FILES = 16
MAX_DELAY_US = 3_600_000_000
CSUM_TYPES = {
    "none": uapi.LBMD_PI_CSUM_NONE,
    "ip": uapi.LBMD_PI_CSUM_IP,
    "t10dif": uapi.LBMD_PI_CSUM_CRC16_T10DIF,
    "nvme": uapi.LBMD_PI_CSUM_CRC64_NVME,
}
MAX_METADATA_BYTES = 255  # of a block
CHUNK_BYTES = 65536  # of a stripe, as kublk has it
IO_DESC_BYTES, MAX_IO_DESC_BYTES = 24, 256
MIN_CHUNK_BYTES, MAX_CHUNK_BYTES = 4096, 524288

JsonValue: TypeAlias = "str | int | bool | list[JsonValue] | dict[str, JsonValue] | None"
Json: TypeAlias = "dict[str, JsonValue]"


def data_mode(flags: int) -> str:
    """Return how the data of a device with these UBLK_F_* goes: one of DATA_FLAGS."""
    # With SUPPORT_ZERO_COPY the server says of which requests the ring gets the client's pages.
    if flags & uapi.UBLK_F_SUPPORT_ZERO_COPY:
        flags &= ~uapi.UBLK_F_AUTO_BUF_REG
    return next(mode for mode, bits in reversed(DATA_FLAGS.items()) if flags & bits == bits)


@dataclass(frozen=True)
class Metadata:
    """What each logical block has beside its data: ``nr_bytes``, and what is where in them.

    ``csum``: of the protection information at ``pi_offset``, one of CSUM_TYPES. ``is_capable``: the
    kernel makes and checks it. ``has_reftag``: it has the block's number in it.
    """

    nr_bytes: int
    pi_offset: int = 0
    csum: str = "none"
    tag_bytes: int = 0
    is_capable: bool = False
    has_reftag: bool = False


@dataclass(frozen=True)
class FileIdentity:
    """What tells a backing file from others, as identity.py has it; all 0: nothing is known.

    A regular file has an ``ino``, a block device an ``rdev``. ``version`` tells those apart that
    have one number after another.
    """

    ino: int = 0
    rdev: int = 0
    version: int = 0


@dataclass(frozen=True)
class TargetSpec:
    """What a target is built from; None means what the file offers.

    ``limit_bytes``: at most so much of the file, as losetup's ``--sizelimit``. A stripe has
    ``stripe_paths`` instead of ``path``, and chunks of ``chunk_bytes``. ``metadata``, of loop and
    null, is in ``metadata_path``. ``files``: what a recovery has to find at these paths, in their
    order; empty: an older version did not keep it, or there are none.
    """

    type: str
    path: str = ""
    offset_bytes: int = 0
    nr_bytes: int | None = None
    direct: bool | None = None
    read_only: bool = False
    limit_bytes: int | None = None
    logical_bs: int | None = None
    stripe_paths: tuple[str, ...] = ()
    chunk_bytes: int = CHUNK_BYTES
    delay_us: int = 0
    metadata: Metadata | None = None
    metadata_path: str = ""
    files: tuple[FileIdentity, ...] = ()


@dataclass(frozen=True)
class SharedFile:
    """Memory of clients; ``dev`` and ``ino`` of 0: not opened yet, else what it has to be.

    ``read_only``: the server only reads it.
    """

    path: str
    dev: int = 0
    ino: int = 0
    read_only: bool = False


@dataclass(frozen=True)
class DeviceOptions:
    """What the driver was asked for, and how to serve; ``flags`` are UBLK_F_* bits.

    ``nr_hw_queues``, ``batch``, ``poll_us``, ``nr_threads``, ``io_desc_bytes`` None and ``data``
    auto: what :meth:`Device.add` chooses.
    ``recovery_deadline_s``: how long the daemon tries to replace a dead server; None: it does not.
    """

    nr_hw_queues: int | None = None
    queue_depth: int = 128
    max_io_buf_bytes: int = 512 * 1024
    flags: int = 0
    policy: str = "auto"
    batch: bool | None = None
    data: str = "auto"
    poll_us: int | None = None
    nr_threads: int | None = None
    recovery_deadline_s: int | None = None
    shared_files: tuple[SharedFile, ...] = ()
    io_desc_bytes: int | None = None


@dataclass(frozen=True)
class QueueState:
    """One queue: its thread and the CPUs that the driver wants it on; the others that share it."""

    q_id: int
    tid: int
    affinity: tuple[int, ...]
    other_tids: tuple[int, ...] = ()


@dataclass(frozen=True)
class DeviceState:
    """One device; ``sysfs_ino`` tells it from a later device with the same dev_id (0: unknown).

    ``nr_recoveries``: how many servers took it over from a dead one.
    """

    dev_id: int
    sysfs_ino: int
    server_pid: int
    server_start_ticks: int
    options: DeviceOptions
    spec: TargetSpec
    target: Json
    queues: tuple[QueueState, ...]
    nr_recoveries: int = 0


def state_path(dev_id: int) -> str:
    """Return the path of a device's state file."""
    return os.path.join(state_dir(), f"{dev_id}.json")


def log_path(dev_id: int) -> str:
    """Return the path of a server's log, for systems without a journal."""
    return os.path.join(state_dir(), f"{dev_id}.log")


def make_state_dir() -> None:
    """Create the state folder, closed to others.

    :raises DaemonError: EACCES and the like; EPERM if another user owns or can write the folder.
    """
    folder = state_dir()
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        found = os.stat(folder)
    except OSError as error:
        raise DaemonError(error.errno or errno.EIO, f"state folder {folder}") from error
    if not _is_ours(found):
        raise DaemonError(
            errno.EPERM, f"state folder {folder}", "it must be owned and writable by this user only"
        )


def write(state: DeviceState) -> None:
    """Write a device's state, or replace it, atomically.

    :raises DaemonError: the errno of the folder or the file.
    """
    make_state_dir()
    path = state_path(state.dev_id)
    scratch = f"{path}.{os.getpid()}"
    text = json.dumps({"version": VERSION, **asdict(state)}, indent=1, sort_keys=True)
    try:
        fd = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with open(fd, "w", encoding="utf-8") as file:
            file.write(text)
        os.rename(scratch, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(scratch)
        raise DaemonError(error.errno or errno.EIO, f"state file {path}") from error


def read(dev_id: int) -> DeviceState | None:
    """Return a device's state, or None if there is no file.

    :raises DaemonError: EBADMSG if the file is not a valid state; EPERM if another user could have
        written it; else the errno of opening it.
    """
    path = state_path(dev_id)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(fd, "rb") as file:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or not _is_ours(found):
                raise DaemonError(errno.EPERM, f"state file {path}", "another user could write it")
            data = file.read(MAX_NR_BYTES + 1)
    except FileNotFoundError:
        return None
    except DaemonError:
        raise
    except OSError as error:
        raise DaemonError(error.errno or errno.EIO, f"state file {path}") from error
    try:
        state = parse(data)
        if state.dev_id != dev_id:
            raise ValueError(f"it describes dev {state.dev_id}")
    except ValueError as error:
        raise DaemonError(errno.EBADMSG, f"state file {path}", str(error)) from error
    return state


def remove(dev_id: int) -> None:
    """Remove a device's state and log; neither need exist."""
    for path in (state_path(dev_id), log_path(dev_id)):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.unlink(path)


def parse(data: bytes) -> DeviceState:
    """Return the state that ``data`` holds.

    :raises ValueError: what is wrong with it, one sentence, for a person.
    """
    document = parse_json(data, MAX_NR_BYTES)
    names = ("version", *DeviceState.__dataclass_fields__)
    fields = Fields("the file", document, *names, defaults={"nr_recoveries": 0})
    if fields.integer("version", 0, 1 << 31) != VERSION:
        raise ValueError(f"its version is not {VERSION}")
    return DeviceState(
        dev_id=fields.integer("dev_id", 0, MAX_DEV_ID),
        sysfs_ino=fields.integer("sysfs_ino", 0, 1 << 64),
        server_pid=fields.integer("server_pid", 1, 1 << 22),
        server_start_ticks=fields.integer("server_start_ticks", 0, 1 << 63),
        options=parse_options(fields.value("options")),
        spec=parse_spec(fields.value("spec")),
        target=fields.mapping("target"),
        queues=_parse_queues(fields.value("queues")),
        nr_recoveries=fields.integer("nr_recoveries", 0, 1 << 63),
    )


def parse_options(value: JsonValue) -> DeviceOptions:
    """Return the options that a JSON object holds. :raises ValueError: what is wrong with it."""
    defaults: Json = {**asdict(DeviceOptions()), "shared_files": []}
    fields = Fields("options", value, *DeviceOptions.__dataclass_fields__, defaults=defaults)
    return DeviceOptions(
        nr_hw_queues=fields.optional_integer("nr_hw_queues", 1, MAX_NR_HW_QUEUES),
        queue_depth=fields.integer("queue_depth", 1, MAX_QUEUE_DEPTH),
        max_io_buf_bytes=fields.integer("max_io_buf_bytes", 4096, 32 << 20),
        flags=fields.integer("flags", 0, (1 << 64) - 1),
        policy=fields.choice("policy", POLICIES),
        batch=fields.optional_boolean("batch"),
        data=fields.choice("data", DATA_MODES),
        poll_us=fields.optional_integer("poll_us", 0, MAX_POLL_US),
        nr_threads=fields.optional_integer("nr_threads", 1, MAX_NR_THREADS),
        recovery_deadline_s=fields.optional_integer("recovery_deadline_s", 1, MAX_DEADLINE_S),
        shared_files=tuple(
            _parse_shared_file(file) for file in fields.array("shared_files", MAX_SHARED_FILES)
        ),
        io_desc_bytes=fields.optional_integer("io_desc_bytes", IO_DESC_BYTES, MAX_IO_DESC_BYTES),
    )


def _parse_shared_file(value: JsonValue) -> SharedFile:
    names = SharedFile.__dataclass_fields__
    fields = Fields("a shared file", value, *names, defaults={"read_only": False})
    file = SharedFile(
        path=fields.text("path"),
        dev=fields.integer("dev", 0, (1 << 64) - 1),
        ino=fields.integer("ino", 0, (1 << 64) - 1),
        read_only=fields.boolean("read_only"),
    )
    if not os.path.isabs(file.path):
        raise ValueError("a shared file: path is not absolute")
    return file


def is_chunk(nr_bytes: int) -> bool:
    """Whether a stripe can have chunks of ``nr_bytes``: a power of 2 in their range."""
    return MIN_CHUNK_BYTES <= nr_bytes <= MAX_CHUNK_BYTES and not nr_bytes & (nr_bytes - 1)


def parse_spec(value: JsonValue) -> TargetSpec:
    """Return the target that a JSON object holds. :raises ValueError: what is wrong with it."""
    defaults: Json = {**asdict(TargetSpec("")), "stripe_paths": [], "files": []}
    del defaults["type"]
    fields = Fields("spec", value, *TargetSpec.__dataclass_fields__, defaults=defaults)
    spec = TargetSpec(
        type=fields.choice("type", TARGET_TYPES),
        path=fields.text("path"),
        offset_bytes=fields.integer("offset_bytes", 0, (1 << 63) - 1),
        nr_bytes=fields.optional_integer("nr_bytes", 0, (1 << 63) - 1),
        direct=fields.optional_boolean("direct"),
        read_only=fields.boolean("read_only"),
        limit_bytes=fields.optional_integer("limit_bytes", 1, (1 << 63) - 1),
        logical_bs=fields.optional_integer("logical_bs", 512, 4096),
        stripe_paths=fields.texts("stripe_paths", MAX_STRIPE_FILES),
        chunk_bytes=fields.integer("chunk_bytes", MIN_CHUNK_BYTES, MAX_CHUNK_BYTES),
        delay_us=fields.integer("delay_us", 0, MAX_DELAY_US),
        metadata=_parse_metadata(fields.value("metadata")),
        metadata_path=fields.text("metadata_path"),
        files=tuple(_parse_identity(file) for file in fields.array("files", MAX_STRIPE_FILES)),
    )
    paths = {"loop": (spec.path,), "stripe": spec.stripe_paths}.get(spec.type, ())
    if spec.type == "loop" and spec.metadata is not None:
        paths += (spec.metadata_path,)
    if not all(os.path.isabs(path) for path in paths):
        raise ValueError("spec: path is not absolute")
    if spec.files and len(spec.files) != len(paths):
        raise ValueError(f"spec: files has not {len(paths)} of them")
    return spec


def _parse_identity(value: JsonValue) -> FileIdentity:
    fields = Fields("a file", value, *FileIdentity.__dataclass_fields__)
    numbers = (fields.integer(name, 0, (1 << 64) - 1) for name in ("ino", "rdev", "version"))
    return FileIdentity(*numbers)


def _parse_metadata(value: JsonValue) -> Metadata | None:
    if value is None:
        return None
    fields = Fields("metadata", value, *Metadata.__dataclass_fields__)
    return Metadata(
        nr_bytes=fields.integer("nr_bytes", 1, MAX_METADATA_BYTES),
        pi_offset=fields.integer("pi_offset", 0, MAX_METADATA_BYTES),
        csum=fields.choice("csum", tuple(CSUM_TYPES)),
        tag_bytes=fields.integer("tag_bytes", 0, MAX_METADATA_BYTES),
        is_capable=fields.boolean("is_capable"),
        has_reftag=fields.boolean("has_reftag"),
    )


def _parse_queues(value: JsonValue) -> tuple[QueueState, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_NR_HW_QUEUES:
        raise ValueError(f"queues is not a list of 1 to {MAX_NR_HW_QUEUES}")
    queues = tuple(_parse_queue(item) for item in value)
    if [queue.q_id for queue in queues] != list(range(len(queues))):
        raise ValueError("queues are not numbered from 0 in order")
    return queues


def _parse_queue(value: JsonValue) -> QueueState:
    names = QueueState.__dataclass_fields__
    fields = Fields("a queue", value, *names, defaults={"other_tids": []})
    return QueueState(
        q_id=fields.integer("q_id", 0, MAX_NR_HW_QUEUES - 1),
        tid=fields.integer("tid", 0, 1 << 22),
        affinity=fields.integers("affinity", MAX_NR_CPUS, MAX_NR_CPUS - 1),
        other_tids=fields.integers("other_tids", MAX_QUEUE_DEPTH, 1 << 22),
    )


def parse_json(data: bytes, max_nr_bytes: int) -> JsonValue:
    """Return the value that ``data`` holds.

    :raises ValueError: it is longer than ``max_nr_bytes``, or no JSON; one sentence.
    """
    if len(data) > max_nr_bytes:
        raise ValueError(f"it is larger than {max_nr_bytes} bytes")
    try:
        value: JsonValue = json.loads(data.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON: {error}") from error
    return value


class Fields:
    """The members of one JSON object: exactly the given names, each of the type asked for.

    Those in ``defaults`` may be absent: an older version, which is upgraded, did not know them.
    """

    def __init__(
        self, where: str, value: JsonValue, *names: str, defaults: Json | None = None
    ) -> None:
        self._where = where
        if not isinstance(value, dict):
            raise ValueError(f"{where} is not an object")
        value = {**(defaults or {}), **value}
        if missing := sorted(set(names) - set(value)):
            raise ValueError(f"{where} lacks {', '.join(missing)}")
        if unknown := sorted(set(value) - set(names)):
            # Quoted: a name may hold line ends, or what a terminal obeys.
            raise ValueError(f"{where} has unknown {', '.join(map(repr, unknown))}")
        self._members: Mapping[str, JsonValue] = value

    def value(self, name: str) -> JsonValue:
        return self._members[name]

    def mapping(self, name: str) -> Json:
        found = self.value(name)
        if not isinstance(found, dict):
            raise ValueError(f"{self._where}: {name} is not an object")
        return found

    def array(self, name: str, max_length: int) -> list[JsonValue]:
        found = self.value(name)
        if not isinstance(found, list) or len(found) > max_length:
            raise ValueError(f"{self._where}: {name} is not a list of up to {max_length}")
        return found

    def integer(self, name: str, low: int, high: int) -> int:
        found = self.value(name)
        # bool is an int to isinstance(), and true is no size.
        if isinstance(found, bool) or not isinstance(found, int) or not low <= found <= high:
            raise ValueError(f"{self._where}: {name} is not a number from {low} to {high}")
        return found

    def optional_integer(self, name: str, low: int, high: int) -> int | None:
        return None if self.value(name) is None else self.integer(name, low, high)

    def boolean(self, name: str) -> bool:
        found = self.value(name)
        if not isinstance(found, bool):
            raise ValueError(f"{self._where}: {name} is not true or false")
        return found

    def optional_boolean(self, name: str) -> bool | None:
        return None if self.value(name) is None else self.boolean(name)

    def text(self, name: str) -> str:
        found = self.value(name)
        if not isinstance(found, str) or "\0" in found:
            raise ValueError(f"{self._where}: {name} is not a text")
        return found

    def texts(self, name: str, max_length: int) -> tuple[str, ...]:
        found = self.array(name, max_length)
        texts = tuple(text for text in found if isinstance(text, str) and "\0" not in text)
        if len(texts) != len(found):
            raise ValueError(f"{self._where}: {name} is not a list of texts")
        return texts

    def integers(self, name: str, max_length: int, high: int) -> tuple[int, ...]:
        found = self.array(name, max_length)
        numbers = tuple(nr for nr in found if type(nr) is int and 0 <= nr <= high)
        if len(numbers) != len(found):
            raise ValueError(f"{self._where}: {name} is not a list of numbers from 0 to {high}")
        return numbers

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        found = self.text(name)
        if found not in choices:
            raise ValueError(f"{self._where}: {name} is none of {', '.join(choices)}")
        return found


def _no_constant(name: str) -> JsonValue:
    raise ValueError(f"{name} is no JSON")


def _is_ours(found: os.stat_result) -> bool:
    return found.st_uid in (0, os.geteuid()) and not found.st_mode & 0o022
