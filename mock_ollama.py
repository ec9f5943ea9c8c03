#!/usr/bin/env python3
"""An Ollama server without a model, for tests and demonstrations.

    with MockOllama([text("Hello"), call("Write", {"file_path": "a", "content": "b"})]) as mock:
        ...                       # mock.url, mock.requests, mock.turns, mock.loads

Each generation (/api/chat or /api/generate with a prompt) takes the next reply;
the last one repeats. A reply is a row of steps: text, thinking, call,
model_text, done, error_line, status, raw, wire, delay, hold, end, cut, reset,
hang; add them with + or list them. Without a closing step a plausible done line follows.
A string is short for model_text. A callable gets the request and returns a reply.

model_text is what the model wrote, markup included. /api/generate gives it back
verbatim; /api/chat sends it through an imitation of Ollama's parsers, losses
included. Which one depends on the model's path, named after the recordings in
tests/data: a (renderer qwen3-coder), a35 (renderer qwen3.5), b (Go template of
qwen2.5-coder), q3 (Go template of qwen3), c (the GGUF's own chat template),
plain (no tools). The recordings are the measure of everything here.

As a program: python mock_ollama.py [--port N] [--mode MODE] [--model NAME] [--play FILE]
"""
from __future__ import annotations

import argparse
import json
import os
import re
import selectors
import socket
import string
import struct
import sys
import threading
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from hashlib import sha256
from html import unescape
from http import HTTPStatus
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Optional, Set, Tuple, Union

MAX_HEAD_BYTES = 65_536  # request line and headers; more is answered 431
CHARS_PER_TOKEN = 3.5  # code and prose together, Qwen vocabulary
TOKEN_S = 0.005  # what eval_duration claims for one token
LOAD_S = 0.8  # what load_duration claims for a load; a tiny model on a CPU
LIVE_S = 300  # Ollama's default keep_alive
FOR_EVER_S = 9_000_000_000  # what a negative keep_alive becomes, about 290 years
NUM_KEEP = 4  # tokens kept at the start when Ollama cuts the middle out
REPEAT_LIMIT = 30  # equal tokens in a row before Ollama gives up without a word
ID_ALPHABET = string.ascii_lowercase + string.digits

Json = Dict[str, Any]


# ---------------------------------------------------------------- replies


@dataclass(frozen=True)
class Step:
    """One thing a reply does; kind names a method of _Turn."""

    kind: str
    value: Any = None


class Reply:
    """A row of steps; + joins two rows."""

    def __init__(self, steps: Iterable[Step] = ()) -> None:
        self.steps = tuple(steps)

    def __add__(self, other: Union[Reply, str]) -> Reply:
        return Reply(self.steps + as_reply(other).steps)

    def __repr__(self) -> str:
        return f"Reply({list(self.steps)!r})"


def as_reply(script: Any) -> Reply:
    """Turn a reply, a string of model text or a list of either into one reply."""
    if isinstance(script, Reply):
        return script
    if isinstance(script, str):
        return model_text(script)
    return Reply(step for part in script for step in as_reply(part).steps)


TOKEN = re.compile(r"</?(?:tool_call|think|tool_response)>|\s*[^\s<]{1,12}|\s+|<")
Pieces = Union[int, List[str], None]


def split_pieces(text: str, pieces: Pieces = None) -> List[str]:
    """Cut text into tokens: by itself, into N parts, or as listed.

    A list must join to the text.
    """
    if isinstance(pieces, list):
        if "".join(pieces) != text:
            raise ValueError("the pieces do not join to the text")
        return pieces
    if pieces is None:
        return TOKEN.findall(text)
    size = max(1, -(-len(text) // pieces))
    return [text[at : at + size] for at in range(0, len(text), size)]


def text(content: str, pieces: Pieces = None) -> Reply:
    """Answer text, one line for each piece."""
    return Reply([Step("text", split_pieces(content, pieces))])


def thinking(content: str, pieces: Pieces = None) -> Reply:
    """Reasoning in the field thinking."""
    return Reply([Step("thinking", split_pieces(content, pieces))])


def call(name: str, arguments: Optional[Json] = None, id: Optional[str] = None) -> Reply:
    """One tool call (path c: sent in the done line, as there)."""
    return Reply([Step("call", (name, arguments or {}, id))])


def model_text(content: str, pieces: Pieces = None) -> Reply:
    """What the model wrote, tags and all."""
    return Reply([Step("model_text", split_pieces(content, pieces))])


def done(reason: str = "stop", **fields: Any) -> Reply:
    """Close the answer; fields override those of the done line (None drops one)."""
    return Reply([Step("done", (reason, fields))])


def error_line(message: str) -> Reply:
    """End with a line {"error": message} and no done line."""
    return Reply([Step("error_line", message)])


def status(code: int, body: Any = None, headers: Optional[Dict[str, str]] = None) -> Reply:
    """Answer with this status and body (JSON, str or bytes)."""
    return Reply([Step("status", (code, body, headers or {}))])


def delay(seconds: float) -> Reply:
    """Say nothing for so long."""
    return Reply([Step("delay", seconds)])


def raw(data: Union[bytes, str]) -> Reply:
    """Exact bytes of the body, inside the transfer coding."""
    return Reply([Step("raw", data.encode() if isinstance(data, str) else data)])


def end() -> Reply:
    """End the body here, properly, with no done line."""
    return Reply([Step("end")])


def wire(data: bytes) -> Reply:
    """Exact bytes on the connection, outside of head and transfer coding."""
    return Reply([Step("wire", data)])


def cut(clean: bool = False) -> Reply:
    """End without done: the connection closes, or (clean) only the body ends."""
    return end() if clean else Reply([Step("cut")])


def reset() -> Reply:
    """End with a TCP reset."""
    return Reply([Step("reset")])


def hold(event: threading.Event) -> Reply:
    """Say nothing until the event is set."""
    return Reply([Step("hold", event)])


def hang() -> Reply:
    """Say nothing more until the client goes."""
    return Reply([Step("hang")])


# ---------------------------------------------------------------- Go's JSON


GO_ESCAPES = {
    ord("<"): "\\u003c", ord(">"): "\\u003e", ord("&"): "\\u0026",
    0x2028: "\\u2028", 0x2029: "\\u2029",
}  # fmt: skip


def go_json(value: Any, spaced: bool = False, sort_keys: bool = False) -> str:
    """JSON as Go writes it; spaced has a blank after each comma and colon."""
    separators = (", ", ": ") if spaced else (",", ":")
    made = json.dumps(value, ensure_ascii=False, separators=separators, sort_keys=sort_keys)
    return made if spaced else made.translate(GO_ESCAPES)


def to_bytes(value: str) -> bytes:
    """UTF-8; what has no encoding becomes U+FFFD, as in Go."""
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def timestamp(shift_s: float = 0) -> str:
    now = datetime.now(timezone.utc) + timedelta(seconds=shift_s)
    return now.strftime("%Y-%m-%dT%H:%M:%S.%f") + "123Z"


# ---------------------------------------------------------------- parsers (text -> events)


@dataclass
class Parsed:
    """What one token brought: at most one line on the wire."""

    content: str = ""
    thinking: str = ""
    calls: List[Tuple[str, Json]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.content or self.thinking or self.calls)


class ParserError(Exception):
    """Ollama's parser gave up; the text is what goes to the client."""


OPEN, CLOSE = "<tool_call>", "</tool_call>"
THINK, THINK_END = "<think>", "</think>"


def held_tail(buffer: str, tag: str) -> int:
    """Length of the longest end of the buffer that could begin the tag."""
    for size in range(min(len(tag) - 1, len(buffer)), 0, -1):
        if buffer.endswith(tag[:size]):
            return size
    return 0


def visible_part(buffer: str, tag: str) -> str:
    """What may be shown while the tag, or white space before it, may follow."""
    return buffer[: len(buffer) - held_tail(buffer, tag)].rstrip()


class PlainParser:
    """No tools, no thinking: text as it comes."""

    def __init__(self, tools: List[Json], think: bool, version: str) -> None:
        self.tools, self.think, self.version = tools, think, version

    def add(self, piece: str) -> Parsed:
        return Parsed(content=piece)

    def end(self) -> Parsed:
        """Return what the done line carries."""
        return Parsed()


class CoderParser(PlainParser):
    """Path A: XML calls; white space at the end and unclosed calls are lost."""

    def __init__(self, tools: List[Json], think: bool, version: str) -> None:
        super().__init__(tools, think, version)
        self.buffer = ""
        self.calling = False

    def add(self, piece: str) -> Parsed:
        self.buffer += piece
        found = Parsed()
        while self._step(found):
            pass
        return found

    def _step(self, found: Parsed) -> bool:
        before, tag, after = self.buffer.partition(CLOSE if self.calling else OPEN)
        if not tag:
            if not self.calling:
                shown = visible_part(self.buffer, OPEN)
                found.content += shown
                self.buffer = self.buffer[len(shown) :]
            return False
        if self.calling:
            found.calls.append(parse_xml_call(before, self.tools))
            after = after.lstrip()
        else:
            found.content += before.rstrip()
        self.buffer, self.calling = after, not self.calling
        return True


class Qwen35Parser(CoderParser):
    """Path A with thinking: the prompt has opened the think block already."""

    def __init__(self, tools: List[Json], think: bool, version: str) -> None:
        super().__init__(tools, think, version)
        self.thinking = think
        self.opening = True  # the model may repeat the opening tag, once
        self.trim = False
        self.eat_space = False

    def add(self, piece: str) -> Parsed:
        if not self.thinking:
            return self._answer(piece)
        self.buffer += piece
        if self.opening and not self._past_opening():
            return Parsed()
        if self.trim:
            self.buffer = self.buffer.lstrip()
            self.trim = not self.buffer
        return self._think()

    def _past_opening(self) -> bool:
        """Drop a repeated opening tag; False while it may still come."""
        trimmed = self.buffer.lstrip()
        if trimmed.startswith(THINK):
            self.buffer = trimmed[len(THINK) :].lstrip()
            # 0.24 keeps the white space that comes with the next token
            self.opening = old(self.version) and not self.buffer
            self.trim = not self.opening
            return bool(self.buffer)
        self.opening = THINK.startswith(trimmed)
        return not self.opening

    def _think(self) -> Parsed:
        before, tag, after = self.buffer.partition(THINK_END)
        if tag:
            return self._end_thinking(before, after)
        held = max(held_tail(self.buffer, THINK_END), held_tail(self.buffer, OPEN))
        before, tag, after = self.buffer.partition(OPEN)
        if tag and not held:
            return self._end_thinking(before, OPEN + after.lstrip())
        shown = self.buffer[: len(self.buffer) - held].rstrip()
        self.buffer = self.buffer[len(shown) :]
        return Parsed(thinking=shown)

    def _end_thinking(self, thought: str, rest: str) -> Parsed:
        self.thinking, self.buffer, self.eat_space = False, "", True
        found = self._answer(rest)
        found.thinking = thought.rstrip()
        return found

    def _answer(self, piece: str) -> Parsed:
        if self.eat_space:
            piece = piece.lstrip()
            self.eat_space = not piece
        return super().add(piece) if piece else Parsed()


XML_RENAME = re.compile(r"<(\w+)=([^>]+)>", re.ASCII)
XML_TAG = re.compile(r'<(/?)(function|parameter)(?:\s+name="([^"]*)")?>')
XML_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")
XML_ESCAPES = {
    ord('"'): "&#34;", ord("'"): "&#39;", ord("&"): "&amp;", ord("<"): "&lt;", ord(">"): "&gt;",
    ord("\t"): "&#x9;", ord("\n"): "&#xA;", ord("\r"): "&#xD;",
}  # fmt: skip


def rename_tag(tag: re.Match[str]) -> str:
    return f'<{tag.group(1)} name="{tag.group(2).translate(XML_ESCAPES)}">'


class XmlCall:
    """The reader of one call; fed with its tags, in order."""

    def __init__(self, body: str) -> None:
        self.body = XML_RENAME.sub(rename_tag, body).replace("\r\n", "\n").replace("\r", "\n")
        self.stack: List[str] = []
        self.name = ""
        self.parameter: Optional[str] = None
        self.values: Dict[str, str] = {}
        self.last = 0

    def fail(self, at: int, message: str) -> ParserError:
        line = self.body.count("\n", 0, at) + 1
        return ParserError(f"XML syntax error on line {line}: {message}")

    def read(self) -> Tuple[str, Dict[str, str]]:
        """Return name and texts of the first function; raises ParserError."""
        for tag in XML_TAG.finditer(self.body):
            self._text(tag.start())
            self.last = tag.end()
            if not tag.group(1):
                self._open(tag.group(2), unescape(tag.group(3) or ""))
            elif self._close(tag.group(2), tag.start()):
                return self.name, self.values
        if not self.stack:
            raise ParserError("EOF")
        raise self.fail(len(self.body), "unexpected EOF")

    def _text(self, end: int) -> None:
        bad = XML_CONTROL.search(self.body, self.last, end)
        if bad:
            raise self.fail(bad.start(), f"illegal character code U+{ord(bad.group()):04X}")
        if len(self.stack) == 2 and self.parameter is not None:
            self.values[self.parameter] += self.body[self.last : end]

    def _open(self, kind: str, name: str) -> None:
        if not self.stack and kind != "function":
            raise ParserError(f"expected element type <function> but have <{kind}>")
        self.stack.append(kind)
        if len(self.stack) == 1:
            self.name = name
        elif len(self.stack) == 2:
            self.parameter = name if kind == "parameter" else None
            if self.parameter is not None:
                self.values[name] = ""

    def _close(self, kind: str, at: int) -> bool:
        """Close one element; whether it was the outermost."""
        opened = self.stack.pop() if self.stack else ""
        if opened != kind:
            wrong = f"element <{opened}> closed by" if opened else "unexpected end element"
            raise self.fail(at, f"{wrong} </{kind}>")
        return not self.stack


def parse_xml_call(body: str, tools: List[Json]) -> Tuple[str, Json]:
    """Read one call as Ollama's XML reader does.

    Raises ParserError with its texts. Generics in values come back rewritten,
    CR LF becomes LF, only the first function counts.
    """
    name, values = XmlCall(body).read()
    return name, typed_values(name, values, tools)


def typed_values(name: str, values: Dict[str, str], tools: List[Json]) -> Json:
    known: Json = {}
    for tool in tools:
        function = tool.get("function") or {}
        if function.get("name") == name:
            known = (function.get("parameters") or {}).get("properties") or {}
            break
    return {
        key: typed_value(unpad(value), schema_types(known.get(key) or {}))
        for key, value in values.items()
    }


def schema_types(schema: Json) -> List[str]:
    if schema.get("anyOf"):
        return [kind for one in schema["anyOf"] for kind in schema_types(one)]
    kinds = schema.get("type") or []
    return kinds if isinstance(kinds, list) else [kinds]


def unpad(value: str) -> str:
    value = value[1:] if value.startswith("\n") else value
    return value[:-1] if value.endswith("\n") else value


INTEGER = re.compile(r"[+-]?[0-9]{1,18}", re.ASCII)
NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?", re.ASCII)


def typed_value(value: str, kinds: List[str]) -> Any:
    """Convert as Ollama does, the narrowest type first; else it stays text."""
    if value.lower() == "null":
        return None
    if "boolean" in kinds and (value.lower() in ("true", "false") or len(kinds) == 1):
        return value.lower() == "true"
    if "integer" in kinds and INTEGER.fullmatch(value):
        return int(value)
    if "number" in kinds and NUMBER.fullmatch(value):
        return whole_number(float(value))
    for kind, wanted in (("array", list), ("object", dict)):
        if kind in kinds:
            with suppress(ValueError, RecursionError):
                made = json.loads(value)
                if isinstance(made, wanted):
                    return made
    return value


def whole_number(number: float) -> Union[int, float]:
    """Return what Go's JSON writes for the number: 5 for 5.0."""
    return int(number) if number.is_integer() and abs(number) < 1e21 else number


class ThinkSplitter:
    """Path B's think block: only at the start, white space around it eaten."""

    def __init__(self) -> None:
        self.state = "before"
        self.buffer = ""

    def add(self, piece: str) -> Tuple[str, str]:
        """Return (thinking, content) of one more piece."""
        self.buffer += piece
        if self.state == "before":
            self._open()
        if self.state == "inside":
            return self._inside()
        if self.state == "eating":
            self.buffer = self.buffer.lstrip()
            self.state = "after" if self.buffer else "eating"
        if self.state != "after":
            return "", ""
        content, self.buffer = self.buffer, ""
        return "", content

    def _open(self) -> None:
        trimmed = self.buffer.lstrip()
        if trimmed.startswith(THINK):
            self.state, self.buffer = "inside", trimmed[len(THINK) :]
            self.fresh = True
        elif not THINK.startswith(trimmed):
            self.state = "after"

    def _inside(self) -> Tuple[str, str]:
        if self.fresh:
            self.buffer = self.buffer.lstrip()
            self.fresh = not self.buffer
        before, tag, after = self.buffer.partition(THINK_END)
        if tag:
            content = after.lstrip()
            self.state, self.buffer = ("after" if content else "eating"), ""
            return before, content
        shown = self.buffer[: len(self.buffer) - held_tail(self.buffer, THINK_END)]
        self.buffer = self.buffer[len(shown) :]
        return shown, ""


class TemplateParser(PlainParser):
    """Path B: JSON calls; after the tag, what is no call is swallowed."""

    def __init__(self, tools: List[Json], think: bool, version: str) -> None:
        super().__init__(tools, think, version)
        self.splitter = ThinkSplitter() if think else None
        self.buffer = ""
        self.calling = False
        self.scanner = ObjectScanner()

    def add(self, piece: str) -> Parsed:
        thought = ""
        if self.splitter:
            thought, piece = self.splitter.add(piece)
        if not self.tools or not piece:
            return Parsed(content=piece, thinking=thought)
        self.buffer += piece
        found = Parsed(thinking=thought)
        if not self.calling:
            found.content = self._before_tag()
        while self.calling:
            made = self._next_call()
            if made is None:
                break
            found.calls.append(made)
        if found.content:  # text and call from one token: Ollama forgets the call
            found.calls = []
        return found

    def _before_tag(self) -> str:
        at = self.buffer.find(OPEN)
        self.calling = at >= 0
        if not self.calling:
            at = len(self.buffer) - held_tail(self.buffer, OPEN)
        content, self.buffer = self.buffer[:at], self.buffer[at:]
        return content

    def _next_call(self) -> Optional[Tuple[str, Json]]:
        found = self.scanner.first_object(self.buffer)
        name = first_known_name(self.buffer, self.tools)
        if found is None or name is None:
            return None
        value, end = found
        arguments = find_arguments(value, name)
        if arguments is None:
            return None
        self.buffer = self.buffer[max(end, self.buffer.find(name) + len(name)) :]
        self.scanner = ObjectScanner()
        return name, dict(sorted(arguments.items()))


def first_known_name(buffer: str, tools: List[Json]) -> Optional[str]:
    """Return the tool whose name occurs first, anywhere in the text.

    None while the text ends in the beginning of a name.
    """
    names = [name for name in map(tool_name, tools) if name]
    if any(held_tail(buffer, name) for name in names):
        return None
    hits = [(buffer.find(name), -len(name), name) for name in names if name in buffer]
    return min(hits)[2] if hits else None


def tool_name(tool: Json) -> str:
    return (tool.get("function") or {}).get("name") or ""


class ObjectScanner:
    """Finds the first JSON object in a growing text, looking at each byte once."""

    MARK = re.compile(r'[\\"{}]')

    def __init__(self) -> None:
        self.at, self.depth, self.start, self.quoted = 0, 0, -1, False
        self.found: Optional[Tuple[Json, int]] = None

    def first_object(self, buffer: str) -> Optional[Tuple[Json, int]]:
        """Return (object, index of its last brace) once it is complete."""
        while self.found is None:
            mark = self.MARK.search(buffer, self.at)
            if mark is None:
                self.at = max(self.at, len(buffer))
                break
            self.at = mark.end() + (mark.group() == "\\")
            if mark.group() == '"':
                self.quoted = not self.quoted
            elif mark.group() == "{" and not self.quoted:
                self.start = mark.start() if self.depth == 0 else self.start
                self.depth += 1
            elif mark.group() == "}" and not self.quoted:
                self.depth = max(0, self.depth - 1)
                if self.depth == 0 and self.start >= 0:
                    self._complete(buffer, mark.start())
        return self.found

    def _complete(self, buffer: str, end: int) -> None:
        try:
            self.found = (json.loads(buffer[self.start : end + 1]), end)
        except (ValueError, RecursionError):
            self.start = -1


def find_arguments(value: Json, name: str) -> Optional[Json]:
    """Return the arguments in the object, or the object itself.

    None if it has a name but no arguments: Ollama then waits for ever.
    """
    found, arguments = search_arguments(value, name)
    return arguments if found else value


def search_arguments(value: Json, name: str) -> Tuple[bool, Optional[Json]]:
    if "name" in value:
        options = [as_object(value.get(key)) for key in ("arguments", "parameters")]
        return True, next((one for one in options if one is not None), None)
    own = as_object(value.get(name))
    if own is not None:
        return True, own
    for child in value.values():
        for one in child if isinstance(child, list) else [child]:
            if isinstance(one, dict):
                found, arguments = search_arguments(one, name)
                if found:
                    return True, arguments
    return False, None


def as_object(value: Any) -> Optional[Json]:
    """Return an object, also one written as a JSON string."""
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    return value if isinstance(value, dict) else None


class NativeParser(PlainParser):
    """Path C: calls travel in the done line; a grammar forbids unknown ones."""

    def __init__(self, tools: List[Json], think: bool, version: str) -> None:
        super().__init__(tools, think, version)
        self.buffer = ""
        self.calls: List[Tuple[str, Json]] = []
        self.calling = False
        self.splitter = ThinkSplitter()

    def add(self, piece: str) -> Parsed:
        thought, piece = self.splitter.add(piece)
        if not self.tools:
            return Parsed(content=piece, thinking=thought)
        self.buffer += piece
        found = Parsed(thinking=thought)
        while True:
            before, tag, after = self.buffer.partition(CLOSE if self.calling else OPEN)
            if not tag:
                break
            if self.calling:
                self._call(before)
            else:
                found.content += before if not self.calls else before.strip()
            self.buffer, self.calling = after, not self.calling
        if not self.calling:
            shown = self.buffer[: len(self.buffer) - held_tail(self.buffer, OPEN)]
            found.content += shown if not self.calls else shown.strip()
            self.buffer = self.buffer[len(shown) :]
        return found

    def _call(self, body: str) -> None:
        names = [tool_name(tool) for tool in self.tools]
        try:
            made = json.loads(body)
            if made["name"] in names:
                self.calls.append((made["name"], dict(made["arguments"])))
                return
        except (ValueError, KeyError, TypeError):
            pass
        raise ParserError(
            "llama-server chat error: map[code:500 message:got exception: Unexpected empty "
            "grammar stack after accepting piece type:server_error]"
        )

    def end(self) -> Parsed:
        return Parsed(calls=self.calls)


# ---------------------------------------------------------------- renderers (messages -> prompt)


def turn(role: str, content: str) -> str:
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


def xml_call(name: str, arguments: Json) -> str:
    """Write a past call as the XML renderers do."""
    parts = []
    for key, value in arguments.items():
        nested = isinstance(value, (dict, list))
        shown = go_json(value, sort_keys=True) if nested else go_text(value)
        parts.append(f"<parameter={key}>\n{shown}\n</parameter>\n")
    return f"{OPEN}\n<function={name}>\n{''.join(parts)}</function>\n{CLOSE}"


def written_xml_call(name: str, arguments: Json) -> str:
    """Write a call as the model does: what is no string is JSON."""
    shown = {k: v if isinstance(v, str) else json.dumps(v) for k, v in arguments.items()}
    return xml_call(name, shown)


def json_call(name: str, arguments: Json) -> str:
    made = go_json(arguments, spaced=True)
    return f'{OPEN}\n{{"name": "{name}", "arguments": {made}}}\n{CLOSE}'


def go_text(value: Any) -> str:
    """Print a scalar as Go's %v does; numbers have been float64 there."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    sign, digits, shift = Decimal(repr(float(value))).normalize().as_tuple()
    point = len(digits) + int(shift) - 1
    if not value or -4 <= point < 6:
        return go_json(whole_number(float(value)))
    mantissa = str(digits[0]) + "." * (len(digits) > 1) + "".join(map(str, digits[1:]))
    return f"{'-' * sign}{mantissa}e{'-' if point < 0 else '+'}{abs(point):02d}"


def calls_of(message: Json) -> List[Tuple[str, Json]]:
    functions = [c.get("function") or {} for c in message.get("tool_calls") or []]
    return [(f.get("name") or "", f.get("arguments") or {}) for f in functions]


def grouped_results(messages: List[Json], at: int) -> str:
    """Tool result at this place; neighbours share one user turn."""
    before = at > 0 and messages[at - 1]["role"] == "tool"
    after = at + 1 < len(messages) and messages[at + 1]["role"] == "tool"
    opening = "" if before else "<|im_start|>user"
    closing = "" if after else "<|im_end|>\n"
    return f"{opening}\n<tool_response>\n{messages[at]['content']}\n</tool_response>{closing}"


XML_RULES = """

If you choose to call a function ONLY reply in the following format with NO suffix:

<tool_call>
<function=example_function_name>
<parameter=example_parameter_1>
value_1
</parameter>
<parameter=example_parameter_2>
This is the value for the second parameter
that can span
multiple lines
</parameter>
</function>
</tool_call>

<IMPORTANT>
Reminder:
- Function calls MUST follow the specified format: an inner <function=...></function> block \
must be nested within <tool_call></tool_call> XML tags
- Required parameters MUST be specified
- You may provide optional reasoning for your function call in natural language BEFORE the \
function call, but NOT after
- If there is no function call available, answer the question like normal with your current \
knowledge and do not tell the user about function calls
</IMPORTANT>"""
CODER_SYSTEM = (
    "You are Qwen, a helpful AI assistant that can interact with a computer to solve tasks."
)
XML_TOOLS = "# Tools\n\nYou have access to the following functions:\n\n<tools>"
SIMPLE_KEYS = ("type", "description")


def xml_extras(schema: Json, known: Iterable[str], rotation: int) -> str:
    """Print the other keys; with several, the order moves from call to call.

    Ollama walks a Go map here, so that two renders of one request may differ.
    """
    keys = [key for key in schema if key not in known]
    rotation = rotation % len(keys) if keys else 0
    keys = keys[rotation:] + keys[:rotation]
    return "".join(f"<{key}>{go_json(schema[key], sort_keys=True)}</{key}>\n" for key in keys)


def xml_tool(tool: Json, rotation: int) -> str:
    function = ordered_tool(tool)["function"]
    parameters = function["parameters"]
    made = [f"\n<function>\n<name>{function['name']}</name>"]
    if function.get("description"):
        made.append(f"\n<description>{function['description']}</description>")
    made.append("\n<parameters>\n")
    for name, schema in (parameters.get("properties") or {}).items():
        made.append(f"<parameter>\n<name>{name}</name>\n")
        if schema.get("type"):
            kind = schema["type"]
            made.append(f"<type>{kind if isinstance(kind, str) else go_json(kind)}</type>\n")
        if schema.get("description"):
            made.append(f"<description>{schema['description']}</description>\n")
        made.append(xml_extras(schema, SIMPLE_KEYS, rotation) + "</parameter>\n")
    made.append(xml_extras(parameters, ("type", "properties"), rotation))
    made.append("</parameters>\n</function>")
    return "".join(made)


def render_coder(messages: List[Json], tools: List[Json], think: bool, rotation: int = 0) -> str:
    """Path A, qwen3-coder: later system messages are dropped."""
    systems = [m["content"] for m in messages if m["role"] == "system" and m["content"]]
    system = systems[0] if systems else CODER_SYSTEM if tools else ""
    made = []
    if tools:
        listed = "".join(xml_tool(tool, rotation) for tool in tools)
        system += f"\n\n{XML_TOOLS}{listed}\n</tools>{XML_RULES}"
    if system:
        made.append(turn("system", system))
    rest = [m for m in messages if m["role"] != "system"]
    for at, message in enumerate(rest):
        if message["role"] == "tool":
            made.append(grouped_results(rest, at))
        elif message["role"] == "assistant" and message.get("tool_calls"):
            content = message["content"] + "\n" if message["content"] else ""
            calls = "".join("\n" + xml_call(*c) for c in calls_of(message))
            made.append(turn("assistant", content + calls))
        else:
            made.append(turn(message["role"], message["content"]))
    if rest and rest[-1]["role"] == "assistant" and rest[-1].get("tool_calls"):
        return "".join(made)  # closed, and no new turn opened
    return close_prompt("".join(made), rest, "")


def close_prompt(made: str, messages: List[Json], opening: str) -> str:
    """Open the assistant's turn, or leave the last one open (prefill)."""
    if messages and messages[-1]["role"] == "assistant":
        return made[: -len("<|im_end|>\n")]
    return f"{made}<|im_start|>assistant\n{opening}"


def tool_json(tool: Json) -> str:
    return go_json(ordered_tool(tool), spaced=True).translate(GO_ESCAPES)


def ordered_tool(tool: Json) -> Json:
    """Put the keys in the order of Ollama's Go structs."""
    function = tool.get("function") or {}
    made: Json = {"name": function.get("name", "")}
    if function.get("description"):
        made["description"] = function["description"]
    given = function.get("parameters") or {}
    parameters: Json = {"type": given.get("type", "")}
    for key in ("$defs", "items", "required"):
        if given.get(key):
            parameters[key] = sorted_any(given[key])
    parameters["properties"] = ordered_properties(given.get("properties"))
    made["parameters"] = parameters
    return {"type": tool.get("type") or "function", "function": made}


PROPERTY_KEYS = ("anyOf", "type", "items", "description", "enum", "properties", "required")


def ordered_properties(properties: Optional[Json]) -> Optional[Json]:
    if properties is None:
        return None
    return {name: ordered_property(schema) for name, schema in properties.items()}


def sorted_any(value: Any) -> Any:
    """Sort the keys of what Go decodes into an open map."""
    if isinstance(value, dict):
        return {key: sorted_any(value[key]) for key in sorted(value)}
    return [sorted_any(one) for one in value] if isinstance(value, list) else value


def ordered_property(schema: Json) -> Json:
    made = {key: schema[key] for key in PROPERTY_KEYS if schema.get(key) not in (None, [], "")}
    if isinstance(made.get("type"), list) and len(made["type"]) == 1:
        made["type"] = made["type"][0]
    if "properties" in made:
        made["properties"] = ordered_properties(made["properties"])
    for key in ("items", "enum"):
        if key in made:
            made[key] = sorted_any(made[key])
    if "anyOf" in made:
        made["anyOf"] = [ordered_property(one) for one in made["anyOf"]]
    return made


def render_qwen35(messages: List[Json], tools: List[Json], think: bool, rotation: int = 0) -> str:
    """Path A, qwen3.5: thinking only after the last user message."""
    del rotation
    made = []
    messages = [dict(m, content=m["content"].strip()) for m in number_images(messages)]
    first = messages[0] if messages and messages[0]["role"] == "system" else None
    if tools:
        listed = "".join("\n" + tool_json(tool) for tool in tools)
        after = "\n\n" + first["content"] if first and first["content"] else ""
        made.append(turn("system", f"{XML_TOOLS}{listed}\n</tools>{XML_RULES}{after}"))
    elif first:
        made.append(turn("system", first["content"]))
    last_query = max((at for at, m in enumerate(messages) if is_query(m)), default=len(messages))
    for at, message in enumerate(messages):
        if message["role"] == "tool":
            made.append(grouped_results(messages, at))
        elif message["role"] == "assistant":
            made.append(turn("assistant", qwen35_answer(message, think, at > last_query)))
        elif message["role"] == "user" or (message["role"] == "system" and at):
            made.append(turn(message["role"], message["content"]))
    opening = "<think>\n" if think else "<think>\n\n</think>\n\n"
    return close_prompt("".join(made), messages, opening)


def is_query(message: Json) -> bool:
    """Whether a person speaks here, not a tool result in a user turn."""
    content = message["content"]
    wrapped = content.startswith("<tool_response>") and content.endswith("</tool_response>")
    return message["role"] == "user" and not wrapped


def qwen35_answer(message: Json, think: bool, recent: bool) -> str:
    thought, content = (message.get("thinking") or "").strip() if think else "", message["content"]
    if not thought and THINK_END in content:
        before, _, after = content.partition(THINK_END)
        thought, content = before.rpartition(THINK)[2].strip(), after.lstrip("\n")
    block = f"<think>\n{thought}\n</think>\n\n" if think and recent else ""
    calls = "\n".join(xml_call(*c) for c in calls_of(message))
    joint = "\n\n" if content.strip() and calls else ""
    return f"{block}{content}{joint}{calls}"


def number_images(messages: List[Json]) -> List[Json]:
    """Put [img-N] before the text of each message with images."""
    made, seen = [], 0
    for message in messages:
        count = len(message.get("images") or [])
        marks = "".join(f"[img-{seen + n}]" for n in range(count))
        seen += count
        made.append(dict(message, content=marks + message["content"]) if count else message)
    return made


def collate(messages: List[Json]) -> Tuple[str, List[Json]]:
    """Path B: hoist system messages, merge neighbours of one role.

    A system message stays as an empty place between its neighbours.
    """
    messages = number_images(messages)
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    merged: List[Json] = []
    for message in messages:
        if merged and merged[-1]["role"] == message["role"] and message["role"] != "tool":
            content = f"{merged[-1]['content']}\n\n{message['content']}"
            merged[-1] = dict(merged[-1], content=content)
        else:
            merged.append(message)
    return system, merged


def go_struct_tool(tool: Json) -> str:
    """Print a tool as Go prints a struct: what the templates get since 0.14."""
    function = ordered_tool(tool)["function"]
    parameters = function["parameters"]
    values = [
        function["name"],
        function.get("description", ""),
        "{{{} {} {} [{}] {}}}".format(
            parameters["type"],
            go_value(parameters.get("$defs")),
            go_value(parameters.get("items")),
            " ".join(parameters.get("required") or []),
            go_json(dict(sorted((parameters["properties"] or {}).items()))),
        ),
    ]
    return '{"type": "function", "function": {' + " ".join(values) + "}}"


def go_value(value: Any) -> str:
    """Print a value as Go's %v does."""
    if value is None:
        return "<nil>"
    if isinstance(value, dict):
        return "map[" + " ".join(f"{k}:{go_value(v)}" for k, v in sorted(value.items())) + "]"
    if isinstance(value, list):
        return "[" + " ".join(map(go_value, value)) + "]"
    return go_text(value)


JSON_RULES = """\
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""
QWEN25_TOOLS = """

# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>"""
QWEN25_AFTER = """
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
"""


def template_turns(messages: List[Json], decorate: Callable[[int, Json, str], str]) -> str:
    """Write the turns both Go templates share; calls beside text are dropped."""
    made = []
    for at, message in enumerate(messages):
        content = message["content"]
        if message["role"] == "tool":
            made.append(turn("user", f"<tool_response>\n{content}\n</tool_response>"))
        elif message["role"] in ("user", "assistant"):
            if not content and message.get("tool_calls"):
                lines = "".join(
                    f'{{"name": "{n}", "arguments": {go_json(a, sort_keys=True)}}}\n'
                    for n, a in calls_of(message)
                )
                content = f"{OPEN}\n{lines}{CLOSE}"
            made.append(turn(message["role"], decorate(at, message, content)))
    return "".join(made)


def render_qwen25(messages: List[Json], tools: List[Json], think: bool, rotation: int = 0) -> str:
    """Path B, the qwen2.5-coder template."""
    del think, rotation
    system, merged = collate(messages)
    head = f"\n{system}" if system else ""
    if tools:
        listed = "".join("\n" + go_struct_tool(tool) for tool in tools)
        head += f"{QWEN25_TOOLS}{listed}{QWEN25_AFTER}{JSON_RULES}"
    made = f"<|im_start|>system{head}<|im_end|>\n" if head else ""
    made += template_turns(merged, lambda at, message, content: content)
    return close_prompt(made, merged, "")


def render_qwen3(messages: List[Json], tools: List[Json], think: bool, rotation: int = 0) -> str:
    """Path B, the qwen3 template: a switch on the last user message."""
    del rotation
    last_user = max((at for at, m in enumerate(messages) if m["role"] == "user"), default=-1)
    messages = [without_thinking(m) if at < last_user else m for at, m in enumerate(messages)]
    system, merged = collate(messages)
    last_user = max((at for at, m in enumerate(merged) if m["role"] == "user"), default=-1)
    head = f"{system}\n\n" if system else ""
    if tools:
        listed = "".join("\n" + go_struct_tool(tool) for tool in tools)
        head += f"# Tools\n<tools>{listed}\n</tools>\n{JSON_RULES}"

    def decorate(at: int, message: Json, content: str) -> str:
        if message["role"] == "user":
            switch = " /think" if think else " /no_think"
            return content + switch if at == last_user else content
        keep = message.get("thinking") and (at > last_user or at == len(merged) - 1)
        return f"<think>{message['thinking']}</think>\n{content}" if keep else content

    made = turn("system", head) if head else ""
    made += template_turns(merged, decorate)
    return close_prompt(made, merged, "" if think else "<think>\n\n</think>\n\n")


def without_thinking(message: Json) -> Json:
    """Strip a leading think block from a past answer, as for family qwen3."""
    if message["role"] != "assistant":
        return message
    return dict(message, content=ThinkSplitter().add(message["content"])[1])


def render_native(messages: List[Json], tools: List[Json], think: bool, rotation: int = 0) -> str:
    """Path C: the chat template of the recordings' GGUF."""
    del think, rotation
    first = messages[0] if messages and messages[0]["role"] == "system" else None
    made = []
    if tools:
        head = first["content"] + "\n\n" if first else ""
        listed = "".join("\n" + go_json(ordered_tool(tool), spaced=True) for tool in tools)
        head += f"# Tools\n<tools>{listed}\n</tools>\nReturn {JSON_RULES}"
        made.append(turn("system", head))
    elif first:
        made.append(turn("system", first["content"]))
    for at, message in enumerate(messages):
        if message["role"] == "tool":
            made.append(grouped_results(messages, at))
        elif message["role"] == "assistant":
            content = "\n" + message["content"] if message["content"] else ""
            calls = "".join("\n" + json_call(*c) for c in calls_of(message))
            made.append(f"<|im_start|>assistant{content}{calls}<|im_end|>\n")
        elif message["role"] == "user" or at > 0:
            made.append(turn(message["role"], message["content"]))
    return close_prompt("".join(made), messages, "")


def render_plain(messages: List[Json], tools: List[Json], think: bool, rotation: int = 0) -> str:
    del tools, think, rotation
    return "".join(m["content"] for m in messages[-1:])


# ---------------------------------------------------------------- models


GO_TEMPLATE = """{{- if or .System .Tools }}<|im_start|>system
{{ .System }}{{ range .Tools }}
{{ .Function }}{{ end }}<|im_end|>
{{ end }}{{ range .Messages }}<|im_start|>{{ .Role }}
{{ if .Content }}{{ .Content }}{{ else if .ToolCalls }}{{ range .ToolCalls }}<tool_call>
{"name": "{{ .Function.Name }}", "arguments": {{ .Function.Arguments }}}
</tool_call>{{ end }}{{ end }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
GO_THINK_TEMPLATE = GO_TEMPLATE.replace("{{ if .Content }}", "{{ .Thinking }}{{ if .Content }}")
JINJA = """{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{%- for call in message.tool_calls %}<tool_call>
{{ call.function | tojson }}
</tool_call>{%- endfor %}<|im_end|>
{% endfor %}{%- if tools %}{{ tools | tojson }}{%- endif %}"""
PROMPT_ONLY = "{{ .Prompt }}"


@dataclass(frozen=True)
class ModelPath:
    """How one kind of model is rendered, parsed and shown."""

    render: Callable[..., str]
    parser: type
    capabilities: Tuple[str, ...]
    template: str = PROMPT_ONLY
    renderer: str = ""
    write_call: Callable[[str, Json], str] = json_call
    architecture: str = "qwen2"


PATHS = {
    "a": ModelPath(
        render_coder, CoderParser, ("completion", "tools"), renderer="qwen3-coder",
        write_call=written_xml_call, architecture="qwen3moe",
    ),
    "a35": ModelPath(
        render_qwen35, Qwen35Parser, ("completion", "tools", "thinking"), renderer="qwen3.5",
        write_call=written_xml_call, architecture="qwen35",
    ),
    "b": ModelPath(render_qwen25, TemplateParser, ("completion", "tools"), GO_TEMPLATE),
    "q3": ModelPath(
        render_qwen3, TemplateParser, ("completion", "tools", "thinking"), GO_THINK_TEMPLATE,
        architecture="qwen3",
    ),
    "c": ModelPath(render_native, NativeParser, ("tools", "completion"), JINJA),
    "plain": ModelPath(render_plain, PlainParser, ("completion",)),
}  # fmt: skip
# the first that begins the name decides; a- a35- b- q3- c- as in the recordings
NAME_PATHS = (
    ("a35", "a35"), ("a-", "a"), ("b-", "b"), ("q3-", "q3"), ("c-", "c"), ("plain", "plain"),
    ("qwen3-coder", "a"), ("qwen3.5", "a35"), ("qwen3.6", "a35"), ("qwen2.5", "b"), ("qwen3", "q3"),
)  # fmt: skip
DEFAULT_MODELS = (
    "qwen3-coder:30b", "qwen3.5:9b", "qwen2.5-coder:7b", "qwen3:8b", "c-import:latest",
    "plain:latest",
)  # fmt: skip


def path_of(name: str) -> str:
    return next((path for prefix, path in NAME_PATHS if name.startswith(prefix)), "b")


@dataclass(frozen=True)
class Model:
    """One installed model; context is its trained maximum in tokens."""

    name: str
    path: str = ""
    context: int = 32_768
    parameters: Json = field(default_factory=dict)
    capabilities: Optional[Tuple[str, ...]] = None
    size: int = 168_097_216
    size_vram: Optional[int] = None

    @property
    def kind(self) -> ModelPath:
        return PATHS[self.path or path_of(self.name)]

    @property
    def full_name(self) -> str:
        return self.name if ":" in self.name else f"{self.name}:latest"

    @property
    def digest(self) -> str:
        return sha256(self.full_name.encode()).hexdigest()

    def can(self, capability: str, version: str) -> bool:
        if self.kind.parser is NativeParser and capability == "tools" and old(version):
            return False
        return capability in (self.capabilities or self.kind.capabilities)

    def details(self) -> Json:
        return {
            "parent_model": "",
            "format": "gguf",
            "family": self.kind.architecture,
            "families": [self.kind.architecture],
            "parameter_size": "77.97M",
            "quantization_level": "F16",
        }

    def modelfile(self, template: str) -> str:
        lines = [
            '# Modelfile generated by "ollama show"',
            "# To build a new Modelfile based on this, replace FROM with:",
            f"# FROM {self.full_name}\n",
            f"FROM /models/blobs/sha256-{self.digest}",
            f'TEMPLATE """{template}"""' if "\n" in template else f"TEMPLATE {template}",
        ]
        if self.kind.renderer:
            lines += [f"RENDERER {self.kind.renderer}", f"PARSER {self.kind.renderer}"]
        lines += [f"PARAMETER {key} {value}" for key, value in self.parameters.items()]
        return "\n".join(lines) + "\n"

    def show(self, version: str) -> Json:
        """Return the body of /api/show."""
        native = self.kind.parser is NativeParser
        inner = PROMPT_ONLY if native else self.kind.template
        arch = self.kind.architecture
        shown: Json = {"modelfile": self.modelfile(inner)}
        if self.parameters:
            shown["parameters"] = "\n".join(f"{k:<30} {v}" for k, v in self.parameters.items())
        wanted = self.capabilities or self.kind.capabilities
        shown.update(
            template=inner if old(version) else self.kind.template,
            details=self.details(),
            model_info={
                "general.architecture": arch,
                "general.file_type": 1,
                "general.parameter_count": 77_970_944,
                f"{arch}.block_count": 1,
                f"{arch}.context_length": self.context,
                f"{arch}.embedding_length": 256,
                "tokenizer.ggml.model": "gpt2",
                "tokenizer.ggml.pre": "qwen2",
                "tokenizer.ggml.tokens": None,
            },
            tensors=[{"name": "output.weight", "type": "F16", "shape": [256, 151_676]}],
            capabilities=[c for c in wanted if self.can(c, version)],
            modified_at=timestamp(-3600),
        )
        return shown


def old(version: str) -> bool:
    """Whether this is Ollama before 0.30, with its own engine."""
    return int(version.split(".")[1]) < 30


# ---------------------------------------------------------------- the simulated slot


def default_tokens(content: str) -> int:
    return -int(-len(content) // CHARS_PER_TOKEN)


def common_length(one: str, other: str) -> int:
    """Length of the common beginning, found by halving."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


@dataclass
class Cache:
    """What one model's runner holds: the slot's text, and displaced ones."""

    slot: str = ""
    ram: List[str] = field(default_factory=list)

    def take(self, prompt: str) -> int:
        """Put the prompt into the slot; return how much of it was there."""

        def share(held: str) -> float:
            return common_length(held, prompt) / max(1, len(held))

        if self.slot and share(self.slot) < 0.5:
            best = max(self.ram, key=share, default="")
            self.ram.append(self.slot)
            if best and share(best) >= max(0.25, share(self.slot)):
                self.ram.remove(best)
                self.slot = best
        common = common_length(self.slot, prompt)
        self.slot = prompt
        return common


class SimulatedSlot:
    """One place in llama-server: charges only what its cache does not hold.

    scale is how much of the charged time really passes (0: none, only counted
    in seconds). What a new prompt displaces goes to the RAM cache unless at
    least half of it is kept; an entry comes back when a quarter of it matches.
    Each model has its own cache.
    """

    def __init__(
        self, prefill_s_per_token: float = 0.0002, token_s: float = TOKEN_S, scale: float = 0.0
    ) -> None:
        self.prefill_s_per_token, self.token_s, self.scale = prefill_s_per_token, token_s, scale
        self.seconds = 0.0
        self.read: List[int] = []  # tokens read anew, one entry for each request
        self.caches: Dict[str, Cache] = {}
        self._lock = threading.RLock()

    def prefill(
        self, prompt: str, count: Callable[[str], int], model: str = ""
    ) -> Tuple[int, float]:
        """Return (tokens read anew, seconds) for this prompt and keep it."""
        with self._lock:
            common = self.caches.setdefault(model, Cache()).take(prompt)
            fresh = max(1, count(prompt) - count(prompt[:common]))
            self.read.append(fresh)
            return fresh, self._charge(fresh * self.prefill_s_per_token)

    def generate(self, piece: str, model: str = "") -> float:
        with self._lock:
            self.caches.setdefault(model, Cache()).slot += piece
            return self._charge(self.token_s)

    def forget(self, model: str = "") -> None:
        """Lose the model's cache, as an unload does."""
        with self._lock:
            self.caches.pop(model, None)

    def _charge(self, seconds: float) -> float:
        self.seconds += seconds
        return seconds


# ---------------------------------------------------------------- requests


class Recorded:
    """One request as it came, and what became of it.

    Fields: method, path, headers (names in lower case), raw, body (parsed JSON
    or None), when (time.monotonic()), prompt and prompt_tokens (what was
    rendered), events closed_by_client (it left before the answer was complete)
    and finished (the answer is over, however it ended).
    """

    def __init__(self, method: str, target: str, version: str, headers: Dict[str, str]) -> None:
        self.method, self.target, self.version, self.headers = method, target, version, headers
        self.path = target.partition("?")[0]
        self.raw = b""
        self.body: Any = None
        self.when = time.monotonic()
        self.prompt = ""
        self.prompt_tokens = 0
        self.status: Optional[int] = None
        self.closed_by_client = threading.Event()
        self.finished = threading.Event()

    def __repr__(self) -> str:
        return f"<{self.method} {self.target} {self.status}>"


class RefusedError(Exception):
    """An HTTP answer other than the asked one."""

    def __init__(self, code: int, message: str, content_type: str = "") -> None:
        super().__init__(message)
        self.code, self.message = code, message
        self.content_type = content_type or "application/json; charset=utf-8"


def go_kind(value: Any) -> str:
    """Name a JSON value as Go's decoder does."""
    for kinds, name in ((bool, "bool"), (str, "string"), ((int, float), "number"), (list, "array")):
        if isinstance(value, kinds):
            return name
    return "object"


def go_mismatch(value: Any, where: str, wanted: str) -> RefusedError:
    what = f"json: cannot unmarshal {go_kind(value)} into Go struct field"
    return RefusedError(400, f"{what} {where} of type {wanted}")


def go_float(digits: str) -> Union[int, float]:
    """Read a number through float64, as Go does where the type is open."""
    return whole_number(float(digits))


DECODER = json.JSONDecoder(parse_float=go_float, parse_int=go_float)
# what Python says -> what Go says; the rest is "looking for beginning of value"
JSON_ERRORS = (
    ("Expecting property name", "looking for beginning of object key string"),
    ("Illegal trailing comma", "looking for beginning of object key string"),
    ("Expecting ':'", "after object key"),
    ("Expecting ','", "after object key:value pair"),
    ("Invalid control character", "in string literal"),
)


def parse_body(data: bytes) -> Json:
    """Decode as Go does, only the first value; raises RefusedError."""
    if not data.strip():
        raise RefusedError(400, "missing request body")
    words = data.decode("utf-8", "replace").strip()
    try:
        body, _ = DECODER.raw_decode(words)
    except RecursionError:
        raise RefusedError(400, "exceeded max depth") from None
    except json.JSONDecodeError as error:
        raise RefusedError(400, go_syntax_error(words, error)) from None
    if not isinstance(body, dict):
        message = f"json: cannot unmarshal {go_kind(body)} into Go value of type api.ChatRequest"
        raise RefusedError(400, message)
    return body


def go_syntax_error(words: str, error: json.JSONDecodeError) -> str:
    if error.pos >= len(words) or error.msg.startswith("Unterminated"):
        return "unexpected EOF"
    found = [said for known, said in JSON_ERRORS if error.msg.startswith(known)]
    where = found[0] if found else "looking for beginning of value"
    rest = words[error.pos :]
    if "trailing comma" in error.msg:  # Python 3.13 points at the comma, Go behind it
        rest = rest.lstrip(", \t\r\n")
    return f"invalid character {rest[:1]!r} {where}"


def listed(body: Json, key: str, wanted: str) -> List[Any]:
    value = body.get(key)
    if value is not None and not isinstance(value, list):
        raise go_mismatch(value, f"ChatRequest.{key}", wanted)
    return value or []


def check_message(message: Any) -> Json:
    """Return the message with defaults, or raise the 400 of Ollama."""
    if not isinstance(message, dict):
        raise go_mismatch(message, "ChatRequest.messages", "api.Message")
    for key in ("role", "content", "thinking", "tool_name", "tool_call_id"):
        if not isinstance(message.get(key) or "", str):
            raise go_mismatch(message[key], f"ChatRequest.messages.{key}", "string")
    for made in message.get("tool_calls") or []:
        arguments = (made.get("function") or {}).get("arguments")
        if arguments is not None and not isinstance(arguments, dict):
            text_ = "Value looks like object, but can't find closing '}' symbol"
            raise RefusedError(400, text_)
    for image in message.get("images") or []:
        bad = re.search(r"[^A-Za-z0-9+/=\r\n]", image)
        if bad:
            raise RefusedError(400, f"illegal base64 data at input byte {bad.start()}")
    made = dict(message, role=str(message.get("role") or "").lower())
    made["content"] = message.get("content") or ""
    return made


PARAMETERS = "ToolFunctionParameters.tools.function.parameters"
PROPERTY = f"{PARAMETERS}.properties"
PROPERTY_TYPES = (
    ("description", str, "string"),
    ("enum", list, "[]interface {}"),
    ("required", list, "[]string"),
    ("anyOf", list, "[]api.ToolProperty"),
)


def check_tool(tool: Any) -> Json:
    """Refuse the schemas that Ollama's decoder refuses."""
    if not isinstance(tool, dict):
        raise go_mismatch(tool, "ChatRequest.tools", "api.Tool")
    function = tool.get("function") or {}
    given = function.get("parameters") or {}
    if not isinstance(given, dict):
        where = "ChatRequest.tools.function.parameters"
        raise go_mismatch(given, where, "api.ToolFunctionParameters")
    if not isinstance(given.get("type") or "", str):
        raise go_mismatch(given["type"], f"{PARAMETERS}.type", "string")
    if not isinstance(given.get("required") or [], list):
        raise go_mismatch(given["required"], f"{PARAMETERS}.required", "[]string")
    for schema in (given.get("properties") or {}).values():
        check_property(schema, PROPERTY)
    return tool


def check_property(schema: Any, where: str) -> None:
    if schema is None:
        return
    if not isinstance(schema, dict):
        raise go_mismatch(schema, where, "api.ToolProperty")
    for key, kind, wanted in PROPERTY_TYPES:
        if schema.get(key) is not None and not isinstance(schema[key], kind):
            raise go_mismatch(schema[key], f"{PROPERTY}.{key}", wanted)
    for inner in schema.get("anyOf") or []:
        check_property(inner, f"{PROPERTY}.anyOf")
    for inner in (schema.get("properties") or {}).values():
        check_property(inner, f"{PROPERTY}.properties")


LOAD_OPTIONS = (
    "num_ctx", "num_batch", "num_gpu", "main_gpu", "use_mmap", "num_thread", "draft_num_predict",
)  # fmt: skip
INTEGER_OPTIONS = (
    "num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "num_keep", "seed",
    "num_predict", "top_k", "repeat_last_n", "draft_num_predict",
)  # fmt: skip
FLOAT_OPTIONS = (
    "temperature", "top_p", "min_p", "typical_p", "repeat_penalty", "presence_penalty",
    "frequency_penalty",
)  # fmt: skip
THINK_VALUES = (None, True, False, "low", "medium", "high", "max")
BOOL_FIELDS = ("stream", "truncate", "shift", "raw", "logprobs", "_debug_render_only")
DURATION = re.compile(r"-?(?:[0-9.]+(?:ns|us|µs|ms|s|m|h))+|-?0")


def check_options(options: Any) -> Json:
    """Return the options; a wrong type is a 500 there."""
    for names, kind, wanted in (
        (INTEGER_OPTIONS, (int, float), "integer"),
        (FLOAT_OPTIONS, (int, float), "float32"),
        (("use_mmap",), bool, "boolean"),
        (("stop",), list, "array"),
    ):
        for name in names:
            value = (options or {}).get(name)
            wrong = isinstance(value, bool) and kind is not bool
            if value is not None and (wrong or not isinstance(value, kind)):
                raise RefusedError(500, f'option "{name}" must be of type {wanted}')
    return options or {}


def check_think(value: Any) -> Any:
    levels = '"high", "medium", "low", "max", true, or false'
    if not isinstance(value, (bool, str, type(None))):
        raise RefusedError(400, f"think must be a boolean or string ({levels})")
    if value not in THINK_VALUES:
        raise RefusedError(400, f"invalid think value: {go_json(value)} (must be {levels})")
    return value


def keep_alive_seconds(value: Any) -> Optional[float]:
    """Return seconds (negative: for ever; None: unsaid); raises RefusedError."""
    if value is None:
        return None
    if isinstance(value, bool):
        raise RefusedError(400, "Unsupported type: 'bool'")
    if isinstance(value, (int, float)):
        return float(value)
    if not DURATION.fullmatch(value):
        problem = "missing unit in" if re.fullmatch(r"-?[0-9.]+", value) else "invalid"
        raise RefusedError(400, f'time: {problem} duration "{value}"')
    seconds = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "h": 3600, "": 1}
    total = sum(float(n) * seconds[unit] for n, unit in re.findall(r"([0-9.]+)([a-zµ]*)", value))
    return -total if value.startswith("-") else total


@dataclass
class Asked:
    """A checked chat or generate request."""

    body: Json
    model: Model
    messages: List[Json]
    tools: List[Json]
    options: Json
    keep_s: Optional[float]
    think: bool
    chat: bool

    @property
    def verbatim(self) -> bool:
        """Raw generate: neither renderer nor parser take part."""
        return not self.chat and self.body.get("raw") is True

    @property
    def prefilled(self) -> bool:
        """The last message is the beginning of the answer (path A, qwen3.5)."""
        last = self.messages[-1] if self.messages else {}
        begun = last.get("role") == "assistant" and last["content"]
        return bool(begun) and self.model.kind.parser is Qwen35Parser

    @property
    def stream(self) -> bool:
        return self.body.get("stream") is not False

    @property
    def empty(self) -> bool:
        return not self.messages if self.chat else not self.body.get("prompt")


# ---------------------------------------------------------------- the wire


class LeftError(Exception):
    """The client went away."""


class StoppedError(Exception):
    """The server is closing, or the script ends the connection."""


class Connection:
    """One accepted socket; every wait sees the client leave."""

    def __init__(self, sock: socket.socket, wake: socket.socket) -> None:
        self.sock = sock
        self.buffer = b""
        self.wake = wake
        self.selector = selectors.DefaultSelector()
        self.selector.register(sock, selectors.EVENT_READ)
        self.selector.register(wake, selectors.EVENT_READ)

    def close(self) -> None:
        self.selector.close()
        self.sock.close()

    def wait(self, seconds: float = 0.0) -> None:
        """Sleep; raises LeftError or StoppedError at once when due."""
        deadline = time.monotonic() + seconds
        while True:
            left = max(0.0, deadline - time.monotonic())
            ready = [key.fileobj for key, _ in self.selector.select(left)]
            if self.wake in ready:
                raise StoppedError
            if ready:
                self._more()  # a pipelined request, or the end
            elif time.monotonic() >= deadline:
                return

    def send(self, data: bytes) -> None:
        try:
            self.sock.sendall(data)
        except OSError:
            self.wait()  # the server stopping looks the same
            raise LeftError from None

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise StoppedError

    def _more(self) -> None:
        try:
            data = self.sock.recv(65_536)
        except OSError:
            data = b""
        if not data:
            raise LeftError
        self.buffer += data

    def _line(self) -> bytes:
        while b"\n" not in self.buffer:
            if len(self.buffer) > MAX_HEAD_BYTES:
                raise RefusedError(431, "")
            self._more()
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line.rstrip(b"\r")

    def _exactly(self, size: int) -> bytes:
        while len(self.buffer) < size:
            self._more()
        data, self.buffer = self.buffer[:size], self.buffer[size:]
        return data

    def read_request(self) -> Recorded:
        """Read head and body; raises LeftError at the end of the connection."""
        line = self._line() or self._line()
        parts = line.decode("latin-1").split(" ")
        if len(parts) != 3 or not parts[2].startswith("HTTP/1."):
            raise RefusedError(400, "")
        headers = dict(iter(self._header, ("", "")))
        request = Recorded(parts[0], parts[1], parts[2], headers)
        if headers.get("expect", "").lower() == "100-continue":
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        if "chunked" in headers.get("transfer-encoding", "").lower():
            request.raw = self._chunked()
        else:
            request.raw = self._exactly(int(headers.get("content-length") or 0))
        return request

    def _header(self) -> Tuple[str, str]:
        name, _, value = self._line().decode("latin-1").partition(":")
        return name.strip().lower(), value.strip()

    def _chunked(self) -> bytes:
        data = b""
        while True:
            size = int(self._line().split(b";")[0], 16)
            if not size:
                while self._line():
                    pass
                return data
            data += self._exactly(size)
            self._line()


class Answer:
    """One HTTP answer; the head waits for the first byte of the body."""

    def __init__(self, connection: Connection, request: Recorded) -> None:
        self.connection, self.request = connection, request
        self.modern = request.version == "HTTP/1.1"
        wanted = request.headers.get("connection", "").lower()
        self.keep = self.modern and "close" not in wanted
        self.head = b""
        self.chunked = False
        self.started = False

    def begin(self, code: int, headers: Dict[str, str]) -> None:
        """Stage the head; without Content-Length the body goes in chunks."""
        self.request.status = code
        try:
            phrase = HTTPStatus(code).phrase
        except ValueError:
            phrase = ""
        lines = [f"{self.request.version} {code} {phrase}".rstrip()]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        lines.append("Date: " + datetime.now(timezone.utc).strftime("%a, %d %b %Y %H:%M:%S GMT"))
        if "Content-Length" not in headers:
            self.chunked = self.modern
            lines += ["Transfer-Encoding: chunked"] if self.modern else []
            self.keep = self.keep and self.modern
        lines += [] if self.keep else ["Connection: close"]
        self.head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    def write(self, data: bytes) -> None:
        """Send one piece of the body (and before the first, the head)."""
        self.connection.wait()
        if self.chunked and data:
            data = b"%x\r\n%s\r\n" % (len(data), data)
        self.started = True
        head, self.head = self.head, b""
        self.connection.send(head + data)

    def finish(self) -> None:
        tail = b"0\r\n\r\n" if self.chunked else b""
        head, self.head = self.head, b""
        if head or tail:
            self.connection.send(head + tail)

    def whole(self, code: int, body: bytes, headers: Dict[str, str]) -> None:
        """Send a complete answer with its length."""
        self.begin(code, {**headers, "Content-Length": str(len(body))})
        self.write(b"" if self.request.method == "HEAD" else body)

    def json(self, code: int, value: Any, content_type: str = "") -> None:
        kind = content_type or "application/json; charset=utf-8"
        body = to_bytes(go_json(value))
        if kind == "application/json":  # what llama-server refused comes in chunks
            self.begin(code, {"Content-Type": kind})
            self.write(body)
            self.finish()
        else:
            self.whole(code, body, {"Content-Type": kind})


# ---------------------------------------------------------------- one generation


@dataclass
class Fit:
    """How a prompt fits the window."""

    prompt: str
    tokens: int
    room: Optional[int] = None  # tokens that may be generated; None is no bound


class Turn:
    """Serves one reply to one request, as chat or as raw generate."""

    def __init__(self, mock: MockOllama, answer: Answer, asked: Asked, fit: Fit) -> None:
        self.mock, self.answer, self.asked, self.fit = mock, answer, asked, fit
        self.lines: List[Json] = []
        self.calls = 0
        self.late_calls: List[Json] = []
        self.tokens = 0
        self.eval_s = 0.0
        self.load_s = 0.0
        self.prefill_s = 0.0
        self.last_piece, self.repeats = "", 0
        self.guarded = False  # only model text is caught repeating
        self.over = False
        kind = asked.model.kind
        self.native = kind.parser is NativeParser
        splits = asked.think and kind.parser is TemplateParser
        self.splitter = ThinkSplitter() if splits else None
        self.parser = kind.parser(asked.tools, asked.think and not asked.prefilled, mock.version)
        limit = asked.options.get("num_predict") or -1
        bounds = [b for b in (limit if limit > 0 else None, fit.room) if b is not None]
        self.budget = min(bounds) if bounds else None

    def serve(self, reply: Reply) -> None:
        """Carry out the steps; a missing end is a plain done."""
        for step in reply.steps:
            getattr(self, f"do_{step.kind}")(step.value)
            if self.over:
                return
        full = self.budget is not None and self.tokens >= self.budget
        self.do_done(("length" if full else "stop", {}))

    # -- lines

    def emit(self, line: Json) -> None:
        if self.asked.stream:
            if not self.answer.head and not self.answer.started:
                self.answer.begin(200, {"Content-Type": "application/x-ndjson"})
            self.answer.write(to_bytes(go_json(line) + "\n"))
        else:
            self.answer.connection.wait()
            self.lines.append(line)

    def line(self, parsed: Parsed, finished: bool = False) -> Json:
        made: Json = {"model": self.asked.body["model"], "created_at": timestamp()}
        if self.asked.chat:
            message: Json = {"role": "assistant", "content": parsed.content}
            if parsed.thinking:
                message["thinking"] = parsed.thinking
            if parsed.calls:
                message["tool_calls"] = [self.wire_call(*made_) for made_ in parsed.calls]
            made["message"] = message
        else:
            made["response"] = parsed.content
            if parsed.thinking:
                made["thinking"] = parsed.thinking
        made["done"] = finished
        return made

    def wire_call(self, name: str, arguments: Json, id: Optional[str] = None) -> Json:
        if id is None:
            id = self.mock.new_call_id(self.native)
        index, self.calls = self.calls, self.calls + 1
        return {"id": id, "function": {"index": index, "name": name, "arguments": arguments}}

    # -- tokens

    def pieces(self, pieces: List[str], parse: Callable[[str], Parsed]) -> None:
        """Generate token by token until done, cut short or caught repeating."""
        kept = until_stop(pieces, self.asked.options.get("stop") or [])
        for piece in kept:
            if self.budget is not None and self.tokens >= self.budget:
                self.do_done(("length", {}))
                return
            self.answer.connection.wait(self.mock.token_delay + self.spend(piece))
            if self.guarded and self.repeats > REPEAT_LIMIT:
                self.do_end()
                return
            try:
                parsed = parse(piece)
            except ParserError as error:
                self.fail(str(error))
                return
            if parsed:
                self.emit(self.line(parsed))
        if kept is not pieces:
            self.do_done(("stop", {}))

    def spend(self, piece: str) -> float:
        """Count one token; return the seconds to sleep for it."""
        same = piece.strip() == self.last_piece
        self.repeats = self.repeats + 1 if same else 0
        self.last_piece = piece.strip()
        self.tokens += 1
        seconds = self.mock.slot.generate(piece, self.asked.model.full_name)
        self.eval_s += seconds
        return seconds * self.mock.slot.scale

    def fail(self, message: str) -> None:
        """Report an error as Ollama does: a line, or a 500 when it is the first."""
        self.over = True
        if self.answer.started:
            self.do_error_line(message)
        else:
            self.answer.json(500, {"error": message})

    # -- steps

    def do_text(self, pieces: List[str]) -> None:
        self.pieces(pieces, self.verbatim if self.asked.verbatim else Parsed)

    def do_thinking(self, pieces: List[str]) -> None:
        if self.asked.chat:
            self.pieces(pieces, lambda piece: Parsed(thinking=piece))
            return
        opened = self.fit.prompt.endswith("<think>\n")
        tags = [] if opened else ["<think>", "\n"]
        self.do_model_text([*tags, *pieces, "\n", "</think>", "\n\n"])

    def do_call(self, made: Tuple[str, Json, Optional[str]]) -> None:
        name, arguments, id = made
        written = self.asked.model.kind.write_call(name, arguments)
        if not self.asked.chat:
            self.do_model_text(split_pieces(written))
            return
        self.pieces(split_pieces(written), lambda piece: Parsed())
        if self.over:
            return
        if self.native:
            self.late_calls.append(self.wire_call(name, arguments, id))
            return
        line = self.line(Parsed())
        line["message"]["tool_calls"] = [self.wire_call(name, arguments, id)]
        self.emit(line)

    def do_model_text(self, pieces: List[str]) -> None:
        self.guarded = True
        self.pieces(pieces, self.verbatim if self.asked.verbatim else self.parser.add)

    def verbatim(self, piece: str) -> Parsed:
        """Raw text; path B splits thinking off all the same unless told not to."""
        if self.splitter is None:
            return Parsed(content=piece)
        thought, content = self.splitter.add(piece)
        return Parsed(content=content, thinking=thought)

    def do_done(self, value: Tuple[str, Json]) -> None:
        reason, fields = value
        self.over = True
        last = self.line(self.parser.end() if self.asked.chat else Parsed(), finished=True)
        if self.late_calls:
            last["message"].setdefault("tool_calls", []).extend(self.late_calls)
        counts: Json = {
            "done_reason": reason,
            "total_duration": self.load_s + self.prefill_s + self.eval_s,
            "load_duration": self.load_s,
            "prompt_eval_count": self.fit.tokens,
            "prompt_eval_duration": self.prefill_s,
            "eval_count": self.tokens + (reason == "stop"),
            "eval_duration": self.eval_s,
        }
        for name, number in counts.items():
            last[name] = int(number * 1e9) if name.endswith("_duration") else number
        last.update(fields)
        last = {key: value for key, value in last.items() if value is not None}
        self.emit(last)
        self.close()

    def close(self) -> None:
        """End the body; a request that is not streamed gets its one line."""
        if self.asked.stream:
            self.answer.finish()
            return
        whole = join_lines(self.lines, self.asked.chat)
        if not self.asked.tools:  # Ollama adds calls only where tools were offered
            whole.get("message", {}).pop("tool_calls", None)
        self.answer.json(200, whole)

    def do_error_line(self, message: str) -> None:
        self.over = True
        if not self.asked.stream:
            self.answer.json(500, {"error": message})
            return
        self.emit({"error": message})
        self.answer.finish()

    def do_status(self, value: Tuple[int, Any, Dict[str, str]]) -> None:
        code, body, headers = value
        self.over = True
        if isinstance(body, (bytes, str)):
            data, kind = body if isinstance(body, bytes) else body.encode(), "text/plain"
        else:
            data = b"" if body is None else to_bytes(go_json(body))
            kind = "application/json; charset=utf-8"
        self.answer.whole(code, data, {"Content-Type": kind, **headers})

    def do_delay(self, seconds: float) -> None:
        self.answer.connection.wait(seconds)

    def do_raw(self, data: bytes) -> None:
        if not self.answer.head and not self.answer.started:
            kind = "x-ndjson" if self.asked.stream else "json; charset=utf-8"
            self.answer.begin(200, {"Content-Type": f"application/{kind}"})
        self.answer.write(data)

    def do_wire(self, data: bytes) -> None:
        self.answer.started = True
        self.answer.connection.wait()
        self.answer.connection.send(data)

    def do_end(self, _: None = None) -> None:
        self.over = True
        if not self.answer.head and not self.answer.started:
            self.answer.begin(200, {"Content-Type": "application/x-ndjson"})
        self.answer.finish()

    def do_cut(self, _: None = None) -> None:
        raise StoppedError

    def do_reset(self, _: None = None) -> None:
        self.answer.connection.reset()

    def do_hold(self, event: threading.Event) -> None:
        while not event.wait(0.01):
            self.answer.connection.wait()

    def do_hang(self, _: None = None) -> None:
        self.answer.connection.wait(86_400)


def until_stop(pieces: List[str], stops: List[str]) -> List[str]:
    """Return the pieces before the first stop string (the same list if none)."""
    whole = "".join(pieces)
    hits = [at for at in (whole.find(stop) for stop in stops if stop) if at >= 0]
    if not hits:
        return pieces
    kept, left = [], min(hits)
    for piece in pieces:
        kept.append(piece[:left])
        left -= len(kept[-1])
    return [piece for piece in kept if piece]


def join_lines(lines: List[Json], chat: bool) -> Json:
    """Fold a stream's lines into the one of stream:false."""
    whole = dict(lines[-1])
    if not chat:
        for key in ("response", "thinking"):
            joined = "".join(line.get(key, "") for line in lines)
            if joined or key == "response":
                whole[key] = joined
        return whole
    messages = [line["message"] for line in lines]
    message: Json = {"role": "assistant", "content": "".join(m["content"] for m in messages)}
    thought = "".join(m.get("thinking", "") for m in messages)
    calls = [made for m in messages for made in m.get("tool_calls", [])]
    if thought:
        message["thinking"] = thought
    if calls:
        message["tool_calls"] = calls
    whole["message"] = message
    return whole


# ---------------------------------------------------------------- the server


@dataclass
class Loaded:
    """A model in memory."""

    model: Model
    options: Json
    num_ctx: int
    keep_s: float
    used_at: float = field(default_factory=time.monotonic)

    def remaining_s(self) -> float:
        lives = self.keep_s if self.keep_s >= 0 else FOR_EVER_S
        return lives - (time.monotonic() - self.used_at) if lives else 1.0


Script = Union[Reply, str, Callable[[Recorded], Any], Iterable[Any]]
ALLOWED_HOST = re.compile(
    r"(?:localhost|(?:[\w-]+\.)*(?:localhost|local|internal)|127(?:\.\d+){3}|\[::1\]|10(?:\.\d+){3}"
    r"|192\.168(?:\.\d+){2}|172\.(?:1[6-9]|2\d|3[01])(?:\.\d+){2}|0\.0\.0\.0)?(?::\d+)?",
    re.IGNORECASE,
)
ALLOWED_ORIGIN = re.compile(
    r"https?://(?:localhost|127\.0\.0\.1|0\.0\.0\.0|\[::1\])(?::\d+)?"
    r"|(?:app|file|tauri|vscode-[^:]*)://.*",
    re.IGNORECASE,
)


class MockOllama:
    """The server; a context manager, on a free port unless one is given.

    replies: see the module's docstring. Settings: model or models (names or
    Model objects; models="any" takes every name), version, default_num_ctx
    (tokens, where neither request nor model says), tokens (a callable that
    counts), slot, parallel (generations at a time; one if a slot is given, else
any number),
    token_delay and load_delay (seconds), default (reply after the last, which
    otherwise repeats), host, port.
    Seen from outside: url, requests, turns (requests that took a reply), loads
    (one entry for each load of a model), loaded.
    """

    def __init__(
        self,
        replies: Script = (),
        *,
        model: Union[str, Model, None] = None,
        models: Union[str, Iterable[Union[str, Model]], None] = None,
        version: str = "0.33.0",
        default_num_ctx: int = 4096,
        tokens: Callable[[str], int] = default_tokens,
        slot: Optional[SimulatedSlot] = None,
        parallel: Optional[int] = None,
        token_delay: float = 0.0,
        load_delay: float = 0.0,
        default: Optional[Script] = None,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        self.replies: Any = replies
        if isinstance(replies, (Reply, str)):
            self.replies = [replies]
        elif not callable(replies):
            self.replies = list(replies) or [text("ok")]
        chosen = models if models is not None else [model] if model else DEFAULT_MODELS
        self.any_model = chosen == "any"
        listed = DEFAULT_MODELS if isinstance(chosen, str) else chosen
        self.models = [m if isinstance(m, Model) else Model(m) for m in listed]
        self.model = self.models[0].name
        self.version, self.default_num_ctx, self.count = version, default_num_ctx, tokens
        self.slot = slot or SimulatedSlot()
        parallel = parallel or (1 if slot else None)
        self.parallel = threading.Semaphore(parallel) if parallel else None
        self.token_delay, self.load_delay, self.default = token_delay, load_delay, default
        self.address = (host, port)
        self.requests: List[Recorded] = []
        self.turns: List[Recorded] = []
        self.loads: List[Tuple[str, Json]] = []
        self.loaded: Dict[str, Loaded] = OrderedDict()
        self.routes: Dict[Tuple[str, str], Callable[[Answer, Recorded], None]] = {}
        self._ids = 0
        self._renders = 0
        self._loading = threading.Semaphore()
        self._lock = threading.RLock()
        self._news = threading.Condition(self._lock)
        self._threads: List[threading.Thread] = []
        self._sockets: Set[socket.socket] = set()
        self._add_routes()

    def _add_routes(self) -> None:
        for method in ("GET", "HEAD"):
            self.routes[method, "/"] = self._root
            self.routes[method, "/api/version"] = self._version
            self.routes[method, "/api/tags"] = self._tags
        self.routes["GET", "/api/ps"] = self._ps
        self.routes["POST", "/api/show"] = self._show
        self.routes["POST", "/api/chat"] = self._generation
        self.routes["POST", "/api/generate"] = self._generation

    # -- life

    def __enter__(self) -> MockOllama:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> MockOllama:
        self._wake, self._sleep = socket.socketpair()
        self._listener = socket.create_server(self.address, backlog=128)
        self.address = self._listener.getsockname()[:2]
        self._acceptor = self._spawn(self._accept)
        return self

    def stop(self) -> None:
        """Close every connection and wait for the threads."""
        self._wake.close()  # every waiting thread sees this at once
        self._acceptor.join(5)
        self._listener.close()
        with self._lock:
            threads = list(self._threads)
            for sock in self._sockets:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(5)
        self._sleep.close()

    @property
    def port(self) -> int:
        return self.address[1]

    @property
    def url(self) -> str:
        return f"http://{self.address[0]}:{self.address[1]}"

    @property
    def alive(self) -> int:
        """How many of its threads still run."""
        with self._lock:
            return sum(thread.is_alive() for thread in self._threads)

    def wait_for(self, count: int = 1, timeout: float = 10.0, turns: bool = True) -> Recorded:
        """Return the count-th turn (or request) once it has come."""
        with self._news:
            seen = self.turns if turns else self.requests
            if not self._news.wait_for(lambda: len(seen) >= count, timeout):
                raise TimeoutError(f"{len(seen)} of {count} requests after {timeout} s")
            return seen[count - 1]

    def _spawn(self, target: Callable[..., None], *arguments: Any) -> threading.Thread:
        thread = threading.Thread(target=target, args=arguments, daemon=True, name="mock-ollama")
        with self._lock:
            self._threads = [t for t in self._threads if t.is_alive()] + [thread]
            thread.start()
        return thread

    def _accept(self) -> None:
        selector = selectors.DefaultSelector()
        selector.register(self._listener, selectors.EVENT_READ)
        selector.register(self._sleep, selectors.EVENT_READ)
        with selector:
            while True:
                if any(key.fileobj is self._sleep for key, _ in selector.select()):
                    return
                try:
                    sock, _ = self._listener.accept()
                except OSError:
                    return
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with self._lock:
                    self._sockets.add(sock)
                self._spawn(self._connection, sock)

    def _connection(self, sock: socket.socket) -> None:
        connection = Connection(sock, self._sleep)
        try:
            while self._one_request(connection):
                pass
        except (LeftError, StoppedError, ValueError):
            pass
        finally:
            with self._lock:
                self._sockets.discard(sock)
            connection.close()

    def _one_request(self, connection: Connection) -> bool:
        """Answer one request; False when the connection is to be closed."""
        try:
            request = connection.read_request()
        except RefusedError as refused:
            phrase = HTTPStatus(refused.code).phrase
            head = f"HTTP/1.1 {refused.code} {phrase}\r\nConnection: close\r\n\r\n"
            connection.send(head.encode())
            return False
        answer = Answer(connection, request)
        with self._news:
            self.requests.append(request)
            self._news.notify_all()
        try:
            self._answer(answer, request)
        except RefusedError as refused:
            answer.json(refused.code, {"error": refused.message}, refused.content_type)
        except LeftError:
            request.closed_by_client.set()
            raise
        finally:
            request.finished.set()
        return answer.keep

    def _answer(self, answer: Answer, request: Recorded) -> None:
        origin = request.headers.get("origin")
        if not ALLOWED_HOST.fullmatch(request.headers.get("host", "")) or (
            origin is not None and not ALLOWED_ORIGIN.fullmatch(origin)
        ):
            answer.whole(403, b"", {})
            return
        route = self.routes.get((request.method, request.path))
        if route is None:
            found = any(path == request.path for _, path in self.routes)
            code, body = (405, b"405 method not allowed") if found else (404, b"404 page not found")
            answer.whole(code, body, {"Content-Type": "text/plain"})
            return
        if request.method == "POST":
            request.body = parse_body(request.raw)
        route(answer, request)

    # -- small endpoints

    def _root(self, answer: Answer, request: Recorded) -> None:
        del request
        answer.whole(200, b"Ollama is running", {"Content-Type": "text/plain; charset=utf-8"})

    def _version(self, answer: Answer, request: Recorded) -> None:
        del request
        answer.json(200, {"version": self.version})

    def _tags(self, answer: Answer, request: Recorded) -> None:
        del request
        listed = []
        for model in self.models:
            entry: Json = {"name": model.full_name, "model": model.full_name}
            entry.update(modified_at=timestamp(-3600), size=model.size, digest=model.digest)
            entry["details"] = model.details()
            if not old(self.version):
                entry["details"]["context_length"] = model.context
                native = model.kind.parser is NativeParser
                entry["capabilities"] = ["completion"] if native else list(model.kind.capabilities)
            listed.append(entry)
        answer.json(200, {"models": listed})

    def _ps(self, answer: Answer, request: Recorded) -> None:
        del request
        listed = []
        with self._lock:
            self._held("")
            running = list(self.loaded.values())
        for held in running:
            model = held.model
            vram = model.size if model.size_vram is None else model.size_vram
            entry = {"name": model.full_name, "model": model.full_name, "size": model.size}
            entry.update(digest=model.digest, details=model.details())
            entry.update(expires_at=timestamp(held.remaining_s()))
            entry.update(size_vram=vram, context_length=held.num_ctx)
            listed.append(entry)
        answer.json(200, {"models": listed})

    def _show(self, answer: Answer, request: Recorded) -> None:
        model = self._find_model(request.body.get("model") or request.body.get("name"))
        answer.json(200, model.show(self.version))

    # -- generation

    def new_call_id(self, native: bool = False) -> str:
        with self._lock:
            self._ids += 1
            random = sha256(f"{self.port} {self._ids}".encode()).digest()
        letters = string.ascii_letters + string.digits if native else ID_ALPHABET
        made = "".join(letters[byte % len(letters)] for byte in random)
        return made if native else f"call_{made[:8]}"

    def _find_model(self, name: Any) -> Model:
        if not name:
            raise RefusedError(400, "model is required")
        full = name if ":" in name else f"{name}:latest"
        for model in self.models:
            if model.full_name == full:
                return model
        if self.any_model:
            return Model(name)
        raise RefusedError(404, f"model '{name}' not found")

    def _check(self, request: Recorded) -> Asked:
        body, chat = request.body, request.path == "/api/chat"
        owner = "ChatRequest" if chat else "GenerateRequest"
        for name in BOOL_FIELDS:
            if not isinstance(body.get(name), (bool, type(None))):
                raise go_mismatch(body[name], f"{owner}.{name}", "bool")
        for name in ("model", "prompt", "system"):
            if not isinstance(body.get(name) or "", str):
                raise go_mismatch(body[name], f"{owner}.{name}", "string")
        messages = [check_message(m) for m in listed(body, "messages", "[]api.Message")]
        tools = [check_tool(tool) for tool in listed(body, "tools", "api.Tools")]
        think = check_think(body.get("think"))
        keep_s = keep_alive_seconds(body.get("keep_alive"))
        if not chat and body.get("prompt") and not body.get("raw"):
            parts = (("system", body.get("system")), ("user", body["prompt"]))
            messages = [{"role": role, "content": words} for role, words in parts if words]
        model = self._find_model(body.get("model"))
        if tools and not model.can("tools", self.version):
            full = f"registry.ollama.ai/library/{model.full_name}"
            raise RefusedError(400, f"{full} does not support tools")
        capable = model.can("thinking", self.version)
        if think and not capable:
            raise RefusedError(400, f'"{body["model"]}" does not support thinking')
        options = check_options(body.get("options"))
        thinks = capable if think is None else bool(think)
        return Asked(body, model, messages, tools, options, keep_s, thinks, chat)

    def _generation(self, answer: Answer, request: Recorded) -> None:
        asked = self._check(request)
        if asked.empty and asked.keep_s == 0:
            self._unload(asked.model)
            self._empty(answer, asked, "unload")
            return
        load_s = self._load(asked, answer)
        if asked.empty:
            self._empty(answer, asked, "load")
            return
        fit = self._fit(asked)
        request.prompt, request.prompt_tokens = fit.prompt, fit.tokens
        if asked.body.get("_debug_render_only"):
            self._rendered(answer, asked, fit)
            return
        self._refuse_images(asked)
        reply = self._next_reply(request)
        with Acquired(self.parallel, answer.connection):
            generation = Turn(self, answer, asked, fit)
            generation.load_s = load_s
            name = asked.model.full_name
            _, generation.prefill_s = self.slot.prefill(fit.prompt, self.count, name)
            answer.connection.wait(generation.prefill_s * self.slot.scale)
            generation.serve(reply)
        if asked.keep_s == 0:
            self._unload(asked.model)

    def _refuse_images(self, asked: Asked) -> None:
        images = any(m.get("images") for m in asked.messages) or asked.body.get("images")
        if images and not asked.model.can("vision", self.version) and not old(self.version):
            message = "Multimodal data provided, but model does not support multimodal requests."
            inner = {"code": 400, "message": message, "type": "invalid_request_error"}
            raise RefusedError(400, go_json({"error": inner}), "application/json")

    def _empty(self, answer: Answer, asked: Asked, reason: str) -> None:
        line = self._bare_line(asked, {"role": "assistant", "content": ""})
        answer.json(200, {**line, "done": True, "done_reason": reason})

    def _rendered(self, answer: Answer, asked: Asked, fit: Fit) -> None:
        debug: Json = {"rendered_template": fit.prompt}
        images = sum(len(m.get("images") or []) for m in asked.messages)
        if images:
            debug["image_count"] = images
        line = self._bare_line(asked, {"role": "", "content": ""})
        answer.json(200, {**line, "done": False, "_debug_info": debug})

    def _bare_line(self, asked: Asked, message: Json) -> Json:
        line: Json = {"model": asked.body["model"], "created_at": timestamp()}
        line.update({"message": message} if asked.chat else {"response": ""})
        return line

    def _next_reply(self, request: Recorded) -> Reply:
        with self._news:
            at = len(self.turns)
            self.turns.append(request)
            self._news.notify_all()
        script = self.replies
        if not callable(script):
            beyond = at >= len(script) and self.default is not None
            script = self.default if beyond else script[min(at, len(script) - 1)]
        return as_reply(script(request) if callable(script) else script)

    # -- loading

    def _num_ctx(self, asked: Asked) -> int:
        wanted = asked.options.get("num_ctx") or asked.model.parameters.get("num_ctx")
        return max(4, min(int(wanted or self.default_num_ctx), asked.model.context))

    def _load(self, asked: Asked, answer: Answer) -> float:
        """Load or reload the model if it must be; return seconds claimed."""
        options = {k: v for k, v in asked.options.items() if k in LOAD_OPTIONS}
        options["num_ctx"] = self._num_ctx(asked)
        if not old(self.version):
            options["shift"] = asked.body.get("shift") is not False
        name = asked.model.full_name
        with Acquired(self._loading, answer.connection):
            held = self._held(name)
            if held is None or held.options != options:
                with self._lock:
                    self.loaded.pop(name, None)
                    self.loads.append((name, options))
                    self.slot.forget(name)
                answer.connection.wait(self.load_delay)
                keep_s = asked.keep_s if asked.keep_s is not None else LIVE_S
                self.loaded[name] = Loaded(asked.model, options, options["num_ctx"], keep_s)
                return self.load_delay or LOAD_S
            if asked.keep_s is not None:
                held.keep_s = asked.keep_s
            held.used_at = time.monotonic()
            return 0.002

    def _held(self, name: str) -> Optional[Loaded]:
        """Return the loaded model unless its time is up."""
        with self._lock:
            for loaded in [n for n, held in self.loaded.items() if held.remaining_s() < 0]:
                del self.loaded[loaded]
            return self.loaded.get(name)

    def _unload(self, model: Model) -> None:
        with self._lock:
            self.loaded.pop(model.full_name, None)
            self.slot.forget(model.full_name)

    # -- the window

    def _render(self, asked: Asked, messages: List[Json]) -> str:
        if asked.verbatim:
            return str(asked.body["prompt"])
        with self._lock:
            rotation, self._renders = self._renders, self._renders + 1
        return asked.model.kind.render(messages, asked.tools, asked.think, rotation)

    def _fit(self, asked: Asked) -> Fit:
        """Render within the window, or raise what Ollama answers."""
        window = self._num_ctx(asked)
        prompt = self._render(asked, asked.messages)
        size = self.count(prompt)
        shift = asked.body.get("shift") is not False
        render_only = asked.body.get("_debug_render_only")
        if asked.body.get("truncate") is False:
            if size > window - 1 and not render_only:
                raise self._too_long(size, window)
            return Fit(prompt, size, None if shift else window - size)
        prompt, size = self._drop_messages(asked, prompt, size, window)
        if size <= window - 1 or render_only:
            return Fit(prompt, size, None if shift else window - size)
        if old(self.version):
            return Fit(prompt, window, None if shift else 1)
        if asked.chat and asked.model.kind.parser is NativeParser:
            raise self._too_long(size, window)
        if not shift:
            raise RefusedError(
                400,
                "the prompt is longer than the context length currently available to the model; "
                "shorten the prompt, adjust the context length in settings, or use a model with a "
                "longer context length",
                "application/json",
            )
        kept = window - (window - NUM_KEEP) // 2
        return Fit(prompt[: int(len(prompt) * kept / size)], kept)

    def _drop_messages(
        self, asked: Asked, prompt: str, size: int, window: int
    ) -> Tuple[str, int]:
        messages = list(asked.messages)
        while asked.chat and size > window:
            others = [m for m in messages[:-1] if m["role"] != "system"]
            if not others:
                break
            messages = [m for m in messages if m is not others[0]]
            prompt = self._render(asked, messages)
            size = self.count(prompt)
        return prompt, size

    def _too_long(self, size: int, window: int) -> RefusedError:
        if old(self.version):
            message = "the input length exceeds the context length"
        else:
            inner = {
                "code": 400,
                "message": f"request ({size} tokens) exceeds the available context size "
                f"({window} tokens), try increasing it",
                "type": "exceed_context_size_error",
                "n_prompt_tokens": size,
                "n_ctx": window,
            }
            message = go_json({"error": inner})
        return RefusedError(400, message, "application/json")

    # -- playback

    @classmethod
    def playback(cls, *paths: Union[str, Path], timing: float = 0.0, **settings: Any) -> MockOllama:
        """Return a server that answers as recorded, line by line.

        The recording whose path (and, among several, model) fits answers;
        everything else is answered as usual, every model name being known.
        timing is the factor on the recorded times.
        """
        settings.setdefault("models", "any")
        mock = cls(**settings)
        recordings: Dict[Tuple[str, str], List[Json]] = {}
        for path in paths:
            recording = json.loads(Path(path).read_text(encoding="utf-8"))
            key = (recording["request"]["method"], recording["request"]["path"])
            recordings.setdefault(key, []).append(recording)
        for key, group in recordings.items():
            mock.routes[key] = Player(mock, group, timing)
        return mock


class Acquired:
    """Hold a place (None: nothing to wait for), seeing the client leave."""

    def __init__(self, places: Optional[threading.Semaphore], connection: Connection) -> None:
        self.places, self.connection = places, connection

    def __enter__(self) -> None:
        while self.places and not self.places.acquire(timeout=0.02):
            self.connection.wait()

    def __exit__(self, *_: object) -> None:
        if self.places:
            self.places.release()


class Player:
    """Answers one path from recordings."""

    def __init__(self, mock: MockOllama, recordings: List[Json], timing: float) -> None:
        self.mock, self.recordings, self.timing = mock, recordings, timing

    def __call__(self, answer: Answer, request: Recorded) -> None:
        with self.mock._news:
            self.mock.turns.append(request)
            self.mock._news.notify_all()
        self.play(self._choose(request), answer)

    def _choose(self, request: Recorded) -> Json:
        model = (request.body or {}).get("model")
        for recording in self.recordings:
            if (recording["request"].get("body") or {}).get("model") == model:
                return recording
        return self.recordings[0]

    def play(self, recording: Json, answer: Answer) -> None:
        skipped = ("Transfer-Encoding", "Content-Length")
        headers = {k: v for k, v in recording["headers"].items() if k not in skipped}
        lines = recording["lines_at_ms"]
        if "Transfer-Encoding" not in recording["headers"]:
            headers["Content-Length"] = str(sum(len(line.encode()) for _, line in lines))
        answer.begin(recording["status"], headers)
        before = 0.0
        for at_ms, line in lines:
            answer.connection.wait((at_ms - before) / 1000 * self.timing)
            before = at_ms
            answer.write(line.encode())
        answer.finish()


# ---------------------------------------------------------------- the program


SCRIPT_TEXT = (
    "```bash\nmkdir -p src\ncat > src/app.py <<'EOF'\nprint(\"hello\")\nEOF\n"
    "cat > README.md <<'EOF'\n# Demo\nEOF\n```"
)


def mode_reply(mode: str, env: Dict[str, str]) -> Reply:
    """Return what the server says in this mode."""
    slow = float(env.get("MOCK_OLLAMA_DELAY_MS") or 3000) / 1000
    between = float(env.get("MOCK_OLLAMA_STREAM_DELAY_MS") or 200) / 1000
    chunks: List[Step] = []
    for number in range(100):
        chunks += (text(f"chunk-{number}", 1) + delay(between)).steps
    modes = {
        "delay": delay(slow) + text("mock delayed response"),
        "malformed-json": raw("{not valid json") + end(),
        "rate-limit": status(429, {"error": "rate limit exceeded"}),
        "stream-garbage": raw("not-json\n") + raw("still-not-json\n") + end(),
        "stream-slow": Reply(chunks) + text("done"),
        "script-json": text(env.get("MOCK_OLLAMA_SCRIPT_TEXT") or SCRIPT_TEXT),
        "hang": hang(),
        "cut": text("cut off in the mid") + cut(),
        "reset": text("reset in the mid") + reset(),
        "empty": end(),
        "error-line": text("before the error") + error_line("an error was encountered"),
    }
    return modes.get(mode, text("ok"))


def add_reports(mock: MockOllama, mode: str) -> None:
    """Add /health and /stats, which no Ollama has, for scripts that watch."""

    def health(answer: Answer, request: Recorded) -> None:
        del request
        answer.json(200, {"ok": True, "mode": mode})

    def stats(answer: Answer, request: Recorded) -> None:
        del request
        turns = list(mock.turns)
        gone = sum(turn_.closed_by_client.is_set() for turn_ in turns)
        complete = sum(t.finished.is_set() and not t.closed_by_client.is_set() for t in turns)
        counts = {"totalRequests": len(turns), "abortedRequests": gone}
        counts["completedStreamingRequests"] = complete if mode == "stream-slow" else 0
        answer.json(200, {"ok": True, "mode": mode, **counts})

    mock.routes["GET", "/health"] = health
    mock.routes["GET", "/stats"] = stats


def main(arguments: Optional[List[str]] = None) -> int:
    """Serve until interrupted; prints one line with the URL."""
    env = dict(os.environ)
    parser = argparse.ArgumentParser(description="An Ollama server without a model.")
    parser.add_argument("--port", type=int, default=int(env.get("MOCK_OLLAMA_PORT") or 8121),
                        help="port to listen on; 0 takes a free one (default 8121)")
    parser.add_argument("--mode", default=env.get("MOCK_OLLAMA_MODE") or "delay",
                        help="delay (default), malformed-json, rate-limit, stream-garbage,"
                        " stream-slow, script-json, hang, cut, reset, empty or error-line;"
                        " another word answers ok")
    parser.add_argument("--model", help="the only model it knows (default: every name)")
    parser.add_argument("--imitate", default="0.33.0", help="the version of Ollama to imitate")
    parser.add_argument("--num-ctx", type=int, default=32_768, help="default context in tokens")
    parser.add_argument("--text", help="what the model writes, tags included")
    parser.add_argument("--play", help="a recording to answer from")
    given = parser.parse_args(arguments)
    settings: Dict[str, Any] = {"port": given.port, "version": given.imitate}
    settings["models"] = [given.model] if given.model else "any"
    settings["default_num_ctx"] = given.num_ctx
    try:
        if given.play:
            mock = MockOllama.playback(given.play, timing=1.0, **settings)
        else:
            reply = model_text(given.text) if given.text else mode_reply(given.mode, env)
            mock = MockOllama([reply], **settings)
        add_reports(mock, given.mode)
        with mock, suppress(KeyboardInterrupt):
            print(f"mock Ollama on {mock.url} ({given.play or given.mode})", flush=True)
            threading.Event().wait()
    except (OSError, ValueError) as problem:  # no such recording, or the port is in use
        parser.exit(2, f"mock_ollama: {problem}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
