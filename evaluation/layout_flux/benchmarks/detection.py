"""Objects found by public models: GroundingDINO for boxes, SAM for the pixels of one; both through transformers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor, SamModel, SamProcessor

from evaluation.layout_flux.benchmarks.formats import Box, Request
from evaluation.layout_flux.benchmarks.scores import HSV_RANGES, box_ious, colour_mask

THRESHOLDS = {"denselayout": (0.35, 0.25), "cocomig": (0.25, 0.25)}
"""Of boxes and of words, by benchmark."""
MAX_OVERLAP = 0.8
"""COCO-MIG: IoU above which the weaker of two boxes is dropped."""


class Detector:
    """GroundingDINO, asked for one label at a time.

    Args:
        source: a folder, or a hub id such as IDEA-Research/grounding-dino-tiny (SwinT-OGC, that of the papers).

    Raises:
        OSError, ValueError: its files are not there.
    """

    def __init__(self, source: str, device: str | torch.device = "cpu"):
        self.processor = AutoProcessor.from_pretrained(source)
        self.model = AutoModelForZeroShotObjectDetection.from_pretrained(source).to(device).eval()

    @torch.inference_mode()
    def find(self, picture: Image.Image, label: str, thresholds: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (K, 4), fractions, and scores (K,) of what a label names."""
        text = f"{label.lower().strip().rstrip('.')}."
        inputs = self.processor(images=picture, text=text, return_tensors="pt").to(self.model.device)
        outputs = self.model(**inputs)
        (found,) = self.processor.post_process_grounded_object_detection(
            outputs, inputs.input_ids, threshold=thresholds[0], text_threshold=thresholds[1]
        )
        return found["boxes"].clamp(0, 1).cpu().numpy(), found["scores"].cpu().numpy()


class Segmenter:
    """SAM, asked for what fills a box.

    Args:
        source: a folder, or a hub id such as facebook/sam-vit-huge (that of the paper).
    """

    def __init__(self, source: str, device: str | torch.device = "cpu"):
        self.processor = SamProcessor.from_pretrained(source)
        self.model = SamModel.from_pretrained(source).to(device).eval()

    @torch.inference_mode()
    def segment(self, picture: Image.Image, box: Box) -> np.ndarray:
        """(H, W) bool: the mask that the model itself trusts most."""
        width, height = picture.size
        pixels = [box[0] * width, box[1] * height, box[2] * width, box[3] * height]
        inputs = self.processor(picture, input_boxes=[[pixels]], return_tensors="pt")
        sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
        outputs = self.model(**{name: inputs[name].to(self.model.device) for name in ("pixel_values", "input_boxes")})
        (masks,) = self.processor.image_processor.post_process_masks(outputs.pred_masks.cpu(), *sizes)
        return masks[0, int(outputs.iou_scores[0, 0].argmax())].numpy()


def drop_overlapping(boxes: np.ndarray, scores: np.ndarray, limit: float = MAX_OVERLAP) -> np.ndarray:
    """Indices of boxes (K, 4) that overlap none of higher score by more than `limit`, best first."""
    kept: list[int] = []
    for index in np.argsort(-scores, kind="stable"):
        if not kept or box_ious(tuple(boxes[index]), boxes[kept]).max() <= limit:
            kept.append(int(index))
    return np.array(kept, int)


def find_instances(picture: Image.Image, request: Request, detector: Detector) -> list[dict]:
    """DenseLayout: what is found for the label of each."""
    labels = dict.fromkeys(instance.label for instance in request.instances)  # each is looked for once
    found = {label: _as_json(*detector.find(picture, label, THRESHOLDS["denselayout"])) for label in labels}
    return [found[instance.label] for instance in request.instances]


def find_coloured(picture: Image.Image, request: Request, detector: Detector, segmenter: Segmenter) -> list[dict]:
    """COCO-MIG: what is found for each class, and how much of what fills the box asked for has the colour asked for.

    Raises:
        ValueError: a label does not begin with one of the benchmark's colours.
    """
    found = []
    pixels = np.asarray(picture)
    for instance in request.instances:
        colour, _, name = instance.label.partition(" ")
        if colour not in HSV_RANGES or not name:
            raise ValueError(f"picture {request.id}: {instance.label!r} does not begin with a colour of COCO-MIG")
        boxes, scores = detector.find(picture, name, THRESHOLDS["cocomig"])
        kept = drop_overlapping(boxes, scores)
        mask = segmenter.segment(picture, instance.box)
        share = float(colour_mask(pixels[mask], colour).mean()) if mask.any() else 0.0
        found.append(_as_json(boxes[kept], scores[kept]) | {"colour_share": share})
    return found


def _as_json(boxes: np.ndarray, scores: Sequence[float]) -> dict:
    return {"boxes": np.asarray(boxes, float).tolist(), "scores": [float(score) for score in scores]}
