"""``ublk del`` and ``ublk stop``: stop and delete devices, or say who uses them.

The deleting itself is :mod:`manage`'s, the waiting for a last close :mod:`lazy`'s.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

import click
from click.core import ParameterSource

from .cli_base import check_n_or_a, exit_if_failed, number_option
from .errors import BusyError, UblkLoopError

NR_AT_ONCE = 8


@click.command("del", short_help="Stop and delete a device.")
@number_option(required=False)
@click.option("-a", "--all", "everything", is_flag=True, help="Delete every device.")
@click.option("--async", "no_wait", is_flag=True, help="Do not wait until the device is gone.")
@click.option(
    "--force",
    is_flag=True,
    envvar="UBLK_LOOP_DEL_FORCE",
    help="Also a device that is in use: what is not written back is lost.",
)
@click.option("--lazy", is_flag=True, help="One that is in use: as soon as it is not.")
@click.option("--json", "as_json", is_flag=True, help="What was done, and who uses what was not.")
def delete(
    dev_id: int | None, everything: bool, no_wait: bool, force: bool, lazy: bool, as_json: bool
) -> None:
    """Stop a device and delete it, unless it is in use; say then who uses it.

    \b
    Examples:
      ublk del -n 0
      ublk del -n 0 --lazy
      ublk del -a --force
    """
    check_n_or_a(dev_id, everything)
    if lazy and force and _came_from_command_line("force"):
        raise click.UsageError("--lazy and --force exclude each other")
    from .control import list_dev_ids

    dev_ids = list_dev_ids() if dev_id is None else [dev_id]
    done = _delete(dev_ids, no_wait=no_wait, force=force, lazy=lazy)
    if as_json:
        click.echo(json.dumps(done, indent=2))
    exit_if_failed(done)


@click.command(short_help="Stop a device; its number stays.")
@number_option(required=True)
@click.option("--safe", is_flag=True, help="Not one that is in use; the default.")
@click.option(
    "--force", is_flag=True, help="Also one that is in use: what is not written back is lost."
)
def stop(dev_id: int, safe: bool, force: bool) -> None:
    """Stop a device, unless it is in use. It is DEAD then, until ublk del.

    \b
    Example:
      ublk stop -n 0
    """
    if safe and force:
        raise click.UsageError("--safe and --force exclude each other")
    from . import manage

    try:
        for note in manage.stop(dev_id, force=force):
            click.echo(f"ublk: {note}", err=True)
    except BusyError as error:
        _show_busy(error)
        sys.exit(1)


def _show_busy(error: BusyError) -> None:
    click.echo("\n\t".join([f"ublk: {error}", *map(str, error.holders)]), err=True)


def _delete(dev_ids: list[int], *, lazy: bool, **how: bool) -> list[dict[str, Any]]:
    # Most of a deletion the driver waits, for RCU above all. Waiters are forked: no threads then.
    if lazy or len(dev_ids) < 2:
        return [delete_one(each, lazy=lazy, **how) for each in dev_ids]
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(NR_AT_ONCE) as threads:
        return list(threads.map(lambda each: delete_one(each, lazy=False, **how), dev_ids))


def _came_from_command_line(name: str) -> bool:
    source = click.get_current_context().get_parameter_source(name)
    return source is ParameterSource.COMMANDLINE


def delete_one(dev_id: int, *, no_wait: bool, force: bool, lazy: bool) -> dict[str, Any]:
    """Delete a device, say what there is to say, and return what became of it."""
    from . import lazy as lazily
    from . import manage

    done: dict[str, Any] = {"dev_id": dev_id, "deleted": False, "error": None, "holders": []}
    try:
        for note in manage.delete(dev_id, no_wait=no_wait, force=force and not lazy):
            click.echo(f"ublk: {note}", err=True)
        done["deleted"] = True
    except BusyError as error:
        done["holders"] = [asdict(holder) for holder in error.holders]
        if lazy:
            pid = lazily.start_waiter(dev_id)
            who = f"process {pid} waits for that" if pid else "a process waits for that already"
            click.echo(f"ublk: dev {dev_id} is deleted once nobody uses it; {who}", err=True)
            return done
        done["error"] = str(error)
        _show_busy(error)
    except UblkLoopError as error:
        done["error"] = str(error)
        click.echo(f"ublk: {error}", err=True)
    return done
