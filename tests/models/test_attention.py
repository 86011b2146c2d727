"""Packed attention: who sees whom, rotary tables, keys that several segments share."""

from __future__ import annotations

import pytest
import torch

from paralign.engine.data.loader import pack_batch
from paralign.models import arch_from_hf
from paralign.models.attention import apply_rotary, inverse_frequencies, rotary_table, sdpa_attention
from paralign.models.segments import Segments

LLAMA_31 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("scaled", [False, True])
def test_rotary_table_equals_transformers(scaled: bool) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=131072,
        rope_parameters=LLAMA_31 if scaled else {"rope_type": "default", "rope_theta": 500000.0},
    )
    arch = arch_from_hf(config.to_dict() | {"architectures": ["LlamaForCausalLM"]})
    positions = torch.tensor([0, 1, 2, 3, 1000, 8191, 8192, 100_000])
    cos, sin = rotary_table(positions, inverse_frequencies(arch), torch.float32)
    expected_cos, expected_sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    assert torch.equal(cos[:, 0, 0], expected_cos[0])
    assert torch.equal(sin[:, 0, 0], expected_sin[0])

    x = torch.randn(8, 1, 2, 128)
    expected, _ = apply_rotary_pos_emb(*(x[:, 0].transpose(0, 1)[None],) * 2, expected_cos, expected_sin)
    assert torch.equal(apply_rotary(x, cos, sin)[:, 0], expected[0].transpose(0, 1))


def test_a_segment_sees_itself_and_nothing_else() -> None:
    torch.manual_seed(0)
    samples = [([1] * length, [True] * length) for length in (5, 1, 9)]
    segments = pack_batch(samples, 20, torch.device("cpu")).segments
    q, k, v = torch.randn(20, 4, 8), torch.randn(20, 2, 8), torch.randn(20, 2, 8)
    out = sdpa_attention(q, k, v, segments, 0.3)
    for start, end in ((0, 5), (5, 6), (6, 15)):
        changed_k, changed_v = torch.randn_like(k), torch.randn_like(v)
        changed_k[start:end], changed_v[start:end] = k[start:end], v[start:end]
        again = sdpa_attention(q, changed_k, changed_v, segments, 0.3)
        assert torch.equal(out[start:end], again[start:end])
    scores = (q[6:15, 3] @ k[6:15, 1].t() * 0.3).masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(out[6:15, 3], scores.softmax(-1) @ v[6:15, 1])


def test_shared_keys_equal_copied_keys() -> None:
    """[p c | p_last r] with p's keys gathered gives the rows of [p c] and [p r]."""
    torch.manual_seed(0)
    p, c, r = 4, 3, 2
    q, k, v = (
        torch.randn(p + c + 1 + r, 2, 8),
        torch.randn(p + c + 1 + r, 2, 8),
        torch.randn(p + c + 1 + r, 2, 8),
    )
    key_rows = [*range(p + c), *range(p - 1), *range(p + c, p + c + 1 + r)]
    segments = Segments(
        cu_seqlens_q=torch.tensor([0, p + c, p + c + 1 + r]),
        bounds=((0, p + c, 0, p + c), (p + c, p + c + 1 + r, p + c, p + c + p + r)),
    )
    out = sdpa_attention(q, k[key_rows], v[key_rows], segments, 1.0)
    rows = [*range(p - 1), *range(p + c, p + c + 1 + r)]  # the second response behind its own prompt
    plain = Segments(bounds=((0, len(rows), 0, len(rows)),))
    expected = sdpa_attention(q[rows], k[rows], v[rows], plain, 1.0)
    torch.testing.assert_close(out[p + c :], expected[p - 1 :])
