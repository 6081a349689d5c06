"""The gate's result for people, on a terminal or in a file.

Nothing here uses rich's markup on text that comes from users: names and messages are `Text`, cleaned first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from effattn.report import summary, text
from effattn.run import catalog, evidence

if TYPE_CHECKING:
    from effattn.expected import Expected
    from effattn.gate import Failure, Result
    from effattn.judge import Verdict
    from effattn.report.summary import LawRow, Row, Unjudged
    from effattn.run.catalog import Difference
    from effattn.run.evidence import Weighed

#: The width of output that is not a terminal: nothing is wrapped or cut, since programs read it too.
PIPED_WIDTH = 10_000

#: reasons why cases were set aside that are shown; the others are counted
MOST_REASONS = 8
#: failures under laws that are shown with their cases; the others are named
MOST_LAWS = 6

VERDICT_COLUMNS = ("judged", "passed", "failed", "not supported", "not judged", "time")
ACCURACY_COLUMNS = ("error/bound", "z rms", "z max", "bit-equal", "ulp p50/p99/max")


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Called where rich has caught a broken pipe: hand it on, instead of exiting with 1."""
        raise


def console(*, stderr: bool = False, width: int | None = None) -> Console:
    """The console for all output: as wide as the terminal, or endlessly wide and plain where it is none."""
    if width is None and not Console(stderr=stderr).is_terminal:
        width = PIPED_WIDTH
    return _Console(stderr=stderr, width=width, highlight=False, soft_wrap=False)


def print_result(out: Console, result: Result, *, by_values: bool = False) -> None:
    """The tables, the failures, and the result in a sentence."""
    print_rows(out, result.rows, ("dtype",))
    if by_values:
        print_rows(out, result.rows_by_values, ("dtype", "values"))
    print_accuracy(out, result.rows)
    for sentence in summary.understated(result.rows):
        out.print(Text(text.one_line(sentence), style="yellow"))
    print_set_aside(out, result.compared)
    print_laws(out, result.laws, result.unjudged_laws)
    print_expected(out, result.expected)
    print_notes(out, result.request.judge.name, result.notes)
    shown, rest = split(result.failures)
    for failure in shown:
        print_failure(out, failure)
    if rest:
        out.print(Text(f"{len(rest)} more laws are broken, see the run folder:", style="bold red"))
        for failure in rest:
            out.print(Text(f"  {failure.law}, {failure.dtype}"))
            out.print(
                Text(f"    {text.one_line(failure.shrunk.verdict.replay)}", style="cyan"), soft_wrap=True
            )
        out.print()
    print_weighed(out, result.weighed)
    style = {0: "bold green", 1: "bold red", 2: "bold yellow"}[result.exit_code]
    out.print(Text(text.one_line(result.sentence), style=style))


def print_accuracy(out: Console, rows: Sequence[Row]) -> None:
    """Of methods with quantised operands, how far the output is from attention on the inputs before that."""
    for row in rows:
        if row.accuracy is not None:
            out.print(
                Text(
                    f"{' '.join(map(text.one_line, row.label))}: {accuracy(row.accuracy)}, in the median case"
                )
            )


def accuracy(pair: tuple[float, float]) -> str:
    """`Verdict.accuracy` in words."""
    return (
        f"out is {pair[0]:.2%} off (rms) from exact attention on the inputs before they are quantised,"
        f" {pair[1]:.2%} without any rounding after that"
    )


def split(failures: Sequence[Failure]) -> tuple[list[Failure], list[Failure]]:
    """The failures to be shown whole, and the broken laws beyond `MOST_LAWS`, to be named."""
    broken = [failure for failure in failures if failure.outcome == "law broken"]
    rest = broken[MOST_LAWS:]
    return [failure for failure in failures if failure not in rest], rest


def print_weighed(out: Console, weighed: Weighed) -> None:
    """What the cases say together: the alarms, each with the line that repeats the case which says most."""
    if not weighed.passed:
        out.print(Text("evidence over cases", style="bold red"))
    for alarm in weighed.alarms:
        out.print(Text(f"  {alarm.sentence}"), soft_wrap=True)
        out.print(Text(f"    {text.one_line(alarm.replay)}", style="cyan"), soft_wrap=True)
    for verdict in weighed.unsteady:
        out.print(Text(f"  {text.one_line(evidence.unsteady(verdict))}"), soft_wrap=True)
        out.print(Text(f"    {text.one_line(verdict.replay)}", style="cyan"), soft_wrap=True)
    if not weighed.passed:
        out.print()


def print_laws(out: Console, rows: Sequence[LawRow], unjudged: Sequence[Unjudged]) -> None:
    """One line for each dtype, and one for each reason why laws were not judged; summary.md has all their names."""
    for row in rows:
        line = Text.assemble(f"laws {row.dtype}: {row.held} of {row.judged} hold, on {row.cases} cases")
        for count, words in ((row.not_supported, "not supported"), (row.not_judged, "not judged")):
            if count:
                line.append(f"; {count} {words}", "yellow")
        out.print(line)
    # What no case of the profile could show is a hole in the gate, and named whatever its length.
    holes = [group for group in unjudged if group.outcome == "not judged"]
    others = [group for group in unjudged if group not in holes]
    for group in (*holes, *others[:MOST_REASONS]):
        kind = f"{'law' if len(group.laws) == 1 else 'laws'} {group.outcome}, {len(group.laws)}: "
        names = f": {', '.join(group.names)}" if group in holes or len(group.laws) == 1 else ""
        out.print(Text.assemble((kind, "yellow"), text.one_line(f"{group.reason}{names}")))
    if len(others) > MOST_REASONS:
        out.print(Text(f"and {len(others) - MOST_REASONS} more reasons, see summary.md", style="yellow"))
    if rows:
        out.print()


def print_expected(out: Console, happened: Mapping[Expected, int | None]) -> None:
    """The expected failures: those that happened, those that did not, and those that this gate does not try."""
    for entry, cases in happened.items():
        dtype = "" if entry.dtype == "*" else f"{entry.dtype}, "
        if cases:
            words = f"as expected, {entry.law} failed in {cases} {'case' if cases == 1 else 'cases'}"
        elif cases is None:
            words = f"expected to fail, and not judged here: {entry.law}"
        else:
            words = f"expected to fail, and held: {entry.law}. If it does in every profile, remove the entry"
        out.print(Text(text.one_line(f"{dtype}{words} ({entry.reason})"), style="yellow"))
    if happened:
        out.print()


def print_notes(out: Console, method: str, notes: Mapping[str, int]) -> None:
    """What the method did to its process, and in how many cases."""
    for note, cases in notes.items():
        counted = f", in {cases} {'case' if cases == 1 else 'cases'}" if cases else ""
        out.print(
            Text.assemble((f"note, {text.one_line(method)}: ", "yellow"), text.one_line(f"{note}{counted}"))
        )
    if notes:
        out.print()


def print_rows(out: Console, rows: Sequence[Row], labels: Sequence[str]) -> None:
    """The rows as one table, or as two below each other where the terminal is narrow."""
    whole = _table(labels, (*VERDICT_COLUMNS[:-1], *ACCURACY_COLUMNS, VERDICT_COLUMNS[-1]), rows)
    if _fits(out, whole):
        print_table(out, whole)
        return
    for columns in (VERDICT_COLUMNS, ACCURACY_COLUMNS):
        table = _table(labels, columns, rows)
        if not _fits(out, table):
            # Very narrow: headers and cells on several lines, at their blanks.
            table = _table(labels, columns, rows, wrap=True)
        print_table(out, table)


def _fits(out: Console, table: Table) -> bool:
    # `Console.measure` would never say more than the console's width.
    return Measurement.get(out, out.options.update(max_width=PIPED_WIDTH), table).maximum <= out.width


def print_table(out: Console, table: Table) -> None:
    """Print a table, without the blanks at the end of its lines where it goes into a file."""
    if out.is_terminal:
        out.print(table)
        return
    with out.capture() as captured:
        out.print(table)
    for line in captured.get().splitlines():
        out.print(Text(line.rstrip()))


def print_plain(out: Console, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Any texts as a table. What is wrapped where it is too wide for the terminal are not the identities, which are copied."""
    table = plain_table(*map(text.one_line, names), wrap=True)
    for place, column in enumerate(table.columns):
        column.justify = "left"
        cells = [row[place] for row in rows if row[place]]
        column.no_wrap = bool(cells) and all(map(_IDENTITY.fullmatch, cells))
    for row in rows:
        table.add_row(*(Text(text.one_line(cell)) for cell in row))
    print_table(out, table)


#: What the identity of a case or of a run looks like.
_IDENTITY = re.compile("[0-9a-f]{12}")

#: Changes of each kind that are shown; the rest is counted.
MOST_CHANGES = 10


def print_difference(out: Console, difference: Difference) -> None:
    """What changed between two runs, the worst first, and the result in a sentence."""
    for kind in difference.kinds:
        if not kind.changes:
            continue
        style = {"failing": "bold red", "doubtful": "yellow", "good": "green"}[kind.level]
        out.print(Text(f"{kind.title}: {len(kind.changes)}", style=style))
        for change in kind.changes[:MOST_CHANGES]:
            was, now = (
                f"{v.outcome} {text.fraction(catalog.fraction(v))}" for v in (change.before, change.after)
            )
            out.print(Text(f"  {change.key.case_id}  {was} -> {now}  {text.one_line(change.case)}"))
        if len(kind.changes) > MOST_CHANGES:
            out.print(Text(f"  and {len(kind.changes) - MOST_CHANGES} more"))
    doubtful = not difference.both or difference.unjudged or difference.other
    style = "bold red" if difference.regressed else "bold yellow" if doubtful else "bold green"
    out.print(Text(difference.sentence, style=style))


def print_set_aside(out: Console, verdicts: Sequence[Verdict]) -> None:
    """Why cases were not supported or not judged, each reason once with its number."""
    reasons: dict[tuple[str, str], int] = {}
    for verdict in verdicts:
        if str(verdict.outcome) in ("not supported", "not judged"):
            reason = text.one_line(verdict.message).removeprefix(f"{verdict.outcome}: ")
            key = (str(verdict.outcome), reason)
            reasons[key] = reasons.get(key, 0) + 1
    shown = sorted(reasons.items(), key=lambda item: -item[1])
    for (outcome, reason), n in shown[:MOST_REASONS]:
        out.print(Text.assemble((f"{outcome}, {n}: ", "yellow"), reason))
    if len(shown) > MOST_REASONS:
        more = len(shown) - MOST_REASONS
        out.print(Text(f"and {more} more reasons, see the verdicts in the run folder", style="yellow"))
    if shown:
        out.print()


def print_failure(out: Console, failure: Failure) -> None:
    """The worst and the smallest of the cases that failed in one way, with the lines that repeat them."""
    n = len(failure.verdicts)
    cases = "case" if n == 1 else "cases"
    out.print(Text(f"{failure.dtype}: {what_failed(failure)} in {n} {cases}", style="bold red"))
    print_verdict(out, failure.worst, title="worst")
    if failure.shrunk.verdict.case != failure.worst.case:
        print_verdict(out, failure.shrunk.verdict, title="smallest found")
    out.print()


def what_failed(failure: Failure) -> str:
    """The outcome, with the laws."""
    if failure.law is None:
        return str(failure.outcome)
    laws = list(dict.fromkeys(v.law for v in failure.verdicts if v.law))
    if len(laws) == 1:
        return f"{failure.outcome}, {laws[0].replace('_', ' ')},"
    return f"{failure.outcome} under {len(laws)} laws"


def print_verdict(out: Console, verdict: Verdict, *, title: str) -> None:
    """One verdict in a few lines; the replay line stands alone so that it can be copied."""
    out.print(Text.assemble(f"  {title}: ", (text.one_line(verdict.case.describe()), "bold")))
    for line in text.plain(verdict.message).splitlines():
        out.print(Text(f"    {line}"))
    # Not wrapped, whatever the width: a wrapped line would be copied with breaks in it.
    out.print(Text(f"    {text.one_line(verdict.replay)}", style="cyan"), soft_wrap=True)


def print_details(out: Console, verdict: Verdict, *, folder: Path | None = None) -> None:
    """Everything about one verdict: quantities, findings, times."""
    out.print(Text.assemble("case     ", (text.one_line(verdict.case.describe()), "bold")))
    out.print(Text(f"         {verdict.case.to_json()}"), soft_wrap=True)
    out.print(Text(f"method   {text.one_line(verdict.method)}"))
    passed = str(verdict.outcome) == "pass"
    out.print(Text.assemble("outcome  ", (str(verdict.outcome), "bold green" if passed else "bold red")))
    for line in text.plain(verdict.message).splitlines():
        out.print(Text(f"         {line}"))
    for note in verdict.notes:
        out.print(Text(f"note     {text.one_line(note)}", style="yellow"))
    if verdict.accuracy is not None:
        out.print(Text(f"accuracy {accuracy(verdict.accuracy)}"))
    if verdict.quantities:
        table = plain_table("", *(q.name for q in verdict.quantities))
        for label, cell in _QUANTITY_ROWS:
            table.add_row(label, *(cell(q) for q in verdict.quantities))
        print_table(out, table)
    for finding in verdict.findings:
        out.print(
            Text(
                f"finding  {finding.name}: statistic {text.number(finding.statistic)}, "
                f"p-value {finding.p_value:.1e}, alarm below {finding.threshold:.1e}"
            )
        )
    if verdict.seconds:
        out.print(
            Text("time     " + ", ".join(f"{name} {text.seconds(s)}" for name, s in verdict.seconds.items()))
        )
    if folder is not None:
        out.print(Text(f"from     {folder}"))
    out.print(Text(f"again    {text.one_line(verdict.replay)}", style="cyan"), soft_wrap=True)


_QUANTITY_ROWS = (
    ("elements", lambda q: str(q.count)),
    ("largest error/bound", lambda q: text.fraction(q.fraction, digits=3)),
    ("  at", lambda q: text.MISSING if q.worst is None else str(q.worst)),
    ("  got", lambda q: _exactly(q.got)),
    ("  exact", lambda q: _exactly(q.exact)),
    ("  allowed error", lambda q: text.number(q.allowed)),
    ("bit-equal", lambda q: text.share(q.bit_equal)),
    ("ulp p50", lambda q: text.ulps(q.ulp_p50)),
    ("ulp p99", lambda q: text.ulps(q.ulp_p99)),
    ("ulp max", lambda q: text.ulps(q.ulp_max)),
    ("z rms", lambda q: text.number(q.z_rms)),
    ("z mean", lambda q: text.number(q.z_mean, digits=3)),
    ("z max", lambda q: text.number(q.z_max)),
)


def _exactly(x: float | None) -> str:
    return text.MISSING if x is None else repr(x)


def plain_table(*columns: str, wrap: bool = False) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0)
    )
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=not wrap, overflow="fold")
    return table


def _table(
    labels: Sequence[str], columns: Sequence[str], rows: Sequence[Row], *, wrap: bool = False
) -> Table:
    table = plain_table(*labels, *columns, wrap=wrap)
    for row in rows:
        style = "red" if row.failed else "yellow" if row.judged == 0 else None
        table.add_row(
            *(text.one_line(label) for label in row.label),
            *(cell(row, name) for name in columns),
            style=style,
        )
    return table


def cell(row: Row, column: str) -> str:
    """The text of one cell; the same in the terminal's table and in Markdown's."""
    match column:
        case "judged":
            return str(row.judged)
        case "passed":
            return str(row.passed)
        case "failed":
            return text.counts(row.failed)
        case "not supported":
            return str(row.not_supported)
        case "not judged":
            return str(row.not_judged)
        case "time":
            return text.seconds(row.seconds)
        case "error/bound":
            return text.fraction(row.fraction)
        case "z rms":
            return text.number(row.z_rms)
        case "z max":
            return text.number(row.z_max)
        case "bit-equal":
            return text.share(row.bit_equal)
        case "ulp p50/p99/max":
            return " / ".join(text.ulps(x) for x in (row.ulp_p50, row.ulp_p99, row.ulp_max))
    raise ValueError(f"unknown column {column!r}")
