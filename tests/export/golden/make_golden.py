"""Write the golden files: portable models that expose every unit, with the integers they must compute.

    python tests/export/golden/make_golden.py

Run it from a checkout with mecdeploy installed, and commit what it writes. The expected integers come from the numpy
witness, not from any runtime. The files promise that old exports stay runnable: what exists is left alone. Delete a
file first, if what it holds was wrong.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))

from general_graphs import dense_graph, squeeze_excite_graph  # noqa: E402
from handmade_graphs import depthwise_graph, pixels_for, residual_graph  # noqa: E402
from integer_witness import evaluate  # noqa: E402
from onnx_sessions import expose_units  # noqa: E402

from mecdeploy.export import ExportConfig, export_model  # noqa: E402


def main() -> None:
    for graph in (residual_graph(4, 4), depthwise_graph(2, 4), squeeze_excite_graph(4, 4), dense_graph(4, 4)):
        if (FOLDER / f"{graph.name}.onnx").exists():
            continue
        data = expose_units(export_model(graph, ExportConfig(target="portable"), {}))
        (FOLDER / f"{graph.name}.onnx").write_bytes(data)
        np.savez_compressed(FOLDER / f"{graph.name}.npz", **evaluate(graph, pixels_for(graph, 3)))


if __name__ == "__main__":
    main()
