"""The ``ublk`` command: the quick ways of ``ublk add`` and ``owner``, else the commands of cli.py.

``ublk add`` is what a program may call often. A running daemon has loaded everything; so the words
go to it before this process loads anything. ``ublk owner`` is called by udev for each node.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the ``ublk`` command."""
    if sys.argv[1:2] == ["add"]:
        from . import client

        exit_code = client.quick_add(sys.argv[2:])
        if exit_code is not None:
            sys.exit(exit_code)
    elif sys.argv[1:2] == ["owner"]:
        from . import owner

        exit_code = owner.quick_owner(sys.argv[2:])
        if exit_code is not None:
            sys.exit(exit_code)
    from .cli import main as cli_main

    cli_main()


if __name__ == "__main__":
    main()
