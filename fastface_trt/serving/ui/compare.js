// Presets side by side: the same face, prompt and seed, one request per preset at the same time.

import { byId, element } from "./dom.js";

const FIRST_CHOICE = ["plain", "dcg", "am1+dcg"];

export class Compare {
  constructor(onStart) {
    this.group = byId("compare-presets");
    byId("compare-start").addEventListener("click", () => onStart(this.chosen));
  }

  fill(presets) {
    this.group.replaceChildren(...presets.map(({ name }) => element("label", { class: "chip" },
      element("input", { type: "checkbox", value: name, checked: FIRST_CHOICE.includes(name) }),
      element("span", {}, name))));
  }

  get chosen() {
    return [...this.group.querySelectorAll("input:checked")].map((input) => input.value);
  }
}
