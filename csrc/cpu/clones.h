// SPDX-License-Identifier: MIT
// PC_CLONES: a function compiled for several instruction sets, chosen when the module is loaded; never -march=native.
#pragma once

// glibc resolves such functions at load time; elsewhere the baseline is all there is.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define PC_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define PC_CLONES
#endif
