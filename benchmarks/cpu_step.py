"""Times our training step beside Hugging Face's Trainer: one process, same model, same packs, same optimizer.

    python benchmarks/cpu_step.py [--rounds 5] [--threads 2]

Both train a random Llama of 9.6 M parameters in fp32 on packs of 1024 tokens whose samples are isolated: ours by
segments, transformers' by positions that restart, from which it builds a block-diagonal mask for its
scaled-dot-product attention. Half of each sample is learned. Rounds alternate, so that a machine that slows
down slows both; the ratio is the median over rounds. Losses of the first step are printed beside each other.

Prints a table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from one_rank import one_rank

from paralign.engine.batch import StepBatch, Unit
from paralign.engine.config.model import ModelConfig
from paralign.engine.config.optimizer import OptimizerConfig
from paralign.engine.data.pack import pack_chats
from paralign.engine.data.packing import plan_packs
from paralign.engine.objectives import SFT
from paralign.engine.parallel.layout import LayoutConfig, resolve
from paralign.engine.parallel.mesh import open_mesh
from paralign.engine.training.model import Model
from paralign.engine.training.optim import Optimizer
from paralign.engine.training.step import report, run_step
from paralign.models import arch_from_hf

TOKENS_PER_PACK, PACKS_PER_STEP, STEPS_PER_ROUND = 1024, 4, 3
LR, BETAS, EPS, WEIGHT_DECAY = 1e-4, (0.9, 0.95), 1e-8, 0.1


@dataclass
class Timed:
    """One trainer's seconds for each step, and its first loss."""

    seconds: list[float] = field(default_factory=list)
    first_loss: float = float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description="Our step beside Hugging Face's Trainer.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)

    packs = make_packs()
    real = sum(len(tokens) for pack in packs for tokens, _ in pack)
    ours, theirs = Timed(), Timed()
    ratios = []
    with our_trainer(packs, ours) as train_ours:
        train_theirs = their_trainer(packs, theirs)
        for _ in range(arguments.rounds + 1):
            before = len(ours.seconds), len(theirs.seconds)
            train_ours()
            train_theirs()
            ratios.append(
                statistics.median(theirs.seconds[before[1] :]) / statistics.median(ours.seconds[before[0] :])
            )
    ratios = ratios[1:]  # the first round warms up
    skip = STEPS_PER_ROUND
    speeds = {
        "paralign": real / statistics.median(ours.seconds[skip:]),
        "transformers Trainer": real / statistics.median(theirs.seconds[skip:]),
    }
    print(f"{'trainer':<22}{'tokens/s':>10}{'first loss':>12}")
    for (name, speed), timed in zip(speeds.items(), (ours, theirs)):
        print(f"{name:<22}{speed:>10,.0f}{timed.first_loss:>12.6f}")
    ratio = statistics.median(ratios)
    print(f"ours is {ratio:.2f}× as fast ({min(ratios):.2f}–{max(ratios):.2f} over {len(ratios)} rounds)")
    print(
        json.dumps(
            {
                "tokens_per_second": {name: round(speed) for name, speed in speeds.items()},
                "ratio_median": round(ratio, 3),
                "ratio_min": round(min(ratios), 3),
                "ratio_max": round(max(ratios), 3),
                "first_loss": {"paralign": ours.first_loss, "transformers": theirs.first_loss},
                "threads": arguments.threads,
                "torch": torch.__version__,
            }
        )
    )


def make_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8192,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=TOKENS_PER_PACK,
            tie_word_embeddings=False,
        )
    )


def make_packs() -> list[list[tuple[list[int], list[bool]]]]:
    """The packs of one step, repeated in all: log-normal lengths, the second half of each sample learned."""
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(np.log(120), 0.8, 200), 8, TOKENS_PER_PACK).astype(np.int64)
    plan = plan_packs(lengths, TOKENS_PER_PACK, seed=0, epoch=0)
    return [
        [
            (
                generator.integers(0, 8192, lengths[i]).tolist(),
                (np.arange(lengths[i]) >= lengths[i] // 2).tolist(),
            )
            for i in plan.pack(p)
        ]
        for p in range(PACKS_PER_STEP)
    ]


class our_trainer:
    """Paralign in this process: the same schedule, data parallelism and optimizer as on a cluster."""

    def __init__(self, packs: list[list[tuple[list[int], list[bool]]]], timed: Timed) -> None:
        self.packs, self.timed = packs, timed

    def __enter__(self) -> Any:
        self.world = one_rank()
        self.world.__enter__()
        theirs = make_model()
        arch = arch_from_hf(theirs.config.to_dict() | {"architectures": ["LlamaForCausalLM"]})
        layout = resolve(
            LayoutConfig(tensor_model_parallel_size=1, pipeline_model_parallel_size=1),
            arch,
            world_size=1,
            global_batch_size=PACKS_PER_STEP,
            tokens_per_pack=TOKENS_PER_PACK,
        )
        self.opened = open_mesh(layout, local_rank=0, seed=0)
        mesh = self.opened.__enter__()
        section = ModelConfig(hf=Path(), dtype="fp32")
        model = Model.open(arch, mesh, section, theirs.state_dict().__getitem__)
        model.prepare_to_train()
        settings = OptimizerConfig(
            lr=LR,
            lr_decay_style="constant",
            weight_decay=WEIGHT_DECAY,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            adam_eps=EPS,
        )
        optimizer = Optimizer(model.chunks, settings, layout, torch.float32)
        objective = SFT()
        learned = sum(sum(mask[1:]) for pack in self.packs for _, mask in pack)

        def train() -> None:
            for _ in range(STEPS_PER_ROUND):
                began = time.perf_counter()
                batch = StepBatch(
                    [pack_chats(pack, TOKENS_PER_PACK, mesh.device) for pack in self.packs],
                    {Unit.TOKEN: learned},
                    n_samples=sum(map(len, self.packs)),
                    n_tokens=0,
                    sample_ids=(),
                )
                optimizer.zero_grad()
                sums = run_step(model, batch, objective, train=True)
                optimizer.step(LR)
                self.timed.seconds.append(time.perf_counter() - began)
                if len(self.timed.seconds) == 1:
                    self.timed.first_loss = report(objective, sums)["loss"]

        return train

    def __exit__(self, *error: object) -> None:
        self.opened.__exit__(*error)
        self.world.__exit__(*error)


def their_trainer(packs: list[list[tuple[list[int], list[bool]]]], timed: Timed) -> Any:
    """transformers' Trainer: a pack a micro-batch, accumulated, the loss over all loss tokens of the step."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    rows = []
    for pack in packs:
        tokens = [token for sample, _ in pack for token in sample]
        positions = [i for sample, _ in pack for i in range(len(sample))]
        labels = [
            token if learned and i > 0 else -100
            for sample, mask in pack
            for i, (token, learned) in enumerate(zip(sample, mask))
        ]
        rows.append({"input_ids": tokens, "position_ids": positions, "labels": labels})

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            timed.seconds.append(time.perf_counter() - self.began)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs and timed.first_loss != timed.first_loss:
                timed.first_loss = logs["loss"]

    model = make_model()

    def train() -> None:
        with tempfile.TemporaryDirectory() as directory:
            trainer = Trainer(
                model=model,
                args=TrainingArguments(
                    output_dir=directory,
                    per_device_train_batch_size=1,
                    gradient_accumulation_steps=PACKS_PER_STEP,
                    max_steps=STEPS_PER_ROUND,
                    learning_rate=LR,
                    lr_scheduler_type="constant",
                    adam_beta1=BETAS[0],
                    adam_beta2=BETAS[1],
                    weight_decay=WEIGHT_DECAY,
                    logging_steps=1,
                    save_strategy="no",
                    report_to=[],
                    disable_tqdm=True,
                    use_cpu=True,
                    remove_unused_columns=False,
                    dataloader_pin_memory=False,
                ),
                train_dataset=rows,  # type: ignore[arg-type]
                data_collator=lambda batch: {k: torch.tensor([row[k] for row in batch]) for k in batch[0]},
                callbacks=[Clock()],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()

    return train


if __name__ == "__main__":
    main()
