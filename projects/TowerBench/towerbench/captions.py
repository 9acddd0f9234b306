"""Captions scored by CIDEr-D, image by image, with pycocoevalcap's scorer."""

import contextlib
import io
from collections.abc import Mapping
from importlib.util import find_spec

from towerbench.caption_tokens import ptb_words


def missing() -> str | None:
    """Why captions cannot be scored; None: they can."""
    return None if find_spec("pycocoevalcap") else "needs pycocoevalcap (pip install 'visft[eval]')"


def cider_by_image(references: Mapping, candidates: Mapping) -> dict:
    """CIDEr-D of each image by its id, not times 100; their mean is the figure. It can be above 1.

    How rare words are is counted in these references.

    Args:
        references: the captions of each image, a list of texts by its id.
        candidates: what is scored, a text by id, of the same images.
    """
    from pycocoevalcap.cider.cider import Cider

    truth = {key: [ptb_words(text) for text in texts] for key, texts in references.items()}
    said = {key: [ptb_words(candidates[key])] for key in truth}
    with contextlib.redirect_stdout(io.StringIO()):
        _, scores = Cider().compute_score(truth, said)
    return dict(zip(truth, map(float, scores), strict=True))
