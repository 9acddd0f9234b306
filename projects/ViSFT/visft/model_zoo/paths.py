"""`visft://FILE`: the weights that come with the package, wherever detectron2 or ViSFT takes a path."""

from pathlib import Path

from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler

from ..errors import CheckpointError

PREFIX = "visft://"
FOLDERS = (Path(__file__).parents[1] / "data" / "demo_world" / "weights",)


class VisftHandler(PathHandler):
    """Maps `visft://FILE` to a file of the package, as an ordinary local path."""

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs) -> str:
        """Raises CheckpointError where the package has no such file; it names those there are."""
        name = path[len(PREFIX) :]
        shipped = {file.name: file for folder in FOLDERS for file in folder.glob("*.safetensors")}
        if name not in shipped:
            raise CheckpointError(
                f"{path}: no such file comes with visft; it has {', '.join(PREFIX + n for n in sorted(shipped))}"
            )
        return str(shipped[name])

    def _isfile(self, path: str, **kwargs) -> bool:
        try:
            return Path(self._get_local_path(path)).is_file()
        except CheckpointError:
            return False

    def _exists(self, path: str, **kwargs) -> bool:
        return self._isfile(path)

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs):
        return open(self._get_local_path(path), mode, buffering=buffering)  # noqa: SIM115


def register() -> None:
    """Teach detectron2's PathManager the prefix; may be called again."""
    PathManager.register_handler(VisftHandler(), allow_override=True)
