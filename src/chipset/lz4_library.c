/* LZ4, loaded when it is needed (lz4_library.h). */
#define LZ4_LIBRARY_NAMES /* the functions' own */
#include "chipset/lz4_library.h"

struct lz4_library lz4_library;

static const struct library_name names[] = {
#define ENTRY(name) {#name, offsetof(struct lz4_library, name)},
    LZ4_FUNCTIONS(ENTRY)
#undef ENTRY
};

struct library lz4_library_file = {.file = "liblz4.so.1", .package = "liblz4-1", .name = names, .count = sizeof names / sizeof *names, .table = &lz4_library};
