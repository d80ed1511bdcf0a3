"""``python -m ublk_loop``: the ``ublk`` command where its script is not on the PATH."""

from __future__ import annotations

from .cli import main

if __name__ == "__main__":
    main()
