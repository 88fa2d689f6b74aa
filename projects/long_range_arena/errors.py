"""How data that are missing or unusable are reported."""

from condattn.openmmlab.errors import UserError


class DataError(UserError, ValueError):
    """Data are missing or not in the expected format; the message says what was expected and what to do."""


class MissingDataError(DataError, FileNotFoundError):
    """A file or folder is missing."""
