/**
 * The server's HTTP interface: calls with the Bearer token, problem documents as errors, event streams.
 *
 * The token is kept in the tab (sessionStorage) and sent in a header, never as a cookie and never in an address.
 */

const ROOT = new URL("../../", import.meta.url);
const TOKEN_KEY = "gpuq.token";
const SILENCE_MOST = 40_000; // ms without a byte; the server sends at least a comment every 15 s
const STABLE_AFTER = 5000; // ms; a stream that ends sooner is no reason to hurry
const PAUSES = [500, 1000, 2000, 4000, 8000, 15_000]; // ms between attempts to connect again

let token = sessionStorage.getItem(TOKEN_KEY);
let whenRefused = () => {};
let clockAhead = 0; // seconds the server's clock is ahead of this one

export const hasToken = () => token !== null;

export function setToken(next) {
  token = next;
  if (next === null) sessionStorage.removeItem(TOKEN_KEY);
  else sessionStorage.setItem(TOKEN_KEY, next);
}

/** `callback(detail)` is called when the server refuses the token. */
export function onRefused(callback) {
  whenRefused = callback;
}

/** Now in unix seconds, by the server's clock: a wrong clock here must not make "in 3 min" out of "just now". */
export const now = () => Date.now() / 1000 + clockAhead;

/** What went wrong, in the server's words. `status` is 0 when it could not be reached. */
export class ApiError extends Error {
  constructor(status, detail, { errors = [], retryAfter = null, requestId = null } = {}) {
    super(detail);
    this.status = status;
    this.errors = errors;
    this.retryAfter = retryAfter;
    this.requestId = requestId;
  }
}

async function problem(response) {
  const retryAfter = Number.parseInt(response.headers.get("retry-after") ?? "", 10);
  const extra = {
    retryAfter: Number.isNaN(retryAfter) ? null : retryAfter,
    requestId: response.headers.get("x-request-id"),
  };
  try {
    const body = await response.json();
    return new ApiError(response.status, body.detail, { ...extra, errors: body.errors ?? [] });
  } catch {
    return new ApiError(response.status, `The server answered ${response.status} ${response.statusText}.`, extra);
  }
}

function readClock(response) {
  const date = Date.parse(response.headers.get("date") ?? "");
  if (Number.isNaN(date)) return;
  const ahead = (date - Date.now()) / 1000;
  clockAhead = Math.abs(ahead) > 3 ? ahead : 0; // the header has whole seconds
}

/** The response of a call that succeeded. Raises ApiError. A refused token ends the session. */
export async function call(path, { method = "GET", headers = {}, body, signal } = {}) {
  const used = token;
  let response;
  try {
    response = await fetch(new URL(path, ROOT), {
      method,
      headers: { ...(used === null ? {} : { Authorization: `Bearer ${used}` }), ...headers },
      body,
      signal,
      cache: "no-store",
      credentials: "omit",
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiError(0, "The server could not be reached. Check your connection; nothing was lost.");
  }
  readClock(response);
  if (response.ok) return response;
  const failure = await problem(response);
  if (failure.status === 401 && used !== null && used === token) whenRefused(failure.message);
  throw failure;
}

/** The JSON of a call. */
export const json = async (path, options) => (await call(path, options)).json();

/** `?a=1&b=2` of the values that are set. */
export function query(values) {
  const set = Object.entries(values).filter(([, value]) => value !== null && value !== undefined && value !== "");
  return set.length > 0 ? `?${new URLSearchParams(set)}` : "";
}

export const jobPath = (call, jobId) => `api/${call}/${encodeURIComponent(jobId)}`;

/** Save the body of a call as a file. The token goes in the header, so a plain link would not do. */
export async function download(path, fileName, options) {
  const response = await call(path, options);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await response.blob());
  link.download = fileName;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 30_000);
}

/** Server-sent events of a body, as {event, id, data}; `data` as text. */
async function* events(response, alive) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  let fields = { event: "message", data: [] };
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    alive();
    const lines = (held + value).split("\n");
    held = lines.pop();
    for (const line of lines) {
      if (line === "") {
        if (fields.data.length > 0) yield { event: fields.event, id: fields.id, data: fields.data.join("\n") };
        fields = { event: "message", data: [] };
        continue;
      }
      const colon = line.indexOf(":");
      if (colon === 0) continue;
      const name = colon < 0 ? line : line.slice(0, colon);
      const text = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
      if (name === "data") fields.data.push(text);
      else fields[name] = text;
    }
  }
}

/** Wait `ms`, or until the network comes back, or `signal`. */
function pause(ms, signal, wake) {
  return new Promise((resolve) => {
    const done = () => {
      clearTimeout(timer);
      window.removeEventListener("online", done);
      resolve();
    };
    const timer = setTimeout(done, ms);
    window.addEventListener("online", done);
    signal.addEventListener("abort", done);
    wake(done);
  });
}

/**
 * Follow an event stream until `onEvent` returns true or the stream is stopped; connects again by itself, with
 * `Last-Event-ID`, so nothing is lost. A page that is hidden for long gives its connection back: browsers allow few.
 *
 * `onState({state: "connecting"|"open"|"away"|"ended"|"failed", retryAt?, error?})`. Returns {stop, retryNow}.
 */
export function follow(path, { onEvent, onState = () => {} }) {
  const stopped = new AbortController();
  let wake = () => {};
  let restart = new AbortController();

  async function once(lastId) {
    restart = new AbortController();
    const signal = AbortSignal.any([stopped.signal, restart.signal]);
    let timer;
    const alive = () => {
      clearTimeout(timer);
      timer = setTimeout(() => restart.abort(), SILENCE_MOST);
    };
    try {
      alive();
      const headers = { Accept: "text/event-stream", ...(lastId.value ? { "Last-Event-ID": lastId.value } : {}) };
      const response = await call(path, { headers, signal });
      const began = Date.now();
      onState({ state: "open" });
      for await (const event of events(response, alive)) {
        if (event.id) lastId.value = event.id;
        if (Date.now() - began > STABLE_AFTER) lastId.attempts = 0;
        if (onEvent(event) === true) return true;
      }
      return false;
    } finally {
      clearTimeout(timer);
    }
  }

  async function run() {
    const lastId = { value: "", attempts: 0 };
    onState({ state: "connecting" });
    while (!stopped.signal.aborted) {
      let error = null;
      try {
        if (await once(lastId)) {
          onState({ state: "ended" });
          return;
        }
      } catch (caught) {
        error = caught;
      }
      if (stopped.signal.aborted) return;
      const final = error instanceof ApiError && error.status >= 400 && error.status < 500 && error.status !== 429;
      if (final) {
        onState({ state: "failed", error });
        return;
      }
      const base = PAUSES[Math.min(lastId.attempts, PAUSES.length - 1)];
      lastId.attempts += 1;
      const wait = error?.retryAfter ? error.retryAfter * 1000 : base * (0.75 + Math.random() / 2);
      onState({ state: "away", retryAt: Date.now() + wait, error });
      await pause(wait, stopped.signal, (done) => (wake = done));
      while (document.hidden && !stopped.signal.aborted) await visible(stopped.signal);
    }
  }

  const hiddenSince = hideLong(() => restart.abort(), stopped.signal);
  window.addEventListener("offline", () => restart.abort(), { signal: stopped.signal });
  run();
  return {
    stop: () => {
      stopped.abort();
      hiddenSince();
    },
    retryNow: () => wake(),
  };
}

function visible(signal) {
  return new Promise((resolve) => {
    document.addEventListener("visibilitychange", resolve, { once: true });
    signal.addEventListener("abort", resolve, { once: true });
  });
}

/** Call back once the page has been hidden for a minute. Returns the undo. */
function hideLong(callback, signal) {
  let timer;
  const changed = () => {
    clearTimeout(timer);
    if (document.hidden) timer = setTimeout(callback, 60_000);
  };
  document.addEventListener("visibilitychange", changed, { signal });
  return () => clearTimeout(timer);
}
