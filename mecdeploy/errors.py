"""The one error a user can cause at the front door."""


class UserError(ValueError):
    """A command refused its input; the message names the thing, the value and the next step."""
