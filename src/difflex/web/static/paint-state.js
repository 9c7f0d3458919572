// What the page to paint on shows: immutable states with a history, as text in the address, and as requests to the server.

const KEPT = 200, TOGETHER = 800; // states of the history, and milliseconds in which changes of one kind are one
export const FACTORS = [-1, 0.5, 1, 1.5, 2];
const OPERATIONS = ["add", "set", "scale", "ablate"], UNITS = ["peak", "mean", "norm", "code"], HALVES = ["conditional", "both", "opposed"];

export const START = Object.freeze({ prompt: "", seed: 0, count: 1, steps: null, strip: false, edits: [] });

export function newEdit(values) {
  return { id: crypto.getRandomValues(new Uint32Array(1))[0], muted: false, operation: "add", strength: 1, unit: "peak", region: null, mask: null, steps: null, half: "conditional", ...values };
}

// The states that there were, and which one is shown.
export class History {
  constructor(state) {
    this.entries = [{ state, kind: null, time: 0 }];
    this.place = 0;
  }

  get state() {
    return this.entries[this.place].state;
  }

  // Changes of one kind that follow each other closely are undone together.
  add(state, kind = null) {
    const last = this.entries[this.place], time = Date.now();
    const isSame = kind !== null && kind === last.kind && time - last.time < TOGETHER && this.place > 0;
    this.entries.splice(isSame ? this.place : this.place + 1, Infinity, { state, kind, time });
    this.entries.splice(0, this.entries.length - KEPT);
    this.place = this.entries.length - 1;
  }

  canMove(by) {
    return this.entries[this.place + by] !== undefined;
  }

  move(by) {
    if (this.canMove(by)) this.place += by;
    this.entries[this.place].time = 0;
  }
}

export const hasPaint = (mask) => mask !== null && /[^A=]/.test(mask.weights);

// The edits that change the image: those that are not muted, and painted somewhere if they are painted.
export function activeEdits(state) {
  return state.edits
    .filter((edit) => !edit.muted && (edit.region !== "mask" || hasPaint(edit.mask)))
    .map(({ id, muted, mask, ...edit }) => ({ ...edit, region: edit.region === "mask" ? mask : edit.region }));
}

export const seedsOf = (state) => Array.from({ length: state.count }, (_, i) => state.seed + i);
export const factorsOf = (state) => (state.strip ? FACTORS : [1]);

// What an image depends on; a factor of null is the unedited one.
export function keyOf(state, seed, factor) {
  return JSON.stringify([state.prompt, state.steps, seed, factor, factor === null ? [] : activeEdits(state)]);
}

export function requestOf(state, seeds, factors) {
  const steps = state.steps === null ? {} : { steps: state.steps };
  return { prompt: state.prompt, ...steps, seeds, factors, edits: activeEdits(state) };
}

// States as text in the address.

async function through(bytes, transform) {
  return new Uint8Array(await new Response(new Blob([bytes]).stream().pipeThrough(transform)).arrayBuffer());
}

export async function packed(state) {
  const bytes = await through(new TextEncoder().encode(JSON.stringify(state)), new CompressionStream("deflate-raw"));
  return btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join("")).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

export async function unpacked(text) {
  const bytes = Uint8Array.from(atob(text.replaceAll("-", "+").replaceAll("_", "/")), (letter) => letter.charCodeAt(0));
  return cleanState(JSON.parse(new TextDecoder().decode(await through(bytes, new DecompressionStream("deflate-raw")))));
}

// States that came from elsewhere: each value is one that the page can show, or an error.

function whole(value, least, most) {
  if (!Number.isInteger(value) || value < least || value > most) throw new Error(`${JSON.stringify(value)} is not a whole number from ${least} to ${most}.`);
  return value;
}

function oneOf(value, choices) {
  if (!choices.includes(value)) throw new Error(`This page cannot ${JSON.stringify(value)}; it knows ${choices.join(", ")}.`);
  return value;
}

const text = (value) => (value === null || value === undefined ? null : String(value).slice(0, 2000));

function cleanMask(mask) {
  if (mask === null || mask === undefined) return null;
  const rows = whole(mask.rows, 1, 512), columns = whole(mask.columns, 1, 512), weights = String(mask.weights);
  if (atob(weights).length !== rows * columns) throw new Error("A mask does not fit its grid.");
  return { rows, columns, weights };
}

// An edit of a state, or of a record, where the region is the map itself.
export function cleanEdit(edit) {
  const isMap = typeof edit.region === "object" && edit.region !== null && !Array.isArray(edit.region);
  const isRectangle = Array.isArray(edit.region) && edit.region.length === 4 && edit.region.every(Number.isFinite);
  if (typeof edit.region === "string" && !["mask", "fires"].includes(edit.region)) throw new Error("Its mask is an image on another disk. Paint it here.");
  return newEdit({
    muted: edit.muted === true,
    operation: oneOf(edit.operation, OPERATIONS),
    site: String(edit.site),
    dictionary: text(edit.dictionary),
    features: Array.from(edit.features ?? [], (feature) => whole(feature, 0, 2 ** 31 - 1)).slice(0, 32),
    contrast: text(edit.contrast),
    strength: Number.isFinite(edit.strength) ? edit.strength : 1,
    unit: oneOf(edit.unit, UNITS),
    region: isMap ? "mask" : isRectangle || typeof edit.region === "string" ? edit.region : null,
    mask: cleanMask(isMap ? edit.region : edit.mask),
    steps: Array.isArray(edit.steps) ? [whole(edit.steps[0], 0, 999), whole(edit.steps[1], 1, 1000)] : null,
    half: oneOf(edit.half, HALVES),
  });
}

function cleanState(state) {
  return Object.freeze({
    prompt: text(state.prompt) ?? "",
    seed: whole(state.seed, 0, Number.MAX_SAFE_INTEGER),
    count: oneOf(state.count, [1, 2, 4]),
    steps: state.steps === null ? null : whole(state.steps, 1, 100),
    strip: state.strip === true,
    edits: Array.from(state.edits, cleanEdit).slice(0, 16),
  });
}

// The state of a record that `difflex steer --record` wrote.
export function stateOfRecord(record, settings) {
  const { shot, edits } = record;
  if (!shot || !Array.isArray(edits)) throw new Error("This file is not an edit. Open one that Download edit or difflex steer --record wrote.");
  if (shot.model !== settings.model) throw new Error(`This edit was made with ${shot.model}, but the model here is ${settings.model}.`);
  const steps = shot.steps === settings.steps ? null : shot.steps;
  return cleanState({ prompt: shot.prompt, seed: shot.seed, count: 1, steps, strip: false, edits });
}
