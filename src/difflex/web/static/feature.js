// The page of a feature: how its maps are shown, and the value under the pointer.

import { draw, drawAll, shares } from "/static/maps.js";

const view = document.getElementById("view");
const value = document.getElementById("value");

function show() {
  const [style, opacity, threshold] = ["style", "opacity", "threshold"].map((name) => view.elements[name].value);
  view.elements.from.value = `${Math.round(100 * threshold)} %`;
  drawAll(document, { style, opacity: Number(opacity), threshold: Number(threshold) });
  for (const canvas of document.querySelectorAll("canvas[data-style]")) draw(canvas, { style: canvas.dataset.style, threshold: 0, opacity: 1 });
}

function place(event) {
  const canvas = event.target.closest?.("canvas[data-peak]");
  if (!canvas) return void (value.value = "");
  const box = canvas.getBoundingClientRect();
  const { rows, columns, peak } = canvas.dataset;
  const row = Math.min(rows - 1, Math.floor(((event.clientY - box.top) / box.height) * rows));
  const column = Math.min(columns - 1, Math.floor(((event.clientX - box.left) / box.width) * columns));
  value.value = `${(shares(canvas)[row * columns + column] * peak).toPrecision(3)} at row ${row}, column ${column}`;
}

// Votes on explanations. A browser has one vote on each, by random letters that it keeps.
const pressed = JSON.parse(localStorage.getItem("difflex-votes") || "{}");
const voter = (localStorage["difflex-voter"] ||= [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join(""));

function mark(votes) {
  const own = pressed[[location.pathname, ...Object.values(votes.dataset)]];
  for (const button of votes.querySelectorAll("button")) button.setAttribute("aria-pressed", button.value === own);
}

async function vote(votes, agrees) {
  const { backend, protocol, text } = votes.dataset;
  const note = votes.querySelector("[aria-live]");
  const request = { voter, backend, protocol, text_fingerprint: text, agrees: agrees === "true" };
  const address = `/api/dictionaries${location.pathname.slice(2).replace(/\/(\d+)$/, "/features/$1")}/votes`;
  try {
    const answer = await fetch(address, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(request) });
    const content = await answer.json();
    if (!answer.ok) return void (note.textContent = content.error);
    const [agree, disagree] = votes.querySelectorAll("output");
    agree.value = content.agree || "";
    disagree.value = content.disagree || "";
    note.textContent = "";
    pressed[[location.pathname, ...Object.values(votes.dataset)]] = agrees;
    localStorage.setItem("difflex-votes", JSON.stringify(pressed));
    mark(votes);
  } catch {
    note.textContent = "The server does not answer.";
  }
}

for (const votes of document.querySelectorAll(".votes")) {
  mark(votes);
  votes.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) vote(votes, button.value);
  });
}
for (const details of document.querySelectorAll("details")) details.addEventListener("toggle", show);

view.addEventListener("input", show);
view.addEventListener("submit", (event) => event.preventDefault());
document.addEventListener("pointermove", place);
document.addEventListener("pointerdown", place);
window.addEventListener("resize", show);
show();
