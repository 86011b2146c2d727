"""What the export of a reward model says of itself: the class that opens it and the token that pads its batches."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from paralign.models import FAMILIES, scoring_class
from paralign.models.arch import Arch

from .checkpoint.hf import Scorer
from .data.tokenizer import padding_token


def scorer_of(arch: Arch, tokenizer_dir: Path, ends: Collection[int]) -> Scorer:
    """The entries for `arch`; `ends` are the tokens that answers end with. RecipeError if no token can pad."""
    pad = padding_token(tokenizer_dir, ends=ends, vocab_size=arch.vocab_size)
    return Scorer(scoring_class(FAMILIES[arch.family].architectures[0]), *pad)
