"""Tools, feeding and joining for the tests of tool calls in text."""
import random

from qwencode import (
    Call,
    CallEnd,
    CallInput,
    CallStart,
    TextDelta,
    ThinkingDelta,
    Tool,
    ToolTextParser,
)


def tool(name, required, /, **properties):
    """A tool as Claude Code offers it; a property is its JSON type or a whole schema."""
    return Tool(name, "", {
        "type": "object",
        "properties": {key: {"type": kind} if isinstance(kind, str) else kind
                       for key, kind in properties.items()},
        "required": required.split(),
        "additionalProperties": False,
    })


TODO = {"type": "array", "items": {"type": "object", "properties": {
    "content": {"type": "string"}, "status": {"type": "string",
                                              "enum": ["pending", "in_progress", "completed"]}},
    "required": ["content", "status"], "additionalProperties": False}}
CLAUDE = {each.name: each for each in (
    tool("Agent", "description prompt", description="string", prompt="string",
         subagent_type="string", run_in_background="boolean"),
    tool("Bash", "command", command="string", timeout="number", description="string",
         run_in_background="boolean"),
    tool("Edit", "file_path old_string new_string", file_path="string", old_string="string",
         new_string="string", replace_all="boolean"),
    tool("Glob", "pattern", pattern="string", path="string"),
    tool("Grep", "pattern", pattern="string", path="string", glob="string", output_mode={
        "type": "string", "enum": ["content", "files_with_matches", "count"]}),
    tool("Read", "file_path", file_path="string", offset="integer", limit="integer"),
    tool("TodoWrite", "todos", todos=TODO),
    tool("WebFetch", "url prompt", url="string", prompt="string"),
    tool("Write", "file_path content", file_path="string", content="string"),
)}
CLAUDE["mcp__db__query"] = Tool("mcp__db__query", "", {
    "type": "object", "properties": {"sql": {"type": "string"}, "options": {"type": "object"}},
    "required": ["sql"]})
QWEN = {each.name: each for each in (
    tool("run_shell_command", "command", command="string", is_background="boolean",
         timeout="number", description="string", directory="string"),
    tool("read_file", "file_path", file_path="string", offset="number", limit="number"),
    tool("write_file", "file_path content", file_path="string", content="string"),
    tool("edit", "file_path old_string new_string", file_path="string", old_string="string",
         new_string="string", replace_all="boolean"),
    tool("list_directory", "path", path="string"),
    tool("grep_search", "pattern", pattern="string", glob="string", path="string"),
    tool("glob", "pattern", pattern="string", path="string"),
    tool("tool_call", "name", name="string", arguments="object"),
)}


def cuts(text, how):
    """Cut text: None whole, an int into pieces of that size, else at random by seed."""
    if how is None:
        return [text]
    if isinstance(how, int):
        return [text[at:at + how] for at in range(0, len(text), how)]
    dice, pieces, at = random.Random(how), [], 0
    while at < len(text):
        step = dice.choice((1, 2, 3, 5, 8, 13, 40))
        pieces.append(text[at:at + step])
        at += step
    return pieces


def joined(deltas):
    """Join neighbouring text, thinking and input; streamed calls become whole ones."""
    result, pieces, name = [], [], ""
    for delta in deltas:
        if isinstance(delta, CallStart):
            name, pieces = delta, []
        elif isinstance(delta, CallInput):
            pieces.append(delta.json)
        elif isinstance(delta, CallEnd):
            result.append(("streamed", name.name, "".join(pieces), delta.finished))
        elif result and type(result[-1]) is type(delta) and not isinstance(delta, Call):
            result[-1] = type(delta)(result[-1].text + delta.text)
        else:
            assert isinstance(delta, Call) or delta.text
            result.append(delta)
    return result


def run(text, how=None, tools=CLAUDE, reason="stop", thought=False, **options):
    parser = ToolTextParser(tools, **options)
    deltas = []
    for piece in cuts(text, how):
        deltas += parser.thought(piece) if thought else parser.feed(piece)
    return joined(deltas + parser.close(reason))


def calls_of(deltas):
    return [(each.name, each.input) for each in deltas if isinstance(each, Call)]


def shown_by(deltas):
    return "".join(each.text for each in deltas if isinstance(each, TextDelta))


__all__ = ["CLAUDE", "QWEN", "Call", "TextDelta", "ThinkingDelta", "ToolTextParser", "calls_of",
           "cuts", "joined", "run", "shown_by", "tool"]
