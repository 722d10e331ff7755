/** The parts that all views are made of. */

import { now } from "./api.js";
import * as format from "./format.js";
import { Fragment, html, useEffect, useRef, useState } from "./html.js";
import { missed } from "./live.js";
import { createStore, useStore } from "./store.js";

// -- time ----------------------------------------------------------------------------------------------------------

const second = createStore(Math.floor(Date.now() / 1000));
setInterval(() => document.hidden || second.set(Math.floor(Date.now() / 1000)), 1000);

/** Now by the server's clock; draws again every second, or every `step` seconds. */
export function useNow(step = 1) {
  useStore(second, (value) => Math.floor(value / step));
  return now();
}

/** A time as people say it; the exact one, in UTC, in the title. */
export function Time({ iso, exact = false }) {
  const at = useNow(iso && now() - format.unix(iso) < 120 ? 1 : 15);
  if (!iso) return html`<span class="muted none">–</span>`;
  const text = exact ? format.localTime(iso) : format.relative(format.unix(iso), at);
  return html`<time datetime=${iso} title=${`${format.localTime(iso)} local, ${format.utc(iso)}`}>${text}</time>`;
}

/** Seconds from `from` until now (or `to`). */
export function Elapsed({ from, to }) {
  const at = useNow();
  if (!from) return html`<span class="muted none">–</span>`;
  const until = to ? format.unix(to) : at;
  const taken = until - format.unix(from);
  return html`<span class="num">${format.duration(to ? taken : Math.floor(Math.max(0, taken)))}</span>`;
}

// -- signs ---------------------------------------------------------------------------------------------------------

// 16 by 16, drawn with strokes; colour and size come from the text around them.
const ICONS = {
  pending: "M8 2a6 6 0 1 0 0 12A6 6 0 0 0 8 2M8 5v3.2l2.2 1.3",
  running: "M5 3.5v9l7.5-4.5z",
  completed: "M3 8.5l3.2 3.2L13 4.8",
  failed: "M4 4l8 8M12 4l-8 8",
  cancelled: "M8 2a6 6 0 1 0 0 12A6 6 0 0 0 8 2M3.8 3.8l8.4 8.4",
  online: "M3 8.5l3.2 3.2L13 4.8",
  busy: "M5 3.5v9l7.5-4.5z",
  offline: "M4 4l8 8M12 4l-8 8",
  draining: "M5.5 4v8M10.5 4v8",
  quarantined: "M8 2.5l6 10.5H2zM8 6.5v3M8 11.2v.3",
  warning: "M8 2.5l6 10.5H2zM8 6.5v3M8 11.2v.3",
  download: "M8 2.5v7.5M4.8 7l3.2 3.2L11.2 7M3 13.2h10",
  upload: "M8 10.5V3M4.8 6L8 2.8 11.2 6M3 13.2h10",
  plus: "M8 3v10M3 8h10",
  repeat: "M12.5 6A5 5 0 1 0 13 9M13 3v3.2H9.8",
  next: "M6 3.5L10.5 8 6 12.5",
  previous: "M10 3.5L5.5 8l4.5 4.5",
  copy: "M5.5 5.5h7v7h-7zM10.5 5.5v-2h-7v7h2",
  out: "M6 3H3v10h3M7 8h6.5M11 5.2L13.8 8 11 10.8",
};

export const Icon = ({ name }) => html`<svg class="icon" viewBox="0 0 16 16" aria-hidden="true"><path d=${ICONS[name]} /></svg>`;

/** A state as sign, word and colour. */
export const Badge = ({ state, children }) => html`
  <span class=${`badge state-${state}`}><${Icon} name=${state} />${children ?? state}</span>
`;

/** How a job stands; a failure with its reason. */
export function JobBadge({ job }) {
  if (job.status === "running" && job.cancel_requested_at) return html`<${Badge} state="cancelled">being cancelled<//>`;
  if (job.status === "running" && job.node_reachable === false) return html`<${Badge} state="warning">running, node away<//>`;
  return html`<${Badge} state=${job.status} />`;
}

/** A share from 0 to 1 as a bar. The number stands beside it, so the bar itself is silent. */
export function Bar({ share, tone = "" }) {
  const width = Math.max(0, Math.min(1, share ?? 0)) * 100;
  return html`
    <svg class=${`bar ${tone}`} aria-hidden="true" preserveAspectRatio="none">
      <rect class="bar-track" width="100%" height="100%" rx="3" />
      <rect class="bar-fill" width=${`${width}%`} height="100%" rx="3" />
    </svg>
  `;
}

// -- messages ------------------------------------------------------------------------------------------------------

/** Seconds left until `seconds` after this was first drawn for `key`. */
function useCountdown(seconds, key) {
  const [until, setUntil] = useState(null);
  useNow();
  useEffect(() => setUntil(seconds === null ? null : Date.now() / 1000 + seconds), [key]);
  if (seconds === null) return 0;
  return Math.max(0, Math.ceil((until ?? Date.now() / 1000 + seconds) - Date.now() / 1000));
}

/** What went wrong, in the server's words, and what can be done. */
export function Problem({ error, retry, children }) {
  const left = useCountdown(error?.retryAfter ?? null, error);
  if (!error) return null;
  return html`
    <div class="problem" role="alert">
      <${Icon} name="warning" />
      <div>
        <p>${error.message}</p>
        ${children}
        ${left > 0 && html`<p class="muted num">You can try again in ${format.duration(left)}.</p>`}
        ${error.requestId && error.status >= 500 && html`<p class="muted">Request ${error.requestId}</p>`}
        ${retry && html`<button type="button" class="small" disabled=${left > 0} onClick=${retry}>Try again</button>`}
      </div>
    </div>
  `;
}

/** Seconds until an error's Retry-After is over. */
export const useRetryAfter = (error) => useCountdown(error?.retryAfter ?? null, error);

export const Empty = ({ title, children }) => html`
  <div class="empty"><p class="empty-title">${title}</p>${children && html`<p>${children}</p>`}</div>
`;

export const Loading = ({ what }) => html`<p class="loading" role="status">Loading ${what}…</p>`;

/**
 * `load()` at first, whenever `keys` change, and when the page's stream has missed something: {value, error, again}.
 * What an older call brings late is dropped.
 */
export function useLoad(load, keys) {
  const key = JSON.stringify(keys);
  const [state, setState] = useState({ key, value: null, error: null });
  const [turn, setTurn] = useState(0);
  useEffect(() => {
    let current = true;
    load().then(
      (value) => current && setState({ key, value, error: null }),
      (error) => current && setState((before) => ({ key, value: before.key === key ? before.value : null, error })),
    );
    return () => (current = false);
  }, [key, turn]);
  const again = () => setTurn((count) => count + 1);
  const gaps = useStore(missed);
  const gap = useRef(gaps);
  useEffect(() => {
    if (gap.current !== gaps) again();
    gap.current = gaps;
  }, [gaps]);
  // What was fetched for other keys is not an answer to these.
  return state.key === key ? { value: state.value, error: state.error, again } : { value: null, error: null, again };
}

// -- controls ------------------------------------------------------------------------------------------------------

/** A button whose work takes a moment; it can't be pressed twice. `onClick` may raise: `onError` gets it. */
export function Action({ onClick, onError, children, class: kind = "", ...rest }) {
  const [working, setWorking] = useState(false);
  const alive = useRef(true);
  useEffect(() => () => (alive.current = false), []);
  async function run() {
    setWorking(true);
    try {
      await onClick();
    } catch (error) {
      onError?.(error);
    } finally {
      if (alive.current) setWorking(false);
    }
  }
  return html`
    <button type="button" class=${kind} aria-busy=${working} disabled=${working} onClick=${run} ...${rest}>${children}</button>
  `;
}

/** A labelled input with its hint and its error. */
export function Field({ label, name, error, hint, input, optional = false }) {
  const described = [hint && `${name}-hint`, error && `${name}-error`].filter(Boolean).join(" ");
  return html`
    <div class="field">
      <label for=${name}>${label}${optional && html` <span class="muted">(optional)</span>`}</label>
      ${input({ id: name, name, "aria-invalid": error ? "true" : undefined, "aria-describedby": described || undefined })}
      ${error && html`<p class="field-error" id=${`${name}-error`}><${Icon} name="warning" />${error}</p>`}
      ${hint && html`<p class="hint" id=${`${name}-hint`}>${hint}</p>`}
    </div>
  `;
}

/** A question in a modal dialog. `onClose(confirmed)`. */
export function Confirm({ title, children, confirm, onClose }) {
  const dialog = useRef(null);
  useEffect(() => dialog.current.showModal(), []);
  return html`
    <dialog ref=${dialog} aria-labelledby="dialog-title" onClose=${(event) => onClose(event.target.returnValue === "yes")}>
      <form method="dialog">
        <h2 id="dialog-title">${title}</h2>
        ${children}
        <div class="actions end">
          <button value="no">Go back</button>
          <button value="yes" class="danger">${confirm}</button>
        </div>
      </form>
    </dialog>
  `;
}

/**
 * A table that becomes a list of cards on narrow screens; roles are given so that it stays a table for screen readers.
 * `columns`: [{label, cell(row), num?, wide?}].
 */
export function Table({ label, columns, rows, rowKey }) {
  return html`
    <table class="cards" role="table" aria-label=${label}>
      <thead role="rowgroup">
        <tr role="row">
          ${columns.map((column) => html`<th role="columnheader" scope="col" class=${column.num ? "right" : ""}>${column.label}</th>`)}
        </tr>
      </thead>
      <tbody role="rowgroup">
        ${rows.map(
          (row, index) => html`
            <tr role="row" key=${rowKey ? rowKey(row) : index}>
              ${columns.map(
                (column) => html`
                  <td role="cell" data-label=${column.label} class=${column.num ? "right num" : ""}>
                    <div class="cell">${column.cell(row)}</div>
                  </td>
                `,
              )}
            </tr>
          `,
        )}
      </tbody>
    </table>
  `;
}

/** Tabs by the ARIA pattern: arrows move, one tab stop. `tabs`: [{id, label, view()}]. */
export function Tabs({ label, tabs, current, onChange }) {
  const chosen = tabs.find((tab) => tab.id === current) ?? tabs[0];
  function move(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const at = tabs.indexOf(chosen);
    const to = event.key === "Home" ? 0 : event.key === "End" ? tabs.length - 1 : at + step;
    if (Number.isNaN(to)) return;
    event.preventDefault();
    const next = tabs[(to + tabs.length) % tabs.length];
    onChange(next.id);
    document.getElementById(`tab-${next.id}`)?.focus();
  }
  return html`
    <${Fragment}>
      <div class="tabs" role="tablist" aria-label=${label} onKeyDown=${move}>
        ${tabs.map(
          (tab) => html`
            <button
              type="button"
              role="tab"
              id=${`tab-${tab.id}`}
              aria-selected=${tab === chosen ? "true" : "false"}
              aria-controls=${`panel-${tab.id}`}
              tabindex=${tab === chosen ? 0 : -1}
              onClick=${() => onChange(tab.id)}
            >
              ${tab.label}
            </button>
          `,
        )}
      </div>
      <section role="tabpanel" id=${`panel-${chosen.id}`} aria-labelledby=${`tab-${chosen.id}`} key=${chosen.id}>
        ${chosen.view()}
      </section>
    <//>
  `;
}

/** A choice of few, as joined buttons. `options`: [[value, label]]. */
export const Choice = ({ label, options, value, onChange }) => html`
  <div class="choice" role="group" aria-label=${label}>
    ${options.map(
      ([option, text]) => html`
        <button type="button" aria-pressed=${option === value ? "true" : "false"} onClick=${() => onChange(option)}>${text}</button>
      `,
    )}
  </div>
`;
