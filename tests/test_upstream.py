"""Section 15 against an upstream that misbehaves on the wire, byte by byte."""
import gzip
import itertools
import json
import socket
import threading
import time

import pytest
from helpers import chat_line, check_events, joined, running_shim
from mock_ollama import MockOllama, StoppedError, cut, error_line, hang, raw, status, text

import qwencode

both_ways = pytest.mark.usefixtures("relayed")
MODEL = "qwen2.5-coder:14b"
SILENCE_MS = "300"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
PLAIN = b"HTTP/1.1 200 OK\r\n\r\n"
DONE = chat_line("", done=True, done_reason="stop", prompt_eval_count=9, eval_count=3)
GOOD = chat_line("Hel") + chat_line("lo") + DONE


def chunk(data):
    return b"%x\r\n%b\r\n" % (len(data), data)


def sized(data, length=None, head=b"HTTP/1.1 200 OK\r\n"):
    return head + b"Content-Length: %d\r\n\r\n" % (length or len(data)) + data


def saying(*steps):
    """Make a route that sends bytes as they are, then closes, resets or waits."""

    def route(answer, request):
        for step in steps:
            if step == "reset":
                answer.connection.reset()
            elif step == "hang":
                answer.connection.wait(60)
            elif step == "flood":
                while True:
                    answer.connection.send(b"HTTP/1.1 102 Processing\r\n\r\n" * 100)
                    answer.connection.wait()
            else:
                for data in step if isinstance(step, list) else [step]:
                    answer.connection.send(data)
                    answer.connection.wait()
        raise StoppedError

    return route


def is_turn(request):
    """Tell the turn itself from what the shim asks on its own account."""
    body = request.body
    return "_debug_render_only" not in body and bool(body.get("messages") or body.get("prompt"))


def for_turns(mock, fault, turns=True):
    """Let the fault answer the model's turns only (or, turns=False, all but these)."""
    for key in (("POST", "/api/chat"), ("POST", "/api/generate")):
        usual = mock.routes[key]
        mock.routes[key] = lambda answer, request, usual=usual: (
            fault if is_turn(request) == turns else usual)(answer, request)


def bytewise(data):
    return [data[i:i + 1] for i in range(len(data))]


# ---- answers that are unusual but whole ----

WHOLE = {
    "chunked": [CHUNKED + chunk(GOOD) + b"0\r\n\r\n"],
    "until the close": [PLAIN + GOOD],
    "by length": [sized(GOOD)],
    "byte by byte": [bytewise(CHUNKED + chunk(chat_line("Hel")) + chunk(chat_line("lo") + DONE))],
    "chunks across lines": [CHUNKED, b"".join(chunk(GOOD[i:i + 7])
                                              for i in range(0, len(GOOD), 7)) + b"0\r\n\r\n"],
    "without the last line end": [PLAIN + GOOD.rstrip()],
    "carriage returns and empty lines": [PLAIN + b"\r\n\n" + GOOD.replace(b"\n", b"\r\n")],
    "1xx before it": [b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nLink: x\r\n\r\n"
                      + sized(GOOD)],
    "length too long": [sized(GOOD, 9999)],
    "reset after done": [PLAIN + GOOD, "reset"],
    "silent after done": [CHUNKED + chunk(GOOD), "hang"],
    "chunk sizes padded": [CHUNKED + b"%06X;a=b\r\n" % len(GOOD) + GOOD + b"\r\n0\r\n\r\n"],
}


@both_ways
@pytest.mark.parametrize("way", ["off", "on"])
@pytest.mark.parametrize("name", WHOLE)
def test_whole_answers_however_they_are_framed(name, way):
    with MockOllama([], model=MODEL) as mock, running_shim(mock.url, verbatim=way) as shim:
        for_turns(mock, saying(*WHOLE[name]))
        events = shim.messages().events
        check_events(events)
        assert joined(events) == [("start", "text"), ("text_delta", "Hello"), ("stop",),
                                  ("end", "end_turn")]


@both_ways
def test_characters_and_escapes_cut_anywhere():
    words = "ä€😀 \"\\\n\u2028 \\u00e9 </div>"
    line = json.dumps({"message": {"content": words}, "done": False}, ensure_ascii=False).encode()
    escaped = json.dumps({"message": {"content": words}, "done": False}).encode()
    data = line + b"\n" + escaped + b"\n" + DONE
    with MockOllama([], model=MODEL) as mock, running_shim(mock.url, verbatim="off") as shim:
        for_turns(mock, saying(PLAIN, bytewise(data)))
        assert joined(shim.messages().events)[1] == ("text_delta", words * 2)


# ---- answers that break: nothing is shown twice, no text is lost, the cause is told ----

HEL = chat_line("Hel")
BROKEN = {  # steps -> text that had arrived, status before any text, words of the error
    "refuses to speak": ([], "", 502, "closed the connection without an answer"),
    "reset at once": (["reset"], "", 502, "connection to Ollama broke"),
    "half a header": ([b"HTTP/1.1 200 O"], "", 502, "broke off within its headers"),
    "not HTTP": ([b"SSH-2.0-OpenSSH_9.6\r\n\r\n"], "", 502, "does not speak HTTP"),
    "status beyond 599": ([b"HTTP/1.1 799 No\r\n\r\n"], "", 502, "does not speak HTTP"),
    "endless headers": ([b"HTTP/1.1 200 OK\r\n", [b"X-A: %s\r\n" % (b"b" * 900)] * 80, "hang"],
                        "", 502, "endless headers"),
    "endless 1xx": (["flood"], "", 502, "endless headers"),
    "silent before headers": (["hang"], "", 504, "timed out"),
    "silent after headers": ([CHUNKED, "hang"], "", 504, "timed out"),
    "empty body": ([sized(b"")], "", 502, "without a word"),
    "compressed": ([sized(gzip.compress(GOOD), head=b"HTTP/1.1 200 OK\r\n"
                          b"Content-Encoding: gzip\r\n")], "", 502, "compressed"),
    "bad chunk size": ([CHUNKED + b"xyz\r\n" + GOOD], "", 502, "framed wrongly"),
    "chunk longer than said": ([CHUNKED + b"5\r\n" + GOOD], "", 502, "framed wrongly"),
    "endless trailers": ([CHUNKED + chunk(HEL) + b"0\r\n" + b"A: b\r\n" * 200, "hang"],
                         "", 502, "framed wrongly"),
    "ended without a done line": ([CHUNKED + chunk(HEL), b"0\r\n\r\n", "hang"], "Hel", 0,
                                  "broke off"),
    "cut after text": ([PLAIN + HEL], "Hel", 0, "broke off"),
    "reset after text": ([PLAIN + HEL, "reset"], "Hel", 0, "broke"),
    "silent after text": ([CHUNKED + chunk(HEL), "hang"], "Hel", 0, "timed out"),
    "length too short": ([sized(GOOD, len(HEL) + 20)], "Hel", 0, "broke off"),
    "last line cut": ([PLAIN + HEL + DONE[:30]], "Hel", 0, "broke off"),
    "last line cut, with line end": ([PLAIN + HEL + DONE[:30] + b"\n"], "Hel", 0,
                                     "streaming response"),
    "garbage between": ([PLAIN + HEL + b"<html>\n" + chat_line("lo") + DONE], "Hel", 0,
                        "streaming response"),
    "not UTF-8 between": ([PLAIN + HEL + b"\xff\xfe\n" + chat_line("lo") + DONE], "Hel", 0,
                          "not UTF-8"),
    "NaN between": ([PLAIN + HEL + b'{"message":NaN}\n' + DONE], "Hel", 0, "streaming response"),
    "bad chunk later": ([CHUNKED + chunk(HEL), b"zz\r\n"], "Hel", 0, "framed wrongly"),
    "error line": ([PLAIN + HEL + b'{"error":"boom"}\n' + DONE], "Hel", 0, "boom"),
    "error object": ([PLAIN + HEL + b'{"error":{"message":"boom","n":1e999}}\n'], "Hel", 0,
                     "streaming response"),
    "error of another type": ([PLAIN + HEL + b'{"error":[null,7]}\n'], "Hel", 0, "Ollama failed"),
    "top level no object": ([PLAIN + HEL + b"[1,2]\n" + DONE], "Hel", 0, "streaming response"),
}


def arrived(events):
    return "".join(event.payload["delta"].get("text", "") for event in events
                   if event.name == "content_block_delta")


@both_ways
@pytest.mark.parametrize("name", BROKEN)
def test_broken_answers_are_told(name):
    steps, shown, code, words = BROKEN[name]
    with MockOllama([], model=MODEL) as mock, \
            running_shim(mock.url, timeout_ms=SILENCE_MS) as shim:
        for_turns(mock, saying(*steps))
        begun = time.monotonic()
        answer = shim.messages()
        assert time.monotonic() - begun < 3.0
        if answer.status == 200:
            check_events(answer.events)
            assert arrived(answer.events) == shown
            assert answer.events[-1].name == "error"
            message = answer.events[-1].payload["error"]["message"]
        else:
            assert (shown, answer.status) == ("", code)
            message = answer.error[1]
        assert words in message
        assert "Errno" not in message
        assert "internal" not in shim.server.stats.counters["requests"]
        assert shim.request("GET", "/health").json["ok"]


@both_ways
def test_a_line_beyond_the_cap_is_told(monkeypatch):
    monkeypatch.setattr(qwencode, "MAX_LINE_BYTES", 300_000)
    long = text("Hel", pieces=1) + raw(chat_line("x" * 400_000))
    with MockOllama([long], model=MODEL) as mock, running_shim(mock.url) as shim:
        events = shim.messages().events
        assert joined(events)[1] == ("text_delta", "Hel")
        assert "a line of more than 300000 bytes" in events[-1].payload["error"]["message"]


STATUSES = (201, 204, 206, 301, 302, 307, 304, 400, 401, 402, 403, 404, 405, 406, 408, 409, 413,
            418, 422, 429, 500, 501, 502, 503, 504, 507, 520, 529, 599)
TOLD_AS = {400: 400, 402: 400, 406: 400, 409: 400, 418: 400, 422: 400, 408: 504, 413: 413,
           429: 429, 500: 500, 503: 529, 504: 504, 529: 529}


@pytest.mark.parametrize("body", [{"error": "the words"}, "the words", None])
def test_every_status_is_told(body):
    codes = iter(STATUSES)
    with MockOllama(lambda request: status(next(codes), body), model=MODEL) as mock, \
            running_shim(mock.url, verbatim="off") as shim:
        for stream, code in zip(itertools.cycle((True, False)), STATUSES):
            answer = shim.messages(stream=stream)
            assert (code, answer.status) == (code, TOLD_AS.get(code, 502))
            assert answer.error[1]
            if body and code not in (204, 304):
                assert "the words" in answer.error[1]


# ---- wrong types in every field of every line ----

LINES = (
    {"model": "m", "message": {"role": "assistant", "content": "Hi", "thinking": "hm",
                               "tool_calls": [{"id": "1", "function": {
                                   "index": 0, "name": "Bash", "arguments": {"command": "ls"}}}]},
     "response": "Hi", "thinking": "hm", "done": False},
    {"model": "m", "message": {"role": "assistant", "content": ""}, "response": "", "done": True,
     "done_reason": "stop", "total_duration": 1, "load_duration": 1, "prompt_eval_count": 1,
     "prompt_eval_duration": 1, "eval_count": 1, "eval_duration": 1},
)
ODD = ("null", "true", "0", "-1", "1.5", '"x"', '""', "[]", "{}", "[1]", '{"a":[]}', "1e999",
       "9" * 400, "9" * 5000, '"\\ud800"', "[" * 90 + "]" * 90, '{"a":' * 500 + "1" + "}" * 500)
ODD_BASH = {"name": "Bash", "description": "b", "input_schema": {
    "type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}}


def fields_of(value, path=()):
    """List the paths of all fields within a value."""
    if path:
        yield path
    for key, item in (value.items() if isinstance(value, dict) else
                      enumerate(value) if isinstance(value, list) else ()):
        yield from fields_of(item, (*path, key))


def with_odd(value, path, odd):
    """Write value as JSON with the field at path replaced by odd, which is JSON text."""
    copy = json.loads(json.dumps(value))
    holder = copy
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = "@@"
    return json.dumps(copy).replace('"@@"', odd)


@pytest.mark.parametrize("way", ["off", "on"])
def test_wrong_types_in_every_field_of_every_line(way):
    cases = [(at, path, odd) for at, line in enumerate(LINES) for path in fields_of(line)
             for odd in ODD]
    with MockOllama([], model=MODEL) as mock, running_shim(mock.url, verbatim=way) as shim:
        for at, path, odd in cases[::3]:
            lines = [json.dumps(line) for line in LINES]
            lines[at] = with_odd(LINES[at], path, odd)
            mock.replies = [raw("\n".join(lines) + "\n") + cut(clean=True)]
            answer = shim.messages(tools=[ODD_BASH])
            assert answer.status in (200, 502, 500, 400), (at, path, odd)
            if answer.status == 200:
                check_events(answer.events)
        assert "internal" not in shim.server.stats.counters["requests"]


# ---- the shim's own questions ----

QUESTIONS = {"show": ("POST", "/api/show"), "ps": ("GET", "/api/ps"),
             "version": ("GET", "/api/version"), "render and load": None}
OWN_FAULTS = {
    "reset": ["reset"], "closed": [], "500": [sized(b'{"error":"no"}', head=b"HTTP/1.1 500 E\r\n")],
    "503 text": [sized(b"busy", head=b"HTTP/1.1 503 E\r\n")],
    "404 text": [sized(b"404 page not found", head=b"HTTP/1.1 404 E\r\n")],
    "302": [b"HTTP/1.1 302 F\r\nLocation: http://x/\r\n\r\n"], "empty": [sized(b"")],
    "garbage": [sized(b"<html>")], "not UTF-8": [sized(b"\xff\xfe")], "list": [sized(b"[]")],
    "cut": [sized(b'{"version"', 999)], "deep": [sized(b"[" * 100_000)],
    "endless headers": [b"HTTP/1.1 200 OK\r\n", [b"X: %s\r\n" % (b"b" * 900)] * 80, "hang"],
    "bad chunk": [CHUNKED + b"zz\r\n"], "flood": ["flood"], "silent": ["hang"],
    "silent within": [CHUNKED + chunk(b"{"), "hang"],
}


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("name", OWN_FAULTS)
def test_a_question_of_our_own_that_fails_breaks_no_turn(question, name, monkeypatch):
    monkeypatch.setattr(qwencode, "HEALTH_S", 0.1)
    with MockOllama([text("Hello")], model=MODEL) as mock, \
            running_shim(mock.url, timeout_ms=SILENCE_MS, verbatim="on") as shim:
        fault = saying(*OWN_FAULTS[name])
        if QUESTIONS[question]:
            mock.routes[QUESTIONS[question]] = fault
        else:
            for_turns(mock, fault, turns=False)
        begun = time.monotonic()
        assert joined(shim.messages().events)[1] == ("text_delta", "Hello")
        assert time.monotonic() - begun < 2.0
        assert shim.request("GET", "/health").status == 200
        assert shim.request("GET", "/v1/models").status == 200
        assert shim.request("GET", "/status").status == 200


def test_an_upstream_that_answers_nothing_is_told_within_twice_the_timeout():
    with socket.create_server(("127.0.0.1", 0)) as silent, \
            running_shim(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_ms="300") as shim:
        begun = time.monotonic()
        assert shim.messages().error[0] == "timeout_error"
        assert time.monotonic() - begun < 1.3
        begun = time.monotonic()
        assert shim.request("GET", "/health").json["ok"] is False
        assert time.monotonic() - begun < 1.2


def test_a_server_that_begins_no_tls_holds_up_nobody():
    with socket.create_server(("127.0.0.1", 0)) as silent, running_shim(
            f"https://127.0.0.1:{silent.getsockname()[1]}", timeout_ms="500") as shim:
        begun = time.monotonic()
        assert shim.request("GET", "/health").json["ok"] is False
        assert time.monotonic() - begun < 1.2
        begun = time.monotonic()
        assert "TLS failed (no answer in time)" in shim.messages().error[1]
        assert time.monotonic() - begun < 1.5


SHOW = {"modelfile": "FROM /x/sha256-" + "a" * 64, "template": "{{ .Messages }}{{ .Tools }}",
        "parameters": "num_ctx 32768", "capabilities": ["completion", "tools"],
        "model_info": {"general.architecture": "qwen2", "qwen2.context_length": 32768,
                       "qwen2.block_count": 48, "qwen2.embedding_length": 5120},
        "remote_model": "", "details": {"family": "qwen2"}}
PS = {"models": [{"name": MODEL, "model": MODEL, "size": 10, "size_vram": 10, "digest": "d",
                  "context_length": 32768}]}


@pytest.mark.parametrize(("question", "usual"), [
    ("show", SHOW), ("ps", PS), ("version", {"version": "0.33.0"})])
def test_wrong_types_in_what_ollama_tells_of_itself(question, usual):
    cases = [(path, odd) for path in fields_of(usual) for odd in ODD]
    with MockOllama([text("Hello")], model=MODEL) as mock, \
            running_shim(mock.url, verbatim="auto") as shim:
        for path, odd in cases[::3]:
            mock.routes[QUESTIONS[question]] = saying(sized(with_odd(usual, path, odd).encode()))
            shim.server.registry.forget(MODEL)
            shim.server.registry._version = (0.0, "")
            answer = shim.messages(stream=False)
            assert (path, odd, answer.status) == (path, odd, 200)
            assert shim.request("GET", "/health").status == 200
            assert shim.request("GET", "/v1/models").status == 200
        assert "internal" not in shim.server.stats.counters["requests"]


@pytest.mark.parametrize("odd", ODD)
def test_wrong_types_in_the_list_of_models(odd):
    usual = {"models": [{"name": "a"}, {"name": "b"}]}
    with MockOllama([text("Hello")], model=MODEL) as mock, running_shim(mock.url) as shim:
        for path in fields_of(usual):
            mock.routes["GET", "/api/tags"] = saying(sized(with_odd(usual, path, odd).encode()))
            answer = shim.request("GET", "/v1/models")
            assert answer.status == 200
            assert answer.json["data"][0]["id"] == MODEL


def test_error_lines_first_keep_their_words():
    with MockOllama([error_line("llama runner process has terminated")], model=MODEL) as mock, \
            running_shim(mock.url) as shim:
        answer = shim.messages()
        assert answer.status == 500
        assert "process has terminated" in answer.error[1]
        assert answer.headers["x-should-retry"] == "false"


def test_a_slow_resolver_holds_up_nobody(monkeypatch):
    go = threading.Event()
    usual = socket.getaddrinfo

    def slow(host, *rest, **options):
        if host == b"ollama.example":
            go.wait(10)
        return usual(host, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    with running_shim("http://ollama.example:1", timeout_ms="300") as shim:
        begun = time.monotonic()
        assert shim.request("GET", "/health").json["ok"] is False
        assert time.monotonic() - begun < 1.5
        begun = time.monotonic()
        assert "takes too long" in shim.messages().error[1]
        assert time.monotonic() - begun < 1.5
        go.set()


@both_ways
def test_one_broken_upstream_call_leaves_the_others_alone():
    replies = iter([text("Hel") + hang(), text("Hello")])
    with MockOllama(lambda request: next(replies), model=MODEL) as mock, \
            running_shim(mock.url) as shim, \
            socket.create_connection(("127.0.0.1", shim.port), 5) as slow:
        body = json.dumps({"model": "m", "max_tokens": 9, "stream": True,
                           "messages": [{"role": "user", "content": "hi"}]}).encode()
        slow.sendall(b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
                     % len(body) + body)
        mock.wait_for(1)
        assert joined(shim.messages().events)[1] == ("text_delta", "Hello")
