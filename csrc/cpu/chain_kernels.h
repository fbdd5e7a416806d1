// SPDX-License-Identifier: MIT
// Row kernels of a chain: activations and feeds of one sample of one node, n entries.
#pragma once

#include "../pc_math.h"

namespace pc {

constexpr int kSampleFeed = -1;  // a feed is an Activation, or this

// a <- a + bias (null: none), mu <- act(a). mu may be a.
template <class T>
void activate(Activation activation, int64_t n, const T* bias, T* a, T* mu);

// grad <- act'(a)^T grad, given mu = act(a)
template <class T>
void activation_vjp(Activation activation, int64_t n, const T* a, const T* mu, T* grad);

// v <- feed(phi); the mask leaves entries out of a softmax. sample: v has n / 2 entries.
template <class T>
void feed_value(int feed, int64_t n, const T* phi, const uint8_t* mask, const T* noise, T* v);

// g <- feed'(phi)^T g in place, v = feed(phi). sample: g holds n / 2 entries and becomes n.
template <class T>
void feed_vjp(int feed, int64_t n, const T* phi, const T* v, const T* noise, T* g);

// delta <- dF/da of `categorical_probs` over softmax: mu * sum(phi) - phi, masked
template <class T>
void softmax_delta(int64_t n, const T* phi, const T* mu, const uint8_t* mask, T* delta);

// sum of g^2, g the Euclidean gradient; g holds the natural direction where `natural` (its Fisher matrix is applied here)
template <class T>
double squared_norm(Energy energy, bool natural, int64_t n, const T* phi, const uint8_t* mask, const uint8_t* moves, const T* g,
                    T* room);

// out <- bfloat16(x), as bits
void to_bfloat16(int64_t n, const float* x, uint16_t* out);

// out <- bfloat16(v - last), last <- v
void difference_to_bfloat16(int64_t n, const float* v, float* last, uint16_t* out);

}  // namespace pc
