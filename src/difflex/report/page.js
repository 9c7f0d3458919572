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
})();
