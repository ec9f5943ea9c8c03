"""The verbatim way through the whole server: inputs that stream, fallbacks, faults, leaving."""
import json
import socket
import threading
import time

import pytest
from conversation import Conversation
from helpers import (
    BASH,
    READ,
    WRITE,
    check_events,
    is_keep_alive,
    joined,
    read_sse,
    running_shim,
    wait_until,
)
from mock_ollama import (
    Fit,
    MockOllama,
    Model,
    Turn,
    as_reply,
    cut,
    done,
    error_line,
    hang,
    hold,
    model_text,
    raw,
    reset,
    status,
    text,
)

import qwencode
from qwencode import fold, rendered_prompt

MODELS = {"A": "a-x", "B": "b-x", "a35": "a35-x", "q3": "q3-x", "C": "c-x"}
TOOLS = [BASH, READ, WRITE]
HI = {"model": "claude-x", "max_tokens": 9000, "stream": True, "tools": TOOLS,
      "messages": [{"role": "user", "content": "hi"}]}


def xml(name, **values):
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"


def hermes(name, **arguments):
    return "<tool_call>\n" + json.dumps({"name": name, "arguments": arguments}) + "\n</tool_call>"


def ways(mock):
    return [turn.path for turn in mock.turns]


def logged(capfd, words):
    return capfd.readouterr().err.count(words)


# ---- the rendered prompt goes on in its own JSON


@pytest.mark.parametrize("prompt", ["if a<b && c>d:", "a \\\\u003c b", "\\\\<", "\\u0026 & é 😀 \"x\"\n"])
def test_a_prompt_goes_on_without_the_escapes_of_go(prompt):
    escaped = json.dumps(prompt)
    for sign in "<>&":
        escaped = escaped.replace(sign, f"\\u{ord(sign):04x}")
    for colon in (":", ": "):  # a relay that writes the JSON anew leaves a blank
        rendered = rendered_prompt('{"_debug_info": {"rendered_template"' + colon + escaped + "}}")
        assert rendered == (prompt, json.dumps(prompt))


@pytest.mark.parametrize("answer", ["", "{}", '{"_debug_info": {"rendered_template": ""}}',
                                    '{"_debug_info": {"rendered_template": 5}}',
                                    '{"rendered_template": "x"}', '{"rendered_template": '])
def test_an_answer_of_another_shape_holds_no_prompt(answer):
    assert rendered_prompt(answer) is None


# ---- exact values

VALUES = {
    "generics": "if a<b=c>:\n    d = e<f>",
    "ampersands": "a && b &amp; &lt;c&gt;",
    "quotes": "it's \"quoted\" `x` \\ \\n \\\"",
    "tabs": "\tif x:\n\t\treturn\t1",
    "CR LF": "one\r\ntwo\r\n\r\nthree",
    "trailing blank lines": "one\n\n\n\n",
    "spaces at the ends of lines": "pass  \n\t\n  \nx ",
    "leading blank lines": "\n\n  one",
    "a closing tag within": "<p>\n</parameter>\n</p>",
    "a call within": "Use <tool_call> and </tool_call>, <function=x> too",
    "letters": "über 中文 😀 \u2028 \x7f",
    "empty": "",
    "JSON": '{"name": "Read", "arguments": {"a": [1, 2]}}',
    "think tags": "say <think> and </think>",
    "long": "word " * 5000,
}


@pytest.fixture(scope="module")
def scripted():
    """A shim on a mock whose next reply the test chooses, for each kind of model."""
    script = {"reply": as_reply("ok")}
    with MockOllama(lambda _: script["reply"], models=[Model(name) for name in MODELS.values()],
                    default_num_ctx=65536) as mock, \
            running_shim(mock.url, use_requested_model="on", num_ctx="65536") as shim:
        shim.mock, shim.script = mock, script
        yield shim


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("path", ["A", "B"])
def test_values_arrive_exact(scripted, name, path):
    write = xml if path == "A" else hermes
    scripted.script["reply"] = model_text(
        "Writing.\n" + write("Write", file_path="/tmp/a b.py", content=VALUES[name]), 40)
    for stream in (True, False):
        got = scripted.request("POST", "/v1/messages",
                               {**HI, "model": MODELS[path], "stream": stream})
        message = fold(got.events) if stream else got.json
        if stream:
            check_events(got.events)
        assert message["content"] == [
            {"type": "text", "text": "Writing.\n"},
            {"type": "tool_use", "id": message["content"][1]["id"], "name": "Write",
             "input": {"file_path": "/tmp/a b.py", "content": VALUES[name]}}]
        assert message["stop_reason"] == "tool_use"
    assert ways(scripted.mock)[-2:] == ["/api/generate"] * 2


# ---- a long call on the wire

def timed_events(shim, body):
    """(seconds, event) for each event as it arrives."""
    data = json.dumps(body).encode()
    arrived, buffer = [], b""
    with socket.create_connection(("127.0.0.1", shim.port), 30) as sock:
        sock.sendall(b"POST /v1/messages HTTP/1.0\r\nContent-Type: application/json\r\n"
                     b"Content-Length: %d\r\n\r\n%b" % (len(data), data))
        begun = time.monotonic()
        while True:
            piece = sock.recv(65536)
            if not piece:
                return arrived
            buffer += piece
            if b"HTTP/1" in buffer[:10] and b"\r\n\r\n" in buffer:
                buffer = buffer.partition(b"\r\n\r\n")[2]
            whole, found, rest = buffer.rpartition(b"\n\n")
            if found:
                buffer = rest
                arrived += [(time.monotonic() - begun, event) for event in read_sse(whole)]


LINES = "".join(f"    value_{n} = compute({n}, 'x')  # line {n}\n" for n in range(3000))


@pytest.mark.parametrize("path", ["A", "B"])
def test_a_long_input_streams_while_it_is_written(path):
    """3,000 lines over 1 s (40 s at a fortieth): no gap, and the name at once."""
    write = xml if path == "A" else hermes
    script = "Writing it.\n" + write("Write", file_path="/tmp/long.py", content=LINES)
    pieces = 200
    with MockOllama(model_text(script, pieces), model=MODELS[path], default_num_ctx=131072,
                    token_delay=1.0 / pieces) as mock, \
            running_shim(mock.url, model=MODELS[path], num_ctx="131072") as shim:
        shim.server.registry.model(MODELS[path], qwencode.Waiter(),
                                   time.monotonic() + 5)
        arrived = timed_events(shim, HI)
    events = [event for _, event in arrived]
    check_events(events)
    times = [second for second, event in arrived if not is_keep_alive(event)]
    started = next(second for second, event in arrived if event.name == "content_block_start"
                   and event.payload["content_block"]["type"] == "tool_use")
    inputs = [event for event in events if event.payload.get("delta", {}).get("partial_json")]
    assert len(inputs) > 100
    assert started < 0.6
    assert max(later - sooner for sooner, later in zip(times, times[1:])) < 0.5
    assert fold(events)["content"][1]["input"] == {"file_path": "/tmp/long.py", "content": LINES}


def test_on_chat_the_same_call_is_held_and_the_client_kept_alive(monkeypatch):
    monkeypatch.setattr(qwencode, "KEEP_ALIVE_S", 0.1)
    script = "Writing it.\n" + hermes("Write", file_path="/tmp/l", content=LINES[:4000])
    with MockOllama(model_text(script, 40), model="b-x", token_delay=0.02) as mock, \
            running_shim(mock.url, model="b-x", num_ctx="32768", verbatim="off") as shim:
        events = [event for _, event in timed_events(shim, HI)]
    check_events(events)
    assert ways(mock) == ["/api/chat"]
    assert sum(map(is_keep_alive, events)) >= 3
    assert len([e for e in events if e.payload.get("delta", {}).get("partial_json")]) == 1
    assert fold(events)["content"][1]["input"]["content"] == LINES[:4000]


UNFINISHED = [
    (model_text(hermes("Write", file_path="/a", content="one two")[:-25]) + done("length"),
     ("end", "max_tokens")),
    (model_text(hermes("Write", file_path="/a", content="one two")[:-25]) + done("stop"),
     ("end", "tool_use")),
    (model_text(xml("Write", file_path="/a", content="one two")[:60]) + done("length"),
     ("end", "max_tokens")),
    (model_text(hermes("Write", file_path="/a", content="one two")[:-25]) + cut(),
     ("error", "api_error")),
    (model_text(hermes("Write", file_path="/a", content="one two")[:-25]) + error_line("boom"),
     ("error", "api_error")),
]


@pytest.mark.parametrize("row", UNFINISHED, ids=lambda row: str(row[1]))
def test_a_call_left_open_is_closed_and_only_a_broken_upstream_is_an_error(scripted, row):
    reply, end = row
    scripted.script["reply"] = reply
    got = scripted.request("POST", "/v1/messages", {**HI, "model": "b-x"})
    check_events(got.events)
    assert joined(got.events)[0] == ("start", "tool_use", "Write")
    assert joined(got.events)[-1] == end
    whole = scripted.request("POST", "/v1/messages", {**HI, "model": "b-x", "stream": False})
    if end[0] == "end":
        assert whole.json["content"][0]["input"] == {}
        assert whole.json["stop_reason"] == end[1]
    else:
        assert whole.status >= 500


# ---- when verbatim is used

def rendered(request):
    return bool(request.body and request.body.get("_debug_render_only"))


class Faulty(MockOllama):
    """A mock that answers a step of its own choice otherwise: fault(request) gives a reply."""

    def __init__(self, fault, *args, **settings):
        self.fault = fault
        super().__init__(*args, **settings)

    def _generation(self, answer, request):
        reply = self.fault(request)
        if reply is None:
            super()._generation(answer, request)
            return
        asked = self._check(request)
        Turn(self, answer, asked, Fit("", 1, None)).serve(as_reply(reply))


def is_probe(request):
    return rendered(request) and b"probe question" in request.raw


def at_render(reply):
    return lambda request: reply if rendered(request) and not is_probe(request) else None


def at_generate(reply):
    return lambda request: reply if request.body.get("prompt") else None


def send_hi(shim, stream=True, **fields):
    return shim.request("POST", "/v1/messages", {**HI, "stream": stream, **fields})


FALLBACKS = {
    # name: what the render step answers, remembered
    "404": (status(404, "404 page not found"), True),
    "405": (status(405, "405 method not allowed"), True),
    "400": (status(400, {"error": "unknown field _debug_render_only"}), True),
    "field gone": (status(200, {"model": "b-x", "message": {"content": ""}, "done": True}), True),
    "field renamed": (status(200, {"_debug": {"prompt": "x"}}), True),
    "field of another type": (status(200, {"_debug_info": {"rendered_template": ["x"]}}), True),
    "empty prompt": (status(200, {"_debug_info": {"rendered_template": ""}}), True),
    "null": (status(200, None), True),
    "not JSON": (status(200, "<html>"), True),
    "a stream": (model_text("Hello there"), True),
    "cut": (raw('{"_debug_info": {"rend') + cut(), None),
    "reset": (reset(), False),
    "500": (status(500, {"error": "template: :1:2: boom"}), False),
    "busy": (status(503, {"error": "server busy"}), False),
    "rate": (status(429, {"error": "slow down"}), False),
    "denied": (status(401, {"error": "unauthorized"}), False),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_where_rendering_fails_chat_serves_in_the_same_request(name, capfd):
    reply, remembered = FALLBACKS[name]
    with Faulty(at_render(reply), [text("served")], model="b-x") as mock, \
            running_shim(mock.url, model="b-x", num_ctx="16384", log="warn") as shim:
        for _ in range(3):
            got = send_hi(shim)
            assert (got.status, joined(got.events)[1]) == (200, ("text_delta", "served"))
    assert ways(mock) == ["/api/chat"] * 3
    tries = sum(rendered(r) and not is_probe(r) for r in mock.requests)
    if remembered is not None:
        assert tries == (1 if remembered else 3)
        assert logged(capfd, "verbatim is off for b-x") == int(remembered)


LASTING = {
    # name: what the render step answers, status, words: as on chat
    "model gone": (status(404, {"error": "model 'b-x' not found"}), 400, "ollama pull b-x"),
    "overflow": (status(400, {"error": "the input length exceeds the context length"}), 400,
                 "prompt is too long"),
    "silent": (hang(), 504, "timed out"),
}


@pytest.mark.parametrize("name", LASTING)
@pytest.mark.parametrize("stream", [True, False])
def test_what_chat_would_meet_as_well_is_told_at_once(name, stream):
    reply, code, words = LASTING[name]
    with Faulty(at_render(reply), [text("served")], model="b-x") as mock, \
            running_shim(mock.url, model="b-x", num_ctx="16384",
                         first_token_timeout_ms="400") as shim:
        got = send_hi(shim, stream)
    assert got.status == code
    assert words in got.error[1]
    assert mock.turns == []


def test_a_refusal_of_tools_or_thinking_is_learned_and_verbatim_goes_on():
    def fault(request):
        if rendered(request) and not is_probe(request) and request.body.get("tools"):
            return status(400, {"error": "registry.ollama.ai/library/a-x:latest does not support"
                                         " tools"})
        return None

    with Faulty(fault, [text("served")], model="a-x") as mock, \
            running_shim(mock.url, model="a-x", num_ctx="16384") as shim:
        assert joined(send_hi(shim).events)[1] == ("text_delta", "served")
    assert ways(mock) == ["/api/generate"]
    assert '"name": "Read"' in mock.turns[0].prompt, "the tools went into the system text"


GENERATE_FAULTS = {
    # name: what the generate step answers, status (or None: a begun stream), type
    "404": (status(404, "404 page not found"), 502, "api_error"),
    "500": (status(500, {"error": "model runner has unexpectedly stopped"}), 500, "api_error"),
    "503": (status(503, {"error": "server busy"}), 529, "overloaded_error"),
    "overflow": (status(400, {"error": "the input length exceeds the context length"}), 400,
                 "invalid_request_error"),
    "reset": (reset(), 502, "api_error"),
    "silent": (hang(), 504, "timeout_error"),
    "nothing": (raw("") + cut(True), 502, "api_error"),
    "garbage": (raw("<html>\n") + cut(True), None, "api_error"),
    "cut": (text("one two") + cut(), None, "api_error"),
    "ended without a done line": (text("one two") + cut(True), None, "api_error"),
    "an error line": (text("one two") + error_line("boom"), None, "api_error"),
    "garbage within": (text("one two") + raw("<html>\n") + done(), None, "api_error"),
    "silent within": (text("one two") + hang(), None, "timeout_error"),
}


@pytest.mark.parametrize("name", GENERATE_FAULTS)
@pytest.mark.parametrize("way", ["on", "off"])
def test_faults_of_generation_are_told_as_on_chat(name, way):
    reply, code, kind = GENERATE_FAULTS[name]
    model = Model("b-x")
    with MockOllama([reply], model=model) as mock, \
            running_shim(mock.url, model="b-x", num_ctx="16384", verbatim=way,
                         first_token_timeout_ms="300", timeout_ms="300") as shim:
        got = send_hi(shim)
        assert mock.turns[0].path == ("/api/generate" if way == "on" else "/api/chat")
    if code:
        assert (got.status, got.error[0]) == (code, kind)
    else:
        assert got.status == 200
        check_events(got.events)
        assert joined(got.events)[-1] == ("error", kind)


@pytest.mark.parametrize("step", ["render", "generate, reading", "generate, writing"])
def test_a_client_that_leaves_cancels_what_ollama_does(step):
    begin = threading.Event()
    reply = {"render": hold(begin), "generate, reading": hold(begin),
             "generate, writing": text("one ") + hold(begin)}[step]
    fault = at_render(reply) if step == "render" else at_generate(reply)
    with Faulty(fault, [text("served")], model="b-x") as mock, \
            running_shim(mock.url, model="b-x", num_ctx="16384") as shim:
        data = json.dumps(HI).encode()
        with socket.create_connection(("127.0.0.1", shim.port), 5) as sock:
            sock.sendall(b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
                         b"application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(data), data))
            wanted = rendered if step == "render" else lambda r: r.body.get("prompt")
            found = []
            wait_until(lambda: found.extend(r for r in mock.requests if r.body and wanted(r)
                                            and not is_probe(r)) or found)
            if step.endswith("writing"):
                got = b""
                while b"one" not in got:
                    got += sock.recv(65536)
        assert found[0].closed_by_client.wait(3.0)
        begin.set()


SEES = Model("b-vision", capabilities=("completion", "tools", "vision"))
SCHEMA = {"format": {"type": "json_schema", "schema": {"type": "object"}}}
THINK = {"type": "enabled", "budget_tokens": 1024}


def test_verbatim_is_for_text_of_new_local_chatml_models():
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png",
                                         "data": "iVBORw0KGgo="}}
    picture = [{"role": "user", "content": [image, {"type": "text", "text": "what is it?"}]}]
    rows = [
        # settings of the mock, of the shim, body, way
        ({}, {}, {}, "/api/generate"),
        ({"version": "0.24.0"}, {}, {}, "/api/generate"),
        ({"version": "0.0.0"}, {}, {}, "/api/generate"),
        ({"version": "1.2.3"}, {}, {}, "/api/generate"),
        ({"version": "0.23.9"}, {}, {}, "/api/chat"),
        ({"version": "0.23.9"}, {"verbatim": "on"}, {}, "/api/generate"),
        ({}, {"verbatim": "off"}, {}, "/api/chat"),
        ({"model": SEES}, {}, {"messages": picture}, "/api/chat"),
        ({}, {}, {"messages": picture}, "/api/generate"),  # left out, and said so
        ({"model": "q3-x"}, {}, {"output_config": SCHEMA}, "/api/generate"),
        ({"model": "q3-x"}, {}, {"output_config": SCHEMA, "thinking": THINK}, "/api/chat"),
        ({"model": "plain:latest"}, {}, {}, "/api/chat"),
        ({"model": "plain:latest"}, {"verbatim": "on"}, {}, "/api/chat"),
    ]
    for settings, flags, body, way in rows:
        with MockOllama([text("ok")], **{"model": "b-x", **settings}) as mock, \
                running_shim(mock.url, **{"model": mock.model, "num_ctx": "16384", **flags}) as shim:
            got = send_hi(shim, **body)
            assert (got.status, ways(mock)) == (200, [way]), (settings, flags, got.data)


def test_remote_models_and_strange_versions_stay_on_chat():
    class Remote(MockOllama):
        def _show(self, answer, request):
            answer.json(200, {"modelfile": "FROM x", "template": "{{ .Prompt }}",
                              "remote_host": "https://ollama.com", "capabilities": ["tools"]})

    with Remote([text("ok")], model="b-x") as mock, \
            running_shim(mock.url, model="b-x", num_ctx="16384", verbatim="on") as shim:
        assert send_hi(shim).status == 200
    assert ways(mock) == ["/api/chat"]


def test_two_models_without_a_digest_are_not_taken_for_one():
    class Bare(Faulty):
        def _show(self, answer, request):
            answer.json(200, {"modelfile": "", "template": "<|im_start|>{{ .Prompt }}",
                              "capabilities": ["completion", "tools"]})

    def fault(request):
        if rendered(request) and not is_probe(request) and request.body["model"] == "b-one":
            return status(404, "404 page not found")
        return None

    with Bare(fault, [text("ok")], models=["b-one", "b-two"]) as mock, \
            running_shim(mock.url, use_requested_model="on", num_ctx="16384") as shim:
        for name in ("b-one", "b-two", "b-one"):
            assert send_hi(shim, model=name).status == 200
    assert ways(mock) == ["/api/chat", "/api/generate", "/api/chat"]


def test_ollama_that_cannot_render_only_is_asked_for_one_token():
    """Before 0.11.5 the field was unknown: the probe generates, and must not do so for long."""
    with Faulty(lambda request: model_text("ok") if rendered(request) else None,
                [text("served")], model="b-x", version="0.9.0") as mock, \
            running_shim(mock.url, model="b-x", num_ctx="16384") as shim:
        assert joined(send_hi(shim).events)[1] == ("text_delta", "served")
    (probe,) = [r for r in mock.requests if rendered(r)]
    assert probe.body["options"] == {"num_ctx": 16384, "num_predict": 1}
    assert ways(mock) == ["/api/chat"]


def test_both_steps_ask_for_the_same_model_in_the_same_way():
    with MockOllama([text("ok")], model="q3-x") as mock, \
            running_shim(mock.url, model="q3-x", num_ctx="16384", keep_alive="1h") as shim:
        send_hi(shim, temperature=0.5, top_k=7, stop_sequences=["X"], max_tokens=99)
    render, generate = (r.body for r in mock.requests if r.body and not is_probe(r)
                        and (rendered(r) or "prompt" in r.body) and r.body.get("stream"))
    assert generate["raw"] is True
    assert generate["think"] is False
    assert {key: render[key] for key in ("options", "keep_alive", "truncate", "shift", "model")} \
        == {key: generate[key] for key in ("options", "keep_alive", "truncate", "shift", "model")}
    assert generate["options"] == {"num_ctx": 16384, "num_predict": 99, "temperature": 0.5,
                                   "top_k": 7}
    assert generate["prompt"] == mock.turns[0].prompt
    assert generate["keep_alive"] == "1h"


def test_a_call_comes_back_in_its_own_words():
    """A raw answer with text, call and odd spaces is sent back as it was, on every path."""
    for name in MODELS.values():
        write = xml if name.startswith("a") else hermes
        wrote = "Now.   \n" + write("Read", file_path="/a")
        with MockOllama([wrote, "ok"], model=name) as mock, \
                running_shim(mock.url, model=name, num_ctx="16384") as shim:
            talk = Conversation(shim)
            talk.say("go")
            talk.results("one")
        assert wrote in mock.turns[1].prompt, name


# ---- joined requests and warming

@pytest.mark.parametrize("step", ["render", "generate"])
def test_who_joined_gets_the_whole_stream_when_the_first_leaves(step):
    begin = threading.Event()
    fault = (lambda request: hold_once(request)) if step == "render" else lambda request: None
    held = []

    def hold_once(request):
        if rendered(request) and not is_probe(request) and not held:
            held.append(begin.wait(5.0))
        return None

    def reply(request):
        if step == "generate":
            begin.wait(5.0)
        return model_text("Hello to both.")

    headers = {"x-claude-code-session-id": "s"}
    with Faulty(fault, reply, model="b-x") as mock, \
            running_shim(mock.url, model="b-x", num_ctx="16384") as shim:
        data = json.dumps(HI).encode()
        sock = socket.create_connection(("127.0.0.1", shim.port), 5)
        sock.sendall(b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/"
                     b"json\r\nx-claude-code-session-id: s\r\nContent-Length: %d\r\n\r\n%b"
                     % (len(data), data))
        wait_until(lambda: any(r.body and not is_probe(r) and (rendered(r) or "prompt" in r.body)
                               for r in mock.requests if r.path != "/api/show"))
        answers = []
        second = threading.Thread(target=lambda: answers.append(
            shim.request("POST", "/v1/messages", data, headers)))
        second.start()
        wait_until(lambda: any(
            one.audience.listeners for one in list(shim.server._joints.values())))
        sock.close()
        begin.set()
        second.join(5.0)
    check_events(answers[0].events)
    assert joined(answers[0].events)[1] == ("text_delta", "Hello to both.")
    assert len(mock.turns) == 1


@pytest.mark.parametrize("way", ["on", "off"])
def test_a_knock_reads_the_last_sessions_prefix(way):
    with MockOllama([text("ok")], model="b-x") as mock, \
            running_shim(mock.url, model="b-x", num_ctx="16384", warm="on", verbatim=way) as shim:
        assert shim.request("HEAD", "/").status == 200
        talk = Conversation(shim)
        talk.say("What is new?", system="a reminder")
        turn = mock.turns[-1]
        mock.slot.forget("registry.ollama.ai/library/b-x:latest")
        wait_until(lambda: not shim.server.gate.load[0])
        assert shim.request("HEAD", "/").status == 200
        warmed = mock.wait_for(2)
        assert warmed.path == turn.path
        assert warmed.body["options"] == {"num_ctx": 16384, "num_predict": 1}
        assert "What is new?" not in warmed.prompt
        kept = turn.prompt[:turn.prompt.index("<|im_start|>user\n")]
        assert warmed.prompt.startswith(kept)
        assert len(kept) > 500


def test_a_request_cancels_the_warming():
    begin = threading.Event()

    def reply(request):
        warming = request.body["options"].get("num_predict") == 1
        return hold(begin) if warming else model_text("ok")

    with MockOllama(reply, model="b-x", parallel=1) as mock, \
            running_shim(mock.url, model="b-x", num_ctx="16384", warm="on") as shim:
        talk = Conversation(shim)
        talk.say("one")
        wait_until(lambda: not shim.server.gate.load[0])
        shim.request("HEAD", "/")
        warmed = mock.wait_for(2)
        answer = threading.Thread(target=talk.say, args=("two",))
        answer.start()
        assert warmed.closed_by_client.wait(3.0)
        begin.set()
        answer.join(5.0)
        assert talk.answer["content"][0]["text"] == "ok"


def test_a_knock_loads_a_model_that_was_unloaded():
    with MockOllama([text("ok")], model="b-x") as mock, \
            running_shim(mock.url, model="b-x", num_ctx="16384", warm="on") as shim:
        plain = {key: value for key, value in HI.items() if key != "tools"}
        assert shim.request("POST", "/v1/messages", plain).status == 200
        wait_until(lambda: not shim.server.gate.load[0])
        mock._unload(mock.models[0])
        assert shim.request("HEAD", "/").status == 200
        wait_until(lambda: len(mock.loads) == 2)
        assert mock.loads[0] == mock.loads[1]
        assert len(mock.turns) == 1


def test_without_warming_a_knock_asks_nothing():
    with MockOllama([text("ok")], model="b-x") as mock, \
            running_shim(mock.url, model="b-x", warm="off") as shim:
        shim.request("HEAD", "/")
    assert mock.requests == []

