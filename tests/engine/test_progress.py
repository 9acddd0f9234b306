"""What a training shows in a terminal, in a pipe, and in its log file."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

TRAINING = """
import sys
import visft
from detectron2.utils.logger import setup_logger
sys.path[:0] = [{tests!r}]
from test_trainer import Model, batches, trainer_of
from visft.errors import TrainingError
logger = setup_logger({folder!r}, name="visft")
model = Model()
model.register_forward_pre_hook(lambda module, inputs: logger.info("a line of the log"))
trainer_of(model, batches()).train(2, 6)
try:
    trainer_of(model, batches(broken=1)).train(0, 6)
except TrainingError as error:
    print(error)
"""
LINES = 4 + 2


def shown(code: str, *, terminal: bool) -> str:
    """What a process shows whose two outputs are one terminal, or one pipe."""
    if not terminal:
        command = [sys.executable, "-c", code]
        return subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
        ).stdout
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=theirs, stderr=theirs)
    os.close(theirs)
    found = b""
    try:
        while chunk := os.read(ours, 4096):
            found += chunk
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(ours)
    assert process.wait() == 0, found
    return found.decode()


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_in_a_terminal_and_lines_alone_elsewhere(terminal, tmp_path):
    code = TRAINING.format(tests=os.path.dirname(__file__), folder=str(tmp_path))
    text, log = shown(code, terminal=terminal), (tmp_path / "log.txt").read_text()
    assert ("stage heads:" in text and "2/6" in text and "█" in text) == terminal
    assert text.count("a line of the log") == log.count("a line of the log") == LINES
    assert "\r" not in log and "█" not in log
    # In a terminal, what is left of a line is what stands after its last return: the bar before it is wiped.
    left = [line.rstrip("\r").rpartition("\r")[2] for line in text.rstrip().split("\n")]
    assert not any("stage heads:" in line for line in left)
    assert left[-1].startswith("stage heads, iteration 1: the loss")
