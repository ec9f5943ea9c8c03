"""The slim prompt: fewer words, same meaning, same bytes every time."""
import json

import pytest

import qwencode
from qwencode import Tool, clip, rank_tools, slim_text, slim_tool, tool_json

FILLER = "This sentence stands for a long paragraph of advice that the client sends. "


def parameter(kind="string", **more):
    return {"description": FILLER * 2, "type": kind, **more}


def tool(name, required=(), optional=(), size=1000, **extra):
    """A tool of the client's shape: noise in the schema, a long description."""
    properties = {key: parameter() for key in (*required, *optional)}
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema", "type": "object",
        "properties": properties, "required": list(required), "additionalProperties": False,
    }
    return Tool(name, (FILLER * (size // len(FILLER) + 1))[:size], {**schema, **extra})


CORE = [
    tool("Bash", ["command"],
         ["timeout", "description", "run_in_background", "dangerouslyDisableSandbox"], 2600),
    tool("Edit", ["file_path", "old_string", "new_string"], ["replace_all"], 600),
    tool("Read", ["file_path"], ["offset", "limit", "pages"], 1200),
    tool("Write", ["file_path", "content"], [], 300),
]
AGENT = tool("Agent", ["description", "prompt"],
             ["subagent_type", "model", "run_in_background", "isolation"], 4000)
SKILL = tool("Skill", ["skill"], ["args"], 1500)
SEARCH = tool("ToolSearch", ["query", "max_results"], [], 1200)
WORKFLOW = tool("Workflow", [], ["script", "name", "args"], 20000)
PLACEHOLDER = Tool("DeferredToolPlaceholder", "Never call this.", {"type": "object"})
MCP = [tool(f"mcp__{server}__{name}", ["x"]) for server in ("maps", "mail")
       for name in ("find", "send")]


def names(tools):
    return [each.name for each in tools]


# ------------------------------ tools ------------------------------


@pytest.mark.parametrize("each", [*CORE, AGENT, SKILL, SEARCH, WORKFLOW], ids=lambda t: t.name)
def test_a_known_tool_keeps_its_parameters_in_few_words(each):
    slim = slim_tool(each)
    assert slim.name == each.name
    hidden = [key for key, text in qwencode.tool_texts()[each.name][1].items() if text is None]
    assert not set(hidden) & set(each.schema["required"])
    assert list(slim.schema["properties"]) == [
        key for key in each.schema["properties"] if key not in hidden]
    assert slim.schema["required"] == each.schema["required"]
    assert FILLER[:20] not in json.dumps(slim)
    assert len(json.dumps(slim.schema)) + len(slim.description) < 1300


def test_a_known_tool_says_what_the_names_of_its_parameters_do_not():
    shown = slim_tool(CORE[1]).schema["properties"]
    assert {key: value.get("description") for key, value in shown.items()} == {
        "file_path": "absolute path", "old_string": None, "new_string": None,
        "replace_all": "change every occurrence"}


def test_every_row_says_what_its_parameters_are_in_words_of_its_own():
    for name, (description, parameters) in qwencode.tool_texts().items():
        assert 15 < len(description) < 400, name
        assert description.endswith("."), name
        assert all(len(text or "") < 60 for text in parameters.values()), name


def test_the_optional_parameters_that_are_forgotten_are_asked_for():
    assert "description" in slim_tool(CORE[0]).description
    assert "offset and limit" in slim_tool(CORE[2]).description


def test_what_only_the_client_fills_is_not_shown():
    asked = tool("AskUserQuestion", ["questions"], ["answers", "metadata"])
    assert list(slim_tool(asked).schema["properties"]) == ["questions"]


def test_the_same_tool_gives_the_same_bytes():
    first, second = (json.dumps(slim_tool(tool("Bash", ["command"], ["timeout"]))) for _ in "ab")
    assert first == second


def test_slimming_leaves_the_original_as_it_was():
    each = tool("Bash", ["command"], ["timeout"])
    before = json.dumps(each)
    slim_tool(each)
    assert json.dumps(each) == before


def test_a_foreign_tool_of_a_known_name_keeps_its_text():
    foreign = Tool("Read", "Read a sensor.", {"type": "object", "required": ["sensor"],
                                              "properties": {"sensor": {"type": "string"}}})
    assert slim_tool(foreign) == foreign


SCHEMAS = [
    ("noise goes",
     {"$schema": "x", "$id": "y", "title": "T", "type": "object", "additionalProperties": False,
      "properties": {"a": {"type": "string", "format": "uri", "examples": ["b"], "title": "A"}}},
     {"properties": {"a": {"type": "string"}}}),
    ("parameters that are named like noise stay",
     {"type": "object", "properties": {"title": {"type": "string"}, "format": {"type": "string"},
                                       "$schema": {"type": "string"}},
      "required": ["title", "format"]},
     {"properties": {"title": {"type": "string"}, "format": {"type": "string"},
                     "$schema": {"type": "string"}},
      "required": ["title", "format"]}),
    ("limits of numbers go",
     {"properties": {"n": {"type": "integer", "minimum": -(2**53 - 1), "maximum": 10}}},
     {"properties": {"n": {"type": "integer"}}}),
    ("values are not schemas",
     {"properties": {"a": {"enum": [{"title": "x"}, None], "default": {"title": "y"}}}},
     {"properties": {"a": {"enum": [{"title": "x"}, None]}}}),
    ("nested schemas are cleaned too",
     {"properties": {"a": {"type": "array", "items": {"type": "object", "title": "I",
                                                      "properties": {"b": {"anyOf": [
                                                          {"type": "string", "format": "date"},
                                                          {"type": "null"}]}}}}},
      "$defs": {"title": {"type": "string", "pattern": "x"}}},
     {"properties": {"a": {"type": "array", "items": {"type": "object",
                                                      "properties": {"b": {"anyOf": [
                                                          {"type": "string"},
                                                          {"type": "null"}]}}}}}}),
    ("odd shapes survive",
     {"properties": {"a": True, "b": {"type": ["string", "null"]}, "c": None}, "required": "a"},
     {"properties": {"a": {}, "b": {"type": ["string", "null"]}, "c": {}}}),
    ("a description that is no text", {"properties": {"a": {"description": 5}}},
     {"properties": {"a": {}}}),
    ("a long description", {"properties": {"a": {"description": "Word. " * 60}}},
     {"properties": {"a": {"description": "Word. " * 39 + "Word. …"}}}),
    ("a long description in a list",
     {"properties": {"a": {"anyOf": [{"description": "Word. " * 60}]}}},
     {"properties": {"a": {"anyOf": [{"description": "Word. " * 39 + "Word. …"}]}}}),
    ("a long value", {"properties": {"a": {"const": "word " * 99}}},
     {"properties": {"a": {"enum": ["word " * 99]}}}),
    ("properties that are no object", {"properties": [1]}, {"properties": {}}),
    ("nothing", {}, {"properties": {}}),
]


@pytest.mark.parametrize(("schema", "expected"), [row[1:] for row in SCHEMAS],
                         ids=[row[0] for row in SCHEMAS])
def test_schemas_reach_the_model_without_noise(schema, expected):
    sent = tool_json(slim_tool(Tool("mcp__a__b", "Does it.", schema)))
    assert sent["function"]["parameters"] == {"type": "object", **expected}


def test_the_text_of_an_unknown_tool_is_kept_up_to_a_limit():
    short, long = Tool("mcp__a__b", "Does it well.", {}), Tool("mcp__a__b", "Word. " * 900, {})
    assert slim_tool(short).description == "Does it well."
    assert slim_tool(long).description.endswith(". …")
    assert 900 < len(slim_tool(long).description) <= 1002


def test_a_list_of_agents_within_the_tool_stays():
    text = FILLER + "\n\nAvailable agent types and the tools they have access to:\n" \
        "- general-purpose: " + FILLER * 3 + "\n- mine: reviews SQL (Tools: Read)\n\nUsage:\n- x\n"
    slim = slim_tool(Tool("Task", text, AGENT.schema)).description
    assert "- mine: reviews SQL (Tools: Read)" in slim
    assert "- general-purpose: This sentence" in slim
    assert "Usage" not in slim
    assert len(slim) < 700


def test_a_list_of_skills_within_the_tool_stays():
    text = FILLER + "\n<available_skills>\n<skill>\n<name>\nreview\n</name>\n<description>\n" \
        + FILLER * 3 + "\n</description>\n</skill>\n<skill>\n<name>\nteam:deploy\n</name>\n" \
        "<description>\nHow we\ndeploy.\n</description>\n</skill>\n</available_skills>\n"
    slim = slim_tool(Tool("skill", text, SKILL.schema)).description
    assert slim.endswith("\n- team:deploy: How we deploy.")
    assert "\nAvailable skills:\n- review: This sentence" in slim
    assert len(slim) < 400


CLIPS = [
    ("short", "abc", 10, "abc"),
    ("at a sentence", "One two. Three four five six", 16, "One two. …"),
    ("at a word", "onetwo three four five", 16, "onetwo three …"),
    ("no place to cut", "x" * 30, 10, "xxxxx …"),
]


@pytest.mark.parametrize(("text", "limit", "expected"), [row[1:] for row in CLIPS],
                         ids=[row[0] for row in CLIPS])
def test_clip(text, limit, expected):
    assert clip(text, limit) == expected


# ------------------------------ texts ------------------------------

AGENTS = (
    "Available agent types for the Agent tool:\n"
    f"- Explore: Looks around. {FILLER * 4}(Tools: All tools except Agent)\n"
    "- mine: Reviews SQL as we like it. (Tools: Read)"
)
AGENTS_HINT = "When you launch multiple agents for one question, do it in one message."
SKILLS = (
    "The following skills are available for use with the Skill tool:\n\n"
    "- deploy: How this project is deployed.\n"
    f"- claude-api: A reference. {FILLER * 4}\nTRIGGER always.\nSKIP never.\n"
    "- plugin:check: Checks it.\n"
    "- init: Writes CLAUDE.md"
)
DEFERRED = (
    "The following deferred tools are now available via ToolSearch. Load them first:\n"
    "CronCreate\nWebFetch\nmcp__maps__find"
)
ENVIRONMENT = "# Environment\nYou work here: \n - Folder: /home/ann/x\n - Platform: linux"
DATE = "Today's date is 2026-11-21."
TASKS = "The task tools haven't been used recently. Consider TaskCreate. Ignore if not useful."
SYSTEM_2 = "\n\n".join([ENVIRONMENT, DEFERRED, AGENTS, AGENTS_HINT, SKILLS, DATE])
EVERY = ("Bash", "Agent", "Skill", "ToolSearch", "TaskCreate")
NOT_THERE = {
    "agents": "list of agents", "skills": "list of skills", "deferred": "list of deferred tools",
}


def reminder(text):
    return f"<system-reminder>\n{text}\n</system-reminder>\n"


TEXTS = [
    ("all three lists go, the rest stays", SYSTEM_2, ("Bash",),
     f"{ENVIRONMENT}\n\n{DATE}",
     ["list of deferred tools", "list of agents", "list of skills"]),
    ("the agents stay when their tool does", f"{AGENTS_HINT}\n\n{DEFERRED}", ("Agent",),
     f"{AGENTS_HINT}\n", ["list of deferred tools"]),
    ("a reminder of which nothing is left goes", reminder(SKILLS), ("Bash",), "",
     ["list of skills"]),
    ("a reminder with something else keeps that", reminder(f"{SKILLS}\n\n{DATE}"), ("Bash",),
     reminder(DATE), ["list of skills"]),
    ("two reminders in one block", reminder(TASKS) + reminder(DATE), ("Bash",), reminder(DATE),
     ["task reminder"]),
    ("what follows a reminder is the user's", reminder(DATE) + SKILLS, ("Bash",),
     reminder(DATE) + SKILLS, []),
    ("a reminder that never ends is not read", f"<system-reminder>\n{SKILLS}", ("Bash",),
     f"<system-reminder>\n{SKILLS}", []),
    ("an empty reminder stays as it came", reminder(""), (), reminder(""), []),
    ("the task reminder goes without task tools", TASKS + "\n\n", ("Bash",), "",
     ["task reminder"]),
    ("the task reminder stays with one", TASKS, ("TaskUpdate",), TASKS, []),
    ("a line of blanks is an empty line", f"intro\n  \n{TASKS}\n\t\nend", ("Bash",), "intro\n\nend",
     ["task reminder"]),
    ("lines that end in CR LF", f"intro\r\n\r\n{TASKS}\r\n\r\nend\r\n", ("Bash",),
     "intro\r\n\nend\r\n", ["task reminder"]),
    ("blank lines stay as they came where nothing is left out", " \n\nintro\r\n  \r\nend\n ", ("Bash",),
     " \n\nintro\r\n  \r\nend\n ", []),
    ("a passage behind nothing but blanks", f" \n{TASKS}", ("Bash",), "", ["task reminder"]),
    ("a token count goes always",
     "# Rules\nBe kind.\n\n<total_tokens>15000000 tokens left</total_tokens>", EVERY,
     "# Rules\nBe kind.\n", ["token count"]),
    ("a section that held only hints goes with them",
     "# Session-specific guidance\n - When the user types `/<skill-name>`, invoke it via Skill."
     " Do not guess.\n\n# Memory\nKeep notes.", ("Bash",), "# Memory\nKeep notes.",
     ["hint at skills"]),
    ("a section with more than hints stays",
     "# Session-specific guidance\n - Be brief.\n - When the user types `/<skill-name>`, invoke"
     " it via Skill.\n\n# Memory", ("Bash",),
     "# Session-specific guidance\n - Be brief.\n\n# Memory", ["hint at skills"]),
    ("hints that the tool's own text says go even if it stays",
     "# Session-specific guidance\n - When the user types `/<skill-name>`, invoke it via Skill.",
     EVERY, "", ["hint at skills"]),
    ("a hint at tasks stays with its tool", "# Tools\n - Use TaskCreate to plan work.", EVERY,
     "# Tools\n - Use TaskCreate to plan work.", []),
    ("the user's rules are never searched",
     reminder(f"# claudeMd\nContents of /x/CLAUDE.md:\n\n{AGENTS}\n\n{SKILLS}"), ("Bash",),
     reminder(f"# claudeMd\nContents of /x/CLAUDE.md:\n\n{AGENTS}\n\n{SKILLS}"), []),
    ("nor those of AGENTS.md",
     reminder(f"Codebase and user instructions are shown below. Obey.\n\n{SKILLS}"), ("Bash",),
     reminder(f"Codebase and user instructions are shown below. Obey.\n\n{SKILLS}"), []),
    ("a file that was read in stays", "Called the Read tool with the following input: {}\nResult"
     " of calling the Read tool:\n1\tAvailable agent types for the Agent tool:\n2\t- a: b\n\n"
     + DEFERRED, ("Bash",), "Called the Read tool with the following input: {}\nResult of calling"
     " the Read tool:\n1\tAvailable agent types for the Agent tool:\n2\t- a: b\n",
     ["list of deferred tools"]),
    ("a heading in the middle of a paragraph is prose", f"He wrote:\n{DEFERRED}", ("Bash",),
     f"He wrote:\n{DEFERRED}", []),
    ("plan mode is not touched",
     "Plan mode is active. You MUST NOT make any edits.\n\nUse the Explore agent type.", ("Bash",),
     "Plan mode is active. You MUST NOT make any edits.\n\nUse the Explore agent type.", []),
    ("instructions of MCP servers stay", "# MCP Server Instructions\n\n## maps\nAlways call find.",
     ("Bash",), "# MCP Server Instructions\n\n## maps\nAlways call find.", []),
    ("text after a list stays", f"{SKILLS}\n\nUse tabs.\n- Always.", ("Bash",),
     "Use tabs.\n- Always.", ["list of skills"]),
    ("unknown text", "Available agents: none", (), "Available agents: none", []),
    ("nothing", "", (), "", []),
]


@pytest.mark.parametrize(("text", "kept", "expected", "left_out"), [row[1:] for row in TEXTS],
                         ids=[row[0] for row in TEXTS])
def test_texts_about_tools_that_are_not_there(text, kept, expected, left_out):
    assert slim_text(text, kept) == (expected, left_out)


def test_lists_that_stay_lose_the_clients_long_entries_only():
    slim, left_out = slim_text(SYSTEM_2, EVERY)
    assert left_out == ["list of deferred tools, shortened", "list of agents, shortened",
                        "list of skills, shortened"]
    for whole in (ENVIRONMENT, DEFERRED.partition("\n")[2], "with ToolSearch", AGENTS_HINT, DATE, "- mine: Reviews SQL as we like it."
                  " (Tools: Read)", "- deploy: How this project is deployed.\n",
                  "- plugin:check: Checks it.\n", "- init: Writes CLAUDE.md\n"):
        assert whole in slim
    assert "- Explore: Looks around." in slim
    assert "TRIGGER" not in slim
    assert len(slim) < len(SYSTEM_2) - 500
    assert slim_text(slim, EVERY) == (slim, [])


@pytest.mark.parametrize(("times", "kept"), [(90, "Word. " * 90), (200, "Word. " * 97 + "Word. …\n")])
def test_the_users_own_entries_keep_what_he_wrote(times, kept):
    old = "- deploy: How this project is deployed.\n"
    assert old in SYSTEM_2
    slim, _ = slim_text(SYSTEM_2.replace(old, f"- deploy: {'Word. ' * times}\n"), EVERY)
    assert f"- deploy: {kept}".rstrip() in slim


def test_qwen_codes_list_of_skills_goes():
    text = reminder("The following skills are available for use with the Skill tool. Data.\n\n"
                    "<available_skills>\n<skill>\n<name>\nbatch\n</name>\n</skill>\n\n"
                    "<skill>\n<name>\nloop\n</name>\n</skill>\n</available_skills>")
    assert slim_text(text, ("edit",)) == ("", ["list of skills"])
    assert slim_text(text, ("skill",)) == (text, [])


@pytest.mark.parametrize("piece", [
    "<system-reminder>\n", "- a: b\n", "Available agent types for the Agent tool:\n\n", "\n \n",
    "# Session-specific guidance\n", "<total_tokens>", " - When the user types `/a`", "- ", "<skill><name>a", "<skill>  ",
    "<skill><name>a</name>  ",
])
def test_hostile_text_takes_linear_time(piece):
    text = piece * (300_000 // len(piece))
    slim, _ = slim_text(text, ())
    assert len(slim) <= len(text)
    slim_tool(Tool("Task", text, AGENT.schema))
    slim_tool(Tool("Skill", text, SKILL.schema))


# ------------------------------ which tools ------------------------------

FIRST_330 = [AGENT, CORE[0], CORE[1], tool("ListAgents"), CORE[2], tool("ReportFindings"),
             tool("ScheduleWakeup"), SKILL, SEARCH, WORKFLOW, PLACEHOLDER, CORE[3]]
INLINE = [AGENT, CORE[0], tool("CronCreate"), CORE[1], tool("EnterWorktree"),
          tool("ExitPlanMode"), tool("NotebookEdit"), CORE[2], SKILL, tool("TaskCreate"),
          tool("WebFetch"), tool("WebSearch"), WORKFLOW, CORE[3], *MCP]
QWEN = [tool(name) for name in (
    "agent", "edit", "get_goal", "glob", "grep_search", "list_agents", "notebook_edit",
    "read_file", "run_shell_command", "skill", "tool_call", "tool_search", "update_goal",
    "write_file")]

RANKS = [
    ("2.1.330 at the default", FIRST_330, 8, (),
     ["Agent", "Bash", "Edit", "ListAgents", "Read", "Skill", "ToolSearch", "Write"]),
    ("tools inline with two servers", INLINE, 8, (),
     ["Agent", "Bash", "Edit", "ExitPlanMode", "Read", "Write", "mcp__maps__find",
      "mcp__mail__find"]),
    ("no cap", FIRST_330, 0, (), [t.name for t in FIRST_330 if t is not PLACEHOLDER]),
    ("room for all", FIRST_330, 11, (), [t.name for t in FIRST_330 if t is not PLACEHOLDER]),
    ("the placeholder is never offered", [PLACEHOLDER, CORE[0]], 8, (), ["Bash"]),
    ("the four are never dropped", INLINE, 2, (), ["Bash", "Edit", "Read", "Write"]),
    ("a tool in use keeps its place", INLINE, 6, {"WebSearch", "Workflow"},
     ["Bash", "Edit", "Read", "WebSearch", "Workflow", "Write"]),
    ("a loaded tool joins beyond the cap", INLINE, 4, {"mcp__mail__send"},
     ["Bash", "Edit", "Read", "Write", "mcp__mail__send"]),
    ("a server in use needs no second place", INLINE, 6, {"mcp__mail__send"},
     ["Bash", "Edit", "Read", "Write", "mcp__maps__find", "mcp__mail__send"]),
    ("what is in use but not offered does not count", INLINE, 5, {"Gone", "ToolSearch"},
     ["Bash", "Edit", "Read", "Write", "mcp__maps__find"]),
    ("Qwen Code", QWEN, 8, (),
     ["edit", "glob", "grep_search", "read_file", "run_shell_command", "tool_call", "tool_search",
      "write_file"]),
    ("a required answer format comes first", [*INLINE, tool("StructuredOutput")], 7, (),
     ["Bash", "Edit", "Read", "Write", "mcp__maps__find", "mcp__mail__find",
      "StructuredOutput"]),
    ("a shell known by its shape only",
     [tool(f"t{n}") for n in range(9)] + [tool("terminal", ["command"])], 2, (),
     ["t0", "terminal"]),
    ("an unknown tool goes before what is seldom asked for",
     [*CORE, *MCP[:2], tool("WebSearch"), tool("Zork")], 6, (),
     ["Bash", "Edit", "Read", "Write", "mcp__maps__find", "Zork"]),
    ("a server's second tool goes last", [*CORE, *MCP[:2], tool("WebSearch"), tool("Zork")], 7, (),
     ["Bash", "Edit", "Read", "Write", "mcp__maps__find", "WebSearch", "Zork"]),
    ("nothing", [], 8, (), []),
]


@pytest.mark.parametrize(("tools", "limit", "in_use", "expected"), [row[1:] for row in RANKS],
                         ids=[row[0] for row in RANKS])
def test_the_most_useful_tools_are_forwarded(tools, limit, in_use, expected):
    assert names(rank_tools(tools, limit, frozenset(in_use))) == expected


NAMED = [
    ("a server's tool by its own name", {"use", "send", "now"}, 7,
     ["Bash", "Edit", "ExitPlanMode", "Read", "Write", "mcp__maps__send", "mcp__mail__send"]),
    ("a tool by its whole name", {"the", "WebSearch", "mcp__mail__send"}, 7,
     ["Bash", "Edit", "Read", "WebSearch", "Write", "mcp__maps__find", "mcp__mail__send"]),
    ("no more than the limit", {"WebSearch", "Workflow", "NotebookEdit"}, 5,
     ["Bash", "Edit", "Read", "Write", "mcp__maps__find"]),
    ("not by another case or a part", {"websearch", "mail", "Web"}, 6,
     ["Bash", "Edit", "Read", "Write", "mcp__maps__find", "mcp__mail__find"]),
]


@pytest.mark.parametrize(("words", "limit", "expected"), [row[1:] for row in NAMED],
                         ids=[row[0] for row in NAMED])
def test_a_tool_that_the_user_names_goes_first(words, limit, expected):
    assert names(rank_tools(INLINE, limit, words=frozenset(words))) == expected


def test_a_joining_tool_leaves_those_before_it_in_place():
    before = names(rank_tools(FIRST_330, 8, frozenset({"Bash", "ToolSearch", "Agent"})))
    joined = [*FIRST_330, MCP[0]]
    after = names(rank_tools(joined, 8, frozenset({"Bash", "ToolSearch", "Agent", MCP[0].name})))
    assert [name for name in before if name in after] == after[:-1]
    assert {"Bash", "ToolSearch", "Agent", MCP[0].name} <= set(after)


def test_every_known_rank_is_named_once():
    assert len(set(qwencode.TOOL_RANKS)) == len(qwencode.TOOL_RANKS)
    assert not set(qwencode.TOOL_RANKS) & qwencode.CORE_TOOLS


# ------------------------------ the first turn ------------------------------


@pytest.mark.parametrize("tools", [FIRST_330, INLINE, QWEN], ids=["2.1.330", "inline", "Qwen"])
def test_the_first_turn_becomes_small(tools):
    kept = rank_tools(tools, 8)
    lists = SYSTEM_2 + "".join(f"\n- {name}: {FILLER * 6}" for name in qwencode.CLIENT_ENTRIES)
    slim_lists, _ = slim_text(lists.replace(f"\n\n{DATE}", ""), names(kept))
    size = len(json.dumps([slim_tool(each) for each in kept])) + len(slim_lists)
    assert size < 9000
