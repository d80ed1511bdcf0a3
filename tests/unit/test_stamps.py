"""The judge of concurrent reads: what it lets pass, and what it does not."""

from __future__ import annotations

import pytest
from stamps import History, fill


def test_read_may_find_any_write_that_is_under_way() -> None:
    history = History(1)
    first = history.begin(0, 1)
    second = history.begin(0, 1)
    begin = history.now()
    for stamp in (0, first.stamp, second.stamp):
        history.judge(0, fill(stamp, 1), begin, history.now())


def test_read_may_not_find_what_was_overwritten_before_it_began() -> None:
    history = History(2)
    for _ in range(2):
        history.end(history.begin(0, 2))
    begin = history.now()
    history.judge(0, fill(2, 2), begin, history.now())
    for stale in (0, 1):
        with pytest.raises(AssertionError, match="sector 1"):
            history.judge(0, fill(2, 1) + fill(stale, 1), begin, history.now())


def test_read_may_find_what_overlapped_the_write_that_ended_last() -> None:
    history = History(1)
    first, second = history.begin(0, 1), history.begin(0, 1)
    history.end(first)
    history.end(second)
    for stamp in (1, 2):
        history.judge(0, fill(stamp, 1), history.now(), history.now())
    with pytest.raises(AssertionError):
        history.judge(0, fill(0, 1), history.now(), history.now())


def test_read_may_not_find_a_write_that_began_after_it_nor_a_foreign_stamp() -> None:
    history = History(1)
    begin, end = history.now(), history.now()
    history.begin(0, 1)
    for stamp in (1, 99):
        with pytest.raises(AssertionError):
            history.judge(0, fill(stamp, 1), begin, end)


def test_sector_may_be_torn_between_writes_but_no_stamp_may_be() -> None:
    history = History(1)
    history.begin(0, 1)
    whole = fill(1, 1)
    history.judge(0, whole[:256] + bytes(256), history.now(), history.now())
    with pytest.raises(AssertionError):
        history.judge(0, whole[:252] + b"torn" + bytes(256), history.now(), history.now())


def test_cleared_sector_may_not_hold_what_was_there_before() -> None:
    history = History(1)
    history.end(history.begin(0, 1))
    history.end(history.begin(0, 1, zeroes=True))
    history.judge(0, bytes(512), history.now(), history.now())
    with pytest.raises(AssertionError):
        history.judge(0, fill(1, 1), history.now(), history.now())
