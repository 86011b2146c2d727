"""A second backend: other modules of the same meaning, without a word to the decoder, and the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from paralign.engine.backends.ours import TORCH, Ours, parts_of
from paralign.engine.training import model as model_room
from paralign.models.arch import Arch
from paralign.models.attention import sdpa_attention
from paralign.models.decoder import Parts
from paralign.models.mcore import ColumnParallelLinear, ModuleSpec, RowParallelLinear, TransformerLayer
from paralign.models.norm import RMSNorm

from .certificate import Case, Row, certify
from .pool import RankPool
from .reference import SAMPLES
from .test_certificate import BOUNDS, LAYOUTS, PLANS


class PlainLayer(TransformerLayer):
    """Adds and normalises in two operations."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, packed_seq_params: Any = None, **unused: Any
    ) -> tuple[Tensor, None]:
        del unused
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.self_attention(
            normed, attention_mask=attention_mask, packed_seq_params=packed_seq_params
        )
        hidden = hidden_states + attended
        out, _ = self.mlp(self.pre_mlp_layernorm(hidden))
        return hidden + out, None


class PlainNorm(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight

    def after_adding(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError("a part of another backend")


class OtherColumn(ColumnParallelLinear):
    pass


class OtherRow(RowParallelLinear):
    pass


@dataclass(frozen=True)
class Plain:
    """Only what Backend names."""

    fuses_updates: bool = False

    def parts(self, arch: Arch, device: torch.device, dtype: torch.dtype) -> Parts:
        del device, dtype
        ours = parts_of(arch, TORCH, sdpa_attention)
        options = {"rms_norm": None, "add_rms_norm": None}
        norm = ModuleSpec(module=PlainNorm, params=options)
        return replace(
            ours,
            layer=PlainLayer,
            input_layernorm=norm,
            pre_mlp_layernorm=norm,
            final_layernorm=norm,
            linear_qkv=OtherColumn,
            linear_fc1=OtherColumn,
            linear_proj=OtherRow,
            linear_fc2=OtherRow,
        )

    def config(self) -> dict[str, Any]:
        return Ours("reference").config()

    def facts(self, *_: Any) -> dict[str, str]:
        return {}


def certify_plain(rank: int, world_size: int, case: Case) -> tuple[Row, set[str]]:
    seen: set[str] = set()
    opened = model_room.Model.open.__func__  # type: ignore[attr-defined]

    def open_and_look(cls: Any, *arguments: Any) -> Any:
        model = opened(cls, *arguments)
        seen.update(type(module).__name__ for chunk in model.modules for module in chunk.modules())
        return model

    with (
        mock.patch.object(model_room, "backend_of", return_value=Plain()),
        mock.patch.object(model_room.Model, "open", classmethod(open_and_look)),
    ):
        return certify(rank, world_size, case), seen


@pytest.mark.parametrize("layout", ["TP2+SP", "PP2"])
def test_another_backend_gives_the_same_numbers(
    layout: str, ranks: RankPool, references: Callable[..., Path], certificate_table: list
) -> None:
    world_size, keys, more = LAYOUTS[layout]
    case = Case(world_size, keys, more, references("llama"), SAMPLES, PLANS["8 packs of 96, in order"])
    for row, seen in ranks.run(world_size, certify_plain, case):
        assert {"PlainLayer", "PlainNorm", "OtherColumn", "OtherRow"} <= seen
        assert not {"Layer", "RMSNorm", "ColumnParallelLinear", "RowParallelLinear"} & seen
        for figure in ("loss", "gradient", "grad_norm", "loss_after"):
            assert getattr(row, figure) <= getattr(BOUNDS, figure), f"{figure}: {row}"
    certificate_table.append((f"{layout} | llama | another backend", row))
