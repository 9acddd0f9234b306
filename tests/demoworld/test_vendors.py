"""Other vendors' drawings: from packages in both layouts to files named by code points."""

import hashlib
import io
import json
import tarfile

import pytest

from demoworld import catalogue, vendors
from demoworld.errors import DemoWorldError

DOG = '<path fill="#a05a2c" d="M2 2h12v12H2z"/>'


def _package(path, files: dict[str, str]):
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """A program in npm's place that "packs" a file; returns what makes vendor `some` of a package's files."""

    def serve(files: dict[str, str], *, sha256: str | None = None, iconify: bool = True) -> str:
        archive = tmp_path / "some.tgz"
        digest = _package(archive, files)
        program = tmp_path / "npm"
        program.write_text(f"#!/bin/sh\ncp {archive} .\n")
        program.chmod(0o755)
        vendor = vendors.Vendor("some@1", sha256 or digest, "MIT", iconify)
        monkeypatch.setitem(vendors.VENDORS, "some", vendor)
        return str(program)

    return serve


def _icons(**characters: str) -> dict[str, str]:
    icons = {"icons": {"dog-face": {"body": DOG}, "wide": {"body": DOG, "width": 32}}, "height": 16}
    return {"icons.json": json.dumps(icons), "chars.json": json.dumps(characters)}


def test_characters_name_the_drawings(npm, tmp_path):
    program = npm(_icons(**{"1f436": "dog-face", "2708-fe0f": "wide", "1f415": "an-alias"}))
    folder = vendors.fetch("some", tmp_path / "out", npm=program)
    assert sorted(path.name for path in folder.iterdir()) == ["1f436.svg", "2708.svg"]
    rgba, index = catalogue.other_images(folder, size=32)
    assert {catalogue.catalogue()[i].name for i in index} == {"dog face", "airplane"}
    dog = [catalogue.catalogue()[i].name for i in index].index("dog face")
    assert tuple(rgba[dog, 16, 16]) == (0xA0, 0x5A, 0x2C, 255)


def test_names_stand_in_for_characters(npm, tmp_path):
    folder = vendors.fetch("some", tmp_path / "out", npm=npm(_icons()))
    assert [path.name for path in folder.iterdir()] == ["1f436.svg"], "`wide` is no emoji's name"


def test_plain_files_and_repeats(npm, tmp_path):
    program = npm({"svg/1f436.svg": "<svg/>", "readme.md": "text"}, iconify=False)
    folder = vendors.fetch("some", tmp_path / "out", npm=program)
    assert [path.name for path in folder.iterdir()] == ["1f436.svg"]
    assert vendors.fetch("some", tmp_path / "out", npm="is-not-asked-again") == folder


@pytest.mark.parametrize(
    ("vendor", "sha256", "program", "message"),
    [
        ("other", None, None, "there is no vendor `other`; known are noto"),
        ("some", "0" * 64, None, "expected 0000"),
        ("some", None, "no-such-npm", "not installed"),
        ("some", None, "false", "could not fetch some@1: it wrote no file"),
    ],
)
def test_refused(npm, tmp_path, vendor, sha256, program, message):
    served = npm(_icons(), sha256=sha256)
    with pytest.raises(DemoWorldError, match=message):
        vendors.fetch(vendor, tmp_path / "out", npm=program or served)
    assert not list((tmp_path / "out").glob("*")), "nothing half-written stays"
