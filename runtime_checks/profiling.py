"""Where the time of a run goes, by onnxruntime's own profiler: node by node, and by kernel and layer of the file."""

from __future__ import annotations

import json
import os
import statistics
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
from numpy.typing import NDArray

from mecdeploy.runtime_checks.errors import CheckError
from mecdeploy.runtime_checks.model_file import read_model
from mecdeploy.runtime_checks.patterns import Graph
from mecdeploy.runtime_checks.runtime import brief, open_session
from mecdeploy.runtime_checks.structure import original_name

_KERNEL_TIME = "_kernel_time"
_METADATA = "mecdeploy.format"


@dataclass(frozen=True, kw_only=True)
class NodeTime:
    """One node of the graph that onnxruntime runs.

    name: onnxruntime's. layer: what it computes in the file: of a file of ours the unit or float island, of any other
    the node; None for what onnxruntime put in itself. kernel: the op type. microseconds: median over the runs, each in
    whole microseconds. share: of the sum over all nodes.
    """

    name: str
    layer: str | None
    kernel: str
    microseconds: float
    share: float


@dataclass(frozen=True, kw_only=True)
class KernelTime:
    """All nodes of one op type: how many, and the sums of their microseconds and shares."""

    kernel: str
    nodes: int
    microseconds: float
    share: float


@dataclass(frozen=True, kw_only=True)
class KernelProfile:
    """nodes: in the order of execution. kernels: the slowest first.

    run_microseconds: median of a whole run under the profiler, whose own cost it holds: more than the nodes together.
    """

    nodes: tuple[NodeTime, ...]
    kernels: tuple[KernelTime, ...]
    run_microseconds: float
    runs: int
    threads: int

    @property
    def layers(self) -> dict[str, float]:
        """Layer of the file -> its share of the time, in the order of execution.

        What is missing to 1 onnxruntime spent on nodes of its own, such as a change of layout at the input.
        """
        shares: dict[str, float] = defaultdict(float)
        for node in self.nodes:
            if node.layer is not None:
                shares[node.layer] += node.share
        return dict(shares)


def profile_kernels(
    model: bytes | Path,
    feed: Mapping[str, NDArray[Any]],
    *,
    threads: int = 1,
    runs: int = 20,
    warmup: int = 3,
) -> KernelProfile:
    """Run a model under onnxruntime's profiler. Nothing is left on the disk.

    model: ONNX bytes or path. feed: input name -> array. warmup: runs at the start that do not count.
    Raises CheckError for a model that onnxruntime refuses and for a feed that it does not take.
    """
    if runs < 1 or warmup < 0:
        raise CheckError(f"a profile over {runs} runs after {warmup}; give at least one run.")
    label = "model" if isinstance(model, bytes) else model.name
    with TemporaryDirectory(prefix="mecdeploy-") as folder:
        optimized = os.path.join(folder, "optimized.onnx")
        session = open_session(
            model, label, threads=threads, alone=True, save_optimized=optimized, profile=os.path.join(folder, "trace")
        )
        try:
            for _ in range(warmup + runs):
                session.run(None, dict(feed))
        except Exception as error:  # onnxruntime's errors share no narrower base class
            raise CheckError(f"{label}: onnxruntime could not run it ({brief(error)}).") from None
        finally:
            trace = Path(session.end_profiling())  # also closes the file that lies in the folder
        events = json.loads(trace.read_text())
        graph = onnx.load(optimized, load_external_data=False).graph
    traced = _split(events)
    if len(traced) != warmup + runs:
        raise CheckError(
            f"{label}: onnxruntime's profiler kept {len(traced)} of {warmup + runs} runs; profile fewer runs."
        )
    return _summarize(traced[warmup:], graph, _Layers(model), threads)


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One run: (node index, name, kernel) -> microseconds, in the order of execution, and microseconds of it all."""

    nodes: Mapping[tuple[str, str, str], float]
    microseconds: float


def _split(events: list[dict[str, Any]]) -> list[_Run]:
    """The trace, run by run: every run's nodes stand before the event of the run itself."""
    runs: list[_Run] = []
    nodes: dict[tuple[str, str, str], float] = defaultdict(float)
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith(_KERNEL_TIME):
            about = event["args"]
            nodes[about["node_index"], event["name"].removesuffix(_KERNEL_TIME), about["op_name"]] += event["dur"]
        elif event["name"] == "model_run":
            runs.append(_Run(nodes=dict(nodes), microseconds=event["dur"]))
            nodes.clear()
    return runs


def _summarize(runs: list[_Run], graph: onnx.GraphProto, layers: _Layers, threads: int) -> KernelProfile:
    keys = list(dict.fromkeys(key for run in runs for key in run.nodes))
    medians = {key: statistics.median(run.nodes.get(key, 0.0) for run in runs) for key in keys}
    total = sum(medians.values()) or 1.0  # all below half a microsecond: no share is known
    # onnxruntime saves the graph in the order in which it runs it; then a node without a name is known by its output.
    in_order = [node.op_type for node in graph.node] == [kernel for _, _, kernel in keys]
    outputs = [node.output[0] for node in graph.node] if in_order else [""] * len(keys)
    nodes = tuple(
        NodeTime(
            name=name,
            layer=layers.find(name, output),
            kernel=kernel,
            microseconds=medians[index, name, kernel],
            share=medians[index, name, kernel] / total,
        )
        for (index, name, kernel), output in zip(keys, outputs, strict=True)
    )
    return KernelProfile(
        nodes=nodes,
        kernels=_by_kernel(nodes),
        run_microseconds=statistics.median(run.microseconds for run in runs),
        runs=len(runs),
        threads=threads,
    )


def _by_kernel(nodes: tuple[NodeTime, ...]) -> tuple[KernelTime, ...]:
    groups: dict[str, list[NodeTime]] = defaultdict(list)
    for node in nodes:
        groups[node.kernel].append(node)
    kernels = [
        KernelTime(
            kernel=kernel,
            nodes=len(members),
            microseconds=sum(node.microseconds for node in members),
            share=sum(node.share for node in members),
        )
        for kernel, members in groups.items()
    ]
    return tuple(sorted(kernels, key=lambda found: -found.microseconds))


class _Layers:
    """What a file calls the nodes that onnxruntime made of it.

    Of ours, a node is called by its layer, or `<layer>/<part>`; the last Gemm is called logits, and its weights know
    the layer.
    """

    def __init__(self, model: bytes | Path) -> None:
        proto = onnx.load_from_string(model) if isinstance(model, bytes) else onnx.load(model, load_external_data=False)
        self._ours = any(entry.key == _METADATA for entry in proto.metadata_props)
        producers = {name: node.name for node in proto.graph.node for name in node.output}
        self._names: dict[str, str] = {**producers, **{node.name: node.name for node in proto.graph.node if node.name}}
        if self._ours:
            file = read_model(model)
            units = {product.node.name: product.unit for product in Graph(file.proto.graph, file.islands).products()}
            self._names = {name: units.get(node, node.split("/")[0]) for name, node in self._names.items()}
            self._names |= {layer: layer for layer in self._names.values()}

    def find(self, name: str, output: str) -> str | None:
        """The layer of a node of the optimised graph, by its name or else by what it writes.

        The optimiser appends to names, also after a slash.
        """
        for candidate in (original_name(name), original_name(output)):
            parts = candidate.split("/")
            for count in range(len(parts), 0, -1):
                found = self._names.get("/".join(parts[:count]))
                if found:
                    return found
        return None
