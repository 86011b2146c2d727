"""A 70B model's table of rules at TP8 × PP4: every byte of every tensor once, from config.json alone."""

import json
import re
from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paralign.engine.checkpoint.rule_table import rule_table
from paralign.engine.parallel.layout import LayoutConfig, layers_of_stage, resolve, stage_rules
from paralign.models import FAMILIES, rules_for
from paralign.models.arch import Arch
from paralign.models.errors import LayoutError
from paralign.models.weights import bit_equal

from ...tiny import config_keys

LLAMA_70B = config_keys(
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=8192,
    torch_dtype="bfloat16",
)


@pytest.fixture
def src(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    return tmp_path


def test_every_byte_has_one_place(src):
    lines = list(rule_table(src, tp=8, pp=4))
    ranges = defaultdict(list)
    for line in lines:
        for name, rows, first, end in re.findall(r"([\w.]+)\[(every row: )?(\d+)\.\.(\d+)\]", line):
            ranges[name, bool(rows)].append((int(first), int(end)))
    total = 0
    for (name, by_row), found in ranges.items():
        at = 0
        for first, end in sorted(found):
            assert first == at, name
            at = end
        total += at * 8192 if by_row else at  # o_proj and down_proj have 8192 rows
    assert total == 2 * 70_553_706_496
    stages = [int(line.split()[1]) for line in lines if line.startswith("stage")]
    assert stages == sorted(stages)
    assert set(stages) == {0, 1, 2, 3}


def test_a_share_says_where_its_bytes_are(src):
    lines = list(rule_table(src, tp=8, pp=4))
    at = next(i for i, line in enumerate(lines) if "decoder.layers.0.self_attention.linear_qkv" in line)
    assert "(10240, 8192) -> (1280, 8192) a rank" in lines[at]
    assert lines[at + 2] == (
        "    tp 1: model.layers.0.self_attn.q_proj.weight[16777216..33554432]"
        " + model.layers.0.self_attn.k_proj.weight[2097152..4194304]"
        " + model.layers.0.self_attn.v_proj.weight[2097152..4194304]"
    )


def test_degrees_that_do_not_divide_are_refused(src):
    with pytest.raises(LayoutError, match="tp 3 does not divide 64 attention heads"):
        list(rule_table(src, tp=3, pp=1))


LAYERS = {"first": "num_layers_in_first_pipeline_stage", "last": "num_layers_in_last_pipeline_stage"}


@st.composite
def layouts(draw):
    """A tiny model of any family, and any degrees and uneven ends that divide it."""
    tp, pp, vpp = (draw(st.sampled_from(sizes)) for sizes in ((1, 2, 4), (1, 2, 3, 4), (1, 2, 3)))
    per_chunk = draw(st.integers(1, 2))
    ends = (
        draw(st.lists(st.sampled_from(list(LAYERS)), max_size=min(pp - 1, 2), unique=True)) if pp > 1 else []
    )
    uneven = {end: vpp * draw(st.integers(1, 3)) for end in ends}
    layers = sum(uneven.values()) + (pp - len(uneven)) * vpp * per_chunk
    family = draw(st.sampled_from(sorted(FAMILIES)))
    groups = draw(st.sampled_from([1, 2, 4]))
    arch = Arch(
        family, layers, 12, 8, 4, groups, 2, draw(st.integers(5, 9)), 1e-5, 1e4, None, draw(st.booleans()),
        family == "qwen2", 64, "bfloat16", qk_norm=family == "qwen3",
    )  # fmt: skip
    degrees = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": vpp if vpp > 1 and pp > 1 else None,
        **{LAYERS[end]: count for end, count in uneven.items()},
    }
    config = LayoutConfig.model_validate(degrees)
    return arch, resolve(config, arch, world_size=tp * pp, global_batch_size=pp, tokens_per_pack=4 * tp)


@settings(max_examples=60, deadline=None)
@given(layout=layouts(), seed=st.integers(0, 2**31))
def test_the_ranks_of_any_layout_hold_the_model_once(layout, seed):
    """What all ranks read, put together, is every tensor bit by bit; no layer, rule or row is held twice."""
    arch, layout = layout
    generator = torch.Generator().manual_seed(seed)
    rules = rules_for(arch)
    weights = {
        name: torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, generator=generator).view(
            torch.bfloat16
        )
        for rule in rules
        for name, shape in zip(rule.hf, rule.hf_shapes)
    }
    layers = [layer for stage in layers_of_stage(layout, arch) for chunk in stage for layer in chunk]
    assert sorted(layers) == list(range(arch.num_layers))
    held = [rule for stage in stage_rules(layout, arch) for rule in stage]
    assert sorted(rule.native for rule in held) == sorted(rule.native for rule in rules)
    back = {}
    for rule in held:
        ranks = range(layout.tp if rule.split is not None else 1)
        shards = [rule.slice(weights.__getitem__, rank, layout.tp) for rank in ranks]
        rows = sum(piece.stop - piece.start for rank in ranks for piece in rule.pieces(rank, layout.tp))
        assert rows == rule.native_shape[rule.split or 0]
        for name, tensor in rule.join(shards).items():
            assert name not in back
            back[name] = tensor
    assert back.keys() == weights.keys()
    assert all(bit_equal(back[name], weights[name]) for name in weights)
