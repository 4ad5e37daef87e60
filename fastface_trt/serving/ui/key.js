// The form for the API key, shown when the server asks for one.

import { byId } from "./dom.js";

export class KeyForm {
  constructor(onKey) {
    this.form = byId("key");
    this.input = byId("key-value");
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      const key = this.input.value.trim();
      if (!key) return;
      this.input.value = "";
      this.form.hidden = true;
      onKey(key);
    });
  }

  show() {
    if (!this.form.hidden) return;
    this.form.hidden = false;
    this.input.focus();
  }
}
