"""What absolute scores add to a reward model: the same pairs with and without the squared-error term.

    OMP_NUM_THREADS=1 python benchmarks/reward_calibration.py [--seeds 8] [--steps 60]

The toy: a prompt of random tokens is answered by tokens of which some, more or fewer, are "good" (below 32); an
answer's true quality is its share of good tokens, from 0 to 1. Annotators choose between two answers by
Bradley-Terry with the difference of their qualities on a scale of 6, so that near ties are often the wrong way
round, and state a score from 1 to 5 with noise of 0.5. A random Llama of two layers learns 96 pairs, half of them
with scores, in one mixed batch: once by the pairs alone (alpha 0), once with alpha 0.5. Held-out pairs are ordered
by true quality. One process, fp32.

Printed for each alpha, mean and standard deviation over seeds: the share of held-out pairs ranked right by true
quality; the rank correlation of reward and quality; the expected calibration error of σ(r_w − r_l) on held-out
pairs labelled by the same annotators.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from one_rank import one_rank

from paralign.engine.batch import Column, Head, StepBatch, Unit
from paralign.engine.columns.fillers import score_values
from paralign.engine.config.model import ModelConfig
from paralign.engine.config.optimizer import OptimizerConfig
from paralign.engine.data.answers import Answer, AnswerLayout, Group, rows_of
from paralign.engine.data.pack import pack_groups
from paralign.engine.data.packing import plan_packs
from paralign.engine.objectives.reward import Reward, RewardConfig
from paralign.engine.parallel.layout import LayoutConfig, resolve
from paralign.engine.parallel.mesh import Mesh, open_mesh
from paralign.engine.training.build import random_weights
from paralign.engine.training.model import Model
from paralign.engine.training.optim import Optimizer
from paralign.engine.training.step import report, run_step
from paralign.models import arch_from_hf

N_TRAIN, N_HELD_OUT, TOKENS_PER_PACK, SCALE, NOISE = 96, 400, 512, 6.0, 0.5
CPU = torch.device("cpu")
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="A reward model with and without absolute scores.")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    arch = arch_from_hf(MODEL).with_scalar_head()
    degrees = LayoutConfig(tensor_model_parallel_size=1, pipeline_model_parallel_size=1)
    layout = resolve(degrees, arch, world_size=1, global_batch_size=1, tokens_per_pack=TOKENS_PER_PACK)
    results: dict[float, list[dict[str, float]]] = {0.0: [], 0.5: []}
    with (
        one_rank(),
        open_mesh(layout, local_rank=0, seed=0) as mesh,
    ):
        for seed in range(arguments.seeds):
            for alpha, found in results.items():
                found.append(train_and_measure(arch, mesh, alpha, seed, arguments.steps))
    print(f"{'alpha':>5}" + "".join(f"{name:>26}" for name in results[0.0][0]))
    for alpha, found in results.items():
        cells = [
            f"{np.mean([row[name] for row in found]):.3f} ± {np.std([row[name] for row in found]):.3f}"
            for name in found[0]
        ]
        print(f"{alpha:>5}" + "".join(f"{cell:>26}" for cell in cells))
    print(json.dumps({str(alpha): found for alpha, found in results.items()}))


def draw_pairs(
    n: int, draw: np.random.Generator, *, first_id: int, scored: bool
) -> tuple[list[Group], np.ndarray]:
    """Pairs labelled by annotators, and the true quality of each answer, (n, 2)."""
    groups, qualities = [], np.zeros((n, 2))
    for i in range(n):
        prompt = draw.integers(0, 64, draw.integers(4, 16))
        two = []
        for _ in range(2):
            share = draw.uniform(0, 1)
            good = draw.random(draw.integers(12, 32)) < share
            tokens = np.where(good, draw.integers(0, 32, len(good)), draw.integers(32, 64, len(good)))
            two.append((tokens, float(good.mean())))
        preference = 1 / (1 + math.exp(-SCALE * (two[0][1] - two[1][1])))
        chosen, rejected = two if draw.random() < preference else two[::-1]
        answers = []
        for k, (tokens, quality) in enumerate((chosen, rejected)):
            stated = np.clip(1 + 4 * quality + draw.normal(0, NOISE), 1, 5)
            score = (stated - 3) / 2 if scored and i % 2 else math.nan
            answers.append(
                Answer(tokens, np.ones(len(tokens), dtype=np.float32), first_id + 2 * i + k, score=score)
            )
            qualities[i, k] = quality
        groups.append(Group(prompt, tuple(answers)))
    return groups, qualities


def train_and_measure(arch: Any, mesh: Mesh, alpha: float, seed: int, steps: int) -> dict[str, float]:
    """One reward model from random weights; both values of alpha see the same data and the same start."""
    draw = np.random.default_rng(seed)
    train, _ = draw_pairs(N_TRAIN, draw, first_id=0, scored=True)
    held_out, qualities = draw_pairs(N_HELD_OUT, draw, first_id=0, scored=False)
    section = {"score_range": (1.0, 5.0)} if alpha else {}
    objective = Reward(RewardConfig(name="reward", alpha=alpha, **section))
    answer_layout = AnswerLayout(objective.needs, Head.SCALAR, share_prefix=True)
    read = random_weights(arch, seed=seed, dtype=torch.float32, device=mesh.device)
    model = Model.open(arch, mesh, ModelConfig(hf=Path(), dtype="fp32"), read)
    model.prepare_to_train()
    schedule = OptimizerConfig(lr=1e-3, lr_decay_style="constant", lr_warmup_steps=0, weight_decay=0.1)
    optimizer = Optimizer(model.chunks, schedule, mesh.layout, torch.float32)

    def packs(groups: list[Group]) -> list[Any]:
        lengths = np.array([rows_of(group, answer_layout) for group in groups])
        plan = plan_packs(lengths, TOKENS_PER_PACK, seed=seed, epoch=0)
        return [
            pack_groups([groups[i] for i in plan.pack(k)], TOKENS_PER_PACK, CPU, answer_layout)
            for k in range(len(plan))
        ]

    learned = packs(train)
    half = len(learned) // 2
    batches = [_batch(learned[:half]), _batch(learned[half:])]
    for step in range(steps):
        batch = batches[step % 2]
        optimizer.zero_grad()
        run_step(model, batch, objective, train=True)
        optimizer.step(schedule.lr)

    tested = packs(held_out)
    measured = report(objective, run_step(model, _batch(tested), objective, train=False))
    rewards = score_values(model, [tested], 2 * N_HELD_OUT).reshape(-1, 2)
    apart = np.sign(rewards[:, 0] - rewards[:, 1]) == np.sign(qualities[:, 0] - qualities[:, 1])
    return {
        "ranked right": float(apart.mean()),
        "rank correlation": _spearman(rewards.ravel(), qualities.ravel()),
        "calibration error": measured["calibration_error"],
    }


def _batch(packs: list[Any]) -> StepBatch:
    n_pairs = sum(len(pack.columns[Column.PAIR]) for pack in packs)
    return StepBatch(packs, {Unit.PAIR: n_pairs}, n_pairs, 0, ())


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


if __name__ == "__main__":
    main()
