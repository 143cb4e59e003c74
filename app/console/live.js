// How often the server abstains, from its own /metrics.
/* global Chart */

import { ApiError, getText } from "./api.js";
import { $, colour, element, onSchemeChange } from "./dom.js";
import { percent, REASONS, REGIONS } from "./words.js";

const EVERY_S = 5;
const WINDOW_S = 60;
const KEPT_S = 900;

// Samples of one metric in Prometheus' text format: [{labels, value}].
export function samples(text, name) {
  return text.split("\n").filter((line) => line.startsWith(`${name}{`)).map((line) => ({
    labels: Object.fromEntries([...line.matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)].map(([, label, value]) => [label, value])),
    value: Number(line.slice(line.lastIndexOf("} ") + 2).split(" ")[0]),
  }));
}

export class Live {
  // alpha: whose reference is drawn.
  constructor(alpha) {
    this.alpha = alpha;
    this.seen = []; // {at: seconds, answers, abstained}, oldest first
    this.rates = []; // {x: seconds, y: share or null}
    this.reference = null;
    onSchemeChange(() => this.draw());
    document.addEventListener("visibilitychange", () => document.hidden || this.look());
    setInterval(() => document.hidden || this.look(), 1000 * EVERY_S);
  }

  async look() {
    let text;
    try {
      text = await getText("metrics");
    } catch (error) {
      const closed = error instanceof ApiError && [401, 403].includes(error.status);
      $("rate-reference").textContent = closed ? "This key may not read the server's metrics." : error.message;
      return;
    }
    const answers = samples(text, "sdm_answers_total");
    const reference = samples(text, "sdm_reference_abstention_ratio").find((one) => Number(one.labels.alpha) === this.alpha);
    this.reference = reference?.value ?? null;
    const sum = (wanted) => answers.filter(wanted).reduce((total, one) => total + one.value, 0);
    const now = Date.now() / 1000;
    this.seen.push({ at: now, answers: sum(() => true), abstained: sum((one) => one.labels.decision === "abstained") });
    this.seen = this.seen.filter((one) => one.at > now - KEPT_S);
    const since = this.seen.find((one) => one.at >= now - WINDOW_S - 1);
    const last = this.seen.at(-1);
    const answered = last.answers - since.answers;
    this.rates.push({ x: now, y: answered > 0 ? (last.abstained - since.abstained) / answered : null });
    this.rates = this.rates.filter((one) => one.x > now - KEPT_S);
    this.#count(answers, last, sum);
    this.draw();
  }

  #count(answers, last, sum) {
    const of = last.answers || 1;
    $("rate").textContent = last.answers ? percent(last.abstained / of) : "–";
    $("rate-words").textContent = last.answers ? `abstained, of ${last.answers} ${last.answers === 1 ? "answer" : "answers"}` : "no answers yet";
    $("rate-reference").textContent = this.reference === null ? "Calibration measured no reference for this server."
      : `Calibration measured ${percent(this.reference, 1)} at ${this.alpha} on prompts like its own.`;
    const regions = Object.keys(REGIONS).map((region) => [region, sum((one) => one.labels.region === region)]);
    $("region-bar").replaceChildren(...regions.filter(([, count]) => count).map(([region, count]) => {
      const part = element("span", { class: region });
      part.style.flexGrow = count;
      return part;
    }));
    $("region-bar").setAttribute("aria-label", `Answers by region: ${regions.map(([region, n]) => `${region} ${n}`).join(", ")}`);
    const rows = [];
    for (const [region, count] of regions) {
      rows.push(row(`region ${region}`, [element("span", { class: "dot", "aria-hidden": "true" }), REGIONS[region]], count, of));
      for (const reason of new Set(answers.filter((one) => one.labels.region === region).map((one) => one.labels.reason))) {
        const n = sum((one) => one.labels.region === region && one.labels.reason === reason);
        if (n && ["high", "low"].includes(region)) rows.push(row("why", [REASONS[reason] ?? reason], n, of));
      }
    }
    $("answer-counts").replaceChildren(...rows);
  }

  draw() {
    const now = Date.now() / 1000;
    const ago = (one) => ({ x: (one.x - now) / 60, y: one.y });
    const span = Math.min(-2, (this.rates[0]?.x - now) / 60 || 0);
    const datasets = [{ data: this.rates.map(ago), borderColor: colour("accent"), backgroundColor: colour("accent"), borderWidth: 2,
      radius: this.rates.length < 30 ? 2.5 : 0, spanGaps: false, clip: 6 }];
    if (this.reference !== null) {
      datasets.push({ data: [{ x: span, y: this.reference }, { x: 0, y: this.reference }], borderColor: colour("soft"), borderWidth: 1.5,
        borderDash: [5, 4], radius: 0 });
    }
    const ticks = { color: colour("soft"), maxRotation: 0 };
    const grid = { color: colour("line") };
    this.chart?.destroy();
    this.chart = new Chart($("history"), {
      type: "line",
      data: { datasets },
      options: {
        animation: false,
        maintainAspectRatio: false,
        layout: { padding: 6 },
        plugins: { legend: { display: false }, tooltip: { enabled: false } },
        scales: {
          x: { type: "linear", min: span, max: 0, grid, ticks: { ...ticks, stepSize: span < -5 ? 5 : 0.5, callback: (value) => (value === 0 ? "now" : `${+value.toFixed(1)} min`) } },
          y: { min: 0, max: 1, grid, ticks: { ...ticks, stepSize: 0.25, callback: (value) => percent(value) } },
        },
      },
    });
  }
}

function row(kind, title, count, of) {
  return element("tr", { class: kind }, element("th", { scope: "row" }, ...title),
    element("td", { class: "number" }, String(count)), element("td", { class: "number" }, percent(count / of)));
}
