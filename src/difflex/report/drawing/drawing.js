"use strict";
(() => {
  const tip = document.createElement("div");
  tip.id = "tip"; tip.hidden = true; tip.setAttribute("role", "status");
  document.body.append(tip);
  let told = null, last = null;

  const quiet = () => {
    if (told) told.classList.remove("told");
    told = null; tip.hidden = true;
  };
  const tell = (mark) => {
    if (mark === told) return;
    quiet();
    told = last = mark; mark.classList.add("told");
    tip.textContent = mark.dataset.tip; tip.hidden = false;
    const at = mark.getBoundingClientRect(), own = tip.getBoundingClientRect(), edge = document.documentElement.clientWidth;
    const left = Math.min(Math.max(at.x + at.width / 2 - own.width / 2, 8), edge - own.width - 8);
    const above = at.y - own.height - 10;
    tip.style.left = `${left}px`;
    tip.style.top = `${above > 8 ? above : at.y + at.height + 10}px`;
  };
  const shown = (svg) => [...svg.querySelectorAll("[data-tip]")].filter((mark) => !mark.closest("[hidden]"));
  const nearest = (svg, x, y) => {
    let best = null, least = 26 ** 2;
    for (const mark of shown(svg)) {
      const box = mark.getBoundingClientRect();
      const far = Math.max(box.x - x, 0, x - box.right) ** 2 + Math.max(box.y - y, 0, y - box.bottom) ** 2;
      if (far < least) { best = mark; least = far; }
    }
    return best;
  };

  for (const svg of document.querySelectorAll("svg.drawing")) {
    const look = (event) => {
      const mark = nearest(svg, event.clientX, event.clientY);
      if (mark) tell(mark); else quiet();
    };
    svg.addEventListener("pointermove", look);
    svg.addEventListener("pointerdown", look);
    svg.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") quiet(); });
    svg.addEventListener("blur", quiet);
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (event.key === "Escape") quiet();
      const marks = shown(svg);
      if (!step || !marks.length) return;
      event.preventDefault();
      const now = marks.indexOf(last);
      tell(marks[(now + (now < 0 && step < 0 ? 0 : step) + marks.length) % marks.length]);
    });
  }
  addEventListener("scroll", quiet, { passive: true });
  document.addEventListener("pointerdown", (event) => { if (!event.target.closest("svg.drawing")) quiet(); });

  for (const button of document.querySelectorAll(".legend button")) {
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") !== "true", series = button.dataset.series;
      button.setAttribute("aria-pressed", String(on));
      for (const part of button.closest(".figure").querySelectorAll("svg.drawing [data-series]")) {
        if (part.dataset.series === series) part.toggleAttribute("hidden", !on);
      }
      quiet();
    });
  }
})();
