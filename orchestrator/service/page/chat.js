// A conversation with the live policy of a run, through its rollout workers.

import { LIVE } from "./control.js";
import { h } from "./dom.js";
import { streamed } from "./service.js";

// [element, what shows the conversation with a run as it stands]
export function chat(id, signal) {
  const turns = h("div", { "aria-live": "polite" });
  const input = h("textarea", { rows: 2, "aria-label": "Message to the policy", placeholder: "Say something to the policy" });
  const send = h("button", { type: "submit" }, "Send");
  const clear = h("button", { type: "button" }, "Start over");
  const form = h("form", {}, input, h("div", { class: "row" }, send, clear));
  let messages = [];

  const add = (role, content) => {
    const turn = h("div", { class: `turn ${role}` }, content);
    turns.append(turn);
    return turn;
  };

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const content = input.value.trim();
    if (!content || send.disabled) return;
    input.value = "";
    send.disabled = true;
    add("user", content);
    messages.push({ role: "user", content });
    const answer = add("assistant", "");
    try {
      const body = { model: id, messages, stream: true };
      for await (const { data } of streamed("v1/chat/completions", { method: "POST", body, signal })) {
        if (data === "[DONE]") break;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Error(chunk.error.message);
        answer.append(chunk.choices?.[0]?.delta?.content ?? "");
      }
      messages.push({ role: "assistant", content: answer.textContent });
    } catch (error) {
      answer.append(` (${error.message})`);
      messages.pop(); // so that the next message is not the second in a row
    } finally {
      send.disabled = false;
      input.focus();
    }
  });
  clear.addEventListener("click", () => ((messages = []), turns.replaceChildren()));
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey) (event.preventDefault(), form.requestSubmit());
  });
  const none = h("p", { class: "faint" });
  const show = ({ state }) => {
    form.hidden = !LIVE.has(state);
    none.hidden = LIVE.has(state);
    none.textContent = `The run is ${state}: its policy can be chatted with while it runs.`;
  };
  return [h("section", {}, h("h2", {}, "Chat with the policy"), turns, form, none), show];
}
