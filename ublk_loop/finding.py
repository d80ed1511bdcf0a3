"""What ``ublk doctor`` says: findings, and the machine that they are made from.

Findings are plain values. A Host is where the checks look; tests give it a folder of their own for
a root. Nothing here looks at anything by itself, or prints.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROBLEM, WARNING, NOTE = "problem", "warning", "note"
SEVERITIES = (PROBLEM, WARNING, NOTE)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong (problem), unwise (warning) or good to know (note).

    :param topic: what it is about, one word.
    :param fix: what to do, a command where there is one.
    :param repair: does it, where that can harm nothing; None: it is for a person to decide.
    """

    severity: str
    topic: str
    text: str
    fix: str
    repair: Callable[[], None] | None = field(default=None, compare=False, repr=False)

    def document(self) -> dict[str, Any]:
        """Return what ``--json`` prints of it."""
        return {
            "severity": self.severity,
            "topic": self.topic,
            "text": self.text,
            "fix": self.fix,
            "can_fix": self.repair is not None,
        }


@dataclass(frozen=True)
class Host:
    """The machine, below ``root``."""

    root: Path = Path("/")
    release: str = field(default_factory=lambda: os.uname().release)
    is_root: bool = field(default_factory=lambda: os.geteuid() == 0)

    def path(self, name: str) -> Path:
        """Return ``/name`` of the machine."""
        return self.root / name.lstrip("/")

    def text(self, name: str) -> str:
        """Return a file's text without the last newline; empty if it cannot be read."""
        try:
            return self.path(name).read_text(errors="replace").rstrip("\n")
        except OSError:
            return ""

    def link(self, name: str) -> str:
        """Return where a symbolic link points; empty if it cannot be read."""
        try:
            return os.readlink(self.path(name))
        except OSError:
            return ""

    def names(self, folder: str) -> list[str]:
        """Return what is in a folder; nothing if it cannot be read."""
        try:
            return sorted(os.listdir(self.path(folder)))
        except OSError:
            return []

    def status(self, pid: int | str, name: str) -> str:
        """Return a field of /proc/PID/status."""
        for line in self.text(f"proc/{pid}/status").splitlines():
            key, _, value = line.partition(":")
            if key == name:
                return value.strip()
        return ""


__all__ = ["NOTE", "PROBLEM", "SEVERITIES", "WARNING", "Finding", "Host"]
