"""/etc/ublk/ublk.toml: what it asks for, and the one line that says what is wrong with it."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ublk_loop import boot
from ublk_loop.errors import DaemonError


def test_tables_are_read_as_the_words_of_ublk_add() -> None:
    text = """
    [device.0]
    type = "loop"
    file = "/srv/disk.img"
    queues = 2
    direct_io = true
    read_only = false
    size = "1G"
    shmem = ["/dev/shm/a", "/dev/shm/b"]
    [device.12]
    type = "null"
    [device.13]
    type = "stripe"
    file = ["/srv/a.img", "/srv/b.img"]
    """
    assert boot.parse(text.encode()) == {
        0: (
            *("-n", "0", "--type=loop", "--file=/srv/disk.img", "--queues=2", "--direct_io"),
            *("--size=1G", "--shmem=/dev/shm/a", "--shmem=/dev/shm/b"),
        ),
        12: ("-n", "12", "--type=null"),
        13: ("-n", "13", "--type=stripe", "--file=/srv/a.img", "--file=/srv/b.img"),
    }


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("[device.0]\ntype = 'loop'\ntype = 'null'", "overwrite"),
        ("device = 5", "device is not a table"),
        ("[devices.0]\ntype = 'null'", "unknown: devices"),
        ("[device.x]\ntype = 'null'", "'x' is not a device number"),
        ("[device.01]\ntype = 'null'", "'01' is not a device number"),
        ("[device.1048576]\ntype = 'null'", "highest"),
        ("[device]\n0 = 'null'", "device.0 is not a table"),
        ("[device.0]\nfile = '/d.img'", "device.0: Missing option"),
        ("[device.0]\ntype = 'null'\nqueus = 2", "device.0: No such option"),
        ("[device.0]\ntype = 'null'\nqueues = 0", "device.0: Invalid value for '-q'"),
        ("[device.0]\ntype = 'null'\nnumber = 1", "device.0: 'number' is not an option"),
        ("[device.0]\ntype = 'null'\nforeground = true", "'foreground' is not an option"),
        ("[device.0]\ntype = 'null'\n'queues 2' = true", "'queues 2' is not an option"),
        ("[device.0]\ntype = 'null'\nn = 1", "'n' is not an option"),
        ("[device.0]\ntype = 'null'\nqueues = [2]", "queues is neither"),
        ("[device.0]\ntype = 'null'\nqueues = 1.5", "queues is neither"),
        ("[device.0]\ntype = 'loop'\nfile = 'd.img'", "not an absolute path"),
        ("[device.0]\ntype = 'loop'\nfile = 5", "5 is not an absolute path"),
        ("[device.0]\ntype = 'loop'\nfile = '/d'\nshmem = 5", "5 is not an absolute path"),
        ("'\x7f' = 1", "invalid character"),
        ('"\\u001b[2J" = 1', r"unknown: \x1b[2J"),
        ("[device.0]\ntype = 'loop'\nfile = '/d'\nshmem = ['a']", "a is not an absolute path"),
        ("[device.0]\ntype = 'loop'\nfile = '/d'\nshmem = [['a']]", "shmem is neither"),
        ("[device.0]\ntype = 'stripe'\nfile = ['/a', 'b']", "b is not an absolute path"),
        ("[device.0]\ntype = 'ram'", "device.0: -t ram needs --size"),
    ],
)
def test_mistake_is_named_in_one_line_with_the_file(tmp_path: Path, text: str, what: str) -> None:
    path = tmp_path / "ublk.toml"
    path.write_text(text)
    with pytest.raises(DaemonError) as caught:
        boot.read(str(path))
    assert caught.value.errno == errno.EBADMSG
    assert what in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_file_may_be_absent_but_not_be_written_by_others(tmp_path: Path) -> None:
    path = tmp_path / "ublk.toml"
    assert boot.read(str(path)) == {}
    path.write_text("")
    assert boot.read(str(path)) == {}
    path.chmod(0o666)
    with pytest.raises(DaemonError, match="another user"):
        boot.read(str(path))
    with pytest.raises(DaemonError, match="directory"):
        boot.read(str(tmp_path))


@given(st.text(max_size=60) | st.from_regex(r"\[device\.\d+\]\n\w+ = [\w\"']+\n", fullmatch=True))
def test_parse_gives_devices_or_a_value_error_whatever_the_text(text: str) -> None:
    try:
        assert isinstance(boot.parse(text.encode()), dict)
    except ValueError as error:
        assert str(error)
