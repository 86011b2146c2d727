"""Chat templates: jinja text that comes with a model, rendered with bounded work.

jinja's sandbox keeps a template from the machine, not from its time: loops in loops, or `'a' * 10**10`, would never
end. So whatever a template does is counted, and it has as many operations as the conversation is long. The count is
the same on every machine, which a time limit is not: a sample must not depend on how busy a machine is.

A rendering also says how far its text had come when the template first looked at each turn: until then it cannot
depend on that turn. See prefixes.py.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, MappingView, Sequence, Sized
from dataclasses import dataclass, field
from datetime import datetime
from functools import wraps
from typing import Any, cast, overload

from jinja2 import Environment, Template, TemplateError, nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

Span = tuple[int, int]  # first character, end
State = tuple[Any, ...]

# An operation is about a microsecond.
OPERATIONS = 500_000  # of a rendering, whatever the conversation
PER_INPUT = 200  # and for each turn, each of its values, and each 1,024 characters
PER_TOOL = 2  # and at each turn for each value of the tools, which some templates write at each question
MOST_FOR_TOOLS = 2_500_000  # of these
LETTERS_OUT = 1 << 18  # characters that a rendering may write, whatever the conversation
PER_LETTER = 16  # and for each character of it
MOST_LETTERS_OF_TOOLS = 1 << 26  # and at each turn twice as many as the tools have, up to this
LETTERS = 1 << 10  # characters that cost as much as an operation
LONGEST_TEXT = 1 << 28  # characters that are made at once out of fewer
LONGEST_TEMPLATE = 1 << 18  # characters; the longest that models come with have a tenth
MOST_BITS = 1 << 14  # of an integer; Python reads no longer one from a record
_TOO_LARGE = f"a number of more than {MOST_BITS:,} bits"
# In a format, a width of thousands, or a computed one.
_WIDE = re.compile(r"%[^a-zA-Z%]*(\d{4}|\*)|\{[^{}]*\d{4}|\{[^{}]+\{")
# Filters and methods whose result is as long as the product of their arguments; of the others it is the sum.
_PRODUCTS = re.compile(
    "batch|center|expandtabs|indent|[lr]?just|[lr]?strip|round|slice|to_bytes|tojson|translate|trim|zfill"
)
_FORMATS = frozenset(("format", "format_map"))
# Slow on long text, random, or of HTML.
_NO_FILTERS = re.compile("filesizeformat|forceescape|pprint|random|striptags|sum|urlize|wordwrap|xmlattr")
_FILE = "<template>"  # jinja's name for code that it made
_GENERATE = Template.generate.__code__
_NEXT = LoopContext.__next__.__code__


class TooMuchWork(Exception):
    """A template did not end within its operations, or wrote too much."""


@dataclass(frozen=True)
class Output:
    """The text of a conversation.

    Attributes:
        marked: spans inside `{% generation %}`.
        looked: for each turn, and at last for the end of them, how many characters had been written when the template
            first asked for it; None if it never did.
        states: for each of these, all that the template carries from turn to turn, if it asked in its main loop over
            the turns; what it writes where that loop ends is a function of this.
    """

    text: str
    marked: list[Span]
    looked: list[int | None]
    states: list[State | None]


@dataclass
class _Rendering:
    """What is counted and noted while a template is rendered."""

    left: int
    largest: int = 1
    letters: int = 0
    written: int = 0
    marked: list[Span] = field(default_factory=list)
    namespaces: list[_Namespace] = field(default_factory=list)

    def spend(self, operations: int) -> None:
        self.left -= operations
        if self.left < 0:
            raise TooMuchWork

    def weigh(self, *values: object) -> int:
        """Operations to walk through values; the same list twice counts twice, as it does in text."""
        total, waiting = 0, list(values)
        while waiting:
            value = waiting.pop()
            total += 1
            if isinstance(value, (str, bytes)):
                total += len(value) // LETTERS
                self.letters += len(value)
            elif isinstance(value, int):
                if value.bit_length() > MOST_BITS:
                    raise SecurityError(_TOO_LARGE)
                total += value.bit_length() // LETTERS
            elif isinstance(value, Mapping):
                waiting += value
                waiting += value.values()
            elif isinstance(value, list | tuple | set | frozenset | MappingView):
                waiting += cast(Iterable[object], value)
            elif isinstance(value, range):
                total += len(value)
            elif isinstance(value, _Namespace):
                waiting += _values(value).values()
            if total + len(waiting) > self.left:
                raise TooMuchWork
        if total > self.largest:
            self.largest = total
        return total

    def before(self, name: str, values: Sequence[Any]) -> None:
        """Spends what a filter or method costs, before it does anything."""
        cost = self.weigh(*values)
        first, others = (values[0], values[1:]) if values else (None, ())
        if _PRODUCTS.fullmatch(name):
            cost *= 1 + sum(map(_size, others))
        elif name in _FORMATS:
            cost = self.formatting(first, others)
        elif name == "replace" and len(others) > 1:
            cost += _repeated(_size(others[1]), _count(first, others[0]) or _size(first) + 1)
        elif name == "join" and others:
            text, parts = (first, others[0]) if isinstance(first, str) else (others[0], first)
            n_parts = len(parts) if isinstance(parts, Sized) else self.largest
            cost += _repeated(_size(text), n_parts)
        self.spend(cost)

    def formatting(self, template: object, values: Sequence[Any]) -> int:
        """Operations of `template % values` or `template.format(values)`; the second may come first."""
        text = template if isinstance(template, str) else ""
        if _WIDE.search(text):
            raise SecurityError("a format with a width of thousands, or one that is computed")
        return (1 + text.count("{") + text.count("%")) * (1 + self.weigh(text, *values))


def _size(value: object) -> int:
    if isinstance(value, bool) or value is None:
        return 1
    if isinstance(value, int | float):
        return int(min(abs(value), 1 << 40)) if value == value else 1
    return len(value) if isinstance(value, Sized) else 1


def _repeated(n_letters: int, times: int) -> int:
    """Operations to write some characters again and again, each time on its own."""
    if n_letters * times > LONGEST_TEXT:
        raise TooMuchWork
    return times * (1 + n_letters // LETTERS)


def _count(text: object, part: object) -> int:
    return text.count(part) if isinstance(text, str) and isinstance(part, str) and part else 0


class _Namespace(Namespace):
    """jinja's, without names that begin with an underscore. Its attributes are the template's."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _values(namespace: _Namespace) -> dict[str, Any]:
    values: dict[str, Any] = namespace._Namespace__attrs  # type: ignore[attr-defined]
    return values


def _state(namespace: _Namespace) -> State | None:
    """All values, if they are plain ones."""
    items = sorted(_values(namespace).items())
    if all(type(value) in (str, int, float, bool, type(None)) for _, value in items):
        return tuple((name, type(value).__name__, value) for name, value in items)
    return None


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"{name} as a name in a namespace; expected one without an underscore before it")


class _Track:
    """When a template looked at each turn."""

    def __init__(self, rendering: _Rendering, n_turns: int) -> None:
        self.rendering, self.n_turns = rendering, n_turns
        self.looked: list[int | None] = [None] * (n_turns + 1)
        self.states: list[State | None] = [None] * (n_turns + 1)
        self.loops: list[object] = [None] * (n_turns + 1)
        self.known = 0  # turns that were looked at
        self.ended: object = None  # the loop that came to the end

    def look(self, turn: int) -> None:
        """The template looked at a turn, and so at those before it, at any place."""
        if self.ended is not None:
            self.loops = [None] * (self.n_turns + 1)
        while self.known <= min(turn, self.n_turns):
            self.looked[self.known] = self.rendering.written
            self.known += 1

    def next(self, turn: int, loop: _TurnLoop, in_order: bool) -> None:
        """A loop asked for its next turn, or for the end; `in_order`: as the first, and between two turns."""
        if self.ended is loop:
            return
        self.look(turn)
        if in_order:
            # What was made in the loop ends with its turn, or something from before holds it and is not plain.
            states = [_state(namespace) for namespace in self.rendering.namespaces[: loop.n_before]]
            if None not in states:
                self.states[turn], self.loops[turn] = tuple(states), loop
        if turn == self.n_turns:
            self.ended = loop

    def result(self) -> list[State | None]:
        """The states of the loop that came to the end, if nothing was asked for after it."""
        return [
            state if loop is not None and loop is self.ended else None
            for state, loop in zip(self.states, self.loops, strict=True)
        ]


class _Turns(Sequence[Any]):
    """The turns from one on, as a list that notes what is asked of it."""

    def __init__(self, items: Sequence[Any], track: _Track, first: int = 0) -> None:
        self._items, self._track, self._first = items, track, first

    def __len__(self) -> int:
        self._track.look(self._track.n_turns)
        return len(self._items) - self._first

    def __bool__(self) -> bool:
        self._track.look(self._first)
        return len(self._items) > self._first

    @overload
    def __getitem__(self, which: int) -> Any: ...
    @overload
    def __getitem__(self, which: slice) -> Sequence[Any]: ...
    def __getitem__(self, which: int | slice) -> Any:
        if isinstance(which, slice):
            if which.stop is None and which.step in (None, 1) and (which.start or 0) >= 0:
                return _Turns(
                    self._items, self._track, min(self._first + (which.start or 0), len(self._items))
                )
            self._track.look(self._track.n_turns)
            return list(self._items[self._first :])[which]
        at = self._first + which
        self._track.look(at if which >= 0 else self._track.n_turns)
        if which < 0:
            return list(self._items[self._first :])[which]
        return self._items[at]

    def __iter__(self) -> Iterator[Any]:
        for turn in range(self._first, len(self._items)):
            self._track.look(turn)
            yield self._items[turn]
        self._track.look(self._track.n_turns)

    def __add__(self, others: Any) -> list[Any]:
        return [*self, *others]

    def __radd__(self, others: Any) -> list[Any]:
        return [*others, *self]

    def __eq__(self, other: object) -> bool:
        return list(self) == other

    __hash__ = None  # type: ignore[assignment]

    def loop(self, *, buffered: bool) -> Iterator[Any]:
        """The turns for a `for` of the template.

        Args:
            buffered: what the loop writes is not written before it ends.
        """
        return _TurnLoop(self._items, self._track, self._first, buffered)


class _TurnLoop:
    def __init__(self, items: Sequence[Any], track: _Track, first: int, buffered: bool) -> None:
        self._items, self._track, self._turn, self._buffered = items, track, first, buffered
        self.n_before = len(track.rendering.namespaces)

    def __iter__(self) -> _TurnLoop:
        return self

    def __next__(self) -> Any:
        self._track.rendering.spend(1)
        turn = self._turn
        is_new = turn == self._track.known
        self._track.next(turn, self, is_new and not self._buffered and _is_main_loop())
        if turn == len(self._items):
            raise StopIteration
        self._turn += 1
        return self._items[turn]


def _is_main_loop() -> bool:
    """Whether the next turn is asked for by a loop of the template itself, between two turns.

    Not so for a look ahead, as `loop.last` is one, in a filter, or in a macro, whose text is written later.
    """
    frame = sys._getframe(2)
    while frame.f_back is not None:
        if frame.f_code is _GENERATE:
            return True
        if frame.f_code.co_filename != _FILE and frame.f_code is not _NEXT:
            return False
        frame = frame.f_back
    return False


class _Generation(Extension):
    """`{% generation %}`, which marks what an assistant said."""

    tags = {"generation"}  # noqa: RUF012 - jinja declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        text = caller()
        assert isinstance(self.environment, _Sandbox)
        rendering = self.environment.rendering
        rendering.marked.append((rendering.written, rendering.written + len(text)))
        return text


class _Metering(NodeTransformer):
    """Rewrites a template so that loops, macros and the making of lists and text are counted."""

    def __init__(self) -> None:
        self._buffers = 0

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self._buffers += node.recursive
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "_each", nodes.Const(self._buffers > 0))
        self._buffers -= node.recursive
        return self._counting(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        return self._counting(node, 3)

    visit_CallBlock = visit_Macro

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:
        self._buffers += 1
        self.generic_visit(node)
        self._buffers -= 1
        return node

    visit_FilterBlock = visit_AssignBlock

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "_joined")

    def visit_List(self, node: nodes.List | nodes.Tuple | nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        is_target = isinstance(node, nodes.Tuple) and node.ctx != "load"
        plain = not isinstance(node, nodes.Dict) and all(isinstance(item, nodes.Const) for item in node.items)
        return node if is_target or plain else _filtered(node, "_made")

    visit_Tuple = visit_Dict = visit_List

    @staticmethod
    def _counting(node: Any, at_least: int = 1) -> nodes.Node:
        n_nodes = sum(1 for _ in node.find_all(nodes.Node))
        node.body.insert(0, nodes.ExprStmt(_filtered(nodes.Const(at_least + n_nodes // 16), "_tick")))
        return node


def _filtered(value: nodes.Node, name: str, *arguments: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(cast(nodes.Expr, value), name, list(arguments), [], None, None, lineno=value.lineno)


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja as transformers sets it up for chat templates, with everything counted."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, now: datetime) -> None:
        self.now = now
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # nothing is computed before it is counted
            extensions=[_Generation, loopcontrols],
            finalize=_written,
        )
        self.rendering = _Rendering(OPERATIONS)
        self.filters["tojson"] = _tojson
        self.filters = {
            name: self._metered(name, function)
            for name, function in self.filters.items()
            if not _NO_FILTERS.fullmatch(name)
        }
        self.filters |= {
            "_each": self._each,
            "_tick": self._tick,
            "_made": self._made,
            "_joined": self._joined,
        }
        self.globals = {
            "range": self.globals["range"],
            "dict": _make_dict,
            "namespace": self._namespace,
            "raise_exception": _raise_exception,
            "strftime_now": self._date,
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = _Metering().visit(super()._parse(source, name, filename))
        return tree.set_environment(self)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        rendering = self.rendering
        weight = rendering.weigh(left, right)
        if operator == "*":
            factors = [value for value in (left, right) if isinstance(value, int)]
            if len(factors) == 1 and (isinstance(left, Sized) or isinstance(right, Sized)):
                weight *= 1 + max(0, factors[0])
                if isinstance(left, str | bytes) or isinstance(right, str | bytes):
                    weight = _repeated(_size(left) * _size(right), 1)
            elif len(factors) == 2 and sum(factor.bit_length() for factor in factors) > MOST_BITS:
                raise SecurityError(_TOO_LARGE)
        elif operator == "**":
            if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > MOST_BITS:
                raise SecurityError(_TOO_LARGE)
        elif operator == "%" and isinstance(left, str | bytes):
            weight = rendering.formatting(left, (right,))
        rendering.spend(weight)
        result = super().call_binop(context, operator, left, right)
        rendering.weigh(result)
        return result

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        values = [*args, *kwargs.values()]
        if isinstance(owner, str | bytes | int | float | list | tuple | Mapping):
            values.insert(0, owner)
        __self.rendering.before(getattr(__obj, "__name__", ""), values)
        result = ImmutableSandboxedEnvironment.call(__self, __context, __obj, *args, **kwargs)
        if not isinstance(result, _Turns):
            __self.rendering.spend(__self.rendering.weigh(result))
        return result

    def _metered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def metered(*args: Any, **kwargs: Any) -> Any:
            values = [
                value for value in args if not isinstance(value, Context | nodes.EvalContext | Environment)
            ]
            self.rendering.before(name, [*values, *kwargs.values()])
            result = function(*args, **kwargs)
            self.rendering.spend(self.rendering.weigh(result))
            return result

        return metered

    def _each(self, values: Any, buffered: bool) -> Iterator[Any]:
        if isinstance(values, _Turns):
            return values.loop(buffered=buffered)
        return self._counted(values)

    def _counted(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.rendering.spend(1)
            yield value

    def _tick(self, operations: int) -> None:
        # Comparisons and cuts of text are not seen: each may walk through the longest value so far.
        self.rendering.spend(operations * (1 + self.rendering.largest // 256))

    def _made(self, value: Any) -> Any:
        self.rendering.spend(self.rendering.weigh(value))
        return value

    def _joined(self, values: list[Any]) -> str:
        self.rendering.spend(self.rendering.weigh(values))
        text = "".join(map(str, values))
        self.rendering.weigh(text)
        return text

    def _date(self, format: str) -> str:
        """The date, in a format of strftime."""
        if _WIDE.search(format):
            raise SecurityError("a date with a width of thousands")
        return self.now.strftime(format)

    def _namespace(self, *args: Any, **kwargs: Any) -> _Namespace:
        made = _Namespace(*args, **kwargs)
        self.rendering.namespaces.append(made)
        return made


@pass_context
def _written(context: Context, value: Any) -> Any:
    """`{{ value }}`."""
    environment = context.environment
    assert isinstance(environment, _Sandbox)
    environment.rendering.spend(
        1 + len(value) // LETTERS if type(value) is str else environment.rendering.weigh(value)
    )
    return value


def _tojson(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(
        x,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
        default=_turns,
    )


def _turns(value: object) -> list[Any]:
    if isinstance(value, _Turns):
        return list(value)
    raise TypeError(f"{type(value).__name__} as JSON")


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


class ChatTemplate:
    """A template that is compiled once, and renders conversations.

    Args:
        now: the date that the template writes, if it writes one; None is today.

    Raises:
        TemplateError: it is no jinja, or longer than any template of a model.
    """

    def __init__(self, text: str, now: datetime | None = None) -> None:
        if len(text) > LONGEST_TEMPLATE:
            raise TemplateError(f"it has {len(text):,} characters; expected at most {LONGEST_TEMPLATE:,}")
        self._sandbox = _Sandbox(now or datetime.now())
        try:
            self._template = self._sandbox.from_string(text)
        except TemplateError:
            raise
        except Exception as error:  # of text that is no template, jinja and Python's compiler raise anything
            raise TemplateError(f"{type(error).__name__}: {error}") from None

    def render(
        self,
        turns: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        names: Mapping[str, Any],
        *,
        add_generation_prompt: bool = False,
    ) -> Output:
        """The text of some turns.

        Args:
            tools: definitions.
            names: what the template knows besides, such as bos_token.

        Raises:
            TemplateError: it refuses the turns, or fails on them.
            TooMuchWork: it does not end, or writes without measure.
        """
        rendering = self._sandbox.rendering = _Rendering(sys.maxsize)
        n_tools, letters_of_tools = rendering.weigh(tools), rendering.letters
        n_input = n_tools + rendering.weigh(list(turns))
        rendering.left = (
            OPERATIONS + PER_INPUT * n_input + min(PER_TOOL * n_tools * len(turns), MOST_FOR_TOOLS)
        )
        most_letters = (
            LETTERS_OUT
            + PER_LETTER * rendering.letters
            + min(PER_TOOL * letters_of_tools * len(turns), MOST_LETTERS_OF_TOOLS)
        )
        rendering.largest = max((rendering.weigh(turn) for turn in turns), default=1)
        track = _Track(rendering, len(turns))
        pieces = []
        try:
            for piece in self._template.generate(
                messages=_Turns(turns, track),
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **names,
            ):
                rendering.written += len(piece)
                if rendering.written > most_letters:
                    raise TooMuchWork
                pieces.append(piece)
        except (TemplateError, TooMuchWork):
            raise
        except Exception as error:  # the template is somebody else's program
            raise TemplateError(f"{type(error).__name__}: {error}") from None
        return Output("".join(pieces), rendering.marked, track.looked, track.result())
