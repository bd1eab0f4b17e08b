"""The table of the loader; the standard library alone."""

from __future__ import annotations

from benchmarks.markdown import Result, measured_on, table


def loader(result: Result) -> str:
    """What each source delivers beside what a step takes, and how long the step waits."""
    head = (
        "source",
        "feeds",
        "images/s delivered",
        "images/s taken",
        "delivered / taken",
        "waiting, % of the loop",
        "first batch, ms",
    )
    rows = [
        (
            name,
            row["step"],
            f"{row['images_per_second']['median']:,.0f}",
            f"{result['appetite'][row['step']]['median']:,.0f}",
            f"{row['over_appetite']['median']:.1f}",
            f"{100 * row['waiting_share']['median']:.1f}",
            f"{row['first_batch_milliseconds']['median']:.0f}",
        )
        for name, row in result["sources"].items()
    ]
    index = f"\nIndexing shards: {result['index_microseconds_per_image']:.0f} µs of one core for an image.\n"
    rounds = "1 round" if result["rounds"] == 1 else f"medians of {result['rounds']} rounds"
    busy = f"{rounds}; {result['environment']['load_average_before']} processes wanted a core before it began.\n"
    return table(head, rows, left=2) + index + measured_on(result) + f"\nMeasured in {busy}"
