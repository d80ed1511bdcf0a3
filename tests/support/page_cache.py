"""What the page cache has of a file, and its end."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

PAGE = mmap.PAGESIZE


def drop_caches() -> None:
    """Write back and forget all clean pages."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def is_cached(path: Path, offset: int) -> bool:
    """Return whether a page is there; ``offset`` is a multiple of PAGE."""
    # By mincore(): a read that may not wait (RWF_NOWAIT) starts to read ahead all the same.
    answer = ctypes.c_ubyte()
    with path.open("r+b") as file, mmap.mmap(file.fileno(), PAGE, offset=offset) as memory:
        page = (ctypes.c_char * PAGE).from_buffer(memory)
        failed = ctypes.CDLL(None).mincore(page, ctypes.c_size_t(PAGE), ctypes.byref(answer))
        del page
    assert not failed
    return bool(answer.value & 1)
