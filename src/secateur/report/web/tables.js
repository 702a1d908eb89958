"use strict";
// Tables that can be sorted by each column and filtered by the name of a line.
(() => {
  const { state, save, make, folded, matches } = PAGE;
  const PREFIX = { "": 1, k: 1e3, M: 1e6, G: 1e9, T: 1e12 };
  const narrowing = []; // what hides the rows of a table that the filter does not match

  // The number that a cell begins with, in units: "1.2 MB ± 3 kB" is 1200000; null where it begins with none.
  function numeric(cell) {
    const found = /^\s*([-−+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?)(?:\s*±\s*[\d.]+)?\s*([kMGT]?)(?:B|s)?\b/i.exec(cell);
    return found && Number(found[1].replace("−", "-")) * (PREFIX[found[2]] ?? 1);
  }

  const words = new Intl.Collator("en", { numeric: true });

  // Rows in the order of a column; cells without a number come last, whichever the direction.
  function ordered(rows, column, sign) {
    const numbers = rows.map((row) => numeric(row[column]));
    const counted = column > 0 && numbers.some((value) => value !== null);
    return rows.map((_, n) => n).sort((a, b) => {
      if (!counted) return sign * words.compare(rows[a][column], rows[b][column]) || a - b;
      if (numbers[a] === null || numbers[b] === null) return (numbers[a] === null) - (numbers[b] === null) || a - b;
      return sign * (numbers[a] - numbers[b]) || a - b;
    });
  }

  function table(key, columns, rows, label) {
    const body = make("tbody"), lines = rows.map((row) => make("tr", {}, ...row.map((cell, n) =>
      n === 0 ? make("th", { scope: "row" }, cell) : make("td", /[a-z]{6}/.test(cell) ? { class: "words" } : {}, cell))));
    const heads = columns.map((name, n) => {
      const button = make("button", { type: "button", id: `sort-${key}-${n}` }, name);
      button.addEventListener("click", () => { turn(n); show(); save(); });
      return make("th", { scope: "col" }, button);
    });

    function turn(column) { // a number's first order is from the highest, a name's from A; then the other; then as it was
      const first = column > 0 && rows.some((row) => numeric(row[column]) !== null) ? -1 : 1;
      const [old, sign] = state.sorts[key] ?? [-1, 0];
      if (old !== column) state.sorts[key] = [column, first];
      else if (sign === first) state.sorts[key] = [column, -first];
      else delete state.sorts[key];
    }

    function show() {
      const [column, sign] = state.sorts[key] ?? [-1, 0];
      heads.forEach((head, n) => {
        if (n === column) head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
        else head.removeAttribute("aria-sort");
      });
      body.append(...(column >= 0 && column < columns.length ? ordered(rows, column, sign) : rows.map((_, n) => n)).map((n) => lines[n]));
    }

    show();
    const whole = make("table", {}, make("thead", {}, make("tr", {}, ...heads)), body);
    return { place: make("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": label }, whole), lines, heads };
  }

  function check(key, label, show) {
    const input = make("input", { type: "checkbox", id: `check-${key}` });
    input.checked = Boolean(state.checks[key]);
    input.addEventListener("change", () => { state.checks[key] = input.checked; save(); show(); });
    return [input, make("label", {}, input, ` ${label}`)];
  }

  // A table of the comparison: with its copies, its further columns, and a line for each control where they are many.
  function compared(facts, key, label) {
    const { place, lines, heads } = table(key, facts.columns, facts.rows, label);
    const bar = make("div", { class: "switch" }), many = facts.rows.length > 40 && facts.controls.some(Boolean);
    const [controls, controlled] = check(`${key} controls`, "a line for each control", () => show());
    const [columns, widened] = check(`${key} columns`, "all columns", () => show());
    if (many) bar.append(controlled);
    if (facts.few.includes(false)) bar.append(widened);
    bar.append(copied("Markdown", facts.markdown), copied("LaTeX", facts.latex));
    const none = make("p", { class: "none" }, "No line has a name like that.");

    function show() {
      lines.forEach((line, n) => {
        line.hidden = !matches(facts.rows[n][0]) || (many && facts.controls[n] && !controls.checked);
        [...line.children].forEach((cell, column) => { cell.hidden = !facts.few[column] && !columns.checked; });
      });
      heads.forEach((head, column) => { head.hidden = !facts.few[column] && !columns.checked; });
      none.hidden = lines.some((line) => !line.hidden);
    }

    show();
    narrowing.push(() => { if (place.isConnected) show(); });
    return [place, none, bar, folded(`${key} note`, "How to read this table", make("p", {}, facts.note))];
  }

  function copied(name, text) {
    const button = make("button", { type: "button" }, `Copy as ${name}`);
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(text);
        button.textContent = `Copied as ${name}`;
      } catch {
        const area = make("textarea", { rows: "8", "aria-label": name });
        area.value = text;
        button.after(area);
        area.select();
      }
    });
    return button;
  }

  function narrow() { narrowing.forEach((then) => then()); }
  function clear() { narrowing.length = 0; }

  PAGE.tables = { plain: (...of) => table(...of).place, compared, narrow, clear };
})();
