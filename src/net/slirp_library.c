/* libslirp, loaded when it is needed (slirp_library.h). */
#define SLIRP_LIBRARY_NAMES /* the functions' own */
#include "net/slirp_library.h"

struct slirp_library slirp_library;

static const struct library_name names[] = {
#define ENTRY(name) {#name, offsetof(struct slirp_library, name)},
    SLIRP_FUNCTIONS(ENTRY)
#undef ENTRY
};

struct library slirp_library_file = {.file = "libslirp.so.0", .package = "libslirp0", .name = names, .count = sizeof names / sizeof *names, .table = &slirp_library};
