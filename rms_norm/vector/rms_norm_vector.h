#pragma once

// Normalises one long vector; input, weight and output are device pointers to `cols` floats each.
void rms_norm_vector(float *input, float *weight, float *output, int cols, float epsilon);
