"""The authors' numbers, from their weights. `VISFT_GOLDEN_DIR` names another pack of the same format.

`pytest tests/test_golden.py -rP` prints the largest difference of each quantity.
"""

import golden
import pytest
import torch
from detectron2.structures import Boxes, Instances

from visft.checkpoint.authors import split_heads
from visft.modeling.backbone import lora
from visft.modeling.heads import CaptionHead, DETRHead, HeadInputs, LabelSpace, Mask2FormerHead, Vocabulary
from visft.modeling.heads.common.position_encoding import sine_position_encoding


@pytest.fixture(params=golden.FLAVOURS, scope="module")
def pack(request) -> golden.Pack:
    return golden.Pack(request.param)


def test_the_pack_has_flavours():
    assert golden.FLAVOURS, f"no *.json in {golden.FOLDER}"


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def within(
    limit: float, pack, quantity: str, found: torch.Tensor | float, expected: torch.Tensor | None = None
):
    """Print and check a difference: that of two tensors, or `found` itself."""
    largest = found if expected is None else difference(found, expected)
    print(f"{pack.flavour}  {quantity:<40} {largest:.1e}  (limit {limit:.0e})")
    assert largest < limit, quantity


# The tower and LoRA


def test_features_without_lora(pack):
    features = pack.backbone(with_lora=False)(pack.batch())["last_feat"]
    within(1e-4, pack, "features without LoRA", features, pack.tensors["features_without_lora"])


def test_features_with_lora(pack):
    expected = pack.tensors["features"]
    assert difference(expected, pack.tensors["features_without_lora"]) > 1e-2, "LoRA would not be tested"
    with torch.no_grad():
        features = pack.backbone()(pack.batch())["last_feat"]
    within(1e-4, pack, "features with LoRA", features, expected)


def test_features_with_lora_merged(pack):
    backbone = lora.merge(pack.backbone())
    with torch.no_grad():
        features = backbone(pack.batch())["last_feat"]
    within(1e-4, pack, "features with LoRA merged", features, pack.tensors["features"])


# Detection, segmentation, captioning, and their gradients of the stage-2 step (heads frozen, no dropout)


@pytest.fixture(scope="module")
def detector(pack) -> DETRHead:
    weights = golden_heads(pack)["detection"]
    encoder_dim, channels = weights["input_proj.weight"].shape[:2]
    head = DETRHead(
        in_channels=channels,
        labels=LabelSpace(len(weights["class_embeds.bias"]) - 1),
        num_queries=len(weights["query_embeds.weight"]),
        encoder_layers=count(weights, "transformer.encoder.layers."),
        encoder_dim=encoder_dim,
        decoder_layers=count(weights, "transformer.decoder.layers."),
        decoder_dim=weights["query_embeds.weight"].shape[1],
        feedforward_dim=len(weights["transformer.encoder.layers.0.linear1.bias"]),
    )
    head.load_state_dict(weights)
    return head.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def segmenter(pack) -> Mask2FormerHead:
    weights = golden_heads(pack)["segmentation"]
    head = Mask2FormerHead(
        in_channels=weights["pixel_decoder.adapter_1.weight"].shape[1],
        labels=LabelSpace(len(weights["predictor.class_embed.bias"]) - 1),
        num_queries=len(weights["predictor.query_feat.weight"]),
        encoder_layers=count(weights, "pixel_decoder.transformer.encoder.layers."),
        encoder_feedforward_dim=len(weights["pixel_decoder.transformer.encoder.layers.0.linear1.bias"]),
        decoder_layers=count(weights, "predictor.transformer_ffn_layers."),
        dim=weights["predictor.query_feat.weight"].shape[1],
        feedforward_dim=len(weights["predictor.transformer_ffn_layers.0.linear1.bias"]),
    )
    head.load_state_dict(weights)
    return head.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def captioner(pack) -> CaptionHead:
    weights = golden_heads(pack)["captioning"]
    num_words, embedding_dim = weights["decoder.embedding.weight"].shape
    attention_dim, channels = weights["decoder.attention.encoder_att.weight"].shape
    head = CaptionHead(
        in_channels=channels,
        vocabulary=Vocabulary([f"w{i}" for i in range(1, num_words - 3)]),
        attention_dim=attention_dim,
        embedding_dim=embedding_dim,
        hidden_dim=weights["decoder.fc.weight"].shape[1],
    )
    head.load_state_dict(weights)
    return head.eval().requires_grad_(False)


def golden_heads(pack) -> dict[str, dict[str, torch.Tensor]]:
    """The weights of the heads, under our names."""
    names = [n for n in pack.layout if not n.startswith(golden.TOWER)]
    return split_heads({name: golden.draw(pack.salt, name, pack.layout[name]) for name in names})


def count(weights: dict[str, torch.Tensor], prefix: str) -> int:
    """Number of layers whose names begin so."""
    return len({n.removeprefix(prefix).split(".")[0] for n in weights if n.startswith(prefix)})


def annotated(pack) -> list[dict]:
    """The targets as a mapper gives them: pixels of the picture, corners. The labels are the outputs themselves."""
    images = []
    for i, (height, width) in enumerate(pack.sizes):
        boxes = pack.tensors[f"det_target_{i}_boxes"] * torch.tensor([width, height, width, height])
        instances = Instances((height, width), gt_classes=pack.tensors[f"det_target_{i}_labels"])
        instances.gt_boxes = Boxes(
            torch.cat((boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2), 1)
        )
        images.append({"image_id": i, "instances": instances})
    return images


def head_inputs(pack, features) -> HeadInputs:
    mask, sizes = pack.tensors["feature_padding_mask"], [tuple(size) for size in pack.sizes]
    return HeadInputs(features, mask, annotated(pack), sizes, tuple(pack.batch().shape[-2:]))


def detection_losses(pack, head, features) -> dict[str, torch.Tensor]:
    inputs = head_inputs(pack, features)
    return head.losses(inputs, head.normalizers(inputs.images))


def test_position_encoding(pack):
    valid, expected = ~pack.tensors["feature_padding_mask"], pack.tensors["feature_pos"]
    within(1e-4, pack, "position encoding", sine_position_encoding(valid, expected.shape[1]), expected)


def test_detection(pack, detector):
    output = detector(pack.tensors["features"], pack.tensors["feature_padding_mask"])
    for kind in ("hidden_states", "logits", "boxes"):
        within(1e-4, pack, f"detection, {kind}", getattr(output, kind), pack.tensors[f"det_{kind}"])


def test_detection_matching(pack, detector):
    output = detector(pack.tensors["features"], pack.tensors["feature_padding_mask"])
    matching = detector.match(output, detector.targets(head_inputs(pack, pack.tensors["features"])))
    queries, indices = (x[-1].split(matching.counts) for x in (matching.query, matching.target))
    for i in range(len(pack.sizes)):
        pairs = zip(queries[i].tolist(), indices[i].tolist(), strict=True)
        expected = (pack.tensors[f"det_match_{i}_{side}"].tolist() for side in ("query", "target"))
        assert set(pairs) == set(zip(*expected, strict=True))


def test_detection_losses(pack, detector):
    losses = detection_losses(pack, detector, pack.tensors["features"])
    prefix = "det_weighted_"
    expected = {n.removeprefix(prefix): t.item() for n, t in pack.tensors.items() if n.startswith(prefix)}
    assert losses.keys() == expected.keys()
    relative = max(abs(losses[name].item() / value - 1) for name, value in expected.items())
    within(1e-4, pack, "detection, losses (relative)", relative)


def test_segmentation(pack, segmenter):
    output = segmenter(pack.tensors["features"])
    within(1e-4, pack, "segmentation, logits", output.logits[-1], pack.tensors["seg_logits"])
    within(1e-4, pack, "segmentation, masks", output.masks[-1], pack.tensors["seg_masks"])
    checked = 0
    for kind, predictions in (("logits", output.logits), ("masks", output.masks)):
        for j in range(len(predictions) - 1):
            if kind == "logits" or f"seg_aux_{j}_masks" in pack.tensors:
                name = f"segmentation, {kind} before layer {j + 1}"
                within(1e-4, pack, name, predictions[j], pack.tensors[f"seg_aux_{j}_{kind}"])
                checked += 1
    assert checked == sum(name.startswith("seg_aux_") for name in pack.tensors)


def lora_difference(pack, backbone, kind: str) -> float:
    """The largest difference of a LoRA gradient, relative to the largest entry of its (fused) tensor."""
    gradients, worst = {n: p.grad for n, p in backbone.named_parameters() if p.requires_grad}, 0.0
    expected = pack.lora_gradients(kind)
    assert gradients.keys() == expected.keys()
    for name in expected:
        if ".lora.q." in name:
            q, v = name, name.replace(".lora.q.", ".lora.v.")
            theirs = torch.cat((expected[q], expected[v]))
            worst = max(
                worst, difference(torch.cat((gradients[q], gradients[v])), theirs) / theirs.abs().max().item()
            )
    return worst


def test_detection_gradients_of_lora(pack, detector):
    backbone = pack.backbone()
    sum(detection_losses(pack, detector, backbone(pack.batch())["last_feat"]).values()).backward()
    within(2e-3, pack, "detection, LoRA gradients (relative)", lora_difference(pack, backbone, "det"))


def test_segmentation_gradients_of_lora(pack, segmenter):
    backbone = pack.backbone()
    output = segmenter(backbone(pack.batch())["last_feat"])
    logits, masks = output.logits[-1], output.masks[-1]
    probes = pack.probe("probe_logits", logits.shape), pack.probe("probe_masks", masks.shape)
    ((probes[0] * logits).mean() + (probes[1] * masks).mean()).backward()
    within(2e-2, pack, "segmentation, LoRA gradients (relative)", lora_difference(pack, backbone, "seg"))


def caption_losses(pack, head, features) -> dict[str, torch.Tensor]:
    lengths = pack.tensors["cap_lengths"].flatten() - 1  # the start is not said
    normalizers = torch.stack((lengths.sum(), torch.tensor(len(lengths)))).float()
    return head.caption_losses(head.cells(features), pack.tensors["cap_tokens"], lengths, normalizers)


def test_caption_scores_and_attention(pack, captioner):
    tokens, order = pack.tensors["cap_tokens"], pack.tensors["cap_sort_ind"]
    lengths = pack.tensors["cap_lengths"].flatten() - 1
    hidden, attention = captioner.decoder(captioner.cells(pack.tensors["features"]), tokens[:, :-1])
    steps = (torch.arange(hidden.shape[1]) < lengths[:, None])[..., None]
    expected = pack.tensors["cap_alphas"]
    ours = (attention * steps)[order, : expected.shape[1]]
    within(1e-4, pack, "captioning, attention", ours, expected)
    for name, values in (("scores", captioner.decoder.scores(hidden)), ("targets", tokens[:, 1:])):
        packed = torch.nn.utils.rnn.pack_padded_sequence(values[order], lengths[order], batch_first=True)
        within(1e-4, pack, f"captioning, {name}", packed.data, pack.tensors[f"cap_{name}_packed"])


def test_caption_losses(pack, captioner):
    losses = caption_losses(pack, captioner, pack.tensors["features"])
    assert losses.keys() == {"loss_words", "loss_attention"}
    relative = abs(sum(losses.values()).item() / pack.tensors["cap_loss"].item() - 1)
    within(1e-4, pack, "captioning, loss (relative)", relative)


def test_caption_gradients_of_lora(pack, captioner):
    backbone = pack.backbone()
    sum(caption_losses(pack, captioner, backbone(pack.batch())["last_feat"]).values()).backward()
    within(2e-3, pack, "captioning, LoRA gradients (relative)", lora_difference(pack, backbone, "cap"))
