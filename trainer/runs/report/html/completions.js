// Completions: every counted token shaded by its reverse KL, and the step's ten most penalised ones.

const FULL = 4; // nats of the strongest shade; the page says so too
const WORST = 10;
const shown = { sample: null, tokens: [], current: 0 }; // `tokens` are those that count, as elements and numbers

function showCompletions() {
  options(byId("run"), RUNS.map((run, number) => [number, run.name]));
  byId("run").closest("label").hidden = RUNS.length === 1;
  byId("run").addEventListener("change", chooseRun);
  byId("step").addEventListener("change", () => chooseStep());
  byId("sample").addEventListener("change", () => showSample());
  byId("tokens").addEventListener("keydown", walk);
  byId("tokens").addEventListener("focusin", (event) => choose(indexOf(event.target)));
  byId("tokens").addEventListener("click", (event) => indexOf(event.target) >= 0 && focusToken(indexOf(event.target)));
  byId("tokens").addEventListener("pointerover", (event) => showToken(indexOf(event.target)));
  byId("tokens").addEventListener("pointerleave", () => showToken(shown.current));
  byId("run").value = Math.max(0, RUNS.findIndex((run) => run.samples.shown.some(isScored)));
  chooseRun();
}

function options(select, pairs) {
  select.replaceChildren(...pairs.map(([value, text]) => el("option", { value }, text)));
}

function theRun() {
  return RUNS[byId("run").value];
}

function theSamples() {
  return theRun().samples.shown.filter((sample) => sample.step === Number(byId("step").value));
}

function isScored(sample) {
  return sample.teacher.length > 0 && sample.sampler.length > 0;
}

function chooseRun() {
  const run = theRun();
  const steps = [...new Set(run.samples.shown.map((sample) => sample.step))];
  options(byId("step"), steps.map((step) => [step, step + aside(valueAt(run, "teacher_kl", step), "nats per token")]));
  byId("left-out").textContent = steps.length
    ? `${run.samples.shown.length} of the ${run.samples.count} recorded samples, of ${steps.length} of ${run.samples.steps} steps, are on this page; ${run.path}/samples.jsonl has all.`
    : `${run.path}/samples.jsonl has no samples that fit on this page.`;
  for (const id of ["step", "sample"]) byId(id).disabled = !steps.length;
  byId("step").selectedIndex = steps.length - 1;
  chooseStep();
}

function aside(value, unit) {
  return value === undefined ? "" : ` (${format(value)} ${unit})`;
}

function valueAt(run, name, step) {
  const series = run.series[name];
  return series?.values[series.at.findIndex((row) => run.x.step[row] === step)];
}

function chooseStep() {
  const samples = theSamples();
  options(byId("sample"), samples.map((sample, index) => [index, `${sample.number + 1}${aside(meanKl(sample), "nats per token")}`]));
  const worst = worstTokens(samples);
  showWorst(samples, worst);
  if (worst.length) byId("sample").value = worst[0].choice;
  showSample();
  if (worst.length) choose(worst[0].index);
}

/** Reverse KL of each counted token, or null where a log-prob is missing or not finite; of a segment, a token's share. */
function kls(sample) {
  if (sample.own) return sample.own.of.map((number) => share(sample.own.segments[number]));
  return sample.sampler.map((ours, index) => {
    const theirs = sample.teacher[index];
    return typeof ours === "number" && typeof theirs === "number" ? ours - theirs : null;
  });
}

function meanKl(sample) {
  if (!isScored(sample)) return undefined;
  const values = sample.own ? kls(sample).filter((value) => value !== null) : kls(sample);
  return values.reduce((sum, value) => sum + (value ?? 0), 0) / Math.max(1, values.length);
}

function showSample() {
  const sample = theSamples()[byId("sample").value];
  shown.sample = sample;
  shown.tokens = [];
  const origin = sample ? originOf(sample) : [];
  byId("origin").textContent = origin.join(", ");
  byId("origin").hidden = !origin.length;
  const begin = sample ? sample.mask.indexOf("1") : 0;
  const parts = sample ? elements(sample) : [];
  byId("prompt").replaceChildren(...parts.slice(0, begin));
  byId("prompt-box").hidden = !begin;
  byId("prompt-box").open = parts.slice(0, begin).map((part) => part.textContent).join("").length < 400;
  byId("prompt-title").textContent = `Prompt, ${begin} tokens`;
  byId("tokens").replaceChildren(...parts.slice(begin));
  byId("tokens").append(...(sample?.truncated ? [el("em", { class: "masked" }, " [cut at the length limit]")] : []));
  byId("scale").hidden = !sample || !isScored(sample);
  if (shown.tokens.length) choose(0);
  else byId("token").replaceChildren();
}

/** What is known of a sample beside its tokens. */
function originOf(sample) {
  return [
    ...(sample.dataset ? [`data set ${sample.dataset}`] : []),
    ...(sample.reward === null ? [] : [`reward ${format(sample.reward)}`]),
  ];
}

/** A sample's tokens as elements. */
function elements(sample) {
  const values = kls(sample);
  return sample.tokens.map((text, place) => {
    const node = el("span", { class: "masked" }, ...visible(text));
    if (sample.mask[place] !== "1") return node;
    const index = shown.tokens.length;
    const logprobs = { ours: sample.sampler[index], theirs: sample.teacher[index], kl: values[index], plain: sample.plain[index] };
    const own = segmentAt(sample, index);
    return scored(node, { text, id: sample.ids[place], ...logprobs, ...own, ranks: ranks(sample, index) });
  });
}

/** Where a token stands with the student and with the teacher, in words; none where the run did not write it. */
function ranks(sample, index) {
  const sides = [["student", sample.student_ranks[index]], ["teacher", sample.teacher_ranks[index]]];
  return sides.filter(([, rank]) => rank).map(([side, rank]) => `${side} ${format(rank)}`).join(", ");
}

/** A token that counts is shaded, and can be walked to. */
function scored(node, facts) {
  const index = shown.tokens.push({ node, facts }) - 1;
  const kl = facts.kl ?? 0;
  node.className = `scored${kl > 0 ? " over" : kl < 0 ? " under" : ""}`;
  node.style.setProperty("--k", Math.min(1, Math.abs(kl) / FULL).toFixed(3));
  return fill(node, { role: "button", tabindex: "-1", "aria-label": inWords(facts), "data-index": index }, []);
}

/** Line breaks are shown and kept; a token of no text still has a place. */
function visible(text) {
  const lines = text.split("\n");
  const parts = lines.flatMap((line, number) => (number ? [el("i", { class: "break" }), "\n", line] : [line]));
  return text ? parts : ["∅"];
}

function quoted(text) {
  return JSON.stringify(text);
}

function inWords(facts) {
  const kl = facts.kl == null ? "" : `, reverse KL ${fixed(facts.kl, 2)}`;
  return `${quoted(facts.text)}${kl}${facts.ranks && `, rank: ${facts.ranks}`}`;
}

function indexOf(target) {
  return Number(target.closest(".scored")?.dataset.index ?? -1);
}

function walk(event) {
  const last = shown.tokens.length - 1;
  const next = { ArrowLeft: shown.current - 1, ArrowRight: shown.current + 1, Home: 0, End: last }[event.key];
  if (next === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  focusToken(Math.min(last, Math.max(0, next)));
}

function focusToken(index) {
  shown.tokens[index].node.focus();
}

/** Makes a token the current one: the only one that the Tab key stops at. */
function choose(index) {
  if (index < 0) return;
  const before = shown.tokens[shown.current]?.node;
  before?.setAttribute("tabindex", "-1");
  before?.removeAttribute("aria-current");
  shown.current = index;
  fill(shown.tokens[index].node, { tabindex: "0", "aria-current": "true" }, []);
  showToken(index);
}

function showToken(index) {
  const facts = shown.tokens[index]?.facts;
  if (!facts) return;
  const pairs = [["token", quoted(facts.text)], ["id", String(facts.id)]];
  if (facts.ours !== undefined) pairs.push(["student's log-prob", logprob(facts.ours)]);
  if (facts.theirs !== undefined) pairs.push(["teacher's log-prob", logprob(facts.theirs)]);
  if (facts.kl != null) pairs.push(["reverse KL", `${fixed(facts.kl, 3)} nats`]);
  pairs.push(...segmentInWords(facts));
  if (facts.ranks) pairs.push(["rank (1: the likeliest)", facts.ranks]);
  const items = pairs.map(([term, text]) => el("div", {}, el("dt", {}, term), el("dd", {}, el("bdi", {}, text))));
  byId("token").replaceChildren(el("dl", {}, ...items), ...teachersPrompt(shown.sample, facts));
}

/** What the teacher had read in place of the student's prompt: folded, until the reader unfolds it for all tokens. */
function teachersPrompt(sample, facts) {
  if (!sample.read) return [];
  const open = byId("token").querySelector("details")?.open ? { open: "" } : {};
  const title = `What the teacher had read, ${sample.read_tokens} tokens${withoutIt(facts)}`;
  return [el("details", open, el("summary", {}, title), el("div", { class: "text" }, ...visible(sample.read)))];
}

/** Its log-prob after the student's prompt, where that is known, and how much more its own prompt makes of the token. */
function withoutIt({ theirs, plain }) {
  if (typeof plain !== "number" || typeof theirs !== "number") return "";
  return `; without it the log-prob is ${fixed(plain, 3)}, ${fixed(Math.abs(theirs - plain), 3)} nats ${theirs < plain ? "higher" : "lower"}`;
}

function logprob(value) {
  if (typeof value !== "number") return format(value);
  if (value <= DATA.unknown) return `${value}: the teacher has no such token`;
  return `${fixed(value, 3)} (${percent(Math.exp(value))})`;
}

/** So many decimals, and no minus in front of a zero. */
function fixed(value, decimals) {
  return value.toFixed(decimals).replace(/^-(0\.0*)$/, "$1");
}

function percent(share) {
  return share < 1e-5 ? `${(100 * share).toExponential(1)} %` : `${Number((100 * share).toPrecision(3))} %`;
}

function worstTokens(samples) {
  const all = samples.flatMap((sample, choice) => kls(sample).map((kl, index) => ({ kl, index, sample, choice })));
  return all.filter(({ kl }) => kl >= 0.01).sort((one, other) => other.kl - one.kl).slice(0, WORST);
}

function showWorst(samples, worst) {
  byId("worst-title").textContent = `Most penalised at step ${byId("step").value}`;
  byId("worst").replaceChildren(...worst.map(worstItem));
  byId("worst-box").hidden = !worst.length;
  byId("unscored").hidden = !samples.length || samples.some(isScored);
}

/** A button that leads to the token, with the tokens before it. */
function worstItem({ kl, index, sample, choice }) {
  const place = [...sample.mask].map((bit, at) => (bit === "1" ? at : -1)).filter((at) => at >= 0)[index];
  const before = sample.tokens.slice(Math.max(0, place - 5), place).join("").slice(-40);
  const text = [el("span", { class: "before" }, `…${oneLine(before)}`), el("strong", {}, oneLine(sample.tokens[place]) || "∅")];
  const button = el("button", { type: "button" }, el("bdi", {}, ...text));
  button.addEventListener("click", () => {
    byId("sample").value = choice;
    showSample();
    focusToken(index);
    shown.tokens[index].node.scrollIntoView({ block: "center" });
  });
  return el("li", {}, button, el("span", { class: "kl" }, `${fixed(kl, 2)} nats, sample ${sample.number + 1}`));
}

function oneLine(text) {
  return text.replaceAll("\n", "↵");
}

showTables();
showCurves();
showCompletions();
