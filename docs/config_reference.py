"""Make docs/config.md from the comments of visft/config.py. With `--check`, only compare."""

import ast
import io
import sys
import tokenize
from pathlib import Path

from detectron2.config import CfgNode, get_cfg

from visft import add_visft_config, config

PAGE = Path(__file__).with_name("config.md")

HEAD = """# Config keys

`visft.add_visft_config(cfg)` adds these keys to detectron2's. An unknown key is an error.
Set a key in a YAML file, or append `KEY VALUE` to a command.
`python docs/config_reference.py` makes this page from the comments of `visft/config.py`.
"""


class Comments:
    """The comments of a source file, by the line of their statement."""

    def __init__(self, source: str) -> None:
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        self._lines = source.splitlines()
        self._at = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}

    def of(self, statement: ast.stmt) -> str:
        above, line = [], statement.lineno - 1
        while line in self._at and self._lines[line - 1].lstrip().startswith("#"):
            above.insert(0, self._at[line])
            line -= 1
        behind = [self._at[n] for n in {statement.lineno, statement.end_lineno} if n in self._at]
        return " ".join(above + behind)


def documented(source: str) -> dict[str, str]:
    """Map each dotted name that the source assigns, node or key, to its comment."""
    functions = {f.name: f for f in ast.parse(source).body if isinstance(f, ast.FunctionDef)}
    comments, found = Comments(source), {}

    def follow(function: ast.FunctionDef, names: dict[str, str]) -> None:
        for statement in function.body:
            if isinstance(statement, ast.Assign):
                assign(statement, names)
            elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
                call = statement.value.func
                if isinstance(call, ast.Name) and call.id in functions:
                    follow(functions[call.id], names)

    def assign(statement: ast.Assign, names: dict[str, str]) -> None:
        path = next((dotted(t, names) for t in statement.targets if isinstance(t, ast.Attribute)), None)
        for target in statement.targets:
            if isinstance(target, ast.Name) and path is not None:
                names[target.id] = path
        if path is None:
            return
        found[path] = comments.of(statement)
        for prefix, made in nodes(statement.value, path):
            follow(functions[made], {v.targets[0].id: prefix for v in functions[made].body if local(v)})

    def nodes(value: ast.expr, path: str):
        """Yield the name of each node that a value makes and the function of this file that makes it."""
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
            if value.func.id in functions:
                yield path, value.func.id
            for argument in value.args:
                if isinstance(argument, ast.Dict):
                    for key, of in zip(argument.keys, argument.values, strict=True):
                        yield from nodes(of, f"{path}.{key.value}")

    follow(functions["add_visft_config"], {"cfg": ""})
    return found


def local(statement: ast.stmt) -> bool:
    """Whether a statement assigns the node that a function returns."""
    return isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)


def dotted(target: ast.Attribute, names: dict[str, str]) -> str:
    of = names[target.value.id] if isinstance(target.value, ast.Name) else dotted(target.value, names)
    return f"{of}.{target.attr}".lstrip(".")


def leaves(node: CfgNode, prefix: str = "") -> dict[str, object]:
    found = {}
    for key, value in node.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, CfgNode) else {prefix + key: value}
    return found


def shown(value: object) -> str:
    text = f'"{value}"' if isinstance(value, str) else str(value)
    return f"`{text}`".replace("|", "\\|")


def page() -> str:
    """The page in Markdown.

    Raises:
        ValueError: a key is assigned where this script cannot see it.
    """
    comments = documented(Path(config.__file__).read_text(encoding="utf-8"))
    stock, ours = get_cfg(), get_cfg()
    add_visft_config(ours)
    known = leaves(stock)
    defaults = {key: value for key, value in leaves(ours).items() if key not in known}
    unseen = [key for key in defaults if key not in comments]
    if unseen:
        raise ValueError(f"{config.__file__}: no assignment found for {', '.join(unseen)}")
    sections: dict[str, list[str]] = {}
    for key, default in defaults.items():
        comment = comments[key].replace("|", "\\|")
        row = f"| `{key}` | {shown(default)} | {comment} |"
        sections.setdefault(key.rpartition(".")[0], []).append(row)
    lines = [HEAD]
    for node, rows in sections.items():
        lines += [f"## `{node}`", "", *([comments[node], ""] if comments.get(node) else [])]
        lines += ["| key | default | |", "|---|---|---|", *rows, ""]
    return "\n".join(lines)


def main() -> int:
    if "--check" in sys.argv[1:]:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page():
            print(
                f"{PAGE} differs from the comments of {config.__file__}: run `python {Path(__file__).name}`"
            )
            return 1
        return 0
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
