"""Starting from weights of elsewhere: which files are understood, and what the others are told."""

import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from tiny_run import build_tiny, tensors_in, tiny_config, tiny_dataset

from mecdeploy.training.errors import TrainingError
from mecdeploy.training.events import StageEvent
from mecdeploy.training.initial import load_initial_weights
from mecdeploy.training.loop import train

pytestmark = pytest.mark.usefixtures("tiny_models")


def fresh(seed=0):
    torch.manual_seed(seed)
    return build_tiny(None, num_classes=3, channels=1, height=8, width=8)


def trained_state():
    state = fresh(seed=1).state_dict()
    state["bn1.running_mean"] = torch.linspace(-1, 1, 8)
    return state


def assert_holds(model, state):
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


WRAPPERS = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state, "args": {"lr": 0.1}},
    "nested": lambda state: {"state_dict": {"model": state}},
    "parallel": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "wrapped parallel": lambda state: {"state_dict": {f"module.{name}": t for name, t in state.items()}},
    "lightning": lambda state: {"state_dict": {f"model.{name}": t for name, t in state.items()}, "epoch": 3},
    "compiled parallel": lambda state: {f"module._orig_mod.{name}": tensor for name, tensor in state.items()},
    "compiled": lambda state: {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_pickled_state_dicts(tmp_path, wrap):
    torch.save(wrap(trained_state()), tmp_path / "weights.pth")
    model = fresh()
    load_initial_weights(model, tmp_path / "weights.pth")
    assert_holds(model, trained_state())


@pytest.mark.parametrize("prefix", ["", "module."])
def test_safetensors_state_dicts(tmp_path, prefix):
    state = {f"{prefix}{name}": tensor for name, tensor in trained_state().items()}
    save_file(state, tmp_path / "weights.safetensors")
    model = fresh()
    load_initial_weights(model, tmp_path / "weights.safetensors")
    assert_holds(model, trained_state())


def test_old_state_dicts_without_batch_counts(tmp_path):
    state = {name: t for name, t in trained_state().items() if not name.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pt")
    model = fresh()
    load_initial_weights(model, tmp_path / "old.pt")
    assert_holds(model, trained_state())


@pytest.mark.parametrize("name", ["checkpoint-fp32-0002.safetensors", "checkpoint-final.safetensors"])
def test_a_run_from_a_checkpoint_of_ours(tmp_path, name):
    first = train(tiny_config(), tiny_dataset(), tmp_path / "first")
    config = tiny_config(fp_epochs=0, weights=str(tmp_path / "first" / name))
    events = []
    second = train(config, tiny_dataset(), tmp_path / "second", report=events.append)
    assert [e.stage for e in events if isinstance(e, StageEvent)] == ["calibrate", "qat", "deploy"]
    assert second.accuracy_fp32 == first.accuracy_fp32
    a, b = (tensors_in(tmp_path / run / "checkpoint-final.safetensors") for run in ("first", "second"))
    # The same full-precision weights, the same seed: QAT comes to the same bits.
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_full_precision_epochs_on_top_of_weights(tmp_path):
    train(tiny_config(method="fp32"), tiny_dataset(), tmp_path / "first")
    weights = str(tmp_path / "first" / "checkpoint-final.safetensors")
    train(tiny_config(method="fp32", fp_epochs=1, weights=weights), tiny_dataset(), tmp_path / "more")
    train(tiny_config(method="fp32", fp_epochs=1), tiny_dataset(), tmp_path / "scratch")
    more, scratch = (tensors_in(tmp_path / run / "checkpoint-final.safetensors") for run in ("more", "scratch"))
    assert not torch.equal(more["float.conv2.weight"], scratch["float.conv2.weight"])


def test_prefixes_that_the_network_has_itself_stay(tmp_path):
    wrapped = torch.nn.Module()
    wrapped.model = fresh()
    torch.save({f"model.{name}": tensor for name, tensor in trained_state().items()}, tmp_path / "own.pth")
    assert load_initial_weights(wrapped, tmp_path / "own.pth") == []
    assert_holds(wrapped.model, trained_state())


def refused(path):
    model = fresh()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(TrainingError) as error:
        load_initial_weights(model, path)
    assert_holds(model, before)
    message = str(error.value)
    assert str(path) in message and "\n" not in message
    return message


def test_names_that_do_not_fit(tmp_path):
    state = trained_state()
    for name in ("conv1.weight", "conv2.weight", "fc.weight", "fc.bias"):
        state[f"backbone.{name}"] = state.pop(name)
    torch.save(state, tmp_path / "other.pth")
    message = refused(tmp_path / "other.pth")
    assert "missing conv1.weight, conv2.weight, fc.weight and 1 more" in message
    assert "unexpected backbone.conv1.weight, backbone.conv2.weight, backbone.fc.weight and 1 more" in message
    assert "Set model.name" in message


def test_a_shape_that_does_not_fit(tmp_path):
    state = trained_state() | {"conv2.weight": torch.zeros(8, 8, 5, 5)}
    torch.save(state, tmp_path / "wide.pth")
    assert "conv2.weight is [8, 8, 5, 5], the model needs [8, 8, 3, 3]" in refused(tmp_path / "wide.pth")


def test_a_classifier_of_other_features_does_not_fit(tmp_path):
    state = trained_state() | {"fc.weight": torch.zeros(1000, 9), "fc.bias": torch.zeros(1000)}
    torch.save(state, tmp_path / "wide.pth")
    assert "fc.weight is [1000, 9], the model needs [3, 8]" in refused(tmp_path / "wide.pth")


def test_a_classifier_of_other_classes_starts_afresh(tmp_path):
    state = trained_state() | {"fc.weight": torch.zeros(1000, 8), "fc.bias": torch.zeros(1000)}
    torch.save(state, tmp_path / "imagenet.pth")
    model, head = fresh(), fresh().fc
    notes = load_initial_weights(model, tmp_path / "imagenet.pth")
    assert notes == [f"{tmp_path / 'imagenet.pth'} classifies 1000 classes, the data has 3: fc starts afresh."]
    assert_holds(model, trained_state() | {"fc.weight": head.weight, "fc.bias": head.bias})


def test_only_the_classifier_may_have_other_classes(tmp_path):
    state = trained_state() | {"fc.weight": torch.zeros(9, 8), "fc.bias": torch.zeros(9)}
    del state["bn1.bias"]
    torch.save(state, tmp_path / "part.pth")
    assert "missing bn1.bias; nothing unexpected" in refused(tmp_path / "part.pth")


def test_a_classifier_that_is_absent_is_missing(tmp_path):
    state = trained_state() | {"conv1.weight": torch.randn(8, 3, 3, 3)}
    del state["fc.weight"], state["fc.bias"]
    torch.save(state, tmp_path / "features.pth")
    assert "missing fc.weight, fc.bias; nothing unexpected" in refused(tmp_path / "features.pth")


def test_colours_are_summed_for_grayscale_images(tmp_path):
    rgb = torch.randn(8, 3, 3, 3)
    torch.save(trained_state() | {"conv1.weight": rgb}, tmp_path / "rgb.pth")
    model = fresh()
    (note,) = load_initial_weights(model, tmp_path / "rgb.pth")
    assert note.endswith("reads RGB, the images are grayscale: conv1.weight is summed over the colours.")
    gray = torch.randn(2, 1, 8, 8)
    expected = torch.nn.functional.conv2d(gray.repeat(1, 3, 1, 1), rgb, stride=2, padding=1)
    # The same 27 products in another order: a few float32 roundings of sums below 32.
    assert torch.allclose(model.conv1(gray), expected, atol=1e-5)


def test_weights_that_are_not_finite(tmp_path):
    state = trained_state() | {"fc.bias": torch.tensor([0.0, float("nan"), 0.0])}
    torch.save(state, tmp_path / "broken.pth")
    assert "fc.bias holds NaN or infinity" in refused(tmp_path / "broken.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 1, 50, 0.5, -1])
def test_truncated_files(tmp_path, suffix, keep):
    path = tmp_path / f"weights{suffix}"
    (torch.save if suffix == ".pth" else save_file)(trained_state(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    assert "truncated or foreign" in refused(path) or "no PyTorch file" in refused(path)


@pytest.mark.parametrize("content", [b"hello, this is text", b"\x89PNG\r\n\x1a\n" + bytes(100), bytes(1000)])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_foreign_files(tmp_path, suffix, content):
    (tmp_path / f"picture{suffix}").write_bytes(content)
    refused(tmp_path / f"picture{suffix}")


class Payload:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


def test_a_pickle_that_would_run_code_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": trained_state(), "extra": Payload()}, tmp_path / "evil.pth")
    assert "holds more than tensors" in refused(tmp_path / "evil.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Payload()))
    refused(tmp_path / "plain.pth")
    assert not (tmp_path / "executed").exists()


def test_a_whole_pickled_model_is_refused_with_advice(tmp_path):
    torch.save(fresh(), tmp_path / "model.pth")
    assert "save model.state_dict()" in refused(tmp_path / "model.pth")


@pytest.mark.parametrize("value", [[1, 2], {}, {"epoch": 3}, torch.zeros(3)])
def test_pickles_without_named_tensors(tmp_path, value):
    torch.save(value, tmp_path / "odd.pth")
    assert "save model.state_dict()" in refused(tmp_path / "odd.pth")


def test_paths_that_lead_nowhere(tmp_path):
    assert "does not exist" in refused(tmp_path / "absent.pth")
    assert "name a file in it" in refused(tmp_path)
    (tmp_path / "weights.npz").write_bytes(b"PK")
    assert "a state dict ends in .safetensors, .pth" in refused(tmp_path / "weights.npz")


def test_a_damaged_checkpoint_of_ours(tmp_path):
    train(tiny_config(method="fp32", fp_epochs=1), tiny_dataset(), tmp_path / "run")
    path = tmp_path / "run" / "checkpoint-final.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "is damaged: its contents do not match its digest" in refused(path)


def test_a_run_with_bad_weights_writes_nothing(tmp_path):
    with pytest.raises(TrainingError, match="does not exist"):
        train(tiny_config(weights=str(tmp_path / "absent.pth")), tiny_dataset(), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
