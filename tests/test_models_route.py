"""/v1/models: the CLI's picker, paging, and that a model chosen there answers."""
import pytest
import qwencode as q
from helpers import running_shim
from mock_ollama import MockOllama, text

NAMES = ["qwen3:8b", "plain"]
IDS = ["qwen3:8b", "plain", "claude-qwen3:8b", "claude-plain:latest"]


PAGES = [
    ("all", {}, IDS, False),
    ("the CLI's question", {"limit": "1000"}, IDS, False),
    ("a limit", {"limit": "3"}, IDS[:3], True),
    ("the page after", {"limit": "3", "after_id": IDS[2]}, IDS[3:], False),
    ("the page before", {"limit": "1", "before_id": IDS[2]}, IDS[1:2], True),
    ("the first page before", {"limit": "9", "before_id": IDS[2]}, IDS[:2], False),
    ("nothing after the last", {"after_id": IDS[3]}, [], False),
    ("unknown ids and odd limits", {"after_id": "x", "limit": "-1"}, IDS, False),
    ("a limit of nothing", {"limit": "0"}, IDS[:1], True),
]


@pytest.mark.parametrize(("query", "ids", "more"), [row[1:] for row in PAGES],
                         ids=[row[0] for row in PAGES])
def test_pages(query, ids, more):
    page = q.model_page(NAMES, query)
    assert [row["id"] for row in page["data"]] == ids
    assert page["has_more"] == more
    assert (page["first_id"], page["last_id"]) == ((ids[0], ids[-1]) if ids else (None, None))
    assert all(row["type"] == "model" and row["display_name"] for row in page["data"])


@pytest.mark.parametrize(("requested", "picked"), [
    ("claude-qwen3:8b", "qwen3:8b"), ("claude-opus-5-5", ""), ("qwen3:8b", ""), ("", ""),
    ("claude-", ""), ("claude-hf.co/a/b:Q4", "hf.co/a/b:Q4")])
def test_a_picker_s_id_is_told_from_anthropic_s(requested, picked):
    assert q.picked_model(requested) == picked


CHOICES = [
    ("the picker's model", "claude-plain:latest", {}, "plain:latest"),
    ("Anthropic's name", "claude-opus-5-5", {}, "qwen3:8b"),
    ("a local name without leave", "plain:latest", {}, "qwen3:8b"),
    ("a local name with leave", "plain:latest", {"use_requested_model": "on"}, "plain:latest"),
    ("a role", "claude-haiku-4-5-20251001", {"model_map": "haiku=plain:latest"}, "plain:latest"),
    ("a role's model by its name", "plain:latest", {"model_map": "haiku=plain:latest"},
     "plain:latest"),
    ("another role", "claude-opus-5-5", {"model_map": "haiku=plain:latest"}, "qwen3:8b"),
]


@pytest.mark.parametrize(("requested", "flags", "wanted"), [row[1:] for row in CHOICES],
                         ids=[row[0] for row in CHOICES])
def test_the_model_that_answers(requested, flags, wanted):
    with MockOllama(text("ok"), models=["qwen3:8b", "plain:latest"]) as ollama, running_shim(
            ollama.url, model="qwen3:8b", **flags) as shim:
        answer = shim.messages(stream=False, model=requested).json
        assert ollama.turns[-1].body["model"] == wanted
    assert answer["model"] == requested


def test_what_ollama_has_is_listed_for_the_picker():
    with MockOllama(text("ok"), models=["qwen3:8b", "plain:latest"]) as ollama, running_shim(
            ollama.url, model="qwen3:8b") as shim:
        rows = shim.request("GET", "/v1/models?limit=1000").json["data"]
        one = shim.request("GET", "/v1/models/claude-qwen3:8b").json
        assert shim.request("GET", "/v1/models/claude-qwen3%3A8b?beta=true").json == one
    assert [row["id"] for row in rows if row["id"].startswith("claude-")] == [
        "claude-qwen3:8b", "claude-plain:latest"]
    assert one == {"type": "model", "id": "claude-qwen3:8b", "display_name": "qwen3:8b (Ollama)",
                   "created_at": "1970-01-01T00:00:00Z"}
