"""Fixtures: the recorded traffic of real Ollama servers."""
import json
from pathlib import Path

import pytest

RECORDINGS = Path(__file__).resolve().parent / "data" / "recordings"


def load_recording(version, case):
    return json.loads((RECORDINGS / version / f"{case}.json").read_text(encoding="utf-8"))


@pytest.fixture
def recording():
    return load_recording
