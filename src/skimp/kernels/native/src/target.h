// SKIMP_TARGET("avx2,fma"): compile the rest of the file for that instruction set. Include every
// standard header before it, or their inline functions would be compiled for it too.
#pragma once
#define SKIMP_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define SKIMP_TARGET(features) \
  SKIMP_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define SKIMP_TARGET_END SKIMP_PRAGMA(clang attribute pop)
#else
#define SKIMP_TARGET(features) SKIMP_PRAGMA(GCC target(features))
#define SKIMP_TARGET_END
#endif
