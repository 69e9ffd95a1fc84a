// The charts: losses, scaling, speed, monitors.

const AXES = {
  num_tokens: { title: "tokens", exponentformat: "B" },
  training_flops: { title: "FLOPs, papers' convention", exponentformat: "power" },
  executed_flops: { title: "FLOPs as run", exponentformat: "power" },
  seconds: { title: "training time" },
};

function axis(title, isLog, rest = {}) {
  return { title: { text: title }, type: isLog ? "log" : "linear", ...rest };
}

const line = (family) => ({ color: color(family), dash: dashOf(family), width: 1.6 });

// Hours or minutes where the longest run has at least two of them.
function timeUnit(runs) {
  const longest = Math.max(0, ...runs.map((run) => columns(run.training).seconds.at(-1)));
  return longest >= 7200 ? [3600, "hours"] : longest >= 120 ? [60, "minutes"] : [1, "seconds"];
}

function say(id, count, why) {
  $(id).textContent = count ? ` ${count} run${count > 1 ? "s" : ""} not drawn: ${why}.` : "";
}

addChart("curves", () => {
  const [loss, x] = [chosen("loss"), chosen("x")];
  const runs = data.runs.filter(isShown);
  const [size, unit] = x === "seconds" ? timeUnit(runs) : [1, ""];
  const curve = (run) => columns(loss === "validation" ? run.validation : run.training);
  const known = runs.filter((run) => curve(run)[x].some(Number.isFinite));
  // A marker is an element of the page: many would make it slow, and say nothing on a long line.
  const total = known.reduce((sum, run) => sum + curve(run).step.length, 0);
  const traces = known.map((run) => {
    const found = curve(run);
    const isPoint = found.step.length === 1;
    return {
      type: "scatter", mode: isPoint ? "markers" : total <= 1500 ? "lines+markers" : "lines", name: plain(run.label), meta: run.label,
      x: size === 1 ? found[x] : found[x].map((value) => value / size),
      y: loss === "smoothed" ? found.smoothed : found.loss,
      customdata: found.step, line: line(run.family), marker: { size: 5 },
      hovertemplate: "<b>%{fullData.name}</b><br>loss %{y:.4f}<br>%{x:,.4~s} "
        + `${x === "seconds" ? unit : AXES[x].title}<br>step %{customdata:,}<extra></extra>`,
    };
  });
  say("curves-missing", runs.length - known.length, "nothing was recorded for this choice");
  const { title, ...rest } = AXES[x];
  return {
    traces,
    layout: {
      xaxis: axis(unit ? `${title} (${unit})` : title, $("log-x").checked, rest),
      yaxis: axis(loss === "validation" ? "validation loss" : "training loss", $("log-y").checked),
      uirevision: [loss, x, $("log-x").checked, $("log-y").checked].join(),
    },
    text: `${loss} loss against ${title}, ${known.length} runs`,
  };
});

addChart("scaling", () => {
  const runs = data.runs.filter(isShown);
  const known = runs.filter((run) => run.compute > 0 && run.loss !== null && ["main", "tune"].includes(run.stage));
  const laws = shownLaws();
  const traces = laws.flatMap((law) => lawTraces(law));
  for (const family of new Set(known.map((run) => run.family))) {
    const points = known.filter((run) => run.family === family);
    const symbols = ["circle", "square", "diamond"];
    const symbol = symbols[Math.floor(family / NUM_COLORS) % 3];
    traces.push({
      type: "scatter", mode: "markers", name: plain(data.families[family]), meta: data.families[family],
      x: points.map((run) => run.compute), y: points.map((run) => run.loss),
      text: points.map((run) => plain(run.label)),
      marker: { size: 9, color: color(family), line: { width: 1.5, color: color(family) },
        symbol: points.map((run) => (run.stage === "tune" ? "x" : symbol) + (run.finished ? "" : "-open")) },
      hovertemplate: "<b>%{text}</b><br>%{fullData.name}<br>loss %{y:.4f}<br>%{x:.4~e} FLOPs<extra></extra>",
    });
  }
  say("scaling-missing", runs.length - known.length, "executed FLOPs or validation loss not recorded, or only there to time steps");
  return {
    traces,
    layout: { xaxis: axis("executed FLOPs", true, { exponentformat: "power" }), yaxis: axis("last validation loss", true) },
    text: `last validation loss against executed FLOPs, ${known.length} runs, ${laws.length} fits`,
  };
});

// Those of the chosen law whose family is shown; a family without runs always is.
function shownLaws() {
  const law = data.laws.length ? chosen("law") : "";
  return data.laws.filter((found) => {
    const runs = data.runs.filter((run) => data.families[run.family] === found.family);
    return found.law === law && (!runs.length || runs.some(isShown));
  });
}

function lawTraces(law) {
  const family = data.families.indexOf(law.family);
  const band = law.low.map((low, index) => `<br>band ${low.toFixed(4)} to ${law.high[index].toFixed(4)}`);
  const fit = { type: "scatter", mode: "lines", name: plain(`${law.family}, fit`), meta: `${law.family}, fit`,
    x: law.compute, y: law.loss, line: line(family), text: law.low.length ? band : "",
    hovertemplate: "<b>%{fullData.name}</b><br>loss %{y:.4f}%{text}<br>%{x:.4~e} FLOPs<extra></extra>" };
  if (!law.low.length) return [fit];
  return [{
    type: "scatter", mode: "lines", meta: "aid", hoverinfo: "skip", fill: "toself", opacity: 0.2,
    x: [...law.compute, ...law.compute.toReversed()], y: [...law.high, ...law.low.toReversed()],
    line: { width: 0 }, fillcolor: color(family),
  }, fit];
}

addChart("speed", () => {
  const panel = data.speed[$("speed-panel").value];
  const quantity = chosen("speed");
  const isLatency = quantity === "median_ms";
  const cases = [...new Set(panel.lines.map((found) => found.case))];
  const traces = panel.lines.flatMap((found) => {
    const look = { color: color(cases.indexOf(found.case)), dash: DASHES[found.dash % DASHES.length] };
    const half = found.spread_ms.map((value) => value / 2);
    const ideal = { type: "scatter", mode: "lines", meta: "aid", hoverinfo: "skip", showlegend: false,
      x: found.x, y: found.ideal, line: { ...look, width: 1, dash: "dot" } };
    return [...(isLatency ? [] : [ideal]), {
      type: "scatter", mode: "lines+markers", name: plain(found.name), meta: found.name,
      x: found.x, y: found[quantity], line: { ...look, width: 1.8 },
      error_y: isLatency ? { array: half, thickness: 1, width: 2 } : {},
      hovertemplate: `<b>%{fullData.name}</b><br>%{y:.4~f}${isLatency ? " ms" : "x"}<br>%{x:,} ${panel.axis}<extra></extra>`,
    }];
  });
  return {
    traces,
    layout: {
      showlegend: true,
      xaxis: axis(panel.axis, true), yaxis: axis(isLatency ? "latency (ms)" : "speed-up", isLatency),
    },
    text: `${panel.title}: ${isLatency ? "latency" : "speed-up"} against ${panel.axis}, ${panel.lines.length} lines`,
  };
});

const depth = (name) => Number((name.match(/\.(\d+)\./) || [0, 0])[1]);
// What was recorded of the chosen run; nothing where no run with monitors is shown.
const monitored = () => data.monitors.find((each) => String(each.run) === $("monitor-run").value);
const ALPHA = "share of the guide, α";

addChart("monitors", () => {
  const found = monitored();
  if (!found) return { traces: [], layout: { xaxis: axis("step", false), yaxis: axis("", false) }, text: "no run with monitors is shown" };
  const label = $("monitor-panel").value;
  const panel = found.panels.find((each) => each.label === label);
  const depths = [...new Set(found.layers.map(depth))].sort((a, b) => a - b);
  const linears = [...new Set(found.layers.map((name) => name.split(".").at(-1)))];
  const shade = (name) => 210 - 180 * (depths.indexOf(depth(name)) / Math.max(1, depths.length - 1));
  const values = panel ? unpack(panel.values) : found.alpha;
  const count = found.steps.length;
  const traces = (panel ? found.layers : [ALPHA]).map((name, index) => ({
    type: "scatter", mode: count > 60 ? "lines" : "lines+markers", name: plain(name), meta: name,
    x: found.steps, y: values.slice(index * count, (index + 1) * count), marker: { size: 4 },
    line: { width: 1.5, color: `hsl(${shade(name)}, 70%, ${css("--depth-light")})`,
      dash: DASHES[Math.max(0, linears.indexOf(name.split(".").at(-1))) % DASHES.length] },
    hovertemplate: "<b>%{fullData.name}</b><br>%{y:.5~g}<br>step %{x:,}<extra></extra>",
  }));
  const spikes = found.spikes.map((step) => ({ type: "line", x0: step, x1: step, y0: 0, y1: 1,
    yref: "paper", line: { color: color(1), width: 1 } }));
  return {
    traces,
    layout: { shapes: spikes, xaxis: axis("step", false),
      yaxis: axis(label, /RMS/.test(label), { rangemode: /RMS/.test(label) ? "normal" : "tozero" }) },
    text: `${label} against steps, ${traces.length} lines, run ${data.runs[found.run].label}`,
  };
});
