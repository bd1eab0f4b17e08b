"""TOML in, config out, and back: strictly typed, with a did-you-mean for what is unknown."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mecdeploy.config import merge, read_config, read_settings, resolve, run_name, to_toml
from mecdeploy.errors import UserError
from mecdeploy.training.config import (
    DataConfig,
    MecConfig,
    ModelConfig,
    QuantConfig,
    ScheduleConfig,
    TrainConfig,
)
from mecdeploy.training.errors import TrainingError

BITS = st.sampled_from((2, 3, 4, 8))
CONFIGS = st.builds(
    TrainConfig,
    method=st.sampled_from(("mec", "lsq", "fp32")),
    seed=st.integers(0, 2**31),
    weights=st.text(st.characters(codec="utf-8")),
    model=st.builds(ModelConfig, mean=st.just((0.485, 0.456, 0.406)), std=st.tuples(*[st.floats(0.01, 1)] * 3)),
    data=st.builds(DataConfig, name=st.text(st.characters(codec="utf-8")), skip_bad_images=st.booleans()),
    quant=st.builds(
        QuantConfig,
        weight_bits=BITS,
        overrides=st.dictionaries(
            st.text(min_size=1), st.dictionaries(st.sampled_from(("weight_bits", "act_bits")), BITS)
        ),
    ),
    mec=st.builds(
        MecConfig,
        code=st.lists(st.sampled_from(("features", "activations", "weights")), unique=True, max_size=3).map(tuple),
        beta=st.floats(0, 1e6),
    ),
    schedule=st.builds(ScheduleConfig, fp_epochs=st.integers(0, 9), frozen_epochs=st.integers(0, 3)),
)


@settings(suppress_health_check=[HealthCheck.too_slow])  # a busy machine draws slowly, and is right to
@given(CONFIGS)
def test_every_config_survives_toml(config: TrainConfig) -> None:
    assert resolve(tomllib.loads(to_toml(config))) == config


def test_toml_has_every_key() -> None:
    written = tomllib.loads(to_toml(TrainConfig()))
    for section in (DataConfig(), ModelConfig(), QuantConfig(), MecConfig(), ScheduleConfig()):
        name = type(section).__name__.removesuffix("Config").lower()
        assert set(written[name]) == set(section.__dataclass_fields__)


def test_flags_override_the_file_key_by_key() -> None:
    file = {"seed": 1, "quant": {"weight_bits": 2, "overrides": {"fc": {"weight_bits": 4}}}}
    flags = {"quant": {"weight_bits": 3}}
    merged = merge(file, flags)
    assert merged == {"seed": 1, "quant": {"weight_bits": 3, "overrides": {"fc": {"weight_bits": 4}}}}
    assert file["quant"] == {"weight_bits": 2, "overrides": {"fc": {"weight_bits": 4}}}, "merge changed its input"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sede": 1}, "unknown key 'sede'; did you mean 'seed'?"),
        ({"quant": {"weigth_bits": 4}}, "unknown key 'quant.weigth_bits'; did you mean 'quant.weight_bits'?"),
        ({"weight_bits": 4}, "unknown key 'weight_bits'; did you mean 'quant.weight_bits'?"),
        ({"model": {"epochs": 4}}, "unknown key 'model.epochs'; did you mean 'schedule.epochs'?"),
        ({"quantt": {}}, "unknown key 'quantt'; did you mean 'quant'?"),
        ({"init": "a.pth"}, "unknown key 'init'; did you mean 'weights'?"),
        ({"model": {"mean": 0.5}}, "model.mean is 0.5; it must be a list."),
        ({"zzzzzz": 1}, "unknown key 'zzzzzz'; docs/cli.md lists the keys."),
        ({"seed": "1"}, "seed is '1'; it must be a whole number."),
        ({"seed": True}, "seed is True; it must be a whole number."),
        ({"seed": 1.0}, "seed is 1.0; it must be a whole number."),
        ({"mec": {"beta": "big"}}, "mec.beta is 'big'; it must be a number."),
        ({"mec": {"code": "features"}}, "mec.code is 'features'; it must be a list."),
        ({"mec": {"code": [1]}}, "mec.code is 1; it must be a string."),
        ({"data": {"download": 1}}, "data.download is 1; it must be true or false."),
        ({"data": "digits"}, "data is 'digits'; it is a section: write [data] and its keys below it."),
        ({"quant": {"overrides": [4]}}, "quant.overrides is [4]; it must be a table."),
        ({"quant": {"overrides": {"fc": 4}}}, "quant.overrides.fc is 4; it must be a table."),
    ],
)
def test_refusals_name_key_value_and_next_step(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        resolve(settings, source="run.toml")
    assert str(error.value) == f"run.toml: {message}"


def test_a_value_out_of_range_is_the_stages_refusal() -> None:
    with pytest.raises(TrainingError, match="quant.weight_bits is 5; choose one of 1, 2, 3, 4, 8."):
        resolve({"quant": {"weight_bits": 5}})


def test_a_whole_number_stands_for_a_float() -> None:
    beta = resolve({"mec": {"beta": 1}}).mec.beta
    assert beta == 1.0 and type(beta) is float


@pytest.mark.parametrize(("epochs", "frozen"), [(0, 0), (1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (50, 3)])
def test_a_short_run_gets_a_short_final_phase(epochs: int, frozen: int) -> None:
    assert resolve({"schedule": {"epochs": epochs}}).schedule.frozen_epochs == frozen


def test_a_named_final_phase_is_kept_or_refused() -> None:
    assert resolve({"schedule": {"epochs": 9, "frozen_epochs": 7}}).schedule.frozen_epochs == 7
    with pytest.raises(TrainingError, match="schedule.frozen_epochs is 3, more than schedule.epochs"):
        resolve({"schedule": {"epochs": 2, "frozen_epochs": 3}})


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("seed = \n")
    (tmp_path / "latin.toml").write_bytes(b'init = "\xe9"')
    for name, words in {
        "none.toml": "no such config file",
        ".": "no such",
        "bad.toml": "line 1",
        "latin.toml": "not valid",
    }.items():
        with pytest.raises(UserError, match=words):
            read_settings(tmp_path / name)


def test_read_config_blames_the_file(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[quant]\nbits = 4\n")
    with pytest.raises(UserError, match=r"run\.toml: unknown key 'quant\.bits'"):
        read_config(tmp_path / "run.toml")


def test_run_names() -> None:
    assert run_name(TrainConfig()) == "digits-resnet8-mec-w4a4-seed0"
    photos = TrainConfig(method="fp32", seed=3, data=DataConfig(name="imagefolder:/data/photos/"))
    assert run_name(photos) == "imagefolder-photos-resnet8-fp32-seed3"
    own = TrainConfig(method="fp32", model=ModelConfig(name="../my nets/net v2.py:make"))
    assert run_name(own) == "digits-net_v2-make-fp32-seed0"
