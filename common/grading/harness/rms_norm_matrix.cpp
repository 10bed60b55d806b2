#include "harness.h"

void rms_norm_matrix(float *input, float *weight, float *output, int rows, int cols, float epsilon);

std::vector<float> run_case(const harness::Job &job, harness::Inputs &inputs) {
    int rows = job.ints[0], cols = job.ints[1];
    size_t count = size_t(rows) * cols;
    std::vector<float> x = inputs.next(count), w = inputs.next(cols);
    harness::DeviceBuffer input("input", count), weight("weight", cols), output("output", count);
    harness::call(
        job, output,
        [&](bool last) {
            input.put(last ? x : harness::disturbed(x));
            weight.put(last ? w : harness::disturbed(w));
        },
        [&] { rms_norm_matrix(input.get(), weight.get(), output.get(), rows, cols, job.epsilon); });
    input.check_unchanged(x);
    weight.check_unchanged(w);
    for (auto *buffer : {&input, &weight, &output}) buffer->check_guards();
    return output.take();
}
