"""Calibrates on known answers, then shows only those that can be relied on."""

import numpy
from engine.checks import same_number
from engine.desk import ask

import candor


def labelled(count: int, seed: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    responses, references, states = ask(count, seed)
    return states, numpy.array([same_number(*pair) for pair in zip(responses, references, strict=True)])


def main() -> None:
    states, right = labelled(800, seed=0)
    calibrated = candor.calibrate(
        states, right, alphas=0.9, certify=0.9, rounds=2, epochs=10, exemplar_dim=8, learning_rate=0.03
    )
    print(calibrated)
    states, right = labelled(400, seed=1)
    shown = ~candor.judge(calibrated, states, alpha=0.9).abstained
    print(
        f"of {len(right)} new answers {right.sum()} are right; shown {shown.sum()}, right {right[shown].sum()}"
    )


if __name__ == "__main__":
    main()
