#include "harness.h"

void copy_first_column(float *h_A, float *d_A, int rows, int cols);

std::vector<float> run_case(const harness::Job &job, harness::Inputs &inputs) {
    int rows = job.ints[0], cols = job.ints[1];
    size_t count = size_t(rows) * cols;
    std::vector<float> a = inputs.next(count);
    float *h_A = nullptr;  // page-locked and mapped, as in main.cu
    harness::need(cudaHostAlloc(&h_A, count * sizeof(float), cudaHostAllocMapped), "cudaHostAlloc in the harness");
    harness::DeviceBuffer d_A("d_A", rows);
#ifdef TLAB_EMULATION
    emu::name_buffer("h_A", h_A, count * sizeof(float));
#endif
    harness::call(
        job, d_A,
        [&](bool last) {
            std::vector<float> values = last ? a : harness::disturbed(a);
            memcpy(h_A, values.data(), count * sizeof(float));
        },
        [&] { copy_first_column(h_A, d_A.get(), rows, cols); });
    if (memcmp(h_A, a.data(), count * sizeof(float)) != 0) harness::say("finding input-changed h_A is not what it was before the call");
    d_A.check_guards();
    std::vector<float> output = d_A.take();
#ifdef TLAB_EMULATION
    emu::give_back(h_A);
#endif
    cudaFreeHost(h_A);
    return output;
}
