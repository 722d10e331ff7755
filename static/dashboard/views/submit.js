/** The form that queues a job: a file by drag and drop, by choice or pasted, and where it belongs. */

import * as api from "../api.js";
import * as format from "../format.js";
import { html, useEffect, useRef, useState } from "../html.js";
import { learn, queue as liveQueue } from "../live.js";
import { go, href } from "../router.js";
import { confirmDone } from "../session.js";
import { useStore } from "../store.js";
import { Field, Icon, Problem, useRetryAfter } from "../ui.js";

const LAST_KEY = "gpuq.last";
const ID = /^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}$/; // as the server has it
const EDITABLE = 256 * 1024; // bytes; larger files are sent as they are, without an editor
const NAMES = ["competition_id", "project_id", "expected_time"];

const EXAMPLE = `import json
import os

with open(os.environ["RESULTS_FILE"], "w") as results:
    results.write(json.dumps({"score": 0.93}) + "\\n")
`;

function remembered() {
  try {
    return { competition_id: "", project_id: "", expected_time: "60", ...JSON.parse(sessionStorage.getItem(LAST_KEY)) };
  } catch {
    return { competition_id: "", project_id: "", expected_time: "60" };
  }
}

/** A key that no other attempt has. crypto.randomUUID exists only where the page came by HTTPS or from localhost. */
function newKey() {
  const random = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(random, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** What the server would refuse, by field. */
export function check(fields, source, limits) {
  const wrong = {};
  for (const name of ["competition_id", "project_id"]) {
    if (!fields[name]) wrong[name] = "Fill this in.";
    else if (!ID.test(fields[name])) {
      wrong[name] = "1 to 64 letters, digits, dots, dashes or underscores, not beginning with a dot or a dash.";
    }
  }
  const seconds = Number(fields.expected_time);
  if (fields.expected_time === "" || Number.isNaN(seconds)) wrong.expected_time = "A number of seconds.";
  else if (seconds < 1 || seconds > limits.max_expected_time) {
    wrong.expected_time = `From 1 to ${limits.max_expected_time} seconds.`;
  }
  const size = source.file ? source.file.size : new Blob([source.text]).size;
  if (size === 0) wrong.code = "Choose a Python file, drop one here, or paste the code.";
  else if (size > limits.max_code_bytes) {
    wrong.code = `The code has ${format.bytes(size)}; the server takes ${format.bytes(limits.max_code_bytes)}.`;
  }
  return wrong;
}

/** The text of a small file that is valid UTF-8, else null. */
async function readable(file) {
  if (file.size > EDITABLE) return null;
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
  } catch {
    return null;
  }
}

function Source({ source, onChange, error, limits }) {
  const [over, setOver] = useState(false);
  const [refused, setRefused] = useState(null);
  const chooser = useRef(null);

  async function take(files) {
    setOver(false);
    const file = files[0];
    if (!file) return;
    if (files.length > 1) {
      setRefused("One file makes a job; drop a single one.");
      return;
    }
    if (file.size > limits.max_code_bytes) {
      setRefused(`${file.name} has ${format.bytes(file.size)}; the server takes ${format.bytes(limits.max_code_bytes)}.`);
      return;
    }
    setRefused(null);
    const text = await readable(file);
    onChange({ file, name: file.name, text: text ?? "", opaque: text === null });
  }

  const said = refused ?? error;
  return html`
    <div
      class=${over ? "drop over" : "drop"}
      onDragOver=${(event) => {
        event.preventDefault();
        setOver(true);
      }}
      onDragLeave=${() => setOver(false)}
      onDrop=${(event) => {
        event.preventDefault();
        take(event.dataTransfer.files);
      }}
    >
      <div class="drop-head">
        <${Icon} name="upload" />
        <span>
          ${source.name
            ? html`<strong class="file-name">${source.name}</strong> <span class="muted num">${source.file && format.bytes(source.file.size)}</span>`
            : "Drop a Python file here"}
        </span>
        <button type="button" class="small" onClick=${() => chooser.current.click()}>${source.name ? "Choose another file" : "Choose a file"}</button>
        ${source.name &&
        html`<button type="button" class="small quiet" onClick=${() => onChange({ file: null, name: "", text: "", opaque: false })}>Remove</button>`}
        <input
          ref=${chooser}
          id="file"
          class="visually-hidden"
          type="file"
          accept=".py,text/x-python,text/plain"
          tabindex="-1"
          aria-label="Python file"
          onChange=${(event) => {
            take(event.target.files);
            event.target.value = "";
          }}
        />
      </div>
      ${source.opaque
        ? html`<p class="muted">The file is sent as it is; it is too large or no text, so it isn't shown.</p>`
        : html`
            <label for="code" class="visually-hidden">Code</label>
            <textarea
              id="code"
              rows="14"
              spellcheck="false"
              autocapitalize="none"
              autocomplete="off"
              wrap="off"
              placeholder=${EXAMPLE}
              aria-invalid=${said ? "true" : undefined}
              aria-describedby=${said ? "code-error" : undefined}
              value=${source.text}
              onInput=${(event) => onChange({ ...source, file: null, text: event.target.value })}
            ></textarea>
          `}
      ${said && html`<p class="field-error" id="code-error"><${Icon} name="warning" />${said}</p>`}
    </div>
  `;
}

function Wait() {
  const queue = useStore(liveQueue);
  if (!queue) return null;
  const { queue_length: length, expected_wait_seconds: wait } = queue;
  if (wait === null) return html`<p class="hint">No node takes jobs at the moment; the job waits until one does.</p>`;
  if (length === 0 && wait < 1) return html`<p class="hint">A node is free: the job starts at once.</p>`;
  return html`<p class="hint">${format.plural(length, "job waits", "jobs wait")}; a new one starts in about ${format.roughly(wait)}.</p>`;
}

export default function Submit({ user, where }) {
  const from = where.params.get("from");
  const [fields, setFields] = useState(remembered);
  const [source, setSource] = useState({ file: null, name: "", text: "", opaque: false });
  const [wrong, setWrong] = useState({});
  const [error, setError] = useState(null);
  const [working, setWorking] = useState(false);
  const attempt = useRef(null); // {key, body}: what a retry must send again
  const form = useRef(null);
  const left = useRetryAfter(error);

  useEffect(() => {
    if (!from) return undefined;
    let current = true;
    Promise.all([api.json(api.jobPath("status", from)), api.call(api.jobPath("code", from)).then((answer) => answer.blob())]).then(
      async ([job, blob]) => {
        const file = new File([blob], "solution.py");
        const text = await readable(file);
        if (!current) return;
        setFields({ competition_id: job.competition_id, project_id: job.project_id, expected_time: String(job.expected_time) });
        setSource({ file, name: "solution.py", text: text ?? "", opaque: text === null });
      },
      (caught) => current && setError(caught),
    );
    return () => (current = false);
  }, [from]);

  function edit(change) {
    change();
    attempt.current = null; // another submission, another key
    setError(null);
  }

  function showWrong(found) {
    setWrong(found);
    const first = [...NAMES, "code"].find((name) => found[name]);
    if (first) requestAnimationFrame(() => form.current?.querySelector(`#${first}`)?.focus());
  }

  async function submit(event) {
    event.preventDefault();
    const trimmed = Object.fromEntries(Object.entries(fields).map(([name, value]) => [name, value.trim()]));
    const found = check(trimmed, source, user.limits);
    setError(null);
    showWrong(found);
    if (Object.keys(found).length > 0) return;
    const config = { ...trimmed, expected_time: Number(trimmed.expected_time), user_id: user.user_id };
    const body = new FormData();
    body.append("code", source.file ?? new Blob([source.text], { type: "text/x-python" }), "solution.py");
    body.append("config_file", new Blob([JSON.stringify(config)], { type: "application/json" }), "config.json");
    attempt.current ??= newKey();
    setWorking(true);
    try {
      const job = await api.json("api/submit?wait=false", {
        method: "POST",
        headers: { "Idempotency-Key": attempt.current },
        body,
      });
      sessionStorage.setItem(LAST_KEY, JSON.stringify(trimmed));
      learn(job);
      confirmDone("The job is queued.");
      go(href(["jobs", job.job_id]));
    } catch (caught) {
      setWorking(false);
      const byField = Object.fromEntries(caught.errors?.map(({ field, message }) => [field, message]) ?? []);
      showWrong(byField);
      setError(caught);
    }
  }

  const set = (name) => (event) => edit(() => setFields({ ...fields, [name]: event.target.value }));
  const text = (name, label, hint, extra = {}) => html`
    <${Field}
      label=${label}
      name=${name}
      error=${wrong[name]}
      hint=${hint}
      input=${(attributes) => html`
        <input ...${attributes} value=${fields[name]} onInput=${set(name)} spellcheck="false" autocapitalize="none" autocomplete="off" ...${extra} />
      `}
    />
  `;
  return html`
    <h1 tabindex="-1">${from ? "Submit again" : "Submit a job"}</h1>
    <form class="submit" ref=${form} onSubmit=${submit} novalidate>
      <div class="panel">
        <h2>Code</h2>
        <${Source} source=${source} error=${wrong.code} limits=${user.limits} onChange=${(next) => edit(() => setSource(next))} />
      </div>
      <div class="panel">
        <h2>Where it belongs</h2>
        ${text("competition_id", "Competition", null, { maxlength: 64 })} ${text("project_id", "Project", null, { maxlength: 64 })}
        ${text("expected_time", "Expected time in seconds", `At most ${user.limits.max_expected_time} (${format.duration(user.limits.max_expected_time)}). A job that runs much longer is ended.`, {
          inputmode: "decimal",
        })}
        <${Wait} />
        <${Problem} error=${error}>
          ${error?.status === 429 && html`<p><a href=${href(["jobs"])}>See your jobs</a></p>`}
        <//>
        <button class="primary wide" disabled=${working || left > 0} aria-busy=${working}>
          ${working ? "Submitting…" : left > 0 ? `Submit (in ${left} s)` : "Submit"}
        </button>
      </div>
    </form>
  `;
}
