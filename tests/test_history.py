"""The model never reads the same thing twice: prompts of consecutive turns extend each other."""
import json
import threading

import pytest
import qwen_vocabulary
from bench import prefix
from conversation import Conversation
from helpers import BASH, READ, WRITE, running_shim, tool, wait_until
from mock_ollama import MockOllama, Model, SimulatedSlot, common_length, hold, model_text, text

import qwencode

WINDOW = 262_144
KEEP_S = 5.0


def xml(name, **arguments):
    values = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in arguments.items())
    return f"<tool_call>\n<function={name}>\n{values}</function>\n</tool_call>"


def hermes(name, **arguments):
    return "<tool_call>\n" + json.dumps({"name": name, "arguments": arguments}) + "\n</tool_call>"


class Kind:
    """A kind of model: how it writes calls and thought."""

    def __init__(self, path, thinks=False):
        self.name, self.path, self.thinks = f"{path}-x", path, thinks
        self.write = xml if path in ("a", "a35") else hermes

    def thought(self, text):
        if not self.thinks:
            return ""
        return f"{'' if self.path == 'a35' else '<think>'}{text}\n</think>\n\n"

    @property
    def fields(self):
        return {"thinking": {"type": "enabled", "budget_tokens": 2000}} if self.thinks else {}

    @property
    def forgets(self):
        """Whether its template rewrites past answers once a person speaks again (OL 5b)."""
        return self.path == "q3" or (self.path == "a35" and self.thinks)


KINDS = {"A": Kind("a"), "a35": Kind("a35"), "a35 thinking": Kind("a35", True), "B": Kind("b"),
         "q3": Kind("q3"), "q3 thinking": Kind("q3", True), "C": Kind("c")}


def answers(kind):
    call, thought = kind.write, kind.thought
    return [
        thought("Look.") + "I will read it.\n\n" + call("Read", file_path="/a"),
        thought("\nAnd the next.") + call("Read", file_path="/b"),
        thought("Two\n\n at once.") + "Both:\n" + call("Read", file_path="/c") + "\n"
        + call("Read", file_path="/d"),
        thought("Write.") + call("Write", file_path="/w", content='x = "a<b>"\n\ty\n' * 20),
        thought("Run.") + "Now run. " + call("Bash", command="ls | head -3 && echo 'ü'"),
        thought("Done.") + "All is done.\n",
        thought("Again.") + "  Sure.\n" + call("Read", file_path="/e"),
        thought("Nearly.") + call("Read", file_path="/f"),
        thought("End.") + "Fine.",
    ]


def converse(talk):
    """Nine turns with what the CLI mixes in (CC A6); the seventh follows a person's words."""
    talk.say("Please do it", system="# Environment\nYou have been invoked in /tmp.\n" * 20)
    talk.results("one\n" * 50)
    talk.results("two\n" * 50, reminder="The list of tasks is empty.")
    talk.results("three", "four")
    talk.results("File created", system="Remember your tasks.")
    talk.results("")
    talk.say("And the next thing")
    talk.results("five")
    talk.results("six", reminder="A file was changed.", system="Remember your tasks.")


def played(kind, way, script=None, tokens=len, play=converse, **flags):
    """Play a conversation through a shim; return the mock."""
    slot = SimulatedSlot()
    model = Model(kind.name, context=2**24)
    with MockOllama(script or answers(kind), model=model, slot=slot, tokens=tokens) as mock, \
            running_shim(mock.url, model=kind.name, verbatim=way, num_ctx=str(WINDOW),
                         **flags) as shim:
        play(Conversation(shim, **kind.fields))
    return mock


@pytest.mark.parametrize("name", KINDS)
def test_verbatim_nothing_is_read_twice(name):
    kind = KINDS[name]
    mock, script = played(kind, "on"), answers(kind)
    assert [turn.path for turn in mock.turns] == ["/api/generate"] * len(script)
    for at in range(1, len(script)):
        before, now = mock.turns[at - 1].prompt + script[at - 1], mock.turns[at].prompt
        if at == 6 and kind.forgets:
            continue
        assert now[:common_length(before, now)] == before, at
        assert mock.slot.read[at] == len(now) - len(before)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("way", ["on", "off"])
def test_bodies_extend_each_other(name, way):
    mock = played(KINDS[name], way)
    bodies = [r.body for r in mock.requests if r.path == "/api/chat" and len(r.body["messages"]) > 1
              and "probe question" not in r.raw.decode()]
    assert len(bodies) == 9
    for before, now in zip(bodies, bodies[1:]):
        assert now["messages"][:len(before["messages"])] == before["messages"]
        assert json.dumps(now.get("tools")) == json.dumps(before.get("tools"))
        assert {**now, "messages": 0} == {**before, "messages": 0}
    assert [load[1] for load in mock.loads] == [{"num_ctx": WINDOW, "shift": False}]
    asked = {json.dumps({k: v for k, v in r.body["options"].items() if k != "num_predict"})
             for r in mock.requests if r.body and "options" in r.body}
    assert asked == {json.dumps({"num_ctx": WINDOW})}


@qwen_vocabulary.needed
@pytest.mark.parametrize("name", KINDS)
def test_in_tokens_of_the_real_vocabulary_only_the_last_is_read_twice(name):
    count, kind = qwen_vocabulary.load(), KINDS[name]
    mock, script = played(kind, "on", tokens=count), answers(kind)
    for at in range(1, len(script)):
        before, now = mock.turns[at - 1].prompt + script[at - 1], mock.turns[at].prompt
        if at != 6 or not kind.forgets:
            assert mock.slot.read[at] <= count(now[len(before):]) + 1, at


def test_thirty_tool_turns_read_only_what_is_new():
    kind, seen = KINDS["B"], []

    def play(talk):
        talk.say("Go on until it is done")
        for at in range(30):
            talk.results(f"result {at}\n" * 30, reminder="tick" if at % 10 == 9 else "")

    script = [f"Step {at}.\n" + hermes("Read", file_path=f"/{at}") for at in range(31)]
    mock = played(kind, "on", script, play=play)
    for at in range(1, 31):
        seen.append(mock.slot.read[at] - (mock.turns[at].prompt_tokens
                                          - len(mock.turns[at - 1].prompt + script[at - 1])))
    assert seen == [0] * 30


def test_a_thought_that_was_never_closed_is_closed_before_the_call_in_it():
    for name in ("a35 thinking", "q3 thinking"):
        kind = KINDS[name]
        opened = "" if kind.path == "a35" else "<think>\n"
        script = [opened + "I will read.\n" + kind.write("Read", file_path="/a"), "Done."]

        def play(talk):
            talk.say("go")
            talk.results("one")

        prompt = played(kind, "on", script, play=play).turns[1].prompt
        answer = prompt.split("<|im_start|>assistant\n")[1].partition("<|im_end|>")[0]
        assert answer == "<think>\nI will read.\n</think>\n\n" + kind.write(
            "Read", file_path="/a"), name


def test_each_turn_is_found_however_soon_the_next_one_comes():
    """The turn is remembered before its end goes out: a fast client must not overtake it."""
    kind = KINDS["B"]
    script = [f"Step {at}.\n" + hermes("Read", file_path=f"/{at}") for at in range(40)]

    def play(talk):
        talk.say("go")
        for at in range(39):
            talk.results(f"r{at}")

    mock = played(kind, "on", script, play=play)
    for at in range(1, 40):
        assert mock.turns[at].prompt.startswith(mock.turns[at - 1].prompt + script[at - 1])


def test_two_sessions_that_answer_alike_keep_their_own_thoughts():
    kind = KINDS["q3 thinking"]
    script = [f"<think>\nThought of {who}.\n</think>\n\nSure." for who in ("one", "two")] + ["ok"] * 2
    mock = MockOllama(script, model=kind.name, default_num_ctx=WINDOW)
    with mock, running_shim(mock.url, model=kind.name, verbatim="on", num_ctx=str(WINDOW)) as shim:
        talks = [Conversation(shim, session=who, **kind.fields) for who in ("one", "two")]
        for talk in talks:
            talk.say("Ready?")
        sent = [talk.messages + [{"role": "user", "content": "go"}] for talk in talks]
        for talk, messages in zip(talks, sent):
            talk.messages = messages
            talk.send()
    rendered = [[m["content"] for m in r.body["messages"] if m["role"] == "assistant"]
                for r in mock.requests if r.path == "/api/chat"][-2:]
    assert ["one" in rendered[0][0], "two" in rendered[1][0]] == [True, True]


CHANGED = {
    "another text": lambda block: {**block, "text": "Edited."} if "text" in block else block,
    "another id": lambda block: {**block, "id": "toolu_other"} if "id" in block else block,
}


@pytest.mark.parametrize("name", CHANGED)
def test_an_edited_history_goes_as_it_was_edited(name):
    kind = KINDS["B"]
    script = ["I  will.\n" + hermes("Read", file_path="/a"), "Done."]

    def play(talk):
        talk.say("go")
        talk.messages[1]["content"] = [CHANGED[name](b) for b in talk.messages[1]["content"]]
        talk.answer = {"content": talk.messages[1]["content"]}
        talk.results("one")

    prompt = played(kind, "on", script, play=play).turns[1].prompt
    assert ("I  will." in prompt) == (name == "another id")
    assert ("Edited." in prompt) == (name == "another text")
    assert '{"name": "Read", "arguments": {"file_path": "/a"}}' in prompt


def test_a_restart_and_an_answer_of_chat_are_survived():
    kind = KINDS["B"]
    script = ["I will.\n" + hermes("Read", file_path="/a"), "Done."]
    mock = MockOllama(script, model=kind.name, default_num_ctx=WINDOW)
    with mock:
        with running_shim(mock.url, model=kind.name, num_ctx=str(WINDOW)) as shim:
            talk = Conversation(shim)
            talk.say("go")
        with running_shim(mock.url, model=kind.name, num_ctx=str(WINDOW)) as shim:
            talk.shim = shim
            talk.results("one")
            wait_until(lambda: shim.server.stats.turns)
            assert shim.server.stats.turns[0].notes == (
                "the last answer went back in the template's form",)
    assert "I will." in mock.turns[1].prompt
    assert '"Read", "arguments": {"file_path": "/a"}' in mock.turns[1].prompt


# ---- requests beside the conversation

def test_side_requests_change_nothing_in_the_conversation():
    """A title, a probe, a count and a small request without tools come between two turns."""
    kind = KINDS["B"]

    def play(talk):
        body = {"model": "claude-x", "max_tokens": 60, "stream": False,
                "messages": [{"role": "user", "content": "Summarise: ..."}]}
        converse_with = [lambda: talk.say("go"), lambda: talk.results("one"),
                         lambda: talk.results("two"), lambda: talk.results("three")]
        for turn in converse_with:
            turn()
            assert talk.shim.request("POST", "/v1/messages", body, talk.headers).status == 200
            talk.shim.request("POST", "/v1/messages", {**body, "max_tokens": 1}, talk.headers)
            talk.shim.request("POST", "/v1/messages/count_tokens", body, talk.headers)

    script = [part for at in range(4) for part in (hermes("Read", file_path=f"/{at}"), "Sum.")]
    mock = played(kind, "on", script, play=play)
    main = mock.turns[::2]
    assert len(mock.turns) == 8
    for before, now, wrote in zip(main, main[1:], script[::2]):
        assert now.prompt.startswith(before.prompt + wrote)


@pytest.mark.parametrize("name", ["A", "a35", "B", "C"])
def test_agents_of_one_kind_differ_from_the_first_token(name):
    """Alternating in one slot they would throw each other's tail away (OL 5b)."""
    kind = KINDS[name]
    script = [kind.write("Read", file_path=f"/{at}") for at in range(8)]
    mock = MockOllama(script, model=Model(kind.name, context=2**24), slot=SimulatedSlot(),
                      tokens=len)
    with mock, running_shim(mock.url, model=kind.name, verbatim="on", num_ctx=str(WINDOW)) as shim:
        agents = [Conversation(shim, agent=f"agent-{one}", **kind.fields) for one in "ab"]
        for one, agent in enumerate(agents):
            agent.say(f"task {one}")
        for _ in range(3):
            for agent in agents:
                agent.results("one\n" * 200)
    assert len(mock.turns) == 8
    for at in range(2, 8):
        before = mock.turns[at - 2].prompt + script[at - 2]
        assert mock.turns[at].prompt.startswith(before), at
        assert mock.slot.read[at] == mock.turns[at].prompt_tokens - len(before), at
    assert common_length(mock.turns[0].prompt, mock.turns[1].prompt) < 200


def test_compaction_extends_the_conversation():
    kind = KINDS["B"]
    script = [hermes("Read", file_path="/a"), "Read.", "A summary.", "Going on."]

    def play(talk):
        talk.say("go")
        talk.results("one\n" * 100)
        talk.say("CRITICAL: Respond with TEXT ONLY. Do NOT call any tools.\n" + "Summarise. " * 99)
        talk.messages = talk.messages[:1]
        talk.messages[0]["content"] = "This session is being continued: " + "A summary."
        talk.send()

    mock = played(kind, "on", script, play=play)
    assert mock.turns[2].prompt.startswith(mock.turns[1].prompt + "Read.")
    shared = common_length(mock.turns[3].prompt, mock.turns[2].prompt)
    assert "<tools>" in mock.turns[3].prompt[:shared], "system text and tools are kept"


def test_tool_choice_leaves_the_earlier_turns_alone():
    kind = KINDS["B"]
    script = [hermes("Read", file_path="/a"), hermes("Read", file_path="/b"), "Done."]

    def play(talk):
        talk.say("go")
        talk.results("one", tool_choice={"type": "any"})
        talk.results("two")

    mock = played(kind, "on", script, play=play)
    assert mock.turns[1].prompt.startswith(mock.turns[0].prompt + script[0])
    now, before = mock.turns[2].prompt, mock.turns[1].prompt
    assert now.startswith(before[:before.index("this turn must call")][:-80])


def test_a_change_of_tools_is_explained():
    kind = KINDS["B"]
    script = [hermes("Read", file_path="/a"), "Done."]

    def play(talk):
        talk.say("go " * 1500)
        talk.fields["tools"] = [BASH, tool("mcp__x__search", text="string"), READ, WRITE]
        talk.results("one")
        wait_until(lambda: len(talk.shim.server.stats.turns) == 2)
        record = talk.shim.server.stats.turns[-1]
        assert record.notes[0].startswith("tools changed at mcp__x__search: ")
        assert record.notes[0].endswith(" tokens read again")
        assert record.new_tokens > 500

    played(kind, "on", script, play=play)


# ---- one slot for all

def test_waiting_agents_leave_a_place_for_the_conversation():
    kind, begin = KINDS["B"], threading.Event()

    def reply(request):
        return [hold(begin), text("ok")] if "task" in request.prompt else text("ok")

    with MockOllama(reply, model=kind.name, default_num_ctx=WINDOW) as mock, \
            running_shim(mock.url, model=kind.name, num_ctx=str(WINDOW),
                         max_concurrent="2") as shim:
        agents = [threading.Thread(target=Conversation(shim, agent=f"a{n}").say, args=("task",))
                  for n in range(3)]
        for thread in agents:
            thread.start()
        mock.wait_for(1)
        assert Conversation(shim).say("hi")["content"][0]["text"] == "ok"
        begin.set()
        for thread in agents:
            thread.join(KEEP_S)
    assert len(mock.turns) == 4


def test_agents_wait_in_turn_and_the_conversation_does_not():
    kind = KINDS["B"]
    begin = threading.Event()

    def reply(request):
        begin.wait(KEEP_S)
        return model_text("ok")

    with MockOllama(reply, model=kind.name, default_num_ctx=WINDOW) as mock, \
            running_shim(mock.url, model=kind.name, num_ctx=str(WINDOW)) as shim:
        agents = [Conversation(shim, agent=f"a{n}") for n in range(3)]
        main = Conversation(shim)
        threads = [threading.Thread(target=one.say, args=(f"task {n}",))
                   for n, one in enumerate([*agents, main])]
        for thread in threads:
            thread.start()
        mock.wait_for(2)
        begin.set()
        for thread in threads:
            thread.join(KEEP_S)
        assert all(one.answer for one in (*agents, main))
    assert len(mock.turns) == 4


def test_who_waits_in_the_queue_is_kept_alive(monkeypatch):
    monkeypatch.setattr(qwencode, "FIRST_EVENT_S", 0.05)
    monkeypatch.setattr(qwencode, "KEEP_ALIVE_S", 0.05)
    kind, begin = KINDS["B"], threading.Event()

    def reply(request):
        if len(mock.turns) == 1:
            begin.wait(KEEP_S)
        return model_text("ok")

    with MockOllama(reply, model=kind.name, default_num_ctx=WINDOW) as mock, \
            running_shim(mock.url, model=kind.name, num_ctx=str(WINDOW)) as shim:
        one, two = (Conversation(shim, agent=name) for name in "ab")
        first = threading.Thread(target=one.say, args=("task",))
        first.start()
        mock.wait_for(1)
        second = threading.Thread(target=two.say, args=("task",))
        second.start()
        second.join(0.4)
        assert second.is_alive()
        begin.set()
        first.join(KEEP_S)
        second.join(KEEP_S)
    kept = [e for e in two.events if e.name == "message_delta" and not e.payload["delta"]]
    assert len(kept) >= 2


def test_a_session_reads_a_fifth_of_what_direct_translation_reads():
    """Thirty turns with a title and two agents on one slot: 12 to 29 times on five paths."""
    shim = prefix.through_shim("b")
    assert prefix.prefill_s(prefix.through_nothing("b")) >= 5 * prefix.prefill_s(shim)
    assert len(shim.turns) == 40, "the title was answered without the model"
    assert prefix.shared(shim) >= 0.995
