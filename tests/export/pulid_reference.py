"""PuLID once more, in float64 numpy, from the published arithmetic: towers, encoders, attention.

Weights are a state dict of numpy arrays under the published names. Shape legend: S positions,
K width, T tokens, H heads, N query positions, D head size.
"""

import numpy as np


def linear(x, state, name):
    y = x @ state[f"{name}.weight"].T
    return y + state[f"{name}.bias"] if f"{name}.bias" in state else y


def layer_norm(x, state, name, epsilon=1e-5):
    centred = x - x.mean(-1, keepdims=True)
    unit = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    return unit * state[f"{name}.weight"] + state[f"{name}.bias"]


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def gelu(x):
    from math import erf

    return 0.5 * x * (1 + np.vectorize(erf)(x / np.sqrt(2)))


def heads(x, size):
    return np.stack(np.split(x, x.shape[-1] // size, axis=-1), axis=-3)


def merge(x):
    return np.concatenate(list(np.moveaxis(x, -3, 0)), axis=-1)


def attend(q, k, v):
    return softmax(q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])) @ v


def mapping(x, state, name):
    for first in (0, 3):
        x = layer_norm(linear(x, state, f"{name}.{first}"), state, f"{name}.{first + 1}")
        x = np.where(x > 0, x, 0.01 * x)
    return linear(x, state, f"{name}.6")


def id_former(state, face, clip, hidden, zero_tokens):
    """Version 1.1: face [E], clip [P], hidden [5,S,K] of one person."""
    width = state["latents"].shape[-1]
    identity = mapping(np.concatenate((face, clip)), state, "id_embedding_mapping")
    identity = identity.reshape(-1, width)
    queries = state["latents"][0]
    x = np.concatenate((queries, identity))
    depth = max(int(key.split(".")[1]) for key in state if key.startswith("layers.")) + 1
    for layer in range(depth):
        level = layer // (depth // 5)
        context = np.concatenate((identity, mapping(hidden[level], state, f"mapping_{level}")))
        attention, forward = f"layers.{layer}.0", f"layers.{layer}.1"
        normed = layer_norm(x, state, f"{attention}.norm2")
        seen = np.concatenate((layer_norm(context, state, f"{attention}.norm1"), normed))
        k, v = np.split(linear(seen, state, f"{attention}.to_kv"), 2, axis=-1)
        q = linear(normed, state, f"{attention}.to_q")
        attended = merge(attend(heads(q, 64), heads(k, 64), heads(v, 64)))
        x = x + linear(attended, state, f"{attention}.to_out")
        inner = gelu(linear(layer_norm(x, state, f"{forward}.0"), state, f"{forward}.1"))
        x = x + linear(inner, state, f"{forward}.3")
    tokens = x[: len(queries)] @ state["proj_out"]
    return np.concatenate((tokens, np.zeros((zero_tokens, tokens.shape[-1]))))


def id_encoder(state, face, clip, hidden, zero_tokens):
    """Version 1; arguments as of `id_former`."""
    tokens = mapping(np.concatenate((face, clip)), state, "body").reshape(5, -1)
    levels = [
        mapping(states[:1], state, f"mapping_{i}")
        + mapping(states[1:], state, f"mapping_patch_{i}").mean(0, keepdims=True)
        for i, states in enumerate(hidden)
    ]
    return np.concatenate((tokens, *levels, np.zeros((zero_tokens, tokens.shape[-1]))))


def turn(x, side, size):
    """Rotary positions of patches [side², D] as complex numbers: pairs of channels are one."""
    pairs = x[..., 0::2] + 1j * x[..., 1::2]
    angle = np.zeros((side * side, size // 2))
    for patch in range(side * side):
        for place, offset in ((patch // side, 0), (patch % side, size // 4)):
            for i in range(size // 4):
                frequency = 10000.0 ** (-4 * i / size)
                angle[patch, offset + i] = place / side * 16 * frequency
    turned = pairs * np.exp(1j * angle)
    return np.stack((turned.real, turned.imag), axis=-1).reshape(x.shape)


def eva_tower(state, pixels, size):
    """One picture [3,h,w] to the unit embedding [P] and the five levels [5,S,K]."""
    kernel = state["patch_embed.proj.weight"]
    patch, side = kernel.shape[-1], pixels.shape[-1] // kernel.shape[-1]
    patches = [
        np.tensordot(kernel, pixels[:, r : r + patch, c : c + patch], 3)
        for r in range(0, side * patch, patch)
        for c in range(0, side * patch, patch)
    ]
    x = np.stack(patches) + state["patch_embed.proj.bias"]
    x = np.concatenate((state["cls_token"][0], x)) + state["pos_embed"][0]
    levels = []
    depth = max(int(key.split(".")[1]) for key in state if key.startswith("blocks.")) + 1
    for index in range(depth):
        if index in (4, 8, 12, 16, 20):
            levels.append(x)
        block = f"blocks.{index}"
        normed = layer_norm(x, state, f"{block}.norm1", 1e-6)
        q, k, v = (linear(normed, state, f"{block}.attn.{n}_proj") for n in "qkv")
        q, v = q + state[f"{block}.attn.q_bias"], v + state[f"{block}.attn.v_bias"]
        q, k, v = (heads(y, size) for y in (q, k, v))
        q, k = (np.concatenate((y[:, :1], turn(y[:, 1:], side, size)), axis=1) for y in (q, k))
        attended = layer_norm(merge(attend(q, k, v)), state, f"{block}.attn.inner_attn_ln", 1e-6)
        x = x + linear(attended, state, f"{block}.attn.proj")
        normed = layer_norm(x, state, f"{block}.norm2", 1e-6)
        gate = linear(normed, state, f"{block}.mlp.w1")
        gated = gate / (1 + np.exp(-gate)) * linear(normed, state, f"{block}.mlp.w2")
        gated = layer_norm(gated, state, f"{block}.mlp.ffn_ln", 1e-6)
        x = x + linear(gated, state, f"{block}.mlp.w3")
    embedding = linear(layer_norm(x, state, "norm", 1e-6)[0], state, "head")
    return embedding / np.sqrt((embedding**2).sum()), np.stack(levels)


def orthogonal(image, text, q, k, variant, ip_scale):
    """What one branch adds to its text attention: all [H,N,D], k [H,T,D]; image without λ."""
    image, text = merge(image), merge(text)
    projection = (text * image).sum(0) / (text * text).sum(0) * text
    if variant == "v1":
        return ip_scale * (image - projection)
    of_face = softmax(q @ k.swapaxes(-1, -2)).mean(0)[:, :5].sum(-1, keepdims=True)
    return ip_scale * (image + (of_face - 1) * projection)
