// Samples of a step: sorted and filtered by reward, with their tokens coloured; one opened shows all of its columns.

import { action, field, h, number, shown } from "./dom.js";
import { call, run } from "./service.js";
import { colourings, legend, scaleOf, sequencesOf, tellTokens } from "./tokens.js";

const PAGE = 10;
const CUT = 600; // characters of a text, until all are asked for
const TEXT = "text";
const ORDERS = [["position", "as sampled"], ["-reward", "best first"], ["reward", "worst first"]];
const NOT_FACTS = new Set(["step", "prompt", "completion", "reward", "position", "worker", "messages"]);

export function samples(id, every, signal) {
  const step = h("select", {}, h("option", { value: "" }, "newest"));
  const order = h("select", {}, ORDERS.map(([value, label]) => h("option", { value }, label)));
  const colour = h("select", {}, h("option", { value: TEXT }, "nothing"));
  const [low, high] = ["least", "most"].map((name) => h("input", { type: "number", step: "any", "aria-label": `${name} reward` }));
  const key = h("div");
  const list = h("ol", { class: "samples" });
  const count = h("p", { class: "faint", role: "status" });
  let offset = 0;
  let found = { rows: [], tokens: [] };
  let chosen = null; // by the reader

  async function load() {
    const asked = new URLSearchParams({ order: order.value, offset, limit: PAGE, tokens: true });
    for (const [name, input] of [["step", step], ["min_reward", low], ["max_reward", high]]) if (input.value !== "") asked.set(name, input.value);
    found = await call(run(id, `/samples?${asked}`), { signal });
    offerSteps(found.steps);
    offerColours();
    const last = Math.min(offset + found.rows.length, found.total);
    earlier.disabled = offset === 0;
    later.disabled = last >= found.total;
    count.textContent = counted(found, offset, last);
    paint();
  }

  function paint() {
    const scale = scaleOf(found.tokens, colour.value);
    key.replaceChildren(colour.value === TEXT ? "" : legend(colour.value, scale));
    list.replaceChildren(...found.rows.map((sample, index) => card(sample, found.tokens[index], `sample ${offset + index + 1}`, colour.value, scale)));
  }

  // An open list keeps its place: what is new is put in, what is gone (a resumed run wrote it anew) is taken out.
  function offerSteps(all) {
    const offered = new Map([...step.options].slice(1).map((option) => [Number(option.value), option]));
    for (const [each, option] of offered) if (!all.includes(each)) option.remove();
    for (const each of all) if (!offered.has(each)) step.options[0].after(h("option", { value: each }, each));
  }

  function offerColours() {
    const known = found.tokens.some((sequences) => sequences.length) ? [...colourings(found.tokens), ["mask", "mask"]] : [];
    const wanted = chosen ?? known[0]?.[0] ?? TEXT;
    colour.replaceChildren(...[[TEXT, "nothing"], ...known].map(([value, label]) => h("option", { value, selected: value === wanted }, label)));
  }

  const moved = (by) => () => ((offset = Math.max(0, offset + by)), load());
  const earlier = action("Previous", moved(-PAGE));
  const later = action("Next", moved(PAGE));
  const again = action("Refresh", () => load());
  for (const input of [step, order, low, high]) input.addEventListener("change", () => ((offset = 0), again.click()));
  colour.addEventListener("change", () => ((chosen = colour.value), paint()));
  // What is read stays as it is; only which steps there are is kept up to date.
  every(5, async () => (list.children.length ? offerSteps((await call(run(id, "/samples?limit=1"), { signal })).steps) : load()));
  return h(
    "section",
    {},
    h("h2", {}, "Samples"),
    h("div", { class: "row" }, field("step", step), field("order", order), field("reward from", low), field("to", high), field("colour tokens by", colour), again, earlier, later),
    count,
    key,
    list,
    tellTokens(list, signal),
  );
}

function counted({ rows, tokens, total, step }, offset, last) {
  if (!total) return step === null || step === undefined ? "No samples yet." : "No sample has such a reward.";
  const kept = tokens.filter((sequences) => sequences.length).length;
  const without = kept === rows.length ? "" : kept ? `; tokens of ${kept} of these are kept` : "; their tokens are not kept";
  return `Step ${step}: ${offset + 1} to ${last} of ${total}${without}`;
}

function card(sample, sequences, label, colouring, scale) {
  const open = h("button", { type: "button", "aria-label": "Open this sample" }, "Open");
  open.addEventListener("click", () => shown("Sample", Object.entries(sample).map(([name, value]) => [h("h3", {}, name), h("pre", {}, text(value))])));
  const facts = Object.entries(sample).filter(([name, value]) => !NOT_FACTS.has(name) && !name.startsWith("data/") && typeof value === "number");
  const coloured = colouring !== TEXT && sequences.length;
  return h(
    "li",
    {},
    h(
      "div",
      { class: "facts" },
      h("strong", {}, `reward ${number(sample.reward)}`),
      facts.map(([name, value]) => h("span", {}, `${name.replace(/^rewards\//, "")} ${number(value)}`)),
      open,
    ),
    h("div", { class: "prompt faint" }, folded(readable(sample.prompt))),
    coloured ? sequencesOf(sequences, colouring, scale, label) : h("div", { class: "text" }, folded(readable(sample.completion))),
  );
}

// A long text with the rest behind a button.
function folded(content) {
  if (content.length <= CUT) return [content];
  const rest = h("button", { type: "button", class: "fold" }, `+ ${content.length - CUT} more characters`);
  const dots = h("span", {}, " … ");
  rest.addEventListener("click", () => (dots.replaceWith(content.slice(CUT)), rest.remove()));
  return [content.slice(0, CUT), dots, rest];
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
