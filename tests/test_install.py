"""What an installed visft carries, costs at import, says and keeps quiet; and how a broken environment is mended."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PACKAGES = ("visft", "towerbench", "demoworld")


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter with every warning shown."""
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=300,
    )


@pytest.fixture(scope="module")
def installer(root):
    spec = importlib.util.spec_from_file_location("visft_install", root / "scripts" / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_import_is_cheap_and_leaves_open_clip_alone():
    code = """
import sys, time
import detectron2.modeling
start = time.process_time()
import visft
print(time.process_time() - start, "open_clip" in sys.modules)
"""
    # The fastest of up to three: what others do on the machine only ever adds.
    for _ in range(3):
        done = python(code)
        assert done.returncode == 0, done.stderr
        seconds, open_clip = done.stdout.split()
        assert open_clip == "False"
        if float(seconds) < 0.5:
            return
    pytest.fail("the fastest of three took more than half a second")


def test_import_registers_what_configs_name_and_knows_the_earlier_places_of_modules():
    code = """
import visft
from detectron2.config import get_cfg
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
from detectron2.data import DatasetCatalog
assert "build_clip_vit_backbone" in BACKBONE_REGISTRY and "build_clip_vit_fpn_backbone" in BACKBONE_REGISTRY
assert "ViSFT" in META_ARCH_REGISTRY and {"visft_demo_train", "visft_demo_val"} <= set(DatasetCatalog.list())
cfg = get_cfg()
visft.add_visft_config(cfg)
assert cfg.MODEL.CLIP_VIT.NAME == "ViT-B-16"

import visft.backbone.lora
from visft.backbone import CLIPViT
from visft.backbone.open_clip_zoo import TINY_WEIGHTS, create_clip
from visft.checkpoint import export
import visft.export, visft.modeling.backbone as new
assert CLIPViT is new.CLIPViT and visft.backbone.lora is new.lora and export is visft.export
assert create_clip is new.open_clip_models.create_clip and TINY_WEIGHTS.is_file()
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


WARNED = """
import logging, warnings
import detectron2.engine, torch
from detectron2.modeling.anchor_generator import _create_grid_offsets
_create_grid_offsets([2, 2], 4, 0.0, torch.zeros(1))
warnings.warn("`torch.jit.script` is deprecated", FutureWarning)
from torch.fx._symbolic_trace import is_fx_tracing
is_fx_tracing()
logging.getLogger("torch.fx._symbolic_trace").warning("another message of that module")
warnings.warn("`torch.jit.trace` is another matter", FutureWarning)
warnings.warn("a warning", DeprecationWarning)
"""


@pytest.mark.parametrize("filtered", [True, False])
def test_only_the_three_named_messages_are_filtered(filtered):
    shown = python(f"import visft\n{WARNED}" if filtered else WARNED).stderr
    assert ("`torch.jit.script` is deprecated" not in shown) == filtered
    assert ("torch.meshgrid: in an upcoming release" not in shown) == filtered
    if filtered:
        assert "is_fx_tracing will return true" not in shown
    assert "another message of that module" in shown
    assert "`torch.jit.trace` is another matter" in shown
    assert "DeprecationWarning: a warning" in shown


def test_without_detectron2_import_says_how_to_get_it():
    # None in sys.modules is how Python is told that a module is not there.
    code = """
import sys
sys.modules["detectron2"] = None
import visft
"""
    done = python(code)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ModuleNotFoundError: visft needs detectron2") and "make setup" in last


@pytest.fixture(scope="module")
def wheel(root, tmp_path_factory) -> zipfile.ZipFile:
    """The wheel that pip builds from what git would commit (and not from leftovers of earlier builds)."""
    source = tmp_path_factory.mktemp("source")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(listing, cwd=root, capture_output=True, check=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        if name.startswith(("tests/", "output/")) or not os.path.lexists(root / name):
            continue
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, source / name, follow_symlinks=False)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        "dist",
        ".",
    ]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (file,) = (source / "dist").glob("visft-*.whl")
    return zipfile.ZipFile(file)


def test_wheel_carries_every_module_config_and_data_file(wheel, root):
    names = set(wheel.namelist())
    configs = {f"visft/model_zoo/configs/{p.name}" for p in (root / "configs").glob("*.yaml")}
    configs |= {f"visft/model_zoo/configs/lazy/{p.name}" for p in (root / "configs" / "lazy").glob("*.py")}
    assert len(configs) >= 6 and configs <= names
    files = {
        "/".join(path.relative_to(root / "projects").parts[1:]): path
        for package in PACKAGES
        for path in root.glob(f"projects/*/{package}/**/*")
        if path.is_file() and path.suffix != ".pyc" and "configs" not in path.parts
    }
    assert {"visft/__init__.py", "visft/model_zoo/zoo.json", "demoworld/visft-tiny.json"} <= files.keys()
    assert sum(name.endswith(".safetensors") for name in files) >= 4
    for name, path in files.items():
        assert wheel.read(name) == path.read_bytes()


def test_installed_wheel_finds_its_configs(wheel, tmp_path):
    wheel.extractall(tmp_path)
    code = """
import demoworld, visft
from visft import model_zoo
print(visft.__file__, demoworld.__file__, model_zoo.get_file("visft_tiny_demo"))
for name in model_zoo.list():
    model_zoo.get_config_file(name)
print(model_zoo.get_config("cascade_mask_rcnn_clip_vit_b16_fpn").MODEL.BACKBONE.NAME)
"""
    done = python(code, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    *packages, backbone = done.stdout.split()
    assert all(Path(file).is_relative_to(tmp_path) for file in packages)
    assert backbone == "build_clip_vit_fpn_backbone"


def test_model_zoo_names_what_it_has_when_asked_for_another():
    from visft import model_zoo
    from visft.errors import ConfigError

    assert "lazy/fcos_clip_vit_b16" in model_zoo.list()
    with pytest.raises(ConfigError, match="no config `mask_rcnn`.*mask_rcnn_clip_vit_b16_fpn"):
        model_zoo.get_config("mask_rcnn")
    with pytest.raises(ConfigError):
        model_zoo.get_config_file("../../setup")


# -- scripts/install.py


def make_distribution(site: Path, name: str) -> Path:
    """An installed distribution as pip writes it, of one module and its metadata."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (site / f"{name}.py").write_text("x = 1\n")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "INSTALLER").write_text("pip\n")
    (info / "RECORD").write_text(
        f"{name}.py,sha256=abc,6\n{info.name}/METADATA,,\n__pycache__/{name}.pyc,,\n{info.name}/RECORD,,\n"
        f"{info.name}/INSTALLER,,4\n"
    )
    return info


def test_half_installed_distributions_are_found(installer, tmp_path):
    names = ("whole", "norecord", "missing", "short", "unfinished")
    whole, no_record, missing, short, unfinished = (make_distribution(tmp_path, name) for name in names)
    (no_record / "RECORD").unlink()
    (tmp_path / "missing.py").unlink()
    (tmp_path / "short.py").write_text("x =")
    record = unfinished / "RECORD"
    record.write_text("".join(line for line in record.open() if "INSTALLER" not in line))
    assert installer.broken_distributions(tmp_path) == [missing, no_record, short, unfinished]
    assert whole.exists()


def test_wheel_of_another_content_is_not_installed(installer, tmp_path):
    file = tmp_path / "sal_detectron2-0.7.2-cp310-none-any.whl"
    file.write_bytes(b"something else")
    with pytest.raises(installer.InstallError, match="not the file that was checked"):
        installer.check_sha256(file, installer.WHEEL_SHA256)
    installer.check_sha256(file, hashlib.sha256(b"something else").hexdigest())


def test_stamp_of_other_sources_or_missing_packages_is_no_stamp(installer, tmp_path):
    environment = installer.Environment(tmp_path)
    site = tmp_path / "site"
    for name in installer.NEEDED:
        (site / name).mkdir(parents=True)
        (site / name / "__init__.py").touch()
    environment.python.parent.mkdir()
    environment.python.touch()
    assert not environment.ready()
    stamp = {**environment.wanted(), "site": str(site)}
    environment.stamp.write_text(installer.json.dumps(stamp))
    assert environment.ready()
    environment.stamp.write_text(installer.json.dumps({**stamp, "sources": "older"}))
    assert not environment.ready()
    environment.stamp.write_text(installer.json.dumps(stamp)[:-9])
    assert not environment.ready()
    environment.stamp.write_text(installer.json.dumps(stamp))
    (site / "torch" / "__init__.py").unlink()
    assert not environment.ready()


def test_make_says_what_is_wrong_with_an_old_python(installer, monkeypatch):
    monkeypatch.setattr(installer.sys, "version_info", (3, 9, 2))
    with pytest.raises(installer.InstallError, match="Python 3.9.2 found, 3.10 or later needed"):
        installer.stop_old_python()
