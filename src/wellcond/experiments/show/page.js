"use strict";
// Tables: clicking a heading, or pressing Enter on it, sorts by its column; again, in reverse order.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], rows = [...body.rows];
  if (rows.length < 2 || rows.some((row) => row.cells[0].dataset.part)) continue; // sub-rows
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    if (!head.textContent) return;
    head.tabIndex = 0;
    head.className += " sortable";
    const key = (row) => {
      const text = row.cells[column].textContent.trim().replace(/−/g, "-");
      const value = parseFloat(text);
      return text === "" ? null : Number.isNaN(value) && text !== "inf" ? text : text === "inf" ? Infinity : value;
    };
    const sort = () => {
      const falling = head.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", falling ? "descending" : "ascending");
      const compared = rows.map((row, index) => [key(row), index, row]).sort(([a, i], [b, j]) => {
        if (a === null || b === null) return (a === null) - (b === null) || i - j; // empty cells are always last
        const order = typeof a === typeof b ? (a > b) - (a < b) : typeof a === "number" ? -1 : 1;
        return (falling ? -order : order) || i - j;
      });
      body.append(...compared.map(([, , row]) => row));
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); sort(); } });
  });
}
// Figures: the values of all curves at the step under the pointer.
const number = (y) => (y === null ? "∞" : y >= 1e4 ? y.toExponential(2) : String(+y.toPrecision(4)));
for (const figure of document.querySelectorAll("figure[data-readout]")) {
  const { beside, stacked } = JSON.parse(document.getElementById(figure.dataset.readout).textContent);
  const frame = figure.querySelector(".frame");
  const line = frame.appendChild(Object.assign(document.createElement("div"), { className: "line", hidden: true }));
  const said = frame.appendChild(Object.assign(document.createElement("div"), { className: "said", hidden: true }));
  const leave = () => { line.hidden = said.hidden = true; };
  const move = (event) => {
    const box = frame.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width, y = (event.clientY - box.top) / box.height;
    const panels = matchMedia("(max-width: 40rem)").matches ? stacked : beside;
    const panel = panels.find((one) => x >= one.left && x <= one.right && y >= one.top && y <= one.bottom);
    if (!panel) return leave();
    const [from, to] = panel.range, wanted = from + ((x - panel.left) / (panel.right - panel.left)) * (to - from);
    const every = panel.curves.flatMap((curve) => curve.x);
    if (!every.length) return leave();
    const step = every.reduce((best, one) => (Math.abs(one - wanted) < Math.abs(best - wanted) ? one : best));
    said.replaceChildren(Object.assign(document.createElement("b"), { textContent: step }));
    for (const curve of panel.curves) {
      const index = curve.x.indexOf(step);
      if (index < 0) continue;
      const entry = document.createElement("div"), mark = document.createElement("i");
      mark.style.background = curve.colour;
      entry.append(mark, `${curve.label}: ${number(curve.y[index])}`);
      said.append(entry);
    }
    const at = panel.left + ((step - from) / (to - from)) * (panel.right - panel.left);
    Object.assign(line.style, { left: `${100 * at}%`, top: `${100 * panel.top}%`, height: `${100 * (panel.bottom - panel.top)}%` });
    line.hidden = said.hidden = false;
    said.style.top = `${100 * panel.top}%`;
    said.style.left = at < 0.5 ? `calc(${100 * at}% + 8px)` : "auto";
    said.style.right = at < 0.5 ? "auto" : `calc(${100 * (1 - at)}% + 8px)`;
  };
  frame.addEventListener("pointermove", move);
  frame.addEventListener("pointerdown", move);
  frame.addEventListener("pointerleave", leave);
}
