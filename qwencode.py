#!/usr/bin/env python3
"""Claude Code on a local Qwen model: the Messages API in front of Ollama.

    python qwencode.py            serve on 127.0.0.1:8000 (the default command)
    python qwencode.py demo       see it work without Ollama or Claude Code
    python qwencode.py --help     every command and option

One file, standard library only, Python 3.9 or newer. It reads from top to
bottom: a section uses only what stands above it, and nothing above the banner
"I/O BELOW THIS LINE" touches a socket, a file, the clock or the environment.

     1 LIMITS            every number and fixed name, with its reason
     2 ERRORS            one class per cause; the HTTP status belongs to it
     3 CONFIG            one table of options: names, flags, defaults, help
     4 TYPES             the neutral words between the two protocols
     5 CODECS            bytes, lines, JSON and server-sent events
     6 REQUEST IN        a Messages body becomes a Request
     7 REQUEST OUT       a Request becomes an Ollama body
     8 UPSTREAM STREAMS  Ollama's answer becomes deltas
     9 TOOL CALLS IN TEXT   calls that the model wrote as text
    10 SHELL COMMANDS    a file operation becomes Bash that proves its effect
    11 RESCUE            a request that was described, not carried out
    12 REPLIES           deltas become Messages API events
    13 TURN              one request, composed from the sections above
    14 STATUS            counters as JSON, metrics and a page
    15 UPSTREAM          the HTTP client
    16 SERVER            the HTTP server
    17 CLI               the commands

Invariants of every event stream (checked by tests/helpers.py on every test):
 1 message_start comes first, once. 2 Block indexes are 0, 1, 2 ...; at most one
 block is open. 3 An opened block is closed before the next one and before
 message_delta. 4 A stream ends with message_delta and message_stop, or with
 error; with neither only when the client left. 5 tool_use starts with an empty
 input and its deltas join to one JSON object, except the last call of a turn
 that the model left unfinished. 6 How bytes are cut never changes the events;
 how text is cut never changes them once neighbouring deltas are joined.
 7 Every character received is shown once or consumed by a tool call. 8 Every
 tool name sent is one of the request's tools. 9 No empty text block is sent.
"""
from __future__ import annotations

import contextlib
import errno
import importlib
import json
import math
import os
import re
import select
import socket
import sys
import threading
import time
from collections import deque, namedtuple
from functools import cache, lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from types import SimpleNamespace
from typing import (
    TYPE_CHECKING,
    AbstractSet,
    Any,
    Callable,
    ClassVar,
    ContextManager,
    Deque,
    Dict,
    FrozenSet,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
    Type,
    TypeVar,
    Union,
)

__version__ = "0.1.0"

Json = Dict[str, Any]
Value = TypeVar("Value")
# Modules that serving needs rarely or never are imported where they are used: argparse,
# subprocess and ssl alone would cost 25 ms of a start of 70 (issue: the relay's cost).
late = importlib.import_module

if not TYPE_CHECKING:
    class RowType(type):
        """Make a namedtuple of a class with annotated names, as typing.NamedTuple does.

        Typing's also compiles every annotation, which nobody reads here: 7 ms of a start.
        """

        def __new__(cls, name, bases, body):
            if not bases:
                return super().__new__(cls, name, bases, body)
            fields = body["__annotations__"]
            defaults = [body.pop(field) for field in fields if field in body]
            made = namedtuple(name, fields, defaults=defaults, module=body["__module__"])
            for attribute, value in body.items():
                setattr(made, attribute, value)
            return made

    class NamedTuple(metaclass=RowType):
        pass


class Pattern:
    """A regular expression that is compiled on its first use.

    Compiling 70 patterns at import costs 7.5 ms of start-up; most runs need few.
    """

    search: Callable[..., Optional[re.Match[str]]]
    match: Callable[..., Optional[re.Match[str]]]
    fullmatch: Callable[..., Optional[re.Match[str]]]
    finditer: Callable[..., Iterable[re.Match[str]]]
    findall: Callable[..., List[Any]]
    split: Callable[..., List[Any]]
    sub: Callable[..., str]

    def __init__(self, source: str, flags: int = 0) -> None:
        self.source, self.flags = source, flags

    def __getattr__(self, name: str) -> Any:
        compiled = re.compile(self.source, self.flags)
        for method in ("search", "match", "fullmatch", "finditer", "findall", "split", "sub"):
            setattr(self, method, getattr(compiled, method))
        return getattr(compiled, name)


# ============================== 1. LIMITS ==============================

# Bytes of a request body: the Messages API answers 413 above 32 MB, so the CLI
# never sends more (reliability: Anthropic API errors).
MAX_BODY_BYTES = 32 * 1024 * 1024
# Bytes of a request line and headers together: nginx takes 8 KB a line, h11 and
# Node 16 KB for all; the CLI's are under 2 KB.
MAX_HEAD_BYTES = 16 * 1024
MAX_HEADERS = 100  # http.client's bound
# Bytes of one upstream line: Ollama's own client stops at 8 MB, its runner hop too,
# but a relay may put more behind it (contract/ollama.md 2, "Line length").
MAX_LINE_BYTES = 32 * 1024 * 1024
# Bytes of an upstream answer that is read whole: /api/show of a large model is 1 MB,
# a rendered prompt as long as the body it was made from, escaped.
MAX_ANSWER_BYTES = 64 * 1024 * 1024
MAX_ERROR_CHARS = 2000  # of an upstream's error text that is passed on
# Characters of held text behind a possible tool call where later words may decide.
MAX_HOLD_CHARS = 4096
TIDY_S = 10  # between two returns of freed memory, 2 ms each
READ_BYTES = 65536  # one read of a socket: 64 KB is what loopback delivers at once

# Seconds until message_start goes out although Ollama is silent, and between
# keep-alives from then on: the CLI drops a stream after 300 s without an event that
# is no ping (contract/claude-code.md B3), gateways after 20 s.
FIRST_EVENT_S = 15.0
KEEP_ALIVE_S = 10.0
# Seconds: nginx gives a header or a part of a body 60, CIS asks for less.
HEAD_PROGRESS_S = 30.0
IDLE_CONNECTION_S = 300.0  # the CLI keeps its connections so long (A1)
# Requests at work from which one thread relays their streams: 50 take three quarters of
# the CPU so, a few would gain nothing. And seconds until that thread ends without any.
MANY_STREAMS = 32
IDLE_RELAY_S = 1.0
MAX_DESCRIPTORS = 4096  # 1,536 connections and what their requests open
ACCEPT_PAUSE_S = 0.1  # when accepting fails: too many open files
CONNECT_S = 10.0  # a server that takes longer to accept is not there
HEALTH_S = 0.8  # /health answers within a second
HEALTH_TTL_S = 5.0  # for the status page: /api/show of a large model is 1 MB
DRAIN_S = 5.0  # running streams at shutdown
# A client that lags: bytes that may wait for it, and seconds without taking any.
MAX_PENDING_BYTES = 4 * 1024 * 1024
CLIENT_STALL_S = 30.0
FOLLOW_S = 1.0  # between looks at whether anybody still listens to a request
FACTS_TTL_S = 300.0  # what /api/show said is asked again after this
NO_FACTS_TTL_S = 15.0  # where it said nothing: it may have been starting
MAX_MODELS = 64  # models whose facts are remembered
MAX_KNOWN_TOOLS = 4  # lists of tools whose bytes are: a session's and its subagents'
MAX_TOOLS_CHARS = 1 << 20  # of such a list; the CLI's have 63 KB
MAX_NAMING_CHARS = 4096  # of a user's text that may name a tool: a pasted file names many
MAX_SESSIONS = 32  # conversations whose tools and written messages are kept
MIN_PROGRESS_BYTES = 1024  # a body that brings less in HEAD_PROGRESS_S dribbles
LINGER_S = 3.0  # a client that still sends may read its refusal for so long
MAX_TRAILERS = 100  # header lines behind a chunked body; nobody sends any
MIN_SECRET_CHARS = 8  # a client's shorter key is a word such as `local`, not a secret
BASH_CHECK_S = 2.0
MAX_RAW_TURNS = 512  # assistant turns remembered as the model wrote them
MAX_RAW_CHARS = 16 * 1024 * 1024  # of these together
IMAGE_TOKENS = 1760  # of 1568 x 882 pixels, the CLI's most, in Qwen-VL (28 x 28 a token)
DEFAULT_MAX_TOKENS = 32000  # what the CLI asks for with a model it does not know (A4)
# What the status page keeps: turns and, of rescues and errors each, the last few, so
# that an hour of work is seen and memory stays at some hundred kilobytes.
MAX_TURNS = 50
MAX_EVENTS = 20
SHOWN_SESSIONS = 12  # window gauges: a person's sessions and their subagents
# Different values of one metric label: our own rules and kinds are fewer; a client or
# an upstream that invents names must not grow the table.
MAX_LABELS = 64
MAX_LABEL_CHARS = 60
MAX_LOG_TOOLS = 4  # tool names in one log line; a turn can hold dozens of calls
# Upper bounds in seconds. First token: a cached prompt takes 0.02 s, a cold one of
# 20,000 tokens minutes. A token: 200/s on a large GPU, 1/s on a CPU.
FIRST_TOKEN_BOUNDS_S = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 600.0)
PER_TOKEN_BOUNDS_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)
# Counting (section 7). A text of more characters is counted by 36 slices and one more for
# each 2,048 characters, at most so many: two in three are within 3 % of counting it whole,
# 262 files of code, prose and logs within 10 %. 24 KB take 0.06 ms, 10 MB 1 ms, not 200.
WHOLE_TEXT_CHARS = 8192
SLICE_CHARS = 64
MAX_SLICES = 384
MAX_SLIM_KNOWN_CHARS = 16_384  # of a text that is kept with its slim form; 128 of them
MESSAGE_TOKENS = 5  # ChatML's own for each message (contract/ollama.md 5a)
MAX_KNOWN_TEXTS = 20_000  # texts whose counts are remembered, some 200 bytes each
MAX_ANCHORS = 256  # sessions of a model whose last count is remembered
ANCHOR_PARTS = (2, 3)  # tools and system text; and the first message, which makes a session
FACTOR_RANGE = (0.5, 2.5)  # times its estimate that a prompt can measure anywhere
DOUBTFUL_SHARE = 0.3  # a count so far off what was learned is believed when it comes twice
# Tokens: the compaction's instruction (6 KB, contract/claude-code.md A8) and a summary.
MAX_HEADROOM_TOKENS = 4096
# Shortening old messages: characters kept, and whether of all texts or of tool results.
SHORTEN_STEPS = ((8000, False), (4000, False), (2000, False), (1000, False), (400, False),
                 (4000, True), (1000, True), (300, True), (60, True))
MAX_ERROR_DEPTH = 8  # JSON in JSON of an upstream's error
ERROR_KEYS = ("error", "message", "detail", "title")
# Windows in tokens: what serves Claude Code (issue 7), what is stepped down to at most,
# and what is asked for when the cache fits MAX_KV_BYTES (6.5 GiB: 32,768 tokens of a 14B
# model of the Qwen 2.5 kind take 6).
SERVING_WINDOW = 32_768
MIN_WINDOW = 16_384
WINDOW_STEPS = (131_072, 65_536)
MAX_KV_BYTES = 13 * 2**29
KV_FACTS = ("block_count", "attention.head_count", "attention.head_count_kv",
            "attention.key_length", "embedding_length", "full_attention_interval")
NO_GPU_SHARE = 0.05  # of a model: below it there is no GPU
GOOD_GPU_SHARE = 0.85  # from here on the spill is bearable
CLI_MAX_RESERVE = 20_000  # tokens: the CLI's arithmetic of compaction (claude-code.md D)
CLI_BUFFER = 13_000
# The CLI's caps on a tool's result: units to a token of the window's eighth, default.
RESULT_CAPS = (("CLAUDE_CODE_FILE_READ_MAX_OUTPUT_TOKENS", 1, 25_000),
               ("MAX_MCP_OUTPUT_TOKENS", 1, 25_000), ("BASH_MAX_OUTPUT_LENGTH", 3, 30_000))
FIRST_PROMPT_TOKENS = 9_000  # the CLI's first prompt after slimming
MIN_WORK_TOKENS = 3_000  # what a session needs beyond it
MIN_ANSWER_TOKENS = 1024  # an answer may try, where the count leaves it in doubt
SUMMARY_TOKENS = 2_000  # room that a compaction's summary needs
MIN_MISS_S = 0.15  # a shorter read is a cache hit whatever the rate says

# Characters of a Bash command that the CLI's analyser still reads: 9,960 pass, 9,980
# need approval (contract/claude-code.md C2).
MAX_APPROVABLE_CHARS = 9_900
# Bytes of a Bash command, every single quote counted as 5: 130,600 run, 130,700 fail
# with E2BIG (C1, F6); the rest is for the CLI's own words around it.
MAX_BASH_BYTES = 130_000
# Bytes of content that are proven by their octal digits, three a byte, where no heredoc
# can carry them: longer ones are proven by SHA-256.
MAX_OCTAL_BYTES = 1_000


# ============================== 2. ERRORS ==============================

class ShimError(Exception):
    """Base of every failure that a client is told about.

    status is the HTTP status before the first event, kind the Messages API error
    type. retry=False sends `x-should-retry: false`, so that the user reads the
    sentence at once and not after 180 s of retries (contract/claude-code.md B1).
    """

    status, kind, retry = 500, "api_error", True
    cure = ""  # what helps where the message does not say it

    def __init__(self, message: str, retry_after: Optional[str] = None) -> None:
        super().__init__(message)
        self.message, self.retry_after = message, retry_after


class BadRequestError(ShimError):
    """The body is not a Messages request; the message names the field."""

    status, kind, retry = 400, "invalid_request_error", False


class PromptTooLongError(BadRequestError):
    """The words that make Claude Code compact (contract/claude-code.md B5).

    loaded: maximum is the window that Ollama says it has, not what the shim lets a turn use.
    """

    cure = "Type /compact, or give the model a larger OLLAMA_NUM_CTX."

    def __init__(self, tokens: int, maximum: int, *, loaded: bool = False) -> None:
        super().__init__(f"prompt is too long: {tokens} tokens > {maximum} maximum")
        self.tokens, self.maximum, self.loaded = tokens, maximum, loaded


class ModelMissingError(BadRequestError):
    """Ollama lacks the model. A 400: the CLI never shows a 404's text (B1)."""


class UnauthorizedError(ShimError):
    """The client's key is missing or wrong."""

    status, kind, retry = 401, "authentication_error", False
    cure = "Give the client the key of SHIM_API_KEY."


class ForbiddenError(ShimError):
    """A Host or Origin that is not this machine's."""

    status, kind, retry = 403, "permission_error", False


class NotFoundError(ShimError):
    """No such route."""

    status, kind, retry = 404, "not_found_error", False


class MethodNotAllowedError(ShimError):
    """A known route, another method; allow is the Allow header."""

    status, kind, retry = 405, "invalid_request_error", False

    def __init__(self, message: str, allow: str) -> None:
        super().__init__(message)
        self.allow = allow


class SlowRequestError(ShimError):
    """A header or body that stopped arriving."""

    status, kind, retry = 408, "timeout_error", False


class BodyTooLargeError(ShimError):
    """More than MAX_BODY_BYTES."""

    status, kind, retry = 413, "request_too_large", False


class HeadTooLargeError(ShimError):
    """More header bytes or lines than a client needs."""

    status, kind, retry = 431, "invalid_request_error", False


class NotImplementedCodingError(ShimError):
    """A transfer coding other than chunked (RFC 9112 6.1)."""

    status, kind, retry = 501, "invalid_request_error", False


class BusyError(ShimError):
    """Too much at once, here or at Ollama."""

    status, kind = 529, "overloaded_error"
    cure = "Wait for the running requests, or raise SHIM_MAX_CONCURRENT."


class RateLimitError(ShimError):
    """The upstream answered 429."""

    status, kind = 429, "rate_limit_error"


class StoppingError(ShimError):
    """The shim is being stopped."""

    status, kind, retry = 503, "api_error", False


class UpstreamRefusedError(ShimError):
    """Nothing answers at the base URL: trying again at once cannot help."""

    status, retry = 502, False


class UpstreamBrokenError(ShimError):
    """The answer broke off or made no sense; another try may succeed."""

    status = 502
    cure = "See Ollama's log; `python qwencode.py doctor` checks the model."


class UpstreamGarbageError(UpstreamBrokenError):
    """A line that is not JSON."""


class GivenUpError(UpstreamBrokenError):
    """An identical request that this one had joined lost its client."""

    cure = ""  # nothing is wrong with Ollama


class UpstreamLostError(UpstreamBrokenError):
    """The answer ended well but its text is gone or empty: asking again repeats it."""

    retry = False


class UpstreamInvalidError(ShimError):
    """A whole answer that is not JSON."""

    status, kind, retry = 502, "invalid_response_error", False


class UpstreamDeniedError(ShimError):
    """The upstream wants another login: its 401 or 403 is not the client's."""

    status, retry = 502, False
    cure = "Check OLLAMA_AUTH_TOKEN."


class UpstreamTimeoutError(ShimError):
    """The upstream was silent for longer than the timeout."""

    status, kind, retry = 504, "timeout_error", False
    cure = ("See `ollama ps`: the model may be too large for this machine."
            " SHIM_REQUEST_TIMEOUT_MS allows more time.")


class UpstreamFailedError(ShimError):
    """The upstream answered 5xx; retry is decided by its text."""

    cure = UpstreamBrokenError.cure

    def __init__(self, message: str, retry: bool, status: int = 500) -> None:
        super().__init__(message)
        self.retry, self.status = retry, status


class InternalError(ShimError):
    """A bug: told as such; the log says where."""


class ClientGoneError(Exception):
    """The client left: nobody is told, the upstream request is cancelled."""


def error_body(error: ShimError, request_id: str) -> Json:
    """Make the Messages API error object."""
    return {"type": "error", "error": {"type": error.kind, "message": error.message},
            "request_id": request_id}


# ============================== 3. CONFIG ==============================

# Model load and prefill of a long prompt take minutes on a small GPU (OL 2).
FIRST_TOKEN_TIMEOUT_MS = 600_000
SWITCH_WORDS = {**dict.fromkeys(("1", "true", "yes", "on"), True),
                **dict.fromkeys(("0", "false", "no", "off"), False)}
WHOLE_NUMBER = Pattern(r"[0-9]{1,12}")
# Scheme, login, host, port, path.
BASE_URL = Pattern(r"(https?)://(?:([^\s/?#]+)@)?(\[[0-9a-f:.]+\]|[\w.~%-]+)(?::([0-9]{1,5}))?"
                   r"(/[!\"$->@-~]*)?", re.IGNORECASE | re.ASCII)
# Scheme; a host in brackets, with two colons or without any; port; path. Fits every text.
OLLAMA_HOST = Pattern(r"(?:(.*?)://)?(\[[0-9a-f:.]+\]|[^/:]*:[^/:]*:[^/]*|[^/:]*)(?::([^/]*))?"
                      r"(/.*)?\Z", re.IGNORECASE | re.DOTALL)
PERCENT_CODED = Pattern(r"(?:%[0-9a-fA-F]{2})+")
URL_LOGIN = Pattern(r"://([^/\s]+)@")
KEEP_ALIVE = Pattern(r"-?[0-9]+(?:\.[0-9]+)?(?:(?:ns|us|ms|s|m|h)(?:[0-9.]+(?:ns|us|ms|s|m|h))*)?")
AUTO_CTX = Pattern(r"auto|off|[0-9]{1,12}", re.IGNORECASE)
CONTROL_CHARS = Pattern(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
# Where to connect for an address that means "every interface". The check takes it for a
# bind, which it is not.
CONNECTABLE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104


class ConfigError(Exception):
    """A value that cannot be used; the message is one line for the user."""


# ------------------------------ readers of a value ------------------------------
# Each returns the value or raises ConfigError with the words that follow it.

Env = Mapping[str, str]
Reader = Callable[[str], Any]


def checked(fits: Callable[[str], object], problem: str, read: Reader = str) -> Reader:
    """Make a reader that refuses what does not fit."""
    def reader(text: str) -> Any:
        if not fits(text):
            raise ConfigError(problem)
        return read(text)
    return reader


read_text = checked(lambda text: not CONTROL_CHARS.search(text), "holds a control character")
read_needed = checked(str.strip, "is empty", read_text)
read_number = checked(WHOLE_NUMBER.fullmatch, "is not a whole number", int)
read_port = checked(lambda text: read_number(text) < 65536, "is above 65535, the last port", int)
read_milliseconds = checked(read_number, "must be at least 1 millisecond", int)
read_switch = checked(lambda text: text.lower() in SWITCH_WORDS, "is neither on nor off",
                      lambda text: SWITCH_WORDS[text.lower()])
read_auto_ctx = checked(AUTO_CTX.fullmatch, "is neither auto, off nor a whole number", str.lower)
read_keep_alive = checked(KEEP_ALIVE.fullmatch, "is neither seconds nor a duration such as 30m")


def one_of(*choices: str) -> Reader:
    """Make a reader of one of these words."""
    return checked(lambda text: text.lower() in choices, f"is none of {', '.join(choices)}",
                   str.lower)


def some_of(*choices: str) -> Reader:
    """Make a reader of a comma-separated list of these words; off is the empty one."""
    def reader(text: str) -> Tuple[str, ...]:
        words = tuple(word.strip().lower() for word in text.split(",") if word.strip())
        for word in words:
            if word not in choices:
                raise ConfigError(f"holds {word!r}, none of {', '.join(choices)}")
        return () if "off" in words else words
    return reader


def read_url(text: str) -> str:
    """Return the URL without a trailing slash."""
    url = BASE_URL.fullmatch(text)
    if not url or not 0 < int(url.group(4) or 80) < 65536:
        raise ConfigError("is not a URL such as http://127.0.0.1:11434")
    return text.rstrip("/")


def read_model_map(text: str) -> Tuple[Tuple[str, str], ...]:
    """Read "haiku=qwen3:4b,opus=qwen3:30b" into pairs."""
    parts = (part.partition("=") for part in text.split(",") if part.strip())
    pairs = tuple((role.strip().lower(), model.strip()) for role, _, model in parts)
    if not all(map(all, pairs)):
        raise ConfigError("is not ROLE=MODEL")
    return pairs


class Option(NamedTuple):
    """One row of Config.

    default is the text that an unset variable stands for, which read takes, too.
    """

    variable: str
    default: str
    read: Reader
    help: str
    secret: bool = False
    name: str = ""


def option(variable: str, default: str, read: Reader, text: str, secret: bool = False) -> Any:
    """Make a row in the place of a field's default, which no Config is made with."""
    return Option(variable, default, read, text, secret)


class Config(NamedTuple):
    """What `serve` runs with: every field is an option."""

    host: str = option("HOST", "127.0.0.1", read_needed,
        "address to listen on; anything but loopback needs SHIM_API_KEY")
    port: int = option("PORT", "8000", read_port, "port to listen on; 0 takes a free one")
    base_url: str = option("OLLAMA_BASE_URL", "http://127.0.0.1:11434", read_url,
        "where Ollama answers; OLLAMA_HOST counts when this is unset")
    model: str = option("OLLAMA_MODEL", "qwen2.5-coder:14b", read_needed, "the model that answers")
    auth_token: str = option("OLLAMA_AUTH_TOKEN", "", read_text,
        "sent to Ollama as a Bearer token, for servers behind a login", secret=True)
    num_ctx: Optional[int] = option(
        "OLLAMA_NUM_CTX", "", lambda text: read_number(text or "0") or None,
        "context window in tokens, obeyed as given")
    auto_ctx: str = option("SHIM_NUM_CTX", "auto", read_auto_ctx,
        "window when OLLAMA_NUM_CTX is unset: auto, a number, or off (Ollama's default)")
    max_tools: int = option("SHIM_MAX_TOOLS", "8", read_number,
        "tools forwarded to the model, the most useful ones; 0 forwards all")
    api_key: str = option("SHIM_API_KEY", "", read_text,
        "key that clients must send as x-api-key or Bearer", secret=True)
    use_requested_model: bool = option("SHIM_USE_REQUESTED_MODEL", "off", read_switch,
        "use the model named in the request instead of OLLAMA_MODEL: on or off")
    model_map: Tuple[Tuple[str, str], ...] = option("SHIM_MODEL_MAP", "", read_model_map,
        "local models by role, for example haiku=qwen3:4b,opus=qwen3-coder:30b")
    small_model: str = option("SHIM_SMALL_MODEL", "", read_text,
        "model for background requests such as session titles")
    log: str = option("SHIM_LOG", "info", one_of("error", "warn", "info", "debug"),
        "how much is logged: error, warn, info or debug (prompts and answers too)")
    log_format: str = option("SHIM_LOG_FORMAT", "text", one_of("text", "json"),
        "form of the log: text or json")
    max_read_bytes: int = option("SHIM_MAX_READ_BYTES", "200000", read_number,
        "bytes that a rescued read shows before it is cut with a notice")
    timeout_ms: int = option("SHIM_REQUEST_TIMEOUT_MS", "120000", read_milliseconds,
        "longest silence of Ollama within an answer")
    first_token_timeout_ms: int = option("SHIM_FIRST_TOKEN_TIMEOUT_MS", "",
        lambda text: read_milliseconds(text) if text else 0,
        "longest wait for the first byte, which holds model load and prefill"
        " (600000, or SHIM_REQUEST_TIMEOUT_MS where that is set)")
    cors_wildcard: bool = option("SHIM_ALLOW_CORS_WILDCARD", "off", read_switch,
        "answer CORS preflights of every origin, not only localhost: on or off")
    keep_alive: str = option("SHIM_KEEP_ALIVE", "-1", read_keep_alive,
        "how long Ollama keeps the model loaded: seconds, a duration such as 30m, -1 for ever")
    rescue: Tuple[str, ...] = option("SHIM_RESCUE", "text,intent", some_of("text", "intent", "off"),
        "rescues in force: text (tool calls written as text), intent (actions described), off")
    verbatim: str = option("SHIM_VERBATIM", "auto", one_of("auto", "on", "off"),
        "read the model's own text instead of Ollama's parse of it: auto, on or off")
    bash_style: str = option("SHIM_BASH_STYLE", "plain", one_of("plain", "coded"),
        "form of the rescue's commands: plain (approvable in acceptEdits) or coded"
        " (exit codes 91 to 100)")
    prompt: str = option("SHIM_PROMPT", "slim", one_of("slim", "full"),
        "slim shortens tool texts; full forwards them as they came")
    local_answers: Tuple[str, ...] = option("SHIM_LOCAL_ANSWERS", "title,probe,suggestion,safety",
        some_of("title", "probe", "suggestion", "safety", "off"),
        "background requests answered without the model: any of the default's, or off")
    warm: bool = option("SHIM_WARM", "on", read_switch,
        "load the model, and the last session's prefix, before it is needed: on or off")
    max_concurrent: int = option("SHIM_MAX_CONCURRENT", "256",
        checked(read_number, "would let no request work", int),
        "requests at work at once; as many more wait")
    counts_file: str = option("SHIM_COUNTS_FILE", "", read_text,
        "file that keeps the learned token counts between runs")


OPTIONS = [row._replace(name=name) for name, row in Config._field_defaults.items()]


def bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def url_from_ollama_host(text: str) -> str:
    """Read OLLAMA_HOST as Ollama does (contract/ollama.md 6).

    A host that means "all interfaces" becomes loopback, since one connects to it.
    """
    text = text.strip().strip("\"'").strip()
    scheme, host, port, path = OLLAMA_HOST.findall(text)[0]
    scheme = "https" if text == "ollama.com" else scheme
    host = host.strip("[]")
    if not WHOLE_NUMBER.fullmatch(port) or int(port) > 65535:
        port = {"http": "80", "https": "443"}.get(scheme, "11434")
    return f"{scheme or 'http'}://{bracketed(CONNECTABLE.get(host, host))}:{port}{path}".rstrip("/")


def load_config(flags: Mapping[str, Optional[str]], env: Env) -> Config:
    """Read flags (by option name) over environment over defaults.

    An empty variable counts as not set. Raises ConfigError with one line that names
    the flag or variable and the value (never a secret's).
    """
    values: Dict[str, Any] = {}
    for row in OPTIONS:
        flag, source = flags.get(row.name), row.variable
        text = env.get(source) or row.default
        if flag is not None:
            text, source = flag, flag_of(row)
        elif row.name == "base_url" and not env.get(source) and env.get("OLLAMA_HOST"):
            text, source = url_from_ollama_host(env["OLLAMA_HOST"]), "OLLAMA_HOST"
        try:
            values[row.name] = row.read(text)
        except ConfigError as problem:
            shown = "the value" if row.secret or "@" in text else repr(text)
            raise ConfigError(f"{source}: {shown} {problem}") from None
    if values["auto_ctx"] not in ("auto", "off"):
        values["num_ctx"] = values["num_ctx"] or int(values["auto_ctx"])
    if not values["first_token_timeout_ms"]:
        given = flags.get("timeout_ms") or env.get("SHIM_REQUEST_TIMEOUT_MS")
        values["first_token_timeout_ms"] = values["timeout_ms"] if given else FIRST_TOKEN_TIMEOUT_MS
    return Config(**values)


def flag_of(row: Option) -> str:
    return "--" + row.name.replace("_", "-")


def login_of(url: str) -> Tuple[str, str]:
    """Return the login in a base URL as written and decoded; "" where it has none."""
    written = BASE_URL.findall(url)[0][1]
    return written, PERCENT_CODED.sub(lambda run: bytes.fromhex(
        run.group().replace("%", "")).decode("utf-8", "replace"), written)


def secrets_of(config: Config) -> Tuple[str, ...]:
    """List the texts that must appear in no log and no answer, the longest first.

    A URL's login counts as written, decoded, and as the header that Ollama sees.
    """
    written, login = login_of(config.base_url)
    header = late("base64").b64encode(login.encode("utf-8", "replace")).decode() if login else ""
    texts = {config.api_key, config.auth_token, header, written, written.partition(":")[2], login,
             login.partition(":")[2]}
    return tuple(sorted((text for text in texts if len(text) > 2), key=len, reverse=True))


# ============================== 4. TYPES ==============================
# Content blocks, messages and tools as both protocols know them.


class Text(NamedTuple):
    """A text block."""

    text: str


class Thinking(NamedTuple):
    """A thinking block of an earlier answer."""

    text: str


class Image(NamedTuple):
    """A picture: standard base64, no data-URI prefix."""

    base64: str


class ToolUse(NamedTuple):
    """A tool call in the history: its id as the client knows it."""

    id: str
    name: str
    input: Json


class ToolResult(NamedTuple):
    """What a tool answered; text already holds any error mark."""

    id: str
    text: str
    images: Tuple[Image, ...] = ()
    is_error: bool = False


Block = Union[Text, Thinking, Image, ToolUse, ToolResult]


class Message(NamedTuple):
    """One turn: role is user, assistant or system."""

    role: str
    blocks: Tuple[Block, ...]


class Tool(NamedTuple):
    """A tool as the client offers it; schema is its input_schema."""

    name: str
    description: str
    schema: Json
    loader: str = ""  # the tool that brings the schema, where only the name is known


# Deltas: what a model's answer consists of, whatever dialect brought it. A decoder
# and the parser of tool calls in text yield these; section 12 makes events of them.


class TextDelta(NamedTuple):
    """Visible text, never empty."""

    text: str


class ThinkingDelta(NamedTuple):
    """A piece of the model's thought, never empty."""

    text: str


class Call(NamedTuple):
    """A whole tool call. rule is "" for a native one, else the format that was read."""

    name: str
    input: Json
    rule: str = ""


class CallStart(NamedTuple):
    """A call whose name is certain and whose input follows in pieces."""

    name: str
    rule: str = ""


class CallInput(NamedTuple):
    """A piece of the open call's input: JSON text."""

    json: str


class CallEnd(NamedTuple):
    """The open call ends; finished=False when the model left its input incomplete."""

    finished: bool = True


Delta = Union[TextDelta, ThinkingDelta, Call, CallStart, CallInput, CallEnd]


class Finish(NamedTuple):
    """How the upstream said the answer ended.

    reason is Ollama's done_reason (stop, length, load ...). Counts are tokens, None
    where the upstream gave none; times are seconds.
    """

    reason: str
    prompt_tokens: Optional[int] = None
    output_tokens: Optional[int] = None
    prompt_s: float = 0.0
    output_s: float = 0.0
    load_s: float = 0.0


class FileOp(NamedTuple):
    """One file operation, as asked for or described, before it becomes Bash.

    kind    path            text            other
    create  file            whole content   -            must not exist with other content
    write   file            whole content   -            may replace what is there
    append  file            the new tail    -
    append_line file        a line          -            begins on a line of its own
    replace file            new text        old text     every occurrence, left to right
    insert_before / insert_after  file, new text, anchor text
    replace_line, insert_before_line, insert_after_line  the same for whole lines, without
                            line ends; an empty new text removes the lines
    prepend file            text for the top  -
    rename  source          -               destination  never overwrites
    copy    source          -               destination  never overwrites
    delete  file or empty folder
    mkdir   folder
    list    folder
    read    file
    run     -               -               words: one plain read-only command
    """

    kind: str
    path: str = ""
    text: str = ""
    other: str = ""
    words: Tuple[str, ...] = ()


# ============================== 5. CODECS ==============================

_quote = json.encoder.encode_basestring_ascii

SURROGATE = Pattern(r"[\ud800-\udfff]")


def clean(text: str, limit: int = 300) -> str:
    """Make foreign text fit for a log line or header (CWE-117)."""
    text = text if len(text) <= limit else text[:limit] + "…"
    return SURROGATE.sub("\ufffd", CONTROL_CHARS.sub(" ", text))


def redact(text: str, secrets: Iterable[str]) -> str:
    """Replace every secret, also where an upstream quotes it back."""
    for secret in secrets:
        text = text.replace(secret, "[secret]")
    return text


# Compact ASCII: safe for lone surrogates and twice as fast as UTF-8.
to_json = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    """Read a float; 1e999 would become Infinity, which no reader of JSON takes."""
    number = float(text)
    if math.isinf(number):
        raise ValueError("a number is too large")
    return number


_strict_json = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite)
_scan_json = _strict_json.raw_decode


def parse_json(data: bytes) -> Any:
    """Read a JSON document strictly; raise ValueError with the reason.

    Refuses NaN, Infinity and what would become it, bad UTF-8 (replaced bytes would
    change the user's code) and nesting beyond what Python reads.
    """
    try:
        return _strict_json.decode(data.decode("utf-8"))
    except UnicodeDecodeError as problem:
        raise ValueError(f"byte {problem.start} is not UTF-8") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def json_lines(text: str) -> Tuple[List[Any], str]:
    """Decode lines of JSON; return their values, and the rest from where it is none.

    Many at once are read as one array, at two thirds of the cost.
    """
    values: List[Any] = []
    count = text.count("\n")
    if count > 4:
        with contextlib.suppress(ValueError, RecursionError):
            values = _strict_json.decode("[" + text[:-1].replace("\n", ",") + "]")
        if len(values) == count:  # else a line held two values, or lines one together
            return values, ""
    values, at, end = [], 0, len(text)
    while at < end:
        if text[at] in " \t\r\n":
            at += 1
            continue
        try:
            value, at = _scan_json(text, at)
        except (ValueError, RecursionError):
            break
        values.append(value)
    return values, text[at:]


class LineSplitter:
    """Cut a byte stream into runs of whole lines.

    feed() returns every complete line so far as one bytes object (ending in a line
    feed) or b""; rest() the unfinished tail. Raises UpstreamBrokenError once a line is
    longer than MAX_LINE_BYTES.
    """

    def __init__(self) -> None:
        self._tail = bytearray()

    def feed(self, data: bytes) -> bytes:
        cut = data.rfind(b"\n") + 1
        if cut == len(data) and not self._tail:
            return data
        end = len(self._tail) + cut if cut else 0
        self._tail += data
        whole = bytes(self._tail[:end])
        del self._tail[:end]
        if len(self._tail) > MAX_LINE_BYTES:
            raise UpstreamBrokenError(
                f"Ollama sent a line of more than {MAX_LINE_BYTES} bytes; the answer was given up.")
        return whole

    def rest(self) -> bytes:
        return bytes(self._tail)


class Event(NamedTuple):
    """One server-sent event: its name and its payload."""

    name: str
    payload: Json


Events = List[Event]


def _write_event(event: Event) -> str:
    """Write one event; of a delta only the text is encoded (0.4 µs, not 3.6)."""
    name, payload = event
    if name == "content_block_delta":
        (_, kind), (key, text) = payload["delta"].items()
        return (f'event: content_block_delta\ndata: {{"type":"content_block_delta","index":'
                f'{payload["index"]},"delta":{{"type":"{kind}","{key}":{_quote(text)}}}}}\n\n')
    return f"event: {name}\ndata: {to_json(payload)}\n\n"


def sse(events: Iterable[Event]) -> bytes:
    return "".join(map(_write_event, events)).encode()


CHUNK_SIZE = Pattern(r"([0-9a-fA-F]{1,16})(?:;[^\r\n]*)?")


def whole_chunks(buffer: bytes) -> Tuple[List[bytes], bytes]:
    """Take whole chunks off the front in one sweep; return them and what is left.

    Counts only chunks as Go writes them, none where one looks unusual and not the last:
    those are read one by one, at seven times the cost.
    """
    parts = buffer.split(b"\r\n")
    count = (len(parts) - 1) // 2
    bodies = parts[1:2 * count:2]
    if b"" in bodies:
        count = bodies.index(b"")
        bodies = bodies[:count]
    if parts[:2 * count:2] != [b"%x" % len(body) for body in bodies]:
        return [], buffer
    return bodies, b"\r\n".join(parts[2 * count:])


class ChunkDecoder:
    """Take the chunked coding off a body (RFC 9112 7.1), strictly.

    feed() returns the payload so far; finished is set by the last chunk; rest holds
    bytes behind it. Raises ValueError on a bad size or a missing CRLF: skipping two
    bytes unseen let requests be smuggled through h11 (CVE-2025-43859).
    """

    def __init__(self) -> None:
        self.finished = False
        self.rest = b""
        self._need = 0  # of the open chunk and its line end
        self._trailers = 0  # lines from the last chunk's on

    def feed(self, data: bytes) -> bytes:
        if not (self.rest or self._need or self._trailers):
            size, _, chunk = data.partition(b"\r\n")
            if len(chunk) > 2 and chunk[-2:] == b"\r\n" and size == b"%x" % (len(chunk) - 2):
                return chunk[:-2]  # nearly every token
        buffer = self.rest + data if self.rest else data
        out: List[bytes] = []
        if not self._need and not self._trailers:
            out, buffer = whole_chunks(buffer)
            if out and len(buffer) < READ_BYTES and buffer.count(b"\n") < 2:
                self.rest = buffer  # an unfinished chunk in which no line is whole
                return b"".join(out)
        self._read_on(buffer, out)
        return b"".join(out)

    def _read_on(self, buffer: bytes, out: List[bytes]) -> None:
        """Read chunk by chunk, also parts of one."""
        at, end = 0, len(buffer)
        while not self.finished:
            if self._need > 2:
                piece = buffer[at:at + self._need - 2]
                if not piece:
                    break
                out.append(piece)
                at += len(piece)
                self._need -= len(piece)
                continue
            if self._need:
                if end - at < 2:
                    break
                if buffer[at:at + 2] != b"\r\n":
                    raise ValueError("a chunk does not end where its size says")
                at, self._need = at + 2, 0
                continue
            line_end = buffer.find(b"\r\n", at)
            if line_end < 0:
                if end - at > 256:
                    raise ValueError("a chunk size line is too long")
                break
            self._size_line(buffer[at:line_end])
            at = line_end + 2
        self.rest = buffer[at:]

    def _size_line(self, line: bytes) -> None:
        if self._trailers:
            self.finished = not line
            self._trailers += 1
            if self._trailers > MAX_TRAILERS + 1:
                raise ValueError("more header lines follow it than anybody sends")
            return
        size = CHUNK_SIZE.fullmatch(line.decode("latin-1"))
        if not size:
            raise ValueError(f"{clean(line.decode('latin-1'), 40)!r} is no chunk size")
        length = int(size.group(1), 16)
        self._need, self._trailers = (length + 2, 0) if length else (0, 1)


class LengthDecoder:
    """Take a body of known length off what comes; works as ChunkDecoder does."""

    def __init__(self, length: int) -> None:
        self._left, self.rest = length, b""
        self.finished = not length

    def feed(self, data: bytes) -> bytes:
        piece, self.rest = data[:self._left], data[self._left:]
        self._left -= len(piece)
        self.finished = not self._left
        return piece


# ============================== 6. REQUEST IN ==============================

# ------------------------------ tool names and inputs ------------------------------
# A model calls tools by the names of the agents that it was trained with, and writes
# their input in the JSON of whatever language it has in mind.

words_of = str.split
# A kind of tool in each row: the parameters it needs, and its names. These are of Claude Code,
# Qwen Code, Gemini CLI, Cline, Roo, Cursor, Continue, OpenHands, SWE-agent, Codex, Goose, Zed,
# VS Code and the MCP file-system server.
TOOL_KINDS = """
command: bash shell run_command run_shell_command execute_bash execute_command terminal
  run_terminal_cmd run_terminal_command run_in_terminal terminal_command exec exec_command execute
  run_bash run_shell bash_command shell_command execute_shell execute_shell_command local_shell
  shell_exec sh cmd command console powershell zsh bash_tool terminal_run run_cmd
  execute_terminal_command system developer__shell run
file_path old_string new_string: edit edit_file str_replace str_replace_editor
  str_replace_based_edit_tool replace_in_file search_replace search_and_replace replace
  update_file modify_file find_and_replace replace_string_in_file file_edit apply_edit patch_file
  apply_diff change_file string_replace replace_text edit_block
file_path content: write write_file create_file write_to_file save_file new_file create_new_file
  file_write fs_write write_text_file overwrite_file make_file create file_create put_file save
  create_text_file write_new_file edit_file create_or_update_file str_replace_editor
  str_replace_based_edit_tool
file_path: read read_file view_file open_file view file_read fs_read cat open read_text_file
  get_file_contents get_file read_files fetch_file_content show_file load_file read_file_content
  cat_file view_source file_view str_replace_editor str_replace_based_edit_tool
pattern: grep grep_search search_files search_file_content ripgrep rg search_code code_search
  codebase_search grep_files search_in_files search search_for_pattern text_search find_in_files
  search_text search_dir search_file grep_tool
pattern: glob find_files glob_file_search file_search find find_file glob_search list_files
  search_file_names find_path find_by_name file_glob_search glob_files
path: ls list list_directory list_dir list_files list_folder read_directory dir view_directory
  list_directory_contents
url: web_fetch fetch fetch_url fetch_web fetch_webpage browse get_url open_url read_url url_fetch
  fetch_page read_web_page http_get
query: web_search search_web google_search brave_search internet_search search google_web_search
  bing_search duckduckgo_search
todos: todo_write write_todos update_todos todo update_todo_list update_plan todo_list
  manage_todo_list todowrite
prompt: agent task dispatch_agent spawn_agent new_task subagent launch_agent run_agent delegate
  delegate_task run_subagent
skill: skill use_skill run_skill invoke_skill load_skill
"""
# Parameter names that stand for each other; a tool's schema says which one it wants.
PARAMETER_NAMES = """
file_path path filename file file_name filepath target_file absolute_path abs_path full_path
  relative_path pathname name_of_file target_path output_path destination uri
command cmd shell_command command_line bash_command script code commands bash argv shell
content contents text file_text file_content file_contents body data new_content code code_content
  value file_body source
old_string old_str old_text old search find target original search_string old_content
  original_text from string_to_replace old_code search_text
new_string new_str new_text new replace replacement replace_with new_content updated
  replace_string to new_code replace_text updated_text
pattern regex regexp query search_pattern glob glob_pattern search_query search_term search
  expression file_pattern keyword text
path directory dir folder dir_path directory_path target_directory root search_path cwd search_dir
  relative_workspace_path file_path include_path
glob include file_pattern include_pattern glob_pattern file_glob filter
query search_query search_term q keywords text search term
url uri link address href website page
prompt task instruction instructions message question request query
description summary title
offset start_line line_start start from_line begin_line line_number start_line_number
limit num_lines max_lines line_count count lines n_lines line_limit number_of_lines max_results
timeout timeout_ms timeout_seconds time_limit
replace_all all global replace_all_occurrences replace_all_matches
run_in_background is_background background in_background
todos todo_list items tasks plan todo
skill skill_name name
args arguments argument parameters
subagent_type agent_type agent type
"""
NOT_PLAIN = Pattern(r"[^a-z0-9]+")
NAMESPACE = Pattern(r"^(?:functions?|tools?|default_api|container|repo_browser)[.:/]|:\d+$|\.call$")
WRAPPER_KEYS = ("arguments", "parameters", "input", "args", "params", "kwargs", "tool_input",
                "action_input", "properties")


@lru_cache(maxsize=1024)
def plain_name(name: str) -> str:
    """Fold case and separators: filePath, file-path and file_path are one name."""
    return NOT_PLAIN.sub("", name.lower())


def rows_of(table: str) -> List[str]:
    """Cut a table into its rows; what is indented goes on with the row above it."""
    return table.replace("\n  ", " ").strip().split("\n")


def plain_words(row: str) -> Tuple[str, ...]:
    return tuple(map(plain_name, row.split()))


@cache
def tool_kinds() -> List[Tuple[List[str], Tuple[str, ...]]]:
    """Read TOOL_KINDS: what each kind needs, and its names, folded."""
    cut = [row.partition(": ") for row in rows_of(TOOL_KINDS)]
    return [(needs.split(), plain_words(names)) for needs, _, names in cut]


@cache
def parameter_names() -> List[Tuple[str, ...]]:
    return [plain_words(row) for row in rows_of(PARAMETER_NAMES)]


def _mapping(value: Any) -> Json:
    return value if isinstance(value, dict) else {}


def properties_of(schema: Any) -> Json:
    return _mapping(_mapping(schema).get("properties"))


def required_of(schema: Json) -> List[str]:
    found = schema.get("required")
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def parameter_for(name: str, properties: Json, taken: Iterable[str] = ()) -> Optional[str]:
    """Find the property that name means, by spelling, then by PARAMETER_NAMES."""
    folded = plain_name(name)
    free = {plain_name(known): known for known in reversed(list(properties)) if known not in taken}
    if folded in free:
        return free[folded]
    for row in parameter_names():
        if folded in row:
            for word in row:
                if word in free:
                    return free[word]
    return None


def has_parameters(needs: Sequence[str], properties: Json) -> bool:
    return all(parameter_for(need, properties) for need in needs)


def tools_meant(name: str, tools: Mapping[str, Tool]) -> List[Tool]:
    """List the offered tools that name can mean, the likeliest first."""
    if name in tools:
        return [tools[name]]
    folded = plain_name(NAMESPACE.sub("", name.strip()))
    same = [tool for tool in tools.values() if folded and plain_name(tool.name) == folded]
    if same or not folded:
        return same[:1]
    found: List[Tool] = []
    for needs, names in tool_kinds():
        if folded not in names:
            continue
        fits = [tool for tool in tools.values()
                if has_parameters(needs, properties_of(tool.schema))]
        exact = [tool for tool in fits if len(required_of(tool.schema)) == len(needs)
                 and needs != ["path"]  # to list a folder is not to read a file
                 and has_parameters(needs, dict.fromkeys(required_of(tool.schema)))]
        found += [tool for tool in fits if plain_name(tool.name) in names] or (
            exact if len(exact) == 1 else [])
    tails = [tool for tool in tools.values() if plain_name(tool.name.rsplit("__", 1)[-1]) == folded]
    return found + (tails if len(tails) == 1 else [])


def resolve_tool(name: str, tools: Mapping[str, Tool]) -> Optional[Tool]:
    """Find the offered tool that name means: exact, by spelling, by published alias."""
    return next(iter(tools_meant(name, tools)), None)


def repair_input(tool: Tool, arguments: Any) -> Optional[Json]:
    """Fit arguments to the tool's schema; None when they cannot be a call of it.

    Parameters are renamed by PARAMETER_NAMES, types mended, and keys that the schema
    does not know dropped, since Claude Code rejects them (contract/claude-code.md B4).
    What is valid stays; no default is added and nothing missing is invented.
    """
    required = required_of(tool.schema)
    given = as_object(arguments, tool.schema)
    if given is None:
        return None
    result = fit_object(given, tool.schema, open_by_default=tool.name.startswith("mcp__"))
    return None if required and not any(name in result for name in required) else result


def as_object(arguments: Any, schema: Json, depth: int = 4) -> Optional[Json]:
    """Read arguments given as an object, as JSON text, or as the one value needed."""
    if arguments is None:
        return {}
    inner: Any = None
    if isinstance(arguments, dict):
        wrapped = [key for key in arguments if (key in WRAPPER_KEYS and len(arguments) == 1)
                   or (key == "properties" and arguments.get("type") == "object")]
        if not depth or not wrapped or wrapped[0] in properties_of(schema):
            return arguments
        return as_object(arguments[wrapped[0]], schema, depth - 1)
    if isinstance(arguments, str) and arguments.strip()[:1] in ("{", "[", '"'):
        inner = loose_json(arguments)
    elif isinstance(arguments, list) and len(arguments) == 1 and isinstance(arguments[0], dict):
        inner = arguments[0]
    if inner is not None:
        return as_object(inner, schema, depth - 1) if depth else None
    needed = required_of(schema) or list(properties_of(schema))
    usable = isinstance(arguments, (str, list)) and bool(arguments) and len(needed) == 1
    return {needed[0]: arguments} if usable else None


def fit_object(given: Json, schema: Json, open_by_default: bool = True) -> Json:
    """Rename, coerce and drop the keys of one object by its schema."""
    properties = properties_of(schema)
    extra = schema.get("additionalProperties", open_by_default or not properties)
    names = {key: key for key in given if key in properties}
    for key in given:
        name = None if key in names else parameter_for(str(key), properties, names.values())
        if name is not None:
            names[key] = name
    result: Json = {}
    for key, value in given.items():
        name = names.get(key)
        if name is None:
            if extra is not False or "patternProperties" in schema:
                result[key] = value
        elif value is not None or schema_takes(None, properties[name]):
            result[name] = coerced(value, properties[name], name)
    return result


def types_of(schema: Any) -> List[str]:
    """List the JSON types that a schema allows; none listed means any."""
    schema = _mapping(schema)
    kinds = schema.get("type")
    if kinds is None:
        choices = schema.get("anyOf") or schema.get("oneOf")
        kinds = [kind for choice in choices for kind in types_of(choice)] \
            if isinstance(choices, list) else []
    return [kind for kind in (kinds if isinstance(kinds, list) else [kinds])
            if isinstance(kind, str) and kind in SCHEMA_TYPES]


SCHEMA_TYPES: Dict[str, Any] = {
    "string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list,
    "object": dict, "null": type(None)}


def is_of(value: Any, kind: str) -> bool:
    """Tell whether a value is of a JSON type: 5.0 is an integer, True is no number."""
    if isinstance(value, bool):
        return kind == "boolean"
    whole = kind == "integer" and isinstance(value, float) and value.is_integer()
    return whole or isinstance(value, SCHEMA_TYPES[kind])


def schema_takes(value: Any, schema: Any) -> bool:
    types = types_of(schema)
    return not types or any(is_of(value, kind) for kind in types)


def coerced(value: Any, schema: Any, name: str = "") -> Any:
    """Mend a value's type; what cannot be mended stays for the client to judge."""
    schema = _mapping(schema)
    if not schema_takes(value, schema):
        mended = [retyped(value, kind, name) for kind in types_of(schema)]
        value = next((each for each in mended if each is not None), value)
    if isinstance(value, dict) and properties_of(schema):
        return fit_object(value, schema)
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        return [coerced(item, schema["items"]) for item in value]
    choices = schema.get("enum")
    if isinstance(value, str) and isinstance(choices, list) and value not in choices:
        return next((each for each in choices if plain_name(str(each)) == plain_name(value)), value)
    return value


def retyped(value: Any, kind: str, name: str) -> Any:
    """Read a value as another JSON type; None where it cannot be read so."""
    if kind == "string":
        return string_from(value, name)
    if kind == "boolean":
        return SWITCH_WORDS.get(str(value).strip().lower())
    read = loose_json(value) if isinstance(value, str) else None
    if kind == "array" and value is not None:
        return read if isinstance(read, list) else [value]
    if kind == "integer" and isinstance(read, float) and is_of(read, kind):
        return int(read)
    return read if is_of(read, kind) else None


def string_from(value: Any, name: str) -> Optional[str]:
    """Write a value as text: an argument vector quoted, lines joined, else JSON."""
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return late("shlex").join(value) if plain_name(name) == "command" else "\n".join(value)
    return json.dumps(value, ensure_ascii=False, indent=2 if isinstance(value, dict) else None)


# A string ends at a quote that is followed by what can follow a value in its place; any
# other quote was left unescaped by the model and belongs to the text.
MEMBER_KEY = r"""(?:"[^"\n]{0,80}"|“[^”\n]{0,80}”|'[^'\n]{0,80}'|[A-Za-z_][\w-]{0,60})\s*(?::|=>)"""
END_OF_KEY = Pattern(r"\s*(?::|=>)")
COMMENT = r"(?:(?:(?://|#)[^\n]{0,300}\n|/\*[^*]{0,300}\*/)\s*)?"
CLOSED = (r"(?:\}\s*(?:[,}\])<`;/#]|\Z|\n)|</[\w-]{0,16}(?:calls?>|tools?>|\Z)|<\||```\s*\Z|"
          r"<[\w-]{0,16}call>\s*(?:[<{\[]|\Z))")
# White space is tried once, a comment is short: 8,000 blanks behind a quote took seconds.
END_IN_OBJECT = Pattern(
    rf"\s*(?:{COMMENT}{CLOSED}|,\s*{COMMENT}(?:{CLOSED}|{MEMBER_KEY})|(?<=\s)\"[\w-]{{1,60}}\"\s*:|\Z)"
    rf"|\s*\n[^\S\n]*{MEMBER_KEY}")
END_IN_ARRAY = Pattern(r"\s*(?:,\s*(?:[\"'\[{\]\d-]|true|false|null)|\]|\Z)", re.I)
END_IN_CALL = Pattern(r"\s*(?:,\s*\w{1,60}\s*=|,?\s*\)|\Z)")
MEMBER_START = Pattern(MEMBER_KEY + r"|[\"'\[{]")
END_ALONE = Pattern(r"\s*\Z")
CLOSING_QUOTES = {'"': '"', "'": "'", "`": "`", "\u201c": "\u201d", '"""': '"""', "'''": "'''",
          "<escape>": "<escape>", '<|"|>': '<|"|>'}
OPENING_QUOTE = Pattern("\"\"\"|'''|<escape>|<\\|\"\\|>|[\"'`\u201c]")
JSON_BLANKS = Pattern(r"(?:\s+|//[^\n]*|/\*[^*]*(?:\*(?!/)[^*]*)*\*/|#[^\n]*)*")
JSON_NUMBER = Pattern(
    r"[-+]?(?:\d{1,300}(?:\.\d{0,300})?|\.\d{1,300})(?:[eE][+-]?\d{1,3})?(?![\w.])")
JSON_WORD = Pattern(r"[A-Za-z_][\w./-]{0,200}")
JSON_WORDS: Json = {"true": True, "false": False, "null": None, "none": None, "undefined": None}
JSON_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "/": "/", "\\": "\\",
           '"': '"', "'": "'", "`": "`"}
JSON_ESCAPE = Pattern(r"\\(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|(.))", re.S)
MAX_JSON_DEPTH = 60
STRICT_JSON = json.JSONDecoder(strict=False, parse_constant=_no_constant, parse_float=_finite)


class LooseJson:
    """Reads JSON as a person would read it: Python, JavaScript and slips included.

    value() gives the value at a position and where it ends, or raises ValueError.
    unclosed tells that the text ended before the value did.
    """

    def __init__(self, text: str) -> None:
        self.text, self.unclosed = text, False

    def value(self, at: int, end: Pattern = END_ALONE, depth: int = 0) -> Tuple[Any, int]:
        if depth > MAX_JSON_DEPTH:
            raise ValueError("nested too deeply")
        if self.text[at:at + 1] in ("{", "["):
            return self.members(at + 1, depth)
        if quote := OPENING_QUOTE.match(self.text, at):
            return self.string(quote, end)
        if number := JSON_NUMBER.match(self.text, at):
            written = number.group()
            return (int if written.lstrip("-+").isdigit() else _finite)(written), number.end()
        if word := JSON_WORD.match(self.text, at):
            return JSON_WORDS.get(word.group().lower(), word.group()), word.end()
        raise ValueError("no value")

    def skip(self, at: int) -> int:
        match = JSON_BLANKS.match(self.text, at)
        return match.end() if match else at

    def members(self, at: int, depth: int) -> Tuple[Any, int]:
        """Read the object or array whose bracket stands before at."""
        closing = "}" if self.text[at - 1] == "{" else "]"
        result: Any = {} if closing == "}" else []
        end = at
        while True:
            at = self.skip(at)
            following = self.text[at:at + 1]
            if following in ("}", "]"):  # the other one closes a value that lacks its own
                return result, at + (following == closing)
            if following == ",":
                at += 1
            elif result and self.ended(end, at):
                return result, end
            elif closing == "]":
                value, at = self.value(at, END_IN_ARRAY, depth + 1)
                result.append(value)
                end = at
            elif following == "{" and not result:
                result, at = self.value(at, END_IN_OBJECT, depth + 1)
                at = self.skip(at)
                return result, at + (self.text[at:at + 1] == "}")
            else:
                key, at = self.value(at, END_OF_KEY, MAX_JSON_DEPTH)
                colon = END_OF_KEY.match(self.text, at)
                if not colon or not isinstance(key, (str, int)):
                    raise ValueError("no key")
                result[str(key)], at = self.value(self.skip(colon.end()), END_IN_OBJECT, depth + 1)
                end = at

    def ended(self, end: int, at: int) -> bool:
        """Tell a missing last brace: nothing, a tag, a fence or a new line of prose follows."""
        broken_off = self.text[at:at + 1] in ("", "<", "`") or "\n" in self.text[end:at]
        self.unclosed = broken_off and not MEMBER_START.match(self.text, at)
        return self.unclosed

    def string(self, opening: re.Match[str], end: Pattern) -> Tuple[str, int]:
        quote = CLOSING_QUOTES[opening.group()]
        stop, pieces, at = string_stop(quote), [], opening.end()
        while True:
            match = stop.search(self.text, at)
            if not match:
                raise ValueError("a string has no end")
            pieces.append(self.text[at:match.start()])
            at = match.end()
            if match.group() != quote:
                pieces.append(unescaped(match))
            elif len(quote) > 1 or end.match(self.text, at):
                return join_surrogates("".join(pieces)), at
            else:
                pieces.append(quote)


@cache
def string_stop(quote: str) -> Pattern:
    """Build the pattern for what interrupts a string: an escape or its closing quote."""
    escape = "" if quote.startswith("<") else JSON_ESCAPE.source + "|"
    return Pattern(escape + re.escape(quote), re.S)


def unescaped(match: re.Match[str]) -> str:
    """Read one escape; one that JSON does not know keeps its backslash (\\d, \\$)."""
    unicode, byte, letter = match.groups()
    if letter is not None:
        return JSON_ESCAPES.get(letter, match.group())
    return chr(int(unicode or byte, 16))


def join_surrogates(text: str) -> str:
    """Join the halves of a character that \\u escapes wrote in two."""
    if not SURROGATE.search(text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def read_json(text: str, at: int = 0) -> Tuple[Any, int, bool]:
    """Read the JSON value at a position: value, where it ends, whether it was closed.

    Raises ValueError where even a patient reader finds no value.
    """
    try:
        value, end = STRICT_JSON.raw_decode(text, at)
    except (ValueError, RecursionError):
        loose = LooseJson(text)
        value, end = loose.value(loose.skip(at))
        return value, end, not loose.unclosed
    return value, end, True


def loose_json(text: str) -> Any:
    """Read JSON that is the whole of text; None where it is not."""
    text = text.strip()
    try:  # strict JSON ends 007 behind its first digit
        value, end = (LooseJson(text).value(0) if JSON_NUMBER.fullmatch(text)
                      else read_json(text)[:2])
    except ValueError:
        return None
    return None if text[end:].strip(" \t\r\n}];,") else value


# ------------------------------ the tool table ------------------------------
# What a client's file tools are called (Claude Code; Qwen Code; other published agents).
# Without these four kinds no work gets done, so they are never dropped.
CORE_TOOLS = frozenset(words_of("""
    Bash PowerShell run_shell_command shell execute_bash run_command bash Read read_file read
    view Edit edit edit_file replace str_replace str_replace_editor apply_patch Write
    write_file write create_file"""))
# Holds the client's tool search open; the model must never call it (contract F1).
PLACEHOLDER_TOOL = "DeferredToolPlaceholder"
MCP_PREFIX = "mcp__"
# The client's other tools, the most useful first; ANY_OTHER_TOOL stands for those that
# are not named. A required answer format and the ways to further tools come first.
ANY_OTHER_TOOL = "*"
TOOL_RANKS = words_of("""
    StructuredOutput ToolSearch tool_search tool_call Grep grep_search Glob glob LS
    list_directory MultiEdit ExitPlanMode exit_plan_mode Agent Task agent Skill skill
    AskUserQuestion ask_user_question TodoWrite todo_write WebFetch web_fetch * BashOutput
    KillShell KillBash TaskStop task_stop NotebookEdit notebook_edit TaskCreate TaskUpdate
    TaskOutput Monitor monitor SendMessage send_message TaskList TaskGet WebSearch web_search
    EnterPlanMode ListAgents list_agents get_goal update_goal ReportFindings EnterWorktree
    ExitWorktree CronCreate CronDelete CronList ScheduleWakeup Workflow DesignSync""")
RANK_OF = {name: rank for rank, name in enumerate(TOOL_RANKS)}


def rank_tools(tools: Sequence[Tool], limit: int, in_use: AbstractSet[str] = frozenset(),
               words: AbstractSet[str] = frozenset()) -> List[Tool]:
    """Choose the tools that are forwarded, at most limit (0: all), in the client's order.

    The core tools and those in use (called, or loaded by a tool_reference) stay even beyond
    it; then each MCP server has a place; then come those that words name, then TOOL_RANKS.
    """
    offered = [tool for tool in tools if tool.name != PLACEHOLDER_TOOL]
    if not limit:
        return offered
    kept = {tool.name for tool in offered if tool.name in CORE_TOOLS or tool.name in in_use}
    if not any(tool.name in CORE_TOOLS for tool in offered):  # a client of unknown names
        kept.update([tool.name for tool in offered if "command" in required_of(tool.schema)
                     and not mcp_server(tool.name)][:1])
    waiting = sorted([tool.name for tool in offered if tool.name not in kept],
                     key=lambda name: _rank(name, words))
    served = {"", *map(mcp_server, kept)}
    firsts = {mcp_server(name): name for name in reversed(waiting)}
    waiting.sort(key=lambda name: mcp_server(name) in served or firsts[mcp_server(name)] != name)
    kept.update(waiting[:max(limit - len(kept), 0)])
    return [tool for tool in offered if tool.name in kept]


def mcp_server(name: str) -> str:
    """The server's part of mcp__server__tool, "" for other names."""
    server, separator, _ = name[len(MCP_PREFIX):].partition("__")
    return server if name.startswith(MCP_PREFIX) and separator else ""


def _rank(name: str, words: AbstractSet[str]) -> Tuple[bool, int]:
    unnamed = len(TOOL_RANKS) if mcp_server(name) else RANK_OF[ANY_OTHER_TOOL]
    return words.isdisjoint((name, name.rsplit("__", 1)[-1])), RANK_OF.get(name, unnamed)


# ------------------------------ parsing ------------------------------

class ToolChoice(NamedTuple):
    """kind is auto, any, tool or none; name belongs to tool."""

    kind: str = "auto"
    name: str = ""


class Request(NamedTuple):
    """A Messages request, every field understood or deliberately left out.

    system holds the texts in order, without the billing header. loaded names the
    tools that a tool search result brought in. thinking is None where the request
    says nothing; schema is the JSON schema that the answer must fit.
    """

    model: str
    system: Tuple[str, ...]
    messages: Tuple[Message, ...]
    tools: Tuple[Tool, ...] = ()
    tool_choice: ToolChoice = ToolChoice()
    max_tokens: int = DEFAULT_MAX_TOKENS
    stop_sequences: Tuple[str, ...] = ()
    sampling: Tuple[Tuple[str, float], ...] = ()
    thinking: Optional[bool] = None
    schema: Optional[Json] = None
    stream: bool = False
    safeguards: bool = False
    loaded: AbstractSet[str] = frozenset()
    session: str = ""


JSON_TYPE_WORDS = {
    str: "a string", bool: "a boolean", int: "a number", float: "a number",
    dict: "an object", list: "an array", type(None): "null",
}
TYPE_WORDS = {**JSON_TYPE_WORDS, int: "a whole number"}


# A refusal's message begins with the place within what was read (".type: ..."); who reads
# the whole puts its own place before it.

def _wrong(place: str, expected: str, value: Any) -> BadRequestError:
    return BadRequestError(f"{place}: expected {expected}, got {JSON_TYPE_WORDS[type(value)]}")


def _take(holder: Json, key: str, kind: Type[Value], default: Value) -> Value:
    """Read holder[key]; null and absent give the default, a wrong type 400."""
    value = holder.get(key)
    if value is None:
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise _wrong("." + key, TYPE_WORDS[kind], value)
    return value


def _need(holder: Json, key: str, kind: Type[Value]) -> Value:
    """Read holder[key], which must be there."""
    value: Optional[Value] = _take(holder, key, kind, None)
    if value is None:
        raise BadRequestError(f".{key}: {TYPE_WORDS[kind]} is required")
    return value


def _choice(holder: Json, key: str, choices: Tuple[str, ...]) -> str:
    """Read holder[key], which must be one of the choices."""
    value = _need(holder, key, str)
    if value not in choices:
        raise BadRequestError(f".{key}: expected {', '.join(choices[:-1])} or {choices[-1]},"
                              f" got {clean(value, 40)!r}")
    return value


def _at(place: str, value: Any, read: Callable[[Json], Value]) -> Value:
    """Read an object that stands at a place."""
    try:
        if not isinstance(value, dict):
            raise _wrong("", "an object", value)
        return read(value)
    except BadRequestError as error:
        raise BadRequestError(place + error.message) from None


def _each(place: str, values: List[Any], read: Callable[[Json], Value]) -> Tuple[Value, ...]:
    return tuple([_at(f"{place}.{i}", value, read) for i, value in enumerate(values)])


# Claude Code's first system block changes with the first user message, and with it
# every token behind it (contract/claude-code.md A5).
BILLING_HEADER = Pattern(r"\Ax-anthropic-billing-header:[^\n]*\n*")
DATA_URI = Pattern(r"\Adata:[^,]{0,200},")
URL_SAFE_ALPHABET = {ord("-"): "+", ord("_"): "/"}
REMINDER_START = "<system-reminder>"


def as_reminder(text: str) -> str:
    """Mark text that is not the user's own, as the CLI does."""
    if text.lstrip().startswith(REMINDER_START):
        return text
    return f"{REMINDER_START}\n{text}\n</system-reminder>"


def _notice_of(block: Json) -> Text:
    """Say in words what cannot be passed on: never base64 in the prompt."""
    kind, source = clean(str(block.get("type", "unknown")), 60), _mapping(block.get("source"))
    data = source.get("data")
    if kind == "document" and source.get("type") == "text" and isinstance(data, str):
        return Text(data)
    kilobytes = len(data) * 3 // 4096 if isinstance(data, str) else 0
    detail = ", ".join(filter(None, (clean(str(source.get("media_type") or ""), 60),
                                     f"{kilobytes} KB" if kilobytes else "")))
    return Text(f"[A block of type {kind}{f' ({detail})' if detail else ''} was left out here:"
                " this model reads text only.]")


def _image_block(block: Json) -> Block:
    source = _need(block, "source", dict)
    if source.get("type") != "base64":
        return Text("[An image was left out here: only images sent as base64 can be shown"
                    " to the model.]")
    data = _at(".source", source, lambda holder: _need(holder, "data", str))
    return Image(DATA_URI.sub("", data).translate(URL_SAFE_ALPHABET))


def blocks_of(kind: Type[Value], blocks: Iterable[Block]) -> List[Value]:
    return [block for block in blocks if isinstance(block, kind)]


def _tool_result_block(block: Json) -> Block:
    parts = _read_content(block)
    text = "\n".join([part.text for part in blocks_of(Text, parts) if part.text])
    images = tuple(blocks_of(Image, parts))
    if failed := _take(block, "is_error", bool, False):
        text = f"[The tool call failed]\n{text}"
    return ToolResult(_need(block, "tool_use_id", str),
                      text or ("[image]" if images else "(no output)"), images, failed)


BLOCK_READERS: Dict[str, Callable[[Json], Block]] = {
    "text": lambda block: Text(_need(block, "text", str)),
    "thinking": lambda block: Thinking(_take(block, "thinking", str, "")),
    "redacted_thinking": lambda block: Thinking(""),
    "image": _image_block,
    "tool_use": lambda block: ToolUse(
        _need(block, "id", str), _need(block, "name", str), _take(block, "input", dict, {})),
    "tool_result": _tool_result_block,
    "tool_reference": lambda block: Text(
        f"The tool {_need(block, 'tool_name', str)} is loaded now and can be called."),
}


def _read_block(block: Json) -> Block:
    return BLOCK_READERS.get(_need(block, "type", str), _notice_of)(block)


def _read_content(holder: Json) -> Tuple[Block, ...]:
    """Read the content of a message or a tool result: a string or blocks."""
    content = holder.get("content")
    if content is None or isinstance(content, str):
        return (Text(content),) if content else ()
    if not isinstance(content, list):
        raise _wrong(".content", "a string or an array of blocks", content)
    return _each(".content", content, _read_block)


def _read_message(message: Json) -> Message:
    role = "system" if message.get("role") == "developer" else \
        _choice(message, "role", ("user", "assistant", "system"))
    return Message(role, _read_content(message))


def _read_system(value: Any) -> Tuple[str, ...]:
    """Read a system prompt: a string or text blocks, without the billing header."""
    if isinstance(value, str):
        value = [{"text": value}]
    elif value is not None and not isinstance(value, list):
        raise _wrong(".system", "a string or an array of text blocks", value)
    texts = _each(".system", value or [], lambda block: _need(block, "text", str)
                  if block.get("type", "text") == "text" else _notice_of(block).text)
    return tuple(text for text in map(without_billing, texts) if text)


def without_billing(text: str) -> str:
    return BILLING_HEADER.sub("", text) if text.startswith("x-anthropic-billing") else text


# Replaced whole and never changed inside: a race costs one more reading.
_latest_tools: List[Tuple[List[Any], Tuple[Tool, ...]]] = [([], ())]


def _read_tools(value: List[Any]) -> Tuple[Tool, ...]:
    """Read the client's own tools; server tools (typed) cannot run here.

    All sessions send the same 63 KB of them, so one copy serves all.
    """
    known, read = _latest_tools[0]
    if value == known:
        return read
    tools = _each(".tools", value, lambda tool: Tool(
        _need(tool, "name", str), _take(tool, "description", str, ""),
        _take(tool, "input_schema", dict, {}))
        if tool.get("type") in (None, "custom") else None)
    own = tuple(tool for tool in tools if tool)
    _latest_tools[0] = (value, own)
    return own


def _read_tool_choice(value: Json) -> ToolChoice:
    kind = _choice(value, "type", ("auto", "any", "tool", "none"))
    return ToolChoice(kind, _need(value, "name", str) if kind == "tool" else "")


def _read_sampling(body: Json) -> Iterator[Tuple[str, float]]:
    for key in ("temperature", "top_p", "top_k"):
        value = body.get(key)
        if value is not None:
            if not is_of(value, "number"):
                raise _wrong(key, "a number", value)
            yield key, value


def _raw_blocks(holder: Json) -> List[Json]:
    content = holder.get("content")
    return [b for b in content if isinstance(b, dict)] if isinstance(content, list) else []


def _loaded_tools(messages: List[Json]) -> AbstractSet[str]:
    """Collect the tools that tool search results brought in (CC F1)."""
    return {str(part.get("tool_name", "")) for message in messages
            for block in _raw_blocks(message) for part in _raw_blocks(block)
            if part.get("type") == "tool_reference"}


def _inside(value: Any, *keys: str) -> Any:
    """Follow keys through objects; None where one is missing."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


TOOLS_KEY = b'"tools":'
# The newest first; replaced whole and never changed inside: a race costs one more parse.
_known_tools: List[Tuple[bytes, List[Any]]] = []


def read_body(data: bytes) -> Any:
    """Read a request's JSON; raises ValueError as parse_json does.

    The tools, 63 of a first turn's 77 KB, are the same bytes in every turn of a session:
    where an earlier body had them, they are left out of what is parsed and put back.
    """
    at = data.rfind(TOOLS_KEY) + len(TOOLS_KEY)  # in a string its quotes would be escaped
    for written, tools in _known_tools:
        if data.startswith(written, at):
            view = memoryview(data)
            with contextlib.suppress(ValueError, KeyError, RecursionError):
                return _read_around(view[:at], tools, view[at + len(written):])
    body = parse_json(data)
    if at >= len(TOOLS_KEY) and isinstance(body, dict):
        text = data[at:].decode()
        with contextlib.suppress(ValueError, RecursionError):
            tools, end = _scan_json(text, len(text) - len(text.lstrip()))
            newest = (text[:end].encode(), tools)
            if tools and tools == body.get("tools") and end <= MAX_TOOLS_CHARS \
                    and newest not in _known_tools:
                _known_tools[:] = [newest, *_known_tools[:MAX_KNOWN_TOOLS - 1]]
    return body


def _read_around(before: memoryview, tools: List[Any], behind: memoryview) -> Any:
    """Read a body in which tools are known to stand between before and behind.

    NaN, which no body may hold, stands for them: KeyError where it holds one of its own.
    """
    decoder = json.JSONDecoder(parse_constant={"NaN": tools}.pop, parse_float=_finite)
    return decoder.decode(b"".join((before, b"NaN", behind)).decode())


def parse_request(body: Any) -> Request:
    """Read a Messages body; raise BadRequestError with the field's path.

    Unknown fields are ignored, as Anthropic's own additions come without notice:
    context_management, service_tier, betas, safeguards' details and the like.
    """
    if not isinstance(body, dict):
        raise _wrong("body", "an object", body)
    try:
        return _read_request(body)
    except BadRequestError as error:
        raise BadRequestError(error.message.lstrip(".")) from None


def _read_request(body: Json) -> Request:
    messages = _need(body, "messages", list)
    parsed = _each(".messages", messages, _read_message)
    if not any(block != Text("") for message in parsed for block in message.blocks):
        content = " with content" if messages else ""
        raise BadRequestError(f"messages: at least one message{content} is required")
    max_tokens = _take(body, "max_tokens", int, DEFAULT_MAX_TOKENS)
    if max_tokens < 1:
        raise BadRequestError(f"max_tokens: expected at least 1, got {max_tokens}")
    stops = _take(body, "stop_sequences", list, [])
    for i, stop in enumerate(stops):
        if not isinstance(stop, str):
            raise _wrong(f"stop_sequences.{i}", "a string", stop)
    thinking = _take(body, "thinking", dict, {}).get("type")
    schema = _inside(body, "output_config", "format", "schema")
    session = _inside(body, "metadata", "user_id")
    return Request(
        model=_take(body, "model", str, ""), system=_read_system(body.get("system")),
        messages=parsed, tools=_read_tools(_take(body, "tools", list, [])),
        tool_choice=_at(".tool_choice", _take(body, "tool_choice", dict, {"type": "auto"}),
                        _read_tool_choice),
        max_tokens=max_tokens, stop_sequences=tuple(filter(None, stops)),
        sampling=tuple(_read_sampling(body)), stream=_take(body, "stream", bool, False),
        thinking=None if thinking is None else thinking != "disabled",
        schema=schema if isinstance(schema, dict) else None, loaded=_loaded_tools(messages),
        safeguards=bool(body.get("safeguards")),
        session=session if isinstance(session, str) else "")


SEARCH_TOOLS = ("ToolSearch", "tool_search")
ANSWER_TOOL = "StructuredOutput"  # takes the answer that --json-schema wants
DEFERRED_HEADING = r"The following deferred tools are (?:now )?available via \w+\."
DEFERRED_NAMES = Pattern(rf"(?m)^{DEFERRED_HEADING}.*((?:\n[\w.:-]+$)+)")
TOOL_WORD = Pattern(r"[A-Za-z_][\w.:-]{0,127}")


class ToolTable(NamedTuple):
    """The request's tools: all that the client can run, and those the model sees.

    A call of a tool that was capped still goes through.
    """

    offered: Mapping[str, Tool]
    sent: Tuple[Tool, ...]


def tool_table(request: Request, limit: int, last: Optional[ToolTable] = None) -> ToolTable:
    """Choose what the model sees; last is the table of the session's last turn.

    As long as the client offers the same tools the same are sent, whichever were
    called since: a changed list makes the model read everything again (OL 5b).
    """
    if request.tool_choice.kind == "none":
        return ToolTable({}, ())
    offered = {tool.name: tool for tool in request.tools if tool.name != PLACEHOLDER_TOOL}
    if last and last.offered.keys() == offered.keys():
        return ToolTable(offered, tuple([offered[tool.name] for tool in last.sent]))
    chosen = request.messages if 0 < limit < len(offered) else ()
    words = {word.rstrip(".:") for message in chosen if message.role == "user"
             for block in blocks_of(Text, message.blocks)
             if not block.text.startswith(REMINDER_START)
             for word in TOOL_WORD.findall(block.text[:MAX_NAMING_CHARS])}
    used = {*request.loaded, *[call.name for message in request.messages
                               for call in blocks_of(ToolUse, message.blocks)]}
    return ToolTable(offered, tuple(rank_tools(list(offered.values()), limit, used, words)))


def noted_texts(request: Request) -> List[str]:
    """List what the client notes beside the user's words: system messages, reminders."""
    return [block.text for message in request.messages if message.role != "assistant"
            for block in blocks_of(Text, message.blocks)
            if message.role == "system" or block.text.startswith(REMINDER_START)]


def callable_tools(request: Request, offered: Mapping[str, Tool]) -> Mapping[str, Tool]:
    """Add the tools that are only named until a search brings their schemas (CC F1).

    A call of one becomes a search for it: then the model learns what it takes.
    """
    search = next((name for name in SEARCH_TOOLS if name in offered), "")
    named = [name for text in (noted_texts(request) if search else ())
             for found in DEFERRED_NAMES.finditer(text) for name in found[1].split()]
    return {**offered, **{name: Tool(name, "", {}, search) for name in named
                          if name not in offered}}


# ============================== 7. REQUEST OUT ==============================

# ------------------------------ counting ------------------------------
# Tokens are estimated by content class, then corrected by what Ollama reports. Too small
# an estimate costs more than one too large: the CLI's Read cap trusts it (contract A9).

# First byte, end, letter: a class for each UTF-8 byte; a lead byte stands for its whole
# character. l Latin with accents and Greek, r Cyrillic, w Hebrew and Arabic, i Indic and
# Thai, s symbols, j kana, h Han, k Hangul, p full-width forms, e emoji, . all the rest.
BYTE_CLASSES = (
    (97, 123, b"a"), (65, 91, b"A"), (48, 58, b"0"), (32, 33, b" "), (9, 10, b"t"),
    (10, 11, b"n"), (13, 14, b"n"), (0xC0, 0xD0, b"l"), (0xD0, 0xD6, b"r"),
    (0xD6, 0xE0, b"w"), (0xE0, 0xE2, b"i"), (0xE2, 0xE3, b"s"), (0xE3, 0xE4, b"j"),
    (0xE4, 0xEA, b"h"), (0xEA, 0xEE, b"k"), (0xEE, 0xF0, b"p"), (0xF0, 0x100, b"e"))
# Tokens of the Qwen vocabulary for each occurrence in the text so classed: fitted to
# 1,000 files of 40 kinds, an estimate too small weighing three times one too large.
Weights = Tuple[Tuple[bytes, float], ...]
CASED_WEIGHTS: Weights = ((b"aA", 2.93), (b"aAa", -2.61))
TEXT_WEIGHTS: Weights = (
    (b".", 0.39), (b" .", 0.39), (b"n", 1.18), (b" a", 1.03), (b"na", 1.75), (b".a", 1.31),
    (b"0a", 1.05), (b"ta", 1.93), (b" 0", 1.79), (b"nn", -2.29), (b"....", -1.48),
    (b"a" * 8, 0.74), (b"a" * 16, 1.60), (b"a" * 32, 6.0))
DIGIT_WEIGHT = 1.07
WIDE_WEIGHTS: Weights = (
    (b"l", 1.0), (b"r", 0.34), (b"w", 0.49), (b"i", 1.14), (b"s", 1.30), (b"ss", -2.3),
    (b"j", 0.60), (b"h", 0.67), (b"k", 0.85), (b"p", 0.60), (b"e", 1.80))


def _byte_classes() -> bytes:
    table = bytearray(b"." * 256)
    for first, end, letter in BYTE_CLASSES:
        table[first:end] = letter * (end - first)
    return bytes(table)


CLASS_OF_BYTE = _byte_classes()
CONTINUATION_BYTES = bytes(range(0x80, 0xC0))


class Sizes(NamedTuple):
    """Tokens before correction: ASCII text, its digits, all outside ASCII."""

    text: float = 0.0
    digits: float = 0.0
    wide: float = 0.0


def text_sizes(text: str, share: float = 1.0) -> Sizes:
    """Estimate a text's tokens by class, a long one's from even slices.

    share is its part of the texts that are counted together: with the root of it in
    effort, their sum is as exact as one text's count, since chance errors cancel.
    """
    sample, effort = text, math.sqrt(share)
    if len(text) > WHOLE_TEXT_CHARS * effort:
        slices = min(len(text) // 2048 + 32, MAX_SLICES) * effort
        step = max(int(len(text) / slices) | 1, SLICE_CHARS)
        sample = "".join([text[at:at + SLICE_CHARS] for at in range(0, len(text), step)])
    wide_weights = () if sample.isascii() else WIDE_WEIGHTS
    encoded = sample.encode("utf-8", "replace")
    cased = b" " + encoded.translate(CLASS_OF_BYTE, CONTINUATION_BYTES if wide_weights else b"")
    classes = cased.replace(b"A", b"a")
    letters = weighed(classes, TEXT_WEIGHTS) + weighed(cased, CASED_WEIGHTS)
    digits, wide = classes.count(b"0") * DIGIT_WEIGHT, weighed(classes, wide_weights)
    scale = len(text) / max(len(sample), 1)
    return Sizes(max(letters, len(encoded) / 200) * scale, digits * scale, max(wide, 0) * scale)


def weighed(classes: bytes, weights: Weights) -> float:
    return sum([classes.count(pattern) * weight for pattern, weight in weights])


def estimate_tokens(text: str) -> int:
    """Estimate the tokens of a text without any learning."""
    return math.ceil(sum(text_sizes(text)))


class Count(NamedTuple):
    """A prompt's tokens as estimated; the truth is mostly within margin.

    The rest is for TokenCounter.observe; fixed is chat markup and pictures.
    """

    tokens: int
    margin: int
    sizes: Sizes
    fixed: int
    keys: Tuple[int, ...]


class Learned:
    """What is known of one model's vocabulary: a factor for each of Sizes."""

    def __init__(self, factors: Iterable[float] = (1.0, 1.0, 1.0), turns: int = 0) -> None:
        self.factors, self.turns, self.doubted = tuple(factors), turns, False
        self.anchors: Dict[int, Tuple[Count, int]] = {}

    def predict(self, sizes: Sizes, fixed: int) -> float:
        return fixed + sum(factor * size for factor, size in zip(self.factors, sizes))

    def correct(self, sizes: Sizes, error: float) -> None:
        """Move the factors so that error shrinks: all at first, then by half."""
        step = error / max(sum(size * size for size in sizes), 1.0) / (2 if self.turns else 1)
        low, high = FACTOR_RANGE
        self.factors = tuple(min(max(factor + step * size, low), high)
                             for factor, size in zip(self.factors, sizes))
        self.turns += 1


UNTAUGHT = Learned()


class TokenCounter:
    """Count prompts of any number of models, learning from Ollama's counts.

    A session's next prompt is its last, whose count Ollama gave, and what was added; a new
    session with the same tools and system text is like the shortest one seen: so the
    error is that of the difference. Not locked: a race costs at worst a lesson.
    """

    def __init__(self) -> None:
        self.models: Dict[str, Learned] = {}
        self.known: Dict[int, Sizes] = {}

    def sizes_of(self, text: str, share: float = 1.0) -> Tuple[int, Sizes]:
        """Return a text's key and sizes (see text_sizes), remembered from the last time.

        The key is its length and three places: hashing all of 1 MB costs 1.5 ms, and two
        texts mistaken for each other are so alike that their counts are.
        """
        middle = len(text) // 2
        key = hash((len(text), text[:160], text[middle:middle + 160], text[-160:]))
        found = self.known.get(key)
        if found is None:
            if len(self.known) >= MAX_KNOWN_TEXTS:
                self.known.clear()
            found = self.known[key] = text_sizes(text, share)
        return key, found

    def count(self, model: str, rows: Sequence[Tuple[int, Sizes]], images: int = 0) -> Count:
        """Count a prompt: sizes_of its tools, system text and messages, in order."""
        sizes = Sizes(*map(sum, zip(*[size for _, size in rows])))
        fixed = len(rows) * MESSAGE_TOKENS + images * IMAGE_TOKENS
        keys = tuple([hash(tuple([key for key, _ in rows[:parts]])) for parts in ANCHOR_PARTS])
        learned = self.models.get(model, UNTAUGHT)
        tokens = learned.predict(sizes, fixed)
        margin = tokens * (0.06 if learned.turns else 0.12)
        anchors = [learned.anchors[key] for key in keys if key in learned.anchors]
        if anchors:
            added, actual = min((
                (tokens - learned.predict(before.sizes, before.fixed), actual)
                for before, actual in anchors), key=lambda pair: abs(pair[0]))
            tokens, margin = max(actual + added, 1.0), 8 + abs(added) * 0.12
        return Count(math.ceil(tokens), int(margin), sizes, fixed, keys)

    def observe(self, model: str, count: Count, actual: Optional[int]) -> None:
        """Learn from prompt_eval_count.

        Ignored: what no vocabulary explains (Ollama 0.30.0 counts new tokens only, a cut
        prompt counts half) and, once, a number far off what was learned.
        """
        raw, (low, high) = count.fixed + sum(count.sizes), FACTOR_RANGE
        if not actual or not low * raw <= actual <= high * raw:
            return
        learned = self.models.setdefault(model, Learned())
        error = actual - learned.predict(count.sizes, count.fixed)
        doubtful = learned.turns and abs(error) > DOUBTFUL_SHARE * actual
        learned.doubted = bool(doubtful and not learned.doubted)
        if learned.doubted:
            return
        learned.correct(count.sizes, error)
        if len(learned.anchors) >= MAX_ANCHORS:
            learned.anchors.clear()
        shortest, session = count.keys
        learned.anchors[session] = (count, actual)
        if actual <= learned.anchors.get(shortest, (count, actual))[1]:
            learned.anchors[shortest] = (count, actual)

    def to_json(self) -> Json:
        """Return what is worth keeping between runs: each model's factors."""
        return {model: [round(factor, 4) for factor in learned.factors]
                for model, learned in self.models.items()}

    @classmethod
    def from_json(cls, kept: Any) -> TokenCounter:
        """Restore to_json's object, without the entries that make no sense."""
        counter, (low, high) = cls(), FACTOR_RANGE
        for model, factors in kept.items() if isinstance(kept, dict) else ():
            if isinstance(factors, list) and len(factors) == len(Sizes._fields) and all(
                    type(factor) in (int, float) and low <= factor <= high for factor in factors):
                counter.models[model] = Learned(factors, 1)
        return counter


def headroom_tokens(window: int, answers: int = 2) -> int:
    """Return what a turn leaves free so that the compaction after it fits.

    answers counts the prompt's assistant messages: with fewer than two the CLI cannot
    compact (seen on 2.1.197), so such a prompt may use the window whole.
    """
    return min(MAX_HEADROOM_TOKENS, window // 5) if answers >= 2 else 0


def fit(tokens: int, max_tokens: int, window: int, headroom: int = 0, margin: int = 0) -> int:
    """Return num_predict for a prompt that fits, else raise PromptTooLongError.

    headroom stays free behind the prompt and its answer; margin is Count.margin: only a
    prompt too long for certain is refused, since Ollama refuses the others itself within
    10 ms, with exact numbers.
    """
    maximum = window - 1 - headroom
    if tokens - margin > maximum:
        raise PromptTooLongError(tokens, maximum)
    sure, hoped = window - tokens - margin, window - tokens + margin
    return min(max_tokens, max(sure, min(hoped, MIN_ANSWER_TOKENS)))


def _shorten(text: str, keep: int) -> str:
    head, tail = keep * 2 // 3, keep // 3
    gone = len(text) - head - tail
    notice = f"[... {gone} characters left out to fit the model's window ...]"
    return text if gone <= 200 else f"{text[:head]}\n{notice}\n{text[-tail:]}"


def _shorten_block(block: Block, keep: int, everything: bool) -> Block:
    if isinstance(block, ToolResult):
        return block._replace(text=_shorten(block.text, keep), images=())
    if isinstance(block, Image) or not everything:
        return block
    if isinstance(block, ToolUse):
        return block._replace(input={
            name: _shorten(value, keep) if isinstance(value, str) else value
            for name, value in block.input.items()})
    return block._replace(text=_shorten(block.text, keep))


def block_tokens(block: Block) -> int:
    if isinstance(block, Image):
        return IMAGE_TOKENS
    if isinstance(block, ToolUse):
        return estimate_tokens(json.dumps(block.input, ensure_ascii=False))
    return estimate_tokens(block.text) + len(getattr(block, "images", ())) * IMAGE_TOKENS


def shorten_results(messages: Iterable[Message], tokens_over: int) -> Tuple[Message, ...]:
    """Shorten old tool results until tokens_over tokens are saved.

    For a compaction request that does not fit. The last message's own text, which is the
    instruction, stays whole. Lengths come from SHORTEN_STEPS, so a small difference does
    not move the prefix; what is too long even after the last step comes back as it is.
    """
    whole = short = tuple(messages)
    before = sum(block_tokens(block) for message in whole for block in message.blocks)
    for keep, everything in SHORTEN_STEPS:
        short = tuple(message._replace(blocks=tuple(
            _shorten_block(block, keep, everything and message is not whole[-1])
            for block in message.blocks)) for message in whole)
        after = sum(block_tokens(block) for message in short for block in message.blocks)
        if before - after >= tokens_over:
            break
    return short


# A prompt that is too long, in Ollama's words and its relays' (contract/ollama.md 3).
OVERFLOW = Pattern(
    r"exceeds the available context size|exceeds the (?:model's )?(?:maximum )?context length"
    r"|maximum context length is|prompt is longer than the context length|prompt (?:is )?too long"
    r"|context length exceeded|exceed_context_size_error", re.IGNORECASE)
OVERFLOW_PROMPT = Pattern(
    r"(?:request|input length) \((\d{1,9}) tok|n_prompt_tokens\W{1,12}(\d{1,9})")
OVERFLOW_WINDOW = Pattern(
    r"(?:context size|context length) (?:is |\()(\d{1,9}) tok|n_ctx\W{1,12}(\d{1,9})")
OVERFLOW_STATUSES = (0, 200, 400, 413, 500)


def parse_overflow(text: str, status: int) -> Optional[Tuple[Optional[int], Optional[int]]]:
    """Read an overflow error: (tokens of the prompt, window); None if another.

    status is 0 or 200 for an error inside a stream.
    """
    text = text[:8 * MAX_ERROR_CHARS]
    if status not in OVERFLOW_STATUSES or not OVERFLOW.search(text):
        return None
    prompt, window = OVERFLOW_PROMPT.search(text), OVERFLOW_WINDOW.search(text)
    return (int(prompt.group(1) or prompt.group(2)) if prompt else None,
            int(window.group(1) or window.group(2)) if window else None)


GO_MAP_KEYS = Pattern(r" (?:n_ctx|n_prompt_tokens|param|type):|\]+\s*$")


def unwrap_error(error: Any) -> str:
    """Return the sentence inside an error: JSON in JSON, or Go's printed map.

    For example llama-server's object in Ollama's string, words before such an object, or
    `map[code:400 message:words type:x]` (path C). "" when there are no words.
    """
    prefix = ""
    for _ in range(MAX_ERROR_DEPTH):
        if isinstance(error, str):
            start = max(error.find('{"'), 0) if error.rstrip().endswith("}") else 0
            try:
                value = json.loads(error[start:])
            except (ValueError, RecursionError):
                break
            prefix += error[:start]
        elif isinstance(error, dict):
            value = next((error[key] for key in ERROR_KEYS if error.get(key)), None)
        else:
            value = error[0] if isinstance(error, list) and error else None
        if not isinstance(value, (str, dict, list)):
            break
        error = value
    words = error if isinstance(error, str) else json.dumps(error) if error else ""
    before, _, inside = words[:8 * MAX_ERROR_CHARS].partition("map[")
    message = inside.partition("message:")[2]
    words = before + GO_MAP_KEYS.split(message)[0] if message else words
    return " ".join((prefix + words)[:MAX_ERROR_CHARS].split())


class WindowChoice(NamedTuple):
    """A window in tokens, why, and a smaller one to ask for instead."""

    window: int
    reason: str
    step_down: Optional[int] = None


def natural(value: Any) -> int:
    return value if type(value) is int and 0 < value < 1 << 63 else 0


def kv_bytes_per_token(model_info: Any) -> Optional[int]:
    """Compute the 16-bit cache of a token from /api/show's model_info.

    None where a fact is missing; Ollama shows a list (hybrids) as null.
    """
    facts = _mapping(model_info)
    layers, heads, kv_heads, key, embedding, interval = (
        natural(facts.get(f"{facts.get('general.architecture')}.{name}")) for name in KV_FACTS)
    width = key or embedding // max(heads, 1)
    return layers // max(interval, 1) * kv_heads * width * 4 or None


def choose_window(trained: Optional[int], loaded: Optional[int] = None,
                  modelfile: Optional[int] = None, kv_bytes: Optional[int] = None
                  ) -> WindowChoice:
    """Choose the window to ask for: one that serves Claude Code (issue 7).

    In tokens, None where unknown: trained is the model's maximum, loaded what /api/ps
    shows now, modelfile the Modelfile's num_ctx; kv_bytes the cache of a token.
    """
    most = trained or 1 << 30
    if loaded and loaded >= SERVING_WINDOW:
        return WindowChoice(loaded, f"the model is loaded with {loaded} tokens")
    if modelfile and modelfile >= SERVING_WINDOW:
        return WindowChoice(min(modelfile, most), f"the Modelfile asks for {modelfile} tokens")
    if most < SERVING_WINDOW:
        return WindowChoice(most, f"the model was trained for {most} tokens, fewer than the"
                            f" {SERVING_WINDOW} that serve Claude Code")
    for window in WINDOW_STEPS:
        if kv_bytes and window <= most and window * kv_bytes <= MAX_KV_BYTES:
            return WindowChoice(window, f"{window} tokens need {window * kv_bytes / 2**30:.1f}"
                                " GiB of cache")
    return WindowChoice(SERVING_WINDOW, f"{SERVING_WINDOW} tokens serve Claude Code")


def judge_window(asked: int, row: Optional[Json], kv_bytes: Optional[int] = None) -> WindowChoice:
    """Judge by its /api/ps row (None: loading failed) what became of a window.

    A model that spills from the GPU is slow: half the window is asked for if that would
    bring it back. Without a GPU (0.33 shows 0.6 MB of size_vram then) nothing spills.
    """
    lower = asked // 2 if asked // 2 >= MIN_WINDOW else None
    if row is None:
        return WindowChoice(asked, f"loading with {asked} tokens failed", lower)
    window = natural(row.get("context_length")) or asked
    size, inside = natural(row.get("size")), natural(row.get("size_vram"))
    share = inside / size if size else 0.0
    told = f"{window} tokens" + (f" of {asked} asked for" if window < asked else "")
    if share < NO_GPU_SHARE:
        return WindowChoice(window, f"{told}, in main memory")
    told = f"{told}, {share:.0%} on the GPU"
    saved = window // 2 * kv_bytes if kv_bytes else size - inside
    if share >= GOOD_GPU_SHARE:
        return WindowChoice(window, told)
    if lower and inside >= (size - saved) * GOOD_GPU_SHARE:
        return WindowChoice(window, told, lower)
    return WindowChoice(window, f"{told}; fewer would not bring it back")


def window_as_set(num_ctx: Optional[int], trained: Optional[int]) -> int:
    """Return the window that comes of OLLAMA_NUM_CTX; 0 where that is not set."""
    return min(num_ctx or 0, trained or num_ctx or 0)


def judge_explicit(window: int) -> Optional[str]:
    """Return a warning when a window that the user set is too small."""
    left, prompt = window - FIRST_PROMPT_TOKENS, f"first prompt of about {FIRST_PROMPT_TOKENS}"
    if left < 1:
        return (f"{window} tokens cannot hold the CLI's {prompt} tokens;"
                f" set OLLAMA_NUM_CTX to {SERVING_WINDOW} or more")
    if left < headroom_tokens(window) + MIN_WORK_TOKENS:
        return (f"{window} tokens leave only {left} beside the CLI's {prompt};"
                f" {SERVING_WINDOW} work better")
    return None


def compact_env(window: int) -> Dict[str, str]:
    """Return the variables that make the CLI compact before the window is full.

    It compacts at context - min(max output, 20,000) - 13,000 (contract/claude-code.md D,
    F4; seen on 2.1.197 and 2.1.330). Where that would waste a third of the window, or
    come with every turn, a larger context is told, so that it compacts at three quarters
    of the real one. Where even that comes with every turn, it is left to the refusal. In
    small windows results are capped: the CLI gives up a session that was compacted three
    times within three turns each.
    """
    output = max(min(DEFAULT_MAX_TOKENS, window // 8), 1)
    told, point = window, window - min(output, CLI_MAX_RESERVE) - CLI_BUFFER
    if point < window * 2 // 3:
        point, output = window * 3 // 4, max(min(DEFAULT_MAX_TOKENS, window // 4), 1)
        told = point + min(output, CLI_MAX_RESERVE) + CLI_BUFFER
    env = {"CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(output)}
    if point >= FIRST_PROMPT_TOKENS + MIN_WORK_TOKENS:
        env["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] = str(told)
        env["CLAUDE_CODE_AUTO_COMPACT_WINDOW"] = str(min(max(told, 100_000), 1_000_000))
        env["CLAUDE_AUTOCOMPACT_PCT_OVERRIDE"] = "100"
    caps = ((name, window // 8 * unit, default) for name, unit, default in RESULT_CAPS)
    return {**env, **{name: str(cap) for name, cap, default in caps if cap < default}}


def cache_usage(prompt_tokens: int, shared_tokens: int, prefill_s: float,
                prefill_rate: Optional[float]) -> Tuple[int, int, int]:
    """Split a prompt's tokens into (input, cache_read, cache_creation).

    shared_tokens is the prefix that was sent before, prefill_rate the tokens a second of
    a whole read. How long the read took is the one sign of a hit, and good for hit or
    miss only (contract/ollama.md 5): on a miss the prefix counts as created anew.
    """
    shared = max(0, min(shared_tokens, prompt_tokens - 1))
    half_read_s = (prompt_tokens - shared / 2) / prefill_rate if prefill_rate else math.inf
    if prefill_s > max(half_read_s, MIN_MISS_S):
        return prompt_tokens - shared, 0, shared
    return prompt_tokens - shared, shared, 0


# ------------------------------ slimming ------------------------------
# What a small model needs to know of a tool: its names, our own words, and behind | its
# parameters, with words where the name does not say it, and with - where it is not shown:
# the client itself fills it, no local model obeys it, or it is seldom right. A tool is
# recognised by its name and by having no required parameter that the row does not know; the
# client's list is contract/claude-code.md A8 and F1, contract/qwen-code.md. Optional parameters
# that Qwen forgets in long prompts are asked for in the tool's own text (peers.md 2, no. 21).
TOOL_NOTES = """
Bash run_shell_command: Run a shell command. The working directory stays between calls, variables
  do not. For files use the file tools, not cat, sed or echo. Quote paths with spaces. Nothing
  interactive (git rebase -i). Commit or push only when asked. Always give description. | command;
  description: what it does, in 5 to 10 words; timeout: milliseconds, default 120000;
  run_in_background: true: a notice comes when it ends; is_background: true for servers and
  watchers; directory: absolute path to run in; dangerouslyDisableSandbox: -
Read read_file: Show a file: text with line numbers, an image, a PDF or a notebook. Not for
  folders. Of a long file (over 2000 lines) read a part: give offset and limit. | file_path:
  absolute path; offset: line to start at; limit: number of lines; pages: of a PDF, for example
  1-5; allow_large: -
Edit edit: Replace text in a file that you have read. old_string is exact, with its indentation
  and without line numbers, and must occur once: add lines around it, or set replace_all. |
  file_path: absolute path; old_string; new_string; replace_all: change every occurrence
Write write_file: Write a whole file, new or in place of the old one. Read an old one first; to
  change a part use the edit tool. | file_path: absolute path; content; record_as_artifact: -
NotebookEdit notebook_edit: Replace, insert or delete one cell of a Jupyter notebook that you have
  read. | notebook_path: absolute path; cell_id: the cell, or the one to insert after; new_source;
  cell_type: needed for insert; edit_mode: default replace
Glob glob: Find files by name pattern, newest first. | pattern: for example src/**/*.ts; path:
  folder, default the working directory
Grep grep_search: Search file contents for a regular expression (ripgrep syntax). Narrow it with
  path and glob. | pattern; path: file or folder; glob: for example *.js; limit: lines at most;
  type: file type, for example py; output_mode: default files_with_matches; -i: ignore case; -n:
  line numbers; -A: lines after; -B: lines before; -C: lines around; head_limit: results at most;
  multiline: let . match newlines
Agent Task agent: Give a large independent task to a subagent; do small things yourself. It knows
  only your prompt: state goal, paths and what to report. Only you see its report: tell the user,
  and never guess it. | description: 3 to 5 words; prompt; subagent_type: one of the listed;
  run_in_background: false: wait for the report; isolation: -; model: -; effort: -
Skill skill: Load instructions for one kind of task. Call it first when a listed skill fits or the
  user types /name. Never guess names; /help and the like are no skills. | skill: name as listed,
  no slash; args
ToolSearch: Load tools that are only listed by name, so that they can be called. | query:
  select:NAME,NAME or words; max_results: default 5
WebFetch web_fetch: Fetch a public web page and answer prompt from it. Not for localhost or pages
  behind a login. | url; prompt: what to find out; offset: where to read on
AskUserQuestion: Let the user choose, only where you cannot go on without it. 1 to 4 questions,
  each with 2 to 4 options; Other is added. | questions; answers: -; annotations: -; metadata: -
TodoWrite todo_write: Set the list of steps shown to the user. Send the whole list each time; one
  item in progress at a time, marked completed as soon as it is done. | todos
TaskStop task_stop KillShell: Stop a background task. | task_id; shell_id: old name of task_id
ListAgents: List the agents that SendMessage can reach. | cursor: -; channel: -; q: -
SendMessage: Send a message to another agent, for example to go on with a finished subagent. | to:
  name or id of the agent; message; summary: 5 to 10 words; notify_when_idle
ExitPlanMode: In plan mode: say that the plan file is written and ask the user to approve it. Ends
  planning; the only way to ask for approval. | allowedPrompts; plan: the plan
EnterPlanMode: Start plan mode: explore and write a plan for the user to approve, before a change
  that is large or open to choices.
WebSearch: Search the web. Name the pages you used. | query; allowed_domains; blocked_domains
BashOutput: Show new output of a background command. | bash_id; filter: regular expression
TaskOutput: Show the output of a background task. | task_id; block: wait for its end; timeout:
  milliseconds
TaskCreate: Add a task to the list shown to the user; for work of three or more steps. | subject:
  short title; description: what to do; activeForm: for example Running tests; metadata
TaskUpdate: Change a task: in_progress when you start it, completed only when it is wholly done. |
  taskId; status; subject; description; activeForm; owner; metadata; addBlocks: ids that wait for
  this; addBlockedBy: ids this waits for
TaskGet: Show one task of the list. | taskId
TaskList: Show the task list.
EnterWorktree: Work in a git worktree, only when the user or CLAUDE.md says so. | name: of a new
  one; path: of an existing one
ExitWorktree: Leave the worktree that EnterWorktree made. | action; discard_changes: only when the
  user agreed
ScheduleWakeup: In /loop: say when to wake up again, or stop the loop. | delaySeconds: 60 to 3600;
  reason: one sentence; prompt: the /loop input again; stop: true: end the loop; noop: true:
  nothing had changed
Workflow: Run a script that directs many subagents. Only when the user asked for a workflow in so
  many words; load the skill workflow-authoring first where there is one. The script begins with
  export const meta = {name, description}. | script: JavaScript; name: of a saved workflow; args;
  scriptPath; resumeFromRunId; description; title
ReportFindings: Report the findings of a code review, worst first, when the review's instructions
  say so. | findings; level
Monitor: Watch a command in the background; each line it prints is a notice to you. | command;
  description: what is watched; timeout_ms: at most 600000; ws: a WebSocket instead of a command
CronCreate: Run a prompt later or again and again. | cron: minute hour day month weekday, local
  time; prompt; recurring: false: once; durable: true: survives a restart
CronDelete: Cancel a scheduled prompt. | id
CronList: List the scheduled prompts.
"""
ToolText = Tuple[str, Dict[str, Optional[str]]]


@cache
def tool_texts() -> Dict[str, ToolText]:
    """Read TOOL_NOTES: each tool's text and those of its parameters, None for a hidden one."""
    texts: Dict[str, ToolText] = {}
    for row in rows_of(TOOL_NOTES):
        names, _, rest = row.partition(": ")
        text, _, rest = rest.partition(" | ")
        parameters: Dict[str, Optional[str]] = {}
        for parameter in filter(None, rest.split("; ")):
            name, _, words = parameter.partition(": ")
            parameters[name] = None if words == "-" else words
        texts.update(dict.fromkeys(names.split(), (text, parameters)))
    return texts


# Characters of what is not ours to rewrite: a tool of an MCP server, one of its
# parameters. Models act on the first sentences; servers send up to 10 KB a tool.
MAX_TOOL_TEXT_CHARS = 1000
MAX_PARAMETER_TEXT_CHARS = 240
# The same for what is nested in a known tool's parameters: its own text says the rest.
MAX_NESTED_TEXT_CHARS = 60
AGENTS_IN_TOOL = Pattern(r"(?m)^.{0,40}vailable agent types.{0,60}:\n(?:- .*\n?)+")
SKILL_IN_TOOL = Pattern(
    r"<skill>\s*<name>([^<]{1,99})</name>\s*<description>([^<]{0,9999})</description>")
ENTRY = Pattern(r"(?m)^- (?:\*\*)?(?:([\w-]{1,80})(?:\*\*)?: )?[^\n]*(?:\n(?!- |\n)[^\n]+)*")


def slim_tool(tool: Tool) -> Tool:
    """Say the same of a tool in fewer words; same input, same bytes.

    Known tools get our own text (and keep a list of agents or skills that stands in theirs),
    others keep theirs up to MAX_TOOL_TEXT_CHARS. Calls are still checked by the client's
    schema.
    """
    text, parameters = tool_texts().get(tool.name, ("", {}))
    known = bool(text) and all(name in parameters for name in required_of(tool.schema))
    if not known:
        text, parameters = clip(tool.description, MAX_TOOL_TEXT_CHARS), {}
    elif tool.name in AGENT_TOOLS + SKILL_TOOLS:
        text = "\n".join([text, *_list_in_tool(tool.description)])
    return Tool(tool.name, text, slim_schema(tool.schema, parameters))


def _list_in_tool(description: str) -> List[str]:
    """The agents or skills that older clients name in the tool, not in a message."""
    if agents := AGENTS_IN_TOOL.search(description):
        return [clip_entries(agents.group().rstrip())]
    skills = [f"- {found.group(1).strip()}: {' '.join(found.group(2).split())}"
              for found in SKILL_IN_TOOL.finditer(description)]
    return ["Available skills:", clip_entries("\n".join(skills))] if skills else []


def slim_schema(schema: Json, texts: Mapping[str, Optional[str]]) -> Json:
    """Shorten a schema's descriptions; texts has those of its own parameters."""
    slim: Json = _clipped(schema, MAX_NESTED_TEXT_CHARS if texts else MAX_PARAMETER_TEXT_CHARS)
    parameters = properties_of(slim)
    for name, words in texts.items():
        if words is None:
            parameters.pop(name, None)
        elif isinstance(parameters.get(name), dict):
            parameters[name].pop("description", None)
            if words:
                parameters[name]["description"] = words
    return slim


def _clipped(node: Any, limit: int) -> Any:
    if isinstance(node, list):
        return [_clipped(item, limit) for item in node]
    if not isinstance(node, dict):
        return node
    return {key: clip(value, limit) if key == "description" and isinstance(value, str)
            else _clipped(value, limit) for key, value in node.items()}


def clip(text: str, limit: int) -> str:
    """Cut text to about limit characters, at a sentence or word, marked with …"""
    text = text.strip()
    if len(text) <= limit:
        return text
    head = text[:limit]
    cut = max(head.rfind(". ") + 1, head.rfind("\n"))
    if cut < limit // 2:
        cut = max(head.rfind(" "), limit // 2)
    return head[:cut].rstrip() + " …"

def whole_lines(start: str, more: str = "") -> str:
    """Make the pattern of a paragraph, and of those behind it that begin with more."""
    lines = r"(?:[^\n]+\n)+"
    further = rf"(?:\n+(?={more}){lines})*" if more else ""
    return rf"(?<![^\n]\n)(?={start}){lines}{further}\n*"


AGENT_TOOLS = ("Agent", "Task", "agent")
SKILL_TOOLS = ("Skill", "skill")
TASK_TOOLS = ("TaskCreate", "TaskUpdate", "TodoWrite", "todo_write")
# Passages of the client's texts that are about tools: name, pattern of whole lines, tools,
# header. One is left out unless one of its tools is forwarded, and always without any; if it
# stays, header takes the place of its first line.
# First lines as 2.1.197, 2.1.330 and Qwen Code 0.24.4 write them (contract A6, F1).
PASSAGES: Tuple[Tuple[str, str, Tuple[str, ...], str], ...] = (
    ("list of agents", whole_lines(
        r"Available agent types for the \w+ tool:", r"When you launch multiple agents "),
     AGENT_TOOLS, ""),
    ("list of skills", whole_lines(
        r"The following skills are available for use with the Skill tool\b",
        r"- |<available_skills>|</?skill>"), SKILL_TOOLS, ""),
    ("list of deferred tools", whole_lines(DEFERRED_HEADING), SEARCH_TOOLS,
     "Load these tools with ToolSearch (select:NAME) before you call them:"),
    ("task reminder", whole_lines(
        r"The (?:task tools haven't|TodoWrite tool hasn't) been used recently\."),
     TASK_TOOLS, ""),
    # The texts of Skill and Agent say these two already.
    ("hint at skills", r" ?- When the user types `/[^`\n]{1,40}`, invoke it via Skill[^\n]*\n",
     (), ""),
    ("hint at agents",
     r" ?- (?:Use the (?:Agent|Task) tool with specialized agents"
     r"|Calling Agent with subagent_type"
     r"|For broad codebase exploration [^\n]{0,80} spawn Agent with )[^\n]*\n", (), ""),
    ("hint at tasks", r" ?- Use (?:TaskCreate|TodoWrite) to plan [^\n]*\n", TASK_TOOLS, ""),
    # The client's own budget, of a window that the local model does not have; a new
    # number at every turn breaks the prefix (contract/ollama.md 5, #17918).
    ("token count", whole_lines(r"<total_tokens>[^<\n]{0,80}</total_tokens>\s*$"), (), ""),
)
LINE_OF_BLANKS = Pattern(r"\n[^\S\n]+(?=\n)")
PASSAGE = Pattern("(?m)^(?:" + "|".join(f"({pattern})" for _, pattern, _, _ in PASSAGES) + ")")
SHORTENED = ("list of agents", "list of skills")
# The client's own agents and skills: a name and a few words are enough. The user's
# entries keep what he wrote up to MAX_ENTRY_CHARS.
CLIENT_ENTRIES = frozenset(words_of("""
    claude claude-code-guide Explore general-purpose Plan statusline-setup dataviz
    deep-research update-config keybindings-help verify code-review simplify
    fewer-permission-prompts loop claude-api workflow-authoring run plugin-authoring init
    review security-review"""))
MAX_CLIENT_ENTRY_CHARS = 60
MAX_ENTRY_CHARS = 600
# Texts that hold the user's rules are never searched, whatever they quote.
USER_RULES = Pattern(r"(?m)^# claudeMd$|^Codebase and user instructions are shown below")
REMINDER = Pattern(r"(\s*<system-reminder>\n)(.*?)(\n</system-reminder>\s*)", re.DOTALL)
EMPTY_HEADING = Pattern(r"(?m)^# Session-specific guidance(?:\n\s*(?=# )|\s*\Z)")


def slim_text(text: str, kept_tools: Sequence[str]) -> Tuple[str, List[str]]:
    """Leave out passages about tools that are not forwarded.

    For system blocks, role:"system" messages and user blocks that begin with
    <system-reminder> (of those only the reminders are read, never what follows them).
    Returns the text and the names of what was left out or shortened; a reminder of
    which nothing remains goes as a whole. Unknown text stays as it is.
    """
    slim, left_out = (_slim_known if len(text) <= MAX_SLIM_KNOWN_CHARS else _slim_text)(
        text, tuple(kept_tools))
    return slim, list(left_out)


def _slim_text(text: str, kept_tools: Tuple[str, ...]) -> Tuple[str, List[str]]:
    left_out: List[str] = []
    if not text.lstrip().startswith(REMINDER_START):
        return _slim_passages(text, kept_tools, left_out), left_out
    parts, end = [], 0
    while reminder := REMINDER.match(text, end):
        opening, whole, closing = reminder.groups()
        inner = _slim_passages(whole, kept_tools, left_out)
        if inner.strip() or inner == whole:
            parts.append(opening + inner + closing)
        end = reminder.end()
    return "".join(parts) + text[end:], left_out


# The same texts come with each turn of a session: 0.2 ms of a 77 KB request's 1.2.
_slim_known = lru_cache(maxsize=128)(_slim_text)


def _slim_passages(text: str, kept_tools: Sequence[str], left_out: List[str]) -> str:
    if USER_RULES.search(text):
        return text

    def slim(match: re.Match[str]) -> str:
        name, _, needs, header = PASSAGES[(match.lastindex or 1) - 1]
        passage = match.group()
        if not any(tool in kept_tools for tool in needs):
            left_out.append(name)
            return ""
        short = header + passage[passage.index("\n"):] if header else passage
        if name in SHORTENED:
            short = clip_entries(short)
        if short != passage:
            left_out.append(name + ", shortened")
        return short

    before = len(left_out)
    slimmed = PASSAGE.sub(slim, LINE_OF_BLANKS.sub("\n", f"\n{text}\n"))[1:-1]
    return EMPTY_HEADING.sub("", slimmed) if len(left_out) > before else text


def clip_entries(passage: str) -> str:
    """Shorten the entries of a list of agents or skills ("- name: what it is for")."""
    return ENTRY.sub(lambda entry: clip(entry.group(), MAX_CLIENT_ENTRY_CHARS
                                        if entry.group(1) in CLIENT_ENTRIES
                                        else MAX_ENTRY_CHARS), passage)


# ------------------------------ bodies ------------------------------

class ModelFacts(NamedTuple):
    """What is known of a model; the defaults serve where Ollama tells nothing.

    path is A (Ollama's own renderer), B (Go template), C (the GGUF's own template) or
    "" (contract/ollama.md 0). tools_in_text: tool definitions must go into the system
    text, since the template would misprint them or the model has no tool support.
    drops_calls: the template prints no tool calls beside text. tools_first: tools come
    before the system text. chatml: prompts are ChatML, so that the raw way can serve.
    """

    name: str
    path: str = ""
    renderer: str = ""
    capabilities: Optional[AbstractSet[str]] = None
    trained: Optional[int] = None
    num_ctx: Optional[int] = None
    digest: str = ""
    remote: bool = False
    tools_in_text: bool = False
    drops_calls: bool = False
    tools_first: bool = False
    chatml: bool = False
    think_refused: bool = False

    def lacks(self, capability: str) -> bool:
        """Say whether the model is known not to have a capability."""
        return self.capabilities is not None and capability not in self.capabilities


TOOLS_FIRST_RENDERERS = ("qwen3.5", "qwen3.8")
RENDERER_LINE = Pattern(r"^RENDERER\s+(\S+)", re.MULTILINE)
FROM_DIGEST = Pattern(r"^FROM\s.*sha256-([0-9a-f]{12,64})", re.MULTILINE)
NUM_CTX_LINE = Pattern(r"^num_ctx\s+([0-9]{1,9})\s*$", re.MULTILINE)


def facts_from_show(name: str, show: Any) -> ModelFacts:
    """Read /api/show; whatever is missing or of another type is left unknown."""
    show = _mapping(show)
    modelfile, template = str(show.get("modelfile") or ""), str(show.get("template") or "")
    renderer = _first_group(RENDERER_LINE, modelfile)
    window = _first_group(NUM_CTX_LINE, str(show.get("parameters") or ""))
    lengths = (natural(value) for key, value in _mapping(show.get("model_info")).items()
               if key.endswith(".context_length"))
    capabilities = show.get("capabilities")
    known = frozenset(map(str, capabilities)) if isinstance(capabilities, list) else None
    own_template = "{%" in template or template.strip() == "{{ .Prompt }}"
    return ModelFacts(
        name=name, path="A" if renderer else "C" if own_template else "B" if template else "",
        renderer=renderer, tools_first=renderer.startswith(TOOLS_FIRST_RENDERERS),
        capabilities=known, tools_in_text=known is not None and "tools" not in known,
        trained=next(filter(None, lengths), None), num_ctx=int(window) if window else None,
        digest=_first_group(FROM_DIGEST, modelfile),
        remote=bool(show.get("remote_model") or show.get("remote_host")))


def _first_group(pattern: Pattern, text: str) -> str:
    match = pattern.search(text)
    return str(match.group(1)) if match else ""


# One canned conversation shows what a template does with tools (contract/ollama.md 0).
PROBE_TOOL = Tool("ProbeTool", "probe", {
    "type": "object", "properties": {"probe_arg": {"type": "string"}}, "required": ["probe_arg"]})
PROBE_MESSAGES: Tuple[Json, ...] = (
    {"role": "system", "content": "probe system"},
    {"role": "user", "content": "probe question"},
    {"role": "assistant", "content": "probe said", "tool_calls": [
        {"id": "call_1", "function": {
            "name": "ProbeTool", "arguments": {"probe_arg": "probe value"}}}]},
    {"role": "tool", "tool_name": "ProbeTool", "tool_call_id": "call_1", "content": "probe result"},
)
GO_STRUCT = Pattern(r"\{ProbeTool probe \{object")
CHATML_START = "<|im_start|>"


def probe_body(name: str, options: Json) -> Json:
    """Make the render-only request; load options must be those of every turn, or it reloads.

    A server that cannot render only (before 0.11.5) generates one token.
    """
    return {"model": name, "messages": list(PROBE_MESSAGES), "tools": [tool_json(PROBE_TOOL)],
            "stream": True, "_debug_render_only": True, "truncate": False, "shift": False,
            "options": {**options, "num_predict": 1}}


class Rendered(NamedTuple):
    """A prompt as Ollama rendered it, and that as JSON."""

    prompt: str
    json: str


RENDERED_KEY = Pattern(r'"rendered_template":\s*')


def rendered_prompt(answer: str) -> Optional[Rendered]:
    """Take the prompt out of a render-only answer's JSON; None where it has another shape."""
    key = RENDERED_KEY.search(answer)
    at = key.end() if key else len(answer)
    try:
        prompt, end = _scan_json(answer, at)
        rest = _strict_json.decode(answer[:at] + "0" + answer[end:])
    except (ValueError, RecursionError):
        return None
    if not prompt or _inside(rest, "_debug_info", "rendered_template") != 0 \
            or not isinstance(prompt, str):
        return None
    written = answer[at:end]  # Go writes < > and & in six bytes, and prompts are full of them
    return Rendered(prompt, to_json(prompt) if "\\u00" in written else written)


def facts_from_probe(facts: ModelFacts, prompt: str) -> ModelFacts:
    """Add what the rendered probe shows."""
    return facts._replace(
        tools_in_text=facts.tools_in_text or bool(GO_STRUCT.search(prompt))
        or "ProbeTool" not in prompt.partition("probe question")[0],
        drops_calls="probe value" not in prompt,
        tools_first=0 <= prompt.find("ProbeTool") < prompt.find("probe system"),
        chatml=CHATML_START in prompt)


# Nesting of a schema; deeper parts become {}. A reference counts for three levels: a type that
# holds itself in five places, as filters do, would grow five-fold with each.
SCHEMA_DEPTH = 12
REFERENCE_DEPTH = 3


def normal_schema(schema: Any, defs: Optional[Json] = None, depth: int = 0) -> Json:
    """Rewrite a JSON schema so that Ollama's strict decoder takes it (OL 1, tools).

    References are put in place; boolean schemas become {}; oneOf and allOf, which
    Ollama drops, become anyOf and a merge; keywords that it drops are left out.
    """
    if not isinstance(schema, dict) or depth > SCHEMA_DEPTH:
        return {}
    if defs is None:
        defs = {**_mapping(schema.get("definitions")), **_mapping(schema.get("$defs"))}
    schema = _resolved(schema, defs)
    parts = schema.get("allOf")
    for part in parts if isinstance(parts, list) else ():
        schema = {**_resolved(_mapping(part), defs), **schema}
    depth += REFERENCE_DEPTH if "$ref" in schema else 1
    kind, names, properties = (schema.get(key) for key in ("type", "required", "properties"))
    choices = schema.get("anyOf", schema.get("oneOf"))
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    words, items = schema.get("description"), normal_schema(schema.get("items"), defs, depth)
    normal = {
        "type": kind if isinstance(kind, str) or _all_strings(kind) else None,
        "description": words if isinstance(words, str) else None,
        "enum": values if isinstance(values, list) else None,
        "items": items or None,
        "properties": {str(name): normal_schema(part, defs, depth)
                       for name, part in properties.items()}
        if isinstance(properties, dict) else None,
        "required": names if _all_strings(names) else None,
        "anyOf": [normal_schema(part, defs, depth) for part in choices] or None
        if isinstance(choices, list) else None}
    return {key: value for key, value in normal.items() if value is not None}


def _resolved(schema: Json, defs: Json) -> Json:
    name = str(schema.get("$ref") or "").rpartition("/")[2]
    return {**_mapping(defs.get(name)), **schema}


def _all_strings(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)


def _single_extra(schema: Json) -> Json:
    """Leave a property one keyword besides type and description, the rest as words.

    The qwen3-coder renderer prints two or more in random order, which breaks the
    prefix (OL 1; public Ollama issue 18430).
    """
    extra = [key for key in ("properties", "items", "anyOf", "enum", "required") if key in schema]
    if len(extra) < 2:
        return schema
    single = dict(schema)
    words = "; ".join([f"{key}: {to_json(single.pop(key))}" for key in extra[1:]])
    single["description"] = f"{schema.get('description', '')} ({words})".strip()
    return single


def tool_json(tool: Tool, renderer: str = "") -> Json:
    """Make Ollama's form of a tool definition."""
    schema = normal_schema(tool.schema)
    properties = schema.get("properties", {})
    if renderer == "qwen3-coder":
        properties = {name: _single_extra(part) for name, part in properties.items()}
    required = {"required": schema["required"]} if "required" in schema else {}
    return {"type": "function", "function": {
        "name": tool.name, "description": tool.description,
        "parameters": {"type": "object", **required, "properties": properties}}}


# The wording that Qwen 2.5 and 3 were trained on, as their own templates print it.
TOOLS_HEAD = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
"""
TOOLS_TAIL = """
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""


def tools_as_text(tools: Iterable[Tool]) -> str:
    """Write tool definitions for the system text."""
    return TOOLS_HEAD + "\n".join(
        json.dumps(tool_json(tool), ensure_ascii=False) for tool in tools) + TOOLS_TAIL


Turns = List[Tuple[int, Message]]  # each with the index of its first message


def _join_texts(texts: Iterable[str]) -> str:
    """Join text blocks with a blank line.

    The CLI adds a line feed to a block once another follows it (A6): without this
    the same block would change after a failed prompt.
    """
    kept = [text for text in texts if text]
    return "\n\n".join([text[:-1] if text.endswith("\n") else text for text in kept[:-1]]
                       + kept[-1:])


def _joined_text(blocks: Iterable[Block]) -> str:
    return _join_texts([block.text for block in blocks_of(Text, blocks)])


def fold_turns(messages: Sequence[Message]) -> Tuple[List[str], Turns]:
    """Put system messages where every template keeps them and join like neighbours.

    Returns the system texts that came before any turn, and the turns. A later system
    message rides as a reminder in the user turn before it, else in the one after it:
    templates drop it or hoist it to the top, which loses it or makes the model read
    everything again (OL 1, OL 5).
    """
    leading: List[str] = []
    turns: Turns = []
    for index, message in enumerate(messages):
        role, blocks = message.role, message.blocks
        if role == "system":
            text = without_billing(_joined_text(blocks))
            if not text:
                continue
            if not turns:
                leading.append(text)
                continue
            role, blocks = "user", (Text(as_reminder(text)),)
        if turns and turns[-1][1].role == role:
            start, last = turns[-1]
            turns[-1] = (start, Message(role, last.blocks + blocks))
        else:
            turns.append((index, Message(role, blocks)))
    return leading, turns


def call_markup(name: str, arguments: Any) -> str:
    """Write a call as Qwen models do (Hermes form)."""
    return "<tool_call>\n" + json.dumps(
        {"name": name, "arguments": arguments}, ensure_ascii=False) + "\n</tool_call>"


def _assistant_message(message: Message, facts: ModelFacts) -> Json:
    text, calls = _joined_text(message.blocks), blocks_of(ToolUse, message.blocks)
    thought = "\n".join([b.text for b in blocks_of(Thinking, message.blocks) if b.text])
    made: Json = {"role": "assistant", "content": text}
    if thought:
        made["thinking"] = thought
    if calls and (facts.tools_in_text or (facts.drops_calls and text)):
        marks = [call_markup(call.name, call.input) for call in calls]
        made["content"] = "\n".join(filter(None, [text, *marks]))
    elif calls:
        made["tool_calls"] = [
            {"id": call.id, "function": {"index": i, "name": call.name, "arguments": call.input}}
            for i, call in enumerate(calls)]
    return made


NO_RESULT = "[No result: the call was interrupted before it ended.]"


def _in_call_order(results: List[ToolResult], calls: Sequence[ToolUse]) -> List[ToolResult]:
    """Sort results by the calls they answer, since Ollama pairs them by order alone.

    The CLI sends them as they were completed (A7). A call without a result gets a
    placeholder where others have one, or the rest would answer the wrong call.
    """
    by_id = {result.id: result for result in results}
    ordered = [by_id.pop(call.id, ToolResult(call.id, NO_RESULT)) for call in calls]
    return ordered + [result for result in results if result.id in by_id]


def _user_messages(message: Message, calls: Sequence[ToolUse], facts: ModelFacts) -> List[Json]:
    """Make the tool messages and the user message of one client turn."""
    results = blocks_of(ToolResult, message.blocks)
    texts = [b.text for b in blocks_of(Text, message.blocks) if b.text]
    made: List[Json] = []
    pictures: List[Image] = []
    names = {call.id: call.name for call in calls}
    for result in _in_call_order(results, calls) if results else ():
        seen: Sequence[Image] = result.images
        if facts.path == "C" and not facts.lacks("vision"):
            pictures, seen = [*pictures, *seen], ()  # jinja templates print a tool's text only
        made.append({"role": "tool", **_with_images(result.text, seen, facts),
                     "tool_name": names.get(result.id, ""), "tool_call_id": result.id})
    pictures += blocks_of(Image, message.blocks)
    if made and not pictures and all(t.lstrip().startswith(REMINDER_START) for t in texts):
        # A user turn behind tool results makes thinking models read everything since the
        # last one again: 1,774 tokens against 32 (OL 5b).
        made[-1]["content"] = _join_texts([made[-1]["content"], *texts])
    elif texts or pictures:
        made.append({"role": "user", **_with_images(_join_texts(texts), pictures, facts)})
    return made


def _with_images(text: str, images: Sequence[Image], facts: ModelFacts) -> Json:
    """Pass images on, or say in the text that this model cannot see them."""
    if not images:
        return {"content": text}
    if not facts.lacks("vision"):
        return {"content": text, "images": [image.base64 for image in images]}
    notice = f"[{len(images)} image{'s were' if len(images) > 1 else ' was'} left out here:" \
             f" the model {facts.name} cannot see images.]"
    return {"content": _join_texts([text, notice])}


# The git status at the end of the CLI's system text (2.1.197) differs from session to
# session; behind it the tools, and all else, would be read again (OL 5b).
VOLATILE_END = "\ngitStatus: "


def move_volatile(system: List[str], turns: Turns) -> Tuple[List[str], Turns]:
    """Move what changes between sessions from the system text into the first user turn."""
    cut = [text.partition(VOLATILE_END) for text in system]
    moved = tuple([Text(as_reminder(mark[1:] + rest)) for _, mark, rest in cut if mark])
    if not moved or not turns or turns[0][1].role != "user":
        return system, turns
    stable = [text.rstrip("\n") if mark else text for text, mark, _ in cut]
    index, first = turns[0]
    return stable, [(index, Message("user", moved + first.blocks)), *turns[1:]]


CHOICE_WORDS = {
    "any": "Answer with a tool call now: this turn must call one of the tools.",
    "tool": "Answer with a call of the tool {name} now, and of no other tool.",
}


def chat_messages(
    request: Request, tools: Sequence[Tool], facts: ModelFacts,
    recall: Callable[[int, Message], Optional[str]], slim: Callable[[str], str], *,
    tools_text: str = "",
) -> List[Json]:
    """Make all messages of /api/chat.

    recall(index, turn) gives an assistant turn's raw text where it is remembered;
    slim shortens texts that are not the user's; tools_text is tools_as_text(tools) where
    the model has no other way to see them.
    """
    leading, turns = fold_turns(request.messages)
    texts, turns = move_volatile([*request.system, *leading], turns)
    system = [slim(text) for text in texts]
    if tools_text:
        system.append(tools_text)
    made: List[Json] = [{"role": "system", "content": "\n\n".join(system)}] if any(system) else []
    calls: Sequence[ToolUse] = ()
    for index, turn in turns:
        if turn.role == "assistant":
            calls = blocks_of(ToolUse, turn.blocks)
            raw = recall(index, turn)
            message = _assistant_message(turn, facts) if raw is None else \
                {"role": "assistant", "content": raw}
            if message["content"] or "tool_calls" in message:
                made.append(message)
        else:
            slimmed = Message("user", tuple([
                Text(slim(b.text)) if isinstance(b, Text) and b.text.startswith(REMINDER_START)
                else b for b in turn.blocks]))
            made.extend(_user_messages(slimmed, calls, facts))
            calls = ()
    words = CHOICE_WORDS.get(request.tool_choice.kind)
    if words and tools and made:
        choice = as_reminder(words.format(name=request.tool_choice.name))
        made[-1]["content"] = _join_texts([made[-1]["content"], choice])
    return made


def keep_alive_value(text: str) -> Union[int, float, str]:
    """Make Ollama's keep_alive: a number of seconds, or a duration with its unit.

    A bare number as a string is refused: "missing unit in duration" (OL 1).
    """
    for read in (int, float):
        with contextlib.suppress(ValueError):
            return read(text)
    return text


def load_options(num_ctx: Optional[int]) -> Json:
    """Make the options that decide how a model is loaded: alike on every request."""
    return {"num_ctx": num_ctx} if num_ctx else {}


class WrittenMessage(NamedTuple):
    """A message with its JSON, and its size as TokenCounter tells it."""

    message: Json
    json: str
    size: Tuple[int, Sizes]


def message_text(message: Json) -> str:
    """Return what a message adds to the prompt, for counting."""
    calls = [call["function"] for call in message.get("tool_calls", ())]
    if not calls and "thinking" not in message:
        return str(message["content"])
    return "\n".join([message.get("thinking", ""), message["content"],
                      *[call_markup(call["name"], call["arguments"]) for call in calls]])


def write_messages(messages: Sequence[Json], last: List[WrittenMessage],
                   counter: TokenCounter) -> Tuple[List[WrittenMessage], int]:
    """Write a session's messages; also return how many of them its last request had.

    A 1 MB session of 78 messages costs 4 ms to write and count, its newest turn 0.1 ms.
    """
    same = 0
    for row, message in zip(last, messages):
        if row.message != message:
            break
        same += 1
    new = [(message, message_text(message)) for message in messages[same:]]
    chars = sum([len(text) for _, text in new]) or 1
    return last[:same] + [
        WrittenMessage(message, to_json(message), counter.sizes_of(text, len(text) / chars))
        for message, text in new], same


def agent_line(agent: str) -> str:
    """Make a subagent's prompt differ from its first token on.

    Two subagents of one kind share most of their prompt; alternating in one slot they
    would throw each other's tail away: 5,000 tokens at every switch (OL 5b).
    """
    number = late("zlib").crc32(agent.encode())
    return f"{number:08x} is the number of this agent."


COMPACTION_MARK = "CRITICAL: Respond with TEXT ONLY"


def wants_thinking(request: Request, facts: ModelFacts) -> Optional[bool]:
    """Decide `think`: None leaves it out, for a model that cannot or may not.

    Where a capable model is not told, it thinks (OL 1), so a request without a
    thinking field says false.
    """
    if facts.think_refused or "thinking" not in (facts.capabilities or ()):
        return None
    return bool(request.thinking)


def turn_fields_of(request: Request, config: Config, options: Json) -> Json:
    """Make the fields that a turn has on either way; options are load options and num_predict."""
    fields: Json = {"stream": True, "truncate": False, "shift": False,
                    "keep_alive": keep_alive_value(config.keep_alive),
                    "options": {**options, **dict(request.sampling)}}
    if request.schema is not None:
        fields["format"] = request.schema
    return fields


def chat_body(request: Request, facts: ModelFacts, config: Config, options: Json, *,
              messages_json: str, tools_json: str) -> str:
    """Write the body of /api/chat from the JSON of its messages and tools."""
    fields = turn_fields_of(request, config, options)
    think = wants_thinking(request, facts)
    if think is not None:
        fields["think"] = think
    tools = f'"tools":{tools_json},' if tools_json else ""
    return f'{{"model":{to_json(facts.name)},"messages":[{messages_json}],' \
           f'{tools}{to_json(fields)[1:]}'


def render_body(chat: str) -> str:
    """Turn a chat body into one that only renders the prompt."""
    return chat[:-1] + ',"_debug_render_only":true}'


def generate_body(request: Request, facts: ModelFacts, prompt_json: str, config: Config,
                  options: Json) -> str:
    """Write the body of /api/generate that has the model continue a rendered prompt.

    think:false keeps Ollama from splitting the thought off on path B (OL 6).
    """
    fields = to_json({"raw": True, "think": False, **turn_fields_of(request, config, options)})
    return f'{{"model":{to_json(facts.name)},"prompt":{prompt_json},{fields[1:]}'


# ============================== 8. UPSTREAM STREAMS ==============================

class NativeCall(NamedTuple):
    """A call that Ollama's own parser read; arguments as they came."""

    name: str
    arguments: Any


class Failure(NamedTuple):
    """The upstream told of an error, or made no sense; nothing follows."""

    error: ShimError


Part = Union[TextDelta, ThinkingDelta, NativeCall, Finish, Failure]
Parts = List[Part]

MODEL_MISSING = Pattern(r"model\b.*\bnot found|try pulling it", re.IGNORECASE)
NO_TOOLS_ERROR = Pattern(r"does not support tools", re.IGNORECASE)
NO_THINKING_ERROR = Pattern(r"does not support thinking", re.IGNORECASE)
# Statuses with which a server may refuse rendering alone, so that chat is worth a try.
NO_RENDERING = (400, 404, 405, 422)
# Failures that the same request meets again: parsers of the same text, memory that is
# not there, values of a wrong type (contract/ollama.md 3, 8).
LASTING_FAILURE = Pattern(
    r"XML syntax error|failed to parse JSON|invalid tool call|unexpected EOF|^EOF$|out.of.memory"
    r"|requires more|more system memory|unable to load|must be of type|invalid format|no user query"
    r"|process has terminated|timed out waiting|multimodal|image input|mmproj|invalid character"
    r"|repeat limit|Unexpected empty grammar", re.IGNORECASE)
HTML_TAG = Pattern(r"<[^<>]{0,500}>")
# What a status means: the error, the words before Ollama's own and those behind them.
Refusal = Tuple[Type[ShimError], str, str]
DENIED: Refusal = (UpstreamDeniedError, "Ollama denied the request",
                   " Check OLLAMA_AUTH_TOKEN and OLLAMA_BASE_URL.")
NO_SUCH_CALL: Refusal = (UpstreamDeniedError, "The server at OLLAMA_BASE_URL lacks this call",
                         " Is it an Ollama server?")
NO_ANSWER: Refusal = (UpstreamDeniedError, "The server at OLLAMA_BASE_URL gave no answer",
                      " It may point elsewhere: set OLLAMA_BASE_URL to Ollama itself.")
BUSY: Refusal = (BusyError, "Ollama is busy", "")
LATE: Refusal = (UpstreamTimeoutError, "Ollama timed out", "")
REFUSALS: Dict[int, Refusal] = {
    401: DENIED, 403: DENIED, 404: NO_SUCH_CALL, 405: NO_SUCH_CALL, 408: LATE, 504: LATE,
    413: (BodyTooLargeError, "The server at OLLAMA_BASE_URL takes no request of this size", ""),
    429: (RateLimitError, "Ollama's rate limit is reached", ""), 503: BUSY, 529: BUSY,
}


def upstream_error(status: int, body: str, model: str, *, retry_after: Optional[str] = None,
                   prompt_tokens: int = 0, window: int = 0) -> ShimError:
    """Choose the error for a refusal of the upstream (contract/ollama.md 3).

    prompt_tokens and window serve where an overflow is told without numbers.
    """
    overflow = parse_overflow(body, status)
    if overflow:
        needed, told = overflow
        limit = told or window or 4096
        return PromptTooLongError(max(needed or prompt_tokens, limit + 1), limit, loaded=bool(told))
    page = body.lstrip()[:1] == "<"  # a proxy's; tags that Ollama's parsers name stay
    text = HTML_TAG.sub(" ", body) if page else unwrap_error(body)
    text = clean(text, MAX_ERROR_CHARS).strip()
    said = f": {text}" if text else "."
    if MODEL_MISSING.search(text) and status in (404, 400, 500):
        return ModelMissingError(
            f"Ollama has no model {model!r}. Get it with: ollama pull {model}  (Ollama said{said})")
    refusal = REFUSALS.get(status) or (NO_ANSWER if status < 400 else None)
    if refusal:
        kind, before, after = refusal
        return kind(f"{before} ({status}){said}{after}", retry_after)
    if status < 500:
        return BadRequestError(f"Ollama refused the request ({status}){said}")
    return UpstreamFailedError(
        f"Ollama failed ({status}){said}", not LASTING_FAILURE.search(text),
        status if status in (500, 502) else 502)


THINK_OPEN, THINK_CLOSE = "<think>", "</think>"


def held_prefix(text: str, mark: str) -> int:
    """Count the characters at the end of text that may begin mark."""
    for size in range(min(len(mark) - 1, len(text)), 0, -1):
        if mark.startswith(text[-size:]):
            return size
    return 0


def split_at(text: str, marks: Sequence[str]) -> Tuple[str, str, str]:
    """Split at the first mark: the text before it, the mark, the rest.

    Where none is met the mark is "", and the rest is what may begin one.
    """
    found = [(text.find(mark), mark) for mark in marks if mark in text]
    if found:
        at, mark = min(found)
        return text[:at], mark, text[at + len(mark):]
    at = len(text) - max((held_prefix(text, mark) for mark in marks), default=0)
    return text[:at], "", text[at:]


# How ThinkSplitter goes on: behind a tag, once its line ends are over; and at the mark
# that ends a state. A stray end of a thought, on a line of its own, is taken out once.
AFTER_TAG = {"opened": "thinking", "closed": "text"}
END_MARKS = {"thinking": ((THINK_CLOSE,), "closed"), "text": (("\n" + THINK_CLOSE,), "rest"),
             "rest": ((), "")}


class ThinkSplitter:
    """Split `<think>` blocks off the text, in pieces cut anywhere.

    thinking=True: the prompt's end has opened the block. A block counts at the start
    of the answer only; a stray closing tag on a line of its own, which a model leaves
    that was told not to think (OL 8, 5), is taken out.
    """

    def __init__(self, thinking: bool = False) -> None:
        self._state = "opened" if thinking else "start"
        self._held = ""

    def feed(self, text: str) -> Parts:
        if self._state == "text" and not self._held and "<" not in text and text[-1:] != "\n":
            return [TextDelta(text)]  # nearly every token
        self._held += text
        parts: Parts = []
        while self._held and self._step(parts):
            pass
        return parts

    def _step(self, parts: Parts) -> bool:
        """Take one piece off what is held; False when more is needed."""
        if self._state == "start":
            return self._begin()
        if self._state in AFTER_TAG:
            self._held = self._held.lstrip("\r\n")
            if self._held:
                self._state = AFTER_TAG[self._state]
            return True
        return self._take(parts)

    def _begin(self) -> bool:
        body = self._held.lstrip()
        for mark, state in ((THINK_OPEN, "opened"), (THINK_CLOSE, "closed")):
            if body.startswith(mark):
                self._state, self._held = state, body[len(mark):]
                return True
            if mark.startswith(body):
                return False
        self._state = "text"
        return True

    def _take(self, parts: Parts) -> bool:
        """Take what is certain before the mark, or before what may begin it."""
        thinking = self._state == "thinking"
        marks, after = END_MARKS[self._state]
        ready, mark, self._held = split_at(self._held, marks)
        if mark:
            ready, self._state = ready + mark[:-len(THINK_CLOSE)], after
        if thinking:
            spaced, ready = ready, ready.rstrip()
            self._held = self._held if mark else spaced[len(ready):] + self._held
        if ready:
            parts.append(ThinkingDelta(ready) if thinking else TextDelta(ready))
        return bool(mark)

    def close(self) -> Parts:
        """Release what is still held."""
        text, self._held = self._held, ""
        if self._state == "thinking":
            text = text.rstrip()
            return [ThinkingDelta(text)] if text else []
        return [TextDelta(text)] if text else []


def _count(value: Any) -> Optional[int]:
    return value if type(value) is int and 0 <= value < 1 << 63 else None


def _finish(line: Json) -> Finish:
    reason = line.get("done_reason")
    seconds = (natural(line.get(key)) / 1e9 for key in (
        "prompt_eval_duration", "eval_duration", "load_duration"))
    return Finish(reason if isinstance(reason, str) else "", _count(line.get("prompt_eval_count")),
                  _count(line.get("eval_count")), *seconds)


def _calls_of(value: Any) -> Parts:
    """Read tool_calls; odd ones go out with what can be read."""
    entries = value if isinstance(value, list) else []
    functions = [_mapping(_mapping(entry).get("function")) for entry in entries]
    return [NativeCall(one["name"], one.get("arguments")) for one in functions
            if isinstance(one.get("name"), str)]


class ChatDecoder:
    """Read the NDJSON of /api/chat.

    feed() takes bytes cut anywhere and returns the parts they complete; neighbouring
    text comes as one part. finished is set by the done line: EOF without it is a
    broken stream (contract/ollama.md 2).
    """

    way, path, verbatim, key = "chat", "/api/chat", False, "content"

    def __init__(self, model: str, thinking: bool = False) -> None:
        self.model = model
        self.finished = self.failed = self._ended = False
        self.lines = 0
        self._lines = LineSplitter()
        self._think = ThinkSplitter(thinking)
        self._raw: List[str] = []

    @property
    def raw(self) -> str:
        """The answer's text so far with its think blocks, as the next turn's history wants it."""
        return "".join(self._raw)

    def feed(self, data: bytes) -> Parts:
        parts: Parts = []
        try:
            if not self._ended:
                self._read(self._lines.feed(data), parts)
        except ShimError as error:
            self._fail(parts, error)
        return parts

    def _read(self, whole: bytes, parts: Parts) -> None:
        """Take whole lines."""
        broken = False
        try:
            text = whole.decode("utf-8")
        except UnicodeDecodeError as problem:
            text, broken = whole[:whole.rfind(b"\n", 0, problem.start) + 1].decode("utf-8"), True
        lines, rest = json_lines(text)
        run: List[str] = []
        for line in lines:
            if self._ended:
                break
            self.lines += 1
            piece = self._plain_text(line)
            if piece is None:
                self._show(run, parts)
                run.clear()
                self._line(line, parts)
            elif piece:
                run.append(piece)
        self._show(run, parts)
        if rest and not self._ended:
            raise self._garbage(rest[:200])
        if broken and not self._ended:
            raise UpstreamBrokenError("Ollama sent bytes that are not UTF-8.")

    def _plain_text(self, line: Any) -> Optional[str]:
        """Return the text of a line that holds nothing else, else None."""
        if type(line) is dict and line.get("done") is False and "error" not in line:
            body = line if self.verbatim else line.get("message")
            if type(body) is dict and "tool_calls" not in body and "thinking" not in body:
                text = body.get(self.key)
                if type(text) is str:
                    return text
        return None

    def _show(self, run: List[str], parts: Parts) -> None:
        if run:
            self._raw.extend(run if self.verbatim else ())
            parts.extend(self._think.feed("".join(run)))

    def _garbage(self, text: str) -> ShimError:
        return UpstreamGarbageError(
            f"Ollama sent an invalid streaming response: not JSON: {clean(text, 80)!r}")

    def _fail(self, parts: Parts, error: ShimError) -> None:
        parts.extend(self._think.close())
        parts.append(Failure(error))
        self.failed = self._ended = True

    def _line(self, line: Any, parts: Parts) -> None:
        """Take thinking, text and calls, in the order that Ollama means (OL 2)."""
        if not isinstance(line, dict):
            raise self._garbage(to_json(line))
        if "error" in line:
            raise upstream_error(500, to_json(line), self.model)
        body = line if self.verbatim else _mapping(line.get("message"))
        thinking, text = body.get("thinking"), body.get(self.key)
        if isinstance(thinking, str) and thinking:
            parts.append(ThinkingDelta(thinking))
        if isinstance(text, str) and text:
            self._show([text], parts)
        parts.extend(_calls_of(body.get("tool_calls")))
        if line.get("done") is True:
            self.finished = self._ended = True
            parts.extend(self._think.close())
            parts.append(_finish(line))

    def close(self) -> Parts:
        """End of the stream: release held text, or tell what is missing."""
        parts: Parts = []
        try:
            if not self._ended:
                self._read(self._lines.rest(), parts)
            if not self._ended:
                raise self._cut_off()
        except ShimError as error:
            cut_within_a_line = self.lines and isinstance(error, UpstreamBrokenError)
            self._fail(parts, self._cut_off() if cut_within_a_line else error)
        return parts

    def _cut_off(self) -> ShimError:
        if not self.lines:
            return UpstreamLostError(
                f"Ollama ended its answer without a word. The model {self.model} may have"
                " crashed or repeated itself; see Ollama's log.")
        return UpstreamBrokenError(
            "Ollama's answer broke off before its end: the connection closed without a done line.")


class GenerateDecoder(ChatDecoder):
    """Read the NDJSON of /api/generate with raw:true: the model's own text."""

    way, path, verbatim, key = "verbatim", "/api/generate", True, "response"


USER_TURN = "<|im_start|>user\n"
# Text after these is no part of an answer; /api/chat stops there by itself, raw
# generation only where the Modelfile says so.
CHATML_ENDS = ("<|im_end|>", "<|im_start|>", "<|endoftext|>")
CHATML_END = Pattern(r"<\|(?:im_end|im_start|endoftext)\|>")
CALL_START = Pattern(r"<tool_call>\s*[{<]")
THINK_OPENING = Pattern(r"(<think>\s*(?:</think>\s*)?)\Z")
NO_THOUGHT = "<think>\n\n</think>\n\n"
ANSWER_START = "<|im_start|>assistant\n"


def opening_of(prompt: str) -> str:
    """Return the think block, open or empty, with which a prompt begins the answer."""
    return _first_group(THINK_OPENING, prompt[-60:])


def closed_thought(text: str) -> str:
    """Close a think block before the call within it, or templates drop both.

    Returns "" where it cannot be told where the thought ends.
    """
    if THINK_OPEN not in text or THINK_CLOSE in text:
        return text
    call = CALL_START.search(text)
    return f"{text[:call.start()].rstrip()}\n</think>\n\n{text[call.start():]}" if call else ""


def restored(prompt: str, answers: Sequence[str]) -> str:
    """Put past answers into a prompt as they were written, think blocks to the byte.

    Renderers that take think blocks apart strip white space, and qwen3.5 leaves out the
    empty ones with which an answer without thought begins: each answer would be read
    again (OL 5). Thought that the template dropped stays out. A prompt that holds other
    than these answers is left as it is: a file's text may speak ChatML too.
    """
    if THINK_OPEN not in prompt:
        return prompt
    head, *parts = prompt.split(ANSWER_START)
    if len(parts) != len(answers) + 1:
        return prompt
    made = [head]
    for part, answer in zip(parts, answers):
        rendered, end, rest = part.partition(CHATML_ENDS[0])
        if parts[-1] == NO_THOUGHT and not answer.startswith(NO_THOUGHT):
            rendered = NO_THOUGHT + rendered
        elif answer.startswith(THINK_OPEN) and \
                (parts[-1] == NO_THOUGHT or rendered.startswith(THINK_OPEN)):
            rendered = answer
        made.append(rendered + end + rest)
    return ANSWER_START.join([*made, parts[-1]])


# ============================== 9. TOOL CALLS IN TEXT ==============================
# A call in text is opened by a tag, a word, a bracket or a fence (TOOL_FORMATS), after
# which comes one of four bodies: JSON, Python arguments, parameters in tags, or a line.
# Whatever opens it, the same four readers read it; words around it decide whether it is
# meant. Text is held only from where a call may begin.

Tools = Mapping[str, Tool]
ReaderEvents = List[Tuple[str, str]]  # what a reader of parameters found: kind and text


class ToolFormat(NamedTuple):
    """One row of TOOL_FORMATS.

    tags open a call, written without brackets, bars and namespace, _ for U+2581;
    words open it at the start of a line (those in square brackets anywhere). example
    calls Read with file_path a.py.
    """

    rule: str
    tags: str
    words: Tuple[str, ...]
    example: str
    source: str


TOOL_FORMATS: Tuple[ToolFormat, ...] = (
    ToolFormat("tool_call", "tool_call toolcall tool_use", (),
               '<tool_call>\n{"name": "Read", "arguments": {"file_path": "a.py"}}\n</tool_call>',
               "Hermes, Qwen 2.5 and 3, Granite 4, MiMo; GLM 4.5 with arg_key; Phi-4 with bars"),
    ToolFormat("function_xml", "function", (),
               "<function=Read>\n<parameter=file_path>\na.py\n</parameter>\n</function>",
               "Qwen3-Coder, Qwen 3.5, Seed-OSS, Step 3.5; Llama 3.1 with a JSON body"),
    ToolFormat("invoke", "invoke", (),
               '<invoke name="Read"><parameter name="file_path">a.py</parameter></invoke>',
               "Claude, MiniMax M2, DeepSeek V3.2 (DSML), Step 3"),
    ToolFormat("tools", "tools tool_calls toolcalls tool_list tool_request", (),
               '<tools>\n{"name": "Read", "arguments": {"file_path": "a.py"}}\n</tools>',
               "qwen2.5-coder (ollama#12174); Jamba, Hunyuan, MiniMax M1, Nemotron <TOOLCALL>"),
    ToolFormat("function_call", "function_call function_calls functioncall function-call "
               "start_function_call longcat_tool_call tool-call", (),
               '<function_call>{"name": "Read", "arguments": {"file_path": "a.py"}}',
               "Granite 3, Granite 20B FC, OLMo 3 (Python), FunctionGemma, LongCat"),
    ToolFormat("deepseek", "tool_calls_begin tool_call_begin", (),
               '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>Read<｜tool▁sep｜>{"file_path": "a.py"}',
               "DeepSeek V3, R1 and V3.1"),
    ToolFormat("kimi", "tool_calls_section_begin", (),
               "<|tool_calls_section_begin|><|tool_call_begin|>functions.Read:0"
               '<|tool_call_argument_begin|>{"file_path": "a.py"}<|tool_call_end|>', "Kimi K2"),
    ToolFormat("python_tag", "python_tag python_start tool_call_start tool_code", (),
               '<|python_tag|>{"name": "Read", "parameters": {"file_path": "a.py"}}',
               "Llama 3 and 4, LFM2"),
    ToolFormat("action_tag", "start_action action_start action_json tools_prefix", (),
               '<|START_ACTION|>[{"tool_name": "Read", "parameters": {"file_path": "a.py"}}]',
               "Command R7B and A, InternLM 2, Apertus"),
    ToolFormat("harmony", "channel recipient start", (),
               "<|channel|>commentary to=functions.Read <|constrain|>json<|message|>"
               '{"file_path": "a.py"}<|call|>', "gpt-oss; Functionary 2"),
    ToolFormat("wrapped", "json response answer action call", (),
               '<response>\n{"name": "Read", "arguments": {"file_path": "a.py"}}\n</response>',
               "seen from small models"),
    ToolFormat("xml_agent", "tool", (),
               "<tool>Read</tool><tool_input>a.py</tool_input>", "LangChain's XML agent"),
    ToolFormat("mistral", "", ("[tool_calls]", "[tool_call]", "[function_call]",
                                 "[tool_request]", "[calling tool:"),
               '[TOOL_CALLS][{"name": "Read", "arguments": {"file_path": "a.py"}}]',
               "Mistral; with [ARGS] from v13 on; LM Studio"),
    ToolFormat("functools", "", ("functools",),
               'functools[{"name": "Read", "arguments": {"file_path": "a.py"}}]',
               "Phi-4 mini, Firefunction 2"),
    ToolFormat("react", "", ("action:", "**action:**"),
               'Action: Read\nAction Input: {"file_path": "a.py"}', "ReAct; Command R with a list"),
    ToolFormat("qwen_agent", "", ("✿function✿:", "✿function✿"),
               '✿FUNCTION✿: Read\n✿ARGS✿: {"file_path": "a.py"}', "Qwen-Agent for Qwen 1.5 and 2"),
    ToolFormat("functionary", "", (">>>",), '>>>Read\n{"file_path": "a.py"}', "Functionary 3.2"),
    ToolFormat("label", "", ("tool_call:", "tool call:", "function_call:", "function call:",
                             "call:", "tool:"),
               'Tool call: {"name": "Read", "arguments": {"file_path": "a.py"}}',
               "seen from small models; call:Read{…} is FunctionGemma's"),
)


def word_set(text: str) -> FrozenSet[str]:
    return frozenset(text.split())


# Tags and words between a tool's name and its input; ends and turn marks after a call.
SEPARATOR_TAGS = word_set(
    "tool_sep tool_call_argument_begin constrain message content tool_input tool_name name "
    "arguments args input parameters parameter_list start plugin interpreter")
SEPARATOR = Pattern(
    r"action[ _]input:|\*\*action input:\*\*|✿args✿:?|\[args\]|\[call_id\]\w*|```\w*|to=|call:|"
    r"functions\.|function:|print\(|name:|arguments:|args:|input:|:", re.I)
INPUT_WORDS = ("action input:", "action_input:", "**action input:**", "✿args✿:", "✿args✿")
CUT_SEPARATORS = (*INPUT_WORDS, "```", "[args]", "[call_id]")
FILLERS = word_set("function commentary analysis final assistant json code")
CALL_TAGS = frozenset(tag for row in TOOL_FORMATS for tag in row.tags.split())
CALL_RULES = {word: row.rule for row in TOOL_FORMATS for word in (*row.tags.split(), *row.words)}
OPENING_WORDS = tuple(sorted(CALL_RULES.keys() - CALL_TAGS, key=len, reverse=True))
CLOSING_TAGS = CALL_TAGS | SEPARATOR_TAGS | word_set("parameter param arg_value arg parameters")
OPENING_LETTERS = frozenset(word[0] for word in OPENING_WORDS)
END_TAGS = word_set("call return eom_id eot_id im_end endoftext bot_end escape tools_suffix "
                     "tool_call tool_calls end eos s python_end")

MARKUP_TAG = Pattern(
    r"<(/?)([^\s<>=/\"'`(){}]{1,48})((?:\s|=|/)[^<>]{0,300}?)?(?:>|(?=\s<parameter))")
TAG_START = Pattern(r"</?[^\s<>=/\"'`(){}]{0,48}(?:(?:\s|=|/)[^<>]{0,300}(?:<[a-z]{0,9})?)?\Z")
TAG_NAMESPACES = ("antml", "minimax", "seed", "steptml", "dsml")
TAG_NAMESPACE = Pattern(rf"^(?:(?:{'|'.join(TAG_NAMESPACES)})[:｜|]|longcat_)")
TAG_VALUE = Pattern(r"""(?s)\s*(?:=|\bname\s*=)\s*["']?([^"'<>]{1,128}?)["']?(?:\s+\w+=.*|\s*/?)""")
FIRST_KEY = Pattern(
    rf"(?:\[\s*)?\{{{{1,2}}\s*{COMMENT}[\"'`“]?([A-Za-z_-]{{1,24}})[\"'`”]?\s*(?::|=>)\s*(?=\S)"
    r"(?:[\"'`“]([^\"'`“”\n]{0,128})[\"'`”]|([A-Za-z_][\w.-]{0,127})(?=[\s,}]))?")
KEY_ALONE = Pattern(r"(?:\[\s*)?\{{1,2}\s*[\"'`“]([A-Za-z_-]{0,24})[\"'`”\W]")
FIRST_KEY_START = Pattern(
    rf"(?:\[\s*)?(?:\{{{{1,2}}\s*{COMMENT}(?:(?://|#)[^\n]{{0,300}}|/(?:\*[^*]{{0,300}}\*?)?|"
    r"[\"'`“]?[A-Za-z_-]{0,24}[\"'`”]?\s*(?::|=>?)?\s*(?:[\"'`“][^\"'`“”\n]{0,128})?)?)?")
OWN_NAME = Pattern(r"(?:print\()?(?:default_api\.|functions\.)?([A-Za-z_][\w-]{0,127}|\Z)")
NAMED_BODY = Pattern(r"\s?(?=\()|:?\s{0,2}(?=\{)")
NAMED_BEGUN = Pattern(r":?\s{0,2}")
VALUE_BEGUN = Pattern(r"[\"'`“][^\n]{0,129}|[\w.-]{1,127}")
PYTHON_NAME = Pattern(r"(?:\[\s*)?(?:print\()?([A-Za-z_][\w.]{0,127})\s?\(\s*(?=[\w\"'){\[]|\Z)")
# Keys that name the tool, the likeliest first.
NAME_ORDER = words_of("name tool toolname functionname function recipient recipientname action "
                      "tooltocall toolid command")
ARGUMENT_KEYS = word_set("arguments parameters input args params kwargs toolinput actioninput "
                          "argumentsjson toolargs inputs payload toolparameters")
NESTED_KEYS = word_set("function toolcall functioncall tooluse call action tool command")
LIST_KEYS = word_set("toolcalls functioncalls calls tooluses actions tools")
LEADING_KEYS = word_set("thought thoughts thinking reasoning explanation id callid toolcallid "
                         "index comment role content")
BODY_KEYS = ARGUMENT_KEYS | LIST_KEYS | LEADING_KEYS | word_set("response message plan analysis")
CALL_KEYS = BODY_KEYS.union(NAME_ORDER, NESTED_KEYS, ("type",))
CALL_TYPES = word_set("function functioncall toolcall tooluse tool call")
FENCE_OPEN = Pattern(r"(`{3,16}|~{3,16})([^\n`{\[<]{0,80})(?:\n|(?=[{\[<]))")
FENCE_START = Pattern(r"(?:`{1,16}|~{1,16})[^\n`{\[<]{0,80}\Z")
FENCE_LINE = Pattern(r"[ \t]{0,3}(`{0,16}|~{0,16})[ \t]{0,8}(?=\n|\Z)")
CALL_SIGN = Pattern(r"\n|<(?=[/|｜A-Za-z_]|\Z)|\[(?=[TtFf]|\Z)")
AFTER_CALL = Pattern(r"\s*(?:(?:(?://|#)[^\n]{0,300}\s*)?<[|｜]?/[^\s<>]{1,60}>|✿\w{1,12}✿:?|"
                     r"\[(?:/|END_)[^\s\[\]]{1,40}\]|"
                     r"[}\])]{1,4}(?=\s|\Z|<|`|[}\])])|[;,](?=\s*[{\[<]))")
UNKNOWN_CALL = Pattern(r"\s*(?:[{\[]|<function=)")
CLOSING_CUT = Pattern(r"\s*(?:<[|｜/]?[^\s<>]{0,60}|[;,]\s*)\Z")
AFTER_BEGUN = Pattern(
    r"/|(?:(?://|#)[^\n]{0,300}\s*)?(?:<[^\s<>]{0,60})?|<[^\s<>]{0,60}\s[^<>]{0,300}|"
    r"\[(?:/[^\s\[\]]{0,40})?|[`~]{1,16}|✿\w{0,12}(?:✿:?)?|[}\])]{1,4}|[,;]\s*")
BLANK_RUN = Pattern(r"\s*")
LINE_TEXT = Pattern(r"[\S\n]")
LIST_BEGUN = Pattern(r"\[\s*[\w.]{0,80}")
TAG_WORD_END = Pattern(r"[\s=]")
CLOSERS = Pattern(r"[}\])]")
TAG_END = Pattern(r">")
INPUT_LINE = Pattern(r"[^\n<]{1,4000}")
SENTENCE_MARKS = ".!?:;…)*>。！？：●⏺"
BARE_RULES = ("json", "named", "pythonic", "wrapped")
# Characters of prose before a call in which its announcement is looked for, and of one
# sentence in which SIGNS are: without a full stop it is no prose.
MAX_CONTEXT_CHARS, MAX_LEAD_CHARS = 1000, 400
MAX_THOUGHT_CHARS = 256 * 1024  # of thought kept in case that a call inside it is all that comes
MAX_SHORT_CHARS = 200  # of a value of one line that is held until its closing tag is seen
MAX_WASTED_CHARS = 128 * 1024  # read in vain before an answer full of openers is passed as it is
MAX_OPENERS = 4  # tags that stand inside each other before a call's body; DeepSeek has two
MAX_STEP_CHARS = 4096  # looked at in one step, so that cutting them off costs little
MAX_HEADER_CHARS = 500  # of a name or first key before text that looks like a call is let go


def skip_blank(text: str, at: int) -> int:
    match = BLANK_RUN.match(text, at)
    return match.end() if match else at


def tag_label(tag: re.Match[str]) -> str:
    """Fold a tag's name: <｜tool▁sep｜> is tool_sep, <invoke …> invoke."""
    bare = tag.group(2).strip("|｜").replace("▁", "_").lower()
    return TAG_NAMESPACE.sub("", bare)


def tag_value(tag: re.Match[str]) -> Optional[str]:
    """Read the name in <function=Read>, <invoke name="Read">; None where there is none."""
    match = TAG_VALUE.fullmatch(tag.group(3) or "")
    return match.group(1).strip() if match else None


# ------------------------------ bodies ------------------------------


class BracketScan:
    """Finds where a bracketed value ends, told piece by piece."""

    OUTSIDE = Pattern(r"""(["'`]|[{\[(]+|[}\])])""")
    INSIDE: Mapping[str, Pattern] = {
        quote: Pattern(rf"[^\\{quote}]*(?:\\.[^\\{quote}]*)*([\\{quote}]?)", re.S)
        for quote in "\"'`"}

    def __init__(self) -> None:
        self._depth, self._escaped, self._stop = 0, 0, self.OUTSIDE

    def feed(self, text: str, at: int = 0) -> int:
        """Return the index behind the bracket that ends the value, or -1."""
        at, self._escaped = at + self._escaped, 0
        while at < len(text):
            match = self._stop.search(text, at)
            if not match:
                break
            at, mark = match.end(), match.group(1)
            if mark in self.INSIDE:
                self._stop = self.INSIDE[mark] if self._stop is self.OUTSIDE else self.OUTSIDE
            elif mark == "\\":  # cut off from what it escapes
                self._escaped = 1
            elif mark in ("}", "]", ")"):
                self._depth -= 1
                if self._depth <= 0:
                    return at
            else:
                self._depth += len(mark)
        return -1


def make_call(name: Any, arguments: Any, tools: Tools, rule: str) -> Optional[Call]:
    """Fit a name and arguments to an offered tool; None when none takes them."""
    meant = tools_meant(name, tools) if isinstance(name, str) else ()
    if meant and meant[0].loader:
        query = {"query": f"select:{meant[0].name}", "max_results": 1}
        return Call(meant[0].loader, query, rule) if arguments is not None else None
    fits = [(tool, fitted) for tool in meant for fitted in (repair_input(tool, arguments),)
            if fitted is not None]
    whole = [pair for pair in fits if pair[1].keys() >= {*required_of(pair[0].schema)}]
    return next((Call(tool.name, fitted, rule) for tool, fitted in whole + fits), None)


def written_answer(answer: str, tools: Tools) -> Optional[Call]:
    """Read an answer that is just the JSON which ANSWER_TOOL was to be called with (CC A9)."""
    tool, text = tools.get(ANSWER_TOOL), answer.strip()
    fence = FENCE_OPEN.match(text)
    if fence and text.endswith(fence[1]):
        text = text[fence.end():-len(fence[1])]
    value = _mapping(loose_json(text) if tool else None)
    fitted = (tool and repair_input(tool, value)) or {}
    whole = tool and fitted.keys() == value.keys() >= {*required_of(tool.schema)}
    return Call(ANSWER_TOOL, fitted, "answer") if fitted and whole else None


def calls_from_json(value: Any, tools: Tools, rule: str) -> Optional[List[Call]]:
    """Read calls from JSON in any published shape; None when any part is no call."""
    if isinstance(value, list):
        found = [calls_from_json(item, tools, rule) for item in value]
        calls = [call for part in found for call in part or ()]
        return calls if calls and None not in found else None
    if isinstance(value, str) and value.lstrip()[:1] == "{":
        return calls_from_json(loose_json(value), tools, rule)
    if not isinstance(value, dict):
        return None
    keys = plain_keys(value)
    for key, original in keys.items():
        if key in LIST_KEYS and isinstance(value[original], list) and (
                key.startswith("tool") or keys.keys() <= LEADING_KEYS | {key, "type"}):
            return calls_from_json(value[original], tools, rule)
    name, arguments = name_and_arguments(value, tools, rule)
    call = None if is_definition(arguments) else make_call(name, arguments, tools, rule)
    return [call] if call else None


def plain_keys(value: Json) -> Dict[str, str]:
    return {plain_name(str(key)): key for key in reversed(list(value))}


def name_and_arguments(value: Json, tools: Tools, rule: str) -> Tuple[Any, Any]:
    """Find the tool's name and its arguments among the keys of one call.

    Arguments may stand beside the name: a key that the tool lacks makes bare JSON data.
    """
    keys = plain_keys(value)
    given = [value[keys[key]] for key in keys if key in ARGUMENT_KEYS]
    for key in keys:
        nested = value[keys[key]]
        if key in NESTED_KEYS and isinstance(nested, dict):
            name, arguments = name_and_arguments(nested, tools, rule)
            return name, given[0] if given and not arguments else arguments
    named = [keys[key] for key in NAME_ORDER if key in keys and isinstance(value[keys[key]], str)]
    if not named:
        only = next(iter(value), "")
        alone = len(value) == 1 and only in tools and isinstance(value[only], dict)
        return (only, value[only]) if alone else (None, None)
    name = next((key for key in named if tools_meant(value[key], tools)), named[0])
    if given:
        return value[name], given[-1]
    spare = {key: each for key, each in value.items() if key != name
             and plain_name(str(key)) not in LEADING_KEYS - {"content"} and key != "type"}
    meant = rule not in BARE_RULES or any(len(repair_input(tool, spare) or ()) == len(spare)
                                          for tool in tools_meant(value[name], tools)
                                          if not tool.loader)
    return value[name], spare if meant else None


def is_definition(arguments: Any) -> bool:
    """Tell a tool's schema, as prompts hold it, from the arguments of a call."""
    properties = arguments.get("properties", arguments) if isinstance(arguments, dict) else None
    return isinstance(properties, dict) and bool(properties) and all(
        map(types_of, properties.values()))


def read_python(text: str, tools: Tools, rule: str) -> Tuple[Optional[List[Call]], int]:
    """Read calls written as Python: Read(file_path="a.py"), alone or in a list."""
    calls: List[Call] = []
    reader, at = LooseJson(text), skip_blank(text, 0)
    listed = text[at:at + 1] == "["
    while True:
        name = PYTHON_NAME.match(text, at)
        if not name:
            return (calls or None), at
        arguments, at = python_arguments(reader, reader.skip(name.end()))
        tool = resolve_tool(name.group(1), tools)
        order = required_of(tool.schema) if tool else []
        call = make_call(name.group(1), arguments[0] if [*arguments] == [0] else {
            order[key] if isinstance(key, int) and key < len(order) else str(key): value
            for key, value in arguments.items()}, tools, rule)
        if call is None:
            return None, at
        calls.append(call)
        at = reader.skip(at)
        if not listed or text[at:at + 1] != ",":
            return calls, at + 1 if listed and text[at:at + 1] == "]" else at
        at = reader.skip(at + 1)


BARE_WORD = Pattern(r"(?!(?:true|false|none|null)\b)[A-Za-z_]", re.I)
PYTHON_KEY = Pattern(r"(\w{1,60})\s*=(?!=)\s*")


def python_arguments(reader: LooseJson, at: int) -> Tuple[Dict[Union[str, int], Any], int]:
    """Read arguments up to the closing parenthesis; those without a name by number."""
    found: Dict[Union[str, int], Any] = {}
    while reader.text[at:at + 1] != ")":
        key = PYTHON_KEY.match(reader.text, at)
        at = key.end() if key else at
        if BARE_WORD.match(reader.text, at):
            raise ValueError("a name, not a value")
        value, at = reader.value(at, END_IN_CALL)
        found[key.group(1) if key else len(found)] = value
        at = reader.skip(at)
        if reader.text[at:at + 1] == ",":
            at = reader.skip(at + 1)
        elif reader.text[at:at + 1] != ")":
            raise ValueError("no closing parenthesis")
    return found, at + 1


class InputReader:
    """Reads the parameters of a call, piece by piece, into events (kind, text).

    key names a parameter, text is a piece of its value, end closes it; value is a whole
    one that is no string, as JSON text. done tells that the call is over and rest what
    follows it; cut that a value had no closing tag, lost that what was read is doubtful.
    """

    def __init__(self) -> None:
        self.events: ReaderEvents = []
        self.done = self.cut = self.lost = self._final = False
        self.rest = ""
        self._scanned = 0
        self._step: Callable[[], bool] = self._begin

    def feed(self, text: str, final: bool = False) -> None:
        self.rest += text
        self._final = final
        while not self.done and self._step():
            pass

    def _begin(self) -> bool:
        """Read what stands between values; as every step, tell whether to go on."""
        raise NotImplementedError

    def passes(self, text: str) -> bool:
        """Tell text that is the open value's as it stands, with no need to read it."""
        raise NotImplementedError


class TaggedInput(InputReader):
    """Reads parameters in tags; lost where a quoted call or closing tag may have misled it.

    nested=False takes every closing tag, and an opening one, at its word.
    """

    def __init__(self, tool: Tool, label: str, raw: bool, nested: bool = True) -> None:
        super().__init__()
        self._tool, self._label, self._raw, self._nested = tool, label.lower(), raw, nested
        self._keys: List[str] = []
        if raw:
            self._open((required_of(tool.schema) or ["input"])[0], self._label, False)

    def passes(self, text: str) -> bool:
        return (self._step == self._value and not self._fresh and not self.rest
                and not VALUE_BREAK.search(text))

    def again(self, text: str) -> TaggedInput:
        """Read a whole call once more, taking each closing tag at its word."""
        reader = TaggedInput(self._tool, self._label, self._raw, False)
        reader.feed(text, True)
        return reader

    def _open(self, key: str, closer: str, exact: bool) -> None:
        self._keys.append(self._parameter(key) or key)
        self.events.append(("key", key))
        self._closer, self._exact, self._scanned, self._step = closer, exact, 0, self._value
        self._fresh, self._framed, self._doubt = True, False, False
        self._inside: List[str] = []

    def _parameter(self, name: str) -> Optional[str]:
        return parameter_for(name, properties_of(self._tool.schema), self._keys)

    def _begin(self) -> bool:
        self.rest = self.rest.lstrip()
        tag = MARKUP_TAG.match(self.rest)
        if not tag:
            self.done = self._final or (bool(self.rest) and not TAG_START.match(self.rest))
            return False
        label, value, begin = tag_label(tag), tag_value(tag), self.rest[tag.end():]
        if label in ("parameters", "arguments", "args", "input") and value is None:
            self.rest = begin
        elif tag.group(1) or label in CALL_TAGS:
            self.done = True
            self.rest = begin if tag.group(1) else self.rest
        elif label == "arg_key":
            key = ARG_KEY.match(self.rest)
            if not key:
                self.done = self._final or len(self.rest) > MAX_HEADER_CHARS
                return False
            self.rest = self.rest[key.end():]
            self._open(key.group(2).strip(), "arg_value", True)
        else:
            self.rest = begin
            self._open(value or label, label,
                       value is not None and not (tag.group(3) or "").startswith("="))
        return True

    def _value(self) -> bool:
        """Move value text into events up to its end, or to where more must be seen."""
        tag = MARKUP_TAG.search(self.rest, self._scanned)
        if not tag:
            begun = TAG_START.search(self.rest, self._scanned)
            return self._pass(begun.start() if begun else len(self.rest))
        self._scanned = tag.start()
        ends = self._ends(tag)
        if ends is None:
            return self._pass(tag.start())
        self._scanned = tag.end()
        if ends:
            own = tag.group(1) and tag_label(tag) == self._closer
            self._close(self.rest[:tag.start()], bool(own))
            self.rest = self.rest[tag.end() if own else tag.start():]
        return True

    def _pass(self, upto: int) -> bool:
        """Let text go, but for what may be the closing tag's frame or lead to a call."""
        if self._final:
            self.cut = self.done = True
            self.lost = self._doubt or self._closer in self._inside
            self._close(CUT_TAG.sub("", self.rest, 1), False)
            self.rest = ""
            return False
        text = self.rest[:upto].rstrip("\r\n>")
        self._scanned = upto
        if text and not self._short(text):
            self._text(text)
            self.rest, self._scanned = self.rest[len(text):], upto - len(text)
        return False

    def _text(self, text: str) -> None:
        if self._fresh:
            framed = FIRST_BREAK.sub("", text)
            self._framed, self._fresh, text = framed != text, False, framed
        if text:
            self.events.append(("text", text))

    def _close(self, text: str, closed: bool) -> None:
        if not closed and self._short(text):
            text = text.strip()
        framed = self._framed or (self._fresh and FIRST_BREAK.match(text))
        if framed or not self._exact:
            text = LAST_BREAK.sub("", text, 1)
        self._text(text)
        self.events.append(("end", ""))
        self._step = self._begin

    def _short(self, text: str) -> bool:
        """Tell a value of one line of which nothing has gone out yet."""
        return self._fresh and len(text) <= MAX_SHORT_CHARS and "\n" not in text.strip("\r\n")

    def _ends(self, tag: re.Match[str]) -> Optional[bool]:
        """Decide whether the value ends at a tag; None while that is open."""
        label, value = tag_label(tag), tag_value(tag)
        if tag.group(1):
            if label == self._closer and not self._nested:
                return True
            if label in self._inside:
                self._inside.remove(label)
                return False
            return (label == self._closer or (label in CALL_TAGS and not self._inside)
                    ) and self._followed(tag.end(), label != self._closer)
        if label == self._closer and label != self._label:
            if value is not None and self._parameter(value) and not self._inside:
                return True
            self._inside.append(label)
        elif label in CALL_TAGS and (self._fresh if not tag.start() else
                                     self.rest[tag.start() - 1] in "\n>"):
            if not self._nested:
                return True
            self._doubt = self._doubt or value is not None
            self._inside.append(label)
        return False

    def _followed(self, at: int, outer: bool) -> Optional[bool]:
        """Check that after a closing tag comes what may follow it: a tag or the end."""
        closed, at = at, skip_blank(self.rest, at)
        tag, short = MARKUP_TAG.match(self.rest, at), self._short(self.rest[:self._scanned])
        if not tag:
            if at == len(self.rest) or TAG_START.match(self.rest, at):
                return self._final or None
            self._doubt = self._doubt or not outer
            return self._closer == self._label or ("\n" in self.rest[closed:at] and short)
        label = tag_label(tag)
        if tag.group(1) or label in CALL_TAGS:
            return label in CALL_TAGS or label in SEPARATOR_TAGS or label == self._label
        return not outer and (short or label in PARAMETER_TAGS or bool(self._parameter(label)))


VALUE_BREAK = Pattern(r"[<>\r\n]")
PARAMETER_TAGS = word_set(
    "parameter param arg_key argument arg line_count task_progress requires_approval")
ARG_KEY = Pattern(r"<(\w{0,16}_?)arg_key>([^<]{0,128})</\1arg_key>\s*<\1arg_value>")
FIRST_BREAK = Pattern(r"\A\r?\n")
LAST_BREAK = Pattern(r"(?:\r?\n|\r)?\Z")
CUT_TAG = Pattern(r"(?:</?[^\s<>]{0,20})?\Z")


class JsonInput(InputReader):
    """Reads the members of an arguments object; done comes behind the call's last brace.

    lost tells that something else stands there: a patient reader may know it (LooseJson).
    """

    def feed(self, text: str, final: bool = False) -> None:
        super().feed(text, final)
        if final and not self.done:
            self.done = self.lost = True

    def passes(self, text: str) -> bool:
        return self._step == self._string and not self.rest and not STRING_BREAK.search(text)

    def _begin(self) -> bool:
        match = JSON_MEMBER.match(self.rest)
        if not match:
            self.done = self.lost = len(self.rest) > MAX_HEADER_CHARS
            return False
        self.rest = self.rest[match.end():]
        if match.group(1) is None:
            self.done = True
            return False
        self.events.append(("key", loose_json(match.group(1)) or ""))
        self._step = self._string if match.group(2) else self._whole
        self._scan = BracketScan()
        return True

    def _string(self) -> bool:
        match = STRING_STOP.search(self.rest, self._scanned)
        if not match:
            return self._piece(len(self.rest) - self.rest.endswith("\\"))
        found = match.group()
        if found != '"':
            if found[1] in "ux" and len(self.rest) < match.start() + 12 and not self._final:
                return self._piece(match.start())  # cut, or half of a character
            self._piece(match.start())
            self.events.append(("text", join_surrogates(JSON_ESCAPE.sub(unescaped, found))))
            self.rest = self.rest[len(found):]
            return True
        if not self._final and STRING_END_OPEN.match(self.rest, match.end()):
            return self._piece(match.start())
        if not END_IN_OBJECT.match(self.rest, match.end()):
            self._scanned = match.end()
            return True
        self._piece(match.start())
        self.rest, self._step = self.rest[1:], self._begin
        self.events.append(("end", ""))
        return True

    def _piece(self, upto: int) -> bool:
        if upto > 0:
            self.events.append(("text", self.rest[:upto]))
        self.rest, self._scanned = self.rest[upto:], 0
        return False

    def _whole(self) -> bool:
        """Hold a value that is no string until it ends."""
        if self.rest[:1] in ("{", "["):
            end = self._scan.feed(self.rest, self._scanned)
            self._scanned = len(self.rest)
        else:
            scalar = JSON_SCALAR.match(self.rest)
            end = scalar.end() if scalar else -1
            self.done = self.lost = end < 0 and len(self.rest) > MAX_HEADER_CHARS
        if end < 0:
            return False
        self.events.append(("value", self.rest[:end]))
        self.rest, self._scanned, self._step = self.rest[end:], 0, self._begin
        return True


STRING_BREAK = Pattern(r'["\\]')
# What interrupts a string: its end, an escape, and two that are halves of one character.
STRING_STOP = Pattern(r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|"
                      + JSON_ESCAPE.source + '|"', re.S)
JSON_MEMBER = Pattern(
    rf"\s*(?:,\s*)?{COMMENT}" r"""(?:("[^"\\\n]{1,128}"|'[^'\\\n]{1,128}')\s*:\s*"""
    r"""(?:(")(?!"{0,2}\Z|"")|(?=[^\s"]))|\}\s*\})""")
STRING_END_OPEN = Pattern(
    rf"\s*(?:,\s*)?{COMMENT}(?:\}}\s*|<[^\s<>]{{0,20}}>?\s*|`{{1,3}}\s*|(?://|#)[^\n]{{0,300}}|"
    r"/(?:\*[^*]{0,300}\*?)?|(?<=[\s,])[\"'\w-][^\"'\n:]{0,80}[\"']?\s*)?\Z")
JSON_SCALAR = Pattern(r"[\w.+-]{1,64}(?=\s*[,}\]\n])")
CANONICAL = Pattern(r'\s*\{\s*"name"\s*:\s*"([^"\\\n]{1,128})"\s*,\s*'
                    r'"(?:arguments|parameters|input)"\s*:\s*\{')


class InputWriter:
    """Turns a reader's events into the pieces of one JSON object, mended by schema.

    A string for a string parameter goes out as it comes; everything else is held until
    it is whole. Keys that the schema does not know are left out. written gathers the
    pieces, sent those that left; known tells that they name a parameter without which it
    is no call, streaming that a string is open.
    """

    def __init__(self, tool: Tool) -> None:
        self.tool, self._properties = tool, properties_of(tool.schema)
        self._taken: List[str] = []
        self._held: List[str] = []
        self._name = self._key = self.written = ""
        self.known = self.streaming = False
        self.sent: List[str] = []

    def write(self, events: ReaderEvents) -> None:
        for kind, text in events:
            if kind == "key":
                self._open(text)
            elif kind == "text" and self.streaming:
                self.written += json.dumps(text)[1:-1]
            elif kind == "text":
                self._held.append(text)
            elif self.streaming:
                value = None if kind == "end" else loose_json(text)
                written = "" if value is None else string_from(value, self._name)
                self.written += json.dumps(written or "")[1:]
                self.streaming = False
            else:
                self._whole(loose_json(text) if kind == "value" else "".join(self._held))

    def _open(self, key: str) -> None:
        self._key, self._held = key, []
        self._name = (key if key in self._properties and key not in self._taken
                      else parameter_for(key, self._properties, self._taken) or "")
        schema = self._properties.get(self._name, {})
        self.streaming = types_of(schema) == ["string"] and "enum" not in schema
        if self.streaming:
            self._member(self._name, '"')

    def _member(self, name: str, value: str) -> None:
        self.written += f"{', ' if self._taken else '{'}{json.dumps(name)}: {value}"
        self._taken.append(name)
        self.known = self.known or name in (required_of(self.tool.schema) or self._properties)

    def _whole(self, value: Any) -> None:
        fitted = fit_object({self._key: value}, self.tool.schema,
                            self.tool.name.startswith("mcp__"))
        for name in fitted:
            if name not in self._taken:
                self._member(name, json.dumps(fitted[name]))


# ------------------------------ where a call begins ------------------------------

# What a look at the text can say besides a head: more must come, read on, no call (None).
MORE, READ_ON = "wait", "on"


class Head(NamedTuple):
    """What opens a call: its rule, the tool's name where known, the body and its start.

    body is json, python, tags, raw:TAG (one parameter's text up to that closing tag) or line.
    """

    rule: str
    name: str
    body: str
    at: int


Verdict = Union[str, Head, None]


def find_head(text: str, at: int, line_start: bool, tools: Tools) -> Verdict:
    """Return the head of a call at a position, MORE where it may still come, or None.

    It begins with a tag, a word of TOOL_FORMATS, brackets or a tool's own name, which
    at the start of a line may stand in a code block.
    """
    fence = FENCE_OPEN.match(text, at) if line_start else None
    at = skip_blank(text, fence.end() if fence else at)
    begin = text[at:at + 32].lower()
    if not begin or (line_start and not fence and FENCE_START.match(text, at)):
        return MORE
    rule = CALL_RULES.get(fence.group(2).strip(), "") if fence else ""
    if begin[0] == "<" or rule in ("tool_call", "python_tag"):
        return HeadScan(text, at, rule, tools).run()
    for word in OPENING_WORDS if begin[0] in OPENING_LETTERS else ():
        if line_start or word[0] == "[":
            if begin.startswith(word):
                return HeadScan(text, at + len(word), CALL_RULES[word], tools).run()
            if word.startswith(begin):
                return MORE
    if line_start and begin[0] in "{[":
        return read_bracket(text, at, "json", tools)
    return read_own_name(text, at, tools) if line_start else None


def read_own_name(text: str, at: int, tools: Tools) -> Verdict:
    """Read a tool's own name at the start of a line: Read(…), or Read and then {…}."""
    own = OWN_NAME.match(text, at)
    name, end = (own.group(1), own.end()) if own else ("", at)
    rest = text[end:end + 8]
    if name in tools:
        body = NAMED_BODY.match(rest)
        if not body:
            return MORE if NAMED_BEGUN.fullmatch(rest) else None
        python = rest[body.end()] == "("
        return Head("named", name, *(("python", at) if python else ("json", end + body.end())))
    begun = any(each.startswith(name) for each in (*tools, "default_api.", "functions.", "print("))
    return MORE if begun and not rest else None


def read_bracket(text: str, at: int, rule: str, tools: Tools) -> Verdict:
    """Judge by the first key, or the first name, whether brackets may hold a call."""
    rest = text[at:at + MAX_HEADER_CHARS]
    python = PYTHON_NAME.match(rest)
    if python:
        listed = rest[0] == "[" and resolve_tool(python.group(1), tools)
        return Head("pythonic" if rule == "json" else rule, "", "python", at) if listed else None
    key = FIRST_KEY.match(rest)
    if not key:
        named = KEY_ALONE.match(rest)
        if named and plain_name(named.group(1)) not in CALL_KEYS and named.group(1) not in tools:
            return None
        begun = FIRST_KEY_START.fullmatch(rest) or LIST_BEGUN.fullmatch(rest)
        return MORE if begun else None
    word, value, behind = plain_name(key.group(1)), key.group(2) or key.group(3), rest[key.end():]
    opened = behind[:1] == "{"
    if value is None and (word in NAME_ORDER or word == "type") and not opened:
        return MORE if VALUE_BEGUN.fullmatch(behind) else None
    if value is not None and word == "type":
        held = plain_name(value) in CALL_TYPES
    elif value is not None and word in NAME_ORDER:
        held = bool(tools_meant(value, tools))
    else:
        held = word in BODY_KEYS or (opened and (
            word in NESTED_KEYS.union(NAME_ORDER) or word == "type" or key.group(1) in tools))
    return Head(rule, "", "json", at) if held else None


class HeadScan:
    """Reads on behind an opener: further tags, the name, separators, up to the body."""

    def __init__(self, text: str, at: int, rule: str, tools: Tools) -> None:
        self._text, self._at, self._rule, self._tools = text, at, rule, tools
        self._name, self._named_at, self._openers, self._line = "", at, 0, False

    def run(self) -> Verdict:
        limit, verdict = self._at + MAX_HEADER_CHARS, READ_ON  # type: Tuple[int, Verdict]
        while verdict == READ_ON:
            self._at = skip_blank(self._text, self._at)
            if self._at == len(self._text):
                return MORE
            tag = MARKUP_TAG.match(self._text, self._at)
            verdict = self._tag(tag) if tag else self._word() if self._at < limit else None
        return verdict

    def _tag(self, tag: re.Match[str]) -> Verdict:
        label, value, closing = tag_label(tag), tag_value(tag), bool(tag.group(1))
        if closing and not self._name:
            return None
        known = label in CALL_TAGS or (label in SEPARATOR_TAGS and bool(self._rule))
        if self._name and not closing and not known:
            return Head(self._rule, self._name, "tags", tag.start())
        bare = not known and tag.group(3) is None and not self._name
        named = value if label in CALL_TAGS and value else tag.group(2) if bare else ""
        if named and not closing and resolve_tool(named, self._tools) and (
                self._rule or may_open(tag.group(), self._tools)):  # else it was not waited for
            return self._tagged(tag, label, named)
        self._openers += label in CALL_TAGS
        if not known or self._openers > MAX_OPENERS:
            return None
        self._rule = self._rule or CALL_RULES[label]
        self._at, self._line = tag.end(), label in ("tool_input", "input")
        return READ_ON

    def _tagged(self, tag: re.Match[str], label: str, name: str) -> Verdict:
        """Read behind a tag that names the tool."""
        given = self._rule not in ("", "tool_call")
        rule = self._rule if given else CALL_RULES.get(label, "tag_name")
        at = skip_blank(self._text, tag.end())
        begin = self._text[at:at + 1]
        if not begin:
            return MORE
        if begin == "{":
            return Head(rule, name, "json", at)
        return Head(rule, name, "tags" if begin == "<" else "raw:" + label, tag.end())

    def _word(self) -> Verdict:
        text, at = self._text, self._at
        rest = text[at:at + 20].lower()
        if rest[0] == "<":
            begun = TAG_START.match(text, at)
            return MORE if begun and (self._rule or may_open(begun.group(), self._tools)) else None
        step, lined = SEPARATOR.match(text, at), self._line and bool(self._name)
        # Where a line may be the input, only what is waited for below can be a separator.
        if step and (not lined or step.group().lower().startswith(CUT_SEPARATORS)):
            self._at, self._line = step.end(), step.group().lower() in INPUT_WORDS
            return READ_ON
        if any(word.startswith(rest) for word in CUT_SEPARATORS) or rest == '"':
            return MORE
        if rest[0] in "{[(" or rest.startswith('"{'):
            return self._body(rest[0])
        if lined:
            return Head(self._rule, self._name, "line", at)
        return self._tool_name()

    def _body(self, opened: str) -> Verdict:
        if opened == '"':  # the object as a JSON string
            return Head(self._rule, self._name, "json", self._at) if self._rule else None
        if not self._name:
            return None if opened == "(" else read_bracket(
                self._text, self._at, self._rule, self._tools)
        body = ("python", self._named_at) if opened == "(" else ("json", self._at)
        return Head(self._rule, self._name, *body)

    def _tool_name(self) -> Verdict:
        word = TOOL_WORD.match(self._text, self._at)
        if not word or word.end() == len(self._text):
            return MORE if word else None
        bare = word.group().rstrip(":.")
        if bare.lower() not in FILLERS or bare in self._tools:
            if self._name or not resolve_tool(bare, self._tools):
                return None
            self._name, self._named_at = bare, self._at
        self._at += len(bare)
        return READ_ON


def may_open(begun: str, tools: Tools) -> bool:
    """Tell whether a tag that is cut, maybe in its name, may open a call."""
    name, *rest = TAG_WORD_END.split(begun[1:].strip("|｜").replace("▁", "_").lower())
    folded = plain_name(TAG_NAMESPACE.sub("", name))
    names = {*map(plain_name, (*CALL_TAGS, *tools)), *TAG_NAMESPACES}.union(
        *(words for _, words in tool_kinds()))
    # A name that is whole must be one: "if a <b and" holds nothing back.
    return folded in names if rest else any(word.startswith(folded) for word in names)


# ------------------------------ call or example ------------------------------

# Words of which the rows of SIGNS are made. A first person who acts:
INTENT = (r"\b(?<!whether )(?<!if )(?:I.ll|I will|let me|let.s|let us|we.ll|we will|I.ve got to|"
    r"I.d (?:like to|better)|I(?:.m| am) (?:now |just )?(?:going to|about to|\w+ing)|(?:I|we)(?: "
    r"now| first| also| just| still)? (?:need|want|must|should|can|have to|will)\b(?! not|['’]t| "
    r"only)|(?:now|next|first|then|so|and),? I\b(?!.d|.m not| (?:would|\w+ed|ran|sent|made|wrote|"
    r"did|got)\b))")
INTENT_ABROAD = (r"我(?:来|将|会|要|先|需要|现在)|让我|我们[来先]|现在|接下来|首先|します|"
    r"\b(?:ich (?!habe|würde)|lassen? |je (?!pourrais|ne)|voy a|vamos a|déjame|vou\b|"
    r"ahora|sto per|проверю|сейчас|найду)")
# ... and one who only talks:
TALK = (r"(?:show|explain|demonstrat|illustrat|describ|quot|cit(?:e|ing)\b|recap|restat|recall\b|"
    r"summari[sz]|repeat|defin|spell|walk(?:ing)? (?:you )?through|walk you|talk|refer\b|referring|"
    r"mention|offer|propos|suggest|recommend|emphasi|remind|warn|clarif|break(?:ing)? (?:\w+ "
    r"){1,3}down|point|assum|suppos|imagin|pretend|consider|say\b|compare (?:it|this|the (?:out|"
    r"ans))|annotat|dissect|past(?:e|ing)\b|only print|not\b|never|reproduc|outlin|sketch|"
    r"present\b|provid|give you|return\b|answer|leav|list (?:all|every|the (?:call|raw))|translat|"
    r"convert|format|encod|give (?:you )?an ex|phrase|paraphras|call (?:this|it)|afraid|refus|"
    r"declin|prevent|withhold)")
ACTS = (r"(?:read|write|create|run|rerun|list|edit|update|check|search|find|open|fix|look|execute|"
    r"delete|add|make|get|fetch|verify|install|build|test|inspect|rename|replace|remove|start|stop|"
    r"commit|move|apply|generate|format|clean)")
# What calls are made of, and who writes them:
CALL_TALK = (r"(?:(?:tool|function)[- _]?(?:calls?|calling|use)|(?:an?|each|every|any|such|one|two|"
    r"the|this|that|these|your|raw|native|how) calls?|markers?|delimiters?|(?<!git )tags?\b(?!ged)|"
    r"tokens|notations?|dialects?|syntax|grammar|markup|parsers?|parse[sd]?|regex|wire|payload|"
    r"serializ\w+|templates?|models?|llms?|assistants?|agents?|sub-?agents?|chatbot|copilot|gpt\S*|"
    r"chatgpt|claude|codex|qwen\S*|hermes\S*|llama\S*|mistral\S*|deepseek\S*|kimi\S*|glm\S*|"
    r"(?-i:ReAct)|few.shot|prompts?|runtime|harness|shim|proxy|training|dataset|arguments|"
    r"parameters?|placeholder|transcript|schema|style|conventions?|protocol|playground)")
DATA_WORDS = (r"(?:json|xml|yaml|formats?|schema|structure|shape|objects?|messages?|body|bodies|"
    r"payload|responses?|outputs?|results?|answers?|repl(?:y|ies)|contents?|lines?|text|strings?|"
    r"inputs?|records?|rows?|entry|entries|snippets?|blocks?|logs?|excerpt|fixtures?|cases?|"
    r"samples?|versions?|spelling|forms?|variants?|values?|definition|fields?|notes?|docs|"
    r"documentation|readme|manual|spec|specification|page|article|report|section|chapter|appendix|"
    r"reference|usage|quote|transcript|history|trace|template|data|requests?|calls?)")
TELLS = (r"(?:call(?:ed|s)|ran|runs|sen(?:t|ds)|ma(?:de|kes)|us(?:ed|es)|wr(?:ote|ites?)|written|"
    r"sa(?:id|ys)|repl(?:ied|ies)|(?:answer|return|emitt?|produc|print|post|output|outputt|respond|"
    r"past|quot|generat|issu|contain|show|look|list|includ|display|yield|record|logg?|expect|"
    r"compar|receiv|report|leak)(?:e?d|e?s)|tr(?:ied|ies)|g[eo]ts?|reads?|holds?|held|has(?! to)|"
    r"had|have|gives?|gave|becomes?|became|feeds?|fed|finds?)")
EXAMPLE = (r"\b(?:examples?\b(?![._/-]\w|\s+(?:file|script|config|app|project|folder|director|test|"
    r"page|environment|to the|in\b))|e\.g\.|i\.e\.|for instance|illustrat\w+|sample(?! data)|"
    r"hypothetic\w*|pseudo|imagine|suppose|pretend|demonstrat\w+|toy\b|beispiel|exempl[eo]|esempio|"
    r"ejemplo|voorbeeld|например|пример)|示例|예시|例(?:如|えば|です)|格式")
OPEN_END = r"[^.!?:：]{0,80}[:：]?\W*\Z(?<![.!?])"


class Sign(NamedTuple):
    """One row of SIGNS: words around a call that speak for it (weight > 0) or against it.

    where is lead (the sentence before the call), earlier (those before that in its
    paragraph), paragraph (both) or after (the first two sentences behind it). A lifted
    row says nothing where the lead announces an act. The weights were fitted to some
    3,000 answers with and without a call that is meant.
    """

    name: str
    where: str
    weight: int
    pattern: Pattern
    lifted: bool = False


def sign(name: str, where: str, weight: int, words: str, lifted: bool = False) -> Sign:
    return Sign(name, where, weight, Pattern(words, re.I), lifted)


PROMISE = sign("a promise to act", "lead", 4,
               rf"{INTENT}(?!\s+(?:(?!to\b)\w+\s+){{0,2}}{TALK})|{INTENT_ABROAD}")
# What announces an act: it lifts other rows, and a call in a code block needs it ...
ANNOUNCING: Tuple[Sign, ...] = (
    PROMISE,
    sign("a word of assent", "lead", 2,
        r"\A\W*(?:(?:sure(?: thing)?|ok(?:ay)?|certainly|of course|yes|right(?!\W*:)|got it|"
        r"understood|al{1,2} ?right|absolutely|done|great|no problem|will do|on it|definitely|"
        r"gladly|here (?:it is|you go|we go)|one moment|working on it)\W*){1,4}\Z"),
    sign("the word call itself", "lead", 2, r"\A\W*(?:here(?:.s| is| are) )?(?:the |my |a "
        r")?(?:(?:tool |function )?calls?|action)\W*\Z"),
)
# So does this, without lifting any ...
AT_WORK = sign("the act at work", "lead", 6, rf"(?:\A|→|[,;:–—-] |and )\W*(?:(?:ok(?:ay)?|sure|"
    rf"great|now|then|next|first|got it)\W+)*(?!{TALK}|follow|accord|depend|includ|mean|noth|anyth|"
    rf"someth|everyth|dur|string|thing|miss|warn|pend|exist|notic|us\w+ \w+,)\w{{2,}}ing\b(?!.*\b(?"
    rf":gives|shows|yields|finds|prints|becomes|is|get)\b{OPEN_END})")
# ... and this announces words, which lift nothing.
TALKING = sign("talk in the first person", "lead", -4,
               rf"\b(?:{INTENT}|I|we|I.m|I am)\s+(?:(?!to\b)\w+\s+){{0,2}}{TALK}")
SIGNS: Tuple[Sign, ...] = (
    *ANNOUNCING, AT_WORK,
    sign("a step", "lead", 5, r"\A\W*(?:so,? |and |ok,? )?(?:\d+[.)]|now|next|then|first|second|"
        r"third|finally|lastly|also|step|once more|again|time to|on to|here we go)\b(?!.*\b(?:would"
        r"|you|it \w+s|we)\b)|\b(?:first|next)\W*\Z"),
    sign("an order to itself", "lead", 3,
        rf"\A\W*(?:\d+[.)]\s*)?(?:(?:step \d+|and|then|now|next|also|first|finally)\W+)?{ACTS}\b(?!"
        rf" data| case)(?!.*\b(?:this|these|following|same|below|your?|docs)\b)"),
    sign("here is the work", "lead", 8,
        rf"\Ahere(?:.s| is| are) (?:the |my |an? |your )(?!.*\b(?:{CALL_TALK}|{DATA_WORDS})\b)"),
    sign("an example", "lead", -8, EXAMPLE, True),
    sign("examples before it", "earlier", -3, EXAMPLE),
    sign("a wish", "lead", -3, r"\b(?:would|could|might|.d (?:be|have|write|call|use|run|send|look|"
        r"then)|one (?:can|may|calls|writes)|had you|(?:should|shall|may|could) I|whether)\b"),
    sign("a condition", "lead", -13, r"\b(?:if|once|when|after|until|unless) (?:you|approved|"
        r"confirmed|permitted|needed|one|a|the (?:model|user|agent))\b|\b(?:your|you to) (?:approv|"
        r"confirm|permission|consent|ok\b)|\blet me know\b|\b(?:say|give)(?: me)? (?:the|a|your) "
        r"(?:word|go)|\bneed you\b|\bwhen(?:ever)? I\b|\A\W*(?:later|normally|usually)\b"),
    sign("a warning", "lead", -5, r"\b(?:don.t|do not|never|avoid|not)\s+(?:\w+ ){0,2}(?:run|send|"
        r"make|do|execute|call|use|let|issue|invoke|emit|type|copy|try)\b|\b(?:avoid|beware|"
        r"dangerous|harmful|unsafe|forbidden|warning|careful|prevent|(?:must|may) not)\b"),
    sign("a refusal", "paragraph", -8, r"\b(?:I|we)\s+(?:\w+ )?(?:won.t|will not|can.t|cannot|can "
        r"not|refuse|decline|am not|.m not|must not|mustn.t|shouldn.t|wouldn.t|would rather not|.d "
        r"rather not|decided (?:against|not)|am unable)\s+(?!find|see|tell|change|know|have|sure|"
        r"be|wait)\w+|\b(?:refus|declin)(?:e|ing) (?:to|this)\b|\bdecided against|\bagainst "
        r"(?:running|doing|this|it)|\bI(?: have| had|.ve)? ?(?:did ?not|didn.t|not) (?:run|send|"
        r"make|call|execute)|\bwithh[eo]ld"),
    TALKING,
    sign("a promise to show", "lead", -13,
        rf"{INTENT}(?!.*(?:\w[./]\w|\b(?:check|look (?!at (?:how|what|this))|read|see|examin|"
        rf"inspect|verif|fix|run|rerun|search|grep|glob|quer|trac|debug|find|open|updat|edit|"
        rf"explor|investigat|test|execut|invok|use the)\w*))[^.!?]*\b(?:(?:this|that|these|your|"
        rf"raw) (?:calls?|line|message)|messages?|lines?|variants?|readability|what (?:I|it|the "
        rf"model)|as (?:valid )?(?:json|xml)|json you|payload|syntax|notation|encoded|how (?:an?|"
        rf"tool|function) (?:tool |function )?calls?|(?:an?|this) (?:running )?(?:example|"
        rf"sample)(?! (?:to|in|for|config|file|script|test|project|app|env)\b))\b"),
    sign("what you may do", "lead", -2,
        r"\b(?:you|one|users?|developers?|someone|people)(?:.d| can| could| would| should| might| "
        r"may| must| need(?: to)?| have to| has to| will| want to)?\s+(?:\w+ly |just |then |also "
        r")?(?:put|add|paste|send|write|use|run|call|type|copy|include|save|emit|output|post|adapt|"
        r"try|insert|pass)\b|\byour (?:\w+ ){0,2}(?:model|shim|client|parser|yaml|json|call|prompt|"
        r"server|mock|endpoint|dataset|message|snippet|text|regex|system|colleague)\b"),
    sign("a prompt or quotation", "lead", -13, r"\A\s*[$>]|[$>] ?\Z|\A\s*In \[\d"),
    sign("a question", "lead", -6, r"\?\W*\Z"),
    sign("a sentence left open", "lead", -7, r"(?:[:：]\W*|\w *\n?\s*)\Z", True),
    sign("open on a being", "lead", -2,
        rf"\b(?:is|are|was|were|becomes?|(?<!here).s)\b{OPEN_END}", True),
    sign("open on data", "lead", -4, rf"\b{DATA_WORDS}\b(?:[^.!?:]{{0,60}})[:：]\W*\Z", True),
    sign("open on calls", "lead", -3, rf"\b{CALL_TALK}\b{OPEN_END}", True),
    sign("open on saying", "lead", -2, rf"\b{TELLS}\b{OPEN_END}", True),
    sign("open on a label", "lead", -4,
        r"\A\W*(?:the )?(?:wrong|invalid|old|new|before|after|expected|actual|formatted|compare|"
        r"same|correct|good|bad|original|fixed|canonical|minified|malformed|not|typical|normally|"
        r"hypothetically|results?|usage|in \w+|quoting|reported|from|cancell?ed|ignored|raw|"
        rf"exported|given|this|relevant|read the docs|vs)\b{OPEN_END}", True),
    sign("open in another tongue", "lead", -4,
        r"(?:模型|格式|例|modell?\b|modèle|модель|ausgabe|sortie)[^.!?]*[:：]\W*\Z", True),
    sign("talk of calls", "lead", -4, rf"\b{CALL_TALK}\b", True),
    sign("as follows", "lead", -4, r"\b(?:as follows|like (?:this|so)|this way|looks? (?:something "
        r")?like|the following|below|such as|this (?:one|input|call|line|body|text|shape|prompt|"
        r"request|string|message|json|command)|these)\b|\bthis\W*\Z|<(?![/|])[\w-]+>\W*\Z", True),
    sign("here is talk", "lead", -3,
        rf"\bhere(?:.s| is| are)\b.*\b(?:{CALL_TALK}|{DATA_WORDS}|what|how)\b", True),
    sign("words behind it", "after", -3, r"\S", True),
    sign("a promise behind it", "after", 6,
        rf"{INTENT}(?!\s+(?:know|rather|wait for your))|\b(?:once|after|as soon as|with) (?:that|"
        r"this|it|the result)|\b(?:then|while (?:this|that))\b|\b(?:please )?wait(?:ing)?\b(?! "
        rf"for your)|\blet me know if (?:you|there|any)|\bdone\b|{INTENT_ABROAD}"),
    sign("what it will do", "after", 5, r"\A\W*(?:(?:this|that|it|these)(?: command| call| edit| "
        r"tool)? (?:\w+ )?(?:will|reads?|lists?|creates?|finds?|searche?s|runs?|replaces?|adds?|"
        r"checks?|removes?|updates?|makes?|compiles?|writes?|installs?|builds?|gives?|should|"
        rf"shows? (?:the|all|every|you|us)\b(?! (?:\w+ )?{DATA_WORDS}))\b|"
        r"the (?:next|output|build|tests?|result) should)"),
    sign("the sentence goes on", "after", -4,
        r"\A\s*(?:(?!and then|then|now|next)(?-i:[a-z])|[,;)\]”\"])"),
    sign("it is a thing", "after", -5,
        r"\A\W*(?:this|that|it|these|those|the (?:\w+ )?\w+)(?:.s| is| are| shows(?! the| all| "
        r"every| you| us)| means| came| was| were| would| could| had| has| deletes?| overwrote| "
        r"deleted| returned| failed| worked| matched| crashed| wiped)\b", True),
    sign("it is an example", "after", -6, r"\b(?:examples?\b(?![._/-]\w)|illustrat\w+|placeholder|"
        r"sample|template|hypothetical\w*|demonstrat\w+|clarif\w+|hope (?:that|this))\b"),
    sign("it was not run", "after", -5,
        r"\b(?:not|never|don.t|\w+n.t)\b.{0,30}\b(?:run|ran|execut\w*|call\w*|made|make|sent|send|"
        r"real|used?|do|does|act|happen\w*)\b|\b(?:I|we) (?:won.t|will not|can.t|cannot|haven.t|"
        r"have not|did not|didn.t)\b|\A\W*but\b|\bI(?:.d| would) (?!like)"),
    sign("it waits for a word", "after", -10,
        r"\b(?:want|like) me to (?:run|execute|call|proceed|go|do|make it|send|apply|continue)\b|"
        r"\b(?:should|shall) I\b|\b(?:approv|confirm|permission|go-ahead|agree)\w*|\b(?:say|give) "
        r"the word\b|\byour (?:ok|word)\b|\bif (?:I should|(?:that|this) (?:looks|is|works|sounds)|"
        r"you (?:approve|agree|confirm|want me|like))\b"),
    sign("a question behind it", "after", -6, r"\?", True),
    sign("what to do with it", "after", -6, r"\byou(?:.d(?! prefer| like)| can(?! see)| could| "
        r"would| should| might| must| may| need to| have to)\b|\A\W*(?:replace|change|modify|copy|"
        r"paste|adapt|adjust|use|put|save|add|run|try|note|compare|make sure|review|remember|apply|"
        r"reply|feel free|only|please (?!wait))\b", True),
    sign("where it is from", "after", -6, r"\A[^\w✿]*(?:source|from|explanation|above|where|which|"
        r"see|example|response|results?|here,)|\A\s*(?:[↑^]|--|[-=]>|[(\[←→#])", True),
    sign("talk of calls behind it", "after", -5,
        rf"\b(?:{CALL_TALK}|keys?|fields?|objects?)\b", True),
)

# What a call starts with before any words are weighed: the model's own markers are made for
# calls; an answer that ends with it, or begins, is more likely one.
OWN_WEIGHT, OTHER_WEIGHT, LAST_WEIGHT, FIRST_WEIGHT = 4, 1, 4, 4
INLINE_CODE = Pattern(r"`[^`\n]*`")
REACT_STEP = Pattern(r"(?:question|thought):", re.I)
# Lines that are no prose: marks of a chat, tags, data, the bare number of a step.
CHAT_MARK = Pattern(r"<\|[^|<>]*\||\A(?:json|assistant|</?[\w-]*call[^<>]*>|\{.*\}|\W*(?:(?:step )?"
                    r"\d+|first|then|next|now|and|also|second|third|finally|lastly)\W*)\Z", re.I)
PARAGRAPH_END = Pattern(r"\n[ \t]*\n")
SENTENCE_END = Pattern(r"(?<=[.!?])\s+|\n")
THOUGHT_END = Pattern(r"</(?:seed:)?think(?:ing)?>", re.I)


class Found:
    """A call that was read and waits for the words behind it.

    kind is bare, fenced, own (the model's own markers) or open (streamed: only the end
    of its input is held); before is the prose that led to it, line what stands before
    it on its line, fence the mark of its code block; behind is what followed it so far.
    """

    def __init__(self, kind: str, before: str, fence: str) -> None:
        self.kind, self.fence = kind, fence
        self.before = THOUGHT_END.split(before)[-1]
        self.line = self.before.rsplit("\n", 1)[-1].lstrip()
        self.raw = self.behind = ""
        self.calls: List[Call] = []


def paragraphs(text: str) -> List[str]:
    return [part.strip() for part in PARAGRAPH_END.split(text) if part.strip()]


def sentences(text: str) -> List[str]:
    """Split a paragraph; code in it is no prose, nor are ReAct's labels and chat marks."""
    parts = (part.strip() for part in SENTENCE_END.split(INLINE_CODE.sub("`code`", text)))
    return [part for part in parts if part.strip(" *#_:-")
            and not REACT_STEP.match(part) and not CHAT_MARK.search(part)]


def words_before(before: str) -> Dict[str, str]:
    """Cut the texts out of the prose before a call that SIGNS look at."""
    said = paragraphs(before)
    while len(said) > 1 and not sentences(said[-1]):
        said.pop()
    parts = sentences(said[-1]) if said else []
    found = {"lead": parts[-1:], "earlier": parts[:-1], "paragraph": parts}
    return {where: " ".join(texts)[-MAX_LEAD_CHARS:] for where, texts in found.items()}


def words_after(after: str, leads_on: bool) -> str:
    """Cut the first two sentences out of what follows a call.

    The last paragraph before another call leads to that one.
    """
    said = paragraphs(after)[:-1] if leads_on else paragraphs(after)
    return "" if not said or said[0][0] == "<" else " ".join(sentences(said[0])[:2])


def announced(before: str) -> bool:
    """Tell prose that says in the first person, or by a word of assent, that a call comes."""
    said = [part for part in map(sentences, paragraphs(before)) if part][-2:]
    return any(AT_WORK.pattern.search(part[-1]) for part in said) or any(
        row.pattern.search(" ".join(part)) for row in ANNOUNCING for part in said)


def weight_of(found: Found, after: str, leads_on: bool) -> int:
    """Weigh a call by its kind and the words around it; above 0 it is meant."""
    words = words_before(found.before)
    lead, words["after"] = words["lead"], words_after(after, leads_on)
    lifts = any(row.pattern.search(lead) for row in ANNOUNCING) and not TALKING.pattern.search(lead)
    return (OWN_WEIGHT if found.kind in ("own", "open") else OTHER_WEIGHT) + (
        0 if lead else FIRST_WEIGHT) + (0 if after.strip() else LAST_WEIGHT) + sum(
            row.weight for row in SIGNS if words[row.where] and not (lifts and row.lifted)
            and row.pattern.search(words[row.where]))


def well_placed(line: str) -> bool:
    """Tell whether a marker stands where a call may: not in code, quotes or mid-sentence."""
    if not line.strip():
        return True
    in_quotes = line.count("`") % 2 or line.count('"') % 2 or line.rstrip()[-1] in "'\"“‘`("
    if line[0] == ">" or in_quotes:
        return False
    return line.rstrip()[-1] in SENTENCE_MARKS or bool(PROMISE.pattern.search(line[-200:])) or (
        len(line.split()) <= 3 and (line[0] == "<" or line[0].isalnum()))


def is_call(found: Found, after: str, leads_on: bool) -> bool:
    """Judge by its place and the words around it whether a call is meant; in doubt it is not.

    leads_on says that another call follows the words behind it.
    """
    first, last = not found.before.strip(), not after.strip()
    if found.kind == "fenced" and not ((first and last) or announced(found.before)):
        return False
    if found.kind == "bare":
        beside = not last and "\n" not in after[:len(after) - len(after.lstrip())]
        if beside or not (first or last or announced(found.before)):
            return False
    if found.kind == "own":
        mid_sentence = found.line and found.line.rstrip()[-1:] not in SENTENCE_MARKS
        if not well_placed(found.line) or (mid_sentence and not last):
            return False
    return weight_of(found, after, leads_on) > 0


# ------------------------------ the parser ------------------------------


class ToolTextParser:
    """Takes calls out of a model's text; the rest passes unchanged, as it comes.

    feed, native and thought take what the model sent and return what is certain; close
    returns what was still held. With stream_inputs a call in the model's own markers
    goes out piece by piece; enabled=False passes all text.
    """

    def __init__(self, tools: Tools, *, stream_inputs: bool = False, enabled: bool = True) -> None:
        self._tools, self._streams = tools, stream_inputs
        self._enabled = enabled and bool(tools)
        # What is read: the text from _at on, by the step of the place that it stands in.
        self._step: Callable[[], bool] = self._prose
        self._text, self._at = "", 0
        self._asleep: List[str] = []  # pieces that are not looked at before one holds _wake
        self._wake: Optional[Pattern] = None
        self._ending = ""  # "stop" or "cut" once no more can come
        self._mid_line = False
        self._fence = self._marks = ""  # of the open code block; that may close behind a call
        self._wasted = 0
        # What left or waits: prose of late, blank text while a block shows nothing else.
        self._out: List[Delta] = []
        self._queue: List[Found] = []
        self._before, self._thought = "", ""
        self._blank: Optional[str] = ""
        self._known: List[str] = []
        self._made: List[str] = []

    def feed(self, text: str) -> List[Delta]:
        """Take a piece of the answer's text."""
        if not text or not self._enabled:
            return [TextDelta(text)] if text else []
        if self._wake:
            if not self._wake.search(text):
                self._asleep.append(text)
                return []
        elif self._step == self._parameters and self._writer and self._found.kind == "open":
            if self._writer.streaming and self._reader.passes(text):
                self._pieces.append(text)
                self._writer.sent.append(json.dumps(text)[1:-1])
                return [CallInput(self._writer.sent[-1])]
        elif (self._step == self._prose and self._mid_line and self._blank is None
                and self._at == len(self._text) and not self._queue and not CALL_SIGN.search(text)):
            self._before, self._thought = (self._before + text)[-MAX_CONTEXT_CHARS:], ""
            return [TextDelta(text)]
        self._asleep.append(text)
        return self._run()

    def native(self, name: str, arguments: Any) -> List[Delta]:
        """Take a call that Ollama parsed; the same call leaked as text is dropped."""
        tool = resolve_tool(name, self._tools)
        call = make_call(name, arguments or {}, self._tools, "") or Call(
            tool.name if tool else name, as_object(arguments, tool.schema if tool else {}) or {})
        key = call_key(call)
        self._known.append(key)
        result = self._run("stop")
        if key in self._made:
            self._made.remove(key)
            return result
        self._blank, self._thought = "", ""
        self._step = self._after_call if self._step == self._prose else self._step
        return [*result, call]

    def thought(self, text: str) -> List[Delta]:
        """Take a piece of the model's thinking, which is passed on at once."""
        if not text:
            return []
        self._thought = (self._thought + text)[-MAX_THOUGHT_CHARS:]
        return [ThinkingDelta(text)]

    def close(self, reason: str) -> List[Delta]:
        """End the answer; reason is Ollama's done_reason, or error."""
        cut = reason in ("length", "error")
        result = self._run("cut" if cut else "stop")
        if self._thought.strip() and not cut and self._enabled and not self._known:
            inner = ToolTextParser(self._tools)
            deltas = inner.feed(self._thought) + inner.close(reason)
            calls = [delta for delta in deltas if isinstance(delta, Call)]
            result += calls if deltas[-len(calls):] == calls else []
        return result

    def _run(self, ending: str = "") -> List[Delta]:
        """Take steps while there is text; an ending decides all that is held."""
        text = "".join(self._asleep)
        self._asleep.clear()
        for at in range(0, len(text), MAX_STEP_CHARS):
            self._text, self._at = self._text[self._at:] + text[at:at + MAX_STEP_CHARS], 0
            while self._step():
                pass
        self._ending = ending
        while ending and self._step():
            pass
        if ending:
            self._settle(0)
            if self._blank and self._step != self._after_call:
                self._out.append(TextDelta(self._blank))
            self._blank, self._ending = self._blank and "", ""
        out, self._out = self._out, []
        return out

    # Steps take what they can of the text and tell whether there is more to do.

    def _pass(self, upto: int) -> None:
        self._push(self._text[self._at:upto])
        self._at = upto

    def _take(self) -> str:
        piece, self._at = self._text[self._at:], len(self._text)
        return piece

    def _put_back(self, text: str) -> None:
        self._text, self._at = text + self._text[self._at:], 0

    def _prose(self) -> bool:
        """Pass text up to where a call begins or may begin."""
        text, at = self._text, self._at
        while at < len(text):
            line_start = not self._mid_line
            sign = (LINE_TEXT if line_start else CALL_SIGN).search(text, at)
            start = sign.start() if sign else len(text)
            if text[start:start + 1] in ("", "\n"):
                self._mid_line = self._mid_line and start == len(text)
                at = start + 1
                continue
            self._mid_line = True
            head = self._head_at(start, line_start)
            if head == MORE:
                self._pass(start)
                self._mid_line = not line_start
                return False
            if isinstance(head, Head):
                return self._begin(head, start, line_start)
            if line_start and (text[start] in "{[" or FENCE_OPEN.match(text, start)):
                return self._quoted(start)
            at = start + 1
        self._pass(len(text))
        return False

    def _head_at(self, at: int, line_start: bool) -> Verdict:
        """As find_head, while not too much was read in vain."""
        head = find_head(self._text, at, line_start, self._tools) \
            if self._wasted <= MAX_WASTED_CHARS else None
        if isinstance(head, Head) and head.rule == "tag_name" and not line_start:
            return None
        return None if head == MORE and self._ending else head

    def _begin(self, head: Head, at: int, line_start: bool) -> bool:
        """Start to read a call, or pass one whose place says that it is quoted."""
        self._pass(at)
        opener, block = self._text[at:head.at], FENCE_OPEN.match(self._text, at)
        fence = block.group(1) if block else self._fence
        found = Found("fenced" if fence else "bare" if head.rule in BARE_RULES else "own",
                      self._before, fence)
        if not line_start and not well_placed(found.line[-300:]):
            return self._skip(head.at)
        self._head, self._found, self._opener, self._at = head, found, opener, head.at
        self._marks = fence or ("```" if "```" in opener else "")
        # What streams must be meant whatever follows, but for words that take it back.
        self._may_stream = (self._streams and head.rule in ("tool_call", "function_xml")
                            and found.kind == "own" and weight_of(found, "more", True) > 0
                            and found.line.rstrip()[-1:] in SENTENCE_MARKS)
        self._collect()
        if head.body == "line":
            self._step = self._line
        elif head.body not in ("json", "python"):
            raw, meant = head.body.startswith("raw:"), tools_meant(head.name, self._tools)
            self._read(TaggedInput(meant[0], head.body[4:] if raw else head.name, raw),
                       meant[0] if self._may_stream and len(meant) == 1 and not raw else None)
        return True

    def _collect(self) -> None:
        """Begin to gather a body in brackets."""
        self._pieces: List[str] = []
        self._length = self._next_try = 0
        self._scan, self._step = BracketScan(), self._brackets

    def _skip(self, at: int) -> bool:
        """Pass what opens a quoted call, and its body where that is in brackets."""
        self._pass(at)
        self._scan, self._mid_line = BracketScan(), True
        self._step = self._data if self._text[at:at + 1] in ("{", "[", "(") else self._prose
        return True

    def _quoted(self, at: int) -> bool:
        """Pass data or a code block, in which nothing is a call."""
        fence = FENCE_OPEN.match(self._text, at)
        if not fence:
            return self._skip(at)
        self._pass(fence.end())
        self._fence, self._step = fence.group(1), self._code
        self._mid_line = not fence.group().endswith("\n")
        return True

    def _code(self) -> bool:
        """Pass a code block up to the line that closes it."""
        text, at = self._text, self._at
        while at < len(text):
            end = None if self._mid_line else FENCE_LINE.match(text, at)
            if end and end.end() == len(text) and not self._ending:
                break
            if end and end.group(1).startswith(self._fence):
                self._pass(end.end())
                self._fence, self._mid_line, self._step = "", True, self._prose
                return True
            at = text.find("\n", at) + 1 or len(text)
            self._mid_line = text[at - 1] != "\n"
        self._pass(at)
        return False

    def _data(self) -> bool:
        """Pass a bracketed value that is no call, to its end or to a blank line."""
        piece = self._text[self._at:self._at + MAX_STEP_CHARS]
        last = self._before[-1:]
        blank = (last + piece).find("\n\n") + 1
        piece = piece[:blank - len(last)] if blank else piece
        end = self._scan.feed(piece)
        self._pass(self._at + (end if end >= 0 else len(piece)))
        self._mid_line = not self._before.endswith("\n")
        if end < 0 and not blank:
            return self._at < len(self._text)
        self._step = self._prose
        return True

    def _after_call(self) -> bool:
        """Give closing marks to the call before them; another call may follow."""
        if not self._swallow():
            return False
        text, at = self._text, skip_blank(self._text, self._at)
        if at == len(text):
            if self._ending:
                self._pass(at)
            return False
        head = self._head_at(at, True)
        if head == MORE:
            return False
        if isinstance(head, Head) and not (self._fence and text[at] in "`~"):
            return self._begin(head, at, True)
        if self._fence:
            self._cancel_fence()
        else:
            self._step = self._prose
            self._mid_line = self._mid_line and "\n" not in text[self._at:at]
        return True

    def _swallow(self) -> bool:
        """Give closing marks to the call before them; False while one may be cut."""
        text, at, final = self._text, self._at, bool(self._ending)
        while True:
            match, blank = AFTER_CALL.match(text, at), skip_blank(text, at)
            tag = MARKUP_TAG.match(text, blank)
            label = tag_label(tag) if tag else ""
            foreign = tag and tag.group(1) and label not in CLOSING_TAGS and (
                not resolve_tool(label, self._tools))
            if match and not foreign and (
                    final or match.end() < len(text) or match.group().lstrip()[0] in "<[/#"):
                at = match.end()
            elif tag and (label in END_TAGS or "end" in label.split("_")):
                opens = None if tag.group(1) else self._head_at(blank, True) or (
                    label in CALL_TAGS and UNKNOWN_CALL.match(text, tag.end()) and READ_ON)
                if opens:
                    self._extend(at)
                    return opens != MORE
                at = tag.end()
            elif self._marks and text.startswith(self._marks, blank) and (
                    final or blank + len(self._marks) < len(text)):
                at, self._marks, self._fence = blank + len(self._marks), "", ""
            else:
                self._extend(len(text) if final and CLOSING_CUT.match(text, at) else at)
                return final or not AFTER_BEGUN.fullmatch(text, blank)

    def _extend(self, upto: int) -> None:
        """Add closing marks to the last call, which swallows them or is shown with them."""
        if self._queue:
            self._queue[-1].raw += self._text[self._at:upto]
        self._at = upto

    def _cancel_fence(self) -> None:
        """Show calls of a code block that holds more than calls."""
        raws = ""
        while self._queue and (self._queue[-1].behind, self._queue[-1].fence) == ("", self._fence):
            raws = self._queue.pop().raw + raws
        self._step, self._mid_line = self._code, not raws.endswith("\n")
        self._push(raws)

    # Bodies: each step takes the new text and ends in _accept or _reject.

    def _brackets(self) -> bool:
        """Read JSON or Python arguments as soon as their brackets are closed."""
        piece = self._take()
        self._pieces.append(piece)
        self._length += len(piece)
        short = self._length < MAX_HEADER_CHARS
        if self._may_stream and short and self._stream_json():
            return True
        self._wake = None if self._may_stream and short else CLOSERS
        at = self._scan.feed(piece)
        while at >= 0:
            length = self._length - len(piece) + at
            if length >= self._next_try:
                self._next_try = length + max(0, length - MAX_HEADER_CHARS) // 2
                if self._attempt(length, False):
                    return True
            at = self._scan.feed(piece, at)
        if self._may_stream and not (short or self._ending):  # a first piece of many tokens
            self._may_stream = False
            if self._stream_json():
                return True
        return bool(self._ending) and self._attempt(self._length, True)

    def _attempt(self, length: int, final: bool) -> bool:
        """Read that much of the body; False when more of it must come."""
        whole, head = "".join(self._pieces), self._head
        self._pieces, text = [whole], whole[:length]
        closed, calls = True, None
        try:
            if head.body == "python":
                calls, stop = read_python(text, self._tools, head.rule)
            else:
                value, stop, closed = read_json(text)
                whole_call = isinstance(value, dict) and value.get("name", "") == head.name
                calls = calls_from_json(value, self._tools, head.rule) \
                    if whole_call or not head.name else self._named(value)
        except (ValueError, RecursionError):
            return final and self._reject(whole)
        if not closed and not final:
            return False
        cut = not closed and self._ending == "cut" and not text[stop:].strip()
        return self._accept(None if cut else calls, whole, stop)

    def _line(self) -> bool:
        """Read the one line that is the input."""
        match = INPUT_LINE.match(self._text, self._at)
        if not match or (match.end() == len(self._text) and not self._ending):
            return False
        body, line = self._take(), match.group()
        cut = self._ending == "cut" and line == body
        return self._accept(None if cut else self._named(line.strip()), body, len(line))

    def _named(self, arguments: Any) -> Optional[List[Call]]:
        """Make a call of the tool that the head named."""
        call = make_call(self._head.name, arguments, self._tools, self._head.rule)
        return [call] if call else None

    def _read(self, reader: InputReader, streamed: Optional[Tool]) -> None:
        """Read parameters one by one; those of a tool that is given go out as they come."""
        self._step, self._wake = self._parameters, None
        self._reader, self._writer = reader, InputWriter(streamed) if streamed else None
        self._events: ReaderEvents = []

    def _stream_json(self) -> bool:
        """Begin to stream a body whose first keys name one tool and its arguments."""
        body = "".join(self._pieces)
        match = CANONICAL.match(body)
        meant = tools_meant(match.group(1), self._tools) if match and not self._head.name else []
        if not match or len(meant) != 1:
            return False
        self._read(JsonInput(), meant[0])
        self._pieces = [body[:match.end()]]
        self._put_back(body[match.end():])
        return True

    def _parameters(self) -> bool:
        piece, reader = self._take(), self._reader
        reader.feed(piece, bool(self._ending))
        events, reader.events = reader.events, []
        if self._writer:
            self._send(self._writer, events)
        else:
            self._wake = TAG_END
        self._pieces.append(piece)
        if self._found.kind == "open" and not reader.lost:
            return reader.done and self._end_stream(
                reader.rest, not reader.cut or self._ending != "cut")
        self._events += events
        return reader.done and self._end_parameters()

    def _end_parameters(self) -> bool:
        """Read the call from all its parameters, or once more where a reader is lost."""
        reader, body = self._reader, "".join(self._pieces)
        self._unread = len(body) - len(reader.rest)
        if not isinstance(reader, TaggedInput):  # or it named no parameter that the tool needs
            self._put_back(body)
            self._collect()
            self._may_stream = False
            return True
        cut = reader.cut and (self._ending == "cut" or self._head.body.startswith("raw:"))
        if reader.lost:
            self._wasted += len(body)
            reader = reader.again(body)
            self._events = reader.events
        calls = None if cut else self._named(tagged_values(self._events))
        return self._accept(calls, body, len(body) - len(reader.rest))

    def _send(self, writer: InputWriter, events: ReaderEvents) -> None:
        """Let the input go out once it names a parameter that the tool needs."""
        writer.write(events)
        if writer.known and self._found.kind != "open":
            self._settle(0, leads_on=True)
            self._found.kind = "open"
            self._new_block(CallStart(writer.tool.name, self._head.rule))
        if writer.known and writer.written:
            self._out.append(CallInput(writer.written))
            writer.sent.append(writer.written)
            writer.written = ""

    def _end_stream(self, rest: str, finished: bool) -> bool:
        """End a streamed input; a finished one waits for the words behind it."""
        self._put_back(rest)
        self._step, self._wake, self._mid_line = self._after_call, None, True
        if finished:
            self._queue.append(self._found)
        else:
            self._out.append(CallEnd(False))
        return True

    def _accept(self, calls: Optional[List[Call]], body: str, stop: int) -> bool:
        """Let the calls that end there wait for the words behind them; pass what is none."""
        self._wasted += len(body) - stop if self._ending else 0  # read for one without an end
        if self._found.kind == "open" and calls and self._writer:
            # Of a streamed call the rest, where it goes on as what was sent begins.
            sent, whole = "".join(self._writer.sent), json.dumps(calls[0].input)
            if len(calls) == 1 and whole.startswith(sent):
                self._out += [CallInput(whole[len(sent):-1])] * (len(whole) > len(sent) + 1)
                return self._end_stream(body[stop:], True)
            calls = None
        if not calls:
            return self._reject(body)
        self._found.raw, self._found.calls = self._opener + body[:stop], calls
        self._fence = self._found.fence
        self._put_back(body[stop:])
        self._step, self._wake, self._mid_line = self._after_call, None, True
        self._queue.append(self._found)
        self._settle(MAX_HOLD_CHARS)
        return True

    def _reject(self, body: str) -> bool:
        """Pass what was no call after all; what follows its opener is looked at again."""
        if self._found.kind == "open":
            return self._end_stream(body[self._unread:], False)
        self._put_back(self._opener + body)
        # Where more may come only its words were weighed, for as long as reading so much takes.
        self._wasted += len(self._text) if self._ending else MAX_STEP_CHARS // 2
        self._wake = None
        if self._fence:
            self._cancel_fence()
            return True
        return self._quoted(0) if self._opener[:1] in ("`", "~") else self._skip(len(self._opener))

    # What leaves: text at once unless a call before it waits for its words.

    def _push(self, text: str) -> None:
        self._before = (self._before + text)[-MAX_CONTEXT_CHARS:]
        if self._queue:
            self._queue[-1].behind += text
            self._settle(MAX_HOLD_CHARS)
        else:
            self._show(text)

    def _settle(self, limit: int, leads_on: bool = False) -> None:
        """Decide calls until fewer characters are held behind the first; leads_on: more come."""
        queue = self._queue
        while queue and sum(len(each.raw) + len(each.behind) for each in queue) - len(
                queue[0].raw) >= limit:
            told = next((each for each in queue if each.behind.strip()), queue[-1])
            meant = is_call(queue[0], told.behind[:MAX_HOLD_CHARS],
                            leads_on or told is not queue[-1])
            found = queue.pop(0)
            if found.kind == "open":
                self._out += [CallInput("}")] * meant + [CallEnd(meant)]
            else:
                self._show("" if meant else found.raw)
            for call in found.calls if meant else ():
                if call_key(call) not in self._known:
                    self._made.append(call_key(call))
                    self._new_block(call)
            self._show(found.behind)

    def _new_block(self, delta: Delta) -> None:
        self._blank, self._thought = "", ""
        self._out.append(delta)

    def _show(self, text: str) -> None:
        if self._blank is not None:
            text = self._blank + text
            self._blank = None if text.strip() else text
        if self._blank is None and text:
            self._thought = ""
            self._out.append(TextDelta(text))


def call_key(call: Call) -> str:
    return json.dumps([call.name, call.input], sort_keys=True, default=str)


def tagged_values(events: ReaderEvents) -> Dict[str, str]:
    """Gather a reader's events into parameters and their text."""
    values: Dict[str, List[str]] = {}
    key = ""
    for kind, text in events:
        if kind == "key":
            key, values[text] = text, []
        elif kind == "text":
            values[key].append(text)
    return {name: "".join(pieces) for name, pieces in values.items()}


# ============================== 10. SHELL COMMANDS ==============================
# A file operation becomes one Bash command that proves its own effect.
#
# How every edit works. The new content is made twice, by different tools, in files of its own in
# the current folder: .new by the tool that does the work, .check by the tools that prove it (never
# the same ones: printf compared with printf proves nothing). Only when both are equal the target is
# touched: a new file by mv, an existing one by cp from .new, after a backup that was compared too,
# so that links, mode bits and owners stay. In the end the target is compared with .check.
#
# Why the commands look as they do. Claude Code runs a command in acceptEdits mode without asking
# only if its analyser can follow it (contract/claude-code.md C2, F6, and own runs of 2.1.197 and
# 2.1.330): no variables, substitutions, braces, set, exit, awk or perl; a heredoc alone on its
# line; a pipe in no `if`; no flags of mv and cp; sed only as s/// of some characters. `[[ ... ]]`,
# `if` and `!` are allowed, and as keywords of the shell they cannot be replaced by a broken
# program: what decides whether something is overwritten is always a keyword. Tools and options are
# those that GNU, BusyBox, macOS and Git Bash share; the shell is bash 3.2 or newer.


class ShellCommand(NamedTuple):
    """A Bash command, and in words what it does and how that is proven."""
    command: str
    description: str


class CannotCarryError(ValueError):
    """The operation does not fit into a command; the message says why."""


# ------------------------------ quoting ------------------------------
# The analyser refuses a backslash before white space even inside quotes ("Contains
# backslash-escaped whitespace"), and the CLI, 2.1.197 as 2.1.330, turns \u03b4 in any
# tool's input into the character itself: quotes are closed and opened between the two.
BACKSLASH_BEFORE = Pattern(r"\\(?=[ \t\nu])")
PLAIN_WORD = Pattern(r"[A-Za-z0-9_@%+:,./-]+")
# Cc, and the lone surrogates that cannot be encoded.
UNUSABLE_IN_NAME = Pattern("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def shell_word(text: str) -> str:
    """Quote one word for the shell; nothing in it is ever expanded."""
    inner = text.replace("'", "'\\''")
    return "'" + BACKSLASH_BEFORE.sub("\\\\''", inner) + "'"


def shell_path(path: str) -> str:
    """Quote a path: "~/" at the start stays the home folder, "-" no option."""
    if path.startswith("~/"):
        return "~/" + shell_word(path[2:])
    return shell_word("./" + path if path.startswith("-") else path)


def usable_path(path: str) -> str:
    """Return the path without trailing slashes, or raise CannotCarryError."""
    if UNUSABLE_IN_NAME.search(path):
        raise CannotCarryError("The file name holds control characters.")
    trimmed = path.rstrip("/")
    if not trimmed:
        raise CannotCarryError("The operation names no file." if not path
                               else "The operation names the root folder.")
    return trimmed


def parent_step(path: str) -> str:
    """Return "mkdir -p ... && " for the path's folder, "" where it needs none."""
    folder = path.rpartition("/")[0]
    return "" if folder in ("", "~", ".") else f"mkdir -p -- {shell_path(folder)} && "


# ------------------------------ carrying content ------------------------------
# What the analyser refuses even in a quoted heredoc, and so is hidden from it: a brace
# with a quote after it ("expansion obfuscation"), what BACKSLASH_BEFORE is for, and "="
# at the start of a word ("zsh =cmd"). The CLI itself rejects control characters (C1).
HIDDEN = Pattern(
    "[\x00-\x08\x0b-\x1f\x7f]|\\{(?=[^{}]*['\"])|\\\\(?=[ \t\nu])|(?<!\\S)=(?=[A-Za-z_])")
# Refused too ("Contains Unicode whitespace", control characters); as tr knows only
# single bytes, a text with one of these is carried in base64.
WIDE_REFUSED = Pattern("[\x80-\xa0\u1680\u2000-\u200b\u2028\u2029\u202f\u205f\u3000\ufeff]")
# Stand-ins for hidden characters, the most conspicuous first.
STAND_INS = "@%+:,^|!?_QZXJKWVYqzxjkwvy0123456789ABCDEFGHILMNOPRSTU"


def octal(content: bytes) -> str:
    """Return bytes as od prints them: " 150 151"."""
    return "".join(f" {byte:03o}" for byte in content)


def sha256(content: bytes) -> str:
    return str(late("hashlib").sha256(content).hexdigest())


def hidden_characters(text: str) -> str:
    """Return the characters of text that may not stand in a heredoc."""
    return "".join(sorted(set(HIDDEN.findall(text + "\n'"))))  # the command goes on with quotes


HEREDOC = "{tool} > {target} <<'{tag}'\n{text}{tag}\n"
FROM_BASE64 = "base64 -d < {0}64{1} > {0} || base64 -D < {0}64{1} > {0}\n"  # -D: macOS up to 12


def heredoc(tool: str, target: str, text: str) -> str:
    """Return lines that write text, which ends with a newline or is empty."""
    lines, tag, number = set(text.split("\n")), "EOF", 0
    while tag in lines:
        number += 1
        tag = f"EOF_{number}"
    return HEREDOC.format(tool=tool, target=target, tag=tag, text=text)


def from_base64(target: str, content: bytes, then: str = "") -> str:
    """Return lines that write bytes from base64."""
    coded = late("base64").encodebytes(content).decode()
    return heredoc("cat", target + "64", coded) + FROM_BASE64.format(target, then)


def work_copy(text: str, target: str) -> str:
    """Return lines that write the text to target, as readable as it can be.

    Hidden characters have stand-ins in the heredoc, which tr exchanges. Every heredoc
    ends with a newline; head leaves away one that the text has not.
    """
    hidden = hidden_characters(text)
    free = "".join(sign for sign in STAND_INS if sign not in text)[:len(hidden)]
    if WIDE_REFUSED.search(text) or len(free) < len(hidden):
        return from_base64(target, text.encode())
    body = text.translate(str.maketrans(hidden, free))
    tool = f"tr '{free}' '{octal(hidden.encode()).replace(' ', chr(92))}'" if hidden else "cat"
    if not text or text.endswith("\n"):
        return heredoc(tool, target, body)
    size = f"head -c {len(text.encode())}"
    if not hidden:
        return heredoc(size, target, body + "\n")
    return heredoc(tool, f"{target}line", body + "\n") + f"{size} {target}line > {target}\n"


SUM_CHECK = ("printf '%s  %s\\n' {digest} {source} | sha256sum -c > /dev/null"
             " && cp {source} {target}\n")
OCTAL_CHECK = ("od -An -v -to1 {source} | tr -d ' \\n' | grep -qx '{digits}'"
               " && cp {source} {target}\n")
LENGTH_CHECK = "wc -c < {target} | grep -qx ' *{size}' || rm -f -- {target}\n"
LINE_CHECK = """\
cp {source} {target} && echo >> {target} && cmp {target} {target}line && cp {source} {target}
"""
PACKED_CHECK = """\
printf '%s  %s\\n' {digest} {source} | sha256sum -c > /dev/null\
 || printf '%s  %s\\n' {digest} {source} | shasum -a 256 -c > /dev/null && cp {source} {target}
"""


def proven_copy(text: str, source: str, target: str, by_hash: bool) -> str:
    """Return lines that make target only if source holds exactly the text.

    A heredoc read by another tool where one carries the text, with its length, since a
    full disk cuts both copies at one place; else its bytes in octal when they are few,
    which every system can check; else SHA-256, whose tool old versions of macOS lack.
    """
    content, second, check = text.encode(), "", LENGTH_CHECK
    readable = not (hidden_characters(text) or WIDE_REFUSED.search(text))
    if by_hash or (len(content) > MAX_OCTAL_BYTES and not readable):
        check = SUM_CHECK
    elif not readable:
        check = OCTAL_CHECK
    elif not text or text.endswith("\n"):
        second = heredoc("tail -c +1", target, text)
    else:
        second, check = heredoc("tail -c +1", f"{target}line", text + "\n"), LINE_CHECK + check
    return second + check.format(
        source=source, target=target, size=len(content), digest=sha256(content),
        digits=octal(content).replace(" ", "") if check is OCTAL_CHECK else "")


def carried(text: str, source: str, target: str, effort: int) -> str:
    """Return lines that make two independent files of the text.

    effort 0: readable, proven by a second copy. 1: proven by its hash. 2: compressed.
    """
    if effort < 2:
        return work_copy(text, source) + proven_copy(text, source, target, effort == 1)
    zlib, content = late("zlib"), text.encode()
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    return from_base64(source, packer.compress(content) + packer.flush(), " | gzip -dc") + \
        PACKED_CHECK.format(source=source, target=target, digest=sha256(content))


# ------------------------------ steps ------------------------------
class Step(NamedTuple):
    """One operation on its way to become lines of Bash.

    script comes first; whether the operation is done is the exit status of proof.
    done says so in words, "" for what only reads: its output speaks for itself.
    """
    script: str
    proof: str
    done: str = ""


class Job(NamedTuple):
    """What a builder of a Step gets.

    base is the start of its temporary names. after is the file that an earlier step
    leaves when it succeeded, "" for the first: nothing happens without that file.
    """
    op: FileOp
    base: str
    after: str
    effort: int
    coded: bool
    max_read_bytes: int

    @property
    def file(self) -> str:
        """The operation's path as a word of Bash; raises CannotCarryError."""
        here = "." if self.op.kind == "list" else ""
        return shell_path(usable_path(self.op.path or here))

    def fill(self, template: str, **words: str) -> str:
        """Put names into a template; {gate} begins the conditions within brackets."""
        gate = f"-e {self.after} && " if self.after else ""
        return template.format(base=self.base, gate=gate, **words)


def ending(operation: str, code: int, files: List[str], coded: bool) -> str:
    """Return what a failed step ends with: tidy up, say so, be an error.

    The error is a keyword's: unlike false it cannot be replaced by a program, and the
    CLI does not take its exit 1 for success as it does for `test` (C1). The code is
    that of style "coded": the analyser refuses `exit` (contract/claude-code.md C2).
    """
    tidy = f"rm -f -- {' '.join(files)}\n" if files else ""
    return f"{tidy}echo 'verification failed: {operation}' >&2\n" + (
        f"exit {code}" if coded else "[[ failed = done ]]")


def leave(job: Job, say: str, operation: str, code: int, *files: str) -> str:
    """Return what ends a command of style "coded" at once, with a code of its own."""
    left = [*files, job.after] if job.after else [*files]
    return f"{{ {say}\n{ending(operation, code, left, True)}; }}"


PUT_NEW = """\
if cmp -s {base}.check {base}.new && [[ {gate}-e {base}.check && ! -e {file} && ! -L {file} ]]\
 && {folder}cp {base}.new {base}.copy
then mv {base}.copy {file}"""
PUT_OLD = """\
if cmp -s {base}.check {base}.new && [[ {gate}-e {base}.check && -f {file} && ! -e {base}.old ]]\
 && cmp {file} {base}.first && mv {base}.first {base}.old
then cp {base}.new {file} && cmp {base}.check {file} || cp {base}.old {file}"""
FIRST = """\
if [[ -e {file} || -L {file} ]]
then cp {file} {base}.first
else printf '' > {base}.first
fi
"""
KEPT = "[[ -e {file} || -L {file} ]] && ! cmp -s {base}.check {file} && echo {kept} >&2\n"
# Two tools compare: where nothing was to be done, one broken tool must not be believed.
SAME = ("[[ -e {base}.check ]] && cmp -s {base}.check {base}.new && cmp -s {base}.check {file}"
        " && diff -q {base}.check {file}")


def commit(job: Job, script: str, done: str, new: bool, old: bool) -> Step:
    """Put .new in place once .check agrees with it, and compare again.

    new and old say whether the target may be missing, and whether it may exist; then
    its content is noted as .first, from which the script may work. That copy becomes
    the backup .old, which stays if it could not be put back, and is never overwritten.
    """
    kept = shell_word(f"{job.op.path} holds something else, which is kept")
    put = "\nel".join([PUT_NEW] * new + [PUT_OLD] * old) + "\nfi\n" + ("" if old else KEPT)
    words = {"file": job.file, "folder": parent_step(usable_path(job.op.path)), "kept": kept}
    first = job.fill(FIRST, **words) if old else ""
    return Step(first + script + job.fill(put, **words), job.fill(SAME, **words),
                f"{done} {job.op.path}")


def create_step(job: Job) -> Step:
    script = carried(job.op.text, f"{job.base}.new", f"{job.base}.check", job.effort)
    overwrite = job.op.kind == "write"
    return commit(job, script, "written" if overwrite else "created", new=True, old=overwrite)


# cat makes the new content, tail its proof. A file that cannot be written to the end
# (full disk) is removed, so that two cut copies are never taken for equal ones.
PREPEND = """\
cat {base}.text {base}.first > {base}.new || rm -f -- {base}.new
tail -c +1 {base}.twin > {base}.check && tail -c +1 {base}.first >> {base}.check\
 || rm -f -- {base}.check
"""
APPEND = """\
cat {base}.first {base}.text > {base}.new || rm -f -- {base}.new
tail -c +1 {base}.first > {base}.check || rm -f -- {base}.check
tail -c +1 {base}.twin >> {base}.check || rm -f -- {base}.check
"""
# cut ends every line with a newline; tail and cmp see whether the last one has it.
APPEND_LINE = """\
cut -b 1- {base}.first | cat - {base}.text > {base}.new || rm -f -- {base}.new
tail -c +1 {base}.first > {base}.check || rm -f -- {base}.check
tail -c 1 {base}.first > {base}.last
echo > {base}.line
[[ -s {base}.last ]] && ! cmp -s {base}.last {base}.line && echo >> {base}.check
tail -c +1 {base}.twin >> {base}.check || rm -f -- {base}.check
"""


def join_step(job: Job) -> Step:
    """Append or prepend."""
    kind = job.op.kind
    script = {"prepend": PREPEND, "append": APPEND, "append_line": APPEND_LINE}[kind]
    text = carried(job.op.text, f"{job.base}.text", f"{job.base}.twin", job.effort)
    return commit(job, text + job.fill(script), "prepended to" if kind == "prepend"
                  else "appended to", new=kind != "prepend", old=True)


# What the analyser lets through in s///: printable ASCII without these.
SED_TEXT = Pattern(r"(?:(?![;{}#/])[ -~])+")
SED_OLD_SPECIAL = Pattern(r"[\\.*\[^$]")
SED_NEW_SPECIAL = Pattern(r"[\\&]")


def sed_text(old: str, new: str, lined: bool) -> str:
    """Return a readable s/// for the two texts or lines, or "" where there is none."""
    if not SED_TEXT.fullmatch(old + new) or (lined and not new):
        return ""
    pattern = SED_OLD_SPECIAL.sub(r"\\\g<0>", old)
    replacement = SED_NEW_SPECIAL.sub(r"\\\g<0>", new)
    return shell_word(f"s/^{pattern}$/{replacement}/" if lined else f"s/{pattern}/{replacement}/g")


def substitution(op: FileOp) -> Tuple[str, str, Tuple[str, ...]]:
    """Return what a replacement or an insertion exchanges for what.

    These are old and new bytes in octal, and what may follow the old ones and goes too.
    Where whole lines are looked for, 777 begins a line, 776 ends one and 775 ends the
    file: no byte is that large.
    """
    if not op.other:
        raise CannotCarryError("The text to look for is empty.")
    kind, lined, _ = op.kind.partition("_line")
    old, text, gap = octal(op.other.encode()), octal(op.text.encode()), " 012" if lined else ""
    new = {"replace": text, "insert_before": text + gap + old,
           "insert_after": old + gap + text}[kind]
    if not lined:
        return old, new, ("",)
    old = " 777" + old.replace(" 012", " 776 012 777") + " 776"
    removed = kind == "replace" and not op.text
    return (old, "", (" 012", " 775")) if removed else (old, f" 777{new} 776", ("",))


MARK_LINES = " | sed 's/ 012/ 776 012 777/g' | sed 's/^/ 777/' | sed 's/ *$/ 776 775/'"
UNMARK_LINES = " | sed 's/ 77[5-7]//g'"
EXCHANGE = ("tr -d '\\n' < {base}.bytes{exchange}{unmark} | tr ' ' '\\n'"
            " | sed 's/^[0-7]/\\\\\\\\0&/' | xargs printf '%b'")
# sed does the work. The proof cuts the file's bytes, in octal, into occurrences and
# single bytes with grep (leftmost first, as the edit must), numbers these lines,
# exchanges the occurrences and sorts them back; that the octal lines were the whole
# file is proven too, by writing them as bytes and comparing.
REPLACE = """\
od -An -v -to1 {base}.first | tr -s ' \\n' ' '{mark}\
 | grep -oE '{wanted}| [0-7][0-7][0-7]' > {base}.bytes
grep -qx '{hit}' {base}.bytes || {absent}
{work} > {base}.new || rm -f -- {base}.new
grep -nvx '{hit}' {base}.bytes > {base}.parts
{kept}grep -nx '{hit}' {base}.bytes{one} | cut -d: -f1 | xargs printf '%s:{new}\\n' >> {base}.parts
sort -n {base}.parts | cut -d: -f2-{unmark} | tr -d ' \\n' > {base}.want
grep -qx '{hit}' {base}.bytes\
 && cat {base}.bytes{unmark} | sed 's/ /\\\\\\\\0/g' | xargs printf '%b' | cmp - {base}.first\
 && od -An -v -to1 {base}.new | tr -d ' \\n' | cmp - {base}.want && cp {base}.new {base}.check
"""
KEPT_HITS = "grep -nx '{hit}' {base}.bytes | tail -n +2 >> {base}.parts\n"


def replace_step(job: Job) -> Step:
    """Replace every occurrence, or insert at the first one."""
    old, new, after = substitution(job.op)
    insert, lined = job.op.kind.startswith("insert"), job.op.kind.endswith("_line")
    absent = "echo " + shell_word(f"the text to look for is not in {job.op.path}") + " >&2"
    if job.coded and not insert:
        absent = leave(job, absent, "replace", 93, f"{job.base}.first", f"{job.base}.bytes")
    script = "" if insert else sed_text(job.op.other, job.op.text, lined)
    words = {
        "new": new, "absent": absent, "wanted": "|".join(old + end for end in after),
        "hit": " .* .*" if len(old) > 4 else old,  # only an occurrence has two bytes a line
        "mark": MARK_LINES if lined else "", "unmark": UNMARK_LINES if lined else "",
        "one": " | head -n 1" if insert else "",
        "exchange": "".join(f" | sed 's/{old}{end}/{new}/{'' if insert else 'g'}'"
                            for end in after)}
    words["kept"] = job.fill(KEPT_HITS, **words) if insert else ""
    words["work"] = f"sed {script} {job.base}.first" if script else job.fill(EXCHANGE, **words)
    return commit(job, job.fill(REPLACE, **words), "inserted into" if insert else "replaced in",
                  new=False, old=True)


# A file, a link or an empty folder; never what a folder holds.
DELETE = """\
[[ {gate}-d {file} && ! -L {file} ]] && rmdir -- {file}\
 || [[ {gate}( -L {file} || ( -e {file} && ! -d {file} ) ) ]] && rm -f -- {file}\
 && [[ ! -e {file} && ! -L {file} ]]"""

# What needs no lines before its proof: it, and what is said when it holds.
PLAIN = {"delete": (DELETE, "deleted"), "list": ("ls -la -- {file}", ""),
         "mkdir": ("mkdir -p -- {file} && [[ -d {file} ]]", "made folder")}


def plain_step(job: Job) -> Step:
    proof, done = PLAIN[job.op.kind]
    return Step("", job.fill(proof, file=job.file), done and f"{done} {job.op.path}")


def destination(op: FileOp) -> Tuple[str, str]:
    """Return source and destination; a destination "folder/" takes the same name."""
    source, target = usable_path(op.path), usable_path(op.other)
    if op.other.endswith("/"):
        target += "/" + source.rpartition("/")[2]
    if source == target:
        raise CannotCarryError("Source and destination are the same.")
    return source, target


# What stands at source and then at target is noted: names, link or bytes.
RENAME = """\
if [[ -d {source} && ! -L {source} ]]
then ls -A -- {source} > {base}.check
elif [[ -L {source} ]]
then readlink {source} > {base}.check
else cp {source} {base}.check
fi
if [[ {gate}-e {base}.check && ( -e {source} || -L {source} ) && ( {free} ) ]]\
 && {folder}mv {source} {target}
then if [[ -d {target} && ! -L {target} ]]
then ls -A -- {target} > {base}.new
elif [[ -L {target} ]]
then readlink {target} > {base}.new
else cp {target} {base}.new
fi
fi
"""
# Whether the new name is free, and the old one gone; where on macOS and Windows both
# name one file, in another case, the folder's list tells.
OTHER_NAME = ("! -e {target} && ! -L {target}", "[[ ! -e {source} && ! -L {source} ]]")
OTHER_CASE = ("( ! -e {target} && ! -L {target} ) || {source} -ef {target}",
              "ls -A -- {listed} | grep -qxF -- {name}")


def rename_step(job: Job) -> Step:
    """Move to a free name; a second look at source and destination proves it."""
    old, new = destination(job.op)
    folder, slash, name = new.rpartition("/")
    words = {"source": shell_path(old), "target": shell_path(new), "folder": parent_step(new),
             "listed": shell_path(folder + slash or "."), "name": shell_word(name)}
    free, gone = (job.fill(template, **words) for template in (
        OTHER_CASE if old.casefold() == new.casefold() else OTHER_NAME))
    script = job.fill(RENAME, free=free, **words)
    if job.coded:
        script += f"{gone} || {leave(job, '', 'rename', 98, job.base + '.check')}\n"
    proof = job.fill("cmp -s {base}.check {base}.new && ") + gone
    return Step(script, proof, f"renamed {old} to {new}")


COPY = """\
if [[ {gate}! -e {target} && ! -L {target} ]] && cp {source} {base}.new && cmp {source} {base}.new
then {folder}mv {base}.new {target} && echo > {base}.moved
fi
"""


def copy_step(job: Job) -> Step:
    """Copy a file to a free name."""
    old, new = destination(job.op)
    words = {"source": shell_path(old), "target": shell_path(new), "folder": parent_step(new)}
    proof = job.fill("[[ -e {base}.moved ]] && cmp {source} {target}", **words)
    return Step(job.fill(COPY, **words), proof, f"copied {old} to {new}")


# Shows a file: a binary one is named, a long one cut, each with a notice. The bytes that
# no text holds: controls but BEL, BS, TAB, LF, VT, FF, CR and ESC.
BINARY = ("head -c 8000 {file} 2> /dev/null | od -An -v -to1"
          " | grep -qE ' (00[0-6]|01[67]|02[0-7]|03[0-24-7]|177)'")
READ = BINARY + """ && echo {binary}
tail -c +{next} {file} 2> /dev/null | head -c 1 | od -An -to1 | grep -q '[0-7]' && echo {cut}
""" + BINARY + " || head -c {most} {file}\n"


def read_step(job: Job) -> Step:
    file, most, path = job.file, job.max_read_bytes, job.op.path
    binary, cut = f"Binary file detected: {path}", f"File truncated to {most} bytes: {path}"
    return Step(READ.format(
        file=file, most=most, next=most + 1, binary=shell_word(f"[shim] {binary}"),
        cut=shell_word(f"[shim] {cut}")), f"[[ -f {file} && -r {file} ]]")


def run_step(job: Job) -> Step:
    """Run one plain command: its words are quoted anew, so nothing expands."""
    if not job.op.words:
        raise CannotCarryError("The operation names no command.")
    words = (word if PLAIN_WORD.fullmatch(word) else shell_word(word) for word in job.op.words)
    return Step("", " ".join(words))


# ------------------------------ whole commands ------------------------------
# Never part of a content: the digits are a hash over it.
TEMPORARY = Pattern(r"\.shim-[0-9a-f]{6}\.[a-z0-9]+")
# Rejected by the CLI in every mode (C1).
FORBIDDEN_IN_COMMAND = Pattern("[\x00-\x08\x0b-\x1f\x7f-\x9f]")

# How a kind of FileOp is built, what its failure is called, its exit code in style
# "coded", and it in words.
Recipe = Tuple[Callable[[Job], Step], str, int, str]
RECIPES: Dict[str, Recipe] = {
    "create": (create_step, "create", 91, "Create {path}, keeping other content that is there"),
    "write": (create_step, "write", 91, "Write {path}"),
    "append": (join_step, "append", 92, "Append to {path}"),
    "append_line": (join_step, "append", 92, "Append a line to {path}"),
    "prepend": (join_step, "insert", 96, "Put text at the top of {path}"),
    "replace": (replace_step, "replace", 94, "Replace every {old} by {new} in {path}"),
    "insert_before": (replace_step, "insert", 96, "Insert {new} before the first {old} in {path}"),
    "insert_after": (replace_step, "insert", 96, "Insert {new} after the first {old} in {path}"),
    "rename": (rename_step, "rename", 99, "Rename {path} to {other}"),
    "copy": (copy_step, "copy", 99, "Copy {path} to {other}"),
    "delete": (plain_step, "delete", 97,
               "Delete {path} (a folder only if empty) and check that it is gone"),
    "mkdir": (plain_step, "mkdir", 100, "Create the folder {path} and check that it is one"),
    "list": (plain_step, "list", 95, "List {path}"),
    "read": (read_step, "read", 95, "Show {path}"),
    "run": (run_step, "run", 95, "Run {words}"),
}
COMPARED = "; a second copy or a hash of the content proves it"
FREE = " if that name is free; its content is compared"
PROVEN: Dict[object, str] = {
    create_step: COMPARED, join_step: COMPARED, rename_step: FREE, copy_step: FREE,
    replace_step: "; other tools prove the whole result"}


def recipe_of(op: FileOp) -> Recipe:
    """Return the recipe of a kind; replacing and inserting have one for texts and lines."""
    return RECIPES.get(op.kind) or RECIPES[op.kind.partition("_line")[0]]


def brief(text: str) -> str:
    """Return text for a description: one line, at most 60 characters."""
    line = WIDE_REFUSED.sub(" ", FORBIDDEN_IN_COMMAND.sub(" ", " ".join(text[:400].split())))
    return line if len(line) <= 60 else line[:57] + "..."


def in_words(op: FileOp) -> str:
    build, _, _, words = recipe_of(op)
    line = "line " if op.kind.endswith("_line") else ""
    return words.format(
        path=brief(op.path or "."), other=brief(op.other), words=brief(" ".join(op.words)),
        old=f'{line}"{brief(op.other)}"', new=f'"{brief(op.text)}"') + PROVEN.get(build, "")


BACKUP_KEPT = """\
cmp -s {base}.old {file} && rm -f -- {base}.old
[[ -e {base}.old ]] && echo 'the old content is in {base}.old' >&2
"""


def failure(job: Job, files: List[str]) -> str:
    """Return what runs when a proof fails; a backup goes only if it is not needed."""
    _, operation, code, _ = recipe_of(job.op)
    backup = f"{job.base}.old"
    others = [name for name in files if name != backup]
    return (job.fill(BACKUP_KEPT, file=job.file) if backup in files else "") + \
        ending(operation, code, others, job.coded)


def finished(job: Job, step: Step, last: bool) -> str:
    """Return a step's lines; one that is not the last leaves a file that says: done."""
    named = set(TEMPORARY.findall(step.script + step.proof))
    files = sorted(name for name in named if name.startswith(job.base + "."))
    files += [job.after] * bool(job.after)
    ready = [f"[[ -e {job.after} ]]"] * bool(job.after)
    tidy = [f"rm -f -- {' '.join(files)}"] if files else []
    mark = [] if last else [f"echo > {job.base}.done"]
    if not step.done:
        return step.script + " && ".join([*ready, *tidy, step.proof, *mark])
    tidy += [f"[[ ! -e {files[0]} ]]"] if files else []
    return step.script + "\n".join([
        f"if {' && '.join([*ready, step.proof, *tidy])}", f"then echo {shell_word(step.done)}",
        *mark, "else", failure(job, files), "fi"])


def build(ops: Sequence[FileOp], effort: int, coded: bool, max_read_bytes: int) -> str:
    """Return the lines of all operations, each one's success the condition of the next."""
    parts, after = [], ""
    for place, op in enumerate(ops):
        base = f".shim-{sha256(repr((place, op)).encode())[:6]}"
        job = Job(op, base, after, effort, coded, max_read_bytes)
        parts.append(finished(job, recipe_of(op)[0](job), place == len(ops) - 1))
        after = f"{base}.done"
    return "\n".join(parts)


def bash_bytes(command: str) -> int:
    """Return the size of the command as the CLI hands it to bash (C1)."""
    return len(command.encode()) + 4 * command.count("'")


# Efforts to make a command fit, with the limit under which each is taken: readable and
# approvable first, then whatever bash can take.
EFFORTS: Tuple[Tuple[int, Callable[[str], int], int], ...] = (
    *((effort, len, MAX_APPROVABLE_CHARS) for effort in (0, 1)),
    *((effort, bash_bytes, MAX_BASH_BYTES) for effort in (0, 1, 2)))


def commands_for(ops: Sequence[FileOp], style: str = "plain",
                 max_read_bytes: int = 200000) -> ShellCommand:
    """Return one command for all operations; the first that fails ends it.

    style is "plain" or "coded" (the exit codes of RECIPES). Raises CannotCarryError with a
    sentence when there is no operation, a name is unusable or the content too long.
    """
    try:
        for effort, size, limit in EFFORTS:
            command = build(ops, effort, style == "coded", max_read_bytes)
            if size(command) <= limit:
                break
        else:
            raise CannotCarryError("The content is too long for a shell command.")
    except UnicodeEncodeError as error:
        raise CannotCarryError("The text holds half a surrogate pair.") from error
    if not command:
        raise CannotCarryError("There is nothing to do.")
    if FORBIDDEN_IN_COMMAND.search(command):
        raise CannotCarryError("The command would hold control characters.")
    return ShellCommand(command, "; ".join(in_words(op) for op in ops))


# ------------------------------ the client's tools ------------------------------
SHELL_NAMES = ("Bash", "run_shell_command")
SHELL_LIKE = Pattern(r"(?i)bash|shell|terminal")
WRITE_NAMES = ("Write", "write_file")
FILLED_KEYS = {"command", "description", "is_background"}


def tool_for(tools: Mapping[str, Tool], names: Sequence[str], keys: AbstractSet[str],
             needed: str) -> Optional[Tool]:
    """Return the first tool of these that requires the text `needed`, nothing beyond keys."""
    for name in names:
        schema = tools[name].schema if name in tools else {}
        required, about = required_of(schema), _mapping(properties_of(schema).get(needed))
        if needed in required and set(required) <= keys and about.get("type") == "string":
            return tools[name]
    return None


def shell_tool(tools: Mapping[str, Tool]) -> Optional[Tool]:
    """Return the client's shell: Bash, run_shell_command, or one that looks like it."""
    alike = [name for name in tools if SHELL_LIKE.search(name)]
    return tool_for(tools, [*SHELL_NAMES, *alike], FILLED_KEYS, "command")


def rescue_call(ops: Sequence[FileOp], tools: Mapping[str, Tool], style: str, max_read_bytes: int,
                cwd: str = "", *, is_new: bool = False) -> Optional[Tuple[str, Json]]:
    """Return name and input of the one tool call that does the operations.

    None without a shell tool. is_new says that the one file to be made is known not to
    exist: only then a content too long to be approved goes through the Write tool,
    which overwrites whatever is there (contract/claude-code.md F6). Otherwise the
    command asks for approval, but loses nothing. Raises CannotCarryError.
    """
    shell = shell_tool(tools)
    if shell is None:
        return None
    writes = len(ops) == 1 and ops[0].kind in ("create", "write")
    writer = tool_for(tools, WRITE_NAMES if writes else (), {"file_path", "content"}, "content")
    try:
        command = commands_for(ops, style, max_read_bytes)
    except CannotCarryError:
        if writer and (is_new or ops[0].kind == "write"):
            return write_call(writer, ops[0], cwd)
        raise
    if writer and is_new and len(command.command) > MAX_APPROVABLE_CHARS:
        return write_call(writer, ops[0], cwd)
    values = {**command._asdict(), "is_background": False}
    return shell.name, {key: values[key] for key in values if key in shell.schema["properties"]}


# What the CLI would decode in an input: an odd number of backslashes, u, four digits.
UNICODE_ESCAPE = Pattern(r"(?<!\\)((?:\\\\)*)\\(?=u[0-9a-fA-F]{4})")


def write_call(tool: Tool, op: FileOp, cwd: str) -> Tuple[str, Json]:
    """Return the call of a Write tool; it wants an absolute path."""
    path = usable_path(op.path)
    absolute = path.startswith(("/", "~/")) or path[1:2] == ":" or not cwd
    text = UNICODE_ESCAPE.sub(r"\1\\u005c", op.text) if tool.name == "Write" else op.text
    return tool.name, {"file_path": path if absolute else f"{cwd.rstrip('/')}/{path}",
                       "content": text}


# ============================== 11. RESCUE ==============================
# What the user asked for in plain words, or the model described and did not call,
# becomes file operations. Every request must fit a row of RULES as a whole, so
# that conditions, negations, several wishes and quoted speech fit none.

# ------------------------------ the user's own words ------------------------------
# Elements that a client writes into user texts (contract/claude-code.md A6, F1).
INJECTED = Pattern(
    r"<(system-reminder|local-command-(?:caveat|stdout|stderr)|command-(?:name|message|args|"
    r"contents)|task-notification|bash-(?:input|stdout|stderr)|user-prompt-submit-hook|"
    r"new-diagnostics|ide_\w{1,30}|persisted-output|tool_use_error|teammate-message)"
    r"(?:\s[^<>]{0,200})?>.*?(?:</\1>|\Z)", re.DOTALL)
STRAY_ELEMENT_END = Pattern(r"</(?:system-reminder|task-notification|local-command-\w{1,10})>")
INJECTED_MARK = Pattern(r"\[(?:Request interrupted by user|Image)[^\]\n]{0,200}\]")
# Texts that a client sends in the user's place, by how they begin.
INJECTED_STARTS = (
    "[SYSTEM NOTIFICATION", "[Subagent hand-back]", "[Your previous response",
    "[Tool use interrupted]", "[Old tool result", "Output token limit hit.",
    "Your response above was cut off", "Your tool call was malformed",
    "Caveat: The messages below were generated", "Called the ", "Result of calling the ",
    "Contents of /", "# AGENTS.md", "# CLAUDE.md", "AGENTS.md instructions",
    "As you answer the user's questions, you can use the following context",
    "Base directory for this skill:", "This is the Qwen Code.", "Web page content:",
    "System: Please continue", "Stop hook feedback", "Continue from where you left off.",
)
# Requests that want text and nothing else: compaction, titles, suggestions.
BACKGROUND_STARTS = (
    "CRITICAL: Respond with TEXT ONLY", "[SUGGESTION MODE:", "<session>", "Warmup",
    "This session is being continued from a previous conversation",
    "Your task is to create a detailed summary of the conversation",
    "Please write a 5-10 word title",
)
PLAN_MODE = Pattern(
    r"(?P<off>(?:exited|left|leaving) plan mode|plan mode (?:is )?(?:over|off|no longer active))"
    r"|plan mode (?:is |still |now |currently ){0,3}(?:active|on\b)|entering plan mode",
    re.IGNORECASE)
WORKING_DIRECTORY = Pattern(
    r"(?:working directory|cwd)(?: is)?:?[ \t]+`?((?:[a-z]:[\\/]|/)[^\n`]{0,1000})", re.IGNORECASE)


def own_texts(message: Message) -> List[str]:
    """Return the user's own texts of one message, oldest first.

    A text between two injected ones counts only where the message has no other: a
    reminder's content may hold the words that seem to end it.
    """
    own: List[str] = []
    enclosed: List[str] = []
    for block in message.blocks:
        if message.role != "user" or not isinstance(block, Text):
            continue
        text, kept = block.text.strip(), INJECTED.sub("\n", block.text)
        words = INJECTED_MARK.sub("", kept).strip()
        if words and not STRAY_ELEMENT_END.search(kept) and not text.startswith(INJECTED_STARTS):
            between = text.startswith("<") and text.endswith(">") and kept != block.text
            (enclosed if between else own).append(words)
    return own or enclosed


def _request_of(newest: Sequence[Message]) -> str:
    """Return what the newest turn asks for in the user's words; "" when nothing is asked."""
    texts = [block.text.lstrip() for message in newest if message.role == "user"
             for block in message.blocks if isinstance(block, Text)]
    if any(text.startswith(BACKGROUND_STARTS) for text in texts):
        return ""
    for message in reversed(newest):
        own = own_texts(message)
        if own or any(isinstance(block, ToolResult) for block in message.blocks):
            return own[-1] if own else ""
    return ""


def _notices(turns: Sequence[Message]) -> List[str]:
    """Return what the client itself said: system messages and reminders."""
    texts = [(turn.role, block.text) for turn in turns for block in turn.blocks
             if isinstance(block, Text) and turn.role in ("system", "user")]
    return [notice for role, text in texts for notice in (
        [text] if role == "system" else [match.group() for match in INJECTED.finditer(text)])]


lowered = lru_cache(maxsize=8)(str.lower)  # the client says the same in every turn


def _announced(notices: Sequence[str], pattern: Pattern, *words: str) -> List[re.Match[str]]:
    """Return a pattern's matches; looking for a word of it first costs a tenth of its search."""
    return [match for notice in notices for lower in (lowered(notice),)
            if any(word in lower for word in words) for match in pattern.finditer(notice)]


def slashed(text: str, cwd: str) -> str:
    """Write separators as bash does where cwd is a folder of Windows."""
    return text.replace("\\", "/") if cwd[1:2] == ":" else text


def working_directory(notices: Sequence[str]) -> str:
    """Return the announced working directory; "" when none or more than one is named."""
    found = {slashed(match[1], match[1]).strip().rstrip("/.") for match in _announced(
        notices, WORKING_DIRECTORY, "working directory", "cwd")}
    return found.pop() if len(found) == 1 else ""


def _served(earlier: Sequence[Message], request: str) -> bool:
    """Tell whether the same words were asked before and a tool call succeeded after them."""
    asked, calls = False, set()
    for message in earlier:
        asked = asked or request in own_texts(message)
        for block in message.blocks:
            if asked and isinstance(block, ToolUse):
                calls.add(block.id)
            elif isinstance(block, ToolResult) and block.is_error:
                calls.discard(block.id)
    return bool(calls)


# ------------------------------ quotes and fences ------------------------------
# A text is read with each quote and each fenced block replaced by one character of
# a private-use area; so no rule ever matches words inside them.
QUOTE_BASE, FENCE_BASE = 0xE000, 0xF000
MAX_MASKED = 0x900  # quotes or fences of one text: what the smaller area, for fences, holds
PRIVATE_USE = Pattern("[\ue000-\uf8ff]")
ONE_FENCE = Pattern("[\uf000-\uf8ff]")
OPENING = Pattern("`+|(?<![\\w\\\\\"'])[\"']|[\u201c\u201e\u00ab]|(?<!\\w)\u2018")
CLOSING = {
    **{sign: Pattern(rf"(?<!\\){sign}(?=[\s.,;:!?)\]}}*\u2026]|\Z)") for sign in "\"'"},
    "\u2018": Pattern(r"\u2019(?!\w)"), "\u201c": Pattern("\u201d"),
    "\u201e": Pattern("[\u201c\u201d]"), "\u00ab": Pattern("\u00bb"),
}
BRACKET = Pattern(r"[(\[{]")
UNPAIRED = Pattern("[\"`\u201c\u201d\u00ab\u00bb]")
FENCE_OPENING = Pattern(r"(?P<before>)(?P<indent>[ \t]*)(?P<mark>`{3,}|~{3,})(?P<info>[^`]*)")
FENCE_IN_LINE = Pattern(
    r"(?P<before>.*\S)(?P<indent>)[ \t]+(?P<mark>`{3,})(?P<info>[\w+-]*)[ \t]*\r?")
# What stands after a closing fence in its line: "``` in a.txt" goes on with the request.
AFTER_FENCE = Pattern(r"\s*| .*\S .*\S.*")
MARKDOWN = Pattern(r"\s*(?:md|markdown|mdx)\s*", re.IGNORECASE)
BLOCK_AFTER_COLON = Pattern(r"([^\n]{0,300}\b(?:following|this|these|contents?|text|lines?|"
    r"exactly)\b[^\n]{0,100}:)[ \t]*\r?\n([\s\S]*)", re.IGNORECASE)
# A value that its brackets enclose, at the end: JSON, or an element.
ENCLOSED = Pattern(
    r"([^\n]{0,300}?\b(?:with|contents?|text|json|containing|this):?)[ \t]+(?!.*\.{3})(\{(?:\s*|"
    r"[^\n:\"']*[:\"'].*)\}|\[(?:\s*|[\d\"{\[].*)\]|<(\w{1,20})\b.*</\3>)\s*\.?\s*")
BLANK_LINE = Pattern(r"\n[^\S\n]*\n")
SECOND_WISH = Pattern(r"\s*(?:then|also|and|after|finally|please|next|now|once|do not|don't|make "
    r"sure|thanks|can you|could you)\b", re.IGNORECASE)


class Fence(NamedTuple):
    """A fenced block. whole is False when its end is missing or doubtful."""
    info: str
    text: str
    whole: bool


class Masked(NamedTuple):
    """A text whose quotes and fences are single characters, and what they hold."""
    text: str
    quotes: Tuple[str, ...]
    fences: Tuple[Fence, ...]

    def fence(self, char: str) -> Fence:
        """Return the fenced block that a character stands for."""
        return self.fences[ord(char) - FENCE_BASE]

    def value(self, token: str) -> str:
        """Return what a private-use character stands for; any other token as it is."""
        if not PRIVATE_USE.fullmatch(token):
            return token
        return self.fence(token).text if token >= chr(FENCE_BASE) else self.quotes[
            ord(token) - QUOTE_BASE]


def _split_fences(text: str) -> Tuple[str, Tuple[Fence, ...]]:
    """Return the text with a character for each fence, and the fences (CommonMark 4.5).

    A markdown block may hold fences of its own; any other block with an opening
    fence inside is doubtful.
    """
    lines = []
    fences: List[Fence] = []
    opened: Optional[re.Match[str]] = None
    for line in text.split("\n"):
        if len(fences) > MAX_MASKED:
            break
        mark = FENCE_OPENING.fullmatch(line)
        if opened is None:
            opened = mark or (FENCE_IN_LINE.fullmatch(line) if line.count("```") == 1 else None)
            before = opened["before"] if opened else line
            lines += [before] if before or not opened else []
            lines += [chr(FENCE_BASE + len(fences))] if opened else []
            body, depth, whole = "", 0, True
        elif mark and mark["mark"].startswith(opened["mark"]) and not depth and (
                AFTER_FENCE.fullmatch(mark["info"])):
            lines[-1] += mark["info"].rstrip()
            fences.append(Fence(opened["info"].strip(), body, whole))
            opened = None
        else:
            if mark and mark["mark"].startswith(opened["mark"]):
                depth += 1 if mark["info"].strip() else -1
                whole = whole and MARKDOWN.fullmatch(opened["info"]) is not None
            # The indent that the fence itself has is taken away, as in CommonMark.
            indent = len(opened["indent"])
            body += line[:indent].lstrip(" \t") + line[indent:] + "\n"
    if opened is not None:
        fences.append(Fence(opened["info"].strip(), body, False))
    # A bare ``` inside a markdown block ends it too early and opens another.
    bare = max((index for index, fence in enumerate(fences) if not fence.info), default=0)
    return "\n".join(lines), tuple(
        fence._replace(whole=False) if index < bare and MARKDOWN.fullmatch(fence.info) else fence
        for index, fence in enumerate(fences))


def _unquote(opening: str, content: str) -> str:
    """Return a quote's content: only the quote's own sign may be escaped in it."""
    if opening in "\"'":
        return content.replace("\\" + opening, opening)
    if opening == "\u00ab":
        return content.strip(" \u00a0\u202f")
    spaced = opening.startswith("``") and "`" in content and content[:1] == content[-1:] == " "
    return content[1:-1] if spaced else content


def _closed(text: str) -> bool:
    return sum(map(text.count, "([{")) == sum(map(text.count, ")]}"))


def _mask_quotes(body: str, one_line: bool, balanced: bool) -> Tuple[str, Tuple[str, ...]]:
    """Replace quotes by characters; an opening sign without its closing one stays."""
    quotes: List[str] = []
    pieces = []
    dead: Dict[str, int] = {}
    position = 0
    for match in OPENING.finditer(body):
        opening, start = match.group(), match.end()
        if len(quotes) > MAX_MASKED:
            break
        if match.start() < position or start < dead.get(opening, 0) or len(opening) > 16:
            continue
        line_end = body.find("\n", start) if one_line else -1
        stop = len(body) if line_end < 0 else line_end
        closing = CLOSING.get(opening) or Pattern(f"(?<!`){opening}(?!`)")
        ends = closing.finditer(body, start, stop)
        end = next((end for end in ends if not balanced or _closed(body[start:end.start()])), None)
        inside = body[start:end.start()] if end else ""
        # Where a quote in which a sign of its kind opens again ends is in doubt but for code.
        if end is None or (opening in inside and not (balanced and BRACKET.search(inside)) and any(
                sign.group() == opening for sign in OPENING.finditer(body, start, end.start()))):
            dead[opening] = end.end() if end else stop
            continue
        pieces += [body[position:match.start()], chr(QUOTE_BASE + len(quotes))]
        quotes.append(_unquote(opening, inside))
        position = end.end()
    return "".join([*pieces, body[position:]]).replace("\u2019", "'"), tuple(quotes)


@lru_cache(maxsize=4)  # a request is read by several rules
def _mask(text: str, one_line: bool = False, balanced: bool = False) -> Optional[Masked]:
    """Mask fences and quotes; None when the text cannot be masked safely.

    With one_line a quote ends in its line, with balanced only where its brackets are closed.
    """
    body, fences = _split_fences(text)
    masked, quotes = _mask_quotes(body, one_line, balanced)
    if PRIVATE_USE.search(text) or max(len(quotes), len(fences)) > MAX_MASKED:
        return None
    return Masked(masked, quotes, fences)


def _mask_block(text: str) -> Optional[Masked]:
    """Read all lines after a first line that ends with a colon as one quote."""
    match = BLOCK_AFTER_COLON.fullmatch(text) or ENCLOSED.fullmatch(text)
    if match is None or "```" in text or not match[2].strip():
        return None
    last_part = BLANK_LINE.split(text.rstrip())[-1]
    masked = _mask(match[1])
    if masked is None or (last_part != text.rstrip() and SECOND_WISH.match(last_part)):
        return None
    return masked._replace(text=masked.text + "\n" + chr(QUOTE_BASE + len(masked.quotes)),
                           quotes=(*masked.quotes, match[2].lstrip("\r\n")))


def _readings(words: str) -> Iterator[Masked]:
    """Yield the ways in which the quotes of a request can be read, likeliest first."""
    yield from filter(None, (_mask(words), _mask_block(words)))
    # Code quoted in its own kind of quotes: "print("x")".
    if len(words) <= 4 * MAX_REQUEST_CHARS:
        yield from filter(None, (_mask(words, balanced=True),))


# ------------------------------ paths ------------------------------
# What no path may hold: control codes, a way up, a scheme, and files that steer
# a shell, a login or the client itself, wherever they lie.
UNSAFE_PATH = Pattern(
    "[\x00-\x1f\x7f-\x9f\u2028\u2029]|\\s/|://|\\.\\.\\\\|(?:\\A|/)(?:\\.\\.|\\.(?:git|ssh|"
    "gnupg|aws|kube|claude|netrc|profile|bashrc|bash_profile|bash_login|bash_logout|zshrc|"
    "zshenv|zprofile|zlogin|gitconfig|config))(?:/|\\Z)", re.IGNORECASE)
FILE_NAME = Pattern(r"(?:.*/)?(?:[^/]*\.(?=[\w+-]*[^\W\d_])[\w+-]{1,16}|Makefile|Dockerfile|"
    r"Containerfile|LICEN[SC]E|README|CHANGELOG|NOTICE|AUTHORS|CONTRIBUTING|TO[D]O|Procfile|"
    r"Gemfile|Rakefile|Jenkinsfile|Vagrantfile|Pipfile|Brewfile|[Jj]ustfile|CODEOWNERS|VERSION)")
# Products whose names look like files.
NOT_FILES = Pattern(r"(?:(?:node|vue|next|react|express|three|d3|nuxt|socket|angular|ember)"
                    r"\.(?:js|io)|asp\.net|e\.g|i\.e|\w+\.(?:com|org|net|io|dev))", re.IGNORECASE)
# Parts of a path that say nothing: "./", "//" and a slash at the end.
PATH_NOISE = Pattern(r"(?:\A|(?<=/))(?:\.?/)+|/\.?\Z")
MAX_PATH_CHARS, MAX_NAME_BYTES = 1000, 255


class Scope(NamedTuple):
    """What paths may be: ~/ for the user's own words, absolute ones inside cwd."""
    home_ok: bool = False
    cwd: str = ""
    told: bool = False  # the words are the model's


def _is_file_name(raw: str) -> bool:
    return FILE_NAME.fullmatch(raw) is not None and not NOT_FILES.fullmatch(raw)


def _safe_path(raw: str, scope: Scope) -> str:
    """Return a path inside the project in its plain form, or ""."""
    path = slashed(raw.strip(), scope.cwd)
    inside = bool(scope.cwd) and path.startswith(scope.cwd + "/")
    rest = path[len(scope.cwd):] if inside else path
    plain = PATH_NOISE.sub("", rest) or "."
    home = scope.home_ok and path.startswith("~/") and plain[2:3] not in ("", ".")
    if (not path or len(path) > MAX_PATH_CHARS or UNSAFE_PATH.search(rest) or rest[1:2] == ":"
            or (path.startswith(("/", "\\")) and not inside) or (path.startswith("~") and not home)
            or max(map(len, plain.encode("utf-8", "replace").split(b"/"))) > MAX_NAME_BYTES):
        return ""
    return f"{scope.cwd}/{plain}" if inside else plain


# ------------------------------ the table ------------------------------
# In a shape a space stands for white space, a space and ? for white space or none,
# and {name} is a row of SLOTS. An indented line goes on with the row above it.
SLOTS = r"""
q           [\ue000-\uf8ff]
fence       (?P<text>[\uf000-\uf8ff])
token       ([\ue000-\uf8ff]|[^\s,;:\"'`<>|*?()\[\]{}$&!\\\ue000-\uf8ff]+)
fill        ((the|a|an|my|our|this|that|new|existing|local|single|text|plain|plain-text|python|
  javascript|typescript|markdown|json|yaml|csv|html|css|shell|config|following|file[,:]|
  in (this|the (current|project|working|root)) (directory|folder|project)|configuration|
  source|log|file|document|script|filename|path|at) )*((called|named) )?
folderfill  ((the|a|an|my|our|this|new|empty|existing|nested|sub|single|two|three|folder|
  directory|dir|subfolder|subdirectory|sub-folder|sub-directory|folders|directories|structure|
  called|named|at|path|for me|with the name|-p) )*
filenoun    ( (file|document|script)('s)?)?(,? in (this|the current) (folder|directory|project))?
foldernoun  ( (folder|directory|dir|subfolder|subdirectory)s?)?
file        (?P<file_marks>{fill})(?P<file>((?<=called\s)|(?<=named\s))([\w-]+ )
  {1,4}[\w-]+\.[\w-]+|{token}){filenoun}
name        ([\ue000-\uefff]|[^\s()]*\.\w+)
names       {token}((,? and |, ?)(the )?(file )?{token}){0,9}
files       (?P<files_marks>((the|both|two|three|these|following|files|documents) )*{fill})
  (?P<files>{names}){filenoun}
dest        (?P<dest_marks>{folderfill}{fill})(?P<dest>(?!(folder|directory|dir)\b){token})
  (?P<dest_noun>{foldernoun}){filenoun}
folder      (?P<folder_marks>{folderfill})(?P<folder>{token})(?P<folder_noun>{foldernoun})
folders     (?P<folders_marks>{folderfill})(?P<folders>{token}((,? and |, ?)(the )?(folder |
  directory )?{token}){0,9})(?P<folders_noun>{foldernoun})
infolder    (,? (in|inside|under|within|inside of|from) (?!this ){folder})?
only        ( (only|just|exactly|precisely))?
say         ( ?((saying|that (says|reads|contains|is)|which (says|reads)|containing|with|
  reading|consisting of|as|being)\b)?{only}( the (exact |literal |following )?
  (text|words?|string|contents?))?:?)
noun        (((the|this|these|a|an|its|another|one more) )?((following|exact|literal|
  exactly|new|single|only|just|plain|simple|short|extra|additional|final|last|entire|full|two|
  three) )*(?P<line>(lines?|row|entry|item|bullet( point)?|list item|import|record)\b)?
  (text|strings?|words?|phrase|sentence|contents?|characters?|letters?|value|number|snippet|
  content|data|paragraph|message|(python |javascript |html |css |shell )?code|json|yaml|html|
  csv|xml|sql|markdown)?( of text)?{say} )?
quoted      ({noun}(?P<text>{q}))
words       [^\s\ue000-\uf8ff]([^\ue000-\uf8ff]*?[^\s\ue000-\uf8ff])?
text        (({noun}|(exactly|just|only) )(?P<text>{q})|((the|a) )?((exact|literal|new|
  single) )*(text|string|words?|phrase|sentence|number|(?P<bare_line>line)|(?P<vague>contents?)|
  exactly)( saying| that (says|reads)| containing)?:? (?P<bare>{words})|(?P<loose>{words}))
this        ((this|the|these|that|a|an|one|another|more|following|new|next|exact|single|final|
  last|below|it) )*(this|these|that|it|above|below|following|text|(?P<line>lines?)|contents?|
  code|block|snippet|section|string|row|data|entry|entries|paragraph)?( below)?
with        ([.;,]?( and)? ?((fill it )?with|having|holding|(contain|say)ing|(so )?
  (that|which|it)( it)? ((should|must|needs to|has to|shall|will) (contain|say|have|
  read|hold|include)|contains|says|reads|has)|(with )?(whose|its|the|exactly the|the exact)
  ( only| file)? (contents?|text)( of the file)? (should be|must be|to be|is|are|set to|
  being)){only}( (this|the following|these))?:?)
force       (?P<force>,? \(?(and )?(overwrit(e|ing)|replacing)( (it|the file|any existing \w+|
  whatever is there))?( if (it|one) (already )?exists)?\)?)?
init        ( (in|inside|into|within|to)( it| (the|this|that) file)| inside| as ((its|
  the) )?(only )?(contents?|text))
of          ((the )?(entire|whole|full|complete|current|existing|all( of)?)? ?(the )?(file )?
  (contents?|text|everything)( of| in| inside| from) |(the )?(whole|entire|full|complete) (?=file ))
in          ((everywhere |throughout |anywhere )?(in|inside|within|of|from|throughout|across|
  inside of))
old         ((all|every|each|any)( of)? )?(the |this )?((?P<old_each>occurrences?|instances?|
  appearances?|mentions?) of )?((the|this|exact|literal|old|existing|following) )*
  (((?P<old_line>line)|(?P<old_noun>text|strings?|words?|phrase|sentence|substring|characters?|
  value|part|code|block|snippet|section))( (saying|that says))?:? )?(?P<old>{q}|[^\s\ue000-\uf8ff]+)
new         (the |this |a )?((new|exact|literal|following) )*((line|text|string|word|
  phrase|value|sentence|code|block|snippet|section):? )?(?P<new>{q}|(an? )?
  (the )?empty( string)?|nothing|[^\s,\ue000-\uf8ff]+)
anchor      (the )?(exact |literal |existing )?((?P<anchor_line>line)|text|string|word|phrase|
  sentence)?( (that (says|reads)|which says|saying))? ?(?P<anchor>{q})
where       (right |immediately |directly |just )?(?P<where>after|before|above|below|under|
  underneath|beneath|in front of|behind|following|preceding)
create      (create|make|generate|set up|start|add|produce|touch|initialize|initialise|build)
  ( me| us)?
add         (add|put|write|insert|place|append|include|paste|save|store)
swap        ((find|search) ?(and|/) ?replace|replace|substitute|update|change|convert|turn|
  correct|fix)
spot        (the )?(very |new )?(?P<spot>end|last line|first line|bottom|top|beginning|start|
  head)( of| in)?
ownline     (?P<own_line>,? (on|as|in) (a|its own|a separate)( new)?
  ( separate)? line( of its own)?( at the end)?| after a (newline|line break))?
look        ((read through|go through|read|show|display|print|cat|open|view|output|dump|see|
  look at|take a look at|have a look at|check out|look (inside|into|in)|inspect)( out| up)?
  ( me| us)?( out)?)
lists       (list|show|display|print|give|enumerate|see|check|look at|explore|examine|view|inspect)
tail        (?P<tail>((,|\.)? (and|then|so|to|for|in|first)|\. (what|tell|how))\b[^\ue000-\uf8ff]*)?
here        (?P<here>(in |inside |of |from )?((this|the|my|our)( (current|working|project|
  root|present|project's root))*|current|working|project) (folder|directory|dir|project|repo|
  repository|workspace)|here)
listing     ((all|the|of|every|any|a|list|me|us|out|existing|current) )*((files?|folders?|
  directories|subfolders|subdirectories|contents?|entries|items|everything|directory|
  directory contents|files?names|what('s| is)|(what|which) files( and folders)?( are)?)
  (,? (and|or|&) (sub)?(folders?|directories|files))?)
  ( that are| located| contained| stored| there are| there| we have)?
# What may be asked for.
verbs       create|make|write|build|generate|implement|add|scaffold|set ?up|develop|code|put|save|
  update|change|modify|fix|edit|refactor|rename|move|replace|insert|append|delete|remove|
  convert|translate|rewrite|configure|initiali[sz]e|init|start|draft|prepare|produce|overwrite|
  organi[sz]e|split|extract|bump|set|bootstrap|copy|correct|turn|get rid of|clean|port|migrate|
  adjust|back ?up|drop|strip|trim|erase|ensure|merge|reduce|improve|increase|decrease|
  enable|disable|switch|swap|include|extend|simplify|finish|complete|document|annotate|format|
  sort|tidy|call it|name it|give (?!me|us)
# Words that stand for something else: no text, name or argument is meant by them.
function    an|the|some|my|your|our|their|his|her|this|that|these|those|it|its|them|any|all|every|
  each|both|more|another|other|you|me|us|in|on|at|to|of|for|with|from|by|and|or|if|is|are|as|
  here|there|which|what|where|how|why|like|using|everything|something|anything|nothing
# Words that describe a text or name a property rather than being what is written.
describing  a|{function}|new|today|current|random|several|few|many|lots?|good|better|proper|basic|
  simple|sample|default|sane|sensible|appropriate|missing|different|one|two|three|four|five|ten|
  first|last|text|words?|contents?|lines?|code|data|info|summary|list|table|story|poem|haiku|essay|
  joke|quotes?|description|script|program|function|class|method|module|test|note|entry|licen[sc]e|
  dates?|time|timestamp|(file)?names?|title|config|json|yaml|html|csv|xml|markdown|lorem|ipsum|
  output|result|readme|support|usage|help|boilerplate|whitespace|tabs?|spaces?|newlines?|commas?|
  semicolons?|empty|error|debug|logging|hex|base64|sql|api|auth|async|type|version|dependency|
  feedback|status|state|priority|colou?r|port|author|language|theme|mode|level|size|width|height|
  format|timeout|host|user|username|password|url|path|header|footer|headings?|font|background|label|
  value|year|month|day|email|address|phone|price|amount|quantity|count|limit|numbers?|order|owner|
  case|style|tone|indent\w*|tense|spelling|grammar|typos?|comments?|bullets?|imports?
sure        sure|sure thing|okay|ok|great|certainly|of course|alright|done|now|next|first|then|
  finally|so|and|also|no problem|absolutely|got it|understood|yes
# What shows that a fence is not the file named before it.
elsewhere   looks? like|before|currently|outputs?|error|snippet|parts?|excerpt|lines?|section|
  should|would|could|might|not|don't|if|unless|once|adding|from
will        I'll|I will|I'm going to|I am going to|let me|let's|allow me to
tools       (the |your )?(bash|shell|write|file|edit)? ?tools?
useless     (no longer (needed|used|necessary|(need|use) (it|them))|(need|use|
  want)s? (it|them)( any ?more)?|obsolete|outdated|unused|misspell?ed|misspelt|misleading|
  deprecated|useless|stale|out of date|garbage|junk)
"""
# Two orders in which a request may be told, "in a.txt, add 'x'" and "add to a.txt: 'x'",
# are brought into the one of the rules.
PLACE_FIRST = r"""((?P<place>(in|inside|within|into|from|to|at|after|before|above|below|under|
    underneath|beneath) .{1,200}?)[,:]?|(open|edit|update|modify|change|fix|go to)
    (?P<opened>(?!and )([^,:]{0,100} )?{token})([:,]|,? (and|to|then|by))) (please |
    then )?(?P<order>({add}|prepend|{swap}|swap|remove|delete|erase|insert\w*|add\w*|replac\w*|
    chang\w*|append\w*)(?=:|\s)[\s\S]*)"""
TEXT_LAST = r"""(?P<verb>{add}|prepend)( {this})?(?P<place> (to|at|on|in|into|onto|as|
    {where}) .{1,200}?)?([:,.]|,? (the )?(text|(?P<late_line>lines?)|contents?|string|
    words?)[:,]?|( as follows| exactly| verbatim)?:|{say}| and (write|put))? (?P<text>{q}|
    ((?<=:\s)|(?<=text\s)|(?<=line\s))(?!({describing})\b){words})"""
# The kind of operation that a request of each shape asks for.
RULES = r"""
append   (append|add) {text} (to|into|in|onto|at) {file}{ownline}
append   (append|add) {text}{ownline} (to|into|in|onto|at) {file}
append   {add} {text}{ownline} (to|at|on|in|into|onto|as) {spot} {file}
append   append {file} with {quoted}
prepend  prepend {text} (to|at|in|onto) ({spot} )?{file}{ownline}
create   {create} {file}{infolder}{with} {text}{init}?{force}
create   {create} {file}{with} {quoted}{infolder}
create   {create} (an?|the)( new)?( \w+)? file with (the )?(file ?)?name {file},? (and|
  with) (with )?{quoted}
create   {create} {file}([:,.]| with)? ({this}:? )?{fence}
create   {create} {file},? and {add} {text}{init}
create   {create} {file},? and {add} {this}{init}?: (?P<text>{q})
create   {create} (a|the) (new )?(text |python |json )?file{with} {quoted},? (and )?
  ((name|call|save) it( as)? |at |saved as )?{file}
create   (save|put|store|place) {text} (to|into|in|inside|as) {file}
empty    {create} ((an?|the|two|three|some) )?(new,? )?(empty|blank)( new)?
  ( text| python| markdown)*( files?)?[,:]?( called| named| at)? {files}{infolder}
empty    {create} {files},? (as an empty file|with no contents?|that is empty|empty|
  (and )?leav(e|ing) it empty|with empty contents?|without (any )?contents?)
empty    touch {files}
named    {create} (a|the)( new)?( text)? file (called|named)? ?{files}{infolder}
write    write {text}( and nothing else)? (to|into|in|inside|as) {file}{force}
write    (write|overwrite|rewrite|fill) {of}?{file}{with} {text}
write    (write|overwrite|rewrite) {of}?{file}([:,.]| with)? ({this}:? )?{fence}
write    (overwrite|set|replace|change|update) {of}{file} (with|to|by|to be){only}:? {text}
write    (set|replace|overwrite|change|update) {file}('s)? contents? (to|with|by) {text}
write    (make|update|change) {file} (to |so (that )?it )?(contains?|says?|reads?|
  ha(ve|s)){only} {quoted}
write    (i|we) (want|need|would like) {file} to (contain|say|read|hold) (only|just|exactly) {text}
clear    (erase|delete|remove|wipe)( out)? {of}{file}
clear    (empty|clear|truncate|blank)( out)? {of}?{file}
rename   (rename|(change|update) (the )?(file ?)?name of) {files} (to|as|into|->|=>|
  so (that )?it('s| is)( now)?) (be )?{dest}
rename   (change|rename|update) (the )?file('s)?( ?name)? from {files} to {dest}
rename   rename (?P<files_marks>(the )?(folder|directory|dir) (called |named )?)
  (?P<files>{token}) (to|as|into) (be )?{dest}
rename   give {files} the (new )?name {dest}
remove   (remove|delete|erase|strip|drop) {old} {in} {file}
replace  {swap}:? {old} (with|by|to|into):? {new} {in} {file}
replace  {swap} {old} {in} {file} (with|by|to|into):? {new}
replace  (swap|exchange) (out )?{old} (for|with) {new} {in} {file}
replace  substitute {new} for {old} {in} {file}
replace  (find|search for|look for|locate) {old} {in} {file},? and (replace|change|swap) (it|
  them|each|every one|all( of them)?|that) (with|to|by|for) {new}
insert   {add} {text}{ownline},? {where} {anchor},? (in|inside|of|within|to|into) {file}
insert   {add} {text}{ownline} (in|into|to|inside) {file},? {where} {anchor}
move     (move|mv) {files} ((?P<to>in|into|inside( of)?|under|(over )?to|as) )?{dest}
copy     (copy|cp|duplicate) {files} ((?P<to>in|into|inside( of)?|under|(over )?to|as) )?{dest}
copy     (make|create) a copy of {files},? (called|named|as|at|and (call|name) it) {dest}
delete   (delete|remove|erase|rm|unlink|trash|get rid of|throw away) {files}{infolder}
delete   (delete|remove|rmdir) (?P<files_marks>the empty (folder|directory))
  ( called| named)? (?P<files>{token})
mkdir    {create} {folders}(,? (in|inside|under|within|inside of) (the )?(folder |
  directory )?(?P<parent>{token})( folder| directory)?)?
read     {look} ((the|all( the| of the)?|entire|full|whole|complete|current) )*
  ((contents?|text|lines|source|code) (of|in|from|inside) |what('s| is) (in|
  inside( of)?|written in) )?{files}{infolder}{tail}
read     (tell|give|get|fetch)( me)? (what('s| is) (in|inside( of)?)|the (full )?
  (contents?|text) (of|in)) {files}{tail}
list     {lists} {listing}( {here}| (in|inside|of|under|within|from|at) {folder})?{tail}
list     (ls|dir)( ({here}|{folder}){tail})?
folder   (list|show|display|view|open|look at|see)( me)? ({here}|{folder}){tail}
run      (run|execute|issue|invoke)( (the|this|a|following|shell|bash|terminal|command|
  this command))*:? (?P<command>{q})( command)?( (in|on|from) (the|my|a|
  this) (terminal|shell|console|project|repo|folder|directory))?( here)?{tail}
run      (?P<typed>(git (status|log|diff|show|branch|remote|blame)|ls|pwd|tree)
  ( [\w./=:@+,%^-]+){0,12})
run      (run|execute)( (the|command|following|shell|bash))*:? (?P<typed>[a-z][\w-]*
  ( [\w./=:@+,%^-]+){0,12}?)( command)?( (in|on) (the|my|a) (terminal|shell|console))?{tail}
"""
# Questions that only the file or folder can answer; the model must say that it looks.
QUESTIONS = r"""
list    (what|which) ({listing}|files? and folders?|files? do (I|we) have|kind of files) ?(are |is |
  exist |do (I|we) have |live |exists )?(there )?(are )?({here}|(in|inside|under|within) {folder})
folder  what('?s| is| are)( there| all)?( the (contents|files))?
  ( of| in| inside)? ({here}|(in )?{folder})
folder  (what|which)( files)? (does|do) ({here}|{folder}) (contain|have|hold)
"""
ROW = Pattern(r"^(\w+) +(.*(?:\n +.*)*)", re.MULTILINE)
LINE_BREAK = Pattern(r"\n\s*")
SLOT_NAME = Pattern(r"\{([a-z]+)\}")
# What stands before the first space outside brackets, which are at most four deep.
FIRST_PART = Pattern(r"\A((?:[^ ()]|\((?:[^()]|\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\))*\))*)")
WORD = Pattern(r"[A-Za-z]+")
# A set of characters, an escaped one, or a bracket: in a shape it captures nothing.
SET_OR_GROUP = Pattern(r"\[(?:\\.|[^\]\\])+\]|\\.|\((?!\?)", re.DOTALL)


@lru_cache(maxsize=8)
def table_rows(table: str) -> Tuple[Tuple[str, str], ...]:
    """Return the name and the shape of each row of a table."""
    return tuple((row[1], row[2]) for row in ROW.finditer(table))


class Shape(Pattern):
    """A pattern written as in the tables; case does not matter."""

    def __init__(self, source: str, flags: int = re.IGNORECASE) -> None:
        super().__init__(source, flags)

    def __getattr__(self, name: str) -> Any:
        slots, source = dict(table_rows(SLOTS)), self.source
        while SLOT_NAME.search(source):
            source = SLOT_NAME.sub(lambda slot: slots[slot[1]], source)
        source = SET_OR_GROUP.sub(lambda found: "(?:" if found[0] == "(" else found[0],
                                  LINE_BREAK.sub("", source))
        # Set at once: another thread may be writing the same shape out.
        self.source = source.replace(" ?", r"\s*").replace(" ", r"\s+")
        return super().__getattr__(name)


_shape = lru_cache(maxsize=256)(Shape)
IN_IT = Shape(r" (to|in|into|from|of)( it| the file| that file)")


@lru_cache(maxsize=256)  # and most patterns are never compiled, which takes 10 ms each
def _first_words(template: str) -> FrozenSet[str]:
    """Return the words with which a text of this shape can begin, and perhaps more."""
    slots = dict(table_rows(SLOTS))
    written = SLOT_NAME.sub(lambda slot: slots[slot[1]], template)
    return frozenset(word.lower() for word in WORD.findall(FIRST_PART.split(written)[1]))


@lru_cache(maxsize=256)
def _rows_from(rules: str, word: str) -> Tuple[Tuple[str, str], ...]:
    """Return the rows of a table that a text with this first word, in lower case, may fit."""
    return tuple([row for row in table_rows(rules) if word in _first_words(row[1])])


def _fits(shape: str, core: str) -> Optional[re.Match[str]]:
    first = WORD.match(core)
    begins = first is not None and first.group().lower() in _first_words(shape)
    return _shape(shape).fullmatch(core) if begins else None


def _ordered(core: str) -> str:
    """Return a request in the order of the rules: verb, text, place."""
    fronted = _fits(PLACE_FIRST, core)
    order, place = core, ""
    if fronted:
        order = _base_form(fronted["order"])
        place = f" {fronted['place'] or 'in ' + fronted['opened']}"
        order = IN_IT.sub("", order) if fronted["opened"] else order
    late = _fits(TEXT_LAST, order)
    if late is not None and (late["place"] or PRIVATE_USE.fullmatch(late["text"])):
        line = " the line" if late["line"] or late["late_line"] else ""
        order = f"{late.group('verb')}{line} {late.group('text')}{late.group('place') or ''}"
    return order + place


# ------------------------------ from a match to operations ------------------------------
MAX_REQUEST_CHARS = 500
LONG_GAP = Pattern(r"\s{9}")
NOT_WORDS = Shape("({describing})")
NOT_LOOSE = Shape(r"""(.*\s)?({describing}|\w+(s|tion|ing|ment|ness|ity|ance|ence))
    ('s|\s|[,.]|\Z)|.*'s\b""", re.IGNORECASE | re.DOTALL)
# What makes an unquoted text a description, a second wish or a condition.
NOT_LITERAL = Shape(r"""[<\[(]\w|(tbd|you|i|we|what|shown|given|generated|provided|same|copied|
    taken|found|needed|required|appropriate|suitable|described|mentioned|similar|of|in|on|from|
    about|for|that|which|describing|explaining|based|below|above|following|as|to|is|it|representing|
    saying|containing|with (the|an?)|version|representation|[\w-]+ of)\b|.*(\b(then|if|unless|
    otherwise|don't|do not|and also|as well as|instead of|except|when|because|so that|whichever|
    whatever|times|twice|repeated|uppercase|lowercase|reversed|backwards|translated|encoded|(in|
    into) (all |upper|lower|french|german|spanish|italian|chinese|japanese|python|json|yaml|html|
    markdown|bold|caps|reverse|each|every)|on (each|every|separate)|(before|after|above|below|under|
    underneath|beneath) (the|line|every|each)|(at|to|on) the (end|top|bottom|start|beginning|first|
    last))\b|\band (a|an|another|the|then|run|show|read|tell|{verbs})\b|[.!?]\s+[A-Z]\w+.*\b(file|
    it)\b)|.*(^|\s)[\w./-]+\.(txt|md|py|js|ts|json|ya?ml|toml|html|css|sh|cfg|ini|csv|
    log)\b""", re.IGNORECASE | re.DOTALL)
# What follows "with content" where a text is described: "a list of names", "loaded from x".
DESCRIPTION = Shape(r"""({describing})('s)? |({function}|empty|blank|defaults?)\Z|
    (?-i:[a-z]+(ed|ing)) \w""")
NOT_A_NAME = Shape(r"""({function}|folders?|director(y|ies)|files?|project|repo|structure|
    called|named|inside|under|listing|tree|layout|hierarchy|browser|watcher|scanner|walker|picker|
    names|paths|containing|clipboard|trash|current|working|hidden|separate|common|shared|dedicated|
    suitable|proper|different|similar|second|third|random|(recursive|complete|entire|permanent|
    immediate|safe|manual|proper|correct|direct|total|full|individual|automatical)ly|%\w+%.*)""")
PROSE_ARGUMENT = Shape(r"(a|{function}|over|against|bugs?|files?|folders?)")
PROSE_FILE = Pattern(r".*\.(?:txt|md|log|text|rst|markdown)", re.IGNORECASE)
IGNORE_FILE = Pattern(r"(?:.*/)?\.[a-z]{1,10}ignore", re.IGNORECASE)
# Files in which text without a named place would break the structure.
STRUCTURED_FILE = Pattern(r".*\.(?:json|html?|xml|svg|ipynb|vue|jsx|tsx)", re.IGNORECASE)
DIRECT_QUOTE = Pattern("\\w+\\s+[\ue000-\uefff]")
LITERAL_WORD = Pattern(r"[\w=./:+@#%-]+(?:\(\))?")
# A word that is meant literally in a program, too: "old_name", "8080", "getUser", "foo".
CODE_WORD = Pattern(r"(?=.*[\d_=/:]|.*[a-z][A-Z]|[A-Z]{2,}\Z)[\w=./:+@#%()-]+|foo|bar|baz|qux")
ARTICLE = Pattern(r"\b(?:the|an?)\s+\Z", re.IGNORECASE)
EMPTY_WORD = Pattern(r"(?:an? |the )?empty(?: string)?|nothing", re.IGNORECASE)
# "read X and ..." may go on with what the user wants to know, not with a second action.
INFORMATION = Shape(r"""[,.]?\s*((and|then|so)\s+)*((please|briefly|you|can|could|I|to|we|
    me)\s+)*(summari[sz]e|explain|tell|describe|show me|give me|list|count|report|say|answer|
    analy[sz]e|identify|let me know|find|see|look|point|outline|what|how|know|understand|check|me|
    us|in full|first|i want|for me|here|the|this)\b.*""", re.IGNORECASE | re.DOTALL)
VERB_AFTER = Shape(r"""(\b(and|then|also)|[,;.])\s+((then|also|please|and)\s+)*({verbs}|
    run|execute|commit|push|install|apply|use|do|send|open|download|test|print to|store)\b|
    \b(don't|do not|without|unless)\b""")
# Where a text goes; any other spot is the top.
SPOT_KINDS = {"": "append", "end": "append", "last line": "append_line", "bottom": "append_line"}
BEFORE = ("before", "above", "in front of", "preceding")
ON_OWN_LINES = ("above", "below", "under", "underneath", "beneath")
NAMED = Shape(r"\b(called|named|file|(sub)?(folders?|dir|directory|directories))\b")
FOLDER_NOUN = Shape(r"""\b(folders?|dir|director(y|ies)|sub-?(folders?|director(y|ies)))\b""")
# A folder by its form or by custom.
KNOWN_FOLDER = Pattern(r".*/|src|lib|docs|tests|assets|scripts|static|public|utils|components|"
                       r"pages|styles|images|templates")
LISTED = Pattern(r"\A(?:list|ls|dir)\b|\bfiles?\b", re.IGNORECASE)
PATH_SEPARATOR = Pattern(r"\s*,\s*and\s+|\s*,\s*|\s+and\s+")
PATH_FILLER = Pattern(r"(?:the\s+)?(?:(?:file|folder|directory)\s+)?", re.IGNORECASE)

Ops = Tuple[FileOp, ...]


class Rescue(NamedTuple):
    """What to do in the model's place, and the rule that found it."""
    rule: str
    ops: Ops


class Asked(NamedTuple):
    """A request freed of courtesy: what is left, and an end mark that says more than an end."""
    core: str
    ending: str = ""
    newline: bool = False  # a final line feed is asked for
    cut: bool = False  # words were taken off the end


def _only_looks(ops: Ops) -> bool:
    return all(op.kind in ("read", "list", "run") for op in ops)


class Reading(NamedTuple):
    """A match of a rule in a masked text, with what decides how it is read."""
    match: re.Match[str]
    masked: Masked
    scope: Scope
    asked: Asked

    def group(self, name: str) -> str:
        """Return a group's text; "" where the shape has none or it is unused."""
        return self.match.groupdict().get(name) or ""

    def value(self, name: str) -> Optional[str]:
        """Return the quoted text of a group; None where it is not one quote."""
        token = self.group(name)
        return self.masked.value(token) if PRIVATE_USE.fullmatch(token) else None

    def as_written(self, words: str) -> str:
        """Give words of the match, which are no path, the backslashes of Windows back."""
        at = slashed(self.masked.text, self.scope.cwd).find(words)
        return self.masked.text[at:at + len(words)] if at >= 0 else words

    def marks(self, name: str) -> str:
        """Return the words around a path that tell what it is: "the file ... called"."""
        return self.group(name + "_marks") + " " + self.group(name + "_noun")

    def one_path(self, token: str, marks: str, folder: bool) -> str:
        """Return the safe path of a token, or "" when it is none."""
        raw = self.masked.value(token.rstrip("."))
        meant = PRIVATE_USE.match(token) or not (
            NOT_FILES.fullmatch(raw) or NOT_A_NAME.fullmatch(raw))
        named = FILE_NAME.fullmatch(raw) or NAMED.search(marks) or raw.endswith("/")
        if not meant or not named or ONE_FENCE.match(token) or (raw.endswith("/") and not folder):
            return ""
        return _safe_path(raw, self.scope)

    def paths(self, name: str = "files", folder: bool = False) -> Tuple[str, ...]:
        """Return every path of a list such as "a, b and c"; () when one is none."""
        tokens = [PATH_FILLER.sub("", token, count=1) if " " in token else token
                  for token in PATH_SEPARATOR.split(self.group(name))]
        paths = tuple(self.one_path(token, self.marks(name), folder) for token in tokens)
        if self.group("folder"):
            parent = self.folder("folder", self.marks("folder"))
            paths = tuple(f"{parent}/{path}" if parent and path[:1] not in ("", "/", "~") else ""
                          for path in paths)
        return paths if all(paths) else ()

    def folder(self, name: str, marks: str = "folder") -> str:
        """Return the path of a group that holds a folder, or ""."""
        raw = self.masked.value(self.group(name))
        sure = FOLDER_NOUN.search(marks) or "/" in raw or KNOWN_FOLDER.fullmatch(raw)
        path = self.one_path(self.group(name), "folder", True) if sure else ""
        return "" if "." in path.rsplit("/", 1)[-1][1:] else path

    def path(self) -> str:
        """Return the path of the one file that a request names, or ""."""
        paths = self.paths("file")
        return paths[0] if len(paths) == 1 else ""


def _text(found: Reading) -> Optional[str]:
    """Return the literal text that a request gives; None where it only describes one."""
    quoted, feed = found.value("text"), "\n" if found.asked.newline else ""
    if quoted is not None:
        return quoted + feed
    bare = found.group("bare") or found.group("loose")
    if found.match.string.endswith(bare):
        bare = "" if found.asked.cut else bare + found.asked.ending
    bare = found.as_written(bare)
    if not bare or "\n" in bare or UNPAIRED.search(bare) or NOT_LITERAL.match(bare):
        return None
    if found.group("bare"):
        return None if found.group("vague") and DESCRIPTION.match(bare) else bare + feed
    # Without even "the text" before them words can be meant literally in few files only.
    pattern = bare.startswith("*.") or LITERAL_WORD.fullmatch(bare)
    prose = len(bare.split()) <= 4 and not NOT_LOOSE.match(bare)
    meant = (IGNORE_FILE.fullmatch(found.group("file")) and pattern) or (
        PROSE_FILE.fullmatch(found.group("file")) and prose)
    return bare + feed if meant and not found.scope.told else None


def _add_text(found: Reading, kind: str) -> Ops:
    """Create, write, append to or prepend to one file."""
    path, text = found.path(), _text(found)
    spot = " ".join(found.group("spot").lower().split())
    ignores = IGNORE_FILE.fullmatch(path) is not None
    # "append 'b.txt' to a.txt" may mean the other file's content.
    if text is None or (DIRECT_QUOTE.match(found.asked.core) and _is_file_name(text)
                        and " " not in text and not ignores):
        return ()
    line = (found.group("line") or found.group("bare_line") or found.group("own_line")
            or (found.group("loose") and ignores))
    if kind == "append":
        kind = SPOT_KINDS.get(spot, "prepend")
        if not spot and found.match.string[:4].lower() == "add " and (
                STRUCTURED_FILE.fullmatch(path) or (found.scope.told and not line)):
            return ()
        kind = "append_line" if kind == "append" and line else kind
    if kind == "append_line" or (kind == "prepend" and (line or spot in ("top", "first line"))):
        text = text if text.endswith("\n") else text + "\n"
    op = FileOp("write" if found.group("force") else kind, path, text)
    return (op,) if path and (text or kind in ("create", "write")) else ()


def _word(found: Reading, name: str) -> Optional[str]:
    """Return the old or new text of a replacement: quoted, or one plain word."""
    word, noun, each = found.group(name), found.group("old_noun"), found.group("old_each")
    if PRIVATE_USE.fullmatch(word):
        return found.masked.value(word)
    if name == "new" and EMPTY_WORD.fullmatch(word):
        return ""
    described = name == "old" and not noun and (not (found.group("new") or each) or
        ARTICLE.search(found.match.string, 0, found.match.start("old")))
    plain = noun or each or PROSE_FILE.fullmatch(found.group("file")) or (
        CODE_WORD.fullmatch(found.group("old")) and CODE_WORD.fullmatch(found.group("new")))
    fits = plain and LITERAL_WORD.fullmatch(word) and not NOT_WORDS.fullmatch(word)
    return found.as_written(word) if fits and not described else None


def _replace(found: Reading, kind: str) -> Ops:
    path, old = found.path(), _word(found, "old")
    new = "" if kind == "remove" else _word(found, "new")
    if not path or not old or new is None or old == new:
        return ()
    if not found.group("old_line"):
        return (FileOp("replace", path, new, old),)
    line = FileOp("replace_line", path, new.rstrip("\n"), old.rstrip("\n"))
    return (line,) if found.value("old") is not None else ()


def _insert(found: Reading, _kind: str) -> Ops:
    path, text, anchor = found.path(), _text(found), found.value("anchor")
    if not path or not text or not anchor or found.group("loose"):
        return ()
    where = " ".join(found.group("where").lower().split())
    kind = "insert_before" if where in BEFORE else "insert_after"
    if (found.group("anchor_line") or found.group("line") or found.group("own_line")
            or found.group("bare_line") or where in ON_OWN_LINES):
        return (FileOp(kind + "_line", path, text.removesuffix("\n"), anchor.rstrip("\n")),)
    return (FileOp(kind, path, text, anchor),)


def _move(found: Reading, kind: str) -> Ops:
    """Rename one path, or move or copy paths to a new name or into a folder."""
    sources = found.paths(folder=kind == "rename")
    raw, marks = found.masked.value(found.group("dest")), found.marks("dest")
    to = found.group("to").lower()
    folder_meant = (KNOWN_FOLDER.fullmatch(raw) or FOLDER_NOUN.search(marks)) is not None and (
        kind != "rename" or raw.endswith("/"))
    if folder_meant or to.startswith(("in", "under")):
        folder = found.folder("dest")
        targets = tuple(_joined(folder, source) for source in sources)
    else:
        marks += found.marks("files") if kind == "rename" else ""
        targets = (found.one_path(found.group("dest"), marks, False),)
    pairs = tuple(zip(sources, targets))
    # "rename src/a.txt to b.txt" leaves open whether the folder changes, too.
    unclear = (to == "in" and not folder_meant) or (
        kind == "rename" and "/" in "".join(sources) and "/" not in "".join(targets))
    if unclear or len(sources) != len(targets) or not all(new and old != new for old, new in pairs):
        return ()
    return tuple(FileOp("copy" if kind == "copy" else "rename", old, other=new)
                 for old, new in pairs)


def _joined(folder: str, path: str) -> str:
    return f"{folder}/{path.rsplit('/', 1)[-1]}" if folder and path else ""


def _mkdir(found: Reading, _kind: str) -> Ops:
    paths = found.paths("folders", folder=True)
    parent = found.folder("parent")
    if not FOLDER_NOUN.search(found.marks("folders")) or (found.group("parent") and not parent):
        return ()
    return tuple(FileOp("mkdir", f"{parent}/{path}" if parent else path) for path in paths)


def _tail_is_harmless(found: Reading) -> bool:
    tail = found.group("tail")
    return not tail or found.scope.told or (
        INFORMATION.fullmatch(tail) is not None and not VERB_AFTER.search(tail))


def _each_path(found: Reading, kind: str) -> Ops:
    """Do one thing to each path: create it empty, clear, delete or read it."""
    kind = {"empty": "create", "named": "create", "clear": "write"}.get(kind, kind)
    paths = found.paths("files" if found.group("files") else "file")
    return tuple(FileOp(kind, path) for path in paths) if _tail_is_harmless(found) else ()


def _list(found: Reading, kind: str) -> Ops:
    """List a folder: one that is called so, or for kind "list" what is no file."""
    folder = found.group("folder")
    raw = found.masked.value(folder)
    noun = FOLDER_NOUN.search(found.marks("folder")) or raw.endswith("/")
    listed = kind == "list" and LISTED.search(found.match.string)
    fits = noun or (listed and raw[:1] != "-" and not FILE_NAME.fullmatch(raw.lstrip(".")))
    path = found.one_path(folder, "folder", True) if folder and fits else "" if folder else "."
    return (FileOp("list", path),) if path and _tail_is_harmless(found) else ()


# Commands that say something without an argument.
ALONE = (("ls",), ("pwd",), ("date",), ("whoami",), ("uname",), ("tree",), ("df",), ("du",))


def _run(found: Reading, _kind: str) -> Ops:
    line, tail = found.value("command"), " ".join(found.group("tail").lower().split())
    if line is None and tail.startswith(("to ", "for ", "in ")) and not tail.startswith("for me"):
        return ()
    words = _read_only(line if line is not None else found.group("typed"), line is None)
    says = (len(words) > 1 or words[:1] in ALONE) and _tail_is_harmless(found)
    return (FileOp("run", words=words),) if says else ()


BUILDERS: Dict[str, Callable[[Reading, str], Ops]] = {
    kind: build for build, kinds in (
        (_add_text, "append prepend write create"), (_each_path, "empty named clear delete read"),
        (_replace, "remove replace"), (_insert, "insert"), (_move, "rename move copy"),
        (_mkdir, "mkdir"), (_list, "list folder"), (_run, "run")) for kind in kinds.split()}


# ------------------------------ scaffolds and commands ------------------------------
# One word, sign or here-document of a script. What bash would expand, substitute, pipe,
# test or loop over is none of them.
SHELL_TOKEN = Pattern(
    r"(?P<gap>(?:[ \t]|\\\r?\n)+|(?<![^\s;])#[^\n]*)|(?P<end>\r?\n|;(?![;&])|&&)|"
    r"(?P<redirect>(?<![^\s;&])>>?(?![&|>]))|"
    r"(?P<here>(?<![^\s;&])<<(?P<tabs>-?)[ \t]*(?P<raw>['\"]?)(?P<tag>\w+)(?P=raw))|"
    r"(?P<word>(?:'[^']*'|\"(?:[^\"\\$`]|\\.)*\"|\\[^\r\n]|\{[\w./,@+-]*,[\w./,@+-]*\}|"
    r"[^\s$`&;|<>(){}*?\[\]~!#\"'\\]+|(?<=[^\s;&])[#~])+)", re.DOTALL)
SHELL_PART = Pattern(
    r"'(?P<single>[^']*)'|\"(?P<double>(?:[^\"\\]|\\.)*)\"|\\(?P<escaped>.)|\{(?P<brace>[^}]*)\}|"
    r"(?P<plain>[^'\"\\{]+)", re.DOTALL)
DOUBLE_ESCAPE = Pattern(r"\\([\\\"$`]|\n)")
LEADING_TABS = Pattern(r"^\t+", re.MULTILINE)
SUBSTITUTION = Pattern(r"[$`\\]")
ECHO_FLAGS = Pattern(r"-[neE]+")
PRINTF_FORMAT = Pattern(r"(?:%[s%]|\\[nt\\\"']|[^%\\])*")
PRINTF_ESCAPE = Pattern(r"\\(.)")
PRINTF_SIGNS = {"n": "\n", "t": "\t"}
MAX_SCRIPT_WORDS = 200
SHELL_INFO = ("bash", "sh", "shell", "zsh", "console", "terminal")


class ScriptLine(NamedTuple):
    """One command of a script: its words, its redirect and its here-document."""
    words: Tuple[str, ...] = ()
    mode: str = ""
    target: Optional[str] = None
    here: Optional[str] = None


def _script_lines(text: str) -> List[ScriptLine]:
    """Return the commands of a script, as bash would read them; [] when it is no plain one."""
    text += "\n"
    lines: List[ScriptLine] = []
    line, position = ScriptLine(), 0
    while position < len(text):
        match = SHELL_TOKEN.match(text, position)
        if match is None or max(len(line.words), len(lines)) > MAX_SCRIPT_WORDS:
            return []
        position, kind = match.end(), match.lastgroup
        lacks_target = line.mode and line.target is None
        if kind == "end" and line != ScriptLine():
            if lacks_target or not line.words:
                return []
            lines.append(line)
            line = ScriptLine()
        elif kind == "redirect":
            if line.mode:
                return []
            line = line._replace(mode=match.group())
        elif kind == "here":
            document, text = _here_document(text, match)
            if document is None or line.here is not None:
                return []
            line = line._replace(here=document)
        elif kind == "word":
            words = _shell_words(match.group())
            if lacks_target and len(words) > 1:
                return []
            line = (line._replace(target=words[0]) if lacks_target
                    else line._replace(words=(*line.words, *words)))
    return lines


def _here_document(text: str, opening: re.Match[str]) -> Tuple[Optional[str], str]:
    """Return the lines up to a here-document's tag, and the text without them."""
    start = text.find("\n", opening.end()) + 1
    tabs = "\t*" if opening["tabs"] else ""
    end = Pattern(rf"^{tabs}{opening.group('tag')}\r?\n", re.MULTILINE).search(text, start)
    document = text[start:end.start()] if end else ""
    document = LEADING_TABS.sub("", document) if tabs else document
    if end is None or (not opening["raw"] and SUBSTITUTION.search(document)):
        return None, text
    return document, text[:start] + text[end.end():]


def _shell_words(token: str) -> List[str]:
    """Return the words that one token stands for: brace lists of plain names are expanded."""
    words = [""]
    for part in SHELL_PART.finditer(token):
        text = part.group(part.lastgroup or 0)
        choices = text.split(",") if part.lastgroup == "brace" else [text]
        if part.lastgroup == "double":
            choices = [DOUBLE_ESCAPE.sub(lambda escape: escape[1].strip("\n"), text)]
        words = [word + choice for word in words for choice in choices][:MAX_SCRIPT_WORDS + 1]
    return words


def _printed(line: ScriptLine) -> Optional[str]:
    """Return what echo, printf or cat prints; None when in doubt."""
    name, *words = line.words
    if name == "cat":
        return line.here if line.mode and words in ([], ["-"]) else None
    if line.here is not None or name == "printf":
        return _formatted(words) if line.here is None else None
    newline = "" if words[:1] == ["-n"] else "\n"
    words = words if newline else words[1:]
    doubt = "\\" in " ".join(words) or ECHO_FLAGS.fullmatch("".join(words[:1]))
    return None if doubt else " ".join(words) + newline


def _formatted(words: Sequence[str]) -> Optional[str]:
    """Return what printf prints: the format is used again while values are left."""
    marked = len(words) > 1 and words[0] == "--"
    first, *values = words[marked:] or ["-"]
    if not PRINTF_FORMAT.fullmatch(first) or (first.startswith("-") and not marked):
        return None
    form = PRINTF_ESCAPE.sub(lambda sign: PRINTF_SIGNS.get(sign[1], sign[1]), first)
    size = form.replace("%%", "").count("%s")
    if not size:
        return form % ()
    values += [""] * (-len(values) % size if values else size)
    return "".join(form % tuple(values[at:at + size]) for at in range(0, len(values), size))


# What a command makes of each name, and the flags that change nothing about it.
SCAFFOLDS: Dict[str, Tuple[str, Tuple[str, ...]]] = {
    "mkdir": ("mkdir", ("-p", "-v", "-pv", "--parents")), "touch": ("create", ()),
    "cp": ("copy", ("-n", "-v", "-i")), "mv": ("rename", ("-n", "-v", "-i"))}


def _step(line: ScriptLine) -> Optional[Ops]:
    """Return the operations of one command; None when it is no scaffold."""
    name, *words = line.words
    if name in ("echo", "printf", "cat"):
        text, kind = _printed(line), "append" if line.mode == ">>" else "write"
        if text is None:
            return None
        return (FileOp(kind, line.target or "", text),) if line.mode else ()
    if name == "tee":
        kind = "append" if words[:1] == ["-a"] else "write"
        files = words[kind == "append":]
        quiet = len(files) == 1 and line.target in (None, "/dev/null")
        return (FileOp(kind, files[0], line.here),) if quiet and line.here is not None else None
    kind, flags = SCAFFOLDS.get(name, ("", ()))
    names = [word for word in words if word not in flags]
    if not kind or not names or line.mode or line.here is not None:
        return None
    if kind in ("mkdir", "create"):
        return tuple(FileOp(kind, path) for path in names)
    return (FileOp(kind, names[0], other=names[1]),) if len(names) == 2 else None


def _fold(ops: List[FileOp], op: FileOp, overwrite: bool) -> None:
    """Add an operation; what a script writes in several steps becomes one."""
    earlier = [index for index, other in enumerate(ops)
               if other.path == op.path and other.kind in ("create", "write")]
    if op.kind in ("copy", "rename") and FileOp("mkdir", op.other) in ops:
        ops.append(op._replace(other=_joined(op.other, op.path)))
    elif earlier and op.kind in ("write", "append"):
        old = ops[earlier[-1]]
        ops[earlier[-1]] = old._replace(text=(old.text if op.kind == "append" else "") + op.text)
    elif op.kind == "write" and not overwrite:
        ops.append(op._replace(kind="create"))
    elif op not in ops and not (earlier and op.kind == "create"):
        ops.append(op)


def _scaffold_ops(script: str, scope: Scope, overwrite: bool) -> Ops:
    """Return what a scaffold script does as file operations; () when it is no scaffold."""
    ops: List[FileOp] = []
    for line in _script_lines(script):
        made = _step(line)
        if made is None:
            return ()
        for op in made:
            path, other = _safe_path(op.path, scope), _safe_path(op.other, scope)
            if not path or op.path.startswith("-") or (op.other and not other):
                return ()
            other = _joined(other, path) if op.other.endswith("/") else other
            _fold(ops, op._replace(path=path, other=other), overwrite)
    return tuple(ops)


# Commands that only look, and the arguments, cut short as GNU lets them be, that would do more.
READ_ONLY: Dict[str, str] = {
    **dict.fromkeys(word_set("ls pwd cat head grep egrep fgrep du df stat which uname cmp nl "
                             "basename dirname realpath"), ""),
    **dict.fromkeys(("sha256sum", "md5sum"), r"-\w*c.*|--c.*"),
    "tail": r"-\w*[fF].*|--[frp].*", "wc": r"--f.*", "rg": r"--(?:pre|hostname).*",
    "find": r"-(?:delete|exec\w*|ok\w*|fprint\w*|fls)", "tree": r"-\w*[oR].*|--o.*",
    "file": r"-\w*[CmMf].*|--(?:c|ma|f).*", "date": r"[^+].*", "whoami": r".+", "diff": r"--to.*",
    "sort": r"-\w*[oTS].*|--(?:o|co|t|fil).*", "git": r"--(?:ou|ext|textc|op|exec).*|-[oO].*|-c"}
GIT_LOOKS = Pattern(r"(?:status|log|diff|show|blame|ls-files|shortlog|describe|rev-parse)(?: .*)?|"
    r"branch(?: (?:-[avr]{1,3}|--list|--show-current|--all))*|remote(?: -v)?|tag(?: -l)?|"
    r"stash list", re.DOTALL)
VERSION_QUESTION = Pattern(r"(?:python3?|node|npm|git|ruby|go|java|gcc|cargo|rustc|pip3?) "
                           r"(?:--version|-V|version)")


def _read_only(script: str, typed: bool = False) -> Tuple[str, ...]:
    """Return the words of one plain command that only reads; () for any other."""
    lines = _script_lines(script.strip())
    if len(lines) != 1 or lines[0].mode or lines[0].here is not None:
        return ()
    name, *words = lines[0].words
    refused = READ_ONLY.get(name)
    if VERSION_QUESTION.fullmatch(" ".join(lines[0].words)):
        return lines[0].words
    if refused is None or (name == "git" and not GIT_LOOKS.fullmatch(" ".join(words))):
        return ()
    for word in words:
        plain = word[word.find("=") + 1:] if word.startswith("--") else word
        if (re.fullmatch(refused, word) or plain.startswith(("/", "~"))
                or UNSAFE_PATH.search(plain) or (typed and PROSE_ARGUMENT.fullmatch(word))):
            return ()
    return lines[0].words


# ------------------------------ asked for ------------------------------
# Words of courtesy before a request; each alternative is taken off as often as it comes.
LEAD = Shape(r"""\s*((please|pls|plz|kindly|hi|hey|hello|hi there|hey there|ok|okay|alright|great|
    good (morning|afternoon|evening|day)|thanks|thank you|perfect|good|cool|nice|now|next|then|so|
    also|and|well|first|finally|just|quickly|simply|claude|qwen|assistant|yes|yeah|sure|right|
    awesome)(\s*[,.!:;-]+\s*|\s+)|(would|do) you mind\s+|(can|could|would|will) (you|u)(\s*,)?\s+
    ((please|kindly|just|now|also|quickly|maybe|possibly),?\s+)*|(would you )?be so kind (as )?
    to\s+|i('d| would) (like|love) (for )?(you )?to\s+|i('d| would) appreciate it if you (could|
    would)\s+|i (want|need) (you )?to\s+|we need to\s+|you should\s+|go ahead and\s+|let's\s+|
    let us\s+|help me( to)?\s+|your (task|job) is to\s+|(the )?task:\s*|(i have a |(i have a )?
    (small|quick|simple) )(task|request|favou?r|one)( for you)?[.:,!]\s+|using {tools},\s+|
    use {tools} (and|to)\s+|could i ask you to\s+|(let me|(can|could|may) i)\s+(?=(see|view|look at|
    have a look)\b))""")
# A fence and then what to do with it; the rules want the text last.
SHOWN_FIRST = Shape(r"""(?P<fence>[\uf000-\uf8ff])\s+(?P<order>[^\uf000-\uf8ff]*\b(this|above|
    that)\b[^\uf000-\uf8ff]*)""")
ASKED_WITH_FENCE = Pattern("\\?(\\s+[\uf000-\uf8ff])\\Z")
NEEDED = Shape(r"""(i|we)('d like| would like| need| want)( to have)?\s+(?=an?\s+(new\s+|
    empty\s+)*(\w+\s+)?(file|folder|directory)\b)""")
POLITE_QUESTION = Shape(r"\s*(\w+[,!.]?\s+){0,4}?(can|could|would|will|do) you\b|.*\bmind\b")
# What may follow a request without changing it.
TRAILER = Shape(r"""(^|(?<=[^\s,.;!?]))([,.;!?]\s*|\s+|\s*[-\u2013\u2014]\s*)(and )?(please|pls|plz|
    cheers|thx|ty|(thanks|thank you)( (a lot|(so|very) much|in advance))?|(that's|that is) (it|all)|
    nothing (else|more)|for me|(right )?now|right away|asap|immediately|if you (can|could|please|
    don't mind|would)|when you (can|get a chance|have time)|would you|will you|ok|okay|(please )?
    (do not|don't) (change|modify|touch|edit|add|do|write|include|alter|create|say) (anything|
    any (other|more) \w+|the rest|other files)( else| more)?|(make )?no other changes|(leave|
    keep) (everything|the rest|all)( else)? (unchanged|as (it )?is|alone|untouched|the same)|
    (then )?let me know|(then )?(let me know|tell me|say so)( (when|once|that|if))?( (it's|it is|
    you're|you are|that's))?( (done|finished|ready|it worked|complete))|us(e|ing) {tools}|\(?
    (without|with no|no) (a |any )?(trailing |final |ending )?(newline|line break)\)?|exactly (as|
    like) (is|written|shown|that)|verbatim|i'll do the rest|(no|without) (any )?explanations?
    ( needed| necessary)?|don't (explain|ask)( it| me)?( anything)?|just do it|do it now|only that|
    it's urgent|(here|from this (folder|directory)|in (the|this|my|our) ((current|working|project|
    root) )?(folder|directory|project|repo|dir|root))(?!\s*\?))\s*[.!?]*\Z""")
FINAL_NEWLINE = Shape(r""",? (with|followed by|and|ending (with|in)|plus) an? (trailing |
    final |single )?(newline|line break)( at the end| character)?(?=\Z| (to|in|into|at) )""")
ENDING = Pattern(r"(?:(?<![\s/.])\.{1,3}[!?]{0,9}|(?<![!?])[!?]{1,9}\.{0,3}|\u2026|[:;])\Z")
MAX_TRAILER_CHARS = 120
# As the user's first word this tells what was done: an order only after "would you mind".
REPORTED = Shape(r"(\w+(ed|ing)|(over)?(wrote|written)|made|shown|ran)\b")
# Forms of the rules' verbs, each after its verb, and orders with a letter missing or two exchanged.
VERB_FORMS = ("write wrote written", "make made", "show shown", "copy copied", "run ran",
              "overwrite overwrote overwritten", "view examine examining check checking")
MISSPELT = {verb[:at] + end: verb for verb in word_set(
    "append create delete insert overwrite remove rename replace") for at in range(1, len(verb))
    for end in (verb[at + 1:], verb[at:at + 2][::-1] + verb[at + 2:])}
IRREGULAR = {**MISSPELT, "new": "create new", "whats": "what's", "mkdir": "create folder",
             **{form: row.split()[0] for row in VERB_FORMS for form in row.split()}}
INFLECTION = Pattern(r"(?:e?d|ing)\Z")
# A statement of why, before or after a request: "The port is wrong. Please change ...".
# It must name a fault or a need, and be no order, question, condition or quoted speech.
REASON_BEFORE = Shape(r"""\s*(?P<why>((the|our|my|we|i|it|this|these|those|they|there|typo)\b|
    ([\w']+ ){1,3}(is|are|has|needs?)\b)([^.!?;:\n\uf000-\uf8ff]|\.(?=\w)){0,100}?
    (\b({useless}|wrong|broken|missing|mistakes?|incorrect|confused|new|now|lacks?|
    needs? (an?|the|some)|forgot|moved|changed|renamed|matters?|fails?)\b|(?<=typo))
    ([^.!?;:\n\uf000-\uf8ff]|\.(?=\w)){0,60})([.!;]\s+(?=\w)|,?\s+so,?\s+(?=please\b|can you\b|
    could you\b)|,\s+(?=please\b)|((?<=typo)|(?<=wrong)|(?<=mistake)):\s+)""")
REASON_AFTER = Shape(r"""([.!;]\s+|,?\s+(?=because\b|since\b|as (it|we|i|they|that)\b)|,\s+
    (?=(it|it's|we|i|nobody)\b))(?P<why>(because |since |as )?(it|it's|they|they're|we|i|nobody|
    the name)\b[^.!?;:\n\uf000-\uf8ff]{0,60}\b{useless})[.!]*\s*\Z""")
NO_REASON = Shape(r"""\b(sa(y|ys|id)|t(ell|ells|old)|ask\w*|writ\w+|wrote|reads?|request\w*|
    suggest\w*|quot\w+|instruct\w*|recommend\w*|prompts?|messages?|logs?|outputs?|results?|e?mails?|
    exercise|homework|quiz|plan\w*|rules?|tickets?|tutorial|article|page|book|lesson|game|joke|
    kidding|examples?|would|could|should|must|might|maybe|perhaps|pretend\w*|imagin\w+|suppos\w+|
    wonder\w*|guess|think|thoughts?|ideas?|opinion|(un)?sure|ways?|options?|tasks?|if|when|
    whenever|unless|once|until|before|after|later|first|second|third|last|only|each|every|both|
    except|lines?|how|why|what|which|where|who|never|nothing|not (want|to)|don't (want|do|let|
    touch)|careful|backup|tested|here('s| is| are)|below|above|i (was|will|did)|i'll|you|he|she|
    myself|already|allowed|please|(then|and|to|let me) ({verbs}|run))\b""")


def _base_form(text: str) -> str:
    """Return a text with its first word, a verb, as in an order: "renamed a" is "rename a"."""
    match = WORD.match(text)
    word = match.group().lower() if match else ""
    stem = INFLECTION.sub("", word)
    forms = (word, stem, stem + "e", stem[:-1]) if 2 < len(stem) < len(word) else ()
    base = next((form for form in forms if _rows_from(RULES, form)), word)
    return IRREGULAR.get(word, base) + text[len(word):]


def _without_reason(text: str) -> str:
    """Return a request without the statements of why around it; "" if it has none."""
    core = text.strip()
    if len(core) > 4 * MAX_REQUEST_CHARS:
        return ""
    before = REASON_BEFORE.match(core)
    core = core[before.end():] if before and _is_reason(before["why"]) else core
    kept = _without_trailers(core)
    after = REASON_AFTER.search(kept, max(0, len(kept) - 2 * MAX_TRAILER_CHARS))
    if after is not None and after.start() and _is_reason(after["why"]):
        core = kept[:after.start()] + "."
    return core if core != text.strip() else ""


def _is_reason(statement: str) -> bool:
    core = _freed(statement).core
    return not (ORDERS.match(core) or WANTS_ANSWER.match(core) or NO_REASON.search(statement))


@lru_cache(maxsize=2)  # as _mask
def _without_trailers(core: str) -> str:
    """Take off what follows a request without changing it."""
    for _ in range(6):
        match = TRAILER.search(core, max(0, len(core) - MAX_TRAILER_CHARS))
        if match is None or match.start() == 0:
            break
        core = core[:match.start()]
    return core


@lru_cache(maxsize=2)  # as _mask
def _freed(text: str) -> Asked:
    """Take courtesy and end marks off a masked request."""
    whole = text.strip()
    core = _without_trailers(whole)
    cut, end = core != whole, ENDING.search(core)
    ending = end.group() if end else ""
    core = core[:len(core) - len(ending)].rstrip()
    ending = "" if ending == "." or (ending == "?" and POLITE_QUESTION.match(core)) else ending
    for _ in range(8):
        core = core[lead.end():] if (lead := LEAD.match(core)) else core
    core = ASKED_WITH_FENCE.sub(r":\1", core)
    core = SHOWN_FIRST.sub(r"\g<order>: \g<fence>", core) if SHOWN_FIRST.fullmatch(core) else core
    core = "create " + core[needed.end():] if (needed := NEEDED.match(core)) else core
    newline = FINAL_NEWLINE.search(core, max(0, len(core) - MAX_TRAILER_CHARS))
    core = (core[:newline.start()] + core[newline.end():] if newline else core).strip()
    core = core if REPORTED.match(core) and not POLITE_QUESTION.match(whole) else _base_form(core)
    return Asked(core, ending, newline is not None, cut or newline is not None)


def _matched(rules: str, masked: Masked, asked: Asked, scope: Scope) -> Tuple[str, Ops]:
    """Return the kind of the first rule that reads the whole text, and its operations."""
    if len(asked.core) > MAX_REQUEST_CHARS or LONG_GAP.search(asked.core):
        return "", ()
    core = _ordered(asked.core)
    first = WORD.match(core)
    for kind, shape in _rows_from(rules, first.group().lower()) if first else ():
        match = _shape(shape).fullmatch(core)
        if match is not None:
            found = Reading(match, masked, scope, asked)
            ops = BUILDERS[kind](found, kind)
            doubt = asked.ending.startswith("?") and not found.group("bare")
            if ops and (not doubt or _only_looks(ops)):
                return kind, ops
    return "", ()


def _asked_for(words: str, answer: Masked, scope: Scope) -> Optional[Rescue]:
    """Find what the user's words ask for by themselves."""
    for masked in _readings(words):
        whole = slashed(masked.text, scope.cwd)
        for source, rules, text in (
                ("asked:", RULES, whole), ("asked:", RULES, _without_reason(whole)),
                ("question:", QUESTIONS, whole)):
            kind, ops = _matched(rules, masked, _freed(text), scope)
            if ops and not (kind == "named" and answer.fences) and (
                    rules is RULES or SAYS_IT_LOOKS.search(answer.text, 0, MAX_LOOK_CHARS)):
                return Rescue(source + kind, ops)
    return None


# ------------------------------ described ------------------------------
# A longer answer to a request that changes nothing is an answer: 200,000 take 60 to 140 ms.
MAX_LOOK_ANSWER_CHARS = 32_000
MAX_LOOK_CHARS = 4_000  # of an answer in which the model may announce that it looks
MAX_SENTENCES = 40  # of one answer that are read; more are no plan but prose
MAX_WISH_CHARS = 20_000  # of a request in which its wishes are looked for
SAYS_IT_LOOKS = Shape(r"""\b({will})\b[^.!?\n]{0,60}?\b(look|check|read|see|open|view|inspect|
    examine|list|find out|show|display|review|scan|explore|use|run|access|retrieve|get|fetch)\b|
    \b(checking|reading|looking|opening|listing|inspecting)\b[^.!?\n]{0,40}?(\bnow\b|\.\.\.|
    \u2026)|^\s*(checking|reading|looking|opening|listing)\b""")
# The model refused, found nothing to do, or waits for an answer.
DECLINED = Shape(r"""\bI('m| am) (sorry,? but|unable|not \w+|afraid)\b|\bI (\w+n't|cannot|\w+ not|
    must decline|refuse|decline|need more|need to know|would need|need you to|(\w+ ){0,2}(recommend|
    advise|suggest)( you)? (against|not))\b|\bnot something I\b|\byou('ll| will)? (need|
    have) to [^.!?\n]{1,40}\b(yourself|manually)\b|\b(sorry, but|unfortunately|as an AI|
    not possible|isn't possible|impossible|unable to|no access)\b|\bplease (provide|specify|confirm|
    clarify|tell me|let me know (which|what|whether|if|how)|share|paste|upload|choose|select|
    be more specific|note that I (can't|cannot))\b|\blet me know (which|whether|what (you|to|
    content|name)|how you|if you('d| would)? (like|want) (me )?to (proceed|continue|go ahead|do|
    make|create|apply|delete|overwrite))|\bbefore I (proceed|do|continue|can|make|delete)\b|\b(once|
    if) you (confirm|approve|agree|provide|tell)|\balready (exists?|contains?|has|been|there|
    in place|present|gone)\b|\bnothing to (do|change|add|delete|remove|rename|move|replace)\b|
    \bno changes? ((is|are|was|were) )?(needed|required|necessary)\b|\b(is|are|would be) (risky|
    dangerous|irreversible)\b|\bes tut mir leid\b|\bich (kann|darf|werde)[^.!?\n]{0,60}\b(nicht|
    keine?n?)\b|\b(lo siento|no puedo|désolée?|je ne (peux|suis))\b|抱歉|对不起|无法|不能|不会""")
QUESTION = Pattern(r"(?:\A|(?<=[.!?\n]))[^.!?\n\uff1f]*[?\uff1f](?!\w)")
COURTESY = Shape(r"""anything else|something else|(need|want) (any )?(further|more)|
    help (you )?with|\balso\b|\bas well\b|\bexplain\b|any (other |more )?(questions|changes|
    adjustments)|add more|how can I (help|assist)""")
ORDERS = Shape(r"({verbs}|run|execute|open|send|ls|cat|mkdir|rm|mv|cp)\b")
WANTS_CHANGE = Shape(r"""(\A|[.!?;:,\n][^\S\n]*|\b(and|then|please|to|you|also|just|now|let's|
    us)\s+)({verbs})\b|\b((must|should|ha(s|ve) to|needs? to) (be|go|say|read|use|contain)|(needs?|
    lacks?) (an?|the)|missing)\b|\b(i|we)('d like| would like| want| need)\b(?! (some )?(help|to |
    advice|an? (explanation|overview|review|opinion|idea)|your|information|you to (explain|tell|
    review|describe)))""")
WANTS_ANSWER = Shape(r"""(how|what|why|when|where|who|which|whose|is|are|was|were|does|do|did|
    should|can i|may i|could i|would it|explain|describe|tell me|review|compare|suggest|recommend|
    discuss|show me (how|an? (example|sample|snippet))|give me (an? (example|sample|snippet|
    tutorial|command|overview)|some|advice|the command)|teach|walk me|think|estimate|convince|
    remind\w*|consider|outline|brainstorm|propose|plan|any|i wonder|i('m| am) wondering|(help me )?
    understand|know|learn|clarify|elaborate|interpret|demonstrate|illustrate|define|answer|i (want|
    need|would like|'d like) (help|to (know|understand|see|learn))|summari[sz]e|imagine|suppose|
    analy[sz]e|evaluate|critique|assess|look|read|check|find|print|display|search|count|list|
    show)\b""")
HOW_TO = Shape(r"""\bhow to\b|\b(no|nothing|none)\b.{0,30}\b(should|must|may|ha(s|ve) to)\b|
    \bhow (do|can|could|would|should|does) (i|you|we|one|someone|people)\b|
    \b(best|right|correct|proper) way to\b|\bwhat('s| is) the (command|syntax)\b|
    \b(do not|don't|never|without|not)\s+(\w+\s+){0,2}?(creat\w+|writ\w+|chang\w+|edit\w*|
    modif\w+|touch\w*|run\w*|execut\w+|delet\w+|mak\w+|act|sav\w+|appl\w+|do|anything|files?)\b|
    \bno changes\b|\b(just|only)\s+(look|read|check|review|show|tell|explain|describe|suggest|
    print|give|answer)\b|\b(dry run|hypothetical\w*|suppose|imagine|in theory|what if|
    an example of|tutorial|in the chat|in chat|as text|paste it here|one-?liner|kidding|joking|
    never ?mind|nvm|no,? wait|on second thoughts?|(better|rather|maybe|perhaps) not|not sure (about|
    if|whether)|(no longer|not) needed any ?more|(sa(id|ys?)|told \w+|wrote|writes|suggest(s|ed)|
    ask(s|ed)( \w+)?|recommend(s|ed)|(task|plan|idea|instruction)s? (was|were))( to|:) ({verbs}))\b|
    [.!,;\u2014-] ?((oh|no|wait|ok|actually|sorry)[,!]? ){0,3}(cancel|forget|scratch|strike|ignore|
    keep|leave|skip) (it|that|this)( message)?[.!]?\Z""")
CONDITION = Shape(r"""(\A|[.,;!\n][^\S\n]*|\b(but|and|only)\s+)(if|unless|when|once|in case|
    provided|as soon as|whenever|tomorrow|later)\b|\bif (it|they|there|the file|not|needed|
    necessary|possible|you)\b|\bunless\b|\b(tomorrow|next (week|month)|later( on)?)\Z""")
SHELL_WANTED = Shape(r"""\b(bash|shell|sh|zsh|terminal|install(ation)?|setup|deploy\w*|build)
    \s+(script|commands?)\b|(?<!python\s)(?<!node\s)(?<!js\s)(?<!javascript\s)(?<!ruby\s)
    (?<!perl\s)(?<!php\s)\bscripts?\b|\b(the|a|some|which|what) commands?\b|\bcommands? (to|for|
    that|i)\b|\.(sh|bash)\b""")
# A description of several ways to do it is not one plan.
ALTERNATIVES = Shape(r"""\b(option|alternative|approach|method|variant) (#?[12ab]|one|two)\b|
    \balternatively\b|\bor,? you (can|could)\b|\btwo (ways|options)\b|\beither\b|\n\s*or\b""")
EDITING = Shape(r"""(fix|update|modify|refactor|edit|change|improve|optimi[sz]e|debug|correct|
    extend|add\b.*\b(to|in|into)|document|clean|adjust|convert|translate|simplify|format|remove|
    replace|rename|make(?! an? | me ))\b""")
NEW_FILE = Shape(r"\b(create|new|called|named|generate|scaffold)\b|\ba \S+ file\b")
OVERWRITE = Shape(r"""\b(overwrite|rewrite|regenerate)\b|\breplace the (whole |entire )?
    (contents?|file)\b""")
ABOUT_PROJECT = Shape(r"""\b(we (use|have)|project|repo|repository|code|codebase|files?|folder|
    directory|here|bug|error|tests?|(fail|crash)\w*|(the|this|my|our) (\w+ )?(build|
    function|class|module|app|server|script|program|config\w*|package|version))\b""")
MODEL_SPEAKS = Shape(r"""\s*([-*>]\s+|\d{1,3}[.)]\s+|step \d{1,2}\s*[:.)-]\s*)?(({sure}|
    to [^,.\n]{1,60})[,.!:;]*\s+){0,3}(({will}|I've|I have|I just|I|we'll|we will|I need to)\s+
    ((now|just|also|then|first|next|go ahead and|proceed to|proceed and|successfully|quickly|
    start by|begin by|need to)\s+){0,3}|(?=(\w+(ed|ing)|wrote)\b))""")
SENTENCE_STOP = Pattern(r"(?<=[.!?])\s+|\n+")
FENCE_AFTER_COLON = Pattern("[:.][ \t\r\n]+(?=[\uf000-\uf8ff])")
FENCE_IN_SENTENCE = Pattern("(?<=\\w)[ \t\r\n]+(?=[\uf000-\uf8ff])|"
                            "(?<=[\uf000-\uf8ff])[ \t\r\n]+(?=(?:with|by|to|in)\\b)")
ELIDED = Pattern(
    r"^[ \t]*(?:(?:#|//|/\*+|<!--|--|;|%|\*|\{/\*|\"\"\")?[ \t]*(?:\[|\(|<|\{)?(?:\.{3}|\u2026)|"
    r"(?:#|//|/\*+|<!--|--|;|%|\{/\*)[^\n]{0,120}?(?:\bexisting\b|\brest of\b|\bunchanged\b|"
    r"\bremain(?:s|ing|der)?\b|\bsame as\b|\bas before\b|\bomitted\b|\bother (?:code|imports?|"
    r"functions?|methods?|lines?|content)\b|\byour (?:code|logic|content)\b|\bprevious (?:code|"
    r"content)\b|\bcode here\b|\bgoes here\b|\btruncated\b|\bsnip\b|\.{3}|\u2026)|"
    r"[\[(<](?:existing|rest|remaining|previous|unchanged|insert|your)\b)",
    re.IGNORECASE | re.MULTILINE)
PLACEHOLDER = Shape(r"""(.*/)?(path/to/.*|your[_-].*|my[_-]?file\.\w+|file_?name(\.\w+)?)|.*
    (path/to/|/your[_-]).*""")
LABEL_WORD = Shape(r"""\b({will}|I've|I have|here('s| is| are)|below is|creat\w+|writ\w+|sav\w+|
    wrote|contents?|files?|contains|called|named|next|then|now|finally|following|also|and|
    erstell\w*|schreib\w*|datei|cre[oa]r?|cr[ée]+\w*|archivo|fichier)\b|创建|新建|文件|写入""")
# What shows that a fence is not the whole of the file that its label names.
NO_LABEL = Shape(r"""\b({elsewhere}|run|running|us(age|e|ed|es|ing)|prints?|example|install\w*|
    execut\w+|test it|original|old|current|append\w*|prepend\w*|insert\w*|updat\w+|modif\w+|
    chang\w+|replac\w+|edit\w*|remov\w+|delet\w+|fix\w*|function|method|relevant|diff|imports?|see|
    add [^:]{0,60}\b(to|in)|adding|added|structure|verify|check|instead|how|why|similar|when|
    exist\w*)\b""")
WHOLE_FILE = Pattern(r"\b(?:complete|full|entire|whole)\b", re.IGNORECASE)
FILE_WORD = Pattern(r"^\s*(?:(?:file|filename|file name|path|name)\s*:)", re.IGNORECASE)
MAKES_FILE = Shape(r"""\s*(({sure})[,.!:]*\s+){0,3}(({will}|I've|I have|I'm|I am|I|we'll)\s+)?
    (now\s+|also\s+)?((creat|writ|sav|generat|mak)\w*|made|wrote|start (with|by)|
    here('s| is)|(below|this) is)\b""")
# "a test for app.py" is another file; "the code for app.py" is that one.
FOR_FILE = Pattern(r"(?<!code )(?<!contents )(?<!content )(?<!source )(?<!implementation )"
                   r"(?<!file )(?<!script )\bfor(?: the| your)?\W{0,3}\Z", re.IGNORECASE)
# What a new file will do, "that prints ...", may be said after its name; this may not.
NOT_AFTER = Shape(r"\b({elsewhere}|updated?|when you|(with the following )?changes?)\b")
HEADING = Pattern(r"\s*(?:#{1,6}\s|\*\*|\d{1,3}[.)]\s)")
LABEL_NAMES = Pattern("[\ue000-\uefff]|\\w\\.\\w")
LABEL_DECOR = Pattern(r"^[\s#>*-]*(?:\d{1,3}[.)]\s*)?|[\s*:#=-]+$")
LABEL_PATH = Pattern("[\ue000-\uefff]|[^\\s,;:\"'`<>|*?()\\[\\]{}$&!\\\\\ue000-\uf8ff]+")
COMMENT_PATH = Pattern(r"[ \t]*(?:#|//|--|;|%|/\*|<!--)[ \t]*(?:file(?:name)?:[ \t]*)?"
                       r"([^\s*]+)[ \t]*(?:\*/|-->)?[ \t]*\r?")
INFO_PATH = Pattern(r"(?:[\w+-]+(?:[: ]|[: ]\s*(?:title|file|filename)=))?"
                    r"[\"']?([^\s\"'=:]+)[\"']?")
NAME_IN_WORDS = Pattern("[^\\s,;:\"'`<>|()\u2018-\u201e]+")
RUN_ONLY = Pattern(r"\s*(?:\$ )?(?:python3?|node|npm (?:start|test|run)|cd|ls|tree|cat|bash|go run|"
                   r"cargo run|pytest|flask run) ?[\w./ -]*\s*\Z")
# A described deletion needs an order whose object is the file itself, not what is in it.
DELETES = Shape(r"""(\A|[.!?;,\n] ?|\b(and|then|please|also|just|by|so) )((delet|remov|eras|
    discard|purg|trash|drop)\w*|get(ting)? rid of|rm|clean(ing)? up)( that)?( (?!(in|on|at|of|from|
    to|for|by|with|about|that|which|how|what|using|and)\b)[\w'-]+){0,5}(?= {name})\s+(?P<files>
    {names})(?= ?(\Z|[,.;!\n]|(and|too|as well|please|because|since|file|now)\b))|(?<!\S)
    (?P<late>{names}) ((is|are) {useless}|(is|are|isn't|aren't|should|can|must) [^.!?]{0,60}([.!] )?
    \b(delete|remove|erase|drop|trash|get rid of) (it|them))\b""")
# What shall change is in a file: it is not renamed or written anew.
PLACE = Shape(r"\b(in|inside|within) ((the|my|our|this) )?(file )?{name}|\({name}\)|\.\w+'s\b")
CHOICE = Shape(r"\b(or|one of|either|any of|some of|which(ever)?)\b")  # the file is left open
# A request for one new file, by name, that says only what it shall do.
NEW_NAMED = Shape(r"""(create|write|generate|produce|implement|code|develop|make(?= an? | me ))
    ( me)? ({fill}|([\w-]+ ){1,5}(called|named) )(?P<file>{token})(?=\Z|:|,? (that|which|
    with|for|to|in|it|using|containing|where)\b|\. )""")


class Wishes(NamedTuple):
    """What the newest words allow the model's own description to do."""
    words: str
    core: str
    change: bool
    look: bool
    overwrite: bool


def _wishes(words: str) -> Wishes:
    masked = _mask(words)
    asked = _freed(masked.text if masked else "")
    text = asked.core[:MAX_WISH_CHARS]
    look = bool(text) and HOW_TO.search(text) is None
    last = SENTENCE_STOP.split(text)[-1] if asked.ending[:1] == "?" else text
    answer = WANTS_ANSWER.match(text) or WANTS_ANSWER.match(last) or CONDITION.search(text)
    change = look and not answer and WANTS_CHANGE.search(text) is not None
    anew = OVERWRITE.search(text) is not None and PLACE.search(text) is None
    return Wishes(words, text, change, look, anew)


def _names(words: str, path: str) -> bool:
    """Tell whether the user's words name a path, or its last part alone."""
    if " " in path:
        return path in words
    named = {token.rstrip(".!?") for token in NAME_IN_WORDS.findall(words)}
    return not named.isdisjoint((path, "./" + path, path.rsplit("/", 1)[-1]))


def _named_files(text: str, masked: Masked) -> Dict[str, str]:
    """Return the file names in a text by the tokens that hold them."""
    found = {token: masked.value(token.rstrip(".")) for token in LABEL_PATH.findall(text)}
    return {token: raw for token, raw in found.items() if _is_file_name(raw)}


def _file_text(fence: Fence) -> bool:
    """Tell whether a fence can be a whole file."""
    return (fence.whole and fence.info.lower() not in ("diff", "patch", "output", "log")
            and ELIDED.search(fence.text) is None)


def _is_shell(fence: Fence) -> bool:
    return fence.info.lower() in SHELL_INFO or (
        not fence.info and fence.text.lstrip().startswith(("mkdir ", "cat >", "touch ", "$ ")))


def _label_path(label: str, masked: Masked, scope: Scope) -> str:
    """Return the one path that the line before a fence names as the file that follows."""
    said = SENTENCE_STOP.split(label.replace("**", "")[:300])
    first = next((at for at, part in enumerate(said) if LABEL_NAMES.search(part)), 0)
    line = LABEL_DECOR.sub("", " ".join(said[first:]))
    named = {token: raw for token, raw in _named_files(line, masked).items()
             if not PLACEHOLDER.fullmatch(raw)}
    if len(set(named.values())) != 1:
        return ""
    token, raw = named.popitem()
    before, after = line.split(token, 1)
    rest = FILE_WORD.sub("", before + " " + after)
    makes = MAKES_FILE.match(before) is not None
    heading = not before.strip("`") and (
        (after.strip("*_` ") or ":")[0] in "-:(\u2013\u2014" or len(rest.split()) <= 1)
    announced = label.rstrip("*_ \r").endswith((":", "\uff1a")) and LABEL_WORD.search(rest)
    other = not WHOLE_FILE.search(rest) and (
        NO_LABEL.search(before) or FOR_FILE.search(before)
        or (NOT_AFTER if makes else NO_LABEL).search(after))
    fits = (makes or heading or announced or not rest.strip("*_ ()#:.")) and not other
    return _safe_path(raw, scope) if fits else ""


def _fence_path(fence: Fence, label: str, masked: Masked, scope: Scope) -> str:
    """Return the file that a fence is, by the line before it, its info or its first line."""
    path = _label_path(label, masked, scope)
    first = COMMENT_PATH.fullmatch(fence.text.split("\n", 1)[0])
    for found in (INFO_PATH.fullmatch(fence.info), first):
        if not path and found and _is_file_name(found.group(1)) and not NO_LABEL.search(label):
            path = _safe_path(found.group(1), scope)
    return path


def _shown_files(masked: Masked, wishes: Wishes, scope: Scope) -> Ops:
    """Return a file for each fence that the answer names as one, and what scaffolds do."""
    edits = EDITING.match(wishes.core) and not NEW_FILE.search(wishes.core)
    found: Dict[str, FileOp] = {}
    folders = []
    label = heading = ""
    for line in slashed(masked.text, scope.cwd).split("\n"):
        if not ONE_FENCE.fullmatch(line.strip()):
            label = line if line.strip() else label
            names = LABEL_NAMES.search(line) and (HEADING.match(line) or MAKES_FILE.match(line))
            heading = line if names else heading
            continue
        fence = masked.fence(line.strip())
        plain = not LABEL_NAMES.search(label) and not NO_LABEL.search(label)
        path = _fence_path(fence, label, masked, scope) or (
            _fence_path(fence, heading, masked, scope) if plain else "")
        label = heading = ""
        if _is_shell(fence) and not path.endswith((".sh", ".bash")):
            folders += [op for op in _scaffold_ops(fence.text, scope, False) if op.kind == "mkdir"]
        elif path and (not _file_text(fence) or path in found
                       or (edits and _names(wishes.words, path))):
            return ()
        elif path:
            kind = "write" if wishes.overwrite and _names(wishes.words, path) else "create"
            found[path] = FileOp(kind, path, fence.text)
    return (*folders, *found.values()) if found else ()


def _shown_alone(masked: Masked, wishes: Wishes, scope: Scope) -> Ops:
    """Return the one new file that the user named and the answer shows without a name."""
    asked, wish = _mask(wishes.words), NEW_NAMED.match(wishes.core)
    shown = [fence for fence in masked.fences if not RUN_ONLY.match(fence.text)]
    names = _named_files(wishes.core, asked) if asked and wish and len(shown) == 1 else {}
    path = _safe_path(names.get(wish["file"], ""), scope) if wish and len(names) == 1 else ""
    alike = path and shown[0].info[:1].lower() in ("", path.rpartition(".")[2][:1].lower())
    fits = path and (path.endswith((".sh", ".bash")) if _is_shell(shown[0]) else alike)
    doubt = (not fits or not _file_text(shown[0]) or VERB_AFTER.search(wishes.core)
             or LABEL_NAMES.search(masked.text) or NO_LABEL.search(ONE_FENCE.split(masked.text)[0]))
    return () if doubt else (FileOp("create", path, shown[0].text),)


def _scaffold(masked: Masked, wishes: Wishes, scope: Scope) -> Ops:
    """Return what the answer's shell blocks build; a later block that only runs is left."""
    ops: List[FileOp] = []
    if SHELL_WANTED.search(wishes.core):
        return ()
    for fence in masked.fences:
        if not _is_shell(fence) or not fence.whole:
            return ()
        made = _scaffold_ops(fence.text, scope, wishes.overwrite)
        if not made:
            return tuple(ops) if RUN_ONLY.match(fence.text) else ()
        for op in made:
            _fold(ops, op, wishes.overwrite)
    return tuple(ops)


def _described(masked: Masked, wishes: Wishes, scope: Scope) -> Ops:
    """Return the operations that the model's sentences describe exactly."""
    ops: List[FileOp] = []
    text = FENCE_IN_SENTENCE.sub(" ", FENCE_AFTER_COLON.sub(": ", masked.text.replace("**", "")))
    said = [(lead, sentence) for sentence in SENTENCE_STOP.split(text)
            for lead in (MODEL_SPEAKS.match(sentence),) if lead]
    for lead, sentence in said[:MAX_SENTENCES]:
        if not all(_file_text(masked.fence(mark)) for mark in ONE_FENCE.findall(sentence)):
            return ()
        core = _base_form(ENDING.sub("", sentence[lead.end():]).strip())
        kind, made = _matched(RULES, masked, Asked(core), scope)
        replaces = kind == "write" and not (wishes.overwrite or core.startswith("write"))
        if replaces or kind in ("run", "named") or not all(_allowed(op, wishes) for op in made):
            continue
        for op in made:
            # The model may replace a whole file only where the user said so.
            safe = op if op.kind != "write" or wishes.overwrite else op._replace(kind="create")
            ops += [safe] if safe not in ops else []
    looks = [op for op in ops if op.kind in ("read", "list")]
    return tuple(looks or ops) if ops[:1] == (looks or ops)[:1] else ()


def _deletes(wishes: Wishes, path: str) -> bool:
    """Tell whether the user's order is to delete that file itself."""
    masked = _mask(wishes.words)
    return masked is not None and any(
        _names(masked.value(token), path) for found in DELETES.finditer(wishes.core)
        for token in LABEL_PATH.findall(found["files"] or found["late"]))


def _allowed(op: FileOp, wishes: Wishes) -> bool:
    """Tell whether the user's words ask for such an operation at all."""
    if PLACEHOLDER.fullmatch(op.path) or (op.kind == "rename" and PLACE.search(wishes.core)) or (
            op.kind == "delete" and (CHOICE.search(wishes.words) or not _deletes(wishes, op.path))):
        return False
    looks = wishes.look and op.kind in ("read", "list")
    return wishes.change or (looks and (
        _names(wishes.words, op.path) or ABOUT_PROJECT.search(wishes.words) is not None))


def _looked_at(masked: Masked, wishes: Wishes, scope: Scope) -> Ops:
    """Return a read of the one file that a question names, if the model says it looks."""
    core, asked = wishes.core, _mask(wishes.words)
    if (asked is None or len(core) > MAX_REQUEST_CHARS or not WANTS_ANSWER.match(core)
            or CONDITION.search(core)):
        return ()
    named = set(_named_files(core, asked).values())
    path = _safe_path(named.pop(), scope) if len(named) == 1 else ""
    looks = path and SAYS_IT_LOOKS.search(masked.text, 0, MAX_LOOK_CHARS)
    return (FileOp("read", path),) if looks else ()


def _requested_command(masked: Masked, wishes: Wishes, _scope: Scope) -> Ops:
    """Return the one read-only command in the answer that the user asked to be run."""
    fences = masked.fences
    if len(fences) != 1 or fences[0].info.lower() not in ("", *SHELL_INFO) or not fences[0].whole:
        return ()
    command = _read_only(fences[0].text[2 * fences[0].text.startswith("$ "):])
    named = re.escape(" ".join(command[:2] if command[:1] == ("git",) else command[:1]))
    wanted = named and re.search(rf"\b(?:run|execute|use)\b.{{0,40}}\b{named}\b", wishes.words)
    return (FileOp("run", words=command),) if wanted else ()


# ------------------------------ the whole ------------------------------
def _told(words: str, masked: Masked, scope: Scope) -> Optional[Rescue]:
    """Find what the model described instead of calling a tool."""
    wishes = _wishes(slashed(words, scope.cwd))
    for rule, find, wanted in (
            ("files", _shown_files, wishes.change), ("file", _shown_alone, wishes.change),
            ("scaffold", _scaffold, wishes.change), ("described", _described, wishes.look),
            ("look", _looked_at, wishes.look), ("command", _requested_command, wishes.look)):
        ops = find(masked, wishes, scope) if wanted else ()
        if ops:
            return None if ALTERNATIVES.search(masked.text) else Rescue("told:" + rule, ops)
    return None


def find_rescue(turns: Sequence[Message], answer: str, *, home_ok: bool = True) -> Optional[Rescue]:
    """Return what the newest request still needs, or None when in doubt.

    turns is the conversation without the system prompt, answer the visible text of a turn that
    ended and called no tool; home_ok lets the user's own words name a path below ~/.
    """
    answers = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
    newest = turns[answers[-1] + 1 if answers else 0:]
    words = _request_of(newest)
    if not words or not answer.strip() or (
            len(answer) > MAX_LOOK_ANSWER_CHARS and not _wishes(words).change):
        return None
    masked, notices = _mask(PRIVATE_USE.sub(" ", answer), one_line=True), _notices(turns)
    if masked is None:
        return None
    cwd = working_directory(notices)
    rescue = _asked_for(words, masked, Scope(home_ok, cwd))
    if rescue is None and PRIVATE_USE.search(answer) is None:
        rescue = _told(words, masked, Scope(False, cwd, True))
    if rescue is None:  # nearly every turn; what follows reads the whole answer
        return None
    plans = _announced(notices, PLAN_MODE, "plan mode")
    if (DECLINED.search(masked.text) or (plans and not plans[-1]["off"])
            or any(not COURTESY.search(asked.group()) for asked in QUESTION.finditer(masked.text))):
        return None
    served = not _only_looks(rescue.ops) and _served(turns[:len(turns) - len(newest)], words)
    return None if served else rescue


# ============================== 12. REPLIES ==============================

class Usage(NamedTuple):
    """Token counts of a turn, as the Messages API splits them."""

    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_input_tokens: int = 0
    cache_creation_input_tokens: int = 0


# Thinking is echoed with its signature, which nobody here checks (CC A6).
SIGNATURE = "cXdlbmNvZGU="
TEXT_BLOCK: Json = {"type": "text", "text": ""}
THINKING_BLOCK: Json = {"type": "thinking", "thinking": "", "signature": ""}
# The type and the key of what fills a block.
DELTA_KINDS = {"text": ("text_delta", "text"), "thinking": ("thinking_delta", "thinking"),
               "signature": ("signature_delta", "signature"),
               "tool_use": ("input_json_delta", "partial_json")}


class StreamTranslator:
    """Turn deltas into Messages API events; the only owner of block indexes.

    One method opens a block, one closes it. Errors are told without closing the open
    block: after a completed block the CLI would not ask again (CC B2, F5).
    """

    def __init__(self, message_id: str, model: str, new_id: Callable[[], str]) -> None:
        self._message_id, self._model, self._new_id = message_id, model, new_id
        self._index = -1
        self.open = ""  # kind of the open block
        self.call_ids: List[str] = []

    def start(self, usage: Usage) -> Event:
        return Event("message_start", {"type": "message_start", "message": {
            "id": self._message_id, "type": "message", "role": "assistant", "model": self._model,
            "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage._asdict()}})

    def translate(self, deltas: Iterable[Delta]) -> Events:
        events: Events = []
        for delta in deltas:
            if isinstance(delta, (TextDelta, ThinkingDelta)):
                block = TEXT_BLOCK if isinstance(delta, TextDelta) else THINKING_BLOCK
                if self.open != block["type"]:
                    self._open_block(block, events)
                events.append(self._delta(block["type"], delta.text))
            elif isinstance(delta, CallInput):
                events.append(self._delta("tool_use", delta.json))
            elif isinstance(delta, CallEnd):
                self._close_block(events)
            else:
                self._call(delta, events)
        return events

    def _open_block(self, block: Json, events: Events) -> None:
        self._close_block(events)
        self._index += 1
        self.open = block["type"]
        events.append(Event("content_block_start", {
            "type": "content_block_start", "index": self._index, "content_block": block}))

    def _close_block(self, events: Events) -> None:
        if self.open == "thinking":
            events.append(self._delta("signature", SIGNATURE))
        if self.open:
            events.append(Event("content_block_stop",
                                {"type": "content_block_stop", "index": self._index}))
        self.open = ""

    def _delta(self, block: str, text: str) -> Event:
        kind, key = DELTA_KINDS[block]
        return Event("content_block_delta", {
            "type": "content_block_delta", "index": self._index,
            "delta": {"type": kind, key: text}})

    def _call(self, delta: Union[Call, CallStart], events: Events) -> None:
        self.call_ids.append(self._new_id())
        self._open_block({"type": "tool_use", "id": self.call_ids[-1], "name": delta.name,
                          "input": {}}, events)
        if isinstance(delta, Call):
            events.append(self._delta("tool_use", to_json(delta.input)))
            self._close_block(events)

    def keep_alive(self) -> Event:
        """Make an event that the CLI counts as life: pings do not (CC B3)."""
        return self._delta(self.open, "") if self.open else Event("message_delta", {
            "type": "message_delta", "delta": {}, "usage": {"output_tokens": 0}})

    def finish(self, reason: str, stop_sequence: Optional[str], usage: Usage) -> Events:
        events: Events = []
        self._close_block(events)
        return [*events, Event("message_delta", {
            "type": "message_delta",
            "delta": {"stop_reason": reason, "stop_sequence": stop_sequence},
            "usage": usage._asdict()}), Event("message_stop", {"type": "message_stop"})]


def error_event(error: ShimError) -> Event:
    """Make the event that ends a stream which cannot go on."""
    return Event("error", {
        "type": "error", "error": {"type": error.kind, "message": error.message}})


def fold(events: Iterable[Event]) -> Json:
    """Fold a stream's events into the message of a non-streaming answer.

    A call that the model left unfinished gets the input {}.
    """
    message: Json = {}
    pieces: List[str] = []
    for name, payload in events:
        if name == "message_start":
            message = {**payload["message"], "content": []}
        elif name == "content_block_start":
            message["content"].append({**payload["content_block"]})
            pieces = []
        elif name == "content_block_delta":
            _, (key, text) = payload["delta"].items()
            if key == "signature":
                message["content"][-1][key] = text
            else:
                pieces.append(text)
        elif name == "content_block_stop":
            _fold_block(message["content"][-1], "".join(pieces))
        elif name == "message_delta" and payload["delta"]:
            message.update(payload["delta"])
            message["usage"] = {**message["usage"], **payload["usage"]}
    return message


def _fold_block(block: Json, joined: str) -> None:
    if block["type"] != "tool_use":
        block[block["type"]] = joined
        return
    with contextlib.suppress(ValueError):
        block["input"] = json.loads(joined or "{}")


# ------------------------------ answers without the model ------------------------------


class LocalAnswer(NamedTuple):
    """An answer that needs no model: the rule that gave it, and its text."""

    rule: str
    text: str
    stop_reason: str


TITLE_WORDS, TITLE_CHARS = 7, 50
SESSION_TEXT = Pattern(r"<session>\s*(.*?)\s*(?:</session>|\Z)", re.DOTALL)
SUGGESTION_START = "[SUGGESTION MODE:"
SAFETY_CHECK_START = "You are a security monitor for autonomous AI coding agents"
NO_SAFETY_CHECK = ("Auto mode's safety check is not answered by a local model. Start claude with"
                   " --permission-mode default, acceptEdits or plan.")


def last_user_text(request: Request) -> str:
    """Join the texts of the last message."""
    last = request.messages[-1]
    return "\n".join(block.text for block in last.blocks if isinstance(block, Text))


def is_title_request(request: Request) -> bool:
    """Recognise the CLI's request for a session title (CC A9)."""
    properties = _mapping((request.schema or {}).get("properties"))
    return not request.tools and list(properties) == ["title"] \
        and bool(SESSION_TEXT.search(last_user_text(request)))


def _title(request: Request) -> str:
    found = SESSION_TEXT.search(last_user_text(request))
    words = (found.group(1) if found else "").split()
    title = " ".join(words[:TITLE_WORDS])[:TITLE_CHARS].strip()
    return to_json({"title": title or "Session"})


def _safety(_request: Request) -> str:
    raise ForbiddenError(NO_SAFETY_CHECK)


# One row for each kind of background request that would push the conversation out of
# the model's cache (OL 5b): name, how it is recognised, the answer and how it ends.
LOCAL_RULES: Tuple[
    Tuple[str, Callable[[Request], bool], Callable[[Request], str], str], ...] = (
    ("title", is_title_request, _title, "end_turn"),
    ("probe", lambda request: request.max_tokens == 1, lambda request: ".", "max_tokens"),
    ("suggestion", lambda request: last_user_text(request).startswith(SUGGESTION_START),
     lambda request: "", "end_turn"),
    ("safety", lambda request: any(SAFETY_CHECK_START in text for text in request.system),
     _safety, ""),
)


def local_answer(request: Request, config: Config) -> Optional[LocalAnswer]:
    """Answer a background request here, or None where the model must."""
    for name, fits, answer, stop_reason in LOCAL_RULES:
        if name in config.local_answers and fits(request):
            if name == "title" and config.small_model:
                return None
            return LocalAnswer(name, answer(request), stop_reason)
    return None


def count_request(request: Request) -> int:
    """Estimate a request's input tokens: system, messages, tools and images."""
    texts = [to_json([tool.name, tool.description, tool.schema]) for tool in request.tools]
    blocks = [block for message in request.messages for block in message.blocks]
    return sum(map(estimate_tokens, [*request.system, *texts])) + sum(map(block_tokens, blocks)) \
        + MESSAGE_TOKENS * len(request.messages)


# ============================== 13. TURN ==============================

class StopScanner:
    """Find the first stop sequence in text that comes in pieces.

    feed() returns the text that is certain and the sequence that was met, if any.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._begin = {stop[0] for stop in stops}
        self.held = ""

    def feed(self, text: str) -> Tuple[str, Optional[str]]:
        if not self.held and self._begin.isdisjoint(text):
            return text, None  # nearly every token
        text, stop, rest = split_at(self.held + text, self._stops)
        self.held = "" if stop else rest
        return text, stop or None

    def close(self) -> str:
        held, self.held = self.held, ""
        return held


# Tokens beyond what the shown characters can account for until an answer counts as
# swallowed: a Qwen token holds 1.7 Chinese characters or 4 of code (OL 5a), and small
# differences are white space that Ollama's parsers drop.
LOST_TOKENS = 64
LOST_RATIO = 2.0
CHARS_PER_TOKEN_LEAST = 1.5

NOTHING_SHOWN = ("The model {model} ended its answer without any text or tool call ({tokens}"
                 " tokens were generated). Ask again in other words.")
MAY_BE_DROPPED = (" Ollama's parser may have dropped a malformed tool call; SHIM_VERBATIM=on reads"
                  " the model's own text instead.")
SWALLOWED = ("Ollama dropped the greater part of the answer of {model}: {tokens} tokens were"
             " generated, about {shown} arrived. A malformed tool call does this; SHIM_VERBATIM=on"
             " reads the model's own text instead.")
CUT_BEFORE_ANYTHING = ("The answer of {model} was cut at its length limit before anything could be"
                       " shown: the context window or max_tokens is too small for this"
                       " conversation.")


# In the model's own text its own markup is no rescue: Hermes JSON and Qwen3-Coder XML.
OWN_FORMATS = ("tool_call", "function_xml")


class Turn:
    """One request from Ollama's first byte to the last event.

    The only place that composes decoder, parser, rescue and translator. feed() and
    close() return the events that became certain; afterwards `done` says that the
    stream ended well, `error` that it cannot go on. message_start and keep-alives are
    the caller's, who has the clock. rescue(answer) returns a call and its rule, or None;
    it is asked once, at the end.
    """

    done = False
    error: Optional[ShimError] = None
    finish: Optional[Finish] = None
    stop_reason = ""
    usage = Usage()
    _shown_chars = 0
    _unfinished = False
    _blank = ""

    def __init__(
        self, decoder: ChatDecoder, translator: StreamTranslator, tools: Mapping[str, Tool],
        stops: Sequence[str], usage_of: Callable[[Finish, int], Usage],
        *, rescue: Callable[[str], Optional[Call]], text_calls: bool = True,
    ) -> None:
        self._decoder, self._translator, self._tools = decoder, translator, tools
        self._usage_of, self._rescue = usage_of, rescue
        self._parser = ToolTextParser(tools, stream_inputs=decoder.verbatim, enabled=text_calls)
        self._ends = CHATML_ENDS if decoder.verbatim else ()
        self.scanner = StopScanner([*stops, *self._ends])
        self._text: List[str] = []
        self._events: Events = []
        self.calls: List[Tuple[str, str]] = []
        self.model = decoder.model

    @property
    def heard(self) -> bool:
        """Say whether Ollama has begun to answer."""
        return self._decoder.lines > 0 or self.error is not None

    @property
    def answer(self) -> str:
        return "".join(self._text)

    @property
    def raw(self) -> Optional[str]:
        """The model's own text up to its end, where the dialect brings it."""
        return str(CHATML_END.split(self._decoder.raw, 1)[0]) if self._decoder.verbatim else None

    def feed(self, data: bytes) -> Events:
        return self._take(self._decoder.feed(data))

    def close(self) -> Events:
        """The upstream's stream ended."""
        return self._take(self._decoder.close())

    def _take(self, parts: Parts) -> Events:
        for part in parts:
            if self.done or self.error:
                break
            if isinstance(part, TextDelta):
                text, stop = self.scanner.feed(part.text)
                self._show(self._parser.feed(text))
                if stop is not None:
                    self._end(Finish("stop"), None if stop in self._ends else stop)
            elif isinstance(part, ThinkingDelta):
                self._show(self._parser.thought(part.text))
            elif isinstance(part, Finish):
                self._end(part, None)
            elif isinstance(part, Failure):
                self._release("error")
                self.error = part.error
            elif resolve_tool(part.name, self._tools):
                self._show(self._parser.native(part.name, part.arguments))
            else:  # Ollama's parsers do not look whether a tool is offered (OL 8)
                self._show(self._parser.feed(call_markup(part.name, part.arguments)))
        events, self._events = self._events, []
        return events

    def _release(self, reason: str) -> None:
        """Show what was held back: nothing follows."""
        self._show(self._parser.feed(self.scanner.close()))
        self._show(self._parser.close(reason))

    def _show(self, deltas: List[Delta]) -> None:
        """Pass deltas on; white space that would open a block of its own waits."""
        if len(deltas) == 1 and self._translator.open == "text" and type(deltas[0]) is TextDelta:
            self._text.append(deltas[0].text)  # nearly every token
            self._shown_chars += len(deltas[0].text)
            self._events += self._translator.translate(deltas)
            return
        kept: List[Delta] = []
        in_text = self._translator.open == "text"
        for delta in deltas:
            if isinstance(delta, TextDelta):
                text = self._blank + delta.text
                self._blank = "" if in_text or text.strip() else text
                if not self._blank:
                    self._text.append(text)
                    self._shown_chars += len(text)
                    kept.append(TextDelta(text))
                    in_text = True
                continue
            self._blank, in_text = "", False
            self._note(delta)
            kept.append(delta)
        self._events.extend(self._translator.translate(kept))

    def _note(self, delta: Delta) -> None:
        if isinstance(delta, (Call, CallStart)):
            own = self._decoder.verbatim and delta.rule in OWN_FORMATS
            self.calls.append((delta.name, "" if own else delta.rule))
        if isinstance(delta, Call):
            self._shown_chars += len(to_json(delta.input)) + len(delta.name)
        elif isinstance(delta, CallInput):
            self._shown_chars += len(delta.json)
        elif isinstance(delta, CallEnd):
            self._unfinished = not delta.finished
        elif isinstance(delta, ThinkingDelta):
            self._shown_chars += len(delta.text)

    def _end(self, finish: Finish, stop: Optional[str]) -> None:
        """The model is done: release what is held, rescue, and close the message."""
        self._release(finish.reason)
        self.finish = finish
        cut = finish.reason == "length"
        self.error = self._loss(finish) if stop is None else None
        if self.error:
            return
        if self._text and not self.calls and stop is None and not cut:
            call = self._rescue(self.answer)
            self._show([call] if call else [])
        self.stop_reason = "tool_use" if self.calls else "end_turn"
        if stop is not None:
            self.stop_reason = "stop_sequence"
        elif cut and (self._unfinished or not self.calls):
            self.stop_reason = "max_tokens"
        output = finish.output_tokens
        self.usage = self._usage_of(
            finish, max(1, self._shown_chars // 4) if output is None else output)
        self._events.extend(self._translator.finish(self.stop_reason, stop, self.usage))
        self.done = True

    def _loss(self, finish: Finish) -> Optional[ShimError]:
        """Tell an answer of which nothing or little arrived: never an empty success."""
        tokens, shown = finish.output_tokens or 0, self._shown_chars
        if not shown and not self.calls:
            words = CUT_BEFORE_ANYTHING if finish.reason == "length" else \
                NOTHING_SHOWN if self._decoder.verbatim else NOTHING_SHOWN + MAY_BE_DROPPED
        elif not self._decoder.verbatim and \
                tokens > LOST_TOKENS + LOST_RATIO * shown / CHARS_PER_TOKEN_LEAST:
            words = SWALLOWED
        else:
            return None
        return UpstreamLostError(words.format(model=self.model, tokens=tokens, shown=shown // 4))


# ============================== 14. STATUS ==============================


class TurnRecord(NamedTuple):
    """What one request became; holds no prompt and no answer text.

    started is epoch seconds, *_s are seconds, tokens are counts; window 0 means
    unknown. way is chat, verbatim, joined (another's answer) or local (without the
    model). rescue names the rule that made the call, rescue_outcome what came of it.
    outcome is "ok", "client left" or a kind of error; notes are sentences such as what
    broke the prefix; left_out names tools and passages that the model was not shown.
    """

    session: str = ""
    turn: int = 0
    model: str = ""
    started: float = 0.0
    first_s: Optional[float] = None
    total_s: float = 0.0
    prompt_tokens: int = 0
    new_tokens: Optional[int] = None
    cached_tokens: int = 0
    output_tokens: int = 0
    prefill_s: float = 0.0
    tokens_per_s: float = 0.0
    window: int = 0
    tools: Tuple[str, ...] = ()
    way: str = "chat"
    rescue: str = ""
    rescue_outcome: str = ""
    outcome: str = "ok"
    error: str = ""
    cure: str = ""
    notes: Tuple[str, ...] = ()
    left_out: Tuple[str, ...] = ()

    @property
    def used(self) -> int:
        """Count what the next turn starts from: the prompt and its answer."""
        return self.prompt_tokens + self.output_tokens

    @property
    def left(self) -> int:
        """Count what is left of a known window."""
        return max(0, self.window - self.used)

    @property
    def ended(self) -> float:
        return self.started + self.total_s


CLIENT_LEFT = "client left"
# Kinds that are Ollama's failures, not the client's or our own.
UPSTREAM_KINDS = Pattern(r"upstream_|model_missing|rate_limit")
CAPITAL = Pattern(r"(?<=[a-z])(?=[A-Z])")


def outcome_of(error: ShimError) -> str:
    """Name an error's kind: UpstreamTimeoutError is upstream_timeout."""
    return CAPITAL.sub("_", type(error).__name__.replace("Error", "")).lower()


class Running:
    """A request at work: its state is waiting, prefill or writing."""

    def __init__(self, session: str, model: str, state: str, now: float) -> None:
        self.session, self.model, self.state = session, model, state
        self.since = self.state_since = now
        self.tokens = 0  # written so far

    def enter(self, state: str, now: float) -> None:
        self.state, self.state_since = state, now

    def fields(self, now: float) -> Json:
        """Describe it for the status."""
        state_s = max(0.0, now - self.state_since)
        writes = self.state == "writing" and state_s > 0
        return {"session": self.session, "model": self.model, "state": self.state,
                "seconds": max(0.0, now - self.since), "state_seconds": state_s,
                "tokens": self.tokens, "tokens_per_s": self.tokens / state_s if writes else 0.0}


class Histogram:
    """Counts of observations at or below each bound, as Prometheus wants them."""

    def __init__(self, bounds: Tuple[float, ...]) -> None:
        self.counts = dict.fromkeys((*bounds, math.inf), 0)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count value; anything but a number from 0 up is left out."""
        if 0 <= value < math.inf:
            self.total += value
            for bound in self.counts:
                self.counts[bound] += value <= bound

    def samples(self) -> Dict[str, float]:
        """Return the cumulative buckets, the sum and the count."""
        return {**{"_bucket" + labels(le=f"{bound:g}".replace("inf", "+Inf")): count
                   for bound, count in self.counts.items()},
                "_sum": self.total, "_count": self.counts[math.inf]}


def bump(counter: Dict[str, int], key: str) -> None:
    """Add to a counter whose keys may come from outside; their number is bounded."""
    key = clean(key, MAX_LABEL_CHARS) or "unknown"
    if key not in counter and len(counter) >= MAX_LABELS:
        key = "other"
    counter[key] = counter.get(key, 0) + 1


class Stats:
    """What the shim has done since its start, in bounded memory.

    A request is `begin`, any number of `progress`, `end`; the key is the caller's and
    tells requests apart. Times are epoch seconds. Callers on several threads pass a
    lock; progress needs none, since it only sets fields of its own request.
    """

    def __init__(self, started: float = 0.0, lock: Optional[ContextManager[Any]] = None) -> None:
        self.started = started
        self.lock: ContextManager[Any] = contextlib.nullcontext() if lock is None else lock
        self.active: Dict[Any, Running] = {}
        self.sessions: Dict[str, TurnRecord] = {}
        self.turns: Deque[TurnRecord] = deque(maxlen=MAX_TURNS)
        self.rescued: Deque[TurnRecord] = deque(maxlen=MAX_EVENTS)
        self.failed: Deque[TurnRecord] = deque(maxlen=MAX_EVENTS)
        self.counters: Dict[str, Dict[str, int]] = {
            "requests": {"ok": 0}, "rescues": {}, "upstream_errors": {},
            "tokens": {"prompt": 0, "cached": 0, "output": 0}}
        self.first_token = Histogram(FIRST_TOKEN_BOUNDS_S)
        self.per_token = Histogram(PER_TOKEN_BOUNDS_S)

    def begin(self, key: Any, session: str, model: str, now: float,
              state: str = "prefill") -> Running:
        """Note a request, to be told how far it is; state "waiting" where it has no place yet."""
        with self.lock:
            running = self.active[key] = Running(session, model, state, now)
        return running

    def end(self, key: Any, record: TurnRecord) -> None:
        """Note how a request ended; one that never began counts as well."""
        with self.lock:
            self.active.pop(key, None)
            self._count(record)
            self.turns.append(record)
            if record.rescue:
                self.rescued.append(record)
            if record.outcome not in ("ok", CLIENT_LEFT):
                self.failed.append(record)
            if record.prompt_tokens and record.way != "local":
                # The newest session stands last; the one that was idle longest gives way.
                self.sessions.pop(record.session, None)
                self.sessions[record.session] = record
                if len(self.sessions) > SHOWN_SESSIONS:
                    del self.sessions[next(iter(self.sessions))]

    def settle(self, session: str, calls: Sequence[str], request: Request) -> None:
        """Learn what came of a session's rescued calls, by id, from the next request."""
        results = [block for message in request.messages[-2:] for block in message.blocks
                   if isinstance(block, ToolResult) and block.id in calls]
        if not results:
            return
        outcome = "failed" if any(block.is_error for block in results) else "worked"
        with self.lock:
            for index in reversed(range(len(self.rescued))):
                if self.rescued[index].session == session:
                    self.rescued[index] = self.rescued[index]._replace(rescue_outcome=outcome)
                    return

    def _count(self, record: TurnRecord) -> None:
        bump(self.counters["requests"], record.outcome)
        for rule in filter(None, record.rescue.split(",")):
            bump(self.counters["rescues"], rule)
        if UPSTREAM_KINDS.match(record.outcome):
            bump(self.counters["upstream_errors"], record.outcome)
        tokens = self.counters["tokens"]
        tokens["prompt"] += record.prompt_tokens
        tokens["cached"] += record.cached_tokens
        tokens["output"] += record.output_tokens
        if record.first_s is not None and record.way != "local":
            self.first_token.observe(record.first_s)
        if record.tokens_per_s > 0:
            self.per_token.observe(1 / record.tokens_per_s)


# ------------------------------ log lines ------------------------------

GREEN, YELLOW, RED = "32", "33", "31"
# Share of the window from which a turn's line says what is left.
WINDOW_WARN_SHARE = 0.8


def shown_text(text: str, secrets: Iterable[str] = ()) -> str:
    """Make foreign text one clean line without secrets or the login of a URL."""
    return clean(URL_LOGIN.sub("://", redact(text, secrets)))


def scrub(value: Any, secrets: Tuple[str, ...]) -> Any:
    """Make every string of a JSON value fit to be shown, and its numbers short."""
    if isinstance(value, dict):
        return {clean(str(key)): scrub(item, secrets) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [scrub(item, secrets) for item in value]
    if isinstance(value, float):
        return round(value, 3)
    return shown_text(value, secrets) if isinstance(value, str) else value


def token_text(count: int) -> str:
    """Shorten a count of tokens: 940, 1.1k, 41.2k, 118k."""
    if count < 1000:
        return str(count)
    return f"{count / 1000:.1f}k" if count < 99_950 else f"{round(count / 1000)}k"


def window_text(window: int) -> str:
    """Name a window as people do: 65536 is 64k, 100000 is 100k."""
    if window >= 1024 and window % 1024 == 0:
        return f"{window // 1024}k"
    return token_text(window)


def paint(text: str, code: str, colour: bool) -> str:
    """Colour text for a terminal."""
    return f"\x1b[{code}m{text}\x1b[0m" if colour and code else text


def fill_text(record: TurnRecord) -> str:
    """Say how full the window is: "41.2k/64k tokens (1.1k new)"."""
    if not record.prompt_tokens:
        return ""
    window = f"/{window_text(record.window)}" if record.window else ""
    new = record.new_tokens
    if new is None and record.cached_tokens:
        new = record.prompt_tokens - record.cached_tokens
    told = f" ({token_text(new)} new)" if new is not None else ""
    return f"{token_text(record.used)}{window} tokens{told}"


def left_text(record: TurnRecord) -> str:
    """Warn of a window that is nearly full."""
    if not record.window or record.used < record.window * WINDOW_WARN_SHARE:
        return ""
    share = 100 * record.used // record.window
    return f"{share}% of the window used, {token_text(record.left)} left"


def tools_text(record: TurnRecord) -> str:
    """Name the tools called and the rule that rescued them."""
    names = ", ".join(record.tools[:MAX_LOG_TOOLS])
    if len(record.tools) > MAX_LOG_TOOLS:
        names += f" and {len(record.tools) - MAX_LOG_TOOLS} more"
    via = f"via rescue:{record.rescue}" if record.rescue else ""
    return f"{names} {via}".strip()


def turn_line(record: TurnRecord, colour: bool = False, utc_offset_s: float = 0.0,
              secrets: Iterable[str] = ()) -> str:
    """Write the log line of a turn, without the line end.

    12:01:07 turn 4  41.2k/64k tokens (1.1k new)  first 1.9s  38 tok/s  Write  ok

    "verbatim" before the outcome says which way the answer was read; else it was chat.
    """
    second = int(record.ended + utc_offset_s) % 86400
    at = f"{second // 3600:02}:{second // 60 % 60:02}:{second % 60:02}"
    parts = [
        f"{at} turn {record.turn}" if record.turn else at,
        f"answered here ({record.model})" if record.way == "local" else fill_text(record),
        f"prefill {record.prefill_s:.1f}s" if record.prefill_s else "",
        f"first {record.first_s:.1f}s" if record.first_s is not None else "",
        f"{record.tokens_per_s:.0f} tok/s" if record.tokens_per_s else "", tools_text(record),
        record.way if record.way in ("verbatim", "joined") else ""]
    code = {"ok": GREEN, CLIENT_LEFT: YELLOW}.get(record.outcome, RED)
    told = paint(shown_text(record.outcome), code, colour)
    if record.error:
        told += f": {shown_text(record.error, secrets)} {shown_text(record.cure, secrets)}".rstrip()
    notes = [paint(shown_text(note, secrets), YELLOW, colour)
             for note in (left_text(record), *record.notes) if note]
    return "  ".join([*(shown_text(part, secrets) for part in parts if part), told, *notes])


def turn_json(record: TurnRecord, secrets: Tuple[str, ...] = ()) -> str:
    """Write a turn as one line of JSON for `--log-format json`."""
    return json.dumps(scrub({"event": "turn", "time": record.ended, **record._asdict()}, secrets))


# ------------------------------ what broke the prefix ------------------------------


class Segment(NamedTuple):
    """A part of a prompt: its place in words, its text or a key of it, its tokens."""

    name: str
    key: Any
    tokens: int


# Tokens that may be read again without a word: an assistant turn is often rendered a
# little differently from how the model wrote it (OL 5b).
LEAST_REREAD = 500


def prefix_break(before: Sequence[Segment], now: Sequence[Segment]) -> str:
    """Say which part of a prompt changed since the last turn and what that costs.

    "tools changed at Bash: 18,400 tokens read again"; "" where the prompt only grew.
    """
    same = next((place for place, (old, new) in enumerate(zip(before, now))
                 if old.key != new.key), min(len(before), len(now)))
    again = min(sum(segment.tokens for segment in part[same:]) for part in (before, now))
    if again < LEAST_REREAD:
        return ""
    # What stood behind it before is in its place now: then it went, and is named itself.
    went = now[same].key in [segment.key for segment in before[same + 1:]]
    return f"{(before if went else now)[same].name}: {again:,} tokens read again"


# ------------------------------ status as JSON ------------------------------

# Not shown: where it listens, which the reader knows, and a path of the user's.
HIDDEN_OPTIONS = ("host", "port", "counts_file")


def shown_options(config: Config) -> Json:
    """Return the options that are no secret; two shims with the same do the same."""
    return {row.name: scrub(getattr(config, row.name), secrets_of(config)) for row in OPTIONS
            if not row.secret and row.name not in HIDDEN_OPTIONS}


def status_json(stats: Stats, config: Config, health: Json, now: float,
                secrets: Tuple[str, ...] = ()) -> Json:
    """Return what the page at `/` shows; newest turns first, times in epoch seconds.

    health is what `/health` answers. Prompts and answers are never in it, nor the
    secrets, which are ours where no others are given.
    """
    with stats.lock:
        active = [one.fields(now) for one in stats.active.values()]
        sessions = [
            {"session": last.session, "model": last.model, "turn": last.turn, "used": last.used,
             "window": last.window, "left": last.left if last.window else None,
             "last": last.ended, "left_out": last.left_out} for last in stats.sessions.values()]
        turns, rescues, errors = (
            [one._asdict() for one in reversed(some)]
            for some in (stats.turns, stats.rescued, stats.failed))
        counters = {name: dict(counter) for name, counter in stats.counters.items()}
    return dict(scrub({
        "version": __version__, "now": now, "uptime_s": max(0.0, now - stats.started),
        "health": health, "options": shown_options(config),
        "running": [one for one in active if one["state"] != "waiting"],
        "waiting": [one for one in active if one["state"] == "waiting"],
        "sessions": sessions[::-1], "turns": turns, "rescues": rescues, "errors": errors,
        "counters": counters}, secrets or secrets_of(config)))


# ------------------------------ Prometheus ------------------------------


def labels(**values: str) -> str:
    """Write a label set; backslash, quote and line end are escaped."""
    escaped = {name: value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
               for name, value in values.items()}
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped.items()) + "}"


def metrics_text(stats: Stats, config: Config) -> str:
    """Write the Prometheus text format, version 0.0.4."""
    with stats.lock:
        states = [one.state for one in stats.active.values()]
        waiting, counters = states.count("waiting"), stats.counters
        tokens = counters["tokens"]

        def by(label: str, name: str) -> Dict[str, float]:
            return {labels(**{label: key}): n for key, n in sorted(counters[name].items())}

        families: Tuple[Tuple[str, str, str, Mapping[str, float]], ...] = (
            ("info", "gauge", "What runs here; always 1.",
             {labels(version=__version__, model=clean(config.model)): 1}),
            ("start_time_seconds", "gauge", "Start of the shim, in epoch seconds.",
             {"": stats.started}),
            ("requests_total", "counter", "Requests for messages by outcome.",
             by("outcome", "requests")),
            ("requests_running", "gauge", "Requests at work.", {"": len(states) - waiting}),
            ("requests_waiting", "gauge", "Requests that wait for a place.", {"": waiting}),
            ("rescues_total", "counter", "Tool calls made from text or a request, by rule.",
             by("rule", "rescues")),
            ("upstream_errors_total", "counter", "Failures of Ollama by kind.",
             by("kind", "upstream_errors")),
            ("prompt_tokens_total", "counter", "Tokens of prompts, cached ones included.",
             {"": tokens["prompt"]}),
            ("cached_prompt_tokens_total", "counter", "Tokens of prompts not read again.",
             {"": tokens["cached"]}),
            ("output_tokens_total", "counter", "Tokens written by the model.",
             {"": tokens["output"]}),
            ("time_to_first_token_seconds", "histogram", "From the request to the first token.",
             stats.first_token.samples()),
            ("time_per_output_token_seconds", "histogram",
             "Mean time for a token after the first, one observation a turn.",
             stats.per_token.samples()))
    lines = []
    for name, kind, text, samples in families:
        full = "qwencode_" + name
        lines += [f"# HELP {full} {text}", f"# TYPE {full} {kind}"]
        lines += [f"{full}{suffix} {value:.10g}" for suffix, value in samples.items()]
    return "\n".join(lines) + "\n"


# ------------------------------ the page ------------------------------

STATUS_STYLE = """
:root { color-scheme: light dark; --bg: #f6f8fa; --card: #ffffff; --text: #1b1f24;
  --muted: #57606a; --line: #d0d7de; --accent: #0550ae; --ok: #116329; --warn: #7d4e00;
  --bad: #a40e26; --track: #e4e8ec; }
@media (prefers-color-scheme: dark) { :root { --bg: #0d1117; --card: #161b22; --text: #e6edf3;
  --muted: #9da7b3; --line: #30363d; --accent: #79c0ff; --ok: #56d364; --warn: #e3b341;
  --bad: #ff7b72; --track: #30363d; } }
* { box-sizing: border-box; }
[hidden] { display: none !important; }
body { margin: 0 auto; max-width: 1240px; padding: 16px; background: var(--bg);
  color: var(--text); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
header { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 14px; margin-bottom: 14px; }
h1 { font-size: 22px; margin: 0; } h2 { font-size: 16px; margin: 0 0 8px; }
header p { margin: 0; color: var(--muted); } header .grow { flex: 1; }
main { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 14px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 14px 16px; min-width: 0; }
.wide { grid-column: 1 / -1; }
.ok { color: var(--ok); } .warn { color: var(--warn); } .bad { color: var(--bad); }
.muted, .empty, figcaption { color: var(--muted); margin: 0; }
.state { font-weight: 600; }
button, input { font: inherit; color: inherit; background: var(--card); padding: 5px 12px;
  border: 1px solid var(--muted); border-radius: 6px; min-height: 34px; }
button { cursor: pointer; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
dl { display: grid; grid-template-columns: fit-content(70%) minmax(4em, 1fr); gap: 3px 16px;
  margin: 0; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
.gauge { margin: 0 0 12px; } .gauge:last-child { margin: 0; }
.gauge p { margin: 0 0 3px; display: flex; flex-wrap: wrap; justify-content: space-between;
  gap: 0 12px; }
.track { height: 12px; border-radius: 6px; background: var(--track); overflow: hidden; }
.fill { height: 100%; background: var(--accent); }
.fill.warn { background: var(--warn); } .fill.bad { background: var(--bad); }
figure { margin: 0; } figure svg { width: 100%; height: 120px; display: block; margin-top: 6px; }
svg .bar { fill: var(--accent); } svg .base { stroke: var(--line); }
svg .limit { stroke: var(--bad); stroke-dasharray: 5 4; }
svg .area { fill: var(--accent); opacity: 0.18; }
svg .curve { fill: none; stroke: var(--accent); stroke-width: 2; }
svg * { vector-effect: non-scaling-stroke; }
.scroll { overflow: auto; max-height: 520px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 14px 5px 0; vertical-align: top; }
th { color: var(--muted); font-weight: 600; white-space: nowrap; }
td { border-top: 1px solid var(--line); overflow-wrap: anywhere; }
td.num, th.num { text-align: right; white-space: nowrap; } td.nowrap { white-space: nowrap; }
td small { display: block; color: var(--muted); font-size: 13.5px; }
@media (max-width: 720px) {
  body { padding: 10px; } main { grid-template-columns: minmax(0, 1fr); gap: 10px; }
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  table, tbody, tr { display: block; }
  tr { border-top: 1px solid var(--line); padding: 8px 0; }
  tbody tr:first-child { border-top: 0; padding-top: 0; } tbody tr:last-child { padding-bottom: 0; }
  td, td.num { display: flex; gap: 12px; border: 0; padding: 1px 0; text-align: left; }
  td::before { content: attr(data-label); color: var(--muted); flex: 0 0 96px; }
  td:empty { display: none; }
}
"""

STATUS_SCRIPT = r"""
"use strict";
const SVG = "http://www.w3.org/2000/svg";
const byId = (id) => document.getElementById(id);
const shown = {};
let key = "", open = false, paused = false, timer = 0, online = null, seen = null;
try { key = sessionStorage.getItem("qwencode-key") || ""; } catch (error) { key = ""; }

// Values reach the page as text nodes and attributes only: nothing is parsed as HTML.
function fill(node, attributes, parts) {
  for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, value);
  node.append(...parts.filter((part) => part !== "" && part !== null && part !== undefined));
  return node;
}
const el = (name, attributes, ...parts) => fill(document.createElement(name), attributes, parts);
const svg = (name, attributes, ...parts) =>
  fill(document.createElementNS(SVG, name), attributes, parts);

const count = (n) => n < 1000 ? String(n) : n < 99950 ? (n / 1000).toFixed(1) + "k"
  : n < 999500 ? Math.round(n / 1000) + "k" : (n / 1e6).toFixed(1) + "M";
const size = (n) => n >= 1024 && n % 1024 === 0 ? n / 1024 + "k" : count(n);
const seconds = (s) => s === null || s === undefined ? ""
  : s < 0.1 ? Math.round(s * 1000) + " ms" : s < 100 ? s.toFixed(1) + " s"
  : s < 7200 ? Math.round(s / 60) + " min" : (s / 3600).toFixed(1) + " h";
const clock = (at) => new Date(at * 1000).toLocaleTimeString([], { hour12: false });
const short = (id) => id ? id.slice(0, 8) : "without a name";
const share = (part, whole) => whole > 0 ? Math.round(100 * part / whole) + " %" : "";
const speed = (n) => n > 0 ? n.toFixed(n < 10 ? 1 : 0) : "";
const used = (turn) => turn.prompt_tokens + turn.output_tokens;

// A part is drawn anew only when its data changed, so that reading and selecting stay possible.
function draw(id, data, make) {
  const now = JSON.stringify(data);
  if (shown[id] === now) return;
  shown[id] = now;
  byId(id).replaceChildren(...[].concat(make(data)));
}
const none = (text) => el("p", { class: "empty" }, text);

// Roles are named because display:block on a phone takes a table's own ones away.
function table(label, heads, rows, empty) {
  if (!rows.length) return none(empty);
  const cell = ([text, numeric], part, index) => el("td", { role: "cell", "data-label": text,
    class: numeric ? "num" : index ? "" : "nowrap" }, ...[].concat(part));
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label },
    el("table", { role: "table", "aria-label": label },
      el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, ...heads.map(([text, numeric]) =>
        el("th", { role: "columnheader", scope: "col", class: numeric ? "num" : "" }, text)))),
      el("tbody", { role: "rowgroup" }, ...rows.map((row) => el("tr", { role: "row" },
        ...row.map((part, index) => cell(heads[index], part, index)))))));
}

function outcome(turn) {
  const tone = turn.outcome === "ok" ? "ok" : turn.outcome === "client left" ? "warn" : "bad";
  return el("span", { class: tone }, turn.outcome.replaceAll("_", " "));
}

function lists(pairs) {
  return el("dl", {}, ...pairs.filter((pair) => pair[1] !== "" && pair[1] !== undefined
    && pair[1] !== null).flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
}

function gauges(sessions) {
  if (!sessions.length) return none("No session yet. Ask Claude Code something.");
  return sessions.map((one) => {
    const part = one.window ? Math.min(1, one.used / one.window) : 0;
    const tone = part >= 0.95 ? "bad" : part >= 0.8 ? "warn" : "";
    const words = one.window
      ? `${count(one.used)} of ${size(one.window)} used (${share(one.used, one.window)}), `
        + `${count(one.left)} left`
      : `${count(one.used)} used, window unknown`;
    const bar = el("div", { class: "fill " + tone });
    bar.style.width = (100 * part).toFixed(1) + "%";
    return el("div", { class: "gauge" },
      el("p", {}, el("span", {}, `Session ${short(one.session)}`,
        el("span", { class: "muted" }, one.turn ? `, turn ${one.turn}` : "")),
        el("span", { class: tone }, words)),
      el("div", { class: "track", role: "meter", "aria-label": `Window of ${short(one.session)}`,
        "aria-valuemin": "0", "aria-valuemax": String(one.window || one.used),
        "aria-valuenow": String(one.used), "aria-valuetext": words }, bar),
      one.left_out.length ? el("p", { class: "muted" }, "Not shown to the model: "
        + one.left_out.join(", ")) : "");
  });
}

function running(data) {
  return table("Running now", [["Session"], ["State"], ["Seconds", 1], ["Tokens", 1],
    ["Tokens/s", 1]], [...data.running, ...data.waiting].map((one) => [short(one.session),
    one.state === "prefill" ? "prefill " + seconds(one.state_seconds) : one.state,
    seconds(one.seconds), String(one.tokens), speed(one.tokens_per_s)]), "Nothing is running.");
}

function chart(id, caption, label, parts) {
  byId(id + "-text").textContent = caption;
  return svg("svg", { viewBox: "0 0 500 120", preserveAspectRatio: "none", role: "img",
    "aria-label": label }, svg("line", { class: "base", x1: 0, x2: 500, y1: 119, y2: 119 }),
    ...parts);
}

function speeds(turns) {
  const top = Math.max(1, ...turns.map((turn) => turn.tokens_per_s));
  const last = turns.length ? turns[turns.length - 1].tokens_per_s : 0;
  const text = turns.length ? `Latest ${speed(last)}, highest ${speed(top)}, `
    + `${turns.length} turns, newest on the right` : "No turn yet.";
  const step = 500 / Math.max(20, turns.length);
  return chart("speeds", text, "Tokens a second. " + text, turns.map((turn, index) => {
    const height = 116 * turn.tokens_per_s / top;
    return svg("rect", { class: "bar", x: (index * step + step * 0.15).toFixed(1),
      y: (119 - height).toFixed(1), width: (step * 0.7).toFixed(1), height: height.toFixed(1) });
  }));
}

function contexts(turns) {
  if (!turns.length) return chart("contexts", "No turn yet.", "Context: no turn yet", []);
  const own = turns.map((one) => turns.filter((turn) => turn.session === one.session))
    .reduce((most, some) => some.length > most.length ? some : most);
  const last = own[own.length - 1];
  const top = Math.max(last.window, ...own.map(used), 1) * 1.02;
  const y = (tokens) => (119 - 116 * tokens / top).toFixed(1);
  const step = 500 / Math.max(1, own.length - 1);
  const points = own.map((turn, index) => `${(index * step).toFixed(1)},${y(used(turn))}`);
  if (points.length === 1) points.push(`500,${y(used(last))}`);
  const text = `Session ${short(last.session)}: ${count(used(last))} tokens`
    + (last.window ? `; the dashed line is the window, ${size(last.window)}` : "");
  const parts = [svg("polygon", { class: "area", points: `0,119 ${points.join(" ")} 500,119` }),
    svg("polyline", { class: "curve", points: points.join(" ") })];
  if (last.window) parts.push(svg("line", { class: "limit", x1: 0, x2: 500, y1: y(last.window),
    y2: y(last.window) }));
  return chart("contexts", text, "Context over time. " + text, parts);
}

function turnRows(turns) {
  return table("Last turns", [["Time"], ["Turn", 1], ["First token", 1], ["Total", 1],
    ["Tokens in", 1], ["Cached", 1], ["Out", 1], ["Tokens/s", 1], ["Tools"], ["Outcome"]],
  turns.map((turn) => [clock(turn.started + turn.total_s), turn.turn ? String(turn.turn) : "",
    seconds(turn.first_s), seconds(turn.total_s),
    turn.prompt_tokens ? count(turn.prompt_tokens) : "",
    turn.prompt_tokens ? share(turn.cached_tokens, turn.prompt_tokens) : "",
    String(turn.output_tokens), speed(turn.tokens_per_s),
    turn.tools.length ? turn.tools.join(", ") + (turn.rescue ? ` via rescue:${turn.rescue}` : "")
      : turn.way === "local" ? "answered without the model" : "",
    [outcome(turn), ...turn.notes.map((note) => el("small", {}, note))]]), "No turn yet.");
}

function rescueRows(turns) {
  return table("Rescues", [["Time"], ["Rule"], ["Call"], ["Result"]], turns.map((turn) =>
    [clock(turn.started + turn.total_s), turn.rescue, turn.tools.join(", "),
      turn.rescue_outcome || turn.outcome]), "No rescue was needed.");
}

function errorRows(turns) {
  return table("Errors", [["Time"], ["Kind"], ["What to do"]], turns.map((turn) =>
    [clock(turn.started + turn.total_s), outcome(turn),
      el("div", {}, turn.error, turn.cure ? el("small", {}, turn.cure) : "")]), "No error.");
}

function counters(data) {
  const pairs = (title, values) => Object.entries(values).map(([name, n]) =>
    [title + name.replaceAll("_", " "), n]);
  const tokens = data.tokens;
  return lists([...pairs("Requests: ", data.requests), ...pairs("Rescues: ", data.rescues),
    ...pairs("Failures of Ollama: ", data.upstream_errors),
    ["Tokens read", count(tokens.prompt)], ["of these cached", count(tokens.cached)],
    ["Tokens written", count(tokens.output)]].map(([name, n]) => [name, String(n)]));
}

function tell(data) {
  const latest = data.turns[0];
  const mark = latest ? `${latest.session} ${latest.started} ${latest.turn}` : "";
  if (seen !== null && mark !== seen && latest) {
    const rescue = latest.rescue ? `, rescued by ${latest.rescue}` : "";
    byId("news").textContent = latest.outcome === "ok"
      ? `Turn ${latest.turn || ""} finished${rescue}.`
      : `A turn ended with ${latest.outcome}. ${latest.error} ${latest.cure}`;
  }
  seen = mark;
}

function state(tone, text) {
  byId("state").className = "state " + tone;
  if (byId("state").textContent !== text) byId("state").textContent = text;
}

function facts(health) {
  const { upstream = {}, model = {} } = health;
  return { Ollama: `${upstream.version || "unknown"} at ${upstream.url || "an unknown address"}`,
    window: model.window ? size(model.window) : "", capabilities: model.capabilities || "",
    "trained window": model.context_length ? size(model.context_length) : "" };
}

function show(data) {
  const problem = (data.health.upstream || {}).error || "";
  const past = [...data.turns].reverse().filter((turn) => turn.way !== "local");
  byId("about").textContent =
    `${data.options.model}, version ${data.version}, up ${seconds(data.uptime_s)}`;
  state(problem ? "bad" : "ok", problem || (data.running.length ? "at work" : "ready"));
  draw("model", { ...facts(data.health), ...data.options }, (all) =>
    lists(Object.entries(all).map(([name, value]) => [name.replaceAll("_", " "),
      Array.isArray(value) ? value.join(", ") : value === true ? "on" : value === false ? "off"
        : value === null ? "" : String(value)])));
  draw("sessions", data.sessions, gauges);
  draw("running", { running: data.running, waiting: data.waiting }, running);
  draw("speeds", past.filter((turn) => turn.tokens_per_s > 0), speeds);
  draw("contexts", past.filter((turn) => turn.prompt_tokens > 0), contexts);
  draw("turns", data.turns, turnRows);
  draw("rescues", data.rescues, rescueRows);
  draw("errors", data.errors, errorRows);
  draw("counters", data.counters, counters);
  tell(data);
}

function askKey(wrong) {
  byId("login").hidden = false;
  byId("login-text").textContent = wrong ? "That key is not the one in SHIM_API_KEY."
    : "This shim asks for the key in SHIM_API_KEY.";
  state("warn", "locked");
  byId("key").focus();
}

const ask = (path) => fetch(path, { cache: "no-store", signal: AbortSignal.timeout(5000),
  headers: key ? { "x-api-key": key } : {} });

async function poll() {
  clearTimeout(timer);
  try {
    // Without its key the shim tells only whether it is up, not its version.
    open = open || key !== "" || "version" in await (await ask("health")).json();
    if (!open) return askKey(false);
    const reply = await ask("status");
    if (reply.status === 401) return askKey(true);
    if (!reply.ok) throw new Error("HTTP " + reply.status);
    const data = await reply.json();
    byId("login").hidden = true;
    byId("content").hidden = false;
    show(data);
    if (online === false) byId("news").textContent = "The shim answers again.";
    online = true;
  } catch (error) {
    state("bad", "the shim does not answer");
    if (online !== false) byId("news").textContent = "The shim does not answer; trying again.";
    online = false;
  }
  if (!paused) timer = setTimeout(poll, document.hidden ? 5000 : 1000);
  return undefined;
}

byId("login").addEventListener("submit", (event) => {
  event.preventDefault();
  key = byId("key").value.trim();
  try { sessionStorage.setItem("qwencode-key", key); } catch (error) { shown.key = ""; }
  poll();
});
byId("pause").addEventListener("click", () => {
  paused = !paused;
  byId("pause").textContent = paused ? "Go on" : "Pause";
  if (paused) clearTimeout(timer); else poll();
});
document.addEventListener("visibilitychange", () => { if (!document.hidden && !paused) poll(); });
poll();
"""

# The hashes let the page forbid every other script, style and host to itself. They are
# written down, not computed, to spare the start-up; tests/test_status.py checks them.
STATUS_STYLE_HASH = "sha256-2q8y6dwgkfx5f9Q2/qfqcZWct/zW12U3ZjQ63hcH8NY="
STATUS_SCRIPT_HASH = "sha256-z5O5Q+qA3Q1OC+usC7Sj+g6au6xkMXP0DLwBf6FTsIM="

STATUS_PAGE = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>qwencode</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; connect-src 'self';
 img-src data:; base-uri 'none'; form-action 'none'; script-src '{STATUS_SCRIPT_HASH}';
 style-src '{STATUS_STYLE_HASH}'">
<link rel="icon" href="data:,"><style>{STATUS_STYLE}</style></head>
<body><header><h1>qwencode</h1><p id="about"></p><p id="state" class="state">connecting</p>
<p class="grow"></p><button id="pause" type="button">Pause</button></header>
<p id="news" class="muted" role="status" aria-live="polite"></p>
<form id="login" hidden><p id="login-text"></p><label for="key">Key</label>
<input id="key" type="password" autocomplete="off" required><button>Open</button></form>
<main id="content" hidden>
<section><h2>Context window</h2><div id="sessions"></div></section>
<section><h2>Running now</h2><div id="running"></div></section>
<section><h2>Tokens a second</h2><figure><figcaption id="speeds-text"></figcaption>
<div id="speeds"></div></figure></section>
<section><h2>Context over time</h2><figure><figcaption id="contexts-text"></figcaption>
<div id="contexts"></div></figure></section>
<section><h2>Rescues</h2><div id="rescues"></div></section>
<section><h2>Errors</h2><div id="errors"></div></section>
<section class="wide"><h2>Last turns</h2><div id="turns"></div></section>
<section><h2>Model and options</h2><div id="model"></div></section>
<section><h2>Counters since the start</h2><div id="counters"></div></section>
</main><noscript><p>This page needs JavaScript; <a href="status">status</a> has the same facts as
JSON and <a href="metrics">metrics</a> for Prometheus.</p></noscript>
<script>{STATUS_SCRIPT}</script></body></html>
"""


# ============================== I/O BELOW THIS LINE ==============================


# ============================== 15. UPSTREAM ==============================

LOCAL_NAMES = ("127.0.0.1", "localhost", "::1")  # looked up without a resolver
STATUS_LINE = Pattern(r"HTTP/1\.[01] ([1-5][0-9][0-9])(?: |$)")
# What a socket that would block raises; TLS sockets have errors of their own, whose
# module is loaded only when TLS is used.
WOULD_BLOCK: Tuple[Type[BaseException], ...] = (BlockingIOError, InterruptedError)
Sockets = Sequence[socket.socket]
Waiting = Callable[[float], List[socket.socket]]  # takes seconds, returns those that are ready


def readiness(readers: Sockets, writers: Sockets, leaving: Sockets = ()) -> Waiting:
    """Prepare a wait; leaving are only watched for their end, where the system can (Linux).

    poll() where there is one: select() fails above descriptor 1,023.
    """
    if sys.platform == "win32":
        return lambda timeout_s: [ready for some in select.select(
            readers, writers, {*readers, *writers}, max(0.0, timeout_s)) for ready in some]
    poll, by_fd = select.poll(), {sock.fileno(): sock for sock in (*readers, *writers, *leaving)}
    for sock in leaving:
        poll.register(sock, getattr(select, "POLLRDHUP", 0))
    for sock in readers:
        poll.register(sock, select.POLLIN)
    for sock in writers:
        poll.register(sock, select.POLLOUT | (select.POLLIN if sock in readers else 0))
    return lambda timeout_s: [by_fd[fd] for fd, _ in poll.poll(max(0.0, timeout_s) * 1000)]


def wait_ready(readers: Sockets, writers: Sockets, timeout_s: float) -> List[socket.socket]:
    """Wait until a socket can be read or written; return those that can."""
    return readiness(readers, writers)(timeout_s)


class Waiter:
    """Wait for an upstream socket and nothing else."""

    def wait(self, sock: socket.socket, writing: bool, until: float) -> bool:
        """Return True once sock is ready, False when the time is over."""
        left = until - time.monotonic()
        return bool(wait_ready((), (sock,), left) if writing else wait_ready((sock,), (), left))


class UpstreamCall:
    """One request to Ollama, its answer read as it comes.

    Made by Upstream.open. Every wait goes through the waiter, which may raise
    ClientGoneError.
    """

    def __init__(self, sock: socket.socket, waiter: Waiter, url: str) -> None:
        self._sock, self._waiter, self._url = sock, waiter, url
        # TLS may hold decrypted bytes that no wait on the socket would tell of.
        self._tls = self._more = hasattr(sock, "pending")
        self._buffer = b""
        self._framing: Union[ChunkDecoder, LengthDecoder] = LengthDecoder(sys.maxsize)
        self._ended = False
        self.status = 0
        self.headers: Dict[str, str] = {}

    def send(self, data: bytes, until: float) -> None:
        """Write the request; an upstream that answers before it read all is heard."""
        view = memoryview(data)
        while view:
            sent = self._try_send(view)
            if sent is None:
                return  # its answer, or the lack of one, tells why
            view = view[sent:]
            if view:
                self._wait(True, until)

    def _try_send(self, view: memoryview) -> Optional[int]:
        try:
            return self._sock.send(view)
        except WOULD_BLOCK:
            return 0
        except OSError:
            return None

    def _wait(self, writing: bool, until: float) -> None:
        if not self._waiter.wait(self._sock, writing, until):
            raise UpstreamTimeoutError(
                f"Ollama at {self._url} timed out: it was silent for too long. Where the model is"
                " only slow, raise SHIM_FIRST_TOKEN_TIMEOUT_MS (first byte) or"
                " SHIM_REQUEST_TIMEOUT_MS (within an answer).")

    def _receive(self, until: float) -> bytes:
        """Wait for bytes; b"" at the end. A full read is followed by another at once."""
        if not self._more:
            self._wait(False, until)
        data = self._try_receive()
        while data is None:
            self._wait(False, until)
            data = self._try_receive()
        self._more = self._tls or len(data) == READ_BYTES
        return data

    def _try_receive(self) -> Optional[bytes]:
        try:
            return self._sock.recv(READ_BYTES)
        except WOULD_BLOCK:
            return None
        except OSError as problem:
            reason = clean(problem.strerror or str(problem))
            raise UpstreamBrokenError(f"The connection to Ollama broke: {reason}") from None

    def read_head(self, until: float) -> None:
        """Read status and headers; raise UpstreamBrokenError where they make no sense."""
        size = 0
        while True:
            head, found, rest = self._buffer.partition(b"\r\n\r\n")
            if found:
                self._buffer = rest
                self._parse_head(head.decode("latin-1"))
                if self.status >= 200:
                    return
                continue
            if size > 4 * MAX_HEAD_BYTES:  # also of 1xx answers together
                raise UpstreamBrokenError("The server at OLLAMA_BASE_URL sent endless headers.")
            data = self._receive(until)
            size += len(data)
            if not data:
                raise UpstreamBrokenError(
                    "Ollama closed the connection without an answer." if not self._buffer
                    else "Ollama's answer broke off within its headers.")
            self._buffer += data

    def _parse_head(self, head: str) -> None:
        lines = head.split("\r\n")
        status = STATUS_LINE.match(lines[0])
        if not status:
            raise UpstreamBrokenError(
                f"The server at OLLAMA_BASE_URL does not speak HTTP: {clean(lines[0], 60)!r}")
        self.status = int(status.group(1))
        pairs = (line.partition(":") for line in lines[1:])
        self.headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        if self.status < 200:
            return
        if self.headers.get("content-encoding", "identity").lower() != "identity":
            raise UpstreamBrokenError(
                "The server at OLLAMA_BASE_URL sent a compressed answer, which was not asked for;"
                " turn compression off in the proxy before Ollama.")
        if "chunked" in self.headers.get("transfer-encoding", "").lower():
            self._framing = ChunkDecoder()
        elif self.status in (204, 304):
            self._framing = LengthDecoder(0)
        elif WHOLE_NUMBER.fullmatch(self.headers.get("content-length", "")):
            self._framing = LengthDecoder(int(self.headers["content-length"]))
        self._ended = self._framing.finished

    def read(self, until: float) -> bytes:
        """Return the next piece of the body, b"" at its end, also where it was cut."""
        while not self._ended:
            data, self._buffer = self._buffer, b""
            if not data:
                data = self._receive(until)
            payload = self._unframe(data)
            if payload:
                return payload
        return b""

    def read_now(self) -> Optional[bytes]:
        """Return what has come of the body, maybe b"", without waiting; None at its end."""
        data = None if self._ended else self._try_receive()
        if data is None:
            return None if self._ended else b""
        return self._unframe(data) if data else None

    @property
    def pollable(self) -> Optional[socket.socket]:
        """The socket that tells of all that comes; None where some of it may be here already."""
        return None if self._tls or self._more or self._buffer or self._ended else self._sock

    def _unframe(self, data: bytes) -> bytes:
        try:
            payload = self._framing.feed(data)
        except ValueError as problem:
            raise UpstreamBrokenError(f"Ollama's answer is framed wrongly: {problem}.") from None
        self._ended = self._framing.finished or not data
        return payload

    def read_all(self, until: float) -> bytes:
        """Read the whole body, at most MAX_ANSWER_BYTES."""
        pieces: List[bytes] = []
        size = 0
        while True:
            piece = self.read(until)
            if not piece:
                return b"".join(pieces)
            pieces.append(piece)
            size += len(piece)
            if size > MAX_ANSWER_BYTES:
                raise UpstreamBrokenError(f"Ollama's answer is over {MAX_ANSWER_BYTES} bytes.")


class Answer(NamedTuple):
    """A whole answer of the upstream."""

    status: int
    text: str
    retry_after: Optional[str] = None

    @property
    def body(self) -> Any:
        """Its JSON, or None."""
        try:
            return _strict_json.decode(self.text)
        except (ValueError, RecursionError):
            return None


class Upstream:
    """The HTTP client of every dialect: a new connection for each call.

    A loopback connect costs 0.07 ms; in return no connection is ever stale, and
    closing one cancels exactly its request. Proxies of the environment are not used:
    they would carry prompts off the machine.
    """

    def __init__(self, config: Config) -> None:
        scheme, _, host, port, path = BASE_URL.findall(config.base_url)[0]
        self.tls = scheme.lower() == "https"
        self.host = host.strip("[]").lower()
        self.port = int(port or (443 if self.tls else 80))
        self._prefix = path.rstrip("/")
        shown = bracketed(self.host)
        self.url = f"{scheme.lower()}://{shown}:{self.port}{self._prefix}"
        login = login_of(config.base_url)[1]
        authorization = f"Bearer {config.auth_token}" if config.auth_token else ""
        if login and not authorization:
            authorization = "Basic " + late("base64").b64encode(login.encode()).decode()
        self._fixed = (f"Host: {shown}:{self.port}\r\n"
                       "Accept: application/json\r\nConnection: close\r\n")
        if authorization:
            self._fixed += f"Authorization: {authorization}\r\n"

    @contextlib.contextmanager
    def open(self, path: str, body: Optional[str], waiter: Waiter,
             until: float) -> Iterator[UpstreamCall]:
        """Connect and send: a POST of body, or a GET without one; the call reads the answer.

        Whatever Ollama still does for us at the end of the with block is cancelled.
        """
        head, payload = f"GET {self._prefix}{path} HTTP/1.1\r\n{self._fixed}", b""
        if body is not None:
            payload = body.encode()
            head = (f"POST{head[3:]}Content-Type: application/json\r\n"
                    f"Content-Length: {len(payload)}\r\n")
        with self._connect(waiter, min(until, time.monotonic() + CONNECT_S)) as sock:
            call = UpstreamCall(sock, waiter, self.url)
            call.send(head.encode("utf-8", "surrogateescape") + b"\r\n" + payload, until)
            del body, payload  # a long answer need not hold them
            yield call

    def _connect(self, waiter: Waiter, until: float) -> socket.socket:
        """Try each address in turn; raise UpstreamRefusedError with the reason."""
        reason = "no address"
        for *kind, _, address in self._addresses(waiter, until):
            try:
                sock = socket.socket(*kind)
            except OSError as problem:  # no such family here, or too many open files
                reason = problem.strerror or str(problem)
                continue
            try:
                reason = self._connect_one(sock, address, waiter, until)
                if not reason:
                    return self._wrap(sock, waiter, until) if self.tls else sock
            except BaseException:
                sock.close()
                raise
            sock.close()
        raise self._refused(reason)

    def _addresses(self, waiter: Waiter, until: float) -> List[Any]:
        """Look the name up, on a thread: a resolver may take half a minute to give up."""
        found: List[Any] = [TimeoutError("the lookup takes too long")]

        def look_up(wake: Optional[socket.socket] = None) -> None:
            try:
                # As bytes: a text loads the codec of international names, which takes 1.5 ms.
                found.append(socket.getaddrinfo(
                    self.host.encode(), self.port, type=socket.SOCK_STREAM))
            except (OSError, UnicodeError) as problem:
                found.append(problem)
            if wake:
                wake.close()

        if self.host in LOCAL_NAMES:
            look_up()
        else:
            mine, wake = socket.socketpair()
            with mine:
                threading.Thread(target=look_up, args=(wake,), daemon=True).start()
                waiter.wait(mine, False, until)
        answer = found[-1]
        if isinstance(answer, Exception):
            raise self._refused(f"the name cannot be resolved ({answer})")
        return list(answer)

    @staticmethod
    def _connect_one(sock: socket.socket, address: Any, waiter: Waiter, until: float) -> str:
        """Connect; return "" or why it failed."""
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        code = sock.connect_ex(address)
        if code in (errno.EINPROGRESS, errno.EWOULDBLOCK, getattr(errno, "WSAEWOULDBLOCK", -1)):
            if not waiter.wait(sock, True, until):
                return "it does not accept connections in time"
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        # Windows has a table of its own: its C library knows no error of a socket.
        named = getattr(socket, "errorTab", {}).get(code, "").rstrip(".")
        return named or os.strerror(code) if code else ""

    def _wrap(self, sock: Any, waiter: Waiter, until: float) -> socket.socket:
        """Begin TLS; a server may accept and then never answer."""
        global WOULD_BLOCK
        ssl = late("ssl")
        WOULD_BLOCK = (BlockingIOError, InterruptedError, ssl.SSLWantReadError,
                       ssl.SSLWantWriteError)
        try:
            sock = ssl.create_default_context().wrap_socket(
                sock, server_hostname=self.host, do_handshake_on_connect=False)
            while True:
                with contextlib.suppress(*WOULD_BLOCK):
                    sock.do_handshake()
                    return sock  # type: ignore[no-any-return]  # ssl is imported late
                if not waiter.wait(sock, False, until):
                    raise TimeoutError("no answer in time")
        except BaseException as problem:
            sock.close()
            if isinstance(problem, (OSError, ValueError)):
                raise self._refused(f"TLS failed ({clean(str(problem))})") from None
            raise

    def _refused(self, reason: str) -> UpstreamRefusedError:
        return UpstreamRefusedError(
            f"Cannot reach Ollama at {self.url}: {clean(reason)}. Start it with `ollama serve`,"
            " or set OLLAMA_BASE_URL.")

    def ask(self, path: str, body: Optional[str], waiter: Waiter, until: float) -> Answer:
        """Make a call and read its whole answer."""
        with self.open(path, body, waiter, until) as call:
            call.read_head(until)
            text = call.read_all(until).decode("utf-8", "replace")
        return Answer(call.status, text, call.headers.get("retry-after"))


# ============================== 16. SERVER ==============================

# ------------------------------ the log ------------------------------

class Log:
    """Write one line per message to stderr; secrets never pass."""

    LEVELS = ("error", "warn", "info", "debug")

    def __init__(self, config: Config) -> None:
        self._limit = self.LEVELS.index(config.log)
        self._json = config.log_format == "json"
        self._secrets = secrets_of(config)
        self._colour = sys.stderr is not None and sys.stderr.isatty() \
            and not os.environ.get("NO_COLOR")
        self._lock = threading.Lock()

    def on(self, level: str) -> bool:
        return self.LEVELS.index(level) <= self._limit

    def write(self, level: str, message: str) -> None:
        """Log a message; a debug message may be of any length."""
        if not self.on(level):
            return
        text = clean(redact(message, self._secrets), 10_000_000 if level == "debug" else 2000)
        told = {"event": "log", "time": round(time.time(), 3), "level": level, "message": text}
        self._line(to_json(told) if self._json else time.strftime(
            f"%H:%M:%S {'' if level == 'info' else level + ': '}") + text)

    def turn(self, record: TurnRecord) -> None:
        """Write the line of a turn."""
        level = "warn" if record.error else "info"
        if self.on(level):
            self._line(turn_json(record, self._secrets) if self._json else turn_line(
                record, self._colour, time.localtime().tm_gmtoff or 0, self._secrets))

    def _line(self, text: str) -> None:
        # Closed, or None from the start as under pythonw.exe: nobody is there to read it.
        with self._lock, contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stderr.write(text + "\n")
            sys.stderr.flush()


# ------------------------------ the connection to a client ------------------------------

class ClientLink(Waiter):
    """The connection to one client: reads requests, writes without blocking.

    While the shim waits for Ollama this waits for the client too: it sees it leave at
    once (ClientGoneError), drains what is pending, and calls on_tick when tick_at has
    come. A client that lags keeps at most MAX_PENDING_BYTES and is cut off after
    CLIENT_STALL_S without taking any: Ollama must never wait for it (OL 2).
    """

    def __init__(self, sock: socket.socket, stop: socket.socket) -> None:
        sock.setblocking(False)
        self.sock, self._stop = sock, stop
        self.input = bytearray()
        self._pending = bytearray()
        self._largest = 0  # of the pieces that wait: one long line is no lag
        self._taken_at = 0.0
        self._eof = False
        self._watched: Any = None
        self._ready: Waiting = lambda timeout_s: []
        self.serving = False
        self.stop_ticking()

    def stop_ticking(self) -> None:
        """Forget who ticked: a connection idles for minutes, and its last request is large."""
        self.tick_at = math.inf
        self.on_tick: Callable[[], None] = lambda: None

    def send(self, data: bytes) -> None:
        """Send now what the client takes and keep the rest."""
        sent = 0
        if not self._pending:
            try:
                sent = self.sock.send(data)
            except WOULD_BLOCK:
                pass
            except OSError:
                raise ClientGoneError from None
            if sent == len(data):
                return
            self._taken_at = time.monotonic()
        self._pending += memoryview(data)[sent:]
        self._largest = max(self._largest, len(data))
        if len(self._pending) > MAX_PENDING_BYTES + self._largest:
            raise ClientGoneError

    def _flush(self) -> None:
        try:
            sent = self.sock.send(self._pending)
        except WOULD_BLOCK:
            return
        except OSError:
            raise ClientGoneError from None
        del self._pending[:sent]
        self._taken_at = time.monotonic()
        if not self._pending:
            self._largest = 0

    def _take_input(self) -> None:
        """Read what the client sends; while a request is served its end means it left."""
        try:
            data = self.sock.recv(READ_BYTES)
        except WOULD_BLOCK:
            return
        except OSError:
            raise ClientGoneError from None
        if not data:
            self._eof = True
            raise ClientGoneError
        self.input += data

    def wait(self, sock: Optional[socket.socket], writing: bool, until: float) -> bool:
        """Wait for sock (or, if None, for any input), serving the client meanwhile."""
        while True:
            now = time.monotonic()
            if now >= self.tick_at:
                self.on_tick()
                continue
            limit = min(until, self.tick_at)
            if self._pending:
                limit = min(limit, now + self._patience(now))
            ready = self._watch(sock, writing)(limit - now)
            if ready == [sock]:  # nearly every token
                return True
            if self._serve(ready, sock) or sock in ready:
                return True
            if time.monotonic() >= until:
                return False

    def _serve(self, ready: List[socket.socket], sock: Optional[socket.socket]) -> bool:
        """Do what the client's socket is ready for; True if input came that was awaited."""
        if self._stop in ready:
            raise StoppingError("The shim is being stopped; the answer ends here.") \
                if self.serving else ClientGoneError()
        if self.sock not in ready:
            return False
        before = len(self.input)
        if self._pending:
            self._flush()
        elif before >= READ_BYTES:  # it was only watched for its end
            raise ClientGoneError
        if before < READ_BYTES:
            self._take_input()
        return sock is None and len(self.input) > before

    def _watch(self, sock: Optional[socket.socket], writing: bool) -> Waiting:
        """Return the wait for these sockets; the last one is kept, as tokens share it."""
        full, pending = len(self.input) >= READ_BYTES, bool(self._pending)
        key = (sock, writing, full, pending)
        if key != self._watched:
            readers = [self._stop] if full else [self._stop, self.sock]
            writers = [self.sock] if pending else []
            if sock is not None:
                (writers if writing else readers).append(sock)
            leaving = [self.sock] if full and not pending else []
            self._watched, self._ready = key, readiness(readers, writers, leaving)
        return self._ready

    def _patience(self, now: float) -> float:
        """Seconds until a client that takes nothing is given up."""
        left = self._taken_at + CLIENT_STALL_S - now
        if left <= 0:
            raise ClientGoneError
        return left

    @property
    def calm(self) -> bool:
        """Say whether nothing waits to be sent, or to be read."""
        return not self._pending and not self.input

    def drain(self) -> None:
        """Wait until everything is sent."""
        while self._pending:
            if wait_ready((), (self.sock,), self._patience(time.monotonic())):
                self._flush()


# ------------------------------ the head of a request ------------------------------

class HttpRequest(NamedTuple):
    """The head of a request. path has no query and no prefix before /v1."""

    method: str
    target: str
    path: str
    version: str
    headers: Dict[str, str]

    def header(self, name: str) -> str:
        return self.headers.get(name, "")


REQUEST_LINE = Pattern(r"([A-Z]{1,20}) (?:https?://([^/?#]+)(?=[/?#]))?([!-~]+) HTTP/(1\.[01])")
# Bytes beyond ASCII are let through: a key may hold them (RFC 9110 5.5, obs-text).
HEADER_LINE = Pattern(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([^\x00-\x08\x0a-\x1f\x7f]*)")
# Two of these could mean one thing to us and another to whoever stands before us.
SINGLE_HEADERS = ("host", "content-length", "transfer-encoding", "content-type", "origin",
                  "authorization", "x-api-key")
CONTENT_LENGTH = Pattern(r"[0-9]{1,15}", re.ASCII)


def parse_head(head: bytes) -> HttpRequest:
    """Read request line and headers; raise a ShimError for what is not plain HTTP/1.1.

    Strict, since leniency is what request smuggling lives on (reliability, RFC 9112).
    """
    lines = head.decode("latin-1").split("\r\n")
    first = REQUEST_LINE.fullmatch(lines[0])
    if not first:
        raise BadRequestError("This is not an HTTP/1.1 request.")
    method, authority, target, version = first.groups()
    if len(lines) > MAX_HEADERS + 1:
        raise HeadTooLargeError(f"More than {MAX_HEADERS} headers.")
    headers: Dict[str, str] = {}
    for line in lines[1:]:
        match = HEADER_LINE.fullmatch(line)
        if not match:  # not quoted: it may be the one with the key
            raise BadRequestError("One of the request's headers is malformed.")
        name = match.group(1).lower()
        if name in headers and name in SINGLE_HEADERS:
            raise BadRequestError(f"The header {name} is repeated.")
        headers[name] = match.group(2).strip(" \t")
    if version == "1.1" and "host" not in headers:
        raise BadRequestError("The Host header is missing.")
    headers.update({"host": authority} if authority is not None else {})  # RFC 9112 3.2.2
    path = target.partition("?")[0].partition("#")[0]
    return HttpRequest(method, target, path[max(path.rfind("/v1/"), 0):], version, headers)


# Types that a page may post to any host without a preflight (reliability 1).
SIMPLE_TYPES = Pattern(
    r"\s*(?:text/plain|multipart/form-data|application/x-www-form-urlencoded)", re.IGNORECASE)
HOST_HEADER = Pattern(r"(?:\[([0-9a-fA-F:.]+)\]|([^:\[\]]*))(?::[0-9]{1,5})?")
LOOPBACK_V4 = Pattern(r"127(?:\.[0-9]{1,3}){3}")
ORIGIN = Pattern(r"(?:https?|vscode-webview|app|tauri|file)://(.*)")


def is_loopback(host: str) -> bool:
    """Say whether a host name or address is this machine's loopback."""
    host = host.lower().rstrip(".")
    return host in LOCAL_NAMES or host.endswith(".localhost") or bool(LOOPBACK_V4.fullmatch(host))


def header_host(value: str) -> Optional[str]:
    """Take the host out of a Host header or an Origin's authority."""
    match = HOST_HEADER.fullmatch(value)
    return (match.group(1) or match.group(2) or "") if match else None


# ------------------------------ places and queues ------------------------------

class Gate:
    """Let at most limit requests work at once; queue more wait in order."""

    def __init__(self, limit: int, queue: int) -> None:
        self._limit, self._queue, self.working = limit, queue, 0
        self._waiting: List[socket.socket] = []
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def place(self, waiter: Waiter) -> Iterator[None]:
        """Hold a place for a with block; raise BusyError where too many wait already."""
        mine = wake = None
        with self._lock:
            if self.working < self._limit and not self._waiting:
                self.working += 1
            elif len(self._waiting) >= self._queue:
                raise BusyError("Too many requests are waiting; try again in a moment.", "5")
            else:
                mine, wake = socket.socketpair()
                self._waiting.append(wake)
        try:
            while mine and not waiter.wait(mine, False, time.monotonic() + 3600.0):
                pass
            yield
        finally:
            self._leave(wake)
            if mine and wake:
                mine.close()
                wake.close()

    def _leave(self, wake: Optional[socket.socket]) -> None:
        """Leave the queue, or the place, which the next one takes."""
        with self._lock:
            if wake in self._waiting:
                self._waiting.remove(wake)
            elif self._waiting:
                self._waiting.pop(0).send(b"x")
            else:
                self.working -= 1

    @property
    def load(self) -> Tuple[int, int]:
        """Requests at work and waiting."""
        return self.working, len(self._waiting)


# ------------------------------ what is known of a model ------------------------------

class LocalModel(NamedTuple):
    """A model as it is used: what is known of it, and its window in tokens.

    num_ctx is what every request asks for (None leaves it to Ollama), window what the
    model is loaded with (0 is unknown), reason one line about the choice.
    """

    facts: ModelFacts
    num_ctx: Optional[int] = None
    window: int = 0
    reason: str = ""


def model_rows(tags: Any) -> List[Json]:
    """Take the models out of /api/tags or /api/ps; rows without a name are left out."""
    rows = _mapping(tags).get("models")
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("name"), str)] \
        if isinstance(rows, list) else []


def told_version(answer: Answer) -> str:
    """Return the version that Ollama tells, "" where it does not."""
    version = _mapping(answer.body).get("version")
    return version if isinstance(version, str) else ""


class Registry:
    """What is known of Ollama's models; asked once and remembered for a while."""

    def __init__(self, config: Config, upstream: Upstream, log: Log) -> None:
        self._config, self._upstream, self._log = config, upstream, log
        self._models: Dict[str, Tuple[float, LocalModel]] = {}
        self._version: Tuple[float, str] = (0.0, "")
        self._no_render: Set[str] = set()
        self._gate = Gate(1, 4096)

    def known(self, name: str) -> Optional[LocalModel]:
        """Return the model if it was learned lately."""
        until, model = self._models.get(name, (0.0, None))
        return model if until > time.monotonic() else None

    def model(self, name: str, waiter: Waiter, until: float) -> LocalModel:
        """Return the model, asking Ollama where needed; defaults where it does not tell.

        Raises UpstreamRefusedError where nothing answers, ModelMissingError where
        Ollama says the model is missing.
        """
        model = self.known(name)
        if not model:
            with self._gate.place(waiter):
                model = self.known(name) or self._learn(name, waiter, until)
                if len(self._models) > MAX_MODELS:
                    self._models.clear()
                ttl_s = FACTS_TTL_S if model.facts.path else NO_FACTS_TTL_S
                self._models[name] = (time.monotonic() + ttl_s, model)
        return model

    def _ask(self, path: str, body: Optional[Json], waiter: Waiter, until: float) -> Answer:
        """Ask on the shim's own account; silence and nonsense count as no answer."""
        try:
            return self._upstream.ask(path, to_json(body) if body else None, waiter, until)
        except (UpstreamBrokenError, UpstreamTimeoutError):
            return Answer(0, "")

    def _learn(self, name: str, waiter: Waiter, until: float) -> LocalModel:
        config = self._config
        answer = self._ask("/api/show", {"model": name}, waiter, until)
        raise_if_missing(name, answer)
        shown = answer.body
        facts = facts_from_show(name, shown)
        if answer.status != 200:
            return LocalModel(facts, config.num_ctx, config.num_ctx or 0)
        _, before = self._models.get(name, (0.0, None))
        if before and before.facts.digest == facts.digest and before.window:
            model = before._replace(facts=facts)
        else:
            model = self._choose_window(facts, _mapping(shown).get("model_info"), waiter, until)
        if facts.path == "B" or (facts.path and config.verbatim != "off"):
            answer = self._ask("/api/chat", probe_body(name, load_options(model.num_ctx)),
                               waiter, until)
            rendered = rendered_prompt(answer.text) if answer.status == 200 else None
            if rendered:
                model = model._replace(facts=facts_from_probe(facts, rendered.prompt))
        return model

    def _choose_window(self, facts: ModelFacts, info: Any, waiter: Waiter,
                       until: float) -> LocalModel:
        """Decide the window (SHIM_NUM_CTX) and load the model with it."""
        explicit = self._config.num_ctx
        if explicit:
            window = window_as_set(explicit, facts.trained)
            said = "as set" if window == explicit else \
                f"all that the model was trained for, of the {explicit} that were set"
            return LocalModel(facts, explicit, window, judge_explicit(window)
                              or f"window of {window} tokens, {said}")
        row = self._loaded_row(facts, waiter, until)
        loaded = natural(_mapping(row).get("context_length"))
        if self._config.auto_ctx.lower() == "off" or facts.remote or not facts.path:
            return LocalModel(facts, None, loaded or facts.num_ctx or 0, "window left to Ollama")
        kv_bytes = kv_bytes_per_token(info)
        asked, reason, _ = choose_window(facts.trained, loaded or None, facts.num_ctx, kv_bytes)
        judged = self.load(facts, asked, kv_bytes, waiter, until)
        reason += "; "
        if judged.step_down:
            asked = judged.step_down
            reason += f"{judged.reason}, so {asked} it is: "
            judged = self.load(facts, asked, kv_bytes, waiter, until)
        return LocalModel(facts, asked, judged.window,
                          f"window of {judged.window} tokens: {reason}{judged.reason}")

    def load(self, facts: ModelFacts, num_ctx: int, kv_bytes: Optional[int], waiter: Waiter,
             until: float) -> WindowChoice:
        """Load the model without a prompt (OL 4) and see what came of it."""
        answer = self._ask("/api/generate", {
            "model": facts.name, "options": load_options(num_ctx), "shift": False, "stream": False,
            "keep_alive": keep_alive_value(self._config.keep_alive)}, waiter, until)
        row = self._loaded_row(facts, waiter, until) if answer.status == 200 else None
        if row is None and answer.status < 500:
            return WindowChoice(num_ctx, "not confirmed by /api/ps")
        return judge_window(num_ctx, row, kv_bytes)

    def _loaded_row(self, facts: ModelFacts, waiter: Waiter, until: float) -> Optional[Json]:
        """Find the model in /api/ps, None where it is not loaded."""
        names = (facts.name, facts.name + ":latest")
        rows = model_rows(self._ask("/api/ps", None, waiter, until).body)
        return next((row for row in rows
                     if row["name"] in names or row.get("model") in names), None)

    def amend(self, model: LocalModel) -> None:
        """Remember what a refusal has taught."""
        self._models[model.facts.name] = (time.monotonic() + FACTS_TTL_S, model)

    def forget(self, name: str) -> None:
        """Ask anew next time: the model may have gone or changed."""
        self._models.pop(name, None)

    def version(self, waiter: Waiter, until: float) -> str:
        """Ask Ollama's version; "" where it does not tell."""
        if self._version[0] <= time.monotonic():
            version = told_version(self._ask("/api/version", None, waiter, until))
            self._version = (time.monotonic() + FACTS_TTL_S, version)
        return self._version[1]

    def verbatim(self, request: Request, facts: ModelFacts, waiter: Waiter, until: float) -> bool:
        """Decide whether this turn reads the model's own text.

        Only where prompts are ChatML and rendering was seen to work, on a local model,
        without images that it sees (raw mode takes none, OL 6), and without a schema for an
        answer that begins with thought: raw mode would hold the thought to the schema.
        """
        mode = self._config.verbatim
        if mode == "off" or facts.remote or not facts.chatml \
                or (facts.digest or facts.name) in self._no_render:
            return False
        if request.schema is not None and wants_thinking(request, facts):
            return False
        blocks = (block for message in request.messages for block in message.blocks)
        if not facts.lacks("vision") and any(
                isinstance(block, Image) or getattr(block, "images", ()) for block in blocks):
            return False
        return mode == "on" or new_enough(self.version(waiter, until))

    def no_render(self, facts: ModelFacts, why: str) -> None:
        """Remember that rendering failed for this model; said once in the log."""
        key = facts.digest or facts.name
        if key not in self._no_render:
            self._no_render.add(key)
            self._log.write("warn", f"verbatim is off for {facts.name}: {why}")


VERSION_NUMBER = Pattern(r"v?([0-9]{1,6})\.([0-9]{1,6})")


def raise_if_missing(name: str, answer: Answer) -> None:
    """Raise ModelMissingError where the answer of /api/show says so."""
    error = upstream_error(answer.status, answer.text, name) if answer.status != 200 else None
    if isinstance(error, ModelMissingError):
        raise error


def new_enough(version: str) -> bool:
    """Say whether verbatim was tried with this Ollama: 0.24 or newer, or built from source."""
    match = VERSION_NUMBER.match(version)
    number = tuple(map(int, match.groups())) if match else ()
    return number >= (0, 24) or version.startswith("0.0.0")


# ------------------------------ between the turns ------------------------------

class WrittenTools(NamedTuple):
    """Forwarded tools as a prompt has them; key is what they were made from.

    A template that prints tools gets json, the others text within the system text.
    """

    key: Any = None
    tools: Tuple[Tool, ...] = ()
    json: str = ""
    text: str = ""


def write_tools(sent: Tuple[Tool, ...], slim: bool, facts: ModelFacts, agent: str,
                key: Any) -> WrittenTools:
    """Shorten tools and write their JSON: 8 cost 0.5 ms. agent's line stands in the first."""
    tools = tuple(map(slim_tool, sent)) if slim else sent
    if not tools:
        return WrittenTools(key)
    if agent:
        first = tools[0]._replace(description=f"{agent_line(agent)} {tools[0].description}")
        tools = (first, *tools[1:])
    if facts.tools_in_text:
        return WrittenTools(key, tools, text=tools_as_text(tools))
    return WrittenTools(key, tools, to_json([tool_json(tool, facts.renderer) for tool in tools]))


class Session:
    """What is kept between the turns of one conversation; bounded, lost at the end."""

    latest_tools: ClassVar[WrittenTools] = WrittenTools()  # shared by sessions with the same

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.turns = 0
        self.rescued: Tuple[str, ...] = ()  # ids of the last turn's rescued calls
        self._table: Optional[ToolTable] = None
        self.tools = WrittenTools()  # and messages: what the last prompt had
        self.messages: List[WrittenMessage] = []

    def table(self, request: Request, limit: int) -> ToolTable:
        """Choose the tools, the same as in the last turn while the client's are the same."""
        if request.tool_choice.kind == "none":
            return tool_table(request, limit)
        self._table = tool_table(request, limit, self._table)
        return self._table

    def write_tools(self, table: ToolTable, slim: bool, facts: ModelFacts,
                    agent: str = "") -> WrittenTools:
        """Return the forwarded tools.

        A session's are alike from turn to turn, and mostly those of the other sessions.
        Where they come before the system text, an agent's line stands in the first of them.
        """
        agent = agent if facts.tools_first else ""
        key = (table.sent, slim, facts.renderer, facts.tools_in_text, agent)
        if self.tools.key != key:
            latest = Session.latest_tools
            self.tools = Session.latest_tools = latest if latest.key == key else \
                write_tools(table.sent, slim, facts, agent, key)
        return self.tools


def prompt_segments(tools: Sequence[Tool], messages: Sequence[WrittenMessage],
                    start: int) -> List[Segment]:
    """Name the tools, if any are to be told apart, and the message at start; lump the rest."""
    texts = [(tool.name, to_json(tool_json(tool))) for tool in tools]
    segments = [Segment(f"tools changed at {name}", text, estimate_tokens(text))
                for name, text in texts]
    if start < len(messages):
        role = messages[start].message["role"]
        name = "system text" if role == "system" and not start else f"message {start} ({role})"
        first, *rest = [int(sum(row.size[1])) for row in messages[start:]]
        segments += [Segment(f"{name} changed", messages[start].json, first),
                     Segment("", None, sum(rest))]
    return segments


class RawTurns:
    """Assistant turns as the model wrote them, for the next turn's history (OL 5b)."""

    def __init__(self) -> None:
        self._turns: Dict[Any, str] = {}
        self._chars = 0
        self._lock = threading.Lock()

    def remember(self, key: Any, raw: str) -> None:
        with self._lock:
            self._chars += len(raw) - len(self._turns.pop(key, ""))
            self._turns[key] = raw
            while len(self._turns) > MAX_RAW_TURNS or self._chars > MAX_RAW_CHARS:
                self._chars -= len(self._turns.pop(next(iter(self._turns))))

    def recall(self, session: str, index: int, turn: Message) -> Optional[str]:
        ids = tuple([call.id for call in blocks_of(ToolUse, turn.blocks)])
        text = "".join([block.text for block in blocks_of(Text, turn.blocks)])
        return self._turns.get(self.key(session, index, ids, text))

    @staticmethod
    def key(session: str, index: int, ids: Tuple[str, ...], text: str) -> Any:
        """Tell a turn apart: by its calls' ids, else by its place; and by its text."""
        return (*(ids or (session, index)), text)


class Warmer(Waiter):
    """Load the model, and read the last session's prefix, before a request needs them.

    One token after system text and tools: the real request then reads 140 tokens
    instead of 12,300 (OL 5b). prefix is (path, body) of that reading.
    """

    prefix: Optional[Tuple[str, str]] = None
    _offered = ""
    _reading = False

    def __init__(self, server: ShimServer) -> None:
        self._server = server
        self._lock = threading.Lock()
        self._cancelled, self._canceller = socket.socketpair()

    def offer(self, text: str, make: Callable[[], Tuple[str, str]]) -> None:
        """Take a session's prefix; its request is made only when the text is a new one."""
        if text and text != self._offered:
            self._offered, self.prefix = text, make()

    def start(self) -> None:
        """Warm in the background, unless something runs already."""
        if self._server.config.warm and not self._server.gate.working:
            threading.Thread(target=self._run, daemon=True).start()

    def cancel(self) -> None:
        """A real request came: stop reading, so that it need not wait."""
        if self._reading:
            self._canceller.send(b"x")

    def wait(self, sock: socket.socket, writing: bool, until: float) -> bool:
        """Wait for Ollama until cancel() is called from another thread."""
        left = until - time.monotonic()
        ready = wait_ready((self._cancelled,), (sock,), left) if writing else \
            wait_ready((self._cancelled, sock), (), left)
        if self._cancelled in ready:
            raise ClientGoneError
        return bool(ready)

    def _run(self) -> None:
        if not self._lock.acquire(blocking=False):
            return
        server = self._server
        try:
            until = time.monotonic() + server.config.first_token_timeout_ms / 1000
            known = server.registry.known(server.config.model)
            model = server.registry.model(server.config.model, Waiter(), until)
            if not known:
                server.log.write("info", f"{model.facts.name}: {model.reason or 'ready'}")
            if wait_ready((self._cancelled,), (), 0.0):  # it was meant for an earlier reading
                self._cancelled.recv(READ_BYTES)
            self._reading = True  # before the look: a request cancels what it sees
            if self.prefix and not server.gate.working:
                server.upstream.ask(*self.prefix, self, until)
            elif known and model.num_ctx and not server.gate.working:
                server.registry.load(model.facts, model.num_ctx, None, self, until)
        except ShimError as error:
            server.log.write("warn", error.message)
        except ClientGoneError:
            server.log.write("debug", "warming was cancelled by a request")
        finally:
            self._reading = False
            self._lock.release()


# ------------------------------ one request ------------------------------

class Prompt(NamedTuple):
    """A request translated: its tools, the JSON of its parts, and its size.

    shared is the estimated size in tokens of what the session's last request had too.
    """

    table: ToolTable
    messages_json: str
    tools_json: str
    answers: Tuple[str, ...]
    size: Count
    shared: int
    num_predict: int


# What goes to a client at once: a stream's bytes, which take a sixth of the memory of
# their events, or events that become a whole answer.
Batch = Union[bytes, List[Event]]


class Audience(Waiter):
    """The clients of one running request: its own, and those that joined it.

    Waits for Ollama together with the own client; when that leaves while others
    listen, the request goes on without it (detached).
    """

    def __init__(self, link: ClientLink, stream: bool) -> None:
        self._link = link
        self.listeners: Dict[socket.socket, socket.socket] = {}
        self.sent: Any = bytearray() if stream else []  # all that the batches held
        self.detached = self.ended = False
        self.failure: Optional[ShimError] = None

    def join(self) -> socket.socket:
        """Return a socket that can be read whenever there is news."""
        mine, wake = socket.socketpair()
        wake.setblocking(False)
        self.listeners[mine] = wake
        return mine

    def leave(self, mine: socket.socket) -> None:
        self.listeners.pop(mine).close()
        mine.close()

    def share(self, batch: Batch) -> None:
        self.sent += batch
        self._wake()

    def end(self) -> None:
        self.ended = True
        self._wake()

    def _wake(self) -> None:
        for wake in list(self.listeners.values()):
            with contextlib.suppress(OSError):  # full: it wakes anyway
                wake.send(b"x")

    def wait(self, sock: socket.socket, writing: bool, until: float) -> bool:
        if not self.detached:
            try:
                return self._link.wait(sock, writing, until)
            except ClientGoneError:
                self.detached = True
        while self.listeners:
            if super().wait(sock, writing, min(until, time.monotonic() + FOLLOW_S)):
                return True
            if time.monotonic() >= self._link.tick_at:
                self._link.on_tick()  # those that joined wait, too
            if time.monotonic() >= until:
                return False
        raise ClientGoneError


def is_new_file(ops: Sequence[FileOp], cwd: str) -> bool:
    """Say whether the one file that ops make is known not to exist."""
    return len(ops) == 1 and os.path.isdir(cwd) \
        and not os.path.lexists(os.path.join(cwd, os.path.expanduser(ops[0].path)))


# In a line that may end a turn, and so ask for a rescue: Ollama's last one, however it is
# spaced, and the model's own mark, which some writers of JSON escape.
LAST_SIGNS = (b'"done":true', b'"done": true', b"|>", b"|\\u003e")


class Lent(NamedTuple):
    """A stream in the hands of SharedRelay, its sockets and its way back."""

    exchange: Exchange
    call: UpstreamCall
    turn: Turn
    upstream: socket.socket
    client: socket.socket
    back: threading.Event
    failures: List[BaseException]


make_epoll: Any = getattr(select, "epoll", None)  # Linux has it
EPOLLIN = 1


class SharedRelay:
    """Relays the running answers on one thread while there are many.

    With a thread each, 200 streams spend more on handing the interpreter's lock around
    than on their tokens. So a stream's thread lends it, and sleeps; it has it back for
    all that is no plain token: the end, a client that lags, asks or leaves, a failure,
    a silence. Needs epoll; elsewhere each thread keeps its stream.

    _lock is held for a round of tokens, while paused() and for lending. Nothing may
    wait for anything else while it holds it.
    """

    def __init__(self, stop_signal: socket.socket) -> None:
        self._stop = stop_signal
        self._lock, self._next = threading.Lock(), threading.Lock()
        self.lent: Dict[int, Lent] = {}  # by either socket's descriptor
        self._epoll: Any = None
        self.thread: Optional[threading.Thread] = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Work for a while without the relay, and with no other that does so.

        Two threads at work would wait 5 ms for the interpreter's lock at every send.
        """
        with self._next, self._lock:
            yield

    def carry(self, exchange: Exchange, call: UpstreamCall, turn: Turn) -> None:
        """Have a stream relayed until it needs its own thread, which may be at once."""
        link = exchange.link
        if not call.pollable or not link.calm or exchange.audience.detached or not make_epoll:
            return
        lent = Lent(exchange, call, turn, call.pollable, link.sock, threading.Event(), [])
        with self._lock:
            self._lend(lent)
        while not lent.back.wait(max(0.0, exchange.deadline - time.monotonic())):
            if time.monotonic() >= exchange.deadline:
                with self._lock:
                    self._give_back(lent)
        if lent.failures:
            raise lent.failures[0]

    def _lend(self, lent: Lent) -> None:
        try:
            self._start()
            for sock in (lent.upstream, lent.client):
                self._watch(sock, lent)
        except (OSError, RuntimeError):  # no descriptor or thread is left: it keeps its own
            self._give_back(lent)

    def _start(self) -> None:
        if not self.thread:
            self._epoll = make_epoll()
            self._epoll.register(self._stop, EPOLLIN)
            thread = threading.Thread(target=self._run, daemon=True)
            thread.start()
            self.thread = thread

    def _watch(self, sock: socket.socket, lent: Lent) -> None:
        self.lent[sock.fileno()] = lent
        self._epoll.register(sock, EPOLLIN)

    def _give_back(self, lent: Lent) -> None:
        for sock in (lent.upstream, lent.client):
            if self.lent.get(sock.fileno()) is lent:
                del self.lent[sock.fileno()]
                with contextlib.suppress(OSError):  # where registering failed
                    self._epoll.unregister(sock)
        lent.back.set()

    def _run(self) -> None:
        """Relay until nothing is lent; whatever happens, every stream is given back."""
        try:
            while self._round():
                pass
        finally:
            with self._lock:
                for lent in list(self.lent.values()):
                    self._give_back(lent)
                self._epoll.close()
                self.thread = None

    def _round(self) -> bool:
        """Relay what has come for any stream; False when this thread has no more to do."""
        ready = [fd for fd, _ in self._epoll.poll(IDLE_RELAY_S)]
        with self._lock:
            for fd in ready:
                if fd in self.lent:
                    self._step(self.lent[fd], fd)
            return self._stop.fileno() not in ready and bool(ready or self.lent)

    def _step(self, lent: Lent, fd: int) -> None:
        try:
            stays = fd == lent.upstream.fileno() and lent.exchange.relay_now(lent.call, lent.turn)
        except Exception as problem:  # carry() raises it; one stream's must not end the others
            lent.failures.append(problem)
            stays = False
        if not stays:
            self._give_back(lent)


class Exchange:
    """One Messages request, from the parsed body to the last byte."""

    way = "chat"
    started = False
    first_at = 0.0
    estimate = 1
    window = 0
    turn: Optional[Turn] = None
    left_out: Tuple[str, ...] = ()

    def __init__(self, handler: Handler, request: Request, body_hash: int) -> None:
        self.handler, self.request = handler, request
        self.server, self.link = handler.server, handler.link
        self.config = handler.server.config
        named = handler.http.header("x-claude-code-session-id")
        self.agent = handler.http.header("x-claude-code-agent-id")
        own_id = named + (f"/{self.agent}" if self.agent else "")
        self.session_id = own_id or request.session
        # A known session's request may be joined by its own retry.
        self.key = f"{own_id} {body_hash}" if named else ""
        self.is_compaction = COMPACTION_MARK in last_user_text(request)
        # A side request without tools must not take the conversation's place.
        self.session = self.server.session(self.session_id + ("" if request.tools else " -"))
        self.begun_at = time.monotonic()
        self.silence_s = self.config.timeout_ms / 1000
        self.translator = StreamTranslator(
            "msg_" + fresh_id(), request.model or self.config.model, lambda: "toolu_" + fresh_id())
        self.events: List[Event] = []
        self.model = self.config.model
        self.recalled: List[bool] = []  # earlier answers: as the model wrote them?
        self.notes = [NO_SAFETY_CHECK] if request.safeguards and not self.session.turns else []
        self.audience = Audience(self.link, request.stream)

    @property
    def deadline(self) -> float:
        """When something is due though Ollama sends nothing."""
        return min(self.until, self.link.tick_at)

    def run(self) -> None:
        """Carry the request out; whatever fails is told to the client, and all counted."""
        self.link.on_tick = self._tick
        self.link.tick_at = self.begun_at + FIRST_EVENT_S
        stats = self.server.stats
        self.running = stats.begin(self, self.session_id, self.model, time.time(), "waiting")
        stats.settle(self.session_id, self.session.rescued, self.request)
        outcome = CLIENT_LEFT
        failure: Optional[ShimError] = None
        try:
            self._carry_out()
            outcome = "ok"
        except ClientGoneError:
            self.audience.failure = GivenUpError(
                "The identical request that this one had joined was given up. Ask again.")
            raise
        except Exception as problem:  # a bug, too, must end a begun stream with an error event
            failure = self.audience.failure = self.handler.as_told(problem)
            outcome = outcome_of(failure)
            if not self.audience.detached:
                self._tell(failure)
        finally:
            self.link.stop_ticking()
            self.server.close_joint(self)
            self._record(outcome, failure)
        if self.audience.detached:
            raise ClientGoneError

    def _carry_out(self) -> None:
        answer = local_answer(self.request, self.config)
        if answer:
            self._answer_here(answer)
            return
        leader = self.server.joint(self)
        while leader is not self:
            if self._follow(leader):
                return
            leader = self.server.joint(self)
        with contextlib.ExitStack() as places:
            if self.agent:  # subagents in turn: each switch costs the model a re-read (OL 5b)
                places.enter_context(self.server.side_gate.place(self.audience))
            places.enter_context(self.server.gate.place(self.audience))
            self.running.enter("prefill", time.time())
            self.server.warmer.cancel()
            self._relay()

    def _answer_here(self, answer: LocalAnswer) -> None:
        """Answer without the model: same events, estimated usage."""
        self.way, self.model = "local", answer.rule
        self.estimate = count_request(self.request)
        events = self._begin()
        events += self.translator.translate([TextDelta(answer.text)] if answer.text else [])
        self._send(events + self.translator.finish(
            answer.stop_reason, None, Usage(self.estimate, len(answer.text) // 4 + 1)), last=True)

    def _record(self, outcome: str, failure: Optional[ShimError]) -> None:
        """Count the request and write its line."""
        total_s = time.monotonic() - self.begun_at
        self.session.turns += 1
        record = TurnRecord(
            session=self.session_id, turn=self.session.turns, model=self.model, way=self.way,
            started=time.time() - total_s, total_s=total_s, window=self.window, outcome=outcome,
            first_s=self.first_at - self.begun_at if self.first_at else None,
            notes=tuple(self.notes), left_out=self.left_out)
        if failure:
            record = record._replace(error=failure.message, cure=failure.cure)
        turn = self.turn
        if turn:  # one that joined, or was answered here, made no calls
            finish, usage, calls = turn.finish or Finish(""), turn.usage, turn.calls
            self.session.rescued = tuple(
                one for one, (_, rule) in zip(self.translator.call_ids, calls) if rule)
            record = record._replace(
                prompt_tokens=sum(usage) - usage.output_tokens, output_tokens=usage.output_tokens,
                new_tokens=None if finish.prompt_tokens is None
                else usage.input_tokens + usage.cache_creation_input_tokens,
                cached_tokens=usage.cache_read_input_tokens, prefill_s=finish.prompt_s,
                tokens_per_s=usage.output_tokens / finish.output_s if finish.output_s else 0.0,
                tools=tuple(name for name, _ in calls),
                rescue=",".join(rule for _, rule in calls if rule))
        self.server.note_turn(self, record)
        if turn and self.server.log.on("debug"):
            self.server.log.write("debug", f"answer {turn.raw or turn.answer!r} calls {turn.calls}")

    def _follow(self, leader: Exchange) -> bool:
        """Give this client the whole stream of an identical request that runs already.

        The CLI sends a request again after a timeout; a second prefill of the same prompt
        would wait for the first and then start over. False where the other had just been
        given up, with nothing said yet.
        """
        self.way, self.notes = "joined", ["joined an identical request that was running"]
        seen, mine = 0, leader.audience.join()
        try:
            while True:
                ended = leader.audience.ended
                news = leader.audience.sent[seen:]
                seen += len(news)
                if news:
                    if not self.started:
                        self._open_stream()
                    self._pass_on(bytes(news) if self.request.stream else news)
                if ended:
                    break
                if self.link.wait(mine, False, time.monotonic() + FOLLOW_S):
                    mine.recv(READ_BYTES)
        finally:
            leader.audience.leave(mine)
        failure = leader.audience.failure
        if isinstance(failure, GivenUpError) and not (self.started or self.handler.streaming):
            self.way, self.notes = "chat", []
            return False
        if failure:
            raise failure
        self._pass_on(b"" if self.request.stream else [], last=True)
        return True

    def _relay(self) -> None:
        name = self.model = self.server.local_model(self.request)
        until = time.monotonic() + self.config.first_token_timeout_ms / 1000
        model = self.server.registry.model(name, self.audience, until)
        try:
            self._ask(model, until)
        except ModelMissingError:
            self.server.registry.forget(name)
            raise
        except PromptTooLongError as error:
            if error.loaded and error.maximum < model.window:  # another client loaded it anew
                self.server.registry.amend(model._replace(window=error.maximum))
            if not self.is_compaction or self.started or not self.turn:
                raise
            self._ask(model, until, error.tokens - error.maximum + SUMMARY_TOKENS)
        except BadRequestError as error:
            amended = self._learn_refusal(model, error)
            if not amended or self.started:
                raise
            self._ask(amended, until)

    def _learn_refusal(self, model: LocalModel, error: ShimError) -> Optional[LocalModel]:
        """Take a missing capability from Ollama's refusal: the model was not asked yet."""
        facts = model.facts
        if NO_TOOLS_ERROR.search(error.message) and not facts.tools_in_text:
            facts = facts._replace(tools_in_text=True)
        elif NO_THINKING_ERROR.search(error.message) and not facts.think_refused:
            facts = facts._replace(think_refused=True)
        else:
            return None
        amended = model._replace(facts=facts)
        self.server.registry.amend(amended)
        return amended

    def _ask(self, model: LocalModel, own_until: float, over: int = 0) -> None:
        """Build the body, choose the way, and relay the answer.

        own_until bounds what the shim asks on its own account; over is the number of
        tokens by which a compaction was refused.
        """
        server, facts = self.server, model.facts
        self.window = model.window
        prompt = self._prepare(model, over)
        options = {**load_options(model.num_ctx), "num_predict": prompt.num_predict}
        body = chat_body(self.request, facts, self.config, options,
                         messages_json=prompt.messages_json, tools_json=prompt.tools_json)
        prompt = prompt._replace(messages_json="")  # a long answer need not hold it
        dialect, prefix = ChatDecoder, None
        self.opening = self.unrendered = ""
        if server.registry.verbatim(self.request, facts, self.audience, own_until):
            rendered = self._render(facts, body, prompt.answers, own_until)
            if rendered:
                text = rendered.prompt
                dialect, self.opening = GenerateDecoder, opening_of(text)
                prefix = text[:max(text.find(USER_TURN), 0)]
                if False in self.recalled[-1:]:
                    self.notes.append("the last answer went back in the template's form")
                body = generate_body(self.request, facts, rendered.json, self.config, options)
                del text
            del rendered
        self.way = dialect.way
        if server.log.on("debug"):
            server.log.write("debug", f"history: {sum(self.recalled)} of {len(self.recalled)}"
                                      " answers as the model wrote them")
            server.log.write("debug", f"{dialect.path} {body}")
        thinking = self.opening.rstrip().endswith(THINK_OPEN)
        self.facts, turn = facts, self._make_turn(dialect(facts.name, thinking), prompt)
        self.turn = turn
        until = time.monotonic() + self.config.first_token_timeout_ms / 1000
        with server.upstream.open(dialect.path, body, self.audience, until) as call:
            del body
            self._pump(call, turn, until)
        if self.request.tools and not self.agent:
            self._offer_prefix(facts, options, prefix, prompt.tools_json)
        if turn.finish:
            server.counter.observe(facts.name, prompt.size, turn.finish.prompt_tokens)

    def _offer_prefix(self, facts: ModelFacts, options: Json, prefix: Optional[str],
                      tools_json: str) -> None:
        """Give the warmer what reads system text and tools, and nothing of the turns."""
        options, warmer = {**options, "num_predict": 1}, self.server.warmer
        if prefix is not None:
            warmer.offer(prefix, lambda: ("/api/generate", generate_body(
                self.request, facts, to_json(prefix + USER_TURN), self.config, options)))
            return
        first = next(iter(self.session.messages), None)
        if first and first.message["role"] == "system":
            messages = first.json + ',{"role":"user","content":"."}'
            warmer.offer(first.json, lambda: ("/api/chat", chat_body(
                self.request, facts, self.config, options, messages_json=messages,
                tools_json=tools_json)))

    def _prepare(self, model: LocalModel, over: int = 0) -> Prompt:
        """Translate tools and messages, and fit them to the window.

        A compaction that does not fit, or leaves no room for its summary, is sent with
        old results shortened by over tokens: refusing it would end the session.
        """
        request = self.request
        if over:
            request = request._replace(messages=shorten_results(request.messages, over))
            self.notes.append("old tool results were shortened to fit the compaction request")
        prompt = self._translate(model.facts, request)
        if not model.window:
            return prompt
        may_shorten = self.is_compaction and not over
        answers = sum(message.role == "assistant" for message in request.messages)
        headroom = 0 if self.is_compaction else headroom_tokens(model.window, answers)
        try:
            num_predict = fit(prompt.size.tokens, request.max_tokens, model.window, headroom,
                              prompt.size.margin)
        except PromptTooLongError as error:
            if not may_shorten:
                raise
            return self._prepare(model, error.tokens - error.maximum + SUMMARY_TOKENS)
        if may_shorten and num_predict < min(SUMMARY_TOKENS, request.max_tokens):
            return self._prepare(model, SUMMARY_TOKENS)
        return prompt._replace(num_predict=num_predict)

    def _translate(self, facts: ModelFacts, request: Request) -> Prompt:
        session, counter = self.session, self.server.counter
        with session.lock, self.server.shared.paused():
            before = session.tools, session.messages
            table = session.table(request, self.config.max_tools)
            tools = session.write_tools(table, self.config.prompt == "slim", facts, self.agent)
            names = [tool.name for tool in table.sent]
            if self.agent:
                request = request._replace(system=(agent_line(self.agent), *request.system))
            self.recalled.clear()
            messages = chat_messages(
                request, tools.tools, facts, self._recall, lambda text: self._slim(text, names),
                tools_text=tools.text)
            written, same = write_messages(messages, session.messages, counter)
            session.messages = written
        dropped = [name for name in table.offered if name not in names]
        self.left_out = tuple(dict.fromkeys((*dropped, *self.left_out)))
        if tools is not before[0]:
            same = 0
        if same < len(before[1]) and self.session_id:
            broken = prefix_break(*[
                prompt_segments(row[0].tools if tools is not before[0] else (), row[1], same)
                for row in (before, (tools, written))])
            self.notes += [broken] if broken else []
        sizes = [counter.sizes_of(tools.json), *[row.size for row in written]]
        count = counter.count(facts.name, sizes, sum([len(m.get("images", ())) for m in messages]))
        self.estimate = count.tokens
        tokens = [sum(size) for _, size in sizes]
        shared = count.tokens * sum(tokens[:same + 1]) / max(sum(tokens), 1) if same else 0
        answers = tuple([m["content"] for m in messages if m["role"] == "assistant"])
        return Prompt(table, ",".join([row.json for row in written]), tools.json, answers, count,
                      int(shared), request.max_tokens)

    def _recall(self, index: int, turn: Message) -> Optional[str]:
        """Return an earlier answer as the model wrote it, where that is remembered."""
        raw = self.server.raw_turns.recall(self.session_id, index, turn)
        self.recalled.append(raw is not None)
        return raw

    def _slim(self, text: str, names: Sequence[str]) -> str:
        if self.config.prompt == "full":
            return text
        text, left_out = slim_text(text, names)
        if left_out:
            self.left_out += tuple(left_out)
        if left_out and self.server.log.on("debug"):
            self.server.log.write("debug", f"left out of the prompt: {', '.join(left_out)}")
        return text

    def _render(self, facts: ModelFacts, body: str, answers: Sequence[str],
                until: float) -> Optional[Rendered]:
        """Have Ollama render the prompt; None where it cannot, and chat serves instead."""
        try:
            answer = self.server.upstream.ask("/api/chat", render_body(body), self.audience, until)
        except UpstreamBrokenError as problem:  # chat tells what is wrong, if it lasts
            self.notes.append(f"not verbatim: {problem.message}")
            return None
        rendered = rendered_prompt(answer.text) if answer.status == 200 else None
        if rendered:
            prompt = rendered.prompt if facts.path == "B" else restored(rendered.prompt, answers)
            return rendered if prompt is rendered.prompt else Rendered(prompt, to_json(prompt))
        if answer.status == 200:
            self.unrendered = "Ollama rendered no prompt"
            return None
        error = upstream_error(
            answer.status, answer.text, facts.name, retry_after=answer.retry_after,
            prompt_tokens=self.estimate, window=self.window)
        if isinstance(error, (ModelMissingError, PromptTooLongError)) or \
                NO_TOOLS_ERROR.search(error.message) or NO_THINKING_ERROR.search(error.message):
            raise error
        if answer.status in NO_RENDERING:
            self.unrendered = error.message
        return None  # whatever else is wrong, the chat will meet and tell

    def _make_turn(self, decoder: ChatDecoder, prompt: Prompt) -> Turn:
        table = prompt.table
        tools, text = callable_tools(self.request, table.offered), "text" in self.config.rescue
        return Turn(decoder, self.translator, tools, self.request.stop_sequences,
                    lambda finish, output: self.server.usage(decoder.model, prompt, finish, output),
                    rescue=lambda answer: (written_answer(answer, table.offered) if text else None)
                    or self._rescue(answer, table), text_calls=text)

    def _rescue(self, answer: str, table: ToolTable) -> Optional[Call]:
        """Carry out what was asked or described; at most one verified command."""
        if "intent" not in self.config.rescue or not shell_tool(table.offered):
            return None
        found = find_rescue(self.request.messages, answer)
        if not found:
            return None
        cwd = self._client_folder()
        try:
            call = rescue_call(found.ops, table.offered, self.config.bash_style,
                               self.config.max_read_bytes, cwd, is_new=is_new_file(found.ops, cwd))
        except CannotCarryError as problem:
            self.server.log.write("info", f"no rescue: {problem}")
            return None
        if not call or not bash_parses(call[1].get("command", "")):
            return None
        choice = self.request.tool_choice
        if choice.kind == "tool" and choice.name != call[0]:
            return None
        return Call(call[0], call[1], f"intent:{found.rule}")

    def _client_folder(self) -> str:
        """Return the folder the client works in, where it is surely one of this machine."""
        if not is_loopback(self.config.host):
            return ""
        return working_directory([*self.request.system, *noted_texts(self.request)])

    def _pump(self, call: UpstreamCall, turn: Turn, until: float) -> None:
        """Relay Ollama's answer until the turn is done."""
        call.read_head(until)
        if call.status != 200:
            text = call.read_all(time.monotonic() + self.silence_s).decode("utf-8", "replace")
            raise upstream_error(
                call.status, text, turn.model, retry_after=call.headers.get("retry-after"),
                prompt_tokens=self.estimate, window=self.window)
        self.until, self.kept = until, b""
        while not turn.done:
            data, self.kept = self.kept or call.read(self.until), b""
            self._take(data, turn)
            if self.server.gate.working >= MANY_STREAMS and self.started and not turn.done \
                    and data[-1:] == b"\n" and not turn.scanner.held:
                self.server.shared.carry(self, call, turn)

    def relay_now(self, call: UpstreamCall, turn: Turn) -> bool:
        """Relay what has come, without waiting; False where the own thread must go on."""
        data = call.read_now()
        if data is None or data[-1:] not in (b"", b"\n") or any(
                sign in data for sign in LAST_SIGNS):
            self.kept = data or b""  # what follows the last line may take long: a rescue
            return False
        if data:
            self._take(data, turn)
        more = bool(call.pollable) and not turn.done
        return more and self.link.calm and not turn.scanner.held  # that may be the own mark

    def _take(self, data: bytes, turn: Turn) -> None:
        """Pass on what a piece of Ollama's answer makes; b"" is its end."""
        now = time.monotonic()
        self.until = now + self.silence_s
        self.running.tokens += data.count(b"\n")  # Ollama writes a line for each token
        events = turn.feed(data) if data else turn.close()
        if not self.first_at and turn.heard:  # not the first event, which may be ours
            self.first_at = now
            self.running.enter("writing", time.time())
        if turn.error and not self.started and not events:
            self._refuse(turn.error)
        if not self.started and turn.heard:
            events = self._begin() + events
        if turn.done:  # before the client can send the next turn
            if self.unrendered:  # and chat has served: the rendering is at fault
                self.server.registry.no_render(self.facts, self.unrendered)
            self._remember(turn)
        if events:
            self.link.tick_at = now + KEEP_ALIVE_S
            self._send(events, last=turn.done)
        if turn.error:
            raise turn.error

    def _refuse(self, error: ShimError) -> None:
        """An answer that starts with nonsense: a stream is begun, a whole answer is 502."""
        if not isinstance(error, UpstreamGarbageError):
            raise error
        if not self.request.stream:
            raise UpstreamInvalidError(error.message.replace(
                "an invalid streaming response: not JSON", "invalid JSON"))

    def _remember(self, turn: Turn) -> None:
        """Keep the turn as the model wrote it, unless a rescue or a stop changed it."""
        rescued = any(rule.startswith("intent:") for _, rule in turn.calls)
        if turn.raw is None or rescued or turn.stop_reason == "stop_sequence":
            return
        text = closed_thought(self.opening + turn.raw)
        if text:
            ids = tuple(self.translator.call_ids)
            self.server.raw_turns.remember(RawTurns.key(
                self.session_id, len(self.request.messages), ids, turn.answer), text)

    def _begin(self) -> List[Event]:
        """Open the stream; return its first event, which goes out with those that follow."""
        self._open_stream()
        return [self.translator.start(Usage(self.estimate, 1))]

    def _open_stream(self) -> None:
        self.started = True
        self.link.tick_at = time.monotonic() + KEEP_ALIVE_S
        if self.request.stream and not self.audience.detached:
            self.handler.start_stream("text/event-stream; charset=utf-8")

    def _tick(self) -> None:
        """Keep the client waiting: the first event after 15 s, then one every 10 s."""
        self.link.tick_at = time.monotonic() + KEEP_ALIVE_S
        if self.request.stream:
            if self.way != "joined":
                self._send([self.translator.keep_alive()] if self.started else self._begin())
        elif not self.audience.detached:
            if not self.handler.streaming:
                self.handler.start_stream("application/json")
            self.handler.send_piece(b" ")

    def _send(self, events: List[Event], last: bool = False) -> None:
        batch: Batch = sse(events) if self.request.stream else events
        if self.key:
            self.audience.share(batch)
        try:
            self._pass_on(batch, last)
        except ClientGoneError:
            if not self.audience.listeners:
                raise
            self.audience.detached = True  # as where a wait sees it leave

    def _pass_on(self, batch: Batch, last: bool = False) -> None:
        """Send a batch of a stream, with its end where it is the last; keep others till then."""
        if self.audience.detached:
            return
        if isinstance(batch, bytes):
            self.handler.send_piece(batch, last)
            return
        self.events.extend(batch)
        if not last:
            return
        body = to_json(fold(self.events)).encode()
        if self.handler.streaming:  # spaces have kept the client waiting
            self.handler.send_piece(body, last)
        else:
            self.handler.reply(200, body)

    def _tell(self, error: ShimError) -> None:
        """Tell a failure: an HTTP status before the first byte, an event after it."""
        handler = self.handler
        if not handler.streaming:
            handler.reply_error(error)
        else:
            handler.send_piece(sse([error_event(error)]) if self.request.stream
                               else handler.error_json(error), last=True)


def fresh_id() -> str:
    """Make an id that is unique for ever: the CLI merges turns of one id (CC B4)."""
    return os.urandom(12).hex()


# ------------------------------ requests and routes ------------------------------

class Handler:
    """One client connection: read requests, guard them, route them, answer."""

    http = HttpRequest("GET", "/", "/", "1.1", {})  # until one has come
    keep = True

    def __init__(self, sock: socket.socket, _address: Any, server: ShimServer) -> None:
        self.server = server
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.link = ClientLink(sock, server.stop_signal)
        with contextlib.suppress(ClientGoneError):
            while self.keep:
                self._serve_one()
            self._linger(sock)

    def _linger(self, sock: socket.socket) -> None:
        """Close without a reset that would take the answer from the client."""
        until, stop = time.monotonic() + LINGER_S, self.server.stop_signal
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_WR)
            while wait_ready((sock, stop), (), until - time.monotonic()) == [sock]:
                if not sock.recv(READ_BYTES) or time.monotonic() >= until:
                    break

    def _serve_one(self) -> None:
        """Read and answer one request."""
        self.request_id, self.http = "req_" + fresh_id(), Handler.http
        self.streaming = self.keep = self.link.serving = False
        self._unread = False  # a body that would be taken for the next request
        self.body = self._unsent = b""
        try:
            head = self._read_head()
            self.link.serving = True
            self.http = parse_head(head)
            self._unread = "transfer-encoding" in self.http.headers \
                or self.http.headers.get("content-length", "0") != "0"
            wish = self.http.header("connection").lower()
            self.keep = "close" not in wish if self.http.version != "1.0" else "keep-alive" in wish
            self._guard()
            handle = self._route()
            self.body = self._read_body()
            handle(self)
        except ClientGoneError:
            raise
        except Exception as problem:  # as_told knows errors from bugs; the server goes on
            self.keep = self.keep and not self._unread
            self.reply_error(self.as_told(problem))
        self.link.drain()

    def as_told(self, problem: Exception) -> ShimError:
        """Make what the client is told of a failure: no secrets, and bugs as such."""
        error = problem if isinstance(problem, ShimError) else InternalError(
            "The shim met an internal error; see its log.")
        if isinstance(problem, RecursionError):  # in the body, or what the model made of it
            error = BadRequestError("This is nested too deeply.")
        elif error is not problem:
            trace = late("traceback").format_exc(limit=-3)
            self.server.log.write("error", f"internal error: {problem!r} {trace}")
        error.message = redact(error.message, self._secrets())
        return error

    def _secrets(self) -> Tuple[str, ...]:
        """List what no answer may hold: our secrets and the client's own key."""
        bearer = self.http.header("authorization").rpartition(" ")[2]
        own = (self.http.header("x-api-key"), bearer)
        return (*self.server.secrets, *(text for text in own if len(text) >= MIN_SECRET_CHARS))

    def _read_head(self) -> bytes:
        """Read up to the empty line; raise for what is too long or too slow."""
        link, until = self.link, 0.0
        while True:
            while link.input[:2] == b"\r\n":  # an empty line before a request (RFC 9112 2.2)
                del link.input[:2]
            if not link.input:
                if not link.wait(None, False, time.monotonic() + IDLE_CONNECTION_S):
                    raise ClientGoneError
                continue
            until = until or time.monotonic() + HEAD_PROGRESS_S
            end = link.input.find(b"\r\n\r\n")
            if 0 <= end <= MAX_HEAD_BYTES:
                head = bytes(link.input[:end])
                del link.input[:end + 4]
                return head
            if not b"A" <= link.input[:1] <= b"Z" and link.input[:1] != b"\r":
                raise BadRequestError("This is not HTTP; for TLS, the address begins with http://.")
            if len(link.input) > MAX_HEAD_BYTES:
                raise HeadTooLargeError(f"The request's headers are over {MAX_HEAD_BYTES} bytes.")
            if not link.wait(None, False, until):
                raise SlowRequestError("The request's headers did not arrive in time.")

    def _guard(self) -> None:
        """Refuse foreign hosts, origins and keys before anything is read."""
        config, http = self.server.config, self.http
        host = header_host(http.header("host"))
        if is_loopback(config.host) and (host is None or (host and not is_loopback(host))):
            raise ForbiddenError("This Host is not served here: use localhost or 127.0.0.1.")
        origin = http.header("origin")
        crossing = http.header("sec-fetch-site") == "cross-site" and not config.cors_wildcard
        if crossing or (origin and not self._origin_allowed(origin)):
            raise ForbiddenError("Requests of this Origin are not served.")
        if http.method == "POST" and SIMPLE_TYPES.match(http.header("content-type")):
            raise ForbiddenError("Send JSON as application/json: a web page of any origin can send"
                                 " the type that was given.")
        # The status page asks for the key itself, so that it must be shown without one.
        shown = http.path == "/health" or http.method == "OPTIONS" \
            or (http.path == "/" and self._wants_page())
        if config.api_key and not shown and not self.has_key():
            raise UnauthorizedError("A key is needed here: send SHIM_API_KEY as x-api-key"
                                    " or as Bearer token.")

    def _wants_page(self) -> bool:
        return self.http.method == "GET" and "text/html" in self.http.header("accept")

    def has_key(self) -> bool:
        """Compare in constant time; bytes, since text beyond ASCII would raise."""
        compare = late("hmac").compare_digest
        wanted = self.server.config.api_key.encode("utf-8", "surrogateescape")
        scheme, _, token = self.http.header("authorization").partition(" ")
        given = [self.http.header("x-api-key"), token.strip() if scheme.lower() == "bearer" else ""]
        same = [compare(text.encode("latin-1", "replace"), wanted) for text in given]
        return any(same)

    def _origin_allowed(self, origin: str) -> bool:
        match = ORIGIN.fullmatch(origin)
        host = header_host(match.group(1)) if match else None
        return self.server.config.cors_wildcard or bool(host and is_loopback(host))

    def _route(self) -> Callable[[Handler], None]:
        """Find the row of ROUTES; raise 404 or 405."""
        path, method = self.http.path.removesuffix("/"), self.http.method
        if method == "OPTIONS":
            return Handler.options
        row = ROUTES.get("/v1/models/*" if path.startswith("/v1/models/") else path)
        if not row:
            raise NotFoundError(f"There is no {clean(self.http.path, 100)} here.")
        allow, handle = row
        if method not in allow.split(", "):
            raise MethodNotAllowedError(f"{method} is not possible here, only {allow}.", allow)
        return handle

    def _read_body(self) -> bytes:
        """Read the request's body; raise 4xx for what is not plain, too long or too slow."""
        decoder, link = self._body_decoder(), self.link
        if not decoder.finished and not link.input and self.http.version != "1.0" \
                and self.http.header("expect").lower() == "100-continue":
            link.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        pieces: List[bytes] = []
        size, enough, until = 0, 0, 0.0
        while not decoder.finished:
            if size >= enough:  # so much of it puts the deadline off
                enough, until = size + MIN_PROGRESS_BYTES, time.monotonic() + HEAD_PROGRESS_S
            if pieces and not link.wait(None, False, until):
                raise SlowRequestError("The request's body stopped arriving.")
            try:
                pieces.append(decoder.feed(bytes(link.input)))
            except ValueError as problem:
                raise BadRequestError(f"The chunked body is malformed: {problem}.") from None
            link.input.clear()
            size += len(pieces[-1])
            if size > MAX_BODY_BYTES:
                raise BodyTooLargeError(f"The body is over {MAX_BODY_BYTES} bytes.")
        link.input += decoder.rest
        self._unread = False
        return b"".join(pieces)

    def _body_decoder(self) -> Union[ChunkDecoder, LengthDecoder]:
        """Choose how the body is read: in chunks, or by its length, which may be 0."""
        headers = self.http.headers
        coding, length = headers.get("transfer-encoding"), headers.get("content-length", "0")
        if coding is not None:
            if "content-length" in headers or self.http.version == "1.0":
                raise BadRequestError("Both Content-Length and Transfer-Encoding are given.")
            if coding.lower() != "chunked":
                raise NotImplementedCodingError(
                    f"Transfer-Encoding {clean(coding, 40)!r} is not known.")
            return ChunkDecoder()
        if not CONTENT_LENGTH.fullmatch(length):
            raise BadRequestError(f"Content-Length {clean(length, 40)!r} is no length.")
        if int(length) > MAX_BODY_BYTES:
            raise BodyTooLargeError(f"The body is over {MAX_BODY_BYTES} bytes.")
        return LengthDecoder(int(length))

    def _request(self) -> Request:
        """Take the body as a Messages request; raise 400 with the reason."""
        body, self.body = self.body, b""  # a long answer need not hold it
        try:
            with self.server.shared.paused():
                value = read_body(body)
        except ValueError as problem:
            raise BadRequestError(f"The body is not JSON: {clean(str(problem))}.") from None
        with self.server.shared.paused():
            return parse_request(value)

    def _head(self, status: int, headers: Mapping[str, str]) -> bytes:
        """Write an answer's head; a header without a value is left out."""
        reason = BaseHTTPRequestHandler.responses.get(status, ("Overloaded", ""))[0]
        any_origin, origin = self.server.config.cors_wildcard, self.http.header("origin")
        allowed = "*" if any_origin else origin if self._origin_allowed(origin) else ""
        rows = {**headers, "Access-Control-Allow-Origin": allowed,
                "Vary": "" if any_origin else "Origin", "request-id": self.request_id,
                "Connection": "keep-alive" if self.keep else "close"}
        lines = [f"{name}: {value}\r\n" for name, value in rows.items() if value]
        return f"HTTP/1.1 {status} {reason}\r\n{''.join(lines)}\r\n".encode("latin-1", "replace")

    def reply(self, status: int, body: bytes, kind: str = "application/json",
              headers: Optional[Mapping[str, str]] = None) -> None:
        """Answer with a whole body."""
        size = str(len(body)) if status != 204 else ""
        head = self._head(status, {"Content-Type": kind, "Content-Length": size, **(headers or {})})
        self.link.send(head if self.http.method == "HEAD" else head + body)

    def reply_json(self, value: Any) -> None:
        self.reply(200, to_json(scrub(value, self._secrets())).encode())

    def error_json(self, error: ShimError) -> bytes:
        return to_json(error_body(error, self.request_id)).encode()

    def reply_error(self, error: ShimError) -> None:
        """Answer with the Messages API error object."""
        self.reply(error.status, self.error_json(error), headers={
            "x-should-retry": "" if error.retry else "false", "Allow": getattr(error, "allow", ""),
            "retry-after": clean(error.retry_after or "", 60)})

    def start_stream(self, kind: str) -> None:
        """Send the head of a body of unknown length; HTTP/1.0 gets it until the close."""
        chunked = self.http.version != "1.0"
        self.streaming, self.keep = True, self.keep and chunked
        self._unsent = self._head(200, {"Content-Type": kind, "Cache-Control": "no-cache",
                                        "Transfer-Encoding": "chunked" if chunked else ""})

    def send_piece(self, data: bytes, last: bool = False) -> None:
        """Send a part of the body, which ends with the last; HTTP/1.0 ends by the close."""
        if self.http.version != "1.0":
            chunk = b"%x\r\n%b\r\n" % (len(data), data) if data else b""
            data = chunk + b"0\r\n\r\n" if last else chunk
        data, self._unsent = self._unsent + data, b""
        self.link.send(data)

    # ---- routes ----

    def messages(self) -> None:
        body_hash = hash(self.body)
        Exchange(self, self._request(), body_hash).run()
        self.server.tidy()

    def count_tokens(self) -> None:
        self.reply_json({"input_tokens": count_request(self._request())})

    def models(self) -> None:
        query = late("urllib.parse").parse_qsl(self.http.target.partition("?")[2][:2000])
        self.reply_json(model_page(self.server.model_names(), dict(query)))

    def model(self) -> None:
        name = late("urllib.parse").unquote(self.http.path[len("/v1/models/"):])
        self.reply_json(model_row(clean(name, 200)))

    def health(self) -> None:
        self.reply_json(self.server.health(not self.server.config.api_key or self.has_key()))

    def status(self) -> None:
        """Tell what the status page shows."""
        told = status_json(self.server.stats, self.server.config, self.server.recent_health(),
                           time.time(), self._secrets())
        self.reply(200, to_json(told).encode())

    def metrics(self) -> None:
        text = redact(metrics_text(self.server.stats, self.server.config), self._secrets())
        self.reply(200, text.encode(), "text/plain; version=0.0.4; charset=utf-8")

    def root(self) -> None:
        """Give a browser the status page, everything else a line of text.

        The CLI knocks with HEAD / when it starts (CC A1): time to warm the model, unless a
        key is wanted, which that knock does not bring.
        """
        if self.http.method == "HEAD":
            self.server.warmer.start()
        if self._wants_page():
            self.reply(200, STATUS_PAGE.encode(), "text/html; charset=utf-8", PAGE_HEADERS)
            return
        text = f"qwencode {__version__} is running\n"
        self.reply(200, text.encode(), "text/plain; charset=utf-8")

    def options(self) -> None:
        """Answer a CORS preflight; _guard has refused foreign origins."""
        self.reply(204, b"", "", {
            "Access-Control-Allow-Methods": "GET, HEAD, POST, OPTIONS",
            # What is asked for: Anthropic's SDK sends a dozen headers of its own.
            "Access-Control-Allow-Headers": self.http.header("access-control-request-headers")
            or "content-type, x-api-key, authorization, anthropic-version, anthropic-beta",
            "Access-Control-Max-Age": "600"})


READS, POSTS = "GET, HEAD, OPTIONS", "POST, OPTIONS"
# By path, without a slash at its end: the methods and what answers.
ROUTES: Dict[str, Tuple[str, Callable[[Handler], None]]] = {
    "/v1/messages": (POSTS, Handler.messages),
    "/v1/messages/count_tokens": (POSTS, Handler.count_tokens),
    "/v1/models": (READS, Handler.models), "/v1/models/*": (READS, Handler.model),
    "/health": (READS, Handler.health), "/status": (READS, Handler.status),
    "/metrics": (READS, Handler.metrics), "": (READS, Handler.root), "/v1": (READS, Handler.root),
    "/api/hello": (READS, Handler.root),
}


# The CLI's picker shows ids that begin so, and drops all others (CC A9).
PICKER_PREFIX = "claude-"


def picked_model(requested: str) -> str:
    """Return the local model of a picker's id, "" for Anthropic's own, which have no tag."""
    name = requested[len(PICKER_PREFIX):] if requested.startswith(PICKER_PREFIX) else ""
    return name if ":" in name else ""


def model_row(model_id: str) -> Json:
    """Make a row of /v1/models."""
    picked = picked_model(model_id)
    return {"type": "model", "id": model_id, "created_at": "1970-01-01T00:00:00Z",
            "display_name": f"{picked} (Ollama)" if picked else model_id}


def model_page(names: Sequence[str], query: Mapping[str, str]) -> Json:
    """Make the page of /v1/models that limit, after_id and before_id ask for.

    Each model has its own name and one for the CLI's picker.
    """
    tagged = [name if ":" in name else name + ":latest" for name in names]
    ids = [*names, *dict.fromkeys(PICKER_PREFIX + name for name in tagged)]
    limit = query.get("limit", "")
    most = max(1, min(int(limit), 1000)) if WHOLE_NUMBER.fullmatch(limit) else 1000
    before, after = query.get("before_id"), query.get("after_id")
    if before in ids:
        ids = ids[:ids.index(before)]
    if after in ids:
        ids = ids[ids.index(after) + 1:]
    page = ids[-most:] if before is not None and after is None else ids[:most]
    first, last = (page[0], page[-1]) if page else (None, None)
    return {"data": [model_row(one) for one in page], "has_more": len(page) < len(ids),
            "first_id": first, "last_id": last}


def read_counts(config: Config, log: Log) -> TokenCounter:
    """Read what earlier runs learned of token counts; nothing where there is no file."""
    try:
        return kept_counts(config.counts_file)
    except (OSError, ValueError) as problem:
        log.write("warn", f"SHIM_COUNTS_FILE: {config.counts_file} cannot be read"
                  f" ({reason_of(problem)}): counts are neither taken from it nor kept in it."
                  " Name another file, or remove this one.")
        return TokenCounter()


def kept_counts(path: str) -> TokenCounter:
    """Read a file of counts, if it is there; raise ValueError where it holds something else."""
    if not os.path.exists(path):
        return TokenCounter()
    with open(path, "rb") as file:
        kept = parse_json(file.read() or b"{}")
    counter = TokenCounter.from_json(kept)
    if kept and not counter.models:
        raise ValueError("it holds no token counts")
    return counter


def reason_of(problem: Exception) -> str:
    """Say what is wrong with a file, without Python's numbers and names."""
    return getattr(problem, "strerror", None) or str(problem)


def write_counts(path: str, counter: TokenCounter, log: Log) -> None:
    """Keep what was learned; written beside and moved over, so a crash loses nothing.

    A file that holds something else, named by mistake, stays as it is.
    """
    try:
        kept_counts(path)
        with open(path + ".new", "w", encoding="utf-8") as file:
            json.dump(counter.to_json(), file)
        os.replace(path + ".new", path)
    except (OSError, ValueError) as problem:
        log.write("warn", f"SHIM_COUNTS_FILE: {path} was not written ({reason_of(problem)})")


PAGE_HEADERS = {  # what the page may load stands in the page itself
    "Content-Security-Policy": "frame-ancestors 'none'", "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}


@cache
def heap_trimmer() -> Callable[[], object]:
    """Make what gives freed memory back to the system: malloc_trim, where libc is glibc.

    Compiling this file alone leaves much behind that nothing asks for again: after 20
    requests 28 MB are held and not 50.
    """
    try:
        trim = late("ctypes").CDLL(None).malloc_trim
    except (ImportError, OSError, AttributeError, TypeError):
        return lambda: None
    return lambda: trim(0)


# ------------------------------ the server itself ------------------------------

class ShimServer(ThreadingHTTPServer):
    """The server: one daemon thread for each connection."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 1024
    allow_reuse_address = os.name != "nt"  # on Windows it would let two servers share a port
    _health: Tuple[float, Json] = (0.0, {})
    _last_way: Optional[str] = None  # how the last answer of the model was read
    _tidy_at = 0.0
    _connections = 0

    def __init__(self, config: Config) -> None:
        self.config = config
        self.secrets = secrets_of(config)
        self.log = Log(config)
        self.stop_signal, self._stop_sender = socket.socketpair()
        self.upstream = Upstream(config)
        self.registry = Registry(config, self.upstream, self.log)
        self.gate = Gate(config.max_concurrent, config.max_concurrent)
        self.side_gate = Gate(1, config.max_concurrent)
        self.raw_turns = RawTurns()
        self.stats = Stats(time.time(), threading.Lock())
        self.counter = read_counts(config, self.log)
        self.warmer = Warmer(self)
        self.shared = SharedRelay(self.stop_signal)
        self._rates: Dict[str, float] = {}
        self._joints: Dict[str, Exchange] = {}
        self._lock = threading.Lock()
        self._session_of = lru_cache(MAX_SESSIONS)(lambda key: Session())
        self._idle = threading.Condition()
        if ":" in config.host:
            self.address_family = socket.AF_INET6
        # Handler has the signature that socketserver calls, and none of its base's methods.
        super().__init__((config.host, config.port), Handler)  # type: ignore[arg-type]

    def server_bind(self) -> None:
        """Bind without the name lookup that http.server makes: it may take seconds."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.config.host, self.server_address[1]

    @property
    def url(self) -> str:
        return f"http://{bracketed(self.config.host)}:{self.server_port}"

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Accept until stop(); sleeps in between (socketserver's wakes twice a second)."""
        while self.socket.fileno() >= 0 and self.stop_signal not in wait_ready(
                (self.socket, self.stop_signal), (), 3600.0):
            # The step of socketserver's own loop; typeshed leaves it out.
            self._handle_request_noblock()  # type: ignore[attr-defined]
        self.server_close()  # what still knocks is refused, not left waiting

    def get_request(self) -> Tuple[socket.socket, Any]:
        """Accept; where no file can be opened, wait instead of spinning."""
        try:
            return super().get_request()
        except OSError:
            wait_ready((self.stop_signal,), (), ACCEPT_PAUSE_S)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        with self._idle:
            self._connections += 1
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._idle:
                self._connections -= 1
                self._idle.notify_all()

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Refuse connections beyond what the waiting room and idle clients need."""
        return self._connections < 4 * self.config.max_concurrent + 512

    def handle_error(self, request: Any, client_address: Any) -> None:
        self.log.write("error", f"connection failed: {sys.exc_info()[1]!r}")

    def stop(self) -> None:
        """Stop accepting and tell every running stream; returns at once."""
        with contextlib.suppress(OSError):
            self._stop_sender.send(b"x")

    def finish(self, timeout_s: float = DRAIN_S) -> None:
        """Wait until the connections have ended, at most timeout_s, then close."""
        with self._idle:
            self._idle.wait_for(lambda: not self._connections, timeout_s)
        self.server_close()
        if self.config.counts_file:
            write_counts(self.config.counts_file, self.counter, self.log)

    def tidy(self) -> None:
        """Give memory back after a turn, now and then, when no other runs."""
        now = time.monotonic()
        if now >= self._tidy_at and not self.gate.working:
            self._tidy_at = now + TIDY_S
            heap_trimmer()()

    def session(self, key: str) -> Session:
        """Return the conversation's session; the least recently used go first."""
        with self._lock:
            return self._session_of(key)

    def local_model(self, request: Request) -> str:
        """Choose the model: by kind, the picker's, SHIM_MODEL_MAP by role, the request's own."""
        requested = request.model
        if self.config.small_model and is_title_request(request):
            return self.config.small_model
        picked = picked_model(requested)
        mapped = dict(self.config.model_map)
        if picked or requested in mapped.values():
            return picked or requested
        for role, model in mapped.items():
            if role in requested.lower():
                return model
        if self.config.use_requested_model and requested:
            return requested
        return self.config.model

    def usage(self, model: str, prompt: Prompt, finish: Finish, output: int) -> Usage:
        """Split a turn's prompt into new and cached tokens, as far as can be told.

        The fastest read of a prompt that shared nothing gives the speed without a cache.
        """
        tokens = finish.prompt_tokens or prompt.size.tokens
        if not prompt.shared and finish.prompt_s > MIN_MISS_S:
            self._rates[model] = max(self._rates.get(model, 0.0), tokens / finish.prompt_s)
        shared = prompt.shared * tokens // max(prompt.size.tokens, 1)
        fresh, read, created = cache_usage(tokens, shared, finish.prompt_s, self._rates.get(model))
        return Usage(fresh, output, read, created)

    def note_turn(self, exchange: Exchange, record: TurnRecord) -> None:
        """Count a request that has ended and write its line."""
        if record.way in (ChatDecoder.way, GenerateDecoder.way):
            self._last_way = record.way
        self.stats.end(exchange, record)
        self.log.turn(record)

    def joint(self, exchange: Exchange) -> Exchange:
        """Return the running request that is identical to this one, or this one."""
        if not exchange.key:
            return exchange
        with self._lock:
            return self._joints.setdefault(exchange.key, exchange)

    def close_joint(self, exchange: Exchange) -> None:
        with self._lock:
            if self._joints.get(exchange.key) is exchange:
                del self._joints[exchange.key]
        exchange.audience.end()

    def model_names(self) -> List[str]:
        """List the configured model and what Ollama has."""
        names = [self.config.model]
        with contextlib.suppress(ShimError):
            names += [row["name"] for row in model_rows(self.upstream.ask(
                "/api/tags", None, Waiter(), time.monotonic() + HEALTH_S).body)]
        return [*dict.fromkeys(names)]

    def recent_health(self) -> Json:
        """Return what health() said in the last seconds: the page asks every second."""
        if time.monotonic() > self._health[0]:
            self._health = (time.monotonic() + HEALTH_TTL_S, self.health(True))
        return self._health[1]

    def health(self, full: bool) -> Json:
        """Tell how things are, within a second; without the key only up or down."""
        upstream: Json = {"url": self.upstream.url, "reachable": False}
        model: Json = {"name": self.config.model, "present": None}
        try:
            until, waiter = time.monotonic() + HEALTH_S, Waiter()  # the client may half-close
            answer = self.upstream.ask("/api/version", None, waiter, until)
            upstream.update(reachable=True, version=told_version(answer) or None)
            name = self.config.model
            show = self.upstream.ask("/api/show", to_json({"model": name}), waiter, until)
            facts, known = facts_from_show(name, show.body), self.registry.known(name)
            window = known.window if known else window_as_set(self.config.num_ctx, facts.trained)
            model.update(capabilities=sorted(facts.capabilities or ()), way=self._last_way,
                         context_length=facts.trained, window=window or None)
            if show.status != 200:
                raise upstream_error(show.status, show.text, name)
            model["present"] = True
        except ShimError as error:
            if isinstance(error, ModelMissingError):
                model["present"] = False
            upstream["error"] = redact(error.message, self.secrets)
        ok = bool(upstream["reachable"])
        if not full:
            return {"ok": ok, "status": "ok" if ok else "down"}
        return {"ok": ok, "status": "degraded" if "error" in upstream else "ok",
                "shim": "qwencode", "version": __version__, "upstream": upstream, "model": model,
                "requests": dict(zip(("working", "waiting"), self.gate.load))}


def find_bash(env: Env) -> str:
    """Find the bash that Claude Code runs: on Windows Git's, looked for where it looks.

    Never that of WSL, which is there, and fails, where no Linux is installed.
    """
    which, path = late("shutil").which, env.get("PATH")
    if os.name != "nt":
        return which("bash", path=path) or ""
    git = os.path.dirname(os.path.dirname(which("git", path=path) or ""))
    places = (env.get("CLAUDE_CODE_GIT_BASH_PATH", ""), r"C:\Program Files\Git\bin\bash.exe",
              r"C:\Program Files (x86)\Git\bin\bash.exe", os.path.join(git, "bin", "bash.exe"))
    return next((bash for bash in places if os.path.isabs(bash) and os.path.isfile(bash)), "")


@lru_cache(maxsize=256)
def bash_parses(command: str) -> bool:
    """Run `bash -n` on a command, bounded; True where there is no bash to ask."""
    subprocess, bash = late("subprocess"), find_bash(os.environ)
    if not bash or not command:
        return True
    try:
        done = subprocess.run([bash, "-n"], input=command.encode("utf-8", "replace"), check=False,
                              capture_output=True, timeout=BASH_CHECK_S)
    except (OSError, subprocess.TimeoutExpired):
        return True
    return bool(done.returncode == 0)


# ============================== 17. CLI ==============================
# Each command takes the configuration, its own arguments and the environment, and returns
# an exit code. A ConfigError or ShimError that it raises is told in one line by main.


def say(text: str) -> None:
    print(text, flush=True)


def tell(text: str, end: str = "\n") -> None:
    """Say something beside a command's output."""
    print(text, end=end, file=sys.stderr, flush=True)


def open_server(config: Config) -> ShimServer:
    """Bind; raise ConfigError with what to do where that is not possible."""
    if not is_loopback(config.host) and not config.api_key:
        raise ConfigError(f"HOST: {config.host!r} is reachable by others; set SHIM_API_KEY"
                          " to a long random text, or keep HOST=127.0.0.1")
    try:
        return ShimServer(config)
    except OSError as problem:
        if problem.errno == errno.EADDRINUSE:
            raise ConfigError(f"PORT: {config.port} on {config.host} is in use; stop the other"
                              " program or choose another port with --port") from None
        raise ConfigError(f"HOST and PORT: cannot listen on {config.host}:{config.port}"
                          f" ({reason_of(problem)}); choose others: --host, --port") from None


@contextlib.contextmanager
def running_server(config: Config) -> Iterator[ShimServer]:
    """Serve beside this program, on a free port of loopback, until the block ends."""
    server = open_server(config._replace(host="127.0.0.1", port=0))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join(DRAIN_S)
        server.finish(1.0)


def shim_at(url: str, config: Config) -> Upstream:
    """Make a client of a shim that has the configuration's key."""
    return Upstream(config._replace(base_url=url, auth_token=config.api_key))


def raise_descriptor_limit() -> None:
    """Allow as many open files as many clients need: macOS starts with 256."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # not on Windows
        resource = late("resource")
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(MAX_DESCRIPTORS, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def on_signals(names: Sequence[str], act: Callable[[int], None]) -> None:
    """Call act with the number of any of these signals; no system has all of them."""
    signal = late("signal")
    for name in names:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda number, _frame: act(number))


def run_serve(config: Config, args: Any, env: Env) -> int:
    """Serve until SIGTERM or Ctrl-C; 0 and 130."""
    raise_descriptor_limit()
    server = open_server(config)
    ended: List[int] = []

    def end(number: int) -> None:
        if ended:
            os._exit(130)
        ended.append(number)
        server.stop()

    on_signals(("SIGINT", "SIGTERM", "SIGBREAK"), end)
    say(f"qwencode {__version__} on {server.url} -> {server.upstream.url} model {config.model}")
    server.warmer.start()
    server.serve_forever()
    server.finish()
    return 130 if late("signal").SIGINT in ended else 0


# ------------------------------ demo and try ------------------------------

DEMO_TOOLS = [{"name": "Write", "description": "Write a file", "input_schema": {
    "type": "object", "required": ["file_path", "content"],
    "properties": {"file_path": {"type": "string"}, "content": {"type": "string"}}}}]
DEMO_CALL = """I will write the file.
<tool_call>
{"name": "Write", "arguments": {"file_path": "hello.txt", "content": "Hello from the demo.\\n"}}
</tool_call>"""


def stand_in_answer(handler: Any) -> None:
    """Play Ollama and the model: first a call written as text, then a closing sentence."""
    body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
    if handler.path != "/api/chat":
        handler.send_error(404)  # the shim serves with defaults then
        return
    after_result = body["messages"][-1]["role"] == "tool"
    text = "The file is there now: hello.txt." if after_result else DEMO_CALL
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(to_json({
        "model": body["model"], "message": {"role": "assistant", "content": text}, "done": True,
        "done_reason": "stop", "prompt_eval_count": 40, "eval_count": 20}).encode())


def demo_turn(shim: Upstream, messages: List[Json]) -> Json:
    """Send one Messages request over HTTP, print its events, return the folded message."""
    answer = shim.ask("/v1/messages", to_json({
        "model": "demo", "max_tokens": 1000, "stream": True, "messages": messages,
        "tools": DEMO_TOOLS}), Waiter(), time.monotonic() + 30)
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    for line in lines:
        say("    " + clean(line, 110))
    return fold([Event(payload["type"], payload) for payload in map(json.loads, lines)])


def demo_conversation(shim: Upstream, folder: str) -> bool:
    """Carry one tool call through; return whether it came to its end."""
    question = "Write hello.txt with a greeting."
    say(f"1. Claude Code would ask:  {question}")
    say("   The model writes its tool call as plain text; the events that come back:")
    content = demo_turn(shim, [{"role": "user", "content": question}])["content"]
    call = next((block for block in content if block["type"] == "tool_use"), None)
    if call is None:
        say("The tool call was not found: the demo failed.")
        return False
    say(f"\n2. That is a real {call['name']} call; the demo runs it in a temporary folder:")
    path = os.path.join(folder, os.path.basename(call["input"]["file_path"]))
    with open(path, "w+", encoding="utf-8") as file:
        file.write(call["input"]["content"])
        file.seek(0)
        say(f"   hello.txt now holds {file.read()!r}")
    say("\n3. The tool's result goes back, and the answer comes:")
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": "File created"}
    final = demo_turn(shim, [
        {"role": "user", "content": question}, {"role": "assistant", "content": content},
        {"role": "user", "content": [result]}])
    say(f"   -> {final['content'][0]['text']}")
    return bool(final["stop_reason"] == "end_turn")


def run_demo(config: Config, args: Any, env: Env) -> int:
    """Show the shim at work, a stand-in for the model behind it."""
    http = late("http.server")
    handler = type("StandIn", (http.BaseHTTPRequestHandler,), {
        "do_POST": stand_in_answer, "log_message": lambda *_: None})
    say("qwencode demo. The answers are canned: a stand-in plays Ollama and the model, so that")
    say("this runs anywhere. The server, the translation and the rescue are the real ones.\n")
    with http.ThreadingHTTPServer(("127.0.0.1", 0), handler) as model, \
            late("tempfile").TemporaryDirectory() as folder:
        threading.Thread(target=model.serve_forever, daemon=True).start()
        config = load_config({"base_url": f"http://127.0.0.1:{model.server_port}", "model": "demo",
                              "verbatim": "off", "warm": "off", "log": "error"}, {})
        with running_server(config) as server:
            done = demo_conversation(shim_at(server.url, config), folder)
        model.shutdown()
    say("\nNext, for the real thing: start Ollama, `ollama pull qwen2.5-coder:14b`, install Claude")
    say("Code with `npm install -g @anthropic-ai/claude-code`, and in your project:")
    say(f'  python "{os.path.abspath(__file__)}" claude')
    return 0 if done else 1


def run_try(config: Config, args: Any, env: Env) -> int:
    """Carry out one request here, as the rescue would; return the command's exit code."""
    found = find_rescue((Message("user", (Text(" ".join(args.request)),)),), "I'll do that now.")
    if not found:
        say("No rescue: these words are not one clear file operation inside this folder, so the"
            " shim would not act. Name the file, and put its content in quotes.")
        return 1
    try:
        command, in_short = commands_for(found.ops, config.bash_style, config.max_read_bytes)
    except CannotCarryError as problem:
        say(f"No rescue: {problem}")
        return 1
    say(f"rule: {found.rule}\n{in_short}\n\n{command}\n")
    if args.dry_run:
        return 0
    bash, subprocess = find_bash(env), late("subprocess")
    if not bash:
        say("There is no bash here to run it; on Windows install Git Bash.")
        return 1
    code = int(subprocess.call([bash, "-c", command], stdin=subprocess.DEVNULL))
    say(f"exit code {code}: {'not done' if code else 'done and verified'}")
    return code


# ------------------------------ Claude Code ------------------------------

CLAUDE_MISSING = ("Claude Code is not installed. Install Node.js 18 or newer (https://nodejs.org),"
                  " then run: npm install -g @anthropic-ai/claude-code")
# Switches that make Claude Code talk to somebody else than ANTHROPIC_BASE_URL.
CLOUD_SWITCHES = ("CLAUDE_CODE_USE_BEDROCK", "CLAUDE_CODE_USE_VERTEX", "CLAUDE_CODE_USE_FOUNDRY",
                  "CLAUDE_CODE_USE_GATEWAY")
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
# What makes Claude Code quiet and its requests small and constant (CC A10, F1, F3; OL 9).
CLIENT_SETTINGS = {
    "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",  # else the prompt's first line changes
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "CLAUDE_CODE_DISABLE_EXPERIMENTAL_BETAS": "1",  # tools inline and constant, a 400 sent once
    "CLAUDE_CODE_TOTAL_TOKENS_REMINDER": "off",  # else a system message in every turn
    "CLAUDE_CODE_DISABLE_FEEDBACK_SURVEY": "1",
    "DISABLE_FEEDBACK_COMMAND": "1",
    "DISABLE_ERROR_REPORTING": "1",
    "DISABLE_TELEMETRY": "1",
    "API_TIMEOUT_MS": "3600000",  # the shim has deadlines of its own
}
DEFAULT_CLIENT_KEY = "qwencode"
# A mode named by the user; as options Claude Code knows them.
MODE_OPTION = Pattern(r"--(?:permission-mode|dangerously-skip-permissions)(?:=.*)?")
PRINT_OPTIONS = {"-p", "--print", "-v", "--version", "-h", "--help"}


def client_env(base_url: str, key: str, config: Config, window: int) -> Env:
    """Make the variables of a Claude Code that talks to the shim at base_url.

    The key goes as a Bearer token: an API key would be asked about in a dialog whose
    default is no (CC A11). window is in tokens, 0 where it is not known.
    """
    roles = dict(config.model_map)
    return {"ANTHROPIC_BASE_URL": base_url, "ANTHROPIC_AUTH_TOKEN": key or DEFAULT_CLIENT_KEY,
            "ANTHROPIC_API_KEY": "", "ANTHROPIC_MODEL": config.model,
            "CLAUDE_CODE_SUBAGENT_MODEL": config.model, **CLIENT_SETTINGS,
            **{f"ANTHROPIC_DEFAULT_{role.upper()}_MODEL": roles.get(role, config.model)
               for role in ("opus", "sonnet", "haiku")},
            **(compact_env(window) if window else {})}


def child_env(made: Env, env: Env) -> Env:
    """Lay made under the environment, which keeps what the user set.

    Not kept: where to send to and with which key, what would lead past the shim, and a
    NO_PROXY that would send loopback requests to a proxy.
    """
    ours = ("ANTHROPIC_BASE_URL", "ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_API_KEY", *CLOUD_SWITCHES)
    child = {**made, **{name: text for name, text in env.items() if text and name not in ours}}
    if not covers_loopback(env):
        child["NO_PROXY"] = child["no_proxy"] = f"{no_proxy(env)},127.0.0.1,localhost".lstrip(",")
    return child


def no_proxy(env: Env) -> str:
    return env.get("NO_PROXY") or env.get("no_proxy") or ""


def covers_loopback(env: Env) -> bool:
    """Tell whether NO_PROXY keeps loopback requests away from a proxy."""
    names = no_proxy(env).replace(" ", "").split(",")
    return "*" in names or {"127.0.0.1", "localhost"} <= set(names)


def claude_arguments(passed: Sequence[str], settings: Mapping[str, Any]) -> List[str]:
    """Add --permission-mode default, unless the user named a mode.

    Claude Code's own default, auto, asks Anthropic's servers to judge each action;
    nothing else can answer for them (CC F2).
    """
    chosen = _mapping(settings.get("permissions")).get("defaultMode")
    if any(map(MODE_OPTION.fullmatch, passed)) or (chosen and chosen != "auto"):
        return list(passed)
    return ["--permission-mode", "default", *passed]


def claude_settings(env: Env) -> Json:
    """Read Claude Code's settings, the project's over the user's; {} where there are none."""
    merged: Json = {}
    home = env.get("CLAUDE_CONFIG_DIR") or os.path.join(home_of(env), ".claude")
    for path in (f"{home}/settings.json", ".claude/settings.json", ".claude/settings.local.json"):
        for name, value in read_mapping(path).items():
            both = isinstance(value, dict) and isinstance(merged.get(name), dict)
            merged[name] = {**merged[name], **value} if both else value
    return merged


def read_mapping(path: str) -> Json:
    """Read a JSON object from a file; {} where there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            return _mapping(json.load(file))
    except (OSError, ValueError):
        return {}


def home_of(env: Env) -> str:
    return env.get("USERPROFILE" if os.name == "nt" else "HOME") or os.path.expanduser("~")


def find_claude(env: Env) -> str:
    """Find the claude program on PATH or where its installer puts it; "" if nowhere."""
    home = home_of(env)
    places = (env.get("PATH"), f"{home}/.local/bin", f"{home}/.claude/local")
    return next(filter(None, (late("shutil").which("claude", path=place) for place in places)), "")


def ease_first_run(passed: Sequence[str], env: Env) -> None:
    """Spare a new user Claude Code's welcome, which fails without network (CC A11).

    Only where Claude Code has no file yet; one that is there is never touched, and the
    way out is said.
    """
    if PRINT_OPTIONS.intersection(passed):
        return
    folder = env.get("CLAUDE_CONFIG_DIR") or home_of(env)
    path = os.path.join(folder, ".claude.json")
    try:
        os.makedirs(folder, exist_ok=True)
        with open(path, "x", encoding="utf-8") as file:
            json.dump({"hasCompletedOnboarding": True}, file)
    except FileExistsError:
        there = read_mapping(path)
        if there and not there.get("hasCompletedOnboarding"):
            tell("Claude Code will greet you first, which needs the internet. Without it, add"
                 f' "hasCompletedOnboarding": true to {path}.')
    except OSError as problem:
        tell(f"{path} could not be written: {problem.strerror}")


def run_child(command: Sequence[str], env: Env) -> int:
    """Run a program on this terminal; return its exit code, 128 + n after signal n.

    Ctrl-C reaches the child from the terminal itself, so that it is only survived here;
    a SIGTERM is passed on.
    """
    child = late("subprocess").Popen(list(command), env=dict(env))
    on_signals(("SIGINT", "SIGBREAK"), lambda number: None)
    on_signals(("SIGTERM", "SIGHUP"), child.send_signal)
    code = int(child.wait())
    return code if code >= 0 else 128 - code


def claude_command(made: Env, passed: Sequence[str], env: Env) -> Tuple[List[str], Env]:
    """Return the command line and environment of Claude Code, and say what is special."""
    for name in CLOUD_SWITCHES:
        if env.get(name):
            tell(f"{name} is left out for Claude Code: it would lead past the shim.")
    ease_first_run(passed, env)
    return ([find_claude(env), *claude_arguments(passed, claude_settings(env))],
            child_env(made, env))


def ask_shim(url: str, path: str, config: Config) -> Json:
    """Ask a shim something within a second; {} where none answers."""
    if not BASE_URL.fullmatch(url):  # HOST may be what no URL can name
        return {}
    try:
        answer = shim_at(url, config).ask(path, None, Waiter(), time.monotonic() + 1.0)
    except ShimError:
        return {}
    return _mapping(answer.body) if answer.status == 200 else {}


def planned_window(config: Config) -> int:
    """Return the window that a shim with this configuration will ask for at least."""
    return config.num_ctx or (0 if config.auto_ctx == "off" else SERVING_WINDOW)


def env_of_shim(url: str, config: Config, args: Any, env: Env) -> Tuple[bool, Env]:
    """Tell whether a shim answers at url, and make Claude Code's variables for it.

    Its own window and model count, but for a model that the user named here.
    """
    health = ask_shim(url, "/health", config)
    model = _mapping(health.get("model"))
    if isinstance(model.get("name"), str) and not env.get("OLLAMA_MODEL") and "model" not in args:
        config = config._replace(model=model["name"])
    window = natural(model.get("window")) or planned_window(config)
    return bool(health), client_env(url, config.api_key, config, window)


def local_url(config: Config) -> str:
    """Return where a client on this machine reaches the shim."""
    return f"http://{bracketed(CONNECTABLE.get(config.host, config.host))}:{config.port}"


def run_client(config: Config, args: Any, env: Env) -> int:
    """Start Claude Code against a shim that runs already."""
    named = args.url or ("" if env.get("HOST") or env.get("PORT")
                         else env.get("ANTHROPIC_BASE_URL", ""))
    if named and not BASE_URL.fullmatch(named):
        raise ConfigError("the address of the shim is not a URL such as http://127.0.0.1:8000;"
                          " it comes as an argument or as ANTHROPIC_BASE_URL")
    url = named.rstrip("/") or local_url(config)
    key = args.key or config.api_key or env.get("ANTHROPIC_AUTH_TOKEN") \
        or env.get("ANTHROPIC_API_KEY") or ""
    there, made = env_of_shim(url, config._replace(api_key=key), args, env)
    if not there:
        tell(f"Nothing answers at {url} yet: start ./launch-shim.sh (or python qwencode.py)."
             " Claude Code is started all the same.")
    tell(f"Claude Code -> {url}")
    return run_child(*claude_command(made, args.passed, env))


SHELLS = {
    "bash": ("export {name}={value}", "unset {name}", ("'", "'\\''")),
    "fish": ("set -gx {name} {value}", "set -e {name}", ("'", "\\'")),
    "powershell": ("$env:{name} = {value}",
                   "Remove-Item Env:{name} -ErrorAction SilentlyContinue", ("'", "''")),
}


def export_lines(made: Env, shell: str) -> List[str]:
    """Write the variables in a shell's own words; what leads past the shim is unset."""
    setting, removing, quotes = SHELLS[shell]
    lines = [removing.format(name=name) for name in CLOUD_SWITCHES]
    for name, value in sorted(made.items()):
        text = value.replace("\\", "\\\\") if shell == "fish" else value
        lines.append(setting.format(name=name, value=f"'{text.replace(*quotes)}'"))
    return lines


def run_env(config: Config, args: Any, env: Env) -> int:
    """Print the variables for a shell: eval "$(python qwencode.py env)"."""
    windows = os.name == "nt" and not env.get("MSYSTEM")  # set in Git Bash
    usual = "fish" if env.get("SHELL", "").endswith("fish") else "bash"
    shell = args.shell or args.named_shell or ("powershell" if windows else usual)
    _, made = env_of_shim(local_url(config), config, args, env)
    say("\n".join(export_lines(made, shell)))
    return 0


# ------------------------------ doctor: verdicts ------------------------------
# Each takes what was seen and judges it, without I/O.

class Finding(NamedTuple):
    """One line of `doctor`: ok is ok, warn, bad or skip; cure says what to do."""

    ok: str
    line: str
    cure: str = ""


class Loaded(NamedTuple):
    """A loaded model: window in tokens, bytes in all and in graphics memory, load time."""

    window: int = 0
    size: int = 0
    size_vram: int = 0
    seconds: float = 0.0

    @property
    def share(self) -> str:
        """Say how much of it is in graphics memory; "" where that is not known."""
        share = 100 * min(self.size_vram, self.size) // max(self.size, 1)
        return f"{share} % of {self.size / 1e9:.1f} GB in graphics memory" if self.size else ""


# What Ollama below a version lacks (contract: in which version each came).
OLLAMA_SINCE: Tuple[Tuple[Tuple[int, ...], str], ...] = (
    ((0, 6, 4), "does not tell what a model can do (0.6.4 does)"),
    ((0, 9, 0), "does not keep thinking apart from the answer (0.9.0 does)"),
    ((0, 11, 5), "does not render prompts for us, so its parser may lose calls (0.11.5 does)"),
    ((0, 12, 10), "gives tool calls no ids (0.12.10 does)"),
    ((0, 30, 0), "refuses a prompt that is too long without saying by how much (0.30.0 says)"),
)
OLLAMA_MISCOUNTS = (0, 30, 0)  # exactly this one reports only the tokens it read anew
TESTED_CLAUDE = ((2, 1, 197), (2, 1, 330))
THREE_NUMBERS = Pattern(r"([0-9]{1,6})\.([0-9]{1,6})\.([0-9]{1,6})")
SLOW_TOKENS_PER_S = 5.0  # an answer of 300 tokens takes a minute
SLOW_FIRST_ANSWER_S = 60.0  # people think that it hangs
SLOW_CANCEL_S = 5.0  # Ollama looks for departed clients once a second while it reads
UPDATE_OLLAMA = "Update Ollama (https://ollama.com/download)."
SEE_OLLAMA = "See `ollama ps` and Ollama's log."
BETTER_MODEL = "Choose a model that is good at tools, such as qwen3-coder (OLLAMA_MODEL)."


def judge(good: str, *faults: Tuple[object, str, str, str]) -> Finding:
    """Return the first fault whose condition holds, or else that all is good.

    A fault is its condition, warn or bad, the line, and the cure.
    """
    return next((Finding(ok, line, cure) for holds, ok, line, cure in faults if holds),
                Finding("ok", good))


def version_of(text: str) -> Tuple[int, ...]:
    """Read the first x.y.z of a text; () where there is none."""
    found = THREE_NUMBERS.search(text)
    return tuple(map(int, found.groups())) if found else ()


def dotted(version: Iterable[int]) -> str:
    return ".".join(map(str, version))


def verdict_ollama(url: str, status: int, version: str) -> Finding:
    """Judge the answer of /api/version."""
    number, line = version_of(version), f"Ollama {version} at {url}"
    lacks = [text for since, text in OLLAMA_SINCE if (0, 0, 0) < number < since]
    if number == OLLAMA_MISCOUNTS:
        lacks.append("miscounts prompts (only this version)")
    return judge(
        line, (status != 200 or not version, "warn",
               f"{url} answers HTTP {status} but does not say that it is Ollama",
               "Check OLLAMA_BASE_URL."),
        (lacks, "warn", f"{line} {'; '.join(lacks)}", UPDATE_OLLAMA))


def verdict_model(name: str, present: bool, others: Sequence[str]) -> Finding:
    """Judge whether the model is there; others are the models that are."""
    instead = f", or set OLLAMA_MODEL to one of: {', '.join(others[:6])}" if others else ""
    return judge(
        f"model {name}",
        (name.endswith((":cloud", "-cloud")), "bad",
         f"{name} runs in Ollama's cloud: prompts would leave this machine",
         "Choose a local model (OLLAMA_MODEL)."),
        (not present, "bad", f"Ollama does not have {name}", f"Run `ollama pull {name}`{instead}."))


def verdict_capabilities(capabilities: Sequence[str]) -> Finding:
    """Judge what the model says it can do; empty where Ollama does not tell."""
    can = ", ".join(capabilities)
    return judge(
        f"capabilities: {can}",
        (not can, "warn", "Ollama does not tell what the model can do", UPDATE_OLLAMA),
        ("completion" not in capabilities, "bad", f"the model cannot chat, only: {can}",
         BETTER_MODEL),
        ("tools" not in capabilities, "warn",
         f"the model has no tool support of its own, only: {can}",
         f"Calls are read from its text instead. {BETTER_MODEL}"))


def verdict_window(trained: int, asked: int, real: int) -> Finding:
    """Judge the window in tokens; 0 is unknown."""
    known = (("real", real), ("asked for", asked), ("trained", trained))
    line = "context window: " + (", ".join(
        f"{count:,} {word}" for word, count in known if count) or "unknown")
    window = real or asked
    small = window and judge_explicit(window)
    return judge(
        line, (small and 0 < trained < SERVING_WINDOW, "bad",
               f"{line}; the model was trained for too little", BETTER_MODEL),
        (small, "bad", f"{line}; {small}", f"Set OLLAMA_NUM_CTX={SERVING_WINDOW} or more."),
        (not window, "warn", line, "Run `doctor` without --quick, which loads the model."))


def verdict_memory(loaded: Loaded) -> Finding:
    return judge(
        loaded.share,
        (not loaded.share, "warn", "Ollama does not tell where the model lies", SEE_OLLAMA),
        (loaded.size_vram < 0.99 * loaded.size, "warn", f"{loaded.share}; the rest is slow",
         "Choose a smaller model or OLLAMA_NUM_CTX, or start Ollama with"
         " OLLAMA_KV_CACHE_TYPE=q8_0."))


def verdict_template(prompt: str) -> Finding:
    """Judge how Ollama rendered PROBE_MESSAGES and a system message after them."""
    reminder = prompt.find("probe reminder")
    defects = ", ".join(text for found, text in (
        (GO_STRUCT.search(prompt), "prints tool definitions as Go structs"),
        ("ProbeTool" not in prompt.partition("probe question")[0], "leaves tools out"),
        ("probe value" not in prompt, "drops tool calls that follow text"),
        (reminder < 0, "drops later system messages"),
        (0 <= reminder < prompt.find("probe question"), "moves later system messages to the top"),
    ) if found)
    return judge(
        "the prompt template keeps tools, calls and system messages",
        (not prompt, "warn", "Ollama does not show how it renders a prompt", UPDATE_OLLAMA),
        (defects, "warn", f"the prompt template {defects}",
         "Nothing to do: the shim writes these parts itself."))


def tool_calls_in(content: Any) -> List[Any]:
    """Take the inputs of the doctor's tool out of an answer's content."""
    blocks = content if isinstance(content, list) else []
    return [block.get("input") for block in blocks if _mapping(block).get("name") == "doctor_probe"]


def verdict_call(content: Any, word: str, problem: str) -> Finding:
    """Judge the answer to the order to call the tool with word."""
    calls = tool_calls_in(content)
    return judge(
        "a live tool call",
        (problem, "bad", f"a live tool call failed: {problem}", SEE_OLLAMA),
        (not calls, "bad", "told to call a tool, the model wrote words", BETTER_MODEL),
        (calls[:1] != [{"word": word}], "warn", "a live tool call came with wrong arguments",
         BETTER_MODEL))


def verdict_rescue(content: Any, word: str, problem: str) -> Finding:
    """Judge the answer to the order to write a call as text."""
    rescued = {"word": word} in tool_calls_in(content)
    return judge(
        "a call that the model wrote as text became a real one",
        (problem, "bad", f"a live rescue failed: {problem}", SEE_OLLAMA),
        (not rescued and "doctor_probe" in to_json(content), "bad",
         "a call that the model wrote as text stayed text", "Set SHIM_RESCUE=text,intent."),
        (not rescued, "warn", "the model would not write a call as text: no rescue was seen",
         "Nothing to do."))


def verdict_truncation(status: int, window: int) -> Finding:
    """Judge the HTTP status of a prompt beyond the window."""
    return judge(
        f"a prompt beyond {window:,} tokens is refused, not cut in silence",
        (status == 200, "bad", "Ollama cut a prompt beyond its window in silence", UPDATE_OLLAMA),
        (status != 400, "warn", f"a prompt beyond the window got HTTP {status}", SEE_OLLAMA))


def verdict_reuse(first_s: float, second_s: float, tokens: int) -> Finding:
    """Judge two turns of which the second begins with the first one's prompt."""
    line = f"{tokens:,} tokens were read in {first_s:.1f} s, and on the next turn in {second_s:.1f}"
    return judge(line, (second_s > max(0.5, first_s / 2), "warn", f"{line}: nothing was kept",
                        "Another program uses this model with other options, or"
                        " OLLAMA_NUM_PARALLEL is above 1: see `ollama ps`."))


def verdict_cancel(seconds: float) -> Finding:
    line = f"{seconds:.1f} s after a request was broken off the next one was answered"
    return judge(line, (seconds > SLOW_CANCEL_S, "warn", line, SEE_OLLAMA))


def verdict_speed(read_per_s: float, write_per_s: float) -> Finding:
    """Judge tokens a second; 0 is unknown."""
    unknown = not read_per_s or not write_per_s
    wait_s = FIRST_PROMPT_TOKENS / (read_per_s or 1)
    line = (f"reads {read_per_s:,.0f} and writes {write_per_s:.1f} tokens a second: a session's"
            f" first answer begins after about {wait_s:.0f} s")
    return judge(
        line,
        (unknown, "warn", "Ollama gave no times: the speed is unknown", UPDATE_OLLAMA),
        (wait_s > SLOW_FIRST_ANSWER_S or write_per_s < SLOW_TOKENS_PER_S, "warn", line,
         "Choose a smaller model, or one that fits into graphics memory (`python qwencode.py"
         " models`)."))


def verdict_bash(path: str, missing: Sequence[str], windows: bool) -> Finding:
    """Judge the shell of Claude Code; missing are programs that it does not find."""
    return judge(
        f"bash at {path}, with all that a rescue's commands use",
        (not path, "bad", "bash was not found",
         "Install Git for Windows (https://git-scm.com), or set CLAUDE_CODE_GIT_BASH_PATH."
         if windows else "Install bash."),
        (missing, "warn", f"bash at {path} lacks {', '.join(missing)}",
         "Install them: the commands of a rescue use them."))


def verdict_claude(path: str, version: str) -> Finding:
    """Judge the installed Claude Code by what `claude --version` says."""
    number = version_of(version)
    line = f"claude {dotted(number) or 'of an unknown version'} at {path}"
    return judge(
        line, (not path, "bad", "claude was not found", CLAUDE_MISSING),
        (not TESTED_CLAUDE[0] <= number <= TESTED_CLAUDE[-1], "warn",
         f"{line}; tested: {', '.join(map(dotted, TESTED_CLAUDE))}",
         f"If it misbehaves: npm install -g @anthropic-ai/claude-code@{dotted(TESTED_CLAUDE[-1])}"))


def verdict_port(address: str, problem: str, ours: bool) -> Finding:
    """Judge the address to listen on; problem is why it cannot be bound."""
    return judge(f"a shim answers at {address}" if ours else f"{address} is free",
                 (problem, "warn", f"{address} cannot be used", problem))


def verdict_environment(env: Env, settings: Json, upstream_host: str) -> Finding:
    """Judge what may send prompts elsewhere; settings is the `env` of settings.json."""
    seen = []
    for place, values in (("the environment", env), ("Claude Code's settings.json", settings)):
        seen += [f"{name} in {place}" for name in CLOUD_SWITCHES if values.get(name)]
        host = header_host(str(values.get("ANTHROPIC_BASE_URL") or "").partition("://")[2]
                           .partition("/")[0])
        if host and not is_loopback(host):
            seen.append(f"ANTHROPIC_BASE_URL in {place} is {host}")
    if not is_loopback(upstream_host):
        seen.append(f"OLLAMA_BASE_URL is {upstream_host}")
    if any(map(env.get, PROXIES)) and not covers_loopback(env):
        seen.append("a proxy is set and NO_PROXY lacks 127.0.0.1,localhost")
    return judge("nothing in the environment sends prompts elsewhere", (
        seen, "warn", "; ".join(seen), "Prompts may leave this machine: unset what you did not"
        " mean. `claude` and `env` clear the environment, never settings.json."))


# ------------------------------ doctor: checks ------------------------------

DOCTOR_TOOL = {"name": "doctor_probe", "description": "Report a word.", "input_schema": {
    "type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}}
# Plain words for a prompt of a known size; a first line of its own keeps it out of what
# Ollama remembers of the last run.
FILLER = "The quick brown fox jumps over the lazy dog. "
PREFILL_WORDS = 300  # times FILLER: about 3,000 tokens, which take long enough to time
# What the commands of section 10 run; a hash program is not needed, only used.
SHELL_PROGRAMS = (
    "base64", "cat", "cmp", "cp", "cut", "diff", "grep", "head", "ls", "mkdir", "mv", "od",
    "printf", "readlink", "rm", "rmdir", "sed", "sort", "tail", "tr", "wc", "xargs")
OLLAMA_ANSWER_S = 5.0


def output_of(command: Sequence[str], env: Env) -> str:
    """Run a program and return what it says, "" where it cannot be run."""
    subprocess = late("subprocess")
    try:
        done = subprocess.run(command, env=dict(env), stdin=subprocess.DEVNULL, timeout=20,
                              capture_output=True, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return str(done.stdout.decode("utf-8", "replace"))


class Ticker(Waiter):
    """Wait for Ollama and show on a terminal how long that takes already."""

    def __init__(self, what: str) -> None:
        self.what, self.since = what, time.monotonic()

    def wait(self, sock: socket.socket, writing: bool, until: float) -> bool:
        ready, line = False, ""
        while not ready and time.monotonic() < until:
            ready = super().wait(sock, writing, min(until, time.monotonic() + 1.0))
            if not ready and sys.stderr.isatty():
                line = f"{self.what} ... {time.monotonic() - self.since:.0f} s "
                tell("\r" + line, end="")
        if line:
            tell(f"\r{' ' * len(line)}\r", end="")
        return ready


def loaded_from(row: Any) -> Loaded:
    """Read a row of /api/ps."""
    return Loaded(*(natural(_mapping(row).get(key))
                    for key in ("context_length", "size", "size_vram")))


class Doctor:
    """What the checks share: the configuration, a shim of their own, what Ollama said."""

    loaded = Loaded()
    speed = (0.0, 0.0)

    def __init__(self, config: Config, env: Env, server: ShimServer) -> None:
        self.config, self.env, self.server = config, env, server
        self.model = LocalModel(ModelFacts(config.model))
        self.wait_s = config.first_token_timeout_ms / 1000

    def ask(self, path: str, body: Optional[Json] = None, what: str = "asking Ollama") -> Answer:
        """Ask Ollama; what may load a model may take as long as a first token."""
        loads = body and path != "/api/show"
        until = time.monotonic() + (self.wait_s if loads else OLLAMA_ANSWER_S)
        return self.server.upstream.ask(path, to_json(body) if body else None, Ticker(what), until)

    def ask_well(self, path: str, body: Json, what: str) -> Json:
        """Ask Ollama; raise a ShimError where it refuses."""
        answer = self.ask(path, body, what)
        if answer.status != 200:
            raise upstream_error(answer.status, answer.text, self.config.model)
        return _mapping(answer.body)

    def body(self, tokens: Optional[int] = None, **fields: Any) -> Json:
        """Make a body whose load options are those of every turn."""
        limit = {} if tokens is None else {"num_predict": tokens, "temperature": 0}
        return {"model": self.config.model, "truncate": False, "shift": False, "stream": False,
                "keep_alive": keep_alive_value(self.config.keep_alive),
                "options": {**load_options(self.model.num_ctx), **limit}, **fields}

    def chat(self, messages: List[Json], tokens: int, what: str) -> Json:
        """Ask the model; raise a ShimError where that fails."""
        return self.ask_well("/api/chat", self.body(tokens, messages=messages, think=False), what)

    def learn(self) -> None:
        """Ask what the model is; raise ModelMissingError where it is not there."""
        name = self.config.model
        answer = self.ask("/api/show", {"model": name})
        raise_if_missing(name, answer)
        self.model = LocalModel(facts_from_show(name, answer.body), self.config.num_ctx)

    def load(self) -> Loaded:
        """Choose the window and load the model; raise a ShimError where that fails."""
        begun, what = time.monotonic(), f"loading {self.config.model}"
        self.model = self.server.registry.model(self.config.model, Ticker(what),
                                                begun + self.wait_s)
        self.ask_well("/api/generate", self.body(), what)
        self.loaded = self.look()._replace(seconds=time.monotonic() - begun)
        return self.loaded

    def look(self) -> Loaded:
        """See how the model is loaded, if it is."""
        return loaded_from(self.server.registry._loaded_row(
            self.model.facts, Waiter(), time.monotonic() + OLLAMA_ANSWER_S))

    def check_call(self, verdict: Callable[[Any, str, str], Finding], word: str, what: str,
                   system: str, text: str) -> Finding:
        """Ask for a call through the shim and judge the answer."""
        body = to_json({"model": self.config.model, "max_tokens": 300, "system": system,
                        "thinking": {"type": "disabled"},
                        "messages": [{"role": "user", "content": text}], "tools": [DOCTOR_TOOL]})
        try:
            answer = shim_at(self.server.url, self.config).ask(
                "/v1/messages", body, Ticker(what), time.monotonic() + 2 * self.wait_s)
        except ShimError as error:
            return verdict([], word, error.message)
        told = _mapping(answer.body)  # an error with status 200, where the answer took long
        problem = str(_mapping(told.get("error")).get("message") or "")
        return verdict(told.get("content") or [], word, problem)

    def check_ollama(self) -> Finding:
        answer = self.ask("/api/version")
        return verdict_ollama(self.server.upstream.url, answer.status, told_version(answer))

    def check_model(self) -> Finding:
        name = self.config.model
        try:
            self.learn()
        except ModelMissingError:
            others = [row["name"] for row in model_rows(self.ask("/api/tags").body)]
            return verdict_model(name, False, others)
        return verdict_model(name, True, [])

    def check_window(self) -> Finding:
        facts = self.model.facts
        return verdict_window(facts.trained or 0, self.model.num_ctx or facts.num_ctx or 0,
                              self.look().window)

    def check_template(self) -> Finding:
        body = probe_body(self.config.model, load_options(self.model.num_ctx))
        body["messages"].append({"role": "system", "content": "probe reminder"})
        rendered = rendered_prompt(self.ask("/api/chat", body).text)
        return verdict_template(rendered.prompt if rendered else "")

    def check_truncation(self) -> Finding:
        window = self.loaded.window or self.model.window or SERVING_WINDOW
        body = self.body(1, messages=[{"role": "user", "content": "7 " * 2 * window}])
        return verdict_truncation(self.ask("/api/chat", body, "a prompt that is too long").status,
                                  window)

    def check_reuse(self) -> Finding:
        """Time a cold prompt and one that begins with it; the speed comes from the same two."""
        cold = {"role": "user", "content": f"{fresh_id()} {FILLER * PREFILL_WORDS} Count to forty."}
        answer = self.chat([cold], 64, "reading 3,000 tokens")
        reply = {"role": "assistant",
                 "content": str(_mapping(answer.get("message")).get("content") or "")}
        first, second = _finish(answer), _finish(self.chat(
            [cold, reply, {"role": "user", "content": "Go on."}], 8, "reading them again"))
        self.speed = ((first.prompt_tokens or 0) / first.prompt_s if first.prompt_s else 0.0,
                      (first.output_tokens or 0) / first.output_s if first.output_s else 0.0)
        return verdict_reuse(first.prompt_s, second.prompt_s, first.prompt_tokens or 0)

    def check_cancel(self) -> Finding:
        """Break a long answer off and see how soon the next one comes."""
        until = time.monotonic() + self.wait_s
        body = self.body(2000, think=False, stream=True, messages=[
            {"role": "user", "content": "Count from one to five hundred."}])
        with self.server.upstream.open("/api/chat", to_json(body), Waiter(), until) as call:
            call.read_head(until)
            call.read(until)
        begun = time.monotonic()
        self.chat([{"role": "user", "content": "Say ok."}], 1, "after a request broken off")
        return verdict_cancel(time.monotonic() - begun)

    def check_bash(self) -> Finding:
        path = find_bash(self.env)
        script = 'for p; do type "$p" >/dev/null 2>&1 || echo "$p"; done'
        missing = output_of([path, "-c", script, "bash", *SHELL_PROGRAMS], self.env).split() \
            if path else ()
        return verdict_bash(path, missing, os.name == "nt")

    def check_claude(self) -> Finding:
        path = find_claude(self.env)
        return verdict_claude(path, output_of([path, "--version"], self.env) if path else "")

    def check_port(self) -> Finding:
        config, problem = self.config, ""
        ours = "ok" in ask_shim(local_url(config), "/health", config)
        try:
            if not ours:
                open_server(config).server_close()
        except ConfigError as error:
            problem = f"{error}."
        return verdict_port(f"{config.host}:{config.port}", problem, ours)

    def check_environment(self) -> Finding:
        settings = _mapping(claude_settings(self.env).get("env"))
        return verdict_environment(self.env, settings, self.server.upstream.host)


class Check(NamedTuple):
    """A check: after names the one without which it is skipped."""

    name: str
    run: Callable[[Doctor], Finding]
    after: str = ""


CHECKS: Tuple[Check, ...] = (
    # An older one than 3.9 cannot import this file: functools.cache is not there.
    Check("python", lambda doctor: Finding("ok", f"Python {dotted(sys.version_info[:3])}")),
    Check("ollama", Doctor.check_ollama),
    Check("model", Doctor.check_model, "ollama"),
    Check("capabilities", lambda doctor: verdict_capabilities(
        sorted(doctor.model.facts.capabilities or ())), "model"),
    Check("load", lambda doctor: Finding(
        "ok", f"loaded in {doctor.load().seconds:.1f} s; {doctor.model.reason}"), "model"),
    Check("window", Doctor.check_window, "model"),
    Check("memory", lambda doctor: verdict_memory(doctor.loaded), "load"),
    Check("template", Doctor.check_template, "load"),
    Check("tool call", lambda doctor: doctor.check_call(
        verdict_call, "kiwi", "a live tool call", "You call tools.",
        "Call the tool doctor_probe with word set to kiwi. Write nothing else."), "load"),
    Check("rescue", lambda doctor: doctor.check_call(
        verdict_rescue, "plum", "a call written as text",
        "Repeat the user's message exactly, as plain text. Write nothing else.",
        '```json\n{"name": "doctor_probe", "arguments": {"word": "plum"}}\n```'), "load"),
    Check("truncation", Doctor.check_truncation, "load"),
    Check("reuse", Doctor.check_reuse, "load"),
    Check("cancel", Doctor.check_cancel, "load"),
    Check("speed", lambda doctor: verdict_speed(*doctor.speed), "load"),
    Check("bash", Doctor.check_bash),
    Check("claude", Doctor.check_claude),
    Check("port", Doctor.check_port),
    Check("environment", Doctor.check_environment),
)


def examine(doctor: Doctor, quick: bool) -> Iterator[Tuple[str, Finding]]:
    """Run the checks in the order in which things break."""
    broken: Set[str] = set()
    for check in CHECKS:
        if quick and "load" in (check.name, check.after):
            continue
        try:
            found = Finding("skip", f"{check.name}: not checked") if check.after in broken \
                else check.run(doctor)
        except ShimError as error:
            told = isinstance(error, UpstreamRefusedError)  # it says what to do itself
            found = Finding("bad", error.message, "" if told else SEE_OLLAMA)
        if found.ok in ("bad", "skip"):
            broken.add(check.name)
        yield check.name, found


MARKS = {"ok": ("\u2713", "ok", GREEN), "warn": ("!", "!", YELLOW), "bad": ("\u2717", "x", RED),
         "skip": ("-", "-", "")}


def finding_lines(found: Finding, colour: bool, unicode: bool) -> List[str]:
    """Write a finding and, below it, its cure."""
    mark, plain, code = MARKS[found.ok]
    lines = [f"{paint(mark if unicode else plain, code, colour)} {found.line}"]
    return lines + ([f"  {found.cure}"] if found.cure else [])


def run_doctor(config: Config, args: Any, env: Env) -> int:
    """Check and prove; return 1 if something is broken."""
    secrets = secrets_of(config)
    rows: List[Tuple[str, Finding]] = []
    with running_server(config._replace(log="error", api_key="")) as server:
        for name, found in examine(Doctor(config, env, server), args.quick):
            shown = Finding(found.ok, *(clean(redact(text, secrets), 600) for text in found[1:]))
            rows.append((name, shown))
            if not args.json:
                say("\n".join(finding_lines(shown, wants_colour(env), speaks_unicode())))
    broken = any(found.ok == "bad" for _, found in rows)
    if args.json:
        say(json.dumps({"version": __version__, "ok": not broken, "checks": [
            {"name": name, **found._asdict()} for name, found in rows]}, indent=1))
    return 1 if broken else 0


def speaks_unicode() -> bool:
    """Tell whether the output can carry a check mark (cmd.exe often cannot)."""
    return "utf" in (getattr(sys.stdout, "encoding", None) or "").lower()


def wants_colour(env: Env) -> bool:
    """Colour a terminal, and never with NO_COLOR (no-color.org)."""
    return sys.stdout.isatty() and not env.get("NO_COLOR") and env.get("TERM") != "dumb"


# ------------------------------ claude ------------------------------

def same_shim(config: Config) -> str:
    """Return the address of a healthy shim that serves this configuration, "" if none."""
    url = local_url(config)
    status = ask_shim(url, "/status", config) if config.port else {}
    same = status.get("version") == __version__ and \
        status.get("options") == json.loads(to_json(shown_options(config)))
    return url if same and _mapping(status.get("health")).get("ok") else ""


def run_claude(config: Config, args: Any, env: Env) -> int:
    """Start a shim, wait for the model, start Claude Code; stop what was started."""
    joined = same_shim(config)
    if joined:
        tell(f"Using the shim that runs at {joined}")
        return run_child(*claude_command(env_of_shim(joined, config, args, env)[1], args.passed,
                                         env))
    # Claude Code draws on this terminal: the shim's log would spoil it.
    terminal, (handle, path) = sys.stderr, late("tempfile").mkstemp(".log", "qwencode-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file, contextlib.redirect_stderr(file), \
                running_server(config) as server:
            with contextlib.redirect_stderr(terminal):
                made = wait_for_model(Doctor(config, env, server), path)
                command = claude_command(made, args.passed, env)
            return run_child(*command)
    finally:
        if not os.path.getsize(path):
            os.remove(path)


def wait_for_model(doctor: Doctor, log: str) -> Env:
    """Load the model, say what came of it, and make Claude Code's variables."""
    config, url = doctor.config, doctor.server.url
    doctor.learn()
    loaded = doctor.load()
    known = "; ".join(filter(None, (loaded.share, doctor.model.reason)))
    tell(f"{config.model} is ready after {loaded.seconds:.0f} s; {known}\n"
         f"Status page {url}/  log {log}")
    return client_env(url, config.api_key, config,
                      doctor.model.window or loaded.window or planned_window(config))


# ------------------------------ models and explain ------------------------------

# Families from the best at tools on; a model that none of them names comes last.
FAMILIES = ("qwen3-coder", "qwen3.8", "qwen3.6", "qwen3.5", "qwen3-next", "qwen3", "qwen2.5-coder",
            "qwen")
# What to pull into how much memory, in GB, when nothing suitable is there.
PULLS = ((20.0, "qwen3-coder:30b"), (10.0, "qwen2.5-coder:14b"), (6.0, "qwen3:8b"),
         (0.0, "qwen3:4b"))
# Share of memory that the weights may take; the rest is for the window's cache.
WEIGHTS_SHARE = 0.8


def recommend(models: Iterable[Tuple[ModelFacts, int]], memory: float) -> str:
    """Choose one of the models and their sizes for memory; all in bytes, 0 where unknown.

    Returns "" if none will do.
    """
    fits = [(size, facts.name) for facts, size in models if "tools" in (facts.capabilities or ())
            and (not memory or size <= memory * WEIGHTS_SHARE)]
    best = (max((one for one in fits if family in one[1]), default=None)
            for family in (*FAMILIES, ""))
    return next((one[1] for one in best if one), "")


def gpu_bytes(env: Env) -> float:
    """Ask the NVIDIA driver for the memory of all GPUs; 0 where it is not known."""
    words = output_of(["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"],
                      env).split()
    return sum(float(word) for word in words if word.isdecimal()) * 2**20


def ask_ollama(config: Config, path: str, body: Optional[str] = None) -> Any:
    """Ask Ollama what it tells at once; return its JSON, None where that makes no sense."""
    return Upstream(config).ask(path, body, Waiter(), time.monotonic() + OLLAMA_ANSWER_S).body


def ask_facts(config: Config, name: str) -> ModelFacts:
    return facts_from_show(name, ask_ollama(config, "/api/show", to_json({"model": name})))


def run_models(config: Config, args: Any, env: Env) -> int:
    """List what Ollama has and which of it suits Claude Code here."""
    tags, loaded = (model_rows(ask_ollama(config, path)) for path in ("/api/tags", "/api/ps"))
    models = [(ask_facts(config, tag["name"]), natural(tag.get("size"))) for tag in tags]
    places = {row["name"]: loaded_from(row) for row in loaded}
    ours = {config.model, f"{config.model}:latest"}
    say(f"{'MODEL':32} {'SIZE':>8} {'WINDOW':>8}  TOOLS  LOADED")
    for facts, size in models:
        tools, place = "tools" in (facts.capabilities or ()), places.get(facts.name)
        say(f"{'*' if facts.name in ours else ' '}{clean(facts.name):31} {size / 1e9:5.1f} GB"
            f" {window_text(facts.trained or 0):>8}  {'yes' if tools else 'no':5}  "
            + (f"{window_text(place.window)} {place.share}" if place else ""))
    memory = gpu_bytes(env)
    room = f" in {memory / 1e9:.0f} GB of graphics memory" if memory else ""
    pull = next(name for least, name in PULLS if memory / 1e9 >= least)
    there = ours.intersection(facts.name for facts, _ in models)
    say(("* is OLLAMA_MODEL." if there else f"OLLAMA_MODEL, {config.model}, is not among them.")
        + f" Recommended{room}: {recommend(models, memory) or f'ollama pull {pull}'}")
    return 0


def explain(request: Request, facts: ModelFacts, config: Config) -> Json:
    """Say what a request becomes: the upstream body, what was left out and why, tokens."""
    session, slim, left_out = Session(), config.prompt == "slim", []
    table = session.table(request, config.max_tools)
    tools = session.write_tools(table, slim, facts)
    names = [tool.name for tool in table.sent]

    def shorten(text: str) -> str:
        short, gone = slim_text(text, names) if slim else (text, [])
        left_out.extend(gone)
        return short

    messages = chat_messages(request, tools.tools, facts, lambda index, turn: None, shorten,
                             tools_text=tools.text)
    answered = local_answer(request, config)
    body = chat_body(request, facts, config, {
        **load_options(config.num_ctx), "num_predict": request.max_tokens},
        messages_json=",".join([to_json(message) for message in messages]),
        tools_json=tools.json)
    counts = [estimate_tokens(message["content"]) for message in messages]
    known = next((place + 1 for place in range(len(messages) - 1, -1, -1)
                  if messages[place]["role"] == "assistant"), 0)
    return {
        "model": config.model, "path": facts.path or "unknown: Ollama was not asked",
        "answered_without_the_model": answered.rule if answered else "",
        "tools": {"sent": names, "dropped": {
            tool.name: why_dropped(tool.name, request, config) for tool in request.tools
            if tool.name not in names}},
        "left_out_of_the_texts": left_out,
        "tokens": {"as_the_client_sent_it": count_request(request),
                   "tools": estimate_tokens(tools.json), "messages": sum(counts)},
        "prefix": {"known_from_the_last_turn": sum(counts[:known]), "new": sum(counts[known:])},
        "body": json.loads(body)}


def why_dropped(name: str, request: Request, config: Config) -> str:
    if name == PLACEHOLDER_TOOL:
        return "it stands for tools that are not loaded"
    if request.tool_choice.kind == "none":
        return "tool_choice is none"
    return f"beyond SHIM_MAX_TOOLS={config.max_tools}; a call of it would still go through"


def run_explain(config: Config, args: Any, env: Env) -> int:
    """Show what a Messages body would become: nothing is sent to the model."""
    try:
        with open(0 if args.file == "-" else args.file, "rb") as file:
            request = parse_request(parse_json(file.read()))
    except OSError as problem:
        raise ConfigError(f"{args.file} cannot be read ({problem.strerror}); name a file that"
                          " holds a request body, or - for standard input") from None
    except (ValueError, BadRequestError) as problem:
        raise ConfigError(f"{args.file} holds no request for /v1/messages:"
                          f" {clean(str(problem))}") from None
    facts = ModelFacts(config.model)
    with contextlib.suppress(ShimError):
        facts = ask_facts(config, config.model)
    say(json.dumps(explain(request, facts, config), indent=1, ensure_ascii=False))
    return 0


# ------------------------------ the command line ------------------------------

class Command(NamedTuple):
    """A subcommand: its name, help, function and own arguments, as argparse wants them."""

    name: str
    help: str
    run: Callable[[Config, Any, Env], int]
    arguments: Mapping[str, Json] = {}


COMMANDS: Tuple[Command, ...] = (
    Command("serve", "serve the Messages API (the default)", run_serve),
    Command("demo", "see it work without Ollama or Claude Code", run_demo),
    Command("try", "carry out one request here, as the rescue would", run_try, {
        "request": {"nargs": "+", "help": "what to do, in words"},
        "--dry-run": {"action": "store_true", "help": "show the command, run nothing"}}),
    Command("claude", "start a shim and Claude Code on it; arguments for claude after --",
            run_claude),
    Command("client", "start Claude Code on a shim that runs; arguments for claude after --",
            run_client, {
        "url": {"nargs": "?", "default": "", "help": "base URL (default http://HOST:PORT)"},
        "key": {"nargs": "?", "default": "", "help": "key of the shim (default SHIM_API_KEY)"}}),
    Command("doctor", "check everything, prove what can be proved, say the cures", run_doctor, {
        "--json": {"action": "store_true", "help": "print JSON"},
        "--quick": {"action": "store_true", "help": "skip what loads the model"}}),
    Command("models", "list Ollama's models and which one suits", run_models),
    Command("env", "print the variables for Claude Code", run_env, {
        "shell": {"nargs": "?", "choices": sorted(SHELLS), "help": "default: this one"},
        "--shell": {"dest": "named_shell", "choices": sorted(SHELLS), "help": "the same"}}),
    Command("explain", "show what a Messages body would become", run_explain, {
        "file": {"help": "file that holds the body, or - for standard input"}}),
)
WITH_CLAUDE = ("claude", "client")


def make_parser() -> Any:
    """Make the command line from COMMANDS and OPTIONS."""
    argparse = late("argparse")
    # argparse would print a page of usage before a mistake; a command's parser is alike.
    parser_type = type("Parser", (argparse.ArgumentParser,), {
        "error": lambda self, message: self.exit(2, f"{self.prog}: {message}. See --help.\n")})
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    group = common.add_argument_group("options of every command, each also a variable")
    for row in OPTIONS:
        default = f" (default {row.default})" if row.default else ""
        group.add_argument(flag_of(row), dest=row.name, metavar="VALUE",
                           help=f"{row.help}{default}; {row.variable}".replace("%", "%%"))
    parser = parser_type(
        prog="qwencode", description="Claude Code on a local Qwen model: the Messages API in front"
        " of Ollama.", parents=[common], usage="%(prog)s [COMMAND] [OPTIONS]")
    parser.add_argument("--version", action="version", version=f"qwencode {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", prog="qwencode")
    for command in COMMANDS:
        sub = commands.add_parser(command.name, help=command.help, parents=[common],
                                  description=command.help, usage="%(prog)s [OPTIONS] ...")
        for name, settings in command.arguments.items():
            sub.add_argument(name, **settings)
    return parser


def parse_arguments(argv: Sequence[str]) -> Any:
    """Read the command line; raises SystemExit, as argparse does, when all is said."""
    own, passed = list(argv), []
    if "--" in own:
        own, passed = own[:own.index("--")], own[own.index("--") + 1:]
    try:
        # Making the parser takes 6 % of a start; a bare `qwencode.py` needs none.
        args = make_parser().parse_args(own) if own else SimpleNamespace(command="serve")
    except SystemExit as end:
        if end.code == 2 and not passed and own[0] in WITH_CLAUDE:
            tell("What is meant for claude itself goes after --, as in: -- -p 'hello'")
        raise
    args.passed = passed
    return args


def main(argv: Sequence[str], env: Env) -> int:
    """Run a command; returns its exit code. 2 is a mistake of the user's."""
    try:
        args = parse_arguments(argv)
        command = next(c for c in COMMANDS if c.name == (args.command or "serve"))
        config = load_config(vars(args), env)
        if command.name in WITH_CLAUDE and not find_claude(env):
            tell(CLAUDE_MISSING)
            raise SystemExit(127)
        return command.run(config, args, env)
    except SystemExit as end:
        return int(end.code or 0)
    except ConfigError as problem:
        tell(f"qwencode: {problem}")
        return 2
    except ShimError as error:
        tell(redact(error.message, secrets_of(config)))
        return 1
    except KeyboardInterrupt:
        return 130
    except OSError as problem:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left would fail once more
        left = isinstance(problem, BrokenPipeError)  # whoever read our output did, as `head` does
        if not left:
            tell(": ".join(filter(None, ("qwencode", problem.filename, reason_of(problem)))))
        return 141 if left else 1


def console_main() -> None:
    """Entry point of the installed `qwencode` command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a Windows console may lack a character
            stream.reconfigure(errors="replace")
    sys.exit(main(sys.argv[1:], os.environ))


def console_script(*_: object) -> None:
    """Run the command behind the script's end, as the hook that prints its exception."""
    sys.excepthook = sys.__excepthook__
    console_main()


if __name__ == "__main__":
    # The interpreter keeps the syntax tree of a script, 20 of 50 MB, until the script has
    # ended. So it ends here, by an exception, and what would print that one carries on;
    # but not under a profiler, a debugger or runpy, which would catch it.
    if sys._getframe().f_back is not None:
        console_main()
    sys.excepthook = console_script
    raise SystemError("never printed")
