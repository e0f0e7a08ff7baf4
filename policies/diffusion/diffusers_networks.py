"""New networks of diffusers, small ones for digits: students that `diffusers_bridge.export` can write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from workbench.errors import InputError
from workbench.policies.diffusion.diffusers_bridge import PREDICTION_TYPES, DiffusersNet, the_package
from workbench.policies.diffusion.schedules import Edm, Prediction, RectifiedFlow, Schedule, VariancePreserving

_NUM_STEPS = 1000  # of the schedulers


def unet2d(
    shape: Sequence[int] = (1, 8, 8), num_classes: int = 0, schedule: Schedule | None = None,
    prediction: Prediction = "flow", width: int = 16, second_time: bool = False, logvar: bool = False,
) -> DiffusersNet:  # fmt: skip
    """A new UNet2DModel of two levels, `width` and twice that, attention in the second.

    Args: width: a multiple of 8; sides of shape: even; schedule, prediction: rectified flow with flow, variance
        preserving (as DDPM's 1,000 steps, t = index) with eps, v or x0, EDM with x0. Raises: InputError for others, and
        for second_time and logvar, which diffusers' models do not have.
    """
    channels, height, breadth = _image(shape)
    if width % 8 or height % 2 or breadth % 2:
        raise InputError(f"A unet2d needs a width in multiples of 8 and even sides, not {width}, {height}x{breadth}.")
    scheduler = _new_scheduler(schedule or RectifiedFlow(), prediction, second_time or logvar)
    model = the_package().UNet2DModel(
        sample_size=(height, breadth), in_channels=channels, out_channels=channels, layers_per_block=1,
        block_out_channels=(width, 2 * width), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=8,
        num_class_embeds=num_classes + 1 if num_classes else None,
    )  # fmt: skip
    return DiffusersNet(model, scheduler, num_classes)


def dit2d(
    shape: Sequence[int] = (1, 8, 8), num_classes: int = 0, schedule: Schedule | None = None,
    prediction: Prediction = "flow", patch: int = 2, width: int = 64, depth: int = 3, heads: int = 4,
    second_time: bool = False, logvar: bool = False,
) -> DiffusersNet:  # fmt: skip
    """A new DiTTransformer2DModel for square images; sizes as `dit.DiT`, the rest as `unet2d`."""
    channels, height, breadth = _image(shape)
    if height != breadth or height % patch or width % heads or width % 4:
        raise InputError(
            f"A dit2d of {height}x{breadth}, {width} wide: square, {patch=} divides it; 4 and {heads=} width."
        )
    scheduler = _new_scheduler(schedule or RectifiedFlow(), prediction, second_time or logvar)
    model = the_package().DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=width // heads, in_channels=channels, num_layers=depth,
        sample_size=height, patch_size=patch, num_embeds_ada_norm=max(num_classes, 1),
    )  # fmt: skip
    return DiffusersNet(model, scheduler, num_classes)


def _image(shape: Sequence[int]) -> Sequence[int]:
    if len(shape) != 3:
        raise InputError(f"A network of diffusers is made for images, and the data have the shape {[*shape]}.")
    return shape


def _new_scheduler(schedule: Schedule, prediction: Prediction, extras: bool) -> Any:
    diffusers = the_package()
    names = {ours: theirs for theirs, ours in PREDICTION_TYPES.items()}
    if extras:
        raise InputError("A network of diffusers has neither second_time nor logvar: leave them out.")
    if isinstance(schedule, RectifiedFlow) and prediction == "flow":
        return diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=_NUM_STEPS)
    if isinstance(schedule, VariancePreserving) and prediction in names:
        betas = {"beta_start": schedule.beta_min / _NUM_STEPS, "beta_end": schedule.beta_max / _NUM_STEPS}
        return diffusers.DDIMScheduler(_NUM_STEPS, **betas, clip_sample=False, prediction_type=names[prediction])
    if isinstance(schedule, Edm) and prediction == "x0":
        return diffusers.EDMEulerScheduler(sigma_min=schedule.t_min, sigma_max=schedule.t_max)
    raise InputError(
        f"{type(schedule).__name__} with prediction {prediction!r} is no network of diffusers: take rectified flow "
        "with flow, variance preserving with eps, v or x0, or EDM with x0."
    )
