// The methods, their stages and options.

import { h, table } from "./dom.js";
import { call } from "./service.js";

export async function methodsView(main, { signal }) {
  const { methods } = await call("v1/methods", { signal });
  main.append(
    h("h1", {}, "Methods"),
    ...methods.map(({ name, summary, stages, options, roles, data }) =>
      h(
        "section",
        {},
        h(
          "details",
          {},
          h("summary", {}, h("strong", {}, name), ` ${summary}`),
          h("p", { class: "faint" }, [data && `data: ${data}`, roles.length && `roles: ${roles.join(", ")}`].filter(Boolean).join("; ")),
          h("ol", { class: "pipeline" }, stages.map((stage) => h("li", {}, stage))),
          h("p"),
          table(["option", "type", "default"], options.map(({ name: option, type, default: value }) => [option, type, value ?? "must be given"])),
        ),
      ),
    ),
  );
}
