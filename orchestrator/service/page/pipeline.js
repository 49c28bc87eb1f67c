// The pipeline of a run, phase by phase, with the stages at work: those that collect, and may run ahead of training, in one
// box, those that learn in the next.

import { h, number } from "./dom.js";

const PARTS = [
  ["before the first step", ({ per }) => per === "data"],
  ["collecting (may run ahead)", ({ per, ahead }) => per !== "data" && ahead],
  ["learning", ({ per, ahead }) => per !== "data" && !ahead],
];
const PER = { group: "per prompt group", batch: "per batch", data: "over the whole data set" };

export function drawPipelines(place, detail) {
  const { pipelines, metrics } = detail;
  const waits = detail.waits.filter(({ seconds }) => seconds >= 1); // each step waits a little
  const phases = Object.entries(pipelines);
  const current = detail.phase ?? metrics.phase ?? phases[0]?.[0];
  place.replaceChildren(
    ...(phases.length ? phases.map(([name, stages]) => drawPhase(name, stages, name === current, detail)) : [h("p", { class: "faint" }, detail.state === "failed" ? "The run ended before it had one." : "It is drawn once the run has read its data.")]),
    waits.length ? h("p", { class: "faint" }, "waits: ", waits.map(({ what, seconds }) => `${Math.round(seconds)} s for ${what}`).join("; ")) : "",
  );
}

function drawPhase(name, stages, current, { methods, pipelines, at_work: atWork, metrics }) {
  const method = methods[Object.keys(pipelines).indexOf(name)] ?? name;
  const working = current ? new Map(atWork.map((each) => [key(each), each])) : new Map();
  const known = new Set(stages.map(key));
  const beside = [...working.values()].filter((each) => !known.has(key(each)));
  return h(
    "div",
    { class: current ? "phase" : "phase faint", "aria-current": current ? "step" : null },
    h("p", {}, h("strong", {}, name), name === method ? "" : ` (${method})`),
    h(
      "div",
      { class: "parts" },
      PARTS.map(([title, belongs]) => [title, stages.filter(belongs)])
        .filter(([, found]) => found.length)
        .map(([title, found]) => h("div", { class: "part" }, h("span", { class: "faint" }, title), list(title, found, working))),
      beside.length ? h("div", { class: "part" }, h("span", { class: "faint" }, "beside"), list("beside", beside, working)) : null,
    ),
    current ? seconds(metrics) : null,
  );
}

function list(title, stages, working) {
  return h("ol", { class: "pipeline", "aria-label": title }, stages.map((stage) => node(stage, working.get(key(stage)))));
}

// What it says to eyes by colour and bar, it says in words, too.
function node(stage, work) {
  const share = work ? Math.round(100 * work.share) : 0;
  const busy = work ? `${work.calls > 1 ? `${work.calls} calls, ` : ""}${work.calls && !share ? "just begun" : `${share} %`}` : "";
  const element = h(
    "li",
    { class: work ? "working" : null, title: work ? `at work: ${work.calls} call(s) now, ${share} % of the last second` : PER[stage.per] ?? "" },
    h("span", {}, stage.stage),
    stage.writes.length ? h("small", { class: "faint" }, ` → ${stage.writes.join(", ")}`) : null,
    work ? h("small", { class: "busy" }, h("span", { class: "unseen" }, "at work: "), busy) : null,
  );
  element.style.setProperty("--share", `${share}%`);
  return element;
}

function key({ stage, writes }) {
  return [stage, ...writes].join(" ");
}

// Where the last step's time went.
function seconds(metrics) {
  const parts = Object.entries(metrics).filter(([name, value]) => name.startsWith("time/") && value >= 0.01);
  if (!parts.length) return null;
  return h("p", { class: "faint" }, `last step: ${parts.map(([name, value]) => `${name.slice(5)} ${number(value, 3)} s`).join(", ")}`);
}
