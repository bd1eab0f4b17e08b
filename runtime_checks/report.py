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

    real: float32, as the logits and what Gemms hand to float islands are; else stored integers.

    compared: values seen. different: values on which not all three agree. The pair counts say who disagrees.
    max_difference: largest absolute difference of any pair, in steps, or in real units.
    missing: sides that did not compute the tensor, or not in this shape. tolerance: the largest difference that is no
    failure; 0 but for logits that a float island makes, which the interpreter does not compute.
    """

    name: str
    compared: int
    different: int
    torch_vs_onnxruntime: int
    torch_vs_interpreter: int
    onnxruntime_vs_interpreter: int
    max_difference: float
    missing: tuple[str, ...]
    real: bool = False
    tolerance: float = 0.0

    @property
    def agrees(self) -> bool:
        """All sides computed it and no value differs, or by more than the tolerance."""
        return not self.missing and (self.different == 0 or 0 < self.max_difference <= self.tolerance)


FLOAT_VALUE_STEPS = 1
"""A float island's rounding differs in orders of magnitude less than a step: only a value next to a rounding tie may
move, and only to the neighbour."""

FLOAT_VALUE_SHARE = 0.01
"""A rounding error of e steps moves a share of about 2e of the values. 1% needs errors of 1/200 step, hundreds of times
those of float32 at 8 bits: of 2e7 integers behind the islands of three vision transformers none moved. A zero point off
by one moves all of them, a scale off by 0.1% some 4%."""


@dataclass(frozen=True, kw_only=True)
class FloatValueParity:
    """Integers quantised from an output of a float island, by PyTorch and by onnxruntime.

    compared, different: values. max_difference: in steps. missing: PyTorch has no such tensor, or in another shape.
    """

    name: str
    island: str
    compared: int
    different: int
    max_difference: float
    missing: bool

    @property
    def agrees(self) -> bool:
        """No difference that float rounding does not explain."""
        few = self.different <= max(1, FLOAT_VALUE_SHARE * self.compared)
        return not self.missing and few and self.max_difference <= FLOAT_VALUE_STEPS


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
    nothing about the model people serve. has_islands: the file has float islands, which onnxruntime may fuse otherwise
    then: what they make may round otherwise, what the integer kernels make of it may not.
    """

    images: int
    units: tuple[TensorParity, ...]
    logits: TensorParity
    islands: tuple[FloatValueParity, ...]
    optimizer_off: OptimizerOff
    exposed_logits_different: int
    has_islands: bool = False

    @property
    def first_different(self) -> TensorParity | None:
        """The first tensor in execution order that differs or is missing on a side; the logits come last."""
        return next((row for row in (*self.units, self.logits) if not row.agrees), None)

    @property
    def first_different_name(self) -> str | None:
        """Its name, or that of the first float value whose difference float rounding does not explain."""
        wrong = next((row.name for row in self.islands if not row.agrees), None)
        return self.first_different.name if self.first_different is not None else wrong

    @property
    def integers_compared(self) -> int:
        """Integers seen, each on three sides."""
        return sum(row.compared for row in self.units if not row.real)

    @property
    def integers_different(self) -> int:
        """Integers on which not all three sides agree."""
        return sum(row.different for row in self.units if not row.real)


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Both networks over all images.

    accuracy_torch, accuracy_onnxruntime: None for images without labels. top1_agreement: share of images given the same
    class. logits_different: logits that are not the same float32.
    first_different_image: index of the first image with such a logit, or None.
    """

    images: int
    accuracy_torch: float | None
    accuracy_onnxruntime: float | None
    top1_agreement: float
    max_logit_difference: float
    logits_different: int
    first_different_image: int | None


@dataclass(frozen=True, kw_only=True)
class IslandReport:
    """One float island: what it computes and why in float, and how its outputs compare once they are quantised.

    operators: by PyTorch's names. kernels: op type -> count of what onnxruntime's optimised graph still attributes to
    it. compared, different, max_difference (in steps): over the integers of all its outputs.
    """

    name: str
    operators: tuple[str, ...]
    reason: str
    kernels: Mapping[str, int]
    compared: int
    different: int
    max_difference: float
    values: tuple[FloatValueParity, ...]


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """One `mecdeploy check`: structure, exactness and accuracy of one file on one machine.

    float_convolutions: convolutions and Gemms outside float islands that onnxruntime runs in float, named in
    float_convolution_names. float_operators: op type -> count of everything left in float, islands included.
    exact_end_to_end: the file has no float islands, so every integer and every logit is promised.
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
    accuracy_torch: float | None
    accuracy_onnxruntime: float | None
    max_logit_difference: float
    logits_compared: int
    logits_different: int
    float_convolutions: int
    float_convolution_names: tuple[str, ...]
    integer_convolutions: int
    packed_bits: Mapping[str, int]
    kernels: Mapping[str, int]
    exact_end_to_end: bool
    float_islands: int
    islands: tuple[IslandReport, ...]
    float_operators: Mapping[str, int]
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
