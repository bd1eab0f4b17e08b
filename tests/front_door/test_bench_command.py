"""`mecdeploy bench`: what is timed against what, what is shown of it, what is refused. No test looks at a duration."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from calling import Call
from onnx import TensorProto, helper

import mecdeploy
from mecdeploy import runtime_checks
from mecdeploy.errors import UserError

QUICK = ["--seconds", "0", "--rounds", "3", "--loads", "1"]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, for all temporary files of this process."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A float file of images of 4x4 and a fixed batch of 2."""
    nodes = [helper.make_node("Relu", ["image"], ["out"], name="relu")]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 1, 4, 4]) for name in ("image", "out")]
    graph = helper.make_graph(nodes, "net", values[:1], values[1:])
    path = tmp_path / "other.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[float, ...]]:
    """Given times in place of measured ones: model -> seconds a round; the settings asked for are kept in "asked"."""
    times: dict[str, Any] = {"asked": []}

    def latency(files: dict[str, Path], feeds: dict[str, dict[str, Any]], **options: Any) -> dict[str, Any]:
        batch = next(iter(next(iter(feeds.values())).values())).shape[0]
        times["asked"].append((batch, options))
        return {name: runtime_checks.latency._summarize(list(times[name])) for name in files}

    def loading(files: dict[str, Path], feeds: Any, **options: Any) -> dict[str, Any]:
        report = runtime_checks.LoadReport(seconds=(0.5, 0.25, 1.0), baseline=10, loaded=20, peak=40)
        return dict.fromkeys(files, report)

    monkeypatch.setattr(runtime_checks, "compare_latency", latency)
    monkeypatch.setattr(runtime_checks, "measure_loading", loading)
    return times


def test_a_model_alone(call: Call, model: Path, temporary: Path) -> None:
    found = call("bench", model, *QUICK, "--batch", "3")
    assert found.code == 0, found.err
    assert "batch 3, 1 thread" in found.out and "3 rounds." in found.out and "images/s" in found.out
    assert "onnxruntime" in found.out.splitlines()[-1] and "core" in found.out.splitlines()[-1]
    assert found.err.splitlines()[0] == "Measuring batch 3, 1 thread"
    assert max(map(len, found.out.splitlines())) <= 80
    assert list(temporary.iterdir()) == []


def test_against_the_runs_full_precision_as_it_is_and_in_int8(
    call: Call, run: Path, model: Path, temporary: Path
) -> None:
    """fp32 has float kernels and the RUN folder means the same; int8 has the integer ones of quantize_static."""
    found = call("bench", model, "--run", run, *(f"--against={name}" for name in ("fp32", "int8", run)), *QUICK,
                 "--profile", "--json")  # fmt: skip
    assert found.code == 0, found.err
    assert found.err.splitlines()[:2] == [
        f"Writing the full-precision network of {run}",
        "Quantising it with onnxruntime's quantize_static",
    ]
    report = json.loads(found.out)
    rows = {row["model"]: row for row in report["rows"]}
    assert list(rows) == [str(model), "fp32", "int8", f"{run} (fp32)"] and report["baseline"] == "fp32"
    kernels = {name: {kernel["kernel"] for kernel in row["profile"]["kernels"]} for name, row in rows.items()}
    assert "QLinearConv" in kernels[str(model)] and "QLinearConv" in kernels["int8"]
    assert kernels["fp32"] == kernels[f"{run} (fp32)"] and not any("QLinear" in name for name in kernels["fp32"])
    assert rows["fp32"]["size"] == rows[f"{run} (fp32)"]["size"] > rows["int8"]["size"] > rows[str(model)]["size"]
    assert list(temporary.iterdir()) == []


def test_json_holds_everything_that_the_table_shows(call: Call, model: Path) -> None:
    report = json.loads(call("bench", model, "--against", model, *QUICK, "--threads", "1", "--threads", "2",
                             "--batch", "4", "--json").out)  # fmt: skip
    assert set(report) == {
        "rows", "baseline", "seed", "cpu", "cores", "load_average", "versions", "warnings",
    }  # fmt: skip
    assert [(row["threads"], row["batch"], row["model"]) for row in report["rows"]] == [
        (1, 4, str(model)), (1, 4, f"{model} (2)"), (2, 4, str(model)), (2, 4, f"{model} (2)"),
    ]  # fmt: skip
    row = report["rows"][0]
    assert set(row) == {
        "model", "size", "threads", "batch", "load", "latency", "ratio", "profile", "memory", "spread",
        "images_per_second",
    }  # fmt: skip
    assert row["size"] == model.stat().st_size and row["profile"] is None and len(row["latency"]["rounds"]) == 3
    assert row["load"]["peak"] - row["load"]["baseline"] == row["memory"] > 0
    assert row["images_per_second"] == pytest.approx(4 / row["latency"]["median"])  # float64
    assert report["versions"]["mecdeploy"] == mecdeploy.__version__ and report["cores"] >= 1


def test_ratios_are_taken_round_by_round(measured: dict[str, Any], model: Path, tmp_path: Path) -> None:
    """The other is twice as slow in each round but one; the ratio of the medians would be a third."""
    copy = tmp_path / "copy.onnx"
    copy.write_bytes(model.read_bytes())
    measured |= {str(model): (1.0, 1.0, 1.0, 10.0, 10.0), str(copy): (2.0, 2.0, 3.0, 20.0, 20.0)}
    report = mecdeploy.bench(model, against=[copy], batches=[2, 6], threads=[1, 1], seconds=8, rounds=7)
    first, second = report.rows[:2]
    assert first.ratio is not None and second.ratio is None and report.baseline == str(copy)
    assert (first.ratio.median, first.ratio.lower_quartile, first.ratio.upper_quartile) == (0.5, 0.5, 0.5)
    assert first.latency.median == 1.0 and first.images_per_second == 2.0 and report.rows[2].images_per_second == 6.0
    assert measured["asked"] == [(n, {"threads": 1, "rounds": 7, "seconds": 4.0}) for n in (2, 6)]  # 8 s, shared


def test_scattered_times_are_warned_of(measured: dict[str, Any], model: Path, call: Call) -> None:
    measured[str(model)] = (0.9, 1.0, 1.0, 1.0, 1.1)  # the middle half is all 1
    assert "spans" not in call("bench", model).err
    measured[str(model)] = (0.9, 0.9, 1.0, 1.15, 1.3)
    found = call("bench", model)
    assert found.code == 0
    assert (
        f"Warning: batch 1, 1 thread: the middle half of the rounds of {model} spans 25% of their median. "
        "Other work on the machine is the usual cause"
    ) in found.err
    assert "1.00 s" in found.out and "0.90-1.15" in found.out and "500 ms" in found.out


def test_more_threads_than_cores_are_warned_of(
    measured: dict[str, Any], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured[str(model)] = (1.0,)
    monkeypatch.setattr(runtime_checks.machine, "usable_cores", lambda: 2)
    warnings = mecdeploy.bench(str(model), threads=[1, 2, 3]).warnings
    assert warnings == ("3 threads take turns on 2 cores: give --threads 2 at most.",)


def test_models_of_other_images_are_warned_of(measured: dict[str, Any], model: Path, other: Path) -> None:
    measured |= {str(model): (1.0,), str(other): (1.0,)}
    (warning,) = mecdeploy.bench(model, against=other, batches=[2]).warnings
    assert warning == (
        f"{other} reads [1, 4, 4] where {model} reads [1, 8, 8]: they do different work, and their ratio says nothing."
    )


def test_a_fixed_batch_is_the_default(measured: dict[str, Any], model: Path, other: Path) -> None:
    measured |= {str(model): (1.0,), str(other): (1.0,)}
    assert [row.batch for row in mecdeploy.bench(other).rows] == [2]
    with pytest.raises(runtime_checks.CheckError, match="its batch is fixed at 2 and cannot be 1"):
        mecdeploy.bench(model, against=[other])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda model, run: [model.with_name("none.onnx")], "none.onnx: no such file"),
        (lambda model, run: [run], "is a folder; give the model file in it"),
        (lambda model, run: [model, "--against", "int8"], "lies in no run folder; give --run RUN, or a file"),
        (lambda model, run: [model, "--against", "in8"], "--against in8: no such file or run folder; give an ONNX"),
        (lambda model, run: [model, "--against", model.parent], "has no run.toml, so it is no run folder"),
        (lambda model, run: [model, "--against", "fp32", "--run", model.parent], "has no run.toml, so it is no run"),
        (lambda model, run: [model, "--shape", "pixles=1x8x8"], "which is no input of these models; did you mean 'pix"),
        (lambda model, run: [model, "--shape", "image=1x8x8"], "no input of these models; they are pixels."),
        (lambda model, run: [model, "--shape", "pixels=1x9x9"], "which 1x9x9 after the batch does not fit"),
        (lambda model, run: [model, "--shape", "1x8x8"], "is not NAME=AxBxC"),
        (lambda model, run: [model, "--batch", "0"], "0 is not in the range x>=1"),
        (lambda model, run: [run / "run.toml"], "not a readable ONNX file"),
        (lambda model, run: [run / "none.onnx", "--against", "fp32"], "none.onnx: no such file"),
    ],
)
def test_refusals(
    arguments: Callable[[Path, Path], list[Any]], message: str, call: Call, model: Path, run: Path, temporary: Path
) -> None:
    assert message in call("bench", *arguments(model, run)).error
    assert list(temporary.iterdir()) == []


def test_python_refuses_what_the_command_line_cannot_say(model: Path) -> None:
    for name in ("threads", "batches"):
        with pytest.raises(UserError, match=f"{name} is 0; it is at least 1"):
            mecdeploy.bench(model, **{name: [1, 0]})  # type: ignore[arg-type]


def test_torch_is_not_imported_for_files(model: Path, other: Path, environment: dict[str, str], tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from mecdeploy.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit as exit:\n    assert exit.code in (0, None), exit.code\n"
        "heavy = {'torch', 'torchvision', 'sklearn', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    arguments = ["bench", str(model), "--against", str(other), "--batch", "2", "--profile", *QUICK]
    command = [sys.executable, "-c", script, *arguments]
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    assert "Relu" in found.stdout and "QLinearConv" in found.stdout and "1.00x" in found.stdout


def test_durations_and_rates_keep_three_digits() -> None:
    from mecdeploy.bench_tables import _between, _digits, _duration

    assert [_duration(value) for value in (2.5, 0.9994, 0.0123, 7.304e-3, 44e-6, 1e-7)] == [
        "2.50 s", "999 ms", "12.3 ms", "7.30 ms", "44.0 us", "0.10 us",
    ]  # fmt: skip
    assert _between(0.9e-3, 1.1e-3, 1e-3) == "0.90-1.10" and _between(900e-6, 1100e-6, 990e-6) == "900-1,100"
    assert _digits(123456.7) == "123,457"
