// What a verdict means, in words, and how numbers are written.

export const percent = (share, digits = 0) => `${(100 * share).toFixed(digits)} %`;

// A probability with as many nines as it has, for 0.9999 and 1 are told apart by what they risk.
export function probability(p) {
  if (p > 1 - 1e-6) return "> 0.999999";
  const digits = Math.max(3, Math.min(6, Math.ceil(-Math.log10(1 - p)) + 1));
  return p.toFixed(digits);
}

export const REGIONS = {
  high: "Let through, or surely judged",
  low: "Not reliable enough",
  ood: "Out of distribution",
  unavailable: "Could not be checked",
};

export const REASONS = {
  out_of_distribution: "unlike what was calibrated",
  unpromising_prompt: "hardly any answer's score would be high enough",
  below_score_threshold: "its score is too low",
  no_certificate_at_alpha: "nothing is certified at this accuracy",
  below_similarity_threshold: "too few similar answers agree",
  below_class_threshold: "similar answers agree, but it is not probable enough",
  predicted_not_following: "reliably judged wrong",
  not_certified: "in the region, but not certified",
  certificate_suspended: "audits speak against its certificate",
  no_region_at_alpha: "no region at this accuracy",
  uncalibrated_request: "asked in another way than calibrated",
  scoring_unavailable: "its score could not be had",
  none: "answered",
};

export function headline(result) {
  if (result.reason === "not_certified") return "Reliable, but not certified";
  if (result.reason === "certificate_suspended") return "Reliable once, and not shown to be now";
  if (result.region === "high") return result.abstained ? "Reliably judged wrong" : "Reliable";
  return { low: "Not reliable enough", ood: "Unlike what was calibrated", unavailable: "Could not be checked" }[result.region];
}
