"""The workqueue against a model of it, step by step.

Every item stops inside its function until the test releases it, so that which items run is a matter
of the rules alone: after each step the items inside their functions must be the model's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ublk_loop._uring import ffi, lib
from ublk_loop.workqueue import DelayedWork, Work, Workqueue

TIMEOUT_S = 20
NR_ITEMS = 5
FAR_S = 100_000.0

ITEMS = st.integers(0, NR_ITEMS - 1)


class Model:
    """What the kernel's documentation promises, with as many workers as it takes."""

    def __init__(self, max_active: int) -> None:
        self.max_active = max_active
        self.delayed: dict[int, int] = {}
        self.inactive: list[tuple[int, int]] = []
        self.active: list[tuple[int, int]] = []
        self.running: dict[int, int] = {}
        self.nr_runs = dict.fromkeys(range(NR_ITEMS), 0)
        self.nr_disables = dict.fromkeys(range(NR_ITEMS), 0)
        self._nr_tokens = 0

    def is_pending(self, i: int) -> bool:
        return i in self.delayed or any(i == j for j, _ in self.inactive + self.active)

    def tokens(self) -> set[int]:
        """The queueings that a flush waits for."""
        return {token for _, token in self.inactive + self.active} | set(self.running.values())

    def queue(self, i: int, *, far: bool = False) -> bool:
        if self.is_pending(i) or self.nr_disables[i]:
            return False
        self._nr_tokens += 1
        if far:
            self.delayed[i] = self._nr_tokens
        else:
            self.inactive.append((i, self._nr_tokens))
            self.settle()
        return True

    def cancel(self, i: int) -> bool:
        was_pending = self.is_pending(i)
        self.delayed.pop(i, None)
        self.inactive = [entry for entry in self.inactive if entry[0] != i]
        self.active = [entry for entry in self.active if entry[0] != i]
        self.settle()
        return was_pending

    def end(self, i: int) -> None:
        del self.running[i]
        self.settle()

    def settle(self) -> None:
        while self.inactive and len(self.active) + len(self.running) < self.max_active:
            self.active.append(self.inactive.pop(0))
        for i, token in list(self.active):
            if i not in self.running:
                self.active.remove((i, token))
                self.running[i] = token
                self.nr_runs[i] += 1


class Stage:
    """Where items stop, and the test sees them."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.inside: list[int] = []
        self.released: set[int] = set()
        self.nr_runs = dict.fromkeys(range(NR_ITEMS), 0)
        self.before_end: dict[int, Callable[[], None]] = {}
        self.broken = ""

    def function(self, i: int) -> Callable[[Work], None]:
        def run(work: Work) -> None:
            with self.changed:
                if i in self.inside:
                    self.broken = f"item {i} runs twice at once"
                self.inside.append(i)
                self.nr_runs[i] += 1
                self.changed.notify_all()
                self.changed.wait_for(lambda: i in self.released)
                self.released.discard(i)
                before_end = self.before_end.pop(i, None)
            if before_end:
                before_end()
            with self.changed:
                self.inside.remove(i)
                self.changed.notify_all()

        return run

    def release(self, i: int) -> None:
        with self.changed:
            self.released.add(i)
            self.changed.notify_all()

    def agrees(self, model: Model) -> bool:
        return sorted(self.inside) == sorted(model.running) and self.nr_runs == model.nr_runs

    def wait(self, model: Model) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: self.agrees(model), TIMEOUT_S):
                pytest.fail(
                    f"inside {self.inside}, runs {self.nr_runs}; "
                    f"model: {model.running}, {model.nr_runs}"
                )
            assert not self.broken, self.broken


class Flush:
    """A flush on a thread of its own, and the queueings that it waits for."""

    def __init__(self, workqueue: Workqueue, tokens: set[int]) -> None:
        self.tokens = tokens
        ticket = ffi.new("uint64_t *")
        handle = workqueue.handle
        self.thread = threading.Thread(
            target=lambda: lib.ul_workqueue_flush_wait(handle, ticket), daemon=True
        )
        self.thread.start()
        # From here on, what is queued is queued after it.
        while not ticket[0]:
            time.sleep(0)


class WorkqueueMachine(RuleBasedStateMachine):
    @initialize(max_active=st.integers(1, 4), ordered=st.booleans())
    def open(self, max_active: int, ordered: bool) -> None:
        self.model = Model(1 if ordered else max_active)
        self.stage = Stage()
        self.workqueue = Workqueue("model", 0 if ordered else max_active, ordered=ordered)
        self.works = [DelayedWork(self.stage.function(i)) for i in range(NR_ITEMS)]
        self.flushes: list[Flush] = []

    @rule(i=ITEMS)
    def queue(self, i: int) -> None:
        assert self.workqueue.queue_work(self.works[i]) == self.model.queue(i)

    @rule(i=ITEMS)
    def queue_for_a_far_time(self, i: int) -> None:
        accepted = self.workqueue.queue_delayed_work(self.works[i], FAR_S)
        assert accepted == self.model.queue(i, far=True)

    @rule(i=ITEMS, far=st.booleans())
    def modify_time(self, i: int, far: bool) -> None:
        was_pending = self.workqueue.mod_delayed_work(self.works[i], FAR_S if far else 0)
        # A disabled item cannot be pending.
        assert was_pending == self.model.cancel(i)
        self.model.queue(i, far=far)

    @rule(i=ITEMS)
    def cancel(self, i: int) -> None:
        assert self.works[i].cancel() == self.model.cancel(i)

    @rule(i=ITEMS)
    def disable(self, i: int) -> None:
        assert self.works[i].disable() == self.model.cancel(i)
        self.model.nr_disables[i] += 1

    @rule(i=ITEMS)
    def enable(self, i: int) -> None:
        if not self.model.nr_disables[i]:
            with pytest.raises(ValueError):
                self.works[i].enable()
            return
        self.model.nr_disables[i] -= 1
        assert self.works[i].enable() == (not self.model.nr_disables[i])

    @precondition(lambda self: self.model.running)
    @rule(data=st.data(), queues_itself=st.booleans())
    def end(self, data: st.DataObject, queues_itself: bool) -> None:
        i = data.draw(st.sampled_from(sorted(self.model.running)))
        results = []
        if queues_itself:
            self.stage.before_end[i] = lambda: results.append(
                self.workqueue.queue_work(self.works[i])
            )
            accepted = self.model.queue(i)
        self.model.end(i)
        self.stage.release(i)
        self.stage.wait(self.model)
        assert not queues_itself or results == [accepted]

    @precondition(lambda self: not self.workqueue.is_ordered)
    @rule(max_active=st.integers(1, 4))
    def set_max_active(self, max_active: int) -> None:
        self.workqueue.max_active = max_active
        self.model.max_active = max_active
        self.model.settle()

    # As many as can begin at once.
    @precondition(lambda self: len(self.flushes) < 15)
    @rule()
    def flush(self) -> None:
        self.flushes.append(Flush(self.workqueue, self.model.tokens()))

    @rule(i=ITEMS)
    def ask(self, i: int) -> None:
        assert self.works[i].pending == self.model.is_pending(i)
        if i in self.model.running:
            assert self.works[i].running

    @invariant()
    def runs_what_the_model_runs(self) -> None:
        self.stage.wait(self.model)

    @invariant()
    def flushes_wait_for_what_was_before_them(self) -> None:
        left = self.model.tokens()
        for flush in list(self.flushes):
            flush.tokens &= left
            if flush.tokens:
                assert flush.thread.is_alive()
            else:
                flush.thread.join(TIMEOUT_S)
                assert not flush.thread.is_alive()
                self.flushes.remove(flush)

    def teardown(self) -> None:
        if not hasattr(self, "workqueue"):
            return
        for work in self.works:
            work.cancel()
        with self.stage.changed:
            self.stage.released = set(range(NR_ITEMS)) | self.stage.released
            self.stage.before_end.clear()
            self.stage.changed.notify_all()
        self.workqueue.drain()
        stats = self.workqueue.stats()
        assert stats.nr_completed == stats.nr_started == sum(self.stage.nr_runs.values())
        assert stats.nr_active == stats.nr_inactive == 0
        self.workqueue.close()


_keeps_the_pool: list[Workqueue] = []


def setup_module() -> None:
    _keeps_the_pool.append(Workqueue("keeps-the-pool"))


def teardown_module() -> None:
    _keeps_the_pool.pop().close()


TestWorkqueueModel = pytest.mark.deadline(300)(WorkqueueMachine.TestCase)
TestWorkqueueModel.settings = settings(max_examples=80, stateful_step_count=40, print_blob=True)
