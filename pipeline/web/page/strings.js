// The strings of digits in a strip's outputs, as pipeline/core/strings.py finds them: log-probabilities
// of `symbols` symbols a step, one step after the other, of which the last symbol is the blank.

const max = (a, b) => Math.max(a, b);
const sum = (a, b) => a + b;

// The digits of a string with blanks around them, and what `join` makes of all ways into each.
function align(chances, symbols, text, join) {
  const blank = symbols - 1;
  const states = [blank, ...[...text].flatMap((digit) => [Number(digit), blank])];
  let ways = states.map((_, state) => (state ? 0 : 1));
  const moves = []; // states passed on the likeliest way into each
  for (let at = 0; at < chances.length; at += symbols) {
    const options = states.map((symbol, state) => {
      const canSkip = state > 1 && symbol < blank && symbol !== states[state - 2];
      return [ways[state], state ? ways[state - 1] : 0, canSkip ? ways[state - 2] : 0];
    });
    moves.push(options.map((into) => into.indexOf(Math.max(...into))));
    ways = options.map((into, state) => into.reduce(join) * chances[at + states[state]]);
  }
  return { moves, ways, last: ways.length - 1 };
}

// The string's probability, summed over all its alignments.
function probabilityOf(chances, symbols, text) {
  const { ways, last } = align(chances, symbols, text, sum);
  return ways[last] + (last ? ways[last - 1] : 0);
}

// The first and the last step of each digit, by the string's likeliest alignment.
function placesOf(chances, symbols, text) {
  const { moves, ways, last } = align(chances, symbols, text, max);
  let state = last && ways[last - 1] > ways[last] ? last - 1 : last;
  const places = [...text].map(() => [Infinity, -1]);
  for (let step = moves.length - 1; step >= 0; step--) {
    const place = places[(state - 1) / 2];
    if (place) places[(state - 1) / 2] = [step, Math.max(step, place[1])];
    state -= moves[step][state];
  }
  return places;
}

// The likeliest strings with their probabilities, the likeliest first, and the places of its digits.
export function readString(outputs, symbols, top = 3, width = 8) {
  const chances = Array.from(outputs, Math.exp);
  let beam = new Map([["", [1, 0]]]); // alignments that end in a blank, and in the last digit
  for (let at = 0; at < chances.length; at += symbols) {
    const next = new Map();
    const add = (text, afterBlank, afterDigit) => {
      const [blank, digit] = next.get(text) ?? [0, 0];
      next.set(text, [blank + afterBlank, digit + afterDigit]);
    };
    for (const [text, [afterBlank, afterDigit]] of beam) {
      const last = text.at(-1), both = afterBlank + afterDigit;
      add(text, both * chances[at + symbols - 1], last ? afterDigit * chances[at + Number(last)] : 0);
      for (let digit = 0; digit < symbols - 1; digit++) {
        add(text + digit, 0, (String(digit) === last ? afterBlank : both) * chances[at + digit]);
      }
    }
    const ranked = [...next].sort(([, a], [, b]) => b[0] + b[1] - a[0] - a[1]);
    beam = new Map(ranked.slice(0, width));
  }
  const readings = [...beam.keys()].map((text) => [text, probabilityOf(chances, symbols, text)]);
  readings.sort((a, b) => b[1] - a[1]);
  return { readings: readings.slice(0, top), places: placesOf(chances, symbols, readings[0][0]) };
}
