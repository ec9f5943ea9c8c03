"""A client that holds a conversation as Claude Code does, for tests of the history."""
from helpers import BASH, READ, WRITE
from qwencode import fold

SYSTEM = [{"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.330.fa0; cch=1;"},
          {"type": "text", "text": "You are a coding agent.\n" + "Be careful with files. " * 40}]


class Conversation:
    """Messages so far; say() and results() send the next request and keep its answer."""

    def __init__(self, shim, session="s1", agent="", tools=(BASH, READ, WRITE), system=SYSTEM,
                 **fields):
        self.shim, self.messages = shim, []
        self.headers = {"x-claude-code-session-id": session}
        if agent:
            self.headers["x-claude-code-agent-id"] = agent
        self.fields = {"model": "claude-x", "max_tokens": 1000, "stream": True,
                       "tools": list(tools), "system": list(system), **fields}
        self.answer = {}
        self.events = []

    def send(self, **fields):
        body = {**self.fields, "messages": self.messages, **fields}
        got = self.shim.request("POST", "/v1/messages?beta=true", body, self.headers)
        assert got.status == 200, got.data
        self.events = got.events
        assert self.events[-1].name == "message_stop", self.events[-1]
        self.answer = fold(self.events)
        self.messages.append({"role": "assistant", "content": [
            self.echo(block) for block in self.answer["content"]]})
        return self.answer

    @staticmethod
    def echo(block):
        """A block as the CLI sends it back: inputs are written anew (CC A6)."""
        if block["type"] == "tool_use" and block["name"] == "Edit":
            return {**block, "input": {"replace_all": False, **block["input"]}}
        return block

    def say(self, text, system="", **fields):
        content = [{"type": "text", "text": text, "cache_control": {"type": "ephemeral"}}]
        self._settle()
        self.messages.append({"role": "user", "content": content})
        if system:
            self.messages.append({"role": "system", "content": system})
        return self.send(**fields)

    def results(self, *texts, reminder="", system="", **fields):
        """Answer the open calls, in reverse order of the calls."""
        calls = [b for b in self.answer["content"] if b["type"] == "tool_use"]
        blocks = [{"type": "tool_result", "tool_use_id": call["id"], "content": text}
                  for call, text in zip(calls, texts)][::-1]
        if reminder:
            blocks.append({"type": "text", "text": f"<system-reminder>\n{reminder}\n"
                                                   "</system-reminder>"})
        self._settle()
        self.messages.append({"role": "user", "content": blocks})
        if system:
            self.messages.append({"role": "system", "content": system})
        return self.send(**fields)

    def _settle(self):
        """Older messages lose their marker; one text block becomes a string."""
        for message in self.messages:
            content = message["content"]
            if message["role"] == "user" and isinstance(content, list):
                content = [{k: v for k, v in b.items() if k != "cache_control"} for b in content]
                plain = len(content) == 1 and content[0]["type"] == "text"
                message["content"] = content[0]["text"] if plain else content
