/** A day or a week of the queue, the nodes and the outcomes. */

import * as api from "../api.js";
import { Chart } from "../chart.js";
import * as format from "../format.js";
import { html, useEffect, useMemo } from "../html.js";
import { go, href } from "../router.js";
import { Choice, Empty, Loading, Problem, useLoad } from "../ui.js";

const AGAIN = 60_000; // ms

const COUNT = { format: (value) => String(Math.round(value * 10) / 10), integer: true };
const SHARE = { format: (value) => `${Math.round(value * 100)} %` };
const SECONDS = {
  steps: [0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 86400],
  format: (value) => format.duration(value < 10 ? Math.round(value * 10) / 10 : Math.round(value)),
};

const present = (values) => values.filter((value) => value !== null);
const middle = (values) => [...present(values)].sort((one, other) => one - other)[Math.floor(present(values).length / 2)];
const mean = (values) => (values.length > 0 ? values.reduce((sum, value) => sum + value, 0) / values.length : null);
const total = (values) => present(values).reduce((sum, value) => sum + value, 0);

function most(values) {
  const there = present(values);
  return there.length > 0 ? Math.max(...there) : null;
}

/** What each chart shows, and says in one sentence. */
function charts(history) {
  const { queue_depth: depth, running, utilization, wait_seconds: wait, completed, failed, cancelled } = history;
  const gpu = history.gpu_utilization.map((percent) => (percent === null ? null : percent / 100));
  const ended = total(completed) + total(failed);
  const gpuSeen = present(gpu).length > 0;
  const percent = (values) => SHARE.format(mean(present(values)));
  return [
    {
      title: "Queue",
      summary: `At most ${most(depth) ?? 0} waited and ${most(running) ?? 0} ran at once.`,
      unit: COUNT,
      series: [
        { label: "waiting", tone: "--waiting", values: depth },
        { label: "running", tone: "--running", values: running },
      ],
    },
    {
      title: "Waiting time",
      summary: most(wait) === null ? "No job started in this time." : `Typically ${SECONDS.format(middle(wait))}, at the worst ${SECONDS.format(most(wait))}.`,
      unit: SECONDS,
      series: [{ label: "from submission to start", tone: "--waiting", values: wait }],
    },
    {
      title: "Utilisation",
      summary:
        present(utilization).length === 0
          ? "Not known for this time."
          : `Nodes at work ${percent(utilization)} of the time${gpuSeen ? `, their GPUs busy ${percent(gpu)}` : ""}.`,
      unit: SHARE,
      most: 1,
      series: [
        { label: "nodes at work", tone: "--running", values: utilization },
        ...(gpuSeen ? [{ label: "GPU busy", tone: "--completed", values: gpu }] : []),
      ],
    },
    {
      title: "Outcomes",
      summary:
        ended === 0
          ? "No job ended by itself in this time."
          : `${format.plural(total(completed), "job")} completed, ${total(failed)} failed, ${total(cancelled)} cancelled.`,
      unit: COUNT,
      bars: true,
      series: [
        { label: "completed", tone: "--completed", values: completed },
        { label: "failed", tone: "--failed", values: failed },
        { label: "cancelled", tone: "--cancelled", values: cancelled },
      ],
    },
  ];
}

export default function History({ where }) {
  const span = where.params.get("window") === "week" ? "week" : "day";
  const { value, error, again } = useLoad(() => api.json(`api/history?window=${span}`), [span]);
  useEffect(() => {
    const timer = setInterval(() => document.hidden || again(), AGAIN);
    return () => clearInterval(timer);
  }, [span]);
  const drawn = useMemo(() => (value ? charts(value) : []), [value]);
  const empty = value && !drawn.some(({ series }) => series.some(({ values }) => present(values).length > 0));
  return html`
    <div class="title-row">
      <h1 tabindex="-1">History</h1>
      <${Choice}
        label="Time span"
        options=${[["day", "Day"], ["week", "Week"]]}
        value=${span}
        onChange=${(next) => go(href(["history"], { window: next === "day" ? null : next }), { replace: true })}
      />
    </div>
    <${Problem} error=${error} retry=${again} />
    ${!value && !error && html`<${Loading} what="the history" />`}
    ${empty && html`<${Empty} title="Nothing yet">The server notes how things stand as it runs; come back in a few minutes.<//>`}
    ${value && !empty && html`<div class="charts">${drawn.map((chart) => html`<${Chart} key=${chart.title} at=${value.at} ...${chart} />`)}</div>`}
  `;
}
