"""What stops the training room: the one error a user can cause, and another process's."""


class TrainingError(ValueError):
    """A training stage refused its input; the message names the thing, the value and the next step."""


class PeerFailed(Exception):
    """Another process of the job stopped with an error of its own, which it reports itself."""

    def __init__(self, rank: int) -> None:
        super().__init__(f"process {rank} has stopped with an error")
        self.rank = rank
