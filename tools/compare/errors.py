"""The one exception of a comparison, and the way every command is run: with a deadline."""

from __future__ import annotations

import shlex
import subprocess

COMMAND_TIMEOUT_S = 60.0
_deadlines = True


def no_deadlines() -> None:
    """Give commands no deadline: for a guest that counts instructions, watched from outside.

    When such a guest waits for its host, its clock jumps to the next timer: a deadline is one.
    """
    global _deadlines
    _deadlines = False


class CompareError(Exception):
    """A comparison cannot go on; the text is the whole message for the user."""


def run(*command: str, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
    """Run a command and return its stdout.

    :raises CompareError: if it fails, does not exist, or does not end in time.
    """
    what = shlex.join(command)
    try:
        timeout = timeout_s if _deadlines else None
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise CompareError(f"{what}: not done after {timeout_s:g} s") from None
    except OSError as error:
        raise CompareError(f"{what}: {error.strerror}") from error
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip()
        raise CompareError(f"{what}: exit code {done.returncode}: {said}")
    return done.stdout
