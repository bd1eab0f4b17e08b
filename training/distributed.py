"""Several processes, over torch.distributed: NCCL between GPUs, gloo between CPUs and for what is no tensor."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mecdeploy.training.errors import PeerFailed
from mecdeploy.training.launch import Launch
from mecdeploy.training.world import Replica, World

LONGEST_WAIT = timedelta(hours=1)
"""For another process, which may be reading or downloading a data set for all of its machine."""

T = TypeVar("T")


class Processes(World):
    """See World: this process among those of its job, in torch.distributed's default group."""

    def sum(self, numbers: Tensor) -> Tensor:
        """All-reduce."""
        dist.all_reduce(numbers)
        return numbers

    def gather(self, flat: Tensor) -> Tensor:
        """All-gather."""
        gathered = flat.new_empty(self.size * flat.numel())
        dist.all_gather_into_tensor(gathered, flat.contiguous())
        return gathered.view(self.size, -1)

    def any(self, flag: bool) -> bool:
        """One number over gloo."""
        return bool(self.sum(torch.tensor(int(flag))))

    def objects(self, mine: T) -> list[T]:
        """All-gather of pickles, between processes of one job only."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, mine)
        return found

    def from_main(self, make: Callable[[], T]) -> T:
        """Broadcast, also of the fact that there is nothing to broadcast."""
        box: list[Any] = [False, None]
        try:
            if self.main:
                box = [True, make()]
        finally:
            dist.broadcast_object_list(box, src=0)
        if not box[0]:
            raise PeerFailed(0)
        made: T = box[1]
        return made

    def everywhere(self, make: Callable[[], T]) -> T:
        """Who failed is agreed on afterwards."""
        made: list[T] = []
        error: Exception | None = None
        try:
            made.append(make())
        except Exception as raised:
            error = raised
        failed = [rank for rank, bad in enumerate(self.objects(error is not None)) if bad]
        if not failed:
            return made[0]
        if error is not None and failed[0] == self.rank:
            raise error
        raise PeerFailed(failed[0])

    def local_first(self, make: Callable[[], T]) -> T:
        """In two turns."""
        made: list[T] = []
        for turn in (True, False):
            if turn == (self.launch.local_rank == 0):
                made.append(self.everywhere(make))
            else:
                self.everywhere(lambda: None)
        return made[0]

    def tensors_from_main(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Broadcast one by one, so that no process holds them twice."""
        described = self.from_main(lambda: [(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()])
        if not self.main:
            tensors = {name: torch.empty(shape, dtype=dtype) for name, shape, dtype in described}
        for tensor in tensors.values():
            dist.broadcast(tensor, src=0)
        return dict(tensors)

    def same_buffers(self, network: nn.Module) -> None:
        """Broadcast."""
        for buffer in network.buffers():
            dist.broadcast(buffer, src=0)

    def replicate(self, network: nn.Module) -> Replica:
        """DistributedDataParallel, which begins with a broadcast.

        Which parameters a step uses is found anew each time. That keeps the gradients in the buckets that they are in
        at the first step, so that the sums of a resumed run are taken in the same order.
        """
        wrapped = DistributedDataParallel(network, find_unused_parameters=True)
        wrapped.broadcast_buffers = False  # in each forward pass; as an argument, it would leave out the first time too
        return Replica(wrapped, wrapped.no_sync)


_joined: Processes | None = None
_stores: list[Any] = []
"""Where the processes find each other, once for each time that they have joined; the first is that of the job."""


def has_joined() -> bool:
    """Whether this process has ever been one of several."""
    return bool(_stores)


@contextmanager
def joined_processes(launch: Launch) -> Iterator[World]:
    """The world of this launch; inside of itself, the same one. See world.joined."""
    global _joined
    if _joined is not None:
        yield _joined
        return
    on_gpus = torch.cuda.is_available() and dist.is_nccl_available()
    if on_gpus and launch.local_rank < torch.cuda.device_count():
        torch.cuda.set_device(launch.local_rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpus else "gloo",
        store=_next_store(launch),
        rank=launch.rank,
        world_size=launch.size,
        timeout=LONGEST_WAIT,
    )
    _joined = Processes(launch)
    try:
        with warnings.catch_warnings():
            # A 1x1 convolution's layout has two spellings; copying a gradient from one to the other is no loss.
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            yield _joined
    except BaseException:
        if not on_gpus:  # NCCL would wait for the others, which may wait for this one
            dist.destroy_process_group()
        raise
    else:
        dist.destroy_process_group()
    finally:
        _joined = None


def _next_store(launch: Launch) -> Any:
    """A place of its own in the job's store.

    Who joins again, in this process or after a restart by torchrun, would else find the addresses of the last time.
    """
    if not _stores:
        _stores.append(next(dist.rendezvous("env://"))[0])  # type: ignore[attr-defined]
    prefix = f"mecdeploy-{launch.restarts}-{len(_stores)}"
    _stores.append(dist.PrefixStore(prefix, _stores[0]))  # type: ignore[attr-defined]
    return _stores[-1]
