"use strict";
// Draws the page, and keeps it up to date where a server is behind it.

const POLL_MILLISECONDS = 3000;
const live = document.documentElement.dataset.live === "live";
let data = JSON.parse(document.getElementById("data").textContent);
const drawn = new Map();

/** Draw a part where what it shows has changed: what somebody has opened or chosen stays. */
function part(name, shows, draw) {
  const seen = JSON.stringify(shows);
  if (drawn.get(name) === seen) return;
  drawn.set(name, seen);
  draw();
}

function draw(anew) {
  const { runs, differences } = data;
  document.getElementById("title").textContent = runs.map((run) => run.label).join(" · ");
  if (anew) drawn.clear();
  const of = (...names) => runs.map((run) => [run.label, ...names.map((name) => run[name])]);
  part("story", of("story", "totals"), () => drawStory(runs, data.verdict));
  part("results", differences, () => drawResults(runs, differences));
  part("findings", of("findings"), () => drawFindings(runs));
  part("curves", of("train", "evaluations", "events"), () => drawCharts(runs, anew));
  part("health", of("health"), () => drawHealth(runs));
  part("samples", of("samples"), () => drawSamples(runs));
  part("events", of("events"), () => drawEvents(runs));
  part("setup", of("config", "machine", "data", "state"), () => drawSetup(runs));
  const parts = [...document.querySelectorAll("main > section:not([hidden])")].slice(1);
  document.getElementById("contents").replaceChildren(...parts.map((place) =>
    element("a", { href: `#${place.id}` }, place.querySelector("h2").textContent)));
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  document.getElementById("theme").textContent = theme === "dark" ? "Light" : "Dark";
  document.getElementById("theme").setAttribute("aria-label", `Switch to ${theme === "dark" ? "light" : "dark"} colours`);
}

const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");
setTheme(prefersDark.matches ? "dark" : "light");
prefersDark.addEventListener("change", (event) => { setTheme(event.matches ? "dark" : "light"); draw(true); });
document.getElementById("theme").addEventListener("click", () => {
  setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  draw(true);
});
document.getElementById("controls").addEventListener("change", (event) => {
  const { name, type, value, checked } = event.target;
  settings[name] = type === "checkbox" ? checked : value;
  drawCharts(data.runs, true);
});
document.getElementById("controls").addEventListener("submit", (event) => event.preventDefault());

let version = "";
async function poll() {
  const liveness = document.getElementById("liveness");
  try {
    const answer = await fetch("data.json", { headers: version ? { "If-None-Match": version } : {}, cache: "no-store" });
    if (answer.status === 200) {
      version = answer.headers.get("ETag") || "";
      data = await answer.json();
      draw(false);
    } else if (answer.status !== 304) throw new Error(`answer ${answer.status}`);
    liveness.textContent = data.runs.some((run) => run.state.running) ? "● live" : "○ the run is not going on";
  } catch (error) {
    liveness.textContent = "✗ no answer; trying again";
  }
  setTimeout(poll, POLL_MILLISECONDS);
}

draw(true);
if (live) {
  document.getElementById("tokens").hidden = false;
  poll();
}
