"""Where a file of the zoo is downloaded from: its address, a repository of the Hugging Face Hub, or a mirror."""

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import quote

from ..errors import CheckpointError, ConfigError
from .download import NotThere
from .entries import Entry

logger = logging.getLogger(__name__)

MIRROR = "VISFT_ZOO_MIRROR"
"""Environment variable: an address or folder with the zoo's files under their names, asked instead of all else."""


@dataclass(frozen=True)
class Source:
    """An address, what to send along, and what the server itself says of the file."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    sha256: str = ""
    bytes: int = 0


def locate(entry: Entry, file: str) -> Source:
    """Where `file`, one of `entry.files`, is to be had.

    Raises:
        NotThere: the Hub says that there is no such file.
        CheckpointError: the Hub does not give it to this user.
    """
    mirror = os.environ.get(MIRROR, "").rstrip("/")
    if mirror:
        return Source(f"{mirror}/{quote(file)}" if "://" in mirror else f"{mirror}/{file}")
    if entry.url:
        return Source(entry.url)
    return _on_hub(*hub_file(entry, file))


def hub_file(entry: Entry, file: str) -> tuple[str, str]:
    """Repository on the Hugging Face Hub, and the file's name there."""
    if not entry.open_clip:
        return entry.repository, entry.file
    from ..backbone.open_clip_zoo import open_clip

    name, tag = entry.open_clip
    address = (open_clip().get_pretrained_cfg(name, tag) or {}).get("hf_hub", "")
    repository, _, inner = address.rpartition("/")
    if not repository or inner:
        raise ConfigError(
            f"visft://{entry.name}: this open_clip does not say where on the Hub the tag {tag} of {name} lies; "
            "install a newer open_clip_torch."
        )
    kinds = {".safetensors": "open_clip_model.safetensors", ".bin": "open_clip_pytorch_model.bin"}
    return repository, kinds[os.path.splitext(file)[1]]


def _on_hub(repository: str, file: str) -> Source:
    """The Hub is asked for the file's SHA-256 and size first; a failure to answer is no obstacle, a refusal is."""
    import huggingface_hub as hub
    from huggingface_hub.utils import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

    url = hub.hf_hub_url(repository, file, endpoint=os.environ.get("HF_ENDPOINT") or None)
    token = hub.get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        about = hub.get_hf_file_metadata(url, token=token)
    except EntryNotFoundError as error:
        raise NotThere(f"{url}: the repository {repository} has no file {file}.") from error
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise CheckpointError(
            f"{url}: the Hub does not give {file} out (the repository {repository} is gone, private, or wants its "
            "terms accepted); look at it in a browser, and set HF_TOKEN to a token of an account that may read it."
        ) from error
    except Exception as error:  # of whatever HTTP library this version of the Hub's client uses
        logger.info("%s: no metadata (%s)", url, str(error).strip().split("\n")[0])
        return Source(url, headers)
    # The ETag of a large file is its SHA-256; that of a small one is git's, of another length.
    digest = about.etag if about.etag and re.fullmatch("[0-9a-f]{64}", about.etag) else ""
    return Source(url, headers, digest, about.size or 0)
