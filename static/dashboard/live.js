/** What the server tells by itself: nodes, queue and jobs, over one event stream for the whole page. */

import { follow } from "./api.js";
import { announce, me } from "./session.js";
import { createStore } from "./store.js";

const JOBS_KEPT = 500;

export const nodes = createStore(null);
export const queue = createStore(null);
export const health = createStore(null);
/** job_id → its newest status; only of jobs that changed while the page was open. */
export const jobs = createStore(new Map());
/** Grows when changes were missed: what a view has fetched may be old then. */
export const missed = createStore(0);
/** {state, retryAt, error} of the stream. */
export const connection = createStore({ state: "connecting" });

let stream = null;

function takeJob(status) {
  jobs.set((known) => {
    const next = new Map(known);
    next.delete(status.job_id);
    next.set(status.job_id, status);
    while (next.size > JOBS_KEPT) next.delete(next.keys().next().value);
    return next;
  });
}

/** A status that a view has fetched; it may have been overtaken by the stream. */
export function learn(status) {
  const known = jobs.get().get(status.job_id);
  if (known === undefined || known.completed_at === null) takeJob(status);
}

const TAKE = {
  nodes: (data) => nodes.set(data),
  queue: (data) => queue.set(data),
  health: (data) => health.set(data),
  missed: () => missed.set((count) => count + 1),
  job(status) {
    const before = jobs.get().get(status.job_id)?.status;
    takeJob(status);
    if (before !== undefined && before !== status.status && status.user_id === me.get()?.user_id) {
      announce(`Your job in ${status.competition_id} is ${status.status}.`);
    }
  },
};

/** Open the stream, if it isn't. */
export function ensure() {
  if (stream === null) start();
}

/** Open the stream anew. */
export function start() {
  stop();
  let opened = false;
  stream = follow("api/stream", {
    onEvent({ event, data }) {
      TAKE[event]?.(JSON.parse(data));
    },
    onState(state) {
      connection.set(state);
      if (state.state !== "open") return;
      if (opened) missed.set((count) => count + 1);
      opened = true;
    },
  });
}

export function stop() {
  stream?.stop();
  stream = null;
  for (const store of [nodes, queue, health]) store.set(null);
  jobs.set(new Map());
}

export const retryNow = () => stream?.retryNow();
