"use strict";
// The explorer without Python. Every state was trained and tested when this page was made: here are the
// answers to all test images, and the page counts them. Only the digit pad computes networks, in `forward`.

const byId = (id) => document.getElementById(id);
const sum = (values) => values.reduce((total, value) => total + value, 0);
const facts = JSON.parse(byId("facts").textContent);
const DIGITS = [...Array(10).keys()];
const SIDE = 28, BOX = 20, PEN = 2.3, ZOOM = 10; // of the pad, as in digit_pad.py
const STRIP = 12; // images repaired, and as many broken, that are shown

// ---- data ----

// Base64 in the page, deflate inside.
async function unpack(id) {
  const text = atob(byId(id).textContent), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// The value of each of the 65,536 half floats: a sign, five bits of exponent, ten of fraction.
const HALF = Float32Array.from({ length: 65536 }, (_, bits) => {
  const exponent = (bits >> 10) & 31, fraction = bits & 1023;
  const size = exponent ? 2 ** (exponent - 25) * (1024 + fraction) : 2 ** -24 * fraction;
  return bits < 32768 ? size : -size;
});

// Half floats, packed as the low bytes of all, then the high bytes of all.
async function numbers(id) {
  const bytes = await unpack(id), n = bytes.length / 2, values = new Float32Array(n);
  for (let i = 0; i < n; i++) values[i] = HALF[bytes[i] + 256 * bytes[n + i]];
  return values;
}

// By layer, two matrices that follow each other in `values`; `lengths` has theirs.
function byLayer(values, lengths) {
  let at = 0;
  const take = (length) => values.subarray(at, (at += length));
  return facts.sizes.slice(1).map((out, n) => lengths(facts.sizes[n], out).map(take));
}

let labels, rows, images, base; // rows: the base's answers, then how each state's differ, modulo 10
let offTested; // the base's test, made once
const adapters = new Map(); // those used so far

async function load() {
  const answers = await unpack("answers"), count = answers.length / (facts.states.length + 2);
  [labels, ...rows] = Array.from({ length: answers.length / count }, (_, n) =>
    answers.subarray(n * count, (n + 1) * count));
  images = await unpack("images");
  base = byLayer(await numbers("base"), (inputs, out) => [inputs * out, out]); // Wᵀ and b
}

const ruleOf = ({ rank, rule }) => (rank === 1 ? facts.rules[0] : rule); // at rank 1 all rules are one
const changes = ({ batches, strength }) => batches > 0 && strength > 0; // else ΔW = 0

// By layer, A (r × in) and Bᵀ (r × out): what they were at the start, and their change.
async function adapterOf(state) {
  const id = `${state.rank}_${ruleOf(state)}_${state.batches}`;
  if (!adapters.has(id)) {
    const [start, change] = await Promise.all([numbers(`start_${state.rank}`), numbers(id)]);
    const lengths = (inputs, out) => [state.rank * inputs, state.rank * out];
    adapters.set(id, byLayer(change.map((value, i) => start[i] + value), lengths));
  }
  return adapters.get(id);
}

// The factor on BA.
function scaleOf(state) {
  const factor = { "α/r": 1 / state.rank, "α/√r": 1 / Math.sqrt(state.rank), "α": 1 }[state.rule];
  return state.strength * facts.alpha * factor;
}

// ---- what a state's answers are worth ----

function answersOf(state) {
  if (!changes(state)) return rows[0];
  const name = `${state.rank}_${ruleOf(state)}_${state.batches}_${state.strength}`;
  const difference = rows[1 + facts.states.indexOf(name)];
  return rows[0].map((answer, i) => (answer + difference[i]) % 10);
}

function test(answers) {
  const confusion = DIGITS.map(() => DIGITS.map(() => 0)); // row: the digit; column: the answer
  labels.forEach((label, i) => confusion[label][answers[i]]++);
  const wrong = confusion.map((row, digit) => sum(row) - row[digit]);
  return { answers, confusion, wrong, accuracy: (labels.length - sum(wrong)) / labels.length };
}

function figures(state) {
  const off = (offTested ??= test(rows[0])), on = test(answersOf(state)), places = [...labels.keys()];
  const right = (tested, i) => tested.answers[i] === labels[i];
  const repaired = places.filter((i) => right(on, i) && !right(off, i));
  const broken = places.filter((i) => right(off, i) && !right(on, i));
  return { off, on, now: state.on ? on : off, repaired, broken };
}

const signed = (change) => (change ? (change > 0 ? `+${change}` : `−${-change}`) : "±0");
const fromTo = (old, now) => `${old} → ${now} (${signed(now - old)})`;

// As Python writes it: a tie, such as 95.25, goes to the even digit.
function percent(share, places = 0) {
  const value = 100 * share;
  return `${(places === 1 && value % 1 === 0.25 ? value - 0.01 : value).toFixed(places)}%`;
}

function alphaOf(state) {
  const strength = state.strength === 1 ? "" : `, strength ${state.strength}`;
  const rule = state.rule === facts.rules[0] ? "" : `, scale ${state.rule}`;
  return `α ${Number(facts.alpha.toPrecision(6))}${strength}${rule}`;
}

function summarise(state, { off, now }) {
  const d = facts.digit, others = (tested) => sum(tested.wrong) - tested.wrong[d];
  const sizes = facts.sizes.slice(1);
  const trained = state.rank * sum(sizes.map((out, n) => facts.sizes[n] + out));
  const all = sum(sizes.map((out, n) => facts.sizes[n] * out + out));
  return [
    `LoRA ${state.on ? "on" : "off"}`, `rank ${state.rank}`, alphaOf(state),
    `${state.batches} batches of digit ${d}` + (facts.share ? ` with ${percent(facts.share)} others` : ""),
    `${d} wrong ${fromTo(off.wrong[d], now.wrong[d])}`, `others wrong ${fromTo(others(off), others(now))}`,
    `accuracy ${percent(off.accuracy, 1)} → ${percent(now.accuracy, 1)}`,
    `${trained.toLocaleString("en")} trained parameters (${percent(trained / all, 2)} of the base)`,
    `seed ${facts.seed}`,
  ].join(" · ");
}

// ---- the networks ----

// W x + b + s·B(A x). Behind a ReLU most units are zero: their rows of Wᵀ are left out.
function layer(x, [W, b], [A, B] = [], scale = 0) {
  const z = Float32Array.from(b), n = z.length;
  const add = (factor, matrix, k) => { for (let j = 0; j < n; j++) z[j] += factor * matrix[k * n + j]; };
  x.forEach((value, i) => { if (value) add(value, W, i); });
  for (let k = 0; A && k < A.length / x.length; k++) {
    let inner = 0;
    for (let i = 0; i < x.length; i++) inner += A[k * x.length + i] * x[i];
    add(scale * inner, B, k);
  }
  return z;
}

// Ten probabilities for an image, 784 values of ink from 0 to 1.
function forward(ink, adapter, scale) {
  let x = ink.map((value) => (value - facts.mean) / facts.std);
  base.forEach((weights, n) => {
    x = layer(x, weights, adapter?.[n], scale);
    if (n < base.length - 1) x = x.map((value) => Math.max(value, 0));
  });
  const powers = [...x].map((value) => Math.exp(value - Math.max(...x)));
  return powers.map((value) => value / sum(powers));
}

const inkOf = (n) => Float32Array.from(images.subarray(n * 784, (n + 1) * 784), (byte) => byte / 255);

// An image like MNIST's of strokes, each a list of points [x, y]: as `as_mnist` in digit_pad.py.
function asMnist(strokes) {
  const axes = [0, 1].map((axis) => strokes.flat().map((point) => point[axis]));
  const lows = axes.map((values) => Math.min(...values)), highs = axes.map((values) => Math.max(...values));
  const scale = (BOX - PEN) / Math.max(highs[0] - lows[0], highs[1] - lows[1], 1e-6);
  const moved = (all, to) => all.map((stroke) => stroke.map((point) => point.map(to)));
  const inBox = moved(strokes, (v, axis) => (v - (lows[axis] + highs[axis]) / 2) * scale + SIDE / 2);
  const ink = inkOfStrokes(inBox), places = [(i) => i % SIDE, (i) => Math.floor(i / SIDE)];
  const mass = places.map((place) => sum(ink.map((value, i) => value * (place(i) + 0.5))) / sum(ink));
  return inkOfStrokes(moved(inBox, (v, axis) => v + SIDE / 2 - mass[axis]));
}

// Drawn with a round pen, ten times as large, then reduced: each pixel is a mean, weighted by a triangle.
function inkOfStrokes(strokes) {
  const side = SIDE * ZOOM, sheet = new Float32Array(side * side), radius = (PEN * ZOOM) / 2;
  for (const stroke of strokes) stroke.forEach((point, n) => {
    const [ax, ay] = stroke[Math.max(n - 1, 0)].map((v) => v * ZOOM), [bx, by] = point.map((v) => v * ZOOM);
    const length = (bx - ax) ** 2 + (by - ay) ** 2 || 1;
    const from = (a, b) => Math.max(0, Math.floor(Math.min(a, b) - radius));
    const to = (a, b) => Math.min(side - 1, Math.ceil(Math.max(a, b) + radius));
    for (let y = from(ay, by); y <= to(ay, by); y++) for (let x = from(ax, bx); x <= to(ax, bx); x++) {
      const along = Math.min(1, Math.max(0, ((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / length));
      const away = Math.hypot(x - ax - along * (bx - ax), y - ay - along * (by - ay));
      if (away <= radius) sheet[y * side + x] = 1;
    }
  });
  return reduced(reduced(sheet, side), SIDE); // across, then down
}

// The rows of `sheet`, each of 280 values, with 28 values each, as columns: twice gives it back upright.
function reduced(sheet, count) {
  const side = SIDE * ZOOM, result = new Float32Array(SIDE * count);
  for (let n = 0; n < SIDE; n++) for (let row = 0; row < count; row++) {
    let total = 0, weights = 0;
    for (let i = Math.max(0, (n - 0.5) * ZOOM); i < Math.min(side, (n + 1.5) * ZOOM); i++) {
      const weight = 1 - Math.abs(i + 0.5 - (n + 0.5) * ZOOM) / ZOOM;
      total += weight * sheet[row * side + i];
      weights += weight;
    }
    result[n * count + row] = total / weights;
  }
  return result;
}

// ---- the page ----

const SLIDERS = { rank: 1, batches: 100, strength: 1 }; // and where they stand at first
const KINDS = ["repaired", "broken"];
const element = (tag, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
};
const row = (name, cells) => element("tr", {}, element("th", { scope: "row" }, name), ...cells);
const column = (name) => element("th", { scope: "col" }, name);
const head = (corner) => element("tr", {}, corner, ...DIGITS.map(column));

function state() {
  const pairs = Object.keys(SLIDERS).map((name) => [name, facts.options[name][byId(name).value]]);
  const rule = document.querySelector("[name=rule]:checked").value;
  return { on: byId("on").checked, rule, ...Object.fromEntries(pairs) };
}

const labelOf = ({ on }) => `LoRA ${on ? "on" : "off"}`;

// Ten pairs of bars, of the first two of `lines`, and all lines below them in numbers.
function bars(table, top, lines) {
  const bar = (value) => element("i", { style: `height: ${(100 * Math.min(value, top)) / top}%` });
  const [base, now] = Object.values(lines);
  const pairs = DIGITS.map((d) => element("td", {}, element("div", {}, bar(base[d]), bar(now[d]))));
  const inNumbers = ([name, values]) => row(name, values.map((value) => element("td", {}, value)));
  const picture = element("tr", { ariaHidden: "true" }, element("td"), ...pairs);
  table.replaceChildren(head(column("digit")), picture, ...Object.entries(lines).map(inNumbers));
}

// How often each digit was taken for each other one. Shades: of the root, so that rare mistakes are seen too.
function mistakes(table, { confusion }) {
  const most = Math.max(...confusion.map(sum));
  const cell = (digit) => (count, taken) => {
    if (!count || digit === taken) return element("td");
    const style = `background: rgb(0 114 178 / ${0.75 * Math.sqrt(count / most)})`;
    return element("td", { style }, count);
  };
  table.replaceChildren(head(element("td")), ...confusion.map((counts, digit) => row(digit, counts.map(cell(digit)))));
}

function paint(canvas, ink) {
  const pixels = new ImageData(SIDE, SIDE);
  ink.forEach((value, i) => pixels.data.set([...Array(3).fill(255 * (1 - value)), 255], 4 * i));
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  return canvas;
}

const thumbnail = (index) => paint(element("canvas", { width: SIDE, height: SIDE }), inkOf(index));

// At most 12 of the images, spread evenly; each is a button that puts it into the pad.
function strip(kind, { off, on, [kind]: places }, isOn) {
  const step = Math.max(1, (places.length - 1) / (STRIP - 1)), count = places.length.toLocaleString("en");
  byId(`${kind}_title`).textContent = `${kind} ${isOn ? "by LoRA" : "if LoRA were on"}: ${count}`;
  byId(kind).replaceChildren(...places.slice(0, STRIP).map((_, n) => {
    const i = places[Math.round(n * step)], text = `${off.answers[i]} → ${on.answers[i]}`;
    const ariaLabel = `${text}: test image ${i}, a ${labels[i]}. Show it in the pad.`;
    return element("button", { type: "button", ariaLabel, onclick: () => show(i) }, thumbnail(i), text);
  }));
}

function render() {
  const now = state(), found = figures(now), before = found.off.wrong, after = found.now.wrong;
  for (const name in SLIDERS) byId(`${name}_value`).textContent = byId(name).ariaValueText = `${now[name]}`;
  byId("summary").textContent = summarise(now, found);
  const top = Math.max(20, 50 * Math.round(Math.max(...before) / 20)); // of the axis: it stays
  const steps = before.map((wrong, digit) => signed(after[digit] - wrong));
  bars(byId("wrong"), top, { base: before, [labelOf(now)]: after, change: steps });
  mistakes(byId("mistakes_base"), found.off);
  mistakes(byId("mistakes_now"), found.now);
  byId("now_title").textContent = `mistakes, ${labelOf(now)}`;
  for (const kind of KINDS) strip(kind, found, now.on);
  answer();
}

// ---- the digit pad ----

const pad = byId("pad"), pen = pad.getContext("2d");
let shown = null, strokes = [], drawing = false, turn = 0; // shown: the number of the test image, or null

async function answer() {
  const now = state(), mine = ++turn, adapter = now.on && changes(now) ? await adapterOf(now) : null;
  if (mine !== turn) return; // a later move is under way
  const isEmpty = shown === null && !strokes.length;
  const ink = isEmpty ? new Float32Array(784) : shown === null ? asMnist(strokes) : inkOf(shown);
  const both = [null, adapter].map((own) => (isEmpty ? Array(10).fill(0) : forward(ink, own, scaleOf(now))));
  const says = (values) => `${values.indexOf(Math.max(...values))} (${percent(Math.max(...values))})`;
  const what = shown === null ? "your drawing" : `test image ${shown}, a ${labels[shown]}`;
  const text = `${what} · the base says ${says(both[0])} · now ${says(both[1])}`;
  byId("answer").textContent = `${labelOf(now)} · ${isEmpty ? "nothing drawn yet: draw in the box" : text}`;
  const [off, on] = both.map((values) => values.map((value) => Math.round(100 * value)));
  bars(byId("probabilities"), 100, { base: off, [labelOf(now)]: on });
  paint(byId("seen"), ink);
}

function show(number) {
  shown = byId("index").value = number;
  strokes = [];
  pen.imageSmoothingEnabled = false;
  pen.drawImage(thumbnail(number), 0, 0, pad.width, pad.height);
  answer();
}

function clear() {
  shown = null;
  strokes = [];
  byId("index").value = "";
  pen.fillStyle = "white";
  pen.fillRect(0, 0, pad.width, pad.height);
  answer();
}

function next(kind) {
  const places = figures(state())[kind];
  if (places.length) show(places.find((i) => i > (shown ?? -1)) ?? places[0]);
  else byId("answer").textContent = `In this state no test image is ${kind}.`;
}

function drawTo({ clientX, clientY }) {
  const box = pad.getBoundingClientRect(), zoom = pad.width / box.width, stroke = strokes.at(-1);
  const inside = (value) => Math.min(Math.max(0, value * zoom), pad.width); // a stroke may leave the pad
  stroke.push([inside(clientX - box.left), inside(clientY - box.top)]);
  Object.assign(pen, { lineWidth: PEN * ZOOM, lineCap: "round", lineJoin: "round" });
  pen.beginPath();
  pen.moveTo(...stroke.at(-1));
  pen.lineTo(...(stroke.at(-2) ?? stroke.at(-1)));
  pen.stroke();
}

function connect() {
  for (const name in SLIDERS) {
    byId(name).max = facts.options[name].length - 1;
    byId(name).value = Math.max(0, facts.options[name].indexOf(SLIDERS[name]));
  }
  byId("controls").oninput = render;
  byId("index").max = labels.length - 1;
  byId("index").onchange = ({ target: { value, max } }) =>
    value && show(Math.min(Math.max(0, Math.round(value)), max));
  byId("clear").onclick = clear;
  for (const kind of KINDS) byId(`next_${kind}`).onclick = () => next(kind);
  pad.onpointerdown = (event) => {
    if (!event.isPrimary || event.button) return; // a second finger, or another button of the mouse
    if (shown !== null) clear(); // the first stroke takes the test image away
    pad.setPointerCapture(event.pointerId);
    strokes.push([]);
    drawing = true;
    drawTo(event);
  };
  // Else a browser can take a quick stroke for a fling, and ignore the next tap.
  pad.ontouchstart = (event) => event.preventDefault();
  pad.onpointermove = (event) => drawing && event.isPrimary && drawTo(event);
  pad.onpointerup = pad.onpointercancel = (event) => {
    if (!drawing || !event.isPrimary) return;
    drawing = false;
    answer();
  };
}

function start() {
  connect();
  const { repaired } = figures(state());
  show(repaired.find((i) => labels[i] === facts.digit) ?? repaired[0] ?? 0);
  render();
  byId("states").textContent = facts.states.length;
  byId("page").hidden = false;
}

load().then(start).catch((error) => {
  const advice = "Open it in a newer browser: Chrome 93, Firefox 119, Safari 16.4, or later.";
  byId("summary").textContent = `This page cannot be shown (${error}). ${advice}`;
});
