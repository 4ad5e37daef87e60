// One parameter: a slider, or one per step, beside a text field that takes whatever the API takes.
// Left alone, it follows the preset; what the user sets is sent and overrides it.

import { element } from "./dom.js";

export class Dial {
  // field: the API's name; symbol, label: the user's; fallback: the value without preset.
  constructor({ field, symbol, label, min, max, step, fallback, perStep = false, off = false }) {
    Object.assign(this, { field, symbol, min, max, step, fallback, perStep, off });
    this.own = undefined;
    this.preset = undefined;
    this.steps = 1;
    this.text = element("input", { type: "text", id: `dial-${field}`, spellcheck: "false",
      autocomplete: "off", class: "value" });
    this.text.addEventListener("change", () => this.set(this.#parsed(this.text.value)));
    this.back = element("button", { type: "button", class: "plain back", title: "As the preset",
      "aria-label": `${symbol} as the preset`, onclick: () => this.set(undefined) }, "↺");
    this.sliders = element("div", { class: "sliders" });
    this.split = element("input", { type: "checkbox", onchange: () => this.#splitOrJoin() });
    const name = element("label", { for: this.text.id }, element("b", {}, symbol), ` ${label}`);
    this.root = element("div", { class: "dial", "data-field": field },
      element("div", { class: "head" }, name, this.back, this.text), this.sliders);
    if (perStep) {
      this.root.append(element("label", { class: "split" }, this.split, " one value per step"));
    }
    if (off) this.text.title = "A number, or off";
    if (perStep) this.text.title = "A number, one per step, or a schedule: cosine:high=3,low=1";
  }

  // undefined: as the preset; null: off; a number, a list of numbers, or a named schedule.
  set(own) {
    this.own = own;
    this.#show();
  }

  follow(preset, steps) {
    this.preset = preset;
    this.steps = steps;
    if (Array.isArray(this.own)) this.own = this.#perStep();
    this.#show();
  }

  get value() {
    if (this.own !== undefined) return this.own;
    return this.preset !== undefined ? this.preset : this.fallback;
  }

  #parsed(text) {
    const parts = text.split(",").map((part) => part.trim());
    const numbers = parts.map(Number);
    if (text.trim() === "") return undefined;
    if (this.off && text.trim().toLowerCase() === "off") return null;
    if (parts.includes("") || numbers.some(Number.isNaN)) return text.trim();
    return numbers.length > 1 ? numbers : numbers[0];
  }

  #splitOrJoin() {
    const values = this.#perStep();
    this.set(this.split.checked ? values : values[values.length >> 1]);
  }

  #perStep() {
    const value = this.value;
    const list = Array.isArray(value) ? value : [value];
    const inner = list.slice(1, -1);
    const middle = list[list.length >> 1];
    // A list is written out for the number of steps that there were when it was made.
    return Array.from({ length: this.steps }, (_, step) => {
      if (step === 0) return list[0];
      return step === this.steps - 1 ? list.at(-1) : (inner[step - 1] ?? middle);
    }).map((one) => (typeof one === "number" ? one : this.fallback ?? this.min));
  }

  #show() {
    const value = this.value;
    const several = this.perStep && Array.isArray(value);
    const shown = this.#perStep();
    this.root.classList.toggle("own", this.own !== undefined);
    this.back.hidden = this.own === undefined;
    this.split.checked = several;
    this.text.value = value === null ? "off" : several ? shown.join(", ") : String(value);
    const count = several ? this.steps : 1;
    if (this.sliders.children.length !== count) {
      this.sliders.replaceChildren(...Array.from({ length: count }, (_, at) => this.#slider(at)));
    }
    [...this.sliders.children].forEach((slider, at) => {
      slider.value = String(several ? shown[at] : typeof value === "number" ? value : this.min);
      slider.setAttribute("aria-label", several ? `${this.symbol}, step ${at + 1}` : this.symbol);
    });
  }

  #slider(at) {
    const { min, max, step } = this;
    const slider = element("input", { type: "range", min, max, step });
    slider.addEventListener("input", () => {
      const number = Number(slider.value);
      const several = this.perStep && Array.isArray(this.value);
      this.set(several ? this.#perStep().map((one, k) => (k === at ? number : one)) : number);
    });
    return slider;
  }
}
