"""The sigmas of diffusers' scheduler, which ours are compared with."""

import numpy as np

from skyreels_jax.diffusion.unipc import NUM_TRAIN_TIMESTEPS, FlowSchedule, schedule_from_sigmas

# Diffusers' grid starts at 1, where the log signal-to-noise ratio is infinite, less this step back.
SIGMA_ONE_GAP = 1e-6


def diffusers_sigmas(num_steps: int, shift: float) -> FlowSchedule:
    """Diffusers' grid, which ends earlier than ours (at 0.001 before the shift).

    Source: ``set_timesteps`` of ``UniPCMultistepScheduler`` with ``use_flow_sigmas``.
    """
    base = np.linspace(1.0, 1.0 / NUM_TRAIN_TIMESTEPS, num_steps + 1)[:-1]
    sigmas = shift * base / (1 + (shift - 1) * base)
    sigmas[0] -= SIGMA_ONE_GAP
    return schedule_from_sigmas(sigmas)
