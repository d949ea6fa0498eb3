// Each channel of an NHWC image convolved by itself.
#pragma once

#include "depthwise_band.cuh"
#include "depthwise_walk.cuh"
