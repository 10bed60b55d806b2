#pragma once

// Copies the first column of a row-major host matrix to the device.
// h_A: rows x cols floats in host memory that is page-locked and mapped; d_A: device memory for `rows` floats.
void copy_first_column(float *h_A, float *d_A, int rows, int cols);
