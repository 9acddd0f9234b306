"""Files in COCO's format, read with an error for whatever they hold instead."""

import json
import os

from visft.errors import DataError

KEYS = "`images`, `annotations` and `categories`"


def read_json(path: str, keys: str = KEYS) -> dict:
    """The object in a JSON file.

    Args:
        keys: what it should hold, for messages.

    Raises:
        DataError: the file is missing, empty, broken, or holds something else.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except OSError as error:
        raise DataError(f"{path}: the file cannot be read ({error.strerror})") from None
    except json.JSONDecodeError as error:
        found = (
            "empty" if os.path.getsize(path) == 0 else f"broken in line {error.lineno}, column {error.colno}"
        )
        raise DataError(
            f"{path}: the file is {found} ({error.msg}), expected JSON in COCO format; write or copy it again"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: the file is no JSON text ({error}); write or copy it again") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: the file holds a {type(content).__name__}; expected an object with {keys}")
    return content


def entries_of(path: str, content: dict, key: str, keys: str = KEYS) -> list:
    """The list under a key.

    Raises:
        DataError: it is missing, or no list.
    """
    if key not in content:
        raise DataError(f"{path}: `{key}` is missing; expected {keys} (COCO format)")
    if not isinstance(content[key], list):
        raise DataError(f"{path}: `{key}` is a {type(content[key]).__name__}; expected a list")
    return content[key]


def name_of(entry: object, number: int, one: str = "annotation", many: str = "annotations") -> str:
    """An entry for messages: by its id where it has one."""
    if isinstance(entry, dict) and "id" in entry:
        return f"{one} {entry['id']}"
    return f"{many}[{number}]"
