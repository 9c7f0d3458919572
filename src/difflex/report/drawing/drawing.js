"use strict";
(() => {
  const tip = document.createElement("div");
  tip.id = "tip"; tip.hidden = true; tip.setAttribute("role", "status");
  document.body.append(tip);
  let active = null, last = null;

  const hide = () => {
    if (active) active.classList.remove("active");
    active = null; tip.hidden = true;
  };
  const show = (mark) => {
    if (mark === active) return;
    hide();
    active = last = mark; mark.classList.add("active");
    tip.textContent = mark.dataset.tip; tip.hidden = false;
    const at = mark.getBoundingClientRect(), box = tip.getBoundingClientRect(), edge = document.documentElement.clientWidth;
    const left = Math.min(Math.max(at.x + at.width / 2 - box.width / 2, 8), edge - box.width - 8);
    const above = at.y - box.height - 10;
    tip.style.left = `${left}px`;
    tip.style.top = `${above > 8 ? above : at.y + at.height + 10}px`;
  };
  const visible = (svg) => [...svg.querySelectorAll("[data-tip]")].filter((mark) => !mark.closest("[hidden]"));
  const nearest = (svg, x, y) => {
    let best = null, shortest = 26 ** 2;
    for (const mark of visible(svg)) {
      const box = mark.getBoundingClientRect();
      const distance = Math.max(box.x - x, 0, x - box.right) ** 2 + Math.max(box.y - y, 0, y - box.bottom) ** 2;
      if (distance < shortest) { best = mark; shortest = distance; }
    }
    return best;
  };

  for (const svg of document.querySelectorAll("svg.drawing")) {
    const point = (event) => {
      const mark = nearest(svg, event.clientX, event.clientY);
      if (mark) show(mark); else hide();
    };
    svg.addEventListener("pointermove", point);
    svg.addEventListener("pointerdown", point);
    svg.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") hide(); });
    svg.addEventListener("blur", hide);
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (event.key === "Escape") hide();
      const marks = visible(svg);
      if (!step || !marks.length) return;
      event.preventDefault();
      const now = marks.indexOf(last);
      show(marks[(now + (now < 0 && step < 0 ? 0 : step) + marks.length) % marks.length]);
    });
  }
  addEventListener("scroll", hide, { passive: true });
  document.addEventListener("pointerdown", (event) => { if (!event.target.closest("svg.drawing")) hide(); });

  for (const button of document.querySelectorAll(".legend button")) {
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") !== "true", series = button.dataset.series;
      button.setAttribute("aria-pressed", String(on));
      for (const part of button.closest(".figure").querySelectorAll("svg.drawing [data-series]")) {
        if (part.dataset.series === series) part.toggleAttribute("hidden", !on);
      }
      hide();
    });
  }
})();
