// What calibration measured and what the bundle holds.

import { $, element } from "./dom.js";
import { percent } from "./words.js";

export function showBundle(bundle) {
  showHeldOut(bundle);
  showCertificates(bundle.certificates, bundle);
  showShadow(bundle.shadow);
  const { counts, regions = {}, held_out: heldOut } = bundle.report;
  const { system_prompt: system, turns } = bundle.policy.conversations;
  const facts = {
    Name: bundle.name,
    Digest: bundle.bundle,
    Model: bundle.model,
    Calibrated: new Date(bundle.created).toLocaleString(),
    Policy: `temperature ${bundle.policy.temperature}, at most ${bundle.policy.max_tokens} tokens, `
      + systemPrompt(system),
    Turns: turns.join("; "),
    Verdicts: bundle.class_names.map((name, c) => `${c}: ${name}`).join("; "),
    "Lets through": bundle.rule === "two-gates" ? "by two gates: the prompt is known, and the answer’s score is certified"
      : "by the papers’ region",
    "Region admits": bundle.estimator === "lower" ? "by the lower estimate, which counts how few calibration answers stand behind one"
      : "by the plain estimate",
    "Training half": counts && half(counts.training_half),
    "Calibration half": counts && half(counts.calibration_half),
    "Held out": counts && half(counts.held_out),
    "Right from wrong": heldOut?.auroc && `AUROC ${heldOut.auroc.value.toFixed(3)} [${heldOut.auroc.low.toFixed(3)}, ${heldOut.auroc.high.toFixed(3)}]`,
  };
  $("facts").replaceChildren(...Object.entries(facts).filter(([, value]) => value)
    .flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));
}

function showShadow(shadow) {
  $("shadow").hidden = !shadow;
  if (!shadow) return;
  const ends = ["answered", "abstained", "unknown"];
  const rows = Object.entries(shadow.decisions).map(([old, found]) => element("tr", {},
    element("th", { scope: "row" }, `${old} now`), ...ends.map((end) => element("td", { class: "number" }, found[end]))));
  $("shadow").replaceChildren(
    element("h3", {}, "A bundle that shadows"),
    element("p", { class: "hint" }, `${shadow.bundle.slice(0, 12)} scores each answer too and decides nothing`
      + (shadow.dropped ? `; ${shadow.dropped} were too many for it.` : ".")),
    element("table", {},
      element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "Answers"),
        ...ends.map((end) => element("th", { scope: "col", class: "number" }, `${end} by it`)))),
      element("tbody", {}, ...rows)));
}

function systemPrompt({ kind, text, digests, optional }) {
  if (kind === "fixed") return `system prompt “${text}”`;
  if (kind === "none") return "no system prompt";
  return `one of ${digests.length} system prompts` + (optional ? ", or none" : "");
}

const half = (part) => part && `${part.records} answers, ${percent(part.base_rate, 1)} right`;

function showHeldOut(bundle) {
  const heldOut = bundle.report.held_out;
  const gated = bundle.rule === "two-gates";
  const measured = heldOut?.[gated ? "rule" : bundle.estimator];
  const head = ["Asked for", gated ? "Score from" : "q′ from", "Answered", "Right of those"];
  const rows = bundle.regions.map((region) => {
    const figures = measured?.[String(region.alpha)];
    const certificate = bundle.certificates.find((one) => one.rule === "two-gates" && one.alpha === region.alpha);
    const serves = gated ? certificate !== undefined : region.found;
    const from = gated ? certificate?.score_min.toFixed(2) ?? "no certificate"
      : region.found ? region.rescaled_similarity_threshold.toFixed(1) : "no region";
    return element("tr", {}, element("th", { scope: "row" }, percent(region.alpha)), cell(from),
      share(serves && figures?.answered), share(serves && figures?.accuracy_answered));
  });
  $("held-out").replaceChildren(
    element("thead", {}, element("tr", {}, ...head.map((text, i) => element("th", i ? { scope: "col", class: "number" } : { scope: "col" }, text)))),
    element("tbody", {}, ...rows));
  $("held-out-note").textContent = heldOut
    ? `${heldOut.records} prompts that neither training nor calibration saw; of all their answers ${percent(heldOut.correct.value, 1)} were right. `
      + "Brackets: 95 % confidence."
    : "This bundle's report has no held-out figures.";
}

const STANDS = { upheld: "upheld", suspended: "suspended: audits speak against it", renewed: "renewed by audits" };

function stands(one, { standings }) {
  const found = standings.find((other) => other.alpha === one.alpha);
  if (one.standing === null || !found) return " Nobody watches it here.";
  return ` Now ${STANDS[one.standing]}; of ${found.right + found.wrong} audits ${found.right} were right, ${found.open} wait for a label.`;
}

function showCertificates(certificates, bundle) {
  const judging = certificates.filter((one) => one.rule === bundle.rule && (one.estimator ?? bundle.estimator) === bundle.estimator);
  const lines = judging.map((one) => element("li", one.standing === "suspended" ? { class: "suspended" } : {},
    element("strong", {}, `At least ${percent(one.accuracy, 1)} right`),
    ` among the answered at ${percent(one.alpha)} (${one.rule === "two-gates" ? `score from ${one.score_min.toFixed(2)}`
      : `${one.estimator} estimate, q′ from ${one.rescaled_similarity_min.toFixed(1)}`}), with `
    + `${percent(one.confidence, 1)} confidence: of ${one.records} prompts set aside for it, ${one.answered} were answered and `
    + `${one.right} of them rightly.${stands(one, bundle)}`));
  $("certificates").replaceChildren(element("h3", {}, "Certificates"), lines.length ? element("ul", {}, ...lines)
    : element("p", { class: "hint" }, "None: the figures above are measured, and nothing is certified."));
}

const cell = (text) => element("td", { class: "number" }, text);

// A proportion {value, low, high}; a dash where there is none.
function share(figure) {
  if (!figure || figure.value === null) return cell("–");
  const interval = element("span", { class: "interval" }, `[${percent(figure.low, 1)}, ${percent(figure.high, 1)}]`);
  return element("td", { class: "number" }, percent(figure.value, 1), interval);
}
