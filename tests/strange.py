"""Model directories that no program has written: drawn by a seed, and what is made of them in a few seconds.

A trial is right where all readers either succeed or raise one error that a user can mend.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from paralign.models.errors import ParalignError

from .tiny import random_model, write_tokenizer

SECONDS = 10  # a reader has at most
DEEP = "@deep@"  # stands for brackets within brackets, which json.dumps could not write
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 7, 1.5, 10**9, 10**30, -(10**30), 1e308, float("nan"), float("inf"), "", "64", "x" * 5000,
    "\ud800", "\0", "../..", [], [[]], [None] * 3, {}, {"a": {}}, {"\ud800": 1}, DEEP,
)  # fmt: skip
CONFIG_KEYS = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "dtype",
    "torch_dtype", "tie_word_embeddings", "architectures", "model_type", "id2label", "layer_types", "sliding_window",
    "use_sliding_window", "attention_bias", "hidden_act", "quantization_config", "auto_map", "eos_token_id",
)  # fmt: skip
BYTES = (b"", b"\0" * 64, b"\xff\xfe\0abc", b"[" * 100_000, b"9" * 6000, b"{}", b"[]", b"null", b'"\\ud800"')


def write_models(root: Path) -> list[Path]:
    """A whole file, shards with a manifest, and a sentencepiece tokenizer; each with a tokenizer of its own."""
    import sentencepiece
    import torch

    from paralign.engine.checkpoint.convert import convert

    words = ["<unk>", "hello", "<eos>"]
    plain, sharded, other = (root / name for name in ("plain", "sharded", "other"))
    random_model("qwen3", num_hidden_layers=1, tie_word_embeddings=True).to(torch.bfloat16).save_pretrained(
        plain
    )
    write_tokenizer(plain, words, unk_token="<unk>", eos_token="<eos>", chat_template="{{ messages }}")
    convert(plain, sharded, to="hf", max_shard_size="4KB", progress=False)
    random_model("llama", num_hidden_layers=1).save_pretrained(other)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world 你好"] * 20), model_writer=model, vocab_size=270, byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (other / "tokenizer.model").write_bytes(model.getvalue())
    tokens = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "tokenizer_class": "BaichuanTokenizer"}
    (other / "tokenizer_config.json").write_text(json.dumps(tokens))
    return [plain, sharded, other]


def make_strange(directory: Path, rng: random.Random) -> str:
    """Changes a model directory in one to three ways; returns what was done."""
    return "; ".join(_change(directory, rng) for _ in range(rng.choice((1, 1, 1, 2, 3))))


def _change(directory: Path, rng: random.Random) -> str:
    if rng.random() < 0.35:
        key, value = rng.choice(CONFIG_KEYS), rng.choice(VALUES)
        path = directory / "config.json"
        if (path.exists() and not path.is_file()) or path.is_symlink():
            return "config.json stays"
        try:
            content = json.loads(path.read_text())
            content[key] = value
        except (OSError, ValueError, TypeError, RecursionError):
            content = {key: value}
        path.write_bytes(_dump(content))
        return f"config.json {key}={str(value)[:20]!r}"
    path = rng.choice(sorted(directory.iterdir()))
    if not path.is_file():
        return f"{path.name} stays"
    before = path.read_bytes()
    way = rng.choice((_bytes_changed, _bytes_changed, _json_changed, _json_changed, _replaced))
    if way is _json_changed and path.suffix == ".safetensors":
        way = _header_changed
    after = way(before, rng)
    if after is not None:
        path.write_bytes(after)
        return f"{path.name} {way.__name__}"
    path.unlink()
    kind = rng.choice(("gone", "directory", "pipe", "loop"))
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    return f"{path.name} {kind}"


def _dump(content: Any) -> bytes:
    text = json.dumps(content)
    return text.replace(f'"{DEEP}"', "[" * 50_000 + "]" * 50_000).encode()


def _bytes_changed(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.randint(1, 6)):
        at, way = rng.randrange(len(changed) + 1), rng.random()
        if way < 0.4 and at < len(changed):
            changed[at] = rng.randrange(256)
        elif way < 0.6:
            del changed[at : at + rng.randint(1, 20)]
        elif way < 0.7:
            del changed[at:]
        elif way < 0.9:
            changed[at:at] = bytes(rng.choice(b'{}[]",:\\0\n\xff\x00') for _ in range(rng.randint(1, 8)))
        else:
            changed[at : at + 64] = bytes(64)
    return bytes(changed)


def _json_changed(content: bytes, rng: random.Random) -> bytes:
    """One value of a JSON file is another one, or not there."""
    try:
        whole = json.loads(content)
    except (ValueError, RecursionError):
        return _bytes_changed(content, rng)
    here = whole
    while isinstance(here, dict | list) and here:
        keys = list(here) if isinstance(here, dict) else range(len(here))
        key = rng.choice(keys)
        if not isinstance(here[key], dict | list) or not here[key] or rng.random() < 0.3:
            if rng.random() < 0.15:
                del here[key]
            else:
                here[key] = rng.choice(VALUES)
            return _dump(whole)
        here = here[key]
    return _dump(rng.choice(VALUES))


def _header_changed(content: bytes, rng: random.Random) -> bytes:
    end = 8 + int.from_bytes(content[:8], "little")
    header = _json_changed(content[8:end], rng)
    return len(header).to_bytes(8, "little") + header + content[end:]


def _replaced(content: bytes, rng: random.Random) -> bytes | None:
    return None if rng.random() < 0.4 else rng.choice(BYTES)


def readers(directory: Path, out: Path) -> dict[str, Callable[[], Any]]:
    """What opens a model directory."""
    from paralign.engine.checkpoint.hf import arch_of
    from paralign.engine.checkpoint.source import open_source
    from paralign.engine.checkpoint.verify import check_against_manifest
    from paralign.engine.data.tokenizer import largest_id, open_tokenizer, vocabulary

    return {
        "arch_of": lambda: arch_of(directory),
        "open_source": lambda: open_source(directory),
        "open_tokenizer": lambda: open_tokenizer(directory),
        "largest_id": lambda: largest_id(directory),
        "vocabulary": lambda: vocabulary(directory),
        "verify": lambda: check_against_manifest(directory),
        "convert": lambda: _command("convert", str(directory), str(out)),
    }


def faults_of(directory: Path, out: Path) -> list[str]:
    """What is wrong with the readers of a directory: tracebacks, and what took too long."""
    faults = []
    for name, read in readers(directory, out).items():
        began = time.monotonic()
        try:
            with _limit(2 * SECONDS):
                read()
        except ParalignError as error:
            if not str(error).strip():
                faults.append(f"{name}: an error without words")
        except BaseException as error:
            faults.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
        if (took := time.monotonic() - began) > SECONDS:
            faults.append(f"{name}: {took:.0f} s")
    return faults


def trials(bases: list[Path], place: Path, *, seed: int, n: int) -> Iterator[tuple[str, list[str]]]:
    """Of each of `n` strange directories what was done to it, and its faults."""
    rng = random.Random(seed)
    for trial in range(n):
        directory, out = place / "model", place / "out"
        shutil.copytree(rng.choice(bases), directory)
        done = make_strange(directory, rng)
        yield f"{trial}: {done}", faults_of(directory, out)
        for path in (directory, out):
            shutil.rmtree(path, ignore_errors=True)


def _command(*arguments: str) -> None:
    """`paralign …` in this process; raises AssertionError for another end than one error, or none."""
    from paralign.engine.cli import main

    said, before, code = io.StringIO(), sys.argv, None
    sys.argv = ["paralign", *arguments]
    try:
        with redirect_stderr(said), redirect_stdout(io.StringIO()):
            main()
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = before
    words = said.getvalue()
    words.encode()  # a terminal can show it
    assert code in (0, None) or (code == 2 and words.count("error:") == 1), f"code {code}: {words[:3000]}"
    assert len(words) < 3000, words[:3000]


@contextmanager
def _limit(seconds: int) -> Iterator[None]:
    def too_long(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
