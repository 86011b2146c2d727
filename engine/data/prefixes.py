"""Whether the text of the first turns is the beginning of a longer text, for every turn, in a few renderings.

To render each beginning of a chat takes time in the square of its turns. Most templates write turn after turn in one
loop: until it asks for a turn, what it writes cannot depend on that turn, nor on later ones. What it writes where the
turns end is a function of what it carries from turn to turn. So one rendering of the whole, and one for each state
that it carries, say what any beginning renders to. Where a template looks ahead, a beginning is rendered by itself.
"""

from __future__ import annotations

from collections.abc import Callable

from paralign.models.errors import DataError

from .chat_template import Output, State

FEW = 3  # turns that are asked for: so many beginnings are rendered faster one by one

Render = Callable[[int, bool], Output]  # the first n turns, with a generation prompt or without


def n_shared(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


class Prefixes:
    """The beginnings of one conversation.

    Args:
        render: renders them.
        whole: all turns, without a generation prompt.
        n_turns: of them.
        n_asked: how many beginnings will be asked for, about.
    """

    def __init__(self, render: Render, whole: Output, n_turns: int, n_asked: int) -> None:
        self._render, self._n_turns, self._text = render, n_turns, whole.text
        self._whole: dict[bool, Output | None] = {False: whole}
        self._few = n_asked <= FEW
        self._ends: dict[tuple[bool, State], str | None] = {}
        self._common: dict[bool, tuple[str, int]] = {}
        self._texts: dict[tuple[int, bool], str] = {}  # of few turns

    def text(self, n: int, *, prompted: bool) -> str:
        """The text of the first n turns, with a generation prompt behind them or without, rendered by itself."""
        if n == self._n_turns and not prompted:
            return self._text
        if not self._few:
            return self._render(n, prompted).text
        if (n, prompted) not in self._texts:
            self._texts[n, prompted] = self._render(n, prompted).text
        return self._texts[n, prompted]

    def length(self, n: int, text: str, *, prompted: bool) -> int | None:
        """Characters of the text of the first n turns, if `text` begins with it, else None."""
        if not self._few and 0 < n < self._n_turns:
            if prompted not in self._whole:
                try:
                    self._whole[prompted] = self._render(self._n_turns, prompted)
                except DataError:  # a prompt behind the last turn, which nobody asked for
                    self._whole[prompted] = None
            whole = self._whole[prompted]
            if whole and (at := whole.looked[n]) is not None and (state := whole.states[n]) is not None:
                end = self._end(n, at, state, whole, prompted)
                if end is not None:
                    is_same = at <= self._shared(text, whole, prompted) and text.startswith(end, at)
                    return at + len(end) if is_same else None
        own = self.text(n, prompted=prompted)
        return len(own) if text.startswith(own) else None

    def _end(self, n: int, at: int, state: State, whole: Output, prompted: bool) -> str | None:
        """What is written where the turns end in this state; None if that is not known."""
        key = prompted, state
        if key not in self._ends:
            own = self._render(n, prompted)
            # The loop that comes to its end here is the one that came to the end of all.
            is_end = own.looked[n] == at and own.states[n] == state and own.text.startswith(whole.text[:at])
            self._ends[key] = own.text[at:] if is_end and whole.states[-1] is not None else None
        return self._ends[key]

    def _shared(self, text: str, whole: Output, prompted: bool) -> int:
        """How far a text is that of the whole rendering."""
        if self._common.get(prompted, ("", 0))[0] is not text:
            same = len(whole.text) if text.startswith(whole.text) else n_shared(text, whole.text)
            self._common[prompted] = text, same
        return self._common[prompted][1]
