"""Hundreds of wrong data files and templates; the first of them are in tests/engine/data/test_fuzz.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..engine.data.conftest import data_config, tokenizer_dir
from ..engine.data.test_fuzz import Make, fuzz_records, fuzz_templates

__all__ = ["data_config", "tokenizer_dir"]  # fixtures


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_hundreds_of_wrong_records(tokenizer_dir: Path, data_config: Make, tmp_path: Path) -> None:
    tried, refused = fuzz_records(range(1, 5), 250, tokenizer_dir, data_config, tmp_path)
    print(f"{tried} files of records, {refused} refused, the others tokenised")
    assert tried == 1000
    assert tried / 4 < refused < tried


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_hundreds_of_wrong_templates(tokenizer_dir: Path, data_config: Make, tmp_path: Path) -> None:
    tried, refused = fuzz_templates(range(1, 5), 100, tokenizer_dir, data_config, tmp_path)
    print(f"{tried} templates, {refused} refused, the others rendered")
    assert tried == 400
    assert tried / 4 < refused < tried
