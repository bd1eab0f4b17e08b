"""PyTorch's side of a comparison: what the trained model computes, as numpy arrays."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mecdeploy.training.model import QuantizedModel


class TorchReference:
    """A copy of a quantised model on the CPU in evaluation mode, as runtime_checks asks its witnesses to look."""

    def __init__(self, model: QuantizedModel) -> None:
        self._model = copy.deepcopy(model).cpu().eval()

    def integers(self, pixels: NDArray[np.uint8]) -> Mapping[str, NDArray[Any]]:
        """Stored uint8 codes of every unit output, and the float32 logits, for uint8 images [n, C, H, W]."""
        return self._model.integers(torch.from_numpy(np.ascontiguousarray(pixels)))

    @torch.inference_mode()
    def logits(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """float32 [n, classes] for uint8 images [n, C, H, W]."""
        logits: NDArray[np.float32] = self._model(torch.from_numpy(np.ascontiguousarray(pixels))).numpy()
        return logits
