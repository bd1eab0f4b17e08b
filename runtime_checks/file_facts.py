"""What an ONNX file holds, whoever wrote it: its ends, its operators, and where its bytes go."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from onnx import AttributeProto, TensorProto, external_data_helper

from mecdeploy.runtime_checks.errors import CheckError
from mecdeploy.runtime_checks.inspection_report import FileFacts, Port, Promises, TensorBytes

_PREFIX = "mecdeploy."
_READERS = 3


def facts(path: Path, size: int, proto: onnx.ModelProto) -> FileFacts:
    """The file as it lies on the disk, data beside it not read. size: of the file itself. It counts no parameters."""
    tensors = tuple(sorted(_tensors(proto.graph), key=lambda tensor: -tensor.bytes))
    inside = sum(tensor.bytes for tensor in tensors if tensor.external is None)
    metadata = sum(entry.ByteSize() for entry in proto.metadata_props)
    constants = {tensor.name for tensor in proto.graph.initializer}
    return FileFacts(
        path=str(path),
        bytes=size,
        external_bytes=sum(tensor.bytes for tensor in tensors if tensor.external is not None),
        tensor_bytes=inside,
        metadata_bytes=metadata,
        graph_bytes=size - inside - metadata,
        ir_version=proto.ir_version,
        opsets={entry.domain or "ai.onnx": entry.version for entry in proto.opset_import},
        producer=" ".join(part for part in (proto.producer_name, proto.producer_version) if part),
        nodes=len(proto.graph.node),
        operators=dict(Counter(node.op_type for node in proto.graph.node).most_common()),
        inputs=tuple(_port(value) for value in proto.graph.input if value.name not in constants),
        outputs=tuple(map(_port, proto.graph.output)),
        parameters=0,
        tensors=tensors,
    )


def read_external(path: Path, proto: onnx.ModelProto) -> None:
    """Bring data that lies in files beside the model into it."""
    try:
        external_data_helper.load_external_data_for_model(proto, str(path.parent))
    except Exception as error:  # onnx raises a class of its own for each fault, an unreadable file among them
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckError(
            f"{path}: its external data cannot be read ({first}). Keep the files it came with beside it."
        ) from None


def promises(proto: onnx.ModelProto) -> Promises | None:
    """Mecdeploy's own metadata; what cannot be read of it is None."""
    found = {
        entry.key.removeprefix(_PREFIX): entry.value for entry in proto.metadata_props if entry.key.startswith(_PREFIX)
    }
    if not found:
        return None
    islands = _json(found.get("islands"), dict)
    classes = _json(found.get("class_names"), list)
    return Promises(
        target=found.get("target"),
        classes=None if classes is None else len(classes),
        input=_json(found.get("input"), dict),
        weight_bits=_json(found.get("weight_bits"), dict),
        activation_bits=_json(found.get("activation_bits"), dict),
        checkpoint_sha256=found.get("checkpoint_sha256"),
        islands=None if islands is None else {name: _reason(entry) for name, entry in islands.items()},
    )


def _tensors(graph: onnx.GraphProto) -> Iterator[TensorBytes]:
    """Initialisers and the values of Constant nodes, those of subgraphs too."""
    readers: dict[str, list[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(" ".join(filter(None, (node.op_type, node.name))))
    for tensor in graph.initializer:
        yield _measured(tensor, tensor.name, readers)
    for sparse in graph.sparse_initializer:
        yield _measured(sparse.values, sparse.values.name, readers)
        yield _measured(sparse.indices, f"{sparse.values.name} (indices)", readers)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                yield _measured(attribute.t, node.output[0] if node.output else node.name, readers)
            elif attribute.type == AttributeProto.GRAPH:
                yield from _tensors(attribute.g)


def _measured(tensor: TensorProto, name: str, readers: dict[str, list[str]]) -> TensorBytes:
    external = None
    if tensor.data_location == TensorProto.EXTERNAL:
        told = {entry.key: entry.value for entry in tensor.external_data}
        external, size = told.get("location", ""), int(told.get("length", 0)) or _full_size(tensor)
    else:
        size = len(tensor.raw_data) if tensor.HasField("raw_data") else _fields_size(tensor)
    return TensorBytes(
        name=name,
        dtype=_dtype(tensor.data_type),
        shape=tuple(tensor.dims),
        bytes=size,
        external=external,
        read_by=tuple(readers.get(name, ())[:_READERS]),
    )


def _fields_size(tensor: TensorProto) -> int:
    """Bytes of values that are written one by one, as protobuf's numbers, instead of as raw data."""
    bare = TensorProto(data_type=tensor.data_type, name=tensor.name, dims=tensor.dims)
    return int(tensor.ByteSize() - bare.ByteSize())


def _full_size(tensor: TensorProto) -> int:
    """Bytes of all values where the file does not say how many it took."""
    bits = 4 if tensor.data_type in (TensorProto.INT4, TensorProto.UINT4) else 0
    bits = bits or 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return int(-(-math.prod(tensor.dims) * bits // 8))


def _port(value: onnx.ValueInfoProto) -> Port:
    kind = value.type.WhichOneof("value") or "unknown"
    if kind != "tensor_type":
        return Port(name=value.name, dtype=kind.removesuffix("_type"), shape=None)
    tensor = value.type.tensor_type
    sizes: list[int | str | None] = []
    for size in tensor.shape.dim:
        sizes.append(size.dim_value if size.HasField("dim_value") else size.dim_param or None)
    return Port(
        name=value.name,
        dtype=_dtype(tensor.elem_type),
        shape=tuple(sizes) if tensor.HasField("shape") else None,
    )


def _reason(island: Any) -> str:
    return str(island.get("reason", "")) if isinstance(island, dict) else ""


def _dtype(kind: int) -> str:
    """The name that numpy has for an element type: float32, where ONNX says FLOAT."""
    if kind not in TensorProto.DataType.values():
        return f"type {kind}"
    name = TensorProto.DataType.Name(kind).lower()
    return {"float": "float32", "double": "float64"}.get(name, str(name))


def _json(text: str | None, kind: type) -> Any:
    try:
        found = json.loads(text) if text is not None else None
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, kind) else None
