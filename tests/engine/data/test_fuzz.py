"""Wrong files and templates end in one clear error each, or are counted; see fuzzing.py."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from paralign.engine.batch import Kind
from paralign.engine.data import sources
from paralign.engine.data.cache import build_or_open
from paralign.engine.data.config import DataConfig
from paralign.models.errors import DataError, ParalignError

from .fuzzing import FILES, GOOD, mutated_records, templates

SECONDS = 10

Make = Callable[..., DataConfig]


def assert_clear(config: DataConfig, tokenizer_dir: Path, kind: Kind = Kind.CONVERSATIONS) -> str | None:
    """Tokenise; the error, which is one of ours, names the file and fits a screen; None where there is none."""
    start = time.process_time()
    try:
        build_or_open(config, config.train, tokenizer_dir, kind, progress=False)
        error = None
    except ParalignError as found:
        error = str(found)
        assert str(config.train[0].path) in error or "chat template" in error or "chat_template" in error
        assert len(error) < 2000
        error.encode()
    assert time.process_time() - start < SECONDS
    shutil.rmtree(config.cache_dir, ignore_errors=True)
    return error


@pytest.mark.parametrize("name", FILES)
def test_a_wrong_file_is_one_error_with_its_line_or_counted(
    name: str, tokenizer_dir: Path, data_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if name in ("a gigantic line", "a gigantic record of a list"):
        monkeypatch.setattr(sources, "LONGEST", 1 << 20)
    path = tmp_path / "a.jsonl"
    path.write_bytes(FILES[name])
    options = {"tokens_per_pack": 4096, "too_long": "drop", "nothing_to_learn": "skip"}
    error = assert_clear(data_config(path, **options), tokenizer_dir)
    if error and name not in ("empty", "newlines", "a list, and more") and "no sample is left" not in error:
        assert re.search(rf"{path}:\d+", error), error
    if FILES[name].startswith(b"["):
        return
    path.write_bytes(GOOD + FILES[name].removesuffix(b"\n") + b"\n" + GOOD)
    config = data_config(path, **options, bad_record="skip")
    cache = build_or_open(config, config.train, tokenizer_dir, progress=False)
    assert len(cache) >= 2
    assert cache.first_bad.startswith(f"{path}:") == bool(sum(cache.n_bad))


def test_wrong_records_are_one_error_each_or_counted(tokenizer_dir: Path, data_config: Make, tmp_path: Path):
    fuzz_records(range(1), 40, tokenizer_dir, data_config, tmp_path)


def test_wrong_templates_are_one_error_each(tokenizer_dir: Path, data_config: Make, tmp_path: Path):
    fuzz_templates(range(1), 25, tokenizer_dir, data_config, tmp_path)


def fuzz_records(
    seeds: range, n: int, tokenizer_dir: Path, data_config: Make, tmp_path: Path
) -> tuple[int, int]:
    """How many files were tried, and how many of them were refused."""
    path, tried, refused = tmp_path / "a.jsonl", 0, 0
    for seed in seeds:
        for i, (name, content) in enumerate(mutated_records(seed, n)):
            path.write_bytes(content)
            kind = (Kind.CONVERSATIONS, Kind.CONVERSATIONS, Kind.PAIRS, Kind.LABELLED)[i % 4]
            bad = ("error", "skip")[i % 2]
            config = data_config(path, too_long="drop", tokens_per_pack=500, bad_record=bad)
            try:
                refused += assert_clear(config, tokenizer_dir, kind) is not None
            except Exception as error:
                raise AssertionError(name) from error
            tried += 1
    return tried, refused


def fuzz_templates(
    seeds: range, n: int, tokenizer_dir: Path, data_config: Make, tmp_path: Path
) -> tuple[int, int]:
    """How many templates were tried, and how many of them were refused."""
    path, template, tried, refused = tmp_path / "a.jsonl", tmp_path / "a.jinja", 0, 0
    path.write_bytes(GOOD * 5)
    for seed in seeds:
        for text in templates(seed, n):
            template.write_text(text, encoding="utf-8", errors="surrogatepass")
            options = {"too_long": "drop", "loss_on": "all", "tokens_per_pack": 500}
            try:
                config = data_config(path, chat_template=template, **options)
                refused += assert_clear(config, tokenizer_dir) is not None
            except Exception as error:
                raise AssertionError(repr(text)) from error
            tried += 1
    return tried, refused


def test_a_template_file_that_is_none_is_an_error(tokenizer_dir: Path, data_config: Make, tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD)
    for content in (b"\xff\xfe", b"{{" * 200_000):
        (tmp_path / "a.jinja").write_bytes(content)
        config = data_config(path, chat_template=tmp_path / "a.jinja")
        with pytest.raises(DataError, match=r"chat.template"):
            build_or_open(config, config.train, tokenizer_dir, progress=False)
    for name in ("x" * 5000, "a\0b"):
        config = data_config(path, chat_template=Path(name))
        with pytest.raises(DataError, match=r"chat_template .*: (no such file|cannot be read)"):
            build_or_open(config, config.train, tokenizer_dir, progress=False)
