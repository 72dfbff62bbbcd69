"""The chat encoding of the April 2026 checkpoints: messages to text, and completions back (architecture.md §15).

The grammar is written here. The texts that a model was trained to read around it (how tools are announced, what the
maximal effort says) come from the checkpoint's own `encoding/encoding_dsv4.py`, which is parsed and never executed.
"""

import ast
import dataclasses
import json
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from v4jax.errors import UserError

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
LATEST_REMINDER = "<｜latest_reminder｜>"
THINK, END_THINK = "<think>", "</think>"
DSML = "｜DSML｜"
TASKS = ("action", "query", "authority", "domain", "title", "read_url")
ENCODING_FILE = Path("encoding", "encoding_dsv4.py")

_CALLS, _END_CALLS = f"<{DSML}tool_calls>", f"</{DSML}tool_calls>"
_ROLES = ("system", "user", "developer", "assistant", "tool", "latest_reminder")
_ASKING = ("user", "developer")


class ChatError(UserError):
    """Messages that cannot be encoded, or a completion that is not of the grammar."""


# ---- fixed strings ---------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class FixedStrings:
    """The string constants of a checkpoint's encoding file; `constants` is None where there is no such file."""

    file: Path
    constants: Mapping[str, str] | None

    @classmethod
    def from_directory(cls, directory: str | Path) -> "FixedStrings":
        """Reads the assignments of plain strings at the top level of `encoding/encoding_dsv4.py`, if it is there.

        Raises:
          ChatError: if the file is not Python.
        """
        file = Path(directory) / ENCODING_FILE
        if not file.is_file():
            return cls(file, None)
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError) as error:
            raise ChatError(f"{file}: cannot be read as Python ({error}); copy it from the checkpoint again") from None
        constants = {}
        for node in tree.body:
            if isinstance(node, ast.Assign) and len(node.targets) == 1:
                target = node.targets[0]
            elif isinstance(node, ast.AnnAssign):
                target = node.target
            else:
                continue
            value = node.value
            if isinstance(target, ast.Name) and isinstance(value, ast.Constant) and isinstance(value.value, str):
                constants[target.id] = value.value
        return cls(file, constants)

    def fill(self, constant: str, purpose: str, **fields: str) -> str:
        """The text of a constant with its `{fields}` filled in.

        Raises:
          ChatError: if the file or the constant is missing, or the constant has other fields.
        """
        if self.constants is None:
            raise ChatError(f"{purpose} needs the checkpoint's own texts: {self.file} is missing; copy it there")
        if constant not in self.constants:
            raise ChatError(f"{purpose}: {self.file} has no {constant}; it may be of another model version")
        template = self.constants[constant]
        try:
            wanted = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
        except ValueError as error:
            raise ChatError(f"{purpose}: {constant} in {self.file} is not a template ({error})") from None
        if wanted - set(fields):
            unknown = ", ".join(sorted(wanted - set(fields)))
            raise ChatError(f"{purpose}: {constant} in {self.file} has unknown fields {unknown}; need {list(fields)}")
        return template.format(**fields)

    def effort(self, effort: str | None) -> str:
        """The prefix of a reasoning effort. "high" is the one that needs none unless the file has a text for it."""
        constants = self.constants or {}
        name = f"REASONING_EFFORT_{(effort or '').upper()}"
        if effort is None or (effort == "high" and name not in constants):
            return ""
        if self.constants is not None and name not in constants:
            known = sorted(key.removeprefix("REASONING_EFFORT_").lower() for key in constants if "_EFFORT_" in key)
            raise ChatError(f"effort: got {effort!r}, need high or one of {known} ({self.file})")
        return self.fill(name, f"effort {effort!r}")


# ---- messages to text ------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class _Turn:
    """A message, or several that are merged into one user turn."""

    role: str
    message: Mapping[str, Any]
    parts: list["_Part"] = dataclasses.field(default_factory=list)

    @property
    def task(self) -> str | None:
        return self.message.get("task")


@dataclasses.dataclass(frozen=True)
class _Part:
    """A piece of a user turn; `call_id` is None for what the user wrote."""

    text: str
    call_id: str | None = None


def encode_messages(
    messages: Sequence[Mapping[str, Any]],
    *,
    thinking: bool = False,
    effort: str | None = None,
    drop_thinking: bool = True,
    strings: FixedStrings | None = None,
) -> str:
    """The text of a conversation, up to where the model goes on (architecture.md §15.2).

    Args:
      messages: in OpenAI's form: `role` (system, user, developer, assistant, tool, latest_reminder), `content`, and
        where they apply `tools`, `response_format`, `tool_calls`, `tool_call_id`, `reasoning_content`, `task`, and
        `wo_eos` for an assistant turn that is to be continued.
      thinking: whether the model reasons before it answers.
      effort: "high" (as None) or "max", or what the checkpoint's file knows; only in thinking mode.
      drop_thinking: leave out the reasoning before the last question. Any message with tools prevents it.
      strings: the checkpoint's fixed strings; only tools, response formats and efforts need them.

    Raises:
      ChatError: for an unknown role, task or form, or a missing fixed string.
    """
    if not messages:
        raise ChatError("messages: got an empty list, need at least one message")
    strings = strings or FixedStrings(ENCODING_FILE, None)
    turns = _merge(messages)
    _sort_results(turns)
    is_dropping = drop_thinking and not any(turn.message.get("tools") for turn in turns)
    last = _last_question(turns)
    if thinking and is_dropping:
        turns = [turn for index, turn in enumerate(turns) if turn.role != "developer" or index >= last]
        last = _last_question(turns)
    text = [BOS, strings.effort(effort) if thinking else ""]
    for index, turn in enumerate(turns):
        before = turns[index - 1] if index else None
        has_reasoning = thinking and (not is_dropping or index > last) and not (before and before.task)
        text.append(_render(turn, strings, has_reasoning=has_reasoning))
        if index + 1 == len(turns) or turns[index + 1].role in ("assistant", "latest_reminder"):
            text.append(_transition(turn, thinks=thinking and (not is_dropping or index >= last), thinking=thinking))
    return "".join(text)


def _merge(messages: Sequence[Mapping[str, Any]]) -> list[_Turn]:
    """Tool results and the user messages after them become one user turn."""
    turns: list[_Turn] = []
    for index, message in enumerate(messages):
        role = message.get("role")
        if role not in _ROLES:
            raise ChatError(f"messages[{index}].role: got {role!r}, need one of {', '.join(_ROLES)}")
        if (task := message.get("task")) is not None and task not in TASKS:
            raise ChatError(f"messages[{index}].task: got {task!r}, need one of {', '.join(TASKS)}")
        previous = turns[-1] if turns and turns[-1].role == "user" else None
        if role == "tool":
            part = _Part(f"<tool_result>{_text(message)}</tool_result>", message.get("tool_call_id") or "")
            if previous is None:
                turns.append(_Turn("user", {}, [part]))
            else:
                previous.parts.append(part)
        elif role == "user" and previous is not None and previous.task is None:
            previous.parts.append(_Part(_text(message)))
        else:
            turns.append(_Turn(role, message, [_Part(_text(message))]))
    return turns


def _sort_results(turns: list[_Turn]) -> None:
    """Puts the results of each user turn in the order of the calls that the last calling turn made."""
    order: dict[str, int] = {}
    for turn in turns:
        if turn.role == "assistant" and turn.message.get("tool_calls"):
            order = {call.get("id") or "": position for position, call in enumerate(turn.message["tool_calls"])}
            order.pop("", None)
        results = sorted(
            (part for part in turn.parts if part.call_id is not None), key=lambda part: order.get(part.call_id or "", 0)
        )
        in_order = iter(results)
        turn.parts = [part if part.call_id is None else next(in_order) for part in turn.parts]


def _last_question(turns: Sequence[_Turn]) -> int:
    return max((index for index, turn in enumerate(turns) if turn.role in _ASKING), default=-1)


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or not all(isinstance(part, Mapping) for part in content):
        raise ChatError(f"content of a {message.get('role')} message: got {content!r}, need text or a list of parts")
    texts = (
        part.get("text", "") if part.get("type") == "text" else f"[Unsupported {part.get('type')}]" for part in content
    )
    return "\n\n".join(texts)


def _render(turn: _Turn, strings: FixedStrings, *, has_reasoning: bool) -> str:
    content = "\n\n".join(part.text for part in turn.parts)
    if turn.role == "system":
        return content + _announcements(turn.message, strings)
    if turn.role == "developer":
        return USER + content + _announcements(turn.message, strings)
    if turn.role == "user":
        return USER + content
    if turn.role == "latest_reminder":
        return LATEST_REMINDER + content
    reasoning = (turn.message.get("reasoning_content") or "") + END_THINK if has_reasoning else ""
    calls = turn.message.get("tool_calls") or ()
    end = "" if turn.message.get("wo_eos") else EOS
    return reasoning + content + (_render_calls(calls) if calls else "") + end


def _transition(turn: _Turn, *, thinks: bool, thinking: bool) -> str:
    """What stands between a message and the model's own words."""
    if turn.task == "action":
        return ASSISTANT + (THINK if thinking else END_THINK) + "<｜action｜>"
    if turn.task is not None:
        return f"<｜{turn.task}｜>"
    if turn.role in _ASKING:
        return ASSISTANT + (THINK if thinks else END_THINK)
    return ""


def _announcements(message: Mapping[str, Any], strings: FixedStrings) -> str:
    text = ""
    if tools := message.get("tools"):
        if not all(isinstance(tool, Mapping) and "function" in tool for tool in tools):
            raise ChatError(f'tools: got {tools!r}, need a list of {{"type": "function", "function": …}}')
        schemas = "\n".join(_json(tool["function"]) for tool in tools)
        marks = dict(dsml_token=DSML, thinking_start_token=THINK, thinking_end_token=END_THINK)
        text += "\n\n" + strings.fill("TOOLS_TEMPLATE", "a message with tools", tool_schemas=schemas, **marks)
    if schema := message.get("response_format"):
        text += "\n\n" + strings.fill("response_format_template", "a response format", schema=_json(schema))
    return text


def _render_calls(calls: Sequence[Mapping[str, Any]]) -> str:
    invocations = []
    for call in calls:
        function = call.get("function")
        if not isinstance(function, Mapping) or "name" not in function:
            raise ChatError(f'tool_calls: got {call!r}, need {{"function": {{"name": …, "arguments": …}}}}')
        parameters = "\n".join(
            f'<{DSML}parameter name="{key}" string="{_flag(value)}">{value if isinstance(value, str) else _json(value)}'
            f"</{DSML}parameter>"
            for key, value in _arguments(function.get("arguments", "")).items()
        )
        invocations.append(f'<{DSML}invoke name="{function["name"]}">\n{parameters}\n</{DSML}invoke>')
    return "\n\n" + "\n".join([_CALLS, *invocations, _END_CALLS])


def _arguments(arguments: Any) -> Mapping[str, Any]:
    """The arguments of a call; what is not a JSON object becomes one parameter of the name "arguments"."""
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
    except json.JSONDecodeError:
        parsed = None
    return parsed if isinstance(parsed, Mapping) else {"arguments": arguments}


def _flag(value: Any) -> str:
    return "true" if isinstance(value, str) else "false"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# ---- text to messages ------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A call that the model asks for; `arguments` is a JSON object as text."""

    name: str
    arguments: str


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a model wrote, taken apart."""

    content: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()

    def to_message(self) -> dict[str, Any]:
        """The assistant message that goes on in the conversation."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.tool_calls
            ]
        return message


_INVOKE = re.compile(rf'<{DSML}invoke name="([^"\n]*)">\n')
_PARAMETER = re.compile(rf'<{DSML}parameter name="(.*?)" string="(true|false)">(.*?)</{DSML}parameter>\n', re.DOTALL)
_END_INVOKE = f"</{DSML}invoke>\n"


def parse_completion(text: str, *, thinking: bool = False) -> Completion:
    """Takes a whole completion apart; the end-of-sentence token may be there or cut off (architecture.md §15.4).

    Args:
      text: everything after the prompt.
      thinking: whether the prompt ended with `<think>`.

    Raises:
      ChatError: where the text is not of the grammar: reasoning without an end, a broken tool block, a parameter given
        twice, text after the end, or a special token where text belongs.
    """
    body, _, rest = text.partition(EOS)
    if rest:
        raise ChatError(f"completion: got {rest[:40]!r} after the end-of-sentence token, need nothing")
    reasoning = ""
    if thinking:
        reasoning, end, body = body.partition(END_THINK)
        if not end:
            raise ChatError(f"completion: reasoning has no {END_THINK}; it was cut off, or thinking was not asked for")
    content, opening, block = body.partition("\n\n" + _CALLS)
    for token in (BOS, EOS, THINK, END_THINK, DSML):
        if token in content or token in reasoning:
            raise ChatError(f"completion: got the special token {token} inside the text")
    return Completion(content, reasoning, _parse_calls(block) if opening else ())


def _parse_calls(block: str) -> tuple[ToolCall, ...]:
    if not block.startswith("\n"):
        raise _broken(block, 0, "a line break")
    calls, position = [], 1
    while not block.startswith(_END_CALLS, position):
        opening = _INVOKE.match(block, position)
        if opening is None:
            raise _broken(block, position, f"<{DSML}invoke …> or {_END_CALLS}")
        position, values = opening.end(), {}
        while parameter := _PARAMETER.match(block, position):
            name, flag, value = parameter.groups()
            if name in values:
                raise ChatError(f"completion: parameter {name!r} of {opening[1]!r} is given twice")
            values[name] = _json(value) if flag == "true" else _checked_json(name, value)
            position = parameter.end()
        if not values and block.startswith("\n", position):  # the empty line of a call without arguments
            position += 1
        if not block.startswith(_END_INVOKE, position):
            raise _broken(block, position, f"<{DSML}parameter …> or {_END_INVOKE.strip()}")
        position += len(_END_INVOKE)
        arguments = ", ".join(f"{_json(name)}: {value}" for name, value in values.items())
        calls.append(ToolCall(opening[1], f"{{{arguments}}}"))
    if block[position:] != _END_CALLS:
        raise _broken(block, position + len(_END_CALLS), "nothing more")
    return tuple(calls)


def _checked_json(name: str, value: str) -> str:
    try:
        json.loads(value)
    except json.JSONDecodeError:
        raise ChatError(f"completion: parameter {name!r} is neither a string nor JSON: {value[:40]!r}") from None
    return value


def _broken(block: str, position: int, need: str) -> ChatError:
    return ChatError(f"completion: tool block is broken: got {block[position : position + 40]!r}, need {need}")
