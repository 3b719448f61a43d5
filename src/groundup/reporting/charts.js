"use strict";
// Curves of all runs over one another, by uPlot.

const AXES = { step: "optimizer steps", tokens: "tokens", epoch: "epochs", seconds: "training time" };
const SIDE = 14; // pixels to the right of a chart without names
const settings = { axis: "step", smooth: true, log: false, logx: false };

// Of a chart: what it shows of a run, as lines. ``log``: always on a logarithmic scale, because the values differ by factors.
const CHARTS = [
  { id: "loss", title: "Loss", unit: "nats per token", lines: (run) => losses(run, (loss) => loss) },
  { id: "perplexity", title: "Perplexity", unit: "e to the loss", log: true, lines: (run) => losses(run, (loss) => Math.exp(Math.min(loss, 50))) },
  { id: "bits", title: "Bits per byte", unit: "does not depend on the tokenizer", lines: bitsPerByte },
  { id: "accuracy", title: "Token accuracy", unit: "share of validation tokens that are the likeliest", lines: (run) => [validation(run, "token_accuracy")] },
  { id: "rate", title: "Learning rate", lines: (run) => [trained(run, "learning_rate")] },
  { id: "norm", title: "Gradient norm", unit: "before clipping", log: true, events: true, lines: (run) => [trained(run, "grad_norm")] },
  { id: "speed", title: "Speed", unit: "tokens a second", zero: true, lines: (run) => [trained(run, "tokens_per_second")] },
  { id: "scale", title: "Loss scale", unit: "of float16", log: true, lines: (run) => [trained(run, "loss_scale")] },
];
CHARTS[0].events = true;

function trained(run, column, kind = "train", change = (value) => value) {
  return { kind, places: run.train, values: (run.train[column] || []).map((value) => (value == null ? null : change(value))) };
}

function validation(run, column, kind = "validation", change = (value) => value) {
  return { kind, places: run.evaluations, values: (run.evaluations[column] || []).map((value) => (value == null ? null : change(value))) };
}

function losses(run, change) {
  const train = settings.smooth
    ? [{ ...trained(run, "loss", "each step", change), faint: true }, trained(run, "smooth", "train", change)]
    : [trained(run, "loss", "train", change)];
  return [...train, validation(run, "loss", "validation", change), validation(run, "ema_loss", "averaged weights", change), ...sources(run, change)];
}

/** Validation of each named source: its columns are NAME_loss and NAME_tokens. */
function sources(run, change) {
  return Object.keys(run.evaluations)
    .filter((column) => column.endsWith("_loss") && column !== "ema_loss" && run.evaluations[column.replace(/_loss$/, "_tokens")])
    .map((column) => validation(run, column, column.replace(/_loss$/, ""), change));
}

function bitsPerByte(run) {
  const train = run.tokens_per_byte ? [trained(run, settings.smooth ? "smooth" : "loss", "train", (loss) => (loss / Math.LN2) * run.tokens_per_byte)] : [];
  return [...train, validation(run, "bits_per_byte"), validation(run, "ema_bits_per_byte", "averaged weights")];
}

/** Seconds are shown in the unit that gives the axis handy numbers. */
function timeUnit(runs) {
  const most = Math.max(0, ...runs.map((run) => run.totals.seconds || 0));
  return most < 300 ? [1, "s"] : most < 18000 ? [60, "min"] : [3600, "h"];
}

/** The lines of a chart, ready to draw: with x, y, name and look. */
function linesOf(chart, runs) {
  const [unit] = settings.axis === "seconds" ? timeUnit(runs) : [1];
  const found = [];
  runs.forEach((run, number) => {
    for (const line of chart.lines(run)) {
      const log = chart.log || settings.log;
      const points = line.values.map((y, index) => [line.places[settings.axis][index], y])
        .filter(([x]) => x != null && !(settings.logx && x <= 0))
        .map(([x, y]) => [x / unit, y == null || (log && y <= 0) ? null : y]);
      if (!points.some(([, y]) => y != null)) continue;
      const own = look(number);
      // Validation is the stronger line, with marks; a run alone has a dash for each kind of line.
      const strong = line.kind === "validation";
      const alone = runs.length === 1;
      found.push({
        run, x: points.map(([x]) => x), y: points.map(([, y]) => y), faint: line.faint,
        name: alone ? line.kind : `${run.label} · ${line.kind}`, label: alone ? line.kind : run.label, kind: line.kind,
        colour: alone && strong ? colour("--run-1") : alone && !["train", "each step"].includes(line.kind) ? look(2 + found.length).colour : own.colour,
        dash: line.faint ? [] : alone ? (strong || line.kind === "train" ? [] : [6, 3]) : own.dash,
        width: line.faint ? 1 : strong ? 2.4 : 1.6, shape: strong ? own.shape : null,
      });
    }
  });
  return found;
}

class Chart {
  constructor(chart, body) {
    this.chart = chart;
    this.caption = element("figcaption", {}, chart.title, " ", chart.unit ? element("small", {}, chart.unit) : null);
    this.place = element("div", { class: "plot", tabindex: "0", role: "img" });
    this.numbers = element("div");
    this.figure = element("figure", { class: "chart", id: `chart-${chart.id}` }, this.caption, this.place, this.numbers);
    body.append(this.figure);
    this.place.addEventListener("keydown", (event) => this.move(event));
    new ResizeObserver(() => this.plot && this.plot.setSize(this.size())).observe(this.place);
  }

  size() {
    return { width: Math.max(240, this.place.clientWidth), height: window.innerWidth < 600 ? 230 : 280 };
  }

  draw(runs, anew) {
    this.runs = runs;
    this.lines = linesOf(this.chart, runs);
    this.figure.hidden = this.lines.length === 0;
    if (this.figure.hidden) { if (this.plot) this.plot.destroy(); this.plot = null; return; }
    this.place.setAttribute("aria-label", this.words());
    const data = uPlot.join(this.lines.map((line) => [line.x, line.y]));
    const names = this.lines.map((line) => line.name).join("\n");
    if (this.plot && !anew && names === this.names) {
      this.plot.setData(data, !this.enlarged());
      this.plot.setLegend({ idx: this.plot.cursor.idx ?? null });
    } else this.build(data);
    this.names = names;
    this.numbers.replaceChildren(folded(`numbers-${this.chart.id}`, "As a table", () => this.table()));
  }

  enlarged() {
    const x = this.plot.data[0], scale = this.plot.scales.x;
    return scale.min > x[0] || scale.max < x[x.length - 1];
  }

  build(data) {
    if (this.plot) this.plot.destroy();
    const ink = colour("--soft"), grid = { stroke: colour("--grid"), width: 1 };
    const font = "12px system-ui, sans-serif";
    const log = this.chart.log || settings.log;
    // Over many powers of ten, a line for each of them is enough.
    const powers = (plot, places) => (log && places.length > 30 ? places.map((place) => (Number.isInteger(Math.log10(place)) ? place : null)) : places);
    const unit = settings.axis === "seconds" ? ` (${timeUnit(this.runs)[1]})` : "";
    const axis = (more) => ({ stroke: ink, font, labelFont: font, grid, ticks: grid, ...more });
    const options = {
      ...this.size(),
      padding: [10, this.room(), 0, 0],
      scales: {
        x: { time: false, distr: settings.logx ? 3 : 1 },
        y: { distr: log ? 3 : 1, range: this.chart.zero && !log ? (plot, low, high) => [0, (high || 1) * 1.08] : undefined },
      },
      axes: [
        axis({ label: AXES[settings.axis] + unit, labelSize: 18, size: 34, values: (plot, places) => places.map(short) }),
        axis({ size: 62, grid: { ...grid, filter: powers }, ticks: { ...grid, filter: powers }, values: (plot, places) => places.map(short) }),
      ],
      cursor: { drag: { x: true, y: false }, points: { size: 7 }, y: false },
      series: [
        { label: AXES[settings.axis] + unit, value: (plot, value) => (value == null ? "–" : figure(value)) },
        ...this.lines.map((line) => ({
          label: line.name, stroke: line.faint ? faint(line.colour) : line.colour, width: line.width, dash: line.dash,
          points: { show: line.y.filter((y) => y != null).length === 1 && !line.shape }, class: line.faint ? "quiet" : "line",
          value: (plot, value, series, index) => figure(index == null ? lastOf(this.lines[series - 1].y) : nearest(plot, series, index)),
        })),
      ],
      hooks: { draw: [(plot) => this.overlay(plot)], init: [(plot) => this.legend(plot)] },
    };
    this.plot = new uPlot(options, data, this.place);
  }

  /** Room on the right for names beside the ends of lines, where there is more than one. */
  room() {
    const names = new Set(this.lines.filter((line) => !line.faint).map((line) => shown(line.label)));
    return names.size < 2 ? SIDE : Math.min(100, 14 + 6.8 * Math.max(...[...names].map((name) => name.length)));
  }

  legend(plot) {
    plot.root.querySelectorAll(".u-legend .u-series").forEach((row, index) => {
      if (index === 0) return;
      const name = row.querySelector("th");
      name.prepend(key(this.lines[index - 1]));
      name.tabIndex = 0;
      name.setAttribute("role", "button");
      name.addEventListener("keydown", (event) => {
        event.stopPropagation();
        if (event.key === "Enter" || event.key === " ") { event.preventDefault(); name.click(); }
      });
    });
  }

  /** Marks on the lines of validation, names at their ends, and ticks where something was unusual. */
  overlay(plot) {
    const context = plot.ctx, ratio = uPlot.pxRatio, box = plot.bbox;
    context.save();
    context.font = `${11 * ratio}px system-ui, sans-serif`;
    context.textBaseline = "middle";
    context.textAlign = "left";
    const ends = [];
    this.lines.forEach((line, index) => {
      if (!plot.series[index + 1].show || line.faint) return;
      context.fillStyle = context.strokeStyle = line.colour;
      let before = -Infinity, end = null;
      line.x.forEach((x, point) => {
        if (line.y[point] == null || x < plot.scales.x.min || x > plot.scales.x.max) return;
        const at = [plot.valToPos(x, "x", true), plot.valToPos(line.y[point], "y", true)];
        if (line.shape && at[0] - before > 14 * ratio) { mark(context, line.shape, at[0], at[1], 3.4 * ratio); before = at[0]; }
        end = at;
      });
      if (end) ends.push({ y: end[1], line });
    });
    // One name a run, or a line, pushed apart where they would lie on one another.
    const named = [];
    for (const end of ends.sort((one, other) => (other.line.width - one.line.width))) {
      if (!named.some((other) => other.line.label === end.line.label)) named.push(end);
    }
    const row = 12 * ratio;
    named.sort((one, other) => one.y - other.y);
    named.forEach((end, index) => { if (index) end.y = Math.max(end.y, named[index - 1].y + row); });
    let floor = box.top + box.height;
    for (const end of this.room() > SIDE ? named.reverse() : []) {
      end.y = Math.min(end.y, floor);
      floor = end.y - row;
      context.fillStyle = end.line.colour;
      context.fillText(shown(end.line.label), box.left + box.width + 6 * ratio, end.y);
    }
    if (this.chart.events) this.ticks(plot, context, box, ratio);
    context.restore();
  }

  ticks(plot, context, box, ratio) {
    const [unit] = settings.axis === "seconds" ? timeUnit(this.runs) : [1];
    context.fillStyle = colour("--bad");
    for (const run of this.runs) {
      for (const event of run.events) {
        const index = run.train.step.findIndex((step) => step >= event.step);
        if (index < 0) continue;
        const x = plot.valToPos(run.train[settings.axis][index] / unit, "x", true);
        if (x < box.left || x > box.left + box.width) continue;
        context.beginPath();
        context.moveTo(x - 4 * ratio, box.top - 8 * ratio); context.lineTo(x + 4 * ratio, box.top - 8 * ratio); context.lineTo(x, box.top);
        context.fill();
      }
    }
  }

  move(event) {
    if (!this.plot || !["ArrowLeft", "ArrowRight", "Home", "End", "Escape"].includes(event.key)) return;
    event.preventDefault();
    const x = this.plot.data[0], last = x.length - 1;
    if (event.key === "Escape") { this.plot.setCursor({ left: -10, top: -10 }); this.at = null; return; }
    const stride = event.shiftKey ? Math.max(1, Math.round(last / 20)) : 1;
    const from = this.at == null ? last : this.at;
    this.at = { Home: 0, End: last, ArrowLeft: Math.max(0, from - stride), ArrowRight: Math.min(last, from + stride) }[event.key];
    this.plot.setCursor({ left: this.plot.valToPos(x[this.at], "x"), top: 10 });
  }

  words() {
    const parts = this.lines.filter((line) => !line.faint).map((line) => {
      const there = line.y.filter((y) => y != null);
      return `${line.name} from ${figure(there[0])} to ${figure(there[there.length - 1])}, between ${figure(Math.min(...there))} and ${figure(Math.max(...there))}`;
    });
    return `${this.chart.title} against ${AXES[settings.axis]}: ${parts.join("; ")}. Arrow keys move along it.`;
  }

  table() {
    const lines = this.lines.filter((line) => !line.faint);
    const rows = lines.flatMap((line) => spread(line.x.length, 25).map((index) => [figure(line.x[index]), line.name, figure(line.y[index])]));
    return table([AXES[settings.axis], "line", this.chart.title], rows, `${this.chart.title} as a table`);
  }
}

function shown(label) {
  return label.length > 13 ? `${label.slice(0, 12)}…` : label;
}

function faint(hex) {
  return `${hex}55`;
}

function lastOf(values) {
  return values.findLast((value) => value != null);
}

/** A line's value at a place, or its last one before: lines of other runs have points at other places. */
function nearest(plot, series, index) {
  const values = plot.data[series];
  for (let at = index; at >= 0; at--) if (values[at] != null) return values[at];
  return null;
}

const charts = [];
function drawCharts(runs, anew) {
  const body = document.querySelector("#curves .body");
  if (!charts.length) charts.push(...CHARTS.map((chart) => new Chart(chart, body)));
  for (const chart of charts) chart.draw(runs, anew);
}
