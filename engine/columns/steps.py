"""The steps of one set of data, with every column filled."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from ..batch import PackedBatch, StepBatch
from ..data.loader import PackLoader
from .sources import Filler


@dataclass(frozen=True)
class Steps:
    """What a loader gives, and what fillers add to it. A step is a pure function of its number and the weights.

    Attributes:
        loader: of this rank.
        fillers: in the order in which they fill.
    """

    loader: PackLoader
    fillers: Sequence[Filler] = ()

    @property
    def fingerprint(self) -> str:
        """Equal fingerprints give equal samples to equal step numbers."""
        return self.loader.fingerprint

    def step(self, number: int) -> StepBatch:
        """Step `number`, from 0. Collective where a model fills a column."""
        return self._filled(self.loader.step(number))

    def in_turn(self, numbers: range) -> Generator[StepBatch]:
        """The same of several; while one is used, a thread makes the loader's part of the next. To be closed.

        On a GPU the thread's copies are queued on the stream that the step which reads them is queued on later.

        Raises:
            Exception: what the loader raised, with the step that it is of.
        """
        with ThreadPoolExecutor(1, "next step", self.loader.begin_thread) as thread:
            parts = (thread.submit(self.loader.step, number) for number in numbers)
            coming = next(parts, None)
            while coming is not None:
                batch, coming = coming.result(), next(parts, None)
                yield self._filled(batch)

    def evaluation(self) -> Iterator[StepBatch]:
        """Every sample once, the same each time."""
        return map(self._filled, self.loader.evaluation())

    def alone(self, ids: Sequence[int], batch: StepBatch, micro_batch: int, *, times: int) -> PackedBatch:
        """A pack of the given samples of a step; what says something of the whole step is taken from its pack.

        Args:
            batch: the step that they are of, filled.
            micro_batch: the pack of this rank that holds them there.
            times: micro-batches that the pipeline schedule needs at least.
        """
        pack = self.loader.pack_of(ids)
        for filler in self.fillers:
            if filler.source.of_step:
                of_step = batch.micro_batches[micro_batch].columns
                pack.columns = {**pack.columns, **{column: of_step[column] for column in filler.source.gives}}
            else:
                filler.fill(replace(batch, micro_batches=[pack] * times, mismatched=[]))
        return pack

    def _filled(self, batch: StepBatch) -> StepBatch:
        for filler in self.fillers:
            filler.fill(batch)
        return batch
