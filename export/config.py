"""What an export can be told, validated where it is made."""

from __future__ import annotations

from dataclasses import dataclass

from mecdeploy.export.errors import ExportError

PACKED_BITS = (1, 2, 3, 4, 8)
TARGETS = ("onnxruntime", "portable")
INPUTS = ("uint8", "float")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Which file to write.

    bits: width at which low-bit weights are packed; None packs every weight at the width it was trained at. A unit
        trained wider than this keeps its own width (the 8-bit first and last layer), and so does one whose levels the
        plain range of this width does not hold.
    target: onnxruntime (1.24 or newer: INT4 and INT2 initialisers) or portable (packed bytes and a lookup table:
        onnxruntime from 1.18, OpenVINO).
    input: uint8 (raw pixels) or float (pixels / 255, in [0, 1]).
    """

    bits: int | None = None
    target: str = "onnxruntime"
    input: str = "uint8"

    def __post_init__(self) -> None:
        if self.bits is not None:
            _require_choice("bits", self.bits, PACKED_BITS)
        _require_choice("target", self.target, TARGETS)
        _require_choice("input", self.input, INPUTS)


def _require_choice(key: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        listed = ", ".join(str(choice) for choice in choices)
        raise ExportError(f"export.{key} is {value!r}; choose one of {listed}.")
