"""A toy to train for real in tests: a directory with tokenizer, model, chats and preferences, and a recipe for it."""

from __future__ import annotations

import json
import os
import random
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import yaml

from paralign.engine.checkpoint import store
from paralign.engine.checkpoint.manifest import MANIFEST
from paralign.engine.observe.metrics import read_metrics
from paralign.engine.processes.stop import Stop
from paralign.engine.run.check import check
from paralign.engine.run.rank import train
from paralign.engine.run.recipe import load

from ..tiny import write_tokenizer
from .reference import tiny_model

WORDS = ["red", "green", "blue", "one", "two", "three", "sun", "moon", "star", "tree", "bird", "fish"]


def make_toy(directory: Path, *, family: str = "llama", n_chats: int = 120) -> None:
    """Write `model/` (tokenizer and random weights) and `chats.jsonl`."""
    marks = ["<|im_start|>", "<|im_end|>"]
    tiny_model(family, layers=4).save_pretrained(directory / "model")
    write_tokenizer(
        directory / "model",
        ["<|pad|>", *marks, "[UNK]", "user", "assistant", "system", *WORDS],
        marks=marks,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        unk_token="[UNK]",
    )
    generator = random.Random(5)
    with (directory / "chats.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(n_chats):
            question = " ".join(generator.choices(WORDS, k=generator.randint(1, 20)))
            answer = " ".join(reversed(question.split()))
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")


def make_preferences(directory: Path) -> None:
    """Write `pairs.jsonl` for DPO and the reward model, and the same answers as `labelled.jsonl` for KTO."""
    draw = random.Random(4)
    pairs, labelled = [], []
    for i in range(60):
        words = draw.choices(WORDS, k=draw.randint(2, 12))
        question, better, worse = " ".join(words), " ".join(sorted(words)), " ".join(words[: i % 3 + 1])
        pair: dict[str, Any] = {"prompt": question, "chosen": better, "rejected": f"{worse} sun"}
        if i % 2:
            pair |= {"chosen_score": draw.randint(3, 5), "rejected_score": draw.randint(1, 3)}
        pairs.append(pair)
        labelled += [
            {"prompt": question, "completion": pair["chosen"], "label": True},
            {"prompt": question, "completion": pair["rejected"], "label": False},
        ]
    for name, records in (("pairs", pairs), ("labelled", labelled)):
        text = "".join(json.dumps(record) + "\n" for record in records)
        (directory / f"{name}.jsonl").write_text(text)


def write_recipe(directory: Path, name: str, layout: dict[str, Any], **changes: Any) -> Path:
    """A recipe for the toy; `changes` are dotted keys with `__` for the dot, or whole sections."""
    recipe: dict[str, Any] = {
        "objective": "sft",
        "run_dir": str(directory / name),
        "model": {"hf": str(directory / "model"), "dtype": "fp32"},
        "layout": {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1} | layout,
        "data": {
            "train": str(directory / "chats.jsonl"),
            "validation": {"same": str(directory / "chats.jsonl")},
            "chat_template": "chatml",
            "tokens_per_pack": 96,
            "too_long": "error",
            "cache_dir": str(directory / "cache"),
            "workers": 1,
        },
        "optimizer": {"lr": 1e-3, "lr_decay_style": "cosine", "lr_warmup_steps": 2, "weight_decay": 0.1},
        "train": {"global_batch_size": 8, "max_steps": 10, "seed": 3, "eval_every_steps": 5},
        "checkpoint": {"save_every_steps": 5},
    }
    for key, value in changes.items():
        section, _, leaf = key.partition("__")
        if leaf:
            recipe.setdefault(section, {})[leaf] = value
        else:
            recipe[section] = value
    path = directory / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def train_recipe(rank: int, world_size: int, path: Path, stop_before: int | None = None) -> None:
    """Train as one rank of the pool; with `stop_before`, the process dies at that step, as by kill −9."""
    report = check(load(path), world_size)
    if stop_before is not None:
        from paralign.engine.run.trainer import Trainer

        untouched = Trainer.train_step

        def die_at(self: Trainer, step: int, batch: Any) -> dict[str, float]:
            if step == stop_before:
                self.checkpoints.finish()  # a loaded machine may not have come to the end of one in the background
                os._exit(9)
            return untouched(self, step, batch)

        Trainer.train_step = die_at  # type: ignore[method-assign]
    train(report, Stop(), local_rank=rank)


def train_and_tell(rank: int, world_size: int, recipe: Path) -> str:
    """What the rank prints meanwhile, without frames and spaces."""
    with redirect_stdout(StringIO()) as said:
        train_recipe(rank, world_size, recipe)
    return "".join(said.getvalue().replace("│", "").split())


def forget_checksums(checkpoint: Path) -> None:
    """Make it one of a version that took none."""
    (checkpoint / MANIFEST).unlink()
    store.write_progress(checkpoint, replace(store.read_progress(checkpoint), manifest=False))


def losses_of(run_dir: Path) -> dict[int, float]:
    """What a run has logged so far, by step."""
    if not (run_dir / "metrics.jsonl").exists():
        return {}
    return {line["step"]: line["loss"] for line in read_metrics(run_dir) if "loss" in line}
