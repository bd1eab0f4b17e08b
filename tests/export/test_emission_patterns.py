"""The patterns of elementwise kernels, clips, movement and Gemms over tokens, node by node."""

from __future__ import annotations

import numpy as np
import pytest
from general_graphs import (
    dense_graph,
    headless_graph,
    shuffle_graph,
    squeeze_excite_graph,
    swish_graph,
    token_graph,
)
from island_graphs import attention_graph
from onnx_files import constants, exported, writers


def test_a_clip_holds_what_uint8_does_not() -> None:
    model = exported(dense_graph(4, 4))
    shared, ranges = writers(model), {}
    for name, node in shared.items():
        if node.op_type == "Clip":
            low, high = (int(constants(model)[end]) if end else None for end in (*node.input[1:], "")[:2])
            ranges[name] = (low, high)
            assert node.input[0] == f"{name}/unclipped"
    zero_point = dense_graph(4, 4).values["rectified"].quantization.zero_point  # type: ignore[union-attr]
    assert ranges["stem"] == (None, 15)
    assert ranges["rectified"] == (zero_point, 15)
    assert "inside" not in ranges  # 8 bits from 0: uint8 holds them

    wide = dense_graph(4, 8)
    clip = writers(exported(wide))["rectified"]
    zero_point = wide.values["rectified"].quantization.zero_point  # type: ignore[union-attr]
    assert (clip.op_type, len(clip.input)) == ("Clip", 2)
    assert constants(exported(wide))[clip.input[1]] == zero_point


def test_elementwise_patterns() -> None:
    made = writers(exported(swish_graph(4, 8)))
    for output, between, op_type, inputs in (
        ("stem.gate", "sigmoid", "Sigmoid", ["stem/real"]),
        ("swish", "product", "Mul", ["stem/real", "stem.gate/real"]),
        ("leaky", "leaky_relu", "LeakyRelu", ["again/real"]),
    ):
        assert made[output].op_type == "QuantizeLinear"
        assert made[output].input[0] == f"{output}/{between}"
        assert (made[f"{output}/{between}"].op_type, list(made[f"{output}/{between}"].input)) == (op_type, inputs)
    (alpha,) = made["leaky/leaky_relu"].attribute
    assert (alpha.name, np.float32(alpha.f)) == ("alpha", np.float32(0.013))


def test_a_hard_sigmoid_is_a_sixth_plus_a_half() -> None:
    graph = squeeze_excite_graph(4, 8)
    model = exported(graph)
    made, arrays = writers(model), constants(model)
    source = graph.values["fc2"].quantization
    assert source is not None
    # the constant comes first: see emission/elementwise.py
    assert (made["gate/sum"].op_type, list(made["gate/sum"].input)) == ("Add", ["gate/half", "gate/sixth"])
    codes, scale, zero_point = made["gate/sixth"].input
    assert (codes, arrays[zero_point]) == ("fc2", source.zero_point)
    assert arrays[scale] == np.float32(source.scale) / np.float32(6)
    assert [arrays[name] for name in made["gate/half"].input] == [1, np.float32(0.5), 0]
    assert all(arrays[name].dtype == np.uint8 for name in made["gate/half"].input[::2])
    assert (made["gate"].op_type, made["gate"].input[0]) == ("QuantizeLinear", "gate/sum")


def test_codes_move_as_they_are() -> None:
    graph = shuffle_graph()
    model = exported(graph)
    made, arrays = writers(model), constants(model)
    for name, op_type, inputs in (
        ("left", "Slice", ["stem"]),
        ("joined", "Concat", ["left", "conv2"]),
        ("groups", "Reshape", ["joined"]),
        ("swapped", "Transpose", ["groups"]),
    ):
        assert (made[name].op_type, list(made[name].input)[: len(inputs)]) == (op_type, inputs)
    assert [arrays[name].tolist() for name in made["odd_rows"].input[1:]] == [[1], [12], [2], [2]]
    assert arrays[made["groups"].input[1]].tolist() == [-1, 2, 4, 12, 10]
    assert {tensor.name for tensor in model.graph.initializer if tensor.name.startswith("int64/")} == {
        f"int64/{name}" for name in ["0", "1", "2", "3", "4", "8", "10", "12", "-1x2x4x12x10", "-1x8x12x10"]
    }


@pytest.mark.parametrize("act_bits", [4, 8])
def test_a_gemm_over_tokens_multiplies_rows_of_codes(act_bits: int) -> None:
    model = exported(token_graph(4, act_bits))
    made, arrays = writers(model), constants(model)
    rows = made["hidden/rows"]
    assert (rows.op_type, rows.input[0], arrays[rows.input[1]].tolist()) == ("Reshape", "tokens", [-1, 12])
    assert list(made["hidden/rows/real"].input) == ["hidden/rows", "tokens/scale", "tokens/zero_point"]
    assert made["hidden/sum"].input[0] == "hidden/rows/real"
    assert made["hidden/product"].op_type == ("Clip" if act_bits == 4 else "QuantizeLinear")
    assert (made["hidden"].op_type, made["hidden"].input[0]) == ("Reshape", "hidden/product")
    assert arrays[made["hidden"].input[1]].tolist() == [-1, 16, 21]
    # a float output keeps its own name behind the Reshape
    attention = writers(exported(attention_graph()))
    assert (attention["qkv"].op_type, attention["qkv/product"].op_type) == ("Reshape", "Gemm")


def test_logits_from_codes_are_one_dequantization() -> None:
    made = writers(exported(headless_graph()))
    assert (made["logits"].op_type, made["logits"].input[0]) == ("DequantizeLinear", "flat")
    assert "flat/real" not in made
