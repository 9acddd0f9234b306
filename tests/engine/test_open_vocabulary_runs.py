"""Any names, end to end: predict.py --names on drawn scenes, evaluation under the classes of the test set, refusals."""

import json

import numpy as np
import pytest
from PIL import Image

from demoworld import scenes
from visft.commands import predict
from visft.engine import checks, evaluate, settings, stages
from visft.errors import ConfigError, DataError

KEY = "MODEL.VISFT.OPEN_VOCABULARY.NAMES"
HEADS = ["MODEL.VISFT.HEADS", "('detection', 'segmentation')", "MODEL.VISFT.HEAD_FILES",
         "('visft://heads_demo_detection.safetensors', 'visft://heads_demo_segmentation.safetensors')"]  # fmt: skip
DEMO = "configs/visft_demo.yaml"


@pytest.fixture
def drawn(tmp_path):
    folder = tmp_path / "scenes"
    folder.mkdir()
    for number in range(2):
        scene = scenes.compose(np.random.default_rng(number), held_out=True)
        Image.fromarray(scene.image).save(folder / f"{number}.png")
    return folder


def test_predict_draws_under_any_names(root, drawn, tmp_path):
    files = {}
    for names in ("dog, red panda, wok", "red panda, wok, dog", "coco"):
        out = tmp_path / names
        command = ["--config-file", str(root / DEMO), "--input", str(drawn), "--output", str(out)]
        # A folder of its own: the config's may hold a run of `make demo`, whose heads would be taken.
        command += ["--names", names, "--threshold", "0.05", *HEADS, "OUTPUT_DIR", str(tmp_path / "run")]
        assert predict.main(command) == 0
        files[names] = {path.name: np.asarray(Image.open(path)) for path in out.iterdir()}
        assert set(files[names]) == {"0.png", "1.png"}
    assert any(
        (files["coco"][name] != files["dog, red panda, wok"][name]).any() for name in ("0.png", "1.png")
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--names", " , "], "--names has no name"),
        (["--names", "nowhere.txt"], "--names names the file nowhere.txt, which cannot be read"),
    ],
)
def test_predict_refuses_names_that_are_none(root, drawn, tmp_path, options, message, capsys):
    command = ["--config-file", str(root / DEMO), "--input", str(drawn), "--output", str(tmp_path / "out")]
    assert predict.main([*command, *options, *HEADS]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_heads_are_scored_on_classes_that_they_were_not_trained_on(tiny, shapes_test):
    file = shapes_test[0].with_name("renamed.json")
    content = json.loads(shapes_test[0].read_text())
    for category, name in zip(content["categories"], ("moon", "sun", "star"), strict=False):
        category["name"] = name
    file.write_text(json.dumps(content))
    arguments = [*tiny[2:], "VISFT.DATA.TEST_JSON", str(file), "MODEL.CLIP_VIT.PRETRAINED", "demo"]
    cfg = settings.load_config(tiny[1], arguments)
    with pytest.raises(DataError, match="it has moon, sun, star; rename or remove classes"):
        checks.check(cfg)
    cfg = settings.load_config(tiny[1], [*arguments, KEY, "('test',)"])
    checks.check(cfg)
    model = stages.initial_model(cfg, 0).eval()
    assert model.open_vocabulary.names.shown[:2] == ("moon", "sun")
    figures = evaluate.evaluate(cfg, model)
    assert {"detection/bbox/AP50", "segmentation/segm/AP50", "segmentation/segm/AP-moon"} <= set(figures)
    cfg.MODEL.VISFT.OPEN_VOCABULARY.NAMES = ("apple",)
    with pytest.raises(ConfigError, match=r"has 1 names, which are not the 3 classes of visft_own_test"):
        evaluate.evaluate(cfg, model)
