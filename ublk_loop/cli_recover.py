"""``ublk recover`` and ``ublk upgrade``: another server for a device, which stays where it is.

By the daemon if there is one, else by a fork of this process (:mod:`serve` has what it runs).
"""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from . import client, listing, protocol, state
from .cli_add import SWITCH, spec_of
from .cli_base import ask, check_n_or_a, exit_if_failed, number_option, tried
from .errors import DaemonError
from .serve import die_in_recovery, serve_upgrade

if TYPE_CHECKING:
    from .control import DevInfo

_RELOAD_TIMEOUT_S = 60.0


@click.command(
    short_help="Serve again devices whose servers died.",
    context_settings={"ignore_unknown_options": True},
)
@number_option(required=False)
@click.option("-a", "--all", "everything", is_flag=True, help="Every device that waits for one.")
@click.option("--json", "as_json", is_flag=True, help="Print the device, or a list, as JSON.")
@click.option("--die_during_fetch", type=SWITCH, default="0", hidden=True)
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def recover(
    dev_id: int | None,
    everything: bool,
    as_json: bool,
    die_during_fetch: str,
    words: tuple[str, ...],
) -> None:
    """Serve again a device that was added with recovery and whose server died.

    With -a, devices that another program has left without a server are named, not touched. WORDS
    are those behind ublk add, as other servers want them said again: what the device is was kept,
    and they must agree with it.

    \b
    Examples:
      ublk recover -n 0
      ublk recover -a
    """
    check_n_or_a(dev_id, everything)
    if words:
        _check_words(dev_id, words)
    if die_during_fetch == "1":
        _die_in_recovery(dev_id)
    if dev_id is not None:
        click.echo(_recover_one(dev_id, as_json), nl=False)
        return
    from . import manage

    waiting, orphans = manage.waiting()
    done = [tried(each, partial(_recover_one, each, as_json)) for each in waiting]
    for each in orphans:
        hint = "its server is gone, but ublk_loop did not add it: recover it by what did"
        click.echo(f"ublk: dev {each}: {hint}, or ublk del -n {each}", err=True)
    if as_json:
        documents = [
            {**one, "done": json.loads(one["done"]) if one["done"] else None} for one in done
        ]
        click.echo(json.dumps({"recovered": documents, "orphans": orphans}, indent=2))
    else:
        click.echo("".join(one["done"] for one in done if one["done"]), nl=False)
    exit_if_failed(done)


def _check_words(dev_id: int | None, words: tuple[str, ...]) -> None:
    if dev_id is None:
        raise click.UsageError("-a takes no options of ublk add")
    said, known = spec_of(words), state.read(dev_id)
    if known is not None and _identity(said) != _identity(known.spec):
        raise DaemonError(errno.EINVAL, f"recover dev {dev_id}", f"it is {_identity(known.spec)}")


def _die_in_recovery(dev_id: int | None) -> None:
    from . import manage

    if dev_id is None or manage.recoverable(dev_id).spec.type != "null":
        raise click.UsageError("--die_during_fetch is for a null device")
    die_in_recovery(dev_id)


def _identity(spec: state.TargetSpec) -> str:
    return " ".join(word for word in (spec.type, spec.path, *spec.stripe_paths) if word)


def _recover_one(dev_id: int, as_json: bool) -> str:
    from . import launch, manage, server

    reply = ask(protocol.Recover(dev_id, as_json, client.two_lines()))
    if reply is not None:
        return reply.out
    request = server.Request.recovery(manage.recoverable(dev_id))
    describe = partial(listing.shown, as_json=as_json, two_lines=client.two_lines())
    text: str = launch.launch(request, describe)
    return text


@click.command(short_help="Have the server leave its device, which waits for ublk recover.")
@number_option(required=True)
@click.option(
    "--force",
    is_flag=True,
    envvar="UBLK_LOOP_DEL_FORCE",
    help="Though requests in flight fail, as the device was added with -b and -r, or with -e.",
)
def quiesce(dev_id: int, force: bool) -> None:
    """Have the server of a device end; requests wait until ublk recover.

    For a device that was added with -r or -i: the daemon would replace the server of another.

    \b
    Example:
      ublk quiesce -n 0
    """
    from . import handover

    if not handover.quiesce(dev_id, force=force):
        click.echo(f"ublk: the server of dev {dev_id} was killed: it did not leave", err=True)


@click.command(short_help="Replace servers by those of the installed version, without a stop.")
@number_option(required=False)
@click.option("-a", "--all", "everything", is_flag=True, help="Every device of ublk_loop.")
@click.option("--json", "as_json", is_flag=True, help="A JSON list of what was done.")
def upgrade(dev_id: int | None, everything: bool, as_json: bool) -> None:
    """Replace the server of a device, which may be in use, by one of what is installed now.

    Requests wait meanwhile and none fails. Prints for how long. The daemon is replaced too. -a
    skips, and names, devices that were added so that this cannot be done.

    \b
    Examples:
      ublk upgrade -n 0
      ublk upgrade -a
    """
    check_n_or_a(dev_id, everything)
    from . import manage

    by_daemon = _reload_daemon()
    if dev_id is None:
        done = [_upgrade_or_skip(info, by_daemon) for info in manage.served()]
    else:
        done = [tried(dev_id, partial(_upgrade_one, dev_id, by_daemon))]
    if as_json:
        click.echo(json.dumps(done, indent=2))
    else:
        for one in done:
            if one["done"]:
                click.echo(_upgrade_text(one["dev_id"], one["done"]))
    exit_if_failed(done)


def _upgrade_or_skip(info: DevInfo, by_daemon: bool) -> dict[str, Any]:
    from . import handover

    reason = handover.obstacle(info)
    if reason:
        click.echo(f"ublk: dev {info.dev_id} is skipped: {reason}", err=True)
        return {"dev_id": info.dev_id, "done": None, "error": None, "skipped": reason}
    return tried(info.dev_id, partial(_upgrade_one, info.dev_id, by_daemon))


def _upgrade_one(dev_id: int, by_daemon: bool) -> Any:
    from . import launch

    if by_daemon:
        reply = ask(protocol.Upgrade(dev_id))
        if reply is None:
            raise DaemonError(errno.ESRCH, f"upgrade dev {dev_id}", "the daemon went away")
        return reply.document
    return launch.launch_server(f"upgrade dev {dev_id}", serve_upgrade(dev_id), is_recovery=True)


def _upgrade_text(dev_id: int, done: dict[str, Any]) -> str:
    pids = f"daemon pid {done['old_server_pid']} -> {done['server_pid']}"
    killed = ", killed: it did not leave" if done["was_killed"] else ""
    return f"dev id {dev_id}: {pids}, pause {done['pause_ms']} ms{killed}"


def _load_a_daemon() -> None:
    try:
        from .daemon import preload

        preload()
    except ImportError as error:
        hint = f"what is installed cannot run, nothing was changed: {error}"
        raise DaemonError(errno.ENOEXEC, "upgrade", hint) from error


def _reload_daemon() -> bool:
    # True once a daemon runs what is installed now, which must load here first.
    if not client.is_wanted() or os.geteuid() != 0:
        return False
    _load_a_daemon()
    deadline = time.monotonic() + _RELOAD_TIMEOUT_S
    while True:
        reply = ask(protocol.Reload(sys.executable))
        if reply is None:
            return False
        if reply.document and reply.document["reloads"]:
            return True
        if time.monotonic() >= deadline:
            raise DaemonError(errno.EBUSY, "daemon", "a device is being added or recovered")
        time.sleep(0.1)
