/** The first view: how things stand, the nodes, the queue, and one's own jobs. */

import * as api from "../api.js";
import * as format from "../format.js";
import { html } from "../html.js";
import { health as liveHealth, jobs as liveJobs, learn, nodes as liveNodes, queue as liveQueue } from "../live.js";
import { href } from "../router.js";
import { useStore } from "../store.js";
import { Badge, Bar, Empty, Icon, Loading, Problem, Table, Time, useLoad } from "../ui.js";
import { JobLink, jobColumns } from "./job-list.js";

const RECENT = 8;

const Tile = ({ label, value, note }) => html`
  <div class="tile">
    <dt>${label}</dt>
    <dd class="num">${value}</dd>
    ${note && html`<dd class="tile-note">${note}</dd>`}
  </div>
`;

function Tiles({ nodes, queue }) {
  const free = nodes.nodes.filter((node) => node.status === "online").length;
  const unfit = nodes.nodes.filter((node) => ["offline", "quarantined", "draining"].includes(node.status)).length;
  const wait = queue ? queue.expected_wait_seconds : nodes.expected_wait;
  const mine = queue?.entries.find((entry) => entry.mine);
  return html`
    <dl class="tiles">
      <${Tile} label="Waiting" value=${queue?.queue_length ?? nodes.queue_length} note=${mine && `yours has place ${mine.position}`} />
      <${Tile} label="Running" value=${queue?.running ?? nodes.running_jobs} />
      <${Tile}
        label="A new job waits"
        value=${wait === null ? "–" : wait < 1 ? "no time" : format.roughly(wait)}
        note=${wait === null ? "no node takes jobs" : undefined}
      />
      <${Tile}
        label="Free nodes"
        value=${html`${free}<span class="of"> of ${nodes.nodes.length}</span>`}
        note=${unfit > 0 ? `${unfit} not taking jobs` : undefined}
      />
    </dl>
  `;
}

const Meter = ({ label, text, share, tone }) => html`
  <div class="meter">
    <span class="meter-label">${label}</span>
    <span class="num">${text}</span>
    ${share !== null && html`<${Bar} share=${share} tone=${tone} />`}
  </div>
`;

function CurrentJob({ node, mine, user }) {
  if (!node.is_busy) return html`<span class="muted">none</span>`;
  if (node.job_id) {
    return html`<${JobLink} id=${node.job_id} />${node.user_id && html`<span class="muted"> of ${node.user_id}</span>`}`;
  }
  if (mine) return html`<${JobLink} id=${mine} /><span class="muted"> (yours)</span>`;
  return html`<span class="muted">${user.is_admin ? "not known" : "another user's"}</span>`;
}

function NodeCard({ node, mine, user }) {
  const used = node.gpu_memory_total_mib ? node.gpu_memory_used_mib / node.gpu_memory_total_mib : null;
  const hot = node.gpu_temperature >= 85 ? "bad" : "";
  return html`
    <li class="card node">
      <div class="node-head">
        <h3>${node.node_id}</h3>
        <${Badge} state=${node.status} />
      </div>
      <p class="gpu">${node.gpu_model ?? "No GPU reported"}${node.gpus.length > 1 ? ` × ${node.gpus.length}` : ""}</p>
      ${node.gpu_model &&
      html`
        <${Meter} label="Memory" text=${format.memory(node.gpu_memory_used_mib, node.gpu_memory_total_mib)} share=${used} />
        <${Meter}
          label="Utilisation"
          text=${node.gpu_utilization === null ? "–" : `${node.gpu_utilization} %`}
          share=${node.gpu_utilization === null ? null : node.gpu_utilization / 100}
        />
      `}
      <dl class="facts">
        ${node.gpu_temperature !== null &&
        html`<dt>Temperature</dt><dd class=${`num ${hot}`}>${node.gpu_temperature} °C${hot && " (hot)"}</dd>`}
        <dt>Job</dt>
        <dd><${CurrentJob} node=${node} mine=${mine} user=${user} /></dd>
        <dt>Since</dt>
        <dd><${Time} iso=${node.since} /></dd>
      </dl>
      ${node.reason && html`<p class="node-reason">${node.reason}</p>`}
    </li>
  `;
}

function Nodes({ nodes, user }) {
  // Whose job a node runs is told to administrators only; one's own one knows.
  const own = useStore(liveJobs, (known) =>
    [...known.values()].filter((job) => job.status === "running" && job.user_id === user.user_id),
  );
  useLoad(async () => {
    const { jobs } = await api.json(`api/jobs${api.query({ status: "running", user_id: user.user_id, limit: 100 })}`);
    jobs.forEach(learn);
  }, [user.user_id]);
  const mine = new Map(own.map((job) => [job.node_id, job.job_id]));
  if (nodes.nodes.length === 0) return html`<${Empty} title="No nodes">The server has no node in its settings.<//>`;
  return html`
    <ul class="nodes">
      ${nodes.nodes.map(
        (node) => html`<${NodeCard} key=${node.node_id} node=${node} mine=${mine.get(node.node_id)} user=${user} />`,
      )}
    </ul>
  `;
}

function Range({ entry }) {
  if (!entry.estimated_start) return html`<span class="muted">not known</span>`;
  const range = entry.estimated_start_range;
  const title = range && `between ${format.localTime(range.earliest)} and ${format.localTime(range.latest)}`;
  return html`<span title=${title}><${Time} iso=${entry.estimated_start} /></span>`;
}

const NONE = html`<span class="muted none">–</span>`;
const OTHERS = html`<span class="muted">another user</span>`;

function Queue({ queue, user }) {
  if (queue.entries.length === 0) {
    return html`<${Empty} title="Nobody waits">A job that you submit now starts as soon as a node is free.<//>`;
  }
  const columns = [
    { label: "Place", num: true, cell: (entry) => entry.position },
    {
      label: "Job",
      cell: (entry) =>
        entry.job_id ? html`<${JobLink} id=${entry.job_id} />${entry.mine && html` <span class="tag">yours</span>`}` : OTHERS,
    },
    ...(user.is_admin ? [{ label: "User", cell: (entry) => entry.user_id }] : []),
    { label: "Competition", cell: (entry) => entry.competition_id ?? NONE },
    {
      label: "Declared",
      num: true,
      cell: (entry) => (entry.expected_time === null ? NONE : format.duration(entry.expected_time)),
    },
    { label: "Waits since", cell: (entry) => html`<${Time} iso=${entry.created_at} />` },
    { label: "Likely start", cell: (entry) => html`<${Range} entry=${entry} />` },
  ];
  const more = queue.queue_length - queue.entries.length;
  return html`
    <${Table} label="Queue" columns=${columns} rows=${queue.entries} rowKey=${(entry) => entry.position} />
    ${more > 0 && html`<p class="muted">and ${format.plural(more, "more job")} behind these</p>`}
  `;
}

/** The newest jobs: fetched once, then kept up to date by the stream. */
function Recent({ user }) {
  const live = useStore(liveJobs);
  const { value, error, again } = useLoad(() => api.json(`api/jobs${api.query({ limit: RECENT })}`), [user.user_id]);
  if (error) return html`<${Problem} error=${error} retry=${again} />`;
  if (!value) return html`<${Loading} what="jobs" />`;
  const found = new Map(value.jobs.map((job) => [job.job_id, job]));
  for (const job of live.values()) if (user.is_admin || job.user_id === user.user_id) found.set(job.job_id, job);
  const rows = [...found.values()].sort((one, other) => (one.created_at < other.created_at ? 1 : -1)).slice(0, RECENT);
  if (rows.length === 0) {
    return html`
      <${Empty} title="No jobs yet">
        <a href=${href(["submit"])}>Submit a Python file</a>; its state and output appear here.
      <//>
    `;
  }
  return html`<${Table} label="Newest jobs" columns=${jobColumns(user, { brief: true })} rows=${rows} rowKey=${(job) => job.job_id} />`;
}

/** Why no submissions are taken, and what an operator should know. */
function Health() {
  const health = useStore(liveHealth);
  if (!health) return null;
  const warnings = health.warnings ?? [];
  return html`
    ${!health.ready &&
    html`
      <div class="problem" role="status">
        <${Icon} name="warning" />
        <div><p>No new jobs are taken at the moment: ${health.reasons.join("; ")}. Running and waiting jobs go on.</p></div>
      </div>
    `}
    ${warnings.length > 0 &&
    html`
      <details class="warnings">
        <summary><${Icon} name="warning" /> ${format.plural(warnings.length, "note")} for operators</summary>
        <ul>
          ${warnings.map((warning) => html`<li>${warning}</li>`)}
        </ul>
      </details>
    `}
  `;
}

export function Overview({ user }) {
  const nodes = useStore(liveNodes);
  const queue = useStore(liveQueue);
  return html`
    <div class="title-row">
      <h1 tabindex="-1">Overview</h1>
      <a class="button primary" href=${href(["submit"])}><${Icon} name="plus" />Submit a job</a>
    </div>
    <${Health} />
    ${nodes ? html`<${Tiles} nodes=${nodes} queue=${queue} />` : html`<${Loading} what="nodes and queue" />`}
    <div class="columns">
      <section class="panel" aria-labelledby="queue-title">
        <h2 id="queue-title">Queue</h2>
        ${queue ? html`<${Queue} queue=${queue} user=${user} />` : html`<${Loading} what="the queue" />`}
      </section>
      <section class="panel" aria-labelledby="recent-title">
        <div class="title-row">
          <h2 id="recent-title">${user.is_admin ? "Newest jobs of all users" : "Your newest jobs"}</h2>
          <a href=${href(["jobs"])}>All jobs</a>
        </div>
        <${Recent} user=${user} />
      </section>
    </div>
    <section aria-labelledby="nodes-title">
      <h2 id="nodes-title">Nodes</h2>
      ${nodes ? html`<${Nodes} nodes=${nodes} user=${user} />` : html`<${Loading} what="nodes" />`}
    </section>
  `;
}
