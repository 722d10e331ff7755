/** Jobs as rows of a table. */

import * as format from "../format.js";
import { html } from "../html.js";
import { href } from "../router.js";
import { Elapsed, JobBadge, Time } from "../ui.js";

const NONE = html`<span class="muted none">–</span>`;

export const JobLink = ({ id }) => html`<a class="mono" href=${href(["jobs", id])} title=${id}>${format.shortId(id)}</a>`;

function ran(job) {
  if (!job.started_at) return NONE;
  return html`<${Elapsed} from=${job.started_at} to=${job.completed_at} />`;
}

function remark(job) {
  if (job.status === "failed") {
    return job.failure_reason === "exit_code" ? `exit code ${job.exit_code}` : (format.REASONS[job.failure_reason] ?? NONE);
  }
  if (job.status === "pending" && job.queue_position) return `place ${job.queue_position} in the queue`;
  return NONE;
}

/** The columns of a list of jobs; an administrator also sees whose they are. */
export function jobColumns(user, { brief = false } = {}) {
  return [
    { label: "State", cell: (job) => html`<${JobBadge} job=${job} />` },
    { label: "Job", cell: (job) => html`<${JobLink} id=${job.job_id} />` },
    ...(user.is_admin ? [{ label: "User", cell: (job) => job.user_id }] : []),
    { label: "Competition", cell: (job) => job.competition_id },
    ...(brief ? [] : [{ label: "Project", cell: (job) => job.project_id }]),
    { label: "Submitted", cell: (job) => html`<${Time} iso=${job.created_at} />` },
    ...(brief ? [] : [{ label: "Node", cell: (job) => job.node_id ?? NONE }]),
    { label: "Run time", num: true, cell: ran },
    { label: "Remark", cell: (job) => (brief && job.status === "running" && job.node_id ? `on ${job.node_id}` : remark(job)) },
  ];
}
