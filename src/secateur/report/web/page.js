"use strict";
(() => {
  const DATA = window.SECATEUR;
  const drawn = []; // [element, view] of every figure that is on the page

  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }

  function themed(layout) {
    const style = getComputedStyle(document.documentElement);
    const ink = style.getPropertyValue("--ink").trim(), line = style.getPropertyValue("--line").trim();
    const axis = { gridcolor: line, zerolinecolor: line, linecolor: line };
    return {
      ...layout, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink },
      xaxis: { ...axis, ...layout.xaxis }, yaxis: { ...axis, ...layout.yaxis },
      hoverlabel: { namelength: -1 }, autosize: true,
    };
  }

  const CONFIG = { responsive: true, displaylogo: false, toImageButtonOptions: { format: "svg" } };

  function draw(element, view) {
    Plotly.react(element, view.data, themed(view.layout), CONFIG);
    const known = drawn.find(([place]) => place === element);
    if (known) known[1] = view; else drawn.push([element, view]);
  }

  function redraw() { for (const [element, view] of drawn) if (element.isConnected) draw(element, view); }

  function figure(facts, key) {
    const plot = make("div", { class: "plot", role: "group", "aria-label": `${facts.title} ${facts.alt}` });
    const caption = make("figcaption", {}, make("h3", {}, facts.title));
    const element = make("figure", { id: `${key}-${facts.id}` }, caption);
    if (facts.wide) element.className = "wide";
    const { height } = facts.views[0].layout;
    if (height) plot.style.height = `${height}px`;
    if (facts.views.length > 1) {
      const field = make("fieldset", { class: "switch" }, make("legend", {}, "against"));
      facts.views.forEach((view, n) => {
        const input = make("input", { type: "radio", name: `${key}-${facts.id}`, value: String(n) });
        input.checked = n === 0;
        input.addEventListener("change", () => draw(plot, view));
        field.append(make("label", {}, input, ` ${view.name}`));
      });
      element.append(field);
    }
    element.append(plot, make("p", { class: "alt" }, facts.alt));
    return [element, () => draw(plot, facts.views[0])];
  }

  function tabled(columns, rows, label) {
    const head = make("tr", {}, ...columns.map((name) => make("th", { scope: "col" }, name)));
    const body = rows.map((row) => make("tr", {}, ...row.map((cell, n) =>
      n === 0 ? make("th", { scope: "row" }, cell) : make("td", /[a-z]{6}/.test(cell) ? { class: "words" } : {}, cell))));
    const table = make("table", {}, make("thead", {}, head), make("tbody", {}, ...body));
    return make("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": label }, table);
  }

  // A table with its copies; of a long one the controls' own lines are shown when they are asked for.
  function compared(facts, label) {
    const place = tabled(facts.columns, facts.rows, label);
    const bar = make("div", { class: "switch" }, copied("Markdown", facts.markdown), copied("LaTeX", facts.latex));
    const lines = [...place.querySelectorAll("tbody tr")].filter((_, n) => facts.controls[n]);
    if (facts.rows.length > 40 && lines.length) {
      const input = make("input", { type: "checkbox" });
      const show = () => lines.forEach((line) => { line.hidden = !input.checked; });
      input.addEventListener("change", show);
      show();
      bar.prepend(make("label", {}, input, " a line for each control"));
    }
    return [place, bar];
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

  function fill(section, children, after) {
    const place = document.querySelector(`#${section} > div`);
    place.replaceChildren(...children);
    after.forEach((then) => then());
  }

  function compare(part) {
    const figures = part.figures.map((facts) => figure(facts, "compared"));
    const grid = make("div", { class: "grid" }, ...figures.map(([element]) => element));
    const title = `${part.name}, ${part.seeds} seed${part.seeds > 1 ? "s" : ""}`;
    const tables = part.tables.flatMap((facts) => [
      make("h3", {}, facts.title ? `${facts.title}, ${title}` : title),
      make("p", {}, facts.note),
      ...compared(facts, `Table of ${title} ${facts.title}`)]);
    fill("compared", [grid, ...tables], figures.map(([, then]) => then));
  }

  let wanted = null; // the run that was chosen last: another one's script may come later

  function look(run) {
    wanted = run;
    if (run.facts) { show(run.facts); return; }
    const script = make("script", { src: `runs/${DATA.runs.indexOf(run)}.js` });
    script.addEventListener("load", () => { if (wanted === run) show(run.facts); });
    script.addEventListener("error", () => {
      if (wanted === run) fill("looked", [make("p", {}, `${script.getAttribute("src")} is missing beside this page.`)], []);
    });
    document.head.append(script);
  }

  function show(run) {
    const figures = run.figures.map((facts) => figure(facts, "looked"));
    const children = [make("div", { class: "grid" }, ...figures.map(([element]) => element))];
    if (run.failed) children.unshift(make("p", { class: "failed" }, `No result: ${run.failed}`));
    for (const remark of run.remarks) children.push(make("p", {}, remark));
    children.push(make("h3", {}, "Clients that were left out, and why"));
    if (run.left_out.length) {
      children.push(tabled(["reason", "requests", "clients"], run.left_out, "Who was left out"));
    } else children.push(make("p", {}, "None."));
    if (run.lost.length) {
      children.push(make("h3", {}, "Clients that had lost their state"), tabled(["round", "client"], run.lost, "Lost states"));
    }
    children.push(make("h3", {}, "The study"),
      make("pre", { tabindex: "0", role: "region", "aria-label": "The study as TOML" }, run.study));
    fill("looked", children, figures.map(([, then]) => then));
  }

  function choose(label, options, show) {
    const select = make("select", {}, ...options.map((option, n) => make("option", { value: String(n) }, option.name)));
    select.addEventListener("change", () => show(options[Number(select.value)]));
    if (options.length > 1) {
      document.querySelector("#choices").append(make("label", {}, `${label} `, select));
    }
    if (options.length) show(options[0]);
  }

  document.title = `${DATA.title} · secateur`;
  document.querySelector("#title").textContent = DATA.title;
  document.querySelector("#facts").textContent = DATA.live ? "Still running; the page reloads itself." : "";
  for (const [name, why] of DATA.failed) {
    document.querySelector("#facts").after(make("p", { class: "failed" }, `No result, and in no figure: ${name}: ${why}`));
  }
  choose("Partition", DATA.parts, compare);
  if (!DATA.parts.length) document.querySelector("#compared").remove();
  choose("Run", DATA.runs, look);
  if (!DATA.runs.length) document.querySelector("#looked").remove();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  addEventListener("beforeprint", redraw);
  if (DATA.live) setTimeout(() => location.reload(), 10000);
})();
