"use strict";
(() => {
  const GROUPS = ["run", "dataset", "method", "backend"];
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  // Filters: an element goes when any of its data-* names something that is unticked. Marks in figures fade instead.
  const excluded = () => Object.fromEntries(GROUPS.map((group) => [
    group, new Set(all(`input[data-group="${group}"]:not(:checked)`).map((box) => box.value)),
  ]));
  const isOut = (element, out) => GROUPS.some((group) => {
    const value = element.dataset[group];
    return value !== undefined && value !== "" && value.split(" ").every((item) => out[group].has(item));
  });

  function applyFilters() {
    const out = excluded();
    for (const element of all("tbody tr[data-method], .figures figure, .run, details.env")) {
      element.hidden = isOut(element, out);
    }
    for (const mark of all("g.cell")) mark.classList.toggle("off", isOut(mark, out));
    for (const table of all("table[data-filtered]")) {
      const rows = all("tbody tr[data-method]", table);
      const shown = rows.filter((row) => !row.hidden).length;
      table.querySelector("tr.none").hidden = shown > 0;
      table.querySelector(".count").textContent = `${shown} of ${rows.length} rows`;
    }
    const rows = all("#results tbody tr[data-method]");
    const shown = rows.filter((row) => !row.hidden).length;
    document.getElementById("state").textContent = `${shown} of ${rows.length} results shown`;
  }

  // Sorting: a cell without a figure stays below, whichever way the rest goes.
  function sortKey(row, index) {
    const cell = row.cells[index];
    if (cell.dataset.v === undefined) return cell.textContent.trim();
    return cell.dataset.v === "" ? null : Number(cell.dataset.v);
  }
  function sortBy(header) {
    const table = header.closest("table");
    const body = table.tBodies[0];
    const down = header.getAttribute("aria-sort") === "ascending";
    const index = header.cellIndex;
    const rows = all("tr[data-method]", body).map((row) => [sortKey(row, index), row]);
    rows.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);
      const order = typeof a === "number" ? a - b : a.localeCompare(b);
      return down ? -order : order;
    });
    for (const other of all("th[aria-sort]", table)) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...rows.map(([, row]) => row), body.querySelector("tr.none"));
  }

  // Theme: the system's, until a person chooses.
  const root = document.documentElement;
  const isDark = () => (root.dataset.theme
    ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
  const themeButton = document.getElementById("theme");
  function setTheme(theme) {
    if (theme) root.dataset.theme = theme;
    themeButton.setAttribute("aria-pressed", String(isDark()));
    themeButton.textContent = isDark() ? "Light" : "Dark";
  }
  const stored = { // a page opened from a file may have no storage
    get: () => { try { return localStorage.getItem("theme"); } catch { return null; } },
    set: (value) => { try { localStorage.setItem("theme", value); } catch { /* not kept */ } },
  };

  for (const box of all("input[data-group]")) box.addEventListener("change", applyFilters);
  for (const header of all("th[aria-sort]")) header.querySelector("button").addEventListener("click", () => sortBy(header));
  document.getElementById("all").addEventListener("click", () => {
    for (const box of all("input[data-group]")) box.checked = true;
    applyFilters();
  });
  document.getElementById("spread")?.addEventListener("change", (event) => {
    document.body.classList.toggle("with-spread", event.target.checked);
  });
  themeButton.addEventListener("click", () => {
    setTheme(isDark() ? "light" : "dark");
    stored.set(root.dataset.theme);
  });
  for (const link of all('a[href^="#env-"]')) {
    link.addEventListener("click", () => { document.querySelector(link.getAttribute("href")).open = true; });
  }
  if (matchMedia("(max-width: 40rem)").matches) document.querySelector(".filters").open = false;
  setTheme(stored.get());
  applyFilters();
})();
