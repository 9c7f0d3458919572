// The edits as cards: what to paint with, how strongly, where and when.

import { drawAll } from "/static/maps.js";
import { findFeature, thumbnail } from "/static/paint-find.js";
import { hasPaint } from "/static/paint-state.js";
import { element } from "/static/tile.js";

const SVG = "http://www.w3.org/2000/svg";
const REACH = 4; // strengths on the slider, to both sides, where the edit has no larger one
const OPERATIONS = { add: "Add", set: "Set to", scale: "Scale by", ablate: "Remove" };
const UNITS = { peak: "peaks", mean: "means", norm: "norms", code: "codes" };
const PLACES = [["", "everywhere"], ["fires", "where it fires"], ["mask", "painted"]];

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg"), use = document.createElementNS(SVG, "use");
  svg.setAttribute("class", "icon");
  svg.setAttribute("viewBox", "0 0 16 16");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

const tiles = new Map(); // of edits, by dictionary and feature
function tileOf({ site, dictionary, features }) {
  const key = JSON.stringify([site, dictionary, features[0]]);
  if (!tiles.has(key)) tiles.set(key, findFeature(site, dictionary, features[0]).catch(() => (tiles.delete(key), null)));
  return tiles.get(key);
}

function choices(entries) {
  return Object.entries(entries).map(([value, text]) => element("option", { value }, text));
}

const set = (field, value) => field.value !== String(value) && document.activeElement !== field && (field.value = value);

class Card {
  // `change(id, changes, kind)` changes an edit; `act(id, action)` selects, removes or copies it.
  constructor(edit, change, act) {
    this.id = edit.id;
    this.change = (changes, kind) => change(this.id, changes, kind && `${this.id} ${kind}`);
    this.#build(act);
    this.#describe(edit);
    const reach = Math.max(REACH, Math.ceil(2 * Math.abs(edit.strength)));
    Object.assign(this.slider, { min: -reach, max: reach });
  }

  #build(act) {
    const button = (action, text) => {
      const node = element("button", { type: "button", class: "quiet", "aria-label": text, title: text }, icon(action));
      node.addEventListener("click", (event) => (event.stopPropagation(), act(this.id, action)));
      return node;
    };
    this.picture = element("span", { class: "picture" });
    this.name = element("a", { class: "name" });
    this.place = element("span", { class: "faint place" });
    this.mute = button("shown", "Mute");
    this.operation = element("select", { "aria-label": "Operation" }, ...choices(OPERATIONS));
    this.slider = element("input", { type: "range", step: "0.1", "aria-label": "Strength" });
    this.number = element("input", { type: "number", step: "0.1", min: "-1000", max: "1000", "aria-label": "Strength" });
    this.unitName = element("span", { class: "faint unit" });
    this.strength = element("span", { class: "strength" }, this.number, this.unitName);
    this.where = element("span", { class: "choice", role: "radiogroup", "aria-label": "Where" }, ...PLACES.map((place) => this.#radio(...place)));
    this.hint = element("p", { class: "faint card-hint" });
    this.unit = element("select", {}, ...choices(UNITS));
    this.first = element("input", { type: "number", min: "1", "aria-label": "First step" });
    this.last = element("input", { type: "number", min: "1", "aria-label": "Last step" });
    this.node = element("li", { class: "card" },
      element("div", { class: "card-head" }, this.picture, element("span", { class: "texts" }, this.name, this.place), element("span", { class: "group" }, this.mute, button("copy", "Duplicate"), button("remove", "Remove"))),
      element("div", { class: "row" }, this.operation, this.strength),
      this.slider, this.where, this.hint,
      element("details", {}, element("summary", {}, "more"), element("div", { class: "row" }, element("label", {}, "Unit ", this.unit), element("span", {}, "Steps ", this.first, " to ", this.last))));
    this.#listen(act);
  }

  #radio(value, text) {
    return element("label", {}, element("input", { type: "radio", name: `where-${this.id}`, value }), text);
  }

  #listen(act) {
    this.node.addEventListener("pointerdown", () => act(this.id, "select"));
    this.node.addEventListener("focusin", () => act(this.id, "select"));
    this.operation.addEventListener("change", () => this.change({ operation: this.operation.value }));
    for (const field of [this.slider, this.number])
      field.addEventListener("input", () => field.value !== "" && this.change({ strength: Number(field.value) }, "strength"));
    this.where.addEventListener("change", (event) => this.change({ region: event.target.value || null }));
    this.unit.addEventListener("change", () => this.change({ unit: this.unit.value }));
    for (const field of [this.first, this.last])
      field.addEventListener("change", () => {
        const [first, last] = [this.first, this.last].map((own) => Math.round(Number(own.value || own.placeholder)));
        const isAll = !(first > 1 || last < Number(this.last.placeholder));
        this.change({ steps: isAll || !(last >= first && first > 0) ? null : [first - 1, last] });
      });
  }

  async #describe(edit) {
    this.place.textContent = edit.contrast !== null ? `${edit.site} · contrast` : `${edit.site}/${edit.dictionary} · ${edit.features.join(", ")}`;
    this.name.textContent = edit.contrast ?? `feature ${edit.features[0]}`;
    if (edit.contrast !== null) return;
    this.name.href = `/d/${encodeURIComponent(edit.site)}/${encodeURIComponent(edit.dictionary)}/${edit.features[0]}`;
    const found = await tileOf(edit);
    if (found === null) return;
    this.name.textContent = found.tile.label || `feature ${found.tile.feature}`;
    this.node.setAttribute("aria-label", this.name.textContent);
    const picture = thumbnail(found.tile, found.grid);
    this.picture.replaceWith(picture);
    this.picture = picture;
    drawAll(this.node);
  }

  update(edit, { isSelected, steps, canPaint }) {
    this.node.classList.toggle("selected", isSelected);
    this.node.classList.toggle("muted", edit.muted);
    this.mute.setAttribute("aria-pressed", edit.muted);
    this.operation.value = edit.operation;
    this.unit.value = edit.unit;
    this.unitName.textContent = edit.operation === "scale" ? "times" : UNITS[edit.unit];
    for (const node of [this.strength, this.slider]) node.classList.toggle("off", edit.operation === "ablate");
    const reach = Math.abs(edit.strength);
    if (reach > this.slider.max) Object.assign(this.slider, { min: -Math.ceil(reach), max: Math.ceil(reach) });
    if (Number(this.slider.value) !== edit.strength) this.slider.value = edit.strength;
    if (Number(this.number.value) !== edit.strength) this.number.value = edit.strength;
    for (const radio of this.where.querySelectorAll("input")) {
      radio.checked = radio.value === (edit.region ?? "");
      radio.disabled = radio.value === "mask" && !canPaint;
    }
    this.hint.textContent = !canPaint ? "" : Array.isArray(edit.region) ? "In a rectangle." : edit.region === "mask" && !hasPaint(edit.mask) ? "Paint on the unedited image where it should act." : "";
    [this.first.placeholder, this.last.placeholder] = ["1", steps];
    set(this.first, edit.steps ? edit.steps[0] + 1 : "");
    set(this.last, edit.steps ? edit.steps[1] : "");
  }
}

export class Cards {
  #list;
  #cards = new Map();
  #handlers;

  constructor(list, change, act) {
    this.#list = list;
    this.#handlers = [change, act];
  }

  // `view` returns how an edit is shown: whether it is selected and can be painted, and the number of steps.
  update(edits, view) {
    const ids = new Set(edits.map((edit) => edit.id));
    for (const [id, card] of this.#cards)
      if (!ids.has(id)) {
        card.node.remove();
        this.#cards.delete(id);
      }
    edits.forEach((edit, place) => {
      if (!this.#cards.has(edit.id)) this.#cards.set(edit.id, new Card(edit, ...this.#handlers));
      const card = this.#cards.get(edit.id);
      if (this.#list.children[place] !== card.node) this.#list.insertBefore(card.node, this.#list.children[place] ?? null);
      card.update(edit, view(edit));
    });
  }
}
