"use strict";
// What a reader has chosen: partition, run, views, sorting, filter, theme. It survives a reload of the page.
window.PAGE = (() => {
  const KEY = `secateur ${location.pathname}`, THEME = "secateur theme";
  const dark = matchMedia("(prefers-color-scheme: dark)");

  function read(store, key, otherwise) {
    try { return JSON.parse(window[store].getItem(key)) ?? otherwise; } catch { return otherwise; }
  }

  function write(store, key, value) {
    try { window[store].setItem(key, JSON.stringify(value)); } catch { /* a browser that keeps nothing: as it was */ }
  }

  const empty = { part: "", run: "", filter: "", views: {}, shown: {}, sorts: {}, checks: {}, open: {}, scroll: 0 };
  const state = { ...empty, ...read("sessionStorage", KEY, {}) };
  const save = () => write("sessionStorage", KEY, state);

  let theme = read("localStorage", THEME, "auto");
  const listeners = [];

  function apply(name) {
    document.documentElement.dataset.theme = name === "auto" ? (dark.matches ? "dark" : "light") : name;
    listeners.forEach((then) => then());
  }

  function choose(name) {
    theme = name;
    write("localStorage", THEME, name);
    apply(name);
  }

  apply(theme);
  dark.addEventListener("change", () => apply(theme));
  addEventListener("beforeprint", () => apply("light"));
  addEventListener("afterprint", () => apply(theme));
  addEventListener("pagehide", () => { state.scroll = scrollY; save(); });
  if ("scrollRestoration" in history) history.scrollRestoration = "manual";

  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }

  function folded(key, title, ...children) {
    const element = make("details", {}, make("summary", {}, title), ...children);
    element.open = Boolean(state.open[key]);
    element.addEventListener("toggle", () => { state.open[key] = element.open; save(); });
    return element;
  }

  // Whether a name holds every word of the filter.
  function matches(name) {
    const text = name.toLowerCase();
    return state.filter.toLowerCase().split(/\s+/).every((word) => text.includes(word));
  }

  return { state, save, make, folded, matches, choose, theme: () => theme, themed: (then) => listeners.push(then) };
})();
