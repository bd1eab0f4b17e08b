"""onnxruntime on one operator between DequantizeLinear and QuantizeLinear."""

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper


def one_operator(op, sources, target, shape, **attributes):
    """A session of DequantizeLinear -> op -> QuantizeLinear. sources, target: (scale, zero_point).

    shape: of every input, or a list with one of each, without the batch.
    """
    shapes = shape if shape and isinstance(shape[0], list) else [shape] * len(sources)
    nodes, constants, inputs = [], [], []
    for name, (scale, zero_point) in [*zip("ab", sources, strict=False), ("y", target)]:
        constants.append(numpy_helper.from_array(np.float32(scale), f"{name}.scale"))
        constants.append(numpy_helper.from_array(np.uint8(zero_point), f"{name}.zero"))
    for name, size in zip("ab", shapes, strict=False):
        inputs.append(helper.make_tensor_value_info(name, TensorProto.UINT8, ["N", *size]))
        nodes.append(helper.make_node("DequantizeLinear", [name, f"{name}.scale", f"{name}.zero"], [f"{name}.real"]))
    reals = [f"{value.name}.real" for value in inputs]
    nodes.append(helper.make_node(op, reals, ["y.real"], **attributes))
    nodes.append(helper.make_node("QuantizeLinear", ["y.real", "y.scale", "y.zero"], ["y"]))
    output = helper.make_tensor_value_info("y", TensorProto.UINT8, None)
    graph = helper.make_graph(nodes, op, inputs, [output], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
