"""The table of architectures: what is permuted in each, what it keeps, and what stops the rest.

Every network is fresh (no weights are downloaded), so the table shows what the analysis reaches; what permutation buys trained networks
is measured apart, by `evidence/permutation.py gains`.
"""

import importlib
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from twofour.pruning.permutation.capture import Inputs
from twofour.pruning.permutation.permute import permute
from twofour.pruning.permutation.proof import difference, run, widened
from twofour.sources.torchvision_compat import import_torchvision

SEARCH_SECONDS = 2.0


@dataclass
class Row:
    """One architecture.

    Attributes:
        name: `library:model`.
        eligible: weights that count (layers).
        permuted: of these, how many were reordered along their input channels.
        free_share: elements of the weights that count whose input channels may move, over all of them.
        kept_before: magnitude kept by 2:4 in the old order, over all.
        kept_after: the same in the new order.
        error: largest relative difference of any output in the proof, float64.
        applied_error: the same for the model itself before and after, float64.
        refusals: what stops a weight -> how many weights it stops.
        failure: why nothing could be done, empty otherwise.
        seconds: wall time.
    """

    name: str
    eligible: int = 0
    permuted: int = 0
    free_share: float = 0.0
    kept_before: float = 0.0
    kept_after: float = 0.0
    error: float = 0.0
    applied_error: float = 0.0
    refusals: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    failure: str = ""
    seconds: float = 0.0


# name -> input size in pixels, as small as the architecture allows.
TORCHVISION = {
    **dict.fromkeys(["resnet18", "resnet50", "wide_resnet50_2", "resnext50_32x4d", "regnet_x_400mf", "regnet_y_400mf", "densenet121"], 64),
    **dict.fromkeys(["mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "efficientnet_b0", "mnasnet1_0"], 64),
    **dict.fromkeys(["shufflenet_v2_x1_0", "squeezenet1_0", "squeezenet1_1", "convnext_tiny", "swin_t", "swin_v2_t"], 64),
    # Batch statistics of fewer than 4 x 4 pixels, 40 layers deep, amplify rounding above the proof's limit.
    "efficientnet_v2_s": 128,
    **{"vgg11": 64, "vgg16_bn": 64, "alexnet": 96, "googlenet": 96, "inception_v3": 96, "vit_b_16": 224, "vit_b_32": 224, "maxvit_t": 224},
    **{"segmentation.fcn_resnet50": 64, "segmentation.deeplabv3_resnet50": 64, "segmentation.lraspp_mobilenet_v3_large": 64},
}
TIMM = {
    **dict.fromkeys(
        ["resnet26d", "seresnet50", "ecaresnet26t", "skresnet18", "res2net50_26w_4s", "resnest14d", "regnety_002", "repvgg_a0"], 64
    ),
    **dict.fromkeys(["hrnet_w18_small", "ghostnet_100", "mobilenetv4_conv_small", "efficientnet_lite0", "mixnet_s", "rexnet_100"], 64),
    **dict.fromkeys(
        ["tinynet_a", "convnextv2_atto", "dla34", "ese_vovnet19b_dw", "selecsls42b", "dpn48b", "cspresnet50", "hgnetv2_b0"], 64
    ),
    **dict.fromkeys(
        ["fasternet_t0", "repvit_m0_9", "starnet_s1", "mambaout_femto", "poolformer_s12", "poolformerv2_s12", "caformer_s18"], 64
    ),
    **dict.fromkeys(["pvt_v2_b0", "edgenext_xx_small", "mobilevit_xxs", "mobileone_s0", "efficientvit_b0", "inception_next_atto"], 64),
    **dict.fromkeys(["deit_tiny_patch16_224", "beit_base_patch16_224", "cait_xxs24_224", "xcit_nano_12_p16_224", "mixer_s32_224"], 224),
    **dict.fromkeys(["resmlp_12_224", "gmlp_ti16_224", "coatnet_nano_rw_224", "volo_d1_224", "twins_svt_small", "levit_128s"], 224),
    **{"crossvit_tiny_240": 240, "visformer_tiny": 224, "eva02_tiny_patch14_224": 224, "pit_ti_224": 224, "convit_tiny": 224},
    **{"efficientformer_l1": 224, "fastvit_t8": 64, "swiftformer_xs": 224, "davit_tiny": 64, "focalnet_tiny_srf": 64, "nf_resnet26": 64},
}
TRANSFORMERS = ["bert", "gpt2", "llama", "t5", "whisper", "clip", "mistral", "modernbert"]


def architectures() -> list[str]:
    """Every row's name, `library:model`."""
    return [
        *(f"torchvision:{n}" for n in TORCHVISION),
        *(f"timm:{n}" for n in TIMM),
        *(f"transformers:{n}" for n in TRANSFORMERS),
    ]


def build(name: str) -> tuple[nn.Module, Any, dict[str, int] | None]:
    """A fresh network, example inputs for it, and the weights that count where that is not what `prune` would prune."""
    library, _, model = name.partition(":")
    torch.manual_seed(0)
    import_torchvision()
    if library == "transformers":
        return _transformer(model)
    size = TORCHVISION[model] if library == "torchvision" else TIMM[model]
    example = torch.randn(2, 3, size, size)
    if library == "torchvision":
        models = importlib.import_module("torchvision.models")
        options: dict[str, Any] = {"weights": None}
        if model.startswith("segmentation."):
            options["weights_backbone"] = None
        elif model in ("googlenet", "inception_v3"):
            options["init_weights"] = False
        return models.get_model(model.rpartition(".")[2], **options), example, None
    timm = importlib.import_module("timm")
    fixed = {} if size == 64 or "_224" in model or "_240" in model else {"img_size": size}
    try:
        return timm.create_model(model, pretrained=False, **fixed), example, None
    except TypeError:
        return timm.create_model(model, pretrained=False), example, None


def _transformer(model: str) -> tuple[nn.Module, Any, dict[str, int] | None]:
    t = importlib.import_module("transformers")
    ids = torch.randint(3, 100, (2, 12))
    small = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model == "bert":
        return t.BertForSequenceClassification(t.BertConfig(**small)), text, None
    if model == "gpt2":
        network = t.GPT2LMHeadModel(t.GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64))
        # GPT-2 holds its linears as [in, out].
        targets = {n: 0 for n, p in network.named_parameters() if p.ndim == 2 and ".h." in n}
        return network, {"input_ids": ids}, targets
    if model in ("llama", "mistral"):
        config, network = {"llama": (t.LlamaConfig, t.LlamaForCausalLM), "mistral": (t.MistralConfig, t.MistralForCausalLM)}[model]
        return network(config(**small, num_key_value_heads=2, max_position_embeddings=64)), {"input_ids": ids}, None
    if model == "t5":
        config = t.T5Config(vocab_size=128, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")
        return t.T5ForConditionalGeneration(config), {"input_ids": ids, "decoder_input_ids": ids[:, :7]}, None
    if model == "whisper":
        config = t.WhisperConfig(
            **{
                "vocab_size": 128,
                "d_model": 64,
                "encoder_layers": 2,
                "decoder_layers": 2,
                "encoder_attention_heads": 4,
                "num_mel_bins": 16,
            },
            **{"decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_source_positions": 16},
            **{"max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
        )
        network = t.WhisperForConditionalGeneration(config)
        return network, {"input_features": torch.randn(2, 16, 32), "decoder_input_ids": ids[:, :7]}, None
    if model == "clip":
        heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "hidden_size": 64}
        config = t.CLIPConfig(
            text_config={"vocab_size": 128, "max_position_embeddings": 16, "eos_token_id": 127, "bos_token_id": 1, **heads},
            vision_config={"image_size": 32, "patch_size": 8, **heads},
            projection_dim=32,
        )
        return t.CLIPModel(config), {**text, "pixel_values": torch.randn(2, 3, 32, 32)}, None
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    config = t.ModernBertConfig(**small, **special, global_attn_every_n_layers=2, local_attention=8, max_position_embeddings=64)
    return t.ModernBertForMaskedLM(config), text, None


def cover(name: str, seconds: float = SEARCH_SECONDS) -> Row:
    """Permute one architecture and tell what came of it."""
    started = time.monotonic()
    row = Row(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, example, targets = build(name)
        inputs = Inputs.of(example)
        model.eval()
        double = inputs.map(lambda t: t.double() if t.is_floating_point() else t)
        before = run(widened(model), double)
        found = permute(model, inputs, seconds=seconds, targets=targets)
        row.applied_error = difference(before, run(widened(model), double))
    row.failure, row.notes = found.reason, found.notes
    row.eligible = len(found.layers)
    row.permuted = sum(1 for layer in found.layers if layer.moved_share)
    total = sum(layer.size for layer in found.layers) or 1
    row.free_share = sum(layer.size for layer in found.layers if layer.free_share) / total
    row.kept_before, row.kept_after, row.error = found.kept_before, found.kept_after, found.largest_error
    for layer in found.layers:
        if not layer.moved_share:
            reason = layer.reason or "nothing better was found, or the groups of four hold other channels too"
            row.refusals[reason] = row.refusals.get(reason, 0) + 1
    row.seconds = time.monotonic() - started
    return row


def _child(name: str, sender: Any) -> None:
    torch.set_num_threads(1)
    try:
        row = cover(name)
    except Exception as error:  # noqa: BLE001 - the table holds whatever a network raises
        row = Row(name, failure=f"{type(error).__name__}: {str(error)[:300]}")
    sender.send(asdict(row))


def _cover_apart(name: str, limit_seconds: float) -> Row:
    """Cover one architecture in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(name, sender))
    process.start()
    sender.close()
    try:
        row = Row(**receiver.recv()) if receiver.poll(limit_seconds) else Row(name, failure=f"stopped after {limit_seconds:.0f} s")
    except EOFError:
        row = Row(name, failure="the process ended without a result")
    if process.is_alive() and row.failure.startswith("stopped"):
        process.terminate()
    process.join()
    return row


def cover_all(
    names: Iterable[str],
    known: Sequence[Row] = (),
    *,
    jobs: int = 1,
    limit_seconds: float = 600.0,
    progress: Callable[[list[Row]], None] | None = None,
) -> list[Row]:
    """Cover architectures, each in a process of its own, and return all rows.

    Args:
        known: rows of an earlier call; their architectures are not covered again.
        jobs: processes at once.
        limit_seconds: an architecture that takes longer is stopped and reported so.
        progress: called with all rows after every architecture.
    """
    rows = {row.name: row for row in known}
    with ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(_cover_apart, name, limit_seconds) for name in names if name not in rows]
        for done in as_completed(running):
            row = done.result()
            rows[row.name] = row
            if progress is not None:
                progress(list(rows.values()))
    return list(rows.values())


def table(rows: Sequence[Row]) -> str:
    """The table in Markdown."""
    lines = [
        "| architecture | weights permuted | elements free | kept before | kept after | largest error | what stops the rest |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row.failure:
            lines.append(f"| {row.name} | 0 | | | | | left as it is: {_cell(row.failure)} |")
            continue
        stops = "; ".join(f"{count} × {_cell(reason)}" for reason, count in sorted(row.refusals.items(), key=lambda kv: -kv[1])[:3])
        lines.append(
            f"| {row.name} | {row.permuted} of {row.eligible} | {100 * row.free_share:.1f} % | {100 * row.kept_before:.2f} % | "
            f"{100 * row.kept_after:.2f} % | {max(row.error, row.applied_error):.0e} | {stops} |"
        )
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")[:140]
