"use strict";
// Figures: drawn by plotly in the page's theme, with a legend of buttons, titles that fit, and names beside points.
(() => {
  const { state, save, make, folded, matches } = PAGE;
  const CONFIG = { displaylogo: false, responsive: false, toImageButtonOptions: { format: "svg" } };
  const FONT = { family: "system-ui, sans-serif", size: 13 }, TITLE = 14, NAME = 12; // sizes in pixels
  const ROOM = 520; // a plot narrower than this has numbers instead of names
  const drawn = new Map(); // of every plot on the page, how to draw it

  const pen = document.createElement("canvas").getContext("2d");
  function width(text, size) {
    pen.font = `${size}px ${FONT.family}`;
    return pen.measureText(text).width;
  }

  // Text broken into lines that are no wider than some pixels.
  function wrapped(text, room) {
    const lines = [];
    for (const word of text.split(" ")) {
      const longer = lines.length ? `${lines.at(-1)} ${word}` : word;
      if (lines.length && width(longer, TITLE) <= room) lines[lines.length - 1] = longer;
      else lines.push(word);
    }
    return lines.join("<br>");
  }

  function themed(layout) {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const ink = colour("--ink"), axis = { gridcolor: colour("--grid"), zerolinecolor: colour("--faint"), linecolor: colour("--line") };
    const titled = (of) => ({ ...axis, ...of, title: { ...of.title, font: { size: TITLE }, standoff: 8 } });
    return {
      ...layout, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { ...FONT, color: ink },
      xaxis: titled(layout.xaxis), yaxis: titled(layout.yaxis),
      showlegend: false, hoverlabel: { namelength: -1 }, autosize: true, height: undefined,
      margin: { l: 10, r: 16, t: 12, b: 10 }, modebar: { color: colour("--faint"), activecolor: ink, bgcolor: "rgba(0,0,0,0)" },
    };
  }

  // Break the titles of axes, which stand in the middle of their axis, where they would not be whole.
  function fit(plot, layout) {
    const { xaxis, yaxis } = plot._fullLayout, change = {};
    const room = (axis, whole) => 2 * Math.min(axis._offset + axis._length / 2, whole - axis._offset - axis._length / 2) - 8;
    const across = wrapped(layout.xaxis.title.text, room(xaxis, plot.clientWidth));
    const up = wrapped(layout.yaxis.title.text, room(yaxis, plot.clientHeight));
    if (across !== layout.xaxis.title.text) change["xaxis.title.text"] = across;
    if (up !== layout.yaxis.title.text) change["yaxis.title.text"] = up;
    if (Object.keys(change).length) Plotly.relayout(plot, change);
  }

  function bars(trace, ink) {
    const found = {};
    for (const name of ["error_x", "error_y"]) {
      if (trace[name]) found[name] = { ...trace[name], color: trace.type === "bar" ? ink : trace.marker.color };
    }
    return found;
  }

  // A view without the lines that the filter leaves out; those that it finds are visible.
  function narrowed(view, shown) {
    const keep = (trace) => !trace.meta?.line || matches(trace.meta.line);
    const data = view.data.filter(keep).map((trace) => {
      const group = trace.legendgroup ?? trace.name, said = shown[group];
      const visible = said ?? (state.filter && trace.meta?.line ? true : trace.visible ?? true);
      const own = trace.meta?.rows ? rows(trace) : trace;
      return { ...own, visible: visible === true ? true : "legendonly" };
    });
    const listed = view.data.some((trace) => trace.meta?.rows);
    if (!state.filter || !listed) return [data, view.layout];
    const names = [...new Set(data.flatMap((trace) => trace.y ?? []))];
    const yaxis = { ...view.layout.yaxis, range: [names.length - 0.4, -0.6] };
    return [data, { ...view.layout, yaxis }];
  }

  // A trace whose points each belong to a line, without those of other lines.
  function rows(trace) {
    const at = trace.y.map((name, n) => (matches(name) ? n : -1)).filter((n) => n >= 0);
    const only = (of) => at.map((n) => of[n]);
    return { ...trace, x: only(trace.x), y: only(trace.y), error_x: { ...trace.error_x, array: only(trace.error_x.array) } };
  }

  // ---- names beside points

  const TURNS = [[1, 0], [-1, 0], [0, -1], [0, 1], [0.7, -0.7], [-0.7, -0.7], [0.7, 0.7], [-0.7, 0.7],
    [0.92, -0.38], [0.92, 0.38], [-0.92, -0.38], [-0.92, 0.38]];
  const REACH = [10, 20, 34, 52, 74, 100]; // pixels between a point and its name
  const FAR = 34; // a name that must stand further from its point is hard to follow: then all have numbers
  const GAP = 2; // pixels between two names

  function apart(a, b) {
    return a.x + a.w / 2 + GAP <= b.x - b.w / 2 || b.x + b.w / 2 + GAP <= a.x - a.w / 2
      || a.y + a.h / 2 + GAP <= b.y - b.h / 2 || b.y + b.h / 2 + GAP <= a.y - a.h / 2;
  }

  // A box for each text, the first free place around its point; null where there is none. The same points, the same boxes.
  function spread(points, texts, markers, room) {
    const boxes = [];
    points.forEach((point, n) => {
      const w = width(texts[n], NAME) + 8, h = NAME + 8;
      const tries = REACH.flatMap((reach) => TURNS.map(([ux, uy]) => ({
        x: point.x + ux * reach + (Math.abs(ux) > 0.1 ? Math.sign(ux) * w / 2 : 0),
        y: point.y + uy * reach + (Math.abs(uy) > 0.5 ? Math.sign(uy) * h / 2 : 0), w, h, reach })));
      boxes.push(tries.find((box) => box.x - w / 2 >= 0 && box.x + w / 2 <= room.w && box.y - h / 2 >= 0 && box.y + h / 2 <= room.h
        && boxes.every((other) => !other || apart(box, other)) && markers.every((other) => apart(box, other))) ?? null);
    });
    return boxes;
  }

  // Names of the points that ask for one; where they do not fit, numbers, with a key below the figure.
  function label(plot, key) {
    const { xaxis, yaxis } = plot._fullLayout;
    const at = (trace) => ({ trace, x: xaxis.d2p(trace.x[0]), y: yaxis.d2p(trace.y[0]) });
    const spots = plot.data.filter((trace) => trace.visible === true && trace.meta?.label !== undefined).map(at);
    const points = spots.filter((spot) => spot.trace.meta.label).sort((a, b) => a.x - b.x || a.y - b.y);
    if (!spots.length) { key.replaceChildren(); return; }
    const markers = spots.map(({ x, y }) => ({ x, y, w: 12, h: 12 })), room = { w: xaxis._length, h: yaxis._length };
    const names = points.map(({ trace }) => trace.name), numbers = points.map((_, n) => String(n + 1));
    let texts = names, boxes = room.w >= ROOM ? spread(points, names, markers, room) : [null];
    if (boxes.some((box) => !box || box.reach > FAR)) [texts, boxes] = [numbers, spread(points, numbers, markers, room)];
    const style = getComputedStyle(document.documentElement);
    const faint = style.getPropertyValue("--faint").trim(), paper = style.getPropertyValue("--paper").trim();
    const annotations = points.flatMap(({ trace, x, y }, n) => (boxes[n] ? [{
      x: xaxis.type === "log" ? Math.log10(trace.x[0]) : trace.x[0], y: trace.y[0], text: texts[n].replaceAll("<", "&lt;"),
      font: { size: NAME }, borderpad: 1, bgcolor: `${paper}cc`, showarrow: true, arrowhead: 0, arrowwidth: boxes[n].reach > 10 ? 1 : 0.1,
      arrowcolor: boxes[n].reach > 10 ? faint : "rgba(0,0,0,0)", standoff: 6,
      ax: boxes[n].x - x, ay: boxes[n].y - y }] : []));
    key.replaceChildren(...(texts === numbers ? points.map(({ trace }) => make("li", {}, swatch(trace), ` ${trace.name}: ${trace.text[0]}`)) : []));
    return Plotly.relayout(plot, { annotations });
  }

  // ---- legends

  const STROKES = { solid: "", dash: "6 4", dot: "2 3", dashdot: "7 3 2 3", longdash: "11 4", longdashdot: "11 3 2 3" };
  const CORNERS = { square: [4, 45], diamond: [4, 0], "triangle-up": [3, 0], pentagon: [5, 0], hexagon: [6, 0] };
  const STARS = { star: 5, hexagram: 6, "star-square": 4, "star-diamond": 4 };

  function around(count, radius, turn = 0) {
    return Array.from({ length: count }, (_, n) => {
      const angle = (turn + (360 * n) / count - 90) * Math.PI / 180, r = typeof radius === "function" ? radius(n) : radius;
      return `${(13 + r * Math.cos(angle)).toFixed(1)},${(7 + r * Math.sin(angle)).toFixed(1)}`;
    }).join(" ");
  }

  function drawing(tag, attributes) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  }

  function swatch(trace) {
    const place = drawing("svg", { width: 26, height: 14, "aria-hidden": "true" });
    const colour = trace.line?.color ?? trace.marker?.color ?? "#7F7F7F", mode = trace.mode ?? "";
    if (trace.type === "bar") place.append(drawing("rect", { x: 6, y: 1, width: 12, height: 12, fill: colour }));
    if (mode.includes("lines")) {
      const dash = STROKES[trace.line.dash ?? "solid"] ?? trace.line.dash.replaceAll("px", "").replaceAll(",", " ");
      place.append(drawing("line", { x1: 0, x2: 26, y1: 7, y2: 7, stroke: colour, "stroke-width": 2.5, "stroke-dasharray": dash }));
    }
    if (mode.includes("markers")) {
      const symbol = trace.marker.symbol ?? "circle";
      if (CORNERS[symbol]) place.append(drawing("polygon", { points: around(CORNERS[symbol][0], 6, CORNERS[symbol][1]), fill: colour }));
      else if (STARS[symbol]) place.append(drawing("polygon", { points: around(2 * STARS[symbol], (n) => (n % 2 ? 3 : 6.5)), fill: colour }));
      else if (symbol === "cross" || symbol.startsWith("x")) {
        const turn = symbol === "cross" ? "" : "rotate(45 13 7)";
        place.append(drawing("path", { d: "M13 1V13M7 7H19", stroke: colour, "stroke-width": symbol.includes("thin") ? 1.5 : 4, transform: turn }));
      } else place.append(drawing("circle", { cx: 13, cy: 7, r: 5, fill: colour }));
    }
    return place;
  }

  function legend(view, key, change) {
    const shown = state.shown[key] ??= {};
    const items = view.data.filter((trace) => trace.showlegend !== false && !trace.meta?.label); // others are named beside
    if (view.data.filter((trace) => trace.showlegend !== false).length < 2) return [];
    return items.map((trace, n) => {
      const group = trace.legendgroup ?? trace.name;
      const button = make("button", { type: "button", id: `legend-${key}-${n}` }, swatch(trace), make("span", {}, trace.name));
      const now = () => shown[group] ?? (state.filter && trace.meta?.line ? true : trace.visible ?? true) === true;
      button.setAttribute("aria-pressed", now());
      button.addEventListener("click", () => { shown[group] = !now(); button.setAttribute("aria-pressed", now()); save(); change(); });
      const item = make("li", {}, button);
      item.hidden = Boolean(trace.meta?.line) && !matches(trace.meta.line);
      return item;
    });
  }

  // ---- a figure

  function figure(facts, section) {
    const id = `${section}-${facts.id}`;
    const plot = make("div", { class: "plot", role: "group", "aria-label": `${facts.title}. ${facts.alt}` });
    const heading = make("h3", {}, facts.title);
    const element = make("figure", { id }, make("figcaption", {}, heading, ...(facts.caption ? [make("p", {}, facts.caption)] : [])));
    const names = make("ul", { class: "legend" }), key = make("ol", { class: "key" });
    if (facts.wide) element.className = "wide";
    const { height } = facts.views[0].layout;
    if (height) plot.style.height = `${height}px`;

    function draw() {
      const view = facts.views.find((one) => one.name === state.views[id]) ?? facts.views[0];
      if (height) {
        const rows = new Set(narrowed(view, {})[0].flatMap((trace) => (trace.meta?.rows ? trace.y : []))).size;
        if (rows) plot.style.height = `${Math.min(height, 120 + 26 * Math.max(rows, 3))}px`;
      }
      names.replaceChildren(...legend(view, id, draw));
      const [data, layout] = narrowed(view, state.shown[id] ?? {}), made = themed(layout);
      Plotly.react(plot, data.map((trace) => ({ ...trace, ...bars(trace, made.font.color) })), made, CONFIG);
      fit(plot, made);
      label(plot, key);
    }

    if (facts.views.length > 1) {
      const field = make("fieldset", { class: "switch" }, make("legend", {}, "against"));
      const now = facts.views.some((view) => view.name === state.views[id]) ? state.views[id] : facts.views[0].name;
      facts.views.forEach((view, n) => {
        const input = make("input", { type: "radio", name: id, value: view.name, id: `view-${id}-${n}` });
        input.checked = view.name === now;
        input.addEventListener("change", () => { state.views[id] = view.name; save(); draw(); });
        field.append(make("label", {}, input, ` ${view.name}`));
      });
      element.append(field);
    }
    element.append(plot, key, names, folded(`words ${id}`, "In words", make("p", { class: "alt" }, facts.alt)));
    return [element, () => { drawn.set(plot, draw); draw(); watch(plot, key); }];
  }

  const seen = new ResizeObserver((entries) => entries.forEach(({ target, contentRect }) => {
    if (target.width === contentRect.width) return;
    const first = target.width === undefined;
    target.width = contentRect.width;
    if (!first) requestAnimationFrame(() => target.isConnected && drawn.get(target)?.());
  }));

  function watch(plot, key) {
    seen.observe(plot);
    plot.on("plotly_relayout", (change) => { // a zoom moves points apart; names stay where they fit
      if (Object.keys(change).some((name) => name.includes("axis") && !name.includes("title"))) label(plot, key);
    });
  }

  // Draw one after the other, so that the page answers meanwhile; then do something.
  const waiting = [];
  function queue(tasks, then) {
    waiting.push(...tasks, then);
    if (waiting.length === tasks.length + 1) setTimeout(next, 0);
  }
  function next() {
    waiting[0]();
    waiting.shift();
    if (waiting.length) setTimeout(next, 0);
  }

  function forget(place) {
    for (const plot of place.querySelectorAll(".plot")) {
      drawn.delete(plot);
      seen.unobserve(plot);
      if (plot._fullLayout) Plotly.purge(plot);
    }
  }

  let turn = 0; // a newer change makes an older drawing of all figures needless
  function redraw() {
    const now = turn += 1;
    for (const [plot, draw] of drawn) setTimeout(() => { if (now === turn && plot.isConnected) draw(); }, 0);
  }

  PAGE.figures = { figure, queue, forget, redraw };
})();
