"""Shape facts come from every style of config.json; what the forward pass would not follow is refused."""

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from paralign.models import FAMILIES, arch_from_hf, parameter_count
from paralign.models.arch import RopeScaling
from paralign.models.errors import WeightsError

from ..tiny import config_keys

SMALL = {
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
}
LLAMA = config_keys(**SMALL, torch_dtype="bfloat16")
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False, "sliding_window": 4096}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "sliding_window": None}
SHAPE = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
CLASSES = {name: CONFIG_MAPPING[name] for name in FAMILIES if name in CONFIG_MAPPING}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)
LLAMA_70B = LlamaConfig(
    vocab_size=128256,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
)
QWEN2_72B = Qwen2Config(
    vocab_size=152064,
    hidden_size=8192,
    intermediate_size=29568,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
)


def hf_dict(config):
    """What a saved config.json holds."""
    return config.to_diff_dict()


def test_both_styles_give_the_same_facts():
    old = LLAMA | {"rope_scaling": LLAMA3_ROPE}
    new = {key: value for key, value in LLAMA.items() if key not in ("rope_theta", "torch_dtype")}
    new |= {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 5e5}, "dtype": "bfloat16"}
    facts = arch_from_hf(old)
    assert facts == arch_from_hf(new)
    assert facts.rope_theta == 5e5
    assert facts.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)
    assert facts.dtype == "bfloat16"
    assert facts.kv_channels == 6
    assert not facts.tied
    assert not facts.qkv_bias


def facts_or_refusal(config):
    try:
        return arch_from_hf(config)
    except WeightsError:
        return "refused"


def without(config, *keys):
    return {key: value for key, value in config.items() if key not in keys}


def test_llama_without_optional_keys():
    config = without(LLAMA, "num_key_value_heads", "rope_theta")
    facts = arch_from_hf(config | {"head_dim": None, "rope_scaling": None, "pretraining_tp": 2})
    assert facts.num_query_groups == facts.num_attention_heads
    assert facts.rope_theta == 10000.0


def test_every_family_of_transformers_has_its_defaults_tested():
    assert set(FAMILIES) - set(CLASSES) == {"baichuan"}  # its classes come with the weights
    assert not FAMILIES["baichuan"].defaults


@pytest.mark.parametrize("name", CLASSES)
def test_a_familys_defaults_are_those_of_its_class(name):
    defaults = FAMILIES[name].defaults
    assert dict(defaults) == {key: getattr(CLASSES[name], key) for key in defaults}


@pytest.mark.parametrize("longest", [64, 1 << 20])
@pytest.mark.parametrize("name", CLASSES)
def test_a_key_left_out_is_read_as_transformers_reads_it(name, longest):
    """Each key of the class in turn: left out, and null where the class takes it. No size is a default's."""
    many_heads = {"hidden_size": 192, "num_attention_heads": 64, "num_key_value_heads": 16, "head_dim": 6}
    stated = SMALL | many_heads | {"max_position_embeddings": longest, "tie_word_embeddings": True}
    stated |= {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    own = {"architectures": FAMILIES[name].architectures}
    whole = CLASSES[name](**stated).to_dict() | {"sliding_window": None}
    assert arch_from_hf(whole | own).max_position_embeddings == longest
    for key in set(CLASSES[name].__dataclass_fields__) & set(whole):
        found = facts_or_refusal(without(whole, key) | own)
        if key in SHAPE:
            assert found == "refused", key
            continue
        theirs = CLASSES[name](**without(whole, key)).to_dict()
        assert found == facts_or_refusal(theirs | own), key
        try:
            theirs = CLASSES[name](**whole | {key: None}).to_dict()
        except Exception:  # whatever its checks raise: a file that transformers does not open
            continue
        assert facts_or_refusal(whole | own | {key: None}) in ("refused", facts_or_refusal(theirs | own)), key


def test_mistral_is_llama_with_a_head_dim_of_its_own():
    facts = arch_from_hf(MISTRAL | {"head_dim": 8, "tie_word_embeddings": True})
    assert (facts.family, facts.kv_channels, facts.tied) == ("mistral", 8, True)
    assert not facts.qkv_bias
    assert arch_from_hf(MISTRAL).kv_channels == 6
    assert not arch_from_hf(MISTRAL).tied


@pytest.mark.parametrize(
    ("window", "longest", "opens"),
    [
        ({"sliding_window": None}, 32768, True),
        ({"sliding_window": 4096}, 4096, True),  # the last row sees the first
        ({"sliding_window": 4096}, 4097, False),
        ({"sliding_window": 0}, 64, False),
        ({"sliding_window": "none"}, 64, False),
        ({}, 4096, True),
        ({}, 32768, False),
    ],
)
def test_a_window_of_mistral_must_leave_nothing_out(window, longest, opens):
    config = without(MISTRAL, "sliding_window") | window | {"max_position_embeddings": longest}
    if opens:
        assert arch_from_hf(config).max_position_embeddings == longest
        return
    found = repr(window.get("sliding_window", 4096))
    with pytest.raises(WeightsError, match=f"config.json sliding_window: read {found} .* = {longest}, is"):
        arch_from_hf(config)


def test_the_shortest_window_that_opens_changes_nothing():
    """One row more than the window, and transformers' result is another: the bound is sharp."""
    torch.manual_seed(0)
    config = MistralConfig(**SMALL, sliding_window=16, attn_implementation="eager", initializer_range=0.2)
    windowed = AutoModelForCausalLM.from_config(config)
    tokens = torch.randint(0, 37, (1, 17))
    last = []
    for window in (16, None):
        windowed.config.sliding_window = windowed.model.config.sliding_window = window
        with torch.no_grad():
            last.append([windowed(input_ids=tokens[:, :length]).logits[0, -1] for length in (16, 17)])
    (inside, outside), (whole, longer) = last
    assert torch.equal(inside, whole)
    assert not torch.allclose(outside, longer)


def test_qwen2_has_biases_and_may_be_tied():
    facts = arch_from_hf(QWEN2 | {"tie_word_embeddings": True, "head_dim": 8})
    assert facts.qkv_bias
    assert facts.tied
    assert facts.kv_channels == 8


def test_a_config_without_architectures_goes_by_its_model_type():
    config = hf_dict(Qwen2Config(**SMALL, architectures=None))
    assert arch_from_hf(config).family == "qwen2"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "read MixtralForCausalLM; known are LlamaForCausalLM"),
        ({"architectures": []}, "read none, and model_type None; known are"),
        ({"hidden_act": "gelu"}, "hidden_act: read 'gelu'; only 'silu' is supported"),
        ({"attention_bias": True}, "attention_bias: read True"),
        ({"mlp_bias": True}, "mlp_bias: read True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: read 0.5"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config: .*unquantised"),
        ({"attention_dropout": 0.1}, "attention_dropout: read 0.1; only 0 is supported; write 0 there"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            "rope_type 'yarn'; known are 'default' and 'llama3'",
        ),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type 'linear'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor: read None"),
        (
            {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
            "rope_theta: read 500000.0; only 1000",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 5e5}}},
            r"one set for each of \['full_attention'",
        ),
        ({"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype: read 'float8_e4m3fn'; expected one of float32"),
        ({"num_hidden_layers": None}, "num_hidden_layers: read None; expected a whole number"),
        ({"vocab_size": "37"}, "vocab_size: read '37'"),
        ({"num_key_value_heads": 3}, "3 does not divide num_attention_heads = 4"),
        ({"hidden_size": 26}, "num_attention_heads = 4 does not divide hidden_size = 26"),
    ],
)
def test_what_we_would_compute_differently_is_refused(change, words):
    with pytest.raises(WeightsError, match=f"config.json .*{words}"):
        arch_from_hf(LLAMA | change)


@pytest.mark.parametrize("family", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize("change", [{"use_sliding_window": True}, {"layer_types": ["sliding_attention"]}])
def test_sliding_windows_are_refused(change, family):
    with pytest.raises(WeightsError, match=next(iter(change))):
        arch_from_hf(QWEN2 | {"architectures": [family]} | change)


def test_baichuan2_has_rotary_positions_or_alibi():
    """As published: both sizes have one class name, and the 13B no max_position_embeddings."""
    common = {"architectures": ["BaichuanForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-6}
    common |= {"vocab_size": 125696, "model_max_length": 4096, "tie_word_embeddings": False}
    small = arch_from_hf(
        common
        | {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
        | {"num_hidden_layers": 32, "max_position_embeddings": 4096}
    )
    large = common | {"hidden_size": 5120, "intermediate_size": 13696, "num_attention_heads": 40}
    large |= {"num_hidden_layers": 40}
    assert (small.alibi, arch_from_hf(large).alibi) == (False, True)
    assert small.normalised_head
    assert parameter_count(small) == 7_505_973_248
    assert parameter_count(arch_from_hf(large)) == 13_896_668_160
    assert arch_from_hf(large).max_position_embeddings == 4096
    with pytest.raises(WeightsError, match="first generation, which has no normalised head"):
        arch_from_hf(large | {"vocab_size": 64000})
    with pytest.raises(WeightsError, match="absent, and model_max_length too"):
        arch_from_hf({key: value for key, value in large.items() if key != "model_max_length"})


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SMALL),
        LlamaConfig(**SMALL, head_dim=10, tie_word_embeddings=True),
        MistralConfig(**SMALL),
        MistralConfig(**SMALL, head_dim=8, tie_word_embeddings=True, sliding_window=None),
        Qwen2Config(**SMALL),
        Qwen2Config(**SMALL, tie_word_embeddings=True),
        Qwen3Config(**SMALL),
        Qwen3Config(**SMALL, head_dim=8, tie_word_embeddings=True),
        LLAMA_8B,
        LLAMA_70B,
        QWEN2_72B,
    ],
)
def test_parameter_count_is_that_of_transformers(config):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert parameter_count(arch_from_hf(hf_dict(config))) == model.num_parameters()


def test_flops_give_the_documented_floor():
    """790 TFLOP/s are 17,236 tokens/s of Llama-3-8B on segments of 1024 tokens, a loss on each row."""
    facts = arch_from_hf(hf_dict(LLAMA_8B))
    forward = (
        facts.linear_flops_per_token + facts.attention_flops_per_token(1024) + facts.head_flops_per_token
    )
    assert 790e12 / (3 * forward) == pytest.approx(17236, abs=2)
