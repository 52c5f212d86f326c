// The GPU half of deform_attn_kernel.cu on a CPU: one block at a time, its threads as fibers of one OS
// thread, which change at every warp shuffle. Slow, deterministic, and close enough to find wrong indices,
// lanes, masks and sums; it cannot find races, misaligned loads or slowness. test_deform_attn_kernel.py
// builds it, with the kernel's -D options and -D__CUDA_ARCH__.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <ucontext.h>
#include <vector>

#define GPU_EMULATOR
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __grid_constant__

struct Index { unsigned x, y, z; };
struct float4 { float x, y, z, w; };
struct uint4 { unsigned x, y, z, w; };
static Index threadIdx, blockIdx, gridDim;

const int THREADS = 128, WARP = 32, STACK = 1 << 17;
static ucontext_t scheduler, fibers[THREADS];
static bool finished[THREADS];
static int current, running[THREADS / WARP];                            // per warp: not yet returned
static int arrived[THREADS / WARP], shuffles[THREADS / WARP];           // per warp: waiting, done
static double slots[2][THREADS];                                      // what each thread offers, by parity
static std::function<void()> kernel;

// Ends the warp's shuffle if all its threads that have not returned wait in it.
static void finish_shuffle(int warp) {
    if (arrived[warp] && arrived[warp] == running[warp]) arrived[warp] = 0, shuffles[warp]++;
}

// Offers x to the warp, waits for its other threads, and returns what thread `from` of the warp offered.
// A fast thread can be one shuffle ahead of a slow one, never two: hence two slots.
template <typename T> static T exchange(T x, int from) {
    const int me = current, warp = me / WARP, turn = shuffles[warp];
    slots[turn % 2][me] = x;
    arrived[warp]++;
    finish_shuffle(warp);
    while (shuffles[warp] == turn) swapcontext(&fibers[me], &scheduler);
    return (T)slots[turn % 2][warp * WARP + from];
}

template <typename T> T __shfl_sync(unsigned, T x, int lane, int width) {
    const int me = current % WARP;
    return exchange(x, me / width * width + lane % width);
}
template <typename T> T __shfl_xor_sync(unsigned, T x, int step, int) {
    return exchange(x, current % WARP ^ step);
}

template <typename T> void atomicAdd(T *p, T x) { *p += x; }
static void atomicAdd(float4 *p, float4 x) { p->x += x.x, p->y += x.y, p->z += x.z, p->w += x.w; }
static void __stcs(uint4 *p, uint4 x) { *p = x; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

static void run_fiber() {
    kernel();
    finished[current] = true;
    running[current / WARP]--;
    finish_shuffle(current / WARP);
}

// Runs the kernel for every block of the grid; false if its threads wait for each other for ever.
static bool run_grid(Index grid) {
    static std::vector<char> stacks(size_t(THREADS) * STACK);
    gridDim = grid;
    for (blockIdx.z = 0; blockIdx.z < grid.z; blockIdx.z++)
        for (blockIdx.y = 0; blockIdx.y < grid.y; blockIdx.y++)
            for (blockIdx.x = 0; blockIdx.x < grid.x; blockIdx.x++) {
                memset(finished, 0, sizeof finished), memset(arrived, 0, sizeof arrived);
                for (int &threads : running) threads = WARP;
                for (int t = 0; t < THREADS; t++) {
                    getcontext(&fibers[t]);
                    fibers[t].uc_stack.ss_sp = &stacks[size_t(t) * STACK];
                    fibers[t].uc_stack.ss_size = STACK;
                    fibers[t].uc_link = &scheduler;
                    makecontext(&fibers[t], run_fiber, 0);
                }
                for (int left = THREADS, before = -1; left > 0;) {
                    int progress = 0;
                    left = 0;
                    for (int t = 0; t < THREADS; t++) {
                        if (!finished[t]) {
                            current = t, threadIdx = {unsigned(t), 0, 0};
                            swapcontext(&scheduler, &fibers[t]);
                        }
                        left += !finished[t];
                    }
                    for (int n : shuffles) progress += n;
                    if (left && progress + THREADS - left == before) return false;
                    before = progress + THREADS - left;
                }
            }
    return true;
}

#include "../deform_attn_kernel.cu"

extern "C" bool emulate(const Arguments &a, bool is_backward, unsigned x, unsigned y, unsigned z) {
    kernel = [&] { is_backward ? ms_deform_attn_backward(a) : ms_deform_attn_forward(a); };
    return run_grid({x, y, z});
}
