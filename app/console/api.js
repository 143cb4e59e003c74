// The server's API: where it is, the reader's key, and an answer as it is written.

const KEY = "candor.key";

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

// status: HTTP's, or 0 where the server was not reached.
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

// path: from the server's root, which is one above the console wherever a proxy puts it.
export async function request(path, options = {}) {
  const headers = new Headers(options.headers);
  if (key.get()) headers.set("authorization", `Bearer ${key.get()}`);
  try {
    return await fetch(new URL(`../${path}`, document.baseURI), { ...options, headers });
  } catch {
    throw new ApiError(0, "The server cannot be reached.");
  }
}

async function call(path, options) {
  const response = await request(path, options);
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new ApiError(response.status, body?.error?.message ?? `The server answered ${response.status}.`);
}

export const getJson = async (path) => (await call(path)).json();
export const getText = async (path) => (await call(path)).text();

const post = (path, body) =>
  call(path, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) });

export const sendLabel = (label) => post("v1/reliability/labels", label);
export const sendFeedback = (id, correct) => post("v1/reliability/feedback", { id, index: 0, correct });

// Streams one answer. onText: called with the text so far. Gives {id, content, refusal, result}, result being its
// entry in `reliability.results`.
export async function ask({ model, prompt, reliability }, onText) {
  const messages = [{ role: "user", content: prompt }];
  const response = await post("v1/chat/completions", { model, messages, stream: true, reliability });
  const answer = { id: null, content: "", refusal: null, result: null };
  for await (const event of events(response.body)) {
    if (event.error) throw new ApiError(500, event.error.message);
    answer.id = event.id;
    const delta = event.choices[0]?.delta ?? {};
    if (delta.content) onText((answer.content += delta.content));
    if (delta.refusal) answer.refusal = (answer.refusal ?? "") + delta.refusal;
    answer.result = event.reliability?.results[0] ?? answer.result;
  }
  if (!answer.result) throw new ApiError(0, "The answer broke off.");
  return answer;
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}
