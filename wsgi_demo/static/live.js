// Keeps an open page up to date: when the server says that something has changed, the page is fetched once more, and
// what differs is replaced. Without this script the page is the same, and has to be asked for again.
"use strict";

(() => {
  const PAUSE = 3000; // milliseconds
  const CUT_OFF = "Reconnecting …";
  const SHOWN = "header, main";
  const FIELDS = "input:not([type=hidden]), textarea";
  const script = document.currentScript;
  const status = document.createElement("p");
  status.className = "live";
  status.setAttribute("role", "status");
  let source = null;
  let timer = 0;
  let looking = false;
  let again = false;
  let stale = false;

  const say = text => { if (status.textContent !== text) status.textContent = text; };
  const cutOff = () => status.textContent === CUT_OFF;
  const half = field => field === document.activeElement || field.value !== field.defaultValue;
  const inUse = node => {
    const around = node.nodeType === Node.ELEMENT_NODE ? node : node.parentElement;
    return [around, ...around.querySelectorAll(FIELDS)].some(one => one.matches(FIELDS) && half(one));
  };

  // The smallest parts that differ, so that all else stays as it is: what has the focus, what was written or opened.
  const differences = (old, fresh) => {
    if (old.isEqualNode(fresh)) return [];
    const alike = old.nodeType === Node.ELEMENT_NODE && old.childNodes.length === fresh.childNodes.length
      && old.cloneNode(false).isEqualNode(fresh.cloneNode(false));
    return alike ? [...old.childNodes].flatMap((child, i) => differences(child, fresh.childNodes[i])) : [[old, fresh]];
  };

  const replace = (old, fresh) => {
    const held = old.contains(document.activeElement) ? document.activeElement.textContent : null;
    old.replaceWith(fresh);
    if (held !== null) {
      const same = [...fresh.querySelectorAll?.("a, button, summary") ?? []].find(one => one.textContent === held);
      (same ?? document.querySelector("main")).focus({ preventScroll: true });
    }
  };

  const show = page => {
    // What was told once stays told, and what was opened stays open.
    page.querySelector("#notices")?.replaceWith(document.querySelector("#notices").cloneNode(true));
    for (const details of document.querySelectorAll("details[id]")) {
      const same = page.getElementById(details.id);
      if (same) same.open = details.open;
    }
    const olds = document.querySelectorAll(SHOWN);
    const freshs = page.querySelectorAll(SHOWN);
    const changes = [...olds].flatMap((old, i) => differences(old, freshs[i]));
    const possible = changes.filter(([old]) => !inUse(old));
    const was = stale;
    stale = possible.length < changes.length;
    possible.forEach(([old, fresh]) => replace(old, document.adoptNode(fresh)));
    document.title = page.title;
    if (stale) say("Something here has changed. It is shown when you have finished writing.");
    else if (possible.length > 0) say(`Changed by itself at ${new Date().toLocaleTimeString()}.`);
    else if (was) say("");
  };

  // Fetch the page and show what differs; what changes meanwhile is looked for once more.
  const look = async () => {
    if (looking) { again = true; return; }
    looking = true;
    do {
      again = false;
      try {
        const answer = await fetch(location.href, { headers: { "X-Live": "look" }, cache: "no-store" });
        if (!answer.ok) throw new Error(answer.statusText);
        const page = new DOMParser().parseFromString(await answer.text(), "text/html");
        if (cutOff()) say("");
        show(page);
        script.dataset.events = page.querySelector("script[data-events]")?.dataset.events ?? "";
        if (!script.dataset.events) leave(); // signed out
      } catch {
        say(CUT_OFF);
        later(look);
      }
    } while (again);
    looking = false;
  };

  const later = task => {
    clearTimeout(timer);
    timer = setTimeout(task, PAUSE);
  };

  const follow = () => {
    if (document.hidden || source || !script.dataset.events) return;
    source = new EventSource(script.dataset.events);
    source.addEventListener("change", look);
    source.onopen = () => {
      clearTimeout(timer);
      if (cutOff()) look();
    };
    source.onerror = async () => {
      if (source.readyState === EventSource.CLOSED) {
        // There are too many streams, or the store is away, or we have been signed out.
        leave();
        await look();
        later(follow);
      } else {
        // It will come back by itself; streams end and begin again in the ordinary course of things.
        later(() => say(CUT_OFF));
      }
    };
  };

  const leave = () => {
    clearTimeout(timer);
    source?.close();
    source = null;
  };

  // A browser has few connections to one server, and a page that nobody sees needs none.
  document.addEventListener("visibilitychange", async () => {
    if (document.hidden) { leave(); return; }
    await look();
    follow();
  });
  document.addEventListener("focusout", () => { if (stale) setTimeout(look); });
  document.querySelector("main").after(status);
  follow();
})();
