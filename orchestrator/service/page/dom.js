// Building elements, and telling the user what happened.

// `properties`: of the element; `class`, `aria-*`, `data-*` and `for` are attributes. Text is text, never HTML.
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name === "class" || name === "for" || name.includes("-")) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export function notify(text, kind = "") {
  const notice = h("div", { class: kind }, text);
  document.getElementById("notices").append(notice);
  setTimeout(() => notice.remove(), kind === "problem" ? 12000 : 4000);
}

// Runs an action of the user; what fails is shown, not lost. The button is disabled meanwhile.
export function action(label, run, properties = {}) {
  const button = h("button", { type: "button", ...properties }, label);
  button.addEventListener("click", async () => {
    button.disabled = true;
    try {
      const said = await run();
      if (said) notify(said);
    } catch (error) {
      notify(error.message, "problem");
    } finally {
      button.disabled = false;
    }
  });
  return button;
}

export function field(label, input) {
  return h("label", {}, label, input);
}

export function table(heads, rows, properties = {}) {
  const cells = (row) => row.map((cell) => (cell instanceof Node && cell.nodeName === "TD" ? cell : h("td", {}, cell ?? "")));
  const numeric = (index) => rows[0]?.[index] instanceof Node && rows[0][index].className === "number";
  const head = h("tr", {}, heads.map((name, index) => h("th", { scope: "col", class: numeric(index) ? "number" : null }, name)));
  const body = rows.map((row) => h("tr", {}, cells(row)));
  return h("div", { class: "scroll", tabIndex: 0 }, h("table", properties, h("thead", {}, head), h("tbody", {}, body)));
}

// A question before something that cannot be undone.
export function confirmed(question, answer) {
  return new Promise((resolve) => {
    const dialog = h("dialog", {}, h("p", {}, question));
    const close = (value) => () => (dialog.close(), resolve(value));
    const yes = h("button", { type: "button", class: "danger" }, answer);
    const no = h("button", { type: "button", autofocus: true }, "Cancel");
    yes.addEventListener("click", close(true));
    no.addEventListener("click", close(false));
    dialog.addEventListener("cancel", () => resolve(false));
    dialog.addEventListener("close", () => dialog.remove());
    dialog.append(h("div", { class: "row" }, yes, no));
    document.body.append(dialog);
    dialog.showModal();
  });
}

export function shown(title, ...content) {
  const close = h("button", { type: "button" }, "Close");
  const dialog = h("dialog", { "aria-label": title }, h("h2", {}, title), content, h("p", {}, close));
  close.addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
}

export function number(value, digits = 4) {
  return typeof value === "number" ? String(Number(value.toPrecision(digits))) : "–";
}

export function ago(seconds) {
  const passed = Math.max(0, Date.now() / 1000 - seconds);
  const [size, unit] = passed < 90 ? [1, "s"] : passed < 5400 ? [60, "min"] : passed < 129600 ? [3600, "h"] : [86400, "days"];
  return `${Math.round(passed / size)} ${unit} ago`;
}

export function size(bytes) {
  const power = bytes < 1024 ? 0 : Math.min(4, Math.floor(Math.log2(bytes) / 10));
  return `${Number((bytes / 1024 ** power).toPrecision(3))} ${["B", "KiB", "MiB", "GiB", "TiB"][power]}`;
}
