"""The base's text encoder and tokenizer in the layout of transformers, if it has such."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from visft.checkpoint import hugging_face_base, open_clip_models
from visft.checkpoint.files import write_json
from visft.export.source import Source
from visft.export.timm_file import activation

_SENTENCES = ("a photo of a cat", "Two dogs, left of a banana!")
ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_tanh": "gelu_pytorch_tanh"}
_VOCABULARY = 49408
"""Files of OpenAI's byte-pair encoding, which open_clip includes and CLIPTokenizer of transformers reads."""


def convert(kind: str, model: nn.Module | None) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Return config and tensors of a base's text encoder, with projection, scale and bias.

    Args:
        kind: `clip` or `siglip`.
        model: the base.

    Returns:
        None if there is no base, or transformers has no such text encoder.
    """
    text = getattr(model, "text", model)
    if not hasattr(text, "token_embedding") or not _plain(text):
        return None
    pool = getattr(text, "pool_type", None) or getattr(text, "text_pool_type", None)
    projection = text.text_projection
    if kind == "clip":
        fitting = text.attn_mask is not None and pool == "argmax" and isinstance(projection, nn.Parameter)
    else:
        linear = isinstance(projection, nn.Linear) and projection.bias is not None
        fitting = text.attn_mask is None and pool == "last" and linear
        fitting = fitting and getattr(model, "logit_bias", None) is not None
    if not fitting:
        return None
    state = {n.removeprefix("text."): t.detach().cpu() for n, t in model.state_dict().items() if _beside(n)}
    tensors = hugging_face_base.from_open_clip(state)
    block = text.transformer.resblocks[0]
    config = {
        "vocab_size": text.token_embedding.num_embeddings,
        "hidden_size": text.token_embedding.embedding_dim,
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": len(text.transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "max_position_embeddings": len(text.positional_embedding),
        "hidden_act": ACTIVATIONS[activation(block.mlp.gelu)],
        "layer_norm_eps": text.ln_final.eps,
    }
    if kind == "clip":
        # open_clip takes the largest id as the end of a text; the id before it is the start token of its tokenizer.
        end = config["vocab_size"] - 1
        config |= {"eos_token_id": end, "bos_token_id": end - 1, "pad_token_id": end}
        config["projection_dim"] = projection.shape[1]
        return config, tensors | {"logit_scale": state["logit_scale"].reshape(())}
    config["projection_size"] = projection.out_features
    for part in ("weight", "bias"):
        tensors[f"text_model.head.{part}"] = state[f"text_projection.{part}"]
    return config, tensors | {name: state[name].reshape(1) for name in ("logit_scale", "logit_bias")}


def _beside(name: str) -> bool:
    return not name.startswith("visual.")


def put_tokenizer(folder: Path, source: Source) -> None:
    """Write OpenAI's tokenizer if the base uses it. Other bases name theirs in their own config."""
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
    """Return two sentences and their tokens, for the reader to compare; {} without a tokenizer of open_clip."""
    if not (has_text and _has_tokenizer(source)):
        return {}
    tokens = open_clip_models.open_clip().get_tokenizer(source.name)(list(_SENTENCES))
    return {"sentences": _SENTENCES, "tokens": tokens.tolist()}


def _has_tokenizer(source: Source) -> bool:
    text = (source.config or {}).get("text_cfg", {})
    return not text.get("hf_tokenizer_name") and text.get("vocab_size", _VOCABULARY) == _VOCABULARY


def _plain(text: nn.Module) -> bool:
    block = text.transformer.resblocks[0]
    same = text.ln_final.eps == block.ln_1.eps == block.ln_2.eps
    known = activation(block.mlp.gelu) in ACTIVATIONS if hasattr(block.mlp, "gelu") else False
    padded = getattr(text, "use_pad_mask", False) or getattr(text, "cls_emb", None) is not None
    return same and known and not padded and not hasattr(block.ls_1, "gamma")
