"""What differs, said in sentences: the first unit, which sides agree on it, and the next step."""

from __future__ import annotations

from collections.abc import Sequence

from mecdeploy.runtime_checks.model_file import LOGITS
from mecdeploy.runtime_checks.report import (
    FLOAT_VALUE_SHARE,
    FLOAT_VALUE_STEPS,
    Accuracy,
    Exactness,
    FloatValueParity,
    TensorParity,
)


def explain_exactness(exactness: Exactness, float_products: tuple[str, ...] = ()) -> list[str]:
    """Sentences for what differs; the first one names the first unit and what its pairs say. Empty when all agree."""
    failures = []
    first = exactness.first_different
    if first is not None:
        failures.append(_explain_tensor(first, float_products))
        others = [row.name for row in (*exactness.units, exactness.logits) if not row.agrees and row is not first]
        if others:
            failures.append(f"{len(others)} tensors after {first.name} differ too: {_list(others)}.")
    failures += [_explain_float_value(row) for row in exactness.islands if not row.agrees]
    if exactness.exposed_logits_different and not exactness.has_islands:
        failures.append(
            f"{exactness.exposed_logits_different} logits change when the units are made graph outputs, so this "
            "onnxruntime fuses differently with and without them. Report it with the versions of this check."
        )
    return failures


def explain_accuracy(accuracy: Accuracy, *, has_islands: bool) -> list[str]:
    """A sentence when any logit differs: exactness over some images is a promise for all of them.

    With float islands the file is not exact end to end, and nothing is promised of whole passes.
    """
    if accuracy.logits_different == 0 or has_islands:
        return []
    return [
        f"{accuracy.logits_different} logits over {accuracy.images} images differ between PyTorch and onnxruntime, by "
        f"at most {accuracy.max_logit_difference:g}, first at image {accuracy.first_different_image}; the top class "
        f"agrees on {accuracy.top1_agreement:.2%}. Export the run again, from the checkpoint that is checked."
    ]


def _explain_float_value(row: FloatValueParity) -> str:
    if row.missing:
        return (
            f"{row.name}: PyTorch has no integers quantised from the float island {row.island}, or in another shape. "
            "Export the run again, from the checkpoint that is checked."
        )
    return (
        f"{row.name}: {row.different} of {row.compared} integers quantised from the float island {row.island} differ, "
        f"by at most {row.max_difference:g} steps; float rounding explains {FLOAT_VALUE_STEPS} step in up to "
        f"{FLOAT_VALUE_SHARE:.0%} of them. The island, or its quantisation, is another in the file: export the run "
        "again."
    )


def _explain_tensor(row: TensorParity, float_products: tuple[str, ...]) -> str:
    kind = "logits" if row.name == LOGITS else "float values" if row.real else "integers"
    if row.missing:
        return (
            f"{row.name} is the first unit that differs: {_list(row.missing)} has no such tensor, or in another shape. "
            "Export the run again, from the checkpoint that is checked."
        )
    found = (
        f"{row.name} is the first unit that differs: {row.different} of {row.compared} {kind}, "
        f"by at most {row.max_difference:g}{' steps' if kind == 'integers' else ''}. "
    )
    if row.tolerance:
        return found + (
            f"A float island makes them, whose rounding explains {row.tolerance:.3g}: it is another in the file. "
            "Export the run again."
        )
    if row.onnxruntime_vs_interpreter == 0:
        return found + (
            "onnxruntime and the interpreter agree, so the file holds another weight, scale or bias than the trained "
            "network: export the run again."
        )
    if row.torch_vs_interpreter == 0:
        reason = "runs it in float" if row.name in float_products else "differs on this processor or in this version"
        return found + f"PyTorch and the interpreter agree, so onnxruntime {reason}."
    if row.torch_vs_onnxruntime == 0:
        return found + "PyTorch and onnxruntime agree, so the interpreter does not know this arithmetic: report it."
    return found + "No two sides agree: the file was changed in a way that also stops onnxruntime's integer kernel."


def _list(names: Sequence[str], most: int = 8) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
