/** Preact and its templates in one place, so that views import them with one line. */

import { Component, Fragment, h, render } from "./vendor/preact.mjs";
import htm from "./vendor/htm.mjs";

export { useCallback, useEffect, useLayoutEffect, useMemo, useRef, useState } from "./vendor/hooks.mjs";
export { Component, Fragment, h, render };
export const html = htm.bind(h);
