"""What every test may use: polling with a deadline, a deadline a test, and no skips in CI.

A test that outlives its deadline ends the whole run with the stacks of all threads: a thread that
sits in the kernel cannot be ended otherwise. ``@pytest.mark.deadline(seconds)`` sets another one.
With ``UBLK_LOOP_NO_SKIP=1`` a skip is a failure, but for "this driver ... (6.16)" before Linux
6.16: the driver of that kernel cannot do what is tested.
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest

DEADLINE_S = 120
POLL_S = 0.01

_stderr_fd = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "deadline(seconds): when the run is given up as hung")
    # No timed assertions: an example takes as long as a shared machine lets it.
    hypothesis.settings.register_profile("untimed", deadline=None)
    hypothesis.settings.load_profile("untimed")
    # A shell's background job comes with SIGINT ignored; the tests are about a person's Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Before a test's output is captured: where the stacks of a hang go.
    config.stash[_stderr_fd] = os.dup(2)


def pytest_unconfigure(config: pytest.Config) -> None:
    os.close(config.stash[_stderr_fd])


def _skips_are_failures() -> bool:
    return os.environ.get("UBLK_LOOP_NO_SKIP") == "1"


def _kernel_is_too_old(reason: object) -> bool:
    # By the version since which the driver has it, so that nothing is skipped on a newer one.
    since = re.search(r"this driver.* \((\d+)\.(\d+)\)$", str(reason))
    ours = re.match(r"(\d+)\.(\d+)", os.uname().release)
    assert ours is not None
    return since is not None and [*map(int, ours.groups())] < [*map(int, since.groups())]


def _forbid_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and _skips_are_failures() and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        if _kernel_is_too_old(reason):
            return
        report.outcome = "failed"
        report.longrepr = f"skipped under UBLK_LOOP_NO_SKIP=1: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[Any]:
    report = yield
    _forbid_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[Any]:
    report = yield
    _forbid_skip(report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[Any]:
    marker = item.get_closest_marker("deadline")
    seconds = marker.args[0] if marker else DEADLINE_S
    if not item.config.getoption("usepdb"):
        stderr_fd = item.config.stash[_stderr_fd]
        faulthandler.dump_traceback_later(seconds, exit=True, file=stderr_fd)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., None]:
    """Poll: ``wait_until(predicate, timeout_s=5)`` fails the test if it never holds."""

    def wait(predicate: Callable[[], object], timeout_s: float = 5) -> None:
        deadline = time.monotonic() + timeout_s
        while not predicate():
            if time.monotonic() >= deadline:
                pytest.fail(f"did not become true within {timeout_s} s", pytrace=True)
            time.sleep(POLL_S)

    return wait
