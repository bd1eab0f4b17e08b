"""Measures of codes and features against cases with a known answer, and against numpy on a whole network.

Tolerances are float64 rounding over sums of a few hundred terms, unless said otherwise.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny_networks import SPEC, images, tiny_residual
from torch import Tensor, nn

from mecdeploy.training.calibration import calibrate
from mecdeploy.training.config import QuantConfig
from mecdeploy.training.data import Batch
from mecdeploy.training.data.memory import MemorySource
from mecdeploy.training.data.source import UNKNOWN
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.measured_images import count_images, take
from mecdeploy.training.model import QuantizedModel
from mecdeploy.training.preparation import prepare
from mecdeploy.training.representation import (
    class_scatter,
    code_use,
    effective_rank,
    feature_spread,
    measure,
    participation_ratio,
)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_uniform_codes_have_all_bits(bits: int) -> None:
    use = code_use("unit", bits, torch.full((2**bits,), 7))
    assert use.entropy == pytest.approx(bits, abs=1e-12)
    assert use.levels == use.available == 2**bits
    assert use.effective_levels == pytest.approx(2**bits, rel=1e-12)
    assert use.lowest == use.highest == 2.0**-bits


def test_one_level_has_none() -> None:
    use = code_use("unit", 2, torch.tensor([0, 0, 0, 5]))
    assert (use.entropy, use.levels, use.effective_levels, use.lowest, use.highest) == (0.0, 1, 1.0, 0.0, 1.0)


def test_an_uneven_histogram() -> None:
    """Shares 1/2, 1/4, 0, 1/4: 1.5 bits."""
    use = code_use("unit", 2, torch.tensor([4, 2, 0, 2]))
    assert use.entropy == pytest.approx(1.5, abs=1e-12)
    assert (use.levels, use.lowest, use.highest) == (3, 0.5, 0.25)


def test_rank_one_features() -> None:
    rows = torch.outer(torch.arange(-3.0, 4.0), torch.tensor([1.0, -2.0, 0.5]))
    # The other singular values are 1e-16 of the first, and their entropy 1e-14.
    assert effective_rank(rows) == pytest.approx(1, abs=1e-6)
    assert participation_ratio(rows) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("dimension", [2, 5])
def test_isotropic_features(dimension: int) -> None:
    rows = torch.cat([torch.eye(dimension), -torch.eye(dimension)]) * 3
    assert effective_rank(rows) == pytest.approx(dimension, rel=1e-12)
    assert participation_ratio(rows) == pytest.approx(dimension, rel=1e-12)


def test_singular_values_of_a_known_spectrum() -> None:
    """Singular values 2, 1, 1: shares 1/2, 1/4, 1/4, so exp(1.5 log 2); energies 4, 1, 1: 36 / 18."""
    rows = torch.diag(torch.tensor([2.0, 1.0, 1.0]))
    assert effective_rank(rows) == pytest.approx(2**1.5, rel=1e-12)
    assert participation_ratio(rows) == pytest.approx(2, rel=1e-12)


def test_constant_features_have_no_dimension() -> None:
    spread = feature_spread(torch.full((6, 4), 2.5), torch.arange(6) % 2, distortion=0.5)
    assert (spread.effective_rank, spread.participation_ratio) == (0.0, 0.0)
    assert (spread.within, spread.between, spread.spread_ratio, spread.coding_rate) == (0.0, 0.0, None, 0.0)


def test_class_scatter() -> None:
    """Classes at 0 and 10, each spread by +-1: within 1, between 25."""
    rows = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [9.0, 0.0], [11.0, 0.0]])
    within, between = class_scatter(rows, torch.tensor([3, 3, 7, 7]))
    assert (within, between) == (pytest.approx(1 / 26), pytest.approx(25 / 26))
    assert class_scatter(rows * 1e3 + 5, torch.tensor([3, 3, 7, 7])) == (
        pytest.approx(1 / 26),
        pytest.approx(25 / 26),
    )


def numpy_spread(rows: np.ndarray, labels: np.ndarray, distortion: float) -> dict[str, float]:
    """The same from eigenvalues of the covariance and from loops over images."""
    count, dimension = rows.shape
    rows = rows.astype(np.float64)
    centred = rows - rows.mean(0)
    eigenvalues = np.clip(np.linalg.eigvalsh(centred.T @ centred / count), 0, None)
    shares = np.sqrt(eigenvalues) / np.sqrt(eigenvalues).sum()
    within = sum(((row - rows[labels == label].mean(0)) ** 2).sum() for row, label in zip(rows, labels, strict=True))
    between = sum(((rows[labels == label].mean(0) - rows.mean(0)) ** 2).sum() for label in labels)
    unit = centred / np.sqrt((centred**2).sum(1).mean())
    gram = unit.T @ unit * dimension / (count * distortion)
    return {
        "effective_rank": math.exp(-sum(share * math.log(share) for share in shares if share > 1e-12)),
        "participation_ratio": eigenvalues.sum() ** 2 / (eigenvalues**2).sum(),
        "within": within / (within + between),
        "between": between / (within + between),
        "spread_ratio": within / between,
        "coding_rate": np.linalg.slogdet(np.eye(dimension) + gram)[1] / 2 / min(count, dimension),
    }


def test_feature_spread_against_numpy() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 4, 60)
    rows = generator.normal(size=(60, 9)) * np.arange(1, 10) + 3 * labels[:, None]
    spread = feature_spread(torch.from_numpy(rows), torch.from_numpy(labels), distortion=0.3)
    assert (spread.images, spread.dimension, spread.distortion) == (60, 9, 0.3)
    for name, expected in numpy_spread(rows, labels, 0.3).items():
        # scale_rows adds NOISE, 1e-8 of the largest entry squared, to the mean square that it divides by.
        assert getattr(spread, name) == pytest.approx(expected, rel=1e-6), name


@pytest.fixture(scope="module")
def quantized() -> QuantizedModel:
    model = prepare(tiny_residual().eval(), QuantConfig(weight_bits=3, act_bits=2), SPEC)
    calibrate(model, [images(32)])
    return model


def batches(count: int = 40) -> list[Batch]:
    pixels = images(count, seed=5)
    labels = torch.arange(count) % 4
    return [Batch((pixels[:25],), labels[:25]), Batch((pixels[25:],), labels[25:])]


def test_codes_are_the_deployed_ones(quantized: QuantizedModel) -> None:
    """Histograms of `integers`, what the runtime is checked against, counted by numpy."""
    quantized.train()
    found = measure(quantized, SPEC, batches(), distortion=0.5)
    assert quantized.training
    stored = quantized.integers(images(40, seed=5))
    assert [use.name for use in found.activations] == [
        name for unit in quantized.units().values() if len(unit.outputs) for name in unit.output_names
    ]
    assert len({use.bits for use in found.activations}) > 1
    for use in found.activations:
        counts = np.bincount(stored[use.name].ravel(), minlength=use.available)
        shares = counts[counts > 0] / counts.sum()
        assert use.entropy == pytest.approx(-(shares * np.log2(shares)).sum(), abs=1e-9)
        assert use.levels == len(shares) > 1
        assert (use.lowest, use.highest) == (counts[0] / counts.sum(), counts[use.available - 1] / counts.sum())
    unit = quantized.unit("second")
    weights = next(use for use in found.weights if use.name == "second")
    steps = unit.weight_quantizer.step.detach().numpy().reshape(-1, 1, 1, 1)
    codes = np.clip(np.round(unit.weight.detach().numpy() / steps), -4, 3)
    counts = np.array([(codes == level).sum() for level in range(-4, 4)])
    assert weights.levels == (counts > 0).sum() and weights.available == 8
    assert (weights.lowest, weights.highest) == (counts[0] / codes.size, counts[-1] / codes.size)


def test_codes_that_are_not_consecutive() -> None:
    """DoReFa's: odd ones, all of them available."""
    model = prepare(tiny_residual().eval(), QuantConfig(weight_bits=2, act_bits=2), SPEC, "dorefa")
    calibrate(model, [images(32)])
    found = next(use for use in measure(model, SPEC, batches(), distortion=0.5).weights if use.name == "second")
    codes = model.unit("second").weight_quantizer(model.unit("second").weight)[0].detach().numpy()
    shares = np.array([(codes == level).mean() for level in (-3, -1, 1, 3)])
    assert (found.available, found.levels) == (4, (shares > 0).sum())
    assert found.entropy == pytest.approx(-(shares * np.log2(shares)).sum(), abs=1e-9)
    assert (found.lowest, found.highest) == (shares[0], shares[3])


def test_features_are_what_the_last_layer_reads(quantized: QuantizedModel) -> None:
    found = measure(quantized, SPEC, batches(), distortion=0.5).features
    stored = quantized.integers(images(40, seed=5))
    unit = quantized.unit("hidden")
    codes = stored[unit.output_names[0]]  # a scale is common to all features, and every measure is free of it
    for name, expected in numpy_spread(codes, np.arange(40) % 4, 0.5).items():
        assert getattr(found, name) == pytest.approx(expected, rel=1e-5), name  # NOISE again, of fewer features


def test_a_network_in_full_precision_has_features_alone() -> None:
    network = tiny_residual().eval()
    seen: list[Tensor] = []
    handle = network.fc.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    found = measure(network, SPEC, batches(), distortion=0.5)
    handle.remove()
    assert found.activations == found.weights == ()
    expected = numpy_spread(torch.cat(seen).detach().numpy(), np.arange(40) % 4, 0.5)
    for name, value in expected.items():
        assert getattr(found.features, name) == pytest.approx(value, rel=1e-5), name
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_a_last_convolution_and_tokens_are_pooled() -> None:
    spread = measure(
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1), nn.AdaptiveAvgPool2d(1)), SPEC, batches(), distortion=0.5
    )
    assert (spread.features.images, spread.features.dimension) == (40, 6)
    tokens = nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.Flatten(2), nn.Linear(4, 5))
    assert measure(tokens, SPEC, batches(), distortion=0.5).features.dimension == 4
    with pytest.raises(TrainingError, match="no convolution or linear layer, and so no features"):
        measure(nn.Flatten(), SPEC, batches(), distortion=0.5)


def test_which_images() -> None:
    pixels, labels = images(20).numpy(), np.arange(20) % 3
    source = MemorySource(pixels, labels, flip=True)
    taken = list(take(source, 13, batch_size=5, device=torch.device("cpu")))
    assert torch.cat([batch.images[0] for batch in taken]).numpy().tolist() == pixels[:13].tolist()
    drawn = [
        torch.cat([b.labels for b in take(source, 13, batch_size=5, device=torch.device("cpu"), seed=s)])
        for s in (1, 1, 2)
    ]
    assert drawn[0].equal(drawn[1]) and not drawn[0].equal(drawn[2])
    assert count_images(source, None, default=1024, part="validation") == 20
    assert count_images(source, None, default=7, part="validation") == 7
    with pytest.raises(TrainingError, match="images is 21, but the run has 20 training images; ask for at most these"):
        count_images(source, 21, default=7, part="training")
    with pytest.raises(TrainingError, match="images is 1; a measurement needs at least 2"):
        count_images(source, 1, default=7, part="training")
    with pytest.raises(TrainingError, match="the training images have no labels, without which"):
        count_images(MemorySource(pixels, labels * 0 + UNKNOWN, flip=True), 5, default=7, part="training")
