// Curves: one figure per metric, all runs in it, one position on the x axis for all figures.

const AXES = { step: "steps", tokens: "completion tokens", flops: "FLOPs" };
const EDGE = { left: 46, right: 10, top: 8, bottom: 20 };
const view = { axis: "step", at: 0, positions: [] };
const figures = []; // name, elements, scale and lines of each figure

function showCurves() {
  for (const { name, same, unit, part } of DATA.figures) byId(part).append(figure(name, same, unit));
  for (const part of document.querySelectorAll("section > .charts:empty")) {
    part.append(el("p", { class: "note" }, "No run recorded any of these."));
  }
  byId("others").hidden = !byId("rest").childElementCount;
  byId("others").addEventListener("toggle", drawAll);
  axisControls();
  showChanges();
  byId("cursor").addEventListener("input", (event) => moveTo(view.positions[event.target.value]));
  setAxis("step");
  new ResizeObserver(drawAll).observe(byId("learning"));
}

/** An axis is offered if any run has it. */
function axisControls() {
  for (const [axis, title] of Object.entries(AXES)) {
    if (!RUNS.some((run) => run.x[axis])) continue;
    const input = el("input", { type: "radio", name: "axis", value: axis, ...(axis === "step" ? { checked: "" } : {}) });
    input.addEventListener("change", () => setAxis(axis));
    byId("axes").append(el("label", {}, input, title));
  }
}

/** The changes of settings, in words; on the curves they are marks. */
function showChanges() {
  const items = RUNS.flatMap((run, number) => run.changes.map((change) => {
    const name = RUNS.length > 1 ? [label(number), ", "] : [];
    return el("li", {}, ...name, changed(change));
  }));
  byId("changes").replaceChildren(...items);
  byId("changes-box").hidden = !items.length;
}

function changed({ step, texts }) {
  return `after step ${format(step)}: ${texts.join("; ")}`;
}

function setAxis(axis) {
  view.axis = axis;
  view.positions = [...new Set(RUNS.flatMap((run) => run.x[axis] ?? []))].sort((one, other) => one - other);
  byId("cursor").max = view.positions.length - 1;
  view.at = view.positions.at(-1);
  drawAll();
}

function moveTo(x) {
  view.at = x;
  showPosition();
}

function showPosition() {
  const text = `${AXES[view.axis].replace(/^steps$/, "step")} ${shortX(view.at)}`;
  byId("cursor").value = nearest(view.positions, view.at);
  byId("cursor").setAttribute("aria-valuetext", text);
  byId("position").textContent = text;
  for (const shown of figures) shown.point();
}

function nearest(sorted, x) {
  let low = 0;
  let high = sorted.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < x) low = middle + 1;
    else high = middle;
  }
  return low > 0 && x - sorted[low - 1] < sorted[low] - x ? low - 1 : low;
}

/** The points of a metric in each run: [x, value]; null for a run that has not this metric or not this axis. */
function pointsOf(name) {
  return RUNS.map((run) => {
    const series = run.series[name];
    const x = run.x[view.axis];
    return series && x ? series.at.map((row, index) => [x[row], series.values[index]]) : null;
  });
}

/** The standard errors of a metric in each run, by x; of one that has none, an empty map. */
function errorsOf(name) {
  return RUNS.map((run) => {
    const [series, x] = [run.series[`${name}_se`], run.x[view.axis]];
    const pairs = series && x ? series.at.map((row, index) => [x[row], series.values[index]]) : [];
    return new Map(pairs.filter(([, error]) => typeof error === "number"));
  });
}

/** A metric's figure; `same` are others whose lines it shows as well. */
function figure(name, same, unit) {
  const readout = el("ul", { class: "readout" });
  const chart = svg("svg", { class: "chart", role: "img" });
  const caption = el("figcaption", {}, [name, ...same].join(" and "), ...(unit ? [el("span", { class: "unit" }, `, ${unit}`)] : []));
  const node = el("figure", {}, caption, readout, chart, ...wildValues(name));
  const shown = { node, draw: () => draw(shown), point: () => point(shown), name, chart, readout };
  chart.addEventListener("pointermove", (event) => follow(shown, event));
  chart.addEventListener("pointerdown", (event) => follow(shown, event));
  figures.push(shown);
  return node;
}

/** Values that no curve can show are said in words. */
function wildValues(name) {
  return RUNS.flatMap((run) => {
    const series = run.series[name] ?? { values: [], at: [] };
    const steps = series.at.filter((_, index) => typeof series.values[index] !== "number").map((row) => run.x.step[row]);
    if (!steps.length) return [];
    const some = steps.slice(0, 5).join(", ") + (steps.length > 5 ? ", …" : "");
    return [el("p", { class: "warning" }, `${run.name}: not a finite number at step ${some}`)];
  });
}

function drawAll() {
  for (const shown of figures) if (shown.node.offsetParent) shown.draw();
  showPosition();
}

function draw(shown) {
  const width = shown.node.clientWidth;
  const height = shown.node.parentNode.classList.contains("small") ? 130 : 190;
  const lines = pointsOf(shown.name);
  const finite = lines.flatMap((points) => points ?? []).filter(([, y]) => typeof y === "number");
  shown.lines = lines;
  shown.errors = errorsOf(shown.name);
  shown.scale = scales([...finite, ...barEnds(lines, shown.errors)], width, height);
  shown.cursor = svg("g", { class: "cursor-marks" });
  shown.chart.setAttribute("viewBox", `0 0 ${width} ${height}`);
  shown.chart.setAttribute("aria-label", summary(shown.name, lines));
  const changes = RUNS.flatMap((_, run) => changeMarks(run, shown.scale, height));
  shown.chart.replaceChildren(...axes(shown.scale, width, height), ...changes, ...lines.flatMap((points, run) => [...errorBars(points, run, shown), ...curve(points, run, shown.scale)]), shown.cursor);
}

function scales(finite, width, height) {
  const ys = finite.map(([, y]) => y);
  const low = Math.min(0, ...ys);
  const yTicks = ticks(low, Math.max(...ys, low + (ys.some((y) => y !== low) ? 0 : 1)), 3, true);
  const [bottom, top] = [yTicks[0], yTicks.at(-1)];
  const xMax = view.positions.at(-1) || 1;
  const inner = { width: width - EDGE.left - EDGE.right, height: height - EDGE.top - EDGE.bottom };
  return {
    yTicks,
    xTicks: ticks(0, xMax, width < 320 ? 3 : 5, false),
    x: (value) => EDGE.left + (inner.width * value) / xMax,
    y: (value) => EDGE.top + inner.height * (1 - (value - bottom) / (top - bottom)),
    back: (x) => ((x - EDGE.left) / inner.width) * xMax,
  };
}

/** Multiples of 1, 2 or 5 times a power of ten: those between low and high, or those around them. */
function ticks(low, high, count, around) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 5].find((factor) => factor * power >= rough) ?? 10);
  const first = around ? Math.floor(low / step + 1e-9) : Math.ceil(low / step - 1e-9);
  const last = around ? Math.ceil(high / step - 1e-9) : Math.floor(high / step + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, index) => (first + index) * step);
}

function axes(scale, width, height) {
  const rows = scale.yTicks.flatMap((value) => [
    svg("path", { class: "grid", d: `M${EDGE.left} ${scale.y(value)}H${width - EDGE.right}` }),
    svg("text", { x: EDGE.left - 6, y: scale.y(value) + 4, "text-anchor": "end" }, format(Number(value.toPrecision(6)))),
  ]);
  const columns = scale.xTicks.map((value) =>
    svg("text", { x: scale.x(value), y: height - 5, "text-anchor": "middle" }, shortX(value)),
  );
  return [...rows, ...columns];
}

/** A thin line where settings of a run were changed; what was changed is its tooltip. */
function changeMarks(run, scale, height) {
  return RUNS[run].changes.filter((change) => view.axis in change.x).map((change) => {
    const d = `M${scale.x(change.x[view.axis]).toFixed(1)} ${EDGE.top}V${height - EDGE.bottom}`;
    const lines = [svg("path", { d, stroke: colour(run) }), svg("path", { class: "wide-line", d })];
    return svg("g", { class: "change" }, svg("title", {}, changed(change)), ...lines);
  });
}

const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });

function shortX(value) {
  if (view.axis === "flops") return value ? value.toExponential(1) : "0";
  return view.axis === "tokens" ? compact.format(value) : format(value);
}

/** A run's line, broken where a value is not finite; few points are marked one by one. */
function curve(points, run, scale) {
  if (!points) return [];
  let pen = "M";
  const path = points.map(([x, y]) => {
    const piece = typeof y === "number" ? `${pen}${scale.x(x).toFixed(1)} ${scale.y(y).toFixed(1)}` : "";
    pen = piece ? "L" : "M";
    return piece;
  });
  const finite = points.filter(([, y]) => typeof y === "number");
  const marks = finite.length <= 30 ? finite.map(([x, y]) => mark(run, scale.x(x), scale.y(y))) : [];
  return [svg("path", { d: path.join(""), ...stroke(run) }), ...marks];
}

/** The upper ends of all error bars. */
function barEnds(lines, errors) {
  return lines.flatMap((points, run) => (points ?? []).flatMap(([x, y]) => (errors[run].has(x) ? [[x, y + errors[run].get(x)]] : [])));
}

/** A bar from one standard error below a point to one above it. */
function errorBars(points, run, { errors, scale }) {
  const bars = (points ?? []).filter(([x, y]) => typeof y === "number" && errors[run].get(x)).map(([x, y]) => {
    const error = errors[run].get(x);
    return `M${scale.x(x).toFixed(1)} ${scale.y(y - error).toFixed(1)}V${scale.y(y + error).toFixed(1)}`;
  });
  return bars.length ? [svg("path", { class: "error", d: bars.join(""), stroke: colour(run) })] : [];
}

function summary(name, lines) {
  const parts = lines.map((points, run) => {
    if (!points) return `${RUNS[run].name}: not recorded`;
    const [first, last] = [points[0], points.at(-1)];
    return `${RUNS[run].name}: ${format(first[1])} at ${shortX(first[0])}, ${format(last[1])} at ${shortX(last[0])}`;
  });
  const steps = RUNS.flatMap((run) => run.changes.map((change) => format(change.step)));
  const changes = steps.length ? `. Settings changed after step ${steps.join(", ")}` : "";
  return `${name} against ${AXES[view.axis]}. ${parts.join("; ")}${changes}`;
}

/** The values at the position, in words beside the caption and as marks on the curves. */
function point(shown) {
  if (!shown.scale) return;
  const x = shown.scale.x(view.at);
  shown.cursor.replaceChildren(svg("path", { class: "at", d: `M${x} ${EDGE.top}V${shown.chart.viewBox.baseVal.height - EDGE.bottom}` }));
  const found = shown.lines.map((points) => points?.[nearest(points.map(([at]) => at), view.at)]);
  for (const [run, pair] of found.entries()) {
    if (pair && typeof pair[1] === "number") shown.cursor.append(mark(run, shown.scale.x(pair[0]), shown.scale.y(pair[1])));
  }
  const absent = RUNS.filter((_, run) => !found[run]).map((run) => run.name);
  shown.readout.replaceChildren(
    ...found.flatMap((pair, run) => (pair ? [reading(run, pair, shown.errors[run].get(pair[0]))] : [])),
    ...(absent.length ? [el("li", { class: "name" }, `not recorded: ${absent.join(", ")}`)] : []),
  );
}

function reading(run, found, error) {
  const name = RUNS.length > 1 ? [swatch(run), el("span", { class: "name" }, RUNS[run].name)] : [];
  const elsewhere = found[0] === view.at ? "" : ` (at ${shortX(found[0])})`;
  return el("li", {}, ...name, format(found[1]) + (error ? ` ± ${format(error)}` : "") + elsewhere);
}

function follow(shown, event) {
  const x = shown.scale.back(event.clientX - shown.chart.getBoundingClientRect().left);
  moveTo(view.positions[nearest(view.positions, x)]);
}
