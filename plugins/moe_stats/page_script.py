"""The heat map's script. It reads the event stream with ``fetch``, which can send a key, unlike EventSource."""

from __future__ import annotations

SCRIPT = r"""
"use strict";
const at = (id) => document.getElementById(id);
const map = at("map"), status = at("status");
let shape = "", cells = [], focus = [0, 0], running = null, paused = false;

function make(tag, text, attributes) {
  const element = document.createElement(tag);
  element.textContent = text;
  for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
  return element;
}

function say(text, wrong) {
  if (status.textContent !== text) status.textContent = text;
  status.classList.toggle("error", Boolean(wrong));
}

function query() {
  const model = at("model").value.trim();
  return model ? "?model=" + encodeURIComponent(model) : "";
}

function headers() {
  const key = at("key").value;
  return key ? {Authorization: "Bearer " + key} : {};
}

async function refusal(answer) {
  try {
    const body = await answer.json();
    const error = body.error || body;
    return (error.message || error.detail || "refused") + " (HTTP " + answer.status + ")";
  } catch (_) {
    return "The server answered HTTP " + answer.status + ".";
  }
}

function percent(share) { return (100 * share).toFixed(1) + " %"; }

function layout(report) {
  const head = make("tr", "");
  head.append(make("th", "Layer", {scope: "col"}));
  for (let expert = 0; expert < report.num_experts; expert++) head.append(make("th", expert, {scope: "col"}));
  map.tHead.replaceChildren(head);
  cells = report.layers.map(() => []);
  const rows = report.layers.map((layer, row) => {
    const line = make("tr", "");
    line.append(make("th", layer.layer, {scope: "row"}));
    for (let expert = 0; expert < report.num_experts; expert++) {
      const cell = make("td", "0", {class: "cell", tabindex: "-1"});
      cell.addEventListener("focus", () => { move(row, expert, false); });
      cells[row].push(cell);
      line.append(cell);
    }
    return line;
  });
  map.tBodies[0].replaceChildren(...rows);
  focus = [0, 0];
  if (cells.length) cells[0][0].tabIndex = 0;
}

function move(row, column, go) {
  const [before, beside] = focus;
  cells[before][beside].tabIndex = -1;
  focus = [Math.min(Math.max(row, 0), cells.length - 1), Math.min(Math.max(column, 0), cells[0].length - 1)];
  const cell = cells[focus[0]][focus[1]];
  cell.tabIndex = 0;
  if (go) cell.focus();
}

map.addEventListener("keydown", (event) => {
  const [row, column] = focus;
  const steps = {
    ArrowUp: [row - 1, column], ArrowDown: [row + 1, column], ArrowLeft: [row, column - 1],
    ArrowRight: [row, column + 1], Home: [row, 0], End: [row, Infinity],
  };
  if (!cells.length || !(event.key in steps)) return;
  event.preventDefault();
  move(...steps[event.key], true);
});

function draw(report) {
  const now = JSON.stringify([report.model, report.num_experts, report.layers.map((layer) => layer.layer)]);
  if (now !== shape) { layout(report); shape = now; }
  at("summary").textContent =
    report.model + ": " + (report.recording ? "recording" : "not recording") + ", mode " + report.mode + ", " +
    report.passes + " passes, " + report.tokens + " tokens, " + report.top_k + " of " + report.num_experts +
    " experts per token, balance " + (report.balancedness === null ? "unknown" : report.balancedness.toFixed(3));
  report.layers.forEach((layer, row) => {
    const most = Math.max(1, ...layer.counts);
    layer.counts.forEach((count, expert) => {
      const cell = cells[row][expert], heat = count / most;
      if (cell.textContent !== String(count)) cell.textContent = count;
      cell.style.setProperty("--heat", heat.toFixed(3));
      cell.classList.toggle("hot", heat > 0.55);
    });
  });
  at("layers").tBodies[0].replaceChildren(...report.layers.map((layer) => {
    const line = make("tr", "");
    const busiest = layer.top.map((one) => one.expert + " (" + percent(one.share) + ")").join(", ");
    line.append(
      make("th", layer.layer, {scope: "row"}), make("td", layer.selections),
      make("td", layer.balancedness === null ? "–" : layer.balancedness.toFixed(3)), make("td", busiest || "–"));
    return line;
  }));
}

async function follow() {
  if (running) running.abort();
  const mine = running = new AbortController();
  try {
    const answer = await fetch("/expert_distribution/stream" + query(), {headers: headers(), signal: mine.signal});
    if (!answer.ok) { say(await refusal(answer), true); return; }
    say("Connected.");
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const {done, value} = await reader.read();
      if (done) break;
      const events = (text + value).split("\n\n");
      text = events.pop();
      const last = events.pop();
      if (last === undefined || last === "data: [DONE]") continue;
      const report = JSON.parse(last.slice(6));
      if (report.error) { say(report.error.message, true); continue; }
      if (!paused) draw(report);
    }
    say("The stream ended; Connect begins again.", true);
  } catch (error) {
    if (!mine.signal.aborted) say("The connection broke: " + error.message, true);
  }
}

async function order(button) {
  try {
    const answer = await fetch(button.dataset.path + query() + (query() ? "&" : "?") + "format=json",
      {method: "POST", headers: headers()});
    if (!answer.ok) { say(await refusal(answer), true); return; }
    const done = await answer.json();
    say(done.message + (done.file ? " " + done.file : ""));
    draw(done);
  } catch (error) {
    say("The connection broke: " + error.message, true);
  }
}

at("connect").addEventListener("submit", (event) => { event.preventDefault(); follow(); });
at("pause").addEventListener("click", () => {
  paused = !paused;
  at("pause").setAttribute("aria-pressed", String(paused));
});
for (const button of document.querySelectorAll("[data-path]")) button.addEventListener("click", () => order(button));
at("model").value = new URLSearchParams(location.search).get("model") || "";
follow();
"""
