"""study.toml: which runs it means, and what is refused before any of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mecdeploy.config import read_config
from mecdeploy.errors import UserError
from mecdeploy.study.config import read_study
from mecdeploy.study.plan import Cell, plan

STUDY = """
[study]
seeds = [3, 5]
bits = ["W2A4", "W4A4"]
baseline = "lsq"
[base]
schedule.epochs = 4
model.name = "resnet14"
[methods.lsq]
method = "lsq"
[methods.warm]
method = "mec"
mec.beta = 0.5
[methods.fp32]
method = "fp32"
schedule.fp_epochs = 4
"""
START = "[start]\nseed = 9\nschedule.fp_epochs = 7\n"


def cells(tmp_path: Path, text: str) -> dict[str, Cell]:
    path = tmp_path / "study.toml"
    path.write_text(text)
    return {cell.name: cell for cell in plan(read_study(path), tmp_path / "out")}


def test_every_method_has_every_width_and_seed(tmp_path: Path) -> None:
    found = cells(tmp_path, STUDY + START)
    assert list(found) == ["start-seed9"] + [
        f"{name}-seed{seed}" for seed in (3, 5) for name in ("lsq-w2a4", "warm-w2a4", "fp32", "lsq-w4a4", "warm-w4a4")
    ]
    config = found["warm-w2a4-seed5"].config
    assert (config.method, config.seed, config.quant.weight_bits, config.quant.act_bits) == ("mec", 5, 2, 4)
    assert (config.mec.beta, config.schedule.epochs, config.schedule.fp_epochs) == (0.5, 4, 0)
    assert config.weights == str(tmp_path / "out/runs/start-seed9/checkpoint-final.safetensors")
    assert found["warm-w2a4-seed5"].settings == {"method": "mec", "mec": {"beta": 0.5}}
    start = found["start-seed9"].config
    assert (start.method, start.seed, start.schedule.fp_epochs, start.weights) == ("fp32", 9, 7, "")
    assert start.model.name == "resnet14"
    assert {cell.epochs for cell in found.values() if cell.method != "start"} == {4}


def test_starts_for_each_seed(tmp_path: Path) -> None:
    found = cells(tmp_path, STUDY + START.replace("seed = 9", "per_seed = true"))
    assert list(found)[:2] == ["start-seed3", "start-seed5"]
    assert {cell.start for name, cell in found.items() if name.endswith("seed5")} == {"", "start-seed5"}
    assert found["lsq-w4a4-seed5"].start == "start-seed5"


def test_given_weights_start_no_run(tmp_path: Path) -> None:
    found = cells(tmp_path, STUDY + '[start]\nweights = "theirs.safetensors"\n')
    assert len(found) == 10 and {cell.config.weights for cell in found.values()} == {"theirs.safetensors"}
    assert {cell.start for cell in found.values()} == {""}


def test_regimes_have_starts_of_their_own_unless_those_are_the_same(tmp_path: Path) -> None:
    regimes = "[regimes.all]\n[regimes.few]\ndata.fraction = 0.1\n"
    found = cells(tmp_path, STUDY + START + regimes)
    assert [name for name, cell in found.items() if cell.method == "start"] == ["all-start-seed9", "few-start-seed9"]
    assert found["few-lsq-w2a4-seed3"].config.data.fraction == 0.1
    assert found["few-lsq-w2a4-seed3"].start == "few-start-seed9"
    shared = cells(tmp_path, STUDY + START + "data.fraction = 1.0\n" + regimes)
    assert [name for name, cell in shared.items() if cell.method == "start"] == ["all-start-seed9"]
    assert shared["few-lsq-w2a4-seed3"].start == "all-start-seed9"


def test_a_method_may_say_otherwise_than_the_start(tmp_path: Path) -> None:
    own = 'weights = "own.safetensors"\n'
    found = cells(tmp_path, STUDY.replace('method = "lsq"\n', f'method = "lsq"\n{own}') + START)
    assert (found["lsq-w2a4-seed3"].config.weights, found["lsq-w2a4-seed3"].start) == ("own.safetensors", "")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("[study]", "[studdy]", "study.toml: unknown table [studdy]; did you mean [study]?"),
        ("seeds =", "seed =", "study.toml: unknown key 'study.seed'; did you mean 'study.seeds'?"),
        ("[3, 5]", "[3, 3]", "study.seeds is [3, 3]; list at least one, and none twice."),
        ("[3, 5]", "3", "study.seeds is 3; it must be a list."),
        ('"W2A4"', '"W2"', "study.bits holds 'W2'; write weights and activations as W2A4, each one of 1, 2, 3, 4, 8."),
        ('"W2A4"', '"W5A4"', "study.bits holds 'W5A4'"),
        ('baseline = "lsq"', 'baseline = "lqs"', "study.baseline is 'lqs', which is none of the methods; did you mean"),
        ("mec.beta", "mec.betta", "study.toml: methods.warm: unknown key 'mec.betta'; did you mean 'mec.beta'?"),
        ("mec.beta = 0.5", "mec.beta = true", "methods.warm: mec.beta is True; it must be a number."),
        ("mec.beta = 0.5", "mec.beta = -1", "run warm-w2a4-seed3: mec.beta is -1.0; it must be at least 0.0."),
        ("mec.beta = 0.5", "seed = 1", "methods.warm sets seed, which study.seeds sets for every run; drop it."),
        ("mec.beta = 0.5", "quant.act_bits = 4", "methods.warm sets quant.act_bits, which study.bits sets"),
        ('method = "lsq"', "", "methods.lsq has no method; add method"),
        ("schedule.fp_epochs = 4", "schedule.fp_epochs = 3", "different numbers of epochs: lsq 4, warm 4, fp32 3."),
        ("mec.beta = 0.5", "schedule.epochs = 5", "different numbers of epochs: lsq 4, warm 5, fp32 4."),
        ("seed = 9", "seed = 9\nper_seed = true", "start.per_seed gives each start a seed of study.seeds"),
        ("seed = 9", "method = 'lsq'", "start.method is 'lsq'; a start is full precision"),
        ('model.name = "resnet14"', 'weights = "x.pth"', "both base.weights and [start] say where runs start from"),
        ("[methods.warm]", "[methods.'a/b']", "methods.'a/b' is part of a folder's name"),
        ('baseline = "lsq"', "test = true", "run start-seed9 validates on images that are not carved"),
        ("[methods.lsq]", "[regimes.few]\ndata.fraction = 2.0\n[methods.lsq]", "data.fraction is 2.0"),
        (
            'baseline = "lsq"',
            "measures.hesian = {}",
            "study.measures holds 'hesian'; choose from representation, hessian.",
        ),
        ('baseline = "lsq"', "measures.hessian.n = 3", "study.measures.hessian holds 'n'; choose from images, probes"),
        (
            'baseline = "lsq"',
            "measures.hessian.probes = 1",
            "study.measures.hessian.probes is 1; it must be at least 2.",
        ),
        ('baseline = "lsq"', 'devices = ["0"]\njobs = -1', "study.jobs is -1; it must be at least 0."),
    ],
)
def test_what_is_refused(tmp_path: Path, old: str, new: str, words: str) -> None:
    text = STUDY + START
    assert old in text
    with pytest.raises(UserError) as error:
        cells(tmp_path, text.replace(old, new, 1))
    assert str(tmp_path / "study.toml") in str(error.value)
    assert words in str(error.value)


def test_unequal_budgets_can_be_allowed(tmp_path: Path) -> None:
    text = STUDY.replace("schedule.fp_epochs = 4", "schedule.fp_epochs = 3") + START
    assert cells(tmp_path, text.replace("[study]", "[study]\nequal_budget = false"))["fp32-seed3"].epochs == 3


def test_without_a_start_full_precision_epochs_are_in_the_budget(tmp_path: Path) -> None:
    text = STUDY.replace("schedule.epochs = 4", "schedule.epochs = 4\nschedule.fp_epochs = 2")
    with pytest.raises(UserError, match="lsq 6, warm 6, fp32 4"):
        cells(tmp_path, text)


def test_test_images_need_a_carved_validation(tmp_path: Path) -> None:
    text = STUDY.replace("[base]", '[base]\ndata.validation = "carved"').replace("[study]", "[study]\ntest = true")
    text = text.replace("schedule.epochs = 4", "schedule.epochs = 4\nschedule.fp_epochs = 0")
    assert all(cell.config.data.validation == "carved" for cell in cells(tmp_path, text).values())


def test_a_regime_may_train_from_scratch(tmp_path: Path) -> None:
    regimes = '[regimes.started]\n[regimes.scratch]\nweights = ""\n'
    found = cells(tmp_path, STUDY + START + regimes)
    started, scratch = found["started-lsq-w2a4-seed3"], found["scratch-lsq-w2a4-seed3"]
    assert (started.start, Path(started.config.weights).name) == ("started-start-seed9", "checkpoint-final.safetensors")
    assert (scratch.start, scratch.config.weights, scratch.config.schedule.fp_epochs) == ("", "", 0)


STUDIES = sorted((Path(__file__).parents[2] / "benchmarks/studies").glob("*.toml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_committed_studies_can_be_planned(path: Path, tmp_path: Path) -> None:
    if path.stem.endswith("-start"):  # a run, whose network the others start from
        assert read_config(path).method == "fp32"
        return
    study = read_study(path)
    assert study.axes.test and study.axes.baseline in study.methods
    planned = plan(study, tmp_path)
    assert len(planned) >= len(study.methods) * len(study.axes.seeds)
