"""Reading pictures: always RGB, and one kind of error for whatever keeps a file from being a picture."""

import os

import numpy as np
from detectron2.data.detection_utils import read_image
from PIL import Image, ImageOps

from visft.errors import DataError


class PictureError(DataError):
    """A picture file is missing, or is not a picture that can be decoded whole."""


def read_rgb(path: str | os.PathLike) -> np.ndarray:
    """Decode a picture file, turned upright as its Exif orientation says.

    Returns:
        uint8 [H, W, 3], RGB. Grey values of 16 bits are scaled to 8.

    Raises:
        PictureError: the file is not there, empty, cut off, in a format that cannot be read, or of numbers whose range
            the format does not tell (32-bit integers, floats).
    """
    path = os.fspath(path)
    try:
        if os.path.getsize(path) == 0:
            raise PictureError(f"{path}: the file is empty, expected a picture; copy it again")
        with Image.open(path) as picture:
            mode, kind = picture.mode, picture.format
        if mode == "F" or (mode == "I" and kind != "PNG"):
            numbers = "floats" if mode == "F" else "32-bit integers"
            raise PictureError(
                f"{path}: its pixels are {numbers}, and the file does not tell which is black and which white; save it "
                "with 8 or 16 bits a channel"
            )
        if mode.startswith("I"):
            return _read_deep(path)
        return read_image(path, format="RGB")
    except FileNotFoundError:
        raise PictureError(
            f"{path}: the picture is not there; put it there or take it out of the annotations"
        ) from None
    except (MemoryError, PictureError):
        raise
    except Exception as error:
        # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, zlib.error and more on broken files.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PictureError(
            f"{path}: the picture does not decode ({reason}); copy it again, take it out of the annotations, "
            "or set DATALOADER.SKIP_BROKEN True to go on without such pictures"
        ) from error


def _read_deep(path: str) -> np.ndarray:
    """A grey picture of 16 bits, scaled. Pillow's own conversion clips: everything above 255 would be white."""
    with Image.open(path) as picture:
        values = np.asarray(ImageOps.exif_transpose(picture)).astype(np.float32)
    return np.repeat(np.rint(values / 257).astype(np.uint8)[..., None], 3, axis=2)
