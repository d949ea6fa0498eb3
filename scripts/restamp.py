"""Prove that recorded kernels are unchanged machine code and stamp their rows: `python scripts/restamp.py OLD_SRC results/GPU/gemm.json`.

Results are stale once the device sources of a kernel family differ from those they were measured with. OLD_SRC is the `src` folder of the
revision that measured them (`git worktree add`). Whatever kernel a row may have run is compiled from both sources; only where each has the
same instructions, constants, relocations and registers, byte for byte, does the row get the digests of the present sources. Exit code 1 if
any row stays stale. Several files may be given: gemm.json, conv.json, engine.json, engine-agreement.json, engine-soak.json.

The kernels of `twofour measure gemm` and of layers measured alone are named in their rows. A row of an engine does not say which kernels
won, so all that its build can have chosen must be unchanged: of every problem its network is lowered to, in the terms of every family that
can state it, every config that the old sources offer (of products every legal one), dense and, where 2:4 kernels were asked for, sparse.
Families whose sources have not changed need no proof. Networks are lowered by the old sources from an ONNX file with random weights, which
`--work` holds, left there by evidence/engine.py or estimate_networks.py, or gets; a row is refused where it had another number of layers.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from same_code import Case, Tree, changed

from twofour.builder.gpus import GPUS
from twofour.errors import InputError
from twofour.files import write_text, written_aside
from twofour.kernels.families import OURS, family, restated
from twofour.kernels.records import to_plain

ROOT = Path(__file__).parents[1]
SAID = 5  # kernels of a row that are named


@dataclass(frozen=True)
class Graph:
    """A network as one engine was built from it.

    Attributes:
        folder: in `--work`. make: the dense module and inputs for it. layers, eligible: how many the record has; None: it does not say.
    """

    folder: str
    make: Callable[[], tuple[Any, tuple[Any, ...]]]
    batch: int
    precision: str
    sparse: bool
    layers: int | None = None
    eligible: int | None = None

    def __str__(self) -> str:
        return f"{self.folder} batch {self.batch} {self.precision} {'2:4' if self.sparse else 'dense'}"


@dataclass(frozen=True)
class Claim:
    """Digests in a results file, and what they say was run.

    Attributes:
        places: the objects that hold them, and under which name. family: the one they are of; None: a family's name -> its digest.
        cases, graphs: the kernels, named or as networks.
    """

    name: str
    places: tuple[tuple[dict[str, Any], str], ...]
    family: str | None = None
    cases: tuple[Case, ...] = ()
    graphs: tuple[Graph, ...] = ()

    def is_of(self, digests: dict[str, str]) -> bool:
        """Return whether it was measured with the sources of these digests."""
        held, name = self.places[0]
        return bool(held[name] == (digests if self.family is None else digests.get(self.family)))

    def stamp(self, digests: dict[str, str]) -> None:
        """Write these digests."""
        for held, name in self.places:
            held[name] = dict(digests) if self.family is None else digests[self.family]


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def gemm_claims(record: dict[str, Any]) -> Iterator[Claim]:
    """Yield the rows of `twofour measure gemm`."""
    for row in record["rows"]:
        places = ((row, "sources_digest"), (row["versions"], "ours"))
        yield Claim(row["name"] + " " + row["dtype"], places, "gemm", tuple(kernels_of(row)))


def kernels_of(row: dict[str, Any]) -> Iterator[Case]:
    """Yield our kernels in a row, from the names of its tactics; shapes are launch arguments and do not matter."""
    for name in row["tactics"].values():
        if name is not None and name.startswith("twofour:"):
            form, tile = name.removeprefix("twofour:").removesuffix(":split").rsplit(":", 1)
            rows, *sizes = tile.split("x")
            tokens, stages, *buffers = map(int, sizes)
            config = {"kernel": "tuned", "tile_rows": sum(map(int, rows.split("+"))), "tile_tokens": tokens, "stages": stages}
            # Older sources know neither a choice of buffers nor tiles shared by rows.
            config |= {"buffers": buffers[0]} if buffers else {}
            config |= {"by_rows": True} if "+" in rows else {}
            shape = {"tokens": 128, "outputs": 128, "inputs": 128}
            yield ["gemm", {**shape, "dtype": row["dtype"], "out_dtype": row["dtype"], "sparse": form == "2:4"}, config]


def conv_claims(record: dict[str, Any]) -> Iterator[Claim]:
    """Yield the rows of benchmarks/grouped.py and depthwise.py."""
    rows = evidence("conv_rows", "benchmarks")
    for row in record["rows"]:
        name = row["family"]
        problem = to_plain(restated("conv", rows.problem_of(row))[name])
        ours = [way.removeprefix(f"{OURS} {name} ").split() for way in row["times_us"] if way.startswith(f"{OURS} {name} ")]
        cases: list[Case] = [[name, problem, config_named(name, words)] for words in ours]
        yield Claim(f"{row['net']} {row['in']} at {row['pixels'][0]}, {row['batch']}", ((row, "sources_digest"),), name, tuple(cases))


def config_named(name: str, words: Sequence[str]) -> dict[str, Any]:
    """Return a family's config that a way prints as these words."""
    kind = family(name).config
    assert kind is not None
    return dict(zip((field.name for field in fields(kind)), [int(word) if word.isdigit() else word for word in words], strict=True))


def engine_claims(record: dict[str, Any]) -> Iterator[Claim]:
    """Yield the rows of evidence/engine.py but torch.compile's, which ran no kernel of ours."""
    rows = evidence("engine_rows")
    for row in record["rows"]:
        if row["variant"] == rows.PEER:
            continue
        folder = rows.NETWORKS[row["net"]][0].replace(":", "-")

        def make(net: str = row["net"]) -> tuple[Any, tuple[Any, ...]]:
            engine = evidence("engine")
            return engine.make_network(net), (engine.images(2, seed=2),)

        sparse = row["variant"] == rows.SPARSE
        graph = Graph(folder, make, row["batch"], row["precision"], sparse, row.get("layers"), row.get("layers_eligible"))
        yield Claim(f"{rows.Group.of(row)}, {row['variant']}", ((row, "sources"),), graphs=(graph,))


def agreement_claims(record: dict[str, Any]) -> Iterator[Claim]:
    """Yield what all rows of evidence/engine_agreement.py say together."""
    import torch

    batch, networks = evidence("engine_agreement").BATCH, evidence("accuracy_oneshot").CifarResNet

    def maker(net: str) -> Callable[[], tuple[Any, tuple[Any, ...]]]:
        return lambda: (networks(int(net.removeprefix("ResNet-"))).eval(), (torch.zeros(2, 3, 32, 32),))

    graphs = [Graph(f"cifar-{r['net']}", maker(r["net"]), batch, r["precision"], r["variant"] == "2:4") for r in record["rows"]]
    yield Claim("all rows", ((record, "sources_digests"),), graphs=tuple(graphs))


def soak_claims(record: dict[str, Any]) -> Iterator[Claim]:
    """Yield what all parts of a soak say together."""
    plan = evidence("soak_plan", "scripts/gpu")
    graphs = tuple(Graph("soak", plan.network, batch, "fp16", True) for batch in plan.BATCHES)
    yield Claim("all parts", ((record, "sources"),), graphs=graphs)


CLAIMS: dict[str, Callable[[dict[str, Any]], Iterator[Claim]]] = {
    "gemm": gemm_claims,
    "conv": conv_claims,
    "engine": engine_claims,
    "engine agreement": agreement_claims,
    "engine-soak": soak_claims,
}


def evidence(name: str, folder: str = "evidence") -> Any:
    """Return the module of a script."""
    from importlib import import_module

    path = str(ROOT / folder)
    if path not in sys.path:
        sys.path.append(path)
    return import_module(name)


def onnx_of(graph: Graph, work: Path) -> Path:
    """Return a network's ONNX file, pruned to 2:4 where the engine was asked for 2:4 kernels; made where `work` lacks it."""
    path = work / graph.folder / f"{'sparse' if graph.sparse else 'dense'}.onnx"
    if not path.is_file():
        import twofour
        from twofour.exchange.export import captured

        say(f"making {path}")
        model, inputs = graph.make()
        if graph.sparse:
            twofour.prune(model, inputs, permute=False, reestimate=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as aside:
            captured(model, inputs).save(aside, external_data=False)
    return path


@dataclass(frozen=True)
class Results:
    """A results file as it was read."""

    path: Path
    text: str
    record: dict[str, Any]
    claims: tuple[Claim, ...]

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Return the file's content and claims.

        Raises:
            InputError: it cannot be read, or results of its kind have no digests to be stamped.
        """
        try:
            text = path.read_text(encoding="utf-8")
            record = json.loads(text)
            kind = record["kind"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{str(path)!r} is no results file ({error!r}), expected results/GPU/*.json") from error
        if kind not in CLAIMS:
            raise InputError(f"{str(path)!r} holds {kind!r} results, expected one of {', '.join(map(repr, CLAIMS))}; measure them anew")
        return cls(path, text, record, tuple(CLAIMS[kind](record)))

    @property
    def sms(self) -> int:
        """Multiprocessors of the GPU that was measured.

        Raises:
            InputError: it is unknown.
        """
        gpu = self.record["machine"]["gpu"]
        found = [one.sms for name, one in GPUS.items() if name in gpu.split()]
        if not found:
            raise InputError(f"{str(self.path)!r} was measured on {gpu!r}, expected one of {', '.join(GPUS)}; add it to builder/gpus.py")
        return found[0]

    def write(self) -> None:
        """Write the file aside and rename it, in the form it had.

        Raises:
            InputError: another process has written it since.
        """
        if self.path.read_text(encoding="utf-8") != self.text:
            raise InputError(f"{str(self.path)!r} was changed by another process; call the same command again, what is compiled is kept")
        write_text(self.path, json.dumps(self.record, indent=1, ensure_ascii=self.text.isascii()) + "\n")


@dataclass(frozen=True)
class Proof:
    """Both sources, where networks and compiled codes are kept, and how many processes may compile at once."""

    old: Tree
    new: Tree
    work: Path
    cache: Path
    jobs: int

    def cases(self, claims: list[Claim], families: set[str], sms: int) -> tuple[list[list[Case]], list[str]]:
        """Return each claim's kernels of some families, and why it cannot be proven; empty where it can."""
        graphs = list(dict.fromkeys(graph for claim in claims for graph in claim.graphs))
        asked = [
            {"path": str(onnx_of(g, self.work).resolve()), "batch": g.batch, "precision": g.precision, "sparse": g.sparse} for g in graphs
        ]
        if asked:
            say(f"listing the kernels that {len(asked)} engines may hold")
        known = dict(zip(graphs, self.old.ask("listed", graphs=asked, sms=sms) if asked else [], strict=True))
        found, reasons = [], []
        for claim in claims:
            every = [*claim.cases, *(case for graph in claim.graphs for case in known[graph]["cases"])]
            found.append([case for case in every if case[0] in families])
            others = [
                f"{graph} has {known[graph][name]} {words}, the row {wanted}"
                for graph in claim.graphs
                for name, words, wanted in (("layers", "layers", graph.layers), ("eligible", "eligible layers", graph.eligible))
                if wanted is not None and known[graph][name] != wanted
            ]
            reasons.append("; ".join(others))
        return found, reasons

    def stamp(self, results: Results, before: dict[str, str], after: dict[str, str]) -> int:
        """Stamp what is unchanged, and return how many claims stay stale."""
        claims = [claim for claim in results.claims if claim.is_of(before) and not claim.is_of(after)]
        others = [claim for claim in results.claims if not claim.is_of(before) and not claim.is_of(after)]
        families = {name for name in before if before[name] != after.get(name)}
        cases, reasons = self.cases(claims, families, results.sms)
        every = {json.dumps(case): case for each, reason in zip(cases, reasons, strict=True) if not reason for case in each}
        found = changed(self.old, self.new, list(every.values()), sms=results.sms, folder=self.cache, jobs=self.jobs, say=say)
        for claim in others:
            say(f"{claim.name}: of sources that are neither the old nor the present ones")
        stale = len(others)
        for claim, each, reason in zip(claims, cases, reasons, strict=True):
            bad = {found[key][0]: (case, found[key][1]) for case in each if (key := json.dumps(case)) in found}
            if not bad and not reason:
                claim.stamp(after)
                continue
            stale += 1
            say(f"{claim.name}: {reason or f'{len(bad)} kernels differ'}")
            for case, why in list(bad.values())[:SAID]:
                say(f"    {told(case)}: {why}")
        if not stale and results.record.get("sources_digest") == before["gemm"]:
            results.record["sources_digest"] = after["gemm"]
        if stale < len(results.claims):
            results.write()
        say(f"{results.path}: {len(results.claims) - stale} of {len(results.claims)} are of the present sources")
        return stale


def told(case: Case) -> str:
    """Return a kernel in words: the fields of its config and problem that are set."""

    def words(value: Any) -> str:
        if not isinstance(value, dict):
            return str(value)
        return ", ".join(f"{name} {words(field)}" for name, field in value.items() if field not in (False, None, [], "none"))

    family, problem, config = case
    return f"{family} ({words(config)}) for {words(problem)}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old_src", type=Path)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--src", type=Path, default=ROOT / "src", help="the present sources")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "engine", help="where networks are kept")
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "restamp", help="where what was compiled is kept")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile at once")
    options = parser.parse_args(arguments)
    proof = Proof(Tree(options.old_src), Tree(options.src), options.work, options.cache, options.jobs)
    try:
        for tree in (proof.old, proof.new):
            if not (tree.src / "twofour" / "__init__.py").is_file():
                raise InputError(f"{str(tree.src)!r} holds no package twofour, expected the src folder of a revision")
        before, after = (tree.ask("digests") for tree in (proof.old, proof.new))
        stale = sum(proof.stamp(results, before, after) for results in [Results.read(path) for path in options.results])
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
