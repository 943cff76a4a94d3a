"use strict";
// Keys for the choices, the time for which a question was seen, and no answer by accident. Without it pages still work.

const QUIET = 300;  // milliseconds in which a second click or key of the question before would come
const form = document.getElementById("answer");
const question = form && `${location.pathname} ${form.elements.question.value}`;
let since = null;  // when the page came into view
let sent = false;

// Of a question that was left, as by a reload, and of one that was hidden behind another tab.
const seen = () => Number(question && sessionStorage.getItem(question)) || 0;
const leave = () => {
  if (since !== null && question) sessionStorage.setItem(question, seen() + performance.now() - since);
  since = null;
};
const come = () => {
  if (document.visibilityState === "visible" && since === null) since = performance.now();
};

let ready = false;
addEventListener("load", () => {
  come();
  setTimeout(() => {
    ready = true;
    document.body.dataset.ready = "";
  }, QUIET);
});
addEventListener("pagehide", leave);
document.addEventListener("visibilitychange", () => (document.visibilityState === "visible" ? come() : leave()));

// A page that the browser kept may be of a question that has its answer.
addEventListener("pageshow", (event) => { if (event.persisted) location.reload(); });

for (const each of document.querySelectorAll("form")) {
  each.addEventListener("submit", (event) => {
    if (sent || (each === form && !ready)) {
      event.preventDefault();
      return;
    }
    sent = true;
    if (each === form) {
      leave();
      form.elements.milliseconds.value = Math.round(seen());
    }
    document.body.setAttribute("aria-busy", "true");
  });
}

if (form) {
  const toggle = document.getElementById("keys");
  let keys = sessionStorage.getItem("keys") !== "off";
  const tell = () => {
    toggle.hidden = false;
    toggle.textContent = keys ? "Turn off the keys 1, 2 and 0" : "Turn on the keys 1, 2 and 0";
    for (const each of form.querySelectorAll("kbd")) each.hidden = !keys;
  };
  tell();
  toggle.addEventListener("click", () => {
    keys = !keys;
    sessionStorage.setItem("keys", keys ? "on" : "off");
    tell();
  });
  addEventListener("keydown", (event) => {
    if (!keys || event.repeat || event.ctrlKey || event.altKey || event.metaKey) return;
    const button = form.querySelector(`button[data-key="${CSS.escape(event.key)}"]`);
    if (button) button.click();
  });
}
