"""From files of preferences to groups: what is shared, grouped, dropped, counted and refused."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paralign.engine.batch import Column, Head, Kind, Unit
from paralign.engine.data.answers import AnswerLayout
from paralign.engine.data.cache import TokenCache, build_or_open
from paralign.engine.data.config import DataConfig
from paralign.engine.data.epochs import Share
from paralign.engine.data.loader import PackLoader
from paralign.models.errors import DataError

PAIRS = AnswerLayout(frozenset({Column.PAIR, Column.SCORE}), Head.LM, share_prefix=True)
LABELLED = AnswerLayout(frozenset({Column.DESIRABLE, Column.BASELINE}), Head.LM, share_prefix=True)


def _pair(i: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"hello {i}", "chosen": "fine, thank you " * (i + 1), "rejected": f"no {i}"} | more


@pytest.fixture
def open_cache(
    tmp_path: Path, tokenizer_dir: Path, write_jsonl: Callable[..., Path]
) -> Callable[..., TokenCache]:
    """Opens records as answers; `changes` are keys of the data section."""

    def opened(
        records: list[Any],
        layout: AnswerLayout = PAIRS,
        score_range: tuple[float, float] | None = None,
        **changes: Any,
    ) -> TokenCache:
        section = {
            "train": write_jsonl("answers.jsonl", records),
            "chat_template": "chatml",
            "tokens_per_pack": 200,
            "too_long": "drop",
            "cache_dir": tmp_path / "cache",
            "workers": 1,
        }
        config = DataConfig(**(section | changes))
        kind = Kind.PAIRS if Column.PAIR in layout.needs else Kind.LABELLED
        return build_or_open(config, config.train, tokenizer_dir, kind, layout, score_range, progress=False)

    return opened


def test_a_pair_is_a_prompt_with_two_answers(open_cache: Callable[..., TokenCache]) -> None:
    cache = open_cache([_pair(i) for i in range(3)])
    assert len(cache) == 3
    group = cache.group(1)
    chosen, rejected = group.answers
    assert (chosen.id, rejected.id) == (2, 3)
    assert chosen.weights[0]
    assert rejected.weights[0]
    assert len(group.prompt) > 3
    rows = len(group.prompt) + len(chosen.tokens) + 1 + len(rejected.tokens)
    assert cache.lengths[1] == rows
    assert cache.n_loss[1] == chosen.weights.sum() + rejected.weights.sum()
    assert cache.counts(np.array([0, 1])) == {
        Unit.TOKEN: int(cache.group(0).answers[0].weights.sum() + chosen.weights.sum()),
        Unit.SAMPLE: 4,
        Unit.PAIR: 2,
    }
    again = pickle.loads(pickle.dumps(cache))
    assert again.fingerprint == cache.fingerprint
    assert np.array_equal(again.group(2).prompt, cache.group(2).prompt)


def test_answers_to_one_prompt_are_grouped_as_far_as_a_pack_holds_them(
    open_cache: Callable[..., TokenCache],
) -> None:
    records = [
        {"prompt": f"hello {i % 2}", "completion": "fine " * (i + 1), "label": i % 3 == 0} for i in range(6)
    ]
    cache = open_cache(records, LABELLED)
    assert cache.n_answers.tolist() == [3, 3]
    assert [answer.id for answer in cache.group(1).answers] == [1, 3, 5]
    assert [answer.desirable for answer in cache.group(0).answers] == [True, False, False]
    few = open_cache(records, LABELLED, tokens_per_pack=int(cache.lengths.max()) - 1)
    assert sorted(few.n_answers.tolist()) == [1, 2, 3]
    assert sorted(a.id for i in range(len(few)) for a in few.group(i).answers) == list(range(6))


def test_pairs_longer_than_a_pack_are_dropped_and_counted_or_refused(
    open_cache: Callable[..., TokenCache],
) -> None:
    records = [_pair(0), _pair(60), _pair(1)]
    cache = open_cache(records)
    assert len(cache) == 2
    assert cache.n_dropped == 1
    assert [cache.place(i).rpartition(":")[2] for i in range(2)] == ["1", "3"]
    with pytest.raises(
        DataError, match=r"answers.jsonl:2: [\d,]+ rows .*tokens_per_pack is 200 and 1 sample is longer"
    ):
        open_cache(records, too_long="error")


def test_bad_records_are_refused_or_counted(open_cache: Callable[..., TokenCache]) -> None:
    records = [_pair(0), _pair(1, rejected=_pair(1)["chosen"]), _pair(2, chosen=""), _pair(3)]
    with pytest.raises(DataError, match=r"answers.jsonl:2: chosen and rejected are equal"):
        open_cache(records)
    cache = open_cache(records, bad_record="skip")
    assert len(cache) == 2
    assert cache.n_bad == (2,)
    assert "answers.jsonl:2: chosen and rejected are equal" in cache.first_bad


def test_scores_are_normalised_from_their_stated_range(open_cache: Callable[..., TokenCache]) -> None:
    records = [_pair(0, chosen_score=5, rejected_score=2), _pair(1)]
    cache = open_cache(records, score_range=(1, 5))
    assert [answer.score for answer in cache.group(0).answers] == [1.0, -0.5]
    assert np.isnan(cache.group(1).answers[0].score)
    with pytest.raises(DataError, match=r"answers.jsonl:1: score 5 lies outside score_range \[0, 4\]"):
        open_cache(records, score_range=(0, 4))


@pytest.mark.parametrize("label", [True, False])
def test_labels_of_one_kind_are_refused(open_cache: Callable[..., TokenCache], label: bool) -> None:
    records = [{"prompt": "hello", "completion": f"fine {i}", "label": label} for i in range(3)]
    with pytest.raises(
        DataError, match=f"every label is {str(label).lower()}; expected good answers and bad"
    ):
        open_cache(records, LABELLED)


def test_every_rank_together_has_each_answer_once_and_each_mismatched_answer(
    open_cache: Callable[..., TokenCache],
) -> None:
    records = [
        {"prompt": f"hello {i % 7}", "completion": "fine " * (i % 5 + 1) + str(i), "label": i % 3 == 0}
        for i in range(20)
    ]
    cache = open_cache(records, LABELLED, tokens_per_pack=80)
    loaders = [
        PackLoader(
            cache,
            global_batch_size=2,
            seed=1,
            share=Share(dp_rank, 2, 1),
            device=torch.device("cpu"),
        )
        for dp_rank in range(2)
    ]

    def ids(packs: list[Any]) -> list[int]:
        return [i for pack in packs for i in pack.columns[Column.ANSWER].tolist() if i >= 0]

    assert sorted(i for loader in loaders for packs in loader.every_answer() for i in ids(packs)) == list(
        range(20)
    )
    n_steps = loaders[0].epochs.first_step(1)
    assert n_steps > 1
    seen: list[int] = []
    for step in range(n_steps):
        batches = [loader.step(step) for loader in loaders]
        assert len({len(batch.mismatched) for batch in batches}) == 1
        mismatched = [i for batch in batches for i in ids(batch.mismatched)]
        if len({cache.group(i).prompt.tobytes() for i in batches[0].sample_ids}) == 1:
            assert not mismatched  # no other prompt's answer is there
            mismatched = list(range(loaders[0].answers_before(step), loaders[0].answers_before(step + 1)))
        assert len(mismatched) == batches[0].counts[Unit.SAMPLE]
        seen += mismatched
    assert sorted(seen) == list(range(20))  # numbered over all steps
    assert loaders[0].answers_before(n_steps) == 20
