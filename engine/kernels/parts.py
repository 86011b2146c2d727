"""Which modules and operations the decoder is built from. Owns the choice; the rooms beside it own the operations."""

from __future__ import annotations

from paralign.models.attention import PackedAttention
from paralign.models.decoder import Parts
from paralign.models.norm import RMSNorm

from .token_logprob import token_logprob


def choose_parts() -> Parts:
    """The parts that serve everywhere: torch's arithmetic, our packing and head."""
    return Parts(norm=RMSNorm, core_attention=PackedAttention, token_logprob=token_logprob)
