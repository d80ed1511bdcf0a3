"""Types of the compiled module. Written by tools/uring_stub.py from csrc/ul.h: do not edit.

A pointer to a struct and the struct itself are one class: cffi reads fields through both. The
classes exist here only; import them under ``if TYPE_CHECKING``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, Literal, TypeAlias, TypeVar, final, overload

from typing_extensions import Buffer

class CData:
    def __bool__(self) -> bool: ...
    def __hash__(self) -> int: ...
    def __int__(self) -> int: ...

_T = TypeVar("_T")
_CDataT = TypeVar("_CDataT", bound=CData)

@final
class Array(CData, Generic[_T]):
    @overload
    def __getitem__(self, index: int, /) -> _T: ...
    @overload
    def __getitem__(self, index: slice, /) -> Array[_T]: ...
    @overload
    def __setitem__(self, index: int, value: _T, /) -> None: ...
    @overload
    def __setitem__(self, index: slice, value: Buffer | Sequence[_T], /) -> None: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[_T]: ...

@final
class CBuffer:
    @overload
    def __getitem__(self, index: int, /) -> bytes: ...
    @overload
    def __getitem__(self, index: slice, /) -> bytes: ...
    def __setitem__(self, index: int | slice, value: Buffer, /) -> None: ...
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

Fields: TypeAlias = Mapping[str, object] | Sequence[object]
_Integer: TypeAlias = Literal[
    "int8_t *",
    "int16_t *",
    "int32_t *",
    "int64_t *",
    "ssize_t *",
    "uint8_t *",
    "uint16_t *",
    "uint32_t *",
    "uint64_t *",
    "size_t *",
    "int *",
]
_Integers: TypeAlias = Literal[
    "int8_t[]",
    "int16_t[]",
    "int32_t[]",
    "int64_t[]",
    "ssize_t[]",
    "uint8_t[]",
    "uint16_t[]",
    "uint32_t[]",
    "uint64_t[]",
    "size_t[]",
    "int[]",
]

@final
class ul_control(CData): ...

@final
class ul_control_cmd(CData):
    opcode: int
    dev_id: int
    queue_id: int
    dev_path_len: int
    nr_bytes: int
    data: int

@final
class ul_pool(CData): ...

@final
class ul_worker(CData): ...

@final
class ul_workqueue(CData): ...

@final
class ul_work(CData): ...

@final
class ul_pool_config(CData):
    idle_timeout_ns: int
    create_cooldown_ns: int
    mayday_initial_ns: int
    mayday_interval_ns: int
    spin_ns: int

@final
class ul_pool_stats(CData):
    nr_created: int
    nr_culled: int
    nr_create_failures: int
    nr_workers: int
    nr_idle: int
    nr_waiting: int
    is_io_flusher: int

@final
class ul_workqueue_config(CData):
    @property
    def name(self) -> Array[bytes]: ...
    @name.setter
    def name(self, value: bytes) -> None: ...
    flags: int
    max_active: int

@final
class ul_workqueue_stats(CData):
    nr_started: int
    nr_completed: int
    cpu_time_ns: int
    nr_cpu_hogs: int
    nr_wakeups: int
    nr_maydays: int
    nr_rescued: int
    nr_active: int
    nr_inactive: int

@final
class ul_target(CData): ...

@final
class ul_target_config(CData):
    kind: int
    policy: int
    flags: int
    fd: int
    direct_fd: int
    offset_bytes: int
    dev_nr_bytes: int
    cookie: int
    delay_ns: int
    nr_parts: int
    chunk_bytes: int
    metadata_bytes: int
    @property
    def parts(self) -> Array[ul_target]: ...
    @parts.setter
    def parts(self, value: Sequence[ul_target]) -> None: ...

@final
class ul_request_info(CData):
    op: int
    op_flags: int
    offset_bytes: int
    nr_bytes: int
    buffer: CData

@final
class ul_iothread(CData): ...

@final
class ul_iothread_config(CData):
    cdev_fd: int
    poll_us: int
    watches: int

@final
class ul_hctx(CData): ...

@final
class ul_hctx_config(CData):
    q_id: int
    queue_depth: int
    first_tag: int
    nr_tags: int
    max_io_buf_bytes: int
    dev_flags: int
    io_desc_bytes: int

@final
class ul_hctx_stats(CData):
    nr_reads: int
    nr_writes: int
    nr_flushes: int
    nr_discards: int
    nr_errors: int
    nr_batches: int
    nr_sleeps: int
    nr_inline: int
    nr_async: int
    nr_shared: int
    read_bytes: int
    write_bytes: int
    nr_inflight: int
    tid: int

@final
class FFI:
    NULL: Any
    errno: int
    @overload
    def new(self, cdecl: Literal["struct ul_control **"]) -> Array[ul_control]: ...
    @overload
    def new(self, cdecl: Literal["struct ul_control_cmd *"], init: Fields = ...) -> ul_control_cmd: ...
    @overload
    def new(self, cdecl: Literal["struct ul_control_cmd[]"], init: int) -> Array[ul_control_cmd]: ...
    @overload
    def new(self, cdecl: Literal["struct ul_pool **"]) -> Array[ul_pool]: ...
    @overload
    def new(self, cdecl: Literal["struct ul_worker **"]) -> Array[ul_worker]: ...
    @overload
    def new(self, cdecl: Literal["struct ul_workqueue **"]) -> Array[ul_workqueue]: ...
    @overload
    def new(self, cdecl: Literal["struct ul_work **"]) -> Array[ul_work]: ...
    @overload
    def new(self, cdecl: Literal["struct ul_pool_config *"], init: Fields = ...) -> ul_pool_config: ...
    @overload
    def new(self, cdecl: Literal["struct ul_pool_config[]"], init: int) -> Array[ul_pool_config]: ...
    @overload
    def new(self, cdecl: Literal["struct ul_pool_stats *"], init: Fields = ...) -> ul_pool_stats: ...
    @overload
    def new(self, cdecl: Literal["struct ul_pool_stats[]"], init: int) -> Array[ul_pool_stats]: ...
    @overload
    def new(self, cdecl: Literal["struct ul_workqueue_config *"], init: Fields = ...) -> ul_workqueue_config: ...
    @overload
    def new(self, cdecl: Literal["struct ul_workqueue_config[]"], init: int) -> Array[ul_workqueue_config]: ...
    @overload
    def new(self, cdecl: Literal["struct ul_workqueue_stats *"], init: Fields = ...) -> ul_workqueue_stats: ...
    @overload
    def new(self, cdecl: Literal["struct ul_workqueue_stats[]"], init: int) -> Array[ul_workqueue_stats]: ...
    @overload
    def new(self, cdecl: Literal["struct ul_target **"]) -> Array[ul_target]: ...
    @overload
    def new(self, cdecl: Literal["struct ul_target_config *"], init: Fields = ...) -> ul_target_config: ...
    @overload
    def new(self, cdecl: Literal["struct ul_target_config[]"], init: int) -> Array[ul_target_config]: ...
    @overload
    def new(self, cdecl: Literal["struct ul_request_info *"], init: Fields = ...) -> ul_request_info: ...
    @overload
    def new(self, cdecl: Literal["struct ul_request_info[]"], init: int) -> Array[ul_request_info]: ...
    @overload
    def new(self, cdecl: Literal["struct ul_iothread **"]) -> Array[ul_iothread]: ...
    @overload
    def new(self, cdecl: Literal["struct ul_iothread_config *"], init: Fields = ...) -> ul_iothread_config: ...
    @overload
    def new(self, cdecl: Literal["struct ul_iothread_config[]"], init: int) -> Array[ul_iothread_config]: ...
    @overload
    def new(self, cdecl: Literal["struct ul_hctx **"]) -> Array[ul_hctx]: ...
    @overload
    def new(self, cdecl: Literal["struct ul_hctx_config *"], init: Fields = ...) -> ul_hctx_config: ...
    @overload
    def new(self, cdecl: Literal["struct ul_hctx_config[]"], init: int) -> Array[ul_hctx_config]: ...
    @overload
    def new(self, cdecl: Literal["struct ul_hctx_stats *"], init: Fields = ...) -> ul_hctx_stats: ...
    @overload
    def new(self, cdecl: Literal["struct ul_hctx_stats[]"], init: int) -> Array[ul_hctx_stats]: ...
    @overload
    def new(self, cdecl: _Integer, init: int = ...) -> Array[int]: ...
    @overload
    def new(self, cdecl: _Integers, init: int | Sequence[int] | bytes) -> Array[int]: ...
    @overload
    def new(self, cdecl: str, init: object = ...) -> CData: ...
    @overload
    def from_buffer(self, buffer: Buffer, /) -> Array[int]: ...
    @overload
    def from_buffer(
        self, cdecl: _Integers, buffer: Buffer, require_writable: bool = ...
    ) -> Array[int]: ...
    @overload
    def from_buffer(self, cdecl: str, buffer: Buffer, require_writable: bool = ...) -> CData: ...
    def buffer(self, cdata: CData, size: int = ...) -> CBuffer: ...
    def gc(self, cdata: _CDataT, destructor: Callable[[_CDataT], None] | None) -> _CDataT: ...
    def cast(self, cdecl: str, source: CData | int) -> CData: ...
    def release(self, cdata: CData) -> None: ...
    def memmove(self, dest: CData | Buffer, src: CData | Buffer, n: int) -> None: ...
    def sizeof(self, cdecl: str | CData) -> int: ...
    def string(self, cdata: CData, maxlen: int = ...) -> bytes: ...
    def unpack(self, cdata: CData, length: int) -> bytes: ...

@final
class Lib:
    UL_WQ_RESCUER: int
    UL_WORK_BUSY_PENDING: int
    UL_WORK_BUSY_RUNNING: int
    UL_TARGET_NULL: int
    UL_TARGET_LOOP: int
    UL_TARGET_PYTHON: int
    UL_TARGET_STRIPE: int
    UL_TARGET_INTEGRITY: int
    UL_POLICY_2014: int
    UL_POLICY_BASE: int
    UL_POLICY_AUTO: int
    UL_TARGET_READ_ONLY: int
    UL_TARGET_DIRECT: int
    UL_TARGET_MAP: int
    UL_STRIPE_MAX: int
    UL_SHMEM_MAX: int
    def ul_control_create(
        self, control_fd: int, keep_rights: int, control: Array[ul_control], /
    ) -> int: ...
    def ul_control_destroy(self, control: ul_control, /) -> None: ...
    def ul_control_submit(
        self, control: ul_control, cmd: ul_control_cmd, payload: CData | bytes, /
    ) -> int: ...
    def ul_control_wait(
        self, control: ul_control, timeout_ns: int, payload: CData, result: Array[int], /
    ) -> int: ...
    def ul_control_cancel(self, control: ul_control, /) -> int: ...
    def ul_pool_create(self, config: ul_pool_config, pool: Array[ul_pool], /) -> int: ...
    def ul_pool_manager_wait(self, pool: ul_pool, worker: Array[ul_worker], /) -> int: ...
    def ul_pool_stop(self, pool: ul_pool, /) -> None: ...
    def ul_pool_get_stats(self, pool: ul_pool, stats: ul_pool_stats, /) -> None: ...
    def ul_pool_destroy(self, pool: ul_pool, /) -> int: ...
    def ul_worker_run(
        self, worker: ul_worker, work: Array[ul_work], cookie: Array[int], /
    ) -> int: ...
    def ul_worker_not_started(self, worker: ul_worker, /) -> None: ...
    def ul_workqueue_create(
        self, pool: ul_pool, config: ul_workqueue_config, wq: Array[ul_workqueue], rescuer: Array[ul_worker], /
    ) -> int: ...
    def ul_workqueue_set_max_active(self, wq: ul_workqueue, max_active: int, /) -> None: ...
    def ul_workqueue_get_stats(self, wq: ul_workqueue, stats: ul_workqueue_stats, /) -> None: ...
    def ul_workqueue_flush_wait(self, wq: ul_workqueue, ticket: Array[int], /) -> int: ...
    def ul_workqueue_drain_wait(self, wq: ul_workqueue, close: int, /) -> int: ...
    def ul_workqueue_destroy(self, wq: ul_workqueue, /) -> int: ...
    def ul_work_create(self, cookie: int, work: Array[ul_work], /) -> int: ...
    def ul_work_queue_delayed(
        self, wq: ul_workqueue, work: ul_work, delay_ns: int, modify: int, /
    ) -> int: ...
    def ul_work_cancel(self, work: ul_work, disable: int, /) -> int: ...
    def ul_work_enable(self, work: ul_work, /) -> int: ...
    def ul_work_flush_wait(self, work: ul_work, /) -> int: ...
    def ul_work_busy(self, work: ul_work, /) -> int: ...
    def ul_work_destroy(self, work: ul_work, /) -> None: ...
    def ul_target_create(self, config: ul_target_config, target: Array[ul_target], /) -> int: ...
    def ul_target_destroy(self, target: ul_target, /) -> None: ...
    def ul_target_set_shmem(
        self, target: ul_target, index: int, bytes: CData, nr_bytes: int, /
    ) -> int: ...
    def ul_target_is_in_memory(self, fd: int, /) -> int: ...
    def ul_target_probe_punch(self, fd: int, offset_bytes: int, nr_bytes: int, /) -> int: ...
    def ul_request_get(self, work: ul_work, info: ul_request_info, /) -> None: ...
    def ul_request_set_result(self, work: ul_work, result: int, /) -> None: ...
    def ul_iothread_create(
        self, config: ul_iothread_config, target: ul_target, thread: Array[ul_iothread], /
    ) -> int: ...
    def ul_iothread_prepare(self, thread: ul_iothread, /) -> int: ...
    def ul_iothread_run(self, thread: ul_iothread, /) -> int: ...
    def ul_iothread_stop(self, thread: ul_iothread, /) -> None: ...
    def ul_iothread_destroy(self, thread: ul_iothread, /) -> None: ...
    def ul_hctx_create(
        self, config: ul_hctx_config, thread: ul_iothread, target: ul_target, wq: ul_workqueue, hctx: Array[ul_hctx], /
    ) -> int: ...
    def ul_hctx_get_stats(self, hctx: ul_hctx, stats: ul_hctx_stats, /) -> None: ...
    def ul_hctx_destroy(self, hctx: ul_hctx, /) -> None: ...

ffi: FFI
lib: Lib
