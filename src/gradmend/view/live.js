// Asks for what is new, and shows it; the runs that are chosen stand in the address.
(() => {
  const QUIET = 10; // seconds between questions once a training has ended
  const main = document.getElementById("main");
  const bar = document.createElement("div");
  const status = document.createElement("p");
  const list = document.createElement("fieldset");
  let tag = "", timer = 0, asked = 0, known = "", rest = 1, running = false;

  bar.id = "live";
  status.setAttribute("role", "status");
  list.hidden = true;
  bar.append(status, list);
  main.before(bar);

  const chosen = () => new URLSearchParams(location.hash.slice(1)).get("runs") ?? "";

  function say(state, text) {
    bar.dataset.state = state;
    if (status.textContent !== text) status.textContent = text;
  }

  function choose() {
    const keys = [...list.querySelectorAll("input:checked")].map((box) => box.value);
    history.replaceState(null, "", keys.length ? `#runs=${keys.join(",")}` : location.pathname);
    tag = "";
    ask();
  }

  function offer({ runs, chosen: keys }) {
    const now = JSON.stringify([runs, keys]);
    if (now === known) return;
    known = now;
    const legend = document.createElement("legend");
    legend.textContent = "Runs shown side by side";
    const focused = document.activeElement?.value;
    list.replaceChildren(legend, ...runs.map((run) => label(run, keys.includes(run.key))));
    list.hidden = runs.length < 2;
    if (focused) list.querySelector(`input[value="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
  }

  function label(run, checked) {
    const box = document.createElement("input");
    Object.assign(box, { type: "checkbox", value: run.key, checked });
    box.addEventListener("change", choose);
    const made = document.createElement("label");
    made.append(box, `${run.name} · ${run.started}`);
    return made;
  }

  function later(seconds) {
    clearTimeout(timer);
    timer = setTimeout(ask, 1000 * seconds);
  }

  async function ask() {
    clearTimeout(timer);
    if (document.hidden) return; // asks again when it is seen
    const turn = ++asked;
    const headers = tag ? { "If-None-Match": tag } : {};
    let answer;
    try {
      answer = await fetch(`content?runs=${encodeURIComponent(chosen())}`, { headers, cache: "no-store" });
      if (answer.status !== 304 && !answer.ok) throw new Error(answer.statusText);
      if (answer.status === 200) await show(answer, turn);
      if (turn === asked) tell();
    } catch {
      say("lost", "The server is gone. What is shown is the last that was read.");
      later(3);
      return;
    }
    if (turn === asked) later(rest);
  }

  async function show(answer, turn) {
    const told = await answer.json();
    if (turn !== asked) return;
    tag = answer.headers.get("ETag");
    window.gradmend.show(told);
    offer(told);
    running = told.running;
    rest = running ? told.rest : QUIET;
  }

  function tell() {
    if (running) say("live", "Live: what is written is shown at once.");
    else say("ended", "Ended: what was recorded is shown.");
  }

  document.addEventListener("visibilitychange", () => { if (!document.hidden) ask(); });
  addEventListener("hashchange", () => { tag = ""; ask(); });
  document.readyState === "loading" ? addEventListener("DOMContentLoaded", ask) : ask();
})();
