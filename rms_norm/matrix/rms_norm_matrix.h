#pragma once

// Normalises each row of a row-major matrix; input, weight and output are device pointers.
// input, output: rows x cols; weight: cols.
void rms_norm_matrix(float *input, float *weight, float *output, int rows, int cols, float epsilon);
