"""A userspace loop device on the kernel's ublk driver.

The public classes are imported on first use: most ``ublk`` commands do without them, and without
the compiled module.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing's own is true for mypy as well; this one need not be imported
if TYPE_CHECKING:
    from typing import Any

    from .control import Control
    from .device import Device
    from .target import LoopTarget, NullTarget, RamTarget, StripeTarget, Target

__version__ = "0.1.0"

_MODULES = {
    "Control": "control",
    "Device": "device",
    "LoopTarget": "target",
    "NullTarget": "target",
    "RamTarget": "target",
    "StripeTarget": "target",
    "Target": "target",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


__all__ = [
    "Control",
    "Device",
    "LoopTarget",
    "NullTarget",
    "RamTarget",
    "StripeTarget",
    "Target",
    "__version__",
]
