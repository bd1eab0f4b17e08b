"""Torchvision's classifiers: each by its name, at the sizes it takes, for other channels and classes."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from mecdeploy.training.config import ModelConfig
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.models import available_models, build_model
from mecdeploy.training.models.fitting import classifier, fit_channels, fit_classes, spread_over_channels

NAMES = torchvision.models.list_models(module=torchvision.models)
# RegNet's constructor reads its widths from tensors, which the meta device has not; the two smallest fit in memory.
ON_META = [name for name in NAMES if not name.startswith("regnet")]
REGNETS = ["regnet_x_400mf", "regnet_y_400mf"]


def build(name: str, size: int, *, channels: int = 3, classes: int = 7, stem: str = "auto") -> nn.Module:
    config = ModelConfig(name=name, stem=stem)
    return build_model(config, num_classes=classes, channels=channels, height=size, width=size)


def logits_shape(model: nn.Module, channels: int, size: int) -> tuple[int, ...]:
    with torch.no_grad():
        return tuple(model.eval()(torch.zeros(2, channels, size, size)).shape)


@pytest.mark.parametrize("name", ON_META + REGNETS)
def test_every_classifier_reads_grayscale_and_has_the_datas_classes(name: str) -> None:
    with torch.device("cpu" if name in REGNETS else "meta"):
        model = build(name, 224, channels=1)
        assert model.training
        assert logits_shape(model, 1, 224) == (2, 7)
        assert not [module for module in model.modules() if isinstance(module, nn.Conv2d) and module.in_channels == 3]


@pytest.mark.parametrize(
    "name",
    ["alexnet", "convnext_tiny", "densenet121", "googlenet", "inception_v3", "squeezenet1_0", "squeezenet1_1", "vgg11"],
)
def test_too_small_images_are_refused_with_the_size_that_torchvision_publishes(name: str) -> None:
    smallest, _ = torchvision.models.get_model_weights(name).DEFAULT.meta["min_size"]
    with torch.device("meta"):
        for size in (8, smallest - 1):
            with pytest.raises(TrainingError) as refusal:
                build(name, size)
            assert str(refusal.value) == (
                f"{name} cannot take images of {size}x{size} pixels; the smallest it takes are {smallest}x{smallest}. "
                f"Set data.image_size to {smallest} or more."
            )
        build(name, smallest)


@pytest.mark.parametrize(
    ("name", "size", "next_step"),
    [
        ("vit_b_16", 100, "squares whose side is a multiple of 16. Set data.image_size to 96 or 112."),
        ("vit_b_32", 8, "squares whose side is a multiple of 32. Set data.image_size to 32."),
        ("maxvit_t", 200, "sides that are multiples of 224. Set data.image_size to 224."),
    ],
)
def test_sizes_that_the_patches_do_not_fit(name: str, size: int, next_step: str) -> None:
    with pytest.raises(TrainingError, match=f"^{name} cannot take images of {size}x{size} pixels: it") as refusal:
        build(name, size)
    assert str(refusal.value).endswith(next_step)


@pytest.mark.parametrize(("name", "size"), [("vit_b_16", 32), ("vit_h_14", 28), ("maxvit_t", 448), ("swin_t", 8)])
def test_networks_with_positions_are_made_for_the_size(name: str, size: int) -> None:
    with torch.device("meta"):
        assert logits_shape(build(name, size), 3, size) == (2, 7)


def test_networks_with_one_stem_say_so() -> None:
    with pytest.raises(TrainingError, match=r"^model.stem is 'small', but vgg11 has only the published stem; use auto"):
        build("vgg11", 32, stem="small")


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_classifiers_are_off(name: str) -> None:
    model = build(name, 75)
    assert model.transform_input is False
    assert isinstance(model.train()(torch.zeros(2, 3, 75, 75)), torch.Tensor), "not torchvision's named tuple"


def test_trying_a_size_changes_no_weight() -> None:
    torch.manual_seed(0)
    built = build("mobilenet_v3_small", 32, classes=1000)
    torch.manual_seed(0)
    published = torchvision.models.mobilenet_v3_small(weights=None)
    assert all(torch.equal(a, b) for a, b in zip(built.parameters(), published.parameters(), strict=True))


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v3_small"])
def test_a_classifier_for_other_classes(name: str) -> None:
    model = torchvision.models.get_model(name, weights=None)
    found = classifier(model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    fit_classes(model, 1000, 5, name)
    assert logits_shape(model, 3, 64) == (2, 5)
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed == {f"{found}.weight", f"{found}.bias"}


def test_a_network_without_a_layer_of_that_many_outputs() -> None:
    with pytest.raises(TrainingError, match="net gives 9 logits, the data has 5 classes, and no layer has 9 outputs"):
        fit_classes(nn.Linear(3, 4), 9, 5, "net")


@pytest.mark.parametrize(("old", "new"), [(3, 1), (1, 3)])
def test_gray_images_give_what_they_gave(old: int, new: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(old, 4, 3)
    gray = torch.randn(2, 1, 5, 5)
    with torch.no_grad():
        before = conv(gray.repeat(1, old, 1, 1))
        fit_channels(conv, new, "net")
        # The same 27 products, summed in another order: float32 roundings of sums below 8.
        assert torch.allclose(conv(gray.repeat(1, new, 1, 1)), before, atol=1e-6)
    assert conv.in_channels == new
    assert spread_over_channels(torch.tensor([[[[1.0]], [[2.0]], [[4.0]]]]), 1).item() == 7.0


def test_a_grouped_first_convolution_is_left_to_its_maker() -> None:
    with pytest.raises(TrainingError, match=r"^net: the first convolution 0 reads 3 channels in 3 groups, the images"):
        fit_channels(nn.Sequential(nn.Conv2d(3, 6, 3, groups=3)), 1, "net")


def test_the_names_are_those_of_the_choice() -> None:
    assert set(NAMES) < set(available_models())
