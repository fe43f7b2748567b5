"""The training loop: steps, and between them validation, records and checkpoints."""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from effseg.common.device import trim_freed_memory
from effseg.data.cache import WholeCase
from effseg.data.intensities import drawn
from effseg.errors import InputError
from effseg.inference import segment_prepared
from effseg.models.base import SegmentationModel
from effseg.models.effsegnet import EffSegNet
from effseg.models.registry import build_model, load
from effseg.parallel import rows
from effseg.training.average import WeightAverage
from effseg.training.batches import Batches, margin_of
from effseg.training.best import best_so_far
from effseg.training.checkpoint import Checkpoints, load_checkpoint, writing
from effseg.training.checks import check_batch_norm, check_global_batch
from effseg.training.config import FREE_ON_RESUME, TrainingConfig
from effseg.training.data import TrainingData, load_training_data
from effseg.training.display import Display, duration, peak_memory
from effseg.training.distributed import World, join_world
from effseg.training.folder import open_run, read_config, remove_run, write_config
from effseg.training.initial import check_same_weights, describe_file, initial_weights, take_weights
from effseg.training.lock import locked
from effseg.training.optimizer import Stepper, uses_bf16
from effseg.training.records import Records, mean_dice, read_rows
from effseg.training.result import TrainingResult
from effseg.training.runs import RunRecord, renamed
from effseg.training.sampling import Sampler
from effseg.training.state import RunState
from effseg.training.validation import validate


def train(
    config: TrainingConfig, *, overwrite: bool = False, console: Console | None = None
) -> TrainingResult:
    """Train a network, or continue the run in ``config.output``, and return what came of it.

    overwrite: begin anew where the folder holds a run. console: where to print; None prints nothing.
    Under torchrun every process calls this with the same arguments.
    Raises InputError for a configuration, data or run folder that cannot be used, and for a diverged run.
    """
    with join_world(config.device, config.split_volume) as world:
        say = _printer(console if world.is_main else None)
        with locked(config.output, world, say):
            world.on_main(lambda: open_run(config, overwrite))
            return _Run(config, world, console if world.is_main else None, overwrite).go()


class _Run:
    def __init__(
        self, config: TrainingConfig, world: World, console: Console | None, overwrite: bool
    ) -> None:
        self.config, self.world, self.console = config, world, console
        self._say = _printer(console)
        self.data = load_training_data(config, world, self._say, anew=overwrite)
        torch.manual_seed(config.seed)
        self.model = _network(config, self.data, world.device)
        check_batch_norm(self.model, self.data, config)
        self.model.to(world.device)
        self.sampler = Sampler(
            len(self.data.training), config.seed, config.batch_size, world.volumes.rank, world.volumes.size
        )
        if self.data.resumed is not None:
            before = world.from_main(lambda: read_config(config.output))
            check_global_batch(self.data.resumed.global_batch, before, config, self.sampler, self.model)
        self.steps = self.sampler.steps(config.epochs) if config.epochs else config.steps
        self.checkpoints = Checkpoints(config.output / "checkpoints")
        newest = None if overwrite else world.from_main(self._newest_checkpoint)
        self.record = self._begin(newest)
        self.stepper = Stepper(self.model, config, self.steps, world, self._loss_options())
        self.average = WeightAverage(self.model, config.ema) if config.ema else None
        self.state = self._restore(newest)
        if not overwrite:
            self._restore_best()
        if world.is_main:
            if overwrite:  # not before, or a mistake in the data would cost the earlier run
                remove_run(config.output)
            self._write_down()

    def go(self) -> TrainingResult:
        first = self.state.step
        display = Display(self.console, self.steps, first, self.world.device)
        spent = 0.0
        if first < self.steps:
            records = Records(self.config.output, self.data.organs, first) if self.world.is_main else None
            try:
                with display:
                    self._announce(display)
                    spent = self._steps(display, records)
            finally:
                if records is not None:
                    records.close()
        if self.world.is_main:
            with self._averaged():
                self._save(self.config.output / "final.safetensors", self.state.last_dice)
        self.world.barrier()
        display.say(f"{self.steps} steps done in {duration(self.state.seconds)}: {self.config.output}")
        return self._result((self.steps - first) / spent if spent else math.nan)

    def _steps(self, display: Display, records: Records | None) -> float:
        """All steps that are left; returns the seconds that they took without validation."""
        config, state, device = self.config, self.state, self.world.device
        batches = Batches(
            self.data.training,
            self.sampler,
            self.data.preprocessing.normalise,
            self.data.augment,
            config.patch_size,
            pin=device.type == "cuda",
            augment_on=device if config.augments_on(device) else None,
            own_rows=self._own_rows if config.split_volume > 1 else None,
            patch_margin=margin_of(config.augment_strength),
        )
        ahead = batches.ahead(state.step, self.steps, config.workers)
        spent, before = 0.0, state.seconds
        started = step_started = time.monotonic()
        processor_started = time.process_time()
        self.model.train()
        for step, (image, labels) in enumerate(ahead, start=state.step):
            image, labels = image.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            done = self.stepper(step, image, labels, state)
            if self.average is not None:
                self.average.update(step)
            spent += time.monotonic() - step_started
            state.processor_seconds += time.process_time() - processor_started
            epoch = self.sampler.epoch(step) + 1
            display.step(step + 1, epoch, done.loss)
            if done.skipped:
                what = "gradient" if not math.isfinite(done.gradient_norm) else "running statistics"
                display.say(f"step {step + 1}: {what} not finite, step skipped ({state.skipped} so far)")
            dice = None
            if self.data.validation and self._due(step, config.validation_interval):
                dice = self._validate(display)
            state.seconds = before + time.monotonic() - started
            if records is not None:
                records.add(
                    step + 1, epoch, state.seconds, done.learning_rate, done.loss, done.gradient_norm, dice
                )
                if dice is not None:
                    self._draw_curves()
                if self._due(step, config.checkpoint_interval):
                    records.flush()
                    self._checkpoint()
            if device.type == "cpu":
                trim_freed_memory()
            step_started, processor_started = time.monotonic(), time.process_time()
        return spent

    def _due(self, step: int, interval: int) -> bool:
        return (step + 1) % interval == 0 or step + 1 == self.steps

    def _validate(self, display: Display) -> list[float]:
        state, labels = self.state, self.data.label_map
        if self.world.several:  # batch norm's statistics: all processes validate the first one's
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, 0)
        with self._averaged():
            dice = validate(
                self.data.validation,
                self._segment,
                labels.num_classes,
                self.data.ignore,
                self.world.volumes,
                self._overlay,
            )
            if self._rank(dice) > (self._rank(state.best_dice) if state.best_dice else -1.0):
                state.best_step, state.best_dice = state.step, dice
                if self.world.is_main:
                    self._save(self.config.output / "best.safetensors", dice)
        state.last_dice = dice
        display.validation(state.step, self.data.organs, dice)
        return dice

    def _rank(self, dice: list[float]) -> float:
        """By what the networks of this run compare: one organ that no case shows has no Dice until a voxel is
        taken for it, and 0 from then on, which would outweigh what the others have learnt."""
        shown = self.data.validated
        return mean_dice([value for value, known in zip(dice, shown, strict=True) if known])

    def _segment(self, case: WholeCase) -> np.ndarray:
        bf16, patch_size = uses_bf16(self.config, self.world.device), self.config.patch_size
        with self.world.splitting():
            return segment_prepared(
                self.model, self.data.preprocessing, case.prepared, bf16=bf16, patch_size=patch_size
            )

    def _own_rows(self, total: int) -> slice:
        """In a thread that prepares batches, too."""
        assert self.world.mesh is not None
        return rows((total, 0, 0), self.world.mesh)

    def _overlay(self, case: WholeCase, prediction: np.ndarray) -> None:
        if self.world.share_of_volume:
            return
        from effseg.figures import draw_overlay

        preprocessing = self.data.preprocessing
        reference = preprocessing.prepare_labels(np.asarray(case.labels), case.prepared)
        draw_overlay(
            np.asarray(case.image[0]),
            preprocessing.prepare_labels(prediction, case.prepared),
            self.data.label_map.names,
            self.config.output / "overlays" / f"step-{self.state.step:08d}_{case.name}.png",
            reference=np.where(reference == self.data.ignore, 0, reference),
            spacing=case.spacing,
            window=drawn(preprocessing.windows(self.data.channels)[0], case.image[0]),
        )

    def _draw_curves(self) -> None:
        from effseg.figures import draw_curves

        draw_curves(self.config.output / "progress.csv", self.config.output / "curves.png")

    def _checkpoint(self) -> None:
        state: dict[str, Any] = {
            "optimizer": self.stepper.optimizer.state_dict(),
            "run": self.state.to_dict(),
            "average": self.average.state() if self.average is not None else None,
        }
        self.checkpoints.save(self.state.step, self.model, state, self._extra(self.state.last_dice))

    def _newest_checkpoint(self) -> Path | None:
        self.checkpoints.clean()
        return self.checkpoints.newest()

    def _begin(self, newest: Path | None) -> RunRecord:
        """Put the weights to begin with into the model, unless it is further on; returns the run's record."""
        given, resumed = self.config.init, self.data.resumed
        batch = self.sampler.global_batch
        record = replace(self.data.record, label_map=self.data.label_map, global_batch=batch)
        if resumed is not None and given is not None:
            self.world.on_main(lambda: check_same_weights(given, resumed.init, self.config.output))
        if newest is not None:
            return record
        if record.init is not None:  # begun, and stopped before its first checkpoint
            file = Path(record.init["path"])
            if not file.is_file() or describe_file(file) != record.init:
                raise InputError(f"{file}: the weights with which this run began are gone or have changed")
        elif given is not None:
            file = initial_weights(given)
            record = replace(record, init=describe_file(file))
        else:
            return record
        self._say(take_weights(self.model, file, self.data.label_map.names))
        return record

    def _restore(self, newest: Path | None) -> RunState:
        if newest is None:
            return RunState()
        saved = load_checkpoint(newest, self.model)
        self.stepper.optimizer.load_state_dict(saved["optimizer"])
        if self.average is not None:
            self.average.load_state(saved["average"])
        return RunState.from_dict(saved["run"])

    def _restore_best(self) -> None:
        """What best.safetensors is, which may be of steps after the last checkpoint, lost by a kill."""
        state, organs = self.state, len(self.data.organs)
        step, dice = self.world.from_main(lambda: best_so_far(self.config.output, organs))
        if step > state.step:
            mean = mean_dice(dice)
            self._say(f"best.safetensors, of step {step} after the last checkpoint, stays: Dice {mean:.3f}")
        state.best_step, state.best_dice = step, dice

    def _write_down(self) -> None:
        """The run's record, then its configuration: from then on the folder is this run's."""
        resumed, names = self.data.resumed, {}
        if resumed is not None:
            names = renamed(resumed, self.data.label_map)
        for before, now in names.items():
            self._say(f"{before} is called {now} now")
        best = self.config.output / "best.safetensors"
        if names and best.is_file():  # it may stay the best one
            model = load(best)
            with writing(best):
                model.save(best, extra=model.extra | self._extra(self.state.best_dice, self.state.best_step))
        self.record.write(self.config.output)
        write_config(self.config)

    def _save(self, path: Path, dice: list[float]) -> None:
        with writing(path):
            self.model.save(path, extra=self._extra(dice))

    def _extra(self, dice: list[float], step: int | None = None) -> dict[str, Any]:
        return {
            "preprocessing": self.data.preprocessing.to_dict(),
            "labels": self.data.label_map.to_dict(),
            # without the folders and the device of one machine: weights travel
            "training": {k: v for k, v in self.config.to_dict().items() if k not in (*FREE_ON_RESUME, "init")}
            | {
                "step": self.state.step if step is None else step,
                "dice": {
                    organ: None if math.isnan(value) else value
                    for organ, value in zip(self.data.organs, dice, strict=False)
                },
            },
        }

    def _averaged(self) -> AbstractContextManager[None]:
        return nullcontext() if self.average is None else self.average.applied()

    def _loss_options(self) -> dict[str, Any]:
        config = self.config
        weights = self.data.class_weights if config.class_weights == "sqrt" else None
        return {
            "class_weights": None if weights is None else weights.to(self.world.device),
            "ignore_index": self.data.ignore,
            "include_background": config.include_background,
            "batch_dice": config.batch_dice,
            "label_smoothing": config.label_smoothing,
            "dice_weight": config.dice_weight,
            "ce_weight": config.ce_weight,
        }

    def _announce(self, display: Display) -> None:
        data, state = self.data, self.state
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        dtype = "bf16" if uses_bf16(self.config, self.world.device) else "fp32"
        display.say(
            f"{self.config.model}: {parameters / 1e6:.2f} M parameters, {len(data.organs)} organs, "
            f"{dtype} on {self.world.size} x {self.world.device.type}; {len(data.training)} training and "
            f"{len(data.validation)} validation cases; {self.steps} steps"
        )
        for organ in data.absent_organs:
            display.say(f"no training case shows {organ}: it cannot be learnt")
        if state.step:
            display.say(f"continues after step {state.step}")

    def _result(self, steps_per_second: float) -> TrainingResult:
        state, folder, organs = self.state, self.config.output, self.data.organs
        return TrainingResult(
            final=folder / "final.safetensors",
            best=folder / "best.safetensors" if state.best_step else None,
            best_step=state.best_step,
            best_dice=dict(zip(organs, state.best_dice, strict=False)),
            final_dice=dict(zip(organs, state.last_dice, strict=False)),
            losses=[float(row["loss"]) for row in read_rows(folder / "progress.csv")],
            steps_per_second=steps_per_second,
            processor_seconds=state.processor_seconds,
            peak_memory=peak_memory(self.world.device),
            skipped=state.skipped,
        )


def _printer(console: Console | None) -> Callable[[str], None]:
    def say(text: str) -> None:
        if console is not None:
            console.print(text, markup=False, highlight=False, soft_wrap=True)

    return say


def _network(config: TrainingConfig, data: TrainingData, device: torch.device) -> SegmentationModel:
    channels, classes = data.channels, data.label_map.num_classes
    if not config.model.startswith("effseg-"):
        return build_model(config.model, channels, classes)
    memory = config.memory
    if memory == "auto" and config.memory_budget is None and device.type == "cpu":
        memory = "stream" if config.offload else "raw"  # a CPU's memory is not one program's
    return EffSegNet(
        channels,
        classes,
        preset=config.model.removeprefix("effseg-"),
        norm=config.norm,
        memory=memory,
        memory_budget=config.memory_budget,
        recompute=config.recompute,
        offload=config.offload,
    )
