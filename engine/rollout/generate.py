"""Greedy answers of the model in training to prompts of its validation sets.

Each new token is a forward pass over one pack that holds all prompts of a set, at the layout of the run: there
is no cache of keys, and none of the memory that it would take beside a training state. `max_new_tokens` passes
bound the cost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from paralign.models.head_read import Quantity

from ..data.cache import TokenCache
from ..data.pack import pack_chats
from ..data.tokenizer import open_tokenizer
from ..files.json_lines import StepLines
from ..files.refused import refusals_told
from ..training.model import Model

LIKELIEST = frozenset({Quantity.LIKELIEST})


@dataclass(frozen=True)
class Prompt:
    """A sample up to its last answer, and that answer: int32 tokens, and where the sample was read."""

    place: str
    tokens: np.ndarray
    expected: np.ndarray


def prompts_of(cache: TokenCache, n_samples: int, max_new_tokens: int) -> list[Prompt]:
    """The first samples of a set, at most `n_samples`, that fit one pack together with their answers to be."""
    found: list[Prompt] = []
    room = cache.config.tokens_per_pack
    for id_ in range(len(cache)):
        if len(found) == n_samples:
            break
        tokens, weights = cache.group(id_).whole()
        last = int(np.flatnonzero(weights)[-1])
        unlearned = np.flatnonzero(weights[:last] == 0)
        start = int(unlearned[-1]) + 1 if len(unlearned) else 1
        if start + max_new_tokens <= room:
            found.append(Prompt(cache.place(id_), tokens[:start], tokens[start : last + 1]))
            room -= start + max_new_tokens
    return found


def greedy(
    model: Model,
    prompts: Sequence[np.ndarray],
    *,
    tokens_per_pack: int,
    max_new_tokens: int,
    stops: frozenset[int],
    moved: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """The likeliest token again and again, for each prompt. Collective; every rank gets the same answers.

    Args:
        model: with current weights.
        prompts: tokens (L,), which fit one pack with `max_new_tokens` more for each.
        stops: tokens that end an answer; the one that ends it is part of it.
        moved: called at each token, for whoever watches for stalls.
    """
    mesh = model.mesh
    answers: list[list[int]] = [[] for _ in prompts]
    # Other data-parallel ranks would compute the same, and micro-batches beyond the first are the schedule's.
    empty = pack_chats([], tokens_per_pack, mesh.device)
    for _ in range(max_new_tokens):
        moved()
        going = [i for i, answer in enumerate(answers) if not answer or answer[-1] not in stops]
        if not going:
            break
        pack = empty
        if mesh.dp.rank == 0:
            rows = [np.concatenate((prompts[i], answers[i])) for i in going]
            pack = pack_chats([_asking(tokens) for tokens in rows], tokens_per_pack, mesh.device)
        packs = [pack] + [empty] * (mesh.layout.micro_batch_multiple - 1)
        chosen = torch.zeros(len(going), dtype=torch.float64, device=mesh.device)
        results = model.read(
            packs, lambda pack: pack.read(LIKELIEST), lambda out, _: out[Quantity.LIKELIEST].double()
        )
        if results and mesh.dp.rank == 0:
            chosen += results[0]
        for i, token in zip(going, mesh.sum_over_data_then_share(chosen).tolist()):
            answers[i].append(int(token))
    return answers


def _asking(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A sample whose only row with a label is that of the last token: a stand-in follows it, to be predicted."""
    weights = np.zeros(len(tokens) + 1, dtype=np.float32)
    weights[-1] = 1
    return np.append(tokens, 0), weights


class Generations:
    """`run_dir/generations.jsonl`: answers at each evaluation, a line {step, set, place, prompt, answer, expected}.

    It opens like metrics.jsonl, see StepLines.

    Args:
        validation: sets by name; each is asked its first prompts, as many as fit one pack.
        moved: called at each token, for whoever watches for stalls.
    """

    def __init__(
        self,
        model: Model,
        validation: Mapping[str, TokenCache],
        tokenizer_dir: Path,
        run_dir: Path,
        *,
        n_samples: int,
        max_new_tokens: int,
        first_step: int,
        moved: Callable[[], None],
    ) -> None:
        self._model, self._max_new_tokens, self._moved = model, max_new_tokens, moved
        self._tokenizer = open_tokenizer(tokenizer_dir)
        special = set(self._tokenizer.all_special_ids)
        self._sets = {
            name: (prompts_of(cache, n_samples, max_new_tokens), cache.config.tokens_per_pack)
            for name, cache in validation.items()
        }
        # What ends the answers of the data ends ours: a special token, unless an answer was cut off.
        ends = {int(p.expected[-1]) for prompts, _ in self._sets.values() for p in prompts}
        self._stops = frozenset((ends & special) | ({self._tokenizer.eos_token_id} - {None}))
        self._path = run_dir / "generations.jsonl"
        if model.mesh.is_main:
            with refusals_told(self._path):
                self._lines = StepLines(self._path, first_step)

    def write(self, step: int) -> None:
        """Ask every set, with the weights before step number `step`. Collective."""
        for name, (prompts, tokens_per_pack) in self._sets.items():
            answers = greedy(
                self._model,
                [prompt.tokens for prompt in prompts],
                tokens_per_pack=tokens_per_pack,
                max_new_tokens=self._max_new_tokens,
                stops=self._stops,
                moved=self._moved,
            )
            if not self._model.mesh.is_main:
                continue
            with refusals_told(self._path):
                for prompt, answer in zip(prompts, answers):
                    self._lines.write(
                        {
                            "step": step,
                            "set": name,
                            "place": prompt.place,
                            "prompt": self._tokenizer.decode(prompt.tokens.tolist()),
                            "answer": self._tokenizer.decode(answer),
                            "expected": self._tokenizer.decode(prompt.expected.tolist()),
                        }
                    )
