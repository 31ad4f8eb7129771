// What a turn looks like: who, the thought, the text, a note, what can be done with it. Knows elements; knows nothing of
// servers or storage.

import { render } from "./markdown.js";

// `acts`: {copy, edit, retry, waiting}; `changing`: the turn that is being written anew, or -1.
export function paintTurns(list, turns, changing, acts) {
  turns.forEach((turn, n) => {
    const line = list.children[n] ?? list.appendChild(newTurn());
    paintTurn(line, turn, acts);
    line.classList.toggle("to-go", changing >= 0 && n >= changing);
    paintActions(line.querySelector(".actions"), turn, n, n === turns.length - 1, acts);
  });
  while (list.childElementCount > turns.length) list.lastElementChild.remove();
}

function newTurn() {
  const line = document.createElement("li");
  line.className = "turn";
  line.appendChild(document.createElement("h3")).className = "who";
  line.appendChild(newThought());
  for (const [tag, name] of [["div", "body"], ["p", "note"], ["div", "actions"]]) {
    line.appendChild(document.createElement(tag)).className = name;
  }
  return line;
}

function newThought() {
  const box = document.createElement("details");
  box.className = "thought";
  box.hidden = true;
  const summary = box.appendChild(document.createElement("summary"));
  summary.addEventListener("click", () => (box.touched = true)); // from here on it is the reader's
  box.appendChild(document.createElement("div")).className = "thought-body";
  return box;
}

function paintTurn(line, turn, acts) {
  if (line.turn !== turn) delete line.querySelector(".thought").touched;
  line.turn = turn;
  line.dataset.role = turn.role;
  line.dataset.state = turn.state ?? "";
  line.querySelector(".who").textContent = turn.role === "user" ? "You" : "Model";
  paintThought(line.querySelector(".thought"), turn);
  const body = line.querySelector(".body");
  if (turn.role === "user") body.textContent = turn.text;
  else render(body, turn.text);
  body.setAttribute("aria-busy", String(turn.state === "streaming"));
  line.querySelector(".note").textContent = noteOf(turn, acts);
}

// Open while there is nothing else to read, shut once the answer has begun, unless the reader chose.
function paintThought(box, turn) {
  const text = typeof turn.reasoning === "string" ? turn.reasoning : "";
  box.hidden = text === "";
  if (box.hidden) return box.querySelector(".thought-body").replaceChildren();
  const thinks = turn.state === "streaming" && !turn.text;
  box.dataset.state = thinks ? "thinking" : "";
  if (!box.touched) box.open = thinks;
  const seconds = Number.isFinite(turn.thoughtSeconds) ? turn.thoughtSeconds : 0;
  const title = thinks ? "Thinking" : seconds >= 1 ? `Thought for ${told(seconds)}` : "Thought";
  const summary = box.querySelector("summary");
  if (summary.textContent !== title) summary.textContent = title;
  const body = box.querySelector(".thought-body");
  if (!box.open) return body.replaceChildren();
  const follows = body.scrollHeight - body.scrollTop - body.clientHeight < 40;
  render(body, text);
  if (thinks && follows) body.scrollTop = body.scrollHeight;
}

function told(seconds) {
  const whole = Math.round(seconds);
  return whole < 60 ? `${whole} s` : `${Math.floor(whole / 60)} min ${whole % 60} s`;
}

function noteOf(turn, acts) {
  if (turn.state === "streaming") return turn.text || turn.reasoning ? "" : acts.waiting();
  if (turn.state === "stopped") return "Stopped.";
  if (turn.state === "broken") return turn.problem || "Interrupted. Press Retry.";
  if (turn.finish === "length") return "Cut off: the most tokens that were asked for, or that fit.";
  return turn.role === "assistant" && !turn.text ? "The model ended without a word." : "";
}

const NAMES = { Copy: "Copy this text", Edit: "Edit this message and ask again", Retry: "Answer again" };

function paintActions(box, turn, n, isLast, acts) {
  const wanted = actionsOf(turn, isLast);
  if (wanted.join() === [...box.children].map((one) => one.textContent).join()) return;
  box.replaceChildren(...wanted.map((name) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "text";
    button.textContent = name;
    button.title = NAMES[name];
    button.addEventListener("click", () => acts[name.toLowerCase()](n));
    return button;
  }));
}

function actionsOf(turn, isLast) {
  if (turn.state === "streaming") return [];
  if (turn.role === "user") return ["Copy", "Edit"];
  return [...(turn.text ? ["Copy"] : []), ...(isLast ? ["Retry"] : [])];
}
