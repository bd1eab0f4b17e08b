"""Gather the facts of a report: each from the room that measures it, of one file, on one set of images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mecdeploy import certificate as certificates
from mecdeploy import run_folder
from mecdeploy.run_report.answering import accuracy, answers, hear
from mecdeploy.run_report.counting import Counted, count_codes
from mecdeploy.run_report.facts import Certificate, Histogram, Latency, Layer, ReportFacts, Sizes, Value, Weights
from mecdeploy.run_report.layers import FileLayer, FileValue, layers_of
from mecdeploy.runtime_checks import StructureReport, compare_latency, inspect_structure, profile_kernels, read_model
from mecdeploy.runtime_checks.checks import images_at_once
from mecdeploy.runtime_checks.machine import describe_cpu

if TYPE_CHECKING:
    from mecdeploy.certificate import ValidationImages
    from mecdeploy.runtime_checks import ModelFile
    from mecdeploy.training.representation import CodeHistogram
    from mecdeploy.training.run import LoadedRun

LATENCY_ROUNDS, LATENCY_SECONDS = 20, 2.0
"""At least so many rounds, and for so long: of a small network a thousand, of ResNet-50 at 224x224 the fewest."""
PROFILED_RUNS = 30
"""Of several images where they are small: the profiler counts in whole microseconds."""

Progress = Callable[[str, int, int], None]


def gather(run: Path, model: Path | None, progress: Progress) -> ReportFacts:
    """Everything the page shows. Checks the file anew unless parity.json speaks of it as it is.

    Raises UserError for a folder that is no run or has no exported file, TrainingError for a run that has not finished
    or quantised nothing, CheckError for a file that is not ours.
    """
    folder = run_folder.require_run(run)
    from mecdeploy.training.run import load_run

    config = folder.read_config()
    loaded = load_run(folder.path, model_name=config.model.name)
    path = certificates.model_file(folder, model)
    file = read_model(path)
    shown = certificates.validation_images(config, loaded.class_names)
    certificate = _certificate(folder, loaded, path, shown, progress)
    heard = hear(file, loaded, shown, certificate, progress)
    structure = inspect_structure(file)
    found = layers_of(file)
    counted = count_codes(file, found, shown.images, lambda done, total: progress("codes", done, total))
    progress("latency", 0, 1)
    sizes, latency = _beside_full_precision(path, file, loaded, shown)
    profiled = np.asarray(shown.images[: images_at_once(*file.shape[1:])])
    time = profile_kernels(path, file.feed(profiled), runs=PROFILED_RUNS).layers
    progress("latency", 1, 1)
    return ReportFacts(
        run=str(run),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        network=config.model.name,
        method=config.method,
        data=config.data.name,
        seed=config.seed,
        classes=loaded.class_names,
        input_shape=file.shape,
        input_dtype=file.input_dtype,
        target=file.target,
        model=str(path),
        accuracy=accuracy(heard, shown),
        certificate=certificate,
        sizes=sizes,
        latency=latency,
        history=tuple(folder.metrics.read() or loaded.metrics["history"]),
        layers=_layers(found, structure, counted, loaded, time),
        codes_images=counted.images,
        timed_images=len(profiled),
        kernels=structure.kernels,
        answers=answers(heard, shown, len(loaded.class_names)),
        settings=(folder.path / run_folder.CONFIG).read_text(encoding="utf-8"),
        processor=describe_cpu().model,
        versions=certificates.versions_here(),
    )


def _certificate(
    folder: run_folder.RunFolder, loaded: LoadedRun, path: Path, shown: ValidationImages, progress: Progress
) -> Certificate:
    found = certificates.standing_certificate(folder, loaded, path, shown)
    if found is None:
        certificates.certify(folder, loaded, path, shown, progress)
        found = certificates.standing_certificate(folder, loaded, path, shown)
        assert found is not None
    islands: list[dict[str, Any]] = found["islands"]
    return Certificate(
        passed=found["passed"],
        failures=tuple(found["failures"]),
        date=found["date"],
        images=found["images"],
        exact_images=found["exact_images"],
        integers_compared=found["integers_compared"],
        integers_different=found["integers_different"],
        first_different_unit=found["first_different_unit"],
        max_logit_difference=found["max_logit_difference"],
        exact_end_to_end=found["exact_end_to_end"],
        island_integers_compared=sum(island["compared"] for island in islands),
        island_integers_different=sum(island["different"] for island in islands),
        processor=found["cpu"]["model"],
        architecture=found["cpu"]["architecture"],
        processor_note=found["cpu"]["note"],
        versions=found["versions"],
        model_sha256=found["model_sha256"],
        checkpoint_sha256=found["checkpoint_sha256"],
        images_sha256=found["images_sha256"],
    )


def _beside_full_precision(
    path: Path, file: ModelFile, loaded: LoadedRun, shown: ValidationImages
) -> tuple[Sizes, Latency | None]:
    """Size and time of both networks as ONNX; of one alone where torch.onnx cannot write full precision."""
    import torch

    from mecdeploy.export.errors import ExportError
    from mecdeploy.float_baseline import INPUT, float_onnx

    spec = loaded.spec
    try:
        full = float_onnx(loaded.float_model, channels=spec.channels, height=spec.height, width=spec.width)
    except ExportError:
        return Sizes(file=file.size, full_precision=None), None
    image = np.asarray(shown.images[:1])
    timed = compare_latency(
        {"quantized": path, "full_precision": full},
        {"quantized": file.feed(image), "full_precision": {INPUT: spec.normalize(torch.from_numpy(image)).numpy()}},
        rounds=LATENCY_ROUNDS,
        seconds=LATENCY_SECONDS,
    )
    quantized, plain = timed["quantized"], timed["full_precision"]
    return Sizes(file=file.size, full_precision=len(full)), Latency(
        quantized=quantized.median,
        full_precision=plain.median,
        ratio=quantized.ratio_to(plain),
        rounds=len(quantized.rounds),
    )


def _layers(
    found: list[FileLayer],
    structure: StructureReport,
    counted: Counted,
    loaded: LoadedRun,
    time: Mapping[str, float],
) -> tuple[Layer, ...]:
    """The file's layers with everything that was measured of them. time: layer -> share."""
    from mecdeploy.training.representation import weight_histograms

    trained = {histogram.name: histogram for histogram in weight_histograms(loaded.model)}
    reasons = {island.name: island.reason for island in structure.islands}
    return tuple(
        Layer(
            name=layer.name,
            kernel=layer.kernel,
            reads=tuple(layer.reads),
            island=layer.island,
            reason=reasons.get(layer.name, ""),
            weights=_weights(layer, structure, trained.get(layer.name)),
            values=tuple(_value(value, counted) for value in layer.values),
            time=_time(layer, time),
        )
        for layer in found
    )


def _time(layer: FileLayer, shares: Mapping[str, float]) -> float | None:
    """Of its nodes, and of the QuantizeLinear behind a float island, which is called by the value that it makes."""
    found = [shares[name] for name in {layer.name, *(value.tensor for value in layer.values)} if name in shares]
    return sum(found) if found else None


def _weights(layer: FileLayer, structure: StructureReport, trained: CodeHistogram | None) -> Weights | None:
    """Codes counted in the file, on the levels that the trained quantiser has."""
    if layer.product is None:
        return None
    stored = next(row for row in structure.weights if row.unit == layer.name)
    total = sum(row.bytes + row.table_bytes for row in structure.weights)
    codes = layer.product.weight.reshape(-1)
    levels = np.unique([*codes, *(trained.codes if trained is not None else ())])
    counts = np.bincount(np.searchsorted(levels, codes), minlength=len(levels))
    bits = stored.bits if trained is None else trained.bits
    return Weights(
        count=stored.weights,
        bytes=stored.bytes + stored.table_bytes,
        bits=stored.bits,
        trained_bits=bits,
        smallest_scale=float(layer.product.weight_scale.min()),
        largest_scale=float(layer.product.weight_scale.max()),
        share=(stored.bytes + stored.table_bytes) / total,
        histogram=_histogram(bits, tuple(map(int, levels)), tuple(map(int, counts))),
    )


def _value(value: FileValue, counted: Counted) -> Value:
    codes = tuple(range(value.lowest, value.highest + 1))
    counts = counted.counts.get(value.tensor)
    bits = value.highest.bit_length()
    return Value(
        name=value.tensor,
        bits=bits,
        scale=value.scale,
        zero_point=value.zero_point,
        lowest=value.lowest,
        highest=value.highest,
        shape=counted.shapes[value.tensor],
        histogram=None if counts is None else _histogram(bits, codes, tuple(counts[list(codes)].tolist())),
    )


def _histogram(bits: int, codes: tuple[int, ...], counts: tuple[int, ...]) -> Histogram:
    import torch

    from mecdeploy.training.representation import code_use

    use = code_use("", bits, torch.tensor(counts))
    return Histogram(
        bits=bits,
        codes=codes,
        counts=counts,
        entropy=use.entropy,
        levels=use.levels,
        lowest=use.lowest,
        highest=use.highest,
    )
