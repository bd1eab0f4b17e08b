"""Load time and memory in processes of their own: what comes back, and what does not leak in."""

import json
from pathlib import Path

import numpy as np
import pytest
from qdq_models import images, residual_network

from mecdeploy.runtime_checks import CheckError, loading, measure_loading

FEED = {"pixels": images(0, 2)}


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "small.onnx"
    path.write_bytes(residual_network(0).SerializeToString())
    return path


def child(tmp_path, monkeypatch, script):
    """Another script in place of the one that loads."""
    path = tmp_path / "child.py"
    path.write_text(script)
    monkeypatch.setattr(loading, "_CHILD", path)


def test_a_model_is_loaded_and_run_in_a_process_of_its_own(model):
    found = measure_loading({"small": model}, {"small": FEED}, repeats=1)["small"]
    assert len(found.seconds) == 1 and found.seconds[0] == found.median > 0
    assert 0 < found.baseline <= found.loaded <= found.peak and found.memory == found.peak - found.baseline


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="getrusage counts the starting process, too")
def test_memory_of_this_process_is_not_counted(model):
    ballast = np.ones(100_000_000)  # 800 MB; numpy and onnxruntime take about 50
    found = measure_loading({"small": model}, {"small": FEED}, repeats=1)["small"]
    assert found.peak < ballast.nbytes / 2


def test_models_take_turns_and_medians_are_over_the_processes(model, tmp_path, monkeypatch):
    log = tmp_path / "log"
    log.write_text("")
    script = """
        import json, pathlib, sys
        asked, log = json.load(sys.stdin), pathlib.Path(LOG)
        turns = log.read_text().splitlines()
        log.write_text("\\n".join([*turns, json.dumps(asked)]))
        print("a library speaks")
        number = [5, 5, 9, 9, 1, 1][len(turns)]
        print(json.dumps({"seconds": number / 8, "baseline": number, "loaded": 2 * number, "peak": 10 * number}))
    """
    script = "\n".join(line[8:] for line in script.replace("LOG", repr(str(log))).splitlines())
    child(tmp_path, monkeypatch, script)
    found = measure_loading({"a": model, "b": model}, {"a": FEED, "b": {"x": np.zeros((3, 1), np.float32)}}, threads=2)
    assert found["a"] == found["b"]
    assert found["a"].seconds == (5 / 8, 9 / 8, 1 / 8) and found["a"].median == 5 / 8
    assert (found["a"].baseline, found["a"].loaded, found["a"].peak, found["a"].memory) == (5, 10, 50, 45)
    asked = [json.loads(line) for line in log.read_text().splitlines()]
    assert [list(question["inputs"]) for question in asked] == [["pixels"], ["x"]] * 3
    assert asked[0]["inputs"]["pixels"] == ["|u1", [2, 3, 13, 11]] and asked[0]["threads"] == 2


def test_a_process_that_is_killed_is_named(model, tmp_path, monkeypatch):
    child(tmp_path, monkeypatch, "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    message = "small: the process that measures its load time and memory was ended by SIGKILL. .* no memory left"
    with pytest.raises(CheckError, match=message):
        measure_loading({"small": model}, {"small": FEED})
    child(tmp_path, monkeypatch, "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)")
    with pytest.raises(CheckError, match="was ended by SIGTERM.$"):
        measure_loading({"small": model}, {"small": FEED})


def test_a_process_that_fails_says_why(model):
    with pytest.raises(CheckError, match="small: the process that .* failed: .*INVALID_ARGUMENT"):
        measure_loading({"small": model}, {"small": {"pixels": np.zeros((1, 9, 13, 11), np.uint8)}})
    model.write_bytes(b"nonsense")
    with pytest.raises(CheckError, match="small: the process that .* failed: .*INVALID_PROTOBUF"):
        measure_loading({"small": model}, {"small": FEED})
