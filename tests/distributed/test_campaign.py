"""Ten kills of the campaign; the hundred and more of a whole one stand in benchmarks/results."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

from .campaign import CELLS, Campaign, summary, trials

RESULTS = sorted(Path(__file__).resolve().parents[2].glob("benchmarks/results/kills_*.jsonl"))


@pytest.mark.certificate
@pytest.mark.timeout(1800)
def test_ten_kills_are_survived_and_leave_nothing(tmp_path: Path) -> None:
    """Of other cells, at other moments, on each day."""
    first = 10 * date.today().toordinal()
    campaign = Campaign(tmp_path, seed=1)
    done = [campaign.trial(number) for number in range(first, first + 10)]
    print(summary(done))
    assert [trial for trial in done if not trial.survived or trial.left] == []


def test_the_committed_campaign_is_whole() -> None:
    done = trials(RESULTS[-1])
    assert len(done) >= 100
    assert {(trial.victim, trial.moment) for trial in done} == set(CELLS)
    assert [trial for trial in done if not trial.survived or trial.left] == []
