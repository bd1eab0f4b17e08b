"""A trained network with float islands, stood in for: their formulas in float64, the undamaged file's constants."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from mecdeploy.runtime_checks import Interpreter, read_model

Results = Mapping[str, np.ndarray]
NOTHING: Results = MappingProxyType({})


class TokenReference:
    """What token_network computes: integer units by the interpreter, islands here.

    change: applied to what `integers` returns, for a reference that is itself wrong.
    """

    def __init__(
        self, model: onnx.ModelProto, change: Callable[[dict[str, np.ndarray]], Any] = lambda results: results
    ) -> None:
        file = read_model(model.SerializeToString())
        self._interpreter = Interpreter(file)
        self._names = (*file.units, "logits")
        self._constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        self._change = change

    def integers(self, pixels: np.ndarray, given: Results = NOTHING) -> Results:
        read = dict(given) or self._own(pixels)
        values = self._interpreter.run(pixels, given=read)
        results = {name: values[name] for name in self._names if name in values}
        results |= {"normed/codes": self._normed(values), "pooled/codes": self._pooled(values)}
        if "logits" not in results:
            results["logits"] = (self._real("pooled/codes", read) @ self._constant("head/matrix")).astype(np.float32)
        if self._change is not None:
            self._change(results)
        return results

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        return self.integers(pixels)["logits"]

    def _own(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """Both islands' integers, the second from the first's."""
        length, width = pixels.shape[2] * pixels.shape[3], len(self._constants["norm/gain"])
        given = {"normed/codes": np.zeros((len(pixels), length, width), np.uint8)}
        given["pooled/codes"] = np.zeros((len(pixels), width), np.uint8)
        given["normed/codes"] = self._normed(self._interpreter.run(pixels, given=given))
        given["pooled/codes"] = self._pooled(self._interpreter.run(pixels, given=given))
        return given

    def _normed(self, values: Results) -> np.ndarray:
        x = self._real("sequence", values)
        centred = x - x.mean(axis=-1, keepdims=True)
        unit = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
        return self._quantize("normed/codes", unit * self._constant("norm/gain") + self._constant("norm/shift"))

    def _pooled(self, values: Results) -> np.ndarray:
        first, second = np.split(values["both"].astype(np.float64), 2, axis=-1)
        scaled = first * self._constant("gate/sharpness")
        weights = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        return self._quantize("pooled/codes", (weights * second).mean(axis=1), largest=15)

    def _constant(self, name: str) -> np.ndarray:
        return self._constants[name].astype(np.float64)

    def _real(self, name: str, values: Results) -> np.ndarray:
        source = "patches" if name == "sequence" else name
        return (values[name] - self._constant(f"{source}/zero_point")) * self._constant(f"{source}/scale")

    def _quantize(self, name: str, real: np.ndarray, largest: int = 255) -> np.ndarray:
        steps = np.rint(real / self._constant(f"{name}/scale")) + self._constant(f"{name}/zero_point")
        return np.clip(steps, 0, largest).astype(np.uint8)
