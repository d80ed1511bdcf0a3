"""ublk add, up to the request that a server is started with."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from commands import assert_names_the_help

from ublk_loop import cli, cli_add, protocol, server, uapi
from ublk_loop import launch as launching
from ublk_loop.add_request import request_of
from ublk_loop.errors import BackingFileError, DaemonError, DriverError
from ublk_loop.server import Request
from ublk_loop.state import Metadata

Ublk = Callable[..., Result]


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """The requests that reached the start of a server, which is as far as these tests go."""
    seen: list[Request] = []

    def launch(request: Request, describe: object, on_warning: object) -> str:
        seen.append(request)
        return "dev id 0: ...\n"

    monkeypatch.setattr(launching, "launch", launch)
    return seen


def ublk(*arguments: str) -> Result:
    return CliRunner().invoke(cli.cli, list(arguments), prog_name="ublk")


def test_add_of_a_file_asks_for_the_reference_servers_defaults(requests: list[Request]) -> None:
    result = ublk("add", "-t", "loop", "-f", "/srv/d.img")
    assert (result.exit_code, result.stdout) == (0, "dev id 0: ...\n")
    (request,) = requests
    assert request.dev_id == -1
    assert not request.recover
    assert (request.options.nr_hw_queues, request.options.queue_depth) == (None, 128)
    assert request.options.max_io_buf_bytes == 524288
    assert request.options.flags == 0
    assert request.options.policy == "auto"
    assert request.spec.type == "loop"
    assert request.spec.path == "/srv/d.img"
    assert (request.spec.offset_bytes, request.spec.nr_bytes) == (0, None)
    assert request.spec.direct is None
    assert not request.spec.read_only


def test_add_takes_the_file_as_the_kernels_own_test_server_does(requests: list[Request]) -> None:
    assert ublk("add", "-t", "loop", "-q", "2", "/srv/d.img").exit_code == 0
    (request,) = requests
    assert (request.spec.path, request.options.nr_hw_queues) == ("/srv/d.img", 2)


def test_add_of_a_stripe_takes_its_files_in_order(requests: list[Request]) -> None:
    for line in (
        "/srv/b.img /srv/a.img",
        "-f /srv/b.img -f /srv/a.img",
        "-f /srv/b.img /srv/a.img",
    ):
        assert ublk("add", "-t", "stripe", "--chunk_size", "16K", *line.split()).exit_code == 0
    assert ublk("add", "-t", "stripe", "/srv/a.img").exit_code == 0
    specs = [request.spec for request in requests]
    assert {spec.stripe_paths for spec in specs[:3]} == {("/srv/b.img", "/srv/a.img")}
    assert [spec.chunk_bytes for spec in specs] == [16384, 16384, 16384, 65536]


def test_add_takes_words_that_say_how_other_servers_work_inside(requests: list[Request]) -> None:
    assert ublk("add", "-t", "null", "-r", "1").exit_code == 0
    words = "--per_io_tasks --no_ublk_fixed_fd --rotate_auto_buf --quiet --quiesce -T 1 -S"
    assert ublk(*f"add -t null -r 1 {words} --clean-teardown --abandon-ring".split()).exit_code == 0
    assert requests[0] == requests[1]


def test_add_takes_recovery_without_a_value_as_blktests_server_does(
    requests: list[Request],
) -> None:
    for line in ("-t null -n 0 -r", "-t null -r -n 0", "-t null -n 0 -r 1", "null -r -n0"):
        assert ublk("add", *line.split()).exit_code == 0, line
    (request,) = set(requests)
    assert request.options.flags == uapi.UBLK_F_USER_RECOVERY


def test_add_takes_the_words_of_rublk(requests: list[Request]) -> None:
    for line in (
        "loop -n 2 -q 2 -d 64 -f /srv/d.img -r -o -a -b 1MiB -u --logical-block-size 4096 --mlock",
        "-t loop -n 2 -q 2 -d 64 -f /srv/d.img -r 1 -R --max_io_buf_bytes 1048576 --usercopy"
        " --sector_size 4096",
        "loop --number=2 --queue=2 --depth=64 --file=/srv/d.img --user-recovery --read-only"
        " --io-buf-size=1048576 --user-copy --logical-block-size=4096 --multi-cpus-affinity",
    ):
        assert ublk("add", *line.split()).exit_code == 0, line
    (request,) = set(requests)
    assert (request.dev_id, request.options.nr_hw_queues, request.options.queue_depth) == (2, 2, 64)
    assert (request.options.max_io_buf_bytes, request.options.data) == (1 << 20, "usercopy")
    assert request.options.flags == uapi.UBLK_F_USER_RECOVERY
    assert (request.spec.read_only, request.spec.logical_bs) == (True, 4096)


def test_add_ends_in_no_traceback_when_the_current_directory_was_removed(
    requests: list[Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    for name in ("/srv/d.img", "d.img"):
        assert ublk("add", "-t", "loop", "-f", name).exit_code == 0
    assert [one.spec.path for one in requests] == [
        "/srv/d.img",
        f"{gone} (deleted)/d.img",
    ]


def test_add_of_null_takes_a_block_size_and_is_read_only_if_asked(requests: list[Request]) -> None:
    assert ublk("add", "null", "--logical-block-size", "4096", "--read-only", "-p").exit_code == 0
    (request,) = requests
    assert (request.spec.type, request.spec.logical_bs, request.spec.read_only) == (
        *("null", 4096, True),
    )
    assert request.options.flags == uapi.UBLK_F_UNPRIVILEGED_DEV


def test_short_options_of_rublk_are_not_those_of_the_reference_server(
    requests: list[Request],
) -> None:
    assert ublk(*["add", "loop", "-f", "/srv/d.img", "-r", "0", "-o", "8"]).exit_code == 0
    (request,) = requests
    assert (request.options.flags, request.spec.offset_bytes) == (0, 4096)
    assert not request.spec.read_only
    for line in (
        "-t loop -f /srv/d.img -o",
        "-t loop -r -f",
        "-t null -p",
        "-t null -a",
    ):
        assert ublk("add", *line.split()).exit_code == 2, line


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("qcow2 -f x.qcow2", ""),
        ("zoned --zone-size 4", ""),
        ("-t nbd --host 127.0.0.1", ""),
        ("disk.img", "; for a file: ublk add -t loop -f disk.img"),
        ("/dev/sdb", "; for a file: ublk add -t loop -f /dev/sdb"),
    ],
)
def test_add_of_a_target_that_is_not_here_says_so_in_one_line(
    requests: list[Request], line: str, hint: str
) -> None:
    result = ublk("add", *line.split())
    assert (result.exit_code, result.stdout, requests) == (2, "", [])
    (error,) = result.stderr.splitlines()
    kind = line.replace("-t ", "").split()[0]
    here = f"there is no target {kind!r} here, but these: loop, null, ram, stripe"
    assert error == f"ublk: {here}{hint}: see ublk add --help"


@pytest.mark.parametrize("line", ["-f x.img", "-t loop", "-t loop --foo", "-t loop -f x.img -q 0"])
@pytest.mark.usefixtures("requests")
def test_the_daemon_says_of_wrong_usage_what_the_command_says(line: str) -> None:
    with pytest.raises(protocol.UsageRefused) as refused:
        cli_add.read_words(protocol.Add(tuple(line.split()), "/srv"))
    assert_names_the_help(str(refused.value))
    assert str(refused.value) == ublk("add", *line.split()).stderr


@pytest.mark.parametrize("words", [["add"], ["add", "loop"], ["add", "null", "-t"]])
def test_add_without_what_it_needs_is_wrong_usage(
    requests: list[Request], words: list[str]
) -> None:
    result = ublk(*words)
    assert (result.exit_code, requests) == (2, [])
    assert "zip" not in result.stderr


def test_add_gives_each_queue_so_many_threads(requests: list[Request]) -> None:
    assert ublk(*["add", "-t", "null", "-q", "2", "-T", "4"]).exit_code == 0
    assert ublk(*["add", "-t", "null", "-q", "2", "--nthreads", "3"]).exit_code == 0
    assert [request.options.nr_threads for request in requests] == [8, 3]


def test_add_takes_the_kernels_own_test_servers_slow_target(requests: list[Request]) -> None:
    assert ublk(*["add", "-t", "fault_inject", "-q", "2", "--delay_us", "2000000"]).exit_code == 0
    (request,) = requests
    assert (request.spec.type, request.spec.delay_us) == ("null", 2_000_000)


def test_add_takes_the_kernels_own_test_servers_words_for_shared_memory(
    requests: list[Request],
) -> None:
    line = "add -t null --shmem_zc --htlb /huge/buffer"
    assert ublk(*line.split()).exit_code == 0
    assert ublk(*line.split(), "--rdonly_shmem_buf").exit_code == 0
    files = [request.options.shared_files for request in requests]
    assert [[(file.path, file.read_only) for file in each] for each in files] == [
        [("/huge/buffer", False)],
        [("/huge/buffer", True)],
    ]


def test_add_takes_the_reference_servers_options(requests: list[Request]) -> None:
    line = (
        "add -t loop -q 4 -d64 -n 7 -r 1 -i 1 --usercopy --max_io_buf_bytes 1048576 --buffered_io"
    )
    assert ublk(*line.split(), "-o", "2048", "-f", "/srv/d.img").exit_code == 0
    (request,) = requests
    assert request.dev_id == 7
    assert (request.options.nr_hw_queues, request.options.queue_depth) == (4, 64)
    assert request.options.max_io_buf_bytes == 1 << 20
    assert request.spec.offset_bytes == 1 << 20
    assert request.spec.direct is False
    assert request.options.flags == (uapi.UBLK_F_USER_RECOVERY | uapi.UBLK_F_USER_RECOVERY_REISSUE)
    assert request.options.data == "usercopy"


def test_add_takes_the_reference_servers_long_options_with_either_dash(
    requests: list[Request],
) -> None:
    plain = "--type null --number 1 --queues=2 --depth 32 --user_recovery 1 --need_get_data 1"
    for line in (plain, plain.replace("_", "-")):
        assert ublk("add", *line.split()).exit_code == 0
    assert requests[0] == requests[1]
    assert requests[0].options.flags == uapi.UBLK_F_USER_RECOVERY | uapi.UBLK_F_NEED_GET_DATA


@pytest.mark.parametrize(
    ("option", "flags"),
    [
        ("-u 1", uapi.UBLK_F_URING_CMD_COMP_IN_TASK),
        ("-g 1", uapi.UBLK_F_NEED_GET_DATA),
        ("-r 1", uapi.UBLK_F_USER_RECOVERY),
        ("-i 1", uapi.UBLK_F_USER_RECOVERY | uapi.UBLK_F_USER_RECOVERY_REISSUE),
        ("-e 1", uapi.UBLK_F_USER_RECOVERY | uapi.UBLK_F_USER_RECOVERY_FAIL_IO),
        ("--unprivileged", uapi.UBLK_F_UNPRIVILEGED_DEV),
        ("-u 0 -g 0 -r 0 -i 0 -e 0", 0),
    ],
)
def test_add_asks_for_the_mode_that_an_option_names(
    requests: list[Request], option: str, flags: int
) -> None:
    assert ublk("add", "-t", "null", *option.split()).exit_code == 0
    assert requests[0].options.flags == flags


@pytest.mark.parametrize(
    ("option", "data"),
    [
        ("", "auto"),
        ("-z", "zerocopy"),
        ("--zerocopy --data zerocopy", "zerocopy"),
        ("--usercopy", "usercopy"),
        ("--data copy", "copy"),
    ],
)
def test_add_asks_for_the_way_of_the_data_that_an_option_names(
    requests: list[Request], option: str, data: str
) -> None:
    assert ublk("add", "-t", "null", *option.split()).exit_code == 0
    assert requests[0].options.data == data


def test_add_makes_the_files_path_absolute(
    requests: list[Request], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    ublk("add", "-t", "loop", "-f", "d.img", "-R")
    assert requests[0].spec.path == str(tmp_path / "d.img")
    assert requests[0].spec.read_only


@pytest.mark.parametrize(
    ("text", "nr_bytes"),
    [
        ("4096", 4096),
        ("64M", 64 << 20),
        ("64m", 64 << 20),
        ("1GiB", 1 << 30),
        ("512KB", 512000),
        ("2T", 2 << 40),
    ],
)
def test_add_takes_a_size_with_a_suffix(requests: list[Request], text: str, nr_bytes: int) -> None:
    ublk("add", "-t", "ram", "--size", text)
    assert requests[0].spec.nr_bytes == nr_bytes


def test_add_takes_the_metadata_of_blocks_as_the_kernels_test_server_does(
    requests: list[Request],
) -> None:
    words = "--integrity_capable --integrity_reftag --metadata_size 64 --pi_offset 48"
    ublk(*f"add -t loop -u {words} --csum_type nvme /srv/d.img /srv/d.pi".split())
    spec = requests[0].spec
    assert (spec.path, spec.metadata_path) == ("/srv/d.img", "/srv/d.pi")
    assert spec.metadata == Metadata(
        64, pi_offset=48, csum="nvme", is_capable=True, has_reftag=True
    )
    assert requests[0].options.data == "usercopy"


def test_add_of_null_without_a_size_has_the_reference_servers(requests: list[Request]) -> None:
    ublk("add", "-t", "null")
    assert requests[0].spec.nr_bytes == 250 << 30


@pytest.mark.parametrize(
    "line",
    [
        "add",
        "add -t loop",
        "add -t nbd -f /srv/d.img",
        "add -t ram",
        "add -t ram --size 64M -r 1",
        "add -t null -f /srv/d.img",
        "add -t null -o 8",
        "add -t null --buffered_io",
        "add -t ram --size 64M -R",
        "add -t null --size 0",
        "add -t null --size 100",
        "add -t null --size 1X",
        "add -t null --size -4096",
        "add -t null --size 8E",
        "add -t null -q 0",
        "add -t null -q 4097",
        "add -t null -d 0",
        "add -t null -d 4097",
        "add -t null -n -2",
        "add -t null -n 1048576",
        "add -t null -r 2",
        "add -t null -r 1 --recovery reissue",
        "add -t null -i 1 --recovery_deadline 5",
        "add -t null --recovery none --recovery_deadline 5",
        "add -t null --size 2048 --sector_size 4096",
        "add -t null --recovery_deadline 0",
        "add -t ram --size 64M --recovery reissue",
        "add -t null -r yes",
        "add -t null -i 1 -e 1",
        "add -t null --max_io_buf_bytes 4095",
        "add -t null --max_io_buf_bytes 5000",
        "add -t null --max_io_buf_bytes 33558528",
        "add -t null --policy 2015",
        "add -t loop -f /srv/d.img -o -1",
        "add -t loop -f /srv/d.img -o 18014398509481984",
        "add -t null --shmem_zc",
        "add -t loop -f /srv/d.img --delay_us 1",
        "add -t null --delay_us -1",
        "add -t loop -f /srv/d.img --chunk_size 64K",
        "add -t loop /srv/d.img /srv/e.img",
        "add -t stripe",
        "add -t stripe --size 1G /srv/d.img /srv/e.img",
        "add -t stripe --chunk_size 2048 /srv/d.img /srv/e.img",
        "add -t stripe --chunk_size 96K /srv/d.img /srv/e.img",
        "add -t stripe --chunk_size 1M /srv/d.img /srv/e.img",
        "add -t stripe -R /srv/d.img /srv/e.img",
        f"add -t stripe {'/srv/d.img ' * 17}",
        "add -t null extra",
        "add -t loop -f /srv/d.img /srv/d.img",
        "add -t null -T 2 --nthreads 4",
        "add -t null -T 2 -b",
        "add -t null --io_desc_size 16",
        "add -t null --io_desc_size 36",
        "add -t null --io_desc_size 264",
        "add -t null --metadata_size 256",
        "add -t null --metadata_size 8 --delay_us 1",
        "add -t null --metadata_size 8 --csum_type nvme",
        "add -t null --metadata_size 8 --csum_type ip --pi_offset 1",
        "add -t null --metadata_size 8 --integrity_reftag",
        "add -t null --csum_type ip",
        "add -t ram --size 64M --metadata_size 8",
        "add -t loop -f /srv/d.img --metadata_size 8",
        "add -t loop --metadata_size 8 /srv/d.img /srv/d.pi /srv/e.img",
    ],
)
def test_add_exits_with_2_and_starts_nothing_when_the_usage_is_wrong(
    requests: list[Request], line: str
) -> None:
    result = ublk(*line.split())
    assert result.exit_code == 2
    assert result.stdout == ""
    assert_names_the_help(result.stderr)
    assert requests == []


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        ("-t null", 0x18),
        ("-t null --recovery reissue", 0x18),
        ("-t null --recovery fail_inflight", 0x8),
        ("-t null --recovery fail_all", 0x208),
    ],
)
def test_device_of_the_daemon_is_recovered_by_it_within_the_deadline(
    words: str, flags: int
) -> None:
    request = request_of(cli_add.parse_add(words.split()), supervised=True)
    assert (request.options.flags, request.options.recovery_deadline_s) == (flags, 60)
    words += " --recovery_deadline 5"
    request = request_of(cli_add.parse_add(words.split()), supervised=True)
    assert (request.options.flags, request.options.recovery_deadline_s) == (flags, 5)


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        ("-t null --recovery none", 0),
        ("-t null -r 0", 0),
        ("-t null -i 1", 0x18),
        ("-t null -r 1", 0x8),
        ("-t null --unprivileged", 0x20),
        ("-t ram --size 1M", 0),
    ],
)
def test_device_of_the_daemon_is_recovered_by_hand_or_not_at_all_when_told(
    words: str, flags: int
) -> None:
    request = request_of(cli_add.parse_add(words.split()), supervised=True)
    assert (request.options.flags, request.options.recovery_deadline_s) == (flags, None)


@pytest.mark.parametrize("line", ["add -t loop -f", "add -t stripe a.img", "losetup -f --show"])
def test_a_file_without_a_name_is_no_folder(requests: list[Request], line: str) -> None:
    # A bug: "Is a directory", said of the one that the command was called in.
    result = ublk(*line.split(), "")
    assert (result.exit_code, result.stdout, requests) == (2, "", [])
    assert_names_the_help(result.stderr)
    assert "the name of a file is empty" in result.stderr


def test_path_is_taken_from_the_folder_of_the_daemons_client() -> None:
    given = cli_add.parse_add(["-t", "loop", "-f", "../d.img"])
    assert request_of(given, cwd="/srv/a").spec.path == "/srv/d.img"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            DriverError(errno.EBUSY, "START_DEV dev 3", "delete it"),
            "ublk: START_DEV dev 3: Device or resource busy: delete it\n",
        ),
        (BackingFileError(errno.ENOENT, "/no"), "ublk: /no: No such file or directory\n"),
        (DaemonError(errno.ESRCH, "add"), "ublk: add: No such process\n"),
    ],
)
def test_add_prints_one_line_and_exits_with_1_when_the_server_fails(
    monkeypatch: pytest.MonkeyPatch, error: Exception, line: str
) -> None:
    def launch(*_: object, **__: object) -> object:
        raise error

    monkeypatch.setattr(launching, "launch", launch)
    result = ublk("add", "-t", "null")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", line)


def test_check_flags_names_a_mode_that_this_version_lacks() -> None:
    with pytest.raises(DriverError) as caught:
        server.check_flags(uapi.UBLK_F_SUPPORT_ZERO_COPY, 0, ~0)
    assert caught.value.errno == errno.EOPNOTSUPP
    assert "ZERO_COPY" in str(caught.value)
    assert "this version" in str(caught.value)


def test_check_flags_names_a_mode_that_the_driver_lacks() -> None:
    both = uapi.UBLK_F_USER_RECOVERY | uapi.UBLK_F_USER_RECOVERY_FAIL_IO
    with pytest.raises(DriverError) as caught:
        server.check_flags(both, both, uapi.UBLK_F_USER_RECOVERY)
    assert "RECOVERY_FAIL_IO" in str(caught.value)
    assert "USER_RECOVERY," not in str(caught.value)
    assert "this driver" in str(caught.value)


def test_check_flags_leaves_it_to_add_dev_when_the_driver_cannot_be_asked() -> None:
    server.check_flags(uapi.UBLK_F_USER_RECOVERY, uapi.UBLK_F_USER_RECOVERY, 0)
