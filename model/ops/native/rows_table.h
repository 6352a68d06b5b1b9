// All row kernels of one instruction set, in the order of the enumeration in rows.h.
template <class Real>
constexpr RowKernel<Real> ROW_KERNELS[NUM_ROW_KERNELS] = {
    shift_forward<Real>,        shift_backward<Real>,        rwkv7_forward<Real>,
    rwkv7_backward<Real>,       head_norm_forward<Real>,     head_norm_backward<Real>,
    squared_relu_forward<Real>, squared_relu_backward<Real>, swiglu_forward<Real>,
    swiglu_backward<Real>,      norm_forward<Real>,          norm_backward<Real>,
    convolution_forward<Real>,  convolution_backward<Real>,  head_rms_forward<Real>,
    head_rms_backward<Real>,    skip_norm_forward<Real>,     skip_norm_backward<Real>,
    head_scale_forward<Real>,   head_scale_backward<Real>,
};
