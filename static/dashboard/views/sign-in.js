/** The sign-in form: a token, nothing else. */

import { html, useEffect, useRef, useState } from "../html.js";
import { farewell, signIn } from "../session.js";
import { useStore } from "../store.js";
import { Field, Icon, Problem, useRetryAfter } from "../ui.js";

export function SignIn() {
  const why = useStore(farewell);
  const [token, setToken] = useState("");
  const [missing, setMissing] = useState(null);
  const [error, setError] = useState(null);
  const [working, setWorking] = useState(false);
  const input = useRef(null);
  const left = useRetryAfter(error);
  useEffect(() => {
    document.title = "Sign in – GPU jobs";
    input.current?.focus();
  }, []);

  async function submit(event) {
    event.preventDefault();
    const given = token.trim();
    setError(null);
    setMissing(given ? null : "Paste the token that you were given.");
    if (!given) {
      input.current.focus();
      return;
    }
    setWorking(true);
    try {
      await signIn(given);
    } catch (caught) {
      setError(caught);
      setWorking(false);
      input.current?.focus();
    }
  }

  return html`
    <main id="main" class="alone" tabindex="-1">
      <form class="card sign-in" onSubmit=${submit} novalidate>
        <svg class="logo" viewBox="0 0 24 24" aria-hidden="true"><path d="M4 6h16M4 12h11M4 18h6" /></svg>
        <h1>GPU jobs</h1>
        <p class="muted">Sign in to submit jobs, watch their output and see the queue.</p>
        ${why && !error && html`<div class="problem calm" role="status"><${Icon} name="warning" /><div><p>${why}</p></div></div>`}
        <${Field}
          label="Token"
          name="token"
          error=${missing}
          hint="It stays in this tab and is forgotten when you close it. An administrator makes tokens."
          input=${(attributes) => html`
            <input
              ...${attributes}
              ref=${input}
              type="password"
              autocomplete="current-password"
              spellcheck="false"
              value=${token}
              onInput=${(event) => setToken(event.target.value)}
            />
          `}
        />
        <${Problem} error=${error} />
        <button class="primary wide" disabled=${working || left > 0} aria-busy=${working}>
          ${working ? "Signing in…" : "Sign in"}
        </button>
      </form>
    </main>
  `;
}
