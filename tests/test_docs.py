"""What the documents say about keys, files and commands is what the tree has."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from detectron2.config import CfgNode, get_cfg

from towerbench import arguments, registered, resolve
from visft import add_visft_config, model_zoo

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    "README.md",
    "projects/ViSFT/README.md",
    "projects/TowerBench/README.md",
    "projects/DemoWorld/README.md",
    "MODEL_ZOO.md",
    "CONTRIBUTING.md",
    *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")),
]


def test_the_page_of_config_keys_is_made_from_the_comments(root):
    done = subprocess.run(
        [sys.executable, root / "docs/config_reference.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_keys_that_documents_name_exist(root):
    cfg = get_cfg()
    add_visft_config(cfg)
    known = {""}

    def collect(node, prefix):
        for key, value in node.items():
            known.add(prefix + key)
            if isinstance(value, CfgNode):
                collect(value, f"{prefix}{key}.")

    collect(cfg, "")
    page = (root / "docs/config.md").read_text()
    assert len(re.findall(r"^\| `[A-Z0-9_.]+` \|", page, re.M)) > 100
    for document in DOCUMENTS:
        named = re.findall(
            r"\b((?:MODEL|VISFT|DATALOADER)(?:\.[A-Z0-9_]+)+)\b", (root / document).read_text()
        )
        missing = {name for name in named if name not in known and not name.endswith("_")} - {
            "MODEL.VISFT.TAGS"
        }  # the example of a head
        assert missing == set(), document


@pytest.mark.timeout(600)
def test_the_site_builds_and_its_links_hold(root):
    done = subprocess.run([sys.executable, root / "docs/build.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (root / "output/site/method.html").is_file()


@pytest.mark.timeout(600)
def test_the_notebook_runs(root, tmp_path):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(root / "docs/quickstart.ipynb", as_version=4)
    NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(tmp_path)}}).execute()
    drawn = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in drawn)


BESIDE_CODE = [
    "tests/golden/README.md",
    "projects/DemoWorld/demoworld/weights/README.md",
    "projects/ViSFT/visft/export/pictures/README.md",
]


@pytest.mark.parametrize("document", DOCUMENTS + BESIDE_CODE)
def test_files_and_links_that_documents_name_exist(document, root):
    path = root / document
    text = path.read_text()
    missing = [
        target
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
        if not (path.parent / target).exists()
    ]
    if document != "CONTRIBUTING.md":  # which speaks of files to be written
        named = re.findall(r"(?<![\w/.-])((?:tools|configs|tests|scripts)/[\w/.-]+\.(?:py|yaml))", text)
        for name in named + re.findall(r"pytest (tests/[\w/]+)(?![\w/.])", text):
            if not (root / name).exists():
                missing.append(name)
    assert missing == []


def test_readme_names_every_config(root):
    text = (root / "README.md").read_text() + (root / "MODEL_ZOO.md").read_text()
    assert [name for name in model_zoo.list() if name not in text] == []


def test_commands_of_the_readme_are_targets_of_make(root):
    text = "".join((root / name).read_text() for name in DOCUMENTS)
    targets = set(
        re.findall(
            r"\bmake ([a-z][a-z-]+)\b(?=[`\s#])",
            "\n".join(re.findall(r"^make .*|`make [^`]*`", text, re.M)) + "\n",
        )
    )
    assert {"demo", "test"} <= targets
    for target in targets:
        done = subprocess.run(["make", "-n", target], cwd=root, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_python_of_the_readme_runs(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (root / "README.md").read_text()
    text += (root / "docs/backbone.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    ours = [block for block in blocks if "visft_backbone" not in block]  # what needs a finished run
    assert len(ours) == len(blocks) - 1 == 2
    for block in ours:
        names = {}
        exec(block, names)
        if shown := re.search(r"# \[(.*)\]", block):
            assert str(list(names["features"].shape)) == f"[{shown.group(1)}]"
        else:
            assert names["cfg"].MODEL.CLIP_VIT.NAME == "ViT-B-16"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documented_evaluations_are_commands(document, root):
    text = (root / document).read_text().replace("\\\n", "")
    found = []
    commands = re.findall(r"^ {4}(?:python )?tools/evaluate_backbone\.py (.*)", text, re.M)
    for command in commands:
        found.append(arguments.parse(shlex.split(command)))
    for args in found:
        assert resolve(args.suite)
    if document == "docs/evaluation.md":
        assert len(found) == 4


def test_the_page_on_evaluation_says_where_every_data_set_lies(root):
    text = (root / "docs/evaluation.md").read_text()
    tasks = text[text.index("VTAB's NAMEs") :]
    for cls in registered().values():
        if cls.suite == "real" and "vtab/" in cls.name:
            assert f"`{cls.name.partition('vtab/')[2]}`" in tasks, cls.name
        elif cls.suite == "real":
            missing = [path for paths in cls.needs for path in paths.split("|") if path not in text]
            assert missing == [], cls.name


def test_python_of_the_page_on_evaluation_runs(root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    [block] = re.findall(r"^```python\n(.*?)^```", (root / "docs/evaluation.md").read_text(), re.M | re.S)
    exec(block, {})
    assert "zero-shot imagenet: not found in data: imagenet/val" in capsys.readouterr().out
