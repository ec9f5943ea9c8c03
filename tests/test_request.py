"""Sections 6 and 7: a Messages body becomes a Request, a Request an Ollama body."""
import json

import pytest

from qwencode import (
    BadRequestError,
    ModelFacts,
    TokenCounter,
    Tool,
    chat_body,
    chat_messages,
    facts_from_probe,
    facts_from_show,
    load_config,
    normal_schema,
    opening_of,
    parse_request,
    read_body,
    render_body,
    tool_json,
    tool_table,
    tools_as_text,
    write_messages,
)

CONFIG = load_config({}, {})
PLAIN = ModelFacts("m")


def user(*blocks):
    return {"role": "user", "content": list(blocks)}


def text(words):
    return {"type": "text", "text": words}


def result(call_id, content="done", **more):
    return {"type": "tool_result", "tool_use_id": call_id, "content": content, **more}


def use(call_id, name="Read", **arguments):
    return {"type": "tool_use", "id": call_id, "name": name, "input": arguments}


def upstream(messages, facts=PLAIN, recall=lambda index, turn: None, **fields):
    """The messages that Ollama gets, as short rows."""
    request = parse_request({"messages": messages, **fields})
    written = tools_as_text(request.tools) if facts.tools_in_text and request.tools else ""
    return chat_messages(request, request.tools, facts, recall, lambda words: words,
                         tools_text=written)


BAD_FIELDS = [
    ([], "body: expected an object, got an array"),
    ({}, "messages: an array is required"),
    ({"messages": []}, "messages: at least one message is required"),
    ({"messages": [{"role": "user"}, user()], "system": "s"},
     "messages: at least one message with content is required"),
    ({"messages": [user(text(""))]},
     "messages: at least one message with content is required"),
    ({"messages": "x"}, "messages: expected an array, got a string"),
    ({"messages": [5]}, "messages.0: expected an object, got a number"),
    ({"messages": [{"content": "x"}]}, "messages.0.role: a string is required"),
    ({"messages": [{"role": "robot", "content": "x"}]},
     "messages.0.role: expected user, assistant or system, got 'robot'"),
    ({"messages": [{"role": "user", "content": 5}]},
     "messages.0.content: expected a string or an array of blocks, got a number"),
    ({"messages": [user(text("a"), {"type": "text"})]},
     "messages.0.content.1.text: a string is required"),
    ({"messages": [user({"text": "a"})]}, "messages.0.content.0.type: a string is required"),
    ({"messages": [user({"type": "image"})]}, "messages.0.content.0.source: an object is required"),
    ({"messages": [user({"type": "image", "source": {"type": "base64"}})]},
     "messages.0.content.0.source.data: a string is required"),
    ({"messages": [user(result("a", [text("x"), 5]))]},
     "messages.0.content.0.content.1: expected an object, got a number"),
    ({"messages": [{"role": "assistant", "content": [
        {"type": "tool_use", "id": "a", "name": "b", "input": "c"}]}]},
     "messages.0.content.0.input: expected an object, got a string"),
    ({"messages": [user(result("a", 7))]},
     "messages.0.content.0.content: expected a string or an array of blocks, got a number"),
    ({"messages": [user(text("x"))], "max_tokens": True},
     "max_tokens: expected a whole number, got a boolean"),
    ({"messages": [user(text("x"))], "max_tokens": 0}, "max_tokens: expected at least 1, got 0"),
    ({"messages": [user(text("x"))], "stop_sequences": [1]},
     "stop_sequences.0: expected a string, got a number"),
    ({"messages": [user(text("x"))], "tools": [{}]}, "tools.0.name: a string is required"),
    ({"messages": [user(text("x"))], "tools": {}}, "tools: expected an array, got an object"),
    ({"messages": [user(text("x"))], "system": 5},
     "system: expected a string or an array of text blocks, got a number"),
    ({"messages": [user(text("x"))], "stream": "yes"}, "stream: expected a boolean, got a string"),
    ({"messages": [user(text("x"))], "temperature": "hot"},
     "temperature: expected a number, got a string"),
    ({"messages": [user(text("x"))], "tool_choice": {"type": "maybe"}},
     "tool_choice.type: expected auto, any, tool or none, got 'maybe'"),
    ({"messages": [user(text("x"))], "tool_choice": {"type": "tool"}},
     "tool_choice.name: a string is required"),
]


TOOLS = json.dumps([{"name": "Read", "description": "a é \" ] }", "input_schema": {}}],
                   ensure_ascii=False)
BODIES = [
    ("the same tools", '{"messages":[],"tools":%s,"stream":true}' % TOOLS),
    ("others", '{"messages":[],"tools":[{"name":"é"}],"stream":true}'),
    ("none", '{"messages":[]}'),
    ("an empty list", '{"tools":[]}'),
    ("tools that are no list", '{"tools":{"a":%s}}' % TOOLS),
    ("spaces", '{ "tools" : %s }' % TOOLS),
    ("the same list inside a call only", '{"messages":[{"input":{"tools":%s}}]}' % TOOLS),
    ("and as its own", '{"tools":%s,"messages":[{"input":{"tools":%s}}]}' % (TOOLS, TOOLS)),
    ("twice", '{"tools":%s,"tools":[]}' % TOOLS),
    ("quoted in a text", json.dumps({"messages": '{"tools":%s}' % TOOLS})),
    ("a list", '[{"tools":%s}]' % TOOLS),
]


def test_bodies_are_read_alike_whatever_tools_are_known():
    for name, body in [*BODIES, *reversed(BODIES)]:
        assert read_body(body.encode()) == json.loads(body), name


@pytest.mark.parametrize("body", [BODIES[0][1], '{ "tools": %s, "x": 1 }' % TOOLS,
                                  '{"tools":\n%s}' % TOOLS.replace("Read", "Other")])
def test_tools_are_read_once(body):
    again = '{"tools":%s,"x":{"tools":%s}}' % (TOOLS, TOOLS)
    read_body(body.encode())
    known = read_body(body.encode())["tools"]
    for _ in range(9):
        assert read_body(again.encode()) == json.loads(again)  # crowds nothing out
    assert read_body(body.encode() + b" ")["tools"] is known


@pytest.mark.parametrize("body", [
    '{"tools":%s,"x":NaN}' % TOOLS, '{"x":-Infinity,"tools":%s}' % TOOLS, '{"tools":NaN}',
    '{"tools":%s' % TOOLS, '{"tools":%s,"x":1e999}' % TOOLS, '{"tools":%s}x' % TOOLS])
def test_known_tools_make_no_bad_body_good(body):
    read_body(BODIES[0][1].encode())
    with pytest.raises(ValueError):
        read_body(body.encode())


@pytest.mark.parametrize(("body", "words"), BAD_FIELDS, ids=[row[1] for row in BAD_FIELDS])
def test_a_wrong_field_is_named(body, words):
    with pytest.raises(BadRequestError) as problem:
        parse_request(body)
    assert problem.value.message == words


def test_fields_of_the_cli_are_understood_or_ignored():
    request = parse_request({
        "model": "q", "messages": [user(text("hi"))], "max_tokens": 5, "stream": True,
        "system": [text("x-anthropic-billing-header: cc_version=2.1.197.fa0;"), text("You are.")],
        "thinking": {"type": "adaptive"}, "context_management": {"edits": []},
        "output_config": {"effort": "high"}, "metadata": {"user_id": "{}"}, "service_tier": "x",
        "tools": [{"type": "web_search_20250305", "name": "web_search"},
                  {"name": "A", "input_schema": {"type": "object"}}]})
    assert request.system == ("You are.",)
    assert request.tools == (Tool("A", "", {"type": "object"}),)
    assert (request.thinking, request.max_tokens, request.stream) == (True, 5, True)


CONVERSATIONS = {
    "system text in the middle rides with the turn before it": (
        [{"role": "user", "content": "one"}, {"role": "system", "content": "RULE"},
         {"role": "assistant", "content": "two"}, {"role": "user", "content": "three"}],
        [("user", "one\n\n<system-reminder>\nRULE\n</system-reminder>"), ("assistant", "two"),
         ("user", "three")]),
    "system text at the start joins the system prompt": (
        [{"role": "system", "content": "RULE"}, {"role": "user", "content": "one"}],
        [("system", "RULE"), ("user", "one")]),
    "system text after an assistant rides with the next user turn": (
        [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"},
         {"role": "system", "content": "RULE"}, {"role": "user", "content": "three"}],
        [("user", "one"), ("assistant", "two"),
         ("user", "<system-reminder>\nRULE\n</system-reminder>\n\nthree")]),
    "neighbours of one role are joined": (
        [{"role": "user", "content": "one"}, user(text("two\n"), text("three"))],
        [("user", "one\n\ntwo\n\nthree")]),
    "results come in call order": (
        [{"role": "user", "content": "go"}, {"role": "assistant", "content": [use("a"), use("b")]},
         user(result("b", "B"), result("a", "A"))],
        [("user", "go"), ("assistant", ""), ("tool", "A"), ("tool", "B")]),
    "a call without a result keeps its place": (
        [{"role": "user", "content": "go"}, {"role": "assistant", "content": [use("a"), use("b")]},
         user(result("b", "B"))],
        [("user", "go"), ("assistant", ""),
         ("tool", "[No result: the call was interrupted before it ended.]"), ("tool", "B")]),
    "a reminder rides in the last result": (
        [{"role": "user", "content": "go"}, {"role": "assistant", "content": [use("a")]},
         user(result("a", "A"), text("<system-reminder>\nR\n</system-reminder>"))],
        [("user", "go"), ("assistant", ""),
         ("tool", "A\n\n<system-reminder>\nR\n</system-reminder>")]),
    "the user's own words follow the results": (
        [{"role": "user", "content": "go"}, {"role": "assistant", "content": [use("a")]},
         user(result("a", "A"), text("and now stop"))],
        [("user", "go"), ("assistant", ""), ("tool", "A"), ("user", "and now stop")]),
    "a failed call is told": (
        [{"role": "user", "content": "go"}, {"role": "assistant", "content": [use("a")]},
         user(result("a", "Exit code 1", is_error=True))],
        [("user", "go"), ("assistant", ""), ("tool", "[The tool call failed]\nExit code 1")]),
    "an empty result is never empty": (
        [{"role": "user", "content": "go"}, {"role": "assistant", "content": [use("a")]},
         user(result("a", ""))],
        [("user", "go"), ("assistant", ""), ("tool", "(no output)")]),
    "a loaded tool is named": (
        [{"role": "user", "content": "go"}, {"role": "assistant", "content": [use("a")]},
         user(result("a", [{"type": "tool_reference", "tool_name": "X"}]))],
        [("user", "go"), ("assistant", ""), ("tool", "The tool X is loaded now and can be called.")]),
    "a document becomes a notice": (
        [user(text("see"), {"type": "document", "source": {
            "type": "base64", "media_type": "application/pdf", "data": "AAAA" * 1024}})],
        [("user", "see\n\n[A block of type document (application/pdf, 3 KB) was left out here:"
          " this model reads text only.]")]),
    "a text document is its text": (
        [user(text("see"), {"type": "document", "source": {
            "type": "text", "media_type": "text/plain", "data": "the text"}})],
        [("user", "see\n\nthe text")]),
    "an image that is not here becomes a notice": (
        [user(text("see"), {"type": "image", "source": {"type": "url", "url": "http://x"}})],
        [("user", "see\n\n[An image was left out here: only images sent as base64 can be shown"
          " to the model.]")]),
    "a later system text that is a reminder already stays as it is": (
        [{"role": "user", "content": "one"},
         {"role": "system", "content": "<system-reminder>\nRULE\n</system-reminder>"}],
        [("user", "one\n\n<system-reminder>\nRULE\n</system-reminder>")]),
    "empty turns go": (
        [user(), {"role": "user", "content": "one"}, {"role": "system", "content": ""},
         {"role": "assistant", "content": "two"}, user(text(""))],
        [("user", "one"), ("assistant", "two")]),
    "an empty text behind results makes no turn": (
        [{"role": "user", "content": "go"}, {"role": "assistant", "content": [use("a")]},
         user(result("a", "A"), text(""))],
        [("user", "go"), ("assistant", ""), ("tool", "A")]),
    "an empty assistant turn goes": (
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm"}]}, {"role": "user", "content": "b"}],
        [("user", "a"), ("user", "b")]),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations(name):
    messages, rows = CONVERSATIONS[name]
    assert [(row["role"], row["content"]) for row in upstream(messages)] == rows


def test_calls_and_results_carry_names_and_ids():
    rows = upstream([{"role": "user", "content": "go"},
                     {"role": "assistant", "content": [text("ok"), use("a", file_path="x")]},
                     user(result("a", "A"))])
    assert rows[1:] == [
        {"role": "assistant", "content": "ok", "tool_calls": [
            {"id": "a", "function": {"index": 0, "name": "Read", "arguments": {"file_path": "x"}}}]},
        {"role": "tool", "content": "A", "tool_name": "Read", "tool_call_id": "a"}]


def test_calls_beside_text_survive_where_the_template_drops_them():
    rows = upstream([{"role": "user", "content": "go"},
                     {"role": "assistant", "content": [text("ok"), use("a", file_path="x")]},
                     user(result("a", "A"))], PLAIN._replace(drops_calls=True))
    assert rows[1] == {"role": "assistant", "content":
                       'ok\n<tool_call>\n{"name": "Read", "arguments": {"file_path": "x"}}\n</tool_call>'}


def test_what_the_model_wrote_goes_back_as_it_was():
    rows = upstream([{"role": "user", "content": "go"}, {"role": "assistant", "content": [use("a")]},
                     user(result("a", "A"))], recall=lambda index, turn: "RAW" if index == 1 else None)
    assert rows[1] == {"role": "assistant", "content": "RAW"}


IMAGE = {"type": "image", "source": {"type": "base64", "data": "data:image/png;base64,QU-_"}}


@pytest.mark.parametrize(("facts", "row"), [
    (PLAIN, {"role": "user", "content": "look", "images": ["QU+/"]}),
    (PLAIN._replace(capabilities=frozenset({"vision"})),
     {"role": "user", "content": "look", "images": ["QU+/"]}),
    (PLAIN._replace(capabilities=frozenset({"completion"})),
     {"role": "user", "content": "look\n\n[1 image was left out here: the model m cannot see images.]"}),
])
def test_images(facts, row):
    assert upstream([user(text("look"), IMAGE)], facts) == [row]


def test_images_of_a_result_follow_it_where_templates_print_only_its_text():
    messages = [{"role": "user", "content": "go"}, {"role": "assistant", "content": [use("a")]},
                user(result("a", [IMAGE]))]
    assert upstream(messages)[2]["images"] == ["QU+/"]
    rows = upstream(messages, PLAIN._replace(path="C"))
    assert [(row["role"], row.get("images")) for row in rows[2:]] == [
        ("tool", None), ("user", ["QU+/"])]


def test_images_of_several_results_keep_their_order():
    one, two, three = ({"type": "image", "source": {"type": "base64", "data": letter}}
                       for letter in ("A", "B", "C"))
    rows = upstream([{"role": "user", "content": "go"},
                     {"role": "assistant", "content": [use("a"), use("b")]},
                     user(result("b", [two]), result("a", [one]), text("see"), three)],
                    PLAIN._replace(path="C"))
    assert [(row["role"], row.get("images")) for row in rows[2:]] == [
        ("tool", None), ("tool", None), ("user", ["A", "B", "C"])]


SCHEMAS = {
    "noise goes": ({"$schema": "x", "type": "object", "additionalProperties": False,
                    "properties": {"a": {"type": "string", "minLength": 1}}},
                   {"type": "object", "properties": {"a": {"type": "string"}}}),
    "boolean schemas": ({"properties": {"a": True, "b": {"anyOf": [False, {"type": "null"}]}}},
                        {"properties": {"a": {}, "b": {"anyOf": [{}, {"type": "null"}]}}}),
    "references": ({"properties": {"a": {"$ref": "#/$defs/X"}}, "$defs": {"X": {"type": "number"}}},
                   {"properties": {"a": {"type": "number"}}}),
    "a reference in allOf": (
        {"properties": {"a": {"description": "d", "allOf": [{"$ref": "#/$defs/X"}]}},
         "$defs": {"X": {"type": "number", "description": "x"}}},
        {"properties": {"a": {"type": "number", "description": "d"}}}),
    "a type called None": ({"properties": {"a": {"$ref": None}}, "$defs": {"None": {"type": "null"}}},
                           {"properties": {"a": {}}}),
    "oneOf, allOf, const": (
        {"properties": {"a": {"oneOf": [{"type": "string"}]}, "b": {"allOf": [{"type": "number"}]},
                        "c": {"const": 5}}},
        {"properties": {"a": {"anyOf": [{"type": "string"}]}, "b": {"type": "number"},
                        "c": {"enum": [5]}}}),
    "wrong types": ({"properties": {"a": {"type": 5, "required": True, "enum": "x",
                                          "description": ["y"]}}}, {"properties": {"a": {}}}),
    "lists that say nothing": ({"properties": {"a": {"type": [], "required": [], "anyOf": []},
                                               "b": {"type": ["string", 5], "required": ["c", 5]}}},
                               {"properties": {"a": {}, "b": {}}}),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_are_made_fit_for_a_strict_decoder(name):
    schema, wanted = SCHEMAS[name]
    assert normal_schema(schema) == wanted


def test_what_is_nested_without_references_stays_whole():
    deep = {"type": "string"}
    for _ in range(10):
        deep = {"type": "array", "items": deep}
    assert normal_schema(deep) == deep


def test_a_circle_of_references_ends():
    loop = {"$ref": "#/$defs/A", "$defs": {"A": {"properties": {"a": {"$ref": "#/$defs/A"}}}}}
    assert json.dumps(normal_schema(loop)).count("properties") < 20


def test_a_type_that_holds_itself_in_many_places_stays_small():
    places = {name: {"anyOf": [{"$ref": "#/$defs/F"}, {"type": "string"}]} for name in "abcde"}
    places["f"] = {"allOf": [{"$ref": "#/$defs/F"}]}
    made = normal_schema({"$ref": "#/$defs/F", "$defs": {"F": {"properties": places}}})
    assert 1000 < len(json.dumps(made)) < 30_000


def test_the_top_of_a_schema_is_always_an_object():
    made = tool_json(Tool("T", "d", {"type": ["object"], "required": "x"}))
    assert made["function"]["parameters"] == {"type": "object", "properties": {}}


def test_one_keyword_a_property_for_the_renderer_that_prints_two_in_random_order():
    tool = Tool("T", "", {"properties": {"a": {"type": "array", "items": {"type": "string"},
                                               "enum": [["x"]]},
                                         "b": {"description": "B", "enum": ["x"]}, "c": {}}})
    assert tool_json(tool, "qwen3-coder")["function"]["parameters"]["properties"] == {
        "a": {"type": "array", "items": {"type": "string"}, "description": '(enum: [["x"]])'},
        "b": {"description": "B", "enum": ["x"]}, "c": {}}


def test_tools_go_into_the_system_text_where_the_template_would_misprint_them():
    facts = PLAIN._replace(tools_in_text=True)
    tools = [{"name": "Read", "description": "d", "input_schema": {"type": "object"}}]
    rows = upstream([{"role": "user", "content": "hi"}], facts, system="S", tools=tools)
    assert rows[0]["content"].startswith("S\n\n# Tools\n")
    assert '{"type": "function", "function": {"name": "Read", "description": "d"' \
        in rows[0]["content"]


@pytest.mark.parametrize(("choice", "ending"), [
    ({"type": "auto"}, "hi"),
    ({"type": "any"}, "must call one of the tools.\n</system-reminder>"),
    ({"type": "tool", "name": "Read"}, "call of the tool Read now, and of no other tool."
                                       "\n</system-reminder>"),
])
def test_tool_choice_is_said_in_words(choice, ending):
    rows = upstream([{"role": "user", "content": "hi"}], tool_choice=choice,
                    tools=[{"name": "Read"}])
    assert rows[-1]["content"].endswith(ending)


def test_tool_choice_none_offers_nothing():
    request = parse_request({"messages": [{"role": "user", "content": "hi"}],
                             "tools": [{"name": "Read"}], "tool_choice": {"type": "none"}})
    assert tool_table(request, 8) == ({}, ())


def test_the_same_tools_are_sent_while_the_client_offers_the_same():
    tools = [{"name": name} for name in ("Bash", "Zeta", "Agent", "Read")]
    first = parse_request({"messages": [user(text("hi"))], "tools": tools})
    table = tool_table(first, 3)
    later = parse_request({"messages": [
        user(text("hi")), {"role": "assistant", "content": [use("a", "Zeta")]},
        user(result("a"))], "tools": tools})
    assert [t.name for t in tool_table(later, 3, table).sent] == [t.name for t in table.sent]
    assert "Zeta" in [t.name for t in tool_table(later, 3).sent]


def test_the_body_holds_what_keeps_ollama_honest():
    request = parse_request({"messages": [user(text("hi"))], "temperature": 0.5,
                             "output_config": {"format": {"type": "json_schema", "schema": {}}}})
    body = chat_body(request, PLAIN, CONFIG, {"num_ctx": 9, "num_predict": 5},
                     messages_json='{"role":"user","content":"hi"}', tools_json="[]")
    assert json.loads(body) == {
        "model": "m", "messages": [{"role": "user", "content": "hi"}], "tools": [], "stream": True,
        "truncate": False, "shift": False, "keep_alive": -1, "format": {},
        "options": {"num_ctx": 9, "num_predict": 5, "temperature": 0.5}}
    assert json.loads(render_body(body))["_debug_render_only"] is True


@pytest.mark.parametrize(("thinking", "capabilities", "sent"), [
    ({"type": "adaptive"}, {"thinking"}, True), ({"type": "disabled"}, {"thinking"}, False),
    (None, {"thinking"}, False), ({"type": "enabled"}, {"completion"}, None),
    ({"type": "enabled"}, None, None),
])
def test_think_is_sent_only_where_the_model_can(thinking, capabilities, sent):
    facts = PLAIN._replace(capabilities=frozenset(capabilities) if capabilities else None)
    request = parse_request({"messages": [user(text("hi"))], "thinking": thinking})
    body = json.loads(chat_body(request, facts, CONFIG, {}, messages_json="", tools_json=""))
    assert body.get("think") is sent


def test_written_messages_are_taken_over_from_the_last_turn():
    counter, request = TokenCounter(), parse_request({"messages": [
        user(text("a")), {"role": "assistant", "content": "b"}, user(text("c"))]})
    rows = chat_messages(request, (), PLAIN, lambda index, turn: None, lambda words: words)
    whole, same = write_messages(rows, [], counter)
    assert same == 0
    fewer, same = write_messages(rows[:1] + rows[2:], whole, counter)
    assert same == 1
    assert fewer[0] is whole[0]
    assert [row.json for row in fewer] == [
        json.dumps(row, separators=(",", ":")) for row in rows[:1] + rows[2:]]
    assert [row.size for row in fewer] == [counter.sizes_of("a"), counter.sizes_of("c")]
    assert write_messages(rows, fewer, counter) == (whole, 1)
    assert write_messages(rows, whole, counter) == (whole, 3)


def test_show_and_probe_tell_the_path(recording):
    rows = {}
    for case in ("show-a-toolxml", "show-b-hello", "show-c-tooljson", "show-q3-think"):
        body = json.loads(recording("0.33.0-rc2", case)["lines_at_ms"][0][1])
        facts = facts_from_show("m", body)
        rows[case] = (facts.path, facts.renderer, facts.trained,
                      *(one in (facts.capabilities or ()) for one in ("thinking", "tools")))
    assert rows == {
        "show-a-toolxml": ("A", "qwen3-coder", 32768, False, True),
        "show-b-hello": ("B", "", 32768, False, True),
        "show-c-tooljson": ("C", "", 32768, False, True),
        "show-q3-think": ("B", "", 32768, True, True)}


@pytest.mark.parametrize("show", [None, [], {"modelfile": 5, "capabilities": "x", "model_info": []},
                                  {"parameters": ["num_ctx"], "template": None}])
def test_odd_show_answers_are_survived(show):
    assert facts_from_show("m", show).path == ""


def test_the_probe_finds_what_templates_lose():
    go_struct = "x {ProbeTool probe {object <nil>}} probe question probe said"
    facts = facts_from_probe(PLAIN, "<|im_start|>" + go_struct)
    assert (facts.tools_in_text, facts.drops_calls, facts.chatml) == (True, True, True)
    good = facts_from_probe(PLAIN, '{"name": "ProbeTool"} probe question probe said probe value')
    assert (good.tools_in_text, good.drops_calls, good.chatml) == (False, False, False)
    assert [opening_of(p) for p in ("a<think>\n", "a<think>\n\n</think>\n\n", "a")] == [
        "<think>\n", "<think>\n\n</think>\n\n", ""]


def test_the_git_status_moves_behind_what_is_the_same_in_every_session():
    rows = upstream([{"role": "user", "content": "hi"}], system="You are.\n\ngitStatus: at start\nclean")
    assert [(row["role"], row["content"]) for row in rows] == [
        ("system", "You are."),
        ("user", "<system-reminder>\ngitStatus: at start\nclean\n</system-reminder>\n\nhi")]
