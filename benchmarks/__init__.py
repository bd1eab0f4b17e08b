"""Measurements whose results are committed under results/ and shown in docs/benchmarks.md.

    python -m benchmarks.latency     speed, size and export cost at 224x224            -> results/latency.json
    python -m benchmarks.cifar10     accuracy of fp32, LSQ and MEC, each file checked  -> results/cifar10.json
    python -m benchmarks.tables      the tables of docs/benchmarks.md and README.md, from those results

Run them from the repository root, with mecdeploy installed.
"""
