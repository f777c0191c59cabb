"""The checkpoints that the package makes for itself, by name."""

from typing import Final

BUILT_IN: Final = ("mini", "mini-i2v", "mini-live")
# What is streamed unless something else is named: the student, once it is among them.
LIVE_MODEL: Final = "mini-live" if "mini-live" in BUILT_IN else "mini"
