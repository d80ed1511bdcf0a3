"""The daemon's messages: what is sent is read again, and nothing else is."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ublk_loop import client, protocol
from ublk_loop.errors import DaemonError
from ublk_loop.protocol import Add, Recover, Reply, Run, Status, Stop
from ublk_loop.state import DeviceOptions, TargetSpec

WORDS = st.text(st.characters(exclude_characters="\0"), max_size=20)
REQUESTS = st.one_of(
    st.builds(
        Run,
        version=WORDS,
        words=st.lists(WORDS, max_size=5).map(tuple),
        cwd=WORDS.map("/".__add__),
        environment=st.dictionaries(WORDS.map("UBLK_LOOP_".__add__), WORDS, max_size=3),
    ),
    st.builds(
        Add,
        words=st.lists(WORDS, max_size=5).map(tuple),
        cwd=WORDS.map(lambda text: "/" + text),
        two_lines=st.booleans(),
    ),
    st.builds(Recover, st.integers(0, (1 << 20) - 1), st.booleans(), st.booleans()),
    st.builds(protocol.Upgrade, st.integers(0, (1 << 20) - 1)),
    st.builds(protocol.Reload, WORDS.map("/".__add__)),
    st.just(Status()),
    st.just(Stop()),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=10,
)


@given(REQUESTS)
def test_request_is_the_same_when_read_again(request: Any) -> None:
    assert protocol.parse_request(protocol.pack_request(request)) == request


@given(st.integers(-1, 255), WORDS, WORDS)
def test_reply_is_the_same_when_read_again(exit_code: int, out: str, err: str) -> None:
    reply = Reply(exit_code, out, err, {"pid": 1})
    assert protocol.parse_reply(protocol.pack_reply(reply)) == reply


@given(st.binary(max_size=200))
def test_parse_request_gives_a_value_error_whatever_the_bytes(data: bytes) -> None:
    with pytest.raises(ValueError):
        protocol.parse_request(data)


@given(REQUESTS, JSON, st.data())
def test_parse_request_gives_a_request_or_a_value_error_whatever_a_member_holds(
    request: Any, value: object, data: st.DataObject
) -> None:
    document = protocol.document(request)
    document[data.draw(st.sampled_from(sorted(document)))] = value
    try:
        assert protocol.parse_request(json.dumps(document).encode())
    except ValueError as error:
        assert str(error)


@pytest.mark.parametrize(
    "members",
    [
        {"words": "-t null"},
        {"words": ["-t", 5]},
        {"words": ["a\0b"]},
        {"words": ["-t"] * 257},
        {"words": ["x" * 8193]},
        {"cwd": "srv"},
        {"cwd": None},
        {"two_lines": 1},
        {"extra": 1},
        {"command": "ADD"},
        {"command": ["add"]},
    ],
)
def test_parse_request_refuses(members: dict[str, Any]) -> None:
    document = {**protocol.document(Add(("-t", "null"))), **members}
    with pytest.raises(ValueError):
        protocol.parse_request(json.dumps(document).encode())
    with pytest.raises(ValueError, match="larger"):
        protocol.parse_request(b" " * (protocol.MAX_REQUEST_BYTES + 1))


@pytest.mark.parametrize(
    "members", [{"environment": {"PATH": "/"}}, {"environment": {"UBLK_LOOP_A": 1}}, {"cwd": "a"}]
)
def test_parse_request_refuses_a_run(members: dict[str, Any]) -> None:
    document = {**protocol.document(Run("0.1.0", ("list",), "/", {})), **members}
    with pytest.raises(ValueError):
        protocol.parse_request(json.dumps(document).encode())


def test_client_sends_what_the_daemon_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[dict[str, Any]] = []

    def ask(request: dict[str, Any]) -> dict[str, Any]:
        sent.append(request)
        return asdict(Reply(1, "", ""))

    monkeypatch.setattr(client, "ask", ask)
    monkeypatch.delenv("UBLK_LOOP_DAEMON", raising=False)
    monkeypatch.setenv("UBLK_LOOP_LIST_STYLE", "two-lines")
    assert client.add(["-t", "null"]) == 1
    request = protocol.parse_request(json.dumps(sent[0]).encode())
    assert request == Add(("-t", "null"), os.getcwd(), True)


@pytest.mark.parametrize("words", [["--foreground"], ["-t", "null", "-h"], ["--help"]])
def test_client_leaves_to_click_what_is_for_no_daemon(
    monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.setattr(client, "ask", lambda request: pytest.fail("asked"))
    assert client.add(words) is None
    monkeypatch.setenv("UBLK_LOOP_DAEMON", "0")
    assert client.add([]) is None


def test_wish_is_the_same_when_read_again_and_an_error_is_raised_again() -> None:
    spec = TargetSpec("loop", path="/srv/d.img")
    wish = protocol.Wish(3, DeviceOptions(flags=0x18), spec, as_json=True, two_lines=False)
    assert protocol.parse_wish(protocol.pack_wish(wish)) == wish
    error = protocol.pack_error(DaemonError(errno.EPERM, "a", "b"))
    with pytest.raises(DaemonError, match="a: Operation not permitted: b"):
        protocol.parse_wish(json.dumps(error).encode())
    no_memory = protocol.pack_error(OSError(errno.ENOMEM, "Cannot allocate memory"))
    with pytest.raises(DaemonError, match=r"^server: Cannot allocate memory$"):
        protocol.parse_wish(json.dumps(no_memory).encode())
    refused = protocol.pack_error(protocol.UsageRefused("ublk: wrong\n"))
    with pytest.raises(protocol.UsageRefused, match="wrong"):
        protocol.parse_wish(json.dumps(refused).encode())
