"""How far Taylor series of the coding rate are from the rate itself, on light and on long tails.

Writes benchmarks/results/taylor_error.json, docs/images/taylor_error.svg and the table in docs/mec-quant.md.
Run from the repository's root, with mecdeploy and matplotlib installed: python benchmarks/taylor_error.py

Rows are random: Gaussian, or Gaussian after ReLU with log-normal row energies exp(sigma N(0, 1)); pooled rows are means
over 64 such positions. Series run in float32, as in training; the exact rates they are held against in float64. Every
error is the median over draws of |series - exact| / exact, where exact is the same quantity by Cholesky: of all rows
for one series, of the experts' rows for the mixture.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mecdeploy.training.coding import coding_rate_exact, coding_rate_moe, coding_rate_series, scale_rows
from mecdeploy.training.mec import routing_energy

ROOT = Path(__file__).resolve().parent.parent
SAMPLES, DIMENSION, EXPERTS, ORDER, DISTORTION = 256, 512, 8, 4, 0.5
ORDERS = (1, 2, 3, 4, 5, 6, 7, 8)
HEAVINESS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0)
LONG = 2.0

TAILS: dict[str, dict[str, Any]] = {
    "Gaussian, at MEC's distortion": {"relu": False, "sigma": 0.0, "distortion": 64.0},
    "Gaussian": {"relu": False, "sigma": 0.0},
    "Gaussian, log-normal energies (sigma 2)": {"relu": False, "sigma": 2.0},
    "after ReLU": {"relu": True, "sigma": 0.0},
    "after ReLU, sigma 1": {"relu": True, "sigma": 1.0},
    "after ReLU, sigma 2": {"relu": True, "sigma": LONG},
    "after ReLU, pooled, sigma 1": {"relu": True, "sigma": 1.0, "positions": 64},
    "after ReLU, pooled, sigma 2": {"relu": True, "sigma": LONG, "positions": 64},
}


def draw_rows(generator: torch.Generator, *, relu: bool, sigma: float, positions: int = 1) -> Tensor:
    """[SAMPLES, DIMENSION] float32 rows."""
    values = torch.zeros(SAMPLES, DIMENSION)
    for _ in range(positions):
        position = torch.randn(SAMPLES, DIMENSION, generator=generator)
        values += (position.relu() if relu else position) / positions
    return values * torch.exp(sigma / 2 * torch.randn(SAMPLES, 1, generator=generator))


Rate = Callable[[Tensor], Tensor]


def rates_of(raw: Tensor, distortion: float) -> dict[str, tuple[Callable[[int], Rate], Rate]]:
    """Method -> (its series of a given order, the exact rate it stands for), as functions of the scaled rows."""
    energy = routing_energy(raw)
    rows = scale_rows(raw, center=True)
    mean = rows.square().sum() * DIMENSION / (SAMPLES * distortion) / min(SAMPLES, DIMENSION)

    def one(centre: Tensor | None) -> Callable[[int], Rate]:
        return lambda order: lambda z: coding_rate_series(z, distortion=distortion, order=order, centre=centre)

    def mixture(order: int | None) -> Rate:
        return lambda z: coding_rate_moe(
            z, distortion=distortion, experts=EXPERTS, order=order, center=True, energy=energy
        )

    def exact(z: Tensor) -> Tensor:
        return coding_rate_exact(z, distortion=distortion)

    return {
        "one_about_zero": (one(torch.zeros(())), exact),
        "one_about_mean": (one(mean), exact),
        "one_safe": (one(None), exact),
        "mixture": (mixture, mixture(None)),
    }


def cosine(first: Rate, second: Rate, rows: Tensor) -> float:
    """Between the gradients of two rates in the rows."""
    gradients = []
    for rate in (first, second):
        leaf = rows.double().requires_grad_()
        (gradient,) = torch.autograd.grad(rate(leaf), leaf)
        gradients.append(gradient.flatten())
    return float(torch.cosine_similarity(gradients[0], gradients[1], dim=0))


def measure(tail: dict[str, Any], orders: tuple[int, ...], draws: int, seed: int) -> dict[str, Any]:
    """Medians over draws: errors by method and order, and at ORDER the gradients' cosines and the tightness."""
    parameters = dict(tail)
    distortion = parameters.pop("distortion", DISTORTION)
    errors: dict[str, list[list[float]]] = {}
    cosines: dict[str, list[float]] = {}
    exact_rates, tightness = [], []
    for draw in range(draws):
        generator = torch.Generator().manual_seed(seed + draw)
        raw = draw_rows(generator, **parameters)
        rows = scale_rows(raw, center=True)
        for name, (series, exact) in rates_of(raw, distortion).items():
            reference = float(exact(rows.double()))
            found = [abs(float(series(order)(rows)) - reference) / reference for order in orders]
            errors.setdefault(name, []).append(found)
            cosines.setdefault(name, []).append(cosine(series(ORDER), exact, rows))
            if name == "one_safe":
                exact_rates.append(reference)
            if name == "mixture":
                tightness.append(reference / exact_rates[-1])
    return {
        "errors": {name: [float(e) for e in np.median(found, axis=0)] for name, found in errors.items()},
        "gradient_cosine": {name: float(np.median(found)) for name, found in cosines.items()},
        "exact_rate": float(np.median(exact_rates)),
        "mixture_over_exact": float(np.median(tightness)),
    }


def cpu_name() -> str:
    """The processor's model name, where the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def run(draws: int, seed: int) -> dict[str, Any]:
    """Everything the figure and the table show."""
    import matplotlib

    by_tail: dict[str, dict[str, Any]] = {}
    for name, tail in TAILS.items():
        result = measure(tail, (ORDER,), draws, seed)
        result["errors"] = {method: values[0] for method, values in result["errors"].items()}
        by_tail[name] = result
    by_order = {
        "light": measure({"relu": False, "sigma": 0.0}, ORDERS, draws, seed)["errors"],
        "long": measure({"relu": True, "sigma": LONG}, ORDERS, draws, seed)["errors"],
    }
    by_heaviness: dict[str, list[float]] = {}
    for sigma in HEAVINESS:
        for method, errors in measure({"relu": True, "sigma": sigma}, (ORDER,), draws, seed)["errors"].items():
            by_heaviness.setdefault(method, []).extend(errors)
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_name(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "matplotlib": matplotlib.__version__,
        },
        "seed": seed,
        "draws": draws,
        "samples": SAMPLES,
        "dimension": DIMENSION,
        "experts": EXPERTS,
        "order": ORDER,
        "distortion": DISTORTION,
        "orders": list(ORDERS),
        "heaviness": list(HEAVINESS),
        "tails": TAILS,
        "by_tail": by_tail,
        "by_order": by_order,
        "by_heaviness": by_heaviness,
    }


def table(result: dict[str, Any]) -> str:
    """The by_tail part as a Markdown table; every number to two digits, as in the JSON."""
    lines = [
        "| rows | R, nats | one series about 0 | about the mean | safe centre | mixture | R_moe / R "
        "| gradient, one / mixture |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in result["by_tail"].items():
        errors = " | ".join(f"{100 * row['errors'][method]:.2g} %" for method in METHODS)
        cosines = row["gradient_cosine"]
        lines.append(
            f"| {name} | {row['exact_rate']:.3g} | {errors} | {row['mixture_over_exact']:.2f} "
            f"| {cosines['one_safe']:.3f} / {cosines['mixture']:.3f} |"
        )
    return "\n".join(lines)


METHODS = {
    "one_about_zero": ("one series about 0 (MEC's)", "#777777", "--", "o"),
    "one_about_mean": ("one series about the mean eigenvalue", "#D55E00", "-.", "s"),
    "one_safe": ("one series, safe centre", "#009E73", ":", "^"),
    "mixture": (f"mixture of {EXPERTS}, each its own safe centre", "#0072B2", "-", "D"),
}


def draw_figure(result: dict[str, Any], path: Path) -> None:
    """Three panels of one logarithmic scale; errors beyond it leave the frame."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams.update({"svg.hashsalt": "taylor_error", "font.size": 11, "axes.titlesize": 12})
    panels = [
        ("Light tail: Gaussian rows", "order of the series", result["orders"], result["by_order"]["light"]),
        (
            f"Long tail: after ReLU, log-normal\nenergies, $\\sigma$ = {LONG:g}",
            "order of the series",
            result["orders"],
            result["by_order"]["long"],
        ),
        (
            f"Order {ORDER}: from light to long",
            "$\\sigma$ of the logarithm of row energies",
            result["heaviness"],
            result["by_heaviness"],
        ),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.6), sharey=True, facecolor="white")
    for axis, (title, label, places, errors) in zip(axes, panels, strict=True):
        for method, (name, colour, line, marker) in METHODS.items():
            bold = method == "mixture"
            axis.plot(
                places,
                errors[method],
                line,
                color=colour,
                marker=marker,
                markersize=5,
                linewidth=2.6 if bold else 1.8,
                label=name,
                zorder=3 if bold else 2,
            )
        axis.axhline(1, color="#222222", linewidth=0.8)
        axis.set(title=title, xlabel=label, yscale="log", ylim=(1e-6, 1e4))
        axis.grid(True, which="major", color="#dddddd", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].text(8, 1.3, "error as large as the rate itself", fontsize=9, color="#222222", ha="right")
    axes[0].set_ylabel("relative error of the rate")
    for axis in axes[:2]:
        axis.set_xticks(result["orders"])
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="lower center", ncols=2, frameon=False)
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=120)
    plt.close(figure)


def write_table(result: dict[str, Any], document: Path) -> None:
    """Replace what stands between the table's two markers."""
    text = document.read_text(encoding="utf-8")
    begin, end = "<!-- taylor_error: begin -->", "<!-- taylor_error: end -->"
    head, _, rest = text.partition(begin)
    _, found, tail = rest.partition(end)
    if not found:
        sys.exit(f"{document.name}: the markers {begin} and {end} are missing; put them around the table.")
    document.write_text(f"{head}{begin}\n{table(result)}\n{end}{tail}", encoding="utf-8")


def main() -> None:
    """Measure, then write the three results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=21, help="random matrices per point (default 21)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure-only", action="store_true", help="redraw from the committed JSON")
    options = parser.parse_args()
    results = ROOT / "benchmarks" / "results" / "taylor_error.json"
    if options.figure_only:
        result = json.loads(results.read_text(encoding="utf-8"))
    else:
        result = run(options.draws, options.seed)
        results.parent.mkdir(exist_ok=True)
        results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw_figure(result, ROOT / "docs" / "images" / "taylor_error.svg")
    write_table(result, ROOT / "docs" / "mec-quant.md")
    print(json.dumps({name: row["errors"] for name, row in result["by_tail"].items()}))


if __name__ == "__main__":
    main()
