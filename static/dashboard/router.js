/** Addresses of the page's views: `#/jobs/ID?tab=results`. */

import { createStore } from "./store.js";

function parse() {
  const [path, search = ""] = location.hash.replace(/^#\/?/, "").split("?");
  return { parts: path.split("/").filter(Boolean).map(decode), params: new URLSearchParams(search) };
}

function decode(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

export const route = createStore(parse());
window.addEventListener("hashchange", () => route.set(parse()));

/** The address of a view; unset parameters are left out. */
export function href(parts, params = {}) {
  const set = Object.entries(params).filter(([, value]) => value !== null && value !== undefined && value !== "");
  const search = set.length > 0 ? `?${new URLSearchParams(set)}` : "";
  return `#/${parts.map(encodeURIComponent).join("/")}${search}`;
}

/** Go to a view; `replace` leaves no step for the back button. */
export function go(address, { replace = false } = {}) {
  if (!replace) {
    location.hash = address;
    return;
  }
  history.replaceState(null, "", address);
  route.set(parse());
}
