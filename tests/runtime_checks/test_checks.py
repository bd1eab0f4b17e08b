"""The report: what it counts, what it says, and that a side that is wrong or absent cannot pass."""

import dataclasses
import json
import re
from dataclasses import replace as changed

import numpy as np
import pytest
from qdq_models import images, replace, residual_network
from references import Altered, Undamaged

from mecdeploy.runtime_checks import CheckError, check_model, inspect_structure, read_model
from mecdeploy.runtime_checks.checks import images_at_once
from mecdeploy.runtime_checks.exactness import compare_exactly
from mecdeploy.runtime_checks.sentences import explain_exactness
from mecdeploy.runtime_checks.tally import Tally, differences


@pytest.fixture(scope="module")
def model():
    return residual_network()


def check(model, reference, count=20, **options):
    pixels = images(1, count)
    labels = reference.logits(pixels).argmax(axis=1) if isinstance(reference, Undamaged) else np.zeros(count, np.int64)
    return check_model(model.SerializeToString(), pixels, labels, reference, **options)


def altered(model, change):
    return check(model, Altered(model, change))


def test_a_good_file(model):
    report = check(model, Undamaged(model), 50, exact_images=20, extra_versions={"torch": "9.9"})
    units = read_model(model.SerializeToString()).units
    per_image = Undamaged(model).integers(images(1, 1))
    assert report.passed
    assert [row.name for row in report.units] == list(units)
    assert report.integers_compared == 20 * sum(values.size for name, values in per_image.items() if name != "logits")
    assert report.logits_compared == 20 * 7
    assert (report.images, report.exact_images) == (50, 20)
    assert (report.accuracy_torch, report.accuracy_onnxruntime, report.top1_agreement) == (1.0, 1.0, 1.0)
    assert report.max_logit_difference == 0
    assert report.packed_bits == inspect_structure(model.SerializeToString()).packed_bits
    assert report.versions["torch"] == "9.9" and {"onnxruntime", "onnx", "numpy", "python"} < set(report.versions)


def test_images_without_labels_have_no_accuracies_and_all_else(model):
    reference = Undamaged(model)
    report = check_model(model.SerializeToString(), images(1, 5), None, reference)
    labelled = check(model, reference, 5)
    assert report == dataclasses.replace(labelled, accuracy_torch=None, accuracy_onnxruntime=None)
    assert report.passed and report.top1_agreement == 1.0


def test_the_report_is_plain_json(model):
    found = check(model, Undamaged(model)).to_json()
    promised = {
        "integers_compared", "integers_different", "top1_agreement", "accuracy_torch", "accuracy_onnxruntime",
        "max_logit_difference", "float_convolutions", "packed_bits", "passed", "versions", "cpu", "failures",
        "first_different_unit", "optimizer_off", "units",
    }  # fmt: skip
    assert promised <= set(found)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_optimizer_off_is_measured_and_no_failure():
    """With scales in simple ratios float sums hit ties, where the float kernels of the bare graph round elsewhere."""
    different = 0
    for seed in (0, 1):
        model = residual_network(seed, dyadic=seed == 1, act_bits=8)
        report = check(model, Undamaged(model), 16)
        assert report.passed
        assert report.optimizer_off.integers_compared == report.integers_compared
        different += report.optimizer_off.integers_different
        assert report.optimizer_off.max_difference <= 255
    assert different > 0


def test_images_are_spread_over_the_set(model):
    seen = []

    class Watching(Undamaged):
        def integers(self, pixels):
            seen.append(pixels)
            return super().integers(pixels)

        def logits(self, pixels):
            return Undamaged.integers(self, pixels)["logits"]

    pixels = images(1, 30)
    check_model(
        model.SerializeToString(), pixels, np.zeros(30, np.int64), Watching(model), exact_images=4, batch_size=3
    )
    assert np.array_equal(np.concatenate(seen), pixels[[0, 10, 19, 29]])
    assert [len(batch) for batch in seen] == [3, 1]


@pytest.mark.parametrize("side, count", [(8, 64), (32, 64), (112, 16), (224, 4), (299, 2), (600, 2)])
def test_large_images_are_taken_in_small_batches(side, count):
    assert images_at_once(side, side) == count


def test_batches_are_chosen_where_none_are_asked_for(model):
    calls = []
    check(model, Undamaged(model), 70, exact_images=20, progress=lambda *call: calls.append(call))
    assert calls[2:] == [("exactness", 16, 20), ("exactness", 20, 20), ("accuracy", 64, 70), ("accuracy", 70, 70)]


def test_progress_counts_every_stage(model):
    calls = []
    check(model, Undamaged(model), 40, batch_size=15, progress=lambda *call: calls.append(call))
    assert calls == [
        ("structure", 0, 1),
        ("structure", 1, 1),
        ("exactness", 15, 40),
        ("exactness", 30, 40),
        ("exactness", 40, 40),
        ("accuracy", 15, 40),
        ("accuracy", 30, 40),
        ("accuracy", 40, 40),
    ]


def test_a_reference_that_is_one_step_off_once(model):
    def change(values):
        values["block.add/act"] = values["block.add/act"].copy()
        values["block.add/act"].reshape(-1)[7] ^= 1
        return values

    report = altered(model, change)
    assert (report.integers_different, report.first_different_unit) == (2, "block.add/act")  # once in each batch
    assert "2 of 34320 integers, by at most 1 steps. onnxruntime and the interpreter agree" in report.failures[0]


def test_a_unit_the_reference_lacks(model):
    def change(values):
        del values["depthwise"]
        return values

    report = altered(model, change)
    assert not report.passed
    assert report.failures[0].startswith("depthwise is the first unit that differs: PyTorch has no such tensor")


def test_a_unit_the_file_lacks(model):
    report = altered(model, lambda values: {**values, "layer9": np.zeros((1, 3), np.uint8)})
    assert (
        "layer9 is the first unit that differs: onnxruntime, the interpreter has no such tensor" in report.failures[0]
    )


def test_a_unit_of_another_shape(model):
    report = altered(model, lambda values: {**values, "mean": values["mean"][:, :, 0, 0]})
    assert report.first_different_unit == "mean"
    assert "mean is the first unit that differs: PyTorch has no such tensor, or in another shape" in report.failures[0]


def test_logits_are_compared_bit_for_bit(model):
    def change(values):
        values["logits"] = np.nextafter(values["logits"], np.float32(np.inf))
        return values

    report = altered(model, change)
    assert report.integers_different == 0
    assert (report.first_different_unit, report.logits_different) == ("logits", 20 * 7)
    assert 0 < report.max_logit_difference < 1e-6
    assert "140 of 140 logits" in report.failures[0]
    assert report.failures[-1].startswith("140 logits over 20 images differ between PyTorch and onnxruntime")


def test_logits_that_are_not_numbers_do_not_pass(model):
    report = altered(
        model, lambda values: {**values, "logits": np.full((len(values["logits"]), 7), np.nan, np.float32)}
    )
    assert not report.passed
    assert report.to_json()["max_logit_difference"] is None


def test_an_image_beyond_the_exact_ones_still_counts(model):
    """Only the last image's logits are off: the integers agree, the check fails all the same."""

    class Wrong(Undamaged):
        def logits(self, pixels):
            logits = super().logits(pixels).copy()
            logits[(pixels == last).all(axis=(1, 2, 3))] += 1
            return logits

    pixels = images(1, 20)
    last = pixels[18]
    report = check_model(
        model.SerializeToString(), pixels, np.zeros(20, np.int64), Wrong(model), exact_images=2, batch_size=7
    )
    assert report.first_different_unit is None
    assert len(report.failures) == 1
    assert re.match(r"7 logits over 20 images .* by at most 1.*, first at image 18;", report.failures[0])


def test_a_network_with_other_classes(model):
    class Other(Undamaged):
        def logits(self, pixels):
            return super().logits(pixels)[:, :5]

    with pytest.raises(CheckError, match=r"logits are \[7\], the trained network's \[5\]. Export the run"):
        check_model(model.SerializeToString(), images(1, 4), np.zeros(4, np.int64), Other(model))


def test_a_model_that_onnxruntime_loads_but_cannot_run(model, capfd):
    """Its average pool takes no scale ratio of 256 or more. Nothing is printed: the error is the message."""
    damaged = residual_network()
    replace(damaged, "mean/scale", np.array(1e-9))
    with pytest.raises(CheckError, match="onnxruntime could not run it .*out of computation range.*Export it again"):
        check(damaged, Undamaged(model))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("options", [{"exact_images": 0}, {"batch_size": 0}])
def test_options_out_of_range(model, options):
    with pytest.raises(CheckError, match="both must be at least 1"):
        check(model, Undamaged(model), **options)


# ---- the pieces -----------------------------------------------------------------------------------------------------


def test_tally_tells_who_disagrees():
    a, b, c = (np.array([[1, 2, 3, 250]], np.uint8) for _ in range(3))
    b[0, 1], c[0, 3] = 7, 0
    tally = Tally("unit")
    tally.add({"PyTorch": a, "onnxruntime": b, "the interpreter": c})
    tally.add({"PyTorch": a, "onnxruntime": a, "the interpreter": a})
    row = tally.parity()
    assert (row.compared, row.different, row.max_difference) == (8, 2, 250)
    assert (row.torch_vs_onnxruntime, row.torch_vs_interpreter, row.onnxruntime_vs_interpreter) == (1, 1, 2)
    assert not row.agrees


def test_differences_do_not_wrap():
    count, largest, _ = differences(np.array([0], np.uint8), np.array([255], np.uint8))
    assert (count, largest) == (1, 255)


@pytest.mark.parametrize(
    "pairs, sentence",
    [
        ((1, 1, 0), "onnxruntime and the interpreter agree, so the file holds another weight"),
        ((1, 0, 1), "PyTorch and the interpreter agree, so onnxruntime runs it in float"),
        ((0, 1, 1), "PyTorch and onnxruntime agree, so the interpreter does not know this arithmetic"),
        ((1, 1, 1), "No two sides agree"),
    ],
)
def test_sentences_follow_the_pairs(model, pairs, sentence):
    file = read_model(model.SerializeToString())
    exact = compare_exactly(file, images(0, 2), Undamaged(model))
    assert explain_exactness(exact) == []
    row = changed(
        exact.units[3],
        different=1,
        torch_vs_onnxruntime=pairs[0],
        torch_vs_interpreter=pairs[1],
        onnxruntime_vs_interpreter=pairs[2],
    )
    units = (*exact.units[:3], row, *exact.units[4:])
    found = explain_exactness(changed(exact, units=units), float_products=(row.name,))
    assert (
        len(found) == 1 and found[0].startswith("block.conv2 is the first unit that differs") and sentence in found[0]
    )
    exposed = explain_exactness(changed(exact, exposed_logits_different=3))
    assert exposed[0].startswith("3 logits change when the units are made graph outputs")
