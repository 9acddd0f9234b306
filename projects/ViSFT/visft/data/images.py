"""Reading pictures: always RGB, and one kind of error for whatever keeps a file from being a picture."""

import os

import numpy as np
from detectron2.data.detection_utils import read_image

from visft.errors import DataError


class PictureError(DataError):
    """A picture file is missing, or is not a picture that can be decoded whole."""


def read_rgb(path: str | os.PathLike) -> np.ndarray:
    """Decode a picture file, turned upright as its Exif orientation says.

    Returns:
        uint8 [H, W, 3], RGB.

    Raises:
        PictureError: the file is not there, empty, cut off, or in a format that cannot be read.
    """
    path = os.fspath(path)
    try:
        if os.path.getsize(path) == 0:
            raise PictureError(f"{path}: the file is empty, expected a picture; copy it again")
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
