#!/usr/bin/env python
"""Write the tuned tower of a run, or a base merged with a LoRA file, for open_clip and other libraries.

tools/export_backbone.py --weights RUN_FOLDER_OR_FILE --format open_clip --output PATH [--interpolate A ...]
    [--config-file F] [KEY VALUE ...]
"""

import sys

from _start import main

if __name__ == "__main__":
    sys.exit(main("export_backbone"))
