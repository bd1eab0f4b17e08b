"""Files that were damaged after export: the check fails, and names the layer that was hit first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from quantized_runs import quantized_config

from mecdeploy import api
from mecdeploy.runtime_checks import CheckError

UNITS = ("conv1", "layer2.0.conv1", "layer3.0.downsample.0")


@pytest.fixture(scope="module", params=["onnxruntime", "portable"])
def exported(
    resnet8: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[Path, Path]:
    """A finished W4A4 run and its file."""
    out = tmp_path_factory.mktemp("damage") / "run"
    api.train(quantized_config(resnet8, 4, 4), out)
    return out, api.export(out, target=request.param).path


def initializer(model: onnx.ModelProto, *names: str) -> TensorProto:
    """The initialiser that has one of these names."""
    (found,) = (tensor for tensor in model.graph.initializer if tensor.name in names)
    return found


def stored_weight(model: onnx.ModelProto, unit: str) -> TensorProto:
    tensor = initializer(model, f"{unit}/weight", f"{unit}/weight/packed")
    assert tensor.raw_data
    return tensor


def one_weight(model: onnx.ModelProto, unit: str) -> None:
    """The lowest bit of the first weight."""
    tensor = stored_weight(model, unit)
    tensor.raw_data = bytes([tensor.raw_data[0] ^ 1]) + tensor.raw_data[1:]


def one_scale(model: onnx.ModelProto, unit: str) -> None:
    """The first channel's weight scale, 5% off."""
    change(model, f"{unit}/weight/scale", lambda scale: scale.__setitem__(0, scale[0] * np.float32(1.05)))


def one_bias(model: onnx.ModelProto, unit: str) -> None:
    """The first channel's bias, by some steps of the output."""
    change(model, f"{unit}/bias", lambda bias: bias.__setitem__(0, bias[0] + 500))


def swapped_channels(model: onnx.ModelProto, unit: str) -> None:
    """The weights of the first two output channels, whole bytes each."""
    tensor = stored_weight(model, unit)
    channels = len(numpy_helper.to_array(initializer(model, f"{unit}/bias")))
    row, rest = divmod(len(tensor.raw_data), channels)
    assert rest == 0
    first, second = tensor.raw_data[:row], tensor.raw_data[row : 2 * row]
    assert first != second
    tensor.raw_data = second + first + tensor.raw_data[2 * row :]


def one_step(model: onnx.ModelProto, unit: str) -> None:
    """The output's scale, 5% off."""
    change(model, f"{unit}/scale", lambda scale: np.multiply(scale, np.float32(1.05), out=scale))


def change(model: onnx.ModelProto, name: str, edit: Callable[[np.ndarray], object]) -> None:
    tensor = initializer(model, name)
    values = numpy_helper.to_array(tensor).copy()
    before = values.copy()
    edit(values)
    assert not np.array_equal(before, values)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("damage", [one_weight, one_scale, one_bias, swapped_channels, one_step])
def test_damage_is_found_where_it_is(
    exported: tuple[Path, Path], tmp_path: Path, damage: Callable[[onnx.ModelProto, str], None], unit: str
) -> None:
    run, path = exported
    model = onnx.load(path)
    damage(model, unit)
    onnx.save(model, tmp_path / "bad.onnx")
    report = api.check(run, tmp_path / "bad.onnx")
    assert not report.passed and report.integers_different > 0
    assert report.first_different_unit == unit
    assert any(unit in sentence for sentence in report.failures)


def test_the_undamaged_file_passes(exported: tuple[Path, Path]) -> None:
    assert api.check(*exported).passed


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(exported: tuple[Path, Path], tmp_path: Path, share: float) -> None:
    run, path = exported
    whole = path.read_bytes()
    (tmp_path / "short.onnx").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckError, match="short.onnx"):
        api.check(run, tmp_path / "short.onnx")
