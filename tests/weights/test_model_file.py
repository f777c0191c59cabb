"""Checkpoints that are single files, with components from elsewhere: as from the folder."""

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import torch
from safetensors.numpy import load_file, save_file
from sentencepiece import sentencepiece_model_pb2
from tests.fabricate import Checkpoints
from tests.weights import gguf_files
from tests.weights.tiny import DF, I2V, T2V, random_state, save

from skyreels_jax import Pipeline
from skyreels_jax.checkpoints import Checkpoint, load_transformer
from skyreels_jax.cli.main import main
from skyreels_jax.errors import RequestError, WeightsError
from skyreels_jax.models.transformer_config import TransformerConfig
from skyreels_jax.presets import PRESETS
from skyreels_jax.prompts import Tokenizer
from skyreels_jax.recognition import guess_preset
from skyreels_jax.weights.components.umt5 import stored_text_encoder
from skyreels_jax.weights.engine import parameters
from skyreels_jax.weights.layout import Layout
from skyreels_jax.weights.tokenizer_file import open_tokenizer
from skyreels_jax.weights.torch_file import PthSource

F = np.float32
ONE_HEAD = {"dim": 128, "num_heads": 1, "num_layers": 1}
Tensors = dict[str, np.ndarray]


def one_head(config: TransformerConfig) -> TransformerConfig:
    return TransformerConfig(**(vars(config) | ONE_HEAD))


def tensors_of(folder: Path, config: TransformerConfig) -> Tensors:
    return load_file(save(folder, one_head(config)) / "model.safetensors")


def saved(values: Tensors, file: Path, **nested: Tensors) -> Path:
    """In the format that the file's name says; in a PyTorch file, also mappings by key."""
    if file.suffix == ".safetensors":
        save_file(values, file)
        return file
    by_key = {key: as_torch(one) for key, one in nested.items()}
    torch.save(by_key or as_torch(values), file)
    return file


def as_torch(values: Tensors) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in values.items()}


def prefixed(prefix: str, values: Tensors) -> Tensors:
    return {prefix + name: value for name, value in values.items()}


def other(values: Tensors) -> Tensors:
    return {name: value + 1 for name, value in values.items()}


MARKER = {"model_type.SkyReels-V2-DF-14B-540P": np.zeros(1, F)}
PACKED: dict[str, Callable[[Tensors, Path], Path]] = {
    "plain": lambda v, d: saved(v, d / "m.safetensors"),
    "ComfyUI": lambda v, d: saved(prefixed("model.diffusion_model.", v), d / "m.safetensors"),
    "marker": lambda v, d: saved(v | MARKER, d / "m.safetensors"),
    "DDP": lambda v, d: saved(prefixed("module.", v), d / "m.pth"),
    "ema": lambda v, d: saved(v, d / "m.pt", generator=other(v), generator_ema=v),
    "generator": lambda v, d: saved(v, d / "m.pt", generator=prefixed("model.", v)),
    "ckpt": lambda v, d: saved(v, d / "m.ckpt", state_dict=v),
}


SLOW = pytest.mark.slow


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize(
    "config", [T2V, pytest.param(DF, marks=SLOW), pytest.param(I2V, marks=SLOW)]
)
def test_every_repackaging_gives_the_same_transformer(
    tmp_path: Path, kind: str, config: TransformerConfig
):
    file = PACKED[kind](tensors_of(tmp_path / "m", config), tmp_path)
    checkpoint = Checkpoint.open(file)
    assert checkpoint.config == one_head(config)
    loaded = parameters(load_transformer(checkpoint, dtype=F))
    for path, value in parameters(random_state(one_head(config))).items():
        np.testing.assert_array_equal(value.get_value(), loaded[path].get_value(), path)


def test_what_was_taken_off_is_said(tmp_path: Path):
    values = prefixed("model.diffusion_model.", tensors_of(tmp_path / "m", DF)) | MARKER
    notes = Checkpoint.open(saved(values, tmp_path / "a.safetensors")).notes
    assert any("model.diffusion_model." in note for note in notes)
    assert any("SkyReels-V2-DF-14B-540P" in note for note in notes)


def test_a_preset_tells_the_heads(tmp_path: Path):
    (file,) = Checkpoint.open("mini").layout.files()
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(file.read_bytes())
    with pytest.raises(WeightsError, match="does not tell the number of heads"):
        Checkpoint.open(alone)
    assert Checkpoint.open(alone, preset="mini").config == Checkpoint.open("mini").config


@pytest.fixture
def single(tmp_path: Path) -> Path:
    (file,) = Checkpoint.open("mini").layout.files()
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(file.read_bytes())
    return alone


@SLOW
def test_a_file_with_components_gives_the_folders_latents(single: Path, monkeypatch):
    wish: dict[str, Any] = {"num_frames": 5, "steps": 2, "seed": 3}
    prompt = "a red star grows on a black background"
    expected = Pipeline.from_pretrained("mini")(prompt, **wish)
    made = Pipeline.from_pretrained(single, preset="mini", components="mini")(prompt, **wish)
    folder = Checkpoint.open("mini").folder
    monkeypatch.setenv("SKYREELS_JAX_COMPONENTS", str(folder))
    default = Pipeline.from_pretrained(single, preset="mini")(prompt, **wish)
    np.testing.assert_array_equal(expected.latents, made.latents)
    np.testing.assert_array_equal(expected.latents, default.latents)
    other_seed = Pipeline.from_pretrained(single, preset="mini")(prompt, **wish | {"seed": 4})
    assert not np.array_equal(expected.latents, other_seed.latents)


def test_component_files_of_any_names_are_taken(
    checkpoints: Checkpoints, single: Path, tmp_path: Path
):
    original, theirs = checkpoints("t2v", "original"), checkpoints("t2v", "diffusers")
    source = PthSource(original / "Wan2.1_VAE.pth")
    values = {name: source.read(name).astype(F) for name in source.tensors()}
    vae = saved(values, tmp_path / "wan_2.1_vae.safetensors")
    (text,) = (theirs / "text_encoder").glob("*.safetensors")
    checkpoint = Checkpoint.open(single, preset="mini", vae=vae, text_encoder=text)
    assert (checkpoint.vae, checkpoint.text_encoder) == (vae, text)
    # It lies beside the text encoder.
    assert checkpoint.tokenizer == theirs / "tokenizer"
    with pytest.raises(WeightsError, match="different checkpoints"):
        checkpoint.verify()


def test_a_component_in_anothers_place_is_named(checkpoints: Checkpoints, single: Path):
    original = checkpoints("t2v", "original")
    vae = original / "Wan2.1_VAE.pth"
    with pytest.raises(WeightsError, match="holds the vae, and was taken for the text encoder"):
        Checkpoint.open(single, preset="mini", text_encoder=vae)
    with pytest.raises(WeightsError, match="holds the vae and no transformer: give it by `vae`"):
        Checkpoint.open(vae)
    with pytest.raises(WeightsError, match="give one by `vae`"):
        Checkpoint.open(single, preset="mini").vae  # noqa: B018


FOREIGN: dict[str, tuple[str, tuple[int, ...], str]] = {
    "LoRA": ("diffusion_model.blocks.0.self_attn.q.lora_A.weight", (4, 4), "a LoRA"),
    "latents": ("latents", (16, 2, 8, 8), "latents of a video"),
    "FLUX": ("double_blocks.0.img_attn.qkv.weight", (4, 4), "FLUX"),
    "SD's VAE": ("decoder.up.0.block.0.conv1.weight", (4, 4, 3, 3), "VAE of images"),
    "nothing known": ("x", (1,), "no transformer, VAE or encoder"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_files_of_other_things_are_named(tmp_path: Path, kind: str):
    name, shape, says = FOREIGN[kind]
    file = saved({name: np.zeros(shape, F)}, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match=says):
        Checkpoint.open(file)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"in_dim": 48}, "Wan 2.2 TI2V"),
        ({"in_dim": 36}, "Wan 2.2 I2V"),
    ],
)
def test_other_inputs_are_other_models(tmp_path: Path, changed: dict[str, int], says: str):
    config = TransformerConfig(**(vars(T2V) | ONE_HEAD))
    values = tensors_of(tmp_path / "m", config)
    patch = values["patch_embedding.weight"]
    values["patch_embedding.weight"] = np.zeros((patch.shape[0], changed["in_dim"], 1, 2, 2), F)
    (tmp_path / "folder").mkdir()
    file = saved(values, tmp_path / "folder" / "a.safetensors")
    for place in (file, file.parent):
        with pytest.raises(WeightsError, match=says):
            Checkpoint.open(place)


VAES: dict[str, tuple[str, dict[str, tuple[int, ...]], str]] = {
    "Wan 2.2": (
        "a.safetensors",
        {"encoder.downsamples.0.downsamples.0.residual.2.weight": (4, 4, 3, 3, 3)},
        "the VAE of Wan 2.2",
    ),
    "Wan 2.2 of diffusers": (
        "a.safetensors",
        {"encoder.down_blocks.0.resnets.0.conv1.weight": (4, 4, 3, 3, 3)},
        "the VAE of Wan 2.2",
    ),
    "images": (
        "a.safetensors",
        {"encoder.down_blocks.0.resnets.0.conv1.weight": (4, 4, 3, 3)},
        "a VAE of images",
    ),
    "Qwen": ("qwen_image_vae.safetensors", {}, "the VAE of Qwen-Image"),
}


@pytest.mark.parametrize("kind", VAES)
def test_vaes_of_other_models_are_named(
    checkpoints: Checkpoints, single: Path, tmp_path: Path, kind: str
):
    name, shapes, says = VAES[kind]
    names = (checkpoints("t2v", "diffusers") / "vae").glob("*.safetensors")
    values = load_file(next(iter(names)))
    values |= {tensor: np.zeros(shape, F) for tensor, shape in shapes.items()}
    with pytest.raises(WeightsError, match=says):
        Checkpoint.open(single, preset="mini", vae=saved(values, tmp_path / name))


def test_a_text_encoder_under_llama_cpps_names_is_the_same(
    checkpoints: Checkpoints, single: Path, tmp_path: Path
):
    folder = checkpoints("t2v", "diffusers")
    (stored,) = (folder / "text_encoder").glob("*.safetensors")
    theirs = {name: value.astype(F) for name, value in load_file(stored).items()}
    tensors = {llama_cpps(n): ("F32", v.shape, v.tobytes()) for n, v in theirs.items()}
    file = gguf_files.write(tmp_path / "umt5.gguf", tensors, gguf_files.architecture("t5encoder"))
    layout = Checkpoint.open(single, preset="mini", text_encoder=file, components=folder).layout
    opened = stored_text_encoder(layout)
    opened.verify()
    loaded = parameters(opened.load(jnp.float32))
    expected = stored_text_encoder(Checkpoint.open(folder).layout).load(jnp.float32)
    for path, value in parameters(expected).items():
        np.testing.assert_array_equal(value.get_value(), loaded[path].get_value(), path)
    spoiled = {name.replace("attn_q", "attn_z"): value for name, value in tensors.items()}
    with pytest.raises(WeightsError):
        bad = gguf_files.write(tmp_path / "bad.gguf", spoiled, gguf_files.architecture("t5encoder"))
        Checkpoint.open(single, preset="mini", text_encoder=bad)


def llama_cpps(name: str) -> str:
    """transformers' name of a tensor of T5's encoder, as llama.cpp's converter writes it."""
    parts = {
        "layer.0.SelfAttention.relative_attention_bias": "attn_rel_b",
        **{f"layer.0.SelfAttention.{one}": f"attn_{one}" for one in "qkvo"},
        "layer.0.layer_norm": "attn_norm",
        "layer.1.DenseReluDense.wi_0": "ffn_gate",
        "layer.1.DenseReluDense.wi_1": "ffn_up",
        "layer.1.DenseReluDense.wo": "ffn_down",
        "layer.1.layer_norm": "ffn_norm",
    }
    if name in ("shared.weight", "encoder.embed_tokens.weight"):
        return "token_embd.weight"
    if name == "encoder.final_layer_norm.weight":
        return "enc.output_norm.weight"
    _, _, block, rest = name.split(".", 3)
    return f"enc.blk.{block}.{parts[rest.removesuffix('.weight')]}.weight"


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("skyreels_i2v_14B_720p_fp16", "SkyReels-V2-I2V-14B-720P"),
        ("SkyReels-14B-540P-I2V-e5m2", "SkyReels-V2-I2V-14B-540P"),
        ("wan2.1_i2v_480p_14B_bf16", "Wan2.1-I2V-14B-480P"),
        ("Wan2_1-I2V-14B-720P_fp8_e4m3fn", "Wan2.1-I2V-14B-720P"),
    ],
)
def test_a_files_name_tells_the_resolution(tmp_path: Path, name: str, preset: str):
    config = PRESETS[preset].config
    path = tmp_path / f"{name}.safetensors"
    path.touch()
    found = guess_preset(Layout(path, "original", path, {}, {}), config)
    assert found.preset is not None
    assert found.preset.name == preset
    # A name that tells nothing is an assumption, which is said.
    bare = tmp_path / "model.safetensors"
    bare.touch()
    assert "assumed" in guess_preset(Layout(bare, "original", bare, {}, {}), config).reason


@pytest.mark.parametrize(
    "name", ["wan2.2_t2v_high_noise_14B", "wan2.1_vace_14B", "SkyReels-V3-R2V"]
)
def test_relatives_are_known_by_the_files_name(tmp_path: Path, name: str):
    file = saved(tensors_of(tmp_path / "m", T2V), tmp_path / f"{name}.safetensors")
    with pytest.raises(WeightsError, match="not supported"):
        Checkpoint.open(file)


def test_a_full_checkpoint_has_its_vae(checkpoints: Checkpoints, tmp_path: Path):
    source = PthSource(checkpoints("t2v", "original") / "Wan2.1_VAE.pth")
    vae = {name: source.read(name).astype(F) for name in source.tensors()}
    model = prefixed("model.diffusion_model.", tensors_of(tmp_path / "m", T2V))
    file = saved(model | prefixed("vae.", vae), tmp_path / "full.safetensors")
    checkpoint = Checkpoint.open(file)
    assert checkpoint.config == one_head(T2V)
    assert checkpoint.vae == file
    assert any("holds the vae too" in note for note in checkpoint.notes)


def test_odd_inputs_are_one_line(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "x.safetensors").mkdir()
    (tmp_path / "empty.pth").touch()
    for name, says in (("pipe", "pipe"), ("x.safetensors", "missing"), ("empty.pth", "empty")):
        with pytest.raises((WeightsError, RequestError), match=says):
            Checkpoint.open(tmp_path / name)


def test_info_says_what_a_file_lacks(single: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["info", str(single), "--preset", "mini"]) == 0
    said = capsys.readouterr().out
    assert "vae (--vae), text_encoder (--text-encoder), tokenizer (--components)" in said


def test_a_file_is_converted_with_its_components(single: Path, tmp_path: Path):
    given = ["--preset", "mini", "--components", "mini", "--format", "diffusers"]
    assert main(["convert", str(single), str(tmp_path / "out"), *given]) == 0
    Checkpoint.open(tmp_path / "out", preset="mini").verify()


@pytest.fixture(scope="module")
def spiece(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A ``spiece.model``, as ComfyUI puts UMT5's into the text encoder's file."""
    folder = tmp_path_factory.mktemp("spiece")
    (folder / "text.txt").write_text("\n".join(["a cat sits", "two dogs run", "a red star"] * 30))
    trained = {"input": str(folder / "text.txt"), "model_prefix": str(folder / "spiece")}
    trained |= {"vocab_size": 40, "hard_vocab_limit": False, "minloglevel": 2}
    trained |= {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    sentencepiece.SentencePieceTrainer.train(**trained)
    return (folder / "spiece.model").read_bytes()


@pytest.mark.parametrize("prefix", ["", "text_encoders.umt5xxl.transformer."])
def test_a_tokenizer_in_the_text_encoders_file_is_taken(
    checkpoints: Checkpoints, single: Path, tmp_path: Path, spiece: bytes, prefix: str
):
    (text,) = (checkpoints("t2v", "diffusers") / "text_encoder").glob("*.safetensors")
    name = prefix.removesuffix("transformer.") + "spiece_model"
    values = prefixed(prefix, load_file(text)) | {name: np.frombuffer(spiece, np.uint8)}
    file = saved(values, tmp_path / "umt5_xxl_fp8.safetensors")
    checkpoint = Checkpoint.open(single, preset="mini", text_encoder=file)
    assert checkpoint.tokenizer == file
    prompts = ["a cat runs", "two <extra_id_7> dogs"]
    # Of UMT5's 300 sentinels as many as the encoder has rows for.
    rows = 128
    pieces = Tokenizer.from_sentencepiece(spiece, "", sentinels=0).vocab_size
    expected = Tokenizer.from_sentencepiece(spiece, "", sentinels=rows - pieces)
    assert open_tokenizer(file).vocab_size == expected.vocab_size == rows
    ours, theirs = (one.encode(prompts).ids for one in (open_tokenizer(file), expected))
    np.testing.assert_array_equal(ours, theirs)
    # What lies beside goes before it.
    (tmp_path / "tokenizer.json").write_text("{}")
    again = Checkpoint.open(single, preset="mini", text_encoder=file)
    assert again.tokenizer == tmp_path


def test_a_folder_of_models_has_the_tokenizer_in_the_text_encoder(
    checkpoints: Checkpoints, single: Path, tmp_path: Path, spiece: bytes
):
    theirs = checkpoints("t2v", "diffusers")
    for kind, folder in (("text_encoders", "text_encoder"), ("vae", "vae")):
        (file,) = (theirs / folder).glob("*.safetensors")
        values = load_file(file)
        if kind == "text_encoders":
            values |= {"spiece_model": np.frombuffer(spiece, np.uint8)}
        (tmp_path / "models" / kind).mkdir(parents=True)
        saved(values, tmp_path / "models" / kind / "it.safetensors")
    opened = Checkpoint.open(single, preset="mini", components=tmp_path / "models")
    assert opened.tokenizer == tmp_path / "models/text_encoders/it.safetensors"
    # Converted, it is one that all tools read.
    given = ["--preset", "mini", "--components", str(tmp_path / "models")]
    assert main(["convert", str(single), str(tmp_path / "o"), *given, "--format", "diffusers"]) == 0
    prompts = ["a cat runs", "two dogs"]
    np.testing.assert_array_equal(
        Tokenizer.from_folder(tmp_path / "o/tokenizer").encode(prompts).ids,
        Tokenizer.from_sentencepiece(spiece, "").encode(prompts).ids,
    )


def list_of(name: str, kind: int, values: bytes, count: int) -> bytes:
    return gguf_files.key(f"tokenizer.ggml.{name}", 9, struct.pack("<IQ", kind, count) + values)


def llama_cpps_tokenizer(spiece: bytes, rows: int) -> tuple[bytes, ...]:
    """The keys that llama.cpp's converter writes, the list filled up to the encoder's rows."""
    model = sentencepiece_model_pb2.ModelProto.FromString(spiece)
    more = rows - len(model.pieces)
    words = [piece.piece for piece in model.pieces] + [f"[PAD{i}]" for i in range(more)]
    scores = [piece.score for piece in model.pieces] + more * [-10000.0]
    kinds = [piece.type for piece in model.pieces] + more * [5]
    table = model.normalizer_spec.precompiled_charsmap
    return (
        gguf_files.key("tokenizer.ggml.model", 8, gguf_files.text("t5")),
        list_of("tokens", 8, b"".join(map(gguf_files.text, words)), rows),
        list_of("scores", 6, np.array(scores, "<f4").tobytes(), rows),
        list_of("token_type", 5, np.array(kinds, "<i4").tobytes(), rows),
        list_of("precompiled_charsmap", 0, table, len(table)),
    )


def test_a_tokenizer_in_a_gguf_file_is_taken(
    checkpoints: Checkpoints, single: Path, tmp_path: Path, spiece: bytes
):
    (stored,) = (checkpoints("t2v", "diffusers") / "text_encoder").glob("*.safetensors")
    theirs = {name: value.astype(F) for name, value in load_file(stored).items()}
    tensors = {llama_cpps(n): ("F32", v.shape, v.tobytes()) for n, v in theirs.items()}
    (rows,) = {v.shape[0] for n, v in theirs.items() if n == "shared.weight"}
    keys = (gguf_files.architecture("t5encoder"), *llama_cpps_tokenizer(spiece, rows))
    file = gguf_files.write(tmp_path / "umt5.gguf", tensors, *keys)
    checkpoint = Checkpoint.open(single, preset="mini", text_encoder=file)
    assert checkpoint.tokenizer == file
    prompts = ["a cat runs", "two <extra_id_7> dogs", "[PAD3] ﬁ ① star"]
    pieces = Tokenizer.from_sentencepiece(spiece, "", sentinels=0).vocab_size
    expected = Tokenizer.from_sentencepiece(spiece, "", sentinels=rows - pieces)
    ours = open_tokenizer(file)
    np.testing.assert_array_equal(ours.encode(prompts).ids, expected.encode(prompts).ids)
    assert ours.vocab_size == rows
    # Lists of other lengths are no tokenizer.
    bad = gguf_files.write(tmp_path / "bad.gguf", tensors, *keys[:3], *keys[4:])
    with pytest.raises(WeightsError, match="holds no tokenizer"):
        open_tokenizer(bad)


def test_a_file_without_a_tokenizer_is_named(tmp_path: Path):
    file = saved({"a": np.zeros(1, F)}, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match="no tokenizer: there is no tensor spiece_model"):
        open_tokenizer(file)
