// Multi-scale deformable attention, forward and backward (Deformable DETR, Eq. 3; FP-DETR, 3.2).
//
//   output[b, q, m] = sum_i w_i v_i   over the L * P samples i of a pair (query q, head m), where
//   w = softmax(logit[b, q, m]), v_i = value_l[b, :, :, m] at reference * (W_l, H_l) + offset_i - 0.5
//
// Between pixels v_i is bilinear, outside the map zero: as in grid_sample with align_corners=False.
// Softmax and places are computed here, in registers. No tensor ever holds them.
//
// B images, Q queries, M heads of C channels, L levels of P samples each. A token is one pixel of one
// level. S is the number of tokens of all levels. value holds them level by level, row by row.
//
// How to read this file, in five steps:
//   1. forward() as a CPU runs it, with LANES = 1 and VEC = C: one thread computes one pair. It calls
//      softmax(), then place(), corners() and load() for each sample.
//   2. The drawing above sum_over_lanes(), then forward() as a GPU runs it: LANES threads share a pair.
//   3. The entry points at the end: which thread works on which pair.
//   4. Row, store_row() and add(): how a thread moves many channels by one instruction.
//   5. backward(), with the formulas above it.
//
// CUDA in brief: a GPU runs a function marked __global__ in very many threads. blockIdx and threadIdx
// tell a thread which one it is. 32 threads are a warp: they execute the same instruction at a time.
// A shuffle lets threads of a warp read each other's registers. It works in groups of LANES threads. A
// thread's number in its group is its lane. __shfl_sync(~0u, x, j, LANES) returns the x of lane j,
// __shfl_xor_sync(~0u, x, step, LANES) that of lane (own lane ^ step). The mask ~0u names the whole warp.
// A template is C code that is compiled for constants: template <int VEC, int LANES> for these two.
//
// deform_attn.py compiles this text with NVRTC for GPUs and with the system's C++ compiler for CPUs. The
// tests run the GPU half on a CPU, too. Every build fixes, by -D options:
//   CHANNELS HEADS LEVELS POINTS   C, M, L, P
//   VALUE_T OFFSET_T LOGIT_T       what memory holds: float, bf16, fp16 or double
//   REAL                           what is computed in: float, or double for doubles
//   FORWARD_VEC FORWARD_LANES BACKWARD_VEC BACKWARD_LANES   for GPUs; a CPU has C and 1
// LANES is 1, 2, 4 or 8, and divides C / VEC and L * P.
//
// Only the gradient of value on a GPU changes from run to run: atomics sum it in any order.
#if defined(__CUDACC__) || defined(GPU_EMULATOR)
#define ON_GPU true
#define UNROLL _Pragma("unroll")
#define NO_UNROLL _Pragma("unroll 1")  // where unrolling takes too many registers and 80 KB of code
#define DEVICE __device__ __forceinline__
#else
#include <cmath>
using std::exp, std::floor;  // C's would compute in double
#define ON_GPU false
#define UNROLL
#define NO_UNROLL
#define DEVICE static inline __attribute__((always_inline))
#define __shfl_sync(mask, x, lane, lanes) (x)  // with one lane there is nobody to ask
#define __shfl_xor_sync(mask, x, step, lanes) (x)
#define atomicAdd(to, x) (*(to) += (x))  // no other thread adds to the same image and head
#endif

typedef long long i64;
typedef REAL real;
const int SAMPLES = LEVELS * POINTS;
const i64 TOKEN_SIZE = HEADS * CHANNELS;  // elements from one token of value to the next

// -------------------------------------------------------------------------------------- 16-bit storage
struct bf16 { unsigned short bits; };
struct fp16 { unsigned short bits; };
union Bits { unsigned u; float f; };

template <typename T> DEVICE real to_real(T x) { return x; }
DEVICE real to_real(bf16 x) { return Bits{(unsigned)x.bits << 16}.f; }  // the upper half of a float
template <typename T> DEVICE void store(T &to, real x) { to = x; }
DEVICE void store(bf16 &to, real x) {  // to the nearest, ties to even
    Bits b;
    b.f = x;
    to.bits = x == x ? (b.u + 0x7fff + (b.u >> 16 & 1)) >> 16 : 0x7fff;
}
#ifdef __CUDACC__
DEVICE real to_real(fp16 x) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x.bits)); return f; }
DEVICE void store(fp16 &to, real x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"((float)x)); }
#else
DEVICE real to_real(fp16 x) {  // moves its bits to where a float has them; its exponent is 112 less
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

// ------------------------------------------------------------------------------------------- arguments
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

// ------------------------------------------------------------------------------ what lanes do together
// A warp computes 32 / LANES pairs: neighbouring queries of one head. In a round, each lane prepares one
// sample. So the 16 samples of a pair take four rounds in this example: bf16, C = 32, VEC = 8, LANES = 4.
// Each column is a lane, and time runs downwards.
//
//                                   lane 0       lane 1       lane 2       lane 3
//   round 0, each lane prepares     sample 0     sample 1     sample 2     sample 3
//      j = 0: all ask lane 0 for    sample 0     sample 0     sample 0     sample 0
//             and load channels     0 to 7       8 to 15      16 to 23     24 to 31  of its corners
//      j = 1: all ask lane 1 for    sample 1     sample 1     sample 1     sample 1
//             ...
//   round 1, each lane prepares     sample 4     sample 5     sample 6     sample 7
//
// So each place is computed once, and neighbouring lanes load neighbouring bytes. If C is larger than
// VEC * LANES, a lane holds several vectors of VEC channels, its parts.

DEVICE real larger(real x, real y) { return x > y ? x : y; }
// Returns the sum of the x of all lanes, to all lanes.
template <int LANES> DEVICE real sum_over_lanes(real x) {
    for (int step = LANES / 2; step; step /= 2) x += __shfl_xor_sync(~0u, x, step, LANES);
    return x;
}

// Sets weight[r] to the softmax of this lane's sample of round r.
template <int LANES>
DEVICE void softmax(const LOGIT_T *logit, int lane, real (&weight)[SAMPLES / LANES]) {
    real most = to_real(logit[lane]), sum = 0;
    for (int i = lane; i < SAMPLES; i += LANES) most = larger(most, to_real(logit[i]));
    for (int step = LANES / 2; step; step /= 2)
        most = larger(most, __shfl_xor_sync(~0u, most, step, LANES));
    UNROLL for (int r = 0; r < SAMPLES / LANES; r++)
        sum += weight[r] = exp(to_real(logit[r * LANES + lane]) - most);
    const real scale = 1 / sum_over_lanes<LANES>(sum);
    UNROLL for (int r = 0; r < SAMPLES / LANES; r++) weight[r] *= scale;
}

// --------------------------------------------------------------------------------------------- samples
struct Sample {
    int at;  // 16 * (token of the upper left corner) + a bit for each corner on the map; packed, so that
             // one shuffle sends both
    real fx, fy;  // how far right of and below this corner, 0 to 1
    real weight;  // of the softmax
};

// Computes where sample i of a pair lies. x is first clamped to -2 and W + 1, y to -2 and H + 1, where no
// corner is on the map. So far and infinite offsets touch no memory, nor does NaN, which becomes -2.
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
    const int on_map = top * (left | right << 1) | bottom * (left << 2 | right << 3);
    return {(a.start[level] + y0 * W + x0) * 16 + on_map, x - x0, y - y0, weight};
}

struct Corners {  // upper left, upper right, lower left, lower right
    bool on_map[4];
    int token[4];
    real weight[4];  // of the softmax, times that of the corner
};

// Returns the corners of sample i, which lane j has prepared.
template <int LANES> DEVICE Corners corners(const Arguments &a, const Sample &mine, int i, int j) {
    const int at = __shfl_sync(~0u, mine.at, j, LANES);
    const real fx = __shfl_sync(~0u, mine.fx, j, LANES), fy = __shfl_sync(~0u, mine.fy, j, LANES);
    const real w = __shfl_sync(~0u, mine.weight, j, LANES), lower = w * fy, upper = w - lower;
    const int token = at >> 4, below = token + a.width[i / POINTS];
    return {{bool(at & 1), bool(at & 2), bool(at & 4), bool(at & 8)},
            {token, token + 1, below, below + 1},
            {upper - upper * fx, upper * fx, lower - lower * fx, lower * fx}};
}

// -------------------------------------------------------------------------------------------- channels
// Row: VEC channels of a token. A GPU loads them by one instruction, as zeros if the token is not on the
// map. This takes no branch, so many loads run together. On a CPU, forward() and backward() skip corners
// off the map, and Row is only a pointer: row[c] loads one channel.
#if ON_GPU
template <typename T, int VEC> struct alignas(sizeof(T) * VEC) Packed {
    T x[VEC];
    DEVICE real operator[](int c) const { return to_real(x[c]); }
};
template <int VEC> struct alignas(2 * VEC) Packed<bf16, VEC> {  // words: one instruction for either half
    unsigned x[VEC / 2];
    DEVICE real operator[](int c) const { return Bits{c % 2 ? x[c / 2] & ~0xffffu : x[c / 2] << 16}.f; }
};
template <> struct Packed<bf16, 1> { bf16 x; DEVICE real operator[](int) const { return to_real(x); } };
template <int VEC> using Row = Packed<VALUE_T, VEC>;
template <int VEC> DEVICE Row<VEC> load(const VALUE_T *from, bool on_map) {
    Row<VEC> row = {};
    if (on_map) row = *(const Row<VEC> *)from;
    return row;
}
#else
template <int VEC> struct Row {
    const VALUE_T *from;
    real operator[](int c) const { return to_real(from[c]); }
};
template <int VEC> DEVICE Row<VEC> load(const VALUE_T *from, bool) { return {from}; }
#endif

// Stores VEC channels, on a GPU 16 bytes (a uint4) by one instruction. __stcs allows the cache to drop
// these bytes early, so that it keeps the values.
template <int VEC> DEVICE void store_row(VALUE_T *to, const real (&x)[VEC]) {
#if ON_GPU
    if constexpr (sizeof(VALUE_T) * VEC == 16) {
        union { VALUE_T x[VEC]; uint4 all; } row;
        UNROLL for (int c = 0; c < VEC; c++) store(row.x[c], x[c]);
        __stcs((uint4 *)to, row.all);
    } else
#endif
        UNROLL for (int c = 0; c < VEC; c++) store(to[c], x[c]);
}

// Computes to += w * row. atomicAdd allows other threads to add to the same token at the same time. From
// sm_90 on, one instruction adds 16 bytes.
template <int VEC> DEVICE void add(real *to, real w, const Row<VEC> &row) {
#if ON_GPU && __CUDA_ARCH__ >= 900
    if constexpr (VEC == 4 && sizeof(real) == 4)
        atomicAdd((float4 *)to, make_float4(w * row[0], w * row[1], w * row[2], w * row[3]));
    else
#endif
        UNROLL for (int c = 0; c < VEC; c++) atomicAdd(to + c, w * row[c]);
}

// --------------------------------------------------------------------------------------------- forward
// Computes this lane's channels of the output of query q and head m of image b.
template <int VEC, int LANES> DEVICE void forward(const Arguments &a, i64 b, i64 q, int m, int lane) {
    const int ROUNDS = SAMPLES / LANES, PARTS = CHANNELS / VEC / LANES, STEP = VEC * LANES;
    const i64 query = b * a.Q + q, pair = query * HEADS + m;
    const VALUE_T *value = a.value + (b * a.S * HEADS + m) * CHANNELS + lane * VEC;
    real weight[ROUNDS], out[PARTS][VEC] = {};
    softmax<LANES>(a.logit + pair * SAMPLES, lane, weight);
    NO_UNROLL for (int r = 0; r < ROUNDS; r++) {
        const Sample mine = place(a, query, pair, r * LANES + lane, weight[r]);
        UNROLL for (int j = 0; j < LANES; j++) {
            const Corners at = corners<LANES>(a, mine, r * LANES + j, j);
            UNROLL for (int k = 0; k < 4; k++)
                if (ON_GPU || at.on_map[k])
                    UNROLL for (int part = 0; part < PARTS; part++) {
                        const VALUE_T *from = value + at.token[k] * TOKEN_SIZE + part * STEP;
                        const Row<VEC> v = load<VEC>(from, at.on_map[k]);
                        UNROLL for (int c = 0; c < VEC; c++) out[part][c] += at.weight[k] * v[c];
                    }
        }
    }
    VALUE_T *output = a.output + pair * CHANNELS + lane * VEC;
    UNROLL for (int part = 0; part < PARTS; part++) store_row<VEC>(output + part * STEP, out[part]);
}

// -------------------------------------------------------------------------------------------- backward
// g is the gradient of the output. Corner k of sample i has the value v_k, the bilinear weight b_k, and
// d_k = g . v_k. Then
//   grad v_k += w_i b_k g    grad w_i = sum_k b_k d_k    grad (x, y) = w_i sum_k (db_k/dx, db_k/dy) d_k
//   grad logit_i = w_i (grad w_i - mean), where mean = sum_j w_j grad w_j
// So grad w_i is the bilinear interpolation of the d_k, and grad (x, y) is its slope, times w_i.
// Adds to the gradient of value, and computes the gradients of this lane's samples.
template <int VEC, int LANES> DEVICE void backward(const Arguments &a, i64 b, i64 q, int m, int lane) {
    const int ROUNDS = SAMPLES / LANES, PARTS = CHANNELS / VEC / LANES, STEP = VEC * LANES;
    const i64 query = b * a.Q + q, pair = query * HEADS + m;
    const i64 head = (b * a.S * HEADS + m) * CHANNELS + lane * VEC;
    const VALUE_T *value = a.value + head, *grad_output = a.grad_output + pair * CHANNELS + lane * VEC;
    real *grad_value = a.grad_value + head;
    real weight[ROUNDS], grad_weight[ROUNDS], mean = 0;
    softmax<LANES>(a.logit + pair * SAMPLES, lane, weight);
    Row<VEC> g[PARTS];
    UNROLL for (int part = 0; part < PARTS; part++) g[part] = load<VEC>(grad_output + part * STEP, true);
    NO_UNROLL for (int r = 0; r < ROUNDS; r++) {
        const int i = r * LANES + lane;
        const Sample mine = place(a, query, pair, i, weight[r]);
        real d[4];  // of this lane's own sample
        NO_UNROLL for (int j = 0; j < LANES; j++) {
            const Corners at = corners<LANES>(a, mine, r * LANES + j, j);
            UNROLL for (int k = 0; k < 4; k++) {
                real dot = 0;
                if (ON_GPU || at.on_map[k])
                    UNROLL for (int part = 0; part < PARTS; part++) {
                        const VALUE_T *from = value + at.token[k] * TOKEN_SIZE + part * STEP;
                        const Row<VEC> v = load<VEC>(from, at.on_map[k]);
                        UNROLL for (int c = 0; c < VEC; c++) dot += g[part][c] * v[c];
                    }
                dot = sum_over_lanes<LANES>(dot);
                if (lane == j) d[k] = dot;
            }
            UNROLL for (int k = 0; k < 4; k++)  // a loop of its own, so that no load waits for an atomic
                if (at.on_map[k]) {
                    real *to = grad_value + at.token[k] * TOKEN_SIZE;
                    UNROLL for (int part = 0; part < PARTS; part++)
                        add<VEC>(to + part * STEP, at.weight[k], g[part]);
                }
        }
        const real upper = d[0] + mine.fx * (d[1] - d[0]), lower = d[2] + mine.fx * (d[3] - d[2]);
        const real left = d[0] + mine.fy * (d[2] - d[0]), right = d[1] + mine.fy * (d[3] - d[1]);
        grad_weight[r] = upper + mine.fy * (lower - upper);
        mean += weight[r] * grad_weight[r];
        store(a.grad_offset[(pair * SAMPLES + i) * 2], weight[r] * (right - left));
        store(a.grad_offset[(pair * SAMPLES + i) * 2 + 1], weight[r] * (lower - upper));
    }
    mean = sum_over_lanes<LANES>(mean);
    UNROLL for (int r = 0; r < ROUNDS; r++)
        store(a.grad_logit[pair * SAMPLES + r * LANES + lane], weight[r] * (grad_weight[r] - mean));
}

// ---------------------------------------------------------------------------------------- entry points
#if ON_GPU
// A block is 128 threads for consecutive queries of one head. They look at the same neighbourhood, so
// the cache serves most loads. blockIdx.x counts blocks of queries, y heads, and z images (at most 65535,
// so a thread may take several). __grid_constant__ keeps the compiler from copying the arguments.
// Threads without a query return early: shuffles do not wait for them.
#define KERNEL extern "C" __global__ void __launch_bounds__(128)
KERNEL ms_deform_attn_forward(const __grid_constant__ Arguments a) {
    const i64 thread = i64(blockIdx.x) * 128 + threadIdx.x, q = thread / FORWARD_LANES;
    if (q >= a.Q) return;
    for (i64 b = blockIdx.z; b < a.B; b += gridDim.z)
        forward<FORWARD_VEC, FORWARD_LANES>(a, b, q, blockIdx.y, thread % FORWARD_LANES);
}
KERNEL ms_deform_attn_backward(const __grid_constant__ Arguments a) {
    const i64 thread = i64(blockIdx.x) * 128 + threadIdx.x, q = thread / BACKWARD_LANES;
    if (q >= a.Q) return;
    for (i64 b = blockIdx.z; b < a.B; b += gridDim.z)
        backward<BACKWARD_VEC, BACKWARD_LANES>(a, b, q, blockIdx.y, thread % BACKWARD_LANES);
}
#else
extern "C" void ms_deform_attn_forward(const Arguments &a) {
#pragma omp parallel for collapse(2) num_threads(a.threads)
    for (i64 b = 0; b < a.B; b++)
        for (i64 q = 0; q < a.Q; q++)
            for (int m = 0; m < HEADS; m++) forward<CHANNELS, 1>(a, b, q, m, 0);
}
extern "C" void ms_deform_attn_backward(const Arguments &a) {
// By images and heads, so that no two threads add to the same grad_value.
#pragma omp parallel for collapse(2) num_threads(a.threads)
    for (i64 b = 0; b < a.B; b++)
        for (int m = 0; m < HEADS; m++)
            for (i64 q = 0; q < a.Q; q++) backward<CHANNELS, 1>(a, b, q, m, 0);
}
#endif
