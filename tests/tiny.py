"""The tiny models, config.json keys and tokenizers of all tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
SHAPE = {
    "vocab_size": 37,  # no degree of parallelism divides it
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def random_model(family: str, *, seed: int | None = 0, **keys: Any) -> Any:
    """A transformers model of a family with random weights in fp32; `keys` go before those of SHAPE."""
    import torch
    import transformers

    if seed is not None:
        torch.manual_seed(seed)
    config = getattr(transformers, f"{CLASSES[family]}Config")(**SHAPE | keys)
    return getattr(transformers, f"{CLASSES[family]}ForCausalLM")(config)


def config_keys(architecture: str = "LlamaForCausalLM", **keys: Any) -> dict[str, Any]:
    """What a published config.json holds, in the style before transformers 5; `keys` go before those of SHAPE."""
    return {
        "architectures": [architecture],
        "hidden_act": "silu",
        **SHAPE,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        **keys,
    }


def write_tokenizer(directory: Path, words: Sequence[str], *, marks: Sequence[str] = (), **keys: Any) -> None:
    """A tokenizer of whole words, which get their ids in order; `marks` among them are special.

    `keys` go to transformers, as `eos_token` does, and `chat_template`.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=keys["unk_token"])
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **keys)
    if marks:
        tokenizer.add_special_tokens({"additional_special_tokens": list(marks)})
    tokenizer.save_pretrained(directory)
