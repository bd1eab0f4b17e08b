"""BatchNorm over the images of all processes: one implementation for CPUs (torch has none there) and GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from mecdeploy.training.world import World


class SynchronizedBatchNorm(TorchFunctionMode):
    """While active, every BatchNorm in training takes mean and variance over all processes; all take part.

    It catches the function that modules of any class call, so no module changes, and no name in a state dict.
    """

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Replace F.batch_norm, leave the rest alone."""
        if function is F.batch_norm:
            return _dispatch(self._world, *args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def _dispatch(
    world: World,
    input: Tensor,  # as F.batch_norm calls it
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    return batch_norm(input, running_mean, running_var, weight, bias, momentum=momentum, eps=eps, world=world)


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    momentum: float,
    eps: float,
    world: World,
) -> Tensor:
    """BatchNorm of x, [m, C, ...], whose statistics are those of all processes' x, of equal shapes; all take part.

    Updates the running statistics as torch does, with the unbiased variance. The gradient of x is that of the sum of
    all processes' losses; those of weight and bias are this process's part of it (a mean over processes makes both
    the gradients of the mean loss).
    """
    channels = x.shape[1]
    weight = x.new_ones(channels) if weight is None else weight
    bias = x.new_zeros(channels) if bias is None else bias
    y, mean, var = _BatchNorm.apply(x, weight, bias, eps, world)
    if running_mean is not None and running_var is not None:
        count = x.numel() // channels * world.size
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_(var.to(running_var.dtype) * (count / max(1, count - 1)), momentum)
    result: Tensor = y
    return result


class _BatchNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, world: World
    ) -> tuple[Tensor, Tensor, Tensor]:
        var, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
        moments = world.gather(torch.cat([mean, var])).view(world.size, 2, -1)
        # Chan et al. 1979, for parts of equal size: the variance of all is the mean variance and that of the means.
        mean = moments[:, 0].mean(0)
        var = (moments[:, 1] + (moments[:, 0] - mean).square()).mean(0)
        y = torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0]
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps, ctx.world = eps, world
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """With n values of a channel on all processes, dx = gain (dy - mean(dy) - x_hat mean(dy x_hat))."""
        x, weight, mean, var = ctx.saved_tensors
        world: World = ctx.world
        dy = grads[0]
        # As of an evaluation with these statistics: sums of dy x_hat and of dy, each in one pass.
        _, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, mean, var, None, None, False, ctx.eps, [False, True, True]
        )
        dx = None
        if ctx.needs_input_grad[0]:
            count = x.numel() // x.shape[1] * world.size
            mean_dy_xhat, mean_dy = (world.sum(torch.cat([dweight, dbias])) / count).chunk(2)
            deviation = torch.rsqrt(var + ctx.eps)
            gain = weight * deviation
            slope = -gain * deviation * mean_dy_xhat
            shape = (1, -1, *[1] * (x.dim() - 2))
            offset = (-gain * mean_dy - slope * mean).view(shape)
            dx = torch.addcmul(torch.addcmul(offset, x, slope.view(shape)), dy, gain.view(shape))
        return dx, dweight, dbias, None, None
