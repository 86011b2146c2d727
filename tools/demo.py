"""The demo: a model that cannot sort letters learns it, at TP2 × PP2 on this machine. Owns the toy, not the engine.

python -m paralign.tools.demo [RUN_DIR]
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "demo" / "sft.yaml"
N_TRAIN, N_HELD_OUT = 4000, 200
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def main(run_dir: Path = Path("runs/demo")) -> None:
    """Make the toy, train it by the recipe, measure the export with plain transformers, write summary.json."""
    began = time.monotonic()
    model, data, exported = run_dir / "model", run_dir / "data", run_dir / "hf" / "final"
    if (run_dir / "checkpoints").exists():
        sys.exit(f"{run_dir}: holds a run already; remove it (rm -r {run_dir}) to start again")
    held_out = make_data(data)
    make_model(model, data / "train.jsonl")
    before, _ = accuracy(model, held_out)
    print(f"accuracy on {len(held_out)} held-out questions before training: {before:.1%}", flush=True)

    moved = [f"{key}={run_dir / rest}" for key, rest in MOVED.items()] if run_dir != Path("runs/demo") else []
    command = [sys.executable, "-m", "paralign.engine.cli", "train", str(RECIPE), *moved, "--nproc", "4"]
    subprocess.run(command, check=True)
    subprocess.run(
        [sys.executable, "-m", "paralign.engine.cli", "plot", str(run_dir), "-o", str(run_dir / "loss.png")],
        check=True,
    )

    after, answers = accuracy(exported, held_out)
    for question, answer in answers[:2]:
        print(f"\n  {question}\n  → {answer}")
    summary = {
        "accuracy_before": before,
        "accuracy_after": after,
        "seconds": round(time.monotonic() - began, 1),
        "layout": "TP2 × PP2, 4 processes",
        "export": str(exported),
        "loss_curve": str(run_dir / "loss.png"),
    }
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(
        f"\naccuracy: {before:.1%} before, {after:.1%} after, in {summary['seconds']} s; see {run_dir}/summary.json"
    )


MOVED = {
    "run_dir": "",
    "model.hf": "model",
    "data.train": "data/train.jsonl",
    "data.validation.held_out": "data/held_out.jsonl",
    "data.cache_dir": "cache",
}


def questions(n: int, seed: int) -> Iterator[tuple[str, str]]:
    """Questions and answers: "Sort the letters: d k a" and "a d k"."""
    generator = random.Random(seed)
    for _ in range(n):
        letters = generator.sample(LETTERS, generator.randint(4, 7))
        yield f"Sort the letters: {' '.join(letters)}", " ".join(sorted(letters))


def make_data(directory: Path) -> list[tuple[str, str]]:
    """Write train.jsonl and held_out.jsonl, which share no question; the held-out pairs."""
    directory.mkdir(parents=True, exist_ok=True)
    train = list(questions(N_TRAIN, seed=1))
    seen = {question for question, _ in train}
    held_out = [pair for pair in questions(2 * N_HELD_OUT, seed=2) if pair[0] not in seen][:N_HELD_OUT]
    for name, pairs in (("train", train), ("held_out", held_out)):
        with (directory / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for question, answer in pairs:
                turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                file.write(json.dumps({"messages": turns}) + "\n")
    return held_out


def make_model(directory: Path, train: Path) -> None:
    """Write a tokenizer learned from the training file, and a random Llama of its vocabulary."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    turns = (
        turn["content"] for line in train.open(encoding="utf-8") for turn in json.loads(line)["messages"]
    )
    tokenizer.train_from_iterator(turns, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|im_end|>"
    ).save_pretrained(directory)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id("<|im_end|>"),
        pad_token_id=tokenizer.token_to_id("<|pad|>"),
    )
    LlamaForCausalLM(config).save_pretrained(directory)


def accuracy(directory: Path, pairs: Sequence[tuple[str, str]]) -> tuple[float, list[tuple[str, str]]]:
    """Share of questions whose greedy answer is right to the letter, and the questions with their answers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    if tokenizer.chat_template is None:  # before training: the export carries the recipe's
        from paralign.engine.data.render import template_text

        tokenizer.chat_template = template_text("chatml")
    chats = [[{"role": "user", "content": question}] for question, _ in pairs]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = sum(answer.strip() == expected for answer, (_, expected) in zip(answers, pairs))
    return right / len(pairs), [(question, answer.strip()) for (question, _), answer in zip(pairs, answers)]


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main(*map(Path, sys.argv[1:2]))
