"use strict";
(() => {
  const root = document.documentElement;
  const dark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.getElementById("theme").addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; });

  root.classList.add("js");

  // Tables: sorted by a click on a heading (numbers as numbers, empty values last), filtered by every word of the search,
  // every chosen axis value and the state, and shown page by page.
  const PAGE = 25;
  const value = (row, column) => { const cell = row.cells[column]; return (cell.dataset.value ?? cell.textContent).trim(); };
  for (const table of document.querySelectorAll("table.cells")) {
    const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
    const form = document.querySelector(`form[data-table="${table.id}"]`), pager = document.querySelector(`[data-pager="${table.id}"]`);
    let start = 0;
    const show = () => {
      const kept = [...body.rows].filter((row) => !row.hidden);
      start = Math.max(0, Math.min(start, Math.floor((kept.length - 1) / PAGE) * PAGE));
      kept.forEach((row, at) => row.classList.toggle("off", at < start || at >= start + PAGE));
      if (!pager) return;
      const [back, on] = pager.querySelectorAll("button");
      pager.hidden = kept.length <= PAGE;
      back.disabled = start === 0;
      on.disabled = start + PAGE >= kept.length;
      pager.querySelector("output").textContent = `${start + 1}–${Math.min(start + PAGE, kept.length)} of ${kept.length}`;
    };
    pager?.querySelectorAll("button").forEach((button, k) => button.addEventListener("click", () => { start += k ? PAGE : -PAGE; show(); }));
    heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const keyed = [...body.rows].map((row) => [value(row, column), row]);
      const numeric = keyed.every(([text]) => text === "" || text === "–" || !Number.isNaN(Number(text)));
      const empty = (text) => text === "" || text === "–";
      keyed.sort(([a], [b]) => {
        if (empty(a) || empty(b)) return empty(a) - empty(b);
        const order = numeric ? Number(a) - Number(b) : a.localeCompare(b);
        return down ? -order : order;
      });
      body.append(...keyed.map(([, row]) => row));
      start = 0;
      show();
    }));
    form?.addEventListener("input", () => {
      const rows = [...body.rows], words = form.elements.text.value.toLowerCase().split(/\s+/).filter(Boolean);
      const choices = [...form.querySelectorAll("select[data-column]")].filter((select) => select.value);
      const state = form.elements.state.value;
      for (const row of rows) {
        const text = row.textContent.toLowerCase();
        row.hidden = !(words.every((word) => text.includes(word)) && (!state || row.dataset.state === state)
          && choices.every((select) => row.cells[2 + Number(select.dataset.column)].textContent === select.value));
      }
      const shown = rows.filter((row) => !row.hidden).length;
      form.querySelector("output").textContent = shown === rows.length ? `${rows.length} cells` : `${shown} of ${rows.length} cells`;
      start = 0;
      show();
    });
    form?.addEventListener("submit", (event) => event.preventDefault());
    show();
  }

  // The horizontal axis of the curves.
  for (const choice of document.querySelectorAll(".effort input")) choice.addEventListener("change", () => {
    root.dataset.effort = choice.value;
    for (const other of document.querySelectorAll(`.effort input[value="${choice.value}"]`)) other.checked = true;
  });

  // Many axes make a wide table: their columns are shown on request.
  for (const button of document.querySelectorAll("[data-columns]")) button.addEventListener("click", () => {
    const table = document.getElementById(button.dataset.columns), brief = table.classList.toggle("brief");
    table.classList.toggle("wide-axes", !brief);
    button.setAttribute("aria-pressed", String(!brief));
    button.textContent = brief ? "Show axes" : "Hide axes";
  });

  // A link to a cell opens it.
  const open = () => { const target = document.getElementById(decodeURIComponent(location.hash.slice(1))); if (target?.tagName === "DETAILS") { target.open = true; target.scrollIntoView(); } };
  addEventListener("hashchange", open); open();

  // Tooltips, for pointers and for the keyboard; SVG titles become the same tooltip.
  const tip = document.getElementById("tooltip");
  for (const title of document.querySelectorAll("svg .tip > title")) { title.parentNode.dataset.tip = title.textContent; title.remove(); }
  const show = (event) => {
    const target = event.target.closest?.("[data-tip]");
    if (!target) { tip.hidden = true; return; }
    tip.textContent = target.dataset.tip;
    tip.hidden = false;
    const box = target.getBoundingClientRect(), own = tip.getBoundingClientRect();
    const pointer = event.clientX !== undefined && event.type !== "focusin";
    const x = pointer ? event.clientX : box.left + box.width / 2, y = pointer ? event.clientY : box.top;
    tip.style.left = `${Math.min(Math.max(x - own.width / 2, 8), innerWidth - own.width - 8)}px`;
    tip.style.top = `${y - own.height - 12 > 4 ? y - own.height - 12 : y + 18}px`;
  };
  document.addEventListener("pointerover", show);
  document.addEventListener("focusin", show);
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });
  addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

  for (const button of document.querySelectorAll("[data-copy]")) button.addEventListener("click", async () => {
    const text = document.getElementById(button.dataset.copy).innerText;
    try { await navigator.clipboard.writeText(text); button.textContent = "Copied"; } catch { getSelection().selectAllChildren(document.getElementById(button.dataset.copy)); }
  });

  // Printing shows every cell that the reader opened, and the figures in light colours.
  let before;
  addEventListener("beforeprint", () => { before = root.dataset.theme; root.dataset.theme = "light"; });
  addEventListener("afterprint", () => { if (before) root.dataset.theme = before; else delete root.dataset.theme; });
})();
