"""Stand-ins for the trained network: what the undamaged file computes, by the interpreter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx

from mecdeploy.runtime_checks import Interpreter, read_model


class Undamaged:
    """The reference that a damaged copy is checked against; it knows the file's units and nothing else."""

    def __init__(self, model: onnx.ModelProto) -> None:
        file = read_model(model.SerializeToString())
        self._interpreter = Interpreter(file)
        self._names = (*file.units, "logits")

    def integers(self, pixels: np.ndarray, given: Mapping[str, np.ndarray] = {}) -> Mapping[str, np.ndarray]:
        return self._interpreter.run(pixels, outputs=self._names, given=given)

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        logits: np.ndarray = self.integers(pixels)["logits"]
        return logits


class Altered(Undamaged):
    """The same, with its integers passed through a function: a reference that is itself wrong."""

    def __init__(self, model: onnx.ModelProto, change: Any) -> None:
        super().__init__(model)
        self._change = change

    def integers(self, pixels: np.ndarray, given: Mapping[str, np.ndarray] = {}) -> Mapping[str, np.ndarray]:
        return self._change(dict(super().integers(pixels, given)))
