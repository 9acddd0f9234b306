"""Reads images as RGB in the frame of their annotations, with one type of error for all failures.

A camera may store an image rotated, with an Exif orientation that says how to turn it upright. Annotations refer to
the upright image or to the stored pixels. Their width and height show which.
"""

import contextlib
import functools
import io
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from visft.errors import DataError

MAX_PIXELS = 178_956_970
"""Default of VISFT.DATA.MAX_PIXELS: the size at which Pillow itself refuses an image."""

_T = Image.Transpose
_TURNS = {
    2: (_T.FLIP_LEFT_RIGHT, _T.FLIP_LEFT_RIGHT),
    3: (_T.ROTATE_180, _T.ROTATE_180),
    4: (_T.FLIP_TOP_BOTTOM, _T.FLIP_TOP_BOTTOM),
    5: (_T.TRANSPOSE, _T.TRANSPOSE),
    6: (_T.ROTATE_270, _T.ROTATE_90),
    7: (_T.TRANSVERSE, _T.TRANSVERSE),
    8: (_T.ROTATE_90, _T.ROTATE_270),
}
"""For each Exif orientation: the operation that turns the stored pixels upright, and its inverse."""

_IDAT, _TEXTS = b"IDAT", {b"eXIf", b"tEXt", b"zTXt", b"iTXt"}
_IN_DATA = ", remove it from the annotations, or set DATALOADER.SKIP_BROKEN True to leave out such images"
"""Further remedies for an image of a data set."""


class ImageError(DataError):
    """An image file is missing, cannot be decoded completely, or does not match its annotations."""


@dataclass(frozen=True)
class Header:
    """The header of an image file.

    Attributes:
        width, height: of the upright image, in pixels.
        orientation: Exif orientation, 1 (stored upright) to 8.
    """

    width: int
    height: int
    orientation: int

    @property
    def upright(self) -> tuple[int, int]:
        """(width, height) of the upright image."""
        return self.width, self.height

    @property
    def stored(self) -> tuple[int, int]:
        """(width, height) of the stored pixels."""
        return self.upright[::-1] if self.orientation > 4 else self.upright


def read_header(
    path: str | os.PathLike, *, max_pixels: int = MAX_PIXELS, file: BinaryIO | None = None
) -> Header:
    """Return the size and orientation of an image of a data set, without decoding its pixels.

    Args:
        file: an open file with the image, whose name is `path` then.

    Raises:
        ImageError: the file does not exist, or its header is not that of a readable image.
    """
    content, also = (None, _IN_DATA) if file is None else (lambda: file, "")
    with _opened(os.fspath(path), max_pixels, also, content) as (_, header):
        return header


def read_rgb(path: str | os.PathLike, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an image file and turn it upright by its Exif orientation.

    Args:
        max_pixels: an image with more pixels is refused; 0: no limit.

    Returns:
        uint8 [H, W, 3], RGB. A transparent pixel keeps its hidden colour. 16-bit grey values are scaled.

    Raises:
        ImageError: the file is missing, empty, truncated, too large, in a format that cannot be read, or has numbers of
            unknown range (32-bit integers, floats).
    """
    with _opened(os.fspath(path), max_pixels) as (image, header):
        return np.array(_upright_rgb(image, header, os.fspath(path)))  # a writable copy


def as_rgb(
    image: "str | os.PathLike | Image.Image | np.ndarray",
    channels: str | None = None,
    *,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """Convert a file, Pillow image or array to an array like that of `read_rgb`.

    Args:
        image: a file, a Pillow image (which is turned upright by its Exif orientation), or uint8 [H, W, 3].
        channels: `RGB`, or `BGR` (as from OpenCV and detectron2). Required for an array, and only allowed there.
        max_pixels: a file with more pixels is refused; 0: no limit.

    Raises:
        ImageError: the image cannot be decoded, or its numbers have an unknown range.
        DataError: an array has another shape or type, or its channels are not given.
    """
    if isinstance(image, np.ndarray):
        if channels not in ("RGB", "BGR"):
            raise DataError(
                f'channels is {channels!r}: say whether the channels of the array are RGB or BGR (channels="RGB", '
                'channels="BGR")'
            )
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise DataError(
                f"the array is {image.dtype} {list(image.shape)}; expected uint8 [height, width, 3], 0 to 255"
            )
        return np.ascontiguousarray(image[..., ::-1] if channels == "BGR" else image)
    if channels is not None:
        raise DataError(
            f"channels is {channels!r}, which is for arrays only: leave it out for files and Pillow images"
        )
    if isinstance(image, Image.Image):
        try:
            upright = ImageOps.exif_transpose(image)
            return np.array(_upright_rgb(upright, Header(*upright.size, 1), "the image"))
        except (OSError, ValueError, SyntaxError) as error:
            if isinstance(error, ImageError):
                raise
            raise ImageError(f"the image does not decode ({error}); open its file again") from error
    if isinstance(image, str | os.PathLike):
        return read_rgb(image, max_pixels=max_pixels)
    raise DataError(f"the image is a {type(image).__name__}; expected a path, a Pillow image, or an array")


def read_annotated(record: dict, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode the image of a detectron2 dataset dict in the frame of its annotations.

    Args:
        record: `file_name`, and optionally `width`, `height` and `as_stored` (see `annotated_as_stored`). Without a
            size, the image is upright. `shard` is the place of an image that is part of a file: the file's path, and
            the image's offset and length in bytes.

    Returns:
        uint8 [H, W, 3], RGB.

    Raises:
        ImageError: as in `read_rgb`, or the image does not have the annotated size.
    """
    path = os.fspath(record["file_name"])
    part = functools.partial(_part, *record["shard"]) if "shard" in record else None
    with _opened(path, max_pixels, _IN_DATA, part) as (image, header):
        stored = annotated_as_stored(record, header)
        image = _upright_rgb(image, header, path)
        if stored and header.orientation in _TURNS:
            image = image.transpose(_TURNS[header.orientation][1])
        return np.array(image)


def annotated_as_stored(record: dict, header: Header) -> bool:
    """Whether an image's annotations refer to its stored pixels, not to the upright image.

    Args:
        record: `file_name`; `width` and `height` of the annotated image, if known; `as_stored`, the result if both
            frames have this size (default: False).

    Raises:
        ImageError: neither frame has this size.
    """
    size = (record.get("width", header.width), record.get("height", header.height))
    upright, stored = size == header.upright, size == header.stored
    if not upright and not stored:
        width, height = header.upright
        turned = f" ({header.height} x {header.width} as stored)" if header.stored != header.upright else ""
        raise ImageError(
            f"{record['file_name']}: the image is {width} x {height}{turned}, its annotations say {size[0]} x "
            f"{size[1]}; correct them, replace the image by the annotated one{_IN_DATA}"
        )
    return bool(record.get("as_stored", False)) if upright and stored else stored


@contextlib.contextmanager
def _opened(
    path: str, max_pixels: int, also: str = "", content: Callable[[], BinaryIO] | None = None
) -> Iterator[tuple[Image.Image, Header]]:
    """Yield an image whose pixels are not decoded yet, and its header. All errors inside become an ImageError.

    Args:
        also: further remedies, for messages.
        content: opens the image, if it is not a file by itself.
    """
    _let_pillow_open(max_pixels)
    try:
        if content is None and os.path.isdir(path):
            raise ImageError(f"{path}: it is a folder, expected an image file; put one there{also}")
        if content is None and os.path.getsize(path) == 0:
            raise ImageError(f"{path}: the file is empty, expected an image; copy it again{also}")
        with Image.open(path if content is None else content()) as image:
            if max_pixels and image.width * image.height > max_pixels:
                raise _too_large(path, image.width * image.height, max_pixels)
            yield image, _header(image)
    except FileNotFoundError:
        raise ImageError(f"{path}: the image is not there; put it there{also}") from None
    except PermissionError:
        raise ImageError(f"{path}: the file is not readable; change its permissions{also}") from None
    except (MemoryError, ImageError):
        raise
    except Image.DecompressionBombError as error:
        raise _too_large(path, int(re.search(r"\d+", str(error))[0]), max_pixels) from None
    except UnidentifiedImageError:
        raise ImageError(
            f"{path}: the file is not an image, or has a format that Pillow does not read; expected JPEG, PNG, TIFF, "
            f"WebP or similar: copy it again{also}"
        ) from None
    except Exception as error:
        # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, zlib.error and more on broken files.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{path}: the image is cut off or broken ({reason}); copy it again{also}") from error


def _part(path: str, offset: int, length: int) -> BinaryIO:
    with open(path, "rb", buffering=0) as file:
        content = os.pread(file.fileno(), length, offset)
    if len(content) < length:
        raise OSError(f"{path} ends after {len(content)} of its {length} bytes")
    return io.BytesIO(content)


def _let_pillow_open(max_pixels: int) -> None:
    """Raise Pillow's global limit, above which it warns, to ours. Never lower it."""
    if not max_pixels:
        Image.MAX_IMAGE_PIXELS = None
    elif Image.MAX_IMAGE_PIXELS is not None and Image.MAX_IMAGE_PIXELS < max_pixels:
        Image.MAX_IMAGE_PIXELS = max_pixels


def _too_large(path: str, pixels: int, max_pixels: int) -> ImageError:
    return ImageError(
        f"{path}: the image has {pixels:,} pixels, more than the {max_pixels:,} of VISFT.DATA.MAX_PIXELS, which guards "
        f"against small files that fill the memory; if you want the image, set the key to {pixels} or more (0: no "
        "limit)"
    )


def _header(image: Image.Image) -> Header:
    orientation = _orientation(image)
    width, height = image.size
    if image.format == "TIFF":
        # Pillow's size is the upright or the stored one, depending on its version. The tags have the stored size.
        width, height = (
            int(image.tag_v2[tag]) for tag in (ExifTags.Base.ImageWidth, ExifTags.Base.ImageLength)
        )
    return Header(*((height, width) if orientation > 4 else (width, height)), orientation)


def _orientation(image: Image.Image) -> int:
    try:
        # For a PNG, Pillow's getexif decodes the pixels, because Exif data may follow them. Usually none does.
        early = image.format == "PNG" and not _texts_follow_pixels(image)
        exif = Image.Image.getexif(image) if early else image.getexif()
        found = exif.get(ExifTags.Base.Orientation)
    except Exception:  # like detectron2, use an image with broken Exif data as it is stored
        return 1
    return found if found in _TURNS else 1


def _texts_follow_pixels(image: Image.Image) -> bool:
    """Whether a PNG has Exif data or texts, which may contain an orientation, after its pixels."""
    seen, file = False, image.fp
    here = file.tell()
    try:
        file.seek(8)
        while len(start := file.read(8)) == 8:
            kind = start[4:]
            if seen and kind in _TEXTS:
                return True
            seen = seen or kind == _IDAT
            file.seek(int.from_bytes(start[:4], "big") + 4, os.SEEK_CUR)
    finally:
        file.seek(here)
    return False


def _upright_rgb(image: Image.Image, header: Header, path: str) -> Image.Image:
    image.load()  # this already turns a TIFF upright
    if image.format != "TIFF" and header.orientation in _TURNS:
        turned = image.transpose(_TURNS[header.orientation][0])
    else:
        turned = image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        bits = image.tag_v2.get(ExifTags.Base.BitsPerSample, (16,))[0] if image.format == "TIFF" else 16
        return _scaled(turned, bits)
    if image.mode in ("F", "I"):
        numbers = "floats" if image.mode == "F" else "integers of 32 bits or with a sign"
        raise ImageError(
            f"{path}: its pixels are {numbers}, and the file does not tell which value is white; save it with 8 or "
            "16 bits per channel"
        )
    if image.mode == "P":
        turned = turned.convert("RGBA")  # with transparency, Pillow warns about converting directly to RGB
    return turned if turned.mode == "RGB" else turned.convert("RGB")


def _scaled(image: Image.Image, bits: int) -> Image.Image:
    """Convert a grey image of up to 16 bits. Pillow's own conversion clips values above 255 to white."""
    values = np.asarray(image).astype(np.float32)
    return Image.fromarray(np.rint(values / ((2**bits - 1) / 255)).astype(np.uint8)).convert("RGB")
