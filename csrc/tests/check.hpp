// What the C++ tests need of a test framework: a failed check says where and ends the test.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>

#define CHECK(condition)                                                          \
  do {                                                                            \
    if (!(condition)) {                                                           \
      std::fprintf(stderr, "%s:%d: CHECK(%s)\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                               \
    }                                                                             \
  } while (false)

// The message of the Error that `run` throws; a test failure where it throws nothing.
template <typename Error, typename Run>
std::string message_of(Run run) {
  try {
    run();
  } catch (const Error& error) {
    return error.what();
  }
  std::fprintf(stderr, "expected an exception, got none\n");
  std::exit(1);
}
