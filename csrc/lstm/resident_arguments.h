// The arguments of the resident kernels from a row of integers, sizes and addresses in the order of the structs'
// fields: as Python gives them.
#pragma once

#include <cstdint>
#include <type_traits>

#include "lstm_resident.h"

namespace sora {

constexpr int kLstmResidentNumbers = 24;  // of either pass; the shape's first
constexpr int kLstmResidentShapeNumbers = 10;

class NumbersInOrder {
 public:
  explicit NumbersInOrder(const int64_t* numbers) : next_(numbers) {}
  template <class T>
  void get(T& field) {
    if constexpr (std::is_pointer_v<T>)
      field = reinterpret_cast<T>(static_cast<uintptr_t>(*next_++));
    else
      field = static_cast<T>(*next_++);
  }
  template <class... T>
  void get_all(T&... fields) {
    (get(fields), ...);
  }
  void get_shape(LstmResidentShape& s) {
    get_all(s.cell, s.T, s.B, s.H, s.D, s.members, s.data_rows, s.lengths, s.offsets, s.reset);
  }

 private:
  const int64_t* next_;
};

inline LstmResidentShape lstm_resident_shape_of(const int64_t* numbers) {
  LstmResidentShape shape;
  NumbersInOrder(numbers).get_shape(shape);
  return shape;
}

inline LstmResidentForward lstm_resident_forward_of(const int64_t* numbers) {
  LstmResidentForward a;
  NumbersInOrder in(numbers);
  in.get_shape(a.shape);
  in.get_all(a.gx, a.w_hh[0], a.w_hh[1], a.b_ih[0], a.b_ih[1], a.b_hh[0], a.b_hh[1], a.h0, a.c0, a.gates, a.y, a.cells,
             a.h_n, a.c_n);
  return a;
}

inline LstmResidentBackward lstm_resident_backward_of(const int64_t* numbers) {
  LstmResidentBackward a;
  NumbersInOrder in(numbers);
  in.get_shape(a.shape);
  in.get_all(a.gates, a.cells, a.y, a.w_hh[0], a.w_hh[1], a.h0, a.c0, a.dy, a.dcells, a.dh_n, a.dc_n, a.dgates, a.dh0,
             a.dc0);
  return a;
}

}  // namespace sora
