"""The documents say what the result files say, and the arithmetic between them is right."""

import argparse
import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def benchmarks_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `benchmarks` importable by its path alone: with the root on sys.path the checkout would hide the wheel."""
    folder = ROOT / "benchmarks"
    spec = importlib.util.spec_from_file_location(
        "benchmarks", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "benchmarks", package)
    spec.loader.exec_module(package)


def load(name: str) -> ModuleType:
    sys.modules.pop(f"benchmarks.{name}", None)
    return importlib.import_module(f"benchmarks.{name}")


def test_documents_show_the_committed_results() -> None:
    tables = load("tables")
    for document in tables.DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        assert tables.fill(text, tables.write_table) == text, f"{document}: run python -m benchmarks.tables"


def test_every_table_is_shown_on_one_page_beside_the_readme() -> None:
    tables = load("tables")
    pages = [(ROOT / page).read_text(encoding="utf-8") for page in tables.DOCUMENTS if page != "README.md"]
    shown = [match["name"] for page in pages for match in tables.MARKED.finditer(page)]
    assert sorted(shown) == sorted(tables.TABLES)


def test_committed_load_got_every_answer_right_and_measured_the_server() -> None:
    result = json.loads((ROOT / "benchmarks/results/serving-load.json").read_text())
    for measured in result["connections"].values():
        assert measured["wrong"] == measured["refused"] == 0
        assert measured["client_core_share"] < 0.9, "the client was the bottleneck"
    assert result["mb_per_100k_requests"] < 5


def test_committed_latency_is_whole_and_all_quantised_models_are_all_integer() -> None:
    result = json.loads((ROOT / "benchmarks/results/latency.json").read_text())
    for network in ("resnet18", "mobilenet_v2"):
        models = result["networks"][network]
        assert list(models) == ["fp32", "static_int8", "w8a8", "w4a4", "w2a2"]
        convolutions = models["fp32"]["float_convolutions"]
        for model in ("static_int8", "w8a8", "w4a4", "w2a2"):  # a baseline in float would be no fair one
            assert models[model]["float_convolutions"] == 0
            assert models[model]["integer_convolutions"] == convolutions
    assert result["environment"]["threads"] == 1


def test_committed_check_was_of_sixteen_images_and_found_nothing() -> None:
    result = json.loads((ROOT / "benchmarks/results/check_cost.json").read_text())
    assert (result["export"]["network"], result["bits"], result["side"]) == ("resnet50", 4, 224)
    check = result["check"]
    assert (check["network"], result["interpreter"]["network"], result["images"]) == ("resnet18", "resnet18", 16)
    assert check["passed"] and check["integers_different"] == 0 and check["integers_compared"] > 16 * 1_000_000
    assert result["environment"]["threads"] == 1 and result["rounds"] >= 3


def test_committed_accuracy_has_every_run_and_no_differing_integer() -> None:
    result = json.loads((ROOT / "benchmarks/results/cifar10.json").read_text())
    assert list(result["runs"]) == ["fp32", "lsq-w4a4", "mec-w4a4", "lsq-w2a2", "mec-w2a2"]
    for name, run in result["runs"].items():
        if name != "fp32":
            assert run["passed"] and run["integers_different"] == 0 and run["integers_compared"] > 1_000_000
            assert run["accuracy_torch"] == run["accuracy_onnxruntime"]


def test_committed_zoo_is_every_classifier_and_no_integer_differs() -> None:
    import torchvision

    result = json.loads((ROOT / "benchmarks/results/zoo.json").read_text())
    names = torchvision.models.list_models(module=torchvision.models)
    assert sorted([*result["networks"], *result["not_run"]]) == sorted(names)
    for name, row in result["networks"].items():
        if "error" in row:
            continue  # shown by the page
        assert row["family"] and row["traced"]
        for width in ("w4a4",) if row["light"] else ("w8a8", "w4a4", "w2a2"):
            found = row[width]
            assert found["passed"] and found["integers_different"] == 0 and found["integers_compared"] > 10_000, name
            assert found["float_products"] == 0 and found["integer_products"] > 0, name
            floating = row["family"] in ("convnext", "maxvit", "swin_transformer", "vision_transformer")
            assert (found["islands"] > 0) is floating, name
            assert (found["float_operators"] != {}) is floating, name
    assert result["environment"]["threads"] == 1


def test_committed_comparison_has_every_tool_and_only_ours_promises_equal_bits() -> None:
    comparison, tables = load("comparison"), load("comparison_tables")
    tools = json.loads((ROOT / "benchmarks/results/comparison.json").read_text())["tools"]
    assert set(tools) == set(tables.NAMES) and set(comparison.TOOLS) <= set(tools)
    convolutions = tools["fp32"]["float_convolutions"]
    for name, row in tools.items():
        if "file_bytes" not in row:
            assert row["failed"], name
            continue
        assert row["accuracy"] > (0.2 if name == "mecdeploy-w2a2" else 0.8), (
            f"{name}: a network that knows nothing agrees with anything"
        )
        if name.startswith(comparison.OURS):
            assert (row["integer_convolutions"], row["float_convolutions"]) == (convolutions, 0)
            assert row["logits_compared"] == 3600 and row["logits_different"] == 0 and row["largest_difference"] == 0
    assert tools["mecdeploy-w2a2"]["bits_per_weight"] < 2.5 < 4.5 < tools["mecdeploy-w8a8"]["bits_per_weight"]


STUDIES = sorted((ROOT / "benchmarks/results").glob("study-*.json"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_committed_studies_are_whole_and_their_means_are_those_of_their_runs(path: Path) -> None:
    """By numpy and a table of Student's t, from each run's own accuracy."""
    result = json.loads(path.read_text())
    study, runs = result["study"], result["runs"]
    quantised = [name for name, settings in study["methods"].items() if settings["method"] != "fp32"]
    regimes = list(study.get("regimes", {})) or [""]
    seeds, quantile = study["study"]["seeds"], {3: 4.302653, 5: 2.776445}[len(study["study"]["seeds"])]
    expected = {(r, m, b, s) for r in regimes for m in quantised for b in study["study"]["bits"] for s in seeds}
    found = {(run["regime"], run["method"], run["bits"], run["seed"]): run for run in runs}
    assert {key for key in found if key[2]} == expected
    for row in result["rows"]:
        own = [run for run in runs if all(run[key] == row[key] for key in ("regime", "method", "bits"))]
        for part in ("validation", "test"):
            values = np.array([100 * run[part] for run in own])
            assert row[part]["mean"] == pytest.approx(values.mean(), abs=1e-9)  # float64, of numbers up to 100
        if row["test_difference"] is None:
            continue
        partners = [found[row["regime"], study["study"]["baseline"], row["bits"], run["seed"]] for run in own]
        gaps = np.array([100 * (run["test"] - partner["test"]) for run, partner in zip(own, partners, strict=True)])
        margin = quantile * gaps.std(ddof=1) / len(gaps) ** 0.5
        interval = [gaps.mean() - margin, gaps.mean() + margin]
        assert row["test_difference"]["mean"] == pytest.approx(gaps.mean(), abs=1e-9)
        assert row["test_difference"]["interval"] == pytest.approx(interval, abs=1e-5)  # the quantile has 7 digits


def test_committed_loader_has_every_source_and_workers_keep_up() -> None:
    result = json.loads((ROOT / "benchmarks/results/loader.json").read_text())
    streamed = [f"{kind}, {n} worker{'' if n == 1 else 's'}" for kind in ("folder", "shards") for n in (0, 1, 2)]
    assert list(result["sources"]) == ["memory, 1 view", "memory, 2 views", *streamed]
    for name, row in result["sources"].items():
        assert row["step"] in result["appetite"]
        assert row["over_appetite"]["median"] > 1, f"{name}: an epoch would wait for the loader"


def test_the_zoo_measures_one_of_every_family_first_then_by_size() -> None:
    networks = {"b9": ("b", 9), "a5": ("a", 5), "a3": ("a", 3), "a1": ("a", 1), "b7": ("b", 7)}
    assert list(load("zoo").in_order(networks)) == ["a1", "b7", "a3", "a5", "b9"]


def test_a_zoo_result_is_one_line_a_network_and_reads_back(tmp_path: Path) -> None:
    zoo = load("zoo")
    result = {"environment": {"seed": 0}, "not_run": ["c"], "networks": {"a": {"units": 3}, "b": {"units": 4}}}
    zoo.write(tmp_path / "zoo.json", result)
    assert zoo.read(tmp_path / "zoo.json") == result
    assert '  "a": {"units": 3},\n' in (tmp_path / "zoo.json").read_text()


def test_what_the_zoo_did_not_measure_is_said() -> None:
    tables = load("zoo_tables")
    result = {"networks": {"a": {"error": "w4a4: check: CheckError: no"}}, "not_run": ["b", "c"]}
    assert tables.absent(result) == "\n**a**: w4a4: check: CheckError: no\n\nNot run: b, c.\n"
    values = {"island_values_compared": 4000, "island_values_different": 10, "island_steps": 1.0}
    assert tables.moved({"w4a4": values, "w8a8": values}) == "20 of 8,000"
    assert tables.moved({"w4a4": values | {"island_steps": 3.0}}) == "10 of 4,000, up to 3 steps"
    assert tables.moved({"w4a4": values | {"island_values_compared": 0}}) == ""


def test_global_pools_of_torch_onnx_are_named_for_the_int8_baseline() -> None:
    from onnx import checker, helper, numpy_helper

    def mean(axes: list[int], keepdims: int) -> list[str]:
        node = helper.make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=keepdims)
        rank = 4 if keepdims else 2
        graph = helper.make_graph(
            [node],
            "graph",
            [helper.make_tensor_value_info("x", 1, [None, 3, 4, 4])],
            [helper.make_tensor_value_info("y", 1, [None] * rank)],
            [numpy_helper.from_array(np.array(axes), "axes")],
        )
        load("baselines").name_global_pools(graph)
        checker.check_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]), full_check=True)
        return [node.op_type for node in graph.node]

    assert mean([2, 3], 1) == mean([-1, -2], 1) == ["GlobalAveragePool"]
    assert mean([2, 3], 0) == mean([1, 2], 1) == ["ReduceMean"]


def test_fill_replaces_what_stands_between_markers_and_nothing_else() -> None:
    tables = load("tables")
    text = "before\n<!-- table:a -->\nold\n<!-- /table -->\nbetween\n<!-- table:b -->\n<!-- /table -->\nafter\n"
    filled = tables.fill(text, lambda name: f"new {name}\n")
    assert filled == (
        "before\n<!-- table:a -->\nnew a\n<!-- /table -->\nbetween\n<!-- table:b -->\nnew b\n<!-- /table -->\nafter\n"
    )


def test_fill_leaves_a_document_without_markers_alone() -> None:
    assert load("tables").fill("no table here\n", pytest.fail) == "no table here\n"


def test_fill_refuses_an_open_marker() -> None:
    text = "<!-- table:a -->\n\n<!-- table:b -->\n<!-- /table -->\n"
    with pytest.raises(ValueError, match="has no `<!-- /table -->`"):
        load("tables").fill(text, lambda name: "")


def test_unknown_table_is_named() -> None:
    with pytest.raises(ValueError, match="no table 'speed'; there are latency, export"):
        load("tables").write_table("speed")


def test_a_missed_target_is_said_even_if_rounding_would_hide_it() -> None:
    verdict = load("tables").verdict
    assert verdict("file", 6.3, 6.3, 2)[3] == "met"
    assert verdict("file", 6.3004, 6.3, 2)[2:] == ("6.30", "**missed**")


def test_a_method_that_loses_is_shown_to_lose() -> None:
    runs = {"lsq-w2a2": {"accuracy_torch": 0.75}, "mec-w2a2": {"accuracy_torch": 0.5}}
    assert load("tables").gains_of_mec({"runs": runs}) == {"w2a2": -0.25}


def test_ratios_are_taken_within_each_round() -> None:
    timing = load("timing")
    base = np.array([1.0, 10.0, 100.0, 1000.0, 10000.0])  # a machine that gets slower and slower
    assert timing.ratios(base * 0.5, base) == {"median": 0.5, "q1": 0.5, "q3": 0.5}
    assert timing.quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0}


def test_photographs_are_drawn_by_the_seed() -> None:
    networks = load("networks")
    first, again, other = (networks.photographs(3, seed) for seed in (0, 0, 1))
    assert first.shape == (3, 3, 224, 224) and first.numpy().std() > 30
    assert bool((first == again).all()) and not bool((first == other).all())


def arguments(out: Path, *more: str) -> argparse.Namespace:
    parsed: argparse.Namespace = load("cifar10").parse(["--data", "imagefolder:photos", "--out", str(out), *more])
    return parsed


def test_every_quantised_run_starts_from_one_checkpoint_with_one_budget(tmp_path: Path) -> None:
    cifar10 = load("cifar10")
    given = arguments(tmp_path, "--epochs", "2")
    plan = cifar10.plan(given)
    assert next(iter(plan)) == "fp32"
    configs = {name: cifar10.run_config(given, change) for name, change in plan.items() if name != "fp32"}
    assert {config.weights for config in configs.values()} == {str(tmp_path / "fp32" / "checkpoint-final.safetensors")}
    assert {config.schedule for config in configs.values()} == {configs["lsq-w4a4"].schedule}
    assert configs["lsq-w4a4"].schedule.fp_epochs == 0 and configs["lsq-w4a4"].schedule.epochs == 2
    assert configs["mec-w2a2"].quant.weight_bits == configs["mec-w2a2"].quant.act_bits == 2


def test_a_run_that_is_done_is_not_trained_again(tmp_path: Path) -> None:
    cifar10 = load("cifar10")
    given = arguments(tmp_path)
    config = cifar10.run_config(given, cifar10.plan(given)["lsq-w4a4"])
    record = {"accuracy_torch": 0.5, "config": cifar10.comparable(config)}
    (tmp_path / "benchmark.json").write_text(json.dumps(record))
    assert cifar10.execute(tmp_path, config, pytest.fail) == record
    other = cifar10.run_config(arguments(tmp_path, "--seed", "1"), cifar10.plan(given)["lsq-w4a4"])
    with pytest.raises(SystemExit, match="other settings"):
        cifar10.execute(tmp_path, other, pytest.fail)


def test_results_name_no_machine_and_no_path(tmp_path: Path) -> None:
    cifar10, environment = load("cifar10"), load("environment")
    described = environment.describe_environment(seed=3, threads=1)
    assert described["seed"] == 3 and described["versions"]["onnxruntime"]
    given = arguments(tmp_path)
    config = cifar10.comparable(cifar10.run_config(given, cifar10.plan(given)["mec-w2a2"]))
    written = json.dumps([described, config])
    assert str(tmp_path) not in written and "photos" not in written and str(ROOT) not in written
    import platform

    assert platform.node() not in written or len(platform.node()) < 4


def test_the_documents_and_the_command_show_the_same_measures() -> None:
    """Each names its columns for itself: the tables of documents are made without mecdeploy installed."""
    from mecdeploy.study.tables import TITLES

    assert list(load("study_tables").MEASURES) == list(TITLES)


def test_pairs_of_two_studies_are_pooled() -> None:
    """Differences 1..6: mean 3.5, deviation sqrt(3.5), half an interval 2.5706 * sqrt(3.5 / 6)."""
    studies = [
        {"runs": [{"method": m, "seed": s, "test": s / 100 if m == "a" else 0.0} for m in "ab" for s in seeds]}
        for seeds in ((1, 2, 3), (4, 5, 6))
    ]
    found = load("study_tables").pooled(studies, "a", "b")
    assert found["mean"] == pytest.approx(3.5)
    assert found["interval"] == pytest.approx([3.5 - 1.96335, 3.5 + 1.96335], abs=1e-4)
