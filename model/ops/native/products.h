// Small matrix products, for blocks that stand in the caches. Included once for each instruction set.
//
// A block of the result stays in registers while the products run over the inner dimension: each
// step loads one panel of b and multiplies it with one number of a for each row, so that loads are
// at most half of the multiply-adds. Nothing is packed: a may lie in any order, b in rows.

// Rows of a block with NV vectors: so many that there are as many sums as fit the registers, and
// more than a multiply-add takes cycles. 16 rows are a whole number of blocks.
template <int NV>
constexpr int BLOCK_ROWS = 4 * EBB_PANEL_VECTORS / NV;

// A matrix in some memory: how far apart its rows and columns are.
template <class Real>
struct View {
  const Real* at;
  int64_t row, column;
  View transposed() const { return {at, column, row}; }
};

// Where the left matrix of a product is known to be zero.
enum class Zeros { NOWHERE, ABOVE_DIAGONAL, BELOW_DIAGONAL };

// to = diag(keep) from + a b, without `from` a b alone. `to` and `from` have rows of the same length
// and may be the same; `keep` is one number a row, or with a step of 0 the same for all. Rows are a
// multiple of 16, columns and the rows of `to` whole vectors.
template <class Real>
struct Product {
  int64_t rows, inner, columns;
  View<Real> a;
  const Real* b;
  int64_t b_row;
  Real* to;
  int64_t to_row;
  const Real* from = nullptr;
  const Real* keep = nullptr;
  int64_t keep_step = 0;
  Zeros zeros = Zeros::NOWHERE;
};

template <class Real, int NV>
EBB_INLINE void product_block(const Product<Real>& p, int64_t row, int64_t column) {
  using V = Vector<Real>;
  constexpr int lanes = LANES<Real>, rows = BLOCK_ROWS<NV>;
  V sums[rows][NV];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j)
      sums[r][j] = p.from ? load(p.from + (row + r) * p.to_row + column + j * lanes) *
                                p.keep[(row + r) * p.keep_step]
                          : V{};
  const int64_t begin = p.zeros == Zeros::BELOW_DIAGONAL ? row : 0;
  const int64_t end = p.zeros == Zeros::ABOVE_DIAGONAL ? row + rows : p.inner;
  const Real* a = p.a.at + row * p.a.row + begin * p.a.column;
  const Real* b = p.b + begin * p.b_row + column;
  for (int64_t k = begin; k < end; ++k, a += p.a.column, b += p.b_row) {
    V x[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) x[j] = load(b + j * lanes);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) sums[r][j] += x[j] * a[r * p.a.row];
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) store(p.to + (row + r) * p.to_row + column + j * lanes, sums[r][j]);
}

template <class Real, int NV>
EBB_TARGET void product_panel(const Product<Real>& p, int64_t column) {
  for (int64_t row = 0; row < p.rows; row += BLOCK_ROWS<NV>)
    product_block<Real, NV>(p, row, column);
}

template <class Real>
EBB_TARGET void multiply(const Product<Real>& p) {
  for (int64_t column = 0; column < p.columns;) {
    const int vectors = panel_vectors<Real>(p.columns - column);
    if (vectors == EBB_PANEL_VECTORS)
      product_panel<Real, EBB_PANEL_VECTORS>(p, column);
    else if (vectors == 2)
      product_panel<Real, 2>(p, column);
    else
      product_panel<Real, 1>(p, column);
    column += vectors * LANES<Real>;
  }
}
