"""The mock answers as the recordings of real servers do."""
import json
import re
import socket
import threading
from http.client import HTTPConnection
from pathlib import Path

import pytest

import mock_ollama
from mock_ollama import (
    MockOllama, Model, SimulatedSlot, call, cut, delay, done, error_line, hang, model_text, raw,
    reset, status, text, thinking, wire,
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
