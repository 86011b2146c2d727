"""Shape facts of a decoder, read from a Hugging Face `config.json`.

A key that would make our forward pass differ from Hugging Face's is refused, never ignored. What an absent key
means there stands in `Family.defaults`, and is filled in before anything is read here. Messages start with
`config.json KEY`, so that whoever opened the file can put its folder in front.
"""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .errors import WeightsError

DTYPE_NAMES = ("float32", "bfloat16", "float16")
# Far above any model, and small enough that a table of all layers and heads is made in seconds.
MOST = {"num_hidden_layers": 2_000, "num_attention_heads": 1_024, "num_key_value_heads": 1_024}
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of rotary wavelengths; the fields are Hugging Face's."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class Arch:
    """A decoder with RMSNorm, grouped-query attention and SwiGLU, in Megatron's names.

    Attributes:
        family: name of the family that read it, a key of `FAMILIES`.
        ffn_hidden_size: rows of the gate, and as many of the up projection.
        num_query_groups: key-value heads.
        kv_channels: dimension of one head.
        vocab_size: tokens, without padding.
        rope_scaling: None, or Llama 3.1's.
        tied: the output layer is the embedding (Megatron's `share_embeddings_and_output_weights`).
        qkv_bias: biases on q, k and v, none elsewhere.
        dtype: what the weights are stated to be kept in: float32, bfloat16 or float16.
        qk_norm: RMSNorm over the channels of each query and key head, before the rotary embedding.
        alibi: linear biases by distance in place of rotary positions; the `rope_…` fields mean nothing then.
        normalised_head: the rows of the output weight are divided by their L2 norm in the forward pass.
        scalar_head: one value a row (`score.weight`) in place of logits; never tied.
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    layernorm_epsilon: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tied: bool
    qkv_bias: bool
    max_position_embeddings: int
    dtype: str
    qk_norm: bool = False
    alibi: bool = False
    normalised_head: bool = False
    scalar_head: bool = False

    def with_scalar_head(self) -> Arch:
        """The same decoder with a scalar head."""
        return replace(self, scalar_head=True, tied=False)

    @property
    def linear_flops_per_token(self) -> int:
        """Forward FLOPs of all the layers' matrices, per token; a multiply and an add are two."""
        query = self.num_attention_heads * self.kv_channels
        qkv = 2 * self.hidden_size * (self.num_attention_heads + 2 * self.num_query_groups) * self.kv_channels
        return self.num_layers * (
            qkv + 2 * query * self.hidden_size + 6 * self.hidden_size * self.ffn_hidden_size
        )

    @property
    def head_flops_per_token(self) -> int:
        """Forward FLOPs of the language-model head, per row with a loss."""
        return 2 * self.hidden_size * (1 if self.scalar_head else self.vocab_size)

    def attention_flops_per_token(self, effective_length: float) -> float:
        """Forward FLOPs of causal attention over all layers, per token: half of the full square.

        Args:
            effective_length: Σl² / Σl over the segments of lengths l, in tokens.
        """
        return self.num_layers * 2 * self.num_attention_heads * self.kv_channels * effective_length


def read_arch(config: Mapping[str, Any], *, family: str, qkv_bias: bool = False, **features: bool) -> Arch:
    """Reads the keys that every Llama-shaped decoder has, in the style of transformers 4 or 5.

    Args:
        config: the parsed `config.json`, with the family's defaults for absent keys.
        family, qkv_bias, features: passed on to `Arch`: qk_norm, alibi, normalised_head.

    Raises:
        WeightsError: a key is missing or malformed, or asks for what the forward pass does not do.
    """
    refuse_unless(config, "hidden_act", "silu")
    refuse_unless(config, "partial_rotary_factor", 1.0)
    refuse_unless(config, "quantization_config", None, remedy="give the unquantised weights")
    # The only dropout that transformers' classes of these families know; it acts in training alone.
    refuse_unless(
        config, "attention_dropout", 0, remedy="write 0 there: the weights and what they predict are the same"
    )
    hidden_size = _whole(config, "hidden_size")
    heads = _whole(config, "num_attention_heads")
    groups = _whole(config, "num_key_value_heads", default=heads)
    if heads % groups:
        raise WeightsError(
            f"config.json num_key_value_heads: {groups} does not divide num_attention_heads = {heads}; "
            "state it if the key is absent, which leaves it to transformers' default"
        )
    if config.get("head_dim") is None and hidden_size % heads:
        raise WeightsError(
            f"config.json head_dim: absent, and num_attention_heads = {heads} "
            f"does not divide hidden_size = {hidden_size}"
        )
    rope_theta, rope_scaling = _read_rope(config)
    return Arch(
        family=family,
        num_layers=_whole(config, "num_hidden_layers"),
        hidden_size=hidden_size,
        ffn_hidden_size=_whole(config, "intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=_whole(config, "head_dim", default=hidden_size // heads),
        vocab_size=_whole(config, "vocab_size"),
        layernorm_epsilon=_positive(config, "rms_norm_eps"),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tied=_flag(config, "tie_word_embeddings"),
        qkv_bias=qkv_bias,
        max_position_embeddings=_whole(config, "max_position_embeddings"),
        dtype=_read_dtype(config),
        **features,
    )


def refuse_unless(
    config: Mapping[str, Any], key: str, supported: object, *, remedy: str = "train another model"
) -> None:
    """Raises WeightsError if `key` has another value than the one supported; null and absence pass."""
    value = config.get(key)
    if value is not None and value != supported:
        rule = "it is not supported" if supported is None else f"only {supported!r} is supported"
        raise WeightsError(f"config.json {key}: read {shown(value)}; {rule}; {remedy}")


def shown(value: object) -> str:
    """A value of a config.json in an error, cut short."""
    return _SHORT.repr(value)


def _read_rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """RoPE's base and scaling: 4's `rope_theta` and `rope_scaling`, or 5's `rope_parameters`."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"  # transformers' own precedence
    rope = config.get(key) or {}
    if not isinstance(rope, Mapping):
        raise WeightsError(f"config.json {key}: read {shown(rope)}; expected an object")
    rope = dict(rope)
    old_type = rope.pop("type", "default")
    rope_type = rope.pop("rope_type", old_type)
    theta = _positive(rope if "rope_theta" in rope else config, "rope_theta", default=10000.0)
    refuse_unless(config, "rope_theta", theta, remedy=f"as {key} says; keep one of the two")
    refuse_unless(rope, "partial_rotary_factor", 1.0)
    if rope_type == "default":
        nested = [name for name, value in rope.items() if isinstance(value, Mapping)]
        if nested:
            raise WeightsError(
                f"config.json {key}: read one set for each of {nested}; one for all is supported"
            )
        return theta, None
    if rope_type != "llama3":
        raise WeightsError(
            f"config.json {key}: read rope_type {shown(rope_type)}; known are 'default' and 'llama3'"
        )
    scaling = RopeScaling(
        factor=_positive(rope, "factor"),
        low_freq_factor=_positive(rope, "low_freq_factor"),
        high_freq_factor=_positive(rope, "high_freq_factor"),
        original_max_position_embeddings=_whole(rope, "original_max_position_embeddings"),
    )
    return theta, scaling


def _read_dtype(config: Mapping[str, Any]) -> str:
    key = "torch_dtype" if config.get("dtype") is None else "dtype"
    name = str(config.get(key) or "float32").removeprefix("torch.")
    if name not in DTYPE_NAMES:
        raise WeightsError(f"config.json {key}: read {shown(name)}; expected one of {', '.join(DTYPE_NAMES)}")
    return name


def _whole(config: Mapping[str, Any], key: str, *, default: int | None = None) -> int:
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise WeightsError(f"config.json {key}: read {shown(value)}; expected a whole number above 0")
    if value > (most := MOST.get(key, 2**31 - 1)):
        raise WeightsError(f"config.json {key}: read {value}; no model has more than {most:,}")
    return value


def _positive(config: Mapping[str, Any], key: str, *, default: float | None = None) -> float:
    value = default if config.get(key) is None else config[key]
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max:
        return float(value)
    raise WeightsError(f"config.json {key}: read {shown(value)}; expected a number above 0")


def _flag(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise WeightsError(f"config.json {key}: read {shown(value)}; expected true or false")
    return bool(value)
