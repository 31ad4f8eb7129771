// The server's routes as functions. Knows HTTP, server-sent events and OpenAI's envelope of errors; knows nothing of the page.

import * as store from "./store.js";

// `message` is one line that says what happened and what to do; status 0: the server was not reached.
export class Problem extends Error {
  constructor(status, message, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

const AWAY = "The server cannot be reached. See that `duoserve serve` is running, then press Retry.";
const BROKE = "The answer broke off: the connection ended before it did. Press Retry.";

export async function models() {
  return (await (await request("v1/models")).json()).data.map((model) => model.id);
}

export async function snapshot() {
  return (await request("v1/expert-cache")).json();
}

export async function health() {
  const response = await reach("health", {});
  return response.json();
}

// Yields {text} | {reasoning} | {progress} | {finish} | {usage} until the answer is whole; raises Problem, or AbortError once `signal` says so.
export async function* answer(body, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true }, return_progress: true }),
    signal,
  });
  let finished = false;
  for await (const data of events(response)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw of(chunk.error, 500);
    for (const said of parts(chunk)) {
      finished ||= said.finish !== undefined;
      yield said;
    }
  }
  if (!finished) throw new Problem(0, BROKE);
}

function* parts(chunk) {
  const choice = chunk.choices?.[0];
  if (chunk.prompt_progress) yield { progress: chunk.prompt_progress };
  const reasoning = choice?.delta?.reasoning ?? choice?.delta?.reasoning_content; // beyond OpenAI's, by either name
  if (typeof reasoning === "string" && reasoning) yield { reasoning };
  if (choice?.delta?.content) yield { text: choice.delta.content };
  if (choice?.finish_reason) yield { finish: choice.finish_reason };
  if (chunk.usage) yield { usage: chunk.usage };
}

// The data of each server-sent event; comments and other fields are passed over.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    while (true) {
      const { value, done } = await reader.read().catch((error) => {
        throw error.name === "AbortError" ? error : new Problem(0, BROKE);
      });
      if (done) return;
      const whole = (held + value).replace(/\r\n/g, "\n").split("\n\n");
      held = whole.pop();
      for (const event of whole) {
        const lines = event.split("\n").filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function request(path, options = {}) {
  const response = await reach(path, options);
  if (response.ok) return response;
  const told = await response.json().catch(() => ({}));
  throw of(told.error ?? {}, response.status, response.headers.get("Retry-After"));
}

async function reach(path, options) {
  const key = store.key();
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  try {
    return await fetch(path, { cache: "no-store", ...options, headers });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Problem(0, AWAY);
  }
}

// An envelope as one line; where the server did not say what to do, the status does.
function of(error, status, retry = null) {
  const said = typeof error.message === "string" ? error.message.replace(/\s+/g, " ").trim() : "";
  const next = {
    401: "Give the key that the server was started with.",
    413: "Make the message shorter.",
    429: `Try again in ${retry ?? "a few"} s.`,
    503: `Try again in ${retry ?? "a few"} s.`,
  }[status];
  const line = said && (status < 500 || said.includes(";")) ? said : [said || `The server answered ${status}.`, next].join(" ");
  return new Problem(status, line.trim(), error.code ?? null);
}
