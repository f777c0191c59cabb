"""Causal students of Wan 2.1 that make a video block by block in few steps: a table of settings.

Each is a fine-tuned Wan 2.1 text-to-video transformer under the original's names, sampled without
guidance. Sources: the inference configurations and pipelines of the projects' own repositories, and
for Infinity-RoPE, which trains nothing, its paper (arXiv 2511.20649).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from skyreels_jax.causal_settings import CausalSettings
from skyreels_jax.presets import PRESETS, Preset

_WAN_1_3B: Final = "Wan2.1-T2V-1.3B"


@dataclass(frozen=True, kw_only=True)
class CausalPreset(CausalSettings):
    """A published causal student. Frames are latent frames.

    Attributes:
        name: what ``--preset`` takes.
        title: as published.
        weights: where its weights are: a Hugging Face id and a file in it.
        key: the mapping in that file that its authors sample with; None where it has none.
        lora: a LoRA that belongs to the weights, by its path in the same repository.
        base: name of the preset whose transformer, size and frame rate it has.
        source: where its settings are stated.
    """

    name: str
    title: str
    weights: str
    key: str | None = "generator_ema"
    lora: str | None = None
    base: str = _WAN_1_3B
    source: str

    @property
    def model(self) -> Preset:
        """The released checkpoint that it is a fine-tuning of."""
        return PRESETS[self.base]

    @property
    def fps(self) -> int:
        """Frames a second of the decoded video."""
        return self.model.fps

    @property
    def caveat(self) -> str | None:
        """What its authors' sampler does and `live` does not, if anything."""
        if self.recompute == "block":
            return (
                "its authors encode the window's first frame again from pixels before every "
                "block; here its latent stays"
            )
        return None


_SELF_FORCING: Final = "gdhe17/Self-Forcing/checkpoints/self_forcing_dmd.pt"
_CAUSAL_FORCING: Final = "zhuhz22/Causal-Forcing"
_LONGLIVE: Final = "Efficient-Large-Model/LongLive-1.3B"

_ALL: Final = (
    CausalPreset(
        name="self-forcing",
        title="Self-Forcing",
        weights=_SELF_FORCING,
        source="github.com/guandeh17/Self-Forcing, configs/self_forcing_dmd.yaml",
    ),
    CausalPreset(
        name="causal-forcing-chunk",
        title="Causal-Forcing, by chunks",
        weights=f"{_CAUSAL_FORCING}/chunkwise/causal_forcing.pt",
        key="generator",
        source="github.com/thu-ml/Causal-Forcing, configs/causal_forcing_dmd_chunkwise.yaml",
    ),
    CausalPreset(
        name="causal-forcing-frame",
        title="Causal-Forcing, by frames",
        weights=f"{_CAUSAL_FORCING}/framewise/causal_forcing.pt",
        block=1,
        source="github.com/thu-ml/Causal-Forcing, configs/causal_forcing_dmd_framewise.yaml",
    ),
    CausalPreset(
        name="causal-forcing++-2step",
        title="Causal-Forcing++, 2 steps",
        weights=f"{_CAUSAL_FORCING}/causal-forcing++/framewise-2step.pt",
        block=1,
        timesteps=(1000.0, 500.0),
        first_timesteps=CausalSettings.timesteps,
        source="github.com/thu-ml/Causal-Forcing, configs/causal_forcing_dmd_framewise_2step.yaml",
    ),
    CausalPreset(
        name="causal-forcing++-1step",
        title="Causal-Forcing++, 1 step",
        weights=f"{_CAUSAL_FORCING}/causal-forcing++/framewise-1step.pt",
        block=1,
        timesteps=(1000.0,),
        first_timesteps=CausalSettings.timesteps,
        source="github.com/thu-ml/Causal-Forcing, configs/causal_forcing_dmd_framewise_1step.yaml",
    ),
    CausalPreset(
        name="longlive",
        title="LongLive 1.3B",
        weights=f"{_LONGLIVE}/models/longlive_base.pt",
        key="generator",
        lora=f"{_LONGLIVE}/models/lora.pt",
        window=12,
        sink=3,
        recompute="prompt",
        source="github.com/NVlabs/LongLive, branch v1.0, configs/longlive_inference.yaml",
    ),
    CausalPreset(
        name="longlive-infinity",
        title="LongLive 1.3B, of any length",
        weights=f"{_LONGLIVE}/models/longlive_base.pt",
        key="generator",
        lora=f"{_LONGLIVE}/models/lora.pt",
        window=12,
        sink=3,
        positions="relative",
        recompute="prompt",
        source="github.com/NVlabs/LongLive, branch v1.0, configs/longlive_inference_infinity.yaml",
    ),
    CausalPreset(
        name="rolling-forcing",
        title="Rolling Forcing",
        weights="TencentARC/RollingForcing/checkpoints/rolling_forcing_dmd.pt",
        timesteps=(1000.0, 800.0, 600.0, 400.0, 200.0),
        sink=3,
        # The sink stands right before what is kept of the last frames: only distances count.
        positions="relative",
        is_rolling=True,
        source="github.com/TencentARC/RollingForcing, configs/rolling_forcing_dmd.yaml and "
        "pipeline/rolling_forcing_inference.py",
    ),
    CausalPreset(
        name="causal-forcing-long",
        title="Causal-Forcing, long videos",
        weights=f"{_CAUSAL_FORCING}/chunkwise/longvideo.pt",
        sink=3,
        positions="relative",
        is_rolling=True,
        source="github.com/thu-ml/Causal-Forcing, long_video/configs/rolling_forcing_dmd.yaml",
    ),
    CausalPreset(
        name="infinity-rope",
        title="Infinity-RoPE (on Self-Forcing)",
        weights=_SELF_FORCING,
        window=6,
        sink=1,
        positions="relative",
        source="arXiv 2511.20649",
    ),
    CausalPreset(
        name="causvid",
        title="CausVid 1.3B",
        weights="tianweiy/CausVid/autoregressive_checkpoint/model.pt",
        key="generator",
        timesteps=(1000.0, 757.0, 522.0),
        shift=None,
        source="github.com/tianweiy/CausVid, configs/wan_causal_dmd.yaml",
    ),
    CausalPreset(
        name="krea-realtime",
        title="Krea Realtime 14B",
        weights="krea/krea-realtime-video/krea-realtime-video-14b.safetensors",
        key=None,
        base="Wan2.1-T2V-14B",
        timesteps=(1000.0, 937.0, 833.0, 625.0),
        shift=None,
        window=6,
        positions="relative",
        recompute="block",
        source="github.com/krea-ai/realtime-video, configs/self_forcing_server_14b.yaml and "
        "release_server.py",
    ),
)
CAUSAL_PRESETS: Final[Mapping[str, CausalPreset]] = {preset.name: preset for preset in _ALL}

# What an intermediate file of their trainings is called; it is no student of few steps yet.
STAGES: Final = r"(ode-init|ar-diffusion|causal-ode|causal-cd)"
# What names of files, folders and repositories have in them, in small letters and with dashes; the
# first that is found counts.
NAMES_OF_STUDENTS: Final[Mapping[str, str]] = {
    r"framewise-?2-?step": "causal-forcing++-2step",
    r"framewise-?1-?step": "causal-forcing++-1step",
    r"frame-?wise.*causal-?forcing|causal-?forcing.*frame-?wise": "causal-forcing-frame",
    r"chunk-?wise.*causal-?forcing|causal-?forcing.*chunk-?wise": "causal-forcing-chunk",
    r"chunk-?wise/long-?video": "causal-forcing-long",
    r"rolling-?forcing": "rolling-forcing",
    r"long-?live": "longlive",
    r"krea-?realtime": "krea-realtime",
    r"caus-?vid|autoregressive-checkpoint": "causvid",
    r"self-?forcing": "self-forcing",
}
