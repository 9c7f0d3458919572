// The wall: only the rows near the window are in the page; the others are room above and below them.

import { drawAll } from "/static/maps.js";
import { element, tile } from "/static/tile.js";

const PART = 60, MARGIN = 2;
const wall = document.getElementById("wall");
const controls = document.getElementById("controls");
const exported = "static" in document.body.dataset && (await (await import("./exported.js")).exportedWall(wall.dataset.place, PART));
const total = exported ? exported.total : Number(wall.dataset.total);
const parts = new Map(); // number of a part -> its tiles, or the promise of them
let shown = [-1, -1];

async function load(part) {
  if (exported) return exported.load(part);
  const address = new URL(`/api/dictionaries${wall.dataset.place.slice(2)}/features${location.search}`, location.href);
  for (const [key, text] of [...address.searchParams]) if (!text) address.searchParams.delete(key, text);
  address.searchParams.set("offset", part * PART);
  address.searchParams.set("limit", PART);
  const answer = await fetch(address);
  if (!answer.ok) throw new Error((await answer.json()).error);
  const { tiles, grid } = await answer.json();
  return tiles.map((entry) => tile(entry, grid, wall.dataset.place));
}

function tilesOf(part) {
  if (!parts.has(part))
    parts.set(part, load(part).then((tiles) => (parts.set(part, tiles), arrange(true)), () => setTimeout(() => parts.delete(part), 2000)));
  const tiles = parts.get(part);
  return Array.isArray(tiles) ? tiles : null;
}

function arrange(again = false) {
  const style = getComputedStyle(wall);
  const columns = style.gridTemplateColumns.split(" ").length;
  const gap = parseFloat(style.rowGap), height = parseFloat(style.gridAutoRows) + gap;
  const rows = Math.ceil(total / columns);
  const top = wall.getBoundingClientRect().top;
  const first = Math.max(0, Math.min(rows - 1, Math.floor(-top / height) - MARGIN));
  const last = Math.min(rows, Math.ceil((innerHeight - top) / height) + MARGIN);
  const range = [first * columns, Math.min(total, last * columns)];
  if (!again && range[0] === shown[0] && range[1] === shown[1]) return;
  shown = range;
  const nodes = [];
  for (let i = range[0]; i < range[1]; i++) {
    const tiles = tilesOf(Math.floor(i / PART));
    nodes.push(tiles?.[i % PART] ?? element("li", { class: "tile", "aria-busy": "true" }));
  }
  const focused = document.activeElement;
  wall.replaceChildren(...nodes);
  wall.style.paddingTop = `${first * height}px`;
  wall.style.paddingBottom = `${Math.max(0, rows - last) * height}px`;
  wall.setAttribute("start", range[0] + 1);
  if (focused && wall.contains(focused)) focused.focus({ preventScroll: true });
  drawAll(wall);
}

// Parts far from the window are forgotten, so that a long walk takes no more memory than a short one.
function forget() {
  const near = Math.floor(shown[0] / PART);
  for (const part of parts.keys()) if (Math.abs(part - near) > 20) parts.delete(part);
}

if (!exported) parts.set(0, [...wall.children]);
drawAll(wall);
if (total || exported) arrange();
addEventListener("scroll", () => requestAnimationFrame(() => (arrange(), forget())), { passive: true });
addEventListener("resize", () => arrange(true));
document.getElementById("dictionary").addEventListener("change", (event) => (location.href = event.target.value));
controls.addEventListener("change", (event) => event.target.name && controls.requestSubmit());
controls.addEventListener("submit", () => {
  // Keep empty fields out of the address.
  for (const field of controls.elements) if (field.name && !field.value) field.disabled = true;
});
addEventListener("pageshow", () => { for (const field of controls.elements) field.disabled = false; });
