#!/usr/bin/env python3
"""Measure what the shim adds to a model's answer.

    python tests/bench/relay.py
    python tests/bench/relay.py --against "node src/server.mjs" --cwd ../QwenCode

Four columns are measured by turns in one run: a raw byte relay (the floor: two
threads a connection that understand nothing), this shim over /api/chat, this shim
verbatim (render, then raw generate), and with --against any other shim that takes
HOST, PORT and OLLAMA_BASE_URL. The last column is the median of the rounds' own
ratios, this shim over /api/chat against the other: only ratios inside one run
count, since the speed of a machine drifts.

This one process, with one event loop and one clock, is the model's server and all
the clients. Answers are rendered before a clock starts; each token is an HTTP chunk
of its own, as Ollama flushes it. CPU is the process clock of the shim and its
children. Delays are from the send of a token to its arrival at the client and hold
the bench's own share (the line "no shim" under the table); times to the first delta
are less what the same request takes without a shim. Requests have the shape of
Claude Code's: 24 tools of its sizes with own text, 77 KB; a session of 78 messages
and 1 MB in which each request ends in another sentence.
"""
from __future__ import annotations

import argparse
import contextlib
import heapq
import itertools
import json
import math
import os
import platform
import random
import re
import select
import selectors
import shlex
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

ROOT = Path(__file__).resolve().parents[2]
MODEL = "bench-coder:14b"
# Seconds for all figures; the last rounds of a slow one are left out.
LIMIT_S = 80
# More tokens than the longest request here has, so that no shim refuses it.
WINDOW = 1 << 24
CREATED = "2026-01-01T00:00:00.000000000Z"
now = time.perf_counter

RELAY = """
import os, socket, threading
def pipe(source, sink):
    try:
        while True:
            data = source.recv(65536)
            if not data:
                break
            sink.sendall(data)
    except OSError:
        pass
    for end in (source, sink):
        try:
            end.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
host, port = os.environ["OLLAMA_BASE_URL"].split("//")[1].split(":")
server = socket.create_server((os.environ["HOST"], int(os.environ["PORT"])), backlog=512)
while True:
    client = server.accept()[0]
    upstream = socket.create_connection((host, int(port)))
    for end in (client, upstream):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    threading.Thread(target=pipe, args=(client, upstream), daemon=True).start()
    threading.Thread(target=pipe, args=(upstream, client), daemon=True).start()
"""


class BenchError(Exception):
    """A figure could not be measured; the message says why."""


# ============================== event loop ==============================


class Loop:
    """Sockets and timers of one thread."""

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self.timers: List[Tuple[float, int, Callable[[], None]]] = []
        self.count = 0

    def call_at(self, when: float, callback: Callable[[], None]) -> None:
        self.count += 1
        heapq.heappush(self.timers, (when, self.count, callback))

    def wait(self, seconds: float) -> List[Any]:
        """Wait for sockets; epoll itself rounds up to a millisecond, select does not."""
        descriptor = getattr(self.selector, "fileno", None)
        if descriptor is None or seconds <= 0:
            return self.selector.select(max(seconds, 0))
        select.select([descriptor()], [], [], seconds)
        return self.selector.select(0)

    def run(self, done: Callable[[], bool], seconds: float, what: str = "") -> None:
        """Run until done() holds; BenchError after so many seconds."""
        deadline = now() + seconds
        while not done():
            time_now = now()
            if time_now > deadline:
                raise BenchError(f"{what or 'nothing'} after {seconds:.0f} s")
            while self.timers and self.timers[0][0] <= time_now:
                heapq.heappop(self.timers)[2]()
            pause = min(self.timers[0][0] if self.timers else deadline, deadline) - now()
            for key, mask in self.wait(min(pause, 0.2)):
                key.data.ready(mask)

    def pause(self, seconds: float) -> None:
        end = now() + seconds
        self.call_at(end, lambda: None)
        self.run(lambda: now() >= end, seconds + 5)


class Connection:
    """A socket of the loop: sends what fits, keeps the rest, hands on what comes."""

    def __init__(self, loop: Loop, sock: socket.socket,
                 received: Callable[[bytes], None], closed: Callable[[], None]) -> None:
        self.loop, self.sock, self.received, self.closed = loop, sock, received, closed
        self.rest = memoryview(b"")
        self.open = True
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        loop.selector.register(sock, selectors.EVENT_READ, self)

    def send(self, data: bytes) -> None:
        self.rest = memoryview(bytes(self.rest) + data if self.rest else data)
        self.flush()

    def flush(self) -> None:
        waited = bool(self.rest)
        try:
            while self.rest:
                self.rest = self.rest[self.sock.send(self.rest):]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self.close()
            return
        if waited:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self.rest else 0)
            if self.loop.selector.get_key(self.sock).events != events:
                self.loop.selector.modify(self.sock, events, self)

    def ready(self, mask: int) -> None:
        if mask & selectors.EVENT_WRITE:
            self.flush()
        if not self.open or not mask & selectors.EVENT_READ:
            return
        try:
            data = self.sock.recv(1 << 18)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if data:
            self.received(data)
        else:
            self.close()

    def close(self) -> None:
        if self.open:
            self.open = False
            self.loop.selector.unregister(self.sock)
            self.sock.close()
            self.closed()


# ============================== the model's server ==============================


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def answer(dialect: str, text: str, **end: Any) -> bytes:
    """A line of /api/chat ("message") or /api/generate ("response"), as Ollama writes it."""
    said: Any = {"role": "assistant", "content": text} if dialect == "message" else text
    line = {"model": MODEL, "created_at": CREATED, dialect: said, "done": bool(end), **end}
    return json.dumps(line, separators=(",", ":")).encode() + b"\n"


class Script:
    """What the model answers to the next requests: one stream for each.

    Token i of stream s is " wSSSIIIII", so that whoever sees it knows when it was
    sent. groups[dialect][s] are the writes of a stream, `interval` seconds apart.
    """

    def __init__(self, streams: int, tokens: int, interval: float, writes: str = "each",
                 text: Callable[[int, int], str] = lambda s, i: f" w{s:03d}{i:05d}") -> None:
        self.interval, self.tokens, self.started = interval, tokens, 0
        self.texts = ["".join(text(s, i) for i in range(tokens)) for s in range(streams)]
        self.sent = [[0.0] * (tokens + 2) for _ in range(streams)]
        self.groups = {
            dialect: [self.cut(dialect, s, text, writes) for s in range(streams)]
            for dialect in ("message", "response")
        }

    def cut(self, dialect: str, stream: int, text: Callable[[int, int], str],
            writes: str) -> List[bytes]:
        """Cut a stream into writes: each token, first and rest, or all at once."""
        lines = [chunk(answer(dialect, text(stream, i))) for i in range(self.tokens)]
        lines.append(chunk(answer(
            dialect, "", done_reason="stop", total_duration=900000000, load_duration=20000000,
            prompt_eval_count=19000, prompt_eval_duration=300000000,
            eval_count=self.tokens, eval_duration=500000000)) + b"0\r\n\r\n")
        if writes == "all":
            return [b"".join(lines)]
        if writes == "first, rest":
            return [lines[0], b"".join(lines[1:])]
        return [*lines[:-2], lines[-2] + lines[-1]]


HEAD = (b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\n"
        b"Date: Thu, 01 Jan 2026 00:00:00 GMT\r\nTransfer-Encoding: chunked\r\n\r\n")
DETAILS = {"parent_model": "", "format": "gguf", "family": "qwen2", "families": ["qwen2"],
           "parameter_size": "14.8B", "quantization_level": "Q4_K_M"}
CARD = {"name": MODEL, "model": MODEL, "size": 9000000000, "digest": "b" * 64,
        "details": DETAILS}
TEMPLATE = ("{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
            "<|im_end|>\n{% endfor %}<|im_start|>assistant\n")
CANNED: Dict[str, Any] = {
    "/api/version": {"version": "0.33.0"},
    "/api/tags": {"models": [{**CARD, "modified_at": CREATED}]},
    "/api/ps": {"models": [{**CARD, "expires_at": "2318-01-01T00:00:00Z",
                            "size_vram": 9000000000, "context_length": WINDOW}]},
    "/api/show": {"modelfile": f"FROM {MODEL}\nTEMPLATE {{{{ .Prompt }}}}\n",
                  "template": TEMPLATE, "details": DETAILS,
                  "capabilities": ["completion", "tools"], "modified_at": CREATED,
                  "model_info": {"general.architecture": "qwen2",
                                 "general.parameter_count": 14770033664,
                                 "qwen2.context_length": WINDOW}},
    "/health": {"ok": True},
}
TOOLS_HEAD = ("# Tools\n\nYou may call functions. Signatures within <tools></tools>:\n<tools>\n{}"
              "\n</tools>\n\nAnswer with <tool_call>\n{{\"name\": <name>, \"arguments\": <args>}}"
              "\n</tool_call>")


def chatml(body: Dict[str, Any]) -> str:
    """Render a chat body to ChatML, as _debug_render_only shows it."""
    messages = list(body["messages"])
    tools = "\n".join(json.dumps(tool) for tool in body.get("tools") or ())
    if tools:
        system = messages.pop(0)["content"] + "\n\n" if messages[0]["role"] == "system" else ""
        messages.insert(0, {"role": "system", "content": system + TOOLS_HEAD.format(tools)})
    parts = []
    for message in messages:
        role, text = message["role"], message.get("content") or ""
        for call in message.get("tool_calls") or ():
            text += "\n<tool_call>\n" + json.dumps(call["function"]) + "\n</tool_call>"
        if role == "tool":
            role, text = "user", f"<tool_response>\n{text}\n</tool_response>"
        parts.append(f"<|im_start|>{role}\n{text}<|im_end|>\n")
    return "".join(parts) + "<|im_start|>assistant\n"


class Upstream:
    """The model's server: plays `script` to each request that wants an answer."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.script = Script(0, 0, 0)
        self.rendered: Dict[int, bytes] = {}
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.listener.setblocking(False)
        self.address = self.listener.getsockname()
        loop.selector.register(self.listener, selectors.EVENT_READ, self)

    def ready(self, _mask: int) -> None:
        Exchange(self, self.listener.accept()[0])

    def render(self, body: bytes) -> bytes:
        """The answer to a render request.

        A long one is rendered once for all requests of about its length: what the
        model's server takes for it is not what is measured.
        """
        key = len(body) >> 15
        if not key or key not in self.rendered:
            prompt = chatml(json.loads(body))
            written = json.dumps({
                "model": MODEL, "created_at": CREATED, "message": {"role": "", "content": ""},
                "done": False, "_debug_info": {"rendered_template": prompt}},
                separators=(",", ":"), ensure_ascii=False)
            for sign in "<>&":  # as Go writes it
                written = written.replace(sign, f"\\u{ord(sign):04x}")
            self.rendered[key] = written.encode()
        return self.rendered[key]

    def play(self, exchange: Exchange, dialect: str) -> None:
        """Start the script's next stream on a connection."""
        script, stream = self.script, self.script.started
        if stream >= len(script.texts):
            exchange.reply(answer(dialect, "ok", done_reason="stop"))
            return
        script.started += 1
        groups, sent, start = script.groups[dialect][stream], script.sent[stream], now()

        def write(index: int) -> None:
            if not exchange.connection.open:
                return
            sent[index] = now()
            exchange.connection.send((b"" if index else HEAD) + groups[index])
            if index + 1 < len(groups):
                self.loop.call_at(start + (index + 1) * script.interval,
                                  lambda: write(index + 1))

        write(0)


class Exchange:
    """One connection of a shim to the model's server: request after request."""

    LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)

    def __init__(self, upstream: Upstream, sock: socket.socket) -> None:
        self.upstream, self.parts, self.size, self.wanted = upstream, [], 0, -1
        self.connection = Connection(upstream.loop, sock, self.received, lambda: None)

    def received(self, data: bytes) -> None:
        self.parts.append(data)
        self.size += len(data)
        if self.wanted < 0:
            head = b"".join(self.parts).partition(b"\r\n\r\n")
            if not head[1]:
                return
            length = self.LENGTH.search(head[0])
            self.wanted = len(head[0]) + 4 + (int(length.group(1)) if length else 0)
            self.chunked = b"chunked" in head[0].lower()
        ended = data.endswith(b"0\r\n\r\n") if self.chunked else self.size >= self.wanted
        if ended:
            head, _, body = b"".join(self.parts).partition(b"\r\n\r\n")
            if self.chunked:
                body = dechunked(body)
            self.parts, self.size, self.wanted = [], 0, -1
            self.answer(head.split(b" ", 2)[1].decode().partition("?")[0], body)

    def answer(self, path: str, body: bytes) -> None:
        if path in CANNED:
            self.reply(json.dumps(CANNED[path]).encode())
        elif path not in ("/api/chat", "/api/generate", "/v1/messages"):
            self.reply(b"Ollama is running")
        elif b'"_debug_render_only"' in body:
            self.reply(self.upstream.render(body))
        elif self.is_load(body):
            dialect = "response" if path == "/api/generate" else "message"
            self.reply(answer(dialect, "", done_reason="load"))
        else:
            self.upstream.play(self, "response" if path == "/api/generate" else "message")

    @staticmethod
    def is_load(body: bytes) -> bool:
        """Whether this only loads or warms the model."""
        if len(body) < 4096:
            asked = json.loads(body)
            if not (asked.get("messages") or asked.get("prompt")):
                return True
        return b'"num_predict":1}' in body or b'"num_predict":1,' in body

    def reply(self, body: bytes) -> None:
        self.connection.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                             b"Content-Length: %d\r\n\r\n%b" % (len(body), body))


def dechunked(data: bytes) -> bytes:
    """Join the chunks of a whole chunked body."""
    parts, at = [], 0
    while True:
        end = data.index(b"\r\n", at)
        size = int(data[at:end].partition(b";")[0], 16)
        if not size:
            return b"".join(parts)
        parts.append(data[end + 2:end + 2 + size])
        at = end + 4 + size


# ============================== the client ==============================


class Client:
    """One client of a shim; keeps its connection unless told to take a fresh one."""

    MARK = re.compile(rb" w(\d{3})(\d{5})")

    def __init__(self, bench: Bench, address: Tuple[str, int]) -> None:
        self.bench, self.address = bench, address
        self.session = f"bench-{next(bench.sessions)}"
        self.connection: Optional[Connection] = None
        self.finished = True

    def connect(self) -> None:
        sock = socket.create_connection(self.address, timeout=10)
        self.connection = Connection(self.bench.loop, sock, self.received, self.closed)

    def start(self, body: bytes, scan: bool = True) -> None:
        """Send a request; with scan, note when each token arrives."""
        self.parts: List[bytes] = []
        self.delays: List[float] = []
        self.scan, self.rest, self.chunked, self.wanted = scan, b"", False, -1
        self.first_at = self.last_at = self.head_at = 0.0
        self.finished = False
        self.script = self.bench.upstream.script
        if self.connection is None or not self.connection.open:
            self.connect()
        head = (f"POST /v1/messages?beta=true HTTP/1.1\r\nHost: 127.0.0.1:{self.address[1]}\r\n"
                "Content-Type: application/json\r\nAccept: application/json\r\n"
                "User-Agent: claude-cli/2.1.330 (external, cli)\r\nx-app: cli\r\n"
                "anthropic-version: 2023-06-01\r\nx-api-key: bench\r\n"
                f"X-Claude-Code-Session-Id: {self.session}\r\n"
                f"Content-Length: {len(body)}\r\n\r\n").encode()
        self.sent_at = now()
        self.connection.send(head + body)

    def received(self, data: bytes) -> None:
        self.last_at = now()
        self.parts.append(data)
        if not self.head_at:
            self.begin()
        if self.scan:
            self.look(data)
        tail = data if len(data) > 6 else b"".join(self.parts[-7:])
        if self.chunked:
            self.finished = tail.endswith(b"0\r\n\r\n")
        elif self.wanted >= 0:
            self.finished = sum(map(len, self.parts)) >= self.wanted

    def begin(self) -> None:
        head, _, _ = b"".join(self.parts).partition(b"\r\n\r\n")
        self.head_at = self.last_at
        if b" 200 " not in head[:16]:
            raise BenchError(f"answered {b''.join(self.parts)[:400]!r}")
        length = Exchange.LENGTH.search(head)
        self.chunked = b"chunked" in head.lower()
        self.wanted = len(head) + 4 + int(length.group(1)) if length else -1

    def look(self, data: bytes) -> None:
        """Note the delay of each token in what has just arrived."""
        data = self.rest + data
        end = 0
        for mark in self.MARK.finditer(data):
            end = mark.end()
            sent = self.script.sent[int(mark.group(1))][int(mark.group(2))]
            self.delays.append(self.last_at - sent)
        if end and not self.first_at:
            self.first_at = self.last_at
        self.rest = data[max(end, len(data) - 9):]

    def closed(self) -> None:
        self.connection = None
        self.finished = True

    def close(self) -> None:
        if self.connection:
            self.connection.close()

    def finish(self, seconds: float = 30) -> None:
        self.bench.loop.run(lambda: self.finished, seconds, "no whole answer")

    def text(self) -> str:
        """The text of the answer, from events or from the upstream's lines."""
        _, _, body = b"".join(self.parts).partition(b"\r\n\r\n")
        try:
            body = dechunked(body) if self.chunked else body
        except ValueError:
            return ""
        if b"content_block_delta" not in body:
            return "".join(json.loads(line)["message"]["content"] for line in body.splitlines())
        deltas = (json.loads(line[6:]) for line in body.split(b"\n")
                  if line.startswith(b"data: ") and b'"text_delta"' in line)
        return "".join(delta["delta"]["text"] for delta in deltas)


# ============================== request bodies ==============================

WORDS = ("the file holds a list of names and each row tells which part reads it first so that "
         "nothing is lost when a user leaves in the middle of an answer — see café.py: "
         "def load(path): return open(path).read() # keeps \"quotes\" and <tags> as they are "
         "if size < limit and name != '': items.append({'name': name, 'size': size}) \n "
         "\tfor index, value in enumerate(values): total += value \n ").split(" ")
TOOL_BYTES = {
    "Agent": 2507, "Bash": 2690, "CronCreate": 4053, "CronDelete": 427, "CronList": 277,
    "Edit": 966, "EnterWorktree": 3761, "ExitWorktree": 2511, "NotebookEdit": 1627,
    "Read": 1640, "ReportFindings": 1838, "ScheduleWakeup": 3718, "SendMessage": 1169,
    "Skill": 2112, "TaskCreate": 2816, "TaskGet": 1018, "TaskList": 1189, "TaskOutput": 1552,
    "TaskStop": 537, "TaskUpdate": 3514, "WebFetch": 747, "WebSearch": 840, "Workflow": 21010,
    "Write": 639,
}
PARAMETERS = {
    "Bash": ("command", "timeout", "description"), "Read": ("file_path", "offset", "limit"),
    "Edit": ("file_path", "old_string", "new_string"), "Write": ("file_path", "content"),
}
# Not one of them asks for an action: a shim may hold an answer back after such a request.
QUESTION = "And what does the part with the number {:06d} mean for the reader?"
ACTION = "create a file called notes-{:06d}.txt with the text hello"


def prose(size: int, seed: int) -> str:
    """About so many bytes of text and code, always the same for a seed."""
    source = random.Random(seed)
    return " ".join(source.choices(WORDS, k=size // 6 + 8))[:size]


def tool(name: str, size: int) -> Dict[str, Any]:
    """A tool whose JSON has about so many bytes."""
    names = PARAMETERS.get(name, ("subject", "detail", "options"))
    share = max(size // 16, 8)
    properties = {key: {"type": "string", "description": prose(share, index)}
                  for index, key in enumerate(names)}
    made = {"name": name, "description": "", "input_schema": {
        "$schema": "https://json-schema.org/draft/2020-12/schema", "type": "object",
        "properties": properties, "required": list(names[:1]), "additionalProperties": False}}
    made["description"] = prose(max(size - len(json.dumps(made)), 8) * 9 // 10, size)
    return made


def body_of(messages: Sequence[Dict[str, Any]], tools: Iterable[str], system: int) -> bytes:
    """A request body with Claude Code's keys in its order."""
    return json.dumps({
        "model": "bench", "messages": messages,
        "system": [{"type": "text", "text": "You are a coding agent."},
                   {"type": "text", "text": prose(system, 1),
                    "cache_control": {"type": "ephemeral"}}],
        "tools": [tool(name, TOOL_BYTES[name]) for name in tools],
        "metadata": {"user_id": "{\"device_id\":\"bench\"}"}, "max_tokens": 32000,
        "output_config": {"effort": "high"}, "stream": True,
    }, ensure_ascii=False, separators=(",", ":")).encode()


def first_turn(question: str) -> List[Dict[str, Any]]:
    return [{"role": "user", "content": [
        {"type": "text", "text": f"<system-reminder>{prose(280, 2)}</system-reminder>"},
        {"type": "text", "text": question, "cache_control": {"type": "ephemeral"}}]}]


def session(size: int, question: str) -> List[Dict[str, Any]]:
    """78 messages: a question, 37 tool calls with their results, another question."""
    messages = [*first_turn(QUESTION.format(0)), {"role": "system", "content": prose(5600, 3)}]
    for index in range(37):
        call = f"toolu_{index:024d}"
        messages.append({"role": "assistant", "content": [
            {"type": "text", "text": prose(200, index)},
            {"type": "tool_use", "id": call, "name": "Read",
             "input": {"file_path": f"/home/user/project/part{index}.py"}}]})
        messages.append({"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": call,
             "content": f"@@@@@@\n{prose(size // 37, index + 100)}"}]})
    messages.append({"role": "assistant", "content": [{"type": "text", "text": "It is."}]})
    messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
    return messages


class Bodies:
    """Requests, rendered once; `next` gives each its own last sentence."""

    def __init__(self) -> None:
        self.count = 0
        mark = QUESTION.replace("{:06d}", "######")
        first = [*first_turn(mark), {"role": "system", "content": prose(5600, 3)}]
        self.kinds = {
            "first": body_of(first, TOOL_BYTES, 5800),
            "long": body_of(session(900_000, mark), TOOL_BYTES, 5800),
            "longest": body_of(session(9_850_000, mark), TOOL_BYTES, 5800),
            "small": body_of(first_turn(mark), PARAMETERS, 1500),
            "action": body_of(first_turn(ACTION.replace("{:06d}", "######")), PARAMETERS, 1500),
        }

    def next(self, kind: str, cold: bool = False) -> bytes:
        """A request of the kind; cold ones share no tool result with an earlier one."""
        self.count += 1
        body = self.kinds[kind].replace(b"######", b"%06d" % self.count)
        return body.replace(b"@@@@@@", b"%06d" % (self.count if cold else 0))


# ============================== the shims ==============================


class Shim(NamedTuple):
    """A column of the table: how to start what it measures; no command is no shim."""

    name: str
    label: str
    command: Tuple[str, ...]
    cwd: Path
    settings: Dict[str, str]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


class Running:
    """A started shim; `ready_s` is the time from its start to the first /health answer."""

    def __init__(self, bench: Bench, shim: Shim) -> None:
        self.bench, self.shim = bench, shim
        self.process: Optional[subprocess.Popen[bytes]] = None
        self.address = bench.upstream.address
        self.pids: List[int] = []
        self.ready_s = 0.0
        if shim.command:
            self.launch()
        self.client = Client(bench, self.address)

    def launch(self) -> None:
        self.address = ("127.0.0.1", free_port())
        # Without the runtimes' own settings too: NODE_EXTRA_CA_CERTS doubles a start of Node.
        kept = {key: value for key, value in os.environ.items()
                if not key.startswith(("SHIM_", "OLLAMA_", "QWENCODE_", "NODE_", "PYTHON"))
                and not key.lower().endswith("_proxy")}
        host, port = self.bench.upstream.address
        environment = {**kept, "HOST": "127.0.0.1", "PORT": str(self.address[1]),
                       "OLLAMA_BASE_URL": f"http://{host}:{port}", "OLLAMA_MODEL": MODEL,
                       "OLLAMA_NUM_CTX": str(WINDOW), **self.shim.settings}
        started = now()
        self.process = subprocess.Popen(
            self.shim.command, cwd=self.shim.cwd, env=environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.wait_for_health()
        self.ready_s = now() - started
        self.pids = descendants(self.process.pid)

    def wait_for_health(self) -> None:
        """Ask until something answers; the loop runs, so the shim may ask the upstream."""
        answered: List[bytes] = []
        deadline = now() + 30
        while not answered:
            if now() > deadline or (self.process and self.process.poll() is not None):
                raise BenchError(f"{self.shim.label} did not start: "
                                 f"{shlex.join(self.shim.command)}")
            self.bench.loop.pause(0.0005)
            try:
                sock = socket.create_connection(self.address, timeout=5)
            except OSError:
                continue
            closed: List[bool] = []
            probe = Connection(self.bench.loop, sock, answered.append,
                               lambda closed=closed: closed.append(True))
            probe.send(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n" % self.address[1])
            self.bench.loop.run(lambda closed=closed: bool(answered or closed), 20, "no /health")
            probe.close()

    def cpu_s(self) -> float:
        return sum(map(cpu_seconds, self.pids)) if self.pids else math.nan

    def rss_mb(self) -> float:
        return sum(map(resident_mb, self.pids)) if self.pids else math.nan

    def ask(self, kind: str, fresh: bool = False, cold: bool = False,
            scan: bool = True) -> Client:
        """Send a request and wait for the whole answer."""
        if fresh:
            self.client.close()
        body = self.bench.bodies.next(kind, cold)
        self.client.start(body, scan)
        self.client.finish()
        return self.client

    def stop(self) -> None:
        self.client.close()
        if self.process:
            self.process.terminate()
            try:
                self.process.wait(8)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


LINUX = sys.platform.startswith("linux")


def descendants(pid: int) -> List[int]:
    """A process and its children, where the system tells."""
    found = [pid]
    for parent in found:
        for listing in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):  # a thread that has ended meanwhile
                found += [int(child) for child in listing.read_text().split()]
    return found


def cpu_seconds(pid: int) -> float:
    """CPU time of a process with all its threads.

    Linux lets anyone read another process' clock in nanoseconds by an id made of its
    pid (clock_getcpuclockid); ps elsewhere counts hundredths of a second.
    """
    if LINUX:
        return time.clock_gettime(((~pid) << 3) | 2)
    if os.name == "nt":
        return math.nan
    parts = ps_column(pid, "time").replace("-", ":").split(":")
    return sum(float(part) * 60 ** power for power, part in enumerate(reversed(parts)))


def resident_mb(pid: int) -> float:
    if LINUX:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
    if os.name == "nt":
        return math.nan
    return int(ps_column(pid, "rss")) * 1024 / 1e6


def ps_column(pid: int, column: str) -> str:
    return subprocess.run(
        ["ps", "-o", f"{column}=", "-p", str(pid)], check=True,
        capture_output=True, text=True).stdout.strip()


# ============================== the figures ==============================

Values = Dict[str, float]


class Bench:
    """What every figure shares."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.upstream = Upstream(self.loop)
        self.bodies = Bodies()
        self.sessions = itertools.count()

    def play(self, *args: Any, **more: Any) -> Script:
        self.upstream.script = Script(*args, **more)
        return self.upstream.script


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)] if ordered else math.nan


def start(bench: Bench, running: Running) -> Values:
    if not running.process:
        return {}
    again = Running(bench, running.shim)
    try:
        return {"start_ms": again.ready_s * 1e3, "start_cpu_ms": again.cpu_s() * 1e3}
    finally:
        again.stop()


def memory(bench: Bench, running: Running) -> Values:
    if not running.process:
        return {}
    again = Running(bench, running.shim)
    try:
        for _ in range(20):
            bench.play(1, 16, 0.001, "first, rest")
            again.ask("first")
        return {"rss_mb": again.rss_mb()}
    finally:
        again.stop()


def idle(bench: Bench, all_running: Sequence[Running]) -> List[Values]:
    before = [running.cpu_s() for running in all_running]
    bench.loop.pause(4)
    return [{"idle_ms_s": (running.cpu_s() - cpu) * 1e3 / 4}
            for running, cpu in zip(all_running, before)]


def requests(kind: str, count: int, fresh: bool) -> Callable[[Bench, Running], Values]:
    """Time to the first delta and CPU of requests one after another."""
    name = f"{kind}_{'fresh' if fresh else 'kept'}"

    def measure(bench: Bench, running: Running) -> Values:
        times, cpu = [], 0.0
        for _ in range(count):
            bench.play(1, 16, 0.002, "first, rest")
            before = running.cpu_s()
            client = running.ask(kind, fresh)
            cpu += running.cpu_s() - before
            times.append(client.first_at - client.sent_at)
        return {f"{name}_ms": statistics.median(times) * 1e3,
                f"{name}_cpu_ms": cpu * 1e3 / count}

    return measure


def burst(bench: Bench, running: Running) -> Values:
    tokens = 20_000
    script = bench.play(1, tokens, 0, "all")
    before = running.cpu_s()
    client = running.ask("small", scan=False)
    cpu = running.cpu_s() - before
    whole = client.text() == script.texts[0]
    return {"burst_cpu_us": cpu * 1e6 / tokens, "burst_whole": 100.0 * whole,
            "burst_k_s": tokens / (client.last_at - client.head_at + 1e-9) / 1e3}


def paced(bench: Bench, running: Running) -> Values:
    tokens = 2_000
    bench.play(1, tokens, 0.0005)
    before = running.cpu_s()
    client = running.ask("small")
    return {"paced_cpu_us": (running.cpu_s() - before) * 1e6 / tokens,
            "paced_us": percentile(client.delays, 0.5) * 1e6}


def single(bench: Bench, all_running: Sequence[Running]) -> List[Values]:
    """One stream through each shim, all in the same seconds."""
    tokens, interval = 120, 0.02
    bench.play(len(all_running), tokens, interval)
    before = [running.cpu_s() for running in all_running]
    for running in all_running:
        running.client.start(bench.bodies.next("small"))
        bench.loop.pause(interval / len(all_running))
    for running in all_running:
        running.client.finish()
    return [{"single_us": percentile(running.client.delays, 0.5) * 1e6,
             "single_p99_us": percentile(running.client.delays, 0.99) * 1e6,
             "single_cpu_us": (running.cpu_s() - cpu) * 1e6 / tokens}
            for running, cpu in zip(all_running, before)]


def streams(count: int, seconds: float) -> Callable[[Bench, Running], Values]:
    """Many streams of 50 tokens a second at once."""

    def measure(bench: Bench, running: Running) -> Values:
        tokens = int(50 * seconds)
        script = bench.play(count, tokens, 0.02)
        clients = [Client(bench, running.address) for _ in range(count)]
        before, memories = running.cpu_s(), []
        for client in clients:
            client.start(bench.bodies.next("small"))
            bench.loop.pause(0.02 / count)
        while not all(client.finished for client in clients):
            bench.loop.pause(seconds / 4)
            memories.append(running.rss_mb())
        cpu = running.cpu_s() - before
        delays = [delay for client in clients for delay in client.delays]
        whole = sorted(client.text() for client in clients) == sorted(script.texts)
        complete = 100.0 if whole else 100.0 * sum(
            client.text() in script.texts for client in clients) / count
        for client in clients:
            client.close()
        name = f"s{count}"
        return {f"{name}_whole": complete, f"{name}_us": percentile(delays, 0.5) * 1e6,
                f"{name}_p99_us": percentile(delays, 0.99) * 1e6,
                f"{name}_cpu_us": cpu * 1e6 / (count * tokens), f"{name}_rss_mb": max(memories)}

    return measure


def stall(bench: Bench, running: Running) -> Values:
    """The longest delay of a token while another client sends 1 MB requests."""
    tokens, interval = 240, 0.005
    bench.play(1, tokens, interval)
    stream = Client(bench, running.address)
    stream.start(bench.bodies.next("small"))
    bench.loop.run(lambda: bool(stream.first_at), 10, "no first token")
    while not stream.finished:
        bench.play(1, 16, 0.002, "first, rest")
        running.ask("long", scan=False)
        bench.loop.pause(0.03)
    stream.close()
    return {"stall_ms": max(stream.delays) * 1e3}


HELD = ("I ", "would ", "put ", "it ", "so: ", "if ", "a ", "<b ", "and ", "{x: ", "1}, ", "then ",
        "\"name\": ", "is ", "`read`. ", "</p> ", "<to ", "[1, ", "2] ", "done. ")


def prose_after_action(bench: Bench, all_running: Sequence[Running]) -> List[Values]:
    """How long prose is held after a request that could become a call.

    A token that is never shown counts as held to the end of the answer.
    """
    tokens, interval = 60, 0.02
    bench.play(len(all_running), tokens, interval,
               text=lambda s, i: f"{HELD[i % len(HELD)]} w{s:03d}{i:05d}")
    for running in all_running:
        running.client.start(bench.bodies.next("action"))
        bench.loop.pause(interval / len(all_running))
    for running in all_running:
        running.client.finish()
    return [{"held_intervals": max([(tokens - 1) * interval] * (len(one.delays) < tokens)
                                   + one.delays) / interval}
            for one in (running.client for running in all_running)]


def cold(bench: Bench, running: Running) -> Values:
    """CPU of requests of which no message was seen before."""
    spent = {}
    for kind, count in (("long", 3), ("longest", 1)):
        cpu = 0.0
        for _ in range(count):
            bench.play(1, 16, 0.002, "first, rest")
            before = running.cpu_s()
            running.ask(kind, cold=True, scan=False)
            cpu += (running.cpu_s() - before) * 1e3 / count
        spent[kind] = cpu
    return {"cold_ms": spent["long"], "coldest_ms": spent["longest"],
            "growth": spent["longest"] / spent["long"]}


class Figure(NamedTuple):
    """A row of the plan: together=True measures all shims in the same seconds."""

    name: str
    measure: Callable[..., Any]
    rounds: int
    together: bool = False


FIGURES: Tuple[Figure, ...] = (
    Figure("start", start, 7),
    Figure("memory", memory, 3),
    Figure("idle", idle, 1, together=True),
    Figure("kept", requests("first", 8, fresh=False), 7),
    Figure("fresh", requests("first", 8, fresh=True), 7),
    Figure("long", requests("long", 4, fresh=False), 5),
    Figure("burst", burst, 5),
    Figure("paced", paced, 3),
    Figure("single", single, 3, together=True),
    Figure("streams50", streams(50, 2.5), 2),
    Figure("streams200", streams(200, 2.0), 2),
    Figure("stall", stall, 3),
    Figure("prose", prose_after_action, 2, together=True),
    Figure("cold", cold, 3),
)
# Name, label, whether the value holds the time that the request takes without a shim.
ROWS: Tuple[Tuple[str, str, bool], ...] = (
    ("start_ms", "start to first `/health` answer, ms", False),
    ("start_cpu_ms", "CPU until then, ms", False),
    ("rss_mb", "memory after 20 requests (RSS), MB", False),
    ("idle_ms_s", "idle CPU, ms/s", False),
    ("first_kept_ms", "added time to first delta, 77 KB, kept connection, p50 ms", True),
    ("first_fresh_ms", "… fresh connection, p50 ms", True),
    ("first_kept_cpu_ms", "CPU per 77 KB request, ms", False),
    ("long_kept_ms", "added time to first delta, 1 MB session, p50 ms", True),
    ("long_kept_cpu_ms", "CPU per 1 MB request, ms", False),
    ("burst_cpu_us", "burst of 20,000 chunks: CPU per chunk, µs", False),
    ("burst_k_s", "… thousand chunks per second (more is better)", False),
    ("burst_whole", "… text complete, %", False),
    ("paced_cpu_us", "2,000 chunks/s, one a write: CPU per chunk, µs", False),
    ("paced_us", "… delay p50, µs", False),
    ("single_us", "one stream, 50 tokens/s: delay p50, µs", False),
    ("single_p99_us", "… delay p99, µs", False),
    ("single_cpu_us", "… CPU per token, µs", False),
    ("s50_cpu_us", "50 streams: CPU per token, µs", False),
    ("s50_us", "… delay p50, µs", False),
    ("s50_p99_us", "… delay p99, µs", False),
    ("s200_whole", "200 streams: complete, %", False),
    ("s200_us", "… delay p50, µs", False),
    ("s200_p99_us", "… delay p99, µs", False),
    ("s200_cpu_us", "… CPU per token, µs", False),
    ("s200_rss_mb", "… memory (RSS), MB", False),
    ("stall_ms", "a stream beside 1 MB requests: longest delay, ms", False),
    ("held_intervals", "prose while a call is possible: longest hold, token intervals", False),
    ("cold_ms", "CPU of a 1 MB request not seen before, ms", False),
    ("coldest_ms", "… of a 10 MB request, ms", False),
    ("growth", "… 10 MB over 1 MB", False),
)

# Values of every round: results[row][column] = [round 1, round 2, ...].
Results = Dict[str, Dict[str, List[float]]]


def measure_figure(bench: Bench, figure: Figure, shims: Sequence[Shim], rounds: int,
                   due: float, results: Results) -> None:
    """Start each shim anew, warm it, and measure by turns.

    After `due` no further round begins: a busy machine gets fewer.
    """
    running: List[Running] = []
    try:
        for shim in shims:
            running.append(Running(bench, shim))
        if figure.name not in ("start", "memory"):
            warm(bench, running)
        for turn in range(rounds):
            if turn and now() > due:
                break
            order = running[turn % len(running):] + running[:turn % len(running)]
            values = (figure.measure(bench, order) if figure.together
                      else [figure.measure(bench, one) for one in order])
            for one, found in zip(order, values):
                for row, value in found.items():
                    if not math.isnan(value):
                        results.setdefault(row, {}).setdefault(one.shim.name, []).append(value)
    finally:
        for one in running:
            one.stop()


def warm(bench: Bench, all_running: Sequence[Running]) -> None:
    """Requests before the clock: caches, compilers and connections get ready."""
    for kind, count in (("first", 20), ("small", 5), ("action", 2), ("long", 2)):
        for running in all_running:
            for _ in range(count):
                bench.play(1, 16, 0.0005, "first, rest")
                running.ask(kind)


# ============================== the report ==============================


def less_direct(results: Results, row: str) -> Dict[str, List[float]]:
    """Take away what the same request took in the same round without a shim."""
    columns = results[row]
    direct = columns.get("direct", [])
    return {name: [max(value - base, 0.0) for value, base in zip(values, direct)]
            for name, values in columns.items() if name != "direct"}


def written(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 0.01 or not value else f"{value:.1g}"


def ratio(ours: Sequence[float], other: Sequence[float]) -> str:
    pairs = [a / b for a, b in zip(ours, other) if b]
    return f"{statistics.median(pairs):.2f}" if pairs else "–"


def table(results: Results, shims: Sequence[Shim], problems: Dict[str, str]) -> str:
    """The figures as Markdown."""
    shown = [shim for shim in shims if shim.name != "direct"]
    names = [shim.name for shim in shown]
    paired = next((name for name in ("other", "relay") if name in names), "")
    heads = [shim.label for shim in shown]
    if paired and "chat" in names:
        heads.append(f"ratio to {heads[names.index(paired)]}")
    lines = ["| figure | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for row, label, net in ROWS:
        if row not in results:
            continue
        columns = less_direct(results, row) if net else results[row]
        cells = [written(statistics.median(columns[name])) if columns.get(name) else "–"
                 for name in names]
        if len(heads) > len(names):
            cells.append(ratio(columns.get("chat", ()), columns.get(paired, ())))
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    lines += [f"\n{name}: {problem}" for name, problem in problems.items()]
    return "\n".join(lines)


def machine() -> str:
    model = platform.processor() or platform.machine()
    if LINUX:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        model = found.group(1) if found else model
    return (f"{model.strip()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}, "
            f"Python {platform.python_version()}")


def allow_many_files() -> None:
    """200 streams need 400 sockets here and as many in a shim; macOS allows 256."""
    try:
        import resource  # noqa: PLC0415 - Windows has none
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 4096 if hard == resource.RLIM_INFINITY else min(hard, 4096)
    if soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def columns_of(arguments: argparse.Namespace) -> List[Shim]:
    here = Path.cwd()
    ours = tuple(shlex.split(arguments.shim)) if arguments.shim else (
        sys.executable, str(ROOT / "qwencode.py"))
    shims = [
        Shim("direct", "no shim", (), here, {}),
        Shim("relay", "raw byte relay", (sys.executable, "-c", RELAY), here, {}),
        Shim("chat", "this shim", ours, here, {"SHIM_VERBATIM": "off"}),
        Shim("verbatim", "this shim, verbatim", ours, here, {"SHIM_VERBATIM": "on"}),
    ]
    if arguments.against:
        shims.append(Shim("other", f"`{arguments.against}`",
                          tuple(shlex.split(arguments.against)), Path(arguments.cwd), {}))
    wanted = ("direct", *arguments.columns.split(",")) if arguments.columns else ()
    return [shim for shim in shims if not wanted or shim.name in wanted]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--against", metavar="COMMAND", help="another shim to pair with ours")
    parser.add_argument("--cwd", metavar="DIR", default=".", help="folder of that command")
    parser.add_argument("--quick", action="store_true", help="one round of each figure")
    parser.add_argument("--figures", metavar="A,B",
                        help="only these: " + ", ".join(figure.name for figure in FIGURES))
    parser.add_argument("--columns", metavar="A,B",
                        help="only these: relay, chat, verbatim, other")
    parser.add_argument("--shim", metavar="COMMAND", help="start this as our shim")
    parser.add_argument("--json", action="store_true", help="every round's values as JSON")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    arguments = parse(argv)
    wanted = arguments.figures.split(",") if arguments.figures else [f.name for f in FIGURES]
    unknown = set(wanted) - {figure.name for figure in FIGURES}
    if unknown:
        print(f"relay.py: no such figure: {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    allow_many_files()
    bench, shims = Bench(), columns_of(arguments)
    results: Results = {}
    problems: Dict[str, str] = {}
    began = now()
    figures = [figure for figure in FIGURES if figure.name in wanted]
    for place, figure in enumerate(figures, 1):
        print(f"{figure.name} …", file=sys.stderr, flush=True)
        due = began + LIMIT_S * place / len(figures)
        try:
            measure_figure(bench, figure, shims, 1 if arguments.quick else figure.rounds, due,
                           results)
        except (BenchError, OSError, subprocess.SubprocessError) as problem:
            problems[figure.name] = str(problem)
    if arguments.json:
        print(json.dumps({"machine": machine(), "results": results, "problems": problems}))
        return 0
    if os.name == "nt":
        problems["CPU and memory"] = "not measured on Windows"
    print(table(results, shims, problems))
    direct = results.get("single_us", {}).get("direct")
    print(f"\nMeasured {time.strftime('%Y-%m-%d')} on {machine()}, in {now() - began:.0f} s, with"
          f" `{shlex.join(['python', 'tests/bench/relay.py', *argv])}`."
          + (f" No shim: {written(statistics.median(direct))} µs p50 at 50 tokens/s."
             if direct else ""))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
