/** A job's output as it comes: follows its end until one scrolls up. */

import * as api from "../api.js";
import * as format from "../format.js";
import { Component, html, useEffect, useLayoutEffect, useRef, useState } from "../html.js";
import { LogBuffer } from "../log-buffer.js";
import { Action, Choice, Icon, Problem } from "../ui.js";

const SHOWN_AT_FIRST = 512 * 1024; // bytes; of a longer output only the end is fetched
const NEAR_END = 24; // px

const STREAMS = [
  ["merged", "All"],
  ["stdout", "stdout"],
  ["stderr", "stderr"],
];

/** Lines that change together; drawn again only when one of them changed. */
class Block extends Component {
  shouldComponentUpdate(next) {
    return next.version !== this.props.version;
  }

  render({ lines }) {
    return html`
      <div>
        ${lines.map(
          ({ parts }) => html`
            <div class="line">${parts.map(({ text, style }) => (style ? html`<span class=${style}>${text}</span>` : text))}${"\n"}</div>
          `,
        )}
      </div>
    `;
  }
}

/** Follow one stream into a buffer: {buffer, state, error, skipped}. */
function useLog(jobId, stream) {
  const [, setTurn] = useState(0);
  const log = useRef(null);
  if (log.current?.key !== `${jobId} ${stream}`) {
    log.current = { key: `${jobId} ${stream}`, buffer: new LogBuffer(), state: "connecting", error: null, skipped: 0 };
  }
  useEffect(() => {
    const mine = log.current;
    let frame = 0;
    let follower = null;
    let current = true;
    const draw = () => {
      frame ||= requestAnimationFrame(() => {
        frame = 0;
        setTurn((count) => count + 1);
      });
    };
    const set = (changes) => {
      Object.assign(mine, changes);
      draw();
    };
    const take = {
      output: (text) => mine.buffer.push(text),
      stdout: (text) => mine.buffer.push(text),
      stderr: (text) => mine.buffer.push(text, "stderr"),
      skipped: ({ from, to }) => mine.buffer.note(`[${format.bytes(to - from)} left out: this page fell behind]`),
      restarted() {
        mine.buffer.clear();
        mine.skipped = 0;
        mine.buffer.note("[the job runs again from its beginning]");
      },
      end(status) {
        if (status.truncated) mine.buffer.note("[the job printed more than is kept; the rest was dropped]");
        return true;
      },
    };
    async function begin() {
      try {
        const head = await api.call(`${api.jobPath("logs", jobId)}${api.query({ stream, tail: 0 })}`);
        await head.text(); // nothing is in it; read, so that the connection is free again
        if (!current) return;
        mine.coarse = head.headers.get("x-log-order") === "coarse";
        mine.skipped = Math.max(0, Number(head.headers.get("x-log-size")) - SHOWN_AT_FIRST);
        follower = api.follow(`${api.jobPath("logs", jobId)}${api.query({ stream, follow: true, offset: mine.skipped })}`, {
          onEvent({ event, data }) {
            const ended = take[event]?.(JSON.parse(data));
            draw();
            return ended;
          },
          onState: ({ state, error }) => set({ state, error: state === "failed" ? error : null }),
        });
      } catch (error) {
        if (current) set({ state: "failed", error });
      }
    }
    begin();
    return () => {
      current = false;
      follower?.stop();
      cancelAnimationFrame(frame);
    };
  }, [jobId, stream]);
  return log.current;
}

const SAYS = {
  connecting: "Connecting…",
  open: "Live",
  away: "Connecting again…",
  ended: "Complete",
  failed: "Not available",
};

export function Log({ job }) {
  const [stream, setStream] = useState(STREAMS[0][0]);
  const [wrap, setWrap] = useState(true);
  const [atEnd, setAtEnd] = useState(true);
  const [error, setError] = useState(null);
  const pane = useRef(null);
  const log = useLog(job.job_id, stream);
  const { buffer } = log;

  useLayoutEffect(() => {
    if (atEnd && pane.current) pane.current.scrollTop = pane.current.scrollHeight;
  });

  function scrolled() {
    if (!pane.current) return; // a last event after the view is gone
    const { scrollTop, scrollHeight, clientHeight } = pane.current;
    setAtEnd(scrollHeight - scrollTop - clientHeight < NEAR_END);
  }

  const path = `${api.jobPath("logs", job.job_id)}${api.query({ stream, follow: true })}`;
  const save = () =>
    api.download(path, `${job.job_id}.${stream}.txt`, { headers: { Accept: "text/plain" } });
  const ended = log.state === "ended";
  return html`
    <div class="log-view">
      <div class="toolbar">
        <${Choice} label="Stream" options=${STREAMS} value=${stream} onChange=${setStream} />
        <span class=${`log-state ${log.state}`}>${SAYS[log.state]}</span>
        <label class="check"><input type="checkbox" checked=${wrap} onChange=${() => setWrap(!wrap)} />Wrap lines</label>
        ${ended && html`<${Action} class="small" onClick=${save} onError=${setError}><${Icon} name="download" />Download<//>`}
      </div>
      <${Problem} error=${log.error ?? error} />
      ${(log.skipped > 0 || buffer.dropped > 0) &&
      html`
        <p class="hint">
          ${log.skipped > 0 ? `The first ${format.bytes(log.skipped)} are not shown` : `${buffer.dropped} older lines are not shown`};
          ${" "}${ended ? "the download has everything." : "once the job has ended, the download has everything."}
        </p>
      `}
      ${log.coarse && html`<p class="hint">The job changed so often between stdout and stderr that their order here is only about right.</p>`}
      <div class="log-frame">
        <div
          class=${wrap ? "log" : "log no-wrap"}
          ref=${pane}
          role="log"
          aria-live="off"
          aria-label=${`Output, ${stream === "merged" ? "all" : stream}`}
          tabindex="0"
          onScroll=${scrolled}
        >
          ${buffer.blocks.map((block) => html`<${Block} key=${block.id} lines=${block.lines} version=${block.version} />`)}
          ${buffer.empty &&
          log.state !== "failed" &&
          html`<p class="log-empty">${ended ? "Nothing was printed here." : job.status === "pending" ? "The job waits; its output appears here." : "Nothing yet."}</p>`}
        </div>
        ${!atEnd && html`<button type="button" class="small to-end" onClick=${() => setAtEnd(true)}>Follow the end</button>`}
      </div>
    </div>
  `;
}
