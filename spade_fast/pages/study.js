"use strict";
// Keys for the choices, the time that an answer took, and no answer sent twice. Without it the pages still work.

const forms = document.querySelectorAll("form");
const answer = document.getElementById("answer");
let shown = null;
let sent = false;

addEventListener("load", () => { shown = performance.now(); });

for (const form of forms) {
  form.addEventListener("submit", (event) => {
    if (sent) {
      event.preventDefault();
      return;
    }
    sent = true;
    if (form === answer && shown !== null) {
      form.elements.milliseconds.value = Math.max(0, Math.round(performance.now() - shown));
    }
    document.body.setAttribute("aria-busy", "true");
  });
}

// A page that the browser kept may be of a question that has its answer.
addEventListener("pageshow", (event) => { if (event.persisted) location.reload(); });

if (answer !== null) {
  addEventListener("keydown", (event) => {
    if (event.repeat || event.ctrlKey || event.altKey || event.metaKey || shown === null) return;
    for (const button of answer.querySelectorAll("button[data-keys]")) {
      if (button.dataset.keys.split(" ").includes(event.key)) {
        event.preventDefault();
        button.click();
      }
    }
  });
}
