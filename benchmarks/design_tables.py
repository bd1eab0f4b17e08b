"""Tables of what decided a design: forms of swish, a normalisation folded, tracers."""

from __future__ import annotations

from benchmarks.markdown import Result, measured_on, table

FORMS = {
    "relu": "ReLU, for scale",
    "hard": "hard-swish: QLinearAdd, QLinearMul",
    "kernels": "swish: QLinearSigmoid, QLinearMul",
    "float": "swish in float",
    "table": "any function: a table, through Gather",
}
STAGES = {
    "float": "float network, as trained",
    "float_folded": "float network, folded",
    "calibrated_w8a8": "W8A8, calibrated",
    "calibrated_w4a4": "W4A4, calibrated",
    "qat_w4a4": "W4A4, after QAT",
}


def swish(result: Result) -> str:
    """Each form's time over that of ReLU."""
    rows = [
        (words, f"{result['forms'][form]['median_ms']:.2f}", f"{result['forms'][form]['of_relu']:.1f}")
        for form, words in FORMS.items()
    ]
    return table(("form", "median, ms", "of ReLU"), rows, left=1) + measured_on(result)


def normalization(result: Result) -> str:
    """Accuracy of one network by stage."""
    rows = [(words, f"{100 * result['accuracies'][stage]:.2f}") for stage, words in STAGES.items()]
    run = (
        f"\n{result['data']}, {result['images']:,} test images, seed {result['environment']['seed']}: "
        f"{result['fp_epochs']} epochs in full precision, {result['epochs']} of QAT.\n"
    )
    return table(("resnet8", "accuracy, %"), rows, left=1) + run + measured_on(result)


def tracing(result: Result) -> str:
    """How many networks each tracer gets through."""
    rows = [
        (collection, str(counts["networks"]), str(counts["torch.fx"]), str(counts["torch.export"]))
        for collection, counts in result["summary"].items()
    ]
    return table(("networks of", "tried", "torch.fx traces", "torch.export traces"), rows, left=1) + measured_on(result)
