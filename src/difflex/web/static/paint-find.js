// A field that finds what to paint with: features by words or number, and contrast directions.

import { drawAll } from "/static/maps.js";
import { getJson } from "/static/paint-stream.js";
import { element } from "/static/tile.js";

const PAUSE = 200, SHOWN = 12, TRIED = 4;

export function thumbnail(tile, grid) {
  const picture = element("span", { class: "picture" });
  if (tile?.image) picture.append(element("img", { src: `/images/${tile.image}`, alt: "", width: 128, height: 128 }));
  if (tile?.image && grid)
    picture.append(element("canvas", { "data-covered": tile.covered, "data-rows": grid[0], "data-columns": grid[1], "aria-hidden": "true" }));
  return picture;
}

export const addressOf = (site, label) => `/api/dictionaries/${encodeURIComponent(site)}/${encodeURIComponent(label)}/features`;

// The tile of a feature and the grid of its dictionary, or null where there is no such feature.
export async function findFeature(site, label, feature) {
  const { tiles, grid } = await getJson(`${addressOf(site, label)}?where=feature%3D${feature}`);
  return tiles.length ? { site, label, grid, tile: tiles[0] } : null;
}

async function choicesFor(words, settings) {
  const named = Object.entries(settings.contrasts).filter(([name]) => name.toLowerCase().includes(words.toLowerCase()));
  const contrasts = named.map(([contrast, site]) => ({ site, contrast }));
  if (!/^\d+$/.test(words)) return [...contrasts, ...(await getJson(`/api/search?q=${encodeURIComponent(words)}`))].slice(0, SHOWN);
  const tried = settings.dictionaries.slice(0, TRIED).map(({ site, label }) => findFeature(site, label, Number(words)));
  return [...(await Promise.all(tried)).filter(Boolean), ...contrasts];
}

function option(choice, number) {
  const name = choice.contrast ?? (choice.tile.label || `feature ${choice.tile.feature}`);
  const place = choice.contrast ? `${choice.site} · contrast` : `${choice.site}/${choice.label} · ${choice.tile.feature}`;
  const texts = element("span", { class: "texts" }, element("b", {}, name), element("span", { class: "faint" }, place));
  if (choice.reason) texts.append(element("span", { class: "faint" }, choice.reason));
  return element("li", { role: "option", id: `found-${number}`, "aria-selected": "false" }, thumbnail(choice.tile, choice.grid), texts);
}

// Suggest while words are typed; `choose` is called with what was chosen.
export function finder(field, list, settings, choose) {
  let choices = [], suggested = "", active = -1, timer = 0, asked = 0;

  const close = () => {
    list.hidden = true;
    field.setAttribute("aria-expanded", "false");
    field.removeAttribute("aria-activedescendant");
    active = -1;
  };

  const show = (nodes) => {
    list.replaceChildren(...nodes);
    list.hidden = false;
    field.setAttribute("aria-expanded", "true");
    drawAll(list);
  };

  const activate = (number) => {
    active = (number + choices.length) % choices.length;
    list.querySelectorAll("[role=option]").forEach((node, i) => node.setAttribute("aria-selected", i === active));
    field.setAttribute("aria-activedescendant", `found-${active}`);
    list.children[active].scrollIntoView({ block: "nearest" });
  };

  const take = (number) => {
    const choice = choices[number];
    field.value = "";
    asked++;
    close();
    choose(choice);
  };

  const suggest = async () => {
    const words = field.value.trim(), number = ++asked;
    if (!words) return close();
    let found, sentence = "Nothing is called so. Try a colour, a shape, or the number of a feature.";
    try {
      found = await choicesFor(words, settings);
    } catch (error) {
      [found, sentence] = [[], error.message];
    }
    if (number !== asked) return;
    [choices, suggested, active] = [found, words, -1];
    show(choices.length ? choices.map(option) : [element("li", { class: "faint nothing" }, sentence)]);
  };

  field.addEventListener("input", () => (clearTimeout(timer), (timer = setTimeout(suggest, PAUSE))));
  field.addEventListener("focus", () => choices.length && field.value && (list.hidden = false));
  field.addEventListener("keydown", async (event) => {
    if (event.key === "Escape") close();
    else if (event.key === "Enter") {
      event.preventDefault();
      clearTimeout(timer);
      if (list.hidden || field.value.trim() !== suggested) await suggest();
      if (choices.length && !list.hidden) take(Math.max(0, active));
    } else if (["ArrowDown", "ArrowUp"].includes(event.key) && choices.length && !list.hidden) {
      event.preventDefault();
      activate(active + (event.key === "ArrowDown" ? 1 : active < 0 ? 0 : -1));
    }
  });
  field.addEventListener("blur", close);
  list.addEventListener("pointerdown", (event) => event.preventDefault()); // the field keeps the focus
  list.addEventListener("click", (event) => {
    const node = event.target.closest("[role=option]");
    if (node) take([...list.children].indexOf(node));
  });
}
