// Windows of an NHWC image reduced to their largest or mean value, and images resized. A thread owns neighbouring channels of a pixel.
#pragma once

#include "values.cuh"

namespace twofour {

// Laid out like kernels/pool/launch.py packs it.
struct PoolParams {
    const void* x;  // [batch, height, width, channels], x_pitch elements from pixel to pixel
    void* y;        // [batch, out_height, out_width, channels], y_pitch elements from pixel to pixel
    int64 groups;   // threads' worth of work: channel groups by column groups by rows by images
    int64 x_pitch;
    int64 y_pitch;
    double step_down;    // input pixels an output pixel, for a resize
    double step_across;
    int height;
    int width;
    int out_height;
    int out_width;
    int channel_groups;
    int column_groups;
    int kernel_height;
    int kernel_width;
    int stride_down;
    int stride_across;
    int dilation_down;
    int dilation_across;
    int pad_top;
    int pad_left;
    int counted_top;  // rows above the image that count in an average
    int counted_left;
    int counted_bottom;
    int counted_right;
    Divisor by_channel_groups;
    Divisor by_column_groups;
    Divisor by_out_height;
};

// Where a thread works.
template <bool kWide>
struct PoolPlace {
    int64 image;
    int row;
    int column_group;
    int channel_group;

    __device__ __forceinline__ PoolPlace(const PoolParams& p, int64 group) {
        using Offset = typename Index<kWide>::type;
        const Offset columns = Index<kWide>::divide(static_cast<Offset>(group), p.channel_groups, p.by_channel_groups);
        channel_group = static_cast<int>(group - static_cast<int64>(columns) * p.channel_groups);
        const Offset rows = Index<kWide>::divide(columns, p.column_groups, p.by_column_groups);
        column_group = static_cast<int>(columns - rows * p.column_groups);
        const Offset found = Index<kWide>::divide(rows, p.out_height, p.by_out_height);
        row = static_cast<int>(rows - found * p.out_height);
        image = found;
    }
};

// kHeight, kWidth: the window where it is small enough to unroll, else 0.
template <Type kType, int kVector, int kColumns, int kHeight, int kWidth, bool kMax, bool kWide>
__device__ __forceinline__ void pool(const PoolParams& p) {
    using Offset = typename Index<kWide>::type;
    const int64 step = static_cast<int64>(gridDim.x) * blockDim.x;
    const int kernel_height = kHeight > 0 ? kHeight : p.kernel_height, kernel_width = kWidth > 0 ? kWidth : p.kernel_width;
    wait_for_earlier_grid();
    for (int64 group = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x; group < p.groups; group += step) {
        const PoolPlace<kWide> place(p, group);
        const int top = place.row * p.stride_down - p.pad_top;
        const Offset corner = static_cast<Offset>(place.image) * p.height * p.width * static_cast<Offset>(p.x_pitch) + place.channel_group * kVector;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
            const int column = place.column_group * kColumns + c;
            if (column >= p.out_width) break;
            const int left = column * p.stride_across - p.pad_left;
            float y[kVector];
#pragma unroll
            for (int i = 0; i < kVector; ++i) y[i] = kMax ? -infinity() : 0.0f;
            int counted_rows = 0, counted_columns = 0;
#pragma unroll kHeight > 0 ? kHeight : 1
            for (int r = 0; r < kernel_height; ++r) {
                const int h = top + r * p.dilation_down;
                if (!kMax) counted_rows += h >= -p.counted_top && h < p.height + p.counted_bottom;
#pragma unroll kWidth > 0 ? kWidth : 1
                for (int s = 0; s < kernel_width; ++s) {
                    const int w = left + s * p.dilation_across;
                    if (h < 0 || h >= p.height || w < 0 || w >= p.width) continue;
                    Packet<kType, kVector> packet;
                    packet.load(p.x, corner + (static_cast<Offset>(h) * p.width + w) * static_cast<Offset>(p.x_pitch));
#pragma unroll
                    for (int i = 0; i < kVector; ++i) y[i] = kMax ? larger(y[i], packet.get(i)) : y[i] + packet.get(i);
                }
            }
            if (!kMax) {
                for (int s = 0; s < kernel_width; ++s) {
                    const int w = left + s * p.dilation_across;
                    counted_columns += w >= -p.counted_left && w < p.width + p.counted_right;
                }
                const float count = static_cast<float>(counted_rows) * static_cast<float>(counted_columns);
#pragma unroll
                for (int i = 0; i < kVector; ++i) y[i] /= count;
            }
            Packet<kType, kVector> packet;
            packet.set(y);
            packet.store(p.y, ((place.image * p.out_height + place.row) * p.out_width + column) * p.y_pitch + place.channel_group * kVector);
        }
    }
    let_next_grid_start();
}

enum class Coordinate { kHalfPixel, kPytorchHalfPixel, kAlignCorners, kAsymmetric };
enum class Rounding { kPreferFloor, kPreferCeil, kFloor, kCeil };

// Where output pixel `index` lies in the input. Source: ONNX operator Resize.
// NOTE: in double without fused multiply-adds, so that every rounding is the host's
template <Coordinate kCoordinate>
__device__ __forceinline__ double source_place(int index, double step, int out) {
    if constexpr (kCoordinate == Coordinate::kHalfPixel || kCoordinate == Coordinate::kPytorchHalfPixel) {
        if (kCoordinate == Coordinate::kPytorchHalfPixel && out == 1) return 0.0;
        return __dadd_rn(__dmul_rn(index + 0.5, step), -0.5);
    }
    return __dmul_rn(static_cast<double>(index), step);
}

template <Rounding kRounding>
__device__ __forceinline__ int nearest_pixel(double place, int size) {
    const double found = kRounding == Rounding::kFloor         ? floor(place)
                         : kRounding == Rounding::kCeil        ? ceil(place)
                         : kRounding == Rounding::kPreferFloor ? ceil(__dadd_rn(place, -0.5))
                                                               : floor(__dadd_rn(place, 0.5));
    return static_cast<int>(fmin(fmax(found, 0.0), size - 1.0));
}

template <Type kType, int kVector, bool kLinear, Coordinate kCoordinate, Rounding kRounding, bool kWide>
__device__ __forceinline__ void resize(const PoolParams& p) {
    const int64 step = static_cast<int64>(gridDim.x) * blockDim.x;
    wait_for_earlier_grid();
    for (int64 group = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x; group < p.groups; group += step) {
        const PoolPlace<kWide> place(p, group);
        const double down = source_place<kCoordinate>(place.row, p.step_down, p.out_height);
        const double across = source_place<kCoordinate>(place.column_group, p.step_across, p.out_width);
        const int64 out = ((place.image * p.out_height + place.row) * p.out_width + place.column_group) * p.y_pitch + place.channel_group * kVector;
        const auto at = [&](int h, int w) { return ((place.image * p.height + h) * p.width + w) * p.x_pitch + place.channel_group * kVector; };
        Packet<kType, kVector> packet;
        if constexpr (!kLinear) {
            packet.load(p.x, at(nearest_pixel<kRounding>(down, p.height), nearest_pixel<kRounding>(across, p.width)));
        } else {
            const double h = fmin(fmax(down, 0.0), p.height - 1.0), w = fmin(fmax(across, 0.0), p.width - 1.0);
            const int top = static_cast<int>(h), left = static_cast<int>(w);
            const int bottom = min(top + 1, p.height - 1), right = min(left + 1, p.width - 1);
            const float below = static_cast<float>(h - top), beside = static_cast<float>(w - left);
            Packet<kType, kVector> a, b, c, d;
            a.load(p.x, at(top, left));
            b.load(p.x, at(top, right));
            c.load(p.x, at(bottom, left));
            d.load(p.x, at(bottom, right));
            float y[kVector];
#pragma unroll
            for (int i = 0; i < kVector; ++i) {
                const float upper = a.get(i) * (1.0f - beside) + b.get(i) * beside;
                const float lower = c.get(i) * (1.0f - beside) + d.get(i) * beside;
                y[i] = upper * (1.0f - below) + lower * below;
            }
            packet.set(y);
        }
        packet.store(p.y, out);
    }
    let_next_grid_start();
}

}  // namespace twofour
