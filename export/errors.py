"""The one error a user can cause in the export room."""


class ExportError(ValueError):
    """The export refused a graph or an option; the message names the thing, the value and the next step."""
