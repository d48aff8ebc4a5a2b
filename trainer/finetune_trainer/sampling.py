"""Which samples each step takes: a pure function of seed and step, the same for every number of workers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from finetune_api.job import Training

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Order:
    """The order of a run's samples.

    Sample t is position t mod `sequences` of the permutation of epoch t div `sequences`; step k takes samples
    [k·batch, (k+1)·batch) as far as there are any.
    """

    sequences: int  # in the training split
    batch: int  # sequences in a global batch
    samples: int  # in the whole run
    seed: int

    @property
    def steps(self) -> int:
        """Optimizer steps in the run; the last may be over fewer samples."""
        return math.ceil(self.samples / self.batch)

    def epoch(self, step: int) -> float:
        """Passes over the rows after `step` finished steps."""
        return min(step * self.batch, self.samples) / self.sequences

    def positions(self, step: int) -> Positions:
        """Positions in the training split of the global batch that follows `step` finished steps."""
        samples = range(step * self.batch, min((step + 1) * self.batch, self.samples))
        epochs = (divmod(t, self.sequences) for t in samples)
        return np.fromiter(
            (permutation(self.seed, epoch, self.sequences)[i] for epoch, i in epochs), np.int64, len(samples)
        )


def order(training: Training, sequences: int, sequence_length: int) -> Order:
    """The order of a run over `sequences` packed sequences of at most `sequence_length` tokens.

    Ends after `epochs` or `max_steps`, whichever comes first; one epoch when neither is given.
    """
    batch = batch_sequences(training, sequence_length)
    epochs = training.epochs if training.epochs is not None else (1.0 if training.max_steps is None else math.inf)
    samples = training.max_steps * batch if training.max_steps is not None else math.inf
    if epochs != math.inf:
        samples = min(samples, max(1, round(epochs * sequences)))
    return Order(sequences, batch, int(samples), training.seed)


def batch_sequences(training: Training, sequence_length: int) -> int:
    """Sequences in a global batch: as given, or as many whole ones as `tokens_per_batch` holds (at least one)."""
    if training.sequences_per_batch is not None:
        return training.sequences_per_batch
    if training.tokens_per_batch is not None:
        return max(1, training.tokens_per_batch // sequence_length)
    return 16


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, n: int) -> Positions:
    """A permutation of range(n) drawn from Philox(seed, epoch).

    Sorts the bit generator's raw output, which NumPy keeps the same over its versions (unlike
    `Generator.permutation`).
    """
    raw = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(n)
    positions: Positions = np.argsort(raw, kind="stable").astype(np.int64)
    return positions
