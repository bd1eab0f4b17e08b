"""BatchNorm in training, over the images of one process or of all of them: one implementation for CPUs and GPUs.

torch's own SyncBatchNorm needs a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from mecdeploy.training.world import World

Running = tuple[Tensor | None, Tensor | None]
"""Running mean and variance [C], which the forward pass updates."""

Three = tuple[Tensor, Tensor, Tensor]


class BatchMoments:
    """Mean and variance of this process's images: torch's own BatchNorm, in two passes that autograd does not see."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor, running: Running, momentum: float, eps: float) -> Three:
        """BatchNorm of x [m, C, ...], its mean [C] and inverse deviation [C]."""
        found: Three = torch.native_batch_norm(x, weight, bias, *running, True, momentum, eps)
        return found

    def backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse_deviation: Tensor, eps: float
    ) -> Three:
        """Gradients of x, weight and bias."""
        found: Three = torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, None, None, mean, inverse_deviation, True, eps, [True, True, True]
        )
        return found


class SharedMoments(BatchMoments):
    """Those of all processes' images, of which each has as many; all take part.

    The gradient of x is that of the sum of all processes' losses, those of weight and bias are this process's part of
    it: a mean over the processes makes both the gradients of the mean loss.
    """

    def __init__(self, world: World) -> None:
        self._world = world

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor, running: Running, momentum: float, eps: float) -> Three:
        """One exchange of 2 C numbers; the running variance is the unbiased one, as torch's is."""
        var, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
        moments = self._world.gather(torch.cat([mean, var])).view(self._world.size, 2, -1)
        # Chan et al. 1979, for parts of equal size: the variance of all is the mean variance and that of the means.
        mean = moments[:, 0].mean(0)
        var = (moments[:, 1] + (moments[:, 0] - mean).square()).mean(0)
        if running[0] is not None and running[1] is not None:
            count = self._count(x)
            running[0].lerp_(mean, momentum)
            running[1].lerp_(var * (count / max(1, count - 1)), momentum)
        y = torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0]
        return y, mean, torch.rsqrt(var + eps)

    def backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse_deviation: Tensor, eps: float
    ) -> Three:
        """With x_hat normalised, dx = gain (dy - mean(dy) - x_hat mean(dy x_hat)); one exchange of 2 C numbers."""
        _, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, None, None, mean, inverse_deviation, True, eps, [False, True, True]
        )
        mean_dy_xhat, mean_dy = (self._world.sum(torch.cat([dweight, dbias])) / self._count(x)).chunk(2)
        gain = weight * inverse_deviation
        slope = -gain * inverse_deviation * mean_dy_xhat
        shape = (1, -1, *[1] * (x.dim() - 2))
        offset = (-gain * mean_dy - slope * mean).view(shape)
        return (
            torch.addcmul(torch.addcmul(offset, x, slope.view(shape)), dy, gain.view(shape)),
            dweight,
            dbias,
        )

    def _count(self, x: Tensor) -> int:
        """Values of a channel on all processes."""
        return x.numel() // x.shape[1] * self._world.size


_active = BatchMoments()


def batch_moments() -> BatchMoments:
    """Those in force: a forward pass takes its backward pass's along."""
    return _active


class SynchronizedBatchNorm(TorchFunctionMode):
    """While active, every BatchNorm in training takes its moments over all processes; all take part.

    Quantised units ask for `batch_moments`. Of the float network's modules, it catches the function that they call,
    whatever their class, so that no module changes, and no name in a state dict.
    """

    def __init__(self, world: World) -> None:
        super().__init__()
        self._shared = SharedMoments(world)

    def __enter__(self) -> SynchronizedBatchNorm:
        global _active
        self._before, _active = _active, self._shared
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        global _active
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        _active = self._before

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Replace F.batch_norm, leave the rest alone."""
        if function is F.batch_norm:
            return _batch_norm(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def _batch_norm(
    input: Tensor,  # named as F.batch_norm names its parameters
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training:
        evaluated: Tensor = F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
        return evaluated
    weight = input.new_ones(input.shape[1]) if weight is None else weight
    bias = input.new_zeros(input.shape[1]) if bias is None else bias
    y: Tensor = _BatchNorm.apply(input, weight, bias, (running_mean, running_var), momentum, eps)
    return y


class _BatchNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, running: Running, momentum: float, eps: float
    ) -> Tensor:
        moments = batch_moments()
        y, mean, inverse_deviation = moments.forward(x, weight, bias, running, momentum, eps)
        ctx.moments, ctx.eps = moments, eps
        ctx.save_for_backward(x, weight, mean, inverse_deviation)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.moments.backward(grads[0], *ctx.saved_tensors, ctx.eps), None, None, None
