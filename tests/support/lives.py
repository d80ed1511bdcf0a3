"""The states of devices as a model has them, and a machine that drives real ones beside it.

Hypothesis chooses what is done, in any order: add, write, resize, upgrade, recover, delete, hold
open, end or kill a server, kill, stop and start the daemon. Each rule waits until what it did has
come about; after it driver, `ublk list`, the daemon and the files must say what the model says.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from daemons import Daemon
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from servers import reap_children

from ublk_loop import cli, uapi
from ublk_loop.control import Control, list_dev_ids

FILE_BYTES = 64 << 10
GROWTH_BYTES = 32 << 10
BLOCK_BYTES = 4096
MAX_NR_DEVICES = 3
SETTLE_TIMEOUT_S = 60
STATES = {
    "LIVE": uapi.UBLK_S_DEV_LIVE,
    "QUIESCED": uapi.UBLK_S_DEV_QUIESCED,
    "DEAD": uapi.UBLK_S_DEV_DEAD,
}
# Who replaces a server that dies: the daemon, a person, nobody.
KINDS = {"kept": [], "by_hand": ["-i", "1"], "lost": ["--recovery", "none"]}

some_device = st.integers(0, MAX_NR_DEVICES - 1)
some_block = st.integers(0, FILE_BYTES // BLOCK_BYTES - 1)


@dataclass
class Life:
    """What a device should be."""

    dev_id: int
    kind: str
    path: Path
    data: bytearray
    server_pid: int
    state: str = "LIVE"
    holder: Any = None

    @property
    def block_path(self) -> str:
        return f"/dev/ublkb{self.dev_id}"


@dataclass(frozen=True)
class World:
    """What the machine needs of the test: its tools, its folders, and what the driver can."""

    folder: Path
    state_dir: Path
    features: int
    open_block: Callable[..., Any]
    wait_until: Callable[..., None]


class Lives(RuleBasedStateMachine):
    """Devices and their model."""

    nr_steps = 0

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.lives: list[Life] = []
        self.daemon = Daemon()
        self.daemon_runs = False
        self.nr_files = 0

    # ---- rules ----

    @initialize()
    def begin(self) -> None:
        self.start_daemon()

    @precondition(lambda self: len(self.lives) < MAX_NR_DEVICES)
    @rule(kind=st.sampled_from(sorted(KINDS)))
    def add(self, kind: str) -> None:
        self.nr_files += 1
        path = self.world.folder / f"file{self.nr_files}"
        path.write_bytes(bytes(FILE_BYTES))
        if not self.daemon_runs:
            self.start_daemon()  # as `ublk add` does
        added = self.daemon.add("-t loop -f", path, *KINDS[kind])
        assert added["dev_id"] not in [life.dev_id for life in self.lives]
        life = Life(added["dev_id"], kind, path, bytearray(FILE_BYTES), added["server_pid"])
        self.lives.append(life)
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # as the server has it
            with pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    @precondition(lambda self: self.alive())
    @rule(n=some_device, block=some_block, letter=st.integers(1, 255))
    def write(self, n: int, block: int, letter: int) -> None:
        life = self.pick(n, self.alive())
        data = bytes([letter]) * BLOCK_BYTES
        with self.world.open_block(life.block_path) as client_:
            assert client_.write(block * BLOCK_BYTES, data) == BLOCK_BYTES
        life.data[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES] = data

    @precondition(lambda self: self.alive())
    @rule(n=some_device)
    def resize(self, n: int) -> None:
        life = self.pick(n, self.alive())
        os.truncate(life.path, len(life.data) + GROWTH_BYTES)
        result = self.run("losetup", "-c", life.block_path)
        if self.world.features & uapi.UBLK_F_UPDATE_SIZE:
            assert result.exit_code == 0, result.output
            life.data += bytes(GROWTH_BYTES)
        else:
            assert "does not offer it" in result.stderr
            os.truncate(life.path, len(life.data))

    @precondition(lambda self: self.alive())
    @rule(n=some_device)
    def kill_server(self, n: int) -> None:
        life = self.pick(n, self.alive())
        if life.kind == "lost":
            self.release(life)
        os.kill(life.server_pid, signal.SIGKILL)
        if life.kind == "kept" and self.daemon_runs:
            self.wait_for_server(life)
            return
        life.state = "DEAD" if life.kind == "lost" else "QUIESCED"
        self.wait(lambda: driver_state(life.dev_id) == STATES[life.state])
        if life.state == "DEAD":
            self.wait(lambda: not os.path.exists(life.block_path))
        self.wait_until_forgotten(life)

    @precondition(lambda self: self.alive())
    @rule(n=some_device)
    def end_server(self, n: int) -> None:
        life = self.pick(n, self.alive())
        self.release(life)
        os.kill(life.server_pid, signal.SIGTERM)
        self.wait(lambda: life.dev_id not in list_dev_ids())
        self.wait(lambda: not os.path.exists(f"/proc/{life.server_pid}"))
        self.forget(life)

    @precondition(lambda self: self.lives)
    @rule(n=some_device)
    def recover(self, n: int) -> None:
        life = self.pick(n, self.lives)
        result = self.run("recover", "-n", life.dev_id, "--json")
        if life.state == "QUIESCED":
            assert result.exit_code == 0, result.output
            life.state, life.server_pid = "LIVE", json.loads(result.stdout)["server_pid"]
        else:
            assert result.exit_code == 1
            assert "is alive" in result.stderr or "delete it" in result.stderr

    @precondition(lambda self: self.alive())
    @rule(n=some_device)
    def upgrade(self, n: int) -> None:
        life = self.pick(n, self.alive())
        result = self.run("upgrade", "-n", life.dev_id, "--json")
        [done] = json.loads(result.stdout)
        if life.kind == "lost":
            assert result.exit_code == 1
            assert "without recovery" in done["error"]
        else:
            assert result.exit_code == 0, result.output
            assert done["done"]["old_server_pid"] == life.server_pid
            life.server_pid = done["done"]["server_pid"]

    @precondition(lambda self: [life for life in self.lives if life.holder])
    @rule(n=some_device)
    def delete_what_is_held(self, n: int) -> None:
        life = self.pick(n, [life for life in self.lives if life.holder])
        result = self.run("del", "-n", life.dev_id)
        assert result.exit_code == 1
        assert f"is open in pid {os.getpid()}" in result.stderr

    @precondition(lambda self: [life for life in self.lives if not life.holder])
    @rule(n=some_device)
    def delete(self, n: int) -> None:
        self.delete_life(self.pick(n, [life for life in self.lives if not life.holder]))

    @precondition(lambda self: [life for life in self.alive() if not life.holder])
    @rule(n=some_device)
    def hold(self, n: int) -> None:
        life = self.pick(n, [life for life in self.alive() if not life.holder])
        life.holder = self.world.open_block(life.block_path)

    @precondition(lambda self: [life for life in self.lives if life.holder])
    @rule(n=some_device)
    def let_go(self, n: int) -> None:
        self.release(self.pick(n, [life for life in self.lives if life.holder]))

    @precondition(lambda self: self.daemon_runs)
    @rule(how=st.sampled_from([signal.SIGKILL, signal.SIGTERM]))
    def end_daemon(self, how: signal.Signals) -> None:
        self.daemon.kill(how)
        self.daemon_runs = False

    @precondition(lambda self: not self.daemon_runs)
    @rule()
    def start_daemon(self) -> None:
        self.daemon.start()
        self.daemon_runs = True
        for life in self.lives:
            if life.kind == "kept" and life.state == "QUIESCED":
                self.wait_for_server(life)

    # ---- after each ----

    @invariant()
    def all_agree(self) -> None:
        type(self).nr_steps += 1
        reap_children()
        by_id = {life.dev_id: life for life in self.lives}
        listed = json.loads(self.run("list", "--json").stdout)
        assert [each["dev_id"] for each in listed] == sorted(by_id) == list_dev_ids()
        assert state_files(self.world.state_dir) == sorted(by_id)
        for each in listed:
            life = by_id[each["dev_id"]]
            assert each["state"] == life.state
            assert each["target"]["backing_file"] == str(life.path)
            assert driver_state(life.dev_id) == STATES[life.state]
            assert os.path.exists(life.block_path) == (life.state != "DEAD")
            if life.state != "DEAD":
                assert each["nr_sectors"] == len(life.data) // uapi.SECTOR_BYTES
                assert nr_sectors(life.dev_id) == each["nr_sectors"]
            if life.state == "LIVE":
                self.check_alive(life, each)
        if self.daemon_runs:
            self.check_daemon()

    def check_alive(self, life: Life, listed: dict[str, Any]) -> None:
        assert listed["server_pid"] == life.server_pid
        assert os.path.exists(f"/proc/{life.server_pid}")
        with self.world.open_block(life.block_path, read_only=True) as client_:
            assert client_.read(0, len(life.data)) == life.data

    def check_daemon(self) -> None:
        status = self.daemon.status()
        served = {each["dev_id"]: each["server_pid"] for each in status["devices"]}
        assert served == {life.dev_id: life.server_pid for life in self.alive()}
        assert {each["phase"] for each in status["devices"]} <= {"SERVED"}
        assert status["orphans"] == sorted(set(list_dev_ids()) - set(served))

    def teardown(self) -> None:
        for life in list(self.lives):
            self.release(life)
            self.delete_life(life)
        assert list_dev_ids() == []
        assert state_files(self.world.state_dir) == []
        assert list(Path("/dev").glob("ublk[bc]*")) == []
        if not self.daemon_runs:
            self.start_daemon()
        self.check_daemon()

    # ---- small change ----

    def alive(self) -> list[Life]:
        return [life for life in self.lives if life.state == "LIVE"]

    def pick(self, n: int, lives: list[Life]) -> Life:
        return lives[n % len(lives)]

    def run(self, *words: object) -> Result:
        return CliRunner().invoke(cli.cli, [str(word) for word in words], prog_name="ublk")

    def wait(self, predicate: Callable[[], object]) -> None:
        self.world.wait_until(predicate, timeout_s=SETTLE_TIMEOUT_S)

    def wait_for_server(self, life: Life) -> None:
        self.wait(lambda: self.daemon.server_pid(life.dev_id) not in (0, life.server_pid))
        life.state, life.server_pid = "LIVE", self.daemon.server_pid(life.dev_id)

    def wait_until_forgotten(self, life: Life) -> None:
        if self.daemon_runs:
            self.wait(lambda: self.daemon.device(life.dev_id) is None)

    def release(self, life: Life) -> None:
        if life.holder is not None:
            life.holder.__exit__()
            life.holder = None

    def delete_life(self, life: Life) -> None:
        result = self.run("del", "-n", life.dev_id)
        assert (result.exit_code, result.stderr) == (0, "")
        self.forget(life)

    def forget(self, life: Life) -> None:
        self.wait_until_forgotten(life)
        self.lives.remove(life)
        assert life.path.read_bytes() == life.data
        life.path.unlink()


def driver_state(dev_id: int) -> int:
    """Return UBLK_S_DEV_* of a device."""
    with Control() as control:
        return control.get_dev_info(dev_id).state


def nr_sectors(dev_id: int) -> int:
    """Return the size that the block layer has."""
    return int(Path(f"/sys/block/ublkb{dev_id}/size").read_text())


def state_files(folder: Path) -> list[int]:
    """Return the devices that have a state file."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(int(path.stem) for path in folder.glob("*.json"))
    return []
