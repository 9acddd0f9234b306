"""Whatever a class, a data set or a file is called, reports and cards show the name, and nothing else comes of it."""

import html
import re

import pytest
from markdown_it import MarkdownIt
from PIL import Image

from visft.applications import demo_report, sweep
from visft.export import card
from visft.export.source import untouched
from visft.modeling.backbone import CLIPViT
from visft.modeling.backbone.open_clip_models import BaseTower
from visft.utils import markdown
from visft.visualization import run_report

NAMES = [
    "<script>alert(1)</script>",
    "a|b||",
    "`code` and ``more`",
    "*strong* _weak_ __init__ snake_case",
    "[text](http://x) ![i](y)",
    "a\nb\r\n\n# c",
    "back\\slash \\| &amp; & <b>",
    "~~gone~~ $x$",
]


def _html(text: str) -> str:
    return MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(text)


def _texts(page: str, tag: str) -> list[str]:
    """What a reader sees in each element of a kind."""
    found = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", page, re.DOTALL)
    return [html.unescape(re.sub(r"</?(?:code|p)>", "", text)).strip() for text in found]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_shown_as_they_are(name) -> None:
    """By a parser that is not ours: a heading, a cell of text, a cell of code."""
    shown = " ".join(name.split())
    page = _html(
        f"# {markdown.plain(name)}\n\n{markdown.row(['a', 'b'])}\n|---|---|\n"
        f"{markdown.row([markdown.plain(name), markdown.code(name)])}\n"
    )
    assert _texts(page, "h1") == [shown] and _texts(page, "td") == [shown, shown], page
    assert "<script" not in page and "<a " not in page and "<em>" not in page


@pytest.mark.parametrize("name", NAMES)
def test_no_report_is_broken_by_a_name(tmp_path, name) -> None:
    shown = " ".join(name.split())
    figures = {f"{name}/bbox/AP50": 10.0}
    (tmp_path / "predictions").mkdir()
    file = name.replace("/", "").replace("\n", "").replace("\r", "")
    Image.new("RGB", (2, 2)).save(tmp_path / "predictions" / f"{file}.png")
    run_report.write_report(tmp_path, {"start": figures, "lora": figures}, title=f"Run {name}")
    page = _html((tmp_path / "report.md").read_text(encoding="utf-8"))
    assert _texts(page, "h1") == [f"Run {shown}"]
    assert _texts(page, "td") == [f"{shown}/bbox/AP50", "10.00", "10.00", "+0.00"]
    assert page.count("<img ") == 1 and "<script" not in page

    facts = card.Facts(data=(name,), run=name, command=name, figures={"lora": figures})
    tower = CLIPViT.from_open_clip("visft-tiny")
    tower.base = BaseTower(name, name, "0" * 64)
    text = card.text(untouched(tower, 1), facts, "checked", library="visft", content="a tower", use="pass")
    cells = _texts(_html(text.partition(card.MARK)[2]), "td")
    assert cells.count(shown) == 3 and f"{shown}/bbox/AP50" in cells and f"{shown} of open_clip" in cells

    run = {
        "name": name,
        "seed": 0,
        "status": "failed",
        "error": name,
        "figures": {},
        "untuned": None,
        "seconds": None,
    }
    results = {"measure": [name], "interpolate": [1.0], "runs": [run]}
    cells = _texts(_html(sweep.table(results)), "td")
    assert cells[3] == shown and cells[6] == f"{shown}, seed 0 failed: {shown}"

    page = demo_report.page(
        {"before": figures, "after": figures}, None, suite={}, unseen={}, known={f"{name}/bbox/AP50": name}
    )
    assert "<script" not in page and shown in [" ".join(text.split()) for text in _texts(page, "td")]
