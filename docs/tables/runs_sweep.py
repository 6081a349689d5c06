"""Of what a sweep of tiny cases takes, the share that the cases take: from what benchmarks/runs.py recorded."""

from __future__ import annotations

from pathlib import Path

from runs_record import MEASUREMENT, section


def render(measurement: Path = MEASUREMENT) -> str:
    """A row for the sweep."""
    figures, where = section("sweep", measurement)
    return "\n".join(
        [
            "| cases | workers | time | in cases, of the time that workers are busy | of all their time, starting included |"
            " records | memory of the supervisor |",
            "|---|---|---|---|---|---|---|",
            f"| {figures['cases']:,} | {figures['jobs']} | {figures['seconds']:.0f} s | {figures['in_cases_of_busy']:.1%} |"
            f" {figures['in_cases_of_all']:.1%} | {figures['megabytes']:.0f} MB | {figures['supervisor_megabytes']:.0f} MB |",
            "",
            where,
        ]
    )
