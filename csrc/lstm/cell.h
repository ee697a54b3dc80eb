// The recurrent cells, forward and backward: the one place where their formulas stand. Included by the CPU kernels
// (V = a vector of hidden units) and by the CUDA kernels (V = float or double), so that what the CPU tests check is
// what the GPU runs.
#pragma once

#include "../common/activations.h"

namespace sora {

template <class V>
struct LstmGates {
  V i, f, g, o;
};

// gates: before -> after activation. Returns c; h through `h`.
template <class V>
SORA_HOST_DEVICE V lstm_cell(LstmGates<V>& gates, V c_prev, V& h) {
  V active[4] = {gates.i, gates.f, gates.o, gates.g};
  activate<3>(active);
  gates = {active[0], active[1], active[3], active[2]};
  const V c = gates.f * c_prev + gates.i * gates.g;
  h = gates.o * tanh(c);
  return c;
}

// gates: after activation. dh: dL/dh(t), whole. dc: dL/dc(t) by every way but h(t) -> dL/dc(t-1).
// Returns the gradient of the gates before activation. tanh(c) is computed again: cheaper than to store it.
template <class V>
SORA_HOST_DEVICE LstmGates<V> lstm_cell_backward(const LstmGates<V>& gates, V c_prev, V c, V dh, V& dc) {
  using Scalar = typename Lanes<V>::Scalar;
  const Scalar one(1);
  const V tanh_c = tanh(c);
  const V dc_total = dc + dh * gates.o * (one - tanh_c * tanh_c);
  LstmGates<V> d;
  d.i = dc_total * gates.g * gates.i * (one - gates.i);
  d.f = dc_total * c_prev * gates.f * (one - gates.f);
  d.g = dc_total * gates.i * (one - gates.g * gates.g);
  d.o = dh * tanh_c * gates.o * (one - gates.o);
  dc = dc_total * gates.f;
  return d;
}

// q: the new gate's part from h, W_hn h + b_hn, which r scales.
template <class V>
struct GruGates {
  V r, z, n, q;
};

// r, z: before -> after activation; n: part from x -> after activation. Returns h.
template <class V>
SORA_HOST_DEVICE V gru_cell(GruGates<V>& gates, V h_prev) {
  V active[2] = {gates.r, gates.z};
  activate<2>(active);
  gates.r = active[0];
  gates.z = active[1];
  gates.n = tanh(gates.n + gates.r * gates.q);
  return gates.n + gates.z * (h_prev - gates.n);
}

// gates: as gru_cell left them. dh: dL/dh(t), whole -> its part that goes straight to h(t-1).
// Returns the gradient of r, z, n before activation, and of q.
template <class V>
SORA_HOST_DEVICE GruGates<V> gru_cell_backward(const GruGates<V>& gates, V h_prev, V& dh) {
  using Scalar = typename Lanes<V>::Scalar;
  const Scalar one(1);
  GruGates<V> d;
  d.n = dh * (one - gates.z) * (one - gates.n * gates.n);
  d.z = dh * (h_prev - gates.n) * gates.z * (one - gates.z);
  d.r = d.n * gates.q * gates.r * (one - gates.r);
  d.q = d.n * gates.r;
  dh = dh * gates.z;
  return d;
}

template <class V>
SORA_HOST_DEVICE V relu(V x) {
  return x < V{} ? V{} : x;  // NaN stays
}

// h: after activation. Returns the gradient before it.
template <class V>
SORA_HOST_DEVICE V tanh_backward(V h, V dh) {
  using Scalar = typename Lanes<V>::Scalar;
  return dh * (Scalar(1) - h * h);
}
template <class V>
SORA_HOST_DEVICE V relu_backward(V h, V dh) {
  return h <= V{} ? V{} : dh;
}

}  // namespace sora
