// The work list of a persistent thread block: its share of the split tiles first, then whole tiles.
#pragma once

#include "gemm_common_16bit.cuh"

namespace twofour {

// A tile, or a run of its k blocks.
struct Unit {
    int tile;
    int first_k;
    int last_k;  // one past the end
};

// Where a tile lies. Tiles run down a group of row tiles, then to the next token tile: a wave covers a near-square of the output.
struct Place {
    int row_tile;
    int token_tile;

    __device__ __forceinline__ Place(const GemmParams& p, int tile) {
        const int group = p.by_group_tiles.divide(tile);
        const int inside = tile - group * p.group * p.token_tiles;
        const bool is_last = (group + 1) * p.group >= p.row_tiles;
        token_tile = is_last ? p.by_last_group.divide(inside) : p.by_group.divide(inside);
        row_tile = group * p.group + inside - token_tile * (is_last ? p.row_tiles - group * p.group : p.group);
    }
};

// NOTE: a split tile belongs to the block that holds its first k block; that piece is the last of its block's share, the other pieces are the
// first of theirs, so nobody waits for a block that waits itself. Blocks start in order of their index, so of a launch that shares the GPU
// with others only the last started reader can be waiting for a block that has not started.
class WorkList {
   public:
    __device__ __forceinline__ explicit WorkList(const GemmParams& p) : whole_(blockIdx.x), position_(share_begin(p, blockIdx.x)) {}

    // First iteration of a block's share in the split iteration space: floor(block x iterations / split_blocks).
    __device__ static __forceinline__ int share_begin(const GemmParams& p, int block) {
        block = min(block, p.split_blocks);
        return block * p.share_quotient + p.by_split_blocks.divide(block * p.share_remainder);
    }

    __device__ __forceinline__ bool next(const GemmParams& p, Unit& unit) {
        const int end = share_begin(p, blockIdx.x + 1);
        if (position_ < end) {
            const int index = p.by_k_blocks.divide(position_);
            unit.tile = p.whole_tiles + index;
            unit.first_k = position_ - index * p.k_blocks;
            unit.last_k = min(p.k_blocks, unit.first_k + end - position_);
            position_ += unit.last_k - unit.first_k;
            return true;
        }
        unit.tile = whole_;
        unit.first_k = 0;
        unit.last_k = p.k_blocks;
        whole_ += gridDim.x;
        return unit.tile < p.whole_tiles;
    }

   private:
    int whole_;
    int position_;
};

}  // namespace twofour
