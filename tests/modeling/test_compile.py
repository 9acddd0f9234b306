"""VISFT.COMPILE: compiled layers compute the same at all sizes, and a killed run goes on to the bit."""

import functools

import processes
import pytest
import runs
import torch
from demo_models import build, losses_of, picture
from tiny_run import tiny_arguments
from torch._dynamo.utils import counters

from visft.engine import checks, settings
from visft.errors import ConfigError
from visft.modeling import compiled
from visft.modeling.backbone import lora
from visft.modeling.heads import Vocabulary


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def backend(monkeypatch):
    """Sets how graphs are compiled: `eager` and `aot_eager` need no compiler and show the same graphs."""
    return functools.partial(monkeypatch.setattr, compiled, "BACKEND")


def graphs() -> int:
    """How many there are by now; none ends before its layer does."""
    assert not counters["graph_break"], dict(counters["graph_break"])
    return counters["stats"]["unique_graphs"]


def assert_alike(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """To 1e-5; of the largest, because some gradients are zero but for rounding."""
    assert found.keys() == expected.keys() and expected
    largest = max(tensor.norm() for tensor in expected.values())
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= 1e-5 * torch.maximum(tensor.norm(), 1e-3 * largest), name


def step(model, images: list[dict]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    model.zero_grad()
    losses = losses_of(model, images)
    sum(losses.values()).backward()
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("stage", "heads", "captions", "kinds"),
    [
        ("heads", ("captioning",), "TransformerCaptionHead", 2),
        pytest.param(
            *("lora", ("detection", "segmentation", "captioning"), "CaptionHead", 8), marks=pytest.mark.slow
        ),
    ],
    ids=["heads", "lora"],
)
def test_losses_and_gradients_are_those_without(stage, heads, captions, kinds, backend, tmp_path):
    backend("aot_eager")
    Vocabulary(["a", "red", "cup", "two", "dogs"]).write(tmp_path / "words.json")
    keys = {
        "MODEL.VISFT.HEADS": heads,
        "MODEL.VISFT.DETECTION.DROPOUT": 0.0,
        "MODEL.VISFT.CAPTIONING.DROPOUT": 0.0,
        "MODEL.VISFT.CAPTIONING.HEAD": captions,
        "MODEL.VISFT.CAPTIONING.VOCABULARY": str(tmp_path / "words.json"),
    }
    model = build(*(word for pair in keys.items() for word in pair)).train()
    model.set_stage(stage)
    for site in lora.sites(model.backbone):
        torch.nn.init.normal_(site.adapter.lora_B, std=0.2)
    names = list(model.state_dict())
    counts = []
    # The first batch is padded, the second is not. Then sizes and lengths of captions change.
    for sizes in ([(48, 64), (64, 64)], [(64, 64)] * 2, [(96, 64), (40, 40)], [(56, 120)] * 3):
        images = [picture(size, number=i + 1) for i, size in enumerate(sizes)]
        images = [x | {"captions": ["a red cup" + len(sizes) * " two dogs"]} for x in images]
        losses, gradients = step(model, images)
        assert graphs() == (counts[-1] if counts else 0)
        with compiled.compiled(model, "blocks"):
            assert list(model.state_dict()) == names
            found = step(model, images)
        assert_alike(found[0], losses)
        assert_alike(found[1], gradients)
        counts.append(graphs())
    assert kinds <= counts[0] and counts[1] == counts[2] == counts[3] <= 2 * kinds, counts


TOWERS = {
    "small-eva01": {"frozen_dtype": "bfloat16", "activation_checkpointing": True},
    "small-eva02": {"window_size": 3},
    "small-eva02-e": {"class_token": "drop"},
    "small-siglip": {},
}


@pytest.mark.parametrize("name", TOWERS)
def test_blocks_of_every_kind_are_whole_graphs_for_all_sizes(name, towers, backend):
    backend("eager")
    backbone, counts, called = towers.tuned(name, **TOWERS[name]), [], []
    model = torch.nn.Module()
    model.backbone, model.heads = backbone, torch.nn.ModuleDict()
    for block in backbone.blocks:
        block.register_forward_hook(lambda *_: called.append(1))
    for count, height, width in ((2, 64, 64), (3, 96, 80), (2, 50, 130), (4, 112, 64)):
        images = torch.randn(count, 3, height, width)

        def gradients(images=images) -> dict[str, torch.Tensor]:
            backbone.zero_grad()
            features = backbone(images)["last_feat"]
            features.square().mean().backward()
            named = {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}
            return named | {"features": features.detach()}

        expected = gradients()
        called.clear()
        with compiled.compiled(model, "blocks"):
            assert_alike(gradients(), expected)
        assert len(called) >= len(backbone.blocks), "hooks act"
        counts.append(graphs())
    # Windows of sizes that need padding have a mask; the rest of a window is a size like any other.
    assert counts[-1] <= (8 if "window_size" in TOWERS[name] else counts[0]) and counts[0] >= 1, counts
    assert counts[-1] == counts[-2], counts


def test_without_a_compiler_the_run_does_not_begin(tiny):
    cfg = settings.load_config(tiny[1], [*tiny[2:], "VISFT.COMPILE", "blocks"])
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        with pytest.raises(ConfigError, match=r"(?s)VISFT\.COMPILE.*C\+\+ compiler.*CXX"):
            checks.check(cfg)
        cfg.VISFT.COMPILE = ""
        checks.check(cfg)
    with pytest.raises(ConfigError, match="VISFT.COMPILE"):
        cfg.VISFT.COMPILE = "block"
        checks.check(cfg)


def _compile_by(backend: str) -> None:
    compiled.BACKEND = backend


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["aot_eager", "inductor"])
def test_a_killed_run_goes_on_to_the_bit(name, shapes_train, tmp_path):
    if name == "inductor":
        try:
            compiled.check_compiler("blocks")
        except ConfigError as error:
            pytest.skip(str(error))

    def begin(folder: str, *options: str):
        arguments = [*tiny_arguments(shapes_train, None, tmp_path / folder), "VISFT.COMPILE", "blocks"]
        words, before = runs.option(arguments, *options), functools.partial(_compile_by, name)
        return processes.start("train_net.py", words, tmp_path / "log", before=before)

    whole = begin("whole")
    whole.join()
    assert whole.exitcode == 0, (tmp_path / "log").read_text()
    for stage in ("heads", "lora"):
        process = begin("run", "--resume")
        checkpoint = tmp_path / "run" / stage / "last_checkpoint"
        while process.is_alive() and not checkpoint.is_file():
            process.join(0.005)
        process.kill()
        process.join()
        assert process.exitcode != 0 and checkpoint.read_text() == "model_0000002.safetensors"
    last = begin("run", "--resume")
    last.join()
    assert last.exitcode == 0, (tmp_path / "log").read_text()
    stages = ("heads", "lora")
    runs.assert_same_end(runs.end(tmp_path / "run", *stages), runs.end(tmp_path / "whole", *stages))
