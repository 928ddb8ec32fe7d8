/* liblzma, loaded when it is needed (lzma_library.h). */
#define LZMA_LIBRARY_NAMES /* the functions' own */
#include "chipset/lzma_library.h"

struct lzma_library lzma_library;

static const struct library_name names[] = {
#define ENTRY(name) {#name, offsetof(struct lzma_library, name)},
    LZMA_FUNCTIONS(ENTRY)
#undef ENTRY
};

struct library lzma_library_file = {.file = "liblzma.so.5", .package = "liblzma5", .name = names, .count = sizeof names / sizeof *names, .table = &lzma_library};
