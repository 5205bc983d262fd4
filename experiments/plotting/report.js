"use strict";
(() => {
  const GROUPS = ["run", "dataset", "method", "backend"];
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const byId = (id) => document.getElementById(id);
  const boxes = all("input[data-group]");

  // Marks of figures carry their method and backend in the id that matplotlib gave their group.
  const marks = all('g[id*="cell--"]');
  for (const mark of marks) {
    [, mark.dataset.method, mark.dataset.backend] = mark.id.slice(mark.id.lastIndexOf("cell--")).split("--");
  }

  // Filters: what has any data-* that is all unticked goes; marks in figures fade instead.
  function applyFilters() {
    const out = new Set(boxes.filter((box) => !box.checked).map((box) => `${box.dataset.group} ${box.value}`));
    const isOut = (element) => GROUPS.some((group) => {
      const values = element.dataset[group];
      return values && values.split(" ").every((value) => out.has(`${group} ${value}`));
    });
    for (const element of all("main [data-run], main tr[data-method], figure, details[data-run]")) element.hidden = isOut(element);
    for (const mark of marks) mark.classList.toggle("off", isOut(mark));
    for (const table of all("table.sorted")) {
      const rows = all("tr[data-method]", table);
      const shown = rows.filter((row) => !row.hidden).length;
      table.querySelector("tr.none").hidden = shown > 0;
      table.querySelector(".count").textContent = `${shown} of ${rows.length} rows`;
    }
    const rows = all("#results tr[data-method]");
    byId("state").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} results shown`;
  }

  // Sorting: a cell without a figure stays below, whichever way the rest goes.
  function sortBy(header) {
    const table = header.closest("table");
    const sign = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    const key = (row) => row.cells[header.cellIndex].dataset.v ?? row.cells[header.cellIndex].textContent.trim();
    const isText = !header.classList.contains("number");
    const rows = all("tr[data-method]", table).sort((a, b) => {
      const [one, other] = [key(a), key(b)];
      if (one === "" || other === "") return (one === "") - (other === "");
      return sign * (isText ? one.localeCompare(other) : one - other);
    });
    for (const other of all("[aria-sort]", table)) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    table.tBodies[0].append(...rows, table.querySelector("tr.none"));
  }

  // Theme: the system's, until a person chooses.
  const root = document.documentElement;
  const isDark = () => (root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "")) === "dark";
  function setTheme(theme) {
    if (theme) root.dataset.theme = theme;
    byId("theme").textContent = isDark() ? "Light" : "Dark";
    byId("theme").setAttribute("aria-pressed", isDark());
  }
  byId("theme").addEventListener("click", () => {
    setTheme(isDark() ? "light" : "dark");
    try { localStorage.setItem("theme", root.dataset.theme); } catch { /* a page opened from a file may have no storage */ }
  });
  try { setTheme(localStorage.getItem("theme")); } catch { setTheme(null); }

  for (const box of boxes) box.addEventListener("change", applyFilters);
  for (const header of all("[aria-sort]")) header.querySelector("button").addEventListener("click", () => sortBy(header));
  byId("all").addEventListener("click", () => { for (const box of boxes) box.checked = true; applyFilters(); });
  byId("spread")?.addEventListener("change", (event) => document.body.classList.toggle("with-spread", event.target.checked));
  for (const link of all('a[href^="#env-"]')) {
    link.addEventListener("click", () => { document.querySelector(link.getAttribute("href")).open = true; });
  }
  if (matchMedia("(max-width: 40rem)").matches) document.querySelector(".filters").open = false;
  applyFilters();
})();
