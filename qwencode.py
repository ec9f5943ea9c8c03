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

import json
import re
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Tuple,
    Union,
)

__version__ = "0.1.0"

Json = Dict[str, Any]


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
# Bytes of one upstream line: Ollama's own client stops at 8 MB, its runner hop too,
# but a relay may put more behind it (contract/ollama.md 2, "Line length").
MAX_LINE_BYTES = 32 * 1024 * 1024
# Characters of held text behind a possible tool call where later words may decide.
MAX_HOLD_CHARS = 4096


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
    """The words that make Claude Code compact (contract/claude-code.md B5)."""

    def __init__(self, tokens: int, maximum: int) -> None:
        super().__init__(f"prompt is too long: {tokens} tokens > {maximum} maximum")
        self.tokens, self.maximum = tokens, maximum


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
           "use the model named in the request instead of OLLAMA_MODEL"),
    Option("model_map", "SHIM_MODEL_MAP", "", "text",
           "local models by role, for example haiku=qwen3:4b,opus=qwen3-coder:30b"),
    Option("small_model", "SHIM_SMALL_MODEL", "", "text",
           "model for background requests such as session titles"),
    Option("log", "SHIM_LOG", "info", "choice",
           "how much is logged; debug includes prompts and answers",
           ("error", "warn", "info", "debug")),
    Option("log_format", "SHIM_LOG_FORMAT", "text", "choice", "form of the log",
           ("text", "json")),
    Option("max_read_bytes", "SHIM_MAX_READ_BYTES", "200000", "count",
           "bytes that a rescued read shows before it is cut with a notice"),
    Option("timeout_ms", "SHIM_REQUEST_TIMEOUT_MS", "120000", "milliseconds",
           "longest silence of Ollama within an answer"),
    Option("first_token_timeout_ms", "SHIM_FIRST_TOKEN_TIMEOUT_MS", "", "milliseconds",
           "longest wait for the first byte, which holds model load and prefill"
           " (600000, or SHIM_REQUEST_TIMEOUT_MS where that is set)"),
    Option("cors_wildcard", "SHIM_ALLOW_CORS_WILDCARD", "off", "bool",
           "answer CORS preflights of every origin, not only localhost"),
    Option("keep_alive", "SHIM_KEEP_ALIVE", "-1", "text",
           "how long Ollama keeps the model loaded: seconds, a duration such as 30m, -1 for ever"),
    Option("rescue", "SHIM_RESCUE", "text,intent", "list",
           "rescues in force: text (tool calls written as text), intent (actions described)",
           ("text", "intent", "off")),
    Option("verbatim", "SHIM_VERBATIM", "auto", "choice",
           "read the model's own text instead of Ollama's parse of it", ("auto", "on", "off")),
    Option("bash_style", "SHIM_BASH_STYLE", "plain", "choice",
           "form of the rescue's commands: plain (approvable in acceptEdits) or coded"
           " (exit codes 91 to 100)", ("plain", "coded")),
    Option("prompt", "SHIM_PROMPT", "slim", "choice",
           "slim shortens tool texts; full forwards them as they came", ("slim", "full")),
    Option("local_answers", "SHIM_LOCAL_ANSWERS", "title,probe,suggestion,safety", "list",
           "background requests answered without the model",
           ("title", "probe", "suggestion", "safety", "off")),
    Option("warm", "SHIM_WARM", "on", "bool",
           "load the model, and the last session's prefix, before it is needed"),
    Option("max_concurrent", "SHIM_MAX_CONCURRENT", "256", "count",
           "requests at work at once; as many more wait"),
    Option("counts_file", "SHIM_COUNTS_FILE", "", "text",
           "file that keeps the learned token counts between runs"),
)

TRUE_WORDS = ("1", "true", "yes", "on")
FALSE_WORDS = ("0", "false", "no", "off", "")
WHOLE_NUMBER = Pattern(r"[0-9]{1,12}")


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
    model_map: str
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


# ============================== 6. REQUEST IN ==============================

# ------------------------------ tool names and inputs ------------------------------


# ------------------------------ the tool table ------------------------------


# ------------------------------ parsing ------------------------------


# ============================== 7. REQUEST OUT ==============================

# ------------------------------ counting ------------------------------


# ------------------------------ slimming ------------------------------


# ------------------------------ bodies ------------------------------


# ============================== 8. UPSTREAM STREAMS ==============================


# ============================== 9. TOOL CALLS IN TEXT ==============================


# ============================== 10. SHELL COMMANDS ==============================


# ============================== 11. RESCUE ==============================


# ============================== 12. REPLIES ==============================


# ============================== 13. TURN ==============================


# ============================== 14. STATUS ==============================


# ============================== I/O BELOW THIS LINE ==============================


# ============================== 15. UPSTREAM ==============================


# ============================== 16. SERVER ==============================


# ============================== 17. CLI ==============================
