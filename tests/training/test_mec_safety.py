"""What the objective refuses, and what it must survive: odd batches, constant and broken tensors, several devices."""

import math

import pytest
import torch
from tiny_recording import recording, seeded
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mecdeploy.training.config import MecConfig
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.mec import mec_objective
from mecdeploy.training.recording import Recording


@pytest.mark.parametrize("kind", ["features", "activations", "weights"])
def test_a_missing_tensor_is_named(kind: str) -> None:
    with pytest.raises(TrainingError, match=f"mec.code asks for {kind}, but the forward pass recorded none; take it"):
        mec_objective(Recording(), MecConfig(code=(kind,)), step_fraction=1.0)


def test_views_that_do_not_fit_are_named() -> None:
    config = MecConfig(views="teacher")
    with pytest.raises(TrainingError, match="mec.views is 'teacher', but there is no second view; set mec.views"):
        mec_objective(recording(), config, step_fraction=1.0)
    with pytest.raises(TrainingError, match=r"features have shape \[25, 12\], the first's \[24, 12\]; both views need"):
        mec_objective(recording(), config, other=recording(samples=25), step_fraction=1.0)
    with pytest.raises(TrainingError, match="second view's features have shape None"):
        mec_objective(recording(), config, other=Recording(), step_fraction=1.0)


@pytest.mark.parametrize("value", [0.0, 0.3, 1e30])
@pytest.mark.parametrize("form", ["mixture", "exact"])
@pytest.mark.parametrize("views", ["one", "teacher"])
def test_constant_and_huge_tensors_are_safe(value: float, form: str, views: str) -> None:
    recorded = Recording(
        features=torch.full((17, 12), value, requires_grad=True),
        activations={"conv": torch.full((17, 3, 4, 4), value, requires_grad=True)},
        weights={"fc": torch.full((10, 12), value, requires_grad=True)},
    )
    config = MecConfig(code=("features", "activations", "weights"), form=form, views=views, warmup=0.0)
    other = Recording(features=recorded.features) if views == "teacher" else None
    result = mec_objective(recorded, config, other=other, step_fraction=1.0, generator=seeded())
    result.total.backward()
    assert bool(result.total.isfinite())
    for leaf in (recorded.features, *recorded.activations.values(), *recorded.weights.values()):
        assert leaf is not None and leaf.grad is not None and bool(leaf.grad.isfinite().all())


@pytest.mark.parametrize("samples", [1, 2, 3, 9, 15, 17])
def test_last_batches_of_any_size_are_coded(samples: int) -> None:
    for views in ("one", "teacher"):
        recorded = recording(samples=samples)
        result = mec_objective(
            recorded, MecConfig(views=views), other=recorded if views != "one" else None, step_fraction=1
        )
        result.total.backward()
        assert recorded.features is not None and recorded.features.grad is not None
        assert bool(recorded.features.grad.isfinite().all()) and bool(result.total.isfinite())
        assert (result.total.item() > 0) == (samples > 1)


def test_a_broken_network_is_not_hidden() -> None:
    recorded = recording()
    assert recorded.features is not None
    with torch.no_grad():
        recorded.features[3, 2] = math.nan
    for form in ("mixture", "exact"):
        assert math.isnan(mec_objective(recorded, MecConfig(form=form), step_fraction=1.0).total.item())


def test_autocast_changes_nothing() -> None:
    recorded, other = recording(), recording(seed=1)
    for config in (MecConfig(code=("features", "weights")), MecConfig(views="augmented")):
        second = None if config.views == "one" else other
        expected = mec_objective(recorded, config, other=second, step_fraction=1.0).total
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = mec_objective(recorded, config, other=second, step_fraction=1.0).total
        assert inside.dtype == torch.float32 and torch.equal(inside, expected)


def test_tensors_on_several_devices_meet_at_the_first() -> None:
    """Fake tensors: torch checks devices as it would on real ones, and refuses to read a value back to the host."""
    with FakeTensorMode():
        generator = torch.Generator()
        for views in ("one", "teacher"):
            recorded = Recording(
                features=torch.empty(20, 12, device="cuda"),
                activations={"conv": torch.empty(20, 6, 8, 8, device="cuda"), "fc": torch.empty(20, 10)},
                weights={"conv": torch.empty(6, 27, device="cuda"), "fc": torch.empty(10, 12)},
            )
            config = MecConfig(code=("features", "activations", "weights"), views=views, samples=16)
            other = None if views == "one" else Recording(features=torch.empty(20, 12))
            result = mec_objective(recorded, config, other=other, step_fraction=1.0, generator=generator)
            assert result.total.device.type == "cuda"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_the_gpu_never_waits_and_agrees_with_the_cpu() -> None:
    recorded = recording(samples=30)
    config = MecConfig(code=("features", "activations", "weights"), samples=10_000)
    expected = mec_objective(recorded, config, step_fraction=1.0).total.item()

    def moved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.detach().cuda().requires_grad_() for name, tensor in tensors.items()}

    assert recorded.features is not None
    on_device = Recording(
        features=recorded.features.detach().cuda().requires_grad_(),
        activations=moved(recorded.activations),
        weights=moved(recorded.weights),
    )
    generator = torch.Generator("cuda").manual_seed(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        total = mec_objective(on_device, config, step_fraction=1.0, generator=generator).total
        total.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert total.item() == pytest.approx(expected, rel=1e-4)  # float32 sums in another order
