// The page: which conversation is shown, what is asked, what keys do. Answers are answer.js, what turns look like turns.js,
// dialogs and toasts asides.js, storage store.js, HTTP server.js, the engine's picture picture.js.

import { Answer } from "./answer.js";
import * as asides from "./asides.js";
import * as picture from "./picture.js";
import * as server from "./server.js";
import * as store from "./store.js";
import { paintTurns } from "./turns.js";

const IDEAS = ["What is a list?", "How do I undo a commit in Git?", "Explain what an index does.", "Show a loop in Python."];
const LATE_MS = 500; // for what another tab wrote or let go of to be seen here
const ELSEWHERE = "Another tab is answering in this conversation: wait for it, or start a new one here.";
const LOOK_MS = { busy: 200, idle: 1500, hidden: 5000 };
const at = (id) => document.getElementById(id);

let chat = store.newChat(); // the one that is shown
const running = new Map(); // conversation id -> Answer, in this tab
let look = null; // the last of the engine
let leaving = false; // the page is being closed or loaded again, which breaks its requests
let removed = null; // for Undo
let changing = -1; // the question that is being written anew

// Turns

const acts = {
  copy: (n) => asides.copy(chat.turns[n].text),
  edit: (n) => edit(n),
  retry: () => retry(),
  waiting: () => running.get(chat.id)?.waiting(look) ?? "Another tab is answering.",
};

function paint() {
  at("empty").hidden = chat.turns.length > 0;
  paintTurns(at("turns"), chat.turns, changing, acts);
  const busy = running.has(chat.id);
  at("stop").hidden = !busy;
  at("send").hidden = busy;
  at("changing").hidden = changing < 0;
  document.title = chat.title ? `${chat.title} – DuoServe` : "DuoServe";
  follow();
}

// At most once a frame, whatever comes.
let due = 0;

function paintSoon(which) {
  if (due || chat.id !== which.id) return;
  due = requestAnimationFrame(() => {
    due = 0;
    paint();
    showFigures();
  });
}

// Stay at the end while the reader is there; leave them alone where they scrolled up.
let atEnd = true;

function follow() {
  const box = at("scroll");
  if (atEnd) box.scrollTop = box.scrollHeight;
  at("latest").hidden = atEnd || chat.turns.length === 0;
}

// Answers

const answerPage = {
  paint: paintSoon,
  problem: (text) => problem(text),
  leaving: () => leaving,
  say: (which, text) => chat.id === which.id && say(text),
  failed: (which, error, what) => {
    if (error.status === 401) asides.askKey(() => chat.id === which.id && retry());
    if (chat.id === which.id) say(what);
  },
};

let model = null;

async function modelName() {
  if (model !== null) return model;
  try {
    model = (await server.models())[0] ?? null;
    at("model").textContent = at("model").title = model ?? "";
  } catch {
    return "default"; // what is wrong is said by the request itself
  }
  return model ?? "default";
}

// One tab at a time answers in a conversation.
async function answer() {
  const asked = chat;
  if (running.has(asked.id)) return;
  const task = new Answer(asked, answerPage);
  running.set(asked.id, task);
  atEnd = true;
  try {
    await alone(asked.id, () => task.run(modelName));
  } finally {
    if (running.get(asked.id) === task) running.delete(asked.id);
    if (chat.id === asked.id) {
      paint();
      showFigures();
    }
    paintChats();
    hurryLook();
  }
}

const lockOf = (id) => `duoserve.answer.${id}`;

// Without locks (a page that is neither local nor encrypted) tabs are on their own.
async function alone(id, work) {
  if (!navigator.locks) return work();
  let ours = false;
  try {
    await navigator.locks.request(lockOf(id), { signal: AbortSignal.timeout(LATE_MS) }, () => {
      ours = true;
      return work();
    });
  } catch (error) {
    if (ours) throw error;
    problem(ELSEWHERE);
  }
}

async function answeredElsewhere(id) {
  if (!navigator.locks) return false;
  const { held } = await navigator.locks.query();
  return held.some((lock) => lock.name === lockOf(id)) && !running.has(id);
}

async function send(text) {
  text = text.trim();
  if (!text || running.has(chat.id)) return;
  if (await answeredElsewhere(chat.id)) return problem(ELSEWHERE);
  problem("");
  if (changing === 0) chat.title = ""; // it is another conversation now
  if (changing >= 0) chat.turns.splice(changing);
  chat.turns.push({ role: "user", text });
  clearQuestion();
  store.save(chat);
  paintChats();
  await answer();
}

// A question is written anew where questions are written; sending it takes the place of all that follows.
function edit(n) {
  if (running.has(chat.id)) return;
  changing = n;
  at("question").value = chat.turns[n].text;
  grow();
  at("question").focus();
  paint();
}

function editLast(event) {
  const n = chat.turns.findLastIndex((turn) => turn.role === "user");
  if (n < 0) return;
  event.preventDefault();
  edit(n);
}

function clearQuestion() {
  changing = -1;
  at("question").value = "";
  grow();
}

async function retry() {
  if (running.has(chat.id) || !chat.turns.length || (await answeredElsewhere(chat.id))) return;
  problem("");
  if (changing >= 0) clearQuestion();
  if (chat.turns.at(-1).role === "assistant") chat.turns.pop();
  await answer();
}

function stop() {
  running.get(chat.id)?.abort.abort();
}

// Conversations

function paintChats() {
  const known = store.chats();
  at("chat-list").replaceChildren(...known.map((one) => {
    const line = document.createElement("li");
    const open = line.appendChild(document.createElement("button"));
    open.type = "button";
    open.className = "open";
    open.textContent = one.title || "Untitled";
    open.dataset.id = one.id;
    if (one.id === chat.id) open.setAttribute("aria-current", "true");
    if (running.has(one.id)) open.dataset.busy = "true";
    const drop = line.appendChild(document.createElement("button"));
    drop.type = "button";
    drop.className = "drop";
    drop.setAttribute("aria-label", `Delete ${one.title || "Untitled"}`);
    drop.title = "Delete";
    drop.textContent = "×";
    open.addEventListener("click", () => show(one.id, true));
    drop.addEventListener("click", () => removeChat(one));
    return line;
  }));
}

async function show(id, focus = false) {
  if (changing >= 0) clearQuestion();
  chat = running.get(id)?.chat ?? store.load(id) ?? store.newChat();
  sessionStorage.setItem("duoserve.shown", chat.id);
  atEnd = true;
  problem("");
  uncover();
  paint();
  paintChats();
  showFigures();
  if (focus) at("question").focus();
  await settle();
}

// An answer that nobody is writing any more was interrupted: by a reload, or a closed tab.
async function settle() {
  const { id } = chat;
  const streams = () => chat.id === id && chat.turns.at(-1)?.state === "streaming" && !running.has(id);
  if (!streams()) return;
  if (await answeredElsewhere(id)) return void whenFree(id);
  await new Promise((done) => setTimeout(done, LATE_MS)); // its last words may be on their way from tab to tab
  if (!streams()) return;
  chat = store.load(id) ?? chat;
  if (streams()) {
    const turn = chat.turns.at(-1);
    turn.state = "broken";
    turn.problem = "Interrupted: the page was closed or loaded again. Press Retry.";
    store.save(chat);
  }
  paint();
  showFigures();
}

// The tab that answers has ended it, or was closed while it did.
const watched = new Set();

async function whenFree(id) {
  if (watched.has(id)) return;
  watched.add(id);
  await navigator.locks.request(lockOf(id), { mode: "shared" }, () => {});
  watched.delete(id);
  if (chat.id === id) await settle();
}

function fresh() {
  if (changing >= 0) clearQuestion();
  chat = store.newChat();
  sessionStorage.removeItem("duoserve.shown");
  uncover();
  problem("");
  paint();
  paintChats();
  showFigures();
  at("question").focus();
}

function removeChat(one) {
  running.get(one.id)?.abort.abort();
  removed = store.load(one.id);
  const drop = () => {
    store.remove(one.id);
    paintChats();
  };
  drop();
  const task = running.get(one.id);
  if (task) task.keep = () => {}; // what it still writes would bring the conversation back
  if (one.id === chat.id) fresh();
  asides.toast("Deleted.", () => {
    if (removed) store.save(removed);
    removed = null;
    paintChats();
  });
}

function step(by) {
  const known = store.chats();
  if (!known.length) return;
  const here = known.findIndex((one) => one.id === chat.id);
  const next = here < 0 ? 0 : Math.max(0, Math.min(known.length - 1, here + by));
  show(known[next].id, true);
}

// Messages to the reader

function problem(text) {
  at("problem").textContent = text;
  at("problem").hidden = !text;
}

function say(text) {
  at("said").textContent = text;
}

function showFigures() {
  const figures = chat.turns.findLast((turn) => turn.figures)?.figures;
  at("ttft").textContent = figures ? `${figures.ttft.toFixed(2)} s` : "–";
  at("rate").textContent = figures?.rate ? figures.rate.toFixed(1) : "–";
  at("tokens").textContent = figures ? [figures.prompt, figures.tokens].filter((n) => n !== null).join(" + ") : "–";
}

// The engine

let lookTimer = 0;
let looking = false;

async function lookAgain() {
  clearTimeout(lookTimer);
  if (looking) return;
  looking = true;
  try {
    look = await server.snapshot();
    look.at = performance.now();
    status("ready", look.requests.active ? "answering" : "ready");
    if (model === null) await modelName();
    if (panelShown()) picture.show(look);
    const task = running.get(chat.id);
    if (task && !task.turn.text) paintSoon(task.chat);
  } catch (error) {
    look = null;
    await sayWhy(error);
  } finally {
    looking = false;
    lookTimer = setTimeout(lookAgain, pace());
  }
}

function pace() {
  if (document.hidden) return LOOK_MS.hidden;
  return look && (look.requests.active || running.size) && panelShown() ? LOOK_MS.busy : LOOK_MS.idle;
}

function hurryLook() {
  if (!document.hidden) lookAgain();
}

async function sayWhy(error) {
  if (error.status === 401) {
    status("wait", "a key is needed");
    store.forgetKey(); // it was not the right one
    if (!sessionStorage.getItem("duoserve.later")) asides.askKey(null);
  } else if (error.code === "loading") {
    const { progress } = await server.health().catch(() => ({}));
    const share = progress?.share != null ? `, ${Math.round(100 * progress.share)} %` : "";
    status("wait", `loading${share}`);
  } else if (error.status === 0) {
    model = null; // another server may answer next
    status("away", "not reachable");
  } else {
    status("wait", error.message ?? "busy");
  }
}

function status(state, text) {
  const line = at("status");
  line.dataset.state = state;
  if (line.textContent !== text) line.textContent = text;
}

const narrow = matchMedia("(max-width: 1080px)");
const slim = matchMedia("(max-width: 760px)");

function panelShown() {
  return narrow.matches ? document.body.classList.contains("panel-open") : !document.body.classList.contains("panel-shut");
}

function togglePanel() {
  document.body.classList.toggle(narrow.matches ? "panel-open" : "panel-shut");
  at("show-panel").setAttribute("aria-expanded", String(panelShown()));
  hurryLook();
}

function toggleChats() {
  const shown = document.body.classList.toggle("chats-open");
  at("show-chats").setAttribute("aria-expanded", String(shown));
  if (shown) at("new-chat").focus();
}

// What lies over the conversation goes; the panel only where it leaves nothing of it to work with.
function uncover() {
  if (document.body.classList.contains("chats-open")) toggleChats();
  if (slim.matches && panelShown()) togglePanel();
}

// Input

function grow() {
  const box = at("question");
  box.style.height = "auto";
  box.style.height = `${Math.min(box.scrollHeight + 2, 220)}px`;
}

function onKey(event) {
  if (document.querySelector("dialog[open]")) return;
  const typing = /^(TEXTAREA|INPUT)$/.test(event.target.tagName);
  const alt = event.altKey && !event.ctrlKey && !event.metaKey;
  const act = alt
    ? { KeyN: fresh, KeyR: retry, KeyP: togglePanel, ArrowUp: () => step(-1), ArrowDown: () => step(1) }[event.code]
    : { Escape: onEscape, "?": typing ? undefined : () => at("help").showModal() }[event.key];
  if (!act) return;
  event.preventDefault();
  act();
}

function onEscape() {
  if (running.has(chat.id)) stop();
  else if (changing >= 0) stopChanging();
  uncover();
  if (narrow.matches && panelShown()) togglePanel();
  at("question").focus();
}

function stopChanging() {
  clearQuestion();
  paint();
  at("question").focus();
}

function listen() {
  asides.listen(hurryLook);
  at("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    send(at("question").value);
  });
  at("question").addEventListener("keydown", (event) => {
    if (event.key === "ArrowUp" && !event.altKey && !at("question").value) return editLast(event);
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send(at("question").value);
  });
  at("question").addEventListener("input", grow);
  at("stop").addEventListener("click", () => {
    stop();
    at("question").focus();
  });
  at("stop-changing").addEventListener("click", stopChanging);
  at("new-chat").addEventListener("click", fresh);
  at("show-chats").addEventListener("click", toggleChats);
  at("show-panel").addEventListener("click", togglePanel);
  document.querySelector("main").addEventListener("pointerdown", uncover);
  at("show-settings").addEventListener("click", asides.openSettings);
  at("show-help").addEventListener("click", () => at("help").showModal());
  at("turns").addEventListener("toggle", paint, true); // a thought was opened: it is drawn only then
  at("turns").addEventListener("click", (event) => {
    const box = event.target.closest(".copy-code")?.closest(".code");
    if (box) asides.copy(box.querySelector("pre").textContent);
  });
  at("scroll").addEventListener("scroll", () => {
    const box = at("scroll");
    atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 60;
    at("latest").hidden = atEnd || chat.turns.length === 0;
  }, { passive: true });
  at("latest").addEventListener("click", () => {
    atEnd = true;
    follow();
  });
  at("map").addEventListener("pointermove", picture.point);
  at("map").addEventListener("pointerleave", picture.leave);
  at("map").addEventListener("blur", picture.leave);
  at("map").addEventListener("keydown", (event) => {
    if (!event.altKey && picture.walk(event.key)) event.preventDefault();
  });
  document.addEventListener("keydown", onKey);
  document.addEventListener("visibilitychange", hurryLook);
  window.addEventListener("online", hurryLook);
  window.addEventListener("resize", picture.redraw);
  window.addEventListener("pagehide", () => {
    leaving = true;
    running.forEach((task) => task.keep());
  });
  window.addEventListener("pageshow", () => (leaving = false));
  window.addEventListener("storage", onStorage);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", picture.redraw);
}

// Another tab wrote: show what it made of this conversation, unless this tab is answering in it.
function onStorage(event) {
  const id = store.chatOf(event);
  if (event.key !== null && id === undefined) return;
  paintChats();
  if (running.has(chat.id) || (id !== undefined && id !== chat.id)) return;
  const stored = store.load(chat.id);
  if (stored) chat = stored;
  else if (chat.turns.length) return fresh();
  paint();
  showFigures();
  settle();
}

function begin() {
  at("ideas").append(...IDEAS.map((idea) => {
    const line = document.createElement("li");
    const button = line.appendChild(document.createElement("button"));
    button.type = "button";
    button.textContent = idea;
    button.addEventListener("click", () => send(idea));
    return line;
  }));
  listen();
  const shown = sessionStorage.getItem("duoserve.shown");
  show(shown ?? store.chats()[0]?.id ?? "");
  at("question").focus();
  at("show-panel").setAttribute("aria-expanded", String(panelShown()));
  lookAgain();
}

begin();
