"""Which function writes which node type, each the pattern that onnxruntime fuses into an integer kernel.

The patterns were found by measurement; each departure noted beside them costs the integer kernel. To add a node type:
a dataclass in graph.py, its rule in rules.py, its shape in shapes.py, a function in a file of its purpose, a line here.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

from mecdeploy.export.emission.builder import GraphBuilder
from mecdeploy.export.emission.elementwise import emit_add, emit_elementwise
from mecdeploy.export.emission.islands import emit_dequantize, emit_float_island, emit_quantize
from mecdeploy.export.emission.movement import (
    emit_concat,
    emit_flatten,
    emit_max_pool,
    emit_reshape,
    emit_slice,
    emit_transpose,
)
from mecdeploy.export.emission.pooling import emit_average_pool, emit_global_average_pool
from mecdeploy.export.emission.weighted import emit_conv, emit_gemm
from mecdeploy.export.graph import (
    Add,
    AveragePool,
    Concat,
    Conv,
    Dequantize,
    Elementwise,
    Flatten,
    FloatIsland,
    Gemm,
    GlobalAveragePool,
    MaxPool,
    Quantize,
    Reshape,
    Slice,
    Transpose,
)

EMITTERS: MappingProxyType[type[Any], Callable[[GraphBuilder, Any], None]] = MappingProxyType(
    {
        Conv: emit_conv,
        Gemm: emit_gemm,
        Add: emit_add,
        Elementwise: emit_elementwise,
        MaxPool: emit_max_pool,
        AveragePool: emit_average_pool,
        GlobalAveragePool: emit_global_average_pool,
        Flatten: emit_flatten,
        Reshape: emit_reshape,
        Transpose: emit_transpose,
        Slice: emit_slice,
        Concat: emit_concat,
        FloatIsland: emit_float_island,
        Quantize: emit_quantize,
        Dequantize: emit_dequantize,
    }
)
