"""Where the time goes: the trace read run by run, names led back to the file, nothing left behind."""

import statistics
import tempfile

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from qdq_models import images, residual_network
from qdq_units import token_network

from mecdeploy.runtime_checks import CheckError, inspect_structure, profile_kernels, profiling

PIXELS = {"pixels": images(0, 2)}


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """An empty folder, for all temporary files of this process."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def profile(model, feed=PIXELS, **options):
    return profile_kernels(model.SerializeToString(), feed, **{"runs": 3, "warmup": 1, **options})


def relu_network():
    """What torch.onnx makes of a float convolution: onnxruntime fuses the ReLU and works on blocks of channels."""
    weight = np.ones((16, 16, 3, 3), np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="node_conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["y"], name="node_relu"),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 16, 8, 8]) for name in "xy"]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], [numpy_helper.from_array(weight, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_every_kernel_of_the_optimised_graph_is_there():
    model = residual_network(0)
    found = profile(model)
    assert {kernel.kernel: kernel.nodes for kernel in found.kernels} == inspect_structure(
        model.SerializeToString()
    ).kernels
    assert (found.runs, found.threads) == (3, 1)


def test_sums_are_those_of_the_nodes():
    found = profile(residual_network(0), {"pixels": images(0, 64)})  # enough for more than whole microseconds of 0
    assert sum(node.share for node in found.nodes) == pytest.approx(1)  # float64
    for kernel in found.kernels:
        own = [node for node in found.nodes if node.kernel == kernel.kernel]
        assert kernel.microseconds == sum(node.microseconds for node in own)
        assert kernel.share == pytest.approx(sum(node.share for node in own))  # float64
    times = [kernel.microseconds for kernel in found.kernels]
    assert times == sorted(times, reverse=True)
    own = sum(node.share for node in found.nodes if node.layer is None)
    assert sum(found.layers.values()) == pytest.approx(1 - own)  # float64


def test_nodes_are_led_back_to_the_layers_of_the_file():
    model = residual_network(0)
    found = profile(model)
    units = inspect_structure(model.SerializeToString()).packed_bits
    assert set(units) <= set(found.layers)  # each product, though the file calls the last one logits
    assert "logits" not in found.layers and not any("/" in layer or "token" in layer for layer in found.layers)
    assert {node.kernel for node in found.nodes if node.layer is None} <= {"Transpose"}  # of the pixels, to NHWC


def test_what_is_fused_in_a_float_island_belongs_to_it():
    model = token_network()
    islands = inspect_structure(model.SerializeToString()).islands
    shape = [axis.dim_value for axis in model.graph.input[0].type.tensor_type.shape.dim][1:]
    found = profile(model, {"pixels": images(0, 2, tuple(shape))})
    assert islands and {island.name for island in islands} <= set(found.layers)


def test_a_file_of_others_keeps_its_nodes_names():
    found = profile(relu_network(), {"x": np.ones((1, 16, 8, 8), np.float32)})
    fused = next(node for node in found.nodes if node.kernel == "Conv" or node.kernel == "FusedConv")
    assert fused.layer in ("node_conv", "node_relu")  # whichever name survives the fusion
    assert set(found.layers) <= {"node_conv", "node_relu"}


def event(index, name, kernel, duration):
    arguments = {"node_index": str(index), "op_name": kernel}
    return {"cat": "Node", "name": f"{name}_kernel_time", "dur": duration, "args": arguments}


def test_medians_are_over_runs_by_hand():
    def run(first, second, both):
        whole = {"cat": "Session", "name": "model_run", "dur": both, "args": {}}
        loop = [event(7, "", "Mul", second // 2)] * 2  # a node that ran twice within the run
        return [event(3, "a/sum_token_2", "QLinearConv", first), *loop, whole]

    start = [{"cat": "Session", "name": "session_initialization", "dur": 9, "args": {}}]
    runs = profiling._split([*start, *run(50, 90, 300), *run(10, 30, 60), *run(20, 30, 70), *run(90, 34, 150)])
    assert [dict(found.nodes) for found in runs][1] == {
        ("3", "a/sum_token_2", "QLinearConv"): 10,
        ("7", "", "Mul"): 30,
    }
    layers = profiling._Layers(relu_network().SerializeToString())
    nodes = [helper.make_node("QLinearConv", [], ["z"]), helper.make_node("Mul", [], ["c_token_4"])]
    found = profiling._summarize(runs[1:], onnx.GraphProto(node=nodes), layers, 2)
    assert [(node.microseconds, node.share) for node in found.nodes] == [(20, 0.4), (30, 0.6)]
    assert [node.layer for node in found.nodes] == [None, "node_conv"]  # the nameless one by what it writes
    assert [kernel.kernel for kernel in found.kernels] == ["Mul", "QLinearConv"]
    assert found.run_microseconds == statistics.median([60, 70, 150])


def test_nothing_is_left_on_the_disk(temporary):
    profile(residual_network(0))
    with pytest.raises(CheckError, match="onnxruntime could not run it"):
        profile(residual_network(0), {"pixels": np.zeros((1, 5, 3, 3), np.uint8)})
    with pytest.raises(CheckError, match="broken.onnx: onnxruntime refuses the model"):
        path = temporary / "broken.onnx"
        path.write_bytes(b"nonsense")
        profile_kernels(path, PIXELS)
    assert [path.name for path in temporary.iterdir()] == ["broken.onnx"]


def test_refusals(monkeypatch):
    with pytest.raises(CheckError, match="a profile over 0 runs after 1; give at least one run"):
        profile(residual_network(0), runs=0)
    split = profiling._split
    monkeypatch.setattr(profiling, "_split", lambda events: split(events)[:-1])
    with pytest.raises(CheckError, match="profiler kept 3 of 4 runs; profile fewer runs"):
        profile(residual_network(0))
