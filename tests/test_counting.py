"""Counting: estimates, learning, windows, overflow errors, the CLI's variables."""
import json
import time
from types import SimpleNamespace

import pytest
import counted_texts
import qwen_vocabulary

import qwencode
from qwencode import (
    Image,
    Message,
    PromptTooLongError,
    Text,
    ToolResult,
    ToolUse,
    cache_usage,
    choose_window,
    compact_env,
    estimate_tokens,
    fit,
    headroom_tokens,
    judge_explicit,
    judge_window,
    kv_bytes_per_token,
    parse_overflow,
    shorten_results,
    unwrap_error,
)


class TokenCounter(qwencode.TokenCounter):
    """One that is given a prompt's texts."""

    def count(self, model, parts, images=0):
        return super().count(model, [self.sizes_of(part) for part in parts], images)


# ---------------------------------------------------------------- estimates


@pytest.mark.parametrize(
    ("name", "text", "tokens"), counted_texts.COUNTED, ids=[row[0] for row in counted_texts.COUNTED]
)
def test_the_estimate_is_near_what_the_vocabulary_counts(name, text, tokens):
    low, high = counted_texts.BOUNDS.get(name, (0.92, 1.15))
    assert low * tokens <= estimate_tokens(text) <= high * tokens


@qwen_vocabulary.needed
class TestAgainstTheRealVocabulary:
    def test_the_frozen_counts_are_those_of_the_vocabulary(self):
        count = qwen_vocabulary.load()
        assert [(name, count(text)) for name, text, _ in counted_texts.COUNTED] == [
            (name, tokens) for name, _, tokens in counted_texts.COUNTED
        ]

    def test_errors_over_many_bodies(self):
        count = qwen_vocabulary.load()
        bodies = counted_texts.bodies()
        errors = {}
        for kind, text in bodies:
            errors.setdefault(kind, []).append(estimate_tokens(text) / count(text) - 1)
        every = sorted(error for row in errors.values() for error in row)
        assert len(every) >= 200
        print()
        for kind, row in sorted(errors.items()):
            print(f"{kind:12} {len(row):3}", *("%+6.1f%%" % (100 * at(row, p)) for p in (10, 50, 90)))
        assert at(every, 10) > -0.10
        assert -0.02 < at(every, 50) < 0.06
        assert at(every, 90) < 0.15

    def test_errors_after_three_turns(self):
        """Sessions of mixed content: each turn adds an answer and a tool result."""
        count = qwen_vocabulary.load()
        before, after = [], []
        texts = [text[:6000] for _, text in counted_texts.bodies()]
        for start in range(0, len(texts) - 10, 4):
            counter, parts = TokenCounter(), texts[start:start + 3]
            for turn in range(7):
                guess = counter.count("m", parts)
                actual = sum(map(count, parts)) + 5 * len(parts)
                (after if turn >= 3 else before).append(guess.tokens / actual - 1)
                counter.observe("m", guess, actual)
                parts = [*parts, texts[start + 3 + turn]]
        assert max(map(abs, after)) < 0.05
        assert at(sorted(map(abs, after)), 90) < at(sorted(map(abs, before)), 90)


def at(values, percent):
    return sorted(values)[(len(values) - 1) * percent // 100]


@pytest.mark.parametrize(
    ("name", "text", "low", "high"),
    [
        ("nothing", "", 0, 0),
        ("a word", "hello", 1, 2),
        ("a lone surrogate", "\ud800 x", 1, 4),
        ("blanks alone", " " * 5000, 1, 100),
        ("line ends alone", "\n" * 5000, 1, 600),
        ("a rule", "-" * 5000, 20, 500),
        ("one endless word", "x" * 5000, 500, 5000),
        ("a null character", "\0" * 100, 1, 200),
    ],
)
def test_odd_texts_get_a_sane_estimate(name, text, low, high):
    assert low <= estimate_tokens(text) <= high


def test_a_long_text_is_judged_by_slices_to_within_five_percent():
    piece = "".join(text for _, text, _ in counted_texts.COUNTED[:6])
    whole = sum(estimate_tokens(piece) for _ in range(200))
    assert estimate_tokens(piece * 200) == pytest.approx(whole, rel=0.05)


def test_many_long_texts_are_judged_together_to_within_five_percent():
    """Each from fewer slices than it would be alone; chance errors cancel."""
    texts = [(text * (40_000 // len(text)))[:number * 1000 + 3000]
             for number, (_, text, _) in enumerate(counted_texts.COUNTED) if len(text) > 100]
    chars = sum(map(len, texts))
    whole = sum(estimate_tokens(text[at:at + 5000]) for text in texts
                for at in range(0, len(text), 5000))
    together = sum(sum(qwencode.text_sizes(text, len(text) / chars)) for text in texts)
    assert len(texts) > 10
    assert together == pytest.approx(whole, rel=0.05)


def test_ten_megabytes_cost_milliseconds():
    text = "the quick brown fox = jumps(over, 13);\n" * 270_000
    started = time.process_time()
    estimate_tokens(text)
    assert time.process_time() - started < 0.2


def test_a_known_text_is_not_read_again(monkeypatch):
    counter, parts = TokenCounter(), ["system " * 500, "hello " * 300]
    first = counter.count("m", parts)
    monkeypatch.setattr(qwencode, "text_sizes", lambda text: pytest.fail("read again"))
    assert counter.count("m", [part[:1] + part[1:] for part in parts]) == first


# ---------------------------------------------------------------- learning


def session(counter, model, factor, turns, grow="print(x)  # and so on\n" * 40):
    """Run turns of a growing prompt whose truth is factor times the estimate."""
    errors, parts = [], ["tools " * 2000, "system text " * 500, "do it"]
    for _ in range(turns):
        count = counter.count(model, parts)
        actual = int(factor * sum(count.sizes)) + count.fixed
        errors.append(count.tokens / actual - 1)
        counter.observe(model, count, actual)
        parts = [*parts, "an answer", grow]
    return errors


@pytest.mark.parametrize("factor", [0.6, 0.85, 1.0, 1.2, 1.9])
def test_three_turns_bring_the_estimate_within_five_percent(factor):
    errors = session(TokenCounter(), "m", factor, 8)
    assert max(map(abs, errors[3:])) < 0.02


def test_what_one_session_taught_serves_the_next_and_no_other_model():
    counter = TokenCounter()
    session(counter, "m", 1.5, 5)
    new = ["other tools " * 900, "other system " * 300, "hi there"]
    raw = TokenCounter().count("m", new).tokens
    assert counter.count("m", new).tokens == pytest.approx(raw * 1.5, rel=0.03)
    assert counter.count("n", new).tokens == raw


def test_a_new_session_with_known_tools_is_counted_from_the_shortest_one():
    """Also the prompt after a compaction: same tools and system, another first message."""
    counter, tools, system = TokenCounter(), "tools " * 2000, "system text " * 500
    truth = {}
    for first in ("do this", "do that", "summary " * 60):
        parts = [tools, system, first]
        for turn in range(6):
            count = counter.count("m", parts)
            actual = 7000 + int(sum(sum(qwencode.text_sizes(part)) for part in parts[2:]) * 1.3)
            truth.setdefault(turn, []).append(count.tokens / actual - 1)
            counter.observe("m", count, actual)
            parts = [*parts, "an answer", "print(x)  # and so on\n" * 60]
    assert max(map(abs, truth[0][1:])) < 0.01


def test_classes_are_learned_apart():
    """A vocabulary that joins three digits: numbers shrink, words stay."""
    counter = TokenCounter()
    words, numbers = "some words of prose " * 400, "3141592653 " * 400
    for turn in range(12):
        parts = [f"{turn} {words}", words] if turn % 2 else [f"{turn} {numbers}", numbers]
        count = counter.count("m", parts)
        actual = count.sizes.text + count.sizes.digits / 2 + count.fixed
        counter.observe("m", count, int(actual))
    text, digits, _ = counter.models["m"].factors
    assert text == pytest.approx(1.0, abs=0.08)
    assert digits == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize("actual", [None, 0, 3, 60, 10**7])
def test_a_count_that_no_vocabulary_explains_teaches_nothing(actual):
    counter, parts = TokenCounter(), ["tools " * 900, "system", "hello"]
    before = counter.count("m", parts)
    counter.observe("m", before, actual)
    assert counter.count("m", parts) == before


def test_one_strange_count_is_doubted_two_are_believed():
    counter = TokenCounter()
    session(counter, "m", 1.0, 4)
    new = ["other tools " * 900, "other system " * 300, "hi there"]
    count = counter.count("m", new)
    counter.observe("m", count, int(count.tokens * 1.8))
    assert counter.count("m", new) == count
    counter.observe("m", count, int(count.tokens * 1.8))
    assert counter.count("m", new).tokens == int(count.tokens * 1.8)


def test_pictures_and_messages_have_a_price():
    counter = TokenCounter()
    plain = counter.count("m", ["a b c", "d e f"])
    assert counter.count("m", ["a b c", "d e f"], images=2).tokens == plain.tokens + 2 * 1760
    assert plain.fixed == 10


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(qwencode, "MAX_KNOWN_TEXTS", 50)
    monkeypatch.setattr(qwencode, "MAX_ANCHORS", 20)
    counter = TokenCounter()
    for number in range(300):
        count = counter.count("m", [f"session {number} " * 30, "s", "u"])
        counter.observe("m", count, count.tokens)
    assert len(counter.known) <= 50
    assert len(counter.models["m"].anchors) <= 20


def test_what_was_learned_survives_a_restart():
    counter = TokenCounter()
    session(counter, "m", 1.4, 5)
    kept = json.loads(json.dumps(counter.to_json()))
    parts = ["fresh tools " * 900, "fresh system", "go"]
    again = TokenCounter.from_json(kept).count("m", parts)
    assert again.tokens == pytest.approx(counter.count("m", parts).tokens, rel=0.01)


@pytest.mark.parametrize(
    "kept",
    [None, [], "x", {"m": None}, {"m": {}}, {"m": [1, 2]}, {"m": [1, 1, "x"]},
     {"m": [1, 1, 99]}, {"m": [1, 1, float("nan")]}, {"m": [True, 1, 1]}],
    ids=repr,
)
def test_a_counts_file_that_cannot_be_read_is_left_out(kept):
    assert TokenCounter.from_json(kept).models == {}


@pytest.mark.parametrize("text", ["MIT License", '{"name": "x"}', "[1]", '{"m": [1', "[" * 100_000],
                         ids=lambda text: text[:9])
def test_a_file_that_holds_no_counts_is_never_overwritten(tmp_path, text):
    """A name mistaken for the counts file must not cost that file."""
    path, said = tmp_path / "counts", []
    path.write_text(text)
    log = SimpleNamespace(write=lambda level, line: said.append(level))
    config = qwencode.load_config({"counts_file": str(path)}, {})
    qwencode.write_counts(str(path), qwencode.read_counts(config, log), log)
    assert (path.read_text(), said) == (text, ["warn", "warn"])


def test_an_empty_counts_file_is_used(tmp_path):
    path = tmp_path / "counts"
    path.write_text("")
    qwencode.write_counts(str(path), TokenCounter(), qwencode.Log(qwencode.load_config({}, {})))
    assert path.read_text() == "{}"


# ---------------------------------------------------------------- the window


@pytest.mark.parametrize(
    ("name", "tokens", "most", "window", "headroom", "margin", "wanted"),
    [
        ("all fits", 10_000, 8_000, 32_768, 4_096, 0, 8_000),
        ("the answer is clamped", 28_000, 32_000, 32_768, 4_096, 0, 4_768),
        ("the last turn that leaves room", 28_671, 32_000, 32_768, 4_096, 0, 4_097),
        ("one more is refused", 28_672, 100, 32_768, 4_096, 0, (28_672, 28_671)),
        ("compaction uses the headroom", 31_000, 8_000, 32_768, 0, 0, 1_768),
        ("the edge: window - 2 leaves two", 32_766, 8_000, 32_768, 0, 0, 2),
        ("the edge: window - 1 leaves one", 32_767, 8_000, 32_768, 0, 0, 1),
        ("the window itself does not fit", 32_768, 8_000, 32_768, 0, 0, (32_768, 32_767)),
        ("nothing to compact yet", 30_000, 8_000, 32_768, 0, 0, 2_768),
        ("an uncertain count is sent", 29_500, 8_000, 32_768, 4_096, 1_000, 2_268),
        ("an uncertain count beyond doubt", 30_500, 8_000, 32_768, 4_096, 1_000,
         (30_500, 28_671)),
        ("doubt eats no answer whole", 32_700, 8_000, 32_768, 0, 900, 968),
        ("nor all of a longer one", 30_000, 8_000, 32_768, 0, 2_500, 1_024),
        ("a tiny window", 4_000, 8_000, 4_096, 0, 0, 96),
    ],
)
def test_fit(name, tokens, most, window, headroom, margin, wanted):
    if isinstance(wanted, tuple):
        with pytest.raises(PromptTooLongError) as caught:
            fit(tokens, most, window, headroom, margin)
        assert (caught.value.tokens, caught.value.maximum) == wanted
        assert str(caught.value) == "prompt is too long: %d tokens > %d maximum" % wanted
    else:
        assert fit(tokens, most, window, headroom, margin) == wanted


def test_a_prompt_that_cannot_be_compacted_may_use_the_window_whole():
    assert [headroom_tokens(32_768, answers) for answers in (0, 1, 2, 9)] == [0, 0, 4096, 4096]


@pytest.mark.parametrize("window", [16_384, 32_768, 65_536, 131_072])
def test_after_a_turn_that_fit_the_compaction_request_fits(window):
    """It holds that turn's messages and 6 KB of instruction, and leaves a summary."""
    last = window - 1 - headroom_tokens(window)
    instruction = estimate_tokens("Write a detailed summary of the work so far. " * 136)
    assert fit(last + instruction, 32_000, window) >= 1_500


LONG = "".join(f"line {number} of a long tool result\n" for number in range(1000))


def conversation():
    return [
        Message("user", (Image("AAAA"), Text("please look at all of it"))),
        Message("assistant", (Text("Reading."), ToolUse("t1", "Read", {"file_path": "a.py"}))),
        Message("user", (ToolResult("t1", LONG),)),
        Message("assistant", (ToolUse("t2", "Write", {"file_path": "b", "content": LONG}),)),
        Message("user", (ToolResult("t2", "ok"), ToolResult("t3", LONG, (Image("AAAA"),)))),
        Message("user", (ToolResult("t4", LONG),
                         Text("CRITICAL: Respond with TEXT ONLY." + "x " * 1500))),
    ]


def size(messages):
    return sum(qwencode.block_tokens(block) for message in messages for block in message.blocks)


@pytest.mark.parametrize("over", [1, 3_000, 15_000, 25_000, 33_000, 45_000, 51_000])
def test_shortening_saves_what_is_asked_and_says_so(over):
    before = conversation()
    after = shorten_results(before, over)
    assert size(before) - size(after) >= over
    assert [message.role for message in after] == [message.role for message in before]
    assert after[-1].blocks[1] == before[-1].blocks[1]
    assert "characters left out to fit the model's window" in after[2].blocks[0].text
    assert after[4].blocks[0] == before[4].blocks[0]
    assert [block.id for block in after[4].blocks] == ["t2", "t3"]
    assert before == conversation()


def test_shortening_touches_results_before_anything_else():
    after = shorten_results(conversation(), 10_000)
    assert after[3] == conversation()[3]
    assert after[1] == conversation()[1]


def test_a_small_difference_does_not_move_the_shortened_prefix():
    assert shorten_results(conversation(), 5_000) == shorten_results(conversation(), 5_100)


def test_shortening_ends_even_when_nothing_helps():
    assert shorten_results([Message("user", (Text("hi"),))], 10**9) == (
        Message("user", (Text("hi"),)),
    )


# ---------------------------------------------------------------- errors

NESTED = json.dumps({"error": json.dumps({"error": {
    "code": 400,
    "message": "request (6009 tokens) exceeds the available context size (4096 tokens), try"
               " increasing it",
    "type": "exceed_context_size_error", "n_prompt_tokens": 6009, "n_ctx": 4096}})})
GO_MAP = (
    "llama-server chat error: map[code:400 message:request (6009 tokens) exceeds the available"
    " context size (4096 tokens), try increasing it n_ctx:4096 n_prompt_tokens:6009"
    " type:exceed_context_size_error]"
)
TOO_LONG = (
    "the prompt is longer than the context length currently available to the model; shorten the"
    " prompt, adjust the context length in settings, or use a model with a longer context length"
)


@pytest.mark.parametrize(
    ("name", "text", "status", "wanted"),
    [
        ("nested JSON with numbers", NESTED, 400, (6009, 4096)),
        ("the same inside a stream", NESTED, 200, (6009, 4096)),
        ("0.24, plain", '{"error":"the input length exceeds the context length"}', 400,
         (None, None)),
        ("shift:false", json.dumps({"error": TOO_LONG}), 400, (None, None)),
        ("native path, Go map", json.dumps({"error": GO_MAP}), 500, (6009, 4096)),
        ("MLX", json.dumps({"error": "input length (9000 tokens) exceeds the model's maximum"
                            " context length (8192 tokens)"}), 400, (9000, 8192)),
        ("only the numbers", '{"error":{"type":"exceed_context_size_error","n_prompt_tokens": 70,'
         '"n_ctx": 50}}', 400, (70, 50)),
        ("a relay before Ollama", "This model's maximum context length is 8192 tokens.", 400,
         (None, 8192)),
        ("another 400", '{"error":"\\"m\\" does not support thinking"}', 400, None),
        ("an unknown model", '{"error":"model \'prompt too long\' not found"}', 404, None),
        ("busy", '{"error":"server busy"}', 503, None),
        ("nothing", "", 400, None),
    ],
)
def test_overflow_errors_are_recognised(name, text, status, wanted):
    assert parse_overflow(text, status) == wanted


@pytest.mark.parametrize(
    ("name", "error", "wanted"),
    [
        ("plain words", "out of memory", "out of memory"),
        ("Ollama's object", '{"error":"out of memory"}', "out of memory"),
        ("nested JSON", NESTED, "request (6009 tokens) exceeds the available context size"
         " (4096 tokens), try increasing it"),
        ("a Go map", '{"error":"llama-server chat error: map[code:500 message:got exception:'
         ' Unexpected empty grammar stack type:server_error]"}',
         "llama-server chat error: got exception: Unexpected empty grammar stack"),
        ("a Go map with numbers", GO_MAP, "llama-server chat error: request (6009 tokens) exceeds"
         " the available context size (4096 tokens), try increasing it"),
        ("words before an object", 'runner said: {"error":{"message":"no memory"}}',
         "runner said: no memory"),
        ("a list of objects", '[{"message":"first"},{"message":"second"}]', "first"),
        ("line ends", "a\n\n  b", "a b"),
        ("braces in words", "cannot parse {x}", "cannot parse {x}"),
        ("broken JSON", '{"error": "x', '{"error": "x'),
        ("an object without words", '{"code": 7}', '{"code": 7}'),
        ("sign-in", '{"error":"unauthorized","signin_url":"https://x"}', "unauthorized"),
        ("an object already parsed", {"error": {"message": "m"}}, "m"),
        ("no map", "map[a:1]", "map[a:1]"),
        ("null", None, ""),
        ("empty", "", ""),
    ],
)
def test_errors_are_unwrapped_to_a_sentence(name, error, wanted):
    assert unwrap_error(error) == wanted


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"error":' * 50_000, "map[message:" * 50_000, "<title>" * 50_000,
             "request (" * 50_000, "input length (" + "9" * 500_000, '{"' * 100_000 + "}"],
    ids=lambda text: text[:9],
)
def test_hostile_errors_cost_little(text):
    started = time.process_time()
    assert len(unwrap_error(text)) <= 2100
    parse_overflow(text, 400)
    assert time.process_time() - started < 0.5


# ---------------------------------------------------------------- choosing a window

QWEN25_14B = {
    "general.architecture": "qwen2", "qwen2.block_count": 48, "qwen2.attention.head_count": 40,
    "qwen2.attention.head_count_kv": 8, "qwen2.embedding_length": 5120,
}


@pytest.mark.parametrize(
    ("name", "info", "wanted"),
    [
        ("qwen2.5 14B", QWEN25_14B, 48 * 8 * 128 * 4),
        ("with a key length", {**QWEN25_14B, "qwen2.attention.key_length": 64}, 48 * 8 * 64 * 4),
        ("hybrid layers", {**QWEN25_14B, "qwen2.full_attention_interval": 4}, 12 * 8 * 128 * 4),
        ("heads as a list, shown as null", {**QWEN25_14B, "qwen2.attention.head_count_kv": None},
         None),
        ("nothing known", {}, None),
        ("not an object", None, None),
    ],
)
def test_the_cache_of_a_token(name, info, wanted):
    assert kv_bytes_per_token(info) == wanted


@pytest.mark.parametrize(
    ("name", "facts", "window", "words"),
    [
        ("nothing known", {}, 32_768, "32768 tokens serve Claude Code"),
        ("Ollama's default is raised", dict(trained=131_072, loaded=4_096), 32_768, "serve"),
        ("a good load is kept", dict(trained=131_072, loaded=65_536), 65_536, "is loaded with"),
        ("a Modelfile that serves", dict(trained=131_072, modelfile=40_960), 40_960, "Modelfile"),
        ("a Modelfile beyond the training", dict(trained=32_768, modelfile=65_536), 32_768,
         "Modelfile"),
        ("a Modelfile that does not serve", dict(trained=131_072, modelfile=8_192), 32_768, "serve"),
        ("a small model", dict(trained=8_192), 8_192, "trained for 8192 tokens"),
        ("14B", dict(trained=131_072, kv_bytes=196_608), 32_768, "serve"),
        ("30B-A3B", dict(trained=262_144, kv_bytes=98_304), 65_536, "6.0 GiB"),
        ("a cheap cache", dict(trained=262_144, kv_bytes=32_768), 131_072, "4.0 GiB"),
        ("a cheap cache, trained for less", dict(trained=40_960, kv_bytes=32_768), 32_768, "serve"),
    ],
)
def test_the_window_asked_for(name, facts, window, words):
    choice = choose_window(**{"trained": None, **facts})
    assert choice.window == window
    assert words in choice.reason
    assert "\n" not in choice.reason


def ps(window, size, vram):
    return {"name": "m", "context_length": window, "size": size, "size_vram": vram}


@pytest.mark.parametrize(
    ("name", "asked", "row", "kv_bytes", "window", "step_down", "words"),
    [
        ("all on the GPU", 32_768, ps(32_768, 100, 100), None, 32_768, None, "100% on the GPU"),
        ("a little spill", 32_768, ps(32_768, 100, 90), None, 32_768, None, "90% on the GPU"),
        ("a bad spill", 32_768, ps(32_768, 100, 60), None, 32_768, 16_384, "60% on the GPU"),
        ("a bad spill that half the cache cures", 65_536, ps(65_536, 20 * 2**30, 15 * 2**30),
         196_608, 65_536, 32_768, "75% on the GPU"),
        ("the model itself is too large", 32_768, ps(32_768, 60 * 2**30, 20 * 2**30), 196_608,
         32_768, None, "fewer would not"),
        ("no GPU", 32_768, ps(32_768, 100, 0), None, 32_768, None, "in main memory"),
        ("no GPU, as 0.33 tells it", 32_768, ps(32_768, 168_097_216, 618_659), None, 32_768, None,
         "in main memory"),
        ("loading failed", 32_768, None, None, 32_768, 16_384, "failed"),
        ("loading failed at the least", 16_384, None, None, 16_384, None, "failed"),
        ("clamped to the training", 65_536, ps(32_768, 100, 100), None, 32_768, None,
         "of 65536 asked for"),
        ("an old Ollama without context_length", 32_768, {"size": 5, "size_vram": 5}, None, 32_768,
         None, "100%"),
    ],
)
def test_the_window_judged(name, asked, row, kv_bytes, window, step_down, words):
    choice = judge_window(asked, row, kv_bytes)
    assert (choice.window, choice.step_down) == (window, step_down)
    assert words in choice.reason


@pytest.mark.parametrize(
    ("window", "words"),
    [(4_096, "4096 tokens cannot hold the CLI's first prompt of about 9000 tokens"),
     (14_000, "leave only 5000 beside"), (16_384, None), (32_768, None)],
)
def test_an_explicit_window_is_judged(window, words):
    warning = judge_explicit(window)
    assert (warning is None) if words is None else (words in warning)


# ---------------------------------------------------------------- the CLI's variables


def thresholds(env):
    """Where 2.1.197 and 2.1.330 compact by contract D and F4; None is never."""
    told = env.get("CLAUDE_CODE_MAX_CONTEXT_TOKENS")
    if told is None:
        return None, None
    reserve = min(int(env["CLAUDE_CODE_MAX_OUTPUT_TOKENS"]), 20_000) + 13_000
    armed = min(max(int(env["CLAUDE_CODE_AUTO_COMPACT_WINDOW"]), 100_000), 1_000_000)
    return min(int(told), armed) - reserve, int(told) - reserve


@pytest.mark.parametrize(
    ("window", "threshold", "output"),
    [(4_096, None, 1_024), (8_192, None, 2_048), (16_384, 12_288, 4_096), (32_768, 24_576, 8_192),
     (65_536, 44_344, 8_192), (131_072, 101_688, 16_384), (262_144, 229_144, 32_000),
     (1_048_576, 1_015_576, 32_000)],
)
def test_the_cli_compacts_before_the_window_is_full(window, threshold, output):
    env = compact_env(window)
    assert thresholds(env)[1] == threshold
    assert env["CLAUDE_CODE_MAX_OUTPUT_TOKENS"] == str(output)
    if threshold:
        assert threshold >= qwencode.FIRST_PROMPT_TOKENS + 2_000
        assert threshold + 1_500 < window - 1
    if threshold and window <= 1_000_000:
        assert thresholds(env)[0] == threshold


@pytest.mark.parametrize(
    ("window", "read", "bash"),
    [(16_384, "2048", "6144"), (32_768, "4096", "12288"), (65_536, "8192", "24576"),
     (131_072, "16384", None), (262_144, None, None)],
)
def test_several_results_fit_between_two_compactions(window, read, bash):
    env = compact_env(window)
    assert env.get("CLAUDE_CODE_FILE_READ_MAX_OUTPUT_TOKENS") == read
    assert env.get("MAX_MCP_OUTPUT_TOKENS") == read
    assert env.get("BASH_MAX_OUTPUT_LENGTH") == bash


def test_no_compaction_in_every_turn_when_the_first_prompt_is_large(monkeypatch):
    monkeypatch.setattr(qwencode, "FIRST_PROMPT_TOKENS", 11_000)
    assert "CLAUDE_CODE_MAX_CONTEXT_TOKENS" not in compact_env(16_384)


@pytest.mark.parametrize(
    ("name", "prompt", "shared", "seconds", "rate", "wanted"),
    [
        ("first turn", 12_000, 0, 6.0, None, (12_000, 0, 0)),
        ("a hit", 12_500, 12_000, 0.3, 2_000.0, (500, 12_000, 0)),
        ("a miss", 12_500, 12_000, 6.2, 2_000.0, (500, 0, 12_000)),
        ("small batches are slow, still a hit", 12_013, 12_000, 0.1, 2_000.0, (13, 12_000, 0)),
        ("no rate known", 12_500, 12_000, 6.2, None, (500, 12_000, 0)),
        ("no time told", 12_500, 12_000, 0.0, 2_000.0, (500, 12_000, 0)),
        ("shared more than there is", 100, 900, 0.0, None, (1, 99, 0)),
        ("less than nothing", 100, -5, 0.0, None, (100, 0, 0)),
    ],
)
def test_cache_usage(name, prompt, shared, seconds, rate, wanted):
    usage = cache_usage(prompt, shared, seconds, rate)
    assert usage == wanted
    assert sum(usage) == prompt
