// The button "Check it here": runs the release's images in this browser and compares the digests.

import { startWorker } from "./link.js";
import { byId, speak } from "./page.js";

const ask = startWorker(); // its own, so that drawings are answered meanwhile
const button = byId("check");
const list = byId("checks");

const TITLES = { golden: "golden images", test: "test images" };

function rowOf({ name, images, sha256 }) {
  const row = byId("check-row").content.firstElementChild.cloneNode(true);
  row.querySelector("h3").textContent =
    name ? `Scores of ${images.toLocaleString("en")} ${TITLES[name]}` : "The model's file";
  row.querySelector(".recorded").textContent = sha256;
  list.append(row);
  return (verdict, state, digest = "") => {
    row.dataset.state = state;
    row.querySelector("output").textContent = verdict;
    row.querySelector(".computed").textContent = digest || "–";
  };
}

async function checkAll() {
  list.replaceChildren();
  const { sha256, checks } = await ask("release");
  const rows = [{ sha256 }, ...checks];
  const shows = rows.map(rowOf);
  let equal = 0;
  for (const [index, row] of rows.entries()) {
    const show = shows[index];
    show("checking", "waiting");
    const began = performance.now();
    try {
      const computed = await ask("check", row, (done) => show(`${done} of ${row.images} images`, "waiting"));
      const isEqual = computed === row.sha256;
      const time = row.name ? ` after ${((performance.now() - began) / 1000).toFixed(1)} s` : "";
      show(`${isEqual ? "equal" : "not equal"}${time}`, isEqual ? "equal" : "different", computed);
      equal += isEqual;
    } catch (error) {
      show(`not equal: it cannot be run (${error.message})`, "different");
    }
  }
  return equal === rows.length
    ? "Equal: this browser computes what was released."
    : "Not equal: this is not what was released, or this browser computes it differently.";
}

button.addEventListener("click", async () => {
  button.disabled = true;
  byId("checked").textContent = "";
  const message = await checkAll().catch((error) => `The check failed: ${error.message}.`);
  byId("checked").textContent = message;
  speak(message);
  button.disabled = false;
});
