"""How a reward model is handed on: the class that opens it and the token that pads its batches. Owns the choice."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from paralign.models import FAMILIES, scoring_class
from paralign.models.arch import Arch
from paralign.models.errors import RecipeError

from .checkpoint.hf import Scorer


def scorer_of(arch: Arch, tokenizer_dir: Path, ends: Collection[int]) -> Scorer:
    """What the export of a reward model says of itself.

    The tokenizer's own pad token is kept if no answer ends with it; else a special token that is there to pad,
    or reserved, is taken.

    Args:
        ends: tokens that answers end with.

    Raises:
        RecipeError: no token can pad.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir, local_files_only=True, trust_remote_code=False)
    special = {token.content: id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    candidates = [tokenizer.pad_token] if tokenizer.pad_token_id is not None else []
    candidates += [text for word in ("pad", "reserved") for text in special if word in text.lower()]
    for text in candidates:
        id_ = tokenizer.convert_tokens_to_ids(text)
        if id_ not in ends and id_ < arch.vocab_size:
            return Scorer(scoring_class(_architecture(arch)), text, id_)
    own = json.dumps(tokenizer.pad_token, ensure_ascii=False)
    raise RecipeError(
        f"{tokenizer_dir}: no token to pad a reward model's batches with: the tokenizer's is {own}, and a score is "
        "read at the last token that is not padding, so that it must never end an answer; add a special token "
        "such as <|pad|> to the tokenizer"
    )


def _architecture(arch: Arch) -> str:
    return FAMILIES[arch.family].architectures[0]
