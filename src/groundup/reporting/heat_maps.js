"use strict";
// Health as heat maps: a row for each layer, a column for each step that was measured.

const MEASURES = {
  grad_norm: ["Gradient norm", "should differ little between layers, and neither vanish nor explode"],
  weight_norm: ["Weight norm", "grows slowly; decay holds it"],
  update_ratio: ["Size of updates", "change of the weights over their norm; about 0.001 is usual"],
  activation_rms: ["Activations", "root mean square of each layer's output"],
  attention_logit_max: ["Largest attention logit", "where it runs away, attention collapses onto one token"],
  dead_units: ["Dead units", "share of units of the MLP that never fire"],
};

// Viridis: its lightness grows all along, so it reads the same without colour.
const SCALE = [[68, 1, 84], [72, 40, 120], [62, 74, 137], [49, 104, 142], [38, 130, 142], [31, 158, 137], [53, 183, 121], [109, 205, 89], [180, 222, 44], [253, 231, 37]];

function heat(share) {
  const place = Math.min(1, Math.max(0, share)) * (SCALE.length - 1), below = Math.min(SCALE.length - 2, Math.floor(place));
  const mixed = SCALE[below].map((part, index) => Math.round(part + (SCALE[below + 1][index] - part) * (place - below)));
  return `rgb(${mixed.join(",")})`;
}

class HeatMap {
  constructor(name, measure, steps) {
    [this.title, this.meaning] = MEASURES[name] || [name.replaceAll("_", " "), ""];
    this.blocks = measure.blocks; this.values = measure.values; this.steps = steps;
    this.at = [this.blocks.length - 1, steps.length - 1];
    const all = measure.values.flat().filter((value) => value != null);
    this.low = Math.min(...all); this.high = Math.max(...all); this.any = all.length > 0;
    this.log = this.low > 0 && this.high / this.low > 20;
    this.canvas = element("canvas", { tabindex: "0", role: "img", "aria-label": this.words() });
    this.output = element("output", { "aria-live": "polite" }, "Point at a cell, or move with the arrow keys.");
    this.figure = element("figure", { class: "chart map" },
      element("figcaption", {}, this.title, " ", element("small", {}, this.meaning)),
      this.canvas, this.output, this.legend(),
      folded(`map-${name}`, "As a table", () => this.table()));
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerdown", (event) => this.point(event));
    this.canvas.addEventListener("keydown", (event) => this.move(event));
    new ResizeObserver(() => this.draw()).observe(this.canvas);
  }

  share(value) {
    if (this.high === this.low) return 0.5;
    if (this.log) return Math.log(value / this.low) / Math.log(this.high / this.low);
    return (value - this.low) / (this.high - this.low);
  }

  where(value) {
    for (let block = 0; block < this.blocks.length; block++) {
      const step = this.values[block].indexOf(value);
      if (step >= 0) return `${this.blocks[block]}, step ${figure(this.steps[step])}`;
    }
    return "";
  }

  words() {
    if (!this.any) return `${this.title}: no finite value.`;
    return `${this.title} of ${this.blocks.length} layers at ${this.steps.length} steps: lowest ${figure(this.low)} (${this.where(this.low)}), highest ${figure(this.high)} (${this.where(this.high)}). Arrow keys move over its cells.`;
  }

  legend() {
    const all = this.values.flat().filter((value) => value != null);
    const canvas = element("canvas", { width: 100, height: 1, "aria-hidden": "true" });
    const context = canvas.getContext("2d");
    for (let x = 0; x < 100; x++) { context.fillStyle = heat(x / 99); context.fillRect(x, 0, 1, 1); }
    const text = this.any
      ? `${figure(this.low)} (${this.where(this.low)}) to ${figure(this.high)} (${this.where(this.high)})${this.log ? ", logarithmic" : ""}${all.length < this.blocks.length * this.steps.length ? "; crossed out: not finite" : ""}`
      : "no finite value";
    return element("div", { class: "scale" }, canvas, element("span", {}, text));
  }

  draw() {
    const width = this.canvas.clientWidth, row = this.blocks.length > 30 ? 10 : this.blocks.length > 14 ? 14 : 20;
    if (!width) return;
    const ratio = window.devicePixelRatio || 1, height = this.blocks.length * row + 20;
    this.canvas.width = width * ratio; this.canvas.height = height * ratio;
    this.canvas.style.height = `${height}px`;
    const context = this.canvas.getContext("2d");
    context.scale(ratio, ratio);
    context.font = "11px system-ui, sans-serif"; context.textBaseline = "middle";
    this.left = 8 + Math.max(...this.blocks.map((block) => context.measureText(block).width));
    this.row = row; this.column = (width - this.left - 1) / this.steps.length;
    this.blocks.forEach((block, y) => {
      if (row >= 12 || y % 4 === 0) { context.fillStyle = colour("--soft"); context.fillText(block, 0, (y + 0.5) * row); }
      this.values[y].forEach((value, x) => {
        const left = this.left + x * this.column, wide = Math.max(1, this.column + 0.5);
        if (value == null) {
          context.strokeStyle = colour("--soft"); context.beginPath();
          context.moveTo(left, y * row); context.lineTo(left + this.column, (y + 1) * row); context.stroke();
        } else { context.fillStyle = heat(this.share(value)); context.fillRect(left, y * row, wide, row - 1); }
      });
    });
    context.fillStyle = colour("--soft");
    const last = `step ${figure(this.steps[this.steps.length - 1])}`;
    context.fillText(`step ${figure(this.steps[0])}`, this.left, height - 8);
    if (this.steps.length > 1) context.fillText(last, width - context.measureText(last).width - 2, height - 8);
    if (this.chosen) {
      context.strokeStyle = colour("--ink"); context.lineWidth = 2;
      context.strokeRect(this.left + this.at[1] * this.column, this.at[0] * row, Math.max(3, this.column), row - 1);
    }
  }

  point(event) {
    const box = this.canvas.getBoundingClientRect();
    const x = Math.floor((event.clientX - box.left - this.left) / this.column), y = Math.floor((event.clientY - box.top) / this.row);
    if (x >= 0 && x < this.steps.length && y >= 0 && y < this.blocks.length) this.choose(y, x);
  }

  move(event) {
    const by = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!by) return;
    event.preventDefault();
    this.choose(Math.min(this.blocks.length - 1, Math.max(0, this.at[0] + by[0])), Math.min(this.steps.length - 1, Math.max(0, this.at[1] + by[1])));
  }

  choose(block, step) {
    this.at = [block, step]; this.chosen = true;
    const value = this.values[block][step];
    this.output.textContent = `${this.blocks[block]}, step ${figure(this.steps[step])}: ${value == null ? "not finite" : figure(value)}`;
    this.draw();
  }

  table() {
    const steps = spread(this.steps.length, 12);
    const rows = this.blocks.map((block, y) => [block, ...steps.map((x) => figure(this.values[y][x]))]);
    return table(["layer", ...steps.map((x) => `step ${figure(this.steps[x])}`)], rows, `${this.title} as a table`);
  }
}

let maps = [];
function drawHealth(runs) {
  const body = document.querySelector("#health .body");
  const measured = runs.filter((run) => run.health.steps.length);
  document.getElementById("health").hidden = measured.length === 0;
  maps = [];
  body.replaceChildren(...measured.map((run) => {
    const made = () => {
      const own = Object.entries(run.health.measures).map(([name, measure]) => new HeatMap(name, measure, run.health.steps));
      maps.push(...own);
      return element("div", { class: "maps" }, own.map((map) => map.figure));
    };
    if (measured.length === 1) return made();
    return folded(`health-${run.path}`, run.label, made);
  }));
}
