"""The table of dynamic batching; the standard library alone."""

from __future__ import annotations

from benchmarks.markdown import Result, measured_on, table


def batching(result: Result) -> str:
    """Each network and number of clients, without and with dynamic batching."""
    head = (
        "network",
        "clients",
        "batches",
        "rows a batch",
        "requests/s",
        "of one by one",
        "median, ms",
        "99th percentile, ms",
        "of one by one",
    )
    rows = [
        (
            f"{network}, {result['sides'][network]} px",
            clients,
            name,
            f"{row['rows_per_batch']:.1f}",
            f"{row['requests_per_second']['median']:,.0f}",
            f"{row['rate_over_base']['median']:.2f}",
            f"{row['median_milliseconds']['median']:.2f}",
            f"{row['p99_milliseconds']['median']:.2f}",
            f"{row['p99_over_base']['median']:.2f}",
        )
        for network, by_clients in result["networks"].items()
        for clients, servers in by_clients.items()
        for name, row in servers.items()
    ]
    rounds = f"{result['rounds']} rounds of {result['seconds']:g} seconds each"
    busy = f"{result['environment']['load_average_before']} processes wanted a core before it began"
    return table(head, rows, left=3) + measured_on(result) + f"\nMedians of {rounds}; {busy}.\n"
