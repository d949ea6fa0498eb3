"""Matrix products and attention of ONNX, in float64."""

import numpy as np

from twofour.errors import InputError
from twofour.oracle.operators.common import Array, Attributes, Inputs, Operator, given, needed, wide
from twofour.oracle.operators.reductions import softmax


def run_gemm(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """Gemm: `alpha A B + beta C`."""
    a, b, c = wide(needed(inputs, 0)), wide(needed(inputs, 1)), given(inputs, 2)
    y = attributes.get("alpha", 1.0) * ((a.T if attributes.get("transA", 0) else a) @ (b.T if attributes.get("transB", 0) else b))
    return [y if c is None else y + attributes.get("beta", 1.0) * wide(c)]


def attention(q: Array, k: Array, v: Array, scale: float, *, causal: bool = False, bias: Array | None = None) -> Array:
    """Return `softmax(scale q k^T + bias) v` over the last two axes.

    Args:
        q: `[..., tokens, head]`. k, v: `[..., keys, head]`. causal: token t sees keys 0…t only.
    """
    scores = scale * (wide(q) @ np.swapaxes(wide(k), -1, -2))
    if bias is not None:
        scores = scores + (np.where(bias, 0.0, -np.inf) if bias.dtype == np.bool_ else wide(bias))
    if causal:
        scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
    return np.asarray(softmax(scores, -1) @ wide(v))


def run_attention(inputs: Inputs, attributes: Attributes, count: int) -> list[Array]:
    """Attention of opset 23 without caches: 4-D `[batch, heads, tokens, head]`, or 3-D with the numbers of heads as attributes."""
    if count > 1 or any(given(inputs, i) is not None for i in (4, 5)) or attributes.get("softcap", 0.0):
        raise InputError("oracle: Attention with caches, soft capping or further outputs is not computed here")
    q, k, v = (needed(inputs, i) for i in range(3))
    flat = q.ndim == 3
    if flat:
        heads = (int(attributes["q_num_heads"]), *[int(attributes["kv_num_heads"])] * 2)
        q, k, v = (x.reshape(*x.shape[:2], h, -1).swapaxes(1, 2) for x, h in zip((q, k, v), heads, strict=True))
    if k.shape[1] != q.shape[1]:
        k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scale = attributes.get("scale") or 1 / np.sqrt(q.shape[-1])
    y = attention(q, k, v, scale, causal=bool(attributes.get("is_causal", 0)), bias=given(inputs, 3))
    return [y.swapaxes(1, 2).reshape(y.shape[0], y.shape[2], -1) if flat else y]


PRODUCTS: dict[str, Operator] = {
    "MatMul": lambda inputs, _attributes, _count: [np.asarray(wide(needed(inputs, 0)) @ wide(needed(inputs, 1)))],
    "Gemm": run_gemm,
    "Einsum": lambda inputs, attributes, _count: [
        np.asarray(np.einsum(attributes["equation"], *(wide(needed(inputs, i)) for i in range(len(inputs)))))
    ],
    "Attention": run_attention,
}
