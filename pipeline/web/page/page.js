// The page: takes a drawing or a picture, and shows the answer that link.js gets. Stores nothing,
// unless the gateway collects corrections and you give one.

import { LOST, classify, findModel } from "./link.js";

const SIDE = 560; // pixels of the canvas; its size on the screen may differ
const PEN = SIDE / 13; // width of a stroke, as in MNIST for a digit that fills the paper
const STEP = SIDE / 28; // of the pen moved by the keyboard
const SHEET = 280; // pixels of a drawing as it is sent
const WAIT_MS = 60; // between a change and its request
const SPEAK_MS = 700; // without a new answer, before the answer is spoken
const RETRY_MS = 1_500; // between two attempts to reach a lost model
const MAX_BYTES = 10 * 2 ** 20; // the gateway refuses more ...
const MAX_PIXELS = 8_900_000; // ... and more of these
const REDUCED_SIDE = 1600; // larger pictures are reduced to this: no PNG of it exceeds MAX_BYTES
const KINDS = ["image/png", "image/jpeg", "image/webp"];

export const byId = (id) => document.getElementById(id);
const canvas = byId("canvas");
const context = canvas.getContext("2d");

// What was put on the paper, in order: strokes, each a list of {x, y, width}, and pictures,
// each {blob, sheet, side}. A picture takes the place of all before it, a stroke that of a picture.
let marks = [];
let stroke = null; // the one being drawn
let pen = { x: SIDE / 2, y: SIDE / 2, isDown: false, isShown: false }; // the keyboard's
let parts = []; // boxes in what was sent: left, top, right, bottom; the answer is for the first
let inputs = 0; // counts inputs: a picture that is still being read is dropped if another input follows

const isPicture = (mark) => !Array.isArray(mark);
const isEmpty = () => !marks.length;
const picture = () => marks.slice(-1).find(isPicture);
const strokes = () => marks.slice(marks.findLastIndex(isPicture) + 1);

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

function sheetOf(width, height) {
  const sheet = document.createElement("canvas");
  [sheet.width, sheet.height] = [width, height];
  return [sheet, sheet.getContext("2d")];
}

function drawScaled(bitmap, longest) {
  const scale = longest / Math.max(bitmap.width, bitmap.height);
  const sizes = [bitmap.width, bitmap.height].map((size) => Math.max(1, Math.round(size * scale)));
  const [sheet, target] = sheetOf(...sizes);
  target.drawImage(bitmap, 0, 0, ...sizes);
  return [sheet, target];
}

// Draws a given picture as the paper shows it in either theme, on an opaque background.
function drawOnPaper(bitmap) {
  const [sheet, target] = drawScaled(bitmap, SIDE);
  const { data } = target.getImageData(0, 0, sheet.width, sheet.height);
  target.globalCompositeOperation = "destination-over";
  target.fillStyle = isBrightOnNothing(data) ? "black" : "white";
  target.fillRect(0, 0, sheet.width, sheet.height);
  return sheet;
}

// Whether a picture is bright ink on transparent paper, which RULES.md treats as black.
function isBrightOnNothing(data) {
  let [light, alphas] = [0, 0];
  for (let i = 0; i < data.length; i += 4) {
    light += data[i + 1] * data[i + 3];
    alphas += data[i + 3];
  }
  return 2 * alphas <= 255 * (data.length / 4) && light > 127 * alphas;
}

let frame = 0;
function paint() {
  if (!frame) frame = requestAnimationFrame(paintNow);
}

function paintNow() {
  frame = 0;
  const style = getComputedStyle(canvas);
  context.clearRect(0, 0, SIDE, SIDE);
  if (picture()) {
    const { sheet } = picture();
    context.drawImage(sheet, (SIDE - sheet.width) / 2, (SIDE - sheet.height) / 2);
  }
  for (const points of strokes()) line(context, points, style.color);
  if (pen.isShown) {
    context.beginPath();
    context.arc(pen.x, pen.y, PEN / 2 + 4, 0, 2 * Math.PI);
    context.lineWidth = 4;
    context.strokeStyle = style.caretColor;
    context.setLineDash(pen.isDown ? [] : [9, 7]);
    context.stroke();
    context.setLineDash([]);
  }
  if (parts.length > 1) outlineParts();
  byId("hint").hidden = !isEmpty() || pen.isShown;
  byId("paper").classList.toggle("empty", isEmpty());
  for (const id of ["undo", "clear", "save"]) byId(id).disabled = isEmpty();
}

// Outlines what was read, and dashed what else is in the picture.
function outlineParts() {
  const { side, sheet } = picture() ?? { side: SHEET, sheet: canvas };
  const scale = SIDE / side;
  const [x, y] = [(SIDE - sheet.width) / 2, (SIDE - sheet.height) / 2];
  context.lineWidth = 4;
  context.strokeStyle = getComputedStyle(canvas).caretColor;
  parts.forEach(([left, top, right, bottom], index) => {
    context.setLineDash(index ? [4, 10] : []);
    context.globalAlpha = index ? 0.6 : 1;
    context.strokeRect(x + left * scale - 6, y + top * scale - 6, (right - left) * scale + 12, (bottom - top) * scale + 12);
  });
  context.setLineDash([]);
  context.globalAlpha = 1;
}

// Returns the picture as a file: a given one unchanged, a drawing as black on white.
function asBlob() {
  if (picture()) return Promise.resolve(picture().blob);
  const [sheet, target] = sheetOf(SHEET, SHEET);
  target.fillStyle = "white";
  target.fillRect(0, 0, SHEET, SHEET);
  target.scale(SHEET / SIDE, SHEET / SIDE);
  for (const points of strokes()) line(target, points, "black");
  return new Promise((resolve) => sheet.toBlob(resolve, "image/png"));
}

function update() {
  forgetChoice();
  paint();
  canvas.dispatchEvent(new Event("change"));
  if (isEmpty()) showNothing();
  else askLater();
}

function locate(event) {
  const box = canvas.getBoundingClientRect();
  const scale = SIDE / box.width;
  // A pen's pressure widens its stroke; a mouse and a finger have none to speak of.
  const width = event.pointerType === "pen" ? PEN * (0.6 + 0.8 * event.pressure) : PEN;
  return { x: (event.clientX - box.left) * scale, y: (event.clientY - box.top) * scale, width };
}

function begin(points) {
  inputs += 1;
  stroke = points;
  marks.push(stroke);
}

// Ends the stroke, whether pointer or keyboard drew it.
function endStroke() {
  stroke = null;
  pen.isDown = false;
}

const isDrawing = (event) => event.isPrimary && canvas.hasPointerCapture(event.pointerId);

canvas.addEventListener("pointerdown", (event) => {
  if (!event.isPrimary || event.button !== 0) return;
  event.preventDefault();
  canvas.focus({ preventScroll: true, focusVisible: false });
  canvas.setPointerCapture(event.pointerId);
  pen.isShown = pen.isDown = false;
  begin([locate(event)]);
  update();
});

canvas.addEventListener("pointermove", (event) => {
  if (!stroke || pen.isDown || !isDrawing(event)) return;
  const events = event.getCoalescedEvents?.() ?? [];
  stroke.push(...(events.length ? events : [event]).map(locate));
  update();
});

for (const name of ["pointerup", "pointercancel"]) {
  canvas.addEventListener(name, (event) => {
    if (!isDrawing(event)) return;
    endStroke();
    paint();
  });
}

function undo() {
  inputs += 1;
  marks.pop();
  endStroke();
  update();
}

function clear() {
  inputs += 1;
  marks = [];
  endStroke();
  pen = { ...pen, x: SIDE / 2, y: SIDE / 2 };
  update();
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
    speak(pen.isDown ? "pen down" : "pen up");
  } else if (event.key in MOVES) {
    const [x, y] = MOVES[event.key];
    const step = event.shiftKey ? 3 * STEP : STEP;
    pen = { ...pen, x: within(pen.x + x * step), y: within(pen.y + y * step), isShown: true };
    if (pen.isDown) stroke.push({ x: pen.x, y: pen.y, width: PEN });
  } else {
    return;
  }
  event.preventDefault();
  update();
});

canvas.addEventListener("focus", () => {
  if (canvas.matches(":focus-visible")) pen.isShown = true;
  paint();
});

canvas.addEventListener("blur", () => {
  pen.isShown = false;
  endStroke();
  paint();
});

function toggleHelp() {
  byId("keys").hidden = !byId("keys").hidden;
  byId("help-button").setAttribute("aria-expanded", String(!byId("keys").hidden));
}

byId("help-button").addEventListener("click", toggleHelp);

document.addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && !event.shiftKey && event.key.toLowerCase() === "z") undo();
  else if (event.key === "Escape") clear();
  else if (event.key === "?") toggleHelp();
  else return;
  event.preventDefault();
});

// --- given pictures

async function take(file) {
  cancelRequest();
  const turn = (inputs += 1);
  if (!KINDS.includes(file.type)) {
    showFailure("This file is not a PNG, JPEG or WebP", "Choose another file.");
    return;
  }
  try {
    const bitmap = await createImageBitmap(file);
    const isLarge = file.size > MAX_BYTES || bitmap.width * bitmap.height > MAX_PIXELS;
    const blob = isLarge ? await reduce(bitmap, file.type) : file;
    if (turn !== inputs) return;
    endStroke();
    const side = Math.max(bitmap.width, bitmap.height);
    marks.push({ blob, sheet: drawOnPaper(bitmap), side: isLarge ? Math.min(REDUCED_SIDE, side) : side });
    update();
  } catch {
    if (turn === inputs) showFailure("The picture cannot be read", "It may be damaged. Choose another one.");
  }
}

function reduce(bitmap, type) {
  const [sheet] = drawScaled(bitmap, Math.min(REDUCED_SIDE, Math.max(bitmap.width, bitmap.height)));
  // A JPEG would make transparent pixels black.
  const kind = type === "image/jpeg" ? type : "image/png";
  return new Promise((resolve) => sheet.toBlob(resolve, kind, 0.92));
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

// Shows the digits to try, one for each class 0 to 9: tiles of one picture.
async function showSamples() {
  const row = byId("samples").querySelector("div");
  if (row.children.length) return;
  const response = await fetch("samples.png");
  const tiles = await createImageBitmap(await response.blob());
  const side = tiles.height;
  for (let digit = 0; digit < tiles.width / side; digit += 1) {
    const [tile, target] = sheetOf(side, side);
    target.drawImage(tiles, -digit * side, 0);
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-label", `A handwritten ${digit}`);
    button.append(tile);
    button.addEventListener("click", () => tile.toBlob(take, "image/png"));
    row.append(button);
  }
  rove([...row.children]);
  byId("samples").hidden = byId("credit").hidden = false;
}

// Makes one stop for Tab of some buttons: arrow keys go from one to the next.
export function rove(buttons, choose = () => {}) {
  const select = (chosen) => buttons.forEach((button) => { button.tabIndex = button === chosen ? 0 : -1; });
  buttons.forEach((button, index) => {
    button.addEventListener("focus", () => select(button));
    button.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = buttons[(index + step + buttons.length) % buttons.length];
      next.focus();
      choose(next);
    });
  });
  select(buttons[0]);
}

// digit.png, digit.jpeg or digit.webp
export function fileName() {
  return `digit.${(picture()?.blob.type ?? "image/png").split("/")[1]}`;
}

byId("save").addEventListener("click", async () => {
  const name = fileName();
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await asBlob());
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
});

// --- requests: one at a time, and the newest picture is always sent last

let timer = 0;
let isAsking = false;
let isStale = false; // the picture has changed since the request began
let wanted = 0; // number of the paper: the answer about a cleared one is not shown

function askLater() {
  if (!timer) timer = setTimeout(ask, WAIT_MS);
}

function cancelRequest() {
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
    const blob = await asBlob();
    const start = performance.now();
    const answer = await classify(blob);
    if (paper === wanted) showAnswer(answer, performance.now() - start);
  } catch (error) {
    if (paper === wanted) showError(error);
  } finally {
    isAsking = false;
    if (isStale) askLater();
  }
}

// Shows an error of link.js: of the picture, or that the model is lost.
function showError({ verdict, message, isLost = true }) {
  if (isLost) showLost(verdict ?? "No answer", message);
  else showFailure(verdict, message);
}

// --- output

const percent = (value, over = "over ") =>
  value > 0.9994 ? `${over}99.9 %` : `${(100 * value).toFixed(1)} %`;
const sentence = (text) => `${text.charAt(0).toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}`;
const milliseconds = (value) => `${value.toFixed(value < 10 ? 1 : 0)} ms`;

let speaking = 0;
export function speak(text) {
  clearTimeout(speaking);
  if (byId("spoken").textContent !== text) byId("spoken").textContent = text;
}
function speakLater(text) {
  clearTimeout(speaking);
  speaking = setTimeout(speak, SPEAK_MS, text);
}

function show(state, label, verdict, detail) {
  byId("answer").dataset.state = state;
  document.body.classList.toggle("unsure", state === "unsure");
  byId("label").textContent = label;
  byId("label").classList.toggle("long", label.length > 2);
  byId("verdict").textContent = verdict;
  byId("detail").textContent = sentence(detail);
  byId("correct").hidden = !collects || !["sure", "unsure", "read"].includes(state);
}

function showAnswer(answer, roundTrip) {
  const share = percent(answer.probability);
  if (answer.sure === false) show("unsure", "?", "Not sure", `Perhaps ${answer.label}, ${share} likely`);
  else if (answer.sure) show("sure", answer.label, `It is ${answer.label}`, `${share} likely`);
  else show("read", answer.label, `Read as ${answer.label}`, `${share} likely`); // no threshold
  parts = answer.parts ?? [];
  byId("parts").hidden = parts.length < 2;
  byId("parts").textContent = `${parts.length} parts found; the one in the solid frame was read.`;
  paint();
  const more = parts.length < 2 ? "" : ` ${byId("parts").textContent}`;
  speakLater(`${byId("verdict").textContent}. ${byId("detail").textContent}${more}`);
  showBars(answer.classes, Object.fromEntries(answer.top), answer.label);
  const levels = Uint8Array.from(atob(answer.seen), (letter) => letter.charCodeAt(0));
  showSeen(levels, answer.seen_shape);
  byId("round-trip").textContent = milliseconds(roundTrip);
  byId("server-time").textContent =
    `${milliseconds(answer.server_ms)} (model ${milliseconds(answer.model_ms)})`;
  showModel(answer);
  setState("ready", `${answer.model} is ready`);
}

function showModel({ model, version, sha256 }) {
  byId("model").textContent = `${model}, version ${version}`;
  byId("digest").textContent = sha256 ? sha256.slice(0, 16) : "unknown";
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
      name in shares ? percent(shares[name], "> ") : "–";
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

// levels: bytes of the shape [channels, height, width], in which there are 1 or 3 channels
function showSeen(levels, [channels, height, width] = [1, 28, 28]) {
  const seen = byId("seen");
  seen.classList.toggle("empty", !levels);
  Object.assign(seen, { width, height }); // this clears it
  if (!levels) return;
  const target = seen.getContext("2d");
  const image = target.createImageData(width, height);
  const size = width * height;
  for (let index = 0; index < size; index += 1) {
    const color = [0, 1, 2].map((channel) => levels[index + (channel % channels) * size]);
    image.data.set([...color, 255], 4 * index);
  }
  target.putImageData(image, 0, 0);
}

function forgetAnswer() {
  showBars([...byId("bars").querySelectorAll("b")].map((label) => label.textContent));
  showSeen(null);
  parts = [];
  byId("parts").hidden = true;
  byId("round-trip").textContent = byId("server-time").textContent = "–";
}

function showNothing() {
  cancelRequest();
  show("empty", "", "Nothing drawn yet", "The answer appears while you draw.");
  forgetAnswer();
  speak("");
}

function showFailure(verdict, detail) {
  show("failed", "", verdict, detail);
  forgetAnswer();
  speak(`${verdict}. ${sentence(detail)}`);
}

// --- corrections, if the gateway collects them

const STORE_MS = 15_000;
let collects = false;

function allowCorrections(classes) {
  collects = true;
  byId("storing").textContent = "Only pictures that you correct are stored, in a folder of the gateway's machine.";
  const names = [...byId("right").options].slice(1).map((option) => option.value);
  if (names.join("\n") === classes.join("\n")) return;
  byId("right").replaceChildren(new Option("choose", ""), ...classes.map((name) => new Option(name)));
  byId("keep").disabled = true;
}

// A choice is for the picture that it was made for. A second answer about the same one leaves it.
function forgetChoice() {
  byId("right").value = byId("kept").textContent = "";
  byId("keep").disabled = true;
}

byId("right").addEventListener("change", () => { byId("keep").disabled = !byId("right").value; });

byId("keep").addEventListener("click", async () => {
  const label = byId("right").value;
  let message = "The gateway does not answer.";
  try {
    const signal = AbortSignal.timeout(STORE_MS);
    const path = `collect?label=${encodeURIComponent(label)}`;
    const response = await fetch(path, { method: "POST", body: await asBlob(), signal });
    const record = await response.json();
    const from = record.moved_from === null ? "" : `, no longer as ${record.moved_from}`;
    message = response.ok ? `Stored as ${record.label}${from}: ${record.pictures} in the folder.` : sentence(record.error);
  } catch { /* the message says it */ }
  byId("kept").textContent = message;
  speak(message);
});

// --- the model: lost, and found again

let looking = 0;

function setState(state, text) {
  byId("state").dataset.state = state;
  byId("state-text").textContent = text;
}

function showLost(verdict, detail) {
  cancelRequest();
  showFailure(verdict, detail);
  setState("lost", LOST);
  clearTimeout(looking);
  looking = setTimeout(checkServer, RETRY_MS);
}

async function checkServer() {
  try {
    const record = await findModel();
    setState("ready", `${record.model} is ready`);
    showModel(record);
    const isDigits = record.classes.join("") === "0123456789";
    byId("title").textContent = document.title = isDigits ? "Draw a digit" : "Draw or give a picture";
    if (!byId("bars").children.length) showBars(record.classes);
    if (record.collects) allowCorrections(record.classes);
    if (isDigits) await showSamples();
    if (isEmpty()) showNothing();
    else askLater();
  } catch (error) {
    showError(error);
  }
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
paint();
checkServer();
