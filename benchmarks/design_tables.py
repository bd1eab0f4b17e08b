"""Tables of what decided a design: forms of swish, a normalisation folded, tracers, the guard of the step sizes."""

from __future__ import annotations

from benchmarks.markdown import Result, measured_on, table

FORMS = {
    "relu": "ReLU, for scale",
    "hard": "hard-swish: QLinearAdd, QLinearMul",
    "kernels": "swish: QLinearSigmoid, QLinearMul",
    "float": "swish in float",
    "table": "any function: a table, through Gather",
}
NETWORKS = {"resnet8": "resnet8", "pooled": "logits end in a pool"}
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


def step_guard(result: Result) -> str:
    """Accuracy and collapsed step sizes at each learning rate, without the guard and with it."""
    head = ("network", "width", "learning rate", "accuracy without, %", "with, %", "step sizes at the floor", "with")
    rows = []
    runs = result["runs"]
    for network, words in NETWORKS.items():
        for bits in sorted({run["bits"] for run in runs}):
            for rate in sorted({run["rate"] for run in runs}):
                settings = {"network": network, "bits": bits, "rate": rate}
                same = [run for run in runs if settings.items() <= run.items()]
                without, guarded = ([run for run in same if run["guarded"] is value] for value in (False, True))
                accuracies = [
                    f"{100 * sum(run['accuracy'] for run in part) / len(part):.1f}" for part in (without, guarded)
                ]
                floors = [str(sum(run["collapsed"] for run in part)) for part in (without, guarded)]
                rows.append((words, f"W{bits}A{bits}", f"{rate:g}", *accuracies, *floors))
    refused = [sum("refused" in run for run in runs if run["guarded"] is value) for value in (False, True)]
    note = (
        f"\nDigits, {result['epochs']} epochs of QAT after {result['fp_epochs']} in full precision, batches of "
        f"{result['batch_size']}. Accuracy: mean of the seeds {', '.join(map(str, result['seeds']))}; step sizes: of "
        f"all seeds together. Networks that could not be exported: {refused[0]} without, {refused[1]} with.\n"
    )
    return table(head, rows, left=2) + note + measured_on(result)


def tracing(result: Result) -> str:
    """How many networks each tracer gets through."""
    rows = [
        (collection, str(counts["networks"]), str(counts["torch.fx"]), str(counts["torch.export"]))
        for collection, counts in result["summary"].items()
    ]
    return table(("networks of", "tried", "torch.fx traces", "torch.export traces"), rows, left=1) + measured_on(result)
