// Draws where a feature fires over an image: a line around the tokens, or a heat map.

const HEAT = [8, 48, 160];

export function bytes(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

// The share of the peak at each token, from the attributes of a canvas.
export function shares(canvas) {
  const { covered, levels, token, rows, columns } = canvas.dataset;
  const values = new Float32Array(rows * columns);
  if (covered) {
    const bits = bytes(covered);
    for (let i = 0; i < values.length; i++) values[i] = (bits[i >> 3] >> (i & 7)) & 1;
  } else if (levels) {
    bytes(levels).forEach((level, i) => (values[i] = level / 255));
  } else if (token) {
    values[token] = 1;
  }
  return values;
}

export function draw(canvas, options) {
  drawShares(canvas, shares(canvas), Number(canvas.dataset.rows), Number(canvas.dataset.columns), options);
}

// Styles: outline, heat, both, plain.
export function drawShares(canvas, values, rows, columns, { style = "outline", threshold = 0.2, opacity = 0.75 } = {}) {
  const box = canvas.getBoundingClientRect();
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.max(1, Math.round(box.width * ratio));
  canvas.height = Math.max(1, Math.round(box.height * ratio));
  if (style === "plain") return;
  const pen = canvas.getContext("2d");
  const x = (column) => Math.round((column * canvas.width) / columns);
  const y = (row) => Math.round((row * canvas.height) / rows);
  const is = (row, column) =>
    row >= 0 && row < rows && column >= 0 && column < columns && values[row * columns + column] >= Math.max(threshold, 1e-6);
  if (style !== "outline") {
    for (let row = 0; row < rows; row++)
      for (let column = 0; column < columns; column++)
        if (is(row, column)) {
          pen.fillStyle = `rgba(${HEAT}, ${opacity * Math.sqrt(values[row * columns + column])})`;
          pen.fillRect(x(column), y(row), x(column + 1) - x(column), y(row + 1) - y(row));
        }
    if (style === "heat") return;
  }
  const path = new Path2D();
  const line = (a, b, c, d) => (path.moveTo(x(a), y(b)), path.lineTo(x(c), y(d)));
  for (let row = 0; row < rows; row++)
    for (let column = 0; column < columns; column++)
      if (is(row, column)) {
        if (!is(row - 1, column)) line(column, row, column + 1, row);
        if (!is(row + 1, column)) line(column, row + 1, column + 1, row + 1);
        if (!is(row, column - 1)) line(column, row, column, row + 1);
        if (!is(row, column + 1)) line(column + 1, row, column + 1, row + 1);
      }
  pen.globalAlpha = Math.max(opacity, 0.2);
  pen.lineCap = "square";
  for (const [colour, width] of [["black", 4], ["white", 1.6]]) {
    pen.strokeStyle = colour;
    pen.lineWidth = width * ratio;
    pen.stroke(path);
  }
}

export function drawAll(root = document, options = {}) {
  for (const canvas of root.querySelectorAll("canvas[data-rows]")) draw(canvas, options);
}

if (!document.getElementById("view") && !document.getElementById("wall")) {
  drawAll();
  window.addEventListener("resize", () => drawAll());
}
