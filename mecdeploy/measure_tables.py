"""Measures of a finished run as tables for a terminal of 80 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from mecdeploy.measures import means
from mecdeploy.tables import _dense_table

if TYPE_CHECKING:
    from mecdeploy.measures import HessianReport, RepresentationReport
    from mecdeploy.training.representation import CodeUse


def codes(kind: str, uses: tuple[CodeUse, ...]) -> Table:
    """How every quantiser of a kind uses its codes, and the mean quantiser."""
    table = _dense_table(kind, "bits", "entropy", "levels", "effective", "lowest", "highest")
    for use in uses:
        table.add_row(
            use.name,
            str(use.bits),
            f"{use.entropy:.2f}",
            f"{use.levels}/{use.available}",
            f"{use.effective_levels:.1f}",
            f"{use.lowest:.1%}",
            f"{use.highest:.1%}",
        )
    mean = means(uses)
    table.add_row(
        "mean",
        "",
        f"{mean['entropy']:.2f}",
        f"{mean['levels']:.1f}",
        f"{mean['effective_levels']:.1f}",
        f"{mean['lowest']:.1%}",
        f"{mean['highest']:.1%}",
        style="bold",
    )
    table.caption = (
        f"Entropy in bits, on average {mean['entropy_share']:.1%} of what the codes could hold; lowest and highest: "
        "share of values at either end of the range."
    )
    return table


def features(report: RepresentationReport) -> Table:
    """The features before the last layer, beside those of the full-precision network."""
    spreads = [report.features] if report.float_features is None else [report.float_features, report.features]
    titles = ["full precision", f"quantised ({report.method})"][: len(spreads)]
    table = _dense_table("features before the last layer", *titles)
    table.add_row("dimension", *(str(spread.dimension) for spread in spreads))
    table.add_row("effective rank", *(f"{spread.effective_rank:.2f}" for spread in spreads))
    table.add_row("participation ratio", *(f"{spread.participation_ratio:.2f}" for spread in spreads))
    table.add_row("variance within classes", *(f"{spread.within:.2%}" for spread in spreads))
    table.add_row("variance between classes", *(f"{spread.between:.2%}" for spread in spreads))
    ratios = [spread.spread_ratio for spread in spreads]
    table.add_row("within / between", *("" if ratio is None else f"{ratio:.3f}" for ratio in ratios))
    table.add_row("coding rate, nats per dimension", *(f"{spread.coding_rate:.4f}" for spread in spreads))
    table.caption = f"{report.images:,} {report.part} images; coding rate at distortion {report.features.distortion:g}."
    return table


def hessian(report: HessianReport) -> Table:
    """Top eigenvalue and trace, raw and relative to the filters' norms."""
    flatness = report.flatness
    found = (flatness.raw, flatness.normalized)
    table = _dense_table("Hessian of the cross entropy", "raw", "filter-normalised")
    table.add_row("top eigenvalue", *(f"{one.eigenvalue:.4g}" for one in found))
    table.add_row("... residual", *(f"{one.residual:.2g}" for one in found))
    table.add_row(
        "... iterations", *(f"{one.iterations}" + ("" if one.converged else ", not converged") for one in found)
    )
    table.add_row("trace", *(f"{one.trace:.4g} ±{one.trace_error:.2g}" for one in found))
    table.caption = (
        f"In {flatness.weights:,} weights of layers, over {report.images:,} training images (seed {report.seed}); "
        f"{report.probes} probes. Loss {flatness.loss:.4g}, gradient norm {flatness.gradient_norm:.3g}."
    )
    return table
