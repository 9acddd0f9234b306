"""Ctrl-C: one sentence, and how to go on only where there is something to go on with."""

import pytest

from visft.utils import cli


@pytest.mark.parametrize(
    ("again", "said"),
    [
        ("", "error: stopped from the keyboard\n"),
        (cli.RESUME, "error: stopped from the keyboard (a training goes on with --resume)\n"),
    ],
)
def test_stopped_from_the_keyboard(again, said, capsys):
    def interrupted():
        raise KeyboardInterrupt

    assert cli.guard(interrupted, again=again) == 130
    assert capsys.readouterr().err == said
