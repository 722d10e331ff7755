/** A value that views can watch: the smallest store that does. */

import { useEffect, useState } from "./vendor/hooks.mjs";

/** `get`, `set` (a value or a function of the old one), `subscribe` (returns the undo). */
export function createStore(initial) {
  let value = initial;
  const listeners = new Set();
  return {
    get: () => value,
    set(next) {
      const changed = typeof next === "function" ? next(value) : next;
      if (Object.is(changed, value)) return;
      value = changed;
      for (const listener of [...listeners]) listener(value);
    },
    subscribe(listener) {
      listeners.add(listener);
      return () => listeners.delete(listener);
    },
  };
}

/** The store's value (or what `select` takes of it); the component is drawn again when that changes. */
export function useStore(store, select = (value) => value) {
  const [picked, setPicked] = useState(() => select(store.get()));
  useEffect(() => {
    const update = () => setPicked(() => select(store.get()));
    update();
    return store.subscribe(update);
  }, [store]);
  return picked;
}
