// Draws the charts of a report. The data is in the page; bokeh draws on canvas; the controls are plain HTML.
"use strict";
(() => {
const report = JSON.parse(document.getElementById("report-data").textContent);
const { templates, runs, charts } = Object.keys(report.charts).length ? report.charts : { charts: [], runs: [] };
const settings = { axis: "update", scale: "linear", smoothing: 0, hidden: new Set(), range: null };
const axisNames = { update: "update", sample: "sample", epoch: "epoch", hours: "hours since the first line of the log", clock: "time, UTC" };
const VISIBLE_POINTS = 1500; // a finer level is drawn where fewer points are in view
const MAX_DOTS = 300; // with more points, a chart shows lines only
const PREFIXES = [[1e9, "G"], [1e6, "M"], [1e4, "k"]]; // from which number on, and what is written

function decode(text) {
  const bytes = Uint8Array.from(atob(text.slice(1)), (char) => char.charCodeAt(0));
  return text[0] === "i" ? Float64Array.from(new Int32Array(bytes.buffer)) : new Float64Array(bytes.buffer);
}

for (const run of runs) {
  for (const name of ["update", "sample", "epoch", "hours"]) run[name] = decode(run[name]);
}

/** Return the index of the last number in a sorted array that is not greater than `value`, or 0. */
function findLast(sorted, value) {
  let low = 0, high = sorted.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] <= value) low = middle + 1; else high = middle;
  }
  return Math.max(0, low - 1);
}

/** Return the place of an update on the chosen axis, between two lines of the log if it has none of its own. */
function place(run, update) {
  if (settings.axis === "update" || !run.update.length) return update;
  if (settings.axis === "clock") return (run.start_s + 3600 * interpolate(run, run.hours, update)) * 1000;
  return interpolate(run, run[settings.axis], update);
}

function interpolate(run, axis, update) {
  const at = findLast(run.update, update);
  if (run.update[at] === update || at + 1 >= axis.length) return axis[at];
  const share = (update - run.update[at]) / (run.update[at + 1] - run.update[at]);
  return axis[at] + share * (axis[at + 1] - axis[at]);
}

/** Return short texts of the ticks of an axis, such as `250k` and `2e-4`. */
function formatTicks(ticks) {
  const largest = ticks.reduce((most, tick) => Math.max(most, Math.abs(tick)), 0);
  const [limit, prefix] = PREFIXES.find(([from]) => largest >= from) ?? [1, ""];
  const unit = prefix === "k" ? 1e3 : limit;
  return ticks.map((tick) => {
    const value = Number((tick / unit).toPrecision(10));
    if (value === 0) return "0";
    return (largest < 1e-2 || largest >= 1e13 ? value.toExponential() : String(value)) + prefix;
  });
}

/** Return the exponential moving average, which starts at the first value instead of zero; gaps stay. */
function smooth(values, weight) {
  let mean = 0, debias = 1;
  return values.map((value) => {
    if (!Number.isFinite(value)) return value;
    mean = weight * mean + (1 - weight) * value;
    debias *= weight;
    return mean / (1 - debias);
  });
}

function describe(run, update, value) {
  const name = runs.length > 1 ? `${runs[run].name}: ` : "";
  return `${name}${value} at update ${update}`;
}

class Chart {
  constructor(data) {
    this.data = data;
    this.element = document.getElementById(data.id);
    this.curves = data.curves.map((curve) => ({
      ...curve,
      levels: curve.levels.map((level) => ({ update: decode(level.update), y: decode(level.y) })),
    }));
    for (const { averages } of this.curves) if (averages) Object.assign(averages, { update: decode(averages.update), y: decode(averages.y) });
    this.maxDots = MAX_DOTS / data.curves.length;
    this.scale = null;
  }

  async build() {
    this.scale = settings.scale;
    this.remove();
    const item = JSON.parse(JSON.stringify(templates[this.scale]));
    [this.view] = (await Bokeh.embed.embed_item({ ...item, target_id: this.element.id })).roots;
    this.plot = this.view.model;
    this.sources = new Map();
    for (const renderer of this.plot.renderers) this.sources.set(renderer.data_source.name, renderer.data_source);
    if (matchMedia("(pointer: fine)").matches) this.plot.toolbar.tools[0].active = true;
    const range = this.plot.x_range;
    for (const name of ["start", "end"]) range.properties[name].change.connect(() => this.zoomed());
    if (this.scale === "linear") this.plot.left[0].formatter.doFormat = formatTicks;
    [this.ticker, this.formatter] = [this.plot.below[0].ticker, this.plot.below[0].formatter];
    this.formatter.doFormat = formatTicks;
    paint(this.plot);
    this.draw();
    this.element.dataset.state = "drawn";
  }

  /** Remove what bokeh has drawn: it keeps views and documents, also of elements that are gone. */
  remove() {
    if (!this.view) return;
    Bokeh.documents.splice(Bokeh.documents.indexOf(this.plot.document), 1);
    Bokeh.index.delete(this.view);
    this.view.remove();
    this.element.replaceChildren();
  }

  async update() {
    if (this.scale === null) return; // it is drawn when it comes into view
    if (this.scale !== settings.scale) await this.build(); else this.draw();
  }

  zoomed() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.draw({ keepRange: true }), 60);
  }

  /** Return the coarsest level that has enough points in view, with their places on the axis. */
  choose(curve, start, end) {
    const run = runs[curve.run];
    let chosen;
    for (const level of curve.levels) {
      const x = Array.from(level.update, (update) => place(run, update));
      const first = Number.isFinite(start) ? Math.max(0, findLast(x, start) - 1) : 0;
      const last = Number.isFinite(end) ? Math.min(x.length, findLast(x, end) + 3) : x.length;
      chosen = { x, y: level.y, update: level.update, first, last };
      if (last - first >= VISIBLE_POINTS) break;
    }
    return chosen;
  }

  draw({ keepRange = false } = {}) {
    const { x_range: range } = this.plot;
    if (!keepRange) this.setRange();
    let [start, end] = keepRange ? [range.start, range.end] : settings.range ?? [NaN, NaN];
    const empty = { x: [], y: [], label: [], marker: [] };
    for (const curve of this.curves) {
      const isHidden = settings.hidden.has(curve.run), { x, y, update, first, last } = this.choose(curve, start, end);
      // Outside of the view the overview stays, so that a reset shows the whole curve at once.
      const line = { x, y: Array.from(y, (value) => (settings.scale === "log" && value <= 0 ? NaN : value)) };
      const few = last - first <= this.maxDots;
      const inView = few ? { x: x.slice(first, last), y: line.y.slice(first, last) } : thin(line, first, last);
      const updates = few ? update.slice(first, last) : inView.index.map((at) => update[at]);
      const label = inView.y.map((value, at) => describe(curve.run, updates[at], value));
      const set = (name, columns) => { const source = this.sources.get(`${name}${curve.run}`); if (source) source.data = columns; };
      const renderer = this.plot.renderers.find((each) => each.name === `curve${curve.run}`);
      renderer.glyph.line_alpha = settings.smoothing ? 0.3 : 1;
      const dots = this.plot.renderers.find((each) => each.name === `dots${curve.run}`);
      dots.glyph.fill_alpha = dots.glyph.line_alpha = few ? (settings.smoothing ? 0.3 : 1) : 0;
      set("line", isHidden ? empty : { ...line, label: line.y.map(() => ""), marker: line.y.map(() => "") });
      set("points", isHidden ? empty : { x: inView.x, y: inView.y, label, marker: label });
      set("smooth", isHidden || !settings.smoothing ? { x: [], y: [] } : this.smoothed(curve, line));
      set("marks", isHidden ? empty : this.marks(curve, line, update));
      set("ends", isHidden ? empty : this.infinities(curve, line));
    }
    const [axis] = this.plot.below, isTime = settings.axis === "clock";
    axis.ticker = isTime ? new (Bokeh.Models.get("DatetimeTicker"))() : this.ticker;
    axis.formatter = isTime ? new (Bokeh.Models.get("DatetimeTickFormatter"))() : this.formatter;
    axis.axis_label = axisNames[settings.axis];
  }

  /** Return the smooth curve: of all values if the page has them, else of averages over parts of the run. */
  smoothed(curve, line) {
    const { update, y } = curve.averages ?? {};
    const x = update ? Array.from(update, (each) => place(runs[curve.run], each)) : line.x;
    const values = smooth(y ? Array.from(y) : line.y, settings.smoothing);
    return { x, y: settings.scale === "log" ? values.map((value) => (value <= 0 ? NaN : value)) : values };
  }

  /** Return the marks of the checkpoints, on the curve. */
  marks(curve, line, update) {
    const marks = { x: [], y: [], label: [], marker: [] }, run = runs[curve.run];
    for (const [at, tag] of run.checkpoints) {
      const index = findLast(update, at);
      if (!(update[index] <= at) || !Number.isFinite(line.y[index])) continue;
      marks.x.push(place(run, at));
      marks.y.push(line.y[index]);
      marks.marker.push("diamond");
      marks.label.push(`${runs.length > 1 ? `${run.name}: ` : ""}checkpoint ${tag}`);
    }
    return marks;
  }

  /** Return marks for infinite values, at the upper or lower edge of the curve. */
  infinities(curve, line) {
    const finite = line.y.filter(Number.isFinite);
    const [low, high] = finite.length ? [Math.min, Math.max].map((choose) => finite.reduce((a, b) => choose(a, b))) : [1, 1];
    const run = runs[curve.run];
    return {
      x: curve.infinite.map(([update]) => place(run, update)),
      y: curve.infinite.map(([, name]) => (name === "infinity" ? high : low)),
      marker: curve.infinite.map(([, name]) => (name === "infinity" ? "triangle" : "inverted_triangle")),
      label: curve.infinite.map(([update, name]) => describe(curve.run, update, name)),
    };
  }

  setRange() {
    const { x_range: range, y_range: vertical } = this.plot;
    if (settings.range) [range.start, range.end] = settings.range; else range.reset();
    vertical.reset();
  }
}

/** Return about `MAX_DOTS` points of a part of a line for the mouse to find, the extreme ones among them. */
function thin(line, first, last) {
  const index = [], step = Math.ceil((last - first) / (MAX_DOTS / 2));
  for (let start = first; start < last; start += step) {
    let low = start, high = start;
    for (let at = start; at < Math.min(last, start + step); at++) {
      if (!(line.y[at] >= line.y[low])) low = at;
      if (!(line.y[at] <= line.y[high])) high = at;
    }
    index.push(...new Set([low, high].sort((a, b) => a - b)));
  }
  return { index, x: index.map((at) => line.x[at]), y: index.map((at) => line.y[at]) };
}

/** Give a chart the colors of the theme of the page. */
function paint(plot) {
  const style = getComputedStyle(document.documentElement);
  const text = style.getPropertyValue("--text").trim(), line = style.getPropertyValue("--line").trim();
  for (const axis of [...plot.below, ...plot.left]) {
    Object.assign(axis, { major_label_text_color: text, axis_label_text_color: text, axis_line_color: line });
    Object.assign(axis, { major_tick_line_color: line, minor_tick_line_color: null, axis_label_text_font_style: "normal" });
    Object.assign(axis, { axis_label_text_font_size: "12px", major_label_text_font_size: "12px" });
  }
  for (const { name, glyph } of plot.renderers) if (name?.startsWith("marks")) glyph.line_color = text;
  for (const grid of plot.center) if (grid.grid_line_color !== undefined) grid.grid_line_color = line;
}

const drawn = new Map(charts.map((data) => [data.id, new Chart(data)]));
const others = [];
const waiting = new Map([...drawn].map(([id, chart]) => [id, () => chart.build()])); // what is not drawn yet, by id
for (const [id, item] of Object.entries(report.plots)) {
  waiting.set(id, async () => {
    const [{ model: plot }] = (await Bokeh.embed.embed_item({ ...item, target_id: id })).roots;
    if (plot.below) { others.push(plot); paint(plot); }
    document.getElementById(id).dataset.state = "drawn";
  });
}

function drawNow(id) {
  const draw = waiting.get(id);
  waiting.delete(id);
  return draw?.();
}

/** Draw the charts that are on the page but not in view, one after the other; those in closed groups wait. */
async function drawRest(pause = () => undefined) {
  for (const id of [...waiting.keys()]) {
    if (!document.getElementById(id).getClientRects().length) continue;
    await pause();
    await drawNow(id);
  }
}

const watcher = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    watcher.unobserve(target);
    drawNow(target.id);
  }
}, { rootMargin: "300px" });
for (const id of waiting.keys()) watcher.observe(document.getElementById(id));
// A page is printed without waiting for charts, so they are drawn before someone prints it.
addEventListener("load", () => drawRest(() => new Promise((resolve) => setTimeout(resolve, 50))));
addEventListener("beforeprint", () => drawRest());

const updateAll = () => Promise.all([...drawn.values()].map((chart) => chart.update()));

/** Call `change` with the value of a control, and draw all charts again. */
function listen(id, event, change) {
  const control = document.getElementById(id);
  control?.addEventListener(event, () => { change(control); updateAll(); });
}

listen("axis", "change", (control) => { settings.axis = control.value; settings.range = null; });
listen("log", "change", (control) => { settings.scale = control.checked ? "log" : "linear"; });
listen("smoothing", "input", (control) => {
  settings.smoothing = Number(control.value);
  document.getElementById("smoothing-value").textContent = control.value;
});
for (const id of ["from", "to"]) {
  listen(id, "change", () => {
    const [from, to] = ["from", "to"].map((name) => document.getElementById(name).valueAsNumber);
    const ends = runs.map((run) => place(run, run.update.at(-1) ?? 1));
    settings.range = Number.isNaN(from) && Number.isNaN(to) ? null : [from || 0, Number.isNaN(to) ? Math.max(...ends) : to];
  });
}
listen("whole", "click", () => {
  settings.range = null;
  for (const id of ["from", "to"]) document.getElementById(id).value = "";
});
for (const button of document.querySelectorAll("button[data-run]")) {
  button.addEventListener("click", () => {
    const run = Number(button.dataset.run);
    if (!settings.hidden.delete(run)) settings.hidden.add(run);
    button.setAttribute("aria-pressed", String(!settings.hidden.has(run)));
    updateAll();
  });
}

const dark = matchMedia("(prefers-color-scheme: dark)"), theme = document.getElementById("theme");
function setTheme(isDark) {
  document.documentElement.dataset.theme = isDark ? "dark" : "light";
  theme.setAttribute("aria-pressed", String(isDark));
  for (const chart of drawn.values()) if (chart.plot) paint(chart.plot);
  others.forEach(paint);
}
setTheme(dark.matches);
dark.addEventListener("change", (event) => setTheme(event.matches));
theme.addEventListener("click", () => setTheme(theme.getAttribute("aria-pressed") !== "true"));
})();
