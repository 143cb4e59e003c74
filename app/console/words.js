// What a verdict means, in words, and how numbers are written.

export const percent = (share, digits = 0) => `${(100 * share).toFixed(digits)} %`;

// A probability with as many nines as it has, for 0.9999 and 1 are told apart by what they risk.
export function probability(p) {
  if (p > 1 - 1e-6) return "> 0.999999";
  const digits = Math.max(3, Math.min(6, Math.ceil(-Math.log10(1 - p)) + 1));
  return p.toFixed(digits);
}

export const REGIONS = {
  high: "In the region",
  low: "Not reliable enough",
  ood: "Out of distribution",
  unavailable: "Could not be checked",
};

export const REASONS = {
  out_of_distribution: "nothing like it was calibrated",
  below_similarity_threshold: "too few similar answers agree",
  below_class_threshold: "similar answers agree, but it is not probable enough",
  predicted_not_following: "reliably judged wrong",
  not_certified: "in the region, but not certified",
  no_region_at_alpha: "no region at this accuracy",
  uncalibrated_request: "asked in another way than calibrated",
  scoring_unavailable: "its score could not be had",
  none: "answered",
};

export function headline(result) {
  if (result.reason === "not_certified") return "Reliable, but not certified";
  if (result.region === "high") return result.abstained ? "Reliably judged wrong" : "Reliable";
  return { low: "Not reliable enough", ood: "Unlike what was calibrated", unavailable: "Could not be checked" }[result.region];
}

const certified = ({ certificate: one }) =>
  one ? ` Certified: of such answers at least ${percent(one.accuracy, 1)} are right, with ${percent(one.confidence, 1)} confidence.` : "";

// region: the bundle's at the result's alpha.
export function reason(result, region, classNames) {
  const asked = percent(result.alpha);
  const verdict = classNames[result.prediction] ?? "";
  const threshold = region?.rescaled_similarity_threshold;
  switch (result.reason) {
    case null:
    case "predicted_not_following":
      return `It lies in the region that was calibrated for ${asked} accuracy, and the verdict is: ${verdict}.${certified(result)}`;
    case "not_certified":
      return `It lies in the region that was calibrated for ${asked} accuracy, but no certificate covers it.`;
    case "out_of_distribution":
      return result.distance_quantile === 0
        ? "It lies farther from everything calibrated than any calibration answer does."
        : "The labelled answers nearest to it do not support its verdict.";
    case "below_similarity_threshold":
      return `Too few calibrated answers like it agree: for ${asked} accuracy, q′ has to reach ${threshold?.toFixed(1)}.`;
    case "below_class_threshold":
      return `Enough calibrated answers agree, but it is not as probable as ${asked} accuracy asks of this verdict.`;
    case "no_region_at_alpha":
      return `Calibration found no region with ${asked} accuracy, so nothing is called reliable there.`;
    case "uncalibrated_request":
      return "It was asked for, or ended, in another way than was calibrated, so nothing is promised of it.";
    case "scoring_unavailable":
      return "Its score could not be had, so nothing is known of it. The server's log says why.";
    default:
      return result.reason;
  }
}
