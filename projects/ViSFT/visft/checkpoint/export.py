"""The earlier name of `visft.export`."""

import sys

from visft import export

sys.modules[__name__] = export
