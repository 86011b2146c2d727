"""Weights in, weights out: an import and an export without training change no bit, at any layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from paralign.engine.batch import LossSum, PackedBatch, StepBatch, Unit
from paralign.engine.checkpoint.hf import Assets, HFReader
from paralign.engine.checkpoint.manifest import read_manifest
from paralign.engine.checkpoint.verify import check_against_manifest
from paralign.engine.config.model import ModelConfig
from paralign.engine.data.pack import pack_chats
from paralign.engine.parallel.layout import LayoutConfig, resolve
from paralign.engine.parallel.mesh import open_mesh
from paralign.engine.training.export import export_hf
from paralign.engine.training.model import Model
from paralign.engine.training.step import UNITS, run_step
from paralign.models.head_read import HeadOutput, Quantity

from .pool import RankPool
from .reference import make_samples, tiny_model

LAYOUTS: dict[str, tuple[int, dict[str, Any], str]] = {
    "1, fp32": (1, {}, "fp32"),
    "TP4, bf16": (4, {"tensor_model_parallel_size": 4}, "bf16"),
    "TP2×PP2, fp32": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, "fp32"),
    "PP2×VPP2, bf16": (
        2,
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
        "bf16",
    ),
    "DP2, fp32": (2, {}, "fp32"),
}
ROWS = 256
SAMPLES = make_samples(12, longest=40)


class EachRow:
    """Reports what the head gave for each row of a pack, in place of one loss."""

    asks = frozenset({Quantity.LOGPROB})
    metrics = tuple(f"row {i}" for i in range(ROWS))

    def loss(self, out: HeadOutput, batch: PackedBatch) -> LossSum:
        rows = torch.zeros(ROWS).index_put((batch.loss_rows,), out[Quantity.LOGPROB])
        return LossSum({Unit.TOKEN: rows.sum()}, torch.stack((rows, torch.ones_like(rows)), dim=1).double())


def _never(name: str) -> Tensor:
    raise AssertionError(f"{name}: only the first copy of the model reads")


def round_trip(
    rank: int, world_size: int, source: Path, target: Path, keys: dict[str, Any], dtype: str
) -> list[float]:
    """Load, compute one pack, export; the log-probabilities of the pack's rows."""
    reader = HFReader(source)
    degrees = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1} | keys
    layout = resolve(
        LayoutConfig(**degrees), reader.arch, world_size=world_size, global_batch_size=4, tokens_per_pack=ROWS
    )
    section = ModelConfig(hf=source, dtype=dtype)
    with open_mesh(layout, local_rank=rank, seed=1) as mesh:
        model = Model.open(reader.arch, mesh, section, reader.read if mesh.dp.rank == 0 else _never)
        real, empty = (pack_chats(samples, ROWS, mesh.device) for samples in (SAMPLES, []))
        packs = [real if mesh.dp.rank == 0 else empty, empty]
        batch = StepBatch(packs, {Unit.TOKEN: 1}, n_samples=1, n_tokens=1, sample_ids=())
        sums = run_step(model, batch, EachRow(), train=False)
        export_hf(
            model,
            target,
            assets=Assets(source, source),
            dtype=model.config.params_dtype,
            max_shard_bytes=200_000,
        )
    return sums[len(UNITS) :, 0].tolist()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_export_is_the_import(layout: str, family: str, ranks: RankPool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    world_size, keys, dtype = LAYOUTS[layout]
    model = tiny_model(family, layers=4)
    if dtype == "bf16":
        model = model.to(torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    target = tmp_path / "target"
    ours = ranks.run(world_size, round_trip, tmp_path / "source", target, keys, dtype)[0]

    before = load_file(tmp_path / "source/model.safetensors")
    after = {
        name: tensor for file in target.glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert check_against_manifest(target) == []
    assert read_manifest(target).tensors.keys() == before.keys()  # type: ignore[union-attr]
    assert json.loads((target / "config.json").read_text()) == json.loads(
        (tmp_path / "source/config.json").read_text()
    )

    # What the engine computed is what plain transformers computes from the export.
    opened = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32, attn_implementation="eager")
    theirs: list[float] = []
    for tokens, mask in SAMPLES:
        rows = opened(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
        learned = [rows[i, token].item() if mask[i + 1] else 0.0 for i, token in enumerate(tokens[1:])]
        theirs += [*learned, 0.0]
    theirs += [0.0] * (ROWS - len(theirs))
    tolerance = 1e-5 if dtype == "fp32" else 0.15  # bf16 rounds activations to 8 bits in every layer
    assert max(abs(a - b) for a, b in zip(ours, theirs)) < tolerance
