"""The report for machines and reviewers: Markdown for a pull request, JUnit XML, GitHub's annotations."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote
from xml.sax.saxutils import escape, quoteattr

from effattn.errors import RequestError
from effattn.report import charts, gather, markdown, summary, text, together
from effattn.report.gather import Material
from effattn.report.together import Statement
from effattn.run import catalog

if TYPE_CHECKING:
    from effattn.verdict import Verdict

#: Bytes of a Markdown summary; GitHub takes 65,536 characters in a comment.
MOST_MARKDOWN = 60_000
#: GitHub shows ten annotations of a step.
MOST_ANNOTATIONS = 10
#: Changes of each kind against another run that the Markdown lists.
MOST_CHANGES = 5
#: Characters of a name in a table.
MOST_NAME = 200
#: Charts that the Markdown shows.
_SHOWN = ("overview", "z")
#: What it is called that a run failed by its cases together.
_TOGETHER = "evidence over cases"
#: What XML 1.0 cannot hold.
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def pull_request(material: Material, pictures: Sequence[Path] = (), *, link: str = "") -> str:
    """The Markdown summary, under 60 kB whatever the run holds.

    Args:
        material: what it is about.
        pictures: charts beside the file.
        link: where the whole report is.
    """
    head = [
        f"# effattn: {text.markdown(text.some(material.methods))}",
        "",
        f"**{text.markdown(material.sentence)}**",
        "",
    ]
    for run in material.unfinished:
        more = f" Go on with it by {text.code(run.command)}" if run.command else ""
        head += [f"{text.code(str(run.folder))}: {run.share}.{more}", ""]
    for note in material.notes:
        head += [text.markdown(note), ""]
    if link:
        head += [f"The whole report: {text.code(link)}", ""]
    table = markdown.table(material.rows[:40], ("method", "dtype"))
    if len(material.rows) > 40:
        table += ["", f"and {len(material.rows) - 40} more rows in the report"]
    if material.by_laws:
        table += ["", f"The other {material.by_laws} judged cases are tries of laws."]
    pieces = ["\n".join([*head, *table, ""])]
    pieces += ["\n".join([*markdown.weighed(found), ""]) for found in material.evidence]
    if material.difference is not None:
        pieces.append("\n".join(_difference(material)))
    pieces.append("\n".join(_worst(material)))
    pieces += [f"![{picture.stem}]({_link(picture)})\n" for picture in pictures]
    if material.damaged:
        pieces.append(
            "\n".join(
                ["## Damaged records", "", *(f"- {text.markdown(str(d))}" for d in material.damaged[:20]), ""]
            )
        )
    for folder, facts in material.runs[:5]:
        where = "\n".join(markdown.provenance(facts))
        pieces.append(f"## Where {text.code(str(folder))} comes from\n\n{where[:4000]}\n")
    result = ""
    for piece in pieces:
        if len((result + piece).encode()) > MOST_MARKDOWN - 100:
            result += "\nThe rest is in the report.\n"
            break
        result += piece + "\n"
    return result


def _link(picture: Path) -> str:
    """The picture from the folder that the Markdown is in; its folder is named as a user likes."""
    return quote(os.fsencode(f"{picture.parent.name}/{picture.name}"))


def _worst(material: Material) -> list[str]:
    verdicts = material.worst
    kind = "worst cases" if material.failed else "cases closest to the limit"
    lines = [
        f"## The {len(verdicts)} {kind}" if len(verdicts) > 1 else f"## The {kind.replace('cases', 'case')}",
        "",
        "| outcome | error/bound | method | case |",
        "| --- | ---: | --- | --- |",
    ]
    for verdict in verdicts:
        cells = (
            str(verdict.outcome),
            text.fraction(catalog.fraction(verdict)),
            verdict.method[:MOST_NAME],
            summary.subject(verdict),
        )
        lines.append("| " + " | ".join(text.markdown(cell) for cell in cells) + " |")
    lines.append("")
    for verdict in verdicts:
        if summary.failed(verdict.outcome):
            lines += [
                f"<details><summary>{verdict.outcome}: {escape(text.one_line(summary.subject(verdict)))}</summary>",
                "",
                *(f"> {text.markdown(line)}  " for line in verdict.message[:1500].splitlines()),
                "",
                text.code(verdict.replay[:1500]),
                "</details>",
                "",
            ]
    return lines


def _difference(material: Material) -> list[str]:
    found = material.difference
    assert found is not None
    lines = [f"## Against {text.code(material.against)}", "", found.sentence, ""]
    for kind in found.kinds:
        if not kind.changes:
            continue
        title = kind.title.capitalize()
        lines += [f"{title}: {len(kind.changes)}", "", "| case | before | now |", "| --- | --- | --- |"]
        for change in kind.changes[:MOST_CHANGES]:
            was, now = (
                f"{v.outcome} {text.fraction(catalog.fraction(v))}" for v in (change.before, change.after)
            )
            lines.append(f"| {text.markdown(change.case[:MOST_NAME])} | {was} | {now} |")
        if len(kind.changes) > MOST_CHANGES:
            lines += ["", f"and {len(kind.changes) - MOST_CHANGES} more"]
        lines.append("")
    return lines


def pictures(material: Material, folder: Path, *, format: str = "svg") -> tuple[list[Path], dict[Path, str]]:
    """Write the charts that a summary shows into a folder.

    Returns:
        The paths of those that were written, and of those that could not be, each with the reason.

    Raises:
        RequestError: the folder cannot be made.
    """
    shown = [chart for chart in charts.charts(material) if chart.name in (*_SHOWN, "difference", "history")]
    files = [folder / f"{chart.name}.{format}" for chart in shown]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(
            f"cannot write the pictures into {str(folder)!r}: {error.strerror or error}"
        ) from error
    failed = charts.pictures(shown, gather.points(material), files)
    return [file for file in files if file not in failed], failed


def junit(material: Material) -> str:
    """The verdicts as JUnit XML: a suite for each method and dtype, a test for each case.

    A suite whose cases fail together has a test for that too.
    """
    suites: dict[tuple[str, str], list[Verdict]] = {}
    for verdict in material.verdicts:
        suites.setdefault((verdict.method, verdict.case.dtype), []).append(verdict)
    joint = _joint(material, suites)
    names = _names(material)
    lines = ['<?xml version="1.0" encoding="UTF-8"?>', '<testsuites name="effattn">']
    for (method, dtype), verdicts in suites.items():
        row = summary.row((method, dtype), verdicts)
        failed = sum(row.failed.values()) + len(joint[method, dtype])
        tests = len(verdicts) + len(joint[method, dtype])
        skipped = row.not_supported + row.not_judged
        lines.append(
            f'<testsuite name={_attribute(f"{method} {dtype}")} tests="{tests}" failures="{failed}" errors="0"'
            f' skipped="{skipped}" time="{row.seconds:.3f}">'
        )
        for verdict in verdicts:
            seconds = sum(verdict.seconds.values())
            start = (
                f"<testcase classname={_attribute(f'{method}.{dtype}')}"
                f' name={_attribute(names[id(verdict)])} time="{seconds:.6f}"'
            )
            if summary.failed(verdict.outcome):
                first = verdict.message.partition("\n")[0]
                body = _text(f"{verdict.message}\n{verdict.replay}")
                lines.append(
                    f"{start}><failure type={_attribute(str(verdict.outcome))} message={_attribute(first)}>{body}"
                    "</failure></testcase>"
                )
            elif str(verdict.outcome) in summary.SET_ASIDE:
                lines.append(f"{start}><skipped message={_attribute(verdict.message)}/></testcase>")
            else:
                lines.append(f"{start}/>")
        for name, said in joint[method, dtype].items():
            body = _text("\n".join(line for each in said for line in (each.sentence, each.replay) if line))
            lines.append(
                f'<testcase classname={_attribute(f"{method}.{dtype}")} name={_attribute(name)} time="0.000000">'
                f'<failure type="{_TOGETHER}" message={_attribute(said[0].sentence)}>{body}</failure></testcase>'
            )
        lines.append("</testsuite>")
    return "\n".join([*lines, "</testsuites>", ""])


def _joint(
    material: Material, suites: dict[tuple[str, str], list[Verdict]]
) -> dict[tuple[str, str], dict[str, list[Statement]]]:
    """For each suite, the name of each test of what cases say together -> what they say; one test for each run.

    Adds a suite where a run has none of its verdicts left.
    """
    found: dict[tuple[str, str], dict[str, list[Statement]]] = {}
    for number, (folder, facts) in enumerate(material.runs):
        of = [v for v, run in zip(material.verdicts, material.origins, strict=True) if run == number]
        blamed = together.method(facts, list(dict.fromkeys(v.method for v in of)))
        dtypes = list(dict.fromkeys(v.case.dtype for v in of if v.method == blamed)) or [""]
        name = _TOGETHER if len(material.evidence) == 1 else f"{_TOGETHER} in {folder}"
        for statement in together.statements(facts):
            dtype = next((dtype for dtype in dtypes if statement.concerns(dtype)), dtypes[0])
            found.setdefault((blamed, dtype), {}).setdefault(name, []).append(statement)
    for suite in found:
        suites.setdefault(suite, [])
    return {suite: found.get(suite, {}) for suite in suites}


def _names(material: Material) -> dict[int, str]:
    """`id` of each verdict -> the name of its test, unique in its method: readers of JUnit take one name for one test."""
    names: dict[int, str] = {}
    numbers: dict[tuple[str, str], list[int]] = {}
    for verdict, of in zip(material.verdicts, material.origins, strict=True):
        law = f"{verdict.law}: " if verdict.law else ""
        names[id(verdict)] = f"{law}{verdict.case.describe()} [{verdict.case.id}]"
        numbers.setdefault((verdict.method, names[id(verdict)]), []).append(of)
    for verdict, of in zip(material.verdicts, material.origins, strict=True):
        if len(numbers[verdict.method, names[id(verdict)]]) > 1:
            names[id(verdict)] += f" in {material.runs[of][0]}"
    return names


def _text(given: str) -> str:
    return escape(_NO_XML.sub("�", given))


def _attribute(given: str) -> str:
    return quoteattr(_NO_XML.sub("�", given), {"\n": "&#10;", "\t": "&#9;", "\r": "&#13;"})


def workflow_commands(material: Material) -> list[str]:
    """GitHub's workflow commands, at most ten: for each method, dtype and outcome that fails, and a run not at its end."""
    groups: dict[tuple[str, str, str], list[Verdict]] = {}
    for verdict in material.verdicts:
        if summary.failed(verdict.outcome):
            groups.setdefault((verdict.method, verdict.case.dtype, str(verdict.outcome)), []).append(verdict)
    order = sorted(
        groups.items(), key=lambda group: -max(catalog.fraction(v) or float("inf") for v in group[1])
    )
    lines = []
    for (method, dtype, outcome), verdicts in order[:MOST_ANNOTATIONS]:
        worst = max(verdicts, key=lambda v: catalog.fraction(v) or float("inf"))
        title = f"{method} {dtype}: {outcome} in {len(verdicts)} cases"
        body = f"{worst.case.describe()}\n{worst.message[:1000]}\n{worst.replay[:1000]}"
        lines.append(f"::error title={_command(title, of_property=True)}::{_command(body)}")
    for _, facts in material.runs:
        for said in together.statements(facts):
            body = "\n".join(filter(None, (said.sentence[:1000], said.replay[:1000])))
            lines.append(f"::error title={_TOGETHER}::{_command(body)}")
    warnings = [
        f"::warning title=not at its end::{_command(f'{run.folder}: {run.share}. {run.command}'.rstrip())}"
        for run in material.unfinished[:MOST_ANNOTATIONS]
    ]
    return [*lines[: MOST_ANNOTATIONS - len(warnings)], *warnings]


def _command(given: str, *, of_property: bool = False) -> str:
    """Text inside a workflow command (https://github.com/actions/toolkit, packages/core/src/command.ts)."""
    shown = text.plain(given).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return shown.replace(":", "%3A").replace(",", "%2C") if of_property else shown
