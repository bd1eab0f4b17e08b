"""The one error a user can cause in the training room."""


class TrainingError(ValueError):
    """A training stage refused its input; the message names the thing, the value and the next step."""
