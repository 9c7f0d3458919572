// A feature as a tile, as templates/tile.html makes it.

export function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, text] of Object.entries(attributes)) node.setAttribute(key, text);
  node.append(...children);
  return node;
}

export function tile(entry, grid, place, note) {
  const facts = [entry.feature];
  if (entry.ap !== null) facts.push(`AP ${entry.ap.toFixed(2)}`);
  if (entry.score !== null) facts.push(`accuracy ${entry.score.toFixed(2)}`);
  facts.push(`${Number((100 * entry.density).toPrecision(2))}\u00a0%`);
  const picture = element("span", { class: "picture" });
  if (entry.image) picture.append(element("img", { src: new URL(`../images/${entry.image}`, import.meta.url), alt: "", width: 128, height: 128 }));
  if (entry.image && grid)
    picture.append(element("canvas", { "data-covered": entry.covered, "data-rows": grid[0], "data-columns": grid[1], "aria-hidden": "true" }));
  const name = element("span", { class: "name" }, entry.label || `feature ${entry.feature}`);
  const link = element("a", { href: `${place}/${entry.feature}${"static" in document.body.dataset ? ".html" : ""}` }, picture, name, element("span", { class: "facts" }, note ?? facts.join(" · ")));
  return element("li", { class: "tile" }, link);
}
