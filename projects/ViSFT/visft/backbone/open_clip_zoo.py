"""Models of open_clip by name, the demo tower `visft-tiny` among them; open_clip is imported when first needed."""

import difflib
import hashlib
import importlib
import importlib.util
import logging
import os
import sys
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import torch
from detectron2.utils.file_io import PathManager
from torch import nn

from ..errors import CheckpointError, ConfigError
from . import base_file, hugging_face_base

logger = logging.getLogger(__name__)

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


def register(open_clip: ModuleType) -> None:
    """Make an imported open_clip know `visft-tiny` and its tag `demo`, the shipped weights. May be called again."""
    from demoworld import tower

    tower.register(open_clip)


class _AfterImport:
    """Finds open_clip as everybody does, and registers `visft-tiny` once its module has run."""

    searching = False

    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        if fullname != "open_clip" or self.searching:
            return None
        self.searching = True  # the other finders are asked now, not this one again
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                register(module)

            spec.loader.exec_module = exec_module
        return spec


def install() -> None:
    """Let open_clip know `visft-tiny`: now, if it is imported already, else as soon as it is. May be called again."""
    if "open_clip" in sys.modules:
        register(sys.modules["open_clip"])
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def open_clip() -> ModuleType:
    """The module open_clip, imported now if need be, knowing `visft-tiny`."""
    module = importlib.import_module("open_clip")
    register(module)
    return module


@dataclass
class BaseTower:
    """What a tower's weights came from.

    Attributes:
        name: open_clip's name of the architecture.
        pretrained: tag or file; None for random weights.
        sha256: of the weight file; of the tower's tensors when they are random.
    """

    name: str
    pretrained: str | None
    sha256: str
    _clip: nn.Module | None = field(default=None, repr=False, compare=False)

    def clip(self) -> nn.Module:
        """The whole CLIP, for what an export copies beside the tower.

        Built anew from name and weights. Random weights cannot be: then it is the very model that the tower was taken
        from, whose `visual` is that tower.
        """
        return self._clip if self._clip is not None else create_clip(self.name, self.pretrained)[0]


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
    """Raise unless `pretrained` is a tag of this architecture, a file that can be had, or nothing.

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
    """The file of a base that is given by an address which detectron2's PathManager knows, as `visft://NAME`, or by a
    folder of a model of transformers.

    The former is downloaded if need be. A tag or another path is returned as it is.

    Raises:
        CheckpointError: it cannot be had.
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
    """The vision tower of an architecture without memory for its weights, to check names and shapes by.

    Raises:
        ConfigError: open_clip does not know the name.
    """
    check_name(name)
    from open_clip.model import _build_vision_tower

    config = open_clip().get_model_config(name)
    with torch.device("meta"):
        return _build_vision_tower(config["embed_dim"], config["vision_cfg"], config.get("quick_gelu", False))


def weight_file(name: str, pretrained: str) -> str:
    """The file of an architecture's weights: `pretrained` itself, or what is downloaded for that tag or address.

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


def meta_clip(name: str) -> nn.Module:
    """A whole CLIP of an architecture without memory for its weights, to check names and shapes by.

    Raises:
        ConfigError: open_clip does not know the name.
    """
    check_name(name)
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # open_clip warns that the weights are random; there are none
    try:
        with torch.device("meta"):
            return open_clip().create_model(name, load_weights=False, pretrained_text=False, device="meta")
    finally:
        logging.disable(level)


def create_clip(name: str, pretrained: str | None = None) -> tuple[nn.Module, BaseTower]:
    """A whole CLIP of open_clip, on the CPU in float32 and evaluation mode.

    Args:
        name: an architecture that open_clip knows. Where the tag's weights want QuickGELU and it has none, the one with
            `-quickgelu` in its name is taken, or, where open_clip has no such name, this one with QuickGELU.
        pretrained: a tag, a file (.safetensors, .pt; nothing is unpickled; also `visft://NAME`; what is seen through
            says `base_file.as_open_clip_reads`), a folder with a CLIP of transformers, or None for random weights.

    Raises:
        ConfigError: unknown name or tag.
        CheckpointError: the weights cannot be had, cannot be read, or are of another model.
    """
    check_name(name)
    check_pretrained(name, pretrained)
    module = open_clip()
    if not pretrained:
        clip = module.create_model(name, pretrained_text=False).eval()
        if hasattr(clip, "text_decoder"):
            # open_clip leaves CoCa's projection to words as the memory was: not the same for a seed, perhaps nan.
            projection = clip.text_decoder.text_projection
            nn.init.normal_(projection, std=projection.shape[0] ** -0.5)
        return clip, BaseTower(name, None, _sha256_tensors(clip.visual), clip)
    path = weight_file(name, pretrained)
    asked, (name, quick_gelu) = name, trained_name(name, pretrained)
    if quick_gelu:
        logger.warning(
            "the weights '%s' of %s want QuickGELU: the tower gets it. open_clip has no %s-quickgelu, so loading an "
            "export takes force_quick_gelu=True",
            pretrained,
            name,
            name,
        )
    elif name != asked:
        logger.info("the weights '%s' of %s want QuickGELU: the tower is %s", pretrained, asked, name)
    tag = module.get_pretrained_cfg(name, pretrained)
    try:
        if tag or path.endswith(".npz"):  # big_vision's, which open_clip knows by its suffix
            clip = _create(name, pretrained if tag else path, quick_gelu)
        else:
            expected = meta_clip(name).state_dict()
            with base_file.as_open_clip_reads(path, expected) as given:
                try:
                    clip = _create(name, given, quick_gelu)
                except RuntimeError as error:
                    reason = base_file.misfit(given, expected) or _first_line(error)
                    raise CheckpointError(
                        f"{path} cannot be loaded as a whole {name}: {reason}; give a whole CLIP of this architecture, "
                        "or name the file's in MODEL.CLIP_VIT.NAME."
                    ) from error
        base_file.require_finite(clip, path)
    except CheckpointError as error:
        raise CheckpointError(f"MODEL.CLIP_VIT.PRETRAINED: {error}") from error
    except Exception as error:
        raise CheckpointError(
            f"MODEL.CLIP_VIT.PRETRAINED: {path} cannot be loaded as a whole {name} ({_first_line(error)}); give a "
            "file of this architecture as open_clip writes it (.safetensors, or .pt with tensors alone)."
        ) from error
    return clip.eval(), BaseTower(name, pretrained, _sha256_file(path))


def trained_name(name: str, pretrained: str | None) -> tuple[str, bool]:
    """The architecture that weights were trained as, and whether QuickGELU must be forced on it.

    Weights do not tell the activation that they were trained with; loaded under the other one they are worse, silently.
    A tag tells it, or the `config.json` beside weights of transformers.

    Raises:
        CheckpointError: the weights want GELU, the architecture has QuickGELU.
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


def _create(name: str, weights: str, quick_gelu: bool) -> nn.Module:
    return open_clip().create_model(name, pretrained=weights, weights_only=True, force_quick_gelu=quick_gelu)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[:2])[:200]


def _sha256_file(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _sha256_tensors(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
