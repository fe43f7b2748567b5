"""Whole scans through trained networks, from files to label files."""

from effseg.inference.files import predict_files
from effseg.inference.predictor import Ensemble, Predictor, Segmenter, load_predictor, predict_scan
from effseg.inference.segmentation import keep_largest_components, segment, segment_prepared
from effseg.inference.weights import weights_file, weights_files

__all__ = [
    "Ensemble",
    "Predictor",
    "Segmenter",
    "keep_largest_components",
    "load_predictor",
    "predict_files",
    "predict_scan",
    "segment",
    "segment_prepared",
    "weights_file",
    "weights_files",
]
