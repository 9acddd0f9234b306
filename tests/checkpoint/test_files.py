"""Reading weight files that are whole, broken or hostile, and writing them so that a kill leaves nothing broken."""

import json
import os
import pickle
import stat
from pathlib import Path

import pytest
import safetensors.torch
import torch

from visft.checkpoint import files
from visft.errors import CheckpointError

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.tensor([1, 2], dtype=torch.int64)}


class Hostile:
    """Pickles to a call that creates a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_written_files_are_read_by_safetensors_itself(tmp_path):
    shared = torch.randn(4, 4)
    tensors = {
        "x": shared,
        "y": shared,
        "transposed": shared.t(),
        "row": shared[1],
        "empty": torch.zeros(0, 3),
    }
    files.write_safetensors(tmp_path / "deep" / "f.safetensors", tensors, {"k": "v"})
    assert same(safetensors.torch.load_file(tmp_path / "deep" / "f.safetensors"), tensors)
    assert files.read_metadata(tmp_path / "deep" / "f.safetensors") == {"k": "v"}
    assert os.listdir(tmp_path / "deep") == ["f.safetensors"]
    assert stat.S_IMODE((tmp_path / "deep" / "f.safetensors").stat().st_mode) & 0o400


@pytest.mark.parametrize("wrap", [None, "model", "state_dict"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pytorch_files(tmp_path, wrap, zipped):
    content = {f"module.{k}": v for k, v in TENSORS.items()}
    content = {wrap: content, "iteration": 3} if wrap else {**content, "epoch": 4}
    torch.save(content, tmp_path / "f.pt", _use_new_zipfile_serialization=zipped)
    assert same(files.read_tensors(tmp_path / "f.pt"), TENSORS)
    assert files.read_shapes(tmp_path / "f.pt") == {"a.weight": (2, 3), "a.bias": (2,)}
    assert files.read_metadata(tmp_path / "f.pt") == {}


def test_content_decides_not_the_name(tmp_path):
    safetensors.torch.save_file(TENSORS, tmp_path / "weights.pt")
    assert same(files.read_tensors(tmp_path / "weights.pt"), TENSORS)


def _hostile_files(folder: Path, marker: Path) -> list[Path]:
    plain, legacy, zipped, named, nested = (
        folder / name for name in ("plain.pkl", "legacy.pt", "zipped.pt", "named.safetensors", "nested.pth")
    )
    plain.write_bytes(pickle.dumps({"model": Hostile(marker)}))
    torch.save({"a": Hostile(marker)}, legacy, _use_new_zipfile_serialization=False)
    torch.save({"a": torch.zeros(2), "b": Hostile(marker)}, zipped)
    named.write_bytes(pickle.dumps({"model": Hostile(marker)}))
    torch.save({"model": {"a": torch.zeros(2)}, "optimizer": Hostile(marker)}, nested)
    return [plain, legacy, zipped, named, nested]


def test_code_in_a_pickle_is_refused_and_does_not_run(tmp_path):
    marker = tmp_path / "owned"
    hostile = _hostile_files(tmp_path, marker)
    for path in hostile:
        for read in (files.read_tensors, files.read_shapes):
            with pytest.raises(CheckpointError, match=path.name):
                read(path)
            assert not marker.exists()
    with pytest.raises(CheckpointError, match="can run code"):
        files.read_tensors(hostile[2])
    # They are hostile indeed: an unguarded reader is caught by them.
    torch.load(hostile[2], weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_cut_off_files_are_refused_by_name(tmp_path, kind):
    path = tmp_path / ("f.safetensors" if kind == "safetensors" else "f.pt")
    big = {"weight": torch.randn(300, 100)}
    if kind == "safetensors":
        safetensors.torch.save_file(big, path)
    else:
        torch.save(big, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    for size in (0, 1, 7, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=path.name):
            files.read_tensors(path)
        with pytest.raises(CheckpointError, match="empty" if size == 0 else "fetch it again"):
            files.read_shapes(path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_the_cause_is_what_the_bytes_tell(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    for content, words in (
        (b"<!DOCTYPE html><html>404</html>", "it is a web page: fetch"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "pointer of Git LFS"),
        (b"nothing that is known here", "it was cut off, or is of another format"),
        (safetensors.torch.save({"a": torch.zeros(100)})[:-7], "it was cut off after"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=words):
            files.read_tensors(path)
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
    with pytest.raises(CheckpointError, match="is a TorchScript archive, which holds code"):
        files.read_shapes(tmp_path / "script.pt")


def test_missing_files_folders_and_other_content(tmp_path):
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    torch.save({"lr": 1.0}, tmp_path / "numbers.pt")
    for name, reason in (
        ("absent.pt", "no such weight file"),
        (".", "is a folder"),
        ("list.pt", "a dictionary of named tensors was expected"),
        ("numbers.pt", "holds no tensors"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            files.read_tensors(tmp_path / name)


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "f.json"
    files.write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        files.write_json(path, {"new": object()})
    with pytest.raises(RuntimeError), files.write_aside(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"old": 1}
    assert os.listdir(tmp_path) == ["f.json"]
    path.write_text('{"cut": ')
    with pytest.raises(CheckpointError, match="no valid JSON"):
        files.read_json(path)


def test_leftovers_of_killed_writers_are_removed(tmp_path):
    (tmp_path / ".model.safetensors.123.partial").write_bytes(b"half")
    (tmp_path / "mine.partial").write_bytes(b"a user's own file")
    assert files.remove_leftovers(tmp_path) == [".model.safetensors.123.partial"]
    assert os.listdir(tmp_path) == ["mine.partial"]


def test_sha256_of_a_known_text(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.sha256(tmp_path / "abc") == expected


def test_equal_content_makes_equal_bytes(tmp_path):
    """safetensors itself orders metadata anew in every file."""
    texts = {name: f'"{name}" \\ ä\n\t\x01/\u2028' for name in ("visft", "format", "a", "ö", "c")}
    tensors = {"weight": torch.randn(3, 2), "bias": torch.arange(3)}
    for number, metadata in enumerate((texts, dict(reversed(texts.items())))):
        files.write_safetensors(tmp_path / f"{number}.safetensors", tensors, metadata)
    assert files.sha256(tmp_path / "0.safetensors") == files.sha256(tmp_path / "1.safetensors")
    with safetensors.safe_open(tmp_path / "0.safetensors", framework="pt") as file:
        assert file.metadata() == texts == files.read_metadata(tmp_path / "0.safetensors")
