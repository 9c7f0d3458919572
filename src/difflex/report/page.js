(() => {
  const number = (cell) => (cell.dataset.value === "" ? NaN : Number(cell.dataset.value.replace("inf", "Infinity")));
  for (const button of document.querySelectorAll(".sortable thead button")) {
    button.addEventListener("click", () => {
      const head = button.parentElement, heads = [...head.parentElement.children], body = head.closest("table").tBodies[0];
      const place = heads.indexOf(head), up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const words = place < 2, sign = up ? 1 : -1;
      const order = (first, second) => {
        const a = first.children[place], b = second.children[place];
        if (words) return sign * a.dataset.value.localeCompare(b.dataset.value, undefined, { numeric: true });
        const x = number(a), y = number(b);
        if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);  // NaN comes last
        return sign * (x - y);
      };
      body.append(...[...body.rows].sort(order));
    });
  }

  const dialog = document.getElementById("zoom"), [title, images] = [dialog.querySelector("h2"), dialog.querySelector("div")];
  for (const button of document.querySelectorAll(".zoom")) {
    button.addEventListener("click", () => {
      const rest = button.querySelector("template");
      const own = [...button.querySelectorAll("img"), ...(rest ? rest.content.querySelectorAll("img") : [])];
      title.textContent = button.dataset.title;
      images.replaceChildren(...own.map((image) => {
        const figure = document.createElement("figure"), caption = document.createElement("figcaption");
        caption.textContent = image.alt;
        figure.append(image.cloneNode(), caption);
        return figure;
      }));
      dialog.showModal();
    });
  }
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });

  for (const button of document.querySelectorAll(".enlarge")) {
    button.addEventListener("click", () => {
      const large = button.closest(".figure").classList.toggle("large");
      button.setAttribute("aria-pressed", String(large));
      button.textContent = large ? "smaller" : "larger";
    });
  }

  const boxes = document.querySelectorAll(".box");
  const hint = () => boxes.forEach((box) => {
    box.classList.toggle("more", box.scrollLeft + box.clientWidth < box.scrollWidth - 2);
  });
  for (const box of boxes) box.addEventListener("scroll", hint, { passive: true });
  for (const part of document.querySelectorAll("details")) part.addEventListener("toggle", hint);
  addEventListener("resize", hint);
  hint();
})();
