"""Errors a caller can catch. Each message names the file or key, what was found, what was expected and what to do."""

import difflib
from collections.abc import Iterable


class VisftError(Exception):
    """Base of all errors that ViSFT raises on bad input. Command-line tools print the message and exit with 1."""


class ConfigError(VisftError, ValueError):
    """A config key or name is unknown, contradictory or out of range."""


class DataError(VisftError, ValueError):
    """A data set is missing, or one of its annotations or images is broken."""


class CheckpointError(VisftError, RuntimeError):
    """A weight file is missing, unreadable, unsafe, or does not fit the model."""


class ExportError(VisftError, RuntimeError):
    """An export cannot be written in the requested format, or its reader disagrees with the model."""


class TrainingError(VisftError, RuntimeError):
    """Training cannot continue, for example because a loss is not finite."""


class Stopped(KeyboardInterrupt):
    """A signal stopped the run. The message says how far the run got.

    Like Ctrl-C, this is not an `Exception`, so that code that survives errors does not survive a signal.

    Attributes:
        status: exit status of a process that a signal ends, such as 143 for SIGTERM.
    """

    def __init__(self, signal: int, message: str = "") -> None:
        super().__init__(message)
        self.status = 128 + signal


def nearest(name: str, known: Iterable[str]) -> str:
    """The entry of `known` that looks most like `name`, or "" where there is none."""
    folded = {entry.lower(): entry for entry in known}
    match = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.0)
    return folded[match[0]] if match else ""


def unknown(what: str, name: str, known: Iterable[str]) -> ConfigError:
    """The error for a name that is not in `known`; it suggests the nearest one."""
    known = sorted(known)
    hint = f"; the nearest is `{nearest(name, known)}`" if known else ""
    choice = f" (known: {', '.join(known)})" if len(known) <= 12 else ""
    return ConfigError(f"{what}: `{name}` is unknown{hint}{choice}")


def check_one_of(key: str, value: str, known: Iterable[str]) -> None:
    """Check that a key's value is one of `known`.

    Raises:
        ConfigError: it is not.
    """
    if value not in known:
        raise unknown(key, value, filter(None, known))
