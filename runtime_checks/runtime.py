"""onnxruntime sessions: as users run the file, with every unit's integers exposed, or with its optimiser off."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper

from mecdeploy.runtime_checks.errors import CheckError
from mecdeploy.runtime_checks.model_file import LOGITS, ModelFile
from mecdeploy.runtime_checks.patterns import Graph

_PROVIDERS = ["CPUExecutionProvider"]
_FATAL_ONLY = 4  # what goes wrong is raised; only the command line prints


class Runtime:
    """A session on the CPU.

    exposed: tensors returned beside the logits. Making the output of a QuantizeLinear, a Clip or a float Gemm a graph
    output leaves the fusion around it as it was, so these are the integers of the model people serve (check_model
    compares the logits of both).
    optimize: False turns onnxruntime's graph optimiser off: float kernels between DequantizeLinear and QuantizeLinear.
    threads: 0 lets onnxruntime choose.
    """

    def __init__(
        self, file: ModelFile, *, exposed: Sequence[str] = (), optimize: bool = True, threads: int = 0
    ) -> None:
        self._file = file
        self._names = [*exposed, LOGITS]
        model = expose(file, exposed) if exposed else file.proto
        self._session = open_session(model.SerializeToString(), file.label, optimize=optimize, threads=threads)

    def run(self, pixels: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """Every exposed tensor and the logits for raw pixels [n, C, H, W]."""
        try:
            results = self._session.run(self._names, self._file.feed(pixels))
        except Exception as error:  # onnxruntime's errors share no narrower base class
            label = self._file.label
            raise CheckError(f"{label}: onnxruntime could not run it ({brief(error)}). Export it again.") from None
        return dict(zip(self._names, results, strict=True))


def expose(file: ModelFile, names: Sequence[str]) -> onnx.ModelProto:
    """A copy of the model whose tensors `names`, stored codes or float outputs of Gemms, are graph outputs too."""
    copy = onnx.ModelProto()
    copy.CopyFrom(file.proto)
    graph = Graph(file.proto.graph, file.islands)
    present = {value.name for value in copy.graph.output}
    for name in names:
        if name not in present:
            kind = TensorProto.UINT8 if graph.is_stored(name) else TensorProto.FLOAT
            copy.graph.output.append(helper.make_tensor_value_info(name, kind, None))
    return copy


class Refusal(CheckError):
    """onnxruntime refuses a model. reason: the first line of why."""

    def __init__(self, label: str, reason: str) -> None:
        super().__init__(f"{label}: onnxruntime refuses the model ({reason}). Export it again.")
        self.reason = reason


def optimized_graph(model: bytes, label: str) -> onnx.GraphProto:
    """The graph that onnxruntime runs at its default optimisation level."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        open_session(model, label, save_optimized=str(path))
        return onnx.load(path).graph


def open_session(
    model: bytes | os.PathLike[str],
    label: str,
    *,
    optimize: bool = True,
    threads: int = 0,
    alone: bool = False,
    save_optimized: str = "",
    profile: str = "",
) -> onnxruntime.InferenceSession:
    """A session at the default optimisation level (or none); Refusal with onnxruntime's first line if it refuses.

    alone: onnxruntime's own defaults, to be timed: waiting threads spin (but not beyond a run, or they would take the
    cores from the session that is timed next), and a session keeps the memory it has used. Without them the integers
    are the same; a check on a busy machine takes less time, and its four sessions less memory.
    save_optimized: where to write the optimised graph, if anywhere. profile: what the name of the profiler's trace
    begins with, where there is to be one; end_profiling() writes it.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    options.intra_op_num_threads = threads
    if alone:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    else:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.enable_cpu_mem_arena = False
    if save_optimized:
        options.optimized_model_filepath = save_optimized
    if profile:
        options.enable_profiling = True
        options.profile_file_prefix = profile
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = model if isinstance(model, bytes) else os.fspath(model)
    try:
        return onnxruntime.InferenceSession(source, options, providers=_PROVIDERS, enable_fallback=0)  # it prints
    except Exception as error:  # onnxruntime's errors share no narrower base class
        raise Refusal(label, brief(error)) from None


def batches(count: int, size: int) -> Iterator[slice]:
    """Slices that cover range(count), the last one maybe shorter."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def brief(error: Exception) -> str:
    """The first line of what onnxruntime says."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
