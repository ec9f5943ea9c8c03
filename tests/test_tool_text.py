"""Tool calls in text: the case table, cuts, streaming, names and inputs, speed."""
import json
import random
import time
from pathlib import Path

import pytest
from qwencode import (
    TOOL_FORMATS,
    Call,
    CallEnd,
    CallInput,
    CallStart,
    TextDelta,
    ThinkingDelta,
    ToolTextParser,
    loose_json,
    repair_input,
    resolve_tool,
)
from tool_text_cases import CASES, JSON, JSON_LS, QWEN3, READ, TAGGED, TAGGED_LS, XML
from tool_text_helpers import CLAUDE, QWEN, calls_of, cuts, joined, run, shown_by, tool
from tool_text_more import (
    BEHIND_A_CALL,
    CALLS,
    LEADS_TO_A_CALL,
    LEADS_TO_A_FENCE,
    LEADS_TO_AN_EXAMPLE,
    TAKES_IT_BACK,
    TEXTS,
)

CUTS = (None, 1, "random")


def parser(**options):
    return ToolTextParser(CLAUDE, **options)


@pytest.mark.parametrize("row", TOOL_FORMATS, ids=lambda row: row.rule)
def test_each_format_reads_its_own_example(row):
    for how in CUTS:
        assert run(row.example, how) == [Call(*READ, row.rule)], how


def test_the_table_is_as_large_as_promised():
    assert len(CASES) >= 250
    assert len({case.family for case in CASES}) >= 30


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_of_the_table(case):
    for how in CUTS:
        deltas = run(case.text, how, case.tools, case.reason, case.thought)
        assert calls_of(deltas) == case.calls, how
        if case.calls:
            assert shown_by(deltas).strip() == (case.shown or "").strip(), how
        else:
            assert shown_by(deltas) == ("" if case.thought else case.text), how
        assert not any(isinstance(each, TextDelta) and not each.text for each in deltas)


ANSWERS = [json.loads(line) for line in
           (Path(__file__).parent / "data" / "answers.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize("family", sorted({answer["family"] for answer in ANSWERS}))
def test_whole_answers(family):
    """Written without a look at the parser: whole answers, their calls, or none."""
    for answer in (each for each in ANSWERS if each["family"] == family):
        thought = answer.get("thought", "")
        for how, streams in ((None, False), ("random", False), ("random", True)):
            reader = parser(stream_inputs=streams)
            deltas = reader.thought(thought)
            for piece in cuts(answer["text"], how):
                deltas += reader.feed(piece)
            deltas = joined(deltas + reader.close(answer.get("reason", "stop")))
            calls = [[each.name, each.input] for each in deltas if isinstance(each, Call)]
            streamed = [each for each in deltas if isinstance(each, tuple) and each[0] == "streamed"]
            calls += [[each[1], json.loads(each[2])] for each in streamed if each[3]]
            assert sorted(calls, key=str) == sorted(answer["calls"], key=str), (how, answer["text"])
            if not calls and not streamed:
                assert shown_by(deltas) == answer["text"], how


@pytest.mark.parametrize("case", [case for case in CASES if not case.calls and not case.thought],
                         ids=lambda case: case.name)
def test_switched_off_everything_is_text(case):
    assert shown_by(run(case.text, 1, enabled=False)) == case.text


@pytest.mark.parametrize(("text", "calls", "thought"), CALLS)
def test_a_call_is_read(text, calls, thought):
    for how in CUTS:
        assert calls_of(run(text, how, thought=thought)) == calls, how


@pytest.mark.parametrize(("text", "reason"), TEXTS)
def test_a_text_stays_as_it_is(text, reason):
    for how in CUTS:
        assert run(text, how, reason=reason) == [TextDelta(text)], how


# Every way to break JSON that a person reads without doubt, in every wrapper.
VALUES = ["def f(a):\n    return {\"k\": [1, 2]}\n", '<div class="a">\n  <p>x &amp; y</p>\n</div>\n',
          "for i in \"$@\"; do echo \"$i\"; done # it's x\n"]
WRITE = '{"name": "Write", "arguments": {"file_path": "a.txt", "content": %s}}'
BROKEN = {  # name: from the value and its JSON to the call's text
    "whole": lambda value, text: WRITE % text,
    "comma before the last braces": lambda value, text: WRITE[:-2] % text + ",},}",
    "a Python dict": lambda value, text: repr(json.loads(WRITE % text)),
    "raw line ends": lambda value, text: WRITE % text.replace("\\n", "\n"),
    "open quotes": lambda value, text: WRITE % text.replace('\\"', '"'),
    "comments": lambda value, text: "{ // write it\n" + WRITE[1:].replace(', "', ', /* so */ "') % text,
    "one brace missing": lambda value, text: (WRITE % text)[:-1],
    "both braces missing": lambda value, text: (WRITE % text)[:-2],
    "a brace too many": lambda value, text: WRITE % text + "}",
    "no commas": lambda value, text: WRITE.replace(', "', '\n"') % text,
    "arguments as a string": lambda value, text: json.dumps({"name": "Write", "arguments": (WRITE % text)[30:-1]}),
    "keys without quotes": lambda value, text: WRITE.replace('": ', ": ").replace('{"', "{").replace(', "', ", ") % text,
    "backticks": lambda value, text: WRITE % f"`{value}`",
    "an id behind it": lambda value, text: (WRITE % text)[:-1] + ', "id": "call_1", "type": "function"}',
}
WRAPPED = ["<tool_call>\n%s\n</tool_call>", "<tool_call>\n%s", "<tool_call>\n%s\n</tool_ca", "%s\n</tool_call>", "%s",
           "<tools>\n%s\n</tools>", "<function_call>%s</function_call>", "I'll write it.\n\n%s", "```json\n%s\n```",
           "I'll write it.\n\n```json\n%s\n```", "[TOOL_CALLS] %s", "<|python_tag|>%s<|eom_id|>", "<tool_call>\n%s\n<tool_call>",
           "Let me write it.\n<tool_call>\n%s\n</tool_call>\n\nThen I'll run the tests."]


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("name", BROKEN)
def test_broken_json_is_read_in_every_wrapper(name, wrapper):
    for value in VALUES:
        text = wrapper % BROKEN[name](value, json.dumps(value))
        for how, streams in ((None, False), ("random", False), (1, True), ("random", True)):
            (call,) = [each for each in run(text, how, stream_inputs=streams) if not isinstance(each, TextDelta)]
            found = call.input if isinstance(call, Call) else json.loads(call[2])
            assert found == {"file_path": "a.txt", "content": value}, (how, streams)


FENCED = f"```json\n{JSON}\n```"


@pytest.mark.parametrize("text", [
    *(f"{lead}\n\n{call}" for lead in LEADS_TO_A_CALL for call in (TAGGED, QWEN3, JSON)),
    *(f"{lead}\n\n{FENCED}" for lead in LEADS_TO_A_FENCE),
    *(f"{call}\n\n{tail}" for tail in BEHIND_A_CALL for call in (TAGGED, JSON, "I'll do it.\n" + FENCED)),
])
def test_the_words_around_it_mean_a_call(text):
    assert calls_of(run(text)) == [READ]


@pytest.mark.parametrize("text", [
    *(f"{lead}\n\n{call}" for lead in LEADS_TO_AN_EXAMPLE for call in (TAGGED, JSON, FENCED)),
    *(f"{call}\n\n{tail}" for tail in TAKES_IT_BACK for call in (TAGGED, JSON)),
])
def test_the_words_around_it_mean_no_call(text):
    assert run(text, 1) == [TextDelta(text)]


# Streaming: what goes out, and when.


def test_prose_is_never_delayed():
    reader = parser()
    for piece in ("Hello", ", this", " is a <b>bold", "</b> line", ".\n", "A second", " line:", " a[1] { }"):
        assert joined(reader.feed(piece)) == [TextDelta(piece)]


@pytest.mark.parametrize(("text", "released"), [
    ("Use <div", "Use <div"), ("Use <tool", "Use "), ("{", ""), ('{"title"', '{"title"'),
    ('{"name": "my-app"', '{"name": "my-app"'), ('{"name": "Re', ""), ('{"name": "Read"', ""),
    ("```json\n", ""), ("```json\nx", "```json\nx"), ("`", ""), ("Act", ""), ("Actual", "Actual"),
    ("Hm.\nAction: R", "Hm.\n"), ("a\n[", "a\n"), ("a\n[x]", "a\n[x]"), ("<tool_call> t", ""),
    ("<tool_call> tag ", "<tool_call> tag "), ("Rea", ""), ("Ready", "Ready"), ("Read the", "Read the"),
])
def test_only_what_may_be_a_call_is_held(text, released):
    reader = parser()
    assert shown_by([TextDelta("Go. "), *reader.feed("Go. \n")][1:]) == "Go. \n"
    assert shown_by(reader.feed(text)) == released
    assert shown_by(reader.close("length")) == text[len(released):]


def test_text_behind_a_call_is_held_for_four_thousand_characters_at_most():
    reader = parser()
    assert reader.feed(JSON + "\n\n" + "Word " * 800) == []
    deltas = reader.feed("word " * 100)
    assert calls_of(deltas) == [READ]
    assert reader.feed("more") == [TextDelta("more")]


def test_a_call_is_given_before_later_ones_are_whole():
    reader = parser()
    long = json.dumps({"name": "Write", "arguments": {"file_path": "b", "content": "x" * 9000}})
    assert calls_of(reader.feed(f"{TAGGED}\n<tool_call>{long}</tool_call>")) == [READ]


WRITE_JSON = '<tool_call>\n{"name": "Write", "arguments": {"file_path": "a.py", "content": "'
WRITE_XML = "<tool_call>\n<function=Write>\n<parameter=file_path>\na.py\n</parameter>\n<parameter=content>\n"


@pytest.mark.parametrize("begin", [WRITE_JSON, WRITE_XML], ids=["json", "xml"])
def test_the_input_streams_while_it_is_written(begin):
    reader = parser(stream_inputs=True)
    deltas = reader.feed(begin + "x" * 250)
    assert CallStart("Write", "tool_call") in deltas or CallStart("Write", "function_xml") in deltas
    assert reader.feed('say ')[0] == CallInput("say ")
    assert any(isinstance(each, CallInput) for each in reader.feed("more text"))


@pytest.mark.parametrize("how", CUTS)
@pytest.mark.parametrize(("text", "pieces", "finished", "reason"), [
    (WRITE_JSON + 'a\\nb \\"c\\" \\u00e9"}}\n</tool_call>', {"file_path": "a.py", "content": 'a\nb "c" é'},
     True, "stop"),
    (WRITE_JSON + 'a "b" c\nd"}}\n</tool_call>', {"file_path": "a.py", "content": 'a "b" c\nd'}, True, "stop"),
    (WRITE_JSON + "\\ud83d\\ude00\"}}", {"file_path": "a.py", "content": "😀"}, True, "stop"),
    (WRITE_XML + "if a<b=c>:\n\tx\r\n\n</parameter>\n</function>\n</tool_call>",
     {"file_path": "a.py", "content": "if a<b=c>:\n\tx\r\n"}, True, "stop"),
    (WRITE_XML + "a</parameter> b\n</parameter>\n</function>", {"file_path": "a.py", "content": "a</parameter> b"},
     True, "stop"),
    ('<tool_call>\n{"name": "read_file", "arguments": {"x": [1], "path": "a.py", "limit": "10"}}</tool_call>',
     {"file_path": "a.py", "limit": 10}, True, "stop"),
    ("<function=Bash>\n<parameter=timeout>\n5000\n</parameter>\n<parameter=cmd>\nls\n</parameter>\n<parameter=foo>\n1\n"
     "</parameter>\n</function>", {"timeout": 5000, "command": "ls"}, True, "stop"),
    *((f"<tool_call>\n{body}\n</tool_call>", {"command": "ls", "timeout": 5}, True, "stop") for body in (
        '{"name": "Bash", "arguments": {"command": "ls", "timeout": 5},}',
        '{"name": "Bash", "arguments": {"command": "ls", "timeout": 5,},}',
        '{"name": "Bash", "arguments": {"command": "ls", "timeout": 5}, "id": "call_1", "type": "function"}',
        '{"name": "Bash", "arguments": {"command": "ls", // the folder\n  "timeout": 5 /* ms */}}',
        '{"name": "Bash", "arguments": {"timeout": 5, "command": "ls"} // the folder\n}',
        '{"name": "Bash", "arguments": {"timeout": 5, "command": "ls"}} // the folder',
        '{"name": "Bash", "arguments": {"timeout": 5, "command": "ls"', '{"name": "Bash", "arguments": {"timeout": 5, "command": `ls`}}',
        '{"name": "Bash", "arguments": {"timeout": 5, "command": \'ls\'}}')),
    ('<tool_call>\n{"name": "search_files", "arguments": {"path": "src", "regex": "TODO"}}\n</tool_call>',
     {"path": "src", "pattern": "TODO"}, True, "stop"),
    ('<tool_call>\n{"name": "Read", "arguments": {"file_path": "a.py"', None, False, "length"),
    (WRITE_JSON + "half of", None, False, "length"), (WRITE_XML + "half of", None, False, "length"),
    (WRITE_JSON + "half of", None, False, "stop"),
    ('<tool_call>\n{"name": "Read", "arguments": {"file_path": "a.py", ???', None, False, "stop"),
])
def test_streamed_input_is_one_object(text, pieces, finished, reason, how):
    (call,) = run(text, how, stream_inputs=True, reason=reason)
    assert (call[0], call[3]) == ("streamed", finished)
    if finished:
        assert json.loads(call[2]) == pieces
    else:
        assert call[2].startswith('{"file_path": "a.py')


@pytest.mark.parametrize("case", [case for case in CASES if case.reason == "stop" and case.calls],
                         ids=lambda case: case.name)
def test_streaming_reads_the_table_as_whole_reading_does(case):
    unfinished = case.text.startswith("<function=Read>\n<parameter=file_path>\na.py\n<function=Bash>")
    for how in CUTS:
        deltas = run(case.text, how, case.tools, case.reason, case.thought, stream_inputs=True)
        calls = [(each[1], each[3] and json.loads(each[2])) if isinstance(each, tuple) and each[0] == "streamed"
                 else (each.name, each.input) for each in deltas if not hasattr(each, "text")]
        assert calls == ([("Read", False)] if unfinished else case.calls), how


def test_later_words_take_a_streamed_call_back():
    deltas = run(f"{TAGGED}\n\nThat is what a tool call would look like.", stream_inputs=True)
    assert deltas[0] == ("streamed", "Read", '{"file_path": "a.py"', False)


# Native calls and thinking.


@pytest.mark.parametrize("how", CUTS)
@pytest.mark.parametrize("text", [JSON, TAGGED, QWEN3, XML, f"```json\n{JSON}\n```", f"{TAGGED}\n"])
def test_a_native_call_and_its_copy_in_text_run_once(text, how):
    for native_first in (True, False):
        reader, deltas = parser(), []
        pieces = [lambda p=p: reader.feed(p) for p in cuts(text, how)]
        call = lambda: reader.native("read_file", {"path": "a.py"})  # noqa: E731
        for step in ([call, *pieces] if native_first else [*pieces, call]):
            deltas += step()
        deltas += reader.close("stop")
        assert calls_of(deltas) == [READ]
        assert shown_by(deltas).strip() == ""


def test_another_call_in_text_beside_a_native_one_runs_too():
    reader = parser()
    deltas = [*reader.native("Read", {"file_path": "a.py"}), *reader.feed(TAGGED_LS), *reader.close("stop")]
    assert [name for name, _ in calls_of(deltas)] == ["Read", "Bash"]


def test_a_native_call_amid_text_that_is_no_call_takes_nothing_from_it():
    reader = parser()
    deltas = [*reader.feed('{"title": '), *reader.native("Read", {"file_path": "a.py"}),
              *reader.feed('"x"}\n</tool_call>'), *reader.close("stop")]
    assert calls_of(deltas) == [READ]
    assert shown_by(deltas) == '{"title": "x"}\n</tool_call>'


def test_a_native_call_twice_runs_twice_as_ollama_gave_it():
    reader = parser()
    deltas = reader.native("Read", {"file_path": "a.py"}) + reader.native("Read", {"file_path": "a.py"})
    assert calls_of(deltas) == [READ, READ]


@pytest.mark.parametrize(("name", "arguments", "expected"), [
    ("read_file", {"path": "a.py", "x": 1}, ("Read", {"file_path": "a.py"})),
    ("Read", {"limit": 5}, ("Read", {"limit": 5})), ("Bash", "ls", ("Bash", {"command": "ls"})),
    ("nobody", {"a": 1}, ("nobody", {"a": 1})), ("Read", None, ("Read", {})),
])
def test_a_native_call_is_repaired_or_sent_as_it_can_be_read(name, arguments, expected):
    assert calls_of(parser().native(name, arguments)) == [expected]


def test_thinking_passes_at_once_and_its_call_counts_only_when_nothing_follows():
    reader = parser()
    assert reader.thought("I'll read. " + TAGGED) == [ThinkingDelta("I'll read. " + TAGGED)]
    assert calls_of(reader.close("stop")) == [READ]
    for after in ("Hello.", TAGGED_LS, JSON_LS):
        reader = parser()
        reader.thought(TAGGED)
        deltas = reader.feed(after) + reader.close("stop")
        assert READ not in calls_of(deltas)
    reader = parser()
    reader.thought(TAGGED)
    assert reader.close("length") == []


def test_nothing_is_lost_when_the_upstream_breaks():
    reader = parser()
    held = reader.feed("I'll see.\n" + JSON[:-5])
    assert shown_by(held + reader.close("error")) == "I'll see.\n" + JSON[:-5]


# Seeded random text and mutated calls.

ATOMS = [*"<{[}])\"'`\\:,(\n\t é", "\n\n", "```", "```json\n", "~~~", "word", "Read", "I'll read it:", "<tool_call>",
         "</tool_call>", "<function=Read>", "<parameter=file_path>", "</parameter>", "</function>", '{"name": "Read", ',
         '"arguments": {', '"file_path": "a.py"', "}}", "Action: ", "Action Input: ", "[TOOL_CALLS]", "<think>",
         "</think>", "😀", "\r\n", "Example:", "functools[", ">>>", "<bash>", "</bash>", '<invoke name="Read">',
         "<arg_key>file_path</arg_key>", "<arg_value>"]


@pytest.mark.parametrize("seed", range(150))
def test_random_text_is_never_lost_or_changed(seed):
    dice = random.Random(seed)
    text = "".join(dice.choice(ATOMS) for _ in range(dice.randrange(1, 60)))
    for streams in (False, True):
        whole = run(text, stream_inputs=streams)
        assert run(text, 1, stream_inputs=streams) == run(text, f"cut {seed}", stream_inputs=streams) == whole
        if all(isinstance(each, TextDelta) for each in whole):
            assert shown_by(whole) == text
        rest = iter(text)
        assert all(letter in rest for letter in shown_by(whole))


@pytest.mark.parametrize("seed", range(200))
def test_a_mutated_call_never_crashes_and_reads_alike_however_cut(seed):
    dice = random.Random(seed)
    text = dice.choice(CASES).text
    for _ in range(dice.randrange(1, 4)):
        at, to = sorted((dice.randrange(len(text) + 1), dice.randrange(len(text) + 1)))
        text = dice.choice((text[:at] + text[at + 3:], text[:at] + dice.choice(ATOMS) + text[at:],
                            text[:to] + text[at:], text + dice.choice(CASES).text))
    for streams in (False, True):
        assert run(text, 1, stream_inputs=streams) == run(text, stream_inputs=streams)


def seconds(pieces, **options):
    reader, begin = parser(**options), time.process_time()
    for piece in pieces:
        reader.feed(piece)
    reader.close("stop")
    return time.process_time() - begin


@pytest.mark.parametrize("unit", [
    "{", "<", "[", "`", "```\n", "~~~\n", '"', "'", "}", "<tool_call>", "<function=Read>", "\n{", "\n\n{\"name\":",
    "Action: Read\n", "[TOOL_CALLS]", '{"name": "Read", "arguments": {', "<think>", "\n<a", "</parameter>", "\\",
    '{"arguments": ["', "Read(", "/*", "<tool_call>\n\n{", ">>>Read\n", "<function=Read>\n<parameter=file_path>\n",
    '<tool_call>\n{"name": "Read", "arguments": {"file_path": "a"', "</tool_call>\n", "First:\n\n", "\n{// x",
])
@pytest.mark.parametrize("streams", [False, True])
def test_hostile_text_takes_linear_time(unit, streams):
    quarter, whole = ((unit * size)[:size] for size in (25 * 1024, 100 * 1024))
    spent = seconds([whole], stream_inputs=streams)
    assert spent < 1.5  # below 0.2 s on a quiet machine; the factor is for a busy one
    assert spent < 0.2 or spent < 16 * seconds([quarter], stream_inputs=streams) + 0.2


@pytest.mark.parametrize("unit", [" ", "\n", " \n", "\n ", ", ", "//\n", '"#', '"//', '"/*'])
def test_what_stands_behind_a_quote_is_looked_at_once(unit):
    """8,000 blanks behind a quote within a string took 1.5 to 8 s."""
    begin, tail = time.process_time(), unit * 8000
    assert loose_json('{"a": "x"' + tail + 'y"}') == {"a": 'x"' + tail + "y"}
    for pieces in (['", "content": "x"', tail, 'y"'], ['", "content": "x"', *tail[:800], 'y"']):
        seconds(['<tool_call>\n{"name": "Write", "arguments": {"file_path": "a', *pieces], stream_inputs=True)
    assert time.process_time() - begin < 0.5  # below 0.05 s on a quiet machine


@pytest.mark.parametrize("streams", [False, True])
def test_a_megabyte_inside_a_call_is_read_token_by_token(streams):
    body = "".join(f"line {number} of \"text\" {{x: [1]}} </p>\n" for number in range(4000))
    for text in (f"<tool_call>\n{json.dumps({'name': 'Write', 'arguments': {'file_path': 'a', 'content': body}})}",
                 f"<function=Write>\n<parameter=file_path>\na\n</parameter>\n<parameter=content>\n{body}\n</parameter>"):
        whole = run(text, 4, stream_inputs=streams)
        found = json.loads(whole[0][2]) if streams else whole[0].input
        assert found == {"file_path": "a", "content": body}
        quarter = seconds(cuts(text[:len(text) // 4], 4), stream_inputs=streams)
        assert seconds(cuts(text, 4), stream_inputs=streams) < 10 * quarter + 0.1


def test_a_key_on_a_line_of_its_own_needs_no_comma_however_the_stream_is_cut():
    text = '<tool_call>\n{"name": "Bash", "arguments": {"command": "ls"\n  "description": "x"}}\n</tool_call>'
    for how in CUTS:
        assert run(text, how, stream_inputs=True) == [("streamed", "Bash", '{"command": "ls", "description": "x"}', True)]


# Names and inputs.


@pytest.mark.parametrize(("name", "tools", "expected"), [
    ("Read", CLAUDE, "Read"), ("read", CLAUDE, "Read"), ("BASH", CLAUDE, "Bash"), ("run_command", CLAUDE, "Bash"),
    ("shell", CLAUDE, "Bash"), ("execute_bash", CLAUDE, "Bash"), ("read_file", CLAUDE, "Read"),
    ("str_replace", CLAUDE, "Edit"), ("create_file", CLAUDE, "Write"), ("search_files", CLAUDE, "Grep"),
    ("find_files", CLAUDE, "Glob"), ("functions.Read", CLAUDE, "Read"), ("functions.Read:0", CLAUDE, "Read"),
    ("todo_write", CLAUDE, "TodoWrite"), ("writeFile", CLAUDE, "Write"), ("query", CLAUDE, "mcp__db__query"),
    ("nobody", CLAUDE, None), ("", CLAUDE, None), ("Readme", CLAUDE, None), ("web_search", CLAUDE, None),
    ("Bash", QWEN, "run_shell_command"), ("Write", QWEN, "write_file"), ("tool_call", QWEN, "tool_call"),
    ("Read", QWEN, "read_file"), ("Grep", QWEN, "grep_search"), ("ls", QWEN, "list_directory"), ("Read", {}, None),
    ("bash", {"do": tool("do", "command", command="string")}, "do"),
    ("bash", {"do": tool("do", "text", text="string")}, None),
])
def test_a_name_means_an_offered_tool(name, tools, expected):
    found = resolve_tool(name, tools)
    assert (found and found.name) == expected


OPEN = tool("mcp__x__open", "a", a="string")._replace(
    schema={"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]})


@pytest.mark.parametrize(("offered", "arguments", "expected"), [
    (CLAUDE["Read"], {"file_path": "a"}, {"file_path": "a"}),
    (CLAUDE["Read"], {"filePath": "a", "limit": "10", "offset": 2.0}, {"file_path": "a", "limit": 10, "offset": 2.0}),
    (CLAUDE["Read"], '{"path": "a"}', {"file_path": "a"}), (CLAUDE["Read"], '"{\\"path\\": \\"a\\"}"', {"file_path": "a"}),
    (CLAUDE["Read"], "a.py", {"file_path": "a.py"}), (CLAUDE["Read"], {"limit": 1}, None), (CLAUDE["Read"], {}, None),
    (CLAUDE["Read"], None, None), (CLAUDE["Read"], 5, None), (CLAUDE["Write"], "text", None),
    (CLAUDE["Read"], {"file_path": "a", "limit": None}, {"file_path": "a"}),
    (CLAUDE["Read"], {"file_path": "a", "path": "b"}, {"file_path": "a"}),
    (CLAUDE["Bash"], {"command": ["a b", "c"]}, {"command": "'a b' c"}),
    (CLAUDE["Bash"], {"cmd": "ls", "run_in_background": "True"}, {"command": "ls", "run_in_background": True}),
    (CLAUDE["Bash"], {"command": "true", "timeout": "1.5"}, {"command": "true", "timeout": 1.5}),
    (CLAUDE["Read"], {"file_path": "a", "limit": "+5", "offset": "2.0"}, {"file_path": "a", "limit": 5, "offset": 2}),
    (CLAUDE["Read"], {"file_path": "a", "limit": "007", "offset": "5."}, {"file_path": "a", "limit": 7, "offset": 5}),
    (CLAUDE["Bash"], {"command": "a", "timeout": ".5"}, {"command": "a", "timeout": 0.5}),
    (CLAUDE["Bash"], {"command": "007", "timeout": "1.2.3"}, {"command": "007", "timeout": "1.2.3"}),
    (CLAUDE["Read"], {"file_path": "a", "limit": "1e999"}, {"file_path": "a", "limit": "1e999"}),
    (CLAUDE["Read"], "{limit: 1e999}", {"file_path": "{limit: 1e999}"}),  # no infinity: no JSON holds it
    (CLAUDE["Bash"], {"command": "10"}, {"command": "10"}), (CLAUDE["Bash"], {"command": 10}, {"command": "10"}),
    (CLAUDE["Write"], {"path": "a", "contents": ["x", "y"]}, {"file_path": "a", "content": "x\ny"}),
    (CLAUDE["Write"], {"path": "a", "text": True}, {"file_path": "a", "content": "true"}),
    (CLAUDE["Edit"], {"path": "a", "old_str": "b", "new_str": "c", "command": "x"},
     {"file_path": "a", "old_string": "b", "new_string": "c"}),
    (CLAUDE["TodoWrite"], {"todos": {"content": "a", "status": "Pending"}},
     {"todos": [{"content": "a", "status": "pending"}]}),
    (CLAUDE["Grep"], {"regex": "x", "include": "*.py"}, {"pattern": "x", "glob": "*.py"}),
    (CLAUDE["Read"], {"type": "object", "properties": {"file_path": "a"}}, {"file_path": "a"}),
    (OPEN, {"a": 1, "b": {"c": None}}, {"a": "1", "b": {"c": None}}),
    (OPEN._replace(name="Open"), {"a": "1", "b": 2}, {"a": "1"}),
    (OPEN._replace(schema={"type": "object"}), {"b": 2}, {"b": 2}),
    (OPEN._replace(schema={}), {"b": 2}, {"b": 2}),
    (CLAUDE["Bash"], '{{"command": "ls"}}', {"command": "ls"}),  # a template's braces
    (CLAUDE["mcp__db__query"], {"sql": "x", "options": "{" * 1200}, {"sql": "x", "options": "{" * 1200}),
    (OPEN._replace(schema={"properties": {"n": {"anyOf": [{"type": "integer"}, {"type": "null"}]}}}),
     {"n": None}, {"n": None}),
])
def test_input_is_fitted_to_the_schema(offered, arguments, expected):
    assert repair_input(offered, arguments) == expected


def test_a_schema_of_any_shape_is_survived():
    for schema in ({"properties": []}, {"required": "a"}, {"properties": {"a": True}}, {"properties": {"a": {"type": 5}}},
                   {"properties": {"a": {"enum": 5}}}, {"properties": {"a": {"items": True}}}, {"required": [5]}):
        assert repair_input(OPEN._replace(schema=schema), {"a": [1], "b": "x"}) is not None
