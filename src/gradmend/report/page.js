"use strict";
// The theme, the figures (drawn when they come near), dials and copy buttons of a page.
window.gradmend = (() => {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const paper = matchMedia("print");
  const THEMES = ["auto", "light", "dark"];
  const PAPER = 680; // pixels of a sheet between its margins
  const MOST_ROWS = 500; // of a table of numbers
  const FOCUS = "a, button, summary, input, select, [tabindex]";
  const figures = new Map(); // id -> its JSON, and once it is drawn what that says
  let style, words, near, printing;
  let ready = Promise.resolve(); // once there is plotly

  // Browsers may forbid a page on disk to remember.
  const remembered = () => { try { return localStorage.getItem("gradmend-theme"); } catch { return null; } };
  const remember = (theme) => { try { localStorage.setItem("gradmend-theme", theme); } catch { /* for now only */ } };

  let theme = THEMES.includes(remembered()) ? remembered() : "auto";
  const dark = () => !paper.matches && (theme === "auto" ? system.matches : theme === "dark");

  function setTheme(chosen) {
    theme = chosen;
    if (theme === "auto") delete root.dataset.theme; else root.dataset.theme = theme;
  }
  setTheme(theme);

  function nameTheme() {
    document.getElementById("theme").textContent = `${words.theme}: ${words[theme]}`;
  }

  function nextTheme() {
    setTheme(THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length]);
    remember(theme);
    nameTheme();
    redraw();
  }

  // Rows of numbers stay shared; plotly does not change them.
  const numbers = (row) => typeof row[0] === "number" && typeof row.at(-1) === "number";

  function painted(value) {
    if (typeof value === "string") return dark() ? style.colours[value] ?? value : value;
    if (Array.isArray(value)) return numbers(value) ? value : value.map(painted);
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, each]) => [key, painted(each)]));
  }

  function figure(id) {
    const held = figures.get(id);
    if (held && !held.made) held.made = JSON.parse(held.text);
    return held?.made;
  }

  // What is shown must not wait until the code of plotly is unpacked and read, which takes most of a second.
  async function unpacked(held) {
    const letters = atob(held.textContent), bytes = new Uint8Array(letters.length);
    for (let at = 0; at < bytes.length; at++) bytes[at] = letters.charCodeAt(at); // ten times as fast as `from`
    const code = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(code).text();
    document.head.append(script);
  }

  async function draw(box) {
    box.dataset.drawn = "";
    await ready;
    const held = figure(box.dataset.shown);
    if (!held) { Plotly.purge(box); return; }
    const layout = painted({ ...held.layout, template: style.template });
    // With a width alone plotly would take that of the window once it changes.
    const sheet = { width: PAPER, height: box.clientHeight, autosize: false };
    const size = printing || paper.matches ? sheet : { autosize: true };
    const config = { displayModeBar: false, responsive: true, showTips: false, doubleClick: "reset" };
    Plotly.react(box, painted(held.data), { ...layout, ...size }, config);
  }

  const boxes = () => [...document.querySelectorAll(".plot")];
  const redraw = () => boxes().filter((box) => "drawn" in box.dataset).forEach((box) => draw(box));

  function print(on) {
    printing = on;
    for (const box of boxes()) if (on || "drawn" in box.dataset) draw(box);
  }

  // The numbers of a figure as rows of texts: what hovering tells, for those who do not hover.
  function rows(box) {
    const found = [];
    for (const trace of (box._fullData ?? []).filter((each) => each.visible === true && each.hoverinfo !== "skip")) {
      const { name, x, y, z, hovertext } = trace;
      if (z) z.forEach((row, at) => [...row].forEach((value, to) => found.push([y?.[at] ?? at, x?.[to] ?? to, value])));
      else [...(y ?? [])].forEach((value, at) => found.push([name, x?.[at] ?? at, value, Array.isArray(hovertext) ? hovertext[at] : ""]));
    }
    return found.map((row) => row.map(written));
  }

  const written = (value) => typeof value === "number" ? String(Number(value.toPrecision(4))) : String(value ?? "-").replaceAll("<br>", " ");

  async function tell(details) {
    const box = details.closest("figure").querySelector(".plot");
    await ("drawn" in box.dataset ? ready : draw(box));
    const all = rows(box), table = document.createElement("table");
    for (const row of all.slice(0, MOST_ROWS)) {
      const line = table.insertRow();
      for (const text of row) line.insertCell().textContent = text;
    }
    const rest = document.createElement("p");
    rest.textContent = all.length > MOST_ROWS ? `${MOST_ROWS} / ${all.length}` : "";
    details.querySelector("div").replaceChildren(table, rest);
  }

  function turn(dial) {
    const at = [...dial.querySelectorAll("input, select")].map((each) => Number(each.value));
    for (const slider of dial.querySelectorAll("input")) {
      const choice = JSON.parse(slider.dataset.choices)[slider.value];
      slider.setAttribute("aria-valuetext", choice);
      slider.nextElementSibling.value = choice;
    }
    const box = dial.querySelector(".plot");
    const chosen = JSON.parse(dial.dataset.places)[at.join("-")];
    if (chosen !== box.dataset.shown) choose(dial, box, chosen);
  }

  function choose(dial, box, chosen) {
    box.dataset.shown = chosen ?? "";
    const { title, words: told } = figure(chosen) ?? { title: words.missing, words: "" };
    for (const [name, text] of [["h3", title], ["figcaption p", told]]) {
      const place = dial.querySelector(name);
      if (place) place.textContent = text;
    }
    box.setAttribute("aria-label", [title, told].filter(Boolean).join(". "));
    if ("drawn" in box.dataset) draw(box);
    const numbers = dial.querySelector(".numbers[open]");
    if (numbers) tell(numbers);
  }

  async function copy(button) {
    const source = button.closest("figure").querySelector("code");
    let done = true;
    try { await navigator.clipboard.writeText(source.textContent); } catch {
      getSelection().selectAllChildren(source);
      done = document.execCommand("copy");
    }
    const before = button.textContent;
    button.textContent = done ? words.copied : words.select;
    setTimeout(() => { button.textContent = before; }, 2000);
  }

  function hold(id, text) {
    const same = figures.get(id)?.text === text;
    if (!same) figures.set(id, { text });
    return !same;
  }

  function arrange(within) {
    for (const box of within.querySelectorAll(".plot:not([data-drawn])")) near.observe(box);
    for (const dial of within.querySelectorAll(".dial")) {
      turn(dial);
      dial.addEventListener("input", () => turn(dial));
    }
    for (const details of within.querySelectorAll(".numbers")) {
      if (details.open) tell(details);
      details.addEventListener("toggle", () => details.open && tell(details));
    }
    for (const button of within.querySelectorAll(".copy")) button.addEventListener("click", () => copy(button));
  }

  // Swaps the main part for a newer one; what was drawn, unfolded, chosen or focused stays so.
  function show({ html, figures: told }) {
    const main = document.getElementById("main");
    const made = new DOMParser().parseFromString(html, "text/html").body;
    const changed = new Set(Object.keys(told).filter((id) => hold(id, told[id])));
    const focus = [...main.querySelectorAll(FOCUS)].indexOf(document.activeElement);
    keep(main, made);
    main.replaceChildren(...made.childNodes);
    for (const box of boxes()) if ("drawn" in box.dataset && changed.has(box.dataset.shown)) draw(box);
    arrange(main);
    if (focus >= 0) main.querySelectorAll(FOCUS)[focus]?.focus({ preventScroll: true });
  }

  function keep(main, made) {
    const open = new Set([...main.querySelectorAll("details[open]")].map(named));
    for (const each of made.querySelectorAll("details")) each.open = open.has(named(each));
    for (const each of made.querySelectorAll("input, select")) {
      const old = document.getElementById(each.id);
      if (old) each.value = old.value;
    }
    for (const box of made.querySelectorAll(".plot")) {
      const old = document.getElementById(box.id);
      box.style.height = `${box.dataset.height}px`;
      if (!old) continue;
      old.style.height = box.style.height;
      old.setAttribute("aria-label", box.getAttribute("aria-label"));
      box.replaceWith(old);
    }
  }

  const named = (details) => details.parentElement.querySelector("h3")?.textContent + details.firstElementChild.textContent;

  addEventListener("DOMContentLoaded", () => {
    ({ words, ...style } = JSON.parse(document.getElementById("style").textContent));
    for (const each of document.querySelectorAll("script[data-figure]")) hold(each.dataset.figure, each.textContent);
    near = new IntersectionObserver((seen) => {
      for (const { target, isIntersecting } of seen) if (isIntersecting) { near.unobserve(target); draw(target); }
    }, { rootMargin: "600px" });
    nameTheme();
    const packed = document.getElementById("plotly");
    if (packed) ready = new Promise((done) => setTimeout(done)).then(() => unpacked(packed));
    ready.catch(() => { for (const box of boxes()) box.textContent = words.old; });
    document.getElementById("theme").addEventListener("click", nextTheme);
    system.addEventListener("change", redraw);
    paper.addEventListener("change", () => print(paper.matches));
    addEventListener("beforeprint", () => print(true));
    addEventListener("afterprint", () => print(false));
    arrange(document);
  });

  return { show };
})();
