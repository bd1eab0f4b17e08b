"""The interpreter against onnxruntime, bit for bit, on graphs the export room never saw; and what it refuses."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from qdq_models import Builder, images, initializer, replace, residual_network, to_logits, value_of
from qdq_storage import STORAGES

from mecdeploy.runtime_checks import CheckError, Interpreter, inspect_structure, interpret, read_model
from mecdeploy.runtime_checks.runtime import Runtime


def assert_equal_everywhere(model, pixels, *, integer_kernels=True):
    """Every unit and the logits: interpreter == onnxruntime, the latter on integer kernels alone."""
    file = read_model(model.SerializeToString())
    ran, read = Runtime(file, exposed=file.units).run(pixels), Interpreter(file).run(pixels)
    for name, values in ran.items():
        assert values.dtype == read[name].dtype
        assert np.array_equal(values, read[name]), f"{name}: {np.count_nonzero(values != read[name])} differ"
    if integer_kernels:
        assert inspect_structure(file).float_products == ()


@pytest.mark.parametrize("dyadic", [False, True], ids=["irregular scales", "ties"])
@pytest.mark.parametrize("storage", STORAGES)
def test_networks_in_every_storage(storage, dyadic):
    for seed, act_bits in enumerate((2, 3, 4, 8)):
        model = residual_network(seed, storage=storage, dyadic=dyadic, act_bits=act_bits)
        assert_equal_everywhere(model, images(seed, 5))


def test_the_networks_are_not_trivial():
    """Units reach both ends of their range and use its middle, so that rounding and saturation are both at stake."""
    model = residual_network(0)
    found = interpret(model.SerializeToString(), images(0, 32))
    for name in read_model(model.SerializeToString()).units:
        largest = int(found[name].max())
        assert found[name].min() == 0, name
        assert largest in (15, 255) or name in ("pool", "mean", "flat"), name
        assert np.count_nonzero((found[name] > 0) & (found[name] < largest)) > found[name].size / 20, name


@pytest.mark.parametrize("values", [1, 4000])  # an image at a time; two where images are large, seven where small
def test_layers_do_not_depend_on_how_many_images_they_take_at_once(values, monkeypatch):
    monkeypatch.setattr("mecdeploy.runtime_checks.products._VALUES_AT_ONCE", values)
    assert_equal_everywhere(residual_network(2), images(2, 7))


@st.composite
def convolution_graphs(draw):
    build = Builder(np.random.default_rng(draw(st.integers(0, 2**32))), dyadic=draw(st.booleans()))
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    kernel = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    dilations = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    pads = tuple(draw(st.integers(0, 2)) for _ in range(4))
    size = (draw(st.integers(5, 9)), draw(st.integers(5, 9)))
    x = build.pixels((4, *size), zero_point=draw(st.integers(0, 255)))
    y = build.conv(
        "conv", x, groups * draw(st.integers(1, 9)), kernel, groups=groups, pads=pads, dilations=dilations,
        strides=(draw(st.integers(1, 3)), draw(st.integers(1, 3))), bits=draw(st.sampled_from([2, 4, 8])),
        signed=draw(st.booleans()), per_channel=draw(st.booleans()), bias=draw(st.booleans()),
    )  # fmt: skip
    return to_logits(build, x, y)


@given(convolution_graphs(), st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_convolutions_of_any_geometry(model, batch):
    file = read_model(model.SerializeToString())
    assert_equal_everywhere(model, images(batch, batch, file.shape))


@pytest.mark.parametrize("channels", [1, 15, 16, 17, 31, 33, 67])
def test_vector_lengths_have_no_other_arithmetic_in_their_tails(channels):
    build = Builder(np.random.default_rng(channels), dyadic=channels % 2 == 0)
    x = build.pixels((3, 5, 3))
    y = build.conv("conv", x, channels, bits=8, signed=True)
    z = build.conv("depthwise", y, channels, groups=channels, bits=8, signed=True)
    total = build.add("add", y, z)
    flat = build.move("Flatten", "flat", total)
    hidden = build.gemm("hidden", flat, channels, per_channel=channels % 4 == 1)
    model = build.model(x, build.gemm("classifier", hidden, channels, to_logits=True, transposed=False))
    assert_equal_everywhere(model, images(0, 7, (3, 5, 3)))


@pytest.mark.parametrize("groups", [1, 3])
def test_accumulators_beyond_float32_and_beyond_int32(groups):
    """Biases next to the ends of int32: onnxruntime rounds them to float32 once, and wraps."""
    build = Builder(np.random.default_rng(0))
    x = build.pixels((3, 6, 5))
    y = build.conv("conv", x, 6, groups=groups, bits=8, signed=True)
    model = to_logits(build, x, y)
    replace(model, "conv/bias", np.array([2**31 - 1, -(2**31), 2**31 - 1000, 2**24 + 1, -(2**30), 2**30 + 63]))
    file, pixels = read_model(model.SerializeToString()), images(0, 8, (3, 6, 5))
    for scale in (1e3, 0.05):
        replace(model, "conv/scale", np.array(scale * float(x.scale)))
        file = read_model(model.SerializeToString())
        ran = Runtime(file, exposed=["conv"]).run(pixels)["conv"]
        read = Interpreter(file).run(pixels)["conv"]
        assert np.array_equal(ran, read)
        assert len(np.unique(ran)) > 1


@pytest.mark.parametrize("through_real", [False, True], ids=["on the codes", "between DQ and Q"])
@pytest.mark.parametrize("op", ["MaxPool", "Flatten", "Reshape"])
def test_ops_that_only_move_codes(op, through_real):
    attributes = {"MaxPool": {"kernel_shape": (3, 2), "strides": (2, 1), "pads": (1, 0, 1, 1)}}.get(op, {})
    build = Builder(np.random.default_rng(1))
    x = build.pixels((3, 7, 6))
    y = build.conv("conv", x, 5, bits=8, signed=True)
    z = build.move(op, "moved", y, through_real=through_real, **attributes)
    if op == "MaxPool":
        model = to_logits(build, x, z)
    else:
        model = build.model(x, build.gemm("classifier", z, 5, to_logits=True))
    assert_equal_everywhere(model, images(1, 6, (3, 7, 6)))


@pytest.mark.parametrize("size, kernel, stride, pad", [(7, 3, 2, 0), (8, 3, 2, 1), (6, 2, 3, 1), (5, 2, 2, 0)])
def test_max_pool_with_ceil_mode(size, kernel, stride, pad):
    build = Builder(np.random.default_rng(1))
    x = build.pixels((3, size, size + 1))
    shape = {"kernel_shape": (kernel,) * 2, "strides": (stride,) * 2, "pads": (pad,) * 4, "ceil_mode": 1}
    model = to_logits(build, x, build.move("MaxPool", "pool", x, **shape))
    assert_equal_everywhere(model, images(1, 3, (3, size, size + 1)))


@pytest.mark.parametrize("include", [0, 1])
@pytest.mark.parametrize("seed", range(3))
def test_average_pool(seed, include):
    build = Builder(np.random.default_rng(seed), dyadic=seed == 1)
    x = build.pixels((3, 9, 8))
    y = build.conv("conv", x, 6, bits=8, signed=True)
    shape = {"kernel_shape": (3, 2), "strides": (2, 1), "pads": (1, 0, 1, 1), "count_include_pad": include}
    z = build.pool("AveragePool", "average", y, signed=seed == 2, **shape)
    whole = build.pool("AveragePool", "whole", z, signed=True, kernel_shape=z.shape[1:])  # the global kernel
    assert_equal_everywhere(to_logits(build, x, whole), images(seed, 8, (3, 9, 8)))


def test_every_pixel_value_survives_a_float_input():
    build = Builder(np.random.default_rng(0))
    x = build.pixels((1, 16, 16))
    model = to_logits(build, x, build.conv("conv", x, 4, bits=4), float_input=True)
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    found = interpret(model.SerializeToString(), pixels)
    assert np.array_equal(found["pixels"], pixels)
    assert "image" not in found
    file = read_model(model.SerializeToString())
    assert np.array_equal(Runtime(file, exposed=["pixels"]).run(pixels)["pixels"], pixels)
    assert_equal_everywhere(model, pixels)


def test_named_outputs_are_the_ones_returned():
    file = read_model(residual_network().SerializeToString())
    interpreter, pixels = Interpreter(file), images(0, 2)
    everything = interpreter.run(pixels)
    some = interpreter.run(pixels, outputs=["stem", "logits", "no such tensor"])
    assert set(some) == {"stem", "logits"}
    assert np.array_equal(some["stem"], everything["stem"])
    assert {"pixels", "narrow/unclipped", "narrow"} < set(everything)


# ---- what it refuses ------------------------------------------------------------------------------------------------


def refusal(model):
    with pytest.raises(CheckError) as caught:
        Interpreter(read_model(model.SerializeToString()))
    message = str(caught.value)
    assert "\n" not in message and "Export the run again" in message
    return message


def test_refuses_an_op_it_does_not_know():
    model = residual_network()
    (node,) = [node for node in model.graph.node if node.name == "mean/float"]
    node.op_type = "GlobalMaxPool"
    assert refusal(model).startswith(
        "node 'mean/float' (GlobalMaxPool): the integer interpreter has no arithmetic for it"
    )


def test_refuses_a_sum_quantised_twice():
    model = residual_network()
    for node in model.graph.node:
        if node.name == "block.add/act/unclipped":
            node.input[0] = "block.add/skip/float"
    model.graph.node.remove(next(node for node in model.graph.node if node.name == "block.add/act/float"))
    assert "node 'block.add/skip/float' (Add): its float output is read by QuantizeLinear, QuantizeLinear" in refusal(
        model
    )


def test_refuses_a_relu_kept_in_float():
    model = residual_network()
    position = next(i for i, node in enumerate(model.graph.node) if node.name == "stem")
    model.graph.node[position].input[0] = "stem/relu"
    model.graph.node.insert(position, helper.make_node("Relu", ["stem/float"], ["stem/relu"], name="stem/relu"))
    assert "stem/float' (Conv): its float output is read by Relu" in refusal(model)


def test_refuses_a_pool_that_changes_scale():
    build = Builder(np.random.default_rng(1))
    x = build.pixels((3, 4, 4))
    y = build.move("MaxPool", "pool", x, through_real=True, kernel_shape=(2, 2))
    model = to_logits(build, x, y)
    replace(model, "pool/scale", np.array(0.5))
    assert "(MaxPool): its input and output scales differ" in refusal(model)


def test_refuses_weights_scaled_along_another_axis():
    model = residual_network()
    (node,) = [node for node in model.graph.node if node.name == "block.conv1/weight/real"]
    node.attribute[0].i = 1
    assert "its weight scale lies along axis 1; output channels are axis 0" in refusal(model)


@pytest.mark.parametrize(
    "name, value, complaint",
    [
        ("stem/scale", 0.0, "activations need one positive float32"),
        ("stem/scale", np.nan, "activations need one positive float32"),
        ("stem/weight/scale", np.inf, "not positive and finite"),
        ("stem/weight/zero_point", 1, "zero point that is not 0"),
    ],
)
def test_refuses_parameters_no_kernel_takes(name, value, complaint):
    model = residual_network()
    damaged = value_of(model, name)
    damaged[...] = value
    replace(model, name, damaged)
    assert complaint in refusal(model)


def test_refuses_codes_outside_their_table():
    model = residual_network(storage="table3")
    codes = value_of(model, "narrow/weight/packed")
    codes[0] = 2**15
    replace(model, "narrow/weight/packed", codes)
    assert "does not index a table of 32768 rows" in refusal(model)


def test_refuses_packed_weights_of_another_length():
    model = residual_network()
    tensor = initializer(model, "narrow/weight/packed")
    tensor.raw_data = tensor.raw_data[:-1]
    with pytest.raises(CheckError, match="narrow/weight/packed"):
        Interpreter(read_model(model.SerializeToString()))


def test_shapes_that_do_not_fit_are_named():
    build = Builder(np.random.default_rng(1))
    x = build.pixels((3, 6, 6))
    a, b = build.conv("a", x, 4), build.conv("b", x, 4, strides=(2, 2))
    model = to_logits(build, x, build.add("add", a, b))
    with pytest.raises(CheckError, match=r"'add': shapes do not fit"):
        interpret(model.SerializeToString(), images(0, 1, (3, 6, 6)))
