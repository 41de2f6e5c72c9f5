"""Messages to a prompt: the model's chat template, checked input, no forged control tokens.

A template mixes control tokens with what users wrote into one string, so a message containing
``<|im_end|>`` could end its own turn. Here such strings inside messages are marked before
rendering and spelt out as ordinary text when the prompt is encoded; all other text is encoded
exactly as transformers' ``apply_chat_template`` would.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from skimp.errors import SkimpError
from skimp.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from skimp.text.sandbox import TemplateLimits

MAX_MESSAGES = 4096
_MAX_DEPTH = 64
_ROLE = re.compile(r"[A-Za-z0-9_-]{1,64}")
_VARIABLE = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
_RESERVED = frozenset(
    ("messages", "tools", "documents", "add_generation_prompt", "tokenize", "chat_template")
)
_STRING_FIELDS = ("name", "tool_call_id", "reasoning_content")
_FIELDS = frozenset(("role", "content", "tool_calls", *_STRING_FIELDS))

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
    "message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class ChatError(SkimpError):
    """A conversation is refused, or the template is; ``field`` names the place in the input."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field} {problem}")
        self.field = field


class ChatTemplate:
    """A compiled chat template; compile once, render often, from any thread.

    Args:
        source: Jinja source.
        special_tokens: ``bos_token`` and the like, visible to the template.
        limits: see ``skimp.text.sandbox.TemplateLimits``.
        now: the clock behind ``strftime_now``.

    Raises :class:`ChatError` with field ``chat_template`` when it does not compile.
    """

    def __init__(
        self,
        source: str,
        *,
        special_tokens: Mapping[str, str] | None = None,
        limits: TemplateLimits | None = None,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        from jinja2 import TemplateError

        from skimp.text.sandbox import Sandbox, TemplateLimits

        self.source = source
        self._special = dict(special_tokens or {})
        try:
            self._sandbox = Sandbox(source, limits or TemplateLimits(), now)
        except TemplateError as error:
            raise ChatError("chat_template", f"cannot be used: {error}") from None

    def render(
        self,
        messages: object,
        *,
        add_generation_prompt: bool = True,
        tools: object = None,
        documents: object = None,
        variables: Mapping[str, Any] | None = None,
        guard: Callable[[str], str] | None = None,
    ) -> str:
        """The prompt text.

        ``variables`` are further names for the template (``chat_template_kwargs``). ``guard``
        is applied to every string the caller supplied, after checking. Raises
        :class:`ChatError`, for the template's own ``raise_exception`` as well.
        """
        from jinja2 import TemplateError

        plain: dict[str, Any] = {
            "messages": check_messages(messages),
            "tools": None if tools is None else _json_list("tools", tools),
            "documents": None if documents is None else _json_list("documents", documents),
            **_check_variables(variables or {}, self._special),
        }
        if guard is not None:
            plain = {name: _map_strings(value, guard) for name, value in plain.items()}
        size = sum(len(text) for text in _strings(plain))
        plain["add_generation_prompt"] = add_generation_prompt
        try:
            return self._sandbox.render({**self._special, **plain}, size)
        except TemplateError as error:
            raise ChatError("messages", f"are refused by the chat template: {error}") from None


def template_for(
    tokenizer: Tokenizer, name: str | None = None, *, limits: TemplateLimits | None = None
) -> ChatTemplate:
    """The template of a model: its own, by ``name`` if it has several, else ChatML by its tokens.

    ChatML is assumed only when the vocabulary has ``<|im_start|>`` and ``<|im_end|>``. Otherwise
    :class:`ChatError`: guessing a format would silently give bad answers.
    """
    found = tokenizer.chat_template
    if isinstance(found, dict):
        source = found.get(name or "default")
        if source is None:
            names = ", ".join(sorted(found)) or "none"
            raise ChatError("chat_template", f"{name or 'default'!r} is not among: {names}")
    elif name is not None and name != "default":
        raise ChatError("chat_template", f"{name!r} does not exist; the model has at most one")
    elif found is not None:
        source = found
    elif all(tokenizer.token_id(t) is not None for t in ("<|im_start|>", "<|im_end|>")):
        source = CHATML
    else:
        raise ChatError(
            "chat_template",
            f"is missing: {tokenizer.name} has none and no ChatML tokens. It is a base model, or "
            "needs a chat_template.jinja; plain completion works",
        )
    return ChatTemplate(source, special_tokens=tokenizer.special_tokens, limits=limits)


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: object,
    *,
    add_generation_prompt: bool = True,
    tools: object = None,
    documents: object = None,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a conversation; nothing the caller supplied becomes a control token.

    The template writes the begin token itself, so none is added (as in transformers).
    """
    supplied = (messages, tools, documents, variables)
    opening, closing = _free_marks(supplied)
    strings = tokenizer.control_strings
    guard = None
    if strings:
        pattern = re.compile("|".join(re.escape(text) for text in strings))

        def guard(text: str) -> str:
            return pattern.sub(lambda found: opening + found.group() + closing, text)

    prompt = template.render(
        messages,
        add_generation_prompt=add_generation_prompt,
        tools=tools,
        documents=documents,
        variables=variables,
        guard=guard,
    )
    if opening not in prompt:
        return tokenizer.encode_parts([(prompt.replace(closing, ""), True)])
    return tokenizer.encode_parts(_parts(prompt, opening, closing))


def check_messages(messages: object) -> list[dict[str, Any]]:
    """A checked copy of a conversation in plain types, in the form that templates expect.

    Text parts become one string, joined by line ends; ``arguments`` of tool calls, which the
    OpenAI API sends as JSON text, become objects. Raises :class:`ChatError`.
    """
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence):
        raise ChatError("messages", "must be a list")
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise ChatError("messages", f"must have 1..{MAX_MESSAGES} entries, got {len(messages)}")
    return [_message(f"messages[{i}]", message) for i, message in enumerate(messages)]


def _message(where: str, message: object) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ChatError(where, "must be an object with role and content")
    for name, value in message.items():
        if name not in _FIELDS and value is not None:
            raise ChatError(f"{where}.{str(name)[:64]}", "is not supported in a message")
    role = message.get("role")
    if not isinstance(role, str) or not _ROLE.fullmatch(role):
        raise ChatError(f"{where}.role", "must be a name such as system, user, assistant or tool")
    found: dict[str, Any] = {"role": role}
    calls = message.get("tool_calls")
    content = message.get("content")
    if content is None:
        if role != "assistant" or not calls:
            raise ChatError(f"{where}.content", "is missing")
        found["content"] = ""
    else:
        found["content"] = _content(f"{where}.content", content)
    for name in _STRING_FIELDS:
        if message.get(name) is not None:
            found[name] = _string(f"{where}.{name}", message[name])
    if "reasoning_content" in found:
        found["thinking"] = found["reasoning_content"]  # the name that gpt-oss reads
    if calls is not None:
        if role != "assistant":
            raise ChatError(f"{where}.tool_calls", "belong to the assistant role")
        found["tool_calls"] = _tool_calls(f"{where}.tool_calls", calls)
    return found


def _content(where: str, content: object) -> str:
    if isinstance(content, str):
        return _string(where, content)
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise ChatError(where, "must be a string or a list of text parts")
    texts = []
    for i, part in enumerate(content):
        place = f"{where}[{i}]"
        if not isinstance(part, Mapping):
            raise ChatError(place, "must be an object with type and text")
        if part.get("type") != "text":
            raise ChatError(f"{place}.type", "must be 'text': this server takes no other media")
        texts.append(_string(f"{place}.text", part.get("text")))
    return "\n".join(texts)


def _tool_calls(where: str, calls: object) -> list[dict[str, Any]]:
    found = []
    for i, call in enumerate(_json_list(where, calls)):
        place = f"{where}[{i}]"
        function = call.get("function")
        if call.get("type", "function") != "function" or not isinstance(function, dict):
            raise ChatError(f"{place}.function", "must be an object with name and arguments")
        name = _string(f"{place}.function.name", function.get("name"))
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                raise ChatError(f"{place}.function.arguments", "is not valid JSON") from None
            _check_json(f"{place}.function.arguments", arguments, 0)
        if not isinstance(arguments, dict):
            raise ChatError(f"{place}.function.arguments", "must be a JSON object")
        entry = {**call, "type": "function", "function": {**function, "arguments": arguments}}
        entry["function"]["name"] = name
        found.append(entry)
    return found


def _string(where: str, value: object) -> str:
    if not isinstance(value, str):
        raise ChatError(where, f"must be a string, got {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ChatError(where, "is not valid Unicode (a lone surrogate)") from None
    return str(value)


def _json_list(where: str, value: object) -> list[dict[str, Any]]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise ChatError(where, "must be a list of objects")
    for i, entry in enumerate(value):
        if not isinstance(entry, Mapping):
            raise ChatError(f"{where}[{i}]", "must be an object")
    return [_check_json(f"{where}[{i}]", entry, 0) for i, entry in enumerate(value)]


def _check_json(where: str, value: object, depth: int) -> Any:
    """A copy in plain types, so that a template meets no object with methods of its own."""
    if depth > _MAX_DEPTH:
        raise ChatError(where, f"nests deeper than {_MAX_DEPTH}")
    if value is None or type(value) in (bool, int, float):
        return value
    if isinstance(value, str):
        return _string(where, value)
    if isinstance(value, Mapping):
        for key in value:
            _string(f"{where} key", key)
        return {key: _check_json(f"{where}.{key[:64]}", v, depth + 1) for key, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [_check_json(f"{where}[{i}]", v, depth + 1) for i, v in enumerate(value)]
    raise ChatError(where, f"must be plain JSON, got {type(value).__name__}")


def _check_variables(variables: Mapping[str, Any], special: Mapping[str, str]) -> dict[str, Any]:
    found = {}
    for name, value in variables.items():
        where = f"chat_template_kwargs.{str(name)[:64]}"
        if not isinstance(name, str) or not _VARIABLE.fullmatch(name):
            raise ChatError(where, "is not a variable name")
        if name in _RESERVED or name in special or name.endswith("_token"):
            raise ChatError(where, "is set by the server and cannot be overridden")
        found[name] = _check_json(where, value, 0)
    return found


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_strings(item, change) for item in value]
    return value


def _strings(value: Any, depth: int = 0) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif depth > 2 * _MAX_DEPTH:
        return  # refused by name when it is checked
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key, depth + 1)
            yield from _strings(item, depth + 1)
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        for item in value:
            yield from _strings(item, depth + 1)


def _free_marks(supplied: object) -> tuple[str, str]:
    """Two of Unicode's 32 process-internal noncharacters that the input does not contain."""
    free = {chr(code) for code in range(0xFDD0, 0xFDF0)}
    for text in _strings(supplied):
        free.difference_update(free.intersection(text))
    if len(free) < 2:
        raise ChatError("messages", "contain too many Unicode noncharacters (U+FDD0..U+FDEF)")
    first, second, *_ = sorted(free)
    return first, second


def _parts(prompt: str, opening: str, closing: str) -> Iterator[tuple[str, bool]]:
    """(text, trusted) runs; a mark that lost its partner in the template is dropped."""
    pattern = re.compile(f"{opening}([^{opening}{closing}]*){closing}")
    stray = re.compile(f"[{opening}{closing}]")
    done = 0
    for found in pattern.finditer(prompt):
        yield stray.sub("", prompt[done : found.start()]), True
        yield found.group(1), False
        done = found.end()
    yield stray.sub("", prompt[done:]), True
