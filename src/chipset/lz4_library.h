/* LZ4 (util/library.h): for kernels that are packed so. */
#ifndef DOPPEL_CHIPSET_LZ4_LIBRARY_H
#define DOPPEL_CHIPSET_LZ4_LIBRARY_H

#include <lz4.h>

#include "util/library.h"

#define LZ4_FUNCTIONS(EACH) \
    EACH(LZ4_decompress_safe)

struct lz4_library {
#define MEMBER(name) __typeof__(name) *name;
    LZ4_FUNCTIONS(MEMBER)
#undef MEMBER
};

extern struct lz4_library lz4_library; /* all NULL before it is loaded */
extern struct library lz4_library_file;

#ifndef LZ4_LIBRARY_NAMES
#define LZ4_decompress_safe lz4_library.LZ4_decompress_safe
#endif

#endif
