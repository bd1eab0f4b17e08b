"""A sensitivity against the same change made by hand, and what may not leak into it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from tiny_networks import SPEC, images, tiny_residual
from torch import Tensor, nn

from mecdeploy.training.bit_allocation import packed_size
from mecdeploy.training.calibration import calibrate, search_steps
from mecdeploy.training.config import DataConfig, QuantConfig, ScheduleConfig, TrainConfig
from mecdeploy.training.data.memory import MemorySource
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.model import QuantizedModel
from mecdeploy.training.preparation import prepare
from mecdeploy.training.sensitivity import OWN, PROPOSED, Study, study
from mecdeploy.training.sensitivity_bench import HeldOut, fold_batch_norm, hold_out
from mecdeploy.training.units import WeightedUnit

CPU = torch.device("cpu")
EIGHT = {"weight_bits": 8, "act_bits": 8, "first_last_bits": 8, "skip_bits": 8}


def source(count: int = 120) -> MemorySource:
    """Random images; the labels are what the network says of half of them, so that its loss is neither 0 nor chance."""
    pixels = images(count, seed=3)
    with torch.no_grad():
        labels = tiny_residual().eval()(SPEC.normalize(pixels)).argmax(1)
    labels[::2] = (labels[::2] + torch.arange(len(labels[::2]))) % 4
    return MemorySource(pixels.numpy(), labels.numpy(), flip=False)


def config(calibration_images: int = 40, **quant: Any) -> TrainConfig:
    return TrainConfig(quant=QuantConfig(**quant), schedule=ScheduleConfig(calibration_images=calibration_images))


def studied(**changes: Any) -> Study:
    return study(tiny_residual().eval(), SPEC, source(), config(), device=CPU, **changes)


def weighted(model: QuantizedModel) -> dict[str, WeightedUnit]:
    return {name: unit for name, unit in model.units().items() if isinstance(unit, WeightedUnit)}


def image_losses(model: QuantizedModel, held_out: HeldOut) -> tuple[np.ndarray, np.ndarray]:
    """Cross entropy and correctness of each image, from the definition, in float64."""
    losses, correct = [], []
    for batch in held_out.measured:
        with torch.no_grad():
            logits = model(batch.images[0]).double().numpy()
        for row, label in zip(logits, batch.labels.tolist(), strict=True):
            losses.append(row.max() + np.log(np.exp(row - row.max()).sum()) - row[label])
            correct.append(float(row.argmax() == label))
    return np.array(losses), np.array(correct)


def at_eight_bits(held_out: HeldOut, **overrides: Any) -> QuantizedModel:
    model = fold_batch_norm(prepare(tiny_residual().eval(), QuantConfig(**EIGHT, **overrides), SPEC))
    calibrate(model, held_out.calibration)
    return model.eval()


def test_every_number_of_a_layer_is_that_of_weights_rounded_by_hand() -> None:
    """The witness keeps every 8-bit quantiser: weights that are already multiples of a coarse step pass through it."""
    result = studied(images=64)
    held_out = hold_out(source(), config(), 64, CPU)
    model = at_eight_bits(held_out)
    before, right = image_losses(model, held_out)
    assert result.baseline.cross_entropy == pytest.approx(before.mean(), rel=1e-12)  # sums in another order
    assert {found.name: found.weights for found in result.layers} == {
        name: unit.weight.numel() for name, unit in weighted(model).items()
    }
    for found in result.layers:
        assert list(found.changes) == [2, 3, 4]
        unit = weighted(model)[found.name]
        original, original_step = unit.weight.detach().clone(), unit.weight_quantizer.step.detach().clone()
        for bits, change in found.changes.items():
            lower, upper = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
            step = search_steps(original.flatten(1), lower, upper)
            rows = original.flatten(1) / step[:, None]
            with torch.no_grad():
                unit.weight.copy_((rows.round().clamp(lower, upper) * step[:, None]).view_as(original))
                unit.weight_quantizer.step.copy_(step)
            after, still = image_losses(model, held_out)
            expected = (
                (after - before).mean(),
                (after - before).std(ddof=1) / 8,  # the square root of 64 images
                (still - right).mean(),
                (still - right).std(ddof=1) / 8,
            )
            measured = (change.cross_entropy, change.cross_entropy_error, change.accuracy, change.accuracy_error)
            assert measured == pytest.approx(expected, rel=1e-9, abs=1e-12), (found.name, bits)  # sums reordered
        with torch.no_grad():
            unit.weight.copy_(original)
            unit.weight_quantizer.step.copy_(original_step)
    assert any(abs(found.changes[2].cross_entropy) > 0.01 for found in result.layers)


def test_an_activation_is_measured_where_an_override_reaches_it() -> None:
    result = studied(images=64, activations=True)
    held_out = hold_out(source(), config(), 64, CPU)
    before, _ = image_losses(at_eight_bits(held_out), held_out)
    expected = {}
    for name in prepare(tiny_residual(), QuantConfig(**EIGHT), SPEC).units():
        narrow = at_eight_bits(held_out, overrides={name: {"act_bits": 2}})
        if any(output.bits == 2 for unit in narrow.units().values() for output in unit.outputs):
            expected[name] = (image_losses(narrow, held_out)[0] - before).mean()
    found = {one.name: one.changes[2].cross_entropy for one in result.activations}
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)  # sums in another order
    assert len(found) > 2 and studied(images=64).activations == ()


def test_calibration_sees_the_statistics_that_are_deployed() -> None:
    """Then how the images are cut into batches cannot matter; with BatchNorm live it does."""

    def steps(fold: bool, batch: int) -> Tensor:
        model = prepare(tiny_residual().eval(), QuantConfig(**EIGHT), SPEC)
        calibrate(fold_batch_norm(model) if fold else model, images(24).split(batch))
        return torch.stack([output.step.detach() for unit in model.units().values() for output in unit.outputs])

    torch.testing.assert_close(steps(True, 4), steps(True, 24), rtol=1e-5, atol=0)  # float32 sums over fewer images
    assert float((steps(False, 4) / steps(False, 24) - 1).abs().max()) > 0.01


def test_folding_changes_no_code_and_no_deployed_scale() -> None:
    plain = prepare(tiny_residual().eval(), QuantConfig(weight_bits=3), SPEC)
    folded = fold_batch_norm(prepare(tiny_residual().eval(), QuantConfig(weight_bits=3), SPEC))
    for model in (plain, folded):
        calibrate(model, [images(16)])
    scale = torch.tensor(0.02)
    had_norm = 0
    for name, unit in weighted(plain).items():
        had_norm += unit.batch_norm is not None
        other = weighted(folded)[name]
        assert other.batch_norm is None
        (codes, step), (other_codes, other_step) = (u.weight_quantizer(u.weight) for u in (unit, other))
        assert torch.equal(codes, other_codes)
        (row, bias), (other_row, other_bias) = unit.folded(step, scale), other.folded(other_step, scale)
        torch.testing.assert_close(row, other_row, rtol=1e-6, atol=0)  # the same product in another order, float32
        assert float((bias - other_bias).detach().abs().max()) <= 1  # a bias code may lie next to a tie
    assert had_norm == 3


def test_calibration_and_measurement_share_no_image() -> None:
    held_out = hold_out(source(), config(), 1000, CPU)
    calibration, measured = torch.cat(list(held_out.calibration)), torch.cat([b.images[0] for b in held_out.measured])
    assert (len(calibration), len(measured)) == (40, 80)
    every = {image.numpy().tobytes() for image in torch.cat([calibration, measured])}
    assert every == {image.numpy().tobytes() for image in images(120, seed=3)}
    labels = {image.tobytes(): int(label) for image, label in zip(*source().arrays(), strict=True)}
    for batch in held_out.measured:
        assert [labels[i.contiguous().numpy().tobytes()] for i in batch.images[0]] == batch.labels.tolist()


@pytest.mark.parametrize(
    ("available", "calibration_images", "images", "calibrated", "measured"),
    [
        (120, 40, 30, 40, 30),
        (120, 500, 500, 60, 60),
        (600, 256, 100, 256, 100),
        (600, 300, 256, 300, 256),
        (4, 9, 9, 2, 2),
    ],
)
def test_how_many_images(available: int, calibration_images: int, images: int, calibrated: int, measured: int) -> None:
    held_out = hold_out(source(available), config(calibration_images), images, CPU)
    assert sum(len(batch) for batch in held_out.calibration) == calibrated
    assert sum(len(batch.labels) for batch in held_out.measured) == measured


def test_a_study_repeats_bit_for_bit_and_is_plain_data() -> None:
    first, second = studied(images=32), studied(images=32)
    assert first == second
    assert json.loads(json.dumps(first.to_json()))["images"] == 32


def test_whole_networks_are_measured_at_what_they_are_called() -> None:
    result = studied(images=48, size="40%")
    counts = {found.name: found.weights for found in result.layers}
    named = {network.name: network for network in result.networks}
    assert list(named) == [PROPOSED, OWN, "all at 8 bits", "all at 4 bits", "all at 3 bits", "all at 2 bits"]
    assert named[PROPOSED].bits == result.bits and named[PROPOSED].size <= result.budget
    assert result.budget == sum(counts.values()) * 4 // 10
    assert set(named[OWN].bits.values()) == {4, 8}  # the first and last layer of the default settings
    assert all(network.size == packed_size(counts, network.bits) for network in result.networks)
    eight = named["all at 8 bits"]
    assert eight.score == result.baseline and eight.change.cross_entropy == 0
    held_out = hold_out(source(), config(), 48, CPU)
    model = at_eight_bits(held_out, overrides={"*": {"weight_bits": 2}})
    two = image_losses(model, held_out)[0].mean()
    assert named["all at 2 bits"].score.cross_entropy == pytest.approx(two, rel=1e-12)  # sums in another order


def test_without_a_size_the_budget_is_the_runs_own() -> None:
    result = study(tiny_residual().eval(), SPEC, source(), config(weight_bits=2), images=8, device=CPU)
    own = next(network for network in result.networks if network.name == OWN)
    assert result.budget == own.size and set(own.bits.values()) == {2, 8}


def test_the_network_comes_back_as_it_was() -> None:
    network = tiny_residual().eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    study(network, SPEC, source(), config(), images=8, device=CPU)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not network.training


def test_progress_counts_up_to_its_total() -> None:
    told: list[tuple[str, int, int]] = []
    studied(images=8, activations=True, progress=lambda *news: told.append(news))
    for what in ("weights", "activations", "networks"):
        done = [count for name, count, _ in told if name == what]
        assert done == list(range(len(done))) and told[-1][1] == told[-1][2]
        assert {total for name, _, total in told if name == what} == {len(done) - 1}


def test_refusals() -> None:
    def untouched(*_: Any) -> None:
        raise AssertionError("measured before the size was looked at")

    with pytest.raises(TrainingError, match=r"size is 100 bytes, but all weights at 2 bits take \d+; give at least"):
        studied(size="100", progress=untouched)
    with pytest.raises(TrainingError, match=r"1 were asked for, and digits has 120 training images"):
        studied(images=1)
    with pytest.raises(TrainingError, match=r"folder has 3 training images"):
        hold_out(source(3), TrainConfig(data=DataConfig(name="folder")), 10, CPU)


def test_a_network_that_diverged_is_refused() -> None:
    network = tiny_residual().eval()
    fc = network.get_submodule("fc")
    assert isinstance(fc, nn.Linear)
    nn.init.constant_(fc.bias, float("nan"))
    with pytest.raises(TrainingError, match="cross entropy is nan on its own training images"):
        study(network, SPEC, source(), config(), images=8, device=CPU)


@pytest.mark.parametrize("quant", [{"weight_bits": 1, "act_bits": 1}, {"weight_bits": 2, "weight_grid": "codebook"}])
def test_a_run_on_another_grid_is_measured_on_the_uniform_one(quant: dict[str, Any]) -> None:
    """Its own widths are measured too, 1 bit as signs."""
    found = study(tiny_residual().eval(), SPEC, source(), config(**quant), device=CPU)
    (own,) = [network for network in found.networks if network.name == OWN]
    assert set(own.bits.values()) == {quant["weight_bits"], 8}
    assert found.layers == studied().layers
