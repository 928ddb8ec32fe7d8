/* GLib, loaded when it is needed (glib_library.h). */
#define GLIB_LIBRARY_NAMES /* the functions' own */
#include "util/glib_library.h"

struct glib_library glib_library;

static const struct library_name names[] = {
#define ENTRY(name) {#name, offsetof(struct glib_library, name)},
    GLIB_FUNCTIONS(ENTRY)
#undef ENTRY
};

struct library glib_library_file = {.file = "libglib-2.0.so.0", .package = "libglib2.0-0", .name = names, .count = sizeof names / sizeof *names, .table = &glib_library};
