// The form: what it says as a request's fields, and how it is filled from what the server can do.

import { Dial } from "./dial.js";
import { byId, element } from "./dom.js";

const TEXTS = ["prompt", "negative", "preset", "seed", "count", "steps", "width", "height"];

export class Parameters {
  constructor() {
    this.input = Object.fromEntries(TEXTS.map((id) => [id, byId(id)]));
    this.presets = [];
    this.dials = [
      new Dial({ field: "ip_adapter_scale", symbol: "λ", label: "weight of the adapter, Eq. 1",
        min: 0, max: 1.5, step: 0.05, fallback: 0.8 }),
      new Dial({ field: "alpha", symbol: "α", label: "weight of the face, Eq. 3",
        min: 0, max: 4, step: 0.1, fallback: 1, perStep: true }),
      new Dial({ field: "beta", symbol: "β", label: "weight of the prompt, Eq. 3",
        min: 0, max: 6, step: 0.1, fallback: 1, perStep: true }),
      new Dial({ field: "guidance_rescale", symbol: "φ", label: "rescaling of the guidance, Eq. 5",
        min: 0, max: 1, step: 0.05, fallback: null, off: true }),
    ];
    byId("dials").replaceChildren(...this.dials.map((dial) => dial.root));
    byId("dice").addEventListener("click", () => {
      this.input.seed.value = String(crypto.getRandomValues(new Uint32Array(1))[0]);
    });
    this.input.preset.addEventListener("change", () => this.#follow());
    this.input.steps.addEventListener("change", () => this.#follow());
  }

  fill(model, presets) {
    this.model = model;
    this.presets = presets;
    const names = presets.map(({ name }) => name);
    this.input.preset.replaceChildren(...names.map((name) => element("option", {}, name)));
    if (names.includes("am1+dcg")) this.input.preset.value = "am1+dcg";
    const steps = model.allowed_steps.map((count) => element("option", {}, String(count)));
    this.input.steps.replaceChildren(...steps);
    this.input.steps.value = String(model.steps);
    const [width, height] = model.size.split("x");
    for (const [input, side] of [[this.input.width, width], [this.input.height, height]]) {
      input.value = side;
      input.min = input.step = String(model.size_unit);
      input.disabled = model.fixed_size;
    }
    this.input.count.max = String(model.max_pictures);
    this.#follow();
  }

  // A request's fields; `preset` replaces the chosen one.
  body(preset = this.input.preset.value) {
    const { prompt, negative, seed, count, steps, width, height } = this.input;
    if (!prompt.value.trim()) {
      prompt.focus();
      throw new Error("Describe the picture in a few words first.");
    }
    for (const input of [seed, count, width, height]) checkRange(input);
    const body = { prompt: prompt.value, preset, seed: Number(seed.value), n: Number(count.value),
      steps: Number(steps.value), size: `${Number(width.value)}x${Number(height.value)}` };
    if (negative.value.trim()) body.negative_prompt = negative.value;
    for (const dial of this.dials) if (dial.own !== undefined) body[dial.field] = dial.own;
    return body;
  }

  // Back to the settings that gave a picture.
  restore(body) {
    const [width, height] = body.size.split("x");
    const values = { prompt: body.prompt, negative: body.negative_prompt ?? "", width, height,
      preset: body.preset, seed: body.seed, count: body.n, steps: body.steps };
    for (const id of TEXTS) this.input[id].value = String(values[id]);
    for (const dial of this.dials) dial.set(body[dial.field]);
    this.#follow();
  }

  #follow() {
    const chosen = this.presets.find(({ name }) => name === this.input.preset.value);
    byId("preset-says").textContent = chosen?.description ?? "";
    for (const dial of this.dials) {
      dial.follow(chosen?.fields[dial.field], Number(this.input.steps.value));
    }
  }
}

// The browser's own sentence about a number, before pictures are announced that nobody makes.
function checkRange(input) {
  if (input.value !== "" && input.checkValidity()) return;
  const section = input.closest("details");
  if (section) section.open = true;
  input.focus();
  const name = input.labels[0].textContent.trim();
  throw new Error(`${name}: ${input.validationMessage || "A number is missing."}`);
}
