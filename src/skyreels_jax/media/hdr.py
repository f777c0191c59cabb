"""High dynamic range (PQ and HLG in BT.2020) as 8-bit sRGB.

Sources: Rec. ITU-R BT.2100 for both transfer functions, BT.2087 for the primaries. White is
203 cd/m2 in PQ (BT.2408). HLG is shown as on a display of 1000 cd/m2, its gamma taken channel by
channel and white at 100 cd/m2, as the converters in use (zimg) make it of standard range. Brighter
light is compressed with the hue kept.
"""

from functools import cache
from typing import Final

import numpy as np
from jaxtyping import Float, UInt8, UInt16

PQ: Final = 16
HLG: Final = 18
NAMES: Final = {PQ: "PQ (smpte2084)", HLG: "HLG (arib-std-b67)"}
_PQ_WHITE: Final = 203.0
_HLG_WHITE: Final = 100.0
_HLG_PEAK: Final = 1000.0
_HLG_GAMMA: Final = 1.2
# Linear BT.2020 to linear BT.709, which has sRGB's primaries.
_TO_709: Final = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]],
    np.float32,
)
# From here on light is compressed; white keeps nine tenths.
_KNEE: Final = 0.8


@cache
def _pq_light() -> Float[np.ndarray, " codes"]:
    """Light of each 16-bit code, white being 1."""
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
    power = np.linspace(0, 1, 65536) ** (1 / m2)
    light = (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)
    return (light * 10_000 / _PQ_WHITE).astype(np.float32)


@cache
def _hlg_light() -> Float[np.ndarray, " codes"]:
    """Light of each 16-bit code, white being 1."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    signal = np.linspace(0, 1, 65536)
    scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    return (scene**_HLG_GAMMA * _HLG_PEAK / _HLG_WHITE).astype(np.float32)


@cache
def _srgb_codes() -> UInt8[np.ndarray, " codes"]:
    """sRGB of light in 65536 steps from 0 to 1."""
    light = np.linspace(0, 1, 65536)
    encoded = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return (encoded * 255).round().astype(np.uint8)


def tone_map(
    codes: UInt16[np.ndarray, "height width 3"], transfer: int
) -> UInt8[np.ndarray, "height width 3"]:
    """Full-range RGB codes in BT.2020 with the transfer :data:`PQ` or :data:`HLG`, as sRGB."""
    light = (_pq_light() if transfer == PQ else _hlg_light())[codes]
    light = np.maximum(light @ _TO_709.T, 0)
    brightest = light.max(axis=-1, keepdims=True)
    above = np.maximum(brightest - _KNEE, 0)
    compressed = _KNEE + (1 - _KNEE) * above / (above + 1 - _KNEE)
    light *= np.where(brightest > _KNEE, compressed / np.maximum(brightest, _KNEE), 1)
    return _srgb_codes()[(np.minimum(light, 1) * 65535).round().astype(np.uint16)]
