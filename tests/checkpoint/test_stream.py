"""Weight files read by ranges and written piece by piece, against safetensors' and PyTorch's own readers."""

import os

import pytest
import timm
import torch
from safetensors.torch import load_file, save, save_file

from visft.checkpoint import files, stream
from visft.errors import CheckpointError, ExportError
from visft.export import verification


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(5, 7),
        "half": torch.randn(3, 3).half(),
        "brain": torch.randn(9).bfloat16(),
        "double": torch.randn(2, 1, 2).double(),
        "number": torch.tensor(3.5),
        "none": torch.zeros(0, 4),
        "flags": torch.tensor([True, False, True]),
        "ids": torch.arange(5),
        "nan": torch.tensor([float("nan"), 1.0]),
    }


def lazy(content: dict[str, torch.Tensor]) -> dict[str, files.Lazy]:
    """The same, in pieces of four values."""
    return {
        n: files.Lazy(t.dtype, tuple(t.shape), lambda t=t: iter(t.view(-1).split(4)))
        for n, t in content.items()
    }


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and torch.allclose(left, right, 0, 0, equal_nan=True)


@pytest.mark.parametrize("kind", ["f.safetensors", "f.pt", "nested.pt", "old.pt"])
def test_every_kind_of_file_is_read_by_ranges(tmp_path, monkeypatch, kind):
    """Pieces of 16 bytes, the mapping renewed all the time."""
    path, expected = tmp_path / kind, tensors()
    if kind == "f.safetensors":
        save_file(expected, path)
    else:
        expected["turned"] = torch.randn(4, 6).t()
        expected["part"] = torch.randn(8, 6)[2:5, 1:3]
        content = {"state_dict": expected} if kind == "nested.pt" else expected
        torch.save(content, path, _use_new_zipfile_serialization=kind != "old.pt")
    monkeypatch.setattr(stream, "CHUNK", 16)
    monkeypatch.setattr(stream, "REMAP", 64)
    file = stream.TensorFile(path)
    assert file.shapes() == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    for name, tensor in expected.items():
        assert same(file.read_into(name, torch.empty(tensor.shape, dtype=tensor.dtype)), tensor), name
        assert sum(part.nbytes for part in file.parts(name)) == tensor.nbytes


def test_what_is_written_in_pieces_is_what_safetensors_writes(tmp_path):
    path, expected = tmp_path / "f.safetensors", tensors()
    files.write_safetensors(path, lazy(expected), {"format": "pt"})
    assert path.read_bytes() == save(expected, {"format": "pt"})
    found = load_file(path)
    assert found.keys() == expected.keys() and all(same(found[n], t) for n, t in expected.items())
    verification.stored(path, lazy(expected))
    mapped = files.map_tensors(path)  # each tensor lies at a multiple of its type's size
    assert all(tensor.data_ptr() % tensor.itemsize == 0 for tensor in mapped.values() if tensor.numel())


def test_one_wrong_bit_is_found(tmp_path):
    path, expected = tmp_path / "f.safetensors", tensors()
    data = bytearray(save(expected))
    data[-1] ^= 1
    path.write_bytes(data)
    for content in (expected, lazy(expected)):
        with pytest.raises(ExportError, match="1 tensors read back otherwise than written .flags."):
            verification.stored(path, content)
    path.write_bytes(data[:-1])
    with pytest.raises(ExportError, match="does not read back"):
        verification.stored(path, expected)
    path.write_bytes(save({"more": torch.zeros(1), **{n: t for n, t in expected.items() if n != "ids"}}))
    with pytest.raises(ExportError, match="2 tensors read back otherwise than written .ids, more."):
        verification.stored(path, expected)


def test_what_cannot_be_written_is_no_file(tmp_path):
    path, short = tmp_path / "f.safetensors", files.Lazy(torch.float32, (5,), lambda: iter([torch.zeros(4)]))
    with pytest.raises(CheckpointError, match="16 bytes came of 20 of x"):
        files.write_safetensors(path, {"x": short})
    with pytest.raises(CheckpointError, match="x is of torch.complex128"):
        files.write_safetensors(path, {"x": torch.zeros(1, dtype=torch.complex128)})
    assert os.listdir(tmp_path) == []
    if os.path.exists("/dev/full"):
        (tmp_path / f".f.safetensors.{os.getpid()}.partial").symlink_to("/dev/full")
        with pytest.raises(CheckpointError, match="cannot be written.*free some space"):
            files.write_safetensors(path, tensors())
        assert not path.exists()


EVA_CLIP_BLOCK = """norm1.weight norm1.bias attn.q_proj.weight attn.k_proj.weight attn.v_proj.weight attn.q_bias
attn.v_bias attn.inner_attn_ln.weight attn.inner_attn_ln.bias attn.proj.weight attn.proj.bias norm2.weight norm2.bias
mlp.w1.weight mlp.w1.bias mlp.w2.weight mlp.w2.bias mlp.ffn_ln.weight mlp.ffn_ln.bias mlp.w3.weight mlp.w3.bias
attn.rope.freqs_cos""".split()
EVA_CLIP_REST = """cls_token pos_embed patch_embed.proj.weight patch_embed.proj.bias norm.weight norm.bias head.weight
head.bias rope.freqs_cos rope.freqs_sin""".split()


@pytest.mark.parametrize("kind", ["visual.", ""])
def test_names_of_a_swiglu_tower_become_timms(kind):
    """timm has a conversion of its own for EVA-CLIP's files; they agree on every name."""
    from timm.models.eva import checkpoint_filter_fn

    names = [f"{kind}blocks.0.{n}" for n in EVA_CLIP_BLOCK] + [f"{kind}{n}" for n in EVA_CLIP_REST]
    with torch.device("meta"):
        tower = timm.create_model("eva02_base_patch16_clip_224")
    marks = {name: torch.zeros(1, 197, 768) + i for i, name in enumerate(names)}
    for name in names:
        if "patch_embed.proj.weight" in name:
            marks[name] = torch.zeros(768, 3, 16, 16) + names.index(name)
    theirs = {n: int(t.flatten()[0]) for n, t in checkpoint_filter_fn(marks, tower).items()}
    found = stream.to_open_clip(names, ["text.ln_final.weight"], "f")
    assert {n.removeprefix("visual.trunk."): names.index(source) for n, source in found.items()} == theirs
    assert set(names) - set(found.values()) == {name for name in names if "rope" in name}


def test_text_towers_at_the_root_and_below_text():
    names = [
        "visual.blocks.0.x",
        "token_embedding.weight",
        "transformer.resblocks.0.ln_1.weight",
        "text_projection",
    ]
    apart = stream.to_open_clip(names, ["text.text_projection"], "f")
    assert stream.kind_of(names) == stream.EVA_CLIP
    assert apart["text.transformer.resblocks.0.ln_1.weight"] == "transformer.resblocks.0.ln_1.weight"
    assert "text.text_projection" in apart
    assert "text_projection" in stream.to_open_clip(names, ["text_projection"], "f")
    with pytest.raises(CheckpointError, match="no vision tower that is known here .names like encoder.x"):
        stream.to_open_clip(["encoder.x"], [], "f")
    with pytest.raises(CheckpointError, match="would both be text.ln_final.bias"):
        stream.to_open_clip(["blocks.0.x", "ln_final.bias", "text.ln_final.bias"], ["text.x"], "f")
