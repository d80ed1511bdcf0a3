"""``ublk daemon``: run it (daemon.py), ask how it is, or end it."""

from __future__ import annotations

import errno
import json
import os
from typing import Any

import click

from . import boot, protocol
from .cli_base import ask
from .errors import DaemonError


@click.command(short_help="Keep devices served; answer ublk add.")
@click.option("--detach", is_flag=True, help="Run in the background; return when it listens.")
@click.option("--status", "command", flag_value="status", help="Show the daemon, if one runs.")
@click.option("--stop", "command", flag_value="stop", help="End it; its devices are served on.")
@click.option(
    "--config",
    type=click.Path(),
    default=boot.CONFIG_PATH,
    show_default=True,
    metavar="FILE",
    help="The devices to add first.",
)
@click.option("--json", "as_json", is_flag=True, help="With --status: as JSON.")
@click.option("--reloaded", is_flag=True, hidden=True)
def daemon(detach: bool, command: str | None, config: str, as_json: bool, reloaded: bool) -> None:
    """Start servers for ublk add, and replace those that die.

    ublk add starts it when none runs. Ending or killing it touches no device.

    \b
    Examples:
      ublk daemon --detach
      ublk daemon --status
      ublk daemon --stop
    """
    if command is None:
        from . import daemon as daemon_module

        if detach and _is_said("config"):
            _check_config(config)
        daemon_module.main(os.path.abspath(config), detach=detach, reloaded=reloaded)
        return
    reply = ask(protocol.Stop() if command == "stop" else protocol.Status())
    if reply is None:
        raise DaemonError(errno.ESRCH, "daemon", "none runs: ublk daemon --detach starts one")
    if command == "status":
        assert reply.document is not None
        text = json.dumps(reply.document, indent=2) if as_json else _status_text(reply.document)
        click.echo(text)


def _is_said(name: str) -> bool:
    source = click.get_current_context().get_parameter_source(name)
    return source is click.core.ParameterSource.COMMANDLINE


def _check_config(path: str) -> None:
    # The daemon says in its log only what is wrong with it, and serves what it served before.
    if not os.path.exists(path):
        raise DaemonError(errno.ENOENT, path)
    boot.read(path)


def _status_text(document: dict[str, Any]) -> str:
    lines = [f"daemon pid {document['pid']}: {len(document['devices'])} devices"]
    for device in document["devices"]:
        lines.append(
            f"dev id {device['dev_id']}: {device['phase']} daemon pid {device['server_pid'] or '-'}"
            f" recoveries {device['nr_recoveries']}"
        )
    lines += [f"dev id {dev_id}: not of this daemon" for dev_id in document["orphans"]]
    return "\n".join(lines)
