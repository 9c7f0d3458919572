// The page of a feature: how its maps are shown, and the value under the pointer.

import { drawAll, shares } from "/static/maps.js";

const view = document.getElementById("view");
const value = document.getElementById("value");

function show() {
  const [style, opacity, threshold] = ["style", "opacity", "threshold"].map((name) => view.elements[name].value);
  view.elements.from.value = `${Math.round(100 * threshold)} %`;
  drawAll(document, { style, opacity: Number(opacity), threshold: Number(threshold) });
}

function place(event) {
  const canvas = event.target.closest?.("canvas[data-levels]");
  if (!canvas) return void (value.value = "");
  const box = canvas.getBoundingClientRect();
  const { rows, columns, peak } = canvas.dataset;
  const row = Math.min(rows - 1, Math.floor(((event.clientY - box.top) / box.height) * rows));
  const column = Math.min(columns - 1, Math.floor(((event.clientX - box.left) / box.width) * columns));
  value.value = `${(shares(canvas)[row * columns + column] * peak).toPrecision(3)} at row ${row}, column ${column}`;
}

view.addEventListener("input", show);
view.addEventListener("submit", (event) => event.preventDefault());
document.addEventListener("pointermove", place);
document.addEventListener("pointerdown", place);
window.addEventListener("resize", show);
show();
