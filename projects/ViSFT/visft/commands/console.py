"""What the tools print."""

import logging


def plain() -> None:
    """Show what our packages log as bare lines on standard error; of others only their warnings.

    The level is not set for all: open_clip tells of every model that it builds, at the root, at INFO.
    """
    logging.basicConfig(format="%(message)s")
    for package in ("visft", "demoworld", "towerbench"):
        logging.getLogger(package).setLevel(logging.INFO)
