// Makes pictures: one streamed request per body, at the same time, until done or cancelled.

import { byId } from "./dom.js";
import { ApiError } from "./api.js";
import { eventsOf } from "./stream.js";

const PREVIEWS = 3; // as many as the API sends

export class Runner {
  constructor(api, gallery, report) {
    this.api = api;
    this.gallery = gallery;
    this.report = report;
    this.starters = [byId("generate"), byId("compare-start")];
    this.cancelButton = byId("cancel");
    this.cancelButton.addEventListener("click", () => this.cancel());
  }

  get running() {
    return Boolean(this.controller);
  }

  cancel() {
    this.controller?.abort();
  }

  // requests: [{body, titles}], a title per picture of the body.
  async run(caption, requests, face) {
    if (this.running) return;
    this.controller = new AbortController();
    this.#enable(false);
    const all = requests.flatMap(({ titles }) => titles);
    const cards = this.gallery.add(caption, all, requests[0].body.size);
    this.report.say(`Making ${counted(cards.length)}…`);
    const began = performance.now();
    try {
      let first = 0;
      const ends = requests.map(({ body, titles }) => {
        const own = cards.slice(first, (first += titles.length));
        return this.#one(body, face, own);
      });
      const failed = (await Promise.allSettled(ends)).find(({ status }) => status === "rejected");
      const seconds = ((performance.now() - began) / 1000).toFixed(1);
      const done = cards.filter((card) => card.event).length;
      if (this.controller.signal.aborted) this.report.say(`Cancelled; ${counted(done)} made.`);
      else this.report.say(`${counted(done)} made in ${seconds} s.`);
      if (failed) throw failed.reason;
    } finally {
      this.controller = null;
      this.#enable(true);
    }
  }

  async #one(body, face, cards) {
    const { signal } = this.controller;
    const json = { ...body, ...face, stream: true, partial_images: PREVIEWS };
    try {
      const sent = { method: "POST", json, signal };
      const response = await this.api.send("/v1/images/generations", sent);
      for await (const { name, data } of eventsOf(response)) this.#take(name, data, cards, body);
      if (cards.some((card) => !card.ended)) {
        throw new ApiError("The server ended its answer before the picture was done.");
      }
    } catch (error) {
      const left = cards.filter((card) => !card.ended);
      if (signal.aborted) {
        for (const card of left) card.cancel();
        return;
      }
      const failure = error instanceof ApiError ? error
        : new ApiError("The connection to the server broke off.");
      for (const card of left) card.fail(failure.sentence);
      throw failure;
    }
  }

  #take(name, data, cards, body) {
    const card = cards[data.index];
    if (name === "error") throw new ApiError(data.error.message, { code: data.error.code });
    if (name === "image_generation.progress") card.progress(data.step, data.steps);
    if (name === "image_generation.partial_image") card.preview(data.b64_json);
    if (name === "image_generation.completed") card.complete(data, body);
  }

  #enable(able) {
    for (const button of this.starters) button.disabled = !able;
    this.cancelButton.disabled = able;
  }
}

function counted(pictures) {
  return pictures === 1 ? "1 picture" : `${pictures} pictures`;
}
