"""A base and LoRA as the pieces of a merged file; nothing is read before a piece's bytes are asked for."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from visft.checkpoint import authors
from visft.checkpoint.stream import Entry, TensorFile, as_bytes
from visft.errors import CheckpointError, ExportError
from visft.export.stream_write import Piece
from visft.modeling.backbone.blocks import projections
from visft.modeling.backbone.tower_adapters import adapt

_OURS = re.compile(r"(?:.*\.)?tower\.(?:.*\.)?(?:res)?blocks\.(\d+)\.lora\.(\w+)\.lora_([AB])")


@dataclass(frozen=True)
class Site:
    """Rows of a weight that one adapter updates; `weight` is open_clip's name."""

    weight: str
    start: int
    stop: int
    width: int


@dataclass(frozen=True)
class Factors:
    """The two matrices of one adapter: their names in the file and which rows of those tensors they are."""

    a: str
    a_rows: slice
    b: str
    b_rows: slice


def sites(visual: nn.Module) -> dict[tuple[int, str], Site]:
    """Where adapters act, by block and projection, of a vision tower of open_clip (it may be on `meta`)."""
    tower, found = adapt(visual), {}
    names = {id(module): name for name, module in visual.named_modules()}
    for i, block in enumerate(tower.blocks):
        for p in projections(block):
            width = block.get_parameter(p.weight)[0].numel()
            found[i, p.key] = Site(f"visual.{names[id(block)]}.{p.weight}", p.start, p.stop, width)
    return found


def is_lora_alone(names: Mapping[str, object]) -> bool:
    """Whether a file's names are LoRA's, heads' at most beside them; other weights of a tower are not."""
    adapters = [name for name in names if authors.is_lora_file([name]) or _OURS.fullmatch(name)]
    others = set(names) - set(adapters)
    return bool(adapters) and all(name.startswith(("heads.", authors.HEAD_PREFIX)) for name in others)


class LoraFile:
    """LoRA of ours or the authors', its matrices read when they are merged.

    Args:
        file: opened; stays open.
        where: what `sites` gives of the tower.
        alpha: of our files; the authors' have 1.
        architecture: for messages.

    Attributes:
        rank: of the adapters.
        scale: alpha / rank, the factor on B A.
        factors: by block and projection.

    Raises:
        CheckpointError: an adapter is incomplete, of a projection that the tower has not, or of another shape.
    """

    def __init__(
        self, file: TensorFile, where: Mapping[tuple[int, str], Site], alpha: float, architecture: str
    ):
        self.file, what = file, str(file.path)
        theirs = authors.is_lora_file(file.entries)
        shapes = {name: entry.shape for name, entry in file.entries.items()}
        self.factors = _authors_factors(shapes, what) if theirs else _our_factors(shapes, what)
        for place, factors in self.factors.items():
            if place not in where:
                raise CheckpointError(
                    f"{what}: {factors.a} is for `{place[1]}` of block {place[0]}, which {architecture} does not "
                    "have; name the tower that it was trained on in MODEL.CLIP_VIT.NAME."
                )
            self._check(factors, where[place], shapes, what, architecture)
        first = next(iter(self.factors.values()))
        self.rank = first.a_rows.stop - first.a_rows.start
        self.scale = (1.0 if theirs else alpha) / self.rank

    def _check(self, factors: Factors, site: Site, shapes: Mapping, what: str, architecture: str) -> None:
        rank = factors.a_rows.stop - factors.a_rows.start
        halves = len(range(*factors.b_rows.indices(shapes[factors.b][0])))
        if shapes[factors.a][1:] != (site.width,):
            raise CheckpointError(
                f"{what}: {factors.a} has shape {list(shapes[factors.a])}, {site.weight} of {architecture} takes "
                f"{site.width} inputs; name the tower that it was trained on in MODEL.CLIP_VIT.NAME."
            )
        if shapes[factors.b][1:] != (rank,) or halves != site.stop - site.start:
            raise CheckpointError(
                f"{what}: {factors.b} has shape {list(shapes[factors.b])}, which fits neither {factors.a} "
                f"{list(shapes[factors.a])} nor the {site.stop - site.start} rows of {site.weight} that it updates."
            )

    def delta(self, place: tuple[int, str]) -> Tensor:
        """The update `[out, in]` of one projection, float32: (alpha / rank) B A (arXiv:2106.09685)."""
        factors = self.factors[place]
        a = self.file.read(factors.a)[factors.a_rows].float()
        b = self.file.read(factors.b)[factors.b_rows].float()
        return self.scale * (b @ a)


def _authors_factors(shapes: Mapping[str, tuple[int, ...]], what: str) -> dict[tuple[int, str], Factors]:
    authors.check_lora(shapes, what)
    found = {}
    for block, (a, b) in authors.lora_names(shapes).items():
        rank, rows = shapes[a][0] // 2, shapes[b][0] // 2
        found[block, "q"] = Factors(a, slice(0, rank), b, slice(0, rows))
        found[block, "v"] = Factors(a, slice(rank, 2 * rank), b, slice(rows, 2 * rows))
    return found


def _our_factors(shapes: Mapping[str, tuple[int, ...]], what: str) -> dict[tuple[int, str], Factors]:
    names: dict[tuple[int, str], dict[str, str]] = {}
    for name in shapes:
        if found := _OURS.fullmatch(name):
            names.setdefault((int(found[1]), found[2]), {})[found[3]] = name
    factors = {}
    for place, pair in names.items():
        if len(pair) != 2:
            raise CheckpointError(
                f"{what}: has {next(iter(pair.values()))} without its other matrix; the file is incomplete."
            )
        a, b = pair["A"], pair["B"]
        factors[place] = Factors(a, slice(0, shapes[a][0]), b, slice(0, shapes[b][0]))
    return factors


def pieces(
    base: TensorFile,
    sources: Mapping[str, str],
    lora: LoraFile,
    where: Mapping[tuple[int, str], Site],
    *,
    expected: Mapping[str, tuple[int, ...]],
    amount: float = 1.0,
    rename: Callable[[str], str | None] = lambda name: name,
) -> list[Piece]:
    """The tensors of the merged file.

    What LoRA does not touch keeps the base's type and bytes. A weight that it does is computed and stored in float32:
    in 16 bits the update would be rounded away.

    Args:
        sources: the base's names by open_clip's.
        expected: shapes by open_clip's names.
        amount: a factor on the update: 1 tuned, 0 the base.
        rename: open_clip's name to the one in the new file; None: not in it.
    """
    updates: dict[str, list[tuple[int, str]]] = {}
    for place in lora.factors:
        updates.setdefault(where[place].weight, []).append(place)
    made = []
    for target, source in sources.items():
        name = rename(target)
        if name is None:
            continue
        entry = Entry(base.entries[source].dtype, tuple(expected[target]))
        if target in updates:
            entry = Entry(torch.float32, entry.shape)
            content = _merged(base, source, lora, [(p, where[p]) for p in updates[target]], amount)
        else:
            content = _copied(base, source)
        made.append(Piece(name, entry, content))
    return made


def _copied(base: TensorFile, source: str) -> Callable[[], Iterator[memoryview]]:
    return lambda: base.chunks(source)


def _merged(
    base: TensorFile, source: str, lora: LoraFile, at: list[tuple[tuple[int, str], Site]], amount: float
) -> Callable[[], Iterator[memoryview]]:
    def content() -> Iterator[memoryview]:
        weight = base.read(source).float()
        for place, site in at:
            rows = weight[site.start : site.stop].flatten(1)
            rows += amount * lora.delta(place)
            if not torch.isfinite(rows).all():
                raise ExportError(
                    f"{source} with the update of {lora.file.path} is not finite; nothing was exported."
                )
        yield memoryview(as_bytes(weight))

    return content
