"""The exports' earlier place: `visft.checkpoint.export` is `visft.export`."""

import sys

from visft import export

sys.modules[__name__] = export
