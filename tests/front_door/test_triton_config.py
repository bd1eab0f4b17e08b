"""config.pbtxt as Triton reads it: by its own protobuf schema, and every promise in it held to the file beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from google.protobuf import text_format
from torch import nn
from tritonclient.grpc import model_config_pb2

import mecdeploy
from mecdeploy import InputSpec, QuantConfig, QuantizedModel

# What the schema's types are in memory.
DTYPES = {"TYPE_UINT8": np.uint8, "TYPE_FP32": np.float32}
CLASSES = ('a "quoted" one', "two\nlines", "ß", "four", "five")


@pytest.fixture(scope="module")
def network() -> QuantizedModel:
    torch.manual_seed(0)
    layers = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, len(CLASSES))),
    )
    spec = InputSpec.from_statistics(channels=3, height=8, width=6, mean=118.0, std=60.0)
    model = mecdeploy.prepare(layers, QuantConfig(weight_bits=2, act_bits=4), spec)
    mecdeploy.calibrate(model, [images(64)])
    return model.eval()


def images(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 8, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def read(path: Path) -> Any:
    return text_format.Parse(path.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())


@pytest.mark.parametrize(("target", "input"), [("onnxruntime", "uint8"), ("portable", "float")])
def test_triton_finds_in_the_file_what_the_configuration_says(
    network: QuantizedModel, tmp_path: Path, target: str, input: str
) -> None:
    mecdeploy.export(
        network, out=tmp_path, layout="triton", name="photos", target=target, input=input, class_names=CLASSES
    )
    config = read(tmp_path / "photos" / "config.pbtxt")
    assert (config.name, config.platform, config.backend) == ("photos", "onnxruntime_onnx", "onnxruntime")
    assert config.HasField("dynamic_batching") and config.dynamic_batching.max_queue_delay_microseconds == 0
    (group,) = config.instance_group
    assert (group.count, group.kind) == (1, group.KIND_CPU)
    assert config.optimization.graph.level == 0 and not config.optimization.HasField("execution_accelerators")

    session = onnxruntime.InferenceSession(tmp_path / "photos" / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    (source,), (sink,) = config.input, config.output
    assert [entry.name for entry in session.get_inputs()] == [source.name]
    assert [entry.name for entry in session.get_outputs()] == [sink.name]
    batch = images(config.max_batch_size)
    assert [config.max_batch_size, *source.dims] == list(batch.shape)
    dtype = DTYPES[_name(source.data_type)]
    fed = batch.numpy() if dtype is np.uint8 else batch.numpy().astype(np.float32) / np.float32(255)
    assert fed.dtype == dtype
    (logits,) = session.run([sink.name], {source.name: fed})
    assert logits.dtype == DTYPES[_name(sink.data_type)] and list(logits.shape[1:]) == list(sink.dims)
    with torch.no_grad():
        assert np.array_equal(logits, network(batch).numpy()), "another answer than PyTorch's"
    labels = (tmp_path / "photos" / sink.label_filename).read_text(encoding="utf-8").split("\n")
    assert labels == ['a "quoted" one', "two lines", "ß", "four", "five", ""]


def test_a_network_without_class_names_has_no_labels(network: QuantizedModel, tmp_path: Path) -> None:
    mecdeploy.export(network, out=tmp_path, layout="triton", name="photos")
    assert read(tmp_path / "photos" / "config.pbtxt").output[0].label_filename == ""
    assert sorted(path.name for path in (tmp_path / "photos").iterdir()) == ["1", "config.pbtxt"]


def _name(data_type: int) -> str:
    return str(model_config_pb2.DataType.Name(data_type))
