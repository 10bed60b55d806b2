// A CPU emulation of the part of the CUDA runtime that the kernel labs use: a teaching tool, see README.md beside it.
#pragma once
#include <utility>
#include "types.h"
#include "runtime_api.h"
#include "device_api.h"
