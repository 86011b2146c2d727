import pytest

from paralign.engine.data.turns import Message, ToolCall, read_tools, read_turn, read_turns
from paralign.models.errors import DataError

CALL = {"type": "function", "id": "1", "function": {"name": "add", "arguments": '{"a": 1}'}}


def test_arguments_as_text_become_the_object_that_templates_expect():
    turn = read_turn({"role": "assistant", "content": None, "tool_calls": [CALL]}, "x")
    assert turn == Message("assistant", None, (ToolCall("add", {"a": 1}, "1"),))
    assert turn.for_template() == {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}, "id": "1"}],
    }


def test_content_may_be_left_out_beside_tool_calls_alone():
    assert read_turn({"role": "assistant", "tool_calls": [CALL]}, "x").content is None
    with pytest.raises(DataError, match=r"x: no content"):
        read_turn({"role": "assistant", "tool_calls": []}, "x")


def test_sharegpt_and_openai_spell_the_same_turns():
    sharegpt = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "u"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "a"},
    ]
    openai = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "a"},
    ]
    assert read_turns(sharegpt, "x") == read_turns(openai, "x")
    two = read_turn(
        {"from": "function_call", "value": '[{"name": "a"}, {"name": "b", "arguments": ""}]'}, "x"
    )
    assert [(call.name, call.arguments) for call in two.tool_calls] == [("a", {}), ("b", {})]


def test_what_a_tool_answers_and_what_was_thought_reach_the_template():
    tool = read_turn({"role": "tool", "content": "2", "tool_call_id": "1", "name": "add"}, "x")
    assert tool.for_template() == {"role": "tool", "content": "2", "tool_call_id": "1", "name": "add"}
    thought = read_turn({"role": "assistant", "content": "a", "reasoning_content": "hm"}, "x")
    assert thought.for_template()["reasoning_content"] == "hm"


def test_tools_are_a_list_or_its_json_of_functions_wrapped_or_bare():
    wrapped = {"type": "function", "function": {"name": "add"}}
    assert read_tools([wrapped], "x") == read_tools('[{"name": "add"}]', "x") == (wrapped,)
    assert read_tools(None, "x") == read_tools("", "x") == read_tools("[]", "x") == ()


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"content": "a"}, "x: no role; expected role and content"),
        ({"from": "human"}, "x: no value; expected from and value"),
        ({"value": "a", "form": "human"}, "x: no from; expected from and value; form: did you mean from?"),
        ({"from": "humann", "value": "a"}, 'x.from: read "humann"; expected one of system, human'),
        ({"from": "gpt", "value": None}, "x.value: read null; expected text"),
        (
            {"from": "function_call", "value": "add(1)"},
            'x.value: read "add(1)" (Expecting value); expected a tool',
        ),
        ({"from": "function_call", "value": '{"arguments": {}}'}, "x.value[0]: read {"),
        ({"role": "user", "content": "a", "tool_calls": [CALL]}, "x.tool_calls: read them in a turn of user"),
        ({"role": "assistant", "tool_calls": "add"}, 'x.tool_calls: read "add"; expected a list'),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": "1"}}]},
            "x.tool_calls[0] arguments: read 1; expected an object",
        ),
        (
            {"role": "assistant", "content": "a", "function_call": {"name": "add"}},
            "x function_call: OpenAI's older",
        ),
        ({"role": "tool", "content": "a", "name": 3}, "x.name: read 3; expected text"),
    ],
)
def test_a_wrong_turn_is_named(turn: dict[str, object], message: str):
    with pytest.raises(DataError) as caught:
        read_turn(turn, "x")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("tools", ["add", '{"name": "add"}', [{"function": {}}], ["add"], 3])
def test_wrong_tools_are_named(tools: object):
    with pytest.raises(DataError, match=r"^x.*expected"):
        read_tools(tools, "x")
