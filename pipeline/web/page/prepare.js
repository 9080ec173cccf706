// A picture of a digit as the model takes it, by the rules of RULES.md, in whole numbers only.
// prepare(rgba, width, height) -> Uint8Array(784): 0 is paper, 255 is ink; zeros without ink.
// prepareParts(rgba, width, height) -> {image, parts}: the same, and the boxes of the parts,
// [left, top, right, bottom] in pixels of the picture; the first is in the image.
// A picture here is {w, h, v}: v has the levels, row by row.

const WORK_SIDE = 640;
const THUMBNAIL = 160;
const STROKE = 4;
const NOISE = 2;
const MIN_DISTANCE = 5;
const FAINT = 5;
const MAX_NOISE = 3;
const SMOOTHINGS = 3;
const MIN_CONTRAST = 16;
const OF_LINES = 2;
const STRIP = 16;
const FEWEST_STRIPS = 8;
const FEWEST_LINES = 3;
const SURE = 7;
const POSSIBLE = 5;
const STEEPEST = 14;
const HIT = 4096;
const APART = 7;
const FULLEST = 8;
const LONGEST = 4;
const MOST_RUNS = 16;
const RIDGE = 5;
const SIDE = 28;
const DIGIT = 20;
const FULL = 16;
const THIN = 26;
const SMALLEST = 40;
const NEAR = 4;
const LIGHTEST = 8;
const SHORTEST = 4;
const MOST = 16;

const div = (a, b) => Math.floor(a / b);
const clip = (x, low, high) => Math.max(low, Math.min(high, x));
const picture = (w, h) => ({ w, h, v: new Int32Array(w * h) });
const mapped = (p, f) => ({ w: p.w, h: p.h, v: p.v.map(f) });

export function prepare(rgba, width, height) {
  return prepareParts(rgba, width, height).image;
}

export function prepareParts(rgba, width, height) {
  const factor = Math.ceil(Math.max(width, height) / WORK_SIDE);
  const found = ink(reduced(gray(rgba, width, height), factor));
  const { image, boxes } = found.threshold
    ? fitted(found)
    : blank();
  const ends = [width, height, width, height];
  return { image, parts: boxes.map((box) => box.map((at, i) => Math.min(factor * at, ends[i]))) };
}

const blank = () => ({ image: new Uint8Array(SIDE * SIDE), boxes: [] });

// 1. Gray levels

function gray(rgba, w, h) {
  const p = picture(w, h);
  const count = w * h;
  let alphas = 0;
  for (let i = 0; i < count; i++) {
    const [r, g, b] = [rgba[4 * i], rgba[4 * i + 1], rgba[4 * i + 2]];
    p.v[i] = (r * 19595 + g * 38470 + b * 7471 + 32768) >> 16;
    alphas += rgba[4 * i + 3];
  }
  if (alphas === 255 * count) return p;
  let paper = 255;
  if (2 * alphas > 255 * count) {
    paper = middle(p.v.filter((_, i) => rgba[4 * i + 3] > 127));
  } else {
    let sum = 0;
    for (let i = 0; i < count; i++) sum += p.v[i] * rgba[4 * i + 3];
    if (sum > 127 * alphas) paper = 0;
  }
  for (let i = 0; i < count; i++) {
    const a = rgba[4 * i + 3];
    p.v[i] = div(p.v[i] * a + paper * (255 - a) + 127, 255);
  }
  return p;
}

function reduced(p, factor) {
  if (factor === 1) return p;
  const out = picture(Math.ceil(p.w / factor), Math.ceil(p.h / factor));
  for (let y = 0; y < p.h; y++)
    for (let x = 0; x < p.w; x++) out.v[div(y, factor) * out.w + div(x, factor)] += p.v[y * p.w + x];
  for (let y = 0; y < out.h; y++)
    for (let x = 0; x < out.w; x++) {
      const n = Math.min(factor, p.h - y * factor) * Math.min(factor, p.w - x * factor);
      out.v[y * out.w + x] = div(out.v[y * out.w + x] + div(n, 2), n);
    }
  return out;
}

// 2. Ink

function ink(g) {
  const factor = Math.ceil(Math.max(g.w, g.h) / THUMBNAIL);
  const small = reduced(g, factor);
  const full = fullInkOf(small);
  const isFull = full.threshold > 0;
  const paper = middle(frame(g));
  const border = frame(g);
  const same = border.reduce((count, level) => count + (level === paper), 0);
  if (3 * same >= 2 * border.length) {
    const { levels, line } = withoutLines(onFlat(g, paper), 0);
    const highest = largest(levels.v);
    const threshold = Math.max(div(highest, FAINT) + 1, div(line, OF_LINES));
    const isBlank = highest < Math.max(MIN_CONTRAST, threshold);
    return { levels, threshold: isBlank ? 0 : threshold, isRuled: line > 0, isFull };
  }
  let up = isFull
    ? distanceFrom(g, enlarged(meanAround(small, full.isPaper), factor, g), full.isBright)
    : raised(g, small, factor);
  const ofPaper = (p) => p.v.filter((_, i) => !isFull || g.v[i] < full.threshold === full.isBright);
  for (let i = 0; i < SMOOTHINGS && noiseOf(ofPaper(up)) > MAX_NOISE; i++) up = smoothed(up);
  const level = middle(ofPaper(up));
  const noise = noiseOf(ofPaper(up));
  const { levels, line } = withoutLines(mapped(up, (x) => Math.max(x - level, 0)), noise);
  const distance = Math.max(div(MIN_CONTRAST, 2), MIN_DISTANCE * noise, div(line, OF_LINES));
  const isRuled = line > 0;
  const between = isFull ? div(2 * otsu(levels.v, 0), 3) : otsu(levels.v, distance);
  const threshold = Math.max(between, distance);
  if (largest(levels.v) < Math.max(MIN_CONTRAST, distance)) return { levels, threshold: 0, isRuled, isFull };
  return {
    levels: mapped(levels, (x) => Math.max(x - NOISE * noise, 0)),
    threshold: Math.max(threshold - NOISE * noise, 1),
    isRuled,
    isFull,
  };
}

function frame(p) {
  const isInside = insideOf(p);
  return p.v.filter((_, i) => !isInside(div(i, p.w), i % p.w));
}

function insideOf(p) {
  const edge = Math.max(1, div(Math.min(p.w, p.h), 14));
  return (y, x) => y >= edge && y < p.h - edge && x >= edge && x < p.w - edge;
}

function largest(levels) {
  return levels.reduce((most, level) => Math.max(most, level), 0);
}

function middle(levels) {
  const counts = new Int32Array(largest(levels) + 1);
  for (const level of levels) counts[level]++;
  const half = div(levels.length + 1, 2);
  let level = 0;
  for (let below = counts[0]; below < half; below += counts[level]) level++;
  return level;
}

function noiseOf(levels) {
  const level = middle(levels);
  return div(3 * middle(levels.map((x) => Math.abs(x - level))), 2);
}

function smoothed(p) {
  const out = picture(p.w, p.h);
  for (let y = 0; y < p.h; y++)
    for (let x = 0; x < p.w; x++) {
      let sum = 4;
      for (let dy = -1; dy <= 1; dy++)
        for (let dx = -1; dx <= 1; dx++)
          sum += p.v[clip(y + dy, 0, p.h - 1) * p.w + clip(x + dx, 0, p.w - 1)];
      out.v[y * p.w + x] = div(sum, 9);
    }
  return out;
}

// Ink is rare and far from the paper, so the sum of cubes has its sign.
function isRaised(levels) {
  return levels.reduce((sum, level) => sum + level ** 3, 0) > 0;
}

function onFlat(g, paper) {
  const distance = mapped(g, (x) => x - paper);
  const sign = isRaised(distance.v) ? 1 : -1;
  return mapped(distance, (x) => Math.max(sign * x, 0));
}

function raised(g, small, factor) {
  const around = meanAround(small, small.v.map(() => 1));
  const isBright = isRaised(small.v.map((x, i) => x - around.v[i]));
  const turn = (p) => (isBright ? p : mapped(p, (x) => 255 - x));
  return distanceFrom(g, turn(enlarged(paperOf(turn(small)), factor, g)), isBright);
}

function distanceFrom(g, paper, isBright) {
  if (isBright) return { ...g, v: g.v.map((x, i) => Math.max(x - paper.v[i], 0)) };
  const share = (x, i) => {
    const level = Math.max(paper.v[i], 1);
    return div(Math.max(level - x, 0) * 255 + div(level, 2), level);
  };
  return { ...g, v: g.v.map(share) };
}

// Whether ink fills the picture: its threshold (else 0), whether it is brighter, and the paper.
function fullInkOf(small) {
  const threshold = otsu(small.v, 0);
  const { w, h } = small;
  const edge = Math.max(1, div(Math.min(w, h), 14));
  const isInside = insideOf(small);
  let [inFrame, ofFrame, inCorners] = [0, 0, 0];
  const isAbove = small.v.map((x, i) => {
    const [y, x0] = [div(i, w), i % w];
    if (!isInside(y, x0)) ofFrame++;
    if (!isInside(y, x0) && x >= threshold) inFrame++;
    return x >= threshold ? 1 : 0;
  });
  for (const top of [0, h - edge])
    for (const left of [0, w - edge])
      for (let y = top; y < top + edge; y++)
        for (let x = left; x < left + edge; x++) inCorners += isAbove[y * w + x];
  const isBright = inFrame * 4 * edge * edge + inCorners * ofFrame < ofFrame * 4 * edge * edge;
  const isPaper = isAbove.map((x) => (x === Number(isBright) ? 0 : 1));
  const n = w * h;
  let [ink, sum, total, squares] = [0, 0, 0, 0];
  small.v.forEach((x, i) => {
    total += x;
    squares += x * x;
    if (!isPaper[i]) [ink, sum] = [ink + 1, sum + x];
  });
  const apart = Math.abs(sum * (n - ink) - (total - sum) * ink);
  const around = [];
  for (let x = 0; x < w; x++) around.push(isPaper[x]);
  for (let y = 1; y < h; y++) around.push(isPaper[y * w + w - 1]);
  for (let x = w - 2; x >= 0; x--) around.push(isPaper[(h - 1) * w + x]);
  for (let y = h - 2; y > 0; y--) around.push(isPaper[y * w]);
  const first = around.indexOf(1);
  let [longest, run, runs] = [0, 0, 0];
  for (let i = 1; i <= around.length; i++) {
    run = around[(first + i) % around.length] ? 0 : run + 1;
    if (run === 1) runs++;
    longest = Math.max(longest, run);
  }
  const isFull =
    first >= 0 &&
    Math.min(w, h) > 1 &&
    apart >= MIN_CONTRAST * ink * (n - ink) &&
    10 * apart * apart >= APART * ink * (n - ink) * (n * squares - total * total) &&
    longest * LONGEST <= around.length &&
    runs <= MOST_RUNS &&
    (longest > 0 || ink * FULLEST >= n);
  return { threshold: isFull ? threshold : 0, isBright, isPaper };
}

// The mean of the masked levels in the square around each pixel; that of all where there are none.
function meanAround(p, mask) {
  const half = Math.max(1, div(Math.max(p.w, p.h), 4));
  const masked = p.v.map((x, i) => x * mask[i]);
  const [sums, counts] = [sumsOf(p, masked), sumsOf(p, mask)];
  const out = picture(p.w, p.h);
  for (let y = 0; y < p.h; y++)
    for (let x = 0; x < p.w; x++) {
      const box = [y - half, y + half + 1, x - half, x + half + 1];
      const [sum, count] = counts(...box) ? [sums(...box), counts(...box)] : [sums(0, p.h, 0, p.w), counts(0, p.h, 0, p.w)];
      out.v[y * p.w + x] = div(sum + div(count, 2), count);
    }
  return out;
}

// A function of rows and columns, from first to before last, to the sum of the levels there.
function sumsOf({ w, h }, levels) {
  const sums = new Float64Array((w + 1) * (h + 1)); // of all above and to the left
  const at = (y, x) => sums[clip(y, 0, h) * (w + 1) + clip(x, 0, w)];
  for (let y = 0; y < h; y++)
    for (let x = 0; x < w; x++)
      sums[(y + 1) * (w + 1) + x + 1] = levels[y * w + x] + at(y, x + 1) + at(y + 1, x) - at(y, x);
  return (top, bottom, left, right) => at(bottom, right) - at(top, right) - at(bottom, left) + at(top, left);
}

function paperOf(small) {
  const side = Math.max(3, div(Math.max(small.w, small.h), STROKE));
  const wide = continued(continued(small, side - 1), side - 1);
  return slide(slide(wide, side, Math.min), side, Math.max);
}

// The picture with its rows continued by `by` on both sides by odd reflection, transposed.
function continued(p, by) {
  const out = picture(p.h, p.w + 2 * by);
  for (let y = 0; y < p.h; y++) {
    const row = p.v.subarray(y * p.w, (y + 1) * p.w);
    const last = p.w - 1;
    const level = (x) => {
      if (x < 0) return 2 * row[0] - row[Math.min(-x, last)];
      return x > last ? 2 * row[last] - row[Math.max(2 * last - x, 0)] : row[x];
    };
    for (let x = 0; x < out.h; x++) out.v[x * p.h + y] = level(x - by);
  }
  return out;
}

function slide(p, side, extreme) {
  let q = p;
  for (let turn = 0; turn < 2; turn++) {
    let done = 1;
    while (done < side) {
      const step = Math.min(done, side - done);
      const next = picture(q.w, q.h - step);
      for (let i = 0; i < next.v.length; i++) next.v[i] = extreme(q.v[i], q.v[i + step * q.w]);
      q = next;
      done += step;
    }
    q = transposed(q);
  }
  return q;
}

function transposed(p) {
  const out = picture(p.h, p.w);
  for (let y = 0; y < p.h; y++)
    for (let x = 0; x < p.w; x++) out.v[x * p.h + y] = p.v[y * p.w + x];
  return out;
}

function enlarged(small, factor, shape) {
  if (factor === 1) return small;
  const between = (length, last) =>
    Array.from({ length }, (_, i) => {
      const place = 2 * i + 1 - factor;
      const first = div(place, 2 * factor);
      return [clip(first, 0, last), clip(first + 1, 0, last), place - 2 * factor * first];
    });
  const columns = between(shape.w, small.w - 1);
  const out = picture(shape.w, shape.h);
  const whole = 4 * factor * factor;
  between(shape.h, small.h - 1).forEach(([top, bottom, down], y) => {
    columns.forEach(([left, right, across], x) => {
      const mixed = (row) =>
        small.v[row * small.w + left] * (2 * factor - across) + small.v[row * small.w + right] * across;
      const sum = mixed(top) * (2 * factor - down) + mixed(bottom) * down;
      out.v[y * shape.w + x] = div(sum + whole / 2, whole);
    });
  });
  return out;
}

function otsu(levels, distance) {
  const counts = new Float64Array(largest(levels) + 1); // above 255 where the paper is below 0
  for (const level of levels) if (level >= distance) counts[level]++;
  let [total, whole] = [0, 0];
  for (let level = 0; level < counts.length; level++) {
    total += counts[level];
    whole += counts[level] * level;
  }
  let [count, mass, best, found] = [0, 0, -1, 0];
  for (let level = 0; level < counts.length; level++) {
    count += counts[level];
    mass += counts[level] * level;
    if (!counts[level] || count === total) continue;
    const apart = mass * (total - count) - (whole - mass) * count;
    const spread = (apart * apart) / (count * (total - count));
    if (spread > best) [best, found] = [spread, level + 1];
  }
  return found;
}

// 3. Lines

function withoutLines(levels, noise) {
  const across = withoutRows(levels, noise);
  const upright = withoutRows(transposed(across.levels), noise);
  return { levels: transposed(upright.levels), line: Math.max(across.line, upright.line) };
}

function withoutRows(p, noise) {
  const gap = Math.max(3, div(Math.max(p.w, p.h), 120));
  if (p.w < STRIP * FEWEST_STRIPS || p.h < 8 * gap) return { levels: p, line: 0 };
  const levels = { ...p, v: p.v.slice() };
  let line = 0;
  for (const [slope, row] of linesIn(p, Math.max(RIDGE, 2 * noise), gap))
    line = Math.max(line, erase(levels, (x) => row + div(slope * (2 * x + 1 - p.w), p.w), gap));
  return { levels, line };
}

function linesIn(p, ridge, gap) {
  const strips = div(p.w, STRIP);
  const isRidge = (y, x) =>
    y >= gap &&
    y < p.h - gap &&
    p.v[y * p.w + x] > Math.max(p.v[(y - gap) * p.w + x], p.v[(y + gap) * p.w + x]) + ridge;
  const ridges = picture(p.w, p.h);
  for (let y = 0; y < p.h; y++) for (let x = 0; x < p.w; x++) ridges.v[y * p.w + x] = isRidge(y, x) ? 1 : 0;
  const at = (y, x) => (y >= 0 && y < p.h ? ridges.v[y * p.w + x] : 0);
  const hits = picture(strips, p.h);
  for (let y = 0; y < p.h; y++)
    for (let strip = 0; strip < strips; strip++) {
      let [count, exact] = [0, 0];
      for (let x = strip * STRIP; x < (strip + 1) * STRIP; x++) {
        count += at(y - 1, x) | at(y, x) | at(y + 1, x);
        exact += at(y, x);
      }
      hits.v[y * strips + strip] = (2 * count >= STRIP ? HIT : 0) + exact;
    }
  const steepest = div(p.w, STEEPEST);
  const scores = picture(p.h, 2 * steepest + 1);
  for (let slope = -steepest; slope <= steepest; slope++)
    for (let strip = 0; strip < strips; strip++) {
      const shift = div(slope * (2 * strip + 1 - strips), strips);
      for (let y = Math.max(0, -shift); y < Math.min(p.h, p.h - shift); y++)
        scores.v[(slope + steepest) * p.h + y] += hits.v[(y + shift) * strips + strip];
    }
  return peaks(scores, strips, gap, steepest);
}

function peaks(scores, strips, gap, steepest) {
  const found = [];
  let sure = 0;
  for (;;) {
    let best = 0;
    for (let i = 1; i < scores.v.length; i++) if (scores.v[i] > scores.v[best]) best = i;
    const score = 10 * div(scores.v[best], HIT);
    if (score < POSSIBLE * strips) return sure >= FEWEST_LINES ? found : [];
    if (score >= SURE * strips) sure++;
    const [slope, row] = [div(best, scores.w), best % scores.w];
    found.push([slope - steepest, row]);
    for (let y = Math.max(row - 2 * gap, 0); y <= Math.min(row + 2 * gap, scores.w - 1); y++)
      for (let s = 0; s < scores.h; s++) scores.v[s * scores.w + y] = 0;
  }
}

function erase(p, rowOf, gap) {
  const at = (y, x) => (y >= 0 && y < p.h ? p.v[y * p.w + x] : 0);
  const highest = new Int32Array(p.w);
  for (let x = 0; x < p.w; x++)
    for (let d = 1 - gap; d < gap; d++) highest[x] = Math.max(highest[x], at(rowOf(x) + d, x));
  const line = highest.slice().sort()[div(p.w - 1, 2)];
  const above = Array.from(highest, (_, x) => at(rowOf(x) - gap, x));
  const below = Array.from(highest, (_, x) => at(rowOf(x) + gap, x));
  const spread = (levels, x) => Math.max(levels[Math.max(x - 1, 0)], levels[x], levels[Math.min(x + 1, p.w - 1)]);
  for (let x = 0; x < p.w; x++) {
    const across = Math.min(spread(above, x), spread(below, x));
    for (let d = 1 - gap; d < gap; d++) {
      const y = rowOf(x) + d;
      if (y < 0 || y >= p.h || p.v[y * p.w + x] > 2 * line) continue;
      p.v[y * p.w + x] = Math.min(p.v[y * p.w + x], across);
    }
  }
  return line;
}

// 4. The digit

function fitted({ levels, threshold, isRuled, isFull }) {
  const { kept, boxes } = digitOf(levels, threshold, isRuled, isFull);
  if (!boxes.length) return blank();
  const [left, top, right, bottom] = boxes[0];
  const side = Math.max(bottom - top, right - left);
  const shorter = Math.min(bottom - top, right - left);
  const edge = 2 * (div(side, DIGIT) + 1);
  const cut = (p) => windowOf(p, top - edge, bottom + edge, left - edge, right + edge);
  const mask = cut(kept);
  const { area, edges } = areaOf(mask);
  const isRound = 4 * side <= 5 * shorter && 10 * edges <= 22 * (side + shorter); // without a hole
  if (isRound && 4 * area >= 3 * side * shorter) return blank(); // a dot, not a digit
  const soft = grown(mask, Math.max(1, div(side, DIGIT)));
  const cleaned = mapped(cut(levels), (x, i) => x * soft.v[i]);
  const by = thickening({ area, edges }, side);
  const thick = by ? grown(cleaned, by) : cleaned;
  const box = [edge - by, edge - by, bottom - top + 2 * by, right - left + 2 * by];
  return { image: centred(full(scaled(thick, box, side + 2 * by))), boxes };
}

function windowOf(p, top, bottom, left, right) {
  const out = picture(right - left, bottom - top);
  for (let y = Math.max(top, 0); y < Math.min(bottom, p.h); y++)
    for (let x = Math.max(left, 0); x < Math.min(right, p.w); x++)
      out.v[(y - top) * out.w + x - left] = p.v[y * p.w + x];
  return out;
}

function grown(p, by) {
  return slide(windowOf(p, -by, p.h + by, -by, p.w + by), 2 * by + 1, Math.max);
}

// The pixels of a mask, and the pairs of neighbours that differ.
function areaOf(mask) {
  let [area, edges] = [0, 0];
  for (let y = 0; y < mask.h; y++)
    for (let x = 0; x < mask.w; x++) {
      const i = y * mask.w + x;
      area += mask.v[i];
      if (y + 1 < mask.h && mask.v[i] !== mask.v[i + mask.w]) edges++;
      if (x + 1 < mask.w && mask.v[i] !== mask.v[i + 1]) edges++;
    }
  return { area, edges };
}

function thickening({ area, edges }, side) {
  const width = div(2 * area * DIGIT * 20, edges * side);
  return Math.min(Math.max(0, div((THIN - width) * side, 2 * DIGIT * 20)), div(side, DIGIT));
}

// The mask of the digit, and the boxes of all parts, the digit's first.
function digitOf(levels, threshold, isRuled, isFull) {
  const mask = mapped(levels, (x) => (x >= threshold ? 1 : 0));
  const { labels, pieces } = piecesOf(mask, levels);
  if (isFull) for (const piece of pieces) piece.atBorder = false; // what reaches the border is the digit
  const parts = partsOf(pieces.filter((piece) => piece.reachesIn || !isRuled));
  const kept = { ...mask, v: labels.map((label) => (label && parts[0]?.has(pieces[label - 1]) ? 1 : 0)) };
  return { kept, boxes: parts.map((part) => boxOf([...part])) };
}

// Each piece is flooded from its first pixel; its box is [left, top, right, bottom], exclusive.
function piecesOf(mask, levels) {
  const labels = new Int32Array(mask.v.length);
  const pieces = [];
  const isInside = insideOf(mask);
  for (let first = 0; first < labels.length; first++) {
    if (!mask.v[first] || labels[first]) continue;
    const piece = { mass: 0, reachesIn: false, box: [mask.w, mask.h, 0, 0] };
    pieces.push(piece);
    labels[first] = pieces.length;
    const open = [first];
    while (open.length) {
      const i = open.pop();
      const [y, x] = [div(i, mask.w), i % mask.w];
      piece.mass += levels.v[i];
      piece.reachesIn ||= isInside(y, x);
      piece.box = around(piece.box, [x, y, x + 1, y + 1]);
      for (let v = Math.max(y - 1, 0); v <= Math.min(y + 1, mask.h - 1); v++)
        for (let u = Math.max(x - 1, 0); u <= Math.min(x + 1, mask.w - 1); u++) {
          const j = v * mask.w + u;
          if (mask.v[j] && !labels[j]) {
            labels[j] = pieces.length;
            open.push(j);
          }
        }
    }
    const [left, top, right, bottom] = piece.box;
    piece.atBorder = !left || !top || right === mask.w || bottom === mask.h;
  }
  return { labels, pieces };
}

// The smallest box around two.
function around([left, top, right, bottom], [l, t, r, b]) {
  return [Math.min(left, l), Math.min(top, t), Math.max(right, r), Math.max(bottom, b)];
}

const boxOf = (pieces) => pieces.map((piece) => piece.box).reduce(around);
const sidesOf = ([left, top, right, bottom]) => [right - left, bottom - top];
const massOf = (pieces) => pieces.reduce((sum, piece) => sum + piece.mass, 0);

function heaviest(pieces) {
  return pieces.reduce((best, piece) => (best && best.mass >= piece.mass ? best : piece), null);
}

// The parts, each a set of pieces; the digit is the first.
function partsOf(pieces) {
  if (!pieces.length) return [];
  const all = heaviest(pieces);
  const inside = heaviest(pieces.filter((piece) => !piece.atBorder));
  let main = inside && inside.mass * 8 >= all.mass ? inside : all;
  let free = main.atBorder ? pieces : pieces.filter((piece) => !piece.atBorder);
  const parts = [];
  for (;;) {
    const part = joined(main, free.filter((piece) => piece.mass * SMALLEST >= main.mass));
    free = free.filter((piece) => !part.has(piece));
    if (!parts.length) {
      const side = Math.max(...sidesOf(boxOf([...part])));
      const least = massOf([...part]);
      free = free.filter(
        ({ mass, box }) => mass * LIGHTEST >= least && Math.max(...sidesOf(box)) * SHORTEST >= side,
      );
    }
    parts.push(part);
    if (!free.length || parts.length === MOST) return parts;
    main = heaviest(free);
  }
}

// The set of those possible pieces that make one part with the piece `main`.
function joined(main, possible) {
  const part = new Set([main]);
  for (;;) {
    const box = boxOf([...part]);
    const near = div(Math.max(...sidesOf(box)) - 1, NEAR);
    const more = possible.filter((piece) => {
      const gaps = [0, 1].map((i) => Math.max(piece.box[i] - box[i + 2], box[i] - piece.box[i + 2]));
      const [width, height] = sidesOf(around(box, piece.box));
      const lower = Math.min(sidesOf(box)[1], sidesOf(piece.box)[1]);
      const isNext = width > height && 4 * lower >= 3 * height; // another digit, next to this one
      return !part.has(piece) && Math.max(...gaps) <= near && !isNext;
    });
    if (!more.length) return part;
    more.forEach((piece) => part.add(piece));
  }
}

function scaled(p, [top, left, height, width], side) {
  if (side >= DIGIT - 2 && side <= DIGIT + 1) {
    const { w, h, v } = windowOf(p, top - 1, top + height + 1, left - 1, left + width + 1);
    return { w, h, v: Float64Array.from(v) };
  }
  const weights = side > DIGIT ? areas : cubics;
  const rows = weights(p.h, top, height, side);
  const columns = weights(p.w, left, width, side);
  const out = { w: columns.length, h: rows.length, v: new Float64Array(columns.length * rows.length) };
  rows.forEach((row, j) => {
    const line = new Float64Array(p.w);
    for (const [y, weight] of row) for (let x = 0; x < p.w; x++) line[x] += weight * p.v[y * p.w + x];
    columns.forEach((column, i) => {
      let sum = 0;
      for (const [x, weight] of column) sum += weight * line[x];
      out.v[j * out.w + i] = div(Math.max(sum, 0), side > DIGIT ? 1 : 4096);
    });
  });
  return out;
}

// For each scaled pixel, the pixels that make it with their weights, [pixel, weight].
function weighted(length, start, extent, side, weightOf) {
  const count = Math.ceil((extent * DIGIT) / side) + 2;
  return Array.from({ length: count }, (_, j) => {
    const found = [];
    for (let pixel = 0; pixel < length; pixel++) {
      const weight = weightOf(j - 1, pixel);
      if (weight) found.push([pixel, weight]);
    }
    return found;
  });
}

function areas(length, start, extent, side) {
  return weighted(length, start, extent, side, (j, pixel) => {
    const begin = start * DIGIT + side * j;
    return Math.max(0, Math.min(begin + side, (pixel + 1) * DIGIT) - Math.max(begin, pixel * DIGIT));
  });
}

function cubics(length, start, extent, side) {
  return weighted(length, start, extent, side, (j, pixel) => {
    const t = Math.abs(2 * start * DIGIT + side * (2 * j + 1) - 40 * pixel - 20);
    if (t <= 40) return 3 * t ** 3 - 200 * t ** 2 + 128000;
    return t < 80 ? -(t ** 3) + 200 * t ** 2 - 12800 * t + 256000 : 0;
  });
}

function full(p) {
  const ordered = p.v.slice().sort().reverse();
  const level = ordered[Math.min(FULL, ordered.length) - 1] || ordered[0];
  return { w: p.w, h: p.h, v: Int32Array.from(p.v, (x) => Math.min(div(x * 510 + level, 2 * level), 255)) };
}

function centred(digit) {
  const side = SIDE + 2;
  const start = (length, at) => {
    let [total, moment] = [0, 0];
    digit.v.forEach((level, i) => {
      total += level;
      moment += level * at(i);
    });
    const place = Math.ceil(((side - 1) * total - 2 * moment) / (2 * total));
    return clip(place, 0, side - length);
  };
  const top = start(digit.h, (i) => div(i, digit.w));
  const left = start(digit.w, (i) => i % digit.w);
  const out = new Uint8Array(SIDE * SIDE);
  for (let y = 0; y < digit.h; y++)
    for (let x = 0; x < digit.w; x++) {
      const [v, u] = [top + y - 1, left + x - 1];
      if (v >= 0 && v < SIDE && u >= 0 && u < SIDE) out[v * SIDE + u] = digit.v[y * digit.w + x];
    }
  return out;
}
