"""Section 16 against raw sockets and polite clients: routes, guards, faults, ends."""
import contextlib
import errno
import gc
import json
import os
import re
import select
import socket
import struct
import sys
import threading
import time

import pytest
from helpers import (
    BASH,
    READ,
    WRITE,
    chat_line,
    check_events,
    is_keep_alive,
    joined,
    read_sse,
    running_shim,
    tool,
    wait_until,
)
from mock_ollama import (
    MockOllama,
    Model,
    call,
    cut,
    delay,
    done,
    end,
    error_line,
    hang,
    hold,
    model_text,
    raw,
    reset,
    status,
    text,
    thinking,
)

import qwencode

both_ways = pytest.mark.usefixtures("relayed")
MODEL = "qwen2.5-coder:14b"
GONE_S = 3.0  # the promise is one second; the machine may be busy


@pytest.fixture(scope="module")
def quiet():
    """A shim whose Ollama only ever says ok, for what never reaches it."""
    with MockOllama([text("ok")], model=MODEL) as mock, running_shim(mock.url) as shim:
        shim.mock = mock
        yield shim


def exchange(port, data, more=b"", timeout=5.0):
    """Send raw bytes, return everything that comes until the close or a pause."""
    with socket.create_connection(("127.0.0.1", port), timeout) as sock:
        sock.sendall(data)
        if more:
            sock.sendall(more)
        got = b""
        sock.settimeout(timeout)
        while True:
            try:
                piece = sock.recv(65536)
            except socket.timeout:
                return got + b"<open>"
            if not piece:
                return got
            got += piece


def post(body, extra="", path="/v1/messages", host="127.0.0.1", close=True):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    end = "Connection: close\r\n" if close else ""
    return (f"POST {path} HTTP/1.1\r\nHost: {host}\r\n{end}{extra}"
            f"Content-Length: {len(data)}\r\n\r\n").encode() + data


def listening(shim):
    """How many clients hear the answer of a request that was there before theirs."""
    return sum(len(one.audience.listeners) for one in list(shim.server._joints.values()))


HI = {"model": "m", "max_tokens": 50, "messages": [{"role": "user", "content": "hi"}]}
SIMPLE = post(HI)

ROUTES = [
    ("GET", "/", 200), ("HEAD", "/", 200), ("GET", "/health", 200), ("HEAD", "/health", 200),
    ("GET", "/v1/models", 200), ("GET", "/v1/models?limit=1000", 200),
    ("GET", "/v1/models/a:1", 200), ("GET", "/metrics", 200), ("GET", "/status", 200),
    ("POST", "/v1/messages", 200), ("POST", "/v1/messages?beta=true", 200),
    ("POST", "/v1/v1/messages", 200), ("POST", "/some/prefix/v1/messages", 200),
    ("POST", "/v1/messages/count_tokens?beta=true", 200), ("OPTIONS", "/v1/messages", 204),
    ("GET", "/v1/messages", 405), ("DELETE", "/v1/models", 405), ("POST", "/health", 405),
    ("GET", "/nope", 404), ("POST", "/v1/complete", 404), ("GET", "/../etc/passwd", 404),
    ("GET", "/" + "a" * 12_000, 404),
]


@pytest.mark.parametrize(("method", "path", "wanted"), ROUTES)
def test_routes(quiet, method, path, wanted):
    answer = quiet.request(method, path, HI if method == "POST" else None)
    assert answer.status == wanted
    if wanted in (404, 405):
        assert answer.error[0] == {404: "not_found_error", 405: "invalid_request_error"}[wanted]
    if wanted == 405:
        assert "OPTIONS" in answer.headers["Allow"]


BAD_HTTP = {
    "not HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\r\n\r\n", 400),
    "TLS from its first byte": (b"\x16\x03\x01", 400),
    "lower case method": (b"get / HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\n", 400),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two hosts": (b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n", 400),
    "folded header": (b"GET / HTTP/1.1\r\nHost: localhost\r\nA: b\r\n c\r\n\r\n", 400),
    "space before colon": (b"GET / HTTP/1.1\r\nHost : localhost\r\n\r\n", 400),
    "bare line feeds": (b"GET / HTTP/1.1\nHost: localhost\n\n\r\n\r\n", 400),
    "a NUL in a header": (b"GET / HTTP/1.1\r\nHost: localhost\r\nA: \x00\r\n\r\n", 400),
    "long headers": (b"GET / HTTP/1.1\r\nHost: localhost\r\nA: " + b"x" * 70_000 + b"\r\n\r\n", 431),
    "many headers": (b"GET / HTTP/1.1\r\nHost: localhost\r\n"
                     + b"".join(b"A%d: b\r\n" % i for i in range(120)) + b"\r\n", 431),
    "both lengths": (post(HI, "Transfer-Encoding: chunked\r\n"), 400),
    "two lengths": (post(HI, "Content-Length: 5\r\n"), 400),
    "two equal lengths": (b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n"
                          b"Content-Length: 2\r\n\r\n{}", 400),
    "length of words": (b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\n"
                        b"Content-Length: five\r\n\r\n", 400),
    "signed length": (b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\n"
                      b"Content-Length: +5\r\n\r\nhello", 400),
    "list of lengths": (b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\n"
                        b"Content-Length: 5, 5\r\n\r\nhello", 400),
    "unknown coding": (b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\n"
                       b"Transfer-Encoding: gzip, chunked\r\n\r\n", 501),
    "bad chunk": (b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\n"
                  b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n", 400),
    "too large by its header alone": (b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\n"
                                      b"Content-Length: 52428800\r\n\r\n", 413),
    "huge length": (b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: "
                    + b"9" * 40 + b"\r\n\r\n", 400),
}


@pytest.mark.parametrize("name", BAD_HTTP)
def test_bad_http_is_refused_and_the_connection_closed(quiet, name):
    data, wanted = BAD_HTTP[name]
    # What follows must never be taken for a request of its own.
    answer = exchange(quiet.port, data, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 %d " % wanted), answer[:200]
    assert len(re.findall(rb"HTTP/1\.1 [0-9]{3} ", answer)) == 1
    assert b'"type":"error"' in answer


BAD_BODIES = {
    "empty": b"", "not JSON": b"{", "NaN": b'{"messages": NaN}', "not UTF-8": b'{"a": "\xff"}',
    "nested deeply": b"[" * 100_000, "a list": b"[]", "long number": b'{"a": ' + b"1" * 5000 + b"}",
    "UTF-16": '{"messages": []}'.encode("utf-16"),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_bad_bodies_are_400(quiet, name):
    answer = quiet.request("POST", "/v1/messages", BAD_BODIES[name])
    assert (answer.status, answer.error[0]) == (400, "invalid_request_error")


@pytest.mark.parametrize("content", ["\ud800 lone", "word " * 2_000, "\x00\x1b", "a\u2028b"])
def test_odd_texts_work(quiet, content):
    assert quiet.messages(content).status == 200


def test_twenty_thousand_messages_work():
    with MockOllama([text("ok")], model=MODEL) as mock, \
            running_shim(mock.url, num_ctx="1000000") as shim:
        messages = [{"role": "user", "content": "x"}] * 20_000
        assert shim.messages(messages=messages).status in (200, 400)


def test_chunked_bodies_and_pipelined_requests(quiet):
    data = json.dumps(HI).encode()
    chunked = (b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
               b"5\r\n" + data[:5] + b"\r\n%x\r\n" % len(data[5:]) + data[5:] + b"\r\n0\r\n\r\n")
    last = b"GET /v1/models/z HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    answer = exchange(quiet.port, chunked + chunked + last)
    assert answer.count(b"HTTP/1.1 200 OK") == 3
    assert answer.rindex(b'"id":"z"') > answer.rindex(b'"stop_reason"')


@pytest.mark.parametrize(("data", "more", "answers"), [
    (b"\r\n" + SIMPLE, b"", 1), (b"\r\n\r\n" + SIMPLE, b"", 1), (b"\r\n", SIMPLE, 1),
    (post(HI, close=False) + b"\r\n", b"\r\n" + SIMPLE, 2)])
def test_empty_lines_before_a_request_are_passed_over(quiet, data, more, answers):
    answer = exchange(quiet.port, data, more)
    assert answer.count(b"HTTP/1.1 ") == answer.count(b"HTTP/1.1 200 OK") == answers


def test_an_idle_connection_holds_nothing_of_its_last_request(quiet):
    with socket.create_connection(("127.0.0.1", quiet.port), 5) as sock:
        sock.sendall(post(HI, close=False))
        assert b'"stop_reason"' in sock.recv(65536)
        wait_until(lambda: gc.collect() >= 0 and not any(
            type(one) is qwencode.Exchange for one in gc.get_objects()))


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
def test_expect_continue_is_answered_where_it_may_be(quiet, version):
    data = json.dumps(HI).encode()
    with socket.create_connection(("127.0.0.1", quiet.port), 5) as sock:
        sock.sendall(b"POST /v1/messages HTTP/%b\r\nHost: localhost\r\nConnection: close\r\n"
                     b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % (version, len(data)))
        if version == b"1.1":  # the older one knows no such answer (RFC 9110 10.1.1)
            assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        wait_until(lambda: not select.select([sock], [], [], 0.05)[0])  # the head is read by now
        sock.sendall(data)
        assert sock.recv(100).startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/status", "/metrics"])
def test_a_client_that_closes_its_half_reads_its_answer(quiet, path):
    with socket.create_connection(("127.0.0.1", quiet.port), 5) as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(100).startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize(("code", "said", "present", "words"), [
    (404, {"error": "model 'm' not found"}, False, "ollama pull qwen2.5-coder:14b"),
    (500, {"error": "disk full"}, None, "disk full"), (401, "", None, "OLLAMA_AUTH_TOKEN")])
def test_health_says_why_the_model_cannot_be_asked(code, said, present, words):
    with MockOllama(model=MODEL) as mock, running_shim(mock.url) as shim:
        mock.routes["POST", "/api/show"] = lambda answer, _: answer.json(code, said)
        told = shim.request("GET", "/health").json
        assert (told["upstream"]["reachable"], told["model"]["present"], told["status"]) == (
            True, present, "degraded")
        assert words in told["upstream"]["error"]


def test_without_a_log_the_connection_stays(monkeypatch, quiet):
    monkeypatch.setattr(sys, "stderr", None)  # as pythonw has it, or a shell's 2>&-
    assert exchange(quiet.port, post(HI, close=False) + SIMPLE).count(b"HTTP/1.1 200 OK") == 2


@both_ways
def test_http_1_0_gets_its_stream_until_the_close(quiet):
    data = json.dumps({**HI, "stream": True}).encode()
    answer = exchange(quiet.port, b"POST /v1/messages HTTP/1.0\r\nContent-Length: %d\r\n\r\n%b"
                      % (len(data), data))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"chunked" not in head
    check_events(read_sse(body))


FOREIGN = [
    ("Host: evil.com", 403), ("Host: localhost.evil.com", 403), ("Host: 127.0.0.1.evil.com", 403),
    ("Host: 10.0.0.1:8000", 403), ("Host: [::2]", 403), ("Host: local\thost", 403),
    ("Host: localhost:99", 200), ("Host: [::1]:8000", 200), ("Host: LOCALHOST", 200),
    ("Host: 127.0.0.1\r\nOrigin: null", 403), ("Host: 127.0.0.1\r\nOrigin: https://evil.com", 403),
    ("Host: 127.0.0.1\r\nOrigin: http://localhost.evil.com", 403),
    ("Host: 127.0.0.1\r\nOrigin: http://evil.com/localhost", 403),
    ("Host: 127.0.0.1\r\nOrigin: http://localhost@evil.com", 403),
    ("Host: 127.0.0.1\r\nSec-Fetch-Site: cross-site", 403),
    ("Host: 127.0.0.1\r\nContent-Type: text/plain", 403),
    ("Host: 127.0.0.1\r\nOrigin: http://localhost:3000", 200),
    ("Host: 127.0.0.1\r\nOrigin: http://127.0.0.1", 200),
]


@pytest.mark.parametrize(("headers", "wanted"), FOREIGN)
def test_foreign_hosts_and_origins_never_reach_the_model(quiet, headers, wanted):
    before = len(quiet.mock.turns)
    data = json.dumps(HI).encode()
    answer = exchange(quiet.port, f"POST /v1/messages HTTP/1.1\r\n{headers}\r\nConnection: close\r\n"
                      f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
    assert answer.startswith(b"HTTP/1.1 %d " % wanted), answer[:200]
    assert len(quiet.mock.turns) - before == (wanted == 200)


@pytest.mark.parametrize(("origin", "flags", "allowed"), [
    ("http://localhost:3000", {}, "http://localhost:3000"), ("http://evil.com", {}, None),
    ("http://evil.com", {"cors_wildcard": "on"}, "*"), ("null", {"cors_wildcard": "on"}, "*"),
    ("", {}, None), ("", {"cors_wildcard": "on"}, "*"),
])
def test_preflights(origin, flags, allowed):
    wanted = "x-stainless-os,content-type,x-api-key"
    with running_shim("http://127.0.0.1:9", **flags) as shim:
        answer = shim.request("OPTIONS", "/v1/messages", None, {
            "Origin": origin, "Access-Control-Request-Headers": wanted})
        assert answer.status == (204 if allowed or not origin else 403)
        assert answer.headers.get("Access-Control-Allow-Origin") == allowed
        if answer.status == 204:
            assert answer.headers["Access-Control-Allow-Headers"] == wanted
            assert "x-api-key" in shim.request(
                "OPTIONS", "/v1/messages").headers["Access-Control-Allow-Headers"]


@pytest.mark.parametrize(("headers", "wanted"), [
    ({}, 401), ({"x-api-key": "wrong"}, 401), ({"x-api-key": "sésame"}, 200),
    ({"Authorization": "Bearer sésame"}, 200), ({"Authorization": "sésame"}, 401),
    ({"Authorization": "Basic sésame"}, 401), ({"x-api-key": ""}, 401),
])
def test_a_key_guards_every_route_but_health(headers, wanted):
    coded = {name: value.encode("utf-8").decode("latin-1") for name, value in headers.items()}
    with MockOllama([text("ok")], model=MODEL) as mock, \
            running_shim(mock.url, api_key="sésame") as shim:
        for method, path in (("POST", "/v1/messages"), ("GET", "/v1/models"), ("GET", "/metrics"),
                             ("GET", "/status"), ("GET", "/"), ("GET", "/v1/models/a"),
                             ("POST", "/v1/messages/count_tokens")):
            assert shim.request(method, path, HI, coded).status == wanted
        answer = shim.request("GET", "/health")
        assert (answer.status, answer.json) == (200, {"ok": True, "status": "ok"})
        assert shim.request("GET", "/", None, {"Accept": "text/html"}).data.startswith(b"<!")


def test_another_bind_needs_a_key():
    config = qwencode.load_config({"host": "0.0.0.0", "port": "0"}, {})  # noqa: S104
    with pytest.raises(qwencode.ConfigError, match="SHIM_API_KEY"):
        qwencode.open_server(config)


def test_a_port_in_use_is_one_line(quiet):
    config = qwencode.load_config({"port": str(quiet.port)}, {})
    with pytest.raises(qwencode.ConfigError, match="in use"):
        qwencode.open_server(config)


# What the upstream does -> status, error type, part of the message; on both ways.
REFUSALS = {
    "missing model": (status(404, {"error": "model 'x' not found"}), 400, "invalid_request_error",
                      "ollama pull"),
    "overflow 0.33": (status(400, {"error": json.dumps({"error": {
        "code": 400, "message": "request (6009 tokens) exceeds the available context size (4096"
        " tokens), try increasing it", "n_prompt_tokens": 6009, "n_ctx": 4096}})}), 400,
        "invalid_request_error", "prompt is too long: 6009 tokens > 4096 maximum"),
    "overflow 0.24": (status(400, {"error": "the input length exceeds the context length"}), 400,
                      "invalid_request_error", "prompt is too long: "),
    "bad option": (status(500, {"error": 'option "num_ctx" must be of type integer'}), 500,
                   "api_error", "num_ctx"),
    "out of memory": (status(500, {"error": "model requires more system memory"}), 500,
                      "api_error", "more system memory"),
    "HTML 502": (status(502, "<html><title>502 Bad Gateway</title></html>"), 502, "api_error",
                 "502 Bad Gateway"),
    "login": (status(401, {"error": "unauthorized"}), 502, "api_error", "unauthorized"),
    "foreign host": (status(403, ""), 502, "api_error", "OLLAMA_BASE_URL"),
    "rate limit": (status(429, {"error": "slow down"}), 429, "rate_limit_error", "rate limit"),
    "a long rate limit": (status(429, {"error": "slow"}, {"Retry-After": "9" * 90}), 429,
                          "rate_limit_error", "rate limit"),
    "busy": (status(503, {"error": "server busy, please try again."}), 529, "overloaded_error",
             "server busy"),
    "plain 404": (status(404, "404 page not found"), 502, "api_error", "Is it an Ollama server?"),
    "error line first": (error_line("llama runner died"), 500, "api_error", "llama runner died"),
    "no answer": (cut(), 502, "api_error", "without an answer"),
    "empty 200": (status(200, ""), 502, "api_error", "without a word"),
    "reset": (reset(), 502, "api_error", "connection"),
    "nothing but done": (done(), 502, "api_error", "without any text"),
}


@pytest.mark.parametrize("way", ["off", "on"])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("name", REFUSALS)
def test_what_ollama_refuses_becomes_a_true_status(name, stream, way):
    reply, wanted, kind, words = REFUSALS[name]
    with MockOllama([reply], model=MODEL) as mock, running_shim(mock.url, verbatim=way) as shim:
        answer = shim.messages(stream=stream)
        assert len(mock.turns) == 1, "the model was asked twice"
        assert (answer.status, answer.error[0]) == (wanted, kind)
        assert words in answer.error[1]
        # In the model's own text no parser of Ollama's loses anything.
        assert ("SHIM_VERBATIM" in answer.error[1]) == (name == "nothing but done" and way == "off")


DEFERRED = ("The following deferred tools are now available via ToolSearch. Load them first:\n"
            "WebFetch\nmcp__m__add\n\nAvailable agent types for the Agent tool:\n- Zeta")
FETCH = {"url": "http://x", "prompt": "p"}
FETCH_TEXT = '{"name": "WebFetch", "arguments": {"url": "http://x", "prompt": "p"}}'
SEARCH = tool("ToolSearch", query="string", max_results="number")
FOUND = ("ToolSearch", {"query": "select:WebFetch", "max_results": 1})
DEFERRED_CALLS = {
    # name: the answer, the tools beside Bash, the call that comes of it (None: text)
    "called by name": (call("WebFetch", FETCH), [SEARCH], FOUND),
    "called in text": (model_text(FETCH_TEXT), [SEARCH], FOUND),
    "by the last part of its name": (
        call("add", {"a": "1"}), [SEARCH],
        ("ToolSearch", {"query": "select:mcp__m__add", "max_results": 1})),
    "loaded by now": (call("WebFetch", FETCH), [SEARCH, tool("WebFetch", url="string",
                                                            prompt="string")],
                      ("WebFetch", FETCH)),
    "a name that is not in the list": (model_text(FETCH_TEXT.replace("Fetch", "Find")), [SEARCH],
                                       None),
    "without a search tool": (model_text(FETCH_TEXT), [], None),
    "a list of tools is data": (model_text('[{"name": "WebFetch"}, {"name": "mcp__m__add"}]'),
                                [SEARCH], None),
    "a described tool is data": (
        model_text('{"name": "WebFetch", "description": "Reads a page."}'), [SEARCH], None),
}


@pytest.mark.parametrize("way", ["off", "on"])
@pytest.mark.parametrize("name", DEFERRED_CALLS)
def test_a_call_of_a_tool_that_is_only_named_searches_for_it(name, way):
    reply, tools, wanted = DEFERRED_CALLS[name]
    with MockOllama([reply], model=MODEL) as mock, running_shim(mock.url, verbatim=way) as shim:
        answer = shim.messages(stream=False, tools=[BASH, *tools], messages=[
            {"role": "user", "content": "go on"}, {"role": "system", "content": DEFERRED}])
    calls = [(block["name"], block["input"]) for block in answer.json["content"]
             if block["type"] == "tool_use"]
    assert calls == ([wanted] if wanted else [])


STRUCTURED = tool("StructuredOutput", answer="number", why="string")
GIVEN = {"answer": 4, "why": "2+2"}
GIVEN_TEXT = json.dumps(GIVEN)
WRITTEN_ANSWERS = {
    # name: the answer, the tools beside Bash, the input that StructuredOutput is given
    "as JSON": (GIVEN_TEXT, [STRUCTURED], GIVEN),
    "fenced": (f"```json\n{GIVEN_TEXT}\n```", [STRUCTURED], GIVEN),
    "a number as text": (GIVEN_TEXT.replace("4", '"4"'), [STRUCTURED], GIVEN),
    "with words around it": (f"Here it is: {GIVEN_TEXT} I hope it helps.", [STRUCTURED], None),
    "a key is missing": ('{"answer": 4}', [STRUCTURED], None),
    "a key too many": (GIVEN_TEXT.replace("{", '{"x": 1, '), [STRUCTURED], None),
    "a list": (f"[{GIVEN_TEXT}]", [STRUCTURED], None),
    "nobody asked for it": (GIVEN_TEXT, [], None),
}


@pytest.mark.parametrize("way", ["off", "on"])
@pytest.mark.parametrize("name", WRITTEN_ANSWERS)
def test_an_answer_written_as_the_json_that_was_asked_for_is_handed_in(name, way):
    written, tools, wanted = WRITTEN_ANSWERS[name]
    with MockOllama([text(written)], model=MODEL) as mock, \
            running_shim(mock.url, verbatim=way) as shim:
        answer = shim.messages(stream=False, tools=[BASH, *tools])
    calls = [block["input"] for block in answer.json["content"] if block["type"] == "tool_use"]
    assert calls == ([wanted] if wanted else [])
    assert answer.json["content"][0] == {"type": "text", "text": written}


MID_STREAM = {
    "error line": (text("Hel") + error_line("boom"), "boom"),
    "cut": (text("Hel") + cut(), "broke off"),
    "reset": (text("Hel") + reset(), "broke"),
    "garbage": (text("Hel") + raw(b"%%%%\n"), "invalid streaming response"),
    "not UTF-8": (text("Hel") + raw(b"\xff\xfe\n"), "UTF-8"),
}


@both_ways
@pytest.mark.parametrize("name", MID_STREAM)
def test_a_stream_that_fails_ends_in_an_error_event(name):
    reply, words = MID_STREAM[name]
    with MockOllama([reply], model=MODEL) as mock, running_shim(mock.url) as shim:
        events = shim.messages().events
        check_events(events)
        rows = joined(events)
        assert rows[:2] == [("start", "text"), ("text_delta", "Hel")]
        assert words in events[-1].payload["error"]["message"]


def test_garbage_first_is_a_begun_stream_or_an_invalid_response():
    with MockOllama([raw(b"<html>\n")], model=MODEL) as mock, running_shim(mock.url) as shim:
        events = shim.messages().events
        assert [event.name for event in events] == ["message_start", "error"]
        answer = shim.messages(stream=False)
        assert (answer.status, answer.error[0]) == (502, "invalid_response_error")
        assert "invalid JSON" in answer.error[1]


def test_ollama_down_is_told_at_once():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with running_shim(f"http://127.0.0.1:{port}") as shim:
        answer = shim.messages()
        assert answer.status == 502
        assert answer.headers["x-should-retry"] == "false"
        assert re.search(r"Connection refused\. Start it with `ollama serve`", answer.error[1])
        assert shim.request("GET", "/health").json["upstream"]["reachable"] is False


def test_where_the_c_library_names_no_error_of_a_socket_python_s_table_does(monkeypatch):
    monkeypatch.setattr(os, "strerror", lambda code: "Unknown error")  # as on Windows
    monkeypatch.setattr(
        socket, "errorTab", {errno.ECONNREFUSED: "Connection refused."}, raising=False)
    test_ollama_down_is_told_at_once()


@pytest.mark.parametrize(("num_ctx", "trained", "window"), [
    ("65536", 262_144, 65_536), ("65536", 32_768, 32_768), ("", 32_768, None)])
def test_health_tells_the_window_that_was_set_before_the_model_is_asked(num_ctx, trained, window):
    with MockOllama([text("ok")], model=Model(MODEL, context=trained)) as mock, \
            running_shim(mock.url, num_ctx=num_ctx) as shim:
        assert shim.request("GET", "/health").json["model"]["window"] == window
        assert not mock.turns


def test_an_unresolvable_name_is_told():
    with running_shim("http://no-such-host.invalid:1") as shim:
        assert "resolved" in shim.messages().error[1]


@both_ways
@pytest.mark.parametrize("reply", [hang(), text("Hel") + hang()])
def test_silence_is_told_in_time(reply):
    with MockOllama([reply], model=MODEL) as mock, \
            running_shim(mock.url, timeout_ms="300", verbatim="off") as shim:
        begun = time.monotonic()
        answer = shim.messages()
        assert time.monotonic() - begun < 2.0
        kind = answer.events[-1].payload["error"]["type"] if answer.status == 200 \
            else answer.error[0]
        assert kind == "timeout_error"


@both_ways
def test_a_slow_healthy_stream_is_not_cut():
    words = [text("w ") + delay(0.1)] * 8
    reply = words[0]
    for word in words[1:]:
        reply = reply + word
    with MockOllama([reply + done()], model=MODEL) as mock, \
            running_shim(mock.url, timeout_ms="400") as shim:
        assert joined(shim.messages().events)[1][1].count("w") == 8


STAGES = ["silent", "mid-stream", "not streamed"]


@both_ways
@pytest.mark.parametrize("stage", STAGES + ["requests wait behind"] * (sys.platform == "linux"))
@pytest.mark.parametrize("way", ["off", "on"])
def test_a_client_that_leaves_cancels_the_upstream(stage, way):
    reply = text("Hel") + hang() if stage == "mid-stream" else hang()
    with MockOllama([reply], model=MODEL) as mock, running_shim(mock.url, verbatim=way) as shim:
        body = {**HI, "stream": stage != "not streamed"}
        with socket.create_connection(("127.0.0.1", shim.port), 5) as sock:
            sock.sendall(post(body))
            if stage == "mid-stream":
                while b"Hel" not in sock.recv(65536):
                    pass
            else:
                wait_until(lambda: mock.turns)
            if stage == "requests wait behind":  # more of them than are read ahead
                sock.sendall(post({**HI, "x": "x" * 40_000}, close=False) * 2)
        assert mock.turns[0].closed_by_client.wait(GONE_S)
        assert shim.request("GET", "/health").status == 200


@both_ways
def test_keep_alives_fill_the_silence(monkeypatch):
    monkeypatch.setattr(qwencode, "FIRST_EVENT_S", 0.03)
    monkeypatch.setattr(qwencode, "KEEP_ALIVE_S", 0.03)
    reply = delay(0.25) + text("Hel") + delay(0.25) + text("lo") + done()
    with MockOllama([reply], model=MODEL) as mock, running_shim(mock.url, verbatim="off") as shim:
        events = shim.messages().events
        check_events(events)
        alive = [event for event in events if is_keep_alive(event)]
        assert len([e for e in alive if e.name == "message_delta"]) >= 2
        assert len([e for e in alive if e.name == "content_block_delta"]) >= 2
        assert not [e for e in events if e.name == "ping"]
        answer = shim.messages(stream=False)
        assert answer.data.startswith(b" ")
        assert answer.json["content"] == [{"type": "text", "text": "Hello"}]


@both_ways
def test_keep_alives_reach_a_retry_whose_first_client_left(monkeypatch):
    monkeypatch.setattr(qwencode, "FIRST_EVENT_S", 0.1)
    monkeypatch.setattr(qwencode, "KEEP_ALIVE_S", 0.05)
    monkeypatch.setattr(qwencode, "FOLLOW_S", 0.02)
    session = {"X-Claude-Code-Session-Id": "s"}
    body, got = {**HI, "stream": True}, []
    go = threading.Event()
    with MockOllama([hold(go) + delay(0.5) + text("once") + done()], model=MODEL) as mock, \
            running_shim(mock.url, verbatim="off") as shim:
        with socket.create_connection(("127.0.0.1", shim.port), 5) as first:
            first.sendall(post(body, "X-Claude-Code-Session-Id: s\r\n"))
            mock.wait_for()
            retry = threading.Thread(target=lambda: got.append(
                shim.request("POST", "/v1/messages", body, session)))
            retry.start()
            wait_until(lambda: listening(shim) == 1)
        go.set()
        retry.join(10)
    events = got[0].events
    assert joined([e for e in events if not is_keep_alive(e)])[1] == ("text_delta", "once")
    assert len([event for event in events if is_keep_alive(event)]) >= 2


@both_ways
def test_thinking_calls_and_usage():
    reply = thinking("hm") + text("Look.") + call("Read", {"file_path": "a"}) \
        + done(prompt_eval_count=21, eval_count=9)
    with MockOllama([reply], model="qwen3:8b") as mock, \
            running_shim(mock.url, verbatim="off", model="qwen3:8b") as shim:
        fields = {"tools": [READ, WRITE, BASH], "thinking": {"type": "adaptive"}}
        events = shim.messages(**fields).events
        check_events(events, ["Read", "Write", "Bash"])
        assert joined(events) == [
            ("start", "thinking"), ("thinking_delta", "hm"),
            ("signature_delta", qwencode.SIGNATURE), ("stop",), ("start", "text"),
            ("text_delta", "Look."), ("stop",), ("start", "tool_use", "Read"),
            ("input_json_delta", '{"file_path":"a"}'), ("stop",), ("end", "tool_use")]
        whole = shim.messages(stream=False, **fields).json
        assert [block["type"] for block in whole["content"]] == ["thinking", "text", "tool_use"]
        assert whole["model"] == "claude-x"
        assert whole["usage"]["output_tokens"] == 9
        assert mock.turns[0].body["think"] is True


@both_ways
def test_stop_sequences_are_ours_and_the_models_stay():
    with MockOllama([text("one STOP two")], model=MODEL) as mock, running_shim(mock.url) as shim:
        events = shim.messages(stop_sequences=["STOP", "x"]).events
        assert joined(events)[1] == ("text_delta", "one ")
        assert events[-2].payload["delta"] == {"stop_reason": "stop_sequence",
                                               "stop_sequence": "STOP"}
        assert "stop" not in mock.turns[0].body["options"]


@both_ways
def test_an_answer_cut_at_its_limit_says_so():
    with MockOllama([text("so far") + done(reason="length")], model=MODEL) as mock, \
            running_shim(mock.url) as shim:
        assert joined(shim.messages().events)[-1] == ("end", "max_tokens")


@contextlib.contextmanager
def lagging_client(shim):
    """A connection whose client takes hardly a byte."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", shim.port))
        yield sock


@both_ways
def test_a_client_that_takes_nothing_is_cut_off(monkeypatch):
    monkeypatch.setattr(qwencode, "CLIENT_STALL_S", 0.2)
    reply = text("x" * 20_000_000, pieces=1)  # more than the system's buffers take
    with MockOllama([reply + hang()], model=MODEL) as mock, running_shim(mock.url) as shim, \
            lagging_client(shim) as sock:
        sock.sendall(post({**HI, "stream": True, "max_tokens": 1000}))
        assert mock.wait_for().closed_by_client.wait(10)
        wait_until(lambda: shim.server.stats.counters["requests"].get("client left") == 1)


@both_ways
@pytest.mark.parametrize("stream", [True, False])
def test_one_line_of_ten_megabytes_arrives(stream):
    words = "0123456789" * 1_000_000
    with MockOllama([text(words, pieces=1)], model=MODEL) as mock, \
            running_shim(mock.url) as shim:
        answer = shim.messages(stream=stream)
        told = answer.json["content"][0]["text"] if not stream else joined(answer.events)[1][1]
        assert told == words


@both_ways
def test_more_than_four_megabytes_wait_for_nobody():
    reply = text("x" * 20_000_000, pieces=100)
    with MockOllama([reply + hang()], model=MODEL) as mock, running_shim(mock.url) as shim, \
            lagging_client(shim) as sock:
        sock.sendall(post({**HI, "stream": True, "max_tokens": 1000}))
        assert mock.wait_for().closed_by_client.wait(10)
        wait_until(lambda: shim.server.stats.counters["requests"].get("client left") == 1)


def test_too_many_requests_are_told_to_wait():
    with MockOllama([hang()], model=MODEL) as mock, \
            running_shim(mock.url, max_concurrent="1") as shim:
        socks = []
        for count in range(2):
            sock = socket.create_connection(("127.0.0.1", shim.port), 5)
            sock.sendall(post(HI, close=False))
            socks.append(sock)
            wait_until(lambda wanted=count: sum(shim.server.gate.load) == wanted + 1)
        answer = shim.messages()
        assert (answer.status, answer.error[0]) == (529, "overloaded_error")
        assert answer.headers["retry-after"]
        assert shim.request("GET", "/health").status == 200
        for sock in socks:
            sock.close()
        wait_until(lambda: shim.server.gate.load == (0, 0))


def test_idle_connections_do_not_keep_a_request_out(quiet):
    idle = [socket.create_connection(("127.0.0.1", quiet.port), 5) for _ in range(300)]
    assert quiet.messages().status == 200
    for sock in idle:
        sock.close()


def test_a_body_that_dribbles_is_cut(monkeypatch, quiet):
    monkeypatch.setattr(qwencode, "HEAD_PROGRESS_S", 0.2)
    assert exchange(quiet.port, b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\n"
                    b"Content-Length: 10\r\n\r\n{").startswith(b"HTTP/1.1 408")
    assert exchange(quiet.port, b"POST /v1/mess").startswith(b"HTTP/1.1 408")


@both_ways
def test_stopping_ends_streams_with_an_error_event():
    with MockOllama([text("Hel") + hang()], model=MODEL) as mock, running_shim(mock.url) as shim:
        got = []
        client = threading.Thread(target=lambda: got.append(shim.messages()))
        client.start()
        wait_until(lambda: "writing" in [
            one.state for one in list(shim.server.stats.active.values())])
        begun = time.monotonic()
        shim.server.stop()
        client.join(5)
        assert time.monotonic() - begun < 5
        assert joined(got[0].events)[-1] == ("error", "api_error")


def test_secrets_never_come_back():
    with MockOllama([status(500, {"error": "bad token tok-secret for u:pw-secret"})],
                    model=MODEL) as mock, \
            running_shim(mock.url.replace("://", "://u:pw-secret@"), auth_token="tok-secret",
                         api_key="key-secret") as shim:
        key = {"x-api-key": "key-secret"}
        answers = [shim.request("POST", "/v1/messages", HI, key),
                   shim.request("GET", "/health", None, key),
                   shim.request("GET", "/status", None, key),
                   shim.request("GET", "/metrics", None, key)]
        for answer in answers:
            assert b"-secret" not in answer.data


def test_background_requests_are_answered_here(quiet):
    before = len(quiet.mock.turns)
    schema = {"type": "object", "properties": {"title": {"type": "string"}}}
    title = quiet.messages("<session>\nmake me a web server please\n</session>",
                           output_config={"format": {"type": "json_schema", "schema": schema}})
    assert joined(title.events)[1] == ("text_delta", '{"title":"make me a web server please"}')
    assert quiet.messages("quota", max_tokens=1, stream=False).json["stop_reason"] == "max_tokens"
    assert joined(quiet.messages("[SUGGESTION MODE: guess]").events) == [("end", "end_turn")]
    refused = quiet.messages("x", system="You are a security monitor for autonomous AI coding"
                                         " agents. Judge.")
    assert (refused.status, "--permission-mode" in refused.error[1]) == (403, True)
    assert len(quiet.mock.turns) == before


@both_ways
def test_identical_requests_join():
    go = threading.Event()
    with MockOllama([hold(go) + text("once") + done()], model=MODEL) as mock, \
            running_shim(mock.url) as shim:
        got = []

        def ask():
            got.append(shim.request("POST", "/v1/messages", {**HI, "stream": True},
                                    {"X-Claude-Code-Session-Id": "s"}))
        clients = [threading.Thread(target=ask) for _ in range(3)]
        for client in clients:
            client.start()
        wait_until(lambda: listening(shim) == 2)
        go.set()
        for client in clients:
            client.join(10)
        assert len(mock.turns) == 1
        for answer in got:
            assert joined(answer.events)[1] == ("text_delta", "once")


def test_a_retry_that_joins_as_the_first_is_given_up_asks_by_itself(monkeypatch):
    joining, ended, given_up, got = threading.Event(), threading.Event(), [], []
    joint, close_joint = qwencode.ShimServer.joint, qwencode.ShimServer.close_joint

    def late_joint(server, exchange):
        leader = joint(server, exchange)
        if leader is not exchange:
            joining.set()
            assert ended.wait(5)
        return leader

    def close(server, exchange):
        close_joint(server, exchange)
        given_up.append(exchange.audience.failure)
        ended.set()
    monkeypatch.setattr(qwencode.ShimServer, "joint", late_joint)
    monkeypatch.setattr(qwencode.ShimServer, "close_joint", close)
    session = {"X-Claude-Code-Session-Id": "s"}
    with MockOllama([delay(20) + text("late") + done(), text("own") + done()], model=MODEL) as mock, \
            running_shim(mock.url) as shim:
        first = socket.create_connection(("127.0.0.1", shim.port), 5)
        first.sendall(post({**HI, "stream": True}, "X-Claude-Code-Session-Id: s\r\n"))
        wait_until(lambda: mock.turns)
        retry = threading.Thread(target=lambda: got.append(
            shim.request("POST", "/v1/messages", {**HI, "stream": True}, session)))
        retry.start()
        assert joining.wait(5)
        first.close()
        retry.join(10)
        assert isinstance(given_up[0], qwencode.GivenUpError)
        assert joined(got[0].events)[1] == ("text_delta", "own")


# ------------------------------ many streams on one thread ------------------------------

# Elsewhere each stream keeps its own thread, so that there is nothing to see.
needs_epoll = pytest.mark.skipif(
    not qwencode.make_epoll, reason="only Linux has epoll, with which streams share a thread")


@needs_epoll
def test_forty_streams_share_one_thread_and_keep_apart(relayed):
    rows = [[f"s{stream:02d}t{token:02d} " for token in range(30)] for stream in range(40)]
    replies = [sum(((delay(0.01) + text(token)) for token in row), text("")) + done()
               for row in rows]
    with MockOllama(replies, model=MODEL) as mock, running_shim(mock.url) as shim:
        shared, got, seen = shim.server.shared, [], set()
        clients = [threading.Thread(target=lambda: got.append(shim.messages().events))
                   for _ in rows]
        for client in clients:
            client.start()
        for client in clients:
            while client.is_alive():
                seen.add(shared.thread)
                client.join(0.02)
        assert sorted(joined(events)[1][1] for events in got) == ["".join(row) for row in rows]
        assert 1 <= len(seen - {None}) <= 2
        wait_until(lambda: shared.thread is None)  # it ends when nothing is lent


SLOW = text("a") + delay(0.1) + text("b") + delay(0.1) + text("c") + done()


DONE = chat_line("", done=True, done_reason="stop")
COMPACT = DONE.replace(b": ", b":")
ENDS = {
    "whole": [DONE], "in two reads": [DONE[:-31], DONE[-31:]],
    "compact": [COMPACT], "compact, within the word": [COMPACT[:-26], COMPACT[-26:]],
    "the model's own mark": [chat_line("<|im_end|>"), DONE],
    "its mark as Go writes it": [
        chat_line("<|im_end|>").replace(b"<", b"\\u003c").replace(b">", b"\\u003e"), DONE],
    "its mark in two tokens": [chat_line("<|im_"), chat_line("end|>"), DONE],
}


@needs_epoll
@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("way", ["off", "on"])
def test_a_rescue_never_holds_up_the_other_streams(monkeypatch, name, way):
    asked = []
    monkeypatch.setattr(qwencode, "MANY_STREAMS", 1)
    monkeypatch.setattr(qwencode.Exchange, "_rescue", lambda exchange, *_: asked.append(
        threading.current_thread() is exchange.server.shared.thread))
    reply = text("Hello") + delay(0.05) + text(" you")
    for piece in ENDS[name]:
        reply = reply + delay(0.05) + raw(piece)
    with MockOllama([reply + end()], model=MODEL) as mock, \
            running_shim(mock.url, verbatim=way) as shim:
        assert joined(shim.messages().events)[-1] == ("end", "end_turn")
    assert asked == [False]


@both_ways
def test_a_retry_outlives_a_first_client_that_resets_in_mid_stream():
    replies, listened, got = [], [threading.Event() for _ in range(5)], []
    for event in listened:
        reply = text("t0 ") + hold(event)
        for token in range(1, 20):
            reply = reply + delay(0.01) + text(f"t{token} ")
        replies.append(reply + done())
    with MockOllama(replies, model=MODEL) as mock, running_shim(mock.url) as shim:
        for turn, event in enumerate(listened):
            session = f"s{turn}"
            with socket.create_connection(("127.0.0.1", shim.port), 5) as first:
                first.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                first.sendall(post({**HI, "stream": True}, f"X-Claude-Code-Session-Id: {session}\r\n"))
                first.recv(10)
                retry = threading.Thread(target=lambda name: got.append(shim.request(
                    "POST", "/v1/messages", {**HI, "stream": True},
                    {"X-Claude-Code-Session-Id": name})), args=(session,))
                retry.start()
                wait_until(lambda: listening(shim) == 1)
                event.set()
            retry.join(10)
    assert [joined(answer.events)[1] for answer in got] == [
        ("text_delta", "".join(f"t{token} " for token in range(20)))] * 5


@needs_epoll
def test_what_breaks_the_shared_thread_breaks_no_stream(monkeypatch):
    rounds = []

    def broken(self):
        rounds.append(self)
        raise OSError("no more")
    monkeypatch.setattr(qwencode, "MANY_STREAMS", 1)
    monkeypatch.setattr(qwencode.SharedRelay, "_round", broken)
    monkeypatch.setattr(threading, "excepthook", lambda problem: None)
    with MockOllama([SLOW], model=MODEL) as mock, running_shim(mock.url) as shim:
        assert joined(shim.messages().events)[1] == ("text_delta", "abc")
    assert rounds


def refusing(problem):
    def refuse(*_, **__):
        raise problem
    return refuse


@needs_epoll
@pytest.mark.parametrize(("owner", "name", "problem"), [
    (qwencode, "make_epoll", OSError(24, "Too many open files")),
    (qwencode.SharedRelay, "_start", RuntimeError("can't start new thread")),
    (qwencode.SharedRelay, "_watch", OSError(28, "No space left on device"))])
def test_without_descriptors_or_threads_streams_keep_their_own(monkeypatch, owner, name, problem):
    monkeypatch.setattr(qwencode, "MANY_STREAMS", 1)
    monkeypatch.setattr(owner, name, refusing(problem))
    with MockOllama([SLOW], model=MODEL) as mock, running_shim(mock.url) as shim:
        assert joined(shim.messages().events)[1] == ("text_delta", "abc")
        assert shim.server.shared.lent == {}
