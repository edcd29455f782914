(() => {
  "use strict";
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const hidden = new Set();
  const root = document.documentElement;

  // ---- colours: "@name" in a figure is the page's custom property --name ----
  const resolve = (value, style) => {
    if (typeof value === "string") return value[0] === "@" ? style.getPropertyValue("--" + value.slice(1)).trim() : value;
    if (Array.isArray(value)) return value.map((v) => resolve(v, style));
    if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, resolve(v, style)]));
    return value;
  };

  const compact = () => window.innerWidth < 560;
  const draw = (box) => {
    const figure = figures[box.dataset.figure];
    if (!figure) return;
    const { data, layout } = resolve(figure, getComputedStyle(root));
    for (const trace of data) {
      trace.visible = !hidden.has(trace.meta);
      // Names beside the markers collide on a phone; the bar of mechanisms is the key there.
      if (compact() && trace.mode === "markers+text") trace.mode = "markers";
    }
    layout.font = { ...layout.font, family: getComputedStyle(document.body).fontFamily };
    layout.autosize = true;
    const buttons = [["zoom2d", "pan2d", "resetScale2d", "toImage"]];
    Plotly.react(box, data, layout, { responsive: true, displaylogo: false, modeBarButtons: buttons, displayModeBar: "hover" });
  };
  const boxes = [...document.querySelectorAll("[data-figure]")];
  const drawAll = () => boxes.forEach(draw);

  // ---- light and dark ----
  const button = document.getElementById("theme");
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
  const label = () => { button.textContent = isDark() ? "Light" : "Dark"; button.setAttribute("aria-label", "Use the " + button.textContent.toLowerCase() + " colours"); };
  button.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; label(); drawAll(); });
  system.addEventListener("change", () => { label(); drawAll(); });
  label();

  // ---- show and hide mechanisms everywhere ----
  const chips = [...document.querySelectorAll(".chip[data-label]")];
  const apply = () => {
    for (const chip of chips) chip.setAttribute("aria-pressed", String(!hidden.has(chip.dataset.label)));
    for (const row of document.querySelectorAll("tr[data-label]")) row.classList.toggle("off", hidden.has(row.dataset.label));
    drawAll();
  };
  for (const chip of chips) {
    chip.addEventListener("click", (event) => {
      const name = chip.dataset.label;
      if (event.altKey || event.shiftKey) { // only this one, and causal
        hidden.clear();
        for (const other of chips) if (other !== chip && other.dataset.label !== "causal") hidden.add(other.dataset.label);
      } else if (!hidden.delete(name)) hidden.add(name);
      apply();
    });
  }
  document.getElementById("all").addEventListener("click", () => { hidden.clear(); apply(); });

  // ---- switches between figures in one panel ----
  for (const group of document.querySelectorAll(".switch")) {
    const box = document.getElementById(group.dataset.plot);
    for (const option of group.querySelectorAll("button")) {
      option.addEventListener("click", () => {
        for (const other of group.querySelectorAll("button")) other.setAttribute("aria-pressed", String(other === option));
        box.dataset.figure = option.dataset.show;
        box.setAttribute("aria-label", figures[option.dataset.show].alt);
        draw(box);
      });
    }
  }

  // ---- tables that sort ----
  for (const table of document.querySelectorAll("table.sortable")) {
    const body = table.tBodies[0];
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const by = head.querySelector("button");
      if (!by) return;
      by.addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        heads.forEach((h) => h.hasAttribute("aria-sort") && h.setAttribute("aria-sort", "none"));
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const value = (row) => { const v = row.cells[column].dataset.v; return v === undefined || v === "" ? null : isNaN(v) ? v : Number(v); };
        const rows = [...body.rows].sort((a, b) => {
          const x = value(a), y = value(b);
          if (x === null || y === null) return (x === null) - (y === null);
          return (x < y ? -1 : x > y ? 1 : 0) * (up ? 1 : -1);
        });
        body.append(...rows);
      });
    });
  }

  drawAll();
  let before = compact();
  window.addEventListener("resize", () => { if (compact() !== before) { before = compact(); drawAll(); } });
})();
