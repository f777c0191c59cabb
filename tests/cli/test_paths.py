"""Whatever path a user names that no file can have: one line says so, wherever it is named."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tests.cli.commands import Command

from skyreels_jax.errors import RequestError
from skyreels_jax.outputs import make_folder, path_of

# "@" stands for the path; "=" before a name, for a file of the test.
WHERE = (
    *(
        f"{verb} --{name} @"
        for verb in (
            "generate --model mini --prompt a --output o.mp4",
            "live --model mini-live --prompt a --seconds 1 --output o.mp4",
            "batch =rows.jsonl made --model mini",
            "convert mini made --format original",
            "info mini",
        )
        for name in ("components", "vae", "text-encoder", "image-encoder")
    ),
    *(
        f"generate --model mini --prompt a --output o.mp4 {flag} @"
        for flag in ("--lora", "--image", "--last-image", "--video", "--resume-latents", "--job")
    ),
    *(f"live --model mini-live --prompt a --seconds 1 {flag} @" for flag in ("--lora", "--image")),
    "generate --model @ --prompt a --output o.mp4",
    "generate --model mini --prompt-file @ --output o.mp4",
    "generate --model mini --prompt a --output @",
    "generate --model mini --prompt a --output @.mp4",
    "live --model @ --prompt a --seconds 1 --output o.mp4",
    "live --model mini-live --prompts @ --output o.mp4",
    "live --model mini-live --prompt a --seconds 1 --output @.mp4",
    "batch @ made --model mini",
    "batch =rows.jsonl @ --model mini",
    "batch =rows.jsonl made --model @",
    "resume @",
    "info @",
    "convert @ made --format original",
    "convert mini @ --format original",
    "lora info @",
    "lora info =lora.safetensors --model @",
    "lora convert @ made.safetensors --to peft",
    "lora convert =lora.safetensors @ --to peft",
    "lora convert =lora.safetensors @.safetensors --to peft",
    "lora merge made --model @ --lora =lora.safetensors",
    "lora merge made --model mini --lora @",
    "lora merge @ --model mini --lora =lora.safetensors",
    "lora extract made.safetensors --model @ --base mini --rank 2",
    "lora extract made.safetensors --model mini --base @ --rank 2",
    "lora extract @.safetensors --model mini --base mini --rank 2",
    "data shapes @ --count 1 --frames 5 --size 32",
    "data check @",
    "data check =recipe.toml",
    "data check =encoded.toml",
    "data encode @",
    "data encode =recipe.toml",
    "data encode =encoded.toml",
    "train @",
    *(f"train ={name}.toml" for name in ("recipe", "encoded", "start", "vae", "text", "output")),
    "train =samples.toml",
    "train =good.toml --output @",
    "drift @",
    "plan --model @ --device h100",
    "validate --model @",
    "validate --output-dir @ --num-tests 1",
    "validate --videos @ @",
    "validate --trace @ @",
    "validate --image @",
)
PATHS = {
    "a long name": "a" * 300,
    "a long path": "b/" * 2500 + "c",
    "a home of nobody": "~nobody-of-this-name/m",
}

# A recipe that could be trained by, and what each of the others has in place of a path of it.
GOOD = """\
train = "lora"
output = "made"
[run]
steps = 1
[model]
start = "mini"
[lora]
rank = 2
[data]
source = "folder"
vae = "mini"
text = "mini"
encoded = "encoded"
resolution = 64
batch = 1
[[data.datasets]]
video_directory = "films"
target_frames = [5]
"""
CHANGED = {
    "good": ("", ""),
    "recipe": ('"films"', '"@"'),
    "encoded": ('encoded = "encoded"', 'encoded = "@"'),
    "start": ('start = "mini"', 'start = "@"'),
    "vae": ('vae = "mini"', 'vae = "@"'),
    "text": ('text = "mini"', 'text = "@"'),
    "output": ('output = "made"', 'output = "@"'),
    "samples": ("[run]", '[run]\nsample_every = 1\nsample_prompts = "@"'),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files that are as they should be, in the current folder; the hub is not asked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "id": "a"}\n')
    (tmp_path / "films").mkdir()
    tensors = {}
    for name, array in (("A", np.zeros((2, 192), np.float32)), ("B", np.zeros((192, 2), "f4"))):
        tensors[f"transformer.blocks.0.attn1.to_q.lora_{name}.weight"] = array
    save_file(tensors, tmp_path / "lora.safetensors")
    return tmp_path


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("where", WHERE)
def test_no_verb_ends_in_an_error_of_pythons(command: Command, here: Path, where: str, kind: str):
    for name, (old, new) in CHANGED.items():
        (here / f"{name}.toml").write_text(GOOD.replace(old, new.replace("@", PATHS[kind])))
    before = {path.name for path in here.iterdir()}
    words = [word.replace("@", PATHS[kind]).removeprefix("=") for word in where.split()]
    outcome = command(*words)
    assert (outcome.code, len(outcome.errors)) == (2, 1), outcome.err
    assert {path.name for path in here.iterdir()} == before


def test_a_path_may_lead_to_nothing_but_not_in_a_circle(tmp_path: Path):
    assert path_of(tmp_path / "new" / "one", "folder") == tmp_path / "new" / "one"
    assert path_of("~", "folder") == Path.home()
    file = tmp_path / "file"
    file.touch()
    assert path_of(file / "inside", "folder") == file / "inside"
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(RequestError, match="folder .*circle.*: Too many levels"):
        path_of(tmp_path / "circle", "folder")
    with pytest.raises(RequestError, match="image .*: .*null"):
        path_of("a\0b", "image")


def test_a_folder_is_made_with_those_above_it_unless_a_file_is_in_the_way(tmp_path: Path):
    made = make_folder(tmp_path / "a" / "b", "output")
    assert made.is_dir()
    assert make_folder(str(made), "output") == made
    (made / "file").touch()
    for taken in (made / "file", made / "file" / "c"):
        with pytest.raises(RequestError, match="output .*: .*file is a file; name a folder"):
            make_folder(taken, "output")
