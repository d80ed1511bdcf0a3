"""The pauses between the attempts to replace a server."""

from __future__ import annotations

from ublk_loop.supervise import MAX_DELAY_S, Trouble


def test_first_attempt_comes_at_once_and_the_others_ever_later_up_to_a_limit() -> None:
    trouble = Trouble(since=0)
    delays = [trouble.next_delay_s() for _ in range(40)]
    assert delays[:4] == [0.0, 0.1, 0.2, 0.4]
    assert delays == sorted(delays)
    assert delays[-1] == MAX_DELAY_S
