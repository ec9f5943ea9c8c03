"""Section 14: counters, log lines, JSON, metrics and the page, all without a server."""
import base64
import hashlib
import json
import re
import threading
import time

import pytest
import qwencode as q
from helpers import running_shim, tool
from mock_ollama import MockOllama, delay, model_text, text


def config(**variables):
    return q.load_config({}, {name: str(value) for name, value in variables.items()})


TURN = q.TurnRecord(
    session="s1", turn=4, model="qwen3", started=43265.1, first_s=1.9, total_s=2.0,
    prompt_tokens=40_800, new_tokens=1_100, cached_tokens=39_700, output_tokens=400,
    tokens_per_s=38.2, window=65536, tools=("Write",), rescue="hermes")
BARE = q.TurnRecord(started=3661.0)
FAILED = BARE._replace(outcome="upstream_timeout", error="Ollama sent nothing for 120 s.",
                       cure="See `ollama ps`.")

LINES = [
    ("the example of the README", TURN,
     "12:01:07 turn 4  41.2k/64k tokens (1.1k new)  first 1.9s  38 tok/s"
     "  Write via rescue:hermes  ok"),
    ("nothing is known", BARE, "01:01:01  ok"),
    ("prefill takes long", BARE._replace(turn=1, prompt_tokens=900, prefill_s=3.21, first_s=3.5),
     "01:01:01 turn 1  900 tokens  prefill 3.2s  first 3.5s  ok"),
    ("what was cached tells what was new", BARE._replace(prompt_tokens=900, cached_tokens=700),
     "01:01:01  900 tokens (200 new)  ok"),
    ("native calls", BARE._replace(tools=("Read", "Bash")), "01:01:01  Read, Bash  ok"),
    ("a dozen calls", BARE._replace(tools=("Read",) * 12),
     "01:01:01  Read, Read, Read, Read and 8 more  ok"),
    ("an error and its cure", FAILED,
     "01:01:01  upstream_timeout: Ollama sent nothing for 120 s. See `ollama ps`."),
    ("the client left", BARE._replace(outcome="client left"), "01:01:01  client left"),
    ("the window fills", BARE._replace(prompt_tokens=27_000, output_tokens=500, window=32768),
     "01:01:01  27.5k/32k tokens  ok  83% of the window used, 5.3k left"),
    ("a window beyond its end", BARE._replace(prompt_tokens=33_000, window=32768),
     "01:01:01  33.0k/32k tokens  ok  100% of the window used, 0 left"),
    ("a broken prefix", BARE._replace(notes=("tools changed at Bash: 18,400 tokens read again",)),
     "01:01:01  ok  tools changed at Bash: 18,400 tokens read again"),
    ("answered without the model", BARE._replace(way="local", model="title"),
     "01:01:01  answered here (title)  ok"),
    ("line breaks and escapes from outside",
     BARE._replace(tools=("a\nb\x1b[31m",), outcome="odd\r\nkind", error="x\ud800"),
     "01:01:01  a b [31m  odd  kind: x\ufffd"),
    ("a login in an address", BARE._replace(outcome="e", error="http://me:pw@host:1/x refused"),
     "01:01:01  e: http://host:1/x refused"),
]


@pytest.mark.parametrize(("name", "record", "line"), LINES, ids=[row[0] for row in LINES])
def test_a_turn_is_one_readable_line(name, record, line):
    assert q.turn_line(record) == line


def test_the_line_counts_in_local_time():
    assert q.turn_line(BARE, utc_offset_s=-2 * 3600).startswith("23:01:01")


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="Windows sets no time zone by a variable")
def test_the_line_follows_the_clock_to_summer_time(monkeypatch, capsys):
    log = q.Log(config())
    for zone, hour in (("UTC-1", "02"), ("UTC-2", "03")):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        log.turn(BARE)
        assert capsys.readouterr().err.startswith(f"{hour}:01:01")
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(("outcome", "code"), [("ok", 32), ("client left", 33), ("api_error", 31)])
def test_the_outcome_is_coloured_only_when_asked(outcome, code):
    record = BARE._replace(outcome=outcome)
    assert f"\x1b[{code}m{outcome}\x1b[0m" in q.turn_line(record, colour=True)
    assert "\x1b" not in q.turn_line(record)


@pytest.mark.parametrize(("count", "text"), [
    (0, "0"), (999, "999"), (1000, "1.0k"), (99_949, "99.9k"), (99_950, "100k"), (262_144, "262k")])
def test_token_counts_are_short(count, text):
    assert q.token_text(count) == text


@pytest.mark.parametrize(("window", "text"), [
    (4096, "4k"), (65536, "64k"), (100_000, "100k"), (500, "500"), (1_048_576, "1024k")])
def test_windows_are_named_as_people_name_them(window, text):
    assert q.window_text(window) == text


def test_a_turn_as_json_is_one_line_that_holds_every_field():
    text = q.turn_json(TURN._replace(error="a\nb"))
    assert "\n" not in text
    assert text.isascii()
    fields = json.loads(text)
    assert fields["event"] == "turn"
    assert fields["time"] == 43267.1
    assert fields["error"] == "a b"
    assert set(q.TurnRecord._fields) < set(fields)


def test_every_line_of_a_json_log_has_its_event_and_the_same_kind_of_time(capsys):
    log = q.Log(config(SHIM_LOG_FORMAT="json"))
    log.write("warn", "a\nb")
    log.turn(TURN)
    told, turn = map(json.loads, capsys.readouterr().err.splitlines())
    assert [type(line["time"]) for line in (told, turn)] == [float, float]
    assert (turn["event"], {**told, "time": 0}) == (
        "turn", {"event": "log", "time": 0, "level": "warn", "message": "a b"})


def test_secrets_are_in_no_output():
    record = FAILED._replace(error="refused sk-1 for tok-2 at http://u:p4ss@h/", session="sk-1")
    stats = q.Stats()
    stats.end(1, record)
    settings = config(SHIM_API_KEY="sk-1", OLLAMA_AUTH_TOKEN="tok-2",
                      OLLAMA_BASE_URL="http://u:p4ss@h")
    health = {"upstream": ["http://u:p4ss@h", {"key": "sk-1"}]}
    secrets = q.secrets_of(settings)
    for text in (q.turn_line(record, secrets=secrets), q.turn_json(record, secrets),
                 json.dumps(q.status_json(stats, settings, health, 9.0)),
                 q.metrics_text(stats, settings)):
        assert not re.search("sk-1|tok-2|p4ss", text)


def segments(*rows):
    return [q.Segment(name, key, tokens) for name, key, tokens in rows]


BEFORE = segments(("tools changed at Bash", "b", 400), ("system text changed", "s", 9000),
                  ("message 1 (user) changed", "u", 9000))
BREAKS = [
    ("the first turn", [], BEFORE, ""),
    ("the same again", BEFORE, BEFORE, ""),
    ("it only grew", BEFORE, BEFORE + segments(("message 2 (assistant) changed", "a", 5000)), ""),
    ("a tool changed", BEFORE, segments(("tools changed at Bash", "x", 400)) + BEFORE[1:],
     "tools changed at Bash: 18,400 tokens read again"),
    ("the history changed", BEFORE, BEFORE[:2] + segments(("message 1 (user) changed", "v", 700)),
     "message 1 (user) changed: 700 tokens read again"),
    ("a small change", BEFORE, BEFORE[:2] + segments(("message 1 (user) changed", "v", 70)), ""),
    ("a tool went", segments(("tools changed at Add", "a", 400)) + BEFORE, BEFORE,
     "tools changed at Add: 18,400 tokens read again"),
    ("a tool came", BEFORE, segments(("tools changed at Add", "a", 400)) + BEFORE,
     "tools changed at Add: 18,400 tokens read again"),
    ("the last tool went", BEFORE, BEFORE[1:], "tools changed at Bash: 18,000 tokens read again"),
    ("the history was cut", BEFORE, BEFORE[:2], ""),
    ("nothing is left", BEFORE, [], ""),
]


@pytest.mark.parametrize(("before", "now", "said"), [row[1:] for row in BREAKS],
                         ids=[row[0] for row in BREAKS])
def test_what_broke_the_prefix_is_named_with_its_cost(before, now, said):
    assert q.prefix_break(before, now) == said


# ------------------------------ counting ------------------------------


def test_a_request_is_seen_from_its_start_to_its_end():
    stats = q.Stats(100.0, threading.Lock())
    stats.begin("a", "s1", "qwen3", 101.0, state="waiting")
    running = stats.begin("b", "s2", "qwen3", 102.0)
    running.enter("writing", 105.0)
    running.tokens += 60
    status = q.status_json(stats, config(), {}, 107.0)
    assert status["waiting"] == [{
        "session": "s1", "model": "qwen3", "state": "waiting", "seconds": 6.0,
        "state_seconds": 6.0, "tokens": 0, "tokens_per_s": 0.0}]
    assert status["running"] == [{
        "session": "s2", "model": "qwen3", "state": "writing", "seconds": 5.0,
        "state_seconds": 2.0, "tokens": 60, "tokens_per_s": 30.0}]
    stats.end("a", q.TurnRecord(outcome="client left"))
    stats.end("b", TURN)
    after = q.status_json(stats, config(), {}, 110.0)
    assert after["running"] == after["waiting"] == []
    assert after["counters"]["requests"] == {"ok": 1, "client left": 1}
    assert after["uptime_s"] == 10.0
    assert q.status_json(stats, config(), {}, 90.0)["uptime_s"] == 0  # the clock was set back
    assert [turn["outcome"] for turn in after["turns"]] == ["ok", "client left"]


def test_counters_add_up():
    stats = q.Stats()
    for record in (TURN, TURN._replace(rescue="hermes,xml"), FAILED, FAILED._replace(
            outcome="bad_request"), BARE._replace(outcome="client left")):
        stats.end(object(), record)
    counters = q.status_json(stats, config(), {}, 0.0)["counters"]
    assert counters == {
        "requests": {"ok": 2, "upstream_timeout": 1, "bad_request": 1, "client left": 1},
        "rescues": {"hermes": 2, "xml": 1}, "upstream_errors": {"upstream_timeout": 1},
        "tokens": {"prompt": 81_600, "cached": 79_400, "output": 800}}


def test_a_session_shows_what_its_last_turn_left():
    stats = q.Stats()
    stats.end(1, TURN)
    stats.end(2, TURN._replace(session="s2", window=0))
    stats.end(3, TURN._replace(session="s1", turn=5, prompt_tokens=70_000, left_out=("Skill",)))
    stats.end(4, TURN._replace(session="s1", way="local", prompt_tokens=10))
    stats.end(5, TURN._replace(session="s1", prompt_tokens=0, left_out=("Agent",)))
    shown = q.status_json(stats, config(), {}, 0.0)["sessions"]
    assert [one["left_out"] for one in shown] == [["Skill"], []]
    assert [(one["session"], one["turn"], one["used"], one["window"], one["left"])
            for one in shown] == [("s1", 5, 70_400, 65536, 0), ("s2", 4, 41_200, 0, None)]


def test_what_came_of_a_rescue_is_told_later():
    stats = q.Stats()
    stats.end(1, TURN)
    stats.end(2, TURN._replace(session="s2"))
    stats.end(3, TURN._replace(session="s3"))
    worked, failed = (q.Request("m", (), (
        q.Message("user", (q.ToolResult("t1", "done", is_error=is_error),)),))
        for is_error in (False, True))
    stats.settle("s1", ("t1",), worked)
    stats.settle("s3", ("t1",), failed)
    stats.settle("s2", ("t9",), worked)
    stats.settle("s9", ("t1",), worked)
    shown = q.status_json(stats, config(), {}, 0.0)["rescues"]
    assert [(one["session"], one["rescue_outcome"]) for one in shown] == [
        ("s3", "failed"), ("s2", ""), ("s1", "worked")]


@pytest.mark.parametrize(("error", "kind", "cured"), [
    (q.UpstreamTimeoutError("m"), "upstream_timeout", True),
    (q.UpstreamGarbageError("m"), "upstream_garbage", True),
    (q.PromptTooLongError(5, 4), "prompt_too_long", True),
    (q.ModelMissingError("ollama pull m"), "model_missing", False),
    (q.ShimError("m"), "shim", False),
])
def test_errors_have_a_name_and_a_cure(error, kind, cured):
    assert q.outcome_of(error) == kind
    assert bool(error.cure) == cured


def test_memory_is_bounded_whatever_names_come_from_outside():
    stats = q.Stats()
    for number in range(3000):
        stats.end(number, FAILED._replace(
            session=f"s{number}", outcome=f"upstream {number}", rescue=f"r{number}",
            prompt_tokens=5))
    assert len(stats.turns) == q.MAX_TURNS
    assert len(stats.failed) == len(stats.rescued) == q.MAX_EVENTS
    assert len(stats.sessions) == q.SHOWN_SESSIONS
    for counter in stats.counters.values():
        assert len(counter) <= q.MAX_LABELS + 1
    assert sum(stats.counters["requests"].values()) == 3000
    assert not stats.active


# ------------------------------ metrics ------------------------------

LABEL = r'[a-z]+="(?:[^"\\\n]|\\[\\"n])*"'
SAMPLE = re.compile(rf"([a-z_]+)(\{{{LABEL}(?:,{LABEL})*\}})? (-?[0-9.e+-]+)")
PLAIN = re.compile(r"# (HELP|TYPE) ([a-z_]+) (.+)")


def read_metrics(text):
    """{family: (type, {sample name and labels: value})}; fails on what is not the format."""
    assert text.endswith("\n")
    families, current = {}, None
    for line in text.splitlines():
        comment = PLAIN.fullmatch(line)
        if comment:
            if comment.group(1) == "TYPE":
                assert comment.group(2) == current
                families[current] = (comment.group(3), {})
            else:
                current = comment.group(2)
                assert current not in families
            continue
        name, names, value = SAMPLE.fullmatch(line).groups()
        kind, samples = families[current]
        base = re.sub("_(bucket|sum|count)$", "", name) if kind == "histogram" else name
        assert base == current
        key = name + (names or "")
        assert key not in samples
        samples[key] = float(value)
    return families


def test_metrics_are_what_prometheus_reads():
    stats = q.Stats(1_790_000_000.5)
    stats.begin(1, "s", "m", 0.0)
    stats.begin(2, "s", "m", 0.0, state="waiting")
    stats.end(3, TURN)
    stats.end(4, TURN._replace(outcome='a"b\\c\nd', first_s=1000.0, tokens_per_s=0.0))
    stats.end(5, TURN._replace(first_s=float("nan"), tokens_per_s=1e-9))
    families = read_metrics(q.metrics_text(stats, config(OLLAMA_MODEL='qw"en\\3')))
    assert families["qwencode_info"][1] == {
        f'qwencode_info{{version="{q.__version__}",model="qw\\"en\\\\3"}}': 1.0}
    assert families["qwencode_requests_total"] == ("counter", {
        'qwencode_requests_total{outcome="ok"}': 2.0,
        'qwencode_requests_total{outcome="a\\"b\\\\c d"}': 1.0})
    assert families["qwencode_requests_running"][1] == {"qwencode_requests_running": 1.0}
    assert families["qwencode_requests_waiting"][1] == {"qwencode_requests_waiting": 1.0}
    assert families["qwencode_prompt_tokens_total"][1] == {"qwencode_prompt_tokens_total": 122_400}


def test_histograms_are_cumulative_and_end_with_everything():
    stats = q.Stats()
    for first_s in (0.1, 0.1001, 3.0, 9999.0):
        stats.end(1, TURN._replace(first_s=first_s, tokens_per_s=50.0))
    stats.end(1, TURN._replace(first_s=0.0, way="local", tokens_per_s=0.0))
    families = read_metrics(q.metrics_text(stats, config()))
    kind, samples = families["qwencode_time_to_first_token_seconds"]
    name = "qwencode_time_to_first_token_seconds"
    assert kind == "histogram"
    buckets = [value for key, value in samples.items() if "_bucket" in key]
    assert buckets == sorted(buckets)
    assert samples[name + '_bucket{le="0.1"}'] == 1
    assert samples[name + '_bucket{le="0.25"}'] == 2
    assert samples[name + '_bucket{le="600"}'] == 3
    assert samples[name + '_bucket{le="+Inf"}'] == samples[name + "_count"] == 4
    assert samples[name + "_sum"] == pytest.approx(10002.2001)
    tokens = families["qwencode_time_per_output_token_seconds"][1]
    assert tokens['qwencode_time_per_output_token_seconds_bucket{le="0.02"}'] == 4


# ------------------------------ the page ------------------------------


@pytest.mark.parametrize(("text", "written"), [
    (q.STATUS_STYLE, q.STATUS_STYLE_HASH), (q.STATUS_SCRIPT, q.STATUS_SCRIPT_HASH)])
def test_the_page_allows_its_own_style_and_script_alone(text, written):
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    assert written == "sha256-" + digest
    assert f"'{written}'" in q.STATUS_PAGE
    assert "unsafe" not in q.STATUS_PAGE


def test_the_page_needs_nothing_from_elsewhere():
    addresses = set(re.findall(r"""(?:https?:|//)[^\s"'`<]+""", q.STATUS_PAGE))
    assert {one for one in addresses if one.startswith("http")} == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(?:link rel=.stylesheet|script src|img|iframe)|@import|url\(",
                         q.STATUS_PAGE)


def test_the_page_never_parses_a_value_as_html():
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function",
                         q.STATUS_SCRIPT)


def luminance(colour):
    parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), linear))


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_are_readable(scheme):
    """WCAG AA: 4.5 for text, 3 for bars and borders of controls."""
    block = re.findall(r":root \{([^}]+)\}", q.STATUS_STYLE)[scheme]
    colours = dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6})", block))

    def contrast(one, other):
        low, high = sorted((luminance(colours[one]), luminance(colours[other])))
        return (high + 0.05) / (low + 0.05)

    for text in ("text", "muted", "ok", "warn", "bad", "accent"):
        assert contrast(text, "card") >= 4.5
        assert contrast(text, "bg") >= 4.5
    for bar in ("accent", "warn", "bad"):
        assert contrast(bar, "track") >= 3


# ------------------------------ in the server ------------------------------


def ask(shim, messages, description, **fields):
    tools = [{"name": name, "description": description, "input_schema": {"type": "object"}}
             for name in ("Alpha", "Beta")]
    answer = shim.request("POST", "/v1/messages", {
        "model": "m", "max_tokens": 50, "messages": messages, "tools": tools, **fields},
        {"x-claude-code-session-id": "s1"})
    assert answer.status == 200


def test_auto_mode_is_told_once_in_a_session():
    with MockOllama(text("ok"), model="qwen3-coder:30b") as ollama, running_shim(
            ollama.url, model=ollama.model, verbatim="off") as shim:
        for _ in range(2):
            ask(shim, [{"role": "user", "content": "hi"}], "one",
                safeguards=[{"type": "dangerous_tool_use"}])
        turns = shim.request("GET", "/status").json["turns"]
    assert [turn["notes"] for turn in turns] == [[], [q.NO_SAFETY_CHECK]]


def test_a_turn_says_what_broke_the_prefix_and_what_was_left_out():
    with MockOllama(text("ok"), model="qwen3-coder:30b") as ollama, running_shim(
            ollama.url, model=ollama.model, max_tools="1", verbatim="off") as shim:
        first = [{"role": "user", "content": "hello " * 900}]
        later = [*first, {"role": "assistant", "content": "ok"}, {"role": "user", "content": "on"}]
        ask(shim, first, "one " * 200)
        ask(shim, later, "one " * 200)
        ask(shim, later, "two " * 200)
        status = shim.request("GET", "/status").json
        metrics = read_metrics(shim.request("GET", "/metrics").data.decode())
    notes = [turn["notes"] for turn in status["turns"]]
    assert re.fullmatch(r"tools changed at Alpha: 1,\d\d\d tokens read again", notes[0][0])
    assert notes[1:] == [[], []]
    assert status["sessions"][0]["left_out"] == ["Beta"]
    assert status["sessions"][0]["turn"] == 3
    assert metrics["qwencode_requests_total"][1] == {'qwencode_requests_total{outcome="ok"}': 3.0}


def test_a_rescue_is_followed_to_its_result():
    leaked = model_text('{"name": "Bash", "arguments": {"command": "ls"}}')
    body = {"model": "m", "max_tokens": 50, "messages": [{"role": "user", "content": "list"}],
            "tools": [tool("Bash", command="string")]}
    headers = {"x-claude-code-session-id": "s1"}
    with MockOllama([leaked, text("done")], model="qwen3-coder:30b") as ollama, running_shim(
            ollama.url, model=ollama.model) as shim:
        content = shim.request("POST", "/v1/messages", body, headers).json["content"]
        call = next(block for block in content if block["type"] == "tool_use")
        body["messages"] += [{"role": "assistant", "content": content}, {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": call["id"], "content": "a.py"}]}]
        assert shim.request("GET", "/status").json["rescues"][0]["rescue_outcome"] == ""
        shim.request("POST", "/v1/messages", body, headers)
        rescue = shim.request("GET", "/status").json["rescues"][0]
    assert rescue["tools"] == ["Bash"]
    assert rescue["rescue_outcome"] == "worked"


def test_a_retry_that_joined_does_not_hide_what_came_of_a_rescue():
    leaked = delay(0.3) + model_text('{"name": "Bash", "arguments": {"command": "ls"}}')
    body = {"model": "m", "max_tokens": 50, "messages": [{"role": "user", "content": "list"}],
            "tools": [tool("Bash", command="string")]}
    headers = {"x-claude-code-session-id": "s1"}
    with MockOllama([leaked, text("done")], model="qwen3-coder:30b") as ollama, running_shim(
            ollama.url, model=ollama.model) as shim:
        answers = []
        askers = [threading.Thread(target=lambda: answers.append(
            shim.request("POST", "/v1/messages", body, headers))) for _ in range(2)]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join(10)
        assert sorted(turn["way"] for turn in shim.request("GET", "/status").json["turns"]) \
            == ["joined", "verbatim"]
        content = answers[0].json["content"]
        call = next(block for block in content if block["type"] == "tool_use")
        body["messages"] += [{"role": "assistant", "content": content}, {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": call["id"], "content": "a.py"}]}]
        shim.request("POST", "/v1/messages", body, headers)
        assert shim.request("GET", "/status").json["rescues"][0]["rescue_outcome"] == "worked"


def test_the_first_token_is_the_model_s_and_not_a_keep_alive(monkeypatch):
    monkeypatch.setattr(q, "FIRST_EVENT_S", 0.05)
    with MockOllama(delay(0.6) + text("ok"), model="qwen3-coder:30b") as ollama, running_shim(
            ollama.url, model=ollama.model) as shim:
        shim.messages()
        turn = shim.request("GET", "/status").json["turns"][0]
    assert turn["first_s"] >= 0.6


def test_what_was_cached_is_never_more_than_the_turn_before():
    """Also where Ollama counts half of what the first estimate says."""
    with MockOllama(text("ok"), model="qwen3-coder:30b",
                    tokens=lambda words: len(words) // 7) as ollama, running_shim(
            ollama.url, model=ollama.model) as shim:
        messages = [{"role": "user", "content": "some words " * 500}]
        for _ in range(3):
            ask(shim, messages, "a tool")
            messages += [{"role": "assistant", "content": "ok"},
                         {"role": "user", "content": "more words " * 50}]
        turns = shim.request("GET", "/status").json["turns"]
    for later, earlier in zip(turns, turns[1:]):
        assert 0.8 * earlier["prompt_tokens"] < later["cached_tokens"] <= (
            earlier["prompt_tokens"] + earlier["output_tokens"])
