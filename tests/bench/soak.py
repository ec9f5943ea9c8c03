#!/usr/bin/env python3
"""Soak the shim: 2,000 mixed requests, every third with a fault.

    python tests/bench/soak.py [--requests 2000] [--clients 16] [--verbatim on|off]

Faults come from the upstream (tests' mock_ollama: errors, cuts, resets, silence,
garbage) and from clients (they leave, lie about lengths, send nonsense). A request
without a fault must bring the very answer that was scripted for it; one with a
fault must end as its row in FAULTS says. Told are faults survived, and threads,
open descriptors and memory of the shim before, half-way and after. Exit code 1
when an answer was wrong, or threads or descriptors did not return to where they
were. It ends within 90 s: a machine too slow for all requests does fewer.
"""
from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

# Imported here: it lies where the line above looks.
import mock_ollama as mock  # noqa: E402

MODEL = "qwen2.5-coder:7b"
SILENCE_S = 1.0
ISSUE_S = 55
SETTLE_S = 12
PATIENCE_S = 8
MARK = re.compile(rb"case ([a-z0-9-]+) number (\d{5})")
Address = Tuple[str, int]


class Outcome(NamedTuple):
    """What a client saw; status 0 when it got none."""

    status: int
    body: str

    @property
    def told(self) -> bool:
        """An error status, or an error event and no normal end."""
        if self.status >= 400:
            return '"error"' in self.body
        return self.body.count("event: error") == 1 and "event: message_stop" not in self.body

    @property
    def ended(self) -> bool:
        """An answer or an error, whichever."""
        return self.told or "message_stop" in self.body or '"stop_reason"' in self.body


# ============================== requests ==============================

BASH = {"name": "Bash", "description": "Run a command", "input_schema": {
    "type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}}


def messages_body(case: str, number: int, stream: bool) -> bytes:
    return json.dumps({
        "model": "soak", "max_tokens": 1000, "stream": stream, "tools": [BASH],
        "messages": [{"role": "user", "content": f"What is case {case} number {number:05d}?"}],
    }).encode()


def head(address: Address, path: str, *lines: str) -> bytes:
    """A request head with these lines after Host and Connection: close."""
    given = "" if any(line.startswith("Host:") for line in lines) else (
        f"Host: {address[0]}:{address[1]}\r\n")
    rest = "".join(f"{line}\r\n" for line in lines)
    return (f"POST {path} HTTP/1.1\r\n{given}Connection: close\r\n"
            f"Content-Type: application/json\r\n{rest}\r\n").encode()


def exchange(address: Address, data: bytes) -> Outcome:
    """Send bytes, read to the end of the connection."""
    with socket.create_connection(address, timeout=PATIENCE_S) as sock:
        try:
            sock.sendall(data)
        except OSError:
            pass
        parts = []
        try:
            while True:
                part = sock.recv(65536)
                if not part:
                    break
                parts.append(part)
        except OSError:
            pass
    answer = b"".join(parts)
    status = re.match(rb"HTTP/1\.1 (\d{3})", answer)
    return Outcome(int(status.group(1)) if status else 0, answer.decode("utf-8", "replace"))


class Worker:
    """One client with a kept connection for the requests without a fault."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.connection = http.client.HTTPConnection(*address, timeout=PATIENCE_S)

    def request(self, method: str, path: str, body: Optional[bytes] = None) -> Outcome:
        self.connection.request(method, path, body, {"Content-Type": "application/json"})
        answer = self.connection.getresponse()
        return Outcome(answer.status, answer.read().decode())

    def close(self) -> None:
        self.connection.close()


# ============================== without a fault ==============================


def good_text(outcome: Outcome, number: int) -> bool:
    return outcome.status == 200 and f"answer {number:05d}." in shown_text(outcome)


def good_call(outcome: Outcome, number: int) -> bool:
    pieces = re.findall(r'"partial_json": ?("(?:[^"\\]|\\.)*")', outcome.body)
    joined = "".join(json.loads(piece) for piece in pieces)
    return outcome.status == 200 and joined != "" and (
        json.loads(joined) == {"command": f"echo {number:05d}"})


def shown_text(outcome: Outcome) -> str:
    pieces = re.findall(r'"text": ?("(?:[^"\\]|\\.)*")', outcome.body)
    return "".join(json.loads(piece) for piece in pieces)


Check = Callable[[Outcome, int], bool]
GOOD: Dict[str, Tuple[str, Optional[bool], Check]] = {
    "text": ("/v1/messages", True, good_text),
    "whole": ("/v1/messages", False, good_text),
    "call": ("/v1/messages?beta=true", True, good_call),
    "count": ("/v1/messages/count_tokens", False,
              lambda outcome, _: outcome.status == 200 and "input_tokens" in outcome.body),
    "models": ("/v1/models", None, lambda outcome, _: outcome.status == 200),
    "health": ("/health", None, lambda outcome, _: outcome.status == 200),
}


def run_good(worker: Worker, case: str, number: int) -> Tuple[bool, Outcome]:
    path, stream, check = GOOD[case]
    if stream is None:
        outcome = worker.request("GET", path)
    else:
        outcome = worker.request("POST", path, messages_body(case, number, stream))
    return check(outcome, number), outcome


# ============================== with a fault ==============================


def some(text: str = "Some text ") -> mock.Reply:
    return mock.text(text, pieces=4)


UPSTREAM_FAULTS: Dict[str, Tuple[Callable[[], mock.Reply], Callable[[Outcome], bool]]] = {
    "status-500-json": (lambda: mock.status(500, {"error": "it broke"}), lambda o: o.told),
    "status-503-text": (lambda: mock.status(503, "down for now"), lambda o: o.told),
    "status-429": (lambda: mock.status(429, {"error": "rate limit"}), lambda o: o.status == 429),
    "status-500-empty": (lambda: mock.status(500, b""), lambda o: o.told),
    "error-first": (lambda: mock.error_line("no memory"), lambda o: o.told),
    "error-later": (lambda: some() + mock.error_line("runner died"), lambda o: o.told),
    "cut": (lambda: some() + mock.cut(), lambda o: o.told),
    "cut-clean": (lambda: some() + mock.cut(clean=True), lambda o: o.told),
    "reset": (lambda: some() + mock.reset(), lambda o: o.told),
    "empty-answer": (lambda: mock.cut(clean=True), lambda o: o.told),
    "garbage-between": (lambda: some() + mock.raw("{{not json\n") + some(), lambda o: o.ended),
    "last-line-cut": (lambda: some() + mock.raw('{"model":"x","mess') + mock.cut(clean=True),
                      lambda o: o.told),
    "wrong-types": (lambda: some() + mock.raw('{"message":[1],"done":"no"}\n[]\n"x"\n'),
                    lambda o: o.ended),
    "silent-before": (mock.hang, lambda o: o.told),
    "silent-after": (lambda: some() + mock.hang(), lambda o: o.told),
    "long-line": (lambda: some("long " * 200_000), lambda o: "message_stop" in o.body),
}


def leave(address: Address, number: int) -> Outcome:
    """Leave after the first bytes of a stream that would go on for seconds."""
    body = messages_body("slow", number, stream=True)
    with socket.create_connection(address, timeout=PATIENCE_S) as sock:
        sock.sendall(head(address, "/v1/messages", f"Content-Length: {len(body)}") + body)
        return Outcome(200, sock.recv(64).decode("utf-8", "replace"))


def leave_early(address: Address, number: int) -> Outcome:
    """Leave while the model still reads."""
    body = messages_body("silent-before", number, stream=number % 2 == 0)
    with socket.create_connection(address, timeout=PATIENCE_S) as sock:
        sock.sendall(head(address, "/v1/messages", f"Content-Length: {len(body)}") + body)
    return Outcome(0, "")


def half_body(address: Address, number: int) -> Outcome:
    """Leave in the middle of the body."""
    body = messages_body("text", number, stream=True)
    with socket.create_connection(address, timeout=PATIENCE_S) as sock:
        sock.sendall(head(address, "/v1/messages", f"Content-Length: {len(body)}") + body[:50])
    return Outcome(0, "")


def sent(body: bytes, *lines: str) -> Callable[[Address, int], Outcome]:
    """A request with this body and these lines; {n} is the body's length."""

    def run(address: Address, _number: int) -> Outcome:
        lengths = lines or ("Content-Length: {n}",)
        filled = [line.replace("{n}", str(len(body))) for line in lengths]
        return exchange(address, head(address, "/v1/messages", *filled) + body)

    return run


HELLO = messages_body("text", 0, stream=False)
CLIENT_FAULTS: Dict[str, Tuple[Callable[[Address, int], Outcome], Callable[[Outcome], bool]]] = {
    "leaves": (leave, lambda o: "HTTP/1.1 200" in o.body),
    "leaves-early": (leave_early, lambda o: True),
    "half-body": (half_body, lambda o: True),
    "not-json": (sent(b'{"messages": ['), lambda o: o.status == 400),
    "not-utf8": (sent(b'{"messages": "\xff\xfe"}'), lambda o: o.status == 400),
    "wrong-type": (sent(b'{"messages": 7}'), lambda o: o.status == 400),
    "nested": (sent(b'{"messages":' + b"[" * 100_000), lambda o: o.status == 400),
    "two-lengths": (sent(HELLO, "Content-Length: {n}", "Content-Length: 3"),
                    lambda o: o.status == 400),
    "length-and-chunked": (sent(HELLO, "Content-Length: {n}", "Transfer-Encoding: chunked"),
                           lambda o: o.status == 400),
    "bad-chunk": (sent(b"zz\r\nhello\r\n0\r\n\r\n", "Transfer-Encoding: chunked"),
                  lambda o: o.status == 400),
    "too-large": (sent(b"", "Content-Length: 60000000"), lambda o: o.status == 413),
    "foreign-host": (sent(HELLO, "Host: evil.example", "Content-Length: {n}"),
                     lambda o: o.status == 403),
    "foreign-origin": (sent(HELLO, "Origin: https://evil.example", "Content-Length: {n}"),
                       lambda o: o.status == 403),
}
FAULTS = (*UPSTREAM_FAULTS, *CLIENT_FAULTS)


def run_fault(address: Address, case: str, number: int) -> Tuple[bool, Outcome]:
    if case in CLIENT_FAULTS:
        run, check = CLIENT_FAULTS[case]
        outcome = run(address, number)
    else:
        check = UPSTREAM_FAULTS[case][1]
        body = messages_body(case, number, stream=number % 2 == 0 or case == "long-line")
        outcome = exchange(
            address, head(address, "/v1/messages", f"Content-Length: {len(body)}") + body)
    return check(outcome), outcome


def scripted(request: mock.Recorded) -> mock.Reply:
    """The model's answer to a request, by the mark in its question."""
    found = MARK.findall(request.raw)
    case, number = (found[-1][0].decode(), found[-1][1].decode()) if found else ("none", "00000")
    if case in UPSTREAM_FAULTS:
        return UPSTREAM_FAULTS[case][0]()
    if case == "call":
        return mock.model_text(
            '<tool_call>\n{"name": "Bash", "arguments": {"command": "echo ' + number
            + '"}}\n</tool_call>', pieces=8)
    if case == "slow":
        return some() + mock.delay(0.5) + some() + mock.delay(0.5) + some()
    return mock.model_text(f"This is answer {number}. It ends here.", pieces=6)


# ============================== the shim ==============================


class Shim:
    """The shim as a process, and what it holds."""

    def __init__(self, upstream: str, verbatim: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.address: Address = listener.getsockname()
        kept = {key: value for key, value in os.environ.items()
                if not key.startswith(("SHIM_", "OLLAMA_"))}
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "qwencode.py")], stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            env={**kept, "HOST": self.address[0], "PORT": str(self.address[1]),
                 "OLLAMA_BASE_URL": upstream, "OLLAMA_MODEL": MODEL, "SHIM_VERBATIM": verbatim,
                 "SHIM_REQUEST_TIMEOUT_MS": str(int(SILENCE_S * 1000))})
        self.log: List[bytes] = []
        self.reader = threading.Thread(target=self.read_log, daemon=True)
        self.reader.start()
        self.wait()

    def read_log(self) -> None:
        assert self.process.stderr
        self.log.extend(self.process.stderr)

    def wait(self) -> None:
        for _ in range(200):
            try:
                socket.create_connection(self.address, timeout=1).close()
                return
            except OSError:
                if self.process.poll() is not None:
                    break
                time.sleep(0.05)  # a process that starts has no event to wait for
        raise SystemExit(f"soak.py: the shim did not start: {b''.join(self.log).decode()}")

    def held(self) -> Dict[str, float]:
        """Threads, open descriptors and resident memory (MB), where Linux tells."""
        proc = Path(f"/proc/{self.process.pid}")
        if not proc.is_dir():
            return {}
        status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
        return {"threads": int(status["Threads"]),
                "descriptors": len(list((proc / "fd").iterdir())),
                "memory_mb": int(status["VmRSS"].split()[0]) / 1024}

    def settle(self) -> Dict[str, float]:
        """Wait until threads and descriptors have stayed the same for 2 s; what is held then."""
        deadline, seen, since = time.monotonic() + SETTLE_S, None, time.monotonic()
        while time.monotonic() < min(deadline, since + 2):
            held = self.held()
            counts = (held.get("threads"), held.get("descriptors"))
            if counts != seen:
                seen, since = counts, time.monotonic()
            time.sleep(0.05)  # /proc can only be looked at again
        return self.held()

    def stop(self) -> int:
        self.process.terminate()
        code = self.process.wait(10)
        self.reader.join(5)
        return code


# ============================== the run ==============================


class Run:
    """Numbers the requests, counts outcomes."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.numbers = itertools.count(1)
        self.lock = threading.Lock()
        self.right: Counter[str] = Counter()
        self.wrong: Dict[str, str] = {}

    def work(self, total: int, deadline: float) -> None:
        """Be one client until all requests are sent."""
        worker = Worker(self.address)
        goods, faults = itertools.cycle(GOOD), FAULTS
        while time.monotonic() < deadline:
            with self.lock:
                number = next(self.numbers)
            if number > total:
                break
            fault = number % 3 == 0
            case = faults[number // 3 % len(faults)] if fault else next(goods)
            try:
                right, outcome = (run_fault(self.address, case, number) if fault
                                  else run_good(worker, case, number))
            except (OSError, http.client.HTTPException, ValueError) as problem:
                right, outcome = False, Outcome(0, repr(problem))
                worker.close()
            with self.lock:
                if right:
                    self.right[case] += 1
                else:
                    self.wrong.setdefault(
                        case, f"request {number}: {outcome.status} {outcome.body[-300:]!r}")
        worker.close()

    def all(self, clients: int, total: int, deadline: float) -> None:
        threads = [threading.Thread(target=self.work, args=(total, deadline))
                   for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def soak(total: int, clients: int, verbatim: str) -> Dict[str, Any]:
    """Run it; the report as a dict."""
    began = time.monotonic()
    with mock.MockOllama(scripted, model=MODEL) as upstream:
        shim = Shim(upstream.url, verbatim)
        try:
            warm = Run(shim.address)
            warm.all(clients, len(FAULTS) * 3, began + ISSUE_S)
            before = shim.settle()
            run = Run(shim.address)
            run.all(clients, total // 2, began + ISSUE_S)
            half = shim.held()
            run.numbers = itertools.count(total // 2 + 1)
            run.all(clients, total, began + ISSUE_S)
            after = shim.settle()
        finally:
            code = shim.stop()
    right = sum(run.right.values())
    return {
        "seconds": round(time.monotonic() - began, 1), "right": right,
        "faults": sum(count for case, count in run.right.items() if case in FAULTS),
        "wrong": run.wrong, "before": before, "half": half, "after": after, "exit": code,
        "tracebacks": b"".join(shim.log).count(b"Traceback"),
    }


def returned(report: Dict[str, Any]) -> bool:
    """Whether threads and descriptors are back where they were."""
    before, after = report["before"], report["after"]
    return all(after[key] <= before[key] + 1 for key in ("threads", "descriptors") if key in before)


def told(report: Dict[str, Any]) -> str:
    lines = [f"{report['right']} requests right, {report['faults']} of them with a fault, "
             f"in {report['seconds']} s; exit code {report['exit']}, "
             f"{report['tracebacks']} tracebacks in the log"]
    for key, label in (("threads", "threads"), ("descriptors", "open descriptors"),
                       ("memory_mb", "memory, MB")):
        if key in report["before"]:
            lines.append(f"{label}: {report['before'][key]:.0f} before, {report['half'][key]:.0f}"
                         f" half-way, {report['after'][key]:.0f} after")
    lines += [f"WRONG {case}: {what}" for case, what in report["wrong"].items()]
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--verbatim", choices=("auto", "on", "off"), default="auto")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    report = soak(arguments.requests, arguments.clients, arguments.verbatim)
    print(json.dumps(report) if arguments.json else told(report))
    good = not report["wrong"] and returned(report) and not report["tracebacks"]
    return 0 if good and report["exit"] == 0 else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
