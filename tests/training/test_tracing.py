"""Tracing: one normal form that computes what the module computes, and errors that point into the user's code."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from traced_networks import SPEC, Classifier, classifier, conv, pooled

from mecdeploy.training.errors import TrainingError
from mecdeploy.training.tracing import Trace, line_of, operator_name, place_of, trace, where


def evaluate(found: Trace, image: Tensor) -> Tensor:
    """The traced nodes one by one, on values of our own: nothing may depend on what an earlier line wrote in place."""
    values: dict[fx.Node, Any] = {found.pixels: image}

    def value(node: fx.Node) -> Any:
        if node in found.constants:
            return found.constants[node]
        if node not in values:  # sizes
            arguments = fx.map_arg((node.args, node.kwargs), value)
            values[node] = node.target(*arguments[0], **arguments[1])  # type: ignore[operator, index]
        return values[node]

    for node in found.nodes:
        arguments, keywords = fx.map_arg((node.args, node.kwargs), lambda n: copied(value(n)))  # type: ignore[misc]
        values[node] = node.target(*arguments, **keywords)  # type: ignore[operator]
    result = values[found.output]
    assert isinstance(result, Tensor)
    return result


def copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def chains(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    z = m.second(y)
    z.relu_()
    z += y
    y.add_(z)
    return pooled(m, F.silu(z, inplace=True) * y + z)


def in_place_of_a_view_that_nobody_else_reads(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x).view(x.shape[0], 4, 64)
    y.mul_(2.0).sub_(0.5)
    return m.fc(y.mean(2))


def shapes(m: Any, x: Tensor) -> Tensor:
    n, c = x.shape[0], m.conv(x).shape[1]
    return m.fc(m.conv(x).reshape(n, c, -1).mean(-1) + torch.zeros(n, c))


def constants(m: Any, x: Tensor) -> Tensor:
    weight = m.conv.weight / m.conv.weight.square().sum((1, 2, 3), keepdim=True).sqrt()
    return pooled(m, F.conv2d(x, weight, padding=1) * torch.arange(4.0).view(4, 1, 1))


MODULES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "in-place chains": chains,
    "in place of a view": in_place_of_a_view_that_nobody_else_reads,
    "shapes": shapes,
    "constants": constants,
    "an output written in place": lambda m, x: pooled(m, m.conv(x)).relu_(),
}


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("kind", MODULES)
@torch.no_grad()
def test_the_normal_form_computes_what_the_module_computes(kind: str, images: int) -> None:
    """The same operators on the same values: the same bits."""
    torch.manual_seed(0)
    model = classifier(MODULES[kind], second=conv()).eval()
    found = trace(model, SPEC)
    image = torch.randn(images, 3, 8, 8)
    assert torch.equal(evaluate(found, image.clone()), model(image.clone()))
    for node in found.nodes:
        readers = [user for user in node.users if user in found.nodes]
        writers = [user for user in readers if operator_name(user).endswith("_") and user.args[0] is node]
        assert len(writers) <= 1 and (
            not writers or found.nodes.index(writers[0]) >= max(map(found.nodes.index, readers))
        )


def test_the_module_is_left_alone() -> None:
    model = classifier(lambda m, x: pooled(m, m.conv(x))).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trace(model, SPEC)
    assert model.training and not any(parameter.grad is not None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_constants_are_computed_once_and_those_of_parameters_stay_trainable() -> None:
    model = classifier(constants)
    found = trace(model, SPEC)
    (layer,) = [node for node in found.nodes if operator_name(node) == "conv2d"]
    weight = layer.args[1]
    assert isinstance(weight, fx.Node) and weight in found.trainable and weight not in found.names
    norms = torch.stack([row.norm() for row in found.constants[weight]])
    torch.testing.assert_close(norms, torch.ones(4), rtol=1e-6, atol=0)  # sums of 27 squares
    (scale,) = [node for node in found.constants if operator_name(node) == "view" and node not in found.nodes]
    assert scale not in found.trainable and found.constants[scale].flatten().tolist() == [0, 1, 2, 3]
    assert sorted(found.names.values()) == ["conv.weight", "fc.bias", "fc.weight"]


def test_buffers_are_no_parameters() -> None:
    norm = nn.BatchNorm2d(4)
    found = trace(classifier(lambda m, x: pooled(m, m.bn(m.conv(x))), bn=norm), SPEC)
    trainable = {found.names[node] for node in found.trainable if node in found.names}
    assert {"bn.weight", "bn.bias", "conv.weight"} <= trainable
    assert not trainable & {"bn.running_mean", "bn.running_var"}
    assert "bn.running_mean" in found.names.values()


def test_copies_and_dropouts_of_nothing_are_gone() -> None:
    model = classifier(lambda m, x: pooled(m, m.drop(m.conv(x).contiguous().clone())), drop=nn.Dropout(0.0))
    names = [operator_name(node) for node in trace(model, SPEC).nodes]
    assert names == ["conv2d", "adaptive_avg_pool2d", "flatten", "linear"]


def test_what_nobody_needs_is_gone() -> None:
    model = classifier(lambda m, x: (pooled(m, m.conv(x)), m.second(m.conv(x)))[0], second=conv())
    assert [operator_name(node) for node in trace(model, SPEC).nodes].count("conv2d") == 1


def test_places() -> None:
    block = Classifier(lambda m, x: torch.sigmoid(m.act(x)), act=nn.GELU())
    found = trace(classifier(lambda m, x: pooled(m, m.block(m.conv(x))), block=block), SPEC)
    gelu, sigmoid = (node for node in found.nodes if operator_name(node) in ("gelu", "sigmoid"))
    assert (where(gelu), where(sigmoid)) == ("block.act", "block")
    assert re.fullmatch(r"traced_networks\.py:\d+", line_of(sigmoid))
    assert re.fullmatch(r"block \(traced_networks\.py:\d+\)", place_of(sigmoid))


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # looked for by the test
            x = -x
        return x.mean((2, 3))


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(2, -1)[:, :4]


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError("no forward today")


class Two(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x.mean((2, 3)) * mask


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y[:, 0].mul_(2.0)
        return y.mean((2, 3))


def returns(result: Callable[[Tensor], Any]) -> nn.Module:
    return Classifier(lambda m, x: result(x))


LOGITS = r"the model must return its logits, \[N, classes\], first where it returns several; this is"

REFUSED: dict[str, tuple[nn.Module, str]] = {
    "a branch on values": (
        Branching(),
        r"Branching cannot be traced at .*test_tracing\.py:\d+ \(`if x\.sum\(\) > 0:.*`\): the line looks at values of "
        r"tensors, which are not known before it runs\. Rewrite it without a branch",
    ),
    "a fixed batch": (Fixed(), r"Fixed cannot be traced.*: its forward fixes the batch size\. Take it from the input"),
    "an error of its own": (
        Failing(),
        r"Failing cannot be traced at .*test_tracing\.py:\d+ "
        r"\(`raise NotImplementedError.*`\): NotImplementedError: no",
    ),
    "two inputs": (
        Two(),
        r"Two has 2 inputs \(x, mask\); a classifier takes one image tensor\. Give the others default values",
    ),
    "a shared tensor": (
        Shared(),
        r"mul_ \(test_tracing\.py:\d+\): mul_ writes in place into a tensor that another one shares; write out",
    ),
    "a shape": (returns(lambda x: x.size(0)), LOGITS + r" \[\]"),
    "the image": (returns(lambda x: x), LOGITS + r" \[N, 3, 8, 8\]"),
    "maps": (returns(lambda x: x[:, :1] * 2), LOGITS + r" \[N, 1, 8, 8\]"),
    "no batch": (returns(lambda x: x.mean((0, 2, 3))), LOGITS + r" \[3\]"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind: str) -> None:
    model, message = REFUSED[kind]
    with pytest.raises(TrainingError) as error:
        trace(model, SPEC)
    assert re.match(message, str(error.value)), str(error.value)
    assert "\n" not in str(error.value)
