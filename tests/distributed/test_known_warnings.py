"""A run warns of nothing that every run has; what is new is shown."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

from paralign.models import known_warnings

from .pool import RankPool
from .toy import make_toy, train_recipe, write_recipe


def _said(rank: int, world_size: int, recipe: Path) -> list[str]:
    """Warnings, and what megatron-core logs, as the rank would show them."""
    logged: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = logged.append  # type: ignore[method-assign]
    logging.getLogger("megatron").addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            for category in (DeprecationWarning, ResourceWarning):  # Python shows neither by itself
                warnings.simplefilter("ignore", category)
            known_warnings.ignore()
            train_recipe(rank, world_size, recipe)
            warnings.warn_explicit("news", UserWarning, "megatron/core/optimizer.py", 1)
    finally:
        logging.getLogger("megatron").removeHandler(handler)
    return [str(warning.message) for warning in warned] + [record.getMessage() for record in logged]


def test_a_run_says_only_what_is_new(tmp_path: Path, ranks: RankPool) -> None:
    """From its start, and from its checkpoint on."""
    make_toy(tmp_path)
    for last_step, async_save in ((4, False), (8, True)):
        recipe = write_recipe(
            *(tmp_path, "run", {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
            train__max_steps=last_step,
            train__eval_every_steps=None,
            checkpoint__save_every_steps=4,
            checkpoint__async_save=async_save,
        )
        assert ranks.run(2, _said, recipe) == [["news"], ["news"]]
