"""visft://NAME, from a mirror and from the Hub: hashes, the record, no network, several processes, kills."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from detectron2.utils.file_io import PathManager

from visft import model_zoo
from visft.errors import CheckpointError, ConfigError
from visft.model_zoo import cache, entries, places

NAME, FILE = "eva_g_lora_5000", "eva_g_lora_5000.pt"


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def record(folder: Path) -> dict:
    return json.loads((folder / cache.RECORD).read_text())


SMALL_PIECES = """
import sys
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 4096  # the client writes in pieces of 10 MB, more than a test wants to send
from visft.commands import model_zoo
sys.exit(model_zoo.main(["download", sys.argv[1]]))
"""


def start(name: str, **environment: str) -> subprocess.Popen:
    """The tool in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", SMALL_PIECES, name],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def mirror(serve, content, monkeypatch):
    server = serve({FILE: content})
    monkeypatch.setenv("VISFT_ZOO_MIRROR", f"{server.url}/zoo/")
    return server


@pytest.fixture
def table(tmp_path, monkeypatch):
    """`table({...})` makes the zoo's table hold these entries alone."""

    def write(*rows: dict) -> None:
        file = tmp_path / "zoo.json"
        file.write_text(json.dumps({"tables": {}, "files": list(rows), "configs": []}))
        monkeypatch.setattr(entries, "TABLE", file)
        entries.reload()

    yield write
    monkeypatch.undo()
    entries.reload()


# -- hashes and the record


def test_first_download_is_recorded_and_a_later_one_must_equal_it(mirror, content, cache_folder):
    path = Path(model_zoo.get_file(NAME))
    assert path == cache_folder / FILE and path.read_bytes() == content
    assert mirror.seen[0]["path"] == f"/zoo/{FILE}"
    row = record(cache_folder)[FILE]
    assert (row["sha256"], row["bytes"]) == (sha(content), len(content))
    assert row["url"] == f"{mirror.url}/zoo/{FILE}"

    assert (
        model_zoo.get_file(FILE) == str(path) and len(mirror.seen) == 1
    )  # kept, and known by its file name too
    path.unlink()
    mirror.files[FILE] = content[::-1]
    with pytest.raises(CheckpointError) as raised:
        model_zoo.get_file(NAME)
    for words in (f"{mirror.url}/zoo/{FILE}", sha(content), sha(content[::-1]), "nothing of it was kept"):
        assert words in str(raised.value)
    assert not path.exists() and not list(cache_folder.glob(".*.download*"))
    mirror.files[FILE] = content
    assert Path(model_zoo.get_file(NAME)).read_bytes() == content


def test_downloading_again_keeps_the_good_file_when_another_comes(mirror, content, cache_folder):
    path = Path(model_zoo.get_file(NAME))
    mirror.files[FILE] = content[1:]
    with pytest.raises(CheckpointError, match="by its first download"):
        cache.fetch(entries.find(NAME), again=True)
    assert path.read_bytes() == content and model_zoo.get_file(NAME) == str(path)


def test_a_published_hash_is_the_one_that_counts(serve, content, table, cache_folder):
    server = serve({"f.safetensors": content})
    row = {"name": "f", "licence": "x", "file": "f.safetensors", "url": f"{server.url}/f.safetensors"}
    table({**row, "sha256": sha(content), "bytes": len(content)})
    assert Path(model_zoo.get_file("f")).read_bytes() == content
    (cache_folder / "f.safetensors").unlink()
    table({**row, "sha256": "ab" * 32})
    with pytest.raises(CheckpointError, match=f"{sha(content)}, expected {'ab' * 32} by the zoo's table"):
        model_zoo.get_file("f")
    assert not (cache_folder / "f.safetensors").exists()


def test_a_file_that_changed_in_the_cache_is_noticed(mirror, content, cache_folder):
    path = Path(model_zoo.get_file(NAME))
    path.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=f"{FILE} has SHA-256 .*it was changed since"):
        model_zoo.get_file(NAME)
    path.write_bytes(content)  # other time, same bytes
    assert model_zoo.get_file(NAME) == str(path)
    path.unlink()
    path.write_bytes(content)
    assert cache.verify(entries.find(NAME)) == path


def test_a_file_put_there_by_hand_is_taken(content, cache_folder):
    cache_folder.mkdir()
    (cache_folder / FILE).write_bytes(content)
    assert Path(model_zoo.get_file(NAME)).read_bytes() == content
    assert record(cache_folder)[FILE]["sha256"] == sha(content)


def test_files_of_the_package_are_checked(table, tmp_path, monkeypatch):
    row = entries.table()["files"][0]
    table({**row, "sha256": "cd" * 32})
    with pytest.raises(CheckpointError, match="expected cdcd.*install visft again.*table --rehash"):
        model_zoo.get_file(row["name"])
    monkeypatch.setattr(cache, "in_package", lambda path: tmp_path / path)
    monkeypatch.setattr(places, "in_package", lambda path: tmp_path / path)
    with pytest.raises(CheckpointError, match="no such file; install visft again"):
        model_zoo.get_file(row["name"])


# -- where files come from and go to


def test_offline(mirror, content, monkeypatch, cache_folder):
    monkeypatch.setenv("VISFT_OFFLINE", "1")
    with pytest.raises(
        CheckpointError, match=f"visft://{NAME}: is not in the cache {cache_folder}.*VISFT_OFFLINE"
    ):
        model_zoo.get_file(NAME)
    assert mirror.seen == []
    monkeypatch.setenv("VISFT_OFFLINE", "0")
    path = model_zoo.get_file(NAME)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    mirror.seen.clear()
    assert model_zoo.get_file(NAME) == path and mirror.seen == []


def test_a_folder_as_mirror(tmp_path, content, monkeypatch, cache_folder):
    shared = tmp_path / "shared"
    shared.mkdir()
    monkeypatch.setenv("VISFT_ZOO_MIRROR", str(shared))
    with pytest.raises(CheckpointError, match=f"{shared}/{FILE}: the mirror has no such file"):
        model_zoo.get_file(NAME)
    (shared / FILE).write_bytes(content)
    assert Path(model_zoo.get_file(NAME)).read_bytes() == content
    (cache_folder / FILE).unlink()
    (shared / FILE).write_bytes(content[5:])
    with pytest.raises(CheckpointError, match="nothing of it was kept"):
        model_zoo.get_file(NAME)
    assert sorted(p.name for p in cache_folder.iterdir() if not p.name.endswith(".lock")) == [cache.RECORD]


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("VISFT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert places.folder() == tmp_path / "xdg" / "visft"
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "fvcore"))
    assert places.folder() == tmp_path / "fvcore" / "visft"
    monkeypatch.setenv("VISFT_CACHE", str(tmp_path / "own"))
    assert places.folder() == tmp_path / "own"


def test_a_cache_that_cannot_be_written(mirror, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VISFT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(CheckpointError, match="cannot be written to .*VISFT_CACHE"):
        model_zoo.get_file(NAME)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("404", "no such file .*404"),
        ("500", "cannot be downloaded .*500.*run the same command again"),
        ("half", "cannot be downloaded"),
        ("hang up", "cannot be downloaded"),
        ("page", "a web page instead of"),
    ],
)
def test_what_a_mirror_may_answer(mirror, content, cache_folder, how, words):
    mirror.plan = [how]
    with pytest.raises(CheckpointError, match=words) as raised:
        model_zoo.get_file(NAME)
    assert f"{mirror.url}/zoo/{FILE}" in str(raised.value)
    assert [path.name for path in cache_folder.iterdir() if not path.name.endswith(".lock")] == []
    mirror.plan = ["whole"]
    assert Path(model_zoo.get_file(NAME)).read_bytes() == content


# -- the Hub


@pytest.fixture
def hub(serve, content, monkeypatch):
    server = serve({FILE: content, "open_clip_pytorch_model.bin": content[::-1]})
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 4096)
    return server


def test_the_hub_gives_the_file_and_its_hash(hub, content, monkeypatch, cache_folder):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert Path(model_zoo.get_file(NAME)).read_bytes() == content
    assert {r["path"] for r in hub.seen} == {f"/TencentARC/ViSFT/resolve/main/{FILE}"}
    assert len(hub.gets()) == 1
    assert all(request["authorization"] == "Bearer hf_secret" for request in hub.seen)


def test_other_bytes_than_the_hub_states(hub, content, cache_folder):
    hub.stated = "ef" * 32
    with pytest.raises(CheckpointError, match=f"{sha(content)}, expected {'ef' * 32} by the Hub; nothing"):
        model_zoo.get_file(NAME)
    assert not (cache_folder / FILE).exists() and not (cache_folder / cache.RECORD).exists()


def test_a_hub_download_is_continued(hub, content):
    hub.plan = ["half"] + ["404"] * 9
    with pytest.raises(CheckpointError):
        model_zoo.get_file(NAME)
    hub.plan = ["whole"]
    assert Path(model_zoo.get_file(NAME)).read_bytes() == content
    assert hub.sent <= len(content) + 4096  # the last piece, not yet written, comes twice


def test_the_hub_lacks_the_file_or_refuses(hub, content, monkeypatch):
    hub.files.clear()
    with pytest.raises(CheckpointError, match="TencentARC/ViSFT has no file eva_g_lora_5000.pt"):
        model_zoo.get_file(NAME)
    hub.files[FILE], hub.head = content, 401
    with pytest.raises(CheckpointError, match="does not give .* out .*HF_TOKEN"):
        model_zoo.get_file(NAME)
    assert hub.gets() == []


def test_a_base_of_open_clip_comes_by_its_tag_in_either_format(hub, content, cache_folder):
    path = Path(model_zoo.get_file("ViT-B-16.laion2b_s34b_b88k"))
    assert path == cache_folder / "ViT-B-16.laion2b_s34b_b88k.bin" and path.read_bytes() == content[::-1]
    where = "/laion/CLIP-ViT-B-16-laion2B-s34B-b88K/resolve/main/"
    assert [request["path"] for request in hub.gets()] == [where + "open_clip_pytorch_model.bin"]
    seen = len(hub.seen)
    assert model_zoo.get_file("ViT-B-16.laion2b_s34b_b88k") == str(path) and len(hub.seen) == seen


# -- visft:// in detectron2 and ViSFT


def test_paths_of_detectron2(mirror, content):
    path = f"visft://{NAME}"
    assert PathManager.isfile(path) and PathManager.exists(path) and not PathManager.isdir(path)
    assert mirror.seen == []  # asking whether it exists downloads nothing
    with PathManager.open(path, "rb") as file:
        assert file.read() == content
    assert Path(PathManager.get_local_path(path)).read_bytes() == content and len(mirror.gets()) == 1
    with pytest.raises(CheckpointError, match="can only be read"):
        PathManager.open(path, "wb")
    assert not PathManager.isfile("visft://eva_g_lora_6000")
    with pytest.raises(CheckpointError, match="visft://eva_g_lora_6000: .*nearest is `eva_g_lora_.000"):
        PathManager.get_local_path("visft://eva_g_lora_6000")
    with pytest.raises(ConfigError, match="no weights `vit`.*visft_tiny_demo"):
        model_zoo.get_file("vit")


def test_weights_through_visft_paths(serve, tmp_path, monkeypatch, cache_folder):
    """A LoRA file of the authors' layout, read by the functions behind HEAD_FILES, MODEL.WEIGHTS and --weights."""
    from visft.checkpoint import files, load

    tensors = {f"visual.blocks.0.attn.qkv.lora_{end}": torch.ones(2, 2) for end in "AB"}
    torch.save(tensors, tmp_path / FILE)
    server = serve({FILE: (tmp_path / FILE).read_bytes()})
    monkeypatch.setenv("VISFT_ZOO_MIRROR", server.url)
    assert files.read_shapes(f"visft://{NAME}") == {name: (2, 2) for name in tensors}
    assert load.check_file(f"visft://{NAME}", key="--weights") == [cache_folder / FILE]
    server.files.clear()
    with pytest.raises(CheckpointError, match="MODEL.WEIGHTS: .*eva_e_lora_5000.pt: .*no such file"):
        load.check_file("visft://eva_e_lora_5000", key="MODEL.WEIGHTS")


@pytest.mark.parametrize("remote", [False, True])
def test_a_tower_by_its_path(serve, table, remote):
    """MODEL.CLIP_VIT.PRETRAINED visft://NAME: the same tower as by open_clip's tag."""
    from demoworld.tower import WEIGHTS_FILE
    from visft.modeling.backbone import CLIPViT

    name = "visft_tiny_demo"
    if remote:
        server, name = serve({"tiny.safetensors": WEIGHTS_FILE.read_bytes()}), "tiny"
        table(
            {"name": name, "licence": "", "file": "tiny.safetensors", "url": f"{server.url}/tiny.safetensors"}
        )
    found = CLIPViT.from_open_clip("visft-tiny", f"visft://{name}")
    expected = CLIPViT.from_open_clip("visft-tiny", "demo")
    for key, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key
    assert found.base.sha256 == expected.base.sha256
    assert torch.equal(found.base.clip().logit_scale, expected.base.clip().logit_scale)
    with pytest.raises(
        CheckpointError, match="MODEL.CLIP_VIT.PRETRAINED: visft://none: model_zoo has no weights"
    ):
        CLIPViT.from_open_clip("visft-tiny", "visft://none")


def test_a_whole_model_by_names(monkeypatch):
    """HEAD_FILES and PRETRAINED as visft://NAME, without suffix, give the model of the shipped config."""
    expected = model_zoo.get("visft_demo")
    cfg = model_zoo.get_config("visft_demo")
    cfg.MODEL.CLIP_VIT.PRETRAINED = "visft://visft_tiny_demo"
    cfg.MODEL.VISFT.HEAD_FILES = tuple(
        file.removesuffix(".safetensors") for file in cfg.MODEL.VISFT.HEAD_FILES
    )
    monkeypatch.setattr(model_zoo, "get_config", lambda name: cfg)
    found = model_zoo.get("visft_demo").state_dict()
    loaded = ("backbone.", "heads.detection.", "heads.segmentation.")
    kept = {
        name: value
        for name, value in expected.state_dict().items()
        if name.startswith(loaded) and not name.endswith("lora_A")  # LoRA starts at random
    }
    assert len(kept) > 300 and not expected.training
    assert [name for name, value in kept.items() if not torch.equal(found[name], value)] == []


# -- processes


def wait_for(condition, seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


def test_two_processes_download_once(mirror, content, cache_folder):
    mirror.delay = 0.1  # 2.5 s in all
    first, second = start(NAME), start(NAME)
    (out, error), (other, _) = first.communicate(timeout=400), second.communicate(timeout=400)
    assert first.returncode == second.returncode == 0, error
    assert out == other == f"{cache_folder / FILE}\n"
    assert (cache_folder / FILE).read_bytes() == content
    assert len(mirror.gets()) == 1 and mirror.sent == len(content)


def test_killed_during_the_download_then_finished(hub, content, cache_folder):
    hub.delay = 0.2
    process = start(NAME)
    parts = lambda: [p for p in cache_folder.glob(".*.download") if p.stat().st_size > 8192]  # noqa: E731
    wait_for(parts)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = parts()[0].stat().st_size
    assert 0 < kept < len(content) and not (cache_folder / FILE).exists()
    hub.delay = 0.0
    assert Path(model_zoo.get_file(NAME)).read_bytes() == content
    assert hub.gets()[1]["range"] == f"bytes={kept}-"
    assert not list(cache_folder.glob(".*.download"))


def test_bytes_of_another_version_are_not_glued_together(hub, content, cache_folder):
    hub.plan = ["half"] + ["400"] * 9
    with pytest.raises(CheckpointError, match="What came is kept, and continued"):
        model_zoo.get_file(NAME)
    hub.files[FILE], hub.plan = content[::-1], ["whole"]
    assert Path(model_zoo.get_file(NAME)).read_bytes() == content[::-1]
    assert "range" not in hub.gets()[-1]
