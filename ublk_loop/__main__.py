"""The ``ublk`` command in Python: the quick way of ``owner``, else the commands of cli.py.

Installed as ``ublk-command``, which ``ublk`` (csrc/client.c) executes where the daemon does not do
what it is asked for. ``ublk owner`` is called by udev for each node.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the ``ublk`` command."""
    if sys.argv[1:2] == ["owner"]:
        from . import owner

        exit_code = owner.quick_owner(sys.argv[2:])
        if exit_code is not None:
            sys.exit(exit_code)
    from .cli import main as cli_main

    cli_main()


if __name__ == "__main__":
    main()
