// Runs a learner's function on the grader's cases. One source for both machines: compiled with g++ against the emulation
// (-DTLAB_EMULATION), or with nvcc. The grader gives a job file; each case's inputs are read from DIR/<number>.in, its
// output is written to OUT/<number>.out, and what happened is appended to the progress file, so that after a crash the
// grader knows which case it was.
#pragma once
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <unistd.h>
#include <vector>
#ifdef TLAB_EMULATION
#include "memory.h"
#endif

namespace harness {

struct Job {
    int number = 0, calls = 1;
    unsigned limit_s = 10;
    float epsilon = 0;
    std::vector<int> ints;
};

inline FILE *&progress() {
    static FILE *file = fopen(getenv("TLAB_PROGRESS"), "a");
    return file;
}
template <class... A> void say(const char *format, A... arguments) {
    fprintf(progress(), format, arguments...);
    fputc('\n', progress());
    fflush(progress());
}
// A finding's kind (common/grading/lessons.py). The emulation finds the cause itself, a GPU only gives a number.
inline const char *kind_of(cudaError_t error) {
#ifndef TLAB_EMULATION
    if (error == cudaErrorIllegalAddress) return "out-of-bounds";
    if (error == cudaErrorMisalignedAddress) return "misaligned";
    if (error == cudaErrorLaunchFailure) return "kernel-trap";
    if (error == cudaErrorInvalidConfiguration) return "launch-shape";
    if (error == cudaErrorCooperativeLaunchTooLarge) return "cooperative-too-large";
#endif
    return "launch-error";
}
inline void need(cudaError_t error, const char *what) {
    if (error == cudaSuccess) return;
    say("finding %s %s: %s", kind_of(error), what, cudaGetErrorString(error));
    fflush(nullptr);
    _exit(78);
}

// Device memory with guard bytes round it on a GPU; the emulation's AddressSanitizer needs none.
class DeviceBuffer {
#ifdef TLAB_EMULATION
    static constexpr size_t kGuard = 0;
#else
    static constexpr size_t kGuard = 4096;
#endif
    const char *name_;
    char *base_ = nullptr;
    size_t bytes_;

  public:
    DeviceBuffer(const char *name, size_t count) : name_(name), bytes_(count * sizeof(float)) {
        need(cudaMalloc(&base_, bytes_ + 2 * kGuard), "cudaMalloc in the harness");
#ifdef TLAB_EMULATION
        emu::name_buffer(name, base_, bytes_);
#else
        need(cudaMemset(base_, 0xFF, bytes_ + 2 * kGuard), "cudaMemset in the harness");
#endif
    }
    DeviceBuffer(const DeviceBuffer &) = delete;
    ~DeviceBuffer() {
#ifdef TLAB_EMULATION
        emu::give_back(base_);
#endif
        cudaFree(base_);
    }
    float *get() const { return reinterpret_cast<float *>(base_ + kGuard); }
    // Before the call an output holds words that nothing else does: NaNs, or (the grader's second pattern) large values.
    void fill_as_output() const {
        const char *pattern = getenv("EMU_FILL");
        unsigned word = pattern && atoi(pattern) == 0x4B ? 0x4B4BDEADu : 0xFFFFDEADu;
        std::vector<float> words(bytes_ / sizeof(float));
        for (float &w : words) memcpy(&w, &word, sizeof word);
        put(words);
    }
    void put(const std::vector<float> &from) const {
        need(cudaMemcpy(get(), from.data(), bytes_, cudaMemcpyHostToDevice), "cudaMemcpy in the harness");
    }
    std::vector<float> take() const {
        std::vector<float> to(bytes_ / sizeof(float));
        need(cudaMemcpy(to.data(), get(), bytes_, cudaMemcpyDeviceToHost), "the kernel");
        return to;
    }
    void check_unchanged(const std::vector<float> &before) const {
        std::vector<float> after = take();
        for (size_t i = 0; i < before.size(); ++i)
            if (memcmp(&after[i], &before[i], sizeof(float)) != 0) {
                say("finding input-changed %s[%zu] was %.9g and is %.9g after the call", name_, i, double(before[i]), double(after[i]));
                return;
            }
    }
    void check_guards() const {
        if (!kGuard) return;
        std::vector<unsigned char> all(bytes_ + 2 * kGuard);
        need(cudaMemcpy(all.data(), base_, all.size(), cudaMemcpyDeviceToHost), "the kernel");
        for (size_t i = 0; i < all.size(); ++i)
            if ((i < kGuard || i >= kGuard + bytes_) && all[i] != 0xFF) {
                say("finding guard-bytes memory next to %s was overwritten", name_);
                return;
            }
    }
};

// The arrays of a case: float32, one after another in its input file.
class Inputs {
    FILE *file_;

  public:
    Inputs(const std::string &folder, int number) : file_(fopen((folder + "/" + std::to_string(number) + ".in").c_str(), "rb")) {}
    ~Inputs() { fclose(file_); }
    std::vector<float> next(size_t count) {
        std::vector<float> values(count);
        if (fread(values.data(), sizeof(float), count, file_) != count) say("finding harness-error short input file");
        return values;
    }
};

// Other values than the case's own, for the calls before the one that is checked.
inline std::vector<float> disturbed(const std::vector<float> &values) {
    std::vector<float> other(values.rbegin(), values.rend());
    for (float &v : other) v = 3.0f * v + 1.0f;
    return other;
}

// Calls the function `job.calls` times; `load(last)` sets the buffers up before each. Memory that grows from call to call
// is a leak: a function may keep a scratch buffer from its first call on.
template <class Load, class Call> void call(const Job &job, const DeviceBuffer &output, Load load, Call function) {
    for (int i = 0; i < job.calls; ++i) {
        load(i + 1 == job.calls);
        output.fill_as_output();
#ifdef TLAB_EMULATION
        emu::Counts before = emu::counts();
#endif
        function();
        need(cudaGetLastError(), "after the call");
        need(cudaDeviceSynchronize(), "the kernel");
#ifdef TLAB_EMULATION
        emu::Counts after = emu::counts();
        say("work %zu", after.launches - before.launches + after.copies - before.copies);
        say("launches %zu", after.launches - before.launches);
        if (i > 0 && after.allocated_bytes > before.allocated_bytes)
            say("finding leak each call leaves %zu more bytes of device memory allocated", after.allocated_bytes - before.allocated_bytes);
#endif
    }
}

inline void write_output(const std::string &folder, int number, const std::vector<float> &values) {
    FILE *file = fopen((folder + "/" + std::to_string(number) + ".out").c_str(), "wb");
    fwrite(values.data(), sizeof(float), values.size(), file);
    fclose(file);
}

}  // namespace harness

// Each lab's harness defines this: read inputs, call the function, return the output.
std::vector<float> run_case(const harness::Job &job, harness::Inputs &inputs);

int main(int argc, char **argv) {
    if (argc != 4) return 2;  // JOBS INPUTS OUTPUTS
    FILE *jobs = fopen(argv[1], "r");
    if (!jobs) return 2;
    cudaFree(nullptr);  // starts the GPU, which can take seconds, before the first case's time begins
    const bool echo = getenv("TLAB_ECHO") != nullptr;  // among compute-sanitizer's reports: which case they belong to
    harness::Job job;
    int count = 0;
    while (fscanf(jobs, "%d %d %u %g %d", &job.number, &job.calls, &job.limit_s, &job.epsilon, &count) == 5) {
        job.ints.resize(count);
        for (int &value : job.ints)
            if (fscanf(jobs, "%d", &value) != 1) return 2;
        harness::say("begin %d", job.number);
        if (echo) {
            printf("case %d\n", job.number);
            fflush(stdout);
        }
        alarm(job.limit_s);  // an endless loop ends here; the grader has a limit of its own as well
        {
            harness::Inputs inputs(argv[2], job.number);
            harness::write_output(argv[3], job.number, run_case(job, inputs));
        }
        alarm(0);
        harness::say("end %d", job.number);
    }
    fclose(jobs);
    fflush(nullptr);
    _exit(0);
}
