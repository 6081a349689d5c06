"""What recording, compacting, asking and reporting take: from what benchmarks/runs.py recorded."""

from __future__ import annotations

from pathlib import Path

from runs_record import MEASUREMENT, section


def render(measurement: Path = MEASUREMENT) -> str:
    """A row for each of them."""
    store, where = section("store", measurement)
    report, _ = section("report", measurement)
    return "\n".join(
        [
            "| what | time | size | memory |",
            "|---|---|---|---|",
            f"| recording a verdict | {store['record_us']:.0f} us of processor time | | |",
            f"| compacting {store['rows']:,} verdicts | {store['compact_seconds']:.1f} s | {store['parquet_megabytes']:.0f} MB |"
            f" {store['compact_peak_megabytes']:.0f} MB |",
            f"| a filter with an aggregate over them | {store['query_seconds'] * 1e3:.0f} ms, and"
            f" {store['open_seconds'] * 1e3:.0f} ms to open them | | |",
            f"| the report on a gate of the profile `{report['profile']}` with {report['verdicts']:,} verdicts |"
            f" {report['seconds']:.1f} s | {report['megabytes']:.1f} MB | {report['peak_megabytes']:.0f} MB |",
            "",
            where,
        ]
    )
