"""The Python API: what the README shows runs, and `import mecdeploy` costs nothing."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import mecdeploy
from mecdeploy.errors import UserError

README = Path(__file__).parents[2] / "README.md"


def test_the_readmes_ten_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert 0 < len([line for line in code.splitlines() if line.strip()]) <= 10
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    report = names["report"]
    assert report.passed and report.integers_different == 0  # type: ignore[attr-defined]


def test_importing_costs_nothing(environment: dict[str, str], tmp_path: Path) -> None:
    script = (
        "import sys, mecdeploy; mecdeploy.__version__; sys.exit(bool({'torch', 'numpy', 'click'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, timeout=60).returncode == 0


def test_every_public_name_is_there() -> None:
    for name in mecdeploy.__all__:
        assert getattr(mecdeploy, name) is not None
    assert set(mecdeploy.__all__) <= set(dir(mecdeploy))
    with pytest.raises(AttributeError, match="no attribute 'exprot'"):
        mecdeploy.exprot  # noqa: B018


@pytest.mark.parametrize("first", ["import mecdeploy.export.graph", "from mecdeploy import export", "import mecdeploy"])
def test_export_is_a_room_and_a_verb(environment: dict[str, str], tmp_path: Path, first: str) -> None:
    """Whichever is imported first, `mecdeploy.export` can be called and holds its modules."""
    script = (
        f"{first}\nimport mecdeploy, mecdeploy.errors\n"
        "assert callable(mecdeploy.export)\n"
        "import mecdeploy.export.graph as graph\n"
        "assert mecdeploy.export.graph is graph and mecdeploy.export.ExportConfig\n"
        "try:\n    mecdeploy.export('nowhere')\n"
        "except mecdeploy.errors.UserError as error:\n    print(error)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert found.stdout.startswith("nowhere does not exist"), found.stderr


def test_the_verbs_are_documented() -> None:
    for verb in (mecdeploy.train, mecdeploy.check, mecdeploy.predict, mecdeploy.prepare):
        assert inspect.getdoc(verb)
    assert inspect.signature(mecdeploy.export).parameters.keys() >= {"run", "bits", "target"}


def test_a_network_and_a_loop_of_ones_own(tmp_path: Path) -> None:
    import numpy as np
    import torch
    from torch import nn

    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    spec = mecdeploy.InputSpec.from_statistics(channels=3, height=9, width=7, mean=120.0, std=60.0)
    model = mecdeploy.prepare(network, mecdeploy.QuantConfig(weight_bits=2, act_bits=2, first_last_bits=2), spec)
    pixels = torch.randint(0, 256, (8, 3, 9, 7), dtype=torch.uint8)
    labels = torch.tensor([0, 1] * 4)
    mecdeploy.calibrate(model, [pixels])
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.01)
    nn.functional.cross_entropy(model(pixels), labels).backward()
    optimizer.step()

    exported = mecdeploy.export(model, out=tmp_path / "own.onnx", class_names=["ant", "bee"])
    assert set(exported.weight_bits.values()) == {2}
    images = pixels.numpy()
    report = mecdeploy.check(model, exported.path, images=images, labels=labels.numpy())
    assert report.passed and report.integers_compared > 0
    assert model.training, "neither call changes the network"
    Image.fromarray(images[0].transpose(1, 2, 0)).save(tmp_path / "insect.png")
    (prediction,) = mecdeploy.predict(exported.path, [tmp_path / "insect.png"])
    expected = torch.softmax(model.eval()(pixels[:1]).double(), 1)[0].detach().numpy()
    # The logits are the same float32; only softmax is worked out twice, in float64.
    np.testing.assert_allclose(prediction.probabilities, expected, rtol=1e-12)
    assert prediction.class_names == ("ant", "bee")

    with pytest.raises(UserError, match="give out="):
        mecdeploy.export(model)
    with pytest.raises(UserError, match="give the model file, images= and labels="):
        mecdeploy.check(model, exported.path)


def test_a_run_brings_its_own_images(run: Path) -> None:
    import numpy as np

    with pytest.raises(UserError, match="leave out images= and labels="):
        mecdeploy.check(run, images=np.zeros((1, 1, 8, 8), np.uint8), labels=np.zeros(1, np.int64))


def test_reports_reach_the_caller(tmp_path: Path) -> None:
    from mecdeploy.training.events import EpochEvent, Event

    events: list[Event] = []
    schedule = mecdeploy.ScheduleConfig(fp_epochs=1, epochs=1, frozen_epochs=0)
    config = mecdeploy.TrainConfig(method="lsq", device="cpu", schedule=schedule)
    result = mecdeploy.train(config, tmp_path / "run", report=events.append)
    assert [event.stage for event in events if isinstance(event, EpochEvent)] == ["fp32", "qat"]
    assert 0 <= result.accuracy <= 1
