// The resident recurrent kernels for ctypes: what bind.cpp gives Python, as C functions. 0 or an error.
#include <lstm/lstm_resident.cu>
#include <lstm/resident_bwd_bf16.cu>
#include <lstm/resident_bwd_fp16.cu>
#include <lstm/resident_bwd_tf32.cu>
#include <lstm/resident_fwd_bf16.cu>
#include <lstm/resident_fwd_fp16.cu>
#include <lstm/resident_fwd_tf32.cu>

#include "lstm_resident.cuh"
