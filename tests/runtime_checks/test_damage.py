"""A damaged copy of a file is caught, whatever was damaged, and the unit is named. The reference is the undamaged file.

A comparison over images sees what the images use: damage to a weight whose input is always zero changes nothing, and
passes. So these tests damage what is alive, and the last one says that nothing but such damage can pass.
"""

import numpy as np
import pytest
from onnx import helper
from qdq_models import Builder, images, initializer, replace, residual_network, to_logits, value_of
from qdq_storage import STORAGES
from qdq_units import mobile_network
from references import Undamaged

from mecdeploy.runtime_checks import CheckError, check_model, read_model
from mecdeploy.runtime_checks.runtime import Runtime

SOURCES = {
    "stem": "pixels",
    "narrow": "pixels",
    "block.conv1": "narrow",
    "block.conv2": "block.conv1",
    "depthwise": "block.add/act",
    "grouped": "depthwise",
    "short": "block.add/skip",
    "hidden": "flat",
    "logits": "hidden",
}
"""Unit -> the tensor it reads, in execution order."""


def weights_of(unit):
    return f"{'classifier' if unit == 'logits' else unit}/weight"


@pytest.fixture(scope="module")
def pixels():
    return images(5, 24)


def check(damaged, undamaged, pixels, **options):
    labels = np.zeros(len(pixels), np.int64)
    return check_model(damaged.SerializeToString(), pixels, labels, Undamaged(undamaged), **options)


def assert_caught(report, unit):
    assert not report.passed
    assert report.first_different_unit == unit
    assert report.failures[0].startswith(f"{unit} is the first unit that differs: ")
    assert report.integers_different + report.logits_different > 0
    json = report.to_json()
    assert (json["passed"], json["first_different_unit"]) == (False, unit)


def test_the_undamaged_file_passes(pixels):
    model = residual_network()
    report = check(model, model, pixels)
    assert report.passed and report.failures == ()
    assert (report.integers_different, report.logits_different, report.first_different_unit) == (0, 0, None)


@pytest.mark.parametrize("storage", STORAGES)
def test_one_weight_by_one_step(storage, pixels):
    """The lowest bit of one stored code, in a unit in the middle of the network."""
    model, damaged = (residual_network(storage=storage) for _ in range(2))
    stored = "block.conv1/weight" + ("" if storage == "int8" else "/packed")
    tensor = initializer(damaged, stored)
    data = bytearray(tensor.raw_data)
    data[4] ^= 1
    tensor.raw_data = bytes(data)
    report = check(damaged, model, pixels)
    assert_caught(report, "block.conv1")
    (row,) = [row for row in report.units if row.name == "block.conv1"]
    assert row.onnxruntime_vs_interpreter == 0
    assert row.torch_vs_onnxruntime == row.torch_vs_interpreter == row.different > 0
    assert "the file holds another weight, scale or bias than the trained network" in report.failures[0]


def live_weight(model, unit, pixels):
    """Index of a weight between the input and the output channel of a unit that vary most over the images."""
    source = SOURCES[unit]
    values = Undamaged(model).integers(pixels) | {"pixels": pixels}
    activity = {
        name: np.moveaxis(values[name], 1, 0).reshape(values[name].shape[1], -1).std(axis=1) for name in (source, unit)
    }
    weight = value_of(model, weights_of(unit))
    output = int(activity[unit].argmax())
    fan_in, groups = weight.shape[1], len(activity[source]) // weight.shape[1]
    first = output // (weight.shape[0] // groups) * fan_in
    place = [output, int(activity[source][first : first + fan_in].argmax())]
    return tuple(place + [size // 2 for size in weight.shape[2:]])


@pytest.mark.parametrize("unit", SOURCES)
def test_one_weight_of_any_unit(unit, pixels):
    model, damaged = (residual_network(storage="int8") for _ in range(2))
    weight = value_of(damaged, weights_of(unit))
    weight[live_weight(model, unit, pixels)] ^= 2
    replace(damaged, weights_of(unit), weight)
    assert_caught(check(damaged, model, pixels), unit)


@pytest.mark.parametrize("unit", SOURCES)
def test_one_bias_of_any_unit(unit, pixels):
    model, damaged = (residual_network() for _ in range(2))
    name = weights_of(unit).replace("weight", "bias")
    bias = value_of(damaged, name)
    bias[2] += 1 + abs(bias[2]) // 8
    replace(damaged, name, bias)
    assert_caught(check(damaged, model, pixels), unit)


@pytest.mark.parametrize("unit", SOURCES)
def test_one_weight_scale_of_any_unit(unit, pixels):
    """The bias scale no longer fits: newer onnxruntimes run the convolution in float then, older ones do not look."""
    model, damaged = (residual_network() for _ in range(2))
    source = weights_of(unit).removesuffix("/weight")
    scale = value_of(damaged, f"{source}/weight/scale")
    scale[1] *= np.float32(1.25)
    replace(damaged, f"{source}/weight/scale", scale)
    report = check(damaged, model, pixels)
    assert_caught(report, unit)
    assert any(failure.startswith(f"{source}: the bias scale is not") for failure in report.failures)
    assert report.float_convolution_names in ((), (source,))
    assert report.float_convolutions == len(report.float_convolution_names)


@pytest.mark.parametrize("tensor", ["pixels", "stem", "block.conv2", "block.add/act", "join", "mean", "hidden"])
@pytest.mark.parametrize("what", ["scale", "zero_point"])
def test_one_activation_parameter(tensor, what, pixels):
    model, damaged = (residual_network() for _ in range(2))
    value = value_of(damaged, f"{tensor}/{what}")
    replace(damaged, f"{tensor}/{what}", value * np.float32(1.02) if what == "scale" else value + 1)
    first = {"pixels": "stem", "join": "join"}.get(tensor, tensor)
    assert_caught(check(damaged, model, pixels), first)


@pytest.mark.parametrize("unit", ["stem", "block.conv1", "depthwise", "logits"])
def test_two_swapped_channels(unit, pixels):
    """Weights of two output channels change places; scales and biases stay."""
    model, damaged = (residual_network(storage="int8") for _ in range(2))
    weight = value_of(damaged, weights_of(unit))
    weight[[1, 4]] = weight[[4, 1]]
    replace(damaged, weights_of(unit), weight)
    assert_caught(check(damaged, model, pixels), unit)


def test_two_swapped_channels_together_with_their_parameters(pixels):
    """The same function up to a permutation is still another file: the next unit reads the channels in order."""
    model, damaged = (residual_network(storage="int8") for _ in range(2))
    for part in ("weight", "weight/scale", "bias", "bias/scale"):
        value = value_of(damaged, f"block.conv1/{part}")
        value[[1, 4]] = value[[4, 1]]
        replace(damaged, f"block.conv1/{part}", value)
    assert_caught(check(damaged, model, pixels), "block.conv1")


def test_one_clip(pixels):
    model, damaged = (residual_network() for _ in range(2))
    replace(damaged, "block.conv1/qmax", np.array(14))
    assert_caught(check(damaged, model, pixels), "block.conv1")


def test_swapped_pixels_of_a_float_input():
    """A graph that recovers other pixels from a float image than were put in."""

    def network():
        build = Builder(np.random.default_rng(0))
        x = build.pixels((3, 8, 8))
        return to_logits(build, x, build.conv("conv", x, 4, bits=4), float_input=True)

    model, damaged = network(), network()
    replace(damaged, "image/scale", np.array(1 / 250))
    assert_caught(check(damaged, model, images(0, 8, (3, 8, 8))), "pixels")


def test_a_truncated_file(tmp_path, pixels):
    data = residual_network().SerializeToString()
    path = tmp_path / "model.onnx"
    for size in (len(data) // 3, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(CheckError, match="model.onnx: .*Export"):
            check_model(path, pixels, np.zeros(len(pixels), np.int64), Undamaged(residual_network()))


def test_only_damage_without_effect_passes(pixels):
    """One step on one random weight: the check passes exactly when onnxruntime still computes the same integers."""
    rng = np.random.default_rng(0)
    model = residual_network(storage="int8")
    reference, few = Undamaged(model), pixels[:6]
    expected, labels = reference.integers(few), np.zeros(6, np.int64)
    caught = 0
    for _ in range(8):
        name = weights_of(list(SOURCES)[rng.integers(len(SOURCES))])
        damaged = residual_network(storage="int8")
        weight = value_of(damaged, name)
        weight.reshape(-1)[rng.integers(weight.size)] ^= 1
        replace(damaged, name, weight)
        file = read_model(damaged.SerializeToString())
        ran = Runtime(file, exposed=file.units).run(few)
        unchanged = all(np.array_equal(values, expected[key]) for key, values in ran.items())
        report = check_model(damaged.SerializeToString(), few, labels, reference)
        assert report.passed == unchanged
        caught += not report.passed
    assert caught >= 5


# ---- elementwise kernels and movement ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pixels_of_kernels():
    return images(5, 24, (3, 7, 6))


@pytest.mark.parametrize("what", ["scale", "zero_point"])
@pytest.mark.parametrize(
    "tensor", ["gate", "swish", "hard", "half", "excited", "hardswish", "leaky", "average", "relu"]
)  # fmt: skip
def test_one_parameter_of_an_elementwise_kernel(tensor, what, pixels_of_kernels):
    model, damaged = mobile_network(), mobile_network()
    value = value_of(damaged, f"{tensor}/{what}")
    replace(damaged, f"{tensor}/{what}", value * np.float32(1.05) if what == "scale" else value + 1)
    assert_caught(check(damaged, model, pixels_of_kernels), "hard" if tensor == "half" else tensor)


@pytest.mark.parametrize(
    "name, change, first",
    [
        ("hard/sixth/scale", 1.05, "hard"),
        ("half", 2, "hard"),
        ("side/qmin", 1.1, "side"),
        ("hardswish/qmax", 0.95, "hardswish"),
        ("low/0", 1, "low"),
        ("high/1", 1, "high"),
    ],
)
def test_one_constant(name, change, first, pixels_of_kernels):
    """Scales and limits times a factor; the ends of a slice plus one."""
    model, damaged = mobile_network(), mobile_network()
    value = value_of(damaged, name)
    if name in ("low/0", "high/1"):  # both ends, so that every shape stays
        for end in "01":
            replace(damaged, f"{first}/{end}", value_of(damaged, f"{first}/{end}") + (1 if first == "low" else -1))
    else:
        replace(damaged, name, value * change)
    assert_caught(check(damaged, model, pixels_of_kernels), first)


@pytest.mark.parametrize(
    "unit, attribute, value",
    [
        ("turned", "perm", [0, 2, 1, 4, 3]),  # another shape, and the same again behind the Reshape
        ("leaky/float", "alpha", 0.11),
        ("average/float", "count_include_pad", 0),
    ],
)
def test_one_attribute(unit, attribute, value, pixels_of_kernels):
    model, damaged = mobile_network(), mobile_network()
    (found,) = [node for node in damaged.graph.node if node.name == unit]
    (item,) = [item for item in found.attribute if item.name == attribute]
    item.CopyFrom(helper.make_attribute(attribute, value))
    assert_caught(check(damaged, model, pixels_of_kernels), unit.removesuffix("/float"))


def test_two_swapped_inputs(pixels_of_kernels):
    model, damaged = mobile_network(), mobile_network()
    (dense,) = [node for node in damaged.graph.node if node.name == "dense"]
    dense.input[0], dense.input[1] = dense.input[1], dense.input[0]
    assert_caught(check(damaged, model, pixels_of_kernels), "dense")
