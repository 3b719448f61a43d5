"use strict";
// The parts of the page that are words and tables.

const SIGNS = { good: "✓ ", warning: "! ", bad: "✗ ", plain: "" };

function section(id, children) {
  const place = document.getElementById(id);
  place.hidden = children.length === 0;
  place.querySelector(".body").replaceChildren(...children);
}

function nameOf(run, runs) {
  const number = runs.indexOf(run), own = look(number);
  return element("h3", { class: "name" }, runs.length > 1 ? key({ ...own, width: 2.4 }) : null, run.label);
}

function drawStory(runs, verdict) {
  const cards = runs.map((run) => {
    const [headline, ...lines] = run.story;
    return element("article", { class: "card" },
      runs.length > 1 ? nameOf(run, runs) : null,
      element("p", { class: `headline ${headline.tone}` }, SIGNS[headline.tone], headline.text),
      element("ul", {}, lines.map((line) => element("li", {}, element("span", { class: line.tone }, SIGNS[line.tone], line.text)))),
      element("div", { class: "tiles" }, tiles(run).map(([value, name]) => element("div", { class: "tile" }, element("b", {}, value), element("span", {}, name)))));
  });
  section("story", [verdict ? element("p", { class: "headline" }, verdict) : null, element("div", { class: runs.length > 1 ? "cards" : "" }, cards)].filter((part) => part));
}

function tiles(run) {
  const totals = run.totals, best = totals.best_evaluation || {};
  return [
    [best.loss, "best validation loss"], [best.perplexity, "perplexity there"], [best.bits_per_byte, "bits per byte there"],
    [totals.step, "steps"], [totals.tokens, "tokens"], [totals.tokens_per_second, "tokens a second"],
  ].filter(([value]) => value != null).map(([value, name]) => [figure(value), name])
    .concat(totals.seconds ? [[duration(totals.seconds), "training time"]] : []);
}

function drawResults(runs, differences) {
  if (!differences) return;
  const cells = (row) => [row.name, ...row.values.map((value, index) => ({
    text: row.name === "seconds of training" ? duration(value) : text(value), best: row.best === index,
  }))];
  const head = (name) => [name, ...runs.map((run) => run.label)];
  section("results", [table(head("result"), differences.results.map(cells), "Results of each run")]);
  section("differences", [differences.config.length
    ? table(head("option"), differences.config.map(cells), "Options that differ")
    : element("p", {}, "Nothing: all options are the same.")]);
}

function text(value) {
  if (Array.isArray(value)) return value.map(text).join(", ") || "–";
  if (value && typeof value === "object") return Object.entries(value).map(([name, part]) => `${name} ${text(part)}`).join(", ") || "none";
  return typeof value === "number" ? figure(value) : value == null || value === "" ? "–" : String(value);
}

function drawFindings(runs) {
  const parts = runs.filter((run) => run.findings.length).map((run) => {
    const failed = run.findings.filter((check) => check.passed === false), others = run.findings.filter((check) => check.passed !== false);
    return element("div", { class: "card" },
      runs.length > 1 ? nameOf(run, runs) : null,
      failed.length
        ? element("ul", {}, failed.map((check) => element("li", { class: "found" },
          element("strong", { class: "bad" }, `✗ ${check.name.replaceAll("_", " ")}`),
          ["measured", "expected", "advice"].filter((part) => check[part]).map((part) =>
            element("div", {}, element("span", { class: "soft" }, `${part}: `), check[part])))))
        : element("p", { class: "good" }, "✓ All that was checked passed."),
      others.length ? folded(`checks-${run.path}`, `${others.length} check${others.length > 1 ? "s" : ""} that did not fail`, () => table(["check", "verdict", "measured", "expected"],
        others.map((check) => [check.name.replaceAll("_", " "), check.passed ? "passed" : "not measured", check.measured, check.expected]), "Checks")) : null);
  });
  section("findings", parts);
}

function drawSamples(runs) {
  const sample = (one) => element("article", { class: "card" }, element("h3", {}, `Step ${figure(one.step)}`),
    element("pre", { dir: "auto" }, one.prompt ? element("b", {}, one.prompt) : null, one.text));
  const parts = runs.filter((run) => run.samples.length).flatMap((run) => {
    const few = spread(run.samples.length, runs.length > 1 ? 3 : 6).map((index) => run.samples[index]);
    return [runs.length > 1 ? nameOf(run, runs) : null,
      element("div", { class: "samples" }, few.map(sample)),
      few.length < run.samples.length
        ? folded(`samples-${run.path}`, `All ${run.samples.length} that are kept here`, () => element("div", { class: "samples" }, run.samples.map(sample))) : null];
  });
  section("samples", parts.filter((part) => part));
}

function drawEvents(runs) {
  const rows = runs.flatMap((run) => run.events.map((event) => [
    ...(runs.length > 1 ? [run.label] : []), `step ${figure(event.step)}`, event.kind, event.text]));
  section("events", rows.length ? [table([...(runs.length > 1 ? ["run"] : []), "where", "what", ""], rows, "What was unusual")] : []);
}

function drawSetup(runs) {
  const cards = runs.map((run) => {
    const { machine, data, config } = run;
    const rows = [["folder", run.path]];
    if (run.state.updated) rows.push(["last written", run.state.updated.replace("T", " ").replace("+00:00", " UTC")]);
    if (machine.machine) rows.push(["machine", machine.machine]);
    for (const [name, version] of Object.entries(machine.versions)) rows.push([name, text(version)]);
    machine.starts.forEach((start, index) => rows.push([index ? "went on" : "started", `${start.time}${index ? ` after step ${text(start.step)}` : ""}`]));
    if (data.folder) rows.push(["data", data.folder], ["sources", text(data.sources)]);
    for (const [name, split] of Object.entries(data.splits || {})) rows.push([name, `${text(split.tokens)} tokens, ${text(split.bytes)} bytes, documents: ${text(split.documents)}`]);
    if (data.vocab_size) rows.push(["vocabulary", figure(data.vocab_size)]);
    if (data.folder) rows.push(["skipped files", text(data.skipped)], ["bytes that are no UTF-8", text(data.replaced_sequences)]);
    if (machine.checkpoints.length) rows.push(["checkpoints", machine.checkpoints.join(", ")]);
    return element("div", { class: "card" }, runs.length > 1 ? nameOf(run, runs) : null,
      table(["", ""], rows, "Machine and data"),
      folded(`config-${run.path}`, "All options", () => table(["option", "value"], Object.entries(config).map(([name, value]) => [name, text(value)]), "Options")));
  });
  section("setup", [element("div", { class: runs.length > 1 ? "cards" : "" }, cards)]);
}
