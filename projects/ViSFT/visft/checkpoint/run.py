"""Checkpoints of a stage: trained tensors and the trainer's state, safe against a kill at any point.

The files of a checkpoint (see `run_folder`) are written in order, each to a temporary file that is then renamed, and
`last_checkpoint` after them. Old checkpoints are removed in the opposite order. A kill in between leaves files without
their JSON, which do not count as a checkpoint.
"""

import json
import logging
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.utils import comm
from torch import Tensor, nn

from visft.checkpoint.files import (
    Lazy,
    map_tensors,
    read_metadata,
    read_tensors,
    remove_leftovers,
    sync_folder,
    write_aside,
    write_json,
    write_safetensors,
)
from visft.checkpoint.load import check_base, load_into
from visft.checkpoint.run_folder import (
    START,
    describe,
    describe_base,
    iteration_of,
    marks,
    newest_checkpoint,
    trainer_file,
)
from visft.checkpoint.shards import cut, is_piece, joined
from visft.errors import CheckpointError

logger = logging.getLogger(__name__)


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what a stage changes: parameters that require gradients, and persistent buffers of their modules."""
    owners = {n.rpartition(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    parameters = {n for n, p in model.named_parameters() if p.requires_grad}
    buffers = {n for n, _ in model.named_buffers() if n.rpartition(".")[0] in owners}
    return {n: t for n, t in model.state_dict().items() if n in parameters or n in buffers}


class RunCheckpointer:
    """Saves and resumes one stage in one folder. All processes call its methods; the main process writes.

    Args:
        folder: OUTPUT_DIR/heads or OUTPUT_DIR/lora.
        model: the model. Under DistributedDataParallel, the wrapped module.
        optimizer, scheduler, grad_scaler: objects with a `state_dict`. None: not used.
        stage: `heads` or `lora`.
        base: the tower's base (`CLIPViT.base`: name, pretrained, sha256), or None.
        settings: JSON values that explain the weights, such as LoRA's rank and alpha.
        record: the record of the run (`RunRecord.to_metadata`).
        keep: number of checkpoints to keep. 0: all.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: Any = None,
        grad_scaler: Any = None,
        *,
        stage: str,
        base: Any = None,
        settings: Mapping[str, Any] | None = None,
        record: Mapping[str, str] | None = None,
        keep: int = 2,
    ):
        self.folder = Path(folder)
        self.model, self.optimizer = model, optimizer
        self.parts = {"scheduler": scheduler, "grad_scaler": grad_scaler}
        self.stage, self.base, self.keep = stage, base, keep
        self.settings, self.record = dict(settings or {}), dict(record or {})
        self._current: int | None = None

    def save(self, iteration: int) -> Path:
        """Write the checkpoint after `iteration` completed iterations, and return its model file."""
        path = self.folder / f"model_{iteration:07d}.safetensors"
        generators = comm.gather(generator_state())
        if self._current != iteration:
            trainer: dict[str, Tensor] = {}
            # In this order: names in the file count from the first, and only the main process has generators.
            parts = {"optimizer": self.optimizer, **self.parts}
            state = {name: part.state_dict() for name, part in parts.items() if part is not None}
            tree = pack({**state, "generators": generators}, trainer)
            with (
                joined(self.folder, "model", trained_tensors(self.model)) as model_tensors,
                joined(self.folder, "trainer", trainer) as trainer_tensors,
            ):
                if comm.is_main_process():
                    self._write(path, iteration, model_tensors, trainer_tensors, tree)
        self._current = iteration
        comm.synchronize()
        return path

    def resume(self) -> int:
        """Load the newest whole checkpoint. Returns its number of completed iterations, 0 if there is none.

        Raises:
            CheckpointError: it is of another stage, tower or base, or does not fit the model.
        """
        if comm.is_main_process() and self.folder.is_dir():
            for name in remove_leftovers(self.folder):
                logger.info("removed %s, which a killed process left half-written", self.folder / name)
        comm.synchronize()
        path = newest_checkpoint(self.folder)
        if path is None:
            return 0
        about = describe(path)
        if about.get("stage") != self.stage:
            raise CheckpointError(
                f"{path}: is of stage `{about.get('stage')}`, stage `{self.stage}` was to be resumed; use "
                f"another OUTPUT_DIR."
            )
        check_base(path, self.base)
        load_into(
            self.model,
            self._read(path),
            what=str(path),
            names=trained_tensors(self.model),
            hint="Resume with the config that the run was started with.",
        )
        self._load_trainer(trainer_file(path))
        self._current = int(about["iteration"])
        logger.info("resumed stage `%s` after iteration %d from %s", self.stage, self._current, path)
        return self._current

    def set_aside(self) -> None:
        """Move an earlier run's checkpoints to `earlier-N` in the folder, so that nothing resumes from them."""
        if comm.is_main_process() and self.folder.is_dir():
            remove_leftovers(self.folder)
            patterns = ("last_checkpoint", "model_*.json", "model_*.safetensors", "trainer_*.safetensors")
            files = [file for pattern in patterns for file in sorted(self.folder.glob(pattern))]
            if files:
                number = 1 + max(
                    (int(n) for p in self.folder.glob("earlier-*") if (n := p.name[8:]).isdecimal()),
                    default=0,
                )
                target = self.folder / f"earlier-{number}"
                target.mkdir()
                for file in files:
                    file.rename(target / file.name)
                logger.info("moved the checkpoints of an earlier run to %s", target)
        comm.synchronize()

    def _write(
        self,
        path: Path,
        iteration: int,
        model_tensors: Mapping[str, Tensor | Lazy],
        trainer_tensors: Mapping[str, Tensor | Lazy],
        trainer_state: Any,
    ) -> None:
        mark, trainer = path.with_suffix(".json"), trainer_file(path)
        if mark.exists():
            # Half-way through being overwritten, the files must not look like the old checkpoint.
            mark.unlink()
            sync_folder(self.folder)
        about = _about(self.stage, iteration, self.base, self.settings)
        write_safetensors(trainer, trainer_tensors, {"state": json.dumps(trainer_state)})
        _write_model(path, model_tensors, about, self.record, beside=[trainer])
        with write_aside(self.folder / "last_checkpoint") as partial:
            partial.write_text(path.name)
        if self.keep:
            for old in [m for m in marks(self.folder) if iteration_of(m) <= iteration][self.keep :]:
                model_file = old.with_suffix(".safetensors")
                for file in (old, model_file, trainer_file(model_file)):
                    file.unlink(missing_ok=True)
        logger.info("saved %s", path)

    def _read(self, path: Path) -> dict[str, Tensor]:
        # Of tensors in pieces, a process reads its own.
        sharded = any(map(is_piece, self.model.parameters()))
        return map_tensors(path) if sharded else read_tensors(path)

    def _load_trainer(self, path: Path) -> None:
        state = unpack(json.loads(read_metadata(path)["state"]), self._read(path))
        try:
            if self.optimizer is not None:
                self.optimizer.load_state_dict(_in_pieces(state["optimizer"], self.optimizer))
            for name, part in self.parts.items():
                if part is not None:
                    part.load_state_dict(state[name])
        except (KeyError, ValueError) as error:
            raise CheckpointError(
                f"{path}: its optimizer state does not fit this run ({error}); resume with the config that "
                f"the run was "
                "started with."
            ) from error
        generators, rank = state["generators"], comm.get_rank()
        if comm.get_world_size() != len(generators):
            logger.warning(
                "%s: was written by %d processes, this run has %d: dropout will differ, and the last bits of sums",
                path,
                len(generators),
                comm.get_world_size(),
            )
        if rank < len(generators):
            set_generator_state(generators[rank])


def keep_start(
    folder: str | os.PathLike,
    tensors: Mapping[str, Tensor],
    *,
    base: Any,
    settings: Mapping[str, Any],
    record: Mapping[str, str],
) -> None:
    """Save what a run starts from and does not train. The main process calls this; further calls do nothing."""
    folder = Path(folder) / START
    if tensors and newest_checkpoint(folder) is None:
        path = folder / "model_0000000.safetensors"
        _write_model(path, tensors, _about(START, 0, base, settings), record)
        logger.info("saved %s: what the run starts from and does not train", path)


def _about(stage: str, iteration: int, base: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"stage": stage, "iteration": iteration, "base": describe_base(base), "settings": dict(settings)}


def _write_model(
    path: Path,
    tensors: Mapping[str, Tensor | Lazy],
    about: Mapping[str, Any],
    record: Mapping[str, str],
    beside: Sequence[Path] = (),
) -> None:
    """Write a model file, and then the JSON that makes it and the files `beside` it a whole checkpoint."""
    write_safetensors(path, tensors, {"format": "pt", "visft": json.dumps(about), **record})
    sizes = {file.name: file.stat().st_size for file in (path, *beside)}
    write_json(path.with_suffix(".json"), {**about, "files": sizes})


def _in_pieces(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state, with the momenta of parameters in pieces cut like these."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries = dict(state["state"])
    for index, entry in entries.items():
        if index < len(parameters) and is_piece(like := parameters[index]):
            entries[index] = {
                key: cut(value, like) if getattr(value, "shape", None) == like.shape else value
                for key, value in entry.items()
            }
    return {**state, "state": entries}


def generator_state() -> dict[str, Any]:
    """Return the state of this process's global random generators: Python, numpy, and torch on CPU and GPUs."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_generator_state(state: Mapping[str, Any]) -> None:
    """Restore what `generator_state` returned."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def pack(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """Turn nested containers into JSON; tensors go to `tensors` under a running name. `unpack` is the
    inverse.

    Raises:
        TypeError: an object is not a container, tensor, number, string, bool or None.
    """
    if isinstance(tree, Tensor):
        name = f"{len(tensors):06d}"
        tensors[name] = tree
        return {"tensor": name}
    if isinstance(tree, Mapping):
        return {"items": [[pack(key, tensors), pack(value, tensors)] for key, value in tree.items()]}
    if isinstance(tree, tuple):
        return {"tuple": [pack(value, tensors) for value in tree]}
    if isinstance(tree, list):
        return [pack(value, tensors) for value in tree]
    if isinstance(tree, np.generic):
        return tree.item()
    if tree is None or isinstance(tree, str | int | float):
        return tree
    raise TypeError(f"a {type(tree).__name__} cannot be saved in a checkpoint")


def unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `pack`."""
    if isinstance(tree, list):
        return [unpack(value, tensors) for value in tree]
    if isinstance(tree, dict):
        if "tensor" in tree:
            return tensors[tree["tensor"]]
        if "tuple" in tree:
            return tuple(unpack(value, tensors) for value in tree["tuple"])
        return {unpack(key, tensors): unpack(value, tensors) for key, value in tree["items"]}
    return tree
