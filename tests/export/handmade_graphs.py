"""The IntegerGraphs that these tests compile."""

from __future__ import annotations

import numpy as np
from graph_maker import Maker

from mecdeploy.export.graph import (
    Add,
    Conv,
    Flatten,
    Gemm,
    GlobalAveragePool,
    IntegerGraph,
    Quantization,
    Value,
    Weight,
)


def residual_graph(weight_bits: int = 4, act_bits: int = 4, *, seed: int = 0, width: int = 8) -> IntegerGraph:
    """Two residual blocks, the first sum read at two precisions, a strided projection, pooling, one hidden layer."""
    make = Maker(f"residual-w{weight_bits}a{act_bits}", (3, 11, 9), seed)
    bits = {"weight_bits": weight_bits, "act_bits": act_bits}
    stem = make.conv("stem", "pixels", width, 3, weight_bits=8, act_bits=8, padding=1)
    pooled = make.max_pool("maxpool", stem, 3, 2, padding=1)
    first = make.conv("block1.conv1", pooled, width, 3, padding=1, **bits)
    second = make.conv("block1.conv2", first, width, 3, weight_bits=weight_bits, act_bits=8, signed=True, padding=1)
    skip, act = make.add("block1.add", second, pooled, skip=(8, False), act=(act_bits, False))
    third = make.conv("block2.conv1", act, width + 3, 3, stride=2, padding=1, **bits)
    fourth = make.conv("block2.conv2", third, width + 3, 3, weight_bits=weight_bits, act_bits=8, signed=True, padding=1)
    down = make.conv("block2.down", skip, width + 3, 1, weight_bits=weight_bits, act_bits=8, signed=True, stride=2)
    (total,) = make.add("block2.add", fourth, down, act=(act_bits, False))
    mean = make.pool("pool", total, 8)
    flat = make.flatten("flatten", mean)
    hidden = make.gemm("hidden", flat, 13, weight_bits=weight_bits, act_bits=act_bits)
    make.gemm("classifier", hidden, 10, weight_bits=8, act_bits=None)
    return make.graph()


def depthwise_graph(weight_bits: int = 4, act_bits: int = 4, *, seed: int = 1) -> IntegerGraph:
    """An inverted residual with a linear bottleneck: signed low-bit activations, depthwise and grouped convolutions."""
    make = Maker(f"depthwise-w{weight_bits}a{act_bits}", (1, 8, 8), seed)
    bits = {"weight_bits": weight_bits, "act_bits": act_bits}
    stem = make.conv("stem", "pixels", 6, 3, weight_bits=8, act_bits=act_bits, signed=True, padding=1)
    expand = make.conv("expand", stem, 24, 1, **bits)
    depthwise = make.conv("depthwise", expand, 24, 3, groups=24, padding=1, **bits)
    project = make.conv("project", depthwise, 6, 1, signed=True, **bits)
    (total,) = make.add("add", project, stem, act=(act_bits, True))
    signed_depthwise = make.conv("signed_depthwise", total, 6, 3, groups=6, stride=2, padding=1, **bits)
    grouped = make.conv("grouped", signed_depthwise, 10, 1, groups=2, **bits)
    pooled = make.max_pool("maxpool", grouped, 3, 2, ceil=True)
    flat = make.flatten("flatten", pooled)
    make.gemm("classifier", flat, 10, weight_bits=weight_bits, act_bits=None)
    return make.graph()


def odd_graph(weight_bits: int = 4, act_bits: int = 4, *, seed: int = 2) -> IntegerGraph:
    """Rectangular kernels, uneven strides, paddings and dilations; signed low-bit means; counts that fill no byte."""
    make = Maker(f"odd-w{weight_bits}a{act_bits}", (3, 13, 10), seed, zero_point=0)
    bits = {"weight_bits": weight_bits, "act_bits": act_bits}
    wide = make.conv("wide", "pixels", 7, (1, 3), stride=(2, 1), padding=(0, 2, 1, 0), **bits)
    dilated = make.conv("dilated", wide, 5, (3, 2), dilation=(2, 3), padding=(2, 1, 2, 2), signed=True, **bits)
    pooled = make.max_pool("maxpool", dilated, (2, 3), (1, 2), padding=(1, 0, 0, 1), dilation=(2, 1))
    mean = make.pool("pool", pooled, act_bits)
    flat = make.flatten("flatten", mean)
    hidden = make.gemm("hidden", flat, 9, signed=True, **bits)
    make.gemm("classifier", hidden, 3, weight_bits=weight_bits, act_bits=None)
    return make.graph()


def tie_graph() -> IntegerGraph:
    """Scales in powers of two, so that roundings meet exact ties, and sums beyond both ends of the codes."""
    rng = np.random.default_rng(5)

    def weight(*shape: int, scale: float) -> Weight:
        codes = rng.integers(-8, 8, shape).astype(np.int8)
        return Weight(codes=codes, bits=4, scale=np.full(shape[0], scale, np.float32))

    def value(name: str, shape: tuple[int, ...], scale: float, zero_point: int, qmax: int) -> Value:
        quantization = Quantization(scale=scale, zero_point=zero_point, qmax=qmax)
        return Value(name=name, shape=shape, quantization=quantization)

    values = (
        value("pixels", (1, 4, 4), 1.0, 128, 255),
        value("left", (8, 4, 4), 4.0, 128, 255),
        value("right", (8, 4, 4), 8.0, 8, 15),
        value("sum", (8, 4, 4), 8.0, 0, 15),
        value("mean", (8, 1, 1), 0.5, 0, 255),
        value("flat", (8,), 0.5, 0, 255),
        Value(name="logits", shape=(8,), quantization=None),
    )
    bias = np.arange(-4, 4, dtype=np.int32)
    nodes = (
        Conv(name="left", input="pixels", output="left", weight=weight(8, 1, 1, 1, scale=0.5), bias=bias),
        Conv(name="right", input="left", output="right", weight=weight(8, 8, 1, 1, scale=0.25), bias=bias),
        Add(name="sum", inputs=("left", "right"), outputs=("sum",)),
        GlobalAveragePool(name="mean", input="sum", output="mean"),
        Flatten(name="flat", input="mean", output="flat"),
        Gemm(name="classes", input="flat", output="logits", weight=weight(8, 8, scale=0.5), bias=bias),
    )
    return IntegerGraph(
        name="ties", input="pixels", output="logits", values={value.name: value for value in values}, nodes=nodes
    )


def resnet18_graph(weight_bits: int, act_bits: int, *, seed: int = 3, classes: int = 1000) -> IntegerGraph:
    """The published ResNet-18 at 224: 11.7 million weights, first and last layer and skips 8 bits."""
    make = Maker("resnet18", (3, 224, 224), seed)
    bits = {"weight_bits": weight_bits, "act_bits": act_bits}
    stem = make.conv("conv1", "pixels", 64, 7, weight_bits=8, act_bits=8, stride=2, padding=3)
    skip = act = make.max_pool("maxpool", stem, 3, 2, padding=1)
    for stage, width in enumerate((64, 128, 256, 512), start=1):
        for block in range(2):
            name, stride = f"layer{stage}.{block}", 2 if block == 0 and stage > 1 else 1
            inner = make.conv(f"{name}.conv1", act, width, 3, stride=stride, padding=1, **bits)
            wide = {"weight_bits": weight_bits, "act_bits": 8, "signed": True}
            inner = make.conv(f"{name}.conv2", inner, width, 3, padding=1, **wide)
            if stride == 2:
                skip = make.conv(f"{name}.downsample.0", act, width, 1, stride=2, **wide)
            skip, act = make.add(f"{name}.add", inner, skip, skip=(8, False), act=(act_bits, False))
    flat = make.flatten("flatten", make.pool("avgpool", skip, 8))
    make.gemm("fc", flat, classes, weight_bits=8, act_bits=None)
    return make.graph()


def pixels_for(graph: IntegerGraph, count: int, seed: int = 7) -> np.ndarray:
    """Random uint8 images [count, C, H, W], with a black and a white one among them."""
    images = np.random.default_rng(seed).integers(0, 256, (count, *graph.values[graph.input].shape), dtype=np.uint8)
    images[0] = 0
    if count > 1:
        images[1] = 255
    return images
