/* libvterm, loaded when it is needed (vterm_library.h). */
#define VTERM_LIBRARY_NAMES /* the functions' own */
#include "control/vterm_library.h"

struct vterm_library vterm_library;

static const struct library_name names[] = {
#define ENTRY(name) {#name, offsetof(struct vterm_library, name)},
    VTERM_FUNCTIONS(ENTRY)
#undef ENTRY
};

struct library vterm_library_file = {.file = "libvterm.so.0", .package = "libvterm0", .name = names, .count = sizeof names / sizeof *names, .table = &vterm_library};
