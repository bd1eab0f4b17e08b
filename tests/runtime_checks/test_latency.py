"""Interleaved timing: the order, the statistics, the refusals."""

import numpy as np
import pytest
from qdq_models import images, residual_network

from mecdeploy.runtime_checks import CheckError, LatencyReport, compare_latency, latency


def report(*seconds):
    return latency._summarize(list(seconds))


def test_summary_is_median_and_quartiles():
    found = report(5.0, 1.0, 2.0, 4.0, 3.0)
    assert (found.median, found.lower_quartile, found.upper_quartile, found.fastest) == (3.0, 2.0, 4.0, 1.0)
    assert found.rounds == (5.0, 1.0, 2.0, 4.0, 3.0)


def test_ratio_is_taken_round_by_round():
    """A machine that becomes ten times slower half-way changes no ratio."""
    slow, fast = report(2.0, 2.0, 2.0, 20.0, 20.0), report(1.0, 1.0, 1.0, 10.0, 10.0)
    assert slow.ratio_to(fast) == 2.0
    assert fast.ratio_to(slow) == 0.5


def test_models_are_interleaved(tmp_path):
    small, large = residual_network(0).SerializeToString(), tmp_path / "large.onnx"
    large.write_bytes(residual_network(1, storage="table3").SerializeToString())
    feeds = {"small": {"pixels": images(0, 1)}, "large": {"pixels": images(0, 64)}}
    found = compare_latency({"small": small, "large": large}, feeds, rounds=7, warmup=1)
    assert list(found) == ["small", "large"]
    for item in found.values():
        assert isinstance(item, LatencyReport)
        assert len(item.rounds) == 7
        assert 0 < item.fastest <= item.lower_quartile <= item.median <= item.upper_quartile
    assert found["large"].ratio_to(found["small"]) > 1  # 64 images against one


def test_the_order_turns(monkeypatch):
    calls = []

    class Session:
        def __init__(self, name):
            self.name = name

        def run(self, outputs, feed):
            calls.append(self.name)

    monkeypatch.setattr(latency, "open_session", lambda model, name, **options: Session(name))
    feeds = {name: {"x": np.zeros(1)} for name in "abc"}
    compare_latency(dict.fromkeys("abc", b""), feeds, rounds=3, warmup=1)
    assert "".join(calls) == "abc" + "bca" + "cab" + "abc"


@pytest.mark.parametrize("models, feeds, rounds", [({}, {}, 3), ({"a": b""}, {}, 3), ({"a": b""}, {"a": {}}, 0)])
def test_refusals(models, feeds, rounds):
    with pytest.raises(CheckError, match="give at least one model"):
        compare_latency(models, feeds, rounds=rounds)


def test_a_model_that_does_not_load_is_named():
    with pytest.raises(CheckError, match="broken: onnxruntime refuses the model"):
        compare_latency({"broken": b"nonsense"}, {"broken": {}})
