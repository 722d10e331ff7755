/** All jobs that one may see, with filters and pages. */

import * as api from "../api.js";
import { html, useEffect, useState } from "../html.js";
import { jobs as liveJobs } from "../live.js";
import { go, href } from "../router.js";
import { useStore } from "../store.js";
import { Empty, Icon, Loading, Problem, Table, useLoad } from "../ui.js";
import { jobColumns } from "./job-list.js";

const PAGE = 25;
const STATES = ["pending", "running", "completed", "failed", "cancelled"];
const FILTERS = ["status", "competition_id", "project_id", "user_id"];

// Which page came before the one that a cursor begins; the address alone doesn't say.
const before = new Map();

const filtersOf = (params) => Object.fromEntries(FILTERS.map((name) => [name, params.get(name) ?? ""]));

function Filters({ user, filters }) {
  const [draft, setDraft] = useState(filters);
  const key = JSON.stringify(filters);
  useEffect(() => setDraft(filters), [key]);
  const set = (name) => (event) => setDraft({ ...draft, [name]: event.target.value });
  const trimmed = () => Object.fromEntries(Object.entries(draft).map(([name, value]) => [name, value.trim()]));
  const text = (name, label) => html`
    <div class="field">
      <label for=${`filter-${name}`}>${label}</label>
      <input id=${`filter-${name}`} value=${draft[name]} onInput=${set(name)} maxlength="64" spellcheck="false" autocapitalize="none" />
    </div>
  `;
  return html`
    <form
      class="filters"
      role="search"
      aria-label="Filter jobs"
      onSubmit=${(event) => {
        event.preventDefault();
        go(href(["jobs"], trimmed()));
      }}
    >
      <div class="field">
        <label for="filter-status">State</label>
        <select
          id="filter-status"
          value=${draft.status}
          onChange=${(event) => go(href(["jobs"], { ...trimmed(), status: event.target.value }))}
        >
          <option value="">any</option>
          ${STATES.map((state) => html`<option value=${state}>${state}</option>`)}
        </select>
      </div>
      ${text("competition_id", "Competition")} ${text("project_id", "Project")} ${user.is_admin && text("user_id", "User")}
      <div class="actions">
        <button>Filter</button>
        ${Object.values(filters).some(Boolean) && html`<a class="button quiet" href=${href(["jobs"])}>Clear</a>`}
      </div>
    </form>
  `;
}

const matches = (job, filters) => FILTERS.every((name) => !filters[name] || job[name] === filters[name]);

export default function Jobs({ user, where }) {
  const filters = filtersOf(where.params);
  const cursor = where.params.get("cursor");
  const path = `api/jobs${api.query({ ...filters, limit: PAGE, cursor })}`;
  const { value, error, again } = useLoad(() => api.json(path), [path]);
  const live = useStore(liveJobs);
  let content;
  if (error) content = html`<${Problem} error=${error} retry=${again} />`;
  else if (!value) content = html`<${Loading} what="jobs" />`;
  else {
    const listed = new Set(value.jobs.map((job) => job.job_id));
    const fresh = cursor
      ? []
      : [...live.values()].filter(
          (job) =>
            !listed.has(job.job_id) &&
            matches(job, filters) &&
            (user.is_admin || job.user_id === user.user_id) &&
            (value.jobs.length === 0 || job.created_at > value.jobs[0].created_at),
        );
    fresh.sort((one, other) => (one.created_at < other.created_at ? 1 : -1));
    const rows = [...fresh, ...value.jobs].map((job) => live.get(job.job_id) ?? job);
    content = rows.length > 0
      ? html`<${Table} label="Jobs" columns=${jobColumns(user)} rows=${rows} rowKey=${(job) => job.job_id} />`
      : html`
          <${Empty} title=${Object.values(filters).some(Boolean) ? "No job matches these filters" : "No jobs yet"}>
            ${Object.values(filters).some(Boolean)
              ? html`<a href=${href(["jobs"])}>Show all jobs</a>`
              : html`<a href=${href(["submit"])}>Submit a Python file</a>; it appears here.`}
          <//>
        `;
    if (value.next_cursor) before.set(value.next_cursor, cursor);
  }
  const previous = cursor && href(["jobs"], { ...filters, cursor: before.get(cursor) });
  const next = value?.next_cursor && href(["jobs"], { ...filters, cursor: value.next_cursor });
  return html`
    <div class="title-row">
      <h1 tabindex="-1">${user.is_admin ? "Jobs of all users" : "Your jobs"}</h1>
      <a class="button primary" href=${href(["submit"])}><${Icon} name="plus" />Submit a job</a>
    </div>
    <${Filters} user=${user} filters=${filters} />
    <section class="panel" aria-label="List of jobs">${content}</section>
    ${(previous || next) &&
    html`
      <nav class="pages" aria-label="Pages">
        ${previous ? html`<a class="button" href=${previous}><${Icon} name="previous" />Newer</a>` : html`<span></span>`}
        ${next && html`<a class="button" href=${next}>Older<${Icon} name="next" /></a>`}
      </nav>
    `}
  `;
}
