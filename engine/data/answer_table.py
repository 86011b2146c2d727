"""What is known of an answer besides its tokens, as a row of a table. Owns the row's columns."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from paralign.models.errors import DataError

from .preference import Preference
from .render import Rendered

ANSWER = np.dtype(
    [
        ("prompt", "i8"),  # tokens before the answer, the same in all answers of a record
        ("prompt_key", "u8"),  # equal for equal prompts
        ("rank", "i4"),  # place in its record: 0 chosen, 1 rejected
        ("desirable", "?"),
        ("score", "f8"),  # NaN: none
        ("margin", "f8"),
    ]
)


def describe_answers(preference: Preference, samples: Sequence[Rendered]) -> np.ndarray:
    """Of ANSWER, one row for each answer of a record.

    The prompt is what all answers have in common before the first token that any of them learns: a tokenizer
    may merge the end of a prompt with the beginning of one answer and not of the other.

    Args:
        samples: the prompt with each answer, rendered.

    Raises:
        DataError: an answer without a learned token, or nothing before it.
    """
    place = preference.conversations[0].place
    n_prompt = min(len(sample.tokens) for sample in samples)
    for sample in samples:
        learned = np.flatnonzero(sample.learned)
        if not len(learned):
            raise DataError(f"{place}: an answer that renders to no token; expected text; remove the record")
        n_prompt = min(n_prompt, int(learned[0]))
        common = sample.tokens[:n_prompt] == samples[0].tokens[:n_prompt]
        n_prompt = n_prompt if common.all() else int(np.argmin(common))
    if n_prompt == 0:
        raise DataError(
            f"{place}: no token stands before the answers; take a chat template that marks turns, or begin "
            "with a token of the beginning"
        )
    key = hashlib.blake2b(samples[0].tokens[:n_prompt].tobytes(), digest_size=8).digest()
    rows = np.zeros(len(samples), dtype=ANSWER)
    rows["prompt"] = n_prompt
    rows["prompt_key"] = int.from_bytes(key, "big")
    rows["rank"] = np.arange(len(samples))
    rows["desirable"] = preference.desirable
    rows["score"] = preference.scores
    rows["margin"] = preference.margin
    return rows
