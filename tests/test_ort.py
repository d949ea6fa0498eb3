"""What ONNX Runtime gets wrong is left out of its sessions."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import twofour
from twofour import ort


class Padded(nn.Module):
    """A border of zeros, which is more than any value inside."""

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.pad(-1 - x.abs(), (1, 1, 1, 1)), 3, 2)


def test_zeros_padded_before_a_maximum_count_in_a_cpu_plan_and_its_export_is_accepted(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "padded.onnx"
    twofour.export(Padded().eval(), (x,), path)
    twofour.build(path).save(tmp_path / "padded.plan")
    found = twofour.load(tmp_path / "padded.plan")(x.numpy())
    np.testing.assert_array_equal(np.asarray(found), Padded()(x).numpy())


def test_a_session_runs_on_as_many_threads_and_profiles_where_it_is_told(tmp_path: Path) -> None:
    x = torch.randn(1, 3, 8, 8)
    path = tmp_path / "padded.onnx"
    twofour.export(Padded().eval(), (x,), path)
    opened = ort.session(path.read_bytes(), severity=ort.FATAL, threads=1, profile_prefix=str(tmp_path / "profile"))
    assert opened.get_session_options().intra_op_num_threads == 1
    opened.run(None, {opened.get_inputs()[0].name: x.numpy()})
    assert Path(opened.end_profiling()).parent == tmp_path
    with pytest.raises(Exception, match=r"(?i)load model|protobuf"):
        ort.session(b"no model", severity=ort.FATAL)
