"""The training loop against a loop written out, its schedule against detectron2's, and what stops it."""

import itertools

import pytest
import torch
from detectron2.engine import EvalHook
from torch import nn

from visft.engine.feature_cache import cached_features
from visft.engine.hooks import Checkpoints, LearningRate
from visft.engine.optimizer import learning_rate
from visft.engine.trainer import StageTrainer, seed_iteration
from visft.errors import TrainingError


class Model(nn.Module):
    """A loss that dropout makes random, and that an image can spoil."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Linear(4, 1)
        self.dropout = nn.Dropout(0.5)

    def forward(self, batch: list[dict]) -> dict[str, torch.Tensor]:
        x = torch.stack([image["x"] for image in batch])
        y = self.layer(self.dropout(x))
        return {"head/loss_a": y.square().mean(), "head/loss_b": 0.1 * y.abs().mean()}


def batches(start: int = 0, broken: int | None = None):
    for i in itertools.count(start):
        x = torch.randn(2, 4, generator=torch.Generator().manual_seed(i))
        if i == broken:
            x = x * float("nan")
        yield [{"x": row, "file_name": f"picture_{i}_{k}.png"} for k, row in enumerate(x)]


def trainer_of(model: nn.Module, stream, **options) -> StageTrainer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-8, weight_decay=0.1)
    trainer = StageTrainer(model, stream, optimizer, stage="heads", seed=7, **options)
    trainer.register_hooks([LearningRate(lambda i: learning_rate(i, base=0.01, warmup=2, total=6))])
    return trainer


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_equals_a_loop_written_out(accumulate):
    model = Model()
    trainer_of(model, batches(), accumulate=accumulate, clip_norm=0.1).train(0, 6)

    expected, stream = Model().train(), batches()
    optimizer = torch.optim.AdamW(expected.parameters(), lr=0.01, eps=1e-8, weight_decay=0.1)
    for i in range(6):
        seed_iteration(7, "heads", i)
        optimizer.param_groups[0]["lr"] = learning_rate(i, base=0.01, warmup=2, total=6)
        optimizer.zero_grad()
        for _ in range(accumulate):
            losses = expected(next(stream))
            ((losses["head/loss_a"] + losses["head/loss_b"]) / accumulate).backward()
        gradient = torch.cat([p.grad.flatten() for p in expected.parameters()])
        for p in expected.parameters():
            p.grad *= min(1.0, 0.1 / (float(gradient.norm()) + 1e-6))
        optimizer.step()
    torch.testing.assert_close(weights(model), weights(expected), rtol=1e-5, atol=1e-7)


def test_iterations_depend_on_their_number_alone():
    whole = Model()
    trainer_of(whole, batches()).train(0, 6)
    parts = Model()
    first = trainer_of(parts, batches())
    first.train(0, 3)
    torch.rand(17)  # whatever ran in between
    second = trainer_of(parts, batches(3))
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.train(3, 6)
    assert weights(whole).equal(weights(parts))


def test_a_loss_that_is_not_finite_names_the_images_and_saves_nothing():
    model, saved = Model(), []
    trainer = trainer_of(model, batches(broken=2))
    before = []
    trainer.register_hooks([Checkpoints(lambda done: (saved.append(done), before.append(weights(model))), 1)])
    evaluated = []
    trainer.register_hooks([EvalHook(0, lambda: evaluated.append(1))])
    with pytest.raises(
        TrainingError, match=r"heads, iteration 2: .*head/loss_a is nan.*picture_2_0.png, picture_2_1"
    ):
        trainer.train(0, 3)
    assert saved == [1, 2] and not evaluated
    assert weights(model).equal(before[-1])


def test_broken_weights_are_not_saved():
    model, saved = Model(), []
    trainer = trainer_of(model, batches())

    def spoil(done: int) -> None:
        saved.append(done)
        with torch.no_grad():
            model.layer.bias.fill_(float("inf"))

    trainer.register_hooks([Checkpoints(spoil, 1), Checkpoints(saved.append, 1)])
    with pytest.raises(TrainingError, match="not finite"):
        trainer.train(0, 1)
    assert saved == [1]


def test_a_batch_without_labels_leaves_the_weights_alone():
    class Unlabelled(Model):
        def forward(self, batch):
            return {"unlabelled": torch.zeros((), requires_grad=True)}

    model = Unlabelled()
    before = weights(model)
    trainer_of(model, batches()).train(0, 2)
    assert weights(model).equal(before)


def test_bfloat16_autocast_trains_float32_weights():
    model, seen = Model(), []
    model.layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    before = weights(model)
    trainer_of(model, batches(), amp="bfloat16").train(0, 2)
    assert set(seen) == {torch.bfloat16} and weights(model).dtype == torch.float32
    assert not weights(model).equal(before)


def test_schedule_after_warm_up_is_detectron2s():
    from detectron2.solver import LRMultiplier
    from fvcore.common.param_scheduler import CosineParamScheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = LRMultiplier(optimizer, CosineParamScheduler(1, 0), max_iter=20)
    for i in range(20):
        if i >= 5:
            expected = optimizer.param_groups[0]["lr"]
            assert learning_rate(i, base=0.5, warmup=5, total=20) == pytest.approx(expected, rel=1e-6)
        optimizer.step()
        scheduler.step()
    ramp = [learning_rate(i, base=0.5, warmup=5, total=1000) for i in range(5)]
    assert ramp == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5], rel=1e-3)


class Tower(nn.Module):
    """A frozen map; counts the images that pass it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.pictures = nn.Conv2d(3, 5, 4, stride=4), 0

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        self.pictures += len(images)
        return {"last_feat": self.layer(images)}


def test_feature_cache_gives_the_towers_features_and_computes_each_image_once():
    tower = Tower()
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        expected = tower(images)["last_feat"]
    tower.pictures = 0
    with cached_features(tower, 1.0) as cache:
        for order in ([0, 1, 2], [2, 3, 0], [3, 1, 1]):
            torch.testing.assert_close(tower(images[order])["last_feat"], expected[order])
        assert tower.pictures == 4 and cache.misses == 4 and cache.hits == 5
        # The same bytes in another shape are another image.
        assert tower(images[:1].reshape(1, 3, 32, 8))["last_feat"].shape == (1, 5, 8, 2)
        with cache.bypassed():
            tower(images)
        assert tower.pictures == 9
    tower(images)
    assert tower.pictures == 13 and "forward" not in vars(tower)


def test_full_feature_cache_computes_the_rest():
    tower = Tower()
    images = torch.randn(4, 3, 16, 16)
    with cached_features(tower, 1.5 * 5 * 16 * 4 / 2**30) as cache:  # room for one
        for _ in range(2):
            torch.testing.assert_close(tower(images)["last_feat"], tower.layer(images).detach())
        assert cache.hits == 1
