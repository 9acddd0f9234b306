"""Starts a command of `visft.commands`, which reads its arguments before torch and detectron2 are imported.

`import visft` imports both, which takes seconds. So this module first finds the package without running it, which
allows importing its light modules. The package itself runs after the arguments are read.
"""

import importlib.util
import sys


def main(name: str) -> int:
    """Run the command `name` with this process's arguments and return the exit status."""
    waiting = None
    if "visft" not in sys.modules:
        waiting = importlib.util.find_spec("visft")
        sys.modules["visft"] = importlib.util.module_from_spec(waiting)
    command = importlib.import_module(f"visft.commands.{name}")
    arguments = command.parse()
    if waiting and not getattr(command, "ALONE", False):
        waiting.loader.exec_module(sys.modules["visft"])
    return command.run(arguments)
