// Rows of pictures, the newest first; the oldest go when there are many.

import { Card } from "./card.js";
import { byId, element } from "./dom.js";

const MOST_ROWS = 30;

export class Gallery {
  constructor(details) {
    this.details = details;
    this.root = byId("gallery");
    this.rows = [];
  }

  // A new row on top, with a card for each title; size is WIDTHxHEIGHT.
  add(caption, titles, size) {
    const cards = titles.map((title) =>
      new Card(title, size, (card) => this.details.open(card), (card) => this.#delete(card)));
    const group = element("div", { class: "cards" }, ...cards.map((card) => card.root));
    group.style.setProperty("--count", String(cards.length));
    const row = element("section", { class: "pictures", "aria-label": caption },
      element("h3", {}, caption), group);
    this.root.prepend(row);
    this.rows.unshift({ row, cards });
    for (const old of this.rows.splice(MOST_ROWS)) {
      old.row.remove();
      for (const card of old.cards) card.close();
    }
    byId("empty").hidden = true;
    row.scrollIntoView({ block: "nearest" }); // on a narrow screen it is far below the form
    return cards;
  }

  // A row goes with its last card.
  #delete(card) {
    card.close();
    const at = this.rows.findIndex(({ cards }) => cards.includes(card));
    const { row, cards } = this.rows[at];
    cards.splice(cards.indexOf(card), 1);
    if (!cards.length) {
      row.remove();
      this.rows.splice(at, 1);
    }
    byId("empty").hidden = this.rows.length > 0;
  }
}
