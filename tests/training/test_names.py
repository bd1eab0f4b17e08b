"""What the words of a config refer to."""

from __future__ import annotations

from pathlib import Path

import pytest

from mecdeploy.training.names import are_published, may_change, user_file


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("net.py:make", (Path("net.py"), "make")),
        ("/a b/c:d/net.py:Net2", (Path("/a b/c:d/net.py"), "Net2")),
        ("resnet8", None),
        ("net.py", None),
        ("net.py:", None),
        ("net.py:2make", None),
        ("net.py:a.b", None),
        ("package.net:make", None),
        (".py:make", None),
    ],
)
def test_a_users_file_has_a_suffix_and_a_name(model: str, expected: tuple[Path, str] | None) -> None:
    assert user_file(model) == expected


@pytest.mark.parametrize(
    ("weights", "published"),
    [
        ("DEFAULT", True),
        ("IMAGENET1K_V1", True),
        ("", False),
        ("a.pth", False),
        ("runs/a", False),
        ("./DEFAULT", False),
    ],
)
def test_published_weights_are_words(weights: str, published: bool) -> None:
    assert are_published(weights) is published


@pytest.mark.parametrize(
    ("key", "then", "now", "allowed"),
    [
        ("device", "cpu", "cuda", True),
        ("data.root", "a", "b", True),
        ("seed", 0, 1, False),
        ("weights", "old/a.pth", "new/a.pth", True),
        ("weights", "DEFAULT", "a.pth", False),
        ("weights", "", "a.pth", False),
        ("model.name", "old/net.py:make", "new/net.py:make", True),
        ("model.name", "net.py:make", "net.py:other", False),
        ("model.name", "resnet8", "net.py:make", False),
    ],
)
def test_what_may_change_between_sessions(key: str, then: object, now: object, allowed: bool) -> None:
    assert may_change(key, then, now) is allowed
