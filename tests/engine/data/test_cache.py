import errno
import fcntl
import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from itertools import islice
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from paralign.engine.data import encode as encode_module
from paralign.engine.data import token_files
from paralign.engine.data.cache import TokenCache, build_or_open, stop_token
from paralign.engine.data.config import DataConfig, SourceConfig
from paralign.engine.data.conversation import read_record
from paralign.engine.data.inspect import inspect_set
from paralign.engine.data.render import Renderer, template_text
from paralign.engine.data.token_files import cache_directory
from paralign.engine.files import whole_file
from paralign.engine.processes.stop import Stop
from paralign.models.errors import DataError

from .conftest import chat
from .test_render import THINKING

Write = Callable[..., Path]
Make = Callable[..., DataConfig]

RECORDS = [chat("hello", "fine, thank you."), chat("how are you?", "fine."), chat("a" * 30, "b" * 30)]


def build(config: DataConfig, tokenizer_dir: Path) -> TokenCache:
    return build_or_open(config, config.train, tokenizer_dir, progress=False)


def test_the_cache_holds_what_the_renderer_makes(tokenizer_dir: Path, write_jsonl: Write, data_config: Make):
    files = (write_jsonl("a.jsonl", RECORDS[:2]), write_jsonl("b.jsonl", RECORDS[2:]))
    config = data_config(files[0], train=files, tokens_per_pack=512)
    cache = build(config, tokenizer_dir)
    renderer = Renderer(tokenizer_dir, template_text("chatml"), "assistant")
    assert len(cache) == 3
    for i, record in enumerate(RECORDS):
        expected = renderer(read_record(record, "messages", ""))
        tokens, weights = cache.group(i).whole()
        assert np.array_equal(tokens, expected.tokens)
        assert np.array_equal(weights, expected.learned)
        assert cache.n_loss[i] == expected.learned.sum()
    assert cache.place(1) == f"{files[0]}:2"
    assert cache.place(2) == f"{files[1]}:1"
    assert cache.max_token == cache.tokens.max()


@pytest.mark.parametrize("loss_on", ["assistant", "last", "all"])
def test_the_stop_token_is_what_ends_answers(
    tokenizer_dir: Path, write_jsonl: Write, data_config: Make, loss_on: str
) -> None:
    config = data_config(write_jsonl("a.jsonl", RECORDS), loss_on=loss_on, tokens_per_pack=512)
    cache = build(config, tokenizer_dir)
    stop = Renderer(tokenizer_dir, template_text("chatml"), "assistant").tokenizer.convert_tokens_to_ids(
        "<|im_end|>"
    )
    assert stop_token(cache) == (None if loss_on == "all" else stop)


def test_tokens_are_made_once_for_a_content_whatever_the_pack(
    tokenizer_dir: Path, write_jsonl: Write, data_config: Make, monkeypatch: pytest.MonkeyPatch
):
    path = write_jsonl("a.jsonl", RECORDS)
    first = build(data_config(path, tokens_per_pack=512), tokenizer_dir)

    def refuse(*_: object) -> Iterator[None]:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(token_files, "encode_sources", refuse)
    moved = path.rename(path.with_name("moved.jsonl"))
    second = build(data_config(moved, tokens_per_pack=500, workers=3), tokenizer_dir)
    assert second.directory == first.directory
    assert second.place(0) == f"{moved}:1"
    assert second.fingerprint != first.fingerprint


def test_what_running_jobs_were_saved_with_stays(
    tokenizer_dir: Path, write_jsonl: Write, data_config: Make, capsys: pytest.CaptureFixture[str]
):
    """The fingerprint of the same samples in the same packs, as 40ec5b1 made it; its caches are made anew."""
    config = data_config(write_jsonl("a.jsonl", RECORDS), tokens_per_pack=512, too_long="drop")
    directory = cache_directory(config, config.train, tokenizer_dir)
    key = directory.name.removesuffix(".v3")
    (config.cache_dir / key).mkdir(parents=True)
    cache = build_or_open(config, config.train, tokenizer_dir, progress=True)
    assert cache.directory == directory
    assert (
        f"{config.cache_dir / key}: tokens in an older form, not read; made anew" in capsys.readouterr().err
    )
    as_before = f"{key} 512 drop error [1.0]"
    assert cache.fingerprint == hashlib.sha256(as_before.encode()).hexdigest()[:32]


def test_whatever_changes_the_tokens_changes_the_key(
    tokenizer_dir: Path, write_jsonl: Write, data_config: Make, tmp_path: Path
):
    path = write_jsonl("a.jsonl", RECORDS)
    other_file = write_jsonl("b.jsonl", RECORDS[::-1])
    other_tokenizer = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_dir, other_tokenizer)
    settings = json.loads((other_tokenizer / "tokenizer_config.json").read_text())
    (other_tokenizer / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|eot_id|>"}))
    config = data_config(path)
    source = SourceConfig(path=path)
    keys = {
        cache_directory(config, [source], tokenizer_dir),
        cache_directory(config, [SourceConfig(path=other_file)], tokenizer_dir),
        cache_directory(config, [source, SourceConfig(path=other_file)], tokenizer_dir),
        cache_directory(config, [SourceConfig(path=path, columns={"messages": "chat"})], tokenizer_dir),
        cache_directory(config, [SourceConfig(path=path, format="messages")], tokenizer_dir),
        cache_directory(config, [source], other_tokenizer),
        cache_directory(data_config(path, loss_on="all"), [source], tokenizer_dir),
        cache_directory(data_config(path, bad_record="skip"), [source], tokenizer_dir),
        cache_directory(data_config(path, chat_template="llama3"), [source], tokenizer_dir),
    }
    assert len(keys) == 9
    weighted = SourceConfig(path=path, name="other", weight=0.5)
    assert cache_directory(config, [weighted], tokenizer_dir) in keys


def test_a_sample_longer_than_a_pack_is_refused_dropped_or_cut(
    tokenizer_dir: Path, write_jsonl: Write, data_config: Make
):
    path = write_jsonl("a.jsonl", [RECORDS[0], chat("hello", "x" * 200), RECORDS[1]])
    with pytest.raises(
        DataError, match=r"a.jsonl:2: 2\d\d tokens; tokens_per_pack is 64 and 1 sample is longer"
    ):
        build(data_config(path), tokenizer_dir)

    dropped = build(data_config(path, too_long="drop"), tokenizer_dir)
    assert (len(dropped), dropped.n_dropped, dropped.n_truncated) == (2, 1, 0)
    assert dropped.place(1) == f"{path}:3"

    cut = build(data_config(path, too_long="truncate"), tokenizer_dir)
    assert (len(cut), cut.n_dropped, cut.n_truncated) == (3, 0, 1)
    tokens, weights = cut.group(1).whole()
    assert len(tokens) == cut.lengths[1] == 64
    assert 0 < cut.n_loss[1] == cut.token_weights[1] == weights.sum() < 64
    assert cut.fingerprint != dropped.fingerprint


def test_a_sample_with_nothing_to_learn_is_refused_or_left_out(
    tokenizer_dir: Path, write_jsonl: Write, data_config: Make
):
    path = write_jsonl("a.jsonl", [RECORDS[0], chat("no answer"), chat("x" * 100, "cut off")])
    with pytest.raises(DataError, match=r"a.jsonl:2: \d+ tokens, none of them to be learned .*like 2 in all"):
        build(data_config(path, too_long="truncate"), tokenizer_dir)
    cache = build(data_config(path, too_long="truncate", nothing_to_learn="skip"), tokenizer_dir)
    assert (len(cache), cache.n_skipped) == (1, 2)
    with pytest.raises(
        DataError, match=r"no sample is left: 3 longer than 4 tokens, 0 with nothing to learn"
    ):
        build(data_config(path, too_long="drop", tokens_per_pack=4), tokenizer_dir)


def test_a_stop_token_that_is_never_learned_is_an_error(
    tokenizer_dir: Path, write_jsonl: Write, data_config: Make, tmp_path: Path
):
    stop, end = "{{- '<|im_end|>' }}\n        ", "{%- endgeneration %}"
    template = template_text("chatml") or ""
    assert stop + end in template
    unstoppable = template.replace(stop + end, end + stop)
    (tmp_path / "mine.jinja").write_text(unstoppable)
    config = data_config(write_jsonl("a.jsonl", RECORDS), chat_template=tmp_path / "mine.jinja")
    with pytest.raises(DataError, match="would never stop"):
        build(config, tokenizer_dir)


def test_a_failed_build_leaves_nothing_and_names_the_line(
    tokenizer_dir: Path, write_jsonl: Write, data_config: Make
):
    config = data_config(write_jsonl("a.jsonl", [RECORDS[0], {"messages": [{"role": "human"}]}]))
    with pytest.raises(DataError, match=r"a.jsonl:2 messages\[0\]: no content"):
        build(config, tokenizer_dir)
    assert list(config.cache_dir.iterdir()) == []


def test_a_cache_directory_that_cannot_be_written_is_an_error(
    tokenizer_dir: Path, write_jsonl: Write, data_config: Make
):
    path = write_jsonl("a.jsonl", RECORDS)
    with pytest.raises(DataError, match=r"^cache_dir .*a.jsonl: the cache cannot be written"):
        build(data_config(path, cache_dir=path), tokenizer_dir)


def test_of_two_builders_the_first_to_end_wins(
    tokenizer_dir: Path, write_jsonl: Write, data_config: Make, monkeypatch: pytest.MonkeyPatch
):
    config = data_config(write_jsonl("a.jsonl", RECORDS), tokens_per_pack=512)
    write = token_files._write

    def overtaken(*arguments: object) -> None:
        write(*arguments)
        monkeypatch.setattr(token_files, "_write", write)
        build(config, tokenizer_dir)

    monkeypatch.setattr(token_files, "_write", overtaken)
    assert len(build(config, tokenizer_dir)) == 3
    assert len(list(config.cache_dir.iterdir())) == 1


FILES = ("meta.json", "tokens.bin", "weights.bin", "samples.npz", "checksums.json")


def damaged(content: bytes, damage: str) -> bytes:
    """Half of it, a bit turned in its middle, or as many zeros."""
    middle = len(content) // 2
    return {
        "half": content[:middle],
        "a bit of": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "zeros for": bytes(len(content)),
    }[damage]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["no", "half", "a bit of", "zeros for"])
def test_a_cache_that_is_not_as_it_was_written_is_made_anew(
    tokenizer_dir: Path,
    write_jsonl: Write,
    data_config: Make,
    damage: str,
    name: str,
    capsys: pytest.CaptureFixture[str],
):
    config = data_config(write_jsonl("a.jsonl", RECORDS), tokens_per_pack=512)
    first = build(config, tokenizer_dir)
    tokens, path = first.tokens, first.directory / name
    before = first.group(1)
    if damage == "no":
        path.unlink()
    else:
        path.write_bytes(damaged(path.read_bytes(), damage))
    again = build(config, tokenizer_dir)
    assert np.array_equal(again.tokens, tokens)
    assert np.array_equal(again.group(1).answers[0].tokens, before.answers[0].tokens)
    assert again.fingerprint == first.fingerprint
    if (damage, name) != ("no", "checksums.json"):  # which is how caches of older versions are
        assert f"{first.directory}: " in (said := capsys.readouterr().err)
        assert "made anew from the data" in said
    assert build(config, tokenizer_dir).n_bad == (0,)
    assert capsys.readouterr().err == ""
    assert [path.name for path in config.cache_dir.iterdir()] == [first.directory.name]


def test_a_cache_of_an_older_version_is_taken_as_it_is_and_says_so(
    tokenizer_dir: Path, write_jsonl: Write, data_config: Make, capsys: pytest.CaptureFixture[str]
):
    config = data_config(write_jsonl("a.jsonl", RECORDS), tokens_per_pack=512)
    first = build(config, tokenizer_dir)
    (first.directory / "checksums.json").unlink()
    before = (first.directory / "tokens.bin").stat().st_ino
    again = build_or_open(config, config.train, tokenizer_dir, progress=True)
    assert (again.directory / "tokens.bin").stat().st_ino == before
    assert "without checksums: not checked" in capsys.readouterr().err


def test_a_conversation_may_be_several_samples_which_the_fingerprint_says(
    tokenizer_dir: Path, write_jsonl: Write, data_config: Make, tmp_path: Path
):
    """Older versions refused or skipped it, under the same key: a run of theirs must not meet other samples."""
    (tmp_path / "mine.jinja").write_text(THINKING)
    answers = [f"<think>\nfine {i}?\n</think>thank you" for i in range(2)]
    records = [chat("hello", answers[0], "and you?", answers[1]), chat("hello", answers[0])]
    path = write_jsonl("a.jsonl", records)
    config = data_config(path, chat_template=tmp_path / "mine.jinja", tokens_per_pack=512, bad_record="skip")
    cache = build(config, tokenizer_dir)
    assert cache.lines.tolist() == [1, 1, 2]
    assert cache.n_bad == (0,)
    key = cache.directory.name.removesuffix(".v3")
    as_before = f"{key} 512 error error [1.0]"
    assert cache.fingerprint == hashlib.sha256(f"{as_before} 4".encode()).hexdigest()[:32]
    text = "".join(
        block.plain for block in inspect_set(config, "train", tokenizer_dir, n_samples=2, coloured=False)
    )
    assert "a (messages, part 2 of 2)" in text


def test_every_file_of_a_cache_is_on_the_disk_before_it_has_its_name(
    tokenizer_dir: Path, write_jsonl: Write, data_config: Make, monkeypatch: pytest.MonkeyPatch
):
    synced: list[str] = []
    rename = os.replace

    def replace(source: Path, target: Path) -> None:
        if Path(target).suffix == ".v3":
            assert {*FILES, Path(source).name} <= set(synced)
        rename(source, target)

    monkeypatch.setattr(whole_file, "sync", lambda path: synced.append(path.name))
    monkeypatch.setattr(os, "replace", replace)
    config = data_config(write_jsonl("a.jsonl", RECORDS), tokens_per_pack=512)
    assert build(config, tokenizer_dir).directory.parent.name == synced[-1] == "cache"


def test_what_takes_long_to_check_says_so(
    tokenizer_dir: Path,
    write_jsonl: Write,
    data_config: Make,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    config = data_config(write_jsonl("a.jsonl", RECORDS), tokens_per_pack=512)
    build(config, tokenizer_dir)
    monkeypatch.setattr(token_files, "SAID", 0)
    build_or_open(config, config.train, tokenizer_dir, progress=True)
    assert re.search(r"\.v3: 0\.0 GB checked in 0 s, [\d.]+ GB/s", capsys.readouterr().err)
    build_or_open(config, config.train, tokenizer_dir, progress=True, verify=False)
    assert capsys.readouterr().err == ""


def test_a_broken_cache_that_cannot_be_made_anew_is_an_error(
    tokenizer_dir: Path, write_jsonl: Write, data_config: Make, monkeypatch: pytest.MonkeyPatch
):
    config = data_config(write_jsonl("a.jsonl", RECORDS), tokens_per_pack=512)
    path = build(config, tokenizer_dir).directory / "tokens.bin"
    path.write_bytes(damaged(path.read_bytes(), "a bit of"))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(token_files, "_write", full)
    with pytest.raises(DataError, match=r"the cache cannot be written: .*No space left"):
        build(config, tokenizer_dir)
    assert path.is_file()


def test_a_cache_that_is_cut_in_a_run_is_an_error_and_no_crash(
    tokenizer_dir: Path, write_jsonl: Write, data_config: Make
):
    records = [chat("hello", "fine. " * 40)] * 300
    cache = build(data_config(write_jsonl("a.jsonl", records), tokens_per_pack=512), tokenizer_dir)
    os.truncate(cache.directory / "tokens.bin", 100)
    with pytest.raises(DataError, match=r"tokens.bin: was cut to [\d,]+ of [\d,]+ bytes since it was opened"):
        cache.group(len(cache) - 1)


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "folder"])
def test_data_that_change_before_they_are_tokenised_are_an_error(
    tokenizer_dir: Path, data_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
):
    """Between the digest that names the cache and the reading: tokens of others would lie under its name."""
    path = tmp_path / {"folder": "saved", "parquet": "a.parquet"}.get(kind, "a.jsonl")

    def write(records: list[object]) -> None:
        if kind in ("jsonl", "json"):
            lines = [json.dumps(record) for record in records]
            text = "\n".join(lines) if kind == "jsonl" else f"[{','.join(lines)}]"
            path.with_suffix(".new").write_text(text)
            path.with_suffix(".new").replace(path)
            return
        table = pa.Table.from_pylist(records)
        if kind == "parquet":
            parquet.write_table(table, path)
            return
        path.mkdir(exist_ok=True)
        with (
            pa.OSFile(str(path / "data.arrow"), "wb") as file,
            pa.ipc.new_stream(file, table.schema) as stream,
        ):
            stream.write_table(table)
        (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))

    write(list(RECORDS))
    digests = token_files.content_of

    def then_change(*arguments: object) -> object:
        found = digests(*arguments)  # type: ignore[arg-type]
        write([chat("hello", "fine, thank YOU."), *RECORDS[1:]])
        return found

    config = data_config(path, tokens_per_pack=512)
    with monkeypatch.context() as patched:
        patched.setattr(token_files, "content_of", then_change)
        with pytest.raises(
            DataError, match=r"a(ved/data)?\.\w+: changed while it was tokenised; .*start again"
        ):
            build(config, tokenizer_dir)
    assert list(config.cache_dir.iterdir()) == []
    assert len(build(config, tokenizer_dir)) == 3


def test_a_pickled_cache_is_the_way_to_open_it_again(
    tokenizer_dir: Path, write_jsonl: Write, data_config: Make
):
    records = [chat("hello", "fine." * 10)] * 200
    cache = build(data_config(write_jsonl("a.jsonl", records), tokens_per_pack=512), tokenizer_dir)
    pickled = pickle.dumps(cache)
    assert len(pickled) < 2000 < cache.tokens.nbytes
    assert np.array_equal(pickle.loads(pickled).tokens, cache.tokens)


def test_processes_give_the_same_samples_up_to_the_same_error(
    tokenizer_dir: Path, write_jsonl: Write, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(encode_module, "CHUNK_BYTES", 1000)
    path = write_jsonl(
        "a.jsonl", [chat("hello", f"{i} " * (i % 7 + 1)) for i in range(99)] + [{"messages": 1}]
    )
    rendering = encode_module.Rendering(tokenizer_dir, template_text("chatml"), "assistant")

    def tokens_until_error(workers: int) -> list[list[int]]:
        found = []
        with pytest.raises(DataError, match=r"a.jsonl:100 messages: read 1"):  # noqa: PT012
            for chunk in encode_module.encode_sources(
                [SourceConfig(path=path)], ["messages"], rendering, workers
            ):
                found.append(chunk.tokens.tolist())
        return found

    alone = tokens_until_error(workers=1)
    assert len(alone) > 5
    assert tokens_until_error(workers=2) == alone


@pytest.mark.timeout(60)
def test_a_worker_that_is_killed_ends_the_others(
    tokenizer_dir: Path, write_jsonl: Write, monkeypatch: pytest.MonkeyPatch
):
    """In a run they do not hear SIGTERM, by which a pool would end them."""
    monkeypatch.setattr(encode_module, "CHUNK_BYTES", 1000)
    path = write_jsonl("a.jsonl", [chat("hello", f"{i} " * 20) for i in range(5000)])
    rendering = encode_module.Rendering(tokenizer_dir, template_text("chatml"), "assistant")
    others = set(active_children())
    with Stop():
        stream = encode_module.encode_sources([SourceConfig(path=path)], ["messages"], rendering, 2)
        assert len(list(islice(stream, 3))) == 3
        workers = list(set(active_children()) - others)
        assert len(workers) == 2
        os.kill(workers[0].pid or 0, signal.SIGKILL)
        with pytest.raises(DataError, match="a process that tokenises was ended from outside"):
            list(stream)
    assert set(active_children()) == others


def test_what_a_killed_build_has_left_is_removed(tokenizer_dir: Path, write_jsonl: Write, data_config: Make):
    config = data_config(write_jsonl("a.jsonl", RECORDS), tokens_per_pack=512)
    directory = cache_directory(config, config.train, tokenizer_dir)
    for name in ("killed", "at work"):
        (directory.parent / f".{directory.name}.{name}").mkdir(parents=True)
    (directory.parent / f".{directory.name}.killed.lock").touch()
    with (directory.parent / f".{directory.name}.at work.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        build(config, tokenizer_dir)
    left = {path.name.removeprefix(f".{directory.name}.") for path in config.cache_dir.iterdir()}
    assert left == {directory.name, "at work", "at work.lock"}


def test_the_room_is_entered_without_transformers_or_megatron():
    program = "import sys, paralign.engine.data as _; print(*(m for m in sys.modules if m.count('.') == 0))"
    modules = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert not {"transformers", "tokenizers", "megatron", "rich"} & set(modules.split())


def test_a_template_in_the_folder_of_others_changes_the_key(
    tokenizer_dir: Path, write_jsonl: Write, data_config: Make, tmp_path: Path
):
    config = data_config(write_jsonl("a.jsonl", RECORDS))
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_dir, tokenizer)
    keys = [cache_directory(config, config.train, tokenizer)]
    assert keys == [cache_directory(config, config.train, tokenizer_dir)]
    (tokenizer / "additional_chat_templates").mkdir()
    for text in ("{{ messages }}", "{{ tools }}"):
        (tokenizer / "additional_chat_templates" / "tool_use.jinja").write_text(text)
        keys.append(cache_directory(config, config.train, tokenizer))
    assert len(set(keys)) == 3


def test_a_date_in_the_template_stays_where_tokens_are_made_anew(
    tokenizer_dir: Path,
    write_jsonl: Write,
    data_config: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    template = tmp_path / "dated.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') }}" + (template_text("chatml") or ""))
    config = data_config(write_jsonl("a.jsonl", RECORDS), chat_template=template, tokens_per_pack=512)

    class Days(datetime):
        today = datetime(2026, 1, 5, 12)

        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
            return cls.today

    monkeypatch.setattr(token_files, "datetime", Days)
    first = build(config, tokenizer_dir)
    tokens = first.tokens
    Days.today += timedelta(days=300)
    for file in ("tokens.bin", "meta.json"):
        path = first.directory / file
        path.write_bytes(damaged(path.read_bytes(), "half"))
        assert np.array_equal(build(config, tokenizer_dir).tokens, tokens)
    shutil.rmtree(first.directory)
    assert not np.array_equal(build(config, tokenizer_dir).tokens, tokens)


def test_tokens_of_a_template_that_older_versions_read_otherwise_are_made_anew(
    tokenizer_dir: Path, write_jsonl: Write, data_config: Make, tmp_path: Path
):
    """They left out the reasoning; a run without any goes on, and one with it is told that its samples are others."""
    template = tmp_path / "thinking.jinja"
    template.write_text((template_text("chatml") or "") + "{{ messages[-1].thinking }}")
    plain = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    reasoned = {
        "messages": [plain["messages"][0], {"role": "assistant", "content": "b", "reasoning_content": "c"}]
    }
    for record, end in ((plain, ""), (reasoned, " 1")):
        config = data_config(write_jsonl("a.jsonl", [record]), chat_template=template, tokens_per_pack=512)
        cache = build(config, tokenizer_dir)
        assert cache.directory.name.endswith(".v3b")
        as_before = f"{cache.directory.name.removesuffix('.v3b')} 512 error error [1.0]"
        assert cache.fingerprint == hashlib.sha256(f"{as_before}{end}".encode()).hexdigest()[:32]
