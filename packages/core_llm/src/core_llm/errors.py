"""Errors that a user can mend. Command lines show them as one line and exit with status 2."""


class UserError(Exception):
    """A mistake in what the user or the environment gave; the message says what to do."""


class MediaError(UserError):
    """An image or audio file that cannot be decoded."""


class CheckpointError(UserError):
    """A checkpoint that is missing, truncated, or does not fit the model."""


class DataError(UserError):
    """A dataset that is missing or malformed."""
