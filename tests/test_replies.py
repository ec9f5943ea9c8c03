"""Section 12: deltas to events and their fold, answers without the model."""
import json

import pytest
from helpers import check_events, joined
from qwencode import (
    BadRequestError,
    Call,
    CallEnd,
    CallInput,
    CallStart,
    ForbiddenError,
    StreamTranslator,
    TextDelta,
    ThinkingDelta,
    UpstreamTimeoutError,
    Usage,
    error_body,
    error_event,
    fold,
    load_config,
    local_answer,
    parse_request,
    sse,
)

SIGNED = ("signature_delta", "cXdlbmNvZGU=")
STOP = ("stop",)
DELTAS = {
    # name: deltas, rows between message_start and the end, content of the fold
    "text": ([TextDelta("a"), TextDelta("b")], [("start", "text"), ("text_delta", "ab"), STOP],
             [{"type": "text", "text": "ab"}]),
    "thinking, text": (
        [ThinkingDelta("h"), TextDelta("a")],
        [("start", "thinking"), ("thinking_delta", "h"), SIGNED, STOP,
         ("start", "text"), ("text_delta", "a"), STOP],
        [{"type": "thinking", "thinking": "h", "signature": SIGNED[1]},
         {"type": "text", "text": "a"}]),
    "thinking after text": (
        [TextDelta("a"), ThinkingDelta("h"), ThinkingDelta("m"), TextDelta("b")],
        [("start", "text"), ("text_delta", "a"), STOP,
         ("start", "thinking"), ("thinking_delta", "hm"), SIGNED, STOP,
         ("start", "text"), ("text_delta", "b"), STOP],
        [{"type": "text", "text": "a"},
         {"type": "thinking", "thinking": "hm", "signature": SIGNED[1]},
         {"type": "text", "text": "b"}]),
    "a whole call": (
        [TextDelta("a"), Call("Read", {"file_path": "é"})],
        [("start", "text"), ("text_delta", "a"), STOP, ("start", "tool_use", "Read"),
         ("input_json_delta", '{"file_path":"\\u00e9"}'), STOP],
        [{"type": "text", "text": "a"},
         {"type": "tool_use", "id": "toolu_0", "name": "Read", "input": {"file_path": "é"}}]),
    "a call in pieces": (
        [CallStart("Read"), CallInput('{"file'), CallInput('_path": "a"}'), CallEnd()],
        [("start", "tool_use", "Read"), ("input_json_delta", '{"file_path": "a"}'), STOP],
        [{"type": "tool_use", "id": "toolu_0", "name": "Read", "input": {"file_path": "a"}}]),
    "two calls, the last left open": (
        [Call("Read", {}), CallStart("Write"), CallInput('{"file_path": "a'), CallEnd(False)],
        [("start", "tool_use", "Read"), ("input_json_delta", "{}"), STOP,
         ("start", "tool_use", "Write"), ("input_json_delta", '{"file_path": "a'), STOP],
        [{"type": "tool_use", "id": "toolu_0", "name": "Read", "input": {}},
         {"type": "tool_use", "id": "toolu_1", "name": "Write", "input": {}}]),
    "a call without input": (
        [CallStart("Read"), CallEnd()], [("start", "tool_use", "Read"), STOP],
        [{"type": "tool_use", "id": "toolu_0", "name": "Read", "input": {}}]),
    "nothing": ([], [], []),
}


def make():
    ids = iter(range(99))
    return StreamTranslator("msg_1", "m", lambda: f"toolu_{next(ids)}")


@pytest.mark.parametrize("name", DELTAS)
@pytest.mark.parametrize("alive", [False, True])
def test_deltas(name, alive):
    deltas, rows, content = DELTAS[name]
    translator = make()
    events = [translator.start(Usage(7, 1))]
    for delta in deltas:
        if alive:
            events.append(translator.keep_alive())
        events += translator.translate([delta])
    events += translator.finish("end_turn", None, Usage(5, 3, 2, 1))
    check_events(events)
    shown = [row for row in joined(events) if row != ("end", None)]
    if not alive:
        assert shown == [*rows, ("end", "end_turn")]
    message = fold(events)
    assert message == {
        "id": "msg_1", "type": "message", "role": "assistant", "model": "m", "content": content,
        "stop_reason": "end_turn", "stop_sequence": None,
        "usage": {"input_tokens": 5, "output_tokens": 3, "cache_read_input_tokens": 2,
                  "cache_creation_input_tokens": 1}}
    assert translator.call_ids == [b["id"] for b in content if b["type"] == "tool_use"]


def test_a_keep_alive_is_an_empty_delta_of_the_open_block():
    translator = make()
    assert translator.keep_alive().payload["type"] == "message_delta"
    kinds = []
    for delta in (ThinkingDelta("h"), TextDelta("a"), CallStart("Read")):
        translator.translate([delta])
        kinds.append(translator.keep_alive().payload["delta"])
    assert kinds == [{"type": "thinking_delta", "thinking": ""},
                     {"type": "text_delta", "text": ""},
                     {"type": "input_json_delta", "partial_json": ""}]


def test_an_error_leaves_the_block_open():
    translator = make()
    events = [translator.start(Usage()), *translator.translate([TextDelta("a")]),
              error_event(UpstreamTimeoutError("late"))]
    check_events(events)
    assert joined(events)[-1] == ("error", "timeout_error")
    assert error_body(BadRequestError("no"), "req_1") == {
        "type": "error", "request_id": "req_1",
        "error": {"type": "invalid_request_error", "message": "no"}}


def test_the_wire_form():
    event = make().translate([TextDelta("a\u2028\nb")])[1]
    name, payload, *rest = sse([event]).decode().split("\n")
    assert (name, rest) == ("event: content_block_delta", ["", ""])
    assert json.loads(payload[len("data: "):])["delta"]["text"] == "a\u2028\nb"


# ---- answers without the model

def request(text="hi", **fields):
    return parse_request({"model": "m", "max_tokens": 100, **fields,
                          "messages": [{"role": "user", "content": text}]})


TITLE = {"output_config": {"format": {"type": "json_schema", "schema": {
    "type": "object", "properties": {"title": {"type": "string"}}}}}}
SAFETY = [{"type": "text", "text": "You are a security monitor for autonomous AI coding agents."}]
TOOL = [{"name": "Read", "input_schema": {"type": "object"}}]
LOCAL = {
    # name: request, rule, text
    "a title": (request("<session>\nfix the login page please now or later, it hurts\n</session>",
                        **TITLE), "title", '{"title":"fix the login page please now or"}'),
    "an empty title": (request("<session>\n</session>", **TITLE), "title", '{"title":"Session"}'),
    "a title of another client": (request("Name this", **TITLE), None, None),
    "a title with tools": (request("<session>\na\n</session>", tools=TOOL, **TITLE), None, None),
    "a probe": (request("quota", max_tokens=1), "probe", "."),
    "a suggestion": (request("[SUGGESTION MODE: what next?]", tools=TOOL), "suggestion", ""),
    "a mention of it": (request("Tell of [SUGGESTION MODE: x]"), None, None),
    "a turn": (request("hi", tools=TOOL), None, None),
}


@pytest.mark.parametrize("name", LOCAL)
def test_background_requests(name):
    asked, rule, text = LOCAL[name]
    answer = local_answer(asked, load_config({}, {}))
    assert (answer and answer.rule, answer and answer.text) == (rule, text)
    if rule:
        others = {"title", "probe", "suggestion", "safety"} - {rule}
        off = load_config({}, {"SHIM_LOCAL_ANSWERS": ",".join(sorted(others))})
        assert local_answer(asked, off) is None, "each can be turned off"


def test_a_title_goes_to_the_small_model_where_there_is_one():
    config = load_config({"small_model": "qwen3:0.6b"}, {})
    assert local_answer(LOCAL["a title"][0], config) is None


def test_a_safety_check_is_refused_and_never_answered_as_safe():
    asked = request("run rm -rf /", system=SAFETY)
    with pytest.raises(ForbiddenError, match="--permission-mode"):
        local_answer(asked, load_config({}, {}))
