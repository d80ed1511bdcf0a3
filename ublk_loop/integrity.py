"""A target whose blocks have metadata beside their data, such as T10 protection information.

Owns a target for the data and the file of the metadata: for each logical block so many bytes, in
the order of the blocks. The kernel makes and checks what is in them; here they are only kept. C
does the requests (csrc/target.c), all in order.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from . import uapi
from ._uring import ffi, lib
from .errors import BackingFileError
from .params import IntegrityParams
from .state import CSUM_TYPES
from .target import LoopTarget, NativeTarget, NullTarget, Target, mark_parts

if TYPE_CHECKING:
    from ._uring import ul_target_config
    from .state import FileIdentity, Metadata

_NONE = b"\xff"  # what turns the kernel's checks of a block off


class IntegrityTarget(Target):
    """``data`` with metadata in ``file``, both of which it takes over.

    A file without a single block in it, as truncate makes it, is filled with 0xff first: what was
    never written has no metadata to be checked.

    :param file: None with a null target: blocks read as if they had no metadata.
    :raises BackingFileError: EINVAL if the file does not hold the metadata of the size that was
        asked for, or of a single block; what filling it said.
    """

    name = "integrity"

    def __init__(
        self,
        data: LoopTarget | NullTarget,
        metadata: Metadata,
        file: LoopTarget | None,
        *,
        nr_bytes: int | None = None,
    ) -> None:
        self._data = data
        self._file = file
        self._metadata = metadata
        for name in ("logical_bs", "physical_bs", "discard_granularity", "read_only", "rotational"):
            setattr(self, name, getattr(data, name))
        try:
            self._take_size(nr_bytes)
            if file is not None and not data.read_only:
                file.fill_if_empty(_NONE)
        except BaseException:
            self.close()
            raise

    @property
    def integrity(self) -> IntegrityParams:
        metadata = self._metadata
        return IntegrityParams(
            flags=uapi.LBMD_PI_CAP_INTEGRITY * metadata.is_capable
            | uapi.LBMD_PI_CAP_REFTAG * metadata.has_reftag,
            interval_exp=self.logical_bs.bit_length() - 1,
            metadata_size=metadata.nr_bytes,
            pi_offset=metadata.pi_offset,
            csum_type=CSUM_TYPES[metadata.csum],
            tag_size=metadata.tag_bytes,
        )

    @property
    def files(self) -> tuple[FileIdentity, ...]:
        return tuple(file for part in self._parts() for file in part.files)

    @property
    def has_fua(self) -> bool:
        return self._data.has_fua

    @property
    def has_volatile_cache(self) -> bool:
        return self._data.has_volatile_cache

    @property
    def can_discard(self) -> bool:
        return self._data.can_discard

    @property
    def can_write_zeroes(self) -> bool:
        return self._data.can_write_zeroes

    @property
    def best_data(self) -> str:
        return "usercopy"  # by which alone the driver hands out metadata

    def mark(self, dev_id: int) -> str:
        return mark_parts(self._parts(), dev_id)

    def close(self) -> None:
        for part in self._parts():
            part.close()

    def describe(self) -> dict[str, Any]:
        document = {**self._data.describe(), "dev_size": self.size}
        document["metadata_size"] = self._metadata.nr_bytes
        if self._file is not None:
            document["metadata_file"] = self._file.path
        return document

    def _parts(self) -> list[LoopTarget | NullTarget]:
        return [self._data] if self._file is None else [self._data, self._file]

    def _take_size(self, wanted_bytes: int | None) -> None:
        self.size = self._data.size
        if self._file is None:
            return
        if os.path.samefile(self._file.path, str(self._data.describe()["backing_file"])):
            raise BackingFileError(errno.EINVAL, self._file.path, "it is the file of the data, too")
        nr_blocks = self._file.size // self._metadata.nr_bytes
        self.size = min(self.size, nr_blocks * self.logical_bs)
        if self.size < (wanted_bytes or self.logical_bs):
            text = f"too small: it holds the metadata of {nr_blocks} blocks of {self.logical_bs}"
            raise BackingFileError(errno.EINVAL, self._file.path, text)

    @contextlib.contextmanager
    def _native_config(self) -> Iterator[ul_target_config]:
        config = ffi.new("struct ul_target_config *")
        config.kind = lib.UL_TARGET_INTEGRITY
        config.chunk_bytes = self.logical_bs
        config.metadata_bytes = self._metadata.nr_bytes
        with contextlib.ExitStack() as stack:
            if self._file is not None:
                config.nr_parts = 2
                for index, part in enumerate(self._parts()):
                    native = stack.enter_context(contextlib.closing(NativeTarget(part, "2014")))
                    config.parts[index] = native.handle
            yield config


__all__ = ["IntegrityTarget"]
