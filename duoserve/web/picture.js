// The engine as a picture: experts, lanes, rates, memory. Knows what GET /v1/expert-cache says; asks nobody for it.

const STEPS = 90; // columns of the history
const WINDOW = 40; // looks that the shown rates are of
const CHIPS = 3; // transfers drawn per look and lane
const APART_MS = 125; // between two on one track, so that they can be read
const NAMES = { r: "resident", u: "in use", g: "here on a guess", a: "arriving, needed", c: "arriving, guessed", ".": "absent" };
const LANES = {
  demand: ["Needed", "a router has spoken, the layer waits"],
  ahead: ["Guessed", "the next layer's, before its router speaks"],
};
const at = (id) => document.getElementById(id);

let last = null; // the look before
let looks = []; // [{t, hits, in_flight, misses}]: differences between looks that had any
let cursor = null; // {layer, expert} that the reader points at
let fresh = new Map(); // "layer.expert" -> looks for which its arrival still shows

export function show(look) {
  const delta = last && last.model === look.model ? since(last, look) : null;
  note(look, delta);
  drawMap(look);
  drawLanes(look, delta);
  drawRates(look);
  drawMemory(look.memory);
  drawServer(look);
  last = look;
}

// Colours follow the scheme and sizes the panel, so both need a new drawing.
export function redraw() {
  if (last) {
    drawMap(last);
    drawRates(last);
  }
}

function since(before, now) {
  const seconds = Math.max(0.001, (now.at - before.at) / 1000);
  const counts = {};
  for (const name of Object.keys(now.counts)) counts[name] = now.counts[name] - before.counts[name];
  const lanes = {};
  for (const lane of Object.keys(now.lanes)) lanes[lane] = now.lanes[lane].done - before.lanes[lane].done;
  const restarted = Object.values(lanes).some((n) => n < 0);
  return restarted ? null : { seconds, counts, lanes, bytes: now.bytes_moved - before.bytes_moved };
}

function note(look, delta) {
  if (last && !delta) looks = []; // another engine
  if (delta) {
    const { hits, in_flight, misses } = delta.counts;
    if (hits + in_flight + misses > 0) looks = [...looks, { hits, in_flight, misses }].slice(-STEPS);
  }
  fresh = new Map([...fresh].map(([name, n]) => [name, n - 1]).filter(([, n]) => n > 0));
  for (const lane of Object.keys(look.lanes)) {
    const n = Math.min(delta?.lanes[lane] ?? 0, look.lanes[lane].last.length);
    for (const [layer, expert] of n > 0 ? look.lanes[lane].last.slice(-n) : []) fresh.set(`${layer}.${expert}`, 2);
  }
}

// Experts

function colours() {
  const style = getComputedStyle(document.documentElement);
  const names = ["resident", "used", "arriving", "coming", "guessed", "absent", "ink", "hit", "flight", "miss"];
  return Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}

// A canvas as wide as its box and so high, in CSS pixels, drawn at the screen's own resolution.
function sheet(canvas, height) {
  const scale = window.devicePixelRatio || 1;
  const width = canvas.clientWidth;
  const [w, h] = [Math.round(width * scale), Math.round(height * scale)];
  if (canvas.width !== w || canvas.height !== h) {
    canvas.width = w;
    canvas.height = h;
    canvas.style.height = `${height}px`;
  }
  const pen = canvas.getContext("2d");
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.clearRect(0, 0, width, height);
  return { pen, width };
}

function grid(look) {
  const columns = Math.max(...look.experts_per_layer);
  const width = at("map").clientWidth;
  const cell = width / columns;
  return { columns, cell, row: Math.min(16, Math.max(4, cell, 84 / look.layers)) };
}

function drawMap(look) {
  const { cell, row } = grid(look);
  const { pen } = sheet(at("map"), Math.ceil(row * look.layers));
  const colour = colours();
  const gap = cell >= 5 ? 1 : cell >= 3 ? 0.5 : 0;
  look.state.forEach((states, layer) => {
    for (let expert = 0; expert < states.length; expert++) {
      const box = [expert * cell, layer * row, cell - gap, row - (row >= 5 ? 1 : 0.5)];
      const name = fresh.has(`${layer}.${expert}`) && states[expert] === "r" ? "fresh" : states[expert];
      drawExpert(pen, colour, name, Number(look.heat[layer][expert]) / 9, box);
    }
  });
  if (cursor) {
    pen.strokeStyle = colour.ink;
    pen.lineWidth = 2;
    pen.strokeRect(cursor.expert * cell, cursor.layer * row, Math.max(4, cell - gap), row - 1);
  }
  at("residency").textContent = `${look.slots} of ${look.experts} fit`;
  describe(look);
}

// Shapes differ as well as colours: what arrives is half a cell, a guess is hollow.
function drawExpert(pen, colour, state, heat, [x, y, w, h]) {
  const hollow = (name) => {
    pen.fillStyle = colour.absent;
    pen.fillRect(x, y, w, h);
    pen.fillStyle = colour[name];
    if (Math.min(w, h) < 4) return pen.fillRect(x, y, w, h);
    pen.strokeStyle = colour[name];
    pen.lineWidth = 1.5;
    return pen.strokeRect(x + 1, y + 1, w - 2, h - 2);
  };
  const half = (name) => {
    pen.fillStyle = colour.absent;
    pen.fillRect(x, y, w, h);
    pen.fillStyle = colour[name];
    pen.fillRect(x, y + h / 2, w, h / 2);
  };
  if (state === "g") return hollow("guessed");
  if (state === "a") return half("arriving");
  if (state === "c") return half("coming");
  const resident = state === "r" || state === "fresh";
  pen.fillStyle = state === "u" ? colour.used : resident ? colour.resident : colour.absent;
  pen.globalAlpha = resident ? 0.3 + 0.7 * Math.sqrt(heat) : 1;
  pen.fillRect(x, y, w, h);
  pen.globalAlpha = 1;
  if (state === "fresh") {
    pen.fillStyle = colour.arriving;
    pen.fillRect(x, y, w, Math.max(1, h / 4));
  }
  return undefined;
}

function describe(look) {
  if (cursor) {
    const state = look.state[cursor.layer]?.[cursor.expert];
    const heat = Number(look.heat[cursor.layer]?.[cursor.expert]) / 9;
    const often = heat > 0.5 ? "used by most tokens" : heat > 0.15 ? "used now and then" : "hardly used lately";
    put("map-readout", `Layer ${cursor.layer}, expert ${cursor.expert}: ${NAMES[state] ?? "none"}, ${often}.`);
  } else {
    put("map-readout", "Columns are experts, rows are layers. Point at one.");
  }
  const held = look.state.join("").replace(/[.ac]/g, "").length;
  const label = `Expert cache: ${held} of ${look.experts} experts resident, ${look.layers} layers`;
  if (at("map").getAttribute("aria-label") !== label) at("map").setAttribute("aria-label", label);
}

export function point(event) {
  if (!last) return;
  const { cell, row } = grid(last);
  const layer = Math.min(last.layers - 1, Math.floor(event.offsetY / row));
  moveTo(layer, Math.floor(event.offsetX / cell));
}

export function leave() {
  cursor = null;
  redraw();
}

// Arrow keys in the picture; true where the key was one of ours.
export function walk(key) {
  const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[key];
  if (!step || !last) return false;
  const from = cursor ?? { layer: 0, expert: 0 };
  moveTo(from.layer + (cursor ? step[0] : 0), from.expert + (cursor ? step[1] : 0));
  return true;
}

function moveTo(layer, expert) {
  const clip = (n, most) => Math.max(0, Math.min(most, n));
  const row = clip(layer, last.layers - 1);
  cursor = { layer: row, expert: clip(expert, last.experts_per_layer[row] - 1) };
  redraw();
}

// Lanes

function drawLanes(look, delta) {
  const box = at("lanes");
  for (const lane of Object.keys(LANES)) {
    const line = box.querySelector(`[data-lane=${lane}]`) ?? box.appendChild(newLane(lane));
    const now = look.lanes[lane];
    const rate = delta ? Math.round(delta.lanes[lane] / delta.seconds) : 0;
    line.querySelector(".lane-rate").textContent = `${rate} / s`;
    line.querySelector(".lane-queue").textContent = `${now.queued} wait`;
    line.querySelector(".lane-done").textContent = `${now.done.toLocaleString("en")} so far`;
    const arrived = delta ? Math.min(delta.lanes[lane], CHIPS, now.last.length) : 0;
    move(line.querySelector(".track"), arrived > 0 ? now.last.slice(-arrived) : [], now.flying);
  }
  const speed = delta && delta.bytes > 0 ? `${bytes(delta.bytes / delta.seconds)} / s` : "idle";
  put("link", `${speed}, ${bytes(look.bytes_moved)} in all`);
}

function newLane(lane) {
  const line = document.createElement("div");
  line.className = "lane";
  line.dataset.lane = lane;
  const [name, meaning] = LANES[lane];
  const head = line.appendChild(document.createElement("p"));
  head.title = meaning;
  for (const [tag, classes, text] of [["b", "", name], ["span", "lane-rate", ""], ["span", "lane-queue", ""], ["span", "lane-done", ""]]) {
    const part = head.appendChild(document.createElement(tag));
    part.className = classes;
    part.textContent = text;
  }
  const track = line.appendChild(document.createElement("div"));
  track.className = "track";
  track.setAttribute("aria-hidden", "true"); // the figures above say the same
  return line;
}

// Chips run once along the track; what is on its way just now waits at its beginning.
function move(track, arrived, flying) {
  track.querySelectorAll(".flying").forEach((chip) => chip.remove());
  const running = matchMedia("(prefers-reduced-motion: no-preference)").matches;
  if (!running && arrived.length) track.replaceChildren();
  const now = performance.now();
  for (const [layer, expert] of arrived) {
    const free = Math.max(now, track.free ?? 0);
    if (running && free > now + CHIPS * APART_MS) break;
    const chip = newChip(layer, expert, running ? "moving" : "still");
    chip.style.setProperty("--delay", `${free - now}ms`);
    track.free = free + APART_MS;
    chip.addEventListener("animationend", () => chip.remove(), { once: true });
    track.append(chip);
  }
  for (const [layer, expert] of flying.slice(0, 2)) track.append(newChip(layer, expert, "flying"));
  while (track.childElementCount > 4 * CHIPS) track.firstElementChild.remove();
}

function newChip(layer, expert, kind) {
  const chip = document.createElement("span");
  chip.className = `chip ${kind}`;
  chip.textContent = `${layer}·${expert}`;
  return chip;
}

// Rates

const OUTCOMES = [["hits", "here", "hit"], ["in_flight", "on its way", "flight"], ["misses", "absent", "miss"]];

function drawRates(look) {
  const recent = looks.slice(-WINDOW);
  const total = (name) => recent.reduce((sum, one) => sum + one[name], 0);
  const counts = Object.fromEntries(OUTCOMES.map(([name]) => [name, recent.length ? total(name) : look.counts[name]]));
  const all = counts.hits + counts.in_flight + counts.misses;
  put("rates-of", all ? "" : "nothing yet");
  const box = at("rates");
  for (const [name, words, colour] of OUTCOMES) {
    const line = box.querySelector(`[data-name=${name}]`) ?? box.appendChild(newRate(name, words, colour));
    const share = all ? counts[name] / all : 0;
    line.querySelector("output").textContent = all ? `${Math.round(100 * share)} %` : "–";
    line.querySelector(".fill").style.width = `${100 * share}%`;
  }
  drawHistory();
  put("guesses", guesses(look));
}

function newRate(name, words, colour) {
  const line = document.createElement("p");
  line.className = "rate";
  line.dataset.name = name;
  line.appendChild(document.createElement("span")).textContent = words;
  const bar = line.appendChild(document.createElement("span"));
  bar.className = "meter";
  bar.appendChild(document.createElement("span")).className = `fill ${colour}`;
  line.appendChild(document.createElement("output"));
  return line;
}

function drawHistory() {
  const { pen, width } = sheet(at("history"), 36);
  const colour = colours();
  const step = width / STEPS;
  looks.forEach((one, n) => {
    const all = one.hits + one.in_flight + one.misses;
    let y = 36;
    for (const [name, , key] of OUTCOMES) {
      const h = (36 * one[name]) / all;
      pen.fillStyle = colour[key];
      pen.fillRect(width - (looks.length - n) * step, y - h, Math.max(1, step - 1), h);
      y -= h;
    }
  });
}

function guesses({ counts, prediction }) {
  if (!prediction?.predictor) return "Nothing is guessed: no predictor.";
  const judged = counts.guesses_ready + counts.guesses_late + counts.guesses_wrong;
  const share = judged ? `${Math.round((100 * (counts.guesses_ready + counts.guesses_late)) / judged)} % of guesses were right. ` : "";
  const ms = (s) => `${(1000 * s).toFixed(1)} ms`;
  const measured = prediction.with_s ? ` (a token ${ms(prediction.with_s)} with, ${ms(prediction.without_s)} without)` : "";
  const decision = { on: "Guessing is on, it pays", off: "Guessing is off, it does not pay", always: "Guessing is always on" };
  return `${share}${decision[prediction.decision] ?? "Measuring whether guessing pays"}${measured}.`;
}

// Memory and server

function drawMemory(memory) {
  put("memory-sum", `${bytes(memory.used)} of ${bytes(memory.planned)} planned`);
  const box = at("memory");
  const most = Math.max(1, ...memory.parts.map((part) => Math.max(part.planned, part.used)));
  for (const part of memory.parts.filter((one) => one.planned + one.used > 0)) {
    const line = box.querySelector(`[data-part=${part.part}]`) ?? box.appendChild(newPart(part));
    line.querySelector(".planned").style.width = `${(100 * part.planned) / most}%`;
    line.querySelector(".taken").style.width = `${(100 * part.used) / most}%`;
    line.querySelector(".size").textContent = `${bytes(part.used)} of ${bytes(part.planned)}`;
  }
}

function newPart(part) {
  const line = document.createElement("div");
  line.dataset.part = part.part;
  line.appendChild(document.createElement("dt")).textContent = part.what;
  const value = line.appendChild(document.createElement("dd"));
  const bar = value.appendChild(document.createElement("span"));
  bar.className = "bytes";
  bar.appendChild(document.createElement("span")).className = "planned";
  bar.appendChild(document.createElement("span")).className = "taken";
  value.appendChild(document.createElement("span")).className = "size";
  return line;
}

function drawServer(look) {
  const { active, most_active, queued, finished } = look.requests;
  const ended = Object.values(finished).reduce((sum, n) => sum + n, 0);
  const rows = {
    answering: `${active} of ${most_active}`,
    waiting: queued,
    answered: ended.toLocaleString("en"),
    context: `${look.ctx.toLocaleString("en")} tokens`,
    experts: `${look.format}, trunk ${look.trunk}`,
    policy: `${look.policy}, ${look.device}`,
  };
  const box = at("server");
  for (const [name, value] of Object.entries(rows)) {
    let line = box.querySelector(`[data-row=${name}]`);
    if (!line) {
      line = box.appendChild(document.createElement("div"));
      line.dataset.row = name;
      line.appendChild(document.createElement("dt")).textContent = name;
      line.appendChild(document.createElement("dd"));
    }
    line.lastElementChild.textContent = value;
  }
}

function bytes(n) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const unit = n < 1 ? 0 : Math.min(units.length - 1, Math.floor(Math.log2(n) / 10));
  const value = n / 1024 ** unit;
  return `${value >= 100 || unit === 0 ? Math.round(value) : value.toFixed(1)} ${units[unit]}`;
}

function put(id, text) {
  if (at(id).textContent !== text) at(id).textContent = text;
}
