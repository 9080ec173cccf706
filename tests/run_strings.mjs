// Runs pipeline/web/page/strings.js over a JSON list of strips from standard input, each a list of steps
// of log-probabilities; answers with a JSON list of what it reads.
import { readFileSync } from "node:fs";

const source = readFileSync(process.argv[2]);
const { readString } = await import(`data:text/javascript;base64,${source.toString("base64")}`);
const strips = JSON.parse(readFileSync(0));
process.stdout.write(JSON.stringify(strips.map((steps) => readString(steps.flat(), steps[0].length))));
