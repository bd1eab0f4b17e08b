"""`mecdeploy export --layout triton`: versions that are added, never replaced, and seen whole or not at all.

test_triton_config.py holds config.pbtxt to Triton's own schema.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
from pathlib import Path

import pytest
from calling import Call, largest_file

import mecdeploy
from mecdeploy import triton_layout


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_a_repository_with_two_versions(call: Call, run: Path, model: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    outcome = call("export", run, "--layout", "triton", "--out", repository, "--name", "digits")
    assert outcome.code == 0, outcome.err
    first = repository / "digits" / "1" / "model.onnx"
    assert f"mecdeploy check {run} {first}" in outcome.out and f"--model-repository={repository}" in outcome.out
    assert first.read_bytes() == model.read_bytes()
    assert (repository / "digits" / "labels.txt").read_text() == "".join(f"{digit}\n" for digit in range(10))
    config = repository / "digits" / "config.pbtxt"
    config.write_text(config.read_text().replace("count: 1", "count: 2"))
    assert call("export", run, "--layout", "triton", "--out", repository, "--name", "digits", "--bits", 8).code == 0
    second = repository / "digits" / "2" / "model.onnx"
    assert first.read_bytes() == model.read_bytes() != second.read_bytes()
    assert "count: 2" in config.read_text(), "the user's settings are gone"
    assert tree(repository) == {
        *("digits", "digits/config.pbtxt", "digits/labels.txt"),
        *("digits/1", "digits/1/model.onnx", "digits/2", "digits/2/model.onnx"),
    }


def test_the_default_places(run: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").symlink_to(run)
    try:
        report = mecdeploy.export(tmp_path / "photos", layout="triton")
        assert report.path == tmp_path / "photos" / "triton" / run.name / "1" / "model.onnx"
    finally:
        shutil.rmtree(run / "triton")


def test_numbers_go_on_after_the_highest(model: Path, tmp_path: Path) -> None:
    for name in ("3", "12", "old", "x14"):
        (tmp_path / "digits" / name).mkdir(parents=True)
        (tmp_path / "digits" / name / "model.onnx").write_bytes(model.read_bytes())
    path = triton_layout.add_version(tmp_path, "digits", model.read_bytes())
    assert path == tmp_path / "digits" / "13" / "model.onnx"


def test_another_user_can_read_the_files(model: Path, tmp_path: Path) -> None:
    path = triton_layout.add_version(tmp_path, "digits", model.read_bytes())
    mask = os.umask(0)
    os.umask(mask)
    assert path.parent.stat().st_mode & 0o777 == 0o777 & ~mask
    for file in (path, tmp_path / "digits" / "config.pbtxt", tmp_path / "digits" / "labels.txt"):
        assert file.stat().st_mode & 0o777 == 0o666 & ~mask


def test_who_polls_never_sees_half_a_version(model: Path, tmp_path: Path) -> None:
    content = model.read_bytes()
    broken, seen, done = list[str](), set[str](), threading.Event()

    def poll() -> None:
        """As Triton does: every folder whose name begins with a number is a version."""
        while not done.is_set():
            folder = tmp_path / "digits"
            for version in os.listdir(folder) if folder.is_dir() else ():
                if version[:1].isdigit():
                    seen.add(version)
                    whole = (folder / version / "model.onnx").read_bytes() == content
                    shared = (folder / "labels.txt").is_file() and (folder / "config.pbtxt").read_text().endswith("}\n")
                    if not (whole and shared):
                        broken.append(version)

    poller = threading.Thread(target=poll)
    poller.start()
    try:
        for _ in range(20):
            triton_layout.add_version(tmp_path, "digits", content)
    finally:
        done.set()
        poller.join()
    assert broken == []
    assert seen <= {str(version) for version in range(1, 21)} and seen


def test_a_killed_export_is_tidied_up(model: Path, tmp_path: Path) -> None:
    left = tmp_path / "digits" / ".unfinished"
    left.mkdir(parents=True)
    (left / "model.onnx").write_bytes(b"half")
    triton_layout.add_version(tmp_path, "digits", model.read_bytes())
    assert sorted(os.listdir(tmp_path / "digits")) == ["1", "config.pbtxt", "labels.txt"]


def test_one_process_at_a_time(model: Path, tmp_path: Path) -> None:
    (tmp_path / "digits").mkdir()
    handle = os.open(tmp_path / "digits", os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(mecdeploy.errors.UserError, match="another mecdeploy process"):
            triton_layout.add_version(tmp_path, "digits", model.read_bytes())
    finally:
        os.close(handle)


def test_a_version_that_is_called_otherwise(call: Call, run: Path, tmp_path: Path) -> None:
    where = ("--layout", "triton", "--out", tmp_path, "--name", "digits")
    assert call("export", run, *where).code == 0
    error = call("export", run, *where, "--input", "float").error
    assert "digits: version 1 maps uint8 [1, 8, 8] to 10 classes (0, 1, 2, 3, ...); the new one float32" in error
    assert "choose another --name" in error
    (tmp_path / "digits" / "1" / "model.onnx").write_bytes(b"cut off")
    assert "cannot be compared with the new version" in call("export", run, *where).error
    (tmp_path / "digits" / "1" / "model.onnx").unlink()
    assert "No such file or directory" in call("export", run, *where).error
    assert sorted(os.listdir(tmp_path / "digits")) == ["1", "config.pbtxt", "labels.txt"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--layout", "tritn"], "export.layout is 'tritn'; choose one of file, triton."),
        (["--name", "digits"], "add --layout triton"),
        (["--layout", "triton", "--name", "../digits"], "cannot be called '../digits'"),
        (["--layout", "triton", "--name", ".digits"], "cannot be called '.digits'"),
        (["--layout", "triton", "--name", ""], "cannot be called ''"),
        (["--layout", "triton", "--out", "file"], "file: Not a directory"),
        (["--layout", "triton", "--out", "missing/repository"], "missing/repository: No such file or directory."),
        (["--layout", "triton", "--out", "/proc/repository"], "/proc/repository"),
    ],
)
def test_refusals_leave_nothing(
    call: Call, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    before = tree(run)
    assert words in call("export", run, *arguments).error
    assert tree(tmp_path) == {"file"} and tree(run) == before


def test_a_disk_that_is_full(call: Call, run: Path, model: Path, tmp_path: Path) -> None:
    where = ("--layout", "triton", "--out", tmp_path / "repository", "--name", "digits")
    with largest_file(10_000):
        assert call("export", run, *where).code == 2
    assert tree(tmp_path) == set()
    assert call("export", run, *where).code == 0
    before = tree(tmp_path)
    with largest_file(10_000):
        assert call("export", run, *where).code == 2
    assert tree(tmp_path) == before


def test_a_network_of_ones_own_needs_a_name(tmp_path: Path) -> None:
    network = object()
    with pytest.raises(mecdeploy.errors.UserError, match="give name=, the model's name"):
        mecdeploy.export(network, out=tmp_path, layout="triton")  # type: ignore[arg-type]
    assert tree(tmp_path) == set()
