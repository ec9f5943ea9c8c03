"""The real Qwen vocabulary, for tests that measure the estimate against it.

Never needed to run qwencode. `pip install --no-deps qwen-agent` and `pip install
tiktoken` bring it; QWEN_VOCABULARY may name a copy of qwen.tiktoken instead.
"""
import base64
import importlib.util
import os
from pathlib import Path

import pytest

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def vocabulary_file():
    """The path of qwen.tiktoken, or None; the package itself is not imported."""
    named = os.environ.get("QWEN_VOCABULARY")
    if named:
        return Path(named)
    package = importlib.util.find_spec("qwen_agent")
    if package is None or not package.origin:
        return None
    return Path(package.origin).parent / "utils" / "qwen.tiktoken"


def missing():
    """Why the vocabulary cannot be had here, "" when it can."""
    path = vocabulary_file()
    if path is None or not path.is_file():
        return "the package qwen-agent, which carries the Qwen vocabulary, is not installed"
    if importlib.util.find_spec("tiktoken") is None:
        return "the package tiktoken, which reads the Qwen vocabulary, is not installed"
    return ""


# It comes with a package of others, which the test command does not install.
needed = pytest.mark.skipif(bool(missing()), reason=missing())


def load():
    """A function from text to its number of tokens."""
    import tiktoken

    rows = (line.split() for line in vocabulary_file().read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in rows}
    encoding = tiktoken.Encoding("qwen", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={})
    return lambda text: len(encoding.encode(text, disallowed_special=()))
