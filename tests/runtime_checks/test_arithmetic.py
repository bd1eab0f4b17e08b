"""The formulas, against exact rationals and against onnxruntime's own kernels on one operator at a time."""

from fractions import Fraction

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from one_operator import one_operator
from onnx import TensorProto, helper, numpy_helper

from mecdeploy.runtime_checks import arithmetic

SCALES = st.floats(min_value=2.0**-14, max_value=2.0**4, width=32)
CODES = st.integers(0, 255)


def exact_float32(value: Fraction) -> np.float32:
    """The float32 nearest to a rational, ties to even, without float64 in between."""
    if value == 0:
        return np.float32(0)
    exponent = 0
    while abs(value) * Fraction(2) ** -exponent >= 2:
        exponent += 1
    while abs(value) * Fraction(2) ** -exponent < 1:
        exponent -= 1
    step = Fraction(2) ** (exponent - 23)
    return np.float32(float(round(value / step) * step))


@given(CODES, SCALES, st.floats(min_value=-70000, max_value=70000, width=32))
@settings(deadline=None)
def test_fused_multiply_add_rounds_once(code, ratio, addend):
    found = arithmetic.fused_multiply_add(np.float32(code), np.float32(ratio), np.float32(addend))
    assert found == exact_float32(Fraction(code) * Fraction(ratio) + Fraction(addend))


@pytest.mark.parametrize("nudge, expected", [(2.0**-30, 16785410), (0.0, 16785408), (-(2.0**-30), 16785408)])
def test_fused_multiply_add_survives_double_rounding(nudge, expected):
    """4097 * 4097 lies on a float32 tie; float64 drops the nudge and would round all three to even."""
    assert 4097.0 * 4097.0 + nudge == 4097.0 * 4097.0
    assert arithmetic.fused_multiply_add(np.float32(4097), np.float32(4097), np.float32(nudge)) == expected


@pytest.mark.parametrize("zero_point", [0, 8, 128, 255])
def test_quantize_rounds_ties_to_even_and_saturates(zero_point):
    scale = np.float32(0.25)
    halves = np.arange(-600, 600, dtype=np.float32) * np.float32(0.5) * scale
    expected = [min(max(round(Fraction(float(v)) / Fraction(1, 4)) + zero_point, 0), 255) for v in halves]
    assert arithmetic.quantize(halves, scale, zero_point).tolist() == expected


def test_quantize_is_onnxruntimes_near_ties():
    """Values next to every tie at many scales: a division, where a reciprocal gives other codes."""
    rng = np.random.default_rng(0)
    reciprocal_differs = 0
    for scale in np.exp(rng.normal(-3, 1, 40)).astype(np.float32):
        ties = ((np.arange(-60, 260) + 0.5) * float(scale)).astype(np.float32)
        near = np.concatenate([ties, np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(-np.inf))])
        found = arithmetic.quantize(near, scale, 50)
        assert np.array_equal(found, quantize_linear(near, scale, 50))
        reciprocal_differs += np.count_nonzero(found != np.clip(np.rint(near * (1 / scale)) + 50, 0, 255))
    assert reciprocal_differs > 100


def quantize_linear(real, scale, zero_point):
    constants = [numpy_helper.from_array(scale, "scale"), numpy_helper.from_array(np.uint8(zero_point), "zero")]
    node = helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"])
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)]
    ends.append(helper.make_tensor_value_info("y", TensorProto.UINT8, None))
    graph = helper.make_graph([node], "quantize", ends[:1], ends[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": real})[0]


@pytest.mark.parametrize("seed", range(12))
def test_addition_table_is_qlinear_add_over_all_pairs(seed):
    rng = np.random.default_rng(seed)
    if seed % 2:  # simple ratios: exact ties everywhere
        scales = np.float32(rng.choice([0.25, 0.5, 0.75, 1, 1.5, 2], 3) / 16)
    else:
        scales = np.exp(rng.normal(-4, 0.7, 3)).astype(np.float32)
    zeros = [int(rng.choice([0, 128, rng.integers(256)])) for _ in range(3)]
    (a, b, y) = zip(scales, zeros, strict=True)
    first, second = np.divmod(np.arange(65536), 256)
    feed = {"a": first.astype(np.uint8).reshape(-1, 256), "b": second.astype(np.uint8).reshape(-1, 256)}
    (ran,) = one_operator("Add", [a, b], y, [256]).run(None, feed)
    assert np.array_equal(ran.reshape(256, 256), arithmetic.addition_table(*a, *b, *y))


def test_addition_fuses_its_constant_and_takes_b_first():
    """Scales where a plain float32 constant gives 7,054 other codes of 65,536; a before b gives others too."""
    (sa, za), (sb, zb), (sy, zy) = [(np.float32(s), z) for s, z in ((0.03125, 153), (0.078125, 128), (0.09375, 156))]
    first, second = (part.astype(np.uint8).reshape(-1, 256) for part in np.divmod(np.arange(65536), 256))
    (ran,) = one_operator("Add", [(sa, za), (sb, zb)], (sy, zy), [256]).run(None, {"a": first, "b": second})
    assert np.array_equal(ran, arithmetic.addition_table(sa, za, sb, zb, sy, zy))
    a, b = np.arange(256, dtype=np.float32)[:, None], np.arange(256, dtype=np.float32)[None]
    ra, rb = sa / sy, sb / sy
    fma = arithmetic.fused_multiply_add
    plain = np.float32(zy) - (ra * np.float32(za) + rb * np.float32(zb))
    fused = np.float32(zy) - fma(ra, np.float32(za), rb * np.float32(zb))
    assert differing(fma(a, ra, fma(b, rb, fused)), ran) == 0
    assert differing(fma(a, ra, fma(b, rb, plain)), ran) == 7054
    assert differing(fma(b, rb, fma(a, ra, fused)), ran) > 0


def differing(real, codes):
    return np.count_nonzero(np.clip(np.rint(real), 0, 255) != codes)


@pytest.mark.parametrize("length", [1, 3, 7, 31, 33, 255])
def test_addition_has_no_other_arithmetic_in_its_tails(length):
    rng = np.random.default_rng(length)
    a, b, y = (np.float32(0.031), 128), (np.float32(0.017), 0), (np.float32(0.04), 120)
    feed = {name: rng.integers(0, 256, (41, length), dtype=np.uint8) for name in "ab"}
    session = one_operator("Add", [a, b], y, [length])
    table = arithmetic.addition_table(*a, *b, *y)
    for rows in (1, 41):
        (ran,) = session.run(None, {name: codes[:rows] for name, codes in feed.items()})
        assert np.array_equal(ran, table[feed["a"][:rows], feed["b"][:rows]])


def test_ties_really_occur_in_the_dyadic_additions():
    """The table tests mean something: with these scales one sum in eight or more lies on a tie."""
    sums = np.add.outer(np.arange(256) * Fraction(3, 4), np.arange(256) * Fraction(1, 2))[:64, :64]
    assert sum(value.denominator == 2 for value in sums.reshape(-1)) > sums.size / 8


@pytest.mark.parametrize("seed", range(8))
def test_global_average_is_qlinear_global_average_pool(seed):
    rng = np.random.default_rng(seed)
    height, width = (int(v) for v in rng.integers(1, 15, 2))
    sx, sy = np.exp(rng.normal(-4, 0.7, 2)).astype(np.float32)
    if seed % 2:
        height, width, sx, sy = 4, 2, np.float32(2.0**-4), np.float32(2.0**-5)
    zx, zy = int(rng.integers(256)), int(rng.choice([0, 128, 200]))
    x = rng.integers(0, 256, (64, 37, height, width), dtype=np.uint8)
    (ran,) = one_operator("GlobalAveragePool", [(sx, zx)], (sy, zy), [37, height, width]).run(None, {"a": x})
    total = (x.astype(np.int64) - zx).sum(axis=(2, 3), keepdims=True).astype(np.float64)
    multiplier = arithmetic.global_average_multiplier(sx, sy, height * width)
    assert np.array_equal(ran, arithmetic.requantize(total, np.array([multiplier]), zy))


def test_requantize_rounds_large_accumulators_once():
    """Beyond 2**24 the conversion to float32 rounds, to even; the product rounds again."""
    accumulator = np.array([[2**24 + 1, 2**24 + 3, -(2**24) - 1, 2**31 - 1]], np.float64).T.reshape(4, 1)
    multiplier = np.array([np.float32(2.0**-17)])
    expected = []
    for value in accumulator.reshape(-1):
        rounded = Fraction(float(exact_float32(Fraction(float(value)))))
        expected.append(min(max(round(rounded / 2**17) + 100, 0), 255))
    assert arithmetic.requantize(accumulator, multiplier, 100).reshape(-1).tolist() == expected
