"""`python -m towerbench` (see `arguments`), with open_clip's towers and their own forward pass."""

import logging
import sys
from collections.abc import Sequence

from towerbench import arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    args = arguments.parse(argv, prog="python -m towerbench")
    from demoworld.errors import DemoWorldError
    from towerbench import command
    from towerbench.errors import TowerBenchError

    logging.basicConfig(format="%(message)s")
    logging.getLogger("towerbench").setLevel(
        logging.INFO
    )  # open_clip logs much about every model to the root logger
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
