"""The zoo's table, MODEL_ZOO.md's tables made from it, and the command."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest

from visft import model_zoo
from visft.checkpoint.open_clip_models import open_clip
from visft.commands import model_zoo as command
from visft.errors import ConfigError
from visft.model_zoo import entries, places, tables


@pytest.fixture
def copy(tmp_path, monkeypatch, root):
    """A copy of zoo.json and MODEL_ZOO.md that a test may change; returns the document."""
    shutil.copy(entries.TABLE, tmp_path / "zoo.json")
    shutil.copy(root / "MODEL_ZOO.md", tmp_path / "MODEL_ZOO.md")
    monkeypatch.setattr(entries, "TABLE", tmp_path / "zoo.json")
    entries.reload()
    yield tmp_path / "MODEL_ZOO.md"
    monkeypatch.undo()
    entries.reload()


def edit(change) -> None:
    data = json.loads(entries.TABLE.read_text())
    change(data)
    entries.TABLE.write_text(tables.dumps(data))
    entries.reload()


# -- the table


def test_every_weight_file_of_the_package_is_in_the_table_with_its_hash():
    shipped = {entry.package: entry for entry in entries.entries().values() if entry.package}
    files = {
        f"{folder}/{path.name}": path
        for folder in entries.SHIPPED
        for path in entries.in_package(folder).glob("*.safetensors")
    }
    assert shipped.keys() == files.keys() and len(files) >= 3
    for name, path in files.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == shipped[name].sha256, name
        assert path.stat().st_size == shipped[name].bytes
        assert Path(model_zoo.get_file(shipped[name].name)) == path
    assert sum(entry.bytes for entry in shipped.values()) <= 25e6


def test_every_entry_can_be_fetched_and_names_what_is_there():
    known = entries.entries()
    assert list(known) == model_zoo.list("files") and len(known) == len(entries.table()["files"])
    cached = [file for entry in known.values() for file in entry.files]
    assert len(set(cached)) == len(cached) and all(cached)
    for entry in known.values():
        sources = [entry.package, entry.url, entry.repository, entry.open_clip]
        assert sum(map(bool, sources)) == 1, entry.name
        assert not entry.url or entry.url.startswith("https://")
        assert entry.licence and (not entry.sha256 or re.fullmatch("[0-9a-f]{64}", entry.sha256))
        assert bool(entry.package) <= bool(entry.sha256 and entry.bytes)
    for row in entries.table()["files"]:
        assert row["config"] in model_zoo.list(), row["name"]
        columns = {key.split(".")[0] for _, key in entries.table()["tables"][row["table"]]} - {"source"}
        known_keys = set(entries.Entry.__dataclass_fields__) | columns | {"table", "config"}
        assert set(row) <= known_keys, row["name"]


def test_bases_are_those_that_the_configs_name():
    for row in entries.table()["files"]:
        if "open_clip" in row:
            vit = model_zoo.get_config(row["config"]).MODEL.CLIP_VIT
            assert row["open_clip"] == [vit.NAME, vit.PRETRAINED]
            about = open_clip().get_pretrained_cfg(*row["open_clip"])
            assert about["hf_hub"].endswith("/")


def test_the_authors_release_is_complete():
    """What the paper's release has, by method.md: three heads and five LoRA files for each of two towers."""
    files = {entry.file for entry in entries.entries().values() if entry.repository == "TencentARC/ViSFT"}
    expected = {f"eva_{k}_{h}_heads.ckpt" for k in "ge" for h in ("caption", "segment", "detection")}
    assert files == expected | {
        f"eva_{k}_lora_{n}.pt" for k in "ge" for n in (5000, 10000, 15000, 20000, 50000)
    }


def test_every_config_is_in_the_table():
    assert sorted(row["name"] for row in entries.table()["configs"]) == model_zoo.list()


def test_list_of_another_kind():
    with pytest.raises(ConfigError, match="kind is `weights`; expected `configs` or `files`"):
        model_zoo.list("weights")


# -- MODEL_ZOO.md


def test_the_document_has_the_tables_of_the_data_file():
    tables.check()


def test_a_table_that_differs_is_named_and_mended(copy, capsys):
    copy.write_text(copy.read_text().replace("| see LAVIS |", "| MIT |"))
    assert command.main(["verify", "--check", "tables", "--document", str(copy)]) == 1
    assert "differs from zoo.json in bases" in capsys.readouterr().err
    assert command.main(["table", "--write", "--document", str(copy)]) == 0
    assert command.main(["verify", "--check", "tables", "--document", str(copy)]) == 0


def test_a_document_without_a_place_for_a_table(copy):
    copy.write_text(copy.read_text().replace("<!-- zoo: authors -->", "<!-- zoo: autors -->"))
    with pytest.raises(ConfigError, match="autors.*expected one each.*authors"):
        tables.check(copy)
    with pytest.raises(ConfigError, match="there is no such file"):
        tables.check(copy.with_name("none.md"))


def test_new_weights_are_published_by_one_command(copy, capsys):
    rows = {row["name"]: row for row in entries.table()["files"]}
    before = json.loads(entries.TABLE.read_text())

    def spoil(data):
        for row in data["files"][:3]:
            row.update(sha256="ab" * 32, bytes=1)
        next(r for r in data["files"] if r["name"] == "heads_demo_detection")["figures"] = {}

    edit(spoil)
    assert command.main(["verify"]) == 1
    captured = capsys.readouterr()
    assert captured.out.count("BAD ") == 3 and "heads_demo_detection" in captured.err
    assert command.main(["table", "--rehash", "--write", "--document", str(copy)]) == 0
    assert json.loads(entries.TABLE.read_text()) == before
    assert entries.find("heads_demo_detection").sha256 == rows["heads_demo_detection"]["sha256"]
    tables.check(copy)
    assert tables.rehash() == []


def test_a_weight_file_without_a_row_is_not_forgotten(copy, capsys):
    edit(lambda data: data["files"].pop(1))
    assert command.main(["table", "--rehash"]) == 1
    assert "no row with `package` visft/model_zoo/weights/heads_demo_detection" in capsys.readouterr().err


def test_rows_show_what_the_data_file_says(copy):
    def change(data):
        data["tables"] = {
            "t": [["name", "name"], ["AP", "figures.a/AP"], ["by", "command"], ["size", "bytes"]]
        }
        data["files"] = [
            {"name": "f", "table": "t", "figures": {"a/AP": 41.0}, "command": "make it", "bytes": 1_500_000},
            {"name": "g", "table": "t"},
        ]

    edit(change)
    assert tables.render("t") == (
        "| name | AP | by | size |\n|---|---|---|---|\n| `f` | 41 | `make it` | 1.5 MB |\n| `g` |  |  |  |\n"
    )


# -- the command


def test_list_and_verify(capsys, cache_folder, content):
    cache_folder.mkdir()
    (cache_folder / "eva_g_lora_5000.pt").write_bytes(content)
    assert command.main(["list"]) == 0
    out = capsys.readouterr().out
    for name in [*model_zoo.list(), *model_zoo.list("files")]:
        assert f"  {name}" in out
    assert re.search(r"eva_g_lora_5000 +in the cache", out) and "huggingface.co/TencentARC/ViSFT" in out
    assert command.main(["verify"]) == 0
    assert f"ok   eva_g_lora_5000  {cache_folder}/eva_g_lora_5000.pt" in capsys.readouterr().out
    assert command.main(["verify", "eva_vit_g"]) == 1
    assert "model_zoo.py download eva_vit_g" in capsys.readouterr().out
    (cache_folder / "eva_g_lora_5000.pt").write_bytes(content[1:])
    assert command.main(["verify", "eva_g_lora_5000"]) == 1
    assert "not as published: eva_g_lora_5000" in capsys.readouterr().err


def test_download_says_what_is_wrong_in_one_line(capsys, monkeypatch):
    assert command.main(["download", "eva_g_lora_6000"]) == 1
    assert capsys.readouterr().err.startswith(
        "error: model_zoo has no weights `eva_g_lora_6000`; the nearest is"
    )
    assert command.main(["download", "heads_demo_detection"]) == 0
    assert Path(capsys.readouterr().out.strip()).is_file()
    assert not places.folder().exists()
