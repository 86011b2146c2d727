"""Layouts are checked arithmetic: what fits is megatron-core's rule, what does not is told with a remedy."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from paralign.engine.parallel.layout import LayoutConfig, layers_of_stage, resolve
from paralign.models import arch_from_hf
from paralign.models.errors import LayoutError

from ...tiny import config_keys


def llama(layers: int = 80, heads: int = 64, groups: int = 8, ffn: int = 28672):
    return arch_from_hf(
        config_keys(
            hidden_size=128 * heads,
            intermediate_size=ffn,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=groups,
            vocab_size=128256,
            max_position_embeddings=8192,
        )
    )


def layout_config(tp: int = 1, pp: int = 1, vpp: int | None = None, **keys: object) -> LayoutConfig:
    return LayoutConfig.model_validate(
        {
            "tensor_model_parallel_size": tp,
            "pipeline_model_parallel_size": pp,
            "virtual_pipeline_model_parallel_size": vpp,
            **keys,
        }
    )


def resolved(config: LayoutConfig, arch=None, *, gpus: int, batch: int = 64, tokens: int = 8192):
    return resolve(config, arch or llama(), world_size=gpus, global_batch_size=batch, tokens_per_pack=tokens)


def test_a_layout_that_fits() -> None:
    layout = resolved(layout_config(4, 4, 5, sequence_parallel=True), gpus=32)
    assert (layout.tp, layout.pp, layout.vpp, layout.dp) == (4, 4, 5, 2)
    assert (layout.micro_batches, layout.micro_batch_multiple) == (32, 4)
    assert resolved(layout_config(), gpus=1).micro_batch_multiple == 1


@pytest.mark.parametrize(
    ("config", "problem", "message"),
    [
        (layout_config(8, 4), {"gpus": 48}, "tp 8 × pp 4 = 32 does not divide 48 GPUs; 32 or 64 would"),
        (layout_config(8, 4), {"gpus": 8}, "tp 8 × pp 4 = 32 does not divide 8 GPUs; 32 would"),
        (
            layout_config(128),
            {"gpus": 128, "batch": 128},
            "tp 128 does not divide 64 attention heads; 1, 2, 4, 8, 16, 32 or 64 would",
        ),
        (
            layout_config(3),
            {"gpus": 3},
            "tp 3 does not divide 64 attention heads and an FFN of 28672, and tp 3 and 8 KV heads: one must be a "
            "multiple of the other; "
            "1, 2, 4, 8, 16, 32 or 64 would",
        ),
        (
            layout_config(4, sequence_parallel=True),
            {"gpus": 4, "tokens": 8190},
            "sequence_parallel: tp 4 does not divide tokens_per_pack 8190; 8188 or 8192 would fit",
        ),
        (
            layout_config(1, 3),
            {"gpus": 3, "batch": 3},
            "80 layers do not divide into pp 3 stages; pp 1, 2, 4 or 5 would, "
            "or give num_layers_in_first/last_pipeline_stage",
        ),
        (
            layout_config(1, 4, 3),
            {"gpus": 4},
            "80 layers do not divide into pp 4 × vpp 3 = 12 chunks; vpp 2, 4, 5, 10 or 20 would, or none",
        ),
        (
            layout_config(1, 4, num_layers_in_first_pipeline_stage=18),
            {"gpus": 4},
            "18 on the first stage leave 62 of 80 layers for 3 stages of equal size; leave a multiple of 3",
        ),
        (
            layout_config(1, 2, num_layers_in_first_pipeline_stage=39, num_layers_in_last_pipeline_stage=40),
            {"gpus": 2},
            "39 on the first stage and 40 on the last stage of pp 2 are not the 80 layers of the model",
        ),
        (
            layout_config(1, 4, 2, num_layers_in_first_pipeline_stage=17),
            {"gpus": 4},
            "vpp 2 does not divide the 17 layers of a stage (17 on the first stage)",
        ),
        (
            layout_config(),
            {"gpus": 4, "batch": 30},
            "global_batch_size 30 is not a multiple of dp 4; 28 or 32 would be",
        ),
        (
            layout_config(1, 4, 5),
            {"gpus": 8, "batch": 12},
            "global_batch_size 12 is not a multiple of dp 2 × pp 4 = 8 (interleaved stages); 8 or 16 would",
        ),
    ],
)
def test_what_does_not_fit_is_told_with_what_would(
    config: LayoutConfig, problem: dict[str, int], message: str
) -> None:
    with pytest.raises(LayoutError) as raised:
        resolved(config, **problem)
    assert message in str(raised.value)


def test_every_problem_is_told() -> None:
    with pytest.raises(LayoutError) as raised:
        resolved(layout_config(24, 3), gpus=50)
    assert len(str(raised.value).split("\n")) == 3


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"sequence_parallel": True}, "sequence_parallel needs tensor_model_parallel_size"),
        ({"vpp": 2}, "virtual_pipeline_model_parallel_size needs"),
        ({"vpp": 1, "pp": 2}, "greater than or equal to 2"),
        ({"num_layers_in_first_pipeline_stage": 1}, "need pipeline_model_parallel_size"),
        ({"overlap_param_gather": True}, "overlap_param_gather needs overlap_grad_reduce"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout_config(**keys)  # type: ignore[arg-type]


def test_interleaved_layers_run_through_all_stages_chunk_by_chunk() -> None:
    layout = resolved(layout_config(1, 2, 2), llama(layers=8), gpus=2)
    assert layers_of_stage(layout, llama(layers=8)) == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


def test_layers_agree_with_megatron_core() -> None:
    """Over many small layouts: what we accept Megatron builds alike, what we refuse it refuses."""
    import paralign.models.mcore  # noqa: F401, I001  (first: it lets megatron-core load without a GPU)
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    def megatron(layers: int, keys: dict[str, int | None]) -> list[list[list[int]]] | None:
        try:
            config = TransformerConfig(
                num_layers=layers,
                hidden_size=64,
                num_attention_heads=4,
                pipeline_dtype=torch.float32,
                overlap_p2p_comm=True,
                **keys,
            )
        except ValueError:
            return None

        def chunk(rank: int, stage: int | None) -> list[int]:
            first = get_transformer_layer_offset(config, stage, rank)
            return list(range(first, first + get_num_layers_to_build(config, stage, rank)))

        stages = range(keys["virtual_pipeline_model_parallel_size"] or 1)
        try:
            return [
                [chunk(rank, stage if len(stages) > 1 else None) for stage in stages]
                for rank in range(keys["pipeline_model_parallel_size"] or 1)
            ]
        except (AssertionError, ZeroDivisionError):
            return None

    accepted = 0
    ends = (None, 1, 2, 4)
    for layers, pp, vpp, first, last in product((8, 10, 12), (2, 3, 4), (None, 2, 3), ends, ends):
        keys = {
            "pipeline_model_parallel_size": pp,
            "virtual_pipeline_model_parallel_size": vpp,
            "num_layers_in_first_pipeline_stage": first,
            "num_layers_in_last_pipeline_stage": last,
        }
        config = LayoutConfig.model_validate({"tensor_model_parallel_size": 1, **keys})
        arch = llama(layers=layers)
        try:
            ours = layers_of_stage(resolved(config, arch, gpus=pp, batch=pp), arch)
            accepted += 1
        except LayoutError:
            ours = None
        assert ours == megatron(layers, keys), keys
    assert accepted > 50
