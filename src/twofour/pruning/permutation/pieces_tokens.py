"""Pieces on tokens: feed-forward, attention, mixing."""

# mypy: disable-error-code="no-any-return"

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twofour.pruning.permutation.pieces import Piece, scale, tokens


def mlp(c: int) -> nn.Module:
    return nn.Sequential(nn.Linear(c, 2 * c), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * c, c))


@tokens
def feed_forward(c: int) -> nn.Module:
    return Piece(lambda s, x: x + s.body(s.norm(x)), norm=nn.LayerNorm(c), body=mlp(c))


@tokens
def gated_feed_forward(c: int) -> nn.Module:
    return Piece(
        lambda s, x: x + s.out(F.silu(s.gate(s.norm(x))) * s.up(x)),
        norm=nn.RMSNorm(c),
        gate=nn.Linear(c, 2 * c),
        up=nn.Linear(c, 2 * c),
        out=nn.Linear(2 * c, c),
    )


@tokens
def gated_slices(c: int) -> nn.Module:
    def function(s: Any, x: Tensor) -> Tensor:
        y = s.up(x)
        return x + s.out(F.gelu(y[..., : 2 * c]) * y[..., 2 * c :])

    return Piece(function, up=nn.Linear(c, 4 * c), out=nn.Linear(2 * c, c))


@tokens
def attention_module(c: int) -> nn.Module:
    return Piece(lambda s, x: x + s.attention(x, x, x, need_weights=False)[0], attention=nn.MultiheadAttention(c, 2, batch_first=True))


@tokens
def encoder_layer(c: int) -> nn.Module:
    return nn.TransformerEncoderLayer(c, 2, 2 * c, batch_first=True, norm_first=True)


@tokens
def attention_fused(c: int) -> nn.Module:
    def function(s: Any, x: Tensor) -> Tensor:
        q, k, v = s.qkv(s.norm(x)).reshape(x.shape[0], 16, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=s.bias.to(x.dtype))
        return x + s.out(y.transpose(1, 2).reshape(x.shape[0], 16, c))

    return Piece(function, norm=nn.LayerNorm(c), qkv=nn.Linear(c, 3 * c), out=nn.Linear(c, c), bias=scale(2, 16, 16))


@tokens
def attention_by_hand(c: int) -> nn.Module:
    def function(s: Any, x: Tensor) -> Tensor:
        q, k, v = (m(x).view(x.shape[0], 16, 2, c // 2).transpose(1, 2) for m in (s.q, s.k, s.v))
        weights = (q @ k.transpose(-2, -1) / math.sqrt(c)).softmax(-1)
        y = torch.bmm(weights.flatten(0, 1), v.flatten(0, 1)).view(x.shape[0], 2, 16, c // 2)
        return x + s.out(y.transpose(1, 2).flatten(2))

    return Piece(function, q=nn.Linear(c, c), k=nn.Linear(c, c), v=nn.Linear(c, c), out=nn.Linear(c, c))


@tokens
def grouped_queries(c: int) -> nn.Module:
    def function(s: Any, x: Tensor) -> Tensor:
        b = x.shape[0]
        q = s.q(x).view(b, 16, 4, c // 4).transpose(1, 2)
        k, v = (m(x).view(b, 16, 2, c // 4).transpose(1, 2) for m in (s.k, s.v))
        angle = s.frequency[None] * torch.arange(16, dtype=x.dtype)[:, None]
        cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)

        def turn(t: Tensor) -> Tensor:
            left, right = t.chunk(2, -1)
            return t * cos + torch.cat([-right, left], -1) * sin

        k, v = turn(k), v
        k, v = (t[:, :, None].expand(b, 2, 2, 16, c // 4).reshape(b, 4, 16, c // 4) for t in (k, v))
        y = F.scaled_dot_product_attention(turn(q), k, v, is_causal=True)
        return x + s.out(y.transpose(1, 2).reshape(b, 16, c))

    parts = {"q": nn.Linear(c, c), "k": nn.Linear(c, c // 2), "v": nn.Linear(c, c // 2), "out": nn.Linear(c, c)}
    return Piece(function, frequency=torch.rand(c // 8), **parts)


@tokens
def few_key_heads(c: int) -> nn.Module:
    def function(s: Any, x: Tensor) -> Tensor:
        q = s.q(x).view(x.shape[0], 16, 4, c // 4).transpose(1, 2)
        k, v = (m(x).view(x.shape[0], 16, 2, c // 4).transpose(1, 2) for m in (s.k, s.v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return x + s.out(y.transpose(1, 2).reshape(x.shape[0], 16, c))

    return Piece(function, q=nn.Linear(c, c), k=nn.Linear(c, c // 2), v=nn.Linear(c, c // 2), out=nn.Linear(c, c))


@tokens
def class_token(c: int) -> nn.Module:
    def function(s: Any, x: Tensor) -> Tensor:
        y = torch.cat([s.token.expand(x.shape[0], -1, -1), x], 1) + s.position
        return y[:, 1:] + y[:, 0].unsqueeze(1) * s.a(y).mean(1, keepdim=True)

    return Piece(function, token=scale(1, 1, c), position=scale(1, 17, c), a=nn.Linear(c, c))


@tokens
def token_mixer(c: int) -> nn.Module:
    return Piece(
        lambda s, x: x + s.mix(s.norm(x).transpose(1, 2)).transpose(1, 2),
        norm=nn.LayerNorm(c),
        mix=nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)),
    )


@tokens
def spatial_gate(c: int) -> nn.Module:
    def function(s: Any, x: Tensor) -> Tensor:
        a, b = s.up(x).chunk(2, -1)
        return s.down(a * s.mix(s.norm(b).mT).mT)

    return Piece(function, up=nn.Linear(c, 2 * c), norm=nn.LayerNorm(c), mix=nn.Linear(16, 16), down=nn.Linear(c, c))


@tokens
def over_time(c: int) -> nn.Module:
    return Piece(lambda s, x: x + s.a(x.transpose(1, 2)).transpose(1, 2), a=nn.Conv1d(c, c, 3, padding=1))


@tokens
def embedded(c: int) -> nn.Module:
    return Piece(lambda s, x: x + s.table(s.ids) + s.table.weight[s.ids % 5], table=nn.Embedding(20, c), ids=torch.arange(16))


@tokens
def window_partition(c: int) -> nn.Module:
    def function(s: Any, x: Tensor) -> Tensor:
        y = x.view(x.shape[0], 2, 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        y = s.a(y) + s.bias[s.index]
        return y.view(-1, 2, 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(x.shape)

    return Piece(function, a=nn.Linear(c, c), bias=scale(7, c), index=torch.tensor([0, 6, 2, 3]))


@tokens
def patch_merging(c: int) -> nn.Module:
    def function(s: Any, x: Tensor) -> Tensor:
        y = x.view(x.shape[0], 4, 4, c)
        y = torch.cat([y[:, 0::2, 0::2], y[:, 1::2, 0::2], y[:, 0::2, 1::2], y[:, 1::2, 1::2]], -1)
        return x + s.a(s.norm(y)).view(x.shape[0], 4, c).repeat_interleave(4, 1)

    return Piece(function, norm=nn.LayerNorm(4 * c), a=nn.Linear(4 * c, c))
