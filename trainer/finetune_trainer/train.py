"""The training loop: the same under Ray, under torchrun, and as one plain process.

python -m finetune_trainer.train work/run.json
torchrun --nproc-per-node 8 -m finetune_trainer.train work/run.json
"""

from __future__ import annotations

import math
import os
import platform
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist

from finetune_api.errors import FinetuneError, GpuMemoryFull, Interrupted, NotFinite
from finetune_api.run import CHECKPOINTS, EXPORT, METRICS_FILE, PREPARED, RunConfig
from finetune_trainer import faults, flops, references, sampling
from finetune_trainer.batches import MicroBatch, micro_batch_count, micro_batches
from finetune_trainer.checkpoint import CheckpointStore
from finetune_trainer.clock import StepClock
from finetune_trainer.dataset import PackedDataset
from finetune_trainer.distributed import World, join_world, leave, wait_for_collectives
from finetune_trainer.engine import build_engine, optimizer_step, set_learning_rate
from finetune_trainer.export import export
from finetune_trainer.manifest import read_manifest
from finetune_trainer.objective import Objective
from finetune_trainer.pulse import Alone, current_pulse, watched
from finetune_trainer.reporter import MetricsFile, Reporter
from finetune_trainer.schedule import learning_rate
from finetune_trainer.spikes import MOST_SEQUENCES, SpikeDetector
from finetune_trainer.storage import Location, resolve
from finetune_trainer.watch import collective_timeout, hang_limit

_DEFAULT_CHECKPOINT_MINUTES = 10.0
_SKIPS = 50  # steps in a row that float16's loss scale may take to settle


@dataclass(frozen=True)
class Outcome:
    """How a run ended, and after how many optimizer steps."""

    reason: Literal["complete", "interrupted"]
    step: int


def train(
    run: RunConfig,
    reporter: Reporter,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    remote: Location | None = None,
    upload_rate: float | None = None,
) -> Outcome:
    """Trains the run from its last good checkpoint, or from the start, then writes the export folder.

    Every worker calls it. Uses the process group that is there, torchrun's environment, or this process alone.

    Args:
        reporter: takes the run's events, on rank 0.
        should_stop: asked on every worker once a step; must be quick. True on one: write a checkpoint and leave.
        remote: the run's folder in object storage, where its checkpoints go; None: they stay in `run.work`, which
            every worker then shares.
        upload_rate: most bytes a second that this worker uploads; None: as many as it can.

    Raises:
        FinetuneError: the model, the data or the run itself; the same on every worker.
    """
    with faults.named(Path(run.work)):
        wait_for_collectives(collective_timeout(hang_limit(run.spec)))
        world = join_world(run.spec.deepspeed.sequence_parallel)
        loop = _Loop(run, reporter, world, remote, upload_rate)
        if not loop.find_references(should_stop):
            outcome = Outcome("interrupted", 0)
        else:
            loop.resume()
            outcome = loop.run(should_stop)
        if outcome.reason == "complete":
            loop.pulse.on("export")
            loop.report("export", step=outcome.step)
            export(loop.engine.module.model, run, Path(run.work) / EXPORT, world)
        loop.report("end", step=outcome.step, reason=outcome.reason)
        return outcome


@dataclass(frozen=True)
class _Asked:
    """What is to be done after a step, agreed by all workers."""

    stop: bool
    checkpoint: bool
    settled: bool  # every worker's part of the last checkpoint is stored


class _Loop:
    """One worker's state of a run: engine, data, and the number of finished steps."""

    def __init__(
        self,
        run: RunConfig,
        reporter: Reporter,
        world: World,
        remote: Location | None,
        upload_rate: float | None,
    ) -> None:
        prepared, training = Path(run.work) / PREPARED, run.spec.training
        manifest = read_manifest(prepared)
        self.run_config, self.spec, self.training = run, run.spec, training
        self.reporter, self.world, self.pulse = reporter, world, current_pulse()
        self.data = PackedDataset(prepared, "train")
        self.evaluation_data = PackedDataset(prepared, "evaluation")
        self.objective = Objective(run.spec)
        self.counts = self.objective.counts(self.data)
        self.order = sampling.order(training, len(self.data), manifest.sequence_length)
        self.accumulation = micro_batch_count(self.order.batch, shares=world.data_size, size=training.micro_batch)
        self.engine = build_engine(run.model_path, run.spec, world, self.accumulation)
        self.flops = flops.TrainingFlops(self.engine.module.model)
        self.peak_flops = flops.peak_flops(world.device, training.precision)
        self.clock = StepClock(world.device, self.pulse.on)
        self.checkpoints = CheckpointStore(
            self.engine,
            world,
            local=Path(run.work) / CHECKPOINTS,
            remote=remote and remote.inside(CHECKPOINTS),
            identity={"data": manifest.key, "seed": training.seed, "global batch": self.order.batch},
            keep=run.spec.checkpoint.keep,
            report=self.report,
            bytes_per_second=upload_rate,
        )
        work = remote or resolve(run.work, run.base_dir, where="work")
        self.references, self.data_key = work.inside(references.FILE), manifest.key
        self.step = self.saved_step = 0
        self.saved_time = time.monotonic()
        self.skipped = 0
        self.spikes = SpikeDetector()

    def report(self, event: str, **fields: object) -> None:
        if self.world.rank == 0:
            self.reporter.event({"event": event, "time": time.time(), **fields})

    def find_references(self, should_stop: Callable[[], bool]) -> bool:
        """What preferences are learned against, while the weights are still the base model's. A collective.

        Returns:
            Whether training can begin; False: it was asked to stop meanwhile.
        """
        if not self.objective.pairs:
            return True

        def asked() -> bool:
            self.pulse.on("references")
            return should_stop()

        return references.find(
            self.engine,
            {"train": self.data, "evaluation": self.evaluation_data},
            self.world,
            size=self.training.micro_batch,
            kept=self.references,
            key=f"{self.data_key} {self.spec.model.source} {self.training.precision}",
            report=self.report,
            should_stop=asked,
        )

    def resume(self) -> None:
        """Loads the newest good checkpoint, if there is any, and says where the run starts. A collective."""
        resumed = self.checkpoints.restore()
        self.step = self.saved_step = resumed or 0
        total, trained = flops.parameters(self.engine.module)
        self.report(
            "start",
            worldSize=self.world.size,
            device=torch.cuda.get_device_name() if self.world.device.type == "cuda" else "cpu",
            totalSteps=self.order.steps,
            sequences=len(self.data),
            parameters=total,
            trainableParameters=trained,
            resumedFromStep=resumed,
        )

    def run(self, should_stop: Callable[[], bool]) -> Outcome:
        """Trains to the last step, or until `should_stop`; a checkpoint is there at the end. A collective."""
        every = self.training.evaluate_every_steps
        if self.world.sums([should_stop()])[0]:
            return Outcome("interrupted", self.step)
        if self.step == 0:
            self.evaluate()
        while self.step < self.order.steps:
            try:
                asked = self.train_step(should_stop)
            except torch.OutOfMemoryError as error:
                raise self._out_of_memory() from error
            self.checkpoints.after_step(asked.settled)
            last = self.step == self.order.steps
            if last or (every and self.step % every == 0):
                self.evaluate()
            if last or asked.stop or asked.checkpoint:
                self.save()
            if asked.stop and not last:
                break
        self.pulse.on("last step")
        self.checkpoints.finish()
        return Outcome("complete" if self.step == self.order.steps else "interrupted", self.step)

    def train_step(self, should_stop: Callable[[], bool]) -> _Asked:
        """One optimizer step over a global batch, and its report. A collective.

        Raises:
            NotFinite: the loss or its gradient is not finite.
        """
        started = time.perf_counter()
        positions = self.order.positions(self.step)
        count = float(self.counts[positions].sum()) or 1.0  # 1 where nothing is learned: the loss is 0
        rate = learning_rate(self.step, self.order.steps, self.training)
        set_learning_rate(self.engine, rate)
        self._seed_dropout()
        self.engine.train()
        self.clock.start()
        sums = torch.zeros(1 + len(self.objective.figures), dtype=torch.float64, device=self.world.device)
        operations = 0.0
        for number, batch in enumerate(self._batches(self.data, positions, self.accumulation), 1):
            operations += self.flops.of(batch.lengths) * self.world.data_size / self.world.size
            self.clock.end("data")
            found = self.engine(batch).reshape(-1)
            sums += found.detach()
            self.clock.end("forward")
            # The engine takes the mean of the workers' gradients; the loss is over what all of them learn.
            self.engine.backward(found[0] * (self.world.size / count), scale_wrt_gas=False)
            self.clock.end("backward")
            if number < self.accumulation:
                self.engine.step()  # only counts the micro-batch: the update comes with the last one
        settled = self.checkpoints.settled()
        asked = [should_stop(), self._due(), settled]
        work, stop, due, through, *totals = self.world.sums([operations, *asked, *sums.tolist()])
        means = self.objective.means(totals, count)
        if not math.isfinite(means["loss"]):
            raise self._diverged("the loss", positions)
        norm = optimizer_step(self.engine)
        self.clock.end("optimizer")
        self._check_norm(norm, positions)
        self.step += 1
        self.pulse.step_done(self.step)
        parts = self.clock.seconds()
        seconds = time.perf_counter() - started
        tokens = int(self.data.lengths[positions].sum())
        self.report(
            "step",
            step=self.step,
            epoch=self.order.epoch(self.step),
            **means,
            learningRate=rate,
            gradNorm=norm if math.isfinite(norm) else None,
            tokens=tokens,
            targetTokens=float(self.data.targets[positions].sum()) or 1.0,
            seconds=seconds,
            parts=parts,
            tokensPerSecond=tokens / seconds,
            mfu=work / seconds / self.world.size / self.peak_flops if self.peak_flops else None,
            memoryBytes=_peak_memory(self.world.device),
        )
        if spike := self.spikes.event(self.step, means["loss"], positions):
            self.report("spike", **spike)
        return _Asked(stop=stop > 0, checkpoint=due > 0, settled=through == self.world.size)

    @torch.no_grad()
    def evaluate(self) -> None:
        """Reports the loss over the evaluation split, if there is one, as that of a step. A collective."""
        if not len(self.evaluation_data):
            return
        started = time.perf_counter()
        self.engine.eval()
        positions = np.arange(len(self.evaluation_data))
        count = micro_batch_count(len(positions), shares=self.world.data_size, size=self.training.micro_batch)
        sums = np.zeros(1 + len(self.objective.figures))
        for batch in self._batches(self.evaluation_data, positions, count):
            sums += np.array(self.engine(batch).reshape(-1).tolist())
            self.pulse.on("evaluation")
        self.report(
            "evaluation",
            step=self.step,
            **self.objective.means(self.world.sums(sums.tolist()), self.objective.counts(self.evaluation_data).sum()),
            tokens=float(self.evaluation_data.targets.sum()),
            seconds=time.perf_counter() - started,
        )

    def save(self) -> None:
        """Writes a checkpoint, which becomes complete while training goes on. A collective."""
        seconds = self.checkpoints.save(self.step)
        self.pulse.on("checkpoint")
        self.saved_step, self.saved_time = self.step, time.monotonic()
        self.report("checkpoint", step=self.step, seconds=seconds)

    def _batches(self, data: PackedDataset, positions: sampling.Positions, count: int) -> Iterator[MicroBatch]:
        return micro_batches(data, positions, self.world, size=self.training.micro_batch, count=count)

    def _seed_dropout(self) -> None:
        """Makes dropout a function of seed, step and rank, so that a restart needs no generator's state."""
        words = np.random.SeedSequence([self.training.seed, self.step, self.world.rank]).generate_state(1, np.uint64)
        torch.manual_seed(int(words[0]))

    def _due(self) -> bool:
        """Whether rank 0 wants a checkpoint after this step. While one is on its way the next one waits."""
        if self.world.rank or self.checkpoints.busy:
            return False
        wanted = self.spec.checkpoint
        minutes = wanted.every_minutes or (None if wanted.every_steps else _DEFAULT_CHECKPOINT_MINUTES)
        if wanted.every_steps and (self.step + 1) // wanted.every_steps > self.saved_step // wanted.every_steps:
            return True
        return minutes is not None and time.monotonic() - self.saved_time >= minutes * 60

    def _check_norm(self, norm: float, positions: sampling.Positions) -> None:
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
        # In float16 the engine skips such a step and lowers its loss scale.
        if self.skipped > (_SKIPS if self.training.precision == "fp16" else 0):
            raise self._diverged("the gradient", positions)

    def _out_of_memory(self) -> GpuMemoryFull:
        return GpuMemoryFull(
            f"the GPU's memory is full in step {self.step + 1}, at {_peak_memory(self.world.device) / 2**30:.1f} GiB",
            hint="lower training.microBatch or data.sequenceLength, set training.activationCheckpointing, use more "
            "workers with deepspeed.zeroStage 3, or deepspeed.offload",
        )

    def _diverged(self, what: str, positions: sampling.Positions) -> NotFinite:
        shown = ", ".join(str(p) for p in positions[:MOST_SEQUENCES])
        shown += " …" if len(positions) > MOST_SEQUENCES else ""
        return NotFinite(
            f"{what} of step {self.step + 1} is not finite; training sequences of its batch: {shown}",
            where=str(Path(self.run_config.work) / METRICS_FILE),
            hint="lower training.learningRate, raise warmup, or use bf16 or fp32; no checkpoint holds this step",
        )


def _peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: of the GPU's memory by torch, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(path: str) -> int:
    """Trains the run in a run.json under torchrun or in this process; the exit code."""
    run = RunConfig.model_validate_json(Path(path).read_text(encoding="utf-8"))
    stop = _stop_on_signals()
    rank, limit = int(os.environ.get("RANK", "0")), hang_limit(run.spec)
    try:
        with (
            MetricsFile(Path(run.work) / METRICS_FILE) as metrics,
            watched(Alone(rank, limit), rank, platform.node(), limit),
        ):
            outcome = train(run, metrics, should_stop=stop)
        if outcome.reason == "interrupted":
            raise Interrupted(
                f"stopped after step {outcome.step}; a checkpoint was written", hint="the same command goes on from it"
            )
    except FinetuneError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def _stop_on_signals() -> Callable[[], bool]:
    """A flag that the first SIGINT or SIGTERM sets; the second one ends the process at once."""
    received = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    return lambda: bool(received)


if __name__ == "__main__":
    leave(main(sys.argv[1]))
