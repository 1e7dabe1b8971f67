// Everything a level's file needs from outside, before it sets the compiler's target: what the standard headers
// define inline must not be compiled for instructions that another CPU lacks.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <utility>

#include "cpu/kernels.h"
#if defined(__x86_64__)
#include <immintrin.h>
#define FUSED_LOSSES_X86 1
#else
#define FUSED_LOSSES_X86 0
#endif
