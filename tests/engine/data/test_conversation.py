import pytest

from paralign.engine.data.conversation import detect_format, read_record, rename
from paralign.engine.data.turns import Message, ToolCall
from paralign.models.errors import DataError

PLACE = "chats.jsonl:14"


def test_messages_are_read_with_text_parts_joined():
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    record = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "Hi"}]}
    conversation = read_record(record, "messages", PLACE)
    assert conversation.messages == (Message("user", "Hello"), Message("assistant", "Hi"))
    assert conversation.place == PLACE


def test_alpaca_puts_system_and_history_before_the_question_and_its_input():
    record = {
        "instruction": "Translate.",
        "input": "Haus",
        "output": "house",
        "system": "Be short.",
        "history": [["Ready?", "Yes."]],
    }
    assert read_record(record, "alpaca", PLACE).messages == (
        Message("system", "Be short."),
        Message("user", "Ready?"),
        Message("assistant", "Yes."),
        Message("user", "Translate.\nHaus"),
        Message("assistant", "house"),
    )


def test_an_empty_input_adds_no_line():
    record = {"instruction": "Sing.", "input": "", "output": "La"}
    assert read_record(record, "alpaca", PLACE).messages[0].content == "Sing."


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "asistant", "content": "b"}]},
            f'{PLACE} messages[1].role: read "asistant"; expected system, user, assistant or tool; '
            "did you mean assistant?",
        ),
        ({"messages": []}, f"{PLACE} messages: read []; expected a list of at least one message"),
        ({"messages": [{"role": "user"}]}, f"{PLACE} messages[0]: no content; expected role and content"),
        (
            {"messages": [{"role": "user", "contents": "a"}]},
            f"{PLACE} messages[0]: no content; expected role and content; contents: did you mean content?",
        ),
        (
            {"messages": [{"role": "assistant", "content": None}]},
            f"{PLACE} messages[0].content: read null; expected text",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
            f'{PLACE} messages[0].content[0]: read {{"type": "image", "url": "x"}}; '
            'expected {"type": "text", "text": …}',
        ),
        (
            {"messages": [{"role": "assistant", "content": "a", "weight": 1}]},
            f"{PLACE} messages[0] weight: losses are not weighted by turn; `loss_on` chooses the turns; "
            "remove the key, or the record",
        ),
        (
            {"mesages": []},
            f"{PLACE}: read the keys mesages; expected an object with messages, or with conversations, or with "
            "instruction and output, or with prompt and completion; mesages: did you mean messages?",
        ),
        (
            {"question": "a", "response": "b"},
            f"{PLACE}: read the keys question, response; expected an object with messages, or with "
            "conversations, or with instruction and output, or with prompt and completion; see `columns`",
        ),
        (
            {"instruction": "a", "output": "b"},
            f"{PLACE}: read a record of format alpaca in a file of format messages; "
            "expected one format per file; split the file",
        ),
        (
            [1],
            f"{PLACE}: read [1]; expected an object with messages, or with conversations, or with instruction "
            "and output, or with prompt and completion; see `columns`",
        ),
    ],
)
def test_an_error_names_place_value_rule_and_remedy(record: object, message: str):
    with pytest.raises(DataError) as caught:
        read_record(record, "messages", PLACE)
    assert str(caught.value) == message


def test_a_long_record_is_cut_in_the_message():
    with pytest.raises(DataError) as caught:
        detect_format({"text": "x" * 10_000}, PLACE)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("history", ["a", [["only a question"]], [[1, 2]]])
def test_a_malformed_history_is_named(history: object):
    record = {"instruction": "a", "output": "b", "history": history}
    with pytest.raises(DataError, match=rf"^{PLACE} history"):
        read_record(record, "alpaca", PLACE)


TOOLS = [{"name": "add"}]
CALLING = {"role": "assistant", "tool_calls": [{"function": {"name": "add"}}]}


def turns(*roles: str) -> list[dict[str, object]]:
    return [{"role": role, "content": role} if role != "calling" else CALLING for role in roles]


def test_all_formats_write_the_same_conversation():
    records = {
        "messages": {"messages": turns("system", "user", "assistant")},
        "sharegpt": {
            "system": "system",
            "conversations": [{"from": "human", "value": "user"}, {"from": "gpt", "value": "assistant"}],
        },
        "alpaca": {"system": "system", "instruction": "user", "output": "assistant"},
        "prompt_completion": {"system": "system", "prompt": "user", "completion": "assistant"},
    }
    found = {
        name: read_record(record, detect_format(record, PLACE), PLACE) for name, record in records.items()
    }
    assert {name: detect_format(record, PLACE) for name, record in records.items()} == {n: n for n in records}
    assert len({conversation.messages for conversation in found.values()}) == 1
    assert {name: conversation.n_context for name, conversation in found.items()} == {
        "messages": 0,
        "sharegpt": 0,
        "alpaca": 0,
        "prompt_completion": 2,
    }


def test_prompt_and_completion_may_be_turns_of_either_spelling():
    record = {
        "prompt": turns("system", "user", "assistant", "user"),
        "completion": {"from": "gpt", "value": "assistant"},
    }
    conversation = read_record(record, "prompt_completion", PLACE)
    assert [message.role for message in conversation.messages] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    assert conversation.n_context == 4


def test_columns_give_our_names_to_theirs():
    record = {"conversations": turns("user"), "chosen": turns("assistant"), "messages": "other"}
    columns = {"prompt": "conversations", "completion": "chosen"}
    assert rename(record, columns) == {
        "prompt": turns("user"),
        "completion": turns("assistant"),
        "messages": "other",
    }
    assert rename([1], columns) == [1]
    assert rename({"a": 1}, {"messages": "b"}) == {"a": 1}


def test_a_call_its_answer_and_the_tools_are_read():
    record = {"messages": turns("user", "calling", "tool", "tool", "assistant"), "tools": TOOLS}
    conversation = read_record(record, "messages", PLACE)
    assert conversation.messages[1].tool_calls == (ToolCall("add", {}),)
    assert conversation.tools == ({"type": "function", "function": {"name": "add"}},)


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        (("system", "system", "user"), "turn 1 is of the system again"),
        (("user", "system", "assistant"), "turn 1 is of the system again"),
        (("assistant", "user"), "turn 0 is the first after the system's and of the assistant"),
        (("system", "assistant"), "turn 1 is the first after the system's and of the assistant"),
        (("tool", "user"), "turn 0 is the first after the system's and of the tool"),
        (("user", "assistant", "tool"), "turn 2 is of a tool, and no tool was called"),
        (("user", "calling", "tool", "assistant", "tool"), "turn 4 is of a tool, and no tool was called"),
    ],
)
def test_turns_that_cannot_follow_each_other_are_named(roles: tuple[str, ...], message: str):
    with pytest.raises(DataError) as caught:
        read_record({"messages": turns(*roles), "tools": TOOLS}, "messages", PLACE)
    assert str(caught.value).startswith(f"{PLACE}: {message}")


def test_calls_without_tools_are_named():
    with pytest.raises(DataError, match=r"turn 1 calls the tool add, and the record has no tools"):
        read_record({"messages": turns("user", "calling")}, "messages", PLACE)
