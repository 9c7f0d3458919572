// A mask that is painted on an image, token by token: with a mouse, a finger, a pen, or the keyboard.

import { bytes, drawShares } from "/static/maps.js";

export function maskOf(levels, rows, columns) {
  return { rows, columns, weights: btoa(Array.from(levels, (level) => String.fromCharCode(level)).join("")) };
}

// Move levels by whole tokens; what leaves the image is lost.
export function shifted(levels, rows, columns, down, right) {
  const moved = new Uint8Array(levels.length);
  for (let row = Math.max(0, down); row < Math.min(rows, rows + down); row++)
    for (let column = Math.max(0, right); column < Math.min(columns, columns + right); column++)
      moved[row * columns + column] = levels[(row - down) * columns + column - right];
  return moved;
}

const KEYS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

export class MaskCanvas {
  tool = "brush";
  size = 1;
  opacity = 1;
  #canvas;
  #onChange;
  #say;
  #rows = 0;
  #columns = 0;
  #levels = null; // null: nothing is painted on
  #cursor = null; // the token under the keyboard
  #stroke = null; // where the stroke is, and what there was before it

  // `onChange` is called with the mask after each stroke, `say` with a sentence about the token under the keyboard.
  constructor(canvas, onChange, say) {
    [this.#canvas, this.#onChange, this.#say] = [canvas, onChange, say];
    canvas.addEventListener("pointerdown", (event) => this.#begin(event));
    canvas.addEventListener("pointermove", (event) => this.#go(event));
    canvas.addEventListener("pointerup", () => this.#end());
    canvas.addEventListener("pointercancel", () => this.#abandon());
    canvas.addEventListener("keydown", (event) => this.#type(event));
    canvas.addEventListener("focus", () => this.draw());
    canvas.addEventListener("blur", () => ((this.#cursor = null), this.draw()));
    addEventListener("resize", () => this.draw());
  }

  // Show a mask on a grid; null where nothing can be painted.
  show(grid, mask) {
    if (this.#stroke) return;
    this.#canvas.classList.toggle("paintable", grid !== null);
    this.#canvas.tabIndex = grid === null ? -1 : 0;
    [this.#rows, this.#columns] = grid ?? [0, 0];
    this.#levels = grid && (mask ? bytes(mask.weights) : new Uint8Array(this.#rows * this.#columns));
    this.draw();
  }

  change(levelsOf) {
    if (this.#levels === null) return;
    this.#levels = levelsOf(this.#levels, this.#rows, this.#columns);
    this.draw();
    this.#onChange(maskOf(this.#levels, this.#rows, this.#columns));
  }

  draw() {
    const shares = Float32Array.from(this.#levels ?? [], (level) => level / 255);
    if (this.#levels === null) return drawShares(this.#canvas, shares, 1, 1, { style: "plain" });
    drawShares(this.#canvas, shares, this.#rows, this.#columns, { style: "both", threshold: 0, opacity: 0.3 });
    if (this.#cursor && document.activeElement === this.#canvas) this.#drawCursor();
  }

  #drawCursor() {
    const pen = this.#canvas.getContext("2d");
    const width = this.#canvas.width / this.#columns, height = this.#canvas.height / this.#rows, reach = (this.size - 1) / 2;
    const [row, column] = this.#cursor;
    pen.setLineDash([4, 4]);
    for (const [colour, offset] of [["black", 0], ["white", 4]]) {
      pen.strokeStyle = colour;
      pen.lineDashOffset = offset;
      pen.lineWidth = 2;
      pen.strokeRect((column - reach) * width + 1, (row - reach) * height + 1, this.size * width - 2, this.size * height - 2);
    }
  }

  #at(event) {
    const box = this.#canvas.getBoundingClientRect();
    return [((event.clientY - box.top) / box.height) * this.#rows, ((event.clientX - box.left) / box.width) * this.#columns];
  }

  #begin(event) {
    if (this.#levels === null || !event.isPrimary || event.button !== 0) return;
    event.preventDefault();
    this.#canvas.focus({ preventScroll: true });
    this.#canvas.setPointerCapture(event.pointerId);
    this.#cursor = null;
    this.#stroke = { from: this.#at(event), last: this.#at(event), before: this.#levels.slice() };
    this.#go(event);
  }

  #go(event) {
    if (!this.#stroke || !event.isPrimary) return;
    const events = event.getCoalescedEvents?.() ?? [];
    for (const part of events.length ? events : [event]) this.#goTo(this.#at(part), part.pointerType === "pen" ? part.pressure : 1);
    this.draw();
  }

  #goTo([row, column], pressure) {
    const { from, last, before } = this.#stroke;
    if (this.tool === "move") {
      this.#levels = shifted(before, this.#rows, this.#columns, Math.round(row - from[0]), Math.round(column - from[1]));
      return;
    }
    const parts = Math.max(1, Math.ceil(2 * Math.hypot(row - last[0], column - last[1])));
    for (let part = 1; part <= parts; part++)
      this.#dab(last[0] + ((row - last[0]) * part) / parts, last[1] + ((column - last[1]) * part) / parts, pressure);
    this.#stroke.last = [row, column];
  }

  // Set the tokens whose centres are under the brush, and the one in its middle.
  #dab(row, column, pressure = 1) {
    const level = this.tool === "eraser" ? 0 : Math.max(1, Math.round(255 * this.opacity * pressure)), radius = this.size / 2;
    const set = (r, c) => {
      if (r >= 0 && r < this.#rows && c >= 0 && c < this.#columns) this.#levels[r * this.#columns + c] = level;
    };
    set(Math.floor(row), Math.floor(column));
    for (let r = Math.floor(row - radius); r <= row + radius; r++)
      for (let c = Math.floor(column - radius); c <= column + radius; c++)
        if (this.size > 1 && Math.hypot(r + 0.5 - row, c + 0.5 - column) <= radius) set(r, c);
  }

  #end() {
    if (!this.#stroke) return;
    const { before } = this.#stroke;
    this.#stroke = null;
    if (this.#levels.some((level, i) => level !== before[i])) this.#onChange(maskOf(this.#levels, this.#rows, this.#columns));
  }

  #abandon() {
    if (!this.#stroke) return;
    this.#levels = this.#stroke.before;
    this.#stroke = null;
    this.draw();
  }

  #type(event) {
    if (this.#levels === null || event.ctrlKey || event.metaKey || event.altKey) return;
    const by = KEYS[event.key];
    if (!by && event.key !== " ") return;
    event.preventDefault();
    if (by && this.tool === "move") return this.change((levels, rows, columns) => shifted(levels, rows, columns, ...by));
    this.#cursor ??= [Math.floor((this.#rows - 1) / 2), Math.floor((this.#columns - 1) / 2)];
    if (by) this.#cursor = [clamp(this.#cursor[0] + by[0], this.#rows), clamp(this.#cursor[1] + by[1], this.#columns)];
    else this.change((levels) => ((this.#levels = levels.slice()), this.#dab(this.#cursor[0] + 0.5, this.#cursor[1] + 0.5), this.#levels));
    this.draw();
    const [row, column] = this.#cursor, level = this.#levels[row * this.#columns + column];
    this.#say(`Row ${row + 1}, column ${column + 1}: ${level ? `painted, ${Math.round(level / 2.55)} %` : "not painted"}.`);
  }
}

const clamp = (place, count) => Math.max(0, Math.min(count - 1, place));
