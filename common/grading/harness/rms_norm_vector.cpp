#include "harness.h"

void rms_norm_vector(float *input, float *weight, float *output, int cols, float epsilon);

std::vector<float> run_case(const harness::Job &job, harness::Inputs &inputs) {
    int cols = job.ints[0];
    std::vector<float> x = inputs.next(cols), w = inputs.next(cols);
    harness::DeviceBuffer input("input", cols), weight("weight", cols), output("output", cols);
    harness::call(
        job, output,
        [&](bool last) {
            input.put(last ? x : harness::disturbed(x));
            weight.put(last ? w : harness::disturbed(w));
        },
        [&] { rms_norm_vector(input.get(), weight.get(), output.get(), cols, job.epsilon); });
    input.check_unchanged(x);
    weight.check_unchanged(w);
    for (auto *buffer : {&input, &weight, &output}) buffer->check_guards();
    return output.take();
}
