"""A daemon of the tests' own, with a state folder of theirs, and what they ask it for.

Python starts slowly in an emulated guest: most requests are made by the client in this process.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from typing import Any

from ublk_loop import client


class Daemon:
    """The daemon of the state folder that UBLK_LOOP_STATE_DIR names."""

    @property
    def pid(self) -> int:
        return int(self.status()["pid"])

    def start(self) -> None:
        client.start()

    def ask(self, command: str, **members: object) -> dict[str, Any]:
        reply = client.ask({"command": command, **members})
        assert reply is not None
        return reply

    def ask_add(self, line: str, *words: object) -> dict[str, Any]:
        """``ublk add LINE WORDS``; returns the reply."""
        said = [*line.split(), *map(str, words)]
        return self.ask("add", words=said, cwd="/", two_lines=False)

    def add(self, line: str, *words: object) -> dict[str, Any]:
        """``ublk add LINE WORDS --json``, which must succeed; returns the device."""
        reply = self.ask_add(line, *words, "--json")
        assert (reply["exit_code"], reply["err"]) == (0, "")
        device = json.loads(reply["out"])
        assert isinstance(device, dict)
        return device

    def status(self) -> dict[str, Any]:
        document = self.ask("status")["document"]
        assert isinstance(document, dict)
        return document

    def device(self, dev_id: int) -> dict[str, Any] | None:
        """What the daemon says of one device; None: nothing."""
        found = [each for each in self.status()["devices"] if each["dev_id"] == dev_id]
        return found[0] if found else None

    def server_pid(self, dev_id: int) -> int:
        """The pid of a device's server; 0 while there is none."""
        device = self.device(dev_id)
        return (device["server_pid"] or 0) if device and device["phase"] == "SERVED" else 0

    def kill_server(self, dev_id: int, wait_until: Callable[..., None]) -> int:
        """Kill the device's server, wait for the next one, and return its pid."""
        pid = self.server_pid(dev_id)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: self.server_pid(dev_id) not in (0, pid), timeout_s=60)
        return self.server_pid(dev_id)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """End the daemon itself."""
        pid = self.pid
        os.kill(pid, number)
        deadline = time.monotonic() + 20
        while os.path.exists(f"/proc/{pid}"):
            assert time.monotonic() < deadline
            time.sleep(0.01)
