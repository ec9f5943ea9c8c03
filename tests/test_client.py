"""Starting Claude Code: its environment, its arguments, its life and what stops with it."""
import contextlib
import io
import json
import os
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

fcntl, pty, termios = (pytest.importorskip(name, reason="the fake claude needs Unix")
                       for name in ("fcntl", "pty", "termios"))

import qwencode as q
from helpers import running_shim
from mock_ollama import MockOllama, text
from test_claude_code import VERSIONS, program_of

PROGRAM = Path(q.__file__).resolve()
ESCAPES = re.compile(r"\x1b(?:\[[0-9;?<>=]*[a-zA-Z]|\][^\x07]*\x07|[=>78])|\s")
# What a claude would see: its arguments, its environment, and whether the shim answers.
FAKE = """#!{python} -IS
import json, os, signal, sys, urllib.request
base = os.environ["ANTHROPIC_BASE_URL"]
try:
    with urllib.request.urlopen(base + "/health", timeout=10) as reply:
        health = json.load(reply)
except OSError:
    health = None
with open(os.environ["SEEN"], "w") as file:
    json.dump({{"args": sys.argv[1:], "env": dict(os.environ), "health": health,
               "folder": os.getcwd()}}, file)
if "wait" in sys.argv:
    # Blocked and awaited: a handler would miss a signal that comes just before a sleep.
    codes = {{signal.SIGINT: 42, signal.SIGTERM: 43}}
    signal.pthread_sigmask(signal.SIG_BLOCK, codes)
    for one in codes:  # a shell lets background programs ignore Ctrl-C
        signal.signal(one, signal.SIG_DFL)
    signal.alarm(60)
    print("waiting", flush=True)
    sys.exit(codes[signal.sigwait(codes)])
if "die" in sys.argv:
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(7)
"""


@pytest.fixture
def place(tmp_path):
    """A home, a project with a space in its name, and a claude that tells what it saw."""
    for name in ("home", "my project", "bin"):
        (tmp_path / name).mkdir()
    claude = tmp_path / "bin" / "claude"
    claude.write_text(FAKE.format(python=sys.executable))
    claude.chmod(0o755)
    return tmp_path


def settings(place, **env):
    return {"HOME": str(place / "home"), "PATH": f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "SEEN": str(place / "seen.json"), "TMPDIR": str(place), "LANG": "C.UTF-8", **env}


def run(place, *arguments, **env):
    """Run the program in the project's folder, as a module: it is compiled only once."""
    kept = {"PYTHONPATH": str(PROGRAM.parent), "PYTHONPYCACHEPREFIX": str(place.parent / "compiled")}
    return subprocess.run(
        [sys.executable, "-m", PROGRAM.stem, *arguments], cwd=place / "my project",
        env=settings(place, **kept, **env), capture_output=True, text=True, timeout=60,
        stdin=subprocess.DEVNULL)


def seen(place):
    return json.loads((place / "seen.json").read_text())


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ------------------------------ environment and arguments ------------------------------


def config(**variables):
    return q.load_config({}, variables)


def test_the_environment_of_claude_code():
    made = q.client_env("http://127.0.0.1:8000", "", config(OLLAMA_MODEL="qwen3:8b"), 65536)
    assert made["ANTHROPIC_BASE_URL"] == "http://127.0.0.1:8000"
    assert made["ANTHROPIC_AUTH_TOKEN"]
    assert made["ANTHROPIC_API_KEY"] == ""
    assert {made[name] for name in (
        "ANTHROPIC_MODEL", "ANTHROPIC_DEFAULT_OPUS_MODEL", "ANTHROPIC_DEFAULT_SONNET_MODEL",
        "ANTHROPIC_DEFAULT_HAIKU_MODEL", "CLAUDE_CODE_SUBAGENT_MODEL")} == {"qwen3:8b"}
    for name, value in {"CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
                        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
                        "CLAUDE_CODE_DISABLE_EXPERIMENTAL_BETAS": "1"}.items():
        assert made[name] == value
    assert int(made["API_TIMEOUT_MS"]) >= 600_000
    assert q.compact_env(65536).items() <= made.items()


def test_roles_can_have_models_of_their_own():
    made = q.client_env("u", "k", config(OLLAMA_MODEL="big", SHIM_MODEL_MAP="haiku=small"), 0)
    assert made["ANTHROPIC_DEFAULT_HAIKU_MODEL"] == "small"
    assert made["ANTHROPIC_DEFAULT_OPUS_MODEL"] == "big"
    assert made["ANTHROPIC_AUTH_TOKEN"] == "k"
    assert "CLAUDE_CODE_MAX_CONTEXT_TOKENS" not in made


CHILDREN = [
    ("what the user set stays", {"API_TIMEOUT_MS": "5", "ANTHROPIC_MODEL": "mine"},
     {"API_TIMEOUT_MS": "5", "ANTHROPIC_MODEL": "mine"}),
    ("an empty variable counts as not set", {"API_TIMEOUT_MS": ""}, {"API_TIMEOUT_MS": "9"}),
    ("where and with which key is ours", {
        "ANTHROPIC_BASE_URL": "https://api.example.com", "ANTHROPIC_API_KEY": "sk-real",
        "ANTHROPIC_AUTH_TOKEN": "real"}, {"ANTHROPIC_BASE_URL": "http://s",
                                          "ANTHROPIC_API_KEY": "", "ANTHROPIC_AUTH_TOKEN": "t"}),
    ("nothing leads past the shim", {"CLAUDE_CODE_USE_BEDROCK": "1"},
     {"CLAUDE_CODE_USE_BEDROCK": None}),
    ("no proxy for loopback", {"HTTP_PROXY": "http://p", "NO_PROXY": "corp"},
     {"NO_PROXY": "corp,127.0.0.1,localhost", "no_proxy": "corp,127.0.0.1,localhost"}),
    ("exceptions that are there stay", {"no_proxy": "localhost,127.0.0.1"},
     {"no_proxy": "localhost,127.0.0.1", "NO_PROXY": None}),
]


@pytest.mark.parametrize(("env", "wanted"), [row[1:] for row in CHILDREN],
                         ids=[row[0] for row in CHILDREN])
def test_the_environment_is_laid_under_the_user_s(env, wanted):
    made = {"ANTHROPIC_BASE_URL": "http://s", "ANTHROPIC_AUTH_TOKEN": "t",
            "ANTHROPIC_API_KEY": "", "API_TIMEOUT_MS": "9", "ANTHROPIC_MODEL": "m"}
    child = q.child_env(made, env)
    assert {name: child.get(name) for name in wanted} == wanted


DEFAULT = ["--permission-mode", "default"]
MODES = [
    ("none named", [], {}, DEFAULT),
    ("a prompt", ["-p", "hi"], {}, [*DEFAULT, "-p", "hi"]),
    ("a mode", ["--permission-mode", "plan"], {}, ["--permission-mode", "plan"]),
    ("a mode with =", ["--permission-mode=plan"], {}, ["--permission-mode=plan"]),
    ("no questions at all", ["--dangerously-skip-permissions"], {},
     ["--dangerously-skip-permissions"]),
    ("a mode in the settings", [], {"permissions": {"defaultMode": "acceptEdits"}}, []),
    ("auto in the settings cannot work", [], {"permissions": {"defaultMode": "auto"}}, DEFAULT),
    ("odd settings", [], {"permissions": 5}, DEFAULT),
    ("a prompt that looks like one", ["-p", "--permission-modes"], {},
     [*DEFAULT, "-p", "--permission-modes"]),
]


@pytest.mark.parametrize(("passed", "found", "wanted"), [row[1:] for row in MODES],
                         ids=[row[0] for row in MODES])
def test_the_permission_mode_is_default_unless_the_user_named_one(passed, found, wanted):
    assert q.claude_arguments(passed, found) == wanted


def test_settings_of_user_and_project_are_laid_over_each_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, name, content in (
            ("home/.claude", "settings.json", {"env": {"A": "1", "B": "1"}, "model": "m"}),
            (".claude", "settings.json", {"env": {"B": "2"}, "permissions": {"allow": []}}),
            (".claude", "settings.local.json", {"permissions": {"defaultMode": "plan"}})):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / name).write_text(json.dumps(content))
    assert q.claude_settings({"HOME": str(tmp_path / "home")}) == {
        "env": {"A": "1", "B": "2"}, "model": "m",
        "permissions": {"allow": [], "defaultMode": "plan"}}
    assert q.claude_settings({"HOME": "/nowhere", "CLAUDE_CONFIG_DIR": str(
        tmp_path / "home" / ".claude")})["model"] == "m"


ODD = "it's \\ \"odd\" $HOME `x`; ünï"


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash on this machine")
def test_bash_reads_the_exports_back():
    lines = "\n".join(q.export_lines({"ODD": ODD}, "bash"))
    shown = subprocess.run(
        ["bash", "-c", f"{lines}\nprintf '%s|%s' \"$ODD\" \"${{CLAUDE_CODE_USE_BEDROCK-unset}}\""],
        capture_output=True, text=True, env={"CLAUDE_CODE_USE_BEDROCK": "1", "LC_ALL": "C.UTF-8"})
    assert shown.stdout == f"{ODD}|unset"


@pytest.mark.parametrize(("shell", "line"), [
    ("bash", "export A='it'\\''s \\ x'"), ("fish", "set -gx A 'it\\'s \\\\ x'"),
    ("powershell", "$env:A = 'it''s \\ x'")])
def test_every_shell_has_its_own_quotes(shell, line):
    assert q.export_lines({"A": "it's \\ x"}, shell)[-1] == line


@pytest.mark.parametrize(("flags", "env", "begins"), [
    ([], {}, "unset "), (["fish"], {}, "set -e"), (["--shell", "powershell"], {}, "Remove-Item"),
    ([], {"SHELL": "/usr/bin/fish"}, "set -e"), (["bash"], {"SHELL": "/usr/bin/fish"}, "unset ")])
def test_env_speaks_the_shell_that_is_named_or_in_use(flags, env, begins, capsys):
    assert q.main(["env", "--port", "1", *flags], env) == 0
    assert capsys.readouterr().out.startswith(begins)


@pytest.mark.parametrize("host", ["fe80::1%eth0", "bücher.example", "ho st"])
def test_a_host_that_no_url_can_name_is_asked_nothing(host, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(q.Upstream, "_addresses", lambda *_: asked.append(1) or [])
    assert q.main(["env", "bash"], {"HOST": host, "SHIM_API_KEY": "key"}) == 0
    assert "export ANTHROPIC_BASE_URL=" in capsys.readouterr().out
    assert not asked


def test_env_works_without_ollama_and_with_the_options_of_serve():
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = q.main(["env", "bash", "--port", "1", "--model", "m:1"],
                      {"OLLAMA_BASE_URL": "http://127.0.0.1:1"})
    assert code == 0
    assert "export ANTHROPIC_BASE_URL='http://127.0.0.1:1'" in output.getvalue()
    assert "export ANTHROPIC_MODEL='m:1'" in output.getvalue()
    assert "export CLAUDE_CODE_MAX_CONTEXT_TOKENS=" in output.getvalue()


def test_arguments_for_claude_without_the_dashes_are_explained(capsys):
    assert q.main(["claude", "-p", "hello"], {}) == 2
    assert "after --" in capsys.readouterr().err


# ------------------------------ client ------------------------------


def test_client_runs_claude_on_the_shim_of_host_and_port(place):
    with MockOllama(text("ok"), model="qwen3:8b") as ollama, running_shim(
            ollama.url, model="qwen3:8b") as shim:
        port = str(shim.port)
        done = run(place, "client", "--", "-p", "two words", "--", "-x", PORT=port)
        saw = seen(place)
        run(place, "client", PORT=port, OLLAMA_MODEL="mine:1b")
        assert seen(place)["env"]["ANTHROPIC_MODEL"] == "mine:1b"
    assert done.returncode == 7
    assert saw["env"]["ANTHROPIC_MODEL"] == "qwen3:8b"
    assert saw["args"] == [*DEFAULT, "-p", "two words", "--", "-x"]
    assert saw["env"]["ANTHROPIC_BASE_URL"] == f"http://127.0.0.1:{shim.port}"
    assert saw["health"]["ok"]
    assert saw["folder"] == str(place / "my project")
    assert "Nothing answers" not in done.stderr


def test_client_runs_claude_even_if_nothing_answers_and_says_so(place):
    done = run(place, "client", PORT=str(closed_port()))
    assert done.returncode == 7
    assert seen(place)["health"] is None
    assert "Nothing answers at http://127.0.0.1:" in done.stderr
    assert "launch-shim" in done.stderr


WHERE = [
    ("defaults", [], {}, "http://127.0.0.1:8000", "qwencode"),
    ("arguments", ["http://127.0.0.1:1/", "k1"], {"PORT": "2", "SHIM_API_KEY": "k2"},
     "http://127.0.0.1:1", "k1"),
    ("host and port", [], {"HOST": "::1", "PORT": "2"}, "http://[::1]:2", "qwencode"),
    ("every address", [], {"HOST": "0.0.0.0", "SHIM_API_KEY": "k2"}, "http://127.0.0.1:8000",
     "k2"),
    ("the environment", [], {"ANTHROPIC_BASE_URL": "http://127.0.0.1:3",
                             "ANTHROPIC_API_KEY": "k3"}, "http://127.0.0.1:3", "k3"),
]


@pytest.mark.parametrize(("arguments", "env", "url", "key"), [row[1:] for row in WHERE],
                         ids=[row[0] for row in WHERE])
def test_client_takes_arguments_then_environment_then_defaults(place, arguments, env, url, key):
    run(place, "client", *arguments, **env)
    saw = seen(place)["env"]
    assert (saw["ANTHROPIC_BASE_URL"], saw["ANTHROPIC_AUTH_TOKEN"]) == (url, key)
    assert "ANTHROPIC_API_KEY" not in saw or saw["ANTHROPIC_API_KEY"] == ""


@pytest.mark.parametrize("command", ["client", "claude"])
def test_a_missing_claude_is_told_with_what_to_install(place, command):
    (place / "bin" / "claude").unlink()
    done = run(place, command, PATH=str(place / "bin"))
    assert done.returncode == 127
    assert "npm install -g @anthropic-ai/claude-code" in done.stderr


def test_claude_is_found_where_its_installer_puts_it(place):
    folder = place / "home" / ".local" / "bin"
    folder.mkdir(parents=True)
    (place / "bin" / "claude").rename(folder / "claude")
    done = run(place, "client", PATH=str(place / "bin"))
    assert done.returncode == 7


def test_death_by_a_signal_is_told_as_shells_do(place):
    assert run(place, "client", "--", "die").returncode == 128 + signal.SIGKILL


# ------------------------------ claude ------------------------------


def test_claude_starts_a_shim_waits_for_the_model_and_stops_it(place):
    with MockOllama(text("ok"), model="qwen3:8b") as ollama:
        done = run(place, "claude", "--", "-p", "hi", OLLAMA_BASE_URL=ollama.url,
                   OLLAMA_MODEL="qwen3:8b", CLAUDE_CODE_USE_VERTEX="1")
        assert ollama.loads
    saw = seen(place)
    assert done.returncode == 7
    assert saw["args"] == [*DEFAULT, "-p", "hi"]
    assert saw["health"]["model"]["present"]
    assert saw["env"]["CLAUDE_CODE_MAX_CONTEXT_TOKENS"]
    assert "CLAUDE_CODE_USE_VERTEX" not in saw["env"]
    assert "CLAUDE_CODE_USE_VERTEX is left out" in done.stderr
    assert "qwen3:8b is ready after" in done.stderr
    assert "graphics memory" in done.stderr
    assert f"Status page {saw['env']['ANTHROPIC_BASE_URL']}/" in done.stderr
    port = int(saw["env"]["ANTHROPIC_BASE_URL"].rpartition(":")[2])
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_claude_joins_a_shim_that_serves_the_same(place):
    with MockOllama(text("ok"), model="qwen3:8b") as ollama:
        flags = {"model": "qwen3:8b", "log": "info", "warm": "on"}
        with running_shim(ollama.url, **flags) as shim:
            same = {"OLLAMA_BASE_URL": ollama.url, "OLLAMA_MODEL": "qwen3:8b",
                    "PORT": str(shim.port)}
            done = run(place, "claude", **same)
            assert done.returncode == 7
            assert seen(place)["env"]["ANTHROPIC_BASE_URL"] == shim.url
            assert f"Using the shim that runs at {shim.url}" in done.stderr
            run(place, "claude", **same, SHIM_MAX_TOOLS="3")
            assert seen(place)["env"]["ANTHROPIC_BASE_URL"] != shim.url
            assert shim.request("GET", "/health").status == 200


def test_claude_without_ollama_or_model_says_what_to_do(place):
    done = run(place, "claude", OLLAMA_BASE_URL=f"http://127.0.0.1:{closed_port()}")
    assert done.returncode == 1
    assert "ollama serve" in done.stderr
    with MockOllama(text("ok"), model="qwen3:8b") as ollama:
        done = run(place, "claude", OLLAMA_BASE_URL=ollama.url, OLLAMA_MODEL="gone:1b")
    assert done.returncode == 1
    assert "ollama pull gone:1b" in done.stderr
    assert not (place / "seen.json").exists()


def take_terminal():
    """Own the terminal, with its Ctrl-C: tests that run in the background ignore it."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def in_terminal(place, *arguments, **env):
    """Start the program on a pseudo-terminal; return the process and the terminal."""
    outside, inside = pty.openpty()
    fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    process = subprocess.Popen(
        [sys.executable, str(PROGRAM), *arguments], cwd=place / "my project",
        env=settings(place, TERM="xterm", **env), stdin=inside, stdout=inside, stderr=inside,
        start_new_session=True, preexec_fn=take_terminal)
    os.close(inside)
    return process, outside


def read_until(terminal, words, seconds=20):
    """Read the terminal until it showed words; return all, without spaces and colours."""
    shown, end = "", time.monotonic() + seconds
    while words not in ESCAPES.sub("", shown) and time.monotonic() < end:
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                shown += os.read(terminal, 65536).decode("utf-8", "replace")
            except OSError:
                break
    assert words in ESCAPES.sub("", shown), shown
    return ESCAPES.sub("", shown)


def until_quiet(terminal):
    """Read the terminal until it shows nothing new for half a second."""
    shown = ""
    while select.select([terminal], [], [], 0.5)[0]:
        shown += os.read(terminal, 65536).decode("utf-8", "replace")
    return ESCAPES.sub("", shown)


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's TIOCSCTTY")


@linux_only
@pytest.mark.parametrize(("send", "code"), [("ctrl-c", 42), ("sigterm", 43)])
def test_ctrl_c_and_sigterm_are_claude_s_to_answer(place, send, code):
    with MockOllama(text("ok"), model="qwen3:8b") as ollama:
        process, terminal = in_terminal(
            place, "claude", "--", "wait", OLLAMA_BASE_URL=ollama.url, OLLAMA_MODEL="qwen3:8b")
        shown = read_until(terminal, "waiting")
        if send == "ctrl-c":
            os.write(terminal, b"\x03")
        else:
            process.terminate()
        assert process.wait(20) == code
    os.close(terminal)
    assert "Traceback" not in shown


@linux_only
def test_a_slow_load_shows_its_seconds_and_ctrl_c_ends_it(place):
    with MockOllama(text("ok"), model="qwen3:8b", load_delay=30) as ollama:
        process, terminal = in_terminal(
            place, "claude", OLLAMA_BASE_URL=ollama.url, OLLAMA_MODEL="qwen3:8b")
        shown = read_until(terminal, "loadingqwen3:8b...2s")
        os.write(terminal, b"\x03")
        assert process.wait(10) == 130
    os.close(terminal)
    assert "Traceback" not in shown
    assert not (place / "seen.json").exists()


# ------------------------------ first run ------------------------------


def test_a_new_home_is_spared_the_welcome_that_needs_the_network(place):
    run(place, "client")
    made = json.loads((place / "home" / ".claude.json").read_text())
    assert made == {"hasCompletedOnboarding": True}


@pytest.mark.parametrize(("kept", "told"), [
    ('{"hasCompletedOnboarding": true, "a": 1}', False), ('{"a": 1}', True), ("odd", False)])
def test_what_the_user_has_is_never_touched(place, kept, told):
    path = place / "home" / ".claude.json"
    path.write_text(kept)
    done = run(place, "client")
    assert path.read_text() == kept
    assert ("hasCompletedOnboarding" in done.stderr) == told


def test_one_answer_needs_no_welcome(place):
    run(place, "client", "--", "-p", "hi")
    assert not (place / "home" / ".claude.json").exists()


# ------------------------------ models, explain, version ------------------------------


def test_models_tells_tools_windows_sizes_and_what_is_loaded(capsys):
    with MockOllama(models=["qwen3:8b", "plain:latest"]) as ollama:
        env = {"OLLAMA_BASE_URL": ollama.url, "OLLAMA_MODEL": "qwen3:8b", "PATH": ""}
        assert q.main(["models"], env) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["MODEL", "SIZE", "WINDOW", "TOOLS", "LOADED"]
    assert lines[1].split() == ["*qwen3:8b", "0.2", "GB", "32k", "yes"]
    assert lines[2].split() == ["plain:latest", "0.2", "GB", "32k", "no"]
    assert lines[3].endswith("Recommended: qwen3:8b")


def test_models_without_ollama_says_what_to_do(capsys):
    assert q.main(["models"], {"OLLAMA_BASE_URL": f"http://127.0.0.1:{closed_port()}"}) == 1
    assert "ollama serve" in capsys.readouterr().err


def row(name, gigabytes, *capabilities):
    return q.ModelFacts(name, capabilities=frozenset(capabilities)), int(gigabytes * 1e9)


ROWS = [row("qwen3:4b", 2.5, "tools"), row("qwen3:14b", 9, "tools"), row("llama3:8b", 5, "tools"),
        row("qwen3-coder:30b", 19, "tools"), row("qwen3-embed", 1)]


@pytest.mark.parametrize(("rows", "gigabytes", "wanted"), [
    (ROWS, 0, "qwen3-coder:30b"), (ROWS, 24, "qwen3-coder:30b"), (ROWS, 12, "qwen3:14b"),
    (ROWS, 4, "qwen3:4b"), (ROWS, 1, ""), (ROWS[2:3], 0, "llama3:8b"), (ROWS[4:], 0, ""),
    ([], 0, "")])
def test_the_recommended_model_has_tools_and_fits(rows, gigabytes, wanted):
    assert q.recommend(rows, gigabytes * 1e9) == wanted


BODY = {"model": "m", "max_tokens": 9, "system": "Be brief.", "messages": [
    {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "what is this?"}], "tools": [
        {"name": name, "description": name, "input_schema": {"type": "object"}}
        for name in ("Bash", "Read", "Edit", "Write", "Agent", "DeferredToolPlaceholder")]}


def explained(tmp_path, body, capsys, **env):
    path = tmp_path / "body.json"
    path.write_text(json.dumps(body))
    env = {"OLLAMA_BASE_URL": f"http://127.0.0.1:{closed_port()}", **env}
    assert q.main(["explain", str(path)], env) == 0
    return json.loads(capsys.readouterr().out)


def test_explain_shows_body_tools_tokens_and_prefix_without_ollama(tmp_path, capsys):
    told = explained(tmp_path, BODY, capsys, SHIM_MAX_TOOLS="4")
    assert sorted(told["tools"]["sent"]) == ["Bash", "Edit", "Read", "Write"]
    assert told["tools"]["dropped"].keys() == {"Agent", "DeferredToolPlaceholder"}
    assert "SHIM_MAX_TOOLS=4" in told["tools"]["dropped"]["Agent"]
    assert [one["role"] for one in told["body"]["messages"]] == [
        "system", "user", "assistant", "user"]
    assert told["body"]["options"]["num_predict"] == 9
    assert told["tokens"]["tools"] > 0
    assert told["prefix"]["known_from_the_last_turn"] > 0
    assert told["prefix"]["new"] > 0


def test_explain_knows_what_tool_choice_none_does(tmp_path, capsys):
    told = explained(tmp_path, {**BODY, "tool_choice": {"type": "none"}}, capsys)
    assert told["tools"]["sent"] == []
    assert told["tools"]["dropped"]["Bash"] == "tool_choice is none"


@pytest.mark.parametrize(("content", "said"), [
    ("{", "body.json"), ('{"messages": 5}', "messages"), (None, "No such file")])
def test_explain_tells_what_is_wrong_with_a_body(tmp_path, capsys, content, said):
    path = tmp_path / "body.json"
    if content is not None:
        path.write_text(content)
    assert q.main(["explain", str(path)], {}) == 2
    assert said in capsys.readouterr().err


def test_the_version(capsys):
    assert q.main(["--version"], {}) == 0
    assert capsys.readouterr().out == f"qwencode {q.__version__}\n"


# ------------------------------ the real Claude Code ------------------------------

@pytest.fixture(params=VERSIONS)
def claude_code(request, place):
    """The real Claude Code in the place of the one that only looks."""
    (place / "bin" / "claude").unlink()
    (place / "bin" / "claude").symlink_to(os.path.realpath(program_of(request.param)))
    return place


def test_the_real_claude_code_answers_with_one_command(claude_code):
    with MockOllama(text("Hello from the model."), model="qwen3:8b") as ollama:
        done = run(claude_code, "claude", "--", "-p", "say hello", OLLAMA_BASE_URL=ollama.url,
                   OLLAMA_MODEL="qwen3:8b", IS_SANDBOX="1", TERM="xterm")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "Hello from the model."


@linux_only
def test_a_first_run_without_network_goes_from_trust_to_answer_to_ctrl_c(claude_code):
    """No welcome and no key dialog; only the question that is the user's to answer."""
    with MockOllama(text("Hello from the model."), model="qwen3:8b") as ollama:
        process, terminal = in_terminal(
            claude_code, "claude", OLLAMA_BASE_URL=ollama.url, OLLAMA_MODEL="qwen3:8b",
            IS_SANDBOX="1")
        try:
            asked = read_until(terminal, "Entertoconfirm", 40) + until_quiet(terminal)
            chosen = asked.rpartition("\u276f")[2]
            for _ in range(10):
                if "Yes" in chosen[:6]:
                    break
                os.write(terminal, b"\x1b[B")
                chosen = until_quiet(terminal).rpartition("\u276f")[2] or chosen
            os.write(terminal, b"\r")
            read_until(terminal, "forshortcuts", 40)
            os.write(terminal, b"say hello please")
            read_until(terminal, "please")
            os.write(terminal, b"\r")
            read_until(terminal, "Hellofromthemodel.", 40)
            os.write(terminal, b"\x03")
            read_until(terminal, "again")
            os.write(terminal, b"\x03")
            assert process.wait(20) == 0
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            os.close(terminal)
    assert "customAPIkey" not in asked


@linux_only
def test_doctor_in_a_terminal_is_coloured_and_finds_the_real_claude_code(claude_code):
    with MockOllama(text("no"), model="qwen3:8b") as ollama:
        process, terminal = in_terminal(
            claude_code, "doctor", OLLAMA_BASE_URL=ollama.url, OLLAMA_MODEL="qwen3:8b", PORT="0")
        shown = read_until(terminal, "sendspromptselsewhere", 60)
        assert process.wait(20) == 1
    os.close(terminal)
    assert "claude2.1." in shown
    assert "wrotewords" in shown
