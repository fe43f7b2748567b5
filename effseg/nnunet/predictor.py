"""Prediction with nnU-Net's model folders, of whole volumes where a network was trained on them."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import Tensor

from effseg.nnunet.export import on_file_grid
from effseg.nnunet.network import WholeVolumeNet


class Predictor(nnUNetPredictor):
    """nnU-Net's predictor, which gives a whole volume to a `WholeVolumeNet` and windows to any other network.

    Classes are made without logits, a slab at a time. Only several folds, whose logits are averaged, and
    probabilities, if asked for, need the logits of the whole volume, which nnU-Net then resamples.
    """

    def predict_from_data_iterator(
        self,
        data_iterator: Iterable[dict[str, Any]],
        save_probabilities: bool = False,
        *rest: Any,
        **named: Any,
    ) -> list[Any]:
        if not isinstance(self.network, WholeVolumeNet):
            return super().predict_from_data_iterator(data_iterator, save_probabilities, *rest, **named)
        found: list[Any] = []
        for item in data_iterator:
            if item["ofile"] is None:
                found += super().predict_from_data_iterator([item], save_probabilities, *rest, **named)
            else:
                print(f"Predicting {item['ofile']}")
                self.write(item["data"], item["data_properties"], item["ofile"], save_probabilities)
                found.append(None)
        return found

    def predict_logits_from_preprocessed_data(self, data: Tensor) -> Tensor:
        """(C, D, H, W) -> (K, D, H, W), on the CPU, mean of the folds."""
        if not isinstance(self.network, WholeVolumeNet):
            return super().predict_logits_from_preprocessed_data(data)
        logits = [self._run(data, fold, self.network.logits) for fold in self._folds()]
        return torch.stack(logits).mean(0) if len(logits) > 1 else logits[0]

    def write(
        self, data: Tensor, properties: dict[str, Any], target: str, save_probabilities: bool = False
    ) -> None:
        """Segment a preprocessed case to `target`, which lacks the file's ending."""
        if save_probabilities or len(self._folds()) > 1:
            logits = self.predict_logits_from_preprocessed_data(data)
            export_prediction_from_logits(
                logits, properties, self.configuration_manager, self.plans_manager, self.dataset_json, target,
                save_probabilities,
            )  # fmt: skip
            return
        labels = on_file_grid(self._classes(data), self.plans_manager, self.label_manager, properties)
        writer = self.plans_manager.image_reader_writer_class()
        writer.write_seg(labels, target + self.dataset_json["file_ending"], properties)

    def _classes(self, data: Tensor) -> np.ndarray:
        assert isinstance(self.network, WholeVolumeNet)
        (fold,) = self._folds()
        found: np.ndarray = self._run(data, fold, self.network.segment).numpy()
        return found

    def _folds(self) -> list[Any]:
        """Weights to load; None for those that the network has."""
        return self.list_of_parameters or [None]

    @torch.no_grad()
    def _run(self, data: Tensor, fold: Any, function: Any) -> Tensor:
        """Of one fold and one case, without the batch's axis, on the CPU."""
        assert isinstance(self.network, WholeVolumeNet)
        if fold is not None:
            self.network.load_state_dict(fold)
        self.network.to(self.device).eval()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            result = function(data[None].to(self.device))[0].cpu()
        return result.float() if result.is_floating_point() else result
