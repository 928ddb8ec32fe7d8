/* GnuTLS, loaded when it is needed (gnutls_library.h). */
#define GNUTLS_LIBRARY_NAMES /* the functions' own */
#include "util/gnutls_library.h"

struct gnutls_library gnutls_library;

static const struct library_name names[] = {
#define ENTRY(name) {#name, offsetof(struct gnutls_library, name)},
    GNUTLS_FUNCTIONS(ENTRY)
#undef ENTRY
};

struct library gnutls_library_file = {.file = "libgnutls.so.30", .package = "libgnutls30", .name = names, .count = sizeof names / sizeof *names, .table = &gnutls_library};
