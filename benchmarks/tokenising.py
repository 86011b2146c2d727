"""Times our tokenising and packing beside `datasets.map` with the same tokenizer and template.

    python benchmarks/tokenising.py TOKENIZER_DIR [--samples 5000] [--workers 1] [--repeats 3] [--template chatml]

Needs `pip install -e .[bench]`. Chats of one to four rounds of made-up words drawn with seed 0, answers of 20 to 200
words, written to one JSONL file. All start from that file:

    ours              records → turns → text → tokens and mask, checked against the template, into a cache on disk
    ours, warm        the same cache opened again
    ours, plan        best-fit packing of the cache
    datasets.map      `apply_chat_template(…, return_assistant_tokens_mask=True)` in one map over the loaded data
                      set, as TRL tokenises for assistant-only loss; no check, Arrow on disk

Prints a table, then one line of JSON. Seconds are medians, after one run to warm up. In one process
(`--workers 1`, with TOKENIZERS_PARALLELISM=false) they are the processor's, which a busy machine disturbs less;
with workers the wall clock's. Each repeat starts without caches.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
from transformers import AutoTokenizer

from paralign.engine.data.cache import build_or_open
from paralign.engine.data.config import DataConfig
from paralign.engine.data.packing import plan_packs
from paralign.engine.data.render import template_text

TOKENS_PER_PACK = 8192
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def main() -> None:
    parser = argparse.ArgumentParser(description="Our tokenising beside datasets.map.")
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--template", default="chatml", choices=["chatml", "llama3"])
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(arguments, Path(folder))
    print(f"{'':<16}{'seconds':>10}{'samples/s':>12}{'tokens/s':>12}")
    for name, row in rows.items():
        rates = f"{row['samples_per_second']:>12,.0f}{row['tokens_per_second']:>12,.0f}"
        print(f"{name:<16}{row['seconds']:>10.3f}{rates}")
    print(json.dumps({"datasets": datasets.__version__, **vars(arguments), "rows": rows}, default=str))


def compare(arguments: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    """Seconds and rates by name; the tokens of both sides are compared."""
    path = folder / "chats.jsonl"
    write_chats(path, arguments.samples)
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    template = template_text(arguments.template)
    built = iter(range(1_000_000))
    found: dict[str, Any] = {}

    def config(cache_dir: Path) -> DataConfig:
        return DataConfig.model_validate(
            {
                "train": path,
                "chat_template": arguments.template,
                "tokens_per_pack": TOKENS_PER_PACK,
                "too_long": "drop",
                "cache_dir": cache_dir,
                "workers": arguments.workers,
            }
        )

    def ours() -> None:
        data = config(folder / f"ours{next(built)}")
        found["cache"] = build_or_open(data, data.train, arguments.tokenizer, progress=False)

    def warm() -> None:
        data = found["cache"].config
        build_or_open(data, data.train, arguments.tokenizer, progress=False)

    def plan() -> None:
        plan_packs(found["cache"].lengths, TOKENS_PER_PACK, seed=0, epoch=0)

    def tokenise(record: dict[str, Any]) -> dict[str, Any]:
        encoded = tokenizer.apply_chat_template(
            record["messages"],
            chat_template=template,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        return {"input_ids": encoded["input_ids"], "assistant_masks": encoded["assistant_masks"]}

    def theirs() -> None:
        cache_dir = str(folder / f"theirs{next(built)}")
        loaded = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=cache_dir)
        n_processes = arguments.workers if arguments.workers > 1 else None
        found["mapped"] = loaded.map(tokenise, num_proc=n_processes, remove_columns=loaded.column_names)

    clock = time.process_time if arguments.workers == 1 else time.perf_counter
    seconds = {
        name: measure(run, arguments.repeats, clock)
        for name, run in {
            "ours": ours,
            "ours, warm": warm,
            "ours, plan": plan,
            "datasets.map": theirs,
        }.items()
    }
    cache, mapped = found["cache"], found["mapped"]
    assert len(cache) == len(mapped) == arguments.samples
    for i in range(0, len(mapped), max(1, len(mapped) // 100)):
        assert cache.sample(i)[0].tolist() == mapped[i]["input_ids"]
        assert cache.sample(i)[1][1:].tolist() == mapped[i]["assistant_masks"][1:]
    n_tokens = int(cache.lengths.sum())
    return {
        name: {
            "seconds": taken,
            "samples_per_second": arguments.samples / taken,
            "tokens_per_second": n_tokens / taken,
        }
        for name, taken in seconds.items()
    }


def write_chats(path: Path, n_samples: int) -> None:
    """Chats of made-up words: lengths are what matters here, not sense."""
    draw = random.Random(0)
    words = ["".join(draw.choices(LETTERS, k=draw.randint(2, 7))) for _ in range(500)]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(n_samples):
            turns = []
            for _ in range(draw.randint(1, 4)):
                question = " ".join(draw.choices(words, k=draw.randint(5, 60)))
                answer = " ".join(draw.choices(words, k=draw.randint(20, 200)))
                turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")


def measure(run: Callable[[], None], repeats: int, clock: Callable[[], float]) -> float:
    """Median seconds, after one run to warm up."""
    run()
    seconds = []
    for _ in range(repeats):
        began = clock()
        run()
        seconds.append(clock() - began)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
