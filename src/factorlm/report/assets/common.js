"use strict";
// What charts and tables share: the data, which runs are shown, colours, drawing on demand.

const $ = (id) => document.getElementById(id);
const data = JSON.parse($("report-data").textContent);
const COLUMNS = ["step", "num_tokens", "training_flops", "executed_flops", "seconds", "loss", "smoothed"];
const NUM_COLORS = 7;
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
const isTouch = matchMedia("(pointer: coarse)").matches;
const CONFIG = {
  responsive: true,
  displaylogo: false,
  displayModeBar: isTouch ? false : "hover",
  modeBarButtons: [["toImage"], ["zoom2d", "pan2d", "resetScale2d"]],
  toImageButtonOptions: { format: "svg" },
};

function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
  return new Float64Array(bytes.buffer);
}

// Columns of a curve, decoded when they are first drawn.
function columns(curve) {
  if (!curve.decoded) {
    const values = unpack(curve.columns);
    const cut = (index) => values.subarray(index * curve.points, (index + 1) * curve.points);
    curve.decoded = Object.fromEntries(COLUMNS.map((name, index) => [name, cut(index)]));
  }
  return curve.decoded;
}

// Plotly reads markup and references in names: a name is to be shown as it is.
const plain = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const readColors = () => Array.from({ length: NUM_COLORS }, (_, index) => css(`--series-${index}`));
let colors = readColors();
const color = (index) => colors[index % NUM_COLORS];
const dashOf = (index) => DASHES[Math.floor(index / NUM_COLORS) % 3];
const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`).value;

function isShown(run) {
  const text = $("filter").value.trim().toLowerCase();
  const box = document.querySelector(`input[name="family"][value="${run.family}"]`);
  const names = `${run.label}\n${data.families[run.family]}`.toLowerCase();
  return box.checked && names.includes(text);
}

const charts = [];

// A chart that is drawn when it comes into view, and again whenever `redraw` says so.
// `build` gives its traces, layout, and a text that says what it shows.
function addChart(id, build) {
  const node = $(id);
  if (!node) return;
  const chart = { isVisible: false, draw() {
    const { traces, layout, text } = build();
    node.setAttribute("aria-label", text);
    Plotly.react(node, traces, themed(layout), CONFIG);
  } };
  const show = () => { if (!chart.isVisible) { chart.isVisible = true; chart.draw(); } };
  new IntersectionObserver((entries, observer) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    observer.disconnect();
    show();
  }, { rootMargin: "100px" }).observe(node);
  window.addEventListener("beforeprint", show);
  charts.push(chart);
  walkable(node, $(`${id}-readout`));
}

function redraw() {
  for (const chart of charts) if (chart.isVisible) chart.draw();
}

function themed(layout) {
  const line = css("--line");
  const axis = { gridcolor: line, linecolor: line, zeroline: false };
  return {
    margin: { l: 64, r: 12, t: 30, b: 48 },
    hovermode: "closest",
    dragmode: isTouch ? false : "zoom",
    showlegend: false,
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: css("--text"), family: getComputedStyle(document.body).fontFamily, size: 13 },
    hoverlabel: { align: "left", namelength: -1, bgcolor: css("--page"), bordercolor: line,
      font: { color: css("--text") } },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--quiet"), activecolor: css("--text") },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
    ...layout,
    xaxis: { ...axis, ...layout.xaxis },
    yaxis: { ...axis, ...layout.yaxis },
  };
}

// Arrow keys go through points and lines, and what they find is read out.
function walkable(node, readout) {
  const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  let line = 0;
  let point = 0;
  node.addEventListener("keydown", (event) => {
    const move = moves[event.key];
    const lines = (node.data || []).flatMap((trace, index) => (trace.meta === "aid" ? [] : [index]));
    if (!move || !lines.length) return;
    event.preventDefault();
    line = Math.min(lines.length - 1, Math.max(0, line + move[0]));
    const trace = node.data[lines[line]];
    point = Math.min(trace.x.length - 1, Math.max(0, point + move[1]));
    Plotly.Fx.hover(node, [{ curveNumber: lines[line], pointNumber: point }]);
    const { xaxis, yaxis } = node.layout;
    readout.textContent = `${trace.meta}: ${yaxis.title.text} ${format(trace.y[point])}, `
      + `${xaxis.title.text} ${format(trace.x[point])}`;
  });
}

const format = (value) => (Math.abs(value) >= 1e12 ? value.toExponential(3)
  : Number(Number(value).toPrecision(6)).toLocaleString("en", { maximumFractionDigits: 9 }));

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  colors = readColors();
  redraw();
});
