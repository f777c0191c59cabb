"""The declared settings as typed keywords and as a page: ``python -m`` this writes both anew."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from skyreels_jax.generation.request.declaration import GROUPS, Setting
from skyreels_jax.generation.request.kinds import Switch
from skyreels_jax.generation.request.live import different_settings, live_declared, live_keywords
from skyreels_jax.generation.request.settings import declared, keywords

KEYWORDS: Final = Path(__file__).with_name("keywords.py")
PAGE: Final = Path(__file__).parents[4] / "docs" / "settings.md"
_HEAD: Final = ("| flag | other names | takes | default | what it is |", "|---|---|---|---|---|")
_COMMAND: Final = "python -m skyreels_jax.generation.request.documentation"


def keywords_module() -> str:
    """The text of ``keywords.py``: TypedDicts, with a docstring for each keyword."""
    lines = [
        '"""The settings of a call as typed keywords.',
        "",
        f"Written by ``{_COMMAND}``.",
        '"""',
        "",
        "from collections.abc import Mapping, Sequence",
        "from fractions import Fraction",
        "from pathlib import Path",
        "from typing import TYPE_CHECKING, Literal, TypedDict",
        "",
        "if TYPE_CHECKING:",
        "    from skyreels_jax.media import ImageInput",
        *_typed_dict("VideoSettings", "What a call of a pipeline takes", keywords()),
        *_typed_dict("StreamSettings", "What a stream of a pipeline takes", live_keywords()),
    ]
    text = "\n".join(lines) + "\n"
    used = [name for name in ("Mapping", "Sequence") if re.search(rf"\b{name}\[", text)]
    imported = f"from collections.abc import {', '.join(used)}\n" if used else ""
    return text.replace("from collections.abc import Mapping, Sequence\n", imported)


def _typed_dict(name: str, what: str, settings: Mapping[str, Setting]) -> list[str]:
    lines = ["", "", f"class {name}(TypedDict, total=False):"]
    lines.append(f'    """{what} beside the prompt; what is left out is chosen."""')
    for setting in settings.values():
        if setting.name == "prompt":
            continue
        annotation = f"{setting.kind.annotation} | None"
        if "ImageInput" in annotation:
            annotation = f'"{annotation}"'
        lines += ["", f"    {setting.name}: {annotation}", f'    """{_sentence(setting)}"""']
    return lines


def settings_page() -> str:
    """``docs/settings.md``: a table for each group of settings."""
    lines = [
        "# Settings of a video",
        "",
        f"Written by `{_COMMAND}` from the declaration in",
        "`src/skyreels_jax/generation/request/settings.py`; a test holds it current.",
        "",
        "The flag and the keyword of `pipe(...)` take the same values; what means the same number",
        "is converted. Settings that nobody gives come from the checkpoint and are printed with",
        "their source.",
    ]
    for group in GROUPS:
        lines += ["", f"## {group[0].upper()}{group[1:]}", "", *_HEAD]
        lines += [_row(one) for one in declared().values() if one.group == group]
    different = different_settings()
    as_above = [f"`{one.flag}`" for one in live_declared().values() if one not in different]
    lines += ["", "## Live", "", "Of `skyreels-jax live` and `pipe.stream(...)` ([live](live.md));"]
    lines += [f"as above are {', '.join(as_above)}.", "", *_HEAD, *map(_row, different)]
    return "\n".join(lines) + "\n"


def _row(setting: Setting) -> str:
    is_switch = isinstance(setting.kind, Switch)
    flag = (
        setting.flag if is_switch else f"{setting.flag} {setting.metavar or setting.kind.metavar}"
    )
    flag = flag.replace("|", "\\|")
    no = (setting.no_flag,) if isinstance(setting.kind, Switch) and setting.kind.has_off else ()
    others = ", ".join(f"`{name}`" for name in (*setting.aliases, *no))
    takes = "" if is_switch else setting.kind.takes
    tasks = f" ({', '.join(map(str.upper, setting.tasks))} checkpoints)" if setting.tasks else ""
    default = setting.unset or ("off" if is_switch else "")
    return f"| `{flag}` | {others} | {takes} | {default} | {setting.help}{tasks} |"


def _sentence(setting: Setting) -> str:
    """Help as a docstring of one line."""
    return f"{setting.help[0].upper()}{setting.help[1:]}."


if __name__ == "__main__":
    KEYWORDS.write_text(keywords_module(), "utf-8")
    PAGE.write_text(settings_page(), "utf-8")
