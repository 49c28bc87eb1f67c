// Calls of the service. The token is kept for this browser tab, and sent with every call.

const KEY = "troupe-token";

export const token = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function fetched(path, { method = "GET", body, signal, accept } = {}) {
  const headers = {};
  if (token.get()) headers.Authorization = `Bearer ${token.get()}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (accept) headers.Accept = accept;
  let answer;
  try {
    answer = await fetch(path, { method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "the service does not answer");
  }
  if (answer.ok) return answer;
  const problem = await answer.json().catch(() => ({}));
  throw new Refused(answer.status, problem.error?.message ?? problem.message ?? `${answer.status} ${answer.statusText}`);
}

export async function call(path, options) {
  const answer = await fetched(path, options);
  return answer.status === 204 ? null : answer.json();
}

export const run = (id, rest = "") => `v1/runs/${encodeURIComponent(id)}${rest}`;

// The messages of a stream of server-sent events: {id, event, data} each.
export async function* streamed(path, options = {}) {
  const answer = await fetched(path, { accept: "text/event-stream", ...options });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    buffer += value.replaceAll("\r\n", "\n");
    const messages = buffer.split("\n\n");
    buffer = messages.pop();
    for (const message of messages) {
      const found = { event: "message", data: [] };
      for (const line of message.split("\n")) {
        const at = line.indexOf(":");
        if (at <= 0) continue; // a comment
        const [name, content] = [line.slice(0, at), line.slice(at + 1).replace(/^ /, "")];
        if (name === "data") found.data.push(content);
        else found[name] = content;
      }
      if (found.data.length) yield { ...found, data: found.data.join("\n") };
    }
  }
}
