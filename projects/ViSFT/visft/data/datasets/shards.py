"""Captioned images in tar files, in WebDataset's format, as img2dataset writes them.

A shard has members `KEY.jpg` (or png, webp) and `KEY.txt`, or `KEY.json` with `caption`. Shards stay packed: an index
has the place and the caption of each image. It is made once, and all processes map it into memory. So images are read
in any order, which the deterministic samplers need.
"""

import functools
import glob
import itertools
import json
import logging
import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

from PIL import Image

from visft.data.datasets.packed import PackedFile, PackedRows, Rows, built_once, row
from visft.data.headers import THREADS
from visft.data.images import ImageError, read_header
from visft.errors import DataError
from visft.utils.progress import counted
from visft.utils.user_cache import cache_folder

logger = logging.getLogger(__name__)

IMAGES = ("jpg", "jpeg", "png", "webp")
"""Extensions of images."""

_KEY = "VISFT.DATA.TRAIN_SHARDS"
_VERSION = 1
_NAME = re.compile(r"((?:.*/)?[^./][^/.]*)\.([^/]*)")  # WebDataset's key: the name up to the first dot
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_BLOCK = 512
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class ShardRecords(Sequence):
    """Dataset dicts of images in shards, in the order of the shards and of their members.

    Each has `file_name` (SHARD/MEMBER, for messages), `shard` (see `visft.data.images.read_annotated`), `image_id` (its
    number) and `captions` (one).

    Attributes:
        captions: by image id.
    """

    def __init__(self, file: PackedFile, paths: Sequence[str]):
        """
        Args:
            file: the index.
            paths: the shards, in its order.
        """
        self._file, self._paths = file, paths
        self.captions = ShardCaptions(file)

    def __len__(self) -> int:
        return len(self._file.rows("images"))

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        shard, member, offset, size, caption = self._file.rows("images")[index]
        path = self._paths[shard]
        return {
            "file_name": f"{path}/{member}",
            "shard": (path, offset, size),
            "image_id": int(index),
            "captions": [caption],
        }

    def check(self, name: str, max_pixels: int, skip_broken: bool) -> None:
        """Check that all shards and their images can be used.

        Args:
            name: of the data set, for messages.
            max_pixels: an image with more pixels is refused; 0: no limit.
            skip_broken: whether faults are only reported.

        Raises:
            DataError: a shard or an image is broken, and `skip_broken` does not allow it; or none is left.
        """
        summary = self._file.summary
        count, first = summary["faults"], list(summary["first"])
        if 0 < max_pixels < summary["pixels"]:
            count += 1
            first.append(
                f"{summary['largest']}: the image has {summary['pixels']:,} pixels, more than the {max_pixels:,} of "
                "VISFT.DATA.MAX_PIXELS"
            )
        if not len(self):
            raise DataError(
                f"{name}: none of its {len(self._paths)} shards has an image with a caption; expected members KEY.jpg "
                f"with KEY.txt, or with KEY.json that has `caption`{'; ' * bool(first)}{'; '.join(first[:1])}"
            )
        if count and not skip_broken:
            raise DataError(
                f"{name}: {count} fault{'s' * (count > 1)} in {len(self._paths)} shards, the first: {first[0]}; "
                "download the shard again, or set DATALOADER.SKIP_BROKEN True to use only what is complete"
            )
        if count:
            logger.warning(
                "%s: %d faults in %d shards; what is not complete is left out (DATALOADER.SKIP_BROKEN): %s",
                name,
                count,
                len(self._paths),
                "; ".join(first[:3]) + "; ..." * (count > 3),
            )


class ShardCaptions(Mapping):
    """The captions of `ShardRecords` by image id, in their order."""

    def __init__(self, file: PackedFile):
        self._file = file

    @property
    def _rows(self) -> PackedRows:
        return self._file.rows("images")

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    def __contains__(self, key: object) -> bool:
        return isinstance(key, int) and 0 <= key < len(self)

    def __getitem__(self, key: int) -> list[str]:
        if key not in self:
            raise KeyError(key)
        return [self._rows[key][-1]]


def load_shards(pattern: str) -> ShardRecords:
    """Return the images of the shards that VISFT.DATA.TRAIN_SHARDS names. Makes the index if it is not there.

    The index is kept in the shards' folder, or in the user's cache if that folder is not writable.

    Raises:
        DataError: there are no shards, one is missing or compressed, or the index cannot be written.
    """
    paths = shard_paths(pattern)
    key = {"version": _VERSION, "kind": "shards", "shards": _signature(paths)}
    folder = Path(os.path.commonpath([os.path.dirname(os.path.realpath(path)) for path in paths]))
    names = [os.path.relpath(os.path.realpath(path), folder) for path in paths]
    name = f"shards-{sha256(json.dumps(names).encode()).hexdigest()[:24]}.rows"
    refused = []
    for target in (folder / f".visft-{name}", cache_folder() / name):
        try:
            return ShardRecords(built_once(target, key, functools.partial(_build, paths)), paths)
        except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
            refused.append(f"{target} ({error})")
    raise DataError(
        f"{_KEY}: the index of {pattern} cannot be written: {', '.join(refused)}; make one of these folders writable, "
        "or set XDG_CACHE_HOME to one that is"
    )


def shard_paths(pattern: str) -> list[str]:
    """Return the shards of a folder, a pattern (`*.tar`) or a range (`{000000..000099}.tar`), in order.

    Raises:
        DataError: there are none, or one of a range is missing.
    """
    if os.path.isdir(pattern):
        found = sorted(glob.glob(os.path.join(glob.escape(pattern), "*.tar")))
    else:
        found = []
        for name in _expanded(pattern):
            found += sorted(glob.glob(name)) if glob.has_magic(name) and not os.path.exists(name) else [name]
    if not found:
        raise DataError(
            f"{_KEY} is {pattern}, and no file is there; expected a folder with *.tar, a pattern like shards/*.tar, or "
            "a range like shards/{000000..000099}.tar, of local files"
        )
    missing = [path for path in found if not os.path.isfile(path)]
    if missing:
        raise DataError(
            f"{missing[0]}: the shard is not there ({len(missing)} of the {len(found)} in {_KEY} {pattern}); put it "
            "there, or correct the key"
        )
    return found


def _expanded(pattern: str) -> list[str]:
    parts = _RANGE.split(pattern)  # text, first, last, text, first, last, ..., text
    choices = [[parts[0]]]
    for first, last, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        choices.append([f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)])
        choices.append([text])
    return ["".join(choice) for choice in itertools.product(*choices)]


def _signature(paths: Sequence[str]) -> str:
    """A digest of the shards' sizes and modification times. It does not depend on where their folder is mounted."""
    stats = [os.stat(path) for path in paths]
    return sha256(json.dumps([(stat.st_size, stat.st_mtime_ns) for stat in stats]).encode()).hexdigest()


def _build(paths: Sequence[str]) -> tuple[dict, Rows]:
    rows: list[bytes] = []
    first: list[str] = []
    faults, largest = 0, (0, "")
    Image.init()  # loads plugins, which otherwise each thread would load
    with ThreadPoolExecutor(THREADS) as pool:
        for number, shard in enumerate(
            counted(pool.map(_Shard, paths), len(paths), "reading shards", "shards")
        ):
            rows += [row([number, *image]) for image in shard.images]
            first += shard.faults[: 3 - len(first)]
            faults += len(shard.faults)
            largest = max(largest, shard.largest)
    logger.info("%d shards: %d captioned images, %d faults", len(paths), len(rows), faults)
    return {"faults": faults, "first": first, "pixels": largest[0], "largest": largest[1]}, {"images": rows}


class _Shard:
    """The content of a shard.

    Attributes:
        images: member, offset, length in bytes and caption of each complete sample.
        faults: what is not complete, and why.
        largest: the greatest number of pixels, and the image.
    """

    def __init__(self, path: str):
        self.path = path
        self.images: list[tuple[str, int, int, str]] = []
        self.faults: list[str] = []
        self.largest = (0, "")
        self._samples: dict[str, dict] = {}
        self._cut_in = ""  # the key of the sample where the shard ends too early
        try:
            self._read()
        except OSError as error:
            raise DataError(f"{path}: the shard cannot be read ({error.strerror})") from error
        for key, sample in self._samples.items():
            caption = sample.get("txt") or sample.get("json")
            if "image" in sample and caption:
                self.images.append((*sample["image"], caption))
            elif key == self._cut_in:
                continue
            elif "image" in sample:
                self._fault(
                    f"{key} has no caption: expected {key}.txt, or {key}.json with `caption`, a string"
                )
            else:
                self._fault(sample.get("broken") or f"{key} has no image ({', '.join(IMAGES)})")
        del self._samples

    def _fault(self, text: str) -> None:
        self.faults.append(text if text.startswith(self.path) else f"{self.path}: {text}")

    def _read(self) -> None:
        with open(self.path, "rb") as file:
            start = file.read(6)
            for magic, kind in _COMPRESSED.items():
                if start.startswith(magic):
                    raise DataError(
                        f"{self.path}: the shard is compressed ({kind}), and its images cannot be read in any order; "
                        "unpack it to a plain tar file"
                    )
            length = file.seek(0, os.SEEK_END)
            file.seek(0)
            end, reason = 0, ""
            try:
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    while (member := tar.next()) is not None:
                        tar.members.clear()  # it would keep them all
                        if member.offset_data + member.size > length:
                            break
                        if member.isreg():
                            self._member(tar, member)
                    end = tar.offset
            except (tarfile.TarError, ValueError, EOFError, OverflowError) as error:
                reason = f" ({error})"
            file.seek(end)
            block = file.read(_BLOCK)
            if reason or len(block) < _BLOCK or any(block):
                self._cut_in = next(reversed(self._samples), "")
                self._fault(
                    f"the shard is cut off or broken at byte {min(end, length):,}{reason}; expected a complete tar file"
                )

    def _member(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        found = _NAME.fullmatch(member.name)
        if not found or found[1].rpartition("/")[2].startswith("__"):  # WebDataset's own
            return
        key, kind = found[1], found[2].lower()
        if kind not in (*IMAGES, "txt", "json"):
            return
        sample = self._samples.setdefault(key, {})
        if kind not in IMAGES:
            if kind in sample:
                self._fault(f"{member.name} is there twice; the first is used")
                return
            sample[kind] = _caption(kind, tar.extractfile(member).read())
        elif "image" in sample:
            self._fault(f"{key} has two images, {sample['image'][0]} and {member.name}; the first is used")
        else:
            label = f"{self.path}/{member.name}"
            try:
                header = read_header(label, max_pixels=0, file=tar.extractfile(member))
            except ImageError as error:
                sample["broken"] = str(error)
            else:
                sample["image"] = (_encodable(member.name), member.offset_data, member.size)
                self.largest = max(self.largest, (header.width * header.height, label))


def _caption(kind: str, content: bytes) -> str:
    """Return the caption in a sample's text or JSON, or "" if it has none."""
    try:
        found = json.loads(content) if kind == "json" else content.decode("utf-8-sig")
    except ValueError:
        return ""
    if kind == "json":
        found = found.get("caption") if isinstance(found, dict) else None
    return _encodable(found).strip() if isinstance(found, str) else ""


def _encodable(text: str) -> str:
    """Replace what UTF-8 cannot have: halves of surrogate pairs, which JSON and the names in a tar file can contain."""
    return text.encode("utf-8", "replace").decode("utf-8")
