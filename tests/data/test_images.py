"""Images of every kind become RGB, in the frame of their annotations; what cannot is refused with its reason."""

import struct
import warnings

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode
from PIL import Image

from visft.data import ImageError, ViSFTMapper, read_rgb
from visft.data.images import read_header

STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}
"""By Exif orientation, how an upright image is stored: which sides its first row and column are, in the standard."""

RNG = np.random.default_rng(0)
UPRIGHT = RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8)


def _save(path, pixels: np.ndarray, orientation: int = 1, **options) -> str:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(pixels)).save(path, exif=exif, **options)
    return str(path)


def _record(path: str, pixels: np.ndarray) -> dict:
    """Of an image with one object, a lopsided triangle."""
    height, width = pixels.shape[:2]
    triangle = [3.0, 2.0, width - 5.0, 4.0, 7.0, height - 9.0]
    box = [3.0, 2.0, width - 5.0, height - 9.0]
    annotation = {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "segmentation": [triangle]}
    return {"file_name": path, "width": width, "height": height, "annotations": [annotation]}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
@pytest.mark.parametrize("annotated", ["upright", "stored"])
def test_a_turned_image_is_that_which_is_annotated(tmp_path, orientation, suffix, annotated) -> None:
    """As the same image without Exif data is: the upright one, or the stored pixels."""
    stored = STORED[orientation](UPRIGHT)
    options = {"lossless": True} if suffix == ".webp" else {}
    turned = _save(tmp_path / f"turned{suffix}", stored, orientation, **options)
    pixels = UPRIGHT if annotated == "upright" else stored
    plain = _record(_save(tmp_path / "plain.png", pixels), pixels)
    record = plain | {"file_name": turned}
    if orientation in (2, 3, 4) and annotated == "stored":
        record["as_stored"] = True  # both have one size; the others of the data set tell
    augmentations = [T.ResizeShortestEdge(80, 200), T.RandomFlip(prob=1.0)]
    mapper = ViSFTMapper(augmentations=augmentations, is_train=True)
    found, expected = mapper(record), mapper(plain)
    assert torch.equal(found["image"], expected["image"])
    assert torch.equal(found["instances"].gt_boxes.tensor, expected["instances"].gt_boxes.tensor)
    assert torch.equal(found["instances"].gt_masks.tensor, expected["instances"].gt_masks.tensor)
    assert (found["height"], found["width"]) == pixels.shape[:2]
    assert np.array_equal(read_rgb(turned), UPRIGHT)
    header = read_header(turned)
    assert (header.upright, header.stored) == ((60, 40), stored.shape[1::-1])


@pytest.mark.parametrize("orientation", STORED)
def test_jpegs_are_read_as_by_detectron2(tmp_path, orientation) -> None:
    path = _save(tmp_path / "a.jpg", STORED[orientation](UPRIGHT), orientation)
    assert np.array_equal(read_rgb(path), read_image(path, format="RGB"))


def test_exif_data_behind_the_pixels_of_a_png(tmp_path) -> None:
    """Where exiftool puts them. The header is read without decoding, and must know of them all the same."""
    data = (tmp_path / "a.png").read_bytes() if _save(tmp_path / "a.png", STORED[6](UPRIGHT), 6) else b""
    start = data.index(b"eXIf") - 4
    end = start + 12 + struct.unpack(">I", data[start : start + 4])[0]
    last = data.index(b"IEND") - 4
    (tmp_path / "a.png").write_bytes(data[:start] + data[end:last] + data[start:end] + data[last:])
    assert read_header(tmp_path / "a.png").orientation == 6
    assert np.array_equal(read_rgb(tmp_path / "a.png"), UPRIGHT)


def test_an_image_of_neither_size(tmp_path) -> None:
    path = _save(tmp_path / "a.png", STORED[6](UPRIGHT), 6)
    record = _record(path, np.zeros((41, 60, 3)))
    with pytest.raises(
        ImageError, match=r"a.png: the image is 60 x 40 \(40 x 60 as stored\), its .* 60 x 41"
    ):
        ViSFTMapper(augmentations=[T.NoOpTransform()], is_train=True)(record)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "YCbCr", "1"])
def test_every_kind_of_image_becomes_rgb(tmp_path, mode) -> None:
    path = tmp_path / {"CMYK": "a.jpg", "YCbCr": "a.jpg"}.get(mode, "a.png")
    Image.new("RGB", (8, 6), (255, 255, 255)).convert(mode).save(path)
    pixels = read_rgb(path)
    assert pixels.shape == (6, 8, 3) and pixels.dtype == np.uint8 and pixels.min() >= 254


def test_colours_are_kept(tmp_path) -> None:
    """In every layout of channels, with and without transparency, of which a reader of RGB sees nothing."""
    colours = np.array([[[200, 100, 50], [0, 0, 0]], [[10, 20, 30], [255, 255, 0]]], np.uint8)
    alpha = np.array([[[255], [0]], [[128], [0]]], np.uint8)
    rgba = Image.fromarray(np.concatenate((colours, alpha), 2))
    palette = Image.new("P", (2, 2))
    palette.putpalette(colours.reshape(-1).tolist())
    palette.putdata([0, 1, 2, 3])
    grey = Image.fromarray(np.concatenate((colours[..., :1], alpha), 2))
    Image.fromarray(colours).save(tmp_path / "rgb.png")
    rgba.save(tmp_path / "rgba.png")
    palette.save(tmp_path / "palette.png", transparency=bytes(alpha.reshape(-1)))
    palette.save(tmp_path / "palette.gif", transparency=3)
    grey.save(tmp_path / "grey.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("rgb.png", "rgba.png", "palette.png", "palette.gif"):
            assert np.array_equal(read_rgb(tmp_path / name), colours), name
        assert np.array_equal(read_rgb(tmp_path / "grey.png"), np.repeat(colours[..., :1], 3, 2))


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm", "-turned.png"])
def test_sixteen_bits_are_scaled(tmp_path, suffix) -> None:
    grey = np.arange(240, dtype=np.uint8).reshape(12, 20)
    path = tmp_path / f"16{suffix}"
    if suffix == "-turned.png":
        _save(path, STORED[6](grey.astype(np.uint16) * 257), 6)
    else:
        Image.fromarray(grey.astype(np.uint16) * 257).save(path)
    assert np.array_equal(read_rgb(path), np.repeat(grey[..., None], 3, 2))


def _write_tiff(path, data: bytes, *, bits: int, sample_format: int = 1) -> None:
    """Two grey pixels in a kind that Pillow does not write."""
    tags = {
        256: 2,
        257: 1,
        258: bits,
        259: 1,
        262: 1,
        273: 8,
        277: 1,
        278: 1,
        279: len(data),
        339: sample_format,
    }
    body = struct.pack("<H", len(tags))
    body += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(data)) + data + body + bytes(4))


def test_twelve_bits_are_scaled(tmp_path) -> None:
    _write_tiff(tmp_path / "a.tif", b"\x00\x0f\xff\0", bits=12)
    assert read_rgb(tmp_path / "a.tif").tolist() == [[[0, 0, 0], [255, 255, 255]]]


@pytest.mark.parametrize("kind", ["float32", "int32", "int16"])
def test_numbers_without_a_range_are_refused(tmp_path, kind) -> None:
    data = np.ones(2, kind)
    sample_format = 3 if kind == "float32" else 2
    _write_tiff(tmp_path / "a.tif", data.tobytes(), bits=8 * data.itemsize, sample_format=sample_format)
    numbers = "floats" if kind == "float32" else "integers of 32 bits or with a sign"
    with pytest.raises(ImageError, match=f"a.tif: its pixels are {numbers}, and the file does not tell"):
        read_rgb(tmp_path / "a.tif")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("empty", "the file is empty"),
        ("text", "the file is not an image"),
        ("cut.jpg", "the image is cut off or broken"),
        ("cut.png", "the image is cut off or broken"),
        ("missing", "the image is not there"),
        ("folder", "it is a folder"),
    ],
)
def test_each_fault_has_its_reason(tmp_path, kind, reason) -> None:
    path = tmp_path / (kind if kind.startswith("cut") else "a.jpg")
    if kind.startswith("cut"):
        _save(path, RNG.integers(0, 255, (64, 64, 3), dtype=np.uint8))
        path.write_bytes(path.read_bytes()[:-700])
        read_header(path)  # only the pixels are missing
    elif kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_text("" if kind == "empty" else "not an image")
    with pytest.raises(ImageError, match=reason) as raised:
        read_rgb(path)
    assert str(raised.value).startswith(str(path)) and "\n" not in str(raised.value)
    assert "SKIP_BROKEN" not in str(raised.value)  # which has no say over an image that is no data set's
    with pytest.raises(ImageError, match="SKIP_BROKEN"):
        ViSFTMapper(augmentations=[T.NoOpTransform()], is_train=True)({"file_name": str(path)})


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # beside our own refusal
def test_large_images_need_a_larger_limit(tmp_path, monkeypatch) -> None:
    """Pillow refuses 182 million pixels of its own accord; the limit is the key's, above Pillow's and below."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # put back afterwards
    Image.new("1", (14_000, 13_000)).save(tmp_path / "large.png")
    for limit in (178_956_970, 181_999_999):
        with pytest.raises(
            ImageError, match="has 182,000,000 pixels.*VISFT.DATA.MAX_PIXELS.*to 182000000 or more"
        ):
            read_header(tmp_path / "large.png", max_pixels=limit)
    for limit in (182_000_000, 0):
        assert read_header(tmp_path / "large.png", max_pixels=limit).upright == (14_000, 13_000)
    _save(tmp_path / "small.png", UPRIGHT)
    with pytest.raises(ImageError, match="has 2,400 pixels"):
        read_rgb(tmp_path / "small.png", max_pixels=2_399)
