"""What was calibrated is what is served: each rule of that promise, written once.

    conversation   which conversations are put to the model, and as what
    policy         how answers are drawn, and which answers are complete
    certificate    what was shown of the answers let through
    decision       from an estimate to a verdict, for one row or many
    judging        measured rows, judged: estimate, decision and verdicts together

Calibration, serving, self-test and fine-tuning all go through here (`pyproject.toml`, import contract), so none of
them can do otherwise than the others. A rule that a request or record breaks comes back as a sentence; None means
that it keeps to the policy.
"""
