"""The ``ublk`` command that was installed with the package."""

from __future__ import annotations

import sysconfig
from pathlib import Path

UBLK = str(Path(sysconfig.get_path("scripts")) / "ublk")
