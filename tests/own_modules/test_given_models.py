"""The state in which a model is handed over changes nothing of what is made of it, nor does prepare change it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from journey import EIGHT_BITS, export_and_check, make_one, settle, spec_for
from networks import Framed, conv
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import mecdeploy


def network() -> nn.Module:
    torch.manual_seed(0)
    return settle(Framed(lambda m, x: F.relu(m.conv(x)), conv=conv()), spec_for())


def prepared(model: nn.Module) -> dict[str, Tensor]:
    """All that prepare makes of a model, as tensors by name."""
    return dict(mecdeploy.prepare(model, EIGHT_BITS, spec_for()).state_dict())


def require_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype and torch.equal(tensor, found[name]), name


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model)  # compiles nothing before it is called


GIVEN: dict[str, Callable[[nn.Module], nn.Module]] = {
    "in training": lambda model: model.train(),
    "frozen": lambda model: model.requires_grad_(False),
    "channels last": lambda model: model.to(memory_format=torch.channels_last),
    "float64": lambda model: model.double(),
    "DataParallel": lambda model: nn.DataParallel(model),
    "compiled": compiled,
    "an average of weights": lambda model: torch.optim.swa_utils.AveragedModel(model),
    "compiled inside a wrapper": lambda model: nn.DataParallel(compiled(model)),
}


@pytest.mark.parametrize("kind", GIVEN)
def test_the_same_comes_of_it(kind: str) -> None:
    given = GIVEN[kind](network())
    modes = {name: module.training for name, module in given.named_modules()}
    before = {name: tensor.clone() for name, tensor in given.state_dict().items()}
    require_same(prepared(given), prepared(network()))
    assert {name: module.training for name, module in given.named_modules()} == modes
    require_same(given.state_dict(), before)


def test_half_precision_weights_are_trained_in_float32() -> None:
    """Rounded to half precision they are others, but the float32 network of the rounded ones is what is quantised."""
    require_same(prepared(network().half()), prepared(network().half().float()))


REPARAMETRISED: dict[str, Callable[[nn.Conv2d], nn.Module]] = {
    "weight norm": lambda layer: parametrizations.weight_norm(layer),
    "spectral norm": lambda layer: parametrizations.spectral_norm(layer),
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.parametrize("kind", REPARAMETRISED)
def test_weights_computed_from_others_are_folded(kind: str, tmp_path: Path) -> None:
    model = Framed(lambda m, x: F.relu(m.conv(x)), conv=REPARAMETRISED[kind](conv()))
    with torch.no_grad():
        settle(model, spec_for())
    made, images = make_one(model.eval())
    assert "conv" in {name.split(".")[0] for name in made.units()}
    if kind == "pruned":
        assert int((made.unit("conv").weight == 0).sum()) == 8 * 8 * 9 // 2
    export_and_check(made, images, tmp_path)


def test_features_kept_from_an_earlier_call_are_no_obstacle() -> None:
    model = network().eval()
    model.features = model.stem(torch.zeros(1, 3, 8, 8))
    assert model.features.grad_fn is not None
    require_same(prepared(model), prepared(network()))


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that scripting is old
        return torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)))


def with_a_lock() -> nn.Module:
    import threading

    model = network()
    model.lock = threading.Lock()
    return model


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "a function": (lambda: lambda x: x, "the model is of type function; give an nn.Module."),
    "TorchScript": (scripted, "RecursiveScriptModule is TorchScript, which cannot be traced; give the nn.Module"),
    "no shape yet": (
        lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(5)),
        "1.weight has no shape yet; run the model once on a batch of images first.",
    ),
    "no values": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 5, device="meta")),
        "1.weight is on the meta device and has no values; load the model's weights first.",
    ),
    "a lock": (with_a_lock, "Framed cannot be copied (TypeError: cannot pickle '_thread.lock' object)."),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_refused(kind: str) -> None:
    make, words = REFUSED[kind]
    with pytest.raises(ValueError) as error:
        mecdeploy.prepare(make(), EIGHT_BITS, spec_for())  # type: ignore[arg-type]
    assert str(error.value).startswith(words)
    assert "\n" not in str(error.value)
