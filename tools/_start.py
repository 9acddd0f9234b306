"""Starts a command of `visft.commands` that reads its arguments before torch and detectron2 are imported.

`import visft` registers in detectron2's registries and so imports both, for seconds. Here the package is only found at
first, so that its light modules can be imported; its own code runs once the arguments are read.
"""

import importlib.util
import sys


def main(name: str) -> int:
    """Run the command `name` on this process's arguments; returns the exit status."""
    waiting = None
    if "visft" not in sys.modules:
        waiting = importlib.util.find_spec("visft")
        sys.modules["visft"] = importlib.util.module_from_spec(waiting)
    command = importlib.import_module(f"visft.commands.{name}")
    arguments = command.parse()
    if waiting and not getattr(command, "ALONE", False):
        waiting.loader.exec_module(sys.modules["visft"])
    return command.run(arguments)
