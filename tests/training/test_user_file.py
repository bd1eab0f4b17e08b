"""A network from the user's own file: what is called with what, and one sentence for everything that goes wrong."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mecdeploy.training.config import ModelConfig
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.models import build_model

NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes=1000, channels=3, width=4):
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.fc(self.drop(self.norm(self.conv(x)).mean((2, 3))))
"""


def write(folder: Path, source: str, name: str = "net.py") -> Path:
    (folder / name).write_text(NET + source)
    return folder / name


def build(file: Path, factory: str, *, channels: int = 3, side: int = 8, stem: str = "auto") -> nn.Module:
    config = ModelConfig(name=f"{file}:{factory}", stem=stem)
    return build_model(config, num_classes=5, channels=channels, height=side, width=side)


def refusal(file: Path, factory: str, **images: int) -> str:
    with pytest.raises(TrainingError) as error:
        build(file, factory, **images)  # type: ignore[arg-type]
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "source",
    [
        "make = Net",
        "def make(num_classes, *, in_channels): return Net(num_classes, in_channels)",
        "def make(): return Net()",
        "def make(**anything): assert not anything; return Net()",
        "def make(image_size): assert image_size == 8; return Net()",
        "class make(Net): pass",
        "import functools\nmake = functools.partial(Net, width=2)",
        "def make(num_classes): return nn.Sequential(Net(num_classes))",
    ],
)
def test_a_factory_gets_what_its_signature_has_and_the_rest_is_fitted(
    tmp_path: Path, source: str, channels: int
) -> None:
    model = build(write(tmp_path, source), "make", channels=channels)
    assert model.training
    assert model(torch.randn(2, channels, 8, 8)).shape == (2, 5)


def test_trying_the_network_leaves_its_statistics_and_the_random_numbers_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build(write(tmp_path, ""), "Net")
    drawn = torch.rand(1)
    torch.manual_seed(0)
    same = type(model)(5, 3)
    assert torch.equal(torch.rand(1), drawn)
    assert all(torch.equal(tensor, same.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_siblings_are_importable_while_it_loads(tmp_path: Path) -> None:
    (tmp_path / "layers_beside.py").write_text("WIDTH = 6\n")
    source = "from layers_beside import WIDTH\ndef make(num_classes):\n    return Net(num_classes, width=WIDTH)\n"
    path = list(sys.path)
    assert build(write(tmp_path, source), "make").get_parameter("fc.weight").shape == (5, 6)
    assert sys.path == path


def test_two_files_of_one_name_are_two_modules(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    one = build(write(tmp_path / "one", "def make(num_classes): return Net(num_classes, width=1)"), "make")
    two = build(write(tmp_path / "two", "def make(num_classes): return Net(num_classes, width=2)"), "make")
    assert type(one).__module__ != type(two).__module__
    assert sys.modules[type(one).__module__].Net is type(one), "pickle and torch.export look there"


def test_the_training_mode_and_lazy_layers(tmp_path: Path) -> None:
    source = (
        "def make(num_classes): return nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(num_classes))"
    )
    model = build(write(tmp_path, source), "make", channels=1)
    assert model.training and model(torch.zeros(2, 1, 8, 8)).shape == (2, 5)


@pytest.mark.parametrize(
    ("factory", "source", "words"),
    [
        ("nett", "", "net.py has no nett. Did you mean Net?"),
        ("zzz", "", "net.py has no zzz. It defines Net."),
        ("five", "five = 5", "net.py:five is a value of type int; name a function or a class"),
        ("make", "def make(): return 5", "net.py:make returned a value of type int, not an nn.Module"),
        ("make", "def make(): Net()", "net.py:make returned None, not an nn.Module"),
        ("make", "def make(depth): pass", "net.py:make needs the argument 'depth'; only num_classes, in_channels"),
        ("make", "def make():\n    raise KeyError('a\\nb')", "make failed: KeyError: 'a\\nb' ({path}, line +2)"),
        ("make", "def make():\n    raise SystemExit(3)", "make failed: SystemExit: 3 ({path}, line +2)"),
        ("make", "import nowhere_at_all", "cannot be imported: ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("make", "def make(:", "net.py cannot be imported: SyntaxError: invalid syntax ({path}, line +1)"),
        (
            "make",
            "class make(Net):\n    def forward(self, x):\n        return x.view(7, 7)",
            "cannot take images [N, 3, 8, 8]: RuntimeError: shape '[7, 7]' is invalid for input of size 384 "
            "({path}, line +3).",
        ),
        (
            "make",
            "class make(Net):\n    def forward(self, x):\n        return super().forward(x) if x.numel() else 1 / 0\n"
            "    def train(self, mode=True):\n        self.forward = (lambda x: 1 / 0) if mode else super().forward\n"
            "        return super().train(mode)",
            "make fails in training mode: ZeroDivisionError: division by zero ({path}, line +5)",
        ),
        (
            "make",
            "class make(Net):\n    def forward(self, x): return x, x",
            "make gives a value of type tuple; a class",
        ),
        (
            "make",
            "class make(Net):\n    def forward(self, x): return (x, x) if self.training else super().forward(x)",
            "make gives a value of type tuple in training mode; a classifier gives one tensor of logits [N, K].",
        ),
        ("make", "def make(): return nn.Conv2d(3, 5, 3)", "gives a tensor of shape [2, 5, 6, 6] for 2 images; a clas"),
        ("make", "def make(num_classes): return Net(9)", "was called with num_classes=5, but gives 9 logits."),
        (
            "make",
            "def make(): return nn.Sequential(nn.Flatten(), nn.Softmax(1))",
            "gives 192 logits, the data has 5 classes, and no layer has 192 outputs. Give the factory a parameter num_",
        ),
        (
            "make",
            "def make(): return nn.Sequential(nn.Conv2d(3, 5, 11), nn.AdaptiveAvgPool2d(1), nn.Flatten())",
            "Images of 11x11 pixels work: set data.image_size to 11.",
        ),
    ],
)
def test_what_goes_wrong_is_one_sentence(tmp_path: Path, factory: str, source: str, words: str) -> None:
    file = write(tmp_path, source)
    above = NET.count("\n")
    words = re.sub(r"line \+(\d)", lambda match: f"line {above + int(match[1])}", words.replace("{path}", str(file)))
    assert words in refusal(file, factory)


def test_a_file_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal(Path("gone.py"), "make") == (
        f"model.name is 'gone.py:make', and gone.py is no file in {tmp_path}; check the path."
    )


def test_a_file_without_a_factory_and_with_a_stem(tmp_path: Path) -> None:
    file = write(tmp_path, "")
    with pytest.raises(TrainingError, match=r"net\.py'; name the function or class that makes the network: .*:NAME"):
        build_model(ModelConfig(name=str(file)), num_classes=5, channels=3, height=8, width=8)
    with pytest.raises(TrainingError, match="model.stem is 'small', but .* has the stem that its file gives it"):
        build(file, "Net", stem="small")


def test_networks_of_timm(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    (tmp_path / "net.py").write_text(
        "import timm\n\ndef make(num_classes):\n"
        "    return timm.create_model('mobilenetv3_small_100', pretrained=False, num_classes=num_classes)\n"
    )
    model = build(tmp_path / "net.py", "make", channels=1, side=32)
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 5)
