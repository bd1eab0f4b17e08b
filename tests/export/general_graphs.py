"""IntegerGraphs of what torchvision's classifiers are made of, beyond residual convolutions: one idea each."""

from __future__ import annotations

from dataclasses import replace

from graph_maker import Maker

from mecdeploy.export.graph import IntegerGraph


def squeeze_excite_graph(weight_bits: int = 4, act_bits: int = 4, *, seed: int = 10) -> IntegerGraph:
    """MobileNetV3's gate: mean, two 1x1 convolutions, a hard sigmoid, a product broadcast over the image."""
    make = Maker("squeeze-excite", (3, 12, 9), seed)
    bits = {"weight_bits": weight_bits, "act_bits": act_bits}
    stem = make.learned(make.conv("stem", "pixels", 13, 3, weight_bits=8, act_bits=act_bits, signed=True, padding=1))
    mean = make.pool("squeeze", stem, 8)
    inner = make.conv("fc1", mean, 5, 1, **bits)
    outer = make.learned(make.conv("fc2", inner, 13, 1, weight_bits=weight_bits, act_bits=8, signed=True))
    gate = make.gate("gate", "hard_sigmoid", outer, 8)
    scaled = make.learned(make.mul("scaled", gate, stem, act_bits))
    # hard-swish: the gate of a whole image times the image
    wide = make.learned(make.conv("wide", scaled, 6, 3, weight_bits=weight_bits, act_bits=8, signed=True, stride=2))
    swish = make.learned(make.mul("swish", wide, make.gate("wide.gate", "hard_sigmoid", wide, act_bits), act_bits))
    return _classified(make, make.conv("last", swish, 7, 1, **bits))


def swish_graph(weight_bits: int = 4, act_bits: int = 4, *, seed: int = 11) -> IntegerGraph:
    """EfficientNet's x * sigmoid(x), a leaky ReLU, and a ReLU that no convolution could absorb."""
    make = Maker("swish", (3, 12, 10), seed)
    wide = {"weight_bits": weight_bits, "act_bits": 8, "signed": True}
    stem = make.learned(make.conv("stem", "pixels", 16, 3, weight_bits=8, act_bits=8, signed=True, padding=1))
    swish = make.learned(make.mul("swish", stem, make.gate("stem.gate", "sigmoid", stem, 8), act_bits))
    depthwise = make.learned(make.conv("depthwise", swish, 16, 3, groups=16, padding=1, **wide))
    gate = make.gate("depthwise.gate", "sigmoid", depthwise, act_bits)
    leaky = make.learned(make.leaky_relu("leaky", make.mul("again", gate, depthwise, 8), 0.013, act_bits))
    relu = make.leaky_relu("relu", make.learned(make.conv("third", leaky, 5, 1, **wide)), 0.0, act_bits)
    return _classified(make, relu)


def dense_graph(weight_bits: int = 4, act_bits: int = 4, *, seed: int = 12) -> IntegerGraph:
    """DenseNet's growing concatenation at one scale, a ReLU as qmin among signed codes, and windows of every kind."""
    make = Maker("dense", (3, 12, 10), seed)
    bits = {"weight_bits": weight_bits, "act_bits": act_bits}
    wide = make.learned(make.conv("stem", "pixels", 5, 3, weight_bits=8, act_bits=act_bits, signed=True, padding=1))
    pooled = make.max_pool("maxpool", wide, 3, 2, padding=1)
    # one branch is rectified: its codes start at the zero point that all share
    rectified = make.conv("rectified", pooled, 4, 3, padding=1, **bits)
    make.share(rectified, pooled, qmin=make.codes(pooled).zero_point)
    joined = make.concat("joined", pooled, rectified)
    grown = make.conv("grown", joined, 3, 3, padding=1, **bits)
    make.share(grown, pooled)
    all_three = make.concat("all", joined, grown, rectified)
    halved = make.average_pool("halved", make.conv("transition", all_three, 6, 1, **bits), 2, 2, act_bits)
    inside = make.average_pool("inside", halved, 3, 1, 8, padding=1, count_include_pad=False)
    padded = make.average_pool("padded", inside, (2, 3), 1, act_bits, padding=(1, 2, 0, 1))
    whole = make.average_pool("whole", make.conv("last", padded, 7, 1, **bits), (3, 3), 2, 8)
    make.gemm("classifier", make.flatten("flat", whole), 10, weight_bits=8, act_bits=None)
    return make.graph()


def shuffle_graph(weight_bits: int = 4, act_bits: int = 4, *, seed: int = 13) -> IntegerGraph:
    """ShuffleNetV2's unit: two halves, one of them convolved, side by side again, channels shuffled; strided slices."""
    make = Maker("shuffle", (3, 12, 10), seed)
    bits = {"weight_bits": weight_bits, "act_bits": act_bits}
    stem = make.conv("stem", "pixels", 8, 3, weight_bits=8, act_bits=act_bits, padding=1)
    left, right = make.slice("left", stem, 1, 0, 4), make.slice("right", stem, 1, 4, 8)
    inner = make.conv("conv1", right, 4, 1, **bits)
    depthwise = make.conv("depthwise", inner, 4, 3, groups=4, padding=1, signed=True, **bits)
    outer = make.conv("conv2", depthwise, 4, 1, **bits)
    make.share(outer, left)
    groups = make.reshape("groups", make.concat("joined", left, outer), (2, 4, 12, 10))
    shuffled = make.reshape("shuffled", make.transpose("swapped", groups, 0, 2, 1, 3, 4), (8, 12, 10))
    every_third = make.slice("every_third", make.slice("odd_rows", shuffled, 2, 1, 12, 2), 3, 0, 10, 3)
    return _classified(make, make.conv("last", every_third, 6, 3, **bits))


def token_graph(weight_bits: int = 4, act_bits: int = 4, *, seed: int = 14) -> IntegerGraph:
    """Patches as tokens, an integer perceptron over their last axis with its residual sum, the first token's logits."""
    make = Maker("tokens", (3, 16, 16), seed)
    patches = make.learned(make.conv("patches", "pixels", 12, 4, stride=4, weight_bits=8, act_bits=8, signed=True))
    tokens = make.transpose("tokens", make.reshape("rows", patches, (12, 16)), 0, 2, 1)
    hidden = make.gemm("hidden", tokens, 21, weight_bits=weight_bits, act_bits=act_bits)
    back = make.learned(make.gemm("back", hidden, 12, weight_bits=weight_bits, act_bits=8, signed=True))
    (total,) = make.add("total", tokens, back, act=(act_bits, True))
    first = make.reshape("first", make.slice("cut", total, 1, 0, 1), (12,))
    make.gemm("classifier", first, 10, weight_bits=8, act_bits=None)
    return make.graph()


def headless_graph(weight_bits: int = 4, act_bits: int = 4, *, seed: int = 15) -> IntegerGraph:
    """SqueezeNet's end: the logits are the mean of a convolution, codes until the last node."""
    make = Maker("headless", (3, 12, 10), seed)
    stem = make.conv("stem", "pixels", 8, 3, weight_bits=8, act_bits=act_bits, padding=1)
    scores = make.conv("scores", stem, 10, 1, weight_bits=weight_bits, act_bits=8)
    make.dequantize(make.flatten("flat", make.pool("pool", scores, 8)))
    return make.graph()


def matrix_logits_graph() -> IntegerGraph:
    """A Gemm over every token whose rows are the logits: a float output of more than one axis."""
    graph = token_graph()
    (total,) = (value for value in graph.values.values() if value.name == "total/act")
    kept = tuple(node for node in graph.nodes if node.name not in ("cut", "first", "classifier"))
    classifier = replace(graph.nodes[-1], input=total.name)
    values = {name: value for name, value in graph.values.items() if name not in ("cut", "first")}
    values["logits"] = replace(graph.values["logits"], shape=(16, 10))
    return replace(graph, nodes=(*kept, classifier), values=values)


def _classified(make: Maker, source: str) -> IntegerGraph:
    flat = make.flatten("flat", make.pool("pool", source, 8))
    make.gemm("classifier", flat, 10, weight_bits=8, act_bits=None)
    return make.graph()
