"""Rewards for a file of conversations: a reward model over every record, as JSONL.

One process by itself, or the ranks of `torchrun -m paralign.engine.cli score …` at a layout.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from paralign.models.errors import DataError, WeightsError

from ..batch import Head
from ..checkpoint.source import ModelSource, check_share, open_source
from ..config.model import ModelConfig
from ..data.answers import AnswerLayout, Group, chat
from ..data.config import ChatTemplate, SourceConfig
from ..data.encode import Rendering, encode_record
from ..data.epochs import Share
from ..data.packing import plan_packs
from ..data.render import template_text
from ..data.sources import read_records, record_format
from ..files.whole_file import whole_file
from ..parallel.layout import LayoutConfig, resolve
from ..processes.launch import RankEnv

PACKS_PER_RANK = 8  # between two reports of progress; the schedule needs a multiple of the stages


def score_file(
    model: Path,
    data: Path,
    output: Path,
    *,
    layout: LayoutConfig,
    env: RankEnv,
    dtype: str,
    tokens_per_pack: int,
    chat_template: ChatTemplate = "tokenizer",
) -> int:
    """Writes `{"line": …, "reward": …}` for each conversation of `data`, in order; returns how many there are.

    Args:
        model: a Hugging Face directory of a reward model.
        data: conversations in any format that training reads.
        env: this process among all ranks.

    Raises:
        WeightsError: not a reward model.
        DataError: a record that cannot be read, or is longer than a pack.
    """
    reader = open_source(model)
    check_share(reader, env.rank, env.world_size)
    if not reader.arch.scalar_head:
        raise WeightsError(
            f"{model}: a language model; expected a reward model, such as objective reward exports"
        )
    lines, groups = _read(reader.assets, data, chat_template, tokens_per_pack)
    values = _score(reader, groups, layout, env, dtype, tokens_per_pack)
    if env.rank == 0:
        with whole_file(output) as file:
            for line, value in zip(lines, values.tolist()):
                file.write(f"{json.dumps({'line': line, 'reward': value})}\n".encode())
    return len(groups)


def _read(
    tokenizer: Path, data: Path, chat_template: ChatTemplate, tokens_per_pack: int
) -> tuple[list[int], list[Group]]:
    """Each conversation as one answer to its first token: a reward is read at its end."""
    source = SourceConfig(path=data, name="scored", format="auto")  # no curve will bear it
    renderer = Rendering(tokenizer, template_text(chat_template), "all").open()
    reading = record_format(source)
    lines: list[int] = []
    groups: list[Group] = []
    for record in read_records(data):
        ((tokens, _),), _ = encode_record(record, source, reading, renderer)
        if not 2 <= len(tokens) <= tokens_per_pack:
            raise DataError(
                f"{data}:{record.line}: {len(tokens):,} tokens; expected 2 to tokens_per_pack {tokens_per_pack:,}"
            )
        groups.append(chat(tokens, np.ones(len(tokens), dtype=np.float32), len(groups)))
        lines.append(record.line)
    return lines, groups


def _score(
    reader: ModelSource,
    groups: list[Group],
    config: LayoutConfig,
    env: RankEnv,
    dtype: str,
    tokens_per_pack: int,
) -> np.ndarray:
    from ..columns.fillers import score_values
    from ..data.pack import pack_groups
    from ..parallel.mesh import open_mesh, open_world
    from ..training.model import Model

    degrees = config.tensor_model_parallel_size * config.pipeline_model_parallel_size
    multiple = config.pipeline_model_parallel_size if config.virtual_pipeline_model_parallel_size else 1
    layout = resolve(
        config,
        reader.arch,
        world_size=env.world_size,
        global_batch_size=max(1, env.world_size // degrees) * multiple,
        tokens_per_pack=tokens_per_pack,
    )
    answer_layout = AnswerLayout(frozenset(), Head.SCALAR, share_prefix=False)
    lengths = np.array([1 + len(group.answers[0].tokens) for group in groups])
    plan = plan_packs(lengths, tokens_per_pack, seed=0, epoch=0)
    env.tell_torch()
    with (
        open_world(rank=env.rank, world_size=env.world_size, local_rank=env.local_rank, timeout_minutes=30),
        open_mesh(layout, local_rank=env.local_rank, seed=0) as mesh,
    ):
        section = ModelConfig.model_validate({"hf": Path(), "dtype": dtype})
        model = Model.open(reader.arch, mesh, section, reader.read)

        def steps() -> Iterator[list[Any]]:
            share = Share(mesh.dp.rank, mesh.dp.size, layout.micro_batch_multiple)
            for mine in share.of_plan(plan, lengths, PACKS_PER_RANK * layout.dp * multiple):
                yield [
                    pack_groups([groups[k] for k in ids], tokens_per_pack, mesh.device, answer_layout)
                    for ids in mine
                ]

        return score_values(model, steps(), len(groups))
