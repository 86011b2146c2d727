"""Tokens and loss masks are those of TRL's SFT with assistant-only loss, for each format and three templates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from paralign.engine.data.cache import build_or_open
from paralign.engine.data.config import DataConfig
from paralign.engine.data.render import template_text

from ...tiny import random_model

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a town.",
            "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
        },
    }
]
CALL = {"name": "weather", "arguments": {"town": "Bern"}}
PLAIN = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "hello there,\n\nhow are you?"},
    {"role": "assistant", "content": "fine,\nthank you. é"},
    {"role": "user", "content": "and now?"},
    {"role": "assistant", "content": "fine."},
]
CALLING = [
    {"role": "user", "content": "how is the weather?"},
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]},
    {"role": "tool", "content": '{"sky": "blue"}'},
    {"role": "assistant", "content": "blue, thank you"},
]


def turn(speaker: str, value: str) -> dict[str, str]:
    return {"from": speaker, "value": value}


# Name → records in the format, and what TRL is given for the same conversations.
PLAIN_FORMATS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "messages": ({"messages": PLAIN}, {"messages": PLAIN}),
    "sharegpt": (
        {
            "system": "Be kind.",
            "conversations": [
                turn({"user": "human", "assistant": "gpt"}[m["role"]], m["content"]) for m in PLAIN[1:]
            ],
        },
        {"messages": PLAIN},
    ),
    "alpaca": (
        {
            "system": "Be kind.",
            "history": [[PLAIN[1]["content"], PLAIN[2]["content"]]],
            "instruction": "and now?",
            "output": "fine.",
        },
        {"messages": PLAIN},
    ),
    "prompt_completion": (
        {"prompt": PLAIN[:4], "completion": PLAIN[4:]},
        {"prompt": PLAIN[:4], "completion": PLAIN[4:]},
    ),
}
CALLING_FORMATS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "messages": ({"messages": CALLING, "tools": TOOLS}, {"messages": CALLING, "tools": TOOLS}),
    "sharegpt": (
        {
            "conversations": [
                turn("human", CALLING[0]["content"]),
                turn("function_call", json.dumps(CALL)),
                turn("observation", CALLING[2]["content"]),
                turn("gpt", CALLING[3]["content"]),
            ],
            "tools": json.dumps([tool["function"] for tool in TOOLS]),
        },
        {"messages": CALLING, "tools": TOOLS},
    ),
}


def theirs(
    records: list[dict[str, Any]], tokenizer_dir: Path, template: str, out: Path
) -> list[tuple[list[int], list[int]]]:
    """input_ids and labels of each record, as TRL's collator hands them to the model."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir, chat_template=template)
    tokenizer.pad_token = tokenizer.eos_token  # which must not hide the token that stops a turn
    model = random_model("llama", vocab_size=len(tokenizer), max_position_embeddings=1024)
    config = trl.SFTConfig(
        output_dir=str(out),
        assistant_only_loss=True,
        max_length=None,
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    found = []
    for record in records:  # one at a time: a data set would give every record the keys of all
        trainer = trl.SFTTrainer(
            model, config, train_dataset=datasets.Dataset.from_list([record]), processing_class=tokenizer
        )
        batch = trainer.data_collator([trainer.train_dataset[0]])
        found.append((batch["input_ids"][0].tolist(), batch["labels"][0].tolist()))
    return found


@pytest.mark.parametrize("name", ["llama3", "chatml", "qwen2_5_training"])
def test_tokens_and_mask_are_those_of_trl(
    name: str,
    tokenizer_dir: Path,
    write_jsonl: Callable[..., Path],
    data_config: Callable[..., DataConfig],
    tmp_path: Path,
):
    if name == "qwen2_5_training":
        path = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
        if not path.is_file():
            pytest.skip("this TRL ships no such template")
        chat_template: object = path
    else:
        chat_template = name
    formats = [*PLAIN_FORMATS.items(), *(CALLING_FORMATS.items() if name != "llama3" else ())]
    config = data_config(
        Path(),
        train=[
            {"path": write_jsonl(f"{i}_{format_}.jsonl", [ours]), "format": format_}
            for i, (format_, (ours, _)) in enumerate(formats)
        ],
        chat_template=chat_template,
        tokens_per_pack=1024,
    )
    cache = build_or_open(config, config.train, tokenizer_dir, progress=False)
    template = template_text(config.chat_template) or ""
    given = [record for _, (_, record) in formats]
    distinct = [record for i, record in enumerate(given) if record not in given[:i]]
    answers = theirs(distinct, tokenizer_dir, template, tmp_path / "trl")
    assert len(cache) == len(formats)
    for i, record in enumerate(given):
        input_ids, labels = answers[distinct.index(record)]
        tokens, weights = cache.group(i).whole()
        assert tokens.tolist() == input_ids, formats[i][0]
        assert np.array_equal(weights[1:] > 0, np.array(labels[1:]) != -100), formats[i][0]
