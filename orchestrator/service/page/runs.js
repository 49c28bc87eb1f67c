// The list of runs.

import { ago, h, table } from "./dom.js";
import { call } from "./service.js";

export async function runsView(main, { every, signal }) {
  const list = h("div", { "aria-live": "polite" });
  main.append(h("h1", {}, "Runs"), h("section", {}, list));
  await every(3, async () => {
    const { runs } = await call("v1/runs", { signal });
    if (!runs.length) list.replaceChildren(h("p", {}, "No runs yet. ", h("a", { href: "#/submit" }, "Submit one.")));
    else list.replaceChildren(table(["run", "state", "step", "methods", "started"], runs.flatMap(rows), { class: "runs" }));
  });
}

// The run, and below it what is to be said of its state: on a phone there is no room beside it.
function rows({ id, state, detail, step, methods, created }) {
  const remark = detail === state || detail.startsWith(`${state} `) ? "" : detail.replace(`${state}: `, "");
  const run = [
    h("a", { href: `#/runs/${encodeURIComponent(id)}` }, id),
    h("span", { class: `state ${state}` }, state),
    String(step),
    methods.join(" → "),
    ago(created),
  ];
  return remark ? [run, [h("td", { class: "faint remark", colSpan: run.length }, remark)]] : [run];
}
