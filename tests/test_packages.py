"""Which module imports which: no circles, and no package that reaches above itself. Read from the sources."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

BELOW = {"demoworld": (), "towerbench": ("demoworld",), "visft": ("demoworld", "towerbench")}
"""Our packages, and those of them that each may import."""

PLUGIN_ALONE = ("demoworld", "towerbench")
"""Packages that need neither detectron2 nor what comes with it."""

COMMANDS = {
    "commands/evaluate_backbone.py",
    "commands/fetch_emoji_vendors.py",
    "commands/make_demo_data.py",
    "commands/pretrain_demo_tower.py",
    "applications/demo.py",
    "applications/demo_unseen.py",
}
SHARED = {"evaluation/caption_metrics.py"}
WHEN_CALLED = {
    "backbone.py",
    "modeling/backbone/open_clip_import.py",
    "commands/demo.py",
    "commands/train_demo_heads.py",
    "data/datasets/demo_world.py",
    "applications/compared_towers.py",
    "evaluation/demo_zero_shot.py",
}
"""Files of visft that import what is not the method: the demo's and the comparison's commands; what takes COCO's words
from towerbench, whose captions are scored by them too; and, within functions alone, what registers the demo's names,
tests its tower, or hands towers to towerbench."""


LAYERS = (
    *(
        "errors",
        "config",
        "utils",
        "checkpoint",
        "classes",
        "modeling",
        "data",
        "evaluation",
        "visualization",
    ),
    *("export", "engine", "model_zoo", "applications", "commands"),
)
"""The folders of visft. Each imports from those before it alone."""

EARLIER_PLACES = {"visft.backbone", "visft.checkpoint.export"}


def modules(root: Path, package: str) -> dict[str, Path]:
    """A package's files by their dotted names."""
    [folder] = root.glob(f"projects/*/{package}")
    found = {}
    for path in sorted(folder.rglob("*.py")):
        if "configs" not in path.parts:  # read as data
            parts = path.relative_to(folder.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, *, inner: bool) -> set[str]:
    """Dotted names that a file imports: when it is loaded, and with `inner` also within functions."""
    found, todo = set(), list(ast.parse(path.read_text(encoding="utf-8")).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".")
            base = base[: len(base) - node.level + (path.stem == "__init__")] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
        elif inner or not (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        ):
            todo += ast.iter_child_nodes(node)
    return found


@pytest.mark.parametrize("package", BELOW)
def test_no_circle_between_modules(package, root):
    known = modules(root, package)
    arrows = {}
    for name, path in known.items():
        targets = imports(name, path, inner=False)
        targets = {target if target in known else target.rpartition(".")[0] for target in targets}
        arrows[name] = (targets & known.keys()) - {name}
    assert sum(map(len, arrows.values())) >= len(known) / 2
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.mark.parametrize("package", BELOW)
def test_no_package_reaches_above_itself(package, root):
    others = {*BELOW, *(("detectron2", "fvcore", "iopath") if package in PLUGIN_ALONE else ())}
    for name, path in modules(root, package).items():
        tops = {target.partition(".")[0] for target in imports(name, path, inner=True)}
        assert not (tops & others) - {package, *BELOW[package]}, path


def test_the_plugin_is_the_method_alone(root):
    others = set(BELOW) - {"visft"}
    for inner, allowed in ((False, COMMANDS | SHARED), (True, COMMANDS | SHARED | WHEN_CALLED)):
        found = set()
        for name, path in modules(root, "visft").items():
            if {target.partition(".")[0] for target in imports(name, path, inner=inner)} & others:
                found.add(path.relative_to(root / "projects/ViSFT/visft").as_posix())
        assert found <= allowed, inner


def test_folders_of_the_plugin_import_one_way(root):
    known = modules(root, "visft")
    for name, path in known.items():
        if name in EARLIER_PLACES or name == "visft":
            continue
        layer = LAYERS.index(name.split(".")[1])
        for target in imports(name, path, inner=True):
            parts = target.split(".")
            if parts[0] == "visft" and len(parts) > 1 and parts[1] in LAYERS:
                assert LAYERS.index(parts[1]) <= layer, f"{path} imports {target}"
