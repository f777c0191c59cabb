"""LoRA training against PEFT: gradients, initial values, files; what is frozen costs nothing."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from peft import LoraConfig
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tests.fabricate import Checkpoints
from tests.models.transformer_oracle import jax_model, relative
from tests.training.test_gradients import CASES, SHAPE, by_torch, case
from tests.weights.lora.files import stored, with_file
from tests.weights.lora.test_rows import loaded_by_diffusers, torch_model

from skyreels_jax.errors import RequestError
from skyreels_jax.training.lora import LoraModel, LoraTraining, lora_targets
from skyreels_jax.training.objective import Batch, velocity_loss
from skyreels_jax.training.optimizer import OptimizerConfig, make_optimizer
from skyreels_jax.training.step import init_state, make_step
from skyreels_jax.training.task import Params
from skyreels_jax.weights.lora.writing import TrainedProduct, lora_of_products
from skyreels_jax.weights.writer import write_tensor_file

# Largest difference of a matrix's gradient over the largest gradient in it, from PEFT's by PyTorch
# in float32. Measured 2.4e-6 (t2v), 8.1e-6 (diffusion forcing), 1.0e-5 (i2v);
# of the loss at most 3.4e-7.
GRAD_TOL = 1e-4
LOSS_TOL = 1e-5
# Targets of which some are of some blocks and some of none: every way that a stack is put together.
LORA = LoraTraining(
    rank=3,
    alpha=4.5,
    targets="all linear",
    exclude=(r"blocks\.0\..*ffn.*", "attn2.to_k"),
    include=("blocks.0.ffn.net.2",),
    base="float32",
)


def random_matrices(model: LoraModel, seed: int = 0) -> dict[str, jax.Array]:
    """Matrices after some training: the second ones are not zero."""
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(0.3 * rng.standard_normal(value.shape), jnp.float32)
        for name, value in model.init(0).items()
    }


def modules(model: LoraModel, params: Params) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Each module's matrices in PyTorch's layout, by diffusers' names."""
    found = {}
    for target in model.targets:
        for k, name in enumerate(target.names["diffusers"]):
            pair = (np.asarray(params[n]) for n in (target.down, target.up))
            down, up = (x if target.layers is None else x[k] for x in pair)
            found[name] = down.T, up.T
    return found


def with_adapters(oracle, lora: LoraTraining, matrices) -> dict[str, torch.nn.Parameter]:
    """PEFT's adapters beside diffusers' linears; their parameters by module and matrix."""
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.stated_alpha,
        use_rslora=lora.rslora,
        target_modules=list(matrices),
    )
    oracle.add_adapter(config)
    found = {}
    for name, parameter in oracle.named_parameters():
        if ".lora_" in name:
            module, _, rest = name.partition(".lora_")
            found[module, rest[0]] = parameter
            parameter.data = torch.from_numpy(matrices[module][rest[0] == "B"].copy())
    assert {module for module, _ in found} == set(matrices)
    return found


def both_gradients(name: str, lora: LoraTraining, *, remat: bool = False, factor: float = 1.0):
    """Loss and gradients here and by PEFT; ``factor`` spoils the scale here."""
    config, oracle, given, noise, sigma = case(*CASES[name])
    model = LoraModel.of(jax_model(config, oracle, remat=remat), lora)
    matrices = random_matrices(model)
    adapters = with_adapters(oracle, lora, modules(model, matrices))
    told = {k: jnp.asarray(v) for k, v in given.items() if k not in ("x", "t")}
    batch = Batch(jnp.asarray(given["x"]), **told)

    def loss_of(params, frozen):
        params = {n: factor * v if n.endswith("lora_up") else v for n, v in params.items()}
        whole = model.model({**frozen, **params})
        return velocity_loss(whole, batch, jnp.asarray(noise), jnp.asarray(sigma))

    loss, grads = jax.jit(jax.value_and_grad(loss_of))(matrices, model.frozen)
    right, _ = by_torch(oracle, given, noise, sigma)
    gaps = {}
    for module, pair in modules(model, grads).items():
        for letter, own in zip("AB", pair, strict=True):
            expected = adapters[module, letter].grad.numpy()
            gaps[module, letter] = float(np.abs(own - expected).max() / np.abs(expected).max())
    return abs(float(loss) - right) / right, gaps


@pytest.mark.parametrize(
    ("name", "rslora", "remat"),
    [
        ("diffusion forcing", True, True),
        pytest.param("flow matching", False, False, marks=pytest.mark.slow),
        pytest.param("i2v", False, True, marks=pytest.mark.slow),
    ],
)
def test_every_gradient_is_pefts(name: str, rslora: bool, remat: bool):
    values = {**vars(LORA), "rslora": rslora}
    off, gaps = both_gradients(name, LoraTraining(**values), remat=remat)
    assert off < LOSS_TOL
    assert {key: gap for key, gap in gaps.items() if gap > GRAD_TOL} == {}


@pytest.mark.slow
def test_a_scale_that_is_not_alpha_by_rank_is_caught():
    off, gaps = both_gradients("diffusion forcing", LORA, factor=1 / LORA.scale)
    assert off > 100 * LOSS_TOL  # measured 0.058
    assert min(gaps.values()) > 10 * GRAD_TOL


# Initial values and targets


@pytest.fixture(scope="module")
def small() -> LoraModel:
    config, oracle, *_ = case(*CASES["diffusion forcing"])
    return LoraModel.of(jax_model(config, oracle), LORA)


def test_matrices_begin_as_pefts(small: LoraModel):
    first = small.init(0)
    for target in small.targets:
        width, _ = small.sizes[target.path]
        down = np.asarray(first[target.down])
        assert not np.asarray(first[target.up]).any()
        theirs = torch.empty(LORA.rank, width)
        torch.nn.init.kaiming_uniform_(theirs, a=5**0.5)
        bound = width**-0.5
        assert np.abs(down).max() <= bound
        assert float(theirs.abs().max()) <= bound
        # Of a uniform distribution the deviation is the bound over the root of three.
        assert abs(down.std() - bound / 3**0.5) < 0.2 * bound


def names(**table: object) -> set[str]:
    targets = lora_targets(SHAPE.config("df", inject_sample_info=True), LoraTraining(**table))
    return {name for target in targets for name in target.names["original"]}


def test_presets_and_patterns():
    attention = names(targets="attention")
    assert len(attention) == 2 * 8
    assert names() - attention == {f"blocks.{i}.ffn.{k}" for i in (0, 1) for k in (0, 2)}
    every = names(targets="all linear")
    assert {"head.head", "text_embedding.0", "time_projection.1", "fps_projection.2"} < every
    # In the words of diffusers, of the original, and as an expression; a rest is as it was.
    assert names(targets=("attn1.to_q",)) == names(targets=("self_attn.q",))
    assert names(targets=(r"blocks\.1\.ffn\..*",)) == {"blocks.1.ffn.0", "blocks.1.ffn.2"}
    assert names(exclude=("ffn.0", r".*cross_attn.*"), include=("blocks.1.ffn.0",)) == {
        *(f"blocks.{i}.self_attn.{k}" for i in (0, 1) for k in "qkvo"),
        *("blocks.0.ffn.2", "blocks.1.ffn.2", "blocks.1.ffn.0"),
    }


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"targets": ("attn1.to_qq",)}, "no linear of this model is named 'attn1.to_qq'.* to_q"),
        ({"exclude": (r"blocks\..*",)}, "leave no linear"),
    ],
)
def test_patterns_of_nothing_are_refused(table: dict, message: str):
    with pytest.raises(RequestError, match=message.replace(" to_q", "attn1.to_q")):
        names(**table)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"rank": 0}, "rank = 0 should be at least 1"),
        ({"alpha": 0.0}, "alpha = 0.0 should be above 0; nearest: 16"),
        ({"dropout": 1.0}, "dropout = 1.0"),
        ({"dora": True}, "dora = true: DoRA is read from files, but not trained"),
        ({"targets": "everything"}, "targets = 'everything' should be 'attention'"),
        ({"targets": ("(",)}, "no regular expression"),
        ({"targets": ()}, "leaves nothing to train"),
        ({"exclude": ("",)}, "an empty pattern"),
    ],
)
def test_illegal_tables_are_refused(table: dict, message: str):
    with pytest.raises(ValueError, match=message):
        LoraTraining(**table)


# What is frozen


def stepping(model: LoraModel, frozen: Params):
    """A step of the LoRA, and all that it is called with."""
    _, _, given, noise, sigma = case(*CASES["diffusion forcing"])
    told = {k: jnp.asarray(v) for k, v in given.items() if k not in ("x", "t")}
    batch = Batch(jnp.asarray(given["x"]), **told)

    def loss(params, batch, drawn):
        del drawn
        whole = model.model(params)
        return velocity_loss(whole, batch, jnp.asarray(noise), jnp.asarray(sigma)), {}

    first = model.init(0)
    optimizer = make_optimizer(OptimizerConfig(warmup=0), 10, first)
    step = make_step(loss, optimizer, frozen=frozen)
    return step, (init_state(first, optimizer, 0.0), batch, jax.random.key(0))


def products(text: str, kernel: tuple[int, int]) -> int:
    """How many products of a program have a kernel's shape: the gradients of such kernels."""
    shape = "x".join(map(str, kernel))
    return len(re.findall(rf"dot_general.*-> tensor<{shape}xf32>", text))


def test_what_is_frozen_is_given_and_is_in_no_state(small: LoraModel):
    step, given = stepping(small, small.frozen)
    text = step.func.lower(*given, **step.keywords).as_text()
    kernel = small.frozen["blocks.ffn.fc1.kernel"]
    assert np.asarray(kernel).tobytes().hex().upper() not in text
    baked = jax.jit(lambda x: x @ kernel[0]).lower(jnp.ones((1, kernel.shape[1]))).as_text()
    assert np.asarray(kernel[0]).tobytes().hex().upper() in baked
    assert given[0].params.keys() == small.init(0).keys()
    # Nor is anything computed of its gradients.
    assert products(text, kernel.shape[1:]) == 0
    _, given_all = stepping(small, {})
    every = {**small.frozen, **given[0].params}

    def loss(params):
        _, batch, _ = given_all
        noise, sigma = jnp.zeros_like(batch.latents), jnp.full((1, SHAPE.frames), 0.5)
        return velocity_loss(small.model(params), batch, noise, sigma)

    assert products(jax.jit(jax.grad(loss)).lower(every).as_text(), kernel.shape[1:]) > 0


# Files


def trained(folder: Path, lora: LoraTraining, dtype: object = np.float32):
    """A LoRA of a checkpoint, as after training, in both forms."""
    model = LoraModel.of(stored(folder).load(jnp.float32), lora)
    matrices = random_matrices(model)
    found = []
    for target in model.targets:
        for k in range(len(target.names["original"])):
            names = {f: target.names[f][k] for f in target.names}
            down, up = modules(model, matrices)[names["diffusers"]]
            found.append(TrainedProduct(names, down.astype(dtype), up.astype(dtype)))
    return model, matrices, found


OUTPUT_TOL = (
    1e-5  # relative; measured at most 5.4e-7 in diffusers + peft, 4.5e-7 merged, for either form
)


@pytest.mark.parametrize("rslora", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_file_gives_the_same_everywhere(checkpoints: Checkpoints, tmp_path: Path, rslora: bool):
    folder = checkpoints("df", "diffusers")
    lora = LoraTraining(rank=4, alpha=3.0, rslora=rslora, base="float32")
    model, matrices, products = trained(folder, lora)
    ours = forward_here(model, {**model.frozen, **matrices})
    files = {}
    for form in ("peft", "comfyui"):
        stream = lora_of_products(products, form, alpha=lora.stated_alpha, rslora=rslora)
        files[form] = tmp_path / f"{form}.safetensors"
        write_tensor_file(files[form], stream)
        assert relative(forward(loaded_by_diffusers(folder, files[form])), ours) < OUTPUT_TOL
        merged = torch_model(folder)
        merged.load_state_dict(
            {k: torch.tensor(v) for k, v in with_file(folder, files[form]).items()}
        )
        assert relative(forward(merged), ours) < OUTPUT_TOL
    assert relative(forward(torch_model(folder)), ours) > 100 * OUTPUT_TOL  # measured 0.49 and more
    # The negative twin: ComfyUI's form without alphas is of another scale.
    tensors = {k: v for k, v in load_file(files["comfyui"]).items() if not k.endswith("alpha")}
    save_file(tensors, tmp_path / "bare.safetensors")
    bare = forward(loaded_by_diffusers(folder, tmp_path / "bare.safetensors"))
    assert relative(bare, ours) > 100 * OUTPUT_TOL
    with safe_open(files["peft"], "np") as opened:
        stated = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert stated["transformer.r"] == 4
    assert stated["transformer.use_rslora"] is rslora


def forward_inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 16, 2, 4, 4), (1, 512, 32)
    latents, text = (torch.randn(shape, generator=generator) for shape in shapes)
    return latents, torch.tensor([500]), text


def forward_here(model: LoraModel, params: Params) -> np.ndarray:
    given = (jnp.asarray(x.numpy()) for x in forward_inputs())
    return np.asarray(model.model(params)(*given, fps=jnp.asarray([1])))


@torch.no_grad()
def forward(model: torch.nn.Module) -> np.ndarray:
    return model(*forward_inputs(), fps=torch.tensor([1]), return_dict=False)[0].numpy()


@pytest.mark.slow
def test_dropout_is_by_video_and_keeps_the_mean(small: LoraModel):
    lora = LoraTraining(**{**vars(LORA), "dropout": 0.5})
    config, oracle, *_ = case(*CASES["diffusion forcing"])
    model = LoraModel.of(jax_model(config, oracle), lora)
    params = {**model.frozen, **random_matrices(model)}
    keys = jax.random.key_data(jax.random.split(jax.random.key(0), 2))
    rng = np.random.default_rng(0)
    x, text = (rng.standard_normal(s).astype(np.float32) for s in ((2, 16, 2, 4, 4), (2, 11, 32)))
    t, fps = jnp.full((2, 2), 500.0), jnp.asarray([0, 1])

    @jax.jit
    def out(params, rows, keys):
        args = (jnp.asarray(v)[rows] for v in (x, t, text))
        whole = model.model(params, keys)
        return whole(*args, fps=fps[rows])

    both = np.asarray(out(params, jnp.asarray([0, 1]), keys))
    second = np.asarray(out(params, jnp.asarray([1]), keys[1:]))
    assert relative(second, both[1:]) < 1e-5
    other = np.asarray(out(params, jnp.asarray([1]), keys[:1]))
    assert relative(other, both[1:]) > 0.01
    assert nnx.state(model.model(params, keys).blocks.ffn.fc1)["lora_keys"].get_value().shape == (
        *(2, 2, 2),
    )
