"""DDP, ZeRO and FSDP2 in two gloo processes, started once; what they wrote is read by one process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from distributed_worker import network, nonzero_dropped, pruned

from twofour.training import derive_masks

WORKER = Path(__file__).parent / "distributed_worker.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([sys.executable, str(WORKER), str(rank), str(folder)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [worker.communicate(timeout=240)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(errors)
    return folder


@pytest.fixture(params=[0, 1])
def results(folder: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    return json.loads((folder / f"rank{request.param}.json").read_text())  # type: ignore[no-any-return]


def test_ddp_holds(results: dict[str, Any]) -> None:
    assert results["ddp"] == {"nonzero": 0}


def test_zero_holds_after_it_has_sent_the_weights_around(results: dict[str, Any]) -> None:
    assert results["zero"] == {"nonzero": 0, "same_as_ddp": True}


def test_fsdp2_holds_its_piece_of_each_mask(results: dict[str, Any]) -> None:
    fsdp = results["fsdp2"]
    assert fsdp["nonzero"] == 0
    assert fsdp["local_rows"] == [15, 9]
    # The same sums of two processes' gradients; AdamW divides by their size, so rounding may show at the size of a step.
    assert fsdp["difference_to_ddp"] <= 3 * 0.01 * 2.0**-10


def test_masks_of_sharded_weights_are_derived_and_held(results: dict[str, Any]) -> None:
    resumed = results["fsdp2_resumed_with_derived_masks"]
    assert resumed["same_masks"]
    assert resumed["nonzero"] == 0
    assert resumed["prune_refused"] == "weight '0.weight' is sharded over processes, expected a whole model; prune before fully_shard"


def test_another_number_of_shards_reads_and_trains_on(results: dict[str, Any]) -> None:
    assert results["loaded_by_another_number"] == {"same": True, "nonzero": 0}


def test_sr_ste_on_pieces_is_sr_ste_on_the_whole(results: dict[str, Any]) -> None:
    scratch = results["fsdp2_from_scratch"]
    assert scratch["masks"]
    # Two gradients averaged in another order, three steps of 0.5.
    assert scratch["difference"] <= 2.0**-20


def test_fsdp1_is_refused(results: dict[str, Any]) -> None:
    for message in results["fsdp1"]["messages"]:
        assert message == (
            "hold: the model is wrapped by FSDP1, whose flat parameters have no axes to group along; use fully_shard (FSDP2)"
        )


def test_one_process_reads_what_two_wrote(folder: Path) -> None:
    model = network()
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=folder / "dcp", no_dist=True)
    model.load_state_dict(state["model"])
    masks = pruned()[1].masks
    assert nonzero_dropped(model.state_dict(), masks) == 0
    assert all(torch.equal(derived, masks[name]) for name, derived in derive_masks(model).items())
    assert derive_masks(model).keys() == masks.keys()
