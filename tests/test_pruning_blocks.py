"""`prune_blocks` on Llama, Mistral, BERT and ViT from configs at toy size: what a walk through the whole model gives; resume; refusals."""

import contextlib
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_pruning_prune import digest
from torch import Tensor, nn

from twofour.errors import InputError
from twofour.pattern import Pattern, count_groups
from twofour.pruning import prune_blocks
from twofour.pruning.blocks import find_blocks, write_choice
from twofour.pruning.decide import chosen
from twofour.pruning.methods import METHODS
from twofour.pruning.statistics import gather

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
TOKENS = torch.randint(0, 60, (4, 4, 16), generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(4, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def llama() -> tuple[nn.Module, list[Any]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=60, num_key_value_heads=2)), list(TOKENS)


def mistral() -> tuple[nn.Module, list[Any]]:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**SIZES, vocab_size=60, num_key_value_heads=2, sliding_window=8)), list(TOKENS)


def bert() -> tuple[nn.Module, list[Any]]:
    from transformers import BertConfig, BertForSequenceClassification

    masks = torch.ones_like(TOKENS)
    masks[:, 1, 10:] = 0
    batches = [{"input_ids": t, "attention_mask": m} for t, m in zip(TOKENS, masks, strict=True)]
    return BertForSequenceClassification(BertConfig(**SIZES, vocab_size=60)), batches


def vit() -> tuple[nn.Module, list[Any]]:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**SIZES, image_size=16, patch_size=4)), list(PIXELS)


MAKERS = {maker.__name__: maker for maker in (llama, mistral, bert, vit)}


def made(maker: Callable[[], tuple[nn.Module, list[Any]]]) -> tuple[nn.Module, list[Any], tuple[Any, ...]]:
    torch.manual_seed(0)
    model, batches = maker()
    example = batches[0]["input_ids"] if isinstance(batches[0], dict) else batches[0]
    return model.eval(), batches, (example[:2],)


def by_whole_model(model: nn.Module, batches: list[Any], names: list[list[str]], method: str) -> None:
    """The same order with nothing clever: before each block, statistics from full forward passes of the model pruned so far."""
    for block in names:
        parts = gather(model, block, batches, hessian=METHODS[method].has_hessian)
        choices = {n: chosen(model.get_parameter(n), parts[n], METHODS[method], Pattern(), n) for n in block}
        with torch.no_grad():
            for name, choice in choices.items():
                write_choice(model.get_parameter(name), choice)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("architecture", MAKERS)
def test_block_by_block_is_what_the_whole_model_gives(architecture: str, method: str) -> None:
    model, batches, example = made(MAKERS[architecture])
    plain = copy.deepcopy(model)
    said: list[tuple[str, int, int | None]] = []
    record = prune_blocks(model, example, iter(batches), method=method, progress=lambda *what: said.append(what))
    assert len(record.pruned) == (21 if architecture in ("llama", "mistral") else 18)
    names = [[layer.name for layer in record.pruned if f".{i}." in layer.name] for i in range(3)]
    by_whole_model(plain, batches, names, method)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, plain.get_parameter(name), rtol=1e-4, atol=1e-6, msg=name)
        if name in record.masks:
            assert count_groups(parameter.detach().numpy()).is_24
            assert not parameter.detach()[~record.masks[name]].any()
    assert [what for what in said if what[0] == "block"] == [("block", i, 3) for i in (1, 2, 3)]
    assert not any("forward" in vars(module) for module in model.modules())
    assert not model.training


def test_what_is_outside_the_blocks_stays_dense_and_says_so() -> None:
    model, batches, example = made(bert)
    record = prune_blocks(model, example, batches, method="wanda", include=["classifier"])
    reasons = {layer.name: layer.reason for layer in record.layers}
    assert reasons["classifier.weight"] == "outside the blocks"
    assert reasons["bert.embeddings.word_embeddings.weight"].startswith("embedding")


def test_half_precision_and_the_cache_switch() -> None:
    model, batches, example = made(llama)
    model.to(torch.bfloat16)
    assert model.config.use_cache
    record = prune_blocks(model, example, batches, method="alps")
    assert model.config.use_cache
    assert all(model.get_parameter(layer.name).dtype == torch.bfloat16 for layer in record.pruned)
    assert all(layer.output_error is not None and layer.output_error < 0.3 for layer in record.pruned)


class Interrupted(Exception):
    pass


def stop_after(blocks: int) -> Callable[[str, int, int | None], None]:
    def report(what: str, done: int, of: int | None) -> None:
        if (what, done) == ("block", blocks):
            raise Interrupted

    return report


def test_an_interrupted_run_leaves_the_model_and_goes_on_after_the_last_block(tmp_path: Path) -> None:
    model, batches, example = made(llama)
    whole = copy.deepcopy(model)
    before = digest(model)
    with pytest.raises(Interrupted):
        prune_blocks(model, example, batches, resume=tmp_path / "run", progress=stop_after(2))
    assert digest(model) == before
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "block-0000.safetensors",
        "block-0001.safetensors",
        "twofour.blocks.json",
    ]
    said: list[str] = []
    resumed = prune_blocks(model, example, batches, resume=tmp_path / "run", progress=lambda what, *_: said.append(what))
    assert {what for what in said if "calibration" in what} == {"model.layers.2, calibration batch"}
    direct = prune_blocks(whole, example, batches)
    assert digest(model) == digest(whole)
    assert resumed.layers == direct.layers
    assert resumed.notes == direct.notes


def test_a_resume_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    model, batches, example = made(vit)
    prune_blocks(copy.deepcopy(model), example, batches, method="wanda", resume=tmp_path)
    before = digest(model)

    def refused(message: str, changed: nn.Module = model, data: list[Any] = batches, **options: Any) -> None:
        with pytest.raises(InputError, match=message):
            prune_blocks(changed, example, data, **{"method": "wanda", "resume": tmp_path, **options})
        assert digest(model) == before

    refused("was begun with another method; give the same call, or another folder", method="ria")
    refused("was begun with another pattern", pattern="1:4")
    refused("was begun with another weights", exclude=["*.0.*"])
    refused("was begun with another calibration", data=batches[:2])
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_parameter("vit.layers.1.mlp.fc1.weight").add_(1)
    refused("was begun with other weights; give the same model, or another folder", changed=other)
    (tmp_path / "block-0001.safetensors").write_bytes(b"junk")
    refused(r"block-0001.safetensors' is damaged \(.*\); delete it, and the call goes on from there")
    (tmp_path / "twofour.blocks.json").write_text("{")
    refused(r"twofour.blocks.json' is damaged \(.*\); delete the folder and start again")
    (tmp_path / "file").write_text("")
    refused(r"resume folder '.*file' cannot be made", resume=tmp_path / "file")


def test_a_resume_folder_of_other_masks_is_refused(tmp_path: Path) -> None:
    """The masks change what the blocks give, and nothing of the activations before the first."""
    model, batches, example = made(bert)
    with contextlib.suppress(Interrupted):
        prune_blocks(model, example, batches, method="wanda", resume=tmp_path, progress=stop_after(1))
    other = [{**batch, "attention_mask": torch.ones_like(batch["attention_mask"])} for batch in batches]
    with pytest.raises(InputError, match="was begun with another calibration; give the same call, or another folder"):
        prune_blocks(model, example, other, method="wanda", resume=tmp_path)
    same = [{name: value.clone() for name, value in batch.items()} for batch in batches]
    prune_blocks(model, example, same, method="wanda", resume=tmp_path)


class Chain(nn.Module):
    """Three linear blocks; `between` happens between them."""

    def __init__(self, between: Callable[[Tensor], Tensor] = lambda x: x, used: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.head = nn.Linear(16, 4)
        self.between, self.used = between, used

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks[: self.used]:
            x = self.between(block(x))
        return self.head(x)


class Looped(Chain):
    """Goes through its blocks twice."""

    def forward(self, x: Tensor) -> Tensor:
        for block in [*self.blocks, *self.blocks]:
            x = block(x)
        return self.head(x)


def test_blocks_that_are_no_plain_chain_are_refused() -> None:
    x = torch.randn(64, 16)

    def refused(model: nn.Module, message: str, data: Any = (x,), **options: Any) -> None:
        before = digest(model)
        with pytest.raises(InputError, match=message):
            prune_blocks(model, (x[:2],), list(data), **options)
        assert digest(model) == before
        assert not any("forward" in vars(module) for module in model.modules())

    refused(Chain(torch.relu), "block 1 of the model is not called on what block 0 gives, expected a plain chain; use prune")
    refused(Looped(), "block 0 of the model is called again after the last, expected a plain chain; use prune")
    shared = Chain()
    shared.blocks[2].weight = shared.blocks[0].weight
    refused(shared, "weight 'blocks.0.weight' belongs to 'blocks.0' and 'blocks.2', expected blocks of their own; use prune")
    late = r"calibration: batch 2 of float32\[64, 8\] cannot run \(at layer 'blocks.0'\): mat1 and mat2"
    refused(Chain(), late, data=(x, x[:, :8]), method="magnitude")
    refused(Chain(), "device 'gpu' cannot be used .*, expected cpu, cuda or cuda:N", device="gpu")
    refused(Chain(), "device 'cuda:99' cannot be used .*, expected cpu, cuda or cuda:N", device="cuda:99")
    with pytest.raises(InputError, match="prune_blocks: calibration is None, expected batches"):
        prune_blocks(Chain(), (x[:2],), None, method="magnitude")  # type: ignore[arg-type]
    refused(Chain(used=2), "the model's blocks are not all called in a forward pass, expected a plain chain; use prune")
    refused(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), "the model has no list of like blocks with weights to prune")
    refused(Chain(), "blocks 'blokcs' is no module list of the model, expected one of .*'blocks'", blocks="blokcs")
    refused(Chain(), "blocks 'blocks' hold no weight to prune", blocks="blocks", exclude=["blocks.*"], include=["head"])
    refused(Chain(), "calibration holds no batch, expected at least one", data=())
    refused(Chain(), r"calibration: batch 2 of float32\[64, 8\] cannot run \(at layer 'blocks.0.weight'\): mat1", data=(x, x[:, :8]))
    refused(Chain(), "batch 2: the input of layer 'blocks.0.weight' holds NaN or infinity", data=(x, x * torch.nan))
    refused(Chain(), "calibration reaches layer 'blocks.0.weight' with 8 rows", data=(x[:8],))
    broken = Chain()
    with torch.no_grad():
        broken.blocks[2].weight[0, 0] = torch.nan
    refused(broken, "weight 'blocks.2.weight' holds NaN or infinity, expected finite values")


def test_out_of_memory_names_the_block_and_suggests_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Chain()
    before = digest(model)

    def full(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("twofour.pruning.blocks.run_block", full)
    with pytest.raises(InputError, match=r"ran out of memory at layer 'blocks.0' with batches of 64 items; use batches of 32 or fewer"):
        prune_blocks(model, (torch.ones(2, 16),), [torch.randn(64, 16)])
    assert digest(model) == before


def test_blocks_may_return_tuples() -> None:
    class Pair(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return super().forward(x), None

    class Pairs(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Pair(16, 16) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)[0]
            return self.head(x)

    torch.manual_seed(0)
    model, x = Pairs(), torch.randn(64, 16)
    plain = copy.deepcopy(model)
    record = prune_blocks(model, (x[:2],), [x])
    by_whole_model(plain, [x], [[layer.name] for layer in record.pruned], "sparsegpt")
    for name in record.masks:
        torch.testing.assert_close(model.get_parameter(name), plain.get_parameter(name), rtol=1e-4, atol=1e-6)


def test_blocks_may_change_the_width() -> None:
    torch.manual_seed(0)
    model, x = Chain(), torch.randn(64, 16)
    model.blocks = nn.ModuleList([nn.Linear(16, 32), nn.Linear(32, 24), nn.Linear(24, 8)])
    model.head = nn.Linear(8, 4)
    plain = copy.deepcopy(model)
    record = prune_blocks(model, (x[:2],), [x])
    by_whole_model(plain, [x], [[layer.name] for layer in record.pruned], "sparsegpt")
    for name in record.masks:
        torch.testing.assert_close(model.get_parameter(name), plain.get_parameter(name), rtol=1e-4, atol=1e-6)


def test_the_blocks_are_the_list_with_the_most_weights() -> None:
    model, _, example = made(llama)
    from twofour.pruning.apply import survey

    found = find_blocks(model, survey(model, example)[0])
    assert [block.name for block in found] == ["model.layers.0", "model.layers.1", "model.layers.2"]
    assert found[1].weights["model.layers.1.mlp.up_proj.weight"] == "mlp.up_proj.weight"


def test_the_journal_says_what_was_begun(tmp_path: Path) -> None:
    model, batches, example = made(vit)
    with contextlib.suppress(Interrupted):
        prune_blocks(model, example, batches, method="ria", resume=tmp_path, progress=stop_after(1))
    begun = json.loads((tmp_path / "twofour.blocks.json").read_text())
    assert (begun["method"], begun["pattern"], len(begun["weights"])) == ("ria", "2:4", 18)
