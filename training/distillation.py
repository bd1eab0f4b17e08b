"""The full-precision network of a run as the teacher of its quantised one."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mecdeploy.training.device import channels_last
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.input_spec import InputSpec


@dataclass(frozen=True, kw_only=True)
class Taught:
    """What a teacher makes of images. logits: [m, classes]. features: [m, d], where they were asked for."""

    logits: Tensor
    features: Tensor | None = None


class Teacher:
    """A frozen copy of a full-precision network, in evaluation mode.

    spec: how it reads pixels. features: whether to return what its last Linear reads; TrainingError without a Linear.
    """

    def __init__(self, network: nn.Module, spec: InputSpec, *, device: torch.device, features: bool) -> None:
        self._network = copy.deepcopy(network).eval().requires_grad_(False)
        self._spec, self._device = spec, device
        self._kept: list[Tensor] | None = None
        if features:
            self._kept = kept = []
            last_linear(self._network).register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Taught:
        """One pass over uint8 [m, C, H, W]; nothing in it has a gradient."""
        if self._kept is None:
            return Taught(logits=self._logits(pixels))
        self._kept.clear()
        logits = self._logits(pixels)
        return Taught(logits=logits, features=self._kept.pop().flatten(1))

    def answers(self, pixels: Tensor) -> Tensor:
        """The class that it gives to each image: int64 [m]."""
        return self(pixels).logits.argmax(1)

    def _logits(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self._network(self._spec.normalize(channels_last(pixels, self._device)))
        return logits


def last_linear(network: nn.Module) -> nn.Linear:
    """What reads the features that mec.views "teacher" codes. Raises TrainingError where there is none."""
    linears = [module for module in network.modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise TrainingError("mec.views is teacher, but the model has no Linear whose input could be coded; use one.")
    return linears[-1]


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) in nats, the mean over images: [].

    student, teacher: logits [m, classes]. By T^2 the gradient, T (q - p) / m with q the student's and p the teacher's
    probabilities, keeps its size: large T approach half the mean squared difference of the centred logits.
    Source: Hinton et al. 2015 (arXiv:1503.02531), sec. 2; KL differs from their cross entropy by a constant.
    """
    targets = F.log_softmax(teacher / temperature, dim=1)
    scores = F.log_softmax(student / temperature, dim=1)
    return temperature**2 * F.kl_div(scores, targets, reduction="batchmean", log_target=True)
