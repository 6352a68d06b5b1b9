"use strict";
// A click on a heading sorts its table by that column; another click turns the order around.
// Cells without a number stay last either way.
function order(a, b, sign) {
  if (a.number !== null && b.number !== null) return sign * (a.number - b.number);
  if (a.number !== null || b.number !== null) return a.number !== null ? -1 : 1;
  return sign * a.text.localeCompare(b.text, "en", { numeric: true });
}
for (const button of document.querySelectorAll("thead button")) {
  button.addEventListener("click", () => {
    const heading = button.closest("th");
    const column = heading.cellIndex;
    const sign = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    for (const other of heading.parentElement.querySelectorAll("[aria-sort]")) {
      other.setAttribute("aria-sort", "none");
    }
    heading.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
    const body = heading.closest("table").tBodies[0];
    const rows = Array.from(body.rows, (row) => {
      const cell = row.cells[column];
      const value = cell.dataset.value;
      return { row, text: cell.textContent, number: value === undefined ? null : Number(value) };
    });
    rows.sort((a, b) => order(a, b, sign));
    body.append(...rows.map((entry) => entry.row));
  });
}
