// Multi-scale deformable attention, forward and backward (Deformable DETR, Eq. 3; FP-DETR, 3.2).
//
//   output[b, q, m] = sum_i a_i v_i   over the L * P samples i of a pair (query q, head m), where
//   a = softmax(logit[b, q, m]) and v_i = value_l[b, :, :, m] at reference * (W_l, H_l) + offset_i - 0.5
//
// Between pixels v_i is bilinear, outside of the map zero (grid_sample, align_corners=False, zero padding).
// Softmax and places are computed here, in registers: no tensor ever holds them.
//
// One text for GPUs (deform_attn.py compiles it with NVRTC) and CPUs (with the system's C++ compiler).
// The tests run its GPU half on a CPU as well. Every build fixes, by -D options:
//
//   CHANNELS HEADS LEVELS POINTS   C, M, L, P
//   VALUE_T OFFSET_T LOGIT_T       what memory holds: float, bf16, fp16 or double
//   REAL                           what is computed in: float, or double for doubles
//   FORWARD_VEC FORWARD_LANES BACKWARD_VEC BACKWARD_LANES   as follows
//
// A group of LANES neighbouring threads of a warp works on a pair. Each holds C / LANES channels, as vectors
// of VEC that one instruction loads. They share the preparation: in a round every lane prepares one sample
// (softmax, place, corners), and all lanes gather these LANES samples, which warp shuffles hand round. On a
// CPU a pair has one lane and one vector of C channels, and all of this folds away.
//
// Deterministic: the output and the gradients of offset and logit; on a CPU everything. On a GPU the
// gradient of value is summed by float atomics, in an order that changes from run to run.
#if defined(__CUDACC__) || defined(GPU_EMULATOR)
#define ON_GPU true
#define UNROLL _Pragma("unroll")
#define DEVICE __device__ __forceinline__
#else
#include <cmath>
using std::exp;  // C's would compute in double
using std::floor;
#define ON_GPU false
#define UNROLL
#define DEVICE static inline __attribute__((always_inline))
#define __shfl_sync(mask, x, lane, lanes) (x)      // with one lane ...
#define __shfl_xor_sync(mask, x, step, lanes) (x)  // ... there is nobody to ask
#endif

typedef long long i64;
typedef REAL real;
const int SAMPLES = LEVELS * POINTS, TOKEN = HEADS * CHANNELS;

// ------------------------------------------------------------------------------------------- 16-bit storage
struct bf16 { unsigned short bits; };
struct fp16 { unsigned short bits; };
union Bits { unsigned u; float f; };

DEVICE real to_real(float x) { return x; }
DEVICE real to_real(double x) { return x; }
DEVICE real to_real(bf16 x) { return Bits{(unsigned)x.bits << 16}.f; }  // the upper half of a float
DEVICE void store(float &to, real x) { to = x; }
DEVICE void store(double &to, real x) { to = x; }
DEVICE void store(bf16 &to, real x) {  // to the nearest, ties to even
    Bits b;
    b.f = x;
    to.bits = x == x ? (b.u + 0x7fff + (b.u >> 16 & 1)) >> 16 : 0x7fff;
}
#ifdef __CUDACC__
DEVICE real to_real(fp16 x) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x.bits)); return f; }
DEVICE void store(fp16 &to, real x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"((float)x)); }
#else
DEVICE real to_real(fp16 x) {  // its bits, moved to where a float has them, lack 112 in the exponent
    const unsigned magnitude = (x.bits & 0x7fffu) << 13;
    float f = Bits{magnitude}.f * 0x1p112f;
    if (f >= 65536) f = Bits{magnitude | 0x7f800000}.f;  // infinity and NaN
    return x.bits & 0x8000 ? -f : f;
}
DEVICE void store(fp16 &to, real x) {
    Bits b;
    b.f = (x < 0 ? -x : x) * real(0x1p-112);
    const unsigned rounded = (b.u + 0xfff + (b.u >> 13 & 1)) >> 13;
    to.bits = (x < 0 ? 0x8000 : 0) | (x != x ? 0x7e00 : rounded < 0x7c00 ? rounded : 0x7c00);
}
#endif

// ------------------------------------------------------------------------------------------------ arguments
// deform_attn.py has the same struct. Tensors are contiguous and begin at a multiple of 16 bytes.
struct Arguments {
    const VALUE_T *value;        // (B, S, M, C)
    const real *reference;       // (B, Q, L, 2) as (x, y) in [0, 1]
    const OFFSET_T *offset;      // (B, Q, M, L, P, 2) as (x, y) in pixels of level l
    const LOGIT_T *logit;        // (B, Q, M, L, P)
    VALUE_T *output;             // (B, Q, M, C)
    const VALUE_T *grad_output;  // (B, Q, M, C)
    real *grad_value;            // (B, S, M, C), zero on entry
    OFFSET_T *grad_offset;       // (B, Q, M, L, P, 2)
    LOGIT_T *grad_logit;         // (B, Q, M, L, P)
    i64 B, S, Q, threads;        // threads: of a CPU
    int height[LEVELS], width[LEVELS], start[LEVELS];  // start: the level's first token
};

// ----------------------------------------------------------------------------------- what lanes do together
template <int LANES> DEVICE real sum_over_lanes(real x) {
    for (int step = LANES / 2; step; step /= 2) x += __shfl_xor_sync(~0u, x, step, LANES);
    return x;
}

// Lane j receives the sum of all lanes' x[j]. They exchange half of the array, then a quarter, and so on:
// LANES - 1 shuffles instead of LANES * log2(LANES).
template <int LANES> DEVICE real transposed_sum(real (&x)[LANES], int lane) {
    UNROLL for (int half = LANES / 2; half; half /= 2)
        UNROLL for (int j = 0; j < half; j++) {
            const bool upper = lane & half;
            const real mine = upper ? x[j + half] : x[j], theirs = upper ? x[j] : x[j + half];
            x[j] = mine + __shfl_xor_sync(~0u, theirs, half, LANES);
        }
    return x[0];
}

// weight[r] = exp(logit - the pair's largest) for this lane's sample r * LANES + lane, 0 beyond the last.
// Returns 1 / (the pair's sum), the factor that is still missing.
template <int LANES, int ROUNDS>
DEVICE real softmax(const LOGIT_T *logit, int lane, real (&weight)[ROUNDS]) {
    real most = to_real(logit[0]), sum = 0;
    for (int i = lane; i < SAMPLES; i += LANES) most = to_real(logit[i]) > most ? to_real(logit[i]) : most;
    for (int step = LANES / 2; step; step /= 2) {
        const real other = __shfl_xor_sync(~0u, most, step, LANES);
        most = other > most ? other : most;
    }
    UNROLL for (int r = 0; r < ROUNDS; r++) {
        const int i = r * LANES + lane;
        sum += weight[r] = i < SAMPLES ? exp(to_real(logit[i]) - most) : real(0);
    }
    return 1 / sum_over_lanes<LANES>(sum);
}

// -------------------------------------------------------------------------------------------------- samples
struct Sample {
    int at;  // 16 * (token of the upper left corner) + a bit for each of the four corners that is on the map
    real fx, fy, weight;
};

// Sample i of a pair. Its place is first clamped to just outside of the map, so that far, infinite and NaN
// offsets (no comparison with NaN is true) touch no memory.
DEVICE Sample place(const Arguments &a, i64 query, i64 pair, int i, real weight) {
    const int level = i / POINTS, H = a.height[level], W = a.width[level];
    const real *reference = a.reference + (query * LEVELS + level) * 2;
    const OFFSET_T *offset = a.offset + (pair * SAMPLES + i) * 2;
    real x = reference[0] * W + to_real(offset[0]) - real(0.5);
    real y = reference[1] * H + to_real(offset[1]) - real(0.5);
    x = x > -2 ? (x < W + 1 ? x : W + 1) : -2;
    y = y > -2 ? (y < H + 1 ? y : H + 1) : -2;
    const int x0 = (int)floor(x), y0 = (int)floor(y);
    const bool left = x0 >= 0 && x0 < W, right = x0 >= -1 && x0 < W - 1;
    const bool top = y0 >= 0 && y0 < H, bottom = y0 >= -1 && y0 < H - 1;
    const int on_map = (left && top) | (right && top) << 1 | (left && bottom) << 2 | (right && bottom) << 3;
    return {(a.start[level] + y0 * W + x0) * 16 + on_map, x - x0, y - y0, weight};
}

// The corners of the sample that lane j has prepared: upper left, upper right, lower left, lower right.
struct Corners {
    int on_map;  // bit k: corner k
    int token[4];
    real weight[4];
};

template <int LANES> DEVICE Corners corners(const Arguments &a, const Sample &mine, int round, int j) {
    const int at = __shfl_sync(~0u, mine.at, j, LANES), i = round * LANES + j;
    const real fx = __shfl_sync(~0u, mine.fx, j, LANES), fy = __shfl_sync(~0u, mine.fy, j, LANES);
    const real weight = __shfl_sync(~0u, mine.weight, j, LANES), lower = weight * fy, upper = weight - lower;
    const int token = at >> 4, below = token + a.width[i < SAMPLES ? i / POINTS : 0];
    return {at & 15, {token, token + 1, below, below + 1},
            {upper - upper * fx, upper * fx, lower - lower * fx, lower * fx}};
}

// ------------------------------------------------------------------------------------------------- channels
// Row: VEC channels of a token. A GPU loads them by one instruction, as zeros if the token is not on the
// map: under a predicate, without a branch, so that many loads are under way together. A CPU branches, and
// loads when it computes.
#if ON_GPU
template <typename T, int VEC> struct alignas(sizeof(T) * VEC) Packed {
    T x[VEC];
    DEVICE real operator[](int c) const { return to_real(x[c]); }
};
template <int VEC> struct alignas(2 * VEC) Packed<bf16, VEC> {  // words: one instruction for either half
    unsigned x[VEC / 2];
    DEVICE real operator[](int c) const { return Bits{c % 2 ? x[c / 2] & 0xffff0000 : x[c / 2] << 16}.f; }
};
template <> struct Packed<bf16, 1> { bf16 x; DEVICE real operator[](int) const { return to_real(x); } };
template <int VEC> struct Row {
    real x[VEC];
    DEVICE Row() {}
    DEVICE Row(const VALUE_T *p, bool on_map) {
        Packed<VALUE_T, VEC> packed = {};
        if (on_map) packed = *(const Packed<VALUE_T, VEC> *)p;
        UNROLL for (int c = 0; c < VEC; c++) x[c] = packed[c];
    }
    DEVICE real operator[](int c) const { return x[c]; }
};
#else
template <int VEC> struct Row {
    const VALUE_T *p;
    Row() {}
    Row(const VALUE_T *p, bool) : p(p) {}
    real operator[](int c) const { return to_real(p[c]); }
};
#endif

// p += w * row. On a GPU other groups may be adding to the same token; from sm_90 on by 16 bytes at once.
template <int VEC> DEVICE void add(real *p, real w, const Row<VEC> &row) {
#if ON_GPU && __CUDA_ARCH__ >= 900
    if constexpr (VEC == 4 && sizeof(real) == 4)
        atomicAdd((float4 *)p, make_float4(w * row[0], w * row[1], w * row[2], w * row[3]));
    else
#endif
        UNROLL for (int c = 0; c < VEC; c++)
#if ON_GPU
            atomicAdd(p + c, w * row[c]);
#else
            p[c] += w * row[c];
#endif
}

// -------------------------------------------------------------------------------------------------- forward
// Query q, head m of image b. keep is false where there is no such query: the lane only joins in shuffles.
template <int VEC, int LANES>
DEVICE void forward(const Arguments &a, i64 b, i64 q, int m, int lane, bool keep) {
    const int ROUNDS = (SAMPLES + LANES - 1) / LANES, PARTS = CHANNELS / VEC / LANES, STEP = VEC * LANES;
    const i64 query = b * a.Q + q, pair = query * HEADS + m;
    const VALUE_T *value = a.value + (b * a.S * HEADS + m) * CHANNELS + lane * VEC;
    real weight[ROUNDS], out[PARTS][VEC] = {};
    const real scale = softmax<LANES>(a.logit + pair * SAMPLES, lane, weight);
#pragma unroll (ROUNDS <= 8 ? ROUNDS : 1)
    for (int r = 0; r < ROUNDS; r++) {
        const int i = r * LANES + lane;
        const Sample mine = keep && i < SAMPLES ? place(a, query, pair, i, weight[r]) : Sample{};
        UNROLL for (int j = 0; j < LANES; j++) {
            const Corners at = corners<LANES>(a, mine, r, j);
            UNROLL for (int part = 0; part < PARTS; part++) {
                Row<VEC> v[4];
                UNROLL for (int k = 0; k < 4; k++)
                    v[k] = {value + i64(at.token[k]) * TOKEN + part * STEP, bool(at.on_map & 1 << k)};
                UNROLL for (int k = 0; k < 4; k++)
                    if (ON_GPU || at.on_map & 1 << k)
                        UNROLL for (int c = 0; c < VEC; c++) out[part][c] += at.weight[k] * v[k][c];
            }
        }
    }
    VALUE_T *output = a.output + pair * CHANNELS + lane * VEC;
    for (int part = 0; part < PARTS; part++)
        for (int c = 0; c < VEC; c++)
            if (keep) store(output[part * STEP + c], out[part][c] * scale);
}

// ------------------------------------------------------------------------------------------------- backward
// With g the gradient of the output, and w_k, v_k, d_k = g . v_k of each corner k of a sample of weight a:
//   grad v_k += a w_k g      grad a = sum_k w_k d_k      grad (x, y) = a sum_k (dw_k/dx, dw_k/dy) d_k
//   grad logit_i = a_i (grad a_i - sum_j a_j grad a_j)
template <int VEC, int LANES>
DEVICE void backward(const Arguments &a, i64 b, i64 q, int m, int lane, bool keep) {
    const int ROUNDS = (SAMPLES + LANES - 1) / LANES, PARTS = CHANNELS / VEC / LANES, STEP = VEC * LANES;
    const i64 query = b * a.Q + q, pair = query * HEADS + m;
    const i64 head = (b * a.S * HEADS + m) * CHANNELS + lane * VEC;
    const VALUE_T *value = a.value + head, *grad_output = a.grad_output + pair * CHANNELS + lane * VEC;
    real *grad_value = a.grad_value + head;
    real weight[ROUNDS], grad_weight[ROUNDS], mean = 0;
    const real scale = softmax<LANES>(a.logit + pair * SAMPLES, lane, weight);
    Row<VEC> g[PARTS];
    UNROLL for (int part = 0; part < PARTS; part++)
        g[part] = {grad_output + part * STEP, true};
#pragma unroll (ROUNDS <= 8 ? ROUNDS : 1)
    for (int r = 0; r < ROUNDS; r++) {
        const int i = r * LANES + lane;
        weight[r] *= scale;
        const Sample mine = keep && i < SAMPLES ? place(a, query, pair, i, weight[r]) : Sample{};
        real dots[4][LANES] = {};
        UNROLL for (int j = 0; j < LANES; j++) {
            const Corners at = corners<LANES>(a, mine, r, j);
            Row<VEC> v[4][PARTS];
            UNROLL for (int k = 0; k < 4; k++)
                UNROLL for (int part = 0; part < PARTS; part++)
                    v[k][part] = {value + i64(at.token[k]) * TOKEN + part * STEP, bool(at.on_map & 1 << k)};
            UNROLL for (int k = 0; k < 4; k++) {
                if (ON_GPU || at.on_map & 1 << k)
                    UNROLL for (int part = 0; part < PARTS; part++)
                        UNROLL for (int c = 0; c < VEC; c++) dots[k][j] += g[part][c] * v[k][part][c];
                real *to = grad_value + i64(at.token[k]) * TOKEN;
                if (at.on_map & 1 << k)
                    UNROLL for (int part = 0; part < PARTS; part++)
                        add<VEC>(to + part * STEP, at.weight[k], g[part]);
            }
        }
        real d[4];  // of this lane's own sample
        UNROLL for (int k = 0; k < 4; k++) d[k] = transposed_sum<LANES>(dots[k], lane);
        const real upper = d[0] + mine.fx * (d[1] - d[0]), lower = d[2] + mine.fx * (d[3] - d[2]);
        const real left = d[0] + mine.fy * (d[2] - d[0]), right = d[1] + mine.fy * (d[3] - d[1]);
        grad_weight[r] = upper + mine.fy * (lower - upper);
        mean += mine.weight * grad_weight[r];
        if (keep && i < SAMPLES) {
            store(a.grad_offset[(pair * SAMPLES + i) * 2], mine.weight * (right - left));
            store(a.grad_offset[(pair * SAMPLES + i) * 2 + 1], mine.weight * (lower - upper));
        }
    }
    mean = sum_over_lanes<LANES>(mean);
#pragma unroll (ROUNDS <= 8 ? ROUNDS : 1)
    for (int r = 0; r < ROUNDS; r++)
        if (keep && r * LANES + lane < SAMPLES)
            store(a.grad_logit[pair * SAMPLES + r * LANES + lane], weight[r] * (grad_weight[r] - mean));
}

// --------------------------------------------------------------------------------------------- entry points
#if ON_GPU
// A block: 128 threads for consecutive queries of one head, which look at the same neighbourhood, so that
// the cache serves most loads. The grid: (enough for Q, M, at most B).
extern "C" __global__ void __launch_bounds__(128) ms_deform_attn_forward(const Arguments a) {
    const i64 q = (i64(blockIdx.x) * 128 + threadIdx.x) / FORWARD_LANES;
    const int lane = threadIdx.x % FORWARD_LANES;
    const bool there = q < a.Q;
    for (i64 b = blockIdx.z; b < a.B; b += gridDim.z)
        forward<FORWARD_VEC, FORWARD_LANES>(a, b, there ? q : 0, blockIdx.y, lane, there);
}
extern "C" __global__ void __launch_bounds__(128) ms_deform_attn_backward(const Arguments a) {
    const i64 q = (i64(blockIdx.x) * 128 + threadIdx.x) / BACKWARD_LANES;
    const int lane = threadIdx.x % BACKWARD_LANES;
    const bool there = q < a.Q;
    for (i64 b = blockIdx.z; b < a.B; b += gridDim.z)
        backward<BACKWARD_VEC, BACKWARD_LANES>(a, b, there ? q : 0, blockIdx.y, lane, there);
}
#else
extern "C" void ms_deform_attn_forward(const Arguments &a) {
#pragma omp parallel for collapse(2) num_threads(a.threads)
    for (i64 b = 0; b < a.B; b++)
        for (i64 q = 0; q < a.Q; q++)
            for (int m = 0; m < HEADS; m++) forward<CHANNELS, 1>(a, b, q, m, 0, true);
}
extern "C" void ms_deform_attn_backward(const Arguments &a) {  // threads share no image and head: no atomics
#pragma omp parallel for collapse(2) num_threads(a.threads)
    for (i64 b = 0; b < a.B; b++)
        for (int m = 0; m < HEADS; m++)
            for (i64 q = 0; q < a.Q; q++) backward<CHANNELS, 1>(a, b, q, m, 0, true);
}
#endif
