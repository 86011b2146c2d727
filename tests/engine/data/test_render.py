import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from paralign.engine.data.conversation import Conversation, read_record
from paralign.engine.data.render import Rendered, Renderer, template_text
from paralign.models.errors import DataError, RecipeError, WeightsError

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


@pytest.mark.parametrize("marked", [True, False], ids=["generation", "prefixes"])
def test_an_answer_that_later_turns_change_is_learned_in_a_sample_of_its_own(
    tokenizer_dir: Path, marked: bool
):
    content = "{{- message.content if loop.last or message.role == 'user' else 'gone' }}"
    assert content in FORGETFUL
    whole = "{%- generation -%}" + content + "{{- '<|im_end|>' }}{%- endgeneration -%}"
    template = FORGETFUL.replace(content, whole).replace("<|im_end|>\n'", "\n'") if marked else FORGETFUL
    for turns in (TURNS, (*TURNS, "and what follows?")):
        renderer = Renderer(tokenizer_dir, template, "assistant")
        samples = renderer.samples(conversation(*turns))
        texts = [renderer.tokenizer.decode(sample.tokens) for sample in samples]
        assert [learned_text(renderer, sample) for sample in samples] == [
            TURNS[1] + "<|im_end|>",
            TURNS[3] + "<|im_end|>",
        ]
        assert TURNS[1] in texts[0]
        assert TURNS[2] not in texts[0]
        assert "gone" in texts[1]
        assert texts[1].strip().endswith(TURNS[3] + "<|im_end|>")
        assert renderer.n_remade > 0


# In the manner of DeepSeek-R1: the prompt begins the reasoning, and what was said is shown without it.
THINKING = """
{%- for message in messages %}
    {%- if message.role == 'user' %}{{- '<|im_start|>' + message.content }}{%- endif %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- if '</think>' in content %}{%- set content = content.split('</think>')[-1] %}{%- endif %}
        {{- '<|begin|>' + content + '<|im_end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|begin|><think>\n' }}{%- endif %}"""
# In the manner of Qwen3: the last answer is shown with its reasoning, even an empty one.
THINKING_LAST = THINKING.replace(
    "set content = content.split('</think>')[-1]",
    "set content = content if loop.last else content.split('</think>')[-1]",
)


@pytest.mark.parametrize("template", [THINKING, THINKING_LAST])
def test_reasoning_that_the_prompt_begins_is_learned_behind_it(tokenizer_dir: Path, template: str):
    answers = [f"<think>\nfine {i}?\n</think>\n\nthank you {i}" for i in range(3)]
    for n in (1, 3):
        contents = [text for i in range(n) for text in (f"how are you {i}?", answers[i])]
        renderer = Renderer(tokenizer_dir, template, "assistant")
        samples = renderer.samples(conversation(*contents))
        assert len(samples) == n
        for i, sample in enumerate(samples):
            behind = answers[i].removeprefix("<think>\n") + "<|im_end|>"
            assert learned_text(renderer, sample) == behind
            asked = renderer.tokenizer.apply_chat_template(
                chat(*contents[: 2 * i + 1])["messages"],  # type: ignore[arg-type]
                chat_template=template,
                add_generation_prompt=True,
                tokenize=False,
            )
            assert renderer.tokenizer.decode(sample.tokens) == asked + behind
        (last,) = [Renderer(tokenizer_dir, template, "last").samples(conversation(*contents))]
        assert [sample.tokens.tolist() for sample in last] == [samples[-1].tokens.tolist()]


def test_an_answer_without_the_reasoning_that_the_prompt_begins_is_an_error_with_a_remedy(
    tokenizer_dir: Path,
):
    renderer = Renderer(tokenizer_dir, THINKING, "assistant")
    with pytest.raises(
        DataError,
        match=r"^chats.jsonl:1: the generation prompt .* ends with '<think>\\n', and the content of messages\[1\] "
        r"does not begin with it.*; begin the content with '<think>\\n' and the reasoning, even an empty one",
    ):
        renderer.samples(conversation("hello", "fine"))
    with pytest.raises(DataError, match=r"ends with '<think>\\n'"):  # not with 'think>', which is no remedy
        renderer.samples(conversation("hello", "<b>fine</b>"))
    (sample,) = renderer.samples(conversation("hello", "<think>\n\n</think>\n\nfine"))  # the remedy
    assert learned_text(renderer, sample) == "\n</think>\n\nfine<|im_end|>"


def test_a_template_that_would_not_end_is_an_error_of_the_recipe(tokenizer_dir: Path):
    template = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(RecipeError, match=r"^chats.jsonl:1: the chat template does not come to its end"):
        Renderer(tokenizer_dir, template, "all").samples(conversation("hello", "fine"))
    with pytest.raises(DataError, match="the chat template is no jinja: Encountered unknown tag 'nothing'"):
        Renderer(tokenizer_dir, "{% nothing %}", "all")


def test_a_chat_of_thousands_of_turns_is_learned_turn_by_turn(tokenizer_dir: Path):
    for template in (template_text("chatml") or "", without_marks(template_text("llama3") or "")):
        renderer = Renderer(tokenizer_dir, template, "assistant")
        start = time.process_time()
        (sample,) = renderer.samples(conversation(*("how are you?", "fine") * 2000))
        assert time.process_time() - start < 10
        assert learned_text(renderer, sample).count("fine") == 2000
        few = renderer.samples(conversation(*("how are you?", "fine") * 2))[0]
        assert np.array_equal(sample.tokens[: len(few.tokens) - 1], few.tokens[:-1])
        assert np.array_equal(sample.learned[: len(few.tokens) - 1], few.learned[:-1])


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


SAID = "{% for m in messages %}<|im_start|>{{ m.content or m.tool_calls[0].function.name }}<|im_end|>{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>{% endif %}"
OF_TOOLS = "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}" + SAID + PROMPT


def with_templates(tokenizer_dir: Path, tmp_path: Path, **texts: str) -> Path:
    """The tokenizer with templates under some names, as transformers saves them."""
    directory = tmp_path / "_".join(texts)
    shutil.copytree(tokenizer_dir, directory)
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    settings["chat_template"] = [{"name": name, "template": text} for name, text in texts.items()]
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def test_of_several_templates_tools_have_their_own(tokenizer_dir: Path, tmp_path: Path):
    several = with_templates(tokenizer_dir, tmp_path, default="no tools" + SAID + PROMPT, tool_use=OF_TOOLS)
    renderer = Renderer(several, None, "assistant")
    for record in (CALLING, chat("hello", "fine")):
        conversation_ = read_record(record, "messages", "x")
        tools = list(conversation_.tools) or None
        (sample,) = renderer.samples(conversation_)
        assert renderer.tokenizer.decode(sample.tokens) == AutoTokenizer.from_pretrained(
            several
        ).apply_chat_template(
            [message.for_template() for message in conversation_.messages], tools=tools, tokenize=False
        )
    assert renderer.n_remade == 1  # the tools, which older versions gave to the other template


def test_several_templates_without_a_default_are_an_error_with_a_remedy(tokenizer_dir: Path, tmp_path: Path):
    several = with_templates(tokenizer_dir, tmp_path, rag=SAID, tool_use=OF_TOOLS)
    with pytest.raises(
        DataError,
        match=r"its chat templates are rag, tool_use, and none is default; write .* data.chat_template",
    ):
        Renderer(several, None, "assistant")
    assert Renderer(several, OF_TOOLS, "assistant").samples(conversation("hello", "fine"))


# In the manner of Mistral 7B v0.3: the system's text stands in the last turn, if that is a question.
MOVES_SYSTEM = """
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}
    {%- set messages = messages[1:] %}{% endif %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{{ '<|im_start|>' + ((system + ' ') if loop.last and system else '') + m.content }}
    {%- else %}{{ ' ' + m.content + '<|im_end|>' }}{% endif %}
{%- endfor %}"""


@pytest.mark.parametrize("system", ["be kind", "be kind " * 40])
def test_a_template_that_moves_the_system_turn_is_an_error_with_a_remedy(tokenizer_dir: Path, system: str):
    renderer = Renderer(tokenizer_dir, MOVES_SYSTEM, "assistant")
    messages: list[dict[str, str]] = chat(*TURNS)["messages"]  # type: ignore[assignment]
    with pytest.raises(
        DataError,
        match=r"moves the system turn.* once messages\[4\] follows.*begin the first question with its text",
    ):
        renderer.samples(
            read_record({"messages": [{"role": "system", "content": system}, *messages]}, "messages", "x")
        )
    (sample,) = renderer.samples(conversation(system + TURNS[0], *TURNS[1:]))  # the remedy
    assert learned_text(renderer, sample).endswith(TURNS[3] + "<|im_end|>")


def test_reasoning_is_given_under_the_names_of_transformers(tokenizer_dir: Path):
    # In the manner of gpt-oss.
    template = (
        "{% for m in messages %}<|im_start|>{% if m.thinking %}({{ m.thinking }}){% endif %}{{ m.content }}<|im_end|>"
        "{% endfor %}" + PROMPT
    )
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "fine", "reasoning_content": "am I?"},
    ]
    renderer = Renderer(tokenizer_dir, template, "assistant")
    (sample,) = renderer.samples(read_record({"messages": messages}, "messages", "x"))
    ((theirs,), _) = render_jinja_template(conversations=[messages], chat_template=template)
    assert renderer.tokenizer.decode(sample.tokens) == theirs
    assert learned_text(renderer, sample) == "(am I?)fine<|im_end|>"
    assert renderer.n_remade == 1


@pytest.mark.parametrize("arguments", [{"a": "é"}, '{"a":  "\\u00e9"}'])
def test_a_template_that_wants_arguments_as_text_gets_them(tokenizer_dir: Path, arguments: object):
    # In the manner of DeepSeek-V3.
    template = (
        "{% for tool in tools %}{{ tool.function.name }}{% endfor %}{% for m in messages %}<|im_start|>"
        "{% for call in m.tool_calls or [] %}{{ call.function.name + ' ' + call.function.arguments }}{% endfor %}"
        "{{ m.content or '' }}<|im_end|>{% endfor %}" + PROMPT
    )
    function = {"name": "add", "arguments": arguments}
    turns = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "tool_calls": [{"function": function}]},
    ]
    record = {"messages": turns, "tools": [{"name": "add"}]}
    renderer = Renderer(tokenizer_dir, template, "assistant")
    (sample,) = renderer.samples(read_record(record, "messages", "x"))
    text = arguments if isinstance(arguments, str) else '{"a": "é"}'
    assert learned_text(renderer, sample) == f"add {text}<|im_end|>"
    refusing = "{{ raise_exception('no calls') }}"
    with pytest.raises(DataError, match="no calls"):
        Renderer(tokenizer_dir, refusing, "assistant").samples(read_record(record, "messages", "x"))
