import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from paralign.engine.batch import IGNORE, Column, PackedBatch, Unit
from paralign.engine.data.cache import TokenCache, build_or_open
from paralign.engine.data.config import DataConfig
from paralign.engine.data.epochs import Epochs, Share
from paralign.engine.data.loader import NO_SOURCE, PackLoader
from paralign.engine.data.pack import TAIL_ROWS, pack_chats

from .conftest import chat

CPU = torch.device("cpu")
ROWS = 64


@pytest.fixture
def cache(
    tokenizer_dir: Path, write_jsonl: Callable[..., Path], data_config: Callable[..., DataConfig]
) -> TokenCache:
    path = write_jsonl("a.jsonl", [chat("hello", "fine. " * (i % 6 + 1)) for i in range(50)])
    config = data_config(path, tokens_per_pack=ROWS)
    return build_or_open(config, config.train, tokenizer_dir, progress=False)


def loader(cache: TokenCache, dp_rank: int = 0, dp_size: int = 1, multiple: int = 1) -> PackLoader:
    return PackLoader(
        cache,
        global_batch_size=4,
        seed=1,
        share=Share(dp_rank, dp_size, multiple),
        device=CPU,
    )


def samples_of(batch: PackedBatch) -> list[tuple[int, ...]]:
    n_samples = len(batch.columns[Column.ANSWERS])
    return [tuple(batch.tokens_T[a:b].tolist()) for a, b, _, _ in batch.segments.bounds[:n_samples]]


def test_a_row_predicts_the_next_token_of_its_own_sample_where_that_is_learned():
    samples = [
        (np.array([5, 6, 7], dtype=np.int32), np.array([1, 0, 1], dtype=np.uint8)),
        (np.array([8, 9], dtype=np.int32), np.array([1, 1], dtype=np.uint8)),
    ]
    batch = pack_chats(samples, 8, CPU)
    assert batch.tokens_T.tolist() == [5, 6, 7, 8, 9, 0, 0, 0]
    assert batch.labels_T.tolist() == [IGNORE, 7, IGNORE, 9, IGNORE, IGNORE, IGNORE, IGNORE]
    assert batch.loss_rows.tolist() == [1, 3]
    assert batch.segments.positions_T.tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert batch.segments.cu_seqlens_q.tolist() == [0, 3, 5, 8]
    assert batch.segments.bounds == ((0, 3, 0, 3), (3, 5, 3, 5), (5, 8, 5, 8))
    assert batch.segments.max_seqlen_q == batch.segments.max_seqlen_kv == 3
    assert batch.segments.qkv_format == "sbhd"
    assert batch.segments.kv_index is None
    assert batch.tokens_T.dtype == batch.labels_T.dtype == batch.loss_rows.dtype == torch.int64
    assert batch.segments.positions_T.dtype == torch.int64
    assert batch.segments.cu_seqlens_q.dtype == torch.int32


@pytest.mark.parametrize("n_real", [0, 1, 300 - 2 * TAIL_ROWS, 300])
def test_the_tail_is_short_segments_without_loss(n_real: int):
    samples = [(np.arange(1, n_real + 1), np.ones(n_real))] if n_real else []
    batch = pack_chats(samples, 300, CPU)
    cu_seqlens = batch.segments.cu_seqlens_q
    assert cu_seqlens[-1] == 300
    assert [b for _, b, _, _ in batch.segments.bounds] == cu_seqlens[1:].tolist()
    tail = cu_seqlens.diff()[len(samples) :]
    assert tail.sum() == 300 - n_real
    assert (tail <= TAIL_ROWS).all()
    assert (tail > 0).all()
    assert batch.segments.max_seqlen_q == cu_seqlens.diff().max()
    assert (batch.labels_T[n_real:] == IGNORE).all()
    assert len(batch.loss_rows) == max(n_real - 1, 0)


def test_samples_longer_than_the_pack_are_refused():
    with pytest.raises(ValueError, match="segments of 6 tokens do not fit a pack of 5"):
        pack_chats([(np.arange(3), np.ones(3))] * 2, 5, CPU)


def test_an_epoch_takes_every_sample_once_and_the_next_one_in_another_order(cache: TokenCache):
    whole = loader(cache)
    steps = whole.epochs.first_step(1)
    orders = []
    for epoch in (0, 1):
        ids = [i for k in range(steps) for i in whole.step(epoch * steps + k).sample_ids]
        assert sorted(ids) == list(range(len(cache)))
        orders.append(ids)
    assert orders[0] != orders[1]
    assert whole.epochs.locate(steps - 1) == (0, steps - 1)
    assert whole.epochs.locate(steps) == (1, 0)


@pytest.mark.parametrize(("dp_size", "multiple"), [(2, 1), (4, 1), (2, 2), (3, 2)])
def test_any_layout_computes_the_same_samples_in_each_step(cache: TokenCache, dp_size: int, multiple: int):
    whole = loader(cache)
    ranks = [loader(cache, dp_rank, dp_size, multiple) for dp_rank in range(dp_size)]
    for k in range(whole.epochs.first_step(1)):
        expected = whole.step(k)
        parts = [rank.step(k) for rank in ranks]
        assert all(part.sample_ids == expected.sample_ids for part in parts)
        assert all(part.counts == expected.counts for part in parts)
        sizes = {len(part.micro_batches) for part in parts}
        assert len(sizes) == 1
        assert sizes.pop() % multiple == 0
        packs = [batch for part in parts for batch in part.micro_batches]
        found = Counter(sample for batch in packs for sample in samples_of(batch))
        assert found == Counter(sample for batch in expected.micro_batches for sample in samples_of(batch))


def test_counts_are_those_of_the_tensors(cache: TokenCache):
    for step in loader(cache, multiple=3).evaluation():
        packs = step.micro_batches
        assert step.counts[Unit.TOKEN] == sum(len(batch.loss_rows) for batch in packs)
        assert step.counts[Unit.SAMPLE] == step.n_samples == sum(len(samples_of(batch)) for batch in packs)
        assert step.n_tokens == sum(len(sample) for batch in packs for sample in samples_of(batch))
        assert step.n_samples == len(step.sample_ids)


def test_a_step_is_the_same_when_asked_for_again(cache: TokenCache):
    steps = loader(cache).epochs.first_step(1)
    run = loader(cache)
    seen = [run.step(k) for k in range(steps + 2)]
    resumed = loader(cache).step(steps + 1)
    for batch, again in zip(seen[-1].micro_batches, resumed.micro_batches, strict=True):
        assert torch.equal(batch.tokens_T, again.tokens_T)
        assert torch.equal(batch.labels_T, again.labels_T)


def test_evaluation_is_the_same_each_time(cache: TokenCache):
    whole = loader(cache)
    first = [step.sample_ids for step in whole.evaluation()]
    whole.step(whole.epochs.first_step(1))
    assert [step.sample_ids for step in whole.evaluation()] == first
    assert sorted(i for ids in first for i in ids) == list(range(len(cache)))


def test_the_fingerprint_is_that_of_the_samples_not_of_the_layout(cache: TokenCache):
    def fingerprint(seed: int = 0, global_batch_size: int = 4, dp_size: int = 1) -> str:
        return PackLoader(
            cache,
            global_batch_size=global_batch_size,
            seed=seed,
            share=Share(0, dp_size, 1),
            device=CPU,
        ).fingerprint

    assert fingerprint() == fingerprint(dp_size=2)
    assert len({fingerprint(), fingerprint(seed=1), fingerprint(global_batch_size=8)}) == 3


def test_a_segment_knows_its_source_where_there_are_several(
    tokenizer_dir: Path, write_jsonl: Callable[..., Path], data_config: Callable[..., DataConfig]
):
    paths = [write_jsonl(f"{name}.jsonl", [chat("hello", f"{name} " * 3)] * 9) for name in ("a", "b")]
    config = data_config(Path(), train=paths)
    several = build_or_open(config, config.train, tokenizer_dir, progress=False)
    found = []
    for batch in loader(several).step(0).micro_batches:
        sources = batch.columns[Column.SOURCE].tolist()
        assert len(sources) == len(batch.segments.bounds)
        assert [source != NO_SOURCE for source in sources] == (batch.columns[Column.ANSWER] >= 0).tolist()
        for source, (start, end, _, _) in zip(sources, batch.segments.bounds):
            found.append((source, tuple(batch.tokens_T[start:end].tolist())))
    texts = {source: {tokens for s, tokens in found if s == source} for source in (0, 1)}
    assert all(len(tokens) == 1 for tokens in texts.values())
    assert texts[0] != texts[1]

    alone = build_or_open(config, config.train[:1], tokenizer_dir, progress=False)
    assert Column.SOURCE not in loader(alone).step(0).micro_batches[0].columns


def test_steps_may_be_made_on_one_thread_while_another_counts(
    tokenizer_dir: Path,
    write_jsonl: Callable[..., Path],
    data_config: Callable[..., DataConfig],
    monkeypatch: pytest.MonkeyPatch,
):
    """Epochs of a weighted source differ in length; each is found by the steps before it."""
    path = write_jsonl("a.jsonl", [chat("hello", "fine. " * (i % 6 + 1)) for i in range(75)])
    config = data_config(Path(), train=[{"path": path, "weight": 0.31}], tokens_per_pack=ROWS)
    cache = build_or_open(config, config.train, tokenizer_dir, progress=False)
    alone = loader(cache)
    lengths = {alone.epochs.first_step(e + 1) - alone.epochs.first_step(e) for e in range(10)}
    assert len(lengths) > 1
    expected = [(alone.step(k).sample_ids, alone.tokens_before(k)) for k in range(20)]
    find = Epochs._plan
    monkeypatch.setattr(Epochs, "_plan", lambda self, epoch: (time.sleep(0.002), find(self, epoch))[1])
    both = loader(cache)
    with ThreadPoolExecutor(1) as thread:
        steps = thread.map(both.step, range(20))
        counted = [both.tokens_before(k) for k in range(20)]
        assert [(step.sample_ids, tokens) for step, tokens in zip(steps, counted)] == expected


def test_another_thread_makes_tensors_on_the_gpu_of_this_rank(
    cache: TokenCache, monkeypatch: pytest.MonkeyPatch
):
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    share, gpu = Share(0, 1, 1), torch.device("cuda", 3)
    for device in (CPU, gpu):
        PackLoader(cache, global_batch_size=4, seed=1, share=share, device=device).begin_thread()
    assert chosen == [gpu]


def test_no_epoch_is_planned_twice_though_steps_are_made_one_ahead(
    cache: TokenCache, monkeypatch: pytest.MonkeyPatch
):
    planned: list[int] = []
    find = Epochs._plan
    monkeypatch.setattr(Epochs, "_plan", lambda self, epoch: (planned.append(epoch), find(self, epoch))[1])
    ahead = loader(cache)
    for step in range(3 * ahead.epochs.first_step(1)):
        ahead.step(step + 1)
        ahead.tokens_before(step + 1)
    assert planned == sorted(set(planned))
