"""The gate's result as Markdown, for a pull request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from effattn.report import terminal, text
from effattn.report.summary import understated

if TYPE_CHECKING:
    from effattn.gate import Failure, Result
    from effattn.judge import Verdict
    from effattn.report.summary import Row

#: Failures that are shown; the rest is counted. Keeps a summary far below the 60 kB that a comment may have.
MOST_FAILURES = 12
#: Characters of a message that are shown.
MOST_MESSAGE = 1500

COLUMNS = (*terminal.VERDICT_COLUMNS[:-1], *terminal.ACCURACY_COLUMNS, terminal.VERDICT_COLUMNS[-1])


def summary(result: Result, origin: Mapping[str, Any]) -> str:
    """The whole summary of a run."""
    request = result.request
    lines = [
        f"# effattn gate: {text.markdown(request.judge.name)}",
        "",
        f"**{text.markdown(result.sentence)}**",
        "",
        *table(result.rows, ("dtype",)),
        "",
        *(
            f"{row.label[0]}: {terminal.accuracy(row.accuracy)}, in the median case.\n"
            for row in result.rows
            if row.accuracy
        ),
    ]
    for sentence in understated(result.rows):
        lines += [f"{text.markdown(sentence)}.", ""]
    lines += laws(result)
    if result.notes:
        lines += ["## What the method did to its process", ""]
        lines += [
            f"- {text.markdown(note)}{f', in {n} cases' if n else ''}" for note, n in result.notes.items()
        ]
        lines += [""]
    shown, rest = terminal.split(result.failures)
    for failure in shown[:MOST_FAILURES]:
        lines += [*_failure(failure), ""]
    if len(shown) > MOST_FAILURES:
        lines += [f"{len(shown) - MOST_FAILURES} more kinds of failure are in the run folder.", ""]
    if rest:
        lines += [f"## {len(rest)} more broken laws", ""]
        lines += [f"- {text.code(str(failure.law))}, {failure.dtype}" for failure in rest]
        lines += [""]
    if not result.weighed.passed:
        lines += [*weighed(result.weighed.to_dict()), ""]
    lines += [
        "## By value distribution",
        "",
        *table(result.rows_by_values, ("dtype", "values")),
        "",
        "## Where this comes from",
        "",
        *provenance(origin),
        "",
    ]
    return "\n".join(lines)


def laws(result: Result) -> list[str]:
    """How many laws hold in each dtype, and all that were not judged, by the reason."""
    if not result.laws:
        return []
    lines = ["## Laws", ""]
    for row in result.laws:
        more = f"; {row.not_supported} not supported" if row.not_supported else ""
        more += f"; {row.not_judged} not judged" if row.not_judged else ""
        lines.append(f"- {row.dtype}: {row.held} of {row.judged} hold, on {row.cases} cases{more}")
    for group in result.unjudged_laws:
        named = ", ".join(text.code(name) for name in group.names)
        lines.append(f"- {group.outcome}: {text.markdown(group.reason)}: {named}")
    for entry, cases in result.expected.items():
        what = f"failed in {cases} cases, as expected" if cases else "held, though it is expected to fail"
        what = "is expected to fail, and was not judged" if cases is None else what
        lines.append(f"- {text.code(entry.law)} {what}: {text.markdown(entry.reason)}")
    return [*lines, ""]


def table(rows: Sequence[Row], labels: Sequence[str]) -> list[str]:
    """A Markdown table of the rows."""
    lines = [
        "| " + " | ".join((*labels, *COLUMNS)) + " |",
        "|" + " --- |" * len(labels) + " ---: |" * len(COLUMNS),
    ]
    for row in rows:
        cells = [text.markdown(label) for label in row.label]
        cells += [text.markdown(terminal.cell(row, column)) for column in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def weighed(found: Mapping[str, Any]) -> list[str]:
    """What the cases say together, as `effattn.run.evidence` has it as data."""
    lines = ["## Evidence over cases", ""]
    for alarm in found.get("alarms", ()):
        lines += [
            f"- {text.markdown(str(alarm['sentence']))}. Most of it:",
            "",
            f"  {text.code(str(alarm['replay']))}",
        ]
    lines += [f"- {text.markdown(str(line))}" for line in found.get("unsteady", ())]
    return lines


def _failure(failure: Failure) -> list[str]:
    what = terminal.what_failed(failure).removesuffix(",")
    lines = [f"## {failure.dtype}: {what}, {len(failure.verdicts)} of the cases", ""]
    lines += _verdict(failure.worst, title="Worst")
    if failure.shrunk.verdict.case != failure.worst.case:
        lines += ["", *_verdict(failure.shrunk.verdict, title="Smallest found")]
    return lines


def _verdict(verdict: Verdict, *, title: str) -> list[str]:
    message = verdict.message
    if len(message) > MOST_MESSAGE:
        message = message[:MOST_MESSAGE] + " ..."
    return [
        f"{title}: {text.markdown(verdict.case.describe())}",
        "",
        *(f"> {text.markdown(line)}  " for line in message.splitlines()),
        "",
        text.code(verdict.replay),
    ]


def provenance(origin: Mapping[str, Any]) -> list[str]:
    """Where a run comes from, as a list."""
    lines = []
    for name, value in origin.items():
        if name in ("evidence", "smallest"):  # they stand elsewhere
            continue
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {inner}" for key, inner in value.items())
        lines.append(f"- {text.markdown(name)}: {text.code(str(value))}")
    return lines
