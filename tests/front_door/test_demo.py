"""The demo, on fewer epochs, and the full-precision file it compares with."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from mecdeploy.training.config import ModelConfig, ScheduleConfig


def test_the_demo_tells_the_whole_story(tmp_path: Path) -> None:
    from rich.console import Console

    from mecdeploy import tables
    from mecdeploy.demo import BATCHES, CONFIG, run_demo

    said: list[str] = []
    config = dataclasses.replace(CONFIG, schedule=ScheduleConfig(fp_epochs=1, epochs=1, frozen_epochs=1))
    result = run_demo(tmp_path / "run", config=config, say=said.append)
    assert result.parity.passed and result.parity.integers_different == 0
    assert result.fp32_size > 4 * result.export.size
    assert tuple(result.latency) == BATCHES
    assert said[0].endswith("W4A4") and len(said) == 4
    assert {"model.onnx", "parity.json", "run.toml"} <= {path.name for path in (tmp_path / "run").iterdir()}
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(tables.demo(result))
    console.file.close()
    shown = console.export_text()
    for words in ("accuracy", "integers compared", "integers different", "file against fp32", "time against fp32"):
        assert words in shown


def test_the_demo_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    from mecdeploy.demo import CONFIG, run_demo
    from mecdeploy.training.errors import TrainingError

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    config = dataclasses.replace(CONFIG, model=ModelConfig(name="resnet9"))
    with pytest.raises(TrainingError):
        run_demo(config=config)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "side"), [("resnet8", 8), ("mobilenet_v2", 32), ("resnet18", 80)])
def test_the_fp32_file_computes_what_pytorch_does(name: str, side: int) -> None:
    import torch

    from mecdeploy.float_baseline import INPUT, float_onnx
    from mecdeploy.training.models import build_model

    torch.manual_seed(0)
    model = build_model(ModelConfig(name=name), num_classes=5, channels=3, height=side, width=side)
    images = torch.randn(4, 3, side, side)
    with torch.no_grad():
        model.train()(images)  # statistics that are not 0 and 1
        expected = model.eval()(images).numpy()
    content = float_onnx(model, channels=3, height=side, width=side)
    session = ort.InferenceSession(content, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {INPUT: images.numpy()})
    # Folding and other orders of summation in float32: some 1e-6 per layer, of logits of order 1.
    np.testing.assert_allclose(logits, expected, atol=1e-3, rtol=1e-3)
    assert len(content) == pytest.approx(4 * sum(p.numel() for p in model.parameters()), rel=0.05)
