// A CUDA driver without a GPU: it runs a kernel in the emulator, where the calls and their order are right.
// test_deform_attn_kernel.py loads it instead of libcuda.so.1.
#include "gpu_emulator.cpp"

static thread_local bool has_context;
static int library, kernels[2];  // their addresses are the handles

extern "C" {
unsigned long launched[8];  // the grid, the block, the shared memory and the stream of the last launch

void give_context() { has_context = true; }  // as each call of the CUDA runtime does

int cuCtxGetCurrent(void **context) { return *context = has_context ? &has_context : nullptr, 0; }

int cuGetErrorString(int status, const char **text) { return *text = "an error of the fake", status == 0; }

#ifndef BEFORE_CUDA_12
int cuLibraryLoadData(void **handle, const char *code, void *, void *, unsigned, void *, void *, unsigned) {
    return *handle = &library, strcmp(code, "machine code") ? 200 : 0;
}
#endif

int cuLibraryGetKernel(void **handle, void *from, const char *name) {
    const bool is_backward = !strcmp(name, "ms_deform_attn_backward");
    *handle = &kernels[is_backward];
    return from == &library && (is_backward || !strcmp(name, "ms_deform_attn_forward")) ? 0 : 500;
}

int cuLaunchKernel(int *kernel, unsigned x, unsigned y, unsigned z, unsigned block_x, unsigned block_y,
                   unsigned block_z, unsigned shared, void *stream, void **parameters, void **extra) {
    if (!has_context) return 201;
    const unsigned long values[] = {x, y, z, block_x, block_y, block_z, shared, (unsigned long)stream};
    memcpy(launched, values, sizeof values);
    return !extra && emulate(*(Arguments *)parameters[0], kernel == &kernels[1], x, y, z) ? 0 : 1;
}
}
