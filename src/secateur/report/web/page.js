"use strict";
// The page as a whole: what is chosen, what stands where, and the reading anew while runs go on.
(() => {
  const { state, save, make, folded, figures, tables } = PAGE;
  const EVERY = 5000; // milliseconds between looks for newer data
  const FEW = 5; // lines, which need no filter
  const before = {}; // what each section shows, as text: only what has changed is made anew

  let back = state.scroll > 0; // to where the page was left; over once the reader moves

  function restore() { if (back) scrollTo(0, state.scroll); }
  function data() { return window.SECATEUR; }
  function chosen(of, name) { return of.find((one) => one.name === name) ?? of[0]; }

  function fill(section, facts, build) {
    const place = document.querySelector(`#${section} > div`), text = JSON.stringify(facts);
    if (before[section] === text) return;
    before[section] = text;
    const focus = document.activeElement?.id, depth = scrollY;
    figures.forget(place);
    const [children, after] = build();
    place.style.minHeight = `${place.offsetHeight}px`; // what is below stays where it is
    place.replaceChildren(...children);
    figures.queue(after, () => { place.style.minHeight = ""; restore(); });
    if (scrollY !== depth) scrollTo(0, depth);
    if (focus) document.getElementById(focus)?.focus({ preventScroll: true });
  }

  // A sentence whose numbers are not parted from their units.
  function tied(text) { return text.replace(/(?<=\d) (?=[%±kMGTB])|(?<=±) /g, "\u00a0"); }

  function grid(of, key) {
    const made = of.map((facts) => figures.figure(facts, key));
    return [make("div", { class: "grid" }, ...made.map(([element]) => element)), made.map(([, then]) => then)];
  }

  function compare() {
    const part = chosen(data().parts, state.part);
    if (!part) return;
    const { sentences, figure } = part.headline;
    fill("answer", part.headline, () => {
      const [place, after] = grid(figure.id ? [figure] : [], "answer");
      return [[make("ul", { class: "answers" }, ...sentences.map((one) => make("li", {}, tied(one)))), place], after];
    });
    fill("compared", part, () => {
      tables.clear();
      const [place, after] = grid(part.figures, "compared");
      const title = `${part.name}, ${part.seeds} seed${part.seeds > 1 ? "s" : ""}`;
      const parts = part.tables.flatMap((facts, n) => [
        make("h3", {}, facts.title ? `${facts.title}, ${title}` : title),
        ...tables.compared(facts, `table-${n}`, `Table of ${title} ${facts.title}`)]);
      return [[place, ...parts], after];
    });
    document.querySelector("#answer").hidden = !sentences.length;
  }

  let count = 0; // of the scripts that were asked for: an older one's answer must not replace a newer one's

  // Read a script beside the page anew.
  function script(source, then, otherwise) {
    const element = make("script", { src: `${source}?${Date.now()}` });
    element.addEventListener("load", () => { element.remove(); then(); });
    element.addEventListener("error", () => { element.remove(); otherwise(); });
    document.head.append(element);
  }

  function look() {
    const runs = data().runs, run = chosen(runs, state.run), number = count += 1;
    if (!run) return;
    if (run.facts) { show(run.facts); return; }
    const source = `runs/${runs.indexOf(run)}.js`;
    script(source, () => { if (number === count) show(run.facts); }, () => {
      if (number !== count) return;
      fill("looked", source, () => [[make("p", {}, `${source} is missing beside this page.`)], []]);
    });
  }

  function show(run) {
    fill("looked", run, () => {
      const [place, after] = grid(run.figures, "looked");
      const children = [place];
      if (run.failed) children.unshift(make("p", { class: "failed" }, `No result: ${run.failed}`));
      for (const remark of run.remarks) children.push(make("p", {}, remark));
      children.push(make("h3", {}, "Clients that were left out, and why"));
      if (run.left_out.length) {
        children.push(tables.plain("left", ["reason", "requests", "clients"], run.left_out, "Who was left out"));
      } else children.push(make("p", {}, "None."));
      if (run.lost.length) {
        children.push(make("h3", {}, "Clients that had lost their state"),
          tables.plain("lost", ["round", "client"], run.lost, "Lost states"));
      }
      children.push(folded("study", "The study, all settings",
        make("pre", { tabindex: "0", role: "region", "aria-label": "The study as TOML" }, run.study)));
      return [children, after];
    });
  }

  // A choice among names; what was chosen stays chosen as long as it is there.
  function choose(place, label, key, options, then) {
    const names = options.map((option) => option.name), id = `choose-${key}`;
    let select = document.getElementById(id);
    if (!select) {
      select = make("select", { id });
      select.addEventListener("change", () => { state[key] = select.value; save(); then(); });
      document.querySelector(place).append(make("label", {}, `${label} `, select));
    }
    if ([...select.options].map((option) => option.value).join("\n") !== names.join("\n")) {
      select.replaceChildren(...names.map((name) => make("option", { value: name }, name)));
    }
    select.value = names.includes(state[key]) ? state[key] : names[0] ?? "";
    select.parentElement.hidden = options.length < 2;
  }

  function filter() {
    const input = make("input", { type: "search", id: "filter", placeholder: "part of a name" });
    let waiting = 0;
    input.value = state.filter;
    input.addEventListener("input", () => {
      state.filter = input.value.trim();
      tables.narrow();
      clearTimeout(waiting);
      waiting = setTimeout(() => { figures.redraw(); save(); }, 150); // figures follow when the typing pauses
    });
    const place = make("label", {}, "Filter ", input);
    place.hidden = !data().parts.some((part) => part.tables.at(-1).rows.length > FEW);
    document.querySelector("#choices").append(place);
  }

  function themes() {
    const names = ["auto", "light", "dark"];
    const select = make("select", { id: "theme" }, ...names.map((name) => make("option", { value: name }, name)));
    select.value = PAGE.theme();
    select.addEventListener("change", () => PAGE.choose(select.value));
    document.querySelector("#choices").append(make("label", {}, "Theme ", select));
  }

  function update() {
    const facts = data();
    document.title = `${facts.title} · secateur`;
    document.querySelector("#title").textContent = facts.title;
    document.querySelector("#facts").textContent = facts.live ? "Still running; the page follows." : "";
    document.querySelectorAll("header .failed").forEach((element) => element.remove());
    for (const [name, why] of facts.failed) {
      document.querySelector("#facts").after(make("p", { class: "failed" }, `No result, and in no figure: ${name}: ${why}`));
    }
    document.querySelector("#answer").hidden = document.querySelector("#compared").hidden = !facts.parts.length;
    document.querySelector("#looked").hidden = !facts.runs.length;
    choose("#choices", "Partition", "part", facts.parts, compare);
    choose("#runs", "Run", "run", facts.runs, look);
    compare();
    look();
    if (facts.live) setTimeout(() => script("data.js", update, () => setTimeout(update, EVERY)), EVERY);
  }

  update();
  filter();
  themes();
  PAGE.themed(() => figures.redraw());
  for (const kind of ["wheel", "touchstart", "keydown", "pointerdown"]) addEventListener(kind, () => { back = false; }, { once: true });
  restore();
})();
