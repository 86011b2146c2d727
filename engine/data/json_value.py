"""JSON of a record: text and numbers that can be tokenised, and nothing that cannot."""

from __future__ import annotations

import json
import re

_HALF_PAIR = re.compile(
    r"\\u[dD][89a-fA-F]"
)  # the escape of a surrogate, which is text as one of a pair only


def json_value(text: str) -> object:
    """What JSON text says.

    Raises:
        JSONDecodeError: it is not JSON.
        ValueError: a number of thousands of digits, half of a surrogate pair, or nested too deeply.
    """
    try:
        value = json.loads(text)
        if _HALF_PAIR.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise ValueError(f"{half} is half of a surrogate pair, which is no text") from None
    except ValueError:
        raise ValueError("a number with too many digits") from None
    return value
