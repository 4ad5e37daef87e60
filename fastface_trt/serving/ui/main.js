// Puts the page together.

import { Api } from "./api.js";
import { Compare } from "./compare.js";
import { Details } from "./details.js";
import { byId } from "./dom.js";
import { FaceInput } from "./face.js";
import { Gallery } from "./gallery.js";
import { KeyForm } from "./key.js";
import { Parameters } from "./parameters.js";
import { RegisteredFaces } from "./registered.js";
import { Report } from "./report.js";
import { Runner } from "./runner.js";

const report = new Report();
const keyForm = new KeyForm((key) => {
  api.key = key;
  report.during(load);
});
const api = new Api(() => keyForm.show());
const parameters = new Parameters();
const face = new FaceInput(() => registered.pictureChosen());
const registered = new RegisteredFaces(api, face, report);
const gallery = new Gallery(new Details((body) => {
  parameters.restore(body);
  report.say("The form has the settings of that picture.");
  byId("prompt").focus();
}));
const runner = new Runner(api, gallery, report);
const compare = new Compare((presets) => report.during(() => compareAll(presets)));

async function load() {
  const [models, presets] = await Promise.all([api.get("/v1/models"), api.get("/v1/presets")]);
  const [model] = models.data;
  parameters.fill(model, presets.data);
  compare.fill(presets.data);
  byId("model").textContent = [model.id, model.size.replace("x", " × "), `${model.steps} steps`,
    model.backend, model.precision].filter(Boolean).join(" · ");
  face.showSamples((await api.get("/ui/samples.json")).data);
  await registered.load();
}

async function generate() {
  const body = parameters.body();
  const titles = Array.from({ length: body.n }, (_, at) =>
    body.n > 1 ? `${body.preset}, ${at + 1} of ${body.n}` : body.preset);
  await make(body.prompt, [{ body, titles }]);
}

async function compareAll(presets) {
  if (!presets.length) throw new Error("Choose the presets to compare first.");
  const requests = presets.map((preset) => {
    const body = { ...parameters.body(preset), n: 1 };
    return { body, titles: [preset] };
  });
  await make(requests[0].body.prompt, requests);
}

async function make(caption, requests) {
  try {
    await runner.run(caption, requests, await registered.fields());
  } catch (error) {
    if (error.code === "unknown_face") await registered.load(); // its time is over
    throw error;
  }
}

byId("settings").addEventListener("submit", (event) => {
  event.preventDefault();
  report.during(generate);
});
document.addEventListener("keydown", (event) => {
  // In a dialog the key closes the dialog.
  const dialog = document.querySelector("dialog[open]");
  if (event.key === "Escape" && !dialog && runner.running) runner.cancel();
});
report.during(load);
