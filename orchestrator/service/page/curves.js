// Curves of one run, or of several for comparison: a chart per group of metrics, each drawn once it has something to show.

import uPlot from "./vendor/uPlot.esm.js";
import { h } from "./dom.js";

const GROUPS = [
  ["Reward", /^(eval_)?reward$/],
  ["Accuracy", /^(eval_)?(mean_token_accuracy|rewards\/accuracies|accuracy)$/],
  ["Loss", /^(eval_)?loss$/],
  ["KL", /^(kl|objective\/kl|approx_kl|policy\/approx_kl)$|(^|\/)kl$/],
  ["Entropy", /(^|\/)entropy$/],
  ["Length in tokens", /^completions\/(mean|max)_length$/],
  ["Seconds of a step", /^(step_time|time\/(collect|publish|.+\..+))$/],
  ["Staleness in versions", /^staleness\//],
  ["Gradient norm", /(^|\/)grad_norm$/],
  ["Learning rate", /(^|\/)learning_rate$/],
];
const COLOURS = ["#2f7fd6", "#d9822b", "#2e9e5b", "#b452c4", "#d64545", "#7a8794", "#1aa5a5", "#a08400"];
const DASHES = [[], [6, 4], [2, 3]]; // of the first, second and third run

// `runs`: [{label, lines}], lines of metrics in the order of their steps.
export class Curves {
  constructor() {
    this.element = h("div", { class: "charts" });
    this.charts = new Map();
    this.observer = new ResizeObserver(() => this.charts.forEach(({ plot, box }) => plot.setSize(sizeOf(box))));
    this.observer.observe(this.element);
  }

  show(runs) {
    const names = [...new Set(runs.flatMap(({ lines }) => lines.flatMap(Object.keys)))].sort();
    for (const [title, pattern] of GROUPS) {
      const series = runs.flatMap(({ label, lines }, which) =>
        names.filter((name) => pattern.test(name)).map((name) => seriesOf(name, label, lines, which, runs.length > 1)),
      ).filter(({ points }) => points.length);
      if (series.length) this.draw(title, series, boundaries(runs));
    }
  }

  draw(title, series, marks) {
    const data = aligned(series);
    const key = series.map(({ label }) => label).join("\n");
    const known = this.charts.get(title);
    if (known?.key === key) {
      known.marks.splice(0, Infinity, ...marks);
      known.plot.setData(data);
      return;
    }
    known?.plot.destroy();
    const box = known?.box ?? h("div", { class: "chart" }, h("h3", { class: "faint" }, title));
    if (!known) this.element.append(box);
    const kept = [...marks];
    const faint = getComputedStyle(box.firstChild).color; // as the theme resolves it
    const axis = { stroke: faint, grid: { stroke: "#8883", width: 1 }, ticks: { stroke: "#8883" } };
    const options = {
      ...sizeOf(box),
      scales: { x: { time: false }, y: { range: (_, low, high) => (low === 0 && high === 0 ? [0, 1] : uPlot.rangeNum(low ?? 0, high ?? 1, 0.1, true)) } },
      axes: [{ ...axis, label: "step", labelSize: 18, size: 32 }, { ...axis, size: 64, values: (_, ticks) => ticks.map(short) }],
      series: [
        { label: "step" },
        ...series.map(({ label, dash, sparse }, index) => ({
          label,
          stroke: COLOURS[index % COLOURS.length],
          width: 1.5,
          dash,
          spanGaps: true,
          points: sparse ? { show: true, size: 5 } : { show: false },
          value: (_, value) => (value === null || value === undefined ? "–" : short(value)),
        })),
      ],
      hooks: { draw: [(plot) => (drawMarks(plot, kept, faint), describe(plot, title))] },
    };
    this.charts.set(title, { plot: new uPlot(options, data, box), box, key, marks: kept });
  }

  close() {
    this.observer.disconnect();
    this.charts.forEach(({ plot }) => plot.destroy());
  }
}

function seriesOf(name, run, lines, which, several) {
  const points = lines.filter((line) => typeof line[name] === "number").map((line) => [line.step, line[name]]);
  const sparse = name.startsWith("eval_") || points.length < 40;
  return { label: several ? `${name} · ${run}` : name, points, sparse, dash: DASHES[which] ?? DASHES[2] };
}

// uPlot takes one column of x and a column of y per series, with null where a series has no point.
function aligned(series) {
  const steps = [...new Set(series.flatMap(({ points }) => points.map(([step]) => step)))].sort((a, b) => a - b);
  const place = new Map(steps.map((step, index) => [step, index]));
  const columns = series.map(({ points }) => {
    const column = new Array(steps.length).fill(null);
    for (const [step, value] of points) column[place.get(step)] = value;
    return column;
  });
  return [steps, ...columns];
}

// The last step of each phase but the last one.
function boundaries(runs) {
  if (runs.length > 1) return [];
  const { lines } = runs[0];
  return lines.flatMap((line, index) => (index && line.phase !== lines[index - 1].phase ? [[lines[index - 1].step, line.phase]] : []));
}

function drawMarks(plot, marks, colour) {
  const { ctx, bbox } = plot;
  ctx.save();
  ctx.strokeStyle = ctx.fillStyle = colour;
  ctx.textAlign = "left";
  ctx.setLineDash([3, 3]);
  for (const [step, phase] of marks) {
    const x = Math.round(plot.valToPos(step, "x", true));
    if (x < bbox.left || x > bbox.left + bbox.width) continue;
    ctx.beginPath();
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
    ctx.fillText(phase, x + 4, bbox.top + 12 * devicePixelRatio);
  }
  ctx.restore();
}

// What was drawn, for those who do not see it.
function describe(plot, title) {
  const [steps, ...columns] = plot.data;
  const told = columns.map((column, index) => {
    const last = column.findLastIndex((value) => value !== null);
    return `${plot.series[index + 1].label} ${column.filter((value) => value !== null).length} points, ${short(column[last])} at step ${steps[last]}`;
  });
  plot.ctx.canvas.setAttribute("role", "img");
  plot.ctx.canvas.setAttribute("aria-label", `${title}: ${told.join("; ")}`);
}

function sizeOf(box) {
  return { width: Math.max(260, box.clientWidth || 360), height: 200 };
}

function short(value) {
  const magnitude = Math.abs(value);
  return magnitude && (magnitude < 1e-3 || magnitude >= 1e5) ? value.toExponential(1) : String(Number(value.toPrecision(4)));
}
