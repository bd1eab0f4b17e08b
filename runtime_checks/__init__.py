"""The runtime checks: an independent witness of what onnxruntime computes. Imports no other room, and never torch.

checks.py       check_model: everything below, in one report
structure.py    which kernels onnxruntime made of the file; how many bits every weight takes in it; what stays float
exactness.py    PyTorch == onnxruntime == interpreter, unit by unit; float islands apart
  tally.py        differences, counted over batches
  sentences.py    differences, explained
accuracy.py     both networks over all images
interpreter.py  the graph executed in numpy integers, from the file alone
  products.py     convolutions and Gemms, by op type
  pooling.py      average pools
  elementwise.py  sums, products, sigmoids, leaky ReLUs: one function an op type
  movement.py     what only moves codes: one function an op type
  steps.py        what those tables hold
  patterns.py     DequantizeLinear -> op -> QuantizeLinear as operands
  weights.py      packed weights and other constants, decoded
  kernels.py      integer convolutions, products and pools
  arithmetic.py   onnxruntime's rounding, as formulas
inspection.py   inspect_model: the facts about any ONNX file, in one report
  inspection_report.py  that report, as frozen data
  file_facts.py   ends, operators, bytes by tensor, data beside the file
  attribution.py  which kernels the nodes became, what stays float
  layers.py       layers with weights, of any tool, and how the weights are stored
  activations.py  how what they read and write is quantised
  reasons.py      why an operator stays float
    weight_reasons.py  as far as weight and bias go
  cautions.py     integer kernels that cannot do what the file says
op_types.py     which kernels compute in integers, which in float
runtime.py      onnxruntime sessions: plain, with units exposed, optimiser off
model_file.py   reading the file and the contract in its metadata
machine.py      processor and versions
report.py       the results, as frozen data
latency.py      interleaved timing of several models
loading.py      load time and peak memory, in processes of their own
  loading_child.py  what runs there
inputs.py       what any ONNX file reads, and random values of that
profiling.py    where the time of a run goes: by node, by kernel, by layer
"""

from mecdeploy.runtime_checks.checks import check_model
from mecdeploy.runtime_checks.errors import CheckError
from mecdeploy.runtime_checks.exactness import Reference
from mecdeploy.runtime_checks.inputs import ModelInput, ModelInputs, parse_shape, random_feed, read_inputs
from mecdeploy.runtime_checks.inspection import inspect_model
from mecdeploy.runtime_checks.inspection_report import InspectionReport
from mecdeploy.runtime_checks.interpreter import Interpreter, interpret
from mecdeploy.runtime_checks.latency import LatencyReport, compare_latency
from mecdeploy.runtime_checks.loading import LoadReport, measure_loading
from mecdeploy.runtime_checks.model_file import ModelFile, read_model
from mecdeploy.runtime_checks.profiling import KernelProfile, profile_kernels
from mecdeploy.runtime_checks.report import ParityReport
from mecdeploy.runtime_checks.structure import StructureReport, inspect_structure

__all__ = [
    "CheckError",
    "InspectionReport",
    "Interpreter",
    "KernelProfile",
    "LatencyReport",
    "LoadReport",
    "ModelFile",
    "ModelInput",
    "ModelInputs",
    "ParityReport",
    "Reference",
    "StructureReport",
    "check_model",
    "compare_latency",
    "inspect_model",
    "inspect_structure",
    "interpret",
    "measure_loading",
    "parse_shape",
    "profile_kernels",
    "random_feed",
    "read_inputs",
    "read_model",
]
