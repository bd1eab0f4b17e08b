"""Integer kernels against loops over the definition, and where floats stop being exact."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mecdeploy.runtime_checks import kernels
from mecdeploy.runtime_checks.kernels import Window


def looped_convolution(x, zero_point, weight, bias, window, groups):
    """The definition, one output at a time, in Python integers."""
    batch, channels, height, width = x.shape
    rows, columns = window.output_size(height, width)
    outputs, fan_in = weight.shape[:2]
    result = np.zeros((batch, outputs, rows, columns), object)
    for n, o, r, c in itertools.product(range(batch), range(outputs), range(rows), range(columns)):
        total = 0 if bias is None else int(bias[o])
        group = o // (outputs // groups)
        for i, ky, kx in itertools.product(range(fan_in), *map(range, window.kernel)):
            y = r * window.strides[0] - window.pads[0] + ky * window.dilations[0]
            z = c * window.strides[1] - window.pads[1] + kx * window.dilations[1]
            if 0 <= y < height and 0 <= z < width:
                total += int(weight[o, i, ky, kx]) * (int(x[n, group * fan_in + i, y, z]) - zero_point)
        result[n, o, r, c] = total
    return result


@st.composite
def convolutions(draw):
    kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    dilations = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    pads = draw(st.tuples(*[st.integers(0, 2)] * 4))
    size = [draw(st.integers(max(1, dilations[i] * (kernel[i] - 1) + 1 - pads[i] - pads[i + 2]), 6)) for i in range(2)]
    groups, fan_in, fan_out = draw(st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 2)))
    window = Window(kernel=kernel, strides=draw(st.tuples(*[st.integers(1, 2)] * 2)), pads=pads, dilations=dilations)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    x = rng.integers(0, 256, (2, groups * fan_in, *size), dtype=np.uint8)
    weight = rng.integers(-128, 128, (groups * fan_out, fan_in, *kernel)).astype(np.int8)
    bias = rng.integers(-(2**20), 2**20, groups * fan_out).astype(np.int32) if draw(st.booleans()) else None
    return x, draw(st.integers(0, 255)), weight, bias, window, groups


@given(convolutions())
@settings(max_examples=40, deadline=None)
def test_convolution_is_its_definition(case):
    assert np.array_equal(kernels.convolve(*case), looped_convolution(*case).astype(np.float64))


@pytest.mark.parametrize("bias, kind", [(0, np.float32), (2**24 - 2, np.float64), (2**30, np.float64)])
def test_accumulators_beyond_float32_are_still_exact(bias, kind):
    x = np.full((1, 1, 1, 1), 255, np.uint8)
    weight = np.array([[[[1]]], [[[-127]]]], np.int8)
    found = kernels.convolve(x, 0, weight, np.array([bias, -bias], np.int32), Window(kernel=(1, 1)), 1)
    assert found.dtype == kind
    assert found.reshape(-1).tolist() == [255 + bias, -127 * 255 - bias]


@pytest.mark.parametrize("terms, kind", [(518, np.float32), (519, np.float64), (66_312, np.float64)])
def test_sums_on_either_side_of_the_last_exact_float32_and_int32(terms, kind):
    """255 * 127 * 518 is the last such sum below 2**24, and 66,311 terms the last below 2**31: then int32 wraps."""
    x = np.full((2, terms), 255, np.uint8)
    x[1, ::2] = 254
    weight = np.array([[127], [-127]], np.int8).repeat(terms, axis=1)
    expected = [[(sign * 127 * int(row.sum()) + 2**31) % 2**32 - 2**31 for sign in (1, -1)] for row in x.astype(int)]
    product = kernels.matrix_product(x, 0, weight, None)
    window = Window(kernel=(1, 1))
    convolved = kernels.convolve(x[:, :, None, None], 0, weight[:, :, None, None], None, window, 1)
    assert product.dtype == convolved.dtype == kind
    assert product.tolist() == convolved[:, :, 0, 0].tolist() == expected


@pytest.mark.parametrize("block", [1, 20, 30, 2**20])  # of weights: one row of 10, two, three, all
def test_a_matrix_product_does_not_depend_on_how_many_outputs_are_taken_at_once(block, monkeypatch):
    rng = np.random.default_rng(block)
    x, zero_point = rng.integers(0, 256, (3, 10), dtype=np.uint8), 77
    weight = rng.integers(-128, 128, (7, 10)).astype(np.int8)
    bias = rng.integers(-(2**20), 2**20, 7).astype(np.int32)
    monkeypatch.setattr(kernels, "_WEIGHTS_AT_ONCE", block)
    expected = [
        [
            int(b) + sum(int(w) * (int(code) - zero_point) for w, code in zip(row, image, strict=True))
            for row, b in zip(weight, bias, strict=True)
        ]
        for image in x
    ]
    assert kernels.matrix_product(x, zero_point, weight, bias).tolist() == expected


def test_accumulators_wrap_as_int32_does():
    x = np.full((1, 2), 255, np.uint8)
    weight = np.array([[127, 127], [-127, -127]], np.int8)
    bias = np.array([2**31 - 1, -(2**31)], np.int32)
    found = kernels.matrix_product(x, 0, weight, bias)
    assert found.tolist() == [[2**31 - 1 + 2 * 127 * 255 - 2**32, -(2**31) - 2 * 127 * 255 + 2**32]]


@given(
    st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(1, 3),
    st.integers(0, 1), st.booleans(),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_max_pool_is_its_definition(seed, height, width, kernel, stride, pad, ceil_mode):
    if kernel <= pad or kernel > min(height, width) + 2 * pad:
        return
    x = np.random.default_rng(seed).integers(0, 256, (2, 3, height, width), dtype=np.uint8)
    window = Window(kernel=(kernel,) * 2, strides=(stride,) * 2, pads=(pad,) * 4, ceil_mode=ceil_mode)
    found = kernels.max_pool(x, window)
    for r, c in itertools.product(*map(range, found.shape[2:])):
        top, left = r * stride - pad, c * stride - pad
        seen = x[:, :, max(top, 0) : top + kernel, max(left, 0) : left + kernel]
        assert np.array_equal(found[:, :, r, c], seen.max(axis=(2, 3)))
    assert found.shape[2] >= (height + 2 * pad - kernel) // stride + 1


def test_one_image_does_not_depend_on_its_batch():
    rng = np.random.default_rng(3)
    x = rng.integers(0, 256, (5, 4, 6, 5), dtype=np.uint8)
    weight = rng.integers(-8, 8, (6, 2, 3, 3)).astype(np.int8)
    window = Window(kernel=(3, 3), pads=(1, 1, 1, 1))
    together = kernels.convolve(x, 100, weight, None, window, 2)
    assert np.array_equal(together[3:4], kernels.convolve(x[3:4], 100, weight, None, window, 2))
