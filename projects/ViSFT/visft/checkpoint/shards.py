"""Tensors in pieces, as `modeling.backbone.sharding` makes them, into whole files and back, without whole tensors.

Each process writes its pieces (`torch.distributed.checkpoint`, as safetensors). The main process then joins them, file
to file. So a checkpoint is the same whichever strategy and number of processes wrote it.
"""

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import safetensors
from detectron2.utils import comm
from torch import Tensor

from visft.checkpoint.files import PARTIAL_SUFFIX, Lazy


def is_piece(tensor: Tensor) -> bool:
    """Whether this process has only a part of a tensor."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, or the tensor if it is whole."""
    return tensor.to_local() if is_piece(tensor) else tensor


def piece_of(whole: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that this process has of `like`, which is cut along its first dimension."""
    mesh, count = like.device_mesh, like.device_mesh.size()
    parts = whole.chunk(count)
    rank = mesh.get_local_rank()
    return parts[rank] if rank < len(parts) else whole[:0]


def cut(whole: Tensor, like: Tensor) -> Tensor:
    """A whole tensor in pieces as those of `like`, which has its shape; in the type and on the device of `like`."""
    from torch.distributed.tensor import DTensor

    piece = piece_of(whole, like).to(local(like).device, like.dtype, copy=True)
    return DTensor.from_local(
        piece, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


@contextlib.contextmanager
def joined(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> Iterator[Mapping[str, Tensor | Lazy]]:
    """Within the block, the same tensors whole; those in pieces are read from files when their values are needed.

    All processes enter and leave it, and give the same names. Only the main process may read values of what it yields.

    Args:
        folder: for the files of the pieces, which are removed in the end. All processes have to see it.
        name: differs from that of other pieces in the folder.
    """
    pieces = {key: tensor for key, tensor in tensors.items() if is_piece(tensor)}
    if not pieces:
        yield tensors
        return
    aside = folder / f".{name}.pieces{PARTIAL_SUFFIX}"
    if comm.is_main_process():
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    comm.synchronize()
    try:
        storage = _storage()
        storage.save(
            pieces,
            storage_writer=storage.HuggingFaceStorageWriter(str(aside), save_distributed=True),
            process_group=comm._get_global_gloo_group(),
        )
        comm.synchronize()
        yield {**tensors, **(_read(aside) if comm.is_main_process() else {})}
        comm.synchronize()
    finally:
        if comm.is_main_process():
            shutil.rmtree(aside, ignore_errors=True)


def _storage():
    import torch.distributed.checkpoint

    return torch.distributed.checkpoint


def _read(folder: Path) -> dict[str, Lazy]:
    """The tensors of a folder of pieces, whole."""
    about = _storage().HuggingFaceStorageReader(str(folder)).read_metadata()
    found = {}
    for name, tensor in about.state_dict_metadata.items():
        places = {i.offset: i for i in about.storage_data if i.fqn == name}
        files = [about.storage_data[places[offset]].relative_path for offset in sorted(places)]

        def parts(files: list[str] = files, name: str = name) -> Iterator[Tensor]:
            for file in files:
                with safetensors.safe_open(file, framework="pt") as opened:
                    yield opened.get_tensor(name).view(-1)

        found[name] = Lazy(tensor.properties.dtype, tuple(tensor.size), parts)
    return found
