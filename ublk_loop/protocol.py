"""The messages between the CLI and the daemon, and between a server and who started it.

    CLI -> daemon     one request a connection: Run, Add, Recover, Upgrade, Reload, Status, Stop
    daemon -> CLI     one Reply; to a Run, whose client is csrc/client.c, in the form of pack_output
    server -> parent  reports, until the device is live: added, then live or error

Each is a JSON object on a line of its own. What comes in is checked whole: exactly the members that
the message has, each of its type and range, and no longer than a limit; anything else is a
ValueError of one sentence. Plain dataclasses and the checks of the state files do that: a library
would be one more import in a process that forks, for seven messages. Pure; runs everywhere.
"""

from __future__ import annotations

import errno
import json
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from .errors import BackingFileError, DaemonError, DriverError, UblkLoopError
from .state import (
    MAX_DEV_ID,
    DeviceOptions,
    Fields,
    Json,
    JsonValue,
    TargetSpec,
    parse_json,
    parse_options,
    parse_spec,
)

MAX_REQUEST_BYTES = 256 << 10
MAX_REPLY_BYTES = 16 << 20
MAX_WORDS = 256
MAX_WORD_BYTES = 8192

EXIT_DO_IT_YOURSELF = -1  # of a Reply: the daemon sees other files than its client

_ERRORS = (BackingFileError, DaemonError, DriverError, UblkLoopError)


class UsageRefused(ValueError):
    """Words that the command does not take; the text is the whole line."""


class Refused(DaemonError):
    """What the daemon did not do; the text is complete."""

    def __init__(self, text: str) -> None:
        super().__init__(errno.EREMOTEIO, "daemon", text)

    def __str__(self) -> str:
        return self.hint.strip().removeprefix("ublk: ")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.hint,)


@dataclass(frozen=True)
class Run:
    """Do ``ublk WORDS`` in a fork of the daemon, of which ``version`` must be the client's.

    :param environment: the client's variables whose names begin with UBLK_LOOP_.
    """

    version: str
    words: tuple[str, ...]
    cwd: str
    environment: dict[str, str]


@dataclass(frozen=True)
class Add:
    """Add a device: the words behind ``ublk add``, and what else they depend on."""

    words: tuple[str, ...]
    cwd: str = "/"
    two_lines: bool = False


@dataclass(frozen=True)
class Recover:
    """Start a server for a device that waits for one."""

    dev_id: int
    as_json: bool = False
    two_lines: bool = False


@dataclass(frozen=True)
class Upgrade:
    """Replace the server of a device by one of the daemon's present code."""

    dev_id: int


@dataclass(frozen=True)
class Reload:
    """Execute the daemon anew, by another Python: that of what is installed now.

    The reply's document says whether it ``reloads``: not while a device or a command is on its way.
    """

    executable: str


@dataclass(frozen=True)
class Status:
    """Tell of the daemon and its devices."""


@dataclass(frozen=True)
class Stop:
    """End the daemon; the devices are served on."""


Request: TypeAlias = "Run | Add | Recover | Upgrade | Reload | Status | Stop"
_COMMANDS: dict[str, type[Request]] = {
    "run": Run,
    "add": Add,
    "recover": Recover,
    "upgrade": Upgrade,
    "reload": Reload,
    "status": Status,
    "stop": Stop,
}


@dataclass(frozen=True)
class Reply:
    """What the CLI does with the answer: print ``out`` and ``err``, and exit."""

    exit_code: int = 0
    out: str = ""
    err: str = ""
    document: Json | None = None


def document(request: Request) -> dict[str, Any]:
    """Return the JSON object that is ``request``."""
    [name] = [name for name, kind in _COMMANDS.items() if type(request) is kind]
    return {"command": name, **asdict(request)}


def pack_request(request: Request) -> bytes:
    """Return the line that is ``request``."""
    return _pack(document(request))


def parse_request(line: bytes) -> Request:
    """Return the request that ``line`` holds.

    :raises ValueError: what is wrong with it, one sentence.
    """
    document = parse_json(line, MAX_REQUEST_BYTES)
    if not isinstance(document, dict):
        raise ValueError("it is not an object")
    name = document.pop("command", None)
    kind = _COMMANDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ValueError("command is none of " + ", ".join(_COMMANDS))
    fields = Fields(f"command {name}", document, *kind.__dataclass_fields__)
    if kind is Run:
        return Run(
            fields.text("version"),
            _parse_words(fields),
            _parse_path(fields, "cwd"),
            _parse_environment(fields),
        )
    if kind is Add:
        return Add(_parse_words(fields), _parse_path(fields, "cwd"), fields.boolean("two_lines"))
    if kind is Recover:
        return Recover(
            fields.integer("dev_id", 0, MAX_DEV_ID),
            fields.boolean("as_json"),
            fields.boolean("two_lines"),
        )
    if kind is Upgrade:
        return Upgrade(fields.integer("dev_id", 0, MAX_DEV_ID))
    if kind is Reload:
        return Reload(_parse_path(fields, "executable"))
    return Stop() if kind is Stop else Status()


def _parse_words(fields: Fields) -> tuple[str, ...]:
    words = fields.value("words")
    if not isinstance(words, list) or len(words) > MAX_WORDS:
        raise ValueError(f"words is not a list of at most {MAX_WORDS}")
    return tuple(_parse_word(word) for word in words)


def _parse_word(word: JsonValue) -> str:
    if not isinstance(word, str) or "\0" in word or len(word) > MAX_WORD_BYTES:
        raise ValueError(f"a word is not a text of at most {MAX_WORD_BYTES} characters")
    return word


def _parse_environment(fields: Fields) -> dict[str, str]:
    variables = fields.mapping("environment")
    if len(variables) > MAX_WORDS or not all(name.startswith("UBLK_LOOP_") for name in variables):
        raise ValueError(f"environment is not at most {MAX_WORDS} variables named UBLK_LOOP_*")
    return {_parse_word(name): _parse_word(value) for name, value in variables.items()}


def _parse_path(fields: Fields, name: str) -> str:
    path = _parse_word(fields.text(name))
    if not path.startswith("/"):
        raise ValueError(f"{name} is not absolute")
    return path


def pack_reply(reply: Reply) -> bytes:
    """Return the line that is ``reply``."""
    return _pack(asdict(reply))


def pack_output(reply: Reply) -> bytes:
    """Return a reply for csrc/client.c: exit code, two lengths; what goes to stdout, to stderr."""
    out, err = (text.encode(errors="surrogateescape") for text in (reply.out, reply.err))
    return b"%d %d %d\n%b%b" % (reply.exit_code, len(out), len(err), out, err)


def parse_reply(line: bytes) -> Reply:
    """Return the reply that ``line`` holds.

    :raises ValueError: what is wrong with it, one sentence.
    """
    fields = Fields("the reply", parse_json(line, MAX_REPLY_BYTES), *Reply.__dataclass_fields__)
    return Reply(
        exit_code=fields.integer("exit_code", EXIT_DO_IT_YOURSELF, 255),
        out=fields.text("out"),
        err=fields.text("err"),
        document=None if fields.value("document") is None else fields.mapping("document"),
    )


@dataclass(frozen=True)
class Wish:
    """What the words of an Add came to, as the process that read them tells the server."""

    dev_id: int
    options: DeviceOptions
    spec: TargetSpec
    as_json: bool
    two_lines: bool


def pack_wish(wish: Wish) -> bytes:
    """Return the line that is ``wish``."""
    return _pack(asdict(wish))


def parse_wish(line: bytes) -> Wish:
    """Return what :func:`pack_wish` packed.

    :raises UsageRefused: what the words came to is an error, by :func:`pack_error`.
    """
    document = parse_json(line, MAX_REQUEST_BYTES)
    if isinstance(document, dict) and "type" in document:
        raise unpack_error(document)
    fields = Fields("the wish", document, *Wish.__dataclass_fields__)
    return Wish(
        fields.integer("dev_id", -1, MAX_DEV_ID),
        parse_options(fields.value("options")),
        parse_spec(fields.value("spec")),
        fields.boolean("as_json"),
        fields.boolean("two_lines"),
    )


# ---- reports of a server to its parent ----


def pack_report(**report: Any) -> bytes:
    """Return the line that is a report."""
    return _pack(report)


def pack_error(error: Exception) -> dict[str, Any]:
    """Return an exception as a report carries it."""
    if isinstance(error, UblkLoopError):
        return {
            "type": type(error).__name__,
            "errno": error.errno,
            "what": error.what,
            "hint": error.hint,
        }
    if isinstance(error, OSError) and error.errno:
        return {"type": "DaemonError", "errno": error.errno, "what": "server", "hint": ""}
    return {"type": type(error).__name__, "text": str(error)}


def unpack_error(packed: dict[str, Any]) -> Exception:
    """Return the exception that :func:`pack_error` packed, as far as the caller knows its type."""
    for kind in _ERRORS:
        if packed["type"] == kind.__name__:
            return kind(packed["errno"], packed["what"], packed["hint"])
    if packed["type"] == "UsageRefused":
        return UsageRefused(packed["text"])
    if packed["type"] == "ValueError":
        return ValueError(packed["text"])
    return DaemonError(errno.EIO, "server", f"{packed['type']}: {packed['text']}")


def _pack(document: Any) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode() + b"\n"
