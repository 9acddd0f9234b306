"""The errors of this package."""


class DemoWorldError(ValueError):
    """A package, a folder, a file or a setting is missing or broken; the message says which and what to do."""
