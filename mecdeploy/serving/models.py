"""A model file, loaded: what it reads and writes, and its answers. Knows nothing of HTTP; any server can hold one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mecdeploy.errors import UserError
from mecdeploy.prediction import Prediction, contract_of, load_session, read_model, softmax
from mecdeploy.serving.errors import Refusal
from mecdeploy.serving.tensors import BATCH, DATATYPE_OF, TensorSpec

IMAGE_FORMATS = ("JPEG", "PNG")
MAX_PIXELS = 50_000_000


class ServedModel:
    """One version of one model. Its attributes never change; `infer` and `classify` may be called from any thread.

    name: in the server's addresses. version: by default the first 12 digits of the file's SHA-256.
    inputs, outputs: the tensors of the file. free_rows: whether requests of several rows, and of several clients, can
    be run as one. class_names: empty for a file of other tools, which `classify` refuses.
    """

    def __init__(
        self, path: str | Path, *, name: str | None = None, version: str | None = None, threads: int = 0
    ) -> None:
        """Load a file and run it once. threads: of one run; 0 leaves it to onnxruntime.

        Raises UserError for what is no ONNX file, and for one whose tensors the protocol cannot carry.
        """
        self.path = Path(path)
        content = read_model(self.path)
        self.name = name if name is not None else self.path.stem
        self.version = version if version is not None else hashlib.sha256(content).hexdigest()[:12]
        # Threads that spin between two runs would take the cores that read requests.
        self._session = load_session(content, self.path, threads=threads, spin=False)
        self._contract = contract_of(self._session, self.path)
        self.class_names = self._contract.class_names if self._contract is not None else ()
        nodes = self._session.get_inputs(), self._session.get_outputs()
        self.free_rows = all(node.shape and not isinstance(node.shape[0], int) for group in nodes for node in group)
        self.inputs, self.outputs = (
            tuple(_spec(self.path, node, free=self.free_rows, what=what) for node in group)
            for what, group in zip(("input", "output"), nodes, strict=True)
        )
        self._warm_up()

    def infer(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """All outputs by name for all inputs by name, each of the shape and type of its TensorSpec."""
        names = [spec.name for spec in self.outputs]
        return dict(zip(names, self._session.run(names, dict(arrays)), strict=True))

    def decode(
        self, content: bytes, *, name: str = "the image", max_pixels: int = MAX_PIXELS
    ) -> dict[str, NDArray[Any]]:
        """The bytes of a JPEG or PNG file as the inputs of `infer`, one row, prepared as `mecdeploy predict` does.

        Raises UserError for what is no such image (ImageTooLarge for one of too many pixels), Refusal for a model
        that was not written by `mecdeploy export`.
        """
        if self._contract is None:
            raise Refusal(
                400,
                f"model {self.name!r} was not written by `mecdeploy export`: nothing says how it reads an image. "
                "Send its tensors to /v2/models/.../infer.",
            )
        pixels = self._contract.image.decode(content, name, formats=IMAGE_FORMATS, max_pixels=max_pixels)
        return {self._contract.source: np.ascontiguousarray(pixels[np.newaxis])}

    def read_out(self, outputs: Mapping[str, NDArray[Any]]) -> list[Prediction]:
        """The outputs of `infer` as class probabilities, one for each row."""
        logits = outputs[self.outputs[0].name]
        return [Prediction(image=Path(), class_names=self.class_names, probabilities=softmax(row)) for row in logits]

    def classify(self, images: Sequence[bytes]) -> list[Prediction]:
        """Class probabilities for the bytes of JPEG or PNG files, run one by one; raises what `decode` does."""
        return [self.read_out(self.infer(self.decode(image)))[0] for image in images]

    def _warm_up(self) -> None:
        """Run once on zeros: a file that loads and cannot run is refused here, and the first request is not slow."""
        zeros = {
            spec.name: np.zeros([1 if size == BATCH else size for size in spec.shape], spec.dtype)
            for spec in self.inputs
        }
        try:
            outputs = self.infer(zeros)
        except Exception as error:  # onnxruntime raises a class of its own per failure, none of them public
            raise UserError(f"{self.path} does not run ({str(error).splitlines()[0]}).") from None
        if self.free_rows and any(len(array) != 1 for array in outputs.values()):
            raise UserError(f"{self.path} gives something else than one row of output for one row of input.")


def _spec(path: Path, node: Any, *, free: bool, what: str) -> TensorSpec:
    """The tensor of an onnxruntime node. Raises UserError for what the protocol, or batching, cannot carry."""
    if node.type not in DATATYPE_OF:
        raise UserError(f"{path}: {what} {node.name!r} is a {node.type}; served are {', '.join(DATATYPE_OF)}.")
    sizes = node.shape[1:] if free else node.shape
    if not all(isinstance(size, int) for size in sizes):
        raise UserError(
            f"{path}: {what} {node.name!r} has shape {node.shape}; every size must be a number, but for a first one "
            "that is free in every input and output. Fix the shape, with onnxruntime.tools.make_dynamic_shape_fixed."
        )
    shape = (BATCH, *sizes) if free else tuple(sizes)
    return TensorSpec(name=node.name, datatype=DATATYPE_OF[node.type], shape=shape)
