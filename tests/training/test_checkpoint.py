"""Checkpoint files: whole or absent, verified, readable by anyone's safetensors, and what load_run makes of them."""

import hashlib
import json
import os
import resource
import struct

import pytest
import torch
from safetensors.torch import save_file
from tiny_run import tensors_in, tiny_config

from mecdeploy.training.checkpoint import (
    Position,
    file_sha256,
    is_checkpoint,
    read_checkpoint,
    read_header,
    write_checkpoint,
)
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.run import load_run

pytestmark = pytest.mark.usefixtures("tiny_models")


@pytest.fixture(scope="module")
def finished(uninterrupted):
    return uninterrupted


def awkward_tensors():
    base = torch.arange(24, dtype=torch.float32)
    return {
        "float": base,
        "alias": base,
        "overlapping view": base[3:9],
        "transposed": base.view(4, 6).t(),
        "channels_last": base.view(1, 2, 3, 4).to(memory_format=torch.channels_last),
        "expanded": torch.ones(1).expand(5),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "count": torch.tensor(2**40 + 1),
        "half": torch.tensor([1.5, -0.0], dtype=torch.bfloat16),
        "flags": torch.tensor([True, False]),
        "trained": torch.nn.Parameter(torch.tensor([1.0])),
    }


def test_everything_comes_back(tmp_path):
    header = {"text": "grün", "nested": {"list": [1, 2.5, None, True]}, "third": 1 / 3}
    write_checkpoint(tmp_path / "c.safetensors", awkward_tensors(), header)
    back = read_checkpoint(tmp_path / "c.safetensors")
    assert back.header == {"format": 1, **header}
    assert back.tensors.keys() == awkward_tensors().keys()
    for name, tensor in awkward_tensors().items():
        assert back.tensors[name].dtype == tensor.dtype
        assert torch.equal(back.tensors[name], tensor), name
    assert list(tmp_path.iterdir()) == [tmp_path / "c.safetensors"]


def test_the_file_is_plain_safetensors_with_json_in_its_header(tmp_path):
    path = tmp_path / "c.safetensors"
    write_checkpoint(path, {"w": torch.tensor([1.0, 2.0])}, {"epoch": 3})
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    layout = json.loads(content[8 : 8 + length])
    assert json.loads(layout["__metadata__"]["mecdeploy.checkpoint"]) == {"format": 1, "epoch": 3}
    first, end = layout["w"]["data_offsets"]
    assert struct.unpack("<2f", content[8 + length :][first:end]) == (1.0, 2.0)


def test_the_header_is_read_alone(tmp_path):
    write_checkpoint(tmp_path / "c.safetensors", {"w": torch.ones(3)}, {"epoch": 3})
    assert read_header(tmp_path / "c.safetensors")["epoch"] == 3


def test_every_damaged_byte_of_the_tensors_and_many_of_the_header_are_noticed(tmp_path):
    path = tmp_path / "c.safetensors"
    write_checkpoint(path, {"a": torch.arange(5.0), "b": torch.ones(2, dtype=torch.int64)}, {"epoch": 3})
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    data = range(8 + length, len(content))
    epoch = content.index(b'epoch\\": 3') + len(b'epoch\\": ')
    for position in [*data, 0, 7, 8, epoch, 8 + length // 2]:
        damaged = bytearray(content)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(TrainingError, match=str(path)):
            read_checkpoint(path)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_a_truncated_file_is_refused_by_name(tmp_path, keep):
    path = tmp_path / "c.safetensors"
    write_checkpoint(path, {"a": torch.arange(50.0)}, {"epoch": 3})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(TrainingError, match=rf"{path} is no readable safetensors file .*truncated or foreign"):
        read_checkpoint(path)


def test_foreign_files_are_refused_by_name(tmp_path):
    (tmp_path / "text.safetensors").write_text("hello there, this is no checkpoint")
    with pytest.raises(TrainingError, match=r"text\.safetensors is no readable safetensors file"):
        read_checkpoint(tmp_path / "text.safetensors")
    save_file({"w": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(TrainingError, match=r"other\.safetensors holds tensors, but is not a mecdeploy checkpoint"):
        read_checkpoint(tmp_path / "other.safetensors")
    assert not is_checkpoint(tmp_path / "other.safetensors")
    with pytest.raises(TrainingError, match=r"absent\.safetensors is not a file"):
        read_checkpoint(tmp_path / "absent.safetensors")
    newer = {"mecdeploy.checkpoint": json.dumps({"format": 99})}
    save_file({"w": torch.ones(2)}, tmp_path / "newer.safetensors", metadata=newer)
    with pytest.raises(TrainingError, match="has checkpoint format 99; this version reads format 1"):
        read_header(tmp_path / "newer.safetensors")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_never_replaces_what_is(tmp_path, bad):
    path = tmp_path / "c.safetensors"
    write_checkpoint(path, {"w": torch.ones(3)}, {"epoch": 1})
    with pytest.raises(TrainingError, match=r"w is not finite; c\.safetensors was not written"):
        write_checkpoint(path, {"w": torch.tensor([1.0, bad])}, {"epoch": 2})
    assert read_checkpoint(path).header["epoch"] == 1


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "c.safetensors"
    write_checkpoint(path, {"w": torch.ones(3)}, {"epoch": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(OSError):
            write_checkpoint(path, {"w": torch.ones(10_000)}, {"epoch": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read_checkpoint(path).header["epoch"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_an_oserror(tmp_path):
    with pytest.raises(OSError):
        write_checkpoint(tmp_path / "gone" / "c.safetensors", {"w": torch.ones(3)}, {})


def test_the_bytes_are_on_disk_before_the_name_and_the_name_before_the_return(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor):
        target = os.readlink(f"/proc/self/fd/{descriptor}")
        calls.append("fsync folder" if target == str(tmp_path) else "fsync file")
        fsync(descriptor)

    def note_replace(source, target):
        calls.append("rename")
        assert os.path.dirname(source) == os.path.dirname(target)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    write_checkpoint(tmp_path / "c.safetensors", {"w": torch.ones(3)}, {})
    assert calls == ["fsync file", "rename", "fsync folder"]


def test_a_position_is_in_the_file_name_and_back():
    for position in (Position.of("fp32", 30, 0), Position.of("qat", 2, 17), Position.of("deploy", 0, 123456)):
        assert Position.from_file_name(position.file_name) == position
    assert Position.of("qat", 2, 0).file_name == "checkpoint-qat-0002.safetensors"
    assert Position.from_file_name("checkpoint-final.safetensors") is None
    assert Position.from_file_name("model.safetensors") is None
    ordered = [("fp32", 9, 9), ("fp32", 10, 0), ("qat", 0, 0), ("qat", 0, 1), ("deploy", 0, 0)]
    assert sorted(Position.of(*where) for where in ordered) == [Position.of(*where) for where in ordered]


def test_load_run_gives_back_the_whole_run(finished):
    run = load_run(finished)
    assert run.config == tiny_config()
    assert run.class_names == ("top", "middle", "bottom")
    assert (run.spec.channels, run.spec.height, run.spec.width) == (1, 8, 8)
    assert run.checkpoint == finished / "checkpoint-final.safetensors"
    assert run.sha256 == hashlib.sha256(run.checkpoint.read_bytes()).hexdigest() == file_sha256(run.checkpoint)
    assert not run.model.training and not run.float_model.training
    stored = tensors_in(run.checkpoint)
    for prefix, module in (("float", run.float_model), ("model", run.model)):
        state = module.state_dict()
        assert {name for name in stored if name.startswith(f"{prefix}.")} == {f"{prefix}.{name}" for name in state}
        assert all(torch.equal(stored[f"{prefix}.{name}"], tensor) for name, tensor in state.items())
    assert not any(name.startswith("momentum.") for name in stored)
    assert len(run.metrics["history"]) == 6
    assert run.metrics["accuracy_quantized"] == run.metrics["history"][-1]["validation_accuracy"]
    assert run.metrics["accuracy_fp32"] == run.metrics["history"][1]["validation_accuracy"]


def test_load_run_refuses_what_is_no_run(tmp_path):
    with pytest.raises(TrainingError, match=f"{tmp_path} holds no checkpoint; give the folder of a finished run"):
        load_run(tmp_path)
    with pytest.raises(TrainingError, match="absent holds no checkpoint"):
        load_run(tmp_path / "absent")


def test_load_run_refuses_a_truncated_checkpoint_by_name(tmp_path, finished):
    content = (finished / "checkpoint-final.safetensors").read_bytes()
    (tmp_path / "checkpoint-final.safetensors").write_bytes(content[:-1])
    with pytest.raises(TrainingError, match=r"checkpoint-final\.safetensors is no readable safetensors file"):
        load_run(tmp_path)


def test_load_run_refuses_a_config_of_another_version(tmp_path, finished):
    checkpoint = read_checkpoint(finished / "checkpoint-final.safetensors")
    header = {**checkpoint.header, "config": {**checkpoint.header["config"], "from_the_future": 1}}
    write_checkpoint(tmp_path / "checkpoint-final.safetensors", checkpoint.tensors, header)
    with pytest.raises(TrainingError, match="was written by another version: .*from_the_future"):
        load_run(tmp_path)


def test_load_run_refuses_tensors_that_do_not_fit(tmp_path, finished):
    checkpoint = read_checkpoint(finished / "checkpoint-final.safetensors")
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if name != "model.body.conv2.weight"}
    write_checkpoint(tmp_path / "checkpoint-final.safetensors", tensors, checkpoint.header)
    with pytest.raises(TrainingError, match="does not fit this version's resnet8"):
        load_run(tmp_path)


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_checkpoint_has_the_mode_that_the_umask_gives(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_checkpoint(tmp_path / "some.safetensors", {"a": torch.zeros(2)}, {})
    finally:
        os.umask(before)
    assert (tmp_path / "some.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask
