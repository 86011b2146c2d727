import pytest

from paralign.engine.data.conversation import Message, detect_format, read_record
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
            f'{PLACE} messages[1].role: read "asistant"; expected system, user or assistant; '
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
            f'{PLACE}: read {{"mesages": []}}; expected an object with messages, or with instruction and '
            "output; mesages: did you mean messages?",
        ),
        (
            {"instruction": "a", "output": "b"},
            f"{PLACE}: read a record of format alpaca in a file of format messages; "
            "expected one format per file; split the file",
        ),
        ([1], f"{PLACE}: read [1]; expected an object with messages, or with instruction and output"),
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
