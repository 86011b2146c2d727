"""The demo: a model learns to sort letters, then to end each answer with a smile.

Both stages run at TP2 × PP2 on this machine: fine-tuning on answers some of which end with a smile, then DPO on pairs
in which the answer with a smile is the better one.

python -m paralign.tools.demo [RUN_DIR]
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).resolve().parents[1] / "recipes" / "demo"
N_TRAIN, N_HELD_OUT, N_PAIRS = 4000, 200, 1000
SMILE, SMILES = " :)", 0.3  # and the share of the first stage's answers that have it
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

    _paralign("train", str(RECIPES / "sft.yaml"), *_moved(run_dir, SFT_PATHS), "--nproc", "4")
    _paralign("plot", str(run_dir), "-o", str(run_dir / "loss.png"))
    after, answers = accuracy(exported, held_out)
    _show(answers)
    print(
        f"\naccuracy: {before:.1%} before, {after:.1%} after; with a smile: {smiles(answers):.1%}", flush=True
    )

    _paralign("train", str(RECIPES / "dpo.yaml"), *_moved(run_dir, DPO_PATHS), "--nproc", "4")
    preferred, preferred_answers = accuracy(run_dir / "dpo" / "hf" / "final", held_out)
    _show(preferred_answers)
    rewards = reward_accuracies(run_dir / "dpo")
    summary = {
        "accuracy_before": before,
        "accuracy_after": after,
        "smiles_before_dpo": smiles(answers),
        "smiles_after_dpo": smiles(preferred_answers),
        "accuracy_after_dpo": preferred,
        "reward_accuracy_before": rewards[0],
        "reward_accuracy_after": rewards[-1],
        "seconds": round(time.monotonic() - began, 1),
        "layout": "TP2 × PP2, 4 processes",
        "export": str(exported),
        "loss_curve": str(run_dir / "loss.png"),
    }
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(
        f"\naccuracy: {before:.1%} before, {after:.1%} after fine-tuning, {preferred:.1%} after DPO"
        f"\nanswers with a smile: {smiles(answers):.1%} before DPO, {smiles(preferred_answers):.1%} after"
        f"\nreward accuracy on held-out pairs: {rewards[0]:.1%} before (all are 0), {rewards[-1]:.1%} after"
        f"\nin {summary['seconds']} s; see {run_dir}/summary.json"
    )


SFT_PATHS = {
    "run_dir": "",
    "model.hf": "model",
    "data.train": "data/train.jsonl",
    "data.validation.held_out": "data/held_out.jsonl",
    "data.cache_dir": "cache",
}
DPO_PATHS = {
    "run_dir": "dpo",
    "model.hf": "hf/final",
    "data.train": "data/pairs.jsonl",
    "data.validation.held_out": "data/held_out_pairs.jsonl",
    "data.cache_dir": "cache",
}


def _moved(run_dir: Path, paths: Mapping[str, str]) -> list[str]:
    """What to set in a recipe that is to run elsewhere than it says."""
    return [f"{key}={run_dir / rest}" for key, rest in paths.items()] if run_dir != Path("runs/demo") else []


def _paralign(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "paralign.engine.cli", *arguments], check=True)


def _show(answers: Sequence[tuple[str, str]]) -> None:
    for question, answer in answers[:2]:
        print(f"\n  {question}\n  → {answer}")


def smiles(answers: Sequence[tuple[str, str]]) -> float:
    """Share of answers that end with a smile."""
    return sum(answer.endswith(SMILE) for _, answer in answers) / len(answers)


def reward_accuracies(run_dir: Path) -> list[float]:
    """Share of held-out pairs whose better answer has the higher reward, at each evaluation."""
    name = "validation/held_out/rewards/accuracies"
    lines = [
        json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return [line[name] for line in lines if name in line]


def questions(n: int, seed: int) -> Iterator[tuple[str, str]]:
    """Questions and answers: "Sort the letters: d k a" and "a d k"."""
    generator = random.Random(seed)
    for _ in range(n):
        letters = generator.sample(LETTERS, generator.randint(4, 7))
        yield f"Sort the letters: {' '.join(letters)}", " ".join(sorted(letters))


def make_data(directory: Path) -> list[tuple[str, str]]:
    """Write chats and pairs, those to train on and those held out, which share no question; the latter's answers."""
    directory.mkdir(parents=True, exist_ok=True)
    train = list(questions(N_TRAIN, seed=1))
    seen = {question for question, _ in train}
    held_out = [pair for pair in questions(2 * N_HELD_OUT, seed=2) if pair[0] not in seen][:N_HELD_OUT]
    for name, pairs in (("train", train), ("held_out", held_out)):
        style = random.Random(3)
        with (directory / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for question, plain in pairs:
                answer = plain + SMILE * (style.random() < SMILES)
                turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                file.write(json.dumps({"messages": turns}) + "\n")
    for name, pairs in (("pairs", train[:N_PAIRS]), ("held_out_pairs", held_out)):
        with (directory / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for question, plain in pairs:
                pair = {"prompt": question, "chosen": plain + SMILE, "rejected": plain}
                file.write(json.dumps(pair) + "\n")
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
    """Share of questions whose greedy answer is right, a smile aside, and the questions with their answers."""
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
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = sum(
        answer.strip().removesuffix(SMILE) == expected for answer, (_, expected) in zip(answers, pairs)
    )
    return right / len(pairs), [(question, answer.strip()) for (question, _), answer in zip(pairs, answers)]


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main(*map(Path, sys.argv[1:2]))
