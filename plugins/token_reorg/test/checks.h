// A minimal test framework.
#pragma once

#include <cstdio>
#include <cstdlib>

namespace checks {

inline int failed = 0;

inline void check(bool holds, const char* what, const char* file, int line) {
  if (holds) return;
  std::fprintf(stderr, "%s:%d: does not hold: %s\n", file, line, what);
  ++failed;
}

// Ends the program; failed checks were printed to standard error, one line each.
[[noreturn]] inline void finish() { std::exit(failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE); }

}  // namespace checks

#define CHECK(...) checks::check((__VA_ARGS__), #__VA_ARGS__, __FILE__, __LINE__)
