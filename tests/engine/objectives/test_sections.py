"""An option that a loss does not read is an error, and so is one that it lacks."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from paralign.engine.objectives import OBJECTIVES, ObjectiveConfig, build_objective

SECTION: TypeAdapter[Any] = TypeAdapter(ObjectiveConfig)

WHOLE: dict[str, dict[str, Any]] = {
    "sft": {},
    "reward": {"alpha": 0.0},
    "dpo": {"beta": 0.1},
    "kto": {"beta": 0.1},
    "simpo": {"beta": 2.0, "gamma": 1.0},
    "orpo": {"beta": 0.1},
    "cpo": {"beta": 0.1},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_built_from_its_section(name: str) -> None:
    section = SECTION.validate_python({"name": name, **WHOLE[name]})
    objective = build_objective(section)
    assert SECTION.validate_python(section.model_dump(mode="json")) == section
    assert "loss" not in objective.metrics  # every objective has one; step.py adds it up


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"name": "dpo", "beta": 0.1, "label_smoothing": 0.1},
            "label_smoothing is not read by loss_type sigmoid",
        ),
        ({"name": "dpo", "beta": 0.1, "loss_type": "robust"}, "robust needs label_smoothing"),
        ({"name": "dpo", "beta": 0.1, "loss_type": "robust", "label_smoothing": 0.5}, "less than 0.5"),
        ({"name": "dpo", "beta": 0.1, "gamma": 1.0}, "gamma"),
        ({"name": "dpo", "beta": 0.0}, "beta"),
        ({"name": "kto", "beta": 0.1, "loss_type": "hinge"}, "loss_type"),
        ({"name": "simpo", "beta": 0.1, "gamma": 1.0, "reference": "online"}, "reference"),
        ({"name": "orpo", "beta": 0.1, "reference_model": "x"}, "reference_model"),
        (
            {"name": "cpo", "beta": 0.1, "loss_type": "ipo", "label_smoothing": 0.1},
            "label_smoothing is not read",
        ),
        ({"name": "sft", "share_prefix": True}, "share_prefix"),
        ({"name": "reward", "alpha": 0.1}, "alpha needs score_range"),
        ({"name": "reward", "alpha": 0.0, "score_range": [1, 5]}, "score_range is not read where alpha is 0"),
        ({"name": "reward", "alpha": 0.1, "score_range": [5, 1]}, "is empty"),
    ],
)
def test_an_option_that_is_not_read_is_an_error(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SECTION.validate_python(section)
