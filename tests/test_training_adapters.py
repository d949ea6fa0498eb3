"""The adapters under the real Lightning, Hugging Face Trainer and Accelerate."""

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from twofour.errors import InputError, VerificationError
from twofour.pruning import prune
from twofour.training import derive_masks

INPUTS = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, 3, (24,), generator=torch.Generator().manual_seed(1))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.fixture(scope="module")
def lightning() -> Any:
    import lightning.pytorch as lightning

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return lightning


def fit(lightning: Any, inner: nn.Module, callbacks: list[Any], folder: Path, **options: Any) -> Any:
    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self.inner(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(INPUTS, LABELS), batch_size=8)
    trainer = lightning.Trainer(
        **{"max_epochs": 2} | options,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        callbacks=callbacks,
    )
    trainer.fit(Module(), data, ckpt_path=options.get("ckpt_path"))
    return trainer


@pytest.mark.filterwarnings("ignore")
def test_lightning_holds_from_the_first_step_to_the_last(lightning: Any, tmp_path: Path) -> None:
    from twofour.training.lightning import HoldMasks

    model = network()
    pruning = prune(model, (INPUTS,), permute=False)
    before = model[2].weight.detach().clone()
    callback = HoldMasks(pruning, module="inner")
    trainer = fit(lightning, model, [callback], tmp_path, accumulate_grad_batches=2, gradient_clip_val=1.0)
    masks = derive_masks(model)
    assert all(torch.equal(masks[name], mask) for name, mask in pruning.masks.items())
    assert not torch.equal(before, model[2].weight.detach())
    assert not trainer.optimizers[0]._optimizer_step_post_hooks  # let go
    other = network()
    prune(other, (INPUTS,), permute=False)
    fit(lightning, other, [HoldMasks()], tmp_path)  # masks derived, of the LightningModule itself
    assert set(derive_masks(other)) == set(pruning.masks)


@pytest.mark.filterwarnings("ignore")
def test_lightning_finds_an_average_begun_before_pruning(lightning: Any, tmp_path: Path) -> None:
    from twofour.training.lightning import HoldMasks

    model = network()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.update_parameters(model)
    prune(model, (INPUTS,), permute=False)

    class SwapIn(lightning.Callback):  # type: ignore[misc, name-defined]
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            average.update_parameters(pl_module.inner)
            pl_module.inner.load_state_dict(average.module.state_dict())

    with pytest.raises(VerificationError, match="an average begun before pruning"):
        fit(lightning, model, [SwapIn(), HoldMasks(module="inner")], tmp_path)
    model = network()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.update_parameters(model)
    prune(model, (INPUTS,), permute=False)
    fit(lightning, model, [SwapIn(), HoldMasks(module="inner", ema=average)], tmp_path)
    assert derive_masks(model)


@pytest.mark.filterwarnings("ignore")
def test_lightning_refuses_a_module_no_optimizer_trains_and_lets_go_on_errors(lightning: Any, tmp_path: Path) -> None:
    from twofour.training.lightning import HoldMasks

    model = network()
    prune(model, (INPUTS,), permute=False)
    model[0].weight.requires_grad_(False)
    with pytest.raises(InputError, match=r"HoldMasks: no optimizer of the fit trains the module 'inner\.1', expected at least one"):
        fit(lightning, model, [HoldMasks(module="inner.1")], tmp_path)

    class Fail(lightning.Callback):  # type: ignore[misc, name-defined]
        def on_train_batch_start(self, *args: Any) -> None:
            raise ZeroDivisionError

    callback = HoldMasks(module="inner")
    with pytest.raises(ZeroDivisionError):
        fit(lightning, model, [callback, Fail()], tmp_path)
    assert callback.handles == []


@pytest.mark.filterwarnings("ignore")
def test_hugging_face_trainer_holds_saves_and_resumes(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    from twofour.training.huggingface import HoldMasks

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=3,
    )
    tokens = torch.randint(0, 32, (24, 8), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": t, "attention_mask": torch.ones_like(t), "labels": y} for t, y in zip(tokens, LABELS, strict=True)]

    def trainer_of(model: nn.Module, steps: int, callback: HoldMasks) -> Trainer:
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=8,
            gradient_accumulation_steps=1,
            max_steps=steps,
            save_steps=2,
            learning_rate=1e-2,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
        )
        return Trainer(model=model, args=arguments, train_dataset=data, callbacks=[callback])

    model = BertForSequenceClassification(config)
    pruning = prune(model, (tokens[:2],), permute=False)
    assert {name.split(".")[-2] for name in pruning.masks} >= {"query", "key", "value", "dense"}
    before = {name: model.get_parameter(name).detach().clone() for name in pruning.masks}
    trainer_of(model, 2, HoldMasks(pruning)).train()
    for name, mask in pruning.masks.items():
        weight = model.get_parameter(name).detach()
        assert not weight[~mask].any()
        assert not torch.equal(weight, before[name])

    resumed = BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-2")
    trainer_of(resumed, 4, HoldMasks()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, mask in pruning.masks.items():
        assert not resumed.get_parameter(name).detach()[~mask].any()


@pytest.mark.parametrize(("name", "blocked"), [("lightning", "lightning"), ("huggingface", "transformers")])
def test_an_absent_library_names_its_pip_line(name: str, blocked: str) -> None:
    code = f"""
import sys
sys.modules[{blocked!r}] = None
from twofour.errors import MissingExtraError
try:
    import twofour.training.{name}
except MissingExtraError as error:
    assert "run: pip install {blocked}" in str(error), error
else:
    raise SystemExit("imported")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
