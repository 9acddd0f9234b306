"""CIDEr-D of captions, image by image, by pycocoevalcap."""

import contextlib
import io
from collections.abc import Mapping
from importlib.util import find_spec

from towerbench.caption_tokens import ptb_words


def missing() -> str | None:
    """Return the reason why captions cannot be scored. None: they can."""
    return None if find_spec("pycocoevalcap") else "needs pycocoevalcap (pip install 'visft[eval]')"


def cider_by_image(references: Mapping, candidates: Mapping) -> dict:
    """Return CIDEr-D of each image by id, not times 100. The figure is their mean; it can be above 1.

    Word frequencies are counted in these references.

    Args:
        references: a list of captions for each image id.
        candidates: the caption to score for each image id.
    """
    from pycocoevalcap.cider.cider import Cider

    truth = {key: [ptb_words(text) for text in texts] for key, texts in references.items()}
    said = {key: [ptb_words(candidates[key])] for key in truth}
    with contextlib.redirect_stdout(io.StringIO()):
        _, scores = Cider().compute_score(truth, said)
    return dict(zip(truth, map(float, scores), strict=True))
