"""Two processes do what one does, agree on what stops them, and say each error once."""

import distributed_runs as runs
import pytest
import torch
from distributed_runs import NormlessNet, in_float64, network, norm_operands, numbers, run_together, whole_choice
from several_processes import run_parts
from tiny_run import assert_same_tensors, tensors_in, tiny_config
from torch.nn import functional as F

from mecdeploy.training.config import ScheduleConfig
from mecdeploy.training.errors import TrainingError

SUMS = 1e-9
"""Relative difference of float64 results whose sums were taken in another order: steps of 1e-16 over some 10^5 terms,
grown by six optimiser steps. A wrong factor or a missing row shows in the second digit."""

DEPLOYED = 1e-5
"""The same after three steps of the deployed arithmetic, which rounds to float32, 2^-24, whatever it is given."""

PARTS = [
    runs.exchanges,
    runs.norms,
    runs.rows,
    runs.equal_runs,
    runs.parts_of_a_batch,
    runs.refused,
    runs.diverging,
    runs.interrupted,
    runs.command_with_a_broken_file,
    runs.command_that_loses_a_process,
]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes came to, by part and rank, and their folder."""
    folder = tmp_path_factory.mktemp("two")
    return folder, run_parts(PARTS, folder)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The same runs in this process alone."""
    folder = tmp_path_factory.mktemp("one")
    return folder, runs.equal_runs(folder)


def flat(nested):
    return [value for row in nested for value in row]


@pytest.mark.parametrize("name", runs.EQUAL_RUNS)
def test_two_processes_train_what_one_trains(one, two, name):
    (whole, expected), (shared, found) = one, two
    both = found["equal_runs"]
    assert both[0][name] == both[1][name]  # the processes agree exactly
    for stage, tolerance, epoch in (("fp32", SUMS, 0), ("qat", SUMS, 1), ("deploy", DEPLOYED, 2)):
        assert both[0][name][epoch] == pytest.approx(expected[name][epoch], rel=tolerance)
        expected_tensors = tensors_in(whole / name / f"checkpoint-{stage}-0001.safetensors")
        tensors = tensors_in(shared / name / f"checkpoint-{stage}-0001.safetensors")
        assert tensors.keys() == expected_tensors.keys()
        for key, tensor in tensors.items():
            assert torch.allclose(tensor, expected_tensors[key], rtol=tolerance, atol=tolerance), (stage, key)
    assert both[0][name][3] == expected[name][3]  # accuracies


def test_a_batch_in_parts_gives_the_same_step(two, tmp_path):
    with in_float64(), network(NormlessNet):
        plain = numbers(run_together(tiny_config(method="lsq", **runs.SHORT), tmp_path / "plain"))
        parts = numbers(run_together(tiny_config(method="lsq", accumulation=3, **runs.SHORT), tmp_path / "parts"))
    assert flat(parts) == pytest.approx(flat(plain), rel=SUMS)
    assert flat(two[1]["parts_of_a_batch"][0]) == pytest.approx(flat(plain), rel=SUMS)


def test_settings_of_several_processes_are_checked():
    with pytest.raises(TrainingError) as parts:
        ScheduleConfig(batch_size=128, accumulation=3)
    assert str(parts.value) == (
        "schedule.batch_size is 128, which schedule.accumulation (3) does not divide into equal parts; choose a "
        "multiple of it."
    )
    with pytest.raises(TrainingError, match="schedule.accumulation is 0; it must be at least 1"):
        ScheduleConfig(accumulation=0)
    with pytest.raises(TrainingError, match="schedule.batch_norm is 'sync'; choose one of synchronized, local"):
        ScheduleConfig(batch_norm="sync")


def test_batch_norm_over_both_processes_is_that_of_the_whole(two):
    """Witness: torch's own BatchNorm over all values, and its autograd."""
    for index, (shape, affine) in enumerate((((6, 3, 4, 5), True), ((8, 3), True), ((4, 3, 7), False))):
        x, gradient, weight, bias = norm_operands(shape)
        leaves = [x.requires_grad_()] + ([weight.requires_grad_(), bias.requires_grad_()] if affine else [])
        mean, var = torch.full((3,), 0.5).double(), torch.full((3,), 2.0).double()
        y = F.batch_norm(x, mean, var, *(leaves[1:] or (None, None)), training=True, momentum=0.3, eps=1e-3)
        y.backward(gradient)
        halves = [[torch.tensor(value, dtype=torch.float64) for value in found[index]] for found in two[1]["norms"]]
        near = {"rtol": 1e-12, "atol": 1e-12}  # float64 sums of at most 120 terms
        assert torch.allclose(torch.cat([half[0] for half in halves]), y, **near)
        assert torch.allclose(torch.cat([half[1] for half in halves]), x.grad, **near)
        for half in halves:
            for value, expected in zip(half[2:], (mean, var, *(leaf.grad for leaf in leaves[1:])), strict=True):
                assert torch.allclose(value, expected, **near)


def test_the_rows_coded_together_are_those_one_process_chooses(two):
    for rank, found in enumerate(two[1]["rows"]):
        assert found["8"] == whole_choice(8)
        assert found["9"] == whole_choice(8)  # 9 rows do not divide by 2 processes
        assert found["40"] == whole_choice(40)
        # A mean over the processes makes this the gradient of the objective, which both compute.
        weights = torch.arange(24.0).view(12, 2).chunk(2)[rank]
        assert torch.equal(torch.tensor(found["gradient"]), 2 * weights)
        assert found["apart"]


def test_exchanges(two):
    first, second = two[1]["exchanges"]
    for found in (first, second):
        assert found["sum"] == [2.0, 1.0]
        assert found["gather"] == [[0, 5], [1, 5]]
        assert found["any"] == [False, True]
        assert found["objects"] == ["rank 0", "rank 1"]
        assert found["main"] == {"from": 0}
        assert found["tensors"] == {"a": [0, 1, 2], "b": [0.5], "c": []}
        assert found["dtypes"] == ["torch.float32", "torch.float32", "torch.int64"]
        assert found["inside itself"]
    assert [first["local first"], second["local first"]] == [False, True]
    assert [first["everywhere"], second["everywhere"]] == [0, 1]


def test_an_error_is_raised_once_and_stops_the_others(two):
    first, second = two[1]["exchanges"]
    other, mine = "PeerFailed: process {} has stopped with an error", "ValueError: said by {}"
    assert [first["main failed"], second["main failed"]] == [mine.format(0), other.format(0)]
    assert [first["one failed"], second["one failed"]] == [other.format(1), mine.format(1)]
    assert [first["both failed"], second["both failed"]] == [mine.format(0), other.format(0)]
    assert [first["local failed"], second["local failed"]] == [mine.format(0), other.format(0)]


def test_a_batch_that_cannot_be_shared_is_refused(two):
    first, second = two[1]["refused"]
    assert first == [
        "TrainingError: schedule.batch_size is 13, for all processes together; 2 processes with schedule.accumulation "
        "1 need a multiple of 2.",
        "TrainingError: schedule.batch_size is 12, for all processes together; 2 processes with schedule.accumulation "
        "4 need a multiple of 8.",
        "TrainingError: digits has 45 training images, less than one batch of schedule.batch_size (46), which 2 equal "
        "shares need; lower it.",
    ]
    assert len(second) == 3


def test_a_loss_that_is_not_finite_stops_all(two):
    first, second = two[1]["diverging"]
    assert first.startswith("TrainingError: the loss is nan in stage fp32, epoch 1, step 2")
    assert second == "PeerFailed: process 0 has stopped with an error"


def test_an_interrupt_of_either_process_stops_both_and_the_resumed_run_is_the_same(two):
    folder, found = two
    first, second = found["interrupted"]
    assert first["by a signal"] == second["by a signal"] == ["fp32", 2, 2]
    assert first["by report"] == second["by report"] == ["qat", 1, 2]  # one step later: agreed on with its loss
    assert first["warnings"] == second["warnings"] == []
    for name in ("checkpoint-deploy-0002.safetensors", "checkpoint-final.safetensors"):
        assert_same_tensors(folder / "stopped" / name, folder / "whole" / name)


def test_another_number_of_processes_resumes_with_a_warning(two, tmp_path):
    import shutil

    from mecdeploy.training.events import WarningEvent

    folder = tmp_path / "run"
    shutil.copytree(two[0] / "lsq", folder)
    (folder / "checkpoint-final.safetensors").unlink()
    events = []
    with in_float64(), network(runs.CalmNet):
        run_together(runs.EQUAL_RUNS["lsq"], folder, resume=True, report=events.append)
    assert [event.message for event in events if isinstance(event, WarningEvent)] == [
        "checkpoint-deploy-0001.safetensors was written with processes 2, this is processes 1: the result may differ "
        "in the last bits from an uninterrupted run."
    ]


def test_the_process_that_fails_says_why_and_the_others_only_that(two):
    (code, said, left), (failed_code, failed_said, _) = two[1]["command_with_a_broken_file"]
    assert failed_code == 2
    assert "ValueError: no network here" in failed_said and "Traceback" not in failed_said
    assert code == 3
    assert "Process 0 stops: another process of this run has stopped." in said and "Error" not in said
    assert not left  # the folder of a run that never began


def test_a_process_that_vanishes_ends_the_others_in_one_line(two):
    (code, said, _), vanished = two[1]["command_that_loses_a_process"]
    assert vanished is None
    assert code == 3
    assert said.rstrip().endswith("Process 0 stops: another process of this run has stopped.")
    assert "Traceback" not in said
