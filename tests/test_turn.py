"""Section 13: from Ollama's bytes to events, both ways, however the bytes are cut."""
import json
import random

import pytest
from helpers import check_events, joined
from mock_ollama import MockOllama, model_text
from qwencode import (
    Call,
    ChatDecoder,
    GenerateDecoder,
    StopScanner,
    StreamTranslator,
    Turn,
    Usage,
    error_event,
    fold,
)
from test_decoders import NEW, OLD
from test_mock_ollama import LONG, OLD_SCRIPTS, SCRIPTS, ask, recording
from tool_text_cases import CASES
from tool_text_helpers import CLAUDE

TOOLS = {name: CLAUDE[name] for name in ("Read", "Write")}


def run(decoder, pieces, tools=TOOLS, stops=(), rescue=lambda answer: None):
    """Feed pieces of bytes to a turn; return it and its events."""
    ids = iter(range(1000))
    translator = StreamTranslator("msg_1", "m", lambda: f"toolu_{next(ids)}")
    turn = Turn(decoder, translator, tools, stops,
                lambda finish, output: Usage(finish.prompt_tokens or 0, output), rescue=rescue)
    events = [translator.start(Usage(5, 1))]
    for piece in pieces:
        if not (turn.done or turn.error):
            events += turn.feed(piece)
    if not (turn.done or turn.error):
        events += turn.close()
    if turn.error:
        events.append(error_event(turn.error))
    check_events(events, list(tools))
    return turn, events


def cuts(data, how):
    """Cut bytes: whole, by lines, by single bytes, or at random by seed."""
    if how == "lines":
        return data.splitlines(keepends=True)
    if how == "bytes":
        return [data[at:at + 1] for at in range(len(data))]
    if how == "whole":
        return [data]
    dice, pieces = random.Random(how), []
    while data:
        size = dice.choice((1, 2, 3, 5, 8, 13, 40, 200))
        pieces.append(data[:size])
        data = data[size:]
    return pieces


HOWS = ("whole", "lines", "bytes", 1, 2)


def said(text):
    return [("start", "text"), ("text_delta", text), ("stop",)]


def thought(text):
    return [("start", "thinking"), ("thinking_delta", text),
            ("signature_delta", "cXdlbmNvZGU="), ("stop",)]


def called(name, spaced=False, **arguments):
    separators = None if spaced else (",", ":")
    return [("start", "tool_use", name),
            ("input_json_delta", json.dumps(arguments, separators=separators)), ("stop",)]


DONE, USE, FULL = [("end", "end_turn")], [("end", "tool_use")], [("end", "max_tokens")]
BROKEN = [("error", "api_error")]
PATH = "/tmp/a.py"
HELLO = said("Hello from the scripted model, piece four. And the end.") + DONE
ANSWER = thought("I should look closely.") + said("The answer is 42.") + DONE
READ_IT = said("I will read it.") + called("Read", file_path=PATH) + USE
LEAKED = "<function=Read>\n<parameter=file_path>\n/tmp/a.py\n</parameter>\n</function>\n</tool_call>"
AFTER = said("The file says hello.") + DONE
AGAIN = "Start " + "again again " * 31
# What a user of /api/chat gets of each recorded stream.
RECORDED = {
    (OLD, "a35-think"): thought("\nI should look closely.") + ANSWER[4:],
    (OLD, "b-hello"): HELLO,
    (OLD, "image-to-text-model"): HELLO,
    (OLD, "overflow-shift-false"): said("Hello from ") + FULL,
    (OLD, "overflow-silent"): HELLO,
    (NEW, "a-badxml"): [("start", "text"), ("text_delta", "Now."), *BROKEN],
    (NEW, "a-longwritexml"): said("Writing a long file.") + called(
        "Write", file_path="/tmp/long.txt", content=LONG[:-1]) + USE,
    (NEW, "a-noopen"): said("Reading.\n") + called("Read", file_path=PATH) + USE,
    (NEW, "a-space"): BROKEN,
    (NEW, "a-think"): ANSWER,
    (NEW, "a-toolxml-after-result"): AFTER,
    (NEW, "a-toolxml"): READ_IT,
    (NEW, "a-twocallsxml"): said("Both:") + called("Read", file_path=PATH) + called(
        "Read", file_path="/tmp/b.py") + USE,
    (NEW, "a-unclosed"): said("Use the") + DONE,
    (NEW, "a-xmlquirks"): called("Write", file_path="/tmp/q.py", content=(
        'if a<b name="c"> and d & e:\n    x = null\n')) + USE,
    (NEW, "a35-noopen"): thought("Reading.\n" + LEAKED) + called("Read", file_path=PATH) + USE,
    (NEW, "a35-think"): ANSWER,
    (NEW, "a35-thinkcall"): [*thought("I will call it.")[:2], *BROKEN],
    (NEW, "a35-toolxml-after-result"): thought("The file says hello.") + DONE,
    (NEW, "a35-toolxml"): thought("I will read it.") + called("Read", file_path=PATH) + USE,
    (NEW, "b-badjson"): said("Writing.\n") + DONE,
    (NEW, "b-barejson"): called("Read", file_path=PATH) + USE,
    (NEW, "b-fenced"): said("Sure:\n") + called("Read", file_path=PATH) + USE,
    (NEW, "b-hello"): HELLO,
    (NEW, "b-longwrite"): said("Writing a long file.") + called(
        "Write", file_path="/tmp/long.txt", content=LONG) + USE,
    (NEW, "b-noargs"): said("List.\n") + DONE,
    (NEW, "b-space"): BROKEN,
    (NEW, "b-texttool"): said("Hi there ") + DONE,
    (NEW, "b-tooljson-after-result"): AFTER,
    (NEW, "b-tooljson"): READ_IT,
    (NEW, "b-toolonly"): called("Read", file_path=PATH, limit=5) + USE,
    (NEW, "b-twocalls"): said("Both:") + called("Read", file_path=PATH) + called(
        "Read", file_path="/tmp/b.py") + USE,
    (NEW, "b-unclosed"): said("Use the ") + DONE,
    (NEW, "b-unknowntool"): said("Now.\n") + DONE,
    (NEW, "c-barejson"): called("Read", file_path=PATH) + USE,
    (NEW, "c-hello"): HELLO,
    (NEW, "c-tooljson-after-result"): AFTER,
    (NEW, "c-tooljson"): READ_IT,
    (NEW, "length"): said("w0 w1 w2 w3 w4 ") + FULL,
    (NEW, "load"): BROKEN,
    (NEW, "overflow-silent"): HELLO,
    (NEW, "q3-think-off"): ANSWER,
    (NEW, "q3-think"): thought("I should look closely.\n") + ANSWER[4:],
    (NEW, "q3-thinkcall"): thought(
        'I will call it. \n<tool_call>\n{"name": "Read", "arguments": {"file_path": "/tmp/a.py"}}'
        "\n</tool_call>") + called("Read", file_path=PATH) + USE,
    (NEW, "q3-toolonly"): called("Read", file_path=PATH, limit=5) + USE,
    (NEW, "raw-generate"): said("I will read it.\n") + called(
        "Read", spaced=True, file_path=PATH) + USE,
    (NEW, "repeat"): [("start", "text"), ("text_delta", AGAIN), *BROKEN],
}


@pytest.mark.parametrize(("version", "case"), RECORDED)
def test_a_recorded_stream(version, case):
    known = recording(case, version)
    data = "".join(line for _, line in known["lines_at_ms"]).encode()
    kind = ChatDecoder if known["request"]["path"] == "/api/chat" else GenerateDecoder
    for how in HOWS:
        turn, events = run(kind("m"), cuts(data, how))
        assert joined(events) == RECORDED[version, case], how
        assert turn.done == (not turn.error)


def test_every_recorded_stream_is_in_the_table():
    unread = set(SCRIPTS) - {case for version, case in RECORDED if version == NEW}
    assert unread == {"a-badxml-whole"}  # a refusal: test_decoders
    assert set(OLD_SCRIPTS) <= {case for version, case in RECORDED if version == OLD}


# What the same script of model text becomes where /api/generate gives it verbatim; where
# nothing stands here it is as on /api/chat but for the white space that Ollama drops.
VERBATIM = {
    "a-badxml": said("Now.\n") + called("Read", file_path=PATH) + USE,
    "a-badxml-whole": said("Now.\n") + called("Read", file_path=PATH) + USE,
    "a-unclosed": said("Use the <tool_call> tag to call.") + DONE,
    "a-xmlquirks": called("Write", file_path="/tmp/q.py", content=(
        "if a<b=c> and d & e:\r\n    x = null\r\n")) + USE,
    "a35-toolxml": thought("I will read it.\n<tool_call>\n" + LEAKED) + called(
        "Read", file_path=PATH) + USE,
    "a35-thinkcall": thought(
        'I will call it. <tool_call>\n{"name": "Read", "arguments": {"file_path": "/tmp/a.py"}}'
        "\n</tool_call>") + called("Read", file_path=PATH) + USE,
    "b-badjson": said("Writing.\n") + called("Write", file_path="a", content="one\ntwo") + USE,
    "b-noargs": said('List.\n<tool_call>\n{"name": "Glob"}\n</tool_call>') + DONE,
    "b-texttool": said("Hi there ") + called("Read", file_path=PATH) + USE,
    "b-unclosed": said("Use the <tool_call> tag to call.") + DONE,
    "b-unknowntool": said(
        'Now.\n<tool_call>\n{"name": "Glob", "arguments": {"pattern": "*"}}\n</tool_call>') + DONE,
}


def loose(rows):
    """Rows without what both ways may write differently: JSON's spaces, ends of text."""
    made = []
    for row in rows:
        if row[0] == "input_json_delta":
            made.append((row[0], json.loads(row[1])))
        elif row[0] in ("text_delta", "thinking_delta"):
            made.append((row[0], row[1].strip()))
        else:
            made.append(row)
    return made


def generated(script, body, version):
    """The bytes of /api/generate for this script of model text."""
    raw = {"model": body["model"], "prompt": "<|im_start|>user\nhi<|im_end|>\n", "raw": True,
           "think": False, "options": body.get("options") or {}}
    with MockOllama(model_text("".join(script), script), models="any", version=version) as mock:
        status, _, text = ask(mock, "/api/generate", raw)
    assert status == 200
    return text.encode()


@pytest.mark.parametrize(("version", "name"), [(NEW, name) for name in SCRIPTS]
                         + [(OLD, name) for name in OLD_SCRIPTS])
def test_nothing_is_lost_verbatim(version, name):
    script = (SCRIPTS if version == NEW else OLD_SCRIPTS)[name]
    body = recording(name, version)["request"]["body"]
    data = generated(script, body, version)
    opened = body["model"].startswith("a35-") and "<think>" not in script[0]
    wanted = VERBATIM.get(name) or RECORDED[version, name]
    for how in HOWS:
        turn, events = run(GenerateDecoder("m", opened), cuts(data, how))
        assert loose(joined(events)) == loose(wanted), how
        limit = body.get("options", {}).get("num_predict")
        if wanted[-1] not in BROKEN:
            assert turn.raw == "".join(script[:limit])


# ---- the case table of tool calls in text

def lines_of(pieces, reason="stop"):
    lines = [json.dumps({"model": "m", "response": piece, "done": False}) for piece in pieces]
    lines.append(json.dumps({"model": "m", "response": "", "done": True, "done_reason": reason,
                             "eval_count": 1}))
    return ("\n".join(lines) + "\n").encode()


def cut_text(text, how):
    if how == "whole":
        return [text]
    if how == "characters":
        return list(text)
    return [piece.decode("utf-32-le") for piece in
            (lambda data: [data[at:at + 4 * how] for at in range(0, len(data), 4 * how)])(
                text.encode("utf-32-le"))]


def calls_of(events):
    return [(b["name"], b["input"]) for b in fold(events)["content"] if b["type"] == "tool_use"]


def texts_of(events, kind="text"):
    return "".join(b[kind] for b in fold(events)["content"] if b["type"] == kind)


# Read whole this is two calls; streamed, the first value has no end that shows in time.
LEFT_OPEN = ("qwen3 coder values 14",)
PLAIN_CASES = [case for case in CASES if not case.thought and case.reason in ("stop", "length")
               and "<think>" not in case.text and "</think>" not in case.text
               and "<|im_" not in case.text and "<|endoftext|>" not in case.text]


def test_most_of_the_table_runs_here():
    assert len(PLAIN_CASES) > 0.85 * len(CASES)


@pytest.mark.parametrize("case", PLAIN_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("thinks", [False, True])
def test_a_case_of_the_table_verbatim(case, thinks):
    before = "<think>\nHm, let me see.\n</think>\n\n" if thinks else ""
    for how in ("whole", "characters", 3, 11):
        data = lines_of(cut_text(before + case.text, how), case.reason)
        turn, events = run(GenerateDecoder("m"), [data], case.tools)
        if turn.error:
            assert not case.text.strip()
            continue
        calls = [call for call in calls_of(events) if call in case.calls]
        if case.name in LEFT_OPEN:
            assert calls_of(events) == [("Read", {})]
            continue
        assert calls == case.calls, how
        text = texts_of(events)
        if not case.calls and not any(row[:2] == ("start", "tool_use") for row in joined(events)):
            lead = case.text.lstrip("\r\n") if thinks else case.text
            assert text == lead or text.strip() == case.text.strip(), how
        if thinks:
            assert texts_of(events, "thinking") == "Hm, let me see."


def test_a_line_end_beside_data_that_is_no_call_is_shown():
    text = '<tool_call>\n{"name": "Nobody", "arguments": {}}\n</tool_call>'
    _, events = run(GenerateDecoder("m"), [lines_of([text[:-5], text[-5:]])])
    assert texts_of(events) == text


FENCED_README = "Here it is:\n\n```markdown\n# P\n\n```bash\nnpm install\n```\n```"


@pytest.mark.parametrize("how", ["whole", "characters", 3, 11])
@pytest.mark.parametrize("text", [
    FENCED_README, "a\n```\n```\n\nb", "```sh\nls\n```\n\n```sh\nls\n```"])
def test_white_space_between_pieces_of_one_answer_is_kept(text, how):
    _, events = run(GenerateDecoder("m"), [lines_of(cut_text(text, how))])
    assert texts_of(events) == text


# ---- stop sequences

STOPS = {
    # name: stops, text, what is shown, the stop met
    "none": ((), "abc", "abc", None),
    "within": (("STOP",), "abcSTOPdef", "abc", "STOP"),
    "at the start": (("STOP",), "STOPdef", "", "STOP"),
    "at the end": (("STOP",), "abcSTOP", "abc", "STOP"),
    "half of it at the end": (("STOP",), "abcSTO", "abcSTO", None),
    "the first of two": (("two", "one"), "a one b two", "a ", "one"),
    "the longer at one place": (("ab", "abc"), "xabc", "x", "ab"),
    "begins again": (("aab",), "aaab", "a", "aab"),
    "line feeds": (("\n\n",), "a\nb\n\nc", "a\nb", "\n\n"),
    "never": (("zzz",), "zz top zz", "zz top zz", None),
}


@pytest.mark.parametrize("name", STOPS)
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_stop_sequences(name, size):
    stops, text, shown, met = STOPS[name]
    scanner, got, found = StopScanner(stops), "", None
    for at in range(0, len(text), size):
        piece, found = scanner.feed(text[at:at + size])
        got += piece
        if found:
            break
    else:
        got += scanner.close()
    assert (got, found) == (shown, met)


def test_a_stop_ends_the_message():
    turn, events = run(GenerateDecoder("m"), [lines_of(list("one STOP two"))], stops=("STOP",))
    assert joined(events) == [*said("one "), ("end", "stop_sequence")]
    assert fold(events)["stop_sequence"] == "STOP"
    assert turn.done


@pytest.mark.parametrize("end", ["<|im_end|>", "<|im_start|>", "<|endoftext|>"])
def test_the_models_own_ends_end_the_turn_and_are_not_remembered(end):
    data = lines_of(list(f"one{end}\nuser\nmore"))
    for how in HOWS:
        turn, events = run(GenerateDecoder("m"), cuts(data, how))
        assert joined(events) == said("one") + DONE
        assert fold(events)["stop_sequence"] is None
        assert turn.raw == "one"


# ---- ends

OPEN_WRITE = ('<tool_call>\n{"name": "Write", "arguments": {"file_path": "a", "content": "one two')
ENDS = {
    # name: text, done_reason, rows
    "cut at its length in an open call": (OPEN_WRITE, "length", FULL),
    "ended within an open call": (OPEN_WRITE, "stop", USE),
}


@pytest.mark.parametrize("name", ENDS)
def test_an_unfinished_call_is_closed_as_the_api_closes_it(name):
    text, reason, end = ENDS[name]
    for how in ("whole", "characters", 3):
        _, events = run(GenerateDecoder("m"), [lines_of(cut_text(text, how), reason)])
        assert joined(events)[0] == ("start", "tool_use", "Write"), how
        assert joined(events)[-1:] == end, how


def test_a_broken_upstream_ends_in_an_error_even_within_a_call():
    data = lines_of(list(OPEN_WRITE))
    turn, events = run(GenerateDecoder("m"), [data[:data.rindex(b'{"model"')]])
    assert joined(events)[-1] == ("error", "api_error")
    assert turn.error


def test_a_rescue_is_asked_once_for_an_answer_without_calls():
    asked = []

    def rescue(answer):
        asked.append(answer)
        return Call("Write", {"file_path": "a", "content": "b"}, "intent:create")

    turn, events = run(GenerateDecoder("m"), [lines_of(["Save it as a.\n"])], rescue=rescue)
    assert asked == ["Save it as a.\n"]
    assert joined(events)[-4:] == called("Write", file_path="a", content="b") + USE
    assert turn.calls == [("Write", "intent:create")]
    run(GenerateDecoder("m"), [lines_of(["", OPEN_WRITE + '"}}\n</tool_call>'])], rescue=rescue)
    run(GenerateDecoder("m"), [lines_of(["Half of it"], "length")], rescue=rescue)
    assert len(asked) == 1


# ---- one answer, two forms

@pytest.mark.parametrize(("version", "case"), [
    row for row, rows in RECORDED.items() if rows[-1:] != BROKEN])
def test_the_fold_is_the_stream(version, case):
    known = recording(case, version)
    data = "".join(line for _, line in known["lines_at_ms"]).encode()
    kind = ChatDecoder if known["request"]["path"] == "/api/chat" else GenerateDecoder
    _, events = run(kind("m"), [data])
    rows, message = joined(events), fold(events)
    streamed = []
    for row in rows:
        if row[0] == "start":
            streamed.append([*row[1:], ""])
        elif row[0].endswith("_delta") and row[0] != "signature_delta":
            streamed[-1][-1] += row[1]
    folded = [[block["type"], *([block["name"]] if "name" in block else []),
               json.dumps(block["input"]) if "input" in block else block[block["type"]]]
              for block in message["content"]]
    for one, other in zip(streamed, folded):
        if one[0] == "tool_use":
            one[-1], other[-1] = json.loads(one[-1] or "{}"), json.loads(other[-1])
    assert streamed == folded
    assert message["stop_reason"] == rows[-1][1]
    assert message["usage"]["output_tokens"] >= 1
