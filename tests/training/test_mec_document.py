"""docs/mec-quant.md quotes measurements: they are those of the committed JSON, and they say what the text says."""

import json
from pathlib import Path

from mecdeploy.training.config import MecConfig

ROOT = Path(__file__).parents[2]


def test_the_documented_errors_are_those_measured() -> None:
    measured = json.loads((ROOT / "benchmarks/results/taylor_error.json").read_text(encoding="utf-8"))
    document = (ROOT / "docs/mec-quant.md").read_text(encoding="utf-8")
    table = document.split("<!-- taylor_error: begin -->")[1].split("<!-- taylor_error: end -->")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]
    assert [row[0] for row in rows] == list(measured["by_tail"])
    for name, rate, *errors, tightness, cosines in rows:
        found = measured["by_tail"][name]
        assert rate == f"{found['exact_rate']:.3g}"
        methods = ("one_about_zero", "one_about_mean", "one_safe", "mixture")
        assert errors == [f"{100 * found['errors'][method]:.2g} %" for method in methods]
        assert tightness == f"{found['mixture_over_exact']:.2f}"
        assert cosines == " / ".join(f"{found['gradient_cosine'][method]:.3f}" for method in ("one_safe", "mixture"))
    for key, default in (("experts", MecConfig().experts), ("order", MecConfig().order), ("distortion", 0.5)):
        assert measured[key] == default
    assert "images/taylor_error.svg" in document and (ROOT / "docs/images/taylor_error.svg").exists()


def test_the_measured_errors_bear_the_document_out() -> None:
    """What the list under the table says, as inequalities on the JSON."""
    measured = json.loads((ROOT / "benchmarks/results/taylor_error.json").read_text(encoding="utf-8"))
    by_tail = {name: row["errors"] for name, row in measured["by_tail"].items()}
    assert max(by_tail["Gaussian, at MEC's distortion"].values()) < 1e-4
    assert by_tail["Gaussian"]["one_about_zero"] > 10
    assert by_tail["Gaussian"]["one_about_mean"] < 0.1
    mean_by_order = measured["by_order"]["long"]["one_about_mean"]
    assert mean_by_order == sorted(mean_by_order) and mean_by_order[-1] > 1e3
    for method in ("one_safe", "mixture"):
        by_order = measured["by_order"]["long"][method]
        assert by_order == sorted(by_order, reverse=True)
    assert by_tail["after ReLU, sigma 2"]["one_safe"] > 1
    for name, errors in by_tail.items():
        assert errors["mixture"] < 0.3 or name == "after ReLU, pooled, sigma 2"
        assert errors["mixture"] < 1.2
        assert measured["by_tail"][name]["gradient_cosine"]["mixture"] > 0.85
