"""What an inspection found, as tables for a terminal of 80 columns."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.table import Table

from mecdeploy.tables import _bytes, _count, _dense_table, _table, _tally

if TYPE_CHECKING:
    from mecdeploy.runtime_checks.inspection_report import (
        FloatIsland,
        InspectionReport,
        Port,
        Promises,
        Quantization,
        Weights,
    )

_PORTS, _TENSORS, _NAMES, _REASONS = 4, 8, 2, 4


def everything(report: InspectionReport) -> Iterator[Table]:
    """The file, its layers, what onnxruntime keeps in float and why, and where the bytes go."""
    yield file(report)
    if report.layers:
        yield layers(report)
        if any(layer.weights.scale is not None or layer.input is not None for layer in report.layers):
            yield scales(report)
    if report.runtime.islands:
        yield islands(report)
    yield size(report)


def file(report: InspectionReport) -> Table:
    """What the file is, and what onnxruntime makes of it."""
    facts, runtime = report.file, report.runtime
    table = _table("", "")
    table.show_header = False
    table.add_row("file", facts.path)
    beside = f", and {_bytes(facts.external_bytes)} in files beside it" if facts.external_bytes else ""
    table.add_row("size", f"{_bytes(facts.bytes)}{beside}")
    table.add_row("written by", facts.producer or "unknown")
    opsets = ", ".join(f"{domain} {version}" for domain, version in facts.opsets.items())
    table.add_row("opset", f"{opsets} (IR {facts.ir_version})")
    for name, ports in (("input", facts.inputs), ("output", facts.outputs)):
        for port in ports[:_PORTS]:
            table.add_row(name, _port(port))
        if len(ports) > _PORTS:
            table.add_row("", f"and {len(ports) - _PORTS} more")
    table.add_row("weights and biases", f"{facts.parameters:,} in {len(report.layers)} layers")
    if report.metadata is not None:
        _add_metadata(table, report.metadata)
    if runtime.error is not None:
        table.add_row(f"onnxruntime {runtime.version}", f"refuses it: {runtime.error}", style="bold")
        return table
    table.add_row(f"onnxruntime {runtime.version}", _products(report))
    table.add_row("... runs", _tally(runtime.kernels))
    return table


def layers(report: InspectionReport) -> Table:
    """One row for each layer with weights."""
    table = _dense_table("layer", "kernel", "weights", "levels", "bytes", "input", "output")
    for column in table.columns[1:]:
        column.no_wrap = True
    for layer in report.layers:
        table.add_row(
            layer.name,
            layer.kernel or ("?" if report.runtime.error is not None else "fused away"),
            _weights(layer.weights),
            "" if layer.weights.levels is None else f"{layer.weights.levels:,}",
            f"{layer.weights.bytes + layer.weights.table_bytes:,}",
            _codes(layer.input),
            _codes(layer.output),
            style="bold" if layer.arithmetic in ("float", "mixed") else None,
        )
    table.caption_justify = "left"
    table.caption = (
        "Weights as they are stored; in brackets the bits that their values need, if fewer. Input and output: u4 is "
        "unsigned with 4 bits, s8 signed. Bold: no integer kernel."
    )
    return table


def scales(report: InspectionReport) -> Table:
    """Scales and zero points of each layer."""
    table = _dense_table("layer", "weight scale", "input scale", "output scale")
    for column in table.columns[1:]:
        column.no_wrap = True
    for layer in report.layers:
        weights = layer.weights
        per = f"{weights.per} " if weights.per is not None else ""
        table.add_row(
            layer.name,
            f"{per}{_range(weights.scale)}{_zero(weights.zero_point)}",
            _scale(layer.input),
            _scale(layer.output),
        )
    table.caption_justify = "left"
    table.caption = (
        "Weights have one scale, or one for each channel or block: smallest..largest. z: zero point, if not 0."
    )
    return table


def islands(report: InspectionReport) -> Table:
    """Float islands, those of the same operators and the same kinds of reasons in one row."""
    groups: dict[object, list[FloatIsland]] = defaultdict(list)
    for island in report.runtime.islands:
        kinds = frozenset(reason.kind for reason in island.reasons)
        groups[(tuple(sorted(island.kernels.items())), kinds)].append(island)
    table = _dense_table("in float", "where", "why")
    for column, width in zip(table.columns, (20, 24, None), strict=True):
        column.justify, column.max_width = "left", width
    for alike in groups.values():
        first = alike[0]
        reasons = [f"{reason.what} [{reason.kind}]" for reason in first.reasons]
        more = f"; and {len(reasons) - _REASONS} more" if len(reasons) > _REASONS else ""
        times = f"{len(alike)} times " if len(alike) > 1 else ""
        nodes = list(first.nodes[:_NAMES])
        hidden = sum(len(island.nodes) for island in alike) - len(nodes)
        where = ", ".join(nodes) + (f" and {hidden} more" if hidden else "")
        table.add_row(f"{times}{_tally(first.kernels)}", where, "; ".join(reasons[:_REASONS]) + more)
    return table


def size(report: InspectionReport) -> Table:
    """Bytes by tensor, the largest first; the last row is the file and all that is beside it."""
    facts = report.file
    table = _dense_table("constant", "type", "shape", "bytes", "of all")
    total = facts.bytes + facts.external_bytes
    shown = facts.tensors[:_TENSORS]
    for tensor in shown:
        name = tensor.name if tensor.external is None else f"{tensor.name} (in {tensor.external})"
        shape = "x".join(map(str, tensor.shape)) or "1"
        table.add_row(name, tensor.dtype, shape, f"{tensor.bytes:,}", _share(tensor.bytes, total))
    rest = facts.tensors[len(shown) :]
    others = [(f"{len(rest):,} smaller constants", sum(tensor.bytes for tensor in rest))] if rest else []
    others += [("metadata", facts.metadata_bytes)] if facts.metadata_bytes else []
    others += [("graph: nodes, names, shapes", facts.graph_bytes)]
    for name, count in others:
        table.add_row(name, "", "", f"{count:,}", _share(count, total))
    table.add_row("all", "", "", f"{total:,}", "", style="bold")
    return table


def _add_metadata(table: Table, promises: Promises) -> None:
    """What mecdeploy wrote into a file of its own."""
    if promises.target is not None:
        table.add_row("export target", promises.target)
    if promises.classes is not None:
        table.add_row("class names", str(promises.classes))
    if promises.input is not None:
        contract = promises.input
        sizes = "x".join(str(contract.get(key, "?")) for key in ("channels", "height", "width"))
        table.add_row("image", f"{contract.get('color', '?')} {sizes}, {contract.get('dtype', '?')}")
    for name, bits in (("weights", promises.weight_bits), ("activations", promises.activation_bits)):
        if bits:
            table.add_row(f"promised {name}", _count(bits))
    if promises.checkpoint_sha256 is not None:
        table.add_row("checkpoint", promises.checkpoint_sha256[:16])


def _products(report: InspectionReport) -> str:
    runtime = report.runtime
    integer, mixed, floating = map(len, (runtime.integer_products, runtime.mixed_products, runtime.float_products))
    text = f"{integer} of {integer + mixed + floating} convolutions and products in integers"
    return text + (f", {mixed} scaled in float around them" if mixed else "")


def _weights(weights: Weights) -> str:
    storage = f"table {weights.stored_bits}" if weights.storage == "table" else weights.storage
    used = weights.used_bits
    return storage if used is None or used >= weights.stored_bits else f"{storage} ({used})"


def _codes(stored: Quantization | None) -> str:
    if stored is None:
        return "float"
    return f"{'s' if stored.dtype.startswith('int') else 'u'}{stored.bits}"


def _scale(stored: Quantization | None) -> str:
    if stored is None:
        return ""
    return f"{'computed' if stored.scale is None else _range(stored.scale)}{_zero(stored.zero_point)}"


def _range(ends: tuple[float, float] | None) -> str:
    if ends is None:
        return ""
    low, high = ends
    return f"{low:.2g}" if low == high else f"{low:.2g}..{high:.2g}"


def _zero(ends: tuple[int, int] | None) -> str:
    if ends is None or ends == (0, 0):
        return ""
    low, high = ends
    return f" z{low}" if low == high else f" z{low}..{high}"


def _port(port: Port) -> str:
    if port.shape is None:
        return f"{port.name}: {port.dtype}"
    return f"{port.name}: {port.dtype} [{', '.join('?' if size is None else str(size) for size in port.shape)}]"


def _share(part: int, total: int) -> str:
    return f"{part / total:.1%}"
