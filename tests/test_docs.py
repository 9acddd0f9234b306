"""What the documents say about keys, files and commands is what the tree has."""

import re
import shlex
import subprocess
import sys

import pytest
from detectron2.config import CfgNode, get_cfg

from towerbench import arguments, registered, resolve
from visft import add_visft_config, model_zoo

DOCUMENTS = [
    "README.md",
    "projects/ViSFT/README.md",
    "projects/TowerBench/README.md",
    "projects/DemoWorld/README.md",
    "MODEL_ZOO.md",
    "CONTRIBUTING.md",
    "docs/evaluation.md",
]


def leaves(node: CfgNode, prefix: str = "") -> dict[str, object]:
    """All keys of a config, dotted, with their values."""
    found = {}
    for key, value in node.items():
        if isinstance(value, CfgNode):
            found |= leaves(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


@pytest.fixture(scope="module")
def added() -> dict[str, object]:
    """ViSFT's keys and defaults: what add_visft_config adds to detectron2's."""
    stock, ours = get_cfg(), get_cfg()
    add_visft_config(ours)
    return {key: value for key, value in leaves(ours).items() if key not in leaves(stock)}


def test_every_key_is_documented_and_no_other(root, added):
    text = (root / "projects/ViSFT/README.md").read_text()
    tables = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    named = set(re.findall(r"`((?:MODEL|VISFT|DATALOADER)(?:\.[A-Z0-9_]+)+)`", tables))
    known = set(leaves(get_cfg()))
    assert len(added) > 60
    assert set(added) - named == set()
    assert named - set(added) - known == set()


def test_documented_defaults_are_the_defaults(root, added):
    text = (root / "projects/ViSFT/README.md").read_text()
    rows = re.findall(r"^\| `([A-Z0-9_.]+)` \| `([^`]*)` \|", text, re.M)
    assert len(rows) > 40
    for key, shown in rows:
        default = added[key]
        assert shown in (str(default), repr(default), str(default).replace("'", '"'), f'"{default}"'), key
    solvers = re.findall(r"^\| `(\S+)`, `(\S+)` \| `([^`]*)` \| `([^`]*)` \|", text, re.M)
    assert len(solvers) == sum(key.startswith("VISFT.SOLVER.HEADS.") for key in added)
    for heads, lora, *shown in solvers:
        for key, value in zip((heads, lora), shown, strict=True):
            if value == '""':
                assert added[key] == ""
            else:
                assert float(added[key]) == float(value), key


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_and_links_that_documents_name_exist(document, root):
    path = root / document
    text = path.read_text()
    missing = [
        target
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
        if not (path.parent / target).exists()
    ]
    if document != "CONTRIBUTING.md":  # which speaks of files to be written
        for name in re.findall(r"(?<![\w/.-])((?:tools|configs|tests|scripts)/[\w/.-]+\.(?:py|yaml))", text):
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


def test_python_of_the_readme_runs(root, tmp_path):
    text = (root / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    ours = [block for block in blocks if "visft_backbone" not in block]  # what needs a finished run
    assert len(ours) == len(blocks) - 1 == 2
    for block in ours:
        code = (
            f"{block}\nprint(tuple(features.shape) if 'features' in globals() else cfg.MODEL.CLIP_VIT.NAME)"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        shown = re.search(r"# \[(.*)\]", block)
        assert done.stdout.strip() == (f"({shown.group(1)})" if shown else "ViT-B-16")


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


def test_python_of_the_page_on_evaluation_runs(root, tmp_path):
    [block] = re.findall(r"^```python\n(.*?)^```", (root / "docs/evaluation.md").read_text(), re.M | re.S)
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "zero-shot imagenet: not found in data: imagenet/val" in done.stdout
