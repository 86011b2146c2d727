"""A 70B model's table of rules at TP8 × PP4: every byte of every tensor once, from config.json alone."""

import json
import re
from collections import defaultdict

import pytest

from paralign.engine.rule_table import rule_table
from paralign.models.errors import LayoutError

LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "rope_theta": 5e5,
    "torch_dtype": "bfloat16",
}


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
