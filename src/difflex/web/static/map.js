// The map of a dictionary: every feature is a point; zoom, move, look at a feature, select a rectangle.

import { draw } from "/static/maps.js";
import { tile } from "/static/tile.js";

const NONE = 255, NOWHERE = 65535, REACH = 16, MOST_ZOOM = 200;
const CONCEPTS = ["#2b7fd4", "#e07b1a", "#2f9e55", "#d2413f", "#8f63c7", "#a0714f", "#e26fb8", "#8c8c1f", "#17a2b0", "#5c6ad6"].map(parse);
const SCALE = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [240, 220, 50]];
const BUCKETS = 24;
const CELLS = 128;

const map = document.getElementById("map");
const canvas = map.querySelector("canvas");
const shown = document.getElementById("shown");
const colour = document.getElementById("colour");
const legend = document.getElementById("legend");
const place = map.dataset.place;
const data = `/api/dictionaries${place.slice(2)}`;
const marked = Number(map.dataset.marked);

let answer, places, levels, order = [], cells;
let view = { x: 0.5, y: 0.5, zoom: 1 };
let near = marked, box = null, tiles = new Map();

function parse(hex) {
  return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
}
const css = (name) => getComputedStyle(map).getPropertyValue(name).trim();

async function get(address) {
  const reply = await fetch(address);
  if (!reply.ok) throw new Error((await reply.json()).error);
  return reply;
}

async function begin() {
  const progress = document.getElementById("progress");
  try {
    for (;;) {
      answer = await (await get(`${data}/map`)).json();
      progress.querySelector("progress").value = answer.done;
      if (answer.done >= 1) break;
      await new Promise((next) => setTimeout(next, 400));
    }
    places = new Uint16Array(await (await get(`${data}/map/places`)).arrayBuffer());
    await recolour();
  } catch (error) {
    progress.textContent = error.message;
    return;
  }
  progress.hidden = true;
  map.dataset.ready = "true";
  const left = answer.features - answer.placed;
  document.getElementById("placed").textContent = left ? `${left.toLocaleString("en")} features without neighbours are not on it.` : "";
  index();
  paint();
  if (marked >= 0 && marked < answer.features) show(marked);
}

// Features by cell of a grid, to find the one under the pointer.
function index() {
  cells = new Map();
  for (let i = 0; i < answer.features; i++) {
    if (places[2 * i] === NOWHERE) continue;
    const cell = ((places[2 * i] * CELLS) >> 16) * CELLS + ((places[2 * i + 1] * CELLS) >> 16);
    if (!cells.has(cell)) cells.set(cell, []);
    cells.get(cell).push(i);
  }
}

async function recolour() {
  levels = new Uint8Array(await (await get(`${data}/map/colours/${colour.value}`)).arrayBuffer());
  const buckets = Array.from({ length: BUCKETS + 1 }, () => []);
  const categorical = colour.value === "concept";
  for (let i = 0; i < levels.length; i++)
    if (places[2 * i] !== NOWHERE)
      buckets[levels[i] === NONE ? 0 : 1 + (categorical ? Math.min(levels[i], BUCKETS - 1) : Math.floor((levels[i] * BUCKETS) / 255))].push(i);
  order = buckets;
  explain();
}

// Red, green and blue.
function colourOf(bucket) {
  if (bucket === 0) return parse(css("--quiet"));
  if (colour.value === "concept") return CONCEPTS[bucket - 1] ?? parse(css("--quiet"));
  const at = ((bucket - 0.5) / BUCKETS) * (SCALE.length - 1);
  const [low, high] = [SCALE[Math.floor(at)], SCALE[Math.ceil(at)]];
  return low.map((value, i) => Math.round(value + (high[i] - value) * (at % 1)));
}

function explain() {
  legend.replaceChildren();
  const figure = (value) => Number(value.toPrecision(3)).toLocaleString("en", { maximumSignificantDigits: 3 });
  const swatch = (bucket) => {
    const node = document.createElement("i");
    node.style.background = `rgb(${colourOf(bucket)})`;
    return node;
  };
  if (colour.value === "concept") {
    answer.legend.forEach((concept, number) => {
      const link = document.createElement("a");
      link.href = `${place}?concept=${encodeURIComponent(concept)}`;
      link.append(swatch(number + 1), concept);
      legend.append(link, " ");
    });
    if (!answer.legend.length) legend.textContent = "No concepts are known: difflex concepts finds out which features detect one.";
    return;
  }
  const scale = answer.columns.find((entry) => entry.column === colour.value);
  if (!scale) return void (legend.textContent = "No feature has a value.");
  const bar = document.createElement("span");
  bar.className = "scale";
  for (let i = 1; i <= BUCKETS; i++) bar.append(swatch(i));
  legend.append(figure(scale.low), " ", bar, " ", figure(scale.high), scale.is_logarithmic ? ", on a logarithmic scale" : "");
}

// From the map, between 0 and 1, to the canvas in pixels of the page, and back.
function frame() {
  const width = canvas.clientWidth, height = canvas.clientHeight;
  const side = Math.min(width, height) * 0.94 * view.zoom;
  return { width, height, side, left: width / 2 - view.x * side, top: height / 2 - view.y * side };
}
const onCanvas = (f, feature) => [f.left + (places[2 * feature] / (NOWHERE - 1)) * f.side, f.top + (places[2 * feature + 1] / (NOWHERE - 1)) * f.side];
const onMap = (f, x, y) => [(x - f.left) / f.side, (y - f.top) / f.side];

let waiting = false;
function paint() {
  if (waiting || !places) return;
  waiting = true;
  requestAnimationFrame(() => ((waiting = false), paintNow()));
}

function paintNow() {
  const f = frame(), ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(f.width * ratio);
  canvas.height = Math.round(f.height * ratio);
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  const radius = Math.min(7, Math.max(0.8, 120 / Math.sqrt(answer.placed)) * Math.sqrt(view.zoom));
  if (radius < 2) squares(pen, f, ratio, radius);
  else circles(pen, f, radius);
  names(pen, f);
  if (near >= 0 && near < answer.features && places[2 * near] !== NOWHERE) {
    const [x, y] = onCanvas(f, near);
    pen.strokeStyle = css("--mark");
    pen.lineWidth = 2.5;
    pen.beginPath();
    pen.arc(x, y, radius + 4, 0, 7);
    pen.stroke();
  }
  if (document.activeElement === canvas && canvas.matches(":focus-visible")) {
    pen.strokeStyle = css("--mark");
    pen.lineWidth = 1;
    pen.strokeRect(f.width / 2 - REACH / 2, f.height / 2 - REACH / 2, REACH, REACH);
  }
  if (box) {
    pen.strokeStyle = css("--mark");
    pen.lineWidth = 1.5;
    pen.strokeRect(box[0], box[1], box[2] - box[0], box[3] - box[1]);
  }
}

// Many small points: far quicker as pixels than as shapes.
function squares(pen, f, ratio, radius) {
  const image = pen.createImageData(canvas.width, canvas.height), pixels = new Uint32Array(image.data.buffer);
  const size = Math.max(1, Math.round(2 * radius * ratio));
  order.forEach((features, bucket) => {
    const [red, green, blue] = colourOf(bucket), value = (255 << 24) | (blue << 16) | (green << 8) | red;
    for (const feature of features) {
      const [x, y] = onCanvas(f, feature).map((at) => Math.round(at * ratio - size / 2));
      if (x < 0 || y < 0 || x + size > image.width || y + size > image.height) continue;
      for (let row = 0; row < size; row++) pixels.fill(value, (y + row) * image.width + x, (y + row) * image.width + x + size);
    }
  });
  pen.putImageData(image, 0, 0);
}

function circles(pen, f, radius) {
  order.forEach((features, bucket) => {
    pen.fillStyle = `rgb(${colourOf(bucket)})`;
    pen.beginPath();
    for (const feature of features) {
      const [x, y] = onCanvas(f, feature);
      if (x < -radius || y < -radius || x > f.width + radius || y > f.height + radius) continue;
      pen.moveTo(x + radius, y);
      pen.arc(x, y, radius, 0, 7);
    }
    pen.fill();
  });
}

// The names of concepts, the best detected first, where they do not cover each other.
function names(pen, f) {
  const taken = [];
  pen.font = "600 13px system-ui, sans-serif";
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  pen.lineJoin = "round";
  for (const { concept, x, y } of answer.concepts) {
    const at = [f.left + (x / (NOWHERE - 1)) * f.side, f.top + (y / (NOWHERE - 1)) * f.side];
    const half = pen.measureText(concept).width / 2 + 3;
    if (at[0] < half || at[1] < 10 || at[0] > f.width - half || at[1] > f.height - 10) continue;
    if (taken.some((other) => Math.abs(other[0] - at[0]) < other[2] + half && Math.abs(other[1] - at[1]) < 18)) continue;
    taken.push([...at, half]);
    pen.lineWidth = 4;
    pen.strokeStyle = css("--paper");
    pen.strokeText(concept, ...at);
    pen.fillStyle = css("--ink");
    pen.fillText(concept, ...at);
  }
}

function nearest(x, y) {
  const f = frame(), [u, v] = onMap(f, x, y), reach = REACH / f.side;
  const cell = (value) => Math.max(0, Math.min(CELLS - 1, Math.floor(value * CELLS)));
  let best = -1, distance = REACH;
  for (let i = cell(u - reach); i <= cell(u + reach); i++)
    for (let j = cell(v - reach); j <= cell(v + reach); j++)
      for (const feature of cells.get(i * CELLS + j) ?? []) {
        const [a, b] = onCanvas(f, feature);
        const far = Math.hypot(a - x, b - y);
        if (far < distance) (best = feature), (distance = far);
      }
  return best;
}

async function show(feature) {
  if (feature === near && !shown.hidden) return;
  near = feature;
  canvas.style.cursor = feature >= 0 ? "pointer" : "";
  paint();
  if (feature < 0) return void (shown.hidden = true);
  if (!tiles.has(feature)) {
    if (tiles.size > 500) tiles.clear();
    tiles.set(feature, get(`${data}/features?limit=1&sort=feature&where=feature=${feature}`).then((reply) => reply.json()));
  }
  const { tiles: [entry], grid } = await tiles.get(feature).catch(() => ({ tiles: [] }));
  if (near !== feature || !entry) return;
  const content = tile(entry, grid, place).firstChild;
  shown.href = content.href;
  shown.replaceChildren(...content.childNodes);
  shown.hidden = false;
  const drawn = shown.querySelector("canvas");
  if (drawn) draw(drawn);
}

function zoom(factor, x = canvas.clientWidth / 2, y = canvas.clientHeight / 2) {
  const before = onMap(frame(), x, y);
  view.zoom = Math.max(0.8, Math.min(MOST_ZOOM, view.zoom * factor));
  const after = onMap(frame(), x, y);
  move(before[0] - after[0], before[1] - after[1]);
}

function move(x, y) {
  view.x = Math.max(-0.2, Math.min(1.2, view.x + x));
  view.y = Math.max(-0.2, Math.min(1.2, view.y + y));
  paint();
}

function choose() {
  const f = frame();
  const [a, b] = onMap(f, Math.min(box[0], box[2]), Math.min(box[1], box[3]));
  const [c, d] = onMap(f, Math.max(box[0], box[2]), Math.max(box[1], box[3]));
  const part = [a, b, c, d].map((value) => Number(Math.max(0, Math.min(1, value)).toFixed(4)));
  if (part[0] < part[2] && part[1] < part[3]) location.href = `${place}?within=${part}`;
  box = null;
  paint();
}

const pointers = new Map(); // number of a pointer -> where it is
let moved = 0;
const at = (event) => {
  const frame = canvas.getBoundingClientRect();
  return [event.clientX - frame.left, event.clientY - frame.top];
};

canvas.addEventListener("pointerdown", (event) => {
  if (!places || event.button) return;
  canvas.setPointerCapture(event.pointerId);
  pointers.set(event.pointerId, at(event));
  moved = 0;
  const selects = event.shiftKey || document.querySelector("[name=mode]:checked").value === "select";
  box = selects && pointers.size === 1 ? [...at(event), ...at(event)] : null;
});

canvas.addEventListener("pointermove", (event) => {
  if (!places) return;
  const here = at(event), before = pointers.get(event.pointerId);
  if (!before) {
    if (event.pointerType === "mouse") show(nearest(...here));
    return;
  }
  moved += Math.hypot(here[0] - before[0], here[1] - before[1]);
  const other = [...pointers].find(([number]) => number !== event.pointerId)?.[1];
  pointers.set(event.pointerId, here);
  if (other) {
    const spread = (point) => Math.hypot(point[0] - other[0], point[1] - other[1]) || 1;
    zoom(spread(here) / spread(before), (here[0] + other[0]) / 2, (here[1] + other[1]) / 2);
  } else if (box) {
    box = [box[0], box[1], ...here];
    paint();
  } else {
    const { side } = frame();
    move((before[0] - here[0]) / side, (before[1] - here[1]) / side);
  }
});

function release(event) {
  if (!pointers.delete(event.pointerId)) return;
  if (event.type === "pointercancel") return void ((box = null), paint());
  if (moved > 6) return void (box && choose());
  box = null;
  const feature = nearest(...at(event));
  if (event.pointerType === "mouse" && feature >= 0) location.href = `${place}/${feature}`;
  else show(feature);
}
canvas.addEventListener("pointerup", release);
canvas.addEventListener("pointercancel", release);
canvas.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && !event.relatedTarget?.closest?.("#shown") && show(-1));
canvas.addEventListener("wheel", (event) => {
  event.preventDefault();
  zoom(Math.exp(-event.deltaY * 0.002), ...at(event));
}, { passive: false });
canvas.addEventListener("keydown", (event) => {
  const step = 0.1 / view.zoom;
  const keys = {
    ArrowLeft: () => move(-step, 0), ArrowRight: () => move(step, 0), ArrowUp: () => move(0, -step), ArrowDown: () => move(0, step),
    "+": () => zoom(1.4), "=": () => zoom(1.4), "-": () => zoom(1 / 1.4), 0: () => fit(),
    Enter: () => near >= 0 && (location.href = `${place}/${near}`),
  };
  if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in keys) || !places) return;
  event.preventDefault();
  keys[event.key]();
  if (event.key !== "Enter") show(nearest(canvas.clientWidth / 2, canvas.clientHeight / 2));
});
canvas.addEventListener("focus", paint);
canvas.addEventListener("blur", paint);

function fit() {
  view = { x: 0.5, y: 0.5, zoom: 1 };
  paint();
}
document.getElementById("in").addEventListener("click", () => zoom(1.6));
document.getElementById("out").addEventListener("click", () => zoom(1 / 1.6));
document.getElementById("fit").addEventListener("click", fit);
colour.addEventListener("change", async () => {
  history.replaceState(null, "", `?colour=${colour.value}`);
  if (places) await recolour().then(paint);
});
addEventListener("resize", paint);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => places && (explain(), paint()));
begin();
