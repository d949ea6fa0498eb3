"""The contract of the matrix-product family: what is asked (Problem), what is chosen (Config), what follows (Launch).

    D[tokens, outputs] = epilogue(X[tokens, inputs] . W[rows, inputs]^T),  fp32 accumulation

Everything here is a pure function of plain values: no tensor, no compiler, no GPU. `choose` (builder/tactics) times what `candidates`
lists.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import ceil, sqrt

from twofour.errors import InputError, nearest
from twofour.kernels.operands import check_config
from twofour.pattern.pack_sm90 import BLOCK_K, BLOCK_ROWS, block_bytes

ACTIVATIONS = ("none", "relu", "relu6", "gelu", "gelu_tanh", "silu", "hardswish")
INPUT_DTYPES = ("bf16", "fp16")
OUTPUT_DTYPES = ("bf16", "fp16", "fp32")
KERNELS = ("tuned", "pipelined", "naive")
TILE_TOKENS = (*range(64, 193, 8), 208, 224, 240, 256)
SMEM_BYTES = 232_448  # the most one block may ask for on compute capability 9.0
MAX_STAGES = 5
STORE_CHUNKS = 4
BARRIER_BYTES = 128  # behind the stages: two barriers each, one a buffer of staged outputs, two for their turns
FLAG_BYTES = 4096  # in front of the partial sums; zero between launches
MAX_DIM = 2**31 - 1
LEAST_TILE = 32  # rows and tokens of the smallest tile, the naive kernel's; tiles are counted in 31 bits


@dataclass(frozen=True)
class Epilogue:
    """What is fused behind the product: `y = activation(acc * scale + bias + residual)`.

    With `gated` the weight holds 2 x outputs rows, gates first: `y = activation(acc_gate * scale + bias) * (acc_up * scale + bias)`.

    Attributes:
        activation: one of `ACTIVATIONS`; `gelu` is the erf form.
        scale: a fp32 vector, one factor a weight row.
        bias: a fp32 vector, one addend a weight row.
        residual: a matrix of the output's dtype and shape, added before the activation; not with `gated`.
    """

    activation: str = "none"
    scale: bool = False
    bias: bool = False
    residual: bool = False
    gated: bool = False

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            hint = nearest(self.activation, ACTIVATIONS)
            raise InputError(f"activation {self.activation!r} is not one of {', '.join(ACTIVATIONS)}{hint}")
        if self.gated and self.residual:
            raise InputError("a gated epilogue cannot add a residual, expected one of the two; add the residual in the next layer")


@dataclass(frozen=True)
class Problem:
    """One matrix product as asked.

    Attributes:
        tokens: rows of X and D, >= 1.
        outputs: columns of D, a multiple of 8; W has `weight_rows` rows (twice as many when gated).
        inputs: columns of X and W, a multiple of 8 for X's 16-byte rows; a sparse W is 2:4 along it.
        dtype: of X and W, one of `INPUT_DTYPES`.
        out_dtype: of D and the residual, one of `OUTPUT_DTYPES`.
        sparse: whether W is packed 2:4; False asks for the dense form of the same kernel.
    """

    tokens: int
    outputs: int
    inputs: int
    dtype: str = "bf16"
    out_dtype: str = "bf16"
    sparse: bool = True
    epilogue: Epilogue = field(default_factory=Epilogue)

    def __post_init__(self) -> None:
        for name, value, step in (("tokens", self.tokens, 1), ("outputs", self.outputs, 8), ("inputs", self.inputs, 8)):
            if value < 1 or value % step:
                raise InputError(f"{name} is {value}, expected a positive multiple of {step}; pad it when the weight is packed")
            if value > MAX_DIM:
                raise InputError(f"{name} is {value}, expected at most {MAX_DIM}; cut the product into several")
        for name, dtype, known in (("dtype", self.dtype, INPUT_DTYPES), ("out_dtype", self.out_dtype, OUTPUT_DTYPES)):
            if dtype not in known:
                raise InputError(f"{name} {dtype!r} is not one of {', '.join(known)}{nearest(dtype, known)}")

        if self.weight_rows > MAX_DIM or ceil(self.tokens / LEAST_TILE) * ceil(self.weight_rows / LEAST_TILE) > MAX_DIM:
            raise InputError(
                f"{self.tokens} tokens by {self.weight_rows} weight rows are more than {MAX_DIM} tiles of {LEAST_TILE} x {LEAST_TILE}, "
                "which the kernels do not count; cut the product into several"
            )

    @property
    def weight_rows(self) -> int:
        """Rows of W: outputs, or twice as many when gated."""
        return self.outputs * (2 if self.epilogue.gated else 1)

    @property
    def flops(self) -> int:
        """Effective operations: 2 x tokens x weight_rows x inputs, zeros counted."""
        return 2 * self.tokens * self.weight_rows * self.inputs

    @property
    def row_blocks(self) -> int:
        """Packed blocks of `BLOCK_ROWS` weight rows."""
        return ceil(self.weight_rows / BLOCK_ROWS)

    @property
    def k_blocks(self) -> int:
        """Packed blocks of `BLOCK_K` input channels."""
        return ceil(self.inputs / BLOCK_K)


@dataclass(frozen=True, order=True)
class Config:
    """One way to compute a Problem.

    Attributes:
        kernel: one of `KERNELS`; the others exist to check the tuned one against.
        tile_rows: weight rows of a tile: 256 (each consumer warpgroup its own 128 rows) or 128 (both share them and halve the tokens, or
            share them `by_rows`).
        tile_tokens: tokens of a tile, one of `TILE_TOKENS`.
        stages: depth of the ring in shared memory.
        split: whether tiles too few for the GPU are cut along the inputs; partial sums are added in a fixed order, so results repeat.
        buffers: for outputs of 16 bits on their way out: one, which the warpgroups share, or one for each; with a residual always two.
            `by_rows`: of one chunk of `store_chunks` each, at most the whole tile; with a residual always that.
        by_rows: whether each warpgroup takes 64 of a tile's 128 rows and all of its tokens: weights are read once, not by both.
    """

    kernel: str = "tuned"
    tile_rows: int = 256
    tile_tokens: int = 192
    stages: int = 4
    split: bool = True
    buffers: int = 1
    by_rows: bool = False

    @property
    def tile(self) -> str:
        """Tile rows, tile tokens and stages, and buffers where there are several, as they are printed: 256x128x4x2, 64+64x256x4x3."""
        rows = "64+64" if self.by_rows else self.tile_rows
        numbers = (rows, self.tile_tokens, self.stages) + (self.buffers,) * (self.buffers > 1)
        return "x".join(map(str, numbers))

    @property
    def warpgroup_tokens(self) -> int:
        """Tokens of a tile that one warpgroup multiplies."""
        return self.tile_tokens if self.tile_rows == 256 or self.by_rows else self.tile_tokens // 2


@dataclass(frozen=True)
class Launch:
    """What follows from Problem, Config and the number of multiprocessors; integers the kernel is given.

    Attributes:
        grid: thread blocks. threads: a block. smem_bytes: dynamic shared memory a block.
        row_tiles, token_tiles, k_blocks: the iteration space.
        group: row tiles walked before the next token tile (L2 reuse).
        whole_tiles: tiles computed whole; the rest, `split_blocks` thread blocks share evenly.
        workspace_bytes: scratch for partial sums and flags; zeroed once by its owner, left zeroed where it matters by each launch.
    """

    grid: int
    threads: int
    smem_bytes: int
    row_tiles: int
    token_tiles: int
    k_blocks: int
    group: int
    whole_tiles: int
    split_blocks: int
    workspace_bytes: int

    @property
    def tiles(self) -> int:
        """All tiles."""
        return self.row_tiles * self.token_tiles


def stage_bytes(config: Config, sparse: bool) -> int:
    """Return the bytes of one ring stage: activations, then the packed blocks of the tile's rows."""
    return config.tile_tokens * BLOCK_K * 2 + config.tile_rows // BLOCK_ROWS * block_bytes(sparse)


def staging_buffers(problem: Problem, config: Config) -> int:
    """Return how many buffers the staged outputs have."""
    if not loads_residual(problem, config):
        return config.buffers
    return store_chunks(config) if config.by_rows else 2


def staging_bytes(problem: Problem, config: Config) -> int:
    """Return the bytes in which 16-bit outputs wait for the copy engine, half a tile of D a buffer; none for fp32, which is not staged.

    A buffer of a tile shared by rows holds one chunk of its tokens.
    """
    if problem.out_dtype == "fp32":
        return 0
    half = config.tile_rows * config.tile_tokens // (2 if problem.epilogue.gated else 1)
    buffer = 2 * half // store_chunks(config) if config.by_rows else half
    return buffer * staging_buffers(problem, config)


def loads_residual(problem: Problem, config: Config) -> bool:
    """Return whether the copy engine brings the residual to where outputs are staged; else each thread reads its own from memory."""
    return problem.epilogue.residual and config.kernel == "tuned" and problem.out_dtype != "fp32"


def store_chunks(config: Config) -> int:
    """Return in how many boxes of whole eight tokens a warpgroup's staged outputs leave: small ones, which let loads pass between."""
    return next(chunks for chunks in (STORE_CHUNKS, 3, 2, 1) if config.warpgroup_tokens % (8 * chunks) == 0)


def smem_bytes(problem: Problem, config: Config) -> int:
    """Return the dynamic shared memory of the tuned kernel: ring, staged outputs, barriers."""
    return config.stages * stage_bytes(config, problem.sparse) + staging_bytes(problem, config) + BARRIER_BYTES


def most_tokens(epilogue: Epilogue, out_dtype: str = "bf16") -> int:
    """Return the widest 256-row tile whose accumulators and `epilogue` fit in a thread's registers without spilling (ptxas 13.0)."""
    if epilogue.residual and out_dtype != "fp32":
        return 176  # the warp that also loads residuals has 40 registers, the multiplying ones 232
    if epilogue.residual and epilogue.activation not in ("none", "relu", "relu6"):
        return 160
    return 184 if epilogue.scale or epilogue.bias or epilogue.residual else 192


def why_not(problem: Problem, config: Config) -> str | None:
    """Return why `config` cannot compute `problem`, or None when it can. The only legality rule."""
    if config.kernel not in KERNELS:
        return f"kernel {config.kernel!r} is not one of {', '.join(KERNELS)}{nearest(config.kernel, KERNELS)}"
    if config.kernel != "tuned":
        return None
    if config.tile_rows not in (128, 256):
        return f"a tile of {config.tile_rows} rows is not built, expected 128 or 256"
    if config.tile_tokens not in TILE_TOKENS:
        return f"a tile of {config.tile_tokens} tokens is not built, expected a multiple of 8 from 64 to 192, or of 16 up to 256"
    if config.tile_rows == 256 and config.tile_tokens > 192:
        return (
            f"a tile of 256 rows and {config.tile_tokens} tokens needs more accumulator registers than a thread has, expected at most 192"
        )
    if config.by_rows:
        return why_not_by_rows(problem, config) or why_not_shared_memory(problem, config)
    if config.tile_rows == 128 and (config.tile_tokens < 128 or config.tile_tokens % 16):
        return f"a tile of 128 rows halves its tokens between two warpgroups, expected a multiple of 16 from 128, got {config.tile_tokens}"
    most = most_tokens(problem.epilogue, problem.out_dtype)
    if config.tile_rows == 256 and config.tile_tokens > most:
        return f"this epilogue leaves registers for {most} tokens of a 256-row tile, not {config.tile_tokens}"
    if config.buffers not in (1, 2):
        return f"{config.buffers} buffers for staged outputs, expected one or two"
    if config.buffers == 2 and problem.out_dtype == "fp32":
        return "outputs of fp32 are not staged, expected one buffer"
    return why_not_shared_memory(problem, config)


def why_not_by_rows(problem: Problem, config: Config) -> str | None:
    """Return why a tile cannot be shared by rows, or None when it can."""
    if config.tile_rows != 128:
        return f"a tile shared by rows has 128, 64 for each warpgroup, not {config.tile_rows}"
    if config.tile_tokens < 128 or config.tile_tokens % 16:
        return f"a tile shared by rows has a multiple of 16 tokens from 128, not {config.tile_tokens}"
    if problem.epilogue.gated:
        return "the gates and the ups of a tile shared by rows are in different warpgroups; share it by tokens"
    most = 1 if problem.out_dtype == "fp32" else store_chunks(config)
    if not 1 <= config.buffers <= most:
        return f"{config.buffers} buffers for the staged outputs of a tile shared by rows, expected at least one and at most {most}"
    return None


def why_not_shared_memory(problem: Problem, config: Config) -> str | None:
    """Return why ring, staged outputs and barriers do not fit in shared memory, or None when they do."""
    if config.stages < 3:
        return f"a ring of {config.stages} stages cannot keep two in flight, expected at least 3"
    needed = smem_bytes(problem, config)
    if needed > SMEM_BYTES:
        return f"{config.stages} stages and the staged outputs need {needed} bytes of shared memory, a block has {SMEM_BYTES}"
    buffers = staging_buffers(problem, config)
    barriers = 8 * (2 * config.stages + buffers + (buffers if config.by_rows else 2))
    if barriers > BARRIER_BYTES:
        return f"the barriers of {config.stages} stages take {barriers} bytes, there are {BARRIER_BYTES}; use fewer stages"
    return None


def best_buffers(problem: Problem, tile_rows: int, tile_tokens: int) -> int:
    """Return two where a ring of four stages still fits beside them, else one: measured, the second gains less than a fourth stage."""
    if problem.out_dtype == "fp32":
        return 1
    return 2 if most_stages(problem, tile_rows, tile_tokens, 2) >= 4 or problem.epilogue.residual else 1


def most_stages(problem: Problem, tile_rows: int, tile_tokens: int, buffers: int = 1) -> int:
    """Return the deepest ring of at most `MAX_STAGES` that fits; deeper ones were slower once the power limit holds the clock."""
    return fitting_stages(problem, Config(tile_rows=tile_rows, tile_tokens=tile_tokens, buffers=buffers))


def shared_by_rows(problem: Problem, tile_tokens: int) -> Config:
    """Return the tile shared by rows with buffers for all its outputs, or for all but one chunk where only then four stages fit.

    A residual takes the place of all outputs.
    """
    config = Config("tuned", 128, tile_tokens, by_rows=True)
    whole = replace(config, buffers=1 if problem.out_dtype == "fp32" else store_chunks(config))
    fewer = replace(whole, buffers=max(1, whole.buffers - 1))
    takes_fewer = fitting_stages(problem, whole) < 4 <= fitting_stages(problem, fewer)
    chosen = fewer if takes_fewer else whole
    return replace(chosen, stages=fitting_stages(problem, chosen))


def fitting_stages(problem: Problem, config: Config) -> int:
    """Return the deepest ring of at most `MAX_STAGES` that `config` leaves room for, in bytes and in barriers, whatever its own."""
    config = replace(config, stages=0)
    buffers = staging_buffers(problem, config)
    barriers = BARRIER_BYTES // 8 - buffers - (buffers if config.by_rows else 2)
    return min(MAX_STAGES, barriers // 2, (SMEM_BYTES - smem_bytes(problem, config)) // stage_bytes(config, problem.sparse))


def pick_group(row_tiles: int, config: Config, sparse: bool, grid: int) -> int:
    """Return how many row tiles are walked together, so that one wave reads the fewest bytes of weights and activations.

    A wave of `grid` tiles, g rows by grid / g tokens, reads g x rows x weight bytes + grid / g x tokens x activation bytes for each input.
    """
    weight = config.tile_rows * (1.125 if sparse else 2.0)
    activation = config.tile_tokens * 2.0
    best = max(1, round(sqrt(grid * activation / weight)))
    groups = max(1, round(row_tiles / best))
    return ceil(row_tiles / groups)


def derive(problem: Problem, config: Config, num_sms: int = 132) -> Launch:
    """Return the Launch of `config` for `problem` on a GPU of `num_sms` multiprocessors.

    Raises:
        InputError: `why_not` has a reason.
    """
    check_config(problem, config, why_not(problem, config))
    if config.kernel == "naive":
        row_tiles, token_tiles = ceil(problem.weight_rows / LEAST_TILE), ceil(problem.tokens / LEAST_TILE)
        return Launch(row_tiles * token_tiles, 256, 0, row_tiles, token_tiles, problem.k_blocks, row_tiles, row_tiles * token_tiles, 0, 0)
    if config.kernel == "pipelined":
        row_tiles, token_tiles = problem.row_blocks, ceil(problem.tokens / 64)
        smem = 3 * (64 * BLOCK_K * 2 + block_bytes(problem.sparse)) + BARRIER_BYTES
        return Launch(
            row_tiles * token_tiles, 128, smem, row_tiles, token_tiles, problem.k_blocks, row_tiles, row_tiles * token_tiles, 0, 0
        )
    row_tiles, token_tiles = ceil(problem.weight_rows / config.tile_rows), ceil(problem.tokens / config.tile_tokens)
    tiles, k_blocks = row_tiles * token_tiles, problem.k_blocks
    whole, split_blocks = share_out(tiles, k_blocks, num_sms) if config.split else (tiles, 0)
    grid = min(num_sms, max(min(whole, num_sms), split_blocks))
    accumulators = config.tile_rows * config.tile_tokens * 4
    return Launch(
        grid=grid,
        threads=384,
        smem_bytes=smem_bytes(problem, config),
        row_tiles=row_tiles,
        token_tiles=token_tiles,
        k_blocks=k_blocks,
        group=pick_group(row_tiles, config, problem.sparse, grid),
        whole_tiles=whole,
        split_blocks=split_blocks,
        workspace_bytes=FLAG_BYTES + split_blocks * accumulators if split_blocks else 0,
    )


MIN_SPLIT_K_BLOCKS = 6  # shorter pieces cost more in partial sums than they save


def share_out(tiles: int, k_blocks: int, num_sms: int) -> tuple[int, int]:
    """Return (tiles computed whole, thread blocks that share the others along the inputs); (tiles, 0) where nothing is gained.

    Fewer tiles than multiprocessors are cut into a whole number of equal pieces each, so that all pieces walk the same inputs at the same
    time and find them in the L2. A last, partly filled wave behind whole ones is left alone: cutting it was slower on every shape measured.
    """
    if tiles >= num_sms:
        return tiles, 0
    pieces = min(num_sms // tiles, k_blocks // MIN_SPLIT_K_BLOCKS)
    return (0, pieces * tiles) if pieces > 1 else (tiles, 0)


# The model, fitted to measurements on the H200 (docs/kernels/gemm.md): microseconds.
LAUNCH_US = 3.0  # launch, first loads, last stores
STORE_US_A_TOKEN = 0.0065  # what one token column of a tile costs its epilogue
PARTIAL_US_A_TOKEN = 0.035  # writing and reading one column of partial sums, for every piece but the first
K_BLOCK_US: dict[tuple[bool, int], tuple[float, float]] = {  # (sparse, tile rows): a k block takes a + b x tile tokens
    (True, 256): (0.081, 0.00286),
    (True, 128): (0.10, 0.00143),
    (False, 256): (0.10, 0.0047),
    (False, 128): (0.12, 0.0025),
}
# Of 123 KiB in 0.466 us, a tile of 128 x 256 shared by rows reads 9 KiB of weights less than one shared by tokens. Bursts of three shapes
# are within 0.5 % of what follows, relative to 256 x 128.
K_BLOCK_US_BY_ROWS = (0.066, 0.00143)
MAY_WIN = 1.04  # how far behind the fastest a config may be modelled and still be the fastest
SHALLOW_RING = 1.03  # a ring of three stages hides less latency


def modelled_us(problem: Problem, config: Config, num_sms: int = 132) -> float:
    """Return the modelled time of `config`: the busiest thread block's k blocks, stores and partial sums."""
    launch = derive(problem, config, num_sms)
    fixed, a_token = K_BLOCK_US_BY_ROWS if config.by_rows and problem.sparse else K_BLOCK_US[problem.sparse, config.tile_rows]
    k_block = (fixed + a_token * config.tile_tokens) * (SHALLOW_RING if config.stages < 4 else 1.0)
    columns = config.tile_tokens * config.tile_rows / 256
    us = LAUNCH_US + ceil(launch.whole_tiles / num_sms) * (launch.k_blocks * k_block + STORE_US_A_TOKEN * columns)
    if launch.split_blocks:
        pieces = launch.split_blocks // launch.tiles
        us += ceil(launch.k_blocks / pieces) * k_block + (STORE_US_A_TOKEN + PARTIAL_US_A_TOKEN * (pieces - 1)) * columns
    return us


def candidates(problem: Problem, num_sms: int = 132, limit: int = 8) -> Sequence[Config]:
    """Return at most `limit` legal configs of the tuned kernel, the fastest by the model first.

    At most one of them is shared by rows, of a sparse weight and where the model gives it a chance: the tensor cores bound dense products.
    """
    by_tokens = []
    for tile_rows in (256, 128):
        for tile_tokens in TILE_TOKENS:
            buffers = best_buffers(problem, tile_rows, tile_tokens)
            stages = most_stages(problem, tile_rows, tile_tokens, buffers)
            by_tokens.append(Config("tuned", tile_rows, tile_tokens, stages, buffers=buffers))
    found = _modelled(problem, by_tokens, num_sms)
    shared = _modelled(problem, [shared_by_rows(problem, tokens) for tokens in TILE_TOKENS], num_sms) if problem.sparse else {}
    best = min(shared, key=lambda config: (shared[config], config), default=None)
    if best is not None and shared[best] <= MAY_WIN * min(found.values()):
        found[best] = shared[best]
    return sorted(found, key=lambda config: (found[config], config))[:limit]


def _modelled(problem: Problem, configs: Sequence[Config], num_sms: int) -> dict[Config, float]:
    """The modelled time of those of `configs` that are legal, whole and, where that cuts tiles, split."""
    found = {}
    for config in (replace(config, split=split) for config in configs for split in (False, True)):
        if why_not(problem, config) is None and not (config.split and derive(problem, config, num_sms).split_blocks == 0):
            found[config] = modelled_us(problem, config, num_sms)
    return found


def default(problem: Problem, num_sms: int = 132) -> Config:
    """Return the config the model believes fastest, without timing anything."""
    return candidates(problem, num_sms, limit=1)[0]
