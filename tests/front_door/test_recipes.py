"""Every recipe names a network that can be quantised as it says; none has to be run to find that out."""

import re
from pathlib import Path

import pytest

from mecdeploy.config import read_config
from mecdeploy.training.input_spec import InputSpec
from mecdeploy.training.models import build_model
from mecdeploy.training.optimizers import build_optimizer
from mecdeploy.training.preparation import prepare
from mecdeploy.training.units import WeightedUnit

FOLDER = Path(__file__).parents[2] / "recipes"
NAMES = [
    f"imagenet-{model}-{bits}"
    for model in ("mobilenet_v2", "resnet18", "resnet50")
    for bits in ("w2a2", "w2a4", "w4a4")
]


def test_these_are_all_recipes():
    assert sorted(path.stem for path in FOLDER.glob("*.toml")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_what_its_name_says(name):
    config = read_config(FOLDER / f"{name}.toml")
    assert re.fullmatch(r"imagenet-(\w+)-w(\d)a(\d)", name).groups() == (
        config.model.name,
        str(config.quant.weight_bits),
        str(config.quant.act_bits),
    )
    assert config.weights == "DEFAULT" and config.schedule.fp_epochs == 0
    assert config.schedule.batch_size % 64 == 0  # for up to 64 processes
    text = (FOLDER / f"{name}.toml").read_text()
    assert f"torchrun --nproc-per-node 8 -m mecdeploy train --config recipes/{name}.toml" in text


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("w2a4")])
def test_its_network_is_quantised(name):
    """On images of 64 pixels, so that tracing takes a second; the network is the same."""
    config = read_config(FOLDER / f"{name}.toml")
    network = build_model(config.network, num_classes=1000, channels=3, height=64, width=64)
    spec = InputSpec.from_statistics(channels=3, height=64, width=64, mean=120.0, std=60.0)
    model = prepare(network, config.quant, spec)
    assert not model.islands()
    inner = [unit.weight_quantizer.bits for unit in model.units().values() if isinstance(unit, WeightedUnit)]
    assert {2} == set(inner[1:-1]) and inner[0] == inner[-1] == 8
    assert len(build_optimizer(model, config.schedule, model.step_sizes()).param_groups) == 3
