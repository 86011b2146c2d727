"""A tiny byte-level BPE tokenizer and files of conversations."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from paralign.engine.data.config import DataConfig

SPECIAL = [
    "<|begin|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Merges newlines with each other, adds BOS by itself and trims offsets, as Llama 3's tokenizer does."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = ["hello there, how are you?\n\n\n", "fine, thank you.\n\n", "assistant user system\n\n"] * 20
    backend.train_from_iterator(corpus, trainer)
    bos = backend.token_to_id("<|begin|>")
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", bos)]),
        ]
    )
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin|>",
        eos_token="<|im_end|>",
        additional_special_tokens=SPECIAL[1:],
    )
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Writes records to a JSONL file under a name and returns its path."""

    def write(name: str, records: list[object]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return path

    return write


@pytest.fixture
def data_config(tmp_path: Path) -> Callable[..., DataConfig]:
    """A data section with small packs, in one process; keys may be given."""

    def make(train: Path, /, **keys: object) -> DataConfig:
        defaults: dict[str, object] = {
            "train": train,
            "chat_template": "chatml",
            "tokens_per_pack": 64,
            "too_long": "error",
            "cache_dir": tmp_path / "cache",
            "workers": 1,
        }
        return DataConfig.model_validate(defaults | keys)

    return make


def chat(*contents: str) -> dict[str, object]:
    """A record of messages whose roles alternate, from user on."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]}
