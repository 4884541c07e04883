"use strict";
// Elements, numbers and tables. What runs hold reaches the page as text nodes and attributes, never as markup.

const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs;

function byId(id) {
  return document.getElementById(id);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function el(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

function svg(name, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

/** Four digits; NaN and infinities, which arrive as text, by their names. */
function format(value) {
  if (typeof value !== "number") return String(value);
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e6) return value.toLocaleString("en");
  if (size >= 1e6 || size < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e");
  return String(Number(value.toPrecision(4)));
}

function table(caption, head, rows) {
  const cells = (name, row, first) =>
    row.map((cell, column) => el(column === 0 ? "th" : name, column === 0 ? { scope: first } : {}, cell ?? "none"));
  const body = rows.map((row) => el("tr", {}, ...cells("td", row, "row")));
  const top = head.map((cell) => el("th", { scope: "col" }, cell));
  return el(
    "div",
    { class: "wide", tabindex: "0", role: "region", "aria-label": caption },
    el("table", {}, el("thead", {}, el("tr", {}, ...top)), el("tbody", {}, ...body)),
  );
}

/** A short line in a run's colour, dash and mark: three ways to tell runs apart. */
function swatch(run) {
  return svg(
    "svg",
    { class: "swatch", viewBox: "0 0 26 10", "aria-hidden": "true" },
    svg("path", { d: "M1 5H25", ...stroke(run) }),
    mark(run, 13, 5),
  );
}

const DASHES = ["none", "7 3", "2 3", "9 3 2 3"];

function stroke(run) {
  return { class: "line", stroke: colour(run), "stroke-dasharray": DASHES[run % DASHES.length] };
}

function colour(run) {
  return `var(--run-${run % 8})`;
}

function mark(run, x, y) {
  const shapes = ["M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0", "M-3 -3H3V3H-3Z", "M0 -4L4 3H-4Z", "M0 -4L4 0L0 4L-4 0Z"];
  return svg("path", {
    class: "mark",
    d: shapes[run % shapes.length],
    fill: colour(run),
    transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})`,
  });
}

/** A run's name with its swatch, where there are several runs to tell apart. */
function label(run) {
  const parts = RUNS.length > 1 ? [swatch(run), " "] : [];
  return el("span", {}, ...parts, RUNS[run].name);
}
