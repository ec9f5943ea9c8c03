"""The table of model outputs: family, name, text, the calls in it and the text shown.

shown None means: nothing but white space. A negative has no calls and shows its text
unchanged. Cases whose place in the table is a multiple of three were held back while the
parser was written.
"""
from typing import Any, List, NamedTuple, Optional, Tuple

from qwencode import Tool
from tool_text_helpers import CLAUDE, QWEN


class Case(NamedTuple):
    family: str
    name: str
    text: str
    calls: List[Tuple[str, Any]]
    shown: Optional[str] = None
    tools: Any = CLAUDE
    reason: str = "stop"
    thought: bool = False


READ = ("Read", {"file_path": "a.py"})
LS = ("Bash", {"command": "ls -la"})
NS = "antml" + ":"
JSON = '{"name": "Read", "arguments": {"file_path": "a.py"}}'
JSON_LS = '{"name": "Bash", "arguments": {"command": "ls -la"}}'
PRETTY = '{\n  "name": "Read",\n  "arguments": {\n    "file_path": "a.py"\n  }\n}'
XML = "<function=Read>\n<parameter=file_path>\na.py\n</parameter>\n</function>"
XML_LS = "<function=Bash>\n<parameter=command>\nls -la\n</parameter>\n</function>"
TAGGED = f"<tool_call>\n{JSON}\n</tool_call>"
TAGGED_LS = f"<tool_call>\n{JSON_LS}\n</tool_call>"
QWEN3 = f"<tool_call>\n{XML}\n</tool_call>"
QWEN3_LS = f"<tool_call>\n{XML_LS}\n</tool_call>"


def write(content, path="a.py"):
    return ("Write", {"file_path": path, "content": content})


def positives(family, *rows, calls=(READ,), shown=None, **more):
    return [Case(family, f"{family} {number}", text, list(calls), shown, **more)
            for number, text in enumerate(rows, 1)]


def negatives(family, *rows, **more):
    return [Case(family, f"{family} {number}", text, [], text, **more)
            for number, text in enumerate(rows, 1)]


def spelled(family, *rows, **more):
    """Rows of (text, calls) or (text, calls, shown)."""
    return [Case(family, f"{family} {number}", row[0], row[1], *row[2:], **more)
            for number, row in enumerate(rows, 1)]


CASES = [
    *positives(
        "hermes", TAGGED, f"<tool_call>{JSON}</tool_call>", f"<tool_call>\n{PRETTY}\n</tool_call>",
        f"<tool_call>\n{JSON}", f"<tool_call>\n{JSON}\n</tool_c", f"{JSON}\n</tool_call>",
        f"\n\n{TAGGED}\n", f"<tool_call>\n[{JSON}]\n</tool_call>",
        f"<tool_call>\n```json\n{JSON}\n```\n</tool_call>", f"<tool_call>\r\n{JSON}\r\n</tool_call>",
        f"<TOOL_CALL>\n{JSON}\n</TOOL_CALL>", f"{TAGGED}<|im_end|>",
        '<tool_call>\n{"arguments": {"file_path": "a.py"}, "name": "Read"}\n</tool_call>',
        '<tool_call>\n{{"name": "Read", "arguments": {"file_path": "a.py"}}}\n</tool_call>'),
    *spelled(
        "hermes several", (f"{TAGGED}\n{TAGGED_LS}", [READ, LS]),
        (f"<tool_call>\n{JSON}\n{JSON_LS}\n</tool_call>", [READ, LS]),
        (f"<tool_call>\n{JSON}{JSON_LS}\n</tool_call>", [READ, LS]),
        (f"<tool_call>\n[{JSON}, {JSON_LS}]\n</tool_call>", [READ, LS]),
        (f"{TAGGED}{TAGGED_LS}", [READ, LS]),
        (f"<tool_call>\n{JSON}\n<tool_call>\n{JSON_LS}\n</tool_call>", [READ, LS]),
        (f"I'll read it.\n{TAGGED}\nAnd list the folder.\n{TAGGED_LS}", [READ, LS],
         "I'll read it.\n\nAnd list the folder.\n")),
    *spelled(
        "hermes in prose", (f"I'll read the file.\n\n{TAGGED}", [READ], "I'll read the file.\n\n"),
        (f"Reading. {TAGGED}", [READ], "Reading. "), (f"Let me look: {TAGGED}", [READ], "Let me look: "),
        (f"Hi there {TAGGED}", [READ], "Hi there "),
        (f"The parser seems off, so I'll read it {TAGGED}", [READ],
         "The parser seems off, so I'll read it "),
        (f"{TAGGED}\n\nThat will show the file.", [READ], "\n\nThat will show the file."),
        (f"The user wants a.py.\n{TAGGED}", [READ], "The user wants a.py.\n"),
        (f"I don't see the file yet. Let me read it:\n{TAGGED}", [READ],
         "I don't see the file yet. Let me read it:\n"),
        (f"I'll look at the example file first.\n{TAGGED}", [READ],
         "I'll look at the example file first.\n"),
        (f"</think>\n\n{TAGGED}", [READ], "</think>\n\n"),
        (f"Instead of guessing, I'll read it.\n{TAGGED}", [READ], "Instead of guessing, I'll read it.\n")),
    *positives(
        "qwen3 coder", QWEN3, XML, f"{XML}\n</tool_call>", f"<tool_call>\n{XML}",
        "<tool_call>\n<function=Read>\n<parameter=file_path>\na.py\n</parameter>\n</tool_call>",
        "<tool_call>\n<function=Read>\n<parameter=file_path>\na.py\n</function>\n</tool_call>",
        "<function=Read>\n<parameter=file_path>\na.py\n</parameter>",
        "<function=Read>\n<parameter=file_path>\na.py", "<function=Read><parameter=file_path>a.py",
        "<function=Read>\n<parameter=file_path> a.py", "<function=Read>\n<parameter=file_path>\na.py\n</para",
        "<function=Read>\n<parameter=file_path>\na.py\n</function>",
        "<tool_call><function=Read><parameter=file_path>a.py</parameter></function></tool_call>",
        "<tool_call>\r\n<function=Read>\r\n<parameter=file_path>\r\na.py\r\n</parameter>\r\n</function>",
        '<function="Read">\n<parameter="file_path">\na.py\n</parameter>\n</function>',
        '<function name="Read"><parameter name="file_path">a.py</parameter></function>',
        '<function=Read>{"file_path": "a.py"}</function>',
        '<tool_call>\n<function=Read>\n{"file_path": "a.py"}\n</function>\n</tool_call>',
        "<function=Read>\n<parameter=path>\na.py\n</parameter>\n</function>",
        "<function=read_file>\n<parameter=filePath>\na.py\n</parameter>\n</function>",
        "<seed:tool_call>\n<function=Read>\n<parameter=file_path>a.py</parameter>\n</function>\n"
        "</seed:tool_call>"),
    *spelled(
        "qwen3 coder values",
        ("<function=Read>\n<parameter=file_path>\na.py\n</parameter>\n<parameter=limit>\n10\n</parameter>\n"
         "</function>", [("Read", {"file_path": "a.py", "limit": 10})]),
        ("<function=Write>\n<parameter=file_path>\na.py\n</parameter>\n<parameter=content>\nif a<b=c>d & e:\n"
         "\tx = \"<p>\"\n\n</parameter>\n</function>\n</tool_call>", [write('if a<b=c>d & e:\n\tx = "<p>"\n')]),
        ("<function=Write>\n<parameter=file_path>\na.md\n</parameter>\n<parameter=content>\n"
         "Close with </parameter> and </function> tags.\nDone.\n</parameter>\n</function>",
         [write("Close with </parameter> and </function> tags.\nDone.", "a.md")]),
        (f"<tool_call>\n<function=Write>\n<parameter=file_path>\na.md\n</parameter>\n<parameter=content>\n"
         f"# Calls\n{QWEN3}\nEnd.\n</parameter>\n</function>\n</tool_call>",
         [write(f"# Calls\n{QWEN3}\nEnd.", "a.md")]),
        ("<function=Write>\n<parameter=content>\nx = 1\n<parameter=file_path>\na.py\n</function>",
         [write("x = 1")]),
        ("<function=create_new_file>\n<parameter=filepath> test.txt\n<parameter=contents> hello",
         [write("hello", "test.txt")]),
        ("<function=Edit>\n<parameter=file_path>\na.py\n</parameter>\n<parameter=old_string>\n\n</parameter>\n"
         "<parameter=new_string>\n    x\n</parameter>\n<parameter=replace_all>\nTrue\n</parameter>\n</function>",
         [("Edit", {"file_path": "a.py", "old_string": "", "new_string": "    x", "replace_all": True})]),
        ("<function=TodoWrite>\n<parameter=todos>\n[{\"content\": \"a\", \"status\": \"pending\"}]\n</parameter>\n"
         "</function>", [("TodoWrite", {"todos": [{"content": "a", "status": "pending"}]})]),
        ("<function=Write>\n<parameter=file_path>\na.html\n</parameter>\n<parameter=content>\n<ul>\n<li>1</li>\n"
         "</ul>\n<path>x</path>\n</parameter>\n</function>",
         [write("<ul>\n<li>1</li>\n</ul>\n<path>x</path>", "a.html")]),
        ("<function=Write>\n<parameter=file_path>\na.txt\n</parameter>\n<parameter=content>\none\r\ntwo\r\n"
         "\r\n</parameter>\n</function>", [write("one\r\ntwo\r\n", "a.txt")]),
        (f"{QWEN3}\n{QWEN3_LS}", [READ, LS]), (f"{XML}\n{XML_LS}", [READ, LS]),
        (f"<tool_call>\n{XML}\n{XML_LS}\n</tool_call>", [READ, LS]),
        (f"<function=Read>\n<parameter=file_path>\na.py\n{XML_LS}", [READ, LS]),
        (f"Reading.\n{XML}\n</tool_call>", [READ], "Reading.\n"),
        (f"{XML}\n\nNow I'll wait.", [READ], "\n\nNow I'll wait."),
        ("<function=Read>\n<parameter=file_path>\na.py\n</parameter>\n\nNow I'll wait.", [READ],
         "\n\nNow I'll wait.")),
    *positives(
        "bare json", JSON, PRETTY, f"\n{JSON}\n", f"{JSON}<|im_end|>", JSON.replace(": ", ":"),
        '{"name":"Read","parameters":{"file_path":"a.py"}}', '{"tool": "Read", "args": {"file_path": "a.py"}}',
        '{"tool_name": "Read", "tool_input": {"file_path": "a.py"}}',
        '{"function": "Read", "kwargs": {"file_path": "a.py"}}',
        '{"action": "Read", "action_input": {"file_path": "a.py"}}',
        '{"recipient": "Read", "input": {"file_path": "a.py"}}',
        '{"recipient_name": "functions.Read", "parameters": {"file_path": "a.py"}}',
        '{"function": {"name": "Read", "arguments": {"file_path": "a.py"}}}',
        '{"type": "function", "function": {"name": "Read", "arguments": "{\\"file_path\\": \\"a.py\\"}"}}',
        '{"function_call": {"name": "Read", "arguments": {"file_path": "a.py"}}}',
        '{"tool_call": {"name": "Read", "arguments": {"file_path": "a.py"}}}',
        '{"tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "Read", "arguments": '
        '"{\\"file_path\\": \\"a.py\\"}"}}]}',
        '{"type": "tool_use", "id": "toolu_1", "name": "Read", "input": {"file_path": "a.py"}}',
        '{"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "Read", "arguments": '
        '{"file_path": "a.py"}}}]}',
        '{"arguments": {"file_path": "a.py"}, "name": "Read"}', f"[{JSON}]", f"[\n  {JSON}\n]",
        '{"thought": "I must see it", "tool": "Read", "input": {"file_path": "a.py"}}',
        '{"name": "Read", "file_path": "a.py"}', '{"type": "function", "name": "Read", "parameters": '
        '{"file_path": "a.py"}}', '{"id": "call_9", "name": "Read", "arguments": {"file_path": "a.py"}}',
        '{"name": "Read", "arguments": "{\\"file_path\\": \\"a.py\\"}"}',
        '{"function": {"name": "Read"}, "arguments": {"file_path": "a.py"}}',
        '{"tool_uses": [{"recipient_name": "functions.Read", "parameters": {"file_path": "a.py"}}]}',
        "</tool_call>".join([JSON, ""]), f"{JSON};"),
    *spelled(
        "bare json in prose", (f"I'll read the file.\n\n{JSON}", [READ], "I'll read the file.\n\n"),
        (f"The file first.\n{JSON}", [READ], "The file first.\n"),
        (f"{JSON}\n\nThis will show the file.", [READ], "\n\nThis will show the file."),
        (f"{JSON}\n{JSON_LS}", [READ, LS]), (f"{PRETTY}\n\n{JSON_LS}", [READ, LS]),
        (f"[{JSON}, {JSON_LS}]", [READ, LS]), (f"{JSON}, {JSON_LS}", [READ, LS]), (f"{JSON}{JSON_LS}", [READ, LS]),
        (f"First I'll read it:\n\n{JSON}\n\nThen I'll list:\n\n{JSON_LS}", [READ, LS],
         "First I'll read it:\n\n\n\nThen I'll list:\n\n"),
        (f"Here is the tool call:\n{JSON}", [READ], "Here is the tool call:\n"),
        (f"hmm\n</think>\n\n{JSON}", [READ], "hmm\n</think>\n\n"),
        (f"I need to read the config:\n{JSON}", [READ], "I need to read the config:\n"),
        (f"You asked for the content. I'll read it.\n{JSON}", [READ],
         "You asked for the content. I'll read it.\n"),
        (f"  {JSON}", [READ])),
    *positives(
        "fenced", f"```json\n{JSON}\n```", f"```\n{JSON}\n```", f"```tool_call\n{JSON}\n```",
        f"```json\n{PRETTY}\n```\n", f"```json\n{JSON}", f"```json\n[{JSON}]\n```", f"~~~json\n{JSON}\n~~~",
        f"````json\n{JSON}\n````", f"```json {JSON} ```", f"```xml\n{TAGGED}\n```", f"```xml\n{XML}\n```",
        f"```bash\n{JSON}\n```", f"```tool_code\nRead(file_path='a.py')\n```",
        "```tool_code\nprint(default_api.Read(file_path='a.py'))\n```", f"```python\n[Read(file_path=\"a.py\")]\n```",
        f"```json\r\n{JSON}\r\n```\r\n", f"```JSON\n\n{JSON}\n\n```"),
    *spelled(
        "fenced in prose", (f"I'll read it:\n\n```json\n{JSON}\n```", [READ], "I'll read it:\n\n"),
        (f"Let me read the file.\n```json\n{JSON}\n```\nThis shows its content.", [READ],
         "Let me read the file.\n\nThis shows its content."),
        (f"Sure:\n```json\n{JSON}\n```", [READ], "Sure:\n"), (f"Okay.\n\n```\n{JSON}\n```", [READ], "Okay.\n\n"),
        (f"Let's start with the file:\n```json\n{JSON}\n```\nThen:\n```json\n{JSON_LS}\n```",
         [READ, LS], "Let's start with the file:\n\nThen:\n"),
        (f"```json\n{JSON}\n```\n```json\n{JSON_LS}\n```", [READ, LS]),
        (f"```json\n{JSON}\n{JSON_LS}\n```", [READ, LS]), (f"I’ll check.\n```json\n[{JSON}, {JSON_LS}]\n```",
                                                           [READ, LS], "I’ll check.\n"),
        (f"Certainly! I'll do that now.\n\n```json\n{JSON}\n```", [READ], "Certainly! I'll do that now.\n\n")),
    *positives(
        "markers", f"<tools>\n{JSON}\n</tools>", f"<function>{JSON}</function>",
        f"<function_call>{JSON}</function_call>", f"<function-call>\n{JSON}\n</function-call>",
        f"<|tool_call|>{JSON}", f"<|tool_call|>[{JSON}]<|/tool_call|>", f"<|tool_call>{JSON}<tool_call|>",
        f"[TOOL_CALLS] [{JSON}]", f"[TOOL_CALLS][{JSON}]</s>", '[TOOL_CALLS]Read{"file_path": "a.py"}',
        '[TOOL_CALLS]Read[ARGS]{"file_path": "a.py"}', '[TOOL_CALLS]Read[CALL_ID]c1[ARGS]{"file_path": "a.py"}',
        f"[tool_call]\n{JSON}\n[/tool_call]", f"<|python_tag|>{JSON}", f"<|python_tag|>{JSON}<|eom_id|>",
        '<|python_tag|>Read.call(file_path="a.py")', 'functools[{"name": "Read", "arguments": {"file_path": "a.py"}}]',
        f"<TOOLCALL>[{JSON}]</TOOLCALL>", f"<tool_calls>[{JSON}]</tool_calls>", f"<tool_calls>\n{JSON}\n</tool_calls>",
        f"<|action_start|><|plugin|>{JSON}<|action_end|>",
        '<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "Read", "parameters": {"file_path": "a.py"}}]'
        "<|END_ACTION|>", f"<longcat_tool_call>{JSON}</longcat_tool_call>",
        '<|tools_prefix|>[{"Read": {"file_path": "a.py"}}]<|tools_suffix|>',
        '<|tool_call_start|>[Read(file_path="a.py")]<|tool_call_end|>',
        '<|python_start|>[Read(file_path="a.py")]<|python_end|>',
        '<function_calls>\nRead(file_path="a.py")\n</function_calls>', '>>>Read\n{"file_path": "a.py"}',
        '<|recipient|> Read\n<|content|> {"file_path": "a.py"}', f"TOOL_CALL: {JSON}",
        '<start_function_call>call:Read{file_path:<escape>a.py<escape>}<end_function_call>',
        '<|tool_call>call:Read{file_path:<|"|>a.py<|"|>}<tool_call|>',
        '<function=Read>{"file_path": "a.py"}</function><|eot_id|>', f"<tool_use>\n{JSON}\n</tool_use>",
        '<tool_call>Read\n{"file_path": "a.py"}\n</tool_call>', '<tool_call>\n<name>Read</name>\n<arguments>'
        '{"file_path": "a.py"}</arguments>\n</tool_call>', '<tool_call name="Read">{"file_path": "a.py"}</tool_call>'),
    *positives(
        "glm", "<tool_call>Read\n<arg_key>file_path</arg_key>\n<arg_value>a.py</arg_value>\n</tool_call>",
        "<tool_call>Read<arg_key>file_path</arg_key><arg_value>a.py</arg_value></tool_call>",
        "<tool_call>Read\n<arg_key>file_path</arg_key>\n<arg_value>a.py</arg_value>",
        'Read\n{"file_path": "a.py"}'),
    *spelled(
        "glm values",
        ("<tool_call>Read\n<arg_key>file_path</arg_key>\n<arg_value>a.py</arg_value>\n<arg_key>limit</arg_key>\n"
         "<arg_value>5</arg_value>\n</tool_call>", [("Read", {"file_path": "a.py", "limit": 5})]),
        ("<tool_call>Write\n<arg_key>file_path</arg_key>\n<arg_value>a.py</arg_value>\n<arg_key>content</arg_key>\n"
         "<arg_value>if a < b:\n    <b>x</b>\n</arg_value>\n</tool_call>", [write("if a < b:\n    <b>x</b>\n")]),
        ("I'll list.\n<tool_call>Bash\n<arg_key>command</arg_key>\n<arg_value>ls -la</arg_value>\n</tool_call>", [LS],
         "I'll list.\n")),
    *positives(
        "deepseek and kimi",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>Read\n```json\n{\"file_path\": \"a.py\"}\n```"
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>Read<｜tool▁sep｜>{"file_path": "a.py"}<｜tool▁call▁end｜>'
        "<｜tool▁calls▁end｜><｜end▁of▁sentence｜>",
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="Read">\n<｜DSML｜parameter name="file_path" string="true">a.py'
        "</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜function_calls>",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.Read:0<|tool_call_argument_begin|>"
        '{"file_path": "a.py"}<|tool_call_end|><|tool_calls_section_end|>',
        '<|tool_call_begin|>functions.Read:0<|tool_call_argument_begin|>{"file_path": "a.py"}<|tool_call_end|>',
        '<|channel|>commentary to=functions.Read <|constrain|>json<|message|>{"file_path": "a.py"}<|call|>',
        '<minimax:tool_call>\n<invoke name="Read">\n<parameter name="file_path">a.py</parameter>\n</invoke>\n'
        "</minimax:tool_call>",
        '<｜tool_calls_begin｜><｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name="Read"><steptml:parameter '
        'name="file_path">a.py</steptml:parameter></steptml:invoke><｜tool_call_end｜><｜tool_calls_end｜>'),
    *spelled(
        "deepseek several",
        ('<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>Read<｜tool▁sep｜>{"file_path": "a.py"}<｜tool▁call▁end｜>\n'
         '<｜tool▁call▁begin｜>Bash<｜tool▁sep｜>{"command": "ls -la"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>', [READ, LS]),
        ('<|tool_calls_section_begin|><|tool_call_begin|>functions.Read:0<|tool_call_argument_begin|>{"file_path": '
         '"a.py"}<|tool_call_end|><|tool_call_begin|>functions.Bash:1<|tool_call_argument_begin|>{"command": "ls -la"}'
         "<|tool_call_end|><|tool_calls_section_end|>", [READ, LS]),
        ('I\'ll check.[TOOL_CALLS]Read{"file_path": "a.py"}[TOOL_CALLS]Bash{"command": "ls -la"}', [READ, LS],
         "I'll check."),
        (f"<|python_tag|>{JSON}; {JSON_LS}", [READ, LS]),
        ('[Read(file_path="a.py"), Bash(command=\'ls -la\')]', [READ, LS])),
    *positives(
        "claude invoke", '<invoke name="Read">\n<parameter name="file_path">a.py</parameter>\n</invoke>',
        '<function_calls>\n<invoke name="Read">\n<parameter name="file_path">a.py</parameter>\n</invoke>\n'
        "</function_calls>",
        f'<{NS}function_calls>\n<{NS}invoke name="Read">\n<{NS}parameter name="file_path">a.py</{NS}parameter>\n'
        f"</{NS}invoke>\n</{NS}function_calls>",
        '<invoke name="Read">\n<parameter name="file_path">a.py</parameter>',
        "<function_calls><invoke><tool_name>Read</tool_name><parameters><file_path>a.py</file_path></parameters>"
        "</invoke></function_calls>",
        '<tool name="Read"><parameter name="file_path">a.py</parameter></tool>'),
    *spelled(
        "claude invoke values",
        ('<invoke name="Write">\n<parameter name="file_path">a.py</parameter>\n<parameter name="content">x = 1\n'
         "</parameter>\n</invoke>", [write("x = 1\n")]),
        ('<invoke name="Read">\n<parameter name="file_path">a.py</parameter>\n</invoke>\n<invoke name="Bash">\n'
         '<parameter name="command">ls -la</parameter>\n</invoke>', [READ, LS])),
    *positives(
        "react", 'Action: Read\nAction Input: {"file_path": "a.py"}', "Action: Read\nAction Input: a.py",
        'Action: Read\nAction Input: {"file_path": "a.py"}\n', 'Action: Read\nAction Input: "a.py"',
        'Action:\n```json\n{"action": "Read", "action_input": {"file_path": "a.py"}}\n```',
        'Action: ```json\n[{"tool_name": "Read", "parameters": {"file_path": "a.py"}}]\n```',
        '**Action:** Read\n**Action Input:** {"file_path": "a.py"}', "action: read_file\naction input: a.py"),
    *spelled(
        "react in prose",
        ('Thought: I need to see the file.\nAction: Read\nAction Input: {"file_path": "a.py"}', [READ],
         "Thought: I need to see the file.\n"),
        ("Thought: list it\nAction: Bash\nAction Input: ls -la", [LS], "Thought: list it\n"),
        ('Action: Read\nAction Input: {"file_path": "a.py"}\nObservation: x = 1', [READ], "\nObservation: x = 1")),
    *positives(
        "cline", "<read_file>\n<path>a.py</path>\n</read_file>", "<read_file><path>a.py</path></read_file>",
        "<Read>\n<file_path>a.py</file_path>\n</Read>", "<Read>a.py</Read>",
        "<view_file>\n<path>a.py</path>\n</view_file>", '<Read>{"file_path": "a.py"}</Read>',
        "<tool>Read</tool><tool_input>a.py</tool_input>",
        '<tool>Read</tool>\n<tool_input>{"file_path": "a.py"}</tool_input>',
        "<read_file>\n<args>\n<path>a.py</path>\n</args>\n</read_file>",
        "<tool_call>\n<read_file>\n<path>a.py</path>\n</read_file>\n</tool_call>"),
    *positives(
        "shell tags", "<bash>ls -la</bash>", "<bash>\nls -la\n</bash>", "<terminal_command>ls -la</terminal_command>",
        "<execute_command>\n<command>ls -la</command>\n<requires_approval>false</requires_approval>\n"
        "</execute_command>", "<Bash>\n<command>ls -la</command>\n</Bash>",
        "<run_command>ls -la</run_command>", "<execute_bash>\nls -la\n</execute_bash>", calls=[LS]),
    *spelled(
        "cline values",
        ("<write_to_file>\n<path>a.html</path>\n<content>\n<div>\n</div>\n</content>\n<line_count>2</line_count>\n"
         "</write_to_file>", [write("<div>\n</div>", "a.html")]),
        ("I'll write it.\n<write_to_file>\n<path>a.py</path>\n<content>\nx = 1\n</content>\n</write_to_file>",
         [write("x = 1")], "I'll write it.\n"),
        ("<search_files>\n<path>src</path>\n<regex>TODO</regex>\n</search_files>",
         [("Grep", {"path": "src", "pattern": "TODO"})])),
    *positives(
        "named", 'Read({"file_path": "a.py"})', 'Read {"file_path": "a.py"}', 'Read: {"file_path": "a.py"}',
        'Read(file_path="a.py")', '[Read(file_path="a.py")]', "[Read(file_path='a.py')]", '[read_file(path="a.py")]',
        '✿FUNCTION✿: Read\n✿ARGS✿: {"file_path": "a.py"}\n✿RESULT✿'),
    *positives(
        "broken json", '{"name": "Read", "arguments": {"file_path": "a.py"}', f"{JSON}}}",
        '{"name": "Read", "arguments": {"file_path": "a.py",},}', "{'name': 'Read', 'arguments': {'file_path': 'a.py'}}",
        '{"name": "Read", "arguments": {"file_path": "a.py"} // the file\n}', '{name: "Read", arguments: {file_path: '
        '"a.py"}}', '{"name": "Read", "arguments": "{\'file_path\': \'a.py\'}"}',
        '{"name": "Read", "arguments": "\\"{\\\\\\"file_path\\\\\\": \\\\\\"a.py\\\\\\"}\\""}',
        f"<tool_call>\n{JSON[:-1]}\n</tool_call>", f"<tool_call>\n{JSON}}}\n</tool_call>",
        "<tool_call>\n{'name': 'Read', 'arguments': {'file_path': 'a.py', 'limit': None}}\n</tool_call>",
        '{\n  "name": "Read"\n  "arguments": {"file_path": "a.py"}\n}', "{“name”: “Read”, “arguments”: {“file_path”: "
        "“a.py”}}", '{"name": "Read", "arguments": {"file_path": "a.py"}/* file */}', f"```json\n{JSON[:-1]}\n```",
        '{"name": "Read", "arguments": {"file_path": "a.py"}}}}', '{"name": "Read", "arguments": [{"file_path": "a.py"}]}',
        '<tool_call>\n{"name": "Read", "arguments": {"file_path": "a.py"}\n<tool_call>'.rsplit("\n", 1)[0],
        '{\r\n  "name": "Read",\r\n  "arguments": {\r\n    "file_path": "a.py"\r\n  }\r\n}',
        '{"name": "Read", "arguments": {"arguments": {"file_path": "a.py"}}}',
        '{"name": "Read", "arguments": {"file_path": "a.py"}\n\nI\'ll wait for it.'.split("\n\n")[0]),
    *spelled(
        "broken values",
        ('{"name": "Write", "arguments": {"file_path": "a.py", "content": "one\ntwo\n\tthree\n"}}',
         [write("one\ntwo\n\tthree\n")]),
        ('{"name": "Write", "arguments": {"file_path": "a.py", "content": "print("hi")\\n"}}', [write('print("hi")\n')]),
        ('{"name": "Bash", "arguments": {"command": "echo "a b" > c.txt"}}', [("Bash", {"command": 'echo "a b" > c.txt'})]),
        ('{"name": "Bash", "arguments": {"command": "grep \\d+ \\$HOME"}}', [("Bash", {"command": "grep \\d+ \\$HOME"})]),
        ('{"name": "Write", "arguments": {"file_path": "a.py", "content": """x = "1"\ny = {}\n"""}}',
         [write('x = "1"\ny = {}\n')]),
        ("{'name': 'Bash', 'arguments': {'command': 'echo it\\'s'}}", [("Bash", {"command": "echo it's"})]),
        ("{'name': 'Bash', 'arguments': {'command': \"echo 'x'\", 'run_in_background': True}}",
         [("Bash", {"command": "echo 'x'", "run_in_background": True})]),
        ('{"name": "Write", "arguments": {"file_path": "a.json", "content": "{\\"name\\": \\"x\\", \\"a\\": [1, 2]}"}}',
         [write('{"name": "x", "a": [1, 2]}', "a.json")]),
        ('<tool_call>\n{"name": "Write", "arguments": {"file_path": "a.md", "content": "</tool_call>\\n```json\\n{}\\n```'
         '\\n<tool_call>"}}\n</tool_call>', [write("</tool_call>\n```json\n{}\n```\n<tool_call>", "a.md")]),
        ('<tool_call>\n{"name": "Write", "arguments": {"file_path": "a.js", "content": "const s = "}";\nrun()"}}\n'
         "</tool_call>", [write('const s = "}";\nrun()', "a.js")]),
        ("{'name': 'Write', 'arguments': {'file_path': 'a.py', 'content': 'say \"hi\"\\n'}}", [write('say "hi"\n')]),
        ('{"name": "Write", "arguments": {"file_path": "a.py", "content": `a\nb`}}', [write("a\nb")]),
        ('{"name": "Write", "arguments": {"file_path": "u.txt", "content": "\\ud83d\\ude00 \\u00e9"}}',
         [write("😀 é", "u.txt")]),
        ('{"name": "Write", "arguments": {"file_path": "a.json", "content": {"a": 1}}}', [write('{\n  "a": 1\n}', "a.json")])),
    *spelled(
        "names and parameters",
        ('{"name": "read", "arguments": {"path": "a.py"}}', [READ]),
        ('{"name": "READ", "arguments": {"filename": "a.py"}}', [READ]),
        ('{"name": "functions.Read", "arguments": {"filePath": "a.py"}}', [READ]),
        ('{"name": "run_command", "arguments": {"cmd": "ls -la"}}', [LS]),
        ('{"name": "shell", "arguments": {"command": ["ls", "-la"]}}', [LS]),
        ('{"name": "execute_bash", "arguments": {"command": ["bash", "-c", "ls -la"]}}',
         [("Bash", {"command": "bash -c 'ls -la'"})]),
        ('{"name": "read_file", "arguments": {"path": "a.py", "limit": "10", "encoding": "utf-8"}}',
         [("Read", {"file_path": "a.py", "limit": 10})]),
        ('{"name": "str_replace", "arguments": {"path": "a.py", "old_str": "a", "new_str": "b"}}',
         [("Edit", {"file_path": "a.py", "old_string": "a", "new_string": "b"})]),
        ('{"name": "create_file", "arguments": {"path": "a.py", "contents": "x"}}', [write("x")]),
        ('{"name": "search_files", "arguments": {"query": "TODO", "path": "src"}}',
         [("Grep", {"pattern": "TODO", "path": "src"})]),
        ('{"name": "find_files", "arguments": {"pattern": "*.py"}}', [("Glob", {"pattern": "*.py"})]),
        ('{"name": "edit_file", "arguments": {"path": "a.py", "old_string": "a", "new_string": "b", "replace_all": "true"}}',
         [("Edit", {"file_path": "a.py", "old_string": "a", "new_string": "b", "replace_all": True})]),
        ('{"name": "str_replace_editor", "arguments": {"command": "create", "path": "a.py", "file_text": "x"}}', [write("x")]),
        ('{"name": "str_replace_editor", "arguments": {"command": "view", "path": "a.py"}}', [READ]),
        ('{"name": "TodoWrite", "arguments": {"todos": "[{\\"content\\": \\"a\\", \\"status\\": \\"pending\\"}]"}}',
         [("TodoWrite", {"todos": [{"content": "a", "status": "pending"}]})]),
        ('{"name": "Bash", "arguments": {"command": "ls -la", "timeout": "5000", "run_in_background": "false"}}',
         [("Bash", {"command": "ls -la", "timeout": 5000, "run_in_background": False})]),
        ('{"name": "Edit", "arguments": {"file_path": "a.py", "old_string": "a"}}',
         [("Edit", {"file_path": "a.py", "old_string": "a"})]),
        ('{"name": "Read", "arguments": {"file_path": "a.py", "limit": null}}', [READ]),
        ('{"name": "query", "arguments": {"sql": "select 1", "extra": 1}}',
         [("mcp__db__query", {"sql": "select 1", "extra": 1})]),
        ('{"name": "mcp__db__query", "arguments": {"sql": "select 1", "options": "{\\"a\\": 1}"}}',
         [("mcp__db__query", {"sql": "select 1", "options": {"a": 1}})]),
        ('{"name": "Write", "arguments": {"file_path": "n.txt", "content": 42}}', [write("42", "n.txt")]),
        ('{"name": "Grep", "arguments": {"pattern": "x", "output_mode": "Content"}}',
         [("Grep", {"pattern": "x", "output_mode": "content"})])),
    *spelled(
        "qwen code tools",
        ('<tool_call>\n{"name": "read_file", "arguments": {"path": "a.py"}}\n</tool_call>',
         [("read_file", {"file_path": "a.py"})]),
        ('{"name": "Bash", "arguments": {"command": "ls -la"}}', [("run_shell_command", {"command": "ls -la"})]),
        ("<function=Write>\n<parameter=path>\na.py\n</parameter>\n<parameter=text>\nx\n</parameter>\n</function>",
         [("write_file", {"file_path": "a.py", "content": "x"})]),
        ('{"name": "ls", "arguments": {"directory": "src"}}', [("list_directory", {"path": "src"})]),
        ("<bash>ls -la</bash>", [("run_shell_command", {"command": "ls -la"})]),
        ('{"name": "tool_call", "arguments": {"name": "x", "arguments": {"a": 1}}}',
         [("tool_call", {"name": "x", "arguments": {"a": 1}})]),
        ('<tool_call>\n{"name": "tool_call", "arguments": {"name": "x"}}\n</tool_call>', [("tool_call", {"name": "x"})]),
        tools=QWEN),
    *positives(
        "thought", f"I must read it.\n{TAGGED}", f"Read it. {TAGGED}", XML, f"I'll read a.py.\n{JSON}",
        f"hm\n```json\n{JSON}\n```".replace("hm", "I'll read it."), shown="", thought=True),
    *positives("whitespace", f"   \n{JSON}\n  ", f"\n\n\n{QWEN3}\n\n", f"\t{TAGGED}"),
]

CASES += [
    *negatives(
        "prose", "Hello! How can I help?", "The file is ready.\nIt has 10 lines.", "Use the <tool_call> tag.",
        "a < b and c > d", "A list:\n- one\n- two\n\n[1] see {this}", "Actions speak louder.\nAction: none was taken.",
        "Read the file, then write it.", "Write\nhello", "<div>\n<p>x</p>\n</div>", "   \n  ", "Ends with <", "Ends with {",
        "Ends with ```", "<tool_call>", "The tag <function=NAME> opens it.", "```", "[x] done\n[ ] open\n[link](http://x)",
        "Read (the docs) first.\nBash is a shell: {fast}.", "Call: me maybe.", "{{ template }}\n{% if x %}",
        "I fixed it in `Read`.\n\n1. a\n2. b", "Action: Read\nthe file is short.", "tool: a hammer\n\ncall: 555",
        "functools is a module.\nfunctools.lru_cache caches.", ">>> print(1)\n1\n>>> Read\n"),
    *negatives(
        "example",
        f"For example:\n\n```json\n{JSON}\n```", f"Here is an example of a call:\n{JSON}", f"Example:\n{TAGGED}",
        f"A call looks like this:\n\n{TAGGED}", f"The format is:\n{JSON}", f"You can call it like this:\n\n{QWEN3}",
        f"You would write {TAGGED}", f"{JSON}\n\nThis is just an example of the format.",
        f"{TAGGED}\n\nThat is what a tool call would look like.", f"## Example\n\n{JSON}", f"**Example:**\n\n{XML}",
        f"Tool calls use this syntax:\n\n{XML}", f"For instance: {TAGGED}", f"e.g. {TAGGED}",
        f"Let me show you an example:\n```json\n{JSON}\n```", f"Let me explain how a call looks.\n\n```json\n{JSON}\n```",
        f"To read a file the model sends:\n\n{JSON}", f"Here's a sample request:\n\n{JSON}",
        f"The template of a call:\n```\n{TAGGED}\n```", f"Imagine the model wrote\n{TAGGED}",
        f"The documentation describes it as follows:\n{JSON}",
        f"Each call is an object in this format:\n\n```json\n{JSON}\n```\n\nReplace a.py with your file.",
        f"```json\n{JSON}\n```\nThe above shows how the tool is used."),
    *negatives(
        "quoted", f"The output was `{JSON}`.", f"He wrote \"{TAGGED}\" and left.", f"Use `{TAGGED}` here.",
        f"> {JSON}", f"> {TAGGED}", f"- `<tool_call>` opens it\n- `</tool_call>` closes it",
        f"```python\nprompt = '''\n{TAGGED}\n'''\n```", f"```python\nx = 1\n{JSON}\n```", f"```python\ncall = {JSON}\n```",
        f"```\nUser: hi\nAssistant:\n{TAGGED}\n```", f"```json\n{JSON}\n```\n\nThe file holds that call.",
        f"````markdown\n# Doc\n```json\n{JSON}\n```\n````", f"I'll write the test:\n```python\ndef test():\n    x = '{JSON}'\n```",
        f"```json\n{{\n  \"calls\": [\n{JSON}\n  ],\n  \"n\": 1\n}}\n```", f"```json\n{JSON}\n// and so on\n```",
        f"The text <tool_call>{JSON}</tool_call> is in line 3.", f"I found ({TAGGED}) in the log."),
    *negatives(
        "data", '{"title": "Fix the parser"}', '{"name": "my-app", "version": "1.0.0"}',
        '{"name": "Alice", "age": 30}', '[{"name": "Alice"}, {"name": "Bob"}]', '[1, 2, 3]', '{"id": 1, "name": "Read"}',
        '```json\n{"name": "my-app", "scripts": {"test": "pytest"}}\n```', '{"action": "opened", "number": 5}',
        '{"type": "object", "properties": {"name": {"type": "string"}}}', "{}", "[]", '{"function": "main", "line": 10}',
        f"Here is the data:\n{JSON}", f"The file contains:\n\n{JSON}", f"Here is the content of calls.json:\n\n```json\n{JSON}\n```",
        '{"examples": [\n{"name": "Read", "arguments": {"file_path": "a.py"}}\n]}',
        '<tools>\n{"type": "function", "function": {"name": "Read", "description": "Read a file", "parameters": {"type": '
        '"object", "properties": {"file_path": {"type": "string"}}, "required": ["file_path"]}}}\n</tools>',
        '{"name": "Read", "description": "Read a file", "parameters": {"type": "object", "properties": {"file_path": '
        '{"type": "string"}}}}', '{"name": "Read", "description": "reads files"}',
        '[{"name": "Read", "arguments": {"file_path": "a.py"}}, {"name": "x"}]', '{"summary": "ok", "tool": "Read"}',
        '{"command": "ls -la"}', '{"file_path": "a.py", "content": "x"}', '[Alice(age=3)]', '{"tool": "hammer"}'),
    *negatives(
        "not offered", '{"name": "launch_rocket", "arguments": {"x": 1}}',
        '<tool_call>\n{"name": "fly", "arguments": {"file_path": "a.py"}}\n</tool_call>',
        "<function=fly>\n<parameter=to>\nrome\n</parameter>\n</function>", '```json\n{"name": "fly", "arguments": {}}\n```',
        'Action: fly\nAction Input: {"to": "rome"}', '<invoke name="fly"><parameter name="to">x</parameter></invoke>',
        "[TOOL_CALLS][{\"name\": \"fly\", \"arguments\": {}}]", "<fly>\n<to>rome</to>\n</fly>",
        '<tool_call>fly\n<arg_key>to</arg_key>\n<arg_value>rome</arg_value>\n</tool_call>', "[fly(to='rome')]",
        '{"name": "web_search", "arguments": {"query": "x"}}', '{"name": "Readme", "arguments": {"file_path": "a.py"}}'),
    *negatives(
        "no arguments", '{"name": "Read", "arguments": {}}', '{"name": "Read"}', '{"name": "Bash", "arguments": {"x": 1}}',
        "<tool_call>\n{\"name\": \"Read\", \"arguments\": {}}\n</tool_call>", "<function=Read>\n</function>",
        "<function=Write>\n<parameter=foo>\nx\n</parameter>\n</function>", '<tool_call>\n{"name": "Read"}\n</tool_call>',
        "<tool_call>\n</tool_call>", "<tool_call>\nRead\n</tool_call>", "Action: Read\nAction Input: {}", "[Read()]",
        '{"name": "Read", "arguments": {"limit": 5}}', "<tool_call>{}</tool_call>", '<invoke name="Read"></invoke>'),
    *negatives(
        "refused", f"I won't run this:\n{JSON_LS}", f"I cannot execute {TAGGED_LS}", f"Don't ever call this:\n\n{TAGGED_LS}",
        f"I would run:\n\n```json\n{JSON_LS}\n```", f"If you asked me to, I would send:\n{JSON_LS}",
        f"I could call this, but it would be dangerous:\n{JSON_LS}", f"Never write\n{TAGGED_LS}",
        f"{JSON_LS}\n\nShould I run this?", f"```json\n{JSON_LS}\n```\nDo you want me to run it?",
        f"{TAGGED_LS}\n\nI have not executed this call.", f"We shouldn't use\n{XML_LS}",
        f"Instead of this call:\n{JSON_LS}\n\nuse the menu."),
    *negatives(
        "another's", f"Earlier I called:\n{JSON}", f"The previous call was:\n\n{JSON}", f"The other agent sent:\n{TAGGED}",
        f"The log shows this call:\n{JSON}", f"The server replied with:\n\n{JSON}", f"You wrote:\n\n{JSON}",
        f"The model returned this:\n\n```json\n{JSON}\n```", f"This call was rejected:\n{TAGGED}",
        f"In the last step I ran:\n\n{JSON_LS}"),
    *negatives(
        "middle", f"The first part.\n\n{JSON}\n\nThe second part.", f"Results:\n{JSON}\nEnd of results.",
        f"The fenced one:\n```json\n{JSON}\n```", f"See below.\n\n```json\n{JSON}\n```\n\nThat was it."),
    *negatives(
        "cut by length", JSON[:-1], f"<tool_call>\n{JSON[:-8]}", "<function=Read>\n<parameter=file_path>\na.p",
        '<tool_call>\n{"name": "Write", "arguments": {"file_path": "a.py", "content": "x = 1\\ny', f"```json\n{JSON[:-2]}",
        "<tool_call>\n<function=Read>\n<parameter=file_path>\na.py\n</parameter>\n<parameter=limit>\n1",
        'Action: Read\nAction Input: {"file_path": "a', "I'll read.\n<tool_call>\n{\"name\": \"Re", reason="length"),
    *negatives("no tools", JSON, TAGGED, QWEN3, f"```json\n{JSON}\n```", "<bash>ls -la</bash>", tools={}),
    *spelled(
        "thought without a call", (f"Should I call {JSON}? No, a greeting will do.", [], ""),
        (f"{TAGGED}\nBut no: the user only said hello.", [], ""), (f"For example:\n{TAGGED}", [], ""),
        ("Nothing to do.", [], ""), thought=True),
]

DRAW = {"draw": Tool("draw", "", {"type": "object", "properties": {"element": {"type": "object"}},
                                  "required": ["element"]})}
DRAWN = '{"name": "draw", "arguments": {"element": {"type": "rectangle", "x": 1}}}'
DEFINED = '{"name": "draw", "parameters": {"element": {"type": "object"}, "to": {"anyOf": [{"type": "string"}]}}}'
EXTRA = '{"name": "Read", "file_path": "a.py", "encoding": "utf8"}'

CASES += [
    *positives(
        "an object of some type", DRAWN, f"```json\n{DRAWN}\n```", f"<tools>\n{DRAWN}\n</tools>",
        f"<tool_call>\n{DRAWN}\n</tool_call>", calls=[("draw", {"element": {"type": "rectangle", "x": 1}})], tools=DRAW),
    *negatives("a definition", DEFINED, f"<tools>\n{DEFINED}\n</tools>", tools=DRAW),
    *positives(
        "a key too many beside the name", f"<tool_call>\n{EXTRA}\n</tool_call>", f"<tools>{EXTRA}</tools>",
        f"[TOOL_CALLS][{EXTRA}]"),
    *negatives(
        "data beside the name", EXTRA, f"```json\n{EXTRA}\n```", f"<json>{EXTRA}</json>"),
    *spelled(
        "an input line that begins like a separator",
        *((f"Action: Bash\nAction Input: {line}\n", [("Bash", {"command": line})]) for line in (
            "print(1)", "name: x", "to=x", "call: x", ": x", "functions.x", "input: x", "python -c 'print(1)'"))),
    *spelled(
        "qwen-agent goes on after its call",
        ('✿FUNCTION✿: Read\n✿ARGS✿: {"file_path": "a.py"}\n✿RETURN✿: ', [READ]),
        ('✿FUNCTION✿: Read\n✿ARGS✿: {"file_path": "a.py"}\n✿RETURN✿:', [READ])),
    *negatives("a tag that is no tool's name as it stands", "<functions.read_file>\n<path>a.py</path>\n</read_file>",
               "<Read:0>a.py</Read:0>", "<query>select 1</query>"),
    *positives("an end mark of two words", f"{TAGGED}\n<|end of turn|>", f'{TAGGED}<end reason="call">'),
]
