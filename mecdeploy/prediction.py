"""Class probabilities for image files, with onnxruntime, numpy and Pillow alone: what a server needs, and no torch.

Everything about the network comes from the file's metadata: input size, colour, number type and class names.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from mecdeploy.errors import UserError

FORMAT = "1"
_SILENT = 4  # onnxruntime's severity "fatal": its own log lines would stand beside our one-line error
_GRAY_16_BIT = ("I", "I;16", "I;16L", "I;16B")


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """probabilities: float64 [classes], summing to 1, in the order of class_names."""

    image: Path
    class_names: tuple[str, ...]
    probabilities: NDArray[np.float64]

    def top(self, count: int) -> list[tuple[str, float]]:
        """The likeliest classes with their probabilities, best first."""
        order = np.argsort(-self.probabilities, kind="stable")[:count]
        return [(self.class_names[index], float(self.probabilities[index])) for index in order]


@dataclass(frozen=True, kw_only=True)
class InputContract:
    """What the file says it reads: [channels, height, width] in `color` (RGB or L); scaled to [0, 1] if not uint8."""

    channels: int
    height: int
    width: int
    color: str
    dtype: str

    def read(self, path: Path) -> NDArray[Any]:
        """An image file as the network's input [C, H, W]. Raises UserError naming the file if it is none."""
        pixels = np.asarray(self._fit(_open(path).convert(self.color)), dtype=np.uint8)
        channels_first = pixels.reshape(self.height, self.width, self.channels).transpose(2, 0, 1)
        return channels_first if self.dtype == "uint8" else channels_first.astype(np.float32) / np.float32(255)

    def _fit(self, image: Image.Image) -> Image.Image:
        """As validation images were prepared: cover the input bilinearly, cut out the centre; untouched if it fits."""
        if image.size == (self.width, self.height):
            return image
        if image.width * self.height >= image.height * self.width:
            covering = (_round_half_up(image.width * self.height, image.height), self.height)
        else:
            covering = (self.width, _round_half_up(image.height * self.width, image.width))
        left, top = (covering[0] - self.width) // 2, (covering[1] - self.height) // 2
        resized = image.resize(covering, Image.Resampling.BILINEAR)
        return resized.crop((left, top, left + self.width, top + self.height))


class Predictor:
    """A model file, loaded and ready."""

    def __init__(self, model: Path) -> None:
        self._session = _load(model)
        metadata = self._session.get_modelmeta().custom_metadata_map
        version = metadata.get("mecdeploy.format")
        if version is None:
            raise UserError(f"{model} was not written by `mecdeploy export` (it carries no mecdeploy metadata).")
        if version != FORMAT:
            raise UserError(f"{model} has metadata format {version}; this version reads {FORMAT}. Upgrade mecdeploy.")
        self._source = self._session.get_inputs()[0].name
        contract = json.loads(metadata["mecdeploy.input"])
        self.contract = InputContract(**{key: contract[key] for key in InputContract.__dataclass_fields__})
        classes = self._session.get_outputs()[0].shape[1]
        names = json.loads(metadata.get("mecdeploy.class_names", "null"))
        self.class_names = tuple(names if names is not None else (str(index) for index in range(classes)))

    def predict(self, image: Path) -> Prediction:
        """Run one image file. Raises UserError naming it if it cannot be read."""
        (logits,) = self._session.run(None, {self._source: self.contract.read(image)[np.newaxis]})
        exponentials = np.exp(logits[0].astype(np.float64) - float(logits[0].max()))
        return Prediction(image=image, class_names=self.class_names, probabilities=exponentials / exponentials.sum())


def predict(model: str | Path, images: Sequence[str | Path]) -> list[Prediction]:
    """Classify image files with an exported model. Raises UserError for a foreign model or an unreadable image."""
    predictor = Predictor(Path(model))
    return [predictor.predict(Path(image)) for image in images]


def _load(model: Path) -> ort.InferenceSession:
    if not model.is_file():
        raise UserError(f"{model}: no such model file.")
    options = ort.SessionOptions()
    options.log_severity_level = _SILENT
    try:
        return ort.InferenceSession(model.read_bytes(), options, providers=["CPUExecutionProvider"])
    except OSError as error:
        raise UserError(f"{model} cannot be read ({error.strerror}).") from None
    except Exception as error:  # onnxruntime raises a class of its own per failure, none of them public
        reason = str(error).splitlines()[0]
        raise UserError(f"{model} is no ONNX file that onnxruntime {ort.__version__} can load ({reason}).") from None


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as file:
            file.load()
            if file.mode in _GRAY_16_BIT:
                return Image.fromarray((np.clip(np.asarray(file), 0, 65535) >> 8).astype(np.uint8))
            if file.mode == "F":
                raise UserError(f"{path} has floating-point pixels; convert it to 8 bits.")
            return file.convert("RGBA") if file.mode == "P" and "transparency" in file.info else file.copy()
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError(f"{path} is not an image that Pillow can read.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from None
    except Exception as error:  # Pillow's decoders raise nearly every type there is for a damaged file
        raise UserError(f"{path} cannot be read ({str(error) or type(error).__name__}).") from None


def _round_half_up(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)
