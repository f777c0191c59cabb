"""The declared settings as typed keywords and as a page: ``python -m`` this writes both anew."""

import re
from pathlib import Path
from typing import Final

from skyreels_jax.generation.request.declaration import GROUPS, Setting
from skyreels_jax.generation.request.kinds import Switch
from skyreels_jax.generation.request.settings import declared, keywords

KEYWORDS: Final = Path(__file__).with_name("keywords.py")
PAGE: Final = Path(__file__).parents[4] / "docs" / "settings.md"
_COMMAND: Final = "python -m skyreels_jax.generation.request.documentation"


def keywords_module() -> str:
    """The text of ``keywords.py``: a TypedDict, with a docstring for each keyword."""
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
        "",
        "",
        "class VideoSettings(TypedDict, total=False):",
        '    """What a call of a pipeline takes beside the prompt; what is left out is chosen."""',
    ]
    for name, setting in keywords().items():
        if name == "prompt":
            continue
        annotation = f"{setting.kind.annotation} | None"
        if "ImageInput" in annotation:
            annotation = f'"{annotation}"'
        lines += ["", f"    {name}: {annotation}", f'    """{_sentence(setting)}"""']
    text = "\n".join(lines) + "\n"
    unused = [name for name in ("Mapping", "Sequence") if not re.search(rf"\b{name}\[", text)]
    if len(unused) == 2:
        text = text.replace("from collections.abc import Mapping, Sequence\n", "")
    return text


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
        lines += ["", f"## {group[0].upper()}{group[1:]}", ""]
        lines += ["| flag | other names | takes | default | what it is |", "|---|---|---|---|---|"]
        lines += [_row(one) for one in declared().values() if one.group == group]
    return "\n".join(lines) + "\n"


def _row(setting: Setting) -> str:
    is_switch = isinstance(setting.kind, Switch)
    flag = (
        setting.flag if is_switch else f"{setting.flag} {setting.metavar or setting.kind.metavar}"
    )
    flag = flag.replace("|", "\\|")
    others = ", ".join(f"`{name}`" for name in setting.aliases)
    takes = "" if is_switch else setting.kind.takes
    tasks = f" ({', '.join(map(str.upper, setting.tasks))} checkpoints)" if setting.tasks else ""
    default = "off" if is_switch else setting.unset
    return f"| `{flag}` | {others} | {takes} | {default} | {setting.help}{tasks} |"


def _sentence(setting: Setting) -> str:
    """Help as a docstring of one line."""
    return f"{setting.help[0].upper()}{setting.help[1:]}."


if __name__ == "__main__":
    KEYWORDS.write_text(keywords_module(), "utf-8")
    PAGE.write_text(settings_page(), "utf-8")
