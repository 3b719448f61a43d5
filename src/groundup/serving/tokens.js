"use strict";
// Every text from the model or the user becomes textContent, never markup.
const by = (id) => document.getElementById(id);

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

const percent = (p) => (p === 0 ? "–" : p < 0.0005 ? "<0.1%" : p > 0.9995 && p < 1 ? ">99.9%" : (100 * p).toFixed(1) + "%");
const count = (n) => n.toLocaleString("en");

// --- asking the server ---

async function ask(name, question) {
  const response = await fetch("tokens/" + name, {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(question),
  });
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error || response.status);
  return answer;
}

function say(place, line, wrong) {
  by(place).textContent = line;
  by(place).classList.toggle("wrong", Boolean(wrong));
}

function sayModel(answer) {
  say("model", `${answer.checkpoint}: ${count(answer.vocab_size)} tokens, context ${count(answer.n_positions)}`);
}

const failed = (place, error) =>
  say(place, error instanceof TypeError ? "No answer: groundup watch has ended, or the tunnel is closed." : error.message, true);

// --- what comes next ---

// Of each setting: from, to, step, the value that changes nothing, the command line's default.
const SETTINGS = {
  temperature: { name: "temperature", low: 0, high: 2, step: 0.05, off: 1, usual: 0.8, show: (v) => (v === 0 ? "greedy" : v.toFixed(2)) },
  top_k: { name: "top-k", low: 0, high: 200, step: 1, off: 0, usual: 50, show: (v) => (v === 0 ? "off" : String(v)) },
  top_p: { name: "top-p", low: 0.02, high: 1, step: 0.01, off: 1, usual: 1, show: (v) => (v === 1 ? "off" : v.toFixed(2)) },
  min_p: { name: "min-p", low: 0, high: 0.5, step: 0.005, off: 0, usual: 0, show: (v) => (v === 0 ? "off" : v.toFixed(3)) },
};
let written = [];
let drawing = 0; // tokens still to draw

function makeSettings() {
  for (const [key, setting] of Object.entries(SETTINGS)) {
    const row = element("div", "setting");
    const label = element("label", "", setting.name);
    const slider = element("input");
    const shown = element("output");
    Object.assign(slider, { type: "range", id: key, min: setting.low, max: setting.high, step: setting.step, value: setting.off });
    label.htmlFor = key;
    shown.htmlFor = key;
    setting.set = (value) => { slider.value = value; setting.update(); };
    setting.update = () => { shown.textContent = setting.show(Number(slider.value)); slider.setAttribute("aria-valuetext", shown.textContent); };
    slider.addEventListener("input", () => { setting.update(); soon(); });
    row.append(label, slider, shown);
    by("settings").append(row);
    setting.update();
  }
}

function question(draw) {
  const seed = Number(by("seed").value);
  const asked = { prompt: by("prompt").value, written: written.map((token) => token.id), seed: Number.isSafeInteger(seed) ? seed : 0, draw };
  for (const key of Object.keys(SETTINGS)) asked[key] = Number(by(key).value);
  return asked;
}

let timer = 0;
function soon(milliseconds = 80) {
  clearTimeout(timer);
  timer = setTimeout(() => next(false), milliseconds);
}

// One question at a time; what is wanted meanwhile waits for its answer, so that moving a slider sends no crowd of them.
let wanted = null;
let asking = false;
let version = 0; // of the text: an answer about an older one is not shown

async function next(draw) {
  clearTimeout(timer);
  wanted = { draw: draw || Boolean(wanted && wanted.draw) };
  if (asking) return;
  asking = true;
  while (wanted) {
    const now = wanted, about = version;
    wanted = null;
    try {
      const answer = await ask("next", question(now.draw));
      if (about !== version) continue;
      if (answer.waiting) {
        drawing = 0;
        say("model", answer.waiting);
        soon(5000);
      } else {
        showNext(answer);
        drawing = answer.ended || answer.full ? 0 : Math.max(0, drawing - (now.draw ? 1 : 0));
      }
    } catch (error) {
      drawing = 0;
      failed("summary", error);
    }
    if (drawing) wanted = { draw: true };
    by("draw-many").textContent = drawing ? "Stop" : "Draw 20";
  }
  asking = false;
}

/** The text is another one now, by hand. */
function change(tokens) {
  written = tokens;
  drawing = 0;
  version += 1;
}

function showNext(answer) {
  sayModel(answer);
  written = answer.written;
  const cut = answer.prompt_tokens_cut ? `, the ${count(answer.prompt_tokens_cut)} before them do not fit the context` : "";
  by("prompt-facts").textContent = `${count(answer.prompt_tokens)} token${answer.prompt_tokens === 1 ? "" : "s"}${cut}`;
  by("written").replaceChildren(...written.map((token, place) => {
    const chip = element("button", "token", token.label);
    chip.type = "button";
    chip.title = `token ${token.id}: back to before it`;
    chip.addEventListener("click", () => { change(written.slice(0, place)); next(false); });
    return chip;
  }));
  by("written").scrollTop = by("written").scrollHeight;
  by("as-text").textContent = answer.text;
  const end = answer.ended ? " The text has ended here." : answer.full ? " That is as long as it gets here." : "";
  say("summary",
    `The model is unsure by ${answer.entropy_bits.toFixed(2)} bits, as among ${(2 ** answer.entropy_bits).toPrecision(3)} equal tokens; ` +
    `what is drawn from: ${answer.entropy_bits_drawn.toFixed(2)} bits, ${count(answer.left)} of ${count(answer.vocab_size)} tokens left.${end}`);
  showBars(answer);
}

function showBars(answer) {
  const most = Math.max(...answer.likeliest.map((token) => Math.max(token.probability, token.drawn)));
  const list = by("bars");
  while (list.children.length > answer.likeliest.length) list.lastChild.remove();
  while (list.children.length < answer.likeliest.length) list.append(barRow());
  answer.likeliest.forEach((token, place) => {
    const button = list.children[place].firstChild;
    const [name, tracks, before, after] = button.children;
    name.textContent = token.label;
    setBar(tracks.children[0], token.probability / most);
    setBar(tracks.children[1], token.drawn / most);
    before.textContent = percent(token.probability);
    after.textContent = token.drawn === 0 ? "out" : percent(token.drawn);
    button.classList.toggle("gone", token.drawn === 0);
    button.token = token;
    button.title = `token ${token.id}`;
    button.setAttribute("aria-label",
      `${token.label}: model ${percent(token.probability)}, ${token.drawn === 0 ? "never drawn" : "drawn " + percent(token.drawn)}`);
  });
  const rest = answer.rest;
  by("rest").textContent = rest.tokens
    ? `All ${count(rest.tokens)} others together: ${percent(rest.probability)}; ` +
      (rest.left ? `${count(rest.left)} of them are left, with ${percent(rest.drawn)}.` : "none of them is left.")
    : "These are all tokens.";
}

function barRow() {
  const row = element("li");
  const button = element("button");
  const tracks = element("span", "tracks");
  button.type = "button";
  tracks.append(element("span", "bar before"), element("span", "bar after"));
  button.append(element("span", "token name"), tracks, element("span", "number before"), element("span", "number"));
  button.addEventListener("click", () => { change([...written, button.token]); next(false); });
  row.append(button);
  return row;
}

function setBar(bar, share) {
  bar.style.width = 100 * share + "%";
  bar.classList.toggle("none", share === 0);
}

// --- how surprising a text is ---

const LEVELS = [[1, "up to 1"], [4, "4"], [7, "7"], [11, "11"], [Infinity, "more"]];
const level = (bits) => LEVELS.findIndex(([most]) => bits <= most);

async function look() {
  by("look").disabled = true;
  say("text-summary", "Looking…");
  try {
    const answer = await ask("text", { text: by("text").value });
    if (answer.waiting) say("text-summary", answer.waiting);
    else showSurprise(answer);
  } catch (error) {
    failed("text-summary", error);
  }
  by("look").disabled = false;
}

function showSurprise(answer) {
  sayModel(answer);
  const perplexity = answer.perplexity === null ? "beyond counting" : answer.perplexity.toPrecision(4);
  say("text-summary",
    `${count(answer.tokens.length)} tokens: loss ${answer.loss.toFixed(4)}, perplexity ${perplexity}, ${answer.bits_per_byte.toFixed(3)} bits per byte`);
  by("scale").hidden = by("table").hidden = false;
  by("detail").hidden = true;
  let first = 0;
  by("surprise").replaceChildren(...answer.pieces.flatMap((piece, place) => {
    const tokens = answer.tokens.slice(first, (first += piece.tokens));
    return showPiece(piece, tokens, place);
  }));
  by("table").querySelector("tbody").replaceChildren(...answer.tokens.map(tableRow));
}

function showPiece(piece, tokens, place) {
  const bits = tokens.reduce((sum, token) => sum + token.bits, 0);
  const shown = element("span", `token piece level-${level(bits)}`);
  // A line break has no width: a sign stands for it, and the break itself comes after, before the rest of the piece.
  const [, head, rest] = piece.text.match(/^((?:[^]*\n)?)([^]*)$/);
  shown.append(element("span", "", head ? head.replace(/\n/g, "↵") : rest), element("span", "bits", bits.toFixed(1)));
  shown.tabIndex = place === 0 ? 0 : -1; // one stop of the tab key; arrows go on from there
  shown.setAttribute("role", "button");
  shown.setAttribute("aria-label", `${piece.text}: ${bits.toFixed(1)} bits`);
  const show = () => showDetail(shown, piece, tokens, bits);
  for (const event of ["mouseenter", "focus", "click"]) shown.addEventListener(event, show);
  shown.addEventListener("keydown", (event) => {
    const pieces = [...by("surprise").querySelectorAll(".piece")];
    const to = pieces[pieces.indexOf(shown) + ({ ArrowRight: 1, ArrowLeft: -1 }[event.key] || 0)];
    if (!to || to === shown) return;
    event.preventDefault();
    shown.tabIndex = -1;
    to.tabIndex = 0;
    to.focus();
  });
  const breaks = "\n".repeat(head.split("\n").length - 1);
  return head ? [shown, document.createTextNode(breaks), element("span", "token", rest)] : [shown];
}

function showDetail(shown, piece, tokens, bits) {
  for (const other of by("surprise").querySelectorAll(".chosen")) other.classList.remove("chosen");
  shown.classList.add("chosen");
  const lines = tokens.map((token) => {
    const line = element("p");
    const rank = token.rank === 0 ? "the likeliest" : `${count(token.rank)} likelier`;
    line.append(element("b", "token", token.label), ` ${token.bits.toFixed(2)} bits, ${percent(token.probability)}, ${rank}. Likeliest there: `);
    token.top.forEach((other, place) => line.append(place ? ", " : "", element("span", "token", other.label), " " + percent(other.probability)));
    return line;
  });
  by("detail").replaceChildren(...lines);
  if (tokens.length > 1) by("detail").prepend(element("p", "note", `${tokens.length} tokens are one character here: ${bits.toFixed(2)} bits together`));
  by("detail").hidden = false;
}

function tableRow(token) {
  const row = element("tr");
  const cells = [token.label, token.bits.toFixed(2), count(token.rank), percent(token.probability),
    token.top.map((other) => `${other.label} ${percent(other.probability)}`).join("  ")];
  cells.forEach((text, place) => row.append(element("td", place % 4 ? "" : "token", text)));
  return row;
}

// --- start ---

makeSettings();
for (const [most, name] of LEVELS) by("scale").append(element("span", `level-${level(most)}`, name));
by("prompt").addEventListener("input", () => { change([]); soon(250); });
by("seed").addEventListener("change", () => soon());
by("draw").addEventListener("click", () => { drawing = 0; next(true); });
by("draw-many").addEventListener("click", () => { if (drawing) { drawing = 0; } else { drawing = 20; next(true); } });
by("back").addEventListener("click", () => { change(written.slice(0, -1)); next(false); });
by("clear").addEventListener("click", () => { change([]); next(false); });
for (const kind of ["own", "usual"])
  by(kind).addEventListener("click", () => {
    for (const setting of Object.values(SETTINGS)) setting.set(kind === "own" ? setting.off : setting.usual);
    soon(0);
  });
by("look").addEventListener("click", look);
by("numbers").addEventListener("change", () => by("surprise").classList.toggle("numbered", by("numbers").checked));
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
function setTheme(dark) {
  document.documentElement.style.colorScheme = dark ? "dark" : "light";
  by("theme").textContent = dark ? "Light" : "Dark";
  by("theme").setAttribute("aria-label", `Switch to ${dark ? "light" : "dark"} colours`);
}
setTheme(prefersDark.matches);
prefersDark.addEventListener("change", (event) => setTheme(event.matches));
by("theme").addEventListener("click", () => setTheme(by("theme").textContent === "Dark"));
next(false);
