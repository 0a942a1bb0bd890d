// What a shared library shows of itself.
#pragma once

#if defined(__GNUC__)
#define IQMPC_API __attribute__((visibility("default")))
#else
#define IQMPC_API
#endif
