// The page: asks, and shows what comes back.

import { ApiError, ask, getJson, sendFeedback } from "./api.js";
import { showBundle } from "./bundle.js";
import { $, element } from "./dom.js";
import { Live } from "./live.js";
import { Plane } from "./plane.js";
import { keyDialog, refused, trouble } from "./trouble.js";
import { headline, probability } from "./words.js";

const SHOWN_EXEMPLARS = 3;
const UNLIKE = "What will the weather be like in Berlin tomorrow?";

let bundle = null;
let model = null;
let plane = null;
let live = null;

async function start() {
  trouble(null);
  try {
    const [models, report, points] = await Promise.all(["v1/models", "v1/reliability", "v1/reliability/calibration"].map(getJson));
    bundle = report;
    model = models.data[0].id;
    $("served").textContent = `${model} · bundle ${bundle.bundle.slice(0, 12)}`;
    $("alpha").replaceChildren(...bundle.regions.map(({ alpha, found }) => {
      const certified = bundle.certificates.some((one) => one.rule === "two-gates" && one.alpha === alpha);
      const lacks = bundle.rule === "two-gates" ? !certified && "nothing certified" : !found && "no region";
      const option = element("option", { value: alpha }, `${100 * alpha} %${lacks ? ` (${lacks})` : ""}`);
      option.selected = alpha === bundle.default_alpha;
      return option;
    }));
    offerExamples();
    showBundle(bundle);
    plane = new Plane(points, bundle.regions, bundle.class_names);
    plane.show(null, bundle.default_alpha);
    live ??= new Live(bundle.default_alpha);
    await live.look();
  } catch (error) {
    $("served").textContent = "not connected";
    refused(error);
  }
}

function offerExamples() {
  const offers = [...bundle.examples.map((text, i) => [`example ${i + 1}`, text]), ["something unlike", UNLIKE]];
  $("examples").replaceChildren("Try", ...offers.map(([name, text]) => {
    const button = element("button", { type: "button", class: "link", title: text }, name);
    button.addEventListener("click", () => fill(text));
    return button;
  }));
}

function fill(text) {
  $("prompt").value = text;
  $("prompt").focus();
}

async function submit() {
  const prompt = $("prompt").value.trim();
  if (!prompt || !bundle || $("send").disabled) return;
  const alpha = Number($("alpha").value);
  const mode = new FormData($("question")).get("mode");
  const exemplars = Math.min(SHOWN_EXEMPLARS, bundle.most_exemplars);
  begin();
  try {
    const answer = await ask({ model, prompt, reliability: { mode, alpha, exemplars } }, (text) => ($("text").textContent = text));
    show(answer);
    live?.look();
  } catch (error) {
    $("answer").hidden = true;
    refused(error);
  } finally {
    $("send").disabled = false;
    $("answer").setAttribute("aria-busy", "false");
  }
}

function begin() {
  trouble(null);
  $("send").disabled = true;
  $("answer").hidden = false;
  $("answer").className = "card answer";
  $("answer").setAttribute("aria-busy", "true");
  $("headline").textContent = "Writing";
  $("reason").textContent = "It is checked when it is complete.";
  $("text").textContent = "";
  $("text").classList.remove("withheld");
  $("measures").replaceChildren();
  $("answer").scrollIntoView({ block: "nearest" });
  $("feedback").hidden = true;
  $("exemplars").hidden = true;
}

function show({ id, content, refusal, result }) {
  $("answer").className = `card answer ${result.region}`;
  $("headline").textContent = headline(result);
  $("reason").textContent = result.explanation;
  $("text").textContent = refusal === null ? content || "(an empty answer)" : `Withheld. The client reads: “${refusal}”`;
  $("text").classList.toggle("withheld", refusal !== null);
  $("measures").replaceChildren(...(result.rule ? gates(result) : []), ...(result.activation === null ? [] : measures(result)));
  if (bundle.takes_feedback && refusal === null) offerFeedback(id);
  plane.show(result, result.alpha);
  $("exemplars").hidden = result.exemplars.length === 0;
  $("exemplar-list").replaceChildren(...result.exemplars.map(exemplar));
}

function offerFeedback(id) {
  const buttons = [$("feedback-right"), $("feedback-wrong")];
  const send = async (correct) => {
    buttons.forEach((button) => (button.hidden = true));
    try {
      await sendFeedback(id, correct);
      $("feedback-words").textContent = `Thank you: noted as ${correct ? "right" : "wrong"}.`;
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      $("feedback-words").textContent = error.message;
    }
  };
  $("feedback").hidden = false;
  $("feedback-words").textContent = "Was this answer right?";
  buttons.forEach((button) => (button.hidden = false));
  buttons[0].onclick = () => send(true);
  buttons[1].onclick = () => send(false);
}

function gates({ rule }) {
  const needed = rule.score_min === null ? "nothing is certified at this accuracy" : `${rule.score_min.toFixed(2)} is needed`;
  const prompt = measure("Prompt", "p", rule.prompt_p_value.toFixed(3),
    `${rule.prompt_known ? "known" : "not known"}: the share of calibrated prompts that lie as far out`);
  return rule.score === null ? [prompt] : [
    prompt,
    measure("Score", "S", rule.score.toFixed(2), needed),
    measure("Right with", null, probability(rule.probability), "calibrated probability that the answer is right"),
  ];
}

function measures(result) {
  const sizes = result.effective_sample_size.map((n, c) => `${n} of “${bundle.class_names[c]}”`).join(", ");
  return [
    measure("Similarity", "q", result.similarity, "calibrated answers of the same verdict that are nearer than the first other one"),
    measure("Distance quantile", "d", result.distance_quantile.toFixed(3), "1 is as near as any calibration answer, 0 farther off than all"),
    measure("Magnitude", null, result.magnitude.toFixed(2), "how far the verdict’s logit leads"),
    measure("Probability", "SDM(z′)", probability(result.activation), `that “${bundle.class_names[result.prediction]}”${discounted(result)}`),
    measure("Rescaled similarity", "q′", result.rescaled_similarity.toFixed(1), "q, discounted by the probability"),
    measure("Sample size", null, Math.min(...result.effective_sample_size), `calibration answers with a smaller q′: ${sizes}`),
  ];
}

// The probability at the lower end of its band, where that reads otherwise.
function discounted(result) {
  const [text, lower] = [result.activation, result.probability_lower].map(probability);
  return text === lower ? "" : `; counted as ${lower}`;
}

function measure(name, symbol, value, meaning) {
  const title = element("dt", {}, name, ...(symbol ? [" ", element("span", { class: "symbol" }, symbol)] : []));
  return element("div", {}, title, element("dd", { class: "value" }, String(value)),
    element("dd", { class: "meaning" }, meaning));
}

function exemplar(one) {
  const right = one.label === one.prediction;
  const label = bundle.class_names[one.label] ?? "unlabelled";
  const retry = element("button", { type: "button", class: "link" }, "ask this");
  retry.addEventListener("click", () => fill(one.prompt));
  return element("li", { class: "card" },
    element("p", { class: "at" }, element("span", {}, `distance ${one.distance.toFixed(2)}`), retry),
    element("p", { class: "said" }, one.prompt), element("p", { class: "said" }, one.response),
    element("p", { class: "hint" }, element("span", { class: one.label === 1 ? "tag" : "tag wrong" }, label),
      right ? ", and judged so" : `, though judged “${bundle.class_names[one.prediction]}”`));
}

$("question").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) submit();
});
$("alpha").addEventListener("change", () => plane?.show(plane.result, Number($("alpha").value)));
keyDialog(start);
start();
