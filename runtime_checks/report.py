"""What a check found, as frozen data. Nothing here computes more than sums over its own rows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mecdeploy.runtime_checks.machine import Cpu
from mecdeploy.runtime_checks.structure import WeightStorage


@dataclass(frozen=True, kw_only=True)
class TensorParity:
    """One tensor on three sides: PyTorch, onnxruntime (default optimisation) and the numpy interpreter.

    compared: values seen. different: values on which not all three agree. The pair counts say who disagrees.
    max_difference: largest absolute difference of any pair, in steps (integers) or in real units (logits).
    missing: sides that did not compute the tensor, or not in this shape.
    """

    name: str
    compared: int
    different: int
    torch_vs_onnxruntime: int
    torch_vs_interpreter: int
    onnxruntime_vs_interpreter: int
    max_difference: float
    missing: tuple[str, ...]

    @property
    def agrees(self) -> bool:
        """All three sides computed it and no value differs."""
        return not self.missing and self.different == 0


@dataclass(frozen=True, kw_only=True)
class OptimizerOff:
    """onnxruntime with its optimiser off against its default: its float kernels round elsewhere. Never a failure."""

    integers_compared: int
    integers_different: int
    max_difference: float
    max_logit_difference: float


@dataclass(frozen=True, kw_only=True)
class Exactness:
    """The three-way comparison over some images, in execution order.

    exposed_logits_different: logits that change when the units are exposed as outputs; then the comparison says
    nothing about the model people serve.
    """

    images: int
    units: tuple[TensorParity, ...]
    logits: TensorParity
    optimizer_off: OptimizerOff
    exposed_logits_different: int

    @property
    def first_different(self) -> TensorParity | None:
        """The first tensor in execution order that differs or is missing on a side; the logits come last."""
        return next((row for row in (*self.units, self.logits) if not row.agrees), None)

    @property
    def integers_compared(self) -> int:
        """Integers seen, each on three sides."""
        return sum(row.compared for row in self.units)

    @property
    def integers_different(self) -> int:
        """Integers on which not all three sides agree."""
        return sum(row.different for row in self.units)


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Both networks over all images.

    top1_agreement: share of images given the same class. logits_different: logits that are not the same float32.
    first_different_image: index of the first image with such a logit, or None.
    """

    images: int
    accuracy_torch: float
    accuracy_onnxruntime: float
    top1_agreement: float
    max_logit_difference: float
    logits_different: int
    first_different_image: int | None


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """One `mecdeploy check`: structure, exactness and accuracy of one file on one machine.

    float_convolutions: convolutions and Gemms that onnxruntime runs in float, named in float_convolution_names.
    packed_bits: unit -> bits its weights take in the file. failures: sentences; passed means there are none.
    """

    model: str
    model_bytes: int
    target: str
    images: int
    exact_images: int
    integers_compared: int
    integers_different: int
    first_different_unit: str | None
    top1_agreement: float
    accuracy_torch: float
    accuracy_onnxruntime: float
    max_logit_difference: float
    logits_compared: int
    logits_different: int
    float_convolutions: int
    float_convolution_names: tuple[str, ...]
    integer_convolutions: int
    packed_bits: Mapping[str, int]
    kernels: Mapping[str, int]
    weights: tuple[WeightStorage, ...]
    units: tuple[TensorParity, ...]
    logits: TensorParity
    optimizer_off: OptimizerOff
    saturation_risk: tuple[str, ...]
    cpu: Cpu
    versions: Mapping[str, str]
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """No failure of any kind."""
        return not self.failures

    def to_json(self) -> dict[str, Any]:
        """The report as plain dicts, lists, numbers and strings; a number that is not finite becomes None."""
        plain: dict[str, Any] = {"passed": self.passed, **dataclasses.asdict(self)}
        cleaned: dict[str, Any] = _clean(plain)
        return cleaned


def _clean(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
