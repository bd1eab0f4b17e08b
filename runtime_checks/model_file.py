"""Reading a mecdeploy ONNX file: the protobuf, the contract in its metadata, and the feed it wants."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from mecdeploy.runtime_checks.errors import CheckError

FORMAT = "1"
PIXELS = "pixels"
LOGITS = "logits"
_PREFIX = "mecdeploy."
_REQUIRED = ("format", "weight_bits", "trained_bits", "activation_bits", "units", "input", "target")
_OPTIONAL = ("float_values", "islands")
_DTYPES = {"uint8": onnx.TensorProto.UINT8, "float32": onnx.TensorProto.FLOAT}

ModelSource = Path | str | bytes


@dataclass(frozen=True, kw_only=True)
class Island:
    """Operators that run in float32 between integer kernels, by PyTorch's names for them, and why they do."""

    operators: tuple[str, ...]
    reason: str


@dataclass(frozen=True, kw_only=True)
class ModelFile:
    """A parsed model and what its metadata promises.

    label: how messages name the file. units: tensor names of every unit's stored integers, and of the float outputs of
    Gemms before islands, in execution order.
    float_values: tensors of stored integers that are quantised from what a float island computes. islands: by name.
    weight_bits: unit name -> bits each weight is packed at. shape: (channels, height, width) of one image.
    """

    label: str
    size: int
    proto: onnx.ModelProto
    units: tuple[str, ...]
    weight_bits: Mapping[str, int]
    activation_bits: Mapping[str, int]
    target: str
    input_name: str
    input_dtype: str
    shape: tuple[int, int, int]
    float_values: tuple[str, ...] = ()
    islands: Mapping[str, Island] = field(default_factory=dict)

    def feed(self, pixels: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """What onnxruntime is given for raw pixels [n, C, H, W]: the pixels, or pixels / 255 for a float input."""
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != self.shape:
            raise CheckError(
                f"images are {pixels.dtype} {list(pixels.shape)}; {self.label} reads uint8 [n, "
                f"{', '.join(map(str, self.shape))}]. Pass images of that shape."
            )
        if self.input_dtype == "uint8":
            return {self.input_name: np.ascontiguousarray(pixels)}
        return {self.input_name: pixels.astype(np.float32) / np.float32(255)}


def read_model(source: ModelSource) -> ModelFile:
    """Parse and validate a mecdeploy model from a path or its bytes; CheckError says what is wrong and what next."""
    label, proto, size = parse_model(source)
    metadata = _read_metadata(label, proto)
    try:
        onnx.checker.check_model(proto)
    except (onnx.checker.ValidationError, ValueError) as error:
        raise CheckError(f"{label}: not a valid ONNX model ({_first_line(error)}). Export the run again.") from None
    image = metadata["input"]
    dtype = str(image.get("dtype"))
    if dtype not in _DTYPES:
        raise CheckError(f"{label}: metadata says input dtype {dtype!r}; known are uint8 and float32. Export it again.")
    return ModelFile(
        label=label,
        size=size,
        proto=proto,
        units=tuple(map(str, metadata["units"])),
        weight_bits={str(name): int(bits) for name, bits in metadata["weight_bits"].items()},
        activation_bits={str(name): int(bits) for name, bits in metadata["activation_bits"].items()},
        target=str(metadata["target"]),
        input_name=_single_input(label, proto, dtype),
        input_dtype=dtype,
        shape=(int(image["channels"]), int(image["height"]), int(image["width"])),
        float_values=tuple(map(str, metadata["float_values"])),
        islands=_islands(label, metadata["islands"]),
    )


def parse_model(source: ModelSource) -> tuple[str, onnx.ModelProto, int]:
    """How messages name any ONNX file, what it holds, and its bytes; data in files beside it is left there."""
    label, data = _read_bytes(source)
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except Exception:  # protobuf's DecodeError, whose module carries no types
        raise CheckError(f"{label}: not a readable ONNX file; it is truncated or damaged. Export it again.") from None
    if any(isinstance(text, bytes) for text in _texts(proto)):  # protobuf's way to hand over what is not UTF-8
        raise CheckError(f"{label}: not a readable ONNX file; a name in it is damaged. Export it again.")
    if not proto.graph.node:
        raise CheckError(f"{label}: holds no ONNX graph. Export it again, or name another file.")
    return label, proto, len(data)


def _texts(proto: onnx.ModelProto) -> Iterator[str]:
    """Every name and text in a model that somebody reads."""
    yield from (proto.producer_name, proto.producer_version)
    yield from (entry.domain for entry in proto.opset_import)
    yield from (text for entry in proto.metadata_props for text in (entry.key, entry.value))
    for node in proto.graph.node:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        yield from (attribute.name for attribute in node.attribute)
    for tensor in proto.graph.initializer:
        yield tensor.name
        yield from (text for entry in tensor.external_data for text in (entry.key, entry.value))
    for value in (*proto.graph.input, *proto.graph.output):
        yield value.name
        yield from (size.dim_param for size in value.type.tensor_type.shape.dim)


def _islands(label: str, described: dict[str, Any]) -> dict[str, Island]:
    islands = {}
    for name, entry in described.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("operators"), list) or "reason" not in entry:
            raise CheckError(
                f"{label}: metadata {_PREFIX}islands has no operators or no reason for {name!r}. Export the run again."
            )
        islands[name] = Island(operators=tuple(map(str, entry["operators"])), reason=str(entry["reason"]))
    return islands


def _read_bytes(source: ModelSource) -> tuple[str, bytes]:
    if isinstance(source, bytes):
        return "model", source
    path = Path(source)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CheckError(f"{path}: no such file. Write it with `mecdeploy export RUN`, or check the path.") from None
    except OSError as error:
        raise CheckError(f"{path}: cannot be read ({error.strerror}). Check the path and its permissions.") from None
    if not data:
        raise CheckError(f"{path}: the file is empty. Export it again.")
    return path.name, data


def _read_metadata(label: str, proto: onnx.ModelProto) -> dict[str, Any]:
    found = {
        prop.key.removeprefix(_PREFIX): prop.value for prop in proto.metadata_props if prop.key.startswith(_PREFIX)
    }
    if not found:
        raise CheckError(
            f"{label}: carries no mecdeploy metadata, so it was not written by `mecdeploy export` (or is cut off). "
            "Check a file that was."
        )
    for key in _REQUIRED:
        if key not in found:
            raise CheckError(f"{label}: metadata {_PREFIX}{key} is missing; the file is cut off. Export the run again.")
    if found["format"] != FORMAT:
        raise CheckError(
            f"{label}: metadata format is {found['format']!r}; this version reads {FORMAT!r}. "
            "Export the run again with this version."
        )
    metadata: dict[str, Any] = {"target": found["target"]}
    kinds: dict[str, type] = {
        "weight_bits": dict,
        "trained_bits": dict,
        "activation_bits": dict,
        "units": list,
        "input": dict,
        "float_values": list,
        "islands": dict,
    }
    for key, kind in kinds.items():
        try:
            metadata[key] = json.loads(found[key]) if key not in _OPTIONAL or key in found else kind()
        except json.JSONDecodeError:
            metadata[key] = None
        if not isinstance(metadata[key], kind):
            raise CheckError(f"{label}: metadata {_PREFIX}{key} is not a JSON {kind.__name__}. Export the run again.")
    for key in ("channels", "height", "width"):
        if not isinstance(metadata["input"].get(key), int):
            raise CheckError(f"{label}: metadata {_PREFIX}input has no integer {key}. Export the run again.")
    return metadata


def _single_input(label: str, proto: onnx.ModelProto, dtype: str) -> str:
    """The graph's one input that no initialiser supplies, of the promised type; the output must be the logits."""
    constants = {tensor.name for tensor in proto.graph.initializer}
    inputs = [value for value in proto.graph.input if value.name not in constants]
    if len(inputs) != 1 or inputs[0].type.tensor_type.elem_type != _DTYPES[dtype]:
        raise CheckError(f"{label}: the graph does not have one {dtype} input, as its metadata says. Export it again.")
    if [value.name for value in proto.graph.output] != [LOGITS]:
        raise CheckError(f"{label}: the graph's only output is not {LOGITS!r}. Export the run again.")
    return str(inputs[0].name)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
