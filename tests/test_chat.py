"""The chat encoding against the published vectors, and the rules that these do not reach."""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from v4jax.chat import (
    ASSISTANT,
    BOS,
    DSML,
    ENCODING_FILE,
    END_THINK,
    EOS,
    LATEST_REMINDER,
    THINK,
    USER,
    ChatError,
    Completion,
    FixedStrings,
    ToolCall,
    encode_messages,
    parse_completion,
)

TOOLS_SHA256 = "c7d3159308f7d076bee8974ece110fda1f92f6e577306e602ba2b466b4dcd904"
OUTPUT_SHA256 = {1: "9b366d9d2eac842a", 2: "ca66b01a1ac3a204", 3: "b3b1cd8748b7b90d", 4: "60e1643840ba9e4a"}

SYSTEM = {"role": "system", "content": "S"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def user(content, **more):
    return {"role": "user", "content": content, **more}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def call(name, arguments, call_id=None):
    made = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return made if call_id is None else made | {"id": call_id}


def result(content, call_id):
    return {"role": "tool", "tool_call_id": call_id, "content": content}


@pytest.fixture(scope="session")
def vectors(shared):
    folder = shared / "reference" / "chat_vectors"
    found = {}
    for number in OUTPUT_SHA256:
        given = json.loads((folder / f"test_input_{number}.json").read_text())
        messages = given if isinstance(given, list) else given["messages"]
        if isinstance(given, dict):
            messages[0]["tools"] = given["tools"]
        found[number] = messages, (folder / f"test_output_{number}.txt").read_text()
    return found


def encoding_file(directory, tools_template):
    """A checkpoint's encoding file with texts of our own, and with code that must not run."""
    (directory / ENCODING_FILE).parent.mkdir()
    (directory / ENCODING_FILE).write_text(
        f"import nothing_that_exists\ndsml_token: str = {DSML!r}\nTOOLS_TEMPLATE = {tools_template!r}\n"
        "response_format_template: str = (\n    'RF:\\n'\n    '{schema}'\n)\n"
        "REASONING_EFFORT_MAX = ('Think ' 'hard.\\n\\n')\nraise SystemExit('never executed')\n"
    )
    return FixedStrings.from_directory(directory)


@pytest.fixture(scope="session")
def strings(tmp_path_factory):
    template = "## Tools\n\n<{dsml_token}x> {thinking_start_token} {thinking_end_token}\n{tool_schemas}\n"
    return encoding_file(tmp_path_factory.mktemp("checkpoint"), template)


@pytest.fixture(scope="session")
def vector_strings(vectors, tmp_path_factory):
    """The released tools text, taken from a vector's output and known by its hash."""
    messages, output = vectors[1]
    schemas = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in messages[0]["tools"])
    text = output[output.index("## Tools") : output.index(USER)].replace(schemas, "")
    assert hashlib.sha256(text.encode()).hexdigest() == TOOLS_SHA256
    heading = "### Available Tool Schemas\n\n"
    template = text.replace(DSML, "{dsml_token}").replace(THINK, "{thinking_start_token}")
    template = template.replace(END_THINK, "{thinking_end_token}").replace(heading, heading + "{tool_schemas}")
    return encoding_file(tmp_path_factory.mktemp("checkpoint"), template)


# ---- the published vectors -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", OUTPUT_SHA256)
def test_encodes_the_published_vector(number, vectors, vector_strings):
    messages, output = vectors[number]
    assert hashlib.sha256(output.encode()).hexdigest().startswith(OUTPUT_SHA256[number])
    assert encode_messages(messages, thinking=number != 4, strings=vector_strings) == output


@pytest.mark.parametrize("number", OUTPUT_SHA256)
def test_parses_the_last_turn_of_the_published_vector(number, vectors, vector_strings):
    messages, output = vectors[number]
    prompt = encode_messages(messages[:-1], thinking=number != 4, strings=vector_strings)
    assert output.startswith(prompt)
    completion = parse_completion(output.removeprefix(prompt), thinking=number != 4)
    last = {key: value for key, value in messages[-1].items() if value}
    assert completion.to_message() == last


def test_parses_the_published_tool_call(vectors):
    messages, output = vectors[1]
    text = output.split(ASSISTANT + THINK)[1].split(USER)[0]
    completion = parse_completion(text, thinking=True)
    assert completion.content == ""
    assert completion.reasoning == messages[2]["reasoning_content"]
    assert completion.tool_calls == (ToolCall("get_weather", '{"location": "Beijing", "unit": "celsius"}'),)


# ---- modes -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "prompt"),
    [
        ({}, f"{BOS}S{USER}Q{ASSISTANT}{END_THINK}"),
        ({"thinking": True}, f"{BOS}S{USER}Q{ASSISTANT}{THINK}"),
        ({"thinking": True, "effort": "high"}, f"{BOS}S{USER}Q{ASSISTANT}{THINK}"),
        ({"thinking": True, "effort": "max"}, f"{BOS}Think hard.\n\nS{USER}Q{ASSISTANT}{THINK}"),
        ({"effort": "max"}, f"{BOS}S{USER}Q{ASSISTANT}{END_THINK}"),
    ],
    ids=["non-think", "think", "think high", "think max", "effort without thinking"],
)
def test_prompt_of_each_mode(options, prompt, strings):
    assert encode_messages([SYSTEM, user("Q")], strings=strings, **options) == prompt


def test_plain_chat_needs_no_encoding_file(tmp_path):
    strings = FixedStrings.from_directory(tmp_path)
    want = f"{BOS}{USER}Q{ASSISTANT}{END_THINK}A{EOS}{USER}R{ASSISTANT}{END_THINK}"
    assert encode_messages([user("Q"), assistant("A"), user("R")], strings=strings) == want
    assert encode_messages([user("Q"), assistant("A"), user("R")]) == want


# ---- reasoning -------------------------------------------------------------------------------------------------------
TALK = [user("Q"), assistant("A", reasoning_content="r"), user("R"), assistant("B", reasoning_content="s")]


def test_reasoning_before_the_last_question_is_dropped():
    assert encode_messages(TALK, thinking=True) == (
        f"{BOS}{USER}Q{ASSISTANT}{END_THINK}A{EOS}{USER}R{ASSISTANT}{THINK}s{END_THINK}B{EOS}"
    )


@pytest.mark.parametrize("why", ["not asked for", "tools"])
def test_reasoning_is_kept_without_dropping_and_wherever_there_are_tools(why, strings):
    talk = [SYSTEM | {"tools": [TOOL]}, *TALK] if why == "tools" else TALK
    text = encode_messages(talk, thinking=True, drop_thinking=why == "tools", strings=strings)
    end = f"{USER}Q{ASSISTANT}{THINK}r{END_THINK}A{EOS}{USER}R{ASSISTANT}{THINK}s{END_THINK}B{EOS}"
    assert text.endswith(end)


def test_tool_turns_without_declared_tools_drop_the_reasoning_before_the_result():
    talk = [user("Q"), assistant("", reasoning_content="r", tool_calls=[call("f", "{}", "1")]), result("R", "1")]
    text = encode_messages(talk, thinking=True)
    assert f"{USER}Q{ASSISTANT}{END_THINK}\n\n<{DSML}tool_calls>" in text
    assert text.endswith(f"{USER}<tool_result>R</tool_result>{ASSISTANT}{THINK}")


def test_earlier_developer_messages_are_dropped_with_the_reasoning():
    talk = [SYSTEM, {"role": "developer", "content": "D"}, assistant("A"), user("Q")]
    assert encode_messages(talk, thinking=True) == f"{BOS}SA{EOS}{USER}Q{ASSISTANT}{THINK}"
    assert f"{USER}D{ASSISTANT}" in encode_messages(talk, thinking=False)


def test_chat_mode_writes_no_reasoning():
    assert "r" not in encode_messages(TALK).replace("User", "").replace("Assistant", "").replace(BOS, "")


# ---- roles and transitions -------------------------------------------------------------------------------------------
def test_a_reminder_after_a_question_follows_the_assistant_token():
    talk = [user("Q"), {"role": "latest_reminder", "content": "L"}, user("R")]
    want = f"{BOS}{USER}Q{ASSISTANT}{END_THINK}{LATEST_REMINDER}L{USER}R{ASSISTANT}{END_THINK}"
    assert encode_messages(talk) == want


@pytest.mark.parametrize(
    ("task", "thinking", "end"),
    [
        ("title", True, "<｜title｜>"),
        ("read_url", False, "<｜read_url｜>"),
        ("action", False, f"{ASSISTANT}{END_THINK}<｜action｜>"),
        ("action", True, f"{ASSISTANT}{THINK}<｜action｜>"),
    ],
)
def test_a_task_ends_the_prompt_with_its_token(task, thinking, end):
    assert encode_messages([user("Q", task=task)], thinking=thinking) == f"{BOS}{USER}Q{end}"


def test_the_answer_to_a_task_has_no_reasoning():
    talk = [user("Q", task="title"), assistant("T", reasoning_content="r")]
    assert encode_messages(talk, thinking=True) == f"{BOS}{USER}Q<｜title｜>T{EOS}"


def test_an_unfinished_answer_ends_without_end_token():
    talk = [user("Q"), assistant("Half an ans", wo_eos=True)]
    assert encode_messages(talk) == f"{BOS}{USER}Q{ASSISTANT}{END_THINK}Half an ans"


def test_a_response_format_is_announced_after_the_tools(strings):
    message = SYSTEM | {"tools": [TOOL], "response_format": {"type": "öbject"}}
    text = encode_messages([message, user("Q")], strings=strings)
    assert text.index("## Tools") < text.index('\n\n\nRF:\n{"type": "öbject"}' + USER)


def test_users_that_follow_each_other_are_one_turn_unless_the_first_has_a_task():
    assert encode_messages([user("Q"), user("R")]).startswith(f"{BOS}{USER}Q\n\nR{ASSISTANT}")
    assert encode_messages([user("Q", task="title"), user("R")]).startswith(f"{BOS}{USER}Q{USER}R{ASSISTANT}")


def test_content_parts_are_joined_and_other_kinds_named():
    parts = [{"type": "text", "text": "a"}, {"type": "image_url"}, {"type": "text", "text": "b"}]
    assert f"{USER}a\n\n[Unsupported image_url]\n\nb{ASSISTANT}" in encode_messages([user(parts)])


# ---- tools -----------------------------------------------------------------------------------------------------------
def test_results_are_sorted_by_their_calls_and_merged_with_the_user_after_them():
    calls = assistant("", tool_calls=[call("f", "{}", "x"), call("g", "{}", "y")])
    text = encode_messages([user("Q"), calls, result("of g", "y"), result("of f", "x"), user("And?")])
    want = f"{USER}<tool_result>of f</tool_result>\n\n<tool_result>of g</tool_result>\n\nAnd?{ASSISTANT}{END_THINK}"
    assert text.endswith(EOS + want)


def test_arguments_are_written_raw_if_strings_and_as_json_otherwise():
    arguments = json.dumps({"s": 'a "b"\nc', "n": 1.5, "l": ["ü", None], "t": True})
    text = encode_messages([user("Q"), assistant("So:", tool_calls=[call("f", arguments)])])
    lines = [
        f"So:\n\n<{DSML}tool_calls>",
        f'<{DSML}invoke name="f">',
        f'<{DSML}parameter name="s" string="true">a "b"\nc</{DSML}parameter>',
        f'<{DSML}parameter name="n" string="false">1.5</{DSML}parameter>',
        f'<{DSML}parameter name="l" string="false">["ü", null]</{DSML}parameter>',
        f'<{DSML}parameter name="t" string="false">true</{DSML}parameter>',
        f"</{DSML}invoke>",
        f"</{DSML}tool_calls>{EOS}",
    ]
    assert text.endswith("\n".join(lines))


def test_arguments_that_are_not_json_become_one_parameter():
    text = encode_messages([user("Q"), assistant("", tool_calls=[call("f", "{broken")])])
    assert f'<{DSML}parameter name="arguments" string="true">{{broken</{DSML}parameter>' in text


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="｜<>"), max_size=12)
NAMES = st.text(st.sampled_from("abc_é"), min_size=1, max_size=6)
VALUES = st.one_of(TEXTS, st.integers(), st.booleans(), st.none(), st.lists(TEXTS, max_size=3))
CALLS = st.lists(st.tuples(NAMES, st.dictionaries(NAMES, VALUES, max_size=3)), max_size=3)


@given(content=TEXTS, reasoning=TEXTS, calls=CALLS, thinking=st.booleans(), has_end=st.booleans())
def test_parsing_undoes_encoding(content, reasoning, calls, thinking, has_end):
    made = [call(name, json.dumps(arguments, ensure_ascii=False)) for name, arguments in calls]
    message = assistant(content, reasoning_content=reasoning, tool_calls=made, wo_eos=not has_end)
    prompt = encode_messages([user("Q")], thinking=thinking)
    text = encode_messages([user("Q"), message], thinking=thinking).removeprefix(prompt)
    completion = parse_completion(text, thinking=thinking)
    assert (completion.content, completion.reasoning) == (content, reasoning if thinking else "")
    assert [(made.name, json.loads(made.arguments)) for made in completion.tool_calls] == calls


# ---- refusals --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "empty list"),
        ([{"role": "bot", "content": ""}], r"messages\[0\].role: got 'bot', need one of system, user"),
        ([user("Q", task="poem")], r"messages\[0\].task: got 'poem', need one of action"),
        ([user(7)], "content of a user message: got 7, need text"),
        ([user("Q"), assistant("", tool_calls=[{"name": "f"}])], "tool_calls: got"),
        ([SYSTEM | {"tools": ["f"]}], "tools: got"),
    ],
)
def test_refuses_messages(messages, message, strings):
    with pytest.raises(ChatError, match=message):
        encode_messages(messages, strings=strings)


@pytest.mark.parametrize(
    ("messages", "options", "purpose"),
    [
        ([SYSTEM | {"tools": [TOOL]}], {}, "a message with tools"),
        ([SYSTEM | {"response_format": {}, "content": ""} | {"response_format": {"a": 1}}], {}, "a response format"),
        ([user("Q")], {"thinking": True, "effort": "max"}, "effort 'max'"),
    ],
)
def test_what_needs_a_fixed_string_names_the_missing_file(messages, options, purpose, tmp_path):
    with pytest.raises(ChatError, match=rf"{purpose} needs .*encoding_dsv4.py is missing"):
        encode_messages(messages, strings=FixedStrings.from_directory(tmp_path), **options)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def broken(:", "cannot be read as Python"),
        ("OTHER = 1", "has no TOOLS_TEMPLATE"),
        ("TOOLS_TEMPLATE = 'a {schema_of_v5}'", "unknown fields schema_of_v5"),
        ("TOOLS_TEMPLATE = 'a {dsml_token.__class__}'", "unknown fields"),
        ("TOOLS_TEMPLATE = 'a {'", "is not a template"),
        ("TOOLS_TEMPLATE = open('/etc/passwd').read()", "has no TOOLS_TEMPLATE"),
    ],
)
def test_refuses_an_encoding_file_of_another_kind(source, message, tmp_path):
    (tmp_path / ENCODING_FILE).parent.mkdir()
    (tmp_path / ENCODING_FILE).write_text(source)
    with pytest.raises(ChatError, match=message):
        encode_messages([SYSTEM | {"tools": [TOOL]}], strings=FixedStrings.from_directory(tmp_path))


def test_an_unknown_effort_is_refused_with_those_of_the_file(strings):
    with pytest.raises(ChatError, match=r"effort: got 'low', need high or one of \['max'\]"):
        encode_messages([user("Q")], thinking=True, effort="low", strings=strings)


OPEN, CLOSE = f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="f">\n', f"</{DSML}invoke>\n</{DSML}tool_calls>"


def parameter(value, flag="true", name="k"):
    return f'<{DSML}parameter name="{name}" string="{flag}">{value}</{DSML}parameter>\n'


@pytest.mark.parametrize(
    ("text", "thinking", "message"),
    [
        ("no end of it", True, "reasoning has no </think>"),
        (f"A{EOS}B", False, "got 'B' after the end-of-sentence token"),
        (f"A{THINK}B", False, "special token <think> inside"),
        (f"A{BOS}", False, "special token"),
        (OPEN + parameter("1") + parameter("2") + CLOSE, False, "parameter 'k' of 'f' is given twice"),
        (OPEN + parameter("[1,", "false") + CLOSE, False, "neither a string nor JSON"),
        (OPEN + parameter("1", "maybe") + CLOSE, False, "tool block is broken"),
        (OPEN + parameter("1").strip() + CLOSE, False, "tool block is broken"),
        (OPEN + parameter("1"), False, "tool block is broken"),
        (OPEN + "words" + CLOSE, False, "tool block is broken"),
        (OPEN + CLOSE + "more", False, "need nothing more"),
        (f"\n\n<{DSML}tool_calls></{DSML}tool_calls>", False, "need a line break"),
    ],
)
def test_refuses_completions(text, thinking, message):
    with pytest.raises(ChatError, match=message):
        parse_completion(text, thinking=thinking)


def test_a_completion_without_markup_is_its_content():
    assert parse_completion(f"Hi.{EOS}") == Completion("Hi.")
