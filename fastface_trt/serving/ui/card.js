// One picture on its way: a preview that gets clearer, its progress, and then the picture.

import { element } from "./dom.js";

export class Card {
  constructor(title, size, onOpen, onDelete) {
    this.title = title;
    this.img = element("img", { alt: `${title}, on its way`, hidden: true });
    this.bar = element("progress", { max: 1, value: 0, "aria-label": `Progress of ${title}` });
    this.frame = element("button", { type: "button", class: "frame", disabled: true,
      onclick: () => onOpen(this) }, this.img);
    this.frame.style.aspectRatio = size.replace("x", " / ");
    this.note = element("span", { class: "note" }, "waiting");
    this.delete = element("button", { type: "button", class: "delete", hidden: true,
      title: "Delete", "aria-label": `Delete ${title}`, onclick: () => onDelete(this) }, "×");
    this.root = element("figure", { class: "card", "data-state": "waiting" }, this.frame, this.bar,
      element("figcaption", {}, element("span", { class: "title" }, title), this.note),
      this.delete);
  }

  get ended() {
    return ["done", "failed", "cancelled"].includes(this.root.dataset.state);
  }

  progress(step, steps) {
    this.#state("working", `step ${step} of ${steps}`);
    this.bar.max = steps;
    this.bar.value = step;
  }

  preview(base64) {
    this.#draw(base64);
    this.img.dataset.previews = String(Number(this.img.dataset.previews ?? 0) + 1);
  }

  complete(event, body) {
    this.event = event;
    this.body = body;
    this.#draw(event.b64_json);
    this.img.alt = `${this.title}: ${body.prompt}`;
    this.frame.disabled = false;
    this.frame.setAttribute("aria-label", `Parameters of ${this.title}`);
    this.#end("done", `seed ${event.seed}`);
  }

  fail(sentence) {
    this.#end("failed", sentence);
  }

  cancel() {
    this.#end("cancelled", "cancelled");
  }

  // Leaves the page, and frees the picture's memory.
  close() {
    this.root.remove();
    if (this.address) URL.revokeObjectURL(this.address);
  }

  #draw(base64) {
    const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
    const before = this.address;
    this.address = URL.createObjectURL(new Blob([bytes], { type: "image/png" }));
    this.img.src = this.address;
    this.img.hidden = false;
    if (before) URL.revokeObjectURL(before);
  }

  #end(state, note) {
    this.#state(state, note);
    this.bar.remove();
    this.delete.hidden = false;
  }

  #state(state, note) {
    this.root.dataset.state = state;
    this.note.textContent = note;
  }
}
