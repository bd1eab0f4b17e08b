"""A run and its folder: full disks, what is kept, what is cleaned away, what may move."""

import resource
import shutil
from contextlib import contextmanager

import pytest
from tiny_run import (
    FINAL,
    assert_same_run,
    interrupt_at,
    is_step,
    tiny_config,
    tiny_dataset,
)

from mecdeploy.training.errors import TrainingError
from mecdeploy.training.events import EpochEvent, TrainingInterrupted, WarningEvent
from mecdeploy.training.loop import train
from mecdeploy.training.run import load_run

pytestmark = pytest.mark.usefixtures("tiny_models")


def stopped_at(out, *where):
    with pytest.raises(TrainingInterrupted):
        train(tiny_config(), tiny_dataset(), out, report=interrupt_at(is_step(*where)))


@contextmanager
def files_at_most(size):
    """No file of this process may grow beyond `size` bytes: a full disk, as the system reports it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tmp_path, uninterrupted):
    limit = files_at_most(1000)
    events, folders = [], []

    def report(event):
        events.append(event)
        if isinstance(event, EpochEvent) and (event.stage, event.epoch) == ("qat", 1):
            limit.__enter__()  # the checkpoint of this epoch is written next
        if isinstance(event, WarningEvent):
            limit.__exit__(None, None, None)
            folders.append(sorted(path.name for path in (tmp_path / "run").iterdir()))

    train(tiny_config(), tiny_dataset(), tmp_path / "run", report=report)
    (warning,) = (e for e in events if isinstance(e, WarningEvent))
    assert "checkpoint-qat-0001.safetensors could not be written" in warning.message
    assert folders == [["checkpoint-fp32-0001.safetensors", "checkpoint-fp32-0002.safetensors"]]
    assert_same_run(tmp_path / "run", uninterrupted)


def test_a_full_disk_at_the_end_is_an_error_and_resumes(tmp_path, uninterrupted):
    out = tmp_path / "run"
    with files_at_most(10**9):

        def report(event):
            if isinstance(event, EpochEvent) and (event.stage, event.epoch) == ("deploy", 2):
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

        with pytest.raises(
            TrainingError, match=f"{FINAL} could not be written .*The last good checkpoint is checkpoint-deploy-0001"
        ):
            train(tiny_config(), tiny_dataset(), out, report=report)
    assert not (out / FINAL).exists() and not list(out.glob(".*"))
    with pytest.raises(
        TrainingError, match="has not finished: it stands after 1 epochs and 0 steps of stage deploy.*--resume"
    ):
        load_run(out)
    train(tiny_config(), tiny_dataset(), out, resume=True)
    assert_same_run(out, uninterrupted)


def test_long_epochs_are_saved_on_their_way(tmp_path, uninterrupted):
    crash = interrupt_at(is_step("qat", 2, 3), RuntimeError("power cut"))
    with pytest.raises(RuntimeError):
        train(tiny_config(save_minutes=1e-9), tiny_dataset(), tmp_path / "run", report=crash)
    assert (tmp_path / "run" / "checkpoint-qat-0001-step-000002.safetensors").exists()
    train(tiny_config(), tiny_dataset(), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize("keep", [None, 1, 3])
def test_keeps_the_last_ones_the_best_and_the_stage_ends(tmp_path, keep):
    out, chosen = tmp_path / "run", {} if keep is None else {"keep_checkpoints": keep}
    result = train(tiny_config(fp_epochs=6, epochs=9, frozen_epochs=3, **chosen), tiny_dataset(), out)
    quantized = [e for e in result.history if e.stage != "fp32"]
    top = max(e.validation_accuracy for e in quantized)
    best = [e for e in quantized if e.validation_accuracy == top][-1]
    last = [("deploy", 3), ("deploy", 2), ("deploy", 1)][: keep or 2]
    expected = {("fp32", 6), ("qat", 6), ("deploy", 3), (best.stage, best.epoch), *last}
    names = {f"checkpoint-{stage}-{epoch:04d}.safetensors" for stage, epoch in expected}
    assert {path.name for path in out.iterdir()} == names | {FINAL}


def test_how_often_and_how_many_are_kept_may_change_on_resume(tmp_path, uninterrupted):
    stopped_at(tmp_path / "run", "qat", 1, 2)
    changed = tiny_config(keep_checkpoints=1, save_minutes=1e-9)
    train(changed, tiny_dataset(), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", uninterrupted)
    steps = [path.name for path in (tmp_path / "run").glob("checkpoint-deploy-*")]
    assert steps == ["checkpoint-deploy-0002.safetensors"]


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    stopped_at(tmp_path / "run", "fp32", 1, 2)
    leftover = tmp_path / "run" / ".checkpoint-fp32-0001.safetensors.123.tmp"
    leftover.write_bytes(b"half")
    (tmp_path / "run" / ".mine.tmp").write_bytes(b"not ours")
    train(tiny_config(), tiny_dataset(), tmp_path / "run", resume=True)
    assert not leftover.exists() and (tmp_path / "run" / ".mine.tmp").exists()


def test_a_folder_copied_elsewhere_resumes_there(tmp_path, uninterrupted):
    stopped_at(tmp_path / "run", "deploy", 1, 2)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    train(tiny_config(), tiny_dataset(), tmp_path / "moved", resume=True)
    assert_same_run(tmp_path / "moved", uninterrupted)
