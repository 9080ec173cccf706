// The link to the model in this browser: worker.js runs it. No server is asked.

export const LOST = "the model is not usable";

// Returns a function that gives a worker of its own a task: task, value, progress => result.
export function startWorker() {
  const worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
  const waiting = new Map();
  let count = 0;
  const answer = ({ id, progress, result, error }) => {
    const { resolve, reject, report } = waiting.get(id);
    if (progress !== undefined) return report(progress);
    waiting.delete(id);
    return error ? reject(Object.assign(new Error(error.message), error)) : resolve(result);
  };
  worker.addEventListener("message", ({ data }) => answer(data));
  worker.addEventListener("error", () => {
    const error = { verdict: "The model cannot be loaded", message: "A file of this page is missing", isLost: true };
    for (const id of [...waiting.keys()]) answer({ id, error });
  });
  return (task, value, report = () => {}) =>
    new Promise((resolve, reject) => {
      count += 1;
      waiting.set(count, { resolve, reject, report });
      worker.postMessage({ id: count, task, value });
    });
}

const ask = startWorker();

// Returns {model, version, sha256, classes}.
export const findModel = () => ask("find");

// Returns the answer about a picture, a PNG, JPEG or WebP file, with the fields of the gateway's.
export const classify = (blob) => ask("classify", blob);
