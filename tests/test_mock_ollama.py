"""The mock answers as the recordings of real servers do."""
import json
import os
import re
import select
import shutil
import socket
import subprocess
import sys
import threading
from http.client import HTTPConnection
from pathlib import Path

import pytest

import mock_ollama
from mock_ollama import (
    PATHS, MockOllama, Model, ParserError, SimulatedSlot, call, common_length, cut, delay, done,
    end, error_line, hang, hold, mode_reply, model_text, parse_xml_call, raw, reset, split_pieces, status, text,
    thinking, wire,
)

RECORDINGS = Path(__file__).resolve().parent / "data" / "recordings"
NEW, OLD = "0.33.0-rc2", "0.24.0"


def recording(name, version=NEW):
    return json.loads((RECORDINGS / version / f"{name}.json").read_text(encoding="utf-8"))


def ask(mock, path, body=None, method=None, headers=None):
    """(status, content type, text) of one request."""
    connection = HTTPConnection("127.0.0.1", mock.port, timeout=10)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method or ("POST" if data is not None else "GET"), path, data, headers or {})
    answer = connection.getresponse()
    whole = answer.read().decode()
    connection.close()
    return answer.status, answer.headers.get("Content-Type"), whole


def lines_of(whole):
    return [json.loads(line) for line in whole.splitlines()]


def chat(content="hi", model="b-x", **more):
    return {"model": model, "messages": [{"role": "user", "content": content}], **more}


TIMES = {"total_duration", "load_duration", "prompt_eval_duration", "eval_duration"}


def comparable(line):
    """A line without what differs from run to run: times, ids, prompt sizes."""
    made = {k: v for k, v in line.items() if k not in TIMES | {"created_at", "prompt_eval_count"}}
    for made_call in made.get("message", {}).get("tool_calls", []):
        made_call["id"] = re.sub("[A-Za-z0-9]", "x", made_call["id"][5:])
    return made


CALL_A = ["<tool_call>", "\n<function=Read>\n<parameter=file_path>\n", "/tmp/{}.py",
          "\n</parameter>\n</function>\n", "</tool_call>"]
CALL_B = ["<tool_call>", "\n{\"name\": \"Read\", \"arguments\": ", "{\"file_path\": \"/tmp/%s.py\"}}\n",
          "</tool_call>"]
LONG = "".join(f"line {n} of the file, with some words to fill it\n" for n in range(200))


def call_a(letter="a"):
    return [piece.replace("{}", letter) for piece in CALL_A]


def call_b(letter="a"):
    return [piece.replace("%s", letter) for piece in CALL_B]


THOUGHT = ["<think>", "\nI should ", "look closely.\n", "</think>", "\n\nThe answer ", "is 42."]
HELLO = ["Hello from ", "the scripted ", "model, ", "piece four. ", "And the end."]
# recording -> what the model wrote, token by token
SCRIPTS = {
    "a-badxml": ["Now.\n", "<tool_call>", "\n<function=Read>\n<parameter=file_path>\n/tmp/a.py",
                 "\n</function>\n", "</tool_call>"],
    "a-badxml-whole": ["Now.\n", "<tool_call>", "\n<function=Read>\n<parameter=file_path>\n/tmp/a.py",
                       "\n</function>\n", "</tool_call>"],
    "a-longwritexml": ["Writing a long file.\n", "<tool_call>", "\n<function=Write>\n",
                       "<parameter=file_path>\n/tmp/long.txt\n</parameter>\n<parameter=content>\n",
                       *[line + "\n" for line in LONG.splitlines()],
                       "</parameter>\n</function>\n</tool_call>"],
    "a-noopen": ["Reading.\n<function=Read>", "\n<parameter=file_path>", "\n/tmp/a.py",
                 "\n</parameter>\n</function>", "\n</tool_call>"],
    "a-space": ["   \n  "],
    "a-think": THOUGHT,
    "a-toolxml": ["I will ", "read it.\n", *call_a()],
    "a-toolxml-after-result": ["The file ", "says hello."],
    "a-twocallsxml": ["Both:\n", "<tool_call>", "".join(call_a()[1:-1]), "</tool_call>\n",
                      "<tool_call>", "".join(call_a("b")[1:-1]), "</tool_call>"],
    "a-unclosed": ["Use the ", "<tool_call>", " tag to ", "call."],
    "a-xmlquirks": ["<tool_call>", "\n<function=Write>\n<parameter=file_path>\n/tmp/q.py\n</parameter>\n",
                    "<parameter=content>\nif a<b=c> and d & e:\r\n    x = null\r\n\n</parameter>\n",
                    "</function>\n", "</tool_call>"],
    "a35-noopen": ["Reading.\n<function=Read>", "\n<parameter=file_path>", "\n/tmp/a.py",
                   "\n</parameter>\n</function>", "\n</tool_call>"],
    "a35-think": THOUGHT,
    "a35-thinkcall": ["I will call it. ", *call_b()],
    "a35-toolxml": ["I will ", "read it.\n", *call_a()],
    "a35-toolxml-after-result": ["The file ", "says hello."],
    "b-badjson": ["Writing.\n", "<tool_call>", "\n{\"name\": \"Write\", \"arguments\": {",
                  "\"file_path\": \"a\", \"content\": \"one\n", "two\"}}\n", "</tool_call>"],
    "b-barejson": ["{\"name\": \"Read\", ", "\"arguments\": {\"file_path\": \"/tmp/a.py\"}}"],
    "b-fenced": ["Sure:\n```json\n", "{\"name\": \"Read\", ",
                 "\"arguments\": {\"file_path\": \"/tmp/a.py\"}}", "\n```"],
    "b-hello": HELLO,
    "b-longwrite": ["Writing a long file.\n", "<tool_call>", "\n{\"name\": \"Write\", \"arguments\": {",
                    "\"file_path\": \"/tmp/long.txt\", \"content\": \"",
                    *[line + "\\n" for line in LONG.splitlines()], "\"}}\n</tool_call>"],
    "b-noargs": ["List.\n", "<tool_call>", "\n{\"name\": \"Glob\"}\n", "</tool_call>"],
    "b-space": ["   \n  "],
    "b-texttool": ["Hi there " + "".join(call_b())],
    "b-tooljson": ["I will ", "read it.\n", *call_b()],
    "b-tooljson-after-result": ["The file ", "says hello."],
    "b-toolonly": ["<tool_call>", "\n{\"name\": \"Read\", \"arguments\": ",
                   "{\"file_path\": \"/tmp/a.py\", \"limit\": 5}}\n", "</tool_call>"],
    "b-twocalls": ["Both:\n", *call_b(), *["\n" + call_b()[0], *call_b("b")[1:-2],
                   "".join(call_b("b")[-2:])]],
    "b-unclosed": ["Use the ", "<tool_call>", " tag to ", "call."],
    "b-unknowntool": ["Now.\n", "<tool_call>", "\n{\"name\": \"Glob\", \"arguments\": ",
                      "{\"pattern\": \"*\"}}\n", "</tool_call>"],
    "c-barejson": ["{\"name\": \"Read\", ", "\"arguments\": {\"file_path\": \"/tmp/a.py\"}}"],
    "c-hello": HELLO,
    "c-tooljson": ["I will ", "read it.\n", *call_b()],
    "c-tooljson-after-result": ["The file ", "says hello."],
    "length": [f"w{n} " for n in range(9)],
    "q3-think": THOUGHT,
    "q3-think-off": THOUGHT,
    "q3-thinkcall": ["<think>", "\nI will call it. ", "\n" + call_b()[0] + call_b()[1], *call_b()[2:]],
    "q3-toolonly": ["<tool_call>", "\n{\"name\": \"Read\", \"arguments\": ",
                    "{\"file_path\": \"/tmp/a.py\", \"limit\": 5}}\n", "</tool_call>"],
    "raw-generate": ["I will ", "read it.\n", *call_a()],
    "repeat": ["Start ", *["again again "] * 60],
}
OLD_SCRIPTS = {"a35-think": THOUGHT, "b-hello": HELLO, "image-to-text-model": HELLO}
ANSWERED = [(NEW, name) for name in SCRIPTS] + [(OLD, name) for name in OLD_SCRIPTS]


@pytest.mark.parametrize(("version", "name"), ANSWERED)
def test_an_answer_is_that_of_the_recording(version, name):
    known = recording(name, version)
    scripts = SCRIPTS if version == NEW else OLD_SCRIPTS
    reply = model_text("".join(scripts[name]), scripts[name])
    with MockOllama(reply, models="any", version=version) as mock:
        got = ask(mock, known["request"]["path"], known["request"]["body"])
    wanted = "".join(line for _, line in known["lines_at_ms"])
    assert got[:2] == (known["status"], known["headers"]["Content-Type"])
    assert [comparable(line) for line in lines_of(got[2])] == [
        comparable(line) for line in lines_of(wanted)
    ]


REFUSED = [
    (NEW, name) for name in (
        "arguments-string", "boolean-schema", "content-array", "image-to-text-model", "load",
        "missing-model", "no-thinking", "no-tools", "option-type",
    )
] + [(OLD, "c-tooljson")]


@pytest.mark.parametrize(("version", "name"), REFUSED)
def test_a_refusal_is_that_of_the_recording(version, name):
    known = recording(name, version)
    with MockOllama(models=["b-hello", "plain", "c-tooljson"], version=version) as mock:
        got = ask(mock, known["request"]["path"], known["request"]["body"])
    wanted = "".join(line for _, line in known["lines_at_ms"])
    assert got[:2] == (known["status"], known["headers"]["Content-Type"])
    assert comparable(json.loads(got[2])) == comparable(json.loads(wanted))


RENDERED = sorted(path.stem for path in (RECORDINGS / NEW).glob("render-*.json"))


@pytest.mark.parametrize("name", RENDERED)
def test_a_prompt_is_that_of_the_recording(name):
    known = recording(name)
    with MockOllama(models="any") as mock:
        got = ask(mock, "/api/chat", known["request"]["body"])
    assert got[0] == 200
    assert comparable(json.loads(got[2])) == comparable(json.loads(known["lines_at_ms"][0][1]))
    assert mock.turns == []


# ---- the window


WORDS = "word " * 6000


def words(prompt):
    """Tokens as the real vocabulary counts that prompt."""
    return prompt.count("word") + 9


@pytest.mark.parametrize(("version", "name"), [
    (version, name) for version in (NEW, OLD)
    for name in ("overflow", "overflow-silent", "overflow-shift-false")
])
def test_a_prompt_over_the_window_goes_as_recorded(version, name):
    known = recording(name, version)
    body = dict(known["request"]["body"], messages=[{"role": "user", "content": WORDS}])
    reply = model_text("".join(HELLO), HELLO)
    with MockOllama(reply, models="any", version=version, tokens=words) as mock:
        got = ask(mock, "/api/chat", body)
    wanted = "".join(line for _, line in known["lines_at_ms"])
    assert got[:2] == (known["status"], known["headers"]["Content-Type"])
    assert [comparable(line) for line in lines_of(got[2])] == [
        comparable(line) for line in lines_of(wanted)
    ]
    if got[0] == 200:
        counts = [lines_of(t)[-1]["prompt_eval_count"] for t in (got[2], wanted)]
        assert counts[0] == counts[1]


@pytest.mark.parametrize(("size", "code", "reason", "tokens"), [
    (90, 200, "stop", 6), (97, 200, "length", 3), (98, 200, "length", 2), (99, 200, "length", 1),
    (94, 200, "stop", 6), (95, 200, "length", 5),
    (100, 400, None, None), (101, 400, None, None),
])
def test_generation_ends_at_the_edge_of_the_window(size, code, reason, tokens):
    body = chat(model="b-x", truncate=False, shift=False, options={"num_ctx": 100})
    with MockOllama(model_text("".join(HELLO), HELLO), models="any", tokens=lambda _: size) as mock:
        got = ask(mock, "/api/chat", body)
    assert got[0] == code
    if code == 200:
        last = lines_of(got[2])[-1]
        assert (last["done_reason"], last["eval_count"]) == (reason, tokens)


def test_the_oldest_messages_are_dropped_in_silence():
    messages = [{"role": "system", "content": "S"}] + [
        {"role": "user" if n % 2 == 0 else "assistant", "content": f"message {n} " + "x" * 300}
        for n in range(9)
    ]
    body = {"model": "a-x", "messages": messages, "options": {"num_ctx": 300}}
    with MockOllama(models="any") as mock:
        assert ask(mock, "/api/chat", body)[0] == 200
        prompt = mock.turns[0].prompt
    assert "message 8" in prompt and "message 5" not in prompt and "\nS<|im_end|>" in prompt


def test_the_window_is_clamped_and_shown_and_a_change_reloads():
    def options(**given):
        return chat(model="b-x", options=given)

    with MockOllama(model=Model("b-x", context=8000)) as mock:
        for body in (options(), options(num_ctx=4096), options(num_ctx=99_999, temperature=0.5),
                     options(num_ctx=8000), dict(options(num_ctx=8000), shift=False),
                     {"model": "b-x", "options": {"num_ctx": 8000}, "shift": False}):
            ask(mock, "/api/chat", body)
        running = json.loads(ask(mock, "/api/ps")[2])["models"]
        assert [(m["name"], m["context_length"]) for m in running] == [("b-x:latest", 8000)]
        assert [(o["num_ctx"], o["shift"]) for _, o in mock.loads] == [
            (4096, True), (8000, True), (8000, False),
        ]
        unload = ask(mock, "/api/generate", {"model": "b-x", "keep_alive": 0})
        assert json.loads(unload[2])["done_reason"] == "unload"
        assert json.loads(ask(mock, "/api/ps")[2]) == {"models": []}


def test_the_window_of_the_modelfile_is_used_and_shown():
    with MockOllama(model=Model("b-x", parameters={"num_ctx": 6000})) as mock:
        ask(mock, "/api/chat", chat())
        assert json.loads(ask(mock, "/api/ps")[2])["models"][0]["context_length"] == 6000
        shown = json.loads(ask(mock, "/api/show", {"model": "b-x"})[2])
    assert shown["parameters"].split() == ["num_ctx", "6000"]
    assert "PARAMETER num_ctx 6000" in shown["modelfile"]


def test_a_changed_shift_does_not_reload_an_old_one():
    with MockOllama(models="any", version=OLD) as mock:
        for shift in (True, False):
            ask(mock, "/api/chat", chat(shift=shift))
        assert len(mock.loads) == 1


def test_a_model_kept_for_ever_says_so():
    with MockOllama(models="any") as mock:
        ask(mock, "/api/chat", chat(keep_alive=-1))
        held = json.loads(ask(mock, "/api/ps")[2])["models"]
    assert held[0]["expires_at"] > "2300"


# ---- what is refused


@pytest.mark.parametrize(("change", "code", "message"), [
    ({"model": ""}, 400, "model is required"),
    ({"keep_alive": "10"}, 400, 'time: missing unit in duration "10"'),
    ({"keep_alive": True}, 400, "Unsupported type: 'bool'"),
    ({"think": "xhigh"}, 400, "invalid think value: \"xhigh\" "
     '(must be "high", "medium", "low", "max", true, or false)'),
    ({"think": 1}, 400, 'think must be a boolean or string ("high", "medium", "low", "max", true, or false)'),
    ({"messages": "x"}, 400,
     "json: cannot unmarshal string into Go struct field ChatRequest.messages of type []api.Message"),
    ({"tools": {}}, 400,
     "json: cannot unmarshal object into Go struct field ChatRequest.tools of type api.Tools"),
    ({"tools": [{"function": {"name": "X", "parameters": {"properties": {"a": {"required": True}}}}}]},
     400, "json: cannot unmarshal bool into Go struct field "
     "ToolFunctionParameters.tools.function.parameters.properties.required of type []string"),
    ({"tools": [{"function": {"name": "X", "parameters": {"properties": {"a": {"anyOf": [True]}}}}}]},
     400, "json: cannot unmarshal bool into Go struct field "
     "ToolFunctionParameters.tools.function.parameters.properties.anyOf of type api.ToolProperty"),
    ({"stream": "yes"}, 400,
     "json: cannot unmarshal string into Go struct field ChatRequest.stream of type bool"),
    ({"options": {"stop": "x"}}, 500, 'option "stop" must be of type array'),
    ({"messages": [{"role": "user", "content": "x", "images": ["data:x"]}]}, 400,
     "illegal base64 data at input byte 4"),
    ({"tools": [{"function": {"name": "X", "parameters": {"type": ["object"]}}}]}, 400,
     "json: cannot unmarshal array into Go struct field "
     "ToolFunctionParameters.tools.function.parameters.type of type string"),
])
def test_a_bad_request_is_refused_in_the_words_of_ollama(change, code, message):
    with MockOllama(models="any") as mock:
        got = ask(mock, "/api/chat", chat(**{"model": "b-x", **change}) if "model" not in change
                  else {**chat(), **change})
        assert (got[0], json.loads(got[2])) == (code, {"error": message})
        assert mock.turns == []


@pytest.mark.parametrize(("data", "message"), [
    (b"", "missing request body"),
    (b'{"model": "b', "unexpected EOF"),
    (b"{nope}", "invalid character 'n' looking for beginning of object key string"),
    (b'{"a":1, }', "invalid character '}' looking for beginning of object key string"),
    (b'{"a" 1}', "invalid character '1' after object key"),
    (b'{"a":1 2}', "invalid character '2' after object key:value pair"),
    (b'{"a":}', "invalid character '}' looking for beginning of value"),
    (b'{"a":1}x', "model is required"),
    (b'{"model":5}', "json: cannot unmarshal number into Go struct field ChatRequest.model of type string"),
    (b"[]", "json: cannot unmarshal array into Go value of type api.ChatRequest"),
])
def test_a_body_that_is_no_object_is_refused(data, message):
    with MockOllama() as mock:
        got = ask(mock, "/api/chat", data)
    assert (got[0], json.loads(got[2])) == (400, {"error": message})


@pytest.mark.parametrize(("headers", "code"), [
    ({"Host": "evil.example"}, 403), ({"Host": "127.0.0.1:1"}, 200), ({"Host": "[::1]:1"}, 200),
    ({"Host": "my.localhost"}, 200), ({"Host": "localhost.evil.example"}, 403),
    ({"Origin": "http://evil.example"}, 403), ({"Origin": "null"}, 403),
    ({"Origin": "http://localhost:3000"}, 200), ({"Origin": "app://x"}, 200),
])
def test_foreign_hosts_and_origins_get_an_empty_403(headers, code):
    with MockOllama() as mock:
        got = ask(mock, "/api/tags", headers=headers)
    assert got[0] == code
    if code == 403:
        assert got[1:] == (None, "")


@pytest.mark.parametrize(("method", "path", "wanted"), [
    ("GET", "/", (200, "text/plain; charset=utf-8", "Ollama is running")),
    ("HEAD", "/", (200, "text/plain; charset=utf-8", "")),
    ("GET", "/nope", (404, "text/plain", "404 page not found")),
    ("GET", "/api/chat", (405, "text/plain", "405 method not allowed")),
    ("GET", "/api/version", (200, "application/json; charset=utf-8", '{"version":"0.33.0"}')),
])
def test_small_endpoints(method, path, wanted):
    with MockOllama() as mock:
        assert ask(mock, path, method=method) == wanted


@pytest.mark.parametrize("name", ["show-a-toolxml", "show-b-hello", "show-c-tooljson", "show-q3-think"])
def test_show_tells_the_path_as_recorded(name):
    known = recording(name)
    wanted = json.loads(known["lines_at_ms"][0][1])
    with MockOllama(models="any") as mock:
        got = json.loads(ask(mock, "/api/show", known["request"]["body"])[2])
    assert list(got) == list(wanted)
    assert got["capabilities"] == wanted["capabilities"]
    assert set(got["details"]) == set(wanted["details"])
    for line in ("RENDERER qwen3-coder", "PARSER qwen3-coder", "TEMPLATE {{ .Prompt }}"):
        assert (line in got["modelfile"]) == (line in wanted["modelfile"])


def test_an_old_ollama_has_no_tools_on_path_c():
    with MockOllama(models="any", version=OLD) as mock:
        got = json.loads(ask(mock, "/api/show", {"model": "c-x"})[2])
    assert (got["capabilities"], got["template"]) == (["completion"], "{{ .Prompt }}")


# ---- parsers and renderers beyond the recordings


READ = {"type": "function", "function": {"name": "Read", "description": "d", "parameters": {
    "type": "object", "properties": {
        "n": {"type": "integer"}, "f": {"type": "number"}, "b": {"type": "boolean"},
        "a": {"type": "array"}, "o": {"type": "object"}, "s": {"type": "string"},
        "bn": {"anyOf": [{"type": "boolean"}, {"type": "number"}]}}}}}


def xml(inner):
    return f"\n<function=Read>\n{inner}</function>\n"


@pytest.mark.parametrize(("key", "value", "wanted"), [
    ("s", "\nx\n", "x"), ("s", "\n\nx\n\n", "\nx\n"), ("s", "null", None), ("s", "5", "5"),
    ("n", "5", 5), ("n", "five", "five"), ("f", "1.5", 1.5), ("b", "true", True), ("b", "yes", False),
    ("a", "[1]", [1]), ("o", '{"x":1}', {"x": 1}), ("o", "{x}", "{x}"), ("new", "1", "1"),
    ("n", "5.0", "5.0"), ("f", "5.0", 5), ("f", "x", "x"), ("bn", "3", 3), ("bn", "true", True),
    ("s", 'a<b="c">', 'a<b name="&#34;c&#34;">'),
    ("s", "a < b && c", "a < b && c"), ("s", "<div>x</div>", "<div>x</div>"),
])
def test_values_of_xml_calls(key, value, wanted):
    body = xml(f"<parameter={key}>{value}</parameter>\n")
    assert parse_xml_call(body, [READ]) == ("Read", {key: wanted})


@pytest.mark.parametrize(("body", "message"), [
    ("", "EOF"),
    ('{"name": "Read"}', "EOF"),
    ("<function=Read><parameter=s>x", "XML syntax error on line 1: unexpected EOF"),
    (xml("<parameter=s>\nx\n"),
     "XML syntax error on line 5: element <parameter> closed by </function>"),
    (xml("</parameter>\n"), "XML syntax error on line 3: element <function> closed by </parameter>"),
    (xml("<parameter=s>\x1b</parameter>\n"),
     "XML syntax error on line 3: illegal character code U+001B"),
    ("<parameter=x>", "expected element type <function> but have <parameter>"),
    ("</function>", "XML syntax error on line 1: unexpected end element </function>"),
])
def test_errors_of_xml_calls(body, message):
    with pytest.raises(ParserError, match="^" + re.escape(message) + "$"):
        parse_xml_call(body, [READ])


def parsed(path, pieces, tools=(READ,), think=False):
    """(thinking, content, calls) of a whole text."""
    parser = PATHS[path].parser(list(tools), think, "0.33.0")
    found = [parser.add(piece) for piece in pieces] + [parser.end()]
    return ("".join(f.thinking for f in found), "".join(f.content for f in found),
            [c for f in found for c in f.calls])


EDIT = {"type": "function", "function": {"name": "Edit", "parameters": {"type": "object"}}}
PARSED = [
    ("a", "x <tool_call>" + xml("<parameter=n>1</parameter>\n") + "</tool_call>y \n",
     ("", "xy", [("Read", {"n": 1})])),
    ("a", "text <", ("", "text", [])),
    ("a", "text  \n", ("", "text", [])),
    ("b", '<tool_call>{"arguments":{"f":"Edit.md"},"name":"Read"}</tool_call>after',
     ("", "", [("Edit", {"f": "Edit.md"})])),
    ("b", "text <", ("", "text ", [])),
    ("b", '<tool_call>{"a":{"Edit":{"x":"}"}}}', ("", "", [("Edit", {"x": "}"})])),
    ("b", '<tool_call>{"name":"Read","arguments":"{\\"n\\":1}"}', ("", "", [("Read", {"n": 1})])),
    ("b", '<tool_call>{bad}{"name":"Read","arguments":{"n":1}}', ("", "", [("Read", {"n": 1})])),
    ("b", '<tool_call>{{"name":"Read","arguments":{}}}</tool_call>', ("", "", [])),
    ("c", '<tool_call>{"name":"Read","arguments":{"n":1}}</tool_call>',
     ("", "", [("Read", {"n": 1})])),
]


@pytest.mark.parametrize(("path", "written", "wanted"), PARSED)
def test_what_the_parsers_lose(path, written, wanted):
    assert parsed(path, list(written), (READ, EDIT)) == wanted


@pytest.mark.parametrize("path", ["a", "a35", "b", "q3", "c", "plain"])
@pytest.mark.parametrize("think", [True, False])
def test_cutting_plain_text_anew_changes_nothing(path, think):
    written = "Ein Wort, <b>two</b> < three\n\nand <tool names> x"
    whole = parsed(path, [written], think=think)
    assert parsed(path, list(written), think=think) == whole
    assert "".join(whole[:2]) == written


def test_text_and_call_in_one_token_lose_the_call_only_on_path_b():
    written = ["Hi " + "".join(call_b())]
    assert parsed("b", written)[2] == []
    assert parsed("c", written)[2] == [("Read", {"file_path": "/tmp/a.py"})]


def test_an_unknown_tool_breaks_the_grammar_of_path_c():
    with MockOllama(model_text("Hi " + '<tool_call>{"name":"X","arguments":{}}</tool_call>'),
                    models="any") as mock:
        got = ask(mock, "/api/chat", chat(model="c-x", tools=[READ]))
    assert lines_of(got[2])[-1]["error"].startswith("llama-server chat error: map[code:500")


def rendered(model, messages, **more):
    with MockOllama(models="any") as mock:
        body = {"model": model, "messages": messages, "_debug_render_only": True, **more}
        return json.loads(ask(mock, "/api/chat", body)[2])["_debug_info"]["rendered_template"]


def said(*turns):
    return [dict(zip(("role", "content"), one)) for one in turns]


MADE = {"tool_calls": [{"function": {"name": "Read", "arguments": {"b": 1, "a": {"z": 1, "y": 2}}}}]}
START, END = "<|im_start|>", "<|im_end|>\n"


@pytest.mark.parametrize(("model", "messages", "more", "wanted"), [
    ("b-x", said(("user", "a"), ("system", "S"), ("user", "b"), ("system", "T")), {},
     f"{START}system\nS\n\nT{END}{START}user\na{END}{START}user\nb{END}{START}assistant\n"),
    ("b-x", [{"role": "user", "content": "a", "images": ["aa", "bb"]}], {},
     f"{START}user\n[img-0][img-1]a{END}{START}assistant\n"),
    ("a-x", [{"role": "assistant", "content": "x", "tool_calls": [{"function": {"name": "R",
      "arguments": {"n": 1234567, "f": 0.5, "b": True, "z": None, "s": "<"}}}]}], {},
     f"{START}assistant\nx\n\n<tool_call>\n<function=R>\n<parameter=n>\n1.234567e+06\n</parameter>\n"
     "<parameter=f>\n0.5\n</parameter>\n<parameter=b>\ntrue\n</parameter>\n<parameter=z>\nnull\n"
     f"</parameter>\n<parameter=s>\n<\n</parameter>\n</function>\n</tool_call>{END}"),
    ("a35-x", [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>t</think>\n\nb"},
               {"role": "tool", "content": " r "}], {},
     f"{START}user\na{END}{START}assistant\n<think>\nt\n</think>\n\nb{END}"
     f"{START}user\n<tool_response>\nr\n</tool_response>{END}{START}assistant\n<think>\n"),
    ("q3-x", said(("user", "a"), ("assistant", "<think>t</think>\n\nb"), ("user", "c")), {},
     f"{START}user\na{END}{START}assistant\nb{END}{START}user\nc /think{END}{START}assistant\n"),
    ("b-x", said(("user", "a"), ("user", "b")), {}, f"{START}user\na\n\nb{END}{START}assistant\n"),
    ("b-x", [{"role": "assistant", "content": "", **MADE}], {},
     f"{START}assistant\n<tool_call>\n"
     '{"name": "Read", "arguments": {"a":{"y":2,"z":1},"b":1}}\n</tool_call>'),
    ("a-x", [{"role": "assistant", "content": "", **MADE}, {"role": "tool", "content": "1"},
             {"role": "tool", "content": "2"}], {},
     f"{START}assistant\n\n<tool_call>\n<function=Read>\n<parameter=b>\n1\n</parameter>\n"
     '<parameter=a>\n{"y":2,"z":1}\n</parameter>\n</function>\n</tool_call>' + END +
     f"{START}user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n"
     f"</tool_response>{END}{START}assistant\n"),
    ("a-x", said(("user", "a"), ("assistant", "pre")), {}, f"{START}user\na{END}{START}assistant\npre"),
    ("a35-x", said(("user", "a"), ("assistant", "b"), ("user", "c")), {"think": False},
     f"{START}user\na{END}{START}assistant\nb{END}{START}user\nc{END}"
     f"{START}assistant\n<think>\n\n</think>\n\n"),
    ("q3-x", said(("user", "a")), {"think": False},
     f"{START}user\na /no_think{END}{START}assistant\n<think>\n\n</think>\n\n"),
    ("q3-x", [{"role": "user", "content": "a"},
              {"role": "assistant", "content": "b", "thinking": "t"},
              {"role": "tool", "content": "1"}], {},
     f"{START}user\na /think{END}{START}assistant\n<think>t</think>\nb{END}"
     f"{START}user\n<tool_response>\n1\n</tool_response>{END}{START}assistant\n"),
])
def test_prompts_beyond_the_recordings(model, messages, more, wanted):
    assert rendered(model, messages, **more) == wanted


def test_extra_schema_keys_move_from_render_to_render_on_path_a():
    tool = {"type": "function", "function": {"name": "X", "parameters": {"type": "object",
            "properties": {"p": {"type": "string", "enum": ["a"], "items": {"type": "string"}}}}}}
    body = chat(model="a-x", tools=[tool], _debug_render_only=True)
    with MockOllama(models="any") as mock:
        prompts = {ask(mock, "/api/chat", body)[2].partition("rendered")[2] for _ in range(4)}
    assert len(prompts) == 2


# ---- scripts


def events(whole):
    """The visible part of a stream, neighbours joined: [(kind, value)]."""
    seen = []
    for line in lines_of(whole):
        message = line.get("message", {})
        found = [(k, message[k]) for k in ("thinking", "content", "tool_calls") if message.get(k)]
        found += [("error", line["error"])] if "error" in line else []
        found += [("done", line["done_reason"])] if line.get("done") else []
        for kind, value in found:
            if kind == "tool_calls":
                seen += [("call", c["function"]["name"], c["function"]["arguments"]) for c in value]
            elif seen and seen[-1][0] == kind:
                seen[-1] = (kind, seen[-1][1] + value)
            else:
                seen.append((kind, value))
    return seen


def test_replies_are_served_in_order_and_the_last_repeats():
    replies = [
        text("one two"),
        [thinking("hm"), text("x"), done("length")],
        text("a") + call("Read", {"n": 1}) + call("Read"),
        text("a") + error_line("boom"),
        "plain <string>",
        lambda request: text(request.body["messages"][-1]["content"]),
    ]
    with MockOllama(replies, models="any") as mock:
        got = [events(ask(mock, "/api/chat", chat(f"q{n}", tools=[READ]))[2]) for n in range(7)]
        assert [turn.body["messages"][0]["content"] for turn in mock.turns] == [
            f"q{n}" for n in range(7)]
    assert got == [
        [("content", "one two"), ("done", "stop")],
        [("thinking", "hm"), ("content", "x"), ("done", "length")],
        [("content", "a"), ("call", "Read", {"n": 1}), ("call", "Read", {}), ("done", "stop")],
        [("content", "a"), ("error", "boom")],
        [("content", "plain <string>"), ("done", "stop")],
        [("content", "q5"), ("done", "stop")],
        [("content", "q6"), ("done", "stop")],
    ]


def test_the_default_follows_the_last_reply():
    with MockOllama([text("one")], models="any", default=text("other")) as mock:
        got = [events(ask(mock, "/api/chat", chat())[2])[0] for _ in range(3)]
    assert got == [("content", "one"), ("content", "other"), ("content", "other")]


@pytest.mark.parametrize(("model", "wanted"), [
    ("a-x", "Hi\n\n<tool_call>\n<function=Read>\n<parameter=n>\n1\n</parameter>\n</function>\n"
     "</tool_call>"),
    ("b-x", 'Hi\n\n<tool_call>\n{"name": "Read", "arguments": {"n": 1}}\n</tool_call>'),
])
def test_raw_generate_gives_a_scripted_call_as_the_model_writes_it(model, wanted):
    with MockOllama(text("Hi\n\n") + call("Read", {"n": 1}), models="any") as mock:
        got = ask(mock, "/api/generate", {"model": model, "prompt": "p", "raw": True})
    lines = lines_of(got[2])
    assert "".join(line["response"] for line in lines) == wanted
    assert len(lines) > 5 and lines[-1]["done_reason"] == "stop"


@pytest.mark.parametrize(("think", "wanted"), [
    (False, ("", "<think>\nhm\n</think>\n\nx")), (None, ("hm\n", "x")),
])
def test_raw_generate_splits_thinking_on_path_b_unless_told_not_to(think, wanted):
    with MockOllama(thinking("hm") + text("x"), models="any") as mock:
        body = {"model": "q3-x", "prompt": "p", "raw": True, "think": think}
        lines = lines_of(ask(mock, "/api/generate", body)[2])
    assert tuple("".join(ln.get(k, "") for ln in lines) for k in ("thinking", "response")) == wanted


def test_generate_without_raw_renders():
    with MockOllama(models="any") as mock:
        ask(mock, "/api/generate", {"model": "b-x", "prompt": "p"})
        assert mock.turns[0].prompt == f"{START}user\np{END}{START}assistant\n"


def test_stop_strings_end_the_answer():
    with MockOllama(text("one two three", 4), models="any") as mock:
        got = ask(mock, "/api/chat", chat(options={"stop": ["three", " tw"]}))
    assert events(got[2]) == [("content", "one"), ("done", "stop")]


def test_not_streamed_is_the_same_in_one_line():
    with MockOllama(text("one ") + text("two") + call("Read", {"n": 1}), models="any") as mock:
        got = ask(mock, "/api/chat", chat(stream=False, tools=[READ]))
    line = json.loads(got[2])
    assert (got[1], line["message"]["content"], line["done"]) == (
        "application/json; charset=utf-8", "one two", True)
    assert [c["function"]["name"] for c in line["message"]["tool_calls"]] == ["Read"]


@pytest.mark.parametrize("written", ["", "a", "  two  words ", "<tool_call>{}</tool_call><<", "x" * 99])
def test_pieces_join_to_the_text(written):
    for pieces in (None, 1, 3):
        assert "".join(split_pieces(written, pieces)) == written


# ---- the wire


def open_socket(mock, body, version="1.1", path="/api/chat", headers=""):
    data = json.dumps(body).encode()
    sock = socket.create_connection(mock.address, timeout=5)
    head = f"POST {path} HTTP/{version}\r\nHost: localhost\r\n{headers}Content-Length: {len(data)}\r\n\r\n"
    sock.sendall(head.encode() + data)
    return sock


def read_all(sock):
    data = b""
    with sock:
        while True:
            more = sock.recv(65536)
            if not more:
                return data
            data += more


def test_nothing_is_sent_before_the_first_line():
    gate = threading.Event()
    with MockOllama(hold(gate) + text("x"), models="any") as mock, open_socket(mock, chat()) as sock:
        mock.wait_for(1)
        assert select.select([sock], [], [], 0.05)[0] == []
        gate.set()
        first = sock.recv(65536)
    assert first.startswith(b"HTTP/1.1 200 OK\r\n") and b'"content":"x"' in first


def test_http_1_0_is_answered_unchunked_and_closed():
    with MockOllama(text("x"), models="any") as mock:
        head, _, body = read_all(open_socket(mock, chat(), "1.0")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 200") and b"chunked" not in head
    assert [line["done"] for line in lines_of(body.decode())] == [False, True]


def test_one_connection_serves_many_requests():
    with MockOllama(text("x"), models="any") as mock:
        connection = HTTPConnection("127.0.0.1", mock.port, timeout=5)
        for _ in range(3):
            connection.request("POST", "/api/chat", iter([json.dumps(chat()).encode()]),
                               encode_chunked=True, headers={"Transfer-Encoding": "chunked"})
            assert b'"done":true' in connection.getresponse().read()
        connection.close()
        assert len(mock.turns) == 3


@pytest.mark.parametrize(("reply", "tail"), [
    (text("x") + cut(), b'"done":false}\n\r\n'),
    (text("x") + cut(clean=True), b"0\r\n\r\n"),
    (cut(clean=True), b"\r\n\r\n0\r\n\r\n"),
    (raw("{}\n") + end(), b"{}\n\r\n0\r\n\r\n"),
    (raw('{"half') + cut(), b'6\r\n{"half\r\n'),
    (wire(b"HTTP/1.1 200 OK\r\n\r\nzzz\r\n") + cut(), b"HTTP/1.1 200 OK\r\n\r\nzzz\r\n"),
    (cut(), b""),
])
def test_broken_endings_on_the_wire(reply, tail):
    with MockOllama(reply, models="any") as mock:
        data = read_all(open_socket(mock, chat(), headers="Connection: close\r\n"))
    assert data.endswith(tail) and b'"done":true' not in data
    assert tail or data == b""


def test_only_model_text_is_caught_repeating():
    with MockOllama([text("x " * 99), model_text("x " * 99)], models="any") as mock:
        got = [events(ask(mock, "/api/chat", chat())[2]) for _ in range(2)]
    assert got == [[("content", "x " * 99), ("done", "stop")], [("content", "x" + " x" * 30)]]


def test_a_reset_is_a_reset():
    with MockOllama(text("x") + reset(), models="any") as mock, pytest.raises(ConnectionResetError):
        read_all(open_socket(mock, chat()))


def test_a_status_is_answered_as_scripted():
    with MockOllama(status(429, {"error": "slow"}, {"Retry-After": "3"}), models="any") as mock:
        assert ask(mock, "/api/chat", chat()) == (
            429, "application/json; charset=utf-8", '{"error":"slow"}')


@pytest.mark.parametrize("reply", [hang(), text("x") + hang(), delay(60), text("x " * 50) + delay(60)])
def test_a_client_that_leaves_is_noticed(reply):
    with MockOllama(reply, models="any") as mock:
        sock = open_socket(mock, chat())
        request = mock.wait_for(1)
        sock.close()
        assert request.closed_by_client.wait(5) and request.finished.wait(5)


def test_a_client_that_stays_is_not_said_to_have_left():
    with MockOllama(text("x"), models="any") as mock:
        ask(mock, "/api/chat", chat())
        request = mock.wait_for(1)
        assert request.finished.wait(5)
    assert not request.closed_by_client.is_set()


def test_stopping_leaves_no_threads():
    mock = MockOllama(hang(), models="any").start()
    socks = [open_socket(mock, chat()) for _ in range(3)]
    idle = socket.create_connection(mock.address)
    request = mock.wait_for(3)
    mock.stop()
    assert mock.alive == 0 and not request.closed_by_client.is_set()
    for sock in [*socks, idle]:
        sock.close()


def test_stopping_does_not_wait_for_a_client_that_reads_nothing():
    mock = MockOllama(raw(b"x" * 50_000_000), models="any").start()
    with open_socket(mock, chat()) as sock:
        assert sock.recv(1) == b"H"
        mock.stop()
    assert mock.alive == 0


def test_a_client_that_leaves_while_the_model_loads_aborts_the_load():
    with MockOllama(text("x"), models="any", load_delay=60) as mock:
        sock = open_socket(mock, chat())
        request = mock.wait_for(1, turns=False)
        sock.close()
        assert request.closed_by_client.wait(5)
        assert json.loads(ask(mock, "/api/ps")[2]) == {"models": []}
        mock.load_delay = 0
        assert ask(mock, "/api/chat", chat())[0] == 200
        assert (len(mock.turns), len(mock.loads)) == (1, 2)


def test_pipelined_requests_are_answered_in_turn():
    with MockOllama([text("one"), text("two")], models="any") as mock:
        data = json.dumps(chat()).encode()
        head = f"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
        with socket.create_connection(mock.address, timeout=5) as sock:
            sock.sendall(head.encode() + b"\r\n" + data + head.encode() + b"Connection: close\r\n\r\n" + data)
            whole = read_all(sock)
    assert whole.index(b'"one"') < whole.index(b'"two"') and whole.count(b"200 OK") == 2


def test_garbage_instead_of_a_request_closes_the_connection():
    with MockOllama() as mock:
        sock = socket.create_connection(mock.address, timeout=5)
        sock.sendall(b"\x16\x03\x01 nonsense\r\n")
        assert read_all(sock).startswith(b"HTTP/1.1 400")


# ---- the slot


def test_the_slot_reads_only_what_is_new():
    slot = SimulatedSlot(prefill_s_per_token=0.5)
    assert [slot.prefill(prompt, len)[0] for prompt in ("abcd", "abcdef", "abcdef", "abxx")] == [
        4, 2, 1, 2]
    assert slot.seconds == 4.5


def test_a_displaced_prompt_comes_back_from_ram_but_a_shared_beginning_does_not():
    slot = SimulatedSlot()
    long, other = "a" * 100, "b" * 100
    assert [slot.prefill(p, len)[0] for p in (long, other, long + "c", other + "c")] == [
        100, 100, 1, 1]
    slot = SimulatedSlot()
    shared = "s" * 60
    prompts = (shared + "x" * 40, shared + "y" * 40, shared + "x" * 40)
    assert [slot.prefill(p, len)[0] for p in prompts] == [100, 40, 40]


def test_another_model_costs_the_first_nothing_and_a_reload_costs_all():
    with MockOllama(text("x"), models="any", slot=SimulatedSlot()) as mock:
        for model, options in (("b-x", {}), ("b-y", {}), ("b-x", {}), ("b-x", {"num_ctx": 99})):
            ask(mock, "/api/chat", chat("word " * 20, model=model, options=options))
        read = mock.slot.read
    assert read[2] == 1 and read[0] == read[1] == read[3] > 30


def test_durations_tell_a_cached_prompt_from_a_new_one():
    slot = SimulatedSlot(prefill_s_per_token=0.01)
    with MockOllama(text("x"), models="any", slot=slot) as mock:
        body = chat("word " * 500, model="b-x")
        last = [lines_of(ask(mock, "/api/chat", body)[2])[-1] for _ in range(2)]
    assert last[0]["prompt_eval_count"] == last[1]["prompt_eval_count"]
    assert last[0]["prompt_eval_duration"] > 100 * last[1]["prompt_eval_duration"]


def test_a_busy_slot_keeps_the_next_waiting_until_it_leaves():
    with MockOllama(hang(), models="any", parallel=1) as mock:
        first, second = open_socket(mock, chat()), open_socket(mock, chat())
        waiting = mock.wait_for(2)
        assert select.select([first, second], [], [], 0.02)[0] == []
        second.close()
        first.close()
        assert waiting.finished.wait(5)


@pytest.mark.parametrize(("one", "other", "wanted"), [
    ("", "", 0), ("abc", "abd", 2), ("abc", "abc", 3), ("abc", "abcd", 3), ("x", "y", 0),
])
def test_the_common_beginning(one, other, wanted):
    assert common_length(one, other) == wanted


# ---- playback and the program


ALL = sorted(RECORDINGS.glob("*/*.json"))


@pytest.mark.parametrize("path", ALL, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_playback_is_the_recording(path):
    known = json.loads(path.read_text(encoding="utf-8"))
    asked = known["request"]
    with MockOllama.playback(path) as mock:
        got = ask(mock, asked["path"], asked["body"], asked["method"])
    assert got == (known["status"], known["headers"].get("Content-Type"),
                   "".join(line for _, line in known["lines_at_ms"]))


def test_playback_picks_the_recording_of_the_model():
    paths = [RECORDINGS / NEW / f"{name}.json" for name in ("b-hello", "a-toolxml")]
    with MockOllama.playback(*paths) as mock:
        got = ask(mock, "/api/chat", chat(model="a-toolxml"))
        assert mock.model and ask(mock, "/api/show", {"model": "a-toolxml"})[0] == 200
    assert lines_of(got[2])[0]["model"] == "a-toolxml"


@pytest.mark.parametrize(("mode", "code", "start"), [
    ("delay", 200, '{"model"'), ("malformed-json", 200, "{not valid json"),
    ("rate-limit", 429, '{"error":"rate limit exceeded"}'),
    ("stream-garbage", 200, "not-json\nstill-not-json\n"), ("stream-slow", 200, '{"model"'),
    ("script-json", 200, '{"model"'), ("empty", 200, ""), ("other", 200, '{"model"'),
])
def test_modes_of_the_program(mode, code, start):
    env = {"MOCK_OLLAMA_DELAY_MS": "1", "MOCK_OLLAMA_STREAM_DELAY_MS": "0.001"}
    with MockOllama(mode_reply(mode, env), models="any") as mock:
        got = ask(mock, "/api/chat", chat(stream=False))
    assert got[0] == code and got[2].startswith(start)


def test_the_program_stands_alone_and_tells_its_url(tmp_path):
    script = tmp_path / "mock_ollama.py"
    shutil.copy(mock_ollama.__file__, script)
    command = [sys.executable, "-I", str(script), "--port", "0", "--mode", "rate-limit"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True,
                          env={"PATH": os.environ["PATH"]}) as process:
        try:
            port = int(re.search(r"http://127\.0\.0\.1:(\d+)", process.stdout.readline()).group(1))
            connection = HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("POST", "/api/chat", json.dumps(chat(model="mock-model")))
            assert connection.getresponse().status == 429
            connection.close()
            connection.request("GET", "/stats")
            assert json.loads(connection.getresponse().read())["totalRequests"] == 1
            connection.close()
        finally:
            process.terminate()
