// Grouped 3 x 3 convolution of NHWC images on tensor cores.
//
// A thread block owns 64 neighbouring channels and walks down the rows of its tiles: some columns of some images. Two warps move data: a
// step's input rows come as one box of a tensor map (zeros around the images are the padding), a finished output row leaves as one. The
// others multiply. Each keeps the weights of its 8 or 16 output channels in registers, and reads every input row once: the sums
// of all output rows that a row takes part in are held at the same time.
#pragma once

#include "pointwise.cuh"
#include "tensor_core.cuh"

namespace twofour {

constexpr int kSlab = 64;          // channels of a thread block
constexpr int kLine = 2 * kSlab;   // bytes of a pixel in shared memory
constexpr int kTaps = 3;           // rows and columns of the kernel
constexpr int kOutBuffers = 2;
constexpr int kMovingRegisters = 24;

// Laid out like kernels/grouped/launch.py packs it.
struct alignas(64) GroupedParams {
    TensorMap x;          // [images, rows, columns, channels], box a tile with its halo, 128-byte swizzle
    TensorMap y;          // as x, box a tile's output row
    const uint4* weight;  // words of `mma` operands, lane by lane
    const float* bias;    // [channels]
    int channels;
    int height;         // of X
    int out_height;
    int top;
    int left;
    int column_stride;
    int images;         // of a tile
    int columns;        // of a tile's output
    int box_columns;    // of a tile's input
    int strip;          // output rows of an item
    int strips;
    int column_tiles;
    int items;          // tiles times strips
    int slabs;
    int blocks;         // of one slab
    int stages;
    int stage_bytes;    // from stage to stage
    int box_bytes;      // of a stage that are filled
    int total;          // tiles of 16 pixels of all warps of a channel
    Divisor by_slabs;
    Divisor by_strips;
    Divisor by_column_tiles;
    Divisor by_columns;
};

template <int kUnit_, int kWarpsM_, int kTiles_, int kStride_, int kRegisters_, bool kWhole_, bool kBf16_, bool kBias_, Op kActivation_>
struct GroupedChoice {
    static constexpr int kUnit = kUnit_;      // channels that are multiplied with each other
    static constexpr int kWarpsM = kWarpsM_;  // warps that share 8 kN channels
    static constexpr int kTiles = kTiles_;    // 16 pixels each, of a warp
    static constexpr int kStride = kStride_;  // rows
    static constexpr int kRegisters = kRegisters_;  // of a multiplying thread; 0: as many as the others
    static constexpr bool kWhole = kWhole_;  // every warp has all its tiles
    static constexpr bool kBf16 = kBf16_;
    static constexpr bool kBias = kBias_;
    static constexpr Op kActivation = kActivation_;
    static constexpr int kN = kUnit == 8 ? 1 : 2;               // eights of output channels of a warp
    static constexpr int kK = kUnit == 8 ? 1 : kUnit / 16;      // 16 channels (8 of a unit of 8) a tap
    static constexpr int kWarpsN = kSlab / (8 * kN);
    static constexpr int kWarps = kWarpsN * kWarpsM;            // that multiply
    static constexpr int kSets = kStride == 1 ? 3 : 2;          // output rows that a step's input rows take part in
    static constexpr int kLag = kSets - 1;                      // steps from an output row's first to its last
    static constexpr int kHalves = kUnit == 8 ? 1 : 2;
    static constexpr int kWords = kTaps * kTaps * kK * kN * kHalves;
    static constexpr int kQuads = (kWords + 3) / 4;
    static constexpr int kOutBytes = 16 * kWarpsM * kTiles * kLine;
    static_assert(kUnit == 8 || kUnit == 16 || kUnit == 32 || kUnit == 64, "a slab holds whole units");
    static_assert(kUnit != 8 || kTiles % 2 == 0, "units of 8 load the third tap of two tiles at once");
};

// Where a block is in its work, as a moving warp follows it.
struct Place {
    int item;
    int step;
    int image;
    int column;     // of Y
    int first_row;  // of Y

    __device__ __forceinline__ void begin(const GroupedParams& p, int next) {
        item = next, step = 0;
        const int rest = p.by_strips.divide(item), group = p.by_column_tiles.divide(rest);
        first_row = (item - rest * p.strips) * p.strip;
        column = (rest - group * p.column_tiles) * p.columns;
        image = group * p.images;
    }
    // To the next step; false behind the last one.
    __device__ __forceinline__ bool advance(const GroupedParams& p, int steps) {
        if (++step < steps) return true;
        begin(p, item + p.blocks);
        return item < p.items;
    }
};

template <class C>
struct Grouped {
    const GroupedParams& p;
    const int slab;
    const int first_item;
    const int steps;  // of an item
    // Addresses in shared memory.
    const uint32 stages;
    const uint32 outs;
    const uint32 full;     // [stages] barriers: the stage's rows have come
    const uint32 done;     // [stages] barriers: every warp has read them
    const uint32 written;  // [kOutBuffers] barriers: every warp has written its part of an output row
    const uint32 free;     // [kOutBuffers] barriers: the row has left

    __device__ __forceinline__ Grouped(const GroupedParams& params, uint32 shared, int number)
        : p(params),
          slab(number - params.by_slabs.divide(number) * params.slabs),
          first_item(params.by_slabs.divide(number)),
          steps(params.strip + C::kLag),
          stages(shared),
          outs(shared + params.stages * params.stage_bytes),
          full(outs + kOutBuffers * C::kOutBytes),
          done(full + 8 * params.stages),
          written(done + 8 * params.stages),
          free(written + 8 * kOutBuffers) {}

    __device__ __forceinline__ void prepare() const {
        for (int i = 0; i < p.stages; ++i) barrier_init(full + 8 * i, 1), barrier_init(done + 8 * i, C::kWarps);
        for (int i = 0; i < kOutBuffers; ++i) barrier_init(written + 8 * i, C::kWarps), barrier_init(free + 8 * i, 1);
        barrier_init_fence();
    }

    // Row of X that a step of an item stages first.
    __device__ __forceinline__ int staged_row(int first_row, int step) const { return (first_row + step) * C::kStride - p.top; }

    // Whether the row that a step stages in place h is one of the image and anything needs it.
    __device__ __forceinline__ bool is_needed(int row, int h, int step) const {
        return static_cast<unsigned>(row + h) < static_cast<unsigned>(p.height) && (h == 0 || step + 1 < steps);
    }

    // One thread each: `loading` loads steps as far ahead as there are stages, the other stores rows as they are finished.
    __device__ __forceinline__ void move(bool loading) const {
        prefetch_map(loading ? &p.x : &p.y);
        Place at;
        at.begin(p, first_item);
        const int places = loading ? p.stages : kOutBuffers;
        int place = 0;  // stage or buffer
        uint32 phase = loading;
        do {
            if (loading) {
                barrier_wait(done + 8 * place, phase);
                const int row = staged_row(at.first_row, at.step);
                const uint32 barrier = full + 8 * place;
                if (row + C::kStride > 0 && row < p.height) {
                    barrier_arrive_expecting(barrier, p.box_bytes);
                    copy_box(stages + place * p.stage_bytes, &p.x, slab * kSlab, at.column * p.column_stride - p.left, row, at.image, barrier);
                } else {
                    barrier_arrive(barrier);  // rows of padding alone are not multiplied
                }
            } else {
                if (at.step < C::kLag) continue;
                barrier_wait(written + 8 * place, phase);
                const int row = at.first_row + at.step - C::kLag;
                if (row < p.out_height) store_box(&p.y, outs + place * C::kOutBytes, slab * kSlab, at.column, row, at.image);
                store_commit();
                store_wait_read<0>();
                barrier_arrive(free + 8 * place);
            }
            if (++place == places) place = 0, phase ^= 1;
        } while (at.advance(p, steps));
    }

    // A multiplying warp: n of the slab's channels, m of its pixels.
    struct Warp {
        bool speaks;   // for the warp
        int n;
        int m;
        int piece;     // 16 bytes of a staged pixel that this lane points at
        uint32 place;  // of this lane's first word of an output row
        int lines[C::kTiles];                               // pixel in the stage that this lane points at, tile by tile
        int pair_lines[C::kUnit == 8 ? C::kTiles / 2 : 1];  // of two tiles, for the third tap
        uint32 weight[4 * C::kQuads];
        float bias[C::kN][2];
        float sums[C::kSets][C::kTiles][C::kN][4];
    };

    __device__ __forceinline__ int tile(const Warp& w, int t) const { return t * C::kWarpsM + w.m; }

    __device__ __forceinline__ int line(int pixel) const {
        const int image = p.by_columns.divide(pixel);
        return image < p.images ? image * C::kStride * p.box_columns + (pixel - image * p.columns) * p.column_stride : 0;
    }

    __device__ __forceinline__ void begin(Warp& w) const {
        const int lane = threadIdx.x % 32;
        w.speaks = lane == 0;
        w.n = threadIdx.x / 32 % C::kWarpsN;
        w.m = threadIdx.x / 32 / C::kWarpsN;
        w.piece = C::kUnit == 8 ? w.n : w.n * C::kN / (C::kUnit / 8) * (C::kUnit / 8) + lane / 16;
        w.place = address(outs, lane / 4, w.n * C::kN) + lane % 4 * 4;
        const int row = lane % 16;
#pragma unroll
        for (int t = 0; t < C::kTiles; ++t) w.lines[t] = line(16 * tile(w, t) + row) + (C::kUnit == 8 ? lane / 16 : 0);
        if constexpr (C::kUnit == 8) {
#pragma unroll
            for (int t = 0; t < C::kTiles / 2; ++t) w.pair_lines[t] = line(16 * tile(w, 2 * t + lane / 16) + row);
        }
        const uint4* words = p.weight + (slab * C::kWarpsN + w.n) * C::kQuads * 32 + lane;
#pragma unroll
        for (int i = 0; i < C::kQuads; ++i) {
            const uint4 four = __ldg(words + 32 * i);
            w.weight[4 * i] = four.x, w.weight[4 * i + 1] = four.y, w.weight[4 * i + 2] = four.z, w.weight[4 * i + 3] = four.w;
        }
#pragma unroll
        for (int n = 0; n < C::kN; ++n) {
            const int channel = slab * kSlab + 8 * (w.n * C::kN + n) + lane % 4 * 2;
#pragma unroll
            for (int i = 0; i < 2; ++i) w.bias[n][i] = C::kBias && channel < p.channels ? __ldg(p.bias + channel + i) : 0.0f;
        }
#pragma unroll
        for (int set = 0; set < C::kSets; ++set) clear(w, set);
    }

    __device__ static __forceinline__ void clear(float (&sums)[4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[i] = 0.0f;
    }

    __device__ __forceinline__ void clear(Warp& w, int set) const {
#pragma unroll
        for (int t = 0; t < C::kTiles; ++t)
#pragma unroll
            for (int n = 0; n < C::kN; ++n) clear(w.sums[set][t][n]);
    }

    // Address of eight channels of a staged pixel. The swizzle: the 16-byte piece's number, exclusive or the line's number modulo 8.
    __device__ __forceinline__ uint32 address(uint32 stage, int line, int piece) const {
        return stage + line * kLine + ((piece ^ (line & 7)) << 4);
    }

    __device__ __forceinline__ bool has(const Warp& w, int t) const {
        return C::kWhole || t < C::kTiles - (C::kUnit == 8 ? 2 : 1) || tile(w, t) < p.total;
    }

    // The set of sums for kernel row r in a turn.
    __device__ static constexpr int set_of(int turn, int r) { return C::kStride == 1 ? (turn + 3 - r) % 3 : (turn + r / 2) % 2; }

    // Multiply the row staged in place h with every kernel row that meets it.
    template <int kTurn>
    __device__ __forceinline__ void multiply_row(Warp& w, uint32 stage, int h) const {
        const int skipped = h * p.box_columns;
        if constexpr (C::kUnit == 8) {
#pragma unroll
            for (int t = 0; t < C::kTiles; t += 2) {
                if (!has(w, t)) continue;
                uint32 pixels[2][4], third[4];  // taps 0 and 1 of each tile; tap 2 of both
#pragma unroll
                for (int i = 0; i < 2; ++i) load_matrices(pixels[i], address(stage, w.lines[t + i] + skipped, w.piece));
                load_matrices(third, address(stage, w.pair_lines[t / 2] + skipped + 2, w.piece));
#pragma unroll
                for (int r = 0; r < kTaps; ++r) {
                    if (C::kStride == 2 && r % 2 != h) continue;
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        float(&sums)[4] = w.sums[set_of(kTurn, r)][t + i][0];
                        if (r == 0) clear(sums);
                        multiply<C::kBf16>(sums, pixels[i], w.weight[3 * r], w.weight[3 * r + 1]);
                        multiply<C::kBf16>(sums, third[2 * i], third[2 * i + 1], w.weight[3 * r + 2]);
                    }
                }
            }
        } else {
#pragma unroll
            for (int t = 0; t < C::kTiles; ++t) {
                if (!has(w, t)) continue;
#pragma unroll
                for (int s = 0; s < kTaps; ++s) {
                    const uint32 from = address(stage, w.lines[t] + skipped + s, w.piece);
#pragma unroll
                    for (int k = 0; k < C::kK; ++k) {
                        uint32 pixels[4];
                        load_matrices(pixels, from ^ (k << 5));
#pragma unroll
                        for (int r = 0; r < kTaps; ++r) {
                            if (C::kStride == 2 && r % 2 != h) continue;
#pragma unroll
                            for (int n = 0; n < C::kN; ++n) {
                                float(&sums)[4] = w.sums[set_of(kTurn, r)][t][n];
                                const int word = (((r * kTaps + s) * C::kK + k) * C::kN + n) * 2;
                                if (r == 0 && s == 0 && k == 0) clear(sums);
                                multiply<C::kBf16>(sums, pixels, w.weight[word], w.weight[word + 1]);
                            }
                        }
                    }
                }
            }
        }
    }

    // Put the sums of a finished row, activated, where they are stored from.
    __device__ __forceinline__ void finish(const Warp& w, int set, int out) const {
#pragma unroll
        for (int t = 0; t < C::kTiles; ++t) {
            if (!has(w, t)) continue;
#pragma unroll
            for (int n = 0; n < C::kN; ++n) {
                const float(&sums)[4] = w.sums[set][t][n];
                float y[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) y[i] = operate<C::kActivation, true>(C::kBias ? sums[i] + w.bias[n][i % 2] : sums[i], 0.0f, 6.0f);
                const uint32 at = (w.place ^ n << 4) + out * C::kOutBytes + tile(w, t) * 16 * kLine;
                store_shared(at, pack_pair<C::kBf16>(y[0], y[1]));
                store_shared(at + 8 * kLine, pack_pair<C::kBf16>(y[2], y[3]));
            }
        }
        fence_shared_for_copies();
    }

    struct Turn {
        int stage;
        uint32 phase;
        uint32 rows;  // finished so far
    };

    template <int kTurn>
    __device__ __forceinline__ void step(Warp& w, Turn& now, int first_row, int number) const {
        const int row = staged_row(first_row, number);
        const uint32 stage = stages + now.stage * p.stage_bytes;
        barrier_wait(full + 8 * now.stage, now.phase);
#pragma unroll
        for (int h = 0; h < C::kStride; ++h) {
            if (is_needed(row, h, number)) {
                multiply_row<kTurn>(w, stage, h);
            } else if (h == 0) {
                clear(w, kTurn);
            }
        }
        __syncwarp();
        if (w.speaks) barrier_arrive(done + 8 * now.stage);
        if (number >= C::kLag) {
            const int out = now.rows % kOutBuffers;
            barrier_wait(free + 8 * out, now.rows / kOutBuffers % 2 ^ 1);
            finish(w, (kTurn + 1) % C::kSets, out);
            __syncwarp();
            if (w.speaks) barrier_arrive(written + 8 * out);
            ++now.rows;
        }
        if (++now.stage == p.stages) now.stage = 0, now.phase ^= 1;
    }

    __device__ __forceinline__ void work() const {
        Warp w;
        begin(w);
        Turn now = {0, 0, 0};
        for (int item = first_item; item < p.items; item += p.blocks) {
            const int first_row = (item - p.by_strips.divide(item) * p.strips) * p.strip;
            for (int number = 0; number < steps; number += C::kSets) {
                step<0>(w, now, first_row, number);
                if (number + 1 < steps) step<1>(w, now, first_row, number + 1);
                if constexpr (C::kSets == 3) {
                    if (number + 2 < steps) step<2>(w, now, first_row, number + 2);
                }
            }
        }
    }
};

template <class C>
__device__ __forceinline__ void grouped(const GroupedParams& p) {
    extern __shared__ __align__(1024) uint8 shared[];
    uint32 base = shared_address(shared);
    int number = blockIdx.x;
    if (threadIdx.x == 0) Grouped<C>(p, base, number).prepare();
    __syncthreads();
    let_next_grid_start();
    wait_for_earlier_grid();
    if (threadIdx.x < 32 * C::kWarps) {
        if constexpr (C::kRegisters > 0) take_registers<C::kRegisters>();
        // NOTE: opaque to the compiler, or what both roles derive from them is computed before they part and kept in registers.
        asm volatile("" : "+r"(base), "+r"(number));
        Grouped<C>(p, base, number).work();
    } else {
        if constexpr (C::kRegisters > 0) give_registers<kMovingRegisters>();
        const int role = threadIdx.x / 32 - C::kWarps;
        if (threadIdx.x % 32 == 0 && role < 2) Grouped<C>(p, base, number).move(role == 0);
    }
}

}  // namespace twofour
