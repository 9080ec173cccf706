// The page: what is drawn goes to the gateway, its answer is shown. Nothing is kept.

const SIDE = 560; // pixels of the canvas; its size on the screen may differ
const PEN = SIDE / 13; // as wide as MNIST's strokes are, of a digit that fills the paper
const STEP = SIDE / 28; // of the keyboard's pen
const SHEET = 280; // pixels of a drawing as it is sent
const WAIT_MS = 60; // between a change and the question about it
const SPEAK_MS = 700; // of quiet, before the answer is spoken
const TIMEOUT_MS = 15_000;
const RETRY_MS = 1_500; // between two looks for a server that was lost
const MAX_BYTES = 10 * 2 ** 20; // the gateway refuses more ...
const MAX_PIXELS = 8_900_000; // ... and more of these
const REDUCED_SIDE = 2048; // a picture too large for it is reduced to this
const KINDS = ["image/png", "image/jpeg", "image/webp"];

const byId = (id) => document.getElementById(id);
const canvas = byId("canvas");
const context = canvas.getContext("2d");

// What is on the paper: strokes, each a list of {x, y, width}, or a picture.
let strokes = [];
let picture = null; // {blob, bitmap}
let stroke = null; // that is being drawn
let pen = { x: SIDE / 2, y: SIDE / 2, isDown: false, isShown: false }; // the keyboard's

// --- drawing

function line(target, points, colour) {
  target.strokeStyle = target.fillStyle = colour;
  target.lineCap = target.lineJoin = "round";
  points.forEach((point, index) => {
    const before = points[Math.max(0, index - 1)];
    target.beginPath();
    if (points.length === 1 || index === 0) {
      target.arc(point.x, point.y, point.width / 2, 0, 2 * Math.PI);
      target.fill();
    } else {
      target.lineWidth = (before.width + point.width) / 2;
      target.moveTo(before.x, before.y);
      target.lineTo(point.x, point.y);
      target.stroke();
    }
  });
}

function fitted(bitmap) {
  const scale = Math.min(SIDE / bitmap.width, SIDE / bitmap.height);
  const [width, height] = [bitmap.width * scale, bitmap.height * scale];
  return [(SIDE - width) / 2, (SIDE - height) / 2, width, height];
}

let frame = 0;
function paint() {
  if (!frame) frame = requestAnimationFrame(paintNow);
}

function paintNow() {
  frame = 0;
  const style = getComputedStyle(canvas);
  context.clearRect(0, 0, SIDE, SIDE);
  if (picture) context.drawImage(picture.bitmap, ...fitted(picture.bitmap));
  for (const points of strokes) line(context, points, style.color);
  if (pen.isShown) {
    context.beginPath();
    context.arc(pen.x, pen.y, PEN / 2 + 4, 0, 2 * Math.PI);
    context.lineWidth = 4;
    context.strokeStyle = style.caretColor;
    context.setLineDash(pen.isDown ? [] : [9, 7]);
    context.stroke();
    context.setLineDash([]);
  }
  byId("hint").hidden = !isEmpty() || pen.isShown;
  for (const id of ["undo", "clear", "save"]) byId(id).disabled = isEmpty();
}

function isEmpty() {
  return !picture && !strokes.length;
}

// The picture as a file: what was given as it is, what was drawn as black on white.
function asBlob() {
  if (picture) return Promise.resolve(picture.blob);
  const sheet = document.createElement("canvas");
  sheet.width = sheet.height = SHEET;
  const target = sheet.getContext("2d");
  target.fillStyle = "white";
  target.fillRect(0, 0, SHEET, SHEET);
  target.scale(SHEET / SIDE, SHEET / SIDE);
  for (const points of strokes) line(target, points, "black");
  return new Promise((resolve) => sheet.toBlob(resolve, "image/png"));
}

function changed() {
  paint();
  if (isEmpty()) showNothing();
  else later();
}

function place(event) {
  const box = canvas.getBoundingClientRect();
  const scale = SIDE / box.width;
  // A pen's pressure widens its stroke; a mouse and a finger have none to speak of.
  const width = event.pointerType === "pen" ? PEN * (0.6 + 0.8 * event.pressure) : PEN;
  return { x: (event.clientX - box.left) * scale, y: (event.clientY - box.top) * scale, width };
}

function begin(points) {
  picture = null;
  stroke = points;
  strokes.push(stroke);
}

canvas.addEventListener("pointerdown", (event) => {
  if (!event.isPrimary || event.button !== 0) return;
  event.preventDefault();
  canvas.focus({ preventScroll: true, focusVisible: false });
  canvas.setPointerCapture(event.pointerId);
  pen.isShown = pen.isDown = false;
  begin([place(event)]);
  changed();
});

canvas.addEventListener("pointermove", (event) => {
  if (!stroke || !event.isPrimary || !canvas.hasPointerCapture(event.pointerId)) return;
  const events = event.getCoalescedEvents?.() ?? [];
  stroke.push(...(events.length ? events : [event]).map(place));
  changed();
});

for (const name of ["pointerup", "pointercancel"]) {
  canvas.addEventListener(name, (event) => {
    if (event.isPrimary) stroke = null;
  });
}

function undo() {
  if (picture) picture = null;
  else strokes.pop();
  stroke = null;
  pen.isDown = false;
  changed();
}

function clear() {
  strokes = [];
  picture = stroke = null;
  pen = { x: SIDE / 2, y: SIDE / 2, isDown: false, isShown: pen.isShown };
  changed();
}

for (const [id, action] of [["undo", undo], ["clear", clear]]) {
  byId(id).addEventListener("click", () => {
    action();
    // A button that is disabled while it has the focus drops it to the top of the page.
    if (isEmpty()) canvas.focus({ preventScroll: true });
  });
}

// --- the keyboard

const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const within = (value) => Math.min(SIDE - PEN / 2, Math.max(PEN / 2, value));

canvas.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === " ") {
    pen.isShown = true;
    pen.isDown = !pen.isDown;
    if (pen.isDown) begin([{ x: pen.x, y: pen.y, width: PEN }]);
    else stroke = null;
    say(pen.isDown ? "pen down" : "pen up");
  } else if (event.key in MOVES) {
    const [x, y] = MOVES[event.key];
    const step = event.shiftKey ? 3 * STEP : STEP;
    pen = { ...pen, x: within(pen.x + x * step), y: within(pen.y + y * step), isShown: true };
    if (pen.isDown) stroke.push({ x: pen.x, y: pen.y, width: PEN });
  } else {
    return;
  }
  event.preventDefault();
  changed();
});

canvas.addEventListener("focus", () => {
  if (canvas.matches(":focus-visible")) pen.isShown = true;
  paint();
});

canvas.addEventListener("blur", () => {
  pen.isShown = pen.isDown = false;
  stroke = null;
  paint();
});

document.addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && !event.shiftKey && event.key.toLowerCase() === "z") undo();
  else if (event.key === "Escape") clear();
  else return;
  event.preventDefault();
});

// --- a picture that is given

async function take(file) {
  forget();
  if (!KINDS.includes(file.type)) {
    showFailure("Not a picture for here", "Give a PNG, JPEG or WebP.");
    return;
  }
  try {
    const bitmap = await createImageBitmap(file);
    strokes = [];
    stroke = null;
    const isLarge = file.size > MAX_BYTES || bitmap.width * bitmap.height > MAX_PIXELS;
    picture = { bitmap, blob: isLarge ? await reduced(bitmap) : file };
    changed();
  } catch {
    showFailure("The picture cannot be read", "Is it damaged? Give another one.");
  }
}

async function reduced(bitmap) {
  const scale = Math.min(1, REDUCED_SIDE / Math.max(bitmap.width, bitmap.height));
  const sheet = document.createElement("canvas");
  [sheet.width, sheet.height] = [bitmap.width * scale, bitmap.height * scale];
  sheet.getContext("2d").drawImage(bitmap, 0, 0, sheet.width, sheet.height);
  return new Promise((resolve) => sheet.toBlob(resolve, "image/jpeg", 0.92));
}

function firstFile(list) {
  return [...(list?.files ?? [])][0];
}

byId("choose").addEventListener("click", () => byId("file").click());
byId("file").addEventListener("change", (event) => {
  const file = firstFile(event.target);
  if (file) take(file);
  event.target.value = ""; // so that the same file can be chosen again
});

document.addEventListener("paste", (event) => {
  const file = firstFile(event.clipboardData);
  if (file) take(file);
});

document.addEventListener("dragover", (event) => {
  event.preventDefault();
  byId("paper").classList.add("dropping");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) byId("paper").classList.remove("dropping");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  byId("paper").classList.remove("dropping");
  const file = firstFile(event.dataTransfer);
  if (file) take(file);
});

byId("save").addEventListener("click", async () => {
  const blob = await asBlob();
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = `digit.${blob.type.split("/")[1]}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
});

// --- asking: one question at a time, and the newest picture is always asked about last

let timer = 0;
let isAsking = false;
let isStale = false; // what is asked about has changed since
let wanted = 0; // which paper: an answer about one that was cleared is not shown

function later() {
  if (!timer) timer = setTimeout(ask, WAIT_MS);
}

function forget() {
  clearTimeout(timer);
  timer = 0;
  isStale = false;
  wanted += 1;
}

async function ask() {
  timer = 0;
  isStale = isAsking;
  if (isAsking) return;
  isAsking = true;
  const paper = wanted;
  try {
    const body = await asBlob();
    const signal = AbortSignal.timeout(TIMEOUT_MS);
    const start = performance.now();
    const response = await fetch("classify", { method: "POST", body, signal });
    const answer = await response.json();
    if (paper !== wanted) return;
    if (response.ok) showAnswer(answer, performance.now() - start);
    else showRefusal(response, answer.error);
  } catch {
    if (paper === wanted) lose("The gateway does not answer", "Is 'pipeline web' still running?");
  } finally {
    isAsking = false;
    if (isStale) later();
  }
}

function showRefusal(response, error) {
  if (response.status === 422) {
    showFailure("No digit found", "There is too little ink on the paper.");
  } else if (response.status === 503) {
    lose("The server does not answer", error);
  } else {
    showFailure("Not answered", error);
  }
}

// --- what is shown

const percent = (value) => (value > 0.9994 ? "over 99.9 %" : `${(100 * value).toFixed(1)} %`);
const sentence = (text) => `${text.charAt(0).toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}`;
const milliseconds = (value) => `${value.toFixed(value < 10 ? 1 : 0)} ms`;

let speaking = 0;
function say(text) {
  clearTimeout(speaking);
  if (byId("spoken").textContent !== text) byId("spoken").textContent = text;
}
function sayLater(text) {
  clearTimeout(speaking);
  speaking = setTimeout(say, SPEAK_MS, text);
}

function show(state, label, verdict, detail) {
  byId("answer").dataset.state = state;
  document.body.classList.toggle("unsure", state === "unsure");
  byId("label").textContent = label;
  byId("label").classList.toggle("long", label.length > 2);
  byId("verdict").textContent = verdict;
  byId("detail").textContent = sentence(detail);
}

function showAnswer(answer, roundTrip) {
  const share = percent(answer.probability);
  if (answer.sure) show("sure", answer.label, `It is ${answer.label}`, `${share} likely`);
  else show("unsure", "?", "Not sure", `Perhaps ${answer.label}, ${share} likely`);
  sayLater(`${byId("verdict").textContent}. ${byId("detail").textContent}`);
  showBars(answer.classes, Object.fromEntries(answer.top), answer.label);
  showSeen(Uint8Array.from(atob(answer.seen), (letter) => letter.charCodeAt(0)));
  byId("round-trip").textContent = milliseconds(roundTrip);
  byId("server-time").textContent =
    `${milliseconds(answer.server_ms)} (model ${milliseconds(answer.model_ms)})`;
  showModel(answer);
  setState("ready", `${answer.model} is ready`);
}

function showModel({ model, version, sha256 }) {
  byId("model").textContent = `${model}, version ${version}`;
  byId("digest").textContent = sha256 ? sha256.slice(0, 16) : "not stated";
  byId("digest").title = sha256 ?? "";
}

function showBars(classes, shares = {}, first = null) {
  const bars = byId("bars");
  const names = [...bars.querySelectorAll("b")].map((label) => label.textContent);
  if (names.join("\n") !== classes.join("\n")) bars.replaceChildren(...classes.map(bar));
  classes.forEach((name, index) => {
    const row = bars.children[index];
    row.classList.toggle("first", name === first);
    row.querySelector(".fill").style.width = `${100 * (shares[name] ?? 0)}%`;
    row.querySelector(".share").textContent =
      name in shares ? `${(100 * shares[name]).toFixed(1)} %` : "–";
  });
}

function bar(name) {
  const row = document.createElement("li");
  const [label, track, fill, share] = ["b", "span", "span", "span"].map((tag) => document.createElement(tag));
  [track.className, fill.className, share.className] = ["track", "fill", "share"];
  label.textContent = name;
  track.append(fill);
  row.append(label, track, share);
  return row;
}

function showSeen(levels) {
  const target = byId("seen").getContext("2d");
  const image = target.createImageData(28, 28);
  levels.forEach((level, index) => image.data.set([level, level, level, 255], 4 * index));
  target.putImageData(image, 0, 0);
}

function forgetAnswer() {
  showBars([...byId("bars").querySelectorAll("b")].map((label) => label.textContent));
  showSeen(new Uint8Array(28 * 28));
  byId("round-trip").textContent = byId("server-time").textContent = "–";
}

function showNothing() {
  forget();
  show("empty", "–", "Nothing drawn yet", "The answer appears while you draw.");
  forgetAnswer();
  say("");
}

function showFailure(verdict, detail) {
  show("failed", "–", verdict, detail);
  forgetAnswer();
  say(`${verdict}. ${sentence(detail)}`);
}

// --- the server: lost, and found again

let looking = 0;

function setState(state, text) {
  byId("state").dataset.state = state;
  byId("state-text").textContent = text;
}

function lose(verdict, detail) {
  forget();
  showFailure(verdict, detail);
  setState("lost", "no server; looking for it");
  clearTimeout(looking);
  looking = setTimeout(look, RETRY_MS);
}

async function look() {
  try {
    const response = await fetch("readyz", { signal: AbortSignal.timeout(TIMEOUT_MS) });
    const record = await response.json();
    if (!response.ok) {
      lose("The server does not answer", record.error);
      return;
    }
    setState("ready", `${record.model} is ready`);
    showModel(record);
    const isDigits = record.classes.join("") === "0123456789";
    byId("title").textContent = document.title = isDigits ? "Draw a digit" : "Draw or give a picture";
    if (!byId("bars").children.length) showBars(record.classes);
    if (isEmpty()) showNothing();
    else later();
  } catch {
    lose("The gateway does not answer", "Is 'pipeline web' still running?");
  }
}

// --- the same request from a program

const address = new URL("classify", location.href).href;
const SNIPPETS = {
  curl: `curl --data-binary @digit.png ${address}`,
  python: `import json, urllib.request

with open("digit.png", "rb") as file:
    request = urllib.request.Request("${address}", file.read())
with urllib.request.urlopen(request) as response:
    answer = json.load(response)
print(answer["label"] if answer["sure"] else "not sure", answer["probability"])`,
  javascript: `import { readFile } from "node:fs/promises";

const body = await readFile("digit.png");
const response = await fetch("${address}", { method: "POST", body });
const answer = await response.json();
console.log(answer.sure ? answer.label : "not sure", answer.probability);`,
};
const tabs = [...document.querySelectorAll("[role=tab]")];

function choose(tab) {
  for (const other of tabs) {
    other.setAttribute("aria-selected", String(other === tab));
    other.tabIndex = other === tab ? 0 : -1;
  }
  byId("code").setAttribute("aria-labelledby", tab.id);
  byId("snippet").textContent = SNIPPETS[tab.id.replace("tab-", "")];
}

tabs.forEach((tab, index) => {
  tab.addEventListener("click", () => choose(tab));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = tabs[(index + step + tabs.length) % tabs.length];
    next.focus();
    choose(next);
  });
});

byId("copy").addEventListener("click", async () => {
  let said = "Copied";
  try {
    await navigator.clipboard.writeText(byId("snippet").textContent);
  } catch { // not over plain http from another machine: select it, for the reader to copy
    getSelection().selectAllChildren(byId("snippet"));
    said = "Selected";
  }
  byId("copy").textContent = said;
  say(said);
  setTimeout(() => { byId("copy").textContent = "Copy"; }, 1500);
});

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
choose(tabs[0]);
paint();
look();
