// Answers for libcublasLt: products of bf16 or f32 operands by plain loops, in f32, on the stand-in driver's streams. An algorithm is
// only valid for the operands that the heuristic made it for, but for any number of rows.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>

extern "C" int standin_submit(void* stream, const std::function<int()>& work);
extern "C" bool standin_inside(const void* pointer, std::size_t bytes);

namespace {

enum { ok = 0, invalid_value = 7, not_supported = 15 };
enum { f32 = 0, bf16 = 14, compute_f32 = 68 };
struct Layout { int type; std::uint64_t rows, cols; std::int64_t leading; };
struct Desc { int transposes_a = 0, transposes_b = 0; };

std::size_t bytes(const Layout& layout) {
    return ((layout.cols - 1) * layout.leading + layout.rows) * (layout.type == f32 ? 4 : 2);
}
float load(const void* p, int type, std::size_t i) {
    if (type == f32) return static_cast<const float*>(p)[i];
    const std::uint32_t bits = std::uint32_t(static_cast<const std::uint16_t*>(p)[i]) << 16;
    float value;
    return std::memcpy(&value, &bits, 4), value;
}

}  // namespace

extern "C" {

int cublasLtCreate(void** handle) { return *handle = new int, ok; }
int cublasLtDestroy(void* handle) { return delete static_cast<int*>(handle), ok; }
int cublasLtMatmulDescCreate(void** desc, int compute, int scale) {
    if (compute != compute_f32 || scale != f32) return not_supported;
    return *desc = new Desc, ok;
}
int cublasLtMatmulDescDestroy(void* desc) { return delete static_cast<Desc*>(desc), ok; }
int cublasLtMatmulDescSetAttribute(void* desc, int attribute, const void* value, std::size_t size) {
    if (size != 4 || (attribute != 3 && attribute != 4)) return not_supported;
    auto* d = static_cast<Desc*>(desc);
    return std::memcpy(attribute == 3 ? &d->transposes_a : &d->transposes_b, value, 4), ok;
}
int cublasLtMatrixLayoutCreate(void** layout, int type, std::uint64_t rows, std::uint64_t cols, std::int64_t leading) {
    if ((type != f32 && type != bf16) || leading < std::int64_t(rows) || !rows || !cols) return invalid_value;
    return *layout = new Layout{type, rows, cols, leading}, ok;
}
int cublasLtMatrixLayoutDestroy(void* layout) { return delete static_cast<Layout*>(layout), ok; }
int cublasLtMatmulPreferenceCreate(void** preference) { return *preference = new int, ok; }
int cublasLtMatmulPreferenceDestroy(void* preference) { return delete static_cast<int*>(preference), ok; }
int cublasLtMatmulPreferenceSetAttribute(void*, int attribute, const void*, std::size_t size) {
    const bool is_known = attribute == 1 ? size == 8 : attribute == 3 || (attribute >= 5 && attribute <= 8) ? size == 4 : false;
    return is_known ? ok : not_supported;
}

struct Heuristic { std::uint64_t algorithm[8]; std::size_t workspace; int state; float waves; int reserved[4]; };
int cublasLtMatmulAlgoGetHeuristic(void*, void*, void* a, void*, void*, void* d, void*, int wanted, Heuristic* out, int* found) {
    if (wanted < 1) return invalid_value;
    std::memset(out, 0, sizeof *out);
    out->algorithm[0] = static_cast<Layout*>(a)->rows;
    out->algorithm[1] = static_cast<Layout*>(d)->rows;
    return *found = 1, ok;
}

int cublasLtMatmul(void*, void* desc_, const float* alpha, const void* a, void* a_, const void* b, void* b_, const float* beta, const void*,
                   void*, void* d, void* d_, const std::uint64_t* algorithm, void*, std::size_t, void* stream) {
    const Desc desc = *static_cast<Desc*>(desc_);
    const Layout al = *static_cast<Layout*>(a_), bl = *static_cast<Layout*>(b_), dl = *static_cast<Layout*>(d_);
    const std::uint64_t m = dl.rows, n = dl.cols, k = al.rows;
    if (!desc.transposes_a || desc.transposes_b || al.cols != m || bl.rows != k || bl.cols != n || dl.type != f32 || *alpha != 1 || *beta != 0)
        return std::fprintf(stderr, "stand-in cuBLASLt: shapes do not fit\n"), invalid_value;
    if (algorithm[0] != k || algorithm[1] != m)
        return std::fprintf(stderr, "stand-in cuBLASLt: an algorithm of another shape\n"), not_supported;
    if (!standin_inside(a, bytes(al)) || !standin_inside(b, bytes(bl)) || !standin_inside(d, bytes(dl)))
        return std::fprintf(stderr, "stand-in cuBLASLt: past an allocation\n"), invalid_value;
    return standin_submit(stream, [=] {
        for (std::uint64_t j = 0; j < n; ++j)
            for (std::uint64_t i = 0; i < m; ++i) {
                float sum = 0;
                for (std::uint64_t x = 0; x < k; ++x)
                    sum += load(a, al.type, i * al.leading + x) * load(b, bl.type, j * bl.leading + x);
                static_cast<float*>(d)[j * dl.leading + i] = sum;
            }
        return 0;
    });
}

}  // extern "C"
