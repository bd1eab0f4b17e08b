"""What a stage is watched for: a loss that is certain not to fall, and the size that went astray first."""

import math

import pytest
import torch
from test_loop_divergence import chain, quantized

from mecdeploy.training.watch import LossWatch, SizeWatch, watched_loss


def losses(classes, values, warm_up=0):
    watch = LossWatch(classes)
    for index, value in enumerate(values):
        watch.add(value, warming_up=index < warm_up)
    return watch.complaint()


def test_worse_than_guessing_and_than_the_beginning_is_certain():
    complaint = losses(10, [2.3] * 10 + [7.0] * 100)
    assert complaint == (
        "the mean task loss of the last 100 steps is 7, at the beginning it was 2.3; 4.61 is twice that of guessing"
    )


def test_without_labels_the_divergence_from_the_teacher_is_watched():
    assert watched_loss({"task": 1.0, "distill": 8.0, "mec": 3.0}, 2.0) == 1.0
    assert watched_loss({"distill": 8.0, "mec": 3.0}, 2.0) == 2.0  # the term is 2^2 of it
    assert watched_loss({"mec": 3.0}, 2.0) == 0.0
    watch = LossWatch(10, labelled=False)
    for value in [0.1] * 10 + [7.0] * 100:
        watch.add(value, warming_up=False)
    assert watch.complaint() == (
        "the mean divergence from the teacher of the last 100 steps is 7, at the beginning it was 0.1; 4.61 is twice "
        "that of guessing"
    )


@pytest.mark.parametrize(
    ("classes", "values"),
    [
        (10, [2.3] * 60 + [7.0] * 40),  # 100 steps, most of them good
        (10, [0.5] * 10 + [4.6] * 200),  # bad, but guessing badly would look like this
        (2, [0.7] * 10 + [4.6] * 200),  # of two classes, one confident mistake in ten costs as much
        (1000, [6.9] * 10 + [13.8] * 200),
        (10, [60.0 * 0.99**step for step in range(200)]),  # begins badly, and gets better
        (10, [8.0] * 10 + [7.99] * 500),  # slowly
        (10, [9.0] * 99),
    ],
)
def test_anything_else_is_not(classes, values):
    assert losses(classes, values) is None


def test_steps_of_the_warm_up_do_not_count():
    values = [8.0] * 10 + [8.1] * 109
    assert losses(10, values, warm_up=20) is None
    assert losses(10, values, warm_up=19) is not None


def test_equal_probabilities_cost_half_the_limit_whatever_the_smoothing():
    for classes in (10, 100):
        logits, labels = torch.zeros(4, classes), torch.arange(4)
        for smoothing in (0.0, 0.3, 0.9):
            guess = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)
            # float32 against float64
            assert LossWatch(classes).limit == pytest.approx(2 * float(guess), rel=1e-6)
    assert LossWatch(2).limit == LossWatch(10).limit == 2 * math.log(10)


def test_names_the_first_size_that_is_far_from_its_start_and_when():
    model, _ = quantized()
    watch = SizeWatch(model)
    for step in range(1, 61):
        with torch.no_grad():
            if step == 15:
                model.unit("conv2").weight_quantizer.step[3] *= 0.03125
            if step == 35:
                model.unit("pool").output.step *= 1024.0
        watch.look(1 + step // 31, step)
    assert watch.first(2, 60) == (
        "conv2's weight step size (channel 3) went first, 0.031 times its start at epoch 1, step 20"
    )


def test_what_goes_between_two_looks_is_seen_when_it_is_asked_for():
    model, _ = quantized()
    watch = SizeWatch(model)
    assert watch.first(1, 1) is None
    with torch.no_grad():
        model.unit("pool").output.step *= 32.0
    assert watch.first(1, 2) == "pool's output step size went first, 32 times its start at epoch 1, step 2"


def test_of_two_at_once_the_further_is_named_and_nan_is_furthest():
    for wild, said in ((64.0, "64"), (float("nan"), "nan")):
        model, _ = quantized()
        watch = SizeWatch(model)
        with torch.no_grad():
            model.unit("conv1").output.step *= 20.0
            model.unit("conv2").weight_quantizer.step[0] *= wild
        expected = f"conv2's weight step size (channel 0) went first, {said} times its start at epoch 3, step 7"
        assert watch.first(3, 7) == expected


def test_a_float_network_is_watched_by_its_weights_but_those_that_begin_at_zero():
    net = chain()
    with torch.no_grad():
        net[0].weight.zero_()
    watch = SizeWatch(net)
    with torch.no_grad():
        net[0].weight.fill_(1.0)
        assert watch.first(1, 1) is None
        net[2].weight *= 100.0
    assert watch.first(1, 2) == "2.weight went first, 1e+02 times its start at epoch 1, step 2"


def test_a_network_without_weights_has_nothing_to_watch():
    watch = SizeWatch(torch.nn.Flatten())
    watch.look(1, 10)
    assert watch.first(1, 10) is None


def test_a_negative_step_size_has_gone():
    model, _ = quantized()
    watch = SizeWatch(model)
    with torch.no_grad():
        model.unit("fc").weight_quantizer.step[2] *= -1.0
    assert watch.first(1, 1) == "fc's weight step size (channel 2) went first, -1 times its start at epoch 1, step 1"
