"""The library tactics without their libraries: what each refuses and why, the graph cuDNN is given, plans that end their process."""

import contextlib
import dataclasses
import importlib
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from twofour.builder.tactics import gemm as product_tactics
from twofour.builder.tactics import untrusted
from twofour.errors import InputError, TwofourError, UnsupportedError
from twofour.kernels import attention, conv, gemm, matmul, pointwise
from twofour.kernels import cudnn as glue
from twofour.kernels.attention.cudnn import CudnnAttention
from twofour.kernels.conv import cudnn as conv_cudnn
from twofour.kernels.conv.cudnn import BY_GROUP, UNFUSED, CudnnConv, epilogue_problem, one_group
from twofour.kernels.families import WORKSPACE_CAP, why_not
from twofour.kernels.gemm import cusparselt
from twofour.kernels.gemm.cublaslt import BatchedCublasLt
from twofour.kernels.launchable import launchable

E = gemm.Epilogue
REFUSED = [
    (
        "cublaslt",
        gemm.Problem(8, 8, 16, epilogue=E("gelu", bias=True)),
        "cublaslt has no epilogue 'gelu', only relu and the tanh form of gelu",
    ),
    ("cublaslt", gemm.Problem(8, 8, 16, epilogue=E(scale=True)), "no epilogue that scales rows"),
    ("cublaslt", gemm.Problem(8, 8, 16, out_dtype="fp16"), "cannot write fp16 from bf16"),
    ("cublaslt", gemm.Problem(8, 8, 16, out_dtype="fp32", epilogue=E("relu")), "without an activation only"),
    ("cusparselt", gemm.Problem(8, 8, 16, sparse=False), "the weight is dense"),
    ("cusparselt", gemm.Problem(8, 16, 16, epilogue=E("silu")), "cusparselt has no epilogue 'silu', only relu"),
    ("cusparselt", gemm.Problem(7, 16, 16), "tokens in multiples of 8, got 16, 16 and 7"),
    ("cusparselt", gemm.Problem(8, 24, 16), "outputs in multiples of 16 and tokens in multiples of 8, got 16, 24 and 8"),
    ("cusparselt", gemm.Problem(8, 8, 16, out_dtype="fp32"), "writes bf16 from bf16, not fp32"),
]


@pytest.mark.parametrize(("library", "problem", "message"), REFUSED)
def test_what_a_library_cannot_do_is_one_reason(library: str, problem: gemm.Problem, message: str) -> None:
    assert message in str(why_not("gemm", library, problem, None))
    with pytest.raises(InputError, match=f"{library} cannot compute"):
        launchable("gemm", library, problem)


def test_what_libraries_can_do() -> None:
    for epilogue in (E(), E("relu", bias=True), E("gelu_tanh", bias=True), E(bias=True, residual=True)):
        assert why_not("gemm", "cublaslt", gemm.Problem(8, 8, 16, epilogue=epilogue), None) is None
    assert why_not("gemm", "cusparselt", gemm.Problem(8, 16, 16, epilogue=E("relu", bias=True, residual=True)), None) is None
    assert why_not("gemm", "cublaslt", gemm.Problem(8, 8, 16), gemm.Config()) == "cublaslt takes no config of ours"
    assert "not one of cudnn" in str(why_not("conv", "twofour", conv.Problem(1, 8, 8, 8, 8), None))
    assert "heads in multiples of 8 up to 256" in str(why_not("attention", "cudnn", attention.Problem(1, 1, 8, 8, 12, 1.0), None))
    odd = attention.Problem(1, 2, 8, 8, 8, 1.0, q_strides=(132, 8, 17, 1))
    assert "strides in multiples of 8 elements, q has" in str(why_not("attention", "cudnn", odd, None))
    assert "no 16-bit grouped convolution of 3 channels" in str(why_not("conv", "cudnn", conv.Problem(1, 8, 8, 12, 8, groups=4), None))


def test_transposed_operands_of_a_batched_product() -> None:
    p = matmul.Problem(2, 10, 20, 30, a_strides=(300, 1, 10), b_strides=(600, 20, 1))
    forms = {name: BatchedCublasLt._form(p, name) for name in "abd"}
    assert forms == {"a": (1, 10, 30, 10), "b": (0, 20, 30, 20), "d": (0, 20, 10, 20)}


def test_an_absent_library_is_one_sentence() -> None:
    code = (
        "import sys\nclass Block:\n    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in {'cudnn', 'nvmath'}: raise ModuleNotFoundError('blocked: ' + name, name=name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "from twofour.errors import MissingExtraError\nfrom twofour.kernels import conv, gemm, matmul\n"
        "from twofour.kernels.launchable import launchable\n"
        "for f, l, p in (('conv', 'cudnn', conv.Problem(1, 8, 8, 8, 8)), ('gemm', 'cublaslt', gemm.Problem(8, 8, 16)),\n"
        "                ('gemm', 'cusparselt', gemm.Problem(8, 16, 16)), ('matmul', 'cublaslt', matmul.Problem(1, 8, 8, 8))):\n"
        "    try:\n        launchable(f, l, p)\n    except MissingExtraError as e:\n        print(e)\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(said) == 4
    assert "the cudnn tactic needs nvidia-cudnn-frontend, which could not be imported" in said[0]
    assert "pip install 'twofour[cudnn]'" in said[0]
    assert all("needs nvmath-python" in line and "pip install 'twofour[peers]'" in line for line in said[1:])


class FakeTensor:
    def __init__(self, graph: "FakeGraph", **known: Any) -> None:
        self.graph, self.known = graph, known

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("set_"):
            raise AttributeError(name)

        def remember(value: Any) -> "FakeTensor":
            self.known[name[4:]] = value
            return self

        return remember


class FakeGraph:
    """Remembers what it is given; plans 0 and 1 exist, 1 needs too much workspace."""

    def __init__(self, **options: Any) -> None:
        self.options, self.calls, self.tensors, self.ran = options, [], [], []

    def tensor(self, **known: Any) -> FakeTensor:
        self.tensors.append(FakeTensor(self, **known))
        return self.tensors[-1]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*arguments: Any, **named: Any) -> Any:
            self.calls.append((name, arguments, named))
            if name == "get_execution_plan_count":
                return 2
            if name == "get_workspace_size_plan_at_index":
                return 1024 if arguments == (0,) else WORKSPACE_CAP
            if name == "get_workspace_size":
                return 2048
            if name == "serialize":
                return [1, 2, 3]
            made = FakeTensor(self)
            self.tensors.append(made)
            return (made, None) if name == "sdpa" else made

        return call


class FakeModule:
    """As much of the frontend's compiled module as the tactics touch."""

    class cudnnGraphNotSupportedError(Exception): ...

    data_type = SimpleNamespace(HALF="half", BFLOAT16="bf16", FLOAT="float")
    heur_mode = SimpleNamespace(A="A", FALLBACK="FALLBACK")

    def __init__(self) -> None:
        self.graphs: list[FakeGraph] = []

    def backend_graph(self, **options: Any) -> FakeGraph:
        self.graphs.append(FakeGraph(**options))
        return self.graphs[-1]

    def backend_version(self) -> int:
        return 91900


class FakeHandle:
    raw = 77

    def __init__(self) -> None:
        import threading

        self.module, self.lock, self.streams = FakeModule(), threading.Lock(), []

    def use_stream(self, stream: int) -> None:
        self.streams.append(stream)


@pytest.fixture
def handle(monkeypatch: pytest.MonkeyPatch) -> Any:
    made = FakeHandle()
    monkeypatch.setattr(glue, "library", lambda: made.module)
    monkeypatch.setattr(conv_cudnn, "Pointwise", lambda problem, device=0: lambda *a, **k: None)
    return made


PROBLEM = conv.Problem(
    2, 14, 14, 64, 128, (3, 3), (2, 2), (1, 0, 2, 1), groups=2, epilogue=conv.Epilogue("relu6", bias=True, residual=True)
)


def test_the_graph_cudnn_is_given(handle: FakeHandle) -> None:
    call = CudnnConv(PROBLEM, 0, handle=handle)  # type: ignore[arg-type]
    graph = handle.module.graphs[-1]
    names = [name for name, _, _ in graph.calls]
    assert names[:4] == ["conv_fprop", "add", "add", "relu"]
    named = graph.calls[0][2]
    assert (named["pre_padding"], named["post_padding"], named["stride"]) == ([1, 0], [2, 1], [2, 2])
    assert (graph.calls[3][2]["lower_clip"], graph.calls[3][2]["upper_clip"]) == (0.0, 6.0)
    by_number = {t.known["uid"]: t.known for t in graph.tensors if "uid" in t.known}
    assert by_number[1]["dim"] == [2, 64, 14, 14]
    assert by_number[1]["stride"] == [14 * 14 * 64, 1, 14 * 64, 64]
    assert by_number[2]["dim"] == [128, 32, 3, 3]
    assert by_number[2]["stride"] == [288, 1, 96, 32]
    assert by_number[5]["dim"] == [2, 128, PROBLEM.out_height, PROBLEM.out_width]
    assert graph.options["io_data_type"] == "half"
    call(1, 2, 3, bias=4, residual=5, workspace=6, stream=7)
    assert graph.calls[-1] == ("_execute_plan_at_index", ({1: 1, 2: 2, 5: 3, 3: 4, 4: 5}, 6, 0, 77), {})
    assert handle.streams == [7]
    assert call.serialized() == b"\x01\x02\x03"
    with pytest.raises(InputError, match=r"bias=0x0.*expected device memory for everything the problem uses"):
        call(1, 2, 3, residual=5, workspace=6)


def test_an_epilogue_apart_and_a_plan_read_back(handle: FakeHandle) -> None:
    apart = CudnnConv(PROBLEM, UNFUSED, handle=handle)  # type: ignore[arg-type]
    graph = handle.module.graphs[-1]
    assert [name for name, _, _ in graph.calls if name in ("conv_fprop", "add", "relu")] == ["conv_fprop"]
    apart(1, 2, 3, bias=4, residual=5, workspace=6)
    assert graph.calls[-1][1][0] == {1: 1, 2: 2, 5: 3}
    again = CudnnConv(PROBLEM, 0, handle=handle, graph=b"\x01\x02")  # type: ignore[arg-type]
    assert handle.module.graphs[-1].calls[0] == ("deserialize", (77, [1, 2]), {})
    assert again.workspace_bytes == 2048


def test_groups_one_by_one_read_and_write_slices_of_the_pixels(handle: FakeHandle) -> None:
    p = dataclasses.replace(PROBLEM, y_pitch=256)
    call = CudnnConv(p, BY_GROUP, handle=handle)  # type: ignore[arg-type]
    graph = handle.module.graphs[-1]
    by_number = {t.known["uid"]: t.known for t in graph.tensors if "uid" in t.known}
    assert (by_number[1]["dim"], by_number[1]["stride"]) == ([2, 32, 14, 14], [14 * 14 * 64, 1, 14 * 64, 64])
    assert by_number[2]["dim"] == [64, 32, 3, 3]
    assert by_number[5]["dim"][1], by_number[5]["stride"][3] == (64, 256)
    graph.calls.clear()
    call(0x1000, 0x2000, 0x3000, bias=0x4000, residual=0x5000, workspace=6)
    launched = [arguments[0] for _, arguments, _ in graph.calls]
    assert launched == [
        {1: 0x1000 + 64 * g, 2: 0x2000 + 2 * 64 * 9 * 32 * g, 5: 0x3000 + 128 * g, 3: 0x4000 + 128 * g, 4: 0x5000 + 128 * g} for g in (0, 1)
    ]
    assert one_group(conv.Problem(1, 8, 8, 24, 24, (3, 3), groups=2)) is None
    with pytest.raises(InputError, match=r"cudnn cannot compute .* group by group: expected groups of multiples of 8 channels"):
        CudnnConv(conv.Problem(1, 8, 8, 24, 24, (3, 3), groups=2), BY_GROUP, handle=handle)  # type: ignore[arg-type]


def test_cusparselt_makes_one_plan_a_bias_address(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    class Library:
        cuSPARSELtError = RuntimeError
        ComputeType = MatmulDescAttribute = MatmulAlg = MatmulAlgAttribute = SimpleNamespace(
            COMPUTE_32F=0, ACTIVATION_RELU=1, BIAS_POINTER=2, DEFAULT=3, CONFIG_ID=4, SPLIT_K=5, SPLIT_K_MODE=6
        )

        def __getattr__(self, name: str) -> Any:
            return lambda *arguments: made.append(name) or len(made)

    monkeypatch.setattr(cusparselt, "import_bindings", lambda *names: Library())
    call = cusparselt.CusparseLt(gemm.Problem(8, 16, 16, epilogue=E("relu", bias=True)))
    for bias in (64, 128, 64, 128, 64):
        call(1, 2, 3, bias=bias)
    assert made.count("matmul_plan_init") == 3  # without a bias, to compress weights with, and one an address
    assert made.count("matmul") == 5


def test_plans_that_do_not_exist_or_want_too_much_are_refused(handle: FakeHandle) -> None:
    with pytest.raises(UnsupportedError, match=r"cuDNN 9\.19\.0 lists 2 plans for .*, expected number 5; build the plan again"):
        CudnnConv(PROBLEM, 5, handle=handle)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match=r"plan 1 of .* needs 1073741824 bytes of workspace"):
        CudnnConv(PROBLEM, 1, handle=handle)  # type: ignore[arg-type]
    hard = dataclasses.replace(PROBLEM, epilogue=conv.Epilogue("hardswish"))
    with pytest.raises(InputError, match="cudnn cannot fuse 'hardswish'; add UNFUSED"):
        CudnnConv(hard, 0, handle=handle)  # type: ignore[arg-type]


def test_the_attention_graph(handle: FakeHandle) -> None:
    p = attention.Problem(2, 4, 197, 197, 64, 0.125, True)
    call = CudnnAttention(p, 0, handle=handle)  # type: ignore[arg-type]
    name, _, named = handle.module.graphs[-1].calls[0]
    assert (name, named["attn_scale"], named["use_causal_mask"], named["generate_stats"]) == ("sdpa", 0.125, True, False)
    call(1, 2, 3, 4, workspace=5, stream=6)
    assert handle.module.graphs[-1].calls[-1][1][:2] == ({1: 1, 2: 2, 3: 3, 4: 4}, 5)


def test_the_step_behind_an_unfused_convolution() -> None:
    p = epilogue_problem(dataclasses.replace(PROBLEM, y_pitch=256))
    assert p is not None
    assert p.program == (("add", ("in", 0), ("in", 1)), ("add", ("t", 0), ("in", 2)), ("clip", ("t", 1), ("c", 0.0), ("c", 6.0)))
    assert [o.strides for o in p.inputs] == [(256, 1), (0, 1), (128, 1)]
    assert p.out_strides == (256, 1)
    assert pointwise.default(p).vector == 8
    assert epilogue_problem(conv.Problem(1, 8, 8, 8, 8)) is None


CHILD = """
import json, os, sys
request = json.loads(sys.stdin.read())
def say(**answer): print(json.dumps(answer), flush=True)
for number, trial in enumerate(request["trials"]):
    if number < request["start"][0]: continue
    if trial["most"] == 1: say(trial=number, reason="no plan fits"); continue
    for plan in range(request["start"][1] if number == request["start"][0] else 0, 4):
        say(trial=number, begin=plan)
        say(waiting=True)
        if plan == 2 and trial["most"] == 5: print("no such instruction", file=sys.stderr, flush=True); os._exit(9)
        if plan == 3 and trial["most"] == 6: os.abort()
        say(trial=number, plan=plan, us=10.0 - plan, error="refused" if plan == 1 else "")
say(done=True)
"""


@pytest.mark.parametrize("processes", [1, 2, 12])
def test_a_plan_that_ends_its_process_is_left_out_and_the_others_go_on(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untrusted, "CHILD", CHILD)
    monkeypatch.setattr(untrusted, "MOST_PROCESSES", processes)
    monkeypatch.setattr(untrusted, "LEAST_TRIALS", 1)
    monkeypatch.setattr(untrusted.os, "sched_getaffinity", lambda _: range(16), raising=False)
    trials = [untrusted.Trial("conv", PROBLEM, most=most) for most in (5, 1, 6)]
    first, second, third = untrusted.try_plans(trials)
    assert first.times_us == {0: 10.0, 3: 7.0}
    assert first.left_out == {1: "refused", 2: "it ended its process (exit code 9: no such instruction)"}
    assert first.best(1) == [3]
    assert (second.times_us, second.reason) == ({}, "no plan fits")
    assert third.times_us == {0: 10.0, 2: 8.0}
    assert "it ended its process" in third.left_out[3]


def test_a_process_that_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untrusted, "CHILD", "raise SystemExit('no such library')")
    with pytest.raises(TwofourError, match=r"trying the libraries' plans failed before or between plans \(exit code 1\): no such library"):
        untrusted.try_plans([untrusted.Trial("conv", PROBLEM)])
    monkeypatch.setattr(untrusted, "CHILD", "import time; time.sleep(60)")
    monkeypatch.setattr(untrusted, "START_PATIENCE_S", 0.2)
    with pytest.raises(TwofourError, match=r"failed before or between plans \(exit code -9\): it said nothing for 0 s"):
        untrusted.try_plans([untrusted.Trial("conv", PROBLEM)])


def test_a_process_may_take_longer_to_start_than_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untrusted, "CHILD", f"import time; time.sleep(0.5)\n{CHILD}")
    monkeypatch.setattr(untrusted, "PATIENCE_S", 0.4)
    (outcome,) = untrusted.try_plans([untrusted.Trial("conv", PROBLEM, most=4)])
    assert sorted(outcome.times_us) == [0, 2, 3]


def test_a_process_that_waits_for_the_gpu_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[dict[str, Any]] = []
    monkeypatch.setattr(untrusted, "_say", said.append)
    monkeypatch.setattr(untrusted, "WAIT_S", 0.01)
    lock = tmp_path / "gpu"
    lock.touch()
    with untrusted._alone(lock):
        other = threading.Thread(target=lambda: untrusted._alone(lock).__enter__())
        other.start()
        while not said:
            time.sleep(0.005)
    other.join(timeout=20)
    assert not other.is_alive()
    assert said[0] == {"waiting": True}


def test_an_error_that_ends_the_context_ends_the_process_and_any_other_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[dict[str, Any]] = []
    monkeypatch.setattr(untrusted, "_say", said.append)
    for lives in (True, False):
        monkeypatch.setattr(untrusted, "_context_lives", lambda lives=lives: lives)
        ended: list[int] = []
        monkeypatch.setattr(untrusted.os, "_exit", ended.append)
        with untrusted._told(3, 7):
            raise UnsupportedError("no")
        assert ended == ([] if lives else [untrusted.BROKEN])
    assert said[:2] == [{"trial": 3, "begin": 7}, {"trial": 3, "plan": 7, "us": 0.0, "error": "no"}]


def test_short_launches_are_timed_many_at_once() -> None:
    assert [untrusted.launches_for(us) for us in (0.0, 5.0, 100.0, 390.0, 1e5)] == [20, 20, 4, 1, 1]


@pytest.mark.parametrize("options", [{}, {"overlap": True}])
def test_a_product_is_timed_as_its_caller_launches_it(options: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """`twofour.nn` launches one kernel behind another, engines let them overlap."""
    asked: list[bool] = []

    def prepared(*_: Any, overlap: bool = False, **__: Any) -> Any:
        asked.append(overlap)
        return SimpleNamespace(workspace_bytes=0)

    monkeypatch.setattr(product_tactics, "Gemm", prepared)
    monkeypatch.setattr(product_tactics, "Buffer", lambda *_, **__: SimpleNamespace(pointer=0))
    product_tactics.prepare(gemm.Problem(64, 64, 64), product_tactics.Tactic("twofour", True, gemm.Config()), **options)
    assert asked == [bool(options)]


def test_cusparselt_searches_the_bare_product(monkeypatch: pytest.MonkeyPatch) -> None:
    driver, launchables = (importlib.import_module(f"twofour.{name}") for name in ("jit.driver", "kernels.launchable"))
    asked = gemm.Problem(8, 16, 16, epilogue=E("relu", bias=True, residual=True))
    made: list[Any] = []

    def make(family: str, library: str, problem: Any, config: Any = None, algorithm: int | None = None) -> Any:
        made.append((problem, algorithm))
        return SimpleNamespace(call=SimpleNamespace(compress=lambda _: SimpleNamespace(pointer=9), search=lambda *a: 42))

    said: list[dict[str, Any]] = []
    monkeypatch.setattr(launchables, "launchable", make)
    monkeypatch.setattr(driver, "Buffer", lambda *a, **k: SimpleNamespace(pointer=1))
    monkeypatch.setattr(untrusted, "_say", said.append)
    monkeypatch.setattr(untrusted, "_alone", lambda lock: contextlib.nullcontext())
    tryer = object.__new__(untrusted._Tryer)
    tryer._lock = Path()
    monkeypatch.setattr(tryer, "_rough_us", lambda call, addresses: 2.5, raising=False)
    tryer.cusparselt(0, asked, 0, 2)
    assert made == [(asked, None), (dataclasses.replace(asked, epilogue=E()), None), (asked, 42)]
    assert [answer["plan"] for answer in said if "plan" in answer] == [-1, 42]


def test_what_ends_the_context_names_its_algorithm(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    left: list[int] = []
    monkeypatch.setattr(untrusted, "_context_lives", lambda: False)
    monkeypatch.setattr(untrusted.os, "_exit", left.append)
    with untrusted._told(0, untrusted.SEARCH) as answer:
        answer["plan"] = 16392
        raise UnsupportedError("no such instruction")
    assert left == [untrusted.BROKEN]
    assert caplog.messages == ["algorithm 16392: no such instruction"]


def test_requests_survive_the_pipe() -> None:
    from twofour.kernels.families import read_problem
    from twofour.kernels.records import to_plain

    assert read_problem("conv", json.loads(json.dumps(to_plain(PROBLEM))), "p") == PROBLEM
