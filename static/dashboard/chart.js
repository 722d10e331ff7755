/** uPlot, fetched when the first chart is wanted, and charts that fit the page: its colours, its width, its words. */

import { html, useLayoutEffect, useRef, useState } from "./html.js";

const HEIGHT = 220;
const dark = matchMedia("(prefers-color-scheme: dark)");
let loading = null;

function element(name, attributes) {
  return new Promise((resolve, reject) => {
    const made = Object.assign(document.createElement(name), attributes);
    made.addEventListener("load", resolve);
    made.addEventListener("error", () => reject(new Error(`${attributes.src ?? attributes.href} could not be loaded`)));
    document.head.append(made);
  });
}

/** The library. It is a classic script, so it comes by an element and not by `import`. */
function uPlot() {
  loading ??= Promise.all([
    element("script", { src: new URL("./vendor/uPlot.iife.min.js", import.meta.url).href }),
    element("link", { rel: "stylesheet", href: new URL("./vendor/uPlot.min.css", import.meta.url).href }),
  ]).then(
    () => window.uPlot,
    (error) => {
      loading = null;
      throw error;
    },
  );
  return loading;
}

/** Values piled on those of the series before: what is drawn, from the top of the pile down. */
function stacked(series) {
  const sums = [];
  let below = series[0].values.map(() => 0);
  for (const { values } of series) {
    below = below.map((sum, at) => (values[at] === null ? sum : sum + values[at]));
    sums.push(below);
  }
  return sums;
}

function options(library, { series, unit, most, bars, width }) {
  const css = getComputedStyle(document.documentElement);
  const colour = (name) => css.getPropertyValue(name).trim();
  const axis = {
    stroke: colour("--muted"),
    grid: { stroke: colour("--line"), width: 1 },
    ticks: { stroke: colour("--line"), width: 1 },
    font: `12px ${css.fontFamily}`,
  };
  const drawn = bars ? [...series].reverse() : series;
  return {
    width,
    height: HEIGHT,
    cursor: { y: false, points: { size: 7 } },
    legend: { show: false },
    scales: { y: { range: (_, low, high) => [0, most ?? Math.max(1, (high ?? 0) * 1.1)] } },
    axes: [
      axis,
      { ...axis, size: unit.steps ? 80 : 54, incrs: unit.steps, values: (_, marks) => marks.map((mark) => (unit.integer && mark % 1 !== 0 ? "" : unit.format(mark))) },
    ],
    series: [
      {},
      ...drawn.map(({ label, tone }, at) => ({
        label,
        stroke: colour(tone),
        width: bars ? 0 : 2,
        fill: bars || (series.length === 1 && at === 0) ? `${colour(tone)}${bars ? "" : "26"}` : undefined,
        paths: bars ? library.paths.bars({ size: [0.85, 40], align: 1 }) : library.paths.stepped({ align: 1 }),
        points: { show: false },
        spanGaps: false,
      })),
    ],
  };
}

/**
 * One chart. `series`: [{label, tone (a colour's CSS name), values}], `at`: unix seconds of each value,
 * `unit`: {format, integer?, steps? (that the scale may have)}, `most`: upper end of the scale, `bars`: piled bars in place of lines.
 */
export function Chart({ title, summary, at, series, unit, most, bars = false }) {
  const place = useRef(null);
  const [failed, setFailed] = useState(false);
  const [shown, setShown] = useState(null); // index of the value under the pointer
  // At once with the layout: a chart that is taken away must not be drawn between then and the next frame.
  useLayoutEffect(() => {
    let plot = null;
    let current = true;
    let width = 0;
    const draw = (library) => {
      plot?.destroy();
      width = place.current.clientWidth;
      const columns = bars ? stacked(series).reverse() : series.map(({ values }) => values);
      const hooks = { setCursor: [(drawn) => setShown(drawn.cursor.idx ?? null)] };
      plot = new library({ ...options(library, { series, unit, most, bars, width }), hooks }, [at, ...columns], place.current);
    };
    let redraw = () => {};
    uPlot().then(
      (library) => {
        if (!current) return;
        redraw = () => draw(library);
        redraw();
      },
      () => current && setFailed(true),
    );
    const sizes = new ResizeObserver(() => {
      if (plot && place.current && place.current.clientWidth !== width) {
        width = place.current.clientWidth;
        plot.setSize({ width, height: HEIGHT });
      }
    });
    sizes.observe(place.current);
    const recolour = () => redraw();
    dark.addEventListener("change", recolour);
    return () => {
      current = false;
      sizes.disconnect();
      dark.removeEventListener("change", recolour);
      plot?.destroy();
    };
  }, [at, series]);
  const text = (value) => (value === null || value === undefined ? "–" : unit.format(value));
  return html`
    <figure class="panel chart">
      <figcaption>
        <h2>${title}</h2>
        <p class="muted">${summary}</p>
      </figcaption>
      <ul class="legend" aria-hidden="true">
        ${series.map(
          ({ label, tone, values }) => html`
            <li><span class=${`swatch swatch${tone}`}></span>${label}${shown !== null && html` <strong class="num">${text(values[shown])}</strong>`}</li>
          `,
        )}
        ${shown !== null && at[shown] !== undefined && html`<li class="muted num">${new Date(at[shown] * 1000).toLocaleString()}</li>`}
      </ul>
      ${failed && html`<p class="muted">The chart could not be loaded; the numbers are below.</p>`}
      <div class="plot" ref=${place} role="img" aria-label=${`${title}. ${summary}`}></div>
      <${Numbers} title=${title} at=${at} series=${series} text=${text} />
    </figure>
  `;
}

/** The same as numbers, for those who don't see the chart or want to copy it. */
function Numbers({ title, at, series, text }) {
  const [open, setOpen] = useState(false);
  const rows = open ? at.map((_, index) => index).filter((index) => series.some(({ values }) => values[index] !== null)) : [];
  return html`
    <details onToggle=${(event) => setOpen(event.target.open)}>
      <summary>As numbers</summary>
      ${open &&
      html`
        <div class="scroll short" role="region" tabindex="0" aria-label=${`${title} as numbers`}>
          <table class="data">
            <thead>
              <tr><th scope="col">Time</th>${series.map(({ label }) => html`<th scope="col" class="right">${label}</th>`)}</tr>
            </thead>
            <tbody>
              ${rows.reverse().map(
                (index) => html`
                  <tr>
                    <td class="num">${new Date(at[index] * 1000).toLocaleString()}</td>
                    ${series.map(({ values }) => html`<td class="right num">${text(values[index])}</td>`)}
                  </tr>
                `,
              )}
            </tbody>
          </table>
        </div>
      `}
    </details>
  `;
}
