// The plane of q' against SDM(z'): calibration answers, the region, and where this answer falls.
//
// Both axes are stretched, for what matters lies at the ends: q' by log(1 + q'), the probability p by its nines,
// -log10(1 - p).
/* global Chart */

import { $, colour, element, onSchemeChange } from "./dom.js";
import { percent } from "./words.js";

const MOST_NINES = 6;
const nines = (p) => Math.min(MOST_NINES, -Math.log10(Math.max(1 - p, 10 ** -MOST_NINES)));
const neighbours = (q) => Math.log10(1 + q);

const X_TICKS = [0, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000];
const Y_TICKS = [0.5, 0.75, 0.9, 0.97, 0.99, 0.999, 0.9999, 0.99999, 0.999999];

export class Plane {
  // points: columns of GET /v1/reliability/calibration. regions, classNames: of GET /v1/reliability.
  constructor(points, regions, classNames) {
    this.points = points;
    this.regions = regions;
    this.classNames = classNames;
    this.result = null;
    this.alpha = regions[0]?.alpha;
    onSchemeChange(() => this.draw());
  }

  // result: an answer's, or null for none. alpha: whose region is drawn.
  show(result, alpha) {
    this.result = result?.activation == null ? null : result;
    this.alpha = alpha;
    this.draw();
  }

  draw() {
    const prediction = this.result?.prediction ?? this.classNames.length - 1;
    const region = this.regions.find((one) => one.alpha === this.alpha);
    const { right, wrong } = this.#calibration(prediction);
    const most = Math.max(10, ...this.points.rescaled_similarity, this.result?.rescaled_similarity ?? 0);
    const xMax = neighbours(most) * 1.03;
    const datasets = [
      ...this.#answer(),
      cloud("judged rightly", right, { pointStyle: "circle", backgroundColor: `${colour("accent")}59`, radius: 3 }),
      cloud("judged wrongly", wrong, { pointStyle: "crossRot", borderColor: colour("wrong"), borderWidth: 1.8, radius: 4.5 }),
      ...(region?.found ? [this.#region(region, prediction, xMax)] : []),
    ];
    this.chart?.destroy();
    this.chart = new Chart($("plane"), {
      type: "scatter",
      data: { datasets },
      options: {
        animation: false,
        maintainAspectRatio: false,
        layout: { padding: { top: 8, right: 8 } },
        plugins: { legend: { display: false }, tooltip: { filter: (item) => item.raw.q !== undefined, callbacks: { label } } },
        scales: {
          x: axis("q′, agreeing neighbours (rescaled)", X_TICKS, neighbours, { min: 0, max: xMax }),
          y: axis("probability of the verdict, SDM(z′)", Y_TICKS, nines, { min: nines(0.5), max: MOST_NINES + 0.15 }),
        },
      },
    });
    this.#describe(prediction, region, right.length, wrong.length);
  }

  #calibration(prediction) {
    const right = [];
    const wrong = [];
    this.points.prediction.forEach((predicted, i) => {
      if (predicted !== prediction) return;
      const point = at(this.points.rescaled_similarity[i], this.points.probability[i]);
      (this.points.label[i] === predicted ? right : wrong).push(point);
    });
    return { right, wrong };
  }

  // The answer, and a line to where it is counted once it is asked how few calibration answers stand behind it.
  #answer() {
    if (!this.result) return [];
    const { similarity: q, rescaled_similarity, activation: probability, probability_lower } = this.result;
    const here = at(rescaled_similarity, probability);
    const counted = at(Math.min(q, (2 + q) ** probability_lower), probability_lower);
    const tone = colour(this.result.region);
    return [
      cloud("this answer", [here], { pointStyle: "rectRot", radius: 9, hoverRadius: 10, borderWidth: 2.5,
        borderColor: colour("card"), backgroundColor: tone, clip: false }),
      cloud("this answer, with its discount", [here, counted], { type: "line", borderColor: tone, borderWidth: 2,
        radius: [0, 4], backgroundColor: tone, clip: false }),
    ];
  }

  #region(region, prediction, xMax) {
    const left = neighbours(region.rescaled_similarity_threshold);
    const y = nines(region.class_thresholds[prediction]);
    return {
      type: "line", data: [{ x: left, y }, { x: xMax, y }], fill: "end", radius: 0, hitRadius: 0,
      borderColor: colour("high"), borderWidth: 1.5, borderDash: [5, 4], backgroundColor: `${colour("high")}1f`,
    };
  }

  #describe(prediction, region, right, wrong) {
    const verdict = this.classNames[prediction];
    const given = this.points.label.length;
    const sample = given < this.points.total ? `, of ${given} shown out of ${this.points.total}` : "";
    $("plane-caption").textContent = `The ${right + wrong} calibration answers with the verdict “${verdict}”${sample}.`;
    const asked = percent(this.alpha);
    $("plane-legend").replaceChildren(
      ...(this.result ? [entry(this.result.region, "M8 1 15 8 8 15 1 8z", "fill", "this answer")] : []),
      entry("accent", "M8 3a5 5 0 1 0 .01 0z", "fill", `rightly so (${right})`),
      entry("wrong", "M3 3l10 10M13 3L3 13", "stroke", `wrongly so (${wrong})`),
      entry("high", "M2 14V3H14", "stroke", region?.found ? `region at ${asked}` : `no region at ${asked}`),
    );
    $("plane-note").textContent = this.result
      ? "The line leads to where the answer is counted after the discount for how few calibration answers stand behind it."
      : "Ask something, and its answer appears here.";
    $("plane").setAttribute("aria-label", `${right} calibration answers judged rightly and ${wrong} wrongly`
      + (this.result ? `; this answer at q′ ${this.result.rescaled_similarity.toFixed(1)}, probability ${this.result.activation.toFixed(3)}` : ""));
  }
}

const at = (q, p) => ({ x: neighbours(q), y: nines(p), q, p });

const cloud = (name, data, look) => ({ label: name, data, ...look });

const label = ({ raw, dataset }) => `${dataset.label}: q′ ${raw.q.toFixed(1)}, probability ${raw.p.toFixed(5)}`;

// bounds: {min, max}, stretched.
const axis = (title, ticks, stretch, bounds) => ({
  ...bounds,
  type: "linear",
  title: { display: true, text: title, color: colour("soft") },
  grid: { color: colour("line") },
  border: { color: colour("line") },
  ticks: { color: colour("soft"), autoSkip: false, maxRotation: 0, callback: (_, index, all) => all[index].name },
  afterBuildTicks: (scale) => {
    scale.ticks = ticks.map((value) => ({ value: stretch(value), name: String(value) })).filter((tick) => tick.value <= scale.max);
  },
});

function entry(tone, path, how, text) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 16 16");
  svg.setAttribute("aria-hidden", "true");
  const line = document.createElementNS(svg.namespaceURI, "path");
  line.setAttribute("d", path);
  line.setAttribute("fill", how === "fill" ? colour(tone) : "none");
  line.setAttribute("stroke", how === "stroke" ? colour(tone) : "none");
  line.setAttribute("stroke-width", "2");
  svg.append(line);
  return element("li", {}, svg, text);
}
