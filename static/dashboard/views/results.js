/** A job's records: as a table, as the raw lines, and as a file. */

import * as api from "../api.js";
import * as format from "../format.js";
import { html, useState } from "../html.js";
import { Action, Choice, Empty, Icon, Loading, Problem, useLoad } from "../ui.js";

const PREVIEW = 1 << 20; // characters of the file that are shown
const ROWS = 50;
const COLUMNS_MOST = 30;
const CELL_MOST = 300; // characters

/** The beginning of the results file: {text, size, whole}; the rest isn't fetched. */
async function preview(jobId) {
  const response = await api.call(`${api.jobPath("results", jobId)}?format=jsonl`);
  const size = Number(response.headers.get("content-length") ?? NaN);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return { text, size, whole: true };
    text += value;
    if (text.length > PREVIEW) {
      reader.cancel();
      // The last line may be cut.
      return { text: text.slice(0, text.lastIndexOf("\n", PREVIEW) + 1), size, whole: false };
    }
  }
}

function parse(text) {
  const records = [];
  for (const line of text.split("\n")) {
    if (line.trim() === "") continue;
    try {
      records.push(JSON.parse(line));
    } catch {
      records.push({ line }); // the server publishes strict lines only; one that is cut is shown as it is
    }
  }
  return records;
}

function cellText(value) {
  if (value === undefined) return "";
  return typeof value === "string" ? value : JSON.stringify(value);
}

function Value({ value }) {
  const text = cellText(value);
  const kind = typeof value === "number" ? "num" : "";
  if (text.length <= CELL_MOST) return html`<span class=${kind}>${text}</span>`;
  return html`<span title=${`${text.length} characters; the raw view has all`}>${text.slice(0, CELL_MOST)}…</span>`;
}

function RecordTable({ records, whole }) {
  const [page, setPage] = useState(0);
  const names = new Set();
  for (const record of records) for (const name of Object.keys(record)) names.add(name);
  const columns = [...names].slice(0, COLUMNS_MOST);
  const pages = Math.ceil(records.length / ROWS);
  const from = page * ROWS;
  const rows = records.slice(from, from + ROWS);
  const numeric = new Set(columns.filter((name) => records.every((record) => !Object.hasOwn(record, name) || typeof record[name] === "number")));
  return html`
    <div class="scroll" role="region" aria-label="Results, scrollable" tabindex="0">
      <table class="data" aria-label="Results">
        <thead>
          <tr>
            <th scope="col" class="right">#</th>
            ${columns.map((name) => html`<th scope="col" class=${numeric.has(name) ? "right" : ""}>${name}</th>`)}
          </tr>
        </thead>
        <tbody>
          ${rows.map(
            (record, index) => html`
              <tr key=${from + index}>
                <td class="right num muted">${from + index + 1}</td>
                ${columns.map((name) => html`<td class=${numeric.has(name) ? "right num" : ""}><${Value} value=${Object.hasOwn(record, name) ? record[name] : undefined} /></td>`)}
              </tr>
            `,
          )}
        </tbody>
      </table>
    </div>
    ${names.size > COLUMNS_MOST && html`<p class="hint">${names.size - COLUMNS_MOST} further columns are in the raw view.</p>`}
    ${pages > 1 &&
    html`
      <nav class="pages" aria-label="Pages of results">
        <button type="button" disabled=${page === 0} onClick=${() => setPage(page - 1)}><${Icon} name="previous" />Previous</button>
        <span class="muted num" aria-live="polite">${from + 1}–${Math.min(from + ROWS, records.length)} of ${whole ? "" : "the first "}${records.length}</span>
        <button type="button" disabled=${page === pages - 1} onClick=${() => setPage(page + 1)}>Next<${Icon} name="next" /></button>
      </nav>
    `}
  `;
}

export function Results({ job }) {
  const [shown, setShown] = useState("table");
  const [failed, setFailed] = useState(null);
  const { value, error, again } = useLoad(() => preview(job.job_id), [job.job_id, job.status]);
  if (error?.status === 404) {
    return html`
      <${Empty} title="No results file">
        ${job.status === "completed" ? error.message : job.message || "The job ended before it left valid results."}
      <//>
    `;
  }
  if (error) return html`<${Problem} error=${error} retry=${again} />`;
  if (!value) return html`<${Loading} what="results" />`;
  const records = parse(value.text);
  if (records.length === 0) return html`<${Empty} title="No records">The job wrote no results and printed nothing.<//>`;
  const save = () =>
    api.download(`${api.jobPath("results", job.job_id)}?format=jsonl`, `${job.user_id}_${job.competition_id}_${format.shortId(job.job_id)}.jsonl`);
  return html`
    <div class="toolbar">
      <${Choice} label="Show as" options=${[["table", "Table"], ["raw", "Raw"]]} value=${shown} onChange=${setShown} />
      <span class="muted num">${Number.isNaN(value.size) ? "" : format.bytes(value.size)}</span>
      <${Action} class="small" onClick=${save} onError=${setFailed}><${Icon} name="download" />Download<//>
    </div>
    <${Problem} error=${failed} />
    ${!value.whole && html`<p class="hint">The first ${format.bytes(PREVIEW)} are shown; the download has everything.</p>`}
    ${shown === "table"
      ? html`<${RecordTable} records=${records} whole=${value.whole} />`
      : html`<pre class="raw" tabindex="0" role="region" aria-label="Raw results">${value.text}</pre>`}
  `;
}
