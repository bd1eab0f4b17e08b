"""Networks of every kernel against onnxruntime, bit for bit; movement of codes against numpy, and what it refuses."""

import numpy as np
import pytest
from onnx import helper
from qdq_models import Builder, images, replace, to_logits
from qdq_units import concat, cut, leaky_relu, mobile_network, reshape, same_scale, transpose

from mecdeploy.runtime_checks import CheckError, Interpreter, inspect_structure, read_model
from mecdeploy.runtime_checks.runtime import Runtime


def computed(model, count=5):
    """The file's integers by the interpreter, which must be onnxruntime's."""
    file = read_model(model.SerializeToString())
    pixels = images(1, count, file.shape)
    ran, read = Runtime(file, exposed=file.units).run(pixels), Interpreter(file).run(pixels)
    for name, values in ran.items():
        assert np.array_equal(values, read[name]), f"{name}: {np.count_nonzero(values != read[name])} differ"
    report = inspect_structure(file)
    assert (report.failures, report.float_operators) == ((), {})
    return read


@pytest.mark.parametrize("dyadic", [False, True], ids=["irregular scales", "ties"])
@pytest.mark.parametrize("channels, width", [(11, 6), (1, 3), (16, 1), (33, 5), (70, 2)])
def test_networks_of_every_kernel(channels, width, dyadic):
    for seed in range(2):
        model = mobile_network(seed, dyadic=dyadic, channels=channels, width=width)
        for count in (1, 4):
            computed(model, count)


def test_the_networks_are_not_trivial():
    model = mobile_network(0)
    kinds = inspect_structure(model.SerializeToString()).kernels
    integer = ("QLinearMul", "QLinearSigmoid", "QLinearLeakyRelu", "QLinearAdd", "QLinearAveragePool")
    assert [kinds[kind] for kind in integer] == [3, 1, 2, 3, 1]
    found = computed(model, 32)
    for name in ("stem", "gate", "swish", "excited", "hardswish", "leaky", "side", "average", "relu", "sum"):
        low, high = found[name].min(), found[name].max()
        assert np.count_nonzero((found[name] > low) & (found[name] < high)) > found[name].size / 20, name
    assert {int(found[name].max()) for name in ("stem", "swish", "leaky", "side", "average", "sum")} == {255}
    zero_point = int(next(t for t in model.graph.initializer if t.name == "leaky/zero_point").raw_data[0])
    assert int(found["side"].min()) == zero_point not in (0, 128)  # a ReLU at a learned zero point: Clip's minimum


def moved(change):
    """A convolution of 6 channels at 4 bits, what `change` makes of it, and both as computed."""
    build = Builder(np.random.default_rng(2))
    x = build.pixels((3, 5, 4))
    y = build.conv("conv", x, 6, bits=4, signed=True)
    model = to_logits(build, x, change(build, y))
    found = computed(model)
    return found["conv"], found["moved"]


def test_slices_are_numpys():
    before, after = moved(lambda build, y: cut(build, "moved", y, 1, 1, 6, 2))
    assert np.array_equal(after, before[:, 1:6:2])
    before, after = moved(lambda build, y: cut(build, "moved", y, 2, -3, 2**62))
    assert np.array_equal(after, before[:, :, -3:])


def test_transposes_and_reshapes_are_numpys():
    before, after = moved(lambda build, y: transpose(build, "moved", y, (0, 3, 1, 2)))
    assert np.array_equal(after, before.transpose(0, 3, 1, 2))
    before, after = moved(lambda build, y: reshape(build, "moved", y, (10, 4, 3)))
    assert np.array_equal(after, before.reshape(-1, 10, 4, 3))


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_concatenation_is_numpys_and_keeps_other_clips(axis):
    """Inputs of 3 and 8 bits and one held at its zero point, at one scale: the report measures the widest."""

    def change(build, y):
        leaky = leaky_relu(build, "leaky", y, 0.3)
        narrow = same_scale(build, "narrow", y, leaky, bits=3)
        relu = same_scale(build, "relu", y, leaky, bits=8, relu=True)
        return concat(build, "moved", [narrow, leaky, relu], axis)

    build = Builder(np.random.default_rng(2))
    x = build.pixels((3, 5, 4))
    found = computed(to_logits(build, x, change(build, build.conv("conv", x, 6, bits=4, signed=True))))
    assert np.array_equal(found["moved"], np.concatenate([found[n] for n in ("narrow", "leaky", "relu")], axis))
    assert found["narrow"].max() <= 7 < found["leaky"].max()


def test_codes_are_held_between_qmin_and_qmax():
    build = Builder(np.random.default_rng(2))
    x = build.pixels((3, 5, 4))
    y = build.conv("conv", x, 6, bits=8, signed=True)
    held = same_scale(build, "held", y, y, bits=8, relu=True)
    model = to_logits(build, x, held)
    for qmin in (128, 131):  # at the zero point, and above it
        replace(model, "held/qmin", np.array(qmin))
        found = computed(model)
        assert found["held"].min() == qmin
        assert np.array_equal(found["held"], np.maximum(found["held/unclipped"], qmin))


# ---- what it refuses --------------------------------------------------------------------------------------------


def refusal(change, edit):
    build = Builder(np.random.default_rng(2))
    x = build.pixels((3, 5, 4))
    model = to_logits(build, x, change(build, build.conv("conv", x, 6, bits=4, signed=True)))
    edit(model, next(node for node in model.graph.node if node.name == "moved"))
    with pytest.raises(CheckError) as caught:
        Interpreter(read_model(model.SerializeToString()))
    return str(caught.value)


def attribute(node, name):
    return next(item for item in node.attribute if item.name == name)


def test_refuses_a_batch_that_moves():
    def swap(model, node):
        attribute(node, "perm").ints[:] = [1, 0, 2, 3]

    message = refusal(lambda build, y: transpose(build, "moved", y, (0, 1, 2, 3)), swap)
    assert message.startswith("node 'moved' (Transpose): its axes go to [1, 0, 2, 3]; the batch must stay first.")


def test_refuses_a_batch_that_is_cut_or_joined():
    message = refusal(
        lambda build, y: cut(build, "moved", y, 1, 0, 3), lambda m, n: replace(m, "moved/2", np.array([0]))
    )
    assert message.startswith("node 'moved' (Slice): it cuts axes [0]")

    def stack(model, node):
        attribute(node, "axis").i = 0

    message = refusal(lambda build, y: concat(build, "moved", [y, y]), stack)
    assert message.startswith("node 'moved' (Concat): it joins along axis 0")


def test_refuses_codes_joined_with_reals():
    def mix(model, node):
        node.input[1] = "conv/real.other"
        position = list(model.graph.node).index(node)
        source = ["conv", "conv/scale", "conv/zero_point"]
        model.graph.node.insert(position, helper.make_node("DequantizeLinear", source, ["conv/real.other"], name="r"))

    message = refusal(lambda build, y: concat(build, "moved", [y, y]), mix)
    assert "(Concat): 'conv/real.other' holds no stored integers, its first input does" in message
