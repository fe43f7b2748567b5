"""EffSegNet on whole volumes, inside nnU-Net: its preprocessing, folds, checkpoints and evaluation."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from nnunetv2.configuration import ANISO_THRESHOLD, default_num_processes
from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch import Tensor, nn

from effseg.errors import InputError
from effseg.models.effsegnet import MEMORY_MODES
from effseg.nnunet import options
from effseg.nnunet.cases import PreprocessedCase, augmentation_of, batches, count_voxels
from effseg.nnunet.network import WholeVolumeNet
from effseg.nnunet.predictor import Predictor
from effseg.training.data import class_weights
from effseg.training.sampling import Sampler
from effseg.training.schedule import learning_rate
from effseg.training.statistics import RunningStatistics

MOST_WORKERS = 4  # a whole volume is being augmented in each
CLIP_NORM = 5.0


class nnUNetTrainerEffSegFull(nnUNetTrainer):
    """An EffSegNet that sees every case as a whole, in training, validation and prediction.

    EFFSEG_MEMORY is "raw", "stream" or "auto" (default with a GPU), see `effseg.EffSegNet`. A subclass may
    set `preset`. EFFSEG_MIRROR and EFFSEG_MIRROR_PAIRS are `--mirror` and `--mirror-pairs` of `effseg train`;
    dataset.json may have `mirror_pairs`. AdamW, warm-up and cosine, 1/sqrt(frequency) weights in the
    cross-entropy and augmentation are those of `effseg train`. The default length, 200 epochs of 50 volumes,
    shows a network about as many voxels of 512 x 512 x 300 scans as nnU-Net's 1000 epochs do.
    Takes labels, not regions, and no cascade. Predict with `effseg nnunet predict`: nnU-Net's own predictor
    would give the network windows.
    """

    preset = "base"

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008  nnU-Net compares signatures
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.enable_deep_supervision = False
        self.initial_lr, self.weight_decay = 4e-3, 1e-4
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 200, 50, 5
        self.save_every = 10
        self.grad_scaler = None  # bf16 needs none
        self.loss_options: dict[str, Any] = {}
        self.told_memory = ""
        options.set_length(self)
        self._check()

    def _check(self) -> None:
        name = type(self).__name__
        if self.label_manager.has_regions:
            raise InputError(
                f"{name}: expected labels, dataset.json has regions; nnUNetTrainerEffSeg takes them"
            )
        if self.is_cascaded or len(self.configuration_manager.patch_size) != 3:
            raise InputError(f"{name}: expected 3d_fullres or 3d_lowres, got {self.configuration_name}")

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = False,
    ) -> nn.Module:
        spacing = configuration_manager.spacing
        thick = max(spacing) / min(spacing) > ANISO_THRESHOLD
        return WholeVolumeNet(
            num_input_channels,
            num_output_channels,
            preset=cls.preset,
            thick_axis=int(np.argmax(spacing)) if thick else None,
            **options.memory(MEMORY_MODES, "auto" if torch.cuda.is_available() else "raw"),
        )

    def _do_i_compile(self) -> bool:
        return False

    def _set_batch_size_and_oversample(self) -> None:
        self.batch_size = 1  # of every process: volumes differ in size

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        pass

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, "_Schedule"]:
        optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=self.initial_lr, weight_decay=self.weight_decay
        )
        return optimizer, _Schedule(optimizer, self.num_epochs)

    def _build_loss(self) -> None:
        """The network's own; its options are known when the training cases are."""

    def get_dataloaders(self) -> tuple[Any, Any]:
        names = self.do_split()
        training, validation = map(self._cases, names)
        self.loss_options = self._loss_options(training)
        mirror = options.mirror(self.label_manager, self.dataset_json)
        augment = augmentation_of(mirror, self.plans_manager.transpose_forward)
        return (
            self._batches(training, augment, self.num_iterations_per_epoch),
            self._batches(validation, None, self.num_val_iterations_per_epoch),
        )

    def _cases(self, names: list[str]) -> list[PreprocessedCase]:
        self.dataset_class = infer_dataset_class(self.preprocessed_dataset_folder)
        dataset = self.dataset_class(self.preprocessed_dataset_folder, names)
        d, h, w = map(float, self.configuration_manager.spacing)
        return [PreprocessedCase(dataset, name, (d, h, w)) for name in names]

    def _loss_options(self, training: list[PreprocessedCase]) -> dict[str, Any]:
        self.print_to_log_file(f"Counting the classes' voxels in {len(training)} training cases")
        counts = count_voxels(training, self.label_manager.num_segmentation_heads)
        return {
            "class_weights": class_weights(counts).to(self.device),
            "ignore_index": self.label_manager.ignore_label,
            "process_group": True if self.is_ddp else None,
        }

    def _batches(self, cases: list[PreprocessedCase], augment: Any, steps: int) -> Any:
        """Of all epochs that are left: which case comes when is a function of the epoch."""
        rank, size = (dist.get_rank(), dist.get_world_size()) if self.is_ddp else (0, 1)
        sampler = Sampler(len(cases), seed=0, rank=rank, world_size=size)
        left = range(self.current_epoch * steps, self.num_epochs * steps)
        workers = min(get_allowed_n_proc_DA(), MOST_WORKERS)
        return batches(cases, sampler, augment, left, workers, pin=self.device.type == "cuda")

    def train_step(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        image, labels = self._on_device(batch)
        self.optimizer.zero_grad(set_to_none=True)
        statistics = RunningStatistics(self.network)
        with self._autocast():
            loss = self.network(image, labels, **self.loss_options)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), CLIP_NORM)
        if statistics.keep_if_finite(norm, self.is_ddp):
            self.optimizer.step()
        self._tell_memory(image)
        return {"loss": loss.detach().cpu().numpy()}

    def _tell_memory(self, image: Tensor) -> None:
        """Once it has been chosen, and whenever it changes: `auto` chooses for the first volume of a size."""
        mode = self._bare_network().active_memory
        if mode != self.told_memory:
            size = "x".join(map(str, image.shape[2:]))
            self.print_to_log_file(f"effseg: memory {mode} from a volume of {size} on")
            self.told_memory = mode

    def validation_step(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        image, labels = self._on_device(batch)
        with self._autocast():
            loss = self.network(image, labels, **self.loss_options)
            classes = self._bare_network().segment(image)
        tp, fp, fn = _counts(classes, labels, self.label_manager.num_segmentation_heads)
        return {"loss": loss.detach().cpu().numpy(), "tp_hard": tp[1:], "fp_hard": fp[1:], "fn_hard": fn[1:]}

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Segment the fold's validation cases to validation/ and score them there, in summary.json."""
        folder = Path(self.output_folder) / "validation"
        folder.mkdir(parents=True, exist_ok=True)
        predictor = Predictor(device=self.device, allow_tqdm=False)
        predictor.manual_initialization(
            self._bare_network(), self.plans_manager, self.configuration_manager, None, self.dataset_json,
            type(self).__name__, None,
        )  # fmt: skip
        _, names = self.do_split()
        for case in self._cases(names)[self.local_rank :: dist.get_world_size() if self.is_ddp else 1]:
            self.print_to_log_file(f"predicting {case.name}")
            data, _, _, properties = case.dataset.load_case(case.name)
            predictor.write(torch.tensor(data[:]), properties, str(folder / case.name), save_probabilities)
        if self.is_ddp:
            dist.barrier()
        if self.local_rank == 0:
            self._score(folder)

    def _score(self, folder: Path) -> None:
        metrics = compute_metrics_on_folder(
            str(Path(self.preprocessed_dataset_folder_base) / "gt_segmentations"),
            str(folder),
            str(folder / "summary.json"),
            self.plans_manager.image_reader_writer_class(),
            self.dataset_json["file_ending"],
            self.label_manager.foreground_labels,
            self.label_manager.ignore_label,
            num_processes=default_num_processes,
        )
        self.print_to_log_file("Mean Validation Dice: ", metrics["foreground_mean"]["Dice"])

    def _on_device(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        image, labels = (batch[name].to(self.device, non_blocking=True) for name in ("data", "target"))
        return image, labels

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def _bare_network(self) -> WholeVolumeNet:
        network = self.network.module if self.is_ddp else self.network
        assert isinstance(network, WholeVolumeNet)
        return network


class _Schedule:
    """effseg's learning rate, changed once an epoch, as nnU-Net calls for."""

    def __init__(self, optimizer: torch.optim.Optimizer, epochs: int) -> None:
        self.optimizer, self.epochs = optimizer, epochs
        self.peak = optimizer.param_groups[0]["lr"]

    def step(self, epoch: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(epoch, self.epochs, self.peak)


def _counts(classes: Tensor, labels: Tensor, number: int) -> list[np.ndarray]:
    """True positives, false positives and false negatives of every class, where labels are not ignored."""
    known = labels < number
    found, true = (x[known].to(torch.int16) for x in (classes, labels))
    right, predicted, present = (
        torch.bincount(x, minlength=number).cpu().numpy() for x in (found[found == true], found, true)
    )
    return [right, predicted - right, present - right]
