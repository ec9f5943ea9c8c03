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
import shlex
from functools import lru_cache
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
INTEGER = Pattern(r"\s*([+-]?[0-9]{1,18})(?:\.0*)?\s*")
DECIMAL = Pattern(r"\s*[+-]?[0-9]{1,18}(?:\.[0-9]{1,18})?(?:[eE][+-]?[0-9]{1,2})?\s*")


def plain(name: str) -> str:
    """Fold case and separators: filePath, file-path and file_path are one name."""
    return NOT_PLAIN.sub("", name.lower())


@lru_cache(maxsize=None)
def plain_words(row: str) -> Tuple[str, ...]:
    return tuple(plain(word) for word in row.split())


def properties_of(schema: Any) -> Json:
    found = schema.get("properties") if isinstance(schema, dict) else None
    return found if isinstance(found, dict) else {}


def required_of(schema: Json) -> List[str]:
    found = schema.get("required")
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def parameter_for(name: str, properties: Json, taken: Iterable[str] = ()) -> Optional[str]:
    """Find the property that name means, by spelling, then by PARAMETER_NAMES."""
    folded = plain(name)
    free = {plain(known): known for known in reversed(list(properties)) if known not in taken}
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
    folded = plain(NAMESPACE.sub("", name.strip()))
    same = [tool for tool in tools.values() if folded and plain(tool.name) == folded]
    if same or not folded:
        return same[:1]
    found = []
    for kind in TOOL_KINDS:
        names, needs = plain_words(kind.names), kind.needs.split()
        if folded in names:
            fits = [tool for tool in tools.values()
                    if all(parameter_for(need, properties_of(tool.schema)) for need in needs)]
            named = [tool for tool in fits if plain(tool.name) in names]
            exact = [tool for tool in fits if len(required_of(tool.schema)) == len(needs)
                     and all(parameter_for(need, dict.fromkeys(required_of(tool.schema)))
                             for need in needs)]
            found += named or (exact if len(exact) == 1 else [])
    tails = [tool for tool in tools.values() if plain(tool.name.rsplit("__", 1)[-1]) == folded]
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
        inner = [key for key in arguments if key in WRAPPER_KEYS and len(arguments) == 1
                 or key == "properties" and arguments.get("type") == "object"]
        if inner and depth and inner[0] not in properties_of(schema):
            return as_object(arguments[inner[0]], schema, depth - 1)
        return arguments
    if isinstance(arguments, str) and arguments.strip()[:1] in ("{", "[", '"') and depth:
        value = loads(arguments)
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
            if value is not None or takes(None, properties[names[key]]):
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
        choices = schema.get("anyOf") or schema.get("oneOf") or []
        return [each for choice in choices for each in types_of(choice)]
    return [each for each in (kind if isinstance(kind, list) else [kind]) if each in JSON_TYPES]


def takes(value: Any, schema: Any) -> bool:
    types = types_of(schema)
    return not types or any(JSON_TYPES[kind](value) for kind in types)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


JSON_TYPES: Dict[str, Callable[[Any], bool]] = {
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
    if not takes(value, schema):
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
        return next((each for each in choices if plain(str(each)) == plain(value)), value)
    return value


def string_from(value: Any, name: str) -> Optional[str]:
    """Write a value as text: an argument vector quoted, lines joined, else JSON."""
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return shlex.join(value) if plain(name) == "command" else "\n".join(value)
    return json.dumps(value, ensure_ascii=False, indent=2 if isinstance(value, dict) else None)


def integer_from(value: Any, name: str) -> Optional[int]:
    match = INTEGER.fullmatch(value) if isinstance(value, str) else None
    return int(match.group(1)) if match else None


def number_from(value: Any, name: str) -> Union[int, float, None]:
    whole = integer_from(value, name)
    decimal = isinstance(value, str) and DECIMAL.fullmatch(value)
    return whole if whole is not None else float(value) if decimal else None


def boolean_from(value: Any, name: str) -> Optional[bool]:
    word = str(value).strip().lower()
    return True if word in TRUE_WORDS else False if word and word in FALSE_WORDS else None


def array_from(value: Any, name: str) -> Optional[List[Any]]:
    read = loads(value) if isinstance(value, str) else value
    return read if isinstance(read, list) else None if value is None else [value]


def object_from(value: Any, name: str) -> Optional[Json]:
    read = loads(value) if isinstance(value, str) else None
    return read if isinstance(read, dict) else None


COERCIONS: Dict[str, Callable[[Any, str], Any]] = {
    "string": string_from, "integer": integer_from, "number": number_from,
    "boolean": boolean_from, "array": array_from, "object": object_from,
    "null": lambda value, name: None,
}

# A string ends at a quote that is followed by what can follow a value in its place; any
# other quote was left unescaped by the model and belongs to the text.
KEY = r"""(?:"[^"\n]{0,80}"|“[^”\n]{0,80}”|'[^'\n]{0,80}'|[A-Za-z_][\w-]{0,60})\s*(?::|=>)"""
END_OF_KEY = Pattern(r"\s*(?::|=>)")
END_IN_OBJECT = Pattern(
    r"\s*(?:,?\s*\}\s*(?:[,}\])<`;/#]|\Z|\n)|,\s*" + KEY + r"|(?<=\n)\s*" + KEY + r"|\Z)")
END_IN_ARRAY = Pattern(r"\s*(?:,\s*(?:[\"'\[{\]\d-]|true|false|null)|\]|\Z)", re.I)
END_IN_CALL = Pattern(r"\s*(?:,\s*\w{1,60}\s*=|,?\s*\)|\Z)")
MEMBER_START = Pattern(KEY + r"|[\"'\[{]")
END_ALONE = Pattern(r"\s*\Z")
QUOTES = {'"': '"', "'": "'", "`": "`", "\u201c": "\u201d", '"""': '"""', "'''": "'''",
          "<escape>": "<escape>", '<|"|>': '<|"|>'}
QUOTE = Pattern("\"\"\"|'''|<escape>|<\\|\"\\|>|[\"'`\u201c]")
BLANKS = Pattern(r"(?:\s+|//[^\n]*|/\*[^*]*(?:\*(?!/)[^*]*)*\*/|#[^\n]*)*")
NUMBER = Pattern(r"-?\d{1,300}(?:\.\d{1,300})?(?:[eE][+-]?\d{1,3})?(?![\w.])")
WORD = Pattern(r"[A-Za-z_][\w./-]{0,200}")
WORDS: Json = {"true": True, "false": False, "null": None, "none": None, "undefined": None}
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "/": "/", "\\": "\\",
           '"': '"', "'": "'", "`": "`"}
ESCAPE = Pattern(r"\\(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|(.))", re.S)
SURROGATE = Pattern("[\ud800-\udfff]")
MAX_JSON_DEPTH = 60
STRICT_JSON = json.JSONDecoder(strict=False)


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
        quote = QUOTE.match(self.text, at)
        if quote:
            return self.string(quote, end)
        number = NUMBER.match(self.text, at)
        if number:
            written = number.group()
            return (int if written.lstrip("-").isdigit() else float)(written), number.end()
        word = WORD.match(self.text, at)
        if word:
            return WORDS.get(word.group().lower(), word.group()), word.end()
        raise ValueError("no value")

    def skip(self, at: int) -> int:
        match = BLANKS.match(self.text, at)
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
        quote = QUOTES[opening.group()]
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


@lru_cache(maxsize=None)
def string_stop(quote: str) -> Pattern:
    """Build the pattern for what interrupts a string: an escape or its closing quote."""
    escape = "" if quote.startswith("<") else ESCAPE.source + "|"
    return Pattern(escape + re.escape(quote), re.S)


def unescaped(match: re.Match[str]) -> str:
    """Read one escape; one that JSON does not know keeps its backslash (\\d, \\$)."""
    unicode, byte, letter = match.groups()
    if letter is not None:
        return ESCAPES.get(letter, match.group())
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


def loads(text: str) -> Any:
    """Read JSON that is the whole of text; None where it is not."""
    try:
        value, end, _ = read_json(text.strip())
    except ValueError:
        return None
    return None if text.strip()[end:].strip(" \t\r\n}];,") else value


# ------------------------------ the tool table ------------------------------


# ------------------------------ parsing ------------------------------


# ============================== 7. REQUEST OUT ==============================

# ------------------------------ counting ------------------------------


# ------------------------------ slimming ------------------------------


# ------------------------------ bodies ------------------------------


# ============================== 8. UPSTREAM STREAMS ==============================


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
# Tags and words between a tool's name and its input; ends and turn marks after a call.
SEPARATOR_TAGS = frozenset(
    "tool_sep tool_call_argument_begin constrain message content tool_input tool_name name "
    "arguments args input parameters parameter_list start plugin interpreter".split())
SEPARATOR = Pattern(
    r"action[ _]input:|\*\*action input:\*\*|✿args✿:?|\[args\]|\[call_id\]\w*|```\w*|to=|call:|"
    r"functions\.|function:|name:|arguments:|args:|input:|:", re.I)
INPUT_WORDS = ("action input:", "action_input:", "**action input:**", "✿args✿:", "✿args✿")
FILLERS = frozenset("function commentary analysis final assistant json code".split())
CALL_TAGS = frozenset(tag for row in TOOL_FORMATS for tag in row.tags.split())
RULES = {opener: row.rule for row in TOOL_FORMATS for opener in (*row.tags.split(), *row.words)}
OPENING_WORDS = tuple(sorted((word for row in TOOL_FORMATS for word in row.words), key=len)[::-1])
END_TAGS = frozenset("call return eom_id eot_id im_end endoftext bot_end escape tools_suffix "
                     "tool_call tool_calls end eos s python_end".split())

TAG = Pattern(r"<(/?)([^\s<>=/\"'`(){}]{1,48})((?:\s|=|/)[^<>]{0,300})?>")
TAG_START = Pattern(r"</?[^\s<>=/\"'`(){}]{0,48}(?:(?:\s|=|/)[^<>]{0,300})?\Z")
TAG_NAMESPACE = Pattern(r".*[:｜|]")
TAG_NAMESPACES = ("antml:", "minimax:", "seed:", "steptml:", "dsml｜", "dsml|")
TAG_VALUE = Pattern(r"""\s*(?:=|\bname\s*=)\s*["']?([^"'<>]{1,128}?)["']?(?:\s+\w+=.*|\s*/?)""", re.S)
NAME = Pattern(r"[A-Za-z_][\w.:-]{0,127}")
FIRST_KEY = Pattern(
    r"(?:\[\s*)?\{{1,2}\s*[\"'`“]?([A-Za-z_-]{1,24})[\"'`”]?\s*(?::|=>)\s*(?=\S)"
    r"(?:[\"'`“]([^\"'`“”\n]{0,128})([\"'`”]))?")
FIRST_KEY_START = Pattern(r"(?:\[\s*)?(?:\{{1,2}\s*(?:[\"'`“]?[A-Za-z_-]{0,24}[\"'`”]?\s*"
                          r"(?::|=>?)?\s*(?:[\"'`“][^\"'`“”\n]{0,128})?)?)?")
PRINT = Pattern(r"print\(")
TOOL_NAME = Pattern(r"(?:default_api\.|functions\.)?([A-Za-z_][\w-]{0,127}|\Z)")
NAMED_BODY = Pattern(r"\s?(?=\()|:?\s{0,2}(?=\{)")
NAMED_BEGUN = Pattern(r":?\s{0,2}")
PYTHON_NAME = Pattern(r"(?:\[\s*)?(?:print\()?([A-Za-z_][\w.]{0,127})\s?\(\s*(?=[\w\"'){\[]|\Z)")
NAME_KEYS = frozenset("name tool toolname function functionname action recipient recipientname "
                      "tooltocall toolid command".split())
ARGUMENT_KEYS = frozenset("arguments parameters input args params kwargs toolinput actioninput "
                          "argumentsjson toolargs inputs payload toolparameters".split())
NESTED_KEYS = frozenset("function toolcall functioncall tooluse call action tool".split())
LIST_KEYS = frozenset("toolcalls functioncalls calls tooluses actions tools".split())
LEADING_KEYS = frozenset("thought thoughts thinking reasoning explanation id callid toolcallid "
                         "index comment role content".split())
CALL_TYPES = frozenset("function functioncall toolcall tooluse tool call".split())
FENCE = Pattern(r"(`{3,16}|~{3,16})([^\n`{\[<]{0,80})(?:\n|(?=[{\[<]))")
FENCE_START = Pattern(r"(?:`{1,16}|~{1,16})[^\n`{\[<]{0,80}\Z")
FENCE_END = Pattern(r"[ \t]{0,3}(`{3,16}|~{3,16})[ \t]{0,8}(?=\n|\Z)")
SIGN = Pattern(r"\n|<(?=[/|｜A-Za-z_]|\Z)|\[(?=[TtFf]|\Z)")
AFTER_CALL = Pattern(r"\s*(?:<[|｜]?/[^\s<>]{1,60}>|\[/[^\s\[\]]{1,40}\]|✿\w{1,12}✿:?|[}\])]{1,4}(?=\s|\Z|<|`|[}\])])|"
                     r"[;,](?=\s*(?:[{\[<]|\Z)))")
CLOSING_CUT = Pattern(r"\s*<[|｜/]?[^\s<>]{0,60}\Z")
AFTER_BEGUN = Pattern(r"<[^\s<>]{0,60}|\[(?:/[^\s\[\]]{0,40})?|[`~]{1,16}|✿\w{0,12}✿?|[}\])]{1,4}|[,;]\s*")
BLANK = Pattern(r"\s*")
INDENT = Pattern(r"[ \t]*")
FENCE_BEGUN = Pattern(r"[ \t]{0,3}[`~]{0,16}[ \t]{0,8}")
LIST_BEGUN = Pattern(r"\[\s*[\w.]{0,80}")
TAG_WORD_END = Pattern(r"[\s=]")
LINE = Pattern(r"[^\n<]{1,4000}")
SENTENCE_MARKS = ".!?:;…)*>。！？："
BARE_RULES = ("json", "named", "pythonic")
# Characters of prose before a call in which its announcement is looked for.
MAX_CONTEXT_CHARS = 1000
# Characters of thought kept in case that a call inside it is all that comes.
MAX_THOUGHT_CHARS = 256 * 1024
# Characters read in vain before an answer full of openers is passed as it is.
MAX_WASTED_CHARS = 128 * 1024
# Opening tags that stand inside each other before a call's body; DeepSeek has two.
MAX_OPENERS = 4
# Characters looked at in one step, so that cutting them off costs little.
MAX_STEP_CHARS = 4096
# Characters of a name or first key before text that looks like a call is let go.
MAX_HEADER_CHARS = 500


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
    INSIDE = {quote: Pattern(rf"[^\\{quote}]*(?:\\.[^\\{quote}]*)*", re.S) for quote in "\"'`"}

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


def calls_in(value: Any, tools: Mapping[str, Tool], rule: str) -> Optional[List[Call]]:
    """Read calls from JSON in any published shape; None when any part is no call."""
    if isinstance(value, list):
        found: List[Call] = []
        for item in value:
            calls = calls_in(item, tools, rule)
            if calls is None:
                return None
            found += calls
        return found or None
    if not isinstance(value, dict):
        return None
    keys = {plain(str(key)): key for key in reversed(list(value))}
    for key, original in keys.items():
        if key in LIST_KEYS and isinstance(value[original], list) and (
                key.startswith("tool") or keys.keys() <= LEADING_KEYS | {key, "type"}):
            return calls_in(value[original], tools, rule)
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
            inner = {plain(str(each)): each for each in reversed(list(nested))}
            name, arguments = name_and_arguments(nested, inner, tools)
            return name, value[outer[0]] if outer and not arguments else arguments
    named = [keys[key] for key in NAME_ORDER if key in keys and isinstance(value[keys[key]], str)]
    named = [key for key in named if tools_meant(value[key], tools)] or named
    if named:
        spare = {key: each for key, each in value.items() if key != named[0]
                 and plain(str(key)) not in LEADING_KEYS - {"content"} and key != "type"}
        return value[named[0]], value[outer[-1]] if outer else spare or None
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


PYTHON_KEY = Pattern(r"(\w{1,60})\s*=(?!=)\s*")


def python_arguments(reader: LooseJson, at: int) -> Tuple[Dict[Union[str, int], Any], int]:
    """Read arguments up to the closing parenthesis; those without a name by number."""
    found: Dict[Union[str, int], Any] = {}
    while reader.text[at:at + 1] != ")":
        key = PYTHON_KEY.match(reader.text, at)
        value, at = reader.value(key.end() if key else at, END_IN_CALL)
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
        self._inner = self._scanned = self._functions = self._wrappers = 0

    def _between(self, final: bool) -> bool:
        self.rest = self.rest.lstrip()
        tag = TAG.match(self.rest)
        if not tag:
            self.done = final or bool(self.rest) and not TAG_START.fullmatch(self.rest)
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
        tag = TAG.match(self.rest, at) if at >= 0 else None
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
            self._close(CUT_TAG.sub("", self.rest), False)
            self.rest = ""
            return False
        keep = upto - len(LAST_BREAK.search(self.rest[:upto]).group())  # type: ignore[union-attr]
        if keep > 0 and (not self._fresh or keep > 200 or "\n" in self.rest[:keep].strip("\r\n")):
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
            self.events.append(("text", text))

    def _close(self, text: str, closed: bool) -> None:
        short = self._fresh and "\n" not in text.strip()
        if not closed and short:
            text = text.strip()
        framed = self._framed or self._fresh and FIRST_BREAK.match(text)
        if framed or not self._exact:
            text = LAST_BREAK.sub("", text, 1)
        self._text(text)
        self.events.append(("end", ""))
        self._closer = None

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
        elif label in CALL_TAGS and self.rest[tag.start() - 1:tag.start()] in ("\n", "", ">"):
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
        at = BLANK.match(self.rest, at).end()  # type: ignore[union-attr]
        if at >= len(self.rest):
            return True if final else None
        tag = TAG.match(self.rest, at)
        if not tag:
            partial = TAG_START.match(self.rest, at)
            self._doubt = self._doubt or not partial and not outer
            line = (self._fresh and "\n" in self.rest[closed:at]
                    and "\n" not in self.rest[:self._scanned].strip())
            return (True if final else None) if partial else line or self._closer == self._label
        label = tag_label(tag)
        if tag.group(1):
            return label in CALL_TAGS or label == self._label or label in SEPARATOR_TAGS
        known = label in ("parameter", "param", "arg_key", "argument", "arg")
        child = parameter_for(label, properties_of(self._tool.schema), self._keys) or (
            label in EXTRA_TAGS or self._fresh and "\n" not in self.rest[:at].strip())
        return label in CALL_TAGS or not outer and (known or bool(child))


EXTRA_TAGS = ("line_count", "task_progress", "requires_approval")
ARG_KEY = Pattern(r"<arg_key>([^<]{0,128})</arg_key>\s*<arg_value>")
FIRST_BREAK = Pattern(r"\A\r?\n")
LAST_BREAK = Pattern(r"(?:\r?\n|\r)?\Z")
CUT_TAG = Pattern(r"\s*<?/?(?:</?[a-z_=]{0,20})?\Z")


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

    def _member(self, final: bool) -> bool:
        match = MEMBER.match(self.rest)
        if not match:
            self.done = self.cut = not MEMBER_BEGIN.fullmatch(self.rest)
            return False
        self.rest = self.rest[match.end():]
        if match.group(1) is None:
            self._step = self._tail
            return True
        self.events.append(("key", loads(match.group(1)) or ""))
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
            half = match.group(1) and "d800" <= match.group(1).lower() < "dc00"
            if half and len(self.rest) < match.end() + 6 and not final:
                return self._piece(match.start())
            pair = ESCAPE.match(self.rest, match.end()) if half else None
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
        match = SCALAR.match(self.rest)
        return bool(match) and self._value(match.end())  # type: ignore[union-attr]

    def _value(self, end: int) -> bool:
        self.events.append(("value", self.rest[:end]))
        self.rest, self._scanned, self._step = self.rest[end:], 0, self._member
        return True

    def _tail(self, final: bool) -> bool:
        match = CALL_TAIL.match(self.rest)
        self.done = bool(match) or not CALL_TAIL_BEGIN.fullmatch(self.rest)
        self.rest = self.rest[match.end():] if match else self.rest
        return False


MEMBER = Pattern(r"""\s*,?\s*(?:("[^"\\\n]{1,128}"|'[^'\\\n]{1,128}')\s*:\s*(?=\S)|\})""")
MEMBER_BEGIN = Pattern(r"""\s*,?\s*(?:["'][^"'\\\n]{0,128}(?:["']\s*(?::\s*)?)?)?""")
STRING_END_OPEN = Pattern(
    r"\s*(?:,?\s*\}?\s*|,\s*[\"'\w-][^\"'\n:]{0,80}[\"']?\s*)\Z")
SCALAR = Pattern(r"[^,}\]\n]{1,64}(?=[,}\]\n])")
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
        self.known = False

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
        self._held = None if streams else []
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
        return '"' if self._held is None else self._whole("".join(self._held))

    def _on_value(self, text: str) -> str:
        value = loads(text)
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

WAIT = "wait"


class Head(NamedTuple):
    """What opens a call: its rule, the tool's name where known, the body and its start.

    body is json, python, tags, raw (one parameter's text) or line; fence is the mark of
    the code block that it stands in.
    """

    rule: str
    name: str
    body: str
    at: int
    fence: str = ""


class HeadReader:
    """Reads what stands before a call's body."""

    def __init__(self, tools: Mapping[str, Tool]) -> None:
        self._tools = tools

    def read(self, text: str, at: int, line_start: bool) -> Union[None, str, Head]:
        """Return the head at a position, WAIT where it may still come, or None."""
        fence = FENCE.match(text, at) if line_start else None
        if fence:
            head = self._head(text, fence.end(), True)
            return head._replace(fence=fence.group(1)) if isinstance(head, Head) else head
        if line_start and FENCE_START.match(text, at):
            return WAIT
        return self._head(text, at, line_start)

    def _head(self, text: str, at: int, line_start: bool) -> Union[None, str, Head]:
        blank = BLANK.match(text, at)
        at = blank.end() if blank else at
        begin = text[at:at + 32].lower()
        if not begin:
            return WAIT
        if begin[0] == "<":
            return self._inside(text, at, "")
        for word in OPENING_WORDS:
            if line_start or word[0] == "[":
                if begin.startswith(word):
                    return self._inside(text, at + len(word), RULES[word])
                if len(begin) < len(word) and word.startswith(begin):
                    return WAIT
        if not line_start:
            return None
        if begin[0] in "{[":
            return self._bracket(text, at, "json")
        return self._named(text, at)

    def _named(self, text: str, at: int) -> Union[None, str, Head]:
        """Read a tool's own name at the start of a line: Read(…) or Read, then {…}."""
        printed = PRINT.match(text, at)
        at = printed.end() if printed else at
        name = TOOL_NAME.match(text, at)
        if not name:
            return None
        rest = text[name.end():name.end() + 8]
        if name.group(1) in self._tools:
            body = NAMED_BODY.match(rest)
            if body:
                python = rest[body.end()] == "("
                return Head("named", name.group(1), "python" if python else "json",
                            at if python else name.end() + body.end())
            return WAIT if NAMED_BEGUN.fullmatch(rest) else None
        known = any(tool.startswith(name.group(1)) for tool in self._tools) or any(
            space.startswith(name.group()) for space in ("default_api.", "functions.", "print("))
        return WAIT if known and not rest else None

    def _bracket(self, text: str, at: int, rule: str) -> Union[None, str, Head]:
        """Judge by the first key, or the first name, whether brackets may hold a call."""
        rest = text[at:at + MAX_HEADER_CHARS]
        python = PYTHON_NAME.match(rest)
        if python:
            return Head("pythonic", "", "python", at) if rest[0] == "[" and \
                resolve_tool(python.group(1), self._tools) else None
        key = FIRST_KEY.match(rest)
        if not key:
            begun = FIRST_KEY_START.fullmatch(rest) or LIST_BEGUN.fullmatch(rest)
            return WAIT if begun else None
        word, value, quoted = plain(key.group(1)), key.group(2), rest[key.end(1):]
        if key.group(1) in self._tools and "{" in quoted:
            return Head(rule, "", "json", at)
        if word in NAME_KEYS or word == "type":
            if value is None:
                opened = rest[key.end():key.end() + 1]
                cut = opened in "\"'`“" and not key.group(3) and "\n" not in rest[key.end() + 1:]
                return WAIT if cut and len(rest) - key.end() < 130 else \
                    Head(rule, "", "json", at) if opened == "{" else None
            fits = plain(value) in CALL_TYPES if word == "type" else tools_meant(value, self._tools)
            return Head(rule, "", "json", at) if fits else None
        held = word in NESTED_KEYS and rest[key.end():key.end() + 1] == "{" or word in ARGUMENT_KEYS or word in LEADING_KEYS or word in LIST_KEYS
        return Head(rule, "", "json", at) if held else None

    def _inside(self, text: str, at: int, rule: str) -> Union[None, str, Head]:
        """Read on behind an opener: further tags, the name, separators, to the body."""
        name, start, after_input, named_at, openers = "", at, False, at, 0
        while at - start < MAX_HEADER_CHARS:
            blank = BLANK.match(text, at)
            at = blank.end() if blank else at
            if at == len(text):
                return WAIT
            tag = TAG.match(text, at)
            if tag:
                label, value = tag_label(tag), tag_value(tag)
                head = self._tag(text, tag, label, value, rule, name)
                if head is not None or tag.group(1) and not name:
                    return head
                if not (label in SEPARATOR_TAGS and (rule or name) or label in CALL_TAGS):
                    return None
                openers += label in CALL_TAGS
                if openers > MAX_OPENERS:
                    return None
                rule, after_input = rule or RULES[label], label in ("tool_input", "input")
                at = tag.end()
                continue
            if text[at] == "<":
                begun = TAG_START.match(text, at)
                return WAIT if begun and (rule or self._may_open(begun.group())) else None
            step = SEPARATOR.match(text, at) or PRINT.match(text, at)
            if step:
                at, after_input = step.end(), step.group().lower() in INPUT_WORDS
                continue
            if any(word.startswith(text[at:at + 20].lower()) for word in (*INPUT_WORDS, "```")):
                return WAIT
            if text[at] in "{[(":
                if text[at] == "[" and len(text) - at < 9 and any(
                        word.startswith(text[at:].lower()) for word in ("[args]", "[call_id]")):
                    return WAIT
                python = text[at] == "(" and name
                return self._body(text, named_at if python else at, rule, name)
            word = NAME.match(text, at)
            if after_input and name:
                return Head(rule, name, "line", at) if resolve_tool(name, self._tools) else None
            if not word:
                return None
            if word.end() == len(text):
                return WAIT
            bare = word.group().rstrip(":.")
            if bare.lower() not in FILLERS or bare in self._tools:
                if name or not resolve_tool(bare, self._tools):
                    return None
                name, named_at = bare, word.start()
            at = word.start() + len(bare)
        return None

    def _may_open(self, begun: str) -> bool:
        """Tell whether a tag that is cut in its name may open a call."""
        name = TAG_WORD_END.split(begun[1:].strip("|｜").replace("▁", "_").lower())[0]
        bare = TAG_NAMESPACE.sub("", name)
        known = [*CALL_TAGS, *(plain_word for kind in TOOL_KINDS for plain_word in kind.names.split()),
                 *map(str.lower, self._tools)]
        return any(word.startswith(bare) for word in known) or any(
            space.startswith(name) for space in TAG_NAMESPACES)

    def _body(self, text: str, at: int, rule: str, name: str) -> Union[None, str, Head]:
        if name:
            known = resolve_tool(name, self._tools)
            return Head(rule, name, "json" if text[at] in "{[" else "python", at) if known else None
        if text[at] == "(":
            return None
        head = self._bracket(text, at, rule)
        return head._replace(rule=rule) if isinstance(head, Head) else head

    def _tag(self, text: str, tag: re.Match[str], label: str, value: Optional[str], rule: str,
             name: str) -> Union[None, str, Head]:
        """Read a tag that names the tool, or a parameter's tag behind the name."""
        if name and not tag.group(1) and label not in SEPARATOR_TAGS and label not in CALL_TAGS:
            return Head(rule, name, "tags", tag.start())
        named = value if label in CALL_TAGS and value else ""
        if not tag.group(1) and not named and label not in CALL_TAGS and not name:
            named = tag.group(2) if tag.group(3) is None else ""
        if not named or tag.group(1) or not resolve_tool(named, self._tools):
            return None
        rule = rule if rule and rule != "tool_call" else RULES.get(label, "tag_name")
        at = tag.end()
        blank = BLANK.match(text, at)
        begin = text[blank.end():blank.end() + 1] if blank else ""
        if not begin:
            return WAIT
        if begin in "{<":
            return Head(rule, named, "json" if begin == "{" else "tags", blank.end() if blank else at)
        return Head(rule, named, "raw:" + label, at)


# ------------------------------ call or example ------------------------------

FIRST_PERSON = Pattern(
    r"\b(?:I['’]ll|I will|I['’]m (?:now )?(?:going to|about to)|I am (?:now )?(?:going to|about to)|"
    r"let me|let['’]s|let us|we['’]ll|we will|I (?:now |first |also |just )?(?:need|want|have|must|"
    r"should|can) (?:to )?(?:now |first )?|(?:now|next|first|then|so),? I\b|I['’]m (?:now )?\w+ing|"
    r"I am (?:now )?\w+ing)(?!\s+(?:not|never|show you|explain|demonstrate|illustrate)\b)", re.I)
ASSENT = Pattern(
    r"\W*(?:(?:sure(?: thing)?|ok(?:ay)?|certainly|of course|yes|right|got it|understood|alright|"
    r"all right|absolutely|done|great|no problem|will do|on it|definitely|gladly|here (?:it is|"
    r"you go|we go)|one moment|working on it)\W*){1,4}", re.I)
NOUNS = (r"(?:file|script|config|app|project|folder|director|test|page|module|program|code|func|"
         r"class|data|input|entr|value|content|text|usage file|env|yaml|json|site|package|repo)")
# Words that make what follows no call, whatever else the sentence says.
NO_CALL_BEFORE = Pattern(
    r"\bexamples?\b(?![._/-]\w|\s+" + NOUNS + r")|\be\.g\.|\bfor instance\b|\bhypothetic\w*|"
    r"\billustrat\w+|\bdemonstrat\w+|\bpseudo|\bimagine\b|\bsuppose\b|\bpretend\b|\bnot a (?:real|"
    r"tool) \w*|\b(?:you|one|users?|developers?|someone|people|models?|agents?|assistants?|clients?|"
    r"he|she|they)(?:['’]d| (?:can|could|would|should|might|may|must|needs? to|has to|have to|will))\b|"
    r"\b(?:I|we|it|this|that|which|call|one)(?:['’]d| would)\b(?! like)|\bwould (?:look|be|have)\b|"
    r"\b(?:don['’]t|do not|does(?: not|n['’]t)|never|avoid|cannot|can['’]t|won['’]t|will not|"
    r"wouldn['’]t|should(?: not|n['’]t)|must(?: not|n['’]t)|unable|refus\w+|not (?:going|allowed|"
    r"able|permitted) to|rather than|beware|warning|forbidden|declin\w+|instead of|didn['’]t|did not)\b",
    re.I)
# Words that make it no call where nobody says "I will" in the same sentence.
DOUBT_BEFORE = Pattern(
    r"\b(?:format|syntax|schema|template|notation|sample|specification|usage)\b|"
    r"\blooks? (?:something )?like\b|\blike (?:this|so)\b|\bas follows\b|\b(?:explain|describ|"
    r"represent|document|consider|not(?:e|ice) that|means?\b)\w*|"
    r"\b(?:earlier|previous(?:ly)?|last (?:time|turn|call|step|week)|already|yesterday|ago|history|"
    r"logs?|logged|transcript|session)\b|\b(?:was|were|been|got) (?:\w+ )?(?:called|sent|used|made|"
    r"run|executed|written|generated|produced|returned|logged|rejected|recorded|issued)\b|"
    r"\b(?:I|we|you|he|she|they|it|users?|models?|assistant|agent|server|tool|api|client|colleague|"
    r"system|other \w+)\s+(?:\w+ly |just |then |has |had |have )?(?:called|ran|sent|used|made|wrote|"
    r"said|replied|answered|returned|emitted|produced|tried|got|received|printed|posted|outputs?|"
    r"returns?|sends?|emits?|produces?|writes?|says?|prints?|responds?|asked for|pasted|quoted)\b|"
    r"\b(?:contents?|contains?|data|config(?:uration)?|json|payload|object|record|entry|entries|"
    r"snippet|response|result|output|answer|documentation|docs|readme|manual|definition|message|"
    r"block|quote|values?|row|document)\b(?: (?:of|from|in|for|at|is|was|are|were|says?|shows?|reads?|"
    r"holds?)\b[^:.!?]{0,60})?[^.!?\w]*\Z|\bif\b", re.I)
# Words behind it that take it back, looked for in the first sentences.
NO_CALL_AFTER = Pattern(
    r"\b(?:is|was|as|are|just|only|merely|purely) (?:just |only |merely )?(?:an?|the|one|some) "
    r"(?:\w+ )?(?:examples?|illustration|sample|template|placeholder|demonstration|sketch|quot\w+)\b|"
    r"\b(?:is|was|are|were|just|only|purely) (?:for )?(?:illustrat\w+|demonstration|hypothetical)|"
    r"\b(?:this|that|these|those|it|above|which|call)\b(?: \w+){0,3} (?:is|was|are|were|shows?|would|"
    r"illustrat\w+|demonstrat\w+|represents?|describes?|explains?)\b[^.!?\n]{0,80}\b(?:format|syntax|"
    r"how (?:a|the|you|to|it|tool)|examples?|looks? like|template|schema|structure|earlier|previous|"
    r"last|documentation|would|from|means?)\b|\b(?:that|this|it) (?:is|was) (?:how|what|the (?:format|"
    r"syntax|data|json|content\w*|way))\b|"
    r"\b(?:don['’]t|do not|never|not) (?:\w+ )?(?:run|execute|call|use|send|make|do) (?:it|this|that)\b|"
    r"\b(?:have|has|had|did|was|were|is)(?: not|n['’]t) (?:\w+ ){0,2}(?:run|execute\w*|call\w*|made|"
    r"make|sent|send|real|used?)\b|\bnot (?:been )?(?:run|executed|called|sent|a real)\b|"
    r"\b(?:shall|should) I (?:run|execute|call|proceed|go|do|make|send|use)|"
    r"\b(?:want|like) me to (?:run|execute|call|proceed|go ahead|send|do (?:it|this|that)|make)|"
    r"\b(?:if|once|when|after|until) you(?:['’]ve)? (?:approve|confirm|agree|give)|\bplaceholder|"
    r"\breplace\b.{0,40}\bwith (?:your|the actual|real)|\byou (?:can|could|would|should|might|must|"
    r"need to|may) (?:then |also )?(?:use|call|send|write|emit|adapt|replace|copy|paste|invoke)", re.I)
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


def announced(before: str) -> bool:
    """Tell prose that says in the first person, or by a word of assent, that a call comes."""
    last = paragraphs(before)[-2:]
    assent = bool(last) and ASSENT.fullmatch(last[-1])
    return bool(assent) or any(FIRST_PERSON.search(part) for part in last)


def ruled_out_before(before: str) -> bool:
    """Tell prose after which nothing is a call: an example, data, another's or a refusal."""
    last = paragraphs(before)[-1:]
    if not last:
        return False
    sentences = [part for part in SENTENCE_END.split(last[0]) if part.strip(" *#_:-")]
    sentence = sentences[-1] if sentences else ""
    spoken = [match.start() for match in FIRST_PERSON.finditer(sentence)]
    doubts = [match.start() for match in NO_CALL_BEFORE.finditer(sentence)]
    if doubts:
        return not spoken or doubts[-1] >= spoken[-1]
    return not spoken and bool(DOUBT_BEFORE.search(sentence))


def well_placed(line: str) -> bool:
    """Tell whether a marker stands where a call may: not in code, quotes or mid-sentence."""
    if not line.strip():
        return True
    if line[0] == ">" or line.count("`") % 2 or line.count('"') % 2 or line.rstrip()[-1] in "'\"“‘`(":
        return False
    if line.rstrip()[-1] in SENTENCE_MARKS:
        return True
    return bool(FIRST_PERSON.search(line[-200:])) or len(line.split()) <= 3


def is_call(found: Found, after: str, last: bool) -> bool:
    """Judge by the words around it whether a call is meant; in doubt it is not."""
    if ruled_out_before(found.before) or NO_CALL_AFTER.search(first_words(after)):
        return False
    if found.kind == "fenced":
        return found.first and last or announced(found.before)
    if found.kind == "bare":
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
        self._heads = HeadReader(tools)
        self._step: Callable[[bool], bool] = self._prose
        self._text = self._later = ""
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
        if (self._mid_line and self._shown and not self._text and not self._queue
                and not self._thought and not self._adjacent and self._step == self._prose
                and not SIGN.search(text)):
            self._before = (self._before + text)[-MAX_CONTEXT_CHARS:]
            return [TextDelta(text)]
        self._later = text
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
        """End the answer; reason is Ollama's done_reason."""
        result = self._finish(reason == "length")
        if self._thought.strip() and reason != "length" and self._enabled and not self._known:
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
        while True:
            while self._step(final and not self._later):
                pass
            if not self._later:
                break
            piece, self._later = self._later[:MAX_STEP_CHARS], self._later[MAX_STEP_CHARS:]
            self._text = self._text + piece if self._text else piece
        out, self._out = self._out, []
        return out

    # Prose: text passes until a call may begin.

    def _prose(self, final: bool) -> bool:
        if self._adjacent:
            return self._after_call(final)
        text, at = self._text, 0
        while True:
            if not self._mid_line:
                at = INDENT.match(text, at).end()  # type: ignore[union-attr]
                if at == len(text):
                    break
                self._mid_line = text[at] != "\n"
                if not self._mid_line:
                    at += 1
                    continue
                head = self._heads.read(text, at, True)
                if self._begins(head, at, True, final):
                    return self._step != self._prose or self._text != text[at:]
                if text[at] in "{[`~":
                    return self._quoted(at)
                at += text[at] == "<"
            sign = SIGN.search(text, at)
            if not sign:
                at = len(text)
                break
            at = sign.end()
            if sign.group() == "\n":
                self._mid_line = False
            elif self._begins(self._heads.read(text, at - 1, False), at - 1, False, final):
                return self._step != self._prose or self._text != text[at - 1:]
        self._push(text[:at])
        self._text = text[at:]
        return False

    def _begins(self, head: Union[None, str, Head], at: int, line_start: bool,
                final: bool) -> bool:
        """Hold the text from at on when a call begins there or still may."""
        if head is None or head == WAIT and final or self._wasted > MAX_WASTED_CHARS:
            return False
        if isinstance(head, Head) and head.rule == "tag_name" and not line_start:
            return False
        line = "" if line_start else (self._before + self._text[max(0, at - 300):at]).rsplit("\n", 1)[-1]
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
        self._found = Found("", [], kind, before, not self._spoke)
        if self._fence and not head.fence:
            self._found.kind = "fenced"
        self._step = self._brackets if head.body in ("json", "python") else \
            self._line if head.body == "line" else self._tags
        meant = tools_meant(head.name, self._tools) if head.name else []
        self._may_stream = (self._streams and head.rule in ("tool_call", "function_xml")
                            and self._found.kind == "own"
                            and (not self._found.line or self._found.line.rstrip()[-1] in SENTENCE_MARKS)
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
        fence = FENCE.match(text, at)
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
        at = BLANK.match(text).end()  # type: ignore[union-attr]
        if at == len(text):
            if final:
                self._push(text)
                self._text = ""
            return False
        head = self._heads.read(text, at, True)
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
            blank = BLANK.match(text, at).end()  # type: ignore[union-attr]
            tag = TAG.match(text, blank)
            if match and (final or match.end() < len(text) or match.group().lstrip()[0] in "<["):
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
        at = len(self._queue)
        while at and isinstance(self._queue[at - 1], Found) and self._queue[at - 1].fence == self._fence:  # type: ignore[union-attr]
            at -= 1
        raws = "".join(item.raw for item in self._queue[at:] if isinstance(item, Found))
        del self._queue[at:]
        self._step, self._mid_line = self._code, not raws.endswith("\n")
        self._push(raws)

    # Bodies: each step takes the new text and ends in _accept or _reject.

    def _brackets(self, final: bool) -> bool:
        piece, self._text = self._text, ""
        self._pieces.append(piece)
        self._length += len(piece)
        if self._may_stream and self._length - self._head.at < MAX_HEADER_CHARS and \
                self._stream_json("".join(self._pieces)):
            return True
        at, self._from = self._from, 0
        while True:
            at = self._scan.feed(piece, at)
            if at < 0:
                break
            length = self._length - len(piece) + at
            if length >= self._next_try:
                self._next_try = length + max(0, length - MAX_HEADER_CHARS) // 2
                if self._attempt(False):
                    return True
        return final and self._attempt(True)

    def _attempt(self, final: bool) -> bool:
        """Read the held text; False when more of it must come."""
        text, head = "".join(self._pieces), self._head
        self._pieces = [text]
        closed, calls = True, None
        try:
            if head.body == "python":
                calls, stop = read_python(text, head.at, self._tools, head.rule)
            else:
                value, stop, closed = read_json(text, head.at)
                calls = self._calls(value)
        except (ValueError, RecursionError):
            return final and self._reject(text, final)
        if not closed and not final:
            return False
        if calls is None or not closed and self._cut and not text[stop:].strip():
            return self._reject(text, final)
        return self._accept(calls, text, stop)

    def _calls(self, value: Any) -> Optional[List[Call]]:
        head = self._head
        if not head.name:
            return calls_in(value, self._tools, head.rule)
        if isinstance(value, dict) and "name" in value and value["name"] == head.name:
            return calls_in(value, self._tools, head.rule)
        call = make_call(head.name, value, self._tools, head.rule)
        return [call] if call else None

    def _tags(self, final: bool) -> bool:
        piece, self._text = self._text, ""
        self._pieces.append(piece)
        reader = self._reader
        reader.feed(piece[self._from:], final)
        self._from = 0
        if not reader.done:
            return False
        text = "".join(self._pieces)
        if reader.lost and isinstance(reader, TaggedInput):
            reader = self._reader.again(text[self._head.at:])
        call = make_call(self._head.name, tagged_values(reader.events), self._tools, self._head.rule)
        if call is None or reader.cut and self._cut:
            return self._reject(text, final)
        return self._accept([call], text, len(text) - len(reader.rest))

    def _line(self, final: bool) -> bool:
        match = LINE.match(self._text, self._head.at)
        if not match or match.end() == len(self._text) and not final:
            return False
        call = make_call(self._head.name, match.group().strip(), self._tools, self._head.rule)
        if call is None or self._cut and match.end() == len(self._text):
            return self._reject(self._text, final)
        return self._accept([call], self._text, match.end())

    def _accept(self, calls: List[Call], text: str, stop: int) -> bool:
        self._found.raw, self._found.calls = text[:stop], calls
        self._fence = self._head.fence or self._fence
        self._marks = self._fence or self._inner_mark
        self._found.fence = self._fence
        self._queue.append(self._found)
        self._text, self._step, self._adjacent = self._put_back(text[stop:]), self._prose, True
        self._mid_line = True
        self._count()
        return True

    def _put_back(self, text: str) -> str:
        """Keep a bounded piece of text that is looked at again, the rest for later."""
        self._later = text[MAX_STEP_CHARS:] + self._later
        return text[:MAX_STEP_CHARS]

    def _reject(self, text: str, final: bool) -> bool:
        """Pass what was no call after all; what follows its opener is looked at again."""
        self._wasted += len(text) if final else 0
        text = self._put_back(text)
        fence = FENCE.match(text) if self._head.fence else None
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
        self._open_stream(meant[0])
        self._text, self._pieces = text, []
        return True

    def _open_stream(self, tool: Tool) -> None:
        self._tool, self._writer, self._started, self._input = tool, InputWriter(tool), False, ""
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
        if reader.lost or reader.cut and (self._cut or isinstance(reader, JsonInput)):
            self._out.append(CallEnd(False))
        else:
            self._found.kind, self._found.raw = "open", ""
            self._found.closing = self._writer.close()
            self._queue.append(self._found)
        self._text, self._step, self._adjacent, self._mid_line = reader.rest, self._prose, True, True
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
        if THOUGHT_END.search(self._before):
            self._spoke = bool(THOUGHT_END.split(self._before)[-1].strip())
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
        behind = next((to for to in range(at, len(rest)) if isinstance(rest[to], Found)), len(rest))
        after = "".join(map(raw_of, rest[at:behind]))[:MAX_HOLD_CHARS]
        text_to = next((to for to, item in enumerate(rest) if isinstance(item, Found)), len(rest))
        assert isinstance(found, Found)
        if found.kind == "open":
            meant = not NO_CALL_AFTER.search(first_words(after))
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
    values: Dict[str, str] = {}
    key = ""
    for kind, text in events:
        if kind == "key":
            key, values[text] = text, ""
        elif kind == "text":
            values[key] += text
    return values


# ============================== 10. SHELL COMMANDS ==============================


# ============================== 11. RESCUE ==============================


# ============================== 12. REPLIES ==============================


# ============================== 13. TURN ==============================


# ============================== 14. STATUS ==============================


# ============================== I/O BELOW THIS LINE ==============================


# ============================== 15. UPSTREAM ==============================


# ============================== 16. SERVER ==============================


# ============================== 17. CLI ==============================
