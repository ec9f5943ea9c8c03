"""The rule of the file: sections look up, never down; no I/O above the banner."""
import ast
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "qwencode.py"
TEXT = SOURCE.read_text(encoding="utf-8")
TREE = ast.parse(TEXT)
BANNER = re.compile(r"^# =+ (\d+)\. ([A-Z /]+) =+$|^# =+ (I/O BELOW THIS LINE) =+$")
IO_MODULES = {
    "socket", "select", "selectors", "os", "sys", "subprocess", "threading", "time", "random",
    "secrets", "uuid", "http", "urllib", "tempfile", "shutil", "signal", "pathlib", "io",
}
MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 12_426


def banners():
    """[(line, section number or None for the I/O banner)] in file order."""
    found = []
    for number, line in enumerate(TEXT.splitlines(), 1):
        match = BANNER.match(line)
        if match:
            found.append((number, None if match.group(3) else int(match.group(1))))
    return found


STARTS = [(line, section) for line, section in banners() if section is not None]


def section_of(line):
    return max((section for start, section in STARTS if start <= line), default=0)


def top_level_names():
    names = {}
    for node in TREE.body:
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            if isinstance(target, ast.Name):
                names.setdefault(target.id, section_of(node.lineno))
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.setdefault(node.name, section_of(node.lineno))
    return names


def test_the_sections_are_numbered_in_order():
    numbers = [section for _, section in banners() if section is not None]
    assert numbers == list(range(1, 18))
    assert [section for _, section in banners()].index(None) == 14


def test_every_top_level_name_is_defined_once():
    names = [node.name for node in TREE.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    names += [target.id for node in TREE.body if isinstance(node, ast.Assign)
              for target in node.targets if isinstance(target, ast.Name)]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def used_names(body):
    """(name, line) of every name that is read, but for a function's own variables."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from used_names([*node.body, *node.bases, *node.decorator_list])
            continue
        inside = list(ast.walk(node))
        own = set()
        if isinstance(node, ast.FunctionDef):
            own = {n.arg for n in inside if isinstance(n, ast.arg)}
            own |= {n.id for n in inside if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        for n in inside:
            if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load) and n.id not in own:
                yield n.id, n.lineno


def test_a_section_uses_only_what_stands_above_it():
    defined = top_level_names()
    upward = [f"{line}: {name} of section {defined[name]}" for name, line in used_names(TREE.body)
              if name in defined and defined[name] > section_of(line)]
    assert upward == []


def test_nothing_above_the_banner_does_io():
    edge = next(line for line, section in banners() if section is None)
    modules = {}
    for node in ast.walk(TREE):
        if isinstance(node, ast.Import):
            for name in node.names:
                modules[(name.asname or name.name).split(".")[0]] = name.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.module:
            for name in node.names:
                modules[name.asname or name.name] = node.module.split(".")[0]
    culprits = [
        f"{node.lineno}: {node.id}"
        for node in ast.walk(TREE)
        if isinstance(node, ast.Name) and node.lineno < edge
        and modules.get(node.id) in IO_MODULES
    ]
    calls = [
        f"{node.lineno}: {node.func.id}()"
        for node in ast.walk(TREE)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.lineno < edge
        and (node.func.id in ("open", "print", "input")
             or node.func.id == "late" and node.args[0].value in IO_MODULES)
    ]
    assert culprits + calls == []


FUNCTIONS = [n for n in ast.walk(TREE) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]


def test_no_function_is_longer_than_sixty_lines():
    long = [
        (node.name, node.end_lineno - node.lineno + 1)
        for node in FUNCTIONS
        if node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert long == []


def test_most_functions_are_short():
    lengths = sorted(node.end_lineno - node.lineno + 1 for node in FUNCTIONS)
    assert lengths[len(lengths) // 2] <= 10
    assert lengths[len(lengths) * 9 // 10] <= 30


def test_the_file_stays_readable_in_one_sitting():
    assert len(TEXT.splitlines()) <= MAX_FILE_LINES


@pytest.mark.parametrize("word", ["TODO", "FIXME", "XXX", "HACK"])
def test_nothing_is_left_for_later(word):
    assert word not in TEXT
