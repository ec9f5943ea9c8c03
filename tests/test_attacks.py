"""Attackers, load and ends: section 16 when nobody is polite."""
import contextlib
import copy
import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import check_events, joined, read_sse, running_shim, wait_until
from mock_ollama import MockOllama, done, error_line, hang, hold, status, text
from test_server import HI, MODEL, exchange, post

import qwencode

ROOT = Path(__file__).resolve().parent.parent
LOCAL = "Host: localhost\r\n"


@pytest.fixture(scope="module")
def quiet():
    with MockOllama([text("ok")], models="any", default_num_ctx=65536) as mock, \
            running_shim(mock.url, num_ctx="65536") as shim:
        shim.mock = mock
        yield shim


def answers(data):
    return [int(code) for code in re.findall(rb"HTTP/1\.1 ([0-9]{3}) ", data)]


# ---- a second request out of a body ----

SMUGGLED = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
CHUNKED_BODY = b"%x\r\n%b\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED)


def announce(first, *lines, body=SMUGGLED):
    head = f"{first} HTTP/1.1\r\n{LOCAL}" + "".join(f"{line}\r\n" for line in lines) + "\r\n"
    return head.encode() + body


LENGTH = f"Content-Length: {len(SMUGGLED)}"
CARRIERS = {
    "no such route": (announce("POST /nope", LENGTH), [404]),
    "wrong method": (announce("DELETE /health", LENGTH), [405]),
    "foreign host": (b"GET /health HTTP/1.1\r\nHost: evil\r\n%b\r\n\r\n%b"
                     % (LENGTH.encode(), SMUGGLED), [403]),
    "foreign origin": (announce("POST /v1/messages", LENGTH, "Origin: null"), [403]),
    "simple type": (announce("POST /v1/messages", LENGTH, "Content-Type: text/plain"), [403]),
    "not JSON, whole": (announce("POST /v1/messages", LENGTH, "Connection: close"), [400]),
    "GET with a body": (announce("GET /health", LENGTH, "Connection: close"), [200]),
    "HEAD with a body": (announce("HEAD /health", LENGTH, "Connection: close"), [200]),
    "OPTIONS with a body": (announce("OPTIONS /", LENGTH, "Connection: close"), [204]),
    "chunked, no such route": (announce("POST /nope", "Transfer-Encoding: chunked",
                                        body=CHUNKED_BODY), [404]),
    "no length, and chunks": (announce("POST /v1/messages", "Content-Length: 0",
                                       "Transfer-Encoding: chunked"), [400]),
    "empty length": (announce("POST /v1/messages", "Content-Length:"), [400]),
    "empty coding": (announce("POST /v1/messages", "Transfer-Encoding:", LENGTH), [400]),
    "two codings": (announce("POST /v1/messages", "Transfer-Encoding: chunked, chunked",
                             body=CHUNKED_BODY), [501]),
    "identity": (announce("POST /v1/messages", "Transfer-Encoding: identity"), [501]),
    "length in hex": (announce("POST /v1/messages", "Content-Length: 0x10"), [400]),
    "length with an underscore": (announce("POST /v1/messages", "Content-Length: 1_0"), [400]),
    "length in Arabic digits": (announce("POST /v1/messages").replace(
        b"\r\n\r\n", "\r\nContent-Length: ٥\r\n\r\n".encode(), 1), [400]),
    "negative length": (announce("POST /v1/messages", "Content-Length: -1"), [400]),
    "chunk size with a sign": (announce("POST /v1/messages", "Transfer-Encoding: chunked",
                                        body=b"+5\r\nhello\r\n0\r\n\r\n" + SMUGGLED), [400]),
    "chunk without its end": (announce("POST /v1/messages", "Transfer-Encoding: chunked",
                                       body=b"5\r\nhelloXX0\r\n\r\n" + SMUGGLED), [400]),
    "bare line feed in a chunk line": (announce(
        "POST /v1/messages", "Transfer-Encoding: chunked",
        body=b"5;a\nb\r\nhello\r\n0\r\n\r\n" + SMUGGLED), [400]),
    "endless trailers": (announce("POST /v1/messages", "Transfer-Encoding: chunked",
                                  body=b"0\r\n" + b"A: b\r\n" * 500 + SMUGGLED), [400]),
    "two origins": (announce("POST /v1/messages", LENGTH, "Origin: null",
                             "Origin: http://localhost"), [400]),
    "two types": (announce("POST /v1/messages", LENGTH, "Content-Type: text/plain",
                           "Content-Type: application/json"), [400]),
    "vertical tab in a header": (announce("GET /", "Content-Length:\x0b5"), [400]),
    "return in a header": (announce("GET /", "A: b\rContent-Length: 5"), [400]),
    "control character in the target": (announce("GET /\x01"), [400]),
}


@pytest.mark.parametrize("name", CARRIERS)
def test_a_body_is_never_taken_for_a_request(quiet, name):
    data, wanted = CARRIERS[name]
    assert answers(exchange(quiet.port, data, timeout=2.0)) == wanted


def test_a_hostile_header_costs_no_time(quiet):
    begun = time.monotonic()
    exchange(quiet.port, b"GET /v1/models/a HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
             b"A: b" + b" " * 15_000 + b"c\r\n\r\n")
    assert time.monotonic() - begun < 0.5


ERRORS_IN_A_ROW = [
    ("POST", "/v1/messages", b"{", 400), ("POST", "/v1/messages", b"[]", 400),
    ("POST", "/v1/messages", b"[" * 100_000, 400), ("POST", "/v1/messages", b"", 400),
    ("GET", "/nope", None, 404), ("GET", "/v1/messages", None, 405),
    ("POST", "/v1/messages/count_tokens", b'{"messages":1}', 400),
    ("POST", "/v1/messages", json.dumps({**HI, "max_tokens": 0}).encode(), 400),
]


def test_the_connection_stays_after_errors(quiet):
    client = http.client.HTTPConnection("127.0.0.1", quiet.port, timeout=5)
    client.connect()
    ours = client.sock
    for method, path, body, wanted in ERRORS_IN_A_ROW:
        client.request(method, path, body)
        answer = client.getresponse()
        told = json.loads(answer.read())
        assert (path, answer.status, told["type"]) == (path, wanted, "error")
        assert answer.headers["request-id"] == told["request_id"]
        assert client.sock is ours
    client.request("POST", "/v1/messages", json.dumps(HI))
    assert client.getresponse().status == 200
    client.close()


def test_upstream_errors_leave_the_connection_open():
    replies = [status(500, {"error": "x"}), status(404, "gone"), text("Hel") + hang(), text("ok")]
    with MockOllama(replies, model=MODEL) as mock, \
            running_shim(mock.url, timeout_ms="200", verbatim="off") as shim:
        data = b"".join(post({**HI, "stream": stream}, close=last) for stream, last in (
            (True, False), (False, False), (True, False), (True, True)))
        got = exchange(shim.port, data)
        assert answers(got) == [500, 502, 200, 200]
        assert got.index(b"timeout_error") < got.index(b"message_stop")


@pytest.mark.parametrize(("method", "path", "code"), [
    ("HEAD", "/", 200), ("HEAD", "/health", 200), ("HEAD", "/v1/models", 200),
    ("HEAD", "/metrics", 200), ("HEAD", "/nope", 404), ("HEAD", "/v1/messages", 405),
    ("OPTIONS", "/v1/messages", 204), ("OPTIONS", "*", 204)])
def test_head_and_options_have_no_body(quiet, method, path, code):
    got = exchange(quiet.port, f"{method} {path} HTTP/1.1\r\n{LOCAL}"
                   "Origin: http://localhost:1\r\nConnection: close\r\n\r\n".encode())
    head, _, body = got.partition(b"\r\n\r\n")
    assert (answers(head), body) == ([code], b"")
    assert (b"Content-Length" in head) == (code != 204)


CROSSING = [
    ("GET /status", "Sec-Fetch-Site: cross-site", 403),
    ("HEAD /", "Sec-Fetch-Site: cross-site", 403),
    ("GET /status", "Sec-Fetch-Site: same-origin", 200), ("GET /", "Sec-Fetch-Site: none", 200),
    ("GET /v1/models", "Origin: https://localhost", 200), ("GET /status", "Origin: null", 403),
    ("GET /status", "Origin: http://localhost.evil.com", 403),
    ("GET /status", "Origin: http://evil.com#http://localhost", 403),
    ("GET /status", "Origin: http://localhost:8000@evil.com", 403),
    ("GET /status", "Origin: http://localhost:1/../evil", 403),
    ("GET /status", "Origin: http://127.0.0.1.evil.com", 403),
    ("GET /status", "Origin: http://xlocalhost", 403),
    ("GET /status", "Origin: http://0x7f.1", 403), ("GET /status", "Origin: data://localhost", 403),
    ("GET /status", "Origin: http://[::1]:3", 200),
    ("GET /status", "Origin: http://a.localhost", 200),
    ("GET http://localhost/status?x", "A: b", 200), ("GET http://[::1]:1/", "A: b", 200),
    ("GET http://evil.com/status", "A: b", 403), ("GET http://a@localhost/", "A: b", 403),
    ("POST http://evil.com/v1/messages", "A: b", 403), ("GET http:///status", "A: b", 404),
    ("POST https://evil.com/v1/messages", "A: b", 403),
    ("POST /v1/messages", "Content-Type: TEXT/PLAIN; charset=utf-8", 403),
    ("POST /v1/messages", "Content-Type: multipart/form-data; boundary=x", 403),
    ("POST /v1/messages", "Content-Type: application/x-www-form-urlencoded", 403),
]


@pytest.mark.parametrize(("first", "line", "wanted"), CROSSING)
def test_pages_of_other_origins(quiet, first, line, wanted):
    before = len(quiet.mock.requests)
    assert answers(exchange(quiet.port, announce(
        first, line, "Connection: close", body=b""))) == [wanted]
    if wanted == 403:
        assert len(quiet.mock.requests) == before


# ---- bodies ----

BOMBS = {
    "arrays": b"[" * 100_000, "objects": b'{"a":' * 100_000,
    "whole arrays": b"[" * 50_000 + b"]" * 50_000,
    "900 deep": b'{"a":' * 900 + b"1" + b"}" * 900, "300 deep": b"[" * 300 + b"]" * 300,
    "5,000 digits": b"9" * 5_000, "1e999": b"1e999", "NaN": b"NaN", "-Infinity": b"-Infinity",
    "lone surrogate": b'"\\ud800"', "NUL": b'"\\u0000"', "BOM": b"\xef\xbb\xbf1",
}
FIELDS = ("model", "max_tokens", "messages", "system", "tools", "metadata", "temperature",
          "output_config", "thinking", "stop_sequences", "tool_choice", "unknown_field")


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_in_any_field(quiet, bomb):
    before = quiet.server.stats.counters["requests"].get("internal")
    for field in (*FIELDS, "text", "input", "schema"):
        schema = {"type": "object", "x": "@schema"}
        body = {**HI, "tools": [{"name": "Bash", "input_schema": schema}], "messages": [
            {"role": "user", "content": "@text"},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "Bash",
                                               "input": {"command": "@input"}}]},
            {"role": "user", "content": "go"}]}
        if field in FIELDS:
            body[field] = "@" + field
        data = json.dumps(body).encode().replace(b'"@%b"' % field.encode(), BOMBS[bomb])
        for path in ("/v1/messages", "/v1/messages/count_tokens"):
            answer = quiet.request("POST", path, data)
            assert (field, answer.status in (200, 400)) == (field, True)
    assert quiet.server.stats.counters["requests"].get("internal") == before


ODD = (None, True, False, 0, -1, 2**40, 10**300, 1.5, "", "x", "\ud800", "\x00", [], [[]], [None],
       [1, "a"], {}, {"a": 1}, {"type": "text"}, {"type": []}, {"$ref": "#"}, "9" * 5000)
FULL = {
    "model": "claude-x", "max_tokens": 100, "stream": True, "temperature": 0.5, "top_p": 1,
    "system": [{"type": "text", "text": "You are Claude Code.", "cache_control": {"type": "e"}}],
    "metadata": {"user_id": "u"}, "stop_sequences": ["STOP"],
    "thinking": {"type": "enabled", "budget_tokens": 1024}, "tool_choice": {"type": "auto"},
    "output_config": {"format": {"type": "json_schema", "schema": {
        "type": "object", "properties": {"title": {"type": "string"}}}}},
    "tools": [
        {"name": "Bash", "description": "Run", "input_schema": {
            "type": "object", "$defs": {"d": {"type": "string"}}, "required": ["command"],
            "properties": {
                "command": {"type": "string"}, "e": {"enum": ["a", 1]}, "r": {"$ref": "#/$defs/d"},
                "n": {"anyOf": [{"type": "null"}, {"type": "integer"}]},
                "l": {"type": "array", "items": {"type": ["string", "null"]}}}}},
        {"name": "Write", "description": "W", "input_schema": {
            "type": "object", "required": ["file_path"],
            "properties": {"file_path": {"type": "string"}, "content": {"type": "string"}}}},
        {"type": "web_search_20250305", "name": "web_search"}],
    "messages": [
        {"role": "user", "content": [
            {"type": "text", "text": "Create a.txt with hi"},
            {"type": "image", "source": {"type": "base64", "media_type": "i/p", "data": "aGk="}}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "t", "signature": "s"}, {"type": "text", "text": "ok"},
            {"type": "tool_use", "id": "t", "name": "Write", "input": {"file_path": "a"}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t", "is_error": False, "content": [
                {"type": "text", "text": "done"}, {"type": "tool_reference", "tool_name": "X"}]}]},
        {"role": "user", "content": "Now create file b.txt containing hello"}]}
MODEL_SAYS = ("I'll create it.\n```bash\necho hi > b.txt\n```\n<tool_call>\n"
              '{"name": "Bash", "arguments": {"command": ["ls"], "n": "5", "l": "a", "e": "A"}}\n'
              "</tool_call>")


def places(value, path=()):
    if path:
        yield path
    for key, item in (value.items() if isinstance(value, dict) else
                      enumerate(value) if isinstance(value, list) else ()):
        yield from places(item, (*path, key))


def mutated(chance):
    """Put odd values, or nothing, in the place of one to three fields."""
    body = copy.deepcopy(FULL)
    for _ in range(chance.choice((1, 1, 2, 3))):
        path = chance.choice(list(places(body)))
        holder = body
        for key in path[:-1]:
            holder = holder[key]
        if chance.random() < 0.8:
            holder[path[-1]] = copy.deepcopy(chance.choice(ODD))
        elif len(body) > 1:
            del holder[path[-1]]
    return body


def test_mutated_requests_never_meet_a_bug(capfd):
    chance = random.Random(9)  # noqa: S311
    with MockOllama([text(MODEL_SAYS)], models="any", default_num_ctx=65536) as mock, \
            running_shim(mock.url, num_ctx="65536") as shim:
        client = http.client.HTTPConnection("127.0.0.1", shim.port, timeout=10)
        for _ in range(300):
            body = mutated(chance)
            client.request("POST", "/v1/messages", json.dumps(body))
            answer = client.getresponse()
            data = answer.read()
            assert answer.status in (200, 400), (body, data)
            if b"event: " in data:
                check_events(read_sse(data))
        assert "internal" not in shim.server.stats.counters["requests"]
    assert "internal error" not in capfd.readouterr().err


@pytest.mark.parametrize("piece", ["\n", "\r\n", " ", "`", "<", "{", "please "])
def test_long_runs_cost_no_time(quiet, piece):
    """Each of these was once searched again from every character of the run."""
    words = "Create " + piece * (20_000 // len(piece)) + " x"
    begun = time.monotonic()
    assert quiet.messages(words, system=words).status == 200
    quiet.mock.replies = [text(words, pieces=1)]
    assert quiet.messages("Create a.txt").status == 200
    quiet.mock.replies = [text("ok")]
    assert time.monotonic() - begun < 3.0


def test_a_chunked_body_beyond_the_limit_is_413(monkeypatch, quiet):
    monkeypatch.setattr(qwencode, "MAX_BODY_BYTES", 10_000)
    got = exchange(quiet.port, announce("POST /v1/messages", "Transfer-Encoding: chunked",
                                        body=(b"800\r\n" + b"x" * 2048 + b"\r\n") * 9))
    assert answers(got) == [413]
    assert b"request_too_large" in got


def test_fifty_megabytes_are_refused_by_their_header_alone(quiet):
    with socket.create_connection(("127.0.0.1", quiet.port), 5) as sock:
        sock.sendall(announce("POST /v1/messages", "Content-Length: 52428800", body=b""))
        assert answers(sock.recv(1000)) == [413]


def test_a_client_that_sends_all_the_same_reads_its_refusal(quiet):
    with socket.create_connection(("127.0.0.1", quiet.port), 5) as sock:
        sock.sendall(announce("POST /v1/messages", "Content-Length: 52428800", body=b""))
        for _ in range(50):
            sock.sendall(b"x" * 1_048_576)
        sock.shutdown(socket.SHUT_WR)
        assert answers(sock.recv(1000)) == [413]


def test_small_pieces_that_keep_coming_are_no_dribble(monkeypatch, quiet):
    monkeypatch.setattr(qwencode, "HEAD_PROGRESS_S", 0.3)
    data = json.dumps({**HI, "messages": [{"role": "user", "content": "x" * 20_000}]}).encode()
    pause = threading.Event()
    with socket.create_connection(("127.0.0.1", quiet.port), 5) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(announce("POST /v1/messages", f"Content-Length: {len(data)}", body=b""))
        for at in range(0, len(data), 500):
            sock.sendall(data[at:at + 500])
            pause.wait(0.01)
        assert answers(sock.recv(1000)) == [200]


@pytest.mark.parametrize("start", [
    b"G", b"GET / HTTP/1.1\r\nHost: localhost\r\nA", b"\r",
    announce("POST /v1/messages", LENGTH, body=b""),
    announce("POST /v1/messages", "Transfer-Encoding: chunked", body=b"5\r\nhe"),
    announce("POST /v1/messages", "Transfer-Encoding: chunked", body=b"0\r\nA: b\r\n")])
def test_dribbles_are_cut(monkeypatch, quiet, start):
    monkeypatch.setattr(qwencode, "HEAD_PROGRESS_S", 0.25)
    begun = time.monotonic()
    with socket.create_connection(("127.0.0.1", quiet.port), 5) as sock:
        sock.sendall(start)
        sock.settimeout(0.03)
        got = b""
        while not got and time.monotonic() < begun + 3:
            with contextlib.suppress(socket.timeout, BlockingIOError):
                got = sock.recv(1000)
            if not got:
                sock.send(b"x" if b"chunked" not in start else b"")
    assert answers(got)[0] in (408, 400)
    assert time.monotonic() - begun < 2.0


# ---- secrets and logs ----

def test_secrets_are_in_no_log_and_no_answer(capfd):
    ours, token, theirs = "shim-key-123456", "tok-en-secret", "sk-ant-client-9876"
    login = "me:pass%40word-x"
    quoted = f"bad {token} {ours} {theirs} me:pass@word-x pass%40word-x bWU6cGFzc0B3b3JkLXg="
    hidden = (ours, token, theirs, "pass@word-x", "pass%40word-x", "bWU6cGFzc0B3b3JkLXg=")
    replies = [status(500, {"error": quoted}), status(401, quoted), status(404, quoted),
               text("Hel") + error_line(quoted), status(302, quoted)]
    with MockOllama(replies * 2, models="any") as mock, running_shim(
            mock.url.replace("://", f"://{login}@"), auth_token=token, log="debug",
            api_key=ours) as shim:
        mock.routes["GET", "/api/version"] = lambda answer, _: answer.json(200, {"version": quoted})
        mock.routes["GET", "/api/tags"] = lambda answer, _: answer.json(
            200, {"models": [{"name": quoted}]})
        keys = {"x-api-key": ours, "Authorization": f"Bearer {theirs}"}
        told = [shim.request("POST", "/v1/messages", {**HI, "stream": bool(n % 2)}, keys)
                for n in range(len(mock.replies))]
        told += [shim.request("GET", path, None, keys) for path in (
            "/health", "/status", "/metrics", "/v1/models", "/", f"/{ours}", f"/v1/models/{token}")]
        told += [shim.request("GET", f"/v1/{theirs}", None, {"x-api-key": theirs})]
        raw = exchange(shim.port, b"GET / HTTP/1.1\r\nHost: localhost\r\nx-api-key: %b\x01\r\n\r\n"
                       % theirs.encode())
    told_bytes = raw + b"".join(answer.data + str(answer.headers).encode() for answer in told)
    logged = "".join(capfd.readouterr())
    assert "bad [secret]" in logged
    for secret in hidden:
        assert secret.encode() not in told_bytes
        assert secret not in logged


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_nothing_from_outside_breaks_a_log_line(capfd, log_format):
    evil = "x\n12:00:00 turn 1  ok\x1b[31m\r\u2028\x85\ud800 end"
    with MockOllama([status(500, {"error": evil})], models="any") as mock, running_shim(
            mock.url, log="debug", use_requested_model="on", log_format=log_format) as shim:
        shim.messages(evil, model=evil, tools=[{"name": evil, "description": evil}], system=evil,
                      metadata={"user_id": evil})
        shim.request("GET", "/v1/models/" + "%0a%1b")
    logged = capfd.readouterr().err
    assert logged
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028]", logged)
    for line in logged.splitlines():
        assert line.startswith("{") if log_format == "json" else re.match(r"[0-9:]{8} ", line)


def test_model_text_cannot_break_out_of_the_stream():
    words = "\n\nevent: error\ndata: {}\n\n\r\r\u2028\x00event: message_stop\ndata: x\n\n"
    with MockOllama([text(words, pieces=3)], model=MODEL) as mock, running_shim(mock.url) as shim:
        answer = shim.messages()
        check_events(answer.events)
        assert joined(answer.events)[1] == ("text_delta", words)
        assert answer.data.count(b"\nevent: message_stop") == 1


# ---- load ----

def descriptors():
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def test_a_hundred_slow_streams_and_health_at_once():
    go = threading.Event()
    reply = text("Hel") + hold(go) + text("lo") + done()
    with MockOllama([reply], model=MODEL) as mock, running_shim(mock.url) as shim:
        shim.messages(max_tokens=1, messages=[{"role": "user", "content": "quota"}])
        before = threading.active_count() - mock.alive, descriptors()
        socks = [socket.create_connection(("127.0.0.1", shim.port), 10) for _ in range(400)]
        for sock in socks[:100]:
            sock.sendall(post({**HI, "stream": True}))
        mock.wait_for(100, timeout=20)
        times = []
        for _ in range(5):
            begun = time.monotonic()
            assert shim.request("GET", "/health").json["ok"]
            times.append(time.monotonic() - begun)
        assert sorted(times)[2] < 0.2, times
        assert threading.active_count() - mock.alive < before[0] + 410
        go.set()
        for sock in socks[:100]:
            got = b""
            while b"message_stop" not in got:
                got += sock.recv(65536) or b"message_stop closed"
            assert b"closed" not in got
        for sock in socks:
            sock.close()
        wait_until(lambda: threading.active_count() - mock.alive <= before[0] + 1, 10)
        wait_until(lambda: descriptors() <= before[1] + 4, 10)
        assert shim.server.gate.load == (0, 0)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit of descriptors to lower")
@pytest.mark.parametrize("most", ["r.getrlimit(r.RLIMIT_NOFILE)[1]", "2000"])
def test_few_descriptors_at_the_start_keep_nobody_out(most):
    few = f"import resource as r, runpy, sys; r.setrlimit(r.RLIMIT_NOFILE, (64, {most})); " \
          "runpy.run_path(sys.argv.pop(), run_name='__main__')"
    with MockOllama([text("ok")], model=MODEL) as mock, \
            process(mock.url, start=("-c", few, str(ROOT / "qwencode.py"))) as (_, port):
        idle = [socket.create_connection(("127.0.0.1", port), 5) for _ in range(300)]
        assert b'"text":"ok"' in exchange(port, post(HI))
        for sock in idle:
            sock.close()


def test_a_joined_request_whose_leader_is_given_up_may_ask_again():
    with MockOllama([hang()], model=MODEL) as mock, running_shim(mock.url) as shim:
        with socket.create_connection(("127.0.0.1", shim.port), 5) as sock:
            sock.sendall(post(HI, "X-Claude-Code-Session-Id: s\r\n"))
            mock.wait_for()
            exchange_ = next(iter(shim.server._joints.values()))
        assert mock.turns[0].closed_by_client.wait(5)
        wait_until(lambda: exchange_.audience.failure)
        assert exchange_.audience.failure.retry


# ---- ends ----

@contextlib.contextmanager
def process(base_url, start=(str(ROOT / "qwencode.py"),), **env):
    """The shim as a program; yields it and its port once it listens."""
    kept = {key: value for key, value in os.environ.items()
            if not key.startswith(("SHIM_", "OLLAMA_", "HOST", "PORT"))}
    with subprocess.Popen(
            [sys.executable, *start], stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, env={
                **kept, "PORT": "0", "OLLAMA_BASE_URL": base_url, "OLLAMA_MODEL": MODEL,
                "SHIM_WARM": "off", "PYTHONUNBUFFERED": "1", **env}) as running:
        try:
            port = re.search(r":([0-9]+) ->", running.stdout.readline())
            yield running, int(port.group(1))
        finally:
            if running.poll() is None:
                running.kill()


def stream_begun(port):
    """Open a stream whose first word has come; its client's buffer is small."""
    sock = socket.socket()
    sock.settimeout(10)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", port))
    sock.sendall(post({**HI, "stream": True}))
    got = b""
    while b"Hel" not in got:
        got += sock.recv(65536)
    return sock


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_streams_with_an_error_event(number, code):
    with MockOllama([text("Hel") + hang()], model=MODEL) as mock, \
            process(mock.url) as (shim, port), stream_begun(port) as sock:
        begun = time.monotonic()
        shim.send_signal(number)
        got = b""
        while piece := sock.recv(65536):
            got += piece
        assert b"event: error" in got
        assert b"being stopped" in got
        assert shim.wait(5) == code
        assert time.monotonic() - begun < 5
        assert "Traceback" not in shim.stderr.read()
        assert mock.turns[0].closed_by_client.wait(3)
        with pytest.raises(OSError, match=r"refused|reset"):
            socket.create_connection(("127.0.0.1", port), 1)


def test_a_second_interrupt_ends_at_once():
    big = text("x" * 20_000_000, pieces=1)  # waits for a client that takes nothing
    with MockOllama([text("Hel") + big + done()], model=MODEL) as mock, \
            process(mock.url) as (shim, port), stream_begun(port) as sock:
        mock.turns[0].finished.wait(5)
        while b"xxx" not in sock.recv(4096):  # now the rest waits in the shim
            pass
        shim.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            shim.wait(0.5)
        begun = time.monotonic()
        shim.send_signal(signal.SIGINT)
        assert shim.wait(5) == 130
        assert time.monotonic() - begun < 1.0
        assert "Traceback" not in shim.stderr.read()


def test_a_client_that_lags_holds_no_stop_for_longer_than_five_seconds(monkeypatch):
    monkeypatch.setattr(qwencode, "DRAIN_S", 0.2)
    with MockOllama([text("x" * 20_000_000, pieces=1) + done()], model=MODEL) as mock, \
            running_shim(mock.url) as shim, \
            socket.create_connection(("127.0.0.1", shim.port)) as sock:
        sock.sendall(post({**HI, "stream": True}))
        mock.wait_for().finished.wait(5)
        begun = time.monotonic()
        shim.server.stop()
        shim.server.finish(0.2)
        assert time.monotonic() - begun < 2


BAD_STARTS = [
    (["--port", "70000"], {}, "70000"), (["--port", "x"], {}, "x"),
    ([], {"SHIM_REQUEST_TIMEOUT_MS": "soon"}, "SHIM_REQUEST_TIMEOUT_MS"),
    ([], {"OLLAMA_BASE_URL": "http://h:99999"}, "OLLAMA_BASE_URL"),
    ([], {"HOST": "0.0.0.0"}, "SHIM_API_KEY"),  # noqa: S104
    ([], {"HOST": "203.0.113.7", "SHIM_API_KEY": "k"}, "choose others: --host, --port"),
    ([], {"HOST": "no-such-host.invalid", "SHIM_API_KEY": "k"}, "cannot listen"),
    ([], {"SHIM_LOG": "loud"}, "SHIM_LOG"),
    (["frobnicate"], {}, "choose from"),
    (["--frobnicate"], {}, "unrecognized arguments"),
    (["try"], {}, "See --help"),
    (["explain", "no-such-file"], {}, "cannot be read"),
    (["explain", __file__], {}, "holds no request"),
    (["--model", ""], {}, "--model: '' is empty"),
    ([], {"SHIM_MAX_CONCURRENT": "0"}, "SHIM_MAX_CONCURRENT"),
]


@pytest.mark.parametrize(("flags", "env", "words"), BAD_STARTS)
def test_a_bad_start_is_one_line_and_exit_2(capsys, flags, env, words):
    assert qwencode.main(flags, env) == 2
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1


def test_a_port_in_use_is_one_line_and_exit_2(quiet, capsys):
    assert qwencode.main(["--port", str(quiet.port)], {}) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "in use" in told
