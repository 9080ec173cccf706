// The link to the gateway: it says which model it serves, and what a picture shows.
//
// Errors have a verdict for the page's headline, and isLost unless only the picture is refused.

export const LOST = "no server, retrying";
const TIMEOUT_MS = 15_000;

const fail = (verdict, message, isLost) => Object.assign(new Error(message), { verdict, isLost });

async function ask(path, options = {}) {
  try {
    const response = await fetch(path, { ...options, signal: AbortSignal.timeout(TIMEOUT_MS) });
    return [response, await response.json()];
  } catch {
    throw fail("The gateway does not answer", "Is 'pipeline web' still running?", true);
  }
}

// Returns {model, version, sha256, classes}.
export async function findModel() {
  const [response, record] = await ask("readyz");
  if (!response.ok) throw fail("The server does not answer", record.error, true);
  return record;
}

// Returns the gateway's answer about a picture, a PNG, JPEG or WebP file.
export async function classify(body) {
  const [response, answer] = await ask("classify", { method: "POST", body });
  if (response.ok) return answer;
  if (response.status === 503) throw fail("The server does not answer", answer.error, true);
  throw fail(response.status === 422 ? "No digit found" : "Request refused", answer.error, false);
}
