"""Who gives which column of a pack, and in which order. data/pack.py and fillers.py fill them."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Protocol

from paralign.models.errors import RecipeError

from ..batch import Column, Kind, StepBatch


@dataclass(frozen=True)
class Source:
    """Something that gives columns: the data, or what is computed of a step before its schedule runs.

    Attributes:
        name: in errors.
        needs: columns that must be there before.
        gives: columns of every pack of the step, those of mismatched answers too.
        of_step: they say something of the whole step, which a pack alone does not have.
    """

    name: str
    gives: frozenset[Column]
    needs: frozenset[Column] = frozenset()
    of_step: bool = False


_OF_ALL = frozenset({Column.ANSWER, Column.ANSWERS})
# What packs have, as data/pack.py makes them. Packs of several sources have SOURCE too: whoever reads it does
# without where it is not.
DATA = {
    Kind.CONVERSATIONS: Source("the data, conversations,", gives=_OF_ALL),
    Kind.PAIRS: Source(
        "the data, pairs,",
        gives=_OF_ALL | {Column.PAIR, Column.MARGIN, Column.SCORE, Column.IN_ANSWER},
    ),
    Kind.LABELLED: Source(
        "the data, labelled answers,", gives=_OF_ALL | {Column.DESIRABLE, Column.IN_ANSWER}
    ),
}
REFERENCE = Source("the reference model", gives=frozenset({Column.REF_LOGPROB}))
BASELINE = Source(
    "the policy's baseline",
    gives=frozenset({Column.BASELINE}),
    needs=frozenset({Column.REF_LOGPROB}),
    of_step=True,
)


class Filler(Protocol):
    """Fills what its source gives."""

    source: Source

    def fill(self, batch: StepBatch) -> None:
        """Adds columns to this rank's packs of a step. Collective."""


def in_order(needs: Set[Column], data: Source, others: Sequence[Source]) -> list[Source]:
    """Those of `others` that `needs` calls for, each behind those whose columns it reads.

    Args:
        data: gives its columns to every pack.

    Raises:
        RecipeError: a column that nothing gives, or two sources give; sources that wait for each other.
    """
    sources = [data, *others]
    for column in Column:
        givers = [source.name for source in sources if column in source.gives]
        if len(givers) > 1:
            raise RecipeError(
                f"objective: column {column.value} is given by {' and by '.join(givers)}; keep one"
            )
    ordered: list[Source] = []

    def ask(column: Column, asking: tuple[str, ...]) -> None:
        giver = next((source for source in sources if column in source.gives), None)
        if giver is None:
            given = ", ".join(sorted(c.value for source in sources for c in source.gives))
            raise RecipeError(
                f"objective: {asking[-1]} needs column {column.value}, which nothing gives; there are {given}"
            )
        if giver.name in asking:
            raise RecipeError(f"objective: {' needs '.join([*asking, giver.name])}; break the circle")
        if giver is data or giver in ordered:
            return
        for needed in sorted(giver.needs, key=lambda c: c.value):
            ask(needed, (*asking, giver.name))
        ordered.append(giver)

    for column in sorted(needs, key=lambda c: c.value):
        ask(column, ("the objective",))
    return ordered
