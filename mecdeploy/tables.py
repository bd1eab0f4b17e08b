"""What the commands show when they are done: reports as tables for a terminal of 80 columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from mecdeploy.api import ExportReport
    from mecdeploy.demo import DemoResult
    from mecdeploy.runtime_checks import ParityReport
    from mecdeploy.training.loop import TrainResult
    from mecdeploy.training.sensitivity import Study
    from mecdeploy.training.sensitivity_bench import Sensitivity


def training(result: TrainResult, method: str) -> Table:
    """Accuracy of a run, or without labels how often it agrees with its teacher."""
    table = _table("", f"validation {result.measure}")
    table.add_row("full precision", _percent(result.accuracy_fp32))
    if method != "fp32":
        table.add_row(f"quantised ({method})", _percent(result.accuracy))
    return table


def export(report: ExportReport) -> Table:
    """What was written."""
    table = _table(str(report.path), "")
    table.add_row("size", _bytes(report.size))
    table.add_row("target", report.target)
    table.add_row("input", report.input)
    table.add_row("layers by weight bits", _count(report.weight_bits))
    table.add_row("tensors by activation bits", _count(report.activation_bits))
    if report.islands:
        operators = Counter(operator for island in report.islands.values() for operator in island)
        table.add_row("float islands", f"{len(report.islands)}: {_tally(operators)}")
    return table


def parity(report: ParityReport) -> Table:
    """What a check found."""
    table = _table("PyTorch, onnxruntime, numpy interpreter", "")
    table.add_row("integers compared", f"{report.integers_compared:,} ({report.exact_images} images)")
    table.add_row("integers different", f"{report.integers_different:,}")
    if report.first_different_unit is not None:
        table.add_row("first unit that differs", report.first_different_unit)
    table.add_row("... with the optimiser off", f"{report.optimizer_off.integers_different:,} (not promised)")
    if report.accuracy_torch is not None and report.accuracy_onnxruntime is not None:
        table.add_row("accuracy, PyTorch", f"{_percent(report.accuracy_torch)} ({report.images:,} images)")
        table.add_row("accuracy, onnxruntime", _percent(report.accuracy_onnxruntime))
        table.add_row("top-1 agreement", _percent(report.top1_agreement))
    else:
        table.add_row("accuracy", "unknown: the images have no labels")
        table.add_row("top-1 agreement", f"{_percent(report.top1_agreement)} ({report.images:,} images)")
    table.add_row("largest logit difference", f"{report.max_logit_difference:g}")
    table.add_row("convolutions and Gemms in float", f"{report.float_convolutions}")
    _add_islands(table, report)
    table.add_row("layers by weight bits", _count(report.packed_bits))
    table.add_row("processor", report.cpu.model)
    table.add_row("result", "passed" if report.passed else "FAILED", style="bold")
    return table


def _add_islands(table: Table, report: ParityReport) -> None:
    """Rows of a file that computes some operators in float; none for a file of integer kernels alone."""
    if report.exact_end_to_end:
        return
    operators = Counter(operator for island in report.islands for operator in island.operators)
    different, compared = (sum(getattr(row, key) for row in report.islands) for key in ("different", "compared"))
    table.add_row("float islands", f"{report.float_islands}: {_tally(operators)}")
    table.add_row("... integers quantised from them", f"{compared:,}, {different:,} differ")
    table.add_row("... float operators in onnxruntime", _tally(report.float_operators))


def sensitivity(study: Study) -> Table:
    """Cross entropy that each layer alone costs at each width, the most sensitive first, and the bits it is to have."""
    widths = sorted(study.layers[0].changes)
    table = _dense_table("layer", "weights", *(f"{bits} bits" for bits in widths), "bits")
    for layer in _most_sensitive_first(study.layers):
        table.add_row(layer.name, f"{layer.weights:,}", *_costs(layer), str(study.bits[layer.name]))
    table.caption = (
        f"Increase of cross entropy (nats, mean ± standard error over {study.images:,} training images) with the "
        "weights of this layer alone at so many bits and all else at 8."
    )
    return table


def activation_sensitivity(study: Study) -> Table:
    """The same for what layers read."""
    table = _dense_table("output of", *(f"{bits} bits" for bits in sorted(study.activations[0].changes)))
    for activation in _most_sensitive_first(study.activations):
        table.add_row(activation.name, *_costs(activation))
    table.caption = "The same with this activation alone at so many bits, where layers read it."
    return table


def mixed_precision(study: Study) -> Table:
    """The proposed widths measured as a whole, beside the run's own and the uniform ones."""
    table = _dense_table("weights of all layers", "size", "cross entropy", "accuracy", "accuracy, points")
    full = study.float_score
    table.add_row("full precision", "", "", _percent(full.accuracy), "")
    for network in study.networks:
        change = network.change
        table.add_row(
            network.name,
            _bytes(network.size),
            _measured(change.cross_entropy, change.cross_entropy_error),
            _percent(network.score.accuracy),
            _measured(100 * change.accuracy, 100 * change.accuracy_error, digits=2),
            style="bold" if network is study.networks[0] else None,
        )
    table.caption = (
        f"Changes are from all at 8 bits, before any training at these widths. Budget: {_bytes(study.budget)}. "
        f"By the sum of its layers the proposal should cost {study.predicted:.3f}."
    )
    return table


def _most_sensitive_first(found: Sequence[Sensitivity]) -> list[Sensitivity]:
    """By the cost of the narrowest width."""
    return sorted(found, key=lambda one: -one.changes[min(one.changes)].cross_entropy)


def _costs(found: Sensitivity) -> list[str]:
    ordered = (found.changes[bits] for bits in sorted(found.changes))
    return [_measured(change.cross_entropy, change.cross_entropy_error) for change in ordered]


def demo(result: DemoResult) -> Table:
    """The pipeline's figures side by side."""
    report = result.parity
    table = _table("handwritten digits", "fp32", "PyTorch QAT", "onnxruntime")
    known = report.accuracy_torch or 0.0, report.accuracy_onnxruntime or 0.0  # digits have labels
    table.add_row("accuracy", *map(_percent, (result.training.accuracy_fp32, *known)))
    table.add_row("integers compared", "", "", f"{report.integers_compared:,}")
    table.add_row("integers different", "", "", f"{report.integers_different:,}")
    table.add_row("file", _bytes(result.fp32_size), "", _bytes(result.export.size))
    table.add_row("file against fp32", "1.00x", "", f"{result.export.size / result.fp32_size:.2f}x")
    for count, times in result.latency.items():
        fast, full = times["quantized"], times["fp32"]
        name = f"{count} image{'s' if count > 1 else ''}, 1 thread"
        table.add_row(name, f"{full.median * 1e6:.0f} us", "", f"{fast.median * 1e6:.0f} us")
        table.add_row("time against fp32", "1.00x", "", f"{fast.ratio_to(full):.2f}x")
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right" if len(others) > 1 else "left", overflow="fold")
    return table


def _dense_table(first: str, *others: str) -> Table:
    """One space between columns, so that many fit into 80."""
    table = _table(first, *others)
    table.padding, table.pad_edge, table.show_edge = (0, 1, 0, 0), False, False
    return table


def _count(bits: Mapping[str, int]) -> str:
    """2 bits: 17, 8 bits: 2."""
    return ", ".join(f"{width} bits: {count}" for width, count in sorted(Counter(bits.values()).items()))


def _tally(counts: Mapping[str, int], most: int = 8) -> str:
    """LayerNormalization 25, Softmax 12 and 2 other kinds; the most frequent first."""
    ordered = Counter(counts).most_common()
    shown = ", ".join(f"{name} {count}" for name, count in ordered[:most])
    return shown if len(ordered) <= most else f"{shown} and {len(ordered) - most} other kinds"


def _percent(share: float) -> str:
    return f"{share:.2%}"


def _measured(mean: float, error: float, digits: int = 3) -> str:
    """A mean and its standard error: 0.148 ±0.017. Never -0.000."""
    return f"{round(mean, digits) + 0.0:.{digits}f} ±{error:.{digits}f}"


def _bytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB" if size >= 1e6 else f"{size / 1e3:.1f} KB"
