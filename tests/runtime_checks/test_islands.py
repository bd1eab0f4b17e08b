"""Files with float islands: integer kernels stay exact behind them, islands are compared apart, damage is still named.

The reference computes the islands in float64, by their formulas: another order and width than onnxruntime's.
"""

import json

import numpy as np
import pytest
from island_reference import TokenReference
from qdq_models import images, replace, value_of
from qdq_units import token_network

from mecdeploy.runtime_checks import CheckError, Interpreter, check_model, inspect_structure, read_model
from mecdeploy.runtime_checks.runtime import Runtime

SHAPE = (3, 3, 4)
COUNT = 40
VALUES = ("normed/codes", "pooled/codes")


@pytest.fixture(scope="module")
def pixels():
    return images(3, COUNT, SHAPE)


def check(model, reference, pixels, **options):
    return check_model(model.SerializeToString(), pixels, np.zeros(len(pixels), np.int64), reference, **options)


def set_metadata(model, key, value):
    (prop,) = [prop for prop in model.metadata_props if prop.key == f"mecdeploy.{key}"]
    prop.value = json.dumps(value)


@pytest.mark.parametrize("tokens", [(3, 4), (1, 7), (5, 1)])
@pytest.mark.parametrize("head", ["gemm", "island"])
def test_an_undamaged_file_passes(head, tokens):
    for seed in range(3):
        model = token_network(seed, head=head, tokens=tokens)
        report = check(model, TokenReference(model), images(seed, 20, (3, *tokens)), batch_size=7)
        assert report.failures == ()
        assert (report.integers_different, report.float_convolutions, report.top1_agreement) == (0, 0, 1.0)
        assert not report.exact_end_to_end
        length = tokens[0] * tokens[1]
        assert [(row.name, row.compared) for island in report.islands for row in island.values] == [
            ("normed/codes", 20 * 8 * length),
            ("pooled/codes", 20 * 8),
        ]
        assert report.integers_compared == 20 * 8 * 3 * length  # patches, flat, sequence: islands are counted apart


def test_float_outputs_of_gemms_are_compared_bit_for_bit(pixels):
    """By all three sides, over rows = images * tokens, from the given integers."""
    model = token_network()
    row = next(row for row in check(model, TokenReference(model), pixels).units if row.name == "both")
    assert (row.real, row.compared, row.different, row.missing) == (True, COUNT * 12 * 16, 0, ())

    def nudge(results):
        results["both"] = np.nextafter(results["both"], np.float32(np.inf))

    report = check(model, TokenReference(model, nudge), pixels)
    assert report.first_different_unit == "both"
    assert f"{COUNT * 12 * 16} of {COUNT * 12 * 16} float values, by at most" in report.failures[0]
    assert "steps" not in report.failures[0]


def test_logits_of_an_island_are_compared_with_a_tolerance(pixels):
    model = token_network(head="island")
    report = check(model, TokenReference(model), pixels)
    largest = np.abs(TokenReference(model).logits(pixels)).max()
    assert report.logits.different > 0  # float64 and float32 do differ
    assert report.logits.missing == ()
    assert 0 < report.logits.max_difference < 1e-2 * report.logits.tolerance
    assert report.logits.tolerance == pytest.approx(1e-4 * largest, rel=1e-5)  # of two such maxima
    assert report.passed


def test_the_report_names_islands_and_what_they_run_in_float(pixels):
    model = token_network(head="island")
    report = check(model, TokenReference(model), pixels)
    assert report.float_islands == 3
    found = report.to_json()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    norm, gate, head = found["islands"]
    assert (norm["name"], norm["operators"], norm["kernels"]) == ("norm", ["layer_norm"], {"LayerNormalization": 1})
    assert gate["kernels"] == {"Mul": 2, "ReduceMean": 1, "Softmax": 1}
    assert head["kernels"] == {"MatMul": 1}
    assert {island["reason"] for island in found["islands"]} == {"onnxruntime has no integer kernel for them"}
    assert found["float_operators"] == {"LayerNormalization": 1, "MatMul": 1, "Mul": 2, "ReduceMean": 1, "Softmax": 1}


# ---- resynchronisation ------------------------------------------------------------------------------------------


def moved(name, steps, share=None):
    """A reference whose own integers of a float value lie some steps off: once in each batch, or a share of them."""

    def change(results):
        codes = np.ascontiguousarray(results[name], np.int64)
        flat = codes.reshape(-1)
        chosen = slice(0, 1) if share is None else slice(0, int(share * flat.size))
        flat[chosen] += np.where(flat[chosen] > 7, -steps, steps)
        results[name] = codes.astype(np.uint8)

    return change


@pytest.mark.parametrize("name", VALUES)
def test_a_step_at_a_tie_is_reported_and_no_failure(name, pixels):
    """Everything behind it still agrees: later units read onnxruntime's integers."""
    model = token_network()
    report = check(model, TokenReference(model, moved(name, 1)), pixels, batch_size=COUNT)
    assert report.passed
    (row,) = [row for island in report.islands for row in island.values if row.name == name]
    assert (row.different, row.max_difference) == (3, 1)  # once in each batch of 16
    assert (report.integers_different, report.logits.different) == (0, 0)


@pytest.mark.parametrize("name", VALUES)
def test_two_steps_are_a_failure(name, pixels):
    model = token_network()
    report = check(model, TokenReference(model, moved(name, 2)), pixels)
    assert (report.passed, report.first_different_unit) == (False, name)
    (failure,) = report.failures
    island = {"normed/codes": "norm", "pooled/codes": "gate"}[name]
    assert failure.startswith(f"{name}: 3 of ")
    assert f"the float island {island} differ, by at most 2 steps; float rounding explains 1 step" in failure


def test_many_single_steps_are_a_failure(pixels):
    model = token_network()
    assert check(model, TokenReference(model, moved("normed/codes", 1, 0.008)), pixels).passed
    report = check(model, TokenReference(model, moved("normed/codes", 1, 0.012)), pixels)
    assert report.first_different_unit == "normed/codes"
    assert "by at most 1 steps; float rounding explains 1 step in up to 1% of them" in report.failures[0]


def test_a_reference_without_the_value_does_not_pass(pixels):
    model = token_network()
    report = check(model, TokenReference(model, lambda results: results.pop("pooled/codes")), pixels)
    assert report.failures == (
        "pooled/codes: PyTorch has no integers quantised from the float island gate, or in another shape. "
        "Export the run again, from the checkpoint that is checked.",
    )


def test_whole_passes_may_differ(pixels):
    """Each side's own rounding, all the way: reported as agreement of the top class, and no failure."""

    class Elsewhere(TokenReference):
        def logits(self, pixels):
            return super().logits(pixels) + np.float32(1e-3)

    model = token_network()
    report = check(model, Elsewhere(model), pixels)
    assert report.passed
    assert 0.9e-3 < report.max_logit_difference < 1.1e-3
    assert report.top1_agreement == 1.0


# ---- damage -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, change, first",
    [
        ("patches/weight", lambda value: value ^ 1, "patches"),
        ("norm/gain", lambda value: value * 1.1, "normed/codes"),
        ("norm/shift", lambda value: value + 0.1, "normed/codes"),
        ("normed/codes/scale", lambda value: value * 1.02, "normed/codes"),
        ("normed/codes/zero_point", lambda value: value + 1, "normed/codes"),
        ("both/weight", lambda value: value ^ 1, "both"),
        ("both/bias", lambda value: value + 40, "both"),
        ("gate/sharpness", lambda value: value * 1.5, "pooled/codes"),
        ("pooled/codes/scale", lambda value: value * 1.02, "logits"),
        ("pooled/codes/zero_point", lambda value: value + 1, "logits"),
        ("pooled/codes/qmax", lambda value: value - 8, "pooled/codes"),
        ("classifier/weight", lambda value: value ^ 1, "logits"),
        ("classifier/bias", lambda value: value + 1, "logits"),
    ],
)
def test_damage_is_named(name, change, first, pixels):
    model, damaged = token_network(), token_network()
    replace(damaged, name, change(value_of(damaged, name)))
    report = check(damaged, TokenReference(model), pixels)
    assert (report.passed, report.first_different_unit) == (False, first)
    assert report.failures[0].startswith(first)
    if name == "pooled/codes/zero_point":  # what reads the integers says it first, what writes them too
        assert any(failure.startswith("pooled/codes: ") for failure in report.failures)


def test_damage_to_a_head_in_float_is_named(pixels):
    model, damaged = token_network(head="island"), token_network(head="island")
    matrix = value_of(damaged, "head/matrix")
    matrix[3, 2] *= np.float32(1.1)
    replace(damaged, "head/matrix", matrix)
    report = check(damaged, TokenReference(model), pixels)
    assert report.first_different_unit == "logits"
    assert "A float island makes them, whose rounding explains" in report.failures[0]


def test_a_product_of_ours_that_runs_in_float_is_a_failure():
    """onnxruntime fuses no Conv whose bias is at another scale; a product inside an island is none of ours."""
    model = token_network(head="island")
    assert inspect_structure(model.SerializeToString()).float_products == ()
    replace(model, "patches/bias/scale", value_of(model, "patches/bias/scale") * 0.5)
    report = inspect_structure(model.SerializeToString())
    assert report.float_products == ("patches",)
    assert report.failures[0].startswith(
        "onnxruntime runs 1 of 2 convolutions and Gemms in integers; in float: patches."
    )


# ---- what the interpreter is given, and refuses -----------------------------------------------------------------


def test_the_interpreter_goes_on_from_what_it_is_given(pixels):
    """Any codes: behind them it computes what onnxruntime computes for a network that starts there."""
    model = token_network()
    file = read_model(model.SerializeToString())
    ran = Runtime(file, exposed=[*file.units]).run(pixels)
    interpreter = Interpreter(file)
    given = {name: ran[name] for name in file.float_values}
    read = interpreter.run(pixels, given=given)
    for name in (*file.units, "logits"):
        assert np.array_equal(read[name], ran[name]) and read[name].dtype == ran[name].dtype, name
    other = interpreter.run(pixels, given={**given, "pooled/codes": 15 - given["pooled/codes"]})
    assert np.array_equal(other["both"], ran["both"]) and not np.array_equal(other["logits"], ran["logits"])


def test_values_that_are_not_given_are_named(pixels):
    file = read_model(token_network().SerializeToString())
    ran = Runtime(file, exposed=file.float_values).run(pixels)
    interpreter = Interpreter(file)
    with pytest.raises(CheckError, match="^normed/codes: it is quantised from what a float island computes, so its"):
        interpreter.run(pixels)
    ran["pooled/codes"] = ran["pooled/codes"].astype(np.int32)
    with pytest.raises(CheckError, match="^pooled/codes: given as int32; stored codes are uint8"):
        interpreter.run(pixels, given=ran)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("float_values", ["normed/codes"], "'pooled/codes/unclipped' .*it quantises what a float island computes"),
        ("float_values", ["pooled/codes"], "'normed/codes' .*it quantises what a float island computes"),
        (
            "float_values",
            [*VALUES, "patches"],
            "'patches' .*it is quantised from a float island, which it is not",
        ),
        ("float_values", [*VALUES, "flat"], "'flat' .*it is quantised from a float island, which it is not"),
        ("float_values", [*VALUES, "ghost"], "^ghost: the metadata says .* but no node writes it"),
        ("islands", {}, "metadata says that it is quantised from a float island|no arithmetic for it"),
    ],
)
def test_metadata_cannot_excuse_a_unit(key, value, message):
    model = token_network()
    set_metadata(model, key, value)
    with pytest.raises(CheckError, match=message):
        Interpreter(read_model(model.SerializeToString()))


def test_a_relu_between_a_gemm_and_its_island_is_refused():
    model = token_network()
    (node,) = [node for node in model.graph.node if node.name == "both"]
    node.op_type = "Relu"
    del node.input[1]
    with pytest.raises(CheckError, match="'both/float' \\(Gemm\\): its float output is read by Relu"):
        Interpreter(read_model(model.SerializeToString()))
