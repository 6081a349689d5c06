"""The report in a real browser: charts are drawn, nothing is asked of the network, filters, tooltips and keys work."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from effattn.case import Case
from effattn.report import charts, gather, html
from effattn.run import store
from effattn.study.engine import Job, Point, Store
from effattn.tolerances import baselines
from effattn.verdict import Outcome, Quantity, Verdict

#: What would show if a name of a user became HTML, a script, or a link.
HOSTILE = "\u2028\x1b<img src=x onerror=alert(1)></script><script>alert(2)</script>{{7*7}}../../etc/passwd"


def verdict(seed: int, fraction: float, *, method: str, law: str | None = None) -> Verdict:
    bad = fraction > 1
    return Verdict(
        case=Case(
            q_len=8 + seed, kv_len=16 + 3 * seed, head_dim=(32, 64)[seed % 2], dtype=("fp16", "bf16", "fp32")[seed % 3],
            seed=seed, values=("normal", "outliers")[seed % 2], causal=("none", "bottom-right")[seed // 3 % 2],
        ),
        method=method,
        outcome=Outcome.INACCURATE if bad else Outcome.PASS,
        message=f"{HOSTILE} out[0, 0, 1, 2] is wrong" if bad else "fine",
        quantities=() if law else (
            Quantity(name="out", count=64, fraction=fraction, z_rms=0.5 + fraction / 4, z_max=3.0, ulp_p50=0.0,
                     ulp_p99=1.0 + seed, ulp_max=9.0 + seed, bit_equal=0.9, worst=(0, 0, seed % 8, seed % 32)),
        ),
        seconds={"method": 0.01},
        replay=f"effattn replay '{HOSTILE}'",
        law=law,
    )  # fmt: skip


def write(folder: Path, verdicts: list[Verdict], spec: str, started: str) -> Path:
    with store.RunWriter(folder, spec=spec) as writer:
        for item in verdicts:
            writer.add(item)
        writer.commit({"started": started, "ended": started, "kind_of_run": "gate", "command": HOSTILE,
                       "device": "cpu", "profile": "smoke", "method": {"name": spec},
                       "working_directory": {"commit": "c" * 40, "clean": True}})  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> gather.Material:
    """Two methods, one of them failing and of a hostile name, an older run to compare with, and a history of all."""
    folder = tmp_path_factory.mktemp("runs")
    old = write(
        folder / "old",
        [verdict(s, 0.3, method="torch") for s in range(30)],
        "torch",
        "2030-01-01T00:00:00+00:00",
    )
    now = write(
        folder / "now",
        [verdict(s, 0.2 + s / 20, method="torch") for s in range(30)]
        + [verdict(90, 0.1, method="torch", law="a law that holds")],
        "torch",
        "2031-01-01T00:00:00+00:00",
    )
    mine = write(
        folder / "mine",
        [verdict(s, 0.1 + s / 15, method=HOSTILE) for s in range(30)],
        HOSTILE,
        "2032-01-01T00:00:00+00:00",
    )
    baseline = folder / "torch.toml"
    facts = {"device": "cpu", "profile": "smoke"}
    kept = baselines.updated(
        None,
        method="torch",
        kind=baselines.kind_of(facts),
        verdicts=[verdict(s, 0.3 + s / 90, method="torch") for s in range(30)],
        origin={"reason": HOSTILE},
    )
    baseline.write_text(baselines.render(kept))
    study = Store(folder / "study", {"study": "linformer"}, ("error",))
    methods = ("gaussian", HOSTILE, *(f"method {i}" for i in range(14)))
    points = [Point(n=64, head_dim=16, method=m, size=k) for m in methods for k in (8, 16, 32)]
    jobs = [Job(point=point, draw=draw) for point in points for draw in range(4)]
    study.run(jobs, lambda job: {"error": (1 + job.draw) / job.point.size})
    return gather.gather(
        [now, mine], against=old, history=folder, baseline=baseline, studies=[folder / "study"]
    )


@pytest.fixture(scope="module")
def report(material: gather.Material, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("report") / "report.html"
    file.write_text(html.render(material), encoding="utf-8")
    return file


@pytest.fixture
def opened(page: Any, report: Path) -> Any:
    page.media(scheme="light")
    page.size(1280, 900)
    page.open(report)
    return page


def marks(page: Any, chart: str) -> int:
    """Marks that a chart has drawn, without axes."""
    return page.evaluate(f"document.querySelectorAll('[data-chart={chart}] svg .mark-symbol.role-mark path, "
                         f"[data-chart={chart}] svg .mark-rect.role-mark path').length")  # fmt: skip


def test_every_chart_is_drawn(opened: Any, material: gather.Material, screenshots: Path) -> None:
    wanted = {chart.name for chart in charts.charts(material)}
    assert wanted == {
        "overview", "ulps", "z", "places", "kv_len", "head_dim", "scale", "pairs", "difference", "history",
        "baseline", "study-0-0",
    }  # fmt: skip
    for name in wanted:
        assert marks(opened, name) > 1, name
        box = opened.evaluate(
            f"(() => {{ const b = document.querySelector('[data-chart={name}] svg').getBoundingClientRect();"
            " return [b.width, b.height]; })()"
        )
        assert box[0] > 300, name
        assert box[1] > 80, name
    opened.screenshot(screenshots / "report-light.png", whole=True)


@pytest.mark.parametrize("width", [1280, 1130, 420])
def test_a_studys_legend_is_whole_and_has_shapes(page: Any, report: Path, width: int) -> None:
    """Its rows fit below the chart, whatever the width. Each of 12 methods has a shape of its own, of 16 a few come again."""
    page.media(scheme="light")
    page.size(width, 900)
    page.open(report)
    below = page.evaluate(
        "(() => { const svg = document.querySelector('[data-chart=study-0-0] svg');"
        " const labels = [...svg.querySelectorAll('.role-legend-label text')];"
        " const end = svg.getBoundingClientRect().bottom;"
        " return [labels.length, labels.filter(l => l.getBoundingClientRect().bottom > end).length]; })()"
    )
    assert below == [16, 0]
    shapes = page.evaluate(
        "[...document.querySelectorAll('[data-chart=study-0-0] .role-legend-symbol path')].map(p => p.getAttribute('d'))"
    )
    assert len(shapes) == 16
    assert len(set(shapes)) == 12


def test_nothing_is_asked_of_the_network_and_nothing_complains(opened: Any, report: Path) -> None:
    assert opened.complaints() == []
    assert opened.requests() == [report.as_uri()]


def test_complaints_and_requests_would_be_seen(page: Any, tmp_path: Path) -> None:
    file = tmp_path / "bad.html"
    file.write_text(
        "<html data-ready=1><img src='http://127.0.0.1:9/x.png'><script>console.error('one'); alert; nothing.at.all</script>"
    )
    page.open(file)
    page.wait_for("document.images[0].complete")
    assert "http://127.0.0.1:9/x.png" in page.requests()
    assert len(page.complaints()) >= 2


def test_the_page_itself_forbids_requests(opened: Any) -> None:
    refused = opened.evaluate(
        "new Promise(done => { document.addEventListener('securitypolicyviolation', e => done(e.violatedDirective));"
        " const i = new Image(); i.src = 'http://127.0.0.1:9/x.png'; })"
    )
    assert refused == "img-src"


def test_names_of_users_are_shown_and_do_nothing(opened: Any) -> None:
    assert opened.dialogs() == []
    assert HOSTILE in opened.evaluate("document.body.innerText")
    assert opened.evaluate("document.querySelectorAll('main img').length") == 0
    assert opened.evaluate("document.scripts.length") == 3
    assert "49" not in opened.evaluate("document.title")


def test_filters_change_charts_and_table(opened: Any) -> None:
    before = {name: marks(opened, name) for name in ("kv_len", "head_dim")}
    opened.refresh(
        "(() => { const s = document.querySelector('[data-field=dtype]'); s.value = 'fp16';"
        " s.dispatchEvent(new Event('input', { bubbles: true })); })()"
    )
    for name, n in before.items():
        assert 0 < marks(opened, name) < n, name
    assert set(
        opened.evaluate("[...document.querySelectorAll('#table tbody tr')].map(r => r.cells[3].textContent)")
    ) == {"fp16"}
    assert opened.evaluate("document.getElementById('shown').textContent") == "21 of 61 cases"
    opened.refresh(
        "(() => { const s = document.querySelector('[data-search]'); s.value = 'nothing has this';"
        " s.dispatchEvent(new Event('input', { bubbles: true })); })()"
    )
    assert opened.evaluate("document.querySelectorAll('#table tbody tr').length") == 0
    assert marks(opened, "kv_len") == 0
    assert opened.complaints() == []


def test_table_is_sorted_by_its_headings(opened: Any) -> None:
    def fractions() -> list[float]:
        cells = opened.evaluate(
            "[...document.querySelectorAll('#table tbody tr')].map(r => r.cells[1].textContent)"
        )
        return [float(cell) for cell in cells if cell != "-"]

    opened.evaluate("document.querySelector('[data-sort=fraction]').click()")
    assert fractions() == sorted(fractions(), reverse=True)
    opened.evaluate("document.querySelector('[data-sort=fraction]').click()")
    assert fractions() == sorted(fractions())
    assert opened.evaluate("document.querySelector('[aria-sort]').getAttribute('aria-sort')") == "ascending"


def test_errors_without_a_number_are_the_largest_and_none_is_rounded_to_1(page: Any, tmp_path: Path) -> None:
    fractions = [0.5, float("nan"), 100.0, float("inf"), 1.00000004]
    run = write(
        tmp_path / "run", [verdict(s, x, method="mine") for s, x in enumerate(fractions)], "mine", "2030"
    )
    file = tmp_path / "r.html"
    file.write_text(html.render(gather.gather([run])), encoding="utf-8")
    page.open(file)
    for wanted in (
        ["inf", "inf", "100", "1.00000004", "0.500"],
        ["0.500", "1.00000004", "100", "inf", "inf"],
    ):
        page.evaluate("document.querySelector('[data-sort=fraction]').click()")
        assert wanted == page.evaluate(
            "[...document.querySelectorAll('#table tbody tr')].map(r => r.cells[1].textContent)"
        )
    assert page.complaints() == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_more_cases_are_farther_from_the_page(opened: Any, scheme: str) -> None:
    """In the map of places: the cell with most cases has the most contrast to the page, one without cases the least."""
    opened.media(scheme=scheme)
    opened.open(Path(opened.evaluate("decodeURIComponent(location.pathname)")))
    lights = opened.evaluate(
        """(() => { const light = c => c.match(/\\d+/g).slice(0, 3).map(Number).reduce((a, b) => a + b) / 3;
            const page = light(getComputedStyle(document.body).backgroundColor);
            return [...document.querySelectorAll('[data-chart=places] svg .mark-rect.role-mark path')].map(p =>
                [Number(p.getAttribute('aria-label').match(/cases: (\\d+)/)[1]),
                 Math.abs(light(getComputedStyle(p).fill) - page)]);
        })()"""
    )
    assert len(lights) == gather.CELLS**2
    lights.sort()
    assert lights[0][0] == 0 < lights[-1][0]
    assert lights[0][1] == min(far for _, far in lights) < 30
    assert lights[-1][1] == max(far for _, far in lights) > 120
    opened.media(scheme="light")


def test_tooltip_tells_the_case(opened: Any) -> None:
    x, y = opened.evaluate(
        "(() => { const m = document.querySelector('[data-chart=kv_len] svg .mark-symbol.role-mark path');"
        " m.scrollIntoView({ block: 'center' }); const b = m.getBoundingClientRect();"
        " return [b.x + b.width / 2, b.y + b.height / 2]; })()"
    )
    opened.move_to(x - 2, y)
    opened.move_to(x, y)
    opened.wait_for("document.querySelector('#vg-tooltip-element.visible')")
    told = opened.evaluate("document.getElementById('vg-tooltip-element').innerText")
    assert "q_len" in told or "batch 1" in told
    assert "outcome" in told
    assert opened.evaluate("document.querySelectorAll('#vg-tooltip-element img').length") == 0


@pytest.mark.parametrize(("width", "height"), [(320, 640), (390, 844), (1280, 900)])
def test_page_fits_its_window(opened: Any, screenshots: Path, width: int, height: int) -> None:
    opened.size(width, height)
    opened.open(Path(opened.evaluate("decodeURIComponent(location.pathname)")))
    wide = opened.evaluate(
        f"[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > {width}"
        " && !e.closest('.scroll, .chart')).map(e => e.outerHTML.slice(0, 80))"
    )
    assert wide == []
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    opened.screenshot(screenshots / f"report-{width}.png")


def test_many_kinds_of_failure_leave_room_for_the_other_columns(page: Any, tmp_path: Path) -> None:
    outcomes = [Outcome.INACCURATE, Outcome.BIASED, Outcome.CRASHED, Outcome.NON_FINITE]
    items = [
        replace(verdict(3 * s, 0.5, method="experiments/my_attention.py:attention"), outcome=outcome)
        for s, outcome in enumerate(outcomes)
    ]
    file = tmp_path / "r.html"
    file.write_text(html.render(gather.gather([write(tmp_path / "run", items, "mine", "2030")])), "utf-8")
    page.size(1280, 900)
    page.open(file)
    wide = "(e => e.scrollWidth - e.clientWidth)(document.querySelector('section[aria-labelledby=verdicts] .scroll'))"
    assert page.evaluate(wide) == 0


def test_verdicts_fit_a_wide_window_and_what_matters_fits_a_phone(opened: Any, report: Path) -> None:
    """All columns at 1280 px; on a phone the failures, what they are of, and more by scrolling, which keys can do."""
    table = "document.querySelector('section[aria-labelledby=verdicts] .scroll')"
    assert opened.evaluate(f"{table}.scrollWidth - {table}.clientWidth") == 0
    opened.size(390, 844)
    opened.open(report)
    right = f"[...{table}.querySelectorAll('thead th')].slice(0, 4).map(e => e.getBoundingClientRect().right)"
    names = f"[...{table}.querySelectorAll('thead th')].slice(0, 4).map(e => e.textContent)"
    assert opened.evaluate(names) == ["method", "dtype", "failed", "judged"]
    assert max(opened.evaluate(right)) <= 390
    assert opened.evaluate(f"{table}.scrollWidth > {table}.clientWidth && {table}.tabIndex === 0")
    caption = f"{table}.querySelector('caption span').getBoundingClientRect().right"
    assert opened.evaluate(caption) <= 390


def test_comparison_and_charts_have_room_on_a_phone(opened: Any) -> None:
    opened.size(390, 844)
    opened.open(Path(opened.evaluate("decodeURIComponent(location.pathname)")))
    tables = opened.evaluate(
        "[...document.querySelectorAll('section[aria-labelledby=against] .scroll')].map(e => e.scrollWidth - e.clientWidth)"
    )
    assert tables == [0] * len(tables) != []
    for chart in ("overview", "kv_len", "pairs", "difference", "history"):
        share = opened.evaluate(
            f"(() => {{ const e = document.querySelector('[data-chart={chart}]');"
            " const f = e.querySelector('svg .role-frame .background');"
            " return f.getBoundingClientRect().width / e.getBoundingClientRect().width; })()"
        )
        assert share > 0.5, chart


def contrast(page: Any, selector: str) -> float:
    """The contrast of text to what is behind it, as WCAG 2 defines it."""
    return page.evaluate(
        """(() => {
            const parse = (c) => c.match(/[\\d.]+/g).map(Number);
            const light = (c) => { const [r, g, b] = parse(c).map(x => { x /= 255;
                return x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4; }); return .2126*r + .7152*g + .0722*b; };
            let e = document.querySelector(SELECTOR), front = getComputedStyle(e).color, back = null;
            for (; e && !back; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
                if (parse(c)[3] !== 0) back = c; }
            const [a, b] = [light(front), light(back || 'rgb(255,255,255)')].sort((x, y) => y - x);
            return (a + .05) / (b + .05);
        })()""".replace("SELECTOR", json.dumps(selector))
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(opened: Any, screenshots: Path, scheme: str) -> None:
    opened.media(scheme=scheme)
    opened.open(Path(opened.evaluate("decodeURIComponent(location.pathname)")))
    for selector in (
        ".verdict",
        "caption",
        "figcaption p",
        "td.failed",
        "tr.failed td",
        "summary",
        "nav a",
        "pre",
    ):
        assert contrast(opened, selector) >= 4.5, selector
    axis = opened.evaluate(
        "getComputedStyle(document.querySelector('[data-chart=kv_len] .role-axis-label text')).fill"
    )
    front = opened.evaluate("getComputedStyle(document.body).color")
    assert axis == front
    opened.screenshot(screenshots / f"report-{scheme}-top.png")
    opened.media(scheme="light")


def test_everything_is_reached_by_keys(opened: Any) -> None:
    reached = []
    for _ in range(40):
        opened.press("Tab")
        reached.append(opened.evaluate("document.activeElement.outerHTML.slice(0, 40)"))
    assert "skip" in reached[0]
    for what in ("<a href", "<select", '<input type="search"', "scroll"):
        assert any(what in html for html in reached), what
    opened.evaluate("document.querySelectorAll('summary')[1].focus()")
    opened.press("Enter")
    assert opened.evaluate("document.querySelectorAll('details')[1].open") is True


def test_structure_is_there_for_screen_readers(opened: Any) -> None:
    assert opened.evaluate("document.documentElement.lang") == "en"
    assert opened.evaluate(
        "[...document.querySelectorAll('.chart')].every(c => c.getAttribute('aria-label'))"
    )
    assert opened.evaluate("[...document.querySelectorAll('table')].every(t => t.querySelector('th[scope]'))")
    assert opened.evaluate("[...document.querySelectorAll('form label')].every(l => l.control)")
    levels = opened.evaluate("[...document.querySelectorAll('h1,h2,h3')].map(h => Number(h.tagName[1]))")
    assert levels[0] == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))


def test_page_prints(opened: Any, screenshots: Path) -> None:
    printed = opened.pdf()
    assert printed.startswith(b"%PDF")
    (screenshots / "report.pdf").write_bytes(printed)
    opened.media(kind="print")
    assert opened.evaluate("getComputedStyle(document.querySelector('form')).display") == "none"
    opened.media()
