/** For administrators: users and their tokens' state, nodes to drain and resume, the audit log. */

import * as api from "../api.js";
import * as format from "../format.js";
import { html, useState } from "../html.js";
import { nodes as liveNodes } from "../live.js";
import { go, href } from "../router.js";
import { confirmDone } from "../session.js";
import { useStore } from "../store.js";
import { Action, Badge, Empty, Icon, Loading, Problem, Table, Tabs, Time, useLoad } from "../ui.js";
import { JobLink } from "./job-list.js";

const NONE = html`<span class="muted none">–</span>`;

/** Pages of an admin's list, added one after another. */
function usePages(path, name) {
  const [more, setMore] = useState({ rows: [], cursor: undefined });
  const first = useLoad(() => api.json(path), [path]);
  const rows = first.value ? [...first.value[name], ...more.rows] : null;
  const cursor = more.cursor === undefined ? first.value?.next_cursor : more.cursor;
  async function load() {
    const page = await api.json(`${path}${path.includes("?") ? "&" : "?"}cursor=${encodeURIComponent(cursor)}`);
    setMore({ rows: [...more.rows, ...page[name]], cursor: page.next_cursor });
  }
  function again() {
    setMore({ rows: [], cursor: undefined });
    first.again();
  }
  return { rows, error: first.error, again, load: cursor ? load : null };
}

function Pages({ pages, what, empty, label, columns, rowKey }) {
  const [failed, setFailed] = useState(null);
  if (pages.error) return html`<${Problem} error=${pages.error} retry=${pages.again} />`;
  if (!pages.rows) return html`<${Loading} what=${what} />`;
  if (pages.rows.length === 0) return html`<${Empty} title=${empty} />`;
  return html`
    <${Table} label=${label} columns=${columns} rows=${pages.rows} rowKey=${rowKey} />
    <${Problem} error=${failed} />
    <div class="actions spaced">
      ${pages.load && html`<${Action} onClick=${pages.load} onError=${setFailed}>Show more<//>`}
      <button type="button" class="quiet" onClick=${pages.again}><${Icon} name="repeat" />Load again</button>
    </div>
  `;
}

const TOKEN_SIGNS = { active: "online", expired: "pending", revoked: "cancelled" };

function Users() {
  const pages = usePages("api/admin/users?limit=100", "users");
  const columns = [
    { label: "User", cell: (user) => html`<strong>${user.user_id}</strong>${user.is_admin && html` <span class="tag">admin</span>`}` },
    {
      label: "Token",
      cell: (user) => (user.token_state ? html`<${Badge} state=${TOKEN_SIGNS[user.token_state] ?? "offline"}>${user.token_state}<//>` : NONE),
    },
    { label: "Made", cell: (user) => html`<${Time} iso=${user.token_created_at} />` },
    { label: "Ends", cell: (user) => html`<${Time} iso=${user.token_expires_at} />` },
    { label: "Last used", cell: (user) => (user.token_last_used_at ? html`<${Time} iso=${user.token_last_used_at} />` : html`<span class="muted">never</span>`) },
    { label: "Active jobs", num: true, cell: (user) => user.active_jobs },
    {
      label: "All jobs",
      num: true,
      cell: (user) => (user.jobs_total > 0 ? html`<a href=${href(["jobs"], { user_id: user.user_id })} aria-label=${`${user.jobs_total} jobs of ${user.user_id}`}>${user.jobs_total}</a>` : 0),
    },
    { label: "Last job", cell: (user) => html`<${Time} iso=${user.last_job_at} />` },
  ];
  return html`
    <p class="hint">Tokens are made and revoked at the server's shell: <code>python3 token_manager.py create USER</code>, <code>revoke --user USER</code>.</p>
    <${Pages} pages=${pages} what="users" empty="No users yet" label="Users" columns=${columns} rowKey=${(user) => user.user_id} />
  `;
}

function Nodes() {
  const nodes = useStore(liveNodes);
  const [failed, setFailed] = useState(null);
  if (!nodes) return html`<${Loading} what="nodes" />`;
  async function change(node, what) {
    setFailed(null);
    const answer = await api.json(`api/admin/nodes/${encodeURIComponent(node.node_id)}/${what}`, { method: "POST" });
    liveNodes.set((known) => ({
      ...known,
      nodes: known.nodes.map((other) => (other.node_id === node.node_id ? { ...other, status: answer.status } : other)),
    }));
    confirmDone(`${node.node_id}: ${answer.message}`);
  }
  const columns = [
    { label: "Node", cell: (node) => html`<strong>${node.node_id}</strong>` },
    { label: "State", cell: (node) => html`<${Badge} state=${node.status} />` },
    { label: "Address", cell: (node) => html`<span class="mono">${node.address ?? "–"}</span>` },
    { label: "Job", cell: (node) => (node.job_id ? html`<${JobLink} id=${node.job_id} /> ${node.user_id ?? ""}` : NONE) },
    { label: "Done", num: true, cell: (node) => node.jobs_completed },
    { label: "Failed", num: true, cell: (node) => node.jobs_failed },
    { label: "Node faults", num: true, cell: (node) => node.infra_failures ?? 0 },
    { label: "Disk free", num: true, cell: (node) => format.bytes(node.free_bytes) },
    { label: "Sandbox", cell: (node) => (node.sandbox === null || node.sandbox === undefined ? NONE : node.sandbox ? "yes" : "no") },
    { label: "Remark", cell: (node) => node.reason || foreign(node) || NONE },
    {
      label: "Work",
      cell: (node) => {
        const what = node.status === "draining" ? "resume" : "drain";
        return html`
          <${Action} class="small" aria-label=${`${what === "drain" ? "Drain" : "Resume"} ${node.node_id}`} onClick=${() => change(node, what)} onError=${setFailed}>
            ${what === "drain" ? "Drain" : "Resume"}
          <//>
        `;
      },
    },
  ];
  return html`
    <p class="hint">A drained node gets no further job; its running one finishes. It stays drained over restarts.</p>
    <${Problem} error=${failed} />
    <${Table} label="Nodes" columns=${columns} rows=${nodes.nodes} rowKey=${(node) => node.node_id} />
  `;
}

function foreign(node) {
  const found = node.foreign_processes ?? [];
  return found.length > 0 ? `not ours on its GPU: ${found.map(({ name, pid }) => `${name ?? "?"} (${pid})`).join(", ")}` : "";
}

function Audit() {
  const pages = usePages("api/admin/audit?limit=50", "entries");
  const columns = [
    { label: "Time", cell: (entry) => html`<${Time} iso=${entry.time} exact />` },
    { label: "Who", cell: (entry) => entry.actor },
    { label: "What", cell: (entry) => entry.action.replaceAll("_", " ") },
    { label: "Whom or what", cell: (entry) => entry.subject },
    { label: "Detail", cell: (entry) => entry.detail ?? NONE },
    { label: "Address", cell: (entry) => (entry.address ? html`<span class="mono">${entry.address}</span>` : NONE) },
  ];
  return html`<${Pages} pages=${pages} what="the audit log" empty="Nothing was noted yet" label="Audit log" columns=${columns} />`;
}

const TABS = [
  { id: "users", label: "Users", view: () => html`<${Users} />` },
  { id: "nodes", label: "Nodes", view: () => html`<${Nodes} />` },
  { id: "audit", label: "Audit log", view: () => html`<${Audit} />` },
];

export default function Admin({ where }) {
  return html`
    <h1 tabindex="-1">Administration</h1>
    <div class="panel">
      <${Tabs}
        label="Parts of the administration"
        tabs=${TABS}
        current=${where.parts[1] ?? "users"}
        onChange=${(tab) => go(href(["admin", tab]), { replace: true })}
      />
    </div>
  `;
}
