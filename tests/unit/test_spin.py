"""csrc/spin.c on a clock of the test's own: who is spun for, and who is not."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cffi
import pytest

from ublk_loop import _uring

CSRC = Path(__file__).parents[2] / "ublk_loop" / "csrc"
LIMIT_NS = 1_000_000


@pytest.fixture(scope="module")
def lib(tmp_path_factory: pytest.TempPathFactory) -> Any:
    assert _uring
    folder = tmp_path_factory.mktemp("spin")
    ffi = cffi.FFI()
    text = (CSRC / "spin.h").read_text()
    begin, end = text.index("/* All zero"), text.index("#endif")
    ffi.cdef(text[begin:end])
    ffi.set_source(
        "_spin", '#include "spin.h"', sources=[str(CSRC / "spin.c")], include_dirs=[str(CSRC)]
    )
    ffi.compile(str(folder))
    sys.path.insert(0, str(folder))
    try:
        import _spin  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(folder))
    return _spin


class Client:
    """A thread that serves a client: what a round takes depends on whether it spins."""

    def __init__(self, module: Any) -> None:
        self._lib = module.lib
        self._spin = module.ffi.new("struct ul_spin *", {"limit_ns": LIMIT_NS})
        self._now_ns = 1_000_000_000
        self.nr_spins = 0

    def run(self, nr_rounds: int, round_ns: Callable[[bool], int]) -> float:
        """Return how many of the rounds were spun for."""
        nr_spins = 0
        for _ in range(nr_rounds):
            spins = self._lib.ul_spin_ns(self._spin) > 0
            nr_spins += spins
            self._now_ns += round_ns(spins)
            self._lib.ul_spin_note(self._spin, self._now_ns, 1)
        return nr_spins / nr_rounds


def test_client_that_is_faster_with_it_is_spun_for(lib: Any) -> None:
    client = Client(lib)
    client.run(200, lambda spins: 50_000 if spins else 120_000)
    assert client.run(10_000, lambda spins: 50_000 if spins else 120_000) > 0.95


def test_client_whose_cpu_the_spin_takes_is_hardly_ever_spun_for(lib: Any) -> None:
    client = Client(lib)
    client.run(200, lambda spins: 1_500_000 if spins else 300_000)
    assert client.run(10_000, lambda spins: 1_500_000 if spins else 300_000) < 0.02


def test_spinning_that_brings_nothing_is_left_alone(lib: Any) -> None:
    client = Client(lib)
    assert client.run(10_000, lambda spins: 100_000) < 0.1


def test_requests_further_apart_than_the_longest_spin_are_not_spun_for(lib: Any) -> None:
    client = Client(lib)
    client.run(200, lambda spins: 50_000 if spins else 120_000)
    client.run(200, lambda spins: 3_000_000)
    assert client.run(1000, lambda spins: 3_000_000) == 0


def test_pauses_of_a_client_count_for_neither_way(lib: Any) -> None:
    client = Client(lib)
    client.run(200, lambda spins: 50_000 if spins else 120_000)
    for _ in range(50):
        client.run(1, lambda spins: 10_000_000_000)
        assert client.run(20, lambda spins: 50_000 if spins else 120_000) > 0.2
    assert client.run(1000, lambda spins: 50_000 if spins else 120_000) > 0.9


def test_change_of_the_machine_is_noticed_both_ways(lib: Any) -> None:
    client = Client(lib)
    client.run(5_000, lambda spins: 50_000 if spins else 120_000)
    client.run(300, lambda spins: 1_500_000 if spins else 300_000)
    assert client.run(5_000, lambda spins: 1_500_000 if spins else 300_000) < 0.05
    client.run(300, lambda spins: 50_000 if spins else 120_000)
    assert client.run(5_000, lambda spins: 50_000 if spins else 120_000) > 0.95
