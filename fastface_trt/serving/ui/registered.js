// Faces that the server remembers for this key: registered once, named afterwards, deleted here.

import { byId, element } from "./dom.js";

export class RegisteredFaces {
  constructor(api, face, report) {
    this.api = api;
    this.face = face;
    this.report = report;
    this.chosen = null;
    this.known = new Map(); // the server tells neither name nor picture of a face
    this.group = byId("registered");
    this.button = byId("register");
    this.button.addEventListener("click", () => this.report.during(() => this.#register()));
  }

  // The face's fields of a request: an id where one is chosen, otherwise the picture.
  async fields() {
    if (this.chosen) return { face_id: this.chosen };
    if (!this.face.picture) throw new Error("Choose a picture with a face first.");
    return { face: await this.face.dataUrl(), face_index: this.face.faceIndex };
  }

  pictureChosen() {
    this.chosen = null;
    this.button.disabled = false;
    this.#mark();
  }

  async load() {
    const { data } = await this.api.get("/v1/faces");
    if (this.chosen && !data.some((one) => one.id === this.chosen)) this.chosen = null;
    this.group.replaceChildren(...data.map((one) => this.#row(one)));
    this.group.hidden = data.length === 0;
    this.#mark();
  }

  async #register() {
    const form = new FormData();
    form.set("image", this.face.picture);
    form.set("face_index", String(this.face.faceIndex));
    const response = await this.api.send("/v1/faces", { method: "POST", form });
    const one = await response.json();
    const which = one.count > 1 ? `, face ${one.index + 1} of ${one.count}` : "";
    this.known.set(one.id, { name: `${this.face.name}${which}`, picture: this.face.picture });
    this.chosen = one.id;
    await this.load();
    this.report.say(`Registered ${this.known.get(one.id).name}.`);
  }

  async #delete(id) {
    await this.api.send(`/v1/faces/${encodeURIComponent(id)}`, { method: "DELETE" });
    this.known.delete(id);
    await this.load();
    if (!this.chosen && this.face.picture) this.face.show(this.face.picture, this.face.name);
    this.report.say("The server has forgotten this face.");
  }

  #row(one) {
    const until = new Date(one.expires_at * 1000).toLocaleTimeString([], {
      timeStyle: "short",
    });
    const known = this.known.get(one.id);
    const name = known?.name ?? `${one.id.slice(0, 9)}…`;
    const radio = element("input", { type: "radio", name: "registered", value: one.id });
    radio.addEventListener("change", () => {
      this.chosen = one.id;
      this.face.show(known?.picture, name);
      this.#mark();
    });
    const forget = () => this.report.during(() => this.#delete(one.id));
    return element(
      "div",
      { class: "registered" },
      element("label", {}, radio, element("span", {}, name, " ",
        element("small", {}, `until ${until}`))),
      element("button", { type: "button", class: "plain", onclick: forget,
        "aria-label": `Delete ${name}` }, "Delete"),
    );
  }

  #mark() {
    for (const radio of this.group.querySelectorAll("input")) {
      radio.checked = radio.value === this.chosen;
    }
  }
}
