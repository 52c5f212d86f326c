// Multi-scale deformable attention, softmax and sampling locations fused: forward and backward, per (query, head).
// Plain C++ on purpose: no headers but <cmath>, no torch. deform_attn.py compiles it with the system's C++ compiler.
//
//   value (B, S, M, C)   reference (B, Q, L, 2)   offset (B, Q, M, L, P, 2)   logit (B, Q, M, L, P)   output (B, Q, M, C)
//
// All contiguous float32. shape: L pairs (H_l, W_l). A sample is at  reference * (W_l, H_l) + offset - 0.5  in pixels, is
// bilinear, and is zero outside of the map (grid_sample with align_corners=False and zero padding).
#include <cmath>

typedef long long i64;

struct Sizes { i64 B, S, Q, M, C, L, P; };

// One sample: which of its four corners lie on the map, their distance in `value` rows from the level's start, the
// fractions of the pixel. Comparisons are written so that NaN and infinite places count as outside.
struct Sample {
    bool inside, left, right, top, bottom;
    i64 at;  // y0 * W + x0; used for corners on the map only
    float fx, fy;

    Sample(float x, float y, i64 H, i64 W) {
        inside = x > -1 && y > -1 && x < W && y < H;
        if (!inside) return;
        const float x0 = std::floor(x), y0 = std::floor(y);
        fx = x - x0, fy = y - y0;
        left = x0 >= 0, top = y0 >= 0, right = x0 + 1 < W, bottom = y0 + 1 < H;
        at = (i64)y0 * W + (i64)x0;
    }
};

// exp(logit - max) / sum over the L * P samples of a pair.
static void softmax(const float *logit, float *weight, i64 n) {
    float most = logit[0], sum = 0;
    for (i64 i = 1; i < n; i++) most = std::fmax(most, logit[i]);
    for (i64 i = 0; i < n; i++) sum += weight[i] = std::exp(logit[i] - most);
    for (i64 i = 0; i < n; i++) weight[i] /= sum;
}

// Calls body(i, sample, first value row of the level, W, H) for each of a pair's samples.
template <typename Body>
static void for_samples(const float *reference, const float *offset, const i64 *shape, const Sizes &n, const Body &body) {
    i64 start = 0;
    for (i64 l = 0; l < n.L; l++) {
        const i64 H = shape[2 * l], W = shape[2 * l + 1];
        const float rx = reference[2 * l] * W - 0.5f, ry = reference[2 * l + 1] * H - 0.5f;
        for (i64 p = 0; p < n.P; p++) {
            const i64 i = l * n.P + p;
            const Sample s(rx + offset[2 * i], ry + offset[2 * i + 1], H, W);
            if (s.inside) body(i, s, start, W, H);
        }
        start += H * W;
    }
}

const i64 MAX_SAMPLES = 256;

// CT is C where it is known at compile time, which lets the compiler unroll the loops over channels, else 0.
template <int CT>
static void forward(const float *value, const float *reference, const float *offset, const float *logit, float *output,
                    const i64 *shape, const Sizes n) {
    const i64 C = CT ? CT : n.C, K = n.L * n.P, row = n.M * C;
#pragma omp parallel for collapse(2) schedule(static)
    for (i64 b = 0; b < n.B; b++)
        for (i64 q = 0; q < n.Q; q++)
            for (i64 m = 0; m < n.M; m++) {
                const i64 pair = (b * n.Q + q) * n.M + m;
                float weight[MAX_SAMPLES], *out = output + pair * C;
                softmax(logit + pair * K, weight, K);
                for (i64 c = 0; c < C; c++) out[c] = 0;
                for_samples(reference + (b * n.Q + q) * n.L * 2, offset + pair * K * 2, shape, n,
                            [&](i64 i, const Sample &s, i64 start, i64 W, i64) {
                    const float *v = value + ((b * n.S + start + s.at) * n.M + m) * C, a = weight[i];
                    auto add = [&](const float *corner, float w) { for (i64 c = 0; c < C; c++) out[c] += w * corner[c]; };
                    if (s.top && s.left) add(v, a * (1 - s.fy) * (1 - s.fx));
                    if (s.top && s.right) add(v + row, a * (1 - s.fy) * s.fx);
                    if (s.bottom && s.left) add(v + W * row, a * s.fy * (1 - s.fx));
                    if (s.bottom && s.right) add(v + (W + 1) * row, a * s.fy * s.fx);
                });
            }
}

// Per corner one dot product, gradient . value; the gradients of weight and place are combinations of the four. Threads
// share no image and head, so that grad_value needs no atomics and every result is the same in every run.
template <int CT>
static void backward(const float *value, const float *reference, const float *offset, const float *logit,
                     const float *grad_output, float *grad_value, float *grad_offset, float *grad_logit,
                     const i64 *shape, const Sizes n) {
    const i64 C = CT ? CT : n.C, K = n.L * n.P, row = n.M * C;
#pragma omp parallel for collapse(2) schedule(static)
    for (i64 b = 0; b < n.B; b++)
        for (i64 m = 0; m < n.M; m++)
            for (i64 q = 0; q < n.Q; q++) {
                const i64 pair = (b * n.Q + q) * n.M + m;
                const float *g = grad_output + pair * C;
                float weight[MAX_SAMPLES], grad_weight[MAX_SAMPLES] = {0}, mean = 0;
                softmax(logit + pair * K, weight, K);
                for_samples(reference + (b * n.Q + q) * n.L * 2, offset + pair * K * 2, shape, n,
                            [&](i64 i, const Sample &s, i64 start, i64 W, i64) {
                    const i64 base = ((b * n.S + start + s.at) * n.M + m) * C;
                    const float a = weight[i], fx = s.fx, fy = s.fy;
                    auto corner = [&](bool on_map, i64 at, float w) {  // returns g . v, adds a w g to grad_value
                        if (!on_map) return 0.f;
                        const float *v = value + at;
                        float *gv = grad_value + at, dot = 0;
#pragma omp simd reduction(+ : dot)
                        for (i64 c = 0; c < C; c++) {
                            dot += g[c] * v[c];
                            gv[c] += a * w * g[c];
                        }
                        return dot;
                    };
                    const float d00 = corner(s.top && s.left, base, (1 - fy) * (1 - fx));
                    const float d01 = corner(s.top && s.right, base + row, (1 - fy) * fx);
                    const float d10 = corner(s.bottom && s.left, base + W * row, fy * (1 - fx));
                    const float d11 = corner(s.bottom && s.right, base + (W + 1) * row, fy * fx);
                    grad_weight[i] = (1 - fy) * ((1 - fx) * d00 + fx * d01) + fy * ((1 - fx) * d10 + fx * d11);
                    grad_offset[(pair * K + i) * 2] = a * ((1 - fy) * (d01 - d00) + fy * (d11 - d10));
                    grad_offset[(pair * K + i) * 2 + 1] = a * ((1 - fx) * (d10 - d00) + fx * (d11 - d01));
                });
                for (i64 i = 0; i < K; i++) mean += weight[i] * grad_weight[i];
                for (i64 i = 0; i < K; i++) grad_logit[pair * K + i] = weight[i] * (grad_weight[i] - mean);
            }
}

extern "C" void ms_deform_attn_forward(const float *value, const float *reference, const float *offset,
                                       const float *logit, float *output, const i64 *shape, i64 B, i64 S, i64 Q, i64 M,
                                       i64 C, i64 L, i64 P) {
    auto run = C == 16 ? forward<16> : C == 32 ? forward<32> : C == 48 ? forward<48> : forward<0>;
    run(value, reference, offset, logit, output, shape, {B, S, Q, M, C, L, P});
}

// The gradient buffers must be zero on entry.
extern "C" void ms_deform_attn_backward(const float *value, const float *reference, const float *offset,
                                        const float *logit, const float *grad_output, float *grad_value,
                                        float *grad_offset, float *grad_logit, const i64 *shape, i64 B, i64 S, i64 Q,
                                        i64 M, i64 C, i64 L, i64 P) {
    auto run = C == 16 ? backward<16> : C == 32 ? backward<32> : C == 48 ? backward<48> : backward<0>;
    run(value, reference, offset, logit, grad_output, grad_value, grad_offset, grad_logit, shape, {B, S, Q, M, C, L, P});
}
