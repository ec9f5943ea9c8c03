"""Every command is run: in bash, with BusyBox's tools, and with each tool broken."""
import base64
import json
import os
import random
import re
import shutil
import stat
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qwencode import CannotCarryError, FileOp, Tool, commands_for, find_bash, rescue_call

BASH = find_bash(os.environ)
if not BASH:
    pytest.skip("no bash on this machine to run the commands", allow_module_level=True)
SYSTEM = "/usr/bin:/bin"


def command_for(op, style="plain", max_read_bytes=200000):
    return commands_for((op,), style, max_read_bytes)


@pytest.fixture(scope="session")
def busybox_path(tmp_path_factory):
    """A folder of BusyBox links, to be the whole PATH."""
    busybox = shutil.which("busybox")
    if busybox is None:
        pytest.skip("busybox is not installed here (apt-get install busybox)")
    folder = tmp_path_factory.mktemp("busybox")
    for applet in subprocess.check_output([busybox, "--list"], text=True).split():
        (folder / applet).symlink_to(busybox)
    return str(folder)


def plant(root, tree):
    """Make files from {path: str | bytes | None for a folder | Path for a link}."""
    for name, content in tree.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.mkdir(exist_ok=True)
        elif isinstance(content, Path):
            path.symlink_to(content)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())


def harvest(root):
    """The reverse of plant; folders that hold something are left out."""
    tree = {}
    for folder, folders, files in os.walk(root):
        here = Path(folder).relative_to(root)
        for name in folders + files:
            path = root / here / name
            key = str(here / name)
            if path.is_symlink():
                tree[key] = Path(os.readlink(path))
            elif path.is_dir():
                if not os.listdir(path):
                    tree[key] = None
            else:
                tree[key] = path.read_bytes()
    return tree


def as_bytes(tree):
    return {k: v.encode() if isinstance(v, str) else v for k, v in tree.items()}


def run(command, folder, path=SYSTEM, before="", home=None):
    """Run as the CLI does: eval of one quoted word, standard input empty."""
    wrapped = before + "shopt -u extglob 2>/dev/null || true && eval \"$COMMAND\""
    return subprocess.run(
        [BASH, "-c", wrapped], cwd=folder, capture_output=True, timeout=60,
        stdin=subprocess.DEVNULL,
        env={"PATH": path, "HOME": str(home or folder), "COMMAND": command, "LANG": "C.UTF-8"},
    )


POOL = ThreadPoolExecutor(os.cpu_count())


def side_by_side(rows, *fixtures):
    """Make a test for each row, given a folder; those selected run as many at once as cores are."""
    def decorate(check):
        begun = {}

        @pytest.mark.parametrize("row", rows)
        def test(row, request, tmp_path_factory):
            if not begun:
                more = [request.getfixturevalue(name) for name in fixtures]
                for one in request.session.items:
                    if one.function is test:
                        begun[one.callspec.params["row"]] = POOL.submit(
                            check, one.callspec.params["row"], tmp_path_factory.mktemp("row"), *more)
            begun[row].result()
        return test
    return decorate


# Contents that a shell is likely to spoil. Each is created, appended, put in by replace.
CONTENTS = {
    "plain": "hello\n",
    "no final newline": "hello",
    "empty": "",
    "one newline": "\n",
    "blank lines": "\n\n\na\n\n",
    "quotes": "it's \"quoted\" and 'so'\n",
    "backticks": "`date` and ``\n",
    "dollars": "$HOME ${X} $(date) $$ $'x'\n",
    "backslashes": "a\\b \\\\ \\n \\t c\\ d\\\n\\ \n",
    "ends with backslash": "a\\",
    "percent": "%s %d 100%\n%",
    "crlf": "a\r\nb\r\n",
    "crlf with blank lines": "a\r\n\r\nb\r\n",
    "mixed line ends": "a\r\nb\nc\rd",
    "EOF line": "a\nEOF\nEOF_1\nb\n",
    "emoji": "caf\u00e9 \U0001f600 \u4e2d\u6587\n",
    "json": '{\n  "a": {"b": [1, 2]},\n  "c": "d\'s"\n}\n',
    "python": "# top\ndef f(x):\n    # x\n    return {'a': f\"{x}\"}\n",
    "css": "a { color: red; }\n#b { x: \"y\" }\n",
    "comment lines": "#!/bin/sh\n# a\n  # b\necho 'x' # c\n",
    "nbsp": "a\u00a0b\u200bc\ufeff\n",
    "bidi": "a\u202eb\n",
    "line separator": "a\u2028b\u0085c\n",
    "unicode escapes": "\\u03b4 \\u0041 \\\\u0041 \\U0001f600 \\u{1}\n",
    "words of equals": "a =b\n=c\n",
    "open brace": "void f() {\n",
    "tabs": "\ta\tb\\\tc\n",
    "controls": "\x1b[31mred\x1b[0m\x07\x00\x7f\n",
    "only controls": "\x00\x01\x02\x03",
    "leading dash": "-n -e --help\n",
    "history": "!! !$ a!b\n",
    "glob": "* ? [a-z] {a,b} ~\n",
    "long line": "x" * 3000 + "\n",
    "heredoc": "cat <<'EOF'\nx\nEOF\n",
    "spaces": "  a  \n   \n",
}


BEFORE = "one <<X>> two <<X>> three"
# What each kind of operation makes of BEFORE with a text.
EDITS = {
    "create": lambda text: text,
    "append": lambda text: BEFORE + text,
    "replace": lambda text: BEFORE.replace("<<X>>", text),
    "insert_before": lambda text: BEFORE.replace("<<X>>", text + "<<X>>", 1),
    "write": lambda text: text,
    "append_line": lambda text: BEFORE + "\n" + text,
    "prepend": lambda text: text + BEFORE,
    "insert_after": lambda text: BEFORE.replace("<<X>>", "<<X>>" + text, 1),
}
FEW = ["no final newline", "empty", "quotes", "json", "controls"]


def check_edits(text, kinds, folder, path):
    for kind in kinds:
        expected = EDITS[kind](text).encode()
        if kind != "create":
            plant(folder, {kind: BEFORE})
        command = command_for(FileOp(kind, kind, text, "<<X>>")).command
        done = run(command, folder, path)
        assert (done.returncode, (folder / kind).read_bytes()) == (0, expected), (done, command)
    if text:
        plant(folder, {"old": f"1{text}2{text}{text}3"})
        expected = f"1{text}2{text}{text}3".replace(text, "-").encode()
        done = run(command_for(FileOp("replace", "old", "-", text)).command, folder, path)
        assert (done.returncode, (folder / "old").read_bytes()) == (0, expected), done
    assert sorted(harvest(folder)) == sorted([*kinds, *(["old"] if text else [])])


@side_by_side(CONTENTS)
def test_content_is_byte_exact(name, folder):
    check_edits(CONTENTS[name], list(EDITS)[: 8 if name in FEW else 3], folder, SYSTEM)


@side_by_side(FEW[:4:2], "busybox_path")
def test_content_is_byte_exact_with_busybox(name, folder, busybox_path):
    check_edits(CONTENTS[name], EDITS, folder, busybox_path)


@pytest.mark.parametrize("name", CONTENTS)
def test_plain_text_stays_readable_and_every_command_parses(name):
    for kind in EDITS:
        command = command_for(FileOp(kind, "f", CONTENTS[name], "a")).command
        assert ("base64" in command) == (name in ("nbsp", "line separator") and kind not in (
            "replace", "insert_before", "insert_after"))
        assert not re.search(r"(?<!\\)(\\\\)*\\u[0-9a-fA-F]{4}", command)
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", command)
        assert subprocess.run([BASH, "-n"], input=command.encode(), check=False).returncode == 0


NAMES = ["a b", "caf\u00e9 \U0001f600", "a*b", "[x]?", "-n", "--help", "it's", "a\"b", "$HOME", "`x`",
         "a\\b", "{a,b}", "~x", "a;b&c|d", "#x", "!x", "d/-e/ f", "%s", "(x)", "a\u00a0b", "=x", "x y\\ z"]


@side_by_side(NAMES)
def test_names_are_literal(name, folder):
    home = folder / "home"
    work = folder / "work"
    home.mkdir()
    work.mkdir()
    other = name + " 2"
    for op in [FileOp("create", name, "one\n"), FileOp("append", name, "two\n"),
               FileOp("replace", name, "2", "two"), FileOp("rename", name, other=other),
               FileOp("copy", other, other="copied"), FileOp("delete", other),
               FileOp("mkdir", name + "/sub"), FileOp("list", name), FileOp("read", "copied")]:
        done = run(command_for(op).command, work, home=home)
        assert done.returncode == 0, (op, done)
    assert harvest(work) | {"d/-e": 0} == {"copied": b"one\n2\n", name + "/sub": None, "d/-e": 0}
    assert harvest(home) == {}


def test_a_tilde_that_the_user_wrote_is_his_home(tmp_path):
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    assert run(command_for(FileOp("create", "~/n o/x", "a")).command, work, home=home).returncode == 0
    assert (harvest(home), harvest(work)) == ({"n o/x": b"a"}, {})
    for old, new in (("~/n o/x", "~/x"), ("~/x", "~/X"), ("~/X", "~/n o/X"), ("~/n o/X", "~/n o/x")):
        done = run(command_for(FileOp("rename", old, other=new)).command, work, home=home)
        assert (done.returncode, done.stderr) == (0, b""), (new, done)
    assert (harvest(home), harvest(work)) == ({"n o/x": b"a"}, {})


# name: tree before, operation, tree after (None: unchanged), ends well
CASES = {
    "create where the same content is": ({"x": "a\n"}, FileOp("create", "x", "a\n"), None, True),
    "create where other content is": ({"x": "b\n"}, FileOp("create", "x", "a\n"), None, False),
    "create where a folder is": ({"x": None}, FileOp("create", "x", "a\n"), None, False),
    "create below a file": ({"x": "b"}, FileOp("create", "x/y", "a\n"), None, False),
    "create where a broken link is": (
        {"x": Path("nowhere")}, FileOp("create", "x", "a\n"), None, False),
    "write a new file": ({}, FileOp("write", "d/x", "a\n"), {"d/x": "a\n"}, True),
    "write over a longer one": ({"x": "long " * 99}, FileOp("write", "x", "a"), {"x": "a"}, True),
    "write through a link": (
        {"t": "old", "x": Path("t")}, FileOp("write", "x", "a"), {"t": "a", "x": Path("t")}, True),
    "write where a folder is": ({"x": None}, FileOp("write", "x", "a"), None, False),
    "write where a full folder is": ({"x/y": "b"}, FileOp("write", "x", "a"), None, False),
    "append to a missing file": ({}, FileOp("append", "x", "a\n"), {"x": "a\n"}, True),
    "append a line to a missing file": ({}, FileOp("append_line", "x", "a\n"), {"x": "a\n"}, True),
    "append to an empty file": ({"x": ""}, FileOp("append", "x", "a"), {"x": "a"}, True),
    "append a line to an empty file": (
        {"x": ""}, FileOp("append_line", "x", "a\n"), {"x": "a\n"}, True),
    "append a line after a whole line": (
        {"x": "b\n"}, FileOp("append_line", "x", "a\n"), {"x": "b\na\n"}, True),
    "append a line after half a line": (
        {"x": "b"}, FileOp("append_line", "x", "a\n"), {"x": "b\na\n"}, True),
    "append through a link": (
        {"t": "b", "x": Path("t")}, FileOp("append", "x", "a"), {"t": "ba", "x": Path("t")}, True),
    "append to bytes": ({"x": b"\xff\x00\r\n\xfe"}, FileOp("append", "x", "a"),
                        {"x": b"\xff\x00\r\n\xfea"}, True),
    "append to a folder": ({"x": None}, FileOp("append", "x", "a"), None, False),
    "prepend to a missing file": ({}, FileOp("prepend", "x", "a"), None, False),
    "prepend to an empty file": ({"x": ""}, FileOp("prepend", "x", "a"), {"x": "a"}, True),
    "replace overlapping from the left": (
        {"x": "aaaaa"}, FileOp("replace", "x", "b", "aa"), {"x": "bba"}, True),
    "replace by a text that holds the old one": (
        {"x": "a.a"}, FileOp("replace", "x", "aa", "a"), {"x": "aa.aa"}, True),
    "replace by nothing": ({"x": "abc"}, FileOp("replace", "x", "", "b"), {"x": "ac"}, True),
    "replace all by nothing": ({"x": "abc"}, FileOp("replace", "x", "", "abc"), {"x": ""}, True),
    "replace by the same": ({"x": "abc"}, FileOp("replace", "x", "b", "b"), None, True),
    "replace a pattern literally": (
        {"x": "axb a.b a*b [a] ^a $b"}, FileOp("replace", "x", "&\\1", "a.b"),
        {"x": "axb &\\1 a*b [a] ^a $b"}, True),
    "replace special signs": (
        {"x": "a*b [a] ^a $b \\n"}, FileOp("replace", "x", "!", "[a] ^a $b \\n"),
        {"x": "a*b !"}, True),
    "replace several lines": (
        {"x": "1\na\nb\n2\na\nb"}, FileOp("replace", "x", "c\nd", "a\nb"),
        {"x": "1\nc\nd\n2\nc\nd"}, True),
    "replace a newline": ({"x": "a\n\nb\n"}, FileOp("replace", "x", ",", "\n"), {"x": "a,,b,"}, True),
    "replace with neighbours in the bytes": (
        {"x": "\u0151\u0152"}, FileOp("replace", "x", "o", "\u0152"), {"x": "\u0151o"}, True),
    "replace in bytes": ({"x": b"\xff\x00old\r\n\xfe"}, FileOp("replace", "x", "new;", "old"),
                         {"x": b"\xff\x00new;\r\n\xfe"}, True),
    "replace plainly in bytes": ({"x": b"\xff\x00old\r\n\xfe"}, FileOp("replace", "x", "new", "old"),
                                 {"x": b"\xff\x00new\r\n\xfe"}, True),
    "replace through a link": (
        {"t": "a", "x": Path("t")}, FileOp("replace", "x", "b", "a"), {"t": "b", "x": Path("t")},
        True),
    "replace an absent text": ({"x": "abc"}, FileOp("replace", "x", "b", "zz"), None, False),
    "replace an absent sign": ({"x": "abc"}, FileOp("replace", "x", "b", "z"), None, False),
    "replace in a missing file": ({"y": "a"}, FileOp("replace", "x", "b", "a"), None, False),
    "replace in an empty file": ({"x": ""}, FileOp("replace", "x", "b", "a"), None, False),
    "replace in a folder": ({"x": None}, FileOp("replace", "x", "b", "a"), None, False),
    "insert at the first place only": (
        {"x": "a b a"}, FileOp("insert_before", "x", "-", "a"), {"x": "-a b a"}, True),
    "insert after the first place": (
        {"x": "a b a"}, FileOp("insert_after", "x", "-", "a"), {"x": "a- b a"}, True),
    "insert at an absent anchor": (
        {"x": "a b a"}, FileOp("insert_after", "x", "-", "zz"), None, False),
    "replace a line, not the end of one": (
        {"x": "ab\nb\nb c\nb\n"}, FileOp("replace_line", "x", "d", "b"),
        {"x": "ab\nd\nb c\nd\n"}, True),
    "replace a last line without its end": (
        {"x": "a\n\nb"}, FileOp("replace_line", "x", "{c}\n\u00fc", "b"),
        {"x": "a\n\n{c}\n\u00fc"}, True),
    "replace a line by more of it": (
        {"x": "b\nb\n"}, FileOp("replace_line", "x", "b\nb", "b"), {"x": "b\nb\nb\nb\n"}, True),
    "replace two lines": ({"x": "a\nb\na\nb"}, FileOp("replace_line", "x", "c", "a\nb"),
                          {"x": "c\nc"}, True),
    "remove every such line": (
        {"x": "b\nb\nab\nb\nbc\nb"}, FileOp("replace_line", "x", "", "b"), {"x": "ab\nbc\n"},
        True),
    "remove the only line": ({"x": "b"}, FileOp("replace_line", "x", "", "b"), {"x": ""}, True),
    "remove a line that is only the end of one": (
        {"x": "ab\n"}, FileOp("replace_line", "x", "", "b"), None, False),
    "insert after the last line": (
        {"x": "ab\nb"}, FileOp("insert_after_line", "x", "{c}", "b"), {"x": "ab\nb\n{c}"}, True),
    "insert after the first such line": (
        {"x": "b\nb\n"}, FileOp("insert_after_line", "x", "c", "b"), {"x": "b\nc\nb\n"}, True),
    "insert before a line": (
        {"x": "ab\n\nb\n"}, FileOp("insert_before_line", "x", "c", "b"), {"x": "ab\n\nc\nb\n"},
        True),
    "insert a blank line after a line": (
        {"x": "b\nc"}, FileOp("insert_after_line", "x", "", "b"), {"x": "b\n\nc"}, True),
    "insert a blank line after a last line without its end": (
        {"x": "c\nb"}, FileOp("insert_after_line", "x", "", "b"), {"x": "c\nb\n"}, True),
    "insert a blank line before a line": (
        {"x": "c\nb"}, FileOp("insert_before_line", "x", "", "b"), {"x": "c\n\nb"}, True),
    "insert at an absent line": (
        {"x": "ab\n"}, FileOp("insert_before_line", "x", "c", "b"), None, False),
    "replace a line of bytes": ({"x": b"\xff\x00\nb\n\xfe"}, FileOp("replace_line", "x", "c;", "b"),
                                {"x": b"\xff\x00\nc;\n\xfe"}, True),
    "rename": ({"x": "a"}, FileOp("rename", "x", other="d/y"), {"d/y": "a"}, True),
    "rename into a folder": ({"x": "a", "d": None}, FileOp("rename", "x", other="d/"),
                             {"d/x": "a"}, True),
    "rename a folder": ({"x/1": "a", "x/2": None}, FileOp("rename", "x", other="y"),
                        {"y/1": "a", "y/2": None}, True),
    "rename a link": ({"x": Path("t"), "t": "a"}, FileOp("rename", "x", other="d/y"),
                      {"d/y": Path("t"), "t": "a"}, True),
    "rename a broken link": ({"x": Path("t")}, FileOp("rename", "x", other="y"),
                             {"y": Path("t")}, True),
    "rename onto a file": ({"x": "a", "y": "b"}, FileOp("rename", "x", other="y"), None, False),
    "rename onto its like": ({"x": "a", "y": "a"}, FileOp("rename", "x", other="y"), None, False),
    "rename onto a folder": ({"x": "a", "y": None}, FileOp("rename", "x", other="y"), None, False),
    "rename onto a broken link": (
        {"x": "a", "y": Path("t")}, FileOp("rename", "x", other="y"), None, False),
    "rename a missing file": ({"y": "a"}, FileOp("rename", "x", other="z"), None, False),
    "rename by case": ({"x": "a"}, FileOp("rename", "x", other="X"), {"X": "a"}, True),
    "rename by case onto a file": (
        {"x": "a", "X": "b"}, FileOp("rename", "x", other="X"), None, False),
    "rename a folder into itself": ({"x/1": "a"}, FileOp("rename", "x", other="x/y"), None, False),
    "copy": ({"x": "a"}, FileOp("copy", "x", other="d/y"), {"x": "a", "d/y": "a"}, True),
    "copy onto a file": ({"x": "a", "y": "b"}, FileOp("copy", "x", other="y"), None, False),
    "copy onto its like": ({"x": "a", "y": "a"}, FileOp("copy", "x", other="y"), None, False),
    "copy a missing file": ({"z": "a"}, FileOp("copy", "x", other="y"), None, False),
    "copy a folder": ({"x/1": "a"}, FileOp("copy", "x", other="y"), None, False),
    "delete": ({"x": "a", "y": "b"}, FileOp("delete", "x"), {"y": "b"}, True),
    "delete a link": ({"x": Path("t"), "t": "a"}, FileOp("delete", "x"), {"t": "a"}, True),
    "delete a link to a folder": (
        {"x": Path("t"), "t/1": "a"}, FileOp("delete", "x"), {"t/1": "a"}, True),
    "delete an empty folder": ({"x": None, "y": "b"}, FileOp("delete", "x"), {"y": "b"}, True),
    "delete a full folder": ({"x/1": "a"}, FileOp("delete", "x"), None, False),
    "delete a missing file": ({"y": "a"}, FileOp("delete", "x"), None, False),
    "mkdir": ({}, FileOp("mkdir", "a b/c"), {"a b/c": None}, True),
    "mkdir that is there": ({"d/x": "a"}, FileOp("mkdir", "d"), None, True),
    "mkdir where a file is": ({"x": "a"}, FileOp("mkdir", "x"), None, False),
    "list a missing folder": ({"x": "a"}, FileOp("list", "y"), None, False),
    "read a missing file": ({"x": "a"}, FileOp("read", "y"), None, False),
    "read a folder": ({"x": None}, FileOp("read", "x"), None, False),
}


def check_case(case, folder, style, path):
    before, op, after, ends_well = case
    plant(folder, before)
    done = run(command_for(op, style).command, folder, path)
    expected = as_bytes(before if after is None else after)
    assert (harvest(folder), done.returncode == 0) == (expected, ends_well), done
    said = b"verification failed: " in done.stderr
    assert said == (not ends_well and op.kind not in ("read", "list"))
    if said:
        codes = range(91, 101)
        assert done.returncode in (codes if style == "coded" else {1})


@side_by_side(CASES)
def test_the_tree_afterwards(name, folder):
    check_case(CASES[name], folder, "plain", SYSTEM)


@side_by_side(CASES, "busybox_path")
def test_the_tree_afterwards_with_busybox(name, folder, busybox_path):
    check_case(CASES[name], folder, "plain", busybox_path)


CODES = [
    ("create where other content is", 91), ("write where a folder is", 91),
    ("append to a folder", 92), ("replace an absent text", 93), ("replace in a folder", 93),
    ("prepend to a missing file", 96), ("insert at an absent anchor", 96),
    ("delete a full folder", 97), ("rename onto a file", 98), ("copy onto a file", 99),
    ("mkdir where a file is", 100), ("replace several lines", 0), ("rename", 0),
]


@pytest.mark.parametrize(("name", "code"), CODES)
def test_exit_codes_of_style_coded(name, code, tmp_path):
    before, op, _, _ = CASES[name]
    check_case(CASES[name], tmp_path, "coded", SYSTEM)
    again = tmp_path / "again"
    again.mkdir()
    plant(again, before)
    assert run(command_for(op, "coded").command, again).returncode == code


# ------------------------------ broken tools ------------------------------

LONG = "".join(f"line {number} of an old file, long enough\n" for number in range(60))
JSON = json.dumps({"a": list(range(40)), "b": "it's"}, indent=1) + "\n"
# name: tree before, operations, tree after
BROKEN = {
    "create": ({}, [FileOp("create", "d/x", LONG)], {"d/x": LONG}),
    "create json": ({}, [FileOp("create", "x", JSON)], {"x": JSON}),
    "create without newline": ({}, [FileOp("create", "x", LONG + "end")], {"x": LONG + "end"}),
    "create long json": ({}, [FileOp("create", "x", JSON * 9)], {"x": JSON * 9}),
    "create controls": ({}, [FileOp("create", "x", "\x01\x02" * 40)], {"x": "\x01\x02" * 40}),
    "write": ({"x": LONG}, [FileOp("write", "x", JSON)], {"x": JSON}),
    "append": ({"x": LONG}, [FileOp("append", "x", "the new tail\n")],
               {"x": LONG + "the new tail\n"}),
    "append to nothing": ({"x": ""}, [FileOp("append", "x", LONG)], {"x": LONG}),
    "append line": ({"x": LONG + "x"}, [FileOp("append_line", "x", "{'the': new}\n")],
                    {"x": LONG + "x\n{'the': new}\n"}),
    "prepend": ({"x": LONG}, [FileOp("prepend", "x", "top\n")], {"x": "top\n" + LONG}),
    "replace": ({"x": LONG}, [FileOp("replace", "x", "a new", "an old")],
                {"x": LONG.replace("an old", "a new")}),
    "replace lines": ({"x": LONG}, [FileOp("replace", "x", "{;}\n", "enough\nline")],
                      {"x": LONG.replace("enough\nline", "{;}\n")}),
    "replace whole lines": ({"x": LONG + "a\nb"}, [FileOp("replace_line", "x", "{;}", "a")],
                            {"x": LONG + "{;}\nb"}),
    "remove whole lines": ({"x": LONG + "a\nb"}, [FileOp("replace_line", "x", "", "b")],
                           {"x": LONG + "a\n"}),
    "insert a line": ({"x": "a\n" + LONG}, [FileOp("insert_after_line", "x", "b", "a")],
                      {"x": "a\nb\n" + LONG}),
    "insert a blank line": ({"x": "a\n" + LONG}, [FileOp("insert_after_line", "x", "", "a")],
                            {"x": "a\n\n" + LONG}),
    "insert": ({"x": LONG}, [FileOp("insert_after", "x", " 7", "line")],
               {"x": LONG.replace("line", "line 7", 1)}),
    "rename": ({"x": LONG}, [FileOp("rename", "x", other="d/y")], {"d/y": LONG}),
    "rename folder": ({"x/1": LONG}, [FileOp("rename", "x", other="y")], {"y/1": LONG}),
    "copy": ({"x": LONG}, [FileOp("copy", "x", other="y")], {"x": LONG, "y": LONG}),
    "delete": ({"x": LONG, "y": "b"}, [FileOp("delete", "x")], {"y": "b"}),
    "delete folder": ({"x": None, "y": "b"}, [FileOp("delete", "x")], {"y": "b"}),
    "mkdir": ({}, [FileOp("mkdir", "d/e")], {"d/e": None}),
    "several": ({"x": "a\n"}, [FileOp("append", "x", "b\n"), FileOp("rename", "x", other="y"),
                               FileOp("create", "z", "c")], {"y": "a\nb\n", "z": "c"}),
    "create onto another": ({"x": "a\n"}, [FileOp("create", "x", LONG)], None),
    "replace an absent text": ({"x": LONG}, [FileOp("replace", "x", "b", "nowhere")], None),
    "rename onto another": ({"x": "a", "y": LONG}, [FileOp("rename", "x", other="y")], None),
    "delete a full folder": ({"x/y": LONG}, [FileOp("delete", "x")], None),
}
TOOLS = ("base64", "cat", "cmp", "cp", "cut", "diff", "echo", "grep", "head", "ls", "mkdir", "mv",
         "od", "printf", "readlink", "rm", "rmdir", "sed", "sha256sum", "sort", "tail", "tr", "xargs")
FAULTS = {
    "does nothing": "true",
    "fails": "false",
    "cuts its output": '{real} "$@" | /usr/bin/head -c 40; (exit ${{PIPESTATUS[0]}})',
    "cuts its last byte": '{real} "$@" | /usr/bin/head -c -1; (exit ${{PIPESTATUS[0]}})',
}


WITHOUT_OUTPUT = ("cp", "mkdir", "mv", "rm", "rmdir", "cmp", "diff")


def judge(before, after, folder, done, what):
    """Exit 0 means the right tree; otherwise every old file is as it was, or as asked."""
    now, old, new = harvest(folder), as_bytes(before), as_bytes(before if after is None else after)
    if done.returncode == 0:
        assert after is not None, (what, "success", done)
        assert now == new, (what, done)
    for name, content in old.items():
        kept = now.get(name, "gone")
        moved = content in [now[other] for other in new if other not in old and other in now]
        asked = name not in new and after is not None
        assert kept in (content, new.get(name)) or asked or moved, (what, name, kept, done)


def stub_of(tool, fault, folder):
    """Put a broken tool into a folder; return what breaks the shell's own one, too."""
    body = FAULTS[fault].format(real=shutil.which(tool, path=SYSTEM))
    if "cuts" in fault:
        (folder / tool).write_text(f"#!{BASH}\n{body}\n")
        (folder / tool).chmod(0o755)
    else:
        (folder / tool).symlink_to(f"/bin/{body}")
    if tool not in ("echo", "printf"):
        return ""
    return f"{tool}() {{ {FAULTS[fault].format(real='builtin ' + tool)}; }}\n"


@side_by_side(BROKEN)
def test_a_broken_tool_never_brings_a_false_success(name, folder):
    before, ops, after = BROKEN[name]
    command = commands_for(ops).command
    named = [tool for tool in TOOLS if re.search(rf"(?m)(^|[|&;(] ?|then |if |xargs ){tool}\b", command)]
    for tool, fault in [
            (tool, fault) for tool in named for fault in FAULTS
            if "cuts" not in fault or tool not in WITHOUT_OUTPUT
            and ("last" not in fault or name in ("create", "append line", "replace", "rename"))]:
        work, tools = folder / f"{tool} {fault}", folder / f"{tool} that {fault}"
        work.mkdir()
        tools.mkdir()
        shadow = stub_of(tool, fault, tools)
        plant(work, before)
        done = run(command, work, f"{tools}:{SYSTEM}", shadow)
        judge(before, after, work, done, (tool, fault))


@side_by_side(BROKEN)
def test_a_full_disk_changes_nothing(name, place):
    before, ops, after = BROKEN[name]
    command = commands_for(ops).command
    for blocks in (0, 1, 2, 3):
        folder = place / str(blocks)
        folder.mkdir()
        plant(folder, before)
        done = run(command, folder, before=f"ulimit -f {blocks}\n")
        judge(before, after, folder, done, blocks)
        left = [entry for entry in harvest(folder) if entry.startswith(".shim-")]
        # bash itself dies of SIGXFSZ when its own printf hits the limit: no tidying then
        assert left == [] or done.returncode < 0, done

# ------------------------------ what stays ------------------------------


@pytest.mark.parametrize("kind", ["write", "append", "append_line", "prepend", "replace",
                                  "insert_before", "insert_after"])
@pytest.mark.parametrize("mode", [0o600, 0o777])
def test_mode_bits_links_and_hard_links_stay(kind, mode, tmp_path):
    plant(tmp_path, {"d/file": "a b", "link": Path("d/file")})
    (tmp_path / "d/file").chmod(mode)
    os.link(tmp_path / "d/file", tmp_path / "hard")
    done = run(command_for(FileOp(kind, "link", "x", "a")).command, tmp_path)
    assert done.returncode == 0, done
    tree = harvest(tmp_path)
    assert tree["link"] == Path("d/file")
    assert tree["d/file"] == tree["hard"] != b"a b"
    assert stat.S_IMODE((tmp_path / "d/file").stat().st_mode) == mode


def test_a_backup_that_was_left_is_never_overwritten(tmp_path):
    op = FileOp("write", "x", "new\n")
    command = command_for(op).command
    backup = re.search(r"\.shim-[0-9a-f]+\.old", command).group()
    plant(tmp_path, {"x": "damaged", backup: "the old content"})
    assert run(command, tmp_path).returncode != 0
    assert harvest(tmp_path) == {"x": b"damaged", backup: b"the old content"}


def test_the_first_failure_ends_all(tmp_path):
    plant(tmp_path, {"x": "a", "y": "b", "w": "c"})
    ops = [FileOp("append", "x", "1"), FileOp("rename", "x", other="y"), FileOp("delete", "w"),
           FileOp("create", "z", "new\n"), FileOp("mkdir", "d"), FileOp("write", "x", "gone")]
    for style in ("plain", "coded"):
        plant(tmp_path, {"x": "a"})
        done = run(commands_for(ops, style).command, tmp_path)
        assert done.returncode == (98 if style == "coded" else 1)
        assert done.stderr.startswith(b"verification failed: rename\n")
        assert harvest(tmp_path) == {"x": b"a1", "y": b"b", "w": b"c"}


def test_operations_build_on_each_other(tmp_path):
    ops = [FileOp("mkdir", "p/q"), FileOp("create", "p/q/a", "one\n"),
           FileOp("append_line", "p/q/a", "two\n"), FileOp("read", "p/q/a"),
           FileOp("replace", "p/q/a", "2", "two"), FileOp("rename", "p/q/a", other="p/b"),
           FileOp("copy", "p/b", other="c"), FileOp("delete", "p/b"), FileOp("delete", "p/q"),
           FileOp("run", words=("ls", "-a", "p")), FileOp("list", "."), FileOp("read", "c")]
    for count in (2, 4, 7, 10, 12):
        folder = tmp_path / str(count)
        folder.mkdir()
        done = run(commands_for(ops[:count]).command, folder)
        assert done.returncode == 0, done
        assert not [name for name in harvest(folder) if name.startswith(".shim-")], done
    assert harvest(folder) == {"p": None, "c": b"one\n2\n"}
    assert done.stdout.endswith(b"one\n2\n")


# ------------------------------ reading ------------------------------

READS = {
    "text": (b"a\n b\n", 100, b"a\n b\n"),
    "empty": (b"", 100, b""),
    "at the limit": (b"x" * 100, 100, b"x" * 100),
    "above the limit": (b"x" * 101, 100, b"[shim] File truncated to 100 bytes: f\n" + b"x" * 100),
    "cut before a newline": (b"x\n", 1, b"[shim] File truncated to 1 bytes: f\nx"),
    "latin-1": (b"caf\xe9\n", 100, b"caf\xe9\n"),
    "colours": (b"\x1b[0m\r\n\t\x08", 100, b"\x1b[0m\r\n\t\x08"),
    "NUL": (b"a\x00b", 100, b"[shim] Binary file detected: f\n"),
    "png": (b"\x89PNG\r\n\x1a\n\x00\x00", 100, b"[shim] Binary file detected: f\n"),
    "controls": (b"\x01", 100, b"[shim] Binary file detected: f\n"),
}


@pytest.mark.parametrize(("content", "most", "shown"), READS.values(), ids=READS)
@pytest.mark.parametrize("tools", ["system", "busybox"])
def test_read(content, most, shown, tools, tmp_path, request):
    path = SYSTEM if tools == "system" else request.getfixturevalue("busybox_path")
    plant(tmp_path, {"f": content})
    done = run(command_for(FileOp("read", "f"), "plain", most).command, tmp_path, path)
    assert (done.returncode, done.stdout) == (0, shown)
    assert harvest(tmp_path) == {"f": content}


# ------------------------------ hostile words ------------------------------

PAYLOADS = [
    shape.format(act) for act in ("touch pwned", "echo>pwned", ">pwned")
    for shape in (
        "$({})", "`{}`", "'; {}; '", "\"; {}; \"", "{} |", "| {}", "; {} #", "&& {}", "|| {}",
        "& {} &", "\\'; {}; \\'", "'\"'; {}; '\"'", "$'\\'; {}; '", "EOF\n{}\n", "'EOF'\n{}",
        "%s'; {}; '", "x}}; {}; {{", "$(({}))", "${{x:-$({})}}", "<({})",
    )
]


@side_by_side(PAYLOADS)
def test_nothing_hostile_is_executed(payload, folder):
    word = payload.replace("\n", " ")
    ops = [FileOp("create", word, payload), FileOp("replace", word, payload + "!", payload),
           FileOp("rename", word, other=word + "2"), FileOp("run", words=("printf", "%s", payload))]
    command, description = commands_for(ops)
    done = run(command, folder)
    assert done.returncode == 0, done
    assert "pwned" not in os.listdir(folder)
    assert done.stdout.endswith(payload.encode())
    assert harvest(folder) == {word + "2": (payload + "!").encode()}
    assert "\n" not in description
    if payload != word:
        with pytest.raises(CannotCarryError):
            command_for(FileOp("delete", payload))


# ------------------------------ limits and calls ------------------------------


def bash_tool(*extra):
    return Tool("Bash", "", {"type": "object", "required": ["command"], "properties": {
        key: {"type": "string"} for key in ("command", "description", *extra)}})


WRITE = Tool("Write", "", {"required": ["file_path", "content"], "properties": {
    "file_path": {"type": "string"}, "content": {"type": "string"}}})
QWEN = Tool("run_shell_command", "", {
    "required": ["command", "is_background"], "properties": {
        "command": {"type": "string"}, "is_background": {"type": "boolean"},
        "description": {"type": "string"}, "directory": {"type": "string"}}})
REDIS = Tool("mcp__redis__do", "", {"required": ["command"],
                                    "properties": {"command": {"type": "string"}}})
NOISE = base64.b85encode(random.Random(1).getrandbits(8 * 160_000).to_bytes(160_000, "big")).decode()


@pytest.mark.parametrize(("text", "effort"), [
    ("line of text\n" * 300, "heredoc"), ("line of text\n" * 600, "hash"),
    ("line of text\n" * 4000, "heredoc"), ("line of text\n" * 8000, "hash"),
    ("line of text\n" * 40_000, "gzip"), ("'" * 20_000 + "\n", "hash"),
    ("'" * 60_000 + "\n", "gzip"),
])
def test_long_content_is_carried_another_way(text, effort, tmp_path):
    command = command_for(FileOp("create", "x", text)).command
    assert ("gzip" in command, "sha256sum" in command, command.count("<<") > 1) == {
        "heredoc": (False, False, True), "hash": (False, True, False),
        "gzip": (True, True, False)}[effort]
    wrapped = command.replace("'", "'\"'\"'")
    assert len(wrapped.encode()) <= 130_600
    assert run(command, tmp_path).returncode == 0
    assert harvest(tmp_path) == {"x": text.encode()}


@pytest.mark.parametrize("op", [
    FileOp("create", "x", NOISE), FileOp("create", "", "a"), FileOp("create", "/", "a"),
    FileOp("create", "a\x00b", "a"), FileOp("create", "a\nb", "a"), FileOp("create", "x", "\ud800"),
    FileOp("create", "\ud800", "a"), FileOp("replace", "x", "a", ""), FileOp("rename", "x"),
    FileOp("rename", "x", other="x"), FileOp("rename", "x", other="./x\r"), FileOp("run"),
    FileOp("run", words=("ls", "\x1b")),
])
def test_what_cannot_be_carried_is_said_in_a_sentence(op):
    with pytest.raises(CannotCarryError, match=r"^[A-Z].*\.$"):
        command_for(op)
    with pytest.raises(CannotCarryError):
        commands_for([])


BASH_TOOL, LARGE = bash_tool(), "line of text\n" * 2000
CALLS = {
    "bash": ([FileOp("list", "d")], [BASH_TOOL], {}, "Bash",
             {"command": "ls -la -- 'd'", "description": "List d"}),
    "bare bash": ([FileOp("list", "d")], [REDIS, Tool("Bash", "", REDIS.schema)], {}, "Bash",
                  {"command": "ls -la -- 'd'"}),
    "qwen code": ([FileOp("list", "d")], [QWEN], {}, "run_shell_command", {
        "command": "ls -la -- 'd'", "description": "List d", "is_background": False}),
    "another shell": ([FileOp("list", "d")], [Tool("my_terminal", "", REDIS.schema)], {},
                      "my_terminal", {"command": "ls -la -- 'd'"}),
    "no shell": ([FileOp("list", "d")], [REDIS, WRITE], {}, None, None),
    "a needed key that is no text": ([FileOp("list", "d")], [Tool("Bash", "", {
        **REDIS.schema, "required": ["command", {}]})], {}, "Bash", {"command": "ls -la -- 'd'"}),
    "unknown key needed": ([FileOp("list", "d")], [Tool("Bash", "", {
        **REDIS.schema, "required": ["command", "why"]})], {}, None, None),
    "large and new": ([FileOp("create", "x", LARGE)], [BASH_TOOL, WRITE],
                      {"cwd": "/p", "is_new": True}, "Write",
                      {"file_path": "/p/x", "content": LARGE}),
    "large, perhaps there": ([FileOp("create", "x", LARGE)], [BASH_TOOL, WRITE], {}, "Bash", ...),
    "large overwrite": ([FileOp("write", "x", LARGE)], [BASH_TOOL, WRITE], {}, "Bash", ...),
    "too large overwrite": ([FileOp("write", "/q/x", NOISE)], [BASH_TOOL, WRITE], {"cwd": "/p"},
                            "Write", {"file_path": "/q/x", "content": NOISE}),
    "large, on Windows": ([FileOp("create", "C:/p/x", LARGE)], [BASH_TOOL, WRITE],
                          {"cwd": "C:/p", "is_new": True}, "Write",
                          {"file_path": "C:/p/x", "content": LARGE}),
    "small and new": ([FileOp("create", "x", "a")], [BASH_TOOL, WRITE], {"is_new": True}, "Bash",
                      ...),
}


@pytest.mark.parametrize(("ops", "tools", "options", "name", "given"), CALLS.values(), ids=CALLS)
def test_rescue_call(ops, tools, options, name, given):
    call = rescue_call(ops, {tool.name: tool for tool in tools}, "plain", 1000,
                       options.get("cwd", ""), is_new=options.get("is_new", False))
    if name is None:
        assert call is None
    else:
        assert call[0] == name
        assert given is ... or call[1] == given


def test_the_write_tool_gets_escapes_that_the_client_does_not_decode():
    text = "\\u03b4 \\\\u03b4 \\\\\\u03b4\n" + LARGE
    _, given = rescue_call([FileOp("create", "x", text)], {"Bash": BASH_TOOL, "Write": WRITE},
                           "plain", 9, is_new=True)
    assert given["content"] == ("\\u005cu03b4 \\\\u03b4 \\\\\\u005cu03b4\n" + LARGE)


def test_a_content_too_large_for_everything_is_an_error():
    with pytest.raises(CannotCarryError):
        rescue_call([FileOp("create", "x", NOISE)], {"Bash": BASH_TOOL, "Write": WRITE}, "plain", 9)


def test_plain_commands_keep_to_what_the_analyser_can_follow():
    # "$" stands only at the end of a sed pattern in single quotes, which both CLIs approve.
    refused = re.compile(r"\$(?!/)|`|(?<!\w)(export|exit|set|awk|perl|eval|trap)\b|^\s*[({]|mv -|cp -"
                         r"|touch --|; \}", re.M)
    for before, ops, _ in BROKEN.values():
        ops = [op._replace(text="a" if len(op.text) > 99 else op.text.replace("{", "")) for op in ops]
        command = commands_for(ops).command
        assert not refused.search(command), command
        assert len(command) <= 9_900
