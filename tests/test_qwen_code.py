"""The real Qwen Code CLI as a second client of the shim, in an old and a new version.

They are those that .ci/run has installed, or the one on PATH.
"""
import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from test_claude_code import CACHE, Place, call, text  # noqa: E402

VERSIONS = ("0.24.4", "0.15.10")


@pytest.fixture(scope="module", params=VERSIONS)
def qwen(request):
    """Path of the CLI; skips the test where there is none."""
    installed = CACHE / f"qwen-{request.param}" / "node_modules" / ".bin" / "qwen"
    for path in filter(None, (installed, shutil.which("qwen"))):
        with suppress(OSError, subprocess.TimeoutExpired), tempfile.TemporaryDirectory() as home:
            said = subprocess.run([str(path), "--version"], capture_output=True, text=True,
                                  timeout=60, stdin=subprocess.DEVNULL, check=False,
                                  env={"PATH": os.environ["PATH"], "HOME": home})
            if said.stdout.strip() == request.param:
                return str(path)
    pytest.skip(f"no Qwen Code {request.param}: .ci/run installs it where npm can supply it")


class QwenPlace(Place):
    """A place whose client is Qwen Code."""

    def ask(self, prompt, timeout=90):
        settings = self.home / ".qwen" / "settings.json"
        settings.parent.mkdir(exist_ok=True)
        settings.write_text(json.dumps({
            "modelProviders": {"anthropic": [
                {"id": self.model, "baseUrl": self.url, "envKey": "LOCAL_KEY"}]},
            "env": {"LOCAL_KEY": "dummy"}, "security": {"auth": {"selectedType": "anthropic"}},
            "model": {"name": self.model}}))
        said = subprocess.run(
            [self.claude, "-p", prompt, "--yolo"], cwd=self.project, stdin=subprocess.DEVNULL,
            env={"HOME": str(self.home), "PATH": os.environ["PATH"], "TERM": "xterm"},
            capture_output=True, text=True, timeout=timeout, check=False)
        assert said.returncode == 0, said.stderr[-1000:]
        return said.stdout


@pytest.fixture()
def place(tmp_path, qwen):
    with ExitStack() as stack:
        yield QwenPlace(stack, tmp_path, qwen)


def test_an_answer_is_shown(place):
    mock = place.serve([text("Olá, naïve 日本.")])
    assert place.ask("say hi in Portuguese").strip() == "Olá, naïve 日本."
    assert "say hi in Portuguese" in mock.turns[0].prompt


def test_its_tools_run(place):
    # 0.24.4 loses what a command writes that ends at once, about one time in four.
    mock = place.serve([
        call("write_file", {"file_path": str(place.project / "n.txt"), "content": "a<b=c>\n"}),
        call("run_shell_command", {"command": "cat n.txt; echo seen-$((40 + 2)); sleep 1",
                                   "is_background": False}),
        text("Written and seen.")])
    assert place.ask("write n.txt and show it").strip() == "Written and seen."
    assert place.read("n.txt") == "a<b=c>\n"
    assert "seen-42" in mock.turns[2].prompt
