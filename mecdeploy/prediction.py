"""Class probabilities for image files, with onnxruntime, numpy and Pillow alone: what a server needs, and no torch.

Everything about the network comes from the file's metadata: input size, colour, number type and class names.
"""

from __future__ import annotations

import io
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


class ImageTooLarge(UserError):
    """An image has more pixels than may be decoded."""


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
        return self._prepare(_open(path, str(path)))

    def decode(self, content: bytes, name: str, *, formats: tuple[str, ...], max_pixels: int) -> NDArray[Any]:
        """As `read`, from a file's bytes, which nobody vouches for: `name` is what an error calls them.

        formats: Pillow's names; no other decoder is tried. Raises ImageTooLarge before it decodes more than max_pixels.
        """
        image = _open(io.BytesIO(content), name, formats, max_pixels)
        width, height = self._covering(image)
        if width * height > max(max_pixels, self.width * self.height):  # a line of pixels, say, blown up to 224 rows
            raise ImageTooLarge(
                f"{name} has {image.width} x {image.height} pixels, too narrow for an input of {self.width} x "
                f"{self.height}: covering that takes {width} x {height}, and at most {max_pixels:,} in all are made."
            )
        return self._prepare(image)

    def _prepare(self, image: Image.Image) -> NDArray[Any]:
        pixels = np.asarray(self._fit(image.convert(self.color)), dtype=np.uint8)
        channels_first = pixels.reshape(self.height, self.width, self.channels).transpose(2, 0, 1)
        return channels_first if self.dtype == "uint8" else channels_first.astype(np.float32) / np.float32(255)

    def _fit(self, image: Image.Image) -> Image.Image:
        """As validation images were prepared: cover the input bilinearly, cut out the centre; untouched if it fits."""
        if image.size == (self.width, self.height):
            return image
        covering = self._covering(image)
        left, top = (covering[0] - self.width) // 2, (covering[1] - self.height) // 2
        resized = image.resize(covering, Image.Resampling.BILINEAR)
        return resized.crop((left, top, left + self.width, top + self.height))

    def _covering(self, image: Image.Image) -> tuple[int, int]:
        """Width and height of the smallest image of the same proportions that covers the input."""
        if image.width * self.height >= image.height * self.width:
            return _round_half_up(image.width * self.height, image.height), self.height
        return self.width, _round_half_up(image.height * self.width, image.width)


@dataclass(frozen=True, kw_only=True)
class ModelContract:
    """What a file of ours says about itself. source: the graph input that takes the image."""

    source: str
    image: InputContract
    class_names: tuple[str, ...]


def contract_of(session: ort.InferenceSession, model: Path) -> ModelContract | None:
    """The contract in a file's metadata, None for a file of other tools. Raises UserError for a newer format."""
    metadata = session.get_modelmeta().custom_metadata_map
    version = metadata.get("mecdeploy.format")
    if version is None:
        return None
    if version != FORMAT:
        raise UserError(f"{model} has metadata format {version}; this version reads {FORMAT}. Upgrade mecdeploy.")
    image = json.loads(metadata["mecdeploy.input"])
    classes = session.get_outputs()[0].shape[1]
    names = json.loads(metadata.get("mecdeploy.class_names", "null"))
    return ModelContract(
        source=session.get_inputs()[0].name,
        image=InputContract(**{key: image[key] for key in InputContract.__dataclass_fields__}),
        class_names=tuple(names if names is not None else (str(index) for index in range(classes))),
    )


def softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Probabilities of one image: logits and probabilities are [classes]."""
    exponentials = np.exp(logits.astype(np.float64) - float(logits.max()))
    probabilities: NDArray[np.float64] = exponentials / exponentials.sum()
    return probabilities


class Predictor:
    """A model file, loaded and ready."""

    def __init__(self, model: Path) -> None:
        self._session = load_session(read_model(model), model)
        contract = contract_of(self._session, model)
        if contract is None:
            raise UserError(f"{model} was not written by `mecdeploy export` (it carries no mecdeploy metadata).")
        self._source, self.contract, self.class_names = contract.source, contract.image, contract.class_names

    def predict(self, image: Path) -> Prediction:
        """Run one image file. Raises UserError naming it if it cannot be read."""
        (logits,) = self._session.run(None, {self._source: self.contract.read(image)[np.newaxis]})
        return Prediction(image=image, class_names=self.class_names, probabilities=softmax(logits[0]))


def predict(model: str | Path, images: Sequence[str | Path]) -> list[Prediction]:
    """Classify image files with an exported model. Raises UserError for a foreign model or an unreadable image."""
    predictor = Predictor(Path(model))
    return [predictor.predict(Path(image)) for image in images]


def read_model(model: Path) -> bytes:
    """The bytes of a model file. Raises UserError if there is none, or it cannot be read."""
    if not model.is_file():
        raise UserError(f"{model}: no such model file.")
    try:
        return model.read_bytes()
    except OSError as error:
        raise UserError(f"{model} cannot be read ({error.strerror}).") from None


def load_session(content: bytes, model: Path, *, threads: int = 0, spin: bool = True) -> ort.InferenceSession:
    """A session on the CPU. threads: of one run; 0 leaves it to onnxruntime. Raises UserError, naming the file.

    spin: threads that are done wait by looping, which is soonest back at work and takes a core from everybody else.
    """
    options = ort.SessionOptions()
    options.log_severity_level = _SILENT
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
    try:
        return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a class of its own per failure, none of them public
        reason = str(error).splitlines()[0]
        raise UserError(f"{model} is no ONNX file that onnxruntime {ort.__version__} can load ({reason}).") from None


def _open(
    source: Path | io.BytesIO, name: str, formats: tuple[str, ...] | None = None, max_pixels: int | None = None
) -> Image.Image:
    try:
        with Image.open(source, formats=formats) as file:
            if max_pixels is not None and file.width * file.height > max_pixels:
                raise ImageTooLarge(
                    f"{name} has {file.width} x {file.height} pixels; at most {max_pixels:,} in all are decoded."
                )
            file.load()
            if file.mode in _GRAY_16_BIT:
                return Image.fromarray((np.clip(np.asarray(file), 0, 65535) >> 8).astype(np.uint8))
            if file.mode == "F":
                raise UserError(f"{name} has floating-point pixels; convert it to 8 bits.")
            return file.convert("RGBA") if file.mode == "P" and "transparency" in file.info else file.copy()
    except UserError:
        raise
    except UnidentifiedImageError:
        readable = "Pillow can read" if formats is None else f"is read here ({' or '.join(formats)})"
        raise UserError(f"{name} is not an image that {readable}.") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLarge(f"{name} cannot be read ({error}).") from None
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror or error}).") from None
    except Exception as error:  # Pillow's decoders raise nearly every type there is for a damaged file
        raise UserError(f"{name} cannot be read ({str(error) or type(error).__name__}).") from None


def _round_half_up(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)
