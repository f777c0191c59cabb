"""A causal transformer written out in NumPy: float64, no cache, all frames so far in every call."""

import math

import jax
import numpy as np
from flax import nnx

from skyreels_jax.models.transformer import WanModel
from skyreels_jax.ops.positions import axis_dims
from skyreels_jax.sampling.noise import noise_key


class PlainCausal:
    """A model's parameters, and its forward with each block of frames seeing what it is said to."""

    def __init__(self, model: WanModel):
        self.config = model.config
        state = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        self.weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state)

    def velocity(self, x, timesteps, text, blocks, seen, positions, *, y=None, clip=None):
        """The velocity of every frame of ``x`` [16, F, H, W].

        Args:
            x: the frames.
            timesteps: one a frame.
            text: one a block, ``[S, text_dim]``; a frame knows that of its own block.
            blocks: of each its first frame and the one after its last.
            seen: of each block, frames before it that it sees.
            positions: of each block, a function from a frame to its position.
            y: one a frame, ``[20, F, H, W]``.
            clip: image states.

        Keys of all layers (not rotated) and values are in ``self.kept`` afterwards, by frame.
        """
        self.kept = []
        w, config = self.weights, self.config
        frames, (rows, columns) = x.shape[1], (x.shape[2] // 2, x.shape[3] // 2)
        if y is not None:
            x = np.concatenate([x, y])
        patches = x.reshape(len(x), frames, rows, 2, columns, 2)
        patches = patches.transpose(1, 2, 4, 3, 5, 0).reshape(frames, rows * columns, -1)
        kernel = w["patch_embedding"]["kernel"].reshape(-1, config.dim)
        h = patches @ kernel + w["patch_embedding"]["bias"]
        e = mlp(w["time_embedding"], sinusoid(config.freq_dim, timesteps), silu)
        e0 = linear(w["time_projection"], silu(e)).reshape(frames, 6, -1)
        contexts = [self.contexts(words, clip) for words in text]
        for layer in range(config.num_layers):
            own = jax.tree.map(lambda leaf, layer=layer: leaf[layer], w["blocks"])
            h = self.layer(own, h, e0, contexts, blocks, seen, positions, (rows, columns))
        table = w["head"]["modulation"][None] + e[:, None]
        out = layer_norm(h) * (1 + table[:, None, 1]) + table[:, None, 0]
        out = linear(w["head"]["linear"], out)
        out = out.reshape(frames, rows, columns, 2, 2, -1).transpose(5, 0, 1, 3, 2, 4)
        return out.reshape(-1, frames, 2 * rows, 2 * columns)

    def contexts(self, text, clip):
        """Text (and image) as cross-attention takes it."""
        w = self.weights
        words = mlp(w["text_embedding"], text, gelu_tanh)
        if clip is None:
            return words, None
        image, eps = w["img_emb"], 1e-5
        h = layer_norm(clip, image["norm1"], eps)
        h = linear(image["fc1"], h)
        h = h * 0.5 * (1 + np.vectorize(math.erf)(h / np.sqrt(2)))
        return words, layer_norm(linear(image["fc2"], h), image["norm2"], eps)

    def layer(self, w, h, e0, contexts, blocks, seen, positions, size):
        """One block of the transformer, for all frames."""
        frames, patches, dim = h.shape
        heads = self.config.num_heads
        m = (w["modulation"][None] + e0)[:, :, None]
        a = layer_norm(h) * (1 + m[:, 1]) + m[:, 0]
        attn = w["self_attn"]
        q, k = (rms(attn[f"norm_{n}"], linear(attn[n], a)) for n in "qk")
        q, k, v = (z.reshape(frames, patches, heads, -1) for z in (q, k, linear(attn["v"], a)))
        self.kept.append((k, v))
        mixed = np.zeros_like(q)
        for number, (start, end) in enumerate(blocks):
            keys = [*seen[number], *range(start, end)]
            place = positions[number]
            turn = lambda z, at, place=place: rotate(z[at], [place(f) for f in at], size)  # noqa: E731
            out = attend(turn(q, list(range(start, end))), turn(k, keys), v[keys])
            mixed[start:end] = out.reshape(end - start, patches, heads, -1)
        h = h + linear(attn["o"], mixed.reshape(h.shape)) * m[:, 2]
        cross, n = w["cross_attn"], layer_norm(h, w["norm3"])
        q = rms(cross["norm_q"], linear(cross["q"], n)).reshape(frames, patches, heads, -1)
        added = np.zeros_like(h)
        for number, (start, end) in enumerate(blocks):
            out = 0
            for words, suffix in zip(contexts[number], ("", "_img"), strict=True):
                if words is not None:
                    k = rms(cross[f"norm_k{suffix}"], linear(cross[f"k{suffix}"], words))
                    v = linear(cross[f"v{suffix}"], words)
                    k, v = (z.reshape(1, len(words), heads, -1) for z in (k, v))
                    out = out + attend(q[start:end], k, v).reshape(end - start, patches, dim)
            added[start:end] = linear(cross["o"], out)
        h = h + added
        a = layer_norm(h) * (1 + m[:, 4]) + m[:, 3]
        return h + mlp(w["ffn"], a, gelu_tanh) * m[:, 5]


def linear(w, x):
    return x @ w["kernel"] + w["bias"]


def mlp(w, x, activation):
    return linear(w["fc2"], activation(linear(w["fc1"], x)))


def silu(x):
    return x / (1 + np.exp(-x))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def layer_norm(x, w=None, eps=1e-6):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)
    return x if w is None else x * w["scale"] + w["bias"]


def rms(w, x, eps=1e-6):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * w["scale"]


def sinusoid(dim, timesteps):
    angles = np.outer(timesteps, 10_000.0 ** (-np.arange(dim // 2) / (dim // 2)))
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)


def rotate(x, positions, size):
    """``x`` [F, P, N, K] turned by positions of frames, rows and columns."""
    rows, columns = np.divmod(np.arange(x.shape[1]), size[1])
    angles = [
        np.multiply.outer(at, 10_000.0 ** (-np.arange(0, dim, 2) / dim))
        for at, dim in zip((positions, rows, columns), axis_dims(x.shape[-1]), strict=True)
    ]
    shape = (len(positions), x.shape[1])
    angles[0] = np.broadcast_to(angles[0][:, None], (*shape, angles[0].shape[-1]))
    angles[1:] = [np.broadcast_to(a[None], (*shape, a.shape[-1])) for a in angles[1:]]
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * np.concatenate(angles, -1))[
        :, :, None
    ]
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


def attend(q, k, v):
    """Textbook attention of all tokens of ``q`` to all of ``k``, head by head."""
    q, k, v = (z.reshape(-1, *z.shape[2:]) for z in (q, k, v))
    scores = np.einsum("lnk,snk->nls", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("nls,snk->lnk", weights / weights.sum(-1, keepdims=True), v)


def seen_before(end: int, slots: int, sink: int) -> list[int]:
    """Frames before ``end`` that are seen: the first ones and the last ones, by the definition."""
    return [*range(min(sink, end)), *range(max(sink, end - (slots - sink)), end)]


def noise_of(
    seed: int, step: int, frames: range, size: tuple[int, int], *, context: bool = False
) -> np.ndarray:
    """What the sampler draws: ``[16, F, H, W]`` of a step (0: the start) for these frames.

    With ``context`` it is that over finished frames.
    """
    key = jax.random.fold_in(noise_key(seed, int(context)), step)
    draw = jax.jit(lambda n: jax.random.normal(jax.random.fold_in(key, n), (1, 16, *size)))
    return np.stack([np.asarray(draw(n), np.float64)[0] for n in frames], axis=1)


def decibels(got: np.ndarray, expected: np.ndarray) -> float:
    """Signal to noise."""
    error = np.mean((np.asarray(got, np.float64) - expected) ** 2)
    return 10 * np.log10(np.mean(expected**2) / error)
