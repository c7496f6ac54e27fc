// What of the row primitive (row_kernel.h) differs between divergences: its loops over one block of a row's columns.
//
// They are chosen at run time, once for a call, so that the primitive itself is compiled once for each precision, and every
// loop once for all that use the primitive: block_sums.cpp has the first pass's, loops_*.cpp the others'.
#pragma once

#include "../mix.h"

namespace fastkd {

constexpr int64_t kBlock = 1024;  // columns: student, teacher and gradient blocks take 12 KB of fp32 together

// ---- the first pass -------------------------------------------------------------------------------------------------

template <class F>
struct BlockSums {
  F student, teacher, difference;
  F moment;                    // of the teacher's, or the only one
  F student_moment;            // beside it, for Moment::kBoth
  F student_own, teacher_own;  // sum q log q and sum p log p
};

// The exponentials of a row that is one block long, kept from the sums for the gradient: half of a short row's work. For a
// careful forward KL, or a mix with it, `student` is what the student's exceed the teacher's by.
template <class F>
struct Exponentials {
  F student[kBlock], teacher[kBlock];
  bool kept = false;
};

// How the first pass sums up a block: plainly; plainly with an eye on scores of -inf; or to the accuracy of Pair. The
// moment is sum p log(p / q), or sum q log(q / p) for the student's; the careful pass sums up p log(p / q) + q - p
// instead, of second order like the divergence, and its caller takes q - p off again, exactly.
enum class Pass { kPlain, kMasked, kCareful };

template <class F>
using SumLoop = BlockSums<F> (*)(const F* s, const F* t, int64_t n, const RowConstants<F>& row, Exponentials<F>* kept);

// metrics: also what the models' entropies take. keep: the exponentials are written to `kept`; not by the plain pass.
template <class F>
SumLoop<F> sum_loop(Moment moment, Pass pass, bool metrics, bool keep);

// ---- the other passes -----------------------------------------------------------------------------------------------

// Those of any divergence; each takes what it needs.
template <class F>
struct AllConstants : Beta<F>, MixConstants<F> {
  explicit AllConstants(const Shape& shape) : Beta<F>(shape), MixConstants<F>(shape) {}
};

template <class F>
struct BlockValue {
  F value, slope, coslope;
};

// Of one divergence. Arrays hold the plain loop and the careful one: see RowStats::careful.
template <class F>
struct Loops {
  Moment moment;
  // Absent where a moment of the first pass gives the divergence.
  BlockValue<F> (*value)(const F* s, const F* t, int64_t n, const RowConstants<F>& row, const AllConstants<F>& constants);
  // g may be s. All three are read and written at the same j only.
  void (*gradient[2])(const F* s, const F* t, F* g, int64_t n, const RowConstants<F>& row,
                      const AllConstants<F>& constants, F scale);
  // The same where the exponentials are at hand, absent where they do not help. surplus: the student's sum of them over
  // the teacher's, minus 1.
  void (*gradient_kept[2])(const F* s, const F* t, F* g, int64_t n, const RowConstants<F>& row,
                           const AllConstants<F>& constants, const Exponentials<F>& kept, F surplus, F scale);
};

template <class D, class F>
Loops<F> loops();

}  // namespace fastkd
