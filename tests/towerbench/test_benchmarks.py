"""The suite of benchmarks: features against open_clip, one pass an image, resuming, repetition, reports."""

import json
import re
import subprocess
import sys
from pathlib import Path

import my_benchmark
import numpy as np
import pytest
import torch
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, get_tokenizer
from safetensors.torch import load_file, save_file

from demoworld import tower as demo_tower
from towerbench import (
    Context,
    FeatureStore,
    Images,
    Tower,
    features,
    forest_plot,
    report,
    suite,
)
from towerbench.errors import CheckpointError
from towerbench.readout import LogisticRegression
from visft.modeling.backbone import CLIPViT

TINY = demo_tower.NAME
FIELDS = {"name", "metric", "base", "tuned", "difference", "low", "high", "verdict", "n"}


@pytest.fixture(scope="module")
def tower(store) -> Tower:
    return store.tower


@pytest.fixture(scope="module")
def broken_file(tmp_path_factory) -> Path:
    """The demo CLIP with noise in its vision tower's last blocks."""
    state = load_file(demo_tower.WEIGHTS_FILE)
    torch.manual_seed(0)
    for name, value in state.items():
        if re.search(r"visual\.transformer\.resblocks\.[4-7].*weight", name):
            state[name] = value + 0.15 * torch.randn_like(value)
    file = tmp_path_factory.mktemp("broken") / "broken.safetensors"
    save_file(state, file)
    return file


def noise(count=5, size=(64, 64), seed=0):
    def make():
        rng = np.random.default_rng(seed)
        for _ in range(count):
            yield rng.integers(0, 256, (*size, 3), dtype=np.uint8)

    return make


class Counted:
    """How many images pass a tower."""

    def __init__(self, monkeypatch) -> None:
        self.count = 0
        encode = Tower.encode

        def counting(tower, images, dense=False):
            self.count += len(images)
            return encode(tower, images, dense)

        monkeypatch.setattr(Tower, "encode", counting)

    def since(self) -> int:
        """How many since it was asked last."""
        found, self.count = self.count, 0
        return found


def run(output, compare=(), benchmarks=(my_benchmark.Quarters,), seeds=2):
    entries = [suite.Entry("base", "demo"), *(suite.Entry(Path(f).stem, str(f)) for f in compare)]
    results = suite.run(TINY, entries, benchmarks, Context(), seeds=seeds, output=output)
    report.write(results, output)
    return results


# ---------------------------------------------------------------- features


def test_embeddings_are_open_clips_and_maps_clip_vits(tower, store):
    images = Images("noise", 5, noise(), dense=True)
    pixels = torch.stack([torch.from_numpy(p).permute(2, 0, 1) for p in noise()()]).float() / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
    pixels = (pixels - mean) / std
    with torch.no_grad():
        expected = tower.clip.encode_image(pixels, normalize=True)
        maps = CLIPViT.from_open_clip(TINY, "demo")(pixels)["last_feat"]
    torch.testing.assert_close(store.embeddings(images), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(store.dense(images), maps, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(store.dense(images, 2, 4), maps[2:4], rtol=2e-3, atol=2e-3)
    texts = ["a dog", "an apple"]
    with torch.no_grad():
        encoded = tower.clip.encode_text(get_tokenizer(TINY)(texts), normalize=True)
    torch.testing.assert_close(store.text(texts), encoded)


def test_features_are_the_same_however_many_images_pass_at_once(store, monkeypatch):
    images, found = Images("noise", 5, noise(), dense=True), []
    for batch in (1, 2, 5):
        monkeypatch.setattr(features, "BATCH_PIXELS_CPU", batch * 64 * 64)
        assert [len(each) for each in store._batches(images)][0] == batch
        found.append((store.embeddings(images), store.dense(images)))
        store.release(images)
    for each in found[1:]:
        torch.testing.assert_close(each, found[0], rtol=2e-3, atol=1e-3)


def test_an_image_passes_once_for_whoever_asks(tower, monkeypatch):
    passed = Counted(monkeypatch)
    plain, dense = Images("one", 5, noise()), Images("one", 5, noise(), dense=True)
    larger = Images("one", 5, noise(), scale=2.0)
    store = FeatureStore(tower, [plain, dense, larger])
    store.embeddings(plain)  # asked for first, and by one that needs no map
    assert store.dense(dense).shape == (5, 192, 8, 8) and passed.since() == 5
    store.embeddings(larger)
    assert passed.since() == 5
    store.release(plain)
    store.embeddings(plain)
    assert passed.since() == 5
    store.close()


def test_maps_stay_what_they_are_when_others_are_released(store):
    one, two, three = (Images(f"{seed}", 3, noise(3, seed=seed), dense=True) for seed in range(3))
    store.dense(one)
    expected = store.dense(two)
    store.release(one)
    assert not torch.equal(store.dense(three), expected)
    torch.testing.assert_close(store.dense(two), expected, rtol=0, atol=0)


def test_what_a_killed_run_left_is_removed_and_what_another_uses_is_not(tmp_path):
    code = "import sys, pathlib; from towerbench import FeatureStore; "
    code += "store = FeatureStore(None, folder=pathlib.Path(sys.argv[1])); print('made', flush=True); input()"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "made\n"
        [theirs] = tmp_path.glob(".features-*")
        elsewhere = theirs.with_name(".features-another.machine-1-abc")
        elsewhere.mkdir()
        FeatureStore(None, folder=tmp_path).close()
        assert theirs.is_dir()
        other.kill()
    FeatureStore(None, folder=tmp_path).close()
    assert list(tmp_path.iterdir()) == [elsewhere]


def test_scale_and_fit(tower, store):
    sizes = {scale: tower.input_size(scale) for scale in (1, 2, 1.3)}
    assert sizes == {1: (64, 64), 2: (128, 128), 1.3: (80, 80)}
    wide = np.zeros((32, 64, 3), np.uint8)
    wide[:, 16:48] = 255
    [squashed] = store._batches(Images("wide", 1, lambda: [wide]))
    [cropped] = store._batches(Images("wide", 1, lambda: [wide], fit="crop"))
    assert squashed.shape == cropped.shape == (1, 3, 64, 64)
    # Bicubic resampling rings at edges.
    assert cropped[..., 4:-4].min() == 255 and squashed[..., :10].max() == 0


def test_regression_is_scikit_learns():
    from sklearn.linear_model import LogisticRegression as Sklearn

    torch.manual_seed(0)
    x, y = torch.randn(90, 12), torch.arange(90) % 3
    x[:, 0] += y
    ours = LogisticRegression(x, y, 3, l2=0.05)
    scaled = torch.nn.functional.normalize(x, dim=1) * 12**0.5
    theirs = Sklearn(C=1 / (0.05 * 90), tol=1e-8, max_iter=2000).fit(scaled.numpy(), y.numpy())
    expected = torch.from_numpy(theirs.predict_proba(scaled.numpy())).float()
    torch.testing.assert_close(ours.logits(x).softmax(1), expected, atol=1e-4, rtol=1e-3)


# ---------------------------------------------------------------- the suite


def test_results_and_reports(broken_file, tmp_path):
    results = run(tmp_path, [broken_file])
    assert results == json.loads((tmp_path / "results.json").read_text())
    [family] = results["families"]
    assert family.keys() >= FIELDS and family["name"] == "few-shot" and family["n"] == 40
    assert family["low"] <= family["difference"] <= family["high"]
    assert family["difference"] == pytest.approx(family["tuned"] - family["base"], abs=1e-3)
    assert family["base"] > 50  # chance is 25
    page = (tmp_path / "report.html").read_text()
    assert 'name="viewport"' in page and "data:image/png;base64," in page
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:)|@import|url\(""", page)
    assert "| few-shot | accuracy |" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "forest.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(tmp_path.glob(".features-*"))


def test_a_tower_against_itself_and_several_towers(broken_file, tmp_path):
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(Path(demo_tower.WEIGHTS_FILE).read_bytes())
    results = run(tmp_path / "out", [copy, broken_file])
    assert results["families"].keys() == {"copy", "broken"} == results["mean"].keys()
    same = results["families"]["copy"][0]
    assert (same["difference"], same["low"], same["high"], same["verdict"]) == (0, 0, 0, "not shown")
    assert results["families"]["broken"][0]["base"] == same["base"]
    assert (tmp_path / "out" / "report.html").read_text().count("<h2>broken</h2>") == 1


def row(name, difference, verdict=None):
    """A family's, as a plot takes it."""
    interval = {"low": difference - 1, "high": difference + 1}
    return {"name": name, "difference": difference, "verdict": verdict} | interval


def plotted(axes, names) -> list[tuple[str, float]]:
    """What is in the line of each name."""
    points = [line for line in axes.lines if line.get_marker() in ("o", "D")]
    return sorted((names[round(float(p.get_ydata()[0]))], float(p.get_xdata()[0])) for p in points)


@pytest.mark.parametrize("far", [-3.0, -60.0])
def test_the_plot_has_every_figure_in_its_own_familys_row(far):
    """Also of a tower that was evaluated on some of the families."""
    whole = {"ocr": 1.0, "goi": 2.0, "vqa": far, "mean": 4.0}
    part = {"goi": 5.0, "mean": 6.0}
    towers = [(name, [row(*each) for each in of.items()]) for name, of in (("part", part), ("whole", whole))]
    axes = forest_plot.draw(towers).axes[0]
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert set(names) == set(whole) and names[-1] == "mean"
    assert plotted(axes, names) == sorted([*whole.items(), *part.items()])
    assert (axes.get_xscale() == "symlog") == (far == -60.0)


def test_a_plot_of_many_towers_has_a_panel_a_family_and_a_line_a_tower():
    verdicts = {"ocr": "not shown", "goi": "better", "mean": "worse"}
    towers = [
        (f"tower {n}", [row(name, n + 100.0 * (name == "goi"), word) for name, word in verdicts.items()])
        for n in range(forest_plot.FEW + 1)
    ]
    del towers[3][1][0]  # it has no ocr
    panels = {axes.get_title(): axes for axes in forest_plot.draw(towers).axes}
    labels = [text.get_text() for text in panels["ocr"].get_yticklabels()]
    assert list(panels) == list(verdicts) and labels == [label for label, _ in towers]
    for name, axes in panels.items():
        expected = [(label, r["difference"]) for label, rows in towers for r in rows if r["name"] == name]
        assert plotted(axes, labels) == expected
        assert (axes.get_xscale() == "symlog") == (name == "goi")
    assert len({line.get_color() for axes in panels.values() for line in axes.lines[:2]}) == 3


def test_base_alone(tmp_path):
    results = run(tmp_path)
    [family] = results["families"]
    assert family["tuned"] is None and family["verdict"] is None and family["base"] > 50
    assert "| few-shot | accuracy |" in (tmp_path / "report.md").read_text()


class Second(my_benchmark.Quarters):
    """A further benchmark on the same images, which may fail."""

    name, family = "second", "dense"
    fails = False

    def items(self, tower, images, seed):
        if self.fails:
            raise KeyboardInterrupt
        return super().items(tower, images, seed)


def test_interrupted_run_resumes_and_two_runs_give_the_same(broken_file, tmp_path, monkeypatch):
    passed, both = Counted(monkeypatch), (my_benchmark.Quarters, Second)
    monkeypatch.setattr(Second, "fails", True)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "one", [broken_file], both)
    monkeypatch.setattr(Second, "fails", False)
    assert passed.since() == 120
    run(tmp_path / "one", [broken_file], both)
    # The base's first benchmark was finished; its images pass again for the second one alone.
    assert passed.since() == 240
    run(tmp_path / "one", [broken_file], both)
    assert passed.since() == 0
    run(tmp_path / "two", [broken_file], both)
    assert passed.since() == 240
    for name in ("results.json", "report.html", "report.md", "forest.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_what_changes_a_benchmark_runs_it_again(tmp_path, monkeypatch):
    run(tmp_path)
    passed = Counted(monkeypatch)
    run(tmp_path, seeds=3)
    assert passed.count == 120
    monkeypatch.setattr(my_benchmark.Quarters, "version", 2)
    run(tmp_path, seeds=3)
    assert passed.count == 240


def test_in_domain_is_marked_and_counts_in_no_mean(broken_file, tmp_path):
    class InDomain(my_benchmark.Quarters):
        name, family, in_domain = "in-domain", "dense", True

    results = run(tmp_path, [broken_file], (my_benchmark.Quarters, InDomain))
    few_shot, dense = results["families"]
    assert dense["in_domain"] and dense["verdict"] is None and not few_shot["in_domain"]
    assert results["mean"]["base"] == few_shot["base"] and "1 families" in results["mean"]["metric"]
    assert "dense (in-domain)" in (tmp_path / "report.md").read_text()


class Costly(my_benchmark.Quarters):
    """The same images, and others of twice the side that nobody looks at; a readout that takes long."""

    name, family, readout_seconds = "costly", "dense", 40.0

    def images(self, seed):
        return {**super().images(seed), "large": Images("large", 10, noise(10), scale=2.0)}


def test_the_time_that_is_left_is_told_by_what_benchmarks_cost(monkeypatch):
    monkeypatch.setattr(suite, "IMAGE_SECONDS", 0.1)
    tasks = [suite.Task(cls(Context()), range(2)) for cls in (my_benchmark.Quarters, Costly)]
    # 120 images once for both; 10 that count for 4 each; two readouts each.
    assert suite._seconds(tasks) == pytest.approx(12 + 4 + 2 * 1 + 2 * 40)
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    progress = suite.Progress(suite._seconds(tasks))
    progress.update(14)
    now[0] = 28.0  # half as fast as where costs were measured
    progress.say("costly, seed 0")
    assert str(progress) == "[ 14 %] costly, seed 0 (00:28 gone, 02:48 left)"
    progress.skip(40)
    assert str(progress) == "[ 55 %] costly, seed 0 (00:28 gone, 01:28 left)"
    progress.update(44)
    assert str(progress) == "[100 %] costly, seed 0 (00:28 gone, 00:00 left)"


def test_all_that_is_announced_is_done_at_the_end(tmp_path, monkeypatch):
    made = []
    progress = suite.Progress
    monkeypatch.setattr(suite, "Progress", lambda total: made.append(progress(total)) or made[0])
    run(tmp_path, benchmarks=(my_benchmark.Quarters, Second))
    assert made[0].n == pytest.approx(made[0].total) and made[0].total > 0


# ---------------------------------------------------------------- names and arguments


def test_a_tower_without_a_map_leaves_out_what_needs_one(tmp_path, caplog, monkeypatch):
    class OnMaps(my_benchmark.Quarters):
        name, family = "on maps", "dense"

        def images(self, seed):
            return {"test": Images("on maps", 1, noise(1), dense=True)}

    monkeypatch.setattr(Tower, "has_map", False)
    with caplog.at_level("INFO"):
        results = run(tmp_path, benchmarks=(my_benchmark.Quarters, OnMaps), seeds=1)
    assert [row["name"] for row in results["benchmarks"]] == ["quarters"]
    assert results["left_out"] == {"on maps": f"{TINY} is no plain vision transformer"}
    assert f"not run: on maps: {TINY} is no plain" in caplog.text


def test_weights_that_are_no_whole_clip_are_refused(tmp_path):
    save_file({"heads.detection.x": torch.zeros(2)}, tmp_path / "heads.safetensors")
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04")
    for name in ("heads.safetensors", "cut.pt"):
        with pytest.raises(CheckpointError, match=f"{name}: cannot be had or loaded as a whole {TINY}"):
            Tower.load(TINY, str(tmp_path / name))


def test_scores_that_were_cut_off_are_named(tmp_path):
    run(tmp_path, seeds=1)
    [file] = (tmp_path / "scores").rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(CheckpointError, match="quarters.safetensors: is no whole file of scores"):
        run(tmp_path, seeds=1)


def test_example_is_short_and_in_the_guide(root):
    text = (root / "tests/examples/my_benchmark.py").read_text()
    assert len(text.splitlines()) <= 31
    assert text.strip() in (root / "CONTRIBUTING.md").read_text()
