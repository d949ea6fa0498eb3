"""Pieces on images."""

# mypy: disable-error-code="no-any-return"

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twofour.pruning.permutation.pieces import IMAGE, Build, Piece, conv, image, scale

aten = torch.ops.aten

# One piece for each function of a single value; those of positive numbers get them.
UNARY: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        ["relu", "relu6", "hardswish", "hardsigmoid", "silu", "gelu", "sigmoid", "tanh", "elu", "selu", "celu", "leaky_relu"], ()
    ),
    **dict.fromkeys(["mish", "softplus", "log_sigmoid", "exp", "abs", "neg", "sin", "cos", "erf", "square", "floor", "round"], ()),
    **dict.fromkeys(["sign", "expm1", "nan_to_num", "hardtanh", "clone", "alias", "detach"], ()),
    **{"pow": (2,), "clamp": (-1.0, 1.0), "clamp_min": (0.0,), "clamp_max": (0.5,), "threshold": (0.1, 0.0), "bitwise_not": ()},
    **{"isnan": (), "logical_not": ()},
}
POSITIVE = ["log", "sqrt", "rsqrt", "reciprocal", "log1p"]


def unary(name: str) -> Build:
    operation = getattr(aten, name)
    arguments = UNARY.get(name, ())

    def function(self: Any, x: Tensor) -> Tensor:
        if name == "bitwise_not":
            return x * aten.bitwise_not(x > 0)
        if name in ("isnan", "logical_not"):
            return torch.where(operation(x), x + 1, x)
        result: Tensor = operation(x.abs() + 0.5) if name in POSITIVE else operation(x, *arguments)
        return result + 0.1 * x

    return lambda c: Piece(function)


for _name in [*UNARY, *POSITIVE]:
    IMAGE[f"unary_{_name}"] = unary(_name)

# One piece for each function of two values.


def choose_by(compare: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda a, b: torch.where(compare(a, b), a, 0.5 * b)


def choose_by_signs(combine: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda a, b: torch.where(combine(a > 0, b > 0), a, b)


BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **{n: getattr(torch, n) for n in ("add", "sub", "mul", "rsub", "maximum", "minimum", "atan2")},
    **{n: choose_by(getattr(torch, n)) for n in ("eq", "ne", "lt", "le", "gt", "ge")},
    **{n: choose_by_signs(getattr(torch, n)) for n in ("logical_and", "logical_or", "bitwise_and", "bitwise_or")},
    "div": lambda a, b: a / (b.abs() + 0.5),
    "floor_divide": lambda a, b: torch.floor_divide(4 * a, b.abs() + 0.5) + a,
    "remainder": lambda a, b: torch.remainder(a, b.abs() + 0.5),
    "lerp": lambda a, b: torch.lerp(a, b, 0.3),
    "addcmul": lambda a, b: torch.addcmul(a, a, b),
    "addcdiv": lambda a, b: torch.addcdiv(a, b, a.abs() + 1),
    "masked_fill": lambda a, b: a.masked_fill(b > 1, 0.5),
    "max_of_two": lambda a, b: torch.max(a, b),
    "min_of_two": lambda a, b: torch.min(a, b),
}


def binary(function: Callable[[Tensor, Tensor], Tensor]) -> Build:
    return lambda c: Piece(lambda s, x: function(x, s.other(x)), other=conv(c, k=1))


for _name, _function in BINARY.items():
    IMAGE[f"binary_{_name}"] = binary(_function)


@image
def convolution(c: int) -> nn.Module:
    return conv(c)


@image
def residual(c: int) -> nn.Module:
    return Piece(
        lambda s, x: F.relu_(x + s.body(x)),
        body=nn.Sequential(conv(c), nn.BatchNorm2d(c), nn.ReLU(inplace=True), conv(c), nn.BatchNorm2d(c)),
    )


@image
def bottleneck(c: int) -> nn.Module:
    body = nn.Sequential(conv(c, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), conv(16, 16, groups=4), nn.ReLU(), conv(16, c, 1))
    return Piece(lambda s, x: x + s.body(x), body=body)


@image
def inverted(c: int) -> nn.Module:
    body = nn.Sequential(conv(c, 2 * c, 1), nn.BatchNorm2d(2 * c), nn.SiLU(), conv(2 * c, groups=2 * c), nn.SiLU(), conv(2 * c, c, 1))
    return Piece(lambda s, x: x + s.body(x), body=body)


@image
def depthwise_multiplier(c: int) -> nn.Module:
    return nn.Sequential(conv(c, 2 * c, groups=c), nn.GELU(), conv(2 * c, c, 1))


@image
def squeeze_excite(c: int) -> nn.Module:
    gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(c, 8, 1), nn.ReLU(), conv(8, c, 1), nn.Hardsigmoid())
    return Piece(lambda s, x: x * s.gate(x), gate=gate)


@image
def squeeze_excite_linear(c: int) -> nn.Module:
    gate = nn.Sequential(nn.Linear(c, 8), nn.ReLU(), nn.Linear(8, c), nn.Sigmoid())
    return Piece(lambda s, x: x * s.gate(x.mean((2, 3)))[:, :, None, None], gate=gate)


@image
def shuffle_by_views(c: int) -> nn.Module:
    return nn.Sequential(
        conv(c, groups=2),
        Piece(lambda s, x: x.view(x.shape[0], 2, c // 2, 8, 8).transpose(1, 2).reshape(x.shape[0], c, 8, 8)),
        conv(c, k=1),
    )


@image
def shuffle_by_name(c: int) -> nn.Module:
    return nn.Sequential(nn.ChannelShuffle(2), conv(c, k=1))


@image
def dense_block(c: int) -> nn.Module:
    return Piece(lambda s, x: s.join(torch.cat([x, s.a(x), s.a(F.relu(x))], 1)), a=conv(c, 8), join=conv(c + 16, c, 1))


@image
def halves(c: int) -> nn.Module:
    return Piece(lambda s, x: torch.cat([x[:, : c // 2], s.a(x[:, c // 2 :])], 1), a=conv(c // 2))


@image
def chunks(c: int) -> nn.Module:
    def function(s: Any, x: Tensor) -> Tensor:
        a, b = s.wide(x).chunk(2, 1)
        return a * torch.sigmoid(b)

    return Piece(function, wide=conv(c, 2 * c, 1))


@image
def uneven_split(c: int) -> nn.Module:
    def function(s: Any, x: Tensor) -> Tensor:
        a, b = torch.split(x, [c // 4, c - c // 4], 1)
        return torch.cat([s.a(a), b], 1)

    return Piece(function, a=conv(c // 4))


@image
def written_slice(c: int) -> nn.Module:
    def function(s: Any, x: Tensor) -> Tensor:
        y = x.clone()
        y[:, : c // 2] = s.a(x[:, : c // 2])
        return y

    return Piece(function, a=conv(c // 2))


@image
def written_place(c: int) -> nn.Module:
    def function(s: Any, x: Tensor) -> Tensor:
        y = x.clone()
        y[:, :, 0] = s.a(x)[:, :, 0]
        return y

    return Piece(function, a=conv(c))


@image
def pixel_shuffle(c: int) -> nn.Module:
    return nn.Sequential(conv(c, 4 * c), nn.PixelShuffle(2), conv(c, c, 2, stride=2), nn.AdaptiveAvgPool2d(8))


@image
def pixel_unshuffle(c: int) -> nn.Module:
    return nn.Sequential(nn.PixelUnshuffle(2), conv(4 * c, c, 1), nn.Upsample(scale_factor=2))


@image
def transposed(c: int) -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(c, c, 2, stride=2), nn.ReLU(), nn.MaxPool2d(2))


@image
def transposed_groups(c: int) -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(c, c, 3, padding=1, groups=2), conv(c, k=1))


@image
def in_one_dimension(c: int) -> nn.Module:
    body = nn.Sequential(
        *(nn.Conv1d(c, c, 3, padding=1), nn.BatchNorm1d(c), nn.ConvTranspose1d(c, c, 2, stride=2), nn.MaxPool1d(2), nn.AvgPool1d(2)),
        *(nn.Upsample(scale_factor=2), nn.AdaptiveAvgPool1d(32), nn.Upsample(scale_factor=2, mode="linear"), nn.ReflectionPad1d(1)),
        *(nn.ReplicationPad1d(1), nn.Conv1d(c, c, 5)),
    )
    return Piece(lambda s, x: s.body(x.flatten(2)).view(x.shape[0], c, 8, 8), body=body)


@image
def in_three_dimensions(c: int) -> nn.Module:
    body = nn.Sequential(
        *(
            nn.Conv3d(c, c, 3, padding=1),
            nn.BatchNorm3d(c),
            nn.ConvTranspose3d(c, c, 2, stride=2),
            nn.MaxPool3d(2),
            nn.Upsample(scale_factor=2),
        ),
        *(nn.AvgPool3d(2), nn.Upsample(scale_factor=2, mode="trilinear"), nn.AdaptiveAvgPool3d((1, 8, 8))),
    )
    return Piece(lambda s, x: s.body(x[:, :, None])[:, :, 0], body=body)


@image
def batch_norm(c: int) -> nn.Module:
    return nn.BatchNorm2d(c)


@image
def sync_batch_norm(c: int) -> nn.Module:
    return nn.SyncBatchNorm(c)


@image
def batch_norm_without_scale(c: int) -> nn.Module:
    return nn.BatchNorm2d(c, affine=False)


@image
def batch_norm_function(c: int) -> nn.Module:
    return Piece(lambda s, x: F.batch_norm(x, s.m, s.v, s.w, None), m=torch.zeros(c), v=torch.ones(c), w=scale(c))


@image
def batch_statistics(c: int) -> nn.Module:
    return nn.BatchNorm2d(c, track_running_stats=False)


@image
def group_norm(c: int) -> nn.Module:
    return nn.GroupNorm(2, c)


@image
def group_norm_one(c: int) -> nn.Module:
    return nn.GroupNorm(1, c)


@image
def instance_norm(c: int) -> nn.Module:
    return nn.InstanceNorm2d(c, affine=True, track_running_stats=True)


@image
def instance_norm_plain(c: int) -> nn.Module:
    return nn.InstanceNorm2d(c)


@image
def layer_norm_last(c: int) -> nn.Module:
    return Piece(lambda s, x: s.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), norm=nn.LayerNorm(c))


@image
def layer_norm_by_hand(c: int) -> nn.Module:
    def function(s: Any, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        return centred / (x.var(1, keepdim=True) + 1e-5).sqrt() * s.w[:, None, None] + s.b[:, None, None]

    return Piece(function, w=scale(c), b=scale(c))


@image
def statistics(c: int) -> nn.Module:
    def function(s: Any, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, dim=(2, 3), keepdim=True)
        deviation, other = x.std(1, keepdim=True), x.mean(1, keepdim=True)
        total = x.sum((2, 3), keepdim=True) + x.amax(1, keepdim=True) + x.amin((2, 3), keepdim=True) + x.std((2, 3), keepdim=True)
        return (x - mean) / (variance + 1) + other / (deviation + 1) + 0.01 * total + 0.01 * torch.logsumexp(x, 1, keepdim=True)

    return Piece(function)


@image
def truths(c: int) -> nn.Module:
    def function(s: Any, x: Tensor) -> Tensor:
        some, every = (x > 1).any(1, keepdim=True), (x > -9).all(1, keepdim=True)
        return torch.where(some & every & (x > 0) & (x < 2), x, 0.5 * x) * (1 + 0.01 * torch.sigmoid(x).prod(3, keepdim=True))

    return Piece(function)


@image
def extremes(c: int) -> nn.Module:
    return Piece(lambda s, x: x + 0.1 * x.max(2, keepdim=True)[0] + 0.1 * x.min(3, keepdim=True).values + x.max() + x.min())


@image
def global_response(c: int) -> nn.Module:
    def function(s: Any, x: Tensor) -> Tensor:
        size = torch.linalg.vector_norm(x, 2, (2, 3), keepdim=True)
        return x + s.g * x * size / (size.mean(1, keepdim=True) + 1e-6)

    return Piece(function, g=scale(1, c, 1, 1))


@image
def layer_scale(c: int) -> nn.Module:
    return Piece(lambda s, x: x + s.gamma * s.a(x), gamma=scale(c, 1, 1), a=conv(c))


@image
def buffer_scale(c: int) -> nn.Module:
    return Piece(lambda s, x: x * s.gamma, gamma=torch.randn(1, c, 1, 1))


@image
def prelu(c: int) -> nn.Module:
    return nn.PReLU(c)


@image
def prelu_shared(c: int) -> nn.Module:
    return nn.PReLU()


@image
def softmax_over_channels(c: int) -> nn.Module:
    return Piece(lambda s, x: x + F.softmax(x, 1) + 0.1 * F.log_softmax(x, 1))


@image
def channel_padding(c: int) -> nn.Module:
    grown = conv(c, 2 * c, 3)
    return Piece(lambda s, x: s.join(F.relu(F.pad(x, (0, 0, 0, 0, c // 2, c // 2)) + s.grow(x))), grow=grown, join=conv(2 * c, c, 1))


@image
def pixel_paddings(c: int) -> nn.Module:
    body = nn.Sequential(nn.ZeroPad2d(1), nn.ReflectionPad2d(1), nn.ReplicationPad2d(1), nn.CircularPad2d(1), nn.Conv2d(c, c, 9))
    return Piece(lambda s, x: s.body(x), body=body)


@image
def cropped(c: int) -> nn.Module:
    return Piece(lambda s, x: F.pad(F.pad(s.a(x), (-1, 1)), (0, 0, 1, -1), value=0.3), a=conv(c))


@image
def pools(c: int) -> nn.Module:
    body = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1), nn.AdaptiveMaxPool2d(4), nn.Upsample(scale_factor=2))
    return Piece(lambda s, x: s.body(x) + F.max_pool2d(x, 3, 1, 1, return_indices=True)[0], body=body)


@image
def resized(c: int) -> nn.Module:
    def function(s: Any, x: Tensor) -> Tensor:
        y = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
        return y + F.interpolate(x, size=(8, 8), mode="bicubic") + F.interpolate(x[:, :, ::2], size=(8, 8))

    return Piece(function)


@image
def smoothed(c: int) -> nn.Module:
    def function(s: Any, x: Tensor) -> Tensor:
        y = F.interpolate(x, size=(4, 4), mode="bilinear", antialias=True)
        return x + F.interpolate(F.interpolate(y, size=(3, 3), mode="bicubic", antialias=True), size=(8, 8))

    return Piece(function)


@image
def dropouts(c: int) -> nn.Module:
    return nn.Sequential(nn.Dropout(0.2), conv(c), nn.Dropout2d(0.1))


@image
def stochastic_depth(c: int) -> nn.Module:
    def function(s: Any, x: Tensor) -> Tensor:
        y: Tensor = s.a(x)
        return x + (y * y.new_empty(y.shape[0], 1, 1, 1).bernoulli_(0.8) if s.training else y)

    return Piece(function, a=conv(c))


@image
def constants(c: int) -> nn.Module:
    def function(s: Any, x: Tensor) -> Tensor:
        b = x.shape[0]
        made = [torch.zeros(b, 2, 8, 8), x.new_ones(b, 2, 8, 8), torch.full((b, 2, 8, 8), 0.5), x.new_full((b, 2, 8, 8), 2.0)]
        likes = [torch.zeros_like(x[:, :2]), torch.ones_like(x[:, :2]), torch.full_like(x[:, :2], 0.3), x.new_zeros(b, 2, 8, 8)]
        return s.join(torch.cat([x, *(m.to(x.dtype) for m in made), *likes, torch.ones(b, 2, 8, 8).to(x.dtype)], 1))

    return Piece(function, join=conv(c + 18, c, 1))


@image
def cast(c: int) -> nn.Module:
    return Piece(lambda s, x: s.a(x).to(torch.float16).to(x.dtype).type_as(x), a=conv(c))


@image
def each_repeated(c: int) -> nn.Module:
    return Piece(lambda s, x: s.a(x.repeat_interleave(2, 1)), a=conv(2 * c, c, 1))


@image
def filled(c: int) -> nn.Module:
    return Piece(lambda s, x: x + x.clone().fill_(0.5) * torch.scalar_tensor(2.0))


@image
def gated_linear_unit(c: int) -> nn.Module:
    return nn.Sequential(conv(c, 2 * c, 1), nn.GLU(1))


@image
def shared(c: int) -> nn.Module:
    return Piece(lambda s, x: s.a(F.relu(s.a(x))), a=conv(c))


@image
def through_linear(c: int) -> nn.Module:
    down = nn.Linear(c * 4, c * 4)
    return Piece(lambda s, x: F.interpolate(s.a(F.adaptive_avg_pool2d(x, 2).flatten(1)).unflatten(1, (c, 2, 2)), size=(8, 8)), a=down)


@image
def through_fixed_linear(c: int) -> nn.Module:
    return Piece(lambda s, x: x + (F.adaptive_avg_pool2d(x, 1).reshape(x.shape[0], c) @ s.w)[..., None, None], w=scale(c, c))


@image
def affine_products(c: int) -> nn.Module:
    def function(s: Any, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3))
        y = torch.addmm(s.b, pooled, s.w.t()) + torch.mm(pooled, s.w)
        wide = torch.baddbmm(s.b[None, None].expand(x.shape[0], 1, c), pooled[:, None], s.w[None].expand(x.shape[0], c, c))
        return x + 0.1 * (y + wide[:, 0])[..., None, None]

    return Piece(function, w=scale(c, c), b=scale(c))


@image
def einsum(c: int) -> nn.Module:
    return Piece(lambda s, x: torch.einsum("bchw,oc->bohw", x, s.w), w=scale(c, c))


@image
def windows(c: int) -> nn.Module:
    def function(s: Any, x: Tensor) -> Tensor:
        columns = F.unfold(x, 2, stride=2)
        return s.a(F.fold(columns, (8, 8), 2, stride=2))

    return Piece(function, a=conv(c))


@image
def sliding(c: int) -> nn.Module:
    return Piece(lambda s, x: x + x.unfold(2, 2, 2).mean(-1).repeat_interleave(2, 2), a=conv(c))


@image
def standardized_weight(c: int) -> nn.Module:
    def function(s: Any, x: Tensor) -> Tensor:
        w = s.w
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-3)
        return F.conv2d(x, w * s.g, s.b, padding=1)

    return Piece(function, w=scale(c, c, 3, 3), g=scale(c, 1, 1, 1), b=scale(c))


@image
def normalized(c: int) -> nn.Module:
    return Piece(lambda s, x: F.normalize(x, dim=1) * s.g, g=scale(c, 1, 1))


@image
def stacked(c: int) -> nn.Module:
    return Piece(lambda s, x: torch.stack([x, s.a(x), F.relu(x)], 1).sum(1), a=conv(c))


@image
def selective(c: int) -> nn.Module:
    def function(s: Any, x: Tensor) -> Tensor:
        both = torch.stack([s.a(x), s.b(x)], 1)
        weight = s.gate(both.sum(1).mean((2, 3))).view(-1, 2, c).softmax(1)
        return (both * weight[..., None, None]).sum(1)

    return Piece(function, a=conv(c), b=conv(c, k=1), gate=nn.Linear(c, 2 * c))


@image
def unbound(c: int) -> nn.Module:
    def function(s: Any, x: Tensor) -> Tensor:
        a, b = x.view(x.shape[0], 2, c // 2, 8, 8).unbind(1)
        return torch.cat([a * torch.tanh(b), s.a(b)], 1)

    return Piece(function, a=conv(c // 2))


@image
def repeated(c: int) -> nn.Module:
    return Piece(lambda s, x: s.a(x.repeat(1, 2, 1, 1)) + x[:, :, :1].expand(-1, -1, 8, -1), a=conv(2 * c, c, 1))


@image
def turned(c: int) -> nn.Module:
    return Piece(lambda s, x: s.a(torch.roll(x.flip(3), 2, 2)) + s.b(x.flip(1)) + s.b(torch.roll(x, 3, 1)), a=conv(c), b=conv(c, k=1))


@image
def looked_up(c: int) -> nn.Module:
    def function(s: Any, x: Tensor) -> Tensor:
        rows = x[:, :, s.i]
        picked = torch.index_select(x, 3, s.i)
        gathered = torch.gather(x, 2, s.i.view(1, 1, 8, 1).expand(x.shape[0], c, 8, 8))
        return rows + picked + gathered

    return Piece(function, i=torch.tensor([7, 0, 1, 2, 3, 4, 5, 6]))


@image
def counted(c: int) -> nn.Module:
    def function(s: Any, x: Tensor) -> Tensor:
        grid = torch.arange(8, dtype=x.dtype) + torch.linspace(0, 1, 8, dtype=x.dtype)
        return x + 0.1 * grid[:, None]

    return Piece(function)


@image
def squeezed(c: int) -> nn.Module:
    return Piece(lambda s, x: x + s.a(x.mean((2, 3), keepdim=True).squeeze(-1).squeeze(-1)).unsqueeze(-1)[..., None], a=nn.Linear(c, c))


@image
def noise(c: int) -> nn.Module:
    def function(s: Any, x: Tensor) -> Tensor:
        drawn = torch.rand(x.shape[0], 1, 1, 1, dtype=x.dtype) + torch.randn(x.shape[0], 1, 1, 1, dtype=x.dtype)
        return x + 0.1 * drawn

    return Piece(function)


# Pieces that stop a permutation: nothing may move across them.
@image
def efficient_channel_attention(c: int) -> nn.Module:
    gate = nn.Conv1d(1, 1, 3, padding=1)
    return Piece(lambda s, x: x * torch.sigmoid(s.gate(x.mean((2, 3))[:, None]))[:, 0, :, None, None], gate=gate)


@image
def accumulated(c: int) -> nn.Module:
    return Piece(lambda s, x: x + 0.1 * x.cumsum(1))


@image
def sorted_channels(c: int) -> nn.Module:
    return Piece(lambda s, x: x + x.sort(1).values)


@image
def chosen_channel(c: int) -> nn.Module:
    return Piece(lambda s, x: x * x[:, 2:3] + x[:, 5].unsqueeze(1))


@image
def unknown_operation(c: int) -> nn.Module:
    return Piece(lambda s, x: x + torch.special.entr(torch.sigmoid(x)) + torch.fft.fft(x, dim=1).real)


@image
def spread_order(c: int) -> nn.Module:
    return Piece(lambda s, x: x * s.order.view(1, c, 1, 1) + torch.linspace(0, 1, c, dtype=x.dtype)[:, None, None], order=torch.arange(c))
