"""Passes over the graph, one file each; `prepare` runs them in their order."""

import onnx_ir as ir

from twofour.builder.passes.activations import Activations
from twofour.builder.passes.attention import Attentions
from twofour.builder.passes.batch_norm import BatchNorms
from twofour.builder.passes.concat import ConcatInPlace
from twofour.builder.passes.constants import FoldConstants, fold
from twofour.builder.passes.dead_code import DeadCode
from twofour.builder.passes.elementwise import Elementwise
from twofour.builder.passes.epilogues import Epilogues
from twofour.builder.passes.identities import Identities
from twofour.builder.passes.infra import Rewrite
from twofour.builder.passes.layout import Layout
from twofour.builder.passes.linear import Linears
from twofour.builder.passes.norms import Norms
from twofour.builder.passes.pads import FoldPads
from twofour.builder.passes.patches import GatherPatches
from twofour.builder.passes.pointwise import FusePointwise
from twofour.builder.passes.precision import Precision
from twofour.builder.passes.scales import FoldScales
from twofour.builder.passes.shortcuts import MergeShortcuts
from twofour.builder.passes.squeeze_excite import SqueezeExcite
from twofour.builder.passes.transposes import SinkTransposes
from twofour.builder.passes.widen import WidenChannels

__all__ = [
    "Activations",
    "Attentions",
    "BatchNorms",
    "ConcatInPlace",
    "DeadCode",
    "Elementwise",
    "Epilogues",
    "FoldConstants",
    "FoldPads",
    "FoldScales",
    "FusePointwise",
    "GatherPatches",
    "Identities",
    "Layout",
    "Linears",
    "MergeShortcuts",
    "Norms",
    "Precision",
    "SinkTransposes",
    "SqueezeExcite",
    "WidenChannels",
    "fold",
    "pipeline",
    "prepare",
]


def pipeline(precision: str) -> list[Rewrite]:
    """Return the passes in their order: recognise, fold, lay out, fuse, place, copy, type."""
    recognise = [FoldConstants(), DeadCode(), Activations(), Norms(), BatchNorms(precision), FoldPads(), Attentions(), Linears()]
    lay_out = [SqueezeExcite(), Layout(), Elementwise(), SinkTransposes()]
    fuse = [Epilogues(precision), FusePointwise(), MergeShortcuts(), GatherPatches(), WidenChannels()]
    return [*recognise, FoldScales(precision), *lay_out, *fuse, ConcatInPlace(), Identities(), Precision(precision)]


def prepare(model: ir.Model, precision: str) -> ir.Model:
    """Return `model`, an imported graph, fused and laid out in place for `precision`."""
    for step in pipeline(precision):
        step(model)
    return model
