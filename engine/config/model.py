"""The `model:` section of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from .decoding import Section


class ModelConfig(Section):
    """Which model is trained, in what precision, and what its backward pass computes again.

    Attributes:
        hf: a Hugging Face directory: config.json, tokenizer, weights; or a native checkpoint to start from.
        init: `weights` starts from the directory's, `random` needs its config.json only.
        dtype: precision of weights and activations; gradients and optimizer are always fp32.
        recompute_granularity: `full` keeps only inputs of layers and runs them again in the backward pass;
            `selective` runs recompute_modules again, in every layer.
        recompute_modules: `layernorm`, both norms; `mlp_act`, the activation of the MLP; `mlp`, also the product
            before it; `core_attn`, attention between its projections. What each saves stands in layouts.md.
        recompute_method: `uniform` recomputes every recompute_num_layers layers together, `block` only the
            first recompute_num_layers layers of each chunk.
        recompute_num_layers: see recompute_method.
        kernels: `auto` uses the fused kernels where they are built and torch elsewhere, `reference` is plain torch
            everywhere except the head's log-probabilities, `required` refuses to start without fused kernels.
        attention_backend: `flash` is the flash-attn package, `varlen` torch's variable-length attention, `sdpa` one
            call of torch's scaled-dot-product attention for each segment; `auto` the first of them that serves.
        deterministic: the same numbers in every run, at some cost.
    """

    hf: Path
    init: Literal["weights", "random"] = "weights"
    dtype: Literal["bf16", "fp32"]
    recompute_granularity: Literal["full", "selective"] | None = None
    recompute_modules: tuple[Literal["core_attn", "layernorm", "mlp", "mlp_act"], ...] = ()
    recompute_method: Literal["uniform", "block"] | None = None
    recompute_num_layers: int | None = Field(None, ge=1)
    kernels: Literal["auto", "reference", "required"] = "auto"
    attention_backend: Literal["auto", "flash", "varlen", "sdpa"] = "auto"
    deterministic: bool = False

    @model_validator(mode="after")
    def _agree(self) -> ModelConfig:
        full = (self.recompute_method, self.recompute_num_layers)
        granularity = self.recompute_granularity
        for wrong, rule in (
            (
                granularity == "full" and None in full,
                "recompute_granularity: full needs recompute_method and recompute_num_layers; give both",
            ),
            (
                granularity != "full" and full != (None, None),
                "recompute_method and recompute_num_layers need recompute_granularity: full; set it, or delete them",
            ),
            (
                granularity == "selective" and not self.recompute_modules,
                "recompute_granularity: selective needs recompute_modules; name some, such as [layernorm, mlp_act]",
            ),
            (
                granularity != "selective" and self.recompute_modules,
                "recompute_modules need recompute_granularity: selective; set it, or delete them",
            ),
            (
                {"mlp", "mlp_act"} <= {*self.recompute_modules},
                "recompute_modules: mlp computes the activation again too; delete mlp_act",
            ),
        ):
            if wrong:
                raise ValueError(rule)
        return self
