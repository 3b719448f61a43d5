"use strict";
// What the other scripts of the page share: elements, numbers as text, and how a run looks.
// Texts of samples, names and configurations are somebody else's: they become text nodes, never HTML.

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...children.flat().filter((child) => child != null));
  return made;
}

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}


/** A number for people: four digits that count, thousands in groups. */
function figure(value) {
  if (value == null) return "–";
  if (typeof value !== "number") return String(value);
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e12)) return value.toExponential(2);
  if (Number.isInteger(value) || size >= 1000) return Math.round(value).toLocaleString("en-US");
  return String(Number(value.toPrecision(4)));
}

/** The same for an axis, where there is little room. */
function short(value) {
  if (value == null) return "";
  if (Math.abs(value) >= 1e15) return value.toExponential(0);
  for (const [size, letter] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (Math.abs(value) >= size) return Number((value / size).toPrecision(3)) + letter;
  }
  if (value !== 0 && Math.abs(value) < 1e-3) return value.toExponential(0);
  return String(Number(value.toPrecision(3)));
}

// As the words of the page and the terminal say it.
function duration(seconds) {
  if (seconds == null) return "–";
  const whole = Math.round(seconds), two = (number) => String(number).padStart(2, "0");
  if (whole < 60) return `${whole}s`;
  if (whole < 3600) return `${Math.floor(whole / 60)}m${two(whole % 60)}s`;
  return `${Math.floor(whole / 3600)}h${two(Math.floor((whole % 3600) / 60))}m`;
}

// A run is told by its colour, and without any by the dashes of its lines and the shape of its marks.
const DASHES = [[], [9, 4], [3, 3], [12, 3, 3, 3], [6, 2], [2, 5], [14, 5], [4, 2, 1, 2]];
const SHAPES = ["circle", "square", "triangle", "diamond", "cross"];

function look(number) {
  return { colour: colour(`--run-${number % 8}`), dash: DASHES[number % DASHES.length], shape: SHAPES[number % SHAPES.length] };
}

function mark(context, shape, x, y, size) {
  context.beginPath();
  if (shape === "circle") context.arc(x, y, size, 0, 2 * Math.PI);
  if (shape === "square") context.rect(x - size, y - size, 2 * size, 2 * size);
  if (shape === "triangle") { context.moveTo(x, y - size); context.lineTo(x + size, y + size); context.lineTo(x - size, y + size); context.closePath(); }
  if (shape === "diamond") { context.moveTo(x, y - size); context.lineTo(x + size, y); context.lineTo(x, y + size); context.lineTo(x - size, y); context.closePath(); }
  if (shape === "cross") { context.moveTo(x - size, y - size); context.lineTo(x + size, y + size); context.moveTo(x + size, y - size); context.lineTo(x - size, y + size); }
  if (shape === "cross") context.stroke(); else context.fill();
}

/** A piece of a line as it is in the charts, for legends. */
function key(line) {
  const ratio = window.devicePixelRatio || 1;
  const canvas = element("canvas", { class: "key", width: 44 * ratio, height: 14 * ratio, "aria-hidden": "true" });
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  context.strokeStyle = context.fillStyle = line.colour;
  context.globalAlpha = line.faint ? 0.5 : 1;
  context.lineWidth = line.width || 2;
  context.setLineDash(line.dash || []);
  context.beginPath(); context.moveTo(1, 7); context.lineTo(43, 7); context.stroke();
  context.setLineDash([]);
  if (line.shape) mark(context, line.shape, 22, 7, 4);
  return canvas;
}

function table(head, rows, caption) {
  return element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    element("table", {},
      element("thead", {}, element("tr", {}, head.map((name) => element("th", { scope: "col" }, name)))),
      element("tbody", {}, rows.map((row) => element("tr", {}, row.map((cell, index) => index === 0
        ? element("th", { scope: "row" }, cell)
        : element("td", cell && cell.best ? { class: "best" } : {}, cell && cell.text !== undefined ? cell.text : cell)))))));
}

/** A part that opens, made when it is opened; it stays open when the page is drawn anew. */
const opened = new Set();
function folded(id, title, make) {
  const made = element("details", { open: opened.has(id) }, element("summary", {}, title));
  const fill = () => { if (made.children.length === 1) made.append(make()); };
  if (made.open) fill();
  made.addEventListener("toggle", () => { if (made.open) { opened.add(id); fill(); } else opened.delete(id); });
  return made;
}

function spread(count, most) {
  if (count <= most) return [...Array(count).keys()];
  return [...new Set([...Array(most).keys()].map((index) => Math.round((index * (count - 1)) / (most - 1))))];
}
