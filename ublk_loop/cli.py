"""The ``ublk`` command: a drop-in for the reference server's, and the only place that prints.

In: the command line. Out: text or JSON on stdout, one line an error on stderr; exit 1 for an error,
2 for wrong usage. Runs in a process of its own; ``add`` and ``recover`` fork the server from it. It
never serves a request, and imports what needs the compiled module only where a command needs it.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click
from click.core import ParameterSource

from . import __version__, boot, client, listing, protocol, state, uapi
from .errors import BusyError, DaemonError, DriverError, UblkLoopError
from .finding import PROBLEM
from .state import DeviceOptions, DeviceState, TargetSpec

if TYPE_CHECKING:
    from .control import Control, DevInfo
    from .params import Params
    from .server import OnAdded, OnLive, Request, Serve

_AnyCommand = TypeVar("_AnyCommand", bound=Callable[..., Any])

NULL_NR_BYTES = 250 << 30  # as the reference server's null device
PAGE_BYTES = 4096
DEADLINE_S = 60
RELOAD_TIMEOUT_S = 60.0
SIZE_SUFFIXES = "KMGTPE"
CONTEXT: dict[str, Any] = {
    # --user_recovery is how the reference server spells it; --user-recovery does as well.
    "token_normalize_func": lambda token: token.replace("-", "_"),
    "help_option_names": ["-h", "--help"],
    "max_content_width": 100,
}
_TYPE_HELP = {
    "loop": """Serves a regular file or a block device.

\b
  -f, --file FILE      the backing file; it is locked while it is served
  --buffered_io        through the page cache; the default for a regular file
  --direct_io          past the page cache (O_DIRECT); the default for a block device
  -o, --offset SECTORS where the device begins in the file, in sectors of 512 bytes
  --size SIZE          the device's size; default: to the end of the file
  --sizelimit SIZE     at most so much of the file
  --sector_size BYTES  the logical block size; default: the smallest that the file takes
  -R, --read_only      a read-only device

\b
Examples:
  ublk add -t loop -f disk.img
  ublk add -t loop -f /dev/vdb -q 2 -d 64
  ublk add -t loop -f disk.img -o 2048 --size 100M -r 1""",
    "null": """Completes every request at once and stores nothing: for measuring.

\b
  --size SIZE          the device's size; default: 250G

\b
Example:
  ublk add -t null -q 2""",
    "ram": """Keeps the data in the server's memory: an example of a target written in Python.

\b
  --size SIZE          the device's size; needed

\b
Example:
  ublk add -t ram --size 64M""",
}


class PollTime(click.ParamType[int | None]):
    """``auto`` (None) or a number of microseconds."""

    name = "poll time"

    def convert(self, value: Any, param: Any, ctx: Any) -> int | None:
        if value == "auto":
            return None
        return click.IntRange(0, state.MAX_POLL_US).convert(value, param, ctx)


_RAM_IS_LOST = "a ram device cannot be recovered: its data dies with its server"
_SWITCH = click.Choice(["0", "1"])
_BY_HAND = ("user_recovery", "user_recovery_reissue", "user_recovery_fail_io")
_RECOVERIES = {
    "none": 0,
    "reissue": uapi.UBLK_F_USER_RECOVERY | uapi.UBLK_F_USER_RECOVERY_REISSUE,
    "fail_inflight": uapi.UBLK_F_USER_RECOVERY,
    "fail_all": uapi.UBLK_F_USER_RECOVERY | uapi.UBLK_F_USER_RECOVERY_FAIL_IO,
}
_DEV_ID = click.IntRange(0, state.MAX_DEV_ID)


def parse_size(_: click.Context, __: click.Parameter, text: str | None) -> int | None:
    """Return bytes, of a number with an optional suffix as losetup takes it: 4096, 4K, 10MiB, 1GB.

    :raises click.BadParameter: it is none, or not a positive multiple of 512 below 8 EiB.
    """
    if text is None:
        return None
    nr_bytes = parse_bytes(text)
    if nr_bytes == 0 or nr_bytes % uapi.SECTOR_BYTES or nr_bytes >= 1 << 63:
        raise click.BadParameter(f"{text!r} is not a positive multiple of 512 bytes below 8E")
    return nr_bytes


def parse_bytes(text: str) -> int:
    """Return bytes, as :func:`parse_size` does, of any size. :raises click.BadParameter: none."""
    match = re.fullmatch(rf"(\d+)(?:([{SIZE_SUFFIXES}])(iB|B)?)?", text, re.IGNORECASE)
    if match is None:
        raise click.BadParameter(f"{text!r} is not a size, such as 4096, 64M or 1GiB")
    number, suffix, ending = match.groups()
    base = 1000 if ending and ending.upper() == "B" else 1024
    power = 1 + SIZE_SUFFIXES.index(suffix.upper()) if suffix else 0
    return int(number) * int(base**power)


def number_option(*, required: bool) -> Callable[[_AnyCommand], _AnyCommand]:
    """Return the ``-n`` option of the commands that name a device."""
    return click.option(
        "-n", "--number", "dev_id", type=_DEV_ID, required=required, metavar="DEV_ID"
    )


class _Commands(click.Group):
    """The commands; turns what they raise into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UblkLoopError as error:
            fail(str(error))
        except ValueError as error:
            raise click.UsageError(str(error), ctx) from error

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self.commands, "losetup"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name == "losetup":
            from .cli_losetup import losetup  # it needs this module

            return losetup
        return super().get_command(ctx, cmd_name)


def fail(text: str) -> NoReturn:
    """Print one error line and exit with 1."""
    click.echo(f"ublk: {text}", err=True)
    sys.exit(1)


@click.group(cls=_Commands, context_settings=CONTEXT)
@click.version_option(__version__, "-v", "--version", message="ublk-loop %(version)s")
def cli() -> None:
    """Serve files as block devices through the kernel's ublk driver.

    \b
    Examples:
      ublk add -t loop -f disk.img     serve disk.img as /dev/ublkb0, say
      ublk list                        show the devices
      ublk del -n 0                    stop and delete /dev/ublkb0
      ublk help -t loop                show the options of one type
    """


# ---- add ----


@cli.command(short_help="Add a device and serve it.")
@click.option("-t", "--type", "kind", type=click.Choice(state.TARGET_TYPES), required=True)
@click.option(
    "-n",
    "--number",
    "dev_id",
    metavar="DEV_ID",
    type=click.IntRange(-1, state.MAX_DEV_ID),
    default=-1,
    help="Number; -1, the default: a free one.",
)
@click.option(
    "-q",
    "--queues",
    metavar="NR",
    type=click.IntRange(1, state.MAX_NR_HW_QUEUES),
    default=1,
    show_default=True,
    help="Hardware queues; the driver caps them to the CPUs.",
)
@click.option(
    "-d",
    "--depth",
    metavar="NR",
    type=click.IntRange(1, state.MAX_QUEUE_DEPTH),
    default=128,
    show_default=True,
    help="Requests in flight in each queue.",
)
@click.option("-u", "--uring_comp", type=_SWITCH, default="0", help="URING_CMD_COMP_IN_TASK.")
@click.option("-g", "--need_get_data", type=_SWITCH, default="0", help="NEED_GET_DATA.")
@click.option(
    "-r",
    "--user_recovery",
    type=_SWITCH,
    help="Keep the device when its server dies: requests in flight fail, new ones wait.",
)
@click.option(
    "-i",
    "--user_recovery_reissue",
    type=_SWITCH,
    help="As -r; all requests wait.",
)
@click.option(
    "-e",
    "--user_recovery_fail_io",
    type=_SWITCH,
    help="As -r; new ones fail too.",
)
@click.option(
    "--recovery",
    type=click.Choice(list(_RECOVERIES)),
    help="How the daemon replaces a server that died. reissue, the default: all requests wait."
    " fail_inflight: those in flight fail. fail_all: new ones fail too. none: not at all.",
)
@click.option(
    "--recovery_deadline",
    metavar="S",
    type=click.IntRange(1, state.MAX_DEADLINE_S),
    help=f"After so many seconds without one the device is deleted. [default: {DEADLINE_S}]",
)
@click.option(
    "--data",
    type=click.Choice(state.DATA_MODES),
    default="auto",
    show_default=True,
    help="Who copies the data: the driver (copy), the server by pread and pwrite (usercopy), or"
    " nobody (zerocopy: for direct I/O). auto: the fastest.",
)
@click.option("--usercopy", is_flag=True, help="The same as --data usercopy.")
@click.option("-z", "--zerocopy", is_flag=True, help="The same as --data zerocopy.")
@click.option(
    "-b/ ",
    "--batch/--no_batch",
    default=None,
    help="Fetch and commit in batches; default: where the driver can.",
)
@click.option(
    "--shmem",
    metavar="FILE",
    multiple=True,
    type=click.Path(),
    help="loop: memory that a client maps too (tmpfs, hugetlbfs): requests in it need no copy.",
)
@click.option("--unprivileged", is_flag=True, help="A device that a plain user owns.")
@click.option(
    "--max_io_buf_bytes",
    metavar="BYTES",
    type=click.IntRange(PAGE_BYTES, 32 << 20),
    default=512 * 1024,
    show_default=True,
    help="The largest request, in bytes.",
)
@click.option(
    "--policy",
    type=click.Choice(state.POLICIES),
    default="auto",
    show_default=True,
    help="auto: at once what cannot block, else as 2014. 2014: reads concurrently, writes in order."
    " base: everything in order.",
)
@click.option(
    "--poll_us",
    metavar="US",
    type=PollTime(),
    default="auto",
    show_default=True,
    help="How long to spin for the next request before sleeping; 0: not at all.",
)
@click.option(
    "--nthreads",
    metavar="NR",
    type=click.IntRange(1, state.MAX_NR_HW_QUEUES),
    help="Threads that share the queues; default: one a queue.",
)
@click.option(
    "--foreground", is_flag=True, help="Serve in this process; Ctrl-C deletes the device."
)
@click.option("-f", "--file", "path", type=click.Path(), help="loop: the backing file.")
@click.option("--buffered_io", is_flag=True, help="loop: use the page cache.")
@click.option("--direct_io", is_flag=True, help="loop: bypass the page cache.")
@click.option(
    "-o", "--offset", type=click.IntRange(0), metavar="SECTORS", help="loop: where to begin."
)
@click.option("-R", "--read_only", is_flag=True, help="loop: a read-only device.")
@click.option("--size", "nr_bytes", callback=parse_size, metavar="SIZE", help="The device's size.")
@click.option(
    "--sizelimit",
    "limit_bytes",
    callback=parse_size,
    metavar="SIZE",
    help="loop: at most so much of the file.",
)
@click.option(
    "--sector_size",
    "logical_bs",
    type=click.Choice(["512", "1024", "2048", "4096"]),
    help="loop: the logical block size.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the device as JSON.")
@click.argument("file", required=False, type=click.Path())
def add(**given: Any) -> None:
    """Add a device and serve it; return when it is live, and print it.

    FILE is another way to write -f FILE, as the kernel's own test server takes it.

    \b
    Examples:
      ublk add -t loop -f disk.img
      ublk add -t loop -f disk.img -q 2 -d 64 --buffered_io
      ublk add -t null
    """
    from . import launch

    if given["foreground"]:
        _serve_here(_request(given), given["as_json"])
        return
    words = click.get_current_context().find_root().obj
    if words is not None and _may_start_daemon():
        # The quick way found no daemon; there is one from now on.
        client.start()
        exit_code = client.add(list(words))
        if exit_code is not None:
            sys.exit(exit_code)
    describe = partial(listing.shown, as_json=given["as_json"], two_lines=client.two_lines())
    click.echo(launch.launch(_request(given), describe), nl=False)


def add_device(words: Iterable[str]) -> dict[str, Any]:
    """Do ``ublk add WORDS``, print nothing, and return the device's document.

    :raises click.ClickException: the words are wrong.
    """
    from . import launch

    words = [*words, "--json"]
    given = add.make_context("add", list(words), parent=click.get_current_context()).params
    request = _request(given)
    if _may_start_daemon():
        client.start()
        reply = _ask(protocol.Add(tuple(words), os.getcwd()))
        if reply is not None:
            return _document(reply.out)
    return _document(launch.launch(request, partial(listing.shown, as_json=True)))


def _document(text: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(text)
    return document


def _may_start_daemon() -> bool:
    return client.is_wanted() and os.geteuid() == 0


def parse_add(words: Iterable[str]) -> dict[str, Any]:
    """Return the options that ``words``, those behind ``ublk add``, stand for.

    :raises UsageRefused: with what ``ublk add`` prints.
    """
    parent = click.Context(cli, info_name="ublk", **CONTEXT)
    try:
        return add.make_context("add", list(words), parent=parent).params
    except click.ClickException as error:
        text = io.StringIO()
        error.show(text)
        raise protocol.UsageRefused(text.getvalue()) from None
    except click.exceptions.Exit:
        raise protocol.UsageRefused("Error: -h stands alone\n") from None


def check_add(words: Iterable[str]) -> None:
    """Check the words behind ``ublk add`` as it does.

    :raises ValueError: what is wrong, one sentence.
    """
    parent = click.Context(cli, info_name="ublk", **CONTEXT)
    try:
        _request(add.make_context("add", list(words), parent=parent).params, supervised=True)
    except click.ClickException as error:
        raise ValueError(error.format_message()) from None


def read_words(asked: protocol.Add) -> tuple[Request, bool]:
    """Return what ``ublk add`` is to serve, of the words behind it, and whether to print JSON.

    :raises UsageRefused: with what ``ublk add`` prints.
    """
    given = parse_add(asked.words)
    try:
        return _request(given, cwd=asked.cwd, supervised=True), given["as_json"]
    except click.ClickException as error:
        raise protocol.UsageRefused(f"Error: {error.format_message()}\n") from None


def serve_new(request: Request, *, as_json: bool, two_lines: bool) -> Serve:
    """Return what a server runs that the daemon forks for ``ublk add``."""
    from . import server

    def serve(on_added: OnAdded, on_live: OnLive) -> None:
        show = partial(listing.shown, as_json=as_json, two_lines=two_lines)
        server.serve(request, show, on_added, on_live)

    return serve


def serve_recovery(dev_id: int, *, as_json: bool = False, two_lines: bool = False) -> Serve:
    """Return what a server runs that the daemon forks to take a device over."""
    from . import manage, server

    def serve(on_added: OnAdded, on_live: OnLive) -> None:
        known = manage.recoverable(dev_id)
        request = server.Request(known.options, known.spec, dev_id=dev_id, recover=True)
        show = partial(listing.shown, as_json=as_json, two_lines=two_lines)
        server.serve(request, show, on_added, on_live)

    return serve


def serve_upgrade(dev_id: int) -> Serve:
    """Return what a server runs that the daemon forks to replace a living one."""
    from . import handover, server

    def serve(on_added: OnAdded, on_live: OnLive) -> None:
        known = handover.upgradable(dev_id)
        began = time.monotonic()
        was_killed = not handover.take_from_server(known)

        def describe(info: DevInfo, _: Params, now: DeviceState) -> dict[str, Any]:
            return {
                "pause_ms": round((time.monotonic() - began) * 1000),
                "was_killed": was_killed,
                "old_server_pid": known.server_pid,
                "server_pid": now.server_pid,
            }

        request = server.Request(known.options, known.spec, dev_id=dev_id, recover=True)
        server.serve(request, describe, on_added, on_live)

    return serve


def _request(given: dict[str, Any], *, cwd: str | None = None, supervised: bool = False) -> Request:
    from . import server

    cwd = os.getcwd() if cwd is None else cwd
    flags, deadline_s = _recovery(given, supervised)
    return server.Request(
        options=DeviceOptions(
            nr_hw_queues=given["queues"],
            queue_depth=given["depth"],
            max_io_buf_bytes=_whole_pages(given["max_io_buf_bytes"]),
            flags=_flags(given) | flags,
            policy=given["policy"],
            batch=given["batch"],
            data=_data(given),
            poll_us=given["poll_us"],
            nr_threads=given["nthreads"],
            recovery_deadline_s=deadline_s,
            shared_files=tuple(state.SharedFile(_absolute(path, cwd)) for path in given["shmem"]),
        ),
        spec=_target_spec(given, cwd),
        dev_id=given["dev_id"],
    )


def _recovery(given: dict[str, Any], supervised: bool) -> tuple[int, int | None]:
    # The flags, and the deadline of a recovery by the daemon. The reference server's options mean
    # what they mean there: the device waits for `ublk recover`.
    chosen = given["recovery"]
    by_hand = [name for name in _BY_HAND if given[name] is not None]
    if by_hand and (chosen or given["recovery_deadline"]):
        raise click.UsageError("-r, -i and -e are recovery by hand: not with --recovery")
    if chosen is None:
        # A plain user's device has no recovery in the driver.
        can = supervised and not by_hand and given["kind"] != "ram" and not given["unprivileged"]
        chosen = "reissue" if can else "none"
    if chosen == "none":
        if given["recovery_deadline"]:
            raise click.UsageError("--recovery_deadline is for a device with recovery")
        return 0, None
    if given["kind"] == "ram":
        raise click.UsageError(_RAM_IS_LOST)
    return _RECOVERIES[chosen], given["recovery_deadline"] or DEADLINE_S


def _whole_pages(nr_bytes: int) -> int:
    if nr_bytes % PAGE_BYTES:
        raise click.UsageError(f"--max_io_buf_bytes {nr_bytes} is not a multiple of {PAGE_BYTES}")
    return nr_bytes


def _flags(given: dict[str, Any]) -> int:
    recovery = uapi.UBLK_F_USER_RECOVERY
    modes = {
        "uring_comp": uapi.UBLK_F_URING_CMD_COMP_IN_TASK,
        "need_get_data": uapi.UBLK_F_NEED_GET_DATA,
        "user_recovery": recovery,
        "user_recovery_reissue": recovery | uapi.UBLK_F_USER_RECOVERY_REISSUE,
        "user_recovery_fail_io": recovery | uapi.UBLK_F_USER_RECOVERY_FAIL_IO,
        "unprivileged": uapi.UBLK_F_UNPRIVILEGED_DEV,
    }
    if _is_on(given["user_recovery_reissue"]) and _is_on(given["user_recovery_fail_io"]):
        raise click.UsageError("-i and -e exclude each other")
    flags = 0
    for name, bits in modes.items():
        flags |= bits if _is_on(given[name]) else 0
    if given["batch"] and flags & uapi.UBLK_F_NEED_GET_DATA:
        raise click.UsageError("-b and -g exclude each other")
    if flags & recovery and given["kind"] == "ram":
        raise click.UsageError(_RAM_IS_LOST)
    return flags


def _data(given: dict[str, Any]) -> str:
    named = [name for name in ("usercopy", "zerocopy") if given[name]]
    if given["data"] != "auto":
        named.append(given["data"])
    if len(set(named)) > 1:
        raise click.UsageError("--data, --usercopy and --zerocopy exclude each other")
    return named[0] if named else "auto"


def _is_on(value: bool | str) -> bool:
    return value in (True, "1")


def _target_spec(given: dict[str, Any], cwd: str) -> TargetSpec:
    if given["file"] is not None:
        if given["path"] is not None:
            raise click.UsageError("say -f FILE or FILE, not both")
        given["path"] = given["file"]
    kind, path, nr_bytes = given["kind"], given["path"], given["nr_bytes"]
    if kind != "loop":
        for option, name in (
            ("-f", "path"),
            ("-o", "offset"),
            ("--buffered_io", "buffered_io"),
            ("--direct_io", "direct_io"),
            ("-R", "read_only"),
            ("--shmem", "shmem"),
            ("--sizelimit", "limit_bytes"),
            ("--sector_size", "logical_bs"),
        ):
            if given[name] not in (None, False, ()):
                raise click.UsageError(f"{option} is for -t loop only")
        if kind == "ram" and nr_bytes is None:
            raise click.UsageError("-t ram needs --size")
        return TargetSpec(kind, nr_bytes=NULL_NR_BYTES if nr_bytes is None else nr_bytes)
    if not path:
        raise click.UsageError("-t loop needs -f FILE")
    if given["buffered_io"] and given["direct_io"]:
        raise click.UsageError("--buffered_io and --direct_io exclude each other")
    offset_bytes = (given["offset"] or 0) << uapi.SECTOR_SHIFT
    if offset_bytes >= 1 << 63:
        raise click.UsageError("-o is beyond any file")
    return TargetSpec(
        "loop",
        path=_absolute(path, cwd),
        offset_bytes=offset_bytes,
        nr_bytes=nr_bytes,
        direct=True if given["direct_io"] else False if given["buffered_io"] else None,
        read_only=given["read_only"],
        limit_bytes=given["limit_bytes"] or nr_bytes,
        logical_bs=int(given["logical_bs"]) if given["logical_bs"] else None,
    )


def _absolute(path: str, cwd: str) -> str:
    return os.path.normpath(os.path.join(cwd, path))


def _serve_here(request: Request, as_json: bool) -> None:
    import logging

    from . import server

    logging.basicConfig(format="ublk: %(message)s", level=logging.WARNING)

    def on_live(_: int, text: str) -> None:
        click.echo(text, nl=False)
        sys.stdout.flush()

    show = partial(listing.shown, as_json=as_json, two_lines=client.two_lines())
    server.serve(request, show, lambda dev_id, sysfs_ino: None, on_live)


# ---- del ----


@cli.command("del", short_help="Stop and delete a device.")
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
    _check_n_or_a(dev_id, everything)
    if lazy and force and _came_from_command_line("force"):
        raise click.UsageError("--lazy and --force exclude each other")
    from .control import list_dev_ids

    dev_ids = list_dev_ids() if dev_id is None else [dev_id]
    done = [delete_one(each, no_wait=no_wait, force=force, lazy=lazy) for each in dev_ids]
    if as_json:
        click.echo(json.dumps(done, indent=2))
    exit_if_failed(done)


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
        click.echo("\n\t".join([f"ublk: {error}", *map(str, error.holders)]), err=True)
    except UblkLoopError as error:
        done["error"] = str(error)
        click.echo(f"ublk: {error}", err=True)
    return done


# ---- list ----


@cli.command("list", short_help="Show devices.")
@number_option(required=False)
@click.option("-v", "--verbose", is_flag=True, help="All that is known, as JSON.")
@click.option("--json", "as_json", is_flag=True, help="A JSON list of devices.")
def list_devices(dev_id: int | None, verbose: bool, as_json: bool) -> None:
    """Show one device, or all, whoever serves them.

    \b
    Examples:
      ublk list
      ublk list -n 0 -v
      ublk list --json
    """
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
            return [known_device(control, dev_id)]
        found = []
        for each in list_dev_ids():
            try:
                found.append(known_device(control, each))
            except DriverError:
                # Deleted since, or another user's.
                continue
        return found


def known_device(control: Control, dev_id: int) -> tuple[DevInfo, Params, DeviceState | None]:
    info = control.get_dev_info(dev_id)
    params = control.get_params(dev_id)
    try:
        known = listing.state_of(info, state.read(dev_id))
    except DaemonError as error:
        click.echo(f"ublk: {error}", err=True)
        known = None
    return info, params, known


# ---- recover, upgrade ----


@cli.command(short_help="Serve again devices whose servers died.")
@number_option(required=False)
@click.option("-a", "--all", "everything", is_flag=True, help="Every device that waits for one.")
@click.option("--json", "as_json", is_flag=True, help="Print the device, or a list, as JSON.")
def recover(dev_id: int | None, everything: bool, as_json: bool) -> None:
    """Serve again a device that was added with recovery and whose server died.

    With -a, devices that another program has left without a server are named, not touched.

    \b
    Examples:
      ublk recover -n 0
      ublk recover -a
    """
    _check_n_or_a(dev_id, everything)
    if dev_id is not None:
        click.echo(_recover_one(dev_id, as_json), nl=False)
        return
    from . import manage

    waiting, orphans = manage.waiting()
    done = [_tried(each, partial(_recover_one, each, as_json)) for each in waiting]
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


def _recover_one(dev_id: int, as_json: bool) -> str:
    from . import launch, manage, server

    reply = _ask(protocol.Recover(dev_id, as_json, client.two_lines()))
    if reply is not None:
        return reply.out
    known = manage.recoverable(dev_id)
    request = server.Request(known.options, known.spec, dev_id=dev_id, recover=True)
    describe = partial(listing.shown, as_json=as_json, two_lines=client.two_lines())
    text: str = launch.launch(request, describe)
    return text


@cli.command(short_help="Replace servers by those of the installed version, without a stop.")
@number_option(required=False)
@click.option("-a", "--all", "everything", is_flag=True, help="Every device of ublk_loop.")
@click.option("--json", "as_json", is_flag=True, help="A JSON list of what was done.")
def upgrade(dev_id: int | None, everything: bool, as_json: bool) -> None:
    """Replace the server of a device, which may be in use, by one of what is installed now.

    Requests wait meanwhile and none fails. Prints for how long. The daemon is replaced too.

    \b
    Examples:
      ublk upgrade -n 0
      ublk upgrade -a
    """
    _check_n_or_a(dev_id, everything)
    from . import manage

    by_daemon = _reload_daemon()
    dev_ids = manage.served() if dev_id is None else [dev_id]
    done = [_tried(each, partial(_upgrade_one, each, by_daemon)) for each in dev_ids]
    if as_json:
        click.echo(json.dumps(done, indent=2))
    else:
        for one in done:
            if one["done"]:
                click.echo(_upgrade_text(one["dev_id"], one["done"]))
    exit_if_failed(done)


def _upgrade_one(dev_id: int, by_daemon: bool) -> Any:
    from . import launch

    if by_daemon:
        reply = _ask(protocol.Upgrade(dev_id))
        if reply is None:
            raise DaemonError(errno.ESRCH, f"upgrade dev {dev_id}", "the daemon went away")
        return reply.document
    return launch.launch_server(f"upgrade dev {dev_id}", serve_upgrade(dev_id), is_recovery=True)


def _upgrade_text(dev_id: int, done: dict[str, Any]) -> str:
    pids = f"daemon pid {done['old_server_pid']} -> {done['server_pid']}"
    killed = ", killed: it did not leave" if done["was_killed"] else ""
    return f"dev id {dev_id}: {pids}, pause {done['pause_ms']} ms{killed}"


def _reload_daemon() -> bool:
    # True once a daemon runs what is installed now.
    if not client.is_wanted() or os.geteuid() != 0:
        return False
    deadline = time.monotonic() + RELOAD_TIMEOUT_S
    while True:
        reply = _ask(protocol.Reload(sys.executable))
        if reply is None:
            return False
        if reply.document and reply.document["reloads"]:
            return True
        if time.monotonic() >= deadline:
            raise DaemonError(errno.EBUSY, "daemon", "a device is being added or recovered")
        time.sleep(0.1)


def _check_n_or_a(dev_id: int | None, everything: bool) -> None:
    if everything == (dev_id is not None):
        raise click.UsageError("say -n DEV_ID, or -a for every device")


def _tried(dev_id: int, function: Callable[[], Any]) -> dict[str, Any]:
    # What it returned, or its error, which is printed.
    try:
        return {"dev_id": dev_id, "done": function(), "error": None}
    except UblkLoopError as error:
        click.echo(f"ublk: {error}", err=True)
        return {"dev_id": dev_id, "done": None, "error": str(error)}


def exit_if_failed(done: list[dict[str, Any]]) -> None:
    """End with 1 if one of what was done to devices has an error."""
    if any(one["error"] for one in done):
        sys.exit(1)


# ---- the daemon ----


@cli.command(short_help="Keep devices served; answer ublk add.")
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

        daemon_module.main(os.path.abspath(config), detach=detach, reloaded=reloaded)
        return
    reply = _ask(protocol.Stop() if command == "stop" else protocol.Status())
    if reply is None:
        raise DaemonError(errno.ESRCH, "daemon", "none runs: ublk daemon --detach starts one")
    if command == "status":
        assert reply.document is not None
        text = json.dumps(reply.document, indent=2) if as_json else _status_text(reply.document)
        click.echo(text)


def _status_text(document: dict[str, Any]) -> str:
    lines = [f"daemon pid {document['pid']}: {len(document['devices'])} devices"]
    for device in document["devices"]:
        lines.append(
            f"dev id {device['dev_id']}: {device['phase']} daemon pid {device['server_pid'] or '-'}"
            f" recoveries {device['nr_recoveries']}"
        )
    lines += [f"dev id {dev_id}: not of this daemon" for dev_id in document["orphans"]]
    return "\n".join(lines)


def _ask(request: protocol.Request) -> protocol.Reply | None:
    # Of a daemon that runs; None without one, or where it sees other files than we do.
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


# ---- features, doctor, set_affinity, help ----


@cli.command(short_help="Show what the driver offers.")
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


@cli.command(short_help="Look for what is wrong, and say how to mend it.")
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


@cli.command("set_affinity", short_help="Choose the CPUs of a queue's thread.")
@number_option(required=True)
@click.option("-q", "--queue", "q_id", type=click.IntRange(0), required=True, metavar="QID")
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


@cli.command(short_help="Show who owns an unprivileged device; for udev.")
@click.argument("name", metavar="DEVICE")
def owner(name: str) -> None:
    """Print the user's and the group's id of who added an unprivileged device; else fail.

    \b
    Example:
      ublk owner ublkc0
    """
    from .owner import owner_of

    click.echo("{} {}".format(*owner_of(name)))


@cli.command("help", short_help="Show help, or that of one type.")
@click.option("-t", "--type", "kind", type=click.Choice(state.TARGET_TYPES))
@click.pass_context
def show_help(ctx: click.Context, kind: str | None) -> None:
    """Show help, or the options of one type of device.

    \b
    Example:
      ublk help -t loop
    """
    assert ctx.parent is not None
    if kind is None:
        click.echo(ctx.parent.get_help())
        return
    with click.Context(add, info_name=f"ublk add -t {kind}") as sub_context:
        body = _TYPE_HELP[kind].replace("\b\n", "")
        click.echo(f"{sub_context.get_usage()}\n\n{body}\n\nAll options: ublk add --help")


def main() -> NoReturn:
    """Run the ``ublk`` command."""
    cli(prog_name="ublk", obj=sys.argv[2:])
    sys.exit(0)


if __name__ == "__main__":
    main()
