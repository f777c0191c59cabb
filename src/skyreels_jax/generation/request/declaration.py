"""What is declared of a setting, as the metadata of a dataclass field."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Final

from skyreels_jax.generation.request.kinds import Picture, SettingKind

# Groups of flags, in their order.
SHOWN: Final = "what to show"
DIMENSIONS: Final = "size and length"
SAMPLING: Final = "sampling"
FORCING: Final = "long video and diffusion forcing"
RUNNING: Final = "running"
OUTPUT: Final = "output"
GROUPS: Final = (SHOWN, DIMENSIONS, SAMPLING, FORCING, RUNNING, OUTPUT)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is known of a setting beside its type.

    Attributes:
        name: of the field and the keyword.
        kind: what it takes.
        help: one line, for the command line and the documentation.
        group: of flags.
        metavar: stands for the value in help; empty for the kind's.
        unset: in words, what holds where nobody gives it.
        flags: more names on the command line: the original's, diffusers', old ones of ours.
        former: a keyword of ours that it had before.
        tasks: only checkpoints of these take it; empty for all.
        keyword: whether a call of a pipeline takes it.
    """

    name: str = ""
    kind: SettingKind
    help: str
    group: str
    metavar: str = ""
    unset: str = ""
    flags: tuple[str, ...] = ()
    former: str | None = None
    tasks: tuple[str, ...] = ()
    keyword: bool = True

    @property
    def flag(self) -> str:
        """The command line's name."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def aliases(self) -> tuple[str, ...]:
        """Its other names there; with underscores, as the original writes flags, all have one."""
        return (*((f"--{self.name}",) if "_" in self.name else ()), *self.flags)


def setting(kind: SettingKind, text: str, group: str, *, default: Any = None, **more: Any) -> Any:
    """A field of a request."""
    metadata = {"setting": Setting(kind=kind, help=text, group=group, **more)}
    # Images compare as arrays do, element by element.
    compare = not isinstance(kind, Picture)
    if default is dataclasses.MISSING:
        return field(compare=compare, metadata=metadata)
    return field(default=default, compare=compare, metadata=metadata)
