"""JSON of a record: whatever is wrong with it is a ValueError."""

from __future__ import annotations

import json


def json_value(text: str) -> object:
    """What JSON text says.

    Raises:
        JSONDecodeError: it is not JSON.
        ValueError: a number of thousands of digits, or nested too deeply.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError:
        raise ValueError("a number with too many digits") from None
