"""From a conversation to tokens and the set of them that is learned. Owns chat templates and loss masks.

The whole conversation is rendered and tokenised once, as it is at inference; what is to be learned is found
in the text and carried over by the tokens' offsets. Tokenising turn by turn instead would forbid merges
across a boundary (a newline of the template with one of the content) that a served model sees in its history.

Shape suffix: L tokens of a sample.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from paralign.models.errors import DataError, WeightsError

from .config import ChatTemplate, LossOn
from .conversation import Conversation

if TYPE_CHECKING:  # transformers costs seconds; `check` must start at once
    from transformers import PreTrainedTokenizerFast

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
        self.tokenizer = _open_tokenizer(tokenizer_dir)
        self._backend: Any = self.tokenizer.backend_tokenizer
        self._backend.no_truncation()  # a limit kept in tokenizer.json would cut samples in silence
        self._backend.no_padding()
        if template is None and not self.tokenizer.chat_template:
            raise DataError(f"{tokenizer_dir}: no chat template; set chat_template: llama3, chatml or a file")
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
            DataError: the template refuses the conversation, or renders a turn differently once another
                follows, so that what the model would see at inference is not what it would learn from.
        """
        messages = [{"role": m.role, "content": m.content} for m in conversation.messages]
        text, marked = self._render(messages, conversation.place)
        encoding = self._backend.encode(text, add_special_tokens=False)  # the template writes BOS itself
        tokens_L = np.array(encoding.ids, dtype=np.int32)
        if self._loss_on == "all":
            learned_L = ~np.isin(tokens_L, self._only_bos)
        else:
            learned_L = np.zeros(len(tokens_L), dtype=bool)
            starts, ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
            spans = marked if marked is not None else self._turn_spans(messages, text, conversation.place)
            for start, end in spans[-1:] if self._loss_on == "last" else spans:
                inside = (ends > start) & (starts < end)
                if marked is None:
                    self._cut_after_stop(inside, tokens_L, text, ends, end)
                learned_L |= inside
        learned_L[:1] = False  # nothing stands before it
        return Rendered(tokens_L, learned_L)

    def learns_to_stop(self, sample: Rendered) -> bool:
        """Whether the sample teaches some special token, as the one that ends a turn is."""
        return bool(np.isin(sample.tokens[sample.learned], self._stops).any())

    def _render(
        self, messages: list[dict[str, str]], place: str, *, prompt: bool = False
    ) -> tuple[str, list[Span] | None]:
        """The text, and the spans marked `{% generation %}` if the template marks any."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                conversations=[messages],
                chat_template=self._template,
                return_assistant_tokens_mask=self._marks_generation,
                add_generation_prompt=prompt,
                **self.tokenizer.special_tokens_map,
            )
        except (TemplateError, TypeError) as error:
            roles = ", ".join(m["role"] for m in messages)
            raise DataError(f"{place}: the chat template refuses the turns ({roles}): {error}") from None
        return texts[0], spans[0] if self._marks_generation else None

    def _turn_spans(self, messages: list[dict[str, str]], text: str, place: str) -> list[Span]:
        """For each assistant turn: from the end of its generation prompt to the end of the turn.

        Found by rendering the turns before it with a generation prompt, and the turns up to it.
        """
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        spans = []
        for i in turns[-1:] if self._loss_on == "last" else turns:
            before, _ = self._render(messages[:i], place, prompt=True)
            upto, _ = self._render(messages[: i + 1], place)
            for prefix in (before, upto):
                if not text.startswith(prefix):
                    raise DataError(
                        f"{place}: the chat template changes earlier turns: the text up to messages[{i}] is "
                        "not the beginning of the whole; mark assistant turns with {% generation %} in the "
                        "template, split the conversation, or set loss_on: last"
                    )
            spans.append((len(before), len(upto)))
        return spans

    def _cut_after_stop(
        self, inside: np.ndarray, tokens_L: np.ndarray, text: str, ends: np.ndarray, end: int
    ) -> None:
        """Leave out the blank text that a template puts between a stop token and the next turn."""
        stops = np.flatnonzero(inside & np.isin(tokens_L, self._stops))
        if len(stops) and not text[ends[stops[-1]] : end].strip():
            inside[stops[-1] + 1 :] = False


def _open_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    if not directory.is_dir():
        raise WeightsError(f"{directory}: no such directory; expected one with a tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise WeightsError(f"{directory}: no tokenizer can be opened: {error}") from error
    if not tokenizer.is_fast:
        raise WeightsError(
            f"{directory}: {type(tokenizer).__name__} has no tokenizer.json, which places each token in the "
            "text; convert it to a fast tokenizer"
        )
    return tokenizer
