// Prepares pictures and runs the released model in this browser, off the page's thread.
//
// Takes {id, task, value}; answers {id, progress} while it works, then {id, result} or {id, error}.

import * as ort from "./ort/ort.wasm.min.js";
import { prepareParts } from "./prepare.js";
import { digestOf } from "./sha256.js";

const BATCH = 200; // images in each run of a check

const runtime = (kind) => new URL(`ort/ort-wasm-simd-threaded.${kind}`, import.meta.url).href;
ort.env.wasm.wasmPaths = { mjs: runtime("js"), wasm: runtime("wasm") };
ort.env.wasm.numThreads = 1; // more need a host that isolates the page from other sites

const fail = (verdict, message, isLost) => Object.assign(new Error(message), { verdict, isLost });

async function read(file) {
  const url = new URL(file, import.meta.url);
  const response = await fetch(url, { cache: "no-cache" }).catch(() => null);
  if (!response?.ok) throw fail("The model cannot be loaded", `${file} is not there: try again`, true);
  return response;
}

// Calls `make` once, and again only if it failed.
function once(make) {
  let made = null;
  return () => (made ??= make().catch((error) => {
    made = null;
    throw error;
  }));
}

const load = once(async () => {
  const release = await (await read("release.json")).json();
  const content = new Uint8Array(await (await read("model.onnx")).arrayBuffer());
  return { release, content, sha256: await digestOf(content) };
});

const start = once(async () => {
  const { content } = await load();
  return ort.InferenceSession.create(content, { executionProviders: ["wasm"] });
});

// images: uint8, one after the other, 0 is paper and 255 is ink
async function run(images, output) {
  const session = await start();
  const tensor = new ort.Tensor("uint8", images, [images.length / 784, 1, 28, 28]);
  const outputs = await session.run({ [session.inputNames[0]]: tensor }, [output]);
  return outputs[output].data;
}

// The released model, if that is what lies here.
async function find() {
  const { release, sha256 } = await load();
  const { model, version, classes } = release;
  if (sha256 !== release.sha256) {
    throw fail("This is not the released model", "its file has another digest: check it below", true);
  }
  await start();
  return { model, version, classes, sha256 };
}

async function classify(blob) {
  const began = performance.now();
  const { model, version, classes, sha256 } = await find();
  const bitmap = await createImageBitmap(blob);
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d");
  canvas.drawImage(bitmap, 0, 0);
  const { data } = canvas.getImageData(0, 0, bitmap.width, bitmap.height);
  const { image, parts } = prepareParts(data, bitmap.width, bitmap.height);
  if (!parts.length) throw fail("No digit found", "The picture is blank or shows only a dot", false);
  const asked = performance.now();
  const logs = await run(image, "log_probabilities");
  const model_ms = performance.now() - asked;
  const top = classes.map((name, index) => [name, Math.exp(logs[index])]).sort((a, b) => b[1] - a[1]);
  const [[label, probability]] = top;
  const { min_probability: least } = (await load()).release;
  return {
    label, probability, top, classes, parts, model, version, sha256, model_ms,
    sure: least === null ? null : probability >= least,
    seen: btoa(String.fromCharCode(...image)),
    seen_shape: [1, 28, 28],
    server_ms: performance.now() - began,
  };
}

// The digest of the scores (int32) of a set of images, in order; of model.onnx without a name.
async function check({ name, images }, report) {
  if (!name) return (await load()).sha256;
  const stream = (await read(`${name}.bin`)).body.pipeThrough(new DecompressionStream("gzip"));
  const pixels = new Uint8Array(await new Response(stream).arrayBuffer());
  let scores = new Int32Array(0); // an image may have more of them than there are classes
  for (let first = 0; first < images; first += BATCH) {
    const batch = pixels.subarray(784 * first, 784 * Math.min(first + BATCH, images));
    const more = await run(batch, "scores");
    if (!first) scores = new Int32Array((more.length / batch.length) * 784 * images);
    scores.set(more, (scores.length / images) * first);
    report(first);
  }
  return digestOf(new Uint8Array(scores.buffer));
}

const TASKS = { find, classify, check, release: async () => (await load()).release };

addEventListener("message", async ({ data: { id, task, value } }) => {
  try {
    postMessage({ id, result: await TASKS[task](value, (progress) => postMessage({ id, progress })) });
  } catch ({ verdict, message, isLost }) {
    postMessage({ id, error: { verdict, message, isLost } });
  }
});
