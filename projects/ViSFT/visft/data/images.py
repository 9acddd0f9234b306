"""Reading images: always RGB, in the frame of their annotations, and one kind of error for whatever forbids it.

A camera may store an image turned, with an Exif orientation that says how to turn it upright. Annotations are of the
upright image or of the stored pixels; their width and height tell which.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from visft.errors import DataError

MAX_PIXELS = 178_956_970
"""Default of VISFT.DATA.MAX_PIXELS: where Pillow refuses an image on its own."""

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
"""By Exif orientation: what makes the stored pixels upright, and what undoes it."""

_IDAT, _TEXTS = b"IDAT", {b"eXIf", b"tEXt", b"zTXt", b"iTXt"}
_IN_DATA = ", take it out of the annotations, or set DATALOADER.SKIP_BROKEN True to go on without such images"
"""What can also be done about an image of a data set."""


class ImageError(DataError):
    """An image file is missing, cannot be decoded whole, or is not the image that its annotations are of."""


@dataclass(frozen=True)
class Header:
    """What the start of an image file says.

    Attributes:
        width, height: of the upright image, in pixels.
        orientation: Exif's, 1 (stored upright) to 8.
    """

    width: int
    height: int
    orientation: int

    @property
    def upright(self) -> tuple[int, int]:
        """(width, height) once turned."""
        return self.width, self.height

    @property
    def stored(self) -> tuple[int, int]:
        """(width, height) of the stored pixels."""
        return self.upright[::-1] if self.orientation > 4 else self.upright


def read_header(path: str | os.PathLike, *, max_pixels: int = MAX_PIXELS) -> Header:
    """Size and orientation of an image of a data set, without decoding its pixels.

    Raises:
        ImageError: the file is not there, or its header is not that of an image that can be read.
    """
    with _opened(os.fspath(path), max_pixels, _IN_DATA) as (_, header):
        return header


def read_rgb(path: str | os.PathLike, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an image file, turned upright as its Exif orientation says.

    Args:
        max_pixels: an image with more is refused; 0: none is.

    Returns:
        uint8 [H, W, 3], RGB; a transparent pixel has the colour that it hides. Grey values of 16 bits are scaled.

    Raises:
        ImageError: the file is not there, empty, cut off, too large, in a format that cannot be read, or of numbers
            whose range the format does not tell (32-bit integers, floats).
    """
    with _opened(os.fspath(path), max_pixels) as (image, header):
        return np.array(_upright_rgb(image, header, os.fspath(path)))  # a copy, which may be written to


def as_rgb(
    image: "str | os.PathLike | Image.Image | np.ndarray",
    channels: str | None = None,
    *,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """What a caller has of an image, as `read_rgb` gives it.

    Args:
        image: a file, an image of Pillow's (turned upright as its Exif orientation says), or uint8 [H, W, 3].
        channels: of an array, `RGB` or `BGR` (as OpenCV and detectron2 read); must be given with an array alone.
        max_pixels: a file with more is refused; 0: none is.

    Raises:
        ImageError: it is no image that can be decoded, or its numbers have a range that is not told.
        DataError: an array is of another shape or type, or it is not said which its channels are.
    """
    if isinstance(image, np.ndarray):
        if channels not in ("RGB", "BGR"):
            raise DataError(
                f'channels is {channels!r}: say of an array whether its channels are RGB or BGR (channels="RGB", '
                'channels="BGR")'
            )
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise DataError(
                f"the array is {image.dtype} {list(image.shape)}; expected uint8 [height, width, 3], 0 to 255"
            )
        return np.ascontiguousarray(image[..., ::-1] if channels == "BGR" else image)
    if channels is not None:
        raise DataError(
            f"channels is {channels!r}, which is for arrays: files and Pillow's images say it themselves"
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
        record: `file_name`, and as `annotated_as_stored` reads them `width`, `height` and `as_stored`; without a size,
            the image is upright.

    Returns:
        uint8 [H, W, 3], RGB.

    Raises:
        ImageError: as `read_rgb`; or the image has another size than the annotations say.
    """
    path = os.fspath(record["file_name"])
    with _opened(path, max_pixels, _IN_DATA) as (image, header):
        stored = annotated_as_stored(record, header)
        image = _upright_rgb(image, header, path)
        if stored and header.orientation in _TURNS:
            image = image.transpose(_TURNS[header.orientation][1])
        return np.array(image)


def annotated_as_stored(record: dict, header: Header) -> bool:
    """Whether an image's annotations are of its stored pixels, not of the upright image.

    Args:
        record: `file_name`; `width` and `height` of the annotated image, if known; `as_stored` is the answer where both
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
            f"{size[1]}; correct them, put the image there that they were made on{_IN_DATA}"
        )
    return bool(record.get("as_stored", False)) if upright and stored else stored


@contextlib.contextmanager
def _opened(path: str, max_pixels: int, also: str = "") -> Iterator[tuple[Image.Image, Header]]:
    """An image, its pixels not decoded yet, and its header. Whatever goes wrong inside is a ImageError.

    Args:
        also: what else can be done about it, for messages.
    """
    _let_pillow_open(max_pixels)
    try:
        if os.path.isdir(path):
            raise ImageError(f"{path}: it is a folder, expected an image file; put one there{also}")
        if os.path.getsize(path) == 0:
            raise ImageError(f"{path}: the file is empty, expected an image; copy it again{also}")
        with Image.open(path) as image:
            if max_pixels and image.width * image.height > max_pixels:
                raise _too_large(path, image.width * image.height, max_pixels)
            yield image, _header(image)
    except FileNotFoundError:
        raise ImageError(f"{path}: the image is not there; put it there{also}") from None
    except PermissionError:
        raise ImageError(f"{path}: the file may not be read; change its permissions{also}") from None
    except (MemoryError, ImageError):
        raise
    except Image.DecompressionBombError as error:
        raise _too_large(path, int(re.search(r"\d+", str(error))[0]), max_pixels) from None
    except UnidentifiedImageError:
        raise ImageError(
            f"{path}: it is no image, or of a format that Pillow does not read; expected JPEG, PNG, TIFF, WebP or the "
            f"like: copy it again{also}"
        ) from None
    except Exception as error:
        # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, zlib.error and more on broken files.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{path}: the image is cut off or broken ({reason}); copy it again{also}") from error


def _let_pillow_open(max_pixels: int) -> None:
    """Raise Pillow's own limit, a global above which it warns, to ours; it is never lowered."""
    if not max_pixels:
        Image.MAX_IMAGE_PIXELS = None
    elif Image.MAX_IMAGE_PIXELS is not None and Image.MAX_IMAGE_PIXELS < max_pixels:
        Image.MAX_IMAGE_PIXELS = max_pixels


def _too_large(path: str, pixels: int, max_pixels: int) -> ImageError:
    return ImageError(
        f"{path}: the image has {pixels:,} pixels, more than the {max_pixels:,} of VISFT.DATA.MAX_PIXELS, which guards "
        f"against small files that fill the memory; set it to {pixels} or more (0: no limit) if the image is meant"
    )


def _header(image: Image.Image) -> Header:
    orientation = _orientation(image)
    width, height = image.size
    if image.format == "TIFF":
        # Pillow gives one or the other size, depending on its version; the tags are the stored one.
        width, height = (
            int(image.tag_v2[tag]) for tag in (ExifTags.Base.ImageWidth, ExifTags.Base.ImageLength)
        )
    return Header(*((height, width) if orientation > 4 else (width, height)), orientation)


def _orientation(image: Image.Image) -> int:
    try:
        # Of a PNG, Pillow's own getexif decodes the pixels, for what may follow them; mostly nothing does.
        early = image.format == "PNG" and not _texts_follow_pixels(image)
        exif = Image.Image.getexif(image) if early else image.getexif()
        found = exif.get(ExifTags.Base.Orientation)
    except (
        Exception
    ):  # broken Exif data do not make an image unreadable: as detectron2, it is taken as stored
        return 1
    return found if found in _TURNS else 1


def _texts_follow_pixels(image: Image.Image) -> bool:
    """Whether a PNG has Exif data or texts, which may hold an orientation, behind its pixels."""
    seen = False
    with open(image.filename, "rb") as file:
        file.seek(8)
        while len(start := file.read(8)) == 8:
            kind = start[4:]
            if seen and kind in _TEXTS:
                return True
            seen = seen or kind == _IDAT
            file.seek(int.from_bytes(start[:4], "big") + 4, os.SEEK_CUR)
    return False


def _upright_rgb(image: Image.Image, header: Header, path: str) -> Image.Image:
    image.load()  # a TIFF is upright then
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
            f"{path}: its pixels are {numbers}, and the file does not tell which is black and which white; save it "
            "with 8 or 16 bits a channel"
        )
    if image.mode == "P":
        turned = turned.convert("RGBA")  # Pillow warns of the shorter way where there is transparency
    return turned if turned.mode == "RGB" else turned.convert("RGB")


def _scaled(image: Image.Image, bits: int) -> Image.Image:
    """A grey image of up to 16 bits. Pillow's own conversion clips: everything above 255 would be white."""
    values = np.asarray(image).astype(np.float32)
    return Image.fromarray(np.rint(values / ((2**bits - 1) / 255)).astype(np.uint8)).convert("RGB")
