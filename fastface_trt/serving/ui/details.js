// What a picture was made with, in a dialog: to read, to use again, and the file itself.

import { byId, element } from "./dom.js";

const FIRST = ["prompt", "negative_prompt", "seed", "steps", "width", "height", "ip_adapter_scale",
  "alpha", "beta", "guidance_rescale"];
const NAMES = { ip_adapter_scale: "λ", alpha: "α", beta: "β", guidance_rescale: "φ" };

export class Details {
  constructor(onUse) {
    this.dialog = byId("details");
    byId("details-close").addEventListener("click", () => this.dialog.close());
    byId("details-use").addEventListener("click", () => {
      this.dialog.close();
      onUse(this.card.body);
    });
  }

  open(card) {
    this.card = card;
    const { event, body } = card;
    const picture = byId("details-picture");
    picture.src = card.address;
    picture.alt = card.img.alt;
    const link = byId("details-download");
    link.href = card.address;
    link.download = `fastface-${body.preset.replace("+", "-")}-${event.seed}-${event.index}.png`;
    const shown = new Set(FIRST.filter((name) => name in event.parameters));
    for (const name of Object.keys(event.parameters)) shown.add(name);
    const rows = [["preset", body.preset]];
    for (const name of shown) rows.push([NAMES[name] ?? name, event.parameters[name]]);
    for (const [name, seconds] of Object.entries(event.seconds)) {
      rows.push([`${name}, seconds`, seconds.toFixed(3)]);
    }
    for (const warning of event.warnings) rows.push(["warning", warning]);
    byId("details-list").replaceChildren(...rows.flatMap(([name, value]) => [
      element("dt", {}, String(name).replaceAll("_", " ")),
      element("dd", {}, worded(value)),
    ]));
    this.dialog.showModal();
  }
}

function worded(value) {
  if (value === null) return "off";
  if (value === "") return "–";
  if (Array.isArray(value)) return value.map(worded).join(", ");
  if (typeof value !== "object") return String(value);
  const members = Object.entries(value).map(([name, one]) => `${name} ${worded(one)}`);
  return members.join("; ") || "–";
}
