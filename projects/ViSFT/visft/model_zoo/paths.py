"""`visft://NAME`: the zoo's weights as a path for detectron2 and ViSFT."""

from typing import IO, Any

from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler

from visft.errors import CheckpointError, ConfigError
from visft.model_zoo import entries

PREFIX = "visft://"


class VisftHandler(PathHandler):
    """Maps `visft://NAME` (or its file name) to a local file, downloaded when it is first opened."""

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _entry(self, path: str) -> entries.Entry:
        """Raises CheckpointError: the zoo has no such file."""
        try:
            return entries.find(path.removeprefix(PREFIX))
        except ConfigError as error:
            raise CheckpointError(f"{path}: {error}.") from error

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        """Raises CheckpointError: it cannot be downloaded, or has another SHA-256."""
        from visft.model_zoo import cache

        return str(cache.fetch(self._entry(path), again=force))

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        """Whether the zoo has it; nothing is downloaded."""
        try:
            self._entry(path)
        except CheckpointError:
            return False
        return True

    def _exists(self, path: str, **kwargs: Any) -> bool:
        return self._isfile(path)

    def _isdir(self, path: str, **kwargs: Any) -> bool:
        return False

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[Any]:
        if set(mode) & set("wax+"):
            raise CheckpointError(f"{path}: is opened with mode `{mode}`; files of the zoo can only be read.")
        return open(self._get_local_path(path), mode, buffering=buffering)


def register() -> None:
    """Register the prefix with detectron2's PathManager; may be called again."""
    PathManager.register_handler(VisftHandler(), allow_override=True)
