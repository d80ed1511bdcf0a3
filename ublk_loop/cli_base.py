"""What every command of ``ublk`` shares: the group, its errors, and how it asks the daemon.

In: what a command raises. Out: one line an error on stderr; exit 1 for an error, 2 for wrong usage.
Each ``cli_*`` module has one command, or two that are alike; cli.py puts them together.
"""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import click

from . import __version__, client, protocol, state
from .errors import DaemonError, UblkLoopError, one_line

_AnyCommand = TypeVar("_AnyCommand", bound=Callable[..., Any])

CONTEXT: dict[str, Any] = {
    # --user_recovery is how the reference server spells it; --user-recovery does as well.
    "token_normalize_func": lambda token: token.replace("-", "_"),
    "help_option_names": ["-h", "--help"],
    "max_content_width": 100,
}


class Integer(click.IntRange):
    """A whole number within bounds; of ``1M`` it says "not a valid integer"."""

    name = "integer"


_DEV_ID = Integer(0, state.MAX_DEV_ID)


def number_option(*, required: bool) -> Callable[[_AnyCommand], _AnyCommand]:
    """Return the ``-n`` option of the commands that name a device."""
    return click.option(
        "-n", "--number", "dev_id", type=_DEV_ID, required=required, metavar="DEV_ID"
    )


_OTHER_NAMES = {"update_size": "resize"}  # what the kernel's own test server calls it


class _Commands(click.Group):
    """The commands; turns what they raise into one line and an exit code."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, _OTHER_NAMES.get(cmd_name, cmd_name))

    def make_context(self, info_name: str | None, args: list[str], *more: Any, **extra: Any) -> Any:
        is_bare = not args
        try:
            return super().make_context(info_name, args, *more, **extra)
        except click.UsageError as error:
            if is_bare:
                raise  # the help
            fail(usage_text(error), exit_code=2)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UblkLoopError as error:
            fail(str(error))
        except (click.UsageError, ValueError) as error:
            usage = error if isinstance(error, click.UsageError) else click.UsageError(str(error))
            fail(usage_text(usage, f"ublk {ctx.invoked_subcommand}"), exit_code=2)


def fail(text: str, *, exit_code: int = 1) -> NoReturn:
    """Print one error line and exit with 1, or with ``exit_code``."""
    click.echo(f"ublk: {text}", err=True)
    sys.exit(exit_code)


def usage_text(error: click.UsageError, command: str = "ublk") -> str:
    """Return what is wrong with a command line and where to read what is right, in one line.

    :param command: the command that ``error`` is of, if it does not say so itself.
    """
    text = " ".join(error.format_message().split()).removesuffix(".")
    return f"{text}: see {error.ctx.command_path if error.ctx else command} --help"


@click.group(cls=_Commands, context_settings=CONTEXT)
@click.version_option(__version__, "-v", "-V", "--version", message="ublk-loop %(version)s")
def cli() -> None:
    """Serve files as block devices through the kernel's ublk driver.

    \b
    Examples:
      ublk add -t loop -f disk.img     serve disk.img as /dev/ublkb0, say
      ublk list                        show the devices
      ublk del -n 0                    stop and delete /dev/ublkb0
      ublk help -t loop                show the options of one type
    """


def check_n_or_a(dev_id: int | None, everything: bool) -> None:
    if everything == (dev_id is not None):
        raise click.UsageError("say -n DEV_ID, or -a for every device")


def tried(dev_id: int, function: Callable[[], Any]) -> dict[str, Any]:
    """Return what ``function`` returned, or its error, which is printed, as a document."""
    try:
        return {"dev_id": dev_id, "done": function(), "error": None}
    except UblkLoopError as error:
        click.echo(f"ublk: {error}", err=True)
        return {"dev_id": dev_id, "done": None, "error": str(error)}


def warn(text: str) -> None:
    """Print a line that is no error."""
    click.echo(f"ublk: warning: {one_line(text)}", err=True)


def exit_if_failed(done: list[dict[str, Any]]) -> None:
    """End with 1 if one of what was done to devices has an error."""
    if any(one["error"] for one in done):
        sys.exit(1)


def ask(request: protocol.Request) -> protocol.Reply | None:
    """Return a running daemon's reply; None without one, or where it sees other files than we do.

    :raises Refused: with its error line.
    """
    if not client.is_wanted():
        return None
    try:
        answer = client.ask(protocol.document(request))
    except OSError as error:
        raise DaemonError(error.errno or errno.EIO, "daemon", str(error)) from error
    if answer is None:
        return None
    reply = protocol.parse_reply(json.dumps(answer).encode())
    if reply.exit_code == protocol.EXIT_DO_IT_YOURSELF:
        return None
    if reply.exit_code:
        raise protocol.Refused(reply.err)
    return reply
