// What can be done to a run: scale a role, pause and go on, save a checkpoint, stop, resume. What cannot be done to it as it
// stands is not shown.

import { action, confirmed, field, h, notify } from "./dom.js";
import { call, run } from "./service.js";

const OVER = new Set(["finished", "stopped", "failed"]);

// [element, what shows the actions for a state]
export function controls(id, signal) {
  const role = h("input", { value: "rollout", size: 12 });
  const count = h("input", { type: "number", min: 0, value: 1 });
  const ask = (method, rest, body) => call(run(id, rest), { method, body, signal });
  const live = [
    field("role", role),
    field("workers", count),
    action("Scale", async () => {
      await ask("PATCH", "", { scale: { [role.value.trim()]: Number(count.value) } });
      return `${role.value}: ${count.value} worker(s) wanted`;
    }),
    action("Auto", async () => {
      await ask("PATCH", "", { scale: { [role.value.trim()]: "auto" } });
      return `${role.value}: as many workers as its load asks for`;
    }),
    action("Pause", async () => (await ask("PATCH", "", { paused: true }), "paused")),
    action("Continue", async () => (await ask("PATCH", "", { paused: false }), "continues")),
    action("Checkpoint", async () => {
      notify("asked; it is saved after this step");
      await ask("POST", "/checkpoint");
      return "saved";
    }),
    action(
      "Stop",
      async () => {
        if (!(await confirmed(`Stop ${id}? It saves a checkpoint and can be resumed.`, "Stop it"))) return null;
        await ask("POST", "/stop");
        return "stops after this step";
      },
      { class: "danger" },
    ),
  ];
  const over = [action("Resume", async () => (await ask("POST", "/resume"), "resumed"))];
  const show = (state) => {
    for (const each of live) each.hidden = OVER.has(state);
    for (const each of over) each.hidden = !OVER.has(state);
  };
  return [h("div", { class: "row", role: "group", "aria-label": "Control" }, live, over), show];
}
