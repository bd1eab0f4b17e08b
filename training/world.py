"""The processes that train one run together. One process alone is a world too, in which every exchange is trivial.

So no caller asks how many there are. Imports torch only where there are several: what is refused is refused at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

from mecdeploy.training.launch import Launch, launched

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mecdeploy.training.data.order import Share

T = TypeVar("T")


class World:
    """One process alone; `distributed.Processes` is several. Whatever exchanges something has to be called by all."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.rank, self.size = launch.rank, launch.size

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.size == 1

    @property
    def main(self) -> bool:
        """Whether this is process 0, which writes, reports and decides."""
        return self.rank == 0

    @property
    def share(self) -> Share:
        """This process's part of every batch."""
        from mecdeploy.training.data.order import Share

        return Share(self.rank, self.size)

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum of every process's numbers, which are overwritten."""
        return numbers

    def gather(self, flat: Tensor) -> Tensor:
        """[n] of every process as [size, n], without gradients."""
        return flat[None]

    def any(self, flag: bool) -> bool:
        """Whether it is so on one process at least."""
        return flag

    def objects(self, mine: T) -> list[T]:
        """What each process has, by rank."""
        return [mine]

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make()` gives on process 0, everywhere. Where it raises there, the others raise PeerFailed."""
        return make()

    def everywhere(self, make: Callable[[], T]) -> T:
        """`make()` on each process; in it, none may speak to the others.

        Where it raises on some, the first of them raises its error and the others PeerFailed: one error, said once.
        """
        return make()

    def local_first(self, make: Callable[[], T]) -> T:
        """`make()` on one process of each machine, then on the others, which find there what it has left behind."""
        return make()

    def tensors_from_main(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Process 0's tensors by name, on the CPU, everywhere; the others have none of their own to give."""
        return dict(tensors)

    def same_buffers(self, network: nn.Module) -> None:
        """Give every process the buffers of process 0, such as its BatchNorm statistics."""

    def replicate(self, network: nn.Module) -> Replica:
        """The network as it is to be trained, after giving everybody the parameters and buffers of process 0."""
        return Replica(network, nullcontext)


class Replica:
    """A network whose gradients, after a backward pass, are the means over all processes.

    unaveraged: passes in this context add gradients up without averaging them.
    """

    def __init__(self, network: nn.Module, unaveraged: Callable[[], AbstractContextManager[None]]) -> None:
        self._network, self.unaveraged = network, unaveraged

    def __call__(self, *arguments: Any) -> Any:
        """What the network gives."""
        return self._network(*arguments)


ALONE = World(Launch())


@contextmanager
def joined() -> Iterator[World]:
    """The world that torchrun's environment describes, entered and left again; inside of itself, the same one.

    Raises TrainingError for an environment cut short.
    """
    launch = launched()
    if launch.size == 1:
        yield World(launch)
        return
    # Without it, DistributedDataParallel says that the order of sums could be given up for speed.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from mecdeploy.training.distributed import joined_processes

    with joined_processes(launch) as world:
        yield world
