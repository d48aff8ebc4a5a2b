"""A jump of the loss is told once; noise and a falling curve are none."""

from __future__ import annotations

import numpy as np
import pytest

from finetune_trainer.spikes import FEWEST, SpikeDetector

# Of a run of examples/01-quickstart: few tokens a step, so it wobbles as much as losses do.
QUICKSTART = [
    3.149, 2.26, 2.104, 2.506, 1.548, 1.999, 2.332, 2.537, 2.482, 1.348, 1.475, 1.818, 1.539, 1.562, 1.424, 1.621,
    1.567, 1.84, 1.902, 1.32, 1.911, 1.787, 0.809, 1.374, 1.433, 1.539, 1.492, 1.326, 1.307, 1.008, 1.415, 1.459,
    0.877, 1.24, 0.682, 1.389, 1.142, 0.836, 1.378, 1.849, 0.721, 0.929, 0.8, 1.141, 0.812, 1.172, 1.163, 0.647,
    1.554, 1.337, 0.947, 0.8, 0.978, 0.979, 0.773, 0.751, 0.667, 0.997, 0.948, 1.023, 0.877, 0.58, 1.031, 1.232,
    1.241, 0.759, 0.651, 0.564, 0.683, 1.224, 1.051, 0.901, 0.993, 0.846, 1.291, 1.074,
]  # fmt: skip


def found(losses: list[float]) -> list[int]:
    """Steps, from 0, at which a spike starts."""
    detector = SpikeDetector()
    return [step for step, loss in enumerate(losses) if detector.expected(loss) is not None]


def test_the_quickstarts_curve_has_no_spike() -> None:
    assert found(QUICKSTART) == []


@pytest.mark.parametrize("seed", range(5))
def test_noise_on_a_falling_curve_is_no_spike(seed: int) -> None:
    noise = np.random.default_rng(seed).normal(1.0, 0.1, 2000)
    assert found([float((1 + 2 / (1 + step / 100)) * noise[step]) for step in range(2000)]) == []


def test_a_spike_is_told_at_its_first_step_with_its_sequences() -> None:
    detector = SpikeDetector()
    losses = [2.0 + 0.01 * (step % 3) for step in range(40)] + [4.0, 5.0, 2.0]
    events = [detector.event(step, loss, np.arange(step, step + 20)) for step, loss in enumerate(losses)]
    told = [event for event in events if event is not None]
    assert [event["step"] for event in told] == [40]
    assert told[0]["loss"] == 4.0
    assert told[0]["expected"] == pytest.approx(2.01)
    assert told[0]["sequences"] == list(range(40, 56))


def test_a_spike_does_not_hide_the_next_one() -> None:
    losses = [2.0] * 30
    losses[20] = losses[25] = 9.0
    assert found(losses) == [20, 25]


def test_a_loss_that_never_moves_may_move_a_little() -> None:
    assert found([1e-4] * 30 + [1.2e-4]) == []


def test_nothing_is_said_of_the_first_steps() -> None:
    assert found([2.0] * (FEWEST - 1) + [50.0]) == []
    assert found([2.0] * FEWEST + [50.0]) == [FEWEST]
