"""The authors' head files, made by the golden layout, through `MODEL.VISFT.HEAD_FILES`: golden outputs come out."""

from pathlib import Path

import golden
import pytest
import small_eva
import torch
from detectron2.modeling import build_model
from torch.nn.utils.rnn import pack_padded_sequence

from visft.checkpoint import authors, load
from visft.engine.settings import load_config
from visft.errors import CheckpointError
from visft.modeling.heads import Vocabulary

ROOT = Path(__file__).parents[2]
FILES = {"detection": "detection", "segment": "segmentation", "caption": "captioning"}


def names_of(pack: golden.Pack) -> list[str]:
    """The names in a released file: all heads, the tower, and the segmentation head a second time."""
    copies = [n.replace(".segment_", ".segment_head.") for n in pack.layout if ".segment_" in n]
    return [*pack.layout, *copies]


def released(pack: golden.Pack, kind: str) -> dict[str, torch.Tensor]:
    """A file as released: its head's drawn weights; all else, which counts for nothing, is 7."""
    tensors = {}
    for name in names_of(pack):
        head = next((k for k in ("segment", "caption") if k in name), "detection")
        right = head == kind and not name.startswith((golden.TOWER, "visft_heads.segment_head."))
        shape = pack.layout[name.replace(".segment_head.", ".segment_")]
        tensors[name] = golden.draw(pack.salt, name, shape) if right else torch.tensor(7.0).expand(*shape)
    return tensors


@pytest.fixture(params=golden.FLAVOURS, scope="module")
def pack(request) -> golden.Pack:
    return golden.Pack(request.param)


@pytest.fixture(scope="module")
def heads(pack, tmp_path_factory):
    """The heads of a model that was built by a config whose HEAD_FILES are such files."""
    folder = tmp_path_factory.mktemp(pack.flavour)
    names = []
    for kind in FILES:
        names.append(str(folder / f"eva_{pack.flavour}_{kind}_heads.ckpt"))
        torch.save(released(pack, kind), names[-1])
    layout = {n.removeprefix(golden.HEADS): shape for n, shape in pack.layout.items()}
    width = layout["input_proj.weight"][1]
    words = layout["caption_decoder.embedding.weight"][0] - 4
    Vocabulary([f"w{i}" for i in range(words)]).write(folder / "vocabulary.json")
    opts = {
        "MODEL.DEVICE": "cpu",
        "MODEL.CLIP_VIT.NAME": small_eva.register(width, 1),
        "MODEL.CLIP_VIT.PRETRAINED": "",
        "MODEL.CLIP_VIT.FROZEN_DTYPE": "",
        "MODEL.VISFT.HEADS": ("detection", "segmentation", "captioning"),
        "MODEL.VISFT.LOSS_WEIGHTS": (),
        "MODEL.VISFT.HEAD_FILES": tuple(names),
        "MODEL.VISFT.DETECTION.NUM_CLASSES": layout["class_embeds.bias"][0] - 1,
        "MODEL.VISFT.SEGMENTATION.NUM_CLASSES": layout["segment_predictor.class_embed.bias"][0] - 1,
        "MODEL.VISFT.CAPTIONING.VOCABULARY": folder / "vocabulary.json",
    }
    words = [str(word) for pair in opts.items() for word in pair]
    return build_model(load_config(str(ROOT / "configs" / "visft_eva.yaml"), words)).eval().heads


def difference(left: torch.Tensor, right: torch.Tensor) -> float:
    assert left.shape == right.shape
    return (left - right).abs().max().item()


@torch.no_grad()
def test_detection(pack, heads):
    output = heads["detection"](pack.tensors["features"], pack.tensors["feature_padding_mask"])
    assert difference(output.hidden_states, pack.tensors["det_hidden_states"]) < 1e-4
    assert difference(output.logits, pack.tensors["det_logits"]) < 1e-4
    assert difference(output.boxes, pack.tensors["det_boxes"]) < 1e-4


@torch.no_grad()
def test_segmentation(pack, heads):
    output = heads["segmentation"](pack.tensors["features"])
    assert difference(output.logits[-1], pack.tensors["seg_logits"]) < 1e-4
    assert difference(output.masks[-1], pack.tensors["seg_masks"]) < 1e-4


@torch.no_grad()
def test_captions(pack, heads):
    head, tokens = heads["captioning"], pack.tensors["cap_tokens"]
    lengths, order = pack.tensors["cap_lengths"].flatten() - 1, pack.tensors["cap_sort_ind"]
    hidden, _ = head.decoder(head.cells(pack.tensors["features"]), tokens[:, :-1])
    scores = pack_padded_sequence(head.decoder.scores(hidden)[order], lengths[order], batch_first=True)
    assert difference(scores.data, pack.tensors["cap_scores_packed"]) < 1e-4


@pytest.mark.parametrize("kind", FILES)
def test_every_name_is_accounted_for(pack, kind):
    """Used, or ignored for a reason, and nothing twice."""
    names = names_of(pack)
    path = f"eva_{pack.flavour}_{kind}_heads.ckpt"
    assert authors.head_of_file(path) == FILES[kind]
    used = authors.split_heads({name: name for name in names}, FILES[kind])
    ignored = authors.ignored_in_heads(names, path, FILES[kind])
    assert list(used) == [FILES[kind]]
    assert sorted([*used[FILES[kind]].values(), *ignored]) == sorted(names)
    assert "tower" in ignored[f"{golden.TOWER}norm.weight"]
    copy = "visft_heads.segment_head.predictor.query_feat.weight"
    assert "copy" in ignored[copy]
    other = "visft_heads.caption_decoder.fc.bias" if kind != "caption" else "visft_heads.class_embeds.bias"
    assert f"the file is for `{FILES[kind]}`" in ignored[other]


def test_a_file_without_a_telling_name_gives_all_its_heads(pack):
    shapes = dict.fromkeys(names_of(pack), torch.zeros(1))
    assert load.split_heads(shapes, "model.ckpt").keys() == set(FILES.values())
    assert load.split_heads(shapes, "eva_e_segment_heads.ckpt").keys() == {"segmentation"}


def test_unknown_names_are_an_error(pack, heads, tmp_path):
    path, kind = tmp_path / "eva_g_caption_heads.ckpt", {"captioning": heads["captioning"]}
    model = torch.nn.Module()
    model.heads = torch.nn.ModuleDict(kind)
    tensors = {n: t for n, t in released(pack, "caption").items() if "caption" in n}
    torch.save({**tensors, "optimizer.step": torch.zeros(1)}, path)
    with pytest.raises(
        CheckpointError, match="eva_g_caption_heads.*optimizer.step is no name of the authors'"
    ):
        load.load_heads(model, [path])
    torch.save({**tensors, "visft_heads.caption_decoder.more": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="has no place for .decoder.more"):
        load.load_heads(model, [path])
    del tensors["visft_heads.caption_decoder.fc.bias"]
    torch.save(tensors, path)
    with pytest.raises(CheckpointError, match="lacks 1 of the model's tensors .decoder.fc.bias"):
        load.load_heads(model, [path])
