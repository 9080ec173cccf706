// The same request from a program, as code to copy.

import { byId, fileName, rove, speak } from "./page.js";

const address = new URL("classify", location.href).href;
const SNIPPETS = {
  curl: (name) => `curl --data-binary @${name} ${address}`,
  python: (name) => `import json, urllib.request

with open("${name}", "rb") as file:
    request = urllib.request.Request("${address}", file.read())
with urllib.request.urlopen(request) as response:
    answer = json.load(response)
print("not sure" if answer["sure"] is False else answer["label"], answer["probability"])`,
  javascript: (name) => `// node ask.mjs: Node 18 or newer
import { readFile } from "node:fs/promises";

const body = await readFile("${name}");
const response = await fetch("${address}", { method: "POST", body });
const answer = await response.json();
console.log(answer.sure === false ? "not sure" : answer.label, answer.probability);`,
};
const tabs = [...document.querySelectorAll("[role=tab]")];
const code = byId("snippet").parentElement;

function choose(tab) {
  for (const other of tabs) other.setAttribute("aria-selected", String(other === tab));
  byId("code").setAttribute("aria-labelledby", tab.id);
  showSnippet();
}

function showSnippet() {
  const tab = tabs.find((other) => other.getAttribute("aria-selected") === "true");
  byId("saved").textContent = fileName();
  byId("snippet").textContent = SNIPPETS[tab.id.replace("tab-", "")](fileName());
  showMore();
}

// Shows whether the lines go on to the right.
function showMore() {
  code.classList.toggle("more", code.scrollWidth - code.clientWidth - code.scrollLeft > 1);
}

for (const tab of tabs) tab.addEventListener("click", () => choose(tab));
rove(tabs, choose);
code.addEventListener("scroll", showMore);
new ResizeObserver(showMore).observe(code);

byId("copy").addEventListener("click", async () => {
  let message = "Copied";
  try {
    await navigator.clipboard.writeText(byId("snippet").textContent);
  } catch { // the clipboard needs https or localhost: select the text, for the reader to copy
    getSelection().selectAllChildren(byId("snippet"));
    message = "Selected";
  }
  byId("copy").textContent = message;
  speak(message);
  setTimeout(() => { byId("copy").textContent = "Copy"; }, 1500);
});

byId("canvas").addEventListener("change", showSnippet);
choose(tabs[0]);
