"use strict";
(function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const filters = document.getElementById("filters");
  const shown = document.getElementById("shown");
  const body = document.querySelector("#table tbody");
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const mostRows = 300;
  const logged = { errors: 1, warnings: 2 }; // as vega.Error and vega.Warn
  const views = new Map();
  let sorting = { key: null, down: true };

  function chosen() {
    const fields = [...filters.querySelectorAll("select")].map((s) => [s.dataset.field, s.value]).filter((f) => f[1]);
    const words = filters.querySelector("[data-search]").value.toLowerCase().split(/\s+/).filter(Boolean);
    return data.cases.filter((row) => fields.every(([name, value]) => row[name] === value) &&
      words.every((word) => row.text.includes(word)));
  }

  function theme() {
    const style = getComputedStyle(document.documentElement);
    const front = style.getPropertyValue("--front").trim(), line = style.getPropertyValue("--line").trim();
    const text = { labelColor: front, titleColor: front };
    return { background: "transparent", view: { stroke: line }, font: "system-ui, sans-serif",
      axis: { ...text, labelSeparation: 6, gridColor: line, domainColor: line, tickColor: line }, legend: text, title: { color: front },
      // More is farther from the background, light or dark.
      range: { heatmap: [style.getPropertyValue("--tint").trim(), ...(dark.matches ? ["#1f5f8b", "#e8f4ff"] : ["#6baed6", "#08306b"])] } };
  }

  async function draw() {
    const rows = chosen();
    for (const chart of data.charts) {
      const place = document.querySelector(`[data-chart="${chart.name}"]`);
      const name = chart.rows ? chart.name : "cases";
      const spec = { ...chart.spec, datasets: { ...(chart.spec.datasets || {}), [name]: chart.rows || rows },
        config: theme(), autosize: { type: "fit-x", contains: "padding" } };
      views.get(chart.name)?.finalize();
      const made = await window.vegaEmbed(place, spec, { actions: false, renderer: "svg", tooltip: { theme: "custom" } });
      views.set(chart.name, made);
      place.dataset.drawn = "yes";
    }
  }

  async function refresh() {
    const rows = chosen();
    shown.textContent = `${rows.length} of ${data.cases.length} cases`;
    list(rows);
    for (const chart of data.charts) {
      if (chart.rows || !views.has(chart.name)) continue;
      // A chart of nothing has no extent to take its axes from, which is no reason to complain.
      const view = views.get(chart.name).view;
      view.logLevel(rows.length ? logged.warnings : logged.errors);
      await view.data("cases", rows).runAsync();
    }
    document.documentElement.dataset.ready = String(Number(document.documentElement.dataset.ready || 0) + 1);
  }

  // JSON has no infinity: an error of NaN, or beyond every number, is drawn at the edge and has no fraction.
  function valueOf(row, key) {
    return key === "fraction" && row[key] === null && row.drawn !== null ? Infinity : row[key];
  }

  function show(value) {
    if (value === null || value === undefined) return "-";
    if (value === Infinity) return "inf";
    if (typeof value !== "number" || Number.isInteger(value)) return String(value);
    // As many figures as it takes to tell it from 1, where an error is allowed or not.
    let figures = 3;
    while (Number(value.toPrecision(figures)) === 1) figures += 1;
    return value.toPrecision(figures);
  }

  function list(rows) {
    const sorted = [...rows];
    if (sorting.key) {
      const sign = sorting.down ? -1 : 1;
      sorted.sort((a, b) => {
        const x = valueOf(a, sorting.key), y = valueOf(b, sorting.key);
        if (x === null || y === null) return (x === null) - (y === null);
        return (x < y ? -1 : x > y ? 1 : 0) * sign;
      });
    }
    body.replaceChildren(...sorted.slice(0, mostRows).map((row) => {
      const line = document.createElement("tr");
      if (row.failed) line.className = "failed";
      for (const key of data.columns) {
        const cell = document.createElement("td");
        cell.textContent = show(valueOf(row, key));
        line.append(cell);
      }
      return line;
    }));
    if (sorted.length > mostRows) {
      const line = document.createElement("tr"), cell = document.createElement("td");
      cell.colSpan = data.columns.length;
      cell.textContent = `and ${sorted.length - mostRows} more; filter to see them`;
      line.append(cell);
      body.append(line);
    }
  }

  for (const row of data.cases) row.text = Object.values(row).join(" ").toLowerCase();
  filters.addEventListener("input", refresh);
  document.querySelectorAll("[data-sort]").forEach((button) => button.addEventListener("click", () => {
    sorting = { key: button.dataset.sort, down: sorting.key === button.dataset.sort ? !sorting.down : true };
    document.querySelectorAll("[data-sort]").forEach((b) => b.closest("th").removeAttribute("aria-sort"));
    button.closest("th").setAttribute("aria-sort", sorting.down ? "descending" : "ascending");
    list(chosen());
  }));
  document.querySelectorAll("[data-copy]").forEach((button) => button.addEventListener("click", async () => {
    const text = button.parentElement.querySelector("code").textContent;
    try { await navigator.clipboard.writeText(text); button.textContent = "Copied"; } catch {
      const range = document.createRange();
      range.selectNodeContents(button.parentElement.querySelector("code"));
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      button.textContent = "Selected";
    }
  }));
  window.addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => { d.open = true; }));
  dark.addEventListener("change", () => draw().then(refresh));
  draw().then(refresh);
})();
