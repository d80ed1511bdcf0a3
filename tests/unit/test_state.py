"""State files: what is written is read again, and nothing else is."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ublk_loop import state
from ublk_loop._uring import lib
from ublk_loop.errors import DaemonError
from ublk_loop.state import (
    DeviceOptions,
    DeviceState,
    FileIdentity,
    Metadata,
    QueueState,
    TargetSpec,
)

STATE = DeviceState(
    dev_id=3,
    sysfs_ino=4711,
    server_pid=1234,
    server_start_ticks=987654,
    options=DeviceOptions(nr_hw_queues=2, flags=0x48, policy="base"),
    spec=TargetSpec(
        "loop", path="/srv/disk one.img", offset_bytes=512, nr_bytes=1 << 20, direct=True
    ),
    target={"name": "loop", "backing_file": "/srv/disk one.img", "dev_size": 1 << 20},
    queues=(QueueState(0, 1235, (0, 2)), QueueState(1, 1236, (1, 3))),
    nr_recoveries=7,
)


@pytest.fixture(autouse=True)
def state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "state"
    monkeypatch.setenv("UBLK_LOOP_STATE_DIR", str(folder))
    return folder


def _document() -> dict[str, Any]:
    state.write(STATE)
    document: dict[str, Any] = json.loads(Path(state.state_path(STATE.dev_id)).read_text())
    return document


def _refusal(document: object) -> str:
    with pytest.raises(ValueError) as caught:
        state.parse(json.dumps(document).encode())
    return str(caught.value)


def test_state_is_the_same_when_read_again() -> None:
    state.write(STATE)
    assert state.read(STATE.dev_id) == STATE


def test_state_takes_as_many_files_of_a_stripe_as_its_target_does() -> None:
    assert state.MAX_STRIPE_FILES == lib.UL_STRIPE_MAX


def test_state_of_a_stripe_is_the_same_when_read_again() -> None:
    spec = TargetSpec("stripe", stripe_paths=("/srv/a", "/srv/b"), chunk_bytes=4096)
    state.write(dataclasses.replace(STATE, spec=spec))
    assert state.read(STATE.dev_id) == dataclasses.replace(STATE, spec=spec)
    document = _document()
    document["spec"] = {"type": "stripe", "stripe_paths": ["/srv/a", "b"], "path": ""}
    assert "path is not absolute" in _refusal(document)
    document["spec"]["stripe_paths"] = ["/srv/a", 5]
    assert "stripe_paths is not a list of texts" in _refusal(document)


def test_state_of_a_device_with_metadata_is_the_same_when_read_again() -> None:
    metadata = Metadata(64, pi_offset=48, csum="nvme", is_capable=True, has_reftag=True)
    spec = TargetSpec("loop", path="/srv/a", metadata=metadata, metadata_path="/srv/a.pi")
    state.write(dataclasses.replace(STATE, spec=spec))
    assert state.read(STATE.dev_id) == dataclasses.replace(STATE, spec=spec)
    document = _document()
    document["spec"] = dataclasses.asdict(spec)
    for name, value in (("nr_bytes", 256), ("csum", "md5"), ("has_reftag", 1), ("pi_offset", None)):
        document["spec"]["metadata"] = {**dataclasses.asdict(metadata), name: value}
        assert name in _refusal(document)
    document["spec"] = {**dataclasses.asdict(spec), "metadata_path": "a.pi"}
    assert "path is not absolute" in _refusal(document)


def test_state_keeps_what_tells_the_files_of_a_device_from_others() -> None:
    files = (FileIdentity(ino=12, version=7), FileIdentity(rdev=0x700))
    spec = TargetSpec("stripe", stripe_paths=("/srv/a", "/dev/b"), files=files)
    state.write(dataclasses.replace(STATE, spec=spec))
    assert state.read(STATE.dev_id) == dataclasses.replace(STATE, spec=spec)
    document = _document()
    document["spec"] = dataclasses.asdict(spec)
    document["spec"]["files"] = document["spec"]["files"][:1]
    assert "files has not 2" in _refusal(document)
    document["spec"]["files"] = [{"ino": -1, "rdev": 0, "version": 0}] * 2
    assert "ino is not a number" in _refusal(document)


def test_state_replaces_the_older_one_and_leaves_no_scratch_file(state_dir: Path) -> None:
    state.write(STATE)
    newer = dataclasses.replace(STATE, server_pid=99)
    state.write(newer)
    assert state.read(3) == newer
    assert os.listdir(state_dir) == ["3.json"]


def test_state_folder_and_file_are_closed_to_others_whatever_the_umask(state_dir: Path) -> None:
    old = os.umask(0)
    try:
        state.write(STATE)
    finally:
        os.umask(old)
    assert state_dir.stat().st_mode & 0o777 == 0o700
    assert (state_dir / "3.json").stat().st_mode & 0o777 == 0o600


def test_read_returns_none_when_there_is_no_file() -> None:
    assert state.read(7) is None


def test_remove_takes_state_and_log_and_tolerates_their_absence(state_dir: Path) -> None:
    state.write(STATE)
    Path(state.log_path(3)).write_text("a line")
    state.remove(3)
    state.remove(3)
    assert os.listdir(state_dir) == []


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        b'{"version": 1}',
        b'{"version": NaN}',
        b"[" * 100_000,
        b" " * (state.MAX_NR_BYTES + 1),
    ],
    ids=["empty", "cut", "binary", "list", "null", "lacking", "nan", "deep", "huge"],
)
def test_read_fails_with_one_line_when_the_file_is_corrupt(state_dir: Path, data: bytes) -> None:
    state.write(STATE)
    (state_dir / "3.json").write_bytes(data)
    with pytest.raises(DaemonError) as caught:
        state.read(3)
    assert caught.value.errno == errno.EBADMSG
    assert "3.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_read_refuses_a_file_of_another_device(state_dir: Path) -> None:
    state.write(STATE)
    os.rename(state_dir / "3.json", state_dir / "4.json")
    with pytest.raises(DaemonError) as caught:
        state.read(4)
    assert caught.value.errno == errno.EBADMSG


def test_read_refuses_a_file_that_others_can_write(state_dir: Path) -> None:
    state.write(STATE)
    (state_dir / "3.json").chmod(0o662)
    with pytest.raises(DaemonError) as caught:
        state.read(3)
    assert caught.value.errno == errno.EPERM


def test_read_refuses_a_symbolic_link_and_a_fifo(state_dir: Path) -> None:
    state.write(STATE)
    os.rename(state_dir / "3.json", state_dir / "real")
    (state_dir / "3.json").symlink_to("real")
    with pytest.raises(DaemonError) as caught:
        state.read(3)
    assert caught.value.errno == errno.ELOOP
    os.mkfifo(state_dir / "5.json", 0o600)
    with pytest.raises(DaemonError):
        state.read(5)


def test_write_refuses_a_folder_that_others_can_write(state_dir: Path) -> None:
    state_dir.mkdir(mode=0o777)
    state_dir.chmod(0o777)
    with pytest.raises(DaemonError) as caught:
        state.write(STATE)
    assert caught.value.errno == errno.EPERM
    assert os.listdir(state_dir) == []


def test_write_fails_with_the_errno_when_the_folder_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("UBLK_LOOP_STATE_DIR", str(tmp_path / "file" / "state"))
    with pytest.raises(DaemonError) as caught:
        state.write(STATE)
    assert caught.value.errno == errno.ENOTDIR


def test_parse_refuses_another_version() -> None:
    assert "version" in _refusal({**_document(), "version": 2})


@pytest.mark.parametrize("where", [(), ("options",), ("spec",), ("queues", 0)])
def test_parse_refuses_an_unknown_and_a_missing_member(where: tuple[str | int, ...]) -> None:
    document = _document()
    inner: Any = document
    for step in where:
        inner = inner[step]
    inner["extra"] = 1
    assert "extra" in _refusal(document)
    del inner["extra"]
    name = "type" if where == ("spec",) else sorted(inner)[0]
    del inner[name]
    if where != ("options",):
        assert name in _refusal(document)


def test_parse_takes_the_state_of_an_older_version_which_knew_fewer_options() -> None:
    document: Any = _document()
    document["options"] = {"nr_hw_queues": 3}
    document["spec"] = {"type": "loop", "path": "/a"}
    del document["nr_recoveries"]
    parsed = state.parse(json.dumps(document).encode())
    assert parsed.options == state.DeviceOptions(nr_hw_queues=3)
    assert parsed.nr_recoveries == 0
    assert parsed.spec == state.TargetSpec("loop", path="/a")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("dev_id",), -1),
        (("dev_id",), 1 << 20),
        (("dev_id",), True),
        (("dev_id",), 3.0),
        (("server_pid",), 0),
        (("server_pid",), -1),
        (("server_pid",), "1234"),
        (("server_start_ticks",), None),
        (("nr_recoveries",), -1),
        (("options", "queue_depth"), 4097),
        (("options", "nr_hw_queues"), 0),
        (("options", "flags"), 1 << 64),
        (("options", "policy"), "2015"),
        (("spec", "type"), "nbd"),
        (("spec", "path"), "relative.img"),
        (("spec", "path"), "/a\0b"),
        (("spec", "offset_bytes"), -512),
        (("spec", "read_only"), 0),
        (("spec", "direct"), 1),
        (("target",), []),
        (("queues",), []),
        (("queues", 0, "q_id"), 1),
        (("queues", 0, "tid"), -1),
        (("queues", 0, "affinity"), [-1]),
        (("queues", 0, "affinity"), [True]),
        (("queues", 0, "affinity"), "0"),
    ],
)
def test_parse_names_the_member_when_its_value_is_wrong(
    path: tuple[str | int, ...], value: object
) -> None:
    document = _document()
    inner: Any = document
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    named = [step for step in path if isinstance(step, str)][-1].removesuffix("_id")
    assert named in _refusal(document) or "queues" in _refusal(document)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=10,
)


@given(value=_JSON, data=st.data())
def test_parse_gives_a_state_or_a_value_error_whatever_a_member_holds(
    value: object, data: st.DataObject
) -> None:
    document = json.loads(json.dumps({"version": 1, **dataclasses.asdict(STATE)}))
    inner = document[data.draw(st.sampled_from(["options", "spec"]))]
    where = data.draw(st.sampled_from([document, inner]))
    where[data.draw(st.sampled_from(sorted(where)))] = value
    try:
        assert isinstance(state.parse(json.dumps(document).encode()), DeviceState)
    except ValueError as error:
        assert "\n" not in str(error)


def test_parse_quotes_an_unknown_name_that_has_more_than_one_line() -> None:
    """Found by tests/soak/fuzz.py: the message carried the file's own line ends and controls."""
    refusal = _refusal({**_document(), "a\n\x1b[2Jb": 1})
    assert refusal.isprintable()


@given(st.binary(max_size=200))
def test_parse_gives_a_value_error_whatever_the_bytes(data: bytes) -> None:
    with pytest.raises(ValueError):
        state.parse(data)


def test_state_folder_is_the_users_own_when_not_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UBLK_LOOP_STATE_DIR")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert state.state_dir() == "/run/user/1000/ublk"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert state.state_dir() == "/run/ublk"
