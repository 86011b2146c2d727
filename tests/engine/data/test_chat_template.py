"""Templates of somebody else: the text that transformers makes of them, in work that is bounded and linear."""

# ruff: noqa: E501 - a template a line

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from paralign.engine.data.chat_template import ChatTemplate, TooMuchWork
from paralign.engine.data.prefixes import Prefixes
from paralign.engine.data.render import template_text

NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"é": [1, {"x": None}]}}}]
SIMPLE = "{% for m in messages %}[{{ m.role }}|{{ m.content }}]{% endfor %}"
PROMPT = "{% if add_generation_prompt %}[assistant|{% endif %}"

# Each in the manner of a family of models: where they look at turns, and what they carry from one to the next.
TEMPLATES = {
    "chatml": template_text("chatml") or "",
    "llama3": template_text("llama3") or "",
    "baichuan2": template_text("baichuan2") or "",
    "system first, then a slice": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}"
        "{% set messages = messages[1:] %}{% endif %}" + SIMPLE + PROMPT
    ),
    "looks ahead at tools": (
        "{% for m in messages %}{% if m.role == 'tool' %}{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}"
        "<tools>{% endif %}{{ m.content }}{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}</tools>{% endif %}"
        "{% else %}[{{ m.role }}|{{ m.content or (m.tool_calls | tojson) }}]{% endif %}{% endfor %}" + PROMPT
    ),
    "carries a state": (
        "{% set ns = namespace(tool=false, n=0) %}{% for m in messages %}"
        "{% if ns.tool and m.role != 'tool' %}</tools>{% set ns.tool = false %}{% endif %}"
        "{% if m.role == 'tool' %}{% if not ns.tool %}<tools>{% endif %}{% set ns.tool = true %}{% endif %}"
        "[{{ m.role }}|{{ m.content or '' }}]{% endfor %}{% if ns.tool %}</tools>{% endif %}" + PROMPT
    ),
    "counts turns": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}:{{ m.content }} "
        "{% endfor %}{% if add_generation_prompt %}{{ ns.n + 1 }}:{% endif %}"
    ),
    "a state of each turn": (
        "{% for m in messages %}{% set ns = namespace(text=m.content) %}[{{ m.role }}|{{ ns.text }}]{% endfor %}"
        + PROMPT
    ),
    "a state that holds that of a turn": (
        "{% set outer = namespace(x='') %}{% for m in messages %}{% set ns = namespace(text=m.content) %}"
        "{% set outer.x = ns %}[{{ ns.text }}]{% endfor %}{{ outer.x.text }}" + PROMPT
    ),
    "forgets earlier turns": (
        "{% for m in messages %}[{{ m.content if loop.last or m.role == 'user' else 'gone' }}]{% endfor %}"
        + PROMPT
    ),
    "looks for the last question": (
        "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
        "{% endif %}{% endfor %}{% for m in messages %}[{{ '' if loop.index0 < ns.last and m.role == 'assistant' else "
        "m.content }}]{% endfor %}" + PROMPT
    ),
    "the end depends on the last turn": SIMPLE + "{{ messages[-1].role }}" + PROMPT,
    "a loop in a macro": "{% macro all() %}" + SIMPLE + "{% endmacro %}{{ all() }}" + PROMPT,
    "a loop in a block": "{% set text %}" + SIMPLE + "{% endset %}{{ text | upper }}" + PROMPT,
    "the prompt decides": "{% for m in messages %}{{ 'a' if add_generation_prompt else 'b' }}{% endfor %}",
    "the length decides": "{% if messages | length > 3 %}long{% endif %}" + SIMPLE + PROMPT,
    "filtered": "{% for m in messages if m.role != 'system' %}{{ loop.index }}{{ m.content }}{% endfor %}"
    + PROMPT,
    "filtered, and looks ahead": (
        "{% for m in messages if m.role != 'system' %}{{ m.content }}{{ '' if loop.last else ',' }}{% endfor %}"
        + PROMPT
    ),
    "recursive": (
        "{% for m in messages recursive %}{{ m.content }}{% if m.more %}{{ loop(m.more) }}{% endif %}{% endfor %}"
        + PROMPT
    ),
    "twice": SIMPLE + "--" + SIMPLE + PROMPT,
    "stops early": "{% for m in messages %}{% if loop.index0 == 3 %}{% break %}{% endif %}{{ m.content }}{% endfor %}"
    + SIMPLE,
    "backwards": "{% for m in messages[::-1] %}{{ m.content }}{% endfor %}" + PROMPT,
    "as JSON": "{{ messages | tojson }}" + SIMPLE + PROMPT,
    "in a filter": "{{ messages | map(attribute='content') | join(', ') }}" + PROMPT,
    "marks": "{% for m in messages %}{{ m.role }}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    + PROMPT,
}


def turns(n: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"role": "system", "content": " Be short. "}]
    for i in range(n):
        if i % 5 == 2:
            found += [
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"function": {"name": "add", "arguments": {}}}],
                },
                {"role": "tool", "content": f"{i}"},
                {"role": "tool", "content": "two"},
            ]
        found.append({"role": ("user", "assistant")[i % 2], "content": f"turn {i} é"})
    return found


def render(template: ChatTemplate, messages: Sequence[Mapping[str, Any]], prompted: bool = False) -> str:
    return template.render(messages, TOOLS, NAMES, add_generation_prompt=prompted).text


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_that_of_transformers(name: str):
    template, messages = ChatTemplate(TEMPLATES[name]), turns(12)
    if name in ("llama3", "baichuan2"):  # they have no tools
        messages = [message for message in messages if message["role"] != "tool" and message["content"]]
    for n, prompted in itertools.product((1, 2, 7, len(messages)), (False, True)):
        (theirs,), _ = render_jinja_template(
            conversations=[messages[:n]],
            tools=TOOLS,
            chat_template=TEMPLATES[name],
            add_generation_prompt=prompted,
            **NAMES,
        )
        assert render(template, messages[:n], prompted) == theirs
    (_,), spans = render_jinja_template(
        conversations=[messages], chat_template=TEMPLATES[name], return_assistant_tokens_mask=True, **NAMES
    )
    assert template.render(messages, None, NAMES).marked == (spans[0] if spans else [])


@pytest.mark.parametrize("name", TEMPLATES)
def test_beginnings_are_found_as_if_each_were_rendered(name: str):
    template, messages = ChatTemplate(TEMPLATES[name]), turns(14)
    if name in ("llama3", "baichuan2"):
        messages = [message for message in messages if message["role"] != "tool" and message["content"]]
    n_turns, n_rendered = len(messages), 0

    def counted(n: int, prompted: bool) -> Any:
        nonlocal n_rendered
        n_rendered += 1
        return template.render(messages[:n], TOOLS, NAMES, add_generation_prompt=prompted)

    whole = template.render(messages, TOOLS, NAMES)
    prefixes = Prefixes(counted, whole, n_turns, n_asked=n_turns)
    for text in (whole.text, whole.text[: len(whole.text) // 2] + "other", "other"):
        for n, prompted in itertools.product(range(1, n_turns + 1), (False, True)):
            own = render(template, messages[:n], prompted)
            expected = len(own) if text.startswith(own) else None
            assert prefixes.length(n, text, prompted=prompted) == expected, (n, prompted)
    if name in ("chatml", "llama3", "baichuan2", "system first, then a slice", "carries a state", "filtered"):
        assert n_rendered <= 12


@pytest.mark.parametrize(
    "name",
    [
        "chatml",
        "system first, then a slice",
        "carries a state",
        "a state of each turn",
        "looks ahead at tools",
    ],
)
def test_a_chat_of_thousands_of_turns_takes_a_few_renderings(name: str):
    template, messages = ChatTemplate(TEMPLATES[name]), turns(14)[:4] + turns(2)[1:] * 1000
    asked: list[int] = []

    def counted(n: int, prompted: bool) -> Any:
        asked.append(n)
        return template.render(messages[:n], TOOLS, NAMES, add_generation_prompt=prompted)

    whole = template.render(messages, TOOLS, NAMES)
    prefixes = Prefixes(counted, whole, len(messages), n_asked=2000)
    assert all(
        prefixes.length(n, whole.text, prompted=True)
        for n in range(10, len(messages))
        if messages[n - 1]["role"] == "user"
    )
    assert len(asked) < 6


NEVER_END = {
    "repetition": "{{ 'a' * 10**10 }}",
    "repetition of a constant": "{{ 'a' * 10000000000 }}",
    "a list": "{{ [1] * 10**10 }}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "loops in loops, filtered": "{% set r = range(99999) %}{% for a in r %}{% for b in r if false %}{% endfor %}{% endfor %}",
    "doubling text": "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling by plus": "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling by format": "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(99) %}{% set n.x = '%s%s' % (n.x, n.x) %}{% endfor %}",
    "doubling by replace": "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(99) %}{% set n.x = n.x.replace('a', 'aa') %}{% endfor %}",
    "doubling lists": "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "doubling dicts": "{% set n = namespace(x=1) %}{% for i in range(99) %}{% set n.x = {'a': n.x, 'b': n.x} %}{% endfor %}{{ n.x | tojson }}",
    "doubling by dict()": "{% set n = namespace(x=1) %}{% for i in range(99) %}{% set n.x = dict(a=n.x, b=n.x) %}{% endfor %}{{ n.x == n.x }}",
    "squares": "{% set n = namespace(x=99) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "macros": "{% macro a(n) %}{% if n %}{{ a(n - 1) }}{{ a(n - 1) }}{% endif %}{% endmacro %}{{ a(60) }}",
    "text in a block": "{% set b = 'a' * 99999 %}{% set c %}{% for i in range(99999) %}{{ b }}{% endfor %}{% endset %}",
    "center": "{{ 'a' | center(10000000000) }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "zfill": "{{ 'a'.zfill(1000000000) }}",
    "a width": "{{ '%1000000000d' % 1 }}",
    "a width by format": "{{ '{:1000000000}'.format(1) }}",
    "a computed width": "{{ '{:{}}'.format(1, 1000000000) }}",
    "a width of a filter": "{{ '%*d' | format(1000000000, 1) }}",
    "expandtabs": "{{ ('\t' * 9999).expandtabs(9999999) }}",
    "indent": "{{ ('\n' * 99999) | indent(999999) }}",
    "join": "{{ ('a' * 99999).join(range(99999) | map('string')) }}",
    "replace": "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
    "strip": "{{ ('a' * 9999999).strip('bcdefghijklmnopqrstuvwxyz' * 99999 + 'a') }}",
    "batch": "{{ [1] | batch(1000000000, 0) | list }}",
    "slice": "{{ [1] | slice(1000000000) | list }}",
    "round": "{{ 1.5 | round(1000000000) }}",
    "lipsum": "{{ lipsum(n=1000000) }}",
    "json": "{{ [1] | tojson(indent=1000000000) }}",
    "bytes": "{{ (1).to_bytes(10000000000, 'big') }}",
    **{
        f"{operator} of numbers that are too large": (
            "{% set a = ('v' * 200000) | int(0, 32) %}{% set b = ('v' * 100000) | int(0, 32) %}"
            "{% for i in range(200) %}{% set c = a " + operator + " b %}{% endfor %}"
        )
        for operator in ("//", "%", "-", "+", "*", "/", "**")
    },
    "a large number of the template": "{% set a = 0x"
    + "f" * 90000
    + " %}{% for i in range(99999) %}{% set c = a // 7 %}{% endfor %}",
    "a large number by a call": "{{ (0).from_bytes(('a' * 99999).encode(), 'big') - 1 }}",
    "a date": "{{ strftime_now('%1000000000Y') }}",
    "sums": "{{ [[1]] * 9999 | sum(start=[]) }}",
    "recursion": "{% for x in [1] recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "a call": "{% macro a() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call a() %}" * 30
    + "x"
    + "{% endcall %}" * 30,
    "in text": "{% set b = 'a' * 400000 %}{% for i in range(99999) %}{% for j in range(9) %}{{ 'ab' in b }}{% endfor %}{% endfor %}",
    "nested": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "nested blocks": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "nested loops": "{% for a in [1] %}" * 40 + "{% endfor %}" * 40,
    "a long number": "{{ " + "9" * 6000 + " }}",
    "a long template": "{{ 1 }}" * 100_000,
    "an attack": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "an attack by a namespace": "{% set n = namespace(__class__=1) %}{{ n }}",
    "division": "{{ 1 / 0 }}",
    "types": "{{ messages + 1 }}",
    "another file": "{% include 'x' %}",
    "itself": "{% extends 'x' %}",
    "recursion of macros": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "an assertion": "{{ [1, 2] | map('nothing') | list }}",
    "no name": "{{ nothing.at.all }}",
    "break outside": "{% break %}",
}


@pytest.mark.parametrize("name", NEVER_END)
def test_a_template_that_would_not_end_is_an_error_at_once(name: str):
    start = time.process_time()
    with pytest.raises((TemplateError, TooMuchWork)):
        render(ChatTemplate(NEVER_END[name]), turns(4))
    assert time.process_time() - start < 5


def test_a_long_conversation_may_take_as_long_as_it_is():
    template = ChatTemplate(TEMPLATES["carries a state"])
    assert len(render(template, [{"role": "user", "content": "x" * 30_000_000}])) > 30_000_000
    content = json.dumps([["x"] * 10] * 1000)
    assert render(template, [{"role": "user", "content": content}] * 3000).count("[[") == 3000


def test_many_tools_may_be_written_at_each_of_many_turns():
    """In the manner of Mistral 7B v0.3, whose template writes them at each question that is equal to the last."""
    template = ChatTemplate(
        "{% for m in messages %}{% if m == messages[-1] %}{% for tool in tools %}"
        "{% for key, value in tool.function.items() %}{{ key }}: {{ value | tojson }}{% if not loop.last %}, {% endif %}"
        "{% endfor %}{% endfor %}{% endif %}{{ m.content }}{% endfor %}"
    )
    parameters = {
        "type": "object",
        "properties": {f"a{i}": {"type": "string", "enum": ["x"]} for i in range(8)},
    }
    tools = [
        {"function": {"name": f"f{i}", "description": "Adds. " * 20, "parameters": parameters}}
        for i in range(100)
    ]
    start = time.process_time()
    question, answer = {"role": "user", "content": "and?"}, {"role": "assistant", "content": "so."}
    text = template.render([question, answer, answer, question] * 30, tools, NAMES).text
    assert text.count("parameters") == 60 * 100
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{{ a - b }}{% endfor %}{% endfor %}"
    with pytest.raises(TooMuchWork):
        ChatTemplate(loops).render([question] * 500, tools, NAMES)
    assert time.process_time() - start < 10


def test_a_number_as_large_as_a_record_may_have_is_rendered():
    number = int("9" * 4300)
    assert ChatTemplate("{{ messages[0].n }}").render([{"n": number}], None, NAMES).text == str(number)
