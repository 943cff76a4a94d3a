"use strict";

for (const each of document.querySelectorAll("[data-needs-script]")) each.hidden = false;

for (const slider of document.querySelectorAll(".opacity input")) {
  const maps = slider.closest(".maps");
  const told = slider.nextElementSibling;
  const show = () => {
    maps.style.setProperty("--opacity", slider.value / 100);
    told.textContent = `${slider.value} %`;
    slider.setAttribute("aria-valuetext", told.textContent);
  };
  slider.addEventListener("input", show);
  show();  // a browser that goes back to the page may have kept another value
}

const gallery = document.querySelector(".gallery");
if (gallery) {
  const cards = [...gallery.children];
  const filter = document.getElementById("filter");
  const sort = document.getElementById("sort");
  const shown = document.getElementById("shown");
  const searched = new Map(cards.map((card) => [card, card.dataset.search.toLowerCase()]));

  const sieve = () => {
    const words = filter.value.toLowerCase().split(/\s+/);
    for (const card of cards) card.hidden = !words.every((word) => searched.get(card).includes(word));
    shown.textContent = `${cards.filter((card) => !card.hidden).length} of ${cards.length} image${cards.length === 1 ? "" : "s"}`;
  };

  const texts = new Intl.Collator(undefined, { numeric: true });
  const order = () => {
    const key = sort.value;
    const compare = {
      place: (a, b) => a.dataset.place - b.dataset.place,
      name: (a, b) => texts.compare(a.dataset.name, b.dataset.name),
      target: (a, b) => texts.compare(a.dataset.target, b.dataset.target),
    }[key] ?? ((a, b) => b.dataset[key] - a.dataset[key]);
    gallery.append(...cards.sort(compare));
  };

  filter.addEventListener("input", sieve);
  sort.addEventListener("change", order);
  sieve();
  order();
}
