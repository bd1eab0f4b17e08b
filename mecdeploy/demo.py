"""The whole pipeline on scikit-learn's handwritten digits: real images, no download, about a minute on two cores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from mecdeploy.training.config import DataConfig, MecConfig, ModelConfig, QuantConfig, ScheduleConfig, TrainConfig
from mecdeploy.training.events import Event

if TYPE_CHECKING:
    from mecdeploy.api import ExportReport
    from mecdeploy.runtime_checks import ParityReport
    from mecdeploy.runtime_checks.latency import LatencyReport
    from mecdeploy.training.loop import TrainResult

BATCHES = (1, 256)
"""Images per timed call: of 8x8 pixels, one image measures the cost of a call and many measure the kernels."""

LATENCY_ROUNDS = 200
"""Two seconds for all; the median of much fewer moves by more than a percent."""

CONFIG = TrainConfig(
    method="mec",
    device="cpu",
    data=DataConfig(name="digits"),
    model=ModelConfig(name="resnet8"),
    quant=QuantConfig(weight_bits=4, act_bits=4),
    mec=MecConfig(),
    schedule=ScheduleConfig(fp_epochs=12, epochs=8, frozen_epochs=2, batch_size=64),
)


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """fp32_size: bytes of the fp32 ONNX file. latency: images per call -> "fp32" and "quantized", on one thread."""

    training: TrainResult
    export: ExportReport
    parity: ParityReport
    fp32_size: int
    latency: dict[int, dict[str, LatencyReport]]


def run_demo(
    out: Path | None = None,
    *,
    config: TrainConfig = CONFIG,
    progress: Callable[[], AbstractContextManager[Callable[[Event], None] | None]] = nullcontext,
    say: Callable[[str], None] = lambda line: None,
) -> DemoResult:
    """Train, export, check and time. out: folder that keeps the run; without one it is temporary.

    progress: entered for the time of training, gives what is told of its events. say: told what comes next, in a few
    words. Errors as in mecdeploy.api.
    """
    from mecdeploy import api

    with ExitStack() as cleanup:
        folder = (
            out if out is not None else Path(cleanup.enter_context(TemporaryDirectory(prefix="mecdeploy-"))) / "run"
        )
        say(f"Handwritten digits: {config.model.name}, method {config.method}, {_widths(config)}")
        with _one_thread(), progress() as report:
            training = api.train(config, folder, report=report)
        say("Exporting")
        exported = api.export(folder)
        say("Checking: PyTorch, onnxruntime and a numpy interpreter of the file")
        parity = api.check(folder)
        say("Timing against full precision")
        fp32_size, latency = _compare_with_float(folder, exported.path)
    return DemoResult(training=training, export=exported, parity=parity, fp32_size=fp32_size, latency=latency)


def _widths(config: TrainConfig) -> str:
    return f"W{config.quant.weight_bits}A{config.quant.act_bits}"


@contextmanager
def _one_thread() -> Iterator[None]:
    """On 8x8 images a second thread waits more than it works, and on a busy machine it makes training crawl."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _compare_with_float(run: Path, model: Path) -> tuple[int, dict[int, dict[str, LatencyReport]]]:
    import torch

    from mecdeploy.float_baseline import INPUT, float_onnx
    from mecdeploy.runtime_checks.latency import compare_latency
    from mecdeploy.training.run import load_run

    loaded = load_run(run)
    spec = loaded.spec
    full = float_onnx(loaded.float_model, channels=spec.channels, height=spec.height, width=spec.width)
    generator = torch.Generator().manual_seed(0)  # the time of a kernel does not depend on what it multiplies
    latency = {}
    for count in BATCHES:
        shape = (count, spec.channels, spec.height, spec.width)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        latency[count] = compare_latency(
            {"fp32": full, "quantized": model},
            {"fp32": {INPUT: spec.normalize(pixels).numpy()}, "quantized": {"pixels": pixels.numpy()}},
            rounds=LATENCY_ROUNDS,
        )
    return len(full), latency
