/** Who is signed in, and what the page says aloud. */

import * as api from "./api.js";
import { createStore } from "./store.js";

/** null: not signed in; else the answer of `/api/whoami`. */
export const me = createStore(null);
/** Whether the form was used, so that the page that follows begins at its heading. */
export const signedInHere = { current: false };
/** Why the sign-in form is shown, when there is something to say. */
export const farewell = createStore(null);
/** What a screen reader is to say; the counter lets the same sentence be said twice. */
export const spoken = createStore({ text: "", count: 0 });
/** A short confirmation at the page's edge. */
export const notice = createStore(null);

export const announce = (text) => spoken.set((last) => ({ text, count: last.count + 1 }));

/** Say and show that something was done. */
export function confirmDone(text) {
  notice.set({ text, at: Date.now() });
  announce(text);
}

/** Try a token; the session begins when the server knows it. Raises ApiError. */
export async function signIn(token) {
  api.setToken(token);
  try {
    const user = await api.json("api/whoami");
    signedInHere.current = true;
    me.set(user);
    farewell.set(null);
  } catch (error) {
    if (error.status !== 0 && error.status < 500) api.setToken(null);
    throw error;
  }
}

export function signOut(why = null) {
  api.setToken(null);
  me.set(null);
  farewell.set(why);
}

/** Take up the session of this tab, if it has one. Raises ApiError when the server is away. */
export async function resume() {
  if (api.hasToken()) me.set(await api.json("api/whoami"));
}

api.onRefused((detail) => {
  if (me.get() !== null) signOut(`You were signed out: ${detail}`);
  else api.setToken(null);
});
