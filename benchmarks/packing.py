"""Times our packer beside TRL's on the same lengths.

    python benchmarks/packing.py [--samples 100000 1000000] [--repeats 5]

Needs `pip install -e .[bench]`. Lengths are log-normal, median 350, sigma 1.1, clipped to 16–8192, seed 0;
packs have 8192 rows. No sample is longer than a pack, so neither packer drops, cuts or wraps any: TRL's bfd
would cut longer ones, and its "wrapped", which joins and splits samples, is left out. Tokens are one byte
each, to keep copies small:

    ours, plan            `plan_packs`: which sample is in which pack, which is all that training needs
    ours, plan and copy   and the tokens of every pack side by side, as TRL makes them
    TRL, batches of 1000  `pack_dataset(strategy="bfd")` as it comes: a sample can only meet its own batch
    TRL, whole data set   the same with `batch_size=None`

Prints a table, then one line of JSON. Seconds are medians, all in one process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import trl
from trl.data_utils import pack_dataset

from paralign.engine.data.packing import plan_packs

TOKENS_PER_PACK = 8192


@dataclass(frozen=True)
class Row:
    """One packer on one number of samples; utilisation is real tokens by rows of packs."""

    samples: int
    packer: str
    packs: int
    utilisation: float
    seconds: float
    times_ours: float


def main() -> None:
    parser = argparse.ArgumentParser(description="Our packer beside TRL's.")
    parser.add_argument("--samples", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    datasets.disable_caching()
    rows = [row for n_samples in arguments.samples for row in compare(n_samples, arguments.repeats)]
    print(f"{'samples':>9}  {'packer':<22}{'packs':>8}{'utilisation':>13}{'seconds':>10}{'x ours':>9}")
    for row in rows:
        print(
            f"{row.samples:>9}  {row.packer:<22}{row.packs:>8}{row.utilisation:>13.4%}"
            f"{row.seconds:>10.3f}{row.times_ours:>9.1f}"
        )
    print(json.dumps({"trl": trl.__version__, "rows": [asdict(row) for row in rows]}))


def compare(n_samples: int, repeats: int) -> list[Row]:
    """Every packer on the same lengths; ratios are to our plan with its copy, which does what TRL does."""
    draw = np.random.default_rng(0)
    lengths = np.clip(draw.lognormal(np.log(350), 1.1, n_samples), 16, TOKENS_PER_PACK).astype(np.int64)
    ends = np.cumsum(lengths)
    tokens = np.zeros(ends[-1], dtype=np.uint8)
    offsets = np.concatenate(([0], ends)).astype(np.int32)
    column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(tokens))
    dataset = datasets.Dataset(pa.table({"input_ids": column}))

    def plan() -> int:
        return len(plan_packs(lengths, TOKENS_PER_PACK, seed=0, epoch=0))

    def plan_and_copy() -> int:
        packs = plan_packs(lengths, TOKENS_PER_PACK, seed=0, epoch=0)
        copied = [
            np.concatenate([tokens[offsets[i] : offsets[i + 1]] for i in packs.pack(k)])
            for k in range(len(packs))
        ]
        assert sum(map(len, copied)) == len(tokens)
        return len(packs)

    def peer(batch_size: int | None) -> int:
        options = {"batch_size": batch_size, "keep_in_memory": True}
        packed = pack_dataset(dataset, TOKENS_PER_PACK, strategy="bfd", map_kwargs=options)
        assert pc.sum(pc.list_value_length(packed.data.column("input_ids"))).as_py() == len(tokens)
        return len(packed)

    packers: dict[str, Callable[[], int]] = {
        "ours, plan": plan,
        "ours, plan and copy": plan_and_copy,
        "TRL, batches of 1000": lambda: peer(1000),
        "TRL, whole data set": lambda: peer(None),
    }
    measured = {name: measure(packer, repeats) for name, packer in packers.items()}
    ours = measured["ours, plan and copy"][1]
    return [
        Row(n_samples, name, packs, len(tokens) / (packs * TOKENS_PER_PACK), seconds, seconds / ours)
        for name, (packs, seconds) in measured.items()
    ]


def measure(packer: Callable[[], int], repeats: int) -> tuple[int, float]:
    """The number of packs and the median of the seconds, after one run to warm up."""
    packs = packer()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        packer()
        seconds.append(time.perf_counter() - start)
    return packs, statistics.median(seconds)


if __name__ == "__main__":
    main()
