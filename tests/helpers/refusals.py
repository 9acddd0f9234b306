"""What is wrong is refused before anything is built: by `launch.prepare`, which the command line calls first."""

import pytest
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser

from visft.engine import launch
from visft.errors import VisftError


def prepare(arguments: list[str]) -> CfgNode:
    """The checked config of tools/train_net.py's arguments."""
    return launch.prepare(default_argument_parser().parse_args(arguments))


def refused(arguments: list[str], error: type[VisftError], *words: str) -> None:
    """The arguments are refused with this kind of error, whose one sentence has these words."""
    with pytest.raises(error) as caught:
        prepare(arguments)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "Traceback" not in message and "\n" not in message.strip(), message
