"""The base's text tower and tokenizer as transformers has them, where it has them."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from visft.checkpoint.files import write_json
from visft.export.source import Source
from visft.export.timm_file import activation
from visft.modeling.backbone import open_clip_models

_SENTENCES = ("a photo of a cat", "Two dogs, left of a banana!")
_ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_tanh": "gelu_pytorch_tanh"}
_VOCABULARY = (
    49408  # of OpenAI's byte-pair encoding, which open_clip brings and transformers' CLIPTokenizer reads
)
_BLOCK = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def blocks(state: dict[str, Tensor], prefix: str, model: str) -> dict[str, Tensor]:
    """The tensors of open_clip's Transformer, LayerScale apart, under the names of transformers' encoders.

    Args:
        prefix: what comes before `resblocks` in open_clip.
        model: `vision_model.` or `text_model.`.
    """
    found = {}
    for name, tensor in state.items():
        if not name.startswith(f"{prefix}resblocks."):
            continue
        block, inner = name.removeprefix(f"{prefix}resblocks.").split(".", 1)
        layer = f"{model}encoder.layers.{block}."
        if inner.startswith("attn.in_proj_"):
            part = inner.removeprefix("attn.in_proj_")
            for target, rows in zip("qkv", tensor.chunk(3), strict=True):
                found[f"{layer}self_attn.{target}_proj.{part}"] = rows
        for old, new in _BLOCK.items():
            if inner.startswith(old):
                found[f"{layer}{new}{inner.removeprefix(old)}"] = tensor
    return found


def clip(model: nn.Module | None) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Configuration and tensors of CLIP's text tower, projection and scale included; None where it is another kind."""
    text = _text(model)
    if text is None or not _plain(text):
        return None
    pool = getattr(text, "pool_type", None) or getattr(text, "text_pool_type", None)
    if text.attn_mask is None or pool != "argmax" or not isinstance(text.text_projection, nn.Parameter):
        return None
    config, tensors, state = _shared(model, text)
    # The end of a text is the largest id, which open_clip looks for; its tokenizer's start is the one before.
    config |= {"eos_token_id": config["vocab_size"] - 1, "bos_token_id": config["vocab_size"] - 2}
    config |= {"pad_token_id": config["eos_token_id"], "projection_dim": text.text_projection.shape[1]}
    tensors["text_projection.weight"] = state["text_projection"].T.contiguous()
    tensors["logit_scale"] = model.logit_scale.detach().cpu().reshape(())
    return config, tensors


def siglip(model: nn.Module | None) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Configuration and tensors of SigLIP's text tower, its scale and bias included; None where it is another kind."""
    text = _text(model)
    if text is None or not _plain(text) or getattr(model, "logit_bias", None) is None:
        return None
    linear = isinstance(text.text_projection, nn.Linear) and text.text_projection.bias is not None
    if text.attn_mask is not None or text.pool_type != "last" or not linear:
        return None
    config, tensors, state = _shared(model, text)
    config["projection_size"] = text.text_projection.out_features
    for part in ("weight", "bias"):
        tensors[f"text_model.head.{part}"] = state[f"text_projection.{part}"]
    tensors["logit_scale"] = model.logit_scale.detach().cpu().reshape(1)
    tensors["logit_bias"] = model.logit_bias.detach().cpu().reshape(1)
    return config, tensors


def put_tokenizer(folder: Path, source: Source) -> None:
    """Write OpenAI's tokenizer where the base uses it; other bases name theirs in their own description."""
    from open_clip.tokenizer import SimpleTokenizer

    if not _has_tokenizer(source):
        return
    text = source.config["text_cfg"]
    tokenizer = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(word, word): number for word, number in tokenizer.encoder.items()}
    pairs = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.get)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in pairs)]
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            **special,
            "pad_token": "<|endoftext|>",
            "model_max_length": text.get("context_length", 77),
        },
    )


def sentences(source: Source, has_text: bool) -> dict[str, Any]:
    """Two sentences and their tokens by open_clip's tokenizer, for the reader to compare; {} without a tokenizer."""
    if not (has_text and _has_tokenizer(source)):
        return {}
    tokens = open_clip_models.open_clip().get_tokenizer(source.name)(list(_SENTENCES))
    return {"sentences": _SENTENCES, "tokens": tokens.tolist()}


def _has_tokenizer(source: Source) -> bool:
    text = (source.config or {}).get("text_cfg", {})
    return not text.get("hf_tokenizer_name") and text.get("vocab_size", _VOCABULARY) == _VOCABULARY


def _text(model: nn.Module | None) -> nn.Module | None:
    """The module that holds the text tower: the CLIP itself, or its `text`."""
    text = getattr(model, "text", model)
    return text if hasattr(text, "token_embedding") else None


def _plain(text: nn.Module) -> bool:
    block = text.transformer.resblocks[0]
    same = text.ln_final.eps == block.ln_1.eps == block.ln_2.eps
    known = activation(block.mlp.gelu) in _ACTIVATIONS if hasattr(block.mlp, "gelu") else False
    padded = getattr(text, "use_pad_mask", False) or getattr(text, "cls_emb", None) is not None
    return same and known and not padded and not hasattr(block.ls_1, "gamma")


def _shared(model: nn.Module, text: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    prefix = "" if text is model else "text."
    state = {
        name.removeprefix(prefix): tensor.detach().cpu()
        for name, tensor in model.state_dict().items()
        if name.startswith(prefix) and not name.startswith("visual.")
    }
    block = text.transformer.resblocks[0]
    config = {
        "vocab_size": text.token_embedding.num_embeddings,
        "hidden_size": text.token_embedding.embedding_dim,
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": len(text.transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "max_position_embeddings": len(text.positional_embedding),
        "hidden_act": _ACTIVATIONS[activation(block.mlp.gelu)],
        "layer_norm_eps": text.ln_final.eps,
    }
    tensors = {
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
        "text_model.final_layer_norm.weight": state["ln_final.weight"],
        "text_model.final_layer_norm.bias": state["ln_final.bias"],
    }
    return config, tensors | blocks(state, "transformer.", "text_model."), state
