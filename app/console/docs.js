// The server's OpenAPI document as a page, each route with a form that sends a request.

import { getJson, key, request } from "./api.js";
import { $, element } from "./dom.js";

const pre = (text) => element("pre", { class: "code" }, text);

// The schema with what it refers to in its place, three levels down.
function shown(schema, all, depth = 0) {
  if (Array.isArray(schema)) return schema.map((one) => shown(one, all, depth));
  if (typeof schema !== "object" || schema === null) return schema;
  if (schema.$ref) {
    const name = schema.$ref.split("/").pop();
    return depth < 3 ? shown(all[name], all, depth + 1) : name;
  }
  return Object.fromEntries(Object.entries(schema).map(([name, one]) => [name, shown(one, all, depth)]));
}

function route(path, method, operation, schemas) {
  const schema = operation.requestBody?.content?.["application/json"]?.schema;
  const where = element("input", { "aria-label": "Path", value: path.slice(1), spellcheck: "false" });
  const body = method === "post" ? element("textarea", { "aria-label": "Body", spellcheck: "false" }, "{}") : null;
  const came = pre("");
  came.hidden = true;
  const form = element("form", { class: "card" }, where, body, element("button", { type: "submit" }, "Send"), came);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const json = body && { headers: { "content-type": "application/json" }, body: body.value };
    const response = await request(where.value, { method: method.toUpperCase(), ...json });
    came.textContent = `${response.status}\n${await response.text()}`;
    came.hidden = false;
  });
  const statuses = Object.entries(operation.responses).map(([status, one]) => `${status}: ${one.description}`);
  return element(
    "details",
    { class: "card" },
    element("summary", {}, `${method.toUpperCase()} ${path}`),
    element("p", {}, operation.description ?? operation.summary),
    schema ? pre(JSON.stringify(shown(schema, schemas), null, 2)) : null,
    pre(statuses.join("\n")),
    form,
  );
}

async function show() {
  try {
    const { paths, components } = await getJson("openapi.json");
    const all = Object.entries(paths).flatMap(([path, methods]) =>
      Object.entries(methods).map(([method, operation]) => route(path, method, operation, components.schemas)),
    );
    $("routes").replaceChildren(...all);
    $("trouble").hidden = true;
  } catch (error) {
    $("trouble").textContent = error.message;
    $("trouble").hidden = false;
  }
}

$("key").value = key.get();
$("key-form").addEventListener("submit", (event) => event.preventDefault());
$("key").addEventListener("change", () => {
  key.set($("key").value);
  show();
});
show();
