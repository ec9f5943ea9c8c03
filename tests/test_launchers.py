"""The launchers find Python and pass everything on; they decide nothing else."""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAUNCHERS = ("launch-shim", "launch-client")
WORDS = {"launch-shim": [], "launch-client": ["client"]}
SHELLS = [name for name in ("sh", "bash", "dash", "busybox") if shutil.which(name)]
NEW, OLD = 0, 1

posix_only = pytest.mark.skipif(os.name == "nt", reason="the .sh launchers need a Unix shell")


@pytest.fixture()
def place(tmp_path):
    """A folder with spaces that holds the launchers and nothing else, and one for PATH."""
    program = tmp_path / "my pro'jects" / "qwen code"
    program.mkdir(parents=True)
    for name in LAUNCHERS:
        shutil.copy(ROOT / f"{name}.sh", program)
        shutil.copy(ROOT / f"{name}.ps1", program)
    (program / "qwencode.py").write_text("import sys\nprint(sys.argv[1:])\nsys.exit(7)\n")
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "readlink").symlink_to(shutil.which("readlink"))
    return program, commands


def stub(commands, name, age):
    """A Python that passes or fails the version check and tells what it was asked to run."""
    prefix = '[ "$1" = -3 ] || exit 3; shift\n' if name == "py" else ""
    path = commands / name
    path.write_text(
        f'#!/bin/sh\n{prefix}[ "$1" = -c ] && exit {age}\n'
        f'printf "{name}"; for word; do printf "|%s" "$word"; done; exit 7\n')
    path.chmod(0o755)


def launch(command, commands, *arguments, cwd=None, **more):
    return subprocess.run(
        [*command, *arguments], cwd=cwd, env={"PATH": str(commands), **more},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20)


FOUND = [
    ("python3", {"python3": NEW, "python": NEW, "py": NEW}, "python3"),
    ("python where python3 is missing", {"python": NEW}, "python"),
    ("python where python3 is too old", {"python3": OLD, "python": NEW}, "python"),
    ("a versioned one beside old ones", {"python3": OLD, "python": OLD, "python3.11": NEW},
     "python3.11"),
    ("py of Windows", {"python": OLD, "py": NEW}, "py"),
]


@posix_only
@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize(("pythons", "expected"), [row[1:] for row in FOUND],
                         ids=[row[0] for row in FOUND])
def test_the_first_python_that_is_new_enough_runs(place, name, pythons, expected):
    program, commands = place
    for python, age in pythons.items():
        stub(commands, python, age)
    done = launch([program / f"{name}.sh"], commands, "--port", "0")
    words = [expected, f"{program}/qwencode.py", *WORDS[name], "--port", "0"]
    assert (done.stdout, done.stderr, done.returncode) == ("|".join(words), "", 7)


@posix_only
@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize("pythons", [{}, {"python3": OLD, "python": OLD, "py": OLD}],
                         ids=["none", "too old"])
def test_without_python_the_user_is_told_what_to_install(place, name, pythons):
    program, commands = place
    for python, age in pythons.items():
        stub(commands, python, age)
    done = launch([program / f"{name}.sh"], commands)
    assert (done.stdout, done.returncode) == ("", 127)
    assert done.stderr.startswith(f"{name}.sh: Python 3.9 or newer is needed")
    assert "https://www.python.org/downloads/" in done.stderr


ARGUMENTS = [
    ("none", []),
    ("what the README shows", ["--", "--dangerously-skip-permissions"]),
    ("spaces, quotes, globs, nothing", ["a b", 'c"d', "e'f", "*", "$HOME", "", "\\n", "ü"]),
    ("a line break", ["-p", "two\nlines"]),
]


@posix_only
@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("arguments", [row[1] for row in ARGUMENTS],
                         ids=[row[0] for row in ARGUMENTS])
def test_arguments_and_exit_code_pass_through_every_shell(place, shell, arguments):
    program, commands = place
    stub(commands, "python3", NEW)
    command = [shutil.which(shell), *(["sh"] if shell == "busybox" else [])]
    done = launch([*command, program / "launch-client.sh"], commands, *arguments)
    assert done.stdout.split("|")[2:] == ["client", *arguments]
    assert done.returncode == 7


@posix_only
@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_works_from_anywhere_and_stays_there(place, tmp_path, name):
    program, commands = place
    (commands / "python3").write_text(
        f'#!/bin/sh\n[ "$1" = -c ] && exit 0\ncd "${{1%/*}}" && printf "%s" "$PWD|{tmp_path}"\n')
    (commands / "python3").chmod(0o755)
    links = tmp_path / "links"
    links.mkdir()
    (links / "absolute").symlink_to(program / f"{name}.sh")
    (links / "relative").symlink_to("absolute")
    (tmp_path / "up").symlink_to(f"{links.name}/relative")
    (links / "dots").symlink_to(os.path.relpath(program / f"{name}.sh", links))
    starts = [
        ([program / f"{name}.sh"], tmp_path), ([f"./{name}.sh"], program),
        ([shutil.which("sh"), f"{name}.sh"], program), ([links / "relative"], tmp_path),
        (["./up"], tmp_path), (["links/dots"], tmp_path), (["../up"], links),
    ]
    for command, cwd in starts:
        done = launch(command, commands, cwd=cwd)
        assert done.stdout == f"{program}|{tmp_path}", command


@posix_only
def test_the_environment_reaches_python_and_the_folder_stays(place, tmp_path):
    program, commands = place
    (commands / "python3").write_text(
        '#!/bin/sh\n[ "$1" = -c ] && exit 0\nprintf "%s" "$OLLAMA_NUM_CTX $PWD"\n')
    (commands / "python3").chmod(0o755)
    done = launch([program / "launch-shim.sh"], commands, cwd=tmp_path, OLLAMA_NUM_CTX="8192")
    assert done.stdout == f"8192 {tmp_path}"


@posix_only
@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_real_python_runs_the_program_beside_the_launcher(place, name):
    program, commands = place
    (commands / "python3").symlink_to(sys.executable)
    done = launch([program / f"{name}.sh"], commands, "--", "a b")
    assert done.stdout == f"{[*WORDS[name], '--', 'a b']}\n"
    assert done.returncode == 7


@posix_only
@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_question_for_the_version_does_not_eat_the_input(place, name):
    program, commands = place
    (program / "qwencode.py").write_text("import sys\nprint(sys.stdin.read())\n")
    (commands / "python3").symlink_to(sys.executable)
    done = subprocess.run([program / f"{name}.sh"], env={"PATH": str(commands)}, timeout=20,
                          input="typed", capture_output=True, text=True)
    assert done.stdout == "typed\n"


@posix_only
@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_launchers_of_the_project_can_be_executed(name):
    assert os.access(ROOT / f"{name}.sh", os.X_OK)


# ------------------------------ PowerShell ------------------------------


def of_shell(name):
    return (ROOT / f"{name}.sh").read_text(encoding="utf-8")


def of_powershell(name):
    return (ROOT / f"{name}.ps1").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", LAUNCHERS)
def test_both_twins_try_the_same_pythons_and_ask_the_same_question(name):
    tried = re.search(r"for python in (.*); do", of_shell(name)).group(1).split()
    names = re.search(r"^\$names = (.*)$", of_powershell(name), re.M).group(1)
    assert re.findall(r"'([^']+)'", names) == [*tried, "py"]
    question = "'import sys; sys.exit(sys.version_info < (3, 9))'"
    assert f"new_enough={question}" in of_shell(name)
    assert f"$newEnough = {question}" in of_powershell(name)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_both_twins_pass_on_the_same_and_fail_alike(name):
    words = "".join(f"'{word}' " for word in WORDS[name])
    given = {"launch-shim": "@args", "launch-client": "@given"}[name]
    assert f"$program {words}{given}" in of_powershell(name)
    assert "exit $LASTEXITCODE" in of_powershell(name)
    for text in (of_shell(name), of_powershell(name)):
        assert text.rstrip().endswith("exit 127")
        assert "Python 3.9 or newer is needed" in text
        assert "https://www.python.org/downloads/" in text
        assert text.isascii()


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_powershell_twin_takes_any_argument(name):
    assert not re.search(r"(?im)^\s*(param|\[CmdletBinding)", of_powershell(name))


@pytest.mark.skipif(shutil.which("pwsh") is None, reason="PowerShell (pwsh) is not installed")
@pytest.mark.parametrize("name", LAUNCHERS)
def test_powershell_runs_the_program(place, name):
    program, commands = place
    (commands / "python3").symlink_to(sys.executable)
    done = subprocess.run(
        [shutil.which("pwsh"), "-NoProfile", "-File", program / f"{name}.ps1", "a b", "-p", "x"],
        env={**os.environ, "PATH": str(commands)}, timeout=60, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == (f"{[*WORDS[name], 'a b', '-p', 'x']}\n", 7)


LINES = [
    (r".\launch-client.ps1 -- --dangerously-skip-permissions", True),
    (r"& 'C:\my projects\launch-client.ps1' -- -p 'x'", True),
    (r".\launch-client --", True),
    (r".\launch-client.ps1 --port 8001", False),
    (r".\launch-client.ps1 --dangerously-skip-permissions", False),
    (r".\launch-client.ps1", False),
]


@pytest.mark.parametrize(("line", "found"), LINES, ids=[row[0] for row in LINES])
def test_the_dashes_that_powershell_takes_away_are_found_in_the_line(line, found):
    pattern = re.search(r"-match '(.*)'\)", of_powershell("launch-client")).group(1)
    assert bool(re.search(pattern.replace("''", "'"), line)) == found
