"""The demo's page: what it says, that it needs no other file, and how it looks in a browser."""

import html
import html.parser
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from visft.applications import demo_report
from visft.applications.demo_unseen import Scene, View

SUITE = {"goi zero-shot": "regions named, top-1", "few-shot digits": "digits <by> a probe"}
UNSEEN = {"segm/AP50": "masks found & named"}
KNOWN = {"boxes/AP50": "boxes, AP50"}
HOSTILE = '"><script>alert(1)</script><img src="https://example.com/x.png">'


def row(name: str, base: float, tuned: float, **more) -> dict:
    change = {"difference": tuned - base, "low": tuned - base - 1, "high": tuned - base + 1}
    return {"name": name, "base": base, "tuned": tuned, **change, **more}


def scene(text: str = "fox") -> Scene:
    rng = np.random.default_rng(0)
    panels = [rng.integers(0, 256, (384, 400, 3), np.uint8) for _ in range(7)]
    truth = (text, "a thing with a rather long name indeed")
    views = View((text, "cake"), *panels[1:4]), View(truth, *panels[4:])
    return Scene(3, panels[0], truth, text, (-0.1, 0.4), *views)


def page(**changes) -> str:
    digits = row("few-shot digits", 50.0, 45.0, family="few-shot")
    results = {
        "families": [row("goi", 10.0, 40.0, verdict="better"), row("few-shot", 50.0, 45.0, verdict="worse")],
        "benchmarks": [digits, row("goi zero-shot", 10.0, 40.0, family="goi")],
        "mean": row("mean", 30.0, 42.5, verdict="better"),
        "rule": "A rule < another.",
    }
    sides = [
        {
            "boxes/AP50": 50.0 - n,
            "open_vocabulary/segm/AP50": 2.0 + n,
            "caption/none": None,
            "other/figure/" * 9: 1.0,
        }
        for n in (0, 3)
    ]
    given = {"figures": {"before": sides[0], "after": sides[1]}, "results": results, "scenes": [scene()]}
    given |= {"suite": SUITE, "unseen": UNSEEN, "known": KNOWN} | changes
    return demo_report.page(given.pop("figures"), given.pop("results"), **given)


def said(text: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", text))


def test_what_was_never_tuned_on_comes_first_and_what_falls_is_said():
    text = said(page())
    assert "Shown to be better: regions named (10.0 to 40.0); mean of their families (30.0 to 42.5)." in text
    assert "Shown to be worse: digits <by> a probe (50.0 to 45.0)." in text
    assert "Of known things, lower after than before: boxes (50.0 to 47.0)." in text
    assert "Named right: 1 of 2 before, 2 of 2 after." in text
    order = ["Scene 1", "no training scene showed", "regions named, top-1", "digits <by> a probe", "mean of their",
             "Found and named", "Known things", "boxes, AP50", "All other figures"]  # fmt: skip
    places, last = [], text.index("Scene 1")
    for words in order:
        last = text.index(words, last)
        places.append(last)
    assert places == sorted(places)
    assert "+29.0 to +31.0" in text and "-6.0 to -4.0" in text


def test_a_run_without_an_export_has_a_page():
    text = said(
        page(results=None, scenes=[], figures={"before": {"boxes/AP50": 1.0}, "after": {"boxes/AP50": 2.0}})
    )
    assert "Shown" not in text and "boxes, AP501.02.0+1.0" in text


def test_everything_is_escaped():
    text = page(scenes=[scene(HOSTILE)], suite={"goi zero-shot": HOSTILE}, known={"boxes/AP50": HOSTILE})
    assert "<script" not in text and "https://example.com" in text
    assert "https://example.com" not in "".join(re.findall(r"<[^>]*>", text)).replace(
        html.escape(HOSTILE), ""
    )


class _Tags(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links, self.metas = [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.links += [attrs[name] for name in ("src", "href", "srcset", "data", "action") if name in attrs]
        self.metas += [attrs] if tag == "meta" else []


def test_page_needs_no_other_file():
    text = page(scenes=[scene(HOSTILE)])
    tags = _Tags()
    tags.feed(text)
    assert len(tags.links) == 6 and all(link.startswith("data:image/png;base64,") for link in tags.links)
    assert "url(" not in text and "@import" not in text
    metas = {meta.get("name") or meta.get("http-equiv"): meta.get("content") for meta in tags.metas}
    assert metas["viewport"] == "width=device-width, initial-scale=1"
    assert metas["Content-Security-Policy"].startswith("default-src 'none'; img-src data:;")


PROBE = """<script>
addEventListener("load", () => {
  const root = document.documentElement, images = [...document.images];
  const loaded = performance.getEntriesByType("resource").map(entry => entry.name);
  parent.postMessage({
    wide: root.scrollWidth, shown: root.clientWidth, font: parseFloat(getComputedStyle(document.body).fontSize),
    images: images.length, decoded: images.filter(image => image.complete && image.naturalWidth > 0).length,
    requests: loaded.filter(name => !name.startsWith("data:")),
  }, "*");
});
</script>"""
"""What the browser is asked, in a copy of the page that allows this script."""

FRAME = """<!doctype html><body style="margin: 0"><script>
addEventListener("message", event => {
  const line = document.createElement("pre");
  line.id = "found"; line.textContent = JSON.stringify(event.data);
  document.body.append(line);
});
</script><iframe src="page.html" style="border: 0; height: 800px; width: %dpx"></iframe></body>"""
"""A frame is as narrow as it is told to be; Chromium's own windows are 500 pixels wide or more."""


def opened(text: str, folder, width: int) -> dict:
    """What a headless Chromium makes of a page that is shown in this width in pixels."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("there is no Chromium on this machine to open the page in")
    policy = demo_report._POLICY
    assert policy in text
    allowed = text.replace(policy, f"{policy}; script-src 'unsafe-inline'").replace(
        "</body>", f"{PROBE}</body>"
    )
    (folder / "page.html").write_text(allowed)
    (folder / "frame.html").write_text(FRAME % width)
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={folder}/profile", f"--window-size={max(width, 500)},800", "--dump-dom"]
    command += ["--virtual-time-budget=5000", f"file://{folder}/frame.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


@pytest.mark.parametrize("width", [390, 1280])
def test_browser_shows_the_whole_page(tmp_path, width):
    found = opened(page(), tmp_path, width)
    assert found["wide"] <= found["shown"] == width
    assert found["images"] == found["decoded"] == 6
    assert found["requests"] == [] and found["font"] >= 16


def test_browser_test_sees_what_is_wrong(tmp_path):
    wrong = page().replace(
        "</body>", '<div style="width: 2000px">.</div><img src="data:image/png;base64,AAAA"></body>'
    )
    found = opened(wrong, tmp_path, 390)
    assert found["wide"] > found["shown"] and found["decoded"] == found["images"] - 1 == 6
