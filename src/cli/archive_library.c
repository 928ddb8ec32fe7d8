/* libarchive, loaded when it is needed (archive_library.h). */
#define ARCHIVE_LIBRARY_NAMES /* the functions' own */
#include "cli/archive_library.h"

#include "cli/arguments.h"
#include "util/library.h"

_Static_assert(ARCHIVE_VERSION_NUMBER / 1000000 == 3, "another libarchive has another file name");

struct archive_library archive_library;

static const struct library_name names[] = {
#define ENTRY(name) {#name, offsetof(struct archive_library, name)},
    ARCHIVE_FUNCTIONS(ENTRY)
#undef ENTRY
};

int archive_library_load(void)
{
    static struct library library = {.file = "libarchive.so.13", .package = "libarchive13", .name = names, .count = sizeof names / sizeof *names, .table = &archive_library};
    struct error err = {0};
    return library_load(&library, &err) ? complain(STATUS_ERROR, "archives: %s", err.text) : 0;
}
