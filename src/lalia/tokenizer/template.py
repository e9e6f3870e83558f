"""Chat templates from untrusted sources, in a sandbox with bounds.

Jinja's sandbox keeps a template from Python's internals. It bounds neither time nor memory, so this module does. Every
turn of a loop and every call is a step that is counted and looks at the clock; whatever builds text or lists measures
them first. That works in any thread, without signals and without a second process. A step is short because nothing that
one step can build is large.
"""

import datetime
import functools
import json
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from lalia.errors import UserError

MAX_RENDERED_CHARACTERS = 10_000_000
"""Limit on what a template may write, and on any one text that it builds; 131,072 tokens have about 600,000."""
MAX_BUILT_CHARACTERS = 200_000_000
"""Limit on all texts and lists built on the way, should they all be kept."""
MAX_TEMPLATE_CHARACTERS = 1_000_000
"""Published templates have up to some tens of thousands."""
MAX_STEPS = 2_000_000
"""Turns of loops, calls, and values measured; a conversation of 1,000 messages takes some tens of thousands."""
MAX_SECONDS = 5.0
MAX_WIDTH = 10_000
"""Largest number that pads or indents text."""

FILTERS = (
    "abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float",
    "groupby", "indent", "int", "items", "join", "last", "length", "list", "lower", "map", "max", "min", "reject",
    "rejectattr", "replace", "reverse", "round", "safe", "select", "selectattr", "sort", "string", "sum", "title",
    "trim", "unique", "upper",
)  # fmt: skip
"""Jinja's filters that templates may use; the others pad, wrap or format without bounds and no template needs them."""


def render_template(
    template: str, messages: Sequence[dict[str, Any]], add_generation_prompt: bool, **variables: Any
) -> str:
    """Render a chat template from an untrusted source, with the names that transformers offers to templates.

    Whatever the template does, this returns within `MAX_SECONDS` and a bounded amount of memory.

    Raises:
        UserError: whatever goes wrong in the template, its own `raise_exception` included.
    """
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        raise UserError(f"the chat template has {len(template)} characters, more than {MAX_TEMPLATE_CHARACTERS}")
    sandbox = _Sandbox()
    pieces: list[str] = []
    size = 0
    variables = {"tools": None, "documents": None, **variables}
    try:
        compiled = sandbox.from_string(template)
        for piece in compiled.generate(messages=messages, add_generation_prompt=add_generation_prompt, **variables):
            size += len(piece)
            if size > MAX_RENDERED_CHARACTERS:
                raise UserError(f"the chat template writes more than {MAX_RENDERED_CHARACTERS} characters")
            pieces.append(piece)
    except UserError:
        raise
    except TemplateError as error:
        raise UserError(f"the chat template refuses this conversation or does not parse: {error}") from None
    except Exception as error:  # noqa: BLE001 - a program of others: any error in it is the user's to know
        raise UserError(f"the chat template fails on this conversation: {type(error).__name__}: {error}") from None
    return "".join(pieces)


class _Generation(Extension):
    """`{% generation %}` marks in transformers what an assistant is trained on; here it is its content."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Bounds(NodeTransformer):
    """Rewrites a parsed template: loops count their turns, `~` and literals of lists and dicts are measured."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "lalia_turns")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "lalia_concat")

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "lalia_measured")

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "lalia_measured")

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "lalia_noted") if isinstance(node.arg, nodes.Slice) else node

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "lalia_measured") if node.ctx == "load" else node


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox for one rendering, with the bounds of this module."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation], finalize=self._finalize
        )
        self._steps = self._built = 0
        self._deadline = time.monotonic() + MAX_SECONDS
        self.concat = self._concat  # what macros and {% set %} blocks join their output with
        self._jinja = self.filters
        own = {
            "join": self._join, "replace": self._replace, "indent": self._indent, "string": self._string,
            "tojson": self._to_json, "lalia_turns": self._turns, "lalia_concat": self._concat_values,
            "lalia_measured": self._measured, "lalia_noted": self._noted,
        }  # fmt: skip
        self.filters = {name: self._bounded(self._jinja[name]) for name in FILTERS} | own
        self.globals = {
            **{name: self.globals[name] for name in ("range", "dict", "namespace", "cycler", "joiner")},
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def _generate(self, source: nodes.Template, name: Any, filename: Any, defer_init: bool = False) -> str:
        return super()._generate(_Bounds().visit(source), name, filename, defer_init)

    def step(self, size: int = 1) -> None:
        """Count, and look at the clock."""
        self._steps += size
        if self._steps > MAX_STEPS:
            raise UserError(f"the chat template takes more than {MAX_STEPS} steps on this conversation; it may not end")
        if time.monotonic() > self._deadline:
            raise UserError(f"the chat template takes more than {MAX_SECONDS:g} seconds on this conversation")

    def check_size(self, size: int) -> None:
        """Refuse to build so many characters, or any after the time is over."""
        self.step()
        self._built += size
        if size > MAX_RENDERED_CHARACTERS:
            raise UserError(f"the chat template computes text of {size} characters; at most {MAX_RENDERED_CHARACTERS}")
        if self._built > MAX_BUILT_CHARACTERS:
            raise UserError(f"the chat template computes more than {MAX_BUILT_CHARACTERS} characters in all")

    def measure(self, *values: Any) -> int:
        """Characters that `values` have as text, about; counts every element as a step."""
        size, waiting = 0, list(values)
        while waiting:
            value = waiting.pop()
            if isinstance(value, str | bytes):
                size += len(value)
            elif isinstance(value, dict):
                self.step(1 + len(value))
                waiting += [*value.keys(), *value.values()]
            elif isinstance(value, list | tuple | set | frozenset):
                self.step(1 + len(value))
                waiting += value
            elif isinstance(value, Namespace):
                self.step()
                waiting.append(object.__getattribute__(value, "_Namespace__attrs"))
            elif isinstance(value, int):
                size += value.bit_length() // 3 + 1
            else:
                size += 20
            if size > MAX_RENDERED_CHARACTERS:
                break
        self.check_size(size)
        return size

    def call(self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        self.step()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, bytes | bytearray | int | float):
            raise UserError(
                f"the chat template calls a method of {type(owner).__name__}, which Lalia does not offer; templates "
                "work with text, lists and objects"
            )
        if isinstance(owner, str):
            args = tuple(list(self._turns(arg)) if isinstance(arg, Iterator) else arg for arg in args)
            self._check_method(owner, getattr(__obj, "__name__", ""), [*args, *kwargs.values()])
        elif not isinstance(__obj, Macro):
            self.measure(*args, *kwargs.values())
        return self._noted(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and not isinstance(left, int | float):
            self.measure(left, right)
        elif operator == "%" and isinstance(left, str):
            self._check_format(left, right if isinstance(right, tuple) else (right,))
        elif operator in ("*", "**"):
            sizes = [len(side) if isinstance(side, str | bytes | list | tuple) else abs(side) for side in (left, right)]
            if operator == "**" and (sizes[0] > 1_000_000 or sizes[1] > 32):
                raise UserError("the chat template computes too large a power")
            if operator == "*":
                if sizes[0] * sizes[1] > MAX_RENDERED_CHARACTERS:
                    raise UserError("the chat template computes too large a product")
                self._check_repetition(left, right)
        return super().call_binop(context, operator, left, right)

    def _check_repetition(self, left: Any, right: Any) -> None:
        for content, times in ((left, right), (right, left)):
            if isinstance(content, str | bytes | list | tuple) and isinstance(times, int):
                references = 8 * len(content) if isinstance(content, list | tuple) else 0
                self.check_size((self.measure(content) + references) * max(times, 0))

    def _check_method(self, text: str, name: str, args: list[Any]) -> None:
        """Methods of text that can build more than they are given."""
        size = len(text) + self.measure(*args)
        if any(isinstance(arg, int) and arg > MAX_WIDTH for arg in args) and name in _PADDING:
            raise UserError(f"the chat template pads text to more than {MAX_WIDTH} characters")
        elif name == "replace" and len(args) > 1 and isinstance(args[0], str) and isinstance(args[1], str):
            size = len(text) + (text.count(args[0]) if args[0] else len(text) + 1) * len(args[1])
        elif name == "join" and args and isinstance(args[0], list | tuple | set | frozenset | dict | str):
            size += len(text) * len(args[0])
        elif name == "join":
            raise UserError("the chat template joins something other than a list")
        elif name == "expandtabs":
            size += text.count("\t") * max((arg for arg in args if isinstance(arg, int)), default=8)
        elif name not in _TEXT_METHODS:
            raise UserError(f"the chat template calls {name}, which Lalia does not offer")
        self.check_size(size)

    def _check_format(self, form: str, values: Sequence[Any]) -> None:
        """Format fields may repeat a value and pad it to any width."""
        self.check_size(len(form) + self.measure(*values) * (1 + form.count("{") + form.count("%")))
        numbers = [int(digits[:12]) for digits in re.findall(r"\d+", form)]
        if "*" in form or "{}}" in form or re.search(r"\{[^}]*\{", form) or max(numbers, default=0) > MAX_WIDTH:
            raise UserError(f"the chat template formats text to a width above {MAX_WIDTH}, or to a computed one")

    def _finalize(self, value: Any) -> Any:
        """What `{{ }}` writes: text as it is, anything else after a look at its size."""
        if not isinstance(value, str | Undefined):
            self.measure(value)
        return value

    def _turns(self, values: Any) -> Iterator[Any]:
        for value in values:
            self.step()
            yield value

    def _measured(self, value: Any) -> Any:
        self.measure(value)
        return value

    def _noted(self, value: Any) -> Any:
        """A result, after a look at how long it is."""
        if isinstance(value, str | bytes):
            self.check_size(len(value))
        elif isinstance(value, list | tuple):
            self.check_size(8 * len(value))  # bytes of its references
            if len(value) < 10:
                self.measure(*(part for part in value if isinstance(part, str)))
        return value

    def _bounded(self, function: Any) -> Any:
        """A filter of Jinja's whose result is noted; the marks that Jinja puts on filters stay."""

        @functools.wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            return self._noted(function(*args, **kwargs))

        return bounded

    def wrap_str_format(self, value: Any) -> Any:
        """Jinja's safe version of `str.format`, with a look at what it formats."""
        formatter = super().wrap_str_format(value)
        if formatter is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> Any:
            self._check_format(value.__self__, [*args, *kwargs.values()])
            return formatter(*args, **kwargs)

        return checked

    def _concat(self, pieces: Any) -> str:
        pieces = list(pieces)
        self.check_size(sum(map(len, pieces)))
        self.step(len(pieces))
        return "".join(pieces)

    def _concat_values(self, values: list[Any]) -> str:
        self.measure(*values)
        return "".join(map(str, values))

    def _join(self, value: Any, d: str = "", attribute: Any = None) -> str:
        values = list(value if attribute is None else map(make_attrgetter(self, attribute), value))
        self.check_size(self.measure(*values) + len(values) * len(str(d)))
        return str(d).join(map(str, values))

    def _replace(self, text: Any, old: str, new: str, count: int | None = None) -> str:
        self.measure(text)
        text = str(text)
        self._check_method(text, "replace", [str(old), str(new)])
        return text.replace(str(old), str(new), -1 if count is None else count)

    def _indent(self, text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        pad = len(width) if isinstance(width, str) else width
        if pad > MAX_WIDTH:
            raise UserError(f"the chat template indents text by more than {MAX_WIDTH} characters")
        self.check_size(len(text) + (text.count("\n") + 1) * pad)
        return self._jinja["indent"](text, width, first, blank)

    def _string(self, value: Any) -> str:
        self.measure(value)
        return str(value)

    def _to_json(
        self,
        value: Any,
        indent: int | None = None,
        ensure_ascii: bool = False,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        """Jinja's own filter escapes HTML, which no model has seen; transformers' has these options."""
        if isinstance(indent, int | str) and (len(indent) if isinstance(indent, str) else indent) > 100:
            raise UserError("the chat template indents JSON by more than 100 characters")
        self.measure(value)
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


_PADDING = {"center", "ljust", "rjust", "zfill", "expandtabs"}
_TEXT_METHODS = {
    *("capitalize", "casefold", "center", "count", "endswith", "expandtabs", "find", "format", "format_map", "index"),
    *("isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric", "isprintable"),
    *("isspace", "istitle", "isupper", "join", "ljust", "lower", "lstrip", "partition", "removeprefix", "removesuffix"),
    *("replace", "rfind", "rindex", "rjust", "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith"),
    *("strip", "swapcase", "title", "upper", "zfill"),
}


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    if len(form) > 200 or re.search(r"%[^a-zA-Z%]", form):  # the C library pads "%9999999d"
        raise UserError("the chat template asks for the date in a form that Lalia does not know")
    return datetime.datetime.now().strftime(form)
