// What the page says: a polite status line, and errors as the server words them.

import { byId } from "./dom.js";

export class Report {
  constructor() {
    this.status = byId("status");
    this.error = byId("error");
  }

  say(sentence) {
    this.status.textContent = sentence;
  }

  fail(error) {
    this.error.textContent = error.sentence ?? error.message;
    this.error.hidden = false;
    this.error.scrollIntoView({ block: "nearest" });
  }

  clear() {
    this.error.hidden = true;
    this.error.textContent = "";
  }

  // Do something, and show how it fails.
  async during(work) {
    this.clear();
    try {
      await work();
    } catch (error) {
      this.say("");
      this.fail(error);
    }
  }
}
