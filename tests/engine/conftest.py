"""A tiny project on disk: model directory, conversations and a recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ..tiny import config_keys, write_tokenizer

RECIPE = """\
objective: sft
run_dir: runs/tiny
model:
  hf: model
  init: random
  dtype: fp32
layout:
  tensor_model_parallel_size: 2
  pipeline_model_parallel_size: 1
data:
  train: train.jsonl
  validation: {chat: chat.jsonl}
  chat_template: chatml
  tokens_per_pack: 64
  too_long: drop
  cache_dir: cache
  workers: 1
optimizer:
  lr: 1e-3
  lr_decay_style: constant
  weight_decay: 0.1
train:
  global_batch_size: 4
  epochs: 2
  seed: 1
  eval_every_steps: 5
checkpoint:
  save_every_steps: 5
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with `recipe.yaml`, `model/` (no weights) and 40 training conversations."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    for name, count in (("train.jsonl", 40), ("chat.jsonl", 4)):
        turns = [
            {
                "messages": [
                    {"role": "user", "content": "hi " * (i % 5)},
                    {"role": "assistant", "content": "yo"},
                ]
            }
            for i in range(1, count + 1)
        ]
        (tmp_path / name).write_text("".join(json.dumps(turn) + "\n" for turn in turns))
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(
        json.dumps(config_keys(num_hidden_layers=4, intermediate_size=32, vocab_size=9))
    )
    marks = ["<|im_start|>", "<|im_end|>"]
    words = ["[UNK]", "hi", "yo", "user", "assistant", *marks]
    write_tokenizer(tmp_path / "model", words, marks=marks, unk_token="[UNK]", eos_token="<|im_end|>")
    return tmp_path


@pytest.fixture
def native(project: Path) -> Path:
    """A native checkpoint of the project's model, with weights from seed 0; without a manifest, which would tell of
    whatever a test changes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from paralign.engine.checkpoint.convert import convert

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig.from_pretrained("model")).save_pretrained("model")
    convert(Path("model"), Path("native"), progress=False)
    Path("native/manifest.json").unlink()
    return Path("native")
