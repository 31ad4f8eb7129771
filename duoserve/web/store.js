// Conversations, settings and the key, as this browser keeps them. Knows storage; knows nothing of pages or servers.
// Each conversation has an entry of its own, so that two tabs never write over each other's.

const CHAT = "duoserve.chat.";
const SETTINGS = "duoserve.settings";
const KEY = "duoserve.key"; // in sessionStorage: gone with the tab

export function newChat() {
  return { id: `${Date.now().toString(36)}${Math.random().toString(36).slice(2, 8)}`, title: "", at: Date.now(), turns: [] };
}

// Newest first.
export function chats() {
  return Object.keys(localStorage)
    .filter((name) => name.startsWith(CHAT))
    .map((name) => load(name.slice(CHAT.length)))
    .filter((chat) => chat !== null)
    .sort((a, b) => b.at - a.at);
}

// What was stored may have been written by another version, or by hand.
export function load(id) {
  const chat = parsed(localStorage.getItem(CHAT + id));
  const whole = chat !== null && chat.id === id && Array.isArray(chat.turns);
  return whole && chat.turns.every((turn) => typeof turn?.text === "string") ? chat : null;
}

// False where the browser has no room left.
export function save(chat) {
  chat.at = Date.now();
  chat.title ||= chat.turns[0]?.text.replace(/\s+/g, " ").trim().slice(0, 60) ?? "";
  return put(localStorage, CHAT + chat.id, JSON.stringify(chat));
}

export function remove(id) {
  localStorage.removeItem(CHAT + id);
}

// The conversation that a storage event of another tab is about; undefined where it is about something else.
export function chatOf(event) {
  return event.key?.startsWith(CHAT) ? event.key.slice(CHAT.length) : undefined;
}

export function settings() {
  return parsed(localStorage.getItem(SETTINGS)) ?? {};
}

export function saveSettings(values) {
  return put(localStorage, SETTINGS, JSON.stringify(values));
}

export function key() {
  return sessionStorage.getItem(KEY);
}

export function saveKey(value) {
  put(sessionStorage, KEY, value);
}

export function forgetKey() {
  sessionStorage.removeItem(KEY);
}

function put(storage, name, text) {
  try {
    storage.setItem(name, text);
    return true;
  } catch {
    return false;
  }
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}
