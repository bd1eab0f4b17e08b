"""Nothing half-written, nothing overwritten, one writer."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mecdeploy.errors import UserError
from mecdeploy.run_folder import ALL, Metrics, create, reopen, require_run, write_atomically
from mecdeploy.training.config import TrainConfig

CONFIG = TrainConfig(seed=7)


def full_disk(handle: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_write_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="No space left") as error:
            write_atomically(path, b"new")
    assert error.value.filename == str(path), "the temporary name is nobody's business"
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_write_follows_the_umask(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", b"")
    finally:
        os.umask(previous)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_write_replaces_files_only(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(OSError, match=name):
            write_atomically(tmp_path / name, b"")
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe"]


def test_create_writes_the_config(tmp_path: Path) -> None:
    with create(tmp_path / "a" / "b", CONFIG) as folder:
        (folder.path / "checkpoint-fp32-0001.safetensors").touch()
    assert require_run(tmp_path / "a" / "b").read_config() == CONFIG


@pytest.mark.parametrize("existing", [True, False])
def test_a_run_without_checkpoint_leaves_nothing(tmp_path: Path, existing: bool) -> None:
    if existing:
        (tmp_path / "a").mkdir()
    with pytest.raises(RuntimeError), create(tmp_path / "a" / "b", CONFIG) as folder:
        folder.metrics.append({"stage": "fp32", "epoch": 1})
        raise RuntimeError
    assert os.listdir(tmp_path) == (["a"] if existing else [])
    assert not existing or os.listdir(tmp_path / "a") == []


def test_a_failed_run_keeps_its_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), create(tmp_path / "run", CONFIG) as folder:
        folder.metrics.append({"stage": "fp32", "epoch": 1})
        (folder.path / "checkpoint-fp32-0001.safetensors").touch()
        raise RuntimeError
    assert sorted(os.listdir(tmp_path / "run")) == ["checkpoint-fp32-0001.safetensors", "metrics.jsonl", "run.toml"]


def test_create_refuses_what_exists(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.toml").touch()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "note").touch()
    for name, words in {
        "file": "is a file",
        "run": "add --resume to continue it",
        "notes": "choose another --out",
    }.items():
        with pytest.raises(UserError, match=words), create(tmp_path / name, CONFIG):
            pytest.fail("opened")
    assert sorted(os.listdir(tmp_path)) == ["file", "notes", "run"]


def test_an_empty_folder_is_taken_and_stays(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(RuntimeError), create(tmp_path / "run", CONFIG):
        raise RuntimeError
    assert os.listdir(tmp_path / "run") == []


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with create(tmp_path / "run", CONFIG) as folder:
        (folder.path / "checkpoint-fp32-0001.safetensors").touch()
        with pytest.raises(UserError, match="is being written by another mecdeploy process"), reopen(folder.path):
            pytest.fail("opened")
    with reopen(tmp_path / "run"):
        pass


def test_reopen_needs_a_run(tmp_path: Path) -> None:
    for path, words in {tmp_path / "none": "does not exist", tmp_path: "has no run.toml"}.items():
        with pytest.raises(UserError, match=words), reopen(path):
            pytest.fail("opened")


def test_metrics_skip_a_line_cut_short(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    assert metrics.read() == []
    metrics.append({"stage": "fp32", "epoch": 1})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "fp3')
    assert metrics.read() == [{"stage": "fp32", "epoch": 1}]


def test_metrics_of_epochs_to_be_repeated_go(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    for stage, epochs in {"fp32": 2, "qat": 3, "deploy": 1}.items():
        for epoch in range(1, epochs + 1):
            metrics.append({"stage": stage, "epoch": epoch})
    metrics.trim({"fp32": ALL, "qat": 1})
    assert [(record["stage"], record["epoch"]) for record in metrics.read()] == [("fp32", 1), ("fp32", 2), ("qat", 1)]


def test_a_line_that_has_no_room_leaves_no_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    for epoch in (1, 2):
        metrics.append({"stage": "fp32", "epoch": epoch})
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr(os, "fsync", full_disk)
            metrics.append({"stage": "fp32", "epoch": 99})
    content = '{"stage": "fp32", "epoch": 1}\n{"stage": "fp32", "epoch": 2}\n'
    assert (tmp_path / "metrics.jsonl").read_text() == content


def test_metrics_that_are_right_are_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.trim({})
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
    metrics.append({"stage": "fp32", "epoch": 1})
    monkeypatch.setattr(os, "fsync", full_disk)
    metrics.trim({"fp32": ALL})
    metrics.replace([{"stage": "fp32", "epoch": 1}])
    with pytest.raises(OSError, match="No space left"):
        metrics.trim({})


@pytest.mark.parametrize("name", ["run.toml", "metrics.jsonl"])
def test_what_a_killed_process_left_is_in_nobodys_way(tmp_path: Path, name: str) -> None:
    (tmp_path / f".{name}.123.tmp").write_text("half")
    (tmp_path / ".mine.tmp").write_text("not ours")
    with pytest.raises(UserError, match="is not empty; choose another --out"), create(tmp_path, CONFIG):
        pytest.fail("opened")
    (tmp_path / ".mine.tmp").unlink()
    with create(tmp_path, CONFIG):
        (tmp_path / "checkpoint-fp32-0001.safetensors").touch()
    assert not (tmp_path / f".{name}.123.tmp").exists()
    (tmp_path / f".{name}.123.tmp").write_text("half")
    with reopen(tmp_path):
        assert not (tmp_path / f".{name}.123.tmp").exists()
