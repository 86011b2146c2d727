"""From a conversation to tokens and the set of them that is learned: chat templates and loss masks.

The whole conversation is rendered and tokenised once, as it is at inference; what is to be learned is found
in the text and carried over by the tokens' offsets. Tokenising turn by turn instead would forbid merges
across a boundary (a newline of the template with one of the content) that a served model sees in its history.

Shape suffix: L tokens of a sample.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from paralign.models.errors import DataError

from .config import ChatTemplate, LossOn
from .conversation import Conversation
from .tokenizer import open_tokenizer

_OURS = Path(__file__).parent / "templates"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

Span = tuple[int, int]  # first character, end


class Rendered(NamedTuple):
    """Tokens int32 (L,), and bool (L,) where they are to be predicted; never the first one."""

    tokens: np.ndarray
    learned: np.ndarray


def template_text(chat_template: ChatTemplate) -> str | None:
    """The jinja text of a template of ours or of a file; None for the tokenizer's own."""
    if chat_template == "tokenizer":
        return None
    ours = _OURS / f"{chat_template}.jinja"
    path = ours if ours.is_file() else Path(chat_template)
    if path.is_file():
        return path.read_text(encoding="utf-8")
    names = ["tokenizer", *sorted(file.stem for file in _OURS.glob("*.jinja"))]
    close = get_close_matches(str(chat_template), names, n=1)
    raise DataError(
        f"chat_template {chat_template}: no such file; expected {', '.join(names)} or a jinja file"
        + (f"; did you mean {close[0]}?" if close else "")
    )


class Renderer:
    """Renders and tokenises conversations with one tokenizer and one template.

    Args:
        tokenizer_dir: a Hugging Face directory with a fast tokenizer.
        template: jinja text; None takes the tokenizer's own.
        loss_on: see `DataConfig`.

    Raises:
        WeightsError: no fast tokenizer in the directory.
        DataError: no template.
    """

    def __init__(self, tokenizer_dir: Path, template: str | None, loss_on: LossOn) -> None:
        self.tokenizer = open_tokenizer(tokenizer_dir)
        self._backend: Any = self.tokenizer.backend_tokenizer
        self._backend.no_truncation()  # a limit kept in tokenizer.json would cut samples in silence
        self._backend.no_padding()
        if template is None and not self.tokenizer.chat_template:
            raise DataError(
                f"{tokenizer_dir}: no chat template; set chat_template: llama3, chatml, baichuan2 or a file"
            )
        self._template = template if template is not None else self.tokenizer.get_chat_template()
        self._marks_generation = _GENERATION.search(self._template) is not None
        self._loss_on = loss_on
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        self._only_bos = [] if bos is None or bos == eos else [bos]
        special = [id_ for id_, token in self.tokenizer.added_tokens_decoder.items() if token.special]
        self._stops = np.setdiff1d(special + ([] if eos is None else [eos]), self._only_bos)

    def __call__(self, conversation: Conversation) -> Rendered:
        """Tokens and learned tokens of one conversation.

        A token is learned if any of its text lies in an assistant turn or is the token that stops it.

        Raises:
            DataError: the template refuses the conversation or passes over its tools; it renders a turn
                differently once another follows, so that what the model would see at inference is not what
                it would learn from; it marks some assistant turns with `{% generation %}`, and not this one.
        """
        place = conversation.place
        text, marked = self._render(
            conversation, len(conversation.messages), return_assistant_tokens_mask=self._marks_generation
        )
        encoding = self._backend.encode(text, add_special_tokens=False)  # the template writes BOS itself
        tokens_L = np.array(encoding.ids, dtype=np.int32)
        turns = self._turns_to_learn(conversation)
        turn_spans = [self._turn_span(conversation, turn, text) for turn in turns]
        _check_tools(conversation, text, dict(zip(turns, turn_spans)))
        if self._loss_on == "all":
            learned_L = ~np.isin(tokens_L, self._only_bos)
        else:
            learned_L = np.zeros(len(tokens_L), dtype=bool)
            flat = np.fromiter(chain.from_iterable(encoding.offsets), np.int64, 2 * len(tokens_L))
            starts, ends = flat[::2], flat[1::2]
            spans = turn_spans if marked is None else _within(marked, turn_spans, turns, place)
            first = turn_spans[0][0] if turn_spans and conversation.n_context else 0
            for start, end in spans:
                start = max(start, first)  # a mark that begins before a completion stops at its prompt
                inside = (ends > start) & (starts < end)
                if marked is None:
                    self._cut_after_stop(inside, tokens_L, text, ends, end)
                learned_L |= inside
        learned_L[:1] = False  # nothing stands before it
        return Rendered(tokens_L, learned_L)

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

    def _render(
        self, conversation: Conversation, n_turns: int, **options: bool
    ) -> tuple[str, list[Span] | None]:
        """The text of the first turns, and the spans of it marked `{% generation %}` if these are asked for."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                conversations=[[message.for_template() for message in conversation.messages[:n_turns]]],
                tools=list(conversation.tools) or None,
                chat_template=self._template,
                **options,
                **self.tokenizer.special_tokens_map,
            )
        except (TemplateError, TypeError) as error:
            roles = ", ".join(message.role for message in conversation.messages[:n_turns])
            raise DataError(
                f"{conversation.place}: the chat template refuses the turns ({roles}): {error}"
            ) from None
        return texts[0], spans[0] if spans else None

    def _turn_span(self, conversation: Conversation, turn: int, text: str) -> Span:
        """From the end of the generation prompt of an assistant turn to the end of the turn.

        Found by rendering the turns before it with a generation prompt, and the turns up to it.
        """
        before, _ = self._render(conversation, turn, add_generation_prompt=True)
        upto = text
        if turn + 1 < len(conversation.messages):
            upto, _ = self._render(conversation, turn + 1)
        for prefix in (before, upto):
            if not text.startswith(prefix):
                raise DataError(
                    f"{conversation.place}: the chat template changes earlier turns: the text up to "
                    f"messages[{turn}] is not the beginning of the whole, so that the model would not see at "
                    "inference what it learns from; take a template that only adds text, split the "
                    "conversation, or set loss_on: last"
                )
        return len(before), len(upto)

    def _cut_after_stop(
        self, inside: np.ndarray, tokens_L: np.ndarray, text: str, ends: np.ndarray, end: int
    ) -> None:
        """Leave out the blank text that a template puts between a stop token and the next turn."""
        stops = np.flatnonzero(inside & np.isin(tokens_L, self._stops))
        if len(stops) and not text[ends[stops[-1]] : end].strip():
            inside[stops[-1] + 1 :] = False


def _within(marked: list[Span], turn_spans: list[Span], turns: list[int], place: str) -> list[Span]:
    """The marked spans of the turns to learn; every one of these turns must have some.

    A span belongs to the turn whose text it shares: templates that mark the newline after the header too begin
    before the turn does.
    """
    found = []
    for turn, (start, end) in zip(turns, turn_spans):
        inside = [span for span in marked if max(start, span[0]) < min(end, span[1])]
        if not inside:
            raise DataError(
                f"{place}: the chat template marks nothing of messages[{turn}] with {{% generation %}}, so that "
                "this answer would not be learned; mark it in the template, or remove all marks"
            )
        found += inside
    return found


def _check_tools(conversation: Conversation, text: str, spans: Mapping[int, Span]) -> None:
    """Tools and calls must show in the text: a template that knows no tools drops them without a word."""
    absent = [tool["function"]["name"] for tool in conversation.tools if tool["function"]["name"] not in text]
    for turn, message in enumerate(conversation.messages):
        start, end = spans.get(turn, (0, len(text)))
        absent += [call.name for call in message.tool_calls if call.name not in text[start:end]]
    if absent:
        raise DataError(
            f"{conversation.place}: the chat template leaves out the tool {absent[0]}; take a template that "
            "renders tools, such as the model's own or chatml, or remove the tools"
        )
