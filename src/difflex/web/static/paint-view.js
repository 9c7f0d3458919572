// The images: before and after, a wipe between them, their difference, and all seeds and strengths as a grid.

import { element } from "/static/tile.js";

const SMALL = 200; // images with fewer pixels to a side are shown with sharp pixels

export const urlOf = (file) => `/generated/${file}`;

export function imageOf(file) {
  const image = new Image();
  image.src = urlOf(file);
  return image.decode().then(() => image);
}

export class View {
  #before = document.querySelector("#unedited > img");
  #after = document.querySelector("#edited > img");
  #under = document.querySelector("#edited > .under");
  #difference = document.getElementById("difference");
  #frames = document.querySelectorAll(".plate");
  #value = document.getElementById("view-value");
  #strip = document.getElementById("strip");
  #shown = [null, null];
  #values = { wipe: 50, difference: 4 };
  #mode = "edited";
  #onLost;

  // `onLost` is called when the server has an image no more; `onSelect` with the seed and factor that were chosen in the grid.
  constructor(onLost, onSelect) {
    this.#onLost = onLost;
    for (const radio of document.querySelectorAll("[name=view]")) radio.addEventListener("change", () => ((this.#mode = radio.value), this.#refresh()));
    this.#range.addEventListener("input", () => ((this.#values[this.#mode] = Number(this.#range.value)), this.#refresh()));
    this.#strip.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (button) onSelect(Number(button.dataset.seed), button.dataset.factor === "" ? null : Number(button.dataset.factor));
    });
    const frame = document.getElementById("edited");
    const wipe = (event) => {
      if (this.#mode !== "wipe" || (event.type === "pointermove" && !event.buttons)) return;
      const box = frame.getBoundingClientRect();
      this.#range.value = (100 * (event.clientX - box.left)) / box.width;
      this.#range.dispatchEvent(new Event("input"));
    };
    frame.addEventListener("pointerdown", wipe);
    frame.addEventListener("pointermove", wipe);
    this.#refresh();
  }

  get #range() {
    return this.#value.querySelector("input");
  }

  // Show the files of two images; null for one that there is not.
  async show(before, after) {
    if (this.#shown[0] === before && this.#shown[1] === after) return;
    this.#shown = [before, after];
    let images;
    try {
      images = await Promise.all([before, after].map((file) => file && imageOf(file)));
    } catch {
      return this.#onLost([before, after]);
    }
    if (this.#shown[0] !== before || this.#shown[1] !== after) return;
    this.#put(this.#before, images[0]);
    this.#put(this.#after, images[1]);
    const under = this.#under.firstElementChild;
    this.#put(under, images[0]);
    this.#refresh(images);
  }

  #put(node, image) {
    node.hidden = !image;
    if (!image) return node.removeAttribute("src");
    node.src = image.src;
    node.classList.toggle("sharp", image.naturalWidth < SMALL);
    const size = `0 0 ${image.naturalWidth} ${image.naturalHeight}`;
    for (const frame of this.#frames) if (frame.querySelector(".ratio").getAttribute("viewBox") !== size) frame.querySelector(".ratio").setAttribute("viewBox", size);
  }

  #refresh() {
    const both = this.#shown[0] && this.#shown[1], [text, range, output] = this.#value.children;
    this.#value.classList.toggle("off", this.#mode === "edited" || !both);
    this.#under.hidden = !(this.#mode === "wipe" && both);
    this.#difference.hidden = !(this.#mode === "difference" && both);
    const value = this.#values[this.#mode] ?? 50;
    [text.textContent, range.min, range.max] = this.#mode === "difference" ? ["Amplified", 1, 16] : ["Edge at", 0, 100];
    range.value = value;
    output.value = this.#mode === "difference" ? `${value} times` : `${Math.round(value)} %`;
    this.#under.style.setProperty("--cut", `${100 - this.#values.wipe}%`);
    this.#frames.forEach((frame, i) => (frame.querySelector(".hint").hidden = this.#shown[i] !== null));
    if (!this.#difference.hidden) this.#drawDifference();
  }

  #drawDifference() {
    const [before, after] = [this.#before, this.#after];
    const width = after.naturalWidth, height = after.naturalHeight;
    if (!width || before.naturalWidth !== width) return void setTimeout(() => this.#shown[1] && !this.#difference.hidden && this.#drawDifference(), 50);
    Object.assign(this.#difference, { width, height });
    this.#difference.classList.toggle("sharp", width < SMALL);
    const pen = this.#difference.getContext("2d", { willReadFrequently: true });
    const [one, two] = [before, after].map((image) => (pen.drawImage(image, 0, 0), pen.getImageData(0, 0, width, height)));
    for (let i = 0; i < two.data.length; i++) if (i % 4 !== 3) two.data[i] = Math.abs(two.data[i] - one.data[i]) * this.#values.difference;
    pen.putImageData(two, 0, 0);
  }

  // Show a row of each seed: the unedited image, then one of each factor. `fileOf` returns the file of one, or null.
  showGrid({ seeds, factors, selected, nameOf, fileOf }) {
    this.#strip.hidden = seeds.length === 1 && factors.length < 2;
    const cells = this.#strip.hidden ? [] : seeds.flatMap((seed) => [null, ...factors].map((factor) => [seed, factor]));
    this.#strip.style.setProperty("--columns", factors.length + 1);
    while (this.#strip.children.length > cells.length) this.#strip.lastChild.remove();
    cells.forEach(([seed, factor], place) => {
      const node = this.#strip.children[place] ?? this.#strip.appendChild(newCell());
      const file = fileOf(seed, factor), image = node.firstChild.lastChild;
      node.dataset.seed = seed;
      node.dataset.factor = factor ?? "";
      node.setAttribute("aria-pressed", seed === selected.seed && factor === selected.factor);
      node.lastChild.textContent = factor === null ? (seeds.length > 1 ? `seed ${seed}` : "unedited") : nameOf(factor);
      node.setAttribute("aria-label", `Seed ${seed}, ${factor === null ? "unedited" : nameOf(factor)}`);
      image.hidden = file === null;
      if (file !== null && !image.src.endsWith(file)) image.src = urlOf(file);
    });
  }
}

function newCell() {
  const ratio = document.querySelector("#unedited .ratio").cloneNode(true), image = element("img", { alt: "" });
  image.addEventListener("load", () => image.classList.toggle("sharp", image.naturalWidth < SMALL));
  return element("button", { type: "button", class: "cell" }, element("span", { class: "plate" }, ratio, image), element("span", { class: "facts" }));
}
