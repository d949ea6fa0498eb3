"""What is verified before anything is called sparse, and after the engine is built."""

import copy
import math
from statistics import fmean

import torch
from torch import Tensor, nn

from twofour.compress.trainings import SeedRun
from twofour.exchange import Exported
from twofour.exchange.export import reference_outputs, rounding_tolerance
from twofour.report.record import Agreement, Check
from twofour.runtime import Engine
from twofour.sources import Task
from twofour.training.evaluate import batches_of, forward, loader

MOST_LOST_POINTS = 0.5
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def check_pattern(run: SeedRun) -> Check:
    """Every pruned weight is exactly +0 where its mask says so, after all training."""
    wrong = 0
    for name, mask in run.pruning.masks.items():
        dropped = run.sparse.state[name][~mask]
        wrong += int((dropped != 0).sum()) + int(torch.signbit(dropped).sum())
    detail = f"{len(run.pruning.masks)} layers, {wrong} of the pruned weights are not +0"
    return Check(name=f"masks held through training, seed {run.seed}", passed=wrong == 0, detail=detail)


def check_export(variant: str, exported: Exported) -> Check:
    """The file gives the module's outputs within rounding, and is 2:4 where the module is."""
    detail = f"largest error {exported.largest_error:.1e}, allowed {exported.tolerance:.1e}"
    if variant == "2:4":
        required = [w for w in exported.inspection.weights if w.required]
        detail += f"; {sum(w.is_24 for w in required)} of {len(required)} pruned layers 2:4 in the file"
    return Check(name=f"ONNX equals the module, {variant}", passed=exported.largest_error <= exported.tolerance, detail=detail)


def check_agreement(row: Agreement) -> Check:
    """The engine gives what torch gives.

    In fp32 it predicts the same; a tie may fall to either side, so one item in a thousand may differ. In half precision its outputs lie
    within the tolerance of torch's in float32 (see `rounding_tolerance`); two classes closer than twice that may change places.
    """
    detail = f"{row.differing_predictions} of {row.items} predictions differ, largest error {row.largest_error:.1e}"
    passed = row.differing_predictions <= row.items / 1000 and math.isfinite(row.largest_error)
    if row.tolerance is not None:
        detail += f", allowed {row.tolerance:.1e} in {row.precision}"
        passed = row.largest_error <= row.tolerance and math.isfinite(row.largest_error)
    return Check(name=f"engine predicts what torch predicts, {row.variant}", passed=passed, detail=detail)


def check_accuracy(runs: list[SeedRun], task: Task) -> list[Check]:
    """2:4 stays within half a point of the control, for a metric in percent."""
    if task.metric.unit != "%":
        return []
    sign = 1 if task.metric.direction == "higher" else -1
    lost = sign * fmean(run.control.metric - run.sparse.metric for run in runs)
    mean = f"; mean of {len(runs)} seeds" if len(runs) > 1 else "; one seed"
    detail = f"{lost:+.2f} points lost against dense with the same training, allowed {MOST_LOST_POINTS}{mean}"
    return [Check(name="accuracy kept", passed=lost <= MOST_LOST_POINTS, detail=detail.replace("-", "−"))]


@torch.inference_mode()
def agreement_of(variant: str, engine: Engine, model: nn.Module, task: Task, batch: int = 256, device: str = "cpu") -> Agreement:
    """Return the engine against the module, run in float32 on `device`, over the validation set.

    Predictions are the classes of the largest outputs; of a task that is no classification, an item's prediction differs where one of
    its outputs differs by more than rounding (see `rounding_tolerance`) explains.
    """
    precision, where = engine.plan.precision, torch.device(device)
    model = model if where.type == "cpu" else copy.deepcopy(model).to(where)
    dtype = DTYPES.get(precision)
    ours: list[Tensor] = []
    theirs: list[Tensor] = []
    halves: list[Tensor] = []
    targets: list[Tensor] = []
    far: list[Tensor] = []
    # NOTE: TF32 would round float32 convolutions to 11 bits, as much as fp16 does.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for inputs, target in batches_of(loader(task, "validation", batch)):
            engine_outputs, outputs = engine(*inputs), forward(model, inputs, where).cpu()
            if dtype is not None:
                with torch.autocast(where.type, dtype):
                    halves.append(forward(model, inputs, where).cpu().float())
            elif not task.is_classification:
                far.append((engine_outputs - outputs).abs() > rounding_tolerance(*reference_outputs(model, inputs)))
            ours.append(engine_outputs)
            theirs.append(outputs)
            targets.append(target)
    engine_all, torch_all, target_all = torch.cat(ours), torch.cat(theirs), torch.cat(targets)
    tolerance = None
    if dtype is not None:
        tolerance = rounding_tolerance([torch.cat(halves)], [torch_all], dtype)
        far = [(engine_all - torch_all).abs() > tolerance]
    if task.is_classification:
        differing = int((engine_all.argmax(1) != torch_all.argmax(1)).sum())
    else:
        differing = int(torch.cat(far).reshape(len(target_all), -1).any(1).sum())
    return Agreement(
        variant="2:4" if variant == "2:4" else "dense",
        engine_metric=task.metric_of(engine_all, target_all),
        torch_metric=task.metric_of(torch_all, target_all),
        differing_predictions=differing,
        items=len(target_all),
        largest_error=float((engine_all - torch_all).abs().max()),
        precision=precision,
        tolerance=tolerance,
    )
