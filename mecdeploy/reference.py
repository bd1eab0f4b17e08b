"""PyTorch's side of a comparison: what the trained model computes, as numpy arrays."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mecdeploy.training.model import QuantizedModel


class TorchReference:
    """A quantised model on the CPU in evaluation mode, as runtime_checks asks its witnesses to look.

    The model's own mode is put back after every call.
    """

    def __init__(self, model: QuantizedModel) -> None:
        self._model = model

    def integers(
        self, pixels: NDArray[np.uint8], given: Mapping[str, NDArray[Any]] = MappingProxyType({})
    ) -> Mapping[str, NDArray[Any]]:
        """Stored uint8 codes of every unit output, and the float32 logits, for uint8 images [n, C, H, W].

        given: codes of values that a float island makes, which later units read in place of their own.
        """
        return self._model.integers(torch.from_numpy(np.ascontiguousarray(pixels)), given)

    @torch.inference_mode()
    def logits(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """float32 [n, classes] for uint8 images [n, C, H, W]."""
        was_training = self._model.training
        try:
            logits: NDArray[np.float32] = self._model.eval()(torch.from_numpy(np.ascontiguousarray(pixels))).numpy()
        finally:
            self._model.train(was_training)
        return logits
