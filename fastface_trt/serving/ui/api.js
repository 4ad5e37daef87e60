// The HTTP API: one client with the key of this tab, and errors as the server words them.

const KEY = "fastface-api-key";

export class ApiError extends Error {
  constructor(message, { status = 0, code = "", retryAfter = null } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.retryAfter = retryAfter;
  }

  get sentence() {
    if (this.retryAfter === null) return this.message;
    return `${this.message} (The server asks to wait ${this.retryAfter} s.)`;
  }
}

export class Api {
  constructor(onKeyNeeded) {
    this.onKeyNeeded = onKeyNeeded;
  }

  set key(value) {
    sessionStorage.setItem(KEY, value);
  }

  // The response, if it is a success; throws ApiError, and AbortError for an aborted signal.
  async send(path, { method = "GET", json, form, signal } = {}) {
    const headers = {};
    const key = sessionStorage.getItem(KEY);
    if (key) headers.Authorization = `Bearer ${key}`;
    if (json) headers["Content-Type"] = "application/json";
    const body = json ? JSON.stringify(json) : form;
    let response;
    try {
      response = await fetch(path, { method, headers, body, signal });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError("The server does not answer. Is it still running?");
    }
    if (!response.ok) throw await this.#refusal(response);
    return response;
  }

  async get(path) {
    return (await this.send(path)).json();
  }

  async #refusal(response) {
    if (response.status === 401) this.onKeyNeeded();
    const answer = await response.json().catch(() => null);
    const wait = response.headers.get("Retry-After");
    return new ApiError(answer?.error?.message ?? `The server answered ${response.status}.`, {
      status: response.status,
      code: answer?.error?.code,
      retryAfter: wait === null ? null : Number(wait),
    });
  }
}
