"""`python -m towerbench`: see `arguments`. The towers are open_clip's, and so is their forward pass."""

import logging
import sys
from collections.abc import Sequence

from towerbench import arguments


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    args = arguments.parse(argv, prog="python -m towerbench")
    from demoworld.errors import DemoWorldError
    from towerbench import command
    from towerbench.errors import TowerBenchError

    logging.basicConfig(format="%(message)s")
    logging.getLogger("towerbench").setLevel(logging.INFO)  # open_clip tells much of every model, at the root
    try:
        command.run(args)
    except (TowerBenchError, DemoWorldError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped from the keyboard (the same command continues)", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
