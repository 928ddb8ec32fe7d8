/* liblzma (util/library.h): for kernels that are packed so. */
#ifndef DOPPEL_CHIPSET_LZMA_LIBRARY_H
#define DOPPEL_CHIPSET_LZMA_LIBRARY_H

#include <lzma.h>

#include "util/library.h"

#define LZMA_FUNCTIONS(EACH) \
    EACH(lzma_code) \
    EACH(lzma_end) \
    EACH(lzma_stream_decoder)

struct lzma_library {
#define MEMBER(name) __typeof__(name) *name;
    LZMA_FUNCTIONS(MEMBER)
#undef MEMBER
};

extern struct lzma_library lzma_library; /* all NULL before it is loaded */
extern struct library lzma_library_file;

#ifndef LZMA_LIBRARY_NAMES
#define lzma_code lzma_library.lzma_code
#define lzma_end lzma_library.lzma_end
#define lzma_stream_decoder lzma_library.lzma_stream_decoder
#endif

#endif
