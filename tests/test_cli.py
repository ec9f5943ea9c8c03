"""Section 17: the commands that need neither Ollama nor Claude Code, as a user runs them."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import qwencode as q

PROGRAM = Path(q.__file__).resolve()
needs_bash = pytest.mark.skipif(not q.find_bash(os.environ), reason="no bash on this machine")


def test_the_demo_carries_a_call_through_and_shows_it(capsys):
    assert q.main(["demo"], {}) == 0
    shown = capsys.readouterr().out
    told = ("The answers are canned", '"type":"message_start"', '"type":"tool_use"',
            "hello.txt now holds 'Hello from the demo.\\n'",
            "-> The file is there now: hello.txt.", "Next, for the real thing")
    assert [words for words in told if words not in shown] == []
    assert sorted(map(shown.index, told)) == list(map(shown.index, told))


TRIES = [
    # what is asked, flags, exit code, what is said, what x.txt holds then
    ("append the text 'y' to x.txt", ["--dry-run"], 0, "rule: ", "a\n"),
    ("append the text 'y' to x.txt", [], 0, "exit code 0: done and verified", "a\ny"),
    ("rename x.txt to x.txt/y.txt", ["--bash-style", "coded"], 98, "not done", "a\n"),
    ("what is the weather?", [], 1, "No rescue: these words are not one clear", "a\n"),
    ("append '\udcff' to x.txt", [], 1, "No rescue: The text holds half a surrogate pair.", "a\n"),
]


@needs_bash
@pytest.mark.parametrize(("words", "flags", "code", "said", "held"), TRIES)
def test_try_carries_one_request_out(tmp_path, monkeypatch, capfd, words, flags, code, said, held):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").write_text("a\n")
    assert q.main(["try", *flags, *words.split()], {}) == code
    assert said in capfd.readouterr().out
    assert (tmp_path / "x.txt").read_text() == held


@needs_bash
def test_a_reader_that_leaves_ends_the_command_quietly():
    shown = subprocess.run(
        f'"{sys.executable}" "{PROGRAM}" env --port 1 | true; exit "${{PIPESTATUS[0]}}"',
        shell=True, executable=q.find_bash(os.environ), stderr=subprocess.PIPE, text=True, timeout=30)
    assert (shown.returncode in (0, 141), shown.stderr) == (True, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this machine")
@pytest.mark.parametrize("command", [["demo"], ["env", "--port", "1"], ["serve", "--port", "0"]])
def test_a_full_disk_is_one_line(command):
    with open("/dev/full", "w") as full:
        ended = subprocess.run([sys.executable, str(PROGRAM), *command], stdout=full,
                               stderr=subprocess.PIPE, text=True, timeout=30, check=False)
    assert (ended.returncode, ended.stderr) == (
        1, "qwencode: No space left on device\n")
