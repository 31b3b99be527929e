// What a reader may do beyond reading: one table over all arms, the data to keep, videos that play by themselves.
"use strict";

// figures are written with their units
const UNITS = { "µs": 1e-6, ms: 1e-3, KiB: 2 ** 10, MiB: 2 ** 20, GiB: 2 ** 30, "%": 0.01 };
const FIGURE = /^(-?\d[\d.]*(?:e[-+]?\d+)?)\s*([^\s\d(,]*)/;
// what may be chosen from a list: of more, or of longer ones, one is found sooner by typing
const MOST_CHOICES = 40;
const LONGEST_CHOICE = 40;

const escaped = (text) => new Option(text).innerHTML;

// what is searched is escaped too: the library reads it as HTML
function cell(shown, written) {
  const text = written === "–" ? "" : written;
  const [, number, unit] = FIGURE.exec(text) ?? [];
  return { shown, text, search: escaped(text), value: number ? number * (UNITS[unit] ?? 1) : NaN };
}

// the rows that the tables of the workloads have; what is shown comes escaped from them, and stays so
function rowsOfPage(heads) {
  const rows = [];
  for (const table of document.querySelectorAll("table[data-place]")) {
    const place = JSON.parse(table.dataset.place).map((text) => cell(escaped(text), text));
    const columns = [...table.tHead.rows[0].cells].map((head) => head.dataset.column);
    for (const row of table.tBodies[0].rows) {
      const found = new Map([...row.cells].map((one, i) => [columns[i], cell(one.innerHTML, one.textContent.trim())]));
      rows.push(heads.map((head) => place[head.dataset.place] ?? found.get(head.dataset.column) ?? cell("–", "")));
    }
  }
  return rows;
}

function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

// what is missing stands last, whichever way a reader sorts
const ordered = (sign) => (a, b) => Number.isNaN(a) - Number.isNaN(b) || sign * (a - b);
DataTable.type("figure", { order: { asc: ordered(1), desc: ordered(-1) } });

function tableOverAll() {
  const whole = document.getElementById("arms");
  const heads = [...whole.tHead.rows[0].cells];
  const names = heads.map((head) => head.firstChild.textContent);
  const hints = heads.map((head) => head.querySelector("small")?.textContent ?? "");
  const rows = rowsOfPage(heads);
  const kinds = heads.map((_, i) => [...new Set(rows.map((row) => row[i].text))].filter(Boolean));
  const figures = heads.map((_, i) => rows.every((row) => !row[i].text || !Number.isNaN(row[i].value)));
  const visible = heads.map((head, i) => kinds[i].length > 0 && ("first" in head.dataset || (head.dataset.place && kinds[i].length > 1)));
  const table = new DataTable(whole, {
    data: rows,
    columns: heads.map((_, i) => ({
      data: i,
      type: figures[i] ? "figure" : "string",
      render: { _: "shown", filter: "search", sort: figures[i] ? "value" : "text", type: "text" },
      visible: Boolean(visible[i]),
      cellType: i ? "td" : "th",
      createdCell: (one) => i || (one.scope = "row"),
    })),
    order: [],
    autoWidth: false,
    lengthMenu: [25, 100, { label: "all", value: -1 }],
    pageLength: 25,
    paging: rows.length > 25,
    language: {
      search: "Search", lengthMenu: "_MENU_ arms a page", info: "_START_ to _END_ of _TOTAL_ arms",
      infoEmpty: "no arm", infoFiltered: "(of _MAX_)", zeroRecords: "No arm is like that.",
    },
  });

  const choices = document.getElementById("choices");
  heads.forEach((head, i) => {
    const few = kinds[i].length > 1 && kinds[i].length <= MOST_CHOICES;
    if (!few || kinds[i].some((kind) => kind.length > LONGEST_CHOICE) || !("place" in head.dataset || (!figures[i] && i))) return;
    const select = element("select", {}, new Option("all", ""), ...kinds[i].map((kind) => new Option(kind)));
    select.onchange = () => table.column(i).search.fixed("choice", select.value && ((text) => text === select.value)).draw();
    choices.append(element("label", {}, names[i], select));
  });
  const columns = document.getElementById("columns");
  heads.forEach((_, i) => {
    if (!i || !kinds[i].length) return;
    const box = element("input", { type: "checkbox", checked: visible[i] });
    box.onchange = () => table.column(i).visible(box.checked);
    columns.append(element("label", {}, box, names[i], " ", element("small", {}, hints[i])));
  });
}

// the page holds its data itself: a link gives it where the files beside the page are missing too
async function keep(event) {
  const { held } = event.target.dataset;
  event.preventDefault();
  const packed = Uint8Array.from(atob(document.getElementById(held).textContent), (one) => one.charCodeAt(0));
  const data = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const url = URL.createObjectURL(await new Response(data).blob());
  element("a", { href: url, download: event.target.download }).click();
  URL.revokeObjectURL(url);
}

for (const part of document.querySelectorAll("[data-script]")) part.hidden = false;
tableOverAll();
// their rows are in the table over all arms
for (const part of document.querySelectorAll("details.arms")) part.open = false;
for (const link of document.querySelectorAll("a[data-held]")) link.onclick = keep;

// videos play while they are seen, unless a reader wants no motion
if (!matchMedia("(prefers-reduced-motion: reduce)").matches) {
  const seen = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) isIntersecting ? target.play().catch(() => {}) : target.pause();
  });
  for (const video of document.querySelectorAll("video")) seen.observe(video);
}
