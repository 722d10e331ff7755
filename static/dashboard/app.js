/** The page's frame: who is signed in, where one can go, and what is wrong with the connection. */

import * as api from "./api.js";
import { html, render, useEffect, useRef, useState } from "./html.js";
import * as live from "./live.js";
import { go, href, route } from "./router.js";
import { farewell, me, notice, resume, signedInHere, signOut, spoken } from "./session.js";
import { useStore } from "./store.js";
import { Icon, Loading, Problem, Time, useNow } from "./ui.js";
import { Overview } from "./views/overview.js";
import { SignIn } from "./views/sign-in.js";

// Views beyond the first are fetched when they are wanted.
const VIEWS = {
  jobs: { title: "Jobs", load: () => import("./views/jobs.js") },
  job: { title: "Job", load: () => import("./views/job.js") },
  submit: { title: "Submit", load: () => import("./views/submit.js") },
  history: { title: "History", load: () => import("./views/history.js") },
  admin: { title: "Administration", load: () => import("./views/admin.js") },
};

function chosenView({ parts }) {
  if (parts.length === 0) return "overview";
  if (parts[0] === "jobs") return parts.length > 1 ? "job" : "jobs";
  return parts[0];
}

/** A view that may still have to be fetched. */
function View({ name, onReady, ...props }) {
  const [loaded, setLoaded] = useState(name === "overview" ? { name, View: Overview } : null);
  const [error, setError] = useState(null);
  const [turn, setTurn] = useState(0);
  useEffect(() => {
    if (name === "overview") {
      setLoaded({ name, View: Overview });
      return undefined;
    }
    let current = true;
    setError(null);
    VIEWS[name].load().then(
      (module) => current && setLoaded({ name, View: module.default }),
      () => current && setError(new api.ApiError(0, "This part of the page could not be loaded. Is the server away?")),
    );
    return () => (current = false);
  }, [name, turn]);
  useEffect(() => {
    if (loaded?.name === name) onReady();
  }, [loaded, name]);
  if (error) return html`<${Problem} error=${error} retry=${() => setTurn((count) => count + 1)} />`;
  if (loaded?.name !== name) return html`<${Loading} what="the view" />`;
  return html`<${loaded.View} ...${props} />`;
}

function Missing() {
  return html`
    <h1 tabindex="-1">There is no such view</h1>
    <p><a href=${href([])}>Go to the overview</a></p>
  `;
}

function NavLink({ to, name, current, children }) {
  return html`<a href=${to} aria-current=${name === current ? "page" : undefined}>${children}</a>`;
}

function Header({ user, view }) {
  return html`
    <header class="top">
      <a class="brand" href=${href([])}>
        <svg class="logo" viewBox="0 0 24 24" aria-hidden="true"><path d="M4 6h16M4 12h11M4 18h6" /></svg>
        <span>GPU jobs</span>
      </a>
      <nav aria-label="Views">
        <${NavLink} to=${href([])} name="overview" current=${view}>Overview<//>
        <${NavLink} to=${href(["jobs"])} name="jobs" current=${view === "job" ? "jobs" : view}>Jobs<//>
        <${NavLink} to=${href(["submit"])} name="submit" current=${view}>Submit<//>
        <${NavLink} to=${href(["history"])} name="history" current=${view}>History<//>
        ${user.is_admin && html`<${NavLink} to=${href(["admin"])} name="admin" current=${view}>Admin<//>`}
      </nav>
      <div class="who">
        <span class="who-name">${user.user_id}</span>
        ${user.is_admin && html`<span class="tag">admin</span>`}
        <button type="button" class="quiet" onClick=${() => signOut()}><${Icon} name="out" /><span class="label">Sign out</span></button>
      </div>
    </header>
  `;
}

/** The server is away for more than a blink. */
function ConnectionBanner() {
  const state = useStore(live.connection);
  const [shown, setShown] = useState(false);
  useNow();
  const away = state.state === "away" || state.state === "failed";
  useEffect(() => {
    if (!away) {
      setShown(false);
      return undefined;
    }
    const timer = setTimeout(() => setShown(true), 1500);
    return () => clearTimeout(timer);
  }, [away]);
  if (!shown || !away) return null;
  const seconds = Math.max(0, Math.ceil(((state.retryAt ?? Date.now()) - Date.now()) / 1000));
  return html`
    <div class="banner" role="status">
      <${Icon} name="warning" />
      <span>
        ${state.state === "failed" ? state.error.message : "The server is out of reach. What you see may be old; jobs go on."}
      </span>
      <button type="button" class="small" onClick=${() => (state.state === "failed" ? live.start() : live.retryNow())}>
        Try now${state.state === "away" && seconds > 0 ? ` (${seconds} s)` : ""}
      </button>
    </div>
  `;
}

function ExpiryBanner({ user }) {
  const at = useNow(60);
  const left = user.token_expires_at ? Date.parse(user.token_expires_at) / 1000 - at : Infinity;
  if (left > 3 * 86400) return null;
  return html`
    <div class="banner calm">
      <${Icon} name="pending" />
      <span>Your token ends <${Time} iso=${user.token_expires_at} />. Ask an administrator for a new one in time.</span>
    </div>
  `;
}

function Notice() {
  const shown = useStore(notice);
  useEffect(() => {
    if (!shown) return undefined;
    const timer = setTimeout(() => notice.set(null), 6000);
    return () => clearTimeout(timer);
  }, [shown]);
  return shown && html`<div class="notice" aria-hidden="true"><${Icon} name="completed" />${shown.text}</div>`;
}

function SignedIn({ user }) {
  const where = useStore(route);
  const view = chosenView(where);
  const known = view === "overview" || (VIEWS[view] && (view !== "admin" || user.is_admin));
  const fresh = useRef(signedInHere.current); // a new view is to be begun at its heading
  const first = useRef(true);
  const place = view === "admin" ? view : where.parts.join("/"); // tabs are no new view
  useEffect(() => {
    live.ensure();
    return live.stop;
  }, [user.user_id]);
  useEffect(() => {
    document.title = `${view === "overview" ? "Overview" : (VIEWS[view]?.title ?? "Not found")} – GPU jobs`;
    if (!first.current) fresh.current = true;
    first.current = false;
    begin();
  }, [place]);
  /** A new view is a new page: begin at its top, also with the keyboard and the screen reader. */
  function begin() {
    const heading = document.querySelector("main h1");
    if (!fresh.current || !heading) return;
    fresh.current = false;
    window.scrollTo(0, 0);
    heading.focus({ preventScroll: true });
  }
  return html`
    <${Header} user=${user} view=${view} />
    <${ConnectionBanner} />
    <${ExpiryBanner} user=${user} />
    <main id="main" tabindex="-1">
      ${known ? html`<${View} name=${view} onReady=${begin} user=${user} where=${where} key=${view === "job" ? place : view} />` : html`<${Missing} />`}
    </main>
  `;
}

function App() {
  const user = useStore(me);
  const said = useStore(spoken);
  const [state, setState] = useState(api.hasToken() ? "resuming" : "ready");
  const [error, setError] = useState(null);
  async function begin() {
    setError(null);
    live.ensure(); // not only once it is known who asks: it saves a round trip
    try {
      await resume();
      setState("ready");
    } catch (caught) {
      live.stop();
      if (caught.status === 401) {
        farewell.set(`You were signed out: ${caught.message}`);
        setState("ready");
      } else setError(caught);
    }
  }
  useEffect(() => {
    if (state === "resuming") begin();
  }, []);
  function skip(event) {
    event.preventDefault();
    document.getElementById("main").focus();
  }
  let content = html`<${SignIn} />`;
  if (user) content = html`<${SignedIn} user=${user} />`;
  else if (state === "resuming") {
    content = html`
      <main id="main" class="alone" tabindex="-1">
        <h1 class="visually-hidden">GPU jobs</h1>
        ${error ? html`<${Problem} error=${error} retry=${begin} />` : html`<${Loading} what="your session" />`}
      </main>
    `;
  }
  return html`
    <a class="skip" href="#main" onClick=${skip}>Skip to the content</a>
    ${content}
    <${Notice} />
    <div class="visually-hidden" aria-live="polite" key="spoken"><span key=${said.count}>${said.text}</span></div>
  `;
}

if (location.hash === "") go("#/", { replace: true });
render(html`<${App} />`, document.getElementById("app"));
