"""``ublk add``: its options, and who serves what they ask for: the daemon, or a server of our own.

In: the words of a command line, of a file of devices (boot.py), or of a client of the daemon. Out:
a request (add_request.py), or the device once it is live. Forks a server, with :mod:`launch`, only
where there is no daemon.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from . import client, listing, protocol, state, uapi
from .add_request import DEADLINE_S, PAGE_BYTES, RECOVERIES, current_dir, request_of
from .cli_base import CONTEXT, Integer, ask, cli, usage_text, warn
from .state import TargetSpec

if TYPE_CHECKING:
    from .server import Request

_SIZE_SUFFIXES = "KMGTPE"
SWITCH = click.Choice(["0", "1"])
_THEIR_WORDS = {
    "--user_copy": "--usercopy",
    "--zero_copy": "--zerocopy",
    # Ours has both by itself.
    "--auto_zc": "--zerocopy",
    "--auto_zc_fallback": "--zerocopy",
    "-s": "--size",
    "--htlb": "--shmem",
    "--rdonly_shmem_buf": "--shmem_read_only",
    "--queue": "--queues",
    "--io_buf_size": "--max_io_buf_bytes",
    "--logical_block_size": "--sector_size",
}
# How those servers work, or end, inside, and what they print. Nothing of it is to be chosen here.
_NO_WORDS_HERE = {
    *("--no_ublk_fixed_fd", "--per_io_tasks", "--rotate_auto_buf", "--quiet"),
    *("--quiesce", "--clean_teardown", "--abandon_ring", "-S"),
    *("--async_await", "--multi_cpus_affinity", "--mlock"),
}
_OTHER_TYPES = {"fault_inject": "null"}  # kublk's
TYPE_HELP = {
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
  --metadata_size BYTES and more: metadata of each block, in a second file

\b
Examples:
  ublk add -t loop -f disk.img
  ublk add -t loop -f /dev/vdb -q 2 -d 64
  ublk add -t loop -f disk.img -o 2048 --size 100M -r 1""",
    "stripe": """Serves several files of one size as one device, chunk by chunk (RAID 0).

\b
  -f, --file FILE      one of them, in order; or the last arguments; they are locked
  --chunk_size SIZE    how much of one is followed by the next; default: 64K
  --buffered_io        through the page cache; the default for regular files
  --direct_io          past the page cache (O_DIRECT); the default for block devices

\b
Example:
  ublk add -t stripe --chunk_size 64K disk0.img disk1.img""",
    "null": """Completes every request and stores nothing: for measuring.

\b
  --size SIZE          the device's size; default: 250G
  --sector_size BYTES  the logical block size; default: 512
  -R, --read_only      a read-only device
  --delay_us US        how long each request takes, as on a slow disk; default: 0

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
        return Integer(0, state.MAX_POLL_US).convert(value, param, ctx)


class BufSize(click.ParamType[int]):
    """Bytes, with a suffix if there is one: 65536, 64K, 1MiB."""

    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        return Integer(PAGE_BYTES, 32 << 20).convert(parse_bytes(str(value)), param, ctx)


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
    match = re.fullmatch(rf"(\d+)(?:([{_SIZE_SUFFIXES}])(iB|B)?)?", text, re.IGNORECASE)
    if match is None:
        raise click.BadParameter(f"{text!r} is not a size, such as 4096, 64M or 1GiB")
    number, suffix, ending = match.groups()
    base = 1000 if ending and ending.upper() == "B" else 1024
    power = 1 + _SIZE_SUFFIXES.index(suffix.upper()) if suffix else 0
    return int(number) * int(base**power)


class _Add(click.Command):
    """``ublk add``, which takes the words of four other servers.

    ``-u`` and ``-g`` have a value in the reference server's words, and none in kublk's, the
    kernel's test server; nor has ``-r`` in those of rublk and miniublk, the server of blktests.
    rublk has the type as the first word, and short options of its own.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args == ["help"]:
            args = ["--help"]
        elif args and args[0][:1] != "-" and not {"-t", "--type"} & {*args}:
            args = ["-t", args[0], *_of_rublk(args[1:])]
        return super().parse_args(ctx, [*_in_our_words(ctx, args)])


def _of_rublk(args: list[str]) -> Iterator[str]:
    # Where a value follows, -o is the reference server's.
    flags = {"-p": "--unprivileged", "-b": "--max_io_buf_bytes", "-a": "--async_await"}
    for arg, next_arg in zip(args, [*args[1:], ""], strict=False):
        if arg == "-o" and not next_arg.isdigit():
            yield "--read_only"
        else:
            yield flags.get(arg, arg)


def _in_our_words(ctx: click.Context, args: list[str]) -> Iterator[str]:
    meaningless = {*_NO_WORDS_HERE, *(["--shmem_zc"] if "--htlb" in args else [])}
    for last_arg, arg, next_arg in zip(["", *args], args, [*args[1:], ""], strict=False):
        has_value = next_arg in ("0", "1")
        name, *value = arg.split("=", 1) if arg.startswith("--") else [arg]
        word = "--" + name[2:].replace("-", "_") if arg.startswith("--") else arg
        if arg == "-u" and not has_value:
            yield "--usercopy"
        elif arg == "-g" and not has_value:
            yield "--need_get_data=1"
        elif word in ("-r", "--user_recovery") and not value and next_arg[:1] in ("", "-"):
            yield "--user_recovery=1"
        elif last_arg in ("-t", "--type"):
            yield _type_of(ctx, arg)
        elif word not in meaningless:
            yield "=".join([_THEIR_WORDS.get(word, name), *value])


def _type_of(ctx: click.Context, word: str) -> str:
    # Said before anything else: the options of a type that is not here are none of ours either.
    kind = _OTHER_TYPES.get(word, word)
    if kind not in state.TARGET_TYPES:
        text = f"there is no target {kind!r} here, but these: {', '.join(state.TARGET_TYPES)}"
        if {".", "/"} & {*kind}:
            text += f"; for a file: ublk add -t loop -f {shlex.quote(kind)}"
        raise click.UsageError(text, ctx)
    return kind


@click.command(cls=_Add, short_help="Add a device and serve it.")
@click.option("-t", "--type", "kind", type=click.Choice(state.TARGET_TYPES), required=True)
@click.option(
    "-n",
    "--number",
    "dev_id",
    metavar="DEV_ID",
    type=Integer(-1, state.MAX_DEV_ID),
    default=-1,
    help="Number; -1, the default: a free one.",
)
@click.option(
    "-q",
    "--queues",
    metavar="NR",
    type=Integer(1, state.MAX_NR_HW_QUEUES),
    help="Hardware queues, at most one a CPU; default: two with one thread, or one.",
)
@click.option(
    "-d",
    "--depth",
    metavar="NR",
    type=Integer(1, state.MAX_QUEUE_DEPTH),
    default=128,
    show_default=True,
    help="Requests in flight in each queue.",
)
@click.option("-u", "--uring_comp", type=SWITCH, default="0", help="URING_CMD_COMP_IN_TASK.")
@click.option("-g", "--need_get_data", type=SWITCH, default="0", help="NEED_GET_DATA.")
@click.option(
    "-r",
    "--user_recovery",
    type=SWITCH,
    help="Keep the device when its server dies: requests in flight fail, new ones wait.",
)
@click.option(
    "-i",
    "--user_recovery_reissue",
    type=SWITCH,
    help="As -r; all requests wait.",
)
@click.option(
    "-e",
    "--user_recovery_fail_io",
    type=SWITCH,
    help="As -r; new ones fail too.",
)
@click.option(
    "--recovery",
    type=click.Choice(list(RECOVERIES)),
    help="How the daemon replaces a server that died. reissue, the default: all requests wait."
    " fail_inflight: those in flight fail. fail_all: new ones fail too. none: not at all.",
)
@click.option(
    "--recovery_deadline",
    metavar="S",
    type=Integer(1, state.MAX_DEADLINE_S),
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
    help="loop, null: memory that a client maps too (tmpfs, hugetlbfs): requests in it need no"
    " copy.",
)
@click.option("--shmem_read_only", is_flag=True, help="The server only reads it: for writes.")
@click.option(
    "--no_auto_part_scan", is_flag=True, help="Look for no partitions until blockdev --rereadpt."
)
@click.option("--unprivileged", is_flag=True, help="A device that a plain user owns.")
@click.option(
    "--max_io_buf_bytes",
    metavar="SIZE",
    type=BufSize(),
    default=512 * 1024,
    show_default=True,
    help="The largest request.",
)
@click.option(
    "--io_desc_size",
    "io_desc_bytes",
    metavar="BYTES",
    type=Integer(state.IO_DESC_BYTES, state.MAX_IO_DESC_BYTES),
    help="The size of a request's descriptor; default: 24, which is all that is used.",
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
    type=Integer(1, state.MAX_NR_THREADS),
    help="Threads that share the queues; default: one a queue.",
)
@click.option(
    "-T",
    "threads_a_queue",
    metavar="NR",
    type=Integer(1, state.MAX_QUEUE_DEPTH),
    help="So many times as many threads as queues; not with -b.",
)
@click.option(
    "--foreground", is_flag=True, help="Serve in this process; Ctrl-C deletes the device."
)
@click.option(
    "-f",
    "--file",
    "path",
    multiple=True,
    type=click.Path(),
    help="loop: the backing file; stripe: each of them.",
)
@click.option(
    "--chunk_size",
    "chunk_bytes",
    callback=parse_size,
    metavar="SIZE",
    help="stripe: what of one file is followed by the next; default: 64K.",
)
@click.option(
    "--delay_us",
    metavar="US",
    type=Integer(0, state.MAX_DELAY_US),
    help="null: how long each request takes; default: 0.",
)
@click.option("--buffered_io", is_flag=True, help="loop, stripe: use the page cache.")
@click.option("--direct_io", is_flag=True, help="loop, stripe: bypass the page cache.")
@click.option("-o", "--offset", type=Integer(0), metavar="SECTORS", help="loop: where to begin.")
@click.option("-R", "--read_only", is_flag=True, help="loop, null: a read-only device.")
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
    help="loop, null: the logical block size.",
)
@click.option(
    "--metadata_size",
    "metadata_bytes",
    metavar="BYTES",
    type=Integer(1, state.MAX_METADATA_BYTES),
    help="loop, null: each block has so many bytes of metadata; of loop, the second file has them.",
)
@click.option(
    "--csum_type",
    type=click.Choice(list(state.CSUM_TYPES)),
    help="The checksum of the protection information in them; default: there is none.",
)
@click.option(
    "--pi_offset",
    metavar="BYTES",
    type=Integer(0, state.MAX_METADATA_BYTES),
    help="Where in the metadata that is; default: 0.",
)
@click.option(
    "--tag_size",
    metavar="BYTES",
    type=Integer(0, state.MAX_METADATA_BYTES),
    help="How much of it is for applications; default: 0.",
)
@click.option("--integrity_capable", is_flag=True, help="The device says that it checks it, too.")
@click.option("--integrity_reftag", is_flag=True, help="It has the number of the block in it.")
@click.option("--json", "as_json", is_flag=True, help="Print the device as JSON.")
@click.argument("files", nargs=-1, type=click.Path())
def add(**given: Any) -> None:
    """Add a device and serve it; return when it is live, and print it.

    FILES are another way to write -f FILE, as the kernel's own test server takes them. The type may
    be the first word, without -t, as rublk has it; then -r, -o, -b, -p and -a are its own.

    \b
    Examples:
      ublk add -t loop -f disk.img
      ublk add -t loop -f disk.img -q 2 -d 64 --buffered_io
      ublk add -t null
    """
    from . import launch

    if given["foreground"]:
        _serve_here(request_of(given), given["as_json"])
        return
    words = click.get_current_context().find_root().obj
    if words is not None and _may_start_daemon():
        # The quick way found no daemon; there is one from now on.
        client.start()
        exit_code = client.add(list(words))
        if exit_code is not None:
            sys.exit(exit_code)
    describe = partial(listing.shown, as_json=given["as_json"], two_lines=client.two_lines())
    click.echo(launch.launch(request_of(given), describe, on_warning=warn), nl=False)


def add_device(words: Iterable[str]) -> dict[str, Any]:
    """Do ``ublk add WORDS``, print nothing but warnings, and return the device's document.

    :raises click.ClickException: the words are wrong.
    """
    from . import launch

    words = [*words, "--json"]
    given = add.make_context("add", list(words), parent=click.get_current_context()).params
    request = request_of(given)
    if _may_start_daemon():
        client.start()
        reply = ask(protocol.Add(tuple(words), current_dir()))
        if reply is not None:
            click.echo(reply.err, err=True, nl=False)
            return _document(reply.out)
    describe = partial(listing.shown, as_json=True)
    return _document(launch.launch(request, describe, on_warning=warn))


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
    except click.UsageError as error:
        raise _refused(error) from None
    except click.exceptions.Exit:
        raise _refused(click.UsageError("-h stands alone")) from None


def _refused(error: click.UsageError) -> protocol.UsageRefused:
    return protocol.UsageRefused(f"ublk: {usage_text(error, 'ublk add')}\n")


def check_add(words: Iterable[str]) -> None:
    """Check the words behind ``ublk add`` as it does.

    :raises ValueError: what is wrong, one sentence.
    """
    parent = click.Context(cli, info_name="ublk", **CONTEXT)
    try:
        request_of(add.make_context("add", list(words), parent=parent).params, supervised=True)
    except click.ClickException as error:
        raise ValueError(error.format_message()) from None


def spec_of(words: Iterable[str]) -> TargetSpec:
    """Return what the words behind ``ublk add`` say is served. :raises click.UsageError: wrong."""
    given = add.make_context("add", list(words), parent=click.get_current_context()).params
    return request_of(given).spec


def read_words(asked: protocol.Add) -> tuple[Request, bool]:
    """Return what ``ublk add`` is to serve, of the words behind it, and whether to print JSON.

    :raises UsageRefused: with what ``ublk add`` prints.
    """
    given = parse_add(asked.words)
    try:
        return request_of(given, cwd=asked.cwd, supervised=True), given["as_json"]
    except click.UsageError as error:
        raise _refused(error) from None


def _serve_here(request: Request, as_json: bool) -> None:
    import logging

    from . import scheduler, server

    logging.basicConfig(format="ublk: %(message)s", level=logging.WARNING)
    apart = scheduler.Apart()

    def on_added(dev_id: int, sysfs_ino: int, warning: str) -> None:
        if warning:
            warn(warning)

    def on_live(dev_id: int, text: str) -> None:
        apart.set(dev_id)
        click.echo(text, nl=False)
        sys.stdout.flush()

    show = partial(listing.shown, as_json=as_json, two_lines=client.two_lines())
    try:
        server.serve(lambda: request, show, on_added, on_live)
    finally:
        apart.close()
