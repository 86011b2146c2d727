"""Times a step of DPO padded, packed, with the prompt computed once, and with a kept reference; beside TRL's.

    OMP_NUM_THREADS=1 python benchmarks/preference.py [--pairs 32] [--repeats 5]

Needs `pip install -e .[bench]`. The DPO mix: prompts log-normal, median 220, sigma 1.0; answers log-normal, median
280, sigma 0.8; clipped to 8–4096, seed 0; pairs that do not fit a pack of 8192 rows are drawn again. The model is a
random Llama in fp32, one process; a step is all the pairs, forward and backward and, where it is online, the
reference. Rows:

    padded            batches of 4 pairs as they come, every sequence as long as the longest of its batch
    packed            best-fit packs, chosen and rejected each with its prompt
    + shared          the prompt computed once
    + cached          and the reference's log-probabilities read, not computed
    TRL               its DPOTrainer, batches of 4 pairs in an order of its own, torch's SDPA as ours

Rows computed are those of policy and reference together. Seconds are CPU seconds of the process, medians after one
run to warm up: with one thread they are those of a machine that does nothing else, also where it does. Prints a
table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from one_rank import one_rank
from transformers import LlamaConfig, LlamaForCausalLM

from paralign.engine.batch import Head, PackedBatch, StepBatch, Unit
from paralign.engine.columns.fillers import KeptReference, put_reference
from paralign.engine.config.model import ModelConfig
from paralign.engine.data.answers import Answer, AnswerLayout, Group, rows_of
from paralign.engine.data.pack import pack_groups
from paralign.engine.data.packing import plan_packs
from paralign.engine.objectives.dpo import DPO, DPOConfig
from paralign.engine.parallel.layout import LayoutConfig, resolve
from paralign.engine.parallel.mesh import open_mesh
from paralign.engine.training.model import Model
from paralign.engine.training.step import run_step
from paralign.models import arch_from_hf

TOKENS_PER_PACK, BATCH, BETA, VOCABULARY = 8192, 4, 0.1, 2048
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Row:
    """One way of running the same step."""

    name: str
    rows_computed: int
    seconds: float
    pairs_per_second: float


def main() -> None:
    parser = argparse.ArgumentParser(description="DPO padded, packed, shared, cached; and TRL's.")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-trl", action="store_true")
    arguments = parser.parse_args()
    pairs = draw_pairs(arguments.pairs)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCABULARY,
            max_position_embeddings=TOKENS_PER_PACK,
            tie_word_embeddings=False,
            attn_implementation="sdpa",
        )
    )
    rows = ours(model, pairs, arguments.repeats)
    if not arguments.no_trl:
        rows.append(trl_row(model, pairs, arguments.repeats))
    padded = rows[0].seconds
    print(f"{'':<10}{'rows':>9}{'seconds':>10}{'pairs/s':>9}{'x padded':>10}")
    for row in rows:
        print(
            f"{row.name:<10}{row.rows_computed:>9,}{row.seconds:>10.2f}{row.pairs_per_second:>9.2f}"
            f"{padded / row.seconds:>10.2f}"
        )
    print(json.dumps({"torch": torch.__version__, "rows": [asdict(row) for row in rows]}))


def draw_pairs(n: int, *, tokens_per_pack: int = TOKENS_PER_PACK) -> list[Group]:
    """The DPO mix, of pairs that fit a pack."""
    draw = np.random.default_rng(0)

    def length(median: float, sigma: float) -> int:
        return int(np.clip(draw.lognormal(np.log(median), sigma), 8, 4096))

    pairs: list[Group] = []
    while len(pairs) < n:
        n_prompt, lengths = length(220, 1.0), (length(280, 0.8), length(280, 0.8))
        if 2 * n_prompt + sum(lengths) > tokens_per_pack:
            continue
        answers = tuple(
            Answer(
                draw.integers(0, VOCABULARY - 2, size), np.ones(size, dtype=np.float32), id=2 * len(pairs) + k
            )
            for k, size in enumerate(lengths)
        )
        pairs.append(Group(draw.integers(0, VOCABULARY - 2, n_prompt), answers))
    return pairs


def ours(model: Any, pairs: Sequence[Group], repeats: int) -> list[Row]:
    objective = DPO(DPOConfig(name="dpo", beta=BETA))
    shared = AnswerLayout(objective.needs, Head.LM, share_prefix=True)
    unshared = replace(shared, share_prefix=False)
    weights = model.state_dict()
    arch = arch_from_hf(model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]})
    layout = resolve(
        LayoutConfig(tensor_model_parallel_size=1, pipeline_model_parallel_size=1),
        arch,
        world_size=1,
        global_batch_size=1,
        tokens_per_pack=TOKENS_PER_PACK,
    )
    with (
        one_rank(),
        open_mesh(layout, local_rank=0, seed=0) as mesh,
    ):
        section = ModelConfig(hf=Path(), dtype="fp32")
        policy, kept = (Model.open(arch, mesh, section, weights.__getitem__) for _ in range(2))
        policy.prepare_to_train()
        reference = KeptReference(kept)

        def run(name: str, packs: list[PackedBatch], online: bool) -> Row:
            batch = StepBatch(packs, {Unit.PAIR: len(pairs), Unit.TOKEN: 1}, len(pairs), 0, ())

            def step() -> None:
                policy.chunks[0].zero_grad_buffer()
                if online:
                    reference.fill(batch)
                run_step(policy, batch, objective, train=True)

            rows = sum(pack.tokens_T.shape[0] for pack in packs) * (1 + online)
            seconds = measure(step, repeats)
            print(f"{name}: {seconds:.2f} s", file=sys.stderr, flush=True)
            return Row(name, rows, seconds, len(pairs) / seconds)

        return [
            run("padded", padded_packs(pairs, unshared), True),
            run("packed", best_packs(pairs, unshared), True),
            run("+ shared", best_packs(pairs, shared), True),
            run("+ cached", best_packs(pairs, shared), False),
        ]


def padded_packs(
    pairs: Sequence[Group], layout: AnswerLayout, device: torch.device = CPU
) -> list[PackedBatch]:
    """A pack for each batch, as long as its sequences are together once all are padded to the longest."""
    packs = []
    for first in range(0, len(pairs), BATCH):
        batch = pairs[first : first + BATCH]
        longest = max(len(pair.prompt) + len(a.tokens) for pair in batch for a in pair.answers)
        padded = [
            replace(pair, answers=tuple(_pad(a, longest - len(pair.prompt)) for a in pair.answers))
            for pair in batch
        ]
        packs.append(pack_groups(padded, 2 * len(batch) * longest, device, layout))
    return _with_a_reference(packs, len(pairs))


def _pad(answer: Answer, length: int) -> Answer:
    n_more = length - len(answer.tokens)
    return replace(
        answer,
        tokens=np.concatenate((answer.tokens, np.zeros(n_more, dtype=np.int64))),
        weights=np.concatenate((answer.weights, np.zeros(n_more, dtype=np.float32))),
    )


def best_packs(
    pairs: Sequence[Group],
    layout: AnswerLayout,
    device: torch.device = CPU,
    *,
    tokens_per_pack: int = TOKENS_PER_PACK,
) -> list[PackedBatch]:
    lengths = np.array([rows_of(pair, layout) for pair in pairs])
    plan = plan_packs(lengths, tokens_per_pack, seed=0, epoch=0)
    packs = [
        pack_groups([pairs[i] for i in plan.pack(k)], tokens_per_pack, device, layout)
        for k in range(len(plan))
    ]
    return _with_a_reference(packs, len(pairs))


def _with_a_reference(packs: list[PackedBatch], n_pairs: int) -> list[PackedBatch]:
    """The packs with log-probabilities as if they had been stored; what they are costs nothing."""
    put_reference(packs, torch.zeros(2 * n_pairs, dtype=torch.float64, device=packs[0].tokens_T.device))
    return packs


def as_text(pairs: Sequence[Group]) -> tuple[Any, Any]:
    """The pairs as a data set of words, and the tokenizer that makes the same token ids of them."""
    import datasets
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(VOCABULARY - 2)} | {"<pad>": VOCABULARY - 2, "<eos>": VOCABULARY - 1}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")

    def text(tokens: np.ndarray) -> str:
        return "".join(f"w{token} " for token in tokens.tolist())

    rows = [
        {"prompt": text(pair.prompt), "chosen": text(chosen.tokens), "rejected": text(rejected.tokens)}
        for pair in pairs
        for chosen, rejected in (pair.answers,)
    ]
    return datasets.Dataset.from_list(rows), tokenizer


def trl_row(model: Any, pairs: Sequence[Group], repeats: int) -> Row:
    """TRL's trainer on the same token ids, one optimizer step over all pairs, reference online."""
    from transformers import TrainerCallback
    from trl import DPOConfig as TRLConfig
    from trl import DPOTrainer

    data, tokenizer = as_text(pairs)
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.process_time() - self.began)

    with tempfile.TemporaryDirectory() as directory:
        options = TRLConfig(
            output_dir=directory,
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=-(-len(pairs) // BATCH),
            max_steps=repeats + 1,
            beta=BETA,
            max_length=None,
            gradient_checkpointing=False,
            learning_rate=0.0,
            bf16=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_steps=1000,
            disable_tqdm=True,
        )
        trainer = DPOTrainer(
            model=model,
            ref_model=copy.deepcopy(model),
            args=options,
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        trainer.train()
    longest = [
        max(len(pair.prompt) + len(a.tokens) for pair in pairs[i : i + BATCH] for a in pair.answers)
        for i in range(0, len(pairs), BATCH)
    ]
    median = statistics.median(seconds[1:])
    return Row("TRL", 2 * sum(2 * BATCH * n for n in longest), median, len(pairs) / median)


def measure(step: Callable[[], None], repeats: int) -> float:
    """Median seconds, after one run to warm up."""
    step()
    seconds = []
    for _ in range(repeats):
        began = time.process_time()
        step()
        seconds.append(time.process_time() - began)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
