"""Section 8: Ollama's lines to deltas, think blocks, refusals to errors."""
import json

import pytest
from qwencode import (
    ChatDecoder,
    Failure,
    Finish,
    GenerateDecoder,
    NativeCall,
    PromptTooLongError,
    TextDelta,
    ThinkingDelta,
    ThinkSplitter,
    closed_thought,
    held_prefix,
    opening_of,
    restored,
    upstream_error,
)

NEW, OLD = "0.33.0-rc2", "0.24.0"


def joined(parts):
    """Parts as short rows, neighbouring text and thinking joined."""
    rows = []
    for part in parts:
        kind = type(part).__name__
        if isinstance(part, (TextDelta, ThinkingDelta)):
            assert part.text
            kind = "text" if isinstance(part, TextDelta) else "thinking"
            if rows and rows[-1][0] == kind:
                rows[-1] = (kind, rows[-1][1] + part.text)
            else:
                rows.append((kind, part.text))
        elif isinstance(part, NativeCall):
            rows.append(("call", part.name, part.arguments))
        elif isinstance(part, Finish):
            rows.append(("finish", part.reason))
        else:
            rows.append((kind, type(part.error).__name__))
    return rows


def cut(text, size):
    size = size or len(text) or 1
    return [text[at:at + size] for at in range(0, len(text), size)]


# ---- think blocks

SPLITS = {
    # name: opened by the prompt, model text, rows
    "no block": (False, "Hello there", [("text", "Hello there")]),
    "a block": (False, "<think>\nhm\n</think>\n\nHi", [("thinking", "hm"), ("text", "Hi")]),
    "space before": (False, "\n <think>hm</think>Hi", [("thinking", "hm"), ("text", "Hi")]),
    "opened by the prompt": (True, "hm\n</think>\n\nHi", [("thinking", "hm"), ("text", "Hi")]),
    "opened twice": (True, "\n\nhm</think>Hi", [("thinking", "hm"), ("text", "Hi")]),
    "empty": (False, "<think>\n\n</think>\n\nHi", [("text", "Hi")]),
    "empty, opened": (True, "\n</think>\nHi", [("text", "Hi")]),
    "never closed": (False, "<think>\nhm hm", [("thinking", "hm hm")]),
    "never closed, opened": (True, "hm hm\n", [("thinking", "hm hm")]),
    "nothing but the tag": (False, "<think>\n", []),
    "only a block": (False, "<think>hm</think>", [("thinking", "hm")]),
    "stray end at the start": (False, "</think>\n\nHi", [("text", "Hi")]),
    "stray end on its line": (False, "hm\n</think>\n\nHi", [("text", "hm\n\n\nHi")]),
    "a second stray end stays": (False, "a\n</think>\nb\n</think>\nc",
                                 [("text", "a\n\nb\n</think>\nc")]),
    "the tag within a line": (False, "Say <think> and </think> aloud",
                              [("text", "Say <think> and </think> aloud")]),
    "the tag within a thought": (False, "<think>a <think> b</think>c",
                                 [("thinking", "a <think> b"), ("text", "c")]),
    "a second block": (False, "<think>a</think>b <think>c</think> d",
                       [("thinking", "a"), ("text", "b <think>c</think> d")]),
    "like a tag": (False, "<thin line", [("text", "<thin line")]),
    "like an end": (True, "a < b </thin>c", [("thinking", "a < b </thin>c")]),
    "ends in half a tag": (False, "Hi <", [("text", "Hi <")]),
    "thought ends in half a tag": (True, "hm </thi", [("thinking", "hm </thi")]),
    "white space only": (False, " \n ", [("text", " \n ")]),
    "space in the thought is kept": (True, "a\n\n  b\n</think>\nc",
                                     [("thinking", "a\n\n  b"), ("text", "c")]),
    "indented answer": (True, "a</think>\n\n  b", [("thinking", "a"), ("text", "  b")]),
    "a call in an open thought": (
        True, "hm <tool_call>\n{}\n</tool_call>",
        [("thinking", "hm <tool_call>\n{}\n</tool_call>")]),
}


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("size", [0, 1, 2, 3, 7])
def test_think_blocks(name, size):
    opened, text, rows = SPLITS[name]
    splitter = ThinkSplitter(opened)
    parts = [part for piece in cut(text, size) for part in splitter.feed(piece)]
    assert joined(parts + splitter.close()) == rows


@pytest.mark.parametrize(("prompt", "opening"), [
    ("x<|im_start|>assistant\n", ""), ("assistant\n<think>\n", "<think>\n"),
    ("assistant\n<think>", "<think>"), ("assistant\n<think>\n\n</think>\n\n",
                                        "<think>\n\n</think>\n\n"),
    ("assistant\n<think>\nI", ""), ("<think>\nlong thought\n</think>\n\n", ""),
])
def test_what_the_prompt_opens(prompt, opening):
    assert opening_of(prompt) == opening


START, NONE, END_TURN = "<|im_start|>assistant\n", "<think>\n\n</think>\n\n", "<|im_end|>\n"


def prompt_of(*answers, opening):
    return "sys" + "".join(f"{START}{one}{END_TURN}user" for one in answers) + START + opening


RESTORED = {
    # name: rendered answers, what the model wrote, how the prompt ends, restored answers
    "no thought, remembered": (["Hi"], [NONE + "Hi \n"], NONE, [NONE + "Hi \n"]),
    "no thought, not remembered": (["Hi"], [""], NONE, [NONE + "Hi"]),
    "thought": (["<think>\nh\n</think>\n\nHi"], ["<think>\n\nh</think>\nHi"], "<think>\n",
                ["<think>\n\nh</think>\nHi"]),
    "thought that the template dropped": (["Hi"], ["<think>\nh</think>Hi"], "<think>\n", ["Hi"]),
    "not remembered": (["<think>\n\n</think>\n\nHi"], ["Hi "], "<think>\n",
                       ["<think>\n\n</think>\n\nHi"]),
    "no thinking model": (["Hi"], ["Hi"], "", ["Hi"]),
    "thought before it was switched off": (["Hi"], ["<think>\nh\n</think>\nHi"], NONE,
                                           [NONE + "Hi"]),
    "two": (["a", "b"], [NONE + "a\n", ""], NONE, [NONE + "a\n", NONE + "b"]),
    "a text that speaks ChatML": (["a", "b"], [NONE + "a"], NONE, ["a", "b"]),
    "none": ([], [], NONE, []),
}


@pytest.mark.parametrize("name", RESTORED)
def test_past_answers_are_put_in_as_they_were_written(name):
    rendered, written, opening, wanted = RESTORED[name]
    prompt = restored(prompt_of(*rendered, opening=opening), written)
    assert prompt == prompt_of(*wanted, opening=opening)


@pytest.mark.parametrize(("text", "kept"), [
    ("Hi", "Hi"), ("<think>a</think>b", "<think>a</think>b"), ("<think>\na", ""), ("", ""),
    ("<think>\na \n<tool_call>\n{}", "<think>\na\n</think>\n\n<tool_call>\n{}"),
    ("<think>use <tool_call> now: <tool_call><function=x>",
     "<think>use <tool_call> now:\n</think>\n\n<tool_call><function=x>"),
])
def test_a_thought_is_closed_before_the_call_in_it(text, kept):
    assert closed_thought(text) == kept


@pytest.mark.parametrize(("text", "size"), [
    ("abc", 0), ("abc<", 1), ("abc</th", 4), ("</think", 7), ("</think>", 0), ("<<", 1), ("", 0)])
def test_the_held_end_of_a_text(text, size):
    assert held_prefix(text, "</think>") == size


# ---- lines

def line(content="", *, done=False, **fields):
    message = {k: fields.pop(k) for k in ("thinking", "tool_calls") if k in fields}
    return json.dumps({"model": "m", "message": {"role": "assistant", "content": content,
                                                 **message}, "done": done, **fields}) + "\n"


def piece(text, **fields):
    return json.dumps({"model": "m", "response": text, "done": False, **fields}) + "\n"


END = line(done=True, done_reason="stop")
READ = {"function": {"name": "Read", "arguments": {"file_path": "a"}}}
LINES = {
    "text": (line("a") + line("b") + END, [("text", "ab"), ("finish", "stop")]),
    "all in one line": (
        line("t", thinking="h", tool_calls=[READ]) + END,
        [("thinking", "h"), ("text", "t"), ("call", "Read", {"file_path": "a"}),
         ("finish", "stop")]),
    "all in the done line": (
        line("t", thinking="h", tool_calls=[READ], done=True, done_reason="length"),
        [("thinking", "h"), ("text", "t"), ("call", "Read", {"file_path": "a"}),
         ("finish", "length")]),
    "thought in the text": (line("<think>h</") + line("think>t") + END,
                            [("thinking", "h"), ("text", "t"), ("finish", "stop")]),
    "empty lines": ("\n\r\n" + line("a") + "\n" + END, [("text", "a"), ("finish", "stop")]),
    "CR LF": (line("a").replace("\n", "\r\n") + END, [("text", "a"), ("finish", "stop")]),
    "no end of line at the end": (line("a") + END[:-1], [("text", "a"), ("finish", "stop")]),
    "after the end": (END + line("b"), [("finish", "stop")]),
    "unknown fields": (line("a", logprobs=[1]) + '{"new":1}\n' + END,
                       [("text", "a"), ("finish", "stop")]),
    "arguments as text": (
        line(tool_calls=[{"function": {"name": "Read", "arguments": "{}"}}]) + END,
        [("call", "Read", "{}"), ("finish", "stop")]),
    "odd calls": (line("a", tool_calls=[1, {}, {"function": {"name": 5}}, {"function": 1}]) + END,
                  [("text", "a"), ("finish", "stop")]),
    "calls that are no list": (line("a", tool_calls={"x": 1}) + END,
                               [("text", "a"), ("finish", "stop")]),
    "no reason": (line("a") + line(done=True), [("text", "a"), ("finish", "")]),
    "no done line": (line("a"), [("text", "a"), ("Failure", "UpstreamBrokenError")]),
    "cut in a line": (line("a") + END[:9], [("text", "a"), ("Failure", "UpstreamBrokenError")]),
    "an error without an end of line": (
        line("a") + '{"error":"boom"}', [("text", "a"), ("Failure", "UpstreamFailedError")]),
    "nothing but an error without an end of line": (
        '{"error":"boom"}', [("Failure", "UpstreamFailedError")]),
    "nothing but half a line": ('{"mess', [("Failure", "UpstreamGarbageError")]),
    "white space behind the last line": (
        line("a") + "\r", [("text", "a"), ("Failure", "UpstreamBrokenError")]),
    "nothing": ("", [("Failure", "UpstreamLostError")]),
    "an error line": (line("a") + '{"error":"boom"}\n',
                      [("text", "a"), ("Failure", "UpstreamFailedError")]),
    "an error in a done line": (line("a") + '{"error":"boom","done":true}\n',
                                [("text", "a"), ("Failure", "UpstreamFailedError")]),
    "an error object": ('{"error":{"message":"boom"}}\n', [("Failure", "UpstreamFailedError")]),
    "held text before an error": (line("a\n</th") + '{"error":"boom"}\n',
                                  [("text", "a\n</th"), ("Failure", "UpstreamFailedError")]),
    "not JSON": (line("a") + "<html>\n", [("text", "a"), ("Failure", "UpstreamGarbageError")]),
    "a list": ("[]\n", [("Failure", "UpstreamGarbageError")]),
    "a number": ("1\n", [("Failure", "UpstreamGarbageError")]),
    "surrogates": ('{"message":{"content":"\\ud83d\\ude00"},"done":false}\n' + END,
                   [("text", "😀"), ("finish", "stop")]),
    "letters of many bytes": (
        json.dumps({"message": {"content": "über 中文 😀"}, "done": False},
                   ensure_ascii=False) + "\n" + END,
        [("text", "über 中文 😀"), ("finish", "stop")]),
    "message of another type": ('{"message":"hi","done":false}\n' + END, [("finish", "stop")]),
}


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("size", [0, 1, 17])
def test_lines_of_chat(name, size):
    text, rows = LINES[name]
    decoder = ChatDecoder("m")
    parts = [part for some in cut(text.encode(), size) for part in decoder.feed(some)]
    assert joined(parts + decoder.close()) == rows
    assert decoder.finished == (rows[-1][0] == "finish")


@pytest.mark.parametrize("size", [0, 1, 17])
def test_bytes_that_are_not_utf8_are_told(size):
    bad, decoder = b'{"message":{"content":"\xff"},"done":false}\n', ChatDecoder("m")
    parts = [part for some in cut(line("a").encode() + bad, size) for part in decoder.feed(some)]
    assert joined(parts) == [("text", "a"), ("Failure", "UpstreamBrokenError")]
    decoder = ChatDecoder("m")
    assert joined(decoder.feed(END.encode() + bad)) == [("finish", "stop")]


@pytest.mark.parametrize("size", [0, 1, 17])
def test_a_line_cut_within_a_letter_is_an_answer_broken_off(size):
    half, decoder = '{"message":{"content":"é'.encode()[:-1], ChatDecoder("m")
    parts = [part for some in cut(line("a").encode() + half, size) for part in decoder.feed(some)]
    parts += decoder.close()
    assert joined(parts) == [("text", "a"), ("Failure", "UpstreamBrokenError")]
    assert "broke off" in parts[-1].error.message
    assert decoder.close() == []


RAW = {
    "text": ([piece("a"), piece("b"), piece("", done=True)], "ab", [("text", "ab")]),
    "thought": ([piece("<think>"), piece("\nh\n</think>"), piece("\n\nt"), piece("", done=True)],
                "<think>\nh\n</think>\n\nt", [("thinking", "h"), ("text", "t")]),
    "text in the done line": ([piece("a"), piece("b", done=True)], "ab", [("text", "ab")]),
    "thinking split off all the same": (
        [piece("", thinking="h"), piece("t"), piece("", done=True)], "t",
        [("thinking", "h"), ("text", "t")]),
}


@pytest.mark.parametrize("name", RAW)
@pytest.mark.parametrize("size", [0, 1, 17])
def test_lines_of_raw_generation(name, size):
    lines, raw, rows = RAW[name]
    decoder = GenerateDecoder("m")
    parts = [part for some in cut("".join(lines).encode(), size) for part in decoder.feed(some)]
    assert joined(parts + decoder.close()) == [*rows, ("finish", "")]
    assert decoder.raw == raw


def test_counts_and_times_of_the_end():
    decoder = ChatDecoder("m")
    finish = decoder.feed(line(
        done=True, done_reason="stop", prompt_eval_count=7, eval_count=3,
        prompt_eval_duration=1_500_000_000, eval_duration=250_000_000, load_duration=10**9,
    ).encode())[-1]
    assert finish == Finish("stop", 7, 3, 1.5, 0.25, 1.0)
    odd = ChatDecoder("m").feed(line(
        done=True, done_reason=5, prompt_eval_count=-1, eval_count="3", eval_duration=True,
    ).encode())[-1]
    assert odd == Finish("", None, None)


# ---- refusals

REFUSED = {
    # recording: status, type, retry, sentence
    (OLD, "c-tooljson"): (400, "invalid_request_error", False, "Ollama refused the request (400): "
                          "registry.ollama.ai/library/c-tooljson:latest does not support tools"),
    (OLD, "overflow"): (400, "invalid_request_error", False,
                        "prompt is too long: 4097 tokens > 4096 maximum"),
    (NEW, "overflow"): (400, "invalid_request_error", False,
                        "prompt is too long: 6009 tokens > 4096 maximum"),
    (NEW, "overflow-shift-false"): (400, "invalid_request_error", False,
                                    "prompt is too long: 4097 tokens > 4096 maximum"),
    (NEW, "a-badxml-whole"): (500, "api_error", False, "Ollama failed (500): XML syntax error on "
                              "line 5: element <parameter> closed by </function>"),
    (NEW, "arguments-string"): (400, "invalid_request_error", False, "Ollama refused the request "
                                "(400): Value looks like object, but can't find closing '}' "
                                "symbol"),
    (NEW, "image-to-text-model"): (400, "invalid_request_error", False, "Ollama refused the request"
                                   " (400): Multimodal data provided, but model does not support "
                                   "multimodal requests."),
    (NEW, "missing-model"): (400, "invalid_request_error", False, "Ollama has no model 'm'. Get it "
                             "with: ollama pull m  (Ollama said: model 'nope:7b' not found)"),
    (NEW, "no-thinking"): (400, "invalid_request_error", False, "Ollama refused the request (400): "
                           "\"b-hello\" does not support thinking"),
    (NEW, "no-tools"): (400, "invalid_request_error", False, "Ollama refused the request (400): "
                        "registry.ollama.ai/library/plain:latest does not support tools"),
    (NEW, "option-type"): (500, "api_error", False, "Ollama failed (500): option \"num_ctx\" must "
                           "be of type integer"),
    (NEW, "foreign-host"): (502, "api_error", False, "Ollama denied the request (403). Check "
                            "OLLAMA_AUTH_TOKEN and OLLAMA_BASE_URL."),
    (NEW, "boolean-schema"): (
        400, "invalid_request_error", False, "Ollama refused the request (400): json: cannot "
        "unmarshal bool into Go struct field ToolFunctionParameters.tools.function.parameters"
        ".properties of type api.ToolProperty"),
    (NEW, "content-array"): (
        400, "invalid_request_error", False, "Ollama refused the request (400): json: cannot "
        "unmarshal array into Go struct field ChatRequest.messages.content of type string"),
}


@pytest.mark.parametrize(("version", "case"), REFUSED)
def test_a_recorded_refusal(recording, version, case):
    known = recording(version, case)
    body = "".join(text for _, text in known["lines_at_ms"])
    error = upstream_error(known["status"], body, "m", window=4096)
    assert (error.status, error.kind, error.retry, error.message) == REFUSED[version, case]
    assert isinstance(error, PromptTooLongError) == case.startswith("overflow")


OTHER_REFUSALS = [
    (503, '{"error":"server busy, please try again.  maximum pending requests exceeded"}',
     529, "overloaded_error", True),
    (429, '{"error":"rate limited"}', 429, "rate_limit_error", True),
    (401, '{"error":"unauthorized","signin_url":"https://x"}', 502, "api_error", False),
    (404, "404 page not found", 502, "api_error", False),
    (405, "405 method not allowed", 502, "api_error", False),
    (502, "<html><body><h1>502 Bad Gateway</h1></body></html>", 502, "api_error", True),
    (500, '{"error":"llama-server process has terminated: signal: killed"}',
     500, "api_error", False),
    (500, '{"error":"model runner has unexpectedly stopped"}', 500, "api_error", True),
    (500, "", 500, "api_error", True),
    (499, '{"error":"request canceled"}', 400, "invalid_request_error", False),
    (504, "", 504, "timeout_error", False),
    (418, "\x00\x1b[31m", 400, "invalid_request_error", False),
]


@pytest.mark.parametrize("row", OTHER_REFUSALS, ids=lambda row: f"{row[0]} {row[1][:20]!r}")
def test_other_refusals(row):
    status, body, *wanted = row
    error = upstream_error(status, body, "m")
    assert [error.status, error.kind, error.retry] == wanted
    assert "\x1b" not in error.message
    assert "<h1>" not in error.message


def test_an_error_is_the_last_part():
    decoder = ChatDecoder("m")
    assert isinstance(decoder.feed(b"}\n")[-1], Failure)
    assert decoder.feed(END.encode()) == decoder.close() == []
