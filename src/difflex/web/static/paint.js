// The page to paint on: each change is a state of the history; images are generated for the state that is shown.

import { bytes, drawAll } from "/static/maps.js";
import { MaskCanvas, maskOf } from "/static/paint-canvas.js";
import { Cards } from "/static/paint-cards.js";
import { addressOf, finder, thumbnail } from "/static/paint-find.js";
import { History, START, activeEdits, factorsOf, keyOf, newEdit, packed, requestOf, seedsOf, stateOfRecord, unpacked } from "/static/paint-state.js";
import { events, getJson } from "/static/paint-stream.js";
import { View, urlOf } from "/static/paint-view.js";
import { element } from "/static/tile.js";

const PAUSE = 400, SLOW = 5000, KEPT = 80, OFFERED = 8, MOST_EDITS = 16;
const $ = (id) => document.getElementById(id);
const scene = $("scene").elements;
const files = new Map(JSON.parse(sessionStorage.getItem("difflex-files") || "[]")); // of generated images, by what they depend on
let settings, history, mask, cards, view;
let selected = null; // the id of an edit
let cell = { row: 0, factor: 1 }; // which image of the grid is shown
let shown = [null, null];
let running = null; // the generation that goes on
let notice = ""; // what else to say when images were generated
let isDamaged = false; // what the address holds
let timer = 0;

function say(sentence, isProblem = false) {
  $("status").textContent = sentence;
  $("status").classList.toggle("wrong", isProblem);
}

const note = (sentence) => ($("tools-note").textContent = sentence);

// Changes.

function commit(changes, kind = null) {
  history.add(Object.freeze({ ...history.state, ...changes }), kind);
  notice = "";
  note("");
  render();
  schedule();
}

function changeEdit(id, changes, kind) {
  commit({ edits: history.state.edits.map((edit) => (edit.id === id ? { ...edit, ...changes } : edit)) }, kind);
}

function act(id, action) {
  const edits = history.state.edits, place = edits.findIndex((edit) => edit.id === id);
  if (place < 0) return;
  if (action === "shown") return changeEdit(id, { muted: !edits[place].muted });
  if (action === "remove") return commit({ edits: edits.filter((edit) => edit.id !== id) });
  if (action === "copy") return add(newEdit({ ...edits[place], id: newEdit().id }));
  if (selected !== id) {
    selected = id;
    render();
  }
}

function add(edit, changes = {}) {
  const edits = history.state.edits;
  if (edits.length >= MOST_EDITS) return say(`${MOST_EDITS} edits are the most at once. Remove one first.`, true);
  selected = edit.id;
  commit({ ...changes, edits: [...edits, edit] });
}

function travel(by) {
  history.move(by);
  render();
  schedule();
}

const twinOf = (edit) => getJson(`${addressOf(edit.site, edit.dictionary)}/${edit.features[0]}`);

const rightHalf = (rows, columns) => maskOf(Array.from({ length: rows * columns }, (_, token) => (token % columns < columns / 2 ? 0 : 255)), rows, columns);

// Paint with what was found: at its default strength, and without a prompt on an image in which it is silent.
async function choose({ site, label, tile, contrast = null, strength, prompt }, isPainted = false) {
  try {
    if (contrast !== null) return add(newEdit({ site, dictionary: null, features: [], contrast }));
    const edit = newEdit({ site, dictionary: label, features: [tile.feature], contrast: null });
    if (isPainted) Object.assign(edit, { region: "mask", mask: rightHalf(...gridOf(edit)) });
    const twin = strength === undefined || !(prompt || history.state.prompt) ? await twinOf(edit) : null;
    edit.strength = strength ?? (Number(twin.figures.strength?.toFixed(1)) || 1);
    const isBlank = history.state.edits.length === 0 && (prompt || !history.state.prompt);
    const other = prompt || twin?.examples.find((example) => example.kind === "silent" && example.prompt)?.prompt || history.state.prompt;
    add(edit, isBlank ? { prompt: other } : {});
  } catch (error) {
    say(error.message, true);
  }
}

// What is shown.

function gridOf(edit) {
  if (edit.site.includes(":text")) return null;
  if (edit.mask) return [edit.mask.rows, edit.mask.columns];
  const grids = settings.dictionaries.filter((entry) => entry.grid);
  const own = grids.find((entry) => entry.site === edit.site && entry.label === edit.dictionary) ?? grids.find((entry) => entry.site === edit.site);
  return (own ?? grids[0])?.grid ?? [16, 16];
}

function set(field, value) {
  if (field.value !== String(value)) field.value = value;
}

function render() {
  const state = history.state;
  if (!state.edits.some((edit) => edit.id === selected)) selected = state.edits.at(-1)?.id ?? null;
  set(scene.prompt, state.prompt);
  set(scene.seed, state.seed);
  set(scene.count, state.count);
  set(scene.steps, state.steps ?? "");
  scene.strip.checked = state.strip;
  $("undo").disabled = !history.canMove(-1);
  $("redo").disabled = !history.canMove(1);
  const steps = state.steps ?? settings.steps ?? 100;
  cards.update(state.edits, (edit) => ({ isSelected: edit.id === selected, steps, canPaint: gridOf(edit) !== null }));
  renderMask(state.edits.find((edit) => edit.id === selected));
  renderImages();
  writeAddress();
}

function renderMask(edit) {
  const grid = edit?.region === "mask" ? gridOf(edit) : null;
  $("easel").classList.toggle("painting", grid !== null);
  $("tools").hidden = grid === null;
  if (grid) {
    const most = Math.max(2, Math.ceil(Math.max(...grid) / 2));
    if (Number($("brush-size").max) !== most) Object.assign($("brush-size"), { max: most, value: Math.max(1, Math.round(Math.max(...grid) / 10)) });
    $("use-map").disabled = edit.dictionary === null;
    readTools();
  }
  mask.show(grid, edit?.mask ?? null);
}

function readTools() {
  mask.tool = document.querySelector("[name=tool]:checked").value;
  mask.size = Number($("brush-size").value);
  mask.opacity = Number($("brush-opacity").value) / 100;
  $("brush-size").nextElementSibling.value = mask.size;
  $("brush-opacity").nextElementSibling.value = `${$("brush-opacity").value} %`;
}

// The seed and the factor of the image that is shown; a factor of null is the unedited one.
function current() {
  const state = history.state, factors = factorsOf(state), seeds = seedsOf(state);
  const factor = cell.factor === null || factors.includes(cell.factor) ? cell.factor : 1;
  return { seed: seeds[Math.min(cell.row, seeds.length - 1)], factor };
}

const fileOf = (seed, factor) => files.get(keyOf(history.state, seed, factor)) ?? null;

function renderImages() {
  const state = history.state, active = activeEdits(state), { seed, factor } = current();
  const before = fileOf(seed, null), after = active.length ? fileOf(seed, factor) : null;
  const isStale = [before === null, active.length > 0 && after === null];
  shown = [before ?? shown[0], active.length ? after ?? shown[1] : null];
  view.show(...shown);
  $("unedited").classList.toggle("stale", isStale[0]);
  $("edited").classList.toggle("stale", isStale[1]);
  $("download-edit").disabled = active.length === 0;
  $("download-image").disabled = (active.length ? after : before) === null;
  const signed = (value) => `${Number(value.toPrecision(3))}`.replace("-", "−");
  const nameOf = (value) => (active.length === 1 && active[0].operation !== "ablate" ? signed(value * active[0].strength) : value === 1 ? "edited" : `× ${signed(value)}`);
  view.showGrid({ seeds: seedsOf(state), factors: active.length ? factorsOf(state) : [], selected: { seed, factor: active.length ? factor : null }, nameOf, fileOf });
}

let writing = 0;
function writeAddress() {
  clearTimeout(writing);
  writing = setTimeout(writeNow, 100);
}

async function writeNow() {
  const state = history.state, text = await packed(state);
  if (state === history.state) window.history.replaceState(null, "", `${location.pathname}#${text}`);
}

// Generating.

function schedule() {
  clearTimeout(timer);
  if (missing().length === 0) return running?.abort();
  if ($("auto").checked) timer = setTimeout(generate, PAUSE);
  else say("Press Generate to see this.");
}

function missing() {
  const state = history.state, factors = activeEdits(state).length ? factorsOf(state) : [];
  if (!state.prompt && !state.edits.length) return [];
  return seedsOf(state).flatMap((seed) => [null, ...factors].map((factor) => [seed, factor])).filter(([seed, factor]) => !files.has(keyOf(state, seed, factor)));
}

function keep(state, event) {
  const key = keyOf(state, event.seed, event.factor);
  files.delete(key);
  files.set(key, event.image);
  try {
    sessionStorage.setItem("difflex-files", JSON.stringify([...files].slice(-KEPT)));
  } catch {
    sessionStorage.removeItem("difflex-files"); // it is full: images are generated again after a reload
  }
}

async function generate() {
  clearTimeout(timer);
  running?.abort();
  const own = (running = new AbortController()), state = history.state, wanted = missing();
  const unique = (values) => [...new Set(values)].filter((value) => value !== null);
  const factors = wanted.length ? unique(wanted.map(([, factor]) => factor)) : activeEdits(state).length ? factorsOf(state) : [];
  factors.sort((one, two) => (two === current().factor) - (one === current().factor)); // what is shown comes first
  const seeds = wanted.length ? unique(wanted.map(([seed]) => seed)) : seedsOf(state);
  const request = requestOf(state, seeds, factors.length ? factors : [1]);
  if (!factors.length) request.edits = [];
  const total = seeds.length * (factors.length + 1);
  const bar = (value) => ($("progress").value = value);
  let made = 0, started = performance.now(), first = null, hasWaited = false;
  bar(0);
  $("cancel").disabled = false;
  say("Generating …");
  try {
    for await (const event of events("/api/generate", request, { signal: own.signal })) {
      if (event.type === "waiting" && event.before) [hasWaited] = [true, say(`${event.before === 1 ? "One request is" : `${event.before} requests are`} before yours.`)];
      if (event.type === "loading") [hasWaited] = [true, say("The model is being loaded, once. This may take a while.")];
      if (event.type === "step") {
        if (hasWaited) [hasWaited, started] = [false, performance.now()];
        if ($("status").textContent !== "Generating …") say("Generating …");
        bar((made + event.step / event.steps) / total);
      }
      if (event.type === "image") {
        bar(++made / total);
        keep(state, event);
        renderImages();
        if (event.factor !== null || !factors.length) first ??= performance.now() - started;
      }
    }
    finish(performance.now() - started, first ?? 0, made);
  } catch (error) {
    if (running !== own) return;
    say(error.name === "AbortError" ? "Cancelled." : error.message, error.name !== "AbortError");
    bar(0);
  } finally {
    if (running === own) {
      $("cancel").disabled = true;
      running = null;
    }
  }
}

// Without a quick first image each change would keep the model busy for nothing.
function finish(time, first, made) {
  const seconds = `${(time / 1000).toFixed(1)} s`, images = made === 1 ? "One image" : `${made} images`;
  $("progress").value = 0;
  if (first <= SLOW || !$("auto").checked) return say(`${images} in ${seconds}.${notice}`);
  setAuto(false);
  say(`${images} took ${seconds}. From now on images are generated when you press Generate.${notice}`);
}

function setAuto(isOn) {
  $("auto").checked = isOn;
  localStorage.setItem(`difflex-auto ${settings.model}`, isOn);
}

// The server has an image no more: generate it again.
function forget(lost) {
  for (const [key, file] of files) if (lost.includes(file)) files.delete(key);
  shown = [null, null];
  view.show(null, null);
  schedule();
}

// Files and links.

function save(address, name) {
  const link = element("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
}

const nameOfFile = (end) => `${history.state.prompt.replace(/[^a-z0-9]+/gi, "-").slice(0, 40) || "image"}-${current().seed}.${end}`;

async function downloadEdit() {
  const { seed, factor } = current();
  const { seeds, factors, edits, ...request } = requestOf(history.state, [], []);
  const scaled = edits.map((edit) => ({ ...edit, strength: edit.strength * (factor ?? 1) }));
  try {
    for await (const event of events("/api/record", { ...request, seed, edits: scaled }, { name: "-record" })) {
      if (event.type !== "record") continue;
      const address = URL.createObjectURL(new Blob([event.record], { type: "application/json" }));
      save(address, nameOfFile("json"));
      setTimeout(() => URL.revokeObjectURL(address), 10_000);
      say("Saved. difflex steer STUDY --replay FILE generates the same image.");
    }
  } catch (error) {
    say(error.message, true);
  }
}

async function openFile(file) {
  try {
    let record;
    try {
      record = JSON.parse(await file.text());
    } catch {
      throw new Error(`${file.name} is not a JSON file. Open one that Download edit or difflex steer --record wrote.`);
    }
    commit(stateOfRecord(record, settings));
    const [height, width] = record.shot.pixels ?? [], [rows, columns] = settings.pixels ?? [height, width];
    if (height !== rows || width !== columns) notice = ` The edit was made at ${height} x ${width} pixels; here images have ${rows} x ${columns}.`;
  } catch (error) {
    say(error.message, true);
  }
}

async function copyLink() {
  await writeNow();
  const isCopied = await navigator.clipboard?.writeText(location.href).then(() => true, () => false);
  say(isCopied ? "The link holds all that you see here, for everybody who reaches this server." : "The address of this page is the link: copy it from the address bar.");
}

// Where a feature fires in the unedited image at its last step; null where it does not fire.
async function ownMap(edit) {
  const state = history.state, name = `${edit.site}/${edit.dictionary}`;
  const request = { prompt: state.prompt, seed: current().seed, dictionaries: [name], ...(state.steps === null ? {} : { steps: state.steps }) };
  let reading = null;
  for await (const event of events("/api/read", request, { name: "-read" })) if (event.type === "reading") reading = event;
  const place = new URLSearchParams({ dictionary: name, step: reading.timesteps.length - 1, feature: edit.features[0] });
  const { features, grid } = await getJson(`/api/readings/${reading.key}/features?${place}`);
  const levels = bytes(features.find((entry) => entry.tile.feature === edit.features[0])?.levels ?? "");
  return levels.some(Boolean) ? { levels, grid } : null;
}

// Take as the mask where a feature fires in the image, or in its strongest one; its largest value is edited in full.
async function useMap() {
  const edit = history.state.edits.find((own) => own.id === selected);
  try {
    let map = await ownMap(edit), where = "in this image";
    if (map === null) {
      const twin = await twinOf(edit), top = twin.examples.find((example) => example.kind === "top" && example.levels);
      if (!top || !twin.grid) return say("The book holds no image in which it fires.", true);
      [map, where] = [{ levels: bytes(top.levels), grid: twin.grid }, "in its strongest image; in this one it is silent"];
    }
    const most = Math.max(...map.levels);
    changeEdit(edit.id, { mask: maskOf(map.levels.map((level) => Math.round((255 * level) / most)), ...map.grid) });
    note(`This is where it fires ${where}. Move drags it to another place.`);
  } catch (error) {
    say(error.message, true);
  }
}

// Suggestions.

async function offer() {
  const [first] = settings.dictionaries;
  let offers = settings.suggestions.map((entry) => ({ ...entry, grid: gridOf({ site: entry.site, dictionary: entry.label }), name: entry.concept, note: `shows in ${Math.round(100 * entry.gain)} % more images` }));
  if (!offers.length && first) {
    const { tiles, grid } = await getJson(`${addressOf(first.site, first.label)}?sort=ap&limit=${OFFERED}`);
    offers = tiles.map((tile) => ({ ...first, tile, grid, name: tile.label || `feature ${tile.feature}`, note: tile.ap === null ? "" : `AP ${tile.ap.toFixed(2)}` }));
  }
  $("offers").replaceChildren(
    ...offers.slice(0, OFFERED).map((entry) => {
      const button = element("button", { type: "button", class: "offer" }, thumbnail(entry.tile, entry.grid), element("span", { class: "name" }, entry.name), element("span", { class: "facts" }, entry.note));
      button.addEventListener("click", () => (choose(entry, true), $("unedited").scrollIntoView({ block: "nearest" })));
      return element("li", {}, button);
    }),
  );
  $("suggestions").hidden = !offers.length;
  drawAll($("offers"));
}

// The start.

async function startState() {
  const query = new URLSearchParams(location.search), text = location.hash.slice(1);
  if (text) {
    try {
      return await unpacked(text);
    } catch {
      isDamaged = true;
      say("The link is damaged, so the page begins without its edits.", true);
    }
  }
  const number = (name, other) => (/^\d{1,15}$/.test(query.get(name) ?? "") ? Number(query.get(name)) : other);
  const own = query.get("prompt"), isWith = query.has("feature") && query.has("site");
  return Object.freeze({ ...START, prompt: own ?? (isWith ? "" : settings.suggestions[0]?.prompt ?? ""), seed: number("seed", 0), steps: number("steps", null) });
}

async function paintWithQuery() {
  const query = new URLSearchParams(location.search);
  if (!query.has("feature") || location.hash) return;
  await choose({ site: query.get("site"), label: query.get("dictionary"), tile: { feature: Number(query.get("feature")) } });
}

function listen() {
  $("scene").addEventListener("submit", (event) => (event.preventDefault(), generate()));
  scene.prompt.addEventListener("input", () => commit({ prompt: scene.prompt.value }, "prompt"));
  scene.seed.addEventListener("input", () => scene.seed.validity.valid && scene.seed.value !== "" && commit({ seed: Number(scene.seed.value) }, "seed"));
  scene.steps.addEventListener("input", () => scene.steps.validity.valid && commit({ steps: scene.steps.value === "" ? null : Number(scene.steps.value) }, "steps"));
  scene.count.addEventListener("change", () => commit({ count: Number(scene.count.value) }));
  scene.strip.addEventListener("change", () => commit({ strip: scene.strip.checked }));
  $("die").addEventListener("click", () => commit({ seed: crypto.getRandomValues(new Uint32Array(1))[0] % 100_000 }));
  $("auto").addEventListener("change", () => (setAuto($("auto").checked), schedule()));
  $("cancel").addEventListener("click", () => (clearTimeout(timer), running?.abort()));
  $("undo").addEventListener("click", () => travel(-1));
  $("redo").addEventListener("click", () => travel(1));
  $("open").addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", () => ($("file").files[0] && openFile($("file").files[0]), ($("file").value = "")));
  $("download-edit").addEventListener("click", downloadEdit);
  $("download-image").addEventListener("click", () => save(urlOf(fileOf(current().seed, activeEdits(history.state).length ? current().factor : null)), nameOfFile("png")));
  $("copy-link").addEventListener("click", copyLink);
  $("larger").addEventListener("click", () => {
    $("larger").setAttribute("aria-pressed", $("easel").classList.toggle("enlarged"));
    $("unedited").scrollIntoView({ block: "nearest" });
    mask.draw();
  });
  $("tools").addEventListener("input", readTools);
  $("use-map").addEventListener("click", useMap);
  $("clear").addEventListener("click", () => mask.change((levels) => new Uint8Array(levels.length)));
  $("invert").addEventListener("click", () => mask.change((levels) => levels.map((level) => 255 - level)));
  document.addEventListener("keydown", (event) => {
    const tool = { b: "brush", e: "eraser", m: "move" }[event.key];
    if (tool && event.target === $("mask")) return document.querySelector(`[name=tool][value=${tool}]`).click();
    if (!(event.ctrlKey || event.metaKey) || event.altKey || !["z", "y"].includes(event.key.toLowerCase())) return;
    event.preventDefault();
    travel(event.shiftKey || event.key.toLowerCase() === "y" ? 1 : -1);
  });
  document.addEventListener("dragover", (event) => event.dataTransfer.types.includes("Files") && event.preventDefault());
  document.addEventListener("drop", (event) => event.dataTransfer.files[0] && (event.preventDefault(), openFile(event.dataTransfer.files[0])));
  addEventListener("hashchange", async () => {
    try {
      commit(await unpacked(location.hash.slice(1)));
    } catch {
      say("The link is damaged.", true);
    }
  });
}

async function start() {
  settings = await getJson("/api/paint");
  history = new History(await startState());
  $("auto").checked = localStorage.getItem(`difflex-auto ${settings.model}`) !== "false";
  mask = new MaskCanvas($("mask"), (painted) => changeEdit(selected, { mask: painted }), note);
  cards = new Cards($("cards"), changeEdit, act);
  view = new View(forget, (seed, factor) => ((cell = { row: seed - history.state.seed, factor }), renderImages()));
  finder($("find"), $("found"), settings, choose);
  listen();
  const isNew = !location.hash && !location.search;
  await paintWithQuery();
  render();
  if (!isNew && !isDamaged) schedule();
  await offer();
}

start().catch((error) => say(error.message, true));
