#!/usr/bin/env python
"""Write the tuned tower of a run, or a base with a LoRA file merged, for open_clip and others.

tools/export_backbone.py --weights RUN_FOLDER_OR_FILE --format open_clip --output PATH [--interpolate A ...]
    [--config-file F] [KEY VALUE ...]
"""

import sys

from _start import main

if __name__ == "__main__":
    sys.exit(main("export_backbone"))
