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
from functools import lru_cache
from typing import (
    Any,
    Callable,
    Dict,
    FrozenSet,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
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
        for match in PLAN_MODE.finditer(notice):
            planning = match.group("off") is None
    return planning


def _working_directory(notices: Sequence[str]) -> str:
    """Return the announced working directory; "" when none or more than one is named."""
    found = {match.group(1).strip().rstrip("/.") for notice in notices
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
    for masked in (_mask(words, CLOSING), _mask_block(words), _mask(words, CLOSING_TIGHT)):
        if masked is not None:
            yield masked


# ------------------------------ paths ------------------------------

CONTROL = Pattern("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
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
    bad = (not path or len(path) > MAX_PATH_CHARS or CONTROL.search(path) is not None
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
            r"following|file,|in (?:this|the (?:current|project|working|root)) (?:directory|folder|"
            r"project)|"
              r"configuration|source|log|file|document|script|filename|path|at) )*"
            r"(?:(?:called|named) )?",
    "folderfill": r"(?:(?:the|a|an|my|our|this|new|empty|existing|nested|sub|single|two|three|folder|"
                    r"directory|dir|subfolder|subdirectory|sub-folder|sub-directory|folders|"
                    r"directories|called|named|at|path) )*",
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
    "noun": r"(?:(?:(?:the|this|these|a|an|its|another|one more) )?(?:(?:following|exact|literal|exactly|new|"
              r"single|only|just|plain|simple|short|extra|additional|final|last|entire|full|"
              r"two|three) )*(?P<line>(?:lines?|row|entry|item|bullet(?: point)?|list item|"
              r"import|record)\b)?(?:text|strings?|words?|phrase|sentence|contents?|characters?|"
              r"letters?|value|number|snippet|code|content|data|paragraph|message)?"
              r"(?: of text)?{say} )?",
    "text": r"(?:(?:{noun}|(?:exactly|just|only) )(?P<text>{q})|(?:(?:the|a) )?"
              r"(?:(?:exact|literal|new|single) )*(?:text|string|words?|phrase|sentence|number|"
              r"(?P<bare_line>line)|exactly)(?: saying| that (?:says|reads)| containing)?:? "
              r"(?P<bare>[^\s\ue000-\uf8ff](?:[^\ue000-\uf8ff]*?[^\s\ue000-\uf8ff])?)|"
              r"(?P<loose>[^\s\ue000-\uf8ff](?:[^\ue000-\uf8ff]*?[^\s\ue000-\uf8ff])?))",
    "quoted": r"(?:{noun}(?P<text>{q}))",
    "this": r"(?:(?:this|the|these|that|a|an|following|new|next|exact|single|below|it) )*"
              r"(?:this|these|that|it|below|following|text|(?P<line>lines?)|contents?|code|block|"
              r"snippet|section|string|row|data|entry|entries|paragraph)?(?: below)?",
    "later": r"(?:[:,.]|,? (?:the )?(?:text|lines?|contents?|string|words?)[:,]?|"
               r"(?: as follows| exactly| verbatim)?:)? (?P<text>{q})",
    "with": r"(?:,? ?(?:with|containing|that (?:contains|says|reads|has)|which (?:contains|says|"
              r"reads|has)|whose contents? (?:is|are|should be|must be)|having|holding|saying|"
              r"and its contents? (?:should be|is|are|must be)|"
              r"with (?:its|the|exactly the|the exact) contents? (?:set to|being))"
              r"(?: only| just| exactly| precisely)?(?: (?:this|the following|these))?:?)",
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
    "anchor": r"(?:the )?(?:exact |literal |existing )?(?:(?P<anchor_line>line)|text|string|"
                r"word|phrase|sentence)?(?: (?:that (?:says|reads)|which says|saying))? ?"
                r"(?P<anchor>{q})",
    "where": r"(?:right |immediately |directly |just )?(?P<where>after|before|above|below|under|"
               r"underneath|beneath|in front of|behind|following|preceding)",
    "create": r"(?:create|make|generate|set up|start|add|produce|touch|initialize|initialise|build)"
                r"(?: me| us)?",
    "add": r"(?:add|put|write|insert|place|append|include|paste)",
    "end": r"(?:the )?(?:very |new )?(?:end|last line)(?: of)?",
    "top": r"(?:the )?(?:very )?(?:(?P<top>top)|beginning|start|head)(?: of)?",
    "bottom": r"(?:the )?(?:very )?(?P<bottom>bottom)(?: of)?",
    "newline": r"(?P<own_line>,? (?:on|as|in) (?:a|its own|a separate)(?: new)?(?: separate)?"
                 r" line(?: of its own)?(?: at the end)?| after a (?:newline|line break))",
    "look": r"(?:(?:read|show|display|print|cat|open|view|output|dump|see|look at|"
              r"take a look at|have a look at|check out|look (?:inside|into|in)|inspect)"
              r"(?: out| up)?(?: me| us)?(?: out)?)",
    "tail": r"(?P<tail>(?:,|\.)? (?:and|then|so|to|for|in|first)\b[^\ue000-\uf8ff]*)?",
    "here": r"(?P<here>(?:in |inside |of |from )?(?:this|the|my|our)(?: (?:current|working|"
              r"project|root|present|project's root))* (?:folder|directory|dir|project|repo|"
              r"repository|workspace)|here)",
    "listing": r"(?:(?:all|the|of|every|any|a|list|me|us|out) )*(?:(?:files?|folders?|"
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
    ("append", "{add} {text} (?:to|at|on|onto) {end} {file}{newline}?"),
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
    ("empty", "{create} (?:(?:an?|the|two|three|some) )?(?:new )?(?:empty|blank)"
              "(?: new)?(?: text| python| markdown)*(?: files?)?,?(?: called| named| at)? {files}"),
    ("empty", "{create} {file},? (?:as an empty file|with no contents?|that is empty|empty|"
              "(?:and )?leav(?:e|ing) it empty|with empty contents?|without (?:any )?contents?)"),
    ("empty", "touch {files}"),
    ("named", "{create} (?:a|the)(?: new)?(?: text)? file (?:called|named)? ?{file}"),
    ("write", "write {text}(?: and nothing else)? (?:to|into|in|inside|as) {file}"),
    ("write", "write (?:{this} )?(?:to|into) {file}{later}"),
    ("write", "(?:write|overwrite|rewrite|fill) {of}?{file}{with} {text}"),
    ("write", "(?:overwrite|rewrite) {of}?{file} so (?:that )?it (?:contains|says|reads|has)"
              "(?: only| just| exactly)? {text}"),
    ("write", "(?:overwrite|set|replace|change|update) {of}{file} (?:with|to|by|to be)"
              "(?: be)?(?: exactly)? {text}"),
    ("write", "(?:overwrite|set|replace|change) {of}{file}(?: with| to)?(?: {this})?{later}"),
    ("write", "(?:replace|overwrite) (?:the )?(?:whole|entire|full|complete) file {file}{with} "
              "{text}"),
    ("write", "set {file}(?:'s)? contents? to {text}"),
    ("write", "set {file} to {quoted}"),
    ("write", "(?:make|update|change) {file} (?:to |so (?:that )?it )?(?:contains?|says?|reads?|ha(?:ve|s))(?: only| just| exactly)* {text}"),
    ("clear", "(?:empty|clear|truncate|blank)(?: out)? {of}?{file}"),
    ("rename", "(?:change|update) (?:the )?(?:file ?)?name of {file} (?:to|into) {dest}"),
    ("rename", "(?:change|rename|update) (?:the )?file(?:'s)?(?: ?name)? from {file} to {dest}"),
    ("remove", "(?:remove|delete|erase|strip|drop) {old} {in} {file}"),
    ("remove", "(?:in|from) {file},? (?:remove|delete|erase) {old}"),
    ("replace", "(?:replace|substitute|update|change|convert) {old} (?:with|by) {new} {in} {file}"),
    ("replace", "(?:change|turn|update|convert|correct|fix) {old} (?:to|into) {new} {in} {file}"),
    ("replace", "(?:swap|exchange) (?:out )?{old} (?:for|with) {new} {in} {file}"),
    ("replace", "substitute {new} for {old} {in} {file}"),
    ("replace", "(?:in|inside|within) {file},? (?:replace|change|substitute|swap|update) {old}"
                " (?:with|by|to|into|for) {new}(?: everywhere| throughout)?"),
    ("replace", "(?:replace|change|update) {old} {in} {file} (?:with|by|to|into) {new}"),
    ("replace", "(?:find and replace|search and replace|find/replace) {old} (?:with|by) {new}"
                " {in} {file}"),
    ("replace", "(?:find|search for|look for|locate) {old} {in} {file},? and (?:replace|change|"
                "swap) (?:it|them|each|every one|all(?: of them)?|that) (?:with|to|by|for) {new}"),
    ("replace", "search {file} for {old} and (?:replace|change) (?:it|them) (?:with|to) {new}"),
    ("insert", "{add} {text}{newline}?,? {where} {anchor},? (?:in|inside|of|within|to|into) {file}"),
    ("insert", "in {file},? {where} {anchor},? {add} {text}"),
    ("insert", "{where} {anchor},? (?:in|of|inside) {file},? {add} {text}"),
    ("insert", "{add} {where} {anchor} (?:in|of|inside) {file}{later}"),
    ("insert", "(?:in|inside|to|into) {file},? {add} {text},? {where} {anchor}"),
    ("insert", "{add} {text} (?:in|into|to|inside) {file},? {where} {anchor}"),
    ("rename", "rename {file} (?:to|as|into|->|=>) (?:be )?{dest}"),
    ("rename", "rename (?P<file_marks>(?:the )?(?:folder|directory|dir) (?:called |named )?)"
               "(?P<file>{token}) (?:to|as|into) (?:be )?(?:the )?(?P<dest>{token})"),
    ("rename", "mv {file} {dest}"),
    ("copy", "cp {file} {dest}"),
    ("rename", "give {file} the (?:new )?name {dest}"),
    ("rename", "move {file} (?:to|as|over to) {dest}"),
    ("into", "move {file} (?:in|into|inside|to|under|over to|inside of) {folder}"),
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
    ("read", "(?:tell|give) me (?:what(?:'s| is) (?:in|inside)|the (?:full )?(?:contents?|text)"
             " (?:of|in)) {files}{tail}"),
    ("list", "(?:list|show|display|print|give|enumerate|see|check|look at|explore|view) "
             "{listing}(?: {here})?{tail}"),
    ("list", "(?:list|show|display|print|give|enumerate|see|ls|check|look at|explore|examine|"
             "view|inspect) {listing} (?:in|inside|of|under|"
             "within|from|at) {folder}{tail}"),
    ("list", "(?:ls|dir|list)(?: (?:{here}|{folder}){tail})?"),
    ("list", "(?:tell|show) me what(?:'s| is) (?:in|inside) (?:{here}|{folder})"),
    ("run", "(?:run|execute|issue|invoke)(?: (?:the|this|a|following|shell|bash|terminal|command|"
            "this command))*:? (?P<command>{q})(?: command)?(?: (?:in|on|from) (?:the|my|a|this)"
            " (?:terminal|shell|console|project|repo|folder|directory))?(?: here)?{tail}"),
    ("run", "(?P<typed>(?:git (?:status|log|diff|show|branch|remote|blame)|ls|pwd|tree)"
            r"(?: [\w./=:@+,%^-]+){0,12})"),
    ("run", "(?:run|execute)(?: (?:the|command|following|shell|bash))*:? "
            r"(?P<typed>[a-z][\w-]*(?: [\w./=:@+,%^-]+){0,12}?)"
            "(?: command)?{tail}"),
))

# Questions that only the file or folder can answer; the model must say that it looks.
QUESTIONS: Tuple[Rule, ...] = tuple(Rule(*row) for row in (
    ("read", "(?:what(?:'s| is| are)|do you know what(?:'s| is)|can you (?:see|tell me|check) "
             "what(?:'s| is))(?: currently| written)?(?: the)?(?: current)?(?: contents?| text)? "
             "(?:in|inside|of|written in|inside of|contained in|stored in) {files}"
             "(?: right now| now| currently)?"),
    ("read", "what (?:does|do) {files} (?:contain|say|have in it|hold|include|look like)"
             "(?: inside| right now)?"),
    ("list", "(?:what|which) (?:{listing}|files? and folders?|files? do (?:I|we) have|"
             "kind of files) ?(?:are |is |exist |do (?:I|we) have |live |exists )?"
             "(?:there )?(?:are )?(?:{here}|(?:in|inside|under|within) {folder})"),
    ("list", "what(?:'s| is)(?: there)?(?: in| inside)? (?:{here}|(?:in )?{folder})"),
    ("list", "what(?:'s| are)(?: all)? the (?:contents|files)(?: of| in| inside) "
             "(?:{here}|{folder})"),
    ("list", "what (?:does|do) (?:{here}|{folder}) (?:contain|hold|have in it)"),
))


# ------------------------------ from a match to operations ------------------------------

MAX_REQUEST_CHARS = 500
LONG_GAP = Pattern(r"\s{9}")
# Words by which an unquoted text is a description, a second wish or a condition.
NOT_LITERAL = Pattern(
    r"(?:of|in|on|from|about|for|that|which|describing|explaining|based|below|above|following|"
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
    r"ity|ance|ence))(?:'s|\s|[,.]|\Z)", re.IGNORECASE | re.DOTALL)
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
LIMITED = Pattern(r"\b(?:recursive\w*|sorted|largest|smallest|newest|modified|only|named|containing|"
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


class Found(NamedTuple):
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


def _one_path(found: Found, token: str, marks: str, folder: bool) -> str:
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


def _path(found: Found, name: str = "file", folder: bool = False) -> str:
    marks = found.group(name + "_marks") + " " + found.group(name + "_noun")
    return _one_path(found, found.group(name), marks, folder)


def _paths(found: Found, name: str, folder: bool = False) -> Tuple[str, ...]:
    """Return every path of a list such as "a, b and c"; () when one is none."""
    tokens = [PATH_FILLER.sub("", token, count=1) if " " in token else token
              for token in PATH_SEPARATOR.split(found.group(name))]
    marks = found.group(name + "_marks") + " " + found.group(name + "_noun")
    paths = tuple(_one_path(found, token, marks, folder) for token in tokens)
    return paths if all(paths) else ()


def _text(found: Found) -> Optional[str]:
    """Return the literal text that a request gives; None where it only describes one."""
    quoted = found.value("text")
    if quoted is not None:
        return quoted
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


def _is_loose(found: Found, text: str) -> bool:
    """Tell whether unmarked, unquoted words can only be meant literally."""
    name = found.group("file")
    if IGNORE_FILE.fullmatch(name):
        return LITERAL_WORD.fullmatch(text) is not None or text.startswith("*.")
    return (PROSE_FILE.fullmatch(name) is not None and len(text.split()) <= 4
            and NOT_LOOSE.match(text) is None)


def _is_file_itself(found: Found, text: str) -> bool:
    """Tell whether a text such as in "append 'b.txt' to a.txt" may mean the file's content."""
    return (DIRECT_QUOTE.match(found.match.string) is not None and " " not in text
            and FILE_NAME.fullmatch(text) is not None and not NOT_FILES.fullmatch(text)
            and not IGNORE_FILE.fullmatch(found.group("file")))


def _add_text(found: Found, kind: str) -> Ops:
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


def _create(found: Found, kind: str) -> Ops:
    if found.group("dest"):
        path, text = _path(found, "dest"), found.value("text")
        return (FileOp("create", path, text),) if path and text is not None else ()
    made = _add_text(found, kind)
    if not made or not found.group("folder"):
        return made
    folder = _path(found, "folder", folder=True)
    op = made[0]._replace(path=f"{folder}/{made[0].path}")
    return (op,) if folder and made[0].path[0] not in "/~" else ()


def _empty(found: Found, _kind: str) -> Ops:
    paths = _paths(found, "files") if found.group("files") else (_path(found),)
    return tuple(FileOp("create", path) for path in paths) if all(paths) else ()


def _clear(found: Found, _kind: str) -> Ops:
    path = _path(found)
    return (FileOp("write", path),) if path else ()


def _word(found: Found, name: str) -> Optional[str]:
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


def _replace(found: Found, kind: str) -> Ops:
    path, old = _path(found), _word(found, "old")
    new = "" if kind == "remove" else _word(found, "new")
    bare_removal = kind == "remove" and found.value("old") is None and not found.group("old_noun")
    if not path or not old or new is None or old == new or bare_removal:
        return ()
    if found.group("old_line") and found.value("old") is None:
        return ()
    if found.group("old_line"):
        # The line end keeps a longer line that begins with the same words apart.
        old, new = old.rstrip("\n") + "\n", new.rstrip("\n") + "\n" if new else ""
    return (FileOp("replace", path, new, old),)


def _insert(found: Found, _kind: str) -> Ops:
    path, text, anchor = _path(found), _text(found), found.value("anchor")
    if not path or not text or not anchor or found.group("loose"):
        return ()
    where = " ".join(found.group("where").lower().split())
    own_line = found.group("line") or found.group("own_line") or found.group("bare_line")
    if found.group("anchor_line") or own_line or where in ON_OWN_LINES:
        text, anchor = text.rstrip("\n") + "\n", anchor.rstrip("\n") + "\n"
    return (FileOp(INSERT_KINDS[where], path, text, anchor),)


def _move(found: Found, kind: str) -> Ops:
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


def _into(found: Found, kind: str) -> Ops:
    """Move or copy into a folder, which is named as one or stands after "into"."""
    path = _path(found)
    word = " ".join(found.match.string[found.match.end("file"):].lower().split())
    into = word.startswith(("into ", "inside ", "under ", "file into ", "file inside "))
    folder = _one_path(found, found.group("folder"), "folder " if into else
                       found.group("folder_marks") + found.group("folder_noun"), True)
    if "." in folder.rsplit("/", 1)[-1][1:]:
        return ()
    op = FileOp("copy" if kind == "copyinto" else "rename", path, other=_joined(folder, path))
    return (op,) if path and folder and op.other != path else ()


def _delete(found: Found, _kind: str) -> Ops:
    return tuple(FileOp("delete", path) for path in _paths(found, "files"))


def _subfolder(found: Found, _kind: str) -> Ops:
    marks = found.group("folder_marks") + found.group("folder_noun")
    if not FOLDER_NOUN.search(marks):
        return ()
    parent = _one_path(found, found.group("parent"), "folder", True)
    folder = _one_path(found, found.group("folder"), marks, True)
    return (FileOp("mkdir", f"{parent}/{folder}"),) if parent and folder else ()


def _mkdir(found: Found, _kind: str) -> Ops:
    marks = found.group("folders_marks") + found.group("folders_noun")
    named = FOLDER_NOUN.search(marks) or found.match.string[:5].lower() == "mkdir"
    if not named:
        return ()
    paths = _paths(found, "folders", True) or ()
    if not paths and found.match.string[:5].lower() == "mkdir":
        paths = (_one_path(found, found.group("folders"), "folder", True),)
    return tuple(FileOp("mkdir", path) for path in paths) if all(paths) else ()


def _tail_is_harmless(found: Found) -> bool:
    tail = found.group("tail")
    return not tail or found.scope.told or (INFORMATION.fullmatch(tail) is not None and not VERB_AFTER.search(tail))


def _read(found: Found, _kind: str) -> Ops:
    if not _tail_is_harmless(found):
        return ()
    return tuple(FileOp("read", path) for path in _paths(found, "files"))


def _list(found: Found, _kind: str) -> Ops:
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


def _run(found: Found, _kind: str) -> Ops:
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
    r"watcher|scanner|walker|picker|names|paths)", re.IGNORECASE)
BUILDERS: Dict[str, Callable[[Found, str], Ops]] = {
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


class Command(NamedTuple):
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
        self.commands: List[Command] = []
        self.words: List[str] = []
        self.parts: List[Tuple[str, ...]] = []
        self.mode, self.target, self.wants_target = "", "", False
        self.here: Optional[str] = None
        self.pending: Optional[re.Match[str]] = None

    def read(self) -> Tuple[Command, ...]:
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
            self.commands.append(Command(tuple(self.words), self.mode, self.target, self.here))
        elif self.mode or self.here is not None:
            self.readable = False
        self.readable = (self.readable and not self.wants_target
                         and len(self.commands) <= MAX_SCRIPT_WORDS)
        self.words, self.mode, self.target, self.here = [], "", "", None


def _written(command: Command, text: str) -> Optional[Ops]:
    """Return the write or append that a redirected output amounts to."""
    if not command.mode:
        return ()
    return (FileOp("append" if command.mode == ">>" else "write", command.target, text),)


def _echo(command: Command) -> Optional[Ops]:
    words = command.words[1:]
    newline = "" if words[:1] == ("-n",) else "\n"
    text = " ".join(words if newline else words[1:])
    if "\\" in text or text.startswith(("-n ", "-e", "-E")) or command.here is not None:
        return None
    return _written(command, text + newline)


def _printf(command: Command) -> Optional[Ops]:
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


def _cat(command: Command) -> Optional[Ops]:
    plain = command.words[1:] in ((), ("-",)) and command.mode
    return _written(command, command.here) if plain and command.here is not None else None


def _tee(command: Command) -> Optional[Ops]:
    append = command.words[1:2] == ("-a",)
    files = command.words[2:] if append else command.words[1:]
    quiet = command.target in ("", "/dev/null")
    if command.here is None or len(files) != 1 or not quiet:
        return None
    return (FileOp("append" if append else "write", files[0], command.here),)


def _made(kind: str, flags: Tuple[str, ...]) -> Callable[[Command], Optional[Ops]]:
    def made(command: Command) -> Optional[Ops]:
        names = [word for word in command.words[1:] if word not in flags]
        if not names or command.mode or command.here is not None:
            return None
        return tuple(FileOp(kind, name) for name in names)
    return made


def _relocated(kind: str) -> Callable[[Command], Optional[Ops]]:
    def relocated(command: Command) -> Optional[Ops]:
        names = [word for word in command.words[1:] if word not in ("-n", "-v", "-i")]
        if len(names) != 2 or command.mode or command.here is not None:
            return None
        return (FileOp(kind, names[0], other=names[1]),)
    return relocated


SCAFFOLDS: Dict[str, Callable[[Command], Optional[Ops]]] = {
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
                         r"that|a|an|is|are|bugs?|me|everything|files?|folders?|here)", re.IGNORECASE)


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
                or CONTROL.search(word) or (typed and PROSE_ARGUMENT.fullmatch(word)))


# ------------------------------ asked for ------------------------------

# Words of courtesy before a request; each alternative is taken off as often as it comes.
LEAD = Pattern(
    r"\s*(?:(?:please|pls|plz|kindly|hi|hey|hello|hi there|hey there|ok|okay|alright|great|"
    r"thanks|thank you|perfect|good|cool|nice|now|next|then|so|also|and|well|first|finally|just|"
    r"quickly|simply|claude|qwen|assistant|yes|yeah|sure|right|awesome)(?:\s*[,.!:;-]+\s*|\s+)|"
    r"(?:would|do) you mind\s+|(?:can|could|would|will) you(?:\s*,)?\s+(?:please,?\s+|kindly\s+|just\s+|now\s+|also\s+|"
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
    r"(?:with(?:out)?|no|and no) (?:a |any )?(?:trailing|final|ending) (?:newline|line break)|"
    r"exactly (?:as|like) (?:is|written|shown|that)|verbatim|i'll do the rest|"
    r"(?:no|without) (?:any )?explanations?(?: needed| necessary)?|(?:and )?don't explain(?: it| "
    r"anything)?|just do it|do it now|only that|and nothing else|don't ask(?: me)?(?: anything)?|"
    r"it's (?:important|urgent)|and (?:that's|that is) it)\s*[.!?]*\Z", re.IGNORECASE)
PLACE = Pattern(r"\s+(?:here|in (?:the|this|my|our) (?:(?:current|working|project|root) )?"
                r"(?:folder|directory|project|repo|dir|root))[.!]*\Z", re.IGNORECASE)
LOOKS = Pattern(r"\s*(?:\w+,? ){0,4}?(?:what|which|list|show|display|print|ls|dir|tell|see|give)\b",
                re.IGNORECASE)
FINAL_NEWLINE = Pattern(
    r",? (?:with|followed by|and|ending (?:with|in)|plus) a (?:trailing |final |single )?"
    r"(?:newline|line break)(?: at the end| character)?\Z", re.IGNORECASE)
ENDING = Pattern(r"(?:[.!?]{1,9}|\u2026|:)\Z")
MAX_TRAILER_CHARS = 120
BASES = (
    "create", "make", "generate", "add", "append", "write", "insert", "place", "replace", "change",
    "update", "rename", "move", "copy", "delete", "remove", "erase", "list", "show", "display",
    "open", "view", "print", "save", "store", "clear", "empty", "overwrite", "prepend", "execute",
    "touch", "duplicate", "inspect",
)
FORMS: Dict[str, str] = {
    "putting": "put", "setting": "set", "wrote": "write", "written": "write", "made": "make",
    "overwrote": "overwrite", "overwritten": "overwrite", "reading": "read", "running": "run",
    "looking": "look", "copied": "copy", "swapped": "swap", "shown": "show", "ran": "run",
    "examine": "view", "examining": "view", "check": "view", "checking": "view",
    **{base[:-1] + "ing" if base.endswith("e") else base + "ing": base for base in BASES},
    **{base + ("d" if base.endswith("e") else "ed"): base for base in BASES},
}
FIRST_WORD = Pattern(r"[A-Za-z]+")


def _base_form(text: str) -> str:
    match = FIRST_WORD.match(text)
    base = FORMS.get(match.group().lower()) if match else None
    return base + text[len(match.group()):] if match and base else text


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
    for rule in rules:
        if first is None or first.group().lower() not in _first_words(rule.shape):
            continue
        match = _shape(rule.shape).fullmatch(asked.core)
        if match is None:
            continue
        found = Found(match, masked, scope, asked)
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
        if ops and not (kind == "named" and answer.fences):
            return Rescue("asked:" + kind, ops)
        if SAYS_IT_LOOKS.search(answer.text, 0, MAX_LOOK_CHARS):
            kind, ops = _matched(QUESTIONS, masked, asked, scope)
            if ops:
                return Rescue("question:" + kind, ops)
    return None


# ------------------------------ described ------------------------------

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
         "extend|simplify|finish|complete|document|annotate|format|sort|tidy")
WANTS_CHANGE = Pattern(
    r"(?:\A|[.!?;:,\n]\s*|\b(?:and|then|please|to|you|also|just|now|let's|us)\s+)(?:" + VERBS
    + r")\b|\b(?:i|we)(?:'d like| would like| want| need)\b", re.IGNORECASE)
WANTS_ANSWER = Pattern(
    r"(?:how|what|why|when|where|who|which|whose|is|are|was|were|does|do|did|should|can i|may i|"
    r"could i|would it|explain|describe|tell me|review|compare|suggest|recommend|discuss|"
    r"show me (?:how|an? (?:example|sample|snippet))|give me (?:an? (?:example|sample|snippet|"
    r"tutorial|command|overview)|some|advice|the command)|teach|walk me|think|consider|outline|"
    r"brainstorm|propose|plan|any|i wonder|i'm wondering|i am wondering|help me understand|"
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
    r"(?:\A|[.,;!\n]\s*|\b(?:but|and|only)\s+)(?:if|unless|when|once|in case|provided|as soon as|"
    r"whenever)\b|\bif (?:it|they|there|the file|not|needed|necessary|possible|you)\b|"
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
    r"add\b.*\b(?:to|in|into)|document|clean|adjust|convert|translate|simplify|format|remove|replace|rename|make)\b",
    re.IGNORECASE)
NEW_FILE = Pattern(r"\b(?:create|new|called|named|generate|scaffold)\b|\ba \S+ file\b",
                   re.IGNORECASE)
OVERWRITE = Pattern(r"\b(?:overwrite|rewrite|regenerate)\b|"
                    r"\breplace the (?:whole |entire )?(?:contents?|file)\b", re.IGNORECASE)
FIRST_PERSON = Pattern(
    r"\s*(?:[-*>]\s+|\d{1,3}[.)]\s+|step \d{1,2}\s*[:.)-]\s*)?"
    r"(?:(?:sure|sure thing|okay|ok|great|certainly|of course|alright|done|now|next|first|then|"
    r"finally|so|and|also|no problem|absolutely|got it|understood|yes|to do (?:this|that|so))"
    r"[,.!:;]*\s+){0,3}(?:(?:I'll|I will|I'm going to|I am going to|I've|I have|I just|I|we'll|"
    r"we will|let me|let's|allow me to|I need to)\s+(?:(?:now|just|also|then|first|next|go ahead "
    r"and|proceed to|proceed and|successfully|quickly|start by|begin by|need to)\s+){0,3}|"
    r"(?=(?:created|renamed|moved|deleted|removed|appended|added|replaced|inserted|wrote|copied|"
    r"changed|reading|listing|checking|opening|renaming|creating|deleting|appending|replacing|"
    r"moving|inserting)\b))", re.IGNORECASE)
SENTENCE_END = Pattern(r"(?<=[.!?])\s+|\n+")
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
    r"\b(?:I'll|I will|let me|let's|I've|I have|I'm going to|here(?:'s| is| are)|creat\w+|writ\w+|"
    r"sav\w+|wrote|contents?|files?|called|named|next|then|now|finally|following|also|and)\b",
    re.IGNORECASE)
NO_LABEL = Pattern(
    r"\b(?:run|running|usage|use|using|output|outputs|prints?|example|install\w*|execut\w+|test it|"
    r"looks? like|before|original|old|currently|current|would|could|should|might|append\w*|"
    r"prepend\w*|insert\w*|updat\w+|modif\w+|chang\w+|replac\w+|edit\w*|remov\w+|delet\w+|fix\w*|"
    r"snippet|part|section|function|method|excerpt|relevant|lines?|diff|error|imports?|see|"
    r"add [^:]{0,60}\b(?:to|in)|adding|added|structure|verify|check|instead|not|don't|"
    r"similar|from)\b",
    re.IGNORECASE)
WHOLE_FILE = Pattern(r"\b(?:complete|full|entire|whole)\b", re.IGNORECASE)
FILE_WORD = Pattern(r"^\s*(?:(?:file|filename|file name|path|name)\s*:)", re.IGNORECASE)
LABEL_DECOR = Pattern(r"^[\s#>*_-]*(?:\d{1,3}[.)]\s*)?|[\s*_:#=-]+$")
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
    line = LABEL_DECOR.sub("", label.replace("**", "").replace("__", ""))
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
    wholly = WHOLE_FILE.search(rest) is not None
    introduces = not rest.strip("*_ ()#:.") or LABEL_WORD.search(rest) is not None
    unfit = NO_LABEL.search(rest) is not None and not wholly
    heading = label.lstrip().startswith(("#", "**")) and len(rest.split()) <= 3
    if not (ends or heading) or not (introduces or heading) or unfit:
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
    label = ""
    for line in masked.text.split("\n"):
        mark = ONE_FENCE.fullmatch(line.strip())
        if mark is None:
            label = line if line.strip() else label
            continue
        fence = masked.fences[ord(mark.group()) - FENCE_BASE]
        path = _fence_path(fence, label, masked, scope)
        shell = _is_shell(fence) and not path.endswith((".sh", ".bash"))
        if shell:
            ops = _scaffold_ops(fence.text, scope, False)
            folders += [op for op in ops if op.kind == "mkdir"]
        elif path and (not _file_text(fence) or path in found
                       or (wishes.edit and _names(wishes.words, path))):
            return ()
        elif path:
            found[path] = FileOp("write" if wishes.overwrite else "create", path, fence.text)
        label = ""
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
    for sentence in SENTENCE_END.split(text):
        lead = FIRST_PERSON.match(sentence)
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
        vague = kind == "append" and core.startswith("add ") and not END_NAMED.search(core)
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
                        r"bug|error|tests?)\b", re.IGNORECASE)
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
    masked = _mask(PRIVATE_USE.sub(" ", answer), CLOSING, one_line=True)
    if not words or not answer.strip() or masked is None or _plan_mode(notices):
        return None
    if _declined(masked.text):
        return None
    cwd = _working_directory(notices)
    rescue = _asked_for(words, masked, Scope(home_ok, cwd))
    if rescue is None and PRIVATE_USE.search(answer) is None:
        rescue = _told(words, masked, Scope(False, cwd, True))
    if rescue is None or (_served(turns, _request_of(turns)) and not _only_looks(rescue.ops)):
        return None
    return rescue


# ============================== 12. REPLIES ==============================


# ============================== 13. TURN ==============================


# ============================== 14. STATUS ==============================


# ============================== I/O BELOW THIS LINE ==============================


# ============================== 15. UPSTREAM ==============================


# ============================== 16. SERVER ==============================


# ============================== 17. CLI ==============================
