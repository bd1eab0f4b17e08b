"""export_model as a whole: what it refuses, what it costs, and that it needs no torch."""

from __future__ import annotations

import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import onnx
import pytest
from general_graphs import (
    dense_graph,
    headless_graph,
    shuffle_graph,
    squeeze_excite_graph,
    swish_graph,
    token_graph,
)
from handmade_graphs import depthwise_graph, odd_graph, residual_graph, resnet18_graph
from island_graphs import attention_graph

import mecdeploy
from mecdeploy import export
from mecdeploy.export import ExportConfig, ExportError, export_model
from mecdeploy.export.graph import Conv, FloatIsland, Gemm, IntegerGraph

GRAPHS = [
    residual_graph, depthwise_graph, odd_graph, squeeze_excite_graph, swish_graph, dense_graph, shuffle_graph,
    token_graph, headless_graph, attention_graph,
]  # fmt: skip


@pytest.mark.parametrize("input_kind", ["uint8", "float"])
@pytest.mark.parametrize("target", ["onnxruntime", "portable"])
@pytest.mark.parametrize("weight_bits", [2, 3, 4, 8])
def test_onnx_accepts_every_export(weight_bits: int, target: str, input_kind: str) -> None:
    for build in GRAPHS:
        graph = build(weight_bits, 3)
        data = export_model(graph, ExportConfig(target=target, input=input_kind), {})
        assert isinstance(data, bytes)
        onnx.checker.check_model(data, full_check=True)
        inferred = onnx.shape_inference.infer_shapes(data, check_type=True, strict_mode=True, data_prop=True)
        dims = {
            info.name: tuple(dim.dim_value for dim in info.type.tensor_type.shape.dim[1:])
            for info in inferred.graph.value_info
        }
        # onnx finds the shapes that the graph promised, on its own; behind a Reshape to computed sizes, as islands have
        # them, it knows them only at run time
        has_islands = any(isinstance(node, FloatIsland) for node in graph.nodes)
        for value in graph.values.values():
            is_inner = value.name not in (graph.input, graph.output)
            if is_inner and (all(dims[value.name]) or not has_islands):
                assert dims[value.name] == value.shape, value.name


def test_what_onnx_refuses_is_an_export_error() -> None:
    with pytest.raises(ExportError, match=r"^: onnx refuses the exported model: .*name.*"):
        export_model(replace(residual_graph(), name=""), ExportConfig(), {})


@pytest.fixture(scope="module")
def resnet18() -> IntegerGraph:
    return resnet18_graph(2, 4)


@pytest.mark.parametrize(
    ("bits", "target", "megabytes"),
    [
        (4, "onnxruntime", 6.3),
        (4, "portable", 6.3),
        (3, "portable", 5.4),
        (2, "onnxruntime", 3.5),
        (2, "portable", 3.5),
    ],
)
def test_resnet18_at_224_is_small_and_fast_to_export(
    resnet18: IntegerGraph, bits: int, target: str, megabytes: float
) -> None:
    weights = sum(node.weight.codes.size for node in resnet18.nodes if isinstance(node, Conv | Gemm))
    assert weights == 11_678_912
    config = ExportConfig(bits=bits, target=target)
    start = time.process_time()
    data = export_model(resnet18, config, {})
    assert time.process_time() - start < 3.0
    assert len(data) <= megabytes * 1e6
    tracemalloc.start()
    export_model(resnet18, config, {})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # the budget is three times the fp32 weights; protobuf's own copies, each of the file's size, are not in this count
    assert peak + 4 * len(data) < 3 * 4 * weights


def test_importing_the_room_imports_no_torch() -> None:
    code = "import sys, mecdeploy.export; sys.exit(sum(name in sys.modules for name in ('torch', 'onnxruntime')))"
    home = Path(mecdeploy.__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=home, timeout=60, check=False).returncode == 0


def test_lower_is_loaded_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    capture = ModuleType("mecdeploy.export.capture")
    capture.lower = lambda model: "graph"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mecdeploy.export.capture", capture)
    assert export.lower("model") == "graph"  # type: ignore[arg-type, comparison-overlap]
    with pytest.raises(AttributeError, match="module 'mecdeploy.export' has no attribute 'raise_'"):
        _ = export.raise_  # type: ignore[attr-defined]
