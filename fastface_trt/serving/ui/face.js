// The face: a picture that was picked, dropped or pasted, a drawn sample, or a registered face.

import { byId, element } from "./dom.js";

export class FaceInput {
  constructor(onChange) {
    this.onChange = onChange;
    this.picture = null;
    this.name = "";
    this.img = byId("face-picture");
    this.index = byId("face-index");
    this.#listen(byId("drop"), byId("face-file"));
  }

  get faceIndex() {
    return Math.max(0, (Number(this.index.value) || 1) - 1);
  }

  choose(picture, name) {
    this.picture = picture;
    this.name = name;
    this.show(picture, name);
    this.onChange();
  }

  // Show a picture, or only a name where there is none, without choosing it.
  show(picture, name) {
    if (this.img.src) URL.revokeObjectURL(this.img.src);
    this.img.hidden = !picture;
    if (picture) this.img.src = URL.createObjectURL(picture);
    else this.img.removeAttribute("src");
    byId("face-name").textContent = name;
    for (const button of byId("samples").children) {
      button.setAttribute("aria-pressed", String(button.dataset.name === name));
    }
  }

  // The picture as the API takes it in JSON.
  async dataUrl() {
    const reader = new FileReader();
    return new Promise((resolve, reject) => {
      reader.onload = () => resolve(reader.result);
      reader.onerror = () => reject(new Error(`${this.name} cannot be read any more.`));
      reader.readAsDataURL(this.picture);
    });
  }

  showSamples(files) {
    const group = byId("samples");
    group.replaceChildren(...files.map((file) => this.#sample(file)));
    group.hidden = files.length === 0;
  }

  #sample(file) {
    const address = `/ui/samples/${file}`;
    const name = file.replace(/\.\w+$/, "").replaceAll("_", " ");
    const take = async () => this.choose(await (await fetch(address)).blob(), name);
    return element(
      "button",
      { type: "button", title: name, "aria-label": `Sample face ${name}`, "aria-pressed": "false",
        "data-name": name, onclick: take },
      element("img", { src: address, alt: "", width: 44, height: 44 }),
    );
  }

  #listen(zone, file) {
    file.addEventListener("change", () => {
      this.#takeFirst(file.files);
      file.value = ""; // so that the same file can be chosen again
    });
    zone.addEventListener("dragover", (event) => {
      event.preventDefault();
      zone.classList.add("over");
    });
    zone.addEventListener("dragleave", () => zone.classList.remove("over"));
    zone.addEventListener("drop", (event) => {
      event.preventDefault();
      zone.classList.remove("over");
      this.#takeFirst(event.dataTransfer.files);
    });
    document.addEventListener("paste", (event) => {
      if (this.#takeFirst(event.clipboardData.files)) event.preventDefault();
    });
  }

  #takeFirst(files) {
    const picture = [...files].find((one) => one.type.startsWith("image/"));
    if (picture) this.choose(picture, picture.name || "pasted picture");
    return Boolean(picture);
  }
}
