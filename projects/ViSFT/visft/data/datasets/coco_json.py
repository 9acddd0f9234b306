"""Reads files in COCO's format, with an error for any other content."""

import contextlib
import gc
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import orjson

from visft.errors import DataError

KEYS = "`images`, `annotations` and `categories`"

# Larger than any coordinate. Infinities and integers that no float can hold are larger.
_HUGE = 1e15


def read_json(path: str, keys: str = KEYS) -> dict:
    """Return the object in a JSON file, with or without a byte order mark.

    Args:
        keys: the expected keys, for messages.

    Raises:
        DataError: the file is missing, empty, broken, or not an object.
    """
    try:
        content = _parse(Path(path).read_bytes())
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


def _parse(text: bytes) -> object:
    """Parse with orjson, which is several times as fast as Python's parser.

    Python's parser is the fallback: it reads byte order marks, NaN and numbers of any length, and locates errors.
    """
    with without_garbage_collection():
        try:
            content = orjson.loads(text)
        except orjson.JSONDecodeError:
            return json.loads(text.decode("utf-8-sig"))
        if has_rounded_ids(content):
            return json.loads(text)
        return content


def has_rounded_ids(content: object) -> bool:
    """Whether an id is a float. orjson turns integers above 64 bits into floats."""
    lists = [v for v in content.values() if isinstance(v, list)] if isinstance(content, dict) else []
    return any(
        float in {type(entry.get(key)) for entry in entries if isinstance(entry, dict)}
        for entries in lists
        for key in ("id", "image_id")
    )


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Disable garbage collection for code that makes millions of objects without cycles, to save time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def entries_of(path: str, content: dict, key: str, keys: str = KEYS) -> list:
    """Return the list under a key.

    Raises:
        DataError: the key is missing or not a list.
    """
    if key not in content:
        raise DataError(f"{path}: `{key}` is missing; expected {keys} (COCO format)")
    if not isinstance(content[key], list):
        raise DataError(f"{path}: `{key}` is a {type(content[key]).__name__}; expected a list")
    return content[key]


def name_of(entry: object, number: int, one: str = "annotation", many: str = "annotations") -> str:
    """Return the name of an entry for messages: by its id, if it has one."""
    if isinstance(entry, dict) and "id" in entry:
        return f"{one} {entry['id']}"
    return f"{many}[{number}]"


def require_keys(path: str, where: str, entry: object, keys: dict[str, Callable[[object], bool]]) -> None:
    """Check that an entry is an object with valid values.

    Args:
        where: the entry, for messages.
        keys: for each key, the function (one of those below) that checks its value.

    Raises:
        DataError: names the missing key, or the key with an invalid value.
    """
    if not isinstance(entry, dict):
        raise DataError(
            f"{path}: {where} is a {type(entry).__name__}; expected an object with {', '.join(keys)}"
        )
    for key, is_valid in keys.items():
        if key not in entry:
            raise DataError(f"{path}: {where} has no `{key}`; expected {', '.join(keys)}")
        if not is_valid(entry[key]):
            raise DataError(f"{path}: {where} has {key} {entry[key]!r}; expected {_EXPECTED[is_valid]}")


def is_number(value: object) -> bool:
    """Whether a value is a finite number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -_HUGE < value < _HUGE


def are_numbers(values: list) -> bool:
    """Whether `is_number` holds for each value and for the sum of absolute values."""
    # COCO has about sixty million coordinates, so this needs one call per polygon, not one per coordinate.
    if not {int, float}.issuperset(map(type, values)):
        return False
    try:
        return sum(map(abs, values)) < _HUGE  # False for a sum with NaN
    except OverflowError:
        return False


def is_int(value: object) -> bool:
    """Whether a value is an integer."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_positive_int(value: object) -> bool:
    """Whether a value is an integer above 0."""
    return is_int(value) and value > 0


def is_id(value: object) -> bool:
    """Whether a value can be the id of an image or an annotation."""
    return is_int(value) or is_text(value)


def in_order(ids: Iterable[int | str]) -> list[int | str]:
    """Return ids in the order of images: as pycocotools sorts them.

    If pycocotools cannot use some of them (strings, negative numbers, or numbers above int64), keep the file's order.
    """
    ids = list(ids)
    return sorted(ids) if all(isinstance(i, int) and 0 <= i < 2**63 for i in ids) else ids


def is_text(value: object) -> bool:
    """Whether a value is a non-empty string."""
    return isinstance(value, str) and value != ""


def is_box(value: object) -> bool:
    """Whether a value is a list of four numbers."""
    return isinstance(value, list) and len(value) == 4 and are_numbers(value)


_EXPECTED = {
    is_number: "a finite number",
    is_int: "a whole number",
    is_positive_int: "a whole number above 0",
    is_id: "a whole number or a string",
    is_text: "a string",
    is_box: "four finite numbers [x, y, width, height]",
}


def some(values: Iterable) -> str:
    """Return a few values as text, for messages."""
    values = [str(v) for v in values]
    return ", ".join(values) if len(values) <= 4 else f"{', '.join(values[:2])}, ..., {values[-1]}"
