"""kill -9 at any moment, then resume: the final weights are those of the run that was never killed, bit for bit."""

import random

import pytest
from killed_runs import KILLED, OFTEN, Death, Nursery
from tiny_run import FINAL, assert_same_run

pytestmark = pytest.mark.usefixtures("tiny_models")

CHECKPOINTS = {"save_minutes": OFTEN}  # in order: fp32 1 to 6, qat 7 to 12, deploy 13 to 18, and the final one


@pytest.fixture(scope="module")
def nursery():
    with Nursery() as nursery:
        yield nursery


def finish(nursery, out, reference):
    assert nursery.run(out, schedule=CHECKPOINTS) == 0
    assert_same_run(out, reference)
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("number", [1, 8, 19])
@pytest.mark.parametrize(
    "death",
    [
        ("mecdeploy.training.checkpoint:save_file", "before"),
        ("mecdeploy.training.checkpoint:save_file", "half"),
        ("os:replace", "before"),
        ("os:replace", "after"),
    ],
)
def test_killed_while_a_checkpoint_is_written(tmp_path, uninterrupted, nursery, death, number):
    function, when = death
    deadly = Death(function=function, number=number, when=when)
    assert nursery.run(tmp_path / "run", schedule=CHECKPOINTS, death=deadly) == KILLED
    assert (tmp_path / "run" / FINAL).exists() == (when == "after" and number == 19)
    assert len(list((tmp_path / "run").glob(".checkpoint-*.tmp"))) == (when != "after")
    finish(nursery, tmp_path / "run", uninterrupted)


@pytest.mark.parametrize(("number", "when"), [(1, "before"), (7, "after")])
def test_killed_while_older_checkpoints_are_removed(tmp_path, uninterrupted, nursery, number, when):
    deadly = Death(function="pathlib:Path.unlink", number=number, when=when, matching="checkpoint-")
    assert nursery.run(tmp_path / "run", schedule=CHECKPOINTS, death=deadly) == KILLED
    finish(nursery, tmp_path / "run", uninterrupted)


@pytest.mark.parametrize("where", ["build_model", "prepare", "calibrate"])
def test_killed_while_there_is_nothing_new_to_save(tmp_path, uninterrupted, nursery, where):
    deadly = Death(function=f"mecdeploy.training.state:{where}", when="after")
    assert nursery.run(tmp_path / "run", schedule=CHECKPOINTS, death=deadly) == KILLED
    finish(nursery, tmp_path / "run", uninterrupted)


def test_killed_again_and_again(tmp_path, uninterrupted, nursery):
    """Every session is killed at its second checkpoint, and so is one checkpoint further than the last."""
    deadly = Death(function="mecdeploy.training.checkpoint:save_file", number=2, when="half")
    codes = [nursery.run(tmp_path / "run", death=deadly) for _ in range(7)]  # a checkpoint an epoch
    assert codes == [KILLED] * 6 + [0]
    assert_same_run(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_any_moment(tmp_path, uninterrupted, nursery, seed):
    """Five kills, each within some of the time that the whole run takes; however they fall, the end is the same."""
    moments = random.Random(seed)
    for _ in range(5):
        nursery.run(tmp_path / "run", schedule=CHECKPOINTS, kill_after=moments.uniform(0.0, 0.8))
    finish(nursery, tmp_path / "run", uninterrupted)
