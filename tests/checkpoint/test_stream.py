"""Weight files read by ranges and written piece by piece, against safetensors' and PyTorch's own readers."""

import os

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from visft.checkpoint import stream, stream_names
from visft.checkpoint.files import map_tensors
from visft.errors import CheckpointError, ExportError
from visft.export import stream_write


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
    }


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left, right)


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
    with stream.TensorFile(path) as file:
        assert {n: (e.dtype, e.shape) for n, e in file.entries.items()} == {
            n: (t.dtype, tuple(t.shape)) for n, t in expected.items()
        }
        for name, tensor in expected.items():
            assert same(file.read(name), tensor), name
            assert sum(map(len, file.chunks(name))) == tensor.numel() * tensor.element_size()


def pieces(content: dict[str, torch.Tensor]) -> list[stream_write.Piece]:
    def cut(tensor):
        data = memoryview(stream.as_bytes(tensor.contiguous()))
        return lambda: (data[i : i + 10] for i in range(0, len(data), 10))

    return [stream_write.Piece(n, stream.Entry(t.dtype, tuple(t.shape)), cut(t)) for n, t in content.items()]


def test_what_is_written_is_read_by_safetensors(tmp_path):
    path, expected = tmp_path / "f.safetensors", tensors()
    stream_write.write(path, pieces(expected), {"format": "pt"})
    found = load_file(path)
    assert found.keys() == expected.keys() and all(same(found[n], t) for n, t in expected.items())
    stream_write.verify(path, pieces(expected))
    mapped = map_tensors(path)  # each tensor lies at a multiple of its type's size
    assert all(tensor.data_ptr() % tensor.itemsize == 0 for tensor in mapped.values() if tensor.numel())


def test_one_wrong_bit_is_found(tmp_path):
    path, expected = tmp_path / "f.safetensors", tensors()
    stream_write.write(path, pieces(expected))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ExportError, match="reads back otherwise than written"):
        stream_write.verify(path, pieces(expected))
    path.write_bytes(data[:-1])
    with pytest.raises(ExportError, match="does not read back"):
        stream_write.verify(path, pieces(expected))
    del expected["ids"]
    stream_write.write(path, pieces(expected))
    with pytest.raises(ExportError, match="ids is there or missing"):
        stream_write.verify(path, pieces(tensors()))


def test_a_piece_of_another_length_is_no_file(tmp_path):
    piece = pieces({"x": torch.zeros(4)})[0]
    short = stream_write.Piece("x", stream.Entry(torch.float32, (5,)), piece.content)
    with pytest.raises(ExportError, match="16 bytes came of 20"):
        stream_write.write(tmp_path / "f.safetensors", [short])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_an_error_of_ours(tmp_path):
    (tmp_path / "f.safetensors").symlink_to("/dev/full")
    with pytest.raises(ExportError, match="cannot be written.*make space"):
        stream_write.write(tmp_path / "f.safetensors", pieces(tensors()))


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
@pytest.mark.parametrize("kind", ["f.safetensors", "f.pt"])
def test_files_that_were_cut_off(tmp_path, kind, keep):
    path = tmp_path / kind
    save_file(tensors(), path) if kind == "f.safetensors" else torch.save(tensors(), path)
    os.truncate(path, keep if keep >= 0 else path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="f\\.(pt|safetensors).*(fetch|expected)"):
        stream.TensorFile(path)


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
    found = stream_names.to_open_clip(names, ["text.ln_final.weight"], "f")
    ours = {n.removeprefix("visual.trunk."): names.index(source) for n, source in found.sources.items()}
    assert ours == theirs
    assert sorted(found.ignored) == sorted(n for n in names if "rope" in n)


def test_text_towers_at_the_root_and_below_text():
    names = [
        "visual.blocks.0.x",
        "token_embedding.weight",
        "transformer.resblocks.0.ln_1.weight",
        "text_projection",
    ]
    apart = stream_names.to_open_clip(names, ["text.text_projection"], "f")
    assert apart.kind == stream_names.EVA_CLIP
    assert apart.sources["text.transformer.resblocks.0.ln_1.weight"] == "transformer.resblocks.0.ln_1.weight"
    assert "text.text_projection" in apart.sources
    at_root = stream_names.to_open_clip(names, ["text_projection"], "f")
    assert "text_projection" in at_root.sources
    with pytest.raises(CheckpointError, match="no vision tower that is known here .names like encoder.x"):
        stream_names.to_open_clip(["encoder.x"], [], "f")
    with pytest.raises(CheckpointError, match="would both be text.ln_final.bias"):
        stream_names.to_open_clip(["blocks.0.x", "ln_final.bias", "text.ln_final.bias"], ["text.x"], "f")
