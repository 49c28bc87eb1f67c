// The page: which view the address names, and the token. Views are functions: they fill `main` and return what ends them.

import { h, notify } from "./dom.js";
import { methodsView } from "./methods.js";
import { runView } from "./run.js";
import { runsView } from "./runs.js";
import { token, Refused } from "./service.js";
import { submitView } from "./submit.js";

const VIEWS = [
  [/^#\/runs\/([^/?]+)(?:\?with=([^/]+))?$/, runView],
  [/^#\/submit$/, submitView],
  [/^#\/methods$/, methodsView],
  [/^(#\/?)?$/, runsView],
];
const main = document.getElementById("main");
const forget = document.getElementById("forget");
let leave = () => {};

// A view gets a signal that ends its requests, and `every`, which repeats an action until the view is left.
async function show() {
  leave();
  const ending = new AbortController();
  leave = () => ending.abort();
  forget.hidden = !token.get();
  main.replaceChildren();
  const [, view, match] = VIEWS.map(([pattern, found]) => [pattern, found, pattern.exec(location.hash)]).find(([, , m]) => m)
    ?? [null, runsView, []];
  await guarded(() => view(main, { signal: ending.signal, every: every(ending.signal) }, ...match.slice(1).map((part) => part && decodeURIComponent(part))));
}

const every = (signal) => async (seconds, act) => {
  while (!signal.aborted) {
    if (!document.hidden) await guarded(act);
    await new Promise((resolve) => setTimeout(resolve, seconds * 1000));
  }
};

let saidLast = "";
async function guarded(act) {
  try {
    await act();
    saidLast = "";
  } catch (error) {
    if (error.name === "AbortError") return;
    if (error instanceof Refused && error.status === 401) return askForToken();
    if (error.message !== saidLast) notify((saidLast = error.message), "problem"); // once, not at every poll
  }
}

function askForToken() {
  leave();
  const input = h("input", { type: "password", autocomplete: "off", required: true, size: 40 });
  const form = h(
    "form",
    { class: "row" },
    h("label", {}, "Token of the service (printed by `troupe serve`)", input),
    h("button", { type: "submit" }, "Continue"),
  );
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    token.set(input.value.trim());
    show();
  });
  main.replaceChildren(h("section", {}, h("h1", {}, "This service needs a token"), form));
  input.focus();
}

forget.addEventListener("click", () => (token.forget(), show()));
addEventListener("hashchange", () => (show(), main.focus()));
show();
