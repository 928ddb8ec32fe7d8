/* libarchive, loaded when it is needed (archive_library.h). */
#define ARCHIVE_LIBRARY_NAMES /* the functions' own */
#include "cli/archive_library.h"

#include <dlfcn.h>
#include <stddef.h>

#include "cli/arguments.h"

#define FILE_NAME "libarchive.so.13" /* the version that the headers are of: libarchive 3 */
_Static_assert(ARCHIVE_VERSION_NUMBER / 1000000 == 3, "another libarchive has another file name");

struct archive_library archive_library;

static const struct {
    const char *name;
    size_t offset; /* of the pointer in the table */
} functions[] = {
#define ENTRY(name) {#name, offsetof(struct archive_library, name)},
    ARCHIVE_FUNCTIONS(ENTRY)
#undef ENTRY
};

int archive_library_load(void)
{
    if (archive_library.archive_read_new)
        return 0;
    void *library = dlopen(FILE_NAME, RTLD_NOW | RTLD_LOCAL); /* for as long as the program runs */
    if (!library)
        return complain(STATUS_ERROR, "archives need libarchive (package libarchive13): %s", dlerror());
    for (size_t i = 0; i < sizeof functions / sizeof *functions; i++) {
        void *function = dlsym(library, functions[i].name);
        if (!function)
            return complain(STATUS_ERROR, "this libarchive is too old: %s", dlerror());
        *(void **)((char *)&archive_library + functions[i].offset) = function;
    }
    return 0;
}
