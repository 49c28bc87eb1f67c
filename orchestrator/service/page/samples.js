// Samples of a step: sorted and filtered by reward; one opened shows all of its columns.

import { action, field, h, number, shown, table } from "./dom.js";
import { call, run } from "./service.js";

const PAGE = 20;

export function samples(id, every, signal) {
  const step = h("select", {}, h("option", { value: "" }, "newest"));
  const order = h("select", {}, [["position", "as sampled"], ["-reward", "best first"], ["reward", "worst first"]].map(([value, label]) => h("option", { value }, label)));
  const [low, high] = ["least", "most"].map((name) => h("input", { type: "number", step: "any", "aria-label": `${name} reward` }));
  const list = h("div");
  const count = h("span", { class: "faint", role: "status" });
  let offset = 0;
  let steps = "";

  async function load() {
    const asked = new URLSearchParams({ order: order.value, offset, limit: PAGE });
    for (const [name, input] of [["step", step], ["min_reward", low], ["max_reward", high]]) if (input.value !== "") asked.set(name, input.value);
    const found = await call(run(id, `/samples?${asked}`), { signal });
    offerSteps(found.steps);
    const last = Math.min(offset + found.rows.length, found.total);
    count.textContent = found.total ? `step ${found.step}: ${offset + 1} to ${last} of ${found.total}` : "no samples";
    earlier.disabled = offset === 0;
    later.disabled = last >= found.total;
    list.replaceChildren(found.rows.length ? table(["prompt", "completion", "reward", "length", "version", ""], found.rows.map(row)) : "");
  }

  function offerSteps(all) {
    if (steps === (steps = all.join())) return;
    const chosen = step.value;
    step.replaceChildren(h("option", { value: "" }, "newest"), ...all.toReversed().map((each) => h("option", { value: each, selected: String(each) === chosen }, each)));
  }

  const moved = (by) => () => ((offset = Math.max(0, offset + by)), load());
  const earlier = action("Previous", moved(-PAGE));
  const later = action("Next", moved(PAGE));
  const again = action("Refresh", () => load());
  for (const input of [step, order, low, high]) input.addEventListener("change", () => ((offset = 0), again.click()));
  every(5, async () => list.children.length || (await load())); // until there are some
  return h(
    "section",
    {},
    h("h2", {}, "Samples"),
    h("div", { class: "row" }, field("step", step), field("order", order), field("reward from", low), field("to", high), again, earlier, later, count),
    list,
  );
}

function row(sample) {
  const open = h("button", { type: "button", "aria-label": "Open this sample" }, "Open");
  open.addEventListener("click", () => shown("Sample", Object.entries(sample).map(([name, value]) => [h("h3", {}, name), h("pre", {}, text(value))])));
  return [
    h("td", { class: "text" }, cut(readable(sample.prompt))),
    h("td", { class: "text" }, cut(readable(sample.completion))),
    h("td", { class: "number" }, number(sample.reward)),
    h("td", { class: "number" }, String(sample.length ?? "")),
    h("td", { class: "number" }, String(sample.version ?? "")),
    open,
  ];
}

// Conversations are JSON lists of messages.
function readable(value) {
  try {
    const messages = JSON.parse(value);
    if (Array.isArray(messages)) return messages.map(({ role, content, tool_calls }) => `${role}: ${content || JSON.stringify(tool_calls ?? "")}`).join("\n");
  } catch {
    // plain text
  }
  return String(value ?? "");
}

function text(value) {
  return typeof value === "string" ? readable(value) : JSON.stringify(value);
}

function cut(content) {
  return content.length > 300 ? `${content.slice(0, 300)} …` : content;
}
