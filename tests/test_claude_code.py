"""The real Claude Code CLI against the shim and a mock of Ollama, in both versions.

QWENCODE_CLAUDE_330 and QWENCODE_CLAUDE_197 name the programs; without them those that
.ci/run has installed are used. Each test has a home, a project and a shim of its own.
"""
import base64
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Thread
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mock_ollama import (  # noqa: E402
    MockOllama, Model, call, cut, delay, done, error_line, model_text, reset, text, thinking,
)

VERSIONS = ("2.1.330", "2.1.197")
CACHE = Path(os.environ.get("QWENCODE_CI_CACHE")
             or Path(tempfile.gettempdir()) / f"qwencode-ci-{getattr(os, 'getuid', int)()}")
MODEL = "qwen3-coder:30b"
MAX_FIRST_BODY_BYTES = 16_000
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5E"
    "rkJggg==")
MCP_SERVER = r"""
import json, sys
SCHEMA = {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
          "required": ["a", "b"]}
for line in sys.stdin:
    asked = json.loads(line)
    if "id" not in asked:
        continue
    method, result = asked["method"], {}
    if method == "initialize":
        result = {"protocolVersion": asked["params"]["protocolVersion"],
                  "capabilities": {"tools": {}}, "serverInfo": {"name": "sums", "version": "1"},
                  "instructions": "SUMS: always add with this server."}
    elif method == "tools/list":
        result = {"tools": [{"name": "add", "description": "Add.", "inputSchema": SCHEMA},
                            {"name": "sub", "description": "Subtract.", "inputSchema": SCHEMA}]}
    elif method == "tools/call":
        given = asked["params"]["arguments"]
        result = {"content": [{"type": "text", "text": f"sum={given['a'] + given['b']}"}]}
    print(json.dumps({"jsonrpc": "2.0", "id": asked["id"], "result": result}), flush=True)
"""


def program_of(version):
    """Path of the CLI of this version; skips the test where there is none."""
    named = os.environ.get("QWENCODE_CLAUDE_" + version.rpartition(".")[2])
    installed = CACHE / f"claude-{version}" / "node_modules" / ".bin" / "claude"
    for path in filter(None, (named, installed, shutil.which("claude"))):
        with suppress(OSError, subprocess.TimeoutExpired):
            said = subprocess.run([str(path), "--version"], capture_output=True, text=True,
                                  timeout=30, stdin=subprocess.DEVNULL, check=False)
            if said.stdout.startswith(version):
                return str(path)
    pytest.skip(f"no Claude Code {version}: .ci/run installs it where npm can supply it")


@pytest.fixture(scope="session")
def programs():
    return {}


@pytest.fixture(params=VERSIONS)
def claude(request, programs):
    if request.param not in programs:
        programs[request.param] = program_of(request.param)
    return programs[request.param]


class Said(NamedTuple):
    code: int
    out: str
    err: str
    seconds: float

    def events(self):
        return [json.loads(line) for line in self.out.splitlines() if line.startswith("{")]


class Place:
    """A home, a project, a mock and a shim; ask() runs the CLI in it."""

    def __init__(self, stack, folder, claude):
        self.stack, self.claude = stack, claude
        self.home, self.project = folder / "home", folder / "pro ject"
        self.home.mkdir(parents=True)
        self.project.mkdir()
        self.url = ""

    def serve(self, replies, model=MODEL, upstream="", env=None, **settings):
        """Start a mock that plays the replies, and the shim in front of it."""
        if isinstance(model, str):
            model = Model(model, context=262_144)
        mock = self.stack.enter_context(MockOllama(replies, model=model, **settings))
        self.model = mock.model
        self.shim({"OLLAMA_BASE_URL": upstream or mock.url, **(env or {})})
        return mock

    def shim(self, env):
        log = open(self.home / "shim.log", "w")  # noqa: SIM115
        self.stack.callback(log.close)
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "qwencode.py"), "--port", "0"], stdout=subprocess.PIPE,
            stderr=log, text=True, env={"PATH": os.environ["PATH"], "OLLAMA_MODEL": self.model,
                                        "OLLAMA_NUM_CTX": "131072", "SHIM_LOG": "debug",
                                        "SHIM_WARM": "off", **env})
        self.stack.callback(self.end, process)
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:[0-9]+", line)
        assert found, line + (self.home / "shim.log").read_text()
        self.url = found.group()
        Thread(target=process.stdout.read, daemon=True).start()

    @staticmethod
    def end(process):
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)

    def write(self, name, content):
        path = self.project / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def read(self, name):
        return (self.project / name).read_text(encoding="utf-8")

    def ask(self, prompt, *arguments, mode="bypassPermissions", timeout=90, **env):
        """Run `claude -p PROMPT` and return what it said."""
        base = {
            "HOME": str(self.home), "PATH": os.environ["PATH"], "TERM": "xterm",
            "IS_SANDBOX": "1", "ANTHROPIC_BASE_URL": self.url, "ANTHROPIC_API_KEY": "dummy",
            "ANTHROPIC_MODEL": self.model, "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        }
        began = time.monotonic()
        process = subprocess.Popen(
            [self.claude, "-p", prompt, "--permission-mode", mode, *arguments],
            env={**base, **env}, cwd=self.project, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            pytest.fail(f"the CLI did not end in {timeout} s: {out[-500:]} {err[-500:]}")
        return Said(process.returncode, out, err, time.monotonic() - began)


    def type(self, words, awaited, timeout=40):
        """Start the CLI in a pseudo-terminal, type words, return the screen's bytes as text."""
        pty, select = pytest.importorskip("pty"), pytest.importorskip("select")
        (self.home / ".claude.json").write_text(json.dumps({
            "hasCompletedOnboarding": True,
            "customApiKeyResponses": {"approved": ["dummy"], "rejected": []},
            "projects": {str(self.project.resolve()): {"hasTrustDialogAccepted": True}}}))
        pid, terminal = pty.fork()
        if pid == 0:
            os.chdir(self.project)
            os.execve(self.claude, [self.claude, "--permission-mode", "default"], {
                "HOME": str(self.home), "PATH": os.environ["PATH"], "TERM": "xterm",
                "ANTHROPIC_BASE_URL": self.url, "ANTHROPIC_API_KEY": "dummy",
                "ANTHROPIC_MODEL": self.model, "DISABLE_AUTOUPDATER": "1"})
        shown, until, typed = "", time.monotonic() + timeout, False
        try:
            while time.monotonic() < until and plain(awaited) not in plain(shown):
                if select.select([terminal], [], [], 1.0)[0]:
                    shown += os.read(terminal, 65536).decode(errors="replace")
                elif typed:  # Enter again where the first came too early: on nothing it does nothing
                    os.write(terminal, b"\r")
                elif "❯" in shown:
                    typed = bool(os.write(terminal, words.encode()))
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(terminal)
        return plain(shown)


def plain(screen):
    """A terminal's output without control sequences and blanks, which it may draw by moves."""
    return re.sub(r"\s+|\x1b(?:\[[0-9;?>=]*[a-zA-Z]|\][^\x07]*\x07|.)", "", screen)


@pytest.fixture()
def place(tmp_path, claude):
    with ExitStack() as stack:
        yield Place(stack, tmp_path, claude)


def body_of(turn):
    return turn.body if isinstance(turn.body, dict) else json.loads(turn.raw)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as held:
        return held.getsockname()[1]


# ------------------------------ text ------------------------------

ANSWERS = [
    ("plain", "Four."),
    ("unicode", "naïve – 日本語 🎉 \U0001f468\u200d\U0001f469\u200d\U0001f467 ¡olé!"),
    ("markup that is only text", "Use `<tool_call>` here & a<b=c> there: {\"name\": 1}"),
    ("many lines", "first\n\n  indented\n\tx\n" + "line\n" * 50 + "last"),
]


@pytest.mark.parametrize("answer", [row[1] for row in ANSWERS], ids=[row[0] for row in ANSWERS])
def test_an_answer_is_shown_as_it_was_written(place, answer):
    place.serve([text(answer)])
    said = place.ask("say something")
    assert (said.out, said.code) == (answer + "\n", 0)


def test_the_users_words_and_rules_reach_the_model(place):
    place.write("CLAUDE.md", "RULE ONE: answer in Latin.\n\nAvailable agent types: none\n")
    place.write("notes.txt", "NOTE-7 <b> & \"q\"\n")
    mock = place.serve([text("ita")])
    assert place.ask("what is in @notes.txt, naïve one?").code == 0
    prompt = mock.turns[0].prompt
    for words in ("RULE ONE: answer in Latin.\n\nAvailable agent types: none",
                  "NOTE-7 <b> & \"q\"", "naïve one?", str(place.project)):
        assert words in prompt


def test_a_session_is_continued(place):
    mock = place.serve([text("I am the first answer."), text("And I the second.")])
    assert place.ask("first question").code == 0
    assert place.ask("second question", "--continue").out == "And I the second.\n"
    assert "I am the first answer." in mock.turns[1].prompt


def test_text_streams_as_it_is_written(place):
    place.serve([text("one two ") + delay(0.5) + text("three four")])
    said = place.ask("count", "--output-format", "stream-json", "--verbose",
                     "--include-partial-messages")
    pieces = [event["event"]["delta"]["text"] for event in said.events()
              if event["type"] == "stream_event"
              and event["event"].get("delta", {}).get("type") == "text_delta"]
    assert "".join(pieces) == "one two three four"
    assert len(pieces) > 1


# ------------------------------ tools ------------------------------


def test_the_native_file_tools_work(place):
    mock = place.serve([
        call("Write", {"file_path": "n.txt", "content": "a<b=c> & \"q\"\n\ttab\n"}),
        call("Read", {"file_path": "n.txt"}),
        call("Edit", {"file_path": "n.txt", "old_string": "tab", "new_string": "TAB"}),
        call("Bash", {"command": "cat n.txt; exit 3", "description": "Show it"}),
        text("All done."),
    ])
    said = place.ask("work")
    assert (said.out, said.code) == ("All done.\n", 0)
    assert place.read("n.txt") == "a<b=c> & \"q\"\n\tTAB\n"
    assert len(mock.turns) == 5
    last = mock.turns[4].prompt
    assert "1\ta<b=c> & \"q\"" in last
    assert "Exit code 3" in last


def test_parallel_results_come_back_in_the_order_of_the_calls(place):
    mock = place.serve([
        call("Bash", {"command": "sleep 0.8; echo SLOW-1", "description": "a"})
        + call("Bash", {"command": "echo QUICK-2", "description": "b"}),
        text("Both."),
    ])
    assert place.ask("run both").out == "Both.\n"
    prompt = mock.turns[1].prompt
    results = prompt[prompt.rindex("echo QUICK-2"):]
    assert -1 < results.find("SLOW-1") < results.rfind("QUICK-2")


def test_text_before_a_call_is_kept(place):
    mock = place.serve([text("I look first.\n\n") + call("Bash", {"command": "echo seen"}),
                        text("Fine.")])
    said = place.ask("look", "--output-format", "stream-json", "--verbose")
    assert said.code == 0
    texts = [block["text"] for event in said.events() if event["type"] == "assistant"
             for block in event["message"]["content"] if block["type"] == "text"]
    assert [words.strip() for words in texts] == ["I look first.", "Fine."]
    assert "I look first." in mock.turns[1].prompt
    assert "seen" in mock.turns[1].prompt


def test_a_picture_reaches_a_model_that_sees(place):
    place.write("b.png", PNG)
    model = Model("qwen3-coder:30b", context=262_144,
                  capabilities=("completion", "tools", "vision"))
    mock = place.serve([call("Read", {"file_path": "b.png"}), text("A dot.")], model=model)
    assert place.ask("look at it").out == "A dot.\n"
    pictures = [picture for message in body_of(mock.turns[1])["messages"]
                for picture in message.get("images") or ()]
    assert len(pictures) == 1
    assert base64.b64decode(pictures[0])[:4] == PNG[:4]


def test_a_picture_is_told_to_a_model_that_does_not_see(place):
    place.write("b.png", PNG)
    mock = place.serve([call("Read", {"file_path": "b.png"}), text("I cannot see it.")])
    assert place.ask("look at it").out == "I cannot see it.\n"
    assert base64.b64encode(PNG).decode()[:40] not in mock.turns[1].prompt


def test_a_long_file_is_counted_and_read(place):
    place.write("long.txt", "".join(f"line {n} of a long file\n" for n in range(1900)))
    mock = place.serve([call("Read", {"file_path": "long.txt"}), text("Long.")])
    assert place.ask("read it").out == "Long.\n"
    assert "line 1000 of a long file" in mock.turns[1].prompt


def test_an_mcp_tool_inline(place):
    config = place.write("mcp.json", json.dumps({"mcpServers": {"sums": {
        "command": sys.executable, "args": [str(place.write("mcp.py", MCP_SERVER))]}}}))
    mock = place.serve([call("mcp__sums__add", {"a": 2, "b": 3}), text("Five.")])
    said = place.ask("add", "--mcp-config", str(config), "--strict-mcp-config",
                     CLAUDE_CODE_DISABLE_EXPERIMENTAL_BETAS="1")
    assert said.out == "Five.\n"
    assert "sum=5" in mock.turns[1].prompt
    assert "SUMS: always add with this server." in mock.turns[0].prompt
    assert "mcp__sums__add" in mock.turns[0].prompt


def test_an_mcp_tool_that_is_searched_for(place):
    config = place.write("mcp.json", json.dumps({"mcpServers": {"sums": {
        "command": sys.executable, "args": [str(place.write("mcp.py", MCP_SERVER))]}}}))
    mock = place.serve([call("ToolSearch", {"query": "select:mcp__sums__add", "max_results": 3}),
                        call("mcp__sums__add", {"a": 2, "b": 3}), text("Five.")])
    said = place.ask("add", "--mcp-config", str(config), "--strict-mcp-config",
                     ENABLE_TOOL_SEARCH="1")  # the default of 2.1.330 only
    assert said.out == "Five.\n"
    assert "sum=5" in mock.turns[2].prompt
    assert "DeferredToolPlaceholder" not in "".join(turn.prompt for turn in mock.turns)


def test_a_tool_that_is_called_before_it_was_searched_for(place):
    mock = place.serve([call("CronList", {}), call("CronList", {}), text("None.")])
    assert place.ask("what is scheduled?", ENABLE_TOOL_SEARCH="1").out == "None.\n"
    assert "CronList is loaded now" in mock.turns[1].prompt
    assert "No scheduled jobs" in mock.turns[2].prompt


@pytest.mark.parametrize("reply", [call("StructuredOutput", {"answer": 4}),
                                   text('{"answer": 4}')], ids=["handed in", "written"])
def test_an_answer_in_a_format_is_given(place, reply):
    place.serve([reply, text("Four.")])
    said = place.ask("2+2?", "--output-format", "stream-json", "--verbose", "--json-schema",
                     json.dumps({"type": "object", "properties": {"answer": {"type": "number"}},
                                 "required": ["answer"], "additionalProperties": False}))
    assert said.events()[-1]["structured_output"] == {"answer": 4}


def test_a_subagent_answers(place):
    def reply(request):
        asked = request.prompt.rpartition("<|im_start|>user")[2]
        if "FIND THE ANSWER" in asked and "task-notification" not in asked:
            return text("The answer is 42.")
        if "42" in request.prompt:
            return text("It found 42.")
        if "Async agent launched" in request.prompt:
            return text("Waiting.")
        return call("Agent", {"description": "find", "prompt": "FIND THE ANSWER",
                              "subagent_type": "general-purpose"})
    place.serve(reply)
    said = place.ask("use a subagent")
    assert said.code == 0
    assert said.out.endswith("It found 42.\n")


def test_plan_mode_refuses_and_the_model_hears_it(place):
    mock = place.serve([call("Write", {"file_path": "z.txt", "content": "x"}), text("As planned.")])
    assert place.ask("plan it", mode="plan").out == "As planned.\n"
    assert not (place.project / "z.txt").exists()
    assert "Plan mode is active" in mock.turns[0].prompt
    assert "plan mode" in mock.turns[1].prompt.rpartition("z.txt")[2]


@pytest.mark.parametrize("arguments", [["--bare"], ["--tools", "Bash,Read,Edit,Write"]],
                         ids=["bare", "four tools"])
def test_a_smaller_client_works(place, arguments):
    place.write("a.txt", "hello\n")
    mock = place.serve([call("Read", {"file_path": "a.txt"}), text("It says hello.")])
    assert place.ask("read a.txt", *arguments).out == "It says hello.\n"
    assert "hello" in mock.turns[1].prompt


def test_a_large_file_lands_byte_for_byte(place):
    content = "".join(f"if a<b={n}> and \"c\\n\" & d:\n\tprint('{n} é')\n" for n in range(1500))
    place.serve([call("Write", {"file_path": "big.py", "content": content}), text("Big.")])
    assert place.ask("write it").out == "Big.\n"
    assert place.read("big.py") == content


def test_a_call_that_is_written_slowly_lands_byte_for_byte(place):
    content = "".join(f"row {n}: a<b=c> && \"d\"\n" for n in range(60))
    place.serve([call("Write", {"file_path": "slow.txt", "content": content}),
                 text("Slow.")], token_delay=0.01)
    said = place.ask("write it", "--output-format", "stream-json", "--verbose",
                     "--include-partial-messages")
    assert said.events()[-1]["result"] == "Slow."
    assert place.read("slow.txt") == content
    pieces = [event["event"]["delta"]["partial_json"] for event in said.events()
              if event["type"] == "stream_event"
              and event["event"].get("delta", {}).get("type") == "input_json_delta"]
    assert len([piece for piece in pieces if piece]) > 3
    assert json.loads("".join(pieces))["content"] == content


def test_reminders_of_a_long_session_are_survived(place):
    calls = [call("Bash", {"command": f"echo {n}", "description": "Say it"}) for n in range(13)]
    mock = place.serve([*calls, text("Thirteen.")])
    assert place.ask("count").out == "Thirteen.\n"
    assert len(mock.turns) == 14
    for before, after in zip(mock.turns, mock.turns[1:]):
        assert after.prompt.startswith(before.prompt)
    assert "haven't been used" not in mock.turns[-1].prompt  # of tools that were not forwarded
    assert "<system-reminder>\n\n" not in mock.turns[-1].prompt


# ------------------------------ thinking ------------------------------


def test_thinking_is_shown_and_comes_back(place):
    mock = place.serve([thinking("I had better look.") + call("Bash", {"command": "echo seen"}),
                        thinking("Now I know.") + text("Seen.")], model="qwen3.5:9b")
    said = place.ask("think", "--output-format", "stream-json", "--verbose")
    assert said.code == 0
    thoughts = [block["thinking"] for event in said.events() if event["type"] == "assistant"
                for block in event["message"]["content"] if block["type"] == "thinking"]
    assert [thought.strip() for thought in thoughts] == ["I had better look.", "Now I know."]
    assert said.events()[-1]["result"] == "Seen."
    assert "I had better look." in mock.turns[1].prompt


# ------------------------------ failures ------------------------------


def test_without_ollama_the_user_is_told_at_once(place):
    place.serve([text("never")], upstream=f"http://127.0.0.1:{free_port()}")
    said = place.ask("hello")
    assert said.code == 1
    assert "Ollama" in said.out
    assert said.seconds < 5


def test_a_missing_model_is_told_with_what_to_do(place):
    place.serve([text("never")], env={"OLLAMA_MODEL": "not-here:7b"})
    said = place.ask("hello")
    assert said.code == 1
    assert "ollama pull not-here:7b" in said.out
    assert said.seconds < 8


FAILURES = [
    ("an error of the model in mid-stream", text("Half an ans") + error_line("runner crashed"),
     "runner crashed"),
    ("a stream that breaks off", text("Half an ans") + cut(), ""),
    ("a connection that is reset", text("Half an ans") + reset(), ""),
    ("an answer that ends without an end", text("Half an ans") + cut(clean=True), ""),
]


@pytest.mark.parametrize(("reply", "words"), [row[1:] for row in FAILURES],
                         ids=[row[0] for row in FAILURES])
def test_a_broken_answer_never_passes_for_a_whole_one(place, reply, words):
    place.serve([reply])
    said = place.ask("hello", CLAUDE_CODE_MAX_RETRIES="1")
    assert said.code == 1
    assert "API Error" in said.out
    assert words in said.out


def test_twenty_silent_seconds_before_the_first_token(tmp_path, programs):
    """Both versions at once: the wait is the same."""
    for version in VERSIONS:
        programs.setdefault(version, program_of(version))
    with ExitStack() as stack:
        said = {}

        def wait(version):
            place = Place(stack, tmp_path / version, programs[version])
            mock = place.serve([delay(20) + text("At last.")])
            said[version] = (place.ask("patience").out, len(mock.turns))

        threads = [Thread(target=wait, args=(version,)) for version in VERSIONS]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert said == {version: ("At last.\n", 1) for version in VERSIONS}


def test_an_answer_that_hits_the_limit_goes_on(place):
    mock = place.serve([text("First half") + done("length"), text(" second half.")])
    said = place.ask("long", "--output-format", "stream-json", "--verbose")
    assert said.code == 0
    assert len(mock.turns) == 2
    assert "First half" in mock.turns[1].prompt


# ------------------------------ the slim prompt ------------------------------


@pytest.mark.parametrize("betas", ["0", "1"], ids=["default", "tools inline"])
def test_the_first_body_is_small(place, betas):
    mock = place.serve([text("ok")])
    assert place.ask("hello", CLAUDE_CODE_DISABLE_EXPERIMENTAL_BETAS=betas).code == 0
    assert len(mock.turns[0].raw) <= MAX_FIRST_BODY_BYTES


def test_each_turn_only_adds_to_the_one_before(place):
    calls = [call("Bash", {"command": f"echo {n}", "description": f"Say {n}"}) for n in range(5)]
    mock = place.serve([*calls, text("Counted.")])
    assert place.ask("count to five").out == "Counted.\n"
    for before, after in zip(mock.turns, mock.turns[1:]):
        assert after.prompt.startswith(before.prompt)


def test_full_sends_what_the_client_sent(place):
    mock = place.serve([text("ok")], env={"SHIM_PROMPT": "full", "SHIM_MAX_TOOLS": "0"})
    assert place.ask("hello").code == 0
    assert len(mock.turns[0].raw) > 2 * MAX_FIRST_BODY_BYTES


# ------------------------------ calls in text ------------------------------

WRITE = {"file_path": "n.txt", "content": "a<b=c>\n"}
LEAKS = [
    ("bare JSON", json.dumps({"name": "Write", "arguments": WRITE}), "qwen3-coder:30b"),
    ("fenced JSON after prose", "I'll write it now:\n\n```json\n"
     + json.dumps({"name": "Write", "arguments": WRITE}, indent=2) + "\n```", "c-import:latest"),
    ("XML without its opening tag", "<function=Write>\n<parameter=file_path>\nn.txt\n</parameter>"
     "\n<parameter=content>\na<b=c>\n\n</parameter>\n</function>\n</tool_call>",
     "qwen3-coder:30b"),
    ("other names", json.dumps({"tool": "write_file",
                                "input": {"path": "n.txt", "contents": "a<b=c>\n"}}),
     "qwen2.5-coder:7b"),
    ("arguments as a string", "<tool_call>\n" + json.dumps(
        {"name": "Write", "arguments": json.dumps(WRITE)}) + "\n</tool_call>", "qwen2.5-coder:7b"),
]


@pytest.mark.parametrize(("leak", "model"), [row[1:] for row in LEAKS],
                         ids=[row[0] for row in LEAKS])
def test_a_call_that_was_written_as_text_runs(place, leak, model):
    place.serve([model_text(leak), text("Written.")], model=model)
    assert place.ask("write n.txt").out == "Written.\n"
    assert place.read("n.txt") == "a<b=c>\n"


def test_a_call_hidden_in_thinking_runs(place):
    leak = "<tool_call>\n" + json.dumps({"name": "Write", "arguments": WRITE}) + "\n</tool_call>"
    place.serve([thinking("I should write it now.\n" + leak),
                 thinking("It is there.") + text("Written.")], model="qwen3.5:9b")
    assert place.ask("write n.txt").out == "Written.\n"
    assert place.read("n.txt") == "a<b=c>\n"


def test_an_example_of_a_call_stays_text(place):
    example = ("A tool call looks like this, for example:\n\n```json\n"
               '{"name": "Write", "arguments": {"file_path": "n.txt", "content": "x"}}\n```\n'
               "Do not run it.")
    place.serve([text(example)])
    assert place.ask("what does a tool call look like?").out == example + "\n"
    assert not (place.project / "n.txt").exists()


# ------------------------------ asked or described, not called ------------------------------

ASKED = [
    ("a new folder", {}, "Create a directory named 'my data'", "I'll create the directory now.",
     lambda place: (place.project / "my data").is_dir()),
    ("a new file that the model described", {}, "Create hello.py that prints hi",
     "I'll create `hello.py` with the following content:\n\n```python\nprint('hi')\n```",
     lambda place: place.read("hello.py").rstrip("\n") == "print('hi')"),
    ("an append", {"notes.txt": "one\n"}, "Append the text 'two' to notes.txt",
     "I will append it.", lambda place: place.read("notes.txt").rstrip("\n") == "one\ntwo"),
    ("a replace", {"c.txt": "red red\n"}, "Replace 'red' with 'blue' in c.txt",
     "Sure, replacing it.", lambda place: place.read("c.txt") == "blue blue\n"),
    ("an insert", {"n.txt": "one\nthree\n"}, "Insert the line 'two' before 'three' in n.txt",
     "Inserting the line.", lambda place: place.read("n.txt") == "one\ntwo\nthree\n"),
    ("a line changed", {"n.txt": "a=10\na=1"}, "Replace the line 'a=1' with 'a=2' in n.txt",
     "Replacing the line.", lambda place: place.read("n.txt") == "a=10\na=2"),
    ("a line removed", {"n.txt": "ab\nb\nc"}, "Remove the line 'b' from n.txt",
     "Removing the line.", lambda place: place.read("n.txt") == "ab\nc"),
    ("a rename", {"a.txt": "A\n"}, "Rename a.txt to b.txt", "I'll rename the file.",
     lambda place: place.read("b.txt") == "A\n" and not (place.project / "a.txt").exists()),
    ("a delete", {"old.txt": "x", "new.txt": "y"}, "Delete the file old.txt",
     "I'll delete old.txt.", lambda place: not (place.project / "old.txt").exists()
     and place.read("new.txt") == "y"),
]


MODES = [("acceptEdits", row) for row in ASKED] + [("bypassPermissions", row) for row in ASKED[:2]]


@pytest.mark.parametrize(("mode", "asked"), MODES, ids=[f"{mode}, {row[0]}" for mode, row in MODES])
def test_what_was_asked_for_is_done_once(place, mode, asked):
    _, files, prompt, answer, holds = asked
    for name, content in files.items():
        place.write(name, content)
    mock = place.serve([text(answer), text("It is done.")])
    said = place.ask(prompt, mode=mode)
    assert (said.out, said.code) == ("It is done.\n", 0)
    assert holds(place)
    assert len(mock.turns) == 2
    assert answer.partition("\n")[0] in mock.turns[1].prompt


def test_a_rescue_that_fails_is_told_and_changes_nothing(place):
    place.write("c.txt", "red\n")
    mock = place.serve([text("Replacing it."), text("That text is not there.")])
    said = place.ask("Replace 'green' with 'blue' in c.txt", mode="acceptEdits")
    assert said.out == "That text is not there.\n"
    assert place.read("c.txt") == "red\n"
    assert "verification failed" in mock.turns[1].prompt.rpartition("Replacing it.")[2]


def test_a_question_stays_a_question(place):
    place.write("c.txt", "red\n")
    answer = "Use `sed -i s/red/blue/ c.txt`, or your editor."
    mock = place.serve([text(answer)])
    assert place.ask("How would I replace 'red' with 'blue' in c.txt?").out == answer + "\n"
    assert place.read("c.txt") == "red\n"
    assert len(mock.turns) == 1


# ------------------------------ the launchers ------------------------------


@pytest.mark.skipif(os.name == "nt", reason="needs a Unix shell")
def test_the_launchers_bring_client_and_shim_together(place, tmp_path):
    mock = place.serve([call("Bash", {"command": "echo launched > l.txt"}), text("Launched.")])
    port = place.url.rpartition(":")[2]
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "claude").symlink_to(place.claude)
    (programs / "python3").symlink_to(sys.executable)
    said = subprocess.run(
        [ROOT / "launch-client.sh", "--", "-p", "go on", "--dangerously-skip-permissions"],
        cwd=place.project, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
        env={"HOME": str(place.home), "PATH": f"{programs}:{os.environ['PATH']}", "PORT": port,
             "IS_SANDBOX": "1", "OLLAMA_MODEL": place.model})
    assert said.returncode == 0, said.stdout + said.stderr
    assert "Launched." in said.stdout
    assert place.read("l.txt") == "launched\n"
    assert len(mock.turns) == 2


def test_one_command_starts_both(place):
    mock = place.serve([text("Both are here.")])
    said = subprocess.run(
        [sys.executable, str(ROOT / "qwencode.py"), "claude", "--port", "0", "--", "-p", "hello"],
        cwd=place.project, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
        env={"HOME": str(place.home), "OLLAMA_BASE_URL": mock.url, "OLLAMA_MODEL": place.model,
             "PATH": f"{Path(place.claude).parent}{os.pathsep}{os.environ['PATH']}"})
    assert said.returncode == 0, said.stdout + said.stderr
    assert "Both are here." in said.stdout


# ------------------------------ the window ------------------------------


@pytest.mark.parametrize("window", [16_384, 32_768])
def test_a_session_that_outgrows_the_window_compacts_and_ends(place, window):
    steps = iter(range(1, 100))

    def reply(request):
        if "Respond with TEXT ONLY" in request.prompt[-9000:]:
            return text("<analysis>a</analysis>\n<summary>Some steps ran.</summary>")
        step = next(steps)
        if step > 9:
            return text("Finished.")
        return call("Bash", {"description": "Show a log", "command":
                             f"yes 'step {step} wrote one line of its log' | head -n {window // 80}"})

    mock = place.serve(reply, env={"OLLAMA_NUM_CTX": str(window)})
    said = place.ask("run nine steps", timeout=150)
    assert (said.out, said.code) == ("Finished.\n", 0)
    assert any("Respond with TEXT ONLY" in turn.prompt for turn in mock.turns)
    assert all(turn.status == 200 for turn in mock.turns)


def test_a_window_is_chosen_that_holds_the_client(place):
    mock = place.serve([call("Bash", {"command": "echo 1"}), text("Fits.")],
                       env={"OLLAMA_NUM_CTX": ""})
    assert place.ask("hello").out == "Fits.\n"
    windows = {body_of(turn)["options"]["num_ctx"] for turn in mock.turns}
    assert len(windows) == 1
    assert windows.pop() >= 32_768
    assert len(mock.loads) == 1


# ------------------------------ interactive ------------------------------


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_an_interactive_start_asks_the_model_once(place):
    mock = place.serve([text("Interactive answer.")])
    shown = place.type("please say something nice to me", "Interactive answer.")
    assert plain("Interactive answer.") in shown
    assert len(mock.turns) == 1
