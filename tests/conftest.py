"""Fixtures: the recorded traffic of real Ollama servers, and both ways to relay."""
import json
from pathlib import Path

import pytest

import qwencode

RECORDINGS = Path(__file__).resolve().parent / "data" / "recordings"


def load_recording(version, case):
    return json.loads((RECORDINGS / version / f"{case}.json").read_text(encoding="utf-8"))


@pytest.fixture
def recording():
    return load_recording


@pytest.fixture(params=["own thread", "shared relay"])
def relayed(request, monkeypatch):
    """A test twice: streams on threads of their own, and on the one for many.

    For tests in which an answer runs; before its first word both ways are one.
    """
    if request.param == "shared relay":
        monkeypatch.setattr(qwencode, "MANY_STREAMS", 1)
    return request.param
