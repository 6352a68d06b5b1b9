// All kernels for one instruction set: EBB_NAMESPACE, EBB_TARGET (the functions' attribute),
// EBB_VECTOR_BYTES and EBB_PANEL_VECTORS (what fits into its registers) say which.
namespace EBB_NAMESPACE {

#include "simd.h"
#include "exponential.h"
#include "rows_simd.h"
#include "scan_forward.h"
#include "scan_backward.h"
#include "products.h"
#include "chunks_forward.h"
#include "chunks_backward.h"
#include "wkv4_kernels.h"
#include "rows_shift.h"
#include "rows_rwkv7.h"
#include "rows_head_norm.h"
#include "rows_norm.h"
#include "rows_convolution.h"
#include "rows_head_rms.h"
#include "rows_activation.h"
#include "rows_table.h"

}  // namespace EBB_NAMESPACE
#undef EBB_INLINE
#undef EBB_FOR_ALL_KEYS
#undef EBB_NAMESPACE
#undef EBB_TARGET
#undef EBB_VECTOR_BYTES
#undef EBB_PANEL_VECTORS
