// What the runs are: a line each, their settings, their seconds.

function showTables() {
  byId("runs").append(runTable(), ...controlNotes(), ...guardNotes());
  const several = RUNS.length > 1;
  const keys = several ? DATA.differences : RUNS[0].main;
  const what = several ? "Settings that differ between the runs" : "The settings that matter most";
  byId("settings").append(
    el("p", { class: "note" }, keys.length ? `${what}.` : "All settings are the same."),
    ...(keys.length ? [settingsTable(what, keys)] : []),
  );
  const all = new Set(RUNS.flatMap((run) => Object.keys(run.settings)));
  byId("all-settings").append(settingsTable("All settings", [...all]));
  byId("seconds").append(secondsTable());
}

function runTable() {
  const rows = RUNS.map((run, number) => [
    label(number),
    run.control ? `${run.kind}, a control` : run.kind,
    run.steps_done < run.steps_planned
      ? `${run.steps_done} of ${run.steps_planned}: stopped, or still going`
      : String(run.steps_done),
    ends(run, "eval/accuracy"),
    ends(run, "teacher_kl"),
    run.x.tokens ? format(run.x.tokens.at(-1)) : "none",
    run.x.flops ? format(run.x.flops.at(-1)) : "not counted",
    run.logged,
  ]);
  const head = ["run", "kind", "steps", "eval/accuracy", "teacher_kl", "completion tokens", "FLOPs", "last logged"];
  return table("Runs", head, rows);
}

/** Which runs are controls: what they learn, the teacher's judgement did not teach. */
function controlNotes() {
  const controls = RUNS.map((run, number) => [label(number), run.control]).filter(([, control]) => control);
  return controls.map(([name, control]) => el("p", { class: "note" }, el("strong", {}, `${name} is ${control}.`)));
}

/** What the guards of the runs found. */
function guardNotes() {
  return RUNS.flatMap((run, number) =>
    run.guards.map((text) => el("p", { class: "note" }, el("strong", {}, `${label(number)}, a guard at ${text}.`))),
  );
}

/** A metric's first and last value. */
function ends(run, name) {
  const values = run.series[name]?.values;
  return values ? `${format(values[0])} → ${format(values.at(-1))}` : "none";
}

function settingsTable(caption, keys) {
  const rows = keys.map((key) => [key, ...RUNS.map((run) => run.settings[key])]);
  return table(caption, ["setting", ...RUNS.map((_, run) => label(run))], rows);
}

function secondsTable() {
  const phases = new Set(RUNS.flatMap((run) => Object.keys(run.seconds)));
  const total = (run) => Object.values(run.seconds).reduce((sum, seconds) => sum + seconds, 0);
  const share = (run, seconds) => `${format(seconds)} s (${((100 * seconds) / total(run)).toFixed(0)} %)`;
  const rows = [...phases].map((phase) => [
    phase,
    ...RUNS.map((run) => (phase in run.seconds ? share(run, run.seconds[phase]) : "none")),
  ]);
  rows.push(["all", ...RUNS.map((run) => `${format(total(run))} s`)]);
  return table("Seconds by phase, all steps together", ["phase", ...RUNS.map((_, run) => label(run))], rows);
}
