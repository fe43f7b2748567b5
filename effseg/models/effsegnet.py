"""EffSegNet: a residual encoder with a light additive decoder, trained on whole volumes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from effseg import functional
from effseg.common.device import make_room
from effseg.common.formats import dtype_name
from effseg.errors import InputError
from effseg.expressions.base import Deferred
from effseg.expressions.layers import Residual
from effseg.expressions.slabs import THIN, slabs_of_levels
from effseg.memory.choice import Choice, Settings, first_that_fits, usable
from effseg.models.base import SegmentationModel, check_image, check_sizes
from effseg.models.levels import PRESETS, DecoderLevel, EncoderLevel, levels_of
from effseg.models.training_step import TrainingStep
from effseg.modules import refuse_hooks
from effseg.offload.memory import HostMemory
from effseg.operators import share
from effseg.operators.normalisation import NORMS
from effseg.parallel.door import whole_rows
from effseg.parallel.halo import every
from effseg.parallel.partition import current, entered
from effseg.parallel.reduction import smallest

COMPUTE_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "bf16"}
"""Those that a step is predicted in, and as what."""
MEMORY_MODES = ("raw", "stream", "auto")
AUXILIARY_WEIGHTS = (1.0, 0.5, 0.25)  # of the loss at strides 1, 2 and 4, divided by their sum


class Trunk(NamedTuple):
    """What the last decoder level gets, and the decoder's levels that carry auxiliary heads, finest first."""

    skip: Deferred
    coarse: Deferred
    auxiliary: list[Deferred]


class EffSegNet(SegmentationModel):
    """A segmentation network for whole CT volumes that stores next to nothing.

    Our reading of Wang, Oda and Mori 2020 (arXiv 2003.10690), of which only the abstract is known to us: six
    levels (five for ``tiny``) of 3x3x3 convolutions without bias, normalisation and leaky ReLU 0.01;
    residual blocks in the encoder; in the decoder a 1x1x1 convolution on the coarse grid, trilinear x2
    upsampling, addition of the skip and one convolution. 1.76 M parameters (``base``, 15 classes).

    in_channels, num_classes: background included.
    preset: ``base`` (widths 16, 32, 48, 64, 64, 64), ``large`` (16, 32, 64, 96, 128, 128), ``large-w32`` (32,
        48, 64, 96, 128, 128; for many classes) or ``tiny`` (no full-resolution features, logits upsampled;
        for voxels of 1 mm or less).
    norm: ``instance``, ``batch`` or ``group``.
    memory: what `loss` keeps for backward. ``raw``: one raw output per convolution. ``stream``: nothing of
        full resolution; the first and the last layer, the head and the loss run slab by slab from the image,
        the labels and half-resolution tensors, in forward and again in backward (``tiny`` has no such
        layers: both are the same). The gradients are the same to rounding. ``auto``: for each image size the
        mode, the recomputation and the slabs that need the least arithmetic among those for which the GPU's
        allocator is predicted to reserve no more than the budget; `segment` streams.
    memory_budget: of ``auto``, for the whole training step with AdamW: bytes, or a text such as ``"24GB"``;
        None: nine tenths of the GPU's memory.
    recompute: number of levels, from half resolution down, that keep only their output and run again in
        backward.
    offload: keep the raw outputs of the level of half resolution in the host's memory, pinned and used again
        from step to step, for cards with a fast link to it. Copies run on streams of their own, a slab ahead
        of their use. The same numbers without further arithmetic; with ``recompute`` (2 or more) the levels
        below that one run again. With ``auto``: whether it may be chosen. Streams only, and not for ``tiny``,
        torch.compile or a volume that processes share. On a CPU everything stays where it is.
    auxiliary: also train heads on the decoder's levels at strides 2 and 4, against every second and fourth
        label, weighted 1/2 and 1/4; they serve the loss alone.
    thick_axis: 0, 1 or 2 (D, H, W): the axis along which voxels are much longer than along the others. The
        full-resolution layers do not look across it (kernels such as (1, 3, 3)), and the first stride
        leaves it alone.

    Any volume size works, odd ones too: upsampled tensors are cut to the skip's size. Images are of any
    float dtype or int16, labels of any integer dtype; both are read slab by slab as they are. Compute and
    storage follow ``torch.autocast`` of the image's device, else the weights' dtype; statistics and the
    loss are float32 (float64 for float64).

    Memory of a training step: see ``effseg plan``. Raises `InputError` (a `ValueError`) for unknown options,
    for shapes that do not fit, and in training with batch norm for a single image of one voxel on the lowest
    level; `ValueError` for hooks on its modules, which are not called.
    """

    follows_autocast = True
    ways = frozenset(("memory", "memory_budget", "recompute", "offload", "auxiliary"))

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        preset: str = "base",
        norm: str = "instance",
        memory: str = "raw",
        memory_budget: int | str | None = None,
        recompute: int = 0,
        auxiliary: bool = False,
        thick_axis: int | None = None,
        offload: bool = False,
    ) -> None:
        check_sizes(in_channels, num_classes)
        for option, value, known in (
            ("preset", preset, PRESETS),
            ("norm", norm, NORMS),
            ("memory", memory, MEMORY_MODES),
            ("thick_axis", thick_axis, (None, 0, 1, 2)),
        ):
            if value not in known:
                raise InputError(f"{option}: expected one of {', '.join(map(str, known))}, got {value!r}")
        if recompute < 0 or (memory == "auto" and recompute):
            expected = "0, auto chooses it" if memory == "auto" else "0 or more levels"
            raise InputError(f"recompute: expected {expected}, got {recompute}")
        if memory_budget is not None and memory != "auto":
            raise InputError(f"memory_budget: expected None with memory={memory!r}, got {memory_budget!r}")
        if offload:
            _check_offload(preset, memory, recompute)
        super().__init__(
            f"effseg-{preset}",
            dict(
                in_channels=in_channels, num_classes=num_classes, preset=preset, norm=norm, memory=memory,
                memory_budget=memory_budget, recompute=recompute, auxiliary=auxiliary, thick_axis=thick_axis,
                offload=offload,
            ),
        )  # fmt: skip
        self.architecture = PRESETS[preset]
        self.active_memory = memory
        self._budget = memory_budget  # of auto
        self._configured_for: tuple[Any, ...] = ()
        self.recompute_levels = recompute
        self.offloads = offload and memory != "auto"
        self.host = HostMemory()  # without a buffer until something is offloaded
        self.slab_elements: int | None = None  # of a training step's slabs: see `effseg.expressions.slabs`
        widths, stem_stride = self.architecture.widths, self.architecture.stem_stride
        if num_classes > 2 * widths[0]:
            warnings.warn(
                f"{num_classes} classes are read from {widths[0]} features a voxel: a preset with a wider "
                f"first level (large-w32) will tell them apart better",
                stacklevel=2,
            )
        levels = levels_of(self.architecture, in_channels, thick_axis)
        self.first_stride = levels[0 if stem_stride == 2 else 1].stride
        self.encoder = nn.ModuleList(
            EncoderLevel(level.in_channels, level.channels, level.blocks, norm, level.kernel, level.stride)
            for level in levels
        )
        self.decoder = nn.ModuleList(
            DecoderLevel(coarse.channels, level.channels, norm, level.decoder_kernel, coarse.stride)
            for level, coarse in pairwise(levels)
        )
        self.head = nn.Conv3d(widths[0], num_classes, 1)
        carrying = (1, 2) if stem_stride == 1 else (1,)  # levels at strides 2 and 4 that are not the last one
        self.auxiliary_heads = nn.ModuleList(
            nn.Conv3d(widths[i], num_classes, 1) for i in (carrying if auxiliary else ())
        )

    def forward(self, image: Tensor) -> Tensor:
        """Logits (N, K, D, H, W) in the compute dtype; `loss` and `segment` need far less memory."""
        whole = self._whole(image)
        features = self._last(self._trunk(whole, False, self.slab_elements), self.slab_elements)
        x, weight, bias = self._head(features, whole)
        if weight is None:
            return functional.materialise(x, slab_elements=self.slab_elements)
        return functional.conv3d(x, weight, bias, statistics=False, slab_elements=self.slab_elements)[0]

    def loss(self, image: Tensor, labels: Tensor, **options: Any) -> Tensor:
        """Dice + cross-entropy without full-size logits: `effseg.functional.segmentation_loss`'s options."""
        auto = self.arguments["memory"] == "auto"
        whole = self._whole(image, {**options, str(labels.dtype): None} if auto else options)
        if auto:
            self._configure(whole, image, labels)
        slab = self._slab_elements(image)
        slab_options = {**options, "slab_elements": slab}
        if self.streams:
            # Room for the first layer's slabs, and then for the first tensor that is stored.
            dtype = self._dtype(image.device)
            make_room(image.device, image.shape[0] * self._elements(image)[1] * dtype.itemsize)
        trunk = self._trunk(whole, self.streams, slab)
        if self.streams:
            unit = self._level(0).unit
            loss = functional.tail_segmentation_loss(
                self._level(0).joined(trunk.skip, trunk.coarse), labels,
                (unit.conv.weight, unit.norm, unit.negative_slope),
                self.head.weight, self.head.bias, **slab_options,
            )  # fmt: skip
        else:
            x, weight, bias = self._head(self._last(trunk, slab), whole)
            loss = functional.segmentation_loss(x, labels, weight, bias, **slab_options)
        if not self.auxiliary_heads:
            return loss
        losses = [loss, *self._auxiliary_losses(trunk, whole, labels, slab_options)]
        weights = AUXILIARY_WEIGHTS[: len(losses)]
        return torch.stack([w * value for w, value in zip(weights, losses, strict=True)]).sum() / sum(weights)

    @torch.no_grad()
    def segment(self, image: Tensor) -> Tensor:
        """The most probable class of every voxel, (N, D, H, W), uint8 (int16 for more than 256 classes).

        Unless memory is ``raw``, no full-resolution feature map exists.
        """
        return functional.segment(*self._inferred(image), slab_elements=self.slab_elements)

    @torch.no_grad()
    def probabilities(self, image: Tensor) -> Tensor:
        """p = softmax of the logits, (N, K, D, H, W) float16, in the host's memory; on the device what
        `segment` takes."""
        return functional.probabilities(*self._inferred(image), slab_elements=self.slab_elements)

    def _inferred(self, image: Tensor) -> tuple[Deferred, Tensor | None, Tensor | None]:
        """What the head reads of features that nobody needs again, and the head."""
        streams = self.architecture.stem_stride == 1 and self.arguments["memory"] != "raw"
        whole = self._whole(image)
        trunk = self._trunk(whole, streams, self.slab_elements)
        if streams:
            joined = self._level(0).joined(trunk.skip, trunk.coarse)
            features = self._level(0).unit.streamed_layer(joined, self.slab_elements)
        else:
            features = self._last(trunk, self.slab_elements)
        return self._head(features, whole)

    def lowest_level(self, size: tuple[int, int, int]) -> tuple[int, int, int]:
        """Voxels of the coarsest feature maps of a volume of `size`, which is divided by all strides."""
        levels = levels_of(self.architecture, self.arguments["in_channels"], self.arguments["thick_axis"])
        d, h, w = size
        for level in levels:
            d, h, w = (-(-extent // step) for extent, step in zip((d, h, w), level.stride, strict=True))
        return d, h, w

    @property
    def streams(self) -> bool:
        """Without full-resolution features there is nothing to stream but the logits, which always are."""
        return self.active_memory != "raw" and self.architecture.stem_stride == 1

    def _slab_elements(self, image: Tensor) -> int | None:
        """Of a training step's slabs: as configured, else by the size of the volume alone."""
        if self.slab_elements is not None:
            return self.slab_elements
        elements, stored = self._elements(image)
        if self.offloads:
            return THIN
        return slabs_of_levels(elements, stored if self.streams else elements, image.device, self.streams)

    def _elements(self, image: Tensor) -> tuple[int, int]:
        """Of a sample's tensors, on the finest level and on the next."""
        stride, widths = self.architecture.stem_stride, self.architecture.widths
        finest = [-(-size // stride) for size in image.shape[2:]]
        half = [-(-size // factor) for size, factor in zip(finest, self.first_stride, strict=True)]
        return widths[0] * math.prod(finest), widths[1] * math.prod(half)

    def use(self, settings: Settings, slab_elements: int | None) -> None:
        """Run training steps with these settings, in slabs of about so many elements."""
        self.active_memory = settings.memory
        self.recompute_levels = settings.recompute_levels
        self.offloads = settings.offload
        self.slab_elements = slab_elements

    def configure(
        self,
        image_shape: Sequence[int],
        dtype: torch.dtype,
        budget: int | str | None = None,
        device: torch.device | None = None,
        image_dtype: torch.dtype = torch.float32,
        label_dtype: torch.dtype = torch.uint8,
    ) -> Choice:
        """Use, from now on, the settings with the least arithmetic that fit a training step with AdamW.

        image_shape: (N, C, D, H, W), of the whole volume where processes share one, which then choose the
        same for the smallest of their budgets; dtype: the compute type; budget: bytes, or a text such as
        ``24GB``, for later steps of ``auto`` too; None: what the GPU of `device` (by default that of the
        weights) has, less a tenth; image_dtype, label_dtype: of what `loss` is given. Raises InputError where
        nothing fits, on a CPU without a budget, and for a type that is never predicted.
        """
        device, split = device or next(self.parameters()).device, current()
        if dtype not in COMPUTE_TYPES:
            known = ", ".join(map(dtype_name, COMPUTE_TYPES))
            raise InputError(f"memory: auto knows {known}, got {dtype_name(dtype)}")
        kind, processes = "cpu" if device.type == "cpu" else "cuda", 1 if split is None else split.size
        step = TrainingStep.of(
            type(self), self.arguments, image_shape, COMPUTE_TYPES[dtype], "adamw", kind, processes,
            image_dtype, label_dtype,
        )  # fmt: skip
        least = smallest(usable(budget, device), device)
        with entered(None):
            choice = first_that_fits(step, step.candidates(offload=self.arguments["offload"]), least)
        self.use(choice.settings, choice.slab_elements)
        self._budget = budget
        self._configured_for = (tuple(image_shape), dtype, device, processes, image_dtype, label_dtype)
        return choice

    def _configure(self, whole: Deferred, image: Tensor, labels: Tensor) -> None:
        """Choose for this size and these types, unless they were the last ones, too."""
        split = current()
        processes = 1 if split is None else split.size
        wanted = (whole.shape, whole.dtype, image.device, processes, image.dtype, labels.dtype)
        if wanted != self._configured_for:
            self.configure(whole.shape, whole.dtype, self._budget, image.device, image.dtype, labels.dtype)

    def _whole(self, image: Tensor, options: dict[str, Any] | None = None) -> Deferred:
        """The image as an expression in the compute type, of the shape of the volume of which it is this
        process's part; processes that share one agree on what follows."""
        check_image(image, self.arguments["in_channels"])
        for name, module in self.named_modules():
            if name:
                refuse_hooks(name, module)
        settings = (
            self.name, self.arguments, self.active_memory, self.recompute_levels, self.training,
            torch.is_grad_enabled(), sorted((options or {}).keys()),
        )  # fmt: skip
        dtype = self._dtype(image.device)
        return functional.plain(image, dtype, whole_rows(image, f"{settings} {dtype}"))

    def _dtype(self, device: torch.device) -> torch.dtype:
        """The compute type. The head's weight is not asked: a parametrised one would be made anew."""
        return functional.compute_dtype(device, next(self.head.parameters()))

    def _trunk(self, image: Deferred, streamed: bool, slab: int | None) -> Trunk:
        """Everything but the last decoder level; streamed: the first layer is not stored."""
        if self.offloads and torch.compiler.is_compiling():
            _refuse_offload("torch.compile")
        if self.offloads and current() is not None:
            _refuse_offload("a volume that processes share")
        levels: list[Deferred] = []
        for i, level in enumerate(self.encoder):
            assert isinstance(level, EncoderLevel)
            if i == 0 and streamed:
                levels.append(level.enter.streamed(image, slab))
            else:
                host = self.host if self.offloads and i == 1 else None
                recompute = host is None and 0 < i <= self.recompute_levels
                found = level.deferred(levels[-1] if levels else image, slab, recompute, host)
                # Read by the next level and by the decoder, but for the last one.
                shared = isinstance(found.spec, Residual) and i + 1 < len(self.encoder)
                levels.append(share(found, slab) if shared else found)
        h = levels.pop()
        auxiliary: list[Deferred] = []
        for i in reversed(range(1, len(self.decoder))):
            h = self._level(i).deferred(levels.pop(), h, slab)
            auxiliary.insert(0, h)
        return Trunk(levels.pop(), h, auxiliary[: len(self.auxiliary_heads)])

    def _last(self, trunk: Trunk, slab: int | None) -> Deferred:
        """The last decoder level, stored: (N, widths[0], D, H, W), half of that for ``tiny``."""
        return self._level(0).deferred(trunk.skip, trunk.coarse, slab)

    def _level(self, i: int) -> DecoderLevel:
        return cast(DecoderLevel, self.decoder[i])

    def _head(self, features: Deferred, image: Deferred) -> tuple[Deferred, Tensor | None, Tensor | None]:
        """What the head operators take. Without full-resolution features the 1x1x1 convolution runs on the
        coarse grid and the expression itself is the upsampled logits."""
        if self.architecture.stem_stride == 1:
            return features, self.head.weight, self.head.bias
        d, h, w = image.shape[2:]
        logits = functional.upsample_add(
            None, features, self.head.weight, self.head.bias, (d, h, w), self.first_stride
        )
        return logits, None, None

    def _auxiliary_losses(
        self, trunk: Trunk, image: Deferred, labels: Tensor, options: dict[str, Any]
    ) -> list[Tensor]:
        if labels.dim() == 5:
            labels = labels[:, 0]
        losses = []
        for x, head in zip(trunk.auxiliary, self.auxiliary_heads, strict=True):
            assert isinstance(head, nn.Conv3d)
            d, h, w = (-(-full // part) for full, part in zip(image.shape[2:], x.shape[2:], strict=True))
            coarse = every(d, labels[..., ::h, ::w], image.shape[2])
            losses.append(functional.segmentation_loss(x, coarse, head.weight, head.bias, **options))
        return losses


@torch.compiler.disable
def _refuse_offload(found: str) -> None:
    """Where torch.compile leaves the graph for what it cannot trace, it comes to this."""
    raise InputError(f"offload: expected one process for a volume and no torch.compile, got {found}")


def _check_offload(preset: str, memory: str, recompute: int) -> None:
    """Raise InputError where nothing would be offloaded."""
    if PRESETS[preset].stem_stride != 1:
        raise InputError(f"offload: expected False for preset {preset}, which has one level less, got True")
    if memory == "raw":
        raise InputError("offload: expected memory='stream' or 'auto', got memory='raw'")
    if recompute == 1:
        raise InputError("recompute: expected 0, or 2 and more, with offload, which keeps level 1; got 1")
