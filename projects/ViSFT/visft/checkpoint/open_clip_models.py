"""Models of open_clip by name: their weight files, and models built from them."""

import contextlib
import difflib
import hashlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from detectron2.utils.file_io import PathManager
from torch import nn

from visft.checkpoint import base_file, files, hugging_face_base, stream
from visft.checkpoint.open_clip_import import install, open_clip, register  # noqa: F401  (part of this module's interface)
from visft.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass
class BaseTower:
    """The origin of a tower's weights.

    Attributes:
        name: of the architecture in open_clip.
        pretrained: tag or file. None: random weights.
        sha256: of the weight file or, if weights are random, of the tower's tensors.
    """

    name: str
    pretrained: str | None
    sha256: str
    _clip: nn.Module | None = field(default=None, repr=False, compare=False)

    def clip(self, *, visual: bool = True) -> nn.Module:
        """Return the whole CLIP, whose other parts an export copies.

        It is built again from name and weights. With random weights, it is the original model, whose `visual` is this
        tower.

        Args:
            visual: False: `visual` is not read from the file (it is `nn.Identity`).
        """
        if self._clip is not None:
            return self._clip
        stored = StoredClip(self.name, self.pretrained)
        clip = stored.build()
        stored.load(clip, lambda name: visual or not name.startswith("visual."))
        if not visual:
            clip.visual = nn.Identity()
        return clip


class StoredClip:
    """A pretrained CLIP in its file. `build` and `load` keep in memory only what is asked for.

    Args:
        name: an architecture that open_clip knows. If the tag's weights need QuickGELU and it has none, the one with
            `-quickgelu` in its name is used or, if open_clip has none, this one with QuickGELU.
        pretrained: a tag, a file (.safetensors, .pt; nothing is unpickled; also `visft://NAME`; see
            `base_file.for_open_clip` for what is converted), or the folder of a CLIP in transformers.

    Raises:
        ConfigError: unknown name or tag.
        CheckpointError: the weights are not available, or need another activation than the architecture's.
    """

    def __init__(self, name: str, pretrained: str) -> None:
        check_name(name)
        self.path, self.pretrained = weight_file(name, pretrained), pretrained
        self.name, self._quick_gelu = trained_name(name, pretrained)
        if self._quick_gelu:
            logger.warning(
                "the weights '%s' of %s want QuickGELU: the tower gets it. open_clip has no %s-quickgelu, so loading "
                "an export takes force_quick_gelu=True",
                pretrained,
                name,
                name,
            )
        elif self.name != name:
            logger.info("the weights '%s' of %s want QuickGELU: the tower is %s", pretrained, name, self.name)

    def base(self) -> BaseTower:
        """Return the origin of the weights. Reads the file once, for its hash."""
        return BaseTower(self.name, self.pretrained, files.sha256(self.path))

    def build(self) -> nn.Module:
        """Build the model in float32 and evaluation mode, with parameters on `meta`; see `stream.build`.

        big_vision's .npz, which open_clip loads itself, is loaded here.

        Raises:
            CheckpointError: the .npz is of another model.
        """
        module = open_clip()
        if self._is_npz():
            with self._explained():
                return module.create_model(self.name, self.path, force_quick_gelu=self._quick_gelu).eval()
        described = meta_clip(self.name, self.pretrained, force_quick_gelu=self._quick_gelu)
        config = module.get_model_config(self.name) | ({"quick_gelu": True} if self._quick_gelu else {})
        return stream.build(described, config)

    def load(
        self,
        clip: nn.Module,
        wanted: Callable[[str], bool] = lambda name: True,
        device: torch.device | str = "cpu",
    ) -> None:
        """Read the wanted parameters of the model from `build`; see `stream.load`.

        Raises:
            CheckpointError: the file cannot be read, or is of another model.
        """
        if self._is_npz():
            return
        expected, tag = clip.state_dict(), open_clip().get_pretrained_cfg(self.name, self.pretrained)
        found: dict[str, torch.Tensor] = {}

        def seen(tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
            found.update(tensors if tag else base_file.for_open_clip(tensors, expected, self.path))
            return found

        with self._explained():
            try:
                stream.load(clip, self.path, self.name, seen=seen, wanted=wanted, device=device)
            except CheckpointError:  # this is a RuntimeError, too
                raise
            except RuntimeError as error:
                reason = base_file.misfit(found, expected) or _first_line(error)
                raise CheckpointError(
                    f"{self.path} cannot be loaded as a whole {self.name}: {reason}; give a whole CLIP of this "
                    "architecture, or name the file's in MODEL.CLIP_VIT.NAME."
                ) from error
            base_file.require_finite(clip, self.path)

    def _is_npz(self) -> bool:
        return self.path.endswith(".npz")

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except CheckpointError as error:
            raise CheckpointError(f"MODEL.CLIP_VIT.PRETRAINED: {error}") from error
        except Exception as error:
            raise CheckpointError(
                f"MODEL.CLIP_VIT.PRETRAINED: {self.path} cannot be loaded as a whole {self.name} "
                f"({_first_line(error)}); give a file of this architecture as open_clip writes it (.safetensors, or "
                ".pt with tensors alone)."
            ) from error


def check_name(name: str) -> None:
    """Raise ConfigError, with the nearest name, unless open_clip knows an architecture of this name."""
    names = open_clip().list_models()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
        raise ConfigError(
            f"MODEL.CLIP_VIT.NAME is '{name}', which open_clip does not know; the nearest name is '{near[0]}' "
            "(open_clip.list_models() has all)."
        )


def check_pretrained(name: str, pretrained: str | None) -> None:
    """Raise an error unless `pretrained` is a tag of this architecture, an available file, or empty.

    Raises:
        ConfigError: an unknown tag.
        CheckpointError: a file that is missing or empty, or cannot be downloaded (`visft://NAME`).
    """
    if not pretrained:
        return
    module = open_clip()
    if not module.get_pretrained_cfg(name, pretrained):
        tags = module.list_pretrained_tags_by_model(name)
        if not (
            os.sep in pretrained or pretrained.endswith((".pt", ".pth", ".bin", ".safetensors", ".ckpt"))
        ):
            if not os.path.isfile(pretrained):
                raise ConfigError(
                    f"MODEL.CLIP_VIT.PRETRAINED is '{pretrained}', neither a file nor a tag of {name}; its tags are: "
                    f"{', '.join(tags) or 'none'}."
                )
        if not os.path.isfile(local_file(pretrained)):
            raise CheckpointError(
                f"MODEL.CLIP_VIT.PRETRAINED: {pretrained} does not exist; give a weight file or a tag of {name} "
                f"({', '.join(tags) or 'none'})."
            )
        _refuse_empty(local_file(pretrained))


def local_file(pretrained: str) -> str:
    """Return the file of a base that is given by an address of detectron2's PathManager, such as `visft://NAME`, or by
    the folder of a model in transformers.

    The former is downloaded if necessary. A tag or another path is returned unchanged.

    Raises:
        CheckpointError: it is not available.
    """
    try:
        if "://" in pretrained:
            return PathManager.get_local_path(pretrained)
        if os.sep in pretrained and os.path.isdir(pretrained):
            return str(hugging_face_base.weights_in(Path(pretrained)))
        return pretrained
    except CheckpointError as error:
        raise CheckpointError(f"MODEL.CLIP_VIT.PRETRAINED: {error}") from error


def _refuse_empty(path: str) -> None:
    if os.path.getsize(path) == 0:
        raise CheckpointError(f"MODEL.CLIP_VIT.PRETRAINED: {path} is empty; download or copy it again.")


def meta_tower(name: str) -> nn.Module:
    """Build an architecture's vision tower on `meta`, to check names and shapes.

    Raises:
        ConfigError: open_clip does not know the name.
    """
    check_name(name)
    from open_clip.model import _build_vision_tower

    config = open_clip().get_model_config(name)
    with torch.device("meta"):
        return _build_vision_tower(config["embed_dim"], config["vision_cfg"], config.get("quick_gelu", False))


def weight_file(name: str, pretrained: str) -> str:
    """Return the file of an architecture's weights: `pretrained` itself, or the download of this tag or address.

    Raises:
        ConfigError: an unknown tag.
        CheckpointError: the file is missing or empty, or cannot be downloaded.
    """
    check_pretrained(name, pretrained)
    module = open_clip()
    tag = module.get_pretrained_cfg(name, pretrained)
    if not tag:
        return local_file(pretrained)
    try:
        path = module.download_pretrained(tag)
    except Exception as error:
        raise CheckpointError(
            f"MODEL.CLIP_VIT.PRETRAINED: the weights '{pretrained}' of {name} could not be downloaded "
            f"({_first_line(error)}); download them elsewhere and give the file."
        ) from error
    if not os.path.isfile(path):
        raise CheckpointError(
            f"MODEL.CLIP_VIT.PRETRAINED: '{pretrained}' of {name} should be at {path}, but is not."
        )
    _refuse_empty(path)
    return path


def meta_clip(name: str, pretrained: str | None = None, **options) -> nn.Module:
    """Build an architecture's whole CLIP on `meta`, to check names and shapes.

    Args:
        name: of the architecture.
        pretrained: a tag, from which it gets its preprocessing.
        options: further arguments of open_clip's `create_model`.

    Raises:
        ConfigError: open_clip does not know the name.
    """
    check_name(name)
    module, level = open_clip(), logging.root.manager.disable
    tag = pretrained if pretrained and module.get_pretrained_cfg(name, pretrained) else None
    options |= {"load_weights": False, "pretrained_text": False, "device": "meta"}
    logging.disable(logging.WARNING)  # open_clip warns that the weights are random, but there are none
    try:
        with torch.device("meta"), warnings.catch_warnings():
            # It warns about the activation, which `trained_name` takes care of.
            warnings.simplefilter("ignore", UserWarning)
            return module.create_model(name, pretrained=tag, **options)
    finally:
        logging.disable(level)


def create_clip(
    name: str, pretrained: str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, BaseTower]:
    """Build a whole CLIP of open_clip, on the CPU and in evaluation mode.

    Args:
        name: an architecture that open_clip knows; see `StoredClip`.
        pretrained: as in `StoredClip`, or None for random weights.
        dtype: of the parameters that are read.

    Raises:
        ConfigError: unknown name or tag.
        CheckpointError: the weights are not available, unreadable, or of another model.
    """
    if pretrained:
        stored = StoredClip(name, pretrained)
        clip = stored.build()
        for parameter in clip.parameters():
            parameter.data = parameter.data.to(dtype)
        stored.load(clip)
        return clip, stored.base()
    check_name(name)
    clip = open_clip().create_model(name, pretrained_text=False).eval()
    if hasattr(clip, "text_decoder"):
        # open_clip leaves CoCa's projection to words uninitialised: it differs for the same seed, and may be nan.
        projection = clip.text_decoder.text_projection
        nn.init.normal_(projection, std=projection.shape[0] ** -0.5)
    return clip, BaseTower(name, None, _sha256_tensors(clip.visual), clip)


def undrawn_clip(name: str, pretrained: str | None = None) -> tuple[nn.Module, BaseTower]:
    """A whole CLIP as `create_clip` makes it, in float32, but on `meta`: no weights are read, drawn or fetched.

    Args:
        name, pretrained: as `create_clip`'s.

    Raises:
        ConfigError: unknown name or tag.
    """
    name, quick_gelu = trained_name(name, pretrained)
    clip = meta_clip(name, force_quick_gelu=quick_gelu).eval()
    return clip, BaseTower(name, pretrained, "", clip)


def trained_name(name: str, pretrained: str | None) -> tuple[str, bool]:
    """Return the architecture that weights were trained with, and whether to force QuickGELU on it.

    Weights do not show the activation that they were trained with. With the other one they silently get worse. The tag
    says which it is, or the `config.json` beside weights of transformers.

    Raises:
        CheckpointError: the weights need GELU, but the architecture has QuickGELU.
    """
    module = open_clip()
    tag = module.get_pretrained_cfg(name, pretrained) if pretrained else None
    quick = (module.get_model_config(name) or {}).get("quick_gelu", False)
    if tag or not pretrained:
        wanted = "quick_gelu" if (tag or {}).get("quick_gelu") else ""
    else:
        wanted = hugging_face_base.activation_of(Path(local_file(pretrained)))
    if wanted == "gelu" and quick:
        raise CheckpointError(
            f"MODEL.CLIP_VIT.PRETRAINED: the config.json of {pretrained} says hidden_act gelu, and {name} has "
            f"QuickGELU; set MODEL.CLIP_VIT.NAME {name.removesuffix('-quickgelu')}"
        )
    if wanted != "quick_gelu" or quick:
        return name, False
    other = f"{name}-quickgelu"
    if other in module.list_models() and (not tag or module.get_pretrained_cfg(other, pretrained)):
        return other, False
    return name, True


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[:2])[:200]


def _sha256_tensors(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
