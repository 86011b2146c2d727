"""The rows of both certificates: few, and any two settings of any two factors meet in one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

Setting = tuple[str, str]  # a factor, and what it is in a row
Array = dict[str, str]

LAYOUT: dict[str, dict[str, dict[str, Any]]] = {
    "tensor": {
        "TP1": {"tensor_model_parallel_size": 1},
        "TP2": {"tensor_model_parallel_size": 2},
        "TP2+SP": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    },
    "pipeline": {
        "PP1": {"pipeline_model_parallel_size": 1},
        "PP2": {"pipeline_model_parallel_size": 2},
        "PP2×VPP2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
        "PP4 uneven": {
            "pipeline_model_parallel_size": 4,
            "num_layers_in_first_pipeline_stage": 1,
            "num_layers_in_last_pipeline_stage": 3,
        },
    },
    "data": {"DP1": {}, "DP2": {}},
    "overlap": {"": {}, "overlap": {"overlap_grad_reduce": True, "overlap_param_gather": True}},
}
MODEL: dict[str, dict[str, dict[str, Any]]] = {
    "recompute": {
        "": {},
        "recompute 2": {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 2,
        },
    }
}
NONE = "—"  # of a factor that says nothing of this objective
FACTORS: dict[str, Sequence[str]] = {
    **{factor: list(settings) for factor, settings in (LAYOUT | MODEL).items()},
    "family": ["llama", "qwen2", "qwen3", "mistral", "baichuan2-7b", "baichuan2-13b"],
    "objective": ["sft", "reward", "dpo", "simpo", "orpo", "cpo", "kto"],
    "kernels": ["", "fused"],
    "packing": ["many packs", "few packs"],
    "split": ["in order", "interleaved", NONE],  # into micro-batches
    "prefix": ["shared", "unshared", NONE],  # a prompt, by its answers
}
MOST_RANKS = 8


def world_size(row: Mapping[str, str]) -> int:
    size = 1
    for factor, degree in (("tensor", "TP"), ("pipeline", "PP"), ("data", "DP")):
        size *= int(row[factor].removeprefix(degree)[0])
    return size


def allowed(row: Mapping[str, str]) -> bool:
    """TRL's losses have references of two families, of four layers: too few for uneven stages.

    Layers that are recomputed by two have to be an even number in each chunk of the model.
    """
    odd = ("PP4 uneven",) if row["objective"] == "sft" else ("PP2×VPP2",)
    if world_size(row) > MOST_RANKS or (row["recompute"] and row["pipeline"] in odd):
        return False
    if row["objective"] != "sft" and row["kernels"]:  # losses take what the head gives, whoever computes it
        return False
    if row["objective"] == "sft":
        return row["split"] != NONE and row["prefix"] == NONE
    return (
        row["split"] == NONE
        and row["prefix"] != NONE
        and row["family"] in ("llama", "qwen2")
        and row["pipeline"] != "PP4 uneven"
    )


def every_row(factors: Mapping[str, Sequence[str]], allowed: Callable[[Array], bool]) -> list[Array]:
    rows = (dict(zip(factors, settings)) for settings in product(*factors.values()))
    return [row for row in rows if allowed(row)]


def pairs_of(row: Array) -> list[tuple[Setting, Setting]]:
    return list(combinations(row.items(), 2))


def covering(rows: Sequence[Array], cost: Callable[[Array], float]) -> list[Array]:
    """Some of `rows`: every pair of settings that is in any of them is in one of those.

    Greedily, the row that holds most of what has not met yet, less its cost; of those the first.
    """
    bit: dict[tuple[Setting, Setting], int] = {}
    held = [sum(1 << bit.setdefault(pair, len(bit)) for pair in pairs_of(row)) for row in rows]
    costs = [cost(row) for row in rows]
    missing, chosen = (1 << len(bit)) - 1, []
    while missing:
        useful = (i for i in range(len(rows)) if held[i] & missing)
        best = max(useful, key=lambda i: (held[i] & missing).bit_count() - costs[i])
        chosen.append(rows[best])
        missing &= ~held[best]
    return chosen


EVERY_ROW = every_row(FACTORS, allowed)
# One on all ranks takes as long as several others: a little less of what is new will do.
ROWS = covering(EVERY_ROW, lambda row: world_size(row) == MOST_RANKS)


def rows_to_certify(*, sft: bool) -> list[Array]:
    return [row for row in ROWS if (row["objective"] == "sft") == sft]


def name_of(row: Mapping[str, str]) -> str:
    """Without what is nothing out of the ordinary."""
    return " ".join(setting for setting in row.values() if setting not in ("", NONE, "TP1", "PP1", "DP1"))


def layout_of(row: Mapping[str, str]) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """World size, keys of `layout:` and of `model:`."""
    keys, model = (
        {key: value for factor, of in factors.items() for key, value in of[row[factor]].items()}
        for factors in (LAYOUT, MODEL)
    )
    return world_size(row), keys, model
