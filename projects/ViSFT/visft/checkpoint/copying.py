"""Copying tensors into a module with an account of each: loaded, ignored (and why), missing, of another shape."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from visft.checkpoint.shards import is_piece, local, piece_of
from visft.errors import CheckpointError

logger = logging.getLogger(__name__)


@dataclass
class LoadReport:
    """What happened to each tensor of a file and of a module.

    Attributes:
        loaded: names in the module.
        ignored: names in the file, with the reason.
        missing: names in the module that the file lacks.
        wrong_shape: names in the module, with the shape found and the shape expected.
        fresh: names in the module that were to start anew.
    """

    loaded: list[str] = field(default_factory=list)
    ignored: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    wrong_shape: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    fresh: list[str] = field(default_factory=list)

    def log(self, what: str) -> None:
        """Log the report in a few lines."""
        logger.info("%s: loaded %d tensors%s", what, len(self.loaded), groups(self.loaded))
        self.log_ignored(what)
        if self.fresh:
            logger.info("%s: %d tensors start anew%s", what, len(self.fresh), groups(self.fresh))

    def log_ignored(self, what: str) -> None:
        """Log what was ignored, one line per reason."""
        for reason, count in Counter(self.ignored.values()).items():
            names = [name for name, why in self.ignored.items() if why == reason]
            logger.info("%s: ignored %d tensors (%s)%s", what, count, reason, groups(names))


def load_into(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    what: str,
    names: Iterable[str] | None = None,
    ignore: Mapping[str, str] | None = None,
    reinit: Sequence[str] = (),
    hint: str = "",
) -> LoadReport:
    """Copy tensors into a module's parameters and persistent buffers, and account for each.

    Nothing is changed unless everything fits. Values are cast to the type the module holds.

    Args:
        module: what is loaded into.
        tensors: by the module's names.
        what: file (and part) for messages.
        names: the module's names that the tensors must cover. None: all.
        ignore: prefixes of names in `tensors` to ignore, each with the reason for the report.
        reinit: names in the module that keep their fresh values when the shape differs.
        hint: what to do if it does not fit, for the error.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or has no place in the module.
    """
    state = module.state_dict(keep_vars=True)
    expected = list(state) if names is None else list(names)
    report, unknown = LoadReport(), []
    for name, tensor in tensors.items():
        reason = next((why for prefix, why in (ignore or {}).items() if name.startswith(prefix)), None)
        if reason is not None:
            report.ignored[name] = reason
        elif name not in state:
            unknown.append(name)
        elif tensor.shape == state[name].shape:
            report.loaded.append(name)
        elif name in reinit:
            report.ignored[name] = "another number of classes"
            report.fresh.append(name)
        else:
            report.wrong_shape[name] = (tuple(tensor.shape), tuple(state[name].shape))
    present = {*report.loaded, *report.wrong_shape, *report.fresh}
    report.missing = [name for name in expected if name not in present]

    faults = []
    if report.wrong_shape:
        shapes = [f"{n}: {list(f)}, expected {list(e)}" for n, (f, e) in report.wrong_shape.items()]
        faults.append(f"other shapes than the model's ({some(shapes, '; ')})")
    if report.missing:
        faults.append(f"lacks {len(report.missing)} of the model's tensors ({some(report.missing)})")
    if unknown:
        faults.append(f"has {len(unknown)} tensors that the model has no place for ({some(unknown)})")
    if faults:
        raise CheckpointError(
            f"{what} does not fit the model: {', '.join(faults)}.{' ' + hint if hint else ''}"
        )

    with torch.no_grad():
        for name in report.loaded:
            if is_piece(state[name]):
                local(state[name]).copy_(piece_of(tensors[name], state[name]))
            else:
                state[name].copy_(tensors[name])
    report.log(what)
    return report


def some(items: Sequence[str], separator: str = ", ", limit: int = 4) -> str:
    """Return the first of some names, and the number of others."""
    more = f"{separator}and {len(items) - limit} more" if len(items) > limit else ""
    return separator.join(items[:limit]) + more


def groups(names: Sequence[str]) -> str:
    """Count names by their first three parts: ` (heads.detection.transformer: 120, ...)`."""
    counts = Counter(".".join(name.split(".")[:-1][:3]) or name for name in names)
    return f" ({some([f'{group}: {count}' for group, count in counts.items()], limit=6)})" if names else ""
