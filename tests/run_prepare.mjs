// Runs pipeline/web/page/prepare.js over pictures from standard input, each as its width and height
// (uint32, little-endian) and its RGBA; answers with 784 bytes each,
// and the boxes of the parts: their number, then four uint32 each.
import { readFileSync } from "node:fs";

const source = readFileSync(process.argv[2]);
const { prepareParts } = await import(`data:text/javascript;base64,${source.toString("base64")}`);
const input = readFileSync(0);
const answers = [];
for (let at = 0; at < input.length; ) {
  const [width, height] = [input.readUInt32LE(at), input.readUInt32LE(at + 4)];
  const rgba = new Uint8ClampedArray(input.subarray(at + 8, at + 8 + 4 * width * height));
  const { image, parts } = prepareParts(rgba, width, height);
  answers.push(Buffer.from(image), Buffer.from(Uint32Array.of(parts.length, ...parts.flat()).buffer));
  at += 8 + 4 * width * height;
}
process.stdout.write(Buffer.concat(answers));
