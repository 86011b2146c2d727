"""The rules of weights are invertible, exact, and in Megatron's order."""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paralign.models import FAMILIES, parameter_count, rules_for
from paralign.models.arch import Arch
from paralign.models.errors import WeightsError
from paralign.models.weights import Rule, SplitPackedQKV, StackQKV, bit_equal, in_blocks


def arch(family="qwen2", groups=8, heads_per_group=2, head_dim=4, hidden=24, ffn=16, vocab=37, tied=False):
    """8 groups of 2 heads; every family's own tensors."""
    return Arch(
        family=family,
        num_layers=2,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=groups * heads_per_group,
        num_query_groups=groups,
        kv_channels=head_dim,
        vocab_size=vocab,
        layernorm_epsilon=1e-5,
        rope_theta=1e4,
        rope_scaling=None,
        tied=tied,
        qkv_bias=family == "qwen2",
        max_position_embeddings=64,
        dtype="bfloat16",
        qk_norm=family == "qwen3",
        alibi=family == "baichuan",
        normalised_head=family == "baichuan",
    )


def random_weights(rules, dtype, seed):
    """Random bits, so that NaN, infinities and -0.0 are among the values."""
    generator = torch.Generator().manual_seed(seed)
    bits = {torch.bfloat16: torch.int16, torch.float32: torch.int32}[dtype]
    limits = torch.iinfo(bits)
    return {
        name: torch.randint(limits.min, limits.max, shape, dtype=bits, generator=generator).view(dtype)
        for rule in rules
        for name, shape in zip(rule.hf, rule.hf_shapes)
    }


@settings(max_examples=40, deadline=None)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    tied=st.booleans(),
    tp=st.sampled_from([1, 2, 4, 8]),
    groups=st.sampled_from([1, 2, 8, 16]),
    heads_per_group=st.sampled_from([8, 16]),
    head_dim=st.sampled_from([4, 8]),
    hidden=st.integers(1, 9),
    vocab=st.integers(1, 40),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    seed=st.integers(0, 2**31),
)
def test_slices_of_all_ranks_join_to_the_original(
    family, tied, tp, groups, heads_per_group, head_dim, hidden, vocab, dtype, seed
):
    rules = rules_for(arch(family, groups, heads_per_group, head_dim, hidden, ffn=8, vocab=vocab, tied=tied))
    weights = random_weights(rules, dtype, seed)
    for rule in rules:
        shards = [rule.slice(weights.__getitem__, rank, tp) for rank in range(tp)]
        assert {shard.shape for shard in shards} == {rule.shard_shape(tp)}
        joined = rule.join(shards)
        assert list(joined) == list(rule.hf)
        assert all(bit_equal(joined[name], weights[name]) for name in rule.hf), rule.native
        whole = torch.cat(rule.parts(weights.__getitem__))
        assert bit_equal(whole, rule.slice(weights.__getitem__, 0, 1)), rule.native
        back = {name: torch.cat(parts) for name, parts in rule.hf_parts(whole).items()}
        assert all(bit_equal(back[name], weights[name]) for name in rule.hf), rule.native


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_every_element_has_one_place(tp):
    for rule in rules_for(arch()):
        ranks = range(tp if rule.split is not None else 1)
        pieces = sorted(piece for rank in ranks for piece in rule.pieces(rank, tp))
        ends = [0] * len(rule.hf)
        for source, start, stop in pieces:
            assert start == ends[source], rule.native
            ends[source] = stop
        assert ends == [shape[rule.split or 0] for shape in rule.hf_shapes]


def test_qkv_is_grouped_by_key_head():
    """A rank's rows are what a model with its groups alone would hold: q heads, k, v of each group."""
    q, k, v = torch.arange(8).view(8, 1), torch.arange(8, 12).view(4, 1), torch.arange(12, 16).view(4, 1)
    shapes = ((8, 1), (4, 1), (4, 1))
    rule = StackQKV("qkv", ("q", "k", "v"), shapes, split=0, num_query_heads=4, num_query_groups=2)
    read = {"q": q, "k": k, "v": v}.__getitem__
    assert rule.slice(read, 0, 1).flatten().tolist() == [0, 1, 2, 3, 8, 9, 12, 13, 4, 5, 6, 7, 10, 11, 14, 15]
    assert rule.slice(read, 1, 2).flatten().tolist() == [4, 5, 6, 7, 10, 11, 14, 15]


def test_w_pack_is_the_same_rows_from_one_tensor():
    packed = torch.arange(16).view(16, 1)
    rule = SplitPackedQKV("qkv", ("W",), ((16, 1),), split=0, num_query_heads=4, num_query_groups=2)
    read = {"W": packed}.__getitem__
    assert rule.slice(read, 0, 1).flatten().tolist() == [0, 1, 2, 3, 8, 9, 12, 13, 4, 5, 6, 7, 10, 11, 14, 15]
    assert rule.slice(read, 1, 2).flatten().tolist() == [4, 5, 6, 7, 10, 11, 14, 15]


def test_ranks_above_the_key_heads_share_the_rows_of_a_group():
    q, k, v = torch.arange(8).view(8, 1), torch.arange(8, 12).view(4, 1), torch.arange(12, 16).view(4, 1)
    shapes = ((8, 1), (4, 1), (4, 1))
    rule = StackQKV("qkv", ("q", "k", "v"), shapes, split=0, num_query_heads=4, num_query_groups=2)
    read = {"q": q, "k": k, "v": v}.__getitem__
    shares = [rule.slice(read, rank, 4).flatten().tolist() for rank in range(4)]
    assert shares == [[0, 1, 2, 3], [8, 9, 12, 13], [4, 5, 6, 7], [10, 11, 14, 15]]


def test_each_rank_holds_its_gate_then_its_up():
    rule = next(rule for rule in rules_for(arch(ffn=4, hidden=1)) if "linear_fc1" in rule.native)
    read = dict(zip(rule.hf, (torch.arange(4).view(4, 1), torch.arange(10, 14).view(4, 1)))).__getitem__
    assert rule.slice(read, 1, 2).flatten().tolist() == [2, 3, 12, 13]


def test_row_parallel_matrices_are_cut_by_columns():
    rule = next(rule for rule in rules_for(arch(ffn=4, hidden=2)) if "linear_fc2" in rule.native)
    read = {rule.hf[0]: torch.arange(8).view(2, 4)}.__getitem__
    assert rule.slice(read, 1, 2).tolist() == [[2, 3], [6, 7]]


def test_vocabulary_is_padded_with_zeros_and_a_rank_may_hold_padding_alone():
    embedding = rules_for(arch(vocab=5, hidden=1))[0]
    read = {embedding.hf[0]: torch.arange(1, 6).view(5, 1)}.__getitem__
    shares = [embedding.slice(read, rank, 4).flatten().tolist() for rank in range(4)]
    assert shares == [[1, 2], [3, 4], [5, 0], [0, 0]]


def test_native_names_and_shapes_are_megatrons():
    shapes = {rule.native: rule.native_shape for rule in rules_for(arch())}
    assert shapes["decoder.layers.1.self_attention.linear_qkv.weight"] == ((16 + 2 * 8) * 4, 24)
    assert shapes["decoder.layers.1.self_attention.linear_qkv.bias"] == ((16 + 2 * 8) * 4,)
    assert shapes["decoder.layers.1.mlp.linear_fc1.weight"] == (32, 24)
    assert shapes["decoder.layers.1.self_attention.linear_proj.weight"] == (24, 64)
    assert set(shapes) == {
        "embedding.word_embeddings.weight",
        "decoder.final_layernorm.weight",
        "output_layer.weight",
        *(
            f"decoder.layers.{layer}.{name}"
            for layer in (0, 1)
            for name in (
                "input_layernorm.weight",
                "self_attention.linear_qkv.weight",
                "self_attention.linear_qkv.bias",
                "self_attention.linear_proj.weight",
                "pre_mlp_layernorm.weight",
                "mlp.linear_fc1.weight",
                "mlp.linear_fc2.weight",
            )
        ),
    }
    assert "output_layer.weight" not in {rule.native for rule in rules_for(arch(tied=True))}


def test_a_slice_does_not_share_memory_with_what_was_read():
    norm = Rule("n", ("n",), ((4,),))
    source = torch.zeros(4)
    norm.slice({"n": source}.__getitem__, 0, 1).fill_(1.0)
    assert not source.any()


def test_a_wrong_shape_is_named():
    rule = rules_for(arch())[0]
    with pytest.raises(WeightsError, match=r"embed_tokens.*found shape \(3, 24\), expected \(37, 24\)"):
        rule.slice({rule.hf[0]: torch.zeros(3, 24)}.__getitem__, 0, 1)
    with pytest.raises(WeightsError, match=r"word_embeddings.*found shape \(18, 24\), expected \(19, 24\)"):
        rule.join([torch.zeros(19, 24), torch.zeros(18, 24)])


def test_a_degree_above_the_query_heads_is_refused_with_what_fits():
    for rule in rules_for(arch(groups=8)):
        if isinstance(rule, StackQKV):
            with pytest.raises(
                WeightsError, match=r"linear_qkv.*16 query heads in 8 groups .*tp 32; tp 1, 2, 4, 8, 16 would"
            ):
                rule.pieces(0, 32)
    gate_up = next(rule for rule in rules_for(arch(ffn=12)) if "linear_fc1" in rule.native)
    with pytest.raises(WeightsError, match="tp 8; tp 1, 2, 4 would do"):
        gate_up.shard_shape(8)


def test_the_families_own_tensors():
    natives = {family: {rule.native: rule for rule in rules_for(arch(family))} for family in FAMILIES}
    layer = "decoder.layers.1.self_attention"
    assert natives["qwen3"][f"{layer}.k_layernorm.weight"].hf == ("model.layers.1.self_attn.k_norm.weight",)
    assert natives["baichuan"][f"{layer}.linear_qkv.weight"].hf == ("model.layers.1.self_attn.W_pack.weight",)
    assert f"{layer}.linear_qkv.bias" not in natives["qwen3"]
    assert natives["mistral"] == natives["llama"]


def test_copies_that_drifted_apart_are_refused():
    norm = Rule("decoder.final_layernorm.weight", ("model.norm.weight",), ((2,),))
    assert norm.join([torch.ones(2), torch.ones(2)])["model.norm.weight"].tolist() == [1, 1]
    with pytest.raises(WeightsError, match=r"final_layernorm.*copies that differ"):
        norm.join([torch.ones(2), torch.tensor([1.0, 1.0001])])


def test_parts_are_views():
    for rule in rules_for(arch("baichuan")):
        weights = random_weights([rule], torch.bfloat16, 0)
        inside = {tensor.untyped_storage().data_ptr() for tensor in weights.values()}
        assert {part.untyped_storage().data_ptr() for part in rule.parts(weights.__getitem__)} <= inside


@given(
    cuts=st.lists(st.lists(st.integers(0, 30), max_size=4), min_size=1, max_size=3),
    elements=st.integers(1, 9),
)
def test_blocks_meet_however_a_tensor_is_cut(cuts, elements):
    whole = torch.arange(60).view(30, 2)
    sides = [whole.tensor_split(sorted(side)) for side in cuts]
    found = list(in_blocks(*sides, elements=elements))
    assert all(torch.equal(block, first) for first, *others in found for block in others)
    assert max(first.numel() for first, *_ in found) <= elements
    assert torch.equal(torch.cat([first for first, *_ in found]), whole.view(-1))


@pytest.mark.parametrize("start", [0, 1, 4])
@pytest.mark.parametrize("length", [0, 1, 7, 16])
def test_one_bit_of_any_stretch_counts(start, length):
    left = torch.arange(24, dtype=torch.int16)
    right = left.clone()
    assert bit_equal(left[start : start + length], right[start : start + length])
    if length:
        right[start + length - 1] ^= 1
        assert not bit_equal(left[start : start + length], right[start : start + length])


def test_bits_not_values_are_compared():
    nan = torch.tensor([float("nan")])
    assert bit_equal(nan, nan.clone())
    assert not bit_equal(torch.tensor([0.0]), torch.tensor([-0.0]))


def test_a_70b_table_takes_no_time_and_no_memory():
    began = time.perf_counter()
    model = Arch(
        "llama", 80, 8192, 28672, 64, 8, 128, 128256, 1e-5, 5e5, None, False, False, 8192, "bfloat16"
    )
    rules = rules_for(model)
    elements = 0
    for rule in rules:
        read = {
            name: torch.empty(shape, dtype=torch.bfloat16, device="meta")
            for name, shape in zip(rule.hf, rule.hf_shapes)
        }.__getitem__
        shards = [rule.slice(read, rank, 8) for rank in range(8 if rule.split is not None else 1)]
        elements += sum(shard.numel() for shard in shards)
    assert elements == parameter_count(model) == 70_553_706_496
    assert time.perf_counter() - began < 5
