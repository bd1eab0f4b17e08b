"""A run that starts from weights: which normalisation it reads, how it resumes, what an older checkpoint may lack."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import FINAL, assert_same_tensors, build_tiny, interrupt_at, is_step, tiny_config, tiny_dataset

from mecdeploy.training.checkpoint import read_checkpoint, read_header, write_checkpoint
from mecdeploy.training.config import ModelConfig, TrainConfig
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.events import TrainingInterrupted, WarningEvent
from mecdeploy.training.initial import Weights
from mecdeploy.training.input_spec import InputSpec
from mecdeploy.training.loop import train
from mecdeploy.training.run import load_run

pytestmark = pytest.mark.usefixtures("tiny_models")

RGB = InputSpec.from_channels(height=1, width=1, mean=[120.0, 110.0, 100.0], std=[60.0, 57.0, 57.0])


def fp32(**changes: Any) -> TrainConfig:
    return tiny_config(method="fp32", **changes)


def input_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_header(out / FINAL)["input"]
    return found


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Published weights for the tiny network; gives the (model, name) of every fetch."""
    fetched = []

    def fetch(model: str, name: str) -> Weights:
        fetched.append((model, name))
        torch.manual_seed(5)
        state = build_tiny(None, num_classes=9, channels=3, height=8, width=8).state_dict()
        return Weights(tensors=state, source=f"{name} of {model}", input=RGB)

    monkeypatch.setattr("mecdeploy.training.state.published_weights", fetch)
    return fetched


def test_published_weights_bring_their_normalisation_and_say_what_was_changed(
    tmp_path: Path, published: list[tuple[str, str]]
) -> None:
    events: list[Any] = []
    train(fp32(weights="DEFAULT"), tiny_dataset(), tmp_path / "run", report=events.append)
    assert published == [("resnet8", "DEFAULT")]
    assert [event.message for event in events if isinstance(event, WarningEvent)] == [
        "DEFAULT of resnet8 classifies 9 classes, the data has 3: fc starts afresh.",
        "DEFAULT of resnet8 reads RGB, the images are grayscale: conv1.weight is summed over the colours.",
    ]
    described = input_of(tmp_path / "run")
    assert (described["mean"], described["std"]) == ([110.0], [58.0]), "the mean over the colours"
    assert (described["channels"], described["height"], described["width"]) == (1, 8, 8)


def test_a_run_from_published_weights_resumes_without_fetching_them(
    tmp_path: Path, published: list[tuple[str, str]]
) -> None:
    config = fp32(weights="DEFAULT")
    train(config, tiny_dataset(), tmp_path / "whole")
    with pytest.raises(TrainingInterrupted):
        train(config, tiny_dataset(), tmp_path / "run", report=interrupt_at(is_step("fp32", 1, 2)))
    published.clear()
    train(config, tiny_dataset(), tmp_path / "run", resume=True)
    assert published == []
    assert_same_tensors(tmp_path / "run" / FINAL, tmp_path / "whole" / FINAL)
    assert input_of(tmp_path / "run") == input_of(tmp_path / "whole")


def test_weights_of_ours_bring_their_normalisation_too(tmp_path: Path, published: list[tuple[str, str]]) -> None:
    train(fp32(weights="DEFAULT", fp_epochs=1), tiny_dataset(), tmp_path / "first")
    weights = tmp_path / "first" / FINAL
    config = fp32(weights=str(weights))
    train(config, tiny_dataset(), tmp_path / "whole")
    assert input_of(tmp_path / "whole") == input_of(tmp_path / "first")
    with pytest.raises(TrainingInterrupted):
        train(config, tiny_dataset(), tmp_path / "run", report=interrupt_at(is_step("fp32", 1, 2)))
    weights.unlink()
    train(dataclasses.replace(config, weights="moved.pth"), tiny_dataset(), tmp_path / "run", resume=True)
    assert_same_tensors(tmp_path / "run" / FINAL, tmp_path / "whole" / FINAL)


def test_weights_may_not_appear_while_a_run_is_under_way(tmp_path: Path) -> None:
    with pytest.raises(TrainingInterrupted):
        train(fp32(), tiny_dataset(), tmp_path / "run", report=interrupt_at(is_step("fp32", 1, 2)))
    with pytest.raises(TrainingError, match="weights is 'DEFAULT', but .* was trained with ''"):
        train(fp32(weights="DEFAULT"), tiny_dataset(), tmp_path / "run", resume=True)


def test_the_config_has_the_last_word_on_normalisation(tmp_path: Path, published: list[tuple[str, str]]) -> None:
    config = dataclasses.replace(fp32(weights="DEFAULT"), model=ModelConfig(mean=(0.4,), std=(0.2,)))
    train(config, tiny_dataset(), tmp_path / "run")
    assert (input_of(tmp_path / "run")["mean"], input_of(tmp_path / "run")["std"]) == ([102.0], [51.0])
    wrong = dataclasses.replace(config, model=ModelConfig(mean=(0.4,) * 3, std=(0.2,) * 3))
    with pytest.raises(TrainingError, match="model.mean and model.std have 3 values, the images 1 channels; give one"):
        train(wrong, tiny_dataset(), tmp_path / "wrong")


def test_published_weights_go_with_the_published_stem() -> None:
    assert TrainConfig(weights="DEFAULT").network.stem == "standard"
    assert TrainConfig(weights="DEFAULT", model=ModelConfig(stem="small")).network.stem == "small"
    assert TrainConfig(weights="a.pth").network.stem == "auto"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mean": (0.5,)}, "model.mean has 1 values and model.std 0; give both one for each channel."),
        ({"mean": (123.7,), "std": (58.4,)}, "model.mean holds 123.7; pixels are 0..1 here, so divide by 255."),
        ({"mean": (0.5,), "std": (0.0,)}, "model.std holds 0.0; pixels are 0..1 here, so it must be positive"),
    ],
)
def test_a_normalisation_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError) as refusal:
        ModelConfig(**settings)
    assert str(refusal.value).startswith(message)


def aged(path: Path) -> None:
    """Rewrite a checkpoint as version 0.1 did: `init` for `weights`, no normalisation by channel."""
    checkpoint = read_checkpoint(path)
    header = json.loads(json.dumps(checkpoint.header))
    header["config"]["init"] = header["config"].pop("weights")
    for section, keys in ((header["input"], ("mean", "std")), (header["config"]["model"], ("mean", "std"))):
        for key in keys:
            del section[key]
    write_checkpoint(path, checkpoint.tensors, {key: value for key, value in header.items() if key != "format"})


def test_checkpoints_of_the_first_version_still_load_and_resume(tmp_path: Path) -> None:
    train(tiny_config(), tiny_dataset(), tmp_path / "whole")
    with pytest.raises(TrainingInterrupted):
        train(tiny_config(), tiny_dataset(), tmp_path / "run", report=interrupt_at(is_step("fp32", 1, 2)))
    for path in (tmp_path / "run").glob("checkpoint-*"):
        aged(path)
    train(tiny_config(), tiny_dataset(), tmp_path / "run", resume=True)
    assert_same_tensors(tmp_path / "run" / FINAL, tmp_path / "whole" / FINAL)
    aged(tmp_path / "whole" / FINAL)
    loaded = load_run(tmp_path / "whole")
    assert loaded.config == tiny_config() and loaded.spec.mean == ()


def test_a_checkpoint_has_no_code_executed(tmp_path: Path) -> None:
    config = dataclasses.replace(tiny_config(), model=ModelConfig(name="net.py:make"))
    train(config, tiny_dataset(), tmp_path / "run")
    with pytest.raises(TrainingError, match="names net.py:make as its network, and a checkpoint alone may not have"):
        load_run(tmp_path / "run")
    with pytest.raises(TrainingError, match="a checkpoint alone may not"):
        load_run(tmp_path / "run", model_name="resnet8")
    assert load_run(tmp_path / "run", model_name="moved/net.py:make").config.model.name == "moved/net.py:make"
    train(tiny_config(), tiny_dataset(), tmp_path / "known")
    assert load_run(tmp_path / "known", model_name="net.py:make").config.model.name == "resnet8"
