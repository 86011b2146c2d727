import re
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from paralign.engine.data.conversation import Conversation, read_record
from paralign.engine.data.render import Rendered, Renderer, template_text
from paralign.models.errors import DataError, WeightsError

from .conftest import chat

TURNS = ("how are you?", "fine.\nand you?", "fine, too", " thank you é.\n\n")


def conversation(*contents: str) -> Conversation:
    return read_record(chat(*contents), "messages", "chats.jsonl:1")


def learned_text(renderer: Renderer, sample: Rendered) -> str:
    return renderer.tokenizer.decode(sample.tokens[sample.learned])


def without_marks(template: str) -> str:
    return re.sub(r"\{%-\s*(end)?generation\s*%\}", "", template)


@pytest.mark.parametrize(("name", "stop"), [("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>")])
@pytest.mark.parametrize("marked", [True, False], ids=["generation", "prefixes"])
def test_assistant_turns_are_learned_with_their_stop_token(
    tokenizer_dir: Path, name: str, stop: str, marked: bool
):
    template = template_text(name) or ""
    renderer = Renderer(tokenizer_dir, template if marked else without_marks(template), "assistant")
    sample = renderer(conversation(*TURNS))
    answers = [text.strip() if name == "llama3" else text for text in TURNS[1::2]]
    assert learned_text(renderer, sample) == "".join(text + stop for text in answers)
    assert renderer.learns_to_stop(sample)
    assert sample.tokens.dtype == np.int32


@pytest.mark.parametrize("name", ["chatml", "llama3"])
def test_tokens_are_those_of_the_whole_text_with_one_bos(tokenizer_dir: Path, name: str):
    template = template_text(name)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    messages = chat(*TURNS)["messages"]
    expected = tokenizer.apply_chat_template(messages, chat_template=template, return_dict=True)["input_ids"]
    sample = Renderer(tokenizer_dir, template, "assistant")(conversation(*TURNS))
    assert sample.tokens.tolist() == expected
    assert list(sample.tokens).count(tokenizer.bos_token_id) == (1 if name == "llama3" else 0)


@pytest.mark.parametrize("marked", [True, False], ids=["generation", "prefixes"])
def test_a_token_that_joins_template_and_answer_is_learned(tokenizer_dir: Path, marked: bool):
    template = template_text("chatml") or ""
    renderer = Renderer(tokenizer_dir, template if marked else without_marks(template), "assistant")
    # One token joins the template's newline with the answer's: a prefix has other tokens than the whole.
    sample = renderer(conversation("hello", "\n\nfine."))
    assert learned_text(renderer, sample) == "\n\n\nfine.<|im_end|>"


def test_loss_on_last_learns_the_last_answer_alone(tokenizer_dir: Path):
    for template in (template_text("chatml"), without_marks(template_text("chatml") or "")):
        renderer = Renderer(tokenizer_dir, template, "last")
        sample = renderer(conversation(*TURNS, "and now?", "bye"))
        assert learned_text(renderer, sample) == "bye<|im_end|>"


def test_loss_on_all_learns_all_but_the_first_token_and_bos(tokenizer_dir: Path):
    sample = Renderer(tokenizer_dir, template_text("llama3"), "all")(conversation(*TURNS))
    assert not sample.learned[0]
    assert sample.learned[1:].all()
    doubled = "{{ 'hello' + bos_token + messages[0].content }}"
    sample = Renderer(tokenizer_dir, doubled, "all")(conversation("there"))
    bos = AutoTokenizer.from_pretrained(tokenizer_dir).bos_token_id
    assert np.array_equal(sample.learned[1:], sample.tokens[1:] != bos)


def test_a_conversation_without_answer_has_nothing_to_learn(tokenizer_dir: Path):
    for template in (template_text("chatml"), without_marks(template_text("chatml") or "")):
        assert not Renderer(tokenizer_dir, template, "assistant")(conversation("hello?")).learned.any()


FORGETFUL = """
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {{- message.content if loop.last or message.role == 'user' else 'gone' }}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""


def test_a_template_that_changes_earlier_turns_is_an_error_where_they_are_learned(tokenizer_dir: Path):
    with pytest.raises(
        DataError, match=r"^chats.jsonl:1: the chat template changes earlier turns.*messages\[1\]"
    ):
        Renderer(tokenizer_dir, FORGETFUL, "assistant")(conversation(*TURNS))
    renderer = Renderer(tokenizer_dir, FORGETFUL, "last")
    assert learned_text(renderer, renderer(conversation(*TURNS))) == TURNS[-1] + "<|im_end|>"


def test_a_marked_template_that_changes_earlier_turns_is_an_error_too(tokenizer_dir: Path):
    content = "{{- message.content if loop.last or message.role == 'user' else 'gone' }}"
    assert content in FORGETFUL
    marked = FORGETFUL.replace(content, "{%- generation -%}" + content + "{%- endgeneration -%}")
    with pytest.raises(DataError, match=r"the chat template changes earlier turns.*messages\[1\]"):
        Renderer(tokenizer_dir, marked, "assistant")(conversation(*TURNS))
    assert Renderer(tokenizer_dir, marked, "last")(conversation(*TURNS)).learned.any()


def test_an_answer_that_the_template_forgets_to_mark_is_an_error(tokenizer_dir: Path):
    template = (template_text("chatml") or "").replace(
        "message.role == 'assistant' %}", "message.role == 'assistant' and loop.first %}"
    )
    with pytest.raises(DataError, match=r"the chat template marks nothing of messages\[1\]"):
        Renderer(tokenizer_dir, template, "assistant")(conversation(*TURNS))


@pytest.mark.parametrize("marked", [True, False], ids=["generation", "prefixes"])
def test_only_the_completion_of_a_prompt_is_learned(tokenizer_dir: Path, marked: bool):
    template = template_text("chatml") or ""
    renderer = Renderer(tokenizer_dir, template if marked else without_marks(template), "assistant")
    messages = chat(*TURNS)["messages"]
    assert isinstance(messages, list)
    record = {"prompt": messages[:3], "completion": messages[3:]}
    sample = renderer(read_record(record, "prompt_completion", "x"))
    assert learned_text(renderer, sample) == TURNS[-1] + "<|im_end|>"
    assert np.array_equal(sample.tokens, renderer(conversation(*TURNS)).tokens)


CALLING = {
    "messages": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "greet", "arguments": {"to": "é"}}]},
        {"role": "tool", "content": "done"},
        {"role": "assistant", "content": "fine"},
    ],
    "tools": [{"name": "greet", "parameters": {}}],
}


@pytest.mark.parametrize("marked", [True, False], ids=["generation", "prefixes"])
def test_tool_calls_are_learned_and_definitions_and_answers_are_not(tokenizer_dir: Path, marked: bool):
    template = template_text("chatml") or ""
    renderer = Renderer(tokenizer_dir, template if marked else without_marks(template), "assistant")
    sample = renderer(read_record(CALLING, "messages", "x"))
    call = '<tool_call>\n{"name": "greet", "arguments": {"to": "é"}}\n</tool_call><|im_end|>'
    assert learned_text(renderer, sample) == call + "fine<|im_end|>"
    text = renderer.tokenizer.decode(sample.tokens)
    assert text.startswith("<|im_start|>system\nBe short.\n\n")
    assert '{"type": "function", "function": {"name": "greet", "parameters": {}}}' in text
    assert text.count("<|im_start|>system") == 1


def test_a_template_that_drops_tools_is_an_error(tokenizer_dir: Path):
    with pytest.raises(DataError, match=r"x: the chat template leaves out the tool greet"):
        Renderer(tokenizer_dir, template_text("llama3"), "assistant")(read_record(CALLING, "messages", "x"))


def test_a_pad_token_equal_to_eos_does_not_hide_the_stop(tokenizer_dir: Path, tmp_path: Path):
    same = tmp_path / "tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(same)
    renderer = Renderer(same, template_text("chatml"), "assistant")
    sample = renderer(conversation("hello", "fine"))
    assert renderer.tokenizer.pad_token_id == sample.tokens[sample.learned][-1]
    assert renderer.learns_to_stop(sample)


def test_pieces_are_the_text_token_by_token(tokenizer_dir: Path):
    renderer = Renderer(tokenizer_dir, template_text("chatml"), "assistant")
    sample = renderer(conversation("hello", "日本 é"))  # characters of several tokens
    pieces = renderer.pieces(sample)
    assert "".join(text for text, _ in pieces) == renderer.tokenizer.decode(sample.tokens)
    assert "".join(text for text, learned in pieces if learned) == "日本 é<|im_end|>"
    assert len(pieces) < len(sample.tokens)


def test_what_the_template_refuses_is_an_error_with_its_words(tokenizer_dir: Path):
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(
        DataError, match=r"^chats.jsonl:1: .*refuses the turns \(user\): roles must alternate"
    ):
        Renderer(tokenizer_dir, template, "assistant")(conversation("hello"))


def test_a_template_without_special_stop_token_does_not_teach_to_stop(tokenizer_dir: Path):
    template = (template_text("chatml") or "").replace("<|im_end|>", "###")
    renderer = Renderer(tokenizer_dir, template, "assistant")
    assert not renderer.learns_to_stop(renderer(conversation(*TURNS)))


def test_an_unknown_template_is_an_error_with_a_proposal():
    with pytest.raises(DataError, match=r"chat_template lama3: no such file; .*did you mean llama3\?"):
        template_text(Path("lama3"))


def test_a_template_may_be_a_file(tmp_path: Path):
    (tmp_path / "mine.jinja").write_text("{{ messages }}")
    assert template_text(tmp_path / "mine.jinja") == "{{ messages }}"


def test_a_directory_without_tokenizer_or_template_is_an_error(tokenizer_dir: Path, tmp_path: Path):
    with pytest.raises(WeightsError, match="no such directory"):
        Renderer(tmp_path / "absent", "", "all")
    with pytest.raises(WeightsError, match="no tokenizer can be opened"):
        Renderer(tmp_path, "", "all")
    with pytest.raises(DataError, match="no chat template; set chat_template"):
        Renderer(tokenizer_dir, None, "all")
