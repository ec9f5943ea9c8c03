"""doctor: every verdict as a table, and every fault provoked once against the mock."""
import contextlib
import io
import json
import os
import re
import socket
import stat
from pathlib import Path

import pytest
import qwencode as q
from helpers import running_shim
from mock_ollama import MockOllama, Model, call, delay, done, model_text, status, text

GIB = 2**30
WORDS = [{"type": "text", "text": "kiwi"}]
RIGHT = [{"type": "tool_use", "name": "doctor_probe", "input": {"word": "kiwi"}}]
AS_TEXT = [{"type": "text", "text": '{"name": "doctor_probe"}'}]
GOOD_PROMPT = "ProbeTool probe question probe said probe value probe reminder"

VERDICTS = [
    ("a new Ollama", q.verdict_ollama("http://h:1", 200, "0.33.0"), "ok", "Ollama 0.33.0 at"),
    ("an Ollama built from source", q.verdict_ollama("u", 200, "0.0.0"), "ok", "Ollama 0.0.0"),
    ("an old Ollama", q.verdict_ollama("u", 200, "0.12.3"), "warn", "gives tool calls no ids"),
    ("a very old Ollama", q.verdict_ollama("u", 200, "0.5.1"), "warn", "what a model can do"),
    ("the Ollama that miscounts", q.verdict_ollama("u", 200, "0.30.0"), "warn", "miscounts"),
    ("something else", q.verdict_ollama("u", 404, ""), "warn", "does not say that it is Ollama"),
    ("a model that is there", q.verdict_model("m", True, []), "ok", "model m"),
    ("a model that is missing", q.verdict_model("m", False, ["a", "b"]), "bad",
     "Ollama does not have m Run `ollama pull m`, or set OLLAMA_MODEL to one of: a, b."),
    ("no model at all", q.verdict_model("m", False, []), "bad", "Run `ollama pull m`."),
    ("a cloud model", q.verdict_model("qwen3:480b-cloud", True, []), "bad", "leave this machine"),
    ("capabilities", q.verdict_capabilities(["completion", "tools"]), "ok", "completion, tools"),
    ("capabilities unknown", q.verdict_capabilities([]), "warn", "does not tell"),
    ("an embedding model", q.verdict_capabilities(["embedding"]), "bad", "cannot chat"),
    ("no tools", q.verdict_capabilities(["completion"]), "warn", "read from its text"),
    ("a good window", q.verdict_window(131072, 65536, 65536), "ok", "65,536 real"),
    ("a window cut by Ollama", q.verdict_window(131072, 65536, 4096), "bad", "OLLAMA_NUM_CTX="),
    ("a model trained for little", q.verdict_window(4096, 32768, 4096), "bad",
     "trained for too little"),
    ("nothing known of the window", q.verdict_window(0, 0, 0), "warn", "unknown"),
    ("all in graphics memory", q.verdict_memory(q.Loaded(1, GIB, GIB)), "ok", "100 %"),
    ("spilled", q.verdict_memory(q.Loaded(1, 10 * GIB, 6 * GIB)), "warn", "60 % of 10.7 GB"),
    ("on the processor", q.verdict_memory(q.Loaded(1, GIB, 0)), "warn", "0 % of 1.1 GB"),
    ("memory unknown", q.verdict_memory(q.Loaded()), "warn", "does not tell"),
    ("a sound template", q.verdict_template(GOOD_PROMPT), "ok", "keeps tools"),
    ("tools as Go structs", q.verdict_template("{ProbeTool probe {object " + GOOD_PROMPT), "warn",
     "prints tool definitions as Go structs Nothing to do"),
    ("calls dropped", q.verdict_template(GOOD_PROMPT.replace("probe value", "")), "warn",
     "drops tool calls that follow text"),
    ("system text hoisted", q.verdict_template("probe reminder " + GOOD_PROMPT[:-15]), "warn",
     "moves later system messages to the top"),
    ("system text dropped", q.verdict_template(GOOD_PROMPT[:-15]), "warn", "drops later system"),
    ("tools left out", q.verdict_template(GOOD_PROMPT[9:]), "warn", "leaves tools out"),
    ("no prompt shown", q.verdict_template(""), "warn", "does not show how"),
    ("a call", q.verdict_call(RIGHT, "kiwi", ""), "ok", "a live tool call"),
    ("words", q.verdict_call(WORDS, "kiwi", ""), "bad", "wrote words"),
    ("wrong arguments", q.verdict_call(RIGHT, "plum", ""), "warn", "wrong arguments"),
    ("a failed call", q.verdict_call([], "kiwi", "it broke"), "bad", "it broke"),
    ("odd content", q.verdict_call({"a": 1}, "kiwi", ""), "bad", "wrote words"),
    ("a rescue", q.verdict_rescue(RIGHT, "kiwi", ""), "ok", "became a real one"),
    ("no rescue", q.verdict_rescue(AS_TEXT, "kiwi", ""), "bad", "SHIM_RESCUE"),
    ("no need for a rescue", q.verdict_rescue(WORDS, "kiwi", ""), "warn", "no rescue was seen"),
    ("a failed rescue", q.verdict_rescue([], "kiwi", "it broke"), "bad", "it broke"),
    ("refused beyond the window", q.verdict_truncation(400, 4096), "ok", "4,096"),
    ("cut in silence", q.verdict_truncation(200, 4096), "bad", "cut a prompt"),
    ("broken beyond the window", q.verdict_truncation(500, 4096), "warn", "HTTP 500"),
    ("a kept prefix", q.verdict_reuse(4.0, 0.1, 3000), "ok", "3,000 tokens"),
    ("a fast machine", q.verdict_reuse(0.3, 0.3, 3000), "ok", "0.3 s"),
    ("a lost prefix", q.verdict_reuse(4.0, 4.0, 3000), "warn", "nothing was kept"),
    ("a quick cancel", q.verdict_cancel(0.4), "ok", "0.4 s"),
    ("a slow cancel", q.verdict_cancel(40.0), "warn", "40.0 s"),
    ("speed", q.verdict_speed(2000.0, 40.0), "ok", "writes 40.0 tokens a second"),
    ("slow reading", q.verdict_speed(50.0, 40.0), "warn", "after about 180 s"),
    ("slow writing", q.verdict_speed(2000.0, 1.5), "warn", "1.5 tokens a second"),
    ("no times", q.verdict_speed(0.0, 0.0), "warn", "unknown"),
    ("bash", q.verdict_bash("/bin/bash", [], False), "ok", "/bin/bash"),
    ("no bash", q.verdict_bash("", [], False), "bad", "Install bash."),
    ("no Git Bash", q.verdict_bash("", [], True), "bad", "CLAUDE_CODE_GIT_BASH_PATH"),
    ("bash without programs", q.verdict_bash("b", ["cmp", "sed"], False), "warn", "cmp, sed"),
    ("the newest Claude Code", q.verdict_claude("/c", "2.1.330 (Claude Code)"), "ok", "2.1.330"),
    ("the older one", q.verdict_claude("/c", "2.1.197 (Claude Code)"), "ok", "2.1.197 at /c"),
    ("an unknown Claude Code", q.verdict_claude("/c", "3.0.0"), "warn", "tested: 2.1.197, 2.1.330"),
    ("Claude Code says nothing", q.verdict_claude("/c", ""), "warn", "unknown version"),
    ("no Claude Code", q.verdict_claude("", ""), "bad", "npm install -g @anthropic-ai/claude-code"),
    ("a free port", q.verdict_port("h:1", "", False), "ok", "h:1 is free"),
    ("our port", q.verdict_port("h:1", "", True), "ok", "a shim answers"),
    ("a taken port", q.verdict_port("h:1", "PORT: in use.", False), "warn", "PORT: in use."),
    ("a clean environment", q.verdict_environment({}, {}, "127.0.0.1"), "ok", "nothing"),
    ("Bedrock", q.verdict_environment({"CLAUDE_CODE_USE_BEDROCK": "1"}, {}, "localhost"), "warn",
     "CLAUDE_CODE_USE_BEDROCK in the environment"),
    ("settings that lead away", q.verdict_environment(
        {}, {"ANTHROPIC_BASE_URL": "https://api.example.com/v1"}, "::1"), "warn",
     "settings.json is api.example.com"),
    ("a local base URL", q.verdict_environment(
        {"ANTHROPIC_BASE_URL": "http://localhost:8000"}, {}, "127.0.0.1"), "ok", "nothing"),
    ("Ollama elsewhere", q.verdict_environment({}, {}, "10.0.0.5"), "warn", "is 10.0.0.5"),
    ("a proxy", q.verdict_environment({"HTTPS_PROXY": "http://p"}, {}, "::1"), "warn", "proxy"),
    ("a proxy with exceptions", q.verdict_environment(
        {"HTTPS_PROXY": "http://p", "NO_PROXY": "127.0.0.1, localhost"}, {}, "::1"), "ok", ""),
]


@pytest.mark.parametrize(("found", "ok", "said"), [row[1:] for row in VERDICTS],
                         ids=[row[0] for row in VERDICTS])
def test_verdicts(found, ok, said):
    assert found.ok == ok
    assert said in f"{found.line} {found.cure}"
    assert bool(found.cure) == (ok != "ok")


# ------------------------------ the whole command ------------------------------

NAMES = [check.name for check in q.CHECKS]


def answer(request):
    """A model that does what the doctor asks, as the mock's script."""
    words = json.dumps(request.body)
    if "doctor_probe with word" in words:
        return call("doctor_probe", {"word": "kiwi"})
    if "plum" in words:
        return model_text('{"name": "doctor_probe", "arguments": {"word": "plum"}}')
    return text("one two three")


scripted = pytest.mark.skipif(os.name == "nt", reason="the stand-in programs are shell scripts")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A home with a claude and every program of the rescue, and nothing else."""
    (tmp_path / "bin").mkdir()
    add_program(tmp_path, "claude", "echo '2.1.330 (Claude Code)'")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def add_program(place, name, line):
    path = place / "bin" / name
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)


def doctor(place, url, *flags, **env):
    """Run doctor --json; return the exit code and {name: (ok, line, cure)}."""
    settings = {"HOME": str(place), "PATH": f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}",
                "OLLAMA_BASE_URL": url, "PORT": "0", **env}
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = q.main(["doctor", "--json", *flags], settings)
    told = json.loads(output.getvalue())
    assert told["ok"] == (code == 0)
    return code, {row["name"]: (row["ok"], row["line"], row["cure"]) for row in told["checks"]}


@scripted
def test_a_good_machine_is_told_so(place):
    with MockOllama(answer, model="qwen3-coder:30b") as ollama:
        code, found = doctor(place, ollama.url, OLLAMA_MODEL=ollama.model)
    assert list(found) == NAMES
    assert {name: row[1] for name, row in found.items() if row[0] == "bad"} == {}
    assert code == 0


@scripted
def test_quick_loads_nothing(place):
    with MockOllama(answer, model="qwen3-coder:30b") as ollama:
        code, found = doctor(place, ollama.url, "--quick", OLLAMA_MODEL=ollama.model)
        assert ollama.loads == ollama.turns == []
    assert [name for name in NAMES if name not in found] == [
        check.name for check in q.CHECKS if "load" in (check.name, check.after)]
    assert code == 0


def broken_times(request):
    return text("x") + done(prompt_eval_count=3000, prompt_eval_duration=60_000_000_000,
                            eval_count=10, eval_duration=10_000_000_000)


FAULTS = [
    # name, check, mock's settings, environment, ok, what is said
    ("an old Ollama", "ollama", {"version": "0.24.0"}, {}, "warn", "Update Ollama"),
    ("a missing model", "model", {}, {"OLLAMA_MODEL": "gone:1b"}, "bad", "ollama pull gone:1b"),
    ("no tool support", "capabilities", {"model": "plain"}, {}, "warn", "no tool support"),
    ("a model that cannot be loaded", "load", {"routes": "out of memory"}, {}, "bad",
     "out of memory"),
    ("a small window", "window", {}, {"OLLAMA_NUM_CTX": "4096"}, "bad", "OLLAMA_NUM_CTX="),
    ("spilled from the GPU", "memory",
     {"model": Model("qwen3-coder:30b", size=10**10, size_vram=4 * 10**9)}, {}, "warn",
     "40 % of 10.0 GB"),
    ("a template of Go structs", "template", {"model": "qwen2.5-coder:7b"}, {}, "warn",
     "Go structs, drops tool calls that follow text, moves later system messages"),
    ("words instead of a call", "tool call", {"replies": text("kiwi")}, {}, "bad", "wrote words"),
    ("wrong arguments", "tool call", {"replies": call("doctor_probe", {"word": "fig"})}, {},
     "warn", "wrong arguments"),
    ("the rescue is off", "rescue", {}, {"SHIM_RESCUE": "off"}, "bad", "SHIM_RESCUE"),
    ("nothing to rescue", "rescue", {"replies": text("no")}, {}, "warn", "no rescue was seen"),
    ("silent cutting", "truncation", {"tokens": lambda text: 10}, {}, "bad", "cut a prompt"),
    ("a lost prefix", "reuse", {"replies": broken_times}, {}, "warn", "nothing was kept"),
    ("a slow machine", "speed", {"replies": broken_times}, {}, "warn", "reads 50 and writes 1.0"),
    ("a proxy", "environment", {}, {"HTTP_PROXY": "http://p"}, "warn", "NO_PROXY"),
    ("the cloud", "environment", {}, {"CLAUDE_CODE_USE_VERTEX": "1"}, "warn", "VERTEX"),
]


@pytest.mark.parametrize(("check", "settings", "env", "ok", "said"), [row[1:] for row in FAULTS],
                         ids=[row[0] for row in FAULTS])
def test_each_fault_is_found_and_cured(place, check, settings, env, ok, said):
    settings = {"model": "qwen3-coder:30b", "replies": answer, **settings}
    broken = settings.pop("routes", "")
    with MockOllama(**settings) as ollama:
        if broken:
            ollama.routes["POST", "/api/generate"] = lambda reply, _: reply.json(
                500, {"error": broken})
        code, found = doctor(place, ollama.url, **{"OLLAMA_MODEL": ollama.model, **env})
    assert found[check][0] == ok
    assert said in " ".join(found[check][1:])
    assert found[check][2]
    assert (code == 1) == any(row[0] == "bad" for row in found.values())


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_call_that_fails_after_a_long_wait_is_no_call_in_words(place, monkeypatch):
    monkeypatch.setattr(q, "FIRST_EVENT_S", 0.05)
    with MockOllama(delay(0.3) + status(500, {"error": "out of luck"}),
                    model="qwen3-coder:30b") as ollama:
        _, found = doctor(place, ollama.url, OLLAMA_MODEL=ollama.model)
    assert found["tool call"][0] == "bad"
    assert "a live tool call failed: Ollama failed (500): out of luck" in found["tool call"][1]


@scripted
def test_without_ollama_the_rest_is_still_checked(place):
    code, found = doctor(place, f"http://127.0.0.1:{closed_port()}")
    assert code == 1
    assert found["ollama"][0] == "bad"
    assert "ollama serve" in found["ollama"][1]
    assert {name for name in found if found[name][0] == "skip"} == {
        check.name for check in q.CHECKS if check.after}
    assert found["claude"][0] == found["bash"][0] == "ok"


def test_an_ollama_that_falls_silent_is_told_soon(place, monkeypatch):
    monkeypatch.setattr(q, "OLLAMA_ANSWER_S", 0.2)
    with MockOllama(answer, model="qwen3-coder:30b") as ollama:
        ollama.routes["POST", "/api/show"] = lambda reply, _: reply.connection.wait(60)
        code, found = doctor(place, ollama.url, "--quick", OLLAMA_MODEL=ollama.model,
                             SHIM_FIRST_TOKEN_TIMEOUT_MS="20000")
    assert code == 1
    assert found["model"][0] == "bad"
    assert "timed out" in found["model"][1]


@scripted
def test_missing_programs_are_named(place):
    (place / "bin" / "claude").unlink()
    for name in ("sh", "nvidia-smi"):
        with contextlib.suppress(OSError):
            (place / "bin" / name).symlink_to(f"/bin/{name}")
    _, found = doctor(place, f"http://127.0.0.1:{closed_port()}", PATH=str(place / "bin"))
    assert found["bash"] == ("bad", "bash was not found", "Install bash.")
    assert "npm install -g @anthropic-ai/claude-code" in found["claude"][2]


@scripted
def test_a_bash_without_the_rescue_s_programs_is_found_out(place):
    (place / "bin" / "bash").symlink_to(os.path.realpath("/bin/bash"))
    _, found = doctor(place, f"http://127.0.0.1:{closed_port()}", PATH=str(place / "bin"))
    assert found["bash"][0] == "warn"
    assert "base64, cat, cmp" in found["bash"][1]


@scripted
def test_an_untested_claude_is_named(place):
    add_program(place, "claude", "echo '9.9.9 (Claude Code)'")
    _, found = doctor(place, f"http://127.0.0.1:{closed_port()}")
    assert found["claude"][0] == "warn"
    assert "claude 9.9.9" in found["claude"][1]


@pytest.mark.skipif(os.name == "nt", reason="this machine's own Git would be found")
def test_on_windows_it_is_git_s_bash_and_never_that_of_wsl(tmp_path, monkeypatch):
    for name, says in (("System32/bash", "exit 1"), ("Git/cmd/git", ""), ("Git/bin/bash.exe", "")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"#!/bin/sh\n{says}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.chdir(tmp_path / "Git")  # the project's own bin/bash.exe is not Git's
    wsl, git, bash = (str(tmp_path / name) for name in ("System32", "Git/cmd", "Git/bin/bash.exe"))
    rows = (({"PATH": wsl}, "", True), ({"PATH": f"{wsl}:{git}"}, bash, True),
            ({"PATH": wsl, "CLAUDE_CODE_GIT_BASH_PATH": bash}, bash, True),
            ({"PATH": wsl, "CLAUDE_CODE_GIT_BASH_PATH": f"{wsl}/bash"}, f"{wsl}/bash", False))
    for env, found, parses in rows:
        q.bash_parses.cache_clear()
        with monkeypatch.context() as patched:
            patched.setattr(os, "environ", env)
            patched.setattr(os, "name", "nt")
            assert (q.find_bash(env), q.bash_parses("true")) == (found, parses), env
    q.bash_parses.cache_clear()


def test_a_port_is_free_ours_or_taken(place):
    with MockOllama(answer) as ollama, running_shim(ollama.url) as shim, socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        ours = doctor(place, ollama.url, "--quick", PORT=str(shim.port))[1]["port"]
        taken = doctor(place, ollama.url, "--quick", PORT=str(other.getsockname()[1]))[1]["port"]
    assert ours[:2] == ("ok", f"a shim answers at 127.0.0.1:{shim.port}")
    assert taken[0] == "warn"
    assert "choose another port with --port" in taken[2]


def test_settings_of_claude_code_are_read(place):
    (place / ".claude").mkdir()
    (place / ".claude" / "settings.json").write_text(
        json.dumps({"env": {"ANTHROPIC_BASE_URL": "https://api.example.com"}}))
    _, found = doctor(place, f"http://127.0.0.1:{closed_port()}")
    assert "api.example.com" in found["environment"][1]


def test_no_secret_is_printed(place, capsys):
    secrets = {"SHIM_API_KEY": "key-secret", "OLLAMA_AUTH_TOKEN": "token-secret"}
    env = {"HOME": str(place), "PATH": os.environ["PATH"], "PORT": "0", **secrets,
           "OLLAMA_BASE_URL": f"http://me:pass-secret@127.0.0.1:{closed_port()}"}
    for flags in ([], ["--json"]):
        assert q.main(["doctor", *flags], env) == 1
    printed = capsys.readouterr()
    assert "-secret" not in printed.out + printed.err


@scripted
def test_for_people_it_marks_lines_and_puts_cures_below(place, capsys, monkeypatch):
    env = {"HOME": str(place), "PATH": str(place), "PORT": "0",
           "OLLAMA_BASE_URL": f"http://127.0.0.1:{closed_port()}"}
    monkeypatch.setattr(q, "speaks_unicode", lambda: True)
    assert q.main(["doctor"], env) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("\u2713 Python 3.")
    assert lines[1].startswith("\u2717 Cannot reach Ollama")
    assert "- model: not checked" in lines
    place_of_bash = lines.index("\u2717 bash was not found")
    assert lines[place_of_bash + 1] == "  Install bash."
    assert "\x1b" not in "".join(lines)


@pytest.mark.parametrize(("found", "colour", "unicode", "lines"), [
    (q.Finding("ok", "fine"), False, True, ["\u2713 fine"]),
    (q.Finding("bad", "broken", "mend it"), False, False, ["x broken", "  mend it"]),
    (q.Finding("warn", "odd", "look"), True, True, ["\x1b[33m!\x1b[0m odd", "  look"]),
])
def test_marks(found, colour, unicode, lines):
    assert q.finding_lines(found, colour, unicode) == lines


def test_every_program_that_is_asked_for_is_one_that_a_rescue_runs():
    source = Path(q.__file__).read_text(encoding="utf-8")
    commands = source.partition(" 10. SHELL COMMANDS =")[2].partition(" 11. RESCUE =")[0]
    assert [name for name in q.SHELL_PROGRAMS if not re.search(rf"\b{name}\b", commands)] == []
