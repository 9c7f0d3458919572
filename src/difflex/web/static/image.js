// The page of an image: its strongest features as maps, and those that fire at a token. What the book knows is shown at once; what
// the model reads is requested by dictionary and step, and read again when the server does not keep it any more.

import { draw, drawAll, shares } from "/static/maps.js";
import { element, tile } from "/static/tile.js";

const byId = (name) => document.getElementById(name);
const [reader, overlay, list, view, choice, chosen] = ["reader", "overlay", "features", "view", "choice", "chosen"].map(byId);
const { site, label, shot, prompt, seed, steps } = reader.dataset;
const scene = prompt === undefined ? {} : { prompt, seed, ...(steps && { steps }) }; // a given image has none
const client = (sessionStorage["difflex-client"] ||= [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join(""));
const HINT = {
  both: "strong in shares of their peaks, and large",
  peak: "strongest in shares of their peaks in the book",
  area: "largest, where they have a fifth of their peaks or more",
};
const ASK = byId("spoken").textContent;
const encoded = (text) => encodeURIComponent(text).replaceAll("%3A", ":");

let reading = null; // what the model has read
let feature = null; // whose map is on the image
let token = null; // [row, column] that is asked about
let pointer = null; // [row, column] under the pointer
let questions = 0; // the latest question: answers to older ones are not shown
const answers = new Map();

const percent = (share) => `${Math.round(100 * share)} %`;
const name = (entry) => entry.label || `feature ${entry.feature}`;
const source = () => reader.querySelector(".frame img")?.getAttribute("src");
const dictionary = () => (reading ? choice.elements.dictionary.value : `${site}/${label}`);
const placeOf = (text) => text.match(/^(.*)\/([^/]*)$/).slice(1);

function address(what, values) {
  if (!reading) return `/api/images/${encoded(site)}/${encoded(label)}/${shot}/${what}?${new URLSearchParams(values)}`;
  return `/api/readings/${reading.key}/${what}?${new URLSearchParams({ ...values, dictionary: dictionary(), step: view.elements.step.value })}`;
}

// The answer to a question; null if a newer question was asked meanwhile.
async function ask(what, values) {
  const number = ++questions;
  for (let tries = 0; tries < 2; tries++) {
    const target = address(what, values);
    if (!answers.has(target)) {
      const reply = await fetch(target).catch(() => null);
      if (number !== questions) return null;
      const content = await reply?.json().catch(() => null);
      if (reply?.status === 404 && reading && tries === 0) {
        if (!(await read())) return null;
        questions = number; // reading again asks nothing else
        continue;
      }
      if (!reply?.ok) return void say(content?.error ?? "The server does not answer.");
      if (answers.size > 60) answers.clear();
      answers.set(target, content);
    }
    return number === questions ? answers.get(target) : null;
  }
}

function say(text, step, all) {
  const [words, bar] = byId("progress").children;
  words.textContent = text;
  bar.hidden = all === undefined;
  if (all) [bar.value, bar.max] = [step, all];
  else bar.removeAttribute("value");
}

// Strongest features.

function row(entry, grid) {
  const canvas = element("canvas", { "data-levels": entry.levels, "data-rows": grid[0], "data-columns": grid[1], "aria-hidden": "true" });
  const { width, height } = reader.querySelector(".frame img");
  const picture = element("span", { class: "picture" }, element("img", { src: source(), alt: "", width, height }), canvas);
  const button = element("button", { type: "button", "aria-pressed": "false", "aria-label": `Show where it fires: ${name(entry.tile)}` }, picture);
  const facts = element("span", { class: "facts" }, `${percent(entry.share)} of peak`, element("br"), `${percent(entry.area)} of image`);
  const { value, share, area } = entry;
  return element("li", { "data-feature": entry.tile.feature, "data-value": value, "data-share": share, "data-area": area }, button, link(entry.tile), facts);
}

function pages(number) {
  const [ofSite, ofLabel] = placeOf(dictionary());
  return {
    page: `/d/${encoded(ofSite)}/${encoded(ofLabel)}/${number}`,
    paint: `/paint?${new URLSearchParams({ site: ofSite, dictionary: ofLabel, feature: number, ...scene })}`,
  };
}

function link(entry) {
  return element("a", { class: "name", href: pages(entry.feature).page }, name(entry));
}

async function strongest() {
  const order = choice.elements.order.value;
  const values = feature === null ? { order } : { order, feature };
  const answer = await ask("features", values);
  if (!answer) return;
  setGrid(answer.grid);
  token = null;
  byId("where").textContent = "Strongest in the image";
  byId("whole").hidden = true;
  byId("spoken").textContent = ASK;
  const rest = answer.total > answer.features.length ? ` of ${answer.total.toLocaleString("en")}` : "";
  byId("count").textContent = `${answer.features.length}${rest} features: ${HINT[order]}. What fires nearly everywhere comes late.${compared()}`;
  list.className = "placed";
  list.replaceChildren(...answer.features.map((entry) => row(entry, answer.grid)));
  drawAll(list);
  choose(list.querySelector(`[data-feature="${feature}"]`) ?? first());
}

// Peaks are those of the book, which may have been made at other noise levels.
function compared() {
  const known = reading?.dictionaries.find((entry) => `${entry.site}/${entry.label}` === dictionary())?.timesteps ?? [];
  const timestep = reading?.timesteps[view.elements.step.value];
  if (!known.length || known.some((other) => Math.abs(other - timestep) < 1)) return "";
  const [first, last] = [known[0], known.at(-1)].map(Math.round);
  return ` The peaks are of t ${first === last ? first : `${first} to ${last}`}.`;
}

function setGrid([rows, columns]) {
  Object.assign(overlay.dataset, { rows, columns });
}

// The feature to begin with: the first one that has a name.
function first() {
  return [...list.children].find((item) => item.querySelector(".name").textContent !== `feature ${item.dataset.feature}`) ?? list.firstElementChild;
}

// Put the map of a feature of the list on the image.
function choose(item) {
  chosen.hidden = !item;
  for (const other of list.querySelectorAll("[aria-pressed]")) other.setAttribute("aria-pressed", String(other.closest("li") === item));
  if (!item) {
    feature = null;
    overlay.dataset.levels = "";
    return drawAgain();
  }
  const { feature: number, value, share, area } = item.dataset;
  feature = Number(number);
  overlay.dataset.levels = item.querySelector("canvas").dataset.levels;
  overlay.dataset.peak = value / share || 0;
  const [title, facts, paint] = chosen.children;
  title.textContent = item.querySelector(".name").textContent;
  title.href = pages(number).page;
  const called = title.textContent === `feature ${number}` ? "" : `feature ${number}: `;
  facts.textContent = `${called}${Number(value).toPrecision(3)} at most, ${percent(share)} of its peak, on ${percent(area)} of the image`;
  if (paint) paint.href = pages(number).paint;
  drawAgain();
}

// A place in the image.

async function askHere() {
  if (!token || !overlay.dataset.rows) return;
  const [ofRow, column] = token;
  drawAgain();
  const answer = await ask("at", { row: ofRow, column });
  if (!answer || !token) return;
  const where = `row ${ofRow}, column ${column}`;
  byId("where").textContent = `At ${where}`;
  byId("whole").hidden = false;
  const shown = answer.total > answer.features.length ? ` These ${answer.features.length} have the largest shares of their peaks.` : "";
  byId("count").textContent = `Features that ${reading ? "" : "are known to "}fire here: ${answer.total || "none"}.${shown}`;
  const [ofSite, ofLabel] = placeOf(dictionary());
  list.className = "placed here";
  list.replaceChildren(
    ...answer.features.map((entry) => {
      const item = tile(entry.tile, answer.grid, `/d/${encoded(ofSite)}/${encoded(ofLabel)}`);
      item.dataset.feature = entry.tile.feature;
      item.querySelector(".facts").textContent = `${entry.value.toPrecision(3)} · ${percent(entry.share)}`;
      const map = element("button", { type: "button", "aria-pressed": "false", "aria-label": `Show where it fires: ${name(entry.tile)}` }, "map");
      item.append(element("span", { class: "more" }, map));
      if ("paint" in reader.dataset) item.lastChild.append(element("a", { href: pages(entry.tile.feature).paint }, "paint"));
      if (entry.tile.feature === feature) map.setAttribute("aria-pressed", "true");
      return item;
    }),
  );
  drawAll(list);
  const few = answer.features.slice(0, 5).map((entry) => `${name(entry.tile)} ${percent(entry.share)}`);
  const more = answer.total > few.length ? `, and ${answer.total - few.length} more` : "";
  byId("spoken").textContent = `Row ${ofRow}, column ${column}: ${few.join(", ") || "no feature"}${more}`;
}

// Of the features at a place: show the map of one without leaving the list.
async function chooseHere(item) {
  const number = Number(item.dataset.feature);
  const answer = await ask("features", { order: choice.elements.order.value, feature: number });
  const entry = answer?.features.find((found) => found.tile.feature === number);
  if (!entry) return;
  choose(row(entry, answer.grid));
  for (const other of list.querySelectorAll("[aria-pressed]")) other.setAttribute("aria-pressed", String(other.closest("li") === item));
}

function tokenAt(event) {
  const { rows, columns } = overlay.dataset;
  if (!rows) return null;
  const box = overlay.getBoundingClientRect();
  const part = (at, start, length, count) => Math.max(0, Math.min(count - 1, Math.floor(((at - start) / length) * count)));
  return [part(event.clientY, box.top, box.height, rows), part(event.clientX, box.left, box.width, columns)];
}

function showValue() {
  const at = pointer ?? token;
  const { columns, levels, peak } = overlay.dataset;
  if (!at || !levels) return void (byId("value").value = "");
  const share = shares(overlay)[at[0] * columns + at[1]];
  byId("value").value = `${(share * peak).toPrecision(3)} at row ${at[0]}, column ${at[1]}`;
}

function drawAgain() {
  if (overlay.dataset.rows) {
    draw(overlay, { style: view.elements.style.value });
    for (const [at, colour, width] of [[pointer, "rgb(255 255 255 / 0.75)", 1], [token, "#f0641e", 3]]) if (at) box(at, colour, width);
  }
  showValue();
}

function box([ofRow, column], colour, width) {
  const pen = overlay.getContext("2d");
  const { rows, columns } = overlay.dataset;
  const [x, y] = [overlay.width / columns, overlay.height / rows];
  const ratio = window.devicePixelRatio || 1;
  pen.globalAlpha = 1;
  for (const [style, line] of [["black", width + 2], [colour, width]]) {
    pen.strokeStyle = style;
    pen.lineWidth = line * ratio;
    pen.strokeRect(column * x, ofRow * y, x, y);
  }
}

let later = 0;
function soon(what, wait) {
  clearTimeout(later);
  later = setTimeout(what, wait);
}

const MOVES = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
overlay.addEventListener("keydown", (event) => {
  const { rows, columns } = overlay.dataset;
  if (!rows) return;
  if (event.key === "Escape" && token) return void strongest();
  if (event.key !== "Enter" && !MOVES[event.key]) return;
  event.preventDefault();
  const [down, right] = token ? (MOVES[event.key] ?? [0, 0]) : [0, 0];
  const [ofRow, column] = token ?? [Math.floor(rows / 2), Math.floor(columns / 2)];
  token = [Math.max(0, Math.min(rows - 1, ofRow + down)), Math.max(0, Math.min(columns - 1, column + right))];
  drawAgain();
  soon(askHere, 120);
});
overlay.addEventListener("click", (event) => {
  token = tokenAt(event);
  if (token) askHere();
});
overlay.addEventListener("pointermove", (event) => {
  pointer = event.pointerType === "mouse" ? tokenAt(event) : null;
  drawAgain();
});
overlay.addEventListener("pointerleave", () => ((pointer = null), drawAgain()));
byId("whole").addEventListener("click", () => strongest());
list.addEventListener("click", (event) => {
  const item = event.target.closest("button")?.closest("li");
  if (item) token ? chooseHere(item) : choose(item);
});

// Reading with the model.

async function read() {
  const own = site ? { dictionary: `${site}/${label}`, shot: Number(shot) } : { prompt, seed: Number(seed), ...(steps && { steps: Number(steps) }) };
  say("Generating the image", 0, null);
  try {
    const reply = await fetch("/api/read", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ client, ...own }) });
    if (!reply.ok) return void say((await reply.json()).error);
    let rest = "", result = null;
    for await (const text of pieces(reply.body.pipeThrough(new TextDecoderStream()).getReader())) {
      const lines = (rest + text).split("\n");
      rest = lines.pop();
      for (const line of lines.map((part) => JSON.parse(part))) {
        if (line.type === "waiting" && line.before) say(`Waiting: ${line.before} before this one`, 0, null);
        if (line.type === "loading") say("Loading the model, which is done once", 0, null);
        if (line.type === "generating") say("Generating the image", 0, null);
        if (line.type === "step") say("Reading what fires", line.step, line.steps);
        if (line.type === "error") say(line.error);
        if (line.type === "cancelled") say("Replaced by a newer request.");
        if (line.type === "reading") result = line;
      }
    }
    if (result) show(result);
    return result;
  } catch {
    say("The server does not answer.");
  }
}

async function* pieces(stream) {
  for (let part = await stream.read(); !part.done; part = await stream.read()) yield part.value;
}

// Take a reading as the source of all answers.
function show(result) {
  const before = reading ? dictionary() : site && `${site}/${label}`;
  const again = reading !== null;
  reading = result;
  answers.clear();
  const names = result.dictionaries.map((entry) => `${entry.site}/${entry.label}`);
  choice.elements.dictionary.replaceChildren(...names.map((text) => element("option", { value: text }, text)));
  if (names.includes(before)) choice.elements.dictionary.value = before;
  say(result.left_out.length ? `${result.left_out.join(", ")}: of text tokens, which have no place in an image.` : "");
  const step = view.elements.step;
  step.max = result.timesteps.length - 1;
  byId("steps").hidden = result.timesteps.length < 2;
  if (!again) step.value = firstStep(result);
  const image = element("img", { src: `/generated/${result.image}`, alt: result.prompt, width: result.width, height: result.height });
  reader.querySelector(".frame").firstElementChild.replaceWith(image);
  byId("known")?.remove();
  if (byId("read")) byId("read").parentElement.hidden = true;
  showStep();
}

// The step to begin with: the one that is most like what the book knows.
function firstStep({ dictionaries, timesteps }) {
  const known = dictionaries.find((entry) => `${entry.site}/${entry.label}` === dictionary())?.timesteps ?? [];
  if (!known.length) return Math.floor(timesteps.length / 2);
  const middle = known[Math.floor(known.length / 2)];
  const distance = timesteps.map((timestep) => Math.abs(timestep - middle));
  return distance.indexOf(Math.min(...distance));
}

function showStep() {
  const { step, at } = view.elements;
  if (reading) at.value = `${Number(step.value) + 1} of ${reading.timesteps.length}, t ${Math.round(reading.timesteps[step.value])}`;
}

byId("read")?.addEventListener("click", async () => (await read()) && strongest());
choice.addEventListener("change", (event) => {
  if (event.target.name === "dictionary" && !reading) return void (location.href = event.target.value);
  if (event.target.name === "dictionary") feature = null;
  if (event.target.name === "dictionary" && token) {
    choose(null);
    return void askHere();
  }
  strongest();
});
view.addEventListener("input", (event) => {
  if (event.target.name !== "step") return drawAgain();
  showStep();
  soon(token ? followHere : strongest, 60);
});

// Another step, while a place is asked about: its list, and the map of the chosen feature.
async function followHere() {
  if (feature !== null) {
    const answer = await ask("features", { order: choice.elements.order.value, feature });
    const entry = answer?.features.find((found) => found.tile.feature === feature);
    if (!entry) return;
    choose(row(entry, answer.grid));
  }
  await askHere();
}

for (const form of [view, choice]) form.addEventListener("submit", (event) => event.preventDefault());
for (const form of document.querySelectorAll(".generate"))
  form.addEventListener("submit", () => {
    for (const field of form.elements) if (field.name && !field.value) field.disabled = true; // keep it out of the address
  });
addEventListener("pageshow", () => { for (const field of document.querySelectorAll(".generate [name]")) field.disabled = false; });
addEventListener("resize", () => (drawAll(list), drawAgain()));

if (site) {
  drawAll(list);
  choose(first());
} else read().then((result) => result && strongest());
