"""What a report says of a run, as frozen data: the page and report.json are made of this and nothing else.

Shares are 0..1, times are seconds, sizes bytes. Classes are positions in `classes`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Share of right answers over the validation images, of the three networks.

    measure: what counts as right: "accuracy" by the labels, or where there are none "agreement with the teacher", by
    the full-precision network, whose own share is then 1.
    """

    measure: str
    full_precision: float
    pytorch: float
    onnxruntime: float


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """A check, as parity.json has it: what was compared with what, where, with which versions and when (UTC)."""

    passed: bool
    failures: tuple[str, ...]
    date: str
    images: int
    exact_images: int
    integers_compared: int
    integers_different: int
    first_different_unit: str | None
    max_logit_difference: float | None
    exact_end_to_end: bool
    island_integers_compared: int
    island_integers_different: int
    processor: str
    architecture: str
    processor_note: str
    versions: Mapping[str, str]
    model_sha256: str
    checkpoint_sha256: str
    images_sha256: str


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes of the exported file, and of the full-precision network as ONNX; None where torch.onnx cannot write it."""

    file: int
    full_precision: int | None

    @property
    def ratio(self) -> float | None:
        """The file's share of full precision."""
        return self.file / self.full_precision if self.full_precision else None


@dataclass(frozen=True, kw_only=True)
class Latency:
    """One image on one thread: medians, and the median of the ratio round by round, in which drift cancels."""

    quantized: float
    full_precision: float
    ratio: float
    rounds: int


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """How many values have each code. codes: ascending, of weights signed, of activations as they are stored.

    entropy: in bits. levels: codes that occur. lowest, highest: shares of values at either end of the range.
    """

    bits: int
    codes: tuple[int, ...]
    counts: tuple[int, ...]
    entropy: float
    levels: int
    lowest: float
    highest: float


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A layer's weights in the file. bits: of one in its storage; trained_bits: as trained. scales: of its channels."""

    count: int
    bytes: int
    bits: int
    trained_bits: int
    smallest_scale: float
    largest_scale: float
    share: float
    histogram: Histogram | None


@dataclass(frozen=True, kw_only=True)
class Value:
    """A tensor of integers that a layer makes: real = (code - zero_point) * scale, code in lowest..highest.

    shape: of one image. histogram: None for codes that were only moved, and have been counted where they were made.
    """

    name: str
    bits: int
    scale: float
    zero_point: int
    lowest: int
    highest: int
    shape: tuple[int, ...]
    histogram: Histogram | None


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer of the file: an integer kernel, or a float island. reads: names of layers, or PIXELS.

    kernel: what it computes, in words. reason: why an island is in float, empty for integer kernels. time: share of a
    run's time, None where onnxruntime gave no node its name (it was fused into another).
    """

    name: str
    kernel: str
    reads: tuple[str, ...]
    island: bool = False
    reason: str = ""
    weights: Weights | None = None
    values: tuple[Value, ...] = ()
    time: float | None = None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a network says of an image: its likeliest class, and how likely."""

    guess: int
    confidence: float


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A validation image and what was said of it.

    index: its place among them. label: None for an image without. pytorch: None where it was not asked, since its
    logits are known to be onnxruntime's. png: base64, of the image or a smaller copy; left out of report.json.
    """

    index: int
    label: int | None
    onnxruntime: Answer
    full_precision: Answer
    pytorch: Answer | None
    png: str = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """How often images of class `label` were taken for class `guess` by onnxruntime: never 0, the most frequent first.

    images: of each class.
    """

    images: tuple[int, ...]
    counts: tuple[tuple[int, int, int], ...]
    """(label, guess, count), label == guess among them."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Over all validation images. disagreements: how many images PyTorch and onnxruntime put into other classes.

    changed: how many quantisation put into another class than full precision has them in. Pictures: of the first kind
    those with the surest answers, of mistakes the most confident ones; few of each.
    """

    images: int
    confusion: Confusion | None
    disagreements: int
    changed: int
    disagreement_pictures: tuple[Picture, ...]
    changed_pictures: tuple[Picture, ...]
    mistake_pictures: tuple[Picture, ...]


@dataclass(frozen=True, kw_only=True)
class ReportFacts:
    """All of it. run: the folder as it was given. date: of the report, UTC. history: metrics.jsonl, an epoch each.

    codes_images: how many images the codes were counted over. timed_images: of the run whose time the layers share.
    settings: run.toml. processor, versions: of the report.
    """

    run: str
    date: str
    network: str
    method: str
    data: str
    seed: int
    classes: tuple[str, ...]
    input_shape: tuple[int, int, int]
    input_dtype: str
    target: str
    model: str
    accuracy: Accuracy
    certificate: Certificate
    sizes: Sizes
    latency: Latency | None
    history: tuple[Mapping[str, Any], ...]
    layers: tuple[Layer, ...]
    codes_images: int
    timed_images: int
    kernels: Mapping[str, int]
    answers: Answers
    settings: str
    processor: str
    versions: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values, without the images' pixels."""
        plain: dict[str, Any] = _without_pixels(dataclasses.asdict(self))
        return plain


def _without_pixels(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_pixels(item) for key, item in value.items() if key != "png"}
    return [_without_pixels(item) for item in value] if isinstance(value, list | tuple) else value
