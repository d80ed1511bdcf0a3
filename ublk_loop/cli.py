"""The ``ublk`` command: a drop-in for the reference server's.

In: the command line. Out: text or JSON on stdout, one line an error on stderr; exit 1 for an error,
2 for wrong usage. Runs in a process of its own; ``add`` and ``recover`` fork the server from it. It
never serves a request, and imports what needs the compiled module only where a command needs it.
The small commands are here; the others are in ``cli_*``.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from . import listing, state
from .cli_add import TYPE_HELP, add, parse_size
from .cli_base import Integer, cli, number_option
from .cli_daemon import daemon
from .cli_del import delete, stop
from .cli_list import list_devices
from .cli_losetup import losetup
from .cli_params import set_params
from .cli_recover import quiesce, recover, upgrade
from .finding import PROBLEM
from .protocol import Reply


@click.command(short_help="Show what the driver offers.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def features(as_json: bool) -> None:
    """Show the driver's features.

    \b
    Example:
      ublk features --json
    """
    from .control import Control

    with Control() as control:
        bits = control.get_features()
    if as_json:
        click.echo(json.dumps(listing.features_document(bits), indent=2))
    else:
        click.echo(listing.features_text(bits))


@click.command(short_help="Look for what is wrong, and say how to mend it.")
@click.option("--fix", is_flag=True, help="Repair what can be repaired without harm.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def doctor(fix: bool, as_json: bool) -> None:
    """Look at driver, machine, devices and servers; exit with 1 if there is a problem.

    \b
    Examples:
      ublk doctor
      ublk doctor --fix
    """
    from . import doctor as doctors

    findings = doctors.examine()
    if fix:
        for finding, failure in doctors.repair(findings):
            done = f"could not fix ({failure})" if failure else "fixed"
            click.echo(f"ublk: {done}: {finding.topic}: {finding.text}", err=True)
        findings = doctors.examine()
    if as_json:
        click.echo(json.dumps([finding.document() for finding in findings], indent=2))
    else:
        click.echo(doctors.text(findings))
    if any(finding.severity == PROBLEM for finding in findings):
        sys.exit(1)


def parse_cpus(_: click.Context, __: click.Parameter, text: str) -> frozenset[int]:
    """Return the CPUs of ``[0,2]``, as the reference server takes them, or of ``0-2,5``.

    :raises click.BadParameter: it is neither.
    """
    inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    cpus: set[int] = set()
    for part in inner.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})(?:-(\d{1,5}))?\s*", part)
        if match is None:
            raise click.BadParameter(f"{text!r} is not a list of CPUs such as [0,2] or 0-3")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            raise click.BadParameter(f"{first}-{last} runs backwards")
        cpus.update(range(first, last + 1))
    return frozenset(cpus)


@click.command("set_affinity", short_help="Choose the CPUs of a queue's thread.")
@number_option(required=True)
@click.option("-q", "--queue", "q_id", type=Integer(0), required=True, metavar="QID")
@click.option(
    "--cpuset",
    "cpus",
    required=True,
    callback=parse_cpus,
    metavar="SET",
    help="CPUs, such as [0,2] or 0-3.",
)
def set_affinity(dev_id: int, q_id: int, cpus: frozenset[int]) -> None:
    """Choose the CPUs that a queue's thread runs on.

    \b
    Example:
      ublk set_affinity -n 0 -q 0 --cpuset "[0,1]"
    """
    from . import manage

    manage.set_affinity(dev_id, q_id, cpus)


@click.command(short_help="Change a device's size, in use or not.")
@number_option(required=True)
@click.option(
    "-s",
    "--size",
    "nr_bytes",
    callback=parse_size,
    metavar="SIZE",
    help="The new size; default: that of its file, up to what --size or --sizelimit said.",
)
@click.option("--force", is_flag=True, help="Make it smaller even if it is in use.")
@click.option("--json", "as_json", is_flag=True, help="Print the new size as JSON.")
def resize(dev_id: int, nr_bytes: int | None, force: bool, as_json: bool) -> None:
    """Give a device the size that its file has now, or another one; it may be in use.

    The file system on it is another matter: see resize2fs, xfs_growfs.

    \b
    Examples:
      truncate -s 2G disk.img && ublk resize -n 0
      ublk resize -n 0 --size 1G
    """
    from . import manage

    nr_bytes = manage.resize(dev_id, nr_bytes, force=force)
    document = {"dev_id": dev_id, "nr_bytes": nr_bytes}
    click.echo(json.dumps(document) if as_json else f"dev id {dev_id}: {nr_bytes} bytes")


@click.command(short_help="Show who owns an unprivileged device; for udev.")
@click.argument("name", metavar="DEVICE")
def owner(name: str) -> None:
    """Print the user's and the group's id of who added an unprivileged device; else fail.

    \b
    Example:
      ublk owner ublkc0
    """
    from .owner import owner_of

    click.echo("{} {}".format(*owner_of(name)))


@click.command("help", short_help="Show help, or that of one type.")
@click.option("-t", "--type", "kind", type=click.Choice(state.TARGET_TYPES))
@click.argument("name", metavar="[COMMAND]", default="")
@click.pass_context
def show_help(ctx: click.Context, kind: str | None, name: str) -> None:
    """Show help, or that of a command, or the options of one type of device.

    \b
    Examples:
      ublk help add
      ublk help -t loop
    """
    assert ctx.parent is not None
    if name:
        command = cli.get_command(ctx, name)
        if command is None:
            raise click.UsageError(f"no such command: {name!r}")
        with click.Context(command, parent=ctx.parent, info_name=name) as sub_context:
            click.echo(sub_context.get_help())
        return
    if kind is None:
        click.echo(ctx.parent.get_help())
        return
    with click.Context(add, info_name=f"ublk add -t {kind}") as sub_context:
        body = TYPE_HELP[kind].replace("\b\n", "")
        click.echo(f"{sub_context.get_usage()}\n\n{body}\n\nAll options: ublk add --help")


for _command in (
    *(add, delete, stop, list_devices, recover, quiesce, upgrade, daemon),
    *(features, doctor, set_affinity, set_params, resize, owner, show_help, losetup),
):
    cli.add_command(_command)


def run(words: Sequence[str]) -> Reply:
    """Do ``ublk WORDS`` in this process; return the exit code and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli(list(words), prog_name="ublk", obj=list(words[1:]))
            exit_code = 0
        except SystemExit as end:
            exit_code = end.code if isinstance(end.code, int) else 1
    return Reply(exit_code, out.getvalue(), err.getvalue())


def main() -> NoReturn:
    """Run the ``ublk`` command."""
    cli(prog_name="ublk", obj=sys.argv[2:])
    sys.exit(0)


if __name__ == "__main__":
    main()
