"""Workqueues from Python: semantics that the model test does not reach, threads, lifetimes."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ublk_loop._uring import ffi, lib
from ublk_loop.errors import UblkLoopError
from ublk_loop.workqueue import (
    HIGHPRI_NICE,
    WQ,
    DelayedWork,
    Pool,
    Work,
    Workqueue,
    alloc_ordered_workqueue,
    alloc_workqueue,
    register_handler,
    unregister_handler,
)

TIMEOUT_S = 20
WaitUntil = Callable[..., None]


class Gate:
    """Items that stop inside their function until ``open``; knows how many are inside."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._nr_tickets = 0
        self.nr_inside = 0
        self.nr_done = 0

    def pass_through(self, work: Work) -> None:
        with self._changed:
            self.nr_inside += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._nr_tickets)
            self._nr_tickets -= 1
            self.nr_inside -= 1
            self.nr_done += 1
            self._changed.notify_all()

    def open(self, nr_items: int = 1_000_000) -> None:
        with self._changed:
            self._nr_tickets += nr_items
            self._changed.notify_all()

    def wait_inside(self, nr_items: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.nr_inside == nr_items, TIMEOUT_S)

    def wait_done(self, nr_items: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.nr_done == nr_items, TIMEOUT_S)

    def works(self, nr_items: int) -> list[Work]:
        return [Work(self.pass_through) for _ in range(nr_items)]


@pytest.fixture(name="gate")
def gate_that_opens_in_the_end() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open()


@pytest.fixture(name="wq")
def unbound_workqueue() -> Iterator[Workqueue]:
    with Workqueue("test") as workqueue:
        yield workqueue


def on_thread(function: Callable[[], object]) -> Callable[[], object]:
    """Start it on a thread; returns a call that waits for its result, and raises what it raised."""
    outcome: list[object] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def join() -> object:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()
        if errors:
            raise errors[0]
        return outcome[0]

    return join


def run_python(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


# ---- arguments ----


@pytest.mark.parametrize(
    "flags",
    [0, WQ.MEM_RECLAIM, WQ.UNBOUND | WQ.FREEZABLE, WQ.UNBOUND | WQ.SYSFS, WQ.UNBOUND | 1 << 20],
)
def test_alloc_workqueue_refuses_flags_that_it_gives_no_meaning(flags: int) -> None:
    with pytest.raises(ValueError):
        alloc_workqueue("flags", flags)


@pytest.mark.parametrize("max_active", [-1, 2049])
def test_alloc_workqueue_refuses_max_active_out_of_range(max_active: int) -> None:
    with pytest.raises(ValueError):
        alloc_workqueue("max_active", WQ.UNBOUND, max_active)


def test_max_active_is_1024_when_none_is_given() -> None:
    with alloc_workqueue("default", WQ.UNBOUND) as wq:
        assert wq.max_active == 1024


def test_max_active_of_an_ordered_workqueue_cannot_be_set() -> None:
    with alloc_ordered_workqueue("ordered") as wq:
        assert wq.max_active == 1
        with pytest.raises(ValueError):
            wq.max_active = 2


@pytest.mark.parametrize("delay_s", [-1, float("nan"), 2.0**32])
def test_queue_delayed_work_refuses_a_delay_out_of_range(wq: Workqueue, delay_s: float) -> None:
    with pytest.raises(ValueError):
        wq.queue_delayed_work(DelayedWork(print), delay_s)


# ---- items ----


@settings(max_examples=30)
@given(numbers=st.lists(st.integers(0, 9), max_size=100), mem_reclaim=st.booleans())
def test_an_ordered_workqueue_runs_items_in_the_order_of_queueing(
    numbers: list[int], mem_reclaim: bool
) -> None:
    ran: list[int] = []
    with Workqueue("ordered", ordered=True, mem_reclaim=mem_reclaim) as wq:
        for number in numbers:
            assert wq.queue_work(Work(lambda _, number=number: ran.append(number)))  # type: ignore[misc]
    assert ran == numbers


@settings(max_examples=30)
@given(max_active=st.integers(1, 5), nr_items=st.integers(0, 60), nr_queuers=st.integers(1, 3))
def test_every_item_runs_once_and_never_more_than_max_active_at_once(
    max_active: int, nr_items: int, nr_queuers: int
) -> None:
    lock = threading.Lock()
    nr_inside, most_inside = 0, 0
    ran: list[tuple[int, int]] = []

    def item(name: tuple[int, int]) -> Callable[[Work], None]:
        def run(work: Work) -> None:
            nonlocal nr_inside, most_inside
            with lock:
                nr_inside += 1
                most_inside = max(most_inside, nr_inside)
            os.sched_yield()
            with lock:
                nr_inside -= 1
                ran.append(name)

        return run

    with Workqueue("bounded", max_active) as wq:

        def queue_all(queuer: int) -> None:
            for i in range(nr_items):
                assert wq.queue_work(Work(item((queuer, i))))

        joins = [on_thread(lambda queuer=queuer: queue_all(queuer)) for queuer in range(nr_queuers)]  # type: ignore[misc]
        for join in joins:
            join()
        wq.flush()
        assert sorted(ran) == [(q, i) for q in range(nr_queuers) for i in range(nr_items)]
    assert most_inside <= max_active


def test_items_of_an_unbound_workqueue_run_side_by_side_when_they_block(
    wq: Workqueue, gate: Gate
) -> None:
    for work in gate.works(12):
        wq.queue_work(work)
    gate.wait_inside(12)


def test_an_item_that_queues_itself_runs_again_after_it_has_ended(wq: Workqueue) -> None:
    nr_runs, nr_inside, most_inside = 0, 0, 0

    def run(work: Work) -> None:
        nonlocal nr_runs, nr_inside, most_inside
        nr_runs += 1
        nr_inside += 1
        most_inside = max(most_inside, nr_inside)
        if nr_runs < 50:
            assert wq.queue_work(work)
            assert not wq.queue_work(work)
        nr_inside -= 1

    work = Work(run)
    wq.queue_work(work)
    while work.flush():
        pass
    assert (nr_runs, most_inside, work.exception) == (50, 1, None)


def test_an_item_queued_again_while_it_runs_stays_with_its_worker(wq: Workqueue) -> None:
    threads: list[int] = []

    def run(work: Work) -> None:
        threads.append(threading.get_ident())
        if len(threads) == 1:
            wq.queue_work(work)
            # It waits for this run, though a worker is free: a second one ran an item meanwhile.
            other = Work(lambda _: threads.append(0))
            wq.queue_work(other)
            other.flush()

    work = Work(run)
    wq.queue_work(work)
    wq.drain()
    assert threads == [threads[0], 0, threads[0]]


def test_an_exception_is_kept_and_the_worker_goes_on(wq: Workqueue) -> None:
    for error in (RuntimeError("of an item"), KeyboardInterrupt(), SystemExit(3)):

        def fail(work: Work, error: BaseException = error) -> None:
            raise error

        work = Work(fail)
        wq.queue_work(work)
        work.flush()
        assert work.exception is error
    assert wq.pool.stats().nr_workers == wq.pool.stats().nr_created


def test_an_item_is_let_go_after_it_ran(wq: Workqueue, wait_until: WaitUntil) -> None:
    work = Work(lambda work: None)
    alive = weakref.ref(work)
    wq.queue_work(work)
    work.flush()
    del work
    wait_until(lambda: gc.collect() >= 0 and alive() is None)


def test_an_item_nobody_else_holds_still_runs(wq: Workqueue) -> None:
    ran = threading.Event()
    wq.queue_work(Work(lambda work: ran.set()))
    gc.collect()
    assert ran.wait(TIMEOUT_S)


def test_an_item_moves_to_another_workqueue_only_when_it_is_idle(gate: Gate) -> None:
    work = Work(gate.pass_through)
    with Workqueue("first") as first, Workqueue("second", highpri=True) as second:
        assert first.queue_work(work)
        gate.wait_inside(1)
        with pytest.raises(ValueError):
            second.queue_work(work)
        gate.open()
        work.flush()
        assert second.queue_work(work)
        work.flush()
        assert second.stats().nr_completed == 1


def test_an_item_can_be_queued_elsewhere_after_its_workqueue_was_closed() -> None:
    ran: list[Work] = []
    work = Work(ran.append)
    with Workqueue("first") as first:
        first.queue_work(work)
        work.disable()
    assert not work.pending and not work.running and not work.flush() and not work.cancel_sync()
    with Workqueue("second") as second:
        assert not second.queue_work(work)
        work.enable()
        assert second.queue_work(work)
    assert ran[-1] is work


# ---- cancel and flush of an item ----


def test_cancel_sync_leaves_an_item_idle_when_it_keeps_queueing_itself(wq: Workqueue) -> None:
    started = threading.Event()

    def run(work: Work) -> None:
        started.set()
        wq.queue_work(work)

    work = Work(run)
    wq.queue_work(work)
    assert started.wait(TIMEOUT_S)
    work.cancel_sync()
    assert not work.pending and not work.running
    assert wq.queue_work(work), "it is enabled again"
    work.cancel_sync()


def test_cancel_sync_waits_for_the_run_under_way_and_says_it_was_not_pending(
    wq: Workqueue, gate: Gate
) -> None:
    (work,) = gate.works(1)
    wq.queue_work(work)
    gate.wait_inside(1)
    join = on_thread(work.cancel_sync)
    gate.open()
    assert join() is False
    assert gate.nr_done == 1


def test_cancel_sync_of_a_pending_item_says_so(gate: Gate) -> None:
    first, second = gate.works(2)
    with alloc_ordered_workqueue("ordered") as wq:
        wq.queue_work(first)
        wq.queue_work(second)
        gate.wait_inside(1)
        assert second.cancel_sync() is True
        gate.open()
    assert gate.nr_done == 1


def test_flush_of_an_item_waits_for_the_run_that_is_pending(wq: Workqueue, gate: Gate) -> None:
    (work,) = gate.works(1)
    wq.queue_work(work)
    gate.wait_inside(1)
    wq.queue_work(work)
    join = on_thread(lambda: work.flush() and gate.nr_done)
    gate.open(1)
    gate.wait_done(1)
    gate.wait_inside(1)
    gate.open(1)
    assert join() in (2, False), "False: both runs were over before it began"


def test_flush_of_an_item_has_nothing_to_wait_for_when_it_is_idle(wq: Workqueue) -> None:
    work = Work(lambda work: None)
    assert work.flush() is False
    wq.queue_work(work)
    wq.flush()
    assert work.flush() is False


def test_flush_of_a_delayed_item_does_not_wait_for_its_time(wq: Workqueue) -> None:
    ran: list[Work] = []
    work = DelayedWork(ran.append)
    wq.queue_delayed_work(work, 100_000)
    assert work.flush() and ran == [work]


def test_waiting_for_itself_is_refused_when_an_item_flushes_cancels_or_closes() -> None:
    errors: list[int | None] = []

    def run(work: Work) -> None:
        for wait in (work.flush, work.cancel_sync, wq.flush, wq.drain, wq.close):
            try:
                wait()
            except UblkLoopError as error:
                errors.append(error.errno)

    with Workqueue("test") as wq:
        work = Work(run)
        wq.queue_work(work)
        work.flush()
        assert errors == [errno.EDEADLK] * 5
        assert wq.queue_work(work), "neither disabled nor closed by the attempts"


# ---- delayed items ----


@settings(max_examples=20)
@given(delays_ms=st.lists(st.integers(0, 20), max_size=8))
def test_delayed_items_run_in_the_order_of_their_times(delays_ms: list[int]) -> None:
    ran: list[int] = []
    due: list[tuple[float, float]] = []
    with alloc_ordered_workqueue("delayed") as wq:
        works = [DelayedWork(lambda _, i=i: ran.append(i)) for i in range(len(delays_ms))]  # type: ignore[misc]
        for work, delay_ms in zip(works, delays_ms, strict=True):
            earliest = time.monotonic() + delay_ms / 1000
            wq.queue_delayed_work(work, delay_ms / 1000)
            due.append((earliest, time.monotonic() + delay_ms / 1000))
        deadline = time.monotonic() + TIMEOUT_S
        while len(ran) < len(delays_ms):
            assert time.monotonic() < deadline
            time.sleep(0.001)
    # One whose time was surely before another one's ran before it. (Without a delay an item is
    # queued at once, before one whose time has just come.)
    for i in ran:
        for j in ran:
            assert due[i][1] >= due[j][0] or ran.index(i) < ran.index(j) or not delays_ms[j]


def test_a_delayed_item_does_not_run_before_its_time(wq: Workqueue) -> None:
    ran_at: list[float] = []
    done = threading.Event()

    def run(work: Work) -> None:
        ran_at.append(time.monotonic())
        done.set()

    begin = time.monotonic()
    wq.queue_delayed_work(DelayedWork(run), 0.02)
    assert done.wait(TIMEOUT_S)
    assert ran_at[0] - begin >= 0.02


def test_mod_delayed_work_brings_a_far_time_near(wq: Workqueue) -> None:
    ran = threading.Event()
    work = DelayedWork(lambda work: ran.set())
    assert not wq.mod_delayed_work(work, 100_000)
    assert not wq.queue_delayed_work(work, 0), "it is pending"
    assert wq.mod_delayed_work(work, 0.001)
    assert ran.wait(TIMEOUT_S)


def test_a_delayed_item_does_not_run_after_its_workqueue_was_closed() -> None:
    ran: list[str] = []
    done = threading.Event()
    pool = make_pool()
    with Workqueue("stays", pool=pool) as stays:
        with Workqueue("closed", pool=pool) as closed:
            closed.queue_delayed_work(DelayedWork(lambda work: ran.append("closed")), 0.03)
        later = DelayedWork(lambda work: done.set())
        stays.queue_delayed_work(later, 0.031)
        assert done.wait(TIMEOUT_S)
    pool.close()
    assert not ran


def test_close_cancels_delayed_items_and_lets_them_go(wait_until: WaitUntil) -> None:
    ran: list[Work] = []
    work = DelayedWork(ran.append)
    alive = weakref.ref(work)
    with Workqueue("delayed") as wq:
        wq.queue_delayed_work(work, 100_000)
    assert not work.pending and not ran
    del work
    wait_until(lambda: gc.collect() >= 0 and alive() is None)


# ---- flush, drain, close ----


def test_flush_does_not_wait_for_what_is_queued_after_it(wq: Workqueue, gate: Gate) -> None:
    ticket = ffi.new("uint64_t *")
    (early,) = gate.works(1)
    wq.queue_work(early)
    gate.wait_inside(1)
    join = on_thread(lambda: lib.ul_workqueue_flush_wait(wq.handle, ticket))
    while not ticket[0]:
        time.sleep(0)
    late_gate = Gate()
    (late,) = late_gate.works(1)
    wq.queue_work(late)
    late_gate.wait_inside(1)
    gate.open()
    assert join() == 0
    assert late_gate.nr_inside == 1
    late_gate.open()


def test_each_flush_comes_back_as_its_items_end_when_there_are_more_than_colors(
    gate: Gate,
) -> None:
    nr_colors = 16
    joins = []
    with alloc_ordered_workqueue("colors") as wq:
        for i, work in enumerate(gate.works(2 * nr_colors)):
            wq.queue_work(work)
            ticket = ffi.new("uint64_t *")
            joins.append(
                on_thread(lambda t=ticket: lib.ul_workqueue_flush_wait(wq.handle, t))  # type: ignore[misc]
            )
            # The first ones begin at once, the rest when a color is free.
            while i < nr_colors - 1 and not ticket[0]:
                time.sleep(0)
        for join in joins[: nr_colors - 1]:
            gate.open(1)
            assert join() == 0
        gate.open()
        for join in joins[nr_colors - 1 :]:
            assert join() == 0


def test_drain_lets_in_only_what_its_own_items_queue(wq: Workqueue, gate: Gate) -> None:
    nr_runs = 0

    def chain(work: Work) -> None:
        nonlocal nr_runs
        gate.pass_through(work)
        nr_runs += 1
        if nr_runs < 5:
            wq.queue_work(work)

    work = Work(chain)
    wq.queue_work(work)
    gate.wait_inside(1)
    join = on_thread(wq.drain)
    outsider = Work(lambda work: None)
    with pytest.raises(UblkLoopError) as caught:
        while True:  # until the drain has begun
            wq.queue_work(outsider)
            outsider.flush()
    assert caught.value.errno == errno.ESHUTDOWN
    gate.open()
    join()
    assert (nr_runs, work.exception) == (5, None)
    assert wq.queue_work(outsider), "the drain is over"


def test_close_runs_what_was_queued_first() -> None:
    ran: list[Work] = []
    with Workqueue("closing", 2) as wq:
        for _ in range(200):
            wq.queue_work(Work(ran.append))
    assert len(ran) == 200


def test_close_lets_its_own_items_go_on_queueing() -> None:
    nr_runs = 0

    def chain(work: Work) -> None:
        nonlocal nr_runs
        nr_runs += 1
        if nr_runs < 20:
            wq.queue_work(work)

    work = Work(chain)
    with Workqueue("closing") as wq:
        wq.queue_work(work)
    assert (nr_runs, work.exception) == (20, None)


def test_every_use_is_refused_after_close() -> None:
    wq = Workqueue("closed", mem_reclaim=True)
    wq.close()
    wq.close()
    uses: list[Callable[[], object]] = [
        lambda: wq.handle,
        lambda: wq.queue_work(Work(print)),
        lambda: wq.queue_delayed_work(DelayedWork(print), 1),
        lambda: wq.flush(),
        lambda: wq.drain(),
        lambda: wq.stats(),
        lambda: setattr(wq, "max_active", 3),
    ]
    for use in uses:
        with pytest.raises(ValueError):
            use()


def test_two_closes_at_once_and_a_flush_all_come_back(gate: Gate) -> None:
    wq = Workqueue("closing", mem_reclaim=True)
    for work in gate.works(3):
        wq.queue_work(work)
    gate.wait_inside(3)
    joins = [on_thread(wq.close), on_thread(wq.close), on_thread(wq.flush)]
    gate.open()
    for join in joins[:2]:
        join()
    with contextlib.suppress(ValueError):  # it came after the close
        joins[2]()


def test_close_ends_every_thread_that_was_made(wait_until: WaitUntil) -> None:
    before = set(threading.enumerate())
    with Workqueue("threads", mem_reclaim=True, pool=(pool := Pool())) as wq:
        gate = Gate()
        for work in gate.works(5):
            wq.queue_work(work)
        gate.wait_inside(5)
        assert len(set(threading.enumerate()) - before) == 5 + 2
        gate.open()
    pool.close()
    wait_until(lambda: set(threading.enumerate()) <= before)


def test_a_signal_handler_runs_while_the_main_thread_flushes(wq: Workqueue, gate: Gate) -> None:
    (work,) = gate.works(1)
    wq.queue_work(work)
    gate.wait_inside(1)
    old = signal.signal(signal.SIGALRM, lambda *_: gate.open())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
        wq.flush()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert gate.nr_done == 1


class Interrupted(Exception):
    pass


def test_a_signal_handler_that_raises_ends_a_flush(wq: Workqueue, gate: Gate) -> None:
    (work,) = gate.works(1)
    wq.queue_work(work)
    gate.wait_inside(1)

    def interrupt(*_: object) -> None:
        raise Interrupted

    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        for wait in (wq.flush, wq.drain, work.flush, work.cancel_sync):
            with pytest.raises(Interrupted):
                signal.setitimer(signal.ITIMER_REAL, 0.02)
                wait()
    finally:
        signal.signal(signal.SIGALRM, old)
    gate.open()
    wq.flush()
    assert gate.nr_done == 1
    assert wq.queue_work(work), "neither disabled nor draining"


# ---- workers ----


def make_pool(
    idle_timeout_s: float = 300,
    start_thread: Callable[[threading.Thread], None] = threading.Thread.start,
    spin_s: float = 0,
) -> Pool:
    return Pool(
        idle_timeout_s=idle_timeout_s,
        create_cooldown_s=0.05,
        mayday_initial_s=0.001,
        mayday_interval_s=0.005,
        spin_s=spin_s,
        start_thread=start_thread,
    )


def test_workers_are_made_on_demand_and_used_again(gate: Gate) -> None:
    with Workqueue("demand", pool=(pool := make_pool())) as wq:
        assert pool.stats().nr_workers == 0
        for nr_items in (1, 4, 3):
            for work in gate.works(nr_items):
                wq.queue_work(work)
            gate.wait_inside(nr_items)
            gate.open(nr_items)
            wq.flush()
        assert pool.stats().nr_created <= 5, "a fifth may be made while the first goes to sleep"
    pool.close()


def nr_idle_after_culling(nr_idle: int, nr_busy: int) -> int:
    while nr_idle > 2 and (nr_idle - 2) * 4 >= nr_busy:
        nr_idle -= 1
    return nr_idle


@settings(max_examples=15)
@given(data=st.data(), nr_workers=st.integers(1, 14))
def test_idle_workers_leave_until_two_and_a_quarter_of_the_busy_ones_are_left(
    data: st.DataObject, nr_workers: int
) -> None:
    gate, nr_ended = Gate(), data.draw(st.integers(0, nr_workers))
    nr_busy = nr_workers - nr_ended
    nr_left = nr_busy + nr_idle_after_culling(nr_ended, nr_busy)
    with Workqueue("cull", pool=(pool := make_pool(idle_timeout_s=0))) as wq:
        # Held until all are inside, so none is idle before.
        for work in gate.works(nr_workers):
            wq.queue_work(work)
        gate.wait_inside(nr_workers)
        gate.open(nr_ended)
        gate.wait_done(nr_ended)
        deadline = time.monotonic() + TIMEOUT_S
        # Workers go idle one by one, so what is left depends on the order only through busy ones.
        while (stats := pool.stats()).nr_workers - stats.nr_idle != nr_busy or (
            stats.nr_workers > nr_left
        ):
            assert time.monotonic() < deadline, stats
            time.sleep(0.001)
        assert nr_busy <= stats.nr_workers <= nr_left
        gate.open()
    pool.close()
    assert stats.nr_culled >= nr_workers - nr_left


def test_no_worker_is_culled_before_it_was_idle_long_enough(gate: Gate) -> None:
    with Workqueue("cull", pool=(pool := make_pool(idle_timeout_s=100_000))) as wq:
        for work in gate.works(8):
            wq.queue_work(work)
        gate.wait_inside(8)
        gate.open()
        wq.flush()
        assert (pool.stats().nr_workers, pool.stats().nr_culled) == (8, 0)
    pool.close()


def test_workqueues_with_the_same_attributes_share_a_pool() -> None:
    with Workqueue("a") as a, Workqueue("b", max_active=3) as b, Workqueue("c", highpri=True) as c:
        assert a.pool is b.pool
        assert c.pool is not a.pool


def test_a_pool_is_made_on_first_use_and_ends_with_its_last_workqueue() -> None:
    with Workqueue("first") as wq:
        pool = wq.pool
    with pytest.raises(ValueError):
        pool.stats()


def test_a_pool_in_use_cannot_be_closed() -> None:
    pool = make_pool()
    with Workqueue("test", pool=pool), pytest.raises(ValueError):
        pool.close()
    pool.close()


def test_workers_of_highpri_have_their_nice_or_say_why_not() -> None:
    nices: list[int] = []
    work = Work(
        lambda work: nices.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
    )
    with alloc_workqueue("high", WQ.UNBOUND | WQ.HIGHPRI) as wq:
        wq.queue_work(work)
        work.flush()
        denied = wq.pool.stats().nice_errno
        assert nices[0] == HIGHPRI_NICE or denied in (errno.EPERM, errno.EACCES)
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) != HIGHPRI_NICE


def test_workers_run_on_the_cpus_of_their_workqueue() -> None:
    cpu = min(os.sched_getaffinity(0))
    seen: list[set[int]] = []
    with Workqueue("cpus", cpus=[cpu], mem_reclaim=True) as wq:
        wq.queue_work(Work(lambda work: seen.append(os.sched_getaffinity(0))))
    assert seen == [{cpu}]


def test_workers_block_every_signal_and_have_a_name(wq: Workqueue) -> None:
    seen: dict[str, str] = {}

    def run(work: Work) -> None:
        for line in Path("/proc/thread-self/status").read_text().splitlines():
            key, _, value = line.partition(":\t")
            seen[key] = value

    wq.queue_work(Work(run))
    wq.flush()
    blocked = int(seen["SigBlk"], 16)
    for number in range(1, 32):
        can_be_blocked = number not in (signal.SIGKILL, signal.SIGSTOP)
        assert blocked >> (number - 1) & 1 == can_be_blocked
    assert seen["Name"] == "ul-worker"


def test_queueing_costs_no_wake_up_when_a_worker_is_under_way() -> None:
    nr_runs = 0

    def fill(work: Work) -> None:
        for _ in range(500):
            wq.queue_work(Work(count))

    def count(work: Work) -> None:
        nonlocal nr_runs
        nr_runs += 1

    with alloc_ordered_workqueue("wakeups") as wq:
        wq.queue_work(Work(fill))
        wq.drain()
        # One, for the manager to make the worker.
        assert (nr_runs, wq.stats().nr_wakeups) == (500, 1)


def test_workers_that_spin_before_they_sleep_run_everything() -> None:
    ran: list[Work] = []
    with Workqueue("spin", 4, pool=(pool := make_pool(spin_s=0.001))) as wq:
        for i in range(300):
            wq.queue_work(Work(ran.append))
            if i % 7 == 0:
                wq.flush()
    pool.close()
    assert len(ran) == 300


# ---- the rescuer ----


class Threads:
    """Makes worker threads, or does not."""

    def __init__(self) -> None:
        self.fails = True
        self.error: Exception = RuntimeError("can't start new thread")

    def start(self, thread: threading.Thread) -> None:
        if self.fails:
            raise self.error
        thread.start()


def test_the_rescuer_runs_everything_when_no_thread_can_be_made(
    gate: Gate, wait_until: WaitUntil
) -> None:
    names: list[str] = []
    threads = Threads()
    pool = make_pool(start_thread=threads.start)
    with Workqueue("reclaim", mem_reclaim=True, pool=pool) as wq:
        wq.queue_work(gate.works(1)[0])
        for _ in range(99):
            wq.queue_work(Work(lambda work: names.append(threading.current_thread().name)))
        wait_until(lambda: pool.stats().nr_create_failures >= 2)
        gate.open()
        wq.flush()
        assert names == ["ul-reclaim"] * 99
        assert wq.stats().nr_rescued == 100 and wq.stats().nr_maydays >= 1
        assert pool.stats().nr_workers == 0
    pool.close()


def test_the_rescuer_ends_its_turn_of_16_items_when_the_pool_has_recovered(
    gate: Gate, wait_until: WaitUntil
) -> None:
    threads = Threads()
    pool = make_pool(start_thread=threads.start)
    with (
        Workqueue("reclaim", 1, mem_reclaim=True, pool=pool) as reclaim,
        Workqueue("plain", pool=pool) as plain,
    ):
        for work in gate.works(40):
            reclaim.queue_work(work)
        gate.wait_inside(1)
        threads.fails = False
        plain.queue_work(Work(lambda work: None))
        plain.flush()
        wait_until(lambda: pool.stats().nr_idle == 1)
        gate.open()
        reclaim.flush()
        assert (reclaim.stats().nr_completed, reclaim.stats().nr_rescued) == (40, 16)
    pool.close()


def test_only_a_workqueue_with_a_rescuer_goes_on_when_no_thread_can_be_made() -> None:
    threads = Threads()
    threads.error = MemoryError()
    pool = make_pool(start_thread=threads.start)
    with (
        Workqueue("plain", pool=pool) as plain,
        Workqueue("reclaim", mem_reclaim=True, pool=pool) as reclaim,
    ):
        stuck, saved = Work(lambda work: None), Work(lambda work: None)
        plain.queue_work(stuck)
        reclaim.queue_work(saved)
        saved.flush()
        assert stuck.pending
        threads.fails = False
        stuck.flush()
        assert plain.stats().nr_rescued == 0
    pool.close()


def test_the_rescuer_runs_everything_when_making_a_thread_hangs() -> None:
    released = threading.Event()

    def hang(thread: threading.Thread) -> None:
        assert released.wait(TIMEOUT_S)
        thread.start()

    pool = make_pool(start_thread=hang)
    with Workqueue("reclaim", mem_reclaim=True, pool=pool) as wq:
        for _ in range(40):
            wq.queue_work(Work(lambda work: None))
        wq.flush()
        assert wq.stats().nr_rescued == 40
        released.set()
    pool.close()


def test_the_rescuer_is_called_again_for_what_is_queued_later() -> None:
    threads = Threads()
    pool = make_pool(start_thread=threads.start)
    with Workqueue("reclaim", 1, mem_reclaim=True, pool=pool) as wq:
        for _ in range(5):
            work = Work(lambda work: None)
            wq.queue_work(work)
            work.flush()
        assert wq.stats().nr_rescued == 5
        assert wq.stats().nr_maydays >= 2
    pool.close()


def test_workers_take_over_when_threads_can_be_made_again(gate: Gate) -> None:
    threads = Threads()
    pool = make_pool(start_thread=threads.start)
    with Workqueue("reclaim", mem_reclaim=True, pool=pool) as wq:
        first, *rest = gate.works(6)
        wq.queue_work(first)
        gate.wait_inside(1)
        threads.fails = False
        for work in rest:
            wq.queue_work(work)
        gate.wait_inside(6)
        assert wq.stats().nr_rescued == 1
        gate.open()
    pool.close()


def test_an_item_that_its_rescuer_runs_never_runs_twice_at_once(gate: Gate) -> None:
    threads = Threads()
    pool = make_pool(start_thread=threads.start)
    with Workqueue("reclaim", mem_reclaim=True, pool=pool) as wq:
        (work,) = gate.works(1)
        other = Work(lambda work: None)
        wq.queue_work(work)
        gate.wait_inside(1)
        threads.fails = False
        wq.queue_work(work)
        wq.queue_work(other)
        other.flush()
        assert (gate.nr_inside, gate.nr_done) == (1, 0)
        gate.open()
        work.flush()
        assert gate.nr_done == 2
    pool.close()


# ---- counters ----


def test_counters_say_what_ran_what_runs_and_what_waits(gate: Gate) -> None:
    with Workqueue("counters", 2) as wq:
        for work in gate.works(5):
            wq.queue_work(work)
        gate.wait_inside(2)
        stats = wq.stats()
        assert (stats.nr_started, stats.nr_completed, stats.nr_inflight) == (2, 0, 2)
        assert (stats.nr_active, stats.nr_inactive) == (2, 3)
        gate.open()
        wq.flush()
        stats = wq.stats()
        assert (stats.nr_started, stats.nr_completed, stats.nr_inflight) == (5, 5, 0)
        assert stats.nr_maydays == stats.nr_rescued == 0


def burn_cpu(work: Work) -> None:
    end = time.thread_time() + 0.04
    while time.thread_time() < end:
        pass


def test_cpu_time_and_hogs_are_charged_to_the_workqueue_that_burns_cpu() -> None:
    pool = make_pool()
    with (
        Workqueue("cheap", pool=pool) as cheap,
        Workqueue("burns", pool=pool) as burns,
        Workqueue("sleeps", pool=pool) as sleeps,
    ):
        # One after the other, so that one worker runs them all.
        for wq, function in (
            (cheap, lambda work: None),
            (burns, burn_cpu),
            (sleeps, lambda work: threading.Event().wait(0.04)),
        ):
            wq.queue_work(Work(function))
            wq.flush()
        assert [wq.stats().nr_cpu_hogs for wq in (cheap, burns, sleeps)] == [0, 1, 0]
        assert burns.stats().cpu_time_ns >= 40_000_000
        assert cheap.stats().cpu_time_ns < 40_000_000
        assert sleeps.stats().cpu_time_ns < 40_000_000
    pool.close()


# ---- native items that need Python ----


def test_a_native_item_reaches_its_handler_once_each_time_it_was_queued(wq: Workqueue) -> None:
    seen: list[bool] = []
    item = ffi.new("struct ul_work **")
    cookie = register_handler(lambda work: seen.append(work == item[0]))
    assert lib.ul_work_create(cookie, item) == 0
    for _ in range(3):
        assert lib.ul_work_queue_delayed(wq.handle, item[0], 0, False) == 1
        wq.flush()
    assert seen == [True] * 3
    unregister_handler(cookie)
    unregister_handler(cookie)
    assert lib.ul_work_queue_delayed(wq.handle, item[0], 0, False) == 1
    wq.flush()
    assert seen == [True] * 3
    lib.ul_work_destroy(item[0])


def test_a_handler_that_fails_does_not_end_the_worker(wq: Workqueue) -> None:
    def fail(work: object) -> None:
        raise RuntimeError("of a handler")

    cookie = register_handler(fail)
    item = ffi.new("struct ul_work **")
    assert lib.ul_work_create(cookie, item) == 0
    for _ in range(2):
        lib.ul_work_queue_delayed(wq.handle, item[0], 0, False)
        wq.flush()
    assert wq.stats().nr_completed == 2
    unregister_handler(cookie)
    lib.ul_work_destroy(item[0])


# ---- processes ----


def test_the_interpreter_exits_when_nothing_was_closed() -> None:
    done = run_python(
        """
        import threading
        from ublk_loop.workqueue import *
        wq = alloc_workqueue("left", WQ.UNBOUND | WQ.MEM_RECLAIM | WQ.HIGHPRI, 2)
        started = threading.Event()
        for _ in range(4):
            wq.queue_work(Work(lambda work: (started.set(), threading.Event().wait())))
        wq.queue_delayed_work(DelayedWork(print), 1000)
        started.wait()
        print("end")
        """
    )
    assert (done.returncode, done.stdout) == (0, "end\n"), done.stderr


def test_import_makes_no_thread() -> None:
    done = run_python(
        """
        import os, ublk_loop.workqueue
        print(len(os.listdir("/proc/self/task")))
        """
    )
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


def test_a_forked_child_starts_without_workqueues_and_can_make_its_own() -> None:
    done = run_python(
        """
        import os, warnings
        warnings.simplefilter("ignore", DeprecationWarning)
        from ublk_loop.workqueue import *
        parents = alloc_workqueue("parents", WQ.UNBOUND)
        parents.queue_work(Work(lambda work: None))
        parents.flush()
        pid = os.fork()
        if not pid:
            try:
                parents.queue_work(Work(print))
            except ValueError:
                parents.close()
                ran = []
                with alloc_workqueue("childs", WQ.UNBOUND | WQ.MEM_RECLAIM) as childs:
                    childs.queue_work(Work(ran.append))
                os._exit(42 if len(ran) == 1 else 1)
            os._exit(2)
        status = os.waitpid(pid, 0)[1]
        ran = []
        with parents:
            parents.queue_work(Work(ran.append))
        print(os.waitstatus_to_exitcode(status), len(ran))
        """
    )
    assert (done.returncode, done.stdout) == (0, "42 1\n"), done.stderr
