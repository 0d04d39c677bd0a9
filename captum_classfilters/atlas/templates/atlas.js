"use strict";
// Searching, sorting, the map and the keys; without any of it the pages are whole.

function valueOf(row, column) {
  const cell = row.cells[column];
  const text = cell.dataset.value ?? cell.textContent.trim();
  const number = Number(text);
  return text !== "" && !Number.isNaN(number) ? number : text.toLowerCase();
}

function compare(left, right) {
  if (typeof left === typeof right) return left < right ? -1 : left > right ? 1 : 0;
  return typeof left === "number" ? -1 : 1;
}

function sortBy(table, column, head) {
  const falling = head.getAttribute("aria-sort") === "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", falling ? "descending" : "ascending");
  const body = table.tBodies[0];
  const rows = [...body.rows].map((row) => [valueOf(row, column), row]);
  rows.sort((a, b) => (falling ? -1 : 1) * compare(a[0], b[0]));
  body.append(...rows.map(([, row]) => row));
}

for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => sortBy(table, column, head));
  });
}

const search = document.getElementById("search");
if (search) {
  const rows = [...document.getElementById(search.dataset.table).tBodies[0].rows];
  const texts = rows.map((row) => row.dataset.search.toLowerCase());
  const told = search.parentElement.querySelector("output");
  search.parentElement.hidden = false;
  search.addEventListener("input", () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    rows.forEach((row, place) => {
      row.hidden = !words.every((word) => texts[place].includes(word));
      shown += !row.hidden;
    });
    told.textContent = words.length ? `${shown} of ${rows.length}` : "";
  });
}

const map = document.getElementById("map");
if (map) {
  const { classes, filters, labels } = JSON.parse(document.getElementById("map-data").textContent);
  const told = document.getElementById("map-cell");
  const cellAt = (event) => {
    const box = map.getBoundingClientRect();
    const within = (share, length) => Math.min(length - 1, Math.max(0, Math.floor(share * length)));
    const row = within((event.clientY - box.top) / box.height, classes.length);
    const column = within((event.clientX - box.left) / box.width, filters.length);
    return [classes[row], filters[column]];
  };
  map.addEventListener("mousemove", (event) => {
    const [[name], filter] = cellAt(event);
    const label = labels[filter] ? ` (${labels[filter]})` : "";
    told.textContent = `${name}, filter ${filter}${label}`;
  });
  map.addEventListener("click", (event) => {
    const [[, href]] = cellAt(event);
    if (href) window.location.href = href;
  });
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (/^(input|textarea|select)$/i.test(event.target.tagName)) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const follow = (selector) => {
    const link = document.querySelector(selector);
    if (link) window.location.href = link.href;
  };
  if (event.key === "/" && search) {
    event.preventDefault();
    search.focus();
  } else if (event.key === "ArrowLeft") follow('nav a[rel="prev"]');
  else if (event.key === "ArrowRight") follow('nav a[rel="next"]');
  else if (event.key === "o") follow("nav a");
});
