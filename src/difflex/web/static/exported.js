// An exported study: walls are sorted and filtered here, and words are looked up in files, without a server.

import { drawAll } from "./maps.js";
import { tile } from "./tile.js";

const CHUNK = 120, FOUND = 24;
const CONDITION = /^\s*(\w+)\s*(<=|>=|<|>|=)\s*(-?\d+\.?\d*(?:[eE]-?\d+)?)\s*$/;
const SIGNS = { "<": (a, b) => a < b, "<=": (a, b) => a <= b, ">": (a, b) => a > b, ">=": (a, b) => a >= b, "=": (a, b) => a === b };

async function read(address) {
  const answer = await fetch(address);
  if (!answer.ok) throw new Error(`${address} is missing: copy the whole folder of the export.`);
  return answer.json();
}

// The words of a text without plural endings, sorted, as difflex search reads them.
function stems(text) {
  const stem = (word) =>
    word.length > 4 && /(s|x|ch|sh)es$/.test(word) ? word.slice(0, -2)
    : word.length > 3 && word.endsWith("s") && !/(ss|us|is)$/.test(word) ? word.slice(0, -1) : word;
  return [...new Set((text.toLowerCase().match(/[\p{L}\p{N}_]+/gu) ?? []).map(stem))].sort();
}

// A dictionary of the export in the folder `place`.
class Dictionary {
  constructor(place) {
    this.place = place;
    this.chunks = new Map();
  }

  async begin() {
    Object.assign(this, await read(`${this.place}/columns.json`));
    return this;
  }

  // Features that fit words, best first: [position, score, reason].
  async search(words) {
    this.words ??= await read(`${this.place}/words.json`);
    const wanted = stems(words), whole = this.words[wanted.join(" ")];
    if (whole || !wanted.length) return whole ?? [];
    // A concept counts in part for some of the words; an explanation or captions must have them all.
    const found = new Map();
    for (const [position, score, reason] of wanted.flatMap((word) => this.words[word] ?? [])) {
      const hit = found.get(position) ?? { words: 0, score: 1, part: 0, reasons: new Set() };
      found.set(position, hit);
      hit.words++;
      hit.score = Math.min(hit.score, score);
      if (reason.startsWith("detects ")) hit.part = Math.max(hit.part, score / wanted.length);
      hit.reasons.add(reason);
    }
    return [...found]
      .filter(([, hit]) => hit.words === wanted.length || hit.part)
      .map(([position, hit]) => [position, hit.words === wanted.length ? hit.score : hit.part, [...hit.reasons].join("; ")])
      .sort((a, b) => b[1] - a[1]);
  }

  // The positions of the features of a query, in its order; those without a value come last.
  async select(query) {
    let positions = this.columns.feature.map((_, position) => position);
    const words = query.get("q")?.trim();
    if (words) positions = (await this.search(words)).map(([position]) => position);
    const conditions = query.getAll("where").flatMap((text) => text.split(",")).filter((text) => text.trim());
    for (const text of conditions) {
      const [, name, sign, value] = CONDITION.exec(text) ?? [];
      if (!name) throw new Error(`'${text}' is not a condition. Write a column, one of < <= > >= = and a number: density<0.01.`);
      const column = this.column(name);
      positions = positions.filter((position) => column[position] !== null && SIGNS[sign](column[position], Number(value)));
    }
    const concept = query.get("concept");
    if (concept) positions = positions.filter((position) => this.concepts[this.concept[position]] === concept);
    if (words) return positions;
    const column = this.column(query.get("sort") || "ap"), direction = query.get("ascending") === "true" ? 1 : -1;
    const missing = (position) => column[position] === null;
    return positions.sort((a, b) => missing(a) - missing(b) || (missing(a) ? 0 : direction * (column[a] - column[b])));
  }

  column(name) {
    if (!Object.hasOwn(this.columns, name)) throw new Error(`The column '${name}' is unknown; known: ${Object.keys(this.columns).join(", ")}.`);
    return this.columns[name];
  }

  // Tiles as elements, with notes below them if there are some.
  async tiles(positions, notes = []) {
    const entry = async (position) => {
      const number = Math.floor(position / CHUNK);
      if (!this.chunks.has(number)) this.chunks.set(number, read(`${this.place}/tiles-${number}.json`));
      return (await this.chunks.get(number))[position % CHUNK];
    };
    const entries = await Promise.all(positions.map(entry));
    return entries.map((content, i) => tile(content, this.grid, this.place, notes[i]));
  }
}

// What the wall shows: how many tiles there are, and parts of them.
export async function exportedWall(place, part) {
  const query = new URLSearchParams(location.search), count = document.getElementById("count");
  const dictionary = await new Dictionary(place).begin();
  const controls = document.getElementById("controls").elements;
  for (const name of ["sort", "concept", "q"]) if (controls[name] && query.get(name) !== null) controls[name].value = query.get(name);
  controls.where.value = query.getAll("where").join(", ");
  controls.ascending.checked = query.get("ascending") === "true";
  let positions = [];
  try {
    positions = await dictionary.select(query);
    const all = dictionary.columns.feature.length;
    const rest = all < dictionary.size ? `; ${all.toLocaleString("en")} of ${dictionary.size.toLocaleString("en")} are exported` : "";
    count.textContent = `${positions.length.toLocaleString("en")} features${rest}`;
  } catch (error) {
    count.textContent = error.message;
  }
  return { total: positions.length, load: (number) => dictionary.tiles(positions.slice(number * part, (number + 1) * part)) };
}

async function search(words) {
  const problem = document.querySelector("main p"), found = document.getElementById("hits"), hits = [];
  const root = new URL("..", import.meta.url);
  problem.textContent = "Searching";
  for (const { place, name } of await read(new URL("dictionaries.json", root))) {
    const dictionary = await new Dictionary(new URL(place, root).href).begin();
    for (const hit of await dictionary.search(words)) hits.push({ dictionary, name, hit });
  }
  hits.sort((a, b) => b.hit[1] - a.hit[1]).splice(FOUND);
  for (const { dictionary, name, hit } of hits) found.append(...(await dictionary.tiles([hit[0]], [`${name}: ${hit[2]}`])));
  problem.textContent = hits.length ? "" : "No exported feature fits these words.";
  drawAll(found);
}

if (document.getElementById("hits")) {
  const words = new URLSearchParams(location.search).get("q")?.trim();
  if (words) {
    document.querySelector("h1").textContent = document.querySelector("[type=search]").value = words;
    search(words);
  }
  addEventListener("resize", () => drawAll());
}
