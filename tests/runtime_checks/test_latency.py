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


class Bench:
    """Sessions and a clock in place of onnxruntime's and the machine's. seconds: what a run of a model takes."""

    def __init__(self, monkeypatch, **seconds):
        self.seconds, self.calls, self.now = seconds, [], 0.0
        self.slower = lambda: 1.0
        monkeypatch.setattr(latency, "open_session", lambda model, name, **options: Session(self, name))
        monkeypatch.setattr(latency, "perf_counter", lambda: self.now)

    def compare(self, **options):
        feeds = {name: {"x": np.zeros(1)} for name in self.seconds}
        return compare_latency(dict.fromkeys(self.seconds, b""), feeds, **options)


class Session:
    def __init__(self, bench, name):
        self.bench, self.name = bench, name

    def run(self, outputs, feed):
        self.bench.calls.append(self.name)
        self.bench.now += self.bench.seconds[self.name] * self.bench.slower()


def test_the_order_turns(monkeypatch):
    bench = Bench(monkeypatch, a=1, b=1, c=1)
    bench.compare(rounds=3, warmup=1)
    assert "".join(bench.calls) == "abc" + "bca" + "cab" + "abc"


def test_each_time_is_one_run_of_one_model(monkeypatch):
    bench = Bench(monkeypatch, a=0.25, b=2.0)
    bench.slower = lambda: 4.0 if len(bench.calls) > 6 else 1.0  # from the third timed round on
    found = bench.compare(rounds=4, warmup=1)
    assert found["a"].rounds == (0.25, 0.25, 1.0, 1.0) and found["b"].rounds == (2.0, 2.0, 8.0, 8.0)
    assert found["b"].ratios_to(found["a"]) == [8.0] * 4 and found["a"].ratio_to(found["b"]) == 1 / 8
    assert found["a"].spread == 0.75 / 0.625  # quartiles 0.25 and 1, median halfway between


@pytest.mark.parametrize(("seconds", "expected"), [(0, 5), (3, 5), (30, 9), (1e6, 20)])
def test_rounds_go_on_until_the_time_is_over(monkeypatch, seconds, expected):
    """A round takes 3 s, the warm-up one of them: with 30 s there is time for ten, of which nine count."""
    bench = Bench(monkeypatch, a=1, b=2)
    found = bench.compare(rounds=5, warmup=1, seconds=seconds, most=20)
    assert len(found["a"].rounds) == len(found["b"].rounds) == expected


def test_a_feed_that_does_not_fit_is_named():
    model, feed = residual_network(0).SerializeToString(), {"pixels": images(0, 1, (3, 7, 7))}
    with pytest.raises(CheckError, match=r"small: onnxruntime cannot run it on pixels \[1, 3, 7, 7\] \(.*INVALID"):
        compare_latency({"small": model}, {"small": feed})


@pytest.mark.parametrize("models, feeds, rounds", [({}, {}, 3), ({"a": b""}, {}, 3), ({"a": b""}, {"a": {}}, 0)])
def test_refusals(models, feeds, rounds):
    with pytest.raises(CheckError, match="give at least one model"):
        compare_latency(models, feeds, rounds=rounds)


def test_a_model_that_does_not_load_is_named():
    with pytest.raises(CheckError, match="broken: onnxruntime refuses the model"):
        compare_latency({"broken": b"nonsense"}, {"broken": {}})
