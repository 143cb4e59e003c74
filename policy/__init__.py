"""The calibrated policy: these rules make served answers the same kind as calibrated ones. Each is written once.

    conversation   which conversations are put to the model, and in what form
    policy         how answers are drawn, and which answers are complete
    certificate    the certified accuracy of the answers let through
    decision       from an estimate to a verdict, for one row or many
    judging        judges measured rows: estimate, decision and verdicts together
    words          a verdict in a sentence
    monitor        how a certificate stands after audited answers
    drift          whether prompts still are as the calibration's were, without labels

Calibration, serving, self-test and fine-tuning all use this package (`pyproject.toml`, import contract), so they
cannot differ. A check returns a sentence that names the broken rule; None means that the request or record keeps to
the policy.
"""
