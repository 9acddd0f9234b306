"""Files in COCO's format, read with an error for whatever they hold instead."""

import contextlib
import gc
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import orjson

from visft.errors import DataError

KEYS = "`images`, `annotations` and `categories`"

# No coordinate is as large; infinities, and whole numbers that no float can hold, are.
_HUGE = 1e15


def read_json(path: str, keys: str = KEYS) -> dict:
    """The object in a JSON file, with or without a byte order mark.

    Args:
        keys: what it should hold, for messages.

    Raises:
        DataError: the file is missing, empty, broken, or holds something else.
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
    """orjson is several times as fast as Python's own parser, which knows byte order marks, NaN and numbers of any
    length and says where a text is broken."""
    with without_garbage_collection():
        try:
            content = orjson.loads(text)
        except orjson.JSONDecodeError:
            return json.loads(text.decode("utf-8-sig"))
        if has_rounded_ids(content):
            return json.loads(text)
        return content


def has_rounded_ids(content: object) -> bool:
    """Whether an id is a float, which orjson makes of a whole number above 64 bits."""
    lists = [v for v in content.values() if isinstance(v, list)] if isinstance(content, dict) else []
    return any(
        float in {type(entry.get(key)) for entry in entries if isinstance(entry, dict)}
        for entries in lists
        for key in ("id", "image_id")
    )


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """For code that makes millions of objects and no cycles: Python would look through all of them again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


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


def require_keys(path: str, where: str, entry: object, keys: dict[str, Callable[[object], bool]]) -> None:
    """Check that an entry is an object with valid values.

    Args:
        where: the entry, for messages.
        keys: by key what says whether its value is valid, one of the functions below.

    Raises:
        DataError: names the key that is missing or has another value.
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
    """Whether it is a finite number that a float holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -_HUGE < value < _HUGE


def are_numbers(values: list) -> bool:
    """As `is_number`, of each; their sum must be as small."""
    # COCO has some sixty million coordinates: one call for a polygon, not one for each.
    if not {int, float}.issuperset(map(type, values)):
        return False
    try:
        return sum(map(abs, values)) < _HUGE  # which no sum with a nan is
    except OverflowError:
        return False


def is_int(value: object) -> bool:
    """Whether it is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_positive_int(value: object) -> bool:
    """Whether it is a whole number above 0."""
    return is_int(value) and value > 0


def is_id(value: object) -> bool:
    """Whether it can be the id of an image or an annotation."""
    return is_int(value) or is_text(value)


def in_order(ids: Iterable[int | str]) -> list[int | str]:
    """Ids in the order in which images are taken: as pycocotools sorts them. Where some are none for it (texts, or
    numbers that no int64 above 0 holds), in the order of the file."""
    ids = list(ids)
    return sorted(ids) if all(isinstance(i, int) and 0 <= i < 2**63 for i in ids) else ids


def is_text(value: object) -> bool:
    """Whether it is a text, not empty."""
    return isinstance(value, str) and value != ""


def is_box(value: object) -> bool:
    """Whether it is a box's four numbers."""
    return isinstance(value, list) and len(value) == 4 and are_numbers(value)


_EXPECTED = {
    is_number: "a finite number",
    is_int: "a whole number",
    is_positive_int: "a whole number above 0",
    is_id: "a number or a text",
    is_text: "a text",
    is_box: "four finite numbers [x, y, width, height]",
}


def some(values: Iterable) -> str:
    """A few of them, for messages."""
    values = [str(v) for v in values]
    return ", ".join(values) if len(values) <= 4 else f"{', '.join(values[:2])}, ..., {values[-1]}"
