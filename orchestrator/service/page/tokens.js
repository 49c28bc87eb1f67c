// Tokens of samples, coloured by what is known of each: scales, the legend, and sequences that are read with the mouse, a
// finger, or the arrow keys. What a model wrote is text, never HTML.

import { h, number } from "./dom.js";

const SHOWN = 400; // tokens of a sequence, until all are asked for
const BEYOND = 0.98; // of the values, what is stronger than so many of them has the strongest colour
const NAMES = {
  advantages: "advantage",
  sample_logps: "log-probability, sampler",
  old_logps: "log-probability, trainer",
  ref_logps: "log-probability, reference",
  teacher_logps: "log-probability, teacher",
  values: "state value",
  returns: "return",
  step_reward: "reward of the token",
  turn_reward: "reward of the turn",
  process_reward: "process reward",
};
const DIFFERENCES = { "trainer − sampler": ["old_logps", "sample_logps"], "sampler − reference": ["sample_logps", "ref_logps"] };

// What tokens can be coloured by: [value of the switch, its name]. `samples`: a list of sequences for each.
export function colourings(samples) {
  const columns = new Set(samples.flat().flatMap(({ values }) => Object.keys(values)));
  const known = [...Object.keys(NAMES).filter((name) => columns.has(name)), ...[...columns].filter((name) => !(name in NAMES))];
  const differences = Object.entries(DIFFERENCES).filter(([, pair]) => pair.every((name) => columns.has(name)));
  return [...known.map((name) => [name, named(name)]), ...differences.map(([name]) => [name, name])];
}

function named(name) {
  return NAMES[name] ?? name.replaceAll("_", " ");
}

// [n] values of a sequence, null where nothing is known.
function valuesOf(sequence, colouring) {
  const nothing = new Array(sequence.pieces.length).fill(null);
  if (colouring === "mask") return sequence.mask.map(Number);
  if (!(colouring in DIFFERENCES)) return sequence.values[colouring] ?? nothing;
  const [one, other] = DIFFERENCES[colouring].map((name) => sequence.values[name] ?? nothing);
  return one.map((value, index) => (value === null || other[index] === null ? null : value - other[index]));
}

// How a value is painted: a class, and a strength in [0, 1]. One scale for all samples that are shown.
export function scaleOf(samples, colouring) {
  if (colouring === "mask") return { paint: (value) => (value ? ["plus", 0.6] : ["", 0]), marks: [] };
  const sizes = samples.flat().flatMap((sequence) => valuesOf(sequence, colouring)).filter((value) => value !== null).map(Math.abs).sort((a, b) => a - b);
  const limit = (sizes.length < 50 ? sizes.at(-1) : sizes[Math.floor(BEYOND * (sizes.length - 1))] || sizes.at(-1)) || 1;
  const unlikely = colouring.endsWith("_logps");
  const paint = (value) => {
    if (value === null || value === 0) return ["", 0];
    return [unlikely ? "unlikely" : value < 0 ? "minus" : "plus", Math.min(1, Math.abs(value) / limit)];
  };
  return { paint, marks: unlikely ? [0, -limit / 2, -limit] : [-limit, -limit / 2, 0, limit / 2, limit], unlikely };
}

export function legend(colouring, scale) {
  const swatch = (text, [kind, share]) => painted(h("span", { class: "token" }, text), kind, share);
  if (colouring === "mask") return h("p", { class: "legend" }, swatch("1: learned from", scale.paint(1)), h("span", { class: "token unlearned" }, "0: not learned from"));
  const said = (value) => (scale.unlikely ? `${number(value, 2)} (p = ${number(Math.exp(value), 2)})` : number(value, 2));
  return h(
    "p",
    { class: "legend" },
    scale.marks.map((value) => swatch(said(value), scale.paint(value))),
    h("span", { class: "token unlearned" }, "not learned from"),
  );
}

function painted(element, kind, share) {
  element.classList.remove("plus", "minus", "unlikely");
  if (kind) element.classList.add(kind);
  element.style.setProperty("--share", share.toFixed(3));
  return element;
}

// The sequences of one sample. `label`: of the sample, for those who hear the page.
export function sequencesOf(sequences, colouring, scale, label) {
  return sequences.map((sequence, index) => {
    const turn = sequences.length > 1 ? `turn ${index + 1} of ${sequences.length}` : "";
    return [turn ? h("p", { class: "faint" }, turn) : null, sequenceOf(sequence, colouring, scale, [label, turn].filter(Boolean).join(", "))];
  });
}

// The prompt is folded, and the end of a long sequence; what was not kept is said.
function sequenceOf(sequence, colouring, scale, label) {
  const { pieces, mask, start, total } = sequence;
  const values = valuesOf(sequence, colouring);
  const first = Math.max(0, mask.indexOf(true));
  const list = h("div", { class: "tokens", role: "listbox", "aria-orientation": "horizontal", "aria-label": `Tokens of ${label}. Arrow keys move.` });
  const token = (index) => tokenOf(sequence, index, colouring, scale.paint(values[index]));
  const range = (from, to) => Array.from({ length: to - from }, (_, index) => token(from + index));
  const end = Math.min(pieces.length, first + SHOWN);
  list.append(...range(first, end));
  if (list.firstChild) list.firstChild.tabIndex = 0;
  const fold = (text, tokens, where) => {
    const button = h("button", { type: "button", class: "fold" }, text);
    button.addEventListener("click", () => (list[where](...tokens()), button.remove(), list.querySelector('[tabindex="0"]')?.focus()));
    return button;
  };
  const lost = (count, where) => (count > 0 ? h("span", { class: "faint" }, `${count} tokens ${where} are not kept`) : null);
  keysOf(list);
  return h(
    "div",
    { class: "sequence" },
    lost(start, "before these"),
    first ? fold(`+ ${first} tokens of the prompt`, () => range(0, first), "prepend") : null,
    list,
    end < pieces.length ? fold(`+ ${pieces.length - end} more tokens`, () => range(end, pieces.length), "append") : null,
    lost(total - start - pieces.length, "after these"),
  );
}

function tokenOf(sequence, index, colouring, [kind, share]) {
  const element = h("span", { role: "option", tabIndex: -1, class: sequence.mask[index] ? "token" : "token unlearned", "aria-selected": "false" }, visible(sequence.pieces[index]));
  element.told = () => told(sequence, index);
  return painted(element, sequence.mask[index] || colouring === "mask" ? kind : "", share);
}

// Line breaks are shown as such, and break the line.
function visible(piece) {
  return piece === "" ? "◦" : piece.replaceAll("\r", "␍").replaceAll("\n", "⏎\n").replaceAll("\t", "⇥\t");
}

// [name, value] of all that is known of a token.
function told(sequence, index) {
  const { pieces, mask, start, total, values } = sequence;
  const known = Object.entries(values).filter(([, of]) => of[index] !== null);
  return [
    ["token", `${start + index + 1} of ${total}`],
    ["text", pieces[index] === "" ? "part of the next character" : JSON.stringify(pieces[index])],
    ["mask", mask[index] ? "1, learned from" : "0, not learned from"],
    ...known.map(([name, of]) => [named(name), name.endsWith("_logps") ? `${number(of[index])} (p = ${number(Math.exp(of[index]), 3)})` : number(of[index])]),
  ];
}

// One token of a list is in the order of the Tab key; the arrows move among them.
function keysOf(list) {
  list.addEventListener("keydown", (event) => {
    const move = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
    const at = event.target.closest(".token");
    if (!at) return;
    const to = move ? at[move] : event.key === "Home" ? list.firstElementChild : event.key === "End" ? list.lastElementChild : event.key === "ArrowDown" ? ofLine(at, "nextElementSibling") : event.key === "ArrowUp" ? ofLine(at, "previousElementSibling") : null;
    if (!to) return;
    event.preventDefault();
    to.focus();
  });
  list.addEventListener("focusin", ({ target }) => {
    list.querySelectorAll('[tabindex="0"], [aria-selected="true"]').forEach((other) => (other.setAttribute("aria-selected", "false"), (other.tabIndex = -1)));
    target.tabIndex = 0;
    target.setAttribute("aria-selected", "true");
    target.setAttribute("aria-label", target.told().map((pair) => pair.join(" ")).join(", "));
  });
}

// The token above or below: of the next line, the one that is nearest to the left edge of this one.
function ofLine(from, move) {
  const { left, top } = from.getBoundingClientRect();
  let best = null;
  let line = null;
  for (let each = from[move]; each; each = each[move]) {
    const box = each.getBoundingClientRect();
    if (Math.abs(box.top - top) < 4) continue;
    if (line !== null && Math.abs(box.top - line) >= 4) break;
    line = box.top;
    if (!best || Math.abs(box.left - left) < Math.abs(best.getBoundingClientRect().left - left)) best = each;
  }
  return best;
}

// What is known of the token under the mouse, or of the one that has the focus; Escape hides it. Screen readers hear it from
// the token itself.
export function tellTokens(place, signal) {
  const box = h("dl", { class: "told", "aria-hidden": "true", hidden: true });
  let token = null;
  const focused = () => (place.contains(document.activeElement) ? document.activeElement.closest(".tokens .token") : null);
  const tell = ({ target }) => {
    token = target.closest?.(".tokens .token") ?? focused();
    if (!token) return hide();
    box.replaceChildren(...token.told().flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
    box.hidden = false;
    move();
  };
  const move = () => {
    const at = token.getClientRects()[0];
    const below = at.bottom + box.offsetHeight + 8 < innerHeight;
    box.style.left = `${Math.max(4, Math.min(at.left, innerWidth - box.offsetWidth - 4))}px`;
    box.style.top = `${below ? at.bottom + 4 : Math.max(4, at.top - box.offsetHeight - 4)}px`;
  };
  const hide = () => (box.hidden = true);
  const scrolled = () => box.hidden || (token === focused() ? move() : hide()); // the focus itself may scroll
  place.addEventListener("pointerover", tell);
  place.addEventListener("focusin", tell);
  place.addEventListener("pointerleave", hide);
  place.addEventListener("focusout", hide);
  place.addEventListener("keydown", ({ key }) => key === "Escape" && hide());
  addEventListener("scroll", scrolled, { passive: true, capture: true, signal });
  return box;
}
