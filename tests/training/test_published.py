"""Torchvision's published weights: fetched from a file:// address here, with their normalisation."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from mecdeploy.training.config import ModelConfig
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.initial import fill
from mecdeploy.training.models import build_model
from mecdeploy.training.published import published_weights


class Shop:
    """Publishes state dicts at file:// addresses, under names that end in their digest as torchvision's do."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        monkeypatch.setattr(torch.hub, "_hub_dir", str(folder / "hub"))

    def publish(self, name: str, state: dict[str, Any], member: str = "DEFAULT") -> Path:
        torch.save(state, self.folder / "state.pth")
        digest = hashlib.sha256((self.folder / "state.pth").read_bytes()).hexdigest()[:8]
        path = (self.folder / "state.pth").rename(self.folder / f"{name}-{digest}.pth")
        weights = torchvision.models.get_model_weights(name)[member]
        self.monkeypatch.setattr(weights.value, "url", path.as_uri())
        return path


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    return Shop(tmp_path, monkeypatch)


def network(name: str, size: int = 32, *, channels: int = 3, classes: int = 1000) -> nn.Module:
    torch.manual_seed(7)
    config = ModelConfig(name=name, stem="standard")
    return build_model(config, num_classes=classes, channels=channels, height=size, width=size)


def published_network(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    model: nn.Module = torchvision.models.get_model(name, weights=None, **options)
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.normal_(norm.running_mean, 0.0, 0.1)  # type: ignore[arg-type]
    return model.eval()


# mnasnet: counts its versions. densenet: its file has names of an older torch. squeezenet: its classifier is a Conv2d.
@pytest.mark.parametrize("name", ["mobilenet_v3_small", "mnasnet0_5", "densenet121", "squeezenet1_1", "swin_t"])
def test_the_network_computes_what_was_published(shop: Shop, name: str) -> None:
    theirs = published_network(name)
    shop.publish(name, theirs.state_dict())
    ours = network(name)
    weights = published_weights(name, "DEFAULT")
    assert fill(ours, weights) == []
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(ours.eval()(images), theirs(images))
    assert weights.source == f"IMAGENET1K_V1 of {name}"
    assert weights.input is not None
    assert weights.input.mean == pytest.approx((123.675, 116.28, 103.53), rel=1e-15)  # 255 * 0.485 in float64
    assert weights.input.std == pytest.approx((58.395, 57.12, 57.375), rel=1e-15)


def test_densenets_of_an_older_torch(shop: Shop) -> None:
    theirs = published_network("densenet121")
    old = {}
    for name, tensor in theirs.state_dict().items():
        for layer in ("norm", "conv"):
            for number in "12":
                if ".denselayer" in name:
                    name = name.replace(f".{layer}{number}.", f".{layer}.{number}.")
        old[name] = tensor
    assert "features.denseblock1.denselayer1.norm.1.weight" in old, "as in the published file"
    shop.publish("densenet121", old)
    ours = network("densenet121")
    assert fill(ours, published_weights("densenet121", "DEFAULT")) == []
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_networks_that_transform_their_input_read_the_same_normalisation_from_us(shop: Shop, name: str) -> None:
    theirs = published_network(name, transform_input=True, aux_logits=True, init_weights=True)
    shop.publish(name, theirs.state_dict())
    ours = network(name, 75)
    weights = published_weights(name, "DEFAULT")
    assert fill(ours, weights) == [], "the auxiliary classifiers go without a word"
    pixels = torch.randint(0, 256, (2, 3, 75, 75), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    assert weights.input is not None
    with torch.no_grad():
        expected = theirs((pixels / 255 - mean) / std)
        found = ours.eval()(weights.input.normalize(pixels))
    # Inputs of one value in two orders of float32 operations: a few roundings, carried through some 60 layers.
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_a_vision_transformer_at_another_size(shop: Shop) -> None:
    theirs = published_network("vit_b_32")
    shop.publish("vit_b_32", theirs.state_dict())
    ours = network("vit_b_32", 64, classes=3)
    notes = fill(ours, published_weights("vit_b_32", "DEFAULT"))
    assert notes == [
        "IMAGENET1K_V1 of vit_b_32 classifies 1000 classes, the data has 3: heads.head starts afresh.",
        "IMAGENET1K_V1 of vit_b_32 was trained with images of another size: its position embedding is interpolated.",
    ]
    positions, published = (model.get_parameter("encoder.pos_embedding") for model in (ours, theirs))
    assert positions.shape == (1, 1 + 2 * 2, 768)
    assert torch.equal(positions[:, 0], published[:, 0]), "the class token has no place"


def test_grayscale_and_other_classes(shop: Shop) -> None:
    theirs = published_network("squeezenet1_1")
    shop.publish("squeezenet1_1", theirs.state_dict())
    ours = network("squeezenet1_1", channels=1, classes=3)
    weights = published_weights("squeezenet1_1", "DEFAULT")
    notes = fill(ours, weights)
    assert [note.rpartition(":")[2] for note in notes] == [
        " classifier.1 starts afresh.",
        " features.0.weight is summed over the colours.",
    ]
    assert torch.equal(ours.get_parameter("features.0.weight"), theirs.get_parameter("features.0.weight").sum(1, True))
    assert weights.input is not None
    spec = weights.input.for_images(channels=1, height=8, width=9)
    assert (spec.channels, spec.height, spec.width) == (1, 8, 9)
    # The mean over the colours; roundings of float64.
    assert spec.mean == pytest.approx((255 * (0.485 + 0.456 + 0.406) / 3,), rel=1e-14)


def test_a_member_of_its_own_normalisation(shop: Shop) -> None:
    shop.publish("efficientnet_v2_l", {"a": torch.zeros(1)})
    weights = published_weights("efficientnet_v2_l", "IMAGENET1K_V1")
    assert weights.input is not None and weights.input.mean == (127.5, 127.5, 127.5) == weights.input.std


def test_what_is_in_the_cache_is_not_fetched_again(shop: Shop) -> None:
    address = shop.publish("squeezenet1_1", published_network("squeezenet1_1").state_dict())
    published_weights("squeezenet1_1", "DEFAULT")
    address.unlink()
    assert len(published_weights("squeezenet1_1", "DEFAULT").tensors) == 52


def test_a_fetch_that_fails(shop: Shop, tmp_path: Path) -> None:
    address = shop.publish("squeezenet1_1", {"a": torch.zeros(1)})
    content = address.read_bytes()
    cached = tmp_path / "hub" / "checkpoints" / address.name
    for damage, reason in (
        (lambda: address.unlink(), "urlopen error"),
        (lambda: address.write_bytes(content[1:]), "hash"),
    ):
        damage()
        with pytest.raises(TrainingError, match=reason) as refusal:
            published_weights("squeezenet1_1", "DEFAULT")
        message = str(refusal.value)
        assert message.startswith(f"IMAGENET1K_V1 of squeezenet1_1 could not be fetched from {address.as_uri()} (")
        assert message.endswith(f"Download it where there is a network and save it as {cached}.")
        assert "\n" not in message
    cached.parent.mkdir(parents=True, exist_ok=True)
    cached.write_bytes(b"half a file")
    with pytest.raises(TrainingError, match="could not be fetched"):
        published_weights("squeezenet1_1", "DEFAULT")


@pytest.mark.parametrize(
    ("model", "name", "message"),
    [
        ("resnet50", "V1", "weights is 'V1'; resnet50 has IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT. A file ends in .pth."),
        ("resnet8", "DEFAULT", "weights is 'DEFAULT', but resnet8 has no published weights; name a file (.safe"),
        ("net.py:make", "DEFAULT", "weights is 'DEFAULT', but net.py:make has no published weights; name a file"),
    ],
)
def test_names_that_nobody_published(model: str, name: str, message: str) -> None:
    with pytest.raises(TrainingError) as refusal:
        published_weights(model, name)
    assert str(refusal.value).startswith(message)
