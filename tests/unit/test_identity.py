"""Another file at a backing file's path is told from it, and the right one never refused."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ublk_loop import identity
from ublk_loop.errors import BackingFileError
from ublk_loop.integrity import IntegrityTarget
from ublk_loop.state import FileIdentity, Metadata
from ublk_loop.target import LoopTarget, StripeTarget, Target

# Where inodes have no generation (overlayfs), nothing is told from anything.
MEMORY = Path("/dev/shm")


@pytest.fixture
def files(tmp_path: Path) -> Iterator[list[Path]]:
    folder = MEMORY / f"ublk-{os.getpid()}-{tmp_path.name}"
    folder.mkdir()
    made = [folder / name for name in ("data", "more")]
    for path in made:
        path.write_bytes(bytes(1 << 20))
    yield made
    shutil.rmtree(folder)


def _loop(paths: list[Path], known: tuple[FileIdentity, ...]) -> Target:
    return LoopTarget(paths[0], recovers=5, known=known[0] if known else None)


def _stripe(paths: list[Path], known: tuple[FileIdentity, ...]) -> Target:
    return StripeTarget([str(path) for path in paths], recovers=5, known=known)


def _integrity(paths: list[Path], known: tuple[FileIdentity, ...]) -> Target:
    data = _loop(paths, known)
    assert isinstance(data, LoopTarget)
    try:
        file = LoopTarget(paths[1], direct=False, recovers=5, known=known[1] if known else None)
    except BackingFileError:
        data.close()
        raise
    return IntegrityTarget(data, Metadata(8), file)


@pytest.mark.parametrize("build", [_loop, _stripe, _integrity])
def test_each_file_of_a_target_is_refused_when_another_is_at_its_path(
    files: list[Path], build: Callable[[list[Path], tuple[FileIdentity, ...]], Target]
) -> None:
    target = build(files, ())
    known = target.files
    target.close()
    assert FileIdentity() not in known
    for path, _ in zip(files, known, strict=False):
        build(files, known).close()
        moved = path.rename(path.with_suffix(".moved"))
        path.write_bytes(bytes(1 << 20))
        with pytest.raises(BackingFileError) as refused:
            build(files, known)
        assert refused.value.errno == errno.ESTALE
        assert refused.value.what == str(path)
        build(files, ()).close()  # as an older version has it
        moved.rename(path)
    build(files, known).close()


def test_nothing_is_refused_that_is_not_certainly_another_file() -> None:
    file, unknown = FileIdentity(ino=12, version=7), FileIdentity()
    disk = FileIdentity(rdev=os.makedev(4095, 77), version=3)  # which is not there any more
    assert not identity.is_another(file, file)
    assert not identity.is_another(unknown, file)
    assert not identity.is_another(file, unknown)
    assert not identity.is_another(disk, FileIdentity(rdev=os.makedev(4095, 78), version=4))
    assert not identity.is_another(disk, FileIdentity(rdev=disk.rdev, version=4))
    assert identity.is_another(file, FileIdentity(ino=12, version=8))
    assert identity.is_another(file, disk)


def test_disk_is_another_while_the_first_is_there_under_its_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disk = FileIdentity(rdev=os.makedev(4095, 77), version=3)
    another = FileIdentity(rdev=os.makedev(4095, 78), version=4)
    monkeypatch.setattr(identity, "_disk_seq", lambda rdev: 3)
    assert identity.is_another(disk, another)
    monkeypatch.setattr(identity, "_disk_seq", lambda rdev: 5)  # it has gone, and a new one come
    assert not identity.is_another(disk, another)
    monkeypatch.setattr(identity, "_disk_seq", lambda rdev: 0)
    assert not identity.is_another(FileIdentity(rdev=disk.rdev), another)
