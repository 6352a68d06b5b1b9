// The activations of the channel mixers, element by element. Included once for each instruction set.

// in: x; out: relu(x)^2.
template <class Real>
EBB_TARGET void squared_relu_forward(const Rows<Real>& s, int64_t begin, int64_t end, Real*) {
  for (int64_t i = begin * s.width(), last = end * s.width(); i < last; i += LANES<Real>) {
    Vector<Real> x = load_some(s.in[0] + i, last - i);
    x = x < Real(0) ? Vector<Real>{} : x;
    store_some<Real>(s.out[0] + i, x * x, last - i);
  }
}

// out: of x.
template <class Real>
EBB_TARGET void squared_relu_backward(const Rows<Real>& s, int64_t begin, int64_t end, Real*) {
  for (int64_t i = begin * s.width(), last = end * s.width(); i < last; i += LANES<Real>) {
    Vector<Real> x = load_some(s.in[0] + i, last - i);
    x = x < Real(0) ? Vector<Real>{} : x;
    store_some<Real>(s.out[0] + i, (x + x) * load_some(s.cotangents[0] + i, last - i), last - i);
  }
}

// in: gate, up; out: silu(gate) up.
template <class Real>
EBB_TARGET void swiglu_forward(const Rows<Real>& s, int64_t begin, int64_t end, Real*) {
  for (int64_t i = begin * s.width(), last = end * s.width(); i < last; i += LANES<Real>) {
    const Vector<Real> gate = load_some(s.in[0] + i, last - i);
    store_some<Real>(s.out[0] + i, gate * sigmoid<Real>(gate) * load_some(s.in[1] + i, last - i),
                     last - i);
  }
}

// out: of gate, of up.
template <class Real>
EBB_TARGET void swiglu_backward(const Rows<Real>& s, int64_t begin, int64_t end, Real*) {
  for (int64_t i = begin * s.width(), last = end * s.width(); i < last; i += LANES<Real>) {
    const int64_t n = last - i;
    const Vector<Real> gate = load_some(s.in[0] + i, n), cotangent = load_some(s.cotangents[0] + i, n);
    const Vector<Real> opened = sigmoid<Real>(gate), silu = gate * opened;
    store_some<Real>(
        s.out[0] + i, cotangent * load_some(s.in[1] + i, n) * (opened + silu * (Real(1) - opened)),
        n);
    store_some<Real>(s.out[1] + i, cotangent * silu, n);
  }
}
