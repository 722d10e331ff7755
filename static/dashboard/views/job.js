/** One job: how it stands, its output, results, code and story, and what can be done with it. */

import * as api from "../api.js";
import * as format from "../format.js";
import { html, useEffect, useState } from "../html.js";
import { jobs as liveJobs, learn, queue as liveQueue } from "../live.js";
import { go, href } from "../router.js";
import { confirmDone } from "../session.js";
import { useStore } from "../store.js";
import { Action, Bar, Confirm, Elapsed, Empty, Icon, JobBadge, Loading, Problem, Tabs, Time, useLoad, useNow } from "../ui.js";
import { Log } from "./log.js";
import { Results } from "./results.js";

const isFinal = (job) => ["completed", "failed", "cancelled"].includes(job.status);

const EVENTS = {
  submitted: "Submitted",
  claimed: "Given to a node",
  started: "Started",
  completed: "Completed",
  failed: "Failed",
  cancelled: "Cancelled",
  cancel_requested: "Cancel asked for",
  requeued: "Back in the queue",
  given_back: "Given back by the node",
  adopted: "Taken up again by the server",
  unreachable: "Node out of reach",
  reachable: "Node back",
};
const SIGNS = {
  submitted: "upload",
  claimed: "next",
  started: "running",
  completed: "completed",
  failed: "failed",
  cancelled: "cancelled",
  cancel_requested: "cancelled",
  requeued: "repeat",
  given_back: "repeat",
  adopted: "repeat",
  unreachable: "warning",
  reachable: "online",
};

/** Who did it, if a person did; which administrator is told to administrators only. */
function by(actor) {
  const [role, name] = actor.split(":");
  if (role !== "user" && role !== "admin") return "";
  return ` · by ${name || "an administrator"}`;
}

function Timeline({ job }) {
  const { value, error, again } = useLoad(
    () => api.json(api.jobPath("events", job.job_id)),
    [job.job_id, job.status, job.attempt, job.node_reachable, job.cancel_requested_at, job.started_at],
  );
  if (error) return html`<${Problem} error=${error} retry=${again} />`;
  if (!value) return html`<${Loading} what="events" />`;
  const first = format.unix(value.events[0].time);
  return html`
    <ol class="timeline">
      ${value.events.map(
        (event, index) => html`
          <li key=${index} class=${`event-${event.event}`}>
            <span class="dot"><${Icon} name=${SIGNS[event.event] ?? "next"} /></span>
            <div>
              <p class="event-name">
                ${EVENTS[event.event] ?? event.event}
                ${event.node_id && html`<span class="muted"> · ${event.node_id}</span>`}
                ${event.attempt > 1 && html`<span class="muted"> · attempt ${event.attempt}</span>`}
              </p>
              ${event.message && event.message !== `${EVENTS[event.event]}.` && html`<p class="event-message">${event.message}</p>`}
              <p class="muted num">
                <${Time} iso=${event.time} exact />
                ${index > 0 && html` · <span title="after it was submitted">+${format.duration(Math.max(0, format.unix(event.time) - first))}</span>`}
                ${by(event.actor)}
              </p>
            </div>
          </li>
        `,
      )}
    </ol>
  `;
}

/** How much of the declared time has passed. */
function Progress({ job }) {
  const at = useNow();
  const taken = Math.max(0, at - format.unix(job.started_at));
  const over = taken > job.expected_time;
  return html`
    <div class="progress">
      <${Bar} share=${taken / job.expected_time} tone=${over ? "warn" : ""} />
      <span class="num muted">
        ${format.duration(Math.floor(taken))} of ${format.duration(job.expected_time)} declared${over ? ": over time, it may be ended" : ""}
      </span>
    </div>
  `;
}

function Facts({ job, user }) {
  const fact = (name, value) => html`<dt>${name}</dt><dd>${value}</dd>`;
  return html`
    <dl class="facts">
      ${fact("Competition", job.competition_id)} ${fact("Project", job.project_id)}
      ${(user.is_admin || job.user_id !== user.user_id) && fact("User", job.user_id)}
      ${fact("Node", job.node_id ?? html`<span class="muted">none yet</span>`)}
      ${fact("Declared time", html`<span class="num">${format.duration(job.expected_time)}</span>`)}
      ${fact("Submitted", html`<${Time} iso=${job.created_at} exact />`)}
      ${job.status === "pending" &&
      job.estimated_start &&
      fact("Likely start", html`<${Time} iso=${job.estimated_start} /> <${Between} range=${job.estimated_start_range} />`)}
      ${job.started_at && fact("Started", html`<${Time} iso=${job.started_at} exact />`)}
      ${job.status === "running" &&
      job.estimated_finish &&
      fact("Likely end", html`<${Time} iso=${job.estimated_finish} /> <${Between} range=${job.estimated_finish_range} />`)}
      ${job.completed_at && fact("Ended", html`<${Time} iso=${job.completed_at} exact />`)}
      ${job.started_at && fact("Run time", html`<${Elapsed} from=${job.started_at} to=${job.completed_at} />`)}
      ${job.exit_code !== null && fact("Exit code", html`<span class="num">${job.exit_code}</span>`)}
      ${job.signal !== null && fact("Signal", html`<span class="num">${job.signal}</span>`)}
      ${job.failure_reason && fact("Reason", format.REASONS[job.failure_reason] ?? job.failure_reason)}
      ${job.attempt > 1 && fact("Attempts", html`<span class="num">${job.attempt}</span>`)}
    </dl>
  `;
}

function Between({ range }) {
  if (!range) return null;
  return html`<span class="muted">(between <${Time} iso=${range.earliest} /> and <${Time} iso=${range.latest} />)</span>`;
}

function Code({ job }) {
  const [failed, setFailed] = useState(null);
  const path = api.jobPath("code", job.job_id);
  const { value, error, again } = useLoad(async () => (await api.call(path)).text(), [path]);
  if (error) return html`<${Problem} error=${error} retry=${again} />`;
  if (value === null) return html`<${Loading} what="the code" />`;
  const most = 200_000;
  return html`
    <div class="toolbar">
      <span class="muted num">${format.bytes(new Blob([value]).size)}</span>
      <${Action} class="small" onClick=${() => api.download(path, "solution.py")} onError=${setFailed}>
        <${Icon} name="download" />Download
      <//>
    </div>
    <${Problem} error=${failed} />
    ${value.length > most && html`<p class="hint">Only the beginning is shown; the download has everything.</p>`}
    <pre class="raw" tabindex="0" role="region" aria-label="The code">${value.slice(0, most)}</pre>
  `;
}

function Actions({ job, onError }) {
  const [asking, setAsking] = useState(false);
  async function cancel() {
    const answer = await api.json(api.jobPath("cancel", job.job_id), { method: "POST" });
    learn(answer);
    confirmDone(answer.status === "cancelled" ? "The job is cancelled." : answer.message || "The job will be cancelled.");
  }
  return html`
    <div class="actions">
      <a class="button" href=${href(["submit"], { from: job.job_id })}><${Icon} name="repeat" />Submit again</a>
      ${!isFinal(job) &&
      !job.cancel_requested_at &&
      html`<button type="button" class="danger" onClick=${() => setAsking(true)}><${Icon} name="failed" />Cancel job</button>`}
      ${asking &&
      html`
        <${Confirm}
          title="Cancel this job?"
          confirm="Cancel the job"
          onClose=${(yes) => {
            setAsking(false);
            if (yes) cancel().catch(onError);
          }}
        >
          <p>
            ${job.status === "running"
              ? "It is ended on its node, with everything it started. What it has printed is kept."
              : "It leaves the queue. You can submit it again."}
          </p>
        <//>
      `}
    </div>
  `;
}

/** The job as it stands now: fetched once, then by the page's stream; its place by the queue's. */
function useJob(jobId) {
  const { value, error, again } = useLoad(async () => {
    const status = await api.json(api.jobPath("status", jobId));
    learn(status);
    return status;
  }, [jobId]);
  const live = useStore(liveJobs, (known) => known.get(jobId));
  const place = useStore(liveQueue, (queue) => queue?.entries.find((entry) => entry.job_id === jobId));
  let job = live ?? value;
  if (job?.status === "pending" && place) {
    job = { ...job, queue_position: place.position, estimated_start: place.estimated_start, estimated_start_range: place.estimated_start_range };
  }
  return { job, error, again };
}

export default function Job({ user, where }) {
  const jobId = where.parts[1];
  const { job, error, again } = useJob(jobId);
  const [failed, setFailed] = useState(null);
  useEffect(() => setFailed(null), [job?.status]);
  useEffect(() => {
    // So that a tab in the background tells how the job stands.
    if (job) document.title = `${job.status}: job ${format.shortId(jobId)} – GPU jobs`;
  }, [job?.status, jobId]);
  return html`
    <nav class="crumbs" aria-label="Where you are"><a href=${href(["jobs"])}>Jobs</a></nav>
    <div class="title-row">
      <h1 tabindex="-1" title=${jobId}>Job <span class="mono">${format.shortId(jobId)}</span> ${job && html`<${JobBadge} job=${job} />`}</h1>
      ${job && html`<${Actions} job=${job} onError=${setFailed} />`}
    </div>
    <${Problem} error=${failed} />
    ${error && html`<${Problem} error=${error} retry=${error.status === 404 || error.status === 403 ? null : again} />`}
    ${!job && !error && html`<${Loading} what="the job" />`}
    ${job && html`<${Parts} job=${job} user=${user} tab=${where.params.get("tab")} />`}
  `;
}

/** What there is of the job: output, results and code; facts and timeline beside them. */
function Parts({ job, user, tab }) {
  const tabs = [
    { id: "output", label: "Output", view: () => html`<${Log} job=${job} key=${job.job_id} />` },
    {
      id: "results",
      label: "Results",
      view: () =>
        isFinal(job) ? html`<${Results} job=${job} />` : html`<${Empty} title="No results yet">They come when the job has ended.<//>`,
    },
    { id: "code", label: "Code", view: () => html`<${Code} job=${job} />` },
  ];
  const change = (next) => go(href(["jobs", job.job_id], { tab: next === "output" ? null : next }), { replace: true });
  return html`
    ${job.message && job.message !== "Completed." && html`<p class="job-message">${job.message}</p>`}
    ${job.status === "running" && job.started_at && html`<${Progress} job=${job} />`}
    <div class="job-columns">
      <div class="panel"><${Tabs} label="Parts of the job" tabs=${tabs} current=${tab ?? "output"} onChange=${change} /></div>
      <aside>
        <section class="panel" aria-labelledby="facts-title">
          <h2 id="facts-title">Facts</h2>
          <${Facts} job=${job} user=${user} />
          <p class="job-id"><span class="muted">Id</span> <span class="mono">${job.job_id}</span></p>
        </section>
        <section class="panel" aria-labelledby="story-title">
          <h2 id="story-title">Timeline</h2>
          <${Timeline} job=${job} />
        </section>
      </aside>
    </div>
  `;
}
