"""A sentencepiece tokenizer and Baichuan2's chat format: tokens in their place, reserved ones never split."""

import io
import json

import numpy as np
import pytest
import sentencepiece

from paralign.engine.data.conversation import Conversation, Message
from paralign.engine.data.render import Renderer, template_text
from paralign.engine.data.sentencepiece_tokenizer import SentencePieceTokenizer
from paralign.engine.data.tokenizer import open_tokenizer
from paralign.models.errors import DataError, WeightsError


def train(directory, **options):
    """A BPE model with bytes to fall back on; as Baichuan2's, it keeps text as it is."""
    model = io.BytesIO()
    keeps_text = {"add_dummy_prefix": False, "normalization_rule_name": "identity"}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world, how are you doing today 你好 世界"] * 20),
        model_writer=model,
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        user_defined_symbols=["<reserved_106>", "<reserved_107>"],
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
        **keeps_text | options,
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    tokens = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "BaichuanTokenizer", **tokens}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return train(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(directory):
    return open_tokenizer(directory)


TEXTS = ["hello world", "  two  spaces\n\nlines ", "你好😀 é", "a\u2581b", "<reserved_106>hello</s> x<s>"]


@pytest.mark.parametrize("text", TEXTS)
def test_every_character_has_its_tokens(tokenizer, text):
    encoded = tokenizer.encode(text)
    assert tokenizer.decode(encoded.ids) == text.replace("\u2581", " ")
    covered = np.zeros(len(text), dtype=int)
    for start, end in encoded.offsets:
        assert start < end
        covered[start:end] += 1
    assert (covered >= 1).all()
    assert encoded.offsets == sorted(encoded.offsets)


def test_a_character_of_several_tokens_is_in_the_place_of_each(tokenizer):
    encoded = tokenizer.encode("x😀y")
    assert [span for span in encoded.offsets if span == (1, 2)] == [(1, 2)] * 4


def test_reserved_tokens_are_one_token_and_text_is_split_as_alone(directory, tokenizer):
    alone = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    encoded = tokenizer.encode("<reserved_106>hello world</s>")
    role, eos = alone.piece_to_id("<reserved_106>"), alone.piece_to_id("</s>")
    assert encoded.ids == [role, *alone.encode("hello world"), eos]
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (eos, alone.piece_to_id("<s>"))


def conversation(*turns):
    return Conversation(tuple(Message(role, content) for role, content in turns), "chat.jsonl:1")


def test_baichuan2_chats_learn_answers_and_their_end(directory, tokenizer):
    renderer = Renderer(directory, template_text("baichuan2"), "assistant")
    assert isinstance(renderer.tokenizer, SentencePieceTokenizer)
    sample = renderer(
        conversation(
            ("system", "be kind"),
            ("user", "hello"),
            ("assistant", "你好😀"),
            ("user", "x"),
            ("assistant", "y"),
        )
    )
    text = "be kind<reserved_106>hello<reserved_107>你好😀</s><reserved_106>x<reserved_107>y</s>"
    assert sample.tokens.tolist() == tokenizer.encode(text).ids
    learned = sample.tokens[sample.learned].tolist()
    assert tokenizer.decode(learned) == "你好😀</s>y</s>"
    assert renderer.learns_to_stop(sample)


def test_a_second_system_turn_is_refused(directory):
    renderer = Renderer(directory, template_text("baichuan2"), "assistant")
    with pytest.raises(DataError, match="one system message at the start"):
        renderer(conversation(("user", "a"), ("system", "b"), ("assistant", "c")))


def test_a_model_that_puts_a_space_before_everything(tmp_path):
    tokenizer = open_tokenizer(train(tmp_path, add_dummy_prefix=True))
    encoded = tokenizer.encode("hello world<reserved_107>hello")
    assert encoded.offsets[0][0] == 0
    assert encoded.offsets[-1][1] == len("hello world<reserved_107>hello")


def test_a_model_that_rewrites_text_is_refused(tmp_path):
    tokenizer = open_tokenizer(train(tmp_path, normalization_rule_name="nfkc"))
    with pytest.raises(DataError, match=r"tokenizer.model: does not keep text as it is: 'ﬁ'"):
        tokenizer.encode("ok ﬁ")


def test_a_file_that_is_no_model_is_refused(directory, tmp_path):
    (tmp_path / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1")
    (tmp_path / "tokenizer_config.json").write_bytes((directory / "tokenizer_config.json").read_bytes())
    with pytest.raises(WeightsError, match="not a sentencepiece model"):
        open_tokenizer(tmp_path)
