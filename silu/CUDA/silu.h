#pragma once

// output[i] = input[i] * sigmoid(input[i]); both are device pointers to n floats.
void silu(float *input, float *output, int n);
