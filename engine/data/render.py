"""From a conversation to tokens and the set of them that is learned: chat templates and loss masks.

The whole conversation is rendered and tokenised once, as it is at inference; what is to be learned is found
in the text and carried over by the tokens' offsets. Tokenising turn by turn instead would forbid merges
across a boundary (a newline of the template with one of the content) that a served model sees in its history.

Shape suffix: L tokens of a sample.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from difflib import get_close_matches
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import TemplateError

from paralign.models.errors import DataError, RecipeError

from . import config
from .chat_template import ChatTemplate, Output, Span, TooMuchWork
from .config import LossOn
from .conversation import Conversation
from .prefixes import Prefixes, n_shared
from .tokenizer import open_tokenizer
from .turns import cut

_OURS = Path(__file__).parent / "templates"
MOST_ROLES = 20  # that an error names
NO_TOOLS, TOOLS = "default", "tool_use"  # names of templates, where a tokenizer has several
_THINKING = re.compile(r"[.'\"]thinking\b")  # of a turn; not enable_thinking
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Rendered(NamedTuple):
    """Tokens int32 (L,), and bool (L,) where they are to be predicted; never the first one."""

    tokens: np.ndarray
    learned: np.ndarray


def template_text(chat_template: config.ChatTemplate) -> str | None:
    """The jinja text of a template of ours or of a file; None for the tokenizer's own."""
    if chat_template == "tokenizer":
        return None
    ours = _OURS / f"{chat_template}.jinja"
    path = Path(chat_template)
    try:
        path = ours if ours.is_file() else path
        if path.is_file():
            return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # a name that cannot be one; no UTF-8
        raise DataError(f"chat_template {path}: cannot be read ({error}); expected a jinja file") from None
    names = ["tokenizer", *sorted(file.stem for file in _OURS.glob("*.jinja"))]
    close = get_close_matches(str(chat_template), names, n=1)
    raise DataError(
        f"chat_template {chat_template}: no such file; expected {', '.join(names)} or a jinja file"
        + (f"; did you mean {close[0]}?" if close else "")
    )


def was_read_otherwise(text: str) -> bool:
    """Whether older versions may have made other samples with a template, or the file it stands in.

    They gave it the reasoning under one name, and took the first of several templates for tools too.
    """
    return _THINKING.search(text) is not None or f'"{TOOLS}"' in text


class Renderer:
    """Renders and tokenises conversations with one tokenizer and one template.

    Attributes:
        n_remade: samples so far that older versions refused or made otherwise: parts of a conversation and answers
            put behind their generation prompt, where the template changes turns; reasoning under its second name;
            tools in a template of their own; calls with arguments as JSON text.

    Args:
        tokenizer_dir: a Hugging Face directory with a fast tokenizer.
        template: jinja text; None takes the tokenizer's own.
        loss_on: see `DataConfig`.
        now: the date that the template writes, if it writes one; None is today.

    Raises:
        WeightsError: no fast tokenizer in the directory.
        DataError: no template, or one that is no jinja.
    """

    def __init__(
        self, tokenizer_dir: Path, template: str | None, loss_on: LossOn, now: datetime | None = None
    ) -> None:
        self.n_remade = 0
        self.tokenizer = open_tokenizer(tokenizer_dir)
        self._backend: Any = self.tokenizer.backend_tokenizer
        self._backend.no_truncation()  # a limit kept in tokenizer.json would cut samples in silence
        self._backend.no_padding()
        if template is None and not self.tokenizer.chat_template:
            raise DataError(
                f"{tokenizer_dir}: no chat template; set chat_template: llama3, chatml, baichuan2 or a file"
            )
        texts = {NO_TOOLS: template} if template is not None else _named(self.tokenizer.chat_template)
        if NO_TOOLS not in texts:
            raise DataError(
                f"{tokenizer_dir}: its chat templates are {', '.join(map(cut, texts))}, and none is {NO_TOOLS}; "
                "write the one that you mean to a file, and set data.chat_template to its path"
            )
        self._texts = texts = {name: texts[name] for name in (NO_TOOLS, TOOLS) if name in texts}
        try:
            self._templates = {name: ChatTemplate(text, now) for name, text in texts.items()}
        except TemplateError as error:
            raise DataError(
                f"the chat template is no jinja: {_line(error)}; mend it, or take another"
            ) from None
        self._names = {
            name: [str(one) for one in token] if isinstance(token, list) else str(token)
            for name, token in self.tokenizer.special_tokens_map.items()
        }
        self._loss_on = loss_on
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        self._only_bos = [] if bos is None or bos == eos else [bos]
        special = [id_ for id_, token in self.tokenizer.added_tokens_decoder.items() if token.special]
        self._stops = np.setdiff1d(special + ([] if eos is None else [eos]), self._only_bos)

    def __call__(self, conversation: Conversation) -> Rendered:
        """Tokens and learned tokens of one conversation, as one sample; see `samples`.

        Raises:
            DataError: as `samples`; several answers, of which the template changes the earlier ones.
        """
        turns = self._turns_to_learn(conversation)
        sample, rest = self._sample(conversation, len(conversation.messages), turns)
        if rest:
            raise DataError(
                f"{conversation.place}: the chat template changes earlier turns: the text up to "
                f"messages[{rest[-1]}] is not the beginning of the whole, so that the model would not see at "
                "inference what it learns from; set loss_on: last, or take a template that only adds text"
            )
        return sample

    def samples(self, conversation: Conversation) -> list[Rendered]:
        """Tokens and learned tokens of one conversation.

        A token is learned if any of its text lies in an assistant turn or is the token that stops it. Where the
        template renders a turn differently once another follows, as those do that drop the reasoning of earlier
        turns, the answer before is learned in a sample of its own, which ends with it: what a model sees at
        inference is what it learns from.

        Raises:
            DataError: the template refuses the conversation or passes over its tools; no sample can be made in which
                an answer stands behind its generation prompt; it marks some assistant turns with
                `{% generation %}`, and not this one.
        """
        turns = self._turns_to_learn(conversation)
        sample, turns = self._sample(conversation, len(conversation.messages), turns)
        found = [sample]
        while turns:
            sample, turns = self._sample(conversation, turns[-1] + 1, turns)
            found.append(sample)
        self.n_remade += len(found) - 1
        return found[::-1]

    def _sample(
        self, conversation: Conversation, n_turns: int, turns: list[int]
    ) -> tuple[Rendered, list[int]]:
        """The first turns as a sample, in which the last of `turns` are learned, and those that are not."""
        place = conversation.place
        self.n_remade += self._was_made_otherwise(conversation, n_turns)
        text, marked, spans = self._spans(conversation, n_turns, turns)
        if turns and not spans:  # what follows the last answer changes it
            self.n_remade += 1
            text, marked, spans = self._spans(conversation, turns[-1] + 1, turns)
        turns, rest = turns[len(turns) - len(spans) :], turns[: len(turns) - len(spans)]
        tokens_L, starts, ends = self._tokens(text, place)
        _check_tools(conversation, n_turns, text, dict(zip(turns, spans)))
        if self._loss_on == "all":
            return Rendered(tokens_L, _but_the_first(~np.isin(tokens_L, self._only_bos))), rest
        learned_L = np.zeros(len(tokens_L), dtype=bool)
        stops_L = np.isin(tokens_L, self._stops)
        in_order = bool((np.diff(starts) >= 0).all() and (np.diff(ends) >= 0).all())
        first = spans[0][0] if spans and (conversation.n_context or rest) else 0
        for start, end in spans if marked is None else _within(marked, spans, turns, place):
            start = max(start, first)  # a mark that begins before a completion stops at its prompt
            inside_N = _tokens_in(starts, ends, start, end, in_order=in_order)
            if marked is None:
                inside_N = _cut_after_stop(inside_N, stops_L, text, ends, end)
            learned_L[inside_N] = True
        return Rendered(tokens_L, _but_the_first(learned_L)), rest

    def _tokens(self, text: str, place: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """int32 (L,), tokens of a text; int64 (L,), where each begins in it and ends."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = cut(error.object[error.start])
            raise DataError(
                f"{place}: {half} is half of a surrogate pair, which is no text; mend the record, or the template"
            ) from None
        encoding = self._backend.encode(text, add_special_tokens=False)  # the template writes BOS itself
        tokens_L = np.array(encoding.ids, dtype=np.int32)
        flat = np.fromiter(chain.from_iterable(encoding.offsets), np.int64, 2 * len(tokens_L))
        return tokens_L, flat[::2], flat[1::2]

    def _name(self, conversation: Conversation) -> str:
        """Of the template that conversations like this one have, as transformers takes it."""
        return TOOLS if conversation.tools and TOOLS in self._templates else NO_TOOLS

    def _was_made_otherwise(self, conversation: Conversation, n_turns: int) -> bool:
        name = self._name(conversation)
        if self._texts[name] != self._texts[NO_TOOLS]:
            return True
        reasons = any(message.reasoning_content for message in conversation.messages[:n_turns])
        return reasons and _THINKING.search(self._texts[name]) is not None

    def learns_to_stop(self, sample: Rendered) -> bool:
        """Whether the sample teaches some special token, as the one that ends a turn is."""
        return bool(np.isin(sample.tokens[sample.learned], self._stops).any())

    def pieces(self, sample: Rendered) -> list[tuple[str, bool]]:
        """The text of each token and whether it is learned; tokens that share a character come as one."""
        found: list[tuple[str, bool]] = []
        waiting: list[int] = []
        for id_, learned in zip(sample.tokens.tolist(), sample.learned.tolist()):
            waiting.append(id_)
            piece = self._backend.decode(waiting, skip_special_tokens=False)
            if not piece.endswith("\ufffd") or len(waiting) == 4:  # no character has more bytes
                found.append((piece, learned))
                waiting = []
        return found

    def _turns_to_learn(self, conversation: Conversation) -> list[int]:
        turns = [
            i
            for i, message in enumerate(conversation.messages)
            if message.role == "assistant" and i >= conversation.n_context
        ]
        return [] if self._loss_on == "all" else turns[-1:] if self._loss_on == "last" else turns

    def _spans(
        self, conversation: Conversation, n_turns: int, turns: Sequence[int]
    ) -> tuple[str, list[Span] | None, list[Span]]:
        """The text of the first turns, with what is marked in it, and where the last of `turns` stand.

        A turn stands from the end of its generation prompt to its own end. Turns are left out from the first of
        them on up to the last that the text changes, so that none may be left.
        """
        turns_to_show = conversation.messages[:n_turns]
        messages = [message.for_template() for message in turns_to_show]
        tools = list(conversation.tools) or None

        def render(n: int, prompted: bool, last: Mapping[str, Any] | None = None) -> Output:
            shown = messages[:n] if last is None else [*messages[: n - 1], last]
            return self._render(conversation, shown, tools, add_generation_prompt=prompted)

        try:
            whole = render(n_turns, False)
        except DataError:
            # Some templates join the arguments of calls to other text, as DeepSeek-V3's does.
            if not any(message.tool_calls for message in turns_to_show):
                raise
            objects = messages
            messages = [message.for_template(json_arguments=True) for message in turns_to_show]
            try:
                whole = render(n_turns, False)
            except DataError:
                messages = objects
                whole = render(n_turns, False)  # the error of the objects
            self.n_remade += 1
        marks = _GENERATION.search(self._texts[self._name(conversation)]) is not None
        text, marked = whole.text, whole.marked if marks else None
        prefixes = Prefixes(render, whole, n_turns, len(turns))
        ends_with_answer = bool(turns) and turns[-1] + 1 == n_turns
        if ends_with_answer and prefixes.length(turns[-1], text, prompted=True) is None:
            prompt = prefixes.text(turns[-1], prompted=True)
            put = _behind_prompt(prompt, text, messages[-1], lambda last: render(n_turns, False, last).text)
            if put is None:
                raise _no_answer_behind(prompt, text, conversation, turns[-1], prefixes)
            self.n_remade += 1
            text, marked = put, None
        spans: list[Span] = []
        for turn in reversed(turns):
            start = prefixes.length(turn, text, prompted=True)
            is_end = turn + 1 == n_turns
            end = len(text) if is_end else prefixes.length(turn + 1, text, prompted=False)
            if start is None or end is None:
                break
            spans.append((start, end))
        return text, marked, spans[::-1]

    def _render(
        self,
        conversation: Conversation,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        *,
        add_generation_prompt: bool,
    ) -> Output:
        try:
            return self._templates[self._name(conversation)].render(
                messages, tools, self._names, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            roles = [str(message["role"]) for message in messages]
            shown = ", ".join(roles if len(roles) <= MOST_ROLES else [*roles[:MOST_ROLES], "…"])
            raise DataError(
                f"{conversation.place}: the chat template refuses the turns ({shown}): {_line(error)}"
            ) from None
        except TooMuchWork:
            # Not a bad record: each one would take as long.
            raise RecipeError(
                f"{conversation.place}: the chat template does not come to its end, or writes without measure, for a "
                "conversation of this length: a loop or repetition in it is too large; mend data.chat_template"
            ) from None


def _but_the_first(learned_L: np.ndarray) -> np.ndarray:
    learned_L[:1] = False  # nothing stands before it
    return learned_L


def _tokens_in(starts: np.ndarray, ends: np.ndarray, start: int, end: int, *, in_order: bool) -> np.ndarray:
    """The tokens with text between two characters; int64 (N,). `in_order`: no token begins or ends before another."""
    if not in_order:
        return np.flatnonzero((ends > start) & (starts < end))
    return np.arange(np.searchsorted(ends, start, side="right"), np.searchsorted(starts, end, side="left"))


def _cut_after_stop(
    inside_N: np.ndarray, stops_L: np.ndarray, text: str, ends: np.ndarray, end: int
) -> np.ndarray:
    """Leave out the blank text that a template puts between a stop token and the next turn."""
    stops = np.flatnonzero(stops_L[inside_N])
    if len(stops) and not text[ends[inside_N[stops[-1]]] : end].strip():
        return inside_N[: stops[-1] + 1]
    return inside_N


def _behind_prompt(
    prompt: str, text: str, message: Mapping[str, Any], render: Callable[[Mapping[str, Any]], str]
) -> str | None:
    """`text` with its last answer as it stands in the data, if it then stands behind its generation prompt.

    So for templates whose generation prompt begins the reasoning, and which drop the reasoning of what was said.
    """
    content = message["content"]
    if not content:
        return None
    mark = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()
    parts = render({**message, "content": mark}).split(mark)
    if len(parts) != 2:
        return None
    before, after = parts
    if not (text.startswith(before) and text.endswith(after) and len(text) >= len(before) + len(after)):
        return None
    shown = text[len(before) : len(text) - len(after)]
    for answer in (content, content.rstrip(), content.strip()):
        if answer.endswith(shown) and (before + answer).startswith(prompt):
            return before + answer + after
    return None


def _no_answer_behind(
    prompt: str, text: str, conversation: Conversation, turn: int, prefixes: Prefixes
) -> DataError:
    place, first = conversation.place, conversation.messages[0]
    same = n_shared(prompt, text)
    tag = prompt.rfind("<", 0, same)
    added = prompt[
        tag if prompt.find(">", tag, same) < 0 <= tag else same :
    ]  # not from the middle of a tag on
    try:
        is_in_prompt = same >= n_shared(prompt, prefixes.text(turn, prompted=False))
    except DataError:  # a template that refuses the turns without a generation prompt
        is_in_prompt = False
    if not is_in_prompt:
        system = (first.content or "").strip()
        if first.role == "system" and prompt.find(system) != text.find(system):
            return DataError(
                f"{place}: the chat template moves the system turn, or leaves it out, once messages[{turn}] follows, "
                "so that the model would not see at inference what it learns from; remove the system turn and begin "
                "the first question with its text, or take a template that only adds text"
            )
        return DataError(
            f"{place}: the chat template changes earlier turns: the generation prompt before messages[{turn}] is not "
            "the beginning of the whole, so that the model would not see at inference what it learns from; take a "
            "template that only adds text"
        )
    return DataError(
        f"{place}: the generation prompt of the chat template ends with {added!r}, and the content of "
        f"messages[{turn}] does not begin with it, so that the model would learn another answer than it is asked "
        f"for at inference; begin the content with {added!r} and the reasoning, even an empty one, or take a "
        "template whose generation prompt adds nothing"
    )


def _named(own: object) -> dict[str, str]:
    """The templates of a tokenizer, by name: it has one, or several as a table or a list."""
    if isinstance(own, list):
        own = {entry.get("name"): entry.get("template") for entry in own if isinstance(entry, dict)}
    texts = own if isinstance(own, dict) else {NO_TOOLS: own}
    return {name: text for name, text in texts.items() if isinstance(name, str) and isinstance(text, str)}


def _line(error: Exception) -> str:
    """What an error says, in a line."""
    said = " ".join(str(error).split()) or type(error).__name__
    short = said if len(said) <= 200 else said[:199] + "…"
    return short.encode("utf-8", "backslashreplace").decode()


def _within(marked: list[Span], turn_spans: list[Span], turns: list[int], place: str) -> list[Span]:
    """The marked spans of the turns to learn; every one of these turns must have some.

    A span belongs to the turn whose text it shares: templates that mark the newline after the header too begin
    before the turn does.
    """
    found = []
    ends = [end for _, end in marked]
    for turn, (start, end) in zip(turns, turn_spans):
        inside = []
        for span in islice(marked, bisect_left(ends, start), None):
            if span[0] >= end:
                break
            if max(start, span[0]) < min(end, span[1]):
                inside.append(span)
        if not inside:
            raise DataError(
                f"{place}: the chat template marks nothing of messages[{turn}] with {{% generation %}}, so that "
                "this answer would not be learned; mark it in the template, or remove all marks"
            )
        found += inside
    return found


def _check_tools(conversation: Conversation, n_turns: int, text: str, spans: Mapping[int, Span]) -> None:
    """Tools and calls must show in the text: a template that knows no tools drops them without a word."""
    absent = [tool["function"]["name"] for tool in conversation.tools if tool["function"]["name"] not in text]
    for turn, message in enumerate(conversation.messages[:n_turns]):
        start, end = spans.get(turn, (0, len(text)))
        absent += [call.name for call in message.tool_calls if text.find(call.name, start, end) < 0]
    if absent:
        raise DataError(
            f"{conversation.place}: the chat template leaves out the tool {cut(absent[0])}; take a template that "
            "renders tools, such as the model's own or chatml, or remove the tools"
        )
