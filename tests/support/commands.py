"""The ``ublk`` command that was installed with the package."""

from __future__ import annotations

import sysconfig
from pathlib import Path

UBLK = str(Path(sysconfig.get_path("scripts")) / "ublk")


def assert_names_the_help(text: str) -> None:
    """That ``text``, of wrong usage, is one line that ends with where the right one is."""
    assert text.count("\n") == 1
    assert text.startswith("ublk: ")
    assert text.endswith(" --help\n")
