"""Elementwise kernels as tables: against onnxruntime over all codes, against closed forms, and ties among the cases."""

import numpy as np
import onnxruntime
import pytest
from one_operator import one_operator
from onnx import TensorProto, helper
from qdq_models import Builder, images, replace, to_logits, value_of
from qdq_units import hard_sigmoid, mul, reshape, transpose

from mecdeploy.runtime_checks import CheckError, Interpreter, interpret, read_model
from mecdeploy.runtime_checks import arithmetic as arith
from mecdeploy.runtime_checks.runtime import Runtime

EVERY_CODE = np.arange(256, dtype=np.uint8).reshape(1, 256)
FIRST, SECOND = (part.astype(np.uint8).reshape(-1, 256) for part in np.divmod(np.arange(65536), 256))


def parameters(seed, count, around=-4.0):
    """(scale, zero point) of each tensor: irregular, or in simple ratios, which make exact ties common."""
    rng = np.random.default_rng(seed)
    if seed % 2:
        scales = np.float32(rng.choice([0.25, 0.5, 0.75, 1, 1.5, 2], count) / 16)
    else:
        scales = np.exp(rng.normal(around, 0.7, count)).astype(np.float32)
    return [(scale, int(rng.choice([0, 128, rng.integers(256)]))) for scale in scales]


def differing(real, codes):
    return np.count_nonzero(np.clip(np.rint(real), 0, 255).astype(np.uint8) != codes)


# ---- products ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_multiplication_table_is_qlinear_mul_over_all_pairs(seed):
    a, b, (_, zy) = parameters(seed, 3)
    for size in (30, 300):  # of the product's 65,025 levels, how many are one step
        y = (a[0] * b[0] * np.float32(size), zy)
        (ran,) = one_operator("Mul", [a, b], y, [256]).run(None, {"a": FIRST, "b": SECOND})
        assert np.array_equal(ran, arith.multiplication_table(*a, *b, *y))


def test_multiplication_adds_its_zero_point_before_it_rounds():
    """At odd zero points ties go the other way than when the zero point is added afterwards."""
    a, b, y = (np.float32(0.5), 0), (np.float32(0.25), 0), (np.float32(4), 101)
    (ran,) = one_operator("Mul", [a, b], y, [256]).run(None, {"a": FIRST, "b": SECOND})
    steps = np.multiply.outer(np.arange(256), np.arange(256)).astype(np.float32) / np.float32(32)
    assert differing(steps + np.float32(101), ran) == 0
    assert differing(np.rint(steps) + 101, ran) > 500
    assert np.array_equal(ran, arith.multiplication_table(*a, *b, *y))


@pytest.mark.parametrize("gate_first", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 5), (17, 4, 1), (70, 3, 3)])
def test_products_broadcast(shape, gate_first):
    """[N, C, 1, 1] gates [N, C, H, W], in either order."""
    a, b, y = (np.float32(0.02), 128), (np.float32(0.004), 7), (np.float32(0.013), 99)
    rng = np.random.default_rng(0)
    sizes, sources = [list(shape), [shape[0], 1, 1]], [a, b]
    if gate_first:
        sizes, sources = sizes[::-1], sources[::-1]
    session = one_operator("Mul", sources, y, sizes)
    table = arith.multiplication_table(*sources[0], *sources[1], *y)
    for images_at_once in (1, 3):
        first, second = (rng.integers(0, 256, (images_at_once, *size), dtype=np.uint8) for size in sizes)
        (ran,) = session.run(None, {"a": first, "b": second})
        assert np.array_equal(ran, table[first, second])


def test_reals_beyond_int32_become_the_smallest_code():
    """The kernels convert to int32 before they clamp, and x86 has one number for what does not fit."""
    a, b = (np.float32(2.0), 0), (np.float32(2.0), 0)
    for op, table, y in (
        ("Mul", arith.multiplication_table, (np.float32(2.0**-20), 0)),
        ("Add", arith.addition_table, (np.float32(2.0**-24), 0)),
    ):
        (ran,) = one_operator(op, [a, b], y, [256]).run(None, {"a": FIRST, "b": SECOND})
        assert np.array_equal(ran, table(*a, *b, *y))
        assert ran[255, 255] == 0 and ran[1, 1] == 255


# ---- tables of one input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(24))
def test_sigmoid_table_is_qlinear_sigmoid(seed):
    (x,) = parameters(seed, 1, around=[-4, -2, 0][seed % 3])
    y = (np.float32([1 / 255, 2.0**-8, 0.9 / 15, 1 / 3][seed % 4]), [0, 128, 77][seed % 3])
    (ran,) = one_operator("Sigmoid", [x], y, [256]).run(None, {"a": EVERY_CODE})
    table = arith.sigmoid_table(*x, *y)
    assert np.array_equal(ran[0], table)
    # the closed form, in float64: at most the neighbouring code, where it lies next to a tie
    reals = (np.arange(256.0) - x[1]) * float(x[0])
    steps = 1 / (1 + np.exp(-reals)) / float(y[0]) + y[1]
    assert np.abs(np.clip(steps, 0, 255) - table).max() <= 0.5 + 1e-4  # the approximation errs by 1e-7 of 1, y by 1/255


def test_logistic_is_onnxruntimes_float_sigmoid():
    reals = np.concatenate([np.random.default_rng(0).normal(0, 6, 100_000), [-100, -18, 0, 18, 100]]).astype(np.float32)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Sigmoid", ["x"], ["y"])], "sigmoid", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = arith.logistic(reals)
    assert np.array_equal(found, session.run(None, {"x": reals})[0])
    assert np.abs(found - 1 / (1 + np.exp(-reals.astype(np.float64)))).max() < 2e-7  # of 1: a few float32 roundings


@pytest.mark.parametrize("alpha", [0.0, 0.01, 0.1, 0.25, 1.0, -0.5])
@pytest.mark.parametrize("seed", range(4))
def test_leaky_relu_table_is_qlinear_leaky_relu(seed, alpha):
    x, (_, zy) = parameters(seed, 2)
    for y in ((x[0], zy), (x[0] * np.float32(0.37), zy)):
        (ran,) = one_operator("LeakyRelu", [x], y, [256], alpha=alpha).run(None, {"a": EVERY_CODE})
        table = arith.leaky_relu_table(*x, *y, np.float32(alpha))
        assert np.array_equal(ran[0], table)
        # exact rationals: next to a tie float32 may fall on the other side
        reals = (np.arange(256.0) - x[1]) * float(x[0])
        steps = np.where(reals >= 0, reals, alpha * reals) / float(y[0]) + y[1]
        assert np.abs(np.clip(steps, 0, 255) - table).max() <= 0.5 + 1e-4  # 256 steps of float32: 1.5e-5


# ---- sums with a constant ---------------------------------------------------------------------------------------


def hard_sigmoid_graph(channels, width, *, constant_first, between=True, dyadic=False):
    """x / 6 + 1 / 2 meets the tie 7.5 wherever x is 0: its output has 15 levels."""
    build = Builder(np.random.default_rng(channels), dyadic=dyadic)
    x = build.pixels((3, 4, width))
    y = build.conv("conv", x, channels, (1, 1), pads=(0, 0, 0, 0), bits=8, signed=True)
    z = hard_sigmoid(build, "hard", y, bits=4, constant_first=constant_first)
    end = build.conv("end", z, 3, bits=8) if between else z
    return to_logits(build, x, end)


@pytest.mark.parametrize("between", [False, True])
@pytest.mark.parametrize("channels, width", [(1, 5), (1, 1), (7, 1), (16, 4), (33, 3), (70, 2)])
def test_hard_sigmoid_is_a_sum_with_the_constant_first(channels, width, between):
    model = hard_sigmoid_graph(channels, width, constant_first=True, between=between)
    file = read_model(model.SerializeToString())
    for batch in (1, 4):
        pixels = images(0, batch, file.shape)
        ran, read = Runtime(file, exposed=file.units).run(pixels), Interpreter(file).run(pixels)
        assert all(np.array_equal(values, read[name]) for name, values in ran.items())
    # the definition, in float64: at most the neighbouring code
    codes, scale = read["conv"].astype(np.float64), float(value_of(model, "conv/scale"))
    exact = np.clip((codes - 128) * scale / 6 + 0.5, 0, 1) * 15
    assert np.abs(exact - read["hard"]).max() <= 0.5 + 1e-5  # 15 steps of float32: 1e-6


def test_hard_sigmoid_with_the_constant_second_is_refused():
    """The same numbers, in a row and in a column, fall on other sides of the tie 7.5."""
    x, half, y = (np.float32(0.25) / np.float32(6), 128), (np.float32(0.5), 0), (np.float32(1) / np.float32(15), 0)
    codes, one = np.full((1, 4), 128, np.uint8), np.ones(1, np.uint8)
    (row,) = one_operator("Add", [x, half], y, [[4], []]).run(None, {"a": codes, "b": one})
    (column,) = one_operator("Add", [x, half], y, [[1], []]).run(None, {"a": codes.T, "b": one})
    assert (row.tolist(), column.tolist()) == ([[8] * 4], [[7]] * 4)
    for shape, values in (([4], codes), ([1], codes.T)):
        (first,) = one_operator("Add", [half, x], y, [[], shape]).run(None, {"a": one, "b": values})
        assert set(first.reshape(-1).tolist()) == {8}
    with pytest.raises(CheckError, match="hard/float' \\(Add\\): its constant is the second operand"):
        Interpreter(read_model(hard_sigmoid_graph(4, 4, constant_first=False).SerializeToString()))


def test_a_constant_of_many_codes_is_refused():
    model = hard_sigmoid_graph(4, 4, constant_first=True)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "half")
    tensor.dims[:] = [2]
    tensor.raw_data = bytes([1, 1])
    with pytest.raises(CheckError, match=r"its constant is uint8 \[2\], not one uint8"):
        Interpreter(read_model(model.SerializeToString()))


def test_a_sum_of_two_single_elements_exchanges_its_operands():
    """A first operand of one element is the kernel's scalar, which it takes for its second."""
    rng = np.random.default_rng(0)
    different = 0
    for _ in range(300):
        a, b, y = ((np.float32(rng.integers(1, 20) / 64), int(rng.integers(256))) for _ in range(3))
        table, exchanged = arith.addition_table(*a, *b, *y), arith.addition_table(*b, *a, *y).T
        places = np.argwhere(table != exchanged)[:2]
        session = one_operator("Add", [a, b], y, [1]) if len(places) else None
        for i, j in places:
            (ran,) = session.run(None, {"a": np.array([[i]], np.uint8), "b": np.array([[j]], np.uint8)})
            assert ran.item() == exchanged[i, j]
            different += 1
    assert different > 10


def test_the_interpreter_exchanges_them_too():
    """One channel, one position, one image; two images are a vector again."""
    build = Builder(np.random.default_rng(3))
    x = build.pixels((1, 1, 1))
    a, b = (build.conv(name, x, 1, (1, 1), pads=(0, 0, 0, 0), bits=8, signed=True) for name in "ab")
    model = to_logits(build, x, build.add("add", a, b, signed=True))
    for name, scale in (("a/scale", 2 / 64), ("b/scale", 5 / 64), ("add/scale", 6 / 64)):
        replace(model, name, np.array(scale))
    file = read_model(model.SerializeToString())
    runtime, interpreter = Runtime(file, exposed=file.units), Interpreter(file)
    for count in (1, 2):
        for start in range(0, 256, count):
            pixels = np.arange(start, start + count, dtype=np.uint8).reshape(count, 1, 1, 1)
            assert np.array_equal(runtime.run(pixels)["add"], interpreter.run(pixels)["add"])


def test_products_of_shapes_that_do_not_broadcast_are_named():
    build = Builder(np.random.default_rng(1))
    x = build.pixels((3, 6, 6))
    a, b = build.conv("a", x, 4), build.conv("b", x, 4)
    product = mul(build, "product", a, b)
    model = to_logits(build, x, product)
    for node in model.graph.node:
        if node.name == "b/float":
            next(item for item in node.attribute if item.name == "strides").ints[:] = [2, 2]
    with pytest.raises(CheckError, match=r"'product': shapes do not fit"):
        interpret(model.SerializeToString(), images(0, 1, (3, 6, 6)))


def test_products_of_turned_tensors():
    """A product away from convolutions and images: [N, L, C] by [N, L, C]."""
    build = Builder(np.random.default_rng(1))
    x = build.pixels((3, 5, 3))
    y = build.conv("conv", x, 6, bits=8, signed=True)
    tokens = transpose(build, "tokens", reshape(build, "rows", y, (6, 15)), (0, 2, 1))
    gated = mul(build, "gated", tokens, tokens)
    model = to_logits(build, x, reshape(build, "back", gated, (15, 2, 3)))
    file = read_model(model.SerializeToString())
    pixels = images(0, 3, file.shape)
    ran, read = Runtime(file, exposed=file.units).run(pixels), Interpreter(file).run(pixels)
    assert all(np.array_equal(values, read[name]) for name, values in ran.items())
