"""Backings that are missing, small, busy, full, cut off or broken: errnos, and what goes on."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ublk_loop.control import list_dev_ids
from ublk_loop.errors import BackingFileError
from ublk_loop.target import LoopTarget

KIB = 1 << 10
MIB = 1 << 20


@pytest.fixture(params=[False, True], ids=["buffered", "direct"])
def direct(request):
    return request.param


@pytest.fixture(params=["auto", "2014"])
def policy(request):
    return request.param


# ---- refused before there is a device ----


def test_missing_backing_file_is_enoent(tmp_path, raises_errno) -> None:
    with raises_errno(errno.ENOENT):
        LoopTarget(tmp_path / "missing")


def test_directory_as_backing_file_is_eisdir(tmp_path, raises_errno) -> None:
    with raises_errno(errno.EISDIR):
        LoopTarget(tmp_path)


@pytest.mark.parametrize("nr_bytes", [0, 1, 511])
def test_backing_file_below_a_block_is_einval(backing_file, nr_bytes, raises_errno) -> None:
    with raises_errno(errno.EINVAL):
        LoopTarget(backing_file(nr_bytes))


def test_offset_behind_the_end_is_einval(backing_file, raises_errno) -> None:
    with raises_errno(errno.EINVAL):
        LoopTarget(backing_file(MIB), offset_bytes=MIB)


def test_length_beyond_the_end_is_einval(backing_file, raises_errno) -> None:
    with raises_errno(errno.EINVAL):
        LoopTarget(backing_file(MIB), offset_bytes=512, nr_bytes=MIB)


def test_offset_inside_a_sector_is_a_value_error(backing_file) -> None:
    with pytest.raises(ValueError, match="512"):
        LoopTarget(backing_file(MIB), offset_bytes=100)


def test_file_on_a_read_only_file_system_is_erofs_unless_served_read_only(
    device, backing_file, tmp_path, mounted, open_block, pattern, raises_errno
) -> None:
    image = backing_file(MIB, pattern(MIB))
    with mounted(tmp_path, "--bind", "-o", "ro") as folder:
        path = folder / image.name
        with raises_errno(errno.EROFS):
            LoopTarget(path)
        dev = device(LoopTarget(path, read_only=True))
        with open_block(dev.block_path, read_only=True) as client:
            assert client.read(0, MIB) == pattern(MIB)
        dev.delete()


def test_immutable_file_can_only_be_served_read_only(backing_file, ext4_folder, run) -> None:
    path = backing_file(MIB, folder=ext4_folder)
    run("chattr", "+i", path)
    try:
        with pytest.raises(BackingFileError) as refused:
            LoopTarget(path)
        assert (refused.value.errno, refused.value.hint) == (
            *(errno.EPERM, "serve it with --read-only"),
        )
        LoopTarget(path, read_only=True).close()
    finally:
        run("chattr", "-i", path)


def test_file_that_is_swap_is_refused_by_its_name(backing_file, ext4_folder, run) -> None:
    # A bug: "target loop: Text file busy".
    path = backing_file(8 * MIB, bytes(8 * MIB), folder=ext4_folder)
    path.chmod(0o600)
    run("mkswap", path)
    run("swapon", path)
    try:
        with pytest.raises(BackingFileError) as refused:
            LoopTarget(path)
    finally:
        run("swapoff", path)
    assert (refused.value.errno, refused.value.what) == (errno.ETXTBSY, str(path))


def test_file_in_huge_pages_which_cannot_be_written_is_served_read_only(
    mounted, raises_errno
) -> None:
    # A bug: it was served, and each write failed.
    with mounted("none", "-t", "hugetlbfs") as folder:
        path = folder / "file"
        path.touch()
        os.truncate(path, 4 * MIB)
        with raises_errno(errno.EINVAL):
            LoopTarget(path)
        LoopTarget(path, read_only=True).close()


def test_mounted_block_device_is_ebusy(
    backing_file, attach_loop, mounted, run, raises_errno
) -> None:
    image = backing_file(16 * MIB)
    run("mkfs.ext4", "-q", image)
    with attach_loop(image) as disk, mounted(disk), raises_errno(errno.EBUSY):
        LoopTarget(disk)


def test_direct_io_demanded_where_there_is_none_is_einval(
    mounted, backing_file, raises_errno
) -> None:
    with mounted("none", "-t", "ramfs") as folder:
        path = backing_file(MIB, folder=folder)
        with raises_errno(errno.EINVAL):
            LoopTarget(path, direct=True)
        target = LoopTarget(path)
        assert not target.direct
        target.close()
        path.unlink()


def test_refused_backing_leaves_no_device(control, tmp_path) -> None:
    before = list_dev_ids()
    with pytest.raises(BackingFileError):
        LoopTarget(tmp_path / "missing")
    assert list_dev_ids() == before


# ---- a device in use ----


def test_read_only_device_refuses_writes_and_leaves_the_file_alone(
    device, backing_file, open_block, pattern
) -> None:
    path = backing_file(MIB, pattern(MIB))
    dev = device(LoopTarget(path, read_only=True))
    assert Path(f"/sys/block/ublkb{dev.dev_id}/ro").read_text().strip() == "1"
    with pytest.raises(OSError) as refusal, open_block(dev.block_path) as client:
        client.write(0, bytes(4096))
    assert refusal.value.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
    with open_block(dev.block_path, read_only=True) as client:
        assert client.read(0, MIB) == pattern(MIB)
    dev.delete()
    assert path.read_bytes() == pattern(MIB)


def test_full_tmpfs_reaches_the_writer_as_enospc_and_the_device_goes_on(
    device, backing_file, mounted, open_block, pattern, raises_errno, policy
) -> None:
    with mounted("none", "-t", "tmpfs", "-o", "size=1m") as folder:
        path = backing_file(8 * MIB, folder=folder)
        dev = device(LoopTarget(path), policy=policy)
        with open_block(dev.block_path) as client:
            client.write(0, pattern(512 * KIB))
            with raises_errno(errno.ENOSPC):
                client.write(MIB, pattern(MIB))
            assert dev.hctxs[0].stats().nr_errors >= 1
            assert client.read(0, 512 * KIB) == pattern(512 * KIB)
            client.write(4096, pattern(4096, 1))
            client.discard(MIB, 2 * MIB)
            client.write(MIB, pattern(256 * KIB, 2))
            assert client.read(MIB, 256 * KIB) == pattern(256 * KIB, 2)
        dev.delete()
        path.unlink()


def test_neighbouring_writes_that_do_not_all_fit_fail_each_for_itself(
    device, backing_file, mounted, open_block, pattern, raises_errno, policy
) -> None:
    # Requests of one page, which reach the server together and are written as one.
    with mounted("none", "-t", "tmpfs", "-o", "size=1m") as folder:
        path = backing_file(8 * MIB, folder=folder)
        dev = device(LoopTarget(path), policy=policy, max_io_buf_bytes=4 * KIB)
        with open_block(dev.block_path) as client:
            client.write(0, pattern(960 * KIB))
            with raises_errno(errno.ENOSPC):
                client.write(MIB, pattern(256 * KIB, 1))
            fitted = path.stat().st_blocks * 512 - 960 * KIB
            assert fitted == 64 * KIB
            assert dev.hctxs[0].stats().nr_errors == (256 * KIB - fitted) // (4 * KIB)
            assert client.read(MIB, fitted) == pattern(256 * KIB, 1)[:fitted]
            client.write(0, pattern(960 * KIB, 2))
        dev.delete()
        assert path.read_bytes()[: 960 * KIB] == pattern(960 * KIB, 2)
        path.unlink()


@pytest.fixture
def small_ext4(backing_file, attach_loop, mounted, run):
    """A folder on an ext4 of 8 MiB."""
    image = backing_file(8 * MIB)
    run("mkfs.ext4", "-q", "-O", "^has_journal", "-m", "0", image)
    with attach_loop(image) as disk, mounted(disk) as folder:
        yield folder


def test_full_ext4_reaches_the_writer_as_enospc(
    small_ext4, device, backing_file, open_block, pattern, direct, raises_errno, policy
) -> None:
    path = backing_file(64 * MIB, folder=small_ext4)
    dev = device(LoopTarget(path, direct=direct), policy=policy)
    with open_block(dev.block_path) as client:
        # Holes that were read are in the page cache: what writes them by memory meets the full disk
        # in a page fault.
        assert client.read(0, 64 * MIB) == bytes(64 * MIB)
        client.write(0, pattern(MIB))
        with raises_errno(errno.ENOSPC):
            for offset in range(MIB, 64 * MIB, MIB):
                client.write(offset, pattern(MIB))
        assert client.read(0, MIB) == pattern(MIB)
        client.write(0, pattern(MIB, 1))
        assert client.read(0, MIB) == pattern(MIB, 1)
    dev.delete()
    path.unlink()


def test_file_system_on_a_full_backing_sees_enospc_as_io_error_and_unmounts(
    device, backing_file, mounted, run, pattern
) -> None:
    # The device promises 64 MiB, the file system below holds 8: delayed writes fail, fsync says so.
    with mounted("none", "-t", "tmpfs", "-o", "size=8m") as folder:
        path = backing_file(64 * MIB, folder=folder)
        dev = device(LoopTarget(path))
        run("mkfs.ext4", "-q", "-O", "^has_journal", dev.block_path)
        with mounted(dev.block_path) as top, (top / "big").open("wb") as file:
            file.write(pattern(16 * MIB))
            file.flush()
            with pytest.raises(OSError) as failure:
                os.fsync(file.fileno())
            assert failure.value.errno in (errno.ENOSPC, errno.EIO)
        dev.delete()
        path.unlink()


def test_truncated_backing_file_gives_eio_past_its_end_and_the_device_goes_on(
    device, backing_file, ext4_folder, open_block, pattern, direct, raises_errno, policy
) -> None:
    path = backing_file(2 * MIB, pattern(2 * MIB), folder=ext4_folder)
    dev = device(LoopTarget(path, direct=direct), policy=policy)
    with open_block(dev.block_path) as client:
        assert client.read(0, 2 * MIB) == pattern(2 * MIB)
        os.truncate(path, MIB)
        with raises_errno(errno.EIO):
            client.read(MIB, 4096)
        assert client.read(MIB - 4096, 4096) == pattern(2 * MIB)[MIB - 4096 : MIB]
        client.write(MIB + 4096, pattern(4096, 1))
        assert client.read(MIB, 8192) == bytes(4096) + pattern(4096, 1)
    dev.delete()
    assert path.stat().st_size == MIB + 8192


def test_read_across_the_end_of_a_truncated_file_is_never_called_a_success(
    device, backing_file, ext4_folder, open_block, pattern, direct, raises_errno, policy
) -> None:
    path = backing_file(MIB, pattern(MIB), folder=ext4_folder)
    dev = device(LoopTarget(path, direct=direct), policy=policy)
    with open_block(dev.block_path) as client:
        assert client.read(0, MIB) == pattern(MIB)
        os.truncate(path, MIB - 8192)
        with raises_errno(errno.EIO):
            client.read(MIB - 16384, 16384)
    assert dev.hctxs[0].stats().nr_errors >= 1


# ---- block devices below ----


def test_block_device_serves_as_backing(
    device, backing_file, attach_loop, open_block, pattern, direct
) -> None:
    path = backing_file(4 * MIB, pattern(4 * MIB))
    with attach_loop(path) as disk:
        dev = device(LoopTarget(disk, direct=direct))
        with open_block(dev.block_path) as client:
            assert os.lseek(client.fd, 0, os.SEEK_END) == 4 * MIB
            assert client.read(0, 4 * MIB) == pattern(4 * MIB)
            client.write(MIB + 512, pattern(MIB, 1))
            client.flush()
        dev.delete()
    expected = bytearray(pattern(4 * MIB))
    expected[MIB + 512 : 2 * MIB + 512] = pattern(MIB, 1)
    assert path.read_bytes() == expected


def test_direct_io_on_a_block_device_does_not_hold_up_the_queue(
    device, backing_file, attach_loop, open_block, pattern
) -> None:
    """A node in /dev lies on a file system in memory; what it stands for does not."""
    with attach_loop(backing_file(MIB, pattern(MIB))) as disk:
        dev = device(LoopTarget(disk, direct=True), policy="auto")
        before = dev.hctxs[0].stats()
        with open_block(dev.block_path) as client:
            assert client.read(0, 64 * KIB) == pattern(MIB)[: 64 * KIB]
            client.write(0, pattern(64 * KIB, 1))
        after = dev.hctxs[0].stats()
        assert after.nr_inline == before.nr_inline
        assert after.nr_async - before.nr_async == 2
        dev.delete()


def test_read_only_block_device_is_erofs_unless_served_read_only(
    device, backing_file, attach_loop, open_block, pattern, raises_errno
) -> None:
    path = backing_file(MIB, pattern(MIB))
    with attach_loop(path, "--read-only") as disk:
        with raises_errno(errno.EROFS):
            LoopTarget(disk)
        dev = device(LoopTarget(disk, read_only=True))
        with open_block(dev.block_path, read_only=True) as client:
            assert client.read(0, MIB) == pattern(MIB)
        dev.delete()


def test_backing_of_4096_byte_blocks_gives_a_device_of_such_blocks(
    device, backing_file, attach_loop, open_block, pattern, direct, raises_errno
) -> None:
    path = backing_file(MIB, pattern(MIB))
    with attach_loop(path, "--sector-size", "4096") as disk:
        dev = device(LoopTarget(disk, direct=direct))
        queue = Path(f"/sys/block/ublkb{dev.dev_id}/queue")
        assert (queue / "logical_block_size").read_text().strip() == "4096"
        with open_block(dev.block_path) as client:
            with raises_errno(errno.EINVAL):
                client.write(512, bytes(512))
            client.write(8192, pattern(4096, 1))
            assert client.read(0, MIB)[4096 : 16 * KIB] == (
                pattern(MIB)[4096:8192] + pattern(4096, 1) + pattern(MIB)[12 * KIB : 16 * KIB]
            )
        dev.delete()
    assert path.read_bytes()[8192:12288] == pattern(4096, 1)


@pytest.fixture
def disk_with_bad_sectors(backing_file, attach_loop, run, pattern):
    """1 MiB of data whose 8 sectors from sector 1024 on fail."""
    path = backing_file(MIB, pattern(MIB))
    table = "0 1024 linear {0} 0\n1024 8 error\n1032 1016 linear {0} 1032\n"
    name = f"ublk-loop-test-{os.getpid()}"
    with attach_loop(path) as disk:
        (path.parent / "table").write_text(table.format(disk))
        run("dmsetup", "create", name, path.parent / "table")
        run("dmsetup", "mknodes")
        yield Path("/dev/mapper", name)
        run("dmsetup", "remove", "--retry", name)


def test_bad_sectors_below_fail_the_reads_that_touch_them_and_no_others(
    disk_with_bad_sectors, device, open_block, pattern, direct, raises_errno, policy
) -> None:
    dev = device(LoopTarget(disk_with_bad_sectors, direct=direct), policy=policy)
    bad = 512 * KIB
    with open_block(dev.block_path) as client:
        for offset, nr_bytes in [(bad, 512), (bad, 4096), (bad - 64 * KIB, 128 * KIB)]:
            with raises_errno(errno.EIO):
                client.read(offset, nr_bytes)
        assert client.read(0, bad) == pattern(MIB)[:bad]
        assert client.read(bad + 4096, bad - 4096) == pattern(MIB)[bad + 4096 :]
    dev.delete()


def test_neighbouring_reads_of_which_one_fails_fail_each_for_itself(
    disk_with_bad_sectors, device, open_block, pattern, direct, raises_errno, policy
) -> None:
    # Requests of one page, which reach the server together and are read as one.
    target = LoopTarget(disk_with_bad_sectors, direct=direct)
    dev = device(target, policy=policy, max_io_buf_bytes=4 * KIB)
    bad = 512 * KIB
    with open_block(dev.block_path) as client:
        with raises_errno(errno.EIO):
            client.read(bad - 128 * KIB, 256 * KIB)
        assert dev.hctxs[0].stats().nr_errors == 1
        assert client.read(bad - 128 * KIB, 128 * KIB) == pattern(MIB)[bad - 128 * KIB : bad]
        assert client.read(bad + 4 * KIB, 124 * KIB) == pattern(MIB)[bad + 4 * KIB :][: 124 * KIB]
    dev.delete()


def test_bad_sectors_below_fail_direct_writes_that_touch_them_and_no_others(
    disk_with_bad_sectors, device, open_block, pattern, raises_errno, policy
) -> None:
    dev = device(LoopTarget(disk_with_bad_sectors, direct=True), policy=policy)
    bad = 512 * KIB
    with open_block(dev.block_path) as client:
        with raises_errno(errno.EIO):
            client.write(bad - 4096, pattern(12288, 1))
        client.write(bad + 4096, pattern(4096, 2))
        assert client.read(bad + 4096, 4096) == pattern(4096, 2)
    dev.delete()


def test_bad_sectors_below_fail_the_fsync_after_a_buffered_write(
    disk_with_bad_sectors, device, open_block, pattern, raises_errno, policy
) -> None:
    dev = device(LoopTarget(disk_with_bad_sectors, direct=False), policy=policy)
    with open_block(dev.block_path) as client:
        client.write(512 * KIB, pattern(4096, 1))
        with raises_errno(errno.EIO):
            client.flush()
    dev.delete()
