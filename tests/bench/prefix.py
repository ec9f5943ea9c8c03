#!/usr/bin/env python3
"""What a session costs in prefill: the shim against direct translation, on one model slot.

    python tests/bench/prefix.py [path ...]     # a a35 b q3 c; default: b

A simulated slot (mock_ollama.SimulatedSlot) charges 1 ms for each token that its cache does
not hold. The session has the shapes of Claude Code's traffic with text of our own: 24 tools
of 60 KB, a billing header that changes with each request, a title request, 30 tool turns with
reminders in between, two agents of one kind that take turns. Direct translation hands each
request on as it is.
"""
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent)]

# Imported here: they lie where the line above looks.
from helpers import running_shim, tool  # noqa: E402
from mock_ollama import MockOllama, Model, SimulatedSlot, common_length  # noqa: E402

PREFILL_S = 0.001
TURNS, ANSWER = 30, "I look at the next part."
NAMES = ("Agent AskUserQuestion Bash BashOutput CronCreate Edit EnterPlanMode EnterWorktree"
         " ExitPlanMode Glob Grep KillShell LSP ListMcpResources Monitor NotebookEdit Read"
         " RemoteTrigger Skill TaskOutput TodoWrite WebFetch WebSearch Write").split()
KNOWN = {"Bash": {"command": "string"}, "Read": {"file_path": "string"},
         "Write": {"file_path": "string", "content": "string"}, "Glob": {"pattern": "string"},
         "Grep": {"pattern": "string"}, "Agent": {"description": "string", "prompt": "string"}}
RULES = "Follow the conventions of the project and say what you changed. "
RESULT = "".join(f"    {n}\tvalue = compute({n})  # a line of the file\n" for n in range(60))
TITLE = {"type": "json_schema", "schema": {
    "type": "object", "properties": {"title": {"type": "string"}}}}


def tools():
    made = []
    for name in NAMES:
        described = tool(name, **KNOWN.get(name, {"value": "string"}))
        made.append({**described, "description": f"Use {name}. " + RULES * 38})
    return made


class Session:
    """The requests of a session, one after the other."""

    def __init__(self):
        self.count = 0

    def body(self, messages, offered=True, **fields):
        self.count += 1
        header = f"x-anthropic-billing-header: cc_version=2.1.330.a1; cch={self.count:05x};"
        system = [{"type": "text", "text": header},
                  {"type": "text", "text": "You are an agent for code.\n" + RULES * 90}]
        more = {"tools": tools()} if offered else {}
        return {"model": "claude-x", "max_tokens": 8000, "stream": False, "system": system,
                "messages": messages, **more, **fields}

    def requests(self):
        """Yield (agent, body); the answer's content is sent back in."""
        title = [{"role": "user", "content": "<session>\nMend the parser\n</session>"}]
        yield "", self.body(title, False, output_config={"format": TITLE})
        main = [{"role": "user", "content": "Mend the parser"},
                {"role": "system", "content": "# Environment\n" + RULES * 60}]
        agents = {name: [{"role": "user", "content": f"Search part {name}. " + RULES * 20}]
                  for name in "ab"}
        for at in range(TURNS):
            yield from self.turn("", main, at)
            if at in (8, 9, 10, 20, 21):
                for name, messages in agents.items():
                    yield from self.turn(name, messages, at)

    def turn(self, agent, messages, at):
        answer = yield agent, self.body(messages)
        messages.append({"role": "assistant", "content": answer})
        results = [{"type": "tool_result", "tool_use_id": block["id"],
                    "content": f"{agent}{at}\n{RESULT}"}
                   for block in answer if block["type"] == "tool_use"]
        messages.append({"role": "user", "content": results})
        if at % 10 == 9:
            messages.append({"role": "system", "content": "Remember the list of tasks."})


def play(send):
    """Run the session; send(agent, body) returns an answer's content."""
    requests, answer = Session().requests(), None
    while True:
        try:
            agent, body = requests.send(answer)
        except StopIteration:
            return
        answer = send(agent, body)


def joined(content):
    if isinstance(content, str):
        return content
    return "".join(block.get("text", "") for block in content)


def direct(body):
    """Translate a request as simple proxies do, block by block."""
    messages = [{"role": "system", "content": joined(body["system"])}]
    for message in body["messages"]:
        content = message["content"]
        results = [b for b in content if isinstance(b, dict) and b["type"] == "tool_result"]
        calls = [b for b in content if isinstance(b, dict) and b["type"] == "tool_use"]
        messages += [{"role": "tool", "content": one["content"]} for one in results]
        if not results:
            made = {"role": message["role"], "content": joined(content)}
            if calls:
                made["tool_calls"] = [{"function": {"name": b["name"], "arguments": b["input"]}}
                                      for b in calls]
            messages.append(made)
    offered = [{"type": "function", "function": {
        "name": t["name"], "description": t["description"], "parameters": t["input_schema"]}}
        for t in body.get("tools", ())]
    return {"model": "", "messages": messages, "tools": offered, "stream": False, "think": False,
            "options": {"num_ctx": 262_144}}


def mock_for(path):
    """A model that reads one file after the other."""
    model = Model(f"{path}-x", context=2**24)

    def reply(request):
        at = len(mock.turns)
        return ANSWER + "\n\n" + model.kind.write_call("Read", {"file_path": f"/part_{at}.py"})

    mock = MockOllama(reply, model=model, slot=SimulatedSlot(PREFILL_S), default_num_ctx=262_144)
    return mock


def through_shim(path, **flags):
    with mock_for(path) as mock, \
            running_shim(mock.url, model=mock.model, num_ctx="262144", **flags) as shim:
        def send(agent, body):
            headers = {"x-claude-code-session-id": "s"}
            if agent:
                headers["x-claude-code-agent-id"] = agent
            answer = shim.request("POST", "/v1/messages", body, headers)
            assert answer.status == 200, answer.data
            return answer.json["content"]

        play(send)
    return mock


def through_nothing(path, header=True):
    import urllib.request
    with mock_for(path) as mock:
        def send(agent, body):
            if not header:
                body["system"] = body["system"][1:]
            sent = {**direct(body), "model": mock.model}
            request = urllib.request.Request(mock.url + "/api/chat", json.dumps(sent).encode())
            with urllib.request.urlopen(request, timeout=60) as answer:
                message = json.load(answer)["message"]
            made = [{"type": "text", "text": message["content"]}] if message["content"] else []
            return made + [{"type": "tool_use", "id": call["id"], "name": call["function"]["name"],
                            "input": call["function"]["arguments"]}
                           for call in message.get("tool_calls", ())]

        play(send)
    return mock


def prefill_s(mock):
    return sum(mock.slot.read) * PREFILL_S


def shared(mock):
    """The least share of a main turn's prompt that the next one begins with."""
    prompts = [turn.prompt for turn in mock.turns if len(turn.prompt) > 5000]
    return min(max(common_length(old, new) for old in prompts[:at]) / len(prompts[at - 1])
               for at, new in enumerate(prompts) if at and len(prompts[at - 1]) < len(new))


def main(paths):
    print(f"{'':28}{'model calls':>12}{'tokens read':>13}{'prefill s':>11}{'times':>8}")
    for path in paths:
        rows = [("shim, verbatim", through_shim(path)),
                ("shim, /api/chat", through_shim(path, verbatim="off")),
                ("direct, no billing header", through_nothing(path, header=False)),
                ("direct", through_nothing(path))]
        best = prefill_s(rows[0][1])
        for name, mock in rows:
            print(f"{path + '  ' + name:28}{len(mock.turns):>12}{sum(mock.slot.read):>13,}"
                  f"{prefill_s(mock):>11.1f}{prefill_s(mock) / best:>8.1f}")


if __name__ == "__main__":
    main(sys.argv[1:] or ["b"])
