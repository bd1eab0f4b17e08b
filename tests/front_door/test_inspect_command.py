"""`mecdeploy inspect`: what it shows of a file of ours and of another tool's, as tables and as JSON."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import onnx
from calling import Call
from onnx import TensorProto, helper

import mecdeploy

BREVITAS = Path(__file__).parents[1] / "runtime_checks" / "foreign" / "brevitas-qcdq.onnx"


def test_a_file_of_ours(call: Call, model: Path) -> None:
    outcome = call("inspect", model)
    assert (outcome.code, outcome.err) == (0, "")
    lines = [" ".join(line.split()) for line in outcome.out.splitlines()]
    report = mecdeploy.inspect(model)
    size = f"{model.stat().st_size:,}"
    assert f"all {size}" in lines and "class names 10" in lines and "image L 1x8x8, uint8" in lines
    count = len(report.layers)
    assert any(f"{count} of {count} convolutions and products in integers" in line for line in lines)
    rows = {layer.name: layer for layer in report.layers}
    assert any(line.startswith(f"conv1 {rows['conv1'].kernel} int8") for line in lines)
    assert any(line.startswith("layer2.0.conv1 QLinearConv int4 ") for line in lines), outcome.out
    assert "in float" not in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= 80


def test_json_is_the_report_and_nothing_else(call: Call, model: Path) -> None:
    outcome = call("inspect", model, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    report = mecdeploy.inspect(model)
    assert json.loads(outcome.out) == json.loads(json.dumps(report.to_json()))
    assert json.loads(outcome.out)["metadata"]["checkpoint_sha256"] == report.metadata.checkpoint_sha256  # type: ignore[union-attr]


def test_a_file_of_another_tool_with_its_reasons(call: Call) -> None:
    outcome = call("inspect", BREVITAS)
    assert (outcome.code, outcome.err) == (0, "")
    text = " ".join(outcome.out.split())
    assert "1 of 4 convolutions and products in integers" in text
    assert "int8 (4)" in text
    assert "[signed-activation]" in text and "[moved-input]" in text  # no markup of rich's
    assert max(map(len, outcome.out.splitlines())) <= 80


def test_names_of_the_file_are_no_markup(call: Call, tmp_path: Path) -> None:
    node = helper.make_node("Abs", ["x"], ["y"], name="[bold]:smile:[/]")
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["[red]", None]) for name in "xy"]
    graph = helper.make_graph([node], "g", ends[:1], ends[1:])
    path = tmp_path / "odd.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    outcome = call("inspect", path)
    assert outcome.code == 0
    assert "[bold]:smile:[/]" in outcome.out and "x: float32 [[red], ?]" in outcome.out


def test_warnings_go_to_stderr(call: Call, model: Path, tmp_path: Path) -> None:
    """Bias scales of the classifier doubled: a QGemm adds the integers as they are."""
    proto = onnx.load(model)
    for tensor in proto.graph.initializer:
        if tensor.name == "fc/bias/scale":
            values = onnx.numpy_helper.to_array(tensor) * 2
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(proto, tmp_path / "doubled.onnx")
    outcome = call("inspect", tmp_path / "doubled.onnx")
    assert outcome.code == 0
    assert outcome.err.startswith("Warning: fc: the scale of its bias fc/bias is not input scale times weight scale")
    outcome = call("inspect", tmp_path / "doubled.onnx", "--json")
    assert len(json.loads(outcome.out)["warnings"]) == 1


def test_what_cannot_be_read_is_refused_in_a_line(call: Call, model: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(model.read_bytes()[:2000])
    assert "cut.onnx: not a readable ONNX file; it is truncated or damaged" in call("inspect", cut).error
    text = tmp_path / "run.toml"
    text.write_text("seed = 1\n")
    assert "run.toml" in call("inspect", text).error
    assert "no such file" in call("inspect", tmp_path / "none.onnx").error
    assert "cannot be read (Is a directory)" in call("inspect", tmp_path).error


def test_a_refused_file_is_shown_and_says_so(call: Call, model: Path, tmp_path: Path) -> None:
    proto = onnx.load(model)
    proto.opset_import[0].version = 99
    onnx.save(proto, tmp_path / "future.onnx")
    outcome = call("inspect", tmp_path / "future.onnx")
    assert outcome.code == 0 and "refuses it" in outcome.out and "layer2.0.conv1" in outcome.out


def test_torch_is_not_needed(model: Path, environment: dict[str, str]) -> None:
    """A child process in which torch cannot be imported."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import mecdeploy; report = mecdeploy.inspect(sys.argv[1]); print(len(report.layers))\n"
        "from mecdeploy.cli import main; main(['inspect', sys.argv[1]])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(model)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 0, found.stderr
    assert int(found.stdout.split()[0]) == len(mecdeploy.inspect(model).layers)


def test_every_field_of_a_report_has_its_place_in_the_json(model: Path) -> None:
    report = mecdeploy.inspect(model)
    assert list(report.to_json()) == [field.name for field in dataclasses.fields(report)]
