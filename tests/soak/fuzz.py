"""Feed input by chance, led by coverage, to whatever reads what another process wrote.

Some inputs are bytes, others valid documents with members changed: JSON or TOML that gets past the
parser, to the checks of types and ranges.

    pip install -e '.[fuzz]'
    python tests/soak/fuzz.py -runs=1000000              all targets, one after another
    python tests/soak/fuzz.py state -runs=1000000        one of them; other options are libFuzzer's

An input must give a value or a ValueError of one line, within 5 s and 512 MiB. The first input that
does not ends the run with exit code 77, and lies in a file named crash-*, timeout-* or oom-*.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import atheris
import tomllib

with atheris.instrument_imports(include=["ublk_loop", "json", "tomllib"]):
    from ublk_loop import boot, protocol, state

LIMITS = ["-timeout=5", "-rss_limit_mb=512", "-max_len=8192", "-print_final_stats=1"]
STATE = state.DeviceState(
    dev_id=3,
    sysfs_ino=4711,
    server_pid=1234,
    server_start_ticks=987654,
    options=state.DeviceOptions(nr_hw_queues=2, flags=0x48, policy="base"),
    spec=state.TargetSpec("loop", path="/srv/disk one.img", nr_bytes=1 << 20, direct=True),
    target={"name": "loop", "dev_size": 1 << 20},
    queues=(state.QueueState(0, 1235, (0, 2)), state.QueueState(1, 1236, (1, 3))),
)
CONFIG = """
[device.0]
type = "loop"
file = "/srv/disk one.img"
queues = 2
direct_io = true
shmem = ["/dev/shm/a", "/dev/shm/b"]
[device.12]
type = "null"
size = "1G"
read_only = false
"""


def dump_toml(value: object) -> str:
    """Return a value of JSON in TOML, tables inline."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {dump_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dump_toml, value)) + "]"
    return "nan" if value is None else json.dumps(value)


def dump_config(document: dict[str, object]) -> str:
    """Return a document of TOML."""
    return "".join(f"{json.dumps(key)} = {dump_toml(value)}\n" for key, value in document.items())


@dataclass(frozen=True)
class Parser:
    """What parses, inputs to begin with, and what makes them documents and text again."""

    parse: Callable[[bytes], object]
    seeds: list[bytes]
    load: Callable[[str], Any] = json.loads
    dump: Callable[[Any], str] = json.dumps


TARGETS = {
    "state": Parser(
        state.parse,
        [json.dumps({"version": state.VERSION, **asdict(STATE)}).encode()],
    ),
    "request": Parser(
        protocol.parse_request,
        [
            protocol.pack_request(protocol.Add(("-t", "loop", "-f", "disk"), "/srv")),
            protocol.pack_request(protocol.Recover(3)),
            protocol.pack_request(protocol.Status()),
        ],
    ),
    "reply": Parser(
        protocol.parse_reply,
        [protocol.pack_reply(protocol.Reply(1, "out", "err", {"a": [1, None, "b"]}))],
    ),
    "toml": Parser(boot.parse, [CONFIG.encode()], tomllib.loads, dump_config),
}


def some_value(chance: atheris.FuzzedDataProvider, depth: int = 0) -> object:
    """A JSON value."""
    kind = chance.ConsumeIntInRange(0, 9 if depth < 3 else 6)
    if kind <= 1:
        return chance.ConsumeInt(9)
    if kind == 2:
        return chance.PickValueInList([0, 1, -1, 1 << 12, 1 << 31, 1 << 63, 1 << 64, 1 << 80])
    if kind == 3:
        return chance.ConsumeUnicode(12)
    if kind == 4:
        return chance.PickValueInList([None, True, False, 0.5, 1e300, "", "/", "/a\0b", "loop"])
    if kind <= 6:
        return chance.ConsumeBool()
    items = [some_value(chance, depth + 1) for _ in range(chance.ConsumeIntInRange(0, 3))]
    return items if kind <= 7 else {chance.ConsumeUnicode(8): item for item in items}


def change(node: object, chance: atheris.FuzzedDataProvider) -> None:
    """Change, add or remove something in a document."""
    while isinstance(node, (dict, list)) and node:
        keys = sorted(node) if isinstance(node, dict) else list(range(len(node)))
        key = keys[chance.ConsumeIntInRange(0, len(keys) - 1)]
        if isinstance(node[key], (dict, list)) and chance.ConsumeIntInRange(0, 3):
            node = node[key]
            continue
        if chance.ConsumeIntInRange(0, 9):
            node[key] = some_value(chance)
        elif chance.ConsumeBool():
            del node[key]
        elif isinstance(node, dict):
            node[chance.ConsumeUnicode(8)] = some_value(chance)
        return


def document(data: bytes, parser: Parser) -> bytes:
    """One of the valid documents, changed as the data says."""
    chance = atheris.FuzzedDataProvider(data)
    seed = parser.seeds[chance.ConsumeIntInRange(0, len(parser.seeds) - 1)]
    found = parser.load(seed.decode())
    for _ in range(chance.ConsumeIntInRange(1, 3)):
        change(found, chance)
    return parser.dump(found).encode()


def fuzz(name: str, options: list[str]) -> None:
    """Fuzz one target; never returns."""
    parser = TARGETS[name]

    def test_one_input(data: bytes) -> None:
        text = document(data[1:], parser) if data[:1] < b"\x40" else data
        try:
            parser.parse(text)
        except ValueError as error:
            if not str(error).isprintable():
                raise RuntimeError(f"more than a line of text: {error!r}") from error

    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(parser.seeds):
            parser.parse(seed)
            Path(corpus, f"seed{number}").write_bytes(seed)
            Path(corpus, f"change{number}").write_bytes(bytes([number]) * 40)
        atheris.Setup([sys.argv[0], *LIMITS, *options, corpus], test_one_input)
        atheris.Fuzz()


def main() -> int:
    names = [word for word in sys.argv[1:] if word in TARGETS]
    options = [word for word in sys.argv[1:] if word not in TARGETS]
    if len(names) == 1:
        fuzz(names[0], options)
    # libFuzzer ends the process that it runs in.
    for name in names or TARGETS:
        code = subprocess.run([sys.executable, __file__, name, *options]).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
