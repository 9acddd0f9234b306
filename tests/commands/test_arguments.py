"""What a command reads of its arguments is what its parser gives."""

import ast
import importlib
from pathlib import Path

import pytest

from visft import commands

FOLDER = Path(commands.__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("[a-z]*.py") if path.stem != "tool")


def dests(parser) -> set[str]:
    found = {action.dest for action in parser._actions} | set(parser._defaults)
    for action in parser._actions:
        if isinstance(action.choices, dict):  # subcommands
            found = found.union(*map(dests, action.choices.values()))
    return found


@pytest.mark.parametrize("name", [name for name in NAMES if name != "evaluate_backbone"])
def test_every_argument_that_is_read_is_one_of_the_parser(name):
    nodes = ast.walk(ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8")))
    read = {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "arguments"
    }
    assert read <= dests(importlib.import_module(f"visft.commands.{name}").parser)
