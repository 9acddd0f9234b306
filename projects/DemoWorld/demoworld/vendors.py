"""Further vendors' drawings of the emoji, from npm packages, as folders of files like `1f415.svg`.

The demo tower is pretrained on several vendors, so that it learns things rather than one vendor's style. Twemoji is
held out for evaluation. The project contains none of these drawings.
"""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from demoworld.catalogue import catalogue, normal_key
from demoworld.errors import DemoWorldError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Vendor:
    """A vendor's drawings in an npm package.

    Args:
        package: name and version on npm.
        sha256: of the package's file.
        license: of the drawings.
        iconify: whether the package is one of Iconify's (`icons.json` and `chars.json`). Otherwise it has SVG files.
    """

    package: str
    sha256: str
    license: str
    iconify: bool = True


VENDORS: dict[str, Vendor] = {
    name: Vendor(**row)
    for name, row in json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8")).items()
}


def fetch(name: str, folder: str | Path, npm: str = "npm") -> Path:
    """Write a vendor's drawings to `folder/name/*.svg`, named by code points, and return this folder.

    If they are already there, nothing is done. `npm pack` fetches the package from npm's configured registry and runs
    none of its scripts.

    Raises:
        DemoWorldError: the vendor is unknown, npm is missing or fails, or the file has another hash.
    """
    if name not in VENDORS:
        raise DemoWorldError(f"there is no vendor `{name}`; known are {', '.join(VENDORS)}")
    vendor, target = VENDORS[name], Path(folder) / name
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as scratch:
        archive = _packed(vendor, Path(scratch), npm)
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != vendor.sha256:
            raise DemoWorldError(f"{vendor.package}: its file has SHA-256 {found}, expected {vendor.sha256}")
        drawings = Path(scratch) / "svg"
        drawings.mkdir()
        with tarfile.open(archive) as tar:
            count = (_iconify if vendor.iconify else _files)(tar, drawings)
        os.replace(drawings, target)
    logger.info("%s: %d drawings of %s (%s)", target, count, vendor.package, vendor.license)
    return target


def _packed(vendor: Vendor, folder: Path, npm: str) -> Path:
    if shutil.which(npm) is None:
        raise DemoWorldError(f"{vendor.package} is fetched by npm, which is not installed here")
    done = subprocess.run(
        [npm, "pack", "--silent", "--ignore-scripts", vendor.package],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    archives = list(folder.glob("*.tgz"))
    if done.returncode or len(archives) != 1:
        raise DemoWorldError(
            f"npm could not fetch {vendor.package}: {done.stderr.strip() or 'it wrote no file'}"
        )
    return archives[0]


def _iconify(tar: tarfile.TarFile, folder: Path) -> int:
    """Write the drawings of an Iconify package and return their number."""

    def member(name: str) -> dict:
        return json.load(tar.extractfile(f"package/{name}"))

    icons, characters = member("icons.json"), member("chars.json")
    if not characters:  # Some packages only have Unicode's names, in various spellings.
        points_of = {_letters(emoji.name): emoji.key for emoji in catalogue()}
        characters = {points_of[_letters(n)]: n for n in icons["icons"] if _letters(n) in points_of}
    count = 0
    for points, icon_name in characters.items():
        icon = icons["icons"].get(icon_name)
        if icon is None:  # an alias: another icon, turned or mirrored
            continue
        width = icon.get("width", icons.get("width", 16))
        height = icon.get("height", icons.get("height", 16))
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{icon["body"]}</svg>'
        (folder / f"{normal_key(points)}.svg").write_text(svg, encoding="utf-8")
        count += 1
    return count


def _letters(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def _files(tar: tarfile.TarFile, folder: Path) -> int:
    """Write a package's SVG files unchanged and return their number."""
    count = 0
    for member in tar:
        path = Path(member.name)
        if member.isfile() and path.suffix == ".svg":
            (folder / path.name).write_bytes(tar.extractfile(member).read())
            count += 1
    return count
