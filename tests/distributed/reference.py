"""What the engine is held against: transformers, one process, one sample at a time, nothing packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.baichuan2_reference import BaichuanConfig, BaichuanForCausalLM
from ..tiny import random_model

Sample = tuple[list[int], Sequence[float]]  # tokens, and what each counts in the loss; 0 is not learned

LR, WEIGHT_DECAY, CLIP, STEPS = 1e-3, 0.1, 1.0, 3
BETAS, EPS = (0.9, 0.95), 1e-8
LONGEST = 512
OWN_KEYS: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-5, "tie_word_embeddings": False},
    "mistral": {
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "sliding_window": LONGEST,
    },
    "qwen2": {"rms_norm_eps": 1e-6, "tie_word_embeddings": True},
    "qwen3": {"head_dim": 8, "rms_norm_eps": 1e-6, "tie_word_embeddings": False},
}


def tiny_model(family: str, *, layers: int = 8, seed: int = 7) -> Any:
    """A random fp32 model of a family; raises ValueError for one that it does not know.

    Llama has grouped queries and an untied head, Mistral heads of another size than hidden size / heads and the
    shortest window that leaves nothing out, Qwen2 biases and a tied head, Qwen3 norms of q and k; Baichuan2's
    13B has a number of heads that is no power of two.
    """
    if family in ("baichuan2-7b", "baichuan2-13b"):
        length = "max_position_embeddings" if family == "baichuan2-7b" else "model_max_length"
        heads, hidden = (8, 64) if family == "baichuan2-7b" else (12, 96)
        torch.manual_seed(seed)
        baichuan = BaichuanForCausalLM(BaichuanConfig(251, hidden, 96, layers, heads, **{length: LONGEST}))
        with torch.no_grad():
            for parameter in baichuan.parameters():
                parameter.copy_(0.1 * torch.randn_like(parameter) + (parameter.dim() == 1))
        return baichuan
    if family not in OWN_KEYS:
        raise ValueError(
            f"tiny_model: family {family!r} is unknown; known are llama, mistral, qwen2, qwen3, baichuan2-7b and "
            "baichuan2-13b; add it here"
        )
    model = random_model(
        family,
        seed=seed,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=251,  # no degree of parallelism divides it
        max_position_embeddings=LONGEST,
        initializer_range=0.1,
        attn_implementation="eager",
        **OWN_KEYS[family],
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.float()


def make_samples(n: int = 24, *, longest: int = 60, seed: int = 3) -> list[Sample]:
    """Lengths and shares of learned tokens that differ widely, single-token answers among them."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high, (1,), generator=generator))  # noqa: E731
    samples: list[Sample] = []
    for i in range(n):
        length = draw(2, 8) if i % 3 == 0 else draw(8, longest)
        prompt = draw(1, length) if i % 4 else length - 1
        tokens = torch.randint(0, 251, (length,), generator=generator).tolist()
        samples.append((tokens, [position >= prompt for position in range(length)]))
    return samples


def lopsided(samples: Sequence[Sample]) -> list[Sample]:
    """The first half of the samples learns one token each, the second every token."""
    half = len(samples) // 2
    return [
        (tokens, [position == len(tokens) - 1 or i >= half for position in range(len(tokens))])
        for i, (tokens, _) in enumerate(samples)
    ]


def weighted(samples: Sequence[Sample]) -> list[Sample]:
    """Learned tokens count between 0.0005 and 0.0025 each."""
    return [
        (tokens, [0.0005 * (1 + (position + i) % 5) * learned for position, learned in enumerate(mask)])
        for i, (tokens, mask) in enumerate(samples)
    ]


SAMPLES = make_samples()
SAMPLE_SETS = {"plain": SAMPLES, "lopsided": lopsided(SAMPLES), "weighted": weighted(SAMPLES)}


@dataclass
class Reference:
    """State before training, first loss and gradients, first gradient norm, losses before steps 0 … STEPS."""

    config: dict[str, Any]
    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]
    grad_norm: float
    losses: list[float]


def loss_of(model: Any, samples: Sequence[Sample], *, backward: bool) -> float:
    """Mean negative log-likelihood over all learned tokens of all samples, each by its weight."""
    count = sum(sum(mask[1:]) for _, mask in samples)
    total = 0.0
    for tokens, mask in samples:
        ids = torch.tensor(tokens)
        weights = torch.tensor(mask, dtype=torch.float32)[1:]
        with torch.set_grad_enabled(backward):
            logits = model(input_ids=ids[None]).logits[0, :-1]
            loss = (F.cross_entropy(logits, ids[1:], reduction="none") * weights).sum() / count
            if backward:
                loss.backward()
        total += loss.item()
    return total


def make_reference(family: str, samples: Sequence[Sample]) -> Reference:
    model = tiny_model(family)
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}],
        lr=LR,
        betas=BETAS,
        eps=EPS,
    )
    losses, gradients, grad_norm = [], {}, 0.0
    for step in range(STEPS):
        optimizer.zero_grad()
        losses.append(loss_of(model, samples, backward=True))
        if step == 0:
            gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item()
        grad_norm = grad_norm or norm
        optimizer.step()
    losses.append(loss_of(model, samples, backward=False))
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    return Reference(config, weights, gradients, grad_norm, losses)
