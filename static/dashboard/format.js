/** How values are shown: times, durations, sizes, numbers. Pure functions, no DOM. */

const UNITS = [
  ["d", 86400],
  ["h", 3600],
  ["min", 60],
  ["s", 1],
];

/** Unix seconds of an ISO time. */
export const unix = (iso) => Date.parse(iso) / 1000;

/** "3 h 12 min": at most two units; below ten seconds with one decimal. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined || Number.isNaN(seconds)) return "–";
  if (seconds < 10 && seconds > 0 && !Number.isInteger(seconds)) return `${Math.max(0.1, seconds).toFixed(1)} s`;
  let rest = Math.max(0, Math.round(seconds));
  const parts = [];
  for (const [unit, size] of UNITS) {
    const count = Math.floor(rest / size);
    rest -= count * size;
    if (count > 0) parts.push(`${count} ${unit}`);
    else if (parts.length > 0) break;
    if (parts.length === 2) break;
  }
  return parts.join(" ") || "0 s";
}

/** An estimate: nobody knows the seconds of half an hour. */
export const roughly = (seconds) => duration(seconds > 600 ? Math.round(seconds / 60) * 60 : Math.round(seconds));

/** Like `duration` with one unit, for "5 min ago". */
function coarse(seconds) {
  for (const [unit, size] of UNITS) if (seconds >= size) return `${Math.floor(seconds / size)} ${unit}`;
  return "0 s";
}

/** "12 s ago", "in 3 min", "just now". */
export function relative(then, now) {
  const ahead = then - now;
  if (Math.abs(ahead) < 2) return "just now";
  return ahead > 0 ? `in ${coarse(ahead)}` : `${coarse(-ahead)} ago`;
}

const clockTime = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const dayAndTime = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });

/** Local time; the date only when it isn't today's. */
export function localTime(iso) {
  const date = new Date(iso);
  return date.toDateString() === new Date().toDateString() ? clockTime.format(date) : dayAndTime.format(date);
}

/** "2026-11-23 12:00:00 UTC". */
export const utc = (iso) => `${iso.slice(0, 19).replace("T", " ")} UTC`;

/** "1.4 MB", decimal units. */
export function bytes(count) {
  if (count === null || count === undefined) return "–";
  let value = count;
  for (const unit of ["B", "kB", "MB", "GB", "TB"]) {
    if (value < 1000 || unit === "TB") return `${unit === "B" || value >= 100 ? Math.round(value) : value.toFixed(1)} ${unit}`;
    value /= 1000;
  }
  return "";
}

/** "40.0 of 80.0 GiB" from MiB. */
export function memory(used, total) {
  if (total === null || total === undefined) return "–";
  const gib = (mib) => (mib / 1024).toFixed(mib < 10240 ? 1 : 0);
  return used === null || used === undefined ? `${gib(total)} GiB` : `${gib(used)} of ${gib(total)} GiB`;
}

/** "1 job", "2 jobs". */
export const plural = (count, one, many = `${one}s`) => `${count} ${count === 1 ? one : many}`;

/** The first block of a job's id: enough to tell jobs apart at a glance. */
export const shortId = (jobId) => jobId.slice(0, 8);

/** A failure reason in words. */
export const REASONS = {
  exit_code: "exit code",
  signal: "ended by a signal",
  timeout: "time limit",
  memory_exceeded: "out of memory",
  results_missing: "no results file",
  results_invalid: "invalid results",
  results_too_large: "results too large",
  node_lost: "node lost",
  launch_failed: "could not be started",
  node_disk_full: "node's disk full",
  gpu_fault: "GPU fault",
};
