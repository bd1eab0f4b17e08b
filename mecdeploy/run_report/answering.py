"""What the three networks answer, image by image: the confusion matrix, and the images worth looking at."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mecdeploy.certificate import ValidationImages
from mecdeploy.run_report.facts import Accuracy, Answer, Answers, Certificate, Confusion, Picture
from mecdeploy.runtime_checks import ModelFile
from mecdeploy.runtime_checks.checks import images_at_once
from mecdeploy.runtime_checks.model_file import LOGITS
from mecdeploy.runtime_checks.runtime import Runtime, batches

if TYPE_CHECKING:
    from mecdeploy.training.run import LoadedRun

MOST_PICTURES = 12
"""Of each kind."""
PICTURE_SIDE = 160
"""Pixels; a larger image is shown as a copy of this size, so that the page stays small."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Said:
    """A network's answers to n images. guess: int64 [n]; confidence: float64 [n], the likeliest class's probability."""

    guess: NDArray[np.int64]
    confidence: NDArray[np.float64]

    def of(self, index: int) -> Answer:
        """The answer to one image."""
        return Answer(guess=int(self.guess[index]), confidence=float(self.confidence[index]))


@dataclass(frozen=True, kw_only=True)
class Heard:
    """All three. pytorch: onnxruntime's where their logits are known to be the same."""

    onnxruntime: Said
    full_precision: Said
    pytorch: Said
    pytorch_asked: bool


def hear(
    file: ModelFile, loaded: LoadedRun, shown: ValidationImages, certificate: Certificate, progress: Progress
) -> Heard:
    """Run the validation images through onnxruntime and full precision.

    Through PyTorch's quantised network too, where the check has not found all logits of these images to be the same.
    """
    import torch

    from mecdeploy.reference import TorchReference

    runtime = Runtime(file)

    @torch.inference_mode()
    def full_precision(pixels: NDArray[np.uint8]) -> NDArray[Any]:
        answer: NDArray[Any] = loaded.float_model(loaded.spec.normalize(torch.from_numpy(pixels))).numpy()
        return answer

    def ask(what: str, network: Callable[[NDArray[np.uint8]], NDArray[Any]]) -> Said:
        return _ask(network, shown.images, lambda done, total: progress(what, done, total))

    same = certificate.max_logit_difference == 0 and certificate.images == len(shown.images)
    onnxruntime = ask("onnxruntime", lambda pixels: runtime.run(pixels)[LOGITS])
    return Heard(
        onnxruntime=onnxruntime,
        full_precision=ask("full precision", full_precision),
        pytorch=onnxruntime if same else ask("PyTorch", TorchReference(loaded.model).logits),
        pytorch_asked=not same,
    )


def accuracy(heard: Heard, shown: ValidationImages) -> Accuracy:
    """By the labels, or without them by full precision."""
    from mecdeploy.training.events import ACCURACY, AGREEMENT

    right = heard.full_precision.guess if shown.labels is None else shown.labels
    shares = [float((said.guess == right).mean()) for said in (heard.full_precision, heard.pytorch, heard.onnxruntime)]
    measure = AGREEMENT if shown.labels is None else ACCURACY
    return Accuracy(measure=measure, full_precision=shares[0], pytorch=shares[1], onnxruntime=shares[2])


def answers(heard: Heard, shown: ValidationImages, classes: int) -> Answers:
    """The confusion matrix, and a few images of each kind: the most confident ones, ties in the images' order."""
    served, full = heard.onnxruntime, heard.full_precision
    disagree, changed = heard.pytorch.guess != served.guess, full.guess != served.guess
    wrong = np.zeros(len(served.guess), bool) if shown.labels is None else served.guess != shown.labels
    surer = np.maximum(heard.pytorch.confidence, served.confidence)
    lost = np.minimum(full.confidence, served.confidence)

    def pictures(where: NDArray[np.bool_], order: NDArray[np.float64]) -> tuple[Picture, ...]:
        chosen = np.flatnonzero(where)
        best = chosen[np.argsort(-order[chosen], kind="stable")][:MOST_PICTURES]
        return tuple(_picture(heard, shown, int(index)) for index in best)

    return Answers(
        images=len(shown.images),
        confusion=None if shown.labels is None else confusion(shown.labels, served.guess, classes),
        disagreements=int(disagree.sum()),
        changed=int(changed.sum()),
        disagreement_pictures=pictures(disagree, surer),
        changed_pictures=pictures(changed, lost),
        mistake_pictures=pictures(wrong, served.confidence),
    )


def confusion(labels: NDArray[np.int64], guesses: NDArray[np.int64], classes: int) -> Confusion:
    """Counts of every pair of label and guess that occurs, the most frequent first, then by class."""
    pairs, counts = np.unique(np.stack([labels, guesses], 1), axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    found = [(int(pairs[i, 0]), int(pairs[i, 1]), int(counts[i])) for i in order]
    return Confusion(images=tuple(np.bincount(labels, minlength=classes).tolist()), counts=tuple(found))


def png(image: NDArray[np.uint8]) -> str:
    """uint8 [C, H, W] of one or three channels as base64 of a PNG, no side larger than PICTURE_SIDE.

    Of any other number of channels the first is shown.
    """
    from PIL import Image

    pixels = image.transpose(1, 2, 0) if len(image) == 3 else image[0]
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.BILINEAR)
    content = io.BytesIO()
    picture.save(content, "PNG", optimize=True)
    return base64.b64encode(content.getvalue()).decode()


def _picture(heard: Heard, shown: ValidationImages, index: int) -> Picture:
    return Picture(
        index=index,
        label=None if shown.labels is None else int(shown.labels[index]),
        onnxruntime=heard.onnxruntime.of(index),
        full_precision=heard.full_precision.of(index),
        pytorch=heard.pytorch.of(index) if heard.pytorch_asked else None,
        png=png(np.asarray(shown.images[index])),
    )


def _ask(
    network: Callable[[NDArray[np.uint8]], NDArray[Any]],
    images: NDArray[np.uint8],
    progress: Callable[[int, int], None],
) -> Said:
    guesses, confidences = [], []
    for part in batches(len(images), images_at_once(*images.shape[2:])):
        logits = network(np.ascontiguousarray(images[part])).astype(np.float64)
        chances = np.exp(logits - logits.max(1, keepdims=True))
        guess = logits.argmax(1)
        guesses.append(guess)
        confidences.append(chances[np.arange(len(guess)), guess] / chances.sum(1))
        progress(part.stop, len(images))
    return Said(guess=np.concatenate(guesses), confidence=np.concatenate(confidences))
