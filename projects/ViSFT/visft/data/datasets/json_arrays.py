"""Reads lists of objects in a large JSON file piece by piece. Parsing COCO's training set at once takes 5 GiB."""

import mmap
import re
from collections.abc import Iterator

import orjson

from visft.data.datasets.coco_json import has_rounded_ids

PIECE = 8 * 2**20
"""Number of bytes to parse at a time."""

_BETWEEN = re.compile(rb"\}\s*,\s*\{")
_END = re.compile(rb"\}\s*\]")
_EMPTY = re.compile(rb"\s*\]")
_TRIES = 16


class NotSplitError(Exception):
    """The lists of a file cannot be read in pieces. The file may be valid or broken."""


class JSONArrays:
    """The lists under some keys of the object in a file.

    A piece ends where the text looks like the end of an object. If each piece and the rest of the file without its
    lists are valid JSON, then the whole file is valid JSON with the same content.
    """

    def __init__(self, path: str):
        """
        Raises:
            OSError, ValueError: the file cannot be read, or is empty.
        """
        with open(path, "rb") as file:
            self._text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._spans: dict[str, tuple[int, int]] = {}

    def entries(self, key: str) -> Iterator:
        """Yield the entries of the list under a key.

        Raises:
            NotSplitError: the list cannot be read in pieces. Entries yielded before may be wrong.
        """
        opening = re.search(rb'"%s"\s*:\s*\[' % key.encode(), self._text)
        if opening is None:
            raise NotSplitError
        position = opening.end()
        empty = _EMPTY.match(self._text, position)
        while not empty:
            edge = _BETWEEN.search(self._text, position + PIECE)
            piece = None if edge is None else self._piece(position, edge.start() + 1)
            if piece is None:
                break
            yield from piece
            position = edge.end() - 1
        if empty:
            self._spans[key] = (opening.end(), empty.end() - 1)
            return
        piece, end = self._last_piece(position)
        self._spans[key] = (opening.end(), end)
        yield from piece

    def rest(self) -> dict:
        """Return the object with empty lists under the keys that were read.

        Raises:
            NotSplitError: the pieces do not belong to lists of this object.
        """
        pieces, start = [], 0
        for first, last in sorted(self._spans.values()):
            pieces.append(self._text[start:first])
            start = last
        try:
            rest = orjson.loads(b"".join([*pieces, self._text[start:]]))
        except orjson.JSONDecodeError as error:
            raise NotSplitError from error
        if not isinstance(rest, dict) or any(rest.get(key) != [] for key in self._spans):
            raise NotSplitError
        return rest

    def _piece(self, start: int, stop: int) -> list | None:
        try:
            piece = orjson.loads(b"[" + self._text[start:stop] + b"]")
        except orjson.JSONDecodeError:
            return None
        if has_rounded_ids({"": piece}):
            raise NotSplitError
        return piece

    def _last_piece(self, start: int) -> tuple[list, int]:
        for number, end in enumerate(_END.finditer(self._text, start)):
            piece = self._piece(start, end.start() + 1)
            if piece is not None:
                return piece, end.end() - 1
            if number == _TRIES:
                break
        raise NotSplitError
