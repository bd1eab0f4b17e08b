"""Requests and answers of the Open Inference Protocol over HTTP, as bytes: no server, no model is needed here.

Source: Open Inference Protocol (KServe's "V2"), HTTP/REST; its binary tensor data extension.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from numpy.typing import NDArray

from mecdeploy.serving.errors import Refusal
from mecdeploy.serving.tensors import TensorSpec, from_bytes, from_json, to_bytes

HEADER_LENGTH = "Inference-Header-Content-Length"
EXTENSIONS = ("binary_tensor_data", "model_repository(index)")
_MOST_LISTS = 200_000
"""Lists and objects of a request: in memory each is thirty times its two bytes, and the process deaf meanwhile."""
_SHARED_MEMORY = frozenset({"shared_memory_region", "shared_memory_byte_size", "shared_memory_offset"})


@dataclass(frozen=True, kw_only=True)
class InferRequest:
    """What a client asks for. outputs: (name, whether as bytes), in the order of the answer."""

    id: str | None
    arrays: dict[str, NDArray[Any]]
    outputs: tuple[tuple[TensorSpec, bool], ...]


def parse(
    body: bytes, header_length: str | None, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> InferRequest:
    """The request in a body, its tensors checked against the model's. Raises Refusal, with the name of what is wrong.

    header_length: the value of the header of this name: the JSON is the body's first bytes, the others are tensors.
    """
    length = _header_length(header_length, len(body))
    request = _object(_load(body[:length]), "the request")
    parameters = _parameters(request, "the request")
    binary = _flag(parameters, "binary_data_output", "the request", default=False)
    identity = request.get("id")
    if identity is not None and not isinstance(identity, str):
        raise Refusal(400, "the request's id must be a string.")
    return InferRequest(
        id=identity,
        arrays=_inputs(request.get("inputs"), memoryview(body)[length:], inputs),
        outputs=_outputs(request.get("outputs"), outputs, binary),
    )


def answer(
    request: InferRequest, model: str, version: str, arrays: Mapping[str, NDArray[Any]]
) -> tuple[bytes, dict[str, str]]:
    """The body of an answer, and its headers."""
    described, tail = [], []
    for spec, binary in request.outputs:
        array = arrays[spec.name]
        entry: dict[str, Any] = {"name": spec.name, "datatype": spec.datatype, "shape": list(array.shape)}
        if binary:
            tail.append(to_bytes(spec, array))
            entry["parameters"] = {"binary_data_size": len(tail[-1])}
        else:
            entry["data"] = array.ravel().tolist()
        described.append(entry)
    content: dict[str, Any] = {"model_name": model, "model_version": version, "outputs": described}
    if request.id is not None:
        content["id"] = request.id
    try:
        header = json.dumps(content, allow_nan=False).encode()
    except ValueError:
        raise Refusal(500, "the answer holds a value that JSON cannot hold; ask for it as binary data.") from None
    if not tail:
        return header, {"content-type": "application/json"}
    return b"".join((header, *tail)), {"content-type": "application/octet-stream", HEADER_LENGTH: str(len(header))}


def _header_length(value: str | None, size: int) -> int:
    if value is None:
        return size
    if not (value.isascii() and value.isdigit() and len(value) < 20) or int(value) > size:
        raise Refusal(
            400, f"{HEADER_LENGTH} is {value[:40]!r}; it must be a number of at most {size}, the body's size."
        )
    return int(value)


def _load(content: bytes) -> object:
    if content.count(b"[") + content.count(b"{") > _MOST_LISTS:
        raise Refusal(400, f"the request has over {_MOST_LISTS} lists and objects; send tensors flat, or as bytes.")
    try:
        return json.loads(content, parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise Refusal(400, "the request is no JSON: it is not UTF-8.") from None
    except ValueError as error:  # among them the digits of an integer that Python does not convert
        raise Refusal(400, f"the request is no JSON: {error}.") from None
    except RecursionError:
        raise Refusal(400, "the request is nested too deeply.") from None


def _refuse_constant(name: str) -> NoReturn:
    raise Refusal(400, f"the request holds {name}, which is no JSON; tensors must be finite.")


def _inputs(given: object, tail: memoryview, specs: Sequence[TensorSpec]) -> dict[str, NDArray[Any]]:
    known = {spec.name: spec for spec in specs}
    arrays: dict[str, NDArray[Any]] = {}
    used = 0
    for entry in _objects(given, "inputs"):
        spec = known[_name(entry, known, "input")]
        what = f"input {spec.name!r}"
        if spec.name in arrays:
            raise Refusal(400, f"{what} is given twice.")
        shape = spec.check(entry.get("datatype"), entry.get("shape"))
        parameters = _parameters(entry, what)
        size = parameters.get("binary_data_size")
        if size is None:
            arrays[spec.name] = from_json(spec, shape, entry.get("data"))
            continue
        if "data" in entry:
            raise Refusal(400, f"{what} has both data and binary_data_size; give one.")
        if type(size) is not int or not 0 <= size <= len(tail) - used:
            raise Refusal(
                400,
                f"{what} has binary_data_size {repr(size)[:40]}; {len(tail) - used} bytes follow (is the header "
                f"{HEADER_LENGTH} right?).",
            )
        arrays[spec.name] = from_bytes(spec, shape, tail[used : used + size])
        used += size
    missing = [name for name in known if name not in arrays]
    if missing:
        raise Refusal(400, f"input {missing[0]!r} is missing; the model reads {_listed(known)}.")
    if used != len(tail):
        raise Refusal(400, f"{len(tail) - used} bytes of the body belong to no input.")
    rows = {len(arrays[spec.name]) for spec in specs if spec.shape}
    if len(rows) > 1 and all(spec.shape and spec.shape[0] < 0 for spec in specs):
        raise Refusal(400, f"the inputs have {' and '.join(map(str, sorted(rows)))} rows; all must have as many.")
    return arrays


def _outputs(given: object, specs: Sequence[TensorSpec], binary: bool) -> tuple[tuple[TensorSpec, bool], ...]:
    if given is None or given == []:
        return tuple((spec, binary) for spec in specs)
    known = {spec.name: spec for spec in specs}
    asked: dict[str, tuple[TensorSpec, bool]] = {}
    for entry in _objects(given, "outputs"):
        name = _name(entry, known, "output")
        if name in asked:
            raise Refusal(400, f"output {name!r} is asked for twice.")
        parameters = _parameters(entry, f"output {name!r}")
        if "classification" in parameters:
            raise Refusal(
                400, f"output {name!r}: classification is not offered; /v1/models/.../classify names classes."
            )
        asked[name] = known[name], _flag(parameters, "binary_data", f"output {name!r}", default=binary)
    return tuple(asked.values())


def _object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Refusal(400, f"{what} must be a JSON object.")
    return value


def _objects(value: object, what: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise Refusal(400, f"the request needs {what}, a list of objects.")
    return [_object(entry, f"each entry of {what}") for entry in value]


def _name(entry: Mapping[str, Any], known: Mapping[str, TensorSpec], what: str) -> str:
    name = entry.get("name")
    if not isinstance(name, str) or name not in known:
        raise Refusal(400, f"there is no {what} {str(name)[:80]!r}; the model has {_listed(known)}.")
    return name


def _parameters(entry: Mapping[str, Any], what: str) -> dict[str, Any]:
    parameters = _object(entry.get("parameters", {}), f"parameters of {what}")
    if not _SHARED_MEMORY.isdisjoint(parameters):
        raise Refusal(400, f"{what} is in shared memory, which this server does not use; send it in the body.")
    return parameters


def _flag(parameters: Mapping[str, Any], name: str, what: str, *, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise Refusal(400, f"{what}: {name} must be true or false.")
    return value


def _listed(known: Mapping[str, TensorSpec]) -> str:
    return ", ".join(repr(name) for name in known)
