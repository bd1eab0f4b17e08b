"""`mecdeploy predict`: onnxruntime alone, on the pixels that validation would have seen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from calling import Call
from PIL import Image

from mecdeploy.errors import UserError
from mecdeploy.prediction import InputContract, Predictor, predict


def test_torch_is_not_imported(
    model: Path, digit_images: list[Path], environment: dict[str, str], tmp_path: Path
) -> None:
    script = (
        "import sys\n"
        "from mecdeploy.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit as exit:\n    assert exit.code in (0, None), exit.code\n"
        "heavy = {'torch', 'torchvision', 'sklearn', 'safetensors', 'onnx', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    command = [sys.executable, "-c", script, "predict", str(model), str(digit_images[0]), str(digit_images[7])]
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert len(lines) == 2 and lines[0].startswith(f"{digit_images[0]}: ") and lines[0].count("%") == 3


@pytest.mark.parametrize("input", ["uint8", "float"])
def test_probabilities_are_pytorchs(run: Path, digit_images: list[Path], tmp_path: Path, input: str) -> None:
    import torch

    from mecdeploy import export
    from mecdeploy.training.data import decode_image
    from mecdeploy.training.run import load_run

    path = export(run, out=tmp_path / "model.onnx", input=input).path
    pixels = np.stack([decode_image(image, channels=1, height=8, width=8) for image in digit_images])
    expected = torch.softmax(load_run(run).model(torch.from_numpy(pixels)).double(), 1).detach().numpy()
    predictions = predict(path, digit_images)
    # The logits are the same float32; only softmax is worked out twice, in float64.
    np.testing.assert_allclose(np.stack([p.probabilities for p in predictions]), expected, rtol=1e-12)
    assert predictions[3].class_names == tuple(str(digit) for digit in range(10))
    best, second = predictions[3].top(2)
    assert best == (str(expected[3].argmax()), pytest.approx(expected[3].max())) and best[1] >= second[1]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "P", "CMYK", "I;16", "I"])
@pytest.mark.parametrize("size", [(32, 32), (40, 32), (32, 47), (100, 33), (7, 90), (31, 9)])
@pytest.mark.parametrize("color", ["L", "RGB"])
def test_images_are_prepared_as_for_validation(tmp_path: Path, mode: str, size: tuple[int, int], color: str) -> None:
    from mecdeploy.training.data import decode_image

    generator = np.random.default_rng(sum(size))
    wide = generator.integers(0, 65536, (size[1], size[0]), dtype=np.uint16)
    rgb = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    if mode == "I;16":
        image = Image.fromarray(wide)
    elif mode == "I":
        image = Image.fromarray(wide.astype(np.int32))
    else:
        image = Image.fromarray(rgb).convert(mode)
    path = tmp_path / ("image.tif" if mode in ("CMYK", "I") else "image.png")
    image.save(path, **({"transparency": 3} if mode == "P" else {}))
    channels = 1 if color == "L" else 3
    contract = InputContract(channels=channels, height=32, width=32, color=color, dtype="uint8")
    np.testing.assert_array_equal(contract.read(path), decode_image(path, channels=channels, height=32, width=32))


def test_an_input_that_is_not_square(tmp_path: Path) -> None:
    from mecdeploy.training.data import decode_image

    pixels = np.random.default_rng(0).integers(0, 256, (50, 61, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    for height, width in ((24, 40), (40, 24)):
        contract = InputContract(channels=3, height=height, width=width, color="RGB", dtype="uint8")
        expected = decode_image(tmp_path / "image.png", channels=3, height=height, width=width)
        np.testing.assert_array_equal(contract.read(tmp_path / "image.png"), expected)


def test_one_bad_image_does_not_keep_the_others(
    call: Call, model: Path, digit_images: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "text.png").write_text("no picture")
    cut = tmp_path / "cut.png"
    cut.write_bytes(digit_images[0].read_bytes()[:60])
    outcome = call("predict", model, tmp_path / "text.png", cut, tmp_path / "none.png", tmp_path, digit_images[5])
    assert outcome.code == 2
    errors = outcome.err.splitlines()
    assert len(errors) == 4 and all(line.startswith("Error: ") for line in errors)
    for name, line in zip(("text.png", "cut.png", "none.png", str(tmp_path)), errors, strict=True):
        assert name in line
    assert outcome.out.startswith(f"{digit_images[5]}: ")


def test_models_that_are_not_ours(call: Call, model: Path, digit_images: list[Path], tmp_path: Path) -> None:
    proto = onnx.load(model)
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "foreign.onnx")
    (tmp_path / "truncated.onnx").write_bytes(model.read_bytes()[:3000])
    (tmp_path / "empty.onnx").touch()
    assert "not written by `mecdeploy export`" in call("predict", tmp_path / "foreign.onnx", digit_images[0]).error
    for name in ("truncated.onnx", "empty.onnx"):
        assert (
            f"{tmp_path / name} is no ONNX file that onnxruntime"
            in call("predict", tmp_path / name, digit_images[0]).error
        )
    assert "no such model file" in call("predict", tmp_path / "none.onnx", digit_images[0]).error
    assert "IMAGES" in call("predict", model).error


def test_a_newer_format_is_refused(model: Path, tmp_path: Path) -> None:
    proto = onnx.load(model)
    next(entry for entry in proto.metadata_props if entry.key == "mecdeploy.format").value = "99"
    onnx.save(proto, tmp_path / "newer.onnx")
    with pytest.raises(UserError, match="has metadata format 99; this version reads 1. Upgrade mecdeploy."):
        Predictor(tmp_path / "newer.onnx")


def test_a_file_without_class_names_counts_them(model: Path, digit_images: list[Path], tmp_path: Path) -> None:
    proto = onnx.load(model)
    kept = [entry for entry in proto.metadata_props if entry.key != "mecdeploy.class_names"]
    assert json.loads(next(entry.value for entry in kept if entry.key == "mecdeploy.units"))
    del proto.metadata_props[:]
    proto.metadata_props.extend(kept)
    onnx.save(proto, tmp_path / "nameless.onnx")
    assert Predictor(tmp_path / "nameless.onnx").class_names == tuple(str(index) for index in range(10))
