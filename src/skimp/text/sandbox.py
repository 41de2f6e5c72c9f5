"""Jinja with a budget: a model directory's template can neither reach Python nor exhaust us.

The environment is the one of transformers (``ImmutableSandboxedEnvironment``, ``trim_blocks``,
``lstrip_blocks``, loop controls, ``generation`` blocks, ``raise_exception``, ``tojson``,
``strftime_now``). The sandbox stops attribute walks but not resource bombs, so every loop turn,
call, concatenation and output is charged to a per-render budget of work, characters and time.
This works in process because each single operation left is small: those that could allocate much
at once (``'x' * 10**9``, paddings, huge formats) are checked before they run.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class TemplateLimits:
    """What one rendering may use.

    ``source`` and ``output`` are characters; ``work`` counts loop turns and calls; ``characters``
    is everything produced on the way, on top of eight times the input; ``seconds`` is wall time.
    """

    source: int = 256 * 1024
    output: int = 8 * 2**20
    work: int = 500_000
    characters: int = 8 * 2**20
    seconds: float = 1.0


class LimitExceeded(SecurityError):
    """A template used more than its budget."""


class _Budget:
    def __init__(self, limits: TemplateLimits, input_size: int) -> None:
        self._work = limits.work
        self.characters = limits.characters + 8 * input_size
        self._limits = limits
        self._deadline = time.monotonic() + limits.seconds

    def charge(self, characters: int) -> None:
        self._work -= 1
        self.characters -= characters
        if self._work < 0:
            raise LimitExceeded(f"takes more than {self._limits.work} loop turns and calls")
        if self.characters < 0:
            raise LimitExceeded("produces too much text")
        if time.monotonic() > self._deadline:
            raise LimitExceeded(f"takes more than {self._limits.seconds} s")


# filters that build large texts from small arguments and that no known chat template uses
_REFUSED_FILTERS = (
    "batch", "center", "filesizeformat", "forceescape", "pprint", "random", "slice", "urlize",
    "wordwrap", "xmlattr",
)  # fmt: skip
_PADDING = frozenset(("center", "ljust", "rjust", "zfill", "expandtabs"))
_MAX_BITS = 4096
_MAX_WIDTH = 1000
# a width of four digits, or one taken from an argument, may be a gigabyte
_WIDE_PERCENT = re.compile(r"%(\([^)]*\))?[-+ #0]*(\*|\d{4,}|\d*\.(\*|\d{4,}))")
_WIDE_BRACES = re.compile(r"\{[^{}]*(\{|:[^{}]*\d{4,})")


class _Generation(Extension):
    """``{% generation %}``: marks assistant text for training masks; rendering just shows it."""

    tags = {"generation"}  # noqa: RUF012 (the attribute Jinja reads)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, now: Callable[[], datetime]) -> None:
        self._budget: ContextVar[_Budget | None] = ContextVar("budget", default=None)
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            finalize=self._finalize,
            cache_size=0,
        )
        for name in _REFUSED_FILTERS:
            self.filters.pop(name, None)
        for name in ("indent", "replace", "join", "format"):
            self.filters[name] = self._guard_filter(name, self.filters[name])
        self.filters["tojson"] = self._tojson
        self.globals.pop("lipsum", None)
        self.globals["raise_exception"] = _raise
        self.globals["strftime_now"] = lambda form: now().strftime(form[:256])
        self.globals["dict"] = _dict
        self.globals["namespace"] = _Namespace

    def compile_template(self, source: str) -> jinja2.Template:
        tree = self.parse(source)
        _instrument(tree)
        code = self.compile(tree)
        return jinja2.Template.from_code(self, code, self.make_globals(None))

    def run(
        self, template: jinja2.Template, budget: _Budget, limit: int, variables: Mapping[str, Any]
    ) -> str:
        token = self._budget.set(budget)
        try:
            parts, size = [], 0
            for part in template.generate(variables):
                size += len(part)
                if size > limit:
                    raise LimitExceeded(f"renders more than {limit} characters")
                parts.append(part)
            return "".join(parts)
        finally:
            self._budget.reset(token)

    # What the instrumented template and Jinja call.

    def charge(self, characters: int) -> None:
        budget = self._budget.get()
        if budget is not None:
            budget.charge(characters)

    def check_size(self, size: int) -> None:
        """Refuse an operation before it makes a text or list of ``size``."""
        budget = self._budget.get()
        if size > (0 if budget is None else budget.characters):
            raise LimitExceeded("produces too much text")

    def guard_loop(self, items: Iterable[Any], text: int) -> Iterator[Any]:
        for item in items:
            self.charge(text)
            yield item

    def guard_concat(self, *parts: Any) -> str:
        texts = [str(part) for part in parts]
        self.charge(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for size, times in ((left, right), (right, left)):
                if isinstance(size, (str, list, tuple)) and isinstance(times, int):
                    self.check_size(_size(size) * max(times, 0))
            _check_bits(left, right, 1)
        elif operator == "**":
            _check_bits(left, 0, right if isinstance(right, int) else 1)
        elif operator == "%" and isinstance(left, str):
            self._check_format(left, right if isinstance(right, tuple) else (right,))
        result = super().call_binop(context, operator, left, right)
        self.charge(_size(result))
        return result

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self._check_method(__obj, args, kwargs)
        __self.charge(0)
        result = super().call(__context, __obj, *args, **kwargs)
        __self.charge(_size(result))
        return result

    def _check_method(self, method: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if not isinstance(owner, str):
            return
        if name in _PADDING:
            widths = [value for value in (*args, *kwargs.values()) if isinstance(value, int)]
            factor = max(len(owner), 1) if name == "expandtabs" else 1
            self.check_size(factor * max((abs(w) for w in widths), default=0))
        elif name == "replace" and len(args) >= 2:
            self._check_replace(owner, *args[:2])
        elif name == "join" and args:
            self._check_join(owner, args[0])

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Jinja's sandboxed ``str.format``, refused where its result may be much larger."""
        inner = super().wrap_str_format(value)
        if inner is None:
            return None
        form, safe = value.__self__, inner

        def guarded(*args: Any, **kwargs: Any) -> str:
            if _WIDE_BRACES.search(form.replace("{{", "")):
                raise LimitExceeded(f"formats wider than {_MAX_WIDTH - 1} characters")
            self._check_fields(form, "{", (*args, *kwargs.values()))
            return safe(*args, **kwargs)

        return guarded

    def _check_format(self, form: str, values: tuple[Any, ...]) -> None:
        if _WIDE_PERCENT.search(form):
            raise LimitExceeded(f"formats wider than {_MAX_WIDTH - 1} characters")
        self._check_fields(form, "%", values)

    def _check_fields(self, form: str, mark: str, values: tuple[Any, ...]) -> None:
        longest = max((len(str(value)) for value in values), default=0)
        self.check_size(len(form) + form.count(mark) * (longest + _MAX_WIDTH))

    def _check_replace(self, text: Any, old: Any, new: Any) -> None:
        text, old, new = str(text), str(old), str(new)
        self.check_size(len(text) + text.count(old) * len(new))

    def _check_join(self, separator: Any, items: Any) -> None:
        if isinstance(items, (list, tuple, str, Mapping)):
            lengths = sum(len(item) if isinstance(item, str) else 32 for item in items)
            self.check_size(lengths + len(str(separator)) * len(items))

    def _guard_filter(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def check(value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if name == "indent":
                width = args[0] if args else kwargs.get("width", 4)
                size = len(width) if isinstance(width, str) else abs(int(width))
                self.check_size(len(str(value)) + size * (str(value).count("\n") + 1))
            elif name == "replace" and len(args) >= 2:
                self._check_replace(value, *args[:2])
            elif name == "format":
                self._check_format(str(value), args or tuple(kwargs.values()))
            elif name == "join":
                self._check_join(args[0] if args else kwargs.get("d", ""), value)

        # Jinja passes the context, evaluation context or environment as a first argument
        passes = getattr(original, "jinja_pass_arg", None) is not None

        def guarded(*args: Any, **kwargs: Any) -> Any:
            own = args[1:] if passes else args
            check(own[0], own[1:], kwargs)
            result = original(*args, **kwargs)
            self.charge(_size(result))
            return result

        if passes:
            guarded.jinja_pass_arg = original.jinja_pass_arg  # type: ignore[attr-defined]
        return guarded

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """As transformers has it: no HTML escapes, Python's own options."""
        if (isinstance(indent, int) and indent > 16) or (isinstance(indent, str) and indent[16:]):
            raise LimitExceeded("indents JSON by more than 16 characters")
        text = json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )
        self.charge(len(text))
        return text

    def _finalize(self, value: Any) -> Any:
        self.charge(_size(value))
        return value


class Sandbox:
    """One compiled template. Raises ``jinja2.TemplateError`` for anything wrong with it."""

    def __init__(
        self, source: str, limits: TemplateLimits, now: Callable[[], datetime] = datetime.now
    ) -> None:
        self._limits = limits
        if len(source) > limits.source:
            raise LimitExceeded(f"has more than {limits.source} characters")
        self._environment = _Environment(now)
        self._template = _trap(lambda: self._environment.compile_template(source))

    def render(self, variables: Mapping[str, Any], input_size: int) -> str:
        """The text for ``variables`` (plain JSON values holding ``input_size`` characters)."""
        budget = _Budget(self._limits, input_size)
        limit = self._limits.output + input_size
        return _trap(lambda: self._environment.run(self._template, budget, limit, variables))


def _trap(action: Callable[[], T]) -> T:
    """Whatever a template does wrong comes out as a TemplateError."""
    try:
        return action()
    except TemplateError:
        raise
    except RecursionError:
        raise TemplateError("nests too deeply") from None
    except MemoryError:
        raise LimitExceeded("needs too much memory") from None
    except Exception as error:  # a template can raise any Python error: '1' + 1, x.y of None
        raise TemplateError(f"{type(error).__name__}: {error}") from None


def _instrument(tree: nodes.Template) -> None:
    """Route loops and ``~`` through the environment's guards."""
    for loop in list(tree.find_all(nodes.For)):
        guard = nodes.EnvironmentAttribute("guard_loop")
        text = nodes.Const(sum(len(data.data) for data in _own_text(loop.body)))
        loop.iter = nodes.Call(guard, [loop.iter, text], [], None, None)
    for parent in [tree, *tree.find_all(nodes.Node)]:
        for name, value in list(parent.iter_fields()):
            if isinstance(value, nodes.Concat):
                setattr(parent, name, _concat(value))
            elif isinstance(value, list):
                value[:] = [_concat(v) if isinstance(v, nodes.Concat) else v for v in value]
    tree.set_environment(tree.environment)  # type: ignore[arg-type]


def _concat(node: nodes.Concat) -> nodes.Call:
    # shares the list of parts, so that parts replaced later are replaced here too
    guard = nodes.EnvironmentAttribute("guard_concat")
    return nodes.Call(guard, node.nodes, [], None, None, lineno=node.lineno)


def _own_text(body: list[nodes.Node]) -> Iterator[nodes.TemplateData]:
    """Literal text of a loop body; inner loops charge their own."""
    for node in body:
        if isinstance(node, nodes.TemplateData):
            yield node
        elif not isinstance(node, nodes.For):
            yield from _own_text(list(node.iter_child_nodes()))


def _size(value: Any) -> int:
    """Characters to charge for a value; an entry of a list costs as much as eight."""
    if isinstance(value, str):
        return len(value)
    return 8 * len(value) if isinstance(value, (list, tuple, dict)) else 0


def _check_bits(left: Any, right: Any, power: int) -> None:
    if not (isinstance(left, int) and isinstance(right, int)):
        return
    if (left.bit_length() + right.bit_length()) * max(power, 1) > _MAX_BITS:
        raise LimitExceeded("computes too large a number")


def _raise(message: str) -> None:
    raise TemplateError(message)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


class _Namespace(Namespace):
    """Names with an underscore are refused, as in transformers: they lead to Python's insides."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"namespace attribute {name!r} starts with an underscore")
