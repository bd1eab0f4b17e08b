"""schedule.averaging: what is averaged, where it enters, and statistics that fit it."""

from itertools import islice

import numpy as np
import pytest
import torch
from tiny_run import (
    FINAL,
    QAT_EPOCHS,
    STEPS,
    assert_same_run,
    interrupt_at,
    is_stage,
    is_step,
    tensors_in,
    tiny_config,
    tiny_dataset,
)

from mecdeploy.training.averaging import estimate_statistics
from mecdeploy.training.config import ScheduleConfig
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.events import TrainingInterrupted
from mecdeploy.training.loop import train
from mecdeploy.training.movement import DropoutUnit
from mecdeploy.training.run import load_run
from mecdeploy.training.seeding import derive_seed

pytestmark = pytest.mark.usefixtures("tiny_models")
ALL_SAVED = {"averaging": 0.6, "save_minutes": 1e-9, "keep_checkpoints": 100}


def section(tensors, name):
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """A run that saves after every step, and as stage qat begins."""
    from tiny_run import build_tiny

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mecdeploy.training.state.build_model", build_tiny)
        out = tmp_path_factory.mktemp("averaged") / "run"
        with pytest.raises(TrainingInterrupted):
            train(tiny_config(**ALL_SAVED), tiny_dataset(), out, report=interrupt_at(is_stage("qat")))
        train(tiny_config(**ALL_SAVED), tiny_dataset(), out, resume=True)
    return out


def test_the_average_is_that_of_a_loop_over_all_steps(averaged):
    files = sorted(averaged.glob("checkpoint-qat-*.safetensors"), key=lambda file: file.stem)
    assert len(files) == QAT_EPOCHS * STEPS + 1
    saved = [tensors_in(file) for file in files]
    for name in section(saved[0], "average"):
        mean = saved[0][f"model.{name}"].double().numpy()
        largest = max(float(tensors[f"model.{name}"].abs().max()) for tensors in saved)
        for t, tensors in enumerate(saved[1:]):
            decay = min(0.6, (1 + t) / (10 + t))
            mean = decay * mean + (1 - decay) * tensors[f"model.{name}"].double().numpy()
            # Against float64: each of the six steps rounds a difference and a sum to float32.
            atol = 12 * 2.0**-24 * largest
            np.testing.assert_allclose(tensors[f"average.{name}"].numpy(), mean, rtol=0, atol=atol)
    parameters = {name for name in section(saved[0], "model") if not name.endswith(("mean", "var", "tracked"))}
    assert section(saved[0], "average").keys() == parameters
    assert any(name.endswith(".step") for name in parameters)


def test_it_enters_as_the_live_epochs_end(averaged, tmp_path):
    """Interrupted as stage deploy begins, the checkpoint holds the average in place of the parameters."""
    for source in averaged.glob("checkpoint-qat-0002.safetensors"):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / source.name).write_bytes(source.read_bytes())
    with pytest.raises(TrainingInterrupted):
        train(
            tiny_config(**ALL_SAVED),
            tiny_dataset(),
            tmp_path / "run",
            resume=True,
            report=interrupt_at(is_stage("deploy")),
        )
    before = tensors_in(averaged / "checkpoint-qat-0002.safetensors")
    after = tensors_in(tmp_path / "run" / "checkpoint-deploy-0000.safetensors")
    assert not section(after, "average") and not section(after, "momentum")
    for name, tensor in section(before, "average").items():
        assert torch.equal(after[f"model.{name}"], tensor), name
    train(tiny_config(**ALL_SAVED), tiny_dataset(), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", averaged)


def test_resumed_on_the_way_it_ends_at_the_same_bits(averaged, tmp_path):
    config = tiny_config(averaging=0.6)
    for session, where in enumerate([("qat", 1, 2), ("qat", 2, 3), ("deploy", 1, 1)]):
        with pytest.raises(TrainingInterrupted):
            train(config, tiny_dataset(), tmp_path / "run", resume=session > 0, report=interrupt_at(is_step(*where)))
    train(config, tiny_dataset(), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", averaged)


def test_what_decays_goes_on_decaying_after_it(tmp_path):
    """PACT's clipping levels: resumed in the final phase, with an optimiser made anew, it ends at the same bits."""
    config = tiny_config(method="pact", averaging=0.6)
    train(config, tiny_dataset(), tmp_path / "whole")
    with pytest.raises(TrainingInterrupted):
        train(config, tiny_dataset(), tmp_path / "run", report=interrupt_at(is_step("deploy", 1, 1)))
    train(config, tiny_dataset(), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_without_a_final_phase_it_is_the_result(tmp_path, uninterrupted):
    config = tiny_config(averaging=0.9, epochs=2, frozen_epochs=0)
    result = train(config, tiny_dataset(), tmp_path / "run")
    last, final = (tensors_in(tmp_path / "run" / name) for name in ("checkpoint-qat-0002.safetensors", FINAL))
    for name, tensor in section(last, "average").items():
        assert torch.equal(final[f"model.{name}"], tensor), name
    model = load_run(tmp_path / "run").model
    pixels, labels = tiny_dataset().validation.arrays()
    found = model(torch.from_numpy(pixels)).argmax(1).numpy()
    assert result.accuracy == float((found == labels).mean())


def test_statistics_are_means_over_the_batches_with_the_averaged_weights(tmp_path):
    config = tiny_config(averaging=0.9, epochs=2, frozen_epochs=0)
    train(config, tiny_dataset(), tmp_path / "run")
    model = load_run(tmp_path / "run").model
    statistics = {n: t.clone() for n, t in model.state_dict().items() if n.endswith(("running_mean", "running_var"))}
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0  # the running statistics are then those of the last batch
        if isinstance(module, DropoutUnit):
            module.eval()
    batches = tiny_dataset().train.batches(13, seed=derive_seed(0, "statistics"), augment=True, drop_last=True)
    each = []
    for batch in islice(batches, 50):
        model(batch.images[0])
        each.append({name: model.state_dict()[name].double().clone() for name in statistics})
    assert len(each) == STEPS and statistics
    for name, tensor in statistics.items():
        mean = sum(found[name] for found in each) / STEPS
        torch.testing.assert_close(tensor.double(), mean, rtol=1e-5, atol=1e-6)  # of float32


def test_estimating_leaves_the_network_as_it_was(tmp_path, uninterrupted):
    model = load_run(uninterrupted).model
    momenta = [m.momentum for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    batch = next(tiny_dataset().train.batches(13)).images[0]
    estimate_statistics(model, [batch, batch])
    assert [m.momentum for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)] == momenta
    assert not model.training


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"averaging": 1.0}, "schedule.averaging is 1.0; it is a decay per step, at least 0 and below 1"),
        ({"averaging": -0.5}, "schedule.averaging is -0.5; it is a decay"),
        (
            {"averaging": 0.9, "epochs": 2, "frozen_epochs": 2},
            "but all 2 epochs are frozen and there is nothing to aver",
        ),
    ],
)
def test_what_cannot_be_averaged_is_refused(settings, message):
    with pytest.raises(TrainingError, match=message):
        ScheduleConfig(**settings)
