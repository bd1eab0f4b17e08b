"""The one error a user can cause in this room."""


class CheckError(ValueError):
    """A model file that cannot be checked; the message names the file or node, what is wrong and the next step."""
