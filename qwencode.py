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

import base64
import contextlib
import errno
import importlib
import json
import math
import os
import re
import select
import shlex
import socket
import sys
import threading
import time
import zlib
from bisect import bisect_left
from collections import deque
from functools import cache, lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from types import SimpleNamespace
from typing import (
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
# Counting (section 7). A text of more characters is counted by slices, a sixth of it
# and at most so many characters: 10 MB in 1 ms instead of 200, most within 2 %.
WHOLE_TEXT_CHARS = 8192
SAMPLE_SLICE = 256
MAX_SAMPLE_CHARS = 24_576
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

    status = 500
    kind = "api_error"
    retry = True

    def __init__(self, message: str, retry_after: Optional[str] = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after = retry_after


class BadRequestError(ShimError):
    """The body is not a Messages request; the message names the field."""

    status, kind, retry = 400, "invalid_request_error", False


class PromptTooLongError(BadRequestError):
    """The words that make Claude Code compact (contract/claude-code.md B5).

    loaded: maximum is the window that Ollama says it has, not what the shim lets a turn use.
    """

    def __init__(self, tokens: int, maximum: int, *, loaded: bool = False) -> None:
        super().__init__(f"prompt is too long: {tokens} tokens > {maximum} maximum")
        self.tokens, self.maximum, self.loaded = tokens, maximum, loaded


class ModelMissingError(BadRequestError):
    """Ollama lacks the model. A 400: the CLI never shows a 404's text (B1)."""


class UnauthorizedError(ShimError):
    """The client's key is missing or wrong."""

    status, kind, retry = 401, "authentication_error", False


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


class UpstreamGarbageError(UpstreamBrokenError):
    """A line that is not JSON."""


class UpstreamLostError(UpstreamBrokenError):
    """The answer ended well but its text is gone or empty: asking again repeats it."""

    retry = False


class UpstreamInvalidError(ShimError):
    """A whole answer that is not JSON."""

    status, kind, retry = 502, "invalid_response_error", False


class UpstreamDeniedError(ShimError):
    """The upstream wants another login: its 401 or 403 is not the client's."""

    status, retry = 502, False


class UpstreamTimeoutError(ShimError):
    """The upstream was silent for longer than the timeout."""

    status, kind, retry = 504, "timeout_error", False


class UpstreamFailedError(ShimError):
    """The upstream answered 5xx; retry is decided by its text."""

    def __init__(self, message: str, retry: bool, status: int = 500) -> None:
        super().__init__(message)
        self.retry = retry
        self.status = status


class InternalError(ShimError):
    """A bug: told as such; the log says where."""


class ClientGoneError(Exception):
    """The client left: nobody is told, the upstream request is cancelled."""


def error_body(error: ShimError, request_id: str) -> Json:
    """Make the Messages API error object."""
    return {
        "type": "error",
        "error": {"type": error.kind, "message": error.message},
        "request_id": request_id,
    }


# ============================== 3. CONFIG ==============================


class Option(NamedTuple):
    """One row of OPTIONS.

    kind is one of text, secret, port, count (a whole number from 0), milliseconds,
    bool, choice, list (comma-separated, of choices), url; choices belongs to the
    last kinds. default is the text that an unset variable stands for; "" is unset.
    """

    name: str
    variable: str
    default: str
    kind: str
    help: str
    choices: Tuple[str, ...] = ()


OPTIONS: Tuple[Option, ...] = (
    Option("host", "HOST", "127.0.0.1", "text",
           "address to listen on; anything but loopback needs SHIM_API_KEY"),
    Option("port", "PORT", "8000", "port", "port to listen on; 0 takes a free one"),
    Option("base_url", "OLLAMA_BASE_URL", "http://127.0.0.1:11434", "url",
           "where Ollama answers; OLLAMA_HOST counts when this is unset"),
    Option("model", "OLLAMA_MODEL", "qwen2.5-coder:14b", "text", "the model that answers"),
    Option("auth_token", "OLLAMA_AUTH_TOKEN", "", "secret",
           "sent to Ollama as a Bearer token, for servers behind a login"),
    Option("num_ctx", "OLLAMA_NUM_CTX", "", "count",
           "context window in tokens, obeyed as given"),
    Option("auto_ctx", "SHIM_NUM_CTX", "auto", "text",
           "window when OLLAMA_NUM_CTX is unset: auto, a number, or off (Ollama's default)"),
    Option("max_tools", "SHIM_MAX_TOOLS", "8", "count",
           "tools forwarded to the model, the most useful ones; 0 forwards all"),
    Option("api_key", "SHIM_API_KEY", "", "secret",
           "key that clients must send as x-api-key or Bearer"),
    Option("use_requested_model", "SHIM_USE_REQUESTED_MODEL", "off", "bool",
           "use the model named in the request instead of OLLAMA_MODEL: on or off"),
    Option("model_map", "SHIM_MODEL_MAP", "", "text",
           "local models by role, for example haiku=qwen3:4b,opus=qwen3-coder:30b"),
    Option("small_model", "SHIM_SMALL_MODEL", "", "text",
           "model for background requests such as session titles"),
    Option("log", "SHIM_LOG", "info", "choice",
           "how much is logged: error, warn, info or debug (prompts and answers too)",
           ("error", "warn", "info", "debug")),
    Option("log_format", "SHIM_LOG_FORMAT", "text", "choice", "form of the log: text or json",
           ("text", "json")),
    Option("max_read_bytes", "SHIM_MAX_READ_BYTES", "200000", "count",
           "bytes that a rescued read shows before it is cut with a notice"),
    Option("timeout_ms", "SHIM_REQUEST_TIMEOUT_MS", "120000", "milliseconds",
           "longest silence of Ollama within an answer"),
    Option("first_token_timeout_ms", "SHIM_FIRST_TOKEN_TIMEOUT_MS", "", "milliseconds",
           "longest wait for the first byte, which holds model load and prefill"
           " (600000, or SHIM_REQUEST_TIMEOUT_MS where that is set)"),
    Option("cors_wildcard", "SHIM_ALLOW_CORS_WILDCARD", "off", "bool",
           "answer CORS preflights of every origin, not only localhost: on or off"),
    Option("keep_alive", "SHIM_KEEP_ALIVE", "-1", "text",
           "how long Ollama keeps the model loaded: seconds, a duration such as 30m, -1 for ever"),
    Option("rescue", "SHIM_RESCUE", "text,intent", "list",
           "rescues in force: text (tool calls written as text), intent (actions described), off",
           ("text", "intent", "off")),
    Option("verbatim", "SHIM_VERBATIM", "auto", "choice",
           "read the model's own text instead of Ollama's parse of it: auto, on or off",
           ("auto", "on", "off")),
    Option("bash_style", "SHIM_BASH_STYLE", "plain", "choice",
           "form of the rescue's commands: plain (approvable in acceptEdits) or coded"
           " (exit codes 91 to 100)", ("plain", "coded")),
    Option("prompt", "SHIM_PROMPT", "slim", "choice",
           "slim shortens tool texts; full forwards them as they came", ("slim", "full")),
    Option("local_answers", "SHIM_LOCAL_ANSWERS", "title,probe,suggestion,safety", "list",
           "background requests answered without the model: any of the default's, or off",
           ("title", "probe", "suggestion", "safety", "off")),
    Option("warm", "SHIM_WARM", "on", "bool",
           "load the model, and the last session's prefix, before it is needed: on or off"),
    Option("max_concurrent", "SHIM_MAX_CONCURRENT", "256", "count",
           "requests at work at once; as many more wait"),
    Option("counts_file", "SHIM_COUNTS_FILE", "", "text",
           "file that keeps the learned token counts between runs"),
)

OPTION_BY_NAME = {option.name: option for option in OPTIONS}
# Model load and prefill of a long prompt take minutes on a small GPU (OL 2).
FIRST_TOKEN_TIMEOUT_MS = 600_000
TRUE_WORDS = ("1", "true", "yes", "on")
FALSE_WORDS = ("0", "false", "no", "off", "")
WHOLE_NUMBER = Pattern(r"[0-9]{1,12}")
BASE_URL = Pattern(r"https?://(?:[^\s/?#]+@)?(?:\[[0-9a-f:.]+\]|[\w.~%-]+)(?::([0-9]{1,5}))?"
                   r"(?:/[!\"$->@-~]*)?", re.IGNORECASE | re.ASCII)
PERCENT_CODED = Pattern(r"(?:%[0-9a-fA-F]{2})+")
BRACKETED_HOST = Pattern(r"\[([0-9a-fA-F:.]+)\](?::(.*))?")
URL_LOGIN = Pattern(r"://([^/\s]+)@")
KEEP_ALIVE = Pattern(r"-?[0-9]+(?:\.[0-9]+)?(?:(?:ns|us|ms|s|m|h)(?:[0-9.]+(?:ns|us|ms|s|m|h))*)?")
CONTROL_CHARS = Pattern(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


# Where to connect for an address that means "every interface". The check takes it for a
# bind, which it is not.
CONNECTABLE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104


class ConfigError(Exception):
    """A value that cannot be used; the message is one line for the user."""


class Config(NamedTuple):
    """What `serve` runs with; every field is a row of OPTIONS."""

    host: str
    port: int
    base_url: str
    model: str
    auth_token: str
    num_ctx: Optional[int]
    auto_ctx: str
    max_tools: int
    api_key: str
    use_requested_model: bool
    model_map: Tuple[Tuple[str, str], ...]
    small_model: str
    log: str
    log_format: str
    max_read_bytes: int
    timeout_ms: int
    first_token_timeout_ms: int
    cors_wildcard: bool
    keep_alive: str
    rescue: Tuple[str, ...]
    verbatim: str
    bash_style: str
    prompt: str
    local_answers: Tuple[str, ...]
    warm: bool
    max_concurrent: int
    counts_file: str


def parse_base_url(text: str) -> str:
    """Return the URL without a trailing slash; raise ConfigError where it is none."""
    url = BASE_URL.fullmatch(text)
    if not url or not 0 < int(url.group(1) or 80) < 65536:
        raise ConfigError("is not a URL such as http://127.0.0.1:11434")
    return text.rstrip("/")


def url_from_ollama_host(text: str) -> str:
    """Read OLLAMA_HOST as Ollama does (contract/ollama.md 6).

    A host that means "all interfaces" becomes loopback, since one connects to it.
    """
    text = text.strip().strip("\"'").strip()
    scheme, found, rest = text.partition("://")
    if not found:
        scheme, rest = ("https", text) if text == "ollama.com" else ("http", text)
    port = {"http": "80", "https": "443"}.get(scheme, "11434") if found else "11434"
    port = "443" if text == "ollama.com" else port
    hostport, slash, path = rest.partition("/")
    bracketed = BRACKETED_HOST.fullmatch(hostport)
    if bracketed:
        host, given = bracketed.group(1), bracketed.group(2) or ""
    elif hostport.count(":") > 1:
        host, given = hostport, ""
    else:
        host, _, given = hostport.partition(":")
    if given and WHOLE_NUMBER.fullmatch(given) and int(given) < 65536:
        port = given
    host = CONNECTABLE.get(host, host)
    host = f"[{host}]" if ":" in host else host
    return f"{scheme}://{host}:{port}{slash}{path}".rstrip("/")


def _whole_number(text: str) -> int:
    if not WHOLE_NUMBER.fullmatch(text):
        raise ConfigError("is not a whole number")
    return int(text)


def _port(text: str) -> int:
    number = _whole_number(text)
    if number > 65535:
        raise ConfigError("is above 65535, the last port")
    return number


def _milliseconds(text: str) -> int:
    number = _whole_number(text)
    if number == 0:
        raise ConfigError("must be at least 1 millisecond")
    return number


def _truth(text: str) -> bool:
    word = text.lower()
    if word not in TRUE_WORDS + FALSE_WORDS:
        raise ConfigError("is neither on nor off")
    return word in TRUE_WORDS


def _plain(text: str) -> str:
    if CONTROL_CHARS.search(text):
        raise ConfigError("holds a control character")
    return text


READERS: Dict[str, Callable[[str], Any]] = {
    "text": _plain, "secret": _plain, "port": _port, "count": _whole_number,
    "milliseconds": _milliseconds, "bool": _truth, "url": parse_base_url,
}


def read_option(option: Option, text: str, source: str) -> Any:
    """Turn text into the option's value; raise ConfigError with one line."""
    try:
        if option.kind == "choice":
            if text.lower() not in option.choices:
                raise ConfigError(f"is none of {', '.join(option.choices)}")
            return text.lower()
        if option.kind == "list":
            words = tuple(word.strip().lower() for word in text.split(",") if word.strip())
            wrong = [word for word in words if word not in option.choices]
            if wrong:
                raise ConfigError(f"holds {wrong[0]!r}, none of {', '.join(option.choices)}")
            return () if "off" in words else words
        return READERS[option.kind](text)
    except ConfigError as problem:
        shown = "the value" if option.kind == "secret" or "@" in text else repr(text)
        raise ConfigError(f"{source}: {shown} {problem}") from None


def load_config(flags: Mapping[str, Optional[str]], env: Mapping[str, str]) -> Config:
    """Read flags (by option name) over environment over defaults.

    An empty variable counts as not set. Raises ConfigError with one line that names
    the flag or variable and the value (never a secret's).
    """
    values: Dict[str, Any] = {}
    for option in OPTIONS:
        flag, variable = flags.get(option.name), env.get(option.variable, "")
        if flag is not None:
            values[option.name] = read_option(option, flag, flag_of(option))
        elif variable:
            values[option.name] = read_option(option, variable, option.variable)
        elif option.name == "base_url" and env.get("OLLAMA_HOST", "").strip():
            url = url_from_ollama_host(env["OLLAMA_HOST"])
            values["base_url"] = read_option(option, url, "OLLAMA_HOST")
        elif option.name in ("num_ctx", "first_token_timeout_ms"):
            values[option.name] = None
        else:
            values[option.name] = read_option(option, option.default, option.variable)
    timeout_given = flags.get("timeout_ms") or env.get("SHIM_REQUEST_TIMEOUT_MS")
    return _finish_config(values, bool(timeout_given))


def _finish_config(values: Dict[str, Any], timeout_given: bool) -> Config:
    if values["first_token_timeout_ms"] is None:
        values["first_token_timeout_ms"] = (
            values["timeout_ms"] if timeout_given else FIRST_TOKEN_TIMEOUT_MS)
    for name in ("host", "model"):
        if not values[name].strip():
            raise ConfigError(f"{OPTION_BY_NAME[name].variable}: the value is empty")
    if values["num_ctx"] == 0:
        values["num_ctx"] = None
    if values["auto_ctx"].lower() not in ("auto", "off"):
        if not WHOLE_NUMBER.fullmatch(values["auto_ctx"]):
            raise ConfigError(f"SHIM_NUM_CTX: {values['auto_ctx']!r} is neither auto, off"
                              " nor a whole number")
        values["num_ctx"] = values["num_ctx"] or int(values["auto_ctx"])
    if not KEEP_ALIVE.fullmatch(values["keep_alive"]):
        raise ConfigError(f"SHIM_KEEP_ALIVE: {values['keep_alive']!r} is neither seconds"
                          " nor a duration such as 30m")
    if values["max_concurrent"] == 0:
        raise ConfigError("SHIM_MAX_CONCURRENT: '0' would let no request work")
    values["model_map"] = parse_model_map(values["model_map"])
    return Config(**values)


def parse_model_map(text: str) -> Tuple[Tuple[str, str], ...]:
    """Read "haiku=qwen3:4b,opus=qwen3:30b" into pairs."""
    pairs = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        role, equals, model = (piece.strip() for piece in part.partition("="))
        if not (role and equals and model):
            raise ConfigError(f"SHIM_MODEL_MAP: {part!r} is not ROLE=MODEL")
        pairs.append((role.lower(), model))
    return tuple(pairs)


def flag_of(option: Option) -> str:
    """Name the command-line flag of an option."""
    return "--" + option.name.replace("_", "-")


def secrets_of(config: Config) -> Tuple[str, ...]:
    """List the texts that must appear in no log and no answer, the longest first.

    A URL's login counts as written, decoded, and as the header that Ollama sees.
    """
    url = URL_LOGIN.search(config.base_url)
    written = url.group(1) if url else ""
    login = PERCENT_CODED.sub(lambda run: bytes.fromhex(
        run.group().replace("%", "")).decode("utf-8", "replace"), written)
    texts = {config.api_key, config.auth_token, written, written.partition(":")[2], login,
             login.partition(":")[2], base64.b64encode(login.encode("utf-8", "replace")).decode()}
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

LOW_SURROGATES = Pattern(r"[\ud800-\udfff]")
MAX_LOG_CHARS = 300


def clean(text: str, limit: int = MAX_LOG_CHARS) -> str:
    """Make foreign text fit for a log line or header (CWE-117)."""
    text = text if len(text) <= limit else text[:limit] + "…"
    return LOW_SURROGATES.sub("\ufffd", CONTROL_CHARS.sub(" ", text))


def redact(text: str, secrets: Iterable[str]) -> str:
    """Replace every secret, also where an upstream quotes it back."""
    for secret in secrets:
        text = text.replace(secret, "[secret]")
    return text


def to_json(value: Any) -> str:
    """Write compact ASCII JSON: safe for lone surrogates and twice as fast as UTF-8."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


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
    """Write events for the wire."""
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
        if length:
            self._need = length + 2
        else:
            self._trailers = 1


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


class ToolKind(NamedTuple):
    """One row of TOOL_KINDS: a kind of tool, the parameters it needs, its names."""

    needs: str
    names: str


# Names are those of Claude Code, Qwen Code, Gemini CLI, Cline, Roo, Cursor, Continue,
# OpenHands, SWE-agent, Codex, Goose, Zed, VS Code and the MCP file-system server.
TOOL_KINDS: Tuple[ToolKind, ...] = (
    ToolKind("command", "bash shell run_command run_shell_command execute_bash execute_command "
             "terminal run_terminal_cmd run_terminal_command run_in_terminal terminal_command exec "
             "exec_command execute run_bash run_shell bash_command shell_command execute_shell "
             "execute_shell_command local_shell shell_exec sh cmd command console powershell zsh "
             "bash_tool terminal_run run_cmd execute_terminal_command system developer__shell run"),
    ToolKind("file_path old_string new_string", "edit edit_file str_replace str_replace_editor "
             "str_replace_based_edit_tool replace_in_file search_replace search_and_replace "
             "replace update_file modify_file find_and_replace replace_string_in_file file_edit "
             "apply_edit patch_file apply_diff change_file string_replace replace_text edit_block"),
    ToolKind("file_path content", "write write_file create_file write_to_file save_file new_file "
             "create_new_file file_write fs_write write_text_file overwrite_file make_file create "
             "file_create put_file save create_text_file write_new_file edit_file "
             "create_or_update_file str_replace_editor str_replace_based_edit_tool"),
    ToolKind("file_path", "read read_file view_file open_file view file_read fs_read cat open "
             "read_text_file get_file_contents get_file read_files fetch_file_content show_file "
             "load_file read_file_content cat_file view_source file_view str_replace_editor "
             "str_replace_based_edit_tool"),
    ToolKind("pattern", "grep grep_search search_files search_file_content ripgrep rg search_code "
             "code_search codebase_search grep_files search_in_files search search_for_pattern "
             "text_search find_in_files search_text search_dir search_file grep_tool"),
    ToolKind("pattern", "glob find_files glob_file_search file_search find find_file glob_search "
             "list_files search_file_names find_path find_by_name file_glob_search glob_files"),
    ToolKind("path", "ls list list_directory list_dir list_files list_folder read_directory dir "
             "view_directory list_directory_contents"),
    ToolKind("url", "web_fetch fetch fetch_url fetch_web fetch_webpage browse get_url open_url "
             "read_url url_fetch fetch_page read_web_page http_get"),
    ToolKind("query", "web_search search_web google_search brave_search internet_search search "
             "google_web_search bing_search duckduckgo_search"),
    ToolKind("todos", "todo_write write_todos update_todos todo update_todo_list update_plan "
             "todo_list manage_todo_list todowrite"),
    ToolKind("prompt", "agent task dispatch_agent spawn_agent new_task subagent launch_agent "
             "run_agent delegate delegate_task run_subagent"),
    ToolKind("skill", "skill use_skill run_skill invoke_skill load_skill"),
)
# Parameter names that stand for each other; a tool's schema says which one it wants.
PARAMETER_NAMES: Tuple[str, ...] = (
    "file_path path filename file file_name filepath target_file absolute_path abs_path "
    "full_path relative_path pathname name_of_file target_path output_path destination uri",
    "command cmd shell_command command_line bash_command script code commands bash argv shell",
    "content contents text file_text file_content file_contents body data new_content code "
    "code_content value file_body source",
    "old_string old_str old_text old search find target original search_string old_content "
    "original_text from string_to_replace old_code search_text",
    "new_string new_str new_text new replace replacement replace_with new_content updated "
    "replace_string to new_code replace_text updated_text",
    "pattern regex regexp query search_pattern glob glob_pattern search_query search_term search "
    "expression file_pattern keyword text",
    "path directory dir folder dir_path directory_path target_directory root search_path cwd "
    "search_dir relative_workspace_path file_path include_path",
    "glob include file_pattern include_pattern glob_pattern file_glob filter",
    "query search_query search_term q keywords text search term",
    "url uri link address href website page",
    "prompt task instruction instructions message question request query",
    "description summary explanation title reason purpose",
    "offset start_line line_start start from_line begin_line line_number start_line_number",
    "limit num_lines max_lines line_count count lines n_lines line_limit number_of_lines "
    "max_results",
    "timeout timeout_ms timeout_seconds time_limit",
    "replace_all all global replace_all_occurrences replace_all_matches",
    "run_in_background is_background background in_background",
    "todos todo_list items tasks plan todo",
    "skill skill_name name command",
    "args arguments argument parameters",
    "subagent_type agent_type agent type",
)
NOT_PLAIN = Pattern(r"[^a-z0-9]+")
NAMESPACE = Pattern(r"^(?:functions?|tools?|default_api|container|repo_browser)[.:/]|:\d+$|\.call$")
WRAPPER_KEYS = ("arguments", "parameters", "input", "args", "params", "kwargs", "tool_input",
                "action_input", "properties")
INTEGER_TEXT = Pattern(r"\s*([+-]?[0-9]{1,18})(?:\.0*)?\s*")
DECIMAL_TEXT = Pattern(r"\s*[+-]?[0-9]{1,18}(?:\.[0-9]{1,18})?(?:[eE][+-]?[0-9]{1,2})?\s*")


@lru_cache(maxsize=1024)
def plain_name(name: str) -> str:
    """Fold case and separators: filePath, file-path and file_path are one name."""
    return NOT_PLAIN.sub("", name.lower())


@cache
def plain_words(row: str) -> Tuple[str, ...]:
    return tuple(plain_name(word) for word in row.split())


def properties_of(schema: Any) -> Json:
    found = schema.get("properties") if isinstance(schema, dict) else None
    return found if isinstance(found, dict) else {}


def required_of(schema: Json) -> List[str]:
    found = schema.get("required")
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def parameter_for(name: str, properties: Json, taken: Iterable[str] = ()) -> Optional[str]:
    """Find the property that name means, by spelling, then by PARAMETER_NAMES."""
    folded = plain_name(name)
    free = {plain_name(known): known for known in reversed(list(properties)) if known not in taken}
    if folded in free:
        return free[folded]
    for row in map(plain_words, PARAMETER_NAMES):
        if folded in row:
            for word in row:
                if word in free:
                    return free[word]
    return None


def tools_meant(name: str, tools: Mapping[str, Tool]) -> List[Tool]:
    """List the offered tools that name can mean, the likeliest first."""
    if name in tools:
        return [tools[name]]
    folded = plain_name(NAMESPACE.sub("", name.strip()))
    same = [tool for tool in tools.values() if folded and plain_name(tool.name) == folded]
    if same or not folded:
        return same[:1]
    found = []
    for kind in TOOL_KINDS:
        names, needs = plain_words(kind.names), kind.needs.split()
        if folded in names:
            fits = [tool for tool in tools.values()
                    if all(parameter_for(need, properties_of(tool.schema)) for need in needs)]
            named = [tool for tool in fits if plain_name(tool.name) in names]
            exact = [tool for tool in fits if len(required_of(tool.schema)) == len(needs)
                     and all(parameter_for(need, dict.fromkeys(required_of(tool.schema)))
                             for need in needs)]
            found += named or (exact if len(exact) == 1 else [])
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
    if isinstance(arguments, dict):
        inner = [key for key in arguments if (key in WRAPPER_KEYS and len(arguments) == 1)
                 or (key == "properties" and arguments.get("type") == "object")]
        if inner and depth and inner[0] not in properties_of(schema):
            return as_object(arguments[inner[0]], schema, depth - 1)
        return arguments
    if isinstance(arguments, str) and arguments.strip()[:1] in ("{", "[", '"') and depth:
        value = loose_json(arguments)
        if value is not None:
            return as_object(value, schema, depth - 1)
    if isinstance(arguments, list) and len(arguments) == 1 and isinstance(arguments[0], dict):
        return as_object(arguments[0], schema, depth - 1) if depth else None
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
        if key in names:
            if value is not None or schema_takes(None, properties[names[key]]):
                result[names[key]] = coerced(value, properties[names[key]], names[key])
        elif extra is not False or "patternProperties" in schema:
            result[key] = value
    return result


def types_of(schema: Any) -> List[str]:
    """List the JSON types that a schema allows; none listed means any."""
    if not isinstance(schema, dict):
        return []
    kind = schema.get("type")
    if kind is None:
        choices = schema.get("anyOf") or schema.get("oneOf")
        return [each for choice in (choices if isinstance(choices, list) else ())
                for each in types_of(choice)]
    return [each for each in (kind if isinstance(kind, list) else [kind])
            if isinstance(each, str) and each in SCHEMA_TYPES]


def schema_takes(value: Any, schema: Any) -> bool:
    types = types_of(schema)
    return not types or any(SCHEMA_TYPES[kind](value) for kind in types)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


SCHEMA_TYPES: Dict[str, Callable[[Any], bool]] = {
    "string": lambda value: isinstance(value, str),
    "integer": lambda value: is_number(value) and value == value // 1,
    "number": is_number,
    "boolean": lambda value: isinstance(value, bool),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
    "null": lambda value: value is None,
}


def coerced(value: Any, schema: Any, name: str = "") -> Any:
    """Mend a value's type; what cannot be mended stays for the client to judge."""
    if not isinstance(schema, dict):
        return value
    if not schema_takes(value, schema):
        for kind in types_of(schema):
            mended = COERCIONS[kind](value, name)
            if mended is not None:
                value = mended
                break
    if isinstance(value, dict) and properties_of(schema):
        return fit_object(value, schema)
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        return [coerced(item, schema["items"]) for item in value]
    choices = schema.get("enum")
    if isinstance(value, str) and isinstance(choices, list) and value not in choices:
        return next((each for each in choices if plain_name(str(each)) == plain_name(value)), value)
    return value


def string_from(value: Any, name: str) -> Optional[str]:
    """Write a value as text: an argument vector quoted, lines joined, else JSON."""
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return shlex.join(value) if plain_name(name) == "command" else "\n".join(value)
    return json.dumps(value, ensure_ascii=False, indent=2 if isinstance(value, dict) else None)


def integer_from(value: Any, name: str) -> Optional[int]:
    match = INTEGER_TEXT.fullmatch(value) if isinstance(value, str) else None
    return int(match.group(1)) if match else None


def number_from(value: Any, name: str) -> Union[int, float, None]:
    whole = integer_from(value, name)
    decimal = isinstance(value, str) and DECIMAL_TEXT.fullmatch(value)
    return whole if whole is not None else float(value) if decimal else None


def boolean_from(value: Any, name: str) -> Optional[bool]:
    word = str(value).strip().lower()
    return True if word in TRUE_WORDS else False if word and word in FALSE_WORDS else None


def array_from(value: Any, name: str) -> Optional[List[Any]]:
    read = loose_json(value) if isinstance(value, str) else value
    return read if isinstance(read, list) else None if value is None else [value]


def object_from(value: Any, name: str) -> Optional[Json]:
    read = loose_json(value) if isinstance(value, str) else None
    return read if isinstance(read, dict) else None


COERCIONS: Dict[str, Callable[[Any, str], Any]] = {
    "string": string_from, "integer": integer_from, "number": number_from,
    "boolean": boolean_from, "array": array_from, "object": object_from,
    "null": lambda value, name: None,
}

# A string ends at a quote that is followed by what can follow a value in its place; any
# other quote was left unescaped by the model and belongs to the text.
MEMBER_KEY = r"""(?:"[^"\n]{0,80}"|“[^”\n]{0,80}”|'[^'\n]{0,80}'|[A-Za-z_][\w-]{0,60})\s*(?::|=>)"""
END_OF_KEY = Pattern(r"\s*(?::|=>)")
END_IN_OBJECT = Pattern(
    r"\s*(?:,?\s*\}\s*(?:[,}\])<`;/#]|\Z|\n)|,\s*(?:(?://|#)[^\n]*\n\s*)?" + MEMBER_KEY
    + r"|(?<=\n)\s*" + MEMBER_KEY + r"|\Z)")
END_IN_ARRAY = Pattern(r"\s*(?:,\s*(?:[\"'\[{\]\d-]|true|false|null)|\]|\Z)", re.I)
END_IN_CALL = Pattern(r"\s*(?:,\s*\w{1,60}\s*=|,?\s*\)|\Z)")
MEMBER_START = Pattern(MEMBER_KEY + r"|[\"'\[{]")
END_ALONE = Pattern(r"\s*\Z")
CLOSING_QUOTES = {'"': '"', "'": "'", "`": "`", "\u201c": "\u201d", '"""': '"""', "'''": "'''",
          "<escape>": "<escape>", '<|"|>': '<|"|>'}
OPENING_QUOTE = Pattern("\"\"\"|'''|<escape>|<\\|\"\\|>|[\"'`\u201c]")
JSON_BLANKS = Pattern(r"(?:\s+|//[^\n]*|/\*[^*]*(?:\*(?!/)[^*]*)*\*/|#[^\n]*)*")
JSON_NUMBER = Pattern(r"-?\d{1,300}(?:\.\d{1,300})?(?:[eE][+-]?\d{1,3})?(?![\w.])")
JSON_WORD = Pattern(r"[A-Za-z_][\w./-]{0,200}")
JSON_WORDS: Json = {"true": True, "false": False, "null": None, "none": None, "undefined": None}
JSON_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "/": "/", "\\": "\\",
           '"': '"', "'": "'", "`": "`"}
JSON_ESCAPE = Pattern(r"\\(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|(.))", re.S)
SURROGATE = Pattern("[\ud800-\udfff]")
MAX_JSON_DEPTH = 60
STRICT_JSON = json.JSONDecoder(
    strict=False, parse_constant=_no_constant, parse_float=_finite)


class LooseJson:
    """Reads JSON as a person would read it: Python, JavaScript and slips included.

    value() gives the value at a position and where it ends, or raises ValueError.
    unclosed tells that the text ended before the value did.
    """

    def __init__(self, text: str) -> None:
        self.text, self.unclosed = text, False

    def value(self, at: int, end: Pattern = END_ALONE, depth: int = 0) -> Tuple[Any, int]:
        opening = self.text[at:at + 1]
        if depth > MAX_JSON_DEPTH:
            raise ValueError("nested too deeply")
        if opening == "{":
            return self.members(at + 1, depth)
        if opening == "[":
            return self.items(at + 1, depth)
        quote = OPENING_QUOTE.match(self.text, at)
        if quote:
            return self.string(quote, end)
        number = JSON_NUMBER.match(self.text, at)
        if number:
            written = number.group()
            return (int if written.lstrip("-").isdigit() else float)(written), number.end()
        word = JSON_WORD.match(self.text, at)
        if word:
            return JSON_WORDS.get(word.group().lower(), word.group()), word.end()
        raise ValueError("no value")

    def skip(self, at: int) -> int:
        match = JSON_BLANKS.match(self.text, at)
        return match.end() if match else at

    def members(self, at: int, depth: int) -> Tuple[Json, int]:
        result: Json = {}
        end = at
        while True:
            at = self.skip(at)
            following = self.text[at:at + 1]
            if following == "}":
                return result, at + 1
            if following == ",":
                at += 1
            elif following == "{" and not result:
                result, at = self.members(at + 1, depth)
                at = self.skip(at)
                return result, at + (self.text[at:at + 1] == "}")
            elif result and self.ended(end, at):
                return result, end
            else:
                key, at = self.value(at, END_OF_KEY, MAX_JSON_DEPTH)
                colon = END_OF_KEY.match(self.text, at)
                if not colon or not isinstance(key, (str, int)):
                    raise ValueError("no key")
                result[str(key)], at = self.value(self.skip(colon.end()), END_IN_OBJECT, depth + 1)
                end = at

    def items(self, at: int, depth: int) -> Tuple[List[Any], int]:
        result: List[Any] = []
        end = at
        while True:
            at = self.skip(at)
            following = self.text[at:at + 1]
            if following == "]":
                return result, at + 1
            if following == ",":
                at += 1
            elif result and self.ended(end, at):
                return result, end
            else:
                value, at = self.value(at, END_IN_ARRAY, depth + 1)
                result.append(value)
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
    code = int(unicode or byte, 16)
    return chr(code)


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
    try:
        value, end, _ = read_json(text.strip())
    except ValueError:
        return None
    return None if text.strip()[end:].strip(" \t\r\n}];,") else value


# ------------------------------ the tool table ------------------------------
# What a client's file tools are called (Claude Code; Qwen Code; other published agents).
# Without these four kinds no work gets done, so they are never dropped.
CORE_TOOLS = frozenset((
    "Bash", "PowerShell", "run_shell_command", "shell", "execute_bash", "run_command", "bash",
    "Read", "read_file", "read", "view",
    "Edit", "edit", "edit_file", "replace", "str_replace", "str_replace_editor", "apply_patch",
    "Write", "write_file", "write", "create_file"))
# Holds the client's tool search open; the model must never call it (contract F1).
PLACEHOLDER_TOOL = "DeferredToolPlaceholder"
MCP_PREFIX = "mcp__"
# The client's other tools, the most useful first; ANY_OTHER_TOOL stands for those that
# are not named. A required answer format and the ways to further tools come first.
ANY_OTHER_TOOL = "*"
TOOL_RANKS: Tuple[str, ...] = (
    "StructuredOutput", "ToolSearch", "tool_search", "tool_call",
    "Grep", "grep_search", "Glob", "glob", "LS", "list_directory", "MultiEdit",
    "ExitPlanMode", "exit_plan_mode", "Agent", "Task", "agent", "Skill", "skill",
    "AskUserQuestion", "ask_user_question", "TodoWrite", "todo_write", "WebFetch", "web_fetch",
    ANY_OTHER_TOOL,
    "BashOutput", "KillShell", "KillBash", "TaskStop", "task_stop",
    "NotebookEdit", "notebook_edit", "TaskCreate", "TaskUpdate", "TaskOutput",
    "Monitor", "monitor",
    "SendMessage", "send_message", "TaskList", "TaskGet", "WebSearch", "web_search",
    "EnterPlanMode", "ListAgents", "list_agents", "get_goal", "update_goal", "ReportFindings",
    "EnterWorktree", "ExitWorktree", "CronCreate", "CronDelete", "CronList", "ScheduleWakeup",
    "Workflow", "DesignSync")
RANK_OF = {name: rank for rank, name in enumerate(TOOL_RANKS)}


def rank_tools(
    tools: Sequence[Tool], limit: int, in_use: AbstractSet[str] = frozenset()
) -> List[Tool]:
    """Choose the tools that are forwarded, at most limit (0: all), in the client's order.

    The core tools and those in use (called, or loaded by a tool_reference) stay even
    beyond the limit; then each MCP server has one place; the rest goes by TOOL_RANKS.
    """
    offered = [tool for tool in tools if tool.name != PLACEHOLDER_TOOL]
    if not limit or len(offered) <= limit:
        return offered
    names = list(dict.fromkeys(tool.name for tool in offered))
    kept = {name for name in names if name in CORE_TOOLS or name in in_use}
    kept.update(_shell_by_shape(offered))
    servers = {mcp_server(name) for name in kept} - {""}
    for name in sorted(names, key=_rank):
        server = mcp_server(name)
        if len(kept) < limit and server and server not in servers:
            servers.add(server)
            kept.add(name)
    for name in sorted(names, key=_rank):
        if len(kept) < limit:
            kept.add(name)
    return [tool for tool in offered if tool.name in kept]


def mcp_server(name: str) -> str:
    """The server's part of mcp__server__tool, "" for other names."""
    server, separator, _ = name[len(MCP_PREFIX):].partition("__")
    return server if name.startswith(MCP_PREFIX) and separator else ""


def _rank(name: str) -> int:
    unnamed = len(TOOL_RANKS) if mcp_server(name) else RANK_OF[ANY_OTHER_TOOL]
    return RANK_OF.get(name, unnamed)


def _shell_by_shape(tools: Sequence[Tool]) -> List[str]:
    """The shell of a client whose names are unknown: the tool that requires a command."""
    if any(tool.name in CORE_TOOLS for tool in tools):
        return []
    shells = [tool.name for tool in tools
              if "command" in required_of(tool.schema) and not mcp_server(tool.name)]
    return shells[:1]


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
TYPE_WORDS = {str: "a string", dict: "an object", list: "an array", bool: "a boolean",
              int: "a whole number"}


def _wrong(path: str, expected: str, value: Any) -> BadRequestError:
    return BadRequestError(f"{path}: expected {expected}, got {JSON_TYPE_WORDS[type(value)]}")


def _take(holder: Json, key: str, kind: Type[Value], path: str, default: Value) -> Value:
    """Read holder[key]; null and absent give the default, a wrong type 400."""
    value = holder.get(key)
    if value is None:
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise _wrong(f"{path}.{key}" if path else key, TYPE_WORDS[kind], value)
    return value


def _need(holder: Any, key: str, kind: Type[Value], path: str) -> Value:
    """Read holder[key], which must be there."""
    where = f"{path}.{key}" if path else key
    if holder.get(key) is None:
        raise BadRequestError(f"{where}: {TYPE_WORDS[kind]} is required")
    return _take(holder, key, kind, path, kind())


def _object(value: Any, path: str) -> Json:
    if not isinstance(value, dict):
        raise _wrong(path, "an object", value)
    return value


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


def _read_system(value: Any, path: str = "system") -> Tuple[str, ...]:
    """Read a system prompt: a string or text blocks."""
    if value is None:
        return ()
    if isinstance(value, str):
        texts = [value]
    elif isinstance(value, list):
        blocks = [_object(block, f"{path}.{i}") for i, block in enumerate(value)]
        texts = [_need(block, "text", str, f"{path}.{i}") if block.get("type", "text") == "text"
                 else _notice_of(block) for i, block in enumerate(blocks)]
    else:
        raise _wrong(path, "a string or an array of text blocks", value)
    return tuple(text for text in (BILLING_HEADER.sub("", text) for text in texts) if text)


def _notice_of(block: Json) -> str:
    """Say in words what cannot be passed on: never base64 in the prompt."""
    kind = clean(str(block.get("type", "unknown")), 60)
    source = block.get("source")
    source = source if isinstance(source, dict) else {}
    if kind == "document" and source.get("type") == "text" and isinstance(source.get("data"), str):
        return str(source["data"])
    media = clean(str(source.get("media_type") or ""), 60)
    size = len(source["data"]) * 3 // 4096 if isinstance(source.get("data"), str) else 0
    detail = ", ".join(filter(None, (media, f"{size} KB" if size else "")))
    return f"[A block of type {kind}{f' ({detail})' if detail else ''} was left out here:" \
           " this model reads text only.]"


def _text_block(block: Json, path: str) -> Block:
    return Text(_need(block, "text", str, path))


def _thinking_block(block: Json, path: str) -> Block:
    return Thinking(_take(block, "thinking", str, path, ""))


def _image_block(block: Json, path: str) -> Block:
    source = _need(block, "source", dict, path)
    if source.get("type") != "base64":
        return Text("[An image was left out here: only images sent as base64 can be shown"
                    " to the model.]")
    data = _need(source, "data", str, f"{path}.source")
    return Image(DATA_URI.sub("", data).translate(URL_SAFE_ALPHABET))


def _tool_use_block(block: Json, path: str) -> Block:
    return ToolUse(_need(block, "id", str, path), _need(block, "name", str, path),
                   _take(block, "input", dict, path, {}))


def _tool_result_block(block: Json, path: str) -> Block:
    content = block.get("content")
    if content is None or isinstance(content, str):
        parts: List[Block] = [Text(content or "")]
    elif isinstance(content, list):
        parts = [_result_part(_object(part, f"{path}.content.{i}"), f"{path}.content.{i}")
                 for i, part in enumerate(content)]
    else:
        raise _wrong(f"{path}.content", "a string or an array of blocks", content)
    text = "\n".join(part.text for part in parts if isinstance(part, Text) and part.text)
    images = tuple(part for part in parts if isinstance(part, Image))
    failed = _take(block, "is_error", bool, path, False)
    if failed:
        text = f"[The tool call failed]\n{text}"
    return ToolResult(_need(block, "tool_use_id", str, path),
                      text or ("[image]" if images else "(no output)"), images, failed)


def _result_part(part: Json, path: str) -> Block:
    if part.get("type") == "tool_reference":
        name = _need(part, "tool_name", str, path)
        return Text(f"The tool {name} is loaded now and can be called.")
    return _read_block(part, path)


BLOCK_READERS: Dict[str, Callable[[Json, str], Block]] = {
    "text": _text_block, "thinking": _thinking_block, "image": _image_block,
    "tool_use": _tool_use_block, "tool_result": _tool_result_block,
}


def _read_block(block: Json, path: str) -> Block:
    kind = _need(block, "type", str, path)
    if kind == "redacted_thinking":
        return Thinking("")
    reader = BLOCK_READERS.get(kind)
    return reader(block, path) if reader else Text(_notice_of(block))


def _read_message(value: Any, path: str) -> Message:
    message = _object(value, path)
    role = _need(message, "role", str, path)
    if role == "developer":
        role = "system"
    if role not in ("user", "assistant", "system"):
        raise BadRequestError(f"{path}.role: expected user, assistant or system,"
                              f" got {clean(role, 40)!r}")
    content = message.get("content")
    if content is None or isinstance(content, str):
        return Message(role, (Text(content),) if content else ())
    if not isinstance(content, list):
        raise _wrong(f"{path}.content", "a string or an array of blocks", content)
    return Message(role, tuple(
        _read_block(_object(block, f"{path}.content.{i}"), f"{path}.content.{i}")
        for i, block in enumerate(content)))


_latest_tools: List[Tuple[List[Any], Tuple[Tool, ...]]] = [([], ())]


def _read_tools(value: List[Any]) -> Tuple[Tool, ...]:
    """Read the client's own tools; server tools (typed) cannot run here.

    All sessions send the same 63 KB of them, so one copy serves all.
    """
    known, read = _latest_tools[0]
    if value == known:
        return read
    tools = []
    for i, entry in enumerate(value):
        tool = _object(entry, f"tools.{i}")
        if tool.get("type") not in (None, "custom"):
            continue
        tools.append(Tool(_need(tool, "name", str, f"tools.{i}"),
                          _take(tool, "description", str, f"tools.{i}", ""),
                          _take(tool, "input_schema", dict, f"tools.{i}", {})))
    _latest_tools[0] = (value, tuple(tools))
    return tuple(tools)


def _read_tool_choice(value: Optional[Json]) -> ToolChoice:
    if value is None:
        return ToolChoice()
    kind = _need(value, "type", str, "tool_choice")
    if kind not in ("auto", "any", "tool", "none"):
        raise BadRequestError("tool_choice.type: expected auto, any, tool or none,"
                              f" got {clean(kind, 40)!r}")
    name = _need(value, "name", str, "tool_choice") if kind == "tool" else ""
    return ToolChoice(kind, name)


def _read_sampling(body: Json) -> Tuple[Tuple[str, float], ...]:
    found: List[Tuple[str, float]] = []
    for key in ("temperature", "top_p", "top_k"):
        value = body.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise _wrong(key, "a number", value)
        found.append((key, value))
    return tuple(found)


def _loaded_tools(messages: List[Any]) -> AbstractSet[str]:
    """Collect the tools that tool search results brought in (CC F1)."""
    found = set()
    for message in messages:
        content = message.get("content")
        for block in content if isinstance(content, list) else ():
            inner = block.get("content")
            for part in inner if isinstance(inner, list) else ():
                if isinstance(part, dict) and part.get("type") == "tool_reference":
                    found.add(str(part.get("tool_name", "")))
    return frozenset(found)


def _read_session(body: Json) -> str:
    metadata = body.get("metadata")
    user_id = metadata.get("user_id") if isinstance(metadata, dict) else None
    return user_id if isinstance(user_id, str) else ""


def _answer_schema(body: Json) -> Optional[Json]:
    output = body.get("output_config")
    form = output.get("format") if isinstance(output, dict) else None
    schema = form.get("schema") if isinstance(form, dict) else None
    return schema if isinstance(schema, dict) else None


def parse_request(body: Any) -> Request:
    """Read a Messages body; raise BadRequestError with the field's path.

    Unknown fields are ignored, as Anthropic's own additions come without notice:
    context_management, service_tier, betas, safeguards' details and the like.
    """
    body = _object(body, "body")
    messages = _need(body, "messages", list, "")
    if not messages:
        raise BadRequestError("messages: at least one message is required")
    parsed = tuple(_read_message(value, f"messages.{i}") for i, value in enumerate(messages))
    max_tokens = _take(body, "max_tokens", int, "", DEFAULT_MAX_TOKENS)
    if max_tokens < 1:
        raise BadRequestError(f"max_tokens: expected at least 1, got {max_tokens}")
    stops = _take(body, "stop_sequences", list, "", [])
    for i, stop in enumerate(stops):
        if not isinstance(stop, str):
            raise _wrong(f"stop_sequences.{i}", "a string", stop)
    thinking = _take(body, "thinking", dict, "", {}).get("type")
    return Request(
        model=_take(body, "model", str, "", ""),
        system=_read_system(body.get("system")),
        messages=parsed,
        tools=_read_tools(_take(body, "tools", list, "", [])),
        tool_choice=_read_tool_choice(_take(body, "tool_choice", dict, "", None)),
        max_tokens=max_tokens,
        stop_sequences=tuple(stop for stop in stops if stop),
        sampling=_read_sampling(body),
        thinking=None if thinking is None else thinking != "disabled",
        schema=_answer_schema(body),
        stream=_take(body, "stream", bool, "", False),
        safeguards=bool(body.get("safeguards")),
        loaded=_loaded_tools(messages),
        session=_read_session(body),
    )


class ToolTable(NamedTuple):
    """The request's tools: all that the client can run, and those the model sees.

    A call of a tool that was capped still goes through.
    """

    offered: Mapping[str, Tool]
    sent: Tuple[Tool, ...]
    dropped: Tuple[str, ...]


def tool_table(request: Request, limit: int, last: Optional[ToolTable] = None) -> ToolTable:
    """Choose what the model sees; last is the table of the session's last turn.

    As long as the client offers the same tools the same are sent, whichever were
    called since: a changed list makes the model read everything again (OL 5b).
    """
    tools = [tool for tool in request.tools if tool.name != PLACEHOLDER_TOOL]
    offered = {tool.name: tool for tool in tools}
    if request.tool_choice.kind == "none":
        return ToolTable({}, (), ())
    if last and last.offered.keys() == offered.keys():
        kept = {tool.name for tool in last.sent}
        sent = [tool for tool in tools if tool.name in kept]
    else:
        used = {block.name for message in request.messages for block in message.blocks
                if isinstance(block, ToolUse)}
        sent = rank_tools(tools, limit, frozenset(used | request.loaded))
    names = {tool.name for tool in sent}
    return ToolTable(offered, tuple(sent), tuple(name for name in offered if name not in names))


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
DIGIT_WEIGHTS: Weights = ((b"0", 1.07),)
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


def text_sizes(text: str) -> Sizes:
    """Estimate a text's tokens by class, a long one's from even slices."""
    sample = text
    if len(text) > WHOLE_TEXT_CHARS:
        step = max(6 * SAMPLE_SLICE, SAMPLE_SLICE * len(text) // MAX_SAMPLE_CHARS) | 1
        sample = "".join([text[at:at + SAMPLE_SLICE] for at in range(0, len(text), step)])
    encoded = sample.encode("utf-8", "replace")
    cased = b" " + encoded.translate(CLASS_OF_BYTE, CONTINUATION_BYTES)
    classes = cased.replace(b"A", b"a")
    ascii_only = sample.isascii()
    letters, more, digits, wide = (
        sum(shape.count(pattern) * weight for pattern, weight in weights)
        for shape, weights in (
            (classes, TEXT_WEIGHTS), (cased, CASED_WEIGHTS), (classes, DIGIT_WEIGHTS),
            (classes, () if ascii_only else WIDE_WEIGHTS)))
    scale = len(text) / max(len(sample), 1)
    return Sizes(max(letters + more, len(encoded) / 200) * scale, digits * scale,
                 max(wide, 0) * scale)


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

    def sizes_of(self, text: str) -> Tuple[int, Sizes]:
        """Return a text's key and sizes, remembered from the last time.

        The key is its length and three places: hashing all of 1 MB costs 1.5 ms, and two
        texts mistaken for each other are so alike that their counts are.
        """
        middle = len(text) // 2
        key = hash((len(text), text[:160], text[middle:middle + 160], text[-160:]))
        found = self.known.get(key)
        if found is None:
            if len(self.known) >= MAX_KNOWN_TEXTS:
                self.known.clear()
            found = self.known[key] = text_sizes(text)
        return key, found

    def count(self, model: str, parts: Iterable[str], images: int = 0) -> Count:
        """Count a prompt: parts are its tools, system text and messages, in order."""
        rows = [self.sizes_of(part) for part in parts]
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


def fit(tokens: int, max_tokens: int, window: int, is_compaction: bool = False,
        headroom: Optional[int] = None, *, margin: int = 0) -> int:
    """Return num_predict for a prompt that fits, else raise PromptTooLongError.

    headroom stays free behind a turn (default headroom_tokens), not behind a compaction;
    margin is Count.margin: only a prompt too long for certain is refused, since Ollama
    refuses the others itself within 10 ms, with exact numbers.
    """
    free = 0 if is_compaction else headroom_tokens(window) if headroom is None else headroom
    maximum = max(window - 1 - free, 1)
    if tokens - margin > maximum:
        raise PromptTooLongError(tokens, maximum)
    sure, hoped = window - tokens - margin, window - tokens + margin
    return max(1, min(max_tokens, max(sure, min(hoped, MIN_ANSWER_TOKENS))))


def _shorten(text: str, keep: int) -> str:
    head, tail = keep * 2 // 3, keep // 3
    gone = len(text) - head - tail
    return text if gone <= 200 else (
        f"{text[:head]}\n[... {gone} characters left out to fit the model's window ...]\n"
        f"{text[-tail:]}")


def _shorten_block(block: Block, keep: int, everything: bool) -> Block:
    if isinstance(block, ToolResult):
        return block._replace(text=_shorten(block.text, keep), images=())
    if everything and isinstance(block, ToolUse):
        return block._replace(input={
            name: _shorten(value, keep) if isinstance(value, str) else value
            for name, value in block.input.items()})
    if everything and isinstance(block, (Text, Thinking)):
        return block._replace(text=_shorten(block.text, keep))
    return block


def block_tokens(block: Block) -> int:
    """Estimate a block's tokens."""
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
    facts = model_info if isinstance(model_info, dict) else {}
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


def judge_explicit(window: int, first_prompt: int) -> Optional[str]:
    """Return a warning when a window that the user set is too small."""
    if window - 1 < first_prompt:
        return (f"{window} tokens cannot hold the CLI's first prompt of about {first_prompt}"
                f" tokens; set OLLAMA_NUM_CTX to {SERVING_WINDOW} or more")
    if window < first_prompt + headroom_tokens(window) + MIN_WORK_TOKENS:
        return (f"{window} tokens leave only {window - first_prompt} beside the CLI's first"
                f" prompt of about {first_prompt}; {SERVING_WINDOW} work better")
    return None


def compact_env(window: int, max_output: int, first_prompt: int = FIRST_PROMPT_TOKENS
                ) -> Dict[str, str]:
    """Return the variables that make the CLI compact before the window is full.

    It compacts at context - min(max output, 20,000) - 13,000 (contract/claude-code.md D,
    F4; seen on 2.1.197 and 2.1.330). Where that would waste a third of the window, or
    come with every turn, a larger context is told, so that it compacts at three quarters
    of the real one. Where even that comes with every turn, it is left to the refusal. In
    small windows results are capped: the CLI gives up a session that was compacted three
    times within three turns each.
    """
    output = max(min(max_output, window // 8), 1)
    told, point = window, window - min(output, CLI_MAX_RESERVE) - CLI_BUFFER
    if point < window * 2 // 3:
        point, output = window * 3 // 4, max(min(max_output, window // 4), 1)
        told = point + min(output, CLI_MAX_RESERVE) + CLI_BUFFER
    env = {"CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(output)}
    if point >= first_prompt + MIN_WORK_TOKENS:
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
# What a small model needs to know of a tool: our own words, and those for its
# parameters ("" where the name says it, None for one that is not shown: the client itself
# fills it, no local model obeys it, or it is seldom right). A tool is recognised by its name and by
# having no required parameter that the row does not know; the client's list is
# contract/claude-code.md A8 and F1, contract/qwen-code.md. Optional parameters that
# Qwen forgets in long prompts are asked for in the tool's own text (peers.md 2, no. 21).
FILE = "absolute path"
ToolText = Tuple[str, Dict[str, Optional[str]]]
BASH_TEXT: ToolText = (
    "Run a shell command. The working directory stays between calls, variables do not. For"
    " files use the file tools, not cat, sed or echo. Quote paths with spaces. Nothing"
    " interactive (git rebase -i). Commit or push only when asked. Always give description.",
    {"command": "", "description": "what it does, in 5 to 10 words",
     "timeout": "milliseconds, default 120000",
     "run_in_background": "true: a notice comes when it ends",
     "is_background": "true for servers and watchers", "directory": "absolute path to run in",
     "dangerouslyDisableSandbox": None})
READ_TEXT: ToolText = (
    "Show a file: text with line numbers, an image, a PDF or a notebook. Not for folders. Of"
    " a long file (over 2000 lines) read a part: give offset and limit.",
    {"file_path": FILE, "offset": "line to start at", "limit": "number of lines",
     "pages": "of a PDF, for example 1-5", "allow_large": None})
EDIT_TEXT: ToolText = (
    "Replace text in a file that you have read. old_string is exact, with its indentation and"
    " without line numbers, and must occur once: add lines around it, or set replace_all.",
    {"file_path": FILE, "old_string": "", "new_string": "",
     "replace_all": "change every occurrence"})
WRITE_TEXT: ToolText = (
    "Write a whole file, new or in place of the old one. Read an old one first; to change a"
    " part use the edit tool.",
    {"file_path": FILE, "content": "", "record_as_artifact": None})
NOTEBOOK_TEXT: ToolText = (
    "Replace, insert or delete one cell of a Jupyter notebook that you have read.",
    {"notebook_path": FILE, "cell_id": "the cell, or the one to insert after", "new_source": "",
     "cell_type": "needed for insert", "edit_mode": "default replace"})
GLOB_TEXT: ToolText = (
    "Find files by name pattern, newest first.",
    {"pattern": "for example src/**/*.ts", "path": "folder, default the working directory"})
GREP_TEXT: ToolText = (
    "Search file contents for a regular expression (ripgrep syntax). Narrow it with path and"
    " glob.",
    {"pattern": "", "path": "file or folder", "glob": "for example *.js", "limit": "lines at most",
     "type": "file type, for example py", "output_mode": "default files_with_matches",
     "-i": "ignore case", "-n": "line numbers", "-A": "lines after", "-B": "lines before",
     "-C": "lines around", "head_limit": "results at most", "multiline": "let . match newlines"})
AGENT_TEXT: ToolText = (
    "Give a large independent task to a subagent; do small things yourself. It knows only your"
    " prompt: state goal, paths and what to report. Only you see its report: tell the user,"
    " and never guess it.",
    {"description": "3 to 5 words", "prompt": "", "subagent_type": "one of the listed",
     "run_in_background": "false: wait for the report", "isolation": None, "model": None,
     "effort": None})
SKILL_TEXT: ToolText = (
    "Load instructions for one kind of task. Call it first when a listed skill fits or the"
    " user types /name. Never guess names; /help and the like are no skills.",
    {"skill": "name as listed, no slash", "args": ""})
SEARCH_TOOLS_TEXT: ToolText = (
    "Load tools that are only listed by name, so that they can be called.",
    {"query": "select:NAME,NAME or words", "max_results": "default 5"})
FETCH_TEXT: ToolText = (
    "Fetch a public web page and answer prompt from it. Not for localhost or pages behind a"
    " login.",
    {"url": "", "prompt": "what to find out", "offset": "where to read on"})
ASK_TEXT: ToolText = (
    "Let the user choose, only where you cannot go on without it. 1 to 4 questions, each with"
    " 2 to 4 options; Other is added.",
    {"questions": "", "answers": None, "annotations": None, "metadata": None})
STEPS_TEXT: ToolText = (
    "Set the list of steps shown to the user. Send the whole list each time; one item in"
    " progress at a time, marked completed as soon as it is done.",
    {"todos": ""})
STOP_TEXT: ToolText = ("Stop a background task.",
                       {"task_id": "", "shell_id": "old name of task_id"})
LIST_AGENTS_TEXT: ToolText = (
    "List the agents that SendMessage can reach.",
    {"cursor": None, "channel": None, "q": None})
MESSAGE_TEXT: ToolText = (
    "Send a message to another agent, for example to go on with a finished subagent.",
    {"to": "name or id of the agent", "message": "", "summary": "5 to 10 words",
     "notify_when_idle": ""})
PLAN_EXIT_TEXT: ToolText = (
    "In plan mode: say that the plan file is written and ask the user to approve it. Ends"
    " planning; the only way to ask for approval.",
    {"allowedPrompts": "", "plan": "the plan"})
TOOL_TEXTS: Dict[str, ToolText] = {
    "Bash": BASH_TEXT, "run_shell_command": BASH_TEXT,
    "Read": READ_TEXT, "read_file": READ_TEXT,
    "Edit": EDIT_TEXT, "edit": EDIT_TEXT,
    "Write": WRITE_TEXT, "write_file": WRITE_TEXT,
    "NotebookEdit": NOTEBOOK_TEXT, "notebook_edit": NOTEBOOK_TEXT,
    "Glob": GLOB_TEXT, "glob": GLOB_TEXT, "Grep": GREP_TEXT, "grep_search": GREP_TEXT,
    "Agent": AGENT_TEXT, "Task": AGENT_TEXT, "agent": AGENT_TEXT,
    "Skill": SKILL_TEXT, "skill": SKILL_TEXT,
    "ToolSearch": SEARCH_TOOLS_TEXT,
    "WebFetch": FETCH_TEXT, "web_fetch": FETCH_TEXT,
    "AskUserQuestion": ASK_TEXT, "TodoWrite": STEPS_TEXT, "todo_write": STEPS_TEXT,
    "TaskStop": STOP_TEXT, "task_stop": STOP_TEXT, "KillShell": STOP_TEXT,
    "ListAgents": LIST_AGENTS_TEXT, "SendMessage": MESSAGE_TEXT,
    "ExitPlanMode": PLAN_EXIT_TEXT,
    "EnterPlanMode": ("Start plan mode: explore and write a plan for the user to approve,"
                      " before a change that is large or open to choices.", {}),
    "WebSearch": ("Search the web. Name the pages you used.",
                  {"query": "", "allowed_domains": "", "blocked_domains": ""}),
    "BashOutput": ("Show new output of a background command.",
                   {"bash_id": "", "filter": "regular expression"}),
    "TaskOutput": ("Show the output of a background task.",
                   {"task_id": "", "block": "wait for its end", "timeout": "milliseconds"}),
    "TaskCreate": ("Add a task to the list shown to the user; for work of three or more steps.",
                   {"subject": "short title", "description": "what to do",
                    "activeForm": "for example Running tests", "metadata": ""}),
    "TaskUpdate": ("Change a task: in_progress when you start it, completed only when it is"
                   " wholly done.",
                   {"taskId": "", "status": "", "subject": "", "description": "",
                    "activeForm": "", "owner": "", "metadata": "", "addBlocks": "ids that wait"
                    " for this", "addBlockedBy": "ids this waits for"}),
    "TaskGet": ("Show one task of the list.", {"taskId": ""}),
    "TaskList": ("Show the task list.", {}),
    "EnterWorktree": ("Work in a git worktree, only when the user or CLAUDE.md says so.",
                      {"name": "of a new one", "path": "of an existing one"}),
    "ExitWorktree": ("Leave the worktree that EnterWorktree made.",
                     {"action": "", "discard_changes": "only when the user agreed"}),
    "ScheduleWakeup": ("In /loop: say when to wake up again, or stop the loop.",
                       {"delaySeconds": "60 to 3600", "reason": "one sentence",
                        "prompt": "the /loop input again", "stop": "true: end the loop",
                        "noop": "true: nothing had changed"}),
    "Workflow": ("Run a script that directs many subagents. Only when the user asked for a"
                 " workflow in so many words; load the skill workflow-authoring first where"
                 " there is one. The script begins with export const meta = {name,"
                 " description}.",
                 {"script": "JavaScript", "name": "of a saved workflow", "args": "",
                  "scriptPath": "", "resumeFromRunId": "", "description": "", "title": ""}),
    "ReportFindings": ("Report the findings of a code review, worst first, when the review's"
                       " instructions say so.", {"findings": "", "level": ""}),
    "Monitor": ("Watch a command in the background; each line it prints is a notice to you.",
                {"command": "", "description": "what is watched", "timeout_ms": "at most 600000",
                 "ws": "a WebSocket instead of a command"}),
    "CronCreate": ("Run a prompt later or again and again.",
                   {"cron": "minute hour day month weekday, local time", "prompt": "",
                    "recurring": "false: once", "durable": "true: survives a restart"}),
    "CronDelete": ("Cancel a scheduled prompt.", {"id": ""}),
    "CronList": ("List the scheduled prompts.", {}),
}
# Characters of what is not ours to rewrite: a tool of an MCP server, one of its
# parameters. Models act on the first sentences; servers send up to 10 KB a tool.
MAX_TOOL_TEXT_CHARS = 1000
MAX_PARAMETER_TEXT_CHARS = 240
# The same for what is nested in a known tool's parameters: its own text says the rest.
MAX_NESTED_TEXT_CHARS = 60
# Keywords that say nothing to a model: Ollama drops them, or prints them as tags of
# their own (contract/ollama.md 1; peers.md 1d, Lucebox).
NOISE_KEYWORDS = frozenset((
    "$schema", "$id", "$comment", "additionalProperties", "examples", "example", "title", "format",
    "pattern", "propertyNames", "contentEncoding", "contentMediaType", "exclusiveMinimum",
    "exclusiveMaximum", "minLength", "maxLength", "minItems", "maxItems", "uniqueItems", "readOnly",
    "writeOnly", "deprecated"))
NAMED_SCHEMAS = ("properties", "$defs", "definitions", "patternProperties")
# Numbers that only say "a whole number of JavaScript".
MAX_SAFE_INTEGER = 2**53 - 1
AGENTS_IN_TOOL = Pattern(r"(?m)^.{0,40}vailable agent types.{0,60}:\n(?:- .*\n?)+")
SKILL_IN_TOOL = Pattern(
    r"<skill>\s*<name>([^<]{1,99})</name>\s*<description>([^<]{0,9999})</description>")
ENTRY = Pattern(r"(?m)^- (?:\*\*)?(?:([\w-]{1,80})(?:\*\*)?: )?")


def slim_tool(tool: Tool) -> Tool:
    """Say the same of a tool in fewer words; same input, same bytes.

    Known tools get our own text (and keep a list of agents or skills that stands in theirs),
    others keep theirs up to MAX_TOOL_TEXT_CHARS. Calls are still checked by the client's
    schema.
    """
    row = TOOL_TEXTS.get(tool.name)
    if row is None or not all(name in row[1] for name in required_of(tool.schema)):
        row = (clip(tool.description, MAX_TOOL_TEXT_CHARS), {})
    elif row in (AGENT_TEXT, SKILL_TEXT):
        row = ("\n".join([row[0], *_list_in_tool(tool.description)]), row[1])
    return Tool(tool.name, row[0], slim_schema(tool.schema, row[1]))


def _list_in_tool(description: str) -> List[str]:
    """The agents or skills that older clients name in the tool, not in a message."""
    agents = AGENTS_IN_TOOL.search(description)
    if agents:
        return [clip_entries(agents.group().rstrip())]
    skills = [f"- {found.group(1).strip()}: {' '.join(found.group(2).split())}"
              for found in SKILL_IN_TOOL.finditer(description)]
    return ["Available skills:", clip_entries("\n".join(skills))] if skills else []


def slim_schema(schema: Json, texts: Mapping[str, Optional[str]]) -> Json:
    """Leave the noise out of a tool's schema; texts describes its own parameters."""
    slim: Json = _without_noise(
        schema, MAX_NESTED_TEXT_CHARS if texts else MAX_PARAMETER_TEXT_CHARS)
    parameters = slim.get("properties")
    if not isinstance(parameters, dict):
        return slim
    for name in list(parameters):
        if name in texts and texts[name] is None:
            del parameters[name]
        elif name in texts and isinstance(parameters[name], dict):
            parameters[name].pop("description", None)
            if texts[name]:
                parameters[name]["description"] = texts[name]
    return slim


def _without_noise(node: Any, limit: int) -> Any:
    if isinstance(node, list):
        return [_without_noise(item, limit) for item in node]
    if not isinstance(node, dict):
        return node
    slim: Json = {}
    for key, value in node.items():
        if key in NAMED_SCHEMAS and isinstance(value, dict):
            slim[key] = {name: _without_noise(part, limit) for name, part in value.items()}
        elif key in ("enum", "const", "default", "required"):
            slim[key] = value
        elif key == "description" and isinstance(value, str):
            slim[key] = clip(value, limit)
        elif key not in NOISE_KEYWORDS and not _is_unbounded(key, value):
            slim[key] = _without_noise(value, limit)
    return slim


def _is_unbounded(key: str, value: Any) -> bool:
    return key in ("minimum", "maximum") and value in (MAX_SAFE_INTEGER, -MAX_SAFE_INTEGER)


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

class Passage(NamedTuple):
    """A passage of the client's texts that is about tools.

    It starts at a line that start matches, at the beginning of a paragraph where
    paragraph is set; more matches the first line of a further paragraph that belongs to
    it. It is left out unless one of the tools in needs is forwarded; with no needs always.
    If it stays, header takes the place of its first line.
    """

    name: str
    start: Pattern
    needs: Tuple[str, ...]
    paragraph: bool = True
    more: Optional[Pattern] = None
    header: str = ""


AGENT_TOOLS = ("Agent", "Task", "agent")
SKILL_TOOLS = ("Skill", "skill")
TASK_TOOLS = ("TaskCreate", "TaskUpdate", "TodoWrite", "todo_write")
# First lines as 2.1.197, 2.1.330 and Qwen Code 0.24.4 write them (contract A6, F1).
PASSAGES: Tuple[Passage, ...] = (
    Passage("list of agents", Pattern(r"Available agent types for the \w+ tool:"), AGENT_TOOLS,
            more=Pattern(r"When you launch multiple agents ")),
    Passage("list of skills",
            Pattern(r"The following skills are available for use with the Skill tool\b"),
            SKILL_TOOLS, more=Pattern(r"- |<available_skills>|</?skill>")),
    Passage("list of deferred tools",
            Pattern(r"The following deferred tools are (?:now )?available via \w+\."),
            ("ToolSearch", "tool_search"),
            header="Load these tools with ToolSearch (select:NAME) before you call them:"),
    Passage("task reminder",
            Pattern(r"The (?:task tools haven't|TodoWrite tool hasn't) been used recently\."),
            TASK_TOOLS),
    # The texts of Skill and Agent say these two already.
    Passage("hint at skills",
            Pattern(r" ?- When the user types `/[^`]{1,40}`, invoke it via Skill"), (),
            paragraph=False),
    Passage("hint at agents",
            Pattern(r" ?- (?:Use the (?:Agent|Task) tool with specialized agents"
                    r"|Calling Agent with subagent_type"
                    r"|For broad codebase exploration .{0,80} spawn Agent with )"),
            (), paragraph=False),
    Passage("hint at tasks", Pattern(r" ?- Use (?:TaskCreate|TodoWrite) to plan "),
            TASK_TOOLS, paragraph=False),
    # The client's own budget, of a window that the local model does not have; a new
    # number at every turn breaks the prefix (contract/ollama.md 5, #17918).
    Passage("token count", Pattern(r"<total_tokens>[^<]{0,80}</total_tokens>\s*$"), ()),
)
SHORTENED = ("list of agents", "list of skills")
# The client's own agents and skills: a name and a few words are enough. The user's
# entries keep what he wrote up to MAX_ENTRY_CHARS.
CLIENT_ENTRIES = frozenset((
    "claude", "claude-code-guide", "Explore", "general-purpose", "Plan", "statusline-setup",
    "dataviz", "deep-research", "update-config", "keybindings-help", "verify", "code-review",
    "simplify", "fewer-permission-prompts", "loop", "claude-api", "workflow-authoring", "run",
    "plugin-authoring", "init", "review", "security-review"))
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
    if not text.lstrip().startswith("<system-reminder>"):
        return _slim_passages(text, kept_tools, left_out), left_out
    parts, end = [], 0
    reminder = REMINDER.match(text)
    while reminder:
        inner = _slim_passages(reminder.group(2), kept_tools, left_out)
        if inner.strip() or inner == reminder.group(2):
            parts.append(reminder.group(1) + inner + reminder.group(3))
        end = reminder.end()
        reminder = REMINDER.match(text, end)
    return "".join(parts) + text[end:], left_out


# The same texts come with each turn of a session: 0.2 ms of a 77 KB request's 1.2.
_slim_known = lru_cache(maxsize=128)(_slim_text)


def _slim_passages(text: str, kept_tools: Sequence[str], left_out: List[str]) -> str:
    if USER_RULES.search(text):
        return text
    lines, slim, here, before = text.split("\n"), [], 0, len(left_out)
    while here < len(lines):
        row = _passage_at(lines, here)
        end = _passage_end(lines, here, row) if row else here + 1
        kept = lines[here:end]
        if row and not any(name in kept_tools for name in row.needs):
            left_out.append(row.name)
            kept = []
            while row.paragraph and end < len(lines) and not lines[end].strip():
                end += 1
        elif row:
            passage = "\n".join([row.header or kept[0], *kept[1:]])
            if row.name in SHORTENED:
                passage = clip_entries(passage)
            if passage != "\n".join(kept):
                left_out.append(row.name + ", shortened")
            kept = [passage]
        slim += kept
        here = end
    if len(left_out) == before:
        return text
    return EMPTY_HEADING.sub("", "\n".join(slim))


def _passage_at(lines: Sequence[str], here: int) -> Optional[Passage]:
    first = here == 0 or not lines[here - 1].strip()
    for row in PASSAGES if lines[here].strip() else ():
        if (first or not row.paragraph) and row.start.match(lines[here]):
            return row
    return None


def _passage_end(lines: Sequence[str], here: int, row: Passage) -> int:
    """Number of the line after the passage."""
    if not row.paragraph:
        return here + 1
    end = here
    while True:
        while end < len(lines) and lines[end].strip():
            end += 1
        after = end
        while after < len(lines) and not lines[after].strip():
            after += 1
        if row.more is None or after == len(lines) or not row.more.match(lines[after]):
            return end
        end = after


def clip_entries(passage: str) -> str:
    """Shorten the entries of a list of agents or skills ("- name: what it is for")."""
    entries = list(ENTRY.finditer(passage))
    slim = [passage[:entries[0].start()] if entries else passage]
    for entry, following in zip(entries, [*entries[1:], None]):
        limit = MAX_CLIENT_ENTRY_CHARS if entry.group(1) in CLIENT_ENTRIES else MAX_ENTRY_CHARS
        whole = passage[entry.start():following.start() if following else len(passage)]
        body = whole.partition("\n\n")[0].rstrip("\n")
        slim.append(clip(body, limit) + whole[len(body):])
    return "".join(slim)


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

    def can(self, capability: str) -> bool:
        """Say whether the model is known to have a capability."""
        return self.capabilities is not None and capability in self.capabilities

    def lacks(self, capability: str) -> bool:
        return self.capabilities is not None and capability not in self.capabilities


TOOLS_FIRST_RENDERERS = ("qwen3.5", "qwen3.8")
RENDERER_LINE = Pattern(r"^RENDERER\s+(\S+)", re.MULTILINE)
FROM_DIGEST = Pattern(r"^FROM\s.*sha256-([0-9a-f]{12,64})", re.MULTILINE)
NUM_CTX_LINE = Pattern(r"^num_ctx\s+([0-9]{1,9})\s*$", re.MULTILINE)


def facts_from_show(name: str, show: Any) -> ModelFacts:
    """Read /api/show; whatever is missing or of another type is left unknown."""
    show = show if isinstance(show, dict) else {}
    texts = {key: show[key] if isinstance(show.get(key), str) else ""
             for key in ("modelfile", "template", "parameters")}
    renderer = RENDERER_LINE.search(texts["modelfile"])
    renderer_name = renderer.group(1) if renderer else ""
    digest = FROM_DIGEST.search(texts["modelfile"])
    window = NUM_CTX_LINE.search(texts["parameters"])
    capabilities = show.get("capabilities")
    return ModelFacts(
        name=name,
        path=_path_of(bool(renderer), texts["template"]),
        renderer=renderer_name,
        capabilities=frozenset(map(str, capabilities)) if isinstance(capabilities, list) else None,
        trained=_trained_window(show.get("model_info")),
        num_ctx=int(window.group(1)) if window else None,
        digest=digest.group(1) if digest else "",
        remote=bool(show.get("remote_model") or show.get("remote_host")),
        tools_in_text=isinstance(capabilities, list) and "tools" not in capabilities,
        tools_first=renderer_name.startswith(TOOLS_FIRST_RENDERERS),
    )


def _path_of(renderer: bool, template: str) -> str:
    if renderer:
        return "A"
    if not template:
        return ""
    if "{%" in template or template.strip() == "{{ .Prompt }}":
        return "C"
    return "B"


def _trained_window(model_info: Any) -> Optional[int]:
    if not isinstance(model_info, dict):
        return None
    for key, value in model_info.items():
        if str(key).endswith(".context_length") and natural(value):
            return natural(value)
    return None


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


def rendered_prompt(answer: Any) -> Optional[str]:
    """Take the prompt out of a render-only answer; None where it has another shape."""
    detail = answer.get("_debug_info") if isinstance(answer, dict) else None
    text = detail.get("rendered_template") if isinstance(detail, dict) else None
    return text if isinstance(text, str) and text else None


def facts_from_probe(facts: ModelFacts, prompt: str) -> ModelFacts:
    """Add what the rendered probe shows."""
    return facts._replace(
        tools_in_text=facts.tools_in_text or bool(GO_STRUCT.search(prompt))
        or "ProbeTool" not in prompt.partition("probe question")[0],
        drops_calls="probe value" not in prompt,
        tools_first=0 <= prompt.find("ProbeTool") < prompt.find("probe system"),
        chatml=CHATML_START in prompt)


SCHEMA_DEPTH = 12  # nesting of a schema; deeper parts become {} (also ends $ref circles)
KEPT_KEYWORDS = ("type", "description", "enum", "items", "properties", "required", "anyOf")


def normal_schema(schema: Any, defs: Optional[Json] = None, depth: int = 0) -> Json:
    """Rewrite a JSON schema so that Ollama's strict decoder takes it (OL 1, tools).

    References are put in place; boolean schemas become {}; oneOf and allOf, which
    Ollama drops, become anyOf and a merge; keywords that it drops are left out.
    """
    if not isinstance(schema, dict) or depth > SCHEMA_DEPTH:
        return {}
    if defs is None:
        defs = {**_mapping(schema.get("definitions")), **_mapping(schema.get("$defs"))}
    reference = schema.get("$ref")
    if isinstance(reference, str):
        target = _mapping(defs.get(reference.rpartition("/")[2]))
        schema = {**target, **{k: v for k, v in schema.items() if k != "$ref"}}
    for part in schema.get("allOf") if isinstance(schema.get("allOf"), list) else ():
        schema = {**_mapping(part), **schema}
    if "anyOf" not in schema and isinstance(schema.get("oneOf"), list):
        schema = {**schema, "anyOf": schema["oneOf"]}
    if "const" in schema and "enum" not in schema:
        schema = {**schema, "enum": [schema["const"]]}
    result: Json = {}
    for key in KEPT_KEYWORDS:
        if key in schema:
            value = _normal_keyword(key, schema[key], defs, depth)
            if value is not None:
                result[key] = value
    return result


def _mapping(value: Any) -> Json:
    return value if isinstance(value, dict) else {}


def _normal_keyword(key: str, value: Any, defs: Json, depth: int) -> Any:
    """Return one keyword's value in a form that Ollama decodes, or None to leave it out."""
    if key == "properties" and isinstance(value, dict):
        return {str(name): normal_schema(part, defs, depth + 1) for name, part in value.items()}
    if key == "items":
        return normal_schema(value, defs, depth + 1) or None
    if key == "anyOf" and isinstance(value, list):
        return [normal_schema(part, defs, depth + 1) for part in value] or None
    fits = {"description": isinstance(value, str), "enum": isinstance(value, list),
            "required": _all_strings(value),
            "type": isinstance(value, str) or _all_strings(value)}
    return value if fits.get(key) else None


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
    words = "; ".join(f"{key}: {to_json(schema[key])}" for key in extra[1:])
    description = " ".join(filter(None, (schema.get("description", ""), f"({words})")))
    return {**{k: v for k, v in schema.items() if k not in extra[1:]}, "description": description}


def tool_json(tool: Tool, renderer: str = "") -> Json:
    """Make Ollama's form of a tool definition."""
    schema = normal_schema(tool.schema)
    properties = schema.get("properties", {})
    if renderer == "qwen3-coder":
        properties = {name: _single_extra(part) for name, part in properties.items()}
    parameters: Json = {"type": "object"}
    if schema.get("required"):
        parameters["required"] = schema["required"]
    parameters["properties"] = properties
    return {"type": "function", "function": {
        "name": tool.name, "description": tool.description, "parameters": parameters}}


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


class ChatMessage(NamedTuple):
    """One message of /api/chat; calls hold (id, name, arguments)."""

    role: str
    content: str
    thinking: str = ""
    images: Tuple[str, ...] = ()
    calls: Tuple[Tuple[str, str, Json], ...] = ()
    tool_name: str = ""
    call_id: str = ""


def message_json(message: ChatMessage) -> Json:
    """Make the JSON object that Ollama reads."""
    made: Json = {"role": message.role, "content": message.content}
    if message.thinking:
        made["thinking"] = message.thinking
    if message.images:
        made["images"] = list(message.images)
    if message.calls:
        made["tool_calls"] = [
            {"id": call_id, "function": {"index": i, "name": name, "arguments": arguments}}
            for i, (call_id, name, arguments) in enumerate(message.calls)]
    if message.role == "tool":
        made["tool_name"], made["tool_call_id"] = message.tool_name, message.call_id
    return made


Recall = Callable[[int, Message], Optional[str]]


def _join_texts(texts: Iterable[str]) -> str:
    """Join text blocks with a blank line.

    The CLI adds a line feed to a block once another follows it (A6): without this
    the same block would change after a failed prompt.
    """
    kept = [text for text in texts if text]
    return "\n\n".join([text[:-1] if text.endswith("\n") else text for text in kept[:-1]]
                       + kept[-1:])


def fold_turns(messages: Sequence[Message]) -> Tuple[List[str], List[Tuple[int, Message]]]:
    """Put system messages where every template keeps them and join like neighbours.

    Returns the system texts that came before any turn, and the turns, each with the
    index of its first message. A later system message rides as a reminder in the user
    turn before it, else in the one after it: templates drop it or hoist it to the top,
    which loses it or makes the model read everything again (OL 1, OL 5).
    """
    leading: List[str] = []
    turns: List[Tuple[int, Message]] = []
    for index, message in enumerate(messages):
        role, blocks = message.role, message.blocks
        if role == "system":
            text = _join_texts(b.text for b in blocks if isinstance(b, Text))
            text = BILLING_HEADER.sub("", text)
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


def _assistant_message(message: Message, facts: ModelFacts, raw: Optional[str]) -> ChatMessage:
    if raw is not None:
        return ChatMessage("assistant", raw)
    text = _join_texts(b.text for b in message.blocks if isinstance(b, Text))
    thought = "\n".join(b.text for b in message.blocks if isinstance(b, Thinking) and b.text)
    calls = tuple((b.id, b.name, b.input) for b in message.blocks if isinstance(b, ToolUse))
    if calls and (facts.tools_in_text or (facts.drops_calls and text)):
        marks = [call_markup(name, arguments) for _, name, arguments in calls]
        return ChatMessage("assistant", "\n".join(filter(None, [text, *marks])), thought)
    return ChatMessage("assistant", text, thought, (), calls)


NO_RESULT = "[No result: the call was interrupted before it ended.]"


def _in_call_order(results: List[ToolResult], calls: Sequence[ToolUse]) -> List[ToolResult]:
    """Sort results by the calls they answer, since Ollama pairs them by order alone.

    The CLI sends them as they were completed (A7). A call without a result gets a
    placeholder where others have one, or the rest would answer the wrong call.
    """
    by_id = {result.id: result for result in results}
    ordered = [by_id.pop(call.id, ToolResult(call.id, NO_RESULT)) for call in calls]
    return ordered + [result for result in results if result.id in by_id]


def _user_messages(
    message: Message, calls: Sequence[ToolUse], facts: ModelFacts,
) -> List[ChatMessage]:
    """Make the tool messages and the user message of one client turn."""
    results = [b for b in message.blocks if isinstance(b, ToolResult)]
    rest: List[Block] = [b for b in message.blocks if isinstance(b, (Text, Image))]
    made: List[ChatMessage] = []
    names = {call.id: call.name for call in calls}
    for result in _in_call_order(results, calls) if results else ():
        text, images = _pictures(result.images, result.text, facts)
        if images and facts.path == "C":  # jinja templates print a tool's text only
            rest = [Image(image) for image in images] + rest
            images = ()
        made.append(ChatMessage("tool", text, "", images, (), names.get(result.id, ""), result.id))
    texts = [b.text for b in rest if isinstance(b, Text)]
    pictures = tuple(b for b in rest if isinstance(b, Image))
    if made and not pictures and all(t.lstrip().startswith(REMINDER_START) for t in texts):
        # A user turn behind tool results makes thinking models read everything since the
        # last one again: 1,774 tokens against 32 (OL 5b).
        last = made[-1]
        made[-1] = last._replace(content=_join_texts([last.content, *texts]))
    elif rest:
        text, images = _pictures(pictures, _join_texts(texts), facts)
        made.append(ChatMessage("user", text, "", images))
    return made


def _pictures(
    images: Sequence[Image], text: str, facts: ModelFacts,
) -> Tuple[str, Tuple[str, ...]]:
    """Pass images on, or say in the text that this model cannot see them."""
    if not images or not facts.lacks("vision"):
        return text, tuple(image.base64 for image in images)
    notice = f"[{len(images)} image{'s were' if len(images) > 1 else ' was'} left out here:" \
             f" the model {facts.name} cannot see images.]"
    return _join_texts([text, notice]), ()


# The git status at the end of the CLI's system text (2.1.197) differs from session to
# session; behind it the tools, and all else, would be read again (OL 5b).
VOLATILE_END = Pattern(r"(?<!\n)\n+(gitStatus: [\s\S]*)\Z")


def move_volatile(
    system: List[str], turns: List[Tuple[int, Message]],
) -> Tuple[List[str], List[Tuple[int, Message]]]:
    """Move what changes between sessions from the system text into the first user turn."""
    moved = tuple(Text(as_reminder(match.group(1))) for match in
                  map(VOLATILE_END.search, system) if match)
    if not moved or not turns or turns[0][1].role != "user":
        return system, turns
    stable = [VOLATILE_END.sub("", text) for text in system]
    index, first = turns[0]
    return stable, [(index, Message("user", moved + first.blocks)), *turns[1:]]


CHOICE_WORDS = {
    "any": "Answer with a tool call now: this turn must call one of the tools.",
    "tool": "Answer with a call of the tool {name} now, and of no other tool.",
}


def chat_messages(
    request: Request, tools: Sequence[Tool], facts: ModelFacts, recall: Recall,
    slim: Callable[[str], str], *, tools_text: str = "",
) -> List[ChatMessage]:
    """Make all messages of /api/chat.

    recall(index, turn) gives an assistant turn's raw text where it is remembered;
    slim shortens texts that are not the user's; tools_text is tools_as_text(tools) where
    the caller has it.
    """
    leading, turns = fold_turns(request.messages)
    system, turns = move_volatile([*request.system, *leading], turns)
    system = [slim(text) for text in system]
    if tools and facts.tools_in_text:
        system.append(tools_text or tools_as_text(tools))
    made = [ChatMessage("system", "\n\n".join(system))] if any(system) else []
    calls: Sequence[ToolUse] = ()
    for index, turn in turns:
        if turn.role == "assistant":
            calls = [b for b in turn.blocks if isinstance(b, ToolUse)]
            message = _assistant_message(turn, facts, recall(index, turn))
            if message.content or message.calls:
                made.append(message)
        else:
            slimmed = Message("user", tuple(
                Text(slim(b.text)) if isinstance(b, Text) and b.text.startswith(REMINDER_START)
                else b for b in turn.blocks))
            made.extend(_user_messages(slimmed, calls, facts))
            calls = ()
    if request.tool_choice.kind in CHOICE_WORDS and tools and made:
        words = CHOICE_WORDS[request.tool_choice.kind].format(name=request.tool_choice.name)
        last = made[-1]
        made[-1] = last._replace(content=_join_texts([last.content, as_reminder(words)]))
    return made


def keep_alive_value(text: str) -> Union[int, float, str]:
    """Make Ollama's keep_alive: a number of seconds, or a duration with its unit.

    A bare number as a string is refused: "missing unit in duration" (OL 1).
    """
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return text


def load_options(num_ctx: Optional[int]) -> Json:
    """Make the options that decide how a model is loaded: alike on every request."""
    return {"num_ctx": num_ctx} if num_ctx else {}


class ReusedJson:
    """Write message lists, taking over what the last list of the session had.

    A 1 MB session of 78 messages costs 2.4 ms to write, its newest turn 0.1 ms.
    """

    def __init__(self) -> None:
        self.first: Optional[ChatMessage] = None
        self.same = 0  # messages that the last list had too
        self._messages: List[ChatMessage] = []
        self._written: List[str] = []

    def write(self, messages: List[ChatMessage]) -> Tuple[str, int]:
        """Return the messages' JSON, comma-separated, and same."""
        same = 0
        for old, new in zip(self._messages, messages):
            if old != new:
                break
            same += 1
        written = self._written[:same] + [to_json(message_json(m)) for m in messages[same:]]
        self._messages, self._written, self.same = messages, written, same
        self.first = messages[0] if messages else None
        return ",".join(written), same


def message_text(message: ChatMessage) -> str:
    """Return what a message adds to the prompt, for counting."""
    if not message.calls and not message.thinking:
        return message.content
    calls = [call_markup(name, arguments) for _, name, arguments in message.calls]
    return "\n".join([message.thinking, message.content, *calls])


def agent_line(agent: str) -> str:
    """Make a subagent's prompt differ from its first token on.

    Two subagents of one kind share most of their prompt; alternating in one slot they
    would throw each other's tail away: 5,000 tokens at every switch (OL 5b).
    """
    return f"{zlib.crc32(agent.encode()):08x} is the number of this agent."


COMPACTION_MARK = "CRITICAL: Respond with TEXT ONLY"


def wants_thinking(request: Request, facts: ModelFacts) -> Optional[bool]:
    """Decide `think`: None leaves it out, for a model that cannot or may not.

    Where a capable model is not told, it thinks (OL 1), so a request without a
    thinking field says false.
    """
    if facts.think_refused or not facts.can("thinking"):
        return None
    return bool(request.thinking)


def chat_body(
    request: Request, facts: ModelFacts, config: Config, options: Json, *,
    messages_json: str, tools_json: str,
) -> str:
    """Write the body of /api/chat from the JSON of its messages and tools.

    options holds load options and num_predict.
    """
    merged = {**options, **dict(request.sampling)}
    fields: Json = {"stream": True, "truncate": False, "shift": False,
                    "keep_alive": keep_alive_value(config.keep_alive), "options": merged}
    think = wants_thinking(request, facts)
    if think is not None:
        fields["think"] = think
    if request.schema is not None:
        fields["format"] = request.schema
    head = to_json({"model": facts.name})[:-1]
    tools = f'"tools":{tools_json},' if tools_json else ""
    return f'{head},"messages":[{messages_json}],{tools}{to_json(fields)[1:]}'


def render_body(chat: str) -> str:
    """Turn a chat body into one that only renders the prompt."""
    return chat[:-1] + ',"_debug_render_only":true}'


def generate_body(
    request: Request, facts: ModelFacts, prompt: str, config: Config, options: Json,
) -> str:
    """Write the body of /api/generate that has the model continue a rendered prompt.

    think:false keeps Ollama from splitting the thought off on path B (OL 6).
    """
    fields: Json = {"model": facts.name, "prompt": prompt, "raw": True, "think": False,
                    "stream": True, "truncate": False, "shift": False,
                    "keep_alive": keep_alive_value(config.keep_alive),
                    "options": {**options, **dict(request.sampling)}}
    if request.schema is not None:
        fields["format"] = request.schema
    return to_json(fields)


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


def upstream_error(
    status: int, body: str, model: str, *, retry_after: Optional[str] = None,
    prompt_tokens: int = 0, window: int = 0,
) -> ShimError:
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
        if self._ended:
            return parts
        try:
            whole = self._lines.feed(data)
            if whole:
                self._read(whole, parts)
        except ShimError as error:
            self._fail(parts, error)
        return parts

    def _read(self, whole: bytes, parts: Parts) -> None:
        """Decode whole lines: one sweep costs a third of json.loads a line."""
        broken = False
        try:
            text = whole.decode("utf-8")
        except UnicodeDecodeError as problem:
            text, broken = whole[:whole.rfind(b"\n", 0, problem.start) + 1].decode("utf-8"), True
        at, end = 0, len(text)
        run: List[str] = []
        while at < end and not self._ended:
            if text[at] in " \t\r\n":
                at += 1
                continue
            try:
                line, at = _scan_json(text, at)
            except (ValueError, RecursionError):
                self._show(run, parts)
                raise self._garbage(text[at:at + 200]) from None
            self.lines += 1
            piece = self._plain_text(line)
            if piece is None:
                self._show(run, parts)
                run.clear()
                self._line(line, parts)
            elif piece:
                run.append(piece)
        self._show(run, parts)
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
            self._raw.extend(run)
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
        if not self._ended and self._lines.rest().strip():
            parts = self.feed(b"\n")
            if self.failed and self.lines:  # cut within a line
                parts[-1] = Failure(self._cut_off())
        if not self._ended:
            self._fail(parts, self._cut_off())
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
THINK_OPENING = Pattern(r"<think>\s*(?:</think>\s*)?\Z")
NO_THOUGHT = "<think>\n\n</think>\n\n"
ANSWER_START = "<|im_start|>assistant\n"


def opening_of(prompt: str) -> str:
    """Return the think block, open or empty, with which a prompt begins the answer."""
    found = THINK_OPENING.search(prompt[-60:])
    return found.group() if found else ""


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
    ToolFormat("harmony", "channel recipient", (),
               "<|channel|>commentary to=functions.Read <|constrain|>json<|message|>"
               '{"file_path": "a.py"}<|call|>', "gpt-oss; Functionary 2"),
    ToolFormat("wrapped", "json response answer action call", (),
               '<response>\n{"name": "Read", "arguments": {"file_path": "a.py"}}\n</response>',
               "seen from small models"),
    ToolFormat("xml_agent", "tool", (),
               "<tool>Read</tool><tool_input>a.py</tool_input>", "LangChain's XML agent"),
    ToolFormat("mistral", "", ("[tool_calls]", "[tool_call]", "[function_call]"),
               '[TOOL_CALLS][{"name": "Read", "arguments": {"file_path": "a.py"}}]',
               "Mistral; with [ARGS] from v13 on"),
    ToolFormat("functools", "", ("functools",),
               'functools[{"name": "Read", "arguments": {"file_path": "a.py"}}]',
               "Phi-4 mini, Firefunction 2"),
    ToolFormat("react", "", ("action:", "**action:**"),
               'Action: Read\nAction Input: {"file_path": "a.py"}', "ReAct; Command R with a list"),
    ToolFormat("qwen_agent", "", ("✿function✿:", "✿function✿"),
               '✿FUNCTION✿: Read\n✿ARGS✿: {"file_path": "a.py"}', "Qwen-Agent for Qwen 1.5 and 2"),
    ToolFormat("functionary", "", (">>>",),
               '>>>Read\n{"file_path": "a.py"}', "Functionary 3.2"),
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
    r"functions\.|function:|name:|arguments:|args:|input:|:", re.I)
INPUT_WORDS = ("action input:", "action_input:", "**action input:**", "✿args✿:", "✿args✿")
CUT_SEPARATORS = (*INPUT_WORDS, "```", "[args]", "[call_id]")
FILLERS = word_set("function commentary analysis final assistant json code")
CALL_TAGS = frozenset(tag for row in TOOL_FORMATS for tag in row.tags.split())
CALL_RULES = {opener: row.rule for row in TOOL_FORMATS
              for opener in (*row.tags.split(), *row.words)}
OPENING_WORDS = tuple(sorted((word for row in TOOL_FORMATS for word in row.words),
                             key=len, reverse=True))
CLOSING_TAGS = CALL_TAGS | SEPARATOR_TAGS | word_set("parameter param arg_value arg parameters")
OPENING_LETTERS = frozenset(word[0] for word in OPENING_WORDS)
END_TAGS = word_set("call return eom_id eot_id im_end endoftext bot_end escape tools_suffix "
                     "tool_call tool_calls end eos s python_end")

MARKUP_TAG = Pattern(
    r"<(/?)([^\s<>=/\"'`(){}]{1,48})((?:\s|=|/)[^<>]{0,300}?)?(?:>|(?=\s<parameter))")
TAG_START = Pattern(r"</?[^\s<>=/\"'`(){}]{0,48}(?:(?:\s|=|/)[^<>]{0,300}(?:<[a-z]{0,9})?)?\Z")
TAG_NAMESPACE = Pattern(r"^(?:antml|minimax|seed|steptml|dsml)[:｜|]")
TAG_NAMESPACES = ("antml:", "minimax:", "seed:", "steptml:", "dsml｜", "dsml|")
TAG_VALUE = Pattern(
    r"""\s*(?:=|\bname\s*=)\s*["']?([^"'<>]{1,128}?)["']?(?:\s+\w+=.*|\s*/?)""", re.S)
TOOL_WORD = Pattern(r"[A-Za-z_][\w.:-]{0,127}")
FIRST_KEY = Pattern(
    r"(?:\[\s*)?\{{1,2}\s*[\"'`“]?([A-Za-z_-]{1,24})[\"'`”]?\s*(?::|=>)\s*(?=\S)"
    r"(?:[\"'`“]([^\"'`“”\n]{0,128})([\"'`”]))?")
KEY_ALONE = Pattern(r"(?:\[\s*)?\{{1,2}\s*[\"'`“]([A-Za-z_-]{0,24})[\"'`”\W]")
FIRST_KEY_START = Pattern(r"(?:\[\s*)?(?:\{{1,2}\s*(?:[\"'`“]?[A-Za-z_-]{0,24}[\"'`”]?\s*"
                          r"(?::|=>?)?\s*(?:[\"'`“][^\"'`“”\n]{0,128})?)?)?")
PRINT_CALL = Pattern(r"print\(")
TOOL_NAME = Pattern(r"(?:default_api\.|functions\.)?([A-Za-z_][\w-]{0,127}|\Z)")
NAMED_BODY = Pattern(r"\s?(?=\()|:?\s{0,2}(?=\{)")
NAMED_BEGUN = Pattern(r":?\s{0,2}")
PYTHON_NAME = Pattern(r"(?:\[\s*)?(?:print\()?([A-Za-z_][\w.]{0,127})\s?\(\s*(?=[\w\"'){\[]|\Z)")
NAME_KEYS = word_set("name tool toolname function functionname action recipient recipientname "
                      "tooltocall toolid command")
ARGUMENT_KEYS = word_set("arguments parameters input args params kwargs toolinput actioninput "
                          "argumentsjson toolargs inputs payload toolparameters")
NESTED_KEYS = word_set("function toolcall functioncall tooluse call action tool")
LIST_KEYS = word_set("toolcalls functioncalls calls tooluses actions tools")
LEADING_KEYS = word_set("thought thoughts thinking reasoning explanation id callid toolcallid "
                         "index comment role content")
CALL_KEYS = NAME_KEYS | ARGUMENT_KEYS | NESTED_KEYS | LIST_KEYS | LEADING_KEYS | {"type"}
CALL_TYPES = word_set("function functioncall toolcall tooluse tool call")
FENCE_OPEN = Pattern(r"(`{3,16}|~{3,16})([^\n`{\[<]{0,80})(?:\n|(?=[{\[<]))")
FENCE_START = Pattern(r"(?:`{1,16}|~{1,16})[^\n`{\[<]{0,80}\Z")
FENCE_END = Pattern(r"[ \t]{0,3}(`{3,16}|~{3,16})[ \t]{0,8}(?=\n|\Z)")
CALL_SIGN = Pattern(r"\n|<(?=[/|｜A-Za-z_]|\Z)|\[(?=[TtFf]|\Z)")
AFTER_CALL = Pattern(r"\s*(?:<[|｜]?/[^\s<>]{1,60}>|\[/[^\s\[\]]{1,40}\]|✿\w{1,12}✿:?|"
                     r"[}\])]{1,4}(?=\s|\Z|<|`|[}\])])|"
                     r"[;,](?=\s*[{\[<]))")
CLOSING_CUT = Pattern(r"\s*(?:<[|｜/]?[^\s<>]{0,60}|[;,]\s*)\Z")
AFTER_BEGUN = Pattern(
    r"<[^\s<>]{0,60}|\[(?:/[^\s\[\]]{0,40})?|[`~]{1,16}|✿\w{0,12}✿?|[}\])]{1,4}|[,;]\s*")
BLANK_RUN = Pattern(r"\s*")
LINE_INDENT = Pattern(r"[^\S\n]*")
FENCE_BEGUN = Pattern(r"[ \t]{0,3}[`~]{0,16}[ \t]{0,8}")
LIST_BEGUN = Pattern(r"\[\s*[\w.]{0,80}")
TAG_WORD_END = Pattern(r"[\s=]")
CLOSERS = Pattern(r"[}\])]")
TAG_END = Pattern(r">")
INPUT_LINE = Pattern(r"[^\n<]{1,4000}")
SENTENCE_MARKS = ".!?:;…)*>。！？："
BARE_RULES = ("json", "named", "pythonic", "wrapped")
# Characters of prose before a call in which its announcement is looked for.
MAX_CONTEXT_CHARS = 1000
# Characters of thought kept in case that a call inside it is all that comes.
MAX_THOUGHT_CHARS = 256 * 1024
# Characters of a value of one line that is held until its closing tag is seen.
MAX_SHORT_CHARS = 200
# Characters read in vain before an answer full of openers is passed as it is.
MAX_WASTED_CHARS = 128 * 1024
# Opening tags that stand inside each other before a call's body; DeepSeek has two.
MAX_OPENERS = 4
# Characters looked at in one step, so that cutting them off costs little.
MAX_STEP_CHARS = 4096
# Characters of a name or first key before text that looks like a call is let go.
MAX_HEADER_CHARS = 500


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

    OUTSIDE = Pattern(r"""["'`]|[{\[(]+|[}\])]""")
    INSIDE: Mapping[str, Pattern] = {
        quote: Pattern(rf"[^\\{quote}]*(?:\\.[^\\{quote}]*)*", re.S) for quote in "\"'`"}

    def __init__(self) -> None:
        self.depth, self._quote, self._escaped = 0, "", False

    def feed(self, text: str, at: int = 0) -> int:
        """Return the index behind the bracket that ends the value, or -1."""
        if self._escaped and at < len(text):
            self._escaped, at = False, at + 1
        while at < len(text):
            if self._quote:
                match = self.INSIDE[self._quote].match(text, at)
                at = (match.end() if match else at) + 1
                if at > len(text):
                    break
                self._escaped = text[at - 1] == "\\"
                self._quote = self._quote if self._escaped else ""
                continue
            match = self.OUTSIDE.search(text, at)
            if not match:
                break
            at = match.end()
            if match.group() in "\"'`":
                self._quote = match.group()
            elif match.group() in "}])":
                self.depth -= 1
                if self.depth <= 0:
                    return at
            else:
                self.depth += len(match.group())
        return -1


def make_call(name: Any, arguments: Any, tools: Mapping[str, Tool], rule: str) -> Optional[Call]:
    """Fit a name and arguments to an offered tool; None when none takes them."""
    best = None
    for tool in tools_meant(name, tools) if isinstance(name, str) else ():
        fitted = repair_input(tool, arguments)
        if fitted is not None and all(key in fitted for key in required_of(tool.schema)):
            return Call(tool.name, fitted, rule)
        if fitted is not None and best is None:
            best = Call(tool.name, fitted, rule)
    return best


def calls_from_json(value: Any, tools: Mapping[str, Tool], rule: str) -> Optional[List[Call]]:
    """Read calls from JSON in any published shape; None when any part is no call."""
    if isinstance(value, list):
        found: List[Call] = []
        for item in value:
            calls = calls_from_json(item, tools, rule)
            if calls is None:
                return None
            found += calls
        return found or None
    if not isinstance(value, dict):
        return None
    keys = {plain_name(str(key)): key for key in reversed(list(value))}
    for key, original in keys.items():
        if key in LIST_KEYS and isinstance(value[original], list) and (
                key.startswith("tool") or keys.keys() <= LEADING_KEYS | {key, "type"}):
            return calls_from_json(value[original], tools, rule)
    name, arguments = name_and_arguments(value, keys, tools)
    call = None if is_definition(arguments) else make_call(name, arguments, tools, rule)
    return None if call is None else [call]


def name_and_arguments(
        value: Json, keys: Mapping[str, str], tools: Mapping[str, Tool]) -> Tuple[Any, Any]:
    """Find the tool's name and its arguments among the keys of one call."""
    outer = [keys[key] for key in keys if key in ARGUMENT_KEYS]
    for key in keys:
        nested = value[keys[key]]
        if key in NESTED_KEYS and isinstance(nested, dict):
            inner = {plain_name(str(each)): each for each in reversed(list(nested))}
            name, arguments = name_and_arguments(nested, inner, tools)
            return name, value[outer[0]] if outer and not arguments else arguments
    named = [keys[key] for key in NAME_ORDER if key in keys and isinstance(value[keys[key]], str)]
    named = [key for key in named if tools_meant(value[key], tools)] or named
    if named:
        spare = {key: each for key, each in value.items() if key != named[0]
                 and plain_name(str(key)) not in LEADING_KEYS - {"content"} and key != "type"}
        if outer:
            return value[named[0]], value[outer[-1]]
        meant = tools_meant(value[named[0]], tools)
        whole = any(len(repair_input(tool, spare) or ()) == len(spare) for tool in meant)
        return value[named[0]], spare if whole else None
    if len(value) == 1 and isinstance(value[next(iter(value))], dict):
        only = next(iter(value))
        return (only, value[only]) if only in tools else (None, None)
    return None, None


NAME_ORDER = ("name", "tool", "toolname", "functionname", "function", "recipient",
              "recipientname", "action", "tooltocall", "toolid", "command")


def is_definition(arguments: Any) -> bool:
    """Tell a tool's schema, as prompts hold it, from the arguments of a call."""
    properties = arguments.get("properties") if isinstance(arguments, dict) else None
    return isinstance(properties, dict) and any(
        isinstance(each, dict) and "type" in each for each in properties.values())


def read_python(text: str, at: int, tools: Mapping[str, Tool], rule: str) -> Tuple[
        Optional[List[Call]], int]:
    """Read calls written as Python: Read(file_path="a.py"), alone or in a list."""
    calls: List[Call] = []
    reader = LooseJson(text)
    at = reader.skip(at)
    listed = text[at:at + 1] == "["
    at = reader.skip(at + 1) if listed else at
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


class TaggedInput:
    """Reads parameters in tags, piece by piece, into events (kind, text).

    key names a parameter, text is a piece of its value, end closes it. done tells that
    the call is over and rest what follows it; cut that a value had no closing tag.
    nested=False takes an opening tag inside a value as the next call, not as its text.
    """

    def __init__(self, tool: Tool, label: str, raw: bool, nested: bool = True) -> None:
        self.events: List[Tuple[str, str]] = []
        self.done = self.cut = self.lost = False
        self.rest = ""
        self._tool, self._label, self._raw, self._nested = tool, label.lower(), raw, nested
        self._doubt = self._exact = False
        self._last = ""
        self._keys: List[str] = []
        self._closer: Optional[str] = None
        self._inner = self._scanned = self._functions = self._wrappers = 0
        if raw:
            self._open((required_of(tool.schema) or ["input"])[0], self._label)

    def feed(self, text: str, final: bool = False) -> None:
        self.rest += text
        step = True
        while step and not self.done:
            step = self._between(final) if self._closer is None else self._value(final)

    def passes(self, text: str) -> bool:
        """Take text that is the open value's as it stands; False where it must be read."""
        as_is = (self._closer is not None and not self._fresh and not self.rest
                 and not VALUE_BREAK.search(text))
        self._last = text[-1] if as_is else self._last
        return as_is

    def fresh(self, nested: bool = True) -> TaggedInput:
        return TaggedInput(self._tool, self._label, self._raw, nested)

    def again(self, text: str) -> TaggedInput:
        """Read a whole call once more, taking each closing tag at its word."""
        reader = self.fresh(False)
        reader.feed(text, True)
        return reader

    def _open(self, key: str, closer: str) -> None:
        self._keys.append(parameter_for(key, properties_of(self._tool.schema), self._keys) or key)
        self.events.append(("key", key))
        self._closer, self._fresh, self._framed, self._doubt = closer, True, False, False
        self._last = ""
        self._inner = self._scanned = self._functions = self._wrappers = 0

    def _between(self, final: bool) -> bool:
        self.rest = self.rest.lstrip()
        tag = MARKUP_TAG.match(self.rest)
        if not tag:
            self.done = final or (bool(self.rest) and not TAG_START.fullmatch(self.rest))
            return False
        label, value = tag_label(tag), tag_value(tag)
        if label in ("parameters", "arguments", "args", "input") and value is None:
            self.rest = self.rest[tag.end():]
        elif tag.group(1) or label in CALL_TAGS:
            self.done = True
            self.rest = self.rest[tag.end():] if tag.group(1) else self.rest
        elif label == "arg_key":
            key = ARG_KEY.match(self.rest)
            self.done = not key and (final or len(self.rest) > MAX_HEADER_CHARS)
            if key:
                self.rest = self.rest[key.end():]
                self._open(key.group(1).strip(), "arg_value")
                self._exact = True
            return bool(key)
        else:
            self.rest = self.rest[tag.end():]
            self._open(value or label, label)
            self._exact = not (tag.group(3) or "").startswith("=") and value is not None
        return True

    def _value(self, final: bool) -> bool:
        """Move value text into events up to its end, or to where more must be seen."""
        at = self.rest.find("<", self._scanned)
        tag = MARKUP_TAG.match(self.rest, at) if at >= 0 else None
        if at < 0:
            return self._pass(len(self.rest), final)
        if not tag:
            if TAG_START.match(self.rest, at):
                return self._pass(at, final)
            self._scanned = at + 1
            return True
        self._scanned = at
        ends = self._ends(tag, final)
        if ends is None:
            return self._pass(at, final)
        self._scanned = tag.end()
        if ends:
            own = tag.group(1) and tag_label(tag) == self._closer
            self._close(self.rest[:at], bool(own))
            self.rest = self.rest[tag.end() if own else at:]
        return True

    def _pass(self, upto: int, final: bool) -> bool:
        if final:
            self.cut, self.done = True, True
            self.lost = self._inner + self._functions > 0 or self._doubt
            self._close(CUT_TAG.sub("", self.rest, 1), False)
            self.rest = ""
            return False
        line_break = LAST_BREAK.search(self.rest[:upto])
        keep = line_break.start() if line_break else upto
        if keep > 0 and not self._short(self.rest[:keep]):
            self._text(self.rest[:keep])
            self.rest, self._scanned = self.rest[keep:], max(0, upto - keep)
        else:
            self._scanned = upto
        return False

    def _text(self, text: str) -> None:
        if self._fresh:
            framed = FIRST_BREAK.sub("", text)
            self._framed, self._fresh, text = framed != text, False, framed
        if text:
            self._last = text[-1]
            self.events.append(("text", text))

    def _close(self, text: str, closed: bool) -> None:
        if not closed and self._short(text):
            text = text.strip()
        framed = self._framed or (self._fresh and FIRST_BREAK.match(text))
        if framed or not self._exact:
            text = LAST_BREAK.sub("", text, 1)
        self._text(text)
        self.events.append(("end", ""))
        self._closer = None

    def _short(self, text: str) -> bool:
        """Tell a value of one line of which nothing has gone out yet."""
        return self._fresh and len(text) <= MAX_SHORT_CHARS and "\n" not in text.strip("\r\n")

    def _ends(self, tag: re.Match[str], final: bool) -> Optional[bool]:
        """Decide whether the value ends at a tag; None while that is open."""
        label, value = tag_label(tag), tag_value(tag)
        if tag.group(1):
            if label == self._closer and not self._nested:
                return True
            return not self._closes_inner(label) and (
                label == self._closer or label in CALL_TAGS) and self._followed(
                    tag.end(), final, label != self._closer)
        properties = properties_of(self._tool.schema)
        if label == self._closer and label != self._label:
            known = value is not None and parameter_for(value, properties, self._keys)
            if known and not self._inner and not self._functions:
                return True
            self._inner += 1
        elif label in CALL_TAGS and (
                self.rest[tag.start() - 1] if tag.start() else self._last) in ("\n", "", ">"):
            if not self._nested:
                return True
            self._doubt = self._doubt or value is not None
            self._functions += value is not None
            self._wrappers += value is None
        return False

    def _closes_inner(self, label: str) -> bool:
        """Tell a closing tag of a call that is quoted inside the value."""
        if label == self._closer and (self._inner or self._functions):
            self._inner -= bool(self._inner)
            return True
        if label in ("function", "invoke") and self._functions:
            self._functions -= 1
            return True
        inner = label in CALL_TAGS and (self._wrappers > 0 or self._inner > 0)
        self._wrappers -= inner and self._wrappers > 0
        return inner

    def _followed(self, at: int, final: bool, outer: bool) -> Optional[bool]:
        """Check that after a closing tag comes what may follow it: a tag or the end."""
        closed = at
        at = skip_blank(self.rest, at)
        if at >= len(self.rest):
            return True if final else None
        tag = MARKUP_TAG.match(self.rest, at)
        if not tag:
            partial = TAG_START.match(self.rest, at)
            self._doubt = self._doubt or (not partial and not outer)
            line = "\n" in self.rest[closed:at] and self._short(self.rest[:self._scanned])
            return (True if final else None) if partial else line or self._closer == self._label
        label = tag_label(tag)
        if tag.group(1):
            return label in CALL_TAGS or label == self._label or label in SEPARATOR_TAGS
        known = label in ("parameter", "param", "arg_key", "argument", "arg")
        child = parameter_for(label, properties_of(self._tool.schema), self._keys) or (
            label in EXTRA_TAGS or self._short(self.rest[:self._scanned]))
        return label in CALL_TAGS or (not outer and (known or bool(child)))


VALUE_BREAK = Pattern(r"[<\r\n]")
EXTRA_TAGS = ("line_count", "task_progress", "requires_approval")
ARG_KEY = Pattern(r"<arg_key>([^<]{0,128})</arg_key>\s*<arg_value>")
FIRST_BREAK = Pattern(r"\A\r?\n")
LAST_BREAK = Pattern(r"(?:\r?\n|\r)?\Z")
CUT_TAG = Pattern(r"(?:</?[^\s<>]{0,20})?\Z")


class JsonInput:
    """Reads the members of an arguments object, piece by piece, into events.

    As TaggedInput, and value: a member that is no string, as JSON text. done comes
    behind the call's own last brace.
    """

    def __init__(self) -> None:
        self.events: List[Tuple[str, str]] = []
        self.done = self.cut = self.lost = False
        self.rest = ""
        self._step = self._member
        self._scan = BracketScan()
        self._scanned = 0

    def feed(self, text: str, final: bool = False) -> None:
        self.rest += text
        while not self.done and self._step(final):
            pass
        if final and not self.done:
            self.done = True
            self.cut = self._step == self._string or bool(self.rest.strip(" \t\r\n}"))

    def passes(self, text: str) -> bool:
        """As in TaggedInput."""
        return self._step == self._string and not self.rest and not STRING_BREAK.search(text)

    def _member(self, final: bool) -> bool:
        match = JSON_MEMBER.match(self.rest)
        if not match:
            self.done = self.cut = not MEMBER_BEGIN.fullmatch(self.rest)
            return False
        self.rest = self.rest[match.end():]
        if match.group(1) is None:
            self._step = self._tail
            return True
        self.events.append(("key", loose_json(match.group(1)) or ""))
        if self.rest[0] == '"':
            self.rest, self._step = self.rest[1:], self._string
        else:
            self._scan, self._scanned = BracketScan(), 0
            self._step = self._bracketed if self.rest[0] in "{[" else self._scalar
        return True

    def _string(self, final: bool) -> bool:
        match = string_stop('"').search(self.rest, self._scanned)
        if not match:
            self._piece(len(self.rest) - self.rest.endswith("\\"))
        elif match.group() != '"':
            cut = match.group(3) in ("u", "x") and len(self.rest) < match.start() + 6
            if cut and not final:
                return self._piece(match.start())
            half = match.group(1) and "d800" <= match.group(1).lower() < "dc00"
            if half and len(self.rest) < match.end() + 6 and not final:
                return self._piece(match.start())
            pair = JSON_ESCAPE.match(self.rest, match.end()) if half else None
            self._piece(match.start())
            halves = unescaped(match) + (unescaped(pair) if pair and pair.group(1) else "")
            used = (pair if pair and pair.group(1) else match).end() - match.start()
            self.events.append(("text", join_surrogates(halves)))
            self.rest = self.rest[used:]
            return True
        elif END_IN_OBJECT.match(self.rest, match.end()) and (
                final or not STRING_END_OPEN.match(self.rest, match.end())):
            self._piece(match.start())
            self.rest, self._step = self.rest[1:], self._member
            self.events.append(("end", ""))
            return True
        elif final or not STRING_END_OPEN.match(self.rest, match.end()):
            self._scanned = match.end()
            return True
        else:
            self._piece(match.start())
        return False

    def _piece(self, upto: int) -> bool:
        if upto > 0:
            self.events.append(("text", self.rest[:upto]))
        self.rest, self._scanned = self.rest[max(upto, 0):], 0
        return False

    def _bracketed(self, final: bool) -> bool:
        end = self._scan.feed(self.rest, self._scanned)
        self._scanned = len(self.rest)
        return end >= 0 and self._value(end)

    def _scalar(self, final: bool) -> bool:
        match = JSON_SCALAR.match(self.rest)
        return match is not None and self._value(match.end())

    def _value(self, end: int) -> bool:
        self.events.append(("value", self.rest[:end]))
        self.rest, self._scanned, self._step = self.rest[end:], 0, self._member
        return True

    def _tail(self, final: bool) -> bool:
        match = CALL_TAIL.match(self.rest)
        self.done = bool(match) or not CALL_TAIL_BEGIN.fullmatch(self.rest)
        self.rest = self.rest[match.end():] if match else self.rest
        return False


STRING_BREAK = Pattern(r'["\\]')
JSON_MEMBER = Pattern(r"""\s*,?\s*(?:("[^"\\\n]{1,128}"|'[^'\\\n]{1,128}')\s*:\s*(?=\S)|\})""")
MEMBER_BEGIN = Pattern(r"""\s*,?\s*(?:["'][^"'\\\n]{0,128}(?:["']\s*(?::\s*)?)?)?""")
STRING_END_OPEN = Pattern(
    r"\s*(?:,?\s*\}?\s*|,\s*[\"'\w-][^\"'\n:]{0,80}[\"']?\s*)\Z")
JSON_SCALAR = Pattern(r"[^,}\]\n]{1,64}(?=[,}\]\n])")
CALL_TAIL = Pattern(r'\s*(?:,\s*"[^"\n]{0,64}"\s*:\s*"?[^"{}\n]{0,128}"?\s*)?\}')
CALL_TAIL_BEGIN = Pattern(r'\s*(?:,\s*(?:"[^"\n]{0,64}(?:"\s*(?::\s*"?[^"{}\n]{0,128}"?\s*)?)?)?)?')
CANONICAL = Pattern(r'\s*\{\s*"name"\s*:\s*"([^"\\\n]{1,128})"\s*,\s*'
                    r'"(?:arguments|parameters|input)"\s*:\s*\{')


class InputWriter:
    """Turns a reader's events into the pieces of one JSON object, mended by schema.

    A string for a string parameter goes out as it comes; everything else is held until
    it is whole. Keys that the schema does not know are left out.
    """

    def __init__(self, tool: Tool) -> None:
        self._tool, self._properties = tool, properties_of(tool.schema)
        self._taken: List[str] = []
        self._held: Optional[List[str]] = None
        self._name = self._key = ""
        self.known = self.streaming = False

    def write(self, events: Iterable[Tuple[str, str]]) -> str:
        return "".join(getattr(self, "_on_" + kind)(text) for kind, text in events)

    def close(self) -> str:
        return "}" if self._taken else "{}"

    def _on_key(self, key: str) -> str:
        self._key = key
        self._name = (key if key in self._properties and key not in self._taken
                      else parameter_for(key, self._properties, self._taken) or "")
        streams = self._name and types_of(self._properties[self._name]) == ["string"] \
            and "enum" not in self._properties[self._name]
        self._held, self.streaming = None if streams else [], bool(streams)
        return self._member(self._name) + '"' if streams else ""

    def _member(self, name: str) -> str:
        self._taken.append(name)
        self.known = self.known or name in self._properties
        return ("{" if len(self._taken) == 1 else ", ") + json.dumps(name) + ": "

    def _on_text(self, text: str) -> str:
        if self._held is None:
            return json.dumps(text)[1:-1]
        self._held.append(text)
        return ""

    def _on_end(self, _: str) -> str:
        self.streaming = False
        return '"' if self._held is None else self._whole("".join(self._held))

    def _on_value(self, text: str) -> str:
        value = loose_json(text)
        if self._held is None:
            written = string_from(value, self._name) if value is not None else ""
            return json.dumps(written)[1:] if written is not None else '"'
        return self._whole(value)

    def _whole(self, value: Any) -> str:
        fitted = fit_object({self._key: value}, self._tool.schema,
                            self._tool.name.startswith("mcp__"))
        return "".join(self._member(name) + json.dumps(fitted[name])
                       for name in fitted if name not in self._taken)


# ------------------------------ where a call begins ------------------------------

# What a look at the text can say besides a head: more must come, read on, no call (None).
MORE, READ_ON = "wait", "on"


class Head(NamedTuple):
    """What opens a call: its rule, the tool's name where known, the body and its start.

    body is json, python, tags, raw:TAG (one parameter's text up to that closing tag) or line;
    fence is the mark of the code block that it stands in.
    """

    rule: str
    name: str
    body: str
    at: int
    fence: str = ""


Verdict = Union[str, Head, None]


def find_head(text: str, at: int, line_start: bool, tools: Mapping[str, Tool]) -> Verdict:
    """Return the head of a call at a position, MORE where it may still come, or None."""
    if not line_start:
        return read_opening(text, at, False, tools)
    fence = FENCE_OPEN.match(text, at)
    if fence:
        head = read_opening(text, fence.end(), True, tools)
        return head._replace(fence=fence.group(1)) if isinstance(head, Head) else head
    return MORE if FENCE_START.match(text, at) else read_opening(text, at, True, tools)


def read_opening(text: str, at: int, line_start: bool, tools: Mapping[str, Tool]) -> Verdict:
    """Read an opener: a tag, a word of TOOL_FORMATS, brackets or a tool's own name."""
    at = skip_blank(text, at)
    begin = text[at:at + 32].lower()
    if not begin:
        return MORE
    if begin[0] == "<":
        return HeadScan(text, at, "", tools).run()
    for word in OPENING_WORDS if begin[0] in OPENING_LETTERS else ():
        if line_start or word[0] == "[":
            if begin.startswith(word):
                return HeadScan(text, at + len(word), CALL_RULES[word], tools).run()
            if word.startswith(begin):
                return MORE
    if line_start and begin[0] in "{[":
        return read_bracket(text, at, "json", tools)
    return read_own_name(text, at, tools) if line_start else None


def read_own_name(text: str, at: int, tools: Mapping[str, Tool]) -> Verdict:
    """Read a tool's own name at the start of a line: Read(…), or Read and then {…}."""
    printed = PRINT_CALL.match(text, at)
    at = printed.end() if printed else at
    name = TOOL_NAME.match(text, at)
    if not name:
        return None
    rest = text[name.end():name.end() + 8]
    if name.group(1) in tools:
        body = NAMED_BODY.match(rest)
        if not body:
            return MORE if NAMED_BEGUN.fullmatch(rest) else None
        python = rest[body.end()] == "("
        return Head("named", name.group(1), "python" if python else "json",
                    at if python else name.end() + body.end())
    begun = any(tool.startswith(name.group(1)) for tool in tools) or any(
        space.startswith(name.group()) for space in ("default_api.", "functions.", "print("))
    return MORE if begun and not rest else None


def read_bracket(text: str, at: int, rule: str, tools: Mapping[str, Tool]) -> Verdict:
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
    word, follows = plain_name(key.group(1)), rest[key.end():key.end() + 1]
    held = word in ARGUMENT_KEYS or word in LEADING_KEYS or word in LIST_KEYS
    if word in NAME_KEYS or word == "type":
        if key.group(2) is None:
            cut = follows in CLOSING_QUOTES and key.end() + 130 > len(rest) and (
                "\n" not in rest[key.end():])
            return MORE if cut else Head(rule, "", "json", at) if follows == "{" else None
        held = plain_name(key.group(2)) in CALL_TYPES if word == "type" else bool(
            tools_meant(key.group(2), tools))
    elif follows == "{":
        held = held or word in NESTED_KEYS or key.group(1) in tools
    return Head(rule, "", "json", at) if held else None


class HeadScan:
    """Reads on behind an opener: further tags, the name, separators, up to the body."""

    def __init__(self, text: str, at: int, rule: str, tools: Mapping[str, Tool]) -> None:
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
        if named and not closing and resolve_tool(named, self._tools):
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
        step = SEPARATOR.match(text, at) or PRINT_CALL.match(text, at)
        if step:
            self._at, self._line = step.end(), step.group().lower() in INPUT_WORDS
            return READ_ON
        if any(word.startswith(rest) for word in CUT_SEPARATORS):
            return MORE
        if rest[0] in "{[(":
            return self._body(rest[0])
        if self._line and self._name:
            return Head(self._rule, self._name, "line", at)
        return self._tool_name()

    def _body(self, opened: str) -> Verdict:
        if not self._name:
            return None if opened == "(" else read_bracket(
                self._text, self._at, self._rule, self._tools)
        python = opened == "("
        return Head(self._rule, self._name, "python" if python else "json",
                    self._named_at if python else self._at)

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


def may_open(begun: str, tools: Mapping[str, Tool]) -> bool:
    """Tell whether a tag that is cut, maybe in its name, may open a call."""
    name, *rest = TAG_WORD_END.split(begun[1:].strip("|｜").replace("▁", "_").lower())
    bare = TAG_NAMESPACE.sub("", name)
    names = [*CALL_TAGS, *tools, *(word for kind in TOOL_KINDS for word in plain_words(kind.names))]
    folded = plain_name(bare)
    if rest:  # the name is whole: "if a <b and" holds nothing back
        return folded in map(plain_name, names)
    return any(plain_name(word).startswith(folded) for word in names) or any(
        space.startswith(name) for space in TAG_NAMESPACES)


# ------------------------------ call or example ------------------------------

FIRST_PERSON = Pattern(
    r"\b(?<!whether )(?<!if )(?:I.ll|I will|I.m (?:now )?(?:going to|about to)|"
    r"I am (?:now )?(?:going to|about to)|let me|let.s|let us|we.ll|we will|we need to|I (?:now |"
    r"first |"
    r"also |just )?(?:need|want|must|should|can|have to)\b(?!['’])|(?:now|next|first|"
    r"then|so),? I\b|I.m (?:now )?\w+ing|I am (?:now )?\w+ing)(?!\s+(?:not|never|show (?:you|"
    r"what|how)|know|"
    r"explain|demonstrate|illustrate|describe|quote|cite|recap|summari\w+|repeat|define|"
    r"spell)\b)|我(?:来|将|会|要|先|需要|现在)|让我|我们[来先]|"
    r"\b(?:ich (?!habe|würde)|lassen? |je vais|voy a|vamos a|déjame|vou\b)", re.I)
ASSENT_ONLY = Pattern(
    r"\W*(?:(?:sure(?: thing)?|ok(?:ay)?|certainly|of course|yes|right|got it|understood|alright|"
    r"all right|absolutely|done|great|no problem|will do|on it|definitely|gladly|here (?:it is|"
    r"you go|we go)|one moment|working on it)\W*){1,4}", re.I)
FILE_NOUNS = (
    r"(?:file|script|config|app|project|folder|director|test|page|module|program|code|func|"
    r"class|data|input|entr|value|content|text|usage file|env|yaml|json|site|package|repo|docs|"
    r"readme)")
# Talk of calls, models and notations: what follows is shown, not meant.
ABOUT_CALLS = (
    r"\b(?:json|xml|payload|markup|(?<!git )tags?\b(?!ged)|tokens?|markers?|delimiters?|"
    r"conventions?|"
    r"style|format|formatted|syntax|schema|template|notation|grammar|encod\w+|wire|parsers?|"
    r"parse[sd]?|messages|serializ\w+|protocol|arguments|runtime|harness|llms?|chatbot|copilot|"
    r"chatgpt|gpt\S*|claude|qwen\S*|hermes|"
    r"prompts?|mock\w*|fixtures?|playground|tool.calling|function.calling|"
    r"(?-i:ReAct)|(?:a|each|every|any|such|native|raw|how) (?:tool |function )?calls?)\b")
# What a first person may write down rather than do, and the verbs that do act on it.
SHOWN_NOT_DONE = Pattern(
    r"\b(?:(?:the|this|that|these|your|raw) calls?|messages?|lines?|variants?|outputs?|readability|"
    r"what (?:I|it|the model)|json|xml|payload|syntax|format|notation|encoded|samples?|examples?|"
    r"looks? like|how (?:a|an|tool|function) (?:tool |function )?calls?)\b", re.I)
ACTED_ON = Pattern(
    r"\w[./]\w|\b(?:check|look|read|see|examin|inspect|verif|fix|run|search|find|open|updat|edit|"
    r"explor|investigat|test|tool.call|function call)\w*|\b" + FILE_NOUNS.replace("yaml|json|", ""),
    re.I)
# Words that make what follows no call, whatever else the sentence says.
NO_CALL_BEFORE = Pattern(
    r"\b(?<!so that )(?:I|let me|let.s|I.ll|I.m|we)\b (?:(?!by|to|that)\w+ ){0,3}"
    r"(?:quot|refer|talking|assum|past(?:e|ing)\b|"
    r"clarif|break\b.{0,30} down|point(?:ing)? out|mention|offer|propos|suggest|recommend|emphasi|"
    r"remind|warn|explain|demonstrat|illustrat|describ|"
    r"consider|dissect|compare|annotat|only print)|\A\W*below\b|\bthe following\b[^:]*\.\W*\Z|"
    r"\A[^\s:<]*[$>](?: |\Z)|\Ai\.e\.|\blike:|\A\s*[\[(]\w+[\])]\W*\Z|\bpending\b|"
    r"\b(?:for|an|this|following|simple|another) example\b(?![._/-]\w|\s+" + FILE_NOUNS + r")|"
    r"\A\s*(?:[$>]|\"\"\"|\'\'\')|\b(?:how|what) (?:a|an|tool|function) (?:tool |"
    r"function )?calls?\b|"
    r"\A\W*(?:use|add|put|run|try|paste|send|save|copy|call|include) (?:this|these|"
    r"the following)\b|"
    r"\A[^.!?]*\byour\b(?! (?:request|question|code|project|file))[^.!?]*:\W*\Z|"
    r"\bexamples? of\b|\bexamples?\b[\s\d]*[^.\w]*\Z|\be\.g\.|\bfor instance\b|\bhypothetic\w*|"
    r"\billustrat\w+|\bdemonstrat\w+|\bpseudo|\bimagine\b|\bsuppose\b|\bpretend\b|"
    r"\bnot a (?:real|tool) \w*|\b(?:you|one|users?|developers?|someone|people|models?|agents?|"
    r"assistants?|clients?|he|she|they)(?:.d| (?:can|could|would|should|might|may|must|needs? to|"
    r"has to|have to|will))\b|\b(?:I|we|it|this|that|which|call|one)(?:.d| would)\b(?! like|"
    r" better)|"
    r"\bwould (?:look|be|have)\b|\b(?:don.t|do not|does(?: not|n.t)|never|avoid|cannot|can.t|"
    r"won.t|will not|wouldn.t|such as|prevent\w*|should(?: not|n.t)|must(?: not|n.t)|unable|"
    r"refus\w+|not (?:going|"
    r"allowed|able|permitted) to|rather than|(?:should|shall|may|could) I|dangerous|harmful|"
    r"unsafe|against|whether|yourself|beware|warning|forbidden|declin\w+|instead of|didn.t|"
    r"did not)\b",
    re.I)
# A condition or a wait that even "I will" does not lift.
CONDITIONAL = Pattern(
    r"\A\W*(?:later|normally|ordinarily|usually|eventually)\b|\b(?:if|once|when|after|until|"
    r"unless) "
    r"(?:you\b|approved|confirmed|permitted)|\b(?:your|you to) (?:approv|confirm|permission|"
    r"consent|ok\b)|"
    r"\blet me know\b|\bneed you\b|\bwarn you\b", re.I)
# Words that make it no call where nobody says "I will" in the same sentence.
DOUBT_BEFORE = Pattern(
    ABOUT_CALLS + r"|\b(?:examples?\b(?![._/-]\w|\s+" + FILE_NOUNS + r")|"
    r"sample|specification|usage)\b|\blooks? (?:something )?like\b|\blike (?:this|so)\b|"
    r"\bas follows\b|\b(?:explain|describ|represent|document|consider|not(?:e|ice) that|"
    r"means?\b)\w*|\b(?:earlier|previous(?:ly)?|last (?:time|turn|call|step|week)|already|"
    r"yesterday|ago|history|logs?|logged|transcript|session)\b|\b(?:was|were|been|"
    r"got) (?:\w+ )?(?:called|sent|used|made|run|executed|written|generated|produced|returned|"
    r"logged|rejected|recorded|issued)\b|\b(?:I|we|you|he|she|they|it|users?|models?|assistant|"
    r"agent|server|tool|api|client|colleague|system|other \w+)\s+(?:\w+ly |just |then |has |had |"
    r"have )?(?:called|ran|sent|used|made|wrote|said|replied|answered|returned|emitted|produced|"
    r"tried|got|received|printed|posted|outputs|returns|sends|emits|produces|writes|says|prints|"
    r"responds|pasted|quoted)\b|\b(?:you|they|users|models|agents|assistants|clients)\s+(?:\w+ly |"
    r"just |then )?(?:output|return|send|emit|produce|write|say|print|respond)\b|"
    r"\b(?:contents?|contains?|data|"
    r"config(?:uration)?|json|payload|object|record|entry|entries|snippet|response|result|output|"
    r"answer|documentation|docs|readme|manual|definition|message|block|quote|values?|row|"
    r"document)\b(?: (?:of|from|in|for|at|is|was|are|were|says?|shows?|reads?|"
    r"holds?)\b[^:.!?]{0,60})?[^.!?\w]*\Z|\bif\b|\?\W*\Z|\b(?:paste|include|insert|respond with|"
    r"reply with)\b|\b(?:answered|replied|responded|emitted|produced|generated|returned|printed|"
    r"wrote|written|sent|said)\b[^:]*:\W*\Z|<(?!/?think|[|/])[\w-]+>\W*\Z|"
    r"\b(?:emits|prints|outputs|generates|produces|writes|returns|sends|says|yields|shows|gives|"
    r"receives|reveals|displays)\b[^.!?\w]*(?:this|that|it|these|the following)?[^.!?\w]*\Z|"
    r"\A(?!\W*here)[^:]*\b(?:is|are|was|were)\b[^.!?]*[:：]\W*\Z|\bhere(?:.s| is| are) (?!(?:the |"
    r"my |a )?"
    r"(?:tool |function )?calls?\W*\Z)", re.I)
# Words behind it that take it back, looked for in the first sentences.
NO_CALL_AFTER = Pattern(
    r"\b(?:is|was|as|are|just|only|merely|purely) (?:just |only |merely )?(?:an?|the|one|"
    r"some) (?:\w+ )?(?:examples?|illustration|sample|template|placeholder|demonstration|sketch|"
    r"quot\w+)\b|\b(?:is|was|are|were|just|only|purely) (?:for )?(?:illustrat\w+|demonstration|"
    r"hypothetical)|\b(?:this|that|these|those|it|above|which|call)\b(?: \w+){0,3} (?:is|was|are|"
    r"were|shows?|would|illustrat\w+|demonstrat\w+|represents?|describes?|"
    r"explains?)\b[^.!?\n]{0,80}\b(?:format|syntax|how (?:a|the|you|to|it|tool)|examples?|"
    r"looks? like|template|schema|structure|earlier|previous|last|documentation|would|from|"
    r"means?)\b|\b(?:that|this|it)(?: is|.s| was) (?:how|what|the (?:format|syntax|data|json|"
    r"content\w*|way))\b|\b(?:don.t|do not|never|not) (?:\w+ )?(?:run|execute|call|use|send|make|"
    r"do) (?:it|this|that)\b|\b(?:have|has|had|did|was|were|is)(?: not|n.t) (?:\w+ ){0,2}(?:run|"
    r"execute\w*|call\w*|made|make|sent|send|real|used?)\b|\bnot (?:been )?(?:run|executed|"
    r"called|sent|a real)\b|\A\W*examples?\b|\bfrom the (?:docs|documentation|logs?|manual|"
    r"readme|spec)|\b(?:if|whether) I should\b|\b(?:shall|should) I (?:run|execute|call|proceed|"
    r"go|do|make|send|use)|\b(?:want|like) me to (?:run|execute|call|proceed|go ahead|send|"
    r"do (?:it|this|that)|make)|\b(?:if|once|when|after|until) you(?:.ve)? (?:approve|confirm|"
    r"agree|give)|\bplaceholder|\breplace\b.{0,40}\bwith (?:your|the actual|real)|\byou (?:can|"
    r"could|would|should|might|must|need to|may) (?:then |also )?(?:use|call|send|write|emit|"
    r"adapt|replace|copy|paste|invoke)|\b(?:above|approval|permission|go-ahead|confirm\w*)\b|"
    r"\A\W*[↑^`]|\A\s*(?!and|then|next|now)(?-i:[a-z])|\A\W*(?:explanation|source|where)\b|"
    r"\b(?:dangerous|risky|unsafe)\b|\bI (?:won.t|will not|can.t|cannot) (?:run|execute|do|call|"
    r"use)|"
    r"\bnever (?:do|run|use|call)|\?(?<!else\?)|"
    r"\A\W*(?:please |only |just |simply |feel free to )?(?:change|modify|copy|make sure|"
    r"review|reply|hope|that(?:.s| was)|paste|replace|adapt|"
    r"apply|run|save|put|use|adjust|edit|compare|pick|choose|try|if (?:that|this|it|you)|here)\b|"
    r"\bexamples?\b(?![._/-]\w)|\b(?:keys?|your ok|"
    r"I would|was blocked|returned|matched|crashed|not (?:allowed|able))\b|"
    r"\b(?:result|output) \w+ \w+ (?:was|were)\b|\A\s*(?:[-=]>|--|[(\[←→])|\b(?:want|like) me to\b|"
    r"\b(?:models?|assistants?) (?:should|must|will)\b|"
    r"\b(?:say|give) the word\b|"
    r"\A[^.!?]*" + ABOUT_CALLS, re.I)
# A sentence that goes on behind it: with a colon, or without any mark at its end.
OPEN_SENTENCE = Pattern(r"[:：][\s*_]*\Z|[\w,][ \t]+\w+[ \t]*\n\s*\Z")
# What such a sentence may begin with when it leads to a call by itself.
ANNOUNCED_ACTION = Pattern(
    r"\W*(?:here we go|"
    r"\d+[.)]|both|again|two|three|next(?! to)|now|first|second|third|then|finally|also|and|"
    r"step|task|action|plan|thought|here(?:.s| is| are) (?:the |my |a )?(?:tool |function )?calls?"
    r"\W*\Z|(?:tool |function )?calls?\W*\Z|`|(?!quoting|show|explain|describ|follow|accord|"
    r"depend|assum|suppos|consider|us\w+ \w+,)\w+ing\b|(?:read|write|create|run|list|edit|update|"
    r"check|"
    r"search|find|open|fix|look|execute|use|call(?! \d)|delete|add|make|get|"
    r"fetch)\b(?![^:]*\b(?:this|"
    r"these|following|same|line)\b|.*\b(?:to|with|as|for|by)\W*\Z)|sure|ok|okay|yes|"
    r"certainly|of course)", re.I)
LIKENESS = Pattern(r"\blooks? like\b|\bexamples?\b (?:of|for)\b", re.I)
REACT_STEP = Pattern(r"(?:question|thought):", re.I)
PARAGRAPH_END = Pattern(r"\n[ \t]*\n")
SENTENCE_END = Pattern(r"(?<=[.!?])\s+|\n")
THOUGHT_END = Pattern(r"</think(?:ing)?>", re.I)


class Found:
    """A call that was read and waits for the words behind it.

    kind is bare, fenced, own (the model's own markers) or open (streamed: only closing,
    the end of its input, is held); before is the prose that led
    to it, line what stands before it on its line, first whether no prose came at all.
    """

    def __init__(self, raw: str, calls: List[Call], kind: str, before: str, first: bool) -> None:
        self.raw, self.calls, self.kind, self.first = raw, calls, kind, first
        self.fence = self.closing = ""
        self.before = THOUGHT_END.split(before)[-1]
        self.line = self.before.rsplit("\n", 1)[-1].lstrip()


def paragraphs(text: str) -> List[str]:
    return [part.strip() for part in PARAGRAPH_END.split(text) if part.strip()]


def first_words(after: str) -> str:
    """Cut the first two sentences out of what follows a call."""
    return " ".join(SENTENCE_END.split((paragraphs(after) or [""])[0])[:2])


def ruled_out_after(after: str) -> bool:
    """Tell words behind a call that take it back, or go on about it as a thing."""
    return bool(NO_CALL_AFTER.search(first_words(after)))


def announced(before: str) -> bool:
    """Tell prose that says in the first person, or by a word of assent, that a call comes."""
    last = paragraphs(before)[-2:]
    assent = bool(last) and ASSENT_ONLY.fullmatch(last[-1])
    return bool(assent) or any(FIRST_PERSON.search(part) for part in last)


def ruled_out_before(before: str) -> bool:
    """Tell prose after which nothing is a call: an example, data, another's or a refusal."""
    said = paragraphs(before)
    if len(said) > 1 and REACT_STEP.match(said[-1]):
        said.pop()
    last = said[-1:]
    if not last:
        return False
    sentences = [part for part in SENTENCE_END.split(last[0]) if part.strip(" *#_:-")]
    sentence = sentences[-1] if sentences else ""
    if sentence.strip().lower() in ("json", "assistant"):
        return False
    spoken = [match.start() for match in FIRST_PERSON.finditer(sentence)]
    doubts = [match.start() for match in NO_CALL_BEFORE.finditer(sentence)]
    if CONDITIONAL.search(sentence):
        return True
    if doubts:
        return not spoken or doubts[-1] >= spoken[-1]
    if spoken:
        promise = sentence[spoken[-1]:]
        return bool(SHOWN_NOT_DONE.search(promise)) and not ACTED_ON.search(promise)
    label = OPEN_SENTENCE.search(before[-80:]) and not ANNOUNCED_ACTION.match(sentence)
    return bool(label or DOUBT_BEFORE.search(sentence) or LIKENESS.search(last[0]))


def well_placed(line: str) -> bool:
    """Tell whether a marker stands where a call may: not in code, quotes or mid-sentence."""
    if not line.strip():
        return True
    in_quotes = line.count("`") % 2 or line.count('"') % 2 or line.rstrip()[-1] in "'\"“‘`("
    if line[0] == ">" or in_quotes:
        return False
    if line.rstrip()[-1] in SENTENCE_MARKS:
        return True
    return bool(FIRST_PERSON.search(line[-200:])) or (
        len(line.split()) <= 3 and (line[0] == "<" or line[0].isalnum()))


def is_call(found: Found, after: str, last: bool) -> bool:
    """Judge by the words around it whether a call is meant; in doubt it is not."""
    if ruled_out_before(found.before) or ruled_out_after(after):
        return False
    if found.kind == "fenced":
        return (found.first and last) or announced(found.before)
    if found.kind == "bare":
        if after.strip() and "\n" not in after[:len(after) - len(after.lstrip())]:
            return False
        return found.first or last or announced(found.before)
    mid_sentence = found.line and found.line.rstrip()[-1:] not in SENTENCE_MARKS
    return well_placed(found.line) and (last or not mid_sentence)


# ------------------------------ the parser ------------------------------


class ToolTextParser:
    """Takes calls out of a model's text; the rest passes unchanged, as it comes.

    feed, native and thought take what the model sent and return what is certain; close
    returns what was still held. With stream_inputs a call in the model's own markers
    goes out piece by piece; enabled=False passes all text.
    """

    def __init__(self, tools: Mapping[str, Tool], *, stream_inputs: bool = False,
                 enabled: bool = True) -> None:
        self._tools, self._streams = tools, stream_inputs
        self._enabled = enabled and bool(tools)
        self._step: Callable[[bool], bool] = self._prose
        self._text = ""
        self._later: List[str] = []
        self._asleep: List[str] = []
        self._wake: Optional[Pattern] = None
        self._out: List[Delta] = []
        self._queue: List[Union[str, Found]] = []
        self._behind = 0
        self._before, self._blank = "", ""
        self._mid_line = self._spoke = self._shown = self._adjacent = False
        self._fence = self._marks = ""
        self._cut = False
        self._wasted = 0
        self._known: List[str] = []
        self._made: List[str] = []
        self._thought = ""

    def feed(self, text: str) -> List[Delta]:
        """Take a piece of the answer's text."""
        if not text or not self._enabled:
            return [TextDelta(text)] if text else []
        if self._wake:
            if not self._wake.search(text):
                self._asleep.append(text)
                return []
        elif self._step == self._stream and self._writer.streaming and self._reader.passes(text):
            return [CallInput(json.dumps(text)[1:-1])]
        elif (self._mid_line and self._shown and not self._text and not self._queue
                and not self._thought and not self._adjacent and self._step == self._prose
                and not CALL_SIGN.search(text)):
            self._before = (self._before + text)[-MAX_CONTEXT_CHARS:]
            return [TextDelta(text)]
        self._asleep.append(text)
        return self._run(False)

    def native(self, name: str, arguments: Any) -> List[Delta]:
        """Take a call that Ollama parsed; the same call leaked as text is dropped."""
        tool = resolve_tool(name, self._tools)
        fitted = repair_input(tool, arguments) if tool else None
        given = as_object(arguments, tool.schema if tool else {})
        call = make_call(name, arguments, self._tools, "") or Call(
            tool.name if tool else name, fitted if fitted is not None else given or {})
        self._known.append(call_key(call))
        result = self._finish(False)
        if self._known[-1] in self._made:
            self._made.remove(self._known[-1])
            return result
        self._thought, self._shown, self._adjacent, self._blank = "", False, True, ""
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
        result = self._finish(cut)
        if self._thought.strip() and not cut and self._enabled and not self._known:
            inner = ToolTextParser(self._tools)
            deltas = inner.feed(self._thought) + inner.close(reason)
            calls = [delta for delta in deltas if isinstance(delta, Call)]
            result += calls if deltas[-len(calls):] == calls else []
        return result

    def _finish(self, cut: bool) -> List[Delta]:
        """Decide all that is held, as at the end of the answer."""
        self._cut = cut
        result = self._run(True)
        while self._queue:
            self._settle()
        result += self._out
        self._out = []
        if self._blank and not self._adjacent:
            result.append(TextDelta(self._blank))
        self._blank = ""
        return result

    def _run(self, final: bool) -> List[Delta]:
        """Take steps while there is text, a bounded piece at a time."""
        self._put_back("".join(self._asleep))
        self._asleep = []
        while self._later:
            self._text += self._later.pop()
            while self._step(final and not self._later):
                pass
        while final and self._step(True):
            while self._later:
                self._text += self._later.pop()
                while self._step(not self._later):
                    pass
        out, self._out = self._out, []
        return out

    def _put_back(self, text: str) -> None:
        """Keep text that is still to be looked at, in bounded pieces, the first on top."""
        starts = range(0, len(text), MAX_STEP_CHARS)
        self._later += [text[at:at + MAX_STEP_CHARS] for at in reversed(starts)]

    # Prose: text passes until a call may begin.

    def _prose(self, final: bool) -> bool:
        if self._adjacent:
            return self._after_call(final)
        text, at = self._text, 0
        while True:
            if not self._mid_line:
                indent = LINE_INDENT.match(text, at)
                at = indent.end() if indent else at
                if at == len(text):
                    break
                self._mid_line = text[at] != "\n"
                if not self._mid_line:
                    at += 1
                    continue
                head = find_head(text, at, True, self._tools)
                if self._begins(head, at, True, final):
                    return self._step != self._prose or self._text != text[at:]
                if text[at] in "{[`~":
                    return self._quoted(at)
                at += text[at] == "<"
            sign = CALL_SIGN.search(text, at)
            if not sign:
                at = len(text)
                break
            at = sign.end()
            if sign.group() == "\n":
                self._mid_line = False
            elif self._begins(find_head(text, at - 1, False, self._tools), at - 1, False, final):
                return self._step != self._prose or self._text != text[at - 1:]
        self._push(text[:at])
        self._text = text[at:]
        return False

    def _begins(self, head: Verdict, at: int, line_start: bool,
                final: bool) -> bool:
        """Hold the text from at on when a call begins there or still may."""
        if head is None or (head == MORE and final) or self._wasted > MAX_WASTED_CHARS:
            return False
        if isinstance(head, Head) and head.rule == "tag_name" and not line_start:
            return False
        before = self._before + self._text[max(0, at - 300):at]
        line = "" if line_start else before.rsplit("\n", 1)[-1]
        self._push(self._text[:at])
        self._text = self._text[at:]
        if isinstance(head, Head) and not well_placed(line[-300:].lstrip()):
            self._skip(head.at - at)
        elif isinstance(head, Head):
            self._begin(head._replace(at=head.at - at), line_start)
        else:
            self._mid_line = not line_start
        return True

    def _begin(self, head: Head, line_start: bool) -> None:
        """Start to read a call at the beginning of the held text."""
        self._head, self._length, self._from = head, 0, head.at
        self._pieces: List[str] = []
        self._inner_mark = "```" if "```" in self._text[:head.at] else ""
        self._scan, self._next_try = BracketScan(), 0
        kind = "fenced" if head.fence else "bare" if head.rule in BARE_RULES else "own"
        before = self._before if self._queue or not line_start else self._before + "\n"
        parts = THOUGHT_END.split(self._before)
        first = not self._spoke or (len(parts) > 1 and not parts[-1].strip())
        self._found = Found("", [], kind, before, first)
        if self._fence and not head.fence:
            self._found.kind = "fenced"
        self._step = self._brackets if head.body in ("json", "python") else \
            self._line if head.body == "line" else self._tags
        meant = tools_meant(head.name, self._tools) if head.name else []
        line = self._found.line.rstrip()
        self._may_stream = (self._streams and head.rule in ("tool_call", "function_xml")
                            and self._found.kind == "own" and line[-1:] in SENTENCE_MARKS
                            and not ruled_out_before(self._found.before))
        if self._step == self._tags:
            raw = head.body.startswith("raw:")
            label = head.body[4:] if raw else head.name
            self._reader: Union[TaggedInput, JsonInput] = TaggedInput(meant[0], label, raw)
            if self._may_stream and len(meant) == 1 and not raw:
                self._open_stream(meant[0])

    def _skip(self, at: int) -> None:
        """Pass a call that is quoted: its marks, and its body where that is in brackets."""
        self._push(self._text[:at])
        self._text, self._scan, self._mid_line = self._text[at:], BracketScan(), True
        self._step = self._data if self._text[:1] in ("{", "[", "(") else self._prose

    def _quoted(self, at: int) -> bool:
        """Pass data or a code block, in which nothing is a call."""
        text = self._text
        fence = FENCE_OPEN.match(text, at)
        if text[at] in "`~" and not fence:
            self._push(text[:at + 1])
            self._text = text[at + 1:]
            return bool(self._text)
        stop = fence.end() if fence else at
        self._push(text[:stop])
        self._text, self._scan = text[stop:], BracketScan()
        self._fence = fence.group(1) if fence else ""
        self._step = self._code if fence else self._data
        self._mid_line = not text[:stop].endswith("\n")
        return True

    def _code(self, final: bool) -> bool:
        text, at = self._text, 0
        while at < len(text):
            if not self._mid_line:
                end = FENCE_END.match(text, at)
                if end and end.end() == len(text) and not final and end.end() - at < 40:
                    break
                if end and end.group(1).startswith(self._fence):
                    self._push(text[:end.end()])
                    self._text, self._fence, self._mid_line = text[end.end():], "", True
                    self._step = self._prose
                    return True
                if not final and FENCE_BEGUN.fullmatch(text, at):
                    break
            at = text.find("\n", at) + 1 or len(text)
            self._mid_line = not text.endswith("\n") if at == len(text) else False
        self._push(text[:at])
        self._text = text[at:]
        return False

    def _data(self, final: bool) -> bool:
        """Pass a bracketed value that is no call, to its end or to a blank line."""
        text = self._text
        blank = (self._before[-1:] + text).find("\n\n")
        stop = len(text) if blank < 0 else blank + 1 - len(self._before[-1:])
        end = self._scan.feed(text[:stop])
        stop = end if end >= 0 else stop
        self._push(text[:stop])
        self._text = text[stop:]
        self._mid_line = not self._before.endswith("\n")
        if end < 0 and blank < 0:
            return False
        self._step = self._prose
        return True

    # Behind a call: its closing marks belong to it, another may follow.

    def _after_call(self, final: bool) -> bool:
        if not self._swallow(final):
            return False
        text = self._text
        at = skip_blank(text, 0)
        if at == len(text):
            if final:
                self._push(text)
                self._text = ""
            return False
        head = find_head(text, at, True, self._tools)
        if head == MORE and not final:
            return False
        fenced = isinstance(head, Head) and bool(head.fence)
        if not (self._fence and fenced) and self._begins(head, at, True, final):
            return self._step != self._prose
        self._adjacent = False
        if self._fence:
            self._cancel_fence()
        else:
            self._mid_line = self._mid_line and "\n" not in text[:at]
        return True

    def _swallow(self, final: bool) -> bool:
        """Give closing marks to the call before them; False while one may be cut."""
        text, at = self._text, 0
        while True:
            match = AFTER_CALL.match(text, at)
            blank = skip_blank(text, at)
            tag = MARKUP_TAG.match(text, blank)
            foreign = tag and tag.group(1) and tag_label(tag) not in CLOSING_TAGS and (
                not resolve_tool(tag.group(2), self._tools))
            if match and not foreign and (
                    final or match.end() < len(text) or match.group().lstrip()[0] in "<["):
                at = match.end()
            elif tag and (tag_label(tag) in END_TAGS or "end" in tag_label(tag).split("_")):
                at = tag.end()
            elif self._marks and text.startswith(self._marks, blank) and (
                    final or blank + len(self._marks) < len(text)):
                at, self._marks, self._fence = blank + len(self._marks), "", ""
            else:
                at = len(text) if final and CLOSING_CUT.match(text, at) else at
                self._extend(text[:at])
                self._text = text[at:]
                return final or not AFTER_BEGUN.fullmatch(text, blank)

    def _extend(self, marks: str) -> None:
        """Add closing marks to the last call, which swallows them or is shown with them."""
        if marks and self._queue and isinstance(self._queue[-1], Found):
            self._queue[-1].raw += marks

    def _cancel_fence(self) -> None:
        """Show calls of a code block that holds more than calls."""
        raws = ""
        while self._queue:
            last = self._queue[-1]
            if not isinstance(last, Found) or last.fence != self._fence:
                break
            raws = last.raw + raws
            self._queue.pop()
        self._step, self._mid_line = self._code, not raws.endswith("\n")
        self._push(raws)

    # Bodies: each step takes the new text and ends in _accept or _reject.

    def _brackets(self, final: bool) -> bool:
        piece, self._text = self._text, ""
        self._pieces.append(piece)
        self._length += len(piece)
        short = self._length - self._head.at < MAX_HEADER_CHARS
        if self._may_stream and short and self._stream_json("".join(self._pieces)):
            return True
        at, self._from = self._from, 0
        self._wake = None if self._may_stream and self._length < MAX_HEADER_CHARS else CLOSERS
        while True:
            at = self._scan.feed(piece, at)
            if at < 0:
                break
            length = self._length - len(piece) + at
            if length >= self._next_try:
                self._next_try = length + max(0, length - MAX_HEADER_CHARS) // 2
                if self._attempt(length, False):
                    return True
        if self._may_stream and not (short or final):  # a first piece of many tokens
            self._may_stream = False
            if self._stream_json("".join(self._pieces)):
                return True
        return final and self._attempt(self._length, True)

    def _attempt(self, length: int, final: bool) -> bool:
        """Read that much of the held text; False when more of it must come."""
        whole, head = "".join(self._pieces), self._head
        self._pieces, text = [whole], whole[:length]
        closed, calls = True, None
        try:
            if head.body == "python":
                calls, stop = read_python(text, head.at, self._tools, head.rule)
            else:
                value, stop, closed = read_json(text, head.at)
                calls = self._calls(value)
        except (ValueError, RecursionError):
            return final and self._reject(whole, final)
        if not closed and not final:
            return False
        if calls is None or (not closed and self._cut and not text[stop:].strip()):
            return self._reject(whole, final)
        return self._accept(calls, whole, stop)

    def _calls(self, value: Any) -> Optional[List[Call]]:
        head = self._head
        if not head.name:
            return calls_from_json(value, self._tools, head.rule)
        if isinstance(value, dict) and "name" in value and value["name"] == head.name:
            return calls_from_json(value, self._tools, head.rule)
        call = make_call(head.name, value, self._tools, head.rule)
        return [call] if call else None

    def _tags(self, final: bool) -> bool:
        piece, self._text = self._text, ""
        self._pieces.append(piece)
        reader = self._reader
        reader.feed(piece[self._from:], final)
        self._from = 0
        self._wake = TAG_END
        if not reader.done:
            return False
        text, unclosed = "".join(self._pieces), reader.cut and (
            self._cut or self._head.body.startswith("raw:"))
        if isinstance(reader, TaggedInput) and reader.lost:
            reader = reader.again(text[self._head.at:])
        values = tagged_values(reader.events)
        call = make_call(self._head.name, values, self._tools, self._head.rule)
        if call is None or unclosed:
            return self._reject(text, final)
        return self._accept([call], text, len(text) - len(reader.rest))

    def _line(self, final: bool) -> bool:
        match = INPUT_LINE.match(self._text, self._head.at)
        if not match or (match.end() == len(self._text) and not final):
            return False
        call = make_call(self._head.name, match.group().strip(), self._tools, self._head.rule)
        if call is None or (self._cut and match.end() == len(self._text)):
            return self._reject(self._text, final)
        return self._accept([call], self._text, match.end())

    def _accept(self, calls: List[Call], text: str, stop: int) -> bool:
        self._found.raw, self._found.calls = text[:stop], calls
        self._fence = self._head.fence or self._fence
        self._marks = self._fence or self._inner_mark
        self._found.fence = self._fence
        self._queue.append(self._found)
        self._put_back(text[stop + MAX_STEP_CHARS:])
        self._text, self._wake = text[stop:stop + MAX_STEP_CHARS], None
        self._step, self._adjacent = self._prose, True
        self._mid_line = True
        self._count()
        return True

    def _reject(self, text: str, final: bool) -> bool:
        """Pass what was no call after all; what follows its opener is looked at again."""
        self._wasted += len(text) if final else 0
        self._put_back(text[MAX_STEP_CHARS:])
        text, self._wake = text[:MAX_STEP_CHARS], None
        fence = FENCE_OPEN.match(text) if self._head.fence else None
        self._adjacent, self._mid_line = False, True
        if self._fence:
            self._text = text
            self._cancel_fence()
            return True
        self._text = text
        if fence:
            self._push(text[:fence.end()])
            self._text, self._fence = text[fence.end():], self._head.fence
            self._step, self._mid_line = self._code, not fence.group().endswith("\n")
        else:
            self._skip(self._head.at)
        return True

    # Streaming: the input goes out while it is written.

    def _stream_json(self, text: str) -> bool:
        match = CANONICAL.match(text, self._head.at)
        meant = tools_meant(match.group(1), self._tools) if match and not self._head.name else []
        if not match or len(meant) != 1:
            return False
        self._reader, self._from = JsonInput(), match.end()
        self._scan, self._next_try = BracketScan(), 0
        self._open_stream(meant[0])
        self._text, self._pieces = text, []
        return True

    def _open_stream(self, tool: Tool) -> None:
        self._tool, self._writer, self._started, self._input = tool, InputWriter(tool), False, ""
        self._wake = None
        self._step = self._stream

    def _stream(self, final: bool) -> bool:
        piece, self._text = self._text, ""
        if not self._started:
            self._pieces.append(piece)
        reader = self._reader
        reader.feed(piece[self._from:] if self._from else piece, final)
        self._from = 0
        self._input += self._writer.write(reader.events)
        reader.events.clear()
        if self._writer.known and not self._started:
            while self._queue:
                self._settle()
            self._started = True
            self._made.append("")
            self._new_block(CallStart(self._tool.name, self._head.rule))
        if self._started and self._input:
            self._out.append(CallInput(self._input))
            self._input = ""
        return reader.done and self._end_stream()

    def _end_stream(self) -> bool:
        reader = self._reader
        if not self._started:
            return self._unstream()
        if reader.lost or (reader.cut and (self._cut or isinstance(reader, JsonInput))):
            self._out.append(CallEnd(False))
        else:
            self._found.kind, self._found.raw = "open", ""
            self._found.closing = self._writer.close()
            self._queue.append(self._found)
        self._text, self._step = reader.rest, self._prose
        self._adjacent = self._mid_line = True
        self._marks = self._inner_mark
        return True

    def _unstream(self) -> bool:
        """Read a call whole that named no parameter the tool knows."""
        self._may_stream = False
        self._text, self._pieces, self._length = "".join(self._pieces), [], 0
        self._from = self._head.at
        if isinstance(self._reader, TaggedInput):
            self._reader = self._reader.fresh()
            self._step = self._tags
        else:
            self._step = self._brackets
        return True

    # What leaves: text at once unless a call before it waits for its words.

    def _push(self, text: str) -> None:
        if not text:
            return
        self._before = (self._before + text)[-MAX_CONTEXT_CHARS:]
        self._spoke = self._spoke or bool(text.strip())
        if self._queue:
            self._queue.append(text)
            self._behind += len(text)
            while self._queue and self._behind >= MAX_HOLD_CHARS:
                self._settle()
        else:
            self._show(text)

    def _count(self) -> None:
        self._behind = sum(len(raw_of(item)) for item in self._queue[1:])
        while self._queue and self._behind >= MAX_HOLD_CHARS:
            self._settle()

    def _settle(self) -> None:
        """Decide the first held call by the words around it, and let go what follows it."""
        found, rest = self._queue[0], self._queue[1:]
        at = next((at for at, item in enumerate(rest)
                   if isinstance(item, str) and item.strip()), len(rest))
        while at and isinstance(rest[at - 1], str):
            at -= 1
        behind = next((to for to in range(at, len(rest)) if isinstance(rest[to], Found)), len(rest))
        after = "".join(map(raw_of, rest[at:behind]))[:MAX_HOLD_CHARS]
        text_to = next((to for to, item in enumerate(rest) if isinstance(item, Found)), len(rest))
        assert isinstance(found, Found)
        if found.kind == "open":
            meant = not ruled_out_after(after)
            self._out += [CallInput(found.closing)] * meant + [CallEnd(meant)]
        elif is_call(found, after, not after.strip()):
            self._emit(found.calls)
        else:
            self._show(found.raw)
        for item in rest[:text_to]:
            self._show(raw_of(item))
        self._queue = rest[text_to:]
        self._behind = sum(len(raw_of(item)) for item in self._queue[1:])

    def _emit(self, calls: List[Call]) -> None:
        for call in calls:
            if call_key(call) not in self._known:
                self._made.append(call_key(call))
                self._new_block(call)

    def _new_block(self, delta: Delta) -> None:
        self._blank, self._shown, self._thought = "", False, ""
        self._out.append(delta)

    def _show(self, text: str) -> None:
        if not self._shown:
            text, self._blank = self._blank + text, ""
            if not text.strip():
                self._blank = text
                return
            self._shown = True
        if text:
            self._thought = ""
            self._out.append(TextDelta(text))


def call_key(call: Call) -> str:
    return json.dumps([call.name, call.input], sort_keys=True, default=str)


def raw_of(item: Union[str, Found]) -> str:
    return item.raw if isinstance(item, Found) else item


def tagged_values(events: Iterable[Tuple[str, str]]) -> Dict[str, str]:
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
# How every edit works. The new content is made twice, by different tools, in files
# of its own in the current folder: .new by the tool that does the work, .check by
# the tools that prove it (never the same ones: printf compared with printf proves
# nothing). Only when both are equal the target is touched: a new file by mv, an
# existing one by cp from .new, after a backup that was compared too, so that links,
# mode bits and owners stay. In the end the target is compared with .check.
#
# Why the commands look as they do. Claude Code runs a command in acceptEdits mode
# without asking only if its analyser can follow it (contract/claude-code.md C2, F6,
# and own runs of 2.1.197 and 2.1.330): no variables, substitutions, braces, set, exit,
# awk or perl; a heredoc alone on its line; a pipe in no `if`; no flags of mv and cp;
# sed only as s/// of some characters. `[[ ... ]]`, `if` and `!` are allowed, and as
# keywords of the shell they cannot be replaced by a broken program: what decides
# whether something is overwritten is always a keyword. Tools and options are those
# that GNU, BusyBox, macOS and Git Bash share; the shell is bash 3.2 or newer.


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
    coded = base64.encodebytes(content).decode()
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
    packer, content = zlib.compressobj(9, zlib.DEFLATED, 31), text.encode()
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
    return (old, f" 777{new} 776", ("",)) if op.text else (old, "", (" 012", " 775"))


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
    source = usable_path(op.path)
    target = usable_path(op.other)
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
    folder, _, name = new.rpartition("/")
    words = {"source": shell_path(old), "target": shell_path(new), "folder": parent_step(new),
             "listed": shell_path(folder or "."), "name": shell_word(name)}
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
    return Step(READ.format(
        file=file, most=most, next=most + 1,
        binary=shell_word(f"[shim] Binary file detected: {path}"),
        cut=shell_word(f"[shim] File truncated to {most} bytes: {path}"),
    ), f"[[ -f {file} && -r {file} ]]")


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
        old=f'{line}"{brief(op.other)}"', new=f'"{brief(op.text)}"',
    ) + PROVEN.get(build, "")


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
    ready = []
    if job.after:
        files.append(job.after)
        ready = [f"[[ -e {job.after} ]]"]
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
    (0, len, MAX_APPROVABLE_CHARS), (1, len, MAX_APPROVABLE_CHARS),
    (0, bash_bytes, MAX_BASH_BYTES), (1, bash_bytes, MAX_BASH_BYTES),
    (2, bash_bytes, MAX_BASH_BYTES))


def commands_for(
    ops: Sequence[FileOp], style: str = "plain", max_read_bytes: int = 200000,
) -> ShellCommand:
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


def tool_for(
    tools: Mapping[str, Tool], names: Sequence[str], keys: AbstractSet[str], needed: str,
) -> Optional[Tool]:
    """Return the first tool of these that requires the text `needed`, nothing beyond keys."""
    for name in names:
        schema = tools[name].schema if name in tools else {}
        required = schema.get("required")
        about = _mapping(_mapping(schema.get("properties")).get(needed))
        if isinstance(required, list) and needed in required and set(required) <= keys \
                and about.get("type") == "string":
            return tools[name]
    return None


def shell_tool(tools: Mapping[str, Tool]) -> Optional[Tool]:
    """Return the client's shell: Bash, run_shell_command, or one that looks like it."""
    alike = [name for name in tools if SHELL_LIKE.search(name)]
    return tool_for(tools, [*SHELL_NAMES, *alike], FILLED_KEYS, "command")


def rescue_call(
    ops: Sequence[FileOp], tools: Mapping[str, Tool], style: str, max_read_bytes: int,
    cwd: str = "", *, is_new: bool = False,
) -> Optional[Tuple[str, Json]]:
    """Return name and input of the one tool call that does the operations.

    None without a shell tool. is_new says that the one file to be made is known not to
    exist: only then a content too long to be approved goes through the Write tool,
    which overwrites whatever is there (contract/claude-code.md F6). Otherwise the
    command asks for approval, but loses nothing. Raises CannotCarryError.
    """
    shell = shell_tool(tools)
    if shell is None:
        return None
    writer = tool_for(tools, WRITE_NAMES, {"file_path", "content"}, "content")
    if len(ops) != 1 or ops[0].kind not in ("create", "write"):
        writer = None
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
    absolute = path.startswith(("/", "~/")) or not cwd
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
    r"(?:working directory|cwd)(?: is)?:?[ \t]+`?(/[^\n`]{0,1000})", re.IGNORECASE)


def own_text(text: str) -> Tuple[str, bool]:
    """Return what the user typed and whether injected text stood on both sides of it."""
    kept = INJECTED.sub("\n", text)
    start = text.lstrip()
    if STRAY_ELEMENT_END.search(kept) or start.startswith(INJECTED_STARTS):
        return "", False
    own = INJECTED_MARK.sub("", kept).strip()
    return own, start.startswith("<") and text.rstrip().endswith(">") and kept != text


def own_texts(message: Message) -> List[str]:
    """Return the user's own texts of one message, oldest first.

    A text between two injected ones counts only where the message has no other: a
    reminder's content may hold the words that seem to end it.
    """
    if message.role != "user":
        return []
    found = [own_text(block.text) for block in message.blocks if isinstance(block, Text)]
    return ([own for own, enclosed in found if own and not enclosed]
            or [own for own, enclosed in found if own])


def own_words(message: Message) -> str:
    """Return the user's own words of a message, without what the client put in."""
    return "\n".join(own_texts(message))


def _newest_turn(turns: Sequence[Message]) -> List[Message]:
    """Return the messages since the last answer, newest first."""
    newest: List[Message] = []
    for message in reversed(turns):
        if message.role == "assistant":
            break
        newest.append(message)
    return newest


def _request_of(turns: Sequence[Message]) -> str:
    """Return what the newest turn asks for in the user's words; "" when nothing is asked."""
    newest = _newest_turn(turns)
    texts = [block.text.lstrip() for message in newest if message.role == "user"
             for block in message.blocks if isinstance(block, Text)]
    if any(text.startswith(BACKGROUND_STARTS) for text in texts):
        return ""
    for message in newest:
        own = own_texts(message)
        if own:
            return own[-1]
        if any(isinstance(block, ToolResult) for block in message.blocks):
            break
    return ""


def _notices(turns: Sequence[Message]) -> List[str]:
    """Return what the client itself said: system messages and reminders."""
    found: List[str] = []
    for message in turns:
        for block in message.blocks:
            if isinstance(block, Text):
                if message.role == "system":
                    found.append(block.text)
                elif message.role == "user":
                    found += [match.group() for match in INJECTED.finditer(block.text)]
    return found


def _plan_mode(notices: Sequence[str]) -> bool:
    """Tell whether plan mode was announced and not ended since."""
    planning = False
    for notice in notices:
        if "plan mode" in notice.lower():  # a tenth of what the pattern's search costs
            for match in PLAN_MODE.finditer(notice):
                planning = match.group("off") is None
    return planning


def working_directory(notices: Sequence[str]) -> str:
    """Return the announced working directory; "" when none or more than one is named."""
    naming = [notice for notice in notices
              for lower in (notice.lower(),) if "working directory" in lower or "cwd" in lower]
    found = {match.group(1).strip().rstrip("/.") for notice in naming
             for match in WORKING_DIRECTORY.finditer(notice)}
    return found.pop() if len(found) == 1 else ""


def _served(turns: Sequence[Message], request: str) -> bool:
    """Tell whether the same words were asked before and a tool call succeeded after them."""
    asked, failed = False, set()
    calls: List[str] = []
    for message in turns[:len(turns) - len(_newest_turn(turns))]:
        asked = asked or request in own_texts(message)
        for block in message.blocks:
            if asked and isinstance(block, ToolUse):
                calls.append(block.id)
            elif isinstance(block, ToolResult) and block.is_error:
                failed.add(block.id)
    return any(call not in failed for call in calls)


# ------------------------------ quotes and fences ------------------------------
# A text is read with each quote and each fenced block replaced by one character of
# a private-use area; so no rule ever matches words inside them.

QUOTE_BASE, FENCE_BASE = 0xE000, 0xF000
PRIVATE_USE = Pattern("[\ue000-\uf8ff]")
OPENING = Pattern("`+|(?<![\\w\\\\\"'])[\"']|[\u201c\u201e\u00ab]|(?<!\\w)\u2018")
CLOSING = {
    '"': Pattern(r'(?<!\\)"(?=[\s.,;:!?)\]}*\u2026]|\Z)'),
    "'": Pattern(r"(?<!\\)'(?=[\s.,;:!?)\]}*\u2026]|\Z)"),
    "\u2018": Pattern(r"\u2019(?!\w)"),
    "\u201c": Pattern("\u201d"),
    "\u201e": Pattern("[\u201c\u201d]"),
    "\u00ab": Pattern("\u00bb"),
}
# Code quoted in its own kind of quotes, "print("x")", ends only before a space.
CLOSING_TIGHT = {
    **CLOSING,
    '"': Pattern(r'(?<!\\)"(?=\s|[.!?]?\Z)'),
    "'": Pattern(r"(?<!\\)'(?=\s|[.!?]?\Z)"),
}
UNPAIRED = Pattern("[\"`\u201c\u201d\u00ab\u00bb]")
CODE_SIGN = Pattern(r"[\[\](){}]|\"|(?<!\w)'|'(?!\w)")
FENCE_IN_LINE = Pattern(r"(.*\S)[ \t]+(`{3,})([\w+-]*)[ \t]*\r?")
BLOCK_AFTER_COLON = Pattern(
    r"([^\n]{0,300}\b(?:following|this|these|contents?|text|lines?|exactly)\b[^\n]{0,100}:)"
    r"[ \t]*\r?\n([\s\S]*)", re.IGNORECASE)
SECOND_WISH = Pattern(
    r"\s*(?:then|also|and|after|finally|please|next|now|once|do not|don't|make sure|thanks|"
    r"can you|could you)\b", re.IGNORECASE)


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

    def value(self, char: str) -> str:
        """Return what a private-use character stands for."""
        code = ord(char)
        if code >= FENCE_BASE:
            return self.fences[code - FENCE_BASE].text
        return self.quotes[code - QUOTE_BASE]


class FenceLine(NamedTuple):
    """A line that may open or close a fence: its indent, its mark and the rest."""

    indent: int
    mark: str
    rest: str


def _fence_line(line: str) -> Optional[FenceLine]:
    body = line.lstrip(" \t")
    mark = body[:len(body) - len(body.lstrip(body[:1]))] if body[:1] in ("`", "~") else ""
    rest = body[len(mark):].rstrip()
    if len(mark) < 3 or "`" in rest:
        return None
    return FenceLine(len(line) - len(body), mark, rest)


def _dedent(line: str, indent: int) -> str:
    """Take away the indent that the fence itself has, as CommonMark does."""
    blank = len(line) - len(line.lstrip(" \t"))
    return line[min(indent, blank):]


class FenceReader:
    """Splits a text into lines outside fences and the fences (CommonMark 4.5).

    A markdown block may hold fences of its own; any other block with an opening
    fence inside is doubtful.
    """

    def __init__(self) -> None:
        self.lines: List[str] = []
        self.fences: List[Fence] = []
        self.open: Optional[FenceLine] = None
        self.body: List[str] = []
        self.depth, self.doubtful = 0, False

    def feed(self, line: str) -> None:
        """Take one line, without its line feed."""
        mark = _fence_line(line)
        if self.open is None:
            self._outside(line, mark)
        elif mark and mark.mark.startswith(self.open.mark):
            self._inside(line, mark)
        else:
            self.body.append(_dedent(line, self.open.indent))

    def _outside(self, line: str, mark: Optional[FenceLine]) -> None:
        inline = FENCE_IN_LINE.fullmatch(line) if mark is None and line.count("```") == 1 else None
        if mark:
            self.open = mark
        elif inline:
            self.lines.append(inline.group(1))
            self.open = FenceLine(0, inline.group(2), inline.group(3))
        else:
            self.lines.append(line)

    def _inside(self, line: str, mark: FenceLine) -> None:
        opened = self.open or mark
        if mark.rest.startswith(" ") and " " in mark.rest.strip() and not self.depth:
            self.close(True)
            self.lines[-1] += mark.rest
        elif mark.rest:
            self.depth += 1
            self.doubtful = self.doubtful or not _is_markdown(opened.rest)
            self.body.append(_dedent(line, opened.indent))
        elif self.depth:
            self.depth -= 1
            self.body.append(_dedent(line, opened.indent))
        else:
            self.close(True)

    def close(self, ended: bool) -> None:
        """End the open fence; ended says whether its closing line was there."""
        if self.open is not None:
            text = "".join(line + "\n" for line in self.body)
            whole = ended and not self.doubtful and not self.depth
            self.lines.append(chr(FENCE_BASE + len(self.fences)))
            self.fences.append(Fence(self.open.rest.strip(), text, whole))
        self.open, self.body, self.depth, self.doubtful = None, [], 0, False


def _is_markdown(info: str) -> bool:
    return info.strip().lower() in ("md", "markdown", "mdx")


def _split_fences(text: str) -> Tuple[str, Tuple[Fence, ...]]:
    """Return the text with a character for each fence, and the fences."""
    reader = FenceReader()
    for line in text.split("\n"):
        reader.feed(line)
    reader.close(False)
    bare_later, fences = False, []
    for fence in reversed(reader.fences):
        # A bare ``` inside a markdown block ends it too early and opens another.
        fences.append(fence._replace(whole=fence.whole and not (
            bare_later and _is_markdown(fence.info))))
        bare_later = bare_later or not fence.info
    return "\n".join(reader.lines), tuple(reversed(fences))


def _unquote(opening: str, content: str) -> str:
    """Return a quote's content: only the quote's own sign may be escaped in it.

    A backslash and n stay two characters: contents are taken as they are written.
    """
    if opening in "\"'":
        return content.replace("\\" + opening, opening)
    if opening == "\u00ab":
        return content.strip(" \u00a0\u202f")
    if opening.startswith("``") and "`" in content and content[:1] == content[-1:] == " ":
        return content[1:-1]
    return content


def _mask_quotes(body: str, closings: Mapping[str, Pattern], one_line: bool) -> Masked:
    """Replace quotes by characters; an opening sign without its closing one stays."""
    quotes: List[str] = []
    pieces: List[str] = []
    dead: Dict[str, int] = {}
    position = 0
    for match in OPENING.finditer(body):
        opening, start = match.group(), match.end()
        if match.start() < position or start < dead.get(opening, 0) or len(opening) > 16:
            continue
        line_end = body.find("\n", start) if one_line else -1
        stop = len(body) if line_end < 0 else line_end
        closing = closings.get(opening) or Pattern(f"(?<!`){opening}(?!`)")
        end = closing.search(body, start, stop)
        if end is None:
            dead[opening] = stop
            continue
        pieces += [body[position:match.start()], chr(QUOTE_BASE + len(quotes))]
        quotes.append(_unquote(opening, body[start:end.start()]))
        position = end.end()
    masked = "".join([*pieces, body[position:]]).replace("\u2019", "'")
    return Masked(masked, tuple(quotes), ())


def _mask(text: str, closings: Mapping[str, Pattern], one_line: bool = False) -> Optional[Masked]:
    """Mask fences and quotes; None when the text cannot be masked safely."""
    if PRIVATE_USE.search(text):
        return None
    body, fences = _split_fences(text)
    masked = _mask_quotes(body, closings, one_line)
    if len(masked.quotes) >= FENCE_BASE - QUOTE_BASE or len(fences) > 0xF8FF - FENCE_BASE:
        return None
    return masked._replace(fences=fences)


def _mask_block(text: str) -> Optional[Masked]:
    """Read all lines after a first line that ends with a colon as one quote."""
    match = BLOCK_AFTER_COLON.fullmatch(text)
    if match is None or "```" in text or not match.group(2).strip():
        return None
    lines = text.rstrip().split("\n")
    gap = max(index for index, line in enumerate(["", *lines]) if not line.strip())
    masked = _mask(match.group(1), CLOSING)
    if masked is None or (gap and SECOND_WISH.match(lines[gap])):
        return None
    return masked._replace(text=masked.text + "\n" + chr(QUOTE_BASE + len(masked.quotes)),
                           quotes=(*masked.quotes, match.group(2).lstrip("\r\n")))


def _readings(words: str) -> Iterator[Masked]:
    """Yield the ways in which the quotes of a request can be read, likeliest first."""
    for masked in (_mask(words, CLOSING), _mask_block(words)):
        if masked is not None:
            yield masked
    masked = _mask(words, CLOSING_TIGHT)
    if masked is not None and all(_quotes_in_brackets(quote) for quote in masked.quotes):
        yield masked


def _quotes_in_brackets(text: str) -> bool:
    """Tell whether quotes inside a quote belong to code: print("x"), {"a": 1}."""
    depth = 0
    for sign in CODE_SIGN.findall(text):
        if sign in "\"'" and not depth:
            return False
        depth += (sign in "([{") - (sign in ")]}")
    return True


# ------------------------------ paths ------------------------------

CONTROL_CODES = Pattern("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
# Files that steer a shell, a login or the client itself, wherever they lie.
PROTECTED = frozenset((
    ".git", ".ssh", ".gnupg", ".aws", ".kube", ".claude", ".netrc", ".profile", ".bashrc",
    ".bash_profile", ".bash_login", ".bash_logout", ".zshrc", ".zshenv", ".zprofile", ".zlogin",
    ".gitconfig", ".config",
))
FILE_NAME = Pattern(
    r"(?:.*/)?(?:[^/]*\.(?=[\w+-]*[^\W\d_])[\w+-]{1,16}|Makefile|Dockerfile|Containerfile|"
    r"LICEN[SC]E|README|CHANGELOG|NOTICE|AUTHORS|CONTRIBUTING|TO[D]O|Procfile|Gemfile|Rakefile|"
    r"Jenkinsfile|Vagrantfile|Pipfile|Brewfile|[Jj]ustfile|CODEOWNERS|VERSION)")
# Products whose names look like files.
NOT_FILES = Pattern(r"(?:(?:node|vue|next|react|express|three|d3|nuxt|socket|angular|ember)"
                    r"\.(?:js|io)|asp\.net|e\.g|i\.e|\w+\.(?:com|org|net|io|dev))", re.IGNORECASE)
BARE_PATH = Pattern(r"[^\s,;:\"'`<>|*?()\[\]{}$&!\\\ue000-\uf8ff]+")
NAMED = Pattern(r"\b(?:called|named|files?|(?:sub)?(?:folders?|dir|directory|directories))\b",
                re.IGNORECASE)
MAX_PATH_CHARS = 1000


class Scope(NamedTuple):
    """What paths may be: ~/ for the user's own words, absolute ones inside cwd.

    told says that the words read are the model's.
    """

    home_ok: bool = False
    cwd: str = ""
    told: bool = False


def _safe_path(raw: str, scope: Scope) -> str:
    """Return a path inside the project in its plain form, or ""."""
    path = raw.strip()
    inside = bool(scope.cwd) and path.startswith(scope.cwd + "/")
    parts = [part for part in path[len(scope.cwd) if inside else 0:].split("/")
             if part not in ("", ".")]
    home = scope.home_ok and path.startswith("~/") and len(parts) > 1 and parts[1][:1] != "."
    bad = (not path or len(path) > MAX_PATH_CHARS or CONTROL_CODES.search(path) is not None
           or ".." in parts or not PROTECTED.isdisjoint(part.lower() for part in parts)
           or any(len(part.encode("utf-8", "replace")) > 255 for part in parts)
           or (path.startswith("/") and not inside) or (path.startswith("~") and not home)
           or path[1:2] == ":" or path.startswith("\\") or "://" in path or "..\\" in path)
    return "" if bad else (scope.cwd + "/" if inside else "") + "/".join(parts or ["."])


# ------------------------------ the table ------------------------------
# In a shape a space stands for white space, a space and ? for
# white space or none, and {name} is a row of SLOTS.

SLOTS: Dict[str, str] = {
    "q": "[\ue000-\uf8ff]",
    "token": r"(?:[\ue000-\uf8ff]|[^\s,;:\"'`<>|*?()\[\]{}$&!\\\ue000-\uf8ff]+)",
    "fill": r"(?:(?:the|a|an|my|our|this|that|new|existing|local|single|text|plain|plain-text|"
              r"python|javascript|typescript|markdown|json|yaml|csv|html|css|shell|config|"
            r"following|file[,:]|in (?:this|the (?:current|project|working|root)) (?:directory|"
            r"folder|project)|"
              r"configuration|source|log|file|document|script|filename|path|at) )*"
            r"(?:(?:called|named) )?",
    "folderfill": r"(?:(?:the|a|an|my|our|this|new|empty|existing|nested|sub|single|two|three|"
                  r"folder|"
                    r"directory|dir|subfolder|subdirectory|sub-folder|sub-directory|folders|"
                    r"directories|structure|called|named|at|path|for me|with the name) )*",
    "filenoun": r"(?: (?:file|document|script)(?:'s)?)?"
                r"(?:,? in (?:this|the current) (?:folder|directory|project))?",
    "foldernoun": r"(?: (?:folder|directory|dir|subfolder|subdirectory)s?)?",
    "file": r"(?P<file_marks>{fill})(?P<file>(?:(?<=called\s)|(?<=named\s))"
              r"(?:[\w-]+ ){1,4}[\w-]+\.[\w-]+|{token}){filenoun}",
    "dest": r"(?P<dest_marks>{fill})(?P<dest>{token}){filenoun}",
    "folder": r"(?P<folder_marks>{folderfill})(?P<folder>{token})(?P<folder_noun>{foldernoun})",
    "files": r"(?P<files_marks>(?:(?:the|both|two|three|these|following|files|documents) )*{fill})"
             r"(?P<files>{token}"
               r"(?:(?:,? and |, ?)(?:the )?(?:file )?{token}){0,9}){filenoun}",
    "folders": r"(?P<folders_marks>{folderfill})(?P<folders>{token}"
                 r"(?:(?:,? and |, ?)(?:the )?(?:folder |directory )?{token}){0,9})"
                 r"(?P<folders_noun>{foldernoun})",
    "say": r"(?: ?(?:(?:saying|that (?:says|reads|contains|is)|which (?:says|reads)|containing|"
             r"with|reading|consisting of|as|being)\b)?(?: (?:just|only|exactly))?"
             r"(?: the (?:exact |literal |following )?(?:text|words?|string|contents?))?:?)",
    "noun": r"(?:(?:(?:the|this|these|a|an|its|another|one more) )?(?:(?:following|exact|literal|"
            r"exactly|new|"
              r"single|only|just|plain|simple|short|extra|additional|final|last|entire|full|"
              r"two|three) )*(?P<line>(?:lines?|row|entry|item|bullet(?: point)?|list item|"
              r"import|record)\b)?(?:text|strings?|words?|phrase|sentence|contents?|characters?|"
              r"letters?|value|number|snippet|content|data|paragraph|message|"
            r"(?:python |javascript |html |css |shell )?code|json|yaml|html|csv|xml|sql|markdown)?"
              r"(?: of text)?{say} )?",
    "text": r"(?:(?:{noun}|(?:exactly|just|only) )(?P<text>{q})"
            r"(?P<lf>,? (?:followed by|and|plus) an? (?:trailing |final )?(?:newline|line break))?|"
            r"(?:(?:the|a) )?"
              r"(?:(?:exact|literal|new|single) )*(?:text|string|words?|phrase|sentence|number|"
              r"(?P<bare_line>line)|exactly)(?: saying| that (?:says|reads)| containing)?:? "
              r"(?P<bare>[^\s\ue000-\uf8ff](?:[^\ue000-\uf8ff]*?[^\s\ue000-\uf8ff])?)|"
              r"(?P<loose>[^\s\ue000-\uf8ff](?:[^\ue000-\uf8ff]*?[^\s\ue000-\uf8ff])?))",
    "quoted": r"(?:{noun}(?P<text>{q}))",
    "this": r"(?:(?:this|the|these|that|a|an|following|new|next|exact|single|below|it) )*"
              r"(?:this|these|that|it|above|below|following|text|(?P<line>lines?)|contents?|code|"
              r"block|"
              r"snippet|section|string|row|data|entry|entries|paragraph)?(?: below)?",
    "later": r"(?:[:,.]|,? (?:the )?(?:text|lines?|contents?|string|words?)[:,]?|"
               r"(?: as follows| exactly| verbatim)?:)? (?P<text>{q})",
    "with": r"(?:,? ?(?:with|containing|that (?:contains|says|reads|has)|which (?:contains|says|"
              r"reads|has)|whose (?:only )?contents? (?:is|are|should be|must be)|having|holding|"
              r"saying|"
              r"and its contents? (?:should be|is|are|must be)|"
              r"with (?:its|the|exactly the|the exact) contents? (?:set to|being))"
              r"(?: only| just| exactly| precisely)?(?: (?:this|the following|these))?:?)",
    "force": r"(?:,? (?:and )?overwrit(?:e|ing)(?: (?:it|the file|any existing \w+|whatever is "
             r"there))?(?: if (?:it|one) (?:already )?exists)?)",
    "inside": r"(?: (?:in|inside|into|within) it| inside| as (?:its|the) (?:only )?contents?| "
                r"as (?:its|the) text)?",
    "of": r"(?:(?:the )?(?:entire|whole|full|complete|current|existing|all(?: of)?)? ?"
            r"(?:the )?(?:file )?(?:contents?|text|everything)(?: of| in| inside| from) )",
    "in": r"(?:(?:everywhere |throughout |anywhere )?(?:in|inside|within|of|from|throughout|"
            r"across|inside of))",
    "each": r"(?:(?:all|every|each|any)(?: of)? )?(?:the )?(?:(?:occurrences?|instances?|"
              r"appearances?|mentions?) of )?(?:the )?(?:exact |literal |old |existing )?",
    "what": r"(?:(?P<old_line>line)|(?P<old_noun>text|strings?|words?|phrase|sentence|substring|"
              r"characters?|value|part))?(?: (?:saying|that says))?",
    "old": r"{each}(?:{what} )?(?P<old>{q}|[^\s\ue000-\uf8ff]+)",
    "new": r"(?:the |a )?(?:new |exact |literal )?(?:line |text |string |word |phrase |value |"
             r"sentence )?(?P<new>{q}|(?:an? )?(?:the )?empty(?: string)?|nothing|"
             r"[^\s,\ue000-\uf8ff]+)",
    "block": r"(?:(?:this|the|following|code|block|text|snippet|section|part|that):? )*",
    "anchor": r"(?:the )?(?:exact |literal |existing )?(?:(?P<anchor_line>line)|text|string|"
                r"word|phrase|sentence)?(?: (?:that (?:says|reads)|which says|saying))? ?"
                r"(?P<anchor>{q})",
    "where": r"(?:right |immediately |directly |just )?(?P<where>after|before|above|below|under|"
               r"underneath|beneath|in front of|behind|following|preceding)",
    "create": r"(?:create|make|generate|set up|start|add|produce|touch|initialize|initialise|build)"
                r"(?: me| us)?",
    "add": r"(?:add|put|write|insert|place|append|include|paste)",
    "end": r"(?:the )?(?:very |new )?(?:end|(?P<line>last line))(?: of)?",
    "top": r"(?:the )?(?:very )?(?:(?P<top>top)|beginning|start|head)(?: of)?",
    "bottom": r"(?:the )?(?:very )?(?P<bottom>bottom)(?: of)?",
    "newline": r"(?P<own_line>,? (?:on|as|in) (?:a|its own|a separate)(?: new)?(?: separate)?"
                 r" line(?: of its own)?(?: at the end)?| after a (?:newline|line break))",
    "look": r"(?:(?:read through|go through|read|show|display|print|cat|open|view|output|dump|see|"
            r"look at|"
              r"take a look at|have a look at|check out|look (?:inside|into|in)|inspect)"
              r"(?: out| up)?(?: me| us)?(?: out)?)",
    "tail": r"(?P<tail>(?:(?:,|\.)? (?:and|then|so|to|for|in|first)|\. (?:what|tell|how))\b"
            r"[^\ue000-\uf8ff]*)?",
    "here": r"(?P<here>(?:in |inside |of |from )?(?:this|the|my|our)(?: (?:current|working|"
              r"project|root|present|project's root))* (?:folder|directory|dir|project|repo|"
              r"repository|workspace)|here)",
    "listing": r"(?:(?:all|the|of|every|any|a|list|me|us|out|existing|current) )*(?:(?:files?|"
               r"folders?|"
                 r"directories|subfolders|subdirectories|contents?|entries|items|everything|"
                 r"directory|directory contents|files?names|what(?:'s| is)|"
               r"(?:what|which) files(?: and folders)?(?: are)?)"
                 r"(?:,? (?:and|or|&) (?:sub)?(?:folders?|directories|files))?)"
                 r"(?: that are| located| contained| stored| there are| there| we have)?",
}


SLOT_NAME = Pattern(r"\{([a-z]+)\}")
WORD = Pattern(r"[a-z]+")
GROUP = Pattern(r"\(\?P<(\w+)>")


@lru_cache(maxsize=256)
def _shape(template: str) -> Pattern:
    """Write a template out as a pattern; slots may hold slots."""
    seen: Dict[str, int] = {}
    written = template
    while SLOT_NAME.search(written):
        written = SLOT_NAME.sub(lambda slot: SLOTS[slot.group(1)], written)
    spaced = written.replace(" ?", r"\s*").replace(" ", r"\s+")
    return Pattern(GROUP.sub(lambda group: _numbered(group, seen), spaced), re.IGNORECASE)


@lru_cache(maxsize=256)
def _first_words(template: str) -> FrozenSet[str]:
    """Return the words with which a text of this shape can begin, and perhaps more.

    They spare most patterns their compilation, 10 ms each.
    """
    written = SLOT_NAME.sub(lambda slot: SLOTS[slot.group(1)], template)
    depth = end = 0
    while end < len(written) and (depth or written[end] != " "):
        depth += {"(": 1, ")": -1}.get(written[end], 0)
        end += 1
    return frozenset(WORD.findall(written[:end].lower()))


def _numbered(group: re.Match[str], seen: Dict[str, int]) -> str:
    """Number the second and later groups of one name: a pattern may not repeat it."""
    name = group.group(1)
    seen[name] = seen.get(name, 0) + 1
    return f"(?P<{name}{seen[name] if seen[name] > 1 else ''}>"


class Rule(NamedTuple):
    """The kind of operation that a request of this shape asks for."""

    kind: str
    shape: str


RULES: Tuple[Rule, ...] = tuple(Rule(*row) for row in (
    ("append", "append {text} (?:to|into|in|onto|at) (?:{end} )?{file}{newline}?"),
    ("append", "{add} {text}{newline} (?:to|in|at) (?:(?:{end}|the bottom of) )?{file}"),
    ("append", "append (?:{this} )?(?:to|into) (?:{end} )?{file}{later}"),
    ("append", "append (?:to )?{file} with {quoted}"),
    ("append", "{add} {text} (?:to|at|on|onto|as) {end} {file}{newline}?"),
    ("append", "{add} {text} (?:to|in|into) {file},? (?:at|on) (?:the )?(?:very )?end"),
    ("append", "{add} (?:{this} )?(?:to|at) {end} {file}{later}"),
    ("append", "(?:in|to|at) (?:{end} )?{file},? (?:append|add)(?: {this})?:? {quoted}"
               "(?: (?:to|at) the (?:very )?end)?{newline}?"),
    ("append_line", "{add} {text} (?:to|at|on) {bottom} {file}"),
    ("append_line", "{add} (?:{this} )?(?:to|at) {bottom} {file}{later}"),
    ("append_line", "(?:in|to) {file},? {add} {quoted} (?:to|at) (?:the )?bottom"),
    ("append_line", "(?:append|add) (?:a|one|another|one more)(?: new| single| final| last)* line"
                    " (?:to|in|at) (?:(?:{end}|the bottom of) )?{file}"
                    "(?:{say}| and (?:write|put)|:)? (?P<text>{q})"),
    ("append", "add {text} (?:to|into) {file}{newline}?"),
    ("append", "add {this} (?:to) {file}{later}"),
    ("prepend", "(?:prepend) {text} (?:to|at|in|onto) (?:{top} )?{file}"),
    ("prepend", "{add} {text} (?:to|at|on|in|onto) {top} {file}"),
    ("prepend", "{add} {text} (?:to|in|into) {file},? at {top}"),
    ("prepend", "{add} (?:{this} )?(?:to|at) {top} {file}{later}"),
    ("prepend", "prepend (?:{this} )?(?:to|at) (?:{top} )?{file}{later}"),
    ("prepend", "(?:in|to|at) {file},? (?:{add}|prepend) {quoted} (?:to|at) {top}"),
    ("prepend", "at {top} {file},? {add} {quoted}"),
    ("create", "{create} {file}{with} (?:{text}){inside}"),
    ("create", "{create} (?:an?|the)(?: new)?(?: \\w+)? file with (?:the )?(?:file ?)?name"
               " {file},? (?:and|with) (?:with )?{quoted}"),
    ("create", "{create} {file},? and fill it with {text}"),
    ("write", "{create} {file}{with} {quoted}{force}"),
    ("create", "{create} {file},? (?:in|inside|under|within) {folder}{with} {text}"),
    ("create", "{create} {file}{with} {quoted},? (?:in|inside|under|within) {folder}"),
    ("create", "{create} {file}(?:[:,.]| with)? (?:{this}:? )?(?P<text>[\uf000-\uf8ff])"),
    ("create", "{create} {file}[.;,]? (?:and )?(?:it|which|that) (?:should|must|needs to|has to|"
               "shall|will) (?:contain|say|have|read|hold|include)(?: only| just| exactly)?:? "
               "{text}"),
    ("create", "{create} {file},? and (?:put|write|add|insert|place|store|save) {text}"
               " (?:in|into|to|inside)(?: it| (?:the|this|that) file)"),
    ("create", "{create} {file}(?:[.;,]|,? and)? (?:its|the)(?: file)? (?:contents?|text)"
               "(?: of the file)? (?:should be|is|must be|are|to be)(?: exactly)?:? {text}"),
    ("create", "{create} (?:a|the) (?:new )?(?:text |python |json )?file{with} {quoted}"
               ",? (?:and )?(?:called|named|(?:name|call|save) it(?: as)?|at|saved as) {dest}"),
    ("create", "(?:save|put|store|place) {text} (?:to|into|in|inside|as) {file}"),
    ("create", "(?:save|put|store) (?:{this} )?(?:to|into|in|as) {file}{later}"),
    ("empty", "{create} (?:(?:an?|the|two|three|some) )?(?:new,? )?(?:empty|blank)"
              "(?: new)?(?: text| python| markdown)*(?: files?)?,?(?: called| named| at)? {files}"),
    ("empty", "{create} {file},? (?:as an empty file|with no contents?|that is empty|empty|"
              "(?:and )?leav(?:e|ing) it empty|with empty contents?|without (?:any )?contents?)"),
    ("empty", "touch {files}"),
    ("named", "{create} (?:a|the)(?: new)?(?: text)? file (?:called|named)? ?{file}"),
    ("write", "write {text}(?: and nothing else)? (?:to|into|in|inside|as) {file}{force}?"),
    ("write", "write (?:{this} )?(?:to|into) {file}{later}"),
    ("write", "(?:write|overwrite|rewrite|fill) {of}?{file}{with} {text}"),
    ("write", "(?:write|overwrite|rewrite) {of}?{file}(?:[:,.]| with)? (?:{this}:? )?"
              "(?P<text>[\uf000-\uf8ff])"),
    ("write", "(?:overwrite|rewrite) {of}?{file} so (?:that )?it (?:contains|says|reads|has)"
              "(?: only| just| exactly)? {text}"),
    ("write", "(?:overwrite|set|replace|change|update) {of}{file} (?:with|to|by|to be)"
              "(?: be)?(?: exactly)? {text}"),
    ("write", "(?:overwrite|set|replace|change) {of}{file}(?: with| to)?(?: {this})?{later}"),
    ("write", "(?:replace|overwrite) (?:the )?(?:whole|entire|full|complete) file {file}{with} "
              "{text}"),
    ("write", "(?:set|replace|overwrite|change|update) {file}(?:'s)? contents? (?:to|with|by) "
              "{text}"),
    ("write", "set the file {file} to {quoted}"),
    ("write", "(?:make|update|change) {file} (?:to |so (?:that )?it )?"
              "(?:contains?|says?|reads?|ha(?:ve|s))(?: only| just| exactly)* {text}"),
    ("write", "(?:i|we) (?:want|need|would like) {file} to (?:contain|say|read|hold)"
              " (?:only|just|exactly) {text}"),
    ("clear", "(?:erase|delete|remove|wipe)(?: out)? {of}{file}"),
    ("clear", "(?:empty|clear|truncate|blank)(?: out)? {of}?{file}"),
    ("rename", "(?:change|update) (?:the )?(?:file ?)?name of {file} (?:to|into) {dest}"),
    ("rename", "(?:change|rename|update) (?:the )?file(?:'s)?(?: ?name)? from {file} to {dest}"),
    ("remove", "(?:remove|delete|erase|strip|drop) {old} {in} {file}"),
    ("remove", "(?:in|from) {file},? (?:remove|delete|erase) {old}"),
    ("replace", "(?:replace|substitute|update|change|convert) {old} (?:with|by) {new} {in} {file}"),
    ("replace", "(?:change|turn|update|convert|correct|fix) {old} (?:to|into) {new} {in} {file}"),
    ("replace", "(?:swap|exchange) (?:out )?{old} (?:for|with) {new} {in} {file}"),
    ("replace", "substitute {new} for {old} {in} {file}"),
    ("replace", "(?:replace|change) {block}(?P<old>{q}) (?:with|by|to|into):?"
                " {block}(?P<new>{q}) {in} {file}"),
    ("replace", "(?:in|inside) {file},? (?:replace|change) {block}(?P<old>{q}) (?:with|by|to|into)"
                ":? {block}(?P<new>{q})"),
    ("replace", "(?:in|inside|within) {file},? (?:replace|change|substitute|swap|update) {old}"
                " (?:with|by|to|into|for) {new}(?: everywhere| throughout)?"),
    ("replace", "(?:replace|change|update) {old} {in} {file} (?:with|by|to|into) {new}"),
    ("replace", "(?:find and replace|search and replace|find/replace) {old} (?:with|by) {new}"
                " {in} {file}"),
    ("replace", "(?:find|search for|look for|locate) {old} {in} {file},? and (?:replace|change|"
                "swap) (?:it|them|each|every one|all(?: of them)?|that) (?:with|to|by|for) {new}"),
    ("replace", "search {file} for {old} and (?:replace|change) (?:it|them) (?:with|to) {new}"),
    ("insert", "{add} {text}{newline}?,? {where} {anchor},?"
               " (?:in|inside|of|within|to|into) {file}"),
    ("insert", "in {file},? {where} {anchor},? {add} {text}"),
    ("insert", "{where} {anchor},? (?:in|of|inside) {file},? {add} {text}"),
    ("insert", "{add} (?:{this} )?{where} {anchor} (?:in|of|inside) {file}{later}"),
    ("insert", "(?:in|inside|to|into) {file},? {add} {text},? {where} {anchor}"),
    ("insert", "{add} {text} (?:in|into|to|inside) {file},? {where} {anchor}"),
    ("rename", "rename {file} (?:to|as|into|->|=>) (?:be )?{dest}"),
    ("rename", "rename (?P<file_marks>(?:the )?(?:folder|directory|dir) (?:called |named )?)"
               "(?P<file>{token}) (?:to|as|into) (?:be )?(?:the )?(?P<dest>{token})"),
    ("rename", "rename {file} so (?:that )?it(?:'s| is) (?:now )?(?:called|named) {dest}"),
    ("rename", "mv {file} {dest}"),
    ("copy", "cp {file} {dest}"),
    ("rename", "give {file} the (?:new )?name {dest}"),
    ("rename", "move {file} (?:to|as|over to) {dest}"),
    ("into", "move {file} (?:in|into|inside|to|under|over to|inside of) {folder}"),
    ("into", "move {files} (?:in|into|inside|to|under) {folder}"),
    ("copy", "(?:copy|duplicate) {file} (?:to|as|into|over to) {dest}"),
    ("copy", "(?:make|create) a copy of {file},? (?:called|named|as|at|and (?:call|name) it) "
             "{dest}"),
    ("copyinto", "copy {file} (?:in|into|inside|to|under) {folder}"),
    ("delete", "(?:delete|remove|erase|rm|unlink|trash|get rid of|throw away) {files}"),
    ("delete", "(?:delete|remove|rmdir) (?P<files_marks>the empty (?:folder|directory))"
               "(?: called| named)? (?P<files>{token})"),
    ("subfolder", "{create} {folder},? (?:in|inside|under|within|inside of) (?:the )?"
                  "(?:folder |directory )?(?P<parent>{token})(?: folder| directory)?"),
    ("mkdir", "(?:{create}|mkdir)(?: -p)? {folders}"),
    ("read", "{look} (?:(?:the|all(?: the| of the)?|entire|full|whole|complete|current) )*"
             "(?:(?:contents?|text|lines|source|code) (?:of|in|from|inside) |"
             "what(?:'s| is) (?:in|inside|written in) )?{files}{tail}"),
    ("read", "(?:tell|give|get|fetch)(?: me)? "
             "(?:what(?:'s| is) (?:in|inside)|the (?:full )?(?:contents?|text)"
             " (?:of|in)) {files}{tail}"),
    ("list", "(?:list|show|display|print|give|enumerate|see|check|look at|explore|view) "
             "{listing}(?: {here})?{tail}"),
    ("list", "(?:list|show|display|print|give|enumerate|see|ls|check|look at|explore|examine|"
             "view|inspect) {listing} (?:in|inside|of|under|"
             "within|from|at) {folder}{tail}"),
    ("list", "(?:show|display|view|open|look at|see)(?: me)? (?P<folder_marks>(?:the )?)"
             "(?P<folder>{token})(?P<folder_noun> (?:folder|directory)){tail}"),
    ("list", "(?:ls|dir|list)(?: (?:{here}|{folder}){tail})?"),
    ("list", "(?:tell|show) me what(?:'s| is) (?:in|inside) (?:{here}|{folder})"),
    ("run", "(?:run|execute|issue|invoke)(?: (?:the|this|a|following|shell|bash|terminal|command|"
            "this command))*:? (?P<command>{q})(?: command)?(?: (?:in|on|from) (?:the|my|a|this)"
            " (?:terminal|shell|console|project|repo|folder|directory))?(?: here)?{tail}"),
    ("run", "(?P<typed>(?:git (?:status|log|diff|show|branch|remote|blame)|ls|pwd|tree)"
            r"(?: [\w./=:@+,%^-]+){0,12})"),
    ("run", "(?:run|execute)(?: (?:the|command|following|shell|bash))*:? "
            r"(?P<typed>[a-z][\w-]*(?: [\w./=:@+,%^-]+){0,12}?)"
            "(?: command)?(?: (?:in|on) (?:the|my|a) (?:terminal|shell|console))?{tail}"),
))

# Questions that only the file or folder can answer; the model must say that it looks.
QUESTIONS: Tuple[Rule, ...] = tuple(Rule(*row) for row in (
    ("read", "(?:what(?:'?s| is| are)|do you know what(?:'?s| is)|can you (?:see|tell me|check) "
             "what(?:'?s| is))(?: currently| written)?(?: the)?(?: current)?(?: contents?| text)? "
             "(?:in|inside|of|written in|inside of|contained in|stored in) {files}"
             "(?: right now| now| currently)?"),
    ("read", "what (?:does|do) {files} (?:contain|say|have in it|hold|include|look like)"
             "(?: inside| right now)?"),
    ("list", "(?:what|which) (?:{listing}|files? and folders?|files? do (?:I|we) have|"
             "kind of files) ?(?:are |is |exist |do (?:I|we) have |live |exists )?"
             "(?:there )?(?:are )?(?:{here}|(?:in|inside|under|within) {folder})"),
    ("list", "what(?:'?s| is)(?: there)?(?: in| inside)? (?:{here}|(?:in )?{folder})"),
    ("list", "what(?:'s| are)(?: all)? the (?:contents|files)(?: of| in| inside) "
             "(?:{here}|{folder})"),
    ("list", "(?:what|which) files (?:does|do) (?:{here}|{folder}) (?:contain|have|hold)"),
    ("list", "what (?:does|do) (?:{here}|{folder}) (?:contain|hold|have in it)"),
))


# ------------------------------ from a match to operations ------------------------------

MAX_REQUEST_CHARS = 500
LONG_GAP = Pattern(r"\s{9}")
# Words by which an unquoted text is a description, a second wish or a condition.
NOT_LITERAL = Pattern(
    r"(?:you|i|we|shown|given|generated|provided|same|copied|taken|found|needed|required|"
    r"appropriate|suitable|described|mentioned|similar|of|in|on|from|about|"
    r"for|that|which|describing|explaining|based|below|above|following|"
    r"as|to|is|it|representing|version|representation|[\w-]+ of)\b|"
    r".*(?:\b(?:then|if|unless|otherwise|don't|do not|and also|as well as|instead of|except|"
    r"when|because|so that|whichever|whatever|times|twice|repeated|uppercase|lowercase|reversed|"
    r"backwards|translated|encoded|(?:in|into) (?:all |upper|lower|french|german|spanish|italian|"
    r"chinese|japanese|python|json|yaml|html|markdown|bold|caps|reverse|each|every)|"
    r"on (?:each|every|separate))\b|\band (?:a|an|another|the|then|put|write|add|"
    r"append|create|delete|remove|rename|move|save|run|show|read|tell|make|replace|insert)\b|"
    r"[.!?]\s+[A-Z]\w+.*\b(?:file|it)\b)|.*(?:^|\s)[\w./-]+\.(?:txt|md|py|js|ts|json|ya?ml|toml|"
    r"html|css|sh|cfg|ini|csv|log)\b", re.IGNORECASE | re.DOTALL)
# What describes a text rather than being one; only words outside this may go unquoted.
NOT_LOOSE = Pattern(
    r"(?:.*\s)?(?:an?|the|some|my|your|our|their|his|her|this|that|these|those|it|its|any|all|"
    r"every|each|more|another|other|new|today|current|random|several|few|many|lots?|good|better|"
    r"proper|basic|simple|sample|default|sane|sensible|appropriate|missing|different|what|how|why|"
    r"one|two|three|four|five|ten|first|last|something|anything|everything|nothing|text|content|"
    r"line|code|data|info|summary|list|table|story|poem|haiku|essay|joke|quote|script|program|"
    r"function|class|method|module|test|note|entry|header|footer|licen[sc]e|date|time|timestamp|"
    r"name|title|config|json|yaml|html|csv|xml|markdown|lorem|ipsum|output|result|readme|support|"
    r"documentation|description|usage|help|boilerplate|whitespace|newline|error|debug|hex|base64|"
    r"sql|api|auth|async|type|version|dependency|and|or|with|by|in|on|of|feedback|progress|"
    r"\w+(?:s|tion|ing|ment|ness|"
    r"ity|ance|ence))(?:'s|\s|[,.]|\Z)|.*'s\b", re.IGNORECASE | re.DOTALL)
PROSE_FILE = Pattern(r".*\.(?:txt|md|log|text|rst|markdown)", re.IGNORECASE)
IGNORE_FILE = Pattern(r"(?:.*/)?\.[a-z]{1,10}ignore", re.IGNORECASE)
# Files in which text without a named place would break the structure.
STRUCTURED_FILE = Pattern(r".*\.(?:json|html?|xml|svg|ipynb|vue|jsx|tsx)", re.IGNORECASE)
END_NAMED = Pattern(r"\bend\b", re.IGNORECASE)
DIRECT_QUOTE = Pattern("\\w+\\s+[\ue000-\uefff]")
LITERAL_WORD = Pattern(r"[\w=./:+@#%-]+(?:\(\))?")
# Words that mean characters or code rather than themselves in "replace X with Y".
NOT_WORDS = Pattern(
    r"(?:tabs?|spaces?|newlines?|commas?|semicolons?|quotes?|whitespace|everything|it|them|this|"
    r"that|all|contents?|lines?|text|words?|nothing|empty|something|status|state|priority|title|"
    r"version|name|colou?r|port|date|author|language|theme|mode|level|size|width|height|default|"
    r"format|timeout|host|user|username|password|url|path|type|licen[sc]e|description|header|"
    r"heading|font|background|label|value|year|month|day|email|address|phone|price|amount|"
    r"quantity|count|limit|number|order|owner|case|style|tone|indent\w*|numbers?|names?|dates?|"
    r"tense|spelling|grammar|typos?|debug|logging|comments?|headings?|bullets?|imports?)",
    re.IGNORECASE)
EMPTY_WORD = Pattern(r"(?:an? |the )?empty(?: string)?|nothing", re.IGNORECASE)
# "read X and ..." may go on with what the user wants to know, not with a second action.
INFORMATION = Pattern(
    r"[,.]?\s*(?:(?:and|then|so)\s+)*(?:(?:please|briefly|you|can|could|I|to|we|me)\s+)*"
    r"(?:summari[sz]e|explain|tell|describe|show me|give me|list|count|report|say|answer|"
    r"analy[sz]e|identify|let me know|find|see|look|point|outline|what|how|know|understand|"
    r"check|me|us|in full|first|i want|for me|here|the|this)\b.*", re.IGNORECASE | re.DOTALL)
VERB_AFTER = Pattern(
    r"(?:\b(?:and|then|also)|[,;.])\s+(?:(?:then|also|please|and)\s+)*(?:create|write|append|"
    r"replace|delete|remove|rename|move|insert|add|save|change|update|edit|modify|fix|run|execute|"
    r"put|make|overwrite|copy|commit|push|install|refactor|rewrite|set|apply|convert|correct|use|"
    r"do|send|open|download|start|build|test|print to|store|clean|improve|implement)\b|"
    r"\b(?:don't|do not|without|unless)\b", re.IGNORECASE)
# Limits that a plain listing does not know.
LIMITED = Pattern(r"\b(?:recursive\w*|sorted|largest|smallest|newest|modified|only|named|"
                  r"containing|"
                  r"ending|matching|that|which|if|subfolders|hidden|starting|by)\b", re.IGNORECASE)
INSERT_KINDS = {"after": "insert_after", "below": "insert_after", "under": "insert_after",
                "underneath": "insert_after", "beneath": "insert_after",
                "behind": "insert_after", "following": "insert_after",
                "before": "insert_before", "above": "insert_before",
                "in front of": "insert_before", "preceding": "insert_before"}
ON_OWN_LINES = ("above", "below", "under", "underneath", "beneath")
PATH_SEPARATOR = Pattern(r"\s*,\s*and\s+|\s*,\s*|\s+and\s+")
PATH_FILLER = Pattern(r"(?:the\s+)?(?:(?:file|folder|directory)\s+)?", re.IGNORECASE)

Ops = Tuple[FileOp, ...]


class Rescue(NamedTuple):
    """What to do in the model's place, and the rule that found it."""

    rule: str
    ops: Ops


class Asked(NamedTuple):
    """A request freed of courtesy: what is left, its end mark, what was taken off.

    newline asks for a final line feed; cut says that words were taken off the end.
    """

    core: str
    ending: str
    polite: bool = False
    newline: bool = False
    cut: bool = False


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
        groups = self.match.groupdict()
        return groups.get(name) or groups.get(name + "2") or groups.get(name + "3") or ""

    def value(self, name: str) -> Optional[str]:
        """Return the quoted text of a group; None where it is not one quote."""
        token = self.group(name)
        return self.masked.value(token) if PRIVATE_USE.fullmatch(token) else None


def _one_path(found: Reading, token: str, marks: str, folder: bool) -> str:
    """Return the safe path of a token, or "" when it is none."""
    quoted = PRIVATE_USE.fullmatch(token) is not None
    raw = found.masked.value(token) if quoted else token.rstrip(".")
    if quoted and ord(token) >= FENCE_BASE:
        return ""
    named = NAMED.search(marks) is not None
    fits = FILE_NAME.fullmatch(raw) is not None or named or (folder and raw.endswith("/"))
    if raw.endswith("/") and not folder:
        fits = False
    if not quoted and (NOT_FILES.fullmatch(raw) or NOT_A_NAME.fullmatch(raw)):
        fits = False
    return _safe_path(raw, found.scope) if fits else ""


def _path(found: Reading, name: str = "file", folder: bool = False) -> str:
    marks = found.group(name + "_marks") + " " + found.group(name + "_noun")
    return _one_path(found, found.group(name), marks, folder)


def _paths(found: Reading, name: str, folder: bool = False) -> Tuple[str, ...]:
    """Return every path of a list such as "a, b and c"; () when one is none."""
    tokens = [PATH_FILLER.sub("", token, count=1) if " " in token else token
              for token in PATH_SEPARATOR.split(found.group(name))]
    marks = found.group(name + "_marks") + " " + found.group(name + "_noun")
    paths = tuple(_one_path(found, token, marks, folder) for token in tokens)
    return paths if all(paths) else ()


def _text(found: Reading) -> Optional[str]:
    """Return the literal text that a request gives; None where it only describes one."""
    quoted = found.value("text")
    if quoted is not None:
        return quoted + ("\n" if found.group("lf") else "")
    loose = found.group("loose")
    bare = found.group("bare") or loose
    if found.match.string.endswith(bare):
        ending = found.asked.ending
        bare += "" if ending == "." or (found.asked.polite and ending == "?") else ending
        if found.asked.cut or found.asked.newline:
            return None
    if UNPAIRED.search(bare) or "\n" in bare or NOT_LITERAL.match(bare) or not bare:
        return None
    if loose and (found.scope.told or not _is_loose(found, bare)):
        return None
    return bare


def _is_loose(found: Reading, text: str) -> bool:
    """Tell whether unmarked, unquoted words can only be meant literally."""
    name = found.group("file")
    if IGNORE_FILE.fullmatch(name):
        return LITERAL_WORD.fullmatch(text) is not None or text.startswith("*.")
    return (PROSE_FILE.fullmatch(name) is not None and len(text.split()) <= 4
            and NOT_LOOSE.match(text) is None)


def _is_file_itself(found: Reading, text: str) -> bool:
    """Tell whether a text such as in "append 'b.txt' to a.txt" may mean the file's content."""
    return (DIRECT_QUOTE.match(found.match.string) is not None and " " not in text
            and FILE_NAME.fullmatch(text) is not None and not NOT_FILES.fullmatch(text)
            and not IGNORE_FILE.fullmatch(found.group("file")))


def _add_text(found: Reading, kind: str) -> Ops:
    path, text = _path(found), _text(found)
    if not path or text is None:
        return ()
    line = found.group("line") or found.group("bare_line") or found.group("own_line")
    if IGNORE_FILE.fullmatch(path) and kind == "append" and found.group("loose"):
        line = line or "line"
    if _is_file_itself(found, text):
        return ()
    vague = found.match.string[:4].lower() == "add " and STRUCTURED_FILE.fullmatch(path)
    if kind == "append" and vague and not END_NAMED.search(found.match.string):
        return ()
    if kind == "append_line" or (kind == "append" and line):
        return (FileOp("append_line", path, text if text.endswith("\n") else text + "\n"),)
    if kind == "prepend" and (line or found.group("top")) and not text.endswith("\n"):
        text += "\n"
    return (FileOp(kind, path, text),) if text or kind in ("create", "write") else ()


def _create(found: Reading, kind: str) -> Ops:
    if found.group("dest"):
        path, text = _path(found, "dest"), found.value("text")
        return (FileOp("create", path, text),) if path and text is not None else ()
    made = _add_text(found, kind)
    if not made or not found.group("folder"):
        return made
    folder = _path(found, "folder", folder=True)
    op = made[0]._replace(path=f"{folder}/{made[0].path}")
    return (op,) if folder and made[0].path[0] not in "/~" else ()


def _empty(found: Reading, _kind: str) -> Ops:
    paths = _paths(found, "files") if found.group("files") else (_path(found),)
    return tuple(FileOp("create", path) for path in paths) if all(paths) else ()


def _clear(found: Reading, _kind: str) -> Ops:
    path = _path(found)
    return (FileOp("write", path),) if path else ()


def _word(found: Reading, name: str) -> Optional[str]:
    """Return the old or new text of a replacement: quoted, or one plain word."""
    quoted = found.value(name)
    if quoted is not None:
        return quoted
    word = found.group(name)
    if name == "new" and EMPTY_WORD.fullmatch(word):
        return ""
    before = found.match.string[:found.match.start("old")].lower().split()[-1:]
    if name == "old" and before in (["the"], ["a"], ["an"]) and not found.group("old_noun"):
        return None
    plain = PROSE_FILE.fullmatch(found.group("file")) is not None or found.group("old_noun")
    fits = plain and LITERAL_WORD.fullmatch(word) and not NOT_WORDS.fullmatch(word)
    return word if fits else None


def _replace(found: Reading, kind: str) -> Ops:
    path, old = _path(found), _word(found, "old")
    new = "" if kind == "remove" else _word(found, "new")
    bare_removal = kind == "remove" and found.value("old") is None and not found.group("old_noun")
    if not path or not old or new is None or old == new or bare_removal:
        return ()
    if found.group("old_line") and found.value("old") is None:
        return ()
    if found.group("old_line"):
        return (FileOp("replace_line", path, new.rstrip("\n"), old.rstrip("\n")),)
    return (FileOp("replace", path, new, old),)


def _insert(found: Reading, _kind: str) -> Ops:
    path, text, anchor = _path(found), _text(found), found.value("anchor")
    if not path or not text or not anchor or found.group("loose"):
        return ()
    where = " ".join(found.group("where").lower().split())
    own_line = found.group("line") or found.group("own_line") or found.group("bare_line")
    if found.group("anchor_line") or own_line or where in ON_OWN_LINES:
        return (FileOp(INSERT_KINDS[where] + "_line", path, text.rstrip("\n"),
                       anchor.rstrip("\n")),)
    return (FileOp(INSERT_KINDS[where], path, text, anchor),)


def _move(found: Reading, kind: str) -> Ops:
    marks = found.group("file_marks").lower()
    path = _path(found, folder=kind == "rename")
    raw = found.masked.value(found.group("dest")) if found.value("dest") else found.group("dest")
    if raw.endswith("/"):
        dest = _joined(_one_path(found, found.group("dest"), "", True), path)
    else:
        dest = _one_path(found, found.group("dest"), marks + found.group("dest_marks"), False)
    renamed = found.match.string.lower().startswith(("rename", "change", "give"))
    if renamed and "/" in path and dest and "/" not in dest:
        return ()
    return (FileOp(kind, path, other=dest),) if path and dest and path != dest else ()


def _joined(folder: str, path: str) -> str:
    return f"{folder}/{path.rsplit('/', 1)[-1]}" if folder and path else ""


def _into(found: Reading, kind: str) -> Ops:
    """Move or copy into a folder, which is named as one or stands after "into"."""
    name = "files" if found.group("files") else "file"
    paths = _paths(found, "files") if name == "files" else (_path(found),)
    word = " ".join(found.match.string[found.match.end(name):].lower().split())
    into = word.startswith(("into ", "inside ", "under ", "file into ", "file inside "))
    folder = _one_path(found, found.group("folder"), "folder " if into else
                       found.group("folder_marks") + found.group("folder_noun"), True)
    if not folder or "." in folder.rsplit("/", 1)[-1][1:] or not all(paths):
        return ()
    ops = tuple(FileOp("copy" if kind == "copyinto" else "rename", path,
                       other=_joined(folder, path)) for path in paths)
    return () if any(op.path == op.other for op in ops) else ops


def _delete(found: Reading, _kind: str) -> Ops:
    return tuple(FileOp("delete", path) for path in _paths(found, "files"))


def _subfolder(found: Reading, _kind: str) -> Ops:
    marks = found.group("folder_marks") + found.group("folder_noun")
    if not FOLDER_NOUN.search(marks):
        return ()
    parent = _one_path(found, found.group("parent"), "folder", True)
    folder = _one_path(found, found.group("folder"), marks, True)
    return (FileOp("mkdir", f"{parent}/{folder}"),) if parent and folder else ()


def _mkdir(found: Reading, _kind: str) -> Ops:
    marks = found.group("folders_marks") + found.group("folders_noun")
    named = FOLDER_NOUN.search(marks) or found.match.string[:5].lower() == "mkdir"
    if not named:
        return ()
    paths = _paths(found, "folders", True) or ()
    if not paths and found.match.string[:5].lower() == "mkdir":
        paths = (_one_path(found, found.group("folders"), "folder", True),)
    return tuple(FileOp("mkdir", path) for path in paths) if all(paths) else ()


def _tail_is_harmless(found: Reading) -> bool:
    tail = found.group("tail")
    return not tail or found.scope.told or (
        INFORMATION.fullmatch(tail) is not None and not VERB_AFTER.search(tail))


def _read(found: Reading, _kind: str) -> Ops:
    if not _tail_is_harmless(found):
        return ()
    return tuple(FileOp("read", path) for path in _paths(found, "files"))


def _list(found: Reading, _kind: str) -> Ops:
    folder = found.group("folder")
    if not _tail_is_harmless(found) or LIMITED.search(found.group("tail").split(" and ")[0]):
        return ()
    if not folder or HERE.fullmatch(folder):
        return (FileOp("list", "."),)
    marks = found.group("folder_marks") + found.group("folder_noun")
    raw = found.value("folder") or folder
    noun = FOLDER_NOUN.search(marks) is not None or raw.endswith("/")
    before = found.match.string[:found.match.start("folder")].lower()
    file = FILE_NAME.fullmatch(raw) is not None and not raw.startswith(".") and not noun
    sure = noun or "file" in before or before.startswith(("ls", "dir", "list the contents",
                                                          "list contents"))
    path = _one_path(found, folder, "folder", True) if sure and not file else ""
    return (FileOp("list", path),) if path else ()


# Commands that say something without an argument.
ALONE = ("ls", "pwd", "date", "whoami", "uname", "tree", "df", "du")


def _run(found: Reading, _kind: str) -> Ops:
    line, tail = found.value("command"), " ".join(found.group("tail").lower().split())
    if line is None and tail.startswith(("to ", "for ", "in ")) and not tail.startswith("for me"):
        return ()
    words = _read_only(line if line is not None else found.group("typed"), line is None)
    if len(words) == 1 and words[0] not in ALONE:
        return ()
    return (FileOp("run", words=words),) if words and _tail_is_harmless(found) else ()


FOLDER_NOUN = Pattern(r"\b(?:folders?|dir|director(?:y|ies)|sub-?(?:folders?|director(?:y|ies)))\b",
                      re.IGNORECASE)
HERE = Pattern(r"(?:here|\.|\./|this|it)", re.IGNORECASE)
NOT_A_NAME = Pattern(
    r"(?:the|an|it|this|that|them|these|those|all|any|every|each|some|my|your|our|me|you|in|on|"
    r"at|to|of|for|with|from|by|and|or|if|is|are|here|there|folder|folders|directory|directories|"
    r"file|files|project|repo|everything|something|anything|nothing|which|where|what|structure|"
    r"called|named|for|like|using|inside|under|listing|tree|layout|hierarchy|browser|"
    r"watcher|scanner|walker|picker|names|paths|hidden|separate|common|shared|dedicated|suitable|"
    r"proper|different|similar|second|third|random|%\w+%.*)", re.IGNORECASE)
BUILDERS: Dict[str, Callable[[Reading, str], Ops]] = {
    "append": _add_text, "append_line": _add_text, "prepend": _add_text, "write": _add_text,
    "create": _create, "empty": _empty, "named": _empty, "clear": _clear, "remove": _replace,
    "replace": _replace, "insert": _insert, "rename": _move, "copy": _move, "into": _into,
    "copyinto": _into, "delete": _delete, "subfolder": _subfolder, "mkdir": _mkdir,
    "read": _read, "list": _list, "run": _run,
}


# ------------------------------ scaffolds and commands ------------------------------

SHELL_TOKEN = Pattern(
    r"(?P<gap>(?:[ \t]|\\\r?\n)+)|(?P<end>\r?\n|;(?![;&])|&&)|(?P<redirect>>>?(?![&|>]))|"
    r"(?P<here><<-?[ \t]*(?:'(?P<raw>\w+)'|\"(?P<raw2>\w+)\"|(?P<tag>\w+)))|"
    r"'(?P<single>[^']*)'|\"(?P<double>(?:[^\"\\$`]|\\.)*)\"|\\(?P<escaped>[^\r\n])|"
    r"(?P<comment>(?<![^\s;])#[^\n]*)|(?P<brace>\{[\w./,@+-]*,[\w./,@+-]*\})|"
    r"(?P<plain>[^\s$`&;|<>(){}*?\[\]~!#\"'\\]+|(?<=[^\s;&])[#~])", re.DOTALL)
DOUBLE_ESCAPE = Pattern(r"\\([\\\"$`]|\n)")
SUBSTITUTION = Pattern(r"[$`\\]")
PRINTF_PART = Pattern(r"%(?P<conversion>[s%])|\\(?P<escape>[nt\\\"'])|(?P<plain>[^%\\]+)")
PRINTF_ESCAPES = {"n": "\n", "t": "\t"}
MAX_SCRIPT_WORDS = 200
SHELL_INFO = ("bash", "sh", "shell", "zsh", "console", "terminal")


class ScriptLine(NamedTuple):
    """One command of a script: its words, its redirect and its here-document."""

    words: Tuple[str, ...]
    mode: str
    target: str
    here: Optional[str]


class ScriptReader:
    """Reads a script of plain commands into words, as bash would.

    Anything that bash would expand, substitute, pipe, test or loop over makes the
    whole script unreadable. Only brace lists of plain names are expanded.
    """

    def __init__(self, text: str) -> None:
        self.text, self.position, self.readable = text, 0, True
        self.commands: List[ScriptLine] = []
        self.words: List[str] = []
        self.parts: List[Tuple[str, ...]] = []
        self.mode, self.target, self.wants_target = "", "", False
        self.here: Optional[str] = None
        self.pending: Optional[re.Match[str]] = None

    def read(self) -> Tuple[ScriptLine, ...]:
        """Return the commands; () when the script is not a plain one."""
        while self.readable and self.position < len(self.text):
            match = SHELL_TOKEN.match(self.text, self.position)
            if match is None:
                return ()
            self.position = match.end()
            self._take(match)
        self._end_command()
        return tuple(self.commands) if self.readable and self.pending is None else ()

    def _take(self, match: re.Match[str]) -> None:
        kind, text = match.lastgroup, match.group(match.lastgroup or 0)
        if kind in ("gap", "comment"):
            self._end_word()
        elif kind == "end":
            self._end_line(text)
        elif kind == "redirect":
            self.readable = not self.mode and not self.parts and self.readable
            self.mode, self.wants_target = text, True
        elif kind == "here":
            self.readable = self.pending is None and not self.parts and self.readable
            self.pending = match
        elif kind == "brace":
            self.parts.append(tuple(text[1:-1].split(",")))
        else:
            self.parts.append((DOUBLE_ESCAPE.sub(
                lambda escape: escape.group(1).strip("\n"), text) if kind == "double" else text,))

    def _end_word(self) -> None:
        if not self.parts:
            return
        words = [""]
        for part in self.parts:
            words = [word + choice for word in words for choice in part][:MAX_SCRIPT_WORDS + 1]
        self.parts = []
        if self.wants_target:
            self.readable = len(words) == 1 and self.readable
            self.target, self.wants_target = words[0], False
        else:
            self.words += words
        self.readable = self.readable and len(self.words) <= MAX_SCRIPT_WORDS

    def _end_line(self, text: str) -> None:
        self._end_word()
        if self.pending is not None:
            self.readable = text.endswith("\n") and self.readable
            self._read_here(self.pending)
        self._end_command()

    def _read_here(self, opening: re.Match[str]) -> None:
        """Take the lines up to the here-document's tag."""
        self.pending = None
        tag = opening.group("raw") or opening.group("raw2") or opening.group("tag")
        tabs = opening.group().startswith("<<-")
        lines: List[str] = []
        while self.position < len(self.text):
            end = self.text.find("\n", self.position)
            end = len(self.text) if end < 0 else end
            line, self.position = self.text[self.position:end], end + 1
            line = line.lstrip("\t") if tabs else line
            if line.rstrip("\r") == tag:
                self.here = "".join(kept + "\n" for kept in lines)
                break
            lines.append(line)
        expands = opening.group("tag") is not None and self.here is not None
        self.readable = (self.readable and self.here is not None
                         and not (expands and SUBSTITUTION.search(self.here or "")))

    def _end_command(self) -> None:
        self._end_word()
        if self.words:
            self.commands.append(ScriptLine(tuple(self.words), self.mode, self.target, self.here))
        elif self.mode or self.here is not None:
            self.readable = False
        self.readable = (self.readable and not self.wants_target
                         and len(self.commands) <= MAX_SCRIPT_WORDS)
        self.words, self.mode, self.target, self.here = [], "", "", None


def _written(command: ScriptLine, text: str) -> Optional[Ops]:
    """Return the write or append that a redirected output amounts to."""
    if not command.mode:
        return ()
    return (FileOp("append" if command.mode == ">>" else "write", command.target, text),)


def _echo(command: ScriptLine) -> Optional[Ops]:
    words = command.words[1:]
    newline = "" if words[:1] == ("-n",) else "\n"
    text = " ".join(words if newline else words[1:])
    if "\\" in text or text.startswith(("-n ", "-e", "-E")) or command.here is not None:
        return None
    return _written(command, text + newline)


def _printf(command: ScriptLine) -> Optional[Ops]:
    values = list(command.words[2:])
    if len(command.words) < 2 or command.here is not None:
        return None
    parts, end = [], 0
    for match in PRINTF_PART.finditer(command.words[1]):
        if match.start() != end:
            return None
        parts.append(match)
        end = match.end()
    if end != len(command.words[1]):
        return None
    return _written(command, _formatted(parts, values))


def _formatted(parts: Sequence[re.Match[str]], values: List[str]) -> str:
    """Return what printf prints: the format is used again while values are left."""
    written: List[str] = []
    takes = any(part.group("conversion") == "s" for part in parts)
    while True:
        for part in parts:
            if part.group("conversion") == "s":
                written.append(values.pop(0) if values else "")
            elif part.group("escape"):
                written.append(PRINTF_ESCAPES.get(part.group("escape"), part.group("escape")))
            else:
                written.append(part.group("plain") or "%")
        if not values or not takes:
            return "".join(written)


def _cat(command: ScriptLine) -> Optional[Ops]:
    plain = command.words[1:] in ((), ("-",)) and command.mode
    return _written(command, command.here) if plain and command.here is not None else None


def _tee(command: ScriptLine) -> Optional[Ops]:
    append = command.words[1:2] == ("-a",)
    files = command.words[2:] if append else command.words[1:]
    quiet = command.target in ("", "/dev/null")
    if command.here is None or len(files) != 1 or not quiet:
        return None
    return (FileOp("append" if append else "write", files[0], command.here),)


def _made(kind: str, flags: Tuple[str, ...]) -> Callable[[ScriptLine], Optional[Ops]]:
    def made(command: ScriptLine) -> Optional[Ops]:
        names = [word for word in command.words[1:] if word not in flags]
        if not names or command.mode or command.here is not None:
            return None
        return tuple(FileOp(kind, name) for name in names)
    return made


def _relocated(kind: str) -> Callable[[ScriptLine], Optional[Ops]]:
    def relocated(command: ScriptLine) -> Optional[Ops]:
        names = [word for word in command.words[1:] if word not in ("-n", "-v", "-i")]
        if len(names) != 2 or command.mode or command.here is not None:
            return None
        return (FileOp(kind, names[0], other=names[1]),)
    return relocated


SCAFFOLDS: Dict[str, Callable[[ScriptLine], Optional[Ops]]] = {
    "mkdir": _made("mkdir", ("-p", "-v", "-pv", "--parents")), "touch": _made("create", ()),
    "echo": _echo, "printf": _printf, "cat": _cat, "tee": _tee,
    "cp": _relocated("copy"), "mv": _relocated("rename"),
}


def _fold(ops: List[FileOp], op: FileOp, overwrite: bool) -> None:
    """Add an operation; what a script writes in several steps becomes one."""
    earlier = [index for index, other in enumerate(ops)
               if other.path == op.path and other.kind in ("create", "write")]
    folder = any(other.kind == "mkdir" and other.path == op.other for other in ops)
    if op.kind in ("copy", "rename") and folder:
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
    for command in ScriptReader(script).read():
        step = SCAFFOLDS.get(command.words[0])
        made = step(command) if step else None
        if made is None:
            return ()
        for op in made:
            into = op.other.endswith("/")
            path, other = _safe_path(op.path, scope), _safe_path(op.other, scope)
            if not path or op.path.startswith("-") or (op.other and not other):
                return ()
            safe = op._replace(path=path, other=_joined(other, path) if into else other)
            _fold(ops, safe, overwrite)
    return tuple(ops)


# Commands that only look, and the arguments with which they would do more.
READ_ONLY: Dict[str, str] = {
    "ls": "", "pwd": "", "cat": "", "head": "", "tail": r"-\w*[fF].*|--(?:follow|retry|pid).*",
    "wc": r"--files0.*", "grep": "", "egrep": "", "fgrep": "", "rg": r"--(?:pre|hostname).*",
    "find": r"-(?:delete|exec\w*|ok\w*|fprint\w*|fls)", "tree": r"-o.*|--output.*", "du": "",
    "df": "", "file": r"-\w*[CmMf].*|--(?:compile|magic|files).*", "stat": "", "which": "",
    "date": r"[^+].*", "whoami": r".+", "uname": "", "diff": r"--to-file.*", "cmp": "",
    "nl": "", "basename": "", "dirname": "", "realpath": "", "sha256sum": r"-c|--check",
    "md5sum": r"-c|--check", "sort": r"-\w*[oTS].*|--(?:output|compress|temp|files0).*",
    "git": r"--output.*|--ext-diff|--textconv|-o.*|-O.*|-c|--open-files.*|--exec.*",
}
GIT_LOOKS = Pattern(
    r"(?:status|log|diff|show|blame|ls-files|shortlog|describe|rev-parse)(?: .*)?|"
    r"branch(?: (?:-[avr]{1,3}|--list|--show-current|--all))*|remote(?: -v)?|tag(?: -l)?|"
    r"stash list", re.DOTALL)
VERSION_QUESTION = Pattern(r"(?:python3?|node|npm|git|ruby|go|java|gcc|cargo|rustc|pip3?) "
                           r"(?:--version|-V|version)")
PROSE_ARGUMENT = Pattern(r"(?:in|on|the|for|to|of|and|or|all|my|it|with|from|over|against|this|"
                         r"that|a|an|is|are|bugs?|me|everything|files?|folders?|"
                         r"here)", re.IGNORECASE)


def _read_only(line: str, typed: bool = False) -> Tuple[str, ...]:
    """Return the words of one plain command that only reads; () for any other."""
    commands = ScriptReader(line.strip()).read()
    if len(commands) != 1 or commands[0].mode or commands[0].here is not None:
        return ()
    words = commands[0].words
    if VERSION_QUESTION.fullmatch(" ".join(words)):
        return words
    refused = READ_ONLY.get(words[0])
    looks = words[0] != "git" or GIT_LOOKS.fullmatch(" ".join(words[1:])) is not None
    if refused is None or not looks or not all(
            _harmless_argument(word, refused, typed) for word in words[1:]):
        return ()
    return words


def _harmless_argument(word: str, refused: str, typed: bool) -> bool:
    plain = word[word.find("=") + 1:] if word.startswith("--") else word
    parts = plain.split("/")
    return not (re.fullmatch(refused, word) or plain.startswith(("/", "~")) or ".." in parts
                or not PROTECTED.isdisjoint(part.lower() for part in parts) or "://" in plain
                or CONTROL_CODES.search(word) or (typed and PROSE_ARGUMENT.fullmatch(word)))


# ------------------------------ asked for ------------------------------

# Words of courtesy before a request; each alternative is taken off as often as it comes.
LEAD = Pattern(
    r"\s*(?:(?:please|pls|plz|kindly|hi|hey|hello|hi there|hey there|ok|okay|alright|great|"
    r"thanks|thank you|perfect|good|cool|nice|now|next|then|so|also|and|well|first|finally|just|"
    r"quickly|simply|claude|qwen|assistant|yes|yeah|sure|right|awesome)(?:\s*[,.!:;-]+\s*|\s+)|"
    r"(?:would|do) you mind\s+|(?:can|could|would|will) you(?:\s*,)?\s+(?:please,?\s+|kindly\s+|"
    r"just\s+|now\s+|also\s+|"
    r"quickly\s+|maybe\s+|possibly\s+)*|would you be so kind (?:as )?to\s+|"
    r"i(?:'d| would) (?:like|love) (?:for )?(?:you )?to\s+|"
    r"i(?:'d| would) appreciate it if you (?:could|would)\s+|be so kind (?:as )?to\s+|"
    r"i (?:want|need) you to\s+|i (?:want|need) to\s+|we need to\s+|you should\s+|"
    r"go ahead and\s+|let's\s+|let us\s+|help me(?: to)?\s+|your (?:task|job) is to\s+|"
    r"(?:the )?task:\s*|i have a (?:small |quick |simple )?(?:task|request|favou?r)(?: for you)?"
    r"[.:,!]\s*|(?:quick|small|simple) (?:task|request|one)[.:,!]\s*|"
    r"using (?:the |your )?(?:bash|shell|write|file|edit)? ?tools?,\s+|use (?:the |your )?"
    r"(?:bash|shell|write|file|edit)? ?tools? (?:and|to)\s+|could i ask you to\s+|"
    r"(?:let me|(?:can|could|may) i)\s+(?=(?:see|view|look at|have a look)\b))", re.IGNORECASE)
# A fence and then what to do with it; the rules want the text last.
SHOWN_FIRST = Pattern(r"([\uf000-\uf8ff])\s+([^\uf000-\uf8ff]*\b(?:this|above|"
                      r"that)\b[^\uf000-\uf8ff]*)",
                      re.IGNORECASE)
ASKED_WITH_FENCE = Pattern("\\?(\\s+[\uf000-\uf8ff])\\Z")
PLEASE_INSIDE = Pattern(r"\A((?:in|inside|from|to|at) [^,]{1,80},)\s+please\s+", re.IGNORECASE)
NEEDED = Pattern(r"(?:i|we)(?:'d like| would like| need| want)(?: to have)?\s+(?=an?\s+(?:new\s+|"
                 r"empty\s+)*(?:\w+\s+)?(?:file|folder|directory)\b)", re.IGNORECASE)
POLITE_QUESTION = Pattern(r"\s*(?:\w+[,!.]?\s+){0,4}?(?:can|could|would|will|do) you\b|.*\bmind\b",
                          re.IGNORECASE)
# What may follow a request without changing it.
TRAILER = Pattern(
    r"(?:^|(?<=[^\s,.;!?]))(?:[,.;!?]\s*|\s+|\s*[-\u2013\u2014]\s*)(?:and )?"
    r"(?:please|pls|plz|thanks|thank you|thx|ty|cheers|"
    r"thanks (?:a lot|so much|in advance|very much)|thank you (?:so|very) much|that's (?:it|all)|"
    r"that is all|nothing else|nothing more|for me|now|right now|right away|asap|immediately|"
    r"if you (?:can|could|please|don't mind|would)|when you (?:can|get a chance|have time)|"
    r"would you|will you|ok|okay|"
    r"(?:please )?(?:do not|don't) (?:change|modify|touch|edit|add|do|write|include|alter|create|"
    r"say) (?:anything|any (?:other|more) \w+|the rest|other files)(?: else| more)?|"
    r"(?:make )?no other changes|(?:leave|keep) (?:everything|the rest|all)(?: else)? "
    r"(?:unchanged|as (?:it )?is|alone|untouched|the same)|(?:then )?(?:let me know|tell me|say so)"
    r"(?: (?:when|once|that|if))?(?: (?:it's|it is|you're|you are|that's))?(?: (?:done|finished|"
    r"ready|it worked|complete))|use (?:the |your )?(?:bash|shell|write|edit|file)? ?tools?|"
    r"using (?:the |your )?(?:bash|shell|write|edit|file)? ?tools?|"
    r"\(?(?:without|with no|no|and no) (?:a |any )?(?:trailing |final |ending )?"
    r"(?:newline|line break)\)?|"
    r"exactly (?:as|like) (?:is|written|shown|that)|verbatim|i'll do the rest|"
    r"(?:no|without) (?:any )?explanations?(?: needed| necessary)?|(?:and )?don't explain(?: it| "
    r"anything)?|just do it|do it now|only that|and nothing else|don't ask(?: me)?(?: anything)?|"
    r"it's urgent|and (?:that's|that is) it)\s*[.!?]*\Z", re.IGNORECASE)
PLACE = Pattern(r"\s+(?:here|from this (?:folder|directory)|in (?:the|this|my|our) "
                r"(?:(?:current|working|project|root) )?"
                r"(?:folder|directory|project|repo|dir|root))[.!]*\Z", re.IGNORECASE)
LOOKS = Pattern(r"\s*(?:\w+,? ){0,4}?(?:what|which|list|show|display|print|ls|dir|tell|see|give)\b",
                re.IGNORECASE)
FINAL_NEWLINE = Pattern(
    r",? (?:with|followed by|and|ending (?:with|in)|plus) a (?:trailing |final |single )?"
    r"(?:newline|line break)(?: at the end| character)?\Z", re.IGNORECASE)
ENDING = Pattern(r"(?:(?<![\s/.])\.{1,3}[!?]{0,9}|(?<![!?])[!?]{1,9}\.{0,3}|\u2026|:)\Z")
MAX_TRAILER_CHARS = 120
BASES = (
    "create", "make", "generate", "add", "append", "write", "insert", "place", "replace", "change",
    "update", "rename", "move", "copy", "delete", "remove", "erase", "list", "show", "display",
    "open", "view", "print", "save", "store", "clear", "empty", "overwrite", "prepend", "execute",
    "touch", "duplicate", "inspect",
)
FORMS: Dict[str, str] = {
    "whats": "what's", "putting": "put", "setting": "set", "wrote": "write",
    "written": "write", "made": "make", "overwrote": "overwrite", "overwritten": "overwrite",
    "reading": "read", "running": "run", "looking": "look", "copied": "copy", "swapped": "swap",
    "shown": "show", "ran": "run", "examine": "view", "examining": "view", "check": "view",
    "checking": "view",
    **{base[:-1] + "ing" if base.endswith("e") else base + "ing": base for base in BASES},
    **{base + ("d" if base.endswith("e") else "ed"): base for base in BASES},
}
FIRST_WORD = Pattern(r"[A-Za-z]+")


def _base_form(text: str) -> str:
    match = FIRST_WORD.match(text)
    base = FORMS.get(match.group().lower()) if match else None
    return base + text[len(match.group()):] if match and base else text


# A statement of why, before or after a request: "The port is wrong. Please change ...".
# It must be a plain statement: no order, question, condition, quoted speech or limit.
STATEMENT = (
    r"(?:(?:the|our|my|we|i|it|this|these|those|they) |(?:[\w']+ ){0,6}?(?:is|are|was|were|has|"
    r"have|had|needs?|needed|wants?|got|gets?|contains?|uses?|used|looks?|lacks?|deploy|ship|"
    r"moved|changed|forgot|made|broke|breaks?|fails?|doesn't|don't|isn't|aren't|no longer|"
    r"\w+'(?:s|m|re|ve)|matters?|ignores?|typo)\b)")
REASON_BEFORE = Pattern(
    r"\s*(" + STATEMENT + r"[^.!?;:\n\uf000-\uf8ff]{0,120}"
    r"|typo[^.!?;:\n\uf000-\uf8ff]{0,60})"
    r"(?:[.!;]\s+(?=\w)|,?\s+so,?\s+(?=please\b|can you\b|could you\b)|,\s+(?=please\b)|"
    r"(?<=typo):\s+|(?<=wrong):\s+|(?<=mistake):\s+)", re.IGNORECASE)
REASON_AFTER = Pattern(
    r"(?:[.!;]\s+|,?\s+(?=because\b|since\b|as (?:it|we|i|they|that)\b)|,\s+(?=it's\b|we\b|i\b))"
    r"((?:because |since |as )?(?:it|it's|they|they're|we|i|nobody|the name)\b"
    r"[^.!?;:\n\uf000-\uf8ff]{0,60}\b(?:no longer (?:needed|used|necessary|(?:need|use) (?:it|them)"
    r")|(?:need|use|uses|want) (?:it|them)(?: any ?more)?|obsolete|outdated|unused|misspelled|"
    r"misspelt|misleading|deprecated|useless|stale|out of date|garbage|junk))[.!]*\s*\Z",
    re.IGNORECASE)
NO_REASON = Pattern(
    r"\b(?:sa(?:y|ys|id)|t(?:ell|ells|old)|ask\w*|wr(?:ote|itten|ites)|reads?|request\w*|"
    r"suggest\w*|"
    r"quot\w+|follow\w*|instruct\w*|steps?|prompts?|messages?|logs?|outputs?|results?|e?mails?|"
    r"phrase|translat\w*|tasks?|exercise|homework|quiz|commands?|plan\w*|would|could|"
    r"should|must|might|maybe|perhaps|pretend\w*|imagin\w+|suppos\w+|hypothe\w+|wonder\w*|"
    r"questions?|sure|unsure|undecided|if|when|whenever|unless|once|until|before|after|later|"
    r"first|second|third|last|only|each|every|both|except|line \d+|lines|examples?|sentence|"
    r"how|why|what|which|where|who|never|nothing|not (?:want|to)|don't (?:want|do|let|touch)|"
    r"careful|backup|tested|here(?:'s| is| are)|see|below|above|recommend\w*|advi[cs]e\w*|warn\w*|"
    r"i(?: am|'m) (?!new\b|confused\b|done\b|stuck\b)\w+|i (?:was|will|did|think|guess)|i'll|you|"
    r"he|she|rules?|polic(?:y|ies)|ticket|ways?|options?|myself|already|allowed|"
    r"forbidden|thoughts?|ideas?|opinion|"
    r"(?:has|have|contains?|got|shows?) (?:this|these|that|those)|"
    r"joke|kidding|game|writing|tutorial|articles?|page|website|book|lesson|course|puzzle|"
    r"(?<!need )(?<!needs )(?:this|these|that|those)(?=\s*\Z)|according|claims?|means?|called|"
    r"please|(?:then|and|to|please|i'll|i will|you|let me) (?:" + "|".join((
        "delete", "remove", "rename", "move", "create", "make", "write", "append", "add",
        "replace", "change", "overwrite", "insert", "copy", "run")) + r"))\b", re.IGNORECASE)


def _without_reason(text: str) -> str:
    """Return a request without the statements of why around it; "" if it has none."""
    core = text.strip()
    if len(core) > 4 * MAX_REQUEST_CHARS:
        return ""
    for _ in range(2):
        before = REASON_BEFORE.match(core)
        if before is None or not _is_reason(before.group(1)):
            break
        core = core[before.end():]
    kept = _without_trailers(core)
    after = REASON_AFTER.search(kept, max(0, len(kept) - 2 * MAX_TRAILER_CHARS))
    if after is not None and after.start() and _is_reason(after.group(1)):
        core = kept[:after.start()] + "."
    return core if core != text.strip() else ""


def _is_reason(statement: str) -> bool:
    core = _freed(statement).core
    return not (ORDERS.match(core) or WANTS_ANSWER.match(core) or NO_REASON.search(statement))


def _without_trailers(core: str) -> str:
    """Take off what follows a request without changing it."""
    for _ in range(6):
        start = max(0, len(core) - MAX_TRAILER_CHARS)
        match = TRAILER.search(core, start) or (
            None if LOOKS.match(core) else PLACE.search(core, start))
        if match is None or match.start() == 0:
            break
        core = core[:match.start()]
    return core


def _freed(text: str) -> Asked:
    """Take courtesy and end marks off a masked request."""
    whole = text.strip()
    core = _without_trailers(whole)
    cut, end = core != whole, ENDING.search(core)
    if end is not None:
        core = core[:end.start()].rstrip()
    polite = POLITE_QUESTION.match(core) is not None
    for _ in range(8):
        lead = LEAD.match(core)
        if lead is None:
            break
        core = core[lead.end():]
    core = ASKED_WITH_FENCE.sub(r":\1", core)
    shown = SHOWN_FIRST.fullmatch(core)
    core = f"{shown.group(2)}: {shown.group(1)}" if shown else core
    core = PLEASE_INSIDE.sub(r"\1 ", core, count=1)
    core = NEEDED.sub("create ", core, count=1) if NEEDED.match(core) else core
    newline = FINAL_NEWLINE.search(core, max(0, len(core) - MAX_TRAILER_CHARS))
    core = core[:newline.start()] if newline else core
    return Asked(_base_form(core.strip()), end.group() if end else "", polite,
                 newline is not None, cut)


def _matched(rules: Sequence[Rule], masked: Masked, asked: Asked, scope: Scope) -> Tuple[str, Ops]:
    """Return the kind of the first rule that reads the whole text, and its operations."""
    if len(asked.core) > MAX_REQUEST_CHARS or LONG_GAP.search(asked.core):
        return "", ()
    first = FIRST_WORD.match(asked.core)
    word = first.group().lower() if first else ""
    for rule in rules:
        if word not in _first_words(rule.shape):
            continue
        match = _shape(rule.shape).fullmatch(asked.core)
        if match is None:
            continue
        found = Reading(match, masked, scope, asked)
        ops = BUILDERS[rule.kind](found, rule.kind)
        doubt = (asked.ending.startswith("?") and not asked.polite and not found.group("bare")
                 and not _only_looks(ops))
        if ops and not doubt and all(op.path or op.words for op in ops):
            if asked.newline:
                ops = tuple(op._replace(text=op.text + "\n") if op.text else op for op in ops)
            return rule.kind, ops
    return "", ()


def _asked_for(words: str, answer: Masked, scope: Scope) -> Optional[Rescue]:
    """Find what the user's words ask for by themselves."""
    for masked in _readings(words):
        asked = _freed(masked.text)
        kind, ops = _matched(RULES, masked, asked, scope)
        request = "" if ops else _without_reason(masked.text)
        if request:
            kind, ops = _matched(RULES, masked, _freed(request), scope)
        if ops and not (kind == "named" and answer.fences):
            return Rescue("asked:" + kind, ops)
        if SAYS_IT_LOOKS.search(answer.text, 0, MAX_LOOK_CHARS):
            kind, ops = _matched(QUESTIONS, masked, asked, scope)
            if ops:
                return Rescue("question:" + kind, ops)
    return None


# ------------------------------ described ------------------------------

# An answer of more characters to a request that changes nothing is an answer: reading
# one of 200,000 takes 50 to 100 ms.
MAX_LOOK_ANSWER_CHARS = 32_000
# Characters of an answer in which the model may announce that it looks.
MAX_LOOK_CHARS = 4_000
SAYS_IT_LOOKS = Pattern(
    r"\b(?:let me|let's|I'll|I will|I'm going to|I am going to|allow me to)\b[^.!?\n]{0,60}?\b"
    r"(?:look|check|read|see|open|view|inspect|examine|list|find out|show|display|review|scan|"
    r"explore|use|run|access|retrieve|get|fetch)\b|\b(?:checking|reading|looking|opening|listing|"
    r"inspecting)\b[^.!?\n]{0,40}?(?:\bnow\b|\.\.\.|\u2026)|^\s*(?:checking|reading|looking|"
    r"opening|listing)\b", re.IGNORECASE)
DECLINED = Pattern(
    r"\bI(?:'m| am) (?:sorry,? but|unable|not able|afraid|not allowed|not permitted|not sure|"
    r"not going to)\b|\bI (?:can't|cannot|can not|couldn't|could not|won't|will not|don't have|"
    r"do not have|shouldn't|should not|must decline|refuse|decline|need more|need to know|"
    r"would need|need you to|would recommend against|don't recommend|would advise against|"
    r"would suggest not|don't see|do not see|didn't)\b|\b(?:sorry, but|unfortunately|as an AI|"
    r"not possible|isn't possible|impossible|unable to|no access)\b|"
    r"\bplease (?:provide|specify|confirm|clarify|tell me|let me know (?:which|what|whether|if|"
    r"how)|share|paste|upload|choose|select|be more specific|note that I (?:can't|cannot))\b|"
    r"\blet me know (?:which|whether|what (?:you|to|content|name)|how you|if you(?:'d| would)? "
    r"(?:like|want) (?:me )?to (?:proceed|continue|go ahead|do|make|create|apply|delete|"
    r"overwrite))|\bbefore I (?:proceed|do|continue|can|make|delete)\b|\bonce you (?:confirm|"
    r"approve|provide|tell)|\bif you (?:confirm|approve|agree)|"
    r"\balready (?:exists?|contains?|has|been|there|in place|present|gone)\b|"
    r"\bnothing to (?:do|change|add)\b|\bno changes? (?:(?:is|are|was|were) )?(?:needed|required|"
    r"necessary)\b|"
    r"\b(?:is|are|would be) (?:risky|dangerous|irreversible)\b", re.IGNORECASE)
COURTESY = Pattern(r"anything else|something else|(?:need|want) (?:any )?(?:further|more)|"
                   r"help (?:you )?with|any (?:other |more )?questions|how can I (?:help|assist)",
                   re.IGNORECASE)
VERBS = ("create|make|write|build|generate|implement|add|scaffold|set ?up|develop|code|put|save|"
         "update|change|modify|fix|edit|refactor|rename|move|replace|insert|append|delete|remove|"
         "convert|translate|rewrite|configure|initiali[sz]e|init|start|draft|prepare|produce|"
         "overwrite|organi[sz]e|split|extract|bump|set|bootstrap|copy|correct|turn|get rid of|"
         "clean|port|migrate|adjust|improve|increase|decrease|enable|disable|switch|swap|include|"
         "extend|simplify|finish|complete|document|annotate|format|sort|tidy|call it|name it|"
         "give (?!me|us)")
ORDERS = Pattern("(?:" + VERBS + r"|run|execute|open|send|ls|cat|mkdir|rm|mv|cp)\b", re.IGNORECASE)
WANTS_CHANGE = Pattern(
    r"(?:\A|[.!?;:,\n][^\S\n]*|\b(?:and|then|please|to|you|also|just|now|let's|us)\s+)(?:" + VERBS
    + r")\b|\b(?:i|we)(?:'d like| would like| want| need)\b(?! (?:some )?(?:help|to |advice|"
    r"an? (?:explanation|overview|review|opinion|idea)|your|information|you to (?:explain|tell|"
    r"review|describe)))", re.IGNORECASE)
WANTS_ANSWER = Pattern(
    r"(?:how|what|why|when|where|who|which|whose|is|are|was|were|does|do|did|should|can i|may i|"
    r"could i|would it|explain|describe|tell me|review|compare|suggest|recommend|discuss|"
    r"show me (?:how|an? (?:example|sample|snippet))|give me (?:an? (?:example|sample|snippet|"
    r"tutorial|command|overview)|some|advice|the command)|teach|walk me|think|consider|outline|"
    r"brainstorm|propose|plan|any|i wonder|i'm wondering|i am wondering|help me understand|"
    r"understand|know|learn|clarify|elaborate|interpret|demonstrate|illustrate|define|answer|"
    r"i (?:want|need|would like|'d like) (?:help|to (?:know|understand|see|learn))|"
    r"summari[sz]e|imagine|suppose|analy[sz]e|evaluate|critique|assess|look|read|check|find|"
    r"print|display|search|count|list|show)\b", re.IGNORECASE)
HOW_TO = Pattern(
    r"\bhow to\b|\bhow (?:do|can|could|would|should|does) (?:i|you|we|one|someone|people)\b|"
    r"\b(?:best|right|correct|proper) way to\b|\bwhat(?:'s| is) the (?:command|syntax)\b|"
    r"\b(?:do not|don't|never|without|not)\s+(?:\w+\s+){0,2}?(?:creat\w+|writ\w+|chang\w+|edit\w*|"
    r"modif\w+|touch\w*|run\w*|execut\w+|delet\w+|mak\w+|act|sav\w+|appl\w+|do|anything|files?)\b|"
    r"\b(?:just|only)\s+(?:show|tell|explain|describe|suggest|print|give|answer)\b|"
    r"\b(?:dry run|hypothetical\w*|suppose|imagine|in theory|what if|an example of|tutorial|"
    r"in the chat|in chat|as text|paste it here|one-?liner)\b", re.IGNORECASE)
CONDITION = Pattern(
    r"(?:\A|[.,;!\n][^\S\n]*|\b(?:but|and|only)\s+)(?:if|unless|when|once|in case|provided|"
    r"as soon as|whenever)\b|\bif (?:it|they|there|the file|not|needed|necessary|possible|you)\b|"
    r"\bunless\b", re.IGNORECASE)
SHELL_WANTED = Pattern(
    r"\b(?:bash|shell|sh|zsh|terminal|install(?:ation)?|setup|deploy\w*|build)\s+(?:script|"
    r"commands?)\b|(?<!python )(?<!node )(?<!js )(?<!javascript )(?<!ruby )(?<!perl )(?<!php )"
    r"\bscripts?\b|\b(?:the|a|some|which|what) commands?\b|\bcommands? (?:to|for|that|i)\b|"
    r"\.(?:sh|bash)\b", re.IGNORECASE)
# A description of several ways to do it is not one plan.
ALTERNATIVES = Pattern(r"\b(?:option|alternative|approach|method|variant) (?:#?[12ab]|one|two)\b|"
                       r"\balternatively\b|\bor,? you (?:can|could)\b|\btwo (?:ways|options)\b",
                       re.IGNORECASE)
EDITING = Pattern(
    r"(?:fix|update|modify|refactor|edit|change|improve|optimi[sz]e|debug|correct|extend|"
    r"add\b.*\b(?:to|in|into)|document|clean|adjust|convert|translate|simplify|format|remove|"
    r"replace|rename|make)\b",
    re.IGNORECASE)
NEW_FILE = Pattern(r"\b(?:create|new|called|named|generate|scaffold)\b|\ba \S+ file\b",
                   re.IGNORECASE)
OVERWRITE = Pattern(r"\b(?:overwrite|rewrite|regenerate)\b|"
                    r"\breplace the (?:whole |entire )?(?:contents?|file)\b", re.IGNORECASE)
MODEL_SPEAKS = Pattern(
    r"\s*(?:[-*>]\s+|\d{1,3}[.)]\s+|step \d{1,2}\s*[:.)-]\s*)?"
    r"(?:(?:sure|sure thing|okay|ok|great|certainly|of course|alright|done|now|next|first|then|"
    r"finally|so|and|also|no problem|absolutely|got it|understood|yes|to [^,.\n]{1,60})"
    r"[,.!:;]*\s+){0,3}(?:(?:I'll|I will|I'm going to|I am going to|I've|I have|I just|I|we'll|"
    r"we will|let me|let's|allow me to|I need to)\s+(?:(?:now|just|also|then|first|next|go ahead "
    r"and|proceed to|proceed and|successfully|quickly|start by|begin by|need to)\s+){0,3}|"
    r"(?=(?:created|renamed|moved|deleted|removed|appended|added|replaced|inserted|wrote|copied|"
    r"changed|reading|listing|checking|opening|renaming|creating|deleting|appending|replacing|"
    r"moving|inserting)\b))", re.IGNORECASE)
SENTENCE_STOP = Pattern(r"(?<=[.!?])\s+|\n+")
FENCE_AFTER_COLON = Pattern("[:.][ \t\r\n]+(?=[\uf000-\uf8ff])")
ONE_FENCE = Pattern("[\uf000-\uf8ff]")
ELIDED = Pattern(
    r"^[ \t]*(?:(?:#|//|/\*+|<!--|--|;|%|\*|\{/\*|\"\"\")?[ \t]*(?:\[|\(|<|\{)?(?:\.{3}|\u2026)|"
    r"(?:#|//|/\*+|<!--|--|;|%|\{/\*)[^\n]{0,120}?(?:\bexisting\b|\brest of\b|\bunchanged\b|"
    r"\bremain(?:s|ing|der)?\b|\bsame as\b|\bas before\b|\bomitted\b|\bother (?:code|imports?|"
    r"functions?|methods?|lines?|content)\b|\byour (?:code|logic|content)\b|\bprevious (?:code|"
    r"content)\b|\bcode here\b|\bgoes here\b|\btruncated\b|\bsnip\b|\.{3}|\u2026)|"
    r"[\[(<](?:existing|rest|remaining|previous|unchanged|insert|your)\b)",
    re.IGNORECASE | re.MULTILINE)
PLACEHOLDER = Pattern(r"(?:.*/)?(?:path/to/.*|your[_-].*|my[_-]?file\.\w+|file_?name(?:\.\w+)?)|"
                      r".*(?:path/to/|/your[_-]).*", re.IGNORECASE)
LABEL_WORD = Pattern(
    r"\b(?:I'll|I will|let me|let's|I've|I have|I'm going to|here(?:'s| is| are)|below is|creat\w+|"
    r"writ\w+|sav\w+|wrote|contents?|files?|contains|called|named|next|then|now|finally|"
    r"following|also|"
    r"and)\b",
    re.IGNORECASE)
NO_LABEL = Pattern(
    r"\b(?:run|running|usage|use|using|output|outputs|prints?|example|install\w*|execut\w+|test it|"
    r"looks? like|before|original|old|currently|current|would|could|should|might|append\w*|"
    r"prepend\w*|insert\w*|updat\w+|modif\w+|chang\w+|replac\w+|edit\w*|remov\w+|delet\w+|fix\w*|"
    r"snippet|part|section|function|method|excerpt|relevant|lines?|diff|error|imports?|see|"
    r"add [^:]{0,60}\b(?:to|in)|adding|added|structure|verify|check|instead|not|don't|"
    r"uses|used|how|why|similar|from|if|when|unless|exist\w*)\b",
    re.IGNORECASE)
WHOLE_FILE = Pattern(r"\b(?:complete|full|entire|whole)\b", re.IGNORECASE)
FILE_WORD = Pattern(r"^\s*(?:(?:file|filename|file name|path|name)\s*:)", re.IGNORECASE)
MAKES_FILE = Pattern(
    r"\s*(?:(?:sure|certainly|okay|ok|great|of course|absolutely|first|next|then|now|done|finally)"
    r"[,.!:]*\s+){0,3}(?:(?:I'll|I will|let me|I've|I have|I|I'm going to|let's|we'll)\s+)?"
    r"(?:now\s+|also\s+)?(?:(?:creat|writ|sav|generat|mak)\w*|made|wrote|start (?:with|by)|"
    r"here(?:'s| is)|(?:below|this) is)\b",
    re.IGNORECASE)
# "a test for app.py" is another file; "the code for app.py" is that one.
FOR_FILE = Pattern(r"(?<!code )(?<!contents )(?<!content )(?<!source )(?<!implementation )"
                   r"(?<!file )(?<!script )\bfor(?: the| your)?\W{0,3}\Z", re.IGNORECASE)
NOT_AFTER = Pattern(
    r"\b(?:looks? like|before|currently|outputs?|error|snippet|parts?|excerpt|lines?|section|"
    r"should|would|could|might|not|don't|changes?|updated?|if|unless|when you|with the following "
    r"changes?|from)\b", re.IGNORECASE)
HEADING = Pattern(r"\s*(?:#{1,6}\s|\*\*|\d{1,3}[.)]\s)")
LABEL_NAMES = Pattern("[\ue000-\uefff]|\\w\\.\\w")
LABEL_DECOR = Pattern(r"^[\s#>*-]*(?:\d{1,3}[.)]\s*)?|[\s*:#=-]+$")
LABEL_PATH = Pattern("[\ue000-\uefff]|[^\\s,;:\"'`<>|*?()\\[\\]{}$&!\\\\\ue000-\uf8ff]+")
COMMENT_PATH = Pattern(r"[ \t]*(?:#|//|--|;|%|/\*|<!--)[ \t]*(?:file(?:name)?:[ \t]*)?"
                       r"([^\s*]+)[ \t]*(?:\*/|-->)?[ \t]*\r?")
INFO_PATH = Pattern(r"(?:[\w+-]+(?:[: ]|[: ]\s*(?:title|file|filename)=))?"
                    r"[\"']?([^\s\"'=:]+)[\"']?")
NAME_IN_WORDS = Pattern("[^\\s,;:\"'`<>|()\u2018-\u201e]+")


def _declined(text: str) -> bool:
    """Tell whether the model refused, had nothing to do, or asked back."""
    if DECLINED.search(text):
        return True
    mark = text.find("?")
    while mark >= 0:
        question = text[max(0, mark - 160):mark]
        question = question[max(question.rfind(sign) for sign in ".!?\n") + 1:]
        ends = mark + 1 == len(text) or not text[mark + 1].isalnum()
        if ends and not COURTESY.search(question):
            return True
        mark = text.find("?", mark + 1)
    return False


class Wishes(NamedTuple):
    """What the newest words allow the model's own description to do."""

    words: str
    change: bool
    look: bool
    overwrite: bool
    shell: bool
    edit: bool


def _wishes(words: str) -> Wishes:
    masked = _mask(words, CLOSING)
    text = _freed(masked.text).core if masked else ""
    text = text[:20_000]
    how_to = not text or HOW_TO.search(text) is not None
    change = (not how_to and WANTS_ANSWER.match(text) is None
              and CONDITION.search(text) is None and WANTS_CHANGE.search(text) is not None)
    return Wishes(words, change, not how_to, OVERWRITE.search(text) is not None,
                  SHELL_WANTED.search(text) is not None,
                  EDITING.match(text) is not None and NEW_FILE.search(text) is None)


def _names(words: str, path: str) -> bool:
    """Tell whether the user's words name a path, or its last part alone."""
    base = path.rsplit("/", 1)[-1]
    if " " in path:
        return path in words
    named = {token.rstrip(".!?") for token in NAME_IN_WORDS.findall(words)}
    return not named.isdisjoint((path, "./" + path, base))


def _file_text(fence: Fence) -> bool:
    """Tell whether a fence can be a whole file."""
    return (fence.whole and fence.info.lower() not in ("diff", "patch", "output", "log")
            and ELIDED.search(fence.text) is None)


def _is_shell(fence: Fence) -> bool:
    return fence.info.lower() in SHELL_INFO or (
        not fence.info and fence.text.lstrip().startswith(("mkdir ", "cat >", "touch ", "$ ")))


def _label_path(label: str, masked: Masked, scope: Scope) -> str:
    """Return the one path that the line before a fence names as the file that follows."""
    line = LABEL_DECOR.sub("", label.replace("**", ""))
    tokens = {match.group(): masked.value(match.group()) if PRIVATE_USE.match(match.group())
              else match.group().rstrip(".") for match in LABEL_PATH.finditer(line[:300])}
    named = {token: raw for token, raw in tokens.items()
             if FILE_NAME.fullmatch(raw) and not NOT_FILES.fullmatch(raw)
             and not PLACEHOLDER.fullmatch(raw)}
    if len(set(named.values())) != 1:
        return ""
    token, raw = next(iter(named.items()))
    rest = FILE_WORD.sub("", line.replace(token, " "))
    ends = label.rstrip().rstrip("*_").endswith(":") or not rest.strip("*_ ()#:.")
    makes = MAKES_FILE.match(line[:line.find(token)]) is not None
    introduces = makes or not rest.strip("*_ ()#:.") or LABEL_WORD.search(rest) is not None
    # What a new file will do, "that prints ...", may be said after its name.
    before, after = line.split(token, 1)
    unfit = WHOLE_FILE.search(rest) is None and (
        NO_LABEL.search(before) or FOR_FILE.search(before)
        or (NOT_AFTER if makes else NO_LABEL).search(after))
    heading = line.lstrip("`").startswith(token) and (
        rest.strip("*_` ")[:1] in ("", "-", ":", "(", "\u2013", "\u2014") or len(rest.split()) <= 1)
    if not (ends or heading or makes) or not (introduces or heading) or unfit:
        return ""
    return _safe_path(raw, scope)


def _fence_path(fence: Fence, label: str, masked: Masked, scope: Scope) -> str:
    """Return the file that a fence is, by the line before it, its info or its first line."""
    path = _label_path(label, masked, scope) if label else ""
    if path:
        return path
    first = COMMENT_PATH.fullmatch(fence.text.split("\n", 1)[0])
    info = INFO_PATH.fullmatch(fence.info)
    for found in (info, first):
        raw = found.group(1) if found else ""
        if FILE_NAME.fullmatch(raw) and not NOT_FILES.fullmatch(raw) and (
                not label or not NO_LABEL.search(label)):
            return _safe_path(raw, scope)
    return ""


def _shown_files(masked: Masked, wishes: Wishes, scope: Scope) -> Ops:
    """Return a file for each fence that the answer names as one, and what scaffolds do."""
    found: Dict[str, FileOp] = {}
    folders: List[FileOp] = []
    label = heading = ""
    for line in masked.text.split("\n"):
        mark = ONE_FENCE.fullmatch(line.strip())
        if mark is None:
            label = line if line.strip() else label
            names = LABEL_NAMES.search(line) and (HEADING.match(line) or MAKES_FILE.match(line))
            heading = line if names else heading
            continue
        fence = masked.fences[ord(mark.group()) - FENCE_BASE]
        plain = not LABEL_NAMES.search(label) and not NO_LABEL.search(label)
        path = _fence_path(fence, label, masked, scope) or (
            _fence_path(fence, heading, masked, scope) if plain and heading else "")
        shell = _is_shell(fence) and not path.endswith((".sh", ".bash"))
        if shell:
            ops = _scaffold_ops(fence.text, scope, False)
            folders += [op for op in ops if op.kind == "mkdir"]
        elif path and (not _file_text(fence) or path in found
                       or (wishes.edit and _names(wishes.words, path))):
            return ()
        elif path:
            found[path] = FileOp("write" if wishes.overwrite else "create", path, fence.text)
        label = heading = ""
    return (*folders, *found.values()) if found else ()


def _scaffold(masked: Masked, wishes: Wishes, scope: Scope) -> Ops:
    """Return what the answer's shell blocks build; a later block that only runs is left."""
    ops: List[FileOp] = []
    for fence in masked.fences:
        if not _is_shell(fence) or not fence.whole:
            return ()
        made = _scaffold_ops(fence.text, scope, wishes.overwrite)
        if not made:
            return tuple(ops) if ops and RUN_ONLY.match(fence.text) else ()
        for op in made:
            _fold(ops, op, wishes.overwrite)
    return tuple(ops)


RUN_ONLY = Pattern(r"\s*(?:\$ )?(?:python3?|node|npm (?:start|test|run)|cd|ls|tree|cat|bash|go run|"
                   r"cargo run|pytest|flask run) ?[\w./ -]*\s*\Z")


def _sentences(masked: Masked) -> List[str]:
    """Return the sentences of an answer in which the model says what it does."""
    text = FENCE_AFTER_COLON.sub(": ", masked.text.replace("**", ""))
    found: List[str] = []
    for sentence in SENTENCE_STOP.split(text):
        lead = MODEL_SPEAKS.match(sentence)
        if lead is not None and len(found) < MAX_SENTENCES:
            found.append(sentence[lead.end():])
    return found


def _described(masked: Masked, wishes: Wishes, scope: Scope) -> Ops:
    """Return the operations that the model's sentences describe exactly."""
    ops: List[FileOp] = []
    for sentence in _sentences(masked):
        if any(not _file_text(masked.fences[ord(mark) - FENCE_BASE])
               for mark in ONE_FENCE.findall(sentence)):
            return ()
        end = ENDING.search(sentence)
        core = _base_form(sentence[:end.start()].rstrip() if end else sentence).strip()
        kind, made = _matched(RULES, masked, Asked(core, ""), scope)
        vague = (core.startswith("add ") and not END_NAMED.search(core)
                 and any(op.kind == "append" for op in made))
        if vague or kind in ("run", "named") or not all(_allowed(op, wishes) for op in made):
            continue
        ops += [op for op in (_unforced(op, wishes) for op in made) if op not in ops]
    looks = [op for op in ops if op.kind in ("read", "list")]
    if looks:
        return tuple(looks) if ops[0] in looks else ()
    return tuple(ops)


def _unforced(op: FileOp, wishes: Wishes) -> FileOp:
    """Let the model replace a whole file only where the user said so."""
    return op._replace(kind="create") if op.kind == "write" and not wishes.overwrite else op


def _allowed(op: FileOp, wishes: Wishes) -> bool:
    """Tell whether the user's words ask for such an operation at all."""
    if PLACEHOLDER.fullmatch(op.path):
        return False
    if op.kind in ("read", "list"):
        return wishes.change or (wishes.look and (
            _names(wishes.words, op.path) or ABOUT_PROJECT.search(wishes.words) is not None))
    return wishes.change and (op.kind != "delete" or _names(wishes.words, op.path))


def _looked_at(masked: Masked, words: str, scope: Scope) -> Ops:
    """Return a read of the one file that a question names, if the model says it looks."""
    asked = _mask(words, CLOSING)
    if asked is None or not SAYS_IT_LOOKS.search(masked.text, 0, MAX_LOOK_CHARS):
        return ()
    core = _freed(asked.text).core
    if not WANTS_ANSWER.match(core) or CONDITION.search(core) or len(core) > MAX_REQUEST_CHARS:
        return ()
    named = {raw for raw in (asked.value(token) if PRIVATE_USE.match(token) else token.rstrip(".")
                             for token in LABEL_PATH.findall(core))
             if FILE_NAME.fullmatch(raw) and not NOT_FILES.fullmatch(raw)}
    path = _safe_path(named.pop(), scope) if len(named) == 1 else ""
    return (FileOp("read", path),) if path else ()


def _requested_command(masked: Masked, words: str) -> Ops:
    """Return the one read-only command in the answer that the user asked to be run."""
    fences = masked.fences
    if len(fences) != 1 or fences[0].info.lower() not in ("", *SHELL_INFO) or not fences[0].whole:
        return ()
    command = _read_only(fences[0].text.replace("$ ", "", 1) if fences[0].text.startswith("$ ")
                         else fences[0].text)
    named = " ".join(command[:2] if command[:1] == ("git",) else command[:1])
    wanted = named and re.search(rf"\b(?:run|execute|use)\b.{{0,40}}\b{re.escape(named)}\b", words)
    return (FileOp("run", words=command),) if wanted else ()


ABOUT_PROJECT = Pattern(r"\b(?:project|repo|repository|code|codebase|files?|folder|directory|here|"
                        r"bug|error|tests?|(?:fail|crash)\w*|(?:the|this|my|our) (?:\w+ )?"
                        r"(?:build|function|class|module|app|server|script|program|config\w*|"
                        r"package|version))\b", re.IGNORECASE)
# Sentences of one answer that are read; more are no plan but prose.
MAX_SENTENCES = 40


def _told(words: str, masked: Masked, scope: Scope) -> Optional[Rescue]:
    """Find what the model described instead of calling a tool."""
    wishes = _wishes(words)
    if ALTERNATIVES.search(masked.text):
        return None
    sources: List[Tuple[str, Callable[[], Ops]]] = []
    if wishes.change:
        sources.append(("files", lambda: _shown_files(masked, wishes, scope)))
    if wishes.change and not wishes.shell:
        sources.append(("scaffold", lambda: _scaffold(masked, wishes, scope)))
    if wishes.change or wishes.look:
        sources += [("described", lambda: _described(masked, wishes, scope)),
                    ("look", lambda: _looked_at(masked, words, scope)),
                    ("command", lambda: _requested_command(masked, words))]
    for rule, source in sources:
        ops = source()
        if ops:
            return Rescue("told:" + rule, ops)
    return None


# ------------------------------ the whole ------------------------------


def find_rescue(
    turns: Sequence[Message], answer: str, *, home_ok: bool = True
) -> Optional[Rescue]:
    """Return what the newest request still needs, or None when in doubt.

    turns is the conversation without the system prompt, answer the visible text of a
    turn that ended normally and called no tool. home_ok lets the user's own words
    name a path below ~/. The caller knows whether a shell tool may be called.
    """
    words, notices = _request_of(turns), _notices(turns)
    if len(answer) > MAX_LOOK_ANSWER_CHARS and not _wishes(words).change:
        return None
    masked = _mask(PRIVATE_USE.sub(" ", answer), CLOSING, one_line=True)
    if not words or not answer.strip() or masked is None or _plan_mode(notices):
        return None
    if _declined(masked.text):
        return None
    cwd = working_directory(notices)
    rescue = _asked_for(words, masked, Scope(home_ok, cwd))
    if rescue is None and PRIVATE_USE.search(answer) is None:
        rescue = _told(words, masked, Scope(False, cwd, True))
    if rescue is None or (_served(turns, _request_of(turns)) and not _only_looks(rescue.ops)):
        return None
    return rescue


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
    raise ForbiddenError(
        "Auto mode's safety check is not answered by a local model. Start claude with"
        " --permission-mode default, acceptEdits or plan.")


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
    blocks = [block for message in request.messages for block in message.blocks]
    texts = [*request.system, *map(to_json, request.tools)]
    texts += [to_json(block.input) if isinstance(block, ToolUse) else getattr(block, "text", "")
              for block in blocks]
    images = sum(isinstance(block, Image) + len(getattr(block, "images", ())) for block in blocks)
    return sum(map(estimate_tokens, texts)) + images * IMAGE_TOKENS + 5 * len(request.messages)


# ============================== 13. TURN ==============================

class StopScanner:
    """Find the first stop sequence in text that comes in pieces.

    feed() returns the text that is certain and the sequence that was met, if any.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._begin = {stop[0] for stop in stops}
        self._held = ""

    def feed(self, text: str) -> Tuple[str, Optional[str]]:
        if not self._held and self._begin.isdisjoint(text):
            return text, None  # nearly every token
        text, stop, rest = split_at(self._held + text, self._stops)
        self._held = "" if stop else rest
        return text, stop or None

    def close(self) -> str:
        held, self._held = self._held, ""
        return held


# Tokens beyond what the shown characters can account for until an answer counts as
# swallowed: a Qwen token holds 1.7 Chinese characters or 4 of code (OL 5a), and small
# differences are white space that Ollama's parsers drop.
LOST_TOKENS = 64
LOST_RATIO = 2.0
CHARS_PER_TOKEN_LEAST = 1.5

NOTHING_SHOWN = (
    "The model {model} ended its answer without any text or tool call ({tokens} tokens were"
    " generated). Ollama's parser may have dropped a malformed tool call; SHIM_VERBATIM=on reads"
    " the model's own text instead. Otherwise ask again in other words.")
SWALLOWED = (
    "Ollama dropped the greater part of the answer of {model}: {tokens} tokens were generated,"
    " about {shown} arrived. A malformed tool call does this; SHIM_VERBATIM=on reads the model's"
    " own text instead.")
CUT_BEFORE_ANYTHING = (
    "The answer of {model} was cut at its length limit before anything could be shown: the context"
    " window or max_tokens is too small for this conversation.")


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
        self._scanner = StopScanner([*stops, *self._ends])
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
                text, stop = self._scanner.feed(part.text)
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
        self._show(self._parser.feed(self._scanner.close()))
        self._show(self._parser.close(reason))

    def _show(self, deltas: List[Delta]) -> None:
        """Pass deltas on; white space that would open a block of its own waits."""
        kept: List[Delta] = []
        for delta in deltas:
            if isinstance(delta, TextDelta):
                in_text = self._translator.open == "text"
                text = delta.text if in_text else self._blank + delta.text
                self._blank = "" if in_text or text.strip() else text
                if not self._blank:
                    self._text.append(text)
                    self._shown_chars += len(text)
                    kept.append(TextDelta(text))
                continue
            self._blank = ""
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
            words = CUT_BEFORE_ANYTHING if finish.reason == "length" else NOTHING_SHOWN
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
    unknown. way is chat, verbatim or local (answered without the model). rescue names
    the rule that made the call, rescue_outcome what came of it. outcome is "ok",
    "client left" or a kind of error; notes are sentences such as what broke the prefix;
    left_out names tools and passages that the model was not shown.
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


CLIENT_LEFT = "client left"
# Kinds that are Ollama's failures, not the client's or our own.
UPSTREAM_KINDS = Pattern(r"upstream_|model_missing|rate_limit")
CAPITAL = Pattern(r"(?<=[a-z])(?=[A-Z])")
# What helps where the error's own sentence does not say it.
CURES: Tuple[Tuple[Type[ShimError], str], ...] = (
    (PromptTooLongError, "Type /compact, or give the model a larger OLLAMA_NUM_CTX."),
    (UnauthorizedError, "Give the client the key of SHIM_API_KEY."),
    (UpstreamDeniedError, "Check OLLAMA_AUTH_TOKEN."),
    (UpstreamTimeoutError, "See `ollama ps`: the model may be too large for this machine."
                           " SHIM_REQUEST_TIMEOUT_MS allows more time."),
    (UpstreamBrokenError, "See Ollama's log; `python qwencode.py doctor` checks the model."),
    (UpstreamFailedError, "See Ollama's log; `python qwencode.py doctor` checks the model."),
    (BusyError, "Wait for the running requests, or raise SHIM_MAX_CONCURRENT."),
)


def outcome_of(error: ShimError) -> str:
    """Name an error's kind: UpstreamTimeoutError is upstream_timeout."""
    return CAPITAL.sub("_", type(error).__name__.replace("Error", "")).lower()


def cure_of(error: ShimError) -> str:
    """Say what helps against an error, "" where its sentence says it."""
    return next((cure for kind, cure in CURES if isinstance(error, kind)), "")


class Running:
    """A request at work: its state is waiting, prefill or writing."""

    __slots__ = ("model", "session", "since", "state", "state_since", "tokens")

    def __init__(self, session: str, model: str, state: str, now: float) -> None:
        self.session, self.model, self.state = session, model, state
        self.since = self.state_since = now
        self.tokens = 0


class Histogram:
    """Counts of observations at or below each bound, as Prometheus wants them."""

    def __init__(self, bounds: Tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count value; anything but a number from 0 up is left out."""
        if 0 <= value < float("inf"):
            self.counts[bisect_left(self.bounds, value)] += 1
            self.total += value


def bump(counter: Dict[str, int], key: str, by: int = 1) -> None:
    """Add to a counter whose keys may come from outside; their number is bounded."""
    key = clean(key, MAX_LABEL_CHARS) or "unknown"
    if key not in counter and len(counter) >= MAX_LABELS:
        key = "other"
    counter[key] = counter.get(key, 0) + by


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
        self.requests: Dict[str, int] = {"ok": 0}
        self.rescues: Dict[str, int] = {}
        self.upstream_errors: Dict[str, int] = {}
        self.tokens = {"prompt": 0, "cached": 0, "output": 0}
        self.first_token = Histogram(FIRST_TOKEN_BOUNDS_S)
        self.per_token = Histogram(PER_TOKEN_BOUNDS_S)

    def begin(self, key: Any, session: str, model: str, now: float,
              state: str = "prefill") -> None:
        """Note a request; state "waiting" for one that has no slot yet."""
        with self.lock:
            self.active[key] = Running(session, model, state, now)

    def progress(self, key: Any, now: float, tokens: int = 0, state: str = "writing") -> None:
        """Note how far a request is: its state and the tokens written so far."""
        running = self.active.get(key)
        if running is None:
            return
        running.tokens = tokens
        if running.state != state:
            running.state, running.state_since = state, now

    def end(self, key: Any, record: TurnRecord) -> None:
        """Note how a request ended; one that never began counts as well."""
        with self.lock:
            self.active.pop(key, None)
            bump(self.requests, record.outcome)
            self._count(record)
            self.turns.append(record)
            if record.rescue:
                self.rescued.append(record)
            if record.outcome not in ("ok", CLIENT_LEFT):
                self.failed.append(record)
            if record.prompt_tokens and record.way != "local":
                self._keep_session(record)

    def settle(self, session: str, calls: Sequence[str], request: Request) -> None:
        """Learn what came of a session's rescued calls, by id, from the next request."""
        results = [block for message in request.messages[-2:] for block in message.blocks
                   if isinstance(block, ToolResult) and block.id in calls]
        if not results:
            return
        outcome = "failed" if any(block.is_error for block in results) else "worked"
        with self.lock:
            for index in range(len(self.rescued) - 1, -1, -1):
                record = self.rescued[index]
                if record.session == session:
                    self.rescued[index] = record._replace(rescue_outcome=outcome)
                    return

    def _count(self, record: TurnRecord) -> None:
        for rule in filter(None, record.rescue.split(",")):
            bump(self.rescues, rule)
        if record.outcome not in ("ok", CLIENT_LEFT) and UPSTREAM_KINDS.search(record.outcome):
            bump(self.upstream_errors, record.outcome)
        self.tokens["prompt"] += record.prompt_tokens
        self.tokens["cached"] += record.cached_tokens
        self.tokens["output"] += record.output_tokens
        if record.first_s is not None and record.way != "local":
            self.first_token.observe(record.first_s)
        if record.tokens_per_s > 0:
            self.per_token.observe(1 / record.tokens_per_s)

    def _keep_session(self, record: TurnRecord) -> None:
        """Make this the newest session; the one that was idle longest gives way."""
        self.sessions.pop(record.session, None)
        self.sessions[record.session] = record
        if len(self.sessions) > SHOWN_SESSIONS:
            del self.sessions[next(iter(self.sessions))]


# ------------------------------ log lines ------------------------------

COLOURS = {"ok": "32", CLIENT_LEFT: "33", "warn": "33"}
ERROR_COLOUR = "31"
# Share of the window from which a turn's line says what is left.
WINDOW_WARN_SHARE = 0.8


def shown_text(text: str, secrets: Iterable[str] = ()) -> str:
    """Make foreign text one clean line without secrets or the login of a URL."""
    return clean(URL_LOGIN.sub("://", redact(text, secrets)))


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
    return f"{token_text(used_tokens(record))}{window} tokens{told}"


def used_tokens(record: TurnRecord) -> int:
    """Count what the next turn starts from: the prompt and its answer."""
    return record.prompt_tokens + record.output_tokens


def left_text(record: TurnRecord) -> str:
    """Warn of a window that is nearly full."""
    used = used_tokens(record)
    if not record.window or used < record.window * WINDOW_WARN_SHARE:
        return ""
    left = max(0, record.window - used)
    return f"{100 * used // record.window}% of the window used, {token_text(left)} left"


def pace_texts(record: TurnRecord) -> List[str]:
    """Say how long reading took, when the first token came and the speed after it."""
    texts = []
    if record.prefill_s:
        texts.append(f"prefill {record.prefill_s:.1f}s")
    if record.first_s is not None:
        texts.append(f"first {record.first_s:.1f}s")
    if record.tokens_per_s:
        texts.append(f"{record.tokens_per_s:.0f} tok/s")
    return texts


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
    second = int(record.started + record.total_s + utc_offset_s) % 86400
    at = f"{second // 3600:02}:{second // 60 % 60:02}:{second % 60:02}"
    parts = [f"{at} turn {record.turn}" if record.turn else at,
             f"answered here ({record.model})" if record.way == "local" else fill_text(record),
             *pace_texts(record), tools_text(record),
             record.way if record.way in ("verbatim", "joined") else ""]
    line = "  ".join(shown_text(part, secrets) for part in parts if part)
    code = COLOURS.get(record.outcome, ERROR_COLOUR)
    line += "  " + paint(shown_text(record.outcome), code, colour)
    if record.error:
        line += f": {shown_text(record.error, secrets)} {shown_text(record.cure, secrets)}".rstrip()
    for note in filter(None, (left_text(record), *record.notes)):
        line += "  " + paint(shown_text(note, secrets), COLOURS["warn"], colour)
    return line


def turn_fields(record: TurnRecord, secrets: Iterable[str] = ()) -> Json:
    """Return a turn as plain JSON values, cleaned for any reader."""
    hidden = tuple(secrets)
    fields: Json = {}
    for name, value in record._asdict().items():
        if isinstance(value, str):
            fields[name] = shown_text(value, hidden)
        elif isinstance(value, tuple):
            fields[name] = [shown_text(item, hidden) for item in value]
        else:
            fields[name] = round(value, 3) if isinstance(value, float) else value
    return fields


def turn_json(record: TurnRecord, secrets: Iterable[str] = ()) -> str:
    """Write a turn as one line of JSON for `--log-format json`."""
    ended = round(record.started + record.total_s, 3)
    return json.dumps({"event": "turn", "time": ended, **turn_fields(record, secrets)})


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
    return f"{now[same].name}: {again:,} tokens read again" if again >= LEAST_REREAD else ""


# ------------------------------ status as JSON ------------------------------

# Not shown: where it listens, which the reader knows, and a path of the user's.
HIDDEN_OPTIONS = ("host", "port", "counts_file")


def shown_options(config: Config) -> Json:
    """Return the options that are no secret; two shims with the same do the same."""
    return {row.name: scrub(getattr(config, row.name), secrets_of(config)) for row in OPTIONS
            if row.kind != "secret" and row.name not in HIDDEN_OPTIONS}


def running_fields(running: Running, now: float) -> Json:
    """Describe a request at work."""
    state_s = max(0.0, now - running.state_since)
    writes = running.state == "writing" and state_s > 0
    return {
        "session": clean(running.session), "model": clean(running.model), "state": running.state,
        "seconds": round(max(0.0, now - running.since), 1), "state_seconds": round(state_s, 1),
        "tokens": running.tokens,
        "tokens_per_s": round(running.tokens / state_s, 1) if writes else 0.0,
    }


def session_fields(record: TurnRecord) -> Json:
    """Describe a session by its last turn: what its window holds and what is left."""
    used = used_tokens(record)
    return {
        "session": clean(record.session), "model": clean(record.model), "turn": record.turn,
        "used": used, "window": record.window,
        "left": max(0, record.window - used) if record.window else None,
        "last": record.started + record.total_s,
        "left_out": [clean(name) for name in record.left_out],
    }


def scrub(value: Any, secrets: Tuple[str, ...]) -> Any:
    """Make every string of a JSON value fit to be shown."""
    if isinstance(value, dict):
        return {clean(str(key)): scrub(item, secrets) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [scrub(item, secrets) for item in value]
    return shown_text(value, secrets) if isinstance(value, str) else value


def status_json(stats: Stats, config: Config, health: Json, now: float) -> Json:
    """Return what the page at `/` shows; newest turns first, times in epoch seconds.

    health is what `/health` answers. Prompts and answers are never in it.
    """
    secrets = secrets_of(config)
    with stats.lock:
        active = [running_fields(one, now) for one in stats.active.values()]
        sessions = [session_fields(one) for one in reversed(list(stats.sessions.values()))]
        lists = [list(one) for one in (stats.turns, stats.rescued, stats.failed)]
        counters = {"requests": dict(stats.requests), "rescues": dict(stats.rescues),
                    "upstream_errors": dict(stats.upstream_errors), "tokens": dict(stats.tokens)}
    turns, rescues, errors = (
        [turn_fields(one, secrets) for one in reversed(records)] for records in lists)
    return {
        "version": __version__, "now": round(now, 3), "uptime_s": round(now - stats.started, 1),
        "health": scrub(health, secrets),
        "options": shown_options(config),
        "running": [one for one in active if one["state"] != "waiting"],
        "waiting": [one for one in active if one["state"] == "waiting"],
        "sessions": sessions, "turns": turns, "rescues": rescues, "errors": errors,
        "counters": counters,
    }


# ------------------------------ Prometheus ------------------------------


class Metric(NamedTuple):
    """One metric family: samples are (suffix and labels, value)."""

    name: str
    kind: str
    help: str
    samples: List[Tuple[str, float]]


def labels(**values: str) -> str:
    """Write a label set; backslash, quote and line end are escaped."""
    pairs = []
    for name, value in values.items():
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        pairs.append(f'{name}="{escaped}"')
    return "{" + ",".join(pairs) + "}"


def by_label(label: str, counter: Dict[str, int]) -> List[Tuple[str, float]]:
    """Return a counter's samples."""
    return [(labels(**{label: key}), count) for key, count in sorted(counter.items())]


def histogram_samples(histogram: Histogram) -> List[Tuple[str, float]]:
    """Return the cumulative buckets, the sum and the count."""
    samples: List[Tuple[str, float]] = []
    seen = 0
    for bound, count in zip((*histogram.bounds, None), histogram.counts):
        seen += count
        samples.append(("_bucket" + labels(le="+Inf" if bound is None else f"{bound:g}"), seen))
    return [*samples, ("_sum", histogram.total), ("_count", seen)]


def metrics_of(stats: Stats, config: Config) -> List[Metric]:
    """Gather the families in the order in which they are printed."""
    states = [one.state for one in list(stats.active.values())]
    waiting = states.count("waiting")
    info = labels(version=__version__, model=clean(config.model))
    return [
        Metric("info", "gauge", "What runs here; always 1.", [(info, 1)]),
        Metric("start_time_seconds", "gauge", "Start of the shim, in epoch seconds.",
               [("", stats.started)]),
        Metric("requests_total", "counter", "Requests for messages by outcome.",
               by_label("outcome", stats.requests)),
        Metric("requests_running", "gauge", "Requests at work.", [("", len(states) - waiting)]),
        Metric("requests_waiting", "gauge", "Requests that wait for a place.", [("", waiting)]),
        Metric("rescues_total", "counter", "Tool calls made from text or a request, by rule.",
               by_label("rule", stats.rescues)),
        Metric("upstream_errors_total", "counter", "Failures of Ollama by kind.",
               by_label("kind", stats.upstream_errors)),
        Metric("prompt_tokens_total", "counter", "Tokens of prompts, cached ones included.",
               [("", stats.tokens["prompt"])]),
        Metric("cached_prompt_tokens_total", "counter", "Tokens of prompts not read again.",
               [("", stats.tokens["cached"])]),
        Metric("output_tokens_total", "counter", "Tokens written by the model.",
               [("", stats.tokens["output"])]),
        Metric("time_to_first_token_seconds", "histogram",
               "From the request to the first token.", histogram_samples(stats.first_token)),
        Metric("time_per_output_token_seconds", "histogram",
               "Mean time for a token after the first, one observation a turn.",
               histogram_samples(stats.per_token)),
    ]


def metrics_text(stats: Stats, config: Config) -> str:
    """Write the Prometheus text format, version 0.0.4."""
    with stats.lock:
        families = metrics_of(stats, config)
    lines = []
    for name, kind, text, samples in families:
        full = "qwencode_" + name
        lines += [f"# HELP {full} {text}", f"# TYPE {full} {kind}"]
        lines += [f"{full}{suffix} {value:.10g}" for suffix, value in samples]
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
function table(label, heads, rows) {
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
  const rows = [...data.running, ...data.waiting];
  if (!rows.length) return none("Nothing is running.");
  return table("Running now", [["Session"], ["State"], ["Seconds", 1], ["Tokens", 1],
    ["Tokens/s", 1]], rows.map((one) => [short(one.session),
    one.state === "prefill" ? "prefill " + seconds(one.state_seconds) : one.state,
    seconds(one.seconds), String(one.tokens), speed(one.tokens_per_s)]));
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
  if (!turns.length) return none("No turn yet.");
  return table("Last turns", [["Time"], ["Turn", 1], ["First token", 1], ["Total", 1],
    ["Tokens in", 1], ["Cached", 1], ["Out", 1], ["Tokens/s", 1], ["Tools"], ["Outcome"]],
  turns.map((turn) => [clock(turn.started + turn.total_s), turn.turn ? String(turn.turn) : "",
    seconds(turn.first_s), seconds(turn.total_s),
    turn.prompt_tokens ? count(turn.prompt_tokens) : "",
    turn.prompt_tokens ? share(turn.cached_tokens, turn.prompt_tokens) : "",
    String(turn.output_tokens), speed(turn.tokens_per_s),
    turn.tools.length ? turn.tools.join(", ") + (turn.rescue ? ` via rescue:${turn.rescue}` : "")
      : turn.way === "local" ? "answered without the model" : "",
    [outcome(turn), ...turn.notes.map((note) => el("small", {}, note))]]));
}

function rescueRows(turns) {
  if (!turns.length) return none("No rescue was needed.");
  return table("Rescues", [["Time"], ["Rule"], ["Call"], ["Result"]], turns.map((turn) =>
    [clock(turn.started + turn.total_s), turn.rescue, turn.tools.join(", "),
      turn.rescue_outcome || turn.outcome]));
}

function errorRows(turns) {
  if (!turns.length) return none("No error.");
  return table("Errors", [["Time"], ["Kind"], ["What to do"]], turns.map((turn) =>
    [clock(turn.started + turn.total_s), outcome(turn),
      el("div", {}, turn.error, turn.cure ? el("small", {}, turn.cure) : "")]));
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
STATUS_SCRIPT_HASH = "sha256-1xIC4UQuY5IFRmftq0UMyZXNdM+H6VG2xcH3kUVbL3c="

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

def readiness(
    readers: Sequence[socket.socket], writers: Sequence[socket.socket],
) -> Callable[[float], List[socket.socket]]:
    """Prepare a wait, which takes seconds and returns the sockets that are ready.

    poll() where there is one: select() fails above descriptor 1,023.
    """
    if sys.platform == "win32":
        return lambda timeout_s: [ready for some in select.select(
            readers, writers, {*readers, *writers}, max(0.0, timeout_s)) for ready in some]
    poll, by_fd = select.poll(), {sock.fileno(): sock for sock in (*readers, *writers)}
    for sock in readers:
        poll.register(sock, select.POLLIN)
    for sock in writers:
        poll.register(sock, select.POLLOUT | (select.POLLIN if sock in readers else 0))
    return lambda timeout_s: [by_fd[fd] for fd, _ in poll.poll(max(0.0, timeout_s) * 1000)]


def wait_ready(
    readers: Sequence[socket.socket], writers: Sequence[socket.socket], timeout_s: float,
) -> List[socket.socket]:
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
    ClientGoneError; close() cancels whatever Ollama is doing for us.
    """

    def __init__(self, sock: socket.socket, waiter: Waiter, url: str) -> None:
        self._sock, self._waiter, self._url = sock, waiter, url
        # TLS may hold decrypted bytes that no wait on the socket would tell of.
        self._tls = self._more = hasattr(sock, "pending")
        self._buffer = b""
        self._chunks: Optional[ChunkDecoder] = None
        self._left: Optional[int] = None
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
            raise UpstreamBrokenError(
                f"The connection to Ollama broke: {clean(str(problem))}") from None

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
            self._chunks = ChunkDecoder()
        elif self.status in (204, 304):
            self._left = 0
        elif WHOLE_NUMBER.fullmatch(self.headers.get("content-length", "")):
            self._left = int(self.headers["content-length"])

    def read(self, until: float) -> bytes:
        """Return the next piece of the body, b"" at its end, also where it was cut."""
        while not self._ended:
            data, self._buffer = self._buffer, b""
            if not data and self._left != 0:
                data = self._receive(until)
            payload = self._unframe(data)
            if payload:
                return payload
        return b""

    def _unframe(self, data: bytes) -> bytes:
        if self._chunks is not None:
            try:
                payload = self._chunks.feed(data)
            except ValueError as problem:
                raise UpstreamBrokenError(
                    f"Ollama's answer is framed wrongly: {problem}.") from None
            self._ended = self._chunks.finished or not data
            return payload
        if self._left is not None:
            data = data[:self._left]
            self._left -= len(data)
            self._ended = not self._left or not data
            return data
        self._ended = not data
        return data

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

    def close(self) -> None:
        self._sock.close()

    def __enter__(self) -> UpstreamCall:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Answer(NamedTuple):
    """A whole answer of the upstream; body is parsed JSON or None."""

    status: int
    text: str
    body: Any
    retry_after: Optional[str] = None


class Upstream:
    """The HTTP client of every dialect: a new connection for each call.

    A loopback connect costs 0.07 ms; in return no connection is ever stale, and
    closing one cancels exactly its request. Proxies of the environment are not used:
    they would carry prompts off the machine.
    """

    def __init__(self, config: Config) -> None:
        parts = late("urllib.parse").urlsplit(config.base_url)
        self.tls = parts.scheme.lower() == "https"
        self.host = parts.hostname or ""
        self.port = parts.port or (443 if self.tls else 80)
        self._prefix = parts.path.rstrip("/")
        shown = f"[{self.host}]" if ":" in self.host else self.host
        self.url = f"{parts.scheme}://{shown}:{self.port}{self._prefix}"
        login = late("urllib.parse").unquote(parts.netloc.rpartition("@")[0])
        authorization = f"Bearer {config.auth_token}" if config.auth_token else ""
        if login and not authorization:
            authorization = "Basic " + late("base64").b64encode(login.encode()).decode()
        self._fixed = (f"Host: {shown}:{self.port}\r\n"
                       "Accept: application/json\r\nConnection: close\r\n")
        if authorization:
            self._fixed += f"Authorization: {authorization}\r\n"

    def open(
        self, method: str, path: str, body: Optional[str], waiter: Waiter, until: float,
    ) -> UpstreamCall:
        """Connect and send; the answer is read from the returned call."""
        payload = body.encode() if body is not None else b""
        head = f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._fixed}"
        if body is not None:
            head += f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n"
        sock = self._connect(waiter, min(until, time.monotonic() + CONNECT_S))
        call = UpstreamCall(sock, waiter, self.url)
        try:
            call.send(head.encode("utf-8", "surrogateescape") + b"\r\n" + payload, until)
        except BaseException:
            call.close()
            raise
        return call

    def _connect(self, waiter: Waiter, until: float) -> socket.socket:
        """Try each address in turn; raise UpstreamRefusedError with the reason."""
        reason = "no address"
        for family, kind, protocol, _, address in self._addresses(waiter, until):
            try:
                sock = socket.socket(family, kind, protocol)
            except OSError as problem:  # no such family here, or too many open files
                reason = os.strerror(problem.errno or 0)
                continue
            try:
                reason = self._connect_one(sock, address, waiter, until)
                if not reason:
                    return self._wrap(sock) if self.tls else sock
            except BaseException:
                sock.close()
                raise
            sock.close()
        raise self._refused(reason)

    def _addresses(self, waiter: Waiter, until: float) -> List[Any]:
        """Look the name up, on a thread: a resolver may take half a minute to give up."""
        found: List[Any] = []
        mine, wake = socket.socketpair()

        def look_up() -> None:
            try:
                found.append(socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM))
            except (OSError, UnicodeError) as problem:
                found.append(problem)
            wake.close()

        with mine:
            if self.host in LOCAL_NAMES:
                look_up()
            else:
                threading.Thread(target=look_up, daemon=True).start()
                waiter.wait(mine, False, until)
        if not found or isinstance(found[0], Exception):
            reason = found[0] if found else "the lookup takes too long"
            raise self._refused(f"the name cannot be resolved ({reason})")
        return list(found[0])

    @staticmethod
    def _connect_one(
        sock: socket.socket, address: Any, waiter: Waiter, until: float,
    ) -> str:
        """Connect; return "" or why it failed."""
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        code = sock.connect_ex(address)
        if code in (errno.EINPROGRESS, errno.EWOULDBLOCK, getattr(errno, "WSAEWOULDBLOCK", -1)):
            if not waiter.wait(sock, True, until):
                return "it does not accept connections in time"
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        return os.strerror(code) if code else ""

    def _wrap(self, sock: socket.socket) -> socket.socket:
        global WOULD_BLOCK
        ssl = late("ssl")
        WOULD_BLOCK = (BlockingIOError, InterruptedError, ssl.SSLWantReadError,
                       ssl.SSLWantWriteError)
        sock.settimeout(CONNECT_S)
        try:
            wrapped: socket.socket = ssl.create_default_context().wrap_socket(
                sock, server_hostname=self.host)
        except (OSError, ValueError) as problem:
            raise self._refused(f"TLS failed ({clean(str(problem))})") from None
        wrapped.setblocking(False)
        return wrapped

    def _refused(self, reason: str) -> UpstreamRefusedError:
        return UpstreamRefusedError(
            f"Cannot reach Ollama at {self.url}: {clean(reason)}. Start it with `ollama serve`,"
            " or set OLLAMA_BASE_URL.")

    def ask(
        self, method: str, path: str, body: Optional[str], waiter: Waiter, until: float,
    ) -> Answer:
        """Make a call and read its whole answer."""
        with self.open(method, path, body, waiter, until) as call:
            call.read_head(until)
            text = call.read_all(until).decode("utf-8", "replace")
        try:
            parsed = _strict_json.decode(text)
        except (ValueError, RecursionError):
            parsed = None
        return Answer(call.status, text, parsed, call.headers.get("retry-after"))


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
        self._utc_offset_s = time.localtime().tm_gmtoff or 0
        self._lock = threading.Lock()

    def on(self, level: str) -> bool:
        return self.LEVELS.index(level) <= self._limit

    def write(self, level: str, message: str) -> None:
        """Log a message; a debug message may be of any length."""
        text = clean(redact(message, self._secrets), 10_000_000 if level == "debug" else 2000)
        stamp = time.strftime("%H:%M:%S")
        self._line(level, to_json({"time": stamp, "level": level, "message": text}) if self._json
                   else f"{stamp} {'' if level == 'info' else level + ': '}{text}")

    def turn(self, record: TurnRecord) -> None:
        """Write the line of a turn."""
        self._line("warn" if record.error else "info",
                   turn_json(record, self._secrets) if self._json else
                   turn_line(record, self._colour, self._utc_offset_s, self._secrets))

    def _line(self, level: str, text: str) -> None:
        if self.on(level):
            with self._lock, contextlib.suppress(OSError, ValueError):
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
        self._sock, self._stop = sock, stop
        self.input = bytearray()
        self._pending = bytearray()
        self._largest = 0  # of the pieces that wait: one long line is no lag
        self._taken_at = 0.0
        self._eof = False
        self._watched: Any = None
        self._ready: Callable[[float], List[socket.socket]] = lambda timeout_s: []
        self.tick_at = float("inf")
        self.on_tick: Callable[[], None] = lambda: None
        self.serving = False

    def send(self, data: bytes) -> None:
        """Send now what the client takes and keep the rest."""
        sent = 0
        if not self._pending:
            self._taken_at = time.monotonic()
            try:
                sent = self._sock.send(data)
            except WOULD_BLOCK:
                pass
            except OSError:
                raise ClientGoneError from None
        if sent < len(data):
            self._pending += memoryview(data)[sent:]
            self._largest = max(self._largest, len(data))
            if len(self._pending) > MAX_PENDING_BYTES + self._largest:
                raise ClientGoneError

    def _flush(self) -> None:
        try:
            sent = self._sock.send(self._pending)
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
            data = self._sock.recv(READ_BYTES)
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
        if self._stop in ready and not self.serving:
            raise ClientGoneError
        if self._stop in ready:
            raise StoppingError("The shim is being stopped; the answer ends here.")
        if self._sock not in ready:
            return False
        if self._pending:
            self._flush()
        before = len(self.input)
        if before < READ_BYTES:
            self._take_input()
        return sock is None and len(self.input) > before

    def _watch(
        self, sock: Optional[socket.socket], writing: bool,
    ) -> Callable[[float], List[socket.socket]]:
        """Return the wait for these sockets; the last one is kept, as tokens share it."""
        full, pending = len(self.input) >= READ_BYTES, bool(self._pending)
        key = (sock, writing, full, pending)
        if key != self._watched:
            readers = [self._stop] if full else [self._stop, self._sock]
            writers = [self._sock] if pending else []
            if sock is not None:
                (writers if writing else readers).append(sock)
            self._watched, self._ready = key, readiness(readers, writers)
        return self._ready

    def _patience(self, now: float) -> float:
        """Seconds until a client that takes nothing is given up."""
        if not self._pending:
            return 3600.0
        left = self._taken_at + CLIENT_STALL_S - now
        if left <= 0:
            raise ClientGoneError
        return left

    def drain(self) -> None:
        """Wait until everything is sent."""
        while self._pending:
            self.wait_writable()

    def wait_writable(self) -> None:
        now = time.monotonic()
        if self._sock in wait_ready((), (self._sock,), self._patience(now)):
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


REQUEST_LINE = Pattern(r"([A-Z]{1,20}) ([!-~]{1,8000}) HTTP/(1\.[01])")
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
    method, target, version = first.groups()
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
        self._limit, self._queue, self._working = limit, queue, 0
        self._waiting: List[socket.socket] = []
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def place(self, waiter: Waiter) -> Iterator[None]:
        """Hold a place for a with block; raise BusyError where too many wait already."""
        mine = wake = None
        with self._lock:
            if self._working < self._limit and not self._waiting:
                self._working += 1
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
                self._working -= 1

    @property
    def load(self) -> Tuple[int, int]:
        """Requests at work and waiting."""
        return self._working, len(self._waiting)


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
            return self._upstream.ask("POST" if body else "GET", path,
                                      to_json(body) if body else None, waiter, until)
        except (UpstreamBrokenError, UpstreamTimeoutError):
            return Answer(0, "", None)

    def _learn(self, name: str, waiter: Waiter, until: float) -> LocalModel:
        config = self._config
        answer = self._ask("/api/show", {"model": name}, waiter, until)
        if answer.status != 200:
            error = upstream_error(answer.status, answer.text, name)
            if isinstance(error, ModelMissingError):
                raise error
            return LocalModel(ModelFacts(name), config.num_ctx, config.num_ctx or 0)
        facts = facts_from_show(name, answer.body)
        _, before = self._models.get(name, (0.0, None))
        if before and before.facts.digest == facts.digest and before.window:
            model = before._replace(facts=facts)
        else:
            model = self._choose_window(facts, _mapping(answer.body).get("model_info"),
                                        waiter, until)
        if facts.path == "B" or (facts.path and config.verbatim != "off"):
            shown = self._ask("/api/chat", probe_body(name, load_options(model.num_ctx)),
                              waiter, until)
            prompt = rendered_prompt(shown.body) if shown.status == 200 else None
            if prompt:
                model = model._replace(facts=facts_from_probe(facts, prompt))
        return model

    def _choose_window(
        self, facts: ModelFacts, info: Any, waiter: Waiter, until: float,
    ) -> LocalModel:
        """Decide the window (SHIM_NUM_CTX) and load the model with it."""
        explicit = self._config.num_ctx
        if explicit:
            window = min(explicit, facts.trained or explicit)
            said = "as set" if window == explicit else \
                f"all that the model was trained for, of the {explicit} that were set"
            return LocalModel(facts, explicit, window, judge_explicit(window, FIRST_PROMPT_TOKENS)
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

    def load(
        self, facts: ModelFacts, num_ctx: int, kv_bytes: Optional[int], waiter: Waiter,
        until: float,
    ) -> WindowChoice:
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


def new_enough(version: str) -> bool:
    """Say whether verbatim was tried with this Ollama: 0.24 or newer, or built from source."""
    match = VERSION_NUMBER.match(version)
    number = tuple(map(int, match.groups())) if match else ()
    return number >= (0, 24) or version.startswith("0.0.0")


# ------------------------------ between the turns ------------------------------

class WrittenTools(NamedTuple):
    """Forwarded tools as a prompt has them; key is what they were made from."""

    key: Any
    tools: Tuple[Tool, ...]
    json: str
    segments: List[Segment]
    text: str  # "" where the template prints the tools


def write_tools(
    sent: Tuple[Tool, ...], slim: bool, facts: ModelFacts, agent: str, key: Any,
) -> WrittenTools:
    """Shorten tools and write their JSON: 8 cost 0.5 ms. agent's line stands in the first."""
    tools = tuple(map(slim_tool, sent)) if slim else sent
    if agent and tools:
        first = tools[0]._replace(description=f"{agent_line(agent)} {tools[0].description}")
        tools = (first, *tools[1:])
    each = [to_json(tool_json(tool, facts.renderer)) for tool in tools]
    segments = [Segment(f"tools changed at {tool.name}", text, estimate_tokens(text))
                for tool, text in zip(tools, each)]
    return WrittenTools(key, tools, f"[{','.join(each)}]", segments,
                        tools_as_text(tools) if facts.tools_in_text and tools else "")


class Session:
    """What is kept between the turns of one conversation; bounded, lost at the end."""

    latest_tools: ClassVar[Optional[WrittenTools]] = None  # shared by sessions with the same

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.turns = 0
        self.rescued: Tuple[str, ...] = ()  # ids of the last turn's rescued calls
        self._table: Optional[ToolTable] = None
        self.written = ReusedJson()
        self._tools: Optional[WrittenTools] = None
        self.tools_json = self.tools_text = ""
        self.tools_changed = False
        self.tool_segments: List[Segment] = []
        self.message_segments: List[Segment] = []
        self.segments: List[Segment] = []  # of the last turn's whole prompt

    def table(self, request: Request, limit: int) -> ToolTable:
        """Choose the tools, the same as in the last turn while the client's are the same."""
        if request.tool_choice.kind == "none":
            return tool_table(request, limit)
        self._table = tool_table(request, limit, self._table)
        return self._table

    def tools(
        self, table: ToolTable, slim: bool, facts: ModelFacts, agent: str = "",
    ) -> Tuple[Tuple[Tool, ...], str]:
        """Return the forwarded tools and their JSON ("" where the text holds them).

        A session's are alike from turn to turn, and mostly those of the other sessions.
        Where they come before the system text, an agent's line stands in the first of them.
        """
        agent = agent if facts.tools_first else ""
        key = (table.sent, slim, facts.renderer, facts.tools_in_text, agent)
        self.tools_changed = self._tools is None or self._tools.key != key
        if self._tools is None or self.tools_changed:
            latest = Session.latest_tools
            self._tools = latest if latest and latest.key == key else \
                write_tools(table.sent, slim, facts, agent, key)
            Session.latest_tools = self._tools
            self.tools_json, self.tool_segments = self._tools.json, self._tools.segments
            self.tools_text = self._tools.text
        in_text = facts.tools_in_text or not self._tools.tools
        return self._tools.tools, "" if in_text else self.tools_json


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
                oldest = next(iter(self._turns))
                self._chars -= len(self._turns.pop(oldest))

    def recall(self, session: str, index: int, turn: Message) -> Optional[str]:
        ids = tuple(b.id for b in turn.blocks if isinstance(b, ToolUse))
        text = "".join(b.text for b in turn.blocks if isinstance(b, Text))
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
        if self._server.config.warm and not self._server.gate.load[0]:
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
            if self.prefix and not server.gate.load[0]:
                server.upstream.ask("POST", *self.prefix, self, until)
            elif known and model.num_ctx and not server.gate.load[0]:
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

    def fitted(self, request: Request, window: int, is_compaction: bool) -> Prompt:
        """Clamp num_predict to the window; raise PromptTooLongError where nothing fits."""
        answers = sum(message.role == "assistant" for message in request.messages)
        return self._replace(num_predict=fit(
            self.size.tokens, request.max_tokens, window, is_compaction,
            headroom_tokens(window, answers), margin=self.size.margin))


# What goes to a client at once: a stream's bytes, which take a sixth of the memory of
# their events, or events that become a whole answer.
Batch = Union[bytes, List[Event]]


class Audience(Waiter):
    """The clients of one running request: its own, and those that joined it.

    Waits for Ollama together with the own client; when that leaves while others
    listen, the request goes on without it (detached).
    """

    def __init__(self, link: ClientLink) -> None:
        self._link = link
        self._wakers: Dict[socket.socket, socket.socket] = {}
        self.batches: List[Batch] = []
        self.detached = self.ended = False
        self.failure: Optional[ShimError] = None

    def join(self) -> socket.socket:
        """Return a socket that can be read whenever there is news."""
        mine, wake = socket.socketpair()
        wake.setblocking(False)
        self._wakers[mine] = wake
        return mine

    def leave(self, mine: socket.socket) -> None:
        self._wakers.pop(mine).close()
        mine.close()

    def share(self, batch: Batch) -> None:
        self.batches.append(batch)
        self._wake()

    def end(self) -> None:
        self.ended = True
        self._wake()

    def _wake(self) -> None:
        for wake in list(self._wakers.values()):
            with contextlib.suppress(OSError):  # full: it wakes anyway
                wake.send(b"x")

    def wait(self, sock: socket.socket, writing: bool, until: float) -> bool:
        if not self.detached:
            try:
                return self._link.wait(sock, writing, until)
            except ClientGoneError:
                self.detached = True
        while self._wakers:
            if super().wait(sock, writing, min(until, time.monotonic() + FOLLOW_S)):
                return True
            if time.monotonic() >= until:
                return False
        raise ClientGoneError


def is_new_file(ops: Sequence[FileOp], cwd: str) -> bool:
    """Say whether the one file that ops make is known not to exist."""
    return len(ops) == 1 and os.path.isdir(cwd) \
        and not os.path.lexists(os.path.join(cwd, os.path.expanduser(ops[0].path)))


class Exchange:
    """One Messages request, from the parsed body to the last byte."""

    def __init__(self, handler: Handler, request: Request) -> None:
        self.handler, self.request = handler, request
        self.server, self.link = handler.server, handler.link
        self.config = handler.server.config
        self.session_id = handler.session_id or request.session
        self.agent = handler.http.header("x-claude-code-agent-id")
        self.is_compaction = COMPACTION_MARK in last_user_text(request)
        # A side request without tools must not take the conversation's place.
        self.session = self.server.session(self.session_id + ("" if request.tools else " -"))
        self.started = False
        self.begun_at, self.first_at = time.monotonic(), 0.0
        self.translator = StreamTranslator(
            "msg_" + fresh_id(), request.model or self.config.model, lambda: "toolu_" + fresh_id())
        self.estimate = 1
        self.events: List[Event] = []
        self.way, self.model, self.window = "chat", self.config.model, 0
        self.turn: Optional[Turn] = None
        self.opening = self.unrendered = ""
        self.recalled: List[bool] = []  # earlier answers: as the model wrote them?
        self.notes: List[str] = []
        self.left_out: Tuple[str, ...] = ()
        self.key = handler.join_key
        self.audience = Audience(self.link)

    def run(self) -> None:
        """Carry the request out; whatever fails is told to the client, and all counted."""
        self.link.on_tick = self._tick
        self.link.tick_at = self.begun_at + FIRST_EVENT_S
        stats = self.server.stats
        stats.begin(self, self.session_id, self.model, time.time(), "waiting")
        stats.settle(self.session_id, self.session.rescued, self.request)
        outcome = CLIENT_LEFT
        failure: Optional[ShimError] = None
        try:
            self._carry_out()
            outcome = "ok"
        except ClientGoneError:
            self.audience.failure = UpstreamBrokenError(
                "The identical request that this one had joined was given up. Ask again.")
            raise
        except Exception as problem:  # a bug, too, must end a begun stream with an error event
            failure = self.audience.failure = self.handler.as_told(problem)
            outcome = outcome_of(failure)
            if not self.audience.detached:
                self._tell(failure)
        finally:
            self.link.tick_at = float("inf")
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
        if leader is not self:
            self._follow(leader)
            return
        with contextlib.ExitStack() as places:
            if self.agent:  # subagents in turn: each switch costs the model a re-read (OL 5b)
                places.enter_context(self.server.side_gate.place(self.audience))
            places.enter_context(self.server.gate.place(self.audience))
            self.server.stats.progress(self, time.time(), state="prefill")
            self.server.warmer.cancel()
            self._relay()

    def _answer_here(self, answer: LocalAnswer) -> None:
        """Answer without the model: same events, estimated usage."""
        self.way, self.model = "local", answer.rule
        self.estimate = count_request(self.request)
        self._begin()
        events = self.translator.translate([TextDelta(answer.text)] if answer.text else [])
        self._send(events + self.translator.finish(
            answer.stop_reason, None, Usage(self.estimate, len(answer.text) // 4 + 1)))
        self._end()

    def _record(self, outcome: str, failure: Optional[ShimError]) -> None:
        """Count the request and write its line."""
        now, turn = time.monotonic(), self.turn
        finish = (turn.finish if turn else None) or Finish("")
        usage = turn.usage if turn else Usage()
        calls = turn.calls if turn else []
        self.session.turns += 1
        self.session.rescued = tuple(
            one for one, (_, rule) in zip(self.translator.call_ids, calls) if rule)
        record = TurnRecord(
            session=self.session_id, turn=self.session.turns, model=self.model,
            started=time.time() - (now - self.begun_at),
            first_s=self.first_at - self.begun_at if self.first_at else None,
            total_s=now - self.begun_at, output_tokens=usage.output_tokens,
            prompt_tokens=sum(usage) - usage.output_tokens,
            new_tokens=None if finish.prompt_tokens is None
            else usage.input_tokens + usage.cache_creation_input_tokens,
            cached_tokens=usage.cache_read_input_tokens, prefill_s=finish.prompt_s,
            tokens_per_s=usage.output_tokens / finish.output_s if finish.output_s else 0.0,
            window=self.window, tools=tuple(name for name, _ in calls), way=self.way,
            rescue=",".join(rule for _, rule in calls if rule), outcome=outcome,
            error=failure.message if failure else "", cure=cure_of(failure) if failure else "",
            notes=tuple(self.notes), left_out=self.left_out)
        self.server.note_turn(self, record)
        if turn and self.server.log.on("debug"):
            self.server.log.write("debug", f"answer {turn.raw or turn.answer!r} calls {turn.calls}")

    def _follow(self, leader: Exchange) -> None:
        """Give this client the whole stream of an identical request that runs already.

        The CLI sends a request again after a timeout; a second prefill of the same prompt
        would wait for the first and then start over.
        """
        self.way, self.notes = "joined", ["joined an identical request that was running"]
        seen, mine = 0, leader.audience.join()
        try:
            while True:
                ended = leader.audience.ended
                batches = leader.audience.batches[seen:]
                seen += len(batches)
                for batch in batches:
                    if not self.started:
                        self._open_stream()
                    self._pass_on(batch)
                if ended:
                    break
                if self.link.wait(mine, False, time.monotonic() + FOLLOW_S):
                    mine.recv(READ_BYTES)
        finally:
            leader.audience.leave(mine)
        if leader.audience.failure:
            raise leader.audience.failure
        self._end()

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
        dialect, prefix, self.opening = ChatDecoder, None, ""
        if server.registry.verbatim(self.request, facts, self.audience, own_until):
            text = self._render(facts, body, prompt.answers, own_until)
            if text is not None:
                dialect, self.opening = GenerateDecoder, opening_of(text)
                prefix = text[:max(text.find(USER_TURN), 0)]
                if False in self.recalled[-1:]:
                    self.notes.append("the last answer went back in the template's form")
                body = generate_body(self.request, facts, text, self.config, options)
            del text
        self.way = dialect.way
        if server.log.on("debug"):
            server.log.write("debug", f"history: {sum(self.recalled)} of {len(self.recalled)}"
                                      " answers as the model wrote them")
            server.log.write("debug", f"{dialect.path} {body}")
        thinking = self.opening.rstrip().endswith(THINK_OPEN)
        turn = self.turn = self._make_turn(dialect(facts.name, thinking), prompt)
        until = time.monotonic() + self.config.first_token_timeout_ms / 1000
        with server.upstream.open("POST", dialect.path, body, self.audience, until) as call:
            del body
            self._pump(call, turn, until)
        if self.unrendered:  # and chat has served: the rendering is at fault
            server.registry.no_render(facts, self.unrendered)
        if self.request.tools and not self.agent:
            self._offer_prefix(facts, options, prefix, prompt.tools_json)
        if turn.finish:
            server.counter.observe(facts.name, prompt.size, turn.finish.prompt_tokens)

    def _offer_prefix(
        self, facts: ModelFacts, options: Json, prefix: Optional[str], tools_json: str,
    ) -> None:
        """Give the warmer what reads system text and tools, and nothing of the turns."""
        options, warmer = {**options, "num_predict": 1}, self.server.warmer
        if prefix is not None:
            warmer.offer(prefix, lambda: ("/api/generate", generate_body(
                self.request, facts, prefix + USER_TURN, self.config, options)))
            return
        first = self.session.written.first
        if first is not None and first.role == "system":
            messages = to_json([message_json(first), {"role": "user", "content": "."}])[1:-1]
            warmer.offer(messages, lambda: ("/api/chat", chat_body(
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
        try:
            fitted = prompt.fitted(request, model.window, self.is_compaction)
        except PromptTooLongError as error:
            if over or not self.is_compaction:
                raise
            return self._prepare(model, error.tokens - error.maximum + SUMMARY_TOKENS)
        scarce = fitted.num_predict < min(SUMMARY_TOKENS, request.max_tokens)
        return self._prepare(model, SUMMARY_TOKENS) \
            if scarce and self.is_compaction and not over else fitted

    def _translate(self, facts: ModelFacts, request: Request) -> Prompt:
        session, counter = self.session, self.server.counter
        with session.lock:
            table = session.table(request, self.config.max_tools)
            tools, tools_json = session.tools(
                table, self.config.prompt == "slim", facts, self.agent)
            names = [tool.name for tool in table.sent]
            if self.agent:
                request = request._replace(system=(agent_line(self.agent), *request.system))
            self.recalled.clear()
            messages = chat_messages(
                request, tools, facts, self._recall, lambda text: self._slim(text, names),
                tools_text=session.tools_text)
            messages_json, same = session.written.write(messages)
            if session.tools_changed:
                same = 0
            self.left_out = tuple(dict.fromkeys((*table.dropped, *self.left_out)))
            self._note_break(messages)
        texts = [tools_json, *map(message_text, messages)]
        count = counter.count(facts.name, texts, sum(len(m.images) for m in messages))
        self.estimate = count.tokens
        sizes = [sum(counter.sizes_of(text)[1]) for text in texts]
        known = sum(sizes[:same + 1]) if same else 0
        shared = int(count.tokens * known / max(sum(sizes), 1))
        answers = tuple(m.content for m in messages if m.role == "assistant")
        return Prompt(table, messages_json, tools_json, answers, count, shared, request.max_tokens)

    def _recall(self, index: int, turn: Message) -> Optional[str]:
        """Return an earlier answer as the model wrote it, where that is remembered."""
        raw = self.server.raw_turns.recall(self.session_id, index, turn)
        self.recalled.append(raw is not None)
        return raw

    def _note_break(self, messages: List[ChatMessage]) -> None:
        """Compare the prompt with the session's last one."""
        session = self.session
        now = session.message_segments[:session.written.same]
        for place, message in enumerate(messages[len(now):], len(now)):
            tokens = int(sum(self.server.counter.sizes_of(message_text(message))[1]))
            name = "system text" if message.role == "system" and not place else \
                f"message {place} ({message.role})"
            now.append(Segment(f"{name} changed", object(), tokens))
        tools = session.tool_segments
        broken = prefix_break(session.segments, [*tools, *now]) if self.session_id else ""
        session.message_segments, session.segments = now, [*tools, *now]
        if broken:
            self.notes.append(broken)

    def _slim(self, text: str, names: Sequence[str]) -> str:
        if self.config.prompt == "full":
            return text
        text, left_out = slim_text(text, names)
        if left_out:
            self.left_out += tuple(left_out)
        if left_out and self.server.log.on("debug"):
            self.server.log.write("debug", f"left out of the prompt: {', '.join(left_out)}")
        return text

    def _render(
        self, facts: ModelFacts, body: str, answers: Sequence[str], until: float,
    ) -> Optional[str]:
        """Have Ollama render the prompt; None where it cannot, and chat serves instead."""
        try:
            answer = self.server.upstream.ask(
                "POST", "/api/chat", render_body(body), self.audience, until)
        except UpstreamBrokenError as problem:  # chat tells what is wrong, if it lasts
            self.notes.append(f"not verbatim: {problem.message}")
            return None
        prompt = rendered_prompt(answer.body) if answer.status == 200 else None
        if prompt is not None:
            return prompt if facts.path == "B" else restored(prompt, answers)
        if answer.status == 200:
            self.unrendered = "Ollama rendered no prompt"
            return None
        error = upstream_error(answer.status, answer.text, facts.name,
                               retry_after=answer.retry_after,
                               prompt_tokens=self.estimate, window=self.window)
        if isinstance(error, (ModelMissingError, PromptTooLongError)) or \
                NO_TOOLS_ERROR.search(error.message) or NO_THINKING_ERROR.search(error.message):
            raise error
        if answer.status in NO_RENDERING:
            self.unrendered = error.message
        return None  # whatever else is wrong, the chat will meet and tell

    def _make_turn(self, decoder: ChatDecoder, prompt: Prompt) -> Turn:
        table = prompt.table
        return Turn(decoder, self.translator, table.offered, self.request.stop_sequences,
                    lambda finish, output: self.server.usage(decoder.model, prompt, finish, output),
                    rescue=lambda answer: self._rescue(answer, table),
                    text_calls="text" in self.config.rescue)

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
        texts = [block.text for message in self.request.messages if message.role != "assistant"
                 for block in message.blocks if isinstance(block, Text)
                 and (message.role == "system" or block.text.startswith(REMINDER_START))]
        return working_directory([*self.request.system, *texts])

    def _pump(self, call: UpstreamCall, turn: Turn, until: float) -> None:
        """Relay Ollama's answer until the turn is done."""
        silence = self.config.timeout_ms / 1000
        call.read_head(until)
        if call.status != 200:
            text = call.read_all(time.monotonic() + silence).decode("utf-8", "replace")
            raise upstream_error(
                call.status, text, turn.model, retry_after=call.headers.get("retry-after"),
                prompt_tokens=self.estimate, window=self.window)
        lines = 0
        while not turn.done:
            data = call.read(until)
            until = time.monotonic() + silence
            lines += data.count(b"\n")  # Ollama writes a line for each token
            self.server.stats.progress(self, time.time(), lines)
            events = turn.feed(data) if data else turn.close()
            if turn.heard and not self.first_at:  # not the first event, which may be ours
                self.first_at = time.monotonic()
            if turn.error and not self.started and not events:
                self._refuse(turn.error)
            if turn.heard and not self.started:
                self._begin()
            if turn.done:  # before the client can send the next turn
                self._remember(turn)
            if events:
                self._send(events)
            if turn.error:
                raise turn.error
        self._end()

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

    def _begin(self) -> None:
        self._open_stream()
        self._send([self.translator.start(Usage(self.estimate, 1))])

    def _open_stream(self) -> None:
        self.started = True
        self.link.tick_at = time.monotonic() + KEEP_ALIVE_S
        if self.request.stream and not self.audience.detached:
            self.handler.start_stream("text/event-stream; charset=utf-8")

    def _tick(self) -> None:
        """Keep the client waiting: the first event after 15 s, then one every 10 s."""
        self.link.tick_at = time.monotonic() + KEEP_ALIVE_S
        if self.request.stream:
            if self.way == "joined":
                return
            if not self.started:
                self._begin()
            else:
                self._send([self.translator.keep_alive()])
        elif not self.handler.streaming:
            self.handler.start_stream("application/json")
            self.handler.send_piece(b" ")
        else:
            self.handler.send_piece(b" ")

    def _send(self, events: List[Event]) -> None:
        batch: Batch = sse(events) if self.request.stream else events
        if self.key:
            self.audience.share(batch)
        self._pass_on(batch)

    def _pass_on(self, batch: Batch) -> None:
        if not isinstance(batch, bytes):
            self.events.extend(batch)
        elif not self.audience.detached:
            self.handler.send_piece(batch)
            self.link.tick_at = time.monotonic() + KEEP_ALIVE_S

    def _end(self) -> None:
        if self.audience.detached:
            return
        if self.request.stream:
            self.handler.end_stream()
            return
        body = to_json(fold(self.events)).encode()
        if self.handler.streaming:
            self.handler.send_piece(body)
            self.handler.end_stream()
        else:
            self.handler.reply(200, body)

    def _tell(self, error: ShimError) -> None:
        """Tell a failure: an HTTP status before the first byte, an event after it."""
        if not self.handler.streaming:
            self.handler.reply_error(error)
        elif self.request.stream:
            self.handler.send_piece(sse([error_event(error)]))
            self.handler.end_stream()
        else:
            self.handler.send_piece(to_json(error_body(error, self.handler.request_id)).encode())
            self.handler.end_stream()


def fresh_id() -> str:
    """Make an id that is unique for ever: the CLI merges turns of one id (CC B4)."""
    return os.urandom(12).hex()


# ------------------------------ requests and routes ------------------------------

class Handler:
    """One client connection: read requests, guard them, route them, answer."""

    http = HttpRequest("GET", "/", "/", "1.1", {})  # until one has come
    request_id = join_key = ""
    body = _unsent = b""
    streaming = False
    keep = True
    _unread = False  # a body that would be taken for the next request

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

    @property
    def session_id(self) -> str:
        agent = self.http.header("x-claude-code-agent-id")
        return self.http.header("x-claude-code-session-id") + (f"/{agent}" if agent else "")

    def _serve_one(self) -> None:
        """Read and answer one request."""
        self.request_id, self.http = "req_" + fresh_id(), Handler.http
        self.streaming = self.keep = self._unread = self.link.serving = False
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
        link = self.link
        while link.input[:2] == b"\r\n":  # an empty line before a request (RFC 9112 2.2)
            del link.input[:2]
        if not link.input and not link.wait(None, False, time.monotonic() + IDLE_CONNECTION_S):
            raise ClientGoneError
        until = time.monotonic() + HEAD_PROGRESS_S
        while True:
            end = link.input.find(b"\r\n\r\n")
            if 0 <= end <= MAX_HEAD_BYTES:
                head = bytes(link.input[:end])
                del link.input[:end + 4]
                return head
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
        if not decoder.finished and not link.input \
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
            value = parse_json(body)
        except ValueError as problem:
            raise BadRequestError(f"The body is not JSON: {clean(str(problem))}.") from None
        return parse_request(value)

    def _head(self, status: int, headers: Mapping[str, str]) -> bytes:
        """Write an answer's head; a header without a value is left out."""
        reason = BaseHTTPRequestHandler.responses.get(status, ("Overloaded", ""))[0]
        origin = self.http.header("origin")
        allowed = origin and self._origin_allowed(origin)
        rows = {**headers, "Access-Control-Allow-Origin": origin if allowed else "",
                "Vary": "Origin" if allowed else "", "request-id": self.request_id,
                "Connection": "keep-alive" if self.keep else "close"}
        lines = [f"{name}: {value}\r\n" for name, value in rows.items() if value]
        return f"HTTP/1.1 {status} {reason}\r\n{''.join(lines)}\r\n".encode("latin-1")

    def reply(self, status: int, body: bytes, kind: str = "application/json",
              headers: Optional[Mapping[str, str]] = None) -> None:
        """Answer with a whole body."""
        size = str(len(body)) if status != 204 else ""
        head = self._head(
            status, {"Content-Type": kind, "Content-Length": size, **(headers or {})})
        self.link.send(head if self.http.method == "HEAD" else head + body)

    def reply_json(self, value: Any) -> None:
        self.reply(200, to_json(scrub(value, self._secrets())).encode())

    def reply_error(self, error: ShimError) -> None:
        """Answer with the Messages API error object."""
        body = to_json(error_body(error, self.request_id)).encode()
        self.reply(error.status, body, headers={
            "x-should-retry": "" if error.retry else "false", "Allow": getattr(error, "allow", ""),
            "retry-after": clean(error.retry_after or "", 60)})

    def start_stream(self, kind: str) -> None:
        """Send the head of a body of unknown length; HTTP/1.0 gets it until the close."""
        chunked = self.http.version != "1.0"
        self.streaming, self.keep = True, self.keep and chunked
        self._unsent = self._head(200, {"Content-Type": kind, "Cache-Control": "no-cache",
                                        "Transfer-Encoding": "chunked" if chunked else ""})

    def send_piece(self, data: bytes) -> None:
        if self.http.version != "1.0":
            data = b"%x\r\n%b\r\n" % (len(data), data)
        data, self._unsent = self._unsent + data, b""
        self.link.send(data)

    def end_stream(self) -> None:
        if self.http.version != "1.0":
            self.link.send(b"0\r\n\r\n")

    # ---- routes ----

    def messages(self) -> None:
        """Answer a Messages request; one of a known session may join its own retry."""
        known = self.http.header("x-claude-code-session-id")
        self.join_key = f"{self.session_id} {sha256(self.body)}" if known else ""
        Exchange(self, self._request()).run()
        self.server.tidy()

    def count_tokens(self) -> None:
        self.reply_json({"input_tokens": count_request(self._request())})

    def models(self) -> None:
        query = late("urllib.parse").parse_qsl(self.http.target.partition("?")[2][:2000])
        self.reply_json(model_page(self.server.model_names(self.link), dict(query)))

    def model(self) -> None:
        self.reply_json(model_row(clean(self.http.path[len("/v1/models/"):], 200)))

    def health(self) -> None:
        full = not self.server.config.api_key or self.has_key()
        self.reply_json(self.server.health(self.link, full))

    def status(self) -> None:
        """Tell what the status page shows."""
        server = self.server
        self.reply_json(status_json(server.stats, server.config, server.recent_health(self.link),
                                    time.time()))

    def metrics(self) -> None:
        text = redact(metrics_text(self.server.stats, self.server.config), self._secrets())
        self.reply(200, text.encode(), "text/plain; version=0.0.4; charset=utf-8")

    def root(self) -> None:
        """Give a browser the status page, everything else a line of text.

        The CLI knocks with HEAD / when it starts (CC A1): time to warm the model.
        """
        if self.http.method == "HEAD":
            self.server.warmer.start()
        if self._wants_page():
            self.reply(200, STATUS_PAGE.encode(), "text/html; charset=utf-8", PAGE_HEADERS)
            return
        self.reply(200, f"qwencode {__version__} is running\n".encode(),
                   "text/plain; charset=utf-8")

    def options(self) -> None:
        """Answer a CORS preflight; _guard has refused foreign origins."""
        self.reply(204, b"", "", {
            "Access-Control-Allow-Methods": "GET, HEAD, POST, OPTIONS",
            "Access-Control-Allow-Headers": "content-type, x-api-key, authorization,"
                                            " anthropic-version, anthropic-beta",
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
    path = config.counts_file
    try:
        return kept_counts(path) if path and os.path.exists(path) else TokenCounter()
    except (OSError, ValueError) as problem:
        log.write("warn", f"SHIM_COUNTS_FILE: {path} cannot be read"
                  f" ({reason_of(problem)}): counts are neither taken from it nor kept in it."
                  " Name another file, or remove this one.")
        return TokenCounter()


def kept_counts(path: str) -> TokenCounter:
    """Read a file of counts; raise ValueError where it holds something else."""
    with open(path, encoding="utf-8") as file:
        kept = json.loads(file.read() or "{}")
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
        if os.path.exists(path):
            kept_counts(path)
        with open(path + ".new", "w", encoding="utf-8") as file:
            json.dump(counter.to_json(), file)
        os.replace(path + ".new", path)
    except (OSError, ValueError) as problem:
        log.write("warn", f"SHIM_COUNTS_FILE: {path} was not written ({reason_of(problem)})")


# The page needs nothing from elsewhere, so nothing else is allowed to load.
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
        self.upstream = Upstream(config)
        self.registry = Registry(config, self.upstream, self.log)
        self.gate = Gate(config.max_concurrent, config.max_concurrent)
        self.side_gate = Gate(1, config.max_concurrent)
        self.raw_turns = RawTurns()
        self.stats = Stats(time.time(), threading.Lock())
        self.counter = read_counts(config, self.log)
        self.warmer = Warmer(self)
        self._rates: Dict[str, float] = {}
        self._joints: Dict[str, Exchange] = {}
        self._lock = threading.Lock()
        self._session_of = lru_cache(MAX_SESSIONS)(lambda key: Session())
        self.stop_signal, self._stop_sender = socket.socketpair()
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
        host = self.config.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_port}"

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
        if now >= self._tidy_at and not self.gate.load[0]:
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

    def model_names(self, waiter: Waiter) -> List[str]:
        """List the configured model and what Ollama has."""
        try:
            tags = self.upstream.ask("GET", "/api/tags", None, waiter,
                                     time.monotonic() + HEALTH_S).body
        except ShimError:
            tags = None
        return list(dict.fromkeys([self.config.model, *(row["name"] for row in model_rows(tags))]))

    def recent_health(self, waiter: Waiter) -> Json:
        """Return what health() said in the last seconds: the page asks every second."""
        if time.monotonic() > self._health[0]:
            self._health = (time.monotonic() + HEALTH_TTL_S, self.health(waiter, True))
        return self._health[1]

    def health(self, waiter: Waiter, full: bool) -> Json:
        """Tell how things are, within a second; without the key only up or down."""
        until = time.monotonic() + HEALTH_S
        upstream: Json = {"url": self.upstream.url, "reachable": False}
        model: Json = {"name": self.config.model, "present": None}
        try:
            answer = self.upstream.ask("GET", "/api/version", None, waiter, until)
            upstream.update(reachable=True, version=told_version(answer) or None)
            show = self.upstream.ask("POST", "/api/show", to_json({"model": self.config.model}),
                                     waiter, until)
            facts = facts_from_show(self.config.model, show.body)
            known = self.registry.known(self.config.model)
            model.update(
                capabilities=sorted(facts.capabilities or ()), context_length=facts.trained,
                window=known.window or None if known else None, way=self._last_way)
            if show.status == 200:
                model["present"] = True
            elif isinstance(upstream_error(show.status, show.text, self.config.model),
                            ModelMissingError):
                model["present"] = False
                upstream["error"] = (f"model {self.config.model} is missing:"
                                     f" ollama pull {self.config.model}")
        except ShimError as error:
            upstream["error"] = redact(error.message, self.secrets)
        ok = bool(upstream["reachable"])
        if not full:
            return {"ok": ok, "status": "ok" if ok else "down"}
        working, waiting = self.gate.load
        return {"ok": ok, "status": "ok" if ok and model["present"] is not False else "degraded",
                "shim": "qwencode", "version": __version__, "upstream": upstream, "model": model,
                "requests": {"working": working, "waiting": waiting}}


@lru_cache(maxsize=256)
def bash_parses(command: str) -> bool:
    """Run `bash -n` on a command, bounded; True where there is no bash to ask."""
    subprocess, bash = late("subprocess"), late("shutil").which("bash")
    if not bash or not command:
        return True
    try:
        done = subprocess.run([bash, "-n"], input=command.encode("utf-8", "replace"), check=False,
                              capture_output=True, timeout=BASH_CHECK_S)
    except (OSError, subprocess.TimeoutExpired):
        return True
    return bool(done.returncode == 0)


# ============================== 17. CLI ==============================

def make_parser() -> Any:
    """Make the command line from COMMANDS and OPTIONS."""
    argparse = late("argparse")
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    group = common.add_argument_group("options of every command, each also a variable")
    for option in OPTIONS:
        default = f" (default {option.default})" if option.default else ""
        group.add_argument(flag_of(option), dest=option.name, metavar="VALUE",
                           help=f"{option.help}{default}; {option.variable}".replace("%", "%%"))
    parser = argparse.ArgumentParser(
        prog="qwencode", description="Claude Code on a local Qwen model: the Messages API in front"
        " of Ollama.", parents=[common], usage="%(prog)s [COMMAND] [OPTIONS]")
    parser.error = one_line_error(parser)
    parser.add_argument("--version", action="version", version=f"qwencode {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", prog="qwencode")
    for command in COMMANDS:
        sub = commands.add_parser(command.name, help=command.help, parents=[common],
                                  description=command.help, usage="%(prog)s [OPTIONS] ...")
        sub.error = one_line_error(sub)
        command.arguments(sub)
    return parser


def one_line_error(parser: Any) -> Callable[[str], None]:
    """Answer a mistake in one line; argparse would print a page of usage before it."""
    return lambda message: parser.exit(2, f"{parser.prog}: {message}. See --help.\n")


def say(text: str) -> None:
    print(text, flush=True)


def open_server(config: Config) -> ShimServer:
    """Bind; raise ConfigError with what to do where that is not possible."""
    if not is_loopback(config.host) and not config.api_key:
        raise ConfigError(f"HOST: {config.host!r} is reachable by others; set SHIM_API_KEY"
                          " to a long random text, or keep HOST=127.0.0.1")
    try:
        return ShimServer(config)
    except OverflowError:
        raise ConfigError(f"PORT: {config.port} is no port") from None
    except OSError as problem:
        if problem.errno == errno.EADDRINUSE:
            raise ConfigError(f"PORT: {config.port} on {config.host} is in use; stop the other"
                              " program or choose another port with --port") from None
        raise ConfigError(f"HOST and PORT: cannot listen on {config.host}:{config.port}"
                          f" ({problem.strerror or problem})") from None


def raise_descriptor_limit() -> None:
    """Allow as many open files as many clients need: macOS starts with 256."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # not on Windows
        resource = late("resource")
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(MAX_DESCRIPTORS, hard)
        if soft != resource.RLIM_INFINITY and soft < most:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def run_serve(args: Any, env: Mapping[str, str]) -> int:
    """Serve until SIGTERM or Ctrl-C; 0 and 130."""
    signal = late("signal")
    config = load_config(vars(args), env)
    raise_descriptor_limit()
    server = open_server(config)
    ended: List[int] = []

    def on_signal(number: int, _frame: object) -> None:
        if ended:
            os._exit(130)
        ended.append(number)
        server.stop()

    for name in ("SIGINT", "SIGTERM", "SIGBREAK"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), on_signal)
    say(f"qwencode {__version__} on {server.url} -> {server.upstream.url} model {config.model}")
    server.warmer.start()
    server.serve_forever()
    server.finish()
    return 130 if signal.SIGINT in ended else 0


class StandIn(BaseHTTPRequestHandler):
    """A few canned answers in Ollama's protocol: no model, for the demo only."""

    protocol_version = "HTTP/1.1"
    CALL = '<tool_call>\n{"name": "Write", "arguments": {"file_path": "hello.txt",' \
           ' "content": "Hello from the demo.\\n"}}\n</tool_call>'

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent: the demo prints what is worth seeing."""

    def do_POST(self) -> None:
        """Answer a chat turn: first a call written as text, then a closing sentence."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/api/chat" or body.get("_debug_render_only"):
            self.send_error(404)
            return
        after_result = body["messages"][-1]["role"] == "tool"
        text = "The file is there now: hello.txt." if after_result else \
            "I will write the file.\n" + self.CALL
        words = [text[i:i + 12] for i in range(0, len(text), 12)]
        lines: List[Json] = [
            {"message": {"role": "assistant", "content": word}, "done": False} for word in words]
        lines.append({"message": {"role": "assistant", "content": ""}, "done": True,
                      "done_reason": "stop", "prompt_eval_count": 40, "eval_count": len(words)})
        payload = "".join(to_json({"model": body["model"], **line}) + "\n" for line in lines)
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload.encode())

    def do_GET(self) -> None:
        """Know nothing else: the shim serves with defaults then."""
        self.send_error(404)


DEMO_TOOLS = [{"name": "Write", "description": "Write a file", "input_schema": {
    "type": "object", "required": ["file_path", "content"],
    "properties": {"file_path": {"type": "string"}, "content": {"type": "string"}}}}]


def demo_turn(url: str, messages: List[Json]) -> Json:
    """Send one Messages request over HTTP, print its events, return the folded message."""
    request = late("urllib.request").Request(
        url + "/v1/messages", to_json({
            "model": "demo", "max_tokens": 1000, "stream": True, "messages": messages,
            "tools": DEMO_TOOLS}).encode(), {"Content-Type": "application/json"})
    opener = late("urllib.request").build_opener(late("urllib.request").ProxyHandler({}))
    events: List[Event] = []
    with opener.open(request, timeout=30) as answer:
        for line in answer:
            if line.startswith(b"data: "):
                payload = json.loads(line[6:])
                events.append(Event(payload["type"], payload))
                say("    " + clean(line[6:].decode().strip(), 110))
    return fold(events)


def run_demo(args: Any, env: Mapping[str, str]) -> int:
    """Show the shim at work, a stand-in for the model behind it."""
    with ThreadingHTTPServer(("127.0.0.1", 0), StandIn) as model, \
            late("tempfile").TemporaryDirectory() as folder:
        threading.Thread(target=model.serve_forever, daemon=True).start()
        config = load_config({"port": "0", "base_url": f"http://127.0.0.1:{model.server_port}",
                              "model": "demo", "verbatim": "off", "warm": "off", "log": "error",
                              "rescue": "text,intent"}, {})
        server = open_server(config)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        say("qwencode demo. The answers are canned: a stand-in plays Ollama and the model, so that")
        say("this runs anywhere. The server, the translation and the rescue are the real ones.\n")
        done = _demo_conversation(server.url, folder)
        server.stop()
        server.finish()
        model.shutdown()
    say("\nNext, for the real thing: start Ollama, `ollama pull qwen2.5-coder:14b`, install Claude")
    say("Code with `npm install -g @anthropic-ai/claude-code`, and in your project:")
    say(f'  python "{os.path.abspath(__file__)}" claude')
    return 0 if done else 1


def _demo_conversation(url: str, folder: str) -> bool:
    question = "Write hello.txt with a greeting."
    say(f"1. Claude Code would ask:  {question}")
    say("   The model writes its tool call as plain text; the events that come back:")
    messages: List[Json] = [{"role": "user", "content": question}]
    answer = demo_turn(url, messages)
    calls = [block for block in answer["content"] if block["type"] == "tool_use"]
    if not calls:
        say("The tool call was not found: the demo failed.")
        return False
    call = calls[0]
    path = os.path.join(folder, os.path.basename(call["input"]["file_path"]))
    with open(path, "w", encoding="utf-8") as file:
        file.write(call["input"]["content"])
    say(f"\n2. That is a real {call['name']} call; the demo runs it in a temporary folder:")
    with open(path, encoding="utf-8") as file:
        say(f"   hello.txt now holds {file.read()!r}")
    say("\n3. The tool's result goes back, and the answer comes:")
    messages += [{"role": "assistant", "content": answer["content"]},
                 {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call["id"],
                                               "content": "File created"}]}]
    final = demo_turn(url, messages)
    say(f"   -> {final['content'][0]['text']}")
    return bool(final["stop_reason"] == "end_turn")


TRY_TOOLS = {"Bash": Tool("Bash", "", {"type": "object", "required": ["command"], "properties": {
    "command": {"type": "string"}, "description": {"type": "string"}}})}


def run_try(args: Any, env: Mapping[str, str]) -> int:
    """Carry out one request here, as the rescue would; return the command's exit code."""
    config = load_config(vars(args), env)
    found = find_rescue((Message("user", (Text(" ".join(args.request)),)),), "I'll do that now.")
    if not found:
        say("No rescue: these words are not one clear file operation inside this folder, so the"
            " shim would not act. Name the file, and put its content in quotes.")
        return 1
    call = rescue_call(found.ops, TRY_TOOLS, config.bash_style, config.max_read_bytes)
    if not call or "command" not in call[1]:
        say("No rescue: this cannot be carried by one shell command.")
        return 1
    command = call[1]["command"]
    say(f"rule: {found.rule}\n{call[1].get('description', '')}\n\n{command}\n")
    if args.dry_run:
        return 0
    bash = late("shutil").which("bash")
    if not bash:
        say("There is no bash here to run it; on Windows install Git Bash.")
        return 1
    subprocess = late("subprocess")
    done = subprocess.run([bash, "-c", command], check=False, stdin=subprocess.DEVNULL)
    verdict = "done and verified" if done.returncode == 0 else "not done"
    say(f"exit code {done.returncode}: {verdict}")
    return int(done.returncode)


def _try_arguments(sub: Any) -> None:
    sub.add_argument("request", nargs="+", help="what to do, in words")
    sub.add_argument("--dry-run", action="store_true", help="show the command, run nothing")


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
MODEL_ROLES = ("OPUS", "SONNET", "HAIKU")
DEFAULT_CLIENT_KEY = "qwencode"
# A mode named by the user; as options Claude Code knows them.
MODE_OPTION = Pattern(r"--(?:permission-mode|dangerously-skip-permissions)(?:=.*)?")
PRINT_OPTIONS = ("-p", "--print", "-v", "--version", "-h", "--help")


def client_env(base_url: str, key: str, config: Config, window: int) -> Dict[str, str]:
    """Make the variables of a Claude Code that talks to the shim at base_url.

    The key goes as a Bearer token: an API key would be asked about in a dialog whose
    default is no (CC A11). window is in tokens, 0 where it is not known.
    """
    roles = dict(config.model_map)
    made = {"ANTHROPIC_BASE_URL": base_url, "ANTHROPIC_AUTH_TOKEN": key or DEFAULT_CLIENT_KEY,
            "ANTHROPIC_API_KEY": "", "ANTHROPIC_MODEL": config.model,
            "CLAUDE_CODE_SUBAGENT_MODEL": config.model, **CLIENT_SETTINGS}
    for role in MODEL_ROLES:
        made[f"ANTHROPIC_DEFAULT_{role}_MODEL"] = roles.get(role.lower(), config.model)
    if window:
        made.update(compact_env(window, DEFAULT_MAX_TOKENS))
    return made


def child_env(made: Mapping[str, str], env: Mapping[str, str]) -> Dict[str, str]:
    """Lay made under the environment, which keeps what the user set.

    Not kept: where to send to and with which key, what would lead past the shim, and a
    NO_PROXY that would send loopback requests to a proxy.
    """
    child = {**made, **{name: text for name, text in env.items() if text}}
    for name in ("ANTHROPIC_BASE_URL", "ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_API_KEY"):
        child[name] = made[name]
    for name in CLOUD_SWITCHES:
        child.pop(name, None)
    if not covers_loopback(env):
        there = env.get("NO_PROXY") or env.get("no_proxy") or ""
        child["NO_PROXY"] = child["no_proxy"] = ",".join(
            filter(None, (there, "127.0.0.1,localhost")))
    return child


def covers_loopback(env: Mapping[str, str]) -> bool:
    """Tell whether NO_PROXY keeps loopback requests away from a proxy."""
    names = (env.get("NO_PROXY") or env.get("no_proxy") or "").replace(" ", "").split(",")
    return "*" in names or {"127.0.0.1", "localhost"} <= set(names)


def claude_arguments(passed: Sequence[str], settings: Mapping[str, Any]) -> List[str]:
    """Add --permission-mode default, unless the user named a mode.

    Claude Code's own default, auto, asks Anthropic's servers to judge each action;
    nothing else can answer for them (CC F2).
    """
    permissions = settings.get("permissions")
    chosen = permissions.get("defaultMode") if isinstance(permissions, dict) else None
    if any(map(MODE_OPTION.fullmatch, passed)) or (chosen and chosen != "auto"):
        return list(passed)
    return ["--permission-mode", "default", *passed]


def claude_settings(env: Mapping[str, str]) -> Json:
    """Read Claude Code's settings, the project's over the user's; {} where there are none."""
    merged: Json = {}
    home = claude_home(env)
    for path in (os.path.join(home, "settings.json"),
                 *(os.path.join(".claude", name) for name in ("settings.json",
                                                              "settings.local.json"))):
        with contextlib.suppress(OSError, ValueError), open(path, encoding="utf-8") as file:
            for name, value in _mapping(json.load(file)).items():
                both = isinstance(value, dict) and isinstance(merged.get(name), dict)
                merged[name] = {**merged[name], **value} if both else value
    return merged


def claude_home(env: Mapping[str, str]) -> str:
    """Return Claude Code's folder."""
    return env.get("CLAUDE_CONFIG_DIR") or os.path.join(home_of(env), ".claude")


def home_of(env: Mapping[str, str]) -> str:
    return env.get("USERPROFILE" if os.name == "nt" else "HOME") or os.path.expanduser("~")


def find_claude(env: Mapping[str, str]) -> str:
    """Find the claude program on PATH or where its installer puts it; "" if nowhere."""
    which, home = late("shutil").which, home_of(env)
    places = (None, os.path.join(home, ".local", "bin"), os.path.join(home, ".claude", "local"))
    found = (which("claude", path=env.get("PATH") if place is None else place)
             for place in places)
    return next(filter(None, found), "")


def ease_first_run(passed: Sequence[str], env: Mapping[str, str]) -> None:
    """Spare a new user Claude Code's welcome, which fails without network (CC A11).

    Only where Claude Code has no file yet; one that is there is never touched, and the
    way out is said.
    """
    folder = env.get("CLAUDE_CONFIG_DIR") or home_of(env)
    path = os.path.join(folder, ".claude.json")
    if any(option in PRINT_OPTIONS for option in passed):
        return
    try:
        os.makedirs(folder, exist_ok=True)
        with open(path, "x", encoding="utf-8") as file:
            json.dump({"hasCompletedOnboarding": True}, file)
    except FileExistsError:
        with contextlib.suppress(OSError, ValueError), open(path, encoding="utf-8") as file:
            if not _mapping(json.load(file)).get("hasCompletedOnboarding"):
                tell("Claude Code will greet you first, which needs the internet. Without it, add"
                     f' "hasCompletedOnboarding": true to {path}.')
    except OSError as problem:
        tell(f"{path} could not be written: {problem.strerror}")


def tell(text: str) -> None:
    """Say something beside a command's output."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def run_child(command: Sequence[str], env: Mapping[str, str]) -> int:
    """Run a program on this terminal; return its exit code, 128 + n after signal n.

    Ctrl-C reaches the child from the terminal itself, so that it is only survived here;
    a SIGTERM is passed on.
    """
    signal, subprocess = late("signal"), late("subprocess")
    child = subprocess.Popen(list(command), env=dict(env))
    before = {}
    try:
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
            number = getattr(signal, name, None)
            if number is not None:
                forward = name in ("SIGTERM", "SIGHUP")
                before[number] = signal.signal(
                    number, lambda got, _frame, forward=forward:
                    child.send_signal(got) if forward else None)
        code = int(child.wait())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def claude_command(made: Mapping[str, str], passed: Sequence[str], env: Mapping[str, str],
                   ) -> Tuple[List[str], Dict[str, str]]:
    """Return the command line and environment of Claude Code, and say what is special."""
    for name in CLOUD_SWITCHES:
        if env.get(name):
            tell(f"{name} is left out for Claude Code: it would lead past the shim.")
    ease_first_run(passed, env)
    return ([find_claude(env), *claude_arguments(passed, claude_settings(env))],
            child_env(made, env))


def ask_shim(url: str, path: str, config: Config) -> Json:
    """Ask a shim something within a second; {} where none answers."""
    asking = Upstream(config._replace(base_url=url, auth_token=config.api_key))
    try:
        answer = asking.ask("GET", path, None, Waiter(), time.monotonic() + HEALTH_S + 0.2)
    except ShimError:
        return {}
    return _mapping(answer.body) if answer.status == 200 else {}


def window_of(health: Json) -> int:
    """Take the window out of what /health answers; 0 where it does not tell."""
    window = _mapping(health.get("model")).get("window")
    return window if type(window) is int and window > 0 else 0


def as_served(config: Config, health: Json, args: Any, env: Mapping[str, str]) -> Config:
    """Take the model's name from a shim that runs, unless the user named one here."""
    name = _mapping(health.get("model")).get("name")
    named_here = env.get("OLLAMA_MODEL") or getattr(args, "model", None)
    return config if named_here or not isinstance(name, str) else config._replace(model=name)


def planned_window(config: Config) -> int:
    """Return the window that a shim with this configuration will ask for at least."""
    if config.num_ctx or config.auto_ctx == "off":
        return config.num_ctx or 0
    return int(config.auto_ctx) if config.auto_ctx.isdecimal() else SERVING_WINDOW


def local_url(config: Config) -> str:
    """Return where a client on this machine reaches the shim."""
    host = CONNECTABLE.get(config.host, config.host)
    return f"http://{f'[{host}]' if ':' in host else host}:{config.port}"


def run_client(args: Any, env: Mapping[str, str]) -> int:
    """Start Claude Code against a shim that runs already."""
    config = load_config(vars(args), env)
    if not find_claude(env):
        tell(CLAUDE_MISSING)
        return 127
    named = args.url or ("" if env.get("HOST") or env.get("PORT")
                         else env.get("ANTHROPIC_BASE_URL", ""))
    if named and not BASE_URL.fullmatch(named):
        raise ConfigError("the address of the shim is not a URL such as http://127.0.0.1:8000;"
                          " it comes as an argument or as ANTHROPIC_BASE_URL")
    url = named.rstrip("/") or local_url(config)
    key = args.key or config.api_key or env.get("ANTHROPIC_AUTH_TOKEN") \
        or env.get("ANTHROPIC_API_KEY") or ""
    health = ask_shim(url, "/health", config._replace(api_key=key))
    if not health:
        tell(f"Nothing answers at {url} yet: start ./launch-shim.sh (or python qwencode.py)."
             " Claude Code is started all the same.")
    tell(f"Claude Code -> {url}")
    window = window_of(health) or planned_window(config)
    config = as_served(config, health, args, env)
    return run_child(*claude_command(client_env(url, key, config, window), args.passed, env))


SHELLS = {
    "bash": ("export {name}={value}", "unset {name}", ("'", "'\\''")),
    "fish": ("set -gx {name} {value}", "set -e {name}", ("'", "\\'")),
    "powershell": ("$env:{name} = {value}",
                   "Remove-Item Env:{name} -ErrorAction SilentlyContinue", ("'", "''")),
}


def export_lines(made: Mapping[str, str], shell: str) -> List[str]:
    """Write the variables in a shell's own words; what leads past the shim is unset."""
    setting, removing, (quote, escaped) = SHELLS[shell]
    lines = [removing.format(name=name) for name in CLOUD_SWITCHES]
    for name, value in sorted(made.items()):
        text = value.replace("\\", "\\\\") if shell == "fish" else value
        lines.append(setting.format(name=name, value=f"'{text.replace(quote, escaped)}'"))
    return lines


def run_env(args: Any, env: Mapping[str, str]) -> int:
    """Print the variables for a shell: eval "$(python qwencode.py env)"."""
    config = load_config(vars(args), env)
    windows = os.name == "nt" and not env.get("MSYSTEM")  # set in Git Bash
    usual = "fish" if env.get("SHELL", "").endswith("fish") else "bash"
    shell = args.shell or args.named_shell or ("powershell" if windows else usual)
    url = local_url(config)
    health = ask_shim(url, "/health", config)
    window, config = window_of(health) or planned_window(config), as_served(
        config, health, args, env)
    for line in export_lines(client_env(url, config.api_key, config, window), shell):
        say(line)
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


def version_of(text: str) -> Tuple[int, ...]:
    """Read the first x.y.z of a text; () where there is none."""
    found = THREE_NUMBERS.search(text)
    return tuple(int(part) for part in found.groups()) if found else ()


def dotted(version: Iterable[int]) -> str:
    return ".".join(map(str, version))


def verdict_python(version: Tuple[int, ...]) -> Finding:
    if version < (3, 9):
        return Finding("bad", f"Python {dotted(version)} is too old", "Install 3.9 or newer.")
    return Finding("ok", f"Python {dotted(version)}")


def verdict_ollama(url: str, status: int, version: str) -> Finding:
    """Judge the answer of /api/version."""
    number, line = version_of(version), f"Ollama {version or 'of an unknown version'} at {url}"
    if status != 200 or not version:
        return Finding("warn", f"{url} answers HTTP {status} but does not say that it is Ollama",
                       "Check OLLAMA_BASE_URL.")
    lacks = [text for since, text in OLLAMA_SINCE if (0, 0, 0) < number < since]
    if number == OLLAMA_MISCOUNTS:
        lacks.append("miscounts prompts (only this version)")
    return Finding("warn", f"{line} {'; '.join(lacks)}", UPDATE_OLLAMA) if lacks \
        else Finding("ok", line)


def verdict_model(name: str, present: bool, others: Sequence[str]) -> Finding:
    """Judge whether the model is there; others are the models that are."""
    if name.endswith((":cloud", "-cloud")):
        return Finding("bad", f"{name} runs in Ollama's cloud: prompts would leave this machine",
                       "Choose a local model (OLLAMA_MODEL).")
    if present:
        return Finding("ok", f"model {name}")
    instead = f", or set OLLAMA_MODEL to one of: {', '.join(others[:6])}" if others else ""
    return Finding("bad", f"Ollama does not have {name}", f"Run `ollama pull {name}`{instead}.")


def verdict_capabilities(capabilities: Sequence[str]) -> Finding:
    """Judge what the model says it can do; empty where Ollama does not tell."""
    can = ", ".join(capabilities)
    if not can:
        return Finding("warn", "Ollama does not tell what the model can do", UPDATE_OLLAMA)
    if "completion" not in capabilities:
        return Finding("bad", f"the model cannot chat, only: {can}", BETTER_MODEL)
    if "tools" not in capabilities:
        return Finding("warn", f"the model has no tool support of its own, only: {can}",
                       f"Calls are read from its text instead. {BETTER_MODEL}")
    return Finding("ok", f"capabilities: {can}")


def verdict_window(trained: int, asked: int, real: int) -> Finding:
    """Judge the window in tokens; 0 is unknown."""
    known = (("real", real), ("asked for", asked), ("trained", trained))
    line = "context window: " + (", ".join(
        f"{count:,} {word}" for word, count in known if count) or "unknown")
    window = real or asked
    small = judge_explicit(window, FIRST_PROMPT_TOKENS) if window else None
    if small and 0 < trained < SERVING_WINDOW:
        return Finding("bad", f"{line}; the model was trained for too little", BETTER_MODEL)
    if small:
        return Finding("bad", f"{line}; {small}", f"Set OLLAMA_NUM_CTX={SERVING_WINDOW} or more.")
    if not window:
        return Finding("warn", line, "Run `doctor` without --quick, which loads the model.")
    return Finding("ok", line)


def verdict_memory(loaded: Loaded) -> Finding:
    if not loaded.size:
        return Finding("warn", "Ollama does not tell where the model lies", SEE_OLLAMA)
    share = 100 * min(loaded.size_vram, loaded.size) // loaded.size
    line = f"{share} % of {loaded.size / 1e9:.1f} GB in graphics memory"
    if share >= 99:
        return Finding("ok", line)
    return Finding("warn", f"{line}; the rest is slow", "Choose a smaller model or OLLAMA_NUM_CTX,"
                   " or start Ollama with OLLAMA_KV_CACHE_TYPE=q8_0.")


def verdict_template(prompt: str) -> Finding:
    """Judge how Ollama rendered PROBE_MESSAGES and a system message after them."""
    if not prompt:
        return Finding("warn", "Ollama does not show how it renders a prompt", UPDATE_OLLAMA)
    reminder = prompt.find("probe reminder")
    defects = [text for found, text in (
        (GO_STRUCT.search(prompt), "prints tool definitions as Go structs"),
        ("ProbeTool" not in prompt.partition("probe question")[0], "leaves tools out"),
        ("probe value" not in prompt, "drops tool calls that follow text"),
        (reminder < 0, "drops later system messages"),
        (0 <= reminder < prompt.find("probe question"), "moves later system messages to the top"),
    ) if found]
    if not defects:
        return Finding("ok", "the prompt template keeps tools, calls and system messages")
    return Finding("warn", f"the prompt template {', '.join(defects)}",
                   "Nothing to do: the shim writes these parts itself.")


def tool_calls_in(content: Any) -> List[Any]:
    """Take the inputs of the doctor's tool out of an answer's content."""
    blocks = content if isinstance(content, list) else []
    return [block.get("input") for block in blocks if _mapping(block).get("name") == "doctor_probe"]


def verdict_call(content: Any, word: str, problem: str) -> Finding:
    """Judge the answer to the order to call the tool with word."""
    calls = tool_calls_in(content)
    if problem:
        return Finding("bad", f"a live tool call failed: {problem}", SEE_OLLAMA)
    if not calls:
        return Finding("bad", "told to call a tool, the model wrote words", BETTER_MODEL)
    if calls[0] != {"word": word}:
        return Finding("warn", "a live tool call came with wrong arguments", BETTER_MODEL)
    return Finding("ok", "a live tool call")


def verdict_rescue(content: Any, word: str, problem: str) -> Finding:
    """Judge the answer to the order to write a call as text."""
    if problem:
        return Finding("bad", f"a live rescue failed: {problem}", SEE_OLLAMA)
    if {"word": word} in tool_calls_in(content):
        return Finding("ok", "a call that the model wrote as text became a real one")
    if "doctor_probe" in to_json(content):
        return Finding("bad", "a call that the model wrote as text stayed text",
                       "Set SHIM_RESCUE=text,intent.")
    return Finding("warn", "the model would not write a call as text: no rescue was seen",
                   "Nothing to do.")


def verdict_truncation(status: int, window: int) -> Finding:
    """Judge the HTTP status of a prompt beyond the window."""
    if status == 400:
        return Finding("ok", f"a prompt beyond {window:,} tokens is refused, not cut in silence")
    if status == 200:
        return Finding("bad", "Ollama cut a prompt beyond its window in silence", UPDATE_OLLAMA)
    return Finding("warn", f"a prompt beyond the window got HTTP {status}", SEE_OLLAMA)


def verdict_reuse(first_s: float, second_s: float, tokens: int) -> Finding:
    """Judge two turns of which the second begins with the first one's prompt."""
    line = f"{tokens:,} tokens were read in {first_s:.1f} s, and on the next turn in {second_s:.1f}"
    if second_s <= max(0.5, first_s / 2):
        return Finding("ok", line)
    return Finding("warn", f"{line}: nothing was kept", "Another program uses this model with other"
                   " options, or OLLAMA_NUM_PARALLEL is above 1: see `ollama ps`.")


def verdict_cancel(seconds: float) -> Finding:
    line = f"{seconds:.1f} s after a request was broken off the next one was answered"
    return Finding("ok", line) if seconds <= SLOW_CANCEL_S else Finding("warn", line, SEE_OLLAMA)


def verdict_speed(read_per_s: float, write_per_s: float) -> Finding:
    """Judge tokens a second; 0 is unknown."""
    if not read_per_s or not write_per_s:
        return Finding("warn", "Ollama gave no times: the speed is unknown", UPDATE_OLLAMA)
    wait_s = FIRST_PROMPT_TOKENS / read_per_s
    line = (f"reads {read_per_s:,.0f} and writes {write_per_s:.1f} tokens a second: a session's"
            f" first answer begins after about {wait_s:.0f} s")
    if wait_s <= SLOW_FIRST_ANSWER_S and write_per_s >= SLOW_TOKENS_PER_S:
        return Finding("ok", line)
    return Finding("warn", line, "Choose a smaller model, or one that fits into graphics memory"
                   " (`python qwencode.py models`).")


def verdict_bash(path: str, missing: Sequence[str], windows: bool) -> Finding:
    """Judge the shell of Claude Code; missing are programs that it does not find."""
    if not path:
        return Finding("bad", "bash was not found", "Install Git for Windows (https://git-scm.com),"
                       " or set CLAUDE_CODE_GIT_BASH_PATH." if windows else "Install bash.")
    if missing:
        return Finding("warn", f"bash at {path} lacks {', '.join(missing)}",
                       "Install them: the commands of a rescue use them.")
    return Finding("ok", f"bash at {path}, with all that a rescue's commands use")


def verdict_claude(path: str, version: str) -> Finding:
    """Judge the installed Claude Code by what `claude --version` says."""
    if not path:
        return Finding("bad", "claude was not found", CLAUDE_MISSING)
    number = version_of(version)
    line = f"claude {dotted(number) or 'of an unknown version'} at {path}"
    if TESTED_CLAUDE[0] <= number <= TESTED_CLAUDE[-1]:
        return Finding("ok", line)
    return Finding("warn", f"{line}; tested: {', '.join(map(dotted, TESTED_CLAUDE))}",
                   "If it misbehaves: npm install -g @anthropic-ai/claude-code@"
                   + dotted(TESTED_CLAUDE[-1]))


def verdict_port(address: str, problem: str, ours: bool) -> Finding:
    """Judge the address to listen on; problem is why it cannot be bound."""
    if ours:
        return Finding("ok", f"a shim answers at {address}")
    if problem:
        return Finding("warn", f"{address} cannot be used", problem)
    return Finding("ok", f"{address} is free")


def verdict_environment(env: Mapping[str, str], settings: Json, upstream_host: str) -> Finding:
    """Judge what may send prompts elsewhere; settings is the `env` of settings.json."""
    places = (("the environment", env), ("Claude Code's settings.json", settings))
    seen = [f"{name} in {place}" for place, values in places for name in CLOUD_SWITCHES
            if values.get(name)]
    for place, values in places:
        host = header_host(str(values.get("ANTHROPIC_BASE_URL") or "").partition("://")[2]
                           .partition("/")[0])
        if host and not is_loopback(host):
            seen.append(f"ANTHROPIC_BASE_URL in {place} is {host}")
    if not is_loopback(upstream_host):
        seen.append(f"OLLAMA_BASE_URL is {upstream_host}")
    if any(env.get(name) for name in PROXIES) and not covers_loopback(env):
        seen.append("a proxy is set and NO_PROXY lacks 127.0.0.1,localhost")
    if not seen:
        return Finding("ok", "nothing in the environment sends prompts elsewhere")
    return Finding("warn", "; ".join(seen), "Prompts may leave this machine: unset what you did not"
                   " mean. `claude` and `env` clear the environment, never settings.json.")


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


class Ticker(Waiter):
    """Wait for Ollama and show on a terminal how long that takes already."""

    def __init__(self, what: str) -> None:
        self.what, self.since = what, time.monotonic()

    def wait(self, sock: socket.socket, writing: bool, until: float) -> bool:
        while not super().wait(sock, writing, min(until, time.monotonic() + 1.0)):
            if time.monotonic() >= until:
                return False
            self.show(f"\r{self.what} ... {time.monotonic() - self.since:.0f} s ")
        return True

    @staticmethod
    def show(text: str) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(text)
            sys.stderr.flush()


@contextlib.contextmanager
def ticking(what: str) -> Iterator[Ticker]:
    """Show a progress line until the block ends."""
    ticker = Ticker(what)
    try:
        yield ticker
    finally:
        ticker.show("\r" + " " * (len(what) + 12) + "\r")


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


class Doctor:
    """What the checks share: the configuration, a shim of their own, what Ollama said."""

    def __init__(self, config: Config, env: Mapping[str, str], server: ShimServer,
                 quick: bool = False) -> None:
        self.config, self.env, self.server, self.quick = config, env, server, quick
        self.model = LocalModel(ModelFacts(config.model))
        self.loaded = Loaded()
        self.speed = (0.0, 0.0)
        self.wait_s = config.first_token_timeout_ms / 1000

    def ask(self, path: str, body: Optional[Json] = None, what: str = "asking Ollama") -> Answer:
        """Ask Ollama; what concerns a model may take as long as a first token."""
        with ticking(what) as ticker:
            return self.server.upstream.ask(
                "POST" if body else "GET", path, to_json(body) if body else None, ticker,
                time.monotonic() + (self.wait_s if body else OLLAMA_ANSWER_S))

    def body(self, tokens: Optional[int] = None, **fields: Any) -> Json:
        """Make a body whose load options are those of every turn."""
        limit = {} if tokens is None else {"num_predict": tokens, "temperature": 0}
        return {"model": self.config.model, "truncate": False, "shift": False, "stream": False,
                "keep_alive": keep_alive_value(self.config.keep_alive),
                "options": {**load_options(self.model.num_ctx), **limit}, **fields}

    def chat(self, messages: List[Json], tokens: int, what: str) -> Json:
        """Ask the model; raise a ShimError where that fails."""
        answer = self.ask("/api/chat", self.body(tokens, messages=messages, think=False), what)
        if answer.status != 200:
            raise upstream_error(answer.status, answer.text, self.config.model)
        return _mapping(answer.body)

    def learn(self) -> None:
        """Ask what the model is; raise ModelMissingError where it is not there."""
        name = self.config.model
        answer = self.ask("/api/show", {"model": name})
        error = upstream_error(answer.status, answer.text, name) if answer.status != 200 else None
        if isinstance(error, ModelMissingError):
            raise error
        self.model = LocalModel(facts_from_show(name, answer.body), self.config.num_ctx)

    def load(self) -> Loaded:
        """Choose the window and load the model; raise a ShimError where that fails."""
        begun, name = time.monotonic(), self.config.model
        with ticking(f"loading {name}") as ticker:
            self.model = self.server.registry.model(name, ticker, begun + self.wait_s)
        answer = self.ask("/api/generate", self.body(), f"loading {name}")
        if answer.status != 200:
            raise upstream_error(answer.status, answer.text, name)
        self.loaded = self.look()._replace(seconds=time.monotonic() - begun)
        return self.loaded

    def look(self) -> Loaded:
        """See how the model is loaded, if it is."""
        row = _mapping(self.server.registry._loaded_row(
            self.model.facts, Waiter(), time.monotonic() + OLLAMA_ANSWER_S))
        return Loaded(*(natural(row.get(key)) for key in ("context_length", "size", "size_vram")))

    def messages(self, system: str, text: str, what: str) -> Tuple[Json, str]:
        """Send a Messages request through the shim; return its answer and what failed."""
        asking = Upstream(self.config._replace(base_url=self.server.url,
                                               auth_token=self.config.api_key))
        body = to_json({"model": self.config.model, "max_tokens": 300, "system": system,
                        "thinking": {"type": "disabled"},
                        "messages": [{"role": "user", "content": text}], "tools": [DOCTOR_TOOL]})
        try:
            with ticking(what) as ticker:
                answer = asking.ask("POST", "/v1/messages", body, ticker,
                                    time.monotonic() + 2 * self.wait_s)
        except ShimError as error:
            return {}, error.message
        failed = _mapping(_mapping(answer.body).get("error")).get("message")
        return _mapping(answer.body), str(failed or "") if answer.status != 200 else ""


def check_python(_doctor: Doctor) -> Finding:
    return verdict_python(tuple(sys.version_info[:3]))


def check_ollama(doctor: Doctor) -> Finding:
    answer = doctor.ask("/api/version")
    version = _mapping(answer.body).get("version")
    return verdict_ollama(doctor.server.upstream.url, answer.status, str(version or ""))


def check_model(doctor: Doctor) -> Finding:
    others, present = [], True
    try:
        doctor.learn()
    except ModelMissingError:
        others, present = [one["name"] for one in model_rows(doctor.ask("/api/tags").body)], False
    return verdict_model(doctor.config.model, present, others)


def check_capabilities(doctor: Doctor) -> Finding:
    return verdict_capabilities(tuple(sorted(doctor.model.facts.capabilities or ())))


def check_load(doctor: Doctor) -> Finding:
    return Finding("ok", f"loaded in {doctor.load().seconds:.1f} s; {doctor.model.reason}")


def check_window(doctor: Doctor) -> Finding:
    loaded, facts = doctor.look(), doctor.model.facts
    return verdict_window(facts.trained or 0, doctor.model.num_ctx or facts.num_ctx or 0,
                          loaded.window)


def check_memory(doctor: Doctor) -> Finding:
    return verdict_memory(doctor.loaded)


def check_template(doctor: Doctor) -> Finding:
    body = probe_body(doctor.config.model, load_options(doctor.model.num_ctx))
    body["messages"].append({"role": "system", "content": "probe reminder"})
    answer = doctor.ask("/api/chat", body)
    return verdict_template(rendered_prompt(answer.body) or "")


def check_call(doctor: Doctor) -> Finding:
    answer, problem = doctor.messages(
        "You call tools.", "Call the tool doctor_probe with word set to kiwi. Write nothing else.",
        "a live tool call")
    return verdict_call(answer.get("content") or [], "kiwi", problem)


def check_rescue(doctor: Doctor) -> Finding:
    call = '```json\n{"name": "doctor_probe", "arguments": {"word": "plum"}}\n```'
    answer, problem = doctor.messages(
        "Repeat the user's message exactly, as plain text. Write nothing else.", call,
        "a call written as text")
    return verdict_rescue(answer.get("content") or [], "plum", problem)


def check_truncation(doctor: Doctor) -> Finding:
    window = doctor.loaded.window or doctor.model.window or SERVING_WINDOW
    body = doctor.body(1, messages=[{"role": "user", "content": "7 " * 2 * window}])
    answer = doctor.ask("/api/chat", body, "a prompt that is too long")
    return verdict_truncation(answer.status, window)


def check_reuse(doctor: Doctor) -> Finding:
    """Time a cold prompt and one that begins with it; the speed comes from the same two."""
    cold = [{"role": "user", "content": f"{fresh_id()} {FILLER * PREFILL_WORDS} Count to forty."}]
    answers = [doctor.chat(cold, 64, "reading 3,000 tokens")]
    reply = {"role": "assistant", "content": str(
        _mapping(answers[0].get("message")).get("content") or "")}
    answers.append(doctor.chat([*cold, reply, {"role": "user", "content": "Go on."}], 8,
                               "reading them again"))
    first, second = map(_finish, answers)
    doctor.speed = ((first.prompt_tokens or 0) / first.prompt_s if first.prompt_s else 0.0,
                    (first.output_tokens or 0) / first.output_s if first.output_s else 0.0)
    return verdict_reuse(first.prompt_s, second.prompt_s, first.prompt_tokens or 0)


def check_cancel(doctor: Doctor) -> Finding:
    """Break a long answer off and see how soon the next one comes."""
    waiter, until = Waiter(), time.monotonic() + doctor.wait_s
    body = doctor.body(2000, think=False, stream=True, messages=[
        {"role": "user", "content": "Count from one to five hundred."}])
    with doctor.server.upstream.open("POST", "/api/chat", to_json(body), waiter, until) as call:
        call.read_head(until)
        call.read(until)
    begun = time.monotonic()
    doctor.chat([{"role": "user", "content": "Say ok."}], 1, "after a request broken off")
    return verdict_cancel(time.monotonic() - begun)


def check_speed(doctor: Doctor) -> Finding:
    return verdict_speed(*doctor.speed)


def find_bash(env: Mapping[str, str]) -> str:
    """Find the bash that Claude Code runs: on Windows Git's, never that of WSL."""
    which, path = late("shutil").which, env.get("PATH")
    if os.name != "nt":
        return which("bash", path=path) or ""
    git = which("git", path=path) or r"C:\Program Files\Git\cmd\git.exe"
    folder = os.path.dirname(os.path.dirname(git))
    places = (env.get("CLAUDE_CODE_GIT_BASH_PATH", ""), os.path.join(folder, "bin", "bash.exe"))
    return next(filter(os.path.isfile, places), "")


def check_bash(doctor: Doctor) -> Finding:
    path = find_bash(doctor.env)
    missing = "".join(output_of([path, "-c", "for p in " + " ".join(SHELL_PROGRAMS)
                                 + '; do type "$p" >/dev/null 2>&1 || echo "$p"; done'],
                                doctor.env)).split() if path else ()
    return verdict_bash(path, missing, os.name == "nt")


def check_claude(doctor: Doctor) -> Finding:
    path = find_claude(doctor.env)
    return verdict_claude(path, output_of([path, "--version"], doctor.env) if path else "")


def check_port(doctor: Doctor) -> Finding:
    config = doctor.config
    address = f"{config.host}:{config.port}"
    ours = "ok" in ask_shim(local_url(config), "/health", config)
    try:
        if not ours:
            open_server(config).server_close()
    except ConfigError as problem:
        return verdict_port(address, f"{problem}.", ours)
    return verdict_port(address, "", ours)


def check_environment(doctor: Doctor) -> Finding:
    settings = _mapping(claude_settings(doctor.env).get("env"))
    return verdict_environment(doctor.env, settings, doctor.server.upstream.host)


def output_of(command: Sequence[str], env: Mapping[str, str]) -> str:
    """Run a program and return what it says, "" where it cannot be run."""
    subprocess = late("subprocess")
    try:
        done = subprocess.run(command, env=dict(env), stdin=subprocess.DEVNULL, timeout=20,
                              capture_output=True, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return str(done.stdout.decode("utf-8", "replace"))


class Check(NamedTuple):
    """A check: after names the one without which it is skipped; loads the model or not."""

    name: str
    run: Callable[[Doctor], Finding]
    after: str = ""
    loads: bool = False


CHECKS: Tuple[Check, ...] = (
    Check("python", check_python),
    Check("ollama", check_ollama),
    Check("model", check_model, "ollama"),
    Check("capabilities", check_capabilities, "model"),
    Check("load", check_load, "model", True),
    Check("window", check_window, "model"),
    Check("memory", check_memory, "load", True),
    Check("template", check_template, "load", True),
    Check("tool call", check_call, "load", True),
    Check("rescue", check_rescue, "load", True),
    Check("truncation", check_truncation, "load", True),
    Check("reuse", check_reuse, "load", True),
    Check("cancel", check_cancel, "load", True),
    Check("speed", check_speed, "load", True),
    Check("bash", check_bash),
    Check("claude", check_claude),
    Check("port", check_port),
    Check("environment", check_environment),
)


def examine(doctor: Doctor) -> Iterator[Tuple[str, Finding]]:
    """Run the checks in the order in which things break."""
    broken: Set[str] = set()
    for check in CHECKS:
        if check.loads and doctor.quick:
            continue
        if check.after in broken:
            broken.add(check.name)
            yield check.name, Finding("skip", f"{check.name}: not checked")
            continue
        try:
            found = check.run(doctor)
        except ShimError as error:
            told = isinstance(error, UpstreamRefusedError)  # it says what to do itself
            found = Finding("bad", error.message, "" if told else SEE_OLLAMA)
        if found.ok == "bad":
            broken.add(check.name)
        yield check.name, found


MARKS = {"ok": ("\u2713", "ok", "32"), "warn": ("!", "!", "33"), "bad": ("\u2717", "x", "31"),
         "skip": ("-", "-", "")}


def finding_lines(found: Finding, colour: bool, unicode: bool) -> List[str]:
    """Write a finding and, below it, its cure."""
    mark, plain, code = MARKS[found.ok]
    lines = [f"{paint(mark if unicode else plain, code, colour)} {found.line}"]
    return lines + ([f"  {found.cure}"] if found.cure else [])


def run_doctor(args: Any, env: Mapping[str, str]) -> int:
    """Check and prove; return 1 if something is broken."""
    config = load_config(vars(args), env)
    secrets = secrets_of(config)
    rows: List[Tuple[str, Finding]] = []
    with running_server(config._replace(log="error", api_key="")) as server:
        for name, found in examine(Doctor(config, env, server, args.quick)):
            shown = Finding(found.ok, clean(redact(found.line, secrets), 600),
                            clean(redact(found.cure, secrets), 600))
            rows.append((name, shown))
            if not args.json:
                for line in finding_lines(shown, wants_colour(sys.stdout, env), speaks_unicode()):
                    say(line)
    broken = any(found.ok == "bad" for _, found in rows)
    if args.json:
        say(json.dumps({"version": __version__, "ok": not broken, "checks": [
            {"name": name, **found._asdict()} for name, found in rows]}, indent=1))
    return 1 if broken else 0


def speaks_unicode() -> bool:
    """Tell whether the output can carry a check mark (cmd.exe often cannot)."""
    return "utf" in (getattr(sys.stdout, "encoding", None) or "").lower()


def wants_colour(stream: Any, env: Mapping[str, str]) -> bool:
    """Colour a terminal, and never with NO_COLOR (no-color.org)."""
    return bool(stream.isatty()) and not env.get("NO_COLOR") and env.get("TERM") != "dumb"


# ------------------------------ claude ------------------------------


def same_shim(config: Config) -> str:
    """Return the address of a healthy shim that serves this configuration, "" if none."""
    url = local_url(config)
    status = ask_shim(url, "/status", config) if config.port else {}
    wanted = json.loads(to_json(shown_options(config)))
    same = status.get("version") == __version__ and status.get("options") == wanted
    return url if same and _mapping(status.get("health")).get("ok") else ""


def run_claude(args: Any, env: Mapping[str, str]) -> int:
    """Start a shim, wait for the model, start Claude Code; stop what was started."""
    config = load_config(vars(args), env)
    if not find_claude(env):
        tell(CLAUDE_MISSING)
        return 127
    joined = same_shim(config)
    if joined:
        tell(f"Using the shim that runs at {joined}")
        window = window_of(ask_shim(joined, "/health", config)) or planned_window(config)
        made = client_env(joined, config.api_key, config, window)
        return run_child(*claude_command(made, args.passed, env))
    # Claude Code draws on this terminal: the shim's log would spoil it.
    terminal, (handle, path) = sys.stderr, late("tempfile").mkstemp(".log", "qwencode-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file, contextlib.redirect_stderr(file), \
                running_server(config) as server:
            with contextlib.redirect_stderr(terminal):
                made = wait_for_model(Doctor(config, env, server), path)
                command = claude_command(made, args.passed, env)
            return run_child(*command)
    except ShimError as error:
        tell(redact(error.message, secrets_of(config)))
        return 1
    finally:
        if not os.path.getsize(path):
            os.remove(path)


def wait_for_model(doctor: Doctor, log: str) -> Dict[str, str]:
    """Load the model, say what came of it, and make Claude Code's variables."""
    config = doctor.config
    doctor.learn()
    loaded = doctor.load()
    share = f", {100 * loaded.size_vram // loaded.size} % in graphics memory" if loaded.size else ""
    tell(f"{config.model} is ready after {loaded.seconds:.0f} s{share}; {doctor.model.reason}\n"
         f"Status page {doctor.server.url}/  log {log}")
    return client_env(doctor.server.url, config.api_key, config,
                      doctor.model.window or loaded.window or planned_window(config))


# ------------------------------ models and explain ------------------------------


class ModelRow(NamedTuple):
    """A model that Ollama has; size in bytes, window as trained."""

    name: str
    size: int
    window: int
    capabilities: Tuple[str, ...]
    loaded: str = ""


# Families from the best at tools on; a model that none of them names comes last.
FAMILIES = ("qwen3-coder", "qwen3.8", "qwen3.6", "qwen3.5", "qwen3-next", "qwen3", "qwen2.5-coder",
            "qwen")
# What to pull into how much memory, in GB, when nothing suitable is there.
PULLS = ((20.0, "qwen3-coder:30b"), (10.0, "qwen2.5-coder:14b"), (6.0, "qwen3:8b"),
         (0.0, "qwen3:4b"))
# Share of memory that the weights may take; the rest is for the window's cache.
WEIGHTS_SHARE = 0.8


def recommend(rows: Iterable[ModelRow], memory: float) -> str:
    """Choose a model for memory in bytes, 0 where it is not known; "" if none will do."""
    fits = [row for row in rows if "tools" in row.capabilities
            and (not memory or row.size <= memory * WEIGHTS_SHARE)]

    def merit(row: ModelRow) -> Tuple[int, int]:
        family = next((place for place, name in enumerate(FAMILIES) if name in row.name),
                      len(FAMILIES))
        return (-family, row.size)

    return max(fits, key=merit).name if fits else ""


def gpu_bytes(env: Mapping[str, str]) -> float:
    """Ask the NVIDIA driver for the memory of all GPUs; 0 where it is not known."""
    words = output_of(["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"],
                      env).split()
    return sum(float(word) for word in words if word.isdecimal()) * 2**20


def run_models(args: Any, env: Mapping[str, str]) -> int:
    """List what Ollama has and which of it suits Claude Code here."""
    config = load_config(vars(args), env)
    upstream, waiter = Upstream(config), Waiter()

    def ask(method: str, path: str, body: Optional[str] = None) -> Any:
        return upstream.ask(method, path, body, waiter, time.monotonic() + OLLAMA_ANSWER_S).body

    try:
        tags = model_rows(ask("GET", "/api/tags"))
        loaded = {row["name"]: row for row in model_rows(ask("GET", "/api/ps"))}
        facts = [facts_from_show(row["name"], ask("POST", "/api/show", to_json(
            {"model": row["name"]}))) for row in tags]
    except ShimError as error:
        tell(redact(error.message, secrets_of(config)))
        return 1
    rows = [ModelRow(fact.name, _count(tag.get("size")) or 0, fact.trained or 0,
                     tuple(sorted(fact.capabilities or ())), loaded_text(loaded.get(fact.name)))
            for tag, fact in zip(tags, facts)]
    say(f"{'MODEL':32} {'SIZE':>8} {'WINDOW':>8}  TOOLS  LOADED")
    for row in rows:
        mark = "*" if row.name in (config.model, config.model + ":latest") else " "
        say(f"{mark}{clean(row.name):31} {row.size / 1e9:5.1f} GB {window_text(row.window):>8}"
            f"  {'yes' if 'tools' in row.capabilities else 'no':5}  {row.loaded}")
    memory = gpu_bytes(env)
    best = recommend(rows, memory)
    room = f" in {memory / 1e9:.0f} GB of graphics memory" if memory else ""
    pull = next(name for least, name in PULLS if memory / 1e9 >= least)
    there = any(row.name in (config.model, config.model + ":latest") for row in rows)
    say(("* is OLLAMA_MODEL." if there else f"OLLAMA_MODEL, {config.model}, is not among them.")
        + f" Recommended{room}: " + (best or f"ollama pull {pull}"))
    return 0


def loaded_text(row: Optional[Json]) -> str:
    """Say with which window a model is loaded, and where."""
    if row is None:
        return ""
    size, inside = _count(row.get("size")) or 0, _count(row.get("size_vram")) or 0
    share = f", {100 * inside // size} % in graphics memory" if size else ""
    return window_text(_count(row.get("context_length")) or 0) + share


def explain(request: Request, facts: ModelFacts, config: Config) -> Json:
    """Say what a request becomes: the upstream body, what was left out and why, tokens."""
    session = Session()
    table = session.table(request, config.max_tools)
    tools, tools_json = session.tools(table, config.prompt == "slim", facts, "")
    names, left_out = [tool.name for tool in table.sent], []

    def shorten(text: str) -> str:
        short, gone = slim_text(text, names) if config.prompt == "slim" else (text, [])
        left_out.extend(gone)
        return short

    messages = chat_messages(request, tools, facts, lambda index, turn: None, shorten)
    answered = local_answer(request, config)
    body = chat_body(request, facts, config, {
        **load_options(config.num_ctx), "num_predict": request.max_tokens},
        messages_json=session.written.write(messages)[0], tools_json=tools_json)
    counts = [estimate_tokens(message.content) for message in messages]
    known = next((place + 1 for place in range(len(messages) - 1, -1, -1)
                  if messages[place].role == "assistant"), 0)
    return {
        "model": config.model, "path": facts.path or "unknown: Ollama was not asked",
        "answered_without_the_model": answered.rule if answered else "",
        "tools": {"sent": names, "dropped": {
            tool.name: why_dropped(tool.name, request, config) for tool in request.tools
            if tool.name not in names}},
        "left_out_of_the_texts": left_out,
        "tokens": {"as_the_client_sent_it": count_request(request),
                   "tools": estimate_tokens(tools_json), "messages": sum(counts)},
        "prefix": {"known_from_the_last_turn": sum(counts[:known]), "new": sum(counts[known:])},
        "body": json.loads(body)}


def why_dropped(name: str, request: Request, config: Config) -> str:
    if name == PLACEHOLDER_TOOL:
        return "it stands for tools that are not loaded"
    if request.tool_choice.kind == "none":
        return "tool_choice is none"
    return f"beyond SHIM_MAX_TOOLS={config.max_tools}; a call of it would still go through"


def run_explain(args: Any, env: Mapping[str, str]) -> int:
    """Show what a Messages body would become: nothing is sent to the model."""
    config = load_config(vars(args), env)
    try:
        data = sys.stdin.buffer.read() if args.file == "-" else \
            late("pathlib").Path(args.file).read_bytes()
        request = parse_request(parse_json(data))
    except OSError as problem:
        raise ConfigError(f"{args.file} cannot be read ({problem.strerror}); name a file that"
                          " holds a request body, or - for standard input") from None
    except (ValueError, BadRequestError) as problem:
        raise ConfigError(f"{args.file} holds no request for /v1/messages:"
                          f" {clean(str(problem))}") from None
    upstream = Upstream(config)
    facts = ModelFacts(config.model)
    with contextlib.suppress(ShimError):
        facts = facts_from_show(config.model, upstream.ask(
            "POST", "/api/show", to_json({"model": config.model}), Waiter(),
            time.monotonic() + HEALTH_S).body)
    say(json.dumps(explain(request, facts, config), indent=1, ensure_ascii=False))
    return 0


def _client_arguments(sub: Any) -> None:
    sub.add_argument("url", nargs="?", default="", help="base URL (default http://HOST:PORT)")
    sub.add_argument("key", nargs="?", default="", help="key of the shim (default SHIM_API_KEY)")


def _doctor_arguments(sub: Any) -> None:
    sub.add_argument("--json", action="store_true", help="print JSON")
    sub.add_argument("--quick", action="store_true", help="skip what loads the model")


def _env_arguments(sub: Any) -> None:
    sub.add_argument("shell", nargs="?", choices=sorted(SHELLS), help="default: this one")
    sub.add_argument("--shell", dest="named_shell", choices=sorted(SHELLS), help="the same")


def _explain_arguments(sub: Any) -> None:
    sub.add_argument("file", help="file that holds the body, or - for standard input")


class Command(NamedTuple):
    """A subcommand: its name, help, own arguments and function."""

    name: str
    help: str
    arguments: Callable[[Any], None]
    run: Callable[[Any, Mapping[str, str]], int]


COMMANDS: Tuple[Command, ...] = (
    Command("serve", "serve the Messages API (the default)", lambda sub: None, run_serve),
    Command("demo", "see it work without Ollama or Claude Code", lambda sub: None, run_demo),
    Command("try", "carry out one request here, as the rescue would", _try_arguments, run_try),
    Command("claude", "start a shim and Claude Code on it; arguments for claude after --",
            lambda sub: None, run_claude),
    Command("client", "start Claude Code on a shim that runs; arguments for claude after --",
            _client_arguments, run_client),
    Command("doctor", "check everything, prove what can be proved, say the cures",
            _doctor_arguments, run_doctor),
    Command("models", "list Ollama's models and which one suits", lambda sub: None, run_models),
    Command("env", "print the variables for Claude Code", _env_arguments, run_env),
    Command("explain", "show what a Messages body would become", _explain_arguments, run_explain),
)


def main(argv: Sequence[str], env: Mapping[str, str]) -> int:
    """Run a command; returns its exit code. 2 is a mistake of the user's."""
    own, passed = list(argv), []
    if "--" in own:
        own, passed = own[:own.index("--")], own[own.index("--") + 1:]
    try:
        # Making the parser takes 6 % of a start; a bare `qwencode.py` needs none.
        args = make_parser().parse_args(own) if own else SimpleNamespace(command="serve")
    except SystemExit as end:
        if end.code == 2 and not passed and own[0] in ("claude", "client"):
            tell("What is meant for claude itself goes after --, as in: -- -p 'hello'")
        return end.code if isinstance(end.code, int) else 2
    args.passed = passed
    command = next(c for c in COMMANDS if c.name == (args.command or "serve"))
    try:
        return command.run(args, env)
    except ConfigError as problem:
        sys.stderr.write(f"qwencode: {problem}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141


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
