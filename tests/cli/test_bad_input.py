"""Everything that can be wrong with a request or a folder: one clear error, exit code 2, no file.

Checkpoint folders are copies of hard links with one file broken, so that a case takes no disk and
little time.
"""

import io
import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save
from tests.cli.commands import Command, linked, rewrite
from tests.fabricate import Checkpoints

TENSOR = "blocks.1.self_attn.q.bias"
WEIGHTS = "model.safetensors"
VAE = "Wan2.1_VAE.pth"
TEXT = "models_t5_umt5-xxl-enc-bf16.pth"
TOKENIZER = "google/umt5-xxl"
CLIP = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"

Break = Callable[[Path], None]
# A flag's text; "{…}" stands for paths of the test. None leaves the flag out.
Flags = dict[str, str | None]


@dataclass(frozen=True)
class Bad:
    """One kind of bad input: what is done to a folder, what is asked for, what the error names."""

    says: tuple[str, ...]
    flags: Flags = field(default_factory=dict)
    breaks: Break = lambda folder: None
    model: str = "t2v-original"


def flag(*says: str, model: str = "t2v-original", **flags: str | None) -> Bad:
    names = {f"--{name.replace('_', '-')}": value for name, value in flags.items()}
    return Bad(says, names, model=model)


def broken(breaks: Break, *says: str, model: str = "t2v-original") -> Bad:
    return Bad(says, breaks=breaks, model=model)


def remove(name: str) -> Break:
    def change(folder: Path) -> None:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

    return change


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def replace(name: str, content: bytes) -> Break:
    return lambda folder: rewrite(folder / name, content)


def cut(name: str, to: int) -> Break:
    return lambda folder: rewrite(folder / name, (folder / name).read_bytes()[:to])


def config(name: str = "config.json", **changes: object) -> Break:
    def change(folder: Path) -> None:
        value = json.loads((folder / name).read_text()) | changes
        rewrite(folder / name, json.dumps(value).encode())

    return change


def tensors(edit: Callable[[dict[str, np.ndarray]], object], name: str = WEIGHTS) -> Break:
    def change(folder: Path) -> None:
        values = load_file(folder / name)
        edit(values)
        rewrite(folder / name, save(values))

    return change


def pth(name: str, edit: Callable[[dict[str, torch.Tensor]], object], **options) -> Break:
    def change(folder: Path) -> None:
        values = torch.load(folder / name, weights_only=True)
        edit(values)
        stream = io.BytesIO()
        torch.save(values, stream, **options)
        rewrite(folder / name, stream.getvalue())

    return change


def flip(name: str, at: float) -> Break:
    def change(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[int(at * len(content))] ^= 16
        rewrite(folder / name, bytes(content))

    return change


class Malicious:
    """Unpickled, it would create a file."""

    def __reduce__(self):
        return open, ("canary", "w")


def rename_to_shard(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")


def halve(values: dict[str, torch.Tensor]) -> None:
    name = "token_embedding.weight"
    values[name] = values[name][:, :16].clone()


FOLDERS: dict[str, Bad] = {
    "empty folder": broken(empty, "config.json is missing", "found there: nothing"),
    "no config": broken(remove("config.json"), "config.json is missing"),
    "config cut off": broken(cut("config.json", 40), "config.json is no JSON"),
    "config of another model": broken(
        config(_class_name="FluxTransformer2DModel"), "config.json", "FluxTransformer2DModel"
    ),
    "config against the tensors": broken(config(num_layers=3), "config.json", "num_layers: 3"),
    "config with an illegal value": broken(config(num_heads=5), "config.json", "num_heads = 5"),
    "no weights": broken(remove(WEIGHTS), "no *.safetensors"),
    "weights cut off": broken(cut(WEIGHTS, -1), WEIGHTS, "truncated"),
    "weights of zero bytes": broken(replace(WEIGHTS, b""), WEIGHTS, "truncated"),
    "weights are text": broken(replace(WEIGHTS, b"<html>not found</html>"), WEIGHTS, "truncated"),
    "weights not fetched": broken(
        replace(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\n"), WEIGHTS, "Git LFS"
    ),
    "tensor renamed": broken(
        tensors(lambda v: v.update({"blocks.1.self_attn.query.bias": v.pop(TENSOR)})),
        *("lacks", TENSOR, "no place for", "blocks.1.self_attn.query.bias"),
    ),
    "tensor of another shape": broken(
        tensors(lambda v: v.update({TENSOR: v[TENSOR][:5]})), WEIGHTS, TENSOR, "[5]", "[32]"
    ),
    "tensor of integers": broken(
        tensors(lambda v: v.update({TENSOR: v[TENSOR].astype(np.int32)})), TENSOR, "int32"
    ),
    "tensor with NaN": broken(
        tensors(lambda v: v.update({TENSOR: np.full_like(v[TENSOR], np.nan)})), TENSOR, "NaN"
    ),
    "tensor too many": broken(
        tensors(lambda v: v.update({"lora.up": np.ones(3, np.float32)})), "no place for", "lora.up"
    ),
    "shard missing": broken(rename_to_shard, "model-00002-of-00002.safetensors", "missing"),
    "no VAE": broken(remove(VAE), VAE, "is missing"),
    "no text encoder": broken(remove(TEXT), TEXT, "is missing"),
    "no tokenizer": broken(remove(TOKENIZER), TOKENIZER, "is missing"),
    "tokenizer without its files": broken(
        remove(f"{TOKENIZER}/tokenizer.json"), TOKENIZER, "tokenizer.json"
    ),
    "tokenizer damaged": broken(
        cut(f"{TOKENIZER}/tokenizer.json", 100), "tokenizer.json", "not a readable tokenizer"
    ),
    "no image encoder": broken(remove(CLIP), CLIP, "is missing", model="i2v-original"),
    "image encoder cut off": broken(cut(CLIP, -9), CLIP, "truncated", model="i2v-original"),
    "VAE cut off": broken(cut(VAE, 5000), VAE, "truncated"),
    "VAE without a tensor": broken(
        pth(VAE, lambda v: v.pop("decoder.conv1.bias")), VAE, "decoder.conv1.bias"
    ),
    "VAE with other things": broken(pth(VAE, lambda v: v.update(epoch=3)), VAE, "'epoch' is a int"),
    "text encoder damaged": broken(flip(TEXT, 0.5), TEXT, "checksum"),
    "text encoder in the old format": broken(
        pth(TEXT, lambda v: None, _use_new_zipfile_serialization=False), TEXT, "before version 1.6"
    ),
    "text encoder of another width": broken(pth(TEXT, halve), TEXT),
    "text encoder that runs code": broken(
        pth(TEXT, lambda v: v.update(a=Malicious())), TEXT, "not to be trusted", "io.open"
    ),
    "VAE is an empty file": broken(replace(VAE, b""), VAE, "is empty"),
    "model_index cut off": broken(
        cut("model_index.json", 9), "model_index.json is no JSON", model="t2v-diffusers"
    ),
    "no VAE folder": broken(remove("vae"), "vae is missing", model="t2v-diffusers"),
    "VAE config with another value": broken(
        config("vae/config.json", z_dim=48), "VAE's config.json", model="t2v-diffusers"
    ),
    "scheduler with an illegal shift": broken(
        config("scheduler/scheduler_config.json", flow_shift="high"),
        "scheduler_config.json",
        "flow_shift",
        model="t2v-diffusers",
    ),
    "illegal block length": broken(
        config("transformer/config.json", num_frame_per_block=0),
        "num_frame_per_block",
        model="t2v-diffusers",
    ),
}

REQUESTS: dict[str, Bad] = {
    "no prompt": flag("--prompt", prompt=None),
    "empty prompt": flag("--prompt", prompt="  "),
    "odd height": flag("--height 30", "16 or 32", height="30"),
    "zero width": flag("--width 0", width="0"),
    "negative height": flag("--height -16", height="-16"),
    "height that is no number": flag("--height", "'tall'", height="tall"),
    "height without width": flag("--height", "without --width", width=None),
    "height and resolution": flag("--height", "--resolution", resolution="540P"),
    "unknown resolution": flag("'480P'", "540P", resolution="480P", height=None, width=None),
    "no aspect": flag("'wide'", "16:9", aspect="wide", height=None, width=None),
    "extreme aspect": flag("'99:1'", "8:1", aspect="99:1", height=None, width=None),
    "frames between": flag("--num-frames 6", "5 or 9", num_frames="6"),
    "no frames": flag("--num-frames 0", num_frames="0"),
    "frames and seconds": flag("--num-frames", "--seconds", seconds="2"),
    "negative seconds": flag("--seconds", num_frames=None, seconds="-1"),
    "no steps": flag("--steps 0", steps="0"),
    "negative steps": flag("--steps -4", steps="-4"),
    "too many steps": flag("--steps 1001", steps="1001"),
    "guidance not a number": flag("--guidance-scale nan", guidance_scale="nan"),
    "guidance below zero": flag("--guidance-scale -1.0", guidance_scale="-1"),
    "infinite guidance": flag("--guidance-scale inf", guidance_scale="inf"),
    "shift of zero": flag("--shift 0.0", shift="0"),
    "shift not a number": flag("--shift nan", shift="nan"),
    "negative seed": flag("--seed -2", seed="-2"),
    "large seed": flag("--seed 4294967296", seed="4294967296"),
    "seed that is no number": flag("--seed", "'lucky'", seed="lucky"),
    "no frame rate": flag("--fps 0", fps="0"),
    "large frame rate": flag("--fps 1000", fps="1000"),
    "no image": flag("--image", "I2V checkpoints need one", image=None, model="i2v-original"),
    "image for a text checkpoint": flag("--image", "T2V checkpoints take none", image="{image}"),
    "last image for a first": flag(
        "--last-image", "I2V checkpoints take none", last_image="{image}", model="i2v-original"
    ),
    "image that is text": flag("{text}", "cannot be read", image="{text}", model="i2v-original"),
    "image cut off": flag("{cut}", "cannot be read", image="{cut}", model="i2v-original"),
    "image that is a folder": flag("{out}", "is a folder", image="{out}", model="i2v-original"),
    "image that is missing": flag("nowhere.png", image="nowhere.png", model="i2v-original"),
    "unknown dtype": flag("dtype 'float64'", "bfloat16", dtype="float64"),
    "unknown attention": flag("--attention 'flash'", "chunked", attention="flash"),
    "attention of another device": flag("--attention cudnn", "CUDA", attention="cudnn"),
    "unknown VAE dtype": flag("--vae-dtype 'float16'", "bfloat16", vae_dtype="float16"),
    "VAE dtype of the hybrid backend": flag(
        "leave --vae-dtype out", vae_dtype="bfloat16", backend="hybrid"
    ),
    "unknown backend": flag("--backend", "'tf'", backend="tf"),
    "not enough memory": flag(
        "not enough memory", "GiB", num_frames="100001", height="8192", width="8192"
    ),
    "more frames than anybody makes": flag("--num-frames 400000001", num_frames="400000001"),
    "output into nowhere": flag("does not exist", output="{out}/nowhere/x.mp4"),
    "output of another kind": flag("x.avi", ".mp4", output="{out}/x.avi"),
    "output that is a folder": flag("is a folder", output="{folder}.mp4"),
    "output that is there": flag("there.mp4 exists", "--overwrite", output="{there}"),
    "misspelt flag": flag("--guidence-scale", "did you mean --guidance-scale", guidence_scale="5"),
    "flag of the original": flag("--outdir", "--output", outdir="videos"),
    "model that is missing": flag("t2v-orignal", "t2v-original", model_="{models}/t2v-orignal"),
    "model that is a file": flag("is no file of tensors", model_="{image}"),
    "model in no form": flag("neither a folder", model_="a b c"),
    "revision of a folder": flag("revision 'main'", revision="main"),
    "unknown preset": flag("preset 'SkyReels-V9'", preset="SkyReels-V9"),
    "preset of another shape": flag("another model", preset="SkyReels-V2-T2V-14B-540P"),
    "latents that are missing": flag("--resume-latents", resume_latents="none.safetensors"),
    "latents that are none": flag(
        "--resume-latents", "not a safetensors file", resume_latents="{text}"
    ),
}
KINDS = FOLDERS | REQUESTS


@pytest.fixture(scope="module")
def models(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one small checkpoint of each kind that the cases begin from."""
    root = tmp_path_factory.mktemp("models")
    for kind, layout in (("t2v", "original"), ("i2v", "original"), ("t2v", "diffusers")):
        linked(checkpoints(kind, layout), root / f"{kind}-{layout}")
    return root


@pytest.fixture
def places(tmp_path: Path, out: Path, models: Path) -> dict[str, Path]:
    """Paths that the cases name: images good and bad, outputs that are taken."""
    image = tmp_path / "image.png"
    Image.fromarray(np.arange(60 * 80 * 3, dtype=np.uint8).reshape(60, 80, 3)).save(image)
    (tmp_path / "image.txt").write_text("a fox")
    (tmp_path / "cut.png").write_bytes(image.read_bytes()[:200])
    (out / "there.mp4").write_bytes(b"somebody's")
    (out / "folder.mp4").mkdir()
    return {
        "image": image,
        "text": tmp_path / "image.txt",
        "cut": tmp_path / "cut.png",
        "there": out / "there.mp4",
        "folder": out / "folder",
        "out": out,
        "models": models,
    }


def arguments_of(bad: Bad, folder: Path, places: dict[str, Path]) -> list[str]:
    flags: Flags = {
        "--model": str(folder),
        "--prompt": "a fox",
        "--height": "32",
        "--width": "48",
        "--num-frames": "5",
        "--steps": "2",
        "--output": "{out}/x.mp4",
    }
    if bad.model.startswith("i2v"):
        flags["--image"] = "{image}"
    flags |= {"--model" if name == "--model-" else name: v for name, v in bad.flags.items()}
    return [
        text.format(**places)
        for name, value in flags.items()
        if value is not None
        for text in (name, value)
    ]


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("kind", KINDS)
def test_bad_input_gives_one_error_and_no_file(
    kind: str,
    command: Command,
    models: Path,
    places: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    bad = KINDS[kind]
    monkeypatch.chdir(tmp_path)
    folder = linked(models / bad.model, tmp_path / "model")
    bad.breaks(folder)
    before = contents(tmp_path)
    outcome = command("generate", *arguments_of(bad, folder, places))
    assert outcome.code == 2
    assert len(outcome.errors) == 1, outcome.err
    assert "Traceback" not in outcome.err
    for words in bad.says:
        assert words.format(**places) in outcome.errors[0]
    assert contents(tmp_path) == before


def test_the_table_holds_more_than_forty_kinds():
    assert len(KINDS) >= 40


def test_the_malicious_file_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Negative twin: what the command line refuses does run when it is unpickled."""
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Malicious()}, tmp_path / "a.pth")
    torch.load(tmp_path / "a.pth", weights_only=False)
    assert (tmp_path / "canary").exists()


def test_struct_of_a_broken_header_names_the_file(
    command: Command, models: Path, places: dict[str, Path], tmp_path: Path
):
    """A header length that no memory holds is refused by its length, not by running out."""
    folder = linked(models / "t2v-original", tmp_path / "model")
    rewrite(folder / WEIGHTS, struct.pack("<Q", 2**62) + b"{}")
    outcome = command("generate", *arguments_of(Bad(()), folder, places))
    assert outcome.code == 2
    assert WEIGHTS in outcome.errors[0]
