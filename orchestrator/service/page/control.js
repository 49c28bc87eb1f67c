// What can be done to a run: scale a role, pause and go on, save a checkpoint, stop, resume, change its place in the queue.
// What cannot be done to it as it stands is not shown.

import { action, confirmed, field, h, notify } from "./dom.js";
import { call, run } from "./service.js";

const OVER = new Set(["finished", "stopped", "failed"]);
export const LIVE = new Set(["running", "paused", "silent"]); // its driver can be asked for something

const resumed = ({ from_step }) =>
  from_step ? `goes on from step ${from_step}` : "it saved no checkpoint: begins again from the start";

// [element, what shows the actions for a run as it stands]
export function controls(id, signal) {
  const role = h("input", { value: "rollout", size: 12 });
  const count = h("input", { type: "number", min: 0, value: 1 });
  let edited = false; // until then the fields follow the run
  let placed = false;
  count.addEventListener("input", () => (edited = true));
  const ask = (method, rest, body) => call(run(id, rest), { method, body, signal });
  const auto = action("Auto", async () => {
    await ask("PATCH", "", { scale: { [role.value.trim()]: "auto" } });
    return `${role.value}: as many workers as its load asks for`;
  });
  const pause = action("Pause", async () => (await ask("PATCH", "", { paused: true }), "paused"));
  const goOn = action("Continue", async () => (await ask("PATCH", "", { paused: false }), "continues"));
  const live = [
    field("role", role),
    field("workers", count),
    action("Scale", async () => {
      await ask("PATCH", "", { scale: { [role.value.trim()]: Number(count.value) } });
      edited = false;
      return `${role.value}: ${count.value} worker(s) wanted`;
    }),
    auto,
    pause,
    goOn,
    action("Checkpoint", async () => {
      notify("asked; it is saved after this step");
      await ask("POST", "/checkpoint");
      return "saved";
    }),
  ];
  const place = h("input", { type: "number", value: 0 });
  place.addEventListener("input", () => (placed = true));
  const queued = [
    field("priority", place),
    action("Prioritise", async () => {
      await ask("PATCH", "", { priority: Number(place.value) });
      placed = false;
      return `priority ${place.value}: runs with a higher one are started first`;
    }),
  ];
  const unfinished = [
    action(
      "Stop",
      async () => {
        if (!(await confirmed(`Stop ${id}? It saves a checkpoint and can be resumed.`, "Stop it"))) return null;
        await ask("POST", "/stop");
        return "it stops";
      },
      { class: "danger" },
    ),
  ];
  const over = [action("Resume", async () => resumed(await ask("POST", "/resume")))];
  const show = ({ state, workers, autoscale, priority }) => {
    for (const each of live) each.hidden = !LIVE.has(state);
    for (const each of queued) each.hidden = OVER.has(state) || priority === null;
    for (const each of unfinished) each.hidden = OVER.has(state);
    for (const each of over) each.hidden = !OVER.has(state);
    const named = role.value.trim();
    auto.hidden ||= !(named in (autoscale ?? {}));
    pause.hidden ||= state === "paused";
    goOn.hidden ||= state !== "paused";
    if (!edited && named in (workers ?? {}) && document.activeElement !== count) count.value = workers[named].desired;
    if (!placed && priority !== null && document.activeElement !== place) place.value = priority;
  };
  return [h("div", { class: "row", role: "group", "aria-label": "Control" }, live, queued, unfinished, over), show];
}
