// One run: how it stands, its pipeline and workers, curves (beside another run's, if asked), samples, events, log.

import { chat } from "./chat.js";
import { controls } from "./control.js";
import { Curves } from "./curves.js";
import { ago, field, h, number, size, table } from "./dom.js";
import { drawPipelines } from "./pipeline.js";
import { samples } from "./samples.js";
import { call, run, streamed } from "./service.js";

const EVENTS_SHOWN = 200;

export async function runView(main, { every, signal }, id, other) {
  const state = h("div", { class: "row", "aria-live": "polite" });
  const pipeline = h("div");
  const workers = h("div");
  const curves = new Curves();
  const comparison = h("select");
  const [actions, showActions] = controls(id, signal);
  const [conversation, showConversation] = chat(id, signal);
  signal.addEventListener("abort", () => curves.close());
  main.append(
    h("h1", {}, id),
    h("section", {}, state, actions),
    h("section", {}, h("h2", {}, "Pipeline"), pipeline),
    h("section", {}, h("h2", {}, "Roles"), workers),
    h("section", {}, h("div", { class: "row" }, h("h2", {}, "Curves"), field("beside", comparison)), curves.element),
    samples(id, every, signal),
    h("div", { class: "columns" }, events(id, signal), log(id, every, signal)),
    h("div", { class: "columns" }, conversation, checkpoints(id, every, signal)),
  );
  offerComparison(comparison, id, other, signal);
  const sources = [id, other].filter(Boolean).map((name) => new Metrics(name, signal));
  await every(2, async () => {
    const [detail] = await Promise.all([call(run(id), { signal }), ...sources.map((source) => source.update())]);
    state.replaceChildren(
      h("span", { class: `state ${detail.state}` }, detail.state),
      h("span", {}, `step ${detail.step}`),
      h("span", { class: detail.state === "failed" ? "problem" : "faint" }, detail.detail === detail.state ? "" : detail.detail),
      h("span", { class: "faint" }, `started ${ago(detail.created)}`),
    );
    workers.replaceChildren(...workerTable(detail));
    showActions(detail);
    showConversation(detail);
    drawPipelines(pipeline, detail);
    curves.show(sources.map(({ id: label, lines }) => ({ label, lines })));
  });
}

// A run's lines of metrics, read on from where they ended. The last step is asked for again: its evaluation may come later.
class Metrics {
  constructor(id, signal) {
    Object.assign(this, { id, signal, lines: [] });
  }

  async update() {
    const last = this.lines.at(-1)?.step ?? 0;
    const after = last > 1 ? `&after_step=${last - 1}` : "";
    const { lines } = await call(run(this.id, `/metrics?limit=10000${after}`), { signal: this.signal });
    const first = lines[0]?.step ?? Infinity; // steps that a resumed run did again replace those of before
    this.lines = [...this.lines.filter((line) => line.step < first), ...lines];
  }
}

// How a role scales by itself, if it does.
function scaling({ min, max, held, said } = {}) {
  if (max === undefined) return "";
  return `; ${min} to ${max} by load${held ? ", held at this number" : ""}${said ? `; last decision ${said}` : ""}`;
}

// Processes of a role: its ranks, or its workers.
function processes(list, always = []) {
  const columns = [...new Set([...always, ...list.flatMap(Object.keys)])].filter((name) => name !== "index" && name !== "state");
  const rows = list.map((each) => [
    String(each.index ?? ""),
    h("span", { class: `state ${each.state}` }, String(each.state ?? "")),
    ...columns.map((name) => plain(each[name])),
  ]);
  return [columns, rows];
}

function workerTable({ workers, members, ranks, autoscale, state }) {
  const roles = Object.entries(members ?? {});
  const held = Object.entries(ranks ?? {}).map(([role, list]) => {
    const [columns, rows] = processes(list, ["node", "pid", "verb", "seconds"]);
    return [h("p", {}, h("strong", {}, role), ` ${list.length} rank${list.length === 1 ? "" : "s"}`), table(["rank", "state", ...columns], rows)];
  }).flat();
  if (!roles.length && !held.length) return [h("p", { class: "faint" }, state === "running" ? "none reported yet" : "the run has no processes")];
  const elastic = roles.map(([role, list]) => {
    const [columns, rows] = processes(list);
    const count = workers[role];
    const elsewhere = list.filter((member) => member.address && member.state === "serving").length;
    const wanted = count ? ` ${count.serving} of ${count.desired} serve${elsewhere ? `, and ${elsewhere} from elsewhere` : ""}` : "";
    return [h("p", {}, h("strong", {}, role), wanted, scaling(autoscale?.[role])), list.length ? table(["worker", "state", ...columns], rows) : null];
  }).flat();
  return [...held, ...elastic];
}

function plain(value) {
  if (typeof value === "number") return Number.isInteger(value) ? String(value) : number(value); // a process id has every digit
  return value === null || value === undefined ? "" : typeof value === "object" ? JSON.stringify(value) : String(value);
}

async function offerComparison(select, id, other, signal) {
  const { runs } = await call("v1/runs", { signal }).catch(() => ({ runs: [] }));
  select.append(h("option", { value: "" }, "no other run"), ...runs.filter((each) => each.id !== id).map((each) => h("option", { value: each.id, selected: each.id === other }, each.id)));
  select.addEventListener("change", () => {
    const beside = select.value ? `?with=${encodeURIComponent(select.value)}` : "";
    location.hash = `#/runs/${encodeURIComponent(id)}${beside}`;
  });
}

function events(id, signal) {
  const list = h("tbody");
  follow();
  return h("section", {}, h("h2", {}, "Events"), h("div", { class: "scroll events", style: "max-height:20rem;overflow:auto", tabIndex: 0 }, h("table", {}, list)));

  // Goes on from the last event when the connection breaks, and looks again from time to time once the run is over: it
  // may be resumed.
  async function follow() {
    for (let last = 0; !signal.aborted; ) {
      try {
        for await (const { id: number, event, data } of streamed(run(id, `/events?follow=true&after=${last}`), { signal })) {
          if (event === "end") break;
          last = Number(number ?? last);
          const { time, event: kind, ...rest } = JSON.parse(data);
          list.prepend(h("tr", {}, h("td", {}, new Date(time * 1000).toLocaleTimeString()), h("td", {}, kind ?? event), h("td", { class: "text faint" }, brief(rest))));
          while (list.children.length > EVENTS_SHOWN) list.lastChild.remove();
        }
      } catch (error) {
        if (signal.aborted) return;
      }
      await new Promise((resolve) => setTimeout(resolve, 3000));
    }
  }
}

function brief(detail) {
  return Object.entries(detail).map(([name, value]) => `${name}: ${said(value)}`).join(", ").slice(0, 400);
}

function said(value) {
  const text = typeof value === "object" ? JSON.stringify(value) : String(value);
  return text.length > 160 ? (typeof value === "object" ? "…" : `${text.slice(0, 160)} …`) : text;
}

function log(id, every, signal) {
  const text = h("pre", { tabIndex: 0, "aria-label": "What the run printed" });
  let offset = null;
  every(3, async () => {
    const found = await call(run(id, `/logs${offset === null ? "" : `?offset=${offset}`}`), { signal });
    const atEnd = text.scrollTop + text.clientHeight >= text.scrollHeight - 8;
    offset = found.next_offset;
    text.append(found.text);
    if (atEnd) text.scrollTop = text.scrollHeight;
  });
  return h("section", {}, h("h2", {}, "Log"), text);
}

function checkpoints(id, every, signal) {
  const list = h("div");
  every(10, async () => {
    const { checkpoints: found } = await call(run(id, "/checkpoints"), { signal });
    const rows = found.reverse().map(({ name, phase, bytes, written }) => [name, phase, size(bytes), ago(written)]);
    list.replaceChildren(rows.length ? table(["checkpoint", "phase", "size", "written"], rows) : h("p", { class: "faint" }, "none yet"));
  });
  return h("section", {}, h("h2", {}, "Checkpoints"), list);
}
