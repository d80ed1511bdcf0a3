"""``ublk list``: the devices of this machine, whoever serves them, as text or JSON (listing.py)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from . import client, listing, state
from .cli_base import number_option
from .errors import DaemonError, DriverError

if TYPE_CHECKING:
    from .control import Control, DevInfo
    from .params import Params
    from .state import DeviceState


@click.command("list", short_help="Show devices.")
@number_option(required=False)
@click.option("-a", "--all", "everything", is_flag=True, help="Every device; the default.")
@click.option("-v", "--verbose", is_flag=True, help="All that is known, as JSON.")
@click.option("--json", "as_json", is_flag=True, help="A JSON list of devices.")
def list_devices(dev_id: int | None, everything: bool, verbose: bool, as_json: bool) -> None:
    """Show one device, or all, whoever serves them.

    \b
    Examples:
      ublk list
      ublk list -n 0 -v
      ublk list --json
    """
    if everything and dev_id is not None:
        raise click.UsageError("-n and -a exclude each other")
    documents = []
    for info, params, known in known_devices(dev_id):
        if as_json:
            documents.append(listing.device_document(info, params, known))
        elif verbose:
            click.echo(listing.verbose_text(info, params, known))
        else:
            click.echo(listing.device_text(info, params, known, two_lines=client.two_lines()))
    if as_json:
        click.echo(json.dumps(documents, indent=2))


def known_devices(dev_id: int | None) -> list[tuple[DevInfo, Params, DeviceState | None]]:
    """Return one device, or all that may be seen, as far as they are known."""
    from .control import Control, list_dev_ids

    with Control() as control:
        if dev_id is not None:
            return [_known_device(control, dev_id)]
        found = []
        for each in list_dev_ids():
            try:
                found.append(_known_device(control, each))
            except DriverError:
                # Deleted since, or another user's.
                continue
        return found


def _known_device(control: Control, dev_id: int) -> tuple[DevInfo, Params, DeviceState | None]:
    info = control.get_dev_info(dev_id)
    params = control.get_params(dev_id)
    try:
        known = listing.state_of(info, state.read(dev_id))
    except DaemonError as error:
        click.echo(f"ublk: {error}", err=True)
        known = None
    return info, params, known
