// Runs pipeline/web/page/prepare.js over pictures from standard input, each as its width and height
// (uint32, little-endian) and its RGBA; answers with 784 bytes each.
import { readFileSync } from "node:fs";

const source = readFileSync(process.argv[2]);
const { prepare } = await import(`data:text/javascript;base64,${source.toString("base64")}`);
const input = readFileSync(0);
const answers = [];
for (let at = 0; at < input.length; ) {
  const [width, height] = [input.readUInt32LE(at), input.readUInt32LE(at + 4)];
  const rgba = new Uint8ClampedArray(input.subarray(at + 8, at + 8 + 4 * width * height));
  answers.push(Buffer.from(prepare(rgba, width, height)));
  at += 8 + 4 * width * height;
}
process.stdout.write(Buffer.concat(answers));
