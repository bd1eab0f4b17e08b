"""Our networks and the stems: shapes, parameter counts from closed forms, and that one of them learns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mecdeploy.training.config import DataConfig, ModelConfig
from mecdeploy.training.data import load_dataset
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.models import ResidualBlock, SmallResNet, available_models, build_model

SMALL = {"resnet8": 1, "resnet14": 2, "resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9}
CHEAP = ("resnet8", "resnet20", "resnet18", "mobilenet_v2")  # one of each family, for what takes a forward pass


def build(name: str, size: int = 32, *, channels: int = 3, classes: int = 10, stem: str = "auto") -> nn.Module:
    config = ModelConfig(name=name, stem=stem)
    return build_model(config, num_classes=classes, channels=channels, height=size, width=size)


def weights(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def strides(model: nn.Module) -> int:
    """How much the network shrinks an image before its pooling: the side of the last feature map, measured."""
    sizes: list[int] = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.MaxPool2d):
            module.register_forward_hook(lambda _module, _inputs, output: sizes.append(output.shape[2]))
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, 64, 64))
    return 64 // sizes[-1]


def test_every_network_has_a_name() -> None:
    import torchvision

    assert available_models() == (*SMALL, *torchvision.models.list_models(module=torchvision.models))


@pytest.mark.parametrize(("name", "blocks"), SMALL.items())
def test_small_resnets_have_the_weights_their_definition_gives(name: str, blocks: int) -> None:
    count, previous = 3 * 16 * 9 + 2 * 16, 16
    for width in (16, 32, 64):
        for block in range(blocks):
            entering = previous if block == 0 else width
            count += entering * width * 9 + width * width * 9 + 4 * width
            if entering != width:
                count += entering * width + 2 * width  # the projection and its BatchNorm
        previous = width
    assert weights(build(name)) == count + 64 * 10 + 10


def test_resnet20_is_the_published_net_plus_its_two_projections() -> None:
    published = 269_722  # parameter-free shortcuts, 10 classes: 0.27M in He et al. 2015, table 6
    assert weights(build("resnet20")) == published + 2_752


@pytest.mark.parametrize(
    ("name", "count"),
    [("resnet18", 11_689_512), ("resnet34", 21_797_672), ("resnet50", 25_557_032), ("mobilenet_v2", 3_504_872)],
)
def test_large_nets_have_their_published_size_with_the_standard_stem(name: str, count: int) -> None:
    # "num_params" of each in torchvision's table of weights
    assert weights(build(name, 224, classes=1000)) == count


@pytest.mark.parametrize("size", [8, 28, 33])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", CHEAP)
def test_logits_for_any_small_image(name: str, channels: int, size: int) -> None:
    model = build(name, size, channels=channels, classes=7).eval()
    with torch.no_grad():
        logits = model(torch.randn(2, channels, size, size))
    assert logits.shape == (2, 7)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "mobilenet_v2"])
def test_the_small_stem_shrinks_images_four_times_less(name: str) -> None:
    assert strides(build(name, 64, stem="small")) == 8
    assert strides(build(name, 64, stem="standard")) == 32


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_auto_takes_the_small_stem_up_to_64_pixels(name: str) -> None:
    assert strides(build(name, 64)) == 8
    assert strides(build(name, 65)) == 32
    config = ModelConfig(name=name)
    assert strides(build_model(config, num_classes=2, channels=3, height=32, width=65)) == 32


@pytest.mark.parametrize("stem", ["small", "standard", "auto"])
def test_small_resnets_have_one_stem(stem: str) -> None:
    model = build("resnet8", 96, stem=stem)
    assert strides(model) == 4
    first = model.get_submodule("conv1")
    assert isinstance(first, nn.Conv2d)
    assert (first.kernel_size, first.stride, first.padding) == ((3, 3), (1, 1), (1, 1))


def test_a_block_is_its_formula() -> None:
    torch.manual_seed(0)
    for stride, channels in ((1, 4), (2, 4), (1, 6)):
        block = ResidualBlock(4, channels, stride).eval()
        for norm in block.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean = torch.randn(norm.num_features)
                norm.running_var = torch.rand(norm.num_features) + 0.5
        x = torch.randn(2, 4, 5, 5)
        with torch.no_grad():
            assert torch.allclose(block(x), witness(block, x, stride), atol=1e-5)  # float32 sums of 54 products


def witness(block: ResidualBlock, x: Tensor, stride: int) -> Tensor:
    """The block by unfold and matrix products, BatchNorm written out."""

    def convolve(inputs: Tensor, conv: nn.Conv2d, step: int) -> Tensor:
        padding = conv.kernel_size[0] // 2
        columns = torch.nn.functional.unfold(inputs, conv.kernel_size, padding=padding, stride=step)
        side = -(-inputs.shape[2] // step)
        return (conv.weight.flatten(1) @ columns).reshape(len(inputs), -1, side, side)

    def normalise(inputs: Tensor, norm: nn.BatchNorm2d) -> Tensor:
        assert norm.running_mean is not None and norm.running_var is not None
        mean, variance = norm.running_mean[:, None, None], norm.running_var[:, None, None]
        return (inputs - mean) / (variance + norm.eps).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]

    inner = normalise(convolve(x, block.conv1, stride), block.bn1).clamp(min=0)
    outer = normalise(convolve(inner, block.conv2, 1), block.bn2)
    if block.downsample is not None:
        conv, norm = block.downsample
        assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
        x = normalise(convolve(x, conv, stride), norm)
    return (outer + x).clamp(min=0)


def test_convolutions_start_with_he_variance_and_batchnorm_plain() -> None:
    torch.manual_seed(0)
    for name in ("resnet56", "mobilenet_v2"):
        for module in build(name).modules():
            if isinstance(module, nn.Conv2d) and module.groups == 1 and module.weight.numel() > 5000:
                fan_out = module.out_channels * module.kernel_size[0] ** 2
                expected = (2 / fan_out) ** 0.5
                # n > 5000 draws: the estimate's relative deviation is 1/sqrt(2n) < 1%, so 5% is five of them
                assert module.weight.std().item() == pytest.approx(expected, rel=0.05)
            if isinstance(module, nn.BatchNorm2d):
                assert bool((module.weight == 1).all()) and bool((module.bias == 0).all())


def test_the_same_seed_builds_the_same_net() -> None:
    torch.manual_seed(3)
    one = build("mobilenet_v2", channels=1)
    torch.manual_seed(3)
    two = build("mobilenet_v2", channels=1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_a_new_net_is_in_training_mode() -> None:
    assert all(build(name).training for name in CHEAP)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resnet-18", " Did you mean resnet18?"),
        ("ResNet50", " Did you mean resnet50?"),
        ("mobilenetv2", " Did you mean mobilenet_v2?"),
        ("vgg16-bn", " Did you mean vgg16_bn?"),
        ("yolo", ""),
        ("", ""),
    ],
)
def test_an_unknown_model_is_refused_with_a_suggestion_and_the_choice(name: str, hint: str) -> None:
    with pytest.raises(TrainingError) as refusal:
        build(name)
    assert str(refusal.value) == (
        f"model.name is {name!r}, which is no known model.{hint} Choose one of {', '.join(SMALL)}, a classifier of "
        "torchvision (torchvision.models.list_models names them), or a file of yours: path/to/file.py:factory."
    )


def test_other_channels_and_single_classes_are_refused() -> None:
    with pytest.raises(TrainingError, match=r"^resnet8: images have 4 channels; use 1 \(grayscale\) or 3 \(RGB\)\.$"):
        build("resnet8", channels=4)
    with pytest.raises(TrainingError, match=r"^resnet8: the number of classes is 1; a classifier needs at least 2\.$"):
        build("resnet8", classes=1)


def test_a_depth_that_is_no_residual_net_is_a_programmers_mistake() -> None:
    for depth in (2, 9, 18):
        with pytest.raises(AssertionError, match="6n"):
            SmallResNet(depth, num_classes=10, channels=3)


def test_resnet8_learns_the_digits() -> None:
    torch.manual_seed(0)
    digits = load_dataset(DataConfig(), seed=0)
    model = build("resnet8", 8, channels=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)

    def read(pixels: Tensor) -> Tensor:
        return (pixels.float() - digits.pixel_mean) / digits.pixel_std

    for epoch in range(2):
        for group in optimizer.param_groups:
            group["lr"] = (0.1, 0.01)[epoch]
        for batch in digits.train.batches(64, seed=0, epoch=epoch, drop_last=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(read(batch.images[0])), batch.labels).backward()
            optimizer.step()
    (validation,) = digits.validation.batches(360)
    with torch.no_grad():
        right = model.eval()(read(validation.images[0])).argmax(1) == validation.labels
    assert right.float().mean() > 0.9  # 0.97 with five seeds; guessing gives 0.1
