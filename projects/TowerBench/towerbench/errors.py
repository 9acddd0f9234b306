"""Errors for bad input. Each message names the option or file, what was found and what to do."""


class TowerBenchError(Exception):
    """Base class. Commands print its message and exit with 1."""


class ConfigError(TowerBenchError, ValueError):
    """An argument or name is unknown, contradictory or out of range."""


class DataError(TowerBenchError, ValueError):
    """A data set is missing, or an annotation or image in it is broken."""


class CheckpointError(TowerBenchError, RuntimeError):
    """A weight file or score file is missing, unreadable or of another model."""
