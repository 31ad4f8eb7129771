// One answer on its way into its conversation: heard, measured, kept, read out. Knows the server's events and the browser's
// storage; knows of the page only what it is given.

import * as server from "./server.js";
import * as store from "./store.js";

const SAVE_MS = 400; // between writes of a growing answer
const SAY_MS = 1500; // between sentences read out

// `page`: {paint(chat), say(chat, text), problem(text), failed(chat, error), leaving()}.
export class Answer {
  constructor(asked, page) {
    this.chat = asked;
    this.page = page;
    this.turn = { role: "assistant", text: "", state: "streaming" };
    this.abort = new AbortController();
    this.began = performance.now();
    this.first = this.latest = null;
    this.pieces = 0;
    this.progress = null;
    this.keeping = 0; // the timer of a write
    this.said = 0;
    this.spoken = 0; // characters read out
  }

  async run(modelName) {
    const asked = messages(this.chat.turns);
    this.chat.turns.push(this.turn);
    this.keep();
    this.page.paint(this.chat);
    try {
      const body = { model: await modelName(), messages: asked, ...options() };
      for await (const said of server.answer(body, this.abort.signal)) this.hear(said);
      this.turn.state = "done";
    } catch (error) {
      this.fail(error);
    }
    this.measure();
    this.speak(this.turn.text.length - this.spoken);
    if (!this.page.leaving()) this.keep(); // while no other tab may take the conversation for abandoned
  }

  hear({ text, reasoning, progress, finish, usage }) {
    if (reasoning !== undefined) this.think(reasoning);
    if (text !== undefined) {
      this.note();
      this.turn.text += text;
    }
    if (progress !== undefined) this.progress = progress;
    if (finish !== undefined) this.turn.finish = finish;
    if (usage !== undefined) this.usage = usage;
    this.keeping ||= setTimeout(() => this.keep(), SAVE_MS);
    this.measure();
    this.say();
    this.page.paint(this.chat);
  }

  // What the model writes for itself is shown, and not read out.
  think(text) {
    this.note();
    if (this.turn.reasoning === undefined) this.page.say(this.chat, "The model is thinking.");
    this.turn.reasoning = (this.turn.reasoning ?? "") + text;
    this.turn.thoughtSeconds = (this.latest - this.first) / 1000;
  }

  note() {
    this.latest = performance.now();
    this.first ??= this.latest;
    this.pieces += 1;
  }

  fail(error) {
    if (this.page.leaving()) return; // what the next page makes of it: interrupted
    if (error.name === "AbortError") {
      this.turn.state = "stopped";
      this.page.say(this.chat, "Stopped.");
      return;
    }
    this.turn.state = "broken";
    this.turn.problem = error instanceof server.Problem ? error.message : `The page failed (${error.message}). Press Retry.`;
    this.page.failed(this.chat, error, this.turn.problem);
  }

  // What to say before there is text: a prompt may take long. `look`: of the engine, or null.
  waiting(look) {
    const { total, processed } = this.progress ?? {};
    if (total) return `Reading the prompt: ${processed} of ${total} tokens.`;
    if (look?.requests.queued) return `Waiting for a place: ${look.requests.queued} in the queue.`;
    const reading = look?.requests.reading ?? [];
    const [read, all] = [0, 1].map((n) => reading.reduce((sum, one) => sum + one[n], 0));
    if (all) return `Reading ${reading.length > 1 ? `${reading.length} prompts` : "the prompt"}: ${read} of ${all} tokens.`;
    return "Waiting for the first token.";
  }

  measure() {
    const tokens = this.usage?.completion_tokens ?? this.pieces;
    if (this.first === null) return;
    const seconds = (this.latest - this.first) / 1000;
    this.turn.figures = {
      ttft: (this.first - this.began) / 1000,
      rate: tokens > 1 && seconds > 0 ? (tokens - 1) / seconds : null,
      tokens,
      prompt: this.usage?.prompt_tokens ?? null,
    };
  }

  keep() {
    clearTimeout(this.keeping);
    this.keeping = 0;
    if (!store.save(this.chat)) {
      this.page.problem("The browser's storage is full: delete a conversation, this one is not kept.");
    }
  }

  // Whole sentences for those who listen, not every token.
  say() {
    if (performance.now() - this.said < SAY_MS) return;
    const rest = this.turn.text.slice(this.spoken);
    const end = Math.max(rest.lastIndexOf(". "), rest.lastIndexOf("\n")) + 1;
    if (end > 0) this.speak(end);
  }

  speak(n) {
    this.said = performance.now();
    if (n > 0) this.page.say(this.chat, this.turn.text.slice(this.spoken, this.spoken + n));
    this.spoken += n;
  }
}

// What the model is to read: turns that were answered, and the last question. One that nothing was said to would put two
// questions in a row, which many templates refuse. What it thought before is not among it.
function messages(turns) {
  const found = [];
  turns.forEach((turn, n) => {
    const answer = turns[n + 1];
    if (turn.role === "user" && (!answer || answer.text)) {
      found.push({ role: "user", content: turn.text });
      if (answer?.text) found.push({ role: "assistant", content: answer.text });
    }
  });
  const system = store.settings().system;
  return system ? [{ role: "system", content: system }, ...found] : found;
}

function options() {
  const { temperature, maxTokens } = store.settings();
  return { ...(temperature != null ? { temperature } : {}), ...(maxTokens != null ? { max_tokens: maxTokens } : {}) };
}
