"""What every test of events needs: running a shim, reading its answers, the invariants."""
import contextlib
import json
import threading
import time
import urllib.error
import urllib.request
from typing import Any, Dict, Iterator, List, Optional

import qwencode
from qwencode import Event


def wait_until(true, seconds=5.0):
    """Wait for what another thread or process does without telling: it can only be looked at again."""
    end, pause = time.monotonic() + seconds, threading.Event()
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        pause.wait(0.01)


def check_events(events: List[Event], tools: Optional[List[str]] = None) -> None:
    """Assert the invariants of the module docstring on a whole event list."""
    kept = [e for e in events if not is_keep_alive(e)]
    names = [event.name for event in kept]
    assert names[0] == "message_start", names
    assert names.count("message_start") == 1
    assert (names[-1] == "error") != (names[-2:] == ["message_delta", "message_stop"]), names
    assert names.count("message_stop") + names.count("error") == 1
    index, opened = -1, None
    pieces: List[str] = []
    last_call_open = False
    for event in kept:
        payload = event.payload
        if event.name == "content_block_start":
            assert opened is None
            index += 1
            assert payload["index"] == index
            opened, pieces = payload["content_block"]["type"], []
            if opened == "tool_use":
                assert not last_call_open, "a call was left unfinished before the last one"
                assert payload["content_block"]["input"] == {}
                assert tools is None or payload["content_block"]["name"] in tools
        elif event.name == "content_block_delta":
            assert opened is not None
            assert payload["index"] == index
            delta = payload["delta"]
            pieces.append(delta.get("text", delta.get("thinking", delta.get("partial_json", ""))))
        elif event.name == "content_block_stop":
            assert payload["index"] == index
            joined = "".join(pieces)
            if opened == "text":
                assert joined, "an empty text block was sent"
            if opened == "tool_use":
                try:
                    assert isinstance(json.loads(joined or "{}"), dict)
                except ValueError:
                    last_call_open = True
            opened = None
        elif event.name == "message_delta":
            assert opened is None


def is_keep_alive(event: Event) -> bool:
    """An empty delta, or a message_delta that says nothing."""
    delta = event.payload.get("delta")
    if event.name == "message_delta":
        return not delta
    return event.name == "content_block_delta" and not any(
        delta.get(key) for key in ("text", "thinking", "partial_json", "signature"))


def joined(events: List[Event]) -> List[Any]:
    """Events as short rows, neighbouring deltas of a block joined."""
    rows: List[Any] = []
    for name, payload in events:
        if name == "content_block_delta":
            delta = payload["delta"]
            text = next(value for key, value in delta.items() if key != "type")
            if rows and rows[-1][0] == delta["type"]:
                rows[-1] = (delta["type"], rows[-1][1] + text)
            else:
                rows.append((delta["type"], text))
        elif name == "content_block_start":
            block = payload["content_block"]
            rows.append(("start", block["type"], block["name"]) if "name" in block
                        else ("start", block["type"]))
        elif name == "content_block_stop":
            rows.append(("stop",))
        elif name == "message_delta":
            rows.append(("end", payload["delta"].get("stop_reason")))
        elif name == "error":
            rows.append(("error", payload["error"]["type"]))
    return rows


def read_sse(data: bytes) -> List[Event]:
    """Read a whole event stream."""
    events = []
    for block in data.decode().split("\n\n"):
        if block.strip():
            name, payload = block.split("\n")
            assert name.startswith("event: ")
            assert payload.startswith("data: ")
            events.append(Event(name[7:], json.loads(payload[6:])))
    return events


class Answer:
    """A whole HTTP answer of the shim."""

    def __init__(self, status: int, headers: Any, data: bytes) -> None:
        self.status, self.headers, self.data = status, headers, data

    @property
    def json(self) -> Any:
        return json.loads(self.data)

    @property
    def events(self) -> List[Event]:
        return read_sse(self.data)

    @property
    def error(self) -> Any:
        body = self.json
        assert body["type"] == "error"
        return body["error"]["type"], body["error"]["message"]


class Shim:
    """A running shim and a polite client for it."""

    def __init__(self, server: qwencode.ShimServer) -> None:
        self.server = server
        self.url = server.url
        self.port = server.server_port

    def request(self, method: str, path: str, body: Any = None,
                headers: Optional[Dict[str, str]] = None) -> Answer:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json", **(headers or {})},
            method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=30) as answer:
                return Answer(answer.status, answer.headers, answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, error.headers, error.read())

    def messages(self, text: str = "hi", stream: bool = True, **fields: Any) -> Answer:
        body = {"model": "claude-x", "max_tokens": 1000, "stream": stream,
                "messages": [{"role": "user", "content": text}], **fields}
        return self.request("POST", "/v1/messages?beta=true", body)


@contextlib.contextmanager
def running_shim(base_url: str, **flags: str) -> Iterator[Shim]:
    """Run a shim on a free port; flags are option names."""
    config = qwencode.load_config(
        {"port": "0", "base_url": base_url, "warm": "off", "log": "error", **flags}, {})
    server = qwencode.open_server(config)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield Shim(server)
    finally:
        server.stop()
        thread.join(5)
        server.finish()


def tool(name: str, **properties: str) -> Dict[str, Any]:
    """A client tool whose parameters are all required; types by name."""
    return {"name": name, "description": name, "input_schema": {
        "type": "object", "properties": {key: {"type": kind} for key, kind in properties.items()},
        "required": list(properties)}}


READ, WRITE, BASH = (tool("Read", file_path="string"),
                     tool("Write", file_path="string", content="string"),
                     tool("Bash", command="string"))


def chat_line(content: str, **fields: Any) -> bytes:
    """A line of Ollama's answer, which either of its calls could send."""
    message = {"role": "assistant", "content": content}
    return json.dumps({"model": "m", "message": message, "response": content, "done": False,
                       **fields}).encode() + b"\n"
