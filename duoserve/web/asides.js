// What stands beside the conversation: a toast, the clipboard, the settings, the key. Knows the browser's storage; knows no
// conversations or servers.

import * as store from "./store.js";

const at = (id) => document.getElementById(id);

let toastTimer = 0;

export function toast(text, undo = null) {
  at("toast-text").textContent = text;
  at("toast-undo").hidden = undo === null;
  at("toast-undo").onclick = () => {
    undo();
    at("toast").hidden = true;
  };
  at("toast").hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => (at("toast").hidden = true), undo ? 8000 : 2500);
}

export async function copy(text) {
  const copied = await navigator.clipboard?.writeText(text).then(() => true, () => false);
  toast(copied || copiedByHand(text) ? "Copied." : "The browser did not let us copy; select the text instead.");
}

// As pages copy that are neither local nor encrypted.
function copiedByHand(text) {
  const was = document.activeElement;
  const box = document.body.appendChild(document.createElement("textarea"));
  box.className = "hidden";
  box.value = text;
  box.select();
  const done = document.execCommand("copy");
  box.remove();
  was?.focus();
  return done;
}

export function openSettings() {
  const { system, temperature, maxTokens } = store.settings();
  at("system").value = system ?? "";
  at("temperature").value = temperature ?? "";
  at("max-tokens").value = maxTokens ?? "";
  at("settings").showModal();
}

function keepSettings() {
  const number = (id, least, most) => {
    const value = at(id).value === "" ? null : Number(at(id).value);
    return value === null || !Number.isFinite(value) ? null : Math.min(most, Math.max(least, value));
  };
  const maxTokens = number("max-tokens", 1, 2 ** 31 - 1);
  store.saveSettings({
    system: at("system").value.trim(),
    temperature: number("temperature", 0, 2),
    maxTokens: maxTokens === null ? null : Math.round(maxTokens),
  });
}

let afterKey = null;

export function askKey(then) {
  afterKey = then ?? afterKey;
  if (at("key").open) return;
  at("key").showModal();
  at("key-value").value = "";
  at("key-value").focus();
}

// `keyGiven` is called once there is another key.
export function listen(keyGiven) {
  at("settings").addEventListener("close", keepSettings);
  at("key").addEventListener("close", () => {
    const value = at("key-value").value.trim();
    at("key-value").value = "";
    if (!value) return sessionStorage.setItem("duoserve.later", "1"); // not to be asked at every look
    sessionStorage.removeItem("duoserve.later");
    store.saveKey(value);
    keyGiven();
    const then = afterKey;
    afterKey = null;
    return then?.();
  });
  at("key-later").addEventListener("click", () => {
    at("key-value").value = "";
    at("key").close();
  });
}
