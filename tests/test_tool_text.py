"""Tool calls in text: the case table, cuts, streaming, names and inputs, speed."""
import json
import random
import time

import pytest
from qwencode import (
    TOOL_FORMATS,
    Call,
    CallEnd,
    CallInput,
    CallStart,
    TextDelta,
    ThinkingDelta,
    ToolTextParser,
    repair_input,
    resolve_tool,
)
from tool_text_cases import CASES, JSON, JSON_LS, QWEN3, READ, TAGGED, TAGGED_LS, XML
from tool_text_helpers import CLAUDE, QWEN, calls_of, cuts, joined, run, shown_by, tool

CUTS = (None, 1, "random", "again")


def parser(**options):
    return ToolTextParser(CLAUDE, **options)


@pytest.mark.parametrize("row", TOOL_FORMATS, ids=lambda row: row.rule)
def test_each_format_reads_its_own_example(row):
    for how in CUTS:
        assert run(row.example, how) == [Call(*READ, row.rule)], how


def test_the_table_is_as_large_as_promised():
    assert len(CASES) >= 250
    assert len({case.family for case in CASES}) >= 30


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_of_the_table(case):
    for how in CUTS:
        deltas = run(case.text, how, case.tools, case.reason, case.thought)
        assert calls_of(deltas) == case.calls, how
        if case.calls:
            assert shown_by(deltas).strip() == (case.shown or "").strip(), how
        else:
            assert shown_by(deltas) == ("" if case.thought else case.text), how
        assert not any(isinstance(each, TextDelta) and not each.text for each in deltas)


@pytest.mark.parametrize("case", [case for case in CASES if not case.calls and not case.thought],
                         ids=lambda case: case.name)
def test_switched_off_everything_is_text(case):
    assert shown_by(run(case.text, 1, enabled=False)) == case.text
