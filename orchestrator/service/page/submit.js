// Submitting a recipe: shipped, or written here as JSON; planned first, if wished.

import { action, field, h, table } from "./dom.js";
import { call } from "./service.js";

export function submitView(main, { signal }) {
  const recipe = h("textarea", { placeholder: 'grpo_arithmetic, or {"model": {"path": ...}, "method": "sft", ...}', spellcheck: false });
  const overrides = h("textarea", { rows: 3, placeholder: "train.steps=20\nroles.rollout.workers=1", spellcheck: false });
  const found = h("div", { "aria-live": "polite" });
  const body = () => ({ recipe: parsed(recipe.value.trim()), overrides: overrides.value.split("\n").map((line) => line.trim()).filter(Boolean) });
  const plan = action("Plan", async () => {
    const report = await call("v1/plan", { method: "POST", body: body(), signal });
    found.replaceChildren(
      h("p", {}, report.accepted ? "The cluster can hold it." : "The cluster cannot hold it:"),
      h("ul", {}, [...report.problems, ...report.warnings].map((line) => h("li", {}, line))),
      h("pre", {}, report.report),
    );
  });
  const submit = action("Submit", async () => {
    const { id } = await call("v1/runs", { method: "POST", body: body(), signal });
    location.hash = `#/runs/${encodeURIComponent(id)}`;
    return `submitted as ${id}`;
  });
  main.append(
    h("h1", {}, "Submit a run"),
    h("section", {}, field("recipe: a name that ships with Troupe, or a recipe as JSON", recipe), field("overrides, one key.key=value per line", overrides), h("p", { class: "row" }, plan, submit), found),
  );
}

function parsed(text) {
  if (!text.startsWith("{")) return text;
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(`the recipe is not JSON: ${error.message}`);
  }
}
